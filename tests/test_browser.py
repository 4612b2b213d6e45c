"""The notebook in JupyterLab, steered with a mouse in a headless browser, as a person would.

Needs jupyterlab, playwright and Debian's chromium, and skips without them; nothing leaves this machine. Every
step leaves a screenshot in the folder that the environment variable ARTEFACTS names, else in the test's own.
"""

import base64
import contextlib
import importlib.util
import io
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

import nbformat
import numpy as np
import psutil
import pytest
from conftest import ROOT
from PIL import Image

CHROMIUM = shutil.which("chromium")
MISSING = [name for name in ("jupyterlab", "playwright") if importlib.util.find_spec(name) is None]
MISSING += [] if CHROMIUM else ["chromium"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

NOTEBOOK = ROOT / "notebooks" / "cifar10_ast.ipynb"
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
    "AST_TRAIN_SIZE": "4000",
    "AST_EPOCHS": "80",  # more than it ever trains: a click stops it
    "AST_WARMUP_EPOCHS": "1",
    "AST_RAMP_EPOCHS": "0",
    "AST_COMPARE": "none",
    "AST_MODEL": "simple_cnn",
    "OMP_NUM_THREADS": "1",
}
LESSONS = [
    "show_significance(ready)",
    "show_curves(summary)",
    "show_costs(summary)",
    "show_classes(summary, ready)",
    "show_memory(summary)",
    "show_chosen(summary, ready)",
]
BAD_OUTPUT = ", ".join(f"[data-mime-type='application/vnd.jupyter.{kind}']" for kind in ("error", "stderr"))


# --- a server, a browser, a tab ---


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
    return False


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Folder, with the notebook, address and log of a JupyterLab that knows no settings but ours."""
    home, folder = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("work")
    shutil.copy(NOTEBOOK, folder)
    for name, settings in LAB_SETTINGS.items():
        path = home / "config/lab/user-settings/@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(settings))
    env = {**os.environ, **KERNEL, "HOME": str(home)}
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
            yield folder, address, home / "log"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium with a profile of its own, and the screen of a small laptop."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"),
            executable_path=CHROMIUM,
            args=BROWSER_FLAGS,
            viewport={"width": 1366, "height": 768},
        )
        context.set_default_timeout(1000 * PATIENCE)
        yield context
        context.close()


class Tab:
    """The notebook in a tab, and what a person does there."""

    def __init__(self, page, shots):
        self.page, self.shots, self.number = page, shots, 0
        self.complaints = []  # of the page's own scripts
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def shot(self, name):
        self.number += 1
        self.page.screenshot(path=self.shots / f"{self.number:02}-{name}.png")

    def cell(self, call):
        """The code cell in which a line is just this."""
        return self.page.locator(".jp-CodeCell", has=self.page.get_by_text(call, exact=True))

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
    address = lab[1]
    shots = Path(os.environ.get("ARTEFACTS", tmp_path))
    shots.mkdir(parents=True, exist_ok=True)
    print(f"screenshots: {shots}")
    page = browser.new_page()
    tab = Tab(page, shots)
    page.goto(f"{address}/lab/tree/{NOTEBOOK.name}?reset")
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()  # a kernel is there
    yield tab
    tab.shot("last")
    page.close()


# --- what is seen ---


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


def lowest_rate(picture):
    """The lowest activation rate that is drawn; None if no line is there. Every run begins at a rate of 1."""
    height, width, _ = picture.shape
    columns = round(width / 320)  # of panels; this one is the second of the upper row
    panel = picture[: height // 2, width // columns : 2 * width // columns].astype(int)
    zero = (panel.max(2) < 100).sum(1).argmax()  # the row of the axis
    line = np.flatnonzero((abs(panel - ORANGE).max(2) < 40).any(1))
    return (zero - line[-1]) / (zero - line[0]) if len(line) else None


def drawn_near(image, rate):
    """The lowest rate that an <img> shows, where that is this one."""
    picture = pixels(image)
    lowest = None if picture is None else lowest_rate(picture)
    return lowest if lowest is not None and abs(lowest - rate) < 0.03 else None


def too_wide(locator):
    """How many pixels of it are cut off at the right, or need scrolling."""
    return locator.evaluate("area => area.scrollWidth - area.clientWidth")


def rows(folder, name):
    path = folder / "runs" / "cifar10_ast" / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def on_target(folder, target):
    """The epochs that ended on this target."""
    return [row for row in rows(folder, "metrics.jsonl") if row["target_activation"] == target]


def test_the_notebook_opens_and_saves_without_a_word(tab, lab):
    page, path = tab.page, lab[0] / NOTEBOOK.name
    before = path.stat().st_mtime_ns
    tab.shot("opened")
    page.keyboard.press("Control+s")
    tab.until(lambda: path.stat().st_mtime_ns > before, "the saved notebook")
    page.wait_for_timeout(500)
    tab.shot("saved")
    assert page.locator(".jp-Dialog, .Toastify__toast").all_inner_texts() == []
    assert tab.complaints == []
    # what is no valid notebook JupyterLab mends without a dialog: only its log tells
    assert re.findall(r".*(?:invalid|DuplicateCellId|MissingID|Traceback).*", lab[2].read_text()) == []
    saved, ours = nbformat.read(path, as_version=4), nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(saved)
    assert [(cell.cell_type, cell.source) for cell in saved.cells] == [
        (cell.cell_type, cell.source) for cell in ours.cells
    ]


def test_a_person_steers_a_run_with_the_mouse_and_stops_it(tab, lab):
    page, folder = tab.page, lab[0]
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()

    # the dashboard, and a picture that moves
    cell = tab.cell("summary = await run_live(settings, ready)")
    slider = cell.locator(".widget-slider", has_text="target activation")
    image, words = cell.locator("img.widget-image"), cell.locator(".widget-html-content")
    tab.see(slider, "dashboard")
    tab.until(lambda: "(sparse)" in words.inner_text(), "a sparse epoch")
    before = tab.until(lambda: drawn_near(image, 0.4), "the rate on its target of 0.4")
    tab.see(slider, "sparse")
    assert too_wide(cell.locator(".jp-OutputArea-output").first) <= 0

    # the slider, with the mouse
    handle, track = slider.locator(".noUi-handle").bounding_box(), slider.locator(".noUi-base").bounding_box()
    x, y = handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x - 0.3 * track["width"], y, steps=8)
    tab.shot("dragging")
    page.mouse.up()
    target = float(slider.locator(".widget-readout").inner_text())
    assert 0.05 < target < 0.15
    change = tab.until(lambda: rows(folder, "events.jsonl"), "a line in events.jsonl")[0]
    assert (change["control"], change["new"]) == ("target_activation", target)
    tab.until(lambda: len(on_target(folder, target)) > 1, "an epoch wholly on the new target")
    epoch = on_target(folder, target)[1]  # the first one began on the old target
    assert epoch["phase"] == "sparse"
    assert epoch["activation_rate"] == pytest.approx(target, abs=0.01)
    after = tab.until(lambda: drawn_near(image, target), "the rate on its new target")
    assert after < before - 0.2
    tab.see(slider, "dragged")

    # pause and resume
    cell.get_by_role("button", name="Pause").click()
    tab.until(lambda: "paused" in words.inner_text(), "the word that it pauses")
    tab.until(lambda: rows(folder, "events.jsonl")[-1]["new"] is True, "the pause in events.jsonl")
    tab.see(slider, "paused")
    epochs = len(rows(folder, "metrics.jsonl"))
    page.wait_for_timeout(2000)  # more than an epoch of now
    assert len(rows(folder, "metrics.jsonl")) == epochs
    cell.get_by_role("button", name="Resume").click()
    tab.until(lambda: "paused" not in words.inner_text(), "the word that it goes on")
    tab.until(lambda: len(rows(folder, "metrics.jsonl")) > epochs, "another epoch")

    # the end, by a click: a plain picture in the dashboard's place, and what the cells below make of it
    cell.get_by_role("button", name="Stop and save").click()
    tab.see(cell.locator(".jp-RenderedImage img"), "stopped")
    assert cell.locator(".jupyter-widgets").count() == 0
    table = tab.cell("show_table(summary)").locator(".jp-RenderedMarkdown table")
    tab.see(table, "table")
    summary = json.loads((folder / "runs" / "cifar10_ast" / "summary.json").read_text())
    assert not summary["complete"]
    assert table.locator("tbody td").all_inner_texts()[:2] == [
        "ast",
        f"{summary['policies']['ast']['final_accuracy']:.2f}",
    ]
    for lesson in LESSONS:
        shown = tab.cell(lesson).locator(".jp-RenderedImage img")
        tab.see(shown, re.sub(r"\W.*", "", lesson))
        assert np.ptp(pixels(shown)) > 128
    tab.see(tab.cell("playground()").locator("img.widget-image"), "playground")
    assert page.get_by_text("Error displaying widget").count() == 0
    assert page.locator(BAD_OUTPUT).all_inner_texts() == []
    assert page.locator(".jp-Dialog, .Toastify__toast").all_inner_texts() == []
    assert tab.complaints == []
