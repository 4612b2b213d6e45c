"""`python -m data_setup`: what it fetches, makes, finds and packs, what it refuses, and what a kill, a full
disk, a bad mirror or a hostile archive does to it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import put
from PIL import Image

from data_setup import __main__ as command_line
from data_setup import check, cifar10, files, images, make, pack

ROOT = Path(__file__).parents[1]
WNIDS = ["n01440764", "n01443537", "n02102040"]
pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture
def run(capsys):
    """Runs a command in this process; returns its report, with what it said meanwhile as "said"."""

    def call(*arguments, status=0):
        capsys.readouterr()
        found = command_line.main([*map(str, arguments), "--json"])
        out, said = capsys.readouterr()
        assert found == status, out + said
        return json.loads(out or "{}") | {"said": said}

    return call


@pytest.fixture
def refused(run):
    """Runs a command that must be refused; returns the sentence."""
    return lambda *arguments: run(*arguments, status=2)["error"]


def forked(line, prepare):
    """Runs a command in a forked child, after `prepare()`; returns its exit status, -9 if killed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            prepare()
            status = command_line.main(list(map(str, line)))
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(count):
    """From now on, the `count`-th file to reach the disk, or its name, kills this process instead."""
    calls = iter(range(1, count + 1))

    def call(function, *arguments, **keywords):
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **keywords)

    os.fsync, os.replace = functools.partial(call, os.fsync), functools.partial(call, os.replace)


def jpeg(seed, width=40, height=30):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "JPEG")
    return buffer.getvalue()


def write_tree(root, places=("train", "val"), counts=(6, 2)):
    """Class folders of JPEGs that all differ, in each of `places`."""
    for seed, (place, count) in enumerate(zip(places, counts, strict=True)):
        for label, key in enumerate(("ant", "bee")):
            for number in range(count):
                content = jpeg(number + 1000 * label + 100_000 * seed, 40 + number, 30 + label)
                put(root / place / key / f"{number}.jpg", content)
    return root


def contents(folder):
    """Every file below a folder, and what is in it."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def zipped(tree, **others):
    """The same in a .zip beside it, with other members after them."""
    path = tree.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (contents(tree) | others).items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("words", ["", "cifar10", "imagenet100 make", "folder check"])
def test_help_shows_an_example_at_every_level(capsys, words):
    with pytest.raises(SystemExit) as stop:
        command_line.main([*words.split(), "--help"])
    assert not stop.value.code
    assert f"    python -m data_setup {words}".rstrip() in capsys.readouterr().out


def test_it_runs_as_a_module_without_torch_and_without_the_programs(tmp_path):
    line = ["folder", "pack", str(write_tree(tmp_path / "in")), "--side", "8", "--to", str(tmp_path / "out")]
    code = f"import sys, data_setup.__main__ as m; m.main({line}); "
    code += "sys.exit(not {'torch', 'cifar10_ast', 'imagenet100_ast'}.isdisjoint(sys.modules))"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    line = [sys.executable, "-m", "data_setup", "folder", "check", str(tmp_path / "in")]
    found = subprocess.run(line, cwd=ROOT, capture_output=True, check=True)
    assert b"train: 12 images, 6 a class" in found.stdout


def test_what_cannot_be_read_or_written_is_one_sentence(run, refused, tmp_path):
    source = write_tree(tmp_path / "in")
    (tmp_path / "file").write_text("no folder")
    for target in (tmp_path / "file" / "out", "/proc/nowhere"):  # the second is read-only even for root
        assert f"{target}: " in refused(*pack_line(source, target))
    found = run("folder", "check", tmp_path / "no\nwhere", status=2)
    assert found["said"] == f"data_setup: {found['error']}\n"
    assert "where: expected a folder or a whole .zip" in found["error"]


def test_ctrl_c_gives_130_and_the_same_command_goes_on(run, tmp_path, monkeypatch):
    line = pack_line(write_tree(tmp_path / "in"), tmp_path / "out")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    with monkeypatch.context() as patch:
        patch.setattr(pack, "finish", lambda *_: signal.raise_signal(signal.SIGINT))
        assert "same command" in run(*line, status=130)["said"]
    signal.signal(signal.SIGINT, before)
    assert "0 of 16 images to pack" in run(*line)["said"]


# CIFAR-10


@pytest.fixture
def mirrors(monkeypatch):
    """A server whose mirrors differ in how they fail; `use(*kinds)` points `fetch` at them."""
    archive = np.random.default_rng(0).bytes(60_000)
    asked, outlasted, release = [], [], threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            kind, span = self.path.strip("/"), self.headers["Range"].removeprefix("bytes=")
            start = 0 if kind == "whole" else int(span.partition("-")[0])
            if span != "0-0":  # with which `fetch` looks who is there
                asked.append((kind, int(span[:-1])))
            if kind == "silent":
                outlasted.extend([] if release.wait(10) else [kind])
            if kind == "missing" or start >= len(archive):
                self.send_error(404 if kind == "missing" else 416)
                return
            body = (archive[::-1] if kind == "wrong" else archive)[start:]
            self.send_response(200 if kind == "whole" else 206)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            body = body[: len(body) // {"stall": 3, "cut": 2}.get(kind, 1)]
            step = 50 if kind == "crawl" else len(body)
            with contextlib.suppress(OSError):  # who asks hangs up, as it should on a slow mirror
                for index in range(0, len(body), step):
                    self.wfile.write(body[index : index + step])
                    if kind == "crawl" and release.wait(0.05):
                        return
                if kind == "stall" and span != "0-0":
                    outlasted.extend([] if release.wait(10) else [kind])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(cifar10, "MD5", hashlib.md5(archive).hexdigest())
    monkeypatch.setattr(cifar10, "CONNECT_SECONDS", 1.0)
    monkeypatch.setattr(cifar10, "STALL_SECONDS", 0.4)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    address = f"http://127.0.0.1:{server.server_address[1]}"

    def use(*kinds):
        monkeypatch.setattr(cifar10, "MIRRORS", [f"{address}/{kind}" for kind in kinds])

    yield SimpleNamespace(use=use, asked=asked, archive=archive)
    release.set()
    server.shutdown()
    server.server_close()
    assert not outlasted  # `fetch` leaves a mirror that says nothing; it is not the server that gives up


def test_a_download_is_checked_kept_and_not_repeated(run, refused, tmp_path, mirrors):
    mirrors.use("good")
    target = tmp_path / "cifar-10-python.tar.gz"
    assert [run("cifar10", "fetch", "--to", tmp_path)["downloaded"] for _ in range(2)] == [True, False]
    assert mirrors.asked == [("good", 0)]
    assert list(tmp_path.iterdir()) == [target]
    assert run("cifar10", "check", tmp_path)["problems"] == []
    target.write_bytes(b"mine")
    assert "another file than CIFAR-10" in refused("cifar10", "fetch", "--to", tmp_path)
    assert target.read_bytes() == b"mine"
    assert "get it again" in run("cifar10", "check", target, status=1)["problems"][0]


CASES = [("good", 1000, [1000]), ("good", 60_000, [60_000]), ("whole", 1000, [1000])]
CASES += [("good", b"rubbish", [7, 0]), ("good", b"rubbish" * 10_000, [70_000, 0])]


@pytest.mark.parametrize(("kind", "part", "asked"), CASES)
def test_a_download_goes_on_from_its_part_or_begins_anew(run, tmp_path, mirrors, kind, part, asked):
    mirrors.use(kind)
    content = mirrors.archive[:part] if isinstance(part, int) else part
    (tmp_path / "cifar-10-python.tar.gz.part").write_bytes(content)
    run("cifar10", "fetch", "--to", tmp_path)
    assert [start for _, start in mirrors.asked] == asked
    assert contents(tmp_path) == {"cifar-10-python.tar.gz": mirrors.archive}


@pytest.mark.parametrize("bad", ["wrong", "missing", "silent", "cut", "stall", "crawl"])
def test_a_bad_mirror_is_left_for_the_next(run, tmp_path, mirrors, bad):
    mirrors.use(bad, "good")
    run("cifar10", "fetch", "--to", tmp_path)
    kind, start = mirrors.asked[-1]
    assert kind == "good"
    assert bool(start) == (bad in ("cut", "stall", "crawl"))  # what a slow mirror sent is not fetched again


def test_a_slow_mirror_is_better_than_none(run, refused, tmp_path, mirrors, monkeypatch):
    mirrors.use("wrong", "missing")
    assert re.search(r"/wrong \(sent md5 .*/missing \(HTTP", refused("cifar10", "fetch", "--to", tmp_path))
    assert list(tmp_path.iterdir()) == []
    opener = cifar10.urllib.request.urlopen
    monkeypatch.setattr(cifar10.urllib.request, "urlopen", lambda asked, timeout: opener(asked, timeout=5))
    monkeypatch.setattr(cifar10, "STALL_SECONDS", 1e-6)
    monkeypatch.setattr(cifar10, "SPEEDS", (1e12, 0))
    mirrors.use("good")
    run("cifar10", "fetch", "--to", tmp_path)
    assert [kind for kind, _ in mirrors.asked] == ["wrong", "wrong", "good", "good"]


def test_published_batches_are_known_by_their_md5s(run, tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "train_list", [("data_batch_1", hashlib.md5(b"one").hexdigest())])
    monkeypatch.setattr(CIFAR10, "test_list", [("test_batch", hashlib.md5(b"two").hexdigest())])
    batches = put(tmp_path / "cifar-10-batches-py" / "data_batch_1", b"one").parent
    assert "test_batch is not" in run("cifar10", "check", tmp_path, status=1)["problems"][0]
    put(batches / "test_batch", b"two")
    assert run("cifar10", "check", batches)["problems"] == []


# Making ImageNet-100


def add(tar, name, content=b"", **fields):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in fields.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(content))


def write_tar(path, folder):
    """A tar of the files in a folder, which then goes elsewhere."""
    with tarfile.open(path, "w") as tar:
        for name, content in contents(folder).items():
            add(tar, name, content)
    folder.rename(path.parents[2] / f"old-{folder.name}")


@pytest.fixture
def ilsvrc(tmp_path):
    """A small ILSVRC-2012 in folders, validation images flat; `line` makes the first two of three classes."""
    tree, wanted, pairs = tmp_path / "a" / "b", {}, []
    for label, wnid in enumerate(WNIDS):
        for name in (f"{wnid}_{number}.JPEG" for number in range(3)):
            wanted[f"train/{wnid}/{name}"] = jpeg(len(wanted))
            put(tree / "train" / wnid / name, jpeg(len(wanted) - 1))
        for name in (f"ILSVRC2012_val_{number + 1:08}.JPEG" for number in (2 * label, 2 * label + 1)):
            wanted[f"val/{wnid}/{name}"] = jpeg(len(wanted))
            put(tree / "val" / name, jpeg(len(wanted) - 1))
            pairs.append((name, wnid))
    (tree / "val_labels.txt").write_text("".join(f"{name} {wnid}\n" for name, wnid in pairs))
    wanted = {name: content for name, content in wanted.items() if WNIDS[2] not in name}
    target, listed = tmp_path / "out", tmp_path / "two.txt"
    listed.write_text(f"# mine\n\n{WNIDS[0]} tench, Tinca tinca\n{WNIDS[1]}\tgoldfish\n")
    line = ["imagenet100", "make", "--from", tree, "--to", target, "--classes", listed]
    return SimpleNamespace(tree=tree, target=target, line=line, wanted=wanted, pairs=pairs)


def rearrange(ilsvrc, form):
    """Bring the small ILSVRC-2012 into another of the forms that people have it in."""
    tree = ilsvrc.tree
    if form == "val-folders":
        for name, wnid in ilsvrc.pairs:
            (tree / "val" / wnid).mkdir(exist_ok=True)
            (tree / "val" / name).rename(tree / "val" / wnid / name)
        (tree / "val_labels.txt").unlink()
    elif form == "kaggle":
        (tree / "ILSVRC" / "Data" / "CLS-LOC").mkdir(parents=True)
        for split in ("train", "val"):
            (tree / split).rename(tree / "ILSVRC" / "Data" / "CLS-LOC" / split)
        rows = [f"{name.removesuffix('.JPEG')},{wnid} 1 2 3 4" for name, wnid in ilsvrc.pairs]
        (tree / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]))
        (tree / "val_labels.txt").unlink()
    elif "tars" in form:
        for wnid in WNIDS:
            write_tar(tree / "train" / f"{wnid}.tar", tree / "train" / wnid)
        write_tar(tree / make.VAL_TAR, tree / "val")
        if form == "tars":
            write_tar(tree / make.TRAIN_TAR, tree / "train")


@pytest.mark.parametrize("form", "copy hardlink symlink tars class-tars kaggle val-folders".split())
def test_make_from_every_form_gives_the_same(run, ilsvrc, form):
    how = form if form in make.LINKS else "copy"
    rearrange(ilsvrc, form)
    found = run(*ilsvrc.line, "--how", how)
    assert found["images"] == {"train": 6, "val": 4}
    assert found["problems"][1].startswith("2 classes have not 732 to 1,300 train images")
    assert contents(ilsvrc.target) == ilsvrc.wanted
    one = (ilsvrc.target / "train" / WNIDS[0] / f"{WNIDS[0]}_0.JPEG").lstat()
    assert (os.path.stat.S_ISLNK(one.st_mode), one.st_nlink == 2) == (how == "symlink", how == "hardlink")


def test_make_keeps_names_of_classes_and_what_exists(run, refused, ilsvrc, tmp_path):
    (tmp_path / "list.json").write_text(json.dumps({wnid: f"name of {wnid}, and more" for wnid in WNIDS}))
    run(*ilsvrc.line[:-1], tmp_path / "list.json")
    assert images.Images(ilsvrc.target).classes == [f"name of {wnid}" for wnid in WNIDS]
    before = contents(ilsvrc.target)
    assert "holds train" in refused(*ilsvrc.line)
    assert contents(ilsvrc.target) == before


@pytest.mark.parametrize("form", ["val-folders", "tars"])
def test_make_goes_on_after_a_kill_at_any_rename(ilsvrc, form):
    """Killed at the 1st, 2nd, ... file that would get its name, until one make gets through."""
    rearrange(ilsvrc, form)
    for count in range(1, 100):
        status = forked(ilsvrc.line, functools.partial(die_at, count))
        if status != -signal.SIGKILL:
            break
    assert (status, count > 5) == (0, True)
    assert contents(ilsvrc.target) == ilsvrc.wanted


def test_what_an_unfinished_make_put_wrongly_is_taken_out(run, ilsvrc, tmp_path):
    (tmp_path / "wrong.txt").write_text("\n".join(WNIDS[1:]))
    (tmp_path / "labels.txt").write_text(f"ILSVRC2012_val_00000001.JPEG {WNIDS[1]}\n")
    line = [*ilsvrc.line[:-1], tmp_path / "wrong.txt", "--val-labels", tmp_path / "labels.txt"]
    run(*line, status=2)  # no validation image of the third class
    assert f"make.part/val/{WNIDS[1]}/ILSVRC2012_val_00000001.JPEG" in contents(ilsvrc.target)
    run(*ilsvrc.line)
    assert contents(ilsvrc.target) == ilsvrc.wanted


def test_hostile_tars_write_nothing_but_plain_images_inside(run, ilsvrc, tmp_path, monkeypatch):
    rearrange(ilsvrc, "tars")
    monkeypatch.setattr(make, "LARGEST_IMAGE", 10_000)
    with tarfile.open(ilsvrc.tree / make.TRAIN_TAR, "w") as archive:
        for wnid in WNIDS[:2]:
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                add(inner, f"{wnid}_1.JPEG", jpeg(1))
                for before in ("/tmp/", "../../../", "..\\", "./", "x/"):
                    add(inner, f"{before}{wnid}_2.JPEG", b"elsewhere")
                for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
                    add(inner, f"{wnid}_{ord(kind)}.JPEG", type=kind, linkname="/etc/passwd")
                add(inner, f"{wnid}_7.JPEG", bytes(20_000))
                for name in (f"{wnid}_8.jpeg", "n09999999_1.JPEG", f"{wnid}_9.JPEG\n"):
                    add(inner, name, b"another form")
            add(archive, f"{wnid}.tar", buffer.getvalue())
        add(archive, "../evil.tar", b"x")
        add(archive, f"{WNIDS[0]}.tar", type=tarfile.SYMTYPE, linkname="/etc/passwd")
    before = contents(tmp_path).keys()
    run(*ilsvrc.line)
    new = contents(tmp_path).keys() - before
    assert {name for name in new if "/val/" not in name} == {f"out/train/{w}/{w}_1.JPEG" for w in WNIDS[:2]}
    assert all(name.startswith("out/") for name in new)


@pytest.mark.parametrize("keep", [0, 700, 4000, 8000])
@pytest.mark.parametrize("rest", [b"", b"\xff" * 20_000, b"\x1f\x8b"])
@pytest.mark.parametrize("name", [make.TRAIN_TAR, make.VAL_TAR])
def test_damaged_tars_are_refused(refused, ilsvrc, keep, rest, name):
    rearrange(ilsvrc, "tars")
    path = ilsvrc.tree / name
    path.write_bytes(path.read_bytes()[:keep] + rest)
    assert re.search(rf"{name}.*: expected a whole, uncompressed tar", refused(*ilsvrc.line))
    assert not (ilsvrc.target / "train").exists()


def test_what_make_needs_is_said(refused, ilsvrc, tmp_path):
    tree, line = ilsvrc.tree, ["imagenet100", "make", *ilsvrc.line[4:], "--from"]
    for inside in (tree / "train", tree / "val" / "mine"):
        assert "is or lies in what is read" in refused(*ilsvrc.line, "--to", inside)
    assert "no such folder" in refused(*line, tree / "nowhere")
    assert "not found in it" in refused(*line, tree / "val")
    (tree / "train" / WNIDS[0]).rename(tree / "train" / "n00000000")
    assert f"no train image of {WNIDS[0]}" in refused(*line, tree)
    (tree / "train" / "n00000000").rename(tree / "train" / WNIDS[0])
    (tree / "val_labels.txt").write_text("490\n361\n171\n")
    assert "are no wnids" in refused(*line, tree)
    (tree / "val_labels.txt").unlink()
    assert f"no val image of {WNIDS[0]}" in refused(*line, tree, "--to", tmp_path / "new")
    for text in ("tench\ntrout", WNIDS[0], "", "n014407640\nn01443537", "\xff\xfe\0"):
        (tmp_path / "two.txt").write_text(text, encoding="latin1")
        assert f"--classes {tmp_path}/two.txt: " in refused(*line, tree)
    assert len(make.read_classes(make.CMC)) == 100


LAYOUTS = ["train val", "Training validation", "train val test", "train.X1 train.X2 val.X"]
LAYOUTS += ["deep/train deep/test", ".", "deep"]


@pytest.mark.parametrize("packing", ["folder", "zip"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_program_finds_the_same_samples_also_packed(run, imagenet, tmp_path, layout, packing):
    places = layout.split()
    tree = write_tree(tmp_path / "in", places, (9, 2, 3)[: len(places)])
    (tree / places[0] / "ant" / "notes.txt").write_text("no image")
    (tree / places[0] / ".hidden").mkdir()
    above = places[0].rpartition("/")[0] if len(places) > 1 else places[0]
    (tree / above / "Labels.json").write_text(json.dumps({"ant": "crane, bird", "bee": "crane"}))
    path = zipped(tree) if packing == "zip" else tree
    run(*pack_line(path, tmp_path / "out"))
    found = images.Images(path)
    for place in (path, tmp_path / "out"):
        words = {"weights": "none", "model": "resnet18", "image_size": 32, "out": "runs"}
        data = imagenet.load_data(imagenet.Settings(data=str(place), **words), print)
        assert data.classes == found.classes == ["crane (ant)", "crane (bee)"]
        assert data.train_labels.tolist() == found.labels["train"].tolist()
        assert data.val_labels.tolist() == found.labels["val"].tolist()
        if place == path:
            assert [list(data.train_images.names), list(data.val_images.names)] == list(found.names.values())


def test_bad_folders_are_refused_by_name(refused, tmp_path):
    tree, check = write_tree(tmp_path / "in"), ["folder", "check"]
    (tree / "Labels.json").write_text("[1, 2]")
    assert "Labels.json: expected {folder: name}" in refused(*check, tree)
    (tree / "Labels.json").unlink()
    assert "6 images in no folder" in refused(*check, tree / "train" / "ant")
    assert "1 images in ant/, 1 images in bee/" in refused(*check, write_tree(tmp_path / "few", [""], [1]))
    assert "--val-fraction 1.5: expected" in refused(*check, tree / "train", "--val-fraction", 1.5)
    path = zipped(tree)
    path.write_bytes(path.read_bytes()[:-100])
    assert "whole .zip" in refused(*check, path)


def test_check_finds_each_kind_of_problem(run, capsys, tmp_path):
    source = write_tree(tmp_path / "in", counts=(9, 2))
    found = run("folder", "check", source)
    assert found["problems"] == []
    assert found["counts"] == {"train": {"ant": 9, "bee": 9}, "val": {"ant": 2, "bee": 2}}
    assert found["short_side"] == {"min": 30, "median": 30, "max": 31}
    train, val, tall = source / "train", source / "val", jpeg(77, 40, 400)
    broken = [b"", jpeg(1)[:300], b"<html>", tall[: int(0.8 * len(tall))]]  # the last whole in its centre
    for number, content in enumerate(broken):
        (train / "ant" / f"{number}.jpg").write_bytes(content)
    (train / "ant" / "copy.jpg").write_bytes((train / "ant" / "4.jpg").read_bytes())
    (val / "bee" / "leak.jpg").write_bytes((train / "bee" / "4.jpg").read_bytes())
    (train / "bee" / "other.jpg").write_bytes((train / "ant" / "5.jpg").read_bytes())
    found = run("cifar10", "check", source, status=1)
    assert [item["file"][-5:] for item in found["unreadable"]] == ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]
    assert found["duplicates"] == [["train/ant/4.jpg", "train/ant/copy.jpg"]]
    assert found["leakage"] == [["train/bee/4.jpg", "val/bee/leak.jpg"]]
    assert found["conflicting_labels"] == [["train/ant/5.jpg", "train/bee/other.jpg"]]
    assert "refuses more than 1 %" in found["problems"][0]
    assert found["problems"][4] == "2 classes, cifar10 has 10"
    assert command_line.main(["folder", "check", str(source)]) == 1
    assert capsys.readouterr().out.count("PROBLEM: ") == 4


def test_check_names_classes_what_it_saw_and_the_next_command(capsys, tmp_path):
    tree = write_tree(tmp_path / "my photos", counts=(3, 1))
    Image.fromarray(np.full((30, 30), 4000, np.uint16)).save(tree / "train" / "ant" / "deep.png")
    put(tree / "train" / "ant" / "a.heic", b"")
    assert command_line.main(["folder", "check", str(tree), "--workers", "1"]) == 0
    said = capsys.readouterr().out
    for told in ("bee 3, ant 4", "ant 1, bee 1", "more than 8 bits: 1 images", "left out: 1 .heic"):
        assert told in said
    assert said.endswith(f"train on it: python standalone/imagenet100_ast.py --data '{tree}'\n")
    for number in range(30):
        write_tree(tree / "train" / f"kind {number}", [""], [1])
        put(tree / "val" / f"kind {number}" / "1.jpg", jpeg(number))
    command_line.main(["folder", "check", str(tree)])
    assert ", ..., " in capsys.readouterr().out


def test_a_hostile_zip_writes_nothing_and_bombs_are_unreadable_images(run, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "LARGEST_FILE", 100_000)
    names = ("../evil.jpg", "/evil.jpg", "train/ant/../../../evil.jpg", "C:\\evil.jpg")
    bombs = dict.fromkeys(("train/ant/bomb.jpg", "val/bee/bomb.jpg"), bytes(10_000_000))
    others = dict.fromkeys(names, jpeg(1)) | bombs
    archive = zipped(write_tree(tmp_path / "in"), **others)
    before = contents(tmp_path)
    found = run("folder", "check", archive, status=1)
    reason = "10,000,000 bytes, more than 100,000"
    assert found["unreadable"] == [{"file": name, "reason": reason} for name in bombs]
    assert found["images"] == {"train": 13, "val": 5}
    assert len(found["problems"]) == 1
    assert contents(tmp_path) == before


def test_after_an_interrupt_nothing_else_is_begun(capsys, tmp_path, monkeypatch):
    """Ctrl-C at the first of many images: no more are looked at than threads had in hand."""
    source, looked = write_tree(tmp_path / "in", counts=(60, 60)), []

    def stopped(*_):
        raise KeyboardInterrupt

    def look(*_):
        looked.append(threading.get_ident())
        return stopped() if len(looked) == 1 else time.sleep(0.1)

    monkeypatch.setattr(check, "BLOCK", 1)
    monkeypatch.setattr(check, "look", look)
    assert command_line.main(["folder", "check", str(source), "--workers", "2"]) == 130
    assert "stopped; the same command goes on" in capsys.readouterr().err
    assert len(looked) <= 3


# Packing


def pack_line(source, target, *flags):
    return ["folder", "pack", str(source), "--to", str(target), "--side", "16", *flags]


def packed(folder):
    """The files of a pack, less the one that tells of its source and its date."""
    found = contents(folder)
    assert sorted(found) == sorted(pack.OUTPUTS)
    return {name: found[name] for name in pack.OUTPUTS[:-1]}


def test_a_pack_holds_the_upright_centre_of_every_format(run, tmp_path):
    pixels, exif = np.zeros((60, 120, 3), dtype=np.uint8), Image.Exif()
    pixels[:, 40:60], pixels[:, 60:80] = (200, 40, 40), (40, 40, 200)  # left and right of the centre
    upright = Image.fromarray(pixels)
    exif[0x0112] = 6  # turn it right to see it upright
    source = write_tree(tmp_path / "in", counts=(1, 1))
    ant = source / "val" / "ant"
    upright.save(ant / "a.png")
    upright.resize((1200, 600)).save(ant / "b.jpg", quality=95)  # decoded at an eighth
    upright.transpose(Image.Transpose.ROTATE_90).save(ant / "c.jpg", exif=exif, quality=95)
    upright.convert("P").save(ant / "d.gif")
    upright.save(ant / "e.webp", lossless=True)
    upright.convert("CMYK").save(ant / "f.jpg", quality=95)
    grey = np.repeat(np.linspace(0, 65535, 60).astype(np.uint16)[:, None], 60, axis=1)
    Image.fromarray(grey).save(ant / "g.png")
    run(*pack_line(source, tmp_path / "out"))
    found = np.load(tmp_path / "out" / "val_images.npy", mmap_mode="r")
    assert (found.dtype, found.shape) == (np.uint8, (9, 16, 16, 3))
    for picture in found[1:7].astype(int):
        assert np.abs(picture[:, 3:7] - (200, 40, 40)).max() < 30
        assert np.abs(picture[:, 9:13] - (40, 40, 200)).max() < 30
    assert np.abs(found[7, :, 8, 0] - np.linspace(8, 247, 16)).max() < 10


@pytest.mark.parametrize("block", [pack.BLOCK_BYTES, 1], ids=["many in a block", "alone in its block"])
def test_unreadable_images_leave_no_hole_up_to_one_percent(run, refused, tmp_path, monkeypatch, block):
    monkeypatch.setattr(pack, "BLOCK_BYTES", block)
    source, bad = write_tree(tmp_path / "in", counts=(60, 2)), os.fsdecode(b"train/ant/5\xff.jpg")  # no text
    (source / bad).write_bytes(b"damaged")
    found = run(*pack_line(source, tmp_path / "out"))
    assert [item["file"] for item in found["unreadable"]] == [bad]
    assert found["counts"]["train"] == {"ant": 60, "bee": 60}
    pictures = np.load(tmp_path / "out" / "train_images.npy")
    assert np.load(tmp_path / "out" / "train_labels.npy").tolist() == 60 * [0] + 60 * [1]
    names = [name for name in images.Images(source).names["train"] if name != bad]
    for name, picture in zip(names, pictures, strict=True):
        assert np.array_equal(picture, images.decode((source / name).read_bytes(), 16)[0])
    (source / bad).rename(source / "train" / "ant" / "7.jpg")
    (source / "train" / "ant" / "8.jpg").write_bytes(b"damaged")
    sentence = refused(*pack_line(source, tmp_path / "other"))
    assert "2 of 124 images are unreadable, the first is train/ant/7.jpg (cannot identify" in sentence
    assert os.listdir(tmp_path / "other") == []
    few = write_tree(tmp_path / "few", counts=(100, 1))
    (few / "val" / "bee" / "0.jpg").write_bytes(b"damaged")
    assert "no val image of bee" in refused(*pack_line(few, tmp_path / "other"))


def test_pack_keeps_what_exists_and_needs_room(run, refused, tmp_path, monkeypatch):
    source, out = write_tree(tmp_path / "in"), tmp_path / "out"
    mine = put(tmp_path / "mine" / "train_labels.npy", b"mine")
    assert "holds train_labels.npy" in refused(*pack_line(source, mine.parent))
    assert contents(mine.parent) == {"train_labels.npy": b"mine"}
    run(*pack_line(source, out))
    before = contents(out)
    assert "packed already" in run(*pack_line(source, out))["said"]
    assert "holds train_images.npy" in refused(*pack_line(source, out, "--side", 9))
    assert contents(out) == before
    assert "is or lies in what is read" in refused(*pack_line(source, source / "packed"))
    assert "--side 40: expected at most 30, the images' median" in refused(
        *pack_line(source, tmp_path / "large", "--side", 40)
    )
    run(*pack_line(source, tmp_path / "large", "--side", 40, "--enlarge"))
    assert "--side 0: expected 1 to" in refused(*pack_line(source, tmp_path / "other", "--side", 0))
    with files.locked(tmp_path / "held"):
        assert "another process" in refused(*pack_line(source, tmp_path / "held"))
    monkeypatch.setattr(pack.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert "too little room" in refused(*pack_line(source, tmp_path / "other"))
    assert list(contents(tmp_path / "other")) == ["pack.part/progress.json"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A source with one damaged image, and its pack that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    source = write_tree(folder / "in", counts=(55, 5))
    (source / "train" / "bee" / "3.jpg").write_bytes(b"damaged")
    assert command_line.main(pack_line(source, folder / "out")) == 0
    return source, packed(folder / "out")


def killed_at(count, source, target):
    """Packs in small steps, with a commit after each, and is killed at the `count`-th of them."""

    def prepare():
        pack.BLOCK_BYTES, pack.COMMIT_SECONDS = 40 * 16 * 16 * 3, 0
        die_at(count)

    return forked(pack_line(source, target), prepare)


def test_killed_at_any_fsync_or_rename_and_resumed_gives_the_same_bytes(run, tmp_path, undisturbed):
    source, wanted = undisturbed
    for count in range(1, 100):
        target = tmp_path / str(count)
        if (status := killed_at(count, source, target)) != -signal.SIGKILL:
            break
        run(*pack_line(source, target))
        assert packed(target) == wanted
    assert (status, count > 20) == (0, True)


def test_a_killed_pack_goes_on_only_with_what_it_began(run, refused, tmp_path):
    source, target = write_tree(tmp_path / "in", counts=(80, 2)), tmp_path / "out"
    assert killed_at(10, source, target) == -signal.SIGKILL
    pictures = target / "pack.part" / "train_images.npy"
    whole = pictures.read_bytes()
    pictures.write_bytes(whole[:200])
    assert "shorter than" in refused(*pack_line(source, target))
    pictures.write_bytes(whole + bytes(1_000_000))
    assert f"unfinished pack of {source} at 16 pixels" in refused(*pack_line(source, target, "--side", 24))
    run(*pack_line(source, target))
    run(*pack_line(source, tmp_path / "clean"))
    assert packed(target) == packed(tmp_path / "clean")
    assert killed_at(10, source, tmp_path / "new") == -signal.SIGKILL
    (source / "train" / "ant" / "1.jpg").write_bytes(jpeg(999))
    assert "164 of 164 images to pack" in run(*pack_line(source, tmp_path / "new"))["said"]
    assert packed(tmp_path / "new") != packed(tmp_path / "clean")


def test_a_full_disk_is_one_sentence_and_both_go_on_later(run, tmp_path, undisturbed, ilsvrc):
    source, wanted = undisturbed
    for line, size in ((pack_line(source, tmp_path / "packed"), 60_000), (ilsvrc.line, 1000)):
        limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (size, size))
        whole = [sys.executable, "-m", "data_setup", *line]
        found = subprocess.run(whole, cwd=ROOT, preexec_fn=limit, capture_output=True, check=False)
        assert found.returncode == 2
        assert b"File too large" in found.stderr.splitlines()[-1]
        run(*line)
    assert packed(tmp_path / "packed") == wanted
    assert contents(ilsvrc.target) == ilsvrc.wanted
