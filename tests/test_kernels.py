"""The notebooks in real kernels, with the versions that Colab and Kaggle serve, steered while they run.

Each stack is a kernel in an environment of its own, spoken to as a front end speaks to it: execute requests,
and widget messages sent while the run cell is busy. All that the kernel says is kept, so a test can ask which
cell a line belongs to.
"""

import contextlib
import itertools
import json
import os
import queue
import time

import nbformat
import pytest
from conftest import ROOT
from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpecManager
from stacks import STACKS, interpreter, kernel_spec, version
from test_pictures import assert_a_picture

pytestmark = pytest.mark.slow

NOTEBOOK = ROOT / "notebooks" / "cifar10_ast.ipynb"  # what is tested here is shared, byte for byte
PATIENCE = 60  # seconds until something that should happen counts as never happening
TRAIN_SIZE = 1600
EPOCHS = 7  # of the run that is steered
WIDGET = "application/vnd.jupyter.widget-view+json"
ENVIRONMENT = {
    "AST_DATA": "shapes",
    "AST_TRAIN_SIZE": str(TRAIN_SIZE),
    "AST_COMPARE": "none",
    "AST_BATCH_SIZE": "32",
    "OMP_NUM_THREADS": "1",
}


class Kernel:
    """A kernel with a notebook's definitions, and all that it has said."""

    def __init__(self, python, folder):
        self.folder, self.manager, self.client = folder, None, None
        cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
        self.cells = [cell.source for cell in cells]
        titles = [cell.metadata.title for cell in cells]
        self.load, self.at = titles.index("Look before you train"), titles.index("Run in a notebook")
        self.place = titles.index("The dashboard, still empty")
        (folder / "stack").mkdir()
        (folder / "stack" / "kernel.json").write_text(kernel_spec(python, "stack"))

    def start(self):
        self.said, self.replies, self.asked = [], {}, set()
        self.models, self.buffers, self.closed = {}, {}, set()
        specs = KernelSpecManager(kernel_dirs=[str(self.folder)])  # a manager a start, so that ports are new
        self.manager = KernelManager(kernel_name="stack", kernel_spec_manager=specs)
        environment = {**os.environ, **ENVIRONMENT}
        with open(self.folder / "kernel.log", "ab") as log:
            self.manager.start_kernel(env=environment, cwd=str(self.folder), stdout=log, stderr=log)
        self.client = self.manager.client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=PATIENCE)
        self.defined = [self.send(source) for source in self.cells[: self.load]]
        self.wait_for(*self.defined)
        assert {self.replies[cell]["status"] for cell in self.defined} == {"ok"}

    def end(self):
        if self.client:
            self.client.stop_channels()
            self.manager.shutdown_kernel(now=True)
            self.client = None

    def ready(self):
        """Starts it, or starts it anew where a test left it busy or dead."""
        if self.client is None or self.asked - self.replies.keys() or not self.manager.is_alive():
            self.end()
            self.start()

    def send(self, source):
        """Asks for a cell; returns its id at once."""
        cell = self.client.execute(source)
        self.asked.add(cell)
        return cell

    def run(self, source):
        """Runs a cell that must not fail; returns what it printed."""
        return self.done(self.send(source))

    def done(self, cell):
        """Waits for the end of a cell that must not fail; returns what it printed."""
        self.wait_for(cell)
        assert self.replies[cell]["status"] == "ok", self.error(cell)
        return self.printed(cell)

    def train(self):
        """Asks for the notebook's own run cell, and forgets the widgets of the run before."""
        self.models, self.buffers, self.closed = {}, {}, set()
        return self.send(self.cells[self.at])

    def settings(self, out, **values):
        """Fresh settings, and the data that they name; returns the folder of results."""
        phases = {"epochs": 6, "warmup_epochs": 1, "ramp_epochs": 0, "anneal_epochs": 0}
        self.run(f"settings, your_run = Settings(), {phases | {'out': str(out)} | values!r}")
        self.run(self.cells[self.load])
        return out

    def message(self, model, data):
        """Sends what a front end sends for a widget; returns the message's id."""
        message = self.client.session.msg("comm_msg", {"comm_id": model, "data": data})
        self.client.shell_channel.send(message)
        return message["header"]["msg_id"]

    def move(self, model, **state):
        return self.message(model, {"method": "update", "state": state, "buffer_paths": []})

    def click(self, model):
        return self.message(model, {"method": "custom", "content": {"event": "click"}})

    def listen(self):
        """Takes in what has arrived, waiting a little for it."""
        with contextlib.suppress(queue.Empty):
            self.said.append(self.client.get_iopub_msg(timeout=0.05))
            self.follow(self.said[-1])
        with contextlib.suppress(queue.Empty):
            reply = self.client.get_shell_msg(timeout=0)
            if reply["msg_type"] == "execute_reply":
                self.replies[reply["parent_header"]["msg_id"]] = reply["content"]

    def follow(self, message):
        """Keeps what widgets there are, and what they show."""
        content, kind = message["content"], message["msg_type"]
        if kind == "comm_open":
            self.models[content["comm_id"]] = {}
        if kind == "comm_close":
            self.closed.add(content["comm_id"])
        if kind in ("comm_open", "comm_msg") and "state" in content["data"]:
            model = self.models.setdefault(content["comm_id"], {})
            model.update(content["data"]["state"])
            for path, buffer in zip(content["data"].get("buffer_paths", []), message["buffers"], strict=True):
                self.buffers.setdefault((content["comm_id"], path[0]), []).append(bytes(buffer))

    def rest(self, seconds):
        """Listens for a while."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.listen()

    def until(self, happened, what):
        deadline = time.monotonic() + PATIENCE
        while not (result := happened()):
            self.listen()
            assert self.manager.is_alive(), f"the kernel died before {what}"
            if time.monotonic() > deadline:
                last = [(m["msg_type"], str(m["content"])[:200]) for m in self.said[-8:]]
                pytest.fail(f"never happened: {what}; the kernel's last words: {last}")
        return result

    def wait_for(self, *cells):
        """Until the cells have answered, and all that they said has arrived."""
        for cell in cells:
            self.until(lambda cell=cell: cell in self.replies, "the cell's reply")
            self.until(lambda cell=cell: self.states(cell)[-1:] == ["idle"], "the cell's last status")

    def heard(self, cell, kind):
        """The messages of a kind that belong to a cell."""
        of_cell = [m for m in self.said if m["parent_header"].get("msg_id") == cell]
        return [m for m in of_cell if m["msg_type"] == kind]

    def of(self, cell, kind):
        return [m["content"] for m in self.heard(cell, kind)]

    def dates(self, cell, kind="status"):
        """When a cell said something of a kind; its first status is busy, its last idle."""
        return [m["header"]["date"] for m in self.heard(cell, kind)]

    def states(self, cell):
        return [content["execution_state"] for content in self.of(cell, "status")]

    def printed(self, cell, name="stdout"):
        return "".join(content["text"] for content in self.of(cell, "stream") if content["name"] == name)

    def updates(self, cell, shown):
        """What a cell put in the place of something that it had shown, one after the other."""
        found = self.of(cell, "update_display_data")
        return [content["data"] for content in found if content["transient"] == shown["transient"]]

    def error(self, cell):
        return "\n".join("\n".join(content["traceback"]) for content in self.of(cell, "error"))

    def widget(self, name, description=""):
        """The id of the run's widget of this kind, once it is there."""

        def is_it(state):
            return state.get("_model_name") == f"{name}Model" and description in state.get("description", "")

        def find():
            return next((model for model, state in self.models.items() if is_it(state)), None)

        return self.until(find, f"a {name} {description}")


def read(out, name):
    """The whole lines of metrics.jsonl or events.jsonl so far."""
    path = out / f"{name}.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def changes(out, control):
    return [event for event in read(out, "events") if event["control"] == control]


@pytest.fixture(scope="module", params=STACKS)
def booted(request, tmp_path_factory):
    python = interpreter(request.param, tmp_path_factory.mktemp(request.param))
    kernel = Kernel(python, tmp_path_factory.mktemp("kernel"))
    kernel.stack = request.param
    kernel.ready()
    yield kernel
    kernel.end()


@pytest.fixture
def kernel(booted):
    booted.ready()
    return booted


@pytest.fixture(scope="module")
def steered(booted, tmp_path_factory):
    """A whole run whose target was moved after the warm-up, and its learning rate an epoch or two later.

    Two cells wait for it. Meanwhile the front end asks for a widget's state again and again, as it does when
    a page is loaded anew, and somebody plays with the controller further up.
    """
    booted.ready()
    booted.run(booted.cells[booted.at - 1])
    lost, played = booted.widget("FloatSlider", "lost"), None
    booted.out = out = booted.settings(tmp_path_factory.mktemp("steered") / "run", epochs=EPOCHS)
    booted.cell = cell = booted.train()
    booted.last = None
    booted.after = after = booted.send("print('the next cell:', summary['complete'])")
    booted.moves = []
    target = booted.widget("FloatSlider", "target activation")
    factor = booted.widget("FloatLogSlider", "learning rate")
    while cell not in booted.replies:
        rows, followed = read(out, "metrics"), changes(out, "target_activation")
        if rows and not booted.moves:
            booted.moves.append(booted.move(target, value=0.1))
        if followed and not booted.last and len(rows) >= followed[0]["applied_at"] // TRAIN_SIZE + 2:
            booted.moves.append(booted.move(factor, value=0.5))
            booted.last = booted.send("print('the last cell')")
        if followed and not played:
            booted.played = played = booted.move(lost, value=0.3)
        asked = booted.message(target, {"method": "request_state"})
        booted.until(lambda asked=asked: cell in booted.replies or booted.of(asked, "comm_msg"), "an answer")
        booted.rest(0.05)
    booted.wait_for(cell, after, booted.last)
    return booted


def test_a_kernel_has_the_versions_of_its_stack(kernel):
    code = "import ipykernel, ipywidgets; print(ipykernel.__version__, ipywidgets.__version__)"
    wanted = [version(kernel.stack, name) for name in ("ipykernel", "ipywidgets")]
    found = kernel.run(code).split()
    assert found == wanted if wanted[0] else int(found[0].split(".")[0]) >= 7


def test_the_rate_follows_a_slider_that_is_moved_while_the_cell_is_busy(steered):
    assert steered.replies[steered.cell]["status"] == "ok", steered.error(steered.cell)
    (change,) = changes(steered.out, "target_activation")
    assert (change["old"], change["new"]) == (0.4, 0.1)
    assert 0 <= change["applied_at"] - change["set_at"] <= TRAIN_SIZE / 20
    rows, at = read(steered.out, "metrics"), change["applied_at"] // TRAIN_SIZE  # the epoch, counted from 0
    assert at >= 1
    assert [row["target_activation"] for row in rows] == [1.0] + (at - 1) * [0.4] + (EPOCHS - at) * [0.1]
    assert rows[at + 1]["activation_rate"] == pytest.approx(0.1, abs=0.02)


def test_a_second_slider_is_heard_in_the_same_run(steered):
    (change,) = changes(steered.out, "learning_rate_factor")
    assert (change["old"], change["new"]) == (1.0, 0.5)
    rows = read(steered.out, "metrics")
    last = change["applied_at"] // TRAIN_SIZE  # the epoch at whose end it was in force, counted from 0
    falls = [after["learning_rate"] / before["learning_rate"] for before, after in itertools.pairwise(rows)]
    assert last >= 2
    assert falls[last - 1] < 0.6 < falls[last - 2]


def test_a_front_end_is_told_at_once_that_a_slider_was_heard(steered):
    """Until then it holds back what the slider says next."""
    ends = [steered.dates(move)[-1] for move in steered.moves]
    assert len(ends) == 2
    assert all(steered.states(move)[-1] == "idle" for move in steered.moves)
    assert max(ends) < steered.dates(steered.cell)[-1]


def test_one_can_play_with_the_controller_while_it_trains(steered):
    (picture,) = steered.of(steered.played, "display_data")
    assert "image/png" in picture["data"]
    assert steered.dates(steered.played)[-1] < steered.dates(steered.cell)[-1]


def test_all_that_a_run_says_belongs_to_its_cell_and_ends_folded(steered):
    (log,) = (shown for shown in steered.of(steered.cell, "display_data") if WIDGET not in shown["data"])
    *growing, folded = steered.updates(steered.cell, log)
    assert len(growing) > EPOCHS and all(list(data) == ["text/plain"] for data in growing)
    for epoch in range(1, EPOCHS + 1):
        assert all(f" {epoch}/{EPOCHS} " in text for text in folded.values())
    assert folded["text/html"].startswith("<details>")
    began, cells = steered.dates(steered.cell)[0], (steered.cell, steered.after, steered.last)
    kinds = "stream", "update_display_data"
    said = [m for m in steered.said if m["msg_type"] in kinds and m["content"].get("name") != "stderr"]
    since = [message for message in said if message["header"]["date"] > began]
    assert {message["parent_header"].get("msg_id") for message in since} <= set(cells)
    assert not steered.of(steered.cell, "stream")
    assert "Traceback" not in (steered.folder / "kernel.log").read_text()


def test_cells_that_wait_run_after_the_run_in_their_order_and_are_busy_once(steered):
    cells = steered.cell, steered.after, steered.last
    counts = [steered.replies[cell]["execution_count"] for cell in cells]
    assert counts == [counts[0], counts[0] + 1, counts[0] + 2]
    assert steered.printed(steered.after) == "the next cell: True\n"
    assert steered.printed(steered.last) == "the last cell\n"
    for before, cell in itertools.pairwise(cells):
        assert steered.dates(before)[-1] <= steered.dates(cell, "execute_input")[0]
        assert steered.states(cell) == ["busy", "idle"]  # a front end may stop listening at idle


def test_the_picture_changes_while_the_cell_is_busy(steered):
    pictures = steered.buffers[steered.widget("Image"), "value"]
    pictures = set(pictures) - {b""}  # a widget opens without one
    assert len(pictures) > 1
    for picture in pictures:
        assert_a_picture(picture)


def assert_no_widget_outlives_its_run(kernel):
    opened = {model: state.get("_model_name", "") for model, state in kernel.models.items()}
    left = {name for model, name in opened.items() if model not in kernel.closed}
    assert "ImageModel" in opened.values()
    assert not {name for name in left if name and not name.endswith(("StyleModel", "LayoutModel"))}


def test_the_empty_dashboard_is_filled_and_a_plain_picture_takes_its_place_wherever_it_is_shown(steered):
    (empty,) = steered.of(steered.defined[steered.place], "display_data")
    (shown,) = (shown for shown in steered.of(steered.cell, "display_data") if WIDGET in shown["data"])
    (update,) = steered.updates(steered.cell, shown)
    assert empty["data"][WIDGET] == shown["data"][WIDGET]
    panel = shown["data"][WIDGET]["model_id"]
    filled = [m["content"]["data"]["state"] for m in steered.said if m["content"].get("comm_id") == panel]
    assert [len(state["children"]) > 1 for state in filled if "children" in state] == [False, True, False]
    assert {each["transient"]["display_id"] for each in (empty, shown)} == {panel}
    assert_no_widget_outlives_its_run(steered)
    assert "image/png" in update and WIDGET not in update


def test_a_run_pauses_goes_on_stops_and_is_resumed(kernel, tmp_path):
    out = kernel.settings(tmp_path / "run", epochs=8)
    cell = kernel.train()
    words, pause = kernel.widget("HTML"), kernel.widget("ToggleButton", "Pause")
    stop = kernel.widget("Button", "Stop and save")
    kernel.until(lambda: len(read(out, "metrics")) >= 1, "the warm-up")
    kernel.move(pause, value=True)
    kernel.until(lambda: "paused" in kernel.models[words]["value"], "the word paused")
    rows = len(read(out, "metrics"))
    kernel.rest(3)
    assert len(read(out, "metrics")) == rows
    kernel.move(pause, value=False)
    kernel.until(lambda: len(read(out, "metrics")) > rows, "an epoch after the pause")
    paused, resumed = changes(out, "paused")
    assert (paused["new"], resumed["new"]) == (True, False)
    assert paused["candidates"] == resumed["candidates"]
    kernel.click(stop)
    kernel.done(cell)
    assert kernel.run("print(summary['stopped_by'], summary['complete'])") == "stop button False\n"
    assert changes(out, "stop")
    assert list((out / "checkpoints").glob("*.ckpt"))
    for source in kernel.cells[kernel.at + 1 :]:
        kernel.run(source)
    before = read(out, "metrics")
    kernel.run("settings.resume = True")
    kernel.done(kernel.train())
    assert kernel.run("print(summary['stopped_by'], summary['complete'])") == "None True\n"
    rows = read(out, "metrics")
    assert len(before) < len(rows) == 8
    assert rows[: len(before)] == before


def test_an_interrupt_saves_and_stops(kernel, tmp_path):
    out = kernel.settings(tmp_path / "run", epochs=100)
    cell = kernel.train()
    kernel.until(lambda: read(out, "metrics"), "the warm-up")
    kernel.manager.interrupt_kernel()
    kernel.done(cell)
    assert kernel.run("print(summary['stopped_by'])") == "interrupt\n"
    assert list((out / "checkpoints").glob("*.ckpt"))
    for source in kernel.cells[kernel.at + 1 :]:
        kernel.run(source)


BROKEN = """
whole_step, steps = AdaptiveSparseTrainer.step, []
def broken_step(trainer, *batch):
    steps.append(len(batch))
    if len(steps) == 20:
        raise RuntimeError("the worker broke")
    whole_step(trainer, *batch)
AdaptiveSparseTrainer.step = broken_step
"""


def test_what_the_worker_raises_is_raised_in_the_cell(kernel, tmp_path):
    kernel.settings(tmp_path / "run")
    kernel.run(BROKEN)
    cell, after = kernel.train(), kernel.send("print('must not run')")
    kernel.wait_for(cell, after)
    (error,) = kernel.of(cell, "error")
    assert (error["ename"], error["evalue"]) == ("RuntimeError", "the worker broke")
    assert "broken_step" in kernel.error(cell)
    for shown in kernel.of(cell, "display_data"):  # the panel, and the log
        assert WIDGET not in kernel.updates(cell, shown)[-1]
    assert_no_widget_outlives_its_run(kernel)
    assert kernel.replies[after]["status"] == "aborted"
    assert not kernel.printed(after)
    kernel.rest(0.5)  # after an error a kernel refuses cells for a moment
    assert kernel.run("print(len(steps))") == "20\n"


@pytest.mark.parametrize(
    "mistake", ["settings.epochs = 0", "settings.out = '/dev/null/run'"], ids=["before", "in the worker"]
)
def test_bad_input_is_one_sentence_in_the_cell(kernel, tmp_path, mistake):
    kernel.settings(tmp_path / "run")
    kernel.run(mistake)
    cell = kernel.train()
    kernel.wait_for(cell)
    assert ("epochs" in mistake) != bool(kernel.of(cell, "display_data")), "nothing is shown before"
    (error,) = kernel.of(cell, "error")
    assert error["ename"] == "BadInput"
    assert "expected" in error["evalue"] and "\n" not in error["evalue"]
    kernel.rest(0.5)  # after an error a kernel refuses cells for a moment
    assert kernel.run("print('alive')") == "alive\n"


def test_a_kernel_can_be_shut_down_while_it_trains(kernel, tmp_path):
    out = kernel.settings(tmp_path / "run", epochs=100)
    kernel.train()
    kernel.until(lambda: read(out, "metrics"), "the warm-up")
    kernel.client.shutdown()
    deadline = time.monotonic() + PATIENCE
    while kernel.manager.is_alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not kernel.manager.is_alive()
