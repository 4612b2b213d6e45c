"""A run has its folder to itself, moves only what a run made, and goes on where nobody listens."""

import errno
import json
import os
import subprocess
from contextlib import suppress
from dataclasses import replace

import pytest
from conftest import Script, at, files, put, summary, write_images

import cifar10_ast as ast

pytestmark = pytest.mark.usefixtures("small_nets")
ONE = {"data": "shapes", "train_size": 40, "batch_size": 16, "epochs": 2, "compare": "none", "device": "cpu"}


def run(out, listeners=(), said=None, **given):
    say = (lambda line: None) if said is None else said.append
    return ast.run(replace(ast.Settings(), **ONE | {"out": str(out)} | given), (), list(listeners), None, say)


FOREIGN = {
    "a config of another program": {"config.json": b'{"my": "project"}', "thesis.tex": b"x"},
    "a config that is no dict": {"config.json": b"[1]", "model.pt": b"x"},
    "a damaged config": {"config.json": b'{"program"', "metrics.jsonl": b""},
    "notes": {"notes.txt": b"x"},
    "checkpoints of others": {"checkpoints/000001.ckpt": b"x"},
}


@pytest.mark.parametrize("held", FOREIGN)
def test_a_folder_that_no_run_made_is_left_as_it_is(tmp_path, held):
    for name, content in FOREIGN[held].items():
        put(tmp_path / "out" / name, content)
    before = files(tmp_path)
    with pytest.raises(ast.BadInput, match=r"out: expected a new folder, or one of a run; found .*; name"):
        run(tmp_path / "out")
    assert files(tmp_path) == before


@pytest.mark.parametrize("left", [(), ("config.json.part",), (".ipynb_checkpoints/x", ".DS_Store")], ids=str)
def test_what_nobody_would_miss_is_no_obstacle(tmp_path, left):
    for name in left:
        put(tmp_path / "out" / name, b"x")
    said = []
    assert run(tmp_path / "out", said=said)["complete"]
    assert run(tmp_path / "out", said=said)["complete"]
    assert [line for line in said if "is now in" in line] == [
        f"the run in {tmp_path}/out is now in {tmp_path}/out-1"
    ]


def test_a_link_is_followed(tmp_path):
    drive = tmp_path / "drive" / "results"
    drive.mkdir(parents=True)
    (tmp_path / "out").symlink_to(drive)
    for _ in range(2):
        run(tmp_path / "out")
    assert {path.name for path in drive.parent.iterdir()} == {"results", "results-1"}
    assert {path.name for path in tmp_path.iterdir()} == {"drive", "out"}


@pytest.mark.parametrize(
    "data,out", [("set", "set"), ("set", "set/out"), ("set", "."), ("link", "set/train")]
)
def test_results_and_data_lie_apart(tmp_path, data, out):
    write_images(tmp_path / "set", train=4, test=2)
    (tmp_path / "link").symlink_to("set")
    before = files(tmp_path)
    with pytest.raises(ast.BadInput, match=r"expected a folder apart from the data in .*; name another$"):
        run(tmp_path / out, data=str(tmp_path / data), train_size=0)
    assert files(tmp_path) == before


@pytest.mark.parametrize("resume", [False, True])
def test_one_run_at_a_time_has_a_folder(tmp_path, resume):
    out, refused = tmp_path / "out", []

    def intrude():
        before = files(tmp_path)
        with pytest.raises(ast.BadInput, match="another run writes to it; wait until it has ended, or name"):
            run(out, seeds="1" if not resume else "0", resume=resume)
        assert files(tmp_path) == before
        refused.append(True)

    run(out, [at("epoch", 1, intrude)], said=[])
    assert refused and summary(out)["complete"] and summary(out)["seeds"] == [0]
    assert run(out, resume=True)["complete"], "once it has ended the folder is free"


def test_of_runs_that_begin_together_one_has_the_folder(tmp_path):
    script = Script(tmp_path)
    flags = "--data shapes --train-size 200 --epochs 3 --compare none --device cpu --out out --seeds".split()
    both = [script.start(*flags, seed) for seed in range(4)]
    told = [process.communicate(timeout=200) for process in both]
    codes = [process.returncode for process in both]
    assert 0 in codes and set(codes) <= {0, 2}, told
    for folder in tmp_path.glob("out*"):
        seeds = {json.loads(line)["seed"] for line in (folder / "metrics.jsonl").read_text().splitlines()}
        assert len(seeds) == 1 and summary(folder)["seeds"] == list(seeds)
    assert len(list(tmp_path.glob("out*"))) == codes.count(0)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, None])
def test_a_drive_that_cannot_lock_serves_all_the_same(tmp_path, monkeypatch, code):
    def fail(*given):
        raise OSError(code, "no locks here")

    monkeypatch.setattr(ast.fcntl, "flock", fail) if code else monkeypatch.setattr(ast, "fcntl", None)
    assert run(tmp_path / "out")["complete"]


def closed():
    for stream in (1, 2):
        os.close(stream)


def to_a_full_disk():
    for stream in (1, 2):
        os.dup2(os.open("/dev/full", os.O_WRONLY), stream)


@pytest.mark.parametrize("lost", [None, closed, to_a_full_disk])
def test_where_nobody_reads_it_trains_saves_and_ends_as_if_printed(tmp_path, lost):
    flags = "--data shapes --train-size 400 --epochs 3 --compare none --device cpu --out out".split()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": lost}
    with subprocess.Popen(Script(tmp_path).command(*flags), cwd=tmp_path, text=True, **pipes) as process:
        if lost is None:
            assert process.stdout.readline().startswith("cifar10_ast: 1 run")
        process.stdout.close()
        with suppress(ValueError):
            assert process.stderr.read() == ""
        assert process.wait(200) == 0
    assert summary(tmp_path / "out")["complete"]
