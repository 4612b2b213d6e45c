"""Holding the activation rate: the controller, the schedule, the learning rate, and the method's settings."""

import itertools
import math
import sys
from dataclasses import replace
from statistics import mean

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gate import PURE_PI, TARGETS, drive, taught

import cifar10_ast as ast

sys.path.insert(0, str(ROOT / "benchmarks"))
import controller as bench


def rates_of(gate, n, epochs, target, generator, lose=0.0):
    """The rate delivered in each chunk, a twentieth of an epoch, where a fraction `lose` of it is lost."""
    loss = torch.rand(n, generator=generator)
    chosen = drive(gate, n, epochs, target, generator, lambda indices: loss[indices], lose)
    return [float((~lost).sum()) / (n / 20) for _, lost in chosen]


@settings(deadline=None, max_examples=15)
@given(target=TARGETS, seed=st.integers(0, 1000))
def test_every_epoch_meets_its_target_and_undisturbed_the_feedback_stays_zero(target, seed):
    gate = ast.RememberedGate(ast.ASTConfig(), 4000)
    rates = rates_of(gate, 4000, 3, target, torch.Generator().manual_seed(seed))
    for epoch in range(3):
        assert mean(rates[20 * epoch : 20 * epoch + 20]) == pytest.approx(target, abs=0.001)
    state = gate.controller.state(target)
    assert (state["ema"], state["p"], state["i"]) == (target, 0, 0)
    assert gate.threshold == state["feedforward"]


@pytest.mark.parametrize("before,after", [(0.4, 0.1), (0.1, 0.4)])
def test_a_step_of_the_target_takes_hold_at_the_next_chunk_without_overshoot(generator, before, after):
    gate = ast.RememberedGate(ast.ASTConfig(), 8000)
    rates = rates_of(gate, 8000, 17, lambda chunk: before if chunk < 310 else after, generator)
    assert rates[300:] == pytest.approx([before] * 10 + [after] * 30, abs=0.01)


@pytest.mark.parametrize("target", [0.1, 0.4])
@pytest.mark.parametrize("ema_alpha", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("balance", [False, True])
def test_feedback_restores_the_rate_where_samples_are_lost(generator, target, ema_alpha, balance):
    config, labels = ast.ASTConfig(ema_alpha=ema_alpha), torch.arange(10_000) % 7 // 3
    gate = ast.BalancedGate(config, 10_000, labels) if balance else ast.RememberedGate(config, 10_000)
    rates = rates_of(gate, 10_000, 8, target, generator, lose=0.1)
    assert mean(rates[-80:]) == pytest.approx(target, abs=0.01)
    assert gate.threshold < gate.controller.state(target)["feedforward"]


@pytest.mark.parametrize("target", [0.05, 0.1, 0.4, 0.8])
def test_the_pure_loop_with_the_documented_gains_finds_its_target(generator, target):
    gate = taught(torch.rand(4000, generator=generator), **PURE_PI)
    rates = rates_of(gate, 4000, 4, target, generator)
    assert abs(rates[0] - target) > 0.02
    for epoch in (2, 3):
        assert mean(rates[20 * epoch : 20 * epoch + 20]) == pytest.approx(target, abs=0.01)


def test_the_gains_of_the_original_reports_hardly_move_the_rate(generator):
    gate = taught(torch.rand(4000, generator=generator), feedforward=False)
    assert mean(rates_of(gate, 4000, 10, 0.1, generator)[-20:]) > 0.3


def test_the_integral_does_not_wind_up_while_the_threshold_is_at_its_stop():
    controller = ast.Controller(ast.ASTConfig(feedforward=False, adapt_ki=0.5))
    for activated, target, chunks in ((0, 0.9, 200), (100, 0.1, 40)):
        for _ in range(chunks):
            controller.threshold(0.5, -1.0)
            controller.update(activated, 100, target, exact=False)
    assert controller.threshold(0.5, -1.0) > 0.5


@pytest.mark.parametrize("target", [0.1, 0.9])
def test_the_feedback_asks_for_no_more_than_there_is(target):
    controller = ast.Controller(ast.ASTConfig())
    for _ in range(500):
        controller.update(0, 100, target, exact=True)
    state = controller.state(target)
    assert (state["ema"], state["i"]) == pytest.approx((0, 0.1))


@given(epochs=st.integers(1, 300), target=TARGETS)
@settings(deadline=None, max_examples=40)
def test_phases_follow_one_another_and_end_full(epochs, target):
    schedule = ast.Schedule.of(ast.ASTConfig(), epochs)
    phases = [schedule.phase(e) for e in range(epochs)]
    assert phases == sorted(phases, key=["warmup", "ramp", "sparse", "anneal"].index)
    assert phases[0] == "warmup"
    assert epochs == 1 or "sparse" in phases
    assert epochs < 4 or phases[-1] == "anneal"
    rates = [schedule.rate(e, target) for e in range(epochs)]
    before_anneal = rates[: epochs - phases.count("anneal")]
    assert before_anneal == sorted(before_anneal, reverse=True)
    for rate, phase in zip(rates, phases, strict=True):
        assert rate == {"warmup": 1, "sparse": target, "anneal": 1}.get(phase, rate)
        assert target <= rate <= 1


def phases_of(epochs, **chosen):
    schedule = ast.Schedule.of(ast.ASTConfig(**chosen), epochs)
    return " ".join(schedule.phase(e) for e in range(epochs))


def test_short_runs_drop_the_ramp_then_the_anneal_and_each_can_be_set_as_far_as_it_fits():
    short = ["warmup sparse", "warmup sparse sparse", "warmup ramp sparse anneal"]
    assert [phases_of(epochs) for epochs in (2, 3, 4)] == short
    chosen = {"warmup_epochs": 0, "ramp_epochs": 2, "anneal_epochs": 1}
    assert phases_of(5, **chosen) == "ramp ramp sparse sparse anneal"
    with pytest.raises(ast.BadInput, match="expected at most 5 epochs together"):
        phases_of(5, warmup_epochs=3, anneal_epochs=3)


def test_the_learning_rate_is_continuous_and_ends_at_zero():
    values = [ast.learning_rate_shape(i / 1000) for i in range(1001)]
    assert max(values) == pytest.approx(1)
    assert values[-1] == 0
    assert max(abs(a - b) for a, b in itertools.pairwise(values)) < 0.005


@given(target=TARGETS, chunk=st.integers(100, 900), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=25)
def test_the_rate_is_within_its_bound_after_any_number_of_chunks(target, chunk, seed):
    generator = torch.Generator().manual_seed(seed)
    gate = ast.RememberedGate(ast.ASTConfig(), 5000)
    gate.observe(torch.arange(5000), torch.rand(5000, generator=generator))
    taken = offered = 0
    for number, candidates in enumerate(torch.randperm(5000, generator=generator).split(chunk), 1):
        taken += len(gate.select(candidates, target, generator)[0])
        offered += len(candidates)
        assert abs(taken / offered - target) <= (1 + 0.001 * number) / offered + 1e-9


@pytest.mark.parametrize("alpha", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("gain", [0.5, 1.0, 1.5])
def test_the_linear_model_is_the_controller_of_the_program(alpha, gain):
    """A lasting disturbance of the rate, within the anti-windup's room: both fall back alike."""
    real, disturbance = ast.Controller(ast.ASTConfig(ema_alpha=alpha)), 0.02
    matrix, state = bench.loop(alpha, real.KP, real.KI, gain), np.zeros(3)
    drive = np.array([alpha * disturbance, real.KI * alpha * disturbance, 0.0])
    for _ in range(60):
        asked = real.threshold(0.5, -1.0) - 0.5  # the slope of -1 turns its sign
        real.update(round((0.4 - gain * asked - disturbance) * 10**6), 10**6, 0.4, exact=False)
        state = matrix @ state + drive
        assert (real.error, real.integral) == pytest.approx(tuple(state[:2]), abs=1e-4)
    assert abs(real.error) < 0.002


def test_the_loop_is_stable_as_far_as_the_formula_says():
    kp, ki = ast.Controller.KP, ast.Controller.KI
    for alpha in (0.1, 0.3, 1.0):
        bound = min((4 - 2 * alpha) / (alpha * (2 * kp + ki)), (2 - alpha) / (alpha * kp))
        assert bench.gain_limit(alpha, kp, ki, late=False) == pytest.approx(bound, rel=1e-3)
        assert 1 < bench.gain_limit(alpha, kp, ki, late=True) < bound


CANNOT_BE = [("target_activation", value) for value in (0, 1.4, math.nan, True)]
CANNOT_BE += [("gate", "best"), ("epochs", 0), ("epochs", 2.5), ("warmup_epochs", -1), ("batch_size", 0)]
CANNOT_BE += [("significance", "margin"), ("temperature", 0), ("guard", "yes"), ("ema_alpha", 0)]
CANNOT_BE += [("adapt_kp", -1), ("lr", 0), ("lr", math.inf), ("device", "tpu"), ("amp", "fp8")]


@pytest.mark.parametrize("field,value", CANNOT_BE)
def test_a_bad_value_is_refused_with_the_value_and_what_was_expected(field, value):
    with pytest.raises(ast.BadInput, match=rf"{field} {value}: expected"):
        ast.ASTConfig(**{field: value})


def test_config_takes_the_names_of_the_original_reports():
    config = ast.ASTConfig(target_activation_rate=0.3, learning_rate=0.01, use_amp=False)
    assert (config.target_activation, config.lr, config.amp) == (0.3, 0.01, "off")
    assert replace(config, epochs=3) == ast.ASTConfig(target_activation=0.3, lr=0.01, amp="off", epochs=3)
    for name, value, told in (
        ("target_activation_rate", 1.4, "activation 1.4"),
        ("learning_rate", 0, "lr 0"),
    ):
        with pytest.raises(ast.BadInput, match=f"{told}: expected"):
            ast.ASTConfig(**{name: value})


def test_a_dict_and_a_programs_settings_are_checked_and_copied():
    assert ast.ASTConfig.of(None) == ast.ASTConfig()
    assert ast.ASTConfig.of({"target_activation_rate": 0.3}) == ast.ASTConfig(target_activation=0.3)
    given = replace(ast.Settings(), target_activation=0.3, keep_tokens=0.5)
    found = ast.ASTConfig.of(given)
    assert found == given and found is not given and ast.ASTConfig.of(ast.ASTConfig()).keep_tokens == 1
    with pytest.raises(ast.BadInput, match="keep_tokens 2"):
        ast.ASTConfig.of(replace(given, keep_tokens=2.0))
    with pytest.raises(ast.BadInput, match="tarjet"):
        ast.ASTConfig.of({"tarjet": 0.4})
