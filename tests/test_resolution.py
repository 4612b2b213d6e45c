"""Sparse in pixels: small views first, whole ones at the end and in every evaluation, and what they cost."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import cifar10_ast as ast

EPOCHS, N = 10, 64
AT = ("", " at 16 pixels", " at 20 pixels", " at 24 pixels", " at 28 pixels")
SIDES = [16, 20, 20, 24, 24, 28, 28, 32, 32, 32]


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )


def trainer(gate="remembered", **config):
    torch.manual_seed(1)
    arrays = torch.rand(N, 3, 32, 32), torch.arange(N) % 2
    config = {"epochs": EPOCHS, "device": "cpu", "amp": "off", "batch_size": 16, "gate": gate} | config
    return ast.AdaptiveSparseTrainer(small_net(), arrays, arrays, config, listeners=[])


@given(epochs=st.integers(1, 300))
def test_sides_rise_from_half_to_whole_and_stay(epochs):
    schedule = ast.Schedule.of(ast.ASTConfig(resolution="progressive"), epochs)
    sides = [schedule.side(epoch) for epoch in range(epochs)]
    assert sides == sorted(sides) and sides[-1] == 1
    assert epochs < 2 or sides[0] == 0.5
    assert epochs < 10 or 0.2 < sides.count(1) / epochs <= 0.3
    assert {ast.Schedule.of(ast.ASTConfig(), epochs).side(epoch) for epoch in range(epochs)} == {1}


@pytest.mark.parametrize("gate", ast.GATES)
def test_flops_are_counted_at_the_side_that_was_seen(gate):
    results = trainer(gate, resolution="progressive").train()
    assert [row["resolution"] for row in results["epochs"]] == SIDES
    per, phases = results["flops_per_sample"], results["phases"]
    assert per["training at 16 pixels"] < per["training at 28 pixels"] < per["training"]
    assert per.keys() == {f"{mode}{at}" for mode in ("training", "evaluation") for at in AT}
    modes = [f"training at {row['resolution']} pixels" for row in results["epochs"][:7]] + 3 * ["training"]
    spent = sum(row["activated"] * per[mode] for row, mode in zip(results["epochs"], modes, strict=True))
    assert sum(phases[phase]["flops"] for phase in ast.STEPS) == pytest.approx(spent)
    assert phases["evaluation"]["flops"] == pytest.approx(EPOCHS * N * per["evaluation"])
    assert (phases["scoring"]["flops"] > 0) == (gate == "live")


def test_a_lone_sample_at_a_new_side_is_no_obstacle():
    run = trainer(resolution="progressive", target_activation=0.01, batch_size=2)
    run.model.insert(3, nn.BatchNorm1d(4))
    assert run.train()["complete"]


def test_a_run_goes_on_at_the_side_where_it_was():
    states, whole = [], trainer(resolution="progressive")
    whole.save = lambda: states.append(ast.state_of(whole))
    results = whole.train()
    again = trainer(resolution="progressive")
    ast.restore(again, states[3])
    assert [row["resolution"] for row in again.train()["epochs"]] == SIDES
    assert results["flops_per_sample"].keys() == again.flops.keys()


def test_views_that_are_no_pictures_and_models_that_count_pixels_are_refused(tmp_path):
    arrays = torch.rand(N, 6), torch.arange(N) % 2
    run = ast.AdaptiveSparseTrainer(
        nn.Linear(6, 2), arrays, arrays, {"resolution": "progressive"}, listeners=[]
    )
    with pytest.raises(ast.BadInput, match=r"expected \[B, C, H, W\] for progressive resolution; use full"):
        run.train(epochs=2)
    settings = ast.Settings(data="shapes", train_size=40, resolution="progressive", out=str(tmp_path / "out"))
    with pytest.raises(ast.BadInput, match=r"--resolution progressive: expected full for simple_cnn, whose"):
        ast.run(settings, listeners=[], say=lambda line: None)
    assert not list(tmp_path.iterdir())


def test_only_models_whose_views_may_be_smaller_are_taken(imagenet):
    data, asked = ast.shapes(40, 20), {"resolution": "progressive"}
    for model, can in (("resnet18", True), ("vit_b_16", False)):
        settings = imagenet.Settings(image_size=32, weights="none", model=model, **asked)
        if can:
            assert imagenet.fitted(imagenet.fill_defaults(settings), data).resolution == "progressive"
            continue
        with pytest.raises(imagenet.BadInput, match=f"expected full for {model}"):
            imagenet.fitted(imagenet.fill_defaults(settings), data)


@given(rates=st.lists(st.floats(0.05, 1), min_size=8, max_size=60), progressive=st.booleans())
def test_who_is_cut_to_asts_cost_costs_as_much_to_half_an_epoch(rates, progressive):
    config = ast.ASTConfig(epochs=len(rates), resolution="progressive" if progressive else "full")
    cost = ast.work(config, rates)
    for policy in ("short", "dense-short"):
        cut, repeated = ast.rival(policy, config, [], rates)
        assert (cut.gate, repeated) == ("full", None)
        assert cut.resolution == ("full" if policy == "short" else config.resolution)
        assert abs(ast.work(cut, [1.0] * cut.epochs) - cost) <= 0.6 or cut.epochs == 1
    dense, _ = ast.rival("dense", config, [], rates)
    assert (dense.gate, dense.epochs, dense.resolution) == ("full", len(rates), config.resolution)
    assert ast.rival("full", config, [], rates)[0].resolution == "full"
    assert ast.rival("random", config, [], rates)[1] == rates


def test_from_files_a_smaller_side_is_decoded_and_shows_the_same_part(imagenet, tmp_path):
    picture = np.linspace(0, 255, 160 * 120 * 3).reshape(120, 160, 3).astype(np.uint8)
    imagenet.Image.fromarray(picture).save(tmp_path / "a.jpg")
    photos = imagenet.Photos(tmp_path, ["a.jpg"])
    settings = imagenet.Settings(image_size=64, batch_size=1, workers=1, device="cpu")
    asked = [(torch.tensor([0]), torch.ones(1))]
    views = {}
    for side in (1.0, 0.5):
        source = imagenet.CropSource(photos, np.zeros(1), settings, training=False)
        source.side = side
        (batch,) = source.stream(asked)
        views[side] = batch.images
    assert [list(view.shape[2:]) for view in views.values()] == [[64, 64], [32, 32]]
    shrunk = ast.shrunk(views[1.0], 0.5)
    assert float((shrunk - views[0.5]).abs().mean()) < 0.05 * float(views[1.0].std())


def test_the_report_tells_fewer_samples_and_fewer_pixels_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(ast, "build_model", lambda settings, data: small_net_of(len(data.classes)))
    settings = replace(
        ast.Settings(), data="shapes", train_size=80, model="resnet", epochs=4, resolution="progressive",
        compare="full,dense,dense-short", device="cpu", amp="off", batch_size=16, out=str(tmp_path / "out"),
    )  # fmt: skip
    said = []
    summary = ast.run(settings, listeners=[], say=said.append)
    (line,) = [line for line in said[-2].splitlines() if "less on each" in line]
    mine, full = summary["policies"]["ast"], summary["policies"]["full"]
    each = [sum(p["phases"][phase]["flops"] for phase in ast.STEPS) / p["activated"] for p in (mine, full)]
    assert line == f"  and spent {100 * (1 - each[0] / each[1]):.1f} % less on each, seeing less of it"
    assert all(len(line) <= 80 for line in said[-2].splitlines())


def small_net_of(classes):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, classes))


def test_the_side_is_drawn_where_it_changes_and_unit_energy_where_it_does_not(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        ast, "picture", lambda histories, panels, *rest: drawn.append((histories, panels)) or b""
    )
    rows = [
        {"target_activation": 1.0, "threshold": None, "resolution": side, "candidates": 40, "activated": 40,
         "epoch": number, "elapsed_seconds": float(number), "val_accuracy": 50.0}
        for number, side in enumerate((16, 24, 32), 1)
    ]  # fmt: skip
    result = {"policy": "ast", "seed": 0, "changes": []}
    for epochs in (rows, rows[2:]):
        ast.curves([result | {"epochs": epochs}], "", tmp_path / "curves.png")
    (((history,), panels), (_, usual)) = drawn
    assert panels[:5] == usual[:5] and (panels[5], usual[5]) == ("side", "energy")
    assert history.line("epochs", "resolution").tolist() == [[0, 1, 2, 3], [16, 16, 24, 32]]
