"""The notebook in JupyterLab, steered with a mouse in a headless browser, as a person would.

Needs jupyterlab, playwright and Debian's chromium, and skips without them; nothing leaves this machine. Every
step leaves a screenshot in the folder that the environment variable ARTEFACTS names, else in the test's own.
"""

import base64
import contextlib
import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import psutil
import pytest
from conftest import ROOT
from PIL import Image
from stacks import LAB_WIDGETS, interpreter, kernel_spec, version

CHROMIUM = shutil.which("chromium")
MISSING = [name for name in ("jupyterlab", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if CHROMIUM else ["chromium"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

NOTEBOOK = ROOT / "notebooks" / "cifar10_ast.ipynb"
SCREEN = {"width": 1366, "height": 768}  # of a small laptop
ORANGE = (0xD5, 0x5E, 0x00)  # the gate under test, in every picture
PATIENCE = 120  # seconds until what a person waits for must have come, on a busy machine

LAB_FLAGS = [
    "--no-browser",
    "--allow-root",
    "--ip=127.0.0.1",
    "--ServerApp.port_retries=0",
    "--IdentityProvider.token=",
    "--LabApp.extension_manager=readonly",  # the other one asks PyPI
    "--LabApp.check_for_updates_class=jupyterlab.handlers.announcements.NeverCheckForUpdate",
]
LAB_SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # cells out of sight are there as well
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
BROWSER_FLAGS = [
    *"--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --no-proxy-server".split(),
    *"--disable-background-networking --disable-component-update --disable-sync".split(),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
KERNEL = {
    "AST_DATA": "shapes",
    "AST_TRAIN_SIZE": "2000",
    "AST_EPOCHS": "80",  # more than it ever trains: a click stops it
    "AST_WARMUP_EPOCHS": "1",
    "AST_RAMP_EPOCHS": "0",
    "AST_COMPARE": "none",
    "OMP_NUM_THREADS": "1",
}
PLACES = ["The dashboard, still empty", "Run in a notebook"]  # cells that show the dashboard
LESSONS = ["What significance looks like", "What came out", "What was chosen"]  # that show a plain picture
BAD = [f"[data-mime-type='application/vnd.jupyter.{kind}']" for kind in ("error", "stderr")]
BAD += [".jp-Dialog", ".Toastify__toast"]


@contextlib.contextmanager
def ended(process):
    """Ends a process and all that it started, whatever happens meanwhile."""
    try:
        yield
    finally:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.terminate()
        _, left = psutil.wait_procs(family, 20)
        for stubborn in left:
            stubborn.kill()
        psutil.wait_procs(left, 20)


def answers(url):
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
        return True


@pytest.fixture(scope="module", params=LAB_WIDGETS)
def lab(request, tmp_path_factory):
    """A JupyterLab that knows no settings but ours, and serves a stack's kernel and its widgets' scripts."""
    home, folder = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("work")
    stack = tmp_path_factory.mktemp(request.param)
    python = interpreter(request.param, stack, LAB_WIDGETS[request.param])
    spec = stack / "share/jupyter/kernels/python3/kernel.json"
    spec.write_text(kernel_spec(python, "Python 3 (ipykernel)"))
    shutil.copy(NOTEBOOK, folder)
    for name, settings in LAB_SETTINGS.items():
        path = home / "config/lab/user-settings/@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(settings))
    env = {**os.environ, **KERNEL, "HOME": str(home), "JUPYTER_PATH": str(stack / "share/jupyter")}
    for name in ("CONFIG", "DATA", "RUNTIME"):
        env[f"JUPYTER_{name}_DIR"] = str(home / name.lower())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    places = [f"--ServerApp.port={address.rpartition(':')[2]}", f"--ServerApp.root_dir={folder}"]
    with open(home / "log", "w") as log:
        command = [sys.executable, "-m", "jupyterlab", *LAB_FLAGS, *places]
        server = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        with ended(server):
            until = time.monotonic() + PATIENCE
            while not answers(f"{address}/api"):
                if server.poll() is not None or time.monotonic() > until:
                    pytest.fail("JupyterLab does not answer:\n" + (home / "log").read_text())
                time.sleep(0.1)
            yield SimpleNamespace(stack=request.param, folder=folder, address=address, log=home / "log")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium with a profile of its own."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        profile = tmp_path_factory.mktemp("profile")
        options = {"executable_path": CHROMIUM, "args": BROWSER_FLAGS, "viewport": SCREEN}
        context = playwright.chromium.launch_persistent_context(profile, **options)
        context.set_default_timeout(1000 * PATIENCE)
        yield context
        context.close()


class Tab:
    """The notebook in a tab, and what a person does there."""

    def __init__(self, page, shots):
        self.page, self.shots, self.number = page, shots, itertools.count(1)
        self.complaints = []  # of the page's own scripts; ipywidgets 7 looks for a MathJax that has gone
        page.on("pageerror", lambda error: "'Queue'" in str(error) or self.complaints.append(str(error)))

    def shot(self, name):
        self.page.screenshot(path=self.shots / f"{next(self.number):02}-{name}.png")

    def cell(self, title):
        """The code cell with this title."""
        cells = nbformat.read(NOTEBOOK, as_version=4).cells
        keys = [(cell.cell_type, cell.metadata.title) for cell in cells]
        return self.page.locator(".jp-Notebook .jp-Cell").nth(keys.index(("code", title)))

    def see(self, locator, name):
        """Scrolls there, waiting until it is shown; leaves a screenshot."""
        locator.wait_for()
        locator.scroll_into_view_if_needed()
        self.page.wait_for_timeout(300)
        self.shot(name)

    def until(self, test, what):
        """What `test` returns, once that is true; the page lives on meanwhile."""
        end = time.monotonic() + PATIENCE
        while not (found := test()):
            if time.monotonic() > end:
                pytest.fail(f"never came: {what}")
            self.page.wait_for_timeout(200)
        return found


@pytest.fixture
def tab(lab, browser, tmp_path):
    shots = Path(os.environ.get("ARTEFACTS", tmp_path)) / lab.stack
    shots.mkdir(parents=True, exist_ok=True)
    print(f"screenshots: {shots}")
    page = browser.new_page()
    tab = Tab(page, shots)
    page.goto(f"{lab.address}/lab/tree/{NOTEBOOK.name}?reset")
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()  # a kernel is there
    yield tab
    tab.shot("last")
    page.close()


def pixels(image):
    """Of an <img>: uint8 [height, width, 3]; None while its next picture is on its way."""
    code = """async image => {
        try { await image.decode() } catch { return null }
        const canvas = document.createElement("canvas");
        [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
        canvas.getContext("2d").drawImage(image, 0, 0);
        return canvas.toDataURL();
    }"""
    if (url := image.evaluate(code, timeout=10_000)) is None:
        return None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB"))


def newest_rate(picture):
    """The activation rate where its line ends; None if no line is there. Every run begins at a rate of 1."""
    height, width, _ = picture.shape
    columns = round(width / 320)  # of panels; this one is the second of the upper row
    panel = picture[: height // 2, width // columns : 2 * width // columns].astype(int)
    zero = (panel.max(2) < 100).sum(1).argmax()  # the row of the axis
    line = abs(panel[:zero] - ORANGE).max(2) < 40
    if not line.any():
        return None
    one = np.flatnonzero(line.any(1))[0]
    line[:, line[zero - 5 :].any(0)] = False  # what reaches down to the axis marks a change
    last = line[:, np.flatnonzero(line.any(0))[-2:]]
    return (zero - np.flatnonzero(last.any(1)).mean()) / (zero - one)


def drawn_near(image, rate):
    """The newest rate that an <img> shows, where that is this one."""
    picture = pixels(image)
    newest = None if picture is None else newest_rate(picture)
    return newest if newest is not None and abs(newest - rate) < 0.05 else None


def screens_down(page, locator, edge):
    """How many screens below the top of the notebook an edge of it stands."""
    top = page.locator(".jp-Notebook .jp-Cell").first.evaluate("cell => cell.getBoundingClientRect().top")
    return (locator.evaluate(f"area => area.getBoundingClientRect().{edge}") - top) / SCREEN["height"]


def rows(lab, name):
    path = lab.folder / "runs" / "cifar10_ast" / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wholly_on(lab, target):
    """Of the epochs that ended on this target all but the first, which began on the old one."""
    return [row for row in rows(lab, "metrics.jsonl") if row["target_activation"] == target][1:]


def assert_no_complaint(tab):
    assert tab.page.get_by_text("Error displaying widget").count() == 0
    assert tab.page.locator(", ".join(BAD)).all_inner_texts() == []
    assert tab.complaints == []


def test_the_notebook_opens_folded_and_saves_without_a_word(tab, lab):
    page, path = tab.page, lab.folder / NOTEBOOK.name
    before = path.stat().st_mtime_ns
    ours = nbformat.read(NOTEBOOK, as_version=4)
    folded = [cell for cell in ours.cells if "fold" in cell.metadata.get("tags", [])]
    tab.shot("opened")
    assert page.locator(".jp-CodeCell .jp-InputPlaceholder").count() == len(folded) > 5
    page.keyboard.press("Control+s")
    tab.until(lambda: path.stat().st_mtime_ns > before, "the saved notebook")
    page.wait_for_timeout(500)
    tab.shot("saved")
    assert_no_complaint(tab)
    # what is no valid notebook JupyterLab mends without a dialog: only its log tells
    assert re.findall(r".*(?:invalid|DuplicateCellId|MissingID|Traceback).*", lab.log.read_text()) == []
    saved = nbformat.read(path, as_version=4)
    nbformat.validate(saved)
    pairs = [[(cell.cell_type, cell.source) for cell in notebook.cells] for notebook in (saved, ours)]
    assert pairs[0] == pairs[1]


def test_a_person_steers_a_run_with_the_mouse_and_stops_it(tab, lab, record_property):
    page = tab.page
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()

    # the dashboard on the second screen, and the same one below "Run"
    first, second = (tab.cell(title) for title in PLACES)
    slider = first.locator(".widget-slider", has_text="target activation")
    image, words = first.locator("img.widget-image"), first.locator(".widget-html-content")
    images = [image, second.locator("img.widget-image")]
    tab.see(slider, "dashboard")
    shown = first.locator(".jp-OutputArea-output").first
    down = [screens_down(page, shown, edge) for edge in ("top", "bottom")]
    record_property("screens", down)
    print(f"ipywidgets {version(lab.stack, 'ipywidgets')}: from {down[0]:.2f} to {down[1]:.2f} screens down")
    assert 1 < down[1] <= 2
    tab.until(lambda: "sparse" in words.inner_text(), "a sparse epoch")
    before = [tab.until(lambda i=i: drawn_near(i, 0.4), "the rate on its target of 0.4") for i in images]
    tab.see(second.locator(".widget-slider").first, "below-run")
    tab.see(slider, "sparse")
    for cell in (first, second):
        area = cell.locator(".jp-OutputArea-output").first
        assert area.evaluate("area => area.scrollWidth - area.clientWidth") <= 0, "cut off at the right"

    # the slider, with the mouse
    handle = slider.locator(".noUi-handle, .ui-slider-handle").bounding_box()  # of ipywidgets 8, and 7
    track = slider.locator(".noUi-base, .ui-slider").bounding_box()
    x, y = handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 0.3 * track["width"], y, steps=8)
    tab.shot("dragging")
    page.mouse.up()
    target = float(slider.locator(".widget-readout").inner_text())
    assert 0.05 < target < 0.15
    change = tab.until(lambda: rows(lab, "events.jsonl"), "a line in events.jsonl")[0]
    assert (change["control"], change["new"]) == ("target_activation", target)
    same = second.locator(".widget-slider", has_text="target activation").locator(".widget-readout")
    assert float(same.inner_text()) == target
    epoch = tab.until(lambda: wholly_on(lab, target), "an epoch wholly on the new target")[0]
    assert epoch["phase"] == "sparse"
    assert epoch["activation_rate"] == pytest.approx(target, abs=0.01)
    after = [tab.until(lambda i=i: drawn_near(i, target), "the rate on its new target") for i in images]
    assert max(after) < min(before) - 0.2
    tab.see(slider, "dragged")

    # pause, and go on
    pause = first.get_by_role("button", name="Pause")
    pause.click()
    tab.until(lambda: "paused" in words.inner_text(), "the word that it pauses")
    tab.see(slider, "paused")
    epochs = len(rows(lab, "metrics.jsonl"))
    pause.click()
    tab.until(lambda: "paused" not in words.inner_text(), "the word that it goes on")
    tab.until(lambda: len(rows(lab, "metrics.jsonl")) > epochs, "another epoch")

    # the end, by a click: a plain picture in both places, and what the cells below make of the run
    first.get_by_role("button", name="Stop and save").click()
    for cell, name in ((first, "stopped"), (second, "stopped-below-run")):
        shown = cell.locator(".jp-RenderedImage img")
        tab.see(shown, name)
        assert drawn_near(shown, target)
        assert cell.locator(".jupyter-widgets").count() == 0
    log = second.locator("details")
    assert not log.evaluate("log => log.open") and "\nast " in log.text_content()
    summary = json.loads((lab.folder / "runs" / "cifar10_ast" / "summary.json").read_text())
    assert summary["stopped_by"] == "stop button"
    for lesson in LESSONS:
        shown = tab.cell(lesson).locator(".jp-RenderedImage img")
        tab.see(shown, lesson.lower().replace(" ", "-"))
        assert np.ptp(pixels(shown)) > 128
    assert f"{summary['policies']['ast']['final_accuracy']:.2f} %" in tab.cell(LESSONS[1]).inner_text()
    tab.see(tab.cell("Play with the controller").locator(".widget-output img"), "playground")
    assert_no_complaint(tab)
