"""Cut at any moment and resumed, a run ends as if nobody had cut it; what is damaged costs an epoch."""

import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import time
from collections import Counter
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import at, changes, files, rows, summary, untimed, write_images
from torch import nn
from torch.utils.data import Dataset

import cifar10_ast as ast

resource = pytest.importorskip("resource", reason="limits files as Unix does")
pytestmark = pytest.mark.usefixtures("one_thread", "small_nets_throughout")
TOTALS = ("candidates", "activated", "flops", "unit_energy")
N = 96  # images to train on: with batches of 16, an epoch of 20 chunks


@pytest.fixture(scope="module")
def one_thread():
    """Sums depend on the number of threads, which a resumed run has to share."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        yield
    torch.set_num_threads(threads)


class Chance(Dataset):
    """Images with noise from every generator that a dataset of the user's may draw from."""

    def __len__(self):
        return 60

    def __getitem__(self, index):
        noise = torch.rand(1) + np.random.rand() + random.random()
        return torch.full((8,), float(index % 3)) + noise.float(), index % 3


def trainer_of(gate="remembered", data=None, balance=False, states=None, **options):
    """A small trainer; `states` gets its state at the start and after each epoch, as a file gives it back."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    config = {"gate": gate, "batch_size": 8, "balance": balance, "amp": "off", "device": "cpu"}
    val = torch.eye(3, 8)[torch.arange(30) % 3], torch.arange(30) % 3
    data = data or (torch.randn(60, 8) + torch.eye(3, 8)[torch.arange(60) % 3], torch.arange(60) % 3)
    trainer = ast.AdaptiveSparseTrainer(model, data, val, config, optimizer, listeners=[], seed=3, **options)

    def save():
        torch.save(ast.state_of(trainer), buffer := io.BytesIO())
        states.append(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))

    trainer.save = trainer.save if states is None else save
    return trainer


def seed_every_generator(number):
    torch.manual_seed(number)
    np.random.seed(number)
    random.seed(number)


KINDS = {gate: {"gate": gate} for gate in ast.GATES}
KINDS |= {"balance": {"balance": True}, "data from every generator": {"data": Chance()}}


@pytest.mark.parametrize("kind", KINDS)
def test_a_trainer_goes_on_from_the_end_of_any_epoch_to_the_same_bits(kind):
    whole = trainer_of(**KINDS[kind], states=(states := []))
    seed_every_generator(1)
    results = whole.train(epochs=6)
    assert len(states) == 7
    for state in states[:-1]:
        other = trainer_of(**KINDS[kind])
        seed_every_generator(2)
        ast.restore(other, state)
        resumed = other.train()
        assert untimed(resumed["epochs"]) == untimed(results["epochs"])
        assert resumed["complete"]
        assert [resumed[key] for key in TOTALS] == [results[key] for key in TOTALS]
        torch.testing.assert_close(other.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)
        assert torch.equal(whole.times_activated, other.times_activated)


def test_what_a_person_set_and_what_was_learned_of_the_data_go_on():
    class Broken(Chance):
        def __getitem__(self, index):
            if index == 7 and len(states) < 3:
                raise OSError("cannot identify image file")
            return torch.full((8,), float(index % 3)), index % 3

        def __len__(self):
            return 120

    states, controls = [], ast.Controls()
    controls.set("target_activation", 0.2)
    controls.set("learning_rate_factor", 0.5)
    whole = trainer_of(data=Broken(), controls=controls, states=states)
    results = whole.train(epochs=6)
    other = trainer_of(data=Broken())
    ast.restore(other, states[3])
    resumed = other.train()
    assert untimed(resumed["epochs"]) == untimed(results["epochs"])
    assert resumed["epochs"][-1]["candidates"] == 119, "an unreadable sample is not asked for again"
    assert other.train_source.unreadable == {7: "cannot identify image file"}
    assert other.controls.values == {"target_activation": 0.2, "learning_rate_factor": 0.5}
    assert [change["new"] for change in resumed["changes"]] == [0.2, 0.5]


@pytest.fixture(scope="module")
def data():
    return ast.shapes(N, 40)


SETTINGS = {"data": "shapes", "train_size": N, "batch_size": 16, "epochs": 5, "compare": "random"}
SETTINGS |= {"device": "cpu", "amp": "off", "lr": 0.02}


def run(out, images, listeners=(), controls=None, said=None, settings=SETTINGS, **given):
    settings = ast.Settings(**settings | {"out": str(out)} | given)
    say = (lambda line: None) if said is None else said.append
    return ast.run(settings, (), list(listeners), controls, say, images)


def resume(*given, **more):
    """As a person would: with --resume and --out and nothing else."""
    return run(*given, settings={"resume": True}, **more)


def cut(go, out, data, how, number, listeners=(), **given):
    """Runs until the `number`th chunk (or epoch, where `how` says so), and ends there."""
    controls = ast.Controls()
    acts = {
        "stop": lambda: controls.ask_stop("stop button"),
        "Ctrl-C": lambda: setattr(controls, "stop", "Ctrl-C"),
        "time limit": lambda: setattr(controls, "deadline", 0.0),
        "crash": lambda: 1 / 0,  # stands for whatever ends a process that had no time to save
    }
    how, _, event = how.partition(" at an ")
    with contextlib.suppress(ZeroDivisionError):
        go(out, data, [*listeners, at(event or "chunk", number, acts[how])], controls, **given)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The folder of a run that nobody cut, of each kind that is asked for."""

    @cache
    def of(**given):
        out = tmp_path_factory.mktemp("whole") / "out"
        run(out, data, **given)
        return out

    return of


def assert_same(out, reference):
    """Bit for bit, apart from what a clock measured."""
    assert rows(out, timed=False) == rows(reference, timed=False)
    models = (torch.load(folder / "model.pt", weights_only=True) for folder in (out, reference))
    mine, theirs = (model["state_dict"] for model in models)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    mine, theirs = (np.load(folder / "samples.npz")["times_activated"] for folder in (out, reference))
    assert (mine == theirs).all()
    found, expected = summary(out), summary(reference)
    assert found["complete"]
    assert found["policies"].keys() == expected["policies"].keys()
    keys = ("final_accuracy", "best_accuracy", "accuracy_per_seed", "activation_rate", *TOTALS)
    for policy, key in itertools.product(expected["policies"], keys):
        assert found["policies"][policy][key] == expected["policies"][policy][key], (policy, key)
    assert found["measured"]["accuracy_minus_random"] == expected["measured"]["accuracy_minus_random"]
    assert {path.name for path in out.iterdir()} == {path.name for path in reference.iterdir()}
    assert len(checkpoints(out)) == 2


ONE = [("Ctrl-C", 1), ("stop", 20), ("time limit", 47), ("crash", 99), ("crash", 131)]
ONE += [(f"crash at an {event}", n) for event, n in (("start", 2), ("epoch", 1), ("end", 1))]
ONE += [("stop at an epoch", 3)]
MORE = [[("stop", 30)] * 3, [("crash", 5), ("crash", 50), ("crash", 70)], [("Ctrl-C at an epoch", 1)] * 4]
OTHERS = [(60, {"gate": "live"}), (60, {"balance": True}), (60, {"compare": "short", "seeds": "3,1"})]
OTHERS += [(30, {"gate": "random", "compare": "none"})]
CASES = [([cut], {}) for cut in ONE] + [(cuts, {}) for cuts in MORE]
CASES += [([("Ctrl-C", 50), ("crash", number)], {"epochs": 4} | given) for number, given in OTHERS]


@pytest.mark.parametrize("cuts,given", CASES, ids=str)
def test_cut_at_any_moment_and_resumed_a_run_ends_as_if_nobody_had_cut_it(data, whole, tmp_path, cuts, given):
    out, go = tmp_path / "out", partial(run, **given)
    for how, number in cuts:
        cut(go, out, data, how, number)
        assert not (out / "summary.json").exists() or not summary(out)["complete"]
        go = resume
    resume(out, data)
    assert_same(out, whole(**given))
    assert (out / "events.jsonl").read_bytes() == b""


def test_what_was_known_is_never_lost_when_a_resumed_run_is_cut_before_it_got_further(data, whole, tmp_path):
    out = tmp_path / "out"
    cut(run, out, data, "Ctrl-C", 70)
    before, known = rows(out), summary(out)["policies"]["ast"]
    assert len(before) == 3
    for how in ("Ctrl-C", "crash", "time limit"):
        cut(resume, out, data, how, 5)
        assert rows(out) == before, f"after {how}"
    resume(out, data, time_limit=1e-9)
    assert rows(out) == before
    assert summary(out)["stopped_by"] == "time limit"
    assert summary(out)["policies"]["ast"]["final_accuracy"] == known["final_accuracy"]
    resume(out, data)
    assert_same(out, whole())


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves a second a chunk, where it listens, and a sensor that reads 5 watts by it."""
    made = SimpleNamespace(now=1000.0, method="nvml-counter", reason="", spent=Counter())
    made.perf_counter = made.monotonic = made.time = lambda: made.now
    made.joules = lambda: 5 * made.now
    monkeypatch.setattr(ast, "time", made)
    monkeypatch.setattr(ast, "energy_meter", lambda device: made)

    def listen(event, data):
        if event == "start":
            made.policy = data["policy"]
        elif event == "chunk":
            made.now += 1
            made.spent[made.policy] += 1

    made.listen = listen
    return made


@pytest.mark.parametrize("moments", [[47], [47, 3], [10, 9, 8]], ids=str)
def test_what_a_cut_epoch_cost_counts_as_repeated(data, tmp_path, clock, moments):
    out = tmp_path / "out"
    for go, moment in zip((run, resume, resume), moments, strict=False):
        cut(go, out, data, "Ctrl-C", moment, [clock.listen])
    resume(out, data, [clock.listen])
    lost = clock.spent["ast"] - 5 * 20
    assert lost >= sum(moments) % 20 > 0
    policy = summary(out)["policies"]["ast"]
    repeated = policy["phases"]["repeated"]
    assert (repeated["seconds"], repeated["joules"]) == (lost, 5 * lost)
    assert (repeated["candidates"], repeated["activated"], repeated["flops"]) == (0, 0, 0)
    assert policy["total_seconds"] == clock.spent["ast"]
    assert policy["train_seconds"] == 5 * 20, "training again is no training"
    assert policy["joules"] == 5 * policy["total_seconds"]
    assert summary(out)["policies"]["random"]["phases"]["repeated"]["seconds"] == 0


def test_a_run_that_was_cut_counts_in_no_mean_and_in_no_comparison(data, tmp_path):
    out = tmp_path / "out"
    cut(run, out, data, "Ctrl-C", 190, epochs=4, seeds="0,1")
    found, epochs = summary(out), rows(out)
    assert (found["complete"], found["stopped_by"]) == (False, "Ctrl-C")
    first = next(r for r in epochs if (r["policy"], r["seed"], r["epoch"]) == ("ast", 0, 4))
    assert {(row["policy"], row["seed"]) for row in epochs} == {("ast", 0), ("random", 0), ("ast", 1)}
    assert found["policies"]["ast"]["accuracy_per_seed"] == {"0": first["val_accuracy"]}
    assert found["policies"]["ast"]["candidates"] == 4 * N
    assert set(found["measured"].values()) == {None}


@pytest.mark.parametrize("minutes,told", [(10 / 60, True), (15 / 60, True), (1.0, False), (0.0, False)])
def test_a_time_limit_shorter_than_an_epoch_is_said_at_once_with_the_way_out(
    data, tmp_path, clock, minutes, told
):
    said, out = [], tmp_path / "out"
    run(out, data, [clock.listen], said=said, time_limit=minutes)
    lines = [line for line in said if line.startswith(f"--time-limit {minutes:g}: an epoch takes about ")]
    assert len(lines) == told, "once, and only where it is true"
    assert not lines or re.search(r"about \d\d s, .* train on less with --train-size", lines[0])
    assert said[-1:] != lines, "before it is over"


def test_what_was_moved_in_the_cut_epoch_is_dropped_and_said_and_what_came_before_it_stays(data, tmp_path):
    def steer(*wishes):
        controls = ast.Controls()
        listeners = [at("chunk", n, partial(controls.set, "target_activation", v)) for n, v in wishes]
        return listeners, controls

    reference, out, said = tmp_path / "reference", tmp_path / "out", []
    run(reference, data, *steer((30, 0.6)), compare="none")
    listeners, controls = steer((30, 0.6), (49, 0.1), (50, 0.2))
    stop = at("chunk", 53, lambda: setattr(controls, "stop", "Ctrl-C"))
    run(out, data, [*listeners, stop], controls, compare="none")
    assert [change["new"] for change in changes(out)] == [0.6, 0.1, 0.2]
    assert summary(out)["changes_by_hand"] == 3
    resume(out, data, said=said)
    [line] = [line for line in said if "dropped" in line]
    assert line.startswith("2 changes by hand in the epoch that was cut are dropped")
    assert [change["new"] for change in changes(out)] == [0.6]
    assert_same(out, reference)


def test_a_stop_is_no_change_that_could_be_dropped(data, tmp_path):
    for how in ("stop", "stop at an epoch"):
        said = []
        cut(run, tmp_path / how, data, how, 2, epochs=3, compare="none")
        (change,) = changes(tmp_path / how)
        assert (change["control"], change["new"]) == ("stop", "stop button")
        resume(tmp_path / how, data, said=said)
        assert not [line for line in said if "dropped" in line]


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory, small_nets_throughout):
    """A run stopped in its fourth epoch, with two checkpoints."""
    out = tmp_path_factory.mktemp("stopped") / "out"
    cut(run, out, data, "Ctrl-C", 70)
    return out


@pytest.fixture
def out(stopped, tmp_path):
    """A copy of it, elsewhere: a folder that was saved and copied back."""
    return shutil.copytree(stopped, tmp_path / "elsewhere")


def checkpoints(out):
    return sorted((out / "checkpoints").glob("*.ckpt"))


def flip(place, content):
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def hashed(payload):
    return hashlib.sha256(payload).digest() + payload


class Evil:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def linked(path):
    path.unlink()
    path.symlink_to("nowhere")


def made_a_folder(path):
    path.unlink()
    path.mkdir()


def with_state(change):
    """Does something to a checkpoint's state, and writes it as a whole one."""

    def do(path):
        state = ast.read_checkpoint(path)
        torch.save(change(state) or state, buffer := io.BytesIO())
        path.write_bytes(hashed(buffer.getvalue()))

    return do


def with_bytes(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


MISFITS = {
    "empty": with_bytes(lambda content: b""),
    "cut": with_bytes(lambda content: content[:-1]),
    "cut in its digest": with_bytes(lambda content: content[:10]),
    "longer": with_bytes(lambda content: content + b"\0"),
    "flipped digest": with_bytes(partial(flip, 0)),
    "flipped bit": with_bytes(partial(flip, 2000)),
    "no pickle": with_bytes(lambda content: hashed(b"nothing")),
    "code": with_bytes(lambda content: hashed(pickle.dumps({"identity": Evil()}))),
    "dangling link": linked,
    "folder": made_a_folder,
    "no dict": with_state(lambda state: [1]),
    "another run's": with_state(lambda state: state["identity"].__setitem__(1, "0" * 64)),
    "an older version's": with_state(lambda state: state["identity"].__setitem__(0, 2)),
    "another model's": with_state(lambda state: state["trainer"]["model"].popitem() and None),
    "another shape": with_state(lambda state: state["trainer"]["model"].update({"0.weight": torch.ones(2)})),
    "no such rows": with_state(lambda state: state["trainer"].update(rows=7)),
}
KEYS = ("identity", "finished", "skipped", "trainer")
MISFITS |= {f"without {key}": with_state(lambda state, key=key: state.pop(key) and None) for key in KEYS}
KEYS = ("gate", "optimizer", "ledger", "schedule", "generators", "random_states", "rows", "progress")
MISFITS |= {
    f"trainer without {key}": with_state(lambda state, key=key: state["trainer"].pop(key) and None)
    for key in KEYS
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_where_the_newest_checkpoint_does_not_fit_the_one_before_serves(
    data, whole, out, misfit, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    newest, said = checkpoints(out)[-1], []
    before = len(checkpoints(out))
    MISFITS[misfit](newest)
    (out / "checkpoints" / "best.ckpt").write_bytes(b"mine")
    kept = newest.read_bytes() if newest.is_file() else None
    resume(out, data, said=said)
    [warning] = [line for line in said if "warning" in line]
    assert warning.startswith(f"warning: {newest}: ") and "trying the checkpoint before it" in warning
    assert "\n" not in warning and "trust" not in warning
    aside = newest.with_suffix(".unfit")
    assert aside.is_file() == (kept is not None) and (kept is None or aside.read_bytes() == kept)
    mine = out / "checkpoints" / "best.ckpt"
    assert mine.read_bytes() == b"mine", "whatever has another name is not ours"
    mine.unlink()
    assert_same(out, whole())
    assert (before, len(checkpoints(out))) == (2, 2)
    assert not (tmp_path / "hacked").exists()


def test_without_a_whole_checkpoint_it_starts_afresh_says_so_and_keeps_what_there_is(data, whole, out):
    for path in checkpoints(out):
        path.write_bytes(b"nothing")
    (out / "notes.txt").write_text("mine")
    kept, said = files(out), []
    resume(out, data, said=said)
    assert f"no checkpoint to resume in {out}: starting afresh" in said
    assert_same(out, whole())
    assert files(out.with_name("elsewhere-1")) == kept


@contextlib.contextmanager
def refused(out, words):
    """Bad input in these words, and not a byte touched."""
    before = files(out.parent)
    with pytest.raises(ast.BadInput, match=words):
        yield
    assert files(out.parent) == before


OTHER = {"lr": 0.3, "epochs": 9, "seeds": "0,1", "gate": "live", "compare": "none"}


@pytest.mark.parametrize("name,value", OTHER.items())
def test_resuming_with_another_setting_is_refused_and_touches_nothing(data, out, name, value):
    with refused(out, f"{ast.flag(name)} {value}: expected .* as in the run in {out}; leave it out"):
        resume(out, data, **{name: value})


def test_resuming_on_other_data_is_refused_and_touches_nothing(out):
    with refused(out, "these settings and the 90 images"):
        resume(out, ast.shapes(90, 40))


def test_data_that_moved_are_known_by_what_they_hold(data, whole, out):
    moved = replace(data, name="elsewhere", source="another mount")
    resume(out, moved, data="elsewhere", data_dir="there")
    assert_same(out, whole())


def test_an_output_that_can_only_be_read_is_copied_and_gone_on_with(data, whole, out, tmp_path, monkeypatch):
    monkeypatch.setattr(ast.os, "access", lambda path, mode: Path(path) != out)
    monkeypatch.setattr(ast, "PLACES", {"local": (str(tmp_path / "home"), ".")})
    before, said = files(out), []
    resume(out, data, said=said)
    home = tmp_path / "home" / "cifar10_ast"
    assert f"{out} can only be read: it was copied to {home}, where it goes on" in said
    assert files(out) == before
    assert_same(home, whole())


STRANGE = {"lr": "fast", "seeds": 7, "epochs": 1e23, "gate": None, "batch_size": True, "model": ["resnet"]}


@pytest.mark.parametrize(
    "content", ['{"settings": {"lr"', "[]", '{"settings": {}}', "\0\xff", "[" * 99_999, None, *STRANGE]
)
def test_resuming_beside_a_damaged_config_is_refused_in_a_sentence(data, out, content):
    config = out / "config.json"
    if content in STRANGE:
        found = json.loads(config.read_text())
        found["settings"][content] = STRANGE[content]
        content = json.dumps(found)
    config.unlink()
    config.write_text(content, encoding="latin1") if content else config.mkdir()
    with refused(out, r"config\.json.*expected"):
        resume(out, data)


@pytest.mark.parametrize("content", [b"[]", b"\xff\0", b'{"seed": 0}\n' * 9, None], ids=repr)
def test_records_of_any_form_are_written_anew_from_the_checkpoint(data, whole, out, content):
    for name in ("summary.json", "metrics.jsonl", "events.jsonl"):
        (out / name).unlink()
        if content:
            (out / name).write_bytes(content)
    resume(out, data)
    assert_same(out, whole())
    assert (out / "events.jsonl").read_bytes() == b""


@pytest.mark.parametrize("lost", ["events.jsonl", "metrics.jsonl", "config.json", "checkpoints", ""])
def test_what_is_deleted_while_it_trains_is_written_again(data, whole, tmp_path, lost):
    out = tmp_path / "out"

    def delete():
        shutil.rmtree(out / lost) if (out / lost).is_dir() else (out / lost).unlink()

    run(out, data, [at("epoch", 2, delete)])
    if lost in ("config.json", ""):  # of which nothing else tells
        shutil.copy(whole() / "config.json", out)
    assert_same(out, whole())
    with contextlib.suppress(ZeroDivisionError):
        cut(run, out, data, "Ctrl-C", 31, [at("chunk", 30, delete)])  # not even a checkpoint is left


def test_no_number_in_the_records_is_infinite_or_none(tmp_path):
    assert ast.as_json({"loss": math.inf, "θ": [math.nan, -math.inf, 0.5]}) == (
        b'{"loss": null, "\\u03b8": [null, null, 0.5]}'
    )


def test_a_copied_folder_resumes_with_another_time_limit_and_without_metrics_and_summary(data, whole, out):
    (out / "summary.json").write_text('{"complete": tr')
    (out / "metrics.jsonl").unlink()
    (out / "events.jsonl").unlink()
    resume(out, data, time_limit=60.0)
    assert_same(out, whole())


def test_resuming_a_finished_run_trains_nothing_and_changes_no_byte(data, whole, tmp_path):
    out, chunks = shutil.copytree(whole(), tmp_path / "out"), []
    (out / "summary.json").write_text((out / "summary.json").read_text().replace(str(whole()), str(out)))
    before = files(out)
    found = resume(out, data, [lambda event, data: chunks.append(event) if event == "chunk" else None])
    assert (found["complete"], chunks) == (True, [])
    assert files(out) == before


@contextlib.contextmanager
def disk_that_takes(size):
    """No file may grow beyond `size` bytes, as on a full disk; Python turns the signal into an OSError."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_leaves_the_checkpoints_and_the_run_resumes_once_there_is_room(data, whole, out):
    before = files(out / "checkpoints")
    with disk_that_takes(20_000), pytest.raises(ast.BadInput, match=r"ckpt: expected a folder with room"):
        resume(out, data)
    assert files(out / "checkpoints") == before
    resume(out, data)
    assert_same(out, whole())


def wait_for(process, out, number):
    """Until the run has written the checkpoint `number`."""
    until = time.monotonic() + 200
    while max((int(path.stem) for path in checkpoints(out)), default=-1) < number:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.001)


def test_killed_at_random_moments_and_resumed_equals_the_uninterrupted_run(script, tmp_path):
    """One kill in AST, one in the policy beside it, each soon after a checkpoint or in the middle of one."""
    out, chance, where = tmp_path / "out", random.Random(), []
    write_images(tmp_path / "images", train=20, test=4)
    settings = "--data images --epochs 8 --batch-size 16 --compare random --device cpu".split()
    flags = settings
    for checkpoint in (chance.randrange(1, 5), chance.randrange(11, 15)):
        process = script.start(*flags, "--out", "out")
        wait_for(process, out, checkpoint)
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        where.append(len(ast.read_checkpoint(checkpoints(out)[-1])["finished"]))
        flags = ["--resume"]
    assert where == [0, 1]
    script("--resume", "--out", "out", check=0)
    script(*settings, "--out", "whole", check=0)
    assert_same(out, tmp_path / "whole")


def test_a_checkpoint_comes_back_as_it_was_and_two_are_kept(tmp_path):
    folder = tmp_path / "made" / "checkpoints"
    for number in range(4):
        weights = torch.arange(1000.0) + number
        ast.save_checkpoint(folder, {"number": number, "weights": weights, "rows": [{"a": None}]})
        found = ast.read_checkpoint(ast.checkpoints(folder)[-1])
        assert (found["number"], found["rows"]) == (number, [{"a": None}])
        assert torch.equal(found["weights"], weights)
        assert len(list(folder.iterdir())) == min(number + 1, 2)
