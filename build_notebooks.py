"""Render the programs to notebooks, and keep the cells they share equal.

    python build_notebooks.py                render; write the badges
    python build_notebooks.py --sync         carry the shared cells to the other programs; render
    python build_notebooks.py --check        write nothing; fail where one of these is due
    python build_notebooks.py --kaggle USER  write folders that `kaggle kernels push` takes

A program in `standalone/` (jupytext's percent format) is the source of truth; `notebooks/` holds its image.
Cells tagged `shared` stand in every program byte for byte, matched by kind and title, in the same order; a
program's own cells may stand between them. Their home is `standalone/cifar10_ast.py`: edit them there.
A code cell tagged `fold` begins with `# @title` and its title; notebooks show only that line.

Exit status: 0 done; 1 `--check` found something stale, and said how to mend it; 2 bad input.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jupytext
import nbformat

ROOT = Path(__file__).resolve().parent
COMMAND = "python build_notebooks.py"
HOME = "standalone/cifar10_ast.py"

# What a program's YAML header must say to survive script → notebook → script anywhere.
HEADER = {
    # By default a comment that starts with `cat` or `ls` becomes a magic, which breaks the notebook.
    "comment_magics": False,
    "cell_metadata_filter": "tags,title,-all",
    "formats": "notebooks///ipynb,standalone///py:percent",
    # The version would make every program stale with each new jupytext.
    "notebook_metadata_filter": ",".join(
        ["accelerator", "colab", "language_info", "-jupytext.text_representation.jupytext_version"]
    ),
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
}
# What hides a folded cell's code in Colab, JupyterLab and Kaggle; the filter drops it on the way to a script.
FOLDED = {"cellView": "form", "jupyter": {"source_hidden": True}, "_kg_hide-input": True}

CELL = re.compile(r"^(?=# %%\s)", re.MULTILINE)
# What a program's settings cell must say to be pushed to Kaggle: OWNER/SLUG of the data set to attach.
KAGGLE_DATA = re.compile(r'^KAGGLE_DATA = "([\w-]+/[\w-]+)"', re.MULTILINE)
KAGGLE_FOLDER = "build/kaggle"

# The one line of pyproject.toml where the public address stands; while it is the placeholder, no badge does.
ADDRESS = re.compile(r'^Repository = "https://github\.com/([\w.-]+/[\w.-]+?)(?:\.git)?/?"$', re.MULTILINE)
PLACEHOLDER = "your-name"
BADGES_START = re.compile(r"^(?:# )?<!-- badges -->$", re.MULTILINE)
BADGES = re.compile(r"^((?:# )?)<!-- badges -->\n(?:.*\n)*?\1<!-- /badges -->$", re.MULTILINE)


class BuildError(Exception):
    """Bad input, in one sentence: where, what was found or expected, what to do."""

    def __init__(self, where: str, fault: str, remedy: str) -> None:
        super().__init__(f"{where}: {fault}; {remedy}")


@dataclass(frozen=True)
class Cell:
    key: tuple[str, str]  # its kind and its title
    shared: bool
    text: str
    gap: str  # the line ends after it, whose number depends on the cell that follows


@dataclass(frozen=True)
class Program:
    name: str  # path from the repository's root
    text: str
    cells: list[Cell]  # the header stands first, as a cell without a title

    @property
    def shared(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.shared]

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
    """Read the programs, the home of the shared cells first."""
    others = {f"standalone/{path.name}" for path in (root / "standalone").glob("*.py")} - {HOME}
    return [split(name, read(root, name)) for name in [HOME, *sorted(others)]]


def split(name: str, text: str) -> Program:
    parsed = parse(name, text).cells
    header, *pieces = CELL.split(text + "\n")  # the last cell, should it move, needs a blank line after it
    if len(pieces) != len(parsed):
        fault = f"{len(pieces)} lines start with `# %%` but jupytext finds {len(parsed)} cells"
        remedy = "let only cells start so, and put nothing between header and first cell"
        raise BuildError(name, fault, remedy)
    cells = [Cell(("header", ""), False, header, "")]
    for found, piece in zip(parsed, pieces, strict=True):
        title, tags = str(found.metadata.get("title", "")), found.metadata.get("tags", [])
        if not title and {"shared", "fold"}.intersection(tags):
            raise BuildError(name, f"cell {len(cells)} has no title", "write one after its `# %%`")
        begin, form = found.source.split("\n")[0], f"# @title {title}"
        if "fold" in tags and (found.cell_type, begin) != ("code", form):
            fault = f"folded cell `{title}`: expected code that begins with `{form}`"
            remedy = "begin it so, or drop the tag `fold`"
            raise BuildError(name, f"{fault}, found {found.cell_type} that begins with `{begin}`", remedy)
        source = piece.rstrip("\n")
        cells.append(Cell((found.cell_type, title), "shared" in tags, source, piece[len(source) :]))
    for (kind, title), times in Counter(cell.key for cell in cells).items():
        if title and times > 1:
            fault = f"with those shared by {HOME}, {times} {kind} cells have the title `{title}`"
            raise BuildError(name, fault, "give each its own")
    if not any(cell.shared for cell in cells):
        remedy = 'put a cell `# %% Title tags=["shared"]` where they belong, which --sync then fills'
        raise BuildError(name, "expected cells tagged `shared`, found none", remedy)
    return Program(name, text, cells)


def parse(name: str, text: str) -> nbformat.NotebookNode:
    # A broken header or tag makes YAML, the notebook schema or jupytext itself raise, each its own errors.
    try:
        notebook = jupytext.reads(text, fmt="py:percent")
    except Exception as error:
        reason = " ".join(str(error).split())
        remedy = "mend its YAML header, or the tags on a `# %%` line"
        raise BuildError(name, f"not a notebook to jupytext ({reason})", remedy) from error
    found = {**notebook.metadata, **notebook.metadata.get("jupytext", {})}
    for key, expected in HEADER.items():
        if found.get(key) != expected:
            fault = f"header, {key}: found `{found.get(key)}`, expected `{expected}`"
            remedy = "copy the header of a program that passes --check, and give cells only a title and tags"
            raise BuildError(name, fault, remedy)
    return notebook


# What the files should hold


def carry(home: Program, other: Program) -> Program:
    """Return `other` with the shared cells of `home`."""
    places = [place for place, cell in enumerate(other.cells) if cell.shared]
    slots = [cell.text + cell.gap for cell in other.cells]
    keys = [[cell.key for cell in program.shared] for program in (other, home)]
    for change, start, end, first, last in difflib.SequenceMatcher(None, *keys).get_opcodes():
        if change == "equal":
            for place, cell in zip(places[start:end], home.shared[first:last], strict=True):
                old = other.cells[place]
                slots[place] = cell.text + (old.gap if cell.text == old.text else max(old.gap, cell.gap))
        else:  # a new cell takes the place of one that is no longer shared, or follows the one before it
            for place in places[start:end]:
                slots[place] = ""
            before = places[end - 1] if end else places[0] - 1
            slots[before] += "".join(cell.text + cell.gap for cell in home.shared[first:last])
    return split(other.name, "".join(slots).rstrip("\n") + "\n")


def wanted(root: Path, programs: list[Program]) -> dict[str, str]:
    """Map the name of each file that is written here to the text it should hold."""
    pyproject = read(root, "pyproject.toml")
    files, lines = {}, []
    for program in programs:
        badges = badge_pair(pyproject, program.notebook)
        script = with_badges(program.name, program.text, badges)
        notebook = render(program.name, script)
        files[program.name] = jupytext.writes(jupytext.reads(notebook, fmt="ipynb"), fmt="py:percent")
        files[program.notebook] = notebook
        lines += [f"- `{program.name}` {' '.join(badges)}"] if badges else []
    if (root / "README.md").exists():
        files["README.md"] = with_badges("README.md", read(root, "README.md"), lines)
    return files


def render(name: str, script: str) -> str:
    """Return the notebook's text: for one script the same bytes on every run and machine."""
    notebook = parse(name, script)
    for index, cell in enumerate(notebook.cells):  # whose ids jupytext draws at random
        slug = re.sub(r"[^a-z0-9]+", "-", str(cell.metadata.get("title", "")).lower())
        cell["id"] = f"{index:02d}-{slug.strip('-')}"[:64].strip("-")
        if "fold" in cell.metadata.get("tags", []):
            cell.metadata.update(FOLDED)
    return nbformat.writes(notebook) + "\n"


def badge_pair(pyproject: str, notebook: str) -> list[str]:
    address = ADDRESS.search(pyproject)
    if not address:
        fault = 'expected a line Repository = "https://github.com/OWNER/REPOSITORY"'
        raise BuildError("pyproject.toml", fault, "write your repository's address there")
    if PLACEHOLDER in address[1]:
        return []
    page = f"{address[1]}/blob/main/{notebook}"
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


def write(root: Path, programs: list[Program]) -> None:
    for name, text in wanted(root, programs).items():
        path = root / name
        if not path.exists() or path.read_bytes() != text.encode():
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(text.encode())
            print(f"wrote {name}")


def sync(root: Path, programs: list[Program]) -> None:
    write(root, [carry(programs[0], program) for program in programs])
    kept = {cell.key for cell in programs[0].shared}
    for program in programs:
        for kind, title in sorted({cell.key for cell in program.shared} - kept):
            print(f"removed the shared {kind} cell `{title}` from {program.name}: {HOME} has none")


def kaggle(root: Path, programs: list[Program], user: str) -> None:
    """Write, for every program as notebook and as script, a folder with a copy of it and its metadata."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", user):
        raise BuildError(f"--kaggle {user}", "expected a Kaggle user name", "look at your profile's address")
    files = wanted(root, programs)
    for program in programs:
        data = KAGGLE_DATA.search(program.text)
        if not data:
            remedy = "name there the data set to attach, as on Kaggle"
            raise BuildError(program.name, 'expected a line KAGGLE_DATA = "OWNER/SLUG"', remedy)
        for kind, source in (("notebook", program.notebook), ("script", program.name)):
            folder = root / KAGGLE_FOLDER / f"{Path(source).stem}-{kind}"
            title = folder.name.replace("_", "-")
            metadata = {
                "id": f"{user}/{title}",
                "title": title,  # Kaggle derives the address from the title, and wants both to agree
                "code_file": Path(source).name,
                "language": "python",
                "kernel_type": kind,
                "is_private": True,
                "enable_gpu": True,
                "machine_shape": "NvidiaTeslaT4",  # else one may get a P100, for which its torch has no code
                "enable_internet": True,
                "dataset_sources": [data[1]],
            }
            folder.mkdir(parents=True, exist_ok=True)
            (folder / metadata["code_file"]).write_bytes(files[source].encode())
            (folder / "kernel-metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
            print(f"To push and run it: kaggle kernels push -p {folder.relative_to(root)}")


def problems(root: Path, programs: list[Program]) -> Iterator[str]:
    """Yield, for each file that --sync would change, what is wrong, and the diff and command that mend it."""
    shared = {program.name: [cell.text for cell in program.shared] for program in programs}
    files = wanted(root, [carry(programs[0], program) for program in programs])
    for name, text in files.items():
        found = (root / name).read_bytes() if (root / name).exists() else None
        if found is None:
            yield f"{name}: missing\nTo render it: {COMMAND}"
        elif found != text.encode():
            apart = shared.get(name, shared[HOME]) != shared[HOME]
            fault = f"its shared cells are not those of {HOME}" if apart else "stale"
            pair = [found.decode(errors="replace").split("\n"), text.split("\n")]
            diff = difflib.unified_diff(*pair, name, f"{name} (mended)", lineterm="")
            yield "\n".join([f"{name}: {fault}", *diff, f"To do this: {COMMAND} --sync"])
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        if (name := f"notebooks/{path.name}") not in files:
            yield f"{name}: no program renders to it\nTo remove it: rm {name}"


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help="write nothing; exit 1 where something is stale")
    action.add_argument("--sync", action="store_true", help=f"carry the shared cells of {HOME} to the others")
    action.add_argument("--kaggle", metavar="USER", help=f"write {KAGGLE_FOLDER}/, for `kaggle kernels push`")
    options = parser.parse_args(arguments)
    try:
        programs = load_programs(root)
        if options.check:
            found = list(problems(root, programs))
            print("\n\n".join(found) or "every notebook is what its program renders to")
            return 1 if found else 0
        if options.kaggle:
            kaggle(root, programs, options.kaggle)
        elif options.sync:
            sync(root, programs)
        else:
            write(root, programs)
    except BuildError as error:
        print(f"{COMMAND}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    # A diff shows θ and × even where the terminal cannot.
    sys.stdout.reconfigure(errors="backslashreplace")
    sys.exit(main())
