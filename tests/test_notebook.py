"""The committed notebooks, run from top to bottom by nobody, with nobody to click."""

import base64
import importlib
import json
import re
from dataclasses import replace

import nbformat
import pytest
from conftest import ROOT, rows, summary
from nbclient import NotebookClient
from test_pictures import assert_a_picture

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMALL_RUNS = {
    "cifar10_ast": {"AST_TRAIN_SIZE": "400", "AST_MODEL": "simple_cnn"},
    "imagenet100_ast": {"AST_TRAIN_SIZE": "300", "AST_MODEL": "squeezenet1_1", "AST_WEIGHTS": "none"},
}
SMALL_RUNS["imagenet100_ast"]["AST_IMAGE_SIZE"] = "32"
WIDGET = "application/vnd.jupyter.widget-view+json"
WITHOUT = """
import importlib.machinery as machinery
find = machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] == "ipywidgets" else find(name, path, target)
machinery.PathFinder.find_spec = staticmethod(find_spec)
"""


def outputs(notebook, kind):
    """The outputs of each titled code cell that hold `kind`: a mime type, or stream."""
    found = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == kind or kind in output.get("data", {}):
                found.setdefault(cell.metadata.title, []).append(output.get("text") or output["data"][kind])
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "run", ["cifar10_ast, widgets", "cifar10_ast, no ipywidgets", "imagenet100_ast, kaggle batch"]
)
def test_run_all_ends_by_itself_and_shows_everything(run, tmp_path, monkeypatch):
    program, way = run.split(", ")
    out, policies = tmp_path / "results", {"ast", "full", "random"}
    given = {"AST_DATA": "shapes", "AST_EPOCHS": "4", "AST_OUT": str(out), "AST_DATA_DIR": str(tmp_path)}
    given |= {"AST_COMPARE": "full,random", "OMP_NUM_THREADS": "1"} | SMALL_RUNS[program]
    given |= {"KAGGLE_KERNEL_RUN_TYPE": "Batch"} if way == "kaggle batch" else {}
    if way == "no ipywidgets":
        (tmp_path / "sitecustomize.py").write_text(WITHOUT)
        given["PYTHONPATH"] = str(tmp_path)
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    notebook = nbformat.read(ROOT / "notebooks" / f"{program}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert summary(out)["complete"] and summary(out)["synthetic"]
    assert set(summary(out)["policies"]) == policies and len(rows(out)) == 12
    printed = {title: "".join(text) for title, text in outputs(notebook, "stream").items()}
    table = printed.get("Run in a notebook") or outputs(notebook, "text/html")["Run in a notebook"][0]
    assert "SYNTHETIC" in table and table.startswith("<details>") == (way == "widgets")
    assert all(len(re.findall(rf"^{policy} +\d+/12 ", table, re.MULTILINE)) == 4 for policy in policies)
    assert all(re.search(rf"^{policy} .* %", printed["What came out"], re.MULTILINE) for policy in policies)
    assert "classes chosen most:" in printed["What was chosen"]

    pictures, views = outputs(notebook, "image/png"), outputs(notebook, WIDGET)
    assert {"What significance looks like", "What came out", "What was chosen"} <= set(pictures)
    for png in [base64.b64decode(png) for png, *_ in pictures.values()] + [
        (out / "dashboard.png").read_bytes()
    ]:
        assert_a_picture(png, 300_000)
    assert bool(views) == (way == "widgets")
    assert way == "widgets" or "Play with the controller" in pictures


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_form_says_what_the_settings_cell_says(path):
    program = importlib.import_module(path.stem)
    cells = {cell.metadata.get("title"): cell for cell in nbformat.read(path, as_version=4).cells}
    form, names = cells["Your run"].source, {}
    exec(form, names)
    assert replace(program.Settings(), **names["your_run"]) == program.Settings()
    fields = re.findall(r"^\w+ = .+?  # @param (\[.*?\])? ?(\{.*\})?$", form, re.MULTILINE)
    assert len(fields) == len(re.findall("@param", form)) >= 4
    for field in fields:  # what Colab reads as JSON
        assert any(field) and all(json.loads(part) for part in field if part)
