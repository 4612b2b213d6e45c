"""The photographs: what is found, decoded and cropped, and what is refused in one sentence."""

import contextlib
import functools
import io
import json
import os
import re
import struct
import threading
import warnings
import zipfile
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, put, zipped
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, JpegImagePlugin
from torchvision.transforms import RandomResizedCrop

DATA = ROOT.parent / "shared" / "data"
SIDE = 16
BILINEAR = Image.Resampling.BILINEAR
examples = settings(deadline=None, max_examples=30, suppress_health_check=list(HealthCheck))


def real_data(name):
    """The path of real images, where this machine has them."""
    if not (DATA / name).exists():
        pytest.skip(f"no real images at {DATA / name}")
    return DATA / name


@pytest.fixture(autouse=True)
def photos(imagenet, monkeypatch, tmp_path):
    """The ImageNet-100 program as a module, which reads none of this machine's Kaggle inputs."""
    monkeypatch.setattr(imagenet, "KAGGLE_INPUT", tmp_path / "no-kaggle")
    return imagenet


def picture(seed=0, height=48, width=64):
    """A smooth colour picture, uint8 [height, width, 3], that survives JPEG; no symmetry."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encoded(pixels, kind="JPEG", **how):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    own = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
    image.save(buffer, kind, **own.get(kind, {}) | how)
    return buffer.getvalue()


JPEG, PALETTE = encoded(picture()), Image.fromarray(picture(3)).quantize(128)


def write_tree(root, names):
    for name in names:
        put(root / name, JPEG)
    return root


def split_tree(root, classes=("ant", "bee"), n=3, splits=("train", "val")):
    return write_tree(root, [f"{s}/{c}/{i}.jpg" for s in splits for c in classes for i in range(n)])


@pytest.fixture(params=["folder", "zip"])
def packaged(request, tmp_path):
    """Gives a folder as it is, or a .zip of it."""
    return lambda folder: folder if request.param == "folder" else zipped(folder, tmp_path / "images.zip")


def load(photos, data, folder="nowhere", size=0, val_fraction=0.2):
    wanted = {"data": str(data), "data_dir": str(folder), "train_size": size, "val_fraction": val_fraction}
    return photos.read_data(SimpleNamespace(**wanted), print)


def refusal(photos, call, *args, **kwargs):
    """The one sentence that a call is refused with."""
    with pytest.raises(photos.BadInput, match=r"^[^\n]+$") as caught:
        call(*args, **kwargs)
    return str(caught.value)


KAGGLE = ["train.X1/n00000002/a.JPEG", "train.X1/n00000002/b.JPEG", "train.X2/n00000001/c.JPEG"]
KAGGLE += ["val.X/n00000001/d.JPEG", "val.X/n00000002/e.JPEG"]


@pytest.mark.parametrize("deep", ["", "imagenet100/"])
def test_kaggles_parts_share_one_class_index(photos, tmp_path, packaged, deep):
    root = write_tree(tmp_path / "root", [deep + name for name in KAGGLE])
    titles = {"n00000001": "crane, bird", "n00000002": "crane"}
    put(root / f"{deep}Labels.json", json.dumps(titles).encode())
    put(root / f"{deep}train.X1/n00000002/notes.txt", b"no image")
    put(root / f"{deep}train.X1/n00000002/._a.JPEG", b"what a Mac leaves")
    write_tree(root, ["__MACOSX/train/x/1.jpg", f"{deep}.cache/train/x/1.jpg"])
    data = load(photos, packaged(root))
    assert data.classes == ["crane (n00000001)", "crane (n00000002)"]
    assert data.train_images.names == [deep + name for name in (KAGGLE[2], KAGGLE[0], KAGGLE[1])]
    assert (data.train_labels.tolist(), data.val_labels.tolist()) == ([0, 1, 1], [0, 1])
    assert data.train_images.read(0) == JPEG


@pytest.mark.parametrize("deep", ["", "photos/"])
@pytest.mark.parametrize("named", ["train val", "train test", "Training Testing", "TRAIN validation"])
def test_splits_are_known_by_their_usual_names(photos, tmp_path, packaged, named, deep):
    train, val = named.split()
    split_tree(tmp_path / "root" / deep, splits=(train, val))
    data = load(photos, packaged(tmp_path / "root"))
    assert data.classes == ["ant", "bee"]
    assert data.val_images.names == [f"{deep}{val}/{c}/{i}.jpg" for c in ("ant", "bee") for i in range(3)]
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("deep", ["", "train/", "photos/"])
def test_a_single_folder_of_classes_is_split_by_class(photos, tmp_path, packaged, deep):
    names = [f"{deep}{c}/{i}.jpg" for c, n in (("a", 10), ("b", 2)) for i in range(n)]
    path = packaged(write_tree(tmp_path / "root", names))
    data, again = load(photos, path, val_fraction=0.3), load(photos, path, val_fraction=0.3)
    assert [np.bincount(x).tolist() for x in (data.train_labels, data.val_labels)] == [[7, 1], [3, 1]]
    assert sorted(data.train_images.names + data.val_images.names) == names
    assert again.val_images.names == data.val_images.names


@examples
@given(counts=st.lists(st.integers(2, 30), min_size=2, max_size=5), fraction=st.floats(0.01, 0.99))
def test_every_class_keeps_an_image_on_each_side(photos, counts, fraction):
    classes = {str(key): list(range(100 * key, 100 * key + n)) for key, n in enumerate(counts)}
    splits = photos.divide(classes, fraction)
    for key, rows in classes.items():
        val = splits["val"][key]
        assert sorted(splits["train"][key] + val) == rows
        assert 0 < len(val) < len(rows)
        assert abs(len(val) - fraction * len(rows)) <= 1.1


def test_broken_titles_are_refused(photos, tmp_path):
    for titles in (b"{", b"[1, 2]"):
        put(split_tree(tmp_path / "tree") / "Labels.json", titles)
        assert str(tmp_path / "tree") in refusal(photos, load, photos, tmp_path / "tree")


def test_the_small_imagenet(photos):
    data = load(photos, real_data("imagenet100-mini.zip"))
    assert (len(set(data.classes)), data.classes[0]) == (100, "goldfish")
    assert np.bincount(data.val_labels).tolist() == [50] * 100
    keys = [name.split("/")[1] for name in data.train_images.names]
    assert len(set(zip(keys, data.train_labels, strict=True))) == 100, "a class is a folder"


def write_packed(folder, **changes):
    put(folder / "classes.json", b'["ant", "bee"]')
    rng, arrays = np.random.default_rng(0), {}
    for split, n in (("train", 8), ("val", 4)):
        arrays[f"{split}_images"] = rng.integers(0, 256, (n, 20, 20, 3), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(n) % 2
    for name, array in (arrays | changes).items():
        np.save(folder / f"{name}.npy", array)
    return arrays


@pytest.mark.parametrize("deep", ["", "inner"])
def test_packed_arrays_are_mapped_and_never_read_whole(photos, tmp_path, deep):
    arrays = write_packed(tmp_path / "packed" / deep)
    for size in (0, 4):
        data = load(photos, tmp_path / "packed", size=size)
        assert data.train_images.place.filename == tmp_path / "packed" / deep / "train_images.npy"
        assert np.bincount(data.train_labels).tolist() == [size / 2 or 4] * 2
        for row, label in enumerate(data.train_labels):
            index = data.train_images.names[row]
            assert label == arrays["train_labels"][index]
            right = photos.crop_array(arrays["train_images"][index], 10)
            assert (data.train_images.crop(row, 10) == right).all()
    assert data.classes == ["ant", "bee"]
    assert (data.val_labels.dtype, data.val_labels.tolist()) == (np.int64, [0, 1, 0, 1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"train_images": np.zeros((8, 20, 20, 3), np.float32)}, "float32"),
     ({"train_images": np.zeros((8, 20, 20), np.uint8)}, "train: uint8 [8, 20, 20]"),
     ({"val_images": np.zeros(4, np.uint8)}, "val: uint8 [4]"),
     ({"val_labels": np.zeros(4)}, "float64"),
     ({"train_labels": np.zeros(7, np.int64)}, "train: uint8"),
     ({"val_labels": np.array([0, 1, 2, 0])}, "labels to 2"),
     ({"train_labels": np.zeros(8, np.int64)}, "expected some of all 2 classes")],
)  # fmt: skip
def test_wrong_truncated_and_missing_packed_arrays_are_refused(photos, tmp_path, changes, words):
    write_packed(tmp_path, **changes)
    assert words in refusal(photos, load, photos, tmp_path)
    write_packed(tmp_path)
    path = put(tmp_path / "val_images.npy", (tmp_path / "val_images.npy").read_bytes()[:-1])
    assert f"--data {tmp_path}: " in refusal(photos, load, photos, tmp_path)
    path.unlink()
    assert "val_images.npy" in refusal(photos, load, photos, tmp_path)


HEADERS = ["(" * 5000, "{" * 100, "", "{'descr': '|u1', 'fortran_order': False, 'shape': 8}", "\x00\xff"]
HEADERS += [f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({n}, 20, 20, 3)}}"
            for n in (-1, True, 2**31, 2**63, 2**64, 10**30, "'8'", None, 0)]  # fmt: skip
NAMES = [
    b"[" * 100_000,
    b"5",
    b"null",
    b'{"ant": 0, "bee": 1}',
    b'"ab"',
    b"\xff",
    b"[]",
    json.dumps([*"ab"] * 10**5),
]


SPOILT = [(name, head) for name in ("train_images.npy", "val_labels.npy") for head in HEADERS]
SPOILT += [("classes.json", names) for names in NAMES]


@pytest.mark.parametrize("spoilt", SPOILT, ids=lambda spoilt: str(spoilt)[:60])
def test_odd_packed_arrays_are_refused_in_a_sentence(photos, tmp_path, spoilt):
    name, content = spoilt
    write_packed(tmp_path)
    if name.endswith("npy"):
        raw = content.encode("latin1")
        content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(raw) + 1) + raw + b"\n" + bytes(9600)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert refusal(photos, load, photos, tmp_path).startswith(f"--data {tmp_path}: ")


def test_classes_without_a_picture_are_refused_before_a_model_is_made_for_them(photos, tmp_path):
    write_packed(tmp_path)
    put(tmp_path / "classes.json", json.dumps([f"class {i}" for i in range(200_000)]).encode())
    assert "expected some of all 200000 classes" in refusal(photos, load, photos, tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes among its files")
@pytest.mark.parametrize("name", ["val_images.npy", "classes.json"])
def test_packed_arrays_are_not_waited_for_at_a_pipe(photos, tmp_path, name):
    write_packed(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    assert "a pipe, a socket or a device" in refusal(photos, load, photos, tmp_path)


HUNDRED = [f"train.X{1 + i // 25}/n{i:08d}/a.jpg" for i in range(100)]
HUNDRED += [f"val.X/n{i:08d}/a.jpg" for i in range(100)]


@pytest.mark.parametrize("mount", ["imagenet100", "datasets/ambityga/imagenet100", "zip"])
@pytest.mark.parametrize("named", ["auto", "imagenet100"])
def test_imagenet_is_found_among_kaggles_inputs(photos, tmp_path, monkeypatch, mount, named):
    kaggle = tmp_path / "kaggle"
    split_tree(kaggle / "pets" / "animals", ("cat", "dog"))
    tree = write_tree(tmp_path / "tree" if mount == "zip" else kaggle / mount, HUNDRED)
    if mount == "zip":
        zipped(tree, kaggle / "imagenet100.zip")
    monkeypatch.setattr(photos, "KAGGLE_INPUT", kaggle)
    data = load(photos, named, tmp_path / "empty")
    assert data.classes == [f"n{index:08d}" for index in range(100)]
    assert data.name == "imagenet100"
    own = write_tree(tmp_path / "mine" / "deep" / "imagenet100", HUNDRED)
    assert load(photos, named, tmp_path / "mine").source == str(own), "the user's own folder comes first"


@pytest.mark.parametrize("named", ["auto", "imagenet100"])
def test_where_nothing_is_found_every_place_and_way_is_named(photos, tmp_path, named):
    message = refusal(photos, load, photos, named, tmp_path)
    ways = ("ambityga/imagenet100", "python -m data_setup imagenet100", "PATH")
    for word in (f"--data {named}", str(tmp_path), str(photos.KAGGLE_INPUT), *ways):
        assert word in message


def some_draws(photos, n, seed=0):
    return torch.rand(n, photos.DRAWS, generator=torch.Generator().manual_seed(seed)).tolist()


@examples
@given(width=st.integers(1, 5000), height=st.integers(1, 5000), seed=st.integers(0, 10**7))
def test_boxes_lie_in_the_picture(photos, width, height, seed):
    left, top, right, bottom = photos.crop_box(width, height, some_draws(photos, 1, seed)[0])
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    left, top, right, bottom = photos.crop_box(width, height)
    assert right - left == pytest.approx(7 / 8 * min(width, height)) == pytest.approx(bottom - top)
    assert (left, top) == pytest.approx((width - right, height - bottom))


def test_random_boxes_spread_as_torchvisions(photos):
    boxes = [photos.crop_box(1000, 1000, draws) for draws in some_draws(photos, 4000)]
    left, top, right, bottom = np.array(boxes).T
    area, ratio = (right - left) * (bottom - top) / 1e6, (right - left) / (bottom - top)
    ends = [area.min(), area.max(), ratio.min(), ratio.max()]
    assert ends == pytest.approx([0.08, 1, 3 / 4, 4 / 3], abs=0.03)
    assert abs(np.log(ratio).mean()) < 0.01, "as often wide as tall"
    assert abs((left + right).mean() - 1000) < 15
    torch.manual_seed(0)
    how = torch.empty(3, 1000, 1000), [0.08, 1.0], [3 / 4, 4 / 3]
    theirs = [h * w / 1e6 for _, _, h, w in (RandomResizedCrop.get_params(*how) for _ in range(4000))]
    shares = [0.1, 0.5, 0.9]
    assert np.quantile(area, shares) == pytest.approx(np.quantile(theirs, shares), abs=0.03)


def decoded(photos, raw, side=SIDE, draws=()):
    return photos.decode(raw, side, functools.partial(photos.crop_box, draws=draws))


def apart(photos, raw, right, side=SIDE, draws=()):
    """How far, in mean grey levels, a crop lies from the same box of the picture `right`, resized by PIL."""
    right = right.convert("RGB")
    expected = right.resize((side, side), BILINEAR, photos.crop_box(*right.size, draws))
    got = decoded(photos, raw, side, draws)
    assert (got.dtype, got.shape) == (np.uint8, (side, side, 3))
    return np.abs(got.astype(float) - np.asarray(expected)).mean()


@pytest.mark.parametrize("how", [{}, {"progressive": True}, {"subsampling": 2}])
def test_decoding_less_of_a_jpeg_changes_nothing_that_shows(photos, how):
    raw = encoded(picture(2, 403, 517), **how)
    for draws in some_draws(photos, 30):
        for side in (16, 96):
            assert apart(photos, raw, Image.open(io.BytesIO(raw)), side, draws) < 1.5


def test_only_as_much_of_a_large_jpeg_is_decoded_as_is_needed(photos, monkeypatch):
    sizes, jpeg, load = [], JpegImagePlugin.JpegImageFile, JpegImagePlugin.JpegImageFile.load
    monkeypatch.setattr(jpeg, "load", lambda self: (sizes.append(self.size), load(self))[1])
    decoded(photos, encoded(picture(0, 1600, 1600)), 100)
    assert sizes[-1] == (200, 200)


def test_real_photographs_are_decoded_as_pil_does(photos):
    with zipfile.ZipFile(real_data("imagenet-fullsize-200.zip")) as archive:
        for name, draws in zip(archive.namelist()[::8], some_draws(photos, 25, 1), strict=True):
            raw = archive.read(name)
            assert apart(photos, raw, Image.open(io.BytesIO(raw)), 96, draws) < 6, name


def test_every_colour_mode_is_read(photos):
    image = Image.fromarray(picture(3))
    grey = image.convert("L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 256 + 77)  # 16 bits
    cases = [(image, kind, image, 2) for kind in ("JPEG", "PNG", "WEBP", "BMP")]
    cases += [(grey, "JPEG", grey, 3), (grey, "PNG", grey, 1), (grey.convert("LA"), "PNG", grey, 1)]
    cases += [(deep, "PNG", grey, 1), (image.convert("RGBA"), "PNG", image, 1), (PALETTE, "PNG", PALETTE, 1)]
    cases += [(image.convert("CMYK"), "JPEG", image, 4), (PALETTE, "GIF", PALETTE, 1)]
    for saved, kind, right, near in cases:
        assert apart(photos, encoded(saved, kind), right) < near, (saved.mode, kind)
    assert 50 < decoded(photos, encoded(grey.convert("1"), "PNG")).mean() < 220
    for kind, near in (("GIF", 12), ("WEBP", 1), ("PNG", 1)):
        animation = encoded(image, kind, save_all=True, append_images=[Image.fromarray(picture(4))] * 2)
        assert apart(photos, animation, image) < near, "the first picture"


@pytest.mark.parametrize("turn", range(2, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pictures_are_turned_upright_before_the_box_is_drawn(photos, turn, kind):
    methods = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_90 TRANSVERSE ROTATE_270".split()
    upright, exif = Image.fromarray(picture(7, 96, 160)), Image.Exif()
    exif[0x112] = turn
    saved = upright.transpose(getattr(Image.Transpose, methods[turn - 2]))
    raw = encoded(saved, kind, exif=exif.tobytes())
    for draws in ((), *some_draws(photos, 4, turn)):
        assert apart(photos, raw, upright, 8, draws) < 3


ODD = [{"transparency": bytes([0, 100, 255] * 20)}, {"transparency": 3}, {"exif": b"MM"}]
ODD += [{"exif": b"Exif\0\0" + tail} for tail in (
    b"MM\0*\0\0", b"II*\0\xff\xff\xff\xff" + bytes(20), b"MM\0*\0\0\0\x08\xff\xff\x01\x12",
    b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0",
)]  # fmt: skip


@pytest.mark.parametrize("odd", ODD)
def test_broken_exif_and_clear_colours_of_a_palette_are_read_without_a_word(photos, tmp_path, odd):
    image, kind = (Image.fromarray(picture(3)), "JPEG") if "exif" in odd else (PALETTE, "PNG")
    put(tmp_path / "a", encoded(image, kind, **odd))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = photos.Photos(tmp_path, ["a"]).crop(0, SIDE)
    assert np.abs(got.astype(float) - decoded(photos, encoded(image.convert("RGB"), "PNG"))).mean() < 3


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (3, 500), (500, 3)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_tiny_and_thin_pictures_work(photos, size, kind):
    raw = encoded(np.full((size[1], size[0], 3), 200, np.uint8), kind)
    for draws in ((), *some_draws(photos, 20)):
        assert np.abs(decoded(photos, raw, SIDE, draws).astype(int) - 200).max() <= 3


@pytest.mark.parametrize("kind", ["JPEG", "progressive", "PNG", "GIF", "WEBP", "BMP"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9])
def test_truncated_pictures_are_unreadable_whatever_the_crop(photos, kind, share):
    noise = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    raw = encoded(noise, "JPEG", progressive=True) if kind == "progressive" else encoded(noise, kind)
    for draws in ((), *some_draws(photos, 3)):
        with pytest.raises(photos.DAMAGE):
            decoded(photos, raw[: int(share * len(raw))], SIDE, draws)


@examples
@given(data=st.data(), kind=st.sampled_from(["JPEG", "PNG", "GIF", "WEBP", "BMP"]))
def test_damage_gives_a_picture_or_unreadable_and_nothing_else(photos, data, kind):
    raw = bytearray(encoded(picture(), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, min(len(raw) - 1, 700)))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings(), contextlib.suppress(*photos.DAMAGE):
        warnings.simplefilter("ignore")
        assert decoded(photos, bytes(raw)).shape == (SIDE, SIDE, 3)


def test_decompression_bombs_are_unreadable(photos):
    png = bytearray(encoded(np.zeros((8, 8, 3), np.uint8), "PNG"))
    png[16:24] = struct.pack(">II", 20_000, 20_000)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
    gif = bytearray(encoded(Image.fromarray(picture()).convert("L"), "GIF"))
    at = gif.index(b",\0\0\0\0", 13)  # the first frame: left, top, width, height
    gif[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    for raw in (png, gif):
        with pytest.raises(photos.DAMAGE, match="bomb"):
            decoded(photos, bytes(raw))


def test_plain_pictures_are_the_centre_square_and_grey_where_unreadable(photos, tmp_path):
    pixels, side = picture(9, 96, 200), photos.PICTURE
    put(put(tmp_path / "b.png", b"").with_name("a.png"), encoded(pixels, "PNG"))
    plain = photos.Photos(tmp_path, ["a.png", "b.png", "a.png"])
    assert (len(plain), plain[0].shape, plain[np.array([1, 2])].shape[0]) == (3, (side, side, 3), 2)
    assert (plain[np.array([1])] == 128).all()
    right = Image.fromarray(pixels).resize((side, side), BILINEAR, (58, 6, 142, 90))
    assert np.abs(plain[-1].astype(float) - np.asarray(right)).mean() < 1


@pytest.fixture(scope="session")
def shelf(tmp_path_factory):
    """A folder of 30 photographs beside a text.jpg that is none, and the names of the 30."""
    folder = tmp_path_factory.mktemp("shelf")
    names = [f"{index:03}.jpg" for index in range(30)]
    for index, name in enumerate(names):
        put(folder / name, encoded(picture(index, 60 + index, 90)))
    put(folder / "text.jpg", b"no picture at all")
    return folder, names


def source(photos, shelf, workers=2, training=True, images=None, copies=1, bad=(), **values):
    """A source of `copies` times the shelf, in which the samples in `bad` are text named .jpg."""
    folder, names = shelf
    names = ["text.jpg" if index in bad else name for index, name in enumerate(names * copies)]
    images = photos.Photos(folder, names) if images is None else images
    own = {"device": "cpu", "image_size": SIDE, "batch_size": 8, "workers": workers} | values
    return photos.CropSource(images, np.arange(len(images)) % 10, photos.Settings(**own), training)


def weighted(batches):
    return ((rows, rows / 100) for rows in batches)


def streamed(made, size=8, order=None, seed=5):
    """The views of all samples in an order, after checking what stands beside them."""
    order = torch.arange(len(made)) if order is None else order
    made.generator.manual_seed(seed)
    batches = list(made.stream(weighted(order.split(size))))
    for batch, rows in zip(batches, order.split(size), strict=True):
        assert torch.equal(batch.indices, rows)
        assert torch.equal(batch.weights, rows / 100)
        assert torch.equal(batch.labels, rows % 10)
    return torch.cat([batch.images for batch in batches])


@pytest.mark.parametrize("packed", [False, True])
def test_crops_are_the_generators_however_many_threads_decode(photos, shelf, packed):
    images = np.stack([picture(seed, 40, 40) for seed in range(30)]) if packed else None
    first, again, other = (source(photos, shelf, workers, images=images) for workers in (1, 5, 2))
    views = streamed(first)
    assert views.shape == (30, 3, SIDE, SIDE)
    assert torch.equal(views, streamed(again))
    assert torch.equal(first.generator.get_state(), again.generator.get_state())
    assert (views != streamed(other, seed=6)).flatten(1).any(1).all()
    val = source(photos, shelf, training=False, images=images)
    middle = photos.plain_view(torch.from_numpy(np.stack([val.images.crop(row, SIDE) for row in range(30)])))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    assert torch.equal(streamed(val, 7, order), middle[order]), "nothing is drawn"
    assert torch.equal(torch.cat([views for views, _ in val.in_order()]), middle)


def test_batches_are_asked_for_at_most_a_chunk_ahead_in_the_callers_thread(photos, shelf):
    asked, ahead = [], []

    def batches():
        for rows in torch.arange(30).split(2):
            asked.append(threading.get_ident())
            yield rows, torch.ones(2)

    for count, _ in enumerate(source(photos, shelf).stream(batches()), 1):
        ahead.append(len(asked) - count)
    assert set(asked) == {threading.get_ident()}
    assert max(ahead) == photos.AHEAD == 4
    assert ahead[-1] == 0


@pytest.mark.parametrize("end", ["close", "Ctrl-C", "too many unreadable"])
def test_a_stream_that_ends_early_leaves_no_thread(photos, shelf, end):
    def batches():
        yield from weighted(torch.arange(24).split(2))
        raise KeyboardInterrupt

    def decoding():
        return any(thread.name.startswith("decode") for thread in threading.enumerate())

    stream = source(photos, shelf, 3, bad=[20] if "unreadable" in end else []).stream(batches())
    next(stream)
    assert decoding()
    with contextlib.suppress(KeyboardInterrupt, photos.BadInput):
        stream.close() if end == "close" else list(stream)
        assert end == "close"
    assert not decoding()


def test_an_unreadable_sample_is_left_out_and_recorded(photos, shelf):
    made = source(photos, shelf, copies=10, bad=[17, 40, 41])
    batches = list(made.stream(weighted([torch.arange(10, 20), torch.tensor([40, 41]), torch.arange(3)])))
    left = [10, 11, 12, 13, 14, 15, 16, 18, 19]
    assert batches[0].indices.tolist() == left
    assert torch.equal(batches[0].weights, torch.tensor(left) / 100)
    assert batches[0].labels.tolist() == [index % 10 for index in left]
    assert (len(batches[0].images), batches[0].missing.tolist()) == (9, [17])
    assert (len(batches[1]), len(batches[1].images), batches[1].missing.tolist()) == (0, 0, [40, 41])
    assert batches[2].indices.tolist() == [0, 1, 2]
    assert sorted(made.unreadable) == [17, 40, 41]
    assert made.unreadable[17].startswith("text.jpg: cannot identify image file")
    assert "0x" not in made.unreadable[17], "no address in memory: the same file is the same line"


def test_more_than_one_percent_unreadable_is_refused(photos, shelf):
    seen, bad = [], [17, 40, 41, 50]
    stream = source(photos, shelf, copies=10, bad=bad).stream(weighted(torch.arange(300).split(10)))
    message = refusal(photos, seen.extend, stream)
    assert len(seen) == 5
    assert re.search(r"4 of 300 .*text\.jpg.* 1 %", message)
    val = source(photos, shelf, copies=10, bad=bad, training=False)
    assert "4 of 300" in refusal(photos, list, val.in_order())


def test_validation_pictures_are_in_order_and_decoded_once(photos, shelf, monkeypatch):
    made, reads, read = source(photos, shelf, copies=4, bad=[33], training=False), [], photos.Photos.read
    monkeypatch.setattr(photos.Photos, "read", lambda self, row: (reads.append(row), read(self, row))[1])
    first, labels = map(torch.cat, zip(*made.in_order(), strict=True))
    assert sorted(reads) == list(range(120))
    assert labels.tolist() == [index % 10 for index in range(120) if index != 33]
    other = source(photos, shelf, images=made.images, training=False, batch_size=50)
    assert torch.equal(first, torch.cat([views for views, _ in other.in_order()]))
    assert reads[120:] == [33], "only what cannot be read is tried again"
    larger = source(photos, shelf, images=made.images, training=False, image_size=20)
    assert next(larger.in_order())[0].shape[2:] == (20, 20)


def test_the_kept_pictures_are_bounded_and_training_keeps_none(photos, shelf, monkeypatch):
    monkeypatch.setattr(photos, "KEEP", 10 * SIDE * SIDE * 3)
    made, train = source(photos, shelf, 1, training=False), source(photos, shelf)
    assert [sum(len(labels) for _, labels in made.in_order()) for _ in range(2)] == [30, 30]
    assert sum(kept.nbytes for kept in made.images.kept.values()) == photos.KEEP
    streamed(train)
    assert not train.images.kept
