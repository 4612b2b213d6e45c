"""The dashboard and the live run without a kernel; test_kernels.py and test_browser.py have real ones."""

import asyncio
import html
import itertools
import os
import re
import sys
import threading
from types import SimpleNamespace

import IPython.display
import nbformat
import pytest
from conftest import ROOT, changes, files, rows
from test_pictures import N, assert_a_picture, begin, change, go_on, run, settings_of

import cifar10_ast as ast

WIDGET = "application/vnd.jupyter.widget-view+json"


def dashboard(**changes):
    """A dashboard with the histories that it shows and the controls that it writes."""
    histories, controls = ast.Histories(), ast.Controls()
    return ast.Dashboard(None, histories, controls, ast.Settings(**changes)), histories, controls


def asked(controls):
    return [(wish["control"], wish["new"]) for wish in controls.asked]


@pytest.fixture
def clock(monkeypatch):
    """Stands in for the module `time`: it moves only when told to."""
    fake = SimpleNamespace(now=100.0, monotonic=lambda: fake.now, time=lambda: fake.now)
    monkeypatch.setattr(ast, "time", fake)
    return fake


def look(panel, clock):
    """The numbers that it shows a second later."""
    clock.now += 1.0
    panel.refresh()
    return panel.words.value


def test_sliders_and_buttons_ask_for_what_they_say():
    panel, _, controls = dashboard()
    panel.target.value = 0.1
    panel.factor.value = 0.5
    for paused in (True, False):
        panel.pause.value = paused
        assert controls.paused == paused
    panel.stop.click()
    assert controls.stop == "stop button"
    wishes = [("target_activation", 0.1), ("learning_rate_factor", 0.5)]
    assert asked(controls) == [*wishes, ("paused", True), ("paused", False), ("stop", "stop button")]


@pytest.mark.parametrize(("target", "lowest"), [(0.4, 0.02), (0.005, 0.005)])
def test_sliders_reach_what_can_be_asked_for_and_wait_for_the_mouse_button(target, lowest):
    panel, _, controls = dashboard(target_activation=target)
    assert (panel.target.min, panel.target.max, panel.target.value) == (lowest, 1, target)
    assert (10**panel.factor.min, 10**panel.factor.max, panel.factor.value) == (0.1, 10, 1)
    assert not panel.target.continuous_update and not panel.factor.continuous_update
    assert not controls.asked
    panel.target.value, panel.factor.value = 1.0, 10.0
    assert len(controls.asked) == 2, "the ends are taken too"


@pytest.mark.parametrize(
    ("slider", "control", "values"),
    [("target", "target_activation", (0.1, 0.5, 0.1)), ("factor", "learning_rate_factor", (0.5, 2.0, 0.5))],
)
def test_a_person_may_change_their_mind_before_anything_is_applied(slider, control, values):
    panel, _, controls = dashboard()
    widget = getattr(panel, slider)
    widget.value = values[0]
    assert len(list(controls.take(0.4))) == 1
    widget.value = values[1]
    widget.value = values[2]
    assert asked(controls) == [(control, values[1]), (control, values[2])]


def test_what_sliders_show_in_the_end_is_what_is_applied(small_nets, tmp_path):
    panel, _, controls = dashboard()
    moves, seen = {25: (0.1, 1.0), 45: (0.5, 2.0), 46: (0.2, 0.5)}, itertools.count(1)

    def move(event, data):
        if event == "chunk" and (wish := moves.get(next(seen))):
            panel.target.value, panel.factor.value = wish

    run(tmp_path, [move], controls, warmup_epochs=1, ramp_epochs=0, anneal_epochs=0)
    last = {wish["control"]: wish["new"] for wish in changes(tmp_path)}
    assert last == {"target_activation": panel.target.value, "learning_rate_factor": panel.factor.value}
    assert rows(tmp_path)[-1]["target_activation"] == 0.2
    assert rows(tmp_path)[-1]["activated"] == pytest.approx(0.2 * N, abs=1)


@pytest.mark.parametrize("wish", [None, 0.1])
def test_it_takes_up_what_a_resumed_run_has_in_force_unless_asked_for_something_else(clock, wish):
    panel, histories, controls = dashboard()
    controls.values |= {"target_activation": 0.15, "learning_rate_factor": 2.0}
    if wish:
        panel.target.value = wish  # while the data were loaded
    begin(histories=histories)
    look(panel, clock)
    shown = panel.target.value, round(panel.factor.value, 9)
    assert shown == ((wish, 1.0) if wish else (0.15, 2.0))
    assert asked(controls) == ([("target_activation", wish)] if wish else [])


def test_only_the_first_policy_of_a_seed_can_be_steered_if_it_chooses_at_all(clock):
    panel, histories, controls = dashboard()
    for seed, policy in itertools.product((0, 1), ("ast", "full", "random")):
        begin(policy, seed=seed, histories=histories)
        look(panel, clock)
        assert panel.target.disabled == (policy != "ast")
        assert not panel.factor.disabled
    panel, histories, _ = dashboard(gate="full")
    begin("full", histories=histories)
    look(panel, clock)
    assert panel.target.disabled and not controls.asked


def test_the_numbers_tell_where_it_is_and_what_is_a_model(clock):
    panel, histories, controls = dashboard()
    assert panel.words.value == "loading the data"
    histories("plan", {"work": {"ast": (4, 4.0)}, "left": [("ast", 0)], "synthetic": False})
    begin(histories=histories)
    assert look(panel, clock) == "<b>ast</b>, seed 0: epoch 1 of 4"
    go_on(histories, 30, rate=0.5)  # of 80
    told = look(panel, clock)
    for words in (
        "epoch 2 of 4 · sparse · 8 s spent · 32 pixels · about 12 s to go · accuracy 32.50 %",
        "activation 0.500, target 0.500 · θ 0.600",
        "unit energy saved (a model) 49.5 % · FLOPs saved 50.0 % · joules: no sensor",
    ):
        assert words in told, told
    assert panel.bar.value == pytest.approx(30 / 80)
    controls.pause(True)
    assert look(panel, clock).startswith("<b>paused</b>")
    controls.ask_stop("stop button")
    assert look(panel, clock).startswith("<b>stopping</b>")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"threshold": None}, "no θ"),
        ({"joules": 1234.4}, "1234 J spent"),
        ({"rate": 0.75, "flops": 2e12}, "FLOPs saved -"),  # dearer than training on all
        ({"flops_per_sample": {}}, "joules"),
        ({"rate": 1.0, "threshold": None}, "unit energy saved (a model) 0.0 %"),
    ],
)
def test_the_numbers_are_numbers_whatever_is_known(clock, more, words):
    panel, histories, _ = dashboard()
    for decisions in (1, 19, 60):
        go_on(histories if histories.runs else begin(histories=histories), decisions, **more)
        told = look(panel, clock)
        assert words in told and "nan" not in told and "inf" not in told


@pytest.mark.parametrize(("threads", "share"), [(4, 0.03), (3, 0.02)])
def test_numbers_come_each_second_and_pictures_within_their_share_of_the_time(
    clock, monkeypatch, threads, share
):
    drawn, looks = [], itertools.count()

    def draw(histories):
        clock.now += 0.3
        drawn.append(clock.now)
        return f"picture {len(drawn)}".encode()

    monkeypatch.setattr(ast, "live_picture", draw)
    monkeypatch.setattr(ast.torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    panel, histories, _ = dashboard()
    begin(histories=histories, epochs=100)
    histories.outlook = lambda: (next(looks) / 1000, None)
    for _ in range(6000):
        clock.now += 0.1
        panel.refresh()
    went = clock.now - 100
    assert went * 0.8 < 1000 * panel.bar.value <= went
    first = [at for at in drawn if at < 115]  # more of them, for who waits to see it move
    assert len(first) >= 4
    assert 0.7 * share * went < 0.3 * (len(drawn) - len(first)) <= share * went
    assert panel.image.value == f"picture {len(drawn)}".encode()
    change(histories)  # neither numbers nor a picture are due
    for due in (True, False):
        clock.now += 0.1
        panel.refresh()
        assert (drawn[-1] == pytest.approx(clock.now)) == due, "at once, and once is enough"
    go_on(histories, 1)
    clock.now += 0.1
    panel.refresh()
    assert drawn[-1] == pytest.approx(clock.now), "the decision that heeds it"
    assert panel.image.value == f"picture {len(drawn)}".encode()


@pytest.fixture
def notebook(monkeypatch, small_nets):
    """As in a notebook with widgets: what is displayed, as (id, data, children of the panel), and updated;
    and what the log became."""
    shown, updated, made, log = [], [], [], []
    make = ast.Dashboard.__init__

    def kept(self, *given):
        make(self, *given)
        made.append(self)

    def grow(data, *, raw):
        log.append(data)

    def display(data, *, raw, display_id):
        if display_id is True:
            return SimpleNamespace(update=grow)
        shown.append((display_id, data, len(made[0].panel.children) if made else 0))

    def update(thing, *, display_id):
        updated.append((display_id, thing))

    monkeypatch.setattr(ast.Dashboard, "__init__", kept)
    monkeypatch.setattr(ast, "widgets_serve", lambda: True)
    monkeypatch.setattr(IPython.display, "display", display)
    monkeypatch.setattr(IPython.display, "update_display", update)
    return SimpleNamespace(shown=shown, updated=updated, made=made, log=log)


def live(out, panel=None, **more):
    """A whole live run on a few drawn images."""
    return asyncio.run(ast.run_live(settings_of(out, **{"epochs": 2} | more), ast.shapes(N, 40), panel))


def cell(title):
    cells = nbformat.read(ROOT / "notebooks" / "cifar10_ast.ipynb", as_version=4).cells
    return next(cell.source for cell in cells if (cell.cell_type, cell.metadata.title) == ("code", title))


def test_the_empty_panel_is_filled_shown_again_and_ends_as_a_plain_picture_that_stays(notebook, tmp_path):
    names, out = {}, tmp_path / "out"
    exec(cell("The dashboard, still empty"), names)
    panel = names["panel"]
    (words,) = panel.children
    assert words.value.startswith("importing PyTorch") and "a cell below says why" in words.value
    summary = live(out, panel)
    assert summary["complete"]
    (first, empty, before), (again, filled, after) = notebook.shown
    assert (first, empty) == (again, filled), "the same widget, under the same id"
    assert empty[WIDGET]["model_id"] == panel.model_id
    assert before == 0 < after
    ((where, thing),) = notebook.updated
    assert where == first and isinstance(thing, IPython.display.Image)
    assert_a_picture(thing.data)
    assert (out / "dashboard.png").read_bytes() == thing.data
    made = notebook.made[0]
    widgets = made.target, made.factor, made.pause, made.stop, made.bar, made.words, made.image
    assert panel.children == () and [widget.comm for widget in widgets] == [None] * 7
    live(out, panel)  # again, as who changes a setting does
    assert len(notebook.shown) == 3 and len(notebook.updated) == 2
    before = files(out)
    assert live(out, resume=True)["complete"], "a finished run"
    assert files(out) == before and "dashboard.png" in before


def test_the_log_grows_as_plain_text_and_ends_folded_with_every_line(notebook, tmp_path, capsys):
    live(tmp_path / "a <b> & c", epochs=3)
    *growing, folded = notebook.log
    for before, after in itertools.pairwise(growing):
        assert list(after) == ["text/plain"] and after["text/plain"].startswith(before["text/plain"])
    whole = growing[-1]["text/plain"]
    assert sum(line.startswith("ast ") and "/3" in line for line in whole.splitlines()) == 3
    assert folded["text/plain"] == whole and "a <b> & c" in whole
    assert folded["text/html"].startswith("<details><summary>")
    assert html.unescape(re.sub("<[^>]*>", "", folded["text/html"])).endswith(whole)
    assert not capsys.readouterr().out


def test_a_second_run_in_the_same_notebook_is_refused_while_one_is_on(notebook, tmp_path):
    done = threading.Event()
    first = ast.begin_work(lambda: done.wait(60) and {})
    try:
        with pytest.raises(ast.BadInput, match="another run"):
            live(tmp_path / "out")
    finally:
        done.set()
        first.result(60)


@pytest.mark.parametrize("fault", ["the numbers", "every picture after the first", "the last picture"])
def test_a_fault_in_drawing_loses_no_run(notebook, tmp_path, monkeypatch, fault):
    drawn, draw = itertools.count(), ast.live_picture

    def fail(*given):
        raise ZeroDivisionError("in the picture")

    def once(histories):
        ended = histories.runs and histories.runs[-1].row.get("epoch") == 40
        return fail() if ended or (next(drawn) and fault != "the last picture") else draw(histories)

    if fault == "the numbers":
        monkeypatch.setattr(ast.Dashboard, "_numbers", fail)
    else:
        monkeypatch.setattr(ast, "live_picture", once)
    summary = live(tmp_path / "out", epochs=40)
    assert summary["complete"] and len(rows(tmp_path / "out")) == 40
    told = "no last picture" if "last" in fault else "the dashboard stands still from here on"
    assert told in notebook.log[-1]["text/plain"]
    assert not [thread for thread in threading.enumerate() if thread.name == ast.WORKER]


@pytest.mark.parametrize("how", ["KeyboardInterrupt", "cancelled"])
def test_interrupting_the_cell_saves_and_stops(notebook, tmp_path, monkeypatch, how):
    out, turn, turns = tmp_path / "out", ast.Pump.__call__, itertools.count()

    async def interrupted(pump):
        await turn(pump)
        if (out / "metrics.jsonl").exists() and rows(out) and not next(turns):
            if how == "cancelled":
                asyncio.current_task().cancel()
            else:
                raise KeyboardInterrupt

    monkeypatch.setattr(ast.Pump, "__call__", interrupted)
    summary = live(out, epochs=2000)
    assert (summary["complete"], summary["stopped_by"]) == (False, "interrupt")
    assert changes(out)[-1]["new"] == "interrupt"
    assert list((out / "checkpoints").glob("*.ckpt")) and (out / "dashboard.png").exists()


@pytest.mark.parametrize("missing", ["a kernel", "IPython", "ipywidgets", "somebody to watch"])
def test_without_widgets_the_same_run_prints_a_table_and_writes_pictures(
    small_nets, tmp_path, monkeypatch, capsys, missing
):
    if missing != "a kernel":
        monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=True))
        assert ast.widgets_serve()
    if missing in ("IPython", "ipywidgets"):
        monkeypatch.setitem(sys.modules, missing, None)
    if missing == "somebody to watch":
        monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setattr(ast.Dashboard, "__init__", None)  # any that is made fails
    assert not ast.widgets_serve()
    if missing in ("ipywidgets", "somebody to watch"):
        names = {}
        exec(cell("The dashboard, still empty"), names)
        assert names["panel"] is None
    assert live(tmp_path / "out", compare="full", epochs=3)["complete"]
    said = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("ast ", "full ")) and "/6" in line for line in said) == 6
    for name in ("curves.png", "dashboard.png"):
        assert_a_picture((tmp_path / "out" / name).read_bytes(), 300_000)


BLOCKED = """
import runpy, sys
sys.modules |= dict.fromkeys(("IPython", "ipywidgets", "ipykernel"))
runpy.run_path("cifar10_ast.py", run_name="__main__")
"""


def test_the_script_needs_no_ipython(script):
    flags = "--data shapes --train-size 100 --epochs 2 --compare none --out out".split()
    script.command = lambda *flags: [sys.executable, "-I", "-B", "-c", BLOCKED, *flags]
    script(*flags, check=0)
    assert (script.folder / "out" / "curves.png").exists()
