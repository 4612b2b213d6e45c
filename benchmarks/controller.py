"""Step responses of the controller on recorded significance, against the original reports' gains.

    python benchmarks/controller.py --data path/to/cifar10            # two minutes; numbers and a figure
    python benchmarks/controller.py --poles                           # the linearised loop, at once

The losses of every sample in every epoch of a plain training run are recorded once; then gates are fed with
them as if they trained, so that each controller meets the very same drifting significance. The target stands
at 0.5 for two epochs and then steps to the value in question.
"""

import argparse
import math
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


def loop(alpha: float, kp: float, ki: float, gain: float = 1.0, late: bool = False) -> np.ndarray:
    """The linearised loop as a matrix [3, 3]: a chunk's step of (smoothed error, integral, rate asked for).

    Asked for beyond the solve is r = kp·error + integral, and `gain` times that comes: 1 where the slope that
    the controller divides by is the true one. late: the error is seen a chunk later.
    """
    asked = np.array([kp, 1.0, 0.0])
    answer = np.array([0.0, 0.0, 1.0]) if late else asked
    error = np.array([1 - alpha, 0.0, 0.0]) - alpha * gain * answer
    return np.stack([error, np.array([0.0, 1.0, 0.0]) + ki * error, asked])


def largest_pole(matrix: np.ndarray) -> float:
    """The modulus of the slowest eigenvalue: what is left of an error after a chunk; from 1 up it grows."""
    return float(np.abs(np.linalg.eigvals(matrix)).max())


def gain_limit(alpha: float, kp: float, ki: float, late: bool) -> float:
    """The gain up to which the loop is stable."""
    low, high = 0.0, 1e6
    while high - low > 1e-4 * high:
        middle = math.sqrt(max(low, 1e-3) * high)
        stable = largest_pole(loop(alpha, kp, ki, middle, late)) < 1
        low, high = (middle, high) if stable else (low, middle)
    return low


def poles() -> list[dict]:
    """The loop of each controller: its slowest pole, the chunks until 2 % of an error is left, and the gains
    up to which it is stable. The slope of the pure loops is that of uniform ranks at a = 0.4."""
    ranks = (torch.arange(1000) + 0.5) / 1000
    threshold = ast.solve_threshold(ranks, 400, 0.4, 0.25)
    slope = -ast.threshold_slope(ranks, threshold, 0.4, 0.25)
    own = ast.Controller.KP, ast.Controller.KI
    loops = [("solve + PI", alpha, *own) for alpha in (0.1, 0.3, 1.0)]
    loops += [("PI, original gains", 0.3, 0.005 * slope, 0.0001 * slope)]
    loops += [("PI, gains 1 and 0.5", 0.3, slope, 0.5 * slope)]
    rows = []
    for name, *how in loops:
        pole = largest_pole(loop(*how))
        limits = {"stable_to": gain_limit(*how, late=False), "stable_to_late": gain_limit(*how, late=True)}
        left = math.ceil(math.log(0.02) / math.log(pole))
        rows.append({"controller": name, "ema_alpha": how[0], "pole": pole, "chunks": left, **limits})
    return rows


def draw(traces: dict, file: Path) -> None:
    """A panel a gate and controller, a line a target, named at its right end."""
    kinds, targets = ("remembered", "live"), TARGETS[::2]
    colours = dict(zip(CONTROLLERS, ("#d55e00", "#666666", "#0072b2"), strict=True))
    figure, axes = plt.subplots(len(kinds), len(CONTROLLERS), figsize=(8.3, 4.4), sharex=True, sharey=True)
    for row, kind in zip(axes, kinds, strict=True):
        for axis, name in zip(row, CONTROLLERS, strict=True):
            for target in targets:
                trace = np.array(traces[kind, name, target])
                smooth = np.convolve(trace[:, 1], np.ones(SHOWN) / SHOWN, mode="valid")
                axis.plot(trace[SHOWN - 1 :, 0], smooth, lw=1, color=colours[name])
                axis.axhline(target, xmin=BEFORE / (EPOCHS - 1), color="black", lw=0.8, ls=":")
                axis.text(EPOCHS - 0.9, target, f"{target:g}", va="center", fontsize=9)
            axis.set_title(f"{kind}: {name}", fontsize=10, loc="left")
            axis.set(xlim=(0, EPOCHS - 1), ylim=(0, 1))
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.25)
    for axis in axes[-1]:
        axis.set_xlabel("epochs")
    for row in axes:
        row[0].set_ylabel("activation rate")
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def main() -> None:
    """Records, replays, adds a line to benchmarks/results/bars.jsonl and draws docs/controller.png."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", default="cifar10", help="CIFAR-10: a path, or cifar10 to search for it")
    parser.add_argument("--poles", action="store_true", help="the linearised loop alone")
    given = parser.parse_args()
    if given.poles:
        print(*poles(), sep="\n")
        return
    data = ast.load_data(ast.Settings(data=given.data, data_dir="data"), print)
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
