"""Folders and .zip files of images: both programs and `data_setup` read and tell the same of them."""

from __future__ import annotations

import functools
import io
import os
import socket
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image, ImageFile

import data_setup
from data_setup import __main__ as command_line
from data_setup import images

KINDS = {".tif": "TIFF", ".tiff": "TIFF", ".bmp": "BMP", ".avif": "AVIF", ".ppm": "PPM", ".png": "PNG"}


def encoded(pixels, kind):
    Image.fromarray(pixels).save(buffer := io.BytesIO(), kind)
    return buffer.getvalue()


def write(root, names):
    """A file for each name, in words; the picture of the i-th name in their order is grey, of value 4 i."""
    for number, name in enumerate(sorted(names.split())):
        path, suffix = root / name, os.path.splitext(name)[1].lower()
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((8, 8, 3), 4 * (number % 60), np.uint8)
        path.write_bytes(encoded(pixels, KINDS.get(suffix, "JPEG")) if suffix != ".txt" else b"words")
    return root


def zipped(root, separator="/"):
    target = root.with_suffix(".zip")
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            member = zipfile.ZipInfo("x")
            member.filename = path.relative_to(root).as_posix().replace("/", separator)
            archive.writestr(member, path.read_bytes())
    return target


@pytest.fixture
def readers(cifar, imagenet, tmp_path):
    """Three functions from a path to (classes, training samples, validation samples, lines told).

    A sample is its class and the number that `write` gave its picture.
    """

    def sampled(classes, labels, pictures):
        numbers = [round(float(np.mean(picture)) / 4) for picture in pictures]
        return [(classes[label], number) for label, number in zip(labels, numbers, strict=True)]

    def program(module, path):
        told = []
        own = {"image_size": 32, "weights": "none", "model": "resnet18"} if module is imagenet else {}
        data = module.load_data(
            module.Settings(data=str(path), out=str(tmp_path / "out"), **own), told.append
        )
        told = [line.removeprefix(f"{path}: ") for line in told if not line.startswith("weights")]
        train = sampled(data.classes, data.train_labels, list(data.train_images))
        return data.classes, train, sampled(data.classes, data.val_labels, list(data.val_images)), told

    def setup(path):
        found, samples = images.Images(path), {}
        for split, names in found.names.items():
            pictures = [images.decode(found.content(name), 8)[0] for name in names]
            samples[split] = sampled(found.classes, found.labels[split], pictures)
        return found.classes, samples["train"], samples["val"], found.told

    return [functools.partial(program, cifar), functools.partial(program, imagenet), setup]


FIFTH = "no validation images in class folders: 20% of each class are kept for it"
PLAIN = "cat/1.jpg cat/2.jpg cat/3.jpg dog/1.jpg dog/2.jpg"


def under(folder, names=PLAIN):
    return " ".join(f"{folder}/{name}" for name in names.split())


TRAIN = under("train")
# Files; classes; patterns of the files to train and to validate on; what is told.
CASES = {
    "roboflow": (f"{TRAIN} {under('valid')} {under('test')} README.txt", "cat dog", "train/*", "valid/*",
                 ["left out: 3 images in test/cat/, 2 images in test/dog/"]),
    "Train and Test": (f"{under('Train')} {under('Test')}", "cat dog", "Train/*", "Test/*", []),
    "twice the same": (f"{under('train/train')} {under('test/test')}", "cat dog", "train/*", "test/*", []),
    "parts": (f"{under('in/train.X1')} in/train.X2/owl/1.jpg {under('in/val.X')} in/val.X/owl/1.jpg",
              "cat dog owl", "in/train*", "in/val*", []),
    "three folders deep": (under("a/b/c", f"{TRAIN} {under('val')}"), "cat dog", "*/train/*", "*/val/*", []),
    "flat test": (f"{TRAIN} test/1.jpg test/2.jpg", "cat dog", "*[23].jpg", "*/*/1.jpg",
                  [FIFTH, "left out: 2 images in test/"]),
    "flat val and test": (f"{TRAIN} val/images/1.jpg {under('test')}", "cat dog", "train/*", "test/*",
                          ["left out: 1 images in val/images/"]),
    "train alone": (TRAIN, "cat dog", "*[23].jpg", "*/1.jpg", [FIFTH]),
    "one folder a class": (PLAIN, "cat dog", "*[23].jpg", "*/1.jpg", [FIFTH]),
    "one folder a class, deep": (under("a/b"), "cat dog", "*[23].jpg", "*/1.jpg", [FIFTH]),
    "a class named train": (f"{PLAIN} train/1.jpg train/2.jpg", "cat dog train", "*[23].jpg", "*/1.jpg",
                            [FIFTH]),
    "nested classes": (under("train", "cat/a/1.jpg cat/b/2.jpg dog/3.jpg") + " val/cat/4.jpg val/dog/c/5.jpg",
                       "cat dog", "train/*", "val/*", []),
    "a set in another": (f"{under('x', TRAIN)} {under('x/val')} {under('x/x', TRAIN)}",
                         "cat dog", "x/train/*", "x/val/*",
                         ["left out: 3 images in x/x/train/cat/, 2 images in x/x/train/dog/"]),
    "a class of one image": (f"{PLAIN} preview/1.jpg", "cat dog", "*[23].jpg", "[cd]*/1.jpg",
                             [FIFTH, "left out: 1 images in preview/"]),
    "loose images and texts": (f"{PLAIN} cover.jpg cat/a.txt cat/b.txt about.txt", "cat dog", "*[23].jpg",
                               "*/1.jpg", [FIFTH, "left out: 2 .txt, 1 images in no folder"]),
    "hidden": (f"{PLAIN} .cache/x/1.jpg cat/.1.jpg __MACOSX/cat/1.jpg", "cat dog", "*[23].jpg", "[cd]*/1.jpg",
               [FIFTH]),
    "other suffixes": (under("a", "cat/1.TIF cat/2.tiff cat/3.jfif dog/1.bmp dog/2.ppm dog/3.png"), "cat dog",
                       "*[23].*", "*/1.*", [FIFTH]),
}  # fmt: skip


@pytest.mark.parametrize("packing", ["folder", "zip", "zip of Windows"])
@pytest.mark.parametrize("case", CASES)
def test_all_three_read_and_tell_the_same(readers, tmp_path, case, packing):
    files, classes, train, val, told = CASES[case]
    path = write(tmp_path / "images", files)
    if packing != "folder":
        path = zipped(path, "\\" if "Windows" in packing else "/")
    names, hidden = sorted(files.split()), (".cache", "__MACOSX")
    expected = []
    for pattern in (train, val):
        chosen = [n for n in names if fnmatch(n, pattern) and not n.startswith(hidden) and "/." not in n]
        of_class = {label: [n for n in chosen if label in n.split("/")[:-1]] for label in classes.split()}
        expected.append([(label, names.index(n)) for label in of_class for n in of_class[label]])
    for read in readers:
        assert read(path) == (classes.split(), *expected, told)


@pytest.mark.parametrize(
    ("files", "found"),
    [("1.jpg 2.jpg", "found 2 images in no folder; name"),
     ("train/1.jpg train/2.jpg test/1.jpg test/2.jpg", "found 2 images in test/, 2 images in train/; name"),
     ("train/cat/1.jpg val/cat/1.jpg", "found 1 images in train/cat/, 1 images in val/cat/; name"),
     ("cat/1.jpg dog/1.jpg", "found 1 images in cat/, 1 images in dog/; name"),
     (f"{under('a', TRAIN)} {under('b', TRAIN)}", "found a/, b/; name"),
     (f"{under('a')} {under('b')}", "found a/, b/; name"),
     ("cat/a.txt dog/b.txt c.txt", "found 2 .txt; name"),
     ("a.txt", "found no files; name")],
)  # fmt: skip
def test_all_three_refuse_the_same(readers, cifar, imagenet, tmp_path, files, found):
    path, errors = write(tmp_path / "images", files), (cifar.BadInput, imagenet.BadInput, data_setup.BadInput)
    for read, error in zip(readers, errors, strict=True):
        with pytest.raises(error) as caught:
            read(path)
        assert f"{path}: expected one set of two or more classes" in str(caught.value)
        assert found in str(caught.value)


ROWS = "1.jpg,cat\n2.jpg,dog\n3.jpg,cat\n4.jpg,dog\n"
FLAT = "1.jpg 2.jpg 3.jpg 4.jpg"
# Images; tables; files to train and to validate on, in the order of the classes; what is told.
TABLES = {
    "beside it": (FLAT, {"train.csv": f"file,label\n{ROWS}"}, "3.jpg 4.jpg", "1.jpg 2.jpg", [FIFTH]),
    "columns swapped, of any name": (FLAT, {"train.csv": "x,y\ncat,1.jpg\ndog,2.jpg\ncat,3.jpg\ndog,4.jpg\n"},
                                     "3.jpg 4.jpg", "1.jpg 2.jpg", [FIFTH]),
    "more columns, names without suffix": (
        under("a/train", f"{FLAT} 5.jpg") + " a/test/1.jpg",
        {"a/labels.csv": "\ufeffn,id,Breed\r\n8,1,cat\r\n8,2, dog\r\n8,3,cat\r\n8,4,dog\r\n9,9,owl\r\n8,5,",
         "a/test.csv": "size,id\n8,1\n", "a/sample.csv": "id,Breed\n1,cat\n"},
        "a/train/3.jpg a/train/4.jpg", "a/train/1.jpg a/train/2.jpg",
        [FIFTH, "left out: 1 images in a/test/, 1 images in a/train/, 1 .csv"]),
    "val.csv": (under("images", FLAT), {"Train.csv": "path,species\nimages/1.jpg,cat\nimages/2.jpg,dog\n",
                                        "valid.csv": "path,species\nimages/3.jpg,cat\nimages/4.jpg,dog\n"},
                "images/1.jpg images/2.jpg", "images/3.jpg images/4.jpg", []),
    "test.csv, images named alike": (
        f"{under('train_images', FLAT)} {under('test_images', FLAT)}",
        {"train.csv": f"image_id,label\n{ROWS}", "test.csv": f"image_id,label\n{ROWS}"},
        "train_images/1.jpg train_images/3.jpg train_images/2.jpg train_images/4.jpg",
        "test_images/1.jpg test_images/3.jpg test_images/2.jpg test_images/4.jpg", []),
    "a test of other classes": (f"{FLAT} test/1.jpg",
                                {"train.csv": f"a,b\n{ROWS}", "test.csv": "a,b\n1.jpg,0\n"},
                                "3.jpg 4.jpg", "1.jpg 2.jpg", [FIFTH, "left out: 1 images in test/"]),
    "a file twice": (FLAT, {"train.csv": f"file,label\n{ROWS}1.jpg,dog\n\n"},
                     "3.jpg 4.jpg", "1.jpg 2.jpg", [FIFTH]),
}  # fmt: skip


@pytest.mark.parametrize("packing", ["folder", "zip", "zip of Windows"])
@pytest.mark.parametrize("case", TABLES)
def test_classes_are_read_from_a_table(readers, tmp_path, case, packing):
    files, tables, train, val, told = TABLES[case]
    path, names = write(tmp_path / "images", files), sorted(files.split())
    for name, text in tables.items():
        (path / name).write_text(text, encoding="utf-8", newline="")
    if packing != "folder":
        path = zipped(path, "\\" if "Windows" in packing else "/")
    expected = [
        [("dog" if name[-5] in "24" else "cat", names.index(name)) for name in chosen.split()]
        for chosen in (train, val)
    ]
    for read in readers:
        assert read(path) == (["cat", "dog"], *expected, told)


def test_class_folders_win_over_a_table(readers, tmp_path):
    path = write(tmp_path / "images", PLAIN)
    (path / "train.csv").write_text("file,label\ncat/1.jpg,x\ncat/2.jpg,y\ncat/3.jpg,x\ndog/1.jpg,y\n")
    for read in readers:
        assert read(path)[0] == ["cat", "dog"]


@pytest.mark.parametrize("text", ["", "\n", "file\n1.jpg\n", f"file,label\n{ROWS.replace('jpg', 'gif')}",
                                  f"file,a,b\n{ROWS.replace(',', ',0,')}",
                                  "a,b\n1.jpg,x\n2.jpg,x\n", "a,b\n1.jpg,x\n2.jpg,y\n",
                                  f"file,label\n{ROWS}\"{'x' * 140_000}"])  # fmt: skip
def test_a_table_that_names_no_images_or_no_classes_is_refused(readers, cifar, imagenet, tmp_path, text):
    path, errors = write(tmp_path / "images", FLAT), (cifar.BadInput, imagenet.BadInput, data_setup.BadInput)
    (path / "train.csv").write_text(text)
    for read, error in zip(readers, errors, strict=True):
        with pytest.raises(error, match=r"images.*expected [^\n]*; [^\n]*"):
            read(path)


@pytest.mark.parametrize("val", [under("val", "cat/1.jpg"), f"{under('val')} val/owl/1.jpg"])
def test_a_class_in_one_split_is_named_and_train_alone_is_a_way_out(readers, cifar, imagenet, tmp_path, val):
    path = write(tmp_path / "images", f"{TRAIN} {val}")
    errors = cifar.BadInput, imagenet.BadInput, data_setup.BadInput
    for read, error in zip(readers, errors, strict=True):
        with pytest.raises(
            error, match=r"only in train or only in val: (dog|owl); .*name train's folder alone"
        ):
            read(path)
        assert read(path / "train")[0] == ["cat", "dog"]


@pytest.mark.parametrize("name", ["mine.tar.gz", "broken.zip"])
def test_what_is_no_folder_and_no_zip_is_told_what_to_do(readers, cifar, imagenet, tmp_path, name):
    errors = cifar.BadInput, imagenet.BadInput, data_setup.BadInput
    (tmp_path / name).write_bytes(b"\x1f\x8b")
    for read, error in zip(readers, errors, strict=True):
        with pytest.raises(error, match=rf"{name}.*expected a folder.*unpack") as caught:
            read(tmp_path / name)
        assert "delete" not in str(caught.value)


def test_links_are_followed_once(readers, tmp_path):
    write(tmp_path / "real", f"{TRAIN} {under('val')}")
    (tmp_path / "real" / "train" / "cat" / "back").symlink_to(tmp_path / "linked")
    (tmp_path / "linked").mkdir()
    for split in ("train", "val"):
        (tmp_path / "linked" / split).symlink_to(tmp_path / "real" / split)
    for read in readers:
        _, train, val, told = read(tmp_path / "linked")
        assert (len(train), len(val), told) == (5, 5, [])


def read_all(cifar, imagenet, raw, side=32):
    """What each decoder makes of the middle of a file, uint8 [side, side, 3]."""
    whole = imagenet.decode(raw, side, lambda width, height: (0, 0, width, height))
    return cifar.decode(raw), whole, images.decode(raw, side)[0]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize(
    ("low", "high", "dtype", "bits"),
    [(0, 4095, np.uint16, 12), (0, 1023, np.uint16, 10), (0, 65535, np.uint16, 16), (0, 200, np.uint16, 8),
     (0, 70_000, np.int32, 17), (-1024, 3071, np.int32, 12), (0, 1, np.float32, 0), (0, 255, np.float32, 8)],
)  # fmt: skip
def test_deep_grey_keeps_its_range(cifar, imagenet, kind, low, high, dtype, bits):
    if kind != "TIFF" and dtype != np.uint16:
        pytest.skip(f"{kind} holds no such numbers")
    ramp = np.linspace(low, high, 32).astype(dtype)
    raw = encoded(np.repeat(ramp[None], 32, axis=0), kind)
    expected = (ramp.astype(float) - low) * 255 / 2**bits
    for pixels in read_all(cifar, imagenet, raw):
        assert np.abs(pixels[16, :, 0] - expected).max() <= 2


def test_pictures_of_nan_and_of_nothing_are_read(cifar, imagenet):
    for values in (np.full((8, 8), np.nan, np.float32), np.zeros((8, 8), np.uint16)):
        for pixels in read_all(cifar, imagenet, encoded(values, "TIFF")):
            assert not pixels.any()


def test_whatever_a_decoder_raises_is_one_lost_image(readers, cifar, imagenet, tmp_path, monkeypatch):
    """PIL's plugins raise more kinds of errors than they say, in damaged files."""
    root = write(tmp_path / "images", " ".join(f"{split}/{c}/{i}.png" for split in ("train", "val")
                                               for c in ("cat", "dog") for i in range(50)))  # fmt: skip
    (root / "train" / "cat" / "0.png").write_bytes(b"odd")
    opened = Image.open
    for error in (AssertionError, AttributeError, ZeroDivisionError, KeyError, NotImplementedError):

        def odd(file, *args, error=error, **how):
            if file.getvalue() == b"odd":
                raise error("odd")
            return opened(file, *args, **how)

        monkeypatch.setattr(Image, "open", odd)
        told = []
        data = cifar.load_data(cifar.Settings(data=str(root)), told.append)
        assert [line.partition(":")[0] for line in data.unreadable] == ["train/cat/0.png"]
        settings = imagenet.fill_defaults(imagenet.Settings(image_size=8, batch_size=8, device="cpu"))
        data = imagenet.read_data(
            SimpleNamespace(data=str(root), train_size=0, val_fraction=0.2), told.append
        )
        source = imagenet.CropSource(data.train_images, data.train_labels, settings, training=False)
        assert sum(len(labels) for _, labels in source.in_order()) == 99
        assert list(source.unreadable.values()) == ["train/cat/0.png: 'odd'" if error is KeyError
                                                    else "train/cat/0.png: odd"]  # fmt: skip
        assert (data.train_images[0] == 128).all()


def test_a_file_too_large_is_lost_in_all_three(cifar, imagenet, tmp_path, monkeypatch):
    path = write(tmp_path, "cat/1.jpg") / "cat" / "1.jpg"
    for module in (cifar, imagenet, images):
        monkeypatch.setattr(module, "LARGEST_FILE", 100)
    with pytest.raises(ValueError, match="more than 100"):
        imagenet.Photos(tmp_path, ["cat/1.jpg"]).read(0)
    assert "more than 100" in next(iter(cifar.decode_all(tmp_path, ["cat/1.jpg"])[1].values()))
    assert path.stat().st_size > 100


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes among its files")
def test_where_a_reader_would_wait_for_ever_is_no_file_to_all_three(readers, cifar, imagenet, tmp_path):
    """A pipe, a socket, a device: as one of the images they are lost, as the data set they are refused."""
    (tmp_path / "cat").mkdir()
    os.mkfifo(tmp_path / "cat" / "pipe.jpg")
    (tmp_path / "cat" / "device.jpg").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "cat" / "socket.jpg"))
    names, setup = [f"cat/{name}.jpg" for name in ("pipe", "device", "socket")], object.__new__(images.Images)
    setup.path, setup.archive = tmp_path, None
    for row, name in enumerate(names):
        for read in (imagenet.Photos(tmp_path, names).read, lambda row, name=name: setup.content(name)):
            with pytest.raises(ValueError, match="a pipe, a socket or a device"):
                read(row)
        assert f"{name}: a pipe, a socket or a device" in cifar.decode_all(tmp_path, [name])[1][0]
    errors = cifar.BadInput, imagenet.BadInput, data_setup.BadInput
    for read, error in zip(readers, errors, strict=True):
        with pytest.raises(error, match="a pipe, a socket or a device"):
            read(tmp_path / "cat" / "pipe.jpg")


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".tiff"])
def test_of_many_frames_one_is_decoded(cifar, imagenet, monkeypatch, suffix):
    frames, decoded = [Image.new("RGB", (40, 40), (9 * i, 0, 0)) for i in range(9)], []
    load = ImageFile.ImageFile.load
    frames[0].save(raw := io.BytesIO(), images.SUFFIXES[suffix], save_all=True, append_images=frames[1:])
    monkeypatch.setattr(
        ImageFile.ImageFile, "load", lambda image: decoded.append(image.tell()) or load(image)
    )
    for pixels in read_all(cifar, imagenet, raw.getvalue()):
        assert pixels[..., 0].max() < 5
    assert set(decoded) <= {0}


def test_an_error_names_a_few_of_twenty_thousand_classes(readers, cifar, imagenet, monkeypatch):
    many = [f"train/{number:06}/{i}.jpg" for number in range(20_000) for i in range(2)]
    calls = {cifar: cifar.find_layout, imagenet: imagenet.find_layout, data_setup: images.find_layout}
    for module, find in calls.items():
        with pytest.raises(module.BadInput, match="only in train or only in val: 000001, 000002") as caught:
            find(ROOT, [*many, "val/000000/1.jpg"], 0.2)
        assert len(str(caught.value)) < 1000
    classes, splits, _ = imagenet.find_layout(ROOT, many, 0.2)
    assert (len(classes), len(splits["val"][0])) == (20_000, 20_000)
    photos = SimpleNamespace(names=["Labels.json"], read=lambda row: b'{"000001": "a", "000002": "a"}')
    assert imagenet.titles_of(classes, photos)[:3] == ["000000", "a (000001)", "a (000002)"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_names_that_are_no_text_of_the_terminal_are_escaped(tmp_path, encoding):
    """Chinese, and bytes that are no text at all, through `data_setup` on a terminal that has neither."""
    root = write(tmp_path / "资料", PLAIN)
    (root / "cat").rename(root / os.fsdecode(b"\xff\xe5"))
    (root / "dog").rename(root / "狗")
    line = [sys.executable, "-m", "data_setup", "folder", "check", str(root), "--workers", "1"]
    found = subprocess.run(line, cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": encoding},
                           capture_output=True, check=False)  # fmt: skip
    assert found.returncode in (0, 1), found.stderr
    assert b"Traceback" not in found.stderr
    assert b"\\udcff" in found.stdout


HOSTILE = (
    "\x1b]0;owned\x07\x1b[31m \u202egpj.exe \udcff \x9b2J \r\nx"  # a title, colours, order, no text, lines
)


@pytest.fixture
def hostile(tmp_path):
    """Class folders whose names, like those of files in them, would steer a terminal; one image is broken."""
    names = " ".join(f"{label}/{number}.jpg" for label in ("cat", "dog") for number in range(60))
    root = write(tmp_path / "images", names)
    (root / "cat" / "1.jpg").write_bytes(b"")
    (root / "cat" / "1.jpg").rename(root / "cat" / f"{HOSTILE}.jpg")
    (root / "cat" / f"note.{HOSTILE}").write_text("no image")
    (root / "dog").rename(root / f"dog{HOSTILE}")
    return root.rename(tmp_path / f"images{HOSTILE}")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
def test_names_reach_people_as_text_that_does_nothing(cifar, imagenet, hostile, tmp_path):
    own = {"image_size": 32, "weights": "none", "model": "resnet18"}
    for module, words in ((cifar, {}), (imagenet, own)):
        said, out, escaped = [], str(tmp_path / "out"), module.printable(HOSTILE)
        data = module.load_data(module.Settings(data=str(hostile), out=out, **words), said.append)
        said += [data.name, data.source, module.describe(data), *data.classes, *data.unreadable]
        said += module.overview(module.fill_defaults(module.Settings(data=str(hostile), **words)))
        with pytest.raises(module.BadInput) as caught:
            module.load_data(module.Settings(data=str(hostile / "cat"), out=out, **words), said.append)
        assert all(text.isprintable() for text in [*said, str(caught.value)])
        assert data.classes == ["cat", f"dog{escaped}"]
        assert any("left out: 1 ." in text for text in said)
        assert escaped.partition(" ")[0] in str(caught.value)
    assert data.train_images.read(0), "and the file is found by its own name"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such names")
@pytest.mark.parametrize("command", ["check", "pack", "check cat"])
def test_data_setup_prints_names_as_text_that_does_nothing(hostile, tmp_path, capsys, command):
    path = [str(hostile / command.partition(" ")[2]), "--workers", "1"]
    more = ["--to", str(tmp_path / "packed"), "--side", "8"] if command == "pack" else []
    status = command_line.main(["folder", command.split()[0], *path, *more])
    out, err = capsys.readouterr()
    bar = err.rpartition("\r")[2] if "\r" in err else err
    assert status == {"check": 1, "pack": 0, "check cat": 2}[command]
    assert all(line.isprintable() for line in [*out.split("\n"), *bar.split("\n")])
    assert images.printable(HOSTILE).partition(" ")[0] in out + bar
