"""Golden runs: short trainings whose choices and numbers golden.json records, so that a change which is not
meant to change results can be held to that, to the bit.

    python tests/golden.py                   # compares the program with the record, a line a case
    python tests/golden.py --record          # records anew, after a change that is meant to change results
    python tests/golden.py --program DIR     # takes cifar10_ast.py from another folder

Floating-point sums differ between processors and versions of torch. Where both are those of the record, all
is compared exactly; elsewhere see `differences`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import math
import platform
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from conftest import rows, untimed
from torch import nn

HERE = Path(__file__).parent
RECORD = HERE / "golden.json"
TOTALS = ("candidates", "activated", "flops", "unit_energy", "energy_savings")
CHANGES = ("control", "candidates", "set_at", "old", "new")

# What a case sets beside COMMON; `rates` and `by_hand` are for the trainer, the rest for its ASTConfig.
COMMON = {"epochs": 4, "warmup_epochs": 1, "ramp_epochs": 0, "anneal_epochs": 0}
COMMON |= {"batch_size": 32, "device": "cpu", "amp": "off"}
CASES: dict[str, dict] = {
    "ast": {"ramp_epochs": 1, "anneal_epochs": 1},
    # Chunks of four batches' worth, where that is less than a twentieth; some samples wait until overdue.
    "ast, small batches": {"target_activation": 0.8, "batch_size": 5},
    "random": {"gate": "random", "ramp_epochs": 1, "anneal_epochs": 1},
    "random, given rates": {"gate": "random", "rates": [1.0, 0.55, 0.3, 0.41]},
    "full": {"gate": "full", "epochs": 3},
    "live": {"gate": "live", "epochs": 3},
    "pure PI": {"feedforward": False},
    "balance": {"balance": True, "anneal_epochs": 1},
    "entropy": {"significance": "loss+entropy", "epochs": 3},
    "intensity": {"significance": "loss+intensity", "epochs": 3},
    "gradient": {"significance": "gradient", "epochs": 3},
    "by hand": {"by_hand": {"target_activation": 0.2, "learning_rate_factor": 0.5}},
}
RUN = "a whole run"
NAMES = (*CASES, RUN)

SHARES = np.array([40, 25, 14, 9, 7, 5])  # percent of the samples in each class


def arrays(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Striped images uint8 [n, 32, 32, 3], between clear and drowned in noise, and labels int64 [n], of which
    one in twelve is wrong. All of it is integer arithmetic, the same on every processor."""
    rng = np.random.default_rng(seed)
    labels = np.searchsorted(SHARES.cumsum(), rng.integers(0, 100, n), side="right")
    across, down = np.array([[4, 0], [0, 4], [3, 3], [3, -3], [6, 2], [1, 7]]).T[:, labels, None, None]
    y, x = np.mgrid[:32, :32]
    stripes = (x * across + y * down + rng.integers(0, 32, (n, 1, 1))) // 16 % 2
    noise = rng.integers(0, 256, (n, 32, 32, 3))
    clear = rng.integers(1, 9, (n, 1, 1, 1))  # eighths
    images = (clear * 255 * stripes[..., None] + (8 - clear) * noise) // 8
    wrong = rng.integers(0, 12, n) == 0
    labels = np.where(wrong, (labels + 1) % len(SHARES), labels)
    return images.astype(np.uint8), labels.astype(np.int64)


def small_net() -> nn.Module:
    """Two convolutions with batch norm."""
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, len(SHARES))),
    )


def play(program: ModuleType, name: str) -> dict:
    """Trains the case `name` on one thread and returns what is compared, as `json` would read it back."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            found = play_run(program) if name == RUN else play_trainer(program, CASES[name])
    finally:
        torch.set_num_threads(threads)
    return json.loads(json.dumps(found))


def play_trainer(program: ModuleType, case: dict) -> dict:
    """The epochs of one trainer, each with a SHA-256 of the trained samples' indices in order."""
    case = COMMON | case
    rates, by_hand = case.pop("rates", None), dict(case.pop("by_hand", {}))
    torch.manual_seed(0)
    model, controls = small_net(), program.Controls()
    lr = 0.01 * case["batch_size"] / 32  # so low that rounding errors hardly grow, nor change a choice
    hashes, changes, digest = [], [], hashlib.sha256()

    def listen(event: str, data: dict) -> None:
        nonlocal digest
        if event == "epoch":
            hashes.append(digest.hexdigest())
            digest = hashlib.sha256()
        elif event == "control":
            changes.append({key: data[key] for key in CHANGES})
        elif event == "chunk" and len(hashes) == 2 and data["candidates"] >= data["n"] / 2:
            while by_hand:
                controls.set(*by_hand.popitem())

    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    given = model, arrays(600, seed=1), arrays(200, seed=2), program.ASTConfig(**case), optimizer
    options = {"rates": rates, "seed": 5, "listeners": [listen], "controls": controls}
    trainer = program.AdaptiveSparseTrainer(*given, **options)
    observe = trainer.gate.observe

    def told(indices: torch.Tensor, losses: torch.Tensor) -> None:
        digest.update(indices.numpy().astype("<i8").tobytes())
        observe(indices, losses)

    trainer.gate.observe = told
    results = trainer.train()
    weights = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
    epochs = zip(untimed(results["epochs"]), hashes, strict=True)
    return {
        "epochs": [row | {"choices": found} for row, found in epochs],
        "changes": changes,
        "totals": {key: results[key] for key in TOTALS},
        "weights": hashlib.sha256(weights).hexdigest(),
    }


def play_run(program: ModuleType) -> dict:
    """A whole run of the program, as metrics.jsonl and samples.npz tell of it."""
    with tempfile.TemporaryDirectory() as out:
        settings = replace(program.Settings(), data="shapes", train_size=600, epochs=3, batch_size=32)
        settings = replace(settings, compare="full,random,short", out=out, device="cpu", amp="off")
        program.run(settings, listeners=[], say=lambda line: None)
        times = np.load(Path(out) / "samples.npz")["times_activated"].astype("<i8").tobytes()
        return {"epochs": rows(out, timed=False), "times_activated": hashlib.sha256(times).hexdigest()}


PLANNED = ("policy", "seed", "epoch", "phase", "candidates", "target_activation")  # hang on no loss
# Absolute, elsewhere 1e-3: two of 200 images, in percent; and for θ a few of 600 ranks.
SLACK = {"val_accuracy": 1.0, "threshold": 5e-3, "feedforward": 5e-3}


def differences(recorded: dict, found: dict, exact: bool) -> list[str]:
    """What differs, a line each. Columns that the record does not have are not looked at.

    On another processor or torch (not `exact`) losses differ in their last digits, and so, sooner or later,
    does which of two equally hard samples is chosen; from then on nothing need be close. There choices and
    counts have to agree, and floats within 1e-3 (or `SLACK`), up to the end of each policy's first epoch with
    a gate; of later epochs only what hangs on no loss.
    """
    if exact:
        return list(compare(recorded, found, "", exact=True))
    epochs, others = recorded["epochs"], found["epochs"]
    if len(epochs) != len(others):
        return [f"{len(epochs)} epochs recorded, {len(others)} found"]
    lines, gated = [], set()
    for row, other in zip(epochs, others, strict=True):
        late = row["policy"] in gated
        part = {key: value for key, value in row.items() if not late or key in PLANNED}
        lines += compare(part, other, f"{row['policy']} epoch {row['epoch']} ", exact=False)
        if row["target_activation"] < 1:
            gated.add(row["policy"])
    return lines


def compare(recorded: object, found: object, path: str, exact: bool) -> Iterator[str]:
    """The leaves that differ, with their paths; see `differences`."""
    if isinstance(recorded, dict) and isinstance(found, dict):
        for key, value in recorded.items():
            yield from compare(value, found.get(key, "nothing"), f"{path}{key} ", exact)
    elif isinstance(recorded, list) and isinstance(found, list) and len(recorded) == len(found):
        for position, (value, other) in enumerate(zip(recorded, found, strict=True)):
            yield from compare(value, other, f"{path}{position} ", exact)
    elif recorded != found:
        floats = isinstance(recorded, float) and isinstance(found, float)
        slack = SLACK.get(path.rsplit(maxsplit=1)[-1], 1e-3)
        if exact or not floats or not math.isclose(recorded, found, rel_tol=1e-3, abs_tol=slack):
            yield f"{path.strip()}: recorded {recorded}, found {found}"


def machine() -> dict[str, str]:
    """What floating-point sums hang on: the processor, the instructions torch uses on it, and torch."""
    told = {}
    with contextlib.suppress(OSError):  # Linux only
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
        told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    names = [f"{key} {told[key]}" for key in ("cpu family", "model", "stepping") if key in told]
    return {
        "processor": ", ".join([told.get("model name", platform.machine()), *names]),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
    }


def load() -> dict:
    """The record: the `machine` that made it, and `cases` by name."""
    return json.loads(RECORD.read_text(encoding="utf-8"))


def write(record: dict) -> None:
    """Writes the record, a line a value or list of values, so that git shows what has changed."""
    text = json.dumps(record, indent=1)
    text = re.sub(r"\[[^\[\]{}]+\]", lambda found: " ".join(found[0].split()), text)
    RECORD.write_text(text.replace("[ ", "[").replace(" ]", "]") + "\n", encoding="utf-8")


def main() -> int:
    """Records, or compares and returns how many cases differ."""
    parser = argparse.ArgumentParser(description="Compares short trainings with their record.")
    parser.add_argument("--record", action="store_true", help="write golden.json anew")
    parser.add_argument("--program", type=Path, default=HERE.parent / "standalone", metavar="DIR")
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.program))
    program = importlib.import_module("cifar10_ast")
    if arguments.record:
        write({"machine": machine(), "cases": {name: play(program, name) for name in NAMES}})
        return 0
    record, failed = load(), 0
    exact = record["machine"] == machine()
    print("the record's processor and torch: exactly" if exact else "another processor or torch: roughly")
    for name, recorded in record["cases"].items():
        began = time.perf_counter()
        lines = differences(recorded, play(program, name), exact)
        seconds = time.perf_counter() - began
        print(f"{name}: {'same' if not lines else f'{len(lines)} differences'} ({seconds:.1f} s)")
        print(*(f"    {line}" for line in lines[:8]), sep="\n", end="\n" if lines else "")
        failed += bool(lines)
    return failed


if __name__ == "__main__":
    sys.exit(main())
