"""The photographs: what is listed, decoded and cropped, and what is refused in one sentence."""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import json
import os
import resource
import threading
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
SIDE = 16
examples = settings(
    deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="session")
def photos(imagenet):
    """The ImageNet-100 program as a module."""
    return imagenet


def real_data(name):
    """The path of real images, where this machine has them."""
    if not (DATA / name).exists():
        pytest.skip(f"no real images at {DATA / name}")
    return DATA / name


@pytest.fixture(scope="session")
def mini():
    return real_data("imagenet100-mini.zip")


@pytest.fixture(scope="session")
def full():
    return real_data("imagenet-fullsize-200.zip")


@pytest.fixture(autouse=True)
def no_outside(photos, monkeypatch, tmp_path):
    """No test reads this machine's Kaggle inputs."""
    monkeypatch.setattr(photos, "KAGGLE_INPUT", tmp_path / "no-kaggle")


# --- making things ---


def picture(seed=0, height=48, width=64):
    """A smooth colour picture, uint8 [height, width, 3], that survives JPEG; no symmetry."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encoded(pixels, kind="JPEG", **how):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 95, "subsampling": 0} if kind == "JPEG" else {}) | how)
    return buffer.getvalue()


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


JPEG = encoded(picture())


def write_tree(root, names):
    for name in names:
        put(root / name, JPEG)
    return root


def split_tree(root, classes=("ant", "bee"), n=3, splits=("train", "val")):
    return write_tree(root, [f"{s}/{c}/{i}.jpg" for s in splits for c in classes for i in range(n)])


def zipped(folder, target, prefix=""):
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, prefix + path.relative_to(folder).as_posix())
    return target


def write_packed(folder, side=20, classes=("ant", "bee"), n=8, **changes):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    arrays = {
        "train_images": rng.integers(0, 256, (n, side, side, 3), dtype=np.uint8),
        "train_labels": np.arange(n) % 2,
        "val_images": rng.integers(0, 256, (4, side, side, 3), dtype=np.uint8),
        "val_labels": np.arange(4) % 2,
    } | changes
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    (folder / "classes.json").write_text(json.dumps(list(classes)))
    return arrays


def load(photos, data, folder="nowhere", size=0, val_fraction=0.2):
    said = []
    wanted = SimpleNamespace(data=str(data), data_dir=str(folder), train_size=size, val_fraction=val_fraction)
    found = photos.read_data(wanted, said.append)
    return found, said


def refusal(photos, call, *args, **kwargs):
    """The one sentence that a call is refused with."""
    with pytest.raises(photos.BadInput) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    return message


def whole(width, height):
    return 0, 0, width, height


def decoder(photos, side=SIDE, box=whole):
    return functools.partial(photos.decode, side=side, box=box)


def expected(pixels, side=SIDE):
    """The whole picture resized by PIL, as float."""
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR)).astype(float)


def apart(a, b):
    return np.abs(np.asarray(a, dtype=float) - b).mean()


# --- listing ---


KAGGLE = ["train.X1/n00000002/a.JPEG", "train.X1/n00000002/b.JPEG", "train.X2/n00000001/c.JPEG"]
KAGGLE += ["val.X/n00000001/d.JPEG", "val.X/n00000002/e.JPEG"]


@pytest.mark.parametrize("deep", ["", "imagenet100/"])
@pytest.mark.parametrize("as_zip", [False, True])
def test_kaggles_parts_share_one_class_index(photos, tmp_path, as_zip, deep):
    titles = {"n00000001": "crane, bird", "n00000002": "crane"}
    root = tmp_path / "root"
    write_tree(root, [deep + name for name in KAGGLE])
    put(root / f"{deep}Labels.json", json.dumps(titles).encode())
    put(root / f"{deep}train.X1/n00000002/notes.txt", b"no image")
    put(root / f"{deep}train.X1/n00000002/._a.JPEG", b"what a Mac leaves")
    write_tree(root, ["__MACOSX/train/x/1.jpg", f"{deep}.cache/train/x/1.jpg"])
    path = zipped(root, tmp_path / "r.zip") if as_zip else root
    listing = photos.list_images(path)
    assert listing.keys == ["n00000001", "n00000002"]
    assert listing.classes == ["crane (n00000001)", "crane (n00000002)"]
    names, labels = listing.splits["train"]
    assert names == [deep + name for name in (KAGGLE[2], KAGGLE[0], KAGGLE[1])]
    assert (labels.tolist(), labels.dtype) == ([0, 1, 1], np.int64)
    assert listing.splits["val"][1].tolist() == [0, 1]
    with photos.Files(path) as files:
        assert files.read(names[0]) == JPEG


@pytest.mark.parametrize("val", ["val", "test"])
@pytest.mark.parametrize("deep", ["", "photos/"])
@pytest.mark.parametrize("as_zip", [False, True])
def test_train_beside_val_or_test(photos, tmp_path, val, deep, as_zip):
    split_tree(tmp_path / "root" / deep, splits=("train", val))
    path = zipped(tmp_path / "root", tmp_path / "r.zip") if as_zip else tmp_path / "root"
    listing = photos.list_images(path)
    assert listing.classes == listing.keys == ["ant", "bee"]
    assert listing.splits["val"][0] == [f"{deep}{val}/{c}/{i}.jpg" for c in ("ant", "bee") for i in range(3)]


@pytest.mark.parametrize("deep", ["", "train/", "photos/"])
@pytest.mark.parametrize("as_zip", [False, True])
def test_a_single_folder_of_classes_is_split_by_class(photos, tmp_path, deep, as_zip):
    root = write_tree(
        tmp_path / "root", [f"{deep}{c}/{i}.jpg" for c, n in (("a", 10), ("b", 2)) for i in range(n)]
    )
    path = zipped(root, tmp_path / "r.zip") if as_zip else root
    splits = photos.list_images(path, 0.3).splits
    assert np.bincount(splits["train"][1]).tolist() == [7, 1]
    assert np.bincount(splits["val"][1]).tolist() == [3, 1]
    both = splits["train"][0] + splits["val"][0]
    assert sorted(both) == sorted(f"{deep}{c}/{i}.jpg" for c, n in (("a", 10), ("b", 2)) for i in range(n))
    assert photos.list_images(path, 0.3).splits["val"][0] == splits["val"][0]


@examples
@given(counts=st.lists(st.integers(2, 30), min_size=2, max_size=5), fraction=st.floats(0.01, 0.99))
def test_every_class_keeps_an_image_on_each_side(photos, counts, fraction):
    images = {str(key): [f"{key}/{i}" for i in range(n)] for key, n in enumerate(counts)}
    splits = photos.divide(Path("x"), images, fraction)
    for key, names in images.items():
        assert splits["train"][key]
        assert splits["val"][key]
        assert sorted(splits["train"][key] + splits["val"][key]) == sorted(names)
        assert abs(len(splits["val"][key]) - fraction * len(names)) <= 1


def test_links_are_followed_and_cycles_end(photos, tmp_path):
    split_tree(tmp_path / "real")
    root = tmp_path / "root"
    root.mkdir()
    (root / "train").symlink_to(tmp_path / "real" / "train")
    (root / "val").symlink_to(tmp_path / "real" / "val")
    (tmp_path / "real" / "train" / "ant" / "back").symlink_to(root)
    assert len(photos.list_images(root).splits["train"][0]) == 6


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg"], ["class b", "only one of train and val"]),
        (["train/a/1.jpg", "train/b/1.txt", "val/a/1.jpg", "val/b/1.jpg"], ["class b", "no image in train"]),
        (["train/a/1.jpg", "train/b/1.jpg", "val/a/1.txt", "val/b/1.jpg"], ["class a", "no image in val"]),
        (["train/a/1.jpg", "val/a/1.jpg"], ["only class is a", "two or more"]),
        (["a/1.jpg", "b/1.jpg", "b/2.jpg"], ["class a", "one image"]),
        (["a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg", "c/readme.md"], ["class c", "no image"]),
        (["1.jpg", "2.jpg"], ["no known form", "train/<class>/"]),
    ],
)
@pytest.mark.parametrize("as_zip", [False, True])
def test_refused_layouts_are_named(photos, tmp_path, names, words, as_zip):
    root = write_tree(tmp_path / "root", names)
    path = zipped(root, tmp_path / "r.zip") if as_zip else root
    message = refusal(photos, photos.list_images, path)
    assert all(word in message for word in [str(path), *words])


def test_other_refusals_are_named(photos, tmp_path):
    tree = split_tree(tmp_path / "tree")
    put(tmp_path / "bad.zip", b"PK no zip")
    assert "whole .zip" in refusal(photos, load, photos, tmp_path / "bad.zip")
    assert "no such path" in refusal(photos, load, photos, tmp_path / "absent")
    assert "no folder and no .zip" in refusal(photos, load, photos, put(tmp_path / "x.txt", b""))
    assert "val-fraction 1.5" in refusal(photos, photos.list_images, tree / "train", 1.5)
    put(tree / "Labels.json", b"[1, 2]")
    assert "Labels.json" in refusal(photos, photos.list_images, tree)
    put(tree / "Labels.json", b"{")
    assert "Labels.json" in refusal(photos, photos.list_images, tree)


def test_a_folder_that_may_not_be_read_is_named(photos, tmp_path):
    folder = split_tree(tmp_path / "tree") / "train" / "ant"
    folder.chmod(0)
    if os.access(folder, os.R_OK):
        pytest.skip("this user may read everything")
    message = refusal(photos, photos.list_images, tmp_path / "tree")
    folder.chmod(0o755)
    assert "cannot be read" in message
    assert str(folder) in message


def test_the_small_imagenet(photos, mini):
    listing = photos.list_images(mini)
    assert len(listing.keys) == len(set(listing.classes)) == 100
    assert listing.classes[0] == "goldfish"
    assert np.bincount(listing.splits["train"][1]).tolist() == [250] * 100
    assert np.bincount(listing.splits["val"][1]).tolist() == [50] * 100
    names, labels = listing.splits["train"]
    assert all(listing.keys[label] in name for name, label in zip(names, labels, strict=True))


# --- loading ---


def test_a_path_of_photographs_is_loaded(photos, tmp_path):
    root = split_tree(tmp_path / "My.Photos", n=5)
    data, _ = load(photos, root, size=4)
    assert (data.synthetic, data.classes, data.keys) == (False, ["ant", "bee"], ["ant", "bee"])
    assert len(data.train_images) == len(data.train_labels) == 4
    assert np.bincount(data.train_labels).tolist() == [2, 2]
    for name, label in zip(data.train_images.names, data.train_labels, strict=True):
        assert f"/{data.keys[label]}/" in name
    assert len(data.val_images) == 10
    assert "train-size 1" in refusal(photos, load, photos, root, size=1)


@pytest.mark.parametrize("deep", ["", "inner"])
def test_packed_arrays_are_mapped(photos, tmp_path, deep):
    arrays = write_packed(tmp_path / "packed" / deep)
    data, _ = load(photos, tmp_path / "packed")
    assert isinstance(data.train_images, np.memmap)
    assert (data.train_images == arrays["train_images"]).all()
    assert (data.val_labels.dtype, data.val_labels.tolist()) == (np.int64, [0, 1, 0, 1])
    data, _ = load(photos, tmp_path / "packed", size=4)
    picked = [
        np.flatnonzero((arrays["train_images"] == image).all((1, 2, 3)))[0] for image in data.train_images
    ]
    assert (arrays["train_labels"][picked] == data.train_labels).all()
    assert np.bincount(data.train_labels).tolist() == [2, 2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train_images": np.zeros((8, 20, 24, 3), np.uint8)}, ["[8, 20, 24, 3]", "uint8 [N, S, S, 3]"]),
        ({"train_images": np.zeros((8, 20, 20, 3), np.float32)}, ["float32", "uint8"]),
        ({"val_images": np.zeros(4, np.uint8)}, ["[4]", "uint8 [N, S, S, 3]"]),
        ({"val_labels": np.zeros(4)}, ["float64", "int64"]),
        ({"train_labels": np.zeros(7, np.int64)}, ["[7]"]),
        ({"val_labels": np.array([0, 1, 2, 0])}, ["from 0 to 2", "2 classes"]),
    ],
)
def test_wrong_packed_arrays_are_refused(photos, tmp_path, changes, words):
    write_packed(tmp_path / "packed", **changes)
    message = refusal(photos, load, photos, tmp_path / "packed")
    assert all(word in message for word in words)


@pytest.mark.parametrize(
    "train, val", [("Training", "Testing"), ("Train", "Test"), ("train", "valid"), ("TRAIN", "validation")]
)
def test_splits_are_known_by_their_usual_names(photos, tmp_path, train, val):
    for folder, count in ((train, 6), (val, 2)):
        for key in ("ant", "bee"):
            for index in range(count):
                put(tmp_path / folder / key / f"{index}.jpg", encoded(picture(index)))
    data, _ = load(photos, tmp_path)
    assert (len(data.train_labels), len(data.val_labels)) == (12, 4)


def test_two_folders_of_classes_that_are_no_splits_are_refused(photos, tmp_path):
    for folder in ("first", "second"):
        for key in ("ant", "bee"):
            for index in range(3):
                put(tmp_path / folder / key / f"{index}.jpg", encoded(picture(index)))
    message = refusal(photos, load, photos, tmp_path)
    assert "first, second" in message
    assert load(photos, tmp_path / "first")[0].classes == ["ant", "bee"]


@pytest.mark.parametrize("prefix", ["", "deep/"])
def test_packed_arrays_in_a_zip_are_read_whole_up_to_a_limit(photos, tmp_path, monkeypatch, prefix):
    arrays = write_packed(tmp_path / "packed")
    path = zipped(tmp_path / "packed", tmp_path / "p.zip", prefix)
    data, _ = load(photos, path)
    assert np.array_equal(data.train_images, arrays["train_images"])
    assert data.name == "p"
    monkeypatch.setattr(photos, "LARGEST_UNZIPPED", 1000)
    message = refusal(photos, load, photos, path)
    assert "inside a .zip" in message
    assert "unpack" in message


def test_missing_and_damaged_packed_arrays_are_refused(photos, tmp_path):
    write_packed(tmp_path / "packed")
    whole_file = (tmp_path / "packed" / "val_images.npy").read_bytes()
    put(tmp_path / "packed" / "val_images.npy", whole_file[:-1])
    assert "val_images.npy: expected a whole array" in refusal(photos, load, photos, tmp_path / "packed")
    (tmp_path / "packed" / "val_images.npy").unlink()
    assert "val_images.npy" in refusal(photos, load, photos, tmp_path / "packed")


def test_shapes_are_drawn(photos):
    data, _ = load(photos, "shapes", size=20)
    assert data.synthetic
    assert len(data.train_images) == 20


HUNDRED = [f"train.X{1 + i // 25}/n{i:08d}/a.jpg" for i in range(100)]
HUNDRED += [f"val.X/n{i:08d}/a.jpg" for i in range(100)]


@pytest.mark.parametrize(
    "mount", ["imagenet100", "datasets/ambityga/imagenet100", "x.zip of imagenet100.zip"]
)
@pytest.mark.parametrize("named", ["auto", "imagenet100"])
def test_imagenet_is_found_among_kaggles_inputs(photos, tmp_path, monkeypatch, mount, named):
    kaggle = tmp_path / "kaggle"
    split_tree(kaggle / "pets" / "animals", ("cat", "dog"))
    if " of " in mount:
        tree = write_tree(tmp_path / "tree", HUNDRED)
        zipped(tree, kaggle / "imagenet100.zip")
    else:
        write_tree(kaggle / mount, HUNDRED)
    monkeypatch.setattr(photos, "KAGGLE_INPUT", kaggle)
    data, said = load(photos, named, tmp_path / "empty")
    assert data.keys == [f"n{index:08d}" for index in range(100)]
    assert data.name == "imagenet100"
    assert said


def test_auto_takes_a_folder_of_classes_in_data_dir_and_imagenet_does_not(photos, tmp_path):
    folder = write_tree(tmp_path / "mine", [f"{c}/{i}.jpg" for c in "ab" for i in range(3)])
    assert load(photos, "auto", folder)[0].classes == ["a", "b"]
    message = refusal(photos, load, photos, "imagenet100", folder)
    for word in (
        str(folder),
        str(photos.KAGGLE_INPUT),
        "ambityga/imagenet100",
        "python -m data_setup imagenet100",
    ):
        assert word in message
    assert "--data auto" in refusal(photos, load, photos, "auto", tmp_path / "empty")


# --- boxes ---


@examples
@given(
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    seed=st.integers(0, 9),
    sample=st.integers(0, 10**7),
)
def test_boxes_lie_in_the_picture(photos, width, height, seed, sample):
    draws = photos.uniforms(seed, 3, np.array([sample]), photos.DRAWS)[0]
    left, top, right, bottom = photos.random_box(width, height, draws)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    for share, box in ((7 / 8, photos.centre_box(width, height)), (1, photos.centre_box(width, height, 1))):
        left, top, right, bottom = box
        assert right - left == pytest.approx(share * min(width, height))
        assert bottom - top == pytest.approx(share * min(width, height))
        assert left == pytest.approx(width - right)
        assert top == pytest.approx(height - bottom)


def test_random_boxes_spread_as_torchvisions(photos):
    draws = photos.uniforms(0, 0, np.arange(4000), photos.DRAWS)
    left, top, right, bottom = np.array([photos.random_box(1000, 1000, row) for row in draws]).T
    area, ratio = (right - left) * (bottom - top) / 1e6, (right - left) / (bottom - top)
    assert 0.08 <= area.min() < 0.09
    assert 0.95 < area.max() <= 1.0
    assert 3 / 4 - 0.01 < ratio.min() < 0.77
    assert 1.3 < ratio.max() < 4 / 3 + 0.01
    assert abs(np.log(ratio).mean()) < 0.01  # as often wide as tall
    assert abs((left + right).mean() - 1000) < 15
    from torchvision.transforms import RandomResizedCrop

    blank = torch.empty(3, 1000, 1000)
    torch.manual_seed(0)
    theirs = [RandomResizedCrop.get_params(blank, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
    theirs = np.array([h * w for _, _, h, w in theirs]) / 1e6
    assert np.abs(np.quantile(area, [0.1, 0.5, 0.9]) - np.quantile(theirs, [0.1, 0.5, 0.9])).max() < 0.03


@pytest.mark.parametrize(("size", "box"), [((900, 30), (430, 0, 470, 30)), ((30, 900), (0, 430, 30, 470))])
def test_a_picture_no_try_fits_gives_its_middle(photos, size, box):
    draws = np.full(photos.DRAWS, 0.99)
    assert photos.random_box(*size, draws) == box


# --- the hash ---


@examples
@given(
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 10**6),
    sample=st.integers(0, 10**9),
    count=st.integers(1, 40),
)
def test_uniforms_depend_on_seed_epoch_and_sample_alone(photos, seed, epoch, sample, count):
    ids = np.array([sample, sample + 1, sample])
    draws = photos.uniforms(seed, epoch, ids, count)
    assert (draws.shape, draws.dtype) == ((3, count), np.float64)
    assert (draws >= 0).all()
    assert (draws < 1).all()
    assert (draws[0] == draws[2]).all()
    others = [
        photos.uniforms(seed + 1, epoch, ids[:1], count),
        photos.uniforms(seed, epoch + 1, ids[:1], count),
    ]
    for other in (*others, draws[1:2]):
        assert (other[0] != draws[0]).all()
    assert (photos.uniforms(seed, epoch, ids[1:], 40)[0, :count] == draws[1]).all()


def test_uniforms_are_uniform_and_uncorrelated(photos):
    draws = photos.uniforms(0, 0, np.arange(20_000), 4)
    assert np.abs(np.histogram(draws, 20, (0, 1))[0] / draws.size - 0.05).max() < 0.003
    assert np.abs(np.corrcoef(draws.T) - np.eye(4)).max() < 0.03
    next_epoch = photos.uniforms(0, 1, np.arange(20_000), 4)
    assert abs(np.corrcoef(draws[:, 0], next_epoch[:, 0])[0, 1]) < 0.03
    assert abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 0.03


# --- decoding ---


def test_what_is_decoded_is_the_box(photos):
    pixels = picture(1, 60, 90)
    box = lambda width, height: (10, 20, 50, 45)  # noqa: E731
    for raw, near in ((encoded(pixels), 2), (encoded(pixels, "PNG"), 0.6)):
        assert apart(photos.decode(raw, SIDE, box), expected(pixels[20:45, 10:50])) < near
    assert apart(photos.crop(pixels, SIDE, box), expected(pixels[20:45, 10:50])) < 0.6
    assert photos.crop(pixels, SIDE, box).dtype == np.uint8


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 2])
def test_decoding_less_changes_nothing_that_shows(photos, progressive, subsampling):
    pixels = picture(2, 403, 517)
    raw = encoded(pixels, progressive=progressive, subsampling=subsampling)
    right = np.asarray(Image.open(io.BytesIO(raw)))
    draws = photos.uniforms(0, 0, np.arange(40), photos.DRAWS)
    for side in (16, 96):
        for row in draws:
            left, top, r, b = photos.random_box(517, 403, row)
            got = photos.decode(raw, side, functools.partial(photos.random_box, draws=row))
            assert apart(got, expected(right[top:b, left:r], side)) < 1


def test_real_photographs_are_decoded_as_pil_does(photos, full):
    with photos.Files(full) as files, zipfile.ZipFile(full) as archive:
        names = archive.namelist()[::8]
        draws = photos.uniforms(1, 2, np.arange(len(names)), photos.DRAWS)
        for name, row in zip(names, draws, strict=True):
            right = Image.open(io.BytesIO(files.read(name))).convert("RGB")
            part = np.asarray(right.crop(photos.random_box(*right.size, row)))
            got = photos.decode(files.read(name), 96, functools.partial(photos.random_box, draws=row))
            assert apart(got, expected(part, 96)) < 6, name


def test_only_as_much_of_a_large_jpeg_is_decoded_as_is_needed(photos, monkeypatch):
    raw = encoded(picture(0, 1600, 1600))
    sizes = []
    load = photos.JpegImageFile.load
    monkeypatch.setattr(photos.JpegImageFile, "load", lambda self: (sizes.append(self.size), load(self))[1])
    photos.decode(raw, 100, whole)
    photos.decode(raw, 100, lambda w, h: (0, 0, 200, 200))
    assert sizes[0] == (200, 200)
    assert sizes[-1][0] == 800
    assert sizes[-1][1] <= 110


def test_every_colour_mode_is_read(photos):
    pixels = picture(3)
    right = expected(pixels)
    image = Image.fromarray(pixels)
    assert apart(photos.decode(encoded(image.convert("CMYK"), subsampling=0), SIDE, whole), right) < 4
    assert apart(photos.decode(encoded(image.convert("RGBA"), "PNG"), SIDE, whole), right) < 1
    palette = image.quantize(128)
    looked_up = expected(np.asarray(palette.convert("RGB")))
    clear = {"transparency": bytes([0, 100, 255] * 20)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for how in ({}, clear, {"transparency": 3}):
            assert apart(photos.decode(encoded(palette, "PNG", **how), SIDE, whole), looked_up) < 1
    grey = image.convert("L")
    grey_right = expected(np.asarray(grey.convert("RGB")))
    for other in (grey, grey.convert("LA")):
        got = photos.decode(encoded(other, "PNG"), SIDE, whole)
        assert got.shape == (SIDE, SIDE, 3)
        assert apart(got, grey_right) < 1
    assert apart(photos.decode(encoded(grey), SIDE, whole), grey_right) < 3
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert apart(photos.decode(encoded(deep, "PNG"), SIDE, whole), grey_right) < 1
    assert apart(photos.decode(encoded(image, "BMP"), SIDE, whole), right) < 1
    one_bit = photos.decode(encoded(grey.convert("1"), "PNG"), SIDE, whole)
    assert 50 < one_bit.mean() < 220


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_picture(photos, kind):
    frames = [Image.fromarray(picture(seed)) for seed in (4, 5, 6)]
    how = {"lossless": True} if kind == "WEBP" else {}
    raw = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **how)
    near = 12 if kind == "GIF" else 1
    assert apart(photos.decode(raw, SIDE, whole), expected(np.asarray(frames[0]))) < near


TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("side", [8, 40])
def test_pictures_are_turned_upright_before_the_box_is_drawn(photos, turn, kind, side):
    upright = Image.fromarray(picture(7, 96, 160))
    exif = Image.Exif()
    exif[0x112] = turn
    how = {"lossless": True} if kind == "WEBP" else {}
    raw = encoded(upright.transpose(TURNS[turn]), kind, exif=exif.tobytes(), **how)
    asked = []

    def box(width, height):
        asked.append((width, height))
        return 16, 24, 112, 80

    got = photos.decode(raw, side, box)
    assert asked == [(160, 96)]
    assert apart(got, expected(np.asarray(upright)[24:80, 16:112], side)) < 3


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"MM",
        b"Exif\0\0MM\0*\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(20),
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12",
        b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0",
    ],
)
def test_broken_exif_is_ignored(photos, exif):
    raw = encoded(picture(), exif=exif) if exif else JPEG
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (photos.decode(raw, SIDE, whole) == photos.decode(JPEG, SIDE, whole)).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (3, 500), (500, 3)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_tiny_and_thin_pictures_work(photos, size, kind):
    raw = encoded(np.full((size[1], size[0], 3), 200, np.uint8), kind)
    draws = photos.uniforms(0, 0, np.arange(20), photos.DRAWS)
    boxes = [functools.partial(photos.random_box, draws=row) for row in draws]
    for box in (*boxes, photos.centre_box, whole):
        got = photos.decode(raw, SIDE, box)
        assert got.shape == (SIDE, SIDE, 3)
        assert np.abs(got.astype(int) - 200).max() <= 3


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.7, 0.99, 1.0])
def test_a_truncated_jpeg_is_unreadable_whatever_the_crop(photos, share, progressive):
    raw = encoded(picture(8, 300, 400), progressive=progressive)
    cut = raw[: min(int(share * len(raw)), len(raw) - 1)]
    for box in (whole, lambda width, height: (0, 0, 20, 20)):
        with pytest.raises(photos.UNREADABLE):
            photos.decode(cut, SIDE, box)
        with pytest.raises(photos.UNREADABLE):
            photos.decode(cut + bytes(1000), SIDE, box)
    assert photos.decode(raw + bytes(1000), SIDE, whole).shape == (SIDE, SIDE, 3)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "BMP"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9])
def test_other_truncated_pictures_are_unreadable(photos, kind, share):
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    raw = encoded(noise, kind)
    with pytest.raises(photos.UNREADABLE):
        photos.decode(raw[: int(share * len(raw))], SIDE, whole)


@examples
@given(data=st.data(), kind=st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "BMP"]))
def test_damage_gives_a_picture_or_unreadable_and_nothing_else(photos, data, kind):
    raw = bytearray(encoded(picture(), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, min(len(raw) - 1, 700)))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(photos.UNREADABLE):
            assert photos.decode(bytes(raw), SIDE, photos.centre_box).shape == (SIDE, SIDE, 3)


def test_a_huge_picture_is_unreadable_and_nothing_is_printed(photos):
    raw = bytearray(encoded(np.zeros((8, 8, 3), np.uint8), "PNG"))
    import struct
    import zlib

    raw[16:24] = struct.pack(">II", 12_000, 12_000)
    raw[29:33] = struct.pack(">I", zlib.crc32(raw[12:29]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(photos.UNREADABLE, match="12000x12000"):
            photos.decode(bytes(raw), SIDE, whole)


def test_a_frame_larger_than_its_picture_is_unreadable(photos):
    raw = bytearray(encoded(Image.fromarray(picture()).convert("L"), "GIF"))
    at = raw.index(b",\0\0\0\0", 13)  # the first frame: left, top, width, height
    raw[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    with pytest.raises(photos.UNREADABLE):
        photos.decode(bytes(raw), SIDE, whole)


# --- files ---


def test_files_too_large_or_absent_are_refused(photos, tmp_path, monkeypatch):
    put(tmp_path / "f" / "a.jpg", JPEG)
    monkeypatch.setattr(photos, "LARGEST_FILE", len(JPEG) - 1)
    for root in (tmp_path / "f", zipped(tmp_path / "f", tmp_path / "f.zip")):
        with photos.Files(root) as files:
            with pytest.raises(ValueError, match=f"{len(JPEG)} bytes"):
                files.read("a.jpg")
            with pytest.raises(photos.UNREADABLE):
                files.read("b.jpg")


# --- plain pictures ---


def test_plain_pictures_are_the_centre_square_and_grey_where_unreadable(photos, tmp_path):
    pixels = picture(9, 96, 200)
    put(tmp_path / "a.png", encoded(pixels, "PNG"))
    put(tmp_path / "b.png", b"")
    plain = photos.Photos(photos.Files(tmp_path), ["a.png", "b.png", "a.png"])
    size = photos.PICTURE
    assert len(plain) == 3
    assert plain[0].shape == (size, size, 3)
    assert plain[np.array([1, 2])].shape == (2, size, size, 3)
    assert apart(plain[-1], expected(pixels[:, 52:148], size)) < 1
    assert (plain[np.array([1])] == 128).all()


# --- crops, batch by batch ---


@pytest.fixture(scope="session")
def shelf(tmp_path_factory):
    """A folder of 30 photographs and their names."""
    folder = tmp_path_factory.mktemp("shelf")
    names = [f"{index:03}.jpg" for index in range(30)]
    for index, name in enumerate(names):
        put(folder / name, encoded(picture(index, 60 + index, 90)))
    return folder, names


def as_is(pictures, generator):
    return pictures


def source(photos, shelf, workers=2, draw=True, names=None, images=None, view=as_is, batch_size=8, side=SIDE):
    folder, all_names = shelf
    if images is None:
        images = photos.Photos(photos.Files(folder), list(names or all_names))
    return photos.CropSource(
        images, np.arange(len(images)) % 10, torch.device("cpu"), batch_size, side, view, workers, draw
    )


def collected(made, order, size):
    """{sample: its crop} after streaming `order` in batches of `size`; checks order and labels."""
    crops, seen = {}, []
    for rows, views, labels in made.stream(order.split(size)):
        assert (labels == rows % 10).all()
        seen.append(rows)
        crops |= {int(row): view.clone() for row, view in zip(rows, views, strict=True)}
    assert torch.equal(torch.cat(seen), order)
    return crops


@pytest.mark.parametrize("packed", [False, True])
def test_crops_are_the_same_for_any_workers_order_and_batch_size(photos, shelf, packed):
    images = np.stack([picture(seed, 40, 40) for seed in range(30)]) if packed else None
    first = collected(source(photos, shelf, 1, images=images), torch.arange(30), 8)
    for workers, size, seed in ((2, 8, 1), (5, 3, 2), (3, 30, 3)):
        order = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
        again = collected(source(photos, shelf, workers, images=images), order, size)
        assert all(torch.equal(first[index], again[index]) for index in range(30))


def test_crops_follow_the_moment(photos, shelf):
    made = source(photos, shelf)
    crops = {}
    for moment in ((0, 0), (0, 1), (1, 0), (0, 0)):
        made.moment = moment
        crop = torch.stack(list(collected(made, torch.arange(30), 8).values()))
        if moment in crops:
            assert torch.equal(crops[moment], crop)
        crops[moment] = crop
    assert all((crops[0, 0] != crops[other]).flatten(1).any(1).all() for other in ((0, 1), (1, 0)))
    made.draw = False
    centre = collected(made, torch.arange(30), 8)
    folder, names = shelf
    for index in (0, 29):
        right = photos.decode((folder / names[index]).read_bytes(), SIDE, photos.centre_box)
        assert (centre[index].numpy() == right).all()


def test_views_take_the_generator_in_the_callers_thread_and_in_order(photos, shelf):
    threads = set()

    def view(pictures, generator):
        threads.add(threading.get_ident())
        return torch.rand(len(pictures), generator=generator)

    drawn = []
    for workers in (1, 4):
        made = source(photos, shelf, workers, view=view)
        made.generator.manual_seed(5)
        drawn.append(torch.cat([views for _, views, _ in made.stream(torch.arange(30).split(4))]))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0][:4], torch.rand(4, generator=torch.Generator().manual_seed(5)))
    assert threads == {threading.get_ident()}


def test_batches_are_asked_for_at_most_a_chunk_ahead_in_the_callers_thread(photos, shelf):
    asked, ahead = [], []

    def batches():
        for batch in torch.arange(30).split(2):
            asked.append(threading.get_ident())
            yield batch

    for count, _ in enumerate(source(photos, shelf).stream(batches()), 1):
        ahead.append(len(asked) - count)
    assert set(asked) == {threading.get_ident()}
    assert max(ahead) == photos.AHEAD == 4
    assert ahead[-1] == 0


def busy_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("decode")]


@pytest.mark.parametrize(
    "end", ["close", "exception in the gate", "exception in the view", "too many unreadable"]
)
def test_a_stream_that_ends_early_leaves_no_thread(photos, shelf, end, tmp_path):
    def batches():
        for number, batch in enumerate(torch.arange(30).split(2)):
            if number == 6 and end == "exception in the gate":
                raise KeyboardInterrupt
            yield batch

    def view(pictures, generator):
        if end == "exception in the view":
            raise KeyboardInterrupt
        return pictures

    made = source(photos, shelf, 3, view=view)
    if end == "too many unreadable":
        made.images.names[5] = "absent.jpg"
    stream = made.stream(batches())
    if end == "close":
        next(stream)
        assert busy_threads()
        stream.close()
    else:
        with pytest.raises((KeyboardInterrupt, photos.BadInput)):
            list(stream)
    assert not busy_threads()
    in_order = source(photos, shelf, 3).in_order()
    next(in_order)
    in_order.close()
    assert not busy_threads()


def shelf_with(photos, shelf, copies, bad):
    """A source of `copies` times the shelf, in which the samples in `bad` are text named .jpg."""
    folder, names = shelf
    put(folder / "text.jpg", b"no picture at all")
    names = names * copies
    for index in bad:
        names[index] = "text.jpg"
    return source(photos, shelf, names=names)


def test_an_unreadable_sample_is_left_out_and_recorded(photos, shelf):
    made = shelf_with(photos, shelf, 10, [17, 40, 41])
    batches = [torch.arange(10, 20), torch.tensor([40, 41]), torch.arange(3)]
    rows, views, labels = zip(*made.stream(batches), strict=True)
    assert rows[0].tolist() == [10, 11, 12, 13, 14, 15, 16, 18, 19]
    assert len(views[0]) == len(labels[0]) == 9
    assert labels[0].tolist() == [index % 10 for index in rows[0].tolist()]
    assert (len(rows[1]), len(views[1])) == (0, 0)
    assert rows[2].tolist() == [0, 1, 2]
    assert sorted(made.unreadable) == [17, 40, 41]
    assert "text.jpg" in made.unreadable[17]
    assert "no JPEG" in made.unreadable[17]
    right = source(photos, shelf, names=shelf[1] * 10)
    assert torch.equal(views[0], next(right.stream([rows[0]]))[1])


def test_more_than_one_percent_unreadable_is_refused(photos, shelf):
    made = shelf_with(photos, shelf, 10, [17, 40, 41, 50])
    seen = []
    message = refusal(
        photos, lambda: [seen.append(rows) for rows, _, _ in made.stream(torch.arange(300).split(10))]
    )
    assert "4 of 300" in message
    assert "text.jpg" in message
    assert len(seen) == 5
    message = refusal(photos, lambda: list(shelf_with(photos, shelf, 10, [1, 2, 3, 4]).in_order()))
    assert "4 of 300" in message


def test_validation_is_in_order_and_decoded_once(photos, shelf, monkeypatch):
    made = shelf_with(photos, shelf, 4, [33])
    made.draw = False
    reads = []
    read = photos.Files.read
    monkeypatch.setattr(photos.Files, "read", lambda self, name: (reads.append(name), read(self, name))[1])
    first = list(made.in_order())
    assert len(reads) == 120
    labels = torch.cat([labels for _, labels in first])
    assert labels.tolist() == [index % 10 for index in range(120) if index != 33]
    again = source(photos, shelf, images=made.images, draw=False, batch_size=50)
    second = list(again.in_order())
    assert len(reads) == 120
    assert torch.equal(torch.cat([v for v, _ in first]), torch.cat([v for v, _ in second]))
    assert torch.equal(labels, torch.cat([labels for _, labels in second]))
    assert list(again.unreadable) == [33]
    other = source(photos, shelf, images=made.images, draw=False, side=SIDE + 1)
    assert next(other.in_order())[0].shape[1] == SIDE + 1
    assert len(reads) > 120


def test_the_kept_pictures_are_bounded(photos, shelf, monkeypatch):
    monkeypatch.setattr(photos, "KEEP", 30 * SIDE * SIDE * 3)
    images = photos.Photos(photos.Files(shelf[0]), shelf[1])
    for side in (SIDE - 1, SIDE, SIDE + 1, SIDE - 2):
        list(source(photos, shelf, images=images, draw=False, side=side).in_order())
        assert sum(kept[1].untyped_storage().nbytes() for kept in images.kept.values()) <= photos.KEEP
    assert SIDE - 2 in images.kept
    assert SIDE + 1 not in images.kept


def test_a_validation_broken_off_keeps_nothing(photos, shelf):
    images = photos.Photos(photos.Files(shelf[0]), shelf[1])
    stream = source(photos, shelf, images=images, draw=False).in_order()
    next(stream)
    stream.close()
    assert not images.kept
    assert sum(len(labels) for _, labels in source(photos, shelf, images=images, draw=False).in_order()) == 30


def test_memory_does_not_grow(photos, full):
    names = zipfile.ZipFile(full).namelist()[:40]
    images = photos.Photos(photos.Files(full), names)
    made = source(photos, (None, names), images=images, side=64, workers=2)

    def resident():
        gc.collect()
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * resource.getpagesize() / 2**20

    def epochs(count):
        for epoch in range(count):
            made.moment = (0, epoch)
            for _ in made.stream(torch.arange(40).split(8)):
                pass

    epochs(3)
    before = resident()
    epochs(10)
    assert resident() - before < 12  # MiB; one decoded photograph is 0.6, ten epochs decode 240


def test_a_user_is_told_what_to_do_where_training_waits(photos, shelf, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert "workers" in source(photos, shelf).remedy
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    assert "workers" not in source(photos, shelf).remedy
    assert "pack" in source(photos, shelf).remedy
    assert "disk" in source(photos, shelf, images=np.zeros((2, 8, 8, 3), np.uint8)).remedy
