"""Public sets: `kaggle:` by a stand-in of kagglehub, and `hf:` by datasets, on local tables."""

from __future__ import annotations

import importlib
import io
import os
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image

datasets = importlib.import_module("datasets")
ClassLabel, Value, Picture = datasets.ClassLabel, datasets.Value, datasets.Image
NAMES = ClassLabel(names=["wolf/dog", "cat", "owl"])


@pytest.fixture(params=["cifar", "imagenet"])
def program(request):
    return request.getfixturevalue(request.param)


def load(program, data, tmp_path):
    """The data and the notices that were said."""
    own = (
        {} if program.PROGRAM == "cifar10_ast" else {"image_size": 32, "weights": "none", "model": "resnet18"}
    )
    told, out = [], {"out": str(tmp_path / "out"), "data_dir": str(tmp_path / "none")}
    return program.load_data(program.Settings(data=data, **out, **own), told.append), told


def table(path, *, kind=NAMES, label="label", broken=(), **splits):
    """A folder of parquet files; the picture of row i is grey, of value 4 i."""
    path.mkdir()
    for split, labels in splits.items():
        rows = []
        for number in range(len(labels)):
            Image.new("RGB", (8, 8), (4 * number,) * 3).save(buffer := io.BytesIO(), "PNG")
            rows.append({"bytes": b"odd" if number in broken else buffer.getvalue(), "path": None})
        columns = {"picture": rows, "width": [8] * len(labels), label: labels}
        features = datasets.Features(picture=Picture(), width=Value("int64"), **{label: kind})
        part = datasets.Dataset.from_dict(columns, features=features)
        part.to_parquet(path / f"{split}-00000-of-00001.parquet")
    return path


@pytest.fixture(autouse=True)
def no_outside(program_modules, monkeypatch):
    """No test reaches the network, or leaves word of that behind."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for module in program_modules:
        monkeypatch.setattr(module, "HUB", "http://127.0.0.1:9")  # where nothing listens


@pytest.fixture
def program_modules(cifar, imagenet):
    return cifar, imagenet


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Where `datasets` keeps its tables: nothing of this machine's."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "store")


FIFTH = "no validation images in class folders: 20% of each class are kept for it"
# The table; rows to train and to validate on, by class; what is told.
CASES = {
    "validation": ({"train": [0, 1, 0], "validation": [0, 1], "test": [1]},
                   {"cat": [1], "wolf_dog": [0, 2]}, {"cat": [1], "wolf_dog": [0]},
                   ["left out: 1 images in test/cat/"]),
    "test without labels": ({"train": [0, 1, 0, 1], "test": [-1, -1]},
                            {"cat": [3], "wolf_dog": [2]}, {"cat": [1], "wolf_dog": [0]}, [FIFTH]),
    "numbers": ({"train": [7, 3, 7, 3], "kind": Value("int64"), "label": "target"},
                {"3": [3], "7": [2]}, {"3": [1], "7": [0]}, [FIFTH]),
    "words": ({"train": ["ant", "bee", "ant", "bee", None], "kind": Value("string"), "label": "Species"},
                        {"ant": [2], "bee": [3]}, {"ant": [0], "bee": [1]}, [FIFTH]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_table_is_read_with_its_splits_and_classes(program, tmp_path, store, case):
    made, *expected, told = CASES[case]
    name = f"hf:{table(tmp_path / 'flowers', **made)}"
    data, said = load(program, name, tmp_path)
    assert (data.name, data.source, data.classes) == ("flowers", name, list(expected[0]))
    assert [line.removeprefix(f"{name}: ") for line in said if not line.startswith("weights")] == told
    for split, rows in zip(("train", "val"), expected, strict=True):
        images, labels = getattr(data, f"{split}_images"), getattr(data, f"{split}_labels")
        pictures = [round(float(np.mean(images[i])) / 4) for i in range(len(labels))]
        assert pictures == [row for of_class in rows.values() for row in of_class]
        assert labels.tolist() == [i for i, of_class in enumerate(rows.values()) for _ in of_class]


def test_only_rows_that_are_asked_for_are_read(imagenet, tmp_path, store, monkeypatch):
    data, _ = load(imagenet, f"hf:{table(tmp_path / 'set', train=[0, 1] * 20)}", tmp_path)
    chosen = imagenet.Settings(image_size=8, batch_size=4, workers=2, device="cpu")
    read, opened = [], imagenet.Rows.open
    monkeypatch.setattr(imagenet.Rows, "open", lambda rows, name: read.append(name) or opened(rows, name))
    source = imagenet.CropSource(data.train_images, data.train_labels, chosen, training=True)
    batches = list(source.stream([(torch.tensor([3, 8]), torch.ones(2)), (torch.tensor([5]), torch.ones(1))]))
    assert [len(batch) for batch in batches] == [2, 1]
    assert sorted(read) == sorted(data.train_images.names[index] for index in (3, 8, 5))


def test_an_unreadable_row_is_one_lost_image(cifar, imagenet, tmp_path, store):
    name = f"hf:{table(tmp_path / 'set', train=[0, 1] * 100, broken=[153])}"
    data, _ = load(cifar, name, tmp_path)
    (lost,) = data.unreadable
    assert lost.startswith("train/cat/153.png: ") and len(data.train_labels) + len(data.val_labels) == 199
    data, _ = load(imagenet, name, tmp_path)
    chosen = imagenet.Settings(image_size=8, batch_size=32, workers=2, device="cpu")
    source = imagenet.CropSource(data.train_images, data.train_labels, chosen, training=False)
    readable = sum(len(labels) for _, labels in source.in_order())
    assert readable == len(source) - 1 and list(source.unreadable.values()) == [lost]


def test_kaggles_folder_is_read_as_ones_own(program, tmp_path, monkeypatch):
    folder, asked = write_images(tmp_path / "versions" / "3"), []
    stand_in = SimpleNamespace(dataset_download=lambda name: asked.append(name) or str(folder))
    monkeypatch.setitem(sys.modules, "kagglehub", stand_in)
    data, _ = load(program, "kaggle:ambityga/insects", tmp_path)
    assert (asked, data.classes, data.source) == (["ambityga/insects"], ["ant", "bee", "cow"], str(folder))


def failing(error):
    def load(name):
        raise error

    return SimpleNamespace(dataset_download=load, load_dataset=load)


@pytest.mark.parametrize(
    ("library", "told"),
    [(None, "kagglehub"), (failing(OSError("no name\nserver")), "no name server"),
     (failing(Exception("403, log in")), "403, log in"), (failing(KeyError("data")), "data")],
)  # fmt: skip
@pytest.mark.parametrize(("data", "package"), [("kaggle:a/b", "kagglehub"), ("hf:a/b", "datasets")])
def test_what_cannot_be_had_is_one_sentence_with_the_way_out(
    program, tmp_path, monkeypatch, library, told, data, package
):
    monkeypatch.setitem(sys.modules, package, library)
    with pytest.raises(program.BadInput, match=r"^[^\n]+; mend that, or name a folder of images$") as caught:
        load(program, data, tmp_path)
    for word in (f"--data {data}", package, "login", "network", told.replace("kagglehub", package)):
        assert word in str(caught.value)


@pytest.mark.parametrize("columns", ["no pictures", "no class"])
def test_a_table_without_pictures_or_classes_names_its_columns(program, tmp_path, store, columns):
    path = table(tmp_path / "set", train=["a", "b"], kind=Value("string"), label="words")
    if columns == "no pictures":
        part = datasets.load_dataset(str(path))["train"].remove_columns("picture")
        part.to_parquet(path / "train-00000-of-00001.parquet")
    with pytest.raises(program.BadInput, match=r"columns (picture, )?width, words; expected"):
        load(program, f"hf:{path}", tmp_path)


def test_without_a_network_the_library_is_told_to_read_its_store(program, tmp_path, monkeypatch):
    seen = []
    stand_in = SimpleNamespace(load_dataset=lambda name: seen.append(os.environ["HF_HUB_OFFLINE"]) or {})
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    with pytest.raises(program.BadInput):  # a set without rows
        load(program, "hf:a/b", tmp_path)
    assert seen == ["1"]
