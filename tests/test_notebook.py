"""The rendered notebook, run from top to bottom by nobody, without a display."""

import base64
import dataclasses
import importlib
import io
import json
import re
import warnings

import matplotlib.image
import nbformat
import numpy as np
import pytest
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SMALL_RUNS = {
    "cifar10_ast": {"AST_TRAIN_SIZE": "6000", "AST_MODEL": "simple_cnn"},
    "imagenet100_ast": {
        "AST_TRAIN_SIZE": "1000",
        "AST_MODEL": "squeezenet1_1",
        "AST_IMAGE_SIZE": "32",
        "AST_WEIGHTS": "none",
    },
}
POLICIES = {
    "cifar10_ast": {"ast", "full", "random"},
    "imagenet100_ast": {"ast", "full", "random", "short"},
}


def outputs(notebook, kind):
    """The outputs of each titled code cell that hold `kind`: a mime type, or stream."""
    found = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == kind or kind in output.get("data", {}):
                found.setdefault(cell.metadata.title, []).append(output.get("text") or output["data"][kind])
    return found


def assert_a_picture(png):
    pixels = matplotlib.image.imread(io.BytesIO(png))[..., :3]
    assert np.ptp(pixels) > 0.5
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 10


@pytest.mark.slow
@pytest.mark.parametrize("batch", [False, True], ids=["nbclient", "kaggle-batch"])
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs_by_itself_from_top_to_bottom(path, batch, tmp_path, monkeypatch):
    train_size, policies = SMALL_RUNS[path.stem]["AST_TRAIN_SIZE"], POLICIES[path.stem]
    for variable, value in SMALL_RUNS[path.stem].items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("AST_DATA", "shapes")
    monkeypatch.setenv("AST_EPOCHS", "4")
    out = tmp_path / "results"
    monkeypatch.setenv("AST_OUT", str(out))
    if batch:
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
        monkeypatch.setenv("AST_DATA_DIR", str(tmp_path))
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    summary = json.loads((out / "summary.json").read_text())
    assert summary["complete"]
    assert summary["synthetic"]
    assert set(summary["policies"]) == policies
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    ours = [row for row in rows if row["policy"] == "ast"]
    paid = round(summary["policies"]["ast"]["activated"] / int(train_size))  # what `short` may spend
    assert len(rows) == 12 + (paid if "short" in policies else 0)
    assert ours[-1]["train_loss"] < ours[0]["train_loss"]
    assert ours[2]["activated"] == 0.4 * int(train_size)
    printed = outputs(notebook, "stream")
    table = "".join(printed["Run in a notebook"])
    assert "SYNTHETIC" in table
    assert all(
        len(re.findall(rf"^{policy} +\d/4 ", table, re.MULTILINE)) == 4 for policy in policies - {"short"}
    )
    assert "| --- |" in "".join(outputs(notebook, "text/markdown")["What came out"])

    pictures = outputs(notebook, "image/png")
    titles = [
        cell.metadata.title for cell in notebook.cells if "active-ipynb" in cell.metadata.get("tags", [])
    ]
    silent = {"Your run", "Load the data", "What came out"}
    silent |= set() if batch else {"Play with the controller"}
    for title in set(titles) - silent:
        for picture in pictures[title]:
            assert_a_picture(base64.b64decode(picture))
    for name in ("curves", "costs", "classes", "significance", "chosen", "dashboard"):
        assert_a_picture((out / f"{name}.png").read_bytes())
    views = outputs(notebook, "application/vnd.jupyter.widget-view+json")
    assert set(views) == (set() if batch else {"Play with the controller"})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_form_says_what_the_settings_cell_says(path):
    program = importlib.import_module(path.stem)
    cells = {cell.metadata.get("title"): cell for cell in nbformat.read(path, as_version=4).cells}
    names = {"settings": program.Settings(), "replace": dataclasses.replace}
    exec(cells["Your run"].source, names)
    assert names["settings"] == program.Settings()
    fields = re.findall(
        r"^\w+ = .+?  # @param (\[.*?\])? ?(\{.*\})?$", cells["Your run"].source, re.MULTILINE
    )
    assert len(fields) == len(re.findall("@param", cells["Your run"].source)) >= 4
    for choices, options in fields:  # each is what Colab reads as JSON
        assert json.loads(choices or options)


def test_bad_input_in_a_notebook_is_one_sentence_and_never_an_exit(cifar, monkeypatch):
    monkeypatch.setenv("AST_EPOCHS", "zero")
    with pytest.raises(cifar.BadInput, match="AST_EPOCHS= zero: expected a whole number of epochs"):
        cifar.run(cifar.Settings())
    monkeypatch.delenv("AST_EPOCHS")
    with pytest.raises(cifar.BadInput, match=r"target_activation = 2"):
        cifar.run(cifar.replace(cifar.Settings(), target_activation=2))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_holds_no_output_and_no_widget_state(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    assert "widgets" not in notebook.metadata
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in notebook.cells)
