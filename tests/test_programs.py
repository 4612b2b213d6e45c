"""The budgets of the programs: a text that a person reads from top to bottom does not grow unseen."""

import ast
import io
import re
import tokenize
from dataclasses import fields
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOT_CODE = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)
LINES = {"cifar10_ast": 3348, "imagenet100_ast": 3468}  # they may only fall: 1,800 and 2,000 are the aim
UNFOLDED, CELL, TRAINER, FUNCTION, FIELDS = 700, 160, 150, 45, 36
TOKENS, CHARACTERS = 12.6, 51.0  # a code line, on average; 12 and 48 are the aim


class Program:
    """A program's text, and which of its lines are code: no blanks, comments, docstrings."""

    def __init__(self, name):
        self.text = (ROOT / "standalone" / f"{name}.py").read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)
        words = tokenize.generate_tokens(io.StringIO(self.text).readline)
        docs = {line for node in ast.walk(self.tree) for line in docstring(node)}
        self.tokens = [w for w in words if w.type not in NOT_CODE and w.start[0] not in docs]
        self.code = {line for w in self.tokens for line in range(w.start[0], w.end[0] + 1)}

    def size(self, node):
        return sum(node.lineno <= line <= node.end_lineno for line in self.code)

    def cells(self):
        """(title, tags, code lines) of each code cell."""
        starts = [(m.start(), m[0]) for m in re.finditer(r"^# %% .*$", self.text, re.MULTILINE)]
        ends = [*(start for start, _ in starts[1:]), len(self.text)]
        for (start, title), end in zip(starts, ends, strict=True):
            first, last = self.text.count("\n", 0, start) + 1, self.text.count("\n", 0, end)
            yield title, sum(first <= line <= last for line in self.code)


def docstring(node):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
    first = node.body[0] if isinstance(node, kinds) and node.body else None
    found = isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str)
    return range(first.lineno, first.end_lineno + 1) if found else ()


@pytest.fixture(params=list(LINES))
def program(request):
    found = Program(request.param)
    found.budget = LINES[request.param]
    return found


def test_a_program_keeps_its_lines(program):
    assert len(program.code) <= program.budget


def test_what_is_not_folded_can_be_read_in_one_go(program):
    assert sum(size for title, size in program.cells() if '"fold"' not in title) <= UNFOLDED


def test_a_cell_holds_one_idea(program):
    assert {title: size for title, size in program.cells() if size > CELL} == {}


def test_a_function_is_as_long_as_its_thought(program):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    sizes = {n.name: program.size(n) for n in ast.walk(program.tree) if isinstance(n, kinds)}
    assert {name: size for name, size in sizes.items() if size > FUNCTION} == {}


def test_the_trainer_is_one_class_in_one_cell(program):
    trainer = [n for n in program.tree.body if getattr(n, "name", "") == "AdaptiveSparseTrainer"]
    assert len(trainer) == 1 and trainer[0].bases == [] and program.size(trainer[0]) <= TRAINER
    assert "AdaptiveSparseTrainer." not in re.sub(r'""".*?"""', "", program.text, flags=re.DOTALL)


def test_lines_are_not_crammed(program):
    lines = program.text.splitlines()
    characters = sum(len(lines[number - 1].strip()) for number in program.code)
    assert len(program.tokens) / len(program.code) <= TOKENS
    assert characters / len(program.code) <= CHARACTERS
    assert not [w for w in program.tokens if w.type == tokenize.OP and w.string == ";"]


def test_no_code_hides_in_strings(program):
    calls = {getattr(n.func, "id", "") for n in ast.walk(program.tree) if isinstance(n, ast.Call)}
    assert not calls & {"exec", "eval", "compile", "__import__"}


def test_settings_fit_on_a_screen(cifar, imagenet):
    assert all(len(fields(program.Settings)) <= FIELDS for program in (cifar, imagenet))


def test_the_story_begins_early_in_the_notebook(program):
    """Lines of the notebook above the first on significance; a folded cell has one."""
    before = program.text.partition("# ### Significance")[0].partition("\n\n")[2]
    cells = re.split(r"^# %% ", before, flags=re.MULTILINE)[1:]
    shown = [1 if '"fold"' in cell.partition("\n")[0] else cell.count("\n") for cell in cells]
    assert sum(shown) <= 150
