"""One step: what is not finite, what does not fit into memory, the precision, and the device."""

import contextlib
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cifar10_ast as ast

CPU = torch.device("cpu")


def a_batch(size, seed=0):
    random = torch.Generator().manual_seed(seed)
    images, weights = torch.randn(size, 6, generator=random), torch.rand(size, generator=random) + 0.5
    return ast.Batch(torch.arange(size), weights, images, torch.arange(size) % 3, torch.arange(0))


def cross_entropy(logits, labels):
    return F.cross_entropy(logits, labels, reduction="none")


def take_step(model, optimizer, batch, scaler=None, criterion=cross_entropy):
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    judge = partial(ast.significance, kind="loss")
    return ast.train_step(model, optimizer, scaler, batch, criterion, judge, contextlib.nullcontext)


def two_layers():
    """With the same weights each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


class Norm(nn.BatchNorm1d):
    """Takes in infinity where it is told to, as a norm does whose activations are huge, not infinite."""

    poisoned = False

    def forward(self, x):
        if self.poisoned:
            self.running_var.fill_(math.inf)
        return super().forward(x)


SGD = partial(torch.optim.SGD, lr=0.1)
OPTIMIZERS = {
    "sgd fused": partial(SGD, momentum=0.9, nesterov=True, weight_decay=0.01, fused=True),
    "sgd fused, no momentum": partial(SGD, fused=True),
    "sgd": partial(SGD, momentum=0.9),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01),
    "adam": partial(torch.optim.Adam, lr=0.01),
    "adamw fused": partial(torch.optim.AdamW, lr=0.01, fused=True),
}


def learner(name, scaled):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), Norm(8), nn.ReLU(), nn.Linear(8, 3))
    model[3].bias.requires_grad_(False)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=4.0)
    return model, OPTIMIZERS[name](model.parameters()), scaler


def infinite_gradient(logits, labels):
    """The same losses, with a gradient of 0 · ∞."""
    return cross_entropy(logits, labels) + (0 * logits).abs().sqrt().sum(1)


def spoiled_step(what, model, optimizer, scaler):
    """A step on a batch that goes wrong as `what` says."""
    batch = a_batch(16, seed=99)
    if what == "a loss":
        batch.images[3] = math.nan
    model[1].poisoned = what == "a buffer"
    criterion = infinite_gradient if what == "a gradient" else cross_entropy
    found = take_step(model, optimizer, batch, scaler, criterion)
    model[1].poisoned = False
    return found


def everything(model, optimizer):
    """Weights, floating-point buffers and optimiser state; a state not yet made counts as zeros."""
    found = {f"weight {n}": p.detach().clone() for n, p in model.named_parameters()}
    found |= {f"buffer {n}": b.clone() for n, b in model.named_buffers() if b.is_floating_point()}
    for n, p in model.named_parameters():
        kept = {k: v for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor) and v.any()}
        found |= {f"{key} {n}": value.clone() for key, value in kept.items()}
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaler"])
@pytest.mark.parametrize("good_before", [0, 2], ids=["first-step", "third-step"])
@pytest.mark.parametrize("what", ["a loss", "a gradient", "a buffer"])
def test_a_step_where_something_is_not_finite_is_as_if_never_taken(name, scaled, good_before, what):
    model, optimizer, scaler = ours = learner(name, scaled)
    twin, frozen = learner(name, scaled), model[3].bias.clone()
    # Uninitialised memory is mostly zeros in a young process, which would hide its use.
    junk = [torch.full(p.shape, math.nan) for p in model.parameters() for _ in range(8)]
    del junk
    for seed in range(good_before):
        for learns, steps, scales in (ours, twin):
            assert take_step(learns, steps, a_batch(16, seed), scales)[2]
    before = everything(model, optimizer)
    losses, scores, taken = spoiled_step(what, *ours)
    assert not taken
    assert torch.equal(scores.isfinite(), losses.isfinite())
    torch.testing.assert_close(everything(model, optimizer), before, rtol=0, atol=0)
    assert scaler.get_scale() == (2 if scaled and what != "a buffer" else 4 if scaled else 1)
    for learns, steps, scales in (ours, twin):
        assert take_step(learns, steps, a_batch(16, 7), scales)[2]
    torch.testing.assert_close(everything(model, optimizer), everything(*twin[:2]))
    assert torch.equal(model[3].bias, frozen)


def test_a_sample_whose_loss_is_not_finite_has_no_score():
    model, batch, spoil = two_layers(), a_batch(8), torch.ones(8)
    raw = cross_entropy(model(batch.images), batch.labels).detach()
    spoil[2], spoil[5] = math.nan, math.inf
    options = {"criterion": lambda logits, labels: spoil * cross_entropy(logits, labels)}
    _, scores, taken = take_step(model, SGD(model.parameters()), batch, **options)
    assert not taken
    torch.testing.assert_close(scores, torch.where(spoil.isfinite(), raw, math.nan), equal_nan=True)


def train(images, model=None, **config):
    """The trainer after three epochs, its results, and its notices but those of waiting for data."""
    model, told, labels = model or two_layers(), [], images[:, :3].nan_to_num().argmax(1)
    listeners = [lambda event, data: told.append(data["text"]) if event == "notice" else None]
    config = {"device": "cpu", "amp": "off", "batch_size": 32, "anneal_epochs": 0, "lr": 0.02} | config
    data = images, labels
    trainer = ast.AdaptiveSparseTrainer(model, data, data, config, listeners=listeners)
    return trainer, trainer.train(epochs=3), [text for text in told if "waited for data" not in text]


@pytest.mark.parametrize("gate", ["remembered", "live"])
def test_samples_that_are_not_finite_reach_neither_weights_nor_what_the_gate_knows(generator, gate):
    images = torch.randn(320, 6, generator=generator)
    images[5], images[77] = math.nan, math.inf
    trainer, results, notices = train(images, gate=gate, ramp_epochs=0)
    assert results["final_accuracy"] > 60, "by chance it would be a third"
    assert all(value.isfinite().all() for value in (*trainer.model.parameters(), trainer.gate.scores))
    assert len(trainer.gate.scores)
    assert any("steps not taken" in text for text in notices)
    with pytest.raises(ast.BadInput, match="lower the learning rate"):
        train(torch.full((64, 6), math.nan), gate=gate)


class Cramped(nn.Module):
    """A network on a device that holds at most `room` samples of it at a time."""

    def __init__(self, body, room, error):
        super().__init__()
        self.body, self.room, self.error = body, room, error

    def forward(self, x):
        if len(x) > self.room:
            raise self.error
        return self.body(x)


def test_a_step_has_the_losses_scores_and_gradients_of_its_weighted_batch():
    plain, model, batch = two_layers(), two_layers(), a_batch(31)
    expected = cross_entropy(plain(batch.images), batch.labels)
    (expected * batch.weights).mean().backward()
    losses, scores, taken = take_step(model, SGD(model.parameters()), batch)
    assert taken
    torch.testing.assert_close(losses, expected.detach())
    torch.testing.assert_close(scores, expected.detach())
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
        torch.testing.assert_close(ours, theirs - 0.1 * theirs.grad)


FULL = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate 9")]


@pytest.mark.parametrize("gate,room", [("remembered", 16), ("live", 16), ("remembered", 32)])
@pytest.mark.parametrize("error", [*FULL, RuntimeError("mat1 and mat2")], ids=str)
def test_memory_that_ends_is_told_in_a_sentence_and_another_error_is_none_of_it(generator, gate, room, error):
    """In a step, in scoring, and in evaluation, whose batches are larger."""
    model, images = Cramped(two_layers(), room, error), torch.randn(320, 6, generator=generator)
    expected = ast.BadInput if error in FULL else RuntimeError
    with pytest.raises(expected, match="halve --batch-size" if error in FULL else "mat1 and mat2"):
        train(images, model, gate=gate)


def test_evaluating_gives_every_module_its_own_flag_back():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2).eval(), nn.Dropout())
    with pytest.raises(KeyError), ast.evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        raise KeyError
    assert [module.training for module in model.modules()] == [True, True, False, True]
    assert torch.is_grad_enabled()


CPUINFO = [("flags\t: avx512f avx512_bf16 amx_tile", True), ("flags\t: fpu amx_bf16\n", True)]
CPUINFO += [("flags\t: fpu notavx512_bf16x\n", False), ("Features\t: asimd bf16\n", False), (None, False)]


@pytest.mark.parametrize("text,expected", CPUINFO)
def test_bf16_on_a_cpu_is_read_from_what_the_processor_reports(tmp_path, monkeypatch, text, expected):
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    has = ast.cpu_has_bf16(tmp_path / "cpuinfo")
    assert has is expected
    monkeypatch.setattr(ast, "cpu_has_bf16", lambda: has)
    assert ast.pick_dtype("auto", CPU) is (torch.bfloat16 if expected else None)
    assert (ast.pick_dtype("off", CPU), ast.pick_dtype("bf16", CPU)) == (None, torch.bfloat16)


@pytest.mark.parametrize("generation,expected", [(6, None), (7, torch.float16), (8, torch.bfloat16)])
def test_precision_on_a_gpu_is_what_it_computes_with_by_itself(monkeypatch, generation, expected):
    def supported(including_emulation=True):
        return including_emulation or generation >= 8

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (generation, 0))
    cuda = torch.device("cuda", 0)
    assert ast.pick_dtype("auto", cuda) is expected
    assert (ast.pick_dtype("fp16", cuda), ast.pick_dtype("off", cuda)) == (torch.float16, None)


@pytest.mark.parametrize("asked", ["auto", "cuda", "cuda:0"])
def test_a_gpu_is_taken_where_an_operation_works_on_it_and_else_refused_with_the_way_out(monkeypatch, asked):
    def fail(*size, device):
        raise RuntimeError(
            "CUDA error: no kernel image is available for execution on the device\nCUDA kernel"
        )

    monkeypatch.setattr(torch, "zeros", lambda *size, device: torch.ones(1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla P100")
    assert ast.pick_device(asked).type == "cuda"
    monkeypatch.setattr(torch, "zeros", fail)
    with pytest.raises(ast.BadInput, match=rf"^--device {asked}: .*P100.*no kernel image.*--device cpu$"):
        ast.pick_device(asked)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ast.pick_device("cpu") == ast.pick_device("auto") == CPU
