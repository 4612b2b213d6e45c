"""Tables and figures from the finished runs of compare.py.

    python benchmarks/evidence.py        # docs/frontier_*.png and docs/savings_*.png

`docs/make_docs.py` takes the tables from here into docs/evidence.md and README.md.
"""

import math
import re
import statistics
from collections import defaultdict
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
PICTURED = ("whole", "all", "tail", "tail-gpu", "filmed", "ten", "two-long", "long")
WORTH_A_LINE = 3  # seeds that a row of the headline shares with a rival, or full has for a figure of savings
FAR = 2.5  # times the next shorter length of plain training: too far to interpolate
PHASES = "lean warmup_epochs ramp_epochs anneal_epochs".split()
RECIPE = "epochs batch_size lr weight_decay label_smoothing".split()  # both act on chance too
SHARES = (0.90, 0.95, 0.99, 1.00)  # of full's accuracy, for the time to reach it


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


def gap(runs: dict, policy: str, rival: str, key: str = "accuracy") -> Gap | None:
    """`policy` minus `rival` over the seeds that both have; None without such."""
    shared = runs.get(policy, {}).keys() & runs.get(rival, {}).keys()
    if not shared or policy == rival:
        return None
    pairs = [runs[policy][seed][key] - runs[rival][seed][key] for seed in sorted(shared)]
    return Gap(statistics.mean(pairs), half_width(pairs), len(pairs))


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
    return min(near)[1] if near else None


def seconds_to(runs: dict, policy: str, share: float) -> float | None:
    """Mean training seconds until a share of full's final accuracy; None where a seed never gets there, NaN
    where there is no full run of its seeds or the seconds say nothing."""
    if crowded(runs[policy]):
        return math.nan
    times = []
    for seed, run in runs[policy].items():
        if seed not in runs.get("full", {}):
            continue
        goal = share * runs["full"][seed]["accuracy"]
        reached = [seconds for seconds, accuracy in run["curve"] if accuracy >= goal]
        if not reached:
            return None
        times.append(reached[0])
    return statistics.mean(times) if times else math.nan


def table(bed: str, judged: str = "test", results: Path | None = None) -> str:
    """Accuracy and cost of every policy, dearest first, as markdown."""
    runs = load(bed, judged, results)
    if not runs:
        return NOTHING
    head = (
        "| policy | seeds | accuracy, % | worst class | minus `random` at its rate | minus `full` | "
        "activated | FLOPs ÷ full's | training s | total s | joules in all |"
    )
    rows = [head, "|" + "---|" * 11]
    for name, own in sorted(runs.items(), key=lambda item: -mean(item[1], "cost")):
        accuracies = [run["accuracy"] for run in own.values()]
        width = f" ± {half_width(accuracies):.2f}" if len(own) > 1 else ""
        rival, full = rival_of(name), gap(runs, name, "full")
        against = rival and gap(runs, name, rival)
        rows.append(
            f"| {name} | {len(own)} | {statistics.mean(accuracies):.2f}{width} | "
            f"{mean(own, 'worst_class'):.1f} | {against or '-'} | {full or '-'}{verdict(full)} | "
            f"{mean(own, 'activation_rate'):.3f}{chosen(own)} | {mean(own, 'cost'):.3f} | "
            f"{seconds(own, 'train_seconds')} | {seconds(own, 'total_seconds')} | {joules(own)} |"
        )
    return "\n".join(rows)


def chosen(runs: dict[int, dict]) -> str:
    """Shares of wrong labels and of repeats among what the gate activated; nothing where none are, or none
    was chosen."""
    words = ""
    for key, kind in (("wrong_share", "wrong"), ("repeat_share", "frames")):
        shares = [share for run in runs.values() if (share := run.get(key)) is not None]
        words += f", {statistics.mean(shares):.0%} of the chosen {kind}" if shares else ""
    return words


def natural(bed: str) -> str:
    """Accuracy on balanced classes, and as if classes were as frequent as in training, as markdown."""
    every = {name: keep_with(own, "natural_accuracy") for name, own in load(bed).items()}
    runs = {name: own for name, own in every.items() if own}
    if not runs:
        return NOTHING
    kinds = ("accuracy", "natural_accuracy")
    rows = [
        "| policy | seeds | FLOPs ÷ full's | classes alike | minus `random` | as frequent as in training | "
        "minus `random` |",
        "|" + "---|" * 7,
    ]
    for name, own in sorted(runs.items(), key=lambda item: -mean(item[1], "cost")):
        cells = [f"{mean(own, k):.2f} | {gap(runs, name, rival_of(name) or '', k) or '-'}" for k in kinds]
        rows.append(f"| {name} | {len(own)} | {mean(own, 'cost'):.3f} | {' | '.join(cells)} |")
    return "\n".join(rows)


def keep_with(runs: dict[int, dict], key: str) -> dict[int, dict]:
    """The runs that know a figure."""
    return {seed: run for seed, run in runs.items() if key in run}


def joules(runs: dict[int, dict]) -> str:
    """Mean joules of a policy; a dash without a sensor, of which the line below a table says why."""
    return f"{mean(runs, 'joules'):.0f}" if all(run["joules"] is not None for run in runs.values()) else "-"


def headline(beds: dict[str, str], some: dict[str, tuple[str, ...]] | None = None) -> str:
    """AST against its rivals at each rate, a row a bed and rate that has the seeds; `beds` names each bed in
    words, `some` the rates shown of a bed that has too many."""
    rows = [
        "| trained on | a | AST, % | minus `random` | minus `balanced` | minus `short`, up to ⅛ dearer | "
        "minus `infobatch`, up to ⅓ dearer | minus `full` | saved: training time; FLOPs |",
        "|" + "---|" * 9,
    ]
    for bed, words in beds.items():
        runs = load(bed)
        wanted = (some or {}).get(bed)
        for rate, name in default_rows(runs) if "full" in runs else ():
            if wanted and rate not in wanted:
                continue
            full, infobatch = gap(runs, name, "full"), a_little_dearer(runs, name, "infobatch")
            chance = rival_of(name)
            rivals = [chance, chance.replace("random", "balanced"), plain_at_its_cost(runs, name), infobatch]
            gaps = [rival and gap(runs, name, rival) for rival in rivals]
            if max((one.seeds for one in (*gaps, full) if one), default=0) < WORTH_A_LINE:
                continue
            shown = [str(one or "-") for one in gaps]
            rows.append(
                f"| {words} | {rate} | {mean(runs[name], 'accuracy'):.2f} | "
                f"{' | '.join(shown)} | {full or '-'}{verdict(full)} | "
                f"{time_saved(runs, name)}; {100 * (1 - mean(runs[name], 'cost')):.0f} % |"
            )
    return "\n".join(rows) if len(rows) > 2 else NOTHING


def default_rows(runs: dict) -> list[tuple[str, str]]:
    """Activation rates in words, highest first, then those with balance or lean phases, and the policy that
    is AST there."""
    found = {}
    for name in sorted(runs, key=len, reverse=True):
        if match := re.fullmatch(r"ast@([\d.]+)(?::(lean|balance=true))?", name):
            kind = {"lean": ", lean", "balance=true": ", balance"}.get(match[2], "")
            found[kind, -float(match[1])] = name
    return [(f"{-rate:g}{kind}", found[kind, rate]) for kind, rate in sorted(found)]


def a_little_dearer(runs: dict, policy: str, rival: str) -> str | None:
    """`rival`, if it was run and cost as much as `policy`, or up to a third more."""
    if rival not in runs:
        return None
    times = mean(runs[rival], "cost") / mean(runs[policy], "cost")
    return rival if 1 - 1e-6 <= times <= 4 / 3 else None


def time_saved(runs: dict, policy: str) -> str:
    """Training seconds saved against full training, over the seeds that both have on one device; a dash
    where there are none."""
    shared = runs[policy].keys() & runs["full"].keys()
    shared = [s for s in shared if runs[policy][s].get("device") == runs["full"][s].get("device")]
    if not shared or crowded(runs[policy]) or crowded(runs["full"]):
        return "-"
    ours, full = (sum(runs[name][seed]["train_seconds"] for seed in shared) for name in (policy, "full"))
    return f"{100 * (1 - ours / full):.0f} %"


def crowded(runs: dict[int, dict]) -> bool:
    """Whether runs shared a GPU, so that their seconds say nothing."""
    return any("side_by_side" in run for run in runs.values())


def seconds(runs: dict[int, dict], key: str) -> str:
    """Mean seconds; a dash where the runs shared a GPU."""
    return "-" if crowded(runs) else f"{mean(runs, key):.0f}"


def verdict(full: Gap | None) -> str:
    """Whether a gap to full training is proven to be within the margin."""
    return " (not inferior)" if full and full.seeds > 1 and full.mean - full.half > -MARGIN else ""


def times(bed: str) -> str:
    """Training seconds until shares of full's accuracy, as markdown."""
    runs = load(bed)
    if not runs:
        return NOTHING
    rows = ["| policy | " + " | ".join(f"{share:.0%}" for share in SHARES) + " |", "|" + "---|" * 5]
    for name in sorted(runs, key=lambda name: -mean(runs[name], "cost")):
        cells = [seconds_to(runs, name, share) for share in SHARES]
        words = ("never" if cell is None else "-" if math.isnan(cell) else f"{cell:.0f} s" for cell in cells)
        rows.append(f"| {name} | {' | '.join(words)} |")
    return "\n".join(rows)


def where(*beds: str, judged: str = "test") -> str:
    """Machine, days, programs and sensors of the runs on beds, in one sentence."""
    runs = [run for bed in beds for own in load(bed, judged).values() for run in own.values()]
    if not runs:
        return NOTHING
    one = {key: ", ".join(sorted({str(run[key]) for run in runs})) for key in ("device", "torch", "date")}
    programs = ", ".join(sorted({run["program"] for run in runs}))
    joules = ", ".join(sorted({run["joules_method"] for run in runs}))
    return (
        f"{len(runs)} runs on {one['device']}, torch {one['torch']}, {one['date']}; judged on "
        f"{runs[0]['judged_on']}; joules: {joules}; program {programs}."
    )


def saving_at_equal_accuracy(runs: dict, policy: str) -> float | None:
    """Share of the FLOPs that `policy` saves against plain training cut to the same accuracy, percent.

    Plain training's cost at that accuracy is interpolated between those of `full` and the `short` runs that
    are more accurate than every cheaper one; None outside of them, and between lengths so far apart that a
    straight line would make plain training look dear.
    """
    costs, accuracies = [], []
    for cost, accuracy in sorted((mean(own, "cost"), mean(own, "accuracy")) for own in plain(runs)):
        if not accuracies or accuracy > accuracies[-1]:
            costs.append(cost)
            accuracies.append(accuracy)
    accuracy = mean(runs[policy], "accuracy")
    if len(costs) < 2 or not accuracies[0] <= accuracy <= accuracies[-1]:
        return None
    above = max(1, int(np.searchsorted(accuracies, accuracy)))
    if costs[above] > FAR * costs[above - 1] + 1e-9:
        return None
    return 100 * (1 - mean(runs[policy], "cost") / float(np.interp(accuracy, accuracies, costs)))


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


def colour(policy: str) -> str:
    """The kit in blue, chance in grey, plain training in black, shuffled scores in red, others in orange."""
    families = {"ast": "C0", "random": "C7", "rs2": "C7", "full": "k", "short": "k", "shuffled": "C3"}
    return families.get(policy.partition("@")[0].partition(":")[0], "C1")


def frontier(axis: Axes, runs: dict) -> None:
    """Accuracy against training seconds, with 95 % intervals; plain training as a line. Where seconds say
    nothing, against FLOPs."""
    crowd = any(crowded(own) for own in runs.values())
    key, points = "cost" if crowd else "train_seconds", {}
    for name, own in runs.items():
        accuracies = [run["accuracy"] for run in own.values()]
        width = half_width(accuracies) if len(own) > 1 else 0
        points[name] = mean(own, key), statistics.mean(accuracies)
        axis.errorbar(*points[name], yerr=width, fmt="o", ms=4, color=colour(name), lw=1)
    line = sorted((mean(own, key), mean(own, "accuracy")) for own in plain(runs))
    axis.plot(*zip(*line, strict=True), color="k", lw=0.8, ls=":")
    axis.set_xlabel(
        "FLOPs ÷ full training's, scoring included" if crowd else "training seconds, scoring included"
    )
    axis.set_ylabel("accuracy, %")
    axis.grid(alpha=0.2)
    name_points(axis, points)


def name_points(axis: Axes, points: dict[str, tuple[float, float]]) -> None:
    """A name beside each point; where two would lie on each other, the upper one moves up."""
    axis.figure.draw_without_rendering()  # the scale is settled only then
    taken: list[tuple[np.ndarray, int]] = []  # points of a printer, 1/72 inch; length of the name
    for name, point in sorted(points.items(), key=lambda item: item[1][1]):
        anchor = axis.transData.transform(point) * 72 / axis.figure.dpi
        at = anchor + np.array([4, -6])
        while any(
            -4 * length < other[0] - at[0] < 4 * len(name) and abs(at[1] - other[1]) < 7
            for other, length in taken
        ):
            at[1] += 1
        taken.append((at, len(name)))
        axis.annotate(
            name, point, fontsize=6, color=colour(name), xytext=at - anchor, textcoords="offset points"
        )


def savings(axis: Axes, runs: dict) -> None:
    """FLOPs saved against plain training cut to the same accuracy, a bar a policy."""
    found = {name: saving_at_equal_accuracy(runs, name) for name in runs if not is_plain(name)}
    known = sorted((value, name) for name, value in found.items() if value is not None)
    axis.barh([name for _, name in known], [value for value, _ in known], color=[colour(n) for _, n in known])
    if beyond := [name for name, value in found.items() if value is None]:
        axis.set_title(f"outside plain training's range: {', '.join(beyond)}", fontsize=6, wrap=True)
    axis.axvline(0, color="k", lw=0.8)
    axis.set_xlabel("FLOPs saved against plain training cut to the same accuracy, %")
    axis.tick_params(axis="y", labelsize=7)
    axis.grid(axis="x", alpha=0.2)


def trial_table(trials: list, default: str) -> str:
    """What came of trials of the search, on held-out training images."""
    rows = [
        "| trial | expected | on | accuracy minus the default's | FLOPs ÷ full's | training s |",
        "|---|---|---|---|---|---|",
    ]
    for trial in trials:
        for bed in trial.beds:
            runs = load(bed, "held_out")
            found = gap(runs, trial.run, default)
            if trial.run not in runs or (found is None and trial.run != default):
                continue
            wrong = [run["wrong_share"] for run in runs[trial.run].values()]
            came = str(found or "the default itself")
            came += "" if wrong[0] is None else f"; {statistics.mean(wrong):.0%} wrong in gated epochs"
            cost, took = mean(runs[trial.run], "cost"), seconds(runs[trial.run], "train_seconds")
            rows.append(f"| `{trial.policy}` | {trial.expected} | {bed} | {came} | {cost:.3f} | {took} |")
    return "\n".join(rows) if len(rows) > 2 else NOTHING


def besides(named: set[tuple[str, str]]) -> dict[str, list[str]]:
    """Policies run on held-out images of each bed that are not among those named, as (bed, policy)."""
    found = {bed: [name for name in load(bed, "held_out") if (bed, name) not in named] for bed in searched()}
    return {bed: rest for bed, rest in found.items() if rest}


def rival_table(tried: dict[str, list[str]]) -> str:
    """Policies on held-out training images beside chance and plain training at their cost, bed by bed."""
    rows = [
        "| policy | on | seeds | accuracy, % | minus `random` | minus `short` | minus `full` | "
        "FLOPs ÷ full's |",
        "|" + "---|" * 8,
    ]
    for bed, names in tried.items():
        runs = load(bed, "held_out")
        for name in (name for name in names if name in runs):
            plain_one = None if is_plain(name) else plain_at_its_cost(runs, name)
            rivals = [rival_of(name), plain_one, "full"]
            gaps = " | ".join(str((rival and gap(runs, name, rival)) or "-") for rival in rivals)
            accuracy, cost = mean(runs[name], "accuracy"), mean(runs[name], "cost")
            rows.append(f"| `{name}` | {bed} | {len(runs[name])} | {accuracy:.2f} | {gaps} | {cost:.3f} |")
    return "\n".join(rows) if len(rows) > 2 else NOTHING


def main() -> None:
    """Draws both figures of the beds in PICTURED, without policies of which the search changed a setting."""
    for bed, every in ((bed, load(bed)) for bed in PICTURED):
        if "full" not in every:
            continue
        ours = {name for _, name in default_rows(every)}
        shown = {*ours, *(rival_of(name) for name in ours)}
        runs = {
            name: own
            for name, own in every.items()
            if name.partition(":")[2] in ("", "lean", "balance=true") or name in shown
        }
        comparable = len(runs["full"]) >= WORTH_A_LINE and any(
            saving_at_equal_accuracy(runs, name) for name in runs if not is_plain(name)
        )
        for draw in (frontier, savings) if comparable else (frontier,):
            figure = Figure(figsize=(8, 5), layout="constrained")
            draw(figure.subplots(), runs)
            figure.savefig(ROOT / "docs" / f"{draw.__name__}_{bed}.png", dpi=90)


if __name__ == "__main__":
    main()
