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
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import build_notebooks

REPOSITORY = Path(build_notebooks.__file__).parent

HEADER = """\
# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
#   jupytext:
#     cell_metadata_filter: tags,title,-all
#     comment_magics: false
#     formats: notebooks///ipynb,standalone///py:percent
#     notebook_metadata_filter: accelerator,colab,language_info,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   language_info:
#     name: python
# ---
"""

SHARED = """\
# %% Why a PI loop [markdown] tags=["shared"]
# The rate drifts; θ × a – and σ – follow it.

# %% PI gate tags=["shared"]
# cat and ls stay comments
GAIN = 0.5


def gate(s):
    return s > GAIN"""

BEFORE = """\

# %% {title} [markdown]
# # {title}
#
# <!-- badges -->
# <!-- /badges -->
#
# What it does.

# %% Imports
import os

"""

AFTER = """


# %% Run as a script tags=["active-py"]
if __name__ == "__main__":
    print(gate(1))

# %% Run as a notebook tags=["active-ipynb"]
# await run()
"""

README = """\
# Kit

<!-- badges -->
<!-- /badges -->

The end.
"""

PYPROJECT = '[project.urls]\nRepository = "https://github.com/somebody/some.kit"\n'


def program(title="One", shared=SHARED):
    return HEADER + BEFORE.format(title=title) + shared + AFTER


def make_repository(root, programs):
    (root / "standalone").mkdir(parents=True)
    (root / "pyproject.toml").write_text(PYPROJECT)
    (root / "README.md").write_text(README)
    for name, text in programs.items():
        (root / "standalone" / f"{name}.py").write_bytes(text.encode())
    return root


@pytest.fixture
def two(tmp_path):
    """Two programs, already rendered."""
    root = make_repository(tmp_path / "kit", {"one": program("One"), "two": program("Two")})
    assert build_notebooks.main([], root) == 0
    return root


def files(root):
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()
    }


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


def run_printed_command(root, printed):
    """Paste the first command that --check printed, as a user would."""
    command = re.findall(r"^To [^:]*: (.*)$", printed, re.MULTILINE)[0]
    shutil.copy(build_notebooks.__file__, root)
    tools = Path(sys.executable).parent
    for part in command.split(" && "):
        program, *arguments = part.split()
        program = {"python": sys.executable, "jupytext": tools / "jupytext"}.get(program, program)
        subprocess.run([program, *arguments], cwd=root, check=True, capture_output=True)


# Rendering


@pytest.mark.parametrize("names", [["one"], ["one", "two"], ["a", "b", "c"]])
def test_check_passes_once_rendered_for_any_number_of_programs(tmp_path, capsys, names):
    root = make_repository(tmp_path, {name: program(name) for name in names})
    assert check(root, capsys)[0] == 1
    assert build_notebooks.main([], root) == 0
    assert sorted(path.stem for path in (root / "notebooks").iterdir()) == names
    assert check(root, capsys) == (0, "every notebook is what its program renders to\n")


def test_rendering_again_changes_no_byte_and_writes_no_file(two, capsys):
    before = files(two)
    capsys.readouterr()
    assert build_notebooks.main([], two) == 0
    assert files(two) == before
    assert capsys.readouterr().out == ""


def test_another_process_renders_the_same_bytes(two, tmp_path):
    other = make_repository(tmp_path / "other", {"one": program("One"), "two": program("Two")})
    shutil.copy(build_notebooks.__file__, other)
    environment = {"PYTHONHASHSEED": "7", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "build_notebooks.py"]
    subprocess.run(command, cwd=other, env=environment, check=True, capture_output=True)
    (other / "build_notebooks.py").unlink()
    shutil.rmtree(other / "__pycache__", ignore_errors=True)
    assert files(other) == files(two)


def test_notebook_is_valid_clean_and_says_it_is_python(two):
    path = two / "notebooks" / "one.ipynb"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.language_info.name == "python"
    assert notebook.metadata.accelerator == "GPU"
    assert "widgets" not in notebook.metadata
    assert "jupytext_version" not in notebook.metadata.jupytext.text_representation
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


def test_cells_keep_kind_tags_and_text_and_get_readable_ids(two):
    cells = json.loads((two / "notebooks" / "one.ipynb").read_text())["cells"]
    assert [(cell["id"], cell["cell_type"], cell["metadata"].get("tags")) for cell in cells] == [
        ("00-one", "markdown", None),
        ("01-imports", "code", None),
        ("02-why-a-pi-loop", "markdown", ["shared"]),
        ("03-pi-gate", "code", ["shared"]),
        ("04-run-as-a-script", "raw", ["active-py"]),
        ("05-run-as-a-notebook", "code", ["active-ipynb"]),
    ]
    assert "".join(cells[3]["source"]).startswith("# cat and ls stay comments\nGAIN = 0.5\n")
    assert "".join(cells[5]["source"]) == "await run()"


def test_long_and_foreign_titles_give_valid_ids():
    long, foreign = "very " * 30, "σ und θ!"
    cells = f"\n# %% {long.strip()}\n1\n\n# %% {foreign}\n2\n\n# %%\n3\n"
    notebook = json.loads(build_notebooks.render("x.py", HEADER + cells))
    ids = [cell["id"] for cell in notebook["cells"]]
    assert ids == [("00-" + "very-" * 20)[:64].strip("-"), "01-und", "02"]


def test_command_line_of_jupytext_gives_the_script_back_byte_for_byte(two):
    script = two / "standalone" / "one.py"
    before = script.read_bytes()
    script.unlink()
    command = [Path(sys.executable).parent / "jupytext", "--to", "py:percent", "--output", script]
    subprocess.run([*command, two / "notebooks" / "one.ipynb"], check=True, capture_output=True)
    assert script.read_bytes() == before


# A last word that starts with a mark, such as `.5`, is a cell attribute to jupytext.
word = st.from_regex(r"[abXYZ019θσ][abXYZ019θσ×&/'.-]{0,6}[,:;?!]?", fullmatch=True)
words = st.builds(" ".join, st.lists(word, min_size=1, max_size=4)) | st.builds("{} – {}".format, word, word)
statements = st.sampled_from(
    [
        "x = 1",
        "# cat file.txt",
        "# ls",
        "# !pip install torch",
        "#",
        "import os\nimport sys",
        "def f():\n    return 1",
        "class A:\n    # %comment\n    b = 'it'",
        "@decorator\ndef g(a, b=2): pass",
        'text = """one\n\n# two θ\n"""',
        "y = [\n    1,\n]\n",
    ]
)
code = st.lists(statements, min_size=1, max_size=4).map("\n\n\n".join).map(str.strip)
prose = st.lists(st.sampled_from(["# One – two.", "#\n# $\\theta = 1$", "# - item", "# ```\n# x\n# ```"]))
tag = st.sampled_from(["", ' tags=["shared"]', ' tags=["own", "shared"]'])


@st.composite
def one_cell(draw):
    kind = draw(st.sampled_from(["code", "markdown", "active-py", "active-ipynb"]))
    title = draw(words)
    if kind == "markdown":
        return f"# %% {title} [markdown]{draw(tag)}\n" + "\n".join(["# Text.", *draw(prose)])
    source = draw(code)
    if kind == "code":
        return f"# %% {title}{draw(tag)}\n{source}"
    if kind == "active-ipynb":
        source = "\n".join(f"# {line}".rstrip() for line in source.split("\n"))
    return f'# %% {title} tags=["{kind}"]\n{source}'


@settings(max_examples=60, deadline=None)
@given(st.lists(one_cell(), min_size=1, max_size=6), st.integers(1, 2))
def test_any_script_survives_the_round_trip_byte_for_byte(cells, blank_lines):
    script = HEADER + "\n" + ("\n" * (1 + blank_lines)).join(cells) + "\n"
    notebook = build_notebooks.render("x.py", script)
    assert build_notebooks.render("x.py", script) == notebook
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nbformat.validate(nbformat.reads(notebook, as_version=4))
    assert jupytext.writes(jupytext.reads(notebook, fmt="ipynb"), fmt="py:percent") == script


# Checking


def test_single_characters_edited_in_a_shared_cell_fail_and_the_command_carries_them(two, capsys):
    edit(two / "standalone" / "two.py", "GAIN = 0.5", "GAIN = 0.6")
    status, printed = check(two, capsys)
    assert status == 1
    assert "\n-GAIN = 0.6\n+GAIN = 0.5\n" in printed
    assert "python build_notebooks.py --sync standalone/one.py\n" in printed
    assert "python build_notebooks.py --sync standalone/two.py\n" in printed
    run_printed_command(two, printed)
    assert check(two, capsys)[0] == 0
    assert "GAIN = 0.5" in (two / "standalone" / "two.py").read_text()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_character_changed_in_a_shared_cell_fails(two, capsys, data):
    path = two / "standalone" / data.draw(st.sampled_from(["one.py", "two.py"]))
    saved = path.read_bytes()
    text = saved.decode()
    start = text.index(SHARED)
    # The `# %%` lines are left alone: a tag or title spoiled is bad input, tried below.
    inside = [i for i in range(start, start + len(SHARED)) if not line_at(text, i).startswith("# %%")]
    where = data.draw(st.sampled_from(inside))
    new = data.draw(st.sampled_from("xθ #\n").filter(lambda new: new != text[where]))
    try:
        path.write_bytes((text[:where] + new + text[where + 1 :]).encode())
        status, printed = check(two, capsys)
    finally:
        path.write_bytes(saved)
    assert status == 1
    assert "python build_notebooks.py --sync standalone/one.py\n" in printed


def line_at(text, index):
    return text[text.rfind("\n", 0, index) + 1 :].split("\n", 1)[0]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_byte_changed_in_a_notebook_fails(two, capsys, data):
    path = two / "notebooks" / "two.ipynb"
    saved = path.read_bytes()
    where = data.draw(st.integers(0, len(saved) - 1))
    new = data.draw(st.integers(0, 255).filter(lambda new: new != saved[where]))
    try:
        path.write_bytes(saved[:where] + bytes([new]) + saved[where + 1 :])
        status, printed = check(two, capsys)
    finally:
        path.write_bytes(saved)
    assert status == 1
    assert printed.startswith("notebooks/two.ipynb: stale\n--- notebooks/two.ipynb\n")
    assert printed.endswith("\nTo do this: python build_notebooks.py\n")


def test_a_byte_added_at_the_end_of_a_notebook_fails(two, capsys):
    path = two / "notebooks" / "two.ipynb"
    path.write_bytes(path.read_bytes() + b"\n")
    assert check(two, capsys)[0] == 1


def test_a_notebook_saved_with_outputs_fails_and_the_command_mends_it(two, capsys):
    path = two / "notebooks" / "one.ipynb"
    before = path.read_bytes()
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="hello")]
    notebook.metadata.widgets = {}
    nbformat.write(notebook, path)
    status, printed = check(two, capsys)
    assert status == 1
    run_printed_command(two, printed)
    assert path.read_bytes() == before


def test_a_program_edited_but_not_rendered_fails_and_the_command_mends_it(two, capsys):
    edit(two / "standalone" / "one.py", "import os", "import sys")
    status, printed = check(two, capsys)
    assert status == 1
    assert '-    "import os"\n+    "import sys"\n' in printed
    run_printed_command(two, printed)
    assert check(two, capsys)[0] == 0


def test_a_missing_notebook_fails_and_the_command_mends_it(two, capsys):
    (two / "notebooks" / "one.ipynb").unlink()
    status, printed = check(two, capsys)
    assert (status, printed.startswith("notebooks/one.ipynb: missing\n")) == (1, True)
    run_printed_command(two, printed)
    assert check(two, capsys)[0] == 0


def test_a_notebook_without_a_program_fails_and_the_command_mends_it(two, capsys):
    (two / "notebooks" / "old.ipynb").write_bytes((two / "notebooks" / "one.ipynb").read_bytes())
    status, printed = check(two, capsys)
    assert (status, printed.startswith("notebooks/old.ipynb: no program renders to it\n")) == (1, True)
    run_printed_command(two, printed)
    assert check(two, capsys)[0] == 0


def test_a_script_that_does_not_survive_the_round_trip_fails_and_the_command_mends_it(two, capsys):
    script = two / "standalone" / "one.py"
    edit(script, "# %% Imports", "# %%   Imports")
    assert build_notebooks.main([], two) == 0
    status, printed = check(two, capsys)
    assert status == 1
    assert printed.startswith("standalone/one.py: does not survive script → notebook → script\n")
    assert "\n-# %%   Imports\n+# %% Imports\n" in printed
    run_printed_command(two, printed)
    assert build_notebooks.main([], two) == 0
    assert check(two, capsys)[0] == 0
    assert "# %% Imports\n" in script.read_text()


def test_every_fault_is_printed_at_once(two, capsys):
    edit(two / "standalone" / "one.py", "import os", "import sys")
    edit(two / "standalone" / "two.py", "GAIN = 0.5", "GAIN = 0.6")
    printed = check(two, capsys)[1]
    faults = re.findall(r"^(\S+: .*)\n(?:---|To)", printed, re.MULTILINE)
    assert faults == [
        "standalone/two.py: its shared cells are not those of standalone/one.py",
        "notebooks/one.ipynb: stale",
        "notebooks/two.ipynb: stale",
    ]


def test_the_diff_is_printed_where_the_terminal_knows_only_ascii(two):
    edit(two / "standalone" / "two.py", "θ × a", "θ × b")
    shutil.copy(build_notebooks.__file__, two)
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "build_notebooks.py", "--check"]
    done = subprocess.run(command, check=False, cwd=two, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert r"-# The rate drifts; \u03b8 \xd7 b" in done.stdout


def test_blank_lines_after_the_shared_run_may_differ_and_sync_leaves_them(two, capsys):
    one, other = two / "standalone" / "one.py", two / "standalone" / "two.py"
    edit(other, SHARED + "\n\n\n# %%", SHARED + "\n\n# %%")
    assert build_notebooks.main(["--sync", str(one)], two) == 0
    assert SHARED + "\n\n# %%" in other.read_text()
    assert check(two, capsys)[0] == 0


# Carrying shared cells


def test_sync_carries_the_run_byte_for_byte_leaves_own_cells_and_renders(two, capsys):
    changed = (
        SHARED.replace("GAIN = 0.5", "GAIN = 2\n\n\ndef extra():\n    pass")
        + "\n\n\n"
        + "\n".join(['# %% More θ tags=["shared"]', "MORE = 1"])
    )
    one, other = two / "standalone" / "one.py", two / "standalone" / "two.py"
    own_before, own_after = other.read_text().split(SHARED)
    edit(one, SHARED, changed)
    assert build_notebooks.main(["--sync", str(one)], two) == 0
    assert other.read_text() == own_before + changed + own_after
    assert check(two, capsys)[0] == 0


def test_sync_takes_a_path_from_the_current_folder_and_fills_every_other_program(
    tmp_path, capsys, monkeypatch
):
    newer = SHARED.replace("0.5", "0.7")
    texts = {"a": program("A"), "b": program("B", newer), "c": program("C", '# %% Here tags=["shared"]')}
    root = make_repository(tmp_path, texts)
    monkeypatch.chdir(root / "standalone")
    assert build_notebooks.main(["--sync", "b.py"], root) == 0
    assert all(newer in (root / "standalone" / f"{name}.py").read_text() for name in texts)
    assert check(root, capsys)[0] == 0


@settings(max_examples=20, deadline=None)
@given(sources=st.lists(code, min_size=1, max_size=4), old=code)
@example(sources=["x = 1"], old="def f():\n    return 1")
def test_sync_is_idempotent_and_check_agrees(tmp_path_factory, sources, old):
    run = "\n\n".join(f'# %% Cell {i} tags=["shared"]\n{source}' for i, source in enumerate(sources))
    stub = f'# %% Cell tags=["shared"]\n{old}'
    root = make_repository(tmp_path_factory.mktemp("kit"), {"a": program("A", stub), "b": program("B", run)})
    source = root / "standalone" / "b.py"
    assert build_notebooks.main(["--sync", str(source)], root) == 0
    once = files(root)
    assert build_notebooks.main(["--sync", str(source)], root) == 0
    assert files(root) == once
    assert build_notebooks.main(["--check"], root) == 0
    assert (root / "standalone" / "a.py").read_text().count(run + "\n") == 1


# Badges


def test_badges_name_the_repository_and_the_notebook(two):
    colab = (
        "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
        "(https://colab.research.google.com/github/somebody/some.kit/blob/main/notebooks/one.ipynb)"
    )
    kaggle = (
        "[![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)]"
        "(https://kaggle.com/kernels/welcome?src="
        "https://github.com/somebody/some.kit/blob/main/notebooks/one.ipynb)"
    )
    script = (two / "standalone" / "one.py").read_text()
    assert f"# <!-- badges -->\n# {colab}\n# {kaggle}\n# <!-- /badges -->\n#\n# What it does.\n" in script
    title = json.loads((two / "notebooks" / "one.ipynb").read_text())["cells"][0]
    assert f"<!-- badges -->\n{colab}\n{kaggle}\n<!-- /badges -->\n" in "".join(title["source"])
    readme = (two / "README.md").read_text()
    lines = readme.split("<!-- badges -->\n")[1].split("<!-- /badges -->\n\nThe end.\n")[0].splitlines()
    assert lines[0] == f"- `standalone/one.py` {colab} {kaggle}"
    assert [line.split()[1] for line in lines] == ["`standalone/one.py`", "`standalone/two.py`"]


def test_a_fork_changes_one_line_and_renders(two, capsys):
    edit(two / "pyproject.toml", "somebody/some.kit", "fork/renamed.git")
    status, printed = check(two, capsys)
    assert status == 1
    for name in ["standalone/one.py", "notebooks/one.ipynb", "README.md"]:
        assert f"{name}: stale\n" in printed
    run_printed_command(two, printed)
    assert check(two, capsys)[0] == 0
    for name, content in files(two).items():
        if name.startswith(("standalone", "notebooks", "README")):
            assert b"/fork/renamed/blob" in content
            assert b"somebody" not in content


def test_without_markers_or_readme_nothing_is_written_there(tmp_path, capsys):
    bare = program().replace("# <!-- badges -->\n# <!-- /badges -->\n", "# Badges: `<!-- badges -->`\n")
    root = make_repository(tmp_path, {"one": bare})
    (root / "README.md").unlink()
    assert build_notebooks.main([], root) == 0
    assert (root / "standalone" / "one.py").read_text() == bare
    assert not (root / "README.md").exists()
    assert check(root, capsys)[0] == 0


# Bad input: one sentence, nothing written


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        pytest.param(
            "# %% PI gate tags",
            "# %% Own\n1\n\n# %% PI gate tags",
            "cell 4 stands between shared cells without the tag `shared`; tag it, or move it before or after "
            "them",
            id="gap",
        ),
        pytest.param(
            "# %% PI gate tags",
            '# %% PI gate tags=["shared"]\n1\n\n# %% PI gate tags',
            "more than one shared cell has the title `PI gate`; give each its own",
            id="title twice",
        ),
        pytest.param(
            "# %% PI gate tags",
            "# %% tags",
            "shared cell 4 has no title; write one after its `# %%`",
            id="no title",
        ),
        pytest.param(
            SHARED,
            "# %% Own\n1",
            "expected a run of cells tagged `shared`, found none; "
            'put a cell `# %% Title tags=["shared"]` where the run belongs, which --sync then fills',
            id="no shared cell",
        ),
        pytest.param(
            "# %% Imports",
            '# %% Imports colour="red"',
            "header, cell_metadata_filter: found `tags,title,colour,-all`, expected `tags,title,-all`; "
            "copy the header of a program that passes --check, and give cells only a title and tags",
            id="cell attribute",
        ),
        pytest.param(
            "comment_magics: false",
            "comment_magics: true",
            "header, comment_magics: found `True`, expected `False`; "
            "copy the header of a program that passes --check",
            id="header, value",
        ),
        pytest.param(
            "#     cell_metadata_filter: tags,title,-all\n",
            "",
            "header, cell_metadata_filter: found `None`, expected `tags,title,-all`; "
            "copy the header of a program that passes --check",
            id="header, key",
        ),
        pytest.param(
            HEADER,
            "",
            "header, comment_magics: found `None`, expected `False`; "
            "copy the header of a program that passes --check",
            id="header, none",
        ),
        pytest.param(
            "display_name: Python 3",
            "display_name: Mine",
            "header, kernelspec: found {'display_name': 'Mine', 'language': 'python', 'name': 'python3'}, "
            "expected {'display_name': 'Python 3', 'language': 'python', 'name': 'python3'}; "
            "copy the header of a program that passes --check",
            id="header, kernelspec",
        ),
        pytest.param(
            "accelerator: GPU", "accelerator: [GPU", "not a notebook to jupytext (", id="header, YAML"
        ),
        pytest.param(
            "#   jupytext:\n",
            "#   jupytext: 3\n#   other:\n",
            "not a notebook to jupytext (",
            id="header, type",
        ),
        pytest.param(
            "import os",
            'TEXT = """\n# %% not a cell\n"""',
            "7 lines start with `# %%` but jupytext finds 6 cells; "
            "let only cells start so, and put nothing between header and first cell",
            id="marker in a string",
        ),
        pytest.param(
            "import os", "import os\r", "expected \\n line ends, found \\r; save it", id="line ends"
        ),
        pytest.param("Imports", 'Imports tags="own"', "not a notebook to jupytext (", id="tags"),
        pytest.param(
            "# <!-- /badges -->\n",
            "",
            "found `<!-- badges -->` without `<!-- /badges -->` after it; add that line",
            id="half a marker",
        ),
    ],
)
@pytest.mark.parametrize("command", [[], ["--check"], ["--sync"]])
def test_a_bad_program_is_refused_in_one_sentence(two, capsys, command, old, new, sentence):
    script = two / "standalone" / "two.py"
    edit(script, old, new)
    if command == ["--sync"]:
        command = ["--sync", str(script)]
    before = files(two)
    capsys.readouterr()
    assert build_notebooks.main(command, two) == 2
    assert files(two) == before
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"python build_notebooks.py: standalone/two.py: {sentence}")
    assert printed.err.count("\n") == 1


def test_a_program_that_is_not_utf8_is_refused(two, capsys):
    (two / "standalone" / "two.py").write_bytes(program().encode("latin-1", errors="replace") + b"# \xff\n")
    assert build_notebooks.main([], two) == 2
    assert "standalone/two.py: byte " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("pyproject", "sentence"),
    [
        (None, "pyproject.toml: expected a file, found none; run this in a whole checkout\n"),
        ("[project", "pyproject.toml: expected TOML ("),
        (
            "[project]",
            "pyproject.toml: [project.urls] Repository: found None, expected https://github.com/OWNER",
        ),
        (
            PYPROJECT.replace("github.com", "example.org"),
            "pyproject.toml: [project.urls] Repository: found 'https://example.org/somebody/some.kit'",
        ),
    ],
)
def test_a_bad_address_is_refused_in_one_sentence(two, capsys, pyproject, sentence):
    (two / "pyproject.toml").unlink()
    if pyproject is not None:
        (two / "pyproject.toml").write_text(pyproject)
    assert build_notebooks.main([], two) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"python build_notebooks.py: {sentence}")
    assert error.count("\n") == 1


def test_sync_from_something_else_names_the_programs(two, capsys):
    assert build_notebooks.main(["--sync", "three.py"], two) == 2
    expected = "--sync three.py: expected a program; name one of standalone/one.py, standalone/two.py\n"
    assert capsys.readouterr().err == f"python build_notebooks.py: {expected}"


def test_no_program_at_all_is_refused(tmp_path, capsys):
    assert build_notebooks.main(["--check"], tmp_path) == 2
    assert "standalone/: expected a program, found none" in capsys.readouterr().err


# This repository


@pytest.mark.skipif(not list(REPOSITORY.glob("standalone/*.py")), reason="no program in standalone/ yet")
def test_the_notebooks_of_this_repository_are_what_its_programs_render_to(capsys):
    status = build_notebooks.main(["--check"])
    assert status == 0, capsys.readouterr()


def test_kaggle_folders_hold_the_program_and_what_a_push_needs(two, capsys):
    for name in ("one", "two"):
        edit(
            two / "standalone" / f"{name}.py", "import os\n", 'import os\n\nKAGGLE_DATA = "owner/some-data"\n'
        )
    assert build_notebooks.main([], two) == 0
    before = files(two)
    assert build_notebooks.main(["--kaggle", "someone"], two) == 0
    assert files(two).items() >= before.items()
    printed = capsys.readouterr().out
    for kind, code in (("notebook", "one.ipynb"), ("script", "one.py")):
        folder = two / "build" / "kaggle" / f"one-{kind}"
        assert f"kaggle kernels push -p build/kaggle/one-{kind}\n" in printed
        metadata = json.loads((folder / "kernel-metadata.json").read_text())
        source = two / ("notebooks" if kind == "notebook" else "standalone") / code
        assert (folder / metadata["code_file"]).read_bytes() == source.read_bytes()
        assert metadata["id"] == f"someone/{metadata['title']}" == f"someone/one-{kind}"
        assert metadata["kernel_type"] == kind
        assert metadata["machine_shape"] == "NvidiaTeslaT4"
        assert metadata["enable_gpu"] is True
        assert metadata["dataset_sources"] == ["owner/some-data"]


def test_kaggle_refuses_a_name_that_cannot_be_and_a_program_without_data(two, capsys):
    assert build_notebooks.main(["--kaggle", "../me"], two) == 2
    assert "--kaggle ../me: expected a Kaggle user name" in capsys.readouterr().err
    assert build_notebooks.main(["--kaggle", "someone"], two) == 2
    assert 'one.py: expected a line KAGGLE_DATA = "OWNER/SLUG"' in capsys.readouterr().err
    assert not (two / "build").exists()


def test_the_programs_of_this_repository_name_their_data_for_kaggle():
    for program in build_notebooks.load_programs(build_notebooks.ROOT):
        assert build_notebooks.KAGGLE_DATA.search(program.text)
