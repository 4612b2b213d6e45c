"""The data: what is drawn, what is read, what is downloaded, and what is refused in one sentence."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import pickle
import shutil
import socket
import tarfile
import threading
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from conftest import zipped
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torchvision.datasets import CIFAR10

examples = settings(deadline=None, max_examples=25, suppress_health_check=list(HealthCheck))
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FOLDER, ARCHIVE = "cifar-10-batches-py", "cifar-10-python.tar.gz"


def load(cifar, data, folder="nowhere", size=0):
    """Load and return the data with the notices that were said."""
    notices = []
    chosen = cifar.Settings(data=str(data), data_dir=str(folder), train_size=size)
    return cifar.load_data(chosen, notices.append), notices


def refusal(cifar, *args, **kwargs):
    """The one sentence that a load is refused with."""
    with pytest.raises(cifar.BadInput, match=r"^[^\n]+$") as caught:
        load(cifar, *args, **kwargs)
    return str(caught.value)


def pixels(n, seed=0, height=32, width=32):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def write_tree(root, classes=("ant", "bee"), n=3, splits=("train", "test")):
    """Write class folders of PNG files; returns {split: images in the order they must come}."""
    written = {}
    for offset, split in enumerate(splits):
        written[split] = pixels(n * len(classes), offset)
        for index, image in enumerate(written[split]):
            folder = root / split / classes[index // n]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{index:04}.png").write_bytes(encoded(image))
    return written


@pytest.fixture(autouse=True)
def no_outside(cifar, monkeypatch, tmp_path):
    """No test reads this machine's Kaggle inputs or reaches the network."""
    monkeypatch.setattr(cifar, "KAGGLE_INPUT", tmp_path / "no-kaggle")
    monkeypatch.setattr(cifar, "CIFAR10_URL", f"http://127.0.0.1:9/{ARCHIVE}")  # where nothing listens
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def official(monkeypatch):
    """Writes a tiny CIFAR-10 in its official form, whose md5 torchvision is told to expect."""
    buffer, files, sums = io.BytesIO(), {}, []
    for seed, name in enumerate([*(f"data_batch_{index}" for index in range(1, 6)), "test_batch"]):
        rows = pixels(20, seed).transpose(0, 3, 1, 2).reshape(20, 3072)
        files[name] = pickle.dumps({"data": rows, "labels": [i % 10 for i in range(20)]}, protocol=2)
    files["batches.meta"] = pickle.dumps({"label_names": NAMES}, protocol=2)
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{FOLDER}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
            sums.append([name, hashlib.md5(content).hexdigest()])
    monkeypatch.setattr(CIFAR10, "train_list", sums[:5])
    monkeypatch.setattr(CIFAR10, "test_list", sums[5:6])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums[6][1]})
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(buffer.getvalue()).hexdigest())

    def write(place, form="batches"):
        made = {FOLDER + "/" + name: content for name, content in files.items()}
        for name, content in (made if form == "batches" else {ARCHIVE: buffer.getvalue()}).items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(content)
        return place / (FOLDER if form == "batches" else ARCHIVE)

    return write


@examples
@given(n_train=st.integers(10, 240), n_val=st.integers(10, 60), seed=st.integers(0, 2**32))
def test_shapes_repeat_from_their_seed_and_hold_the_stated_shares(cifar, n_train, n_val, seed):
    data, again = cifar.shapes(n_train, n_val, seed), cifar.shapes(n_train, n_val, seed)
    for name in ("train_images", "train_labels", "val_images", "val_labels", "difficulty"):
        assert np.array_equal(getattr(data, name), getattr(again, name))
    assert (data.train_images.shape, data.val_images.shape) == ((n_train, 32, 32, 3), (n_val, 32, 32, 3))
    assert data.train_images.dtype == data.val_images.dtype == data.difficulty.dtype == np.uint8
    assert data.train_labels.dtype == data.val_labels.dtype == np.int64
    hard, wrong = round(0.35 * n_train), round(0.05 * n_train)
    assert np.bincount(data.difficulty, minlength=3).tolist() == [n_train - hard - wrong, hard, wrong]
    assert np.ptp(np.bincount(data.val_labels, minlength=len(data.classes))) <= 1
    assert 0 <= data.train_labels.min() <= data.train_labels.max() < len(data.classes)


def test_shapes_mislabel_exactly_the_samples_marked_so_and_draw_them_easy(cifar, monkeypatch):
    kinds = {id(figure): kind for kind, figure in enumerate(cifar.FIGURES.values())}

    def draw(rng, figure, hard):
        return np.full((32, 32, 3), kinds[id(figure)] + 100 * hard, np.uint8)

    monkeypatch.setattr(cifar, "draw", draw)
    data = cifar.shapes(1200, 100)
    hard, truth = np.divmod(data.train_images[:, 0, 0, 0], 100)
    assert np.array_equal(truth != data.train_labels, data.difficulty == 2)
    assert np.array_equal(hard == 1, data.difficulty == 1)
    hard, truth = np.divmod(data.val_images[:, 0, 0, 0], 100)
    assert np.array_equal(truth, data.val_labels) and hard.sum() == 35


def test_no_figure_is_like_another_nor_like_its_mirror_image(cifar):
    def filled(figure):
        picture = Image.new("1", (200, 200))
        ImageDraw.Draw(picture).polygon((100 + 100j + 80 * figure).view(float).tolist(), 1)
        return np.asarray(picture)

    pictures = [filled(figure) for figure in cifar.FIGURES.values()]
    assert len(pictures) == 10
    for one, other in itertools.combinations(pictures, 2):
        for picture in (other, other[:, ::-1]):
            assert (one & picture).sum() < 0.9 * (one | picture).sum()


@pytest.mark.slow
def test_two_epochs_of_plain_training_on_a_few_shapes_go_far_beyond_chance(cifar, tmp_path):
    plain = replace(cifar.Settings(), data="shapes", train_size=4000, gate="full", compare="none", epochs=2)
    plain = replace(plain, batch_size=64, device="cpu", out=str(tmp_path / "out"))
    found = cifar.run(plain, listeners=[], say=lambda line: None)
    assert found["policies"]["full"]["final_accuracy"] > 40


@examples
@given(labels=st.lists(st.integers(0, 4), min_size=5, max_size=80), share=st.floats(0, 1))
def test_a_subset_is_as_even_as_the_classes_allow(cifar, labels, share):
    labels = np.array(labels)
    size = max(5, round(share * len(labels)))
    rows = cifar.balanced_subset(labels, size, 5)
    assert len(set(rows.tolist())) == len(rows) == size
    assert np.all(np.diff(rows) > 0)
    taken, there = np.bincount(labels[rows], minlength=5), np.bincount(labels, minlength=5)
    assert all(taken[i] == there[i] or taken[i] >= taken.max() - 1 for i in range(5))


@pytest.mark.parametrize("form", ["folder", "batches"])
def test_every_form_takes_a_train_size(cifar, tmp_path, official, form):
    official(tmp_path) if form == "batches" else write_tree(tmp_path, n=10)
    whole, part = load(cifar, tmp_path)[0], load(cifar, tmp_path, size=10)[0]
    rows = cifar.balanced_subset(whole.train_labels, 10, len(whole.classes))
    for data, wrong in (("shapes", 9), (tmp_path, 1), (tmp_path, 101)):
        assert f"--train-size {wrong}" in refusal(cifar, data, size=wrong)
    assert np.array_equal(part.train_images, whole.train_images[rows])
    assert np.array_equal(part.train_labels, whole.train_labels[rows])
    assert np.array_equal(part.val_images, whole.val_images)


@pytest.mark.parametrize("splits", [("train", "test"), ("train", "val")])
@pytest.mark.parametrize("form", ["folder", "nested folder", "zip", "nested zip"])
def test_class_folders_are_read_pixel_for_pixel(cifar, tmp_path, splits, form):
    root = tmp_path / "box" / "insects" if form == "nested folder" else tmp_path / "insects"
    written = write_tree(root, classes=("bee", "ant"), splits=splits)
    (root / "train" / ".hidden").mkdir()
    archive = zipped(root, tmp_path / "insects.zip", "insects/" if form == "nested zip" else "")
    path = {"folder": root, "nested folder": root.parent}.get(form, archive)
    data, notices = load(cifar, path)
    order = [3, 4, 5, 0, 1, 2]  # "bee" was written first, "ant" is sorted first
    assert (data.classes, data.name, data.synthetic) == (["ant", "bee"], path.stem, False)
    assert np.array_equal(data.train_images, written["train"][order])
    assert np.array_equal(data.val_images, written[splits[-1]][order])
    assert data.train_labels.tolist() == data.val_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.train_labels.dtype == np.int64
    assert notices == data.unreadable == []


@examples
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    colour=st.tuples(*[st.integers(0, 255)] * 3),
    kind=st.sampled_from(["PNG", "grey", "JPEG", "GIF", "WEBP", "BMP"]),
)
def test_images_of_any_size_and_form_keep_their_colour(cifar, height, width, colour, kind):
    image, expected = np.full((height, width, 3), colour, np.uint8), colour
    if kind == "grey":
        image, expected = image[..., 0], [colour[0]] * 3
    options = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}.get(kind, {})
    decoded = cifar.decode(encoded(image, kind if kind.isupper() else "PNG", **options))
    assert (decoded.shape, decoded.dtype) == ((32, 32, 3), np.uint8)
    assert np.abs(decoded.astype(int) - expected).max() <= (6 if kind == "JPEG" else 1)  # JPEG rounds colours


def test_resizing_smooths_keeps_the_middle_and_stands_upright(cifar):
    def decoded(image, kind="PNG", **options):
        return cifar.decode(encoded(image.astype(np.uint8)[..., None].repeat(3, 2), kind, **options))

    checks = np.indices((352, 352)).sum(0) % 2 * 255
    assert abs(decoded(checks).astype(int) - 127).max() < 40
    _, x = np.indices((600, 1800))
    assert decoded(255 * (x // 600 == 1)).mean() > 245
    exif = Image.Exif()
    exif[274] = 6  # the camera lay on its side: what is right in the file is below
    upright = decoded(255 * (x[:, :600] >= 300), "JPEG", exif=exif)
    assert upright[:14].mean() < 10
    assert upright[18:].mean() > 245


def test_one_percent_of_unreadable_images_is_skipped_and_more_is_refused(cifar, tmp_path):
    root, target, kept = tmp_path / "insects", tmp_path / "insects.zip", np.delete(np.arange(150), [3, 100])
    written = write_tree(root, n=75, splits=("train",))["train"]
    write_tree(root, n=25, splits=("val",))  # 200 in all
    (root / "train" / "ant" / "0003.png").write_bytes(b"")
    (root / "train" / "bee" / "0100.png").write_bytes(encoded(written[100])[:60])
    for path in (root, zipped(root, target)):
        data, _ = load(cifar, path)
        assert [line[:18] for line in data.unreadable] == ["train/ant/0003.png", "train/bee/0100.png"]
        assert np.array_equal(data.train_images, written[kept])
        assert np.array_equal(data.train_labels, kept // 75)
    (root / "val" / "ant" / "0000.png").write_bytes(b"GIF89a, or so it says")
    for path in (root, zipped(root, target)):
        assert "3 of 200 images are unreadable" in refusal(cifar, path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: raw[:50] + b"x" + raw[51:],
        lambda _: encoded(pixels(1, height=100, width=100)[0], "JPEG", quality=1),
        lambda _: encoded(pixels(1, height=60, width=60)[0]),
    ],
    ids=["changed", "too many pixels", "too many bytes"],
)
def test_a_broken_image_or_a_bomb_is_one_unreadable_image(cifar, tmp_path, monkeypatch, spoil):
    monkeypatch.setattr(cifar, "LARGEST_FILE", 8000)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    write_tree(tmp_path / "tree", n=60)
    image = tmp_path / "tree" / "train" / "ant" / "0007.png"
    image.write_bytes(spoil(image.read_bytes()))
    data, _ = load(cifar, zipped(tmp_path / "tree", tmp_path / "insects.zip"))
    assert [line.partition(":")[0] for line in data.unreadable] == ["train/ant/0007.png"]


def test_names_that_lead_out_of_a_zip_are_no_images(cifar, tmp_path):
    write_tree(tmp_path / "tree")
    path = zipped(tmp_path / "tree", tmp_path / "insects.zip", "insects/")
    with zipfile.ZipFile(path, "a") as archive:
        for name in ("../train/ant/", "/train/ant/", "__MACOSX/train/ant/", "train/../ant/"):
            archive.writestr(name + "x.png", b"nothing")
    data, _ = load(cifar, path)
    assert (len(data.train_images), data.classes, data.unreadable) == (6, ["ant", "bee"], [])


@examples
@given(place=st.floats(0, 0.999), change=st.binary(max_size=12))
def test_a_zip_cut_or_changed_anywhere_is_refused_or_read(cifar, tmp_path_factory, place, change):
    folder = tmp_path_factory.mktemp("cut")
    write_tree(folder / "tree")
    path = zipped(folder / "tree", folder / "data.zip")
    raw = path.read_bytes()
    start = int(place * len(raw))
    path.write_bytes(raw[:start] + change + (raw[start + len(change) :] if change else b""))
    with contextlib.suppress(cifar.BadInput):
        assert load(cifar, path)[0].train_images.dtype == np.uint8


@pytest.mark.parametrize(
    ("more", "less", "told"),
    [
        ({"train/wasp/1.png": b"broken", "test/wasp/1.png": encoded(pixels(1)[0])}, [], "train/wasp/1.png"),
        ({}, ["train/bee", "test/bee"], "found 60 images in"),
    ],
    ids=["broken class", "one class"],
)
def test_class_folders_without_an_image_are_refused(cifar, tmp_path, more, less, told):
    write_tree(tmp_path / "tree", n=60)
    for name, content in more.items():
        (tmp_path / "tree" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(content)
    for name in less:
        shutil.rmtree(tmp_path / "tree" / name)
    for path in (tmp_path / "tree", zipped(tmp_path / "tree", tmp_path / "tree.zip")):
        assert told in refusal(cifar, path)


@pytest.mark.parametrize("name", ["gone", "notes.txt", "notes.zip", ARCHIVE, "folder"])
def test_a_path_without_known_data_is_refused(cifar, tmp_path, name):
    (tmp_path / "folder").mkdir()
    for file in ("notes.txt", "notes.zip", ARCHIVE):
        (tmp_path / file).write_text("x", encoding="utf-8")
    assert f"{tmp_path / name}" in refusal(cifar, tmp_path / name)


@pytest.mark.parametrize("named", ["the batches", "their folder", "the archive", "its folder"])
def test_the_official_form_is_read_and_nothing_is_written_beside_it(cifar, tmp_path, official, named):
    place = tmp_path / "mount"
    path = official(place, "batches" if named in ("the batches", "their folder") else "archive")
    before = sorted(place.rglob("*"))
    for _ in range(2):
        data, notices = load(cifar, path if named.startswith("the ") else place, tmp_path / "data")
    assert sorted(place.rglob("*")) == before
    assert (tmp_path / "data" / FOLDER).is_dir() == path.is_file()
    assert (data.name, data.classes, data.synthetic, notices) == ("cifar10", NAMES, False, [])
    assert np.array_equal(data.train_images, np.concatenate([pixels(20, seed) for seed in range(5)]))
    assert np.array_equal(data.val_images, pixels(20, 5))
    assert data.train_labels.tolist() == [i % 10 for i in range(100)]
    assert data.train_images.flags.c_contiguous


@pytest.mark.parametrize(
    "content", ["", "].", "cos\nmkdir\n(S'{}'\ntR."], ids=["empty", "a list", "runs code"]
)
def test_another_batch_than_the_published_is_never_unpickled(cifar, tmp_path, official, content):
    (official(tmp_path / "mount") / "data_batch_3").write_text(content.format(tmp_path / "ran"))
    assert FOLDER in refusal(cifar, tmp_path / "mount")
    assert load(cifar, "auto", tmp_path / "mount", size=10)[0].synthetic
    assert not (tmp_path / "ran").exists()
    official(tmp_path / "mount", "archive")  # as where a killed run had half unpacked it
    assert load(cifar, "auto", tmp_path / "mount")[0].name == "cifar10"


def test_an_archive_that_is_cut_or_cannot_be_unpacked_is_refused(cifar, tmp_path, official):
    path = official(tmp_path / "mount", "archive")
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    assert str(tmp_path / "file") in refusal(cifar, path, tmp_path / "file")
    path.write_bytes(path.read_bytes()[:5000])
    assert ARCHIVE in refusal(cifar, path, tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("choice", ["auto", "cifar10"])
@pytest.mark.parametrize("place", ["slug", "datasets/owner/slug", "datasets/owner/slug/inner"])
@pytest.mark.parametrize("form", ["batches", "archive"])
def test_kaggle_inputs_are_searched_in_both_places(cifar, tmp_path, official, choice, place, form):
    write_tree(cifar.KAGGLE_INPUT / "insects")
    official(cifar.KAGGLE_INPUT / place, form)
    assert len(load(cifar, choice, tmp_path / "data")[0].train_images) == 100


def test_cifar10_is_known_by_its_classes_in_folders_and_zips(cifar, tmp_path):
    write_tree(tmp_path / "a" / "tree", classes=NAMES, n=1)
    zipped(tmp_path / "a" / "tree", tmp_path / "CIFAR10.zip")
    for folder in (tmp_path / "a", tmp_path):
        assert load(cifar, "cifar10", folder)[0].name == "cifar10"


def test_a_search_is_bounded_and_ends_in_links_that_lead_back(cifar, tmp_path, monkeypatch, official):
    for index in range(3):
        (tmp_path / f"a{index}").symlink_to(tmp_path, target_is_directory=True)
    write_tree(tmp_path / "b", classes=[f"class-{index}" for index in range(30)], n=1)  # not looked into
    official(tmp_path / "c" / "d")
    assert load(cifar, "auto", tmp_path)[0].name == "cifar10"
    asked = []
    monkeypatch.setattr(cifar, "SEARCH_FOLDERS", 25)
    assert cifar.search(tmp_path, asked.append) is None
    assert len(asked) == 25
    assert not {"train", "test"} & {path.name for path in asked}


@pytest.fixture
def server(cifar, monkeypatch, tmp_path, official):
    """`server(kind)` gives CIFAR-10 the address of a server; the kinds differ in how they fail."""
    body, release = official(tmp_path / "served", "archive").read_bytes(), threading.Event()
    sent = {"wrong": body[::-1], "cut": body[:1000], "stall": body[:1000]}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            kind = self.path.split("/")[1]
            if kind == "silent":
                release.wait(10)
            self.send_response(404 if kind == "missing" else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(OSError):  # the program hangs up after a first look
                self.wfile.write(sent.get(kind, body))
                release.wait(10 if kind == "stall" else 0)

    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.daemon_threads = True
    threading.Thread(target=made.serve_forever, daemon=True).start()
    monkeypatch.setattr(Handler, "log_message", lambda *_: None)
    monkeypatch.setattr(cifar, "PROBE_SECONDS", 1.0)
    monkeypatch.setattr(cifar, "STALL_SECONDS", 0.4)
    address = f"http://127.0.0.1:{made.server_address[1]}"
    yield lambda kind: monkeypatch.setattr(cifar, "CIFAR10_URL", f"{address}/{kind}/{ARCHIVE}")
    release.set()
    made.shutdown()
    made.server_close()
    assert socket.getdefaulttimeout() is None


def test_a_download_is_checked_kept_and_not_repeated(cifar, tmp_path, server):
    server("good")
    data, notices = load(cifar, "cifar10", tmp_path / "data")
    assert (data.name, len(data.train_images), len(notices)) == ("cifar10", 100, 1)
    server("missing")
    assert load(cifar, "auto", tmp_path / "data")[1] == []


@pytest.mark.parametrize("kind", ["wrong", "missing", "silent", "cut", "stall"])
def test_auto_goes_on_with_shapes_where_a_download_fails(cifar, tmp_path, server, kind):
    server(kind)
    data, notices = load(cifar, "auto", tmp_path / "data", size=10)
    assert (data.synthetic, len(notices)) == (True, 2 if kind in ("silent", "missing") else 3)
    assert notices[-2].startswith("CIFAR-10 could not be downloaded: ")
    assert ("time" in notices[-2].lower()) == (kind in ("silent", "stall"))
    assert notices[-1].startswith("NO CIFAR-10, so SYNTHETIC `shapes`")
    server("good")  # what was cut short is no hindrance
    assert load(cifar, "auto", tmp_path / "data")[0].name == "cifar10"


def test_a_missing_cifar10_is_refused_with_where_it_was_looked_for(cifar, tmp_path):
    message = refusal(cifar, "cifar10", tmp_path / "data")
    for told in (tmp_path / "data", cifar.KAGGLE_INPUT, ARCHIVE, cifar.KAGGLE_DATA, "cifar10 fetch"):
        assert str(told) in message


def test_real_cifar10_in_part(cifar, real_cifar):
    data, _ = load(cifar, "cifar10", real_cifar.parent, size=1000)
    assert (data.name, data.classes, data.unreadable) == ("cifar10", NAMES, [])
    assert np.bincount(data.train_labels).tolist() == [100] * 10
    assert np.bincount(data.val_labels).tolist() == [1000] * 10
