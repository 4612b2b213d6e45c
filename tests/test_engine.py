"""The engine: ledger, sensors, plan, sources, step, precision, checkpoints, records, settings."""

import contextlib
import copy
import hashlib
import io
import itertools
import math
import os
import pickle
import queue
import resource
import sys
import types
from collections import deque
from dataclasses import asdict, fields, replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

CPU = torch.device("cpu")
ARCHITECTURES = {
    "cu126": ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"],
    "cu128": ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"],
}


@pytest.fixture(autouse=True)
def rng_left_as_found():
    """Seeding in one test must not steer another."""
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


# --- ledger: accounts ---


class FakeClock:
    """Stands in for the module `time`: it moves only when told to."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now

    monotonic = perf_counter


@pytest.fixture
def clock(cifar, monkeypatch):
    fake = FakeClock()
    monkeypatch.setattr(cifar, "time", fake)
    return fake


def watts(clock, power):
    """A meter that reads `power` watts times the fake clock."""
    return types.SimpleNamespace(joules=lambda: power * clock.now, method="rapl", reason="")


def test_every_second_and_joule_goes_to_one_account_only(cifar, clock):
    ledger = cifar.Ledger(watts(clock, 7.0))
    ledger.switch("warmup")
    clock.now += 1
    with ledger.charge("scoring"):
        clock.now += 2
        with ledger.charge("checkpoint"):
            clock.now += 4
        clock.now += 8
    clock.now += 16
    assert ledger.switch(None) == "warmup"
    clock.now += 1000
    ledger.switch("sparse")
    clock.now += 32
    ledger.switch(None)
    seconds = {name: account.seconds for name, account in ledger.accounts.items() if account.seconds}
    assert seconds == {"warmup": 17, "scoring": 10, "checkpoint": 4, "sparse": 32}
    assert {n: ledger.accounts[n].joules for n in seconds} == {n: 7.0 * s for n, s in seconds.items()}
    assert ledger.accounts["anneal"].joules is None
    total = ledger.total()
    assert (total.seconds, total.joules) == (63, 7.0 * 63)


def test_the_open_account_counts_up_to_now(cifar, clock):
    ledger = cifar.Ledger(watts(clock, 1.0))
    ledger.switch("sparse")
    clock.now += 5
    assert ledger.seconds() == 5
    assert ledger.seconds(["sparse"]) == 5
    assert ledger.seconds(["evaluation"]) == 0


def test_a_charge_goes_back_to_what_was_open_also_after_an_error(cifar, clock):
    ledger = cifar.Ledger(watts(clock, 1.0))
    ledger.switch("ramp")
    with pytest.raises(KeyError), ledger.charge("evaluation"):
        clock.now += 3
        raise KeyError
    assert ledger.open == "ramp"
    assert ledger.accounts["evaluation"].seconds == 3


def test_training_seconds_leave_out_evaluation_and_checkpoints(cifar, clock):
    ledger = cifar.Ledger(watts(clock, 1.0))
    for number, phase in enumerate(cifar.PHASES):
        ledger.switch(phase)
        clock.now += 2**number
    ledger.switch(None)
    expected = ("warmup", "ramp", "sparse", "anneal", "scoring")
    assert ledger.seconds(cifar.TRAINING_PHASES) == sum(ledger.accounts[p].seconds for p in expected)
    assert ledger.seconds() - ledger.seconds(cifar.TRAINING_PHASES) == 2**5 + 2**6


def test_unit_energy_is_ten_for_the_activated_and_a_tenth_for_the_skipped(cifar):
    account = cifar.Account(candidates=1000, activated=100)
    assert account.unit_energy == pytest.approx(100 * 10.0 + 900 * 0.1)
    assert cifar.unit_saved(account) == pytest.approx(100 * (1 - 1090 / 10_000))
    assert cifar.unit_saved(cifar.Account()) == 0.0


@given(
    amounts=st.lists(
        st.tuples(st.floats(0, 1e6), st.integers(0, 10**9), st.integers(0, 10**9), st.floats(0, 1e18)),
        min_size=7,
        max_size=7,
    ),
    known=st.lists(st.booleans(), min_size=7, max_size=7),
)
def test_a_ledger_comes_back_from_its_state_and_totals_add_up(cifar, amounts, known):
    ledger = cifar.Ledger(types.SimpleNamespace(joules=lambda: None))
    for phase, (seconds, candidates, activated, flops), has_joules in zip(
        cifar.PHASES, amounts, known, strict=True
    ):
        joules = 3.0 if has_joules else None
        ledger.accounts[phase] = cifar.Account(seconds, candidates, activated, flops, joules)
    other = cifar.Ledger(types.SimpleNamespace(joules=lambda: None))
    other.load_state_dict(ledger.state_dict())
    assert other.accounts == ledger.accounts
    total = other.total()
    assert total.candidates == sum(a[1] for a in amounts)
    assert total.activated == sum(a[2] for a in amounts)
    assert total.flops == pytest.approx(sum(a[3] for a in amounts))
    assert total.joules == (3.0 * sum(known) if any(known) else None)


# --- ledger: FLOPs ---


def conv(side, inputs, outputs):
    return 2 * side * side * outputs * inputs * 9


LAYERS = [conv(32, 3, 32), conv(16, 32, 64), conv(8, 64, 128), 2 * 2048 * 256, 2 * 256 * 10]


def plain(*_):
    return contextlib.nullcontext()


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_flops_of_simple_cnn_are_what_a_hand_counts(cifar, batch):
    images = torch.randn(batch, 3, 32, 32)
    forward, uncounted = cifar.flops_per_sample(cifar.simple_cnn(10), images, False, plain)
    assert forward == pytest.approx(sum(LAYERS), rel=0.01)
    assert {"relu", "max_pool2d_with_indices"} <= set(uncounted)
    assert not {"convolution", "addmm", "mm"} & set(uncounted)


def test_training_flops_are_three_forward_passes_less_the_gradient_of_the_images(cifar):
    images = torch.randn(2, 3, 32, 32)
    training, uncounted = cifar.flops_per_sample(cifar.simple_cnn(10), images, True, plain)
    assert training == pytest.approx(3 * sum(LAYERS) - LAYERS[0], rel=0.01)
    assert "threshold_backward" in uncounted


def test_flops_are_the_same_in_mixed_precision_and_fall_with_the_resolution(cifar):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    half = torch.autocast("cpu", torch.bfloat16)
    images = torch.randn(2, 3, 32, 32)
    whole, _ = cifar.flops_per_sample(model, images, False, plain)
    assert cifar.flops_per_sample(model, images, False, lambda: half)[0] == whole
    assert cifar.flops_per_sample(model, images[..., ::2, ::2], False, plain)[0] == whole / 4


class Attention(nn.Module):
    """One encoder layer over 8 tokens of width 16, then a linear head on their mean."""

    TOKENS, WIDTH, HIDDEN, CLASSES = 8, 16, 32, 3

    def __init__(self, dropout):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(self.WIDTH, 2, self.HIDDEN, dropout, batch_first=True)
        self.head = nn.Linear(self.WIDTH, self.CLASSES)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))

    def by_hand(self, training):
        s, d = self.TOKENS, self.WIDTH
        projection = 2 * s * d * 3 * d
        attention = 2 * (2 * s * s * d)
        rest = 2 * s * d * d + 2 * (2 * s * d * self.HIDDEN) + 2 * d * self.CLASSES
        forward = projection + attention + rest
        return 3 * forward - projection if training else forward


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_attention_is_counted_in_full(cifar, training, dropout):
    model = Attention(dropout)
    model.train(training)
    tokens = torch.randn(2, model.TOKENS, model.WIDTH)
    flops, uncounted = cifar.flops_per_sample(model, tokens, training, plain)
    assert flops == pytest.approx(model.by_hand(training), rel=0.01)
    assert not [name for name in uncounted if "attention" in name or name == "_transformer_encoder_layer_fwd"]


@pytest.mark.parametrize("training", [False, True])
def test_counting_leaves_model_mode_generators_and_switches_as_they_were(cifar, training):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(4 * 900, 2)
    )
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    state = torch.get_rng_state()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    cifar.flops_per_sample(model, torch.randn(2, 3, 32, 32, generator=torch.Generator()), training, plain)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model] == [True, False, True, True, True]
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled() == fast_path


def test_the_fast_path_is_switched_back_on_when_the_model_fails(cifar):
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(RuntimeError):
        cifar.flops_per_sample(nn.Linear(3, 2), torch.randn(2, 5), False, plain)
    assert torch.backends.mha.get_fastpath_enabled() == fast_path


# --- ledger: joules ---


@pytest.fixture
def powercap(tmp_path):
    """A powercap tree as Linux shows it: two packages, and a subzone that its package already counts."""

    def write(name, energy, wrap=10_000_000):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "energy_uj").write_text(f"{energy}\n")
        (folder / "max_energy_range_uj").write_text(f"{wrap}\n")

    write("intel-rapl:0", 1_000_000)
    write("intel-rapl:1", 9_000_000)
    write("intel-rapl:0:0", 5_000_000)
    write("dtpm", 0)
    write.root = tmp_path
    return write


def test_rapl_adds_the_packages_and_not_their_parts(cifar, powercap):
    meter = cifar.EnergyMeter(CPU, powercap.root)
    assert (meter.method, meter.reason) == ("rapl", "")
    powercap("intel-rapl:0", 3_500_000)
    powercap("intel-rapl:0:0", 9_500_000)
    powercap("intel-rapl:1", 9_250_000)
    assert meter.joules() == pytest.approx(2.75)


def test_rapl_goes_on_where_a_counter_wraps(cifar, powercap):
    meter = cifar.EnergyMeter(CPU, powercap.root)
    powercap("intel-rapl:1", 499_999)
    assert meter.joules() == pytest.approx(1.5)
    powercap("intel-rapl:1", 9_499_999)
    powercap("intel-rapl:0", 0)
    assert meter.joules() == pytest.approx(1.5 + 9.0 + 9.000001)


@given(steps=st.lists(st.integers(0, 10_000_000), max_size=30), start=st.integers(0, 10_000_000))
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rapl_sums_any_steps_shorter_than_a_turn(cifar, powercap, steps, start):
    powercap("intel-rapl:0", start)
    meter = cifar.EnergyMeter(CPU, powercap.root)
    counter = start
    for step in steps:
        counter = (counter + step) % 10_000_001
        powercap("intel-rapl:0", counter)
        meter.joules()
    assert meter.joules() == pytest.approx(sum(steps) / 1e6)


def unavailable(meter):
    """The reason, after asserting that no number is given."""
    assert meter.joules() is None
    assert meter.method == "unavailable"
    assert meter.reason
    assert "\n" not in meter.reason
    return meter.reason


def test_no_powercap_is_unavailable_with_the_reason(cifar, tmp_path):
    assert str(tmp_path / "none") in unavailable(cifar.EnergyMeter(CPU, tmp_path / "none"))


def test_a_powercap_that_only_root_may_read_is_unavailable_with_the_reason(cifar, powercap, monkeypatch):
    # Permissions do not bind root, who runs tests in containers.
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(cifar.Path, "read_text", refuse)
    assert "Permission denied" in unavailable(cifar.EnergyMeter(CPU, powercap.root))


@pytest.mark.parametrize("damage", ["not a number", ""])
def test_a_powercap_of_nonsense_is_unavailable_with_the_reason(cifar, powercap, damage):
    (powercap.root / "intel-rapl:1" / "energy_uj").write_text(damage)
    unavailable(cifar.EnergyMeter(CPU, powercap.root))


def test_a_counter_that_disappears_becomes_unavailable_and_stops_nothing(cifar, powercap):
    meter = cifar.EnergyMeter(CPU, powercap.root)
    ledger = cifar.Ledger(meter)
    ledger.switch("sparse")
    (powercap.root / "intel-rapl:0" / "energy_uj").unlink()
    ledger.switch("evaluation")
    ledger.switch(None)
    unavailable(meter)
    assert ledger.total().joules is None


class NVMLError(Exception):
    pass


def fake_pynvml(monkeypatch, **functions):
    module = types.ModuleType("pynvml")
    module.NVMLError = NVMLError
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetHandleByIndex = lambda index: f"handle {index}"
    module.__dict__.update(functions)
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def failing(*_):
    raise NVMLError("Not Supported")


def test_the_nvml_counter_is_read_in_millijoules_since_the_start(cifar, monkeypatch):
    counter = {"handle 0": 5_000_000, "handle 1": 100}
    fake_pynvml(monkeypatch, nvmlDeviceGetTotalEnergyConsumption=lambda handle: counter[handle])
    meter = cifar.EnergyMeter(torch.device("cuda", 0))
    assert meter.method == "nvml-counter"
    counter["handle 0"] += 12_345
    counter["handle 1"] += 99_999_999
    assert meter.joules() == pytest.approx(12.345)


def test_without_a_counter_power_is_polled_at_ten_hertz_or_more(cifar, monkeypatch):
    now, power = [50.0], [100_000]
    asleep, wake = queue.Queue(), queue.Queue()

    def sleep(seconds):
        asleep.put(seconds)
        now[0] += wake.get()

    fake_pynvml(
        monkeypatch,
        nvmlDeviceGetTotalEnergyConsumption=failing,
        nvmlDeviceGetPowerUsage=lambda handle: power[0],
    )
    monkeypatch.setattr(cifar, "time", types.SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    meter = cifar.EnergyMeter(torch.device("cuda"))
    assert meter.method == "nvml-polled"
    try:
        assert asleep.get(timeout=60) <= 0.1
        power[0] = 200_000
        wake.put(2.0)
        asleep.get(timeout=60)
        assert meter.joules() == pytest.approx(2.0 * 150)
        wake.put(0.5)
        asleep.get(timeout=60)
        assert meter.joules() == pytest.approx(2.0 * 150 + 0.5 * 200)
    finally:  # the thread ends with the method that it polls for
        meter.method = "unavailable"
        wake.put(0.0)


def test_polling_that_fails_becomes_unavailable_instead_of_standing_still(cifar, monkeypatch):
    asleep, wake = queue.Queue(), queue.Queue()
    answers = [lambda: 100_000]

    def sleep(seconds):
        asleep.put(seconds)
        wake.get()

    fake_pynvml(
        monkeypatch,
        nvmlDeviceGetTotalEnergyConsumption=failing,
        nvmlDeviceGetPowerUsage=lambda handle: answers[0](),
    )
    monkeypatch.setattr(cifar, "time", types.SimpleNamespace(monotonic=lambda: 1.0, sleep=sleep))
    ended = []
    real = cifar.threading.Thread

    def thread(*args, **kwargs):
        ended.append(real(*args, **kwargs))
        return ended[-1]

    monkeypatch.setattr(cifar.threading, "Thread", thread)
    meter = cifar.EnergyMeter(torch.device("cuda"))
    asleep.get(timeout=60)
    answers[0] = failing
    wake.put(None)
    ended[0].join(timeout=60)
    assert not ended[0].is_alive()
    assert "Not Supported" in unavailable(meter)


def test_an_nvml_counter_that_fails_later_becomes_unavailable_and_stops_nothing(cifar, monkeypatch):
    module = fake_pynvml(monkeypatch, nvmlDeviceGetTotalEnergyConsumption=lambda handle: 1000)
    meter = cifar.EnergyMeter(torch.device("cuda", 0))
    module.nvmlDeviceGetTotalEnergyConsumption = failing
    assert "Not Supported" in unavailable(meter)


@pytest.mark.parametrize("broken", ["nvmlInit", "nvmlDeviceGetHandleByIndex"])
def test_an_nvml_that_does_not_start_is_unavailable_with_the_reason(cifar, monkeypatch, broken):
    fake_pynvml(monkeypatch, **{broken: failing})
    assert "Not Supported" in unavailable(cifar.EnergyMeter(torch.device("cuda", 0)))


def test_without_counter_and_power_nvml_is_unavailable(cifar, monkeypatch):
    fake_pynvml(monkeypatch, nvmlDeviceGetTotalEnergyConsumption=failing, nvmlDeviceGetPowerUsage=failing)
    assert "Not Supported" in unavailable(cifar.EnergyMeter(torch.device("cuda", 0)))


def test_without_pynvml_joules_are_unavailable_and_pynvml_is_named(cifar, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "pynvml" in unavailable(cifar.EnergyMeter(torch.device("cuda", 0)))


# --- plan ---


def chosen(share):
    """A selection that depends on the sample alone, so that two plans choose alike; its weight names it."""

    def select(candidates):
        taken = candidates[(candidates * 7919) % 1000 < 1000 * share]
        return taken, taken + 0.5

    return select


PLANS = st.fixed_dictionaries(
    {
        "n": st.integers(0, 300),
        "batch_size": st.integers(1, 40),
        "chunks": st.lists(st.integers(0, 90), min_size=1, max_size=5),
        "share": st.floats(0, 1),
        "seed": st.integers(0, 99),
    }
)


def make_plan(cifar, n, batch_size, chunks, share, seed):
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(torch.int32)
    turn = itertools.cycle(chunks)
    return cifar.Plan(order, batch_size, lambda: next(turn), chosen(share))


def drain(plan, ahead, stop=math.inf):
    """(indices, weights) of each batch, asked for `ahead` batches before it is received, as workers do."""
    got, waiting, source = [], deque(), plan.batches()
    while len(got) < stop:
        while len(waiting) <= ahead and (indices := next(source, None)) is not None:
            waiting.append(indices)
        if not waiting:
            break
        indices = waiting.popleft()
        got.append((indices, plan.received(indices)[0]))
    return got


def check_batches(batches, expected, batch_size):
    indices = [int(i) for batch in batches for i in batch]
    assert sorted(indices) == sorted(expected)
    assert all(len(batch) == batch_size for batch in batches[:-2])
    assert all(len(batch) <= batch_size + 1 for batch in batches)
    assert len(batches) < 2 or min(map(len, batches)) >= batch_size / 2  # the remainder is shared
    assert len(expected) < 2 or batch_size == 1 or all(len(batch) > 1 for batch in batches)


@given(plan=PLANS, ahead=st.integers(0, 4))
@example(plan={"n": 33, "batch_size": 32, "chunks": [90], "share": 1.0, "seed": 0}, ahead=0)
@example(plan={"n": 65, "batch_size": 32, "chunks": [1], "share": 1.0, "seed": 0}, ahead=2)
@example(plan={"n": 1, "batch_size": 32, "chunks": [1], "share": 1.0, "seed": 0}, ahead=0)
@settings(deadline=None)
def test_every_activated_sample_comes_exactly_once_in_full_batches(cifar, plan, ahead):
    expected = chosen(plan["share"])(torch.arange(plan["n"]))[0].tolist()
    batches = drain(make_plan(cifar, **plan), ahead)
    check_batches([indices for indices, _ in batches], expected, plan["batch_size"])
    for indices, weights in batches:
        assert (weights == indices + 0.5).all()


@given(plan=PLANS, ahead=st.integers(0, 4), data=st.data())
@settings(deadline=None)
def test_a_plan_goes_on_from_its_state_at_any_batch(cifar, plan, ahead, data):
    plan["chunks"] = plan["chunks"][:1]
    whole = drain(make_plan(cifar, **plan), ahead)
    assume(whole)
    stop = data.draw(st.integers(1, len(whole)))
    first = make_plan(cifar, **plan)
    drain(first, ahead, stop)
    kept = io.BytesIO()
    torch.save(first.state_dict(), kept)
    second = make_plan(cifar, **plan | {"n": 0})
    second.load_state_dict(torch.load(io.BytesIO(kept.getvalue()), weights_only=True))
    rest = drain(second, data.draw(st.integers(0, 4)))
    assert len(rest) == len(whole) - stop
    for (indices, weights), (again, weights_again) in zip(whole[stop:], rest, strict=True):
        assert torch.equal(indices, again)
        assert torch.equal(weights, weights_again)


@given(plan=PLANS)
@settings(deadline=None)
def test_what_the_gate_lets_through_after_the_loader_is_packed_once_and_full(cifar, plan):
    made = make_plan(cifar, **plan | {"share": 1.0})
    let_through = chosen(plan["share"])
    packed = [views for views in made.pack()]
    for indices in made.batches():
        made.received(indices)
        taken, weights = let_through(indices)
        made.views.append((taken, weights, taken * 10))
        packed += list(made.pack())
    packed += list(made.pack())
    expected = let_through(torch.arange(plan["n"]))[0].tolist()
    check_batches([indices for indices, _, _ in packed], expected, plan["batch_size"])
    for indices, weights, images in packed:
        assert (weights == indices + 0.5).all()
        assert (images == indices * 10).all()


def test_samples_that_do_not_arrive_are_named_and_take_their_weights_along(cifar):
    plan = make_plan(cifar, 10, 10, [10], 1.0, 0)
    asked = next(plan.batches())
    weights, missing = plan.received(asked[[0, 2, 3, 5, 6, 7, 8, 9]])
    assert missing.tolist() == asked[[1, 4]].tolist()
    assert weights.tolist() == (asked[[0, 2, 3, 5, 6, 7, 8, 9]] + 0.5).tolist()


def test_the_gate_is_asked_only_when_its_batches_are_due(cifar):
    asked = []

    def select(candidates):
        asked.append(len(candidates))
        return candidates, torch.ones(len(candidates))

    source = cifar.Plan(torch.arange(1000), 32, lambda: 50, select).batches()
    next(source)
    assert sum(asked) == 100  # two batches' worth, so that the last two can share a remainder
    next(source)
    assert sum(asked) == 100
    next(source)
    assert sum(asked) == 150


# --- the step ---


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01, fused=True),
    "sgd plain": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}


def learner(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    return model, OPTIMIZERS[name](model.parameters())


def take_step(cifar, model, optimizer, scaler, spoil, seed):
    """One step as the trainer takes it, on a batch of its own; `spoil` is put into the gradient."""
    images = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad(set_to_none=True)
    before = cifar.joined(cifar.float_buffers(model))
    scaler.scale(model(images).square().mean()).backward()
    if spoil is not None:
        model[3].weight.grad[0, 0] = spoil
    return bool(cifar.guarded_step(model, optimizer, scaler, before))


def everything(model, optimizer):
    """Weights, floating-point buffers and optimiser state; a state not yet made counts as zeros."""
    found = {f"weight {n}": p.detach().clone() for n, p in model.named_parameters()}
    found |= {f"buffer {n}": b.clone() for n, b in model.named_buffers() if b.is_floating_point()}
    for n, p in model.named_parameters():
        for key, value in optimizer.state[p].items():
            if isinstance(value, torch.Tensor) and value.any():
                found[f"{key} {n}"] = value.clone()
    return found


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaler"])
@pytest.mark.parametrize("good_before", [0, 2], ids=["first-step", "third-step"])
@pytest.mark.parametrize("spoil", [math.nan, math.inf])
def test_a_step_with_a_bad_gradient_is_as_if_never_taken(cifar, name, scaled, good_before, spoil):
    model, optimizer = learner(name)
    twin, twin_optimizer = learner(name)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=4.0)
    twin_scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=4.0)
    # Uninitialised memory is mostly zeros in a young process, which would hide its use.
    junk = [torch.full(p.shape, math.nan) for p in model.parameters() for _ in range(8)]
    del junk
    for seed in range(good_before):
        assert take_step(cifar, model, optimizer, scaler, None, seed)
        assert take_step(cifar, twin, twin_optimizer, twin_scaler, None, seed)
    before = everything(model, optimizer)
    assert not take_step(cifar, model, optimizer, scaler, spoil, 99)
    assert_same(everything(model, optimizer), before)
    assert take_step(cifar, model, optimizer, scaler, None, 7)
    assert take_step(cifar, twin, twin_optimizer, twin_scaler, None, 7)
    after = everything(model, optimizer)
    for key, value in everything(twin, twin_optimizer).items():
        torch.testing.assert_close(after[key], value, msg=lambda text, key=key: f"{key}: {text}")


def test_parameters_without_a_gradient_are_left_alone(cifar):
    model, optimizer = learner("sgd")
    model[0].requires_grad_(False)
    frozen = model[0].weight.clone()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    assert take_step(cifar, model, optimizer, scaler, None, 0)
    assert torch.equal(model[0].weight, frozen)


def test_evaluating_gives_every_module_its_own_flag_back(cifar):
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2), nn.Dropout()))
    model[1][0].eval()
    flags = [module.training for module in model.modules()]
    assert len(set(flags)) == 2
    with cifar.evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == flags
    assert torch.is_grad_enabled()
    with pytest.raises(KeyError), cifar.evaluating(model):
        raise KeyError
    assert [module.training for module in model.modules()] == flags


# --- sources ---


class Numbers(Dataset):
    """Sample i is the number i with label i % 3; asking for one of `broken` fails as a broken image does."""

    def __init__(self, n, broken=()):
        self.n, self.broken, self.asked = n, set(broken), []

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        self.asked.append(index)
        if index in self.broken:
            raise OSError(f"cannot identify image {index}")
        return torch.full((2,), float(index)), index % 3


class Stream(IterableDataset):
    def __iter__(self):
        yield from ()

    def __len__(self):
        return 5


NUMBERS = Numbers(10)
REFUSED = {
    "weighted sampler": lambda: DataLoader(NUMBERS, sampler=WeightedRandomSampler([1.0] * 10, 10)),
    "subset sampler": lambda: DataLoader(NUMBERS, sampler=SubsetRandomSampler([1, 2])),
    "with replacement": lambda: DataLoader(
        NUMBERS, sampler=torch.utils.data.RandomSampler(NUMBERS, replacement=True)
    ),
    "shorter sampler": lambda: DataLoader(NUMBERS, sampler=SequentialSampler(range(5))),
    "batch sampler": lambda: DataLoader(
        NUMBERS, batch_sampler=BatchSampler(SequentialSampler(NUMBERS), 3, False)
    ),
    "no batches": lambda: DataLoader(NUMBERS, batch_size=None),
    "stream": Stream,
    "loader of a stream": lambda: DataLoader(Stream(), batch_size=2),
    "nothing": lambda: None,
    "a number": lambda: 7,
    "a generator": lambda: iter([(1, 2)]),
    "unequal arrays": lambda: (np.zeros((4, 2)), np.zeros(3)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_source_is_refused_in_a_sentence(cifar, what):
    with pytest.raises(cifar.BadInput, match="expected") as refusal:
        cifar.as_source(REFUSED[what](), CPU, 4, "train_loader")
    assert "\n" not in str(refusal.value)
    if what != "unequal arrays":
        assert "train_loader" in str(refusal.value)


def gather(source, batches):
    return [
        (indices.tolist(), images[:, 0].tolist() if len(indices) else [], labels.tolist())
        for indices, images, labels in source.stream(map(torch.tensor, batches))
    ]


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_loader_gives_up_its_dataset_batch_size_and_collate(cifar, shuffle):
    def collate(samples):
        return torch.stack([image for image, _ in samples]) + 1000, torch.tensor([y for _, y in samples])

    source = cifar.as_source(
        DataLoader(Numbers(10), batch_size=3, shuffle=shuffle, collate_fn=collate), CPU, 64, "train_loader"
    )
    assert (len(source), source.batch_size) == (10, 3)
    assert gather(source, [[4, 1], [9]]) == [([4, 1], [1004, 1001], [1, 1]), ([9], [1009], [0])]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_deliver_what_was_asked_for_in_order_and_nothing_else(cifar, workers):
    numbers = Numbers(500)
    source = cifar.as_source(DataLoader(numbers, batch_size=4, num_workers=workers), CPU, 64, "train_loader")
    batches = [[7, 3, 499, 0], [12, 11], [5], [300, 301, 302]]
    got = gather(source, batches)
    assert [indices for indices, _, _ in got] == batches
    assert all(images == indices for indices, images, _ in got)
    assert all(labels == [i % 3 for i in indices] for indices, _, labels in got)
    assert numbers.asked == ([] if workers else [7, 3, 499, 0, 12, 11, 5, 300, 301, 302])


@pytest.mark.parametrize("workers", [0, 2])
def test_up_to_one_percent_unreadable_samples_are_dropped(cifar, workers):
    loader = DataLoader(Numbers(200, broken=[3, 8]), batch_size=4, num_workers=workers)
    source = cifar.as_source(loader, CPU, 64, "train_loader")
    got = gather(source, [[1, 2, 3, 4], [8], [9, 10]])
    assert got == [([1, 2, 4], [1, 2, 4], [1, 2, 1]), ([], [], []), ([9, 10], [9, 10], [0, 1])]
    assert sorted(source.unreadable) == [3, 8]
    assert source.unreadable[3] == "cannot identify image 3"


@pytest.mark.parametrize("workers", [0, 2])
def test_more_than_one_percent_unreadable_samples_are_bad_input(cifar, workers):
    loader = DataLoader(Numbers(200, broken=[3, 8, 9]), batch_size=4, num_workers=workers)
    source = cifar.as_source(loader, CPU, 64, "train_loader")
    with pytest.raises(cifar.BadInput, match=r"3 of 200 samples: expected at most 1 %.*sample 3"):
        gather(source, [[1, 2, 3, 4], [8], [9, 10]])


def test_the_same_unreadable_sample_counts_once(cifar):
    source = cifar.as_source(DataLoader(Numbers(100, broken=[3]), batch_size=4), CPU, 64, "train_loader")
    for _ in range(5):
        gather(source, [[3, 4]])
    assert list(source.unreadable) == [3]


def test_unreadable_samples_are_lost_to_the_gate_and_not_asked_for_again(cifar):
    torch.manual_seed(0)
    numbers, lost = Numbers(200, broken=[17, 40]), []

    class Gate(cifar.RandomGate):
        def observe(self, indices, losses):
            lost.extend(indices[losses.isnan()].tolist())

    trainer = cifar.AdaptiveSparseTrainer(
        nn.Linear(2, 3),
        numbers,
        Numbers(9),
        {"target_activation": 0.9, "device": "cpu", "batch_size": 16, "anneal_epochs": 0},
        gate=Gate(),
        listeners=[],
    )
    results = trainer.train(epochs=3)
    assert sorted(lost) == [17, 40]
    assert (numbers.asked.count(17), numbers.asked.count(40)) == (1, 1)
    assert [row["candidates"] for row in results["epochs"]] == [200, 198, 198]


def test_an_unreadable_validation_sample_is_bad_input_not_a_fault(cifar):
    trainer = cifar.AdaptiveSparseTrainer(
        nn.Linear(2, 3), Numbers(40), Numbers(40, broken=[5]), {"device": "cpu"}, listeners=[]
    )
    with pytest.raises(cifar.BadInput, match="5"):
        trainer.train(epochs=1)


@pytest.mark.parametrize(
    "dtype,shape,expected,scale",
    [
        (torch.uint8, (4, 8, 8, 3), (4, 3, 8, 8), 255),
        (torch.uint8, (4, 8, 8, 1), (4, 1, 8, 8), 255),
        (torch.uint8, (4, 5), (4, 5), 255),
        (torch.float64, (4, 3, 8, 8), (4, 3, 8, 8), 1),
    ],
)
def test_arrays_become_float_inputs(cifar, dtype, shape, expected, scale):
    images = (torch.rand(shape) * 200).to(dtype)
    source = cifar.as_source((images.numpy(), np.arange(4)), CPU, 2, "train_loader")
    indices, views, labels = next(source.stream([torch.tensor([2, 0])]))
    assert views.shape == (2, *expected[1:])
    assert views.dtype is torch.float32
    assert labels.tolist() == indices.tolist() == [2, 0]
    assert float(views[0].sum()) == pytest.approx(float(images[2].double().sum()) / scale, rel=1e-4)


def test_a_tensor_dataset_is_a_source(cifar):
    dataset = TensorDataset(torch.arange(6.0)[:, None], torch.arange(6))
    source = cifar.as_source(dataset, CPU, 4, "val_loader")
    assert source.batch_size == 4
    assert [labels.tolist() for _, labels in source.in_order()] == [[0, 1, 2, 3], [4, 5]]


@pytest.mark.parametrize(
    "samples", [[torch.zeros(2)] * 3, [(torch.zeros(2), 1, 2)] * 3], ids=["no label", "three parts"]
)
def test_a_dataset_that_gives_something_else_is_told_so(cifar, samples):
    source = cifar.as_source(samples, CPU, 4, "train_loader")
    with pytest.raises(cifar.BadInput, match=r"expected \(images, labels\)"):
        next(source.stream([torch.tensor([0, 1, 2])]))


# --- precision and device ---


@pytest.mark.parametrize(
    "text,expected",
    [
        ("flags\t\t: fpu avx512f avx512_bf16 amx_tile\n", True),
        ("flags\t\t: fpu amx_bf16\n", True),
        ("flags\t\t: fpu avx512f avx2\n", False),
        ("Features\t: fp asimd bf16\n", False),
        ("flags\t\t: notavx512_bf16x\n", False),
    ],
)
def test_bf16_is_read_from_what_the_processor_reports(cifar, tmp_path, text, expected):
    (tmp_path / "cpuinfo").write_text(text)
    assert cifar.cpu_has_bf16(tmp_path / "cpuinfo") is expected


def test_no_cpuinfo_means_no_bf16(cifar, tmp_path):
    assert not cifar.cpu_has_bf16(tmp_path / "cpuinfo")


@pytest.mark.parametrize("has", [False, True])
def test_precision_on_a_cpu(cifar, monkeypatch, has):
    monkeypatch.setattr(cifar, "cpu_has_bf16", lambda: has)
    assert cifar.pick_dtype("auto", CPU) is (torch.bfloat16 if has else None)
    assert cifar.pick_dtype("off", CPU) is None
    assert cifar.pick_dtype("bf16", CPU) is torch.bfloat16
    with pytest.raises(cifar.BadInput, match="--amp fp16: expected"):
        cifar.pick_dtype("fp16", CPU)


@pytest.mark.parametrize(
    "capability,native_bf16,expected",
    [
        ((6, 0), False, None),
        ((7, 0), False, torch.float16),
        ((7, 5), False, torch.float16),
        ((8, 0), True, torch.bfloat16),
        ((9, 0), True, torch.bfloat16),
    ],
)
def test_precision_on_a_gpu(cifar, monkeypatch, capability, native_bf16, expected):
    def supported(including_emulation=True):
        return native_bf16 or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    cuda = torch.device("cuda", 0)
    assert cifar.pick_dtype("auto", cuda) is expected
    assert cifar.pick_dtype("fp16", cuda) is torch.float16
    assert cifar.pick_dtype("off", cuda) is None


@pytest.mark.parametrize(
    "gpu,capability,build,expected",
    [
        ("P100", (6, 0), "cu126", True),
        ("P100", (6, 0), "cu128", False),
        ("V100", (7, 0), "cu126", True),
        ("V100", (7, 0), "cu128", False),
        ("T4", (7, 5), "cu126", True),
        ("T4", (7, 5), "cu128", True),
        ("L4", (8, 9), "cu126", True),
        ("H100", (9, 0), "cu126", True),
        ("B200", (10, 0), "cu126", False),
        ("B200", (10, 0), "cu128", True),
        ("later than the build, by PTX", (13, 0), "cu128", True),
    ],
)
def test_which_gpu_a_build_of_torch_has_code_for(cifar, gpu, capability, build, expected):
    assert cifar.has_code_for(capability, ARCHITECTURES[build]) is expected


@pytest.mark.parametrize(
    "capability,architectures,expected",
    [
        ((9, 0), ["sm_90a"], True),
        ((8, 0), ["sm_86"], False),
        ((7, 5), ["compute_60"], True),
        ((6, 0), ["compute_70"], False),
        ((8, 0), [], False),
    ],
)
def test_code_is_for_its_generation_and_ptx_for_all_later_ones(cifar, capability, architectures, expected):
    assert cifar.has_code_for(capability, architectures) is expected


def fake_gpu(monkeypatch, capability, architectures, count=1):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla P100-PCIE-16GB")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: architectures)


@pytest.mark.parametrize("asked", ["auto", "cuda", "cuda:0"])
def test_a_gpu_without_code_is_named_with_the_way_out_and_not_replaced_in_silence(cifar, monkeypatch, asked):
    fake_gpu(monkeypatch, (6, 0), ARCHITECTURES["cu128"])
    with pytest.raises(cifar.BadInput, match=r"P100.*sm_60.*--device cpu") as refusal:
        cifar.pick_device(asked)
    assert "\n" not in str(refusal.value)
    assert cifar.pick_device("cpu") == CPU


def test_a_gpu_that_is_not_there_is_refused(cifar, monkeypatch):
    fake_gpu(monkeypatch, (7, 5), ARCHITECTURES["cu128"])
    assert cifar.pick_device("auto") == torch.device("cuda", 0)
    with pytest.raises(cifar.BadInput, match="cuda:4"):
        cifar.pick_device("cuda:4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cifar.pick_device("auto") == CPU
    with pytest.raises(cifar.BadInput, match="--device cuda: expected"):
        cifar.pick_device("cuda")


# --- views ---


def test_augment_only_shifts_by_up_to_four_and_flips(cifar):
    images = torch.randint(0, 256, (60, 16, 16, 3), generator=torch.Generator().manual_seed(1)).byte()
    views = cifar.augment(images, torch.Generator().manual_seed(2))
    assert views.shape == (60, 3, 16, 16)
    assert views.dtype is torch.float32
    found = set()
    for image, view in zip(images, views, strict=True):
        padded = torch.from_numpy(np.pad(image.numpy(), ((4, 4), (4, 4), (0, 0)), mode="reflect"))
        ways = {}
        for down in range(9):
            for right in range(9):
                crop = padded[down : down + 16, right : right + 16]
                ways |= {(down, right, False): crop, (down, right, True): crop.flip(1)}
        plain_ways = cifar.normalise(torch.stack(list(ways.values())))
        match = (plain_ways == view).flatten(1).all(1).nonzero().flatten().tolist()
        assert len(match) == 1
        found.add(list(ways)[match[0]])
    assert len(found) > 30
    assert {flipped for _, _, flipped in found} == {False, True}


def test_augment_draws_from_its_generator_alone(cifar):
    images = torch.randint(0, 256, (8, 32, 32, 3)).byte()
    kept, state = images.clone(), torch.get_rng_state()
    first, second = (cifar.augment(images, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, cifar.augment(images, torch.Generator().manual_seed(4)))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images, kept)


def test_the_plain_view_draws_nothing_and_is_about_normal(cifar, generator):
    images = torch.randint(0, 256, (64, 32, 32, 3)).byte()
    state = generator.get_state()
    view = cifar.plain_view(images, generator)
    assert torch.equal(generator.get_state(), state)
    assert torch.equal(view.permute(0, 2, 3, 1)[..., 0], (images[..., 0] - 125.3) / 63.0)


# --- checkpoints ---


def state(number):
    return {"number": number, "weights": torch.arange(1000.0) + number, "rows": [{"a": None}], "nan": 0.5}


def loaded(cifar, folder):
    said = []
    return cifar.load_checkpoint(folder, said.append), said


def test_a_checkpoint_comes_back_as_it_was_and_two_are_kept(cifar, tmp_path):
    folder = tmp_path / "made" / "checkpoints"
    for number in range(4):
        cifar.save_checkpoint(folder, state(number))
        found, said = loaded(cifar, folder)
        assert (found["number"], found["rows"], said) == (number, [{"a": None}], [])
        assert torch.equal(found["weights"], state(number)["weights"])
        assert len(list(folder.iterdir())) == min(number + 1, 2)


def flip(content, at):
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: b"",
        lambda c: c[:10],
        lambda c: c[:32],
        lambda c: c[: len(c) // 2],
        lambda c: c[:-1],
        lambda c: c + b"\0",
        lambda c: flip(c, 0),
        lambda c: flip(c, 40),
        lambda c: flip(c, len(c) // 2),
        lambda c: flip(c, len(c) - 1),
    ],
    ids=["empty", "10 bytes", "only the sum", "half", "last byte lost", "byte more", *["bit flipped"] * 4],
)
def test_a_damaged_latest_checkpoint_falls_back_with_a_warning(cifar, tmp_path, damage):
    for number in range(2):
        newest = cifar.save_checkpoint(tmp_path, state(number))
    newest.write_bytes(damage(newest.read_bytes()))
    found, said = loaded(cifar, tmp_path)
    assert found["number"] == 0
    assert len(said) == 1
    assert str(newest) in said[0]
    assert "damaged" in said[0]


def test_two_damaged_checkpoints_are_none(cifar, tmp_path):
    for number in range(2):
        cifar.save_checkpoint(tmp_path, state(number)).write_bytes(b"nothing")
    found, said = loaded(cifar, tmp_path)
    assert found is None
    assert len(said) == 2


def test_no_checkpoint_is_none(cifar, tmp_path):
    assert loaded(cifar, tmp_path / "none") == (None, [])


def test_after_a_fall_back_two_whole_checkpoints_are_kept_again(cifar, tmp_path):
    for number in range(2):
        newest = cifar.save_checkpoint(tmp_path, state(number))
    newest.write_bytes(b"damaged")
    assert loaded(cifar, tmp_path)[0]["number"] == 0
    newest = cifar.save_checkpoint(tmp_path, state(2))
    newest.write_bytes(b"damaged as well")
    assert loaded(cifar, tmp_path)[0]["number"] == 0


@contextlib.contextmanager
def disk_that_takes(size):
    """No file may grow beyond `size` bytes, as on a full disk; Python turns the signal into an OSError."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_leaves_the_old_checkpoint_and_no_litter(cifar, tmp_path):
    cifar.save_checkpoint(tmp_path, state(1))
    with disk_that_takes(500), pytest.raises(cifar.BadInput, match=r"000001\.ckpt: expected"):
        cifar.save_checkpoint(tmp_path, state(2))
    assert [path.name for path in tmp_path.iterdir()] == ["000000.ckpt"]
    assert loaded(cifar, tmp_path)[0]["number"] == 1


def test_a_file_is_replaced_whole_or_not_at_all(cifar, tmp_path):
    path = tmp_path / "summary.json"
    cifar.write_whole(path, b"old" * 100)
    with disk_that_takes(150), pytest.raises(cifar.BadInput, match=r"summary\.json"):
        cifar.write_whole(path, b"new" * 100)
    assert path.read_bytes() == b"old" * 100
    cifar.write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_bad_input(cifar, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(cifar.BadInput, match="expected a folder"):
        cifar.write_whole(tmp_path / "file" / "summary.json", b"x")
    assert (tmp_path / "file").read_text() == "mine"


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_checkpoint_runs_no_code(cifar, tmp_path):
    buffer = io.BytesIO()
    torch.save({"number": Evil(str(tmp_path / "hacked"))}, buffer)
    payload = buffer.getvalue()
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "000000.ckpt").write_bytes(hashlib.sha256(payload).digest() + payload)
    with contextlib.suppress(pickle.UnpicklingError, cifar.BadInput):
        assert loaded(cifar, folder)[0] is None
    assert not (tmp_path / "hacked").exists()


# --- records ---


def epoch_row(cifar, number):
    return {name: number for name in cifar.METRICS} | {"eta_seconds": 1.0}


def test_records_are_cut_back_to_the_byte(cifar, tmp_path):
    records = cifar.Records(tmp_path)
    records.cut({})
    assert [path.read_bytes() for path in records.paths.values()] == [b"", b""]
    change = {"time": 1.0, "candidates": 5, "control": "x", "old": 1, "new": 2, "set_at": 3}
    records("epoch", epoch_row(cifar, 1))
    records("control", change)
    sizes, kept = records.sizes(), [path.read_bytes() for path in records.paths.values()]
    assert all(kept)
    records("epoch", epoch_row(cifar, 2))
    records("control", change)
    with open(records.paths["epoch"], "a") as file:
        file.write('{"half a li')
    records.cut(sizes)
    assert [path.read_bytes() for path in records.paths.values()] == kept
    records("epoch", epoch_row(cifar, 3))
    rows = [cifar.json.loads(line) for line in records.paths["epoch"].read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 3]
    assert list(rows[0]) == list(cifar.METRICS)


def test_a_change_is_recorded_with_when_it_was_asked_for_and_applied(cifar, tmp_path):
    records = cifar.Records(tmp_path)
    change = {"time": 1.0, "candidates": 512, "control": "x", "old": 0.4, "new": 0.1, "set_at": 300}
    records("control", change)
    row = cifar.json.loads((tmp_path / "events.jsonl").read_text())
    assert list(row) == list(cifar.CHANGES)
    assert (row["set_at"], row["applied_at"]) == (300, 512)


def test_records_that_cannot_be_written_are_bad_input(cifar, tmp_path):
    records = cifar.Records(tmp_path)
    records.cut({})
    with disk_that_takes(100), pytest.raises(cifar.BadInput, match=r"metrics\.jsonl"):
        records("epoch", epoch_row(cifar, 1))
    with pytest.raises(cifar.BadInput, match=r"nowhere.metrics\.jsonl"):
        cifar.Records(tmp_path / "nowhere").cut({})


# --- settings ---


def test_a_flag_beats_a_variable_beats_the_cell_beats_the_default(cifar):
    cell = replace(cifar.Settings(), epochs=7, batch_size=16, lr=0.5)
    environment = {"AST_EPOCHS": "8", "AST_BATCH_SIZE": "32", "PATH": "x", "NOT_AST_EPOCHS": "5"}
    found, given_by = cifar.resolve(cell, ["--epochs", "9"], environment)
    assert (found.epochs, found.batch_size, found.lr, found.target_activation) == (9, 32, 0.5, 0.4)
    assert given_by == {"epochs": "--epochs", "batch_size": "AST_BATCH_SIZE", "lr": "settings cell"}
    assert (cell.epochs, cell.batch_size) == (7, 16)


@pytest.mark.parametrize(
    "name,text,value",
    [
        ("target_activation", "0.25", 0.25),
        ("epochs", "12", 12),
        ("epochs", "auto", None),
        ("epochs", "none", None),
        ("data", "some/path", "some/path"),
        ("compare", "none", "none"),
        ("seeds", "0,1,2", "0,1,2"),
        ("lr", "1e-3", 1e-3),
        ("out", "there", "there"),
        ("time_limit", "30", 30.0),
    ],
)
def test_flags_and_variables_are_read_alike(cifar, name, text, value):
    plain_settings = cifar.Settings()
    by_flag, _ = cifar.resolve(plain_settings, [cifar.flag(name), text], {})
    by_variable, _ = cifar.resolve(plain_settings, [], {"AST_" + name.upper(): text})
    assert getattr(by_flag, name) == getattr(by_variable, name) == value
    assert by_flag == by_variable == replace(plain_settings, **{name: value})


def test_switches_have_a_no(cifar):
    assert not cifar.resolve(cifar.Settings(), ["--no-feedforward"], {})[0].feedforward
    assert cifar.resolve(cifar.Settings(), ["--resume"], {})[0].resume
    assert not cifar.resolve(cifar.Settings(), ["--no-resume"], {"AST_RESUME": "1"})[0].resume
    for text, value in [("1", True), ("true", True), ("YES", True), ("0", False), ("No", False)]:
        assert cifar.resolve(cifar.Settings(), [], {"AST_RESUME": text})[0].resume is value


@pytest.mark.parametrize(
    "arguments,environment,told",
    [
        (["--epoch", "3"], {}, "--epoch"),
        (["--epochz", "3"], {}, "--epochz.*--epochs"),
        (["3"], {}, "3"),
        (["--epochs"], {}, "--epochs"),
        (["--resume=yes"], {}, "--resume"),
        ([], {"AST_EPOCH": "3"}, "AST_EPOCH=3.*AST_EPOCHS"),
        ([], {"AST_epochs": "3"}, "AST_epochs=3.*AST_EPOCHS"),
        ([], {"AST_": "3"}, "AST_=3"),
        ([], {"AST_RESUME": "maybe"}, "AST_RESUME.*maybe"),
        ([], {"AST_EPOCHS": "0"}, "AST_EPOCHS.*0"),
        ([], {"AST_EPOCHS": "ten"}, "AST_EPOCHS.*ten"),
        (["--epochs", "0"], {}, "--epochs 0"),
        (["--epochs", "1.5"], {}, r"--epochs 1\.5"),
        (["--batch-size", "0"], {}, "--batch-size 0"),
        (["--target-activation", "0"], {}, "--target-activation 0"),
        (["--target-activation", "1.01"], {}, r"--target-activation 1\.01"),
        (["--target-activation", "nan"], {}, "--target-activation nan"),
        (["--lr", "inf"], {}, "--lr inf"),
        (["--gate", "proxi"], {}, "--gate proxi"),
        (["--model", "resnet50"], {}, "--model resnet50"),
        (["--compare", "full,ast"], {}, "--compare full,ast"),
        (["--seeds", "0,,1"], {}, "--seeds 0,,1"),
        (["--seeds", "-1"], {}, "--seeds -1"),
        (["--device", "tpu"], {}, "--device tpu"),
        (["--amp", "fp8"], {}, "--amp fp8"),
        (["--train-size", "-5"], {}, "--train-size -5"),
        (["--time-limit", "-1"], {}, "--time-limit -1"),
        (["--score-scale", "2"], {}, "--score-scale 2"),
    ],
)
def test_what_cannot_be_is_refused_with_the_value(cifar, arguments, environment, told):
    with pytest.raises(cifar.BadInput, match=told) as refusal:
        cifar.resolve(cifar.Settings(), arguments, environment)
    assert "\n" not in str(refusal.value)


def test_a_bad_value_in_the_settings_cell_is_refused(cifar):
    with pytest.raises(cifar.BadInput, match=r"target_activation = 1\.5: expected"):
        cifar.resolve(replace(cifar.Settings(), target_activation=1.5), [], {})


def test_the_same_seed_twice_is_refused_or_run_once(cifar):
    with contextlib.suppress(cifar.BadInput):
        found, _ = cifar.resolve(cifar.Settings(), ["--seeds", "0,1,0"], {})
        made = cifar.Run(replace(found, out="unused"), print, [], cifar.Controls())
        assert len(set(made.seeds)) == len(made.seeds)


NAMES = ["data", "data_dir", "train_size", "model", "epochs", "batch_size", "lr", "seeds", "gate", "compare"]
NAMES += ["target_activation", "warmup_epochs", "significance", "device", "amp", "out", "time_limit"]
TEXTS = st.one_of(
    st.text(max_size=30),
    st.integers().map(str),
    st.floats().map(str),
    st.from_regex(r"-?-?[a-z0-9,.=-]{0,8}", fullmatch=True),
)


@given(data=st.data(), text=TEXTS, joined=st.booleans())
@settings(deadline=None, max_examples=300)
def test_any_text_for_any_flag_resolves_or_is_refused_in_one_line(cifar, data, text, joined):
    name = data.draw(st.sampled_from([item.name for item in fields(cifar.Settings)]))
    assume(text not in ("-h", "--help"))
    arguments = [f"{cifar.flag(name)}={text}"] if joined else [cifar.flag(name), text]
    try:
        found, _ = cifar.resolve(cifar.Settings(), arguments, {})
    except cifar.BadInput as refusal:
        assert len(str(refusal).splitlines()) == 1
    else:
        others = asdict(cifar.Settings()).items() - {(name, getattr(cifar.Settings(), name))}
        assert {(n, v) for n, v in asdict(found).items() if n != name} == set(others)


@given(name=st.one_of(st.sampled_from(NAMES).map(str.upper), st.text(max_size=12)), text=TEXTS)
@settings(deadline=None, max_examples=300)
def test_any_text_for_any_variable_resolves_or_is_refused_in_one_line(cifar, name, text):
    try:
        found, given_by = cifar.resolve(cifar.Settings(), [], {f"AST_{name}": text})
    except cifar.BadInput as refusal:
        assert len(str(refusal).splitlines()) == 1
    else:
        assert list(given_by.values()) == [f"AST_{name}"]
        assert isinstance(found, cifar.Settings)
