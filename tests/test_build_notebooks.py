"""build_notebooks.py, tried on small repositories made for each test, and on this one."""

import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import jupytext
import nbformat
import pytest
from conftest import ROOT, files
from hypothesis import given, settings
from hypothesis import strategies as st

import build_notebooks

HOME, OTHER = "standalone/cifar10_ast.py", "standalone/other.py"
HEADER = (ROOT / HOME).read_text().partition("\n\n")[0] + "\n"
TITLE = "# %% A program [markdown]\n# <!-- badges -->\n# <!-- /badges -->\n#\n# What it does."
WHY = '# %% The gate [markdown] tags=["shared"]\n# The rate drifts; θ × a – and σ – follow it.'
GATE = '# %% The gate tags=["shared"]\n# cat and ls stay comments\nGAIN = 0.5'
OWN = '# %% Own data tags=["fold"]\n# @title Own data\nKAGGLE_DATA = "owner/some-data"'
DEVICES = '# %% Devices & joules tags=["shared", "fold"]\n# @title Devices & joules\ndef joules(): return 0'
RUN = '# %% Run as a script tags=["active-py"]\nif __name__ == "__main__":\n    print(joules())'
RUN_LIVE = '# %% Run as a notebook tags=["active-ipynb"]\n# await run()'
CELLS = [TITLE, WHY, GATE, OWN, DEVICES, RUN, RUN_LIVE]

README = "# Kit\n\n<!-- badges -->\n<!-- /badges -->\n\nThe end.\n"
PYPROJECT = '[project.urls]\nRepository = "https://github.com/somebody/some.kit"\n'
BOOK, OLD = "notebooks/other.ipynb", "notebooks/old.ipynb"


def program(*cells, gap="\n\n"):
    return HEADER + "\n" + gap.join(cells) + "\n"


PROGRAM = program(*CELLS)


def make_repository(root, home=PROGRAM, other=PROGRAM):
    (root / "standalone").mkdir(parents=True)
    for name, text in {HOME: home, OTHER: other, "pyproject.toml": PYPROJECT, "README.md": README}.items():
        (root / name).write_bytes(text.encode())
    return root


@pytest.fixture
def kit(tmp_path):
    """Two programs, already rendered."""
    root = make_repository(tmp_path / "kit")
    assert build_notebooks.main([], root) == 0
    return root


def edit(path, old, new):
    text = path.read_bytes().decode()
    assert text.count(old) == 1
    path.write_bytes(text.replace(old, new).encode())


def check(root, capsys):
    """Return the exit status and what was printed; --check must write nothing."""
    before = files(root)
    capsys.readouterr()
    status = build_notebooks.main(["--check"], root)
    assert files(root) == before
    return status, capsys.readouterr().out


def test_once_rendered_the_check_passes_and_rendering_again_writes_nothing(kit, capsys):
    assert check(kit, capsys) == (0, "every notebook is what its program renders to\n")
    before = files(kit)
    assert build_notebooks.main([], kit) == 0
    assert (files(kit), capsys.readouterr().out) == (before, "")


def test_the_notebook_is_valid_clean_and_keeps_kinds_tags_and_text(kit):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        notebook = nbformat.read(kit / BOOK, as_version=4)
        nbformat.validate(notebook)
    assert notebook.metadata.keys() == {"accelerator", "colab", "jupytext", "kernelspec", "language_info"}
    assert "jupytext_version" not in notebook.metadata.jupytext.text_representation
    assert [(cell.id, cell.cell_type, cell.metadata.get("tags")) for cell in notebook.cells] == [
        ("00-a-program", "markdown", None),
        ("01-the-gate", "markdown", ["shared"]),
        ("02-the-gate", "code", ["shared"]),
        ("03-own-data", "code", ["fold"]),
        ("04-devices-joules", "code", ["shared", "fold"]),
        ("05-run-as-a-script", "raw", ["active-py"]),
        ("06-run-as-a-notebook", "code", ["active-ipynb"]),
    ]
    assert notebook.cells[2].source == "# cat and ls stay comments\nGAIN = 0.5"
    assert notebook.cells[6].source == "await run()"
    assert all(cell.outputs == [] for cell in notebook.cells if cell.cell_type == "code")


def test_folded_cells_alone_are_hidden_in_colab_jupyterlab_and_kaggle(kit):
    hidden = {"cellView": "form", "jupyter": {"source_hidden": True}, "_kg_hide-input": True}
    for cell in json.loads((kit / BOOK).read_text())["cells"]:
        expected = hidden if "fold" in cell["metadata"].get("tags", []) else {}
        assert {name: cell["metadata"][name] for name in cell["metadata"] if name in hidden} == expected


def test_long_and_foreign_titles_give_valid_ids():
    cells = [f"# %% {'very ' * 30}\n1", "# %% σ und θ!\n2", "# %%\n3"]
    notebook = json.loads(build_notebooks.render("x.py", program(*cells)))
    assert [cell["id"] for cell in notebook["cells"]] == ["00-" + "very-" * 12 + "v", "01-und", "02"]


# A last word that starts with a mark, such as `.5`, is a cell attribute to jupytext.
word = st.from_regex(r"[abXYZ019θσ][abXYZ019θσ×&/'.-]{0,6}[,:;?!]?", fullmatch=True)
words = st.builds(" ".join, st.lists(word, min_size=1, max_size=4)) | st.builds("{} – {}".format, word, word)
lines = ["x = 1", "# cat file.txt", "# !pip install torch", "#", "import os\nimport sys"]
blocks = ["class A:\n    # %comment\n    b = 'it'", "@decorator\ndef g(a, b=2): pass", "y = [\n    1,\n]\n"]
texts = st.sampled_from([*lines, *blocks, 'text = """one\n\n# two θ\n"""'])
code = st.lists(texts, min_size=1, max_size=4).map("\n\n\n".join).map(str.strip)
prose = st.lists(st.sampled_from(["# One – two.", "#\n# $\\theta = 1$", "# - item", "# ```\n# x\n# ```"]))
kinds = ["markdown", '"own", "shared"', '"fold"', '"shared", "fold"', '"active-py"', '"active-ipynb"']


@st.composite
def one_cell(draw):
    title, kind, source = draw(words), draw(st.sampled_from(kinds)), draw(code)
    if kind == "markdown":
        return f"# %% {title} [markdown]\n" + "\n".join(["# Text.", *draw(prose)])
    if "fold" in kind:
        source = f"# @title {title}\n{source}"
    if "ipynb" in kind:
        source = "\n".join(f"# {line}".rstrip() for line in source.split("\n"))
    return f"# %% {title} tags=[{kind}]\n{source}"


@settings(max_examples=60, deadline=None)
@given(st.lists(one_cell(), min_size=1, max_size=6), st.integers(1, 2))
def test_any_script_survives_the_round_trip_byte_for_byte(cells, blank_lines):
    script = program(*cells, gap="\n" * (1 + blank_lines))
    notebook = build_notebooks.render("x.py", script)
    assert build_notebooks.render("x.py", script) == notebook
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nbformat.validate(nbformat.reads(notebook, as_version=4))
    assert jupytext.writes(jupytext.reads(notebook, fmt="ipynb"), fmt="py:percent") == script


def save_with_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[2].outputs = [nbformat.v4.new_output("stream", text="hello")]
    notebook.metadata.widgets = {}
    nbformat.write(notebook, path)


@pytest.mark.parametrize(
    ("name", "spoil", "sentence", "line"),
    [
        (OTHER, ("0.5", "0.6"), f"{OTHER}: its shared cells are not those of {HOME}", "+GAIN = 0.5"),
        (HOME, ("0.5", "0.6"), f"{OTHER}: its shared cells are not those of {HOME}", "+GAIN = 0.6"),
        (OTHER, ("some-data", "x"), f"{BOOK}: stale", '+    "KAGGLE_DATA = \\"owner/x\\""'),
        (OTHER, ("# %% Own", "# %%   Own"), f"{OTHER}: stale", '+# %% Own data tags=["fold"]'),
        (OTHER, ("await run()\n", "await run()\n\n\n"), f"{OTHER}: stale", "-"),
        ("pyproject.toml", ("some.kit", "fork.git"), f"{HOME}: stale", f"--- {HOME}"),
        ("pyproject.toml", ("somebody", "your-name"), "README.md: stale", "--- README.md"),
        (BOOK, save_with_outputs, f"{BOOK}: stale", '-  "widgets": {}'),
        (BOOK, Path.unlink, f"{BOOK}: missing", "To render it: python build_notebooks.py"),
        (OLD, Path.touch, f"{OLD}: no program renders to it", f"To remove it: rm {OLD}"),
    ],
)
def test_what_is_stale_is_said_and_mended_by_the_command_printed(kit, capsys, name, spoil, sentence, line):
    spoil(kit / name) if callable(spoil) else edit(kit / name, *spoil)
    status, printed = check(kit, capsys)
    assert status == 1
    assert {sentence, line} <= set(printed.split("\n"))
    program, argument, *rest = re.findall(r"^To [^:]*: (.*)$", printed, re.MULTILINE)[0].split()
    if program == "rm":
        (kit / argument).unlink()
    else:
        assert (program, argument) == ("python", "build_notebooks.py")
        assert build_notebooks.main(rest, kit) == 0
    assert check(kit, capsys)[0] == 0


@pytest.mark.parametrize("place", [0, 999, -1])
def test_any_byte_changed_in_a_notebook_is_stale(kit, capsys, place):
    content = bytearray((kit / BOOK).read_bytes())
    content[place] ^= 0x80  # then it is not UTF-8
    (kit / BOOK).write_bytes(content)
    status, printed = check(kit, capsys)
    assert status == 1
    assert printed.startswith(f"{BOOK}: stale\n--- {BOOK}\n")


def test_a_process_that_knows_only_ascii_finds_the_same_bytes_and_prints_the_diff(kit):
    shutil.copy(build_notebooks.__file__, kit)
    environment = {"PYTHONHASHSEED": "7", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    options = {"cwd": kit, "env": environment, "capture_output": True, "text": True}
    command = [sys.executable, "build_notebooks.py", "--check"]
    assert subprocess.run(command, check=False, **options).returncode == 0
    edit(kit / OTHER, "θ × a", "θ × b")
    done = subprocess.run(command, check=False, **options)
    assert (done.returncode, done.stderr) == (1, "")
    assert r"-# The rate drifts; \u03b8 \xd7 b" in done.stdout


BARE = "# %%\n1"
STUB = '# %% Here tags=["shared"]\n1'
NEW = '# %% New tags=["shared"]\nNEW = "θ"'


@pytest.mark.parametrize(
    ("home", "before", "after"),
    [
        ([GATE, DEVICES], [OWN, GATE.replace("0.5", "7"), RUN, DEVICES], [OWN, GATE, RUN, DEVICES]),
        ([WHY, GATE, DEVICES], [OWN, WHY, RUN, DEVICES], [OWN, WHY, GATE, RUN, DEVICES]),
        ([NEW, WHY, GATE], [WHY, OWN, GATE], [NEW, WHY, OWN, GATE]),
        ([WHY, GATE, NEW], [BARE, BARE, WHY, GATE], [BARE, BARE, WHY, GATE, NEW]),
        ([WHY, GATE, DEVICES], [OWN, STUB, RUN], [OWN, WHY, GATE, DEVICES, RUN]),
        ([WHY, NEW, DEVICES], [WHY, OWN, GATE, DEVICES], [WHY, OWN, NEW, DEVICES]),
        ([WHY, DEVICES], [WHY, OWN, GATE, DEVICES], [WHY, OWN, DEVICES]),
        ([WHY, GATE, DEVICES], [DEVICES, WHY, OWN, GATE], [WHY, OWN, GATE, DEVICES]),
    ],
    ids=["changed", "missing", "missing first", "missing last", "stub", "renamed", "removed", "moved"],
)
def test_sync_carries_shared_cells_to_where_they_belong(tmp_path, capsys, home, before, after):
    root = make_repository(tmp_path, program(TITLE, *home, RUN), program(*before))
    assert build_notebooks.main(["--sync"], root) == 0
    assert (root / OTHER).read_text() == program(*after)
    cells = {"Here": STUB, "The gate": GATE}.items()
    gone = [title for title, cell in cells if cell in before and cell not in after]
    said = [f"removed the shared code cell `{title}` from {OTHER}: {HOME} has none" for title in gone]
    assert [line for line in capsys.readouterr().out.split("\n") if line.startswith("removed")] == said
    assert check(root, capsys)[0] == 0


@pytest.mark.parametrize("gaps", [("\n\n", "\n\n\n"), ("\n\n\n", "\n\n")])
def test_sync_leaves_enough_blank_lines_after_a_changed_cell(tmp_path, gaps):
    home, other = program(GATE, RUN, gap=gaps[0]), program(GATE.replace("0.5", "7"), RUN, gap=gaps[1])
    assert build_notebooks.main(["--sync"], make_repository(tmp_path, home, other)) == 0
    assert (tmp_path / OTHER).read_text() == program(GATE, RUN, gap="\n\n\n")


shared_cells = st.dictionaries(st.integers(0, 9), code, min_size=1).flatmap(
    lambda cells: st.permutations([f'# %% Cell {i} tags=["shared"]\n{text}' for i, text in cells.items()])
)


@settings(max_examples=25, deadline=None)
@given(home=shared_cells, other=shared_cells, data=st.data(), gap=st.sampled_from(["\n\n", "\n\n\n"]))
def test_any_sync_makes_shared_cells_agree_and_keeps_own_ones(tmp_path_factory, home, other, data, gap):
    own = [f"# %% Own {i}\n{data.draw(code)}" for i in range(data.draw(st.integers(0, 4)))]
    mixed = list(other)
    for cell in own:
        mixed.insert(data.draw(st.integers(0, len(mixed))), cell)
    own.sort(key=mixed.index)
    root = make_repository(tmp_path_factory.mktemp("kit"), program(*home), program(*mixed, gap=gap))
    assert build_notebooks.main(["--sync"], root) == 0
    assert build_notebooks.main(["--check"], root) == 0
    pieces = re.split(r"^(?=# %% )", (root / OTHER).read_text(), flags=re.M)[1:]
    assert [cell.strip() for cell in pieces if "shared" in cell] == home
    assert [cell.strip() for cell in pieces if "shared" not in cell] == own


def test_badges_name_the_repository_and_the_notebook(kit):
    page = "somebody/some.kit/blob/main/notebooks/other.ipynb"
    logo = "https://colab.research.google.com/assets/colab-badge.svg"
    colab = f"[![Open in Colab]({logo})](https://colab.research.google.com/github/{page})"
    logo = "https://kaggle.com/static/images/open-in-kaggle.svg"
    kaggle = f"[![Open in Kaggle]({logo})](https://kaggle.com/kernels/welcome?src=https://github.com/{page})"
    script, readme = (kit / OTHER).read_text(), (kit / "README.md").read_text()
    assert f"# <!-- badges -->\n# {colab}\n# {kaggle}\n# <!-- /badges -->\n#\n# What it does.\n" in script
    title = json.loads((kit / BOOK).read_text())["cells"][0]
    assert f"<!-- badges -->\n{colab}\n{kaggle}\n<!-- /badges -->\n" in "".join(title["source"])
    assert f"\n- `{OTHER}` {colab} {kaggle}\n<!-- /badges -->\n\nThe end.\n" in readme
    assert readme.index(f"- `{HOME}` ") < readme.index(f"- `{OTHER}` ")


def test_while_the_address_is_the_placeholder_no_badge_stands_anywhere(kit):
    edit(kit / "pyproject.toml", "somebody", "your-name")
    assert build_notebooks.main([], kit) == 0
    assert (kit / OTHER).read_text() == PROGRAM
    assert (kit / "README.md").read_text() == README
    assert "Open in" not in (kit / BOOK).read_text()


def test_without_markers_or_readme_nothing_is_written_there(tmp_path):
    bare = PROGRAM.replace("# <!-- badges -->\n# <!-- /badges -->\n", "# Not `<!-- badges -->`\n")
    (make_repository(tmp_path, other=bare) / "README.md").unlink()
    assert build_notebooks.main([], tmp_path) == 0
    assert (tmp_path / OTHER).read_text() == bare
    assert not (tmp_path / "README.md").exists()


def assert_refused(root, capsys, command, sentence):
    before = files(root)
    capsys.readouterr()
    assert build_notebooks.main(command, root) == 2
    assert files(root) == before
    out, error = capsys.readouterr()
    assert (out, error.count("\n")) == ("", 1)
    assert error.startswith(f"python build_notebooks.py: {sentence}")


@pytest.mark.parametrize("command", [[], ["--check"], ["--sync"]])
@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("Run as a notebook", "The gate", f"with those shared by {HOME}, 2 code cells have the title `The g"),
        ("# %% The gate tags", "# %% tags", "cell 3 has no title; write one"),
        ("# %% Own data", "# %%", "cell 4 has no title; write one"),
        ("@title Own", "@title X", "folded cell `Own data`: expected code that begins with `# @title Own da"),
        ('"active-py"', '"active-py", "fold"', "folded cell `Run as a script`: expected code that begins"),
        (
            WHY,
            WHY.replace("]\n", ', "fold"]\n# # @title The gate\n'),
            "folded cell `The gate`: expected code",
        ),
        ('tags=["fold"]', 'tags="fold"', "not a notebook to jupytext ("),
        ("Own data t", "Own data x=1 t", "header, cell_metadata_filter: found `tags,title,x,-all`, expected"),
        (HEADER, "", "header, comment_magics: found `None`, expected `False`; copy the header of a program"),
        ("magics: false", "magics: true", "header, comment_magics: found `True`, expected `False`; copy"),
        ("display_name: Python 3", "display_name: X", "header, kernelspec: found `{'display_name': 'X', "),
        ("accelerator: GPU", "accelerator: [GPU", "not a notebook to jupytext ("),
        ("#   jupytext:\n", "#   jupytext: 3\n#   other:\n", "not a notebook to jupytext ("),
        ("0.5", '"""\n# %% no cell\n"""', "8 lines start with `# %%` but jupytext finds 7 cells; let only"),
        ("0.5", "0.5\r", "expected \\n line ends, found \\r; save it"),
        ("0.5", "0.5  # \udcff", "byte "),
        ("# <!-- /badges -->\n", "", "found `<!-- badges -->` without `<!-- /badges -->` after it; add that"),
    ],
)
def test_a_bad_program_is_refused(kit, capsys, command, old, new, sentence):
    text = (kit / OTHER).read_text()
    assert text.count(old) == 1
    (kit / OTHER).write_bytes(text.replace(old, new).encode(errors="surrogateescape"))
    assert_refused(kit, capsys, command, f"{OTHER}: {sentence}")


@pytest.mark.parametrize(
    ("cells", "sentence"),
    [
        ([WHY, "# %% The gate\n1"], f"with those shared by {HOME}, 2 code cells have the title `The gate`;"),
        ([TITLE, OWN], "expected cells tagged `shared`, found none; put a cell"),
    ],
)
def test_a_program_where_shared_cells_have_no_place_is_refused(tmp_path, capsys, cells, sentence):
    root = make_repository(tmp_path, other=program(*cells))
    for command in ("--check", "--sync"):
        assert_refused(root, capsys, [command], f"{OTHER}: {sentence}")


@pytest.mark.parametrize(
    ("name", "old", "new", "command", "sentence"),
    [
        (HOME, None, None, [], f"{HOME}: expected a file, found none; run this in a whole checkout"),
        ("pyproject.toml", None, None, [], "pyproject.toml: expected a file, found none; run this"),
        ("pyproject.toml", "Repository", "Home", [], "pyproject.toml: expected a line Repository = "),
        ("pyproject.toml", "github.com", "b.org", [], "pyproject.toml: expected a line Repository = "),
        (HOME, "KAGGLE_DATA", "DATA", ["--kaggle", "me"], f"{HOME}: expected a line KAGGLE_DATA = "),
        (HOME, "0.5", "0.5", ["--kaggle", "../me"], "--kaggle ../me: expected a Kaggle user name"),
    ],
)
def test_what_is_missing_is_said(kit, capsys, name, old, new, command, sentence):
    edit(kit / name, old, new) if old else (kit / name).unlink()
    assert_refused(kit, capsys, command, sentence)


def test_kaggle_folders_hold_the_program_and_what_a_push_needs(kit, capsys):
    assert build_notebooks.main(["--kaggle", "someone"], kit) == 0
    printed = capsys.readouterr().out
    for kind, source in (("notebook", "notebooks/cifar10_ast.ipynb"), ("script", HOME)):
        folder = f"build/kaggle/cifar10_ast-{kind}"
        assert f"kaggle kernels push -p {folder}\n" in printed
        metadata = json.loads((kit / folder / "kernel-metadata.json").read_text())
        assert (kit / folder / metadata["code_file"]).read_bytes() == (kit / source).read_bytes()
        assert metadata["id"] == f"someone/{metadata['title']}" == f"someone/cifar10-ast-{kind}"
        assert (metadata["kernel_type"], metadata["enable_gpu"]) == (kind, True)
        assert metadata["machine_shape"] == "NvidiaTeslaT4"
        assert metadata["dataset_sources"] == ["owner/some-data"]


def test_the_notebooks_of_this_repository_are_what_its_programs_render_to(capsys):
    assert build_notebooks.main(["--check"]) == 0, capsys.readouterr()


@pytest.mark.parametrize("name", ["cifar10_ast", "imagenet100_ast"])
def test_a_program_of_this_repository_survives_the_round_trip_and_names_its_data(name):
    script = (ROOT / "standalone" / f"{name}.py").read_text()
    notebook = jupytext.reads(build_notebooks.render(name, script), fmt="ipynb")
    assert jupytext.writes(notebook, fmt="py:percent") == script
    assert build_notebooks.KAGGLE_DATA.search(script)
