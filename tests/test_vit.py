"""Vision transformers: attention that computes what it keeps, and patches that a training step leaves out."""

import contextlib
import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

import cifar10_ast as ast

N, EPOCHS = 48, 8
RULES = ("chance", "significance", "sample")
CONFIG = ast.SparseAttentionConfig(d_model=16, n_heads=2, local_window_size=32, topk_ratio=0.1)


def tiny_vit(classes=2):
    torch.manual_seed(0)
    return ast.ViT(classes, 8, 2, 32, 4, 0, F.scaled_dot_product_attention)


def images_of(count, side=32, seed=0):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def trainer(rule="chance", keep=0.5, model=None, **config):
    arrays = images_of(N), torch.arange(N) % 2
    config = {"epochs": EPOCHS, "device": "cpu", "amp": "off", "batch_size": 12, "lr": 1e-3} | config
    settings = ast.Settings(keep_tokens=keep, keep_by=rule, **config)
    torch.manual_seed(1)
    return ast.AdaptiveSparseTrainer(model or tiny_vit(), arrays, arrays, settings, listeners=[])


# --- sparse attention ---


def kept_mask(config, q, k):
    """Which keys [B, heads, N, N] a query keeps, told token by token."""
    n, first = q.shape[2], config.n_global_tokens + (q.shape[2] - config.n_global_tokens) % ast.BLOCK
    blocks = [x[:, :, first:].flatten(0, 1).unflatten(1, (-1, ast.BLOCK)) for x in (q, k)]
    mask = torch.zeros(*q.shape[:2], n, n, dtype=torch.bool)
    mask[:, :, :first], mask[:, :, :, :first] = True, True
    for row, queries in zip(mask.flatten(0, 1), ast.kept_blocks(*blocks, config), strict=True):
        for query, keys in enumerate(queries.tolist()):
            for key in keys:
                at = [slice(first + ast.BLOCK * b, first + ast.BLOCK * (b + 1)) for b in (query, key)]
                row[tuple(at)] = True
    return mask


@pytest.mark.parametrize("tokens", [16, 64, 65, 203, 256, 640])
def test_sparse_attention_is_dense_attention_on_the_keys_that_it_keeps(tokens):
    torch.manual_seed(tokens)
    ours = [torch.randn(2, 2, tokens + 4, 8, requires_grad=True) for _ in range(3)]
    theirs = [x.detach().clone().requires_grad_() for x in ours]
    mask, weight = kept_mask(CONFIG, *ours[:2]), torch.randn(2, 2, tokens + 4, 8)
    found = ast.sparse_attention(CONFIG, *ours)
    dense = F.scaled_dot_product_attention(*theirs, attn_mask=mask)
    torch.testing.assert_close(found, dense)
    for out in (found, dense):
        (out * weight).sum().backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad)
    assert mask.all() == (tokens < 64)


def test_a_query_keeps_its_window_and_the_best_of_the_rest():
    torch.manual_seed(0)
    q, k = torch.randn(2, 6, 32, 16, 8)
    kept, means = ast.kept_blocks(q, k, CONFIG), (q.mean(2), k.mean(2))
    assert kept.shape == (6, 32, 3 + 3)  # the window, and a tenth of the other 29
    for head, block in ((0, 0), (3, 10), (5, 31)):
        near = {min(max(block - 1, 0), 29) + i for i in range(3)}
        score = means[1][head] @ means[0][head, block]
        rest = sorted(set(range(32)) - near, key=lambda other, score=score: -score[other])
        assert {*kept[head, block].tolist()} == near | {*rest[:3]}


def test_what_is_not_kept_is_not_computed():
    def flops(attend):
        x = torch.randn(1, 2, 1024 + 4, 8, requires_grad=True)
        with ast.nn.attention.sdpa_kernel(ast.nn.attention.SDPBackend.MATH), ast.FlopCount() as counter:
            attend(x, x, x).sum().backward()
        return counter.get_total_flops()

    share = kept_mask(CONFIG, *torch.randn(2, 1, 1, 1028, 8)).float().mean()
    ratio = flops(lambda *x: ast.sparse_attention(CONFIG, *x)) / flops(F.scaled_dot_product_attention)
    assert share < 0.2 and share < ratio < share + 0.02  # and the scores of blocks


def test_the_original_reports_call_makes_a_classifier():
    config = ast.SparseAttentionConfig(
        d_model=192, n_heads=4, local_window_size=32, topk_ratio=0.1, n_global_tokens=4
    )
    model = ast.SparseViT(img_size=32, patch_size=4, num_classes=10, sparse_config=config)
    named = ast.bare_model("sparse_vit", 10, 32)
    assert {k: v.shape for k, v in named.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    assert model(images_of(2)).shape == (2, 10)
    assert ast.SparseViT(64, 4, 3)(images_of(2, 64)).shape == (2, 3)


# --- the model ---


@pytest.mark.parametrize("model", [ast.vit, lambda classes: ast.SparseViT(num_classes=classes)])
@pytest.mark.parametrize("side", [16, 20, 24, 28, 32, 48])
def test_a_transformer_takes_every_side(model, side):
    model = model(10)
    for training in (True, False):
        model.train(training).kept_shares = (0.5,)
        assert model(images_of(2, side)).shape == (2, 10)
    small = F.interpolate(images_of(1), side, mode="bilinear")
    assert (model(small) - model(images_of(1))).abs().max() < 2  # the same picture, nearly the same answer


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shares", [(0.5,), (0.25, 0.5, 0.625, 1.0)])
def test_a_step_sees_the_chosen_patches_alone_and_evaluation_all(rule, shares, monkeypatch):
    model, images = tiny_vit(), images_of(9)
    model.kept_shares, model.keep_by = shares, rule
    drawn = []
    choose = model.chosen
    monkeypatch.setattr(model, "chosen", lambda *which: drawn.append(choose(*which)) or drawn[-1])
    logits = model(images)
    parts = [part for part, share in zip(images.tensor_split(len(shares)), shares, strict=True) if share < 1]
    hidden = images.clone()
    for patches in drawn:
        assert (patches.diff(dim=1) > 0).all() and patches.min() >= 0 and patches.max() < 64
    start = 0
    for part, patches in zip(parts, drawn, strict=True):
        seen = torch.zeros(len(part), 64).scatter(1, patches, 1.0).view(-1, 1, 8, 8)
        seen = F.interpolate(seen, scale_factor=4).bool()
        hidden[start : start + len(part)] = torch.where(seen, part, torch.nan)
        start += len(part)
    again = iter(drawn[:])
    monkeypatch.setattr(model, "chosen", lambda *which: next(again))
    torch.testing.assert_close(model(hidden), logits)
    assert [len(patches[0]) for patches in drawn] == [int(64 * share) for share in shares if share < 1]
    model.eval()
    torch.testing.assert_close(model(images), tiny_vit()(images))


def test_significance_prefers_patches_that_vary_and_chance_none():
    model, images = tiny_vit(), images_of(400)
    images[:, :, :16] *= 0.05
    for rule, low, high in (("chance", 0.45, 0.55), ("sample", 0.45, 0.55), ("significance", 0.01, 0.3)):
        model.keep_by = rule
        chosen = model.chosen(images, 0.25)
        assert low < (chosen < 32).float().mean() < high
        assert not torch.equal(chosen, model.chosen(images, 0.25))


# --- how many of each sample ---


@given(
    u=st.lists(st.floats(0, 1), min_size=1, max_size=100),
    keep=st.floats(0.2, 0.95),
    temperature=st.floats(0.05, 1),
)
def test_shares_follow_the_ranks_and_come_to_keep_on_average(u, keep, temperature):
    u = torch.tensor(u)
    shares, order = ast.shares_by_rank(u, keep, temperature)
    assert sorted(order.tolist()) == [*range(len(u))]
    assert (u[order].diff() > -1e-6).all()
    assert all(0 < share <= 1 and 8 * share == int(8 * share) for share in shares)
    mean = sum(len(p) * s for p, s in zip(order.tensor_split(len(shares)), shares, strict=True)) / len(u)
    assert abs(mean - keep) <= 0.07 if len(u) > 8 else abs(mean - keep) < 0.3
    assert shares[0] <= shares[-1] + 1 / 8  # rounding


def test_hard_samples_keep_more():
    shares, _ = ast.shares_by_rank(torch.rand(64), 0.5, 0.25)
    assert len(shares) == 4 and shares[0] <= 0.25 and shares[-1] >= 0.75 and sum(shares) == 2
    assert ast.shares_by_rank(torch.full((64,), 0.5), 0.5, 0.25)[0] == (0.5,) * 4


# --- the trainer ---


@pytest.mark.parametrize(
    ("rule", "gate"),
    [*((rule, "remembered") for rule in RULES), ("sample", "live"), ("chance", "random"), ("chance", "full")],
)
def test_flops_are_those_of_the_tokens_that_went_through(rule, gate):
    run, spent, tokens = trainer(rule, gate=gate, resolution="progressive"), [], []
    counts = {}

    def through(blocks, inputs, output):
        if counting or not run.model.training:
            return
        tokens.append((run.epoch, len(inputs[0]), inputs[0].shape[1]))

    counting = []
    original = ast.flops_per_sample

    def quiet(*how):
        counting.append(1)
        try:
            return original(*how)
        finally:
            counting.pop()

    run.model.blocks.register_forward_hook(through)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ast, "flops_per_sample", quiet)
        results = run.train()
    model = tiny_vit()
    for epoch, count, kept in tokens:
        side = results["epochs"][epoch]["resolution"]
        if (side, kept) not in counts:
            model.kept_shares = (kept / (side // 4) ** 2,)
            counts[side, kept] = original(model, images_of(2, side), True, contextlib.nullcontext)[0]
        spent.append(count * counts[side, kept])
    phases = results["phases"]
    assert sum(phases[phase]["flops"] for phase in ast.STEPS) == pytest.approx(sum(spent))
    assert phases["evaluation"]["flops"] == EPOCHS * N * results["flops_per_sample"]["evaluation"]
    for epoch, row in enumerate(results["epochs"]):
        seen = [(count, kept / (row["resolution"] // 4) ** 2) for at, count, kept in tokens if at == epoch]
        mean = sum(count * share for count, share in seen) / sum(count for count, _ in seen)
        assert mean == pytest.approx(1.0 if row["phase"] == "anneal" else 0.5, abs=0.05)
        if rule == "sample" and row["phase"] == "sparse" and gate == "remembered":
            assert len({share for _, share in seen}) > 1


@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_run_keeps_the_same_patches(rule):
    states, whole = [], trainer(rule)
    whole.save = lambda: states.append(ast.copy.deepcopy(ast.state_of(whole)))
    whole.train()
    assert not torch.equal(states[3]["model"]["positions"], whole.model.positions)
    again = trainer(rule)
    torch.rand(7)  # another process has drawn otherwise
    ast.restore(again, states[3])
    again.train()
    for mine, other in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert whole.ledger.total().flops == again.ledger.total().flops


@pytest.mark.parametrize("amp", ["bf16", "off"])
def test_it_learns_under_autocast_on_a_share_of_the_patches(amp):
    run = trainer("sample", amp=amp, target_activation=0.7, epochs=12, batch_size=8)
    images = torch.randn(N, 3, 32, 32) + (torch.arange(N) % 2)[:, None, None, None]
    run.train_source.images = run.val_source.images = images
    assert run.train()["final_accuracy"] > 90


def test_beside_kept_patches_full_runs_see_all():
    results = trainer("sample").compare(("full", "random", "dense", "keep-short"))
    per = {p: r["phases"]["warmup"]["flops"] or r["phases"]["sparse"]["flops"] for p, r in results.items()}
    whole = N * results["full"]["flops_per_sample"]["training"]
    assert per["full"] == pytest.approx(whole) and results["random"]["flops"] == pytest.approx(
        results["ast"]["flops"], rel=0.1
    )
    assert all(per[policy] < 0.55 * whole for policy in ("ast", "random", "dense"))
    assert "training on 0.5 of the patches" not in results["full"]["flops_per_sample"]


@given(
    rates=st.lists(st.floats(0.05, 1), min_size=8, max_size=60),
    keep=st.floats(0.1, 1),
    resolution=st.sampled_from(ast.RESOLUTIONS),
)
def test_who_is_cut_to_asts_cost_costs_as_much_with_its_patches(rates, keep, resolution):
    config = ast.ASTConfig.of(ast.Settings(epochs=len(rates), resolution=resolution, keep_tokens=keep))
    cost = ast.work(config, rates)
    for policy, kept, side in (
        ("short", 1, "full"), ("dense-short", keep, resolution), ("keep-short", keep, "full")
    ):  # fmt: skip
        cut, repeated = ast.rival(policy, config, [], rates)
        assert (cut.gate, repeated, cut.keep_tokens, cut.resolution) == ("full", None, kept, side)
        assert abs(ast.work(cut, [1.0] * cut.epochs) - cost) <= 0.8 or cut.epochs == 1
    assert (
        ast.rival("keep-short", replace(config, keep_by="sample"), [], rates)[0].keep_by == "chance"
        or keep == 1
    )
    assert ast.rival("full", config, [], rates)[0].keep_tokens == 1
    for policy in ("random", "dense", "ast"):
        assert ast.rival(policy, config, [], rates)[0].keep_tokens == keep
    assert config.keep_tokens == keep and config.resolution == resolution


@pytest.mark.parametrize("model", ["simple_cnn", "resnet"])
def test_a_model_that_has_no_patches_is_refused_before_anything_is_written(model, tmp_path):
    told = r"--keep-tokens 0.5: expected 1, as this model takes whole images; change either"
    settings = ast.Settings(
        data="shapes", train_size=40, model=model, keep_tokens=0.5, out=str(tmp_path / "out")
    )
    with pytest.raises(ast.BadInput, match=told):
        ast.run(settings, listeners=[], say=lambda line: None)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ast.BadInput, match=told):
        trainer(model=ast.nn.Linear(2, 2))


def test_a_run_writes_what_it_kept_and_the_lesson_shows_it(tmp_path, monkeypatch):
    monkeypatch.setattr(ast, "vit", tiny_vit)
    shown, said = [], []
    monkeypatch.setattr(ast, "show_images", shown.append)
    settings = ast.Settings(
        data="shapes", train_size=200, model="vit", keep_tokens=0.5, keep_by="sample", epochs=3,
        compare="full,keep-short", device="cpu", amp="off", batch_size=20, out=str(tmp_path / "out"),
    )  # fmt: skip
    summary = ast.run(settings, listeners=[], say=said.append)
    assert summary["complete"] and {"ast", "full", "keep-short"} == summary["policies"].keys()
    kept = summary["policies"]["ast"]["flops_per_sample"]
    assert any("of the patches" in mode for mode in kept)
    assert all(len(line) <= 80 for line in said[-2].splitlines())
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["policies"]
    data = ast.shapes(200)
    ast.show_kept(replace(settings, device="cpu"), data)
    (rows,) = shown
    grey = [(images == 128).all(-1).mean() for images, _, _ in rows.values()]
    assert grey[0] < 0.4 and grey[1] > 0.6  # the hardest keep more
    assert [len(images) for images, _, _ in rows.values()] == [10, 10]


def test_without_kept_tokens_the_lesson_says_how(capsys):
    ast.show_kept(ast.Settings(), None)
    assert "--keep-tokens 0.5" in capsys.readouterr().out


def test_epochs_of_other_patches_are_no_reason_to_doubt_the_clock():
    rows = [
        {"target_activation": 1.0, "resolution": 32, "seconds": seconds, "kept": kept}
        for seconds, kept in ((9, 0.5), (5, 0.5), (10, 1.0), (10.5, 1.0))
    ]
    result = {"policy": "ast", "seed": 0, "epochs": rows, "complete": True, "train_seconds": 30.0}
    result["phases"] = {"scoring": {"seconds": 0.0}}
    assert ast.doubt([result]) is None
    rows[-1]["seconds"] = 20
    assert "equal epochs" in ast.doubt([result])
