"""The method: significance, its memory and guard, probabilities, selection, and the gates."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cifar10_ast as ast

TARGETS = st.floats(0.02, 0.98)
RANKS = st.lists(st.floats(0, 1), min_size=20, max_size=400).map(torch.tensor)
examples = settings(deadline=None, max_examples=40)


def drive(gate, n, epochs, target, generator, loss, lose=0.0):
    """Offers n samples in chunks of a twentieth and yields what is chosen of each, and which of that is lost;
    `target` is a function of the chunk's number, or constant, and `loss` one of the indices."""
    for epoch in range(epochs):
        for chunk, candidates in enumerate(torch.randperm(n, generator=generator).chunk(20), 20 * epoch):
            a = target(chunk) if callable(target) else target
            indices, weights = gate.select(candidates, a, generator)
            assert torch.equal(weights, torch.ones(len(indices.unique())))
            assert torch.isin(indices, candidates).all()
            lost = torch.rand(len(indices), generator=generator) < lose
            gate.observe(indices, torch.where(lost, math.nan, loss(indices)))
            yield indices, lost


def taught(loss, **config):
    """A gate that remembers these losses."""
    gate = ast.RememberedGate(ast.ASTConfig(**config), len(loss))
    gate.observe(torch.arange(len(loss)), loss)
    return gate


def counts(n, chosen):
    return torch.cat([indices for indices, _ in chosen]).bincount(minlength=n).float()


LOGITS = torch.tensor([[2.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
IMAGES = torch.stack([torch.zeros(4), torch.tensor([1.0, 3.0, 1.0, 3.0])])
P = [math.exp(x) / (math.exp(2) + 1 + math.exp(-1)) for x in (2, 0, -1)]
BY_HAND = {  # of label 0 and label 2
    "loss": [-math.log(P[0]), math.log(3)],
    "loss+entropy": [-0.7 * math.log(P[0]) - 0.3 * sum(p * math.log(p) for p in P), math.log(3)],
    "loss+intensity": [-0.7 * math.log(P[0]), 0.7 * math.log(3) + 0.3 * math.sqrt(4 / 3)],
    "gradient": [math.hypot(1 - P[0], P[1], P[2]), math.hypot(1 / 3, 1 / 3, 2 / 3)],
}


@pytest.mark.parametrize("kind", ast.SIGNIFICANCES)
def test_significance_is_what_a_hand_computes_without_gradient(kind):
    logits = LOGITS.clone().requires_grad_()
    value = ast.significance(logits, torch.tensor([0, 2]), IMAGES, kind)
    assert value.tolist() == pytest.approx(BY_HAND[kind])
    assert not value.requires_grad
    assert ast.significance(logits.bfloat16(), torch.tensor([0, 2]), IMAGES, kind).dtype is torch.float32


def test_memory_halves_old_and_new_and_ignores_what_is_not_finite():
    memory, indices = ast.Memory(3), torch.arange(3)
    memory.observe(indices, torch.tensor([4.0, math.nan, 1.0]), now=1.0)
    memory.observe(indices, torch.tensor([2.0, math.inf, 1.0]), now=2.0)
    assert memory.significance.tolist() == [3.0, math.inf, 1.0]
    assert memory.visited.tolist() == [2.0, 0.0, 2.0]


def test_unseen_samples_rank_highest_and_ties_share_a_rank():
    memory = ast.Memory(4)
    memory.observe(torch.tensor([0, 1, 2]), torch.tensor([1.0, 5.0, 5.0]), now=0.0)
    assert memory.rank(torch.arange(4)).tolist() == [0.125, 0.5, 0.5, 0.875]


def test_memory_takes_at_most_16_bytes_a_sample():
    state = ast.RememberedGate(ast.ASTConfig(), 1000).state_dict()
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor)]
    assert 4 * 1000 <= sum(t.numel() * t.element_size() for t in tensors) <= 16 * 1000


@pytest.mark.parametrize("guard", [True, False])
def test_the_guard_keeps_the_gate_from_living_on_what_never_gets_easier(generator, guard):
    n, wrong, visits = 2000, torch.arange(2000) < 200, torch.zeros(2000)
    gate = taught(torch.full((n,), 2.0), guard=guard)

    def loss(indices):
        visits[indices] += 1
        view = 1 + 0.2 * torch.randn(len(indices), generator=generator)
        return view * torch.where(wrong[indices], 3.0, 2 * 0.7 ** visits[indices])

    late = counts(n, list(drive(gate, n, 30, 0.2, generator, loss))[300:])
    share = late[wrong].sum() / late.sum()
    assert share < 0.14 if guard else share > 0.17, "a tenth is wrong, and chance would take a tenth"


def test_the_guard_lets_go_of_a_sample_whose_loss_falls():
    memory, hard = ast.Memory(100), torch.tensor([99])
    memory.observe(torch.arange(100), torch.linspace(0, 0.5, 100), now=0.0)
    for visit in range(1, 4):
        assert memory.rank(hard) > 0.9, f"not yet after {visit} visits"
        memory.observe(hard, torch.ones(1), now=float(visit))
    assert memory.rank(hard) == 0.5
    memory.observe(hard, torch.tensor([0.6]), now=4.0)
    assert memory.rank(hard) > 0.9, "it is still among the hardest, but was harder"


def test_the_guard_holds_within_easy_and_hard_classes_alike():
    memory, indices = ast.Memory(200), torch.arange(200)
    losses = torch.cat([torch.linspace(0, 0.1, 100), torch.linspace(1, 2, 100)])
    losses[[30, 130]] = 9.0
    for visit in range(4):
        memory.observe(indices, losses, now=float(visit))
    ranks = memory.rank(indices, labels=indices // 100)
    assert ranks[[30, 130]].tolist() == [0.5, 0.5]
    assert ranks[:30].max() < 0.31
    assert ranks[99] > 0.9, "the easy class fills its ranks, and what is right in it is not guarded"


@given(u=RANKS, target=TARGETS, temperature=st.sampled_from([0.01, 0.1, 0.5, 1.0]))
@examples
def test_the_solved_threshold_meets_the_count(u, target, temperature):
    theta = ast.solve_threshold(u, target * len(u), target, temperature)
    total = float(ast.activation_probability(u, theta, target, temperature).sum())
    assert total == pytest.approx(target * len(u), rel=1e-3, abs=1e-3)


@given(u=RANKS, target=TARGETS, theta=st.floats(-0.5, 1.5))
@examples
def test_probability_rises_with_rank_and_never_falls_below_the_floor(u, target, theta):
    p = ast.activation_probability(u.sort().values, theta, target, 0.3)
    assert (p.diff() >= -1e-6).all()  # a vector's tail is computed apart: the last bit may differ
    assert 0.25 * target - 1e-6 <= float(p.min()) <= float(p.max()) <= 1


@given(p=st.lists(st.floats(0, 1), max_size=300), phase=st.floats(0, 0.999), cut=st.integers(0, 300))
@examples
def test_selection_is_exact_without_duplicates_and_goes_on_where_it_stopped(p, phase, cut):
    p = torch.tensor(p)
    taken, _ = ast.systematic(p, phase)
    assert len(taken) == len(taken.unique())
    assert abs(len(taken) - float(p.double().sum())) < 1
    assert (p[taken] > 0).all()
    first, between = ast.systematic(p[:cut], phase)
    assert torch.equal(taken, torch.cat([first, cut + ast.systematic(p[cut:], between)[0]]))


def test_selection_takes_each_sample_with_its_probability():
    p = torch.tensor([0.1, 0.5, 0.9, 0.25, 1.0, 0.0])
    taken = torch.cat([ast.systematic(p, i / 1000)[0] for i in range(1000)])
    torch.testing.assert_close(taken.bincount(minlength=6) / 1000, p, atol=0.002, rtol=0)


@pytest.mark.parametrize("temperature,preference", [(0.05, 3), (0.5, 1.5)])
def test_the_gate_prefers_high_significance_but_visits_everything(generator, temperature, preference):
    n, loss = 2000, torch.linspace(0, 1, 2000)
    gate = taught(loss, temperature=temperature, guard=False)
    count = counts(n, drive(gate, n, 30, 0.2, generator, lambda indices: loss[indices]))
    assert count[-200:].mean() > preference * count[:200].mean()
    assert (count > 0).all()


def test_a_raised_target_does_not_fill_the_choice_with_what_has_waited(generator):
    n, loss = 2000, torch.linspace(0, 1, 2000)
    gate = taught(loss, temperature=0.05, guard=False)
    list(drive(gate, n, 15, 0.1, generator, lambda indices: loss[indices]))
    indices, _ = gate.select(torch.randperm(n, generator=generator), 0.4, generator)
    assert len(indices) == 0.4 * n
    assert (loss[indices] > 0.8).sum() > 0.5 * 400, "of the hardest fifth; by chance it would be 0.4"


def test_balance_activates_as_many_of_every_class_the_significant_first(generator):
    labels = torch.tensor([0] * 1600 + [1] * 300 + [2] * 100)[torch.randperm(2000, generator=generator)]
    gate = ast.BalancedGate(ast.ASTConfig(guard=False), 2000, labels)
    loss = torch.rand(2000, generator=generator)
    gate.observe(torch.arange(2000), loss)
    count = counts(2000, drive(gate, 2000, 30, 0.1, generator, lambda indices: loss[indices]))
    each = torch.stack([count[labels == label].sum() for label in range(3)])
    assert count.sum() == 30 * 200
    assert float(each.min()) > 0.7 * float(each.max()), "by chance it would be a sixteenth"
    common = labels == 0
    assert count[common & (loss > 0.8)].mean() > 2 * count[common & (loss < 0.2)].mean()


@pytest.mark.parametrize("labels", [None, torch.zeros(9), torch.zeros(10, 2), torch.arange(10) - 1])
def test_balance_refuses_labels_that_cannot_be_the_samples(labels):
    with pytest.raises(ast.BadInput, match="expected 10 of 0 or more"):
        ast.BalancedGate(ast.ASTConfig(), 10, labels if labels is None else labels.long())


def first_pixel(images, labels):
    return images[:, 0]


def views(scores, indices):
    """Candidates that `first_pixel` scores so."""
    images, labels = torch.as_tensor(scores)[:, None], torch.zeros(len(scores)).long()
    return ast.Batch(indices, torch.ones(len(scores)), images, labels, indices[:0])


def test_the_live_gate_holds_the_rate_on_a_drifting_stream_and_takes_the_hardest(generator):
    gate, taken = ast.LiveGate(ast.ASTConfig(gate="live"), first_pixel), []
    for chunk in range(400):
        scores = torch.rand(128, generator=generator) + 0.01 * chunk
        scores[:2] = torch.tensor([math.nan, math.inf])  # which are never chosen
        indices, weights = gate.select(views(scores, torch.arange(128)), 0.25, generator)
        assert (weights == 1).all()
        taken.append(len(indices))
        if chunk >= 50:
            hardest = 2 + scores[2:].topk(len(indices)).indices
            assert set(indices.tolist()) == set(hardest.tolist())
    assert sum(taken[50:]) / (350 * 128) == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_the_live_gate_takes_two_by_chance_where_no_score_is_finite(generator, score):
    gate, offered = ast.LiveGate(ast.ASTConfig(), first_pixel), views([score] * 10, torch.arange(10))
    chosen = {tuple(gate.select(offered, 0.3, generator)[0].tolist()) for _ in range(10)}
    assert {len(set(pair)) for pair in chosen} == {2}
    assert len(chosen) > 1
    assert not len(gate.scores)


@given(amounts=st.lists(st.integers(0, 500), min_size=1, max_size=6), chunks=st.integers(1, 30))
@examples
def test_random_realises_given_counts_exactly(amounts, chunks):
    generator, gate = torch.Generator().manual_seed(1), ast.RandomGate()
    for amount in amounts:
        order = torch.randperm(500, generator=generator)
        chosen = [gate.select(chunk, amount / 500, generator)[0] for chunk in order.chunk(chunks)]
        assert len(torch.cat(chosen).unique()) == sum(map(len, chosen)) == amount


PURE_PI = {"feedforward": False, "adapt_kp": 1.0, "adapt_ki": 0.5}
GATES = {
    "remembered": lambda: ast.RememberedGate(ast.ASTConfig(), 500),
    "balanced": lambda: ast.BalancedGate(ast.ASTConfig(), 500, torch.arange(500) % 7 // 3),
    "pure PI": lambda: ast.RememberedGate(ast.ASTConfig(**PURE_PI), 500),
    "live": lambda: ast.LiveGate(ast.ASTConfig(), first_pixel),
    "random": ast.RandomGate,
}


@pytest.mark.parametrize("name", GATES)
def test_a_gate_restored_from_its_state_goes_on_alike(name, tmp_path):
    def choices(gate, generator):
        for _ in range(10):
            candidates = torch.randperm(500, generator=generator)[:50]
            scores = torch.rand(50, generator=generator)
            offered = views(scores, candidates) if getattr(gate, "needs_views", False) else candidates
            indices, _ = gate.select(offered, 0.3, generator)
            losses = torch.rand(len(indices), generator=generator)
            gate.observe(indices, torch.where(losses > 0.9, math.nan, losses))
            yield indices.tolist()

    first, second, generator = GATES[name](), GATES[name](), torch.Generator().manual_seed(3)
    list(choices(first, generator))
    torch.save(first.state_dict(), tmp_path / "state")
    second.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    twin = torch.Generator().set_state(generator.get_state())
    assert list(choices(first, generator)) == list(choices(second, twin))
