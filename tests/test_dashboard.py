"""The live run without a kernel: pausing, changing the gate, the monitor, the pictures, the lessons."""

import asyncio
import copy
import io
import itertools
import json
import math
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import IPython.display
import ipywidgets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

N = 240  # samples to train on: with batches of 16, a chunk is 12 and an epoch 20 chunks
EPOCHS = 8  # 1 warm-up, 2 ramp, 4 sparse, 1 anneal
TIMED = {"seconds", "scoring_seconds", "elapsed_seconds", "data_wait_percent"}
NO_THRESHOLD = SimpleNamespace(threshold=None)


# --- small trainings ---


def blobs(count, seed):
    """(inputs [count, 12], labels) of four overlapping classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    return torch.randn(count, 12, generator=generator) + 1.5 * torch.eye(12)[labels], labels


def trainer_of(cifar, listeners=(), config=None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    config = {"batch_size": 16, "amp": "off", "device": "cpu", "target_activation": 0.3} | (config or {})
    data = blobs(N, 0), blobs(60, 1)
    return cifar.AdaptiveSparseTrainer(model, *data, config, optimizer, listeners=list(listeners), **options)


def at(event, number, action):
    """A listener that calls `action` at the `number`th `event`."""
    seen = itertools.count(1)

    def listen(name, data):
        if name == event and next(seen) == number:
            action()

    return listen


def asking(controls, wishes):
    """A listener that asks for controls at given chunks: {chunk: (control, value)}."""
    seen = itertools.count(1)

    def listen(name, data):
        if name == "chunk" and (wish := wishes.get(next(seen))):
            controls.set(*wish)

    return listen


def keeping(event, into):
    return lambda name, data: into.append(dict(data)) if name == event else None


def untimed(rows):
    return [{k: v for k, v in row.items() if k not in TIMED} for row in rows]


def assert_same_end(one, other):
    """Two trainers went the same way, to the bit."""
    assert untimed(one.rows) == untimed(other.rows)
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    assert torch.equal(one.times_activated, other.times_activated)


def wait_for(condition):
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until, "nothing happened for a minute"
        time.sleep(0.005)


@pytest.fixture
def halted(cifar):
    """A run in a worker that was paused by this thread in its sparse phase, and now stands still."""
    made = SimpleNamespace(controls=cifar.Controls(), chunks=[], changes=[], saved=[])
    reached, go = threading.Event(), threading.Event()

    def hold():
        reached.set()
        go.wait(60)

    def save():
        made.saved.append(copy.deepcopy(made.trainer.state_dict()))

    listeners = [keeping("chunk", made.chunks), keeping("control", made.changes), at("chunk", 70, hold)]
    made.trainer = trainer_of(cifar, listeners, controls=made.controls, save=save)
    made.began = time.perf_counter()
    made.worker = cifar.Worker(lambda: made.trainer.train(EPOCHS))
    assert reached.wait(60)
    made.controls.pause(True)
    go.set()
    wait_for(lambda: made.trainer.ledger.open is None)
    yield made
    made.controls.stop = made.controls.stop or "the test is over"
    made.worker.join(60)


@pytest.fixture(scope="module")
def undisturbed(cifar):
    """The same run, by itself."""
    trainer = trainer_of(cifar)
    trainer.train(EPOCHS)
    return trainer


@pytest.fixture(scope="module")
def place(cifar, tmp_path_factory):
    """A folder with a small packed set in it, and models small enough to train in no time."""
    folder = tmp_path_factory.mktemp("place")
    pack(cifar, folder / "packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar, "build_model", linear)
        yield folder


def linear(settings, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, classes))


def pack(cifar, folder, classes=None, n_train=N, n_val=40):
    """The shapes as packed arrays; `classes`: other names, with labels dealt out to all of them."""
    data = cifar.shapes(n_train, n_val)
    folder.mkdir()
    for split in ("train", "val"):
        labels = getattr(data, f"{split}_labels")
        if classes:
            labels = np.arange(len(labels)) % len(classes)
        np.save(folder / f"{split}_images.npy", getattr(data, f"{split}_images"))
        np.save(folder / f"{split}_labels.npy", labels)
    (folder / "classes.json").write_text(json.dumps(classes or data.classes))


def small(cifar, place, out, **changes):
    values = {"data": str(place / "packed"), "batch_size": 16, "epochs": 6, "lr": 0.005, "compare": "none"}
    values |= {"device": "cpu", "amp": "off", "checkpoint_seconds": 3600.0, "out": str(out)}
    return cifar.Settings(**values | changes)


def run_quietly(cifar, settings, listeners=(), controls=None, ready=None):
    return cifar.run(settings, (), list(listeners), controls, lambda line: None, ready)


def events(out):
    return [json.loads(line) for line in (Path(out) / "events.jsonl").read_text().splitlines()]


def metrics(out):
    return untimed(json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines())


# --- pausing and stopping ---


def test_a_paused_run_offers_no_candidate_and_then_ends_as_if_nobody_had_paused(halted, undisturbed):
    offered = len(halted.chunks)
    time.sleep(0.3)
    assert len(halted.chunks) == offered < EPOCHS * 20
    halted.controls.pause(False)
    assert halted.worker.result()["complete"]
    assert_same_end(halted.trainer, undisturbed)
    assert [(c["control"], c["old"], c["new"]) for c in halted.changes] == [
        ("paused", False, True),
        ("paused", True, False),
    ]


def test_the_seconds_of_a_pause_are_nobodys(halted):
    paused = time.perf_counter()
    time.sleep(1.0)
    paused = time.perf_counter() - paused
    halted.controls.pause(False)
    results = halted.worker.result()
    wall = time.perf_counter() - halted.began
    assert results["total_seconds"] <= wall - paused
    assert results["epochs"][-1]["elapsed_seconds"] <= wall - paused
    assert sum(row["seconds"] for row in results["epochs"]) <= wall - paused


def test_a_paused_run_can_be_stopped(halted):
    halted.controls.ask_stop("stop button")
    assert not halted.worker.result()["complete"]
    assert [c["control"] for c in halted.changes] == ["paused", "stop"]
    assert halted.changes[-1]["new"] == halted.controls.stop == "stop button"


def test_a_paused_run_ends_at_its_time_limit(halted):
    halted.controls.deadline = time.monotonic()
    assert not halted.worker.result()["complete"]
    assert halted.controls.stop == "time limit"


def test_a_checkpoint_made_in_a_pause_resumes_without_it(cifar, halted, undisturbed):
    assert halted.saved, "a pause saves"
    trainer = trainer_of(cifar)
    trainer.load_state_dict(halted.saved[-1])
    trainer.train()
    assert_same_end(trainer, undisturbed)


def test_a_pause_that_ends_at_once_is_logged_and_changes_nothing(cifar, undisturbed):
    controls, changes = cifar.Controls(), []

    def press_twice():
        controls.pause(True)
        controls.pause(False)

    listeners = [at("chunk", 70, press_twice), keeping("control", changes)]
    trainer = trainer_of(cifar, listeners, controls=controls)
    trainer.train(EPOCHS)
    assert_same_end(trainer, undisturbed)
    assert [c["new"] for c in changes] == [True, False]


def test_stopped_while_paused_a_run_resumes_to_the_uninterrupted_end(cifar, place, tmp_path):
    run_quietly(cifar, small(cifar, place, tmp_path / "whole"))
    controls, out = cifar.Controls(), tmp_path / "out"
    trains = small(cifar, place, out)
    steps = at("chunk", 50, lambda: controls.pause(True))
    worker = cifar.Worker(lambda: run_quietly(cifar, trains, [steps], controls))
    wait_for(lambda: any(path.stat().st_size for path in (out / "checkpoints").glob("*.ckpt")))
    controls.ask_stop("stop button")
    summary = worker.result()
    assert not summary["complete"]
    assert summary["stopped_by"] == "stop button"
    assert summary["changes_by_hand"] == 0, "pausing and stopping change no setting"
    assert [(e["control"], e["new"]) for e in events(out)] == [("paused", True), ("stop", "stop button")]
    assert run_quietly(cifar, small(cifar, place, out, resume=True))["complete"]
    assert metrics(out) == metrics(tmp_path / "whole")


# --- changing the gate ---


def test_a_gate_takes_hold_at_the_next_epoch_and_is_logged(cifar):
    controls, changes = cifar.Controls(), []
    listeners = [asking(controls, {70: ("gate", "random")}), keeping("control", changes)]
    trainer = trainer_of(cifar, listeners, controls=controls)
    rows = trainer.train(EPOCHS)["epochs"]
    assert [row["threshold"] is None for row in rows] == [True, *[False] * 3, *[True] * 4]
    assert [row["significance_quantiles"] is None for row in rows] == [*[False] * 4, *[True] * 4]
    (change,) = changes
    assert (change["control"], change["old"], change["new"]) == ("gate", "remembered", "random")
    assert (change["set_at"], change["candidates"]) == (70 * 12, 4 * N)


WAY = {  # chunk: gate asked for, which serves from the next epoch on
    45: ("gate", "random"),
    65: ("gate", "remembered"),
    85: ("gate", "live"),
    105: ("gate", "remembered"),
}


@pytest.fixture(scope="module")
def changed(cifar):
    """A run through all gates: remembered, random in epoch 4, remembered, live in 6, remembered."""
    controls = cifar.Controls()
    made = SimpleNamespace(chunks=[], chosen=[], changes=[])
    listeners = [asking(controls, WAY), keeping("chunk", made.chunks), keeping("control", made.changes)]
    made.trainer = trainer_of(cifar, listeners, controls=controls)
    make, served = made.trainer._make_gate, made.trainer.gates["remembered"]

    def spied(gate):
        select = gate.select

        def spy(*given):
            indices, weights = select(*given)
            made.chosen.append((len(made.trainer.rows), indices.clone()))
            return indices, weights

        gate.select = spy
        return gate

    spied(served)
    made.trainer._make_gate = lambda name: spied(make(name))
    made.results = made.trainer.train(EPOCHS)
    return made


def test_through_all_gates_the_counts_stay_exact(changed):
    rows, results = changed.results["epochs"], changed.results
    assert [c["new"] for c in changed.changes] == ["random", "remembered", "live", "remembered"]
    assert [c["old"] for c in changed.changes] == ["remembered", "random", "remembered", "live"]
    assert [c["candidates"] for c in changed.changes] == [3 * N, 4 * N, 5 * N, 6 * N]
    assert [row["candidates"] for row in rows] == [N] * EPOCHS
    assert sum(row["activated"] for row in rows) == results["activated"]
    phases = results["phases"]
    assert sum(account["activated"] for account in phases.values()) == results["activated"]
    for row in (rows[i] for i in (1, 2, 3, 4, 6)):  # to the sample; the live gate holds it over time
        assert row["activated"] == pytest.approx(N * row["target_activation"], abs=1)
    assert sum(chunk["offered"] for chunk in changed.chunks) == EPOCHS * N
    assert sum(chunk["activated"] for chunk in changed.chunks) == results["activated"]


def test_times_activated_is_what_the_gates_chose(changed):
    counted = torch.zeros(N, dtype=torch.int64)
    for _, indices in changed.chosen:
        counted += torch.bincount(indices, minlength=N)
    assert torch.equal(changed.trainer.times_activated.long(), counted)
    assert int(counted.sum()) == sum(row["activated"] for row in changed.results["epochs"][1:7])


def test_the_memory_stays_fresh_while_another_gate_serves(cifar):
    controls, memories = cifar.Controls(), []

    def remember(name, data):
        if name == "epoch":
            memories.append(trainer.gates["remembered"].memory.significance.clone())

    listeners = [asking(controls, {45: ("gate", "random")}), remember]
    trainer = trainer_of(cifar, listeners, controls=controls)
    chosen = []
    trainer.gates["random"] = gate = cifar.RandomGate()
    select = gate.select
    gate.select = lambda *given: chosen.append(select(*given)) or chosen[-1]
    trainer.train(EPOCHS)
    first = torch.zeros(N, dtype=torch.bool)
    first[torch.cat([indices for indices, _ in chosen])[: trainer.rows[3]["activated"]]] = True
    assert torch.equal(memories[3] != memories[2], first)


def test_other_policies_keep_their_own_gate(cifar, place, tmp_path):
    controls = cifar.Controls()
    trains = small(cifar, place, tmp_path / "out", compare="full,random")
    run_quietly(cifar, trains, [asking(controls, {45: ("gate", "live")})], controls)
    rows = metrics(tmp_path / "out")
    by_policy = {p: [r for r in rows if r["policy"] == p] for p in ("ast", "full", "random")}
    assert by_policy["ast"][3]["activation_rate"] != by_policy["ast"][2]["activation_rate"], "live serves"
    assert {r["activation_rate"] for r in by_policy["full"]} == {1.0}
    assert [r["activated"] for r in by_policy["random"]] == [r["activated"] for r in by_policy["ast"]]
    assert all(r["threshold"] is r["significance_quantiles"] is None for r in by_policy["random"])


class EverySecond:
    """Somebody's own gate."""

    def __init__(self):
        self.seen = set()

    def select(self, candidates, target, generator):
        return candidates[::2], torch.ones(len(candidates[::2]))

    def observe(self, indices, losses):
        self.seen.update(indices.tolist())

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def test_a_gate_of_ones_own_can_be_left_and_still_learns(cifar):
    controls, gate, changes = cifar.Controls(), EverySecond(), []
    listeners = [asking(controls, {65: ("gate", "random")}), keeping("control", changes)]
    trainer = trainer_of(cifar, listeners, gate=gate, controls=controls)
    rows = trainer.train(EPOCHS)["epochs"]
    assert [row["activated"] for row in rows] == [N, *[N // 2] * 3, *[round(0.3 * N)] * 3, N]
    assert changes[0]["old"] == "given"
    assert gate.seen == set(range(N))


@pytest.mark.parametrize("scores", [{}, np.zeros(N), torch.zeros(3, 4), torch.full((5,), math.inf)])
def test_a_gate_of_ones_own_may_call_its_attributes_what_it_likes(cifar, scores):
    gate = EverySecond()
    gate.scores = scores
    monitor = cifar.Monitor()
    trainer = trainer_of(cifar, [monitor], gate=gate)
    assert trainer.train(3)["complete"]
    assert monitor.traces[0].points


@pytest.mark.parametrize("stop_at", [63, 83, 103, 130])
def test_a_run_resumes_to_the_bit_after_its_gate_was_changed(cifar, changed, stop_at):
    stop_and_resume(cifar, changed, stop_at)


@pytest.mark.parametrize("stop_at", [47, 71, 95, 110])
def test_a_gate_that_was_asked_for_is_not_forgotten_by_a_stop(cifar, changed, stop_at):
    stop_and_resume(cifar, changed, stop_at)


def stop_and_resume(cifar, changed, stop_at):
    """The run through all gates, stopped at a chunk and resumed, ends as the one that was not."""
    controls, kept = cifar.Controls(), io.BytesIO()
    listeners = [
        asking(controls, WAY),
        at("chunk", stop_at, lambda: controls.ask_stop("stop button")),
    ]
    first = trainer_of(cifar, listeners, controls=controls)
    first.train(EPOCHS)
    torch.save(first.state_dict(), kept)
    kept.seek(0)
    again = cifar.Controls()
    later = {chunk - stop_at: wish for chunk, wish in WAY.items() if chunk > stop_at}
    trainer = trainer_of(cifar, [asking(again, later)], controls=again)
    trainer.load_state_dict(torch.load(kept, weights_only=True))
    trainer.train()
    assert_same_end(trainer, changed.trainer)


def test_a_gate_that_cannot_score_is_refused_and_the_run_goes_on(cifar):
    controls, texts = cifar.Controls(), []
    listeners = [asking(controls, {45: ("gate", "live")}), keeping("notice", texts)]
    config = {"score_scale": 0.5}  # what these inputs, not being images, cannot take
    results = trainer_of(cifar, listeners, config, controls=controls).train(EPOCHS)
    assert results["complete"], "a click in the dashboard never loses a run"
    assert any("score_scale" in notice["text"] for notice in texts)


@pytest.mark.parametrize("gate", ["random", "rs2", "full"])
def test_a_gate_is_logged_as_changed_only_where_it_is(cifar, gate):
    controls, changes = cifar.Controls(), []
    listeners = [asking(controls, {65: ("gate", "remembered")}), keeping("control", changes)]
    trainer = trainer_of(cifar, listeners, {"gate": gate}, controls=controls)
    rows = trainer.train(EPOCHS)["epochs"]
    assert bool(changes) == (rows[5]["threshold"] is not None)


# --- stopping at the very start ---


@pytest.fixture
def display(monkeypatch):
    """What the lessons show, in place of a notebook: PNG bytes, markdown and widgets."""
    shown = []

    class Handle:
        def update(self, thing):
            shown.append(thing)

    def show(thing, **options):
        shown.append(thing)
        return Handle() if options else None

    monkeypatch.setattr(IPython.display, "display", show)
    return shown


def pictures(shown):
    return [thing.data for thing in shown if isinstance(thing, IPython.display.Image)]


def assert_a_picture(png):
    """Not blank, of few colours, and small enough to send once a second."""
    picture = Image.open(io.BytesIO(png))
    assert picture.format == "PNG"
    assert picture.mode == "P"
    assert len(png) <= 100_000
    pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert np.ptp(pixels) > 128
    assert len(np.unique(pixels, axis=0)) > 10
    assert (pixels.min(1) < 200).mean() > 0.005, "almost all of it is paper"


def look_at_everything(cifar, summary, ready):
    cifar.show_table(summary)
    cifar.show_curves(summary)
    cifar.show_costs(summary)
    cifar.show_classes(summary, ready)
    cifar.show_memory(summary)
    cifar.show_chosen(summary, ready)


@pytest.mark.parametrize("chunk", [1, 5])
def test_stopped_in_the_first_epoch_everything_has_a_sentence(cifar, place, tmp_path, display, capsys, chunk):
    out, controls = tmp_path / "out", cifar.Controls()
    trains = small(cifar, place, out)
    ready = cifar.prepare(trains)
    stop = at("chunk", chunk, lambda: controls.ask_stop("stop button"))
    summary = run_quietly(cifar, trains, [stop], controls, ready)
    assert summary["policies"] == {}
    assert not summary["complete"]
    assert [(e["control"], e["new"]) for e in events(out)] == [("stop", "stop button")]
    capsys.readouterr()
    look_at_everything(cifar, summary, ready)
    said = capsys.readouterr().out
    assert "stopped by stop button" in said
    assert said.count("no epoch") >= 4
    assert not pictures(display)
    summary = run_quietly(cifar, replace_resume(trains), ready=ready)
    assert summary["complete"]
    assert summary["changes_by_hand"] == 0


def replace_resume(trains):
    resumed = copy.copy(trains)
    resumed.resume = True
    return resumed


def test_stopped_before_training_began_everything_has_a_sentence(cifar, place, tmp_path, display):
    controls, trains = cifar.Controls(), small(cifar, place, tmp_path / "out")
    ready = cifar.prepare(trains)
    controls.ask_stop("stop button")  # while the data was being loaded
    summary = run_quietly(cifar, trains, (), controls, ready)
    assert summary["stopped_by"] == "stop button"
    look_at_everything(cifar, summary, ready)
    assert run_quietly(cifar, replace_resume(trains))["complete"]


def test_samples_npz_agrees_and_survives_a_resume(cifar, place, tmp_path):
    whole, out, controls = tmp_path / "whole", tmp_path / "out", cifar.Controls()
    held = []
    run_quietly(cifar, small(cifar, place, whole), [lambda name, data: held.append(name)])
    stop = at("chunk", 75, lambda: controls.ask_stop("stop button"))
    run_quietly(cifar, small(cifar, place, out), [stop], controls)
    before = np.load(out / "samples.npz")["times_activated"]
    run_quietly(cifar, small(cifar, place, out, resume=True))
    after, expected = (np.load(f / "samples.npz")["times_activated"] for f in (out, whole))
    assert (before <= after).all()
    assert before.sum() < after.sum()
    assert np.array_equal(after, expected)
    gated = [row["activated"] for row in metrics(out) if row["target_activation"] < 1]
    assert expected.sum() == sum(gated)


# --- the trace and the monitor ---


def chunk(trace, epoch, position, offered, activated, rate, gate=NO_THRESHOLD, **more):
    data = {"candidates": position, "n": trace.n, "phase": "sparse", "rate": rate, "offered": offered}
    data |= {"activated": activated, "gate": gate, "progress": 0.5, "seconds": 1.0, "train_seconds": 1.0}
    data |= {"joules": None, "scoring_flops": 0.0, "flops_per_sample": {"training": 6e7}}
    return data | more


@settings(max_examples=60, deadline=None)
@given(
    epochs=st.integers(1, 60),
    size=st.integers(1, 400),
    changes=st.integers(0, 6),
    data=st.data(),
)
def test_a_trace_keeps_few_points_and_exact_totals(cifar, epochs, size, changes, data):
    n = 800
    trace = cifar.Trace("ast", 0, epochs, n, [])
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    targets = rng.random(changes + 1)
    turns = set(rng.integers(0, epochs * n, changes).tolist())
    offered_all = activated_all = used = 0
    for epoch in range(epochs):
        for start in range(0, n, size):
            offered = min(size, n - start)
            used += any(turn in turns for turn in range(offered_all, offered_all + offered))
            rate = targets[min(used, changes)]
            activated = int(rng.integers(0, offered + 1))
            offered_all, activated_all = offered_all + offered, activated_all + activated
            trace.decided(chunk(trace, epoch, start + offered, offered, activated, rate))
        trace.rows.append({"phase": "sparse", "seconds": 1.0, "candidates": n})
    assert (trace.candidates, trace.activated) == (offered_all, activated_all)
    assert len(trace.points) <= cifar.POINTS + changes + 1
    assert all(0 <= point.rate <= 1 for point in trace.points)
    pairs = list(itertools.pairwise(trace.points))
    assert all(a.epochs < b.epochs and a.candidates < b.candidates for a, b in pairs)
    least = min(epochs * math.ceil(n / size), cifar.POINTS) // 2
    assert len(trace.points) >= least - 1, "and not so few that the curve has gaps"
    last = trace.points[-1].candidates if trace.points else 0
    assert offered_all - last < max(size, epochs * n / cifar.POINTS)


@pytest.mark.parametrize("gate", ["remembered", "live", "proxy", "random", "full", "rs2"])
def test_a_trace_agrees_with_the_trainers_own_books(cifar, gate):
    monitor = cifar.Monitor()
    results = trainer_of(cifar, [monitor], {"gate": gate}).train(EPOCHS)
    trace = monitor.main
    assert (trace.candidates, trace.activated) == (results["candidates"], results["activated"])
    x = [point.epochs for point in trace.points]
    assert x == sorted(x)
    assert x[0] > 0
    assert x[-1] <= EPOCHS
    assert len(x) <= cifar.POINTS
    scoring = trace.latest["scoring_flops"]
    spent, full = trace.flops(cifar.Point(0, trace.candidates, trace.activated, 0, 0, 0, scoring))
    assert spent == pytest.approx(results["flops"] - results["phases"]["evaluation"]["flops"], rel=1e-9)
    assert full == pytest.approx(results["candidates"] * results["flops_per_sample"]["training"])


@pytest.mark.parametrize("gate", ["remembered", "live"])
def test_a_target_moved_to_one_and_back_leaves_the_trace_exact(cifar, gate):
    controls, monitor = cifar.Controls(), cifar.Monitor()
    wishes = {70: ("target_activation", 1.0), 95: ("target_activation", 0.2)}
    trainer = trainer_of(cifar, [monitor, asking(controls, wishes)], {"gate": gate}, controls=controls)
    results = trainer.train(EPOCHS)
    assert [row["candidates"] for row in results["epochs"]] == [N] * EPOCHS
    assert monitor.main.candidates == results["candidates"]
    assert monitor.main.activated == results["activated"]


class Asker:
    """Reads the monitor's progress at every event, as a dashboard does."""

    def __init__(self, monitor):
        self.monitor, self.shares, self.left = monitor, [], []

    def __call__(self, event, data):
        share, left = self.monitor.progress()
        self.shares.append(share)
        self.left.append(left)


def test_progress_only_grows_and_ends_at_one(cifar, place, tmp_path):
    monitor = cifar.Monitor()
    asker = Asker(monitor)
    trains = small(cifar, place, tmp_path / "out", seeds="0,1", compare="full,random,rs2", epochs=4)
    run_quietly(cifar, trains, [monitor, asker])
    assert all(0 <= share <= 1 + 1e-9 for share in asker.shares)
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(asker.shares))
    assert asker.shares[-1] == pytest.approx(1)
    assert len({round(share, 3) for share in asker.shares}) > 20, "and moves all along"
    assert all(left is None or left >= -1e-6 for left in asker.left)
    runs = [(trace.policy, trace.seed) for trace in monitor.traces]
    assert runs == [(p, s) for s in (0, 1) for p in ("ast", "full", "random", "rs2")]
    assert monitor.main is monitor.traces[4]
    assert monitor.now is monitor.traces[-1]


def test_the_time_to_go_is_what_is_left_at_this_pace(cifar):
    monitor = cifar.Monitor()
    monitor("plan", {"work": {"ast": 100.0, "full": 300.0}, "seeds": [0], "done": []})
    monitor("start", {"policy": "ast", "seed": 0, "epochs": 2, "n": N, "rows": []})
    trace = monitor.now
    trace.decided(chunk(trace, 0, 12, 12, 12, 1.0, progress=0.0, seconds=0.0))
    trace.decided(chunk(trace, 0, 24, 12, 12, 1.0, progress=0.5, seconds=10.0))
    share, left = monitor.progress()
    assert share == pytest.approx(50 / 400)
    assert left == pytest.approx(350 * 10 / 50)


def test_a_resumed_run_shows_what_was_before(cifar, place, tmp_path):
    out, controls, first = tmp_path / "out", cifar.Controls(), cifar.Monitor()
    stop = at("chunk", 75, lambda: controls.ask_stop("stop button"))
    run_quietly(cifar, small(cifar, place, out, compare="full"), [first, stop], controls)
    monitor = cifar.Monitor()
    asker = Asker(monitor)
    run_quietly(cifar, small(cifar, place, out, compare="full", resume=True), [monitor, asker])
    trace = monitor.traces[0]
    assert [row["epoch"] for row in trace.rows] == [1, 2, 3, 4, 5, 6]
    assert [point.epochs for point in trace.points[:4]] == pytest.approx([1, 2, 3, trace.points[3].epochs])
    assert trace.points[3].epochs > 3
    assert all(0 <= point.rate <= 1 for point in trace.points)
    assert all(a.epochs < b.epochs for a, b in itertools.pairwise(trace.points))
    assert asker.shares[-1] == pytest.approx(1)
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(asker.shares))
    assert_a_picture(drawn(cifar, monitor))


def test_a_resumed_runs_points_have_the_candidates_of_the_epoch_in_hand(cifar):
    controls, monitor = cifar.Controls(), cifar.Monitor()
    first = trainer_of(cifar, [at("chunk", 75, lambda: controls.ask_stop("x"))], controls=controls)
    first.train(EPOCHS)
    trainer = trainer_of(cifar, [monitor])
    trainer.load_state_dict(copy.deepcopy(first.state_dict()))
    results = trainer.train()
    assert monitor.main.candidates == results["candidates"]
    assert monitor.main.activated == results["activated"]


def test_a_change_is_marked_where_it_happened(cifar):
    controls, monitor = cifar.Controls(), cifar.Monitor()
    wishes = {50: ("target_activation", 0.15), 70: ("gate", "random"), 100: ("learning_rate_factor", 0.5)}
    trainer_of(cifar, [monitor, asking(controls, wishes)], controls=controls).train(EPOCHS)
    assert [mark[2] for mark in monitor.main.changes] == ["target 0.15", "gate random", "lr × 0.5"]
    places = [mark[0] for mark in monitor.main.changes]
    assert places == pytest.approx([50 / 20, 4, 100 / 20])


def test_a_change_in_a_comparison_is_marked_too(cifar, place, tmp_path):
    controls, monitor = cifar.Controls(), cifar.Monitor()
    trains = small(cifar, place, tmp_path / "out", compare="full", epochs=4)
    run_quietly(cifar, trains, [monitor, asking(controls, {110: ("learning_rate_factor", 0.5)})], controls)
    assert [trace.policy for trace in monitor.traces if trace.changes] == ["full"]
    without = copy.copy(monitor)
    without.traces = [copy.copy(trace) for trace in monitor.traces]
    without.traces[1].changes = []
    assert drawn(cifar, monitor) != drawn(cifar, without), "every change is marked in the plots"


# --- the live picture ---


def mark(monitor, words):
    """As if the trainer had noted a change by hand."""
    trace = monitor.main
    trace.changes.append((trace.candidates / trace.n, trace.seconds, words))


def drawn(cifar, monitor):
    return cifar.LivePicture(monitor).draw(monitor)


def watched(cifar, policy="ast", epochs=4, **more):
    """A monitor of a run that is about to offer its first candidates."""
    monitor = cifar.Monitor()
    monitor("plan", {"work": {policy: float(N * epochs)}, "seeds": [0], "done": []})
    monitor("start", {"policy": policy, "seed": 0, "epochs": epochs, "n": N, "rows": []})
    return monitor


def go_on(monitor, chunks, rate=0.4, size=12, threshold=0.6, scores=None, **more):
    """Lets a monitored run take `chunks` more decisions, and end epochs as they come."""
    trace = monitor.now
    gate = SimpleNamespace(threshold=threshold, scores=torch.empty(0) if scores is None else scores)
    monitor.looked = -math.inf
    for _ in range(chunks):
        position = trace.candidates - len(trace.rows) * N + size
        done = trace.candidates / (trace.epochs * N)
        given = {"progress": done, "seconds": 20 * done, "train_seconds": 15 * done} | more
        monitor("chunk", chunk(trace, 0, position, size, round(rate * size), rate, gate, **given))
        if position == N:
            row = {"policy": trace.policy, "phase": "sparse", "val_accuracy": 20 + 15 * len(trace.rows)}
            row |= {"elapsed_seconds": 20 * done, "seconds": 5.0, "scoring_seconds": 0.0, "candidates": N}
            monitor("epoch", row)


def stages(cifar):
    """Monitors at every stage of a run that a person may see, by name."""
    rng = np.random.default_rng(0)
    usual = torch.from_numpy(rng.exponential(0.7, 2000)).float()
    found = {"nothing": cifar.Monitor(), "begun": watched(cifar)}
    found["one-chunk"] = watched(cifar)
    go_on(found["one-chunk"], 1)
    found["warm-up"] = watched(cifar)
    go_on(found["warm-up"], 15, rate=1.0, threshold=None)
    for name, options in {
        "remembered": {"scores": usual},
        "no-threshold": {"threshold": None, "scores": usual},
        "undefined-threshold": {"threshold": math.nan, "scores": usual},
        "live-costs-more": {"rate": 0.9, "scores": usual, "scoring_flops": 2e10},
        "huge-significance": {"scores": usual * 1e30},
        "tiny-significance": {"scores": usual * 1e-30},
        "all-zero": {"scores": torch.zeros(50)},
        "all-equal": {"scores": torch.full((50,), 2.3)},
        "one-score": {"scores": torch.tensor([0.4])},
        "no-score": {"scores": torch.empty(0)},
        "threshold-far-out": {"threshold": -1.2, "scores": usual},
    }.items():
        found[name] = watched(cifar)
        go_on(found[name], 35, **options)
    for policy in ("full", "rs2", "random", "somebody's own"):
        found[policy] = watched(cifar, policy)
        go_on(found[policy], 35, threshold=None)
    found["marks"] = watched(cifar)
    for number in range(40):
        go_on(found["marks"], 1, scores=usual)
        mark(found["marks"], f"target {0.1 + number / 50}")
    found["mark-at-once"] = watched(cifar)
    mark(found["mark-at-once"], "gate live")
    go_on(found["mark-at-once"], 10, scores=usual)
    found["compared"] = watched(cifar)
    go_on(found["compared"], 80, scores=usual)
    for policy in ("full", "random"):
        found["compared"]("start", {"policy": policy, "seed": 0, "epochs": 4, "n": N, "rows": []})
        go_on(found["compared"], 80, threshold=None)
    found["joules"] = watched(cifar)
    go_on(found["joules"], 45, scores=usual, joules=1234.5)
    return found


NAMES = (
    "nothing begun one-chunk warm-up remembered no-threshold undefined-threshold live-costs-more "
    "huge-significance tiny-significance all-zero all-equal one-score no-score threshold-far-out full rs2 "
    "random somebody's-own marks mark-at-once compared joules"
).split()


@pytest.fixture(scope="module")
def staged(cifar):
    return {name.replace(" ", "-"): monitor for name, monitor in stages(cifar).items()}


def test_every_stage_is_tested(staged):
    assert set(staged) == set(NAMES)


@pytest.mark.parametrize("stage", NAMES)
def test_every_stage_has_a_small_picture(cifar, staged, stage):
    assert_a_picture(drawn(cifar, staged[stage]))


@pytest.mark.parametrize("stage", NAMES)
def test_a_picture_on_an_old_background_is_the_same(cifar, staged, stage):
    used = cifar.LivePicture(staged[stage])
    for other in ("nothing", "remembered", "marks", stage, "huge-significance", stage, stage):
        last = used.draw(staged[other])
    assert last == drawn(cifar, staged[stage])


@pytest.mark.parametrize("stage", NAMES)
def test_no_word_around_a_panel_is_cut_off_or_lies_in_another(cifar, staged, stage):
    picture = cifar.LivePicture(staged[stage])
    picture.draw(staged[stage])
    panels = {name: axes.get_tightbbox() for name, axes in picture.axes.items()}
    for name, box in panels.items():
        assert_inside(box, picture.figure.bbox, name)
    for (name, one), (other, two) in itertools.combinations(panels.items(), 2):
        assert not one.overlaps(two), (name, other)


def assert_inside(box, frame, what):
    assert box.x0 >= frame.x0 - 1, what
    assert box.y0 >= frame.y0 - 1, what
    assert box.x1 <= frame.x1 + 1, what
    assert box.y1 <= frame.y1 + 1, what


def test_the_name_of_an_early_change_does_not_lie_over_the_axis(cifar, staged):
    picture = cifar.LivePicture(staged["mark-at-once"])
    picture.draw(staged["mark-at-once"])
    axes = picture.axes["rate"]
    picture.rate(axes, staged["mark-at-once"])
    (name,) = axes.texts
    assert name.get_text().strip() == "gate live"
    assert name.get_window_extent().x0 >= axes.bbox.x0


@pytest.mark.parametrize("policy", ["full", "rs2", "random"])
def test_nothing_is_announced_that_will_never_come(cifar, staged, policy):
    picture = cifar.LivePicture(staged[policy])
    picture.histogram(picture.axes["histogram"], staged[policy])
    (words,) = picture.axes["histogram"].texts
    assert "sparse epoch" not in words.get_text()


def test_through_a_run_every_picture_is_as_if_drawn_afresh(cifar):
    monitor = watched(cifar)
    used = cifar.LivePicture(monitor)
    rng = np.random.default_rng(1)
    for turn in range(16):
        rate = 1.0 if turn < 4 else 0.3
        scores = torch.from_numpy(rng.exponential(2.0 - 0.1 * turn, 500)).float()
        go_on(monitor, 5, rate=rate, threshold=None if turn < 4 else rng.random(), scores=scores)
        if turn == 7:
            mark(monitor, "target 0.3")
        assert used.draw(monitor) == drawn(cifar, monitor), turn


def test_what_costs_more_than_training_on_everything_is_called_more(cifar, staged):
    monitor = staged["live-costs-more"]
    picture = cifar.LivePicture(monitor)
    axes = picture.axes["flops"]
    picture.flops(axes, monitor)
    words = " ".join(text.get_text() for text in axes.texts)
    assert "more" in words
    assert "-" not in words.replace("− ", "-")


def test_an_epoch_that_ends_while_the_picture_is_drawn_does_no_harm(cifar, staged):
    class Growing(list):
        """Rows to which the worker adds one between any two looks."""

        def __iter__(self):
            rows = list(super().__iter__())
            self.append(rows[-1])
            return iter(rows)

    monitor = copy.deepcopy(staged["remembered"])
    monitor.now.rows = Growing(monitor.now.rows)
    assert_a_picture(drawn(cifar, monitor))


# --- the dashboard, without a kernel ---


def dashboard(cifar, **changes):
    monitor, controls = cifar.Monitor(), cifar.Controls()
    return cifar.Dashboard(monitor, controls, cifar.Settings(**changes)), monitor, controls


def asked(controls):
    return [(control, value) for control, value, _ in controls.asked]


def test_moving_a_slider_asks_for_a_change(cifar):
    panel, _, controls = dashboard(cifar)
    panel.target.value = 0.1
    panel.factor.value = 0.5
    panel.gate.value = "live"
    assert asked(controls) == [("target_activation", 0.1), ("learning_rate_factor", 0.5), ("gate", "live")]


def test_the_sliders_reach_from_two_hundredths_to_one_and_wait_for_the_mouse_button(cifar):
    panel, _, _ = dashboard(cifar)
    assert (panel.target.min, panel.target.max, panel.target.value) == (0.02, 1.0, 0.4)
    assert not panel.target.continuous_update
    assert not panel.factor.continuous_update


def test_a_target_below_the_slider_is_shown_and_not_asked_for(cifar):
    panel, monitor, controls = dashboard(cifar, target_activation=0.005)
    assert panel.target.value == 0.005
    monitor("start", {"policy": "ast", "seed": 0, "epochs": 4, "n": N, "rows": []})
    panel._follow(monitor.now)
    assert panel.target.value == 0.005
    assert not controls.asked


@pytest.mark.parametrize("gate", ["rs2", "full"])
def test_a_run_without_a_choosing_gate_has_a_dashboard(cifar, gate):
    panel, monitor, controls = dashboard(cifar, gate=gate)
    assert panel.gate.value is None
    monitor("start", {"policy": gate, "seed": 0, "epochs": 4, "n": N, "rows": []})
    panel._follow(monitor.now)
    assert not controls.asked
    assert_a_picture(drawn(cifar, monitor))


@pytest.mark.parametrize("gate", ["random", "rs2", "full"])
def test_a_gate_choice_that_could_not_take_hold_is_not_offered(cifar, gate):
    panel, monitor, controls = dashboard(cifar, gate=gate)
    monitor("start", {"policy": gate, "seed": 0, "epochs": EPOCHS, "n": N, "rows": []})
    panel._follow(monitor.now)
    panel.gate.value = "remembered"
    rows = trainer_of(cifar, (), {"gate": gate}, controls=controls).train(EPOCHS)["epochs"]
    assert panel.gate.disabled or rows[5]["threshold"] is not None


def test_the_dashboard_follows_a_resumed_run_without_asking_for_anything(cifar):
    panel, monitor, controls = dashboard(cifar)
    controls.values |= {"target_activation": 0.15, "learning_rate_factor": 2.0, "gate": "live"}
    monitor("start", {"policy": "ast", "seed": 0, "epochs": 4, "n": N, "rows": []})
    panel.told = -math.inf  # a second later
    panel.refresh()
    assert (panel.target.value, panel.gate.value) == (0.15, "live")
    assert panel.factor.value == pytest.approx(2.0)
    assert not controls.asked


def test_only_the_gate_under_test_can_be_steered(cifar):
    panel, monitor, controls = dashboard(cifar)
    monitor("start", {"policy": "ast", "seed": 0, "epochs": 4, "n": N, "rows": []})
    panel._follow(monitor.now)
    assert not panel.target.disabled
    assert not panel.gate.disabled
    monitor("start", {"policy": "full", "seed": 0, "epochs": 4, "n": N, "rows": []})
    panel._follow(monitor.now)
    assert panel.target.disabled
    assert panel.gate.disabled
    assert not panel.factor.disabled
    assert not controls.asked


def test_pause_and_stop_are_buttons(cifar):
    panel, _, controls = dashboard(cifar)
    panel.pause.click()
    assert controls.paused
    assert panel.pause.description == "Resume"
    panel.pause.click()
    assert not controls.paused
    assert panel.pause.description == "Pause"
    panel.stop.click()
    assert controls.stop == "stop button"
    assert panel.stop.disabled
    assert panel.pause.disabled
    assert asked(controls) == [("paused", True), ("paused", False), ("stop", "stop button")]


def test_what_the_sliders_show_is_what_is_applied(cifar):
    panel, _, controls = dashboard(cifar)
    moves = {70: (0.1, 1.0, "random"), 110: (0.5, 2.0, "live"), 112: (0.1, 1.0, "random")}
    seen = itertools.count(1)

    def move(name, data):
        if name == "chunk" and (wish := moves.get(next(seen))):
            panel.target.value, panel.factor.value, panel.gate.value = wish

    trainer = trainer_of(cifar, [move], controls=controls)
    trainer.train(EPOCHS)
    assert controls.values["target_activation"] == panel.target.value
    assert controls.values["learning_rate_factor"] == pytest.approx(panel.factor.value)
    assert trainer.gate_name == panel.gate.value


@pytest.mark.parametrize(
    ("slider", "control", "values"),
    [
        ("target", "target_activation", (0.1, 0.5, 0.1)),
        ("factor", "learning_rate_factor", (0.5, 2.0, 0.5)),
        ("gate", "gate", ("random", "live", "random")),
    ],
)
def test_a_person_may_change_their_mind_before_anything_is_applied(cifar, slider, control, values):
    panel, _, controls = dashboard(cifar)
    widget = getattr(panel, slider)
    widget.value = values[0]
    controls.values[control] = controls.asked.popleft()[1]  # applied
    widget.value = values[1]
    widget.value = values[2]
    assert [value for _, value in asked(controls)] == [values[1], values[2]]


def test_joules_have_a_panel_although_the_first_look_came_too_early(cifar):
    panel, monitor, _ = dashboard(cifar)
    monitor("start", {"policy": "ast", "seed": 0, "epochs": 4, "n": N, "rows": []})
    panel.refresh()
    go_on(monitor, 40, joules=10.0)
    panel.told = panel.began = -math.inf  # some seconds later
    panel.refresh()
    assert panel.image.value == drawn(cifar, monitor)


def test_the_numbers_name_what_is_a_model(cifar, staged):
    panel, _, _ = dashboard(cifar)
    panel.monitor = staged["compared"]
    words = panel._numbers(83.0)
    assert "about 1:23 to go" in words
    assert "unit energy" in words
    assert "(a model)" in words
    assert "joules: no sensor" in words
    for name, monitor in staged.items():
        panel.monitor = monitor
        words = panel._numbers(None)
        assert "nan" not in words, name
        assert "inf" not in words, name


# --- the live run, without a kernel ---


@pytest.fixture
def panelled(cifar, monkeypatch, display):
    """As in a notebook with widgets; gives the dashboards that were made."""
    made = []

    class Kept(cifar.Dashboard):
        def __init__(self, *given):
            super().__init__(*given)
            made.append(self)

    monkeypatch.setattr(cifar, "Dashboard", Kept)
    monkeypatch.setattr(cifar, "widgets_serve", lambda: True)
    return made


def test_a_live_run_trains_and_leaves_a_plain_picture(cifar, place, tmp_path, panelled, display, capsys):
    out = tmp_path / "out"
    summary = asyncio.run(cifar.run_live(small(cifar, place, out)))
    assert summary["complete"]
    assert "application/vnd.jupyter.widget-view+json" in display[0]
    assert_a_picture(pictures(display)[-1])
    assert (out / "dashboard.png").read_bytes() == pictures(display)[-1]
    assert "unit-model saved" in capsys.readouterr().out


def test_a_fault_in_training_is_raised_in_the_cell(cifar, place, tmp_path, panelled, display, monkeypatch):
    def fail(*given):
        raise ZeroDivisionError("in the worker")

    monkeypatch.setattr(cifar.AdaptiveSparseTrainer, "_step", fail)
    with pytest.raises(ZeroDivisionError, match="in the worker") as raised:
        asyncio.run(cifar.run_live(small(cifar, place, tmp_path / "out")))
    assert "_train_epoch" in [entry.name for entry in raised.traceback]


def test_a_fault_in_drawing_loses_no_run(cifar, place, tmp_path, panelled, display, monkeypatch):
    def fail(self):
        raise ZeroDivisionError("in the picture")

    monkeypatch.setattr(cifar.Dashboard, "refresh", fail)
    out = tmp_path / "out"
    before = set(threading.enumerate())
    try:
        summary = asyncio.run(cifar.run_live(small(cifar, place, out, epochs=30)))
        assert summary["complete"]
    finally:  # whatever happened, nothing trains on behind the reader's back
        left = [t for t in threading.enumerate() if isinstance(t, cifar.Worker) and t not in before]
        for worker in left:
            worker.join(60)
    assert not left


def test_a_finished_run_that_is_resumed_keeps_its_picture(cifar, place, tmp_path, panelled, display):
    out = tmp_path / "out"
    asyncio.run(cifar.run_live(small(cifar, place, out)))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    asyncio.run(cifar.run_live(small(cifar, place, out, resume=True)))
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_run_with_another_setting_renames_the_whole_folder(cifar, place, tmp_path, panelled, display):
    out = tmp_path / "out"
    asyncio.run(cifar.run_live(small(cifar, place, out, epochs=2)))
    asyncio.run(cifar.run_live(small(cifar, place, out, epochs=1)))
    assert (tmp_path / "out-1" / "dashboard.png").exists()
    assert (out / "dashboard.png").exists()


@pytest.mark.parametrize("reason", ["no ipywidgets", "kaggle batch", "no kernel"])
def test_without_widgets_the_same_run_prints_rows_and_writes_pictures(
    cifar, place, tmp_path, monkeypatch, display, capsys, reason
):
    if reason != "no kernel":
        shell = SimpleNamespace(kernel=object())
        monkeypatch.setattr(sys.modules["IPython"], "get_ipython", lambda: shell)
    if reason == "no ipywidgets":
        monkeypatch.setitem(sys.modules, "ipywidgets", None)
    else:
        monkeypatch.setattr(ipywidgets.Widget, "__init__", None)  # any widget that is made fails
    if reason == "kaggle batch":
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert not cifar.widgets_serve()
    out = tmp_path / "out"
    trains = small(cifar, place, out, compare="full", epochs=3)
    ready = cifar.prepare(trains)
    cifar.playground()
    summary = asyncio.run(cifar.run_live(trains, ready))
    look_at_everything(cifar, summary, ready)
    assert summary["complete"]
    said = capsys.readouterr().out
    assert sum(line.startswith(("ast ", "full ")) and "/3" in line for line in said.splitlines()) == 6
    written = {path.name for path in out.glob("*.png")}
    assert written >= {"curves.png", "costs.png", "classes.png", "significance.png", "chosen.png"}
    shown = [thing for thing in display if not isinstance(thing, IPython.display.Image)]
    assert [type(thing) for thing in shown] == [IPython.display.Markdown]


BLOCKED = """
import runpy, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("IPython", "ipywidgets", "ipykernel"):
            raise ImportError(f"{name} is not here")
sys.meta_path.insert(0, Block())
program, sys.argv = sys.argv[1], sys.argv[1:]
runpy.run_path(program, run_name="__main__")
"""


def test_the_script_needs_no_ipython(script, cifar):
    pack(cifar, script.folder / "packed", n_train=60, n_val=20)
    flags = script.command("--data", "packed", "--epochs", 2, "--compare", "none", "--out", "out")
    done = subprocess.run(
        [*flags[:2], "-c", BLOCKED, *flags[2:]],
        cwd=script.folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (script.folder / "out" / "curves.png").exists()


@pytest.mark.parametrize("missing", ["IPython", "ipywidgets"])
def test_a_package_that_is_barred_is_as_one_that_is_missing(cifar, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    assert not cifar.widgets_serve()
    asyncio.run(pump_once(cifar))


async def pump_once(cifar):
    async with cifar.Pump() as pump:
        await pump()


# --- what is loaded once ---


def test_prepared_data_serve_the_run_only_under_the_same_settings(cifar, place, tmp_path, monkeypatch):
    loads = []
    load = cifar.load_data
    monkeypatch.setattr(cifar, "load_data", lambda *given: loads.append(given) or load(*given))
    trains = small(cifar, place, tmp_path / "out", epochs=1)
    ready = cifar.prepare(trains)
    assert len(loads) == 1
    assert run_quietly(cifar, trains, ready=ready)["n_train"] == N
    assert len(loads) == 1
    trains.train_size = 100
    assert run_quietly(cifar, trains, ready=ready)["n_train"] == 100
    assert len(loads) == 2


def test_lessons_on_other_data_than_the_runs_say_so(cifar, place, tmp_path, display):
    trains = small(cifar, place, tmp_path / "out", epochs=3)
    ready = cifar.prepare(trains)
    trains.train_size = 100
    summary = run_quietly(cifar, trains, ready=ready)
    for lesson in (cifar.show_classes, cifar.show_chosen):
        with pytest.raises(cifar.BadInput, match=r"prepare|100|240"):
            lesson(summary, ready)


# --- the lessons ---


@pytest.fixture(scope="module")
def lessons(cifar, place, tmp_path_factory):
    """Finished runs by name: (summary, what was prepared)."""
    folder = tmp_path_factory.mktemp("lessons")
    many = [f"class number {i} of the very many that some people have in their folders" for i in range(120)]
    pack(cifar, folder / "many", classes=many, n_train=360, n_val=120)
    pack(cifar, folder / "long", classes=["x" * 200, "Donaudampfschifffahrtsgesellschaft " * 4], n_train=60)
    choices = {
        "finished": {"compare": "full,random"},
        "live": {"gate": "live"},
        "proxy": {"gate": "proxy"},
        "random": {"gate": "random"},
        "rs2": {"gate": "rs2"},
        "full": {"gate": "full"},
        "pure-pi": {"feedforward": False},
        "short": {"epochs": 1},
        "many": {"data": str(folder / "many")},
        "long": {"data": str(folder / "long")},
    }
    made = {}
    for name, changes in choices.items():
        trains = small(cifar, place, folder / f"out-{name}", **changes)
        ready = cifar.prepare(trains)
        made[name] = run_quietly(cifar, trains, ready=ready), ready
    controls = cifar.Controls()
    trains = small(cifar, place, folder / "out-stopped", compare="full")
    ready = cifar.prepare(trains)
    stop = at("chunk", 65, lambda: controls.ask_stop("stop button"))
    made["stopped"] = run_quietly(cifar, trains, [stop], controls, ready), ready
    controls = cifar.Controls()
    wishes = {25: ("gate", "random"), 45: ("gate", "proxy"), 65: ("gate", "remembered")}
    trains = small(cifar, place, folder / "out-changed")
    made["changed"] = run_quietly(cifar, trains, [asking(controls, wishes)], controls, ready), ready
    return made


DRAWN = {  # lessons that have a picture, by run
    "finished": {"costs", "classes", "significance", "chosen"},
    "live": {"costs", "classes", "significance", "chosen"},
    "proxy": {"costs", "classes", "significance", "chosen"},
    "random": {"costs", "classes", "chosen"},
    "rs2": {"costs", "classes", "chosen"},
    "full": {"costs"},
    "pure-pi": {"costs", "classes", "significance", "chosen"},
    "short": {"costs", "significance"},
    "many": {"costs", "classes", "significance", "chosen"},
    "long": {"costs", "classes", "significance", "chosen"},
    "stopped": {"costs", "classes", "significance", "chosen"},
    "changed": {"costs", "classes", "significance", "chosen"},
}


@pytest.mark.parametrize("name", DRAWN)
def test_every_lesson_after_a_run_is_a_picture_or_a_sentence(cifar, lessons, display, capsys, name):
    summary, ready = lessons[name]
    out = Path(summary["out"])
    look_at_everything(cifar, summary, ready)
    written = {path.stem for path in out.glob("*.png")}
    assert written == DRAWN[name] | {"curves"}
    for png in pictures(display):
        assert_a_lesson(png)
    said = capsys.readouterr().out
    sentences = said.count("no epoch with a gate") + said.count("remembers no significance")
    assert len(DRAWN[name]) + sentences == 4


def assert_a_lesson(png):
    picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).reshape(-1, 3)
    assert len(np.unique(picture, axis=0)) > 10
    assert (picture.min(1) < 200).mean() > 0.005


@pytest.mark.parametrize("name", DRAWN)
def test_no_word_of_a_lesson_is_cut_off(cifar, lessons, display, name, monkeypatch):
    figures = []
    monkeypatch.setattr(cifar, "show", lambda figure, path=None: figures.append(figure))
    look_at_everything(cifar, *lessons[name])
    assert len(figures) == len(DRAWN[name])
    for figure in figures:
        figure.canvas.draw()
        for axes in figure.axes:
            assert_inside(axes.get_tightbbox(), figure.bbox, axes.get_title(loc="left"))


def test_epochs_are_counted_in_whole_numbers(cifar, lessons, display, monkeypatch):
    figures = []
    monkeypatch.setattr(cifar, "show", lambda figure, path=None: figures.append(figure))
    cifar.show_memory(lessons["short"][0])
    axes = figures[0].axes[0]
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1]


@pytest.mark.parametrize("target", [0.02, 0.3, 0.6, 0.9, 1.0])
def test_the_legend_of_the_playground_lies_over_no_line(cifar, target):
    figure = cifar.draw_response(target)
    axes = figure.axes[0]
    legend = axes.get_legend().get_window_extent()
    for line in axes.lines:
        points = line.get_transform().transform(line.get_xydata())
        assert not any(legend.contains(x, y) for x, y in points), line.get_label()


@pytest.mark.parametrize("name", ["finished", "many", "long"])
def test_the_most_and_least_significant_are_shown_with_their_scores(cifar, lessons, display, name):
    cifar.show_significance(lessons[name][1], epochs=2)
    (png,) = pictures(display)
    assert_a_lesson(png)


@pytest.mark.parametrize("changes", [{"gate": "full"}, {"gate": "live"}, {"batch_size": 1024, "lr": None}])
def test_significance_can_be_looked_at_under_any_settings(cifar, place, tmp_path, display, changes):
    cifar.show_significance(cifar.prepare(small(cifar, place, tmp_path, **changes)), epochs=2)
    assert_a_lesson(pictures(display)[0])


def test_significance_looks_the_same_whatever_batch_the_run_has(cifar, place, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(cifar, "show_images", lambda rows, path=None: seen.append(rows))
    for size in (16, 1024):  # the lesson has small batches of its own, and a step that suits them
        trains = small(cifar, place, tmp_path, batch_size=size, lr=None)
        cifar.show_significance(cifar.prepare(trains), epochs=1)
    captions = [[captions for _, captions in rows.values()] for rows in seen]
    assert captions[0] == captions[1]


def test_the_lesson_before_the_run_changes_nothing_in_it(cifar, place, tmp_path, display):
    trains = small(cifar, place, tmp_path / "one", epochs=3)
    run_quietly(cifar, trains)
    trains = small(cifar, place, tmp_path / "other", epochs=3)
    ready = cifar.prepare(trains)
    cifar.show_significance(ready, epochs=1)
    run_quietly(cifar, trains, ready=ready)
    assert metrics(tmp_path / "one") == metrics(tmp_path / "other")


def test_a_table_of_what_was_measured_has_a_row_a_policy(cifar, lessons, display, capsys):
    cifar.show_table(lessons["finished"][0])
    lines = display[0].data.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["ast", "full", "random"]
    assert {line.count(" | ") for line in lines} == {7}


def test_the_chosen_are_counted_in_gated_epochs(cifar, lessons, monkeypatch):
    seen = {}
    monkeypatch.setattr(cifar, "show_images", lambda rows, path=None: seen.update(rows))
    cifar.show_chosen(*lessons["finished"])
    times = np.load(Path(lessons["finished"][0]["out"]) / "samples.npz")["times_activated"]
    assert list(seen) == [  # of 6 epochs, those of warm-up and anneal have no gate
        f"Chosen {word}: in {count} of 4 epochs ({(times == count).sum()} images, {len(images)} shown)"
        for word, count, (images, _) in zip(
            ("least", "most"), (times.min(), times.max()), seen.values(), strict=True
        )
    ]
    assert times.max() <= 4


@settings(max_examples=25, deadline=None)
@given(target=st.floats(0.02, 1.0), kp=st.floats(0, 2), ki=st.floats(0, 1))
def test_with_the_solve_the_rate_meets_its_target_at_once(cifar, target, kp, ki):
    rates, thresholds = cifar.step_response(target, kp, ki, 0.0, True)
    assert rates[:30] == pytest.approx([0.6] * 30, abs=1.01 / 640)
    assert rates[30:] == pytest.approx([target] * 60, abs=1.01 / 640)
    assert np.isfinite(thresholds).all()


@pytest.mark.parametrize("lost", [0.1, 0.3])
@pytest.mark.parametrize("target", [0.2, 0.4])
def test_a_lost_share_is_corrected_for(cifar, target, lost):
    held, _ = cifar.step_response(target, 0.5, 0.2, lost, True)
    let_go, _ = cifar.step_response(target, 0.0, 0.0, lost, True)
    assert np.mean(held[-30:]) == pytest.approx(target, abs=0.01)
    assert np.mean(let_go[-30:]) == pytest.approx(target * (1 - lost), abs=0.02)


@settings(max_examples=15, deadline=None)
@given(
    target=st.floats(0.02, 1.0),
    kp=st.floats(0, 2),
    ki=st.floats(0, 1),
    lost=st.floats(0, 0.5),
    feedforward=st.booleans(),
)
def test_whatever_the_sliders_the_response_is_a_rate(cifar, target, kp, ki, lost, feedforward):
    rates, thresholds = cifar.step_response(target, kp, ki, lost, feedforward)
    assert len(rates) == len(thresholds) == 90
    assert all(0 <= rate <= 1 for rate in rates)
    assert np.isfinite(thresholds).all()


def test_the_playground_draws_anew_when_a_slider_moves(cifar, monkeypatch, display):
    monkeypatch.setattr(cifar, "widgets_serve", lambda: True)
    cifar.playground()
    (box,) = display
    *rows, image = box.children
    before = image.value
    assert_a_picture(before)
    names = [slider.description for row in rows for slider in row.children]
    assert names == ["target", "kp", "ki", "lost"]
    for row in rows:
        for slider in row.children:
            slider.value = 0.5 * (slider.value + slider.max)
            assert image.value != before, slider.description
            before = image.value


def test_a_pause_asked_for_before_a_chunk_is_logged_where_training_stands_still(cifar):
    """Found by a real kernel: the line said where the wish was read, a chunk before the pause."""
    controls, changes, offered = cifar.Controls(), [], []

    def press(event, data):
        if event == "chunk":
            offered.append(controls.candidates)
            if len(offered) == 70:
                controls.pause(True)
                threading.Timer(0.5, controls.pause, [False]).start()
        elif event == "control":
            changes.append((data["new"], data["candidates"]))

    trainer = trainer_of(cifar, [press], controls=controls)
    flush = trainer._flush

    def flush_and_press():  # the wish arrives between the chunk's decision and its steps
        flush()
        if len(offered) == 40 and not controls.asked and not changes:
            controls.pause(True)
            threading.Timer(0.5, controls.pause, [False]).start()

    trainer._flush = flush_and_press
    trainer.train(EPOCHS)
    assert [new for new, _ in changes] == [True, False, True, False]
    assert changes[0][1] == changes[1][1]
    assert changes[2][1] == changes[3][1]
