"""`python -m data_setup`: what it makes, finds and packs, what it refuses, and what a kill, a full disk or a
hostile archive does to it."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_setup import __main__ as command_line
from data_setup import check, files, make, pack, programs

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
MINI, FULL = DATA / "imagenet100-mini.zip", DATA / "imagenet-fullsize-200.zip"
OUTPUTS = ["train_images.npy", "train_labels.npy", "val_images.npy", "val_labels.npy", "classes.json"]
WNIDS = ["n01440764", "n01443537", "n02102040"]
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


@pytest.fixture
def run(capsys):
    """Runs a command in this process; returns its exit status, standard output and standard error."""

    def call(*arguments):
        capsys.readouterr()
        try:
            status = command_line.main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse's own
            status = stop.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err

    return call


@pytest.fixture
def refused(run):
    """Runs a command that must be refused; returns the sentence, and sees that --json says the same."""

    def call(*arguments):
        status, out, err = run(*arguments)
        assert status == 2, out + err
        assert out == ""
        sentence = err.strip().splitlines()[-1]
        assert sentence.startswith("data_setup: ")
        return sentence

    return call


def forked(work, tmp_path):
    """Runs `work()` in a forked child; returns its exit status, -9 if killed, and its standard error."""
    log = tmp_path / f"log-{time.monotonic_ns()}"
    child = os.fork()
    if child == 0:
        sys.stdout = sys.stderr = log.open("w")
        torch.set_num_threads(1)  # OpenMP's threads do not outlive a fork
        status = 1
        try:
            status = work()
        finally:
            sys.stderr.flush()
            os._exit(status)
    _, waited = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(waited), log.read_text()


def picture(seed, width=40, height=30):
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8), "RGB"
    )


def jpeg(seed, width=40, height=30):
    buffer = io.BytesIO()
    picture(seed, width, height).save(buffer, "JPEG")
    return buffer.getvalue()


def write_tree(root, classes=("ant", "bee"), train=6, val=2, name="{}.jpg"):
    """Class folders of JPEGs that all differ."""
    for split, count in (("train", train), ("val", val)):
        for place, key in enumerate(classes):
            folder = root / split / key
            folder.mkdir(parents=True)
            for number in range(count):
                seed = number + 1000 * place + 100_000 * (split == "val")
                (folder / name.format(number)).write_bytes(jpeg(seed, 40 + number, 30 + place))
    return root


def contents(folder):
    """SHA-256 of every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def packed_bytes(folder):
    return {name: (folder / name).read_bytes() for name in OUTPUTS}


# The command line


def test_help_shows_examples_at_every_level(run):
    for words in (
        [],
        ["cifar10"],
        ["imagenet100"],
        ["folder"],
        ["imagenet100", "make"],
        ["cifar10", "fetch"],
    ):
        status, out, _ = run(*words, "--help")
        assert status == 0
        assert f"python -m data_setup {' '.join(words)}".strip() in out
        assert max(map(len, out.splitlines())) <= 110
    for name in ("cifar10", "imagenet100", "folder"):
        for command in ("check", "pack"):
            assert f"data_setup {name} {command}" in run(name, command, "--help")[1]


def test_it_runs_as_a_module_and_help_needs_no_torch(tmp_path):
    code = "import sys, data_setup.__main__ as m\n"
    code += "try: m.main(['--help'])\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    write_tree(tmp_path / "in")
    line = [sys.executable, "-m", "data_setup", "folder", "check", str(tmp_path / "in"), "--json"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["images"] == {"train": 12, "val": 4}


def test_an_error_is_one_sentence_also_as_json(run, tmp_path):
    status, out, err = run("folder", "check", tmp_path / "nowhere", "--json")
    assert status == 2
    assert json.loads(out)["error"] in err
    assert "nowhere" in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--side", 0], "--side 0: expected 1 to"),
        (["--workers", 0], "--workers 0: expected 1 to"),
        (["--val-fraction", 1.5], "--val-fraction 1.5"),
    ],
)
def test_numbers_out_of_range_are_refused(refused, tmp_path, flags, words):
    for key in ("ant", "bee"):
        (tmp_path / "in" / key).mkdir(parents=True)
        for number in range(4):
            (tmp_path / "in" / key / f"{number}.jpg").write_bytes(jpeg(number))
    assert words in refused("folder", "pack", tmp_path / "in", "--to", tmp_path / "out", *flags)


def test_ctrl_c_gives_130_and_leaves_what_can_be_resumed(run, tmp_path, monkeypatch):
    source = write_tree(tmp_path / "in", train=60)
    monkeypatch.setattr(pack, "BLOCK_BYTES", 10 * 8 * 8 * 3)
    monkeypatch.setattr(pack, "COMMIT_SECONDS", 0)
    commit, commits = pack.Packer.commit, []

    def interrupted(*arguments):
        commits.append(commit(*arguments))
        if len(commits) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(pack.Packer, "commit", interrupted)
    line = ["folder", "pack", source, "--side", 8, "--to", tmp_path / "out"]
    status, _, err = run(*line)
    assert status == 130
    assert "same command" in err
    status, _, err = run(*line)
    assert status == 0
    assert "going on after 30 of" in err


# CIFAR-10


def test_fetch_uses_the_programs_own_download(run, refused, cifar, tmp_path, monkeypatch):
    content = b"cifar"
    monkeypatch.setattr(cifar, "CIFAR10_MD5", hashlib.md5(content).hexdigest())
    calls = []

    def download(target, patient, say):
        calls.append((target, patient))
        target.write_bytes(content)

    monkeypatch.setattr(cifar, "download", download)
    status, out, _ = run("cifar10", "fetch", "--to", tmp_path / "new", "--json")
    target = tmp_path / "new" / "cifar-10-python.tar.gz"
    assert status == 0
    assert json.loads(out)["downloaded"]
    assert calls == [(target, True)]
    assert not json.loads(run("cifar10", "fetch", "--to", tmp_path / "new", "--json")[1])["downloaded"]
    target.write_bytes(b"mine")
    assert "--force" in refused("cifar10", "fetch", "--to", tmp_path / "new")
    assert target.read_bytes() == b"mine"
    assert len(calls) == 1
    assert run("cifar10", "fetch", "--to", tmp_path / "new", "--force")[0] == 0
    monkeypatch.setattr(cifar, "download", lambda *_: {"https://one.example/": "no answer"})
    target.unlink()
    assert "https://one.example/ (no answer)" in refused("cifar10", "fetch", "--to", tmp_path / "new")


def cifar_archive(path, rows=12):
    """A tiny cifar-10-python.tar.gz as published."""
    import pickle

    names = [f"data_batch_{index}" for index in range(1, 6)] + ["test_batch"]
    with tarfile.open(path, "w:gz") as archive:
        for seed, name in enumerate(names):
            data = np.random.default_rng(seed).integers(0, 256, (rows, 3072), dtype=np.uint8)
            batch = {b"data": data, b"labels": [i % 10 for i in range(rows)]}
            content = pickle.dumps(batch, protocol=2)
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_cifar10_is_checked_and_packed_from_its_archive(run, cifar, tmp_path):
    archive = cifar_archive(tmp_path / "cifar-10-python.tar.gz")
    status, out, _ = run("cifar10", "check", archive, "--json")
    report = json.loads(out)
    assert status == 1
    assert report["images"] == {"train": 60, "val": 12}
    assert report["sizes"]["width"] == {"min": 32, "median": 32, "max": 32}
    assert any("from 5,000 images a class" in problem for problem in report["problems"])
    assert run("cifar10", "pack", archive, "--to", tmp_path / "out")[0] == 0
    wanted = cifar.read_path(archive, 0)
    found = cifar.read_path(tmp_path / "out", 0)
    for name in ("train_images", "train_labels", "val_images", "val_labels"):
        assert np.array_equal(getattr(found, name), getattr(wanted, name))
    assert found.classes == cifar.CIFAR10_CLASSES
    assert run("cifar10", "pack", archive, "--to", tmp_path / "large", "--side", 48)[0] == 0
    assert np.load(tmp_path / "large" / "val_images.npy").shape == (12, 48, 48, 3)


# The class lists


def test_the_shipped_list_holds_a_hundred_classes_and_names_its_source():
    classes = make.read_classes(make.CMC)
    assert len(classes) == 100
    assert all(re.fullmatch(r"n\d{8}", wnid) for wnid in classes)
    assert "https://github.com/HobbitLong/CMC" in make.CMC.read_text()


def test_class_lists_in_their_forms(tmp_path, refused):
    path = tmp_path / "classes.txt"
    path.write_text("# mine\n\nn01440764 tench, Tinca tinca\nn01443537\tgoldfish\n")
    assert list(make.read_classes(path)) == ["n01440764", "n01443537"]
    (tmp_path / "Labels.json").write_text(json.dumps({"n01440764": "tench, Tinca", "n01443537": "goldfish"}))
    assert make.read_classes(tmp_path / "Labels.json")["n01440764"] == "tench, Tinca"
    flags = ["imagenet100", "make", "--from", tmp_path, "--to", tmp_path.parent / "out", "--classes"]
    for text in ("tench\ngoldfish\n", "n01440764\nn01440764\n", "n01440764\n", "", "n014407640\nn01443537\n"):
        path.write_text(text)
        assert str(path) in refused(*flags, path)
    path.write_bytes(b"\xff\xfe\x00")
    assert str(path) in refused(*flags, path)
    assert "nowhere" in refused(*flags, tmp_path / "nowhere.txt")
    (tmp_path / "Labels.json").write_text("[1, 2]")
    assert "Labels.json" in refused(*flags, tmp_path / "Labels.json")


# Making ImageNet-100


def train_name(wnid, number):
    return f"{wnid}_{number}.JPEG"


def write_ilsvrc(root, wnids=WNIDS, train=3, val=2):
    """An ILSVRC-2012 of folders, its validation images flat, and their labels in a file."""
    lines = []
    for place, wnid in enumerate(wnids):
        (root / "train" / wnid).mkdir(parents=True)
        for number in range(train):
            path = root / "train" / wnid / train_name(wnid, number)
            path.write_bytes(jpeg(1000 * place + number))
        for _ in range(val):
            name = f"ILSVRC2012_val_{len(lines) + 1:08}.JPEG"
            (root / "val").mkdir(exist_ok=True)
            (root / "val" / name).write_bytes(jpeg(50_000 + len(lines)))
            lines.append(f"{name} {wnid}")
    (root / "val_labels.txt").write_text("\n".join(lines) + "\n")
    return root


def add(tar, name, content=b"", **fields):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in fields.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(content))


def to_tars(tree, root):
    """The same as the two published tars."""
    root.mkdir()
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for folder in sorted((tree / "train").iterdir()):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for path in sorted(folder.iterdir()):
                    add(inner, path.name, path.read_bytes())
            add(outer, f"{folder.name}.tar", buffer.getvalue())
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as tar:
        for path in sorted((tree / "val").iterdir()):
            add(tar, path.name, path.read_bytes())
    (root / "val_labels.txt").write_bytes((tree / "val_labels.txt").read_bytes())
    return root


@pytest.fixture
def two(tmp_path):
    """A list of two of the three classes."""
    path = tmp_path / "two.txt"
    path.write_text("\n".join(WNIDS[:2]))
    return path


@pytest.fixture
def wanted(tmp_path):
    """What two classes of the small ILSVRC come to."""
    tree = write_ilsvrc(tmp_path / "wanted-from")
    made = {f"train/{w}/{p.name}": p for w in WNIDS[:2] for p in (tree / "train" / w).iterdir()}
    for line in (tree / "val_labels.txt").read_text().splitlines():
        name, wnid = line.split()
        if wnid in WNIDS[:2]:
            made[f"val/{wnid}/{name}"] = tree / "val" / name
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in made.items()}


def test_make_from_folders_tars_and_kaggles_tree_gives_the_same(run, tmp_path, two, wanted):
    tree = write_ilsvrc(tmp_path / "tree")
    tars = to_tars(tree, tmp_path / "tars")
    kaggle = tmp_path / "kaggle"
    write_ilsvrc(kaggle / "ILSVRC" / "Data" / "CLS-LOC")
    labels = (kaggle / "ILSVRC" / "Data" / "CLS-LOC" / "val_labels.txt").rename(kaggle / "labels")
    lines = ["ImageId,PredictionString"]
    lines += [line.replace(".JPEG ", ",") + " 1 2 3 4" for line in labels.read_text().splitlines()]
    (kaggle / "LOC_val_solution.csv").write_text("\n".join(lines))
    foldered = write_ilsvrc(tmp_path / "foldered")
    for line in (foldered / "val_labels.txt").read_text().splitlines():
        name, wnid = line.split()
        (foldered / "val" / wnid).mkdir(exist_ok=True)
        (foldered / "val" / name).rename(foldered / "val" / wnid / name)
    (foldered / "val_labels.txt").unlink()
    for source in (tree, tars, kaggle, foldered):
        target = tmp_path / "out" / source.name
        line = ["imagenet100", "make", "--from", source, "--classes", two, "--to", target]
        status, out, err = run(*line, "--json")
        assert status == 0, err
        assert contents(target) == wanted
        report = json.loads(out)
        assert report["images"] == {"train": 6, "val": 4}
        assert report["skipped"] == []
        assert sorted(os.listdir(target)) == ["train", "val"]
    listed = programs.imagenet100().list_images(target)
    assert listed.keys == WNIDS[:2]


@pytest.mark.parametrize("how", ["hardlink", "symlink"])
def test_make_can_link(run, tmp_path, two, wanted, how):
    tree = write_ilsvrc(tmp_path / "tree")
    target = tmp_path / "out"
    assert run("imagenet100", "make", "--from", tree, "--classes", two, "--to", target, "--how", how)[0] == 0
    assert contents(target) == wanted
    one = target / "train" / WNIDS[0] / train_name(WNIDS[0], 0)
    assert one.samefile(tree / one.relative_to(target))
    assert one.is_symlink() == (how == "symlink")


def test_make_tells_counts_against_what_is_expected(run, tmp_path, two):
    tree = write_ilsvrc(tmp_path / "tree", val=50)
    (tree / "Labels.json").write_text(json.dumps({wnid: f"name of {wnid}" for wnid in WNIDS}))
    target = tmp_path / "out"
    line = ["imagenet100", "make", "--from", tree, "--classes", tree / "Labels.json", "--to", target]
    status, out, _ = run(*line)
    assert status == 0
    assert "ILSVRC-2012 has 732 to 1,300 a class" in out
    assert "3 classes of 3  <- not as in ILSVRC-2012" in out
    assert "3 classes of 50\n" in out
    assert programs.imagenet100().list_images(target).classes == [f"name of {wnid}" for wnid in WNIDS]


def test_make_keeps_what_exists_and_force_replaces_only_its_own(run, refused, tmp_path, two, wanted):
    tree, target = write_ilsvrc(tmp_path / "tree"), tmp_path / "out"
    (target / "train").mkdir(parents=True)
    (target / "train" / "mine.txt").write_text("mine")
    (target / "notes.txt").write_text("mine too")
    line = ["imagenet100", "make", "--from", tree, "--classes", two, "--to", target]
    before = contents(target)
    assert "holds train" in refused(*line)
    assert contents(target) == before
    assert run(*line, "--force")[0] == 0
    assert contents(target) == wanted | {"notes.txt": before["notes.txt"]}


def test_make_goes_on_after_a_kill_at_any_rename(run, tmp_path, two, wanted):
    """Killed at the 1st, 2nd, ... file that would get its name, until one make gets through."""
    tree = write_ilsvrc(tmp_path / "tree")
    tars = to_tars(tree, tmp_path / "tars")
    for source in (tree, tars):
        target = tmp_path / "out" / source.name
        line = ["imagenet100", "make", "--from", source, "--classes", two, "--to", target, "--workers", 1]
        for count in range(1, 100):

            def work(line=line, count=count):
                die_at(count, "replace")
                return command_line.main(list(map(str, line)))

            status, log = forked(work, tmp_path)
            if status == 0:
                break
            assert status == -signal.SIGKILL, log
            assert not (target / "train").exists() or not (target / "train.part").exists()
        else:
            pytest.fail("never done")
        assert contents(target) == wanted
        assert sorted(os.listdir(target)) == ["train", "val"]


def die_at(count, *names):
    """From now on, the `count`-th call of any of these functions of `os` kills this process instead."""
    calls = iter(range(1, count + 1))

    def deadly(function):
        def call(*arguments, **keywords):
            if next(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)

        return call

    for name in names:
        setattr(os, name, deadly(getattr(os, name)))


def test_an_unfinished_make_of_other_classes_is_refused(run, refused, tmp_path, two):
    tree, target = write_ilsvrc(tmp_path / "tree"), tmp_path / "out"
    line = ["imagenet100", "make", "--from", tree, "--to", target, "--workers", 1, "--classes"]

    def work():
        die_at(4, "replace")
        return command_line.main(list(map(str, [*line, two])))

    assert forked(work, tmp_path)[0] == -signal.SIGKILL
    three = tmp_path / "three.txt"
    three.write_text("\n".join(WNIDS))
    assert "another classes" in refused(*line, three)
    assert run(*line, three, "--force")[0] == 0
    assert sorted(os.listdir(target / "train")) == WNIDS


def test_hostile_tars_write_nothing_outside_and_are_named(run, tmp_path, two, monkeypatch):
    tree = write_ilsvrc(tmp_path / "tree")
    tars = to_tars(tree, tmp_path / "tars")
    monkeypatch.setattr(make, "LARGEST_IMAGE", 10_000)
    good = {number: jpeg(number) for number in range(2)}
    outer = tars / "ILSVRC2012_img_train.tar"
    with tarfile.open(outer, "w") as archive:
        for wnid in WNIDS[:2]:
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for number, content in good.items():
                    add(inner, train_name(wnid, number), content)
                add(inner, f"/tmp/{train_name(wnid, 7)}", b"absolute")
                add(inner, f"../../../{train_name(wnid, 8)}", b"above")
                add(inner, f"..\\{train_name(wnid, 8)}", b"above, on Windows")
                add(inner, train_name(wnid, 9), type=tarfile.SYMTYPE, linkname="/etc/passwd")
                add(inner, train_name(wnid, 10), type=tarfile.LNKTYPE, linkname="/etc/passwd")
                add(inner, train_name(wnid, 11), type=tarfile.CHRTYPE, devmajor=1, devminor=5)
                add(inner, train_name(wnid, 12), type=tarfile.FIFOTYPE)
                add(inner, train_name(wnid, 0).lower(), b"another case")
                add(inner, train_name(wnid.upper(), 0), b"another case")
                add(inner, train_name(wnid, 0), b"again")
                add(inner, train_name(wnid, 13), bytes(20_000))
                add(inner, train_name("n09999999", 1), b"another class")
                add(inner, "n01440764_1.JPEG\0.txt", b"cut short")
            add(archive, f"{wnid}.tar", buffer.getvalue())
        add(archive, "../evil.tar", b"x")
        add(archive, f"{WNIDS[2]}.tar", type=tarfile.SYMTYPE, linkname="/etc/passwd")
    before = contents(tmp_path)
    target = tmp_path / "out"
    status, out, err = run("imagenet100", "make", "--from", tars, "--classes", two, "--to", target, "--json")
    assert status == 0, err
    after = contents(tmp_path)
    new = sorted(set(after) - set(before))
    assert [name for name in new if "train" in name] == [
        f"out/train/{wnid}/{train_name(wnid, number)}" for wnid in WNIDS[:2] for number in range(2)
    ]
    assert all(name.startswith("out/") for name in new)
    assert {name: after[name] for name in before} == before
    skipped = "\n".join(json.loads(out)["skipped"])
    for words in (
        "'/tmp/",
        "'../../../",
        "no plain file",
        "comes twice",
        "20,000 bytes",
        "another class",
        "evil",
    ):
        assert words in skipped


def test_damaged_tars_are_refused(refused, tmp_path, two):
    tars = to_tars(write_ilsvrc(tmp_path / "tree"), tmp_path / "tars")
    outer = tars / "ILSVRC2012_img_train.tar"
    line = ["imagenet100", "make", "--from", tars, "--classes", two, "--to", tmp_path / "out"]
    whole = outer.read_bytes()
    for damaged in (whole[:700], whole[:4000], b"", b"no tar" * 1000, whole[:1024] + b"\xff" * 20_000):
        outer.write_bytes(damaged)
        assert "ILSVRC2012_img_train.tar" in refused(*line)
        assert not (tmp_path / "out" / "train").exists()
    import gzip

    outer.write_bytes(gzip.compress(whole))
    assert "uncompressed" in refused(*line)


def test_what_make_needs_is_said(refused, tmp_path, two):
    tree, target = write_ilsvrc(tmp_path / "tree"), tmp_path / "out"
    line = ["imagenet100", "make", "--classes", two, "--to", target, "--from"]
    assert "no such folder" in refused(*line, tmp_path / "nowhere")
    assert "holds neither" in refused(*line, tree / "val")

    labels = (tree / "val_labels.txt").rename(tree / "other.txt")
    assert "--val-labels FILE" in refused(*line, tree)
    truth = tree / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text("490\n361\n171\n")
    assert "its numbers are no wnids" in refused(*line, tree, "--val-labels", truth)
    labels.write_text("\n".join(text for text in labels.read_text().splitlines() if WNIDS[0] not in text))
    assert f"no val image of {WNIDS[0]}" in refused(*line, tree, "--val-labels", labels)
    for inside in (tree, tree / "train", tree / "val" / "mine"):
        line_inside = ["imagenet100", "make", "--classes", two, "--from", tree, "--to", inside, "--force"]
        assert "is or lies in what is read" in refused(*line_inside)
    (tree / "train" / WNIDS[0]).rename(tree / "train" / "n00000000")
    assert f"no training images of {WNIDS[0]}" in refused(*line, tree)


# Checking


def test_a_clean_folder_gives_0_and_its_figures(run, tmp_path):
    source = write_tree(tmp_path / "in")
    status, out, _ = run("folder", "check", source)
    assert status == 0
    assert "no problems found" in out
    report = json.loads(run("folder", "check", source, "--json")[1])
    assert report["counts"] == {"train": {"ant": 6, "bee": 6}, "val": {"ant": 2, "bee": 2}}
    assert report["sizes"]["width"] == {"min": 40, "median": 41, "max": 45}
    assert report["sizes"]["height"] == {"min": 30, "median": 30, "max": 31}


def damage(source):
    """Puts one of each kind of damage into a tree; returns the names of what cannot be read."""
    train = source / "train" / "ant"
    (train / "0.jpg").write_bytes(b"")
    (train / "1.jpg").write_bytes((train / "1.jpg").read_bytes()[:300])
    (train / "2.jpg").write_bytes(b"<html>not found</html>")
    return [f"train/ant/{number}.jpg" for number in range(3)]


def test_check_finds_each_kind_of_problem(run, tmp_path):
    source = write_tree(tmp_path / "in", train=9)
    broken = damage(source)
    train, val = source / "train", source / "val"
    (train / "ant" / "copy.jpg").write_bytes((train / "ant" / "4.jpg").read_bytes())
    (val / "bee" / "leak.jpg").write_bytes((train / "bee" / "4.jpg").read_bytes())
    (train / "bee" / "other.jpg").write_bytes((train / "ant" / "5.jpg").read_bytes())
    status, out, _ = run("folder", "check", source, "--json")
    assert status == 1
    report = json.loads(out)
    assert [item["file"] for item in report["unreadable"]] == broken
    assert report["duplicates"] == [["train/ant/4.jpg", "train/ant/copy.jpg"]]
    assert report["leakage"] == [["train/bee/4.jpg", "val/bee/leak.jpg"]]
    assert report["conflicting_labels"] == [["train/ant/5.jpg", "train/bee/other.jpg"]]
    assert len(report["problems"]) == 4
    status, out, _ = run("folder", "check", source)
    assert status == 1
    assert out.count("PROBLEM: ") == 4
    assert "refuses more than 1 %" in out


def test_check_sees_damage_below_the_centre(run, tmp_path):
    source = write_tree(tmp_path / "in")
    whole = jpeg(77, 40, 400)
    (source / "train" / "ant" / "tall.jpg").write_bytes(whole[: int(0.8 * len(whole))])
    report = json.loads(run("folder", "check", source, "--json")[1])
    assert [item["file"] for item in report["unreadable"]] == ["train/ant/tall.jpg"]


def test_one_folder_of_classes_is_split_by_the_fraction(run, tmp_path):
    for key in ("ant", "bee"):
        (tmp_path / "in" / key).mkdir(parents=True)
        for number in range(10):
            (tmp_path / "in" / key / f"{number}.jpg").write_bytes(jpeg(number + 100 * (key == "bee")))
    out = run("folder", "check", tmp_path / "in", "--val-fraction", 0.3, "--json")[1]
    assert json.loads(out)["images"] == {"train": 14, "val": 6}


def test_check_reads_a_zip_and_writes_nothing_by_its_names(run, tmp_path):
    source = write_tree(tmp_path / "in")
    archive = tmp_path / "in.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(source.rglob("*.jpg")):
            file.write(path, path.relative_to(source).as_posix())
        for name in ("../evil.jpg", "/evil.jpg", "train/ant/../../../evil.jpg", "C:\\evil.jpg"):
            file.writestr(name, jpeg(1))
    before = contents(tmp_path)
    status, _, err = run("folder", "check", archive, "--json")
    assert status in (0, 1), err
    assert contents(tmp_path) == before
    assert not list(tmp_path.parent.glob("evil*"))
    assert run("folder", "pack", archive, "--to", tmp_path / "out", "--side", 8)[0] in (0, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "in.zip", "out"}


def test_a_zip_bomb_is_one_unreadable_image(run, tmp_path, monkeypatch):
    monkeypatch.setattr(programs.imagenet100(), "LARGEST_FILE", 100_000)
    source, archive = write_tree(tmp_path / "in"), tmp_path / "in.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(source.rglob("*.jpg")):
            file.write(path, path.relative_to(source).as_posix())
        file.writestr("train/ant/bomb.jpg", bytes(10_000_000))
    report = json.loads(run("folder", "check", archive, "--json")[1])
    assert [item["file"] for item in report["unreadable"]] == ["train/ant/bomb.jpg"]
    archive.write_bytes(archive.read_bytes()[:-100])
    assert run("folder", "check", archive)[0] == 2


# Packing


def test_a_pack_holds_what_the_program_would_decode(run, tmp_path):
    program = programs.imagenet100()
    source = write_tree(tmp_path / "in")
    status, out, err = run("folder", "pack", source, "--to", tmp_path / "out", "--side", 16, "--json")
    assert status == 0, err
    listing = program.list_images(source)
    for split, (names, labels) in listing.splits.items():
        images = np.load(tmp_path / "out" / f"{split}_images.npy", mmap_mode="r")
        assert images.dtype == np.uint8
        assert images.shape == (len(names), 16, 16, 3)
        found = np.load(tmp_path / "out" / f"{split}_labels.npy")
        assert found.dtype == np.int64
        assert np.array_equal(found, labels)
        for name, image in zip(names, images, strict=True):
            box = functools.partial(program.centre_box, share=1)
            assert np.array_equal(image, program.decode((source / name).read_bytes(), 16, box))
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == listing.classes
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["names"]["train"] == listing.splits["train"][0]
    for name, facts in manifest["files"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == facts["sha256"]
    assert sorted(os.listdir(tmp_path / "out")) == sorted([*OUTPUTS, "manifest.json"])
    assert "names" not in json.loads(out)
    assert "to write" in err
    assert "free at" in err


def test_packed_arrays_can_be_checked_and_packed_again(run, tmp_path):
    source, out = write_tree(tmp_path / "in"), tmp_path / "out"
    assert run("folder", "pack", source, "--to", out, "--side", 16)[0] == 0
    assert run("folder", "check", out)[0] == 0
    assert run("folder", "pack", out, "--to", tmp_path / "small", "--side", 8)[0] == 0
    assert np.load(tmp_path / "small" / "val_images.npy").shape == (4, 8, 8, 3)
    with (out / "val_images.npy").open("r+b") as file:
        file.seek(500)
        file.write(b"\1\2\3")
    status, text, _ = run("folder", "check", out)
    assert status == 1
    assert "val_images.npy is not what was packed" in text


def test_the_number_of_threads_changes_no_byte(run, tmp_path):
    source = write_tree(tmp_path / "in", train=40)
    for workers in (1, 7):
        line = ["folder", "pack", source, "--to", tmp_path / str(workers), "--side", 8, "--workers", workers]
        assert run(*line)[0] == 0
    assert packed_bytes(tmp_path / "1") == packed_bytes(tmp_path / "7")


def test_unreadable_images_leave_no_hole(run, refused, tmp_path):
    source = write_tree(tmp_path / "in", train=60, val=2)
    (source / "train" / "ant" / "7.jpg").write_bytes(b"damaged")
    status, out, err = run("folder", "pack", source, "--to", tmp_path / "out", "--side", 8, "--json")
    assert status == 0, err
    assert [item["file"] for item in json.loads(out)["unreadable"]] == ["train/ant/7.jpg"]
    images = np.load(tmp_path / "out" / "train_images.npy")
    assert len(images) == 119 == len(np.load(tmp_path / "out" / "train_labels.npy"))
    assert (images.reshape(119, -1).std(axis=1) > 0).all()
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert "train/ant/7.jpg" not in manifest["names"]["train"]
    assert manifest["counts"]["train"] == {"ant": 59, "bee": 60}
    (source / "train" / "ant" / "8.jpg").write_bytes(b"damaged")
    sentence = refused("folder", "pack", source, "--to", tmp_path / "other", "--side", 8)
    assert "2 of 124 images are unreadable, the first is train/ant/7.jpg" in sentence
    assert os.listdir(tmp_path / "other") == []


def test_a_split_without_a_readable_image_of_a_class_is_refused(refused, tmp_path):
    source = write_tree(tmp_path / "in", train=100, val=1)
    (source / "val" / "bee" / "0.jpg").write_bytes(b"damaged")
    assert "no val image of bee" in refused("folder", "pack", source, "--to", tmp_path / "out", "--side", 8)


def test_pack_keeps_what_exists_unless_forced(run, refused, tmp_path):
    source, out = write_tree(tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    (out / "train_labels.npy").write_bytes(b"mine")
    (out / "notes.txt").write_bytes(b"mine too")
    line = ["folder", "pack", source, "--to", out, "--side", 8]
    assert "holds train_labels.npy" in refused(*line)
    assert contents(out).keys() == {"train_labels.npy", "notes.txt"}
    assert run(*line, "--force")[0] == 0
    assert (out / "notes.txt").read_bytes() == b"mine too"
    stamp = (out / "train_images.npy").stat().st_mtime_ns
    status, _, err = run(*line)  # the same once more: nothing to do
    assert status == 0
    assert "packed already" in err
    assert (out / "train_images.npy").stat().st_mtime_ns == stamp
    assert "holds train_images.npy" in refused("folder", "pack", source, "--to", out, "--side", 9)
    assert "is or lies in what is read" in refused("folder", "pack", source, "--to", source / "packed")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A source with one damaged image, and the bytes of its pack that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    source = write_tree(folder / "in", train=80, val=5)
    (source / "train" / "bee" / "3.jpg").write_bytes(b"damaged")
    assert command_line.main(pack_line(source, folder / "out")) == 0
    return source, packed_bytes(folder / "out")


def pack_line(source, target, *flags):
    return ["folder", "pack", str(source), "--side", "16", "--to", str(target), *flags]


def small_steps():
    """Small blocks and a commit after each, so that there are many moments to be killed at."""
    pack.BLOCK_BYTES, pack.COMMIT_SECONDS = 8 * 16 * 16 * 3, 0


def test_killed_at_every_fsync_and_rename_and_resumed_gives_the_same_bytes(tmp_path, undisturbed):
    source, wanted = undisturbed
    total = 0
    for count in range(1, 200):
        target = tmp_path / str(count)

        def work(target=target, count=count):
            small_steps()
            die_at(count, "fsync", "replace")
            return command_line.main(pack_line(source, target))

        status, log = forked(work, tmp_path)
        if status == 0:
            break
        assert status == -signal.SIGKILL, log
        status, log = forked(lambda target=target: command_line.main(pack_line(source, target)), tmp_path)
        assert status == 0, log
        assert packed_bytes(target) == wanted
        assert sorted(os.listdir(target)) == sorted([*OUTPUTS, "manifest.json"])
        total += 1
    assert total > 60


def test_killed_again_and_again_at_random_moments(tmp_path, undisturbed):
    source, wanted = undisturbed
    chance, kills = random.Random(0), 0
    target = tmp_path / "out"

    def slowly():
        small_steps()
        decode = pack.Packer.decode
        pack.Packer.decode = lambda *arguments: (time.sleep(0.05), decode(*arguments))[1]
        return command_line.main(pack_line(source, target))

    for _ in range(100):
        child = os.fork()
        if child == 0:
            sys.stdout = sys.stderr = io.StringIO()
            torch.set_num_threads(1)
            os._exit(slowly())
        time.sleep(chance.uniform(0.01, 0.12))
        os.kill(child, signal.SIGKILL)
        _, waited = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(waited) == 0:
            break
        kills += 1
        if all((target / name).exists() for name in [*OUTPUTS, "manifest.json"]):
            break
    assert kills > 1
    assert forked(slowly, tmp_path)[0] == 0
    assert packed_bytes(target) == wanted


def killed_on_the_way(source, tmp_path):
    """The folder of a pack that was killed at its twelfth fsync."""
    target = tmp_path / "out"

    def work():
        small_steps()
        die_at(12, "fsync")
        return command_line.main(pack_line(source, target))

    assert forked(work, tmp_path)[0] == -signal.SIGKILL
    return target


def test_a_torn_journal_line_and_pictures_beyond_it_are_cut_off(run, tmp_path, undisturbed):
    source, wanted = undisturbed
    target = killed_on_the_way(source, tmp_path)
    with (target / "pack.journal").open("ab") as file:
        file.write(b'{"split": "train", "images": 9999, "unrea')
    with (target / "train_images.npy.part").open("ab") as file:
        file.write(b"half a picture")
    status, _, err = run(*pack_line(source, target))
    assert status == 0
    assert "going on after" in err
    assert packed_bytes(target) == wanted


def test_unfinished_files_that_were_cut_start_anew(run, tmp_path, undisturbed):
    source, wanted = undisturbed
    target = killed_on_the_way(source, tmp_path)
    os.truncate(target / "train_images.npy.part", 200)
    status, _, err = run(*pack_line(source, target))
    assert status == 0
    assert "starting anew" in err
    assert packed_bytes(target) == wanted


def test_an_unfinished_pack_of_something_else_is_refused(run, refused, tmp_path):
    source, target = write_tree(tmp_path / "in", train=80), tmp_path / "out"

    def work():
        small_steps()
        die_at(12, "fsync")
        return command_line.main(pack_line(source, target))

    assert forked(work, tmp_path)[0] == -signal.SIGKILL
    before = contents(target)
    assert "side 16 (now 24)" in refused("folder", "pack", source, "--to", target, "--side", 24)
    (source / "train" / "ant" / "1.jpg").write_bytes(jpeg(999))
    assert "other files in it" in refused(*pack_line(source, target))
    assert contents(target) == before
    assert run(*pack_line(source, target, "--force"))[0] == 0
    assert run(*pack_line(source, tmp_path / "clean"))[0] == 0
    assert packed_bytes(target) == packed_bytes(tmp_path / "clean")


def test_two_packs_at_once_into_one_folder_are_refused(refused, tmp_path):
    source = write_tree(tmp_path / "in")
    with files.locked(tmp_path / "out"):
        assert "another process" in refused(*pack_line(source, tmp_path / "out"))


def test_a_full_disk_is_one_sentence_and_the_pack_goes_on_later(run, tmp_path, undisturbed):
    source, wanted = undisturbed
    target = tmp_path / "out"

    def work():
        small_steps()
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
        return command_line.main(pack_line(source, target))

    status, log = forked(work, tmp_path)
    assert status == 2
    assert "Traceback" not in log
    assert "File too large" in log
    assert not (target / "train_images.npy").exists()
    status, _, err = run(*pack_line(source, target))
    assert status == 0
    assert "going on after" in err
    assert packed_bytes(target) == wanted


def test_a_full_disk_while_making_is_one_sentence_and_the_make_goes_on_later(run, tmp_path, two, wanted):
    tree, target = write_ilsvrc(tmp_path / "tree"), tmp_path / "out"
    line = ["imagenet100", "make", "--from", tree, "--classes", two, "--to", target]

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        return command_line.main(list(map(str, line)))

    status, log = forked(work, tmp_path)
    assert status == 2
    assert "Traceback" not in log
    assert "File too large" in log
    assert not (target / "train").exists()
    assert run(*line)[0] == 0
    assert contents(target) == wanted


def test_names_that_are_no_text_are_told_and_packed(run, tmp_path):
    source = write_tree(tmp_path / "in")
    name = os.fsdecode(b"\xff\xfe.jpg")
    (source / "train" / "ant" / name).write_bytes(jpeg(4711))
    assert run("folder", "check", source)[0] == 0
    assert run(*pack_line(source, tmp_path / "out"))[0] == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert f"train/ant/{name}" in manifest["names"]["train"]


def test_a_disk_too_small_is_said_before_anything_is_written(refused, tmp_path, monkeypatch):
    source, target = write_tree(tmp_path / "in"), tmp_path / "out"
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage)
    sentence = refused(*pack_line(source, target))
    assert "of free space" in sentence
    assert "are free" in sentence
    assert list(target.iterdir()) == []


def test_a_target_that_cannot_be_written_is_one_sentence(refused, tmp_path):
    source = write_tree(tmp_path / "in")
    (tmp_path / "file").write_text("no folder")
    assert "file/out" in refused(*pack_line(source, tmp_path / "file" / "out"))
    if Path("/proc/version").exists():  # read-only even for root
        assert "/proc/nowhere" in refused(*pack_line(source, "/proc/nowhere"))


# Real photographs


def test_real_photographs_of_many_sizes(run, tmp_path):
    if not FULL.exists():
        pytest.skip(f"no real photographs at {FULL}")
    with zipfile.ZipFile(FULL) as archive:
        for number, name in enumerate(sorted(archive.namelist())[:48]):
            path = tmp_path / "in" / ("train" if number % 4 else "val") / f"group{number // 4 % 4}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.read(name))
    status, out, err = run("folder", "check", tmp_path / "in")
    assert status == 0, out + err
    assert run("folder", "pack", tmp_path / "in", "--to", tmp_path / "out", "--side", 64)[0] == 0
    assert np.load(tmp_path / "out" / "train_images.npy").shape == (36, 64, 64, 3)


def test_kaggles_layout_in_a_zip_packs_with_one_index_over_all_parts(run, tmp_path):
    if not MINI.exists():
        pytest.skip(f"no ImageNet-100 in miniature at {MINI}")
    few, seen = tmp_path / "few.zip", {}
    with zipfile.ZipFile(MINI) as archive, zipfile.ZipFile(few, "w") as target:
        for name in archive.namelist():
            folder = name.rpartition("/")[0]
            seen[folder] = seen.get(folder, 0) + 1
            if seen[folder] <= 3 or name == "Labels.json":
                target.writestr(name, archive.read(name))
    status, out, err = run("imagenet100", "pack", few, "--to", tmp_path / "out", "--side", 32, "--json")
    assert status == 0, err
    manifest = json.loads(out)
    assert manifest["images"] == {"train": 300, "val": 300}
    assert set(manifest["counts"]["train"].values()) == {3}
    assert sorted(set(np.load(tmp_path / "out" / "train_labels.npy").tolist())) == list(range(100))
    assert "goldfish" in json.loads((tmp_path / "out" / "classes.json").read_text())
    status, out, _ = run("imagenet100", "check", few, "--json")
    assert status == 1
    assert "732 to 1,300" in " ".join(json.loads(out)["problems"])


def test_check_is_told_what_a_set_should_hold():
    expected = check.Expected("CIFAR-10", 2, (5, 5), (1, 1), ("ant", "bee"))
    counts = {"train": {"ant": 5, "cow": 4}, "val": {"ant": 1, "cow": 1}}
    found = check.unexpected({"classes": 2, "counts": counts}, expected)
    assert found == [
        "class cow is none of CIFAR-10's (1 are not)",
        "1 classes differ in train from 5 images a class, the first is cow with 4",
    ]
