"""The search for the default rule: what was tried, and what was expected before it ran.

    python benchmarks/trials.py --data path/to/cifar10       # runs what is missing; hours on two cores

Each trial changes one thing of the default and is judged on 5,000 held-out training images, seeds from 100
up; `docs/make_docs.py` writes what came into docs/search.md.
"""

import argparse
from dataclasses import dataclass

import compare
from beds import ast

BARE = "ast@0.2:guard=false"  # the default before it had the guard
SEEDS = (100, 101, 102)  # as far as a trial was followed up


@dataclass(frozen=True)
class Trial:
    """A policy, and what was expected of it against the default."""

    policy: str
    expected: str
    beds: tuple[str, ...] = ("four", "tail")
    against: str = BARE


CHAPTERS: dict[str, list[Trial]] = {
    "What it must beat": [
        Trial("full", "the most accurate, at two and a half times the cost"),
        Trial("random@0.2", "below the default: it spends steps on what is learned already"),
        Trial("short@0.4375", "like random: fewer epochs are fewer samples"),
        Trial("rs2@0.425", "like random; no phases, so more even"),
        Trial("infobatch", "close to full, but dear: it drops only among the easy half"),
        Trial("random@0.1", "falls off, since hard samples are seen rarely"),
        Trial("ast@0.1:guard=false", "gains more on random than at 0.2"),
        Trial("random@0.4", "close to full"),
        Trial("ast@0.4:guard=false", "above random by less than at 0.2: there is less to choose"),
    ],
    "How sharp the gate is": [
        Trial("ast@0.2:guard=false,temperature=0.05", "worse: trains the same few samples again and again"),
        Trial("ast@0.2:guard=false,temperature=0.1", "the first design; better where nearly all is learned"),
        Trial(
            "turned@0.2:temperature_of_rate=0.25,temperature=0.1",
            "T = min(0.1, a/4), the first design's: sharper still, worse",
            ("four",),
        ),
        Trial("turned@0.2:by_value=true", "p in proportion to the loss: sharp only once most losses are 0"),
    ],
    "Weights": [
        Trial("ast@0.2:guard=false,weight_gamma=0", "hard samples dominate: better late, worse calibrated"),
        Trial("ast@0.2:guard=false,weight_gamma=1", "unbiased, so close to random with less noise"),
        Trial("turned@0.2:by_value=true,weight_gamma=0", "the same, by value"),
        Trial(
            "turned@0.2:by_value=true,weight_gamma=1,significance=gradient",
            "classical importance sampling (Katharopoulos & Fleuret 2018): least variance for p by the "
            "gradient's norm",
        ),
        Trial("turned@0.2:by_value=true,significance=gradient", "between that and no weights"),
    ],
    "What is remembered": [
        Trial(
            "ast@0.2:guard=false,significance=gradient",
            "ranks like the loss, but bounded: no difference",
            ("four",),
        ),
        Trial(
            "ast@0.2:guard=false,significance=loss+entropy",
            "no difference: entropy and loss rank alike",
            ("four",),
        ),
        Trial("margin@0.2:guard=false", "worse: it never sees that a confident answer is wrong", ("four",)),
        Trial("turned@0.2:newest=1", "noisier: one view decides", ("four",)),
        Trial("turned@0.2:trend=1", "prefers what is still moving; no difference", ("four",)),
        Trial(
            "turned@0.2:relative=true",
            "loss ÷ running mean, so that old memories do not rank high for their age alone: slightly better",
            ("four",),
        ),
    ],
    "Who must not be forgotten": [
        Trial("turned@0.2:floor=0", "worse: the easy are forgotten unnoticed", ("four",)),
        Trial("turned@0.2:overdue=0", "slightly worse: some wait very long", ("four",)),
        Trial("turned@0.2:ageing=0.3", "better: rank rises with the wait, as forgetting does", ("four",)),
        Trial("turned@0.2:per_class=0.5", "no class starves: a better worst class"),
    ],
    "Phases and learning rate": [
        Trial(
            "ast@0.2:guard=false,anneal_epochs=0",
            "cheaper, and worse: the last steps see a skewed sample",
            ("four",),
        ),
        Trial("ast@0.2:guard=false,anneal_epochs=1", "between", ("four",)),
        Trial("ast@0.2:guard=false,ramp_epochs=0", "cheaper, slightly worse", ("four",)),
        Trial("ast@0.2:guard=false,lr=0.28", "√2 times the rate for fewer steps: no difference", ("four",)),
    ],
    "Scoring views": [
        Trial("live@0.2", "better than remembered by little, far dearer", ("four",)),
        Trial("live@0.2:score_scale=0.5", "a quarter of the scoring cost, a worse ranking", ("four",)),
        Trial("proxy@0.2", "nearly live's accuracy at a third of its scoring cost", ("four",)),
    ],
    "A step at half resolution for the skipped": [
        Trial("random@0.2", "below the default, as elsewhere", ("ten",)),
        Trial("shrink@0.2:guard=false", "more accurate, for 15 points more cost", ("four", "ten")),
        Trial("random-shrink@0.2", "nearly the same: the cheap steps do it", ("four", "ten")),
        Trial("random@0.4", "what as much compute buys at full resolution", ("ten",)),
    ],
}
GUARD = "turned@0.2:guard_quantile={},guard_visits={},guard_fall={}"
CHAPTERS["A fifth of the labels wrong: the guard"] = [
    Trial("random@0.2", "sees a fifth of wrong labels", ("four-20",)),
    Trial("ast@0.2:guard=false", "worse than random: it lives on wrong labels", ("four-20",)),
    Trial("ast@0.2:guard=false,temperature=1.0", "close to random", ("four-20",)),
    Trial(
        "turned@0.2:guard_quantile=0.8,guard_visits=3",
        "three visits in the top fifth, none of them lower than remembered",
        ("four-20",),
    ),
    Trial("turned@0.2:guard_quantile=0.7,guard_visits=2", "stricter", ("four-20",)),
    *[
        Trial(GUARD.format(quantile, visits, fall), "a fall counts only if it is a clear one", beds)
        for quantile, visits, fall, beds in (
            (0.8, 3, 0.7, ("four", "tail", "four-20")),
            (0.8, 4, 0.5, ("four-20",)),
            (0.9, 3, 0.7, ("four-20",)),
            (0.7, 3, 0.7, ("four-20",)),
        )
    ],
]

LONG, GUARDED = ("long",), "ast@0.2"
CHAPTERS["Few images, trained long"] = [
    Trial(policy, expected, beds, GUARDED)
    for policy, expected, beds in (
        ("full", "what there is to lose", ("long", "tuned")),
        (
            "random@0.2",
            "behind by more than elsewhere: most images are learned long before the end",
            ("long", "tuned"),
        ),
        ("short@0.4375", "like random", ("long", "tuned")),
        ("infobatch", "between full and AST", ("long", "tuned")),
        ("ast@0.1", "a little behind, for less", ("long", "tuned")),
        ("random@0.1", "further behind", ("long", "tuned")),
        ("ast@0.4", "nearer to full", LONG),
        ("random@0.4", "nearer to full", LONG),
        (BARE, "no difference: no label is wrong on purpose", LONG),
        ("ast@0.2:temperature=0.1", "better: nearly all is learned, so a strict choice starves nobody", LONG),
        ("ast@0.2:weight_gamma=0", "better: late, the hard ones matter", LONG),
        ("turned@0.2:by_value=true", "better: strict only where losses are 0", LONG),
        ("ast@0.2:batch_size=64", "better: twice the steps", LONG),
        ("ast@0.2:batch_size=64,lr=0.14", "the same at the rate that goes with the batch", LONG),
        ("ast@0.2:lr=0.3", "no difference", LONG),
        ("ast@0.1:anneal_epochs=20,ramp_epochs=4", "the cost of 0.2, but spent at the end", LONG),
    )
]


def main() -> None:
    """Runs every trial once, seed by seed; those that --seeds names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", default="cifar10", help="CIFAR-10: a path, or cifar10 to search for it")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    given = parser.parse_args()
    ast.keep_freed_memory()
    data = ast.load_data(ast.replace(ast.Settings(), data=given.data, data_dir="data"), print)
    trials = [(bed, t.policy) for trials in CHAPTERS.values() for t in trials for bed in t.beds]
    for seed in map(int, given.seeds.split(",")):
        for bed in dict.fromkeys(bed for bed, _ in trials):
            names = list(dict.fromkeys(policy for b, policy in trials if b == bed))
            compare.Comparison(bed, data, held_out=True).run_all(names, [seed])


if __name__ == "__main__":
    main()
