"""Every block of docs/extending.md runs."""

import re
import sys
import types

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import letters

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
SHARED, *BLOCKS = (
    block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "Letters" not in block
)
NAMES = ["gate", "listener", "criterion"]


class Writer:
    """As tensorboard's, which the tests do not install."""

    def __init__(self, folder):
        self.scalars = []
        WRITERS.append(self)

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))


WRITERS: list[Writer] = []


@pytest.fixture
def tensorboard(monkeypatch):
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    WRITERS.clear()


@pytest.mark.parametrize("block", BLOCKS, ids=NAMES)
def test_an_example_runs_as_it_stands(tensorboard, block):
    names = {}
    exec(SHARED + block, names)
    results = names["results"]
    runs = results.values() if "full" in results else [results]
    assert all(len(run["epochs"]) >= 1 and run["final_accuracy"] > 0 for run in runs)
    if "trainer" in names and hasattr(names["trainer"].gate, "losses"):
        state, fresh = names["trainer"].gate.state_dict(), names["Hardest"](600)
        fresh.load_state_dict(state)
        assert torch.equal(fresh.losses, state["losses"]) and bool(fresh.losses.isfinite().all())
    if WRITERS:
        steps = [step for name, _, step in WRITERS[0].scalars if name == "ast/val_accuracy"]
        assert steps == [1, 2, 3, 4]


@pytest.mark.parametrize("block, most", list(zip(BLOCKS, (20, 10, 10), strict=True)), ids=NAMES)
def test_an_example_is_short(block, most):
    assert len([line for line in block.splitlines() if line.strip()]) <= most


def test_a_language_model_trains_by_the_losses_of_its_sequences(monkeypatch):
    monkeypatch.setattr(letters, "HELD_OUT", 100)
    found = letters.compare(seeds=1, epochs=4, limit=15_000)
    bits = {policy: runs[0]["bits"] for policy, runs in found.items()}
    assert max(bits.values()) < 6 and min(bits, key=bits.get) == "full", "log2 of its letters is more"
    assert found["ast"][0]["flops"] == found["random"][0]["flops"] < found["full"][0]["flops"]
