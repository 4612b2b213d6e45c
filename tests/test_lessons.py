"""The lessons: what significance looks like, the controller to play with, and what a run chose."""

import functools
import io
import re
import warnings
from pathlib import Path

import IPython.display
import ipywidgets
import numpy as np
import pytest
from conftest import at, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_pictures import N, settings_of

import cifar10_ast as ast

pytestmark = pytest.mark.usefixtures("small_nets_throughout")
LONG = ["x" * 200, "Donaudampfschifffahrtsgesellschaft " * 4, "ca$h_{$ and \\frac", "猫"]
MANY = [f"class {i} of the very many that some people have" for i in range(120)]


@pytest.fixture
def shown(monkeypatch):
    """The PNGs that a notebook would show, as arrays [height, width, 3]."""
    found = []

    def show(thing):
        assert isinstance(thing, IPython.display.Image)
        found.append(np.asarray(Image.open(io.BytesIO(thing.data)).convert("RGB")))

    monkeypatch.setattr(IPython.display, "display", show)
    return found


RUNS = {  # name: decision at which it is stopped, classes, settings
    "finished": (0, None, {"compare": "full,random", "epochs": 6}),
    "live": (0, None, {"gate": "live"}),
    "long names": (0, LONG, {}),
    "many classes": (0, MANY, {}),
    "stopped": (65, None, {"compare": "full"}),
    "everything": (0, None, {"gate": "full"}),
    "one epoch": (0, None, {"epochs": 1}),
    "stopped at once": (1, None, {}),
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Gives the summary and the data of a run by its name."""

    @functools.cache
    def ran(name):
        stop_at, classes, changes = RUNS[name]
        controls, data = ast.Controls(), ast.shapes(N, 40)
        if classes:
            data.classes, data.train_labels = classes, np.arange(N) % len(classes)
            data.val_labels %= len(classes)
        stop = at("chunk", stop_at, lambda: controls.ask_stop("stop button"))
        out = tmp_path_factory.mktemp("ran") / "out"
        return ast.run(settings_of(out, **changes), (), [stop], controls, lambda line: None, data), data

    return ran


@pytest.mark.parametrize("changes", [{"gate": "full"}, {"gate": "live"}, {"batch_size": 1024, "lr": None}])
def test_significance_can_be_looked_at_under_any_settings(tmp_path, monkeypatch, changes):
    trains, data, shown = ast.fill_defaults(settings_of(tmp_path, **changes)), ast.shapes(N, 40), []
    monkeypatch.setattr(ast, "show_images", shown.append)
    ast.show_significance(trains, data, epochs=2)
    most, least = shown[0].values()
    scores = [[float(caption.split("\n")[1]) for caption in captions] for _, captions, _ in (most, least)]
    assert [len(row) for row in scores] == [10, 10]
    assert scores[0] == sorted(scores[0], reverse=True) and scores[1] == sorted(scores[1])
    assert scores[0][-1] > scores[1][-1] >= 0
    for row in (most, least):
        for image, caption, wrong in zip(*row, strict=True):
            (where,) = np.flatnonzero((data.train_images == image).all((1, 2, 3)))
            assert caption.split("\n")[0] == data.classes[data.train_labels[where]]
            assert wrong == (data.difficulty[where] == 2)


def test_a_lesson_before_the_run_changes_nothing_in_it(tmp_path, shown):
    for name in ("one", "other"):
        trains, data = settings_of(tmp_path / name, epochs=2), ast.shapes(N, 40)
        if name == "other":
            ast.show_significance(ast.fill_defaults(trains), data, epochs=1)
        ast.run(trains, (), [], None, lambda line: None, data)
    assert rows(tmp_path / "one", timed=False) == rows(tmp_path / "other", timed=False)


def rates(*given):
    """Of 40 chunks at 0.6, then of 60 at the new target."""
    return ast.respond(*given).line("epochs", "rate")[1][1:]


def test_pi_alone_creeps_there_and_answers_losses():
    found = rates(0.2, 0.5, 0.2, 0.0, False)
    assert abs(found[40] - 0.2) > 0.1
    assert np.mean(found[-20:]) == pytest.approx(0.2, abs=0.02)
    assert np.mean(rates(0.4, 0.5, 0.2, 0.3, True)[-30:]) == pytest.approx(0.4, abs=0.01)
    assert np.mean(rates(0.4, 0.0, 0.0, 0.3, True)[-30:]) == pytest.approx(0.28, abs=0.02)


@settings(max_examples=15, deadline=None)
@given(st.floats(0.02, 1), st.floats(0, 2), st.floats(0, 1), st.floats(0, 0.5), st.booleans())
def test_the_response_is_a_rate_and_with_the_solve_it_meets_its_target_at_once(target, kp, ki, lost, solve):
    assert rates(target, kp, ki, 0.0, True) == pytest.approx([0.6] * 40 + [target] * 60, abs=1.01 / 640)
    history = ast.respond(target, kp, ki, lost, solve)
    found, thresholds = (history.line("epochs", name)[1] for name in ("rate", "threshold"))
    assert len(found) == 101 and ((found >= 0) & (found <= 1)).all()
    assert len(thresholds) == 100 and np.isfinite(thresholds).all()


def test_the_playground_draws_anew_when_a_slider_moves(monkeypatch, shown):
    boxes = []
    monkeypatch.setattr(ast, "widgets_serve", lambda: True)
    monkeypatch.setattr(ipywidgets.widgets.interaction, "display", boxes.append)
    ast.playground()
    moved = [child for child in boxes[0].children if isinstance(child, ipywidgets.FloatSlider)]
    assert [slider.description for slider in moved] == ["target", "kp", "ki", "lost"]
    assert [(slider.min, slider.max) for slider in moved] == [(0.02, 1), (0, 2), (0, 1), (0, 0.5)]
    boxes[0].update()
    for number, slider in enumerate(moved, 1):
        slider.value = 0.5 * (slider.value + slider.max)
        assert len(shown) >= number + 1 and not np.array_equal(shown[-1], shown[-2]), slider.description


def test_only_an_image_whose_label_is_wrong_is_framed(shown):
    grey, captions = np.full((2, 32, 32, 3), 128, np.uint8), ["one", "other"]
    for wrong in ([False, False], [False, True]):
        row = grey, captions, np.array(wrong)
        ast.show_images({"upper": row, "lower": row})
    red = [(image[:, :, 0] > 200) & (image[:, :, 1:] < 60).all(2) for image in shown]
    assert not red[0].any() and red[1].any()
    assert not red[1][:, : red[1].shape[1] // 2].any(), "the left one is right"


@pytest.mark.parametrize("name", RUNS)
def test_after_any_run_results_and_choice_are_a_picture_or_a_sentence(ran, shown, capsys, name):
    summary, data = ran(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ast.show_results(summary)
        ast.show_chosen(summary, data)
    said, started = capsys.readouterr().out, name != "stopped at once"
    gated = name not in ("everything", "one epoch", "stopped at once")
    assert len(shown) == started + gated
    assert ("no epoch was finished, so there is no curve" in said) != started
    assert ("no epoch with a gate was begun, so nothing was chosen" in said) != gated
    assert ("stopped by stop button" in said) == name.startswith("stopped")
    assert all(re.search(rf"^{policy} .* %", said, re.MULTILINE) for policy in summary["policies"])


@pytest.mark.parametrize("name", ["finished", "live", "many classes"])
def test_the_most_and_least_chosen_are_those_that_the_run_counted(ran, monkeypatch, capsys, name):
    (summary, data), shown = ran(name), []
    monkeypatch.setattr(ast, "show_images", shown.append)
    ast.show_chosen(summary, data)
    times = np.load(Path(summary["out"]) / "samples.npz")["times_activated"]
    gated = [row for row in rows(summary["out"]) if row["policy"] == "ast" and row["target_activation"] < 1]
    assert times.sum() == sum(row["activated"] for row in gated) and times.max() <= len(gated)
    extremes = (("most", times.max()), ("least", times.min()))
    for (word, count), (title, (images, captions, wrong)) in zip(extremes, shown[0].items(), strict=True):
        same = np.flatnonzero(times == count)
        assert title == f"Images chosen {word}: {count} times ({len(same)} images, {len(images)} shown)"
        places = [np.flatnonzero((data.train_images[same] == image).all((1, 2, 3))) for image in images]
        assert len({int(place[0]) for place in places}) == len(images) == min(10, len(same))
        assert captions == [data.classes[data.train_labels[same[place[0]]]][:12] for place in places]
        assert wrong.tolist() == [data.difficulty[same[place[0]]] == 2 for place in places]
    said = capsys.readouterr().out
    means = {c: times[data.train_labels == i].mean() for i, c in enumerate(data.classes)}
    for word, best in (("most", max(means.values())), ("least", min(means.values()))):
        (line,) = re.findall(rf"^classes chosen {word}: (.*)$", said, re.MULTILINE)
        entries = [entry.rsplit(" ", 2) for entry in line.split(", ")]
        assert len(entries) == 5
        assert all(float(mean) == pytest.approx(means[c], abs=0.051) for c, mean, _ in entries)
        assert float(entries[0 if word == "most" else -1][1]) == pytest.approx(best, abs=0.051)
    with pytest.raises(ast.BadInput, match=f"100 samples: expected the run's {N}; call prepare"):
        ast.show_chosen(summary, ast.shapes(100, 40))
