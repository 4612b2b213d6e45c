"""The rendered notebook, run from top to bottom by nobody, without a display."""

import base64
import io
import json

import matplotlib.image
import nbformat
import numpy as np
import pytest
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_trains_from_top_to_bottom(path, tmp_path, monkeypatch):
    monkeypatch.setenv("AST_DATA", "shapes")
    monkeypatch.setenv("AST_TRAIN_SIZE", "6000")
    monkeypatch.setenv("AST_EPOCHS", "4")
    monkeypatch.setenv("AST_MODEL", "simple_cnn")
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    out = tmp_path / "runs" / path.stem
    summary = json.loads((out / "summary.json").read_text())
    assert summary["complete"]
    assert summary["synthetic"]
    assert set(summary["policies"]) == {"ast", "full", "random"}
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    ours = [row for row in rows if row["policy"] == "ast"]
    assert len(rows) == 12
    assert ours[-1]["train_loss"] < ours[0]["train_loss"]
    assert ours[2]["activated"] == 2400
    printed = "".join(
        o["text"] for c in notebook.cells for o in c.get("outputs", []) if o.output_type == "stream"
    )
    assert "SYNTHETIC" in printed
    pictures = [
        o["data"]["image/png"]
        for c in notebook.cells
        for o in c.get("outputs", [])
        if "image/png" in o.get("data", {})
    ]
    assert pictures
    for picture in pictures:
        pixels = matplotlib.image.imread(io.BytesIO(base64.b64decode(picture)))
        assert np.ptp(pixels) > 0.5


def test_bad_input_in_a_notebook_is_one_sentence_and_never_an_exit(cifar, monkeypatch):
    monkeypatch.setenv("AST_EPOCHS", "zero")
    with pytest.raises(cifar.BadInput, match="AST_EPOCHS= zero: expected a whole number of epochs"):
        cifar.run(cifar.Settings())
    monkeypatch.delenv("AST_EPOCHS")
    with pytest.raises(cifar.BadInput, match=r"target_activation = 2"):
        cifar.run(cifar.replace(cifar.Settings(), target_activation=2))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_holds_no_output_and_no_widget_state(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert "widgets" not in notebook.metadata
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in notebook.cells)
