"""Step responses of the controller on recorded significance, against the original reports' gains.

    python benchmarks/controller.py --data path/to/cifar10            # two minutes; numbers and a figure

The losses of every sample in every epoch of a plain training run are recorded once; then gates are fed with
them as if they trained, so that each controller meets the very same drifting significance. The target stands
at 0.5 for two epochs and then steps to the value in question.
"""

import argparse
import time
from pathlib import Path

import books
import compare
import matplotlib.pyplot as plt
import numpy as np
import torch
from beds import BEDS, ast
from torch import Tensor

ROOT = Path(__file__).parents[1]
TARGETS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95)
BEFORE, EPOCHS, BATCH = 2, 10, 128  # epochs at 0.5 before the step, epochs in all, samples a batch
BAND = 0.1  # settled: the smoothed rate stays within this share of the target
SMOOTHED = 2560  # candidates over which the realised rate is averaged
SHOWN = 10  # decisions averaged in the figure
CONTROLLERS = {
    "solve + PI": {},
    "PI, original gains": {"feedforward": False},
    "PI, gains 1 and 0.5": {"feedforward": False, "adapt_kp": 1.0, "adapt_ki": 0.5},
}


class Recorder(ast.RandomGate):
    """Activates everything and writes down every loss."""

    def __init__(self, n: int):
        super().__init__()
        self.epochs: list[Tensor] = []
        self.n, self.seen = n, 0

    def observe(self, indices: Tensor, losses: Tensor) -> None:
        """Keeps the losses [k] of the samples `indices` [k] in the row of their epoch."""
        if self.seen % self.n == 0:
            self.epochs.append(torch.zeros(self.n))
        self.epochs[-1][indices] = losses
        self.seen += len(indices)


def record(data: ast.ImageData) -> Tensor:
    """Losses [epochs, n] of the bed `ten`, trained plainly."""
    bed = BEDS["ten"]
    split = bed.split(data, held_out=True)
    recorder = Recorder(len(split.labels))
    plain = compare.Policy({"epochs": EPOCHS, "target_activation": 1.0}, lambda *_: recorder)
    compare.build(bed, plain, 0, split).train()
    return torch.stack(recorder.epochs)


def replay(losses: Tensor, kind: str, target: float, **settings: object) -> list[tuple[float, float]]:
    """(epochs, activation rate) of every decision of a gate that meets the recorded losses."""
    n, generator = losses.shape[1], torch.Generator().manual_seed(0)
    config, now, spent = ast.ASTConfig(gate=kind, **settings), 0, 0.0
    if kind == "remembered":
        gate = ast.RememberedGate(config, n)
        gate.observe(torch.arange(n), losses[0])
    else:
        gate = ast.LiveGate(config, lambda images, labels: losses[now][images])
    trace = []
    for epoch in range(1, EPOCHS):
        now, rate = epoch, 0.5 if epoch <= BEFORE else target
        chunk = int(min(n / 20, 4 * BATCH / rate)) if kind == "remembered" else BATCH
        for candidates in torch.randperm(n, generator=generator).split(chunk):
            offered = candidates
            if kind == "live":
                offered = ast.Batch(candidates, candidates, candidates, candidates, candidates[:0])
            chosen, _ = gate.select(offered, rate, generator)
            gate.observe(chosen, losses[epoch][chosen])
            spent += len(candidates) / n
            trace.append((spent, len(chosen) / len(candidates)))
    return trace


def judge(trace: list[tuple[float, float]], target: float, n: int) -> dict:
    """Settling time (epochs after the step), overshoot and remaining error of a response.

    The rate is averaged over the last SMOOTHED candidates since the step. Settled means that it stays within
    BAND of the target, or within four standard deviations of what pure chance would do, if that is more (two
    would be left by chance alone, in as many decisions).
    """
    times, rates = (np.array(column) for column in zip(*trace, strict=True))
    after = times > BEFORE + 1e-6  # sums of fractions are not exact
    begins = np.concatenate([[0.0], times[:-1]])
    sizes = (times - begins)[after] * n
    taken = rates[after] * sizes
    moved = times[after] - BEFORE
    smooth = np.empty(len(moved))
    for i in range(len(moved)):
        window = np.cumsum(sizes[: i + 1][::-1]) <= SMOOTHED + sizes[i]
        smooth[i] = taken[: i + 1][::-1][window].sum() / sizes[: i + 1][::-1][window].sum()
    band = max(BAND * target, 4 * np.sqrt(target * (1 - target) / SMOOTHED))
    outside = moved[np.abs(smooth - target) > band]
    settled = float(outside[-1]) if len(outside) else 0.0
    sign = np.sign(target - 0.5)
    return {
        "settling_epochs": None if settled > moved[-1] - 0.25 else round(settled, 3),
        "overshoot": round(max(0.0, float((sign * (smooth - target)).max())), 4),
        "error_at_the_end": round(float(np.average(rates[after][-len(moved) // 4 :]) - target), 4),
    }


def draw(traces: dict, file: Path) -> None:
    """A panel a gate and controller, a line a target."""
    kinds = ("remembered", "live")
    figure, axes = plt.subplots(len(kinds), len(CONTROLLERS), figsize=(11, 5.2), sharex=True, sharey=True)
    for row, kind in zip(axes, kinds, strict=True):
        for axis, name in zip(row, CONTROLLERS, strict=True):
            for target in TARGETS:
                trace = np.array(traces[kind, name, target])
                smooth = np.convolve(trace[:, 1], np.ones(SHOWN) / SHOWN, mode="valid")
                (line,) = axis.plot(trace[SHOWN - 1 :, 0], smooth, lw=1)
                axis.axhline(target, xmin=BEFORE / (EPOCHS - 1), color=line.get_color(), lw=0.6, ls=":")
            axis.set_title(f"{kind}: {name}", fontsize=9)
            axis.grid(alpha=0.2)
    for axis in axes[-1]:
        axis.set_xlabel("epochs")
    for row in axes:
        row[0].set_ylabel("activation rate")
    figure.tight_layout()
    figure.savefig(file, dpi=80)


def main() -> None:
    """Records, replays, adds a line to benchmarks/results/bars.jsonl and draws docs/controller.png."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", default="cifar10", help="CIFAR-10: a path, or cifar10 to search for it")
    data = ast.load_data(ast.Settings(data=parser.parse_args().data, data_dir="data"), print)
    losses = record(data)
    traces, rows = {}, []
    for kind in ("remembered", "live"):
        for name, settings in CONTROLLERS.items():
            for target in TARGETS:
                trace = traces[kind, name, target] = replay(losses, kind, target, **settings)
                rows.append(
                    {
                        "gate": kind,
                        "controller": name,
                        "target": target,
                        **judge(trace, target, losses.shape[1]),
                    }
                )
    for row in rows:
        print(row)
    found = {
        "rows": rows,
        "stream": f"{BEDS['ten'].what}: losses of {EPOCHS} epochs of plain training",
        "step": f"from 0.5 after {BEFORE} epochs",
        "band": BAND,
        "smoothed": SMOOTHED,
        "command": "python benchmarks/controller.py",
        "device": ast.device_name("cpu"),
        "date": time.strftime("%Y-%m-%d"),
    }
    books.measured("controller", found)
    draw(traces, ROOT / "docs" / "controller.png")


if __name__ == "__main__":
    main()
