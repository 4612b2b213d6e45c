"""The data: what is drawn, what is read, what is downloaded, and what is refused in one sentence."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import pickle
import socket
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchvision.io import encode_jpeg, encode_png

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities")
REAL_ZIP = Path(__file__).parents[2] / "shared" / "data" / "cifar10-images.zip"
needs_real = pytest.mark.skipif(not REAL_ZIP.exists(), reason=f"real CIFAR-10 is not at {REAL_ZIP}")
examples = settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BATCHES = [*(f"data_batch_{index}" for index in range(1, 6)), "test_batch"]


@pytest.fixture(autouse=True)
def no_outside(cifar, monkeypatch, tmp_path):
    """No test reads this machine's Kaggle inputs or reaches the network."""
    monkeypatch.setattr(cifar, "KAGGLE_INPUT", tmp_path / "no-kaggle")
    monkeypatch.setattr(cifar, "CIFAR10_MIRRORS", ())


def load(cifar, data, folder="nowhere", size=0):
    """Load and return the data with the notices that were said."""
    notices = []
    found = cifar.load_data(
        SimpleNamespace(data=str(data), data_dir=str(folder), train_size=size), notices.append
    )
    return found, notices


def refusal(cifar, *args, **kwargs):
    """The one sentence that a load is refused with."""
    with pytest.raises(cifar.BadInput) as caught:
        load(cifar, *args, **kwargs)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def pixels(n, seed=0, height=32, width=32):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def png(image):
    return encode_png(torch.from_numpy(image).permute(2, 0, 1).contiguous()).numpy().tobytes()


def write_tree(root, classes=("ant", "bee"), n=3, splits=("train", "test"), seed=0):
    """Write class folders of PNG files; returns {split: images in the order they must come}."""
    written = {}
    for offset, split in enumerate(splits):
        written[split] = pixels(n * len(classes), seed + offset)
        for index, image in enumerate(written[split]):
            folder = root / split / classes[index // n]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{index:04}.png").write_bytes(png(image))
    return written


def zip_folder(folder, target, prefix=""):
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, prefix + path.relative_to(folder).as_posix())
    return target


def batches(n=20):
    """The six pickles of a tiny CIFAR-10 as their publisher writes them: bytes keys, planes in rows."""
    made = {}
    for seed, name in enumerate(BATCHES):
        rows = pixels(n, seed).transpose(0, 3, 1, 2).reshape(n, 3072)
        made[name] = pickle.dumps({b"data": rows, b"labels": [i % 10 for i in range(n)]}, protocol=2)
    return made


def tar_bytes(members, folder="cifar-10-batches-py/"):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(folder + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write_batches(folder):
    folder.mkdir(parents=True)
    for name, content in batches().items():
        (folder / name).write_bytes(content)
    return folder


def write_packed(folder, classes=("ant", "bee"), **changes):
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        "train_images": pixels(8),
        "train_labels": np.arange(8) % 2,
        "val_images": pixels(4, 1),
        "val_labels": np.arange(4) % 2,
    } | changes
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    (folder / "classes.json").write_text(json.dumps(list(classes)), encoding="utf-8")
    return arrays


# Shapes


def test_shapes_repeat_from_their_seed_and_leave_global_generators_alone(cifar):
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    first, again, other = cifar.shapes(60, 20), cifar.shapes(60, 20), cifar.shapes(60, 20, seed=1)
    for name in ("train_images", "train_labels", "val_images", "val_labels", "difficulty"):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.train_images, other.train_images)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert torch.equal(torch.get_rng_state(), torch_state)


@examples
@given(n_train=st.integers(10, 240), n_val=st.integers(10, 60), seed=st.integers(0, 2**32))
def test_shapes_hold_the_stated_shares(cifar, n_train, n_val, seed):
    data = cifar.shapes(n_train, n_val, seed)
    assert data.synthetic
    assert len(data.classes) == 10
    assert data.train_images.shape == (n_train, 32, 32, 3)
    assert data.val_images.shape == (n_val, 32, 32, 3)
    assert data.train_images.dtype == data.val_images.dtype == data.difficulty.dtype == np.uint8
    assert data.train_labels.dtype == data.val_labels.dtype == np.int64
    hard, wrong = round(0.35 * n_train), round(0.05 * n_train)
    assert np.bincount(data.difficulty, minlength=3).tolist() == [n_train - hard - wrong, hard, wrong]
    assert np.ptp(np.bincount(data.val_labels, minlength=10)) <= 1
    assert 0 <= data.train_labels.min() <= data.train_labels.max() <= 9


def test_shapes_mislabel_exactly_the_samples_marked_so(cifar, monkeypatch):
    drawn, draw = [], cifar.draw

    def watched(rng, figures, hard):
        drawn.append(figures.copy())
        return draw(rng, figures, hard)

    monkeypatch.setattr(cifar, "draw", watched)
    data = cifar.shapes(1200, 100)
    truth = np.concatenate(drawn)
    assert np.array_equal(truth[:1200] != data.train_labels, data.difficulty == 2)
    assert np.array_equal(truth[1200:], data.val_labels)


def test_no_figure_is_another_or_its_mirror_image(cifar):
    y, x = np.mgrid[-1:1:65j, -1:1:65j].astype(np.float32)
    inside = {name: figure(x, y) < 0 for name, figure in cifar.FIGURES.items()}
    for name, one in inside.items():
        assert 0.1 < one.mean() < 0.8, name
        for other_name, other in inside.items():
            for seen in (other, other[:, ::-1]):
                overlap = (one & seen).sum() / (one | seen).sum()
                assert name == other_name or overlap < 0.85, (name, other_name)


@pytest.fixture
def one_thread():
    """Threads that share their cores with other work wait for each other, longer than one takes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_a_small_network_finds_easy_hard_and_mislabelled_in_that_order(cifar, one_thread):
    data = cifar.shapes(2000, 500)
    generator = torch.Generator().manual_seed(0)

    def batch(images):
        planes = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        return planes.contiguous(memory_format=torch.channels_last)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = []
        for inputs, outputs in ((3, 16), (16, 32), (32, 64)):
            layers += [
                torch.nn.Conv2d(inputs, outputs, 3, padding=1),
                torch.nn.BatchNorm2d(outputs),
                torch.nn.ReLU(),
                torch.nn.MaxPool2d(2),
            ]
        network = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(1024, 10))
    network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    images, labels = batch(data.train_images), torch.from_numpy(data.train_labels)
    for _ in range(5):
        for rows in torch.randperm(len(labels), generator=generator).split(50):
            loss = torch.nn.functional.cross_entropy(network(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.eval()
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(network(images), labels, reduction="none").numpy()
        right = network(batch(data.val_images)).argmax(1).numpy() == data.val_labels
    easy, hard, wrong = (losses[data.difficulty == kind].mean() for kind in range(3))
    assert 1.5 * easy < hard
    assert hard < wrong
    assert right.mean() > 0.3  # guessing gives 0.1


def test_blotches_are_smooth_and_vary(cifar):
    noise = cifar.blotches(np.random.default_rng(0), 50, 4)
    assert noise.shape == (50, 32, 32)
    assert -1 <= noise.min() < -0.5
    assert 0.5 < noise.max() <= 1
    assert np.abs(np.diff(noise)).max() <= 2 * 4 / 32 + 1e-6  # a step across a cell, a cell being 8 pixels


# A balanced subset


@examples
@given(labels=st.lists(st.integers(0, 4), min_size=5, max_size=80), share=st.floats(0, 1))
def test_a_subset_is_as_even_as_the_classes_allow(cifar, labels, share):
    labels = np.array(labels)
    size = max(5, round(share * len(labels)))
    rows = cifar.balanced_subset(labels, size, 5)
    assert np.array_equal(rows, cifar.balanced_subset(labels, size, 5))
    assert len(set(rows.tolist())) == len(rows) == size
    assert np.all(np.diff(rows) > 0)
    taken, there = np.bincount(labels[rows], minlength=5), np.bincount(labels, minlength=5)
    assert all(taken[i] == there[i] or taken[i] >= taken.max() - 1 for i in range(5))


@pytest.mark.parametrize("size", [-1, 1, 9])
def test_a_train_size_out_of_range_is_refused(cifar, tmp_path, size):
    write_packed(tmp_path / "packed")
    assert f"--train-size {size}" in refusal(cifar, tmp_path / "packed", size=size)


@pytest.mark.parametrize("size", [-3, 9])
def test_shapes_refuse_a_size_below_one_a_class(cifar, size):
    assert f"--train-size {size}" in refusal(cifar, "shapes", size=size)


def test_shapes_draw_as_many_as_asked(cifar):
    data, _ = load(cifar, "shapes", size=37)
    assert (data.name, len(data.train_images), data.unreadable) == ("shapes", 37, [])


# Forms of data


@pytest.mark.parametrize("splits", [("train", "test"), ("train", "val")])
@pytest.mark.parametrize("form", ["folder", "nested folder", "zip", "nested zip"])
def test_class_folders_are_read_pixel_for_pixel(cifar, tmp_path, splits, form):
    root = tmp_path / "box" / "insects" if form == "nested folder" else tmp_path / "insects"
    written = write_tree(root, classes=("bee", "ant"), splits=splits)
    (root / "train" / "bee" / "notes.txt").write_text("not an image", encoding="utf-8")
    (root / "train" / ".hidden").mkdir()
    path = {"folder": root, "nested folder": root.parent}.get(form) or zip_folder(
        root, tmp_path / "insects.zip", "insects/" if form == "nested zip" else ""
    )
    data, notices = load(cifar, path)
    order = [3, 4, 5, 0, 1, 2]  # "bee" was written first, "ant" is sorted first
    assert data.classes == ["ant", "bee"]
    assert data.name == ("box" if form == "nested folder" else "insects")
    assert np.array_equal(data.train_images, written["train"][order])
    assert np.array_equal(data.val_images, written[splits[1]][order])
    assert data.train_labels.tolist() == data.val_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.train_labels.dtype == np.int64
    assert not data.synthetic
    assert notices == data.unreadable == []


@pytest.mark.parametrize("form", ["folder", "parent", "archive"])
def test_the_official_batches_are_read_and_nothing_is_written(cifar, tmp_path, form):
    place = tmp_path / "place"
    if form == "archive":
        place.mkdir()
        path = place / "cifar-10-python.tar.gz"
        path.write_bytes(tar_bytes({**batches(), "../../evil": b"outside"}))
    else:
        folder = write_batches(place / "cifar-10-batches-py")
        path = folder if form == "folder" else place
    before = sorted(tmp_path.rglob("*"))
    data, _ = load(cifar, path)
    assert sorted(tmp_path.rglob("*")) == before
    assert data.classes == NAMES
    assert np.array_equal(data.train_images, np.concatenate([pixels(20, seed) for seed in range(5)]))
    assert np.array_equal(data.val_images, pixels(20, 5))
    assert data.train_labels.tolist() == [i % 10 for i in range(100)]


def test_packed_arrays_are_mapped_not_read(cifar, tmp_path):
    arrays = write_packed(tmp_path / "packed", train_labels=(np.arange(8) % 2).astype(np.uint8))
    data, _ = load(cifar, tmp_path / "packed")
    assert isinstance(data.train_images, np.memmap)
    assert data.classes == ["ant", "bee"]
    assert np.array_equal(data.train_images, arrays["train_images"])
    assert data.train_labels.dtype == np.int64
    assert data.train_labels.tolist() == [0, 1] * 4


@pytest.mark.parametrize("form", ["folder", "batches", "packed"])
def test_every_form_takes_a_train_size(cifar, tmp_path, form):
    path = tmp_path / form
    {"folder": write_tree, "batches": write_batches, "packed": write_packed}[form](path)
    whole, _ = load(cifar, path)
    size = 10 if form == "batches" else 4
    part, _ = load(cifar, path, size=size)
    assert np.ptp(np.bincount(part.train_labels)) == 0
    assert len(part.train_images) == size
    where = [
        np.flatnonzero((whole.train_images == image).all(axis=(1, 2, 3)))[0] for image in part.train_images
    ]
    assert np.array_equal(whole.train_labels[where], part.train_labels)
    assert np.array_equal(part.val_images, whole.val_images)


@examples
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    colour=st.tuples(*[st.integers(0, 255)] * 3),
    kind=st.sampled_from(["png", "grey", "jpeg"]),
)
def test_images_of_any_size_keep_their_colour(cifar, height, width, colour, kind):
    image = torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1).expand(3, height, width).contiguous()
    encoded = (
        encode_jpeg(image, quality=100)
        if kind == "jpeg"
        else encode_png(image[:1] if kind == "grey" else image)
    )
    decoded = cifar.decode(encoded.numpy().tobytes())
    expected = [colour[0]] * 3 if kind == "grey" else colour
    assert decoded.shape == (32, 32, 3)
    assert decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - expected).max() <= (6 if kind == "jpeg" else 1)  # JPEG rounds colours


def test_resizing_smooths_and_keeps_the_middle(cifar):
    checks = np.indices((352, 352)).sum(0)[..., None].repeat(3, 2) % 2 * 255
    assert abs(cifar.decode(png(checks.astype(np.uint8))).astype(int) - 127).max() < 40
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, 64:128] = 255
    assert cifar.decode(png(wide)).mean() > 245


# Refusals


def test_a_path_that_is_not_there_is_refused(cifar, tmp_path):
    message = refusal(cifar, tmp_path / "gone")
    assert "gone" in message
    assert "no such path" in message
    assert "cifar10, shapes" in message


def test_a_path_without_known_data_is_refused(cifar, tmp_path):
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    assert "no known form" in refusal(cifar, tmp_path)
    assert "no known form" in refusal(cifar, tmp_path / "notes.txt")


@pytest.mark.parametrize("form", ["zip", "tar.gz"])
@examples
@given(share=st.floats(0, 0.999))
def test_an_archive_cut_anywhere_is_refused_or_read_whole(cifar, tmp_path_factory, form, share):
    folder = tmp_path_factory.mktemp("cut")
    path = folder / f"data.{form}"
    if form == "zip":
        write_tree(folder / "tree")
        zip_folder(folder / "tree", path)
    else:
        path.write_bytes(tar_bytes(batches(10)))
    whole, _ = load(cifar, path)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(share * len(raw))])
    try:
        data, _ = load(cifar, path)
    except cifar.BadInput as error:
        assert str(path) in str(error)
    else:
        assert np.array_equal(data.train_images, whole.train_images)


def test_half_an_archive_is_refused(cifar, tmp_path):
    write_tree(tmp_path / "tree")
    whole_zip = zip_folder(tmp_path / "tree", tmp_path / "whole.zip").read_bytes()
    for name, raw in (("a.tar.gz", tar_bytes(batches())), ("b.zip", whole_zip), ("c.tar.gz", b"no archive")):
        (tmp_path / name).write_bytes(raw[: len(raw) // 2])
        assert name in refusal(cifar, tmp_path / name)


@examples
@given(raw=st.binary(max_size=200))
def test_a_batch_of_any_bytes_is_refused(cifar, tmp_path_factory, raw):
    folder = tmp_path_factory.mktemp("batch") / "cifar-10-batches-py"
    write_batches(folder)
    (folder / "data_batch_3").write_bytes(raw)
    assert "data_batch_3" in refusal(cifar, folder)


@pytest.mark.parametrize(
    "content",
    [{}, [], {b"data": 1, b"labels": [0]}, {b"data": np.zeros((2, 5), np.uint8), b"labels": [0, 1]}],
)
def test_a_batch_without_images_is_refused(cifar, tmp_path, content):
    folder = write_batches(tmp_path / "cifar-10-batches-py")
    (folder / "test_batch").write_bytes(pickle.dumps(content, protocol=2))
    assert "test_batch" in refusal(cifar, folder)


def test_a_missing_batch_is_named(cifar, tmp_path):
    folder = write_batches(tmp_path / "cifar-10-batches-py")
    (folder / "data_batch_4").unlink()
    assert "data_batch_4" in refusal(cifar, folder)


class Intruder:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(cifar, tmp_path):
    folder = write_batches(tmp_path / "cifar-10-batches-py")
    (folder / "data_batch_2").write_bytes(pickle.dumps(Intruder(str(tmp_path / "ran"))))
    assert "mkdir" in refusal(cifar, folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["train_images", "train_labels", "val_images", "val_labels"])
def test_a_truncated_array_is_refused(cifar, tmp_path, name):
    write_packed(tmp_path)
    path = tmp_path / f"{name}.npy"
    for keep in (0, 40, -1):
        path.write_bytes(path.read_bytes()[:keep])
        assert f"{name}.npy" in refusal(cifar, tmp_path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"train_labels": np.array([0, 1, 2, 0, 1, 0, 1, 0])}, "0 to 2"),
        ({"val_labels": np.array([0, -1, 0, 1])}, "-1 to 1"),
        ({"train_labels": np.zeros(8, np.float32)}, "float32"),
        ({"train_labels": np.zeros(7, np.int64)}, "[7]"),
        ({"train_images": np.zeros((8, 32, 32, 3), np.float32)}, "float32"),
        ({"train_images": np.zeros((8, 3, 32, 32), np.uint8)}, "[8, 3, 32, 32]"),
        ({"val_images": np.zeros((4, 28, 28, 3), np.uint8)}, "[4, 28, 28, 3]"),
        ({"val_images": np.zeros((0, 32, 32, 3), np.uint8), "val_labels": np.zeros(0, np.int64)}, "[0, 32"),
        ({"train_images": np.uint8(1)}, "uint8 []"),
        ({"train_images": np.array([{"an": "object"}], dtype=object)}, "train_images.npy"),
    ],
)
def test_packed_arrays_that_do_not_fit_are_refused(cifar, tmp_path, changes, told):
    write_packed(tmp_path, **changes)
    assert told in refusal(cifar, tmp_path)


@pytest.mark.parametrize("text", ["", "{", '["one"]', '{"a": 1}', "[1, 2]", '["a", "a"]'])
def test_a_bad_list_of_classes_is_refused(cifar, tmp_path, text):
    write_packed(tmp_path)
    (tmp_path / "classes.json").write_text(text, encoding="utf-8")
    assert "classes.json" in refusal(cifar, tmp_path)


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_an_empty_class_is_refused(cifar, tmp_path, packed):
    root = tmp_path / "insects"
    write_tree(root)
    for split in ("train", "test"):
        (root / split / "wasp").mkdir()
    (root / "test" / "wasp" / "1.png").write_bytes(png(pixels(1)[0]))
    path = zip_folder(root, tmp_path / "insects.zip") if packed else root
    message = refusal(cifar, path)
    assert "wasp" in message
    assert "train" in message


def test_classes_that_differ_between_splits_are_named(cifar, tmp_path):
    write_tree(tmp_path, classes=("ant", "bee", "wasp"), splits=("train",))
    write_tree(tmp_path, classes=("ant", "bee", "moth"), splits=("val",))
    message = refusal(cifar, tmp_path)
    assert "moth" in message
    assert "wasp" in message


def test_a_missing_split_is_refused(cifar, tmp_path):
    write_tree(tmp_path / "tree", splits=("train",))
    path = zip_folder(tmp_path / "tree", tmp_path / "half.zip")
    assert "val/<class>/" in refusal(cifar, path)


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_one_percent_of_unreadable_images_is_skipped_and_more_is_refused(cifar, tmp_path, packed):
    root = tmp_path / "insects"
    written = write_tree(root, n=75, splits=("train",))["train"]
    write_tree(root, n=25, splits=("val",))  # 200 in all

    def read():
        return load(cifar, zip_folder(root, tmp_path / "insects.zip") if packed else root)

    (root / "train" / "ant" / "0003.png").write_bytes(b"")
    (root / "train" / "bee" / "0100.png").write_bytes(png(written[100])[:60])
    data, notices = read()
    assert data.unreadable == ["train/ant/0003.png", "train/bee/0100.png"]
    assert np.array_equal(data.train_images, np.delete(written, [3, 100], axis=0))
    assert np.bincount(data.train_labels).tolist() == [74, 74]
    assert len(notices) == 1
    assert "2 unreadable" in notices[0]

    (root / "val" / "ant" / "0000.png").write_bytes(b"GIF89a, or so it says")
    with pytest.raises(cifar.BadInput, match=r"3 of 200 images are unreadable, .*train/ant/0003\.png"):
        read()


def test_a_damaged_member_of_a_whole_zip_counts_as_one_unreadable_image(cifar, tmp_path):
    write_tree(tmp_path / "tree", n=60)
    path = zip_folder(tmp_path / "tree", tmp_path / "insects.zip")
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("train/ant/0007.png")
    raw = bytearray(path.read_bytes())
    middle = member.header_offset + 30 + len(member.filename) + member.compress_size // 2
    raw[middle : middle + 8] = bytes(byte ^ 0xFF for byte in raw[middle : middle + 8])
    path.write_bytes(raw)
    data, _ = load(cifar, path)
    assert data.unreadable == ["train/ant/0007.png"]


def test_a_class_that_loses_its_only_image_is_refused(cifar, tmp_path):
    write_tree(tmp_path, n=100)
    for split in ("train", "test"):
        (tmp_path / split / "wasp").mkdir()
        (tmp_path / split / "wasp" / "1.png").write_bytes(
            b"broken" if split == "train" else png(pixels(1)[0])
        )
    assert "wasp" in refusal(cifar, tmp_path)


# Where CIFAR-10 is looked for


@pytest.mark.parametrize("choice", ["auto", "cifar10"])
@pytest.mark.parametrize("place", ["slug", "datasets/owner/slug", "datasets/owner/slug/inner"])
def test_kaggle_inputs_are_searched_in_both_places(cifar, tmp_path, choice, place):
    write_packed(cifar.KAGGLE_INPUT / "another-set", classes=("ant", "bee"))
    write_tree(cifar.KAGGLE_INPUT / "insects")
    write_batches(cifar.KAGGLE_INPUT / place / "cifar-10-batches-py")
    data, _ = load(cifar, choice, tmp_path / "data")
    assert (data.name, data.synthetic, len(data.train_images)) == ("cifar10", False, 100)
    assert place in data.source


def test_cifar10_is_known_by_its_classes_in_any_packing(cifar, tmp_path):
    write_tree(tmp_path / "a" / "tree", classes=NAMES, n=1)
    write_packed(tmp_path / "b" / "packed", classes=NAMES)
    (tmp_path / "c").mkdir()
    zip_folder(tmp_path / "a" / "tree", tmp_path / "c" / "CIFAR10.zip")
    for folder in "abc":
        data, _ = load(cifar, "cifar10", tmp_path / folder)
        assert (data.name, data.classes) == ("cifar10", NAMES)


def test_the_data_folder_comes_before_kaggle(cifar, tmp_path):
    write_batches(cifar.KAGGLE_INPUT / "slug" / "cifar-10-batches-py")
    write_batches(tmp_path / "data" / "cifar-10-batches-py")
    data, _ = load(cifar, "auto", tmp_path / "data")
    assert str(tmp_path / "data") in data.source


def test_a_search_ends_in_linked_and_deep_folders(cifar, tmp_path):
    deep = cifar.KAGGLE_INPUT / "a" / "b" / "c" / "d" / "e"
    write_batches(deep / "f" / "cifar-10-batches-py")
    (cifar.KAGGLE_INPUT / "a" / "back").symlink_to(cifar.KAGGLE_INPUT, target_is_directory=True)
    (deep / "gone").symlink_to(tmp_path / "gone")
    data, _ = load(cifar, "auto", tmp_path / "data", size=10)
    assert data.synthetic
    (cifar.KAGGLE_INPUT / "a" / "b" / "short").symlink_to(deep / "f", target_is_directory=True)
    data, _ = load(cifar, "auto", tmp_path / "data")
    assert data.name == "cifar10"


def test_a_search_reads_a_bounded_number_of_names(cifar, tmp_path, monkeypatch):
    for index in range(30):
        folder = tmp_path / "inputs" / f"set-{index}" / "cifar-10-batches-py"
        folder.mkdir(parents=True)
        (folder / "data_batch_1").touch()
    assert cifar.search(tmp_path, cifar.find_cifar10, "cifar")
    monkeypatch.setattr(cifar, "SEARCH_ENTRIES", 10)  # spent before any set is opened
    assert cifar.search(tmp_path, cifar.find_cifar10, "cifar") is None


def test_a_search_spends_nothing_on_links_back_and_class_folders(cifar, tmp_path, monkeypatch):
    for index in range(5):
        (tmp_path / f"a{index}").symlink_to(tmp_path, target_is_directory=True)
    write_tree(tmp_path / "b", classes=[f"class-{index}" for index in range(30)], n=1)
    write_batches(tmp_path / "c" / "d" / "cifar-10-batches-py")
    monkeypatch.setattr(cifar, "SEARCH_ENTRIES", 12)  # a0 to a4, b, c; train, test; d; cifar-10-batches-py
    assert cifar.search(tmp_path, cifar.find_cifar10, "cifar")


def test_auto_falls_back_to_shapes_and_says_so(cifar, tmp_path):
    data, notices = load(cifar, "auto", tmp_path / "data", size=10)
    assert (data.name, data.synthetic) == ("shapes", True)
    assert "SYNTHETIC" in notices[-1]
    assert str(tmp_path / "data") in notices[-1]


def test_a_missing_cifar10_lists_where_it_was_looked_for(cifar, tmp_path, monkeypatch):
    refused = f"http://127.0.0.1:{free_port()}/cifar-10-python.tar.gz"
    monkeypatch.setattr(cifar, "CIFAR10_MIRRORS", (refused,))
    message = refusal(cifar, "cifar10", tmp_path / "data")
    for place in (tmp_path / "data", cifar.KAGGLE_INPUT, refused, "cifar-10-python.tar.gz"):
        assert str(place) in message


# Download, from a server made for it


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def mirrors(cifar, monkeypatch):
    """A server whose mirrors differ in how they fail; `use(*kinds)` points the program at them."""
    archive = tar_bytes(batches())
    asked, outlasted, release = [], [], threading.Event()

    def hold(kind):
        if not release.wait(10):
            outlasted.append(kind)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            kind, span = self.path.strip("/"), self.headers.get("Range")
            probe = span == "bytes=0-0"
            if not probe:
                asked.append((kind, span))
            if kind == "silent":
                hold(kind)
                return
            if kind == "missing":
                self.send_error(404)
                return
            body = archive[::-1] if kind == "wrong" else archive
            start = int(span.removeprefix("bytes=").partition("-")[0]) if span and kind != "whole" else 0
            if start >= len(body):
                self.send_error(416)
                return
            end = 1 if probe and kind != "whole" else len(body)
            self.send_response(206 if span and kind != "whole" else 200)
            self.send_header("Content-Length", str(end - start))
            self.end_headers()
            with contextlib.suppress(OSError):  # the program hangs up, as it should on a slow mirror
                self.send(kind if not probe else "", body[start:end])

        def send(self, kind, body):
            if kind == "stall":
                self.wfile.write(body[: len(body) // 3])
                self.wfile.flush()
                hold(kind)
            elif kind == "crawl":
                for index in range(0, len(body), 50):
                    self.wfile.write(body[index : index + 50])
                    if release.wait(0.05):
                        return
            elif kind == "cut":
                self.wfile.write(body[: len(body) // 2])
            else:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(cifar, "CIFAR10_MD5", hashlib.md5(archive).hexdigest())
    monkeypatch.setattr(cifar, "CONNECT_SECONDS", 1.0)
    monkeypatch.setattr(cifar, "STALL_SECONDS", 0.4)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def use(*kinds):
        monkeypatch.setattr(cifar, "CIFAR10_MIRRORS", tuple(f"{address}/{kind}" for kind in kinds))

    yield SimpleNamespace(use=use, asked=asked, archive=archive)
    release.set()
    server.shutdown()
    server.server_close()
    assert not outlasted  # the program leaves a mirror that says nothing; it is not the server that gives up


def test_a_download_is_checked_kept_and_not_repeated(cifar, tmp_path, mirrors):
    mirrors.use("good")
    data, _ = load(cifar, "cifar10", tmp_path)
    assert (data.name, len(data.train_images)) == ("cifar10", 100)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["cifar-10-python.tar.gz"]
    load(cifar, "auto", tmp_path)
    assert mirrors.asked == [("good", None)]


def test_a_download_goes_on_where_it_stopped(cifar, tmp_path, mirrors):
    mirrors.use("good")
    (tmp_path / "cifar-10-python.tar.gz.part").write_bytes(mirrors.archive[:1000])
    load(cifar, "cifar10", tmp_path)
    assert mirrors.asked == [("good", "bytes=1000-")]
    assert (tmp_path / "cifar-10-python.tar.gz").read_bytes() == mirrors.archive


def test_a_complete_part_is_taken_as_it_is(cifar, tmp_path, mirrors):
    mirrors.use("good")
    (tmp_path / "cifar-10-python.tar.gz.part").write_bytes(mirrors.archive)
    load(cifar, "cifar10", tmp_path)
    assert mirrors.asked == [("good", f"bytes={len(mirrors.archive)}-")]


@pytest.mark.parametrize("rest", [b"rubbish", b"rubbish" * 100_000], ids=["short", "longer than the archive"])
def test_a_part_of_something_else_is_thrown_away(cifar, tmp_path, mirrors, rest):
    mirrors.use("good")
    (tmp_path / "cifar-10-python.tar.gz.part").write_bytes(rest)
    load(cifar, "cifar10", tmp_path)
    assert mirrors.asked == [("good", f"bytes={len(rest)}-"), ("good", None)]


def test_a_server_that_ignores_ranges_starts_again(cifar, tmp_path, mirrors):
    mirrors.use("whole")
    (tmp_path / "cifar-10-python.tar.gz.part").write_bytes(mirrors.archive[:1000])
    load(cifar, "cifar10", tmp_path)
    assert (tmp_path / "cifar-10-python.tar.gz").read_bytes() == mirrors.archive


@pytest.mark.parametrize("bad", ["wrong", "missing", "silent", "cut", "stall", "crawl"])
def test_a_bad_mirror_is_left_for_the_next(cifar, tmp_path, mirrors, bad):
    mirrors.use(bad, "good")
    data, notices = load(cifar, "auto", tmp_path)
    assert data.name == "cifar10"
    assert (tmp_path / "cifar-10-python.tar.gz").read_bytes() == mirrors.archive
    kind, span = mirrors.asked[-1]
    assert kind == "good"
    assert bool(span) == (bad in ("cut", "stall", "crawl"))  # what a slow mirror sent is not fetched again
    assert not any("SYNTHETIC" in notice for notice in notices)


@pytest.mark.parametrize("bad", ["wrong", "missing", "silent", "cut", "stall", "crawl"])
def test_auto_without_a_good_mirror_goes_on_with_shapes(cifar, tmp_path, mirrors, bad):
    mirrors.use(bad)
    data, notices = load(cifar, "auto", tmp_path, size=10)
    assert data.synthetic
    assert f"/{bad} (" in notices[-1]
    assert not (tmp_path / "cifar-10-python.tar.gz").exists()


def test_only_slow_mirrors_are_asked_twice(cifar, tmp_path, mirrors):
    mirrors.use("wrong", "cut")
    assert "/wrong (sent md5" in refusal(cifar, "cifar10", tmp_path)
    assert mirrors.asked == [("wrong", None), ("cut", None)]


def test_a_slow_mirror_serves_where_cifar10_was_asked_for(cifar, tmp_path, mirrors, monkeypatch):
    monkeypatch.setattr(cifar, "USUAL_SPEED", 1e9)
    monkeypatch.setattr(cifar, "LEAST_SPEED", 0)
    monkeypatch.setattr(cifar, "STALL_SECONDS", 1e-6)
    opener = cifar.urllib.request.urlopen
    monkeypatch.setattr(cifar.urllib.request, "urlopen", lambda asked, timeout: opener(asked, timeout=5))
    mirrors.use("good")
    data, notices = load(cifar, "cifar10", tmp_path)
    assert data.name == "cifar10"
    assert any("slower than" in notice for notice in notices)


def test_a_folder_that_cannot_be_written_is_a_reason_not_a_fault(cifar, tmp_path, mirrors):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    mirrors.use("good")
    data, notices = load(cifar, "auto", tmp_path / "file" / "data", size=10)
    assert data.synthetic
    assert "Not a directory" in notices[-1] or "not a directory" in notices[-1] or "exists" in notices[-1]


# Real data


@needs_real
def test_real_cifar10_in_part(cifar):
    data, _ = load(cifar, REAL_ZIP, size=1000)
    assert data.classes == NAMES
    assert np.bincount(data.train_labels).tolist() == [100] * 10
    assert data.val_images.shape == (10_000, 32, 32, 3)
    assert 100 < data.train_images.mean() < 140  # the published mean is 121


@pytest.mark.slow
@needs_real
def test_real_cifar10_whole(cifar):
    data, _ = load(cifar, "cifar10", REAL_ZIP.parent)
    assert data.name == "cifar10"
    assert data.train_images.shape == (50_000, 32, 32, 3)
    assert np.bincount(data.train_labels).tolist() == [5000] * 10
    assert np.bincount(data.val_labels).tolist() == [1000] * 10
    assert data.unreadable == []
