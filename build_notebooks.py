"""Render the programs to notebooks, and keep the cells they share equal.

    python build_notebooks.py                                   render; write the badges
    python build_notebooks.py --sync standalone/cifar10_ast.py  carry its shared cells to the others; render
    python build_notebooks.py --check                           write nothing; fail where one of these is due
    python build_notebooks.py --kaggle USER                     write folders that `kaggle kernels push` takes

A program in `standalone/` (jupytext's percent format) is the source of truth; `notebooks/` holds its image.
The cells that every program needs are tagged `shared` and stand in each of them, byte for byte, as one run of
titled cells with the program's own cells before and after.

Exit status: 0 done; 1 `--check` found something stale, and printed a diff and the command that mends it;
2 bad input.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import jupytext
import nbformat

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent
COMMAND = "python build_notebooks.py"

# What a program's YAML header must say under `jupytext:` to survive script → notebook → script anywhere.
JUPYTEXT_HEADER = {
    # By default a comment that starts with `cat` or `ls` becomes a magic, which breaks the notebook.
    "comment_magics": False,
    "cell_metadata_filter": "tags,title,-all",
    "formats": "notebooks///ipynb,standalone///py:percent",
    # The version would make every program stale with each new jupytext.
    "notebook_metadata_filter": ",".join(
        ["accelerator", "colab", "language_info", "-jupytext.text_representation.jupytext_version"]
    ),
}
KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}

CELL = re.compile(r"^(?=# %%\s)", re.MULTILINE)
# What a program's settings cell must say to be pushed to Kaggle: OWNER/SLUG of the data set to attach.
KAGGLE_DATA = re.compile(r'^KAGGLE_DATA = "([\w-]+/[\w-]+)"', re.MULTILINE)
KAGGLE_FOLDER = "build/kaggle"

BADGES_START = re.compile(r"^(?:# )?<!-- badges -->$", re.MULTILINE)
BADGES = re.compile(r"^((?:# )?)<!-- badges -->\n(?:.*\n)*?\1<!-- /badges -->$", re.MULTILINE)


class BuildError(Exception):
    """Bad input, in one sentence: where, what was found or expected, what to do."""

    def __init__(self, where: str, fault: str, remedy: str) -> None:
        super().__init__(f"{where}: {fault}; {remedy}")


@dataclass(frozen=True)
class Program:
    """A script's text in three parts, so that carrying shared cells is replacing the middle one."""

    name: str  # path from the repository's root
    before: str
    shared: str  # without the blank lines at its end, whose number depends on the cell that follows
    after: str

    @property
    def text(self) -> str:
        return self.before + self.shared + self.after

    @property
    def notebook(self) -> str:
        return f"notebooks/{Path(self.name).stem}.ipynb"


# Reading


def read(root: Path, name: str) -> str:
    try:
        text = (root / name).read_bytes().decode()  # not read_text, which hides carriage returns
    except FileNotFoundError:
        raise BuildError(name, "expected a file, found none", "run this in a whole checkout") from None
    except UnicodeDecodeError as error:
        raise BuildError(name, f"byte {error.start} is not UTF-8", "save the file as UTF-8") from None
    if "\r" in text:
        raise BuildError(name, "expected \\n line ends, found \\r", "save it with Unix line ends")
    return text


def load_programs(root: Path) -> list[Program]:
    names = [f"standalone/{path.name}" for path in sorted((root / "standalone").glob("*.py"))]
    if not names:
        raise BuildError("standalone/", "expected a program, found none", "run this in a whole checkout")
    return [split(name, read(root, name)) for name in names]


def split(name: str, text: str) -> Program:
    cells = parse(name, text).cells
    header, *pieces = CELL.split(text)
    if len(pieces) != len(cells):
        fault = f"{len(pieces)} lines start with `# %%` but jupytext finds {len(cells)} cells"
        remedy = "let only cells start so, and put nothing between header and first cell"
        raise BuildError(name, fault, remedy)
    shared = [index for index, cell in enumerate(cells) if "shared" in cell.metadata.get("tags", [])]
    require_run(name, shared)
    require_titles(name, {index: cells[index].metadata.get("title", "") for index in shared})
    before = header + "".join(pieces[: shared[0]])
    run = "".join(pieces[shared[0] : shared[-1] + 1]).rstrip("\n")
    return Program(name, before, run, text[len(before + run) :])


def parse(name: str, text: str) -> nbformat.NotebookNode:
    # A broken header or tag makes YAML, the notebook schema or jupytext itself raise, each its own errors.
    try:
        notebook = jupytext.reads(text, fmt="py:percent")
    except Exception as error:
        reason = " ".join(str(error).split())
        remedy = "mend its YAML header, or the tags on a `# %%` line"
        raise BuildError(name, f"not a notebook to jupytext ({reason})", remedy) from error
    remedy = "copy the header of a program that passes --check, and give cells only a title and tags"
    found = notebook.metadata.get("jupytext", {})
    for key, expected in JUPYTEXT_HEADER.items():
        if found.get(key) != expected:
            raise BuildError(name, f"header, {key}: found `{found.get(key)}`, expected `{expected}`", remedy)
    found = notebook.metadata.get("kernelspec")
    if found != KERNELSPEC:
        raise BuildError(name, f"header, kernelspec: found {found}, expected {KERNELSPEC}", remedy)
    return notebook


def require_run(name: str, shared: list[int]) -> None:
    if not shared:
        remedy = 'put a cell `# %% Title tags=["shared"]` where the run belongs, which --sync then fills'
        raise BuildError(name, "expected a run of cells tagged `shared`, found none", remedy)
    for index in range(shared[0], shared[-1]):
        if index not in shared:
            fault = f"cell {index + 1} stands between shared cells without the tag `shared`"
            raise BuildError(name, fault, "tag it, or move it before or after them")


def require_titles(name: str, titles: dict[int, str]) -> None:
    for index, title in titles.items():
        if not title:
            raise BuildError(name, f"shared cell {index + 1} has no title", "write one after its `# %%`")
    repeated = [f"`{title}`" for title, times in Counter(titles.values()).items() if times > 1]
    if repeated:
        fault = f"more than one shared cell has the title {', '.join(repeated)}"
        raise BuildError(name, fault, "give each its own")


# What the files should hold


def wanted(root: Path, programs: list[Program]) -> dict[str, str]:
    """Map the name of each file that is written here to the text it should hold."""
    address = repository(read(root, "pyproject.toml"))
    badges = {program: badge_pair(address, program.notebook) for program in programs}
    files = {}
    for program in programs:
        files[program.name] = with_badges(program.name, program.text, badges[program])
        files[program.notebook] = render(program.name, files[program.name])
    if (root / "README.md").exists():
        lines = [f"- `{program.name}` {' '.join(pair)}" for program, pair in badges.items()]
        files["README.md"] = with_badges("README.md", read(root, "README.md"), lines)
    return files


def render(name: str, script: str) -> str:
    """Return the notebook's text: for one script the same bytes on every run and machine."""
    notebook = parse(name, script)
    for index, cell in enumerate(notebook.cells):  # whose ids jupytext draws at random
        slug = re.sub(r"[^a-z0-9]+", "-", str(cell.metadata.get("title", "")).lower())
        cell["id"] = f"{index:02d}-{slug.strip('-')}"[:64].strip("-")
    return nbformat.writes(notebook) + "\n"


def round_trip(program: Program) -> str:
    notebook = jupytext.reads(render(program.name, program.text), fmt="ipynb")
    return jupytext.writes(notebook, fmt="py:percent")


def repository(pyproject: str) -> str:
    """Return OWNER/REPOSITORY from the one place where the public address stands."""
    try:
        url = tomllib.loads(pyproject).get("project", {}).get("urls", {}).get("Repository")
    except tomllib.TOMLDecodeError as error:
        raise BuildError("pyproject.toml", f"expected TOML ({error})", "mend that line") from error
    address = re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?", str(url))
    if not address:
        fault = f"[project.urls] Repository: found {url!r}, expected https://github.com/OWNER/REPOSITORY"
        raise BuildError("pyproject.toml", fault, "write your repository's address there")
    return address[1]


def badge_pair(address: str, notebook: str) -> list[str]:
    page = f"{address}/blob/main/{notebook}"
    colab = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
    kaggle = "[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]"
    return [
        f"{colab}(https://colab.research.google.com/github/{page})",
        f"{kaggle}(https://kaggle.com/kernels/welcome?src=https://github.com/{page})",
    ]


def with_badges(name: str, text: str, lines: list[str]) -> str:
    """Write `lines` between the markers, commented as they are; without markers change nothing."""
    if len(BADGES_START.findall(text)) != len(BADGES.findall(text)):
        raise BuildError(name, "found `<!-- badges -->` without `<!-- /badges -->` after it", "add that line")
    block = ["<!-- badges -->", *lines, "<!-- /badges -->"]
    return BADGES.sub(lambda found: "\n".join(found[1] + line for line in block), text)


# The commands


def write(root: Path) -> None:
    for name, text in wanted(root, load_programs(root)).items():
        path = root / name
        if not path.exists() or path.read_bytes() != text.encode():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(text.encode())
            print(f"wrote {name}")


def sync(root: Path, source: Path) -> None:
    programs = {(root / program.name).resolve(): program for program in load_programs(root)}
    if source.resolve() not in programs:
        names = ", ".join(program.name for program in programs.values())
        raise BuildError(f"--sync {source}", "expected a program", f"name one of {names}")
    origin = programs[source.resolve()]
    for path, program in programs.items():
        if program.shared != origin.shared:
            path.write_bytes(replace(program, shared=origin.shared).text.encode())
            print(f"carried the shared cells of {origin.name} to {program.name}")


def kaggle(root: Path, user: str) -> None:
    """Write, for every program as notebook and as script, a folder with a copy of it and its metadata."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", user):
        raise BuildError(
            f"--kaggle {user}", "expected a Kaggle user name", "take it from your profile's address"
        )
    programs = load_programs(root)
    files = wanted(root, programs)
    for program in programs:
        data = KAGGLE_DATA.search(program.text)
        if not data:
            remedy = "name there the data set to attach, as on Kaggle"
            raise BuildError(program.name, 'expected a line KAGGLE_DATA = "OWNER/SLUG"', remedy)
        for kind, source in (("notebook", program.notebook), ("script", program.name)):
            code = Path(source).name
            folder = root / KAGGLE_FOLDER / f"{Path(code).stem}-{kind}"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / code).write_bytes(files[source].encode())
            metadata = json.dumps(kernel_metadata(user, code, kind, data[1]), indent=2) + "\n"
            (folder / "kernel-metadata.json").write_text(metadata, encoding="utf-8")
            print(f"To push and run it: kaggle kernels push -p {folder.relative_to(root)}")


def kernel_metadata(user: str, code: str, kind: str, data: str) -> dict[str, object]:
    title = f"{Path(code).stem}-{kind}".replace("_", "-")
    return {
        "id": f"{user}/{title}",
        "title": title,  # Kaggle derives the address from the title, and wants both to agree
        "code_file": code,
        "language": "python",
        "kernel_type": kind,
        "is_private": True,
        "enable_gpu": True,
        "machine_shape": "NvidiaTeslaT4",  # without it one may get a P100, for which its torch has no code
        "enable_internet": True,
        "dataset_sources": [data],
        "competition_sources": [],
        "kernel_sources": [],
        "model_sources": [],
    }


def problems(root: Path) -> Iterator[str]:
    """Yield, for all that is stale, what it is, the diff of its mending, and the command that mends it."""
    programs = load_programs(root)
    first = programs[0]
    for other in programs[1:]:
        if other.shared != first.shared:
            yield (
                f"{other.name}: its shared cells are not those of {first.name}\n"
                + diff(other.name, other.text, replace(other, shared=first.shared).text)
                + f"To do this: {COMMAND} --sync {first.name}\n"
                + f"To carry those of {other.name} instead: {COMMAND} --sync {other.name}"
            )
    for program in programs:
        if (again := round_trip(program)) != program.text:
            yield (
                f"{program.name}: does not survive script → notebook → script\n"
                + diff(program.name, program.text, again)
                + f"To do this: {COMMAND} && "
                + f"jupytext --to py:percent --output {program.name} {program.notebook}"
            )
    files = wanted(root, programs)
    for name, text in files.items():
        found = (root / name).read_bytes() if (root / name).exists() else None
        if found is None:
            yield f"{name}: missing\nTo render it: {COMMAND}"
        elif found != text.encode():
            yield f"{name}: stale\n{diff(name, found.decode(errors='replace'), text)}To do this: {COMMAND}"
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        if (name := f"notebooks/{path.name}") not in files:
            yield f"{name}: no program renders to it\nTo remove it: rm {name}"


def diff(name: str, found: str, mended: str) -> str:
    lines = difflib.unified_diff(found.split("\n"), mended.split("\n"), name, f"{name} (mended)", lineterm="")
    return "".join(f"{line}\n" for line in lines)


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="write nothing; exit 1 where something is stale")
    action.add_argument("--sync", type=Path, metavar="PROGRAM", help="carry its shared cells to the others")
    action.add_argument("--kaggle", metavar="USER", help=f"write {KAGGLE_FOLDER}/, for `kaggle kernels push`")
    options = parser.parse_args(arguments)
    try:
        if options.check:
            found = list(problems(root))
            print("\n\n".join(found) or "every notebook is what its program renders to")
            return 1 if found else 0
        if options.kaggle:
            kaggle(root, options.kaggle)
            return 0
        if options.sync:
            sync(root, options.sync)
        write(root)
    except BuildError as error:
        print(f"{COMMAND}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    # A diff shows θ and × even where the terminal cannot.
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
