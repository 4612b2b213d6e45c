"""What a run is said to have cost: seconds, FLOPs, joules and unit energy, by phase."""

import contextlib
import copy
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import cifar10_ast as ast


def test_every_second_and_joule_goes_to_one_phase_only(monkeypatch):
    clock = SimpleNamespace(now=100.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(ast, "time", clock)
    ledger = ast.Ledger(SimpleNamespace(joules=lambda: 7.0 * clock.now))
    ledger.switch("warmup")
    clock.now += 1
    with ledger.charge("scoring"):
        clock.now += 2
        with pytest.raises(KeyError), ledger.charge("evaluation"):
            clock.now += 4
            raise KeyError
        with ledger.charge(None):
            clock.now += 100
        clock.now += 8
    clock.now += 16
    assert ledger.switch(None) == "warmup"
    clock.now += 1000
    ledger.switch("sparse")
    clock.now += 32
    total = ledger.total()
    assert (total.seconds, total.joules) == (63, 7.0 * 63), "the open phase counts up to now"
    seconds = {name: cost.seconds for name, cost in ledger.costs.items() if cost.seconds}
    assert seconds == {"warmup": 17, "scoring": 10, "evaluation": 4, "sparse": 32}
    assert {n: ledger.costs[n].joules for n in seconds} == {n: 7.0 * s for n, s in seconds.items()}
    assert ledger.costs["anneal"].joules is None


def test_unit_energy_is_ten_for_the_activated_and_a_tenth_for_the_skipped():
    cost = ast.Cost(candidates=1000, activated=100)
    assert cost.unit_energy == pytest.approx(100 * 10.0 + 900 * 0.1)
    assert ast.unit_saved(cost) == pytest.approx(100 * (1 - 1090 / 10_000))
    assert ast.unit_saved(ast.Cost()) == 0.0


COUNTS = st.integers(0, 10**9)
JOULES = st.none() | st.floats(0, 1e9)
COSTS = st.builds(ast.Cost, st.floats(0, 1e6), COUNTS, COUNTS, flops=st.floats(0, 1e18), joules=JOULES)


@given(costs=st.lists(COSTS, min_size=len(ast.PHASES), max_size=len(ast.PHASES)))
@settings(deadline=None, max_examples=40)
def test_a_ledger_comes_back_from_its_state_and_totals_add_up(costs):
    ledger, other = (ast.Ledger(SimpleNamespace(joules=lambda: None)) for _ in range(2))
    ledger.costs = dict(zip(ast.PHASES, costs, strict=True))
    other.load_state_dict(ledger.state_dict())
    assert other.costs == ledger.costs
    total, known = other.total(), [cost.joules for cost in costs if cost.joules is not None]
    for name in ("seconds", "candidates", "activated", "flops"):
        assert getattr(total, name) == pytest.approx(sum(getattr(cost, name) for cost in costs))
    assert total.joules == (pytest.approx(sum(known)) if known else None)


CONVOLUTIONS = [(32, 3, 32), (16, 32, 64), (8, 64, 128)]  # side, channels in and out
LAYERS = [2 * side * side * outputs * inputs * 9 for side, inputs, outputs in CONVOLUTIONS]
LAYERS += [2 * 2048 * 256, 2 * 256 * 10]


def count(model, images, training):
    flops, uncounted, _ = ast.flops_per_sample(model, images, training, contextlib.nullcontext)
    return flops, set(uncounted)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_flops_of_simple_cnn_are_what_a_hand_counts(batch):
    """Training is three forward passes, less the gradient of the images."""
    model, images = ast.simple_cnn(10), torch.zeros(batch, 3, 32, 32)
    forward, uncounted = count(model, images, training=False)
    assert forward == pytest.approx(sum(LAYERS), rel=0.01)
    assert {"relu", "max_pool2d_with_indices"} <= uncounted
    assert not {"convolution", "addmm", "mm"} & uncounted
    training, uncounted = count(model, images, training=True)
    assert training == pytest.approx(3 * sum(LAYERS) - LAYERS[0], rel=0.01)
    assert "threshold_backward" in uncounted


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_attention_is_counted_in_full(training, dropout):
    tokens, width, hidden, classes = 8, 16, 32, 3
    encoder = nn.TransformerEncoderLayer(width, 2, hidden, dropout, batch_first=True)
    model = nn.Sequential(encoder, nn.AvgPool2d((tokens, 1)), nn.Flatten(), nn.Linear(width, classes))
    projection, attention = 2 * tokens * width * 3 * width, 2 * (2 * tokens * tokens * width)
    rest = 2 * tokens * width * width + 2 * (2 * tokens * width * hidden) + 2 * width * classes
    forward = projection + attention + rest
    flops, uncounted = count(model.train(training), torch.zeros(2, tokens, width), training)
    assert flops == pytest.approx(3 * forward - projection if training else forward, rel=0.01)
    assert not [name for name in uncounted if "attention" in name or name == "_transformer_encoder_layer_fwd"]


@pytest.mark.parametrize("training", [False, True])
def test_counting_leaves_model_mode_generators_and_switches_as_they_were(training):
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(), nn.Flatten(), nn.Linear(48, 2))
    model[0].eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    count(model, torch.ones(2, 3, 4, 4), training)
    with pytest.raises(RuntimeError):
        count(model, torch.ones(2, 3, 5, 5), training)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == [True, False, True, True, True]
    assert all(p.grad is None for p in model.parameters())
    assert torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


class NVMLError(Exception):
    """As pynvml's."""


def failing(*_):
    raise NVMLError("Not Supported")


@pytest.fixture
def nvml(monkeypatch):
    """A stub of pynvml for two GPUs with a counter."""
    module = ModuleType("pynvml")
    module.counter = {"handle 0": 5_000_000, "handle 1": 100}  # mJ
    module.NVMLError = NVMLError
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetHandleByIndex = lambda index: f"handle {index}"
    module.nvmlDeviceGetTotalEnergyConsumption = lambda handle: module.counter[handle]
    module.nvmlDeviceGetPowerUsage = failing
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module


def unavailable(meter):
    """The reason, after asserting that no number is given."""
    assert (meter.joules(), meter.method) == (None, "unavailable")
    assert meter.reason and "\n" not in meter.reason
    return meter.reason


def test_the_counter_is_read_in_millijoules_since_the_start(nvml):
    meter = ast.EnergyMeter(torch.device("cuda:0"))
    assert (meter.method, meter.joules()) == ("nvml-counter", 0)
    nvml.counter["handle 0"] += 12_345
    nvml.counter["handle 1"] += 99_999_999
    assert meter.joules() == pytest.approx(12.345)


@pytest.mark.parametrize("broken", ["Init", "DeviceGetHandleByIndex", "DeviceGetTotalEnergyConsumption"])
def test_a_sensor_that_does_not_start_is_unavailable_with_the_reason(nvml, broken):
    setattr(nvml, "nvml" + broken, failing)
    assert "Not Supported" in unavailable(ast.EnergyMeter(torch.device("cuda:0")))


@pytest.mark.parametrize("device,reason", [("cuda:0", "pynvml"), ("cpu", "cpu")])
def test_without_pynvml_or_a_gpu_joules_are_unavailable(monkeypatch, device, reason):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert reason in unavailable(ast.EnergyMeter(torch.device(device)))


@pytest.mark.parametrize("lasts", [True, False])
def test_results_add_up_what_was_spent_and_give_no_joules_of_a_counter_that_failed(nvml, monkeypatch, lasts):
    readings = iter(range(0, 10**9 if lasts else 8000, 1000))
    nvml.nvmlDeviceGetTotalEnergyConsumption = lambda handle: next(readings, None) or failing()
    next(readings)
    meter = ast.EnergyMeter(torch.device("cuda:0"))
    monkeypatch.setattr(ast, "energy_meter", lambda device: meter)
    arrays = torch.rand(64, 4), torch.arange(64) % 2
    config = {"device": "cpu", "amp": "off", "batch_size": 16, "anneal_epochs": 0}
    trainer = ast.AdaptiveSparseTrainer(nn.Linear(4, 2), arrays, arrays, config, listeners=[])
    results = trainer.train(epochs=3)
    phases, training = results["phases"], 2 * (2 * 4 * 2)
    assert tuple(phases) == ast.PHASES
    for name in ("seconds", "candidates", "activated", "flops", "unit_energy"):
        assert results[name] == pytest.approx(sum(phase[name] for phase in phases.values()))
    trained = [phases[name]["seconds"] for name in ("warmup", "ramp", "sparse", "anneal", "scoring")]
    assert results["train_seconds"] == pytest.approx(sum(trained))
    assert results["flops_per_sample"] == {"training": training, "evaluation": training / 2}
    assert phases["sparse"]["flops"] == phases["sparse"]["activated"] * training
    assert phases["evaluation"]["flops"] == 3 * 64 * training / 2
    assert phases["scoring"]["joules"] is None, "never 0 for what was not measured"
    joules = sum(phase["joules"] or 0 for phase in phases.values())
    assert joules > 0
    assert results["joules"] == (joules if lasts else None)
    assert results["joules_method"].startswith("nvml-counter" if lasts else "unavailable (NVMLError: Not")
