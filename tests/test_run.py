"""The run from end to end, through the command line: outputs, refusals, stops, kills, resumes."""

import ast
import contextlib
import ctypes
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import tokenize
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision.io import decode_png, encode_png

pytestmark = pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities")
PROGRAM = Path(__file__).parents[1] / "standalone" / "cifar10_ast.py"
OUTPUTS = {
    *("config.json", "metrics.jsonl", "events.jsonl", "summary.json", "curves.png", "model.pt"),
    "samples.npz",
}
TIMED = {"seconds", "scoring_seconds", "elapsed_seconds", "data_wait_percent"}
# A run that only gets as far as its first words, for tests of what happens before training.
AT_ONCE = ("--time-limit", 1e-5)
SMALL = ("--data", "shapes", "--train-size", 300, "--batch-size", 32)
TINY = ("--data", "packed", "--epochs", 4, "--batch-size", 16, "--compare", "random")


class Place:
    """A folder with the program alone in it, and ways to run it there."""

    def __init__(self, folder):
        self.folder = folder
        self.program = folder / "cifar10_ast.py"
        self.program.write_bytes(PROGRAM.read_bytes())

    def start(self, *flags, env=None, threads=1, **options):
        return subprocess.Popen(
            [sys.executable, "-I", "-B", str(self.program), *map(str, flags)],
            cwd=self.folder,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    def run(self, *flags, check=0, **options):
        process = self.start(*flags, **options)
        out, err = process.communicate(timeout=300)
        assert process.returncode == check, out + err
        return SimpleNamespace(stdout=out, stderr=err)

    def refuse(self, *flags, **options):
        """The one line on stderr that a refused call leaves."""
        err = self.run(*flags, check=2, **options).stderr
        assert err.endswith("\n")
        assert len(err.splitlines()) == 1, err
        return err


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def copied(made, tmp_path):
    """A place of its own with the files of another, for tests that change them."""
    shutil.copytree(made.folder, tmp_path, dirs_exist_ok=True)
    return Place(tmp_path)


def files(folder):
    """Every path under a folder with its content."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def summary(out):
    return json.loads((out / "summary.json").read_text())


def write_packed(cifar, folder, n_train=192, n_val=40):
    data = cifar.shapes(200, 200)
    folder.mkdir()
    np.save(folder / "train_images.npy", data.train_images[:n_train])
    np.save(folder / "train_labels.npy", data.train_labels[:n_train])
    np.save(folder / "val_images.npy", data.val_images[:n_val])
    np.save(folder / "val_labels.npy", data.val_labels[:n_val])
    (folder / "classes.json").write_text(json.dumps(data.classes))


# --- a run to the end ---


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of AST, full and random on `shapes`."""
    made = Place(tmp_path_factory.mktemp("finished"))
    made.done = made.run(*SMALL, "--epochs", 4, "--out", "out")
    made.out = made.folder / "out"
    return made


@pytest.mark.slow
def test_the_output_folder_holds_everything_and_nothing_else_is_written(finished):
    assert {path.name for path in finished.out.iterdir()} == OUTPUTS | {"checkpoints"}
    assert {path.name for path in finished.folder.iterdir()} == {"cifar10_ast.py", "out"}
    assert {path.suffix for path in (finished.out / "checkpoints").iterdir()} == {".ckpt"}
    assert finished.done.stderr == ""
    config = json.loads((finished.out / "config.json").read_text())
    assert (config["settings"]["train_size"], config["settings"]["data"]) == (300, "shapes")


NUMBER = (int, float)
POLICY = {
    "final_accuracy": NUMBER,
    "best_accuracy": NUMBER,
    "accuracy_per_seed": dict,
    "activation_rate": NUMBER,
    "candidates": NUMBER,
    "activated": NUMBER,
    "train_seconds": NUMBER,
    "total_seconds": NUMBER,
    "flops": NUMBER,
    "unit_energy": NUMBER,
    "energy_savings_percent": NUMBER,
    "joules": (*NUMBER, type(None)),
    "joules_method": str,
    "peak_memory_mib": (*NUMBER, type(None)),
    "flops_per_sample": dict,
    "flops_uncounted": list,
    "phases": dict,
}
SUMMARY = {
    "program": str,
    "dataset": str,
    "synthetic": bool,
    "n_train": int,
    "n_val": int,
    "model": str,
    "device": str,
    "platform": str,
    "torch": str,
    "out": str,
    "seeds": list,
    "complete": bool,
    "stopped_by": (str, type(None)),
    "changes_by_hand": (int,),
    "skipped_images": int,
    "policies": dict,
    "references": dict,
    "measured": dict,
}
MEASURED = {
    "speedup_vs_full",
    "total_speedup_vs_full",
    "flops_saved_percent_vs_full",
    "joules_saved_percent_vs_full",
    "accuracy_minus_full",
    "accuracy_minus_random",
    "accuracy_minus_short",
}
PHASES = ["warmup", "ramp", "sparse", "anneal", "scoring", "evaluation", "checkpoint"]


def assert_types(found, expected):
    assert set(found) == set(expected)
    for name, kind in expected.items():
        assert isinstance(found[name], kind), name


@pytest.mark.slow
def test_the_summary_has_the_contracts_keys_and_types(finished):
    found = summary(finished.out)
    assert_types(found, SUMMARY)
    assert (found["program"], found["dataset"], found["synthetic"]) == ("cifar10_ast", "shapes", True)
    assert (found["n_train"], found["n_val"], found["seeds"]) == (300, 2000, [0])
    assert (found["complete"], found["stopped_by"]) == (True, None)
    assert list(found["policies"]) == ["ast", "full", "random"]
    for policy in found["policies"].values():
        assert_types(policy, POLICY)
        assert list(policy["phases"]) == PHASES
        for phase in policy["phases"].values():
            assert set(phase) == {"seconds", "candidates", "activated", "flops", "joules", "unit_energy"}
    assert set(found["measured"]) == MEASURED


@pytest.mark.slow
def test_the_summarys_figures_follow_from_one_another(finished):
    found = summary(finished.out)
    for policy in found["policies"].values():
        phases = policy["phases"]
        seconds = {name: phase["seconds"] for name, phase in phases.items()}
        assert policy["total_seconds"] == pytest.approx(sum(seconds.values()))
        assert policy["train_seconds"] == pytest.approx(
            policy["total_seconds"] - seconds["evaluation"] - seconds["checkpoint"]
        )
        assert policy["candidates"] == sum(phase["candidates"] for phase in phases.values()) == 4 * 300
        assert policy["activated"] == sum(phase["activated"] for phase in phases.values())
        assert policy["activation_rate"] == pytest.approx(policy["activated"] / policy["candidates"])
        unit = 10 * policy["activated"] + 0.1 * (policy["candidates"] - policy["activated"])
        assert policy["unit_energy"] == pytest.approx(unit)
        assert policy["energy_savings_percent"] == pytest.approx(100 * (1 - unit / 12_000))
        per_sample = policy["flops_per_sample"]
        assert policy["flops"] == pytest.approx(
            policy["activated"] * per_sample["training"] + 4 * 2000 * per_sample["evaluation"]
        )
        assert phases["evaluation"]["flops"] == pytest.approx(4 * 2000 * per_sample["evaluation"])
        assert policy["accuracy_per_seed"] == {"0": policy["final_accuracy"]}
        assert (policy["joules"] is None) == policy["joules_method"].startswith("unavailable (")
        assert policy["joules"] != 0
    ast_run, full, chance = (found["policies"][name] for name in ("ast", "full", "random"))
    measured = found["measured"]
    assert full["activation_rate"] == 1
    assert measured["speedup_vs_full"] == pytest.approx(full["train_seconds"] / ast_run["train_seconds"])
    assert measured["flops_saved_percent_vs_full"] == pytest.approx(
        100 * (1 - ast_run["flops"] / full["flops"])
    )
    for name, other in (("full", full), ("random", chance)):
        assert measured[f"accuracy_minus_{name}"] == pytest.approx(
            ast_run["final_accuracy"] - other["final_accuracy"]
        )


@pytest.mark.slow
def test_metrics_have_a_row_an_epoch_with_the_contracts_keys(finished):
    found = rows(finished.out)
    assert [(row["policy"], row["epoch"]) for row in found] == [
        (policy, epoch) for policy in ("ast", "full", "random") for epoch in (1, 2, 3, 4)
    ]
    keys = "policy seed epoch phase train_loss val_accuracy target_activation activation_rate mean_activation"
    keys += " threshold controller candidates activated seconds elapsed_seconds data_wait_percent"
    keys += " learning_rate significance_quantiles"
    for row in found:
        assert list(row) == keys.split()
        assert row["seed"] == 0
        assert row["candidates"] == 300
        assert row["activation_rate"] == pytest.approx(row["activated"] / 300)
        assert 0 <= row["val_accuracy"] <= 100
        assert 0 <= row["data_wait_percent"] <= 100
        assert math.isfinite(row["train_loss"])
        gated = row["policy"] == "ast" and row["phase"] in ("ramp", "sparse")
        assert (row["controller"] is not None) == gated
        assert (row["threshold"] is not None) == gated
        if gated:
            assert set(row["controller"]) == {"ema", "p", "i", "feedforward"}
            assert row["activation_rate"] == pytest.approx(row["target_activation"], abs=0.005)
    for policy in ("ast", "full", "random"):
        own = [row for row in found if row["policy"] == policy]
        assert [row["phase"] for row in own] == ["warmup", "ramp", "sparse", "anneal"]
        assert own == sorted(own, key=lambda row: row["elapsed_seconds"])
        entry = summary(finished.out)["policies"][policy]
        assert own[-1]["val_accuracy"] == entry["final_accuracy"]
        assert max(row["val_accuracy"] for row in own) == entry["best_accuracy"]
        assert sum(row["activated"] for row in own) == entry["activated"]


@pytest.mark.slow
def test_random_activates_as_many_as_ast_in_every_epoch(finished):
    found = rows(finished.out)
    counts = {
        policy: [row["activated"] for row in found if row["policy"] == policy] for policy in ("ast", "random")
    }
    assert counts["random"] == counts["ast"]
    assert counts["ast"][2] < 300


@pytest.mark.slow
def test_synthetic_data_are_called_so_loudly(finished):
    out = finished.done.stdout
    assert "SYNTHETIC" in next(line for line in out.splitlines() if line.startswith("data:"))
    assert "SYNTHETIC" in out[out.index("measured against full training") :]


@pytest.mark.slow
def test_the_settings_are_printed_with_where_they_came_from(finished):
    out = finished.done.stdout
    for name in (item.arg for item in fields_in_source()):
        assert re.search(rf"^  {name} = ", out, re.MULTILINE), name
    assert re.search(r"^  train_size = 300  \(--train-size\)$", out, re.MULTILINE)
    assert re.search(r"^  device = cpu  \(decided by", out, re.MULTILINE)
    assert re.search(r"^  batch_size = 32  \(--batch-size\)$", out, re.MULTILINE)


@pytest.mark.slow
def test_the_saved_model_is_asts_and_as_good_as_the_summary_says(finished, cifar):
    settings = json.loads((finished.out / "config.json").read_text())["settings"]
    model = cifar.simple_cnn(10)
    model.load_state_dict(torch.load(finished.out / "model.pt", weights_only=True))
    data = cifar.shapes(300)
    views = cifar.normalise(torch.from_numpy(data.val_images))
    dtype = {"off": None, "bf16": torch.bfloat16}[settings["amp"]]
    with torch.no_grad(), torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        right = model(views).argmax(1) == torch.from_numpy(data.val_labels)
    accuracy = summary(finished.out)["policies"]["ast"]["final_accuracy"]
    assert 100 * float(right.float().mean()) == pytest.approx(accuracy, abs=0.5)


@pytest.mark.slow
def test_the_picture_is_drawn(finished):
    picture = decode_png(
        torch.frombuffer(bytearray((finished.out / "curves.png").read_bytes()), dtype=torch.uint8)
    )
    assert picture.shape[1] >= 600
    assert picture.shape[2] >= 1000
    orange = (picture[:3].int() - torch.tensor([0xD5, 0x5E, 0x00])[:, None, None]).abs().sum(0) < 20
    assert orange.sum() > 200


@pytest.mark.slow
def test_resume_on_a_finished_run_changes_no_byte(finished, tmp_path):
    made = copied(finished, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}, files(tmp_path)
    done = made.run("--resume", "--out", "out", "--time-limit", 5)
    assert "finished" in done.stdout
    assert ({path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}, files(tmp_path)) == before


@pytest.mark.slow
def test_another_run_renames_the_folder_and_overwrites_nothing(finished, tmp_path):
    made = copied(finished, tmp_path)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    kept = files(tmp_path / "out")
    made.run(*SMALL, *AT_ONCE, "--out", "out", "--lr", 0.01)
    assert files(tmp_path / "out-1") == kept
    second = files(tmp_path / "out")
    made.run(*SMALL, *AT_ONCE, "--out", "out", "--lr", 0.02)
    assert files(tmp_path / "out-1") == kept
    assert files(tmp_path / "out-2") == second
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["settings"]["lr"] == 0.02


# --- killed, stopped, resumed ---


def wait_for(process, condition):
    deadline = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def epochs_done(out):
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def newest_number(out):
    numbers = [int(path.stem) for path in (out / "checkpoints").glob("*.ckpt")]
    return max(numbers, default=-1)


def newest_state(cifar, out):
    return cifar.load_checkpoint(out / "checkpoints", print)


def assert_same_run(out, reference):
    """Bit for bit, apart from what a clock measured."""
    mine = torch.load(out / "model.pt", weights_only=True)
    theirs = torch.load(reference / "model.pt", weights_only=True)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    untimed = [
        [{k: v for k, v in row.items() if k not in TIMED} for row in rows(folder)]
        for folder in (out, reference)
    ]
    assert untimed[0] == untimed[1]
    assert (out / "events.jsonl").read_bytes() == (reference / "events.jsonl").read_bytes()
    assert summary(out)["complete"]
    for policy, entry in summary(reference)["policies"].items():
        for key in ("final_accuracy", "best_accuracy", "accuracy_per_seed", "activation_rate"):
            assert summary(out)["policies"][policy][key] == entry[key]
        for key in ("candidates", "activated", "flops", "unit_energy"):
            assert summary(out)["policies"][policy][key] == entry[key]
    assert {path.name for path in out.iterdir()} == OUTPUTS | {"checkpoints"}
    assert {path.suffix for path in (out / "checkpoints").iterdir()} == {".ckpt"}


CHAINS = {
    "remembered": ("--gate", "remembered", "--checkpoint-seconds", 0),
    "live": ("--gate", "live", "--target-activation", 0.3, "--checkpoint-seconds", 0),
    "topk": (
        *("--gate", "live", "--live-rule", "topk", "--score-scale", 0.5),
        *("--model", "resnet", "--checkpoint-seconds", 0, "--epochs", 3),
    ),
    "proxy": ("--gate", "proxy", "--target-activation", 0.3, "--checkpoint-seconds", 0),
    "interval": ("--compare", "none", "--seeds", "3,5", "--checkpoint-seconds", 0.05),
}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, cifar):
    """Runs never interrupted, one a chain, made when first asked for."""
    made = {}

    def of(chain, threads=1):
        if (chain, threads) not in made:
            made[chain, threads] = Place(tmp_path_factory.mktemp("uninterrupted"))
            write_packed(cifar, made[chain, threads].folder / "packed")
            made[chain, threads].run(*TINY, *CHAINS[chain], "--out", "out", threads=threads)
        return made[chain, threads].folder / "out"

    return of


@pytest.mark.slow
@pytest.mark.parametrize(
    "chain,threads", [("remembered", 1), ("live", 2), ("topk", 1), ("proxy", 1), ("interval", 1)]
)
def test_killed_at_random_moments_and_resumed_equals_the_uninterrupted_run(
    cifar, place, uninterrupted, chain, threads
):
    """One kill in the first half (AST, or the first seed), one in the second (random, or the second seed)."""
    reference = uninterrupted(chain, threads)
    write_packed(cifar, place.folder / "packed")
    out, rng = place.folder / "out", random.Random(chain)
    first_epochs = epochs_done(reference) // 2
    steps = 0 if chain == "interval" else rng.randrange(20)
    moments = [lambda: newest_number(out) >= steps, lambda: epochs_done(out) > first_epochs]
    flags, where = (*TINY, *CHAINS[chain], "--out", "out"), []
    for moment in moments:
        process = place.start(*flags, threads=threads)
        wait_for(process, moment)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        state = newest_state(cifar, out)
        where.append((len(state["finished"]), state["trainer"] is not None and state["trainer"]["epoch"]))
        flags = ("--resume", "--out", "out", *CHAINS[chain])
    assert [done for done, _ in where] == [0, 1]
    assert any(epoch for _, epoch in where), "neither kill was in mid-epoch"
    place.run("--resume", "--out", "out", threads=threads)
    assert_same_run(out, reference)


def stop(made, number, condition, *flags):
    process = made.start(*TINY, *CHAINS["remembered"], "--out", "out", *flags)
    out = made.folder / "out"
    wait_for(process, lambda: condition(out))
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=200)
    return SimpleNamespace(code=process.returncode, stdout=stdout, stderr=stderr)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, cifar):
    """A run stopped by SIGTERM in AST's second epoch or later, with two checkpoints."""
    made = Place(tmp_path_factory.mktemp("stopped"))
    write_packed(cifar, made.folder / "packed")
    made.out = made.folder / "out"
    made.done = stop(made, signal.SIGTERM, lambda out: newest_number(out) >= 8)
    return made


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_143(stopped, cifar):
    assert stopped.done.code == 143, stopped.done
    assert "SIGTERM" in stopped.done.stderr
    assert "Traceback" not in stopped.done.stderr
    found = summary(stopped.out)
    assert (found["complete"], found["stopped_by"]) == (False, "SIGTERM")
    assert "--resume" in stopped.done.stdout
    state = newest_state(cifar, stopped.out)
    assert state["finished"] == []
    assert state["trainer"]["rows"] == rows(stopped.out)
    assert len(list((stopped.out / "checkpoints").glob("*.ckpt"))) == 2
    assert (stopped.out / "model.pt").exists()


@pytest.mark.slow
def test_a_stopped_run_resumes_to_the_same_end_also_with_another_time_limit(stopped, uninterrupted, tmp_path):
    made = copied(stopped, tmp_path)
    made.run("--resume", "--out", "out", "--time-limit", 60)
    assert_same_run(tmp_path / "out", uninterrupted("remembered"))


@pytest.mark.slow
def test_ctrl_c_in_a_comparison_exits_with_130_claims_nothing_and_resumes(cifar, place, uninterrupted):
    write_packed(cifar, place.folder / "packed")
    out = place.folder / "out"
    done = stop(place, signal.SIGINT, lambda out: epochs_done(out) > 4)
    assert done.code == 130, done
    assert "Traceback" not in done.stderr
    found = summary(out)
    assert (found["complete"], found["stopped_by"]) == (False, "Ctrl-C")
    assert len(rows(out)) < 8
    assert list(found["policies"]) == ["ast", "random"]
    # A comparison with a run that was not finished would be neither.
    assert set(found["measured"].values()) == {None}
    place.run("--resume", "--out", "out")
    assert_same_run(out, uninterrupted("remembered"))


@pytest.mark.slow
def test_a_time_limit_stops_with_results_and_a_longer_one_goes_on(cifar, place):
    write_packed(cifar, place.folder / "packed")
    flags = ("--data", "packed", "--epochs", 2000, "--compare", "none", "--out", "out")
    done = place.run(*flags, "--time-limit", 0.02)
    out = place.folder / "out"
    found, before = summary(out), rows(out)
    assert (found["complete"], found["stopped_by"]) == (False, "time limit")
    assert before
    assert found["policies"]["ast"]["final_accuracy"] == before[-1]["val_accuracy"]
    assert {path.name for path in out.iterdir()} == OUTPUTS | {"checkpoints"}
    assert "stopped by time limit" in done.stdout
    place.run("--resume", "--out", "out", "--time-limit", 0.03)
    after = rows(out)
    assert after[: len(before)] == before
    assert len(after) > len(before)


@pytest.mark.slow
def test_a_damaged_latest_checkpoint_falls_back_with_a_warning(stopped, uninterrupted, tmp_path):
    made = copied(stopped, tmp_path)
    newest = max((tmp_path / "out" / "checkpoints").glob("*.ckpt"))
    newest.write_bytes(newest.read_bytes()[:-100])
    done = made.run("--resume", "--out", "out")
    warned = [line for line in (done.stdout + done.stderr).splitlines() if "damaged" in line]
    assert len(warned) == 1
    assert newest.name in warned[0]
    assert_same_run(tmp_path / "out", uninterrupted("remembered"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags,env,told",
    [
        (("--lr", "0.3"), {}, "--lr 0.3"),
        (("--epochs", "9"), {}, "--epochs 9"),
        (("--seeds", "0,1"), {}, "--seeds 0,1"),
        ((), {"AST_GATE": "live"}, "AST_GATE live"),
        (("--data", "elsewhere"), {}, "--data elsewhere"),
        (("--data", "auto"), {}, "--data auto"),
    ],
)
def test_resume_with_another_setting_is_refused(
    cifar, stopped, tmp_path, monkeypatch, capfd, flags, env, told
):
    copied(stopped, tmp_path)
    before = files(tmp_path)
    err = refuse(cifar, monkeypatch, capfd, tmp_path, "--resume", "--out", "out", *flags, env=env)
    assert told in err
    assert files(tmp_path) == before


@pytest.mark.slow
def test_resume_beside_a_damaged_config_is_refused(cifar, stopped, tmp_path, monkeypatch, capfd):
    copied(stopped, tmp_path)
    (tmp_path / "out" / "config.json").write_text('{"settings": {"lr"')
    before = files(tmp_path)
    assert "config.json" in refuse(cifar, monkeypatch, capfd, tmp_path, "--resume", "--out", "out")
    assert files(tmp_path) == before


@pytest.mark.slow
def test_resume_beside_a_damaged_summary_goes_on(cifar, stopped, tmp_path, monkeypatch):
    copied(stopped, tmp_path)
    (tmp_path / "out" / "summary.json").write_text('{"complete": tr')
    assert call_main(cifar, monkeypatch, tmp_path, "--resume", "--out", "out") == 0
    assert summary(tmp_path / "out")["complete"]


@pytest.mark.slow
def test_resume_on_other_data_is_refused(cifar, stopped, tmp_path, monkeypatch, capfd):
    copied(stopped, tmp_path)
    shutil.rmtree(tmp_path / "packed")
    write_packed(cifar, tmp_path / "packed", n_train=150)
    before = files(tmp_path)
    assert "150" in refuse(cifar, monkeypatch, capfd, tmp_path, "--resume", "--out", "out")
    assert files(tmp_path) == before


@pytest.mark.slow
def test_resume_without_a_checkpoint_starts_afresh_and_says_so(place):
    (place.folder / "out").mkdir()
    (place.folder / "out" / "notes.txt").write_text("mine")
    done = place.run(*SMALL, *AT_ONCE, "--out", "out", "--resume")
    assert "starting afresh" in done.stdout
    assert (place.folder / "out" / "config.json").exists()
    assert [path.read_text() for path in place.folder.rglob("notes.txt")] == ["mine"]


# --- disks ---


def at_most(size):
    """No file may grow beyond `size` bytes; Python turns the signal into the error of a full disk."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@pytest.mark.slow
@pytest.mark.parametrize(
    "size,told", [(200, "config.json"), (1200, "metrics.jsonl"), (50_000, ".ckpt")], ids=str
)
def test_a_disk_that_fills_up_is_one_line(cifar, place, size, told):
    write_packed(cifar, place.folder / "packed")
    interval = 60 if told == "metrics.jsonl" else 0
    flags = (*TINY, "--checkpoint-seconds", interval, "--out", "out")
    err = place.refuse(*flags, preexec_fn=at_most(size))
    assert told in err
    assert not list(place.folder.rglob("*.part"))


@pytest.mark.slow
def test_a_checkpoint_survives_a_full_disk_and_resumes_once_there_is_room(
    cifar, stopped, uninterrupted, tmp_path
):
    made = copied(stopped, tmp_path)
    before = files(tmp_path / "out" / "checkpoints")
    flags = ("--resume", "--out", "out", "--checkpoint-seconds", 0)
    err = made.refuse(*flags, preexec_fn=at_most(1_000_000))
    assert str(Path("out", "checkpoints")) in err
    assert files(tmp_path / "out" / "checkpoints") == before
    made.run("--resume", "--out", "out")
    assert_same_run(tmp_path / "out", uninterrupted("remembered"))


def test_a_folder_that_cannot_be_made_is_refused(cifar, tmp_path, monkeypatch, capfd):
    (tmp_path / "file").write_text("mine")
    before = files(tmp_path)
    for out in ("file", "file/under", "file/under/more"):
        err = refuse(cifar, monkeypatch, capfd, tmp_path, *SMALL, "--out", out)
        assert f"--out {out}" in err
        assert files(tmp_path) == before


def bound_by_permissions():
    """Takes from root what lets it write anywhere; others are bound already, and cannot drop it."""
    drop_from_bounding_set, dac_override = 24, 1
    ctypes.CDLL(None).prctl(drop_from_bounding_set, dac_override, 0, 0, 0)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="drops root's powers the way Linux does")
@pytest.mark.parametrize("holds_a_run", [False, True])
def test_a_read_only_folder_is_refused(finished, tmp_path, holds_a_run):
    made, locked = Place(tmp_path), tmp_path / "locked"
    locked.mkdir()
    if holds_a_run:
        shutil.copytree(finished.out, locked / "out")
    before = files(locked)
    locked.chmod(0o555)
    try:
        err = made.refuse(*SMALL, "--out", Path("locked", "out"), preexec_fn=bound_by_permissions)
    finally:
        locked.chmod(0o755)
    assert str(Path("locked", "out")) in err
    assert files(locked) == before


# --- bad input ---


@contextlib.contextmanager
def handlers_put_back():
    old = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def call_main(cifar, monkeypatch, folder, *flags, env=None):
    """The script's exit status, in this process, where a call does not pay for importing torch."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["cifar10_ast.py", *map(str, flags)])
    for name, value in (env or {}).items():
        monkeypatch.setenv(name, value)
    with handlers_put_back():
        return cifar.main()


def refuse(cifar, monkeypatch, capfd, folder, *flags, env=None):
    """The one line that a refused call leaves on stderr."""
    capfd.readouterr()
    code = call_main(cifar, monkeypatch, folder, *flags, env=env)
    err = capfd.readouterr().err
    assert code == 2
    assert len(err.splitlines()) == 1, err
    return err


@pytest.fixture
def earlier(tmp_path):
    """A folder with an earlier run, which no refused call may touch."""
    (tmp_path / "out" / "checkpoints").mkdir(parents=True)
    (tmp_path / "out" / "config.json").write_text("{}")
    (tmp_path / "out" / "model.pt").write_text("precious")
    return tmp_path


@pytest.mark.parametrize(
    "flags,told",
    [
        (("--target-activation", "1.4"), "1.4"),
        (("--target-activation", "0"), "--target-activation 0"),
        (("--target-activation", "-0.2"), "-0.2"),
        (("--gate", "proxi"), "proxi"),
        (("--model", "vgg"), "vgg"),
        (("--batch-size", "0"), "--batch-size 0"),
        (("--epochs", "0"), "--epochs 0"),
        (("--epochs", "many"), "many"),
        (("--seeds", "a,b"), "a,b"),
        (("--compare", "best"), "best"),
        (("--device", "cuda:77"), "cuda:77"),
        (("--amp", "fp16", "--device", "cpu"), "--amp fp16"),
        (("--nonsense", "3"), "--nonsense"),
        (("stray",), "stray"),
        (("--data", "no/such/place"), "no/such/place"),
        (("--data", "shapes", "--train-size", "3"), "--train-size 3"),
        ((*SMALL, "--epochs", "2", "--warmup-epochs", "5"), "warm-up 5"),
        ((*SMALL, "--epochs", "2", "--gate", "live", "--score-scale", "0.3", "--warmup-epochs", "0"), "0.3"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_bad_setting_is_one_line_and_touches_nothing(cifar, earlier, monkeypatch, capfd, flags, told):
    before = files(earlier)
    err = refuse(cifar, monkeypatch, capfd, earlier, "--out", "out", *flags)
    assert told in err
    assert "expected" in err
    assert files(earlier) == before


def write_images(folder, broken=0, empty=None):
    """Class folders of ten 32 x 32 images each; `broken` of them no images at all."""
    pixels = torch.randint(0, 256, (3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
    image = encode_png(pixels).numpy().tobytes()
    for split in ("train", "test"):
        for name in ("ant", "bee", "cow"):
            (folder / split / name).mkdir(parents=True)
            for number in range(0 if (split, name) == ("train", empty) else 10):
                content = b"no image" if split == "train" and number < broken else image
                (folder / split / name / f"{number}.png").write_bytes(content)


def half_a_zip(folder):
    write_images(folder / "images")
    with zipfile.ZipFile(folder / "data.zip", "w") as archive:
        for path in sorted((folder / "images").rglob("*.png")):
            archive.write(path, path.relative_to(folder / "images"))
    halve(folder / "data.zip")
    return "data.zip", "data.zip"


def half_a_tar(folder):
    (folder / "data_batch_1").write_bytes(random.Random(0).randbytes(50_000))
    with tarfile.open(folder / "data.tar.gz", "w:gz") as archive:
        archive.add(folder / "data_batch_1", "cifar-10-batches-py/data_batch_1")
    halve(folder / "data.tar.gz")
    return "data.tar.gz", "data.tar.gz"


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def unreadable_images(folder):
    write_images(folder / "data", broken=1)
    return "data", "0.png"


def an_empty_class(folder):
    write_images(folder / "data", empty="bee")
    return "data", "bee"


def labels_outside_the_classes(folder):
    (folder / "data").mkdir()
    for split in ("train", "val"):
        np.save(folder / "data" / f"{split}_images.npy", np.zeros((20, 32, 32, 3), np.uint8))
        np.save(folder / "data" / f"{split}_labels.npy", np.arange(20) % 10 + 3)
    (folder / "data" / "classes.json").write_text(json.dumps([f"class {i}" for i in range(10)]))
    return "data", "12"


@pytest.mark.slow
@pytest.mark.parametrize(
    "prepare", [half_a_zip, half_a_tar, unreadable_images, an_empty_class, labels_outside_the_classes]
)
def test_bad_data_is_one_line_and_touches_nothing(earlier, prepare):
    made = Place(earlier)
    data, told = prepare(earlier)
    before = files(earlier)
    err = made.refuse("--data", data, "--out", "out", "--epochs", 1)
    assert told in err
    assert files(earlier) == before


def test_a_bad_setting_given_to_the_script_itself(script):
    done = script("--target-activation", "1.4", check=2)
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "--target-activation 1.4: expected" in done.stderr
    assert [path.name for path in script.folder.iterdir()] == ["cifar10_ast.py"]


# --- help, environment, import ---


def fields_in_source():
    """The fields of Settings as (arg, comment), read from the program's text."""
    source = PROGRAM.read_text(encoding="utf-8")
    with open(PROGRAM, "rb") as file:
        comments = {
            token.start[0]: token.string
            for token in tokenize.tokenize(file.readline)
            if token.type == tokenize.COMMENT
        }
    body = next(
        n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == "Settings"
    ).body
    return [
        SimpleNamespace(
            arg=node.target.id,
            comment=" ".join(
                comments[line].lstrip("# ")
                for line in range(node.lineno, node.end_lineno + 1)
                if line in comments
            ),
        )
        for node in body
        if isinstance(node, ast.AnnAssign)
    ]


def test_help_lists_every_field_with_its_comment(script):
    done = script("--help", check=0, env={"COLUMNS": "1000"})
    shown = " ".join(done.stdout.split())
    listed = fields_in_source()
    assert len(listed) > 25
    for item in listed:
        assert item.comment, item.arg
        assert re.search(rf"--{item.arg.replace('_', '-')}\b", shown), item.arg
        assert " ".join(item.comment.split()) in shown, item.arg
    assert "(default: 0.4)" in shown
    assert done.stderr == ""


@pytest.mark.slow
def test_variables_set_a_run_and_flags_beat_them(place):
    env = {"AST_DATA": "shapes", "AST_TRAIN_SIZE": "60", "AST_OUT": "there", "AST_BATCH_SIZE": "16"}
    done = place.run(*AT_ONCE, "--batch-size", 8, env=env)
    settings = json.loads((place.folder / "there" / "config.json").read_text())["settings"]
    assert (settings["data"], settings["train_size"], settings["batch_size"]) == ("shapes", 60, 8)
    assert "train_size = 60  (AST_TRAIN_SIZE)" in done.stdout
    assert summary(place.folder / "there")["n_train"] == 60


def test_an_unknown_variable_is_refused(cifar, earlier, monkeypatch, capfd):
    before = files(earlier)
    err = refuse(cifar, monkeypatch, capfd, earlier, env={"AST_TARGET_ACTIVATIO": "0.3"})
    assert "AST_TARGET_ACTIVATIO=0.3" in err
    assert "AST_TARGET_ACTIVATION;" in err
    assert files(earlier) == before


@pytest.mark.slow
def test_without_out_results_go_to_runs(place):
    place.run(*SMALL, *AT_ONCE)
    assert (place.folder / "runs" / "cifar10_ast" / "summary.json").exists()


def test_importing_the_program_prints_and_writes_nothing(script):
    before = files(script.folder)
    code = f"import sys; sys.path.insert(0, {str(script.folder)!r}); import cifar10_ast"
    done = subprocess.run(
        [sys.executable, "-I", "-B", "-c", code],
        cwd=script.folder,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert (done.stdout, done.stderr) == ("", "")
    assert files(script.folder) == before


@pytest.mark.slow
def test_on_real_images_it_learns_and_calls_nothing_synthetic(script, real_cifar):
    done = script("--data", real_cifar, "--train-size", 6000, "--epochs", 3, "--compare", "random", check=0)
    summary = json.loads((script.folder / "runs" / "cifar10_ast" / "summary.json").read_text())
    assert (summary["n_train"], summary["n_val"], summary["synthetic"]) == (6000, 10_000, False)
    assert "SYNTHETIC" not in done.stdout
    ours, random = summary["policies"]["ast"], summary["policies"]["random"]
    assert ours["final_accuracy"] > 15  # chance is 10
    assert ours["activated"] == random["activated"] == 6000 * 1.8
