"""Tables and figures from the finished runs of compare.py.

    python benchmarks/evidence.py            # docs/result.png and docs/tail.png
    python benchmarks/evidence.py BED        # every policy that was run on a bed, also those of the search

`docs/make_docs.py` takes the tables from here into docs/ and README.md.
"""

import argparse
import functools
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import books
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import t as student

ROOT = Path(__file__).parents[1]
JUDGES = {"test": "test images", "held_out": "held-out training images"}
MARGIN = 0.3  # points below full's accuracy that still count as not inferior; fixed before any run
NOTHING = "Not measured yet."
WORTH_A_SAVING = 4  # seeds; a bootstrap over fewer looks surer than it is
FAR = 2.0  # times the next shorter length of plain training: too far to interpolate
PHASES = "lean warmup_epochs ramp_epochs anneal_epochs".split()
RECIPE = "epochs batch_size lr weight_decay label_smoothing".split()  # both act on chance too
COLOURS = {"ast": "#d55e00", "random": "#0072b2", "full": "#666666", "short": "#009e73"}


def half_width(values: list[float]) -> float:
    """Half the 95 % interval of the mean, by Student's t; infinite for one value."""
    if len(values) < 2:
        return math.inf
    return float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


def load(bed: str, judged: str = "test", results: Path | None = None) -> dict[str, dict[int, dict]]:
    """Finished runs of a bed, by policy and seed in order; `judged` is test or held_out."""
    found = [
        run
        for run in books.read((results or books.RESULTS) / f"{bed}.jsonl")
        if run.get("judged_on") == JUDGES[judged]
    ]
    runs: dict[str, dict[int, dict]] = defaultdict(dict)
    for run in sorted(found, key=lambda run: (run["policy"], run["seed"])):
        runs[run["policy"]][run["seed"]] = run
    return dict(runs)


def searched() -> list[str]:
    """Beds with runs that were judged on held-out training images."""
    return [bed for bed in sorted(f.stem for f in books.RESULTS.glob("*.jsonl")) if load(bed, "held_out")]


@dataclass
class Gap:
    """A paired difference: its mean, half its 95 % interval, and the number of seeds (shown in brackets)."""

    mean: float
    half: float
    seeds: int

    def __str__(self) -> str:
        width = f" ± {self.half:.2f}" if self.seeds > 1 else ""
        return f"{self.mean:+.2f}{width} ({self.seeds})"


def gap(runs: dict, policy: str, rival: str | None, key: str = "accuracy") -> Gap | None:
    """`policy` minus `rival` over the seeds that both have; None without such."""
    ours, theirs = (keep_with(runs.get(name, {}), key) for name in (policy, rival))
    shared = ours.keys() & theirs.keys()
    if not shared or policy == rival:
        return None
    pairs = [ours[seed][key] - theirs[seed][key] for seed in sorted(shared)]
    return Gap(statistics.mean(pairs), half_width(pairs), len(pairs))


def keep_with(runs: dict[int, dict], key: str) -> dict[int, dict]:
    """The runs that know a figure."""
    return {seed: run for seed, run in runs.items() if run.get(key) is not None}


def mean(runs: dict[int, dict], key: str) -> float:
    """Mean of a figure over the seeds of a policy."""
    return statistics.mean(run[key] for run in runs.values())


def rival_of(policy: str) -> str | None:
    """Random selection at the same rate, with the same phases and recipe; None where none is meant."""
    head, _, tail = policy.partition(":")
    kind, _, share = head.partition("@")
    if not share or kind in ("short", "rs2", "random"):
        return None
    shared = [item for item in tail.split(",") if item.partition("=")[0] in (*PHASES, *RECIPE)]
    return ":".join(["random@" + share, *([",".join(shared)] if shared else [])])


def plain_at_its_cost(runs: dict, policy: str) -> str | None:
    """The shortest plain training that costs as much as `policy`, or up to an eighth more; None without
    such. Whole epochs seldom meet a cost exactly."""
    cost = mean(runs[policy], "cost")
    near = [(mean(own, "cost"), name) for name, own in runs.items() if name.startswith("short")]
    near = [pair for pair in near if cost - 1e-6 <= pair[0] <= 9 / 8 * cost and ":" not in pair[1]]
    return min(near)[1] if near and not is_plain(policy) else None


def a_little_dearer(runs: dict, policy: str) -> str | None:
    """InfoBatch, if it was run and cost as much as a policy of AST's, or up to a third more."""
    if "infobatch" not in runs or not policy.startswith("ast"):
        return None
    times = mean(runs["infobatch"], "cost") / mean(runs[policy], "cost")
    return "infobatch" if 1 - 1e-6 <= times <= 4 / 3 else None


def balanced_rival(runs: dict, policy: str) -> str | None:
    """As many of every class by chance, at the same rate."""
    chance = rival_of(policy) if policy.startswith("ast") else None
    return chance and chance.replace("random", "balanced")


def average(runs: dict, policy: str, key: str, form: str) -> str:
    """Mean of a figure where every run knows it; a dash else, and for the seconds of a shared GPU."""
    own = runs[policy]
    silent = len(keep_with(own, key)) < len(own) or (key.endswith("seconds") and crowded(own))
    return "-" if silent else format(mean(own, key), form)


def accuracy(runs: dict, policy: str) -> str:
    """Mean accuracy with its 95 % interval."""
    values = [run["accuracy"] for run in runs[policy].values()]
    return f"{statistics.mean(values):.2f}" + (f" ± {half_width(values):.2f}" if len(values) > 1 else "")


def beside_full(runs: dict, policy: str) -> str:
    """The gap to full training, and whether it is proven to be within the margin."""
    full = gap(runs, policy, "full")
    proven = full and full.seeds > 1 and full.mean - full.half > -MARGIN
    return told(full, len(runs[policy])) + (" (not inferior)" if proven else "")


def saved(runs: dict, policy: str) -> str:
    """FLOPs saved at equal accuracy, with the interval, in words; a dash where that cannot be told."""
    if is_plain(policy) or len(runs[policy]) < WORTH_A_SAVING:
        return "-"
    share, ends = saving_at_equal_accuracy(runs, policy), saving_interval(runs, policy)
    return "-" if None in (share, ends) else f"{share:.0f} % ({ends[0]:.0f} to {ends[1]:.0f})"


def minus(rival: Callable[[dict, str], str | None], key: str = "accuracy") -> Callable[[dict, str], str]:
    """A column of differences to a rival."""
    return lambda runs, policy: told(gap(runs, policy, rival(runs, policy), key), len(runs[policy]))


def told(found: Gap | None, seeds: int) -> str:
    """A difference; its seeds in brackets where they are not those of the row."""
    return str(found or "-").removesuffix(f" ({seeds})")


def figure_of(key: str, form: str) -> Callable[[dict, str], str]:
    """A column of means."""
    return lambda runs, policy: average(runs, policy, key, form)


Column = Callable[[dict, str], str]
COLUMNS: dict[str, Column] = {
    "seeds": lambda runs, policy: str(len(runs[policy])),
    "FLOPs ÷ full's": figure_of("cost", ".3f"),
    "accuracy, %": accuracy,
    "worst class": figure_of("worst_class", ".1f"),
    "minus `random`": minus(lambda runs, policy: rival_of(policy)),
    "minus `balanced`": minus(balanced_rival),
    "minus `short`": minus(plain_at_its_cost),
    "minus `infobatch`": minus(a_little_dearer),
    "minus `full`": beside_full,
    "saved at equal accuracy": saved,
    "natural": figure_of("natural_accuracy", ".2f"),
    "natural minus `random`": minus(lambda runs, policy: rival_of(policy), "natural_accuracy"),
    "chosen wrong": figure_of("wrong_share", ".0%"),
    "chosen frames": figure_of("repeat_share", ".0%"),
    "training s": figure_of("train_seconds", ".0f"),
    "joules": figure_of("joules", ".0f"),
}


def table(
    bed: str, judged: str = "test", results: Path | None = None, shown: str = "", without: str = ""
) -> str:
    """The policies of a bed, dearest first, as markdown; `shown` is a pattern of their names. A column that
    tells nothing of any policy is left out, and so are those that `without` names."""
    runs = load(bed, judged, results)
    names = [name for name in runs if re.search(shown, name)]
    names.sort(key=lambda name: -mean(runs[name], "cost"))
    left = {name: column for name, column in COLUMNS.items() if name not in without.split(", ")}
    return as_markdown({"policy": names} | {h: [c(runs, name) for name in names] for h, c in left.items()})


def as_markdown(columns: dict[str, list[str]]) -> str:
    """A table of columns by heading; those that hold only dashes are left out."""
    told = {head: cells for head, cells in columns.items() if any(cell != "-" for cell in cells)}
    if not told:
        return NOTHING
    rows = [list(told), ["---"] * len(told), *zip(*told.values(), strict=True)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows).replace(" --- ", "---")


def crowded(runs: dict[int, dict]) -> bool:
    """Whether runs shared a GPU, so that their seconds say nothing."""
    return any("side_by_side" in run for run in runs.values())


def where(*beds: str, judged: str = "test") -> str:
    """Machine, days and number of the runs on beds, in one sentence."""
    runs = [run for bed in beds for own in load(bed, judged).values() for run in own.values()]
    if not runs:
        return NOTHING
    one = {key: ", ".join(sorted({str(run[key]) for run in runs})) for key in ("device", "torch", "date")}
    return f"{len(runs)} runs on {one['device']}, torch {one['torch']}, {one['date']}."


def saving_at_equal_accuracy(runs: dict, policy: str) -> float | None:
    """Share of the FLOPs that `policy` saves against plain training cut to the same accuracy, percent.

    Plain training's cost at that accuracy is interpolated between those of `full` and the `short` runs that
    are more accurate than every cheaper one; None outside of them, and between lengths so far apart that a
    straight line would make plain training look dear.
    """
    cost = plain_cost(runs, mean(runs[policy], "accuracy"))
    return None if cost is None else 100 * (1 - mean(runs[policy], "cost") / cost)


def plain_cost(runs: dict, accuracy: float) -> float | None:
    """Plain training's cost at an accuracy, a share of full training's; None where that cannot be told."""
    costs, accuracies = [], []
    for cost, reached in sorted((mean(own, "cost"), mean(own, "accuracy")) for own in plain(runs)):
        if not accuracies or reached > accuracies[-1]:
            costs.append(cost)
            accuracies.append(reached)
    if len(costs) < 2 or not accuracies[0] <= accuracy <= accuracies[-1]:
        return None
    above = max(1, int(np.searchsorted(accuracies, accuracy)))
    if costs[above] > FAR * costs[above - 1] + 1e-9:
        return None
    return float(np.interp(accuracy, accuracies, costs))


def saving_interval(runs: dict, policy: str, draws: int = 1000) -> tuple[float, float] | None:
    """The 95 % interval of what `policy` saves at equal accuracy, percent: percentiles of a bootstrap over
    the seeds that it shares with plain training of every length. None without such, and where more than one
    draw in forty is outside plain training's range: it might lie beyond either end."""
    names = [policy, *(name for name in runs if is_plain(name))]
    shared = sorted(set.intersection(*(set(runs[name]) for name in names)))
    if not shared:
        return None
    found = [
        saving_at_equal_accuracy(
            {name: {i: runs[name][seed] for i, seed in enumerate(draw)} for name in names}, policy
        )
        for draw in np.random.default_rng(0).choice(shared, (draws, len(shared))).tolist()
    ]
    low, high = (
        np.percentile([beyond if one is None else one for one in found], share, method="nearest")
        for share, beyond in ((2.5, -math.inf), (97.5, math.inf))
    )
    return (float(low), float(high)) if math.isfinite(high - low) else None


def plain(runs: dict) -> list[dict[int, dict]]:
    """Runs of plain training, whole and cut short, on the bed's own recipe."""
    return [own for name, own in runs.items() if is_plain(name)]


def is_plain(policy: str) -> bool:
    """Whether a policy is plain training on the bed's own recipe."""
    return policy.startswith(("full", "short")) and ":" not in policy


def frontier(axis: Axes, runs: dict, kind: str = "", saver: str = "") -> None:
    """Accuracy with 95 % intervals against cost: FLOPs where seconds say nothing. A line a policy, named
    beside it; `kind` follows AST's names, and what the policy `saver` saves stands at its gap."""
    crowd = any(crowded(own) for own in runs.values())
    key = "cost" if crowd else "train_seconds"
    patterns = {"short": "full|short@[0-9.]+", "random": "random@[0-9.]+", "ast": f"ast@[0-9.]+{kind}"}
    for family, pattern in patterns.items():
        names = [name for name in runs if re.fullmatch(pattern, name)]
        points = sorted((mean(runs[name], key), mean(runs[name], "accuracy"), name) for name in names)
        axis.plot([x for x, _, _ in points], [y for _, y, _ in points], color=COLOURS[family], lw=1.2)
        for x, y, name in points:
            values = [run["accuracy"] for run in runs[name].values()]
            width, colour = half_width(values) if len(values) > 1 else 0, COLOURS[name.partition("@")[0]]
            axis.errorbar(x, y, yerr=width, fmt="o", ms=5, capsize=3, color=colour, lw=1.2)
    axis.set_xlabel(
        "FLOPs, a share of full training's, scoring included"
        if crowd
        else "training seconds, scoring included"
    )
    axis.set_ylabel("test accuracy, %")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if saver:
        show_saving(axis, runs, saver)


def show_saving(axis: Axes, runs: dict, policy: str) -> None:
    """An arrow from a policy to plain training of its accuracy, with what lies between."""
    ours, accuracy = mean(runs[policy], "cost"), mean(runs[policy], "accuracy")
    theirs = plain_cost(runs, accuracy)
    arrow = {"arrowstyle": "<->", "color": "black", "lw": 1.2, "shrinkA": 5, "shrinkB": 0}
    axis.annotate("", (theirs, accuracy), (ours, accuracy), arrowprops=arrow)
    at = {"xytext": (-8, -22), "textcoords": "offset points", "va": "top", "fontsize": 11}
    axis.annotate(f"the same accuracy for\n{saved(runs, policy)} fewer FLOPs", (theirs, accuracy), **at)


# A picture: bed, what follows AST's names, whose saving is told, title, and where names stand: policy, words,
# offset in points.
PICTURES = {
    "result": (
        "whole",
        "",
        "ast@0.4",
        "All of CIFAR-10, `resnet`, 20 epochs",
        {
            "ast@0.57": ("AST", (9, 3)),
            "full": ("full training", (-75, 6)),
            "random@0.2": ("random selection of as many images", (10, -6)),
            "short@0.7500": ("short: fewer epochs", (12, -12)),
        },
    ),
    "tail": (
        "tail-gpu",
        ":balance=true",
        "ast@0.4:balance=true",
        "CIFAR-10 with a long tail, 16 epochs",
        {
            "ast@0.6:balance=true": ("AST with --balance", (9, 3)),
            "full": ("full training", (-75, 8)),
            "random@0.1": ("random selection of as many images", (10, -10)),
            "short@0.6250": ("short: fewer epochs", (10, -12)),
        },
    ),
}


def draw(name: str) -> None:
    """Writes docs/NAME.png."""
    bed, kind, saver, title, labels = PICTURES[name]
    figure = Figure(figsize=(8.3, 4.2), layout="constrained")
    axis, runs = figure.subplots(), load(bed)
    frontier(axis, runs, kind, saver)
    seeds = len(runs[saver])
    axis.set_title(f"{title}, {seeds} seeds (bars: 95 % intervals)".replace("`", ""), loc="left", fontsize=11)
    for policy, (words, offset) in labels.items():
        point, colour = (mean(runs[policy], "cost"), mean(runs[policy], "accuracy")), policy.partition("@")[0]
        axis.annotate(words, point, offset, textcoords="offset points", color=COLOURS[colour], fontsize=11)
    figure.savefig(ROOT / "docs" / f"{name}.png", dpi=150)


def spread(trials: list, default: str) -> tuple[str, str, str]:
    """Of trials of the search: how many were run, the best and the worst against the rule they change."""
    found = []
    for trial in trials:
        for bed in trial.beds:
            if one := gap(load_searched(bed), trial.run, default):
                found.append((one.mean, f"`{trial.policy}` {one}" + ("" if bed == "tail" else f", {bed}")))
    return (str(len(found)), max(found)[1], min(found)[1]) if found else ("0", "-", "-")


@functools.cache
def load_searched(bed: str) -> dict[str, dict[int, dict]]:
    """The runs of a bed that held-out images judged."""
    return load(bed, "held_out")


def main() -> None:
    """Draws both pictures, or prints all that was run on a bed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("bed", nargs="?", help="print its policies, on test images and on held-out ones")
    if bed := parser.parse_args().bed:
        for judged, who in JUDGES.items():
            print(f"\n{who}: {where(bed, judged=judged)}\n\n{table(bed, judged)}")
        return
    for name in PICTURES:
        draw(name)


if __name__ == "__main__":
    main()
