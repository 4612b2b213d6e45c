"""Histories and the pictures drawn of them: what a person sees while it trains, and afterwards."""

import asyncio
import io
import itertools
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from conftest import at
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import cifar10_ast as ast

N, CHUNK = 240, 12  # samples, and those of a decision: an epoch has 20
EPOCHS = 8  # 1 warm-up, 2 ramp, 4 sparse, 1 anneal
EVERY = (*ast.LIVE, "joules", "samples")  # panels of the dashboard
ORANGE, GREY, BLUE = "#d55e00", "#666666", "#0072b2"


def trained(listeners, gate="remembered", wishes=None):
    """The results of a training of `EPOCHS`; wishes: what to ask of the controls at which decision."""
    torch.manual_seed(0)
    model, x = torch.nn.Linear(12, 4), torch.randn(N + 60, 12)
    data = (x[:N], x[:N, :4].argmax(1)), (x[N:], x[N:, :4].argmax(1))
    config = {"batch_size": 16, "amp": "off", "device": "cpu", "target_activation": 0.3, "gate": gate}
    controls = ast.Controls()
    asking = [at("chunk", n, partial(controls.set, *wish)) for n, wish in (wishes or {}).items()]
    options = {"listeners": [*listeners, *asking], "controls": controls}
    return ast.AdaptiveSparseTrainer(model, *data, config, **options).train(EPOCHS)


def compared():
    """Three whole policies, all as accurate."""
    histories = ast.Histories()
    for policy in ("ast", "full", "random"):
        go_on(begin(policy, histories=histories), 80)
    return histories


def begin(policy="ast", epochs=4, seed=0, histories=None):
    """Histories, with a run that is about to offer its first samples."""
    histories = histories or ast.Histories()
    histories("start", {"policy": policy, "seed": seed, "epochs": epochs, "rows": [], "changes": []})
    return histories


def go_on(histories, decisions, rate=0.5, threshold=0.6, scores=None, accuracy=None, **more):
    """Tells of more decisions of the newest run, and of its epochs as they end; a run of 80 takes 20 s."""
    run = histories.runs[-1]
    for _ in range(decisions):
        done = run.now["candidates"] + CHUNK
        share = done / (run.epochs * N)
        data = {"candidates": (done - 1) % N + 1, "n": N, "phase": "sparse", "rate": rate, "offered": CHUNK}
        data |= {
            "activated": round(rate * CHUNK),
            "progress": share,
            "joules": None,
            "flops": 6e7 * run.now["activated"],
        }
        data |= {
            "seconds": 20 * share,
            "flops_per_sample": {"training": 6e7},
            "trained": run.now["activated"],
            "resolution": 32,
        }
        histories("chunk", data | {"gate": SimpleNamespace(threshold=threshold, scores=scores)} | more)
        if done % N == 0:
            row = {"epoch": done // N, "epochs": run.epochs, "seconds": 4.0}
            row["elapsed_seconds"] = 20 * share
            histories("epoch", row | {"val_accuracy": accuracy or 20 + 50 * share})
    return histories


def change(histories, words="target activation 0.1"):
    now = histories.runs[-1].now
    histories("control", {"epochs": now["epochs"], "seconds": now["seconds"], "words": words})


@pytest.fixture
def figures(monkeypatch):
    """The figures that were drawn."""
    found, draw = [], ast.png_of
    monkeypatch.setattr(ast, "png_of", lambda figure: found.append(figure) or draw(figure))
    return found


def axes_of(figures, histories, *panels):
    """The axes of some panels, drawn."""
    ast.picture(histories.runs, panels)
    return dict(zip(panels, figures[-1].axes, strict=True))


def assert_a_picture(png, most=100_000):
    """Not blank, of few colours, and small enough to send once a second."""
    image = Image.open(io.BytesIO(png))
    assert (image.format, image.mode) == ("PNG", "P") and len(png) <= most
    pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert np.ptp(pixels) > 128 and len(np.unique(pixels, axis=0)) > 10
    assert (pixels.min(1) < 200).mean() > 0.005, "almost all of it is paper"


def marks(axes):
    """Where lines stand that mark a change, and their colours."""
    found = [line for line in axes.lines if list(line.get_ydata()) == [0, 1] and not np.ptp(line.get_xdata())]
    return [line.get_xdata()[0] for line in found], [line.get_color() for line in found]


def settings_of(out, **changes):
    values = {"batch_size": 16, "epochs": 4, "lr": 0.005, "compare": "none", "device": "cpu", "amp": "off"}
    return ast.Settings(**values | {"out": str(out)} | changes)


def run(out, listeners, controls=None, **changes):
    data = ast.shapes(N, 40)
    return ast.run(settings_of(out, **changes), (), list(listeners), controls, lambda line: None, data)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(5, 400), st.integers(0, 6), st.integers(0, 2**32 - 1))
def test_a_history_keeps_few_points_and_exact_totals(epochs, size, turns, seed):
    rng, n = np.random.default_rng(seed), 800
    history = ast.History("ast", 0, epochs, [], [])
    at, targets = sorted(rng.integers(0, epochs * n, turns)), rng.random(turns + 1)
    offered = activated = 0
    for epoch, start in itertools.product(range(epochs), range(0, n, size)):
        more = min(size, n - start)
        taken, rate = int(rng.integers(0, more + 1)), targets[np.searchsorted(at, offered, side="right")]
        offered, activated = offered + more, activated + taken
        data = {"candidates": start + more, "n": n, "phase": "sparse", "rate": rate, "offered": more}
        data |= {"activated": taken, "gate": None, "progress": 0.5, "seconds": 1.0, "joules": None}
        history.decided(data | {"flops_per_sample": {}, "flops": 0.0, "trained": 0, "resolution": None})
        if start + more == n:
            history.ended({"epoch": epoch + 1, "elapsed_seconds": 1.0, "seconds": 1.0, "val_accuracy": 5.0})
    assert (history.now["candidates"], history.now["activated"]) == (offered, activated)
    x, rates = history.line("epochs", "rate")
    assert min(epochs * math.ceil(n / size), ast.POINTS) // 2 <= len(x) <= ast.POINTS + turns + epochs + 2
    assert (np.diff(x) >= 0).all() and x[-1] == epochs
    assert ((rates >= 0) & (rates <= 1)).all()


@pytest.mark.parametrize("gate", ["remembered", "live", "random", "full"])
def test_a_history_agrees_with_the_trainers_own_books(gate):
    histories = ast.Histories()
    results = trained([histories], gate)
    history, now = histories.runs[0], histories.runs[0].now
    assert all(now[name] == results[name] for name in ("candidates", "activated"))
    assert 1e3 * now["energy"] == pytest.approx(results["unit_energy"])
    assert 1e3 * now["thousand samples"] == results["activated"]
    spent = results["flops"] - results["phases"]["evaluation"]["flops"]
    assert 1e12 * now["flops"] == pytest.approx(spent, rel=1e-9)
    assert 1e12 * now["flops_of_all"] == pytest.approx(EPOCHS * N * results["flops_per_sample"]["training"])
    assert bool(history.line("epochs", "threshold").size) == (gate in ast.SCORED)


def test_a_history_of_results_tells_what_the_events_told():
    histories = ast.Histories()
    results = trained([histories], wishes={70: ("target_activation", 0.15)})
    seen, rows = histories.runs[0], results["epochs"]
    after = ast.History("ast", 0, EPOCHS, rows, results["changes"])
    for x in ("epochs", "seconds", "thousand samples", ast.LINES["compute"][1]):
        assert np.array_equal(after.line(x, "accuracy"), seen.line(x, "accuracy"))
    assert after.line(ast.LINES["compute"][1], "accuracy")[0, -1] == pytest.approx(1e-12 * results["flops"])
    for name in ("candidates", "activated", "epochs", "seconds", "energy"):
        assert after.now[name] == seen.now[name]
    assert list(after.line("epochs", "rate")[1][1:]) == [row["activation_rate"] for row in rows]
    assert after.changes == seen.changes and len(seen.changes) == 1
    assert 0.15 in seen.line("epochs", "target")[1]


def assert_progress(seen):
    shares, _ = zip(*seen, strict=True)
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(shares))
    assert shares[-1] == pytest.approx(1) and len({round(share, 2) for share in shares}) > 20
    assert all(left is None or left >= -1e-6 for _, left in seen)


def test_progress_only_grows_and_ends_at_one_resumed_or_not(small_nets, tmp_path):
    histories, resumed, seen, controls = ast.Histories(), ast.Histories(), [], ast.Controls()
    plan = {"seeds": "0,1", "compare": "full,short"}
    run(tmp_path / "whole", [histories, lambda *event: seen.append(histories.outlook())], **plan)
    assert_progress(seen)
    runs = [(seed, policy) for seed in (0, 1) for policy in ("ast", "full", "short")]
    assert [(history.seed, history.policy) for history in histories.runs] == runs

    def stop(event, data):
        if event == "epoch" and (data["policy"], data["epoch"]) == ("full", 2):
            controls.ask_stop("enough")

    assert not run(tmp_path / "cut", [stop], controls, **plan)["complete"]
    seen = []
    watch = [resumed, lambda *event: seen.append(resumed.outlook())]
    assert run(tmp_path / "cut", watch, resume=True, **plan)["complete"]
    assert_progress(seen)
    before, again = (h.line("epochs", "accuracy") for h in (histories.runs[1], resumed.runs[0]))
    assert np.array_equal(before, again)


def test_the_time_to_go_is_what_is_left_at_this_pace():
    histories = ast.Histories()
    assert histories.outlook() == (0, None)
    work, left = {"ast": (4, 100.0), "full": (4, 300.0)}, [("ast", 1), ("full", 1)]
    histories("plan", {"work": work, "left": left, "synthetic": False})
    go_on(begin(histories=histories, seed=1), 10)  # an eighth of the first, in 2.5 seconds
    assert histories.outlook() == (pytest.approx(12.5 / 400), None), "too early to tell"
    go_on(histories, 30)
    share, left = histories.outlook()
    assert share == pytest.approx(50 / 400) and left == pytest.approx(350 * 10 / 50)


USUAL = torch.from_numpy(np.random.default_rng(0).exponential(0.7, 2000)).float()
ODD = {  # what a gate may say of itself
    "no θ": {"threshold": None, "scores": USUAL},
    "θ above all ranks": {"threshold": 1.7, "scores": USUAL},
    "some scores NaN": {"scores": torch.where(USUAL < 0.2, math.nan, USUAL)},
    "all scores NaN": {"scores": torch.full((50,), math.nan)},
    "tiny scores": {"scores": USUAL * 1e-30},
    "scores all zero": {"scores": torch.zeros(50)},
    "scores all equal": {"scores": torch.full((50,), 2.3)},
    "joules": {"joules": 1234.5},
    "dearer than all": {"rate": 0.9, "flops": 2e12},
}


def staged(stage):
    """Histories at a stage of a run that a person may see."""
    if stage in ("nothing", "compared"):
        return ast.Histories() if stage == "nothing" else compared()
    histories = begin(epochs=1 if stage == "one epoch" else 4)
    if stage in ODD:
        go_on(histories, 35, **ODD[stage])
    elif stage == "many changes":
        for number in range(40):
            change(go_on(histories, 1), f"target {0.1 + number / 50:.2f}")
    elif stage == "$ome_{$":
        change(begin(stage, histories=histories), stage)
        go_on(histories, 10)
    else:
        go_on(histories, {"begun": 0, "one decision": 1, "one epoch": 20}[stage])
    return histories


STAGES = ["nothing", "begun", "one decision", "one epoch", "compared", "many changes", "$ome_{$", *ODD]


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_of_a_run_has_a_small_picture_with_no_word_cut_off(figures, stage):
    assert_a_picture(ast.live_picture(staged(stage)))
    (figure,) = figures
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    for box in boxes:
        assert min(box.x0, box.y0) >= -3, "pixels"
        assert box.x1 <= figure.bbox.x1 + 3 and box.y1 <= figure.bbox.y1 + 3
    assert not [1 for one, other in itertools.combinations(boxes, 2) if one.overlaps(other)]


def test_a_policy_has_one_colour_everywhere_and_the_first_lies_on_top(figures):
    for panels in (EVERY, ast.CURVES):
        axes = axes_of(figures, compared(), *panels)
        for name in set(panels) & set(ast.LINES) - {"joules"}:
            colours = [line.get_color() for line in axes[name].lines if line.get_linestyle() != ":"]
            assert colours == [BLUE, GREY, ORANGE], name
        named = {text.get_text(): text.get_color() for text in axes["accuracy"].texts}
        assert named == {"ast": ORANGE, "full": GREY, "random": BLUE}


def test_of_several_seeds_the_last_ones_runs_are_drawn(figures):
    histories = go_on(begin(seed=1, histories=compared()), 40)
    (line,) = axes_of(figures, histories, "accuracy")["accuracy"].lines
    assert line.get_xdata().tolist() == [5, 10]


@pytest.mark.parametrize("epochs", [1, 2, 7])
def test_axes_end_where_the_run_ends_and_count_whole_epochs(figures, epochs):
    axes = axes_of(figures, go_on(begin(epochs=epochs), 20 * epochs, scores=USUAL), *ast.CURVES)
    for name in ("rate", "threshold", "energy"):
        assert axes[name].get_xlim() == (0, epochs)
        assert all(tick == int(tick) for tick in axes[name].get_xticks())
    assert epochs == 1 or axes["accuracy"].get_xlim() == (0, 20), "seconds"


@settings(max_examples=8, deadline=None)
@given(st.lists(st.floats(0, 100), min_size=2, max_size=4))
def test_names_at_the_ends_never_overlap_and_keep_their_order(accuracies):
    histories = ast.Histories()
    for policy, accuracy in zip(("ast", "full", "random", "short"), accuracies, strict=False):
        go_on(begin(policy, 2, histories=histories), 40, accuracy=accuracy + 1)
    figure = matplotlib.figure.Figure(figsize=(9.8, 4.8))
    ast.draw_panels(figure, histories.runs, ast.LIVE)
    ast.png_of(figure)
    axes = figure.axes[0]
    boxes = {text.get_text(): text.get_window_extent() for text in axes.texts}
    ends = sorted((h.line("seconds", "accuracy")[1, -1], h.policy) for h in histories.runs)
    for (_, lower), (_, upper) in itertools.pairwise(ends):
        assert boxes[lower].y1 <= boxes[upper].y0 + 1
    assert all(axes.bbox.y0 - 12 <= box.y0 and box.y1 <= axes.bbox.y1 + 12 for box in boxes.values())


def test_a_change_is_marked_where_it_happened(figures):
    histories = ast.Histories()
    wishes = {50: ("target_activation", 0.15), 100: ("learning_rate_factor", 0.5)}
    at = [change["seconds"] for change in trained([histories], wishes=wishes)["changes"]]
    axes = axes_of(figures, histories, *ast.CURVES)
    for name in ("rate", "threshold", "energy"):
        assert marks(axes[name]) == ([50 / 20, 100 / 20], [ORANGE] * 2)
    assert marks(axes["accuracy"])[0] == at and 0 < at[0] < at[1]
    assert marks(axes["samples"]) == marks(axes["compute"]) == ([], [])
    words = [text.get_text() for text in axes["rate"].texts]
    assert words == ["target activation 0.15", "learning rate factor 0.5"]


def test_all_changes_are_marked_in_their_policys_colour_and_names_do_not_overlap(figures):
    histories = staged("many changes")
    change(go_on(begin("full", histories=histories), 30))
    axes = axes_of(figures, histories, *ast.CURVES)["rate"]
    at, colours = marks(axes)
    assert len(at) == 41 and colours.count(GREY) == 1 and at[colours.index(GREY)] == 1.5
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) > 1 and not [1 for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]


@pytest.mark.parametrize("epochs", [1, 3])
def test_the_curves_of_a_stopped_run_end_with_it_and_no_word_leaves_its_panel(tmp_path, figures, epochs):
    whole = trained([])
    stop = {"words": "stop stop button", "epochs": epochs + 0.9, "seconds": whole["total_seconds"]}
    cut = whole | {"epochs": whole["epochs"][:epochs], "changes": [stop]}
    none, other = cut | {"policy": "full", "epochs": []}, cut | {"policy": "random", "seed": 1}
    ast.curves([cut, none, other], "stopped early", tmp_path / "curves.png")
    axes = dict(zip(ast.CURVES, figures[0].axes, strict=True))
    assert [text.get_text() for text in axes["accuracy"].texts] == ["ast"], "of the first seed"
    assert axes["rate"].get_xlim() == (0, epochs)
    assert all(text.get_window_extent().x1 <= axes["rate"].bbox.x1 + 1 for text in axes["rate"].texts)


@pytest.mark.parametrize("synthetic", [True, False])
def test_pictures_of_drawn_images_say_so_in_their_titles(small_nets, tmp_path, figures, synthetic):
    data = replace(ast.shapes(N, 40), synthetic=synthetic, name="mine")
    asyncio.run(ast.run_live(settings_of(tmp_path, epochs=2), data))
    titles = [figure.get_suptitle() for figure in figures]
    assert len(titles) == 2 and any(title.startswith("simple_cnn on mine") for title in titles)
    assert all(("synthetic images" in title.lower()) == synthetic for title in titles)
    for name in ("curves.png", "dashboard.png"):
        assert_a_picture((tmp_path / name).read_bytes(), 300_000)
