"""Several processes that torchrun starts do as one does: the same choices, one ledger, one writer, and no
deadlock, whatever happens to one of them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import team
import torch
from conftest import CIFAR_PROGRAM, ROOT, put, rows, summary, untimed, write_images

resource = pytest.importorskip("resource", reason="limits files as Unix does")
pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities")
IMAGENET_PROGRAM = ROOT / "standalone" / "imagenet100_ast.py"
TINY = "--data shapes --train-size 120 --epochs 4 --batch-size 16 --compare random --amp off".split()


def launch(count, *words, **options):
    """torchrun with `count` processes, in a session of its own, its output in pipes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen([*command, *map(str, words)], env=environment, **pipes, **options)


def team_of(count, *words, check=0, during=lambda process: None, **options):
    """Runs torchrun to its end and returns what it printed."""
    with launch(count, *words, **options) as process:
        try:
            during(process)
            out, err = process.communicate(timeout=400)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == check, out + err
    return out, err


def processes(launcher):
    """The ids of those that a launcher has started, by rank."""
    pids = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    ranks = {}
    for pid in pids:
        names = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
        ranks |= {int(name[5:]): int(pid) for name in names if name.startswith("RANK=")}
    return ranks


def until(condition, seconds=120):
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "it never came"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def alone():
    """What one process does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield json.loads(json.dumps(team.play()))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def together(request, tmp_path_factory):
    """What each of several processes does."""
    folder = tmp_path_factory.mktemp("team")
    team_of(request.param, ROOT / "tests" / "team.py", folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]


@pytest.mark.parametrize("gate", team.GATES)
def test_given_the_same_losses_every_process_of_every_world_chooses_the_same(alone, together, gate):
    mine, theirs = alone["recorded"][gate], [found["recorded"][gate] for found in together]
    assert len(mine["choices"]) > 50
    assert all(found["choices"] == mine["choices"] for found in theirs)
    assert all(found["counts"] == mine["counts"] for found in theirs)  # of the whole, not of a share
    assert len({found["model"] for found in theirs}) == 1


@pytest.mark.parametrize("gate", ["remembered", "live"])
def test_in_float64_several_learn_and_choose_what_one_does(alone, together, gate):
    mine = alone["learned"][gate]
    for found in (found["learned"][gate] for found in together):
        assert found["choices"] == mine["choices"]
        assert found["weights"] == pytest.approx(mine["weights"], rel=1e-9)
        assert found["accuracy"] == pytest.approx(mine["accuracy"])


@pytest.mark.parametrize("case", ["remembered", "live", "small"])
def test_what_one_process_cannot_read_is_missing_in_all_and_nobody_waits(together, case):
    found = [(found["unreadable"] | found)[case] for found in together]
    assert min(each.pop("smallest") for each in found) >= 2  # samples of a step
    assert all(other == found[0] for other in found[1:])
    lost, removed = found[0]["lost"]
    assert 0 < removed == len(lost) <= len(team.OnOneOnly.BROKEN)


def test_what_one_process_hears_all_do(together):
    mine = together[0]["by hand"]
    assert all(found["by hand"] == mine for found in together)
    assert mine["stop"] == "enough" and len(mine["targets"]) == 3 and mine["targets"][2] == 0.2


@pytest.mark.slow
def test_a_run_is_one_run_whoever_takes_part(tmp_path):
    """Rows, totals and files of two processes are those of one; only the first prints."""
    single = [sys.executable, CIFAR_PROGRAM, *TINY, "--out", tmp_path / "one"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(list(map(str, single)), env=environment, check=True, capture_output=True)
    out, err = team_of(2, CIFAR_PROGRAM, *TINY, "--out", tmp_path / "two")
    assert out.count("results:") == out.count("accuracy activated") == 1 and "2 processes" in out
    assert "batch norm: each process's own" in out and "Traceback" not in err and "Warning" not in err
    files = [sorted(p.name for p in (tmp_path / name).rglob("*")) for name in ("one", "two")]
    assert files[0] == files[1]
    kept = ("policy", "epoch", "candidates", "activated", "activation_rate", "phase")
    one, two = ([{key: row[key] for key in kept} for row in rows(tmp_path / name)] for name in ("one", "two"))
    assert one == two
    totals = [summary(tmp_path / name)["policies"] for name in ("one", "two")]
    for key in ("candidates", "activated", "flops", "unit_energy"):
        assert totals[0]["ast"][key] == totals[1]["ast"][key]
    assert summary(tmp_path / "two")["device"].startswith("2 x cpu")
    model = torch.load(tmp_path / "two" / "model.pt", weights_only=True)["state_dict"]
    assert not [name for name in model if name.startswith("module.")]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 4), (2, 2)])
def test_a_killed_run_goes_on_in_another_world(tmp_path, before, after):
    out, flags = tmp_path / "out", [CIFAR_PROGRAM, *TINY, "--out", tmp_path / "out"]

    def kill(launcher):
        until(lambda: (out / "metrics.jsonl").exists() and len(rows(out)) >= 2)
        victim = launcher.pid if before == 1 else processes(launcher)[1]
        os.kill(victim, signal.SIGKILL)

    if before == 1:
        command, quiet = list(map(str, [sys.executable, *flags])), subprocess.DEVNULL
        with subprocess.Popen(command, stdout=quiet, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
            kill(process)
    else:
        _, err = team_of(before, *flags, check=1, during=kill)
        assert 'Traceback (most recent call last):\n  File "' + str(CIFAR_PROGRAM) not in err
    there = untimed(rows(out))
    words = [*flags, "--resume"]
    if after == 1:
        done = subprocess.run(
            list(map(str, [sys.executable, *words])), check=True, capture_output=True, text=True
        )
        said = done.stdout
    else:
        said, _ = team_of(after, *words)
    assert "no checkpoint" not in said and "warning" not in said
    assert summary(out)["complete"]
    assert untimed(rows(out))[: len(there) - 1] == there[:-1]  # the last may be of an epoch not yet saved
    if before == after:
        team_of(before, *flags[:-1], tmp_path / "whole")
        assert untimed(rows(out)) == untimed(rows(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_saves_and_stops_every_process(tmp_path, number):
    out = tmp_path / "out"
    flags = [CIFAR_PROGRAM, *TINY, "--epochs", "500", "--out", out]

    def stop(launcher):
        until(lambda: (out / "metrics.jsonl").exists() and len(rows(out)) >= 2)
        launcher.send_signal(number)

    said, err = team_of(2, *flags, check=1, during=stop)
    name = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}[number]
    assert err.count("saving and stopping") == 1 and said.count("results:") == 1
    assert summary(out)["stopped_by"] == name and rows(out)


def full_disk():
    """Files may grow to half a megabyte, less than a checkpoint."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, 1 << 19))


@pytest.mark.parametrize(
    ("flags", "sentence", "options"),
    [
        (["--epochs", "0"], "--epochs 0: expected a whole number", {}),
        (["--batch-size", "3"], "batch size 3: expected two samples or more a process", {}),
        (["--data", "/nowhere"], "--data /nowhere: no whole", {}),
        ([], "expected a folder with room to write in", {"preexec_fn": full_disk}),
    ],
    ids=["settings", "batch", "data", "full disk of the first"],
)
def test_what_ends_all_is_one_sentence_once(tmp_path, flags, sentence, options):
    out, err = team_of(2, CIFAR_PROGRAM, *TINY, *flags, "--out", tmp_path / "out", check=1, **options)
    assert err.count(sentence) == 1, err
    assert "exitcode  : 2" in err and "results:" not in out


def test_memory_that_ends_in_one_process_ends_all_with_its_sentence(tmp_path):
    program = (tmp_path / "program.py", CIFAR_PROGRAM.read_text())
    old = "    losses = criterion(logits.float(), batch.labels)\n"
    fault = '    if world()[0] == 1:\n        raise RuntimeError("CUDA out of memory")\n'
    put(program[0], program[1].replace(old, fault + old).encode())
    _, err = team_of(2, program[0], *TINY, "--out", tmp_path / "out", check=1)
    assert err.count("a batch: expected memory for it") == 1 and "saving and stopping" not in err


@pytest.mark.slow
def test_the_other_program_too(tmp_path):
    """Files that threads decode, one of them damaged."""
    write_images(tmp_path / "data", train=101, test=10, classes=("ant", "bee"))
    put(tmp_path / "data" / "train" / "ant" / "5.png", b"no picture")
    flags = (
        "--model resnet18 --weights none --image-size 32 --epochs 3 --batch-size 16 --compare none --amp off"
    )
    words = [IMAGENET_PROGRAM, *flags.split(), "--data", tmp_path / "data", "--out", tmp_path / "out"]
    out, _ = team_of(2, *words)
    assert "unreadable images skipped: 1" in out and summary(tmp_path / "out")["complete"]
    assert [row["candidates"] for row in rows(tmp_path / "out")] == [202, 201, 201]


def test_without_torchrun_there_is_no_process_group(cifar, imagenet, monkeypatch):
    for variables in ({}, {"RANK": "0"}, {"RANK": "0", "WORLD_SIZE": "1"}):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        for program in (cifar, imagenet):
            program.join()
            assert program.world() == (0, 1)
    assert not torch.distributed.is_initialized()
