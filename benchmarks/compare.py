"""Trains policies on a test bed, seed by seed, and keeps each finished run as a line of results/<bed>.jsonl.

    python benchmarks/compare.py --quick --data path/to/cifar10               # ten minutes on two cores
    python benchmarks/compare.py --full --data path/to/cifar10                # the headline rows: hours
    python benchmarks/compare.py --bed four --policies ast@0.2,random@0.2 --seeds 0,1,2 --data path/to/cifar10
    python benchmarks/compare.py --bed four --held-out --seeds 100,101 --policies ast@0.2:temperature=0.1,…

Killed and started again, it goes on with the runs that are missing. `python benchmarks/evidence.py` makes
the tables and figures. It drives the program that ships; rules that are not the kit's are in rules.py.
A policy's name may end in settings (`ast@0.2:temperature=0.1,weight_gamma=1`), in the knobs of
`rules.Turned` (`turned@0.2:floor=0`), or in the name of other sides (`full:stages=two`, rules.STAGES); this
is how the search for the default was made (docs/search.md).

On a bed that is judged on held-out training images (--held-out) the test images are never looked at.
"""

import argparse
import functools
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import books
import rules
import torch
from beds import BEDS, Bed, Settings, Split, ast
from compact import compact, recipe
from evidence import JUDGES, half_width, load, table

HERE = Path(__file__).parent
ROOT = HERE.parent
GROUND = ("beds.py", "compact.py", "rules.py", "compare.py")
EDITION = 2  # of the program; what the first one gave counts beside it, since its golden runs are unchanged
AT_LEAST, AT_MOST = 5, 20  # seeds of the headline rows
ENOUGH = 0.15  # points, the half-width of a paired interval at which no more seeds are added


@dataclass(frozen=True)
class Policy:
    """What is trained: changes to the settings, and a gate unless the program has it by name."""

    settings: dict = field(default_factory=dict)
    gate: Callable | None = None  # (settings, split, trainer) -> gate
    trainer: type[ast.AdaptiveSparseTrainer] = ast.AdaptiveSparseTrainer


def by_memory(rule: type) -> Callable:
    return lambda settings, split, trainer: rule(trainer.config, len(split.labels))


def by_weighted_memory(rule: type) -> Callable:
    return lambda settings, split, trainer: rule(trainer.config, len(split.labels), settings.weight_gamma)


def weighted(settings: Settings, split: Split, trainer: ast.AdaptiveSparseTrainer) -> object:
    """The gate that the trainer has; weighted, where that is asked for."""
    return (
        by_weighted_memory(rules.Weighted)(settings, split, trainer)
        if settings.weight_gamma
        else trainer.gate
    )


def by_margin(settings: Settings, split: Split, trainer: ast.AdaptiveSparseTrainer) -> object:
    """The kit's gate, which remembers the margin."""
    trainer.judge = rules.margin
    return weighted(settings, split, trainer)


def top_k(settings: Settings, split: Split, trainer: ast.AdaptiveSparseTrainer) -> object:
    """The live gate of the hardest views, scored at a share of their side."""
    scale = settings.score_scale
    return rules.TopK(trainer.config, rules.scaled(trainer, scale) if scale < 1 else trainer.score)


KINDS: dict[str, Policy] = {
    # Plain training; `short@c` has the share c of the epochs, its learning rate rescaled to them.
    "full": Policy({"gate": "full"}),
    "short": Policy({"gate": "full"}),
    # RS2 (Okanovic et al. 2024): a fresh random share each epoch, the learning rate rescaled.
    "rs2": Policy({"gate": "random", "warmup_epochs": 0, "ramp_epochs": 0, "anneal_epochs": 0}),
    # By chance, with AST's warm-up, ramp and anneal.
    "random": Policy({"gate": "random"}),
    "ast": Policy({}, weighted),
    "shuffled": Policy({}, by_weighted_memory(rules.Shuffled)),
    # Its rule sets its own rate; 0.62 is what that came to, so that its learning rate is scheduled for it.
    "infobatch": Policy(
        {"warmup_epochs": 1, "ramp_epochs": 0, "target_activation": 0.62}, by_memory(rules.InfoBatch)
    ),
    "selective-backprop": Policy(
        {"gate": "live"},
        lambda settings, split, trainer: rules.SelectiveBackprop(trainer.config, trainer.score),
    ),
    # The original reports' live rule: 0.7 loss + 0.3 intensity above a threshold that a PI loop holds; here
    # on ranks and with the kit's controller, since their own gains lose the rate (docs/evidence.md).
    "original": Policy({"gate": "live", "significance": "loss+intensity"}),
    "live": Policy({"gate": "live"}, top_k),
    "proxy": Policy({}, lambda settings, split, trainer: rules.Proxy(trainer, int(split.labels.max()) + 1)),
    "curriculum": Policy({}, by_memory(rules.Curriculum)),
    # By chance, every class as often: needs labels, and tells what of AST's lead is owed to balance alone.
    "balanced": Policy(
        {}, lambda settings, split, trainer: rules.Balanced(split.labels, settings.weight_gamma)
    ),
    # The same for images that repeat: every scene as often, as far as it has frames; it must be told which
    # images are frames of one.
    "distinct": Policy({}, lambda settings, split, trainer: rules.Balanced(split.scenes)),
    # The margin between the two likeliest classes, remembered.
    "margin": Policy({"guard": False}, by_margin),
    # A step at half resolution for what is skipped; chosen by significance, or by chance.
    "shrink": Policy({}, weighted, rules.Shrinking),
    "random-shrink": Policy({"gate": "random"}, trainer=rules.Shrinking),
    # Every sample: at full resolution what is chosen, the others at half.
    "sized": Policy({}, weighted, rules.Sized),
    "random-sized": Policy({"gate": "random"}, trainer=rules.Sized),
}


# Almost every epoch is gated, as in the ImageNet-100 program's profile `efficiency`.
LEAN = {"warmup_epochs": 1, "ramp_epochs": 0, "anneal_epochs": 1}


def policy(name: str, bed: Bed) -> Policy:
    """The policy that `kind@share:setting=value,…` names; a setting `lean` stands for the phases of LEAN.

    Raises SystemExit for an unknown one.
    """
    head, _, tail = name.partition(":")
    kind, _, share = head.partition("@")
    changes = {k: value(v) for k, _, v in (item.partition("=") for item in tail.split(",") if tail)}
    if changes.pop("lean", None) is not None:
        changes = LEAN | changes
    stages = changes.pop("stages", None)
    turns = {f.name for f in fields(rules.Knobs)} if kind == "turned" else set()
    knobs = {k: changes.pop(k) for k in list(changes) if k in turns}
    if kind == "turned":
        made = Policy(
            {},
            lambda settings, split, trainer: rules.Turned(
                trainer.config, split.labels, rules.Knobs(**knobs), settings.weight_gamma
            ),
        )
    elif kind in KINDS:
        made = KINDS[kind]
    else:
        raise SystemExit(
            f"policy {name}: expected one of {', '.join([*KINDS, 'turned'])}, and its own settings"
        )
    settings, known = dict(made.settings), {f.name for f in fields(Settings)}
    if unknown := sorted(changes.keys() - known):
        raise SystemExit(f"policy {name}: expected settings of the program, found {', '.join(unknown)}")
    for key, given in changes.items():
        if isinstance(getattr(Settings, key), bool) and not isinstance(given, bool):
            raise SystemExit(f"policy {name}: {key} {given}: expected true or false")
    if changes.get("balance") and (kind != "ast" or changes.get("weight_gamma")):
        raise SystemExit(
            f"policy {name}: expected balance with the kit's own gate, as in ast@0.2:balance=true"
        )
    if kind == "short":
        settings |= {"epochs": math.ceil(float(share or 1) * bed.settings["epochs"] - 0.01)}
    elif share:
        settings |= {"target_activation": float(share)}
    trainer = rules.staged(stages) if stages else made.trainer
    return Policy(settings | changes, made.gate, trainer)


def value(text: str) -> object:
    """A number, true or false; a word stands for itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def build(bed: Bed, chosen: Policy, seed: int, split: Split) -> ast.AdaptiveSparseTrainer:
    """A silent trainer of the bed's network and recipe."""
    settings = replace(Settings(), **{"device": "cpu", **bed.settings, **chosen.settings})
    device = torch.device(settings.device)
    torch.manual_seed(seed)
    if bed.width or settings.model == "vit":
        made = functools.partial(ast.resnet, width=bed.width) if bed.width else ast.vit
        model = made(len(bed.classes)).to(device, memory_format=torch.channels_last)
        optimizer, criterion = ast.recipe(settings, model)
    else:
        model = compact(len(bed.classes), split.images, settings.batch_size).to(device)
        optimizer, criterion = recipe(settings, model)
    if split.weights:
        model.load_state_dict(model.state_dict() | split.weights)
    trainer = chosen.trainer(
        model,
        ast.ArraySource(split.images, split.labels, device, settings.batch_size, ast.augment),
        ast.ArraySource(split.judge_images, split.judge_labels, device, settings.batch_size, ast.plain_view),
        ast.ASTConfig.of(settings),
        optimizer,
        criterion,
        listeners=[],
        seed=seed,
    )
    if chosen.gate:
        trainer.gate = chosen.gate(settings, split, trainer)
    return trainer


def measure(bed: Bed, chosen: Policy, seed: int, split: Split) -> dict:
    """One run, as it is kept."""
    trainer = build(bed, chosen, seed, split)
    result = trainer.train()
    flops = sum(result["phases"][phase]["flops"] for phase in ast.TRAINING_PHASES)
    samples = len(split.labels) * bed.settings["epochs"]
    curve, spent = [], 0.0  # training seconds, scoring included
    for row in result["epochs"]:
        spent += row["seconds"]
        curve.append([round(spent, 3), round(row["val_accuracy"], 2)])
    by_class = class_accuracies(trainer, split)
    frequency = split.labels.bincount(minlength=len(by_class)) / len(split.labels)
    wrong, times = split.labels != split.truth, trainer.times_activated.float()
    repeats = split.scenes.bincount()[split.scenes] > 1
    return {
        "accuracy": round(result["final_accuracy"], 2),
        "worst_class": round(min(by_class), 2),
        # As if judged on classes as frequent as in training: without what balance gains on a tail.
        "natural_accuracy": round(sum(by_class[c] * float(share) for c, share in enumerate(frequency)), 2),
        "train_loss": round(result["epochs"][-1]["train_loss"], 4),
        "activation_rate": result["activation_rate"],
        "flops": flops,
        "cost": flops / (samples * result["flops_per_sample"]["training"]),
        "train_seconds": round(result["train_seconds"], 2),
        "total_seconds": round(result["total_seconds"], 2),
        "joules": result["joules"],
        "joules_method": result["joules_method"],
        "device": ast.device_name(str(trainer.device)),
        "amp": str(trainer.dtype or "off").removeprefix("torch."),
        "curve": curve,
        "wrong_share": share_of(wrong, times),
        "repeat_share": share_of(repeats, times),
    }


def share_of(kind: torch.Tensor, times: torch.Tensor) -> float | None:
    """The share of a kind of samples among the activations in gated epochs; None without either."""
    return float(times[kind].sum() / times.sum()) if kind.any() and times.sum() else None


def class_accuracies(trainer: ast.AdaptiveSparseTrainer, split: Split) -> list[float]:
    """Accuracy of each class, percent."""
    with ast.evaluating(trainer.model), trainer.autocast():
        answers = torch.cat([trainer.model(images).argmax(1) for images, _ in trainer.val_source.in_order()])
    right = (answers.cpu() == split.judge_labels).float()
    return [100 * float(right[split.judge_labels == c].mean()) for c in split.judge_labels.unique()]


def pretrained(data: ast.ImageData, bed: Bed) -> dict[str, torch.Tensor]:
    """Weights of plain training on the classes that `bed` leaves out, its last layer aside; made once."""
    others = tuple(c for c in range(10) if c not in bed.classes)
    known = Bed("the other classes", classes=others, settings={**bed.settings, "epochs": 10, "lr": 0.1})
    names = "-".join(map(str, others))
    file = ROOT / "runs" / f"pretrained-{names}-{digest(HERE / 'compact.py', HERE / 'beds.py')}.pt"
    if not file.exists():
        trainer = build(known, KINDS["full"], 0, known.split(data, held_out=True))
        trainer.train()
        file.parent.mkdir(exist_ok=True)
        torch.save(trainer.model.state_dict(), file.with_suffix(".part"))
        os.replace(file.with_suffix(".part"), file)
    weights = torch.load(file, weights_only=True)
    last = next(reversed(weights))
    return {name: value for name, value in weights.items() if name != last}


def digest(*files: Path) -> str:
    """The first 12 digits of the SHA-256 of files, whose comments (and a program's markdown) do not count."""
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    code = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    return hashlib.sha256(code.encode()).hexdigest()[:12]


class Comparison:
    """The runs of one bed, each a line of its file below `results`."""

    def __init__(
        self,
        bed: str,
        data: ast.ImageData,
        held_out: bool,
        results: Path | None = None,
        side_by_side: int = 1,
    ):
        """side_by_side: how many such processes share the GPU, so that seconds and joules are nobody's."""
        self.side_by_side = side_by_side
        self.name, self.bed, self.held_out, self.warned = bed, BEDS[bed], held_out, False
        results = results or books.RESULTS
        self.file = results / f"{bed}.jsonl"
        self.kept = load(bed, "held_out" if held_out else "test", results)
        self.split = self.bed.split(data, held_out)
        if self.bed.pretrained:
            self.split.weights = pretrained(data, self.bed)
        self.program, self.ground = digest(Path(ast.__file__)), digest(*[HERE / name for name in GROUND])

    def run(self, name: str, seed: int) -> dict:
        """The result of one run, from the bed's file if it is finished."""
        if seed in self.kept.get(name, {}):
            return self.told(self.kept[name][seed])
        found = {
            "policy": name,
            "seed": seed,
            "judged_on": JUDGES["held_out" if self.held_out else "test"],
            **measure(self.bed, policy(name, self.bed), seed, self.split),
            **(self.shared() if self.side_by_side > 1 else {}),
            "edition": EDITION,
            "program": self.program,  # the shipped file's hash
            "ground": self.ground,  # that of beds, network, rules and this file
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
        }
        command = f"python benchmarks/compare.py --bed {self.name} --policies POLICY --seeds SEED"
        books.append(self.file, {"bed": self.name, "command": command}, found)
        self.kept.setdefault(name, {})[seed] = found
        print(
            f"{self.name:<8} {name:<40} seed {seed:<4} {found['accuracy']:6.2f} %  cost {found['cost']:.3f}  "
            f"{found['train_seconds']:6.1f} s",
            flush=True,
        )
        return found

    def shared(self) -> dict:
        """What a run keeps instead, where others shared the GPU with it."""
        return {
            "joules": None,
            "joules_method": "unavailable (other runs shared the GPU)",
            "side_by_side": self.side_by_side,
        }

    def told(self, found: dict) -> dict:
        """A kept result; says so, once, where other code of this edition made it."""
        other = [what for what in ("program", "ground") if found.get(what) != getattr(self, what)]
        if other and found.get("edition") == EDITION and not self.warned:
            self.warned = True
            print(f"{self.name}: some kept results were made by another {' and '.join(other)}", flush=True)
        return found

    def run_all(self, names: list[str], seeds: Iterable[int], rivals: dict[str, str] | None = None) -> None:
        """Every policy, seed by seed, in an order that turns. With `rivals`, pairs of policies, all run for
        AT_LEAST seeds, and then those pairs whose difference is not yet known to ENOUGH."""
        wide, done = list((rivals or {}).items()), []
        for count, seed in enumerate(seeds):
            wanted = names
            if rivals is not None and count >= AT_LEAST:
                wide = [pair for pair in wide if self.half_width(*pair, done) > ENOUGH]
                wanted = [name for name in names if any(name in pair for pair in wide)]
            done.append(seed)
            turn = count % max(1, len(wanted))
            for name in wanted[turn:] + wanted[:turn]:
                self.run(name, seed)

    def half_width(self, a: str, b: str, seeds: Iterable[int]) -> float:
        """Of the 95 % interval of the paired difference of two policies, points."""
        return half_width([self.run(a, seed)["accuracy"] - self.run(b, seed)["accuracy"] for seed in seeds])


RATES = (0.4, 0.2, 0.1)  # activation rates of the sparse epochs at which AST meets its rivals
RULES = [
    "shuffled@0.2",
    "balanced@0.2",
    "infobatch",
    "selective-backprop@0.2",
    "original@0.2",
    "live@0.2",
    "proxy@0.2",
    "curriculum@0.2",
    "margin@0.2",
    "ast@0.2:weight_gamma=0.5",
    "ast@0.2:weight_gamma=1",
    "ast@0.2:anneal_epochs=0",
    "ast@0.2:guard=false",
]
NOISY = ["infobatch", "ast@0.2:guard=false"]
BALANCE = ["balanced@0.2", "balanced@0.4", "balanced@0.1"]
BALANCE += [f"ast@{rate}:balance=true" for rate in (0.6, *RATES)]
FULL = {
    "tail": (  # 0.6 is at InfoBatch's cost
        (0.6, *RATES),
        [*dict.fromkeys([*RULES, *BALANCE])],
    ),
    "filmed": (
        (0.4, 0.2, "0.4:lean"),
        ["distinct@0.2", "distinct@0.4:lean", "balanced@0.2", "infobatch", "shuffled@0.2"],
    ),
    "two-long": ((0.2,), []),
    "long": ((0.4, 0.3, 0.2, 0.1), ["infobatch", "shuffled@0.2"]),  # 0.3 saves just over 45 %
    "ten": ((0.2, "0.2:lean", "0.1:lean"), ["infobatch", "ast@0.2:weight_gamma=0.5"]),
    "tuned": ((0.2,), ["infobatch"]),
    **dict.fromkeys(("four-10", "four-20", "four-40"), ((0.2,), NOISY)),
    "all": ((0.2, "0.1:lean"), []),
    # Where there is a GPU; 0.57 is at InfoBatch's cost. Times are taken on `whole-alone`.
    "whole": ((0.57, 0.4, 0.2), ["infobatch", "shuffled@0.2"]),
    "whole-alone": ((0.57, 0.4, 0.2), []),
    "whole-long": ((0.2,), []),
    **dict.fromkeys(("tail-gpu", "whole-tail"), ((0.6, *RATES), ["infobatch", *BALANCE])),
    "two-long-gpu": ((0.2,), []),
    "long-gpu": ((0.2,), []),
}
QUICK = {"quick": ((0.2,), RULES)}
RIVALS = {f"ast@{rate}": f"random@{rate}" for rates, _ in FULL.values() for rate in rates}
RIVALS |= {f"ast@{rate}:balance=true": f"random@{rate}" for rate in (0.6, *RATES)}


def paid(bed: Bed, rate: float | str) -> float:
    """Share of all candidates that `ast@rate` activates on a bed, its warm-up, ramp and anneal included."""
    epochs, given = bed.settings["epochs"], policy(f"ast@{rate}", bed).settings
    config = ast.ASTConfig(**{name: value for name, value in given.items() if name in LEAN})
    schedule = ast.Schedule.of(config, epochs)
    return sum(schedule.rate(epoch, given["target_activation"]) for epoch in range(epochs)) / epochs


def policies(bed: Bed, rates: Iterable[float | str], rules: list[str]) -> list[str]:
    """Names of what is compared: AST at each rate, with random selection, RS2 and plain training at its cost
    (plain training in whole epochs, rounded up), then the other rules."""
    names = ["full"]
    for rate in rates:
        share = paid(bed, rate)
        names += [f"ast@{rate}", f"random@{rate}", short_at(bed, share), f"rs2@{share:.4f}"]
    return names + rules


def short_at(bed: Bed, share: float) -> str:
    """Plain training of that share of a bed's epochs, rounded up to whole ones."""
    epochs = bed.settings["epochs"]
    return f"short@{math.ceil(share * epochs - 1e-9) / epochs:.4f}"


def main() -> None:
    """Runs what is asked for and not yet finished."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", default="cifar10", help="CIFAR-10: a path, or cifar10 to search for it")
    parser.add_argument(
        "--bed", choices=[*BEDS], help="one test bed; all that --quick or --full name if left out"
    )
    parser.add_argument("--policies", help="with commas between them; those of --quick or --full if left out")
    parser.add_argument("--seeds", default="", help="with commas between them; 0 up if left out")
    parser.add_argument("--held-out", action="store_true", help="judge on held-out training images")
    parser.add_argument(
        "--side-by-side",
        type=int,
        default=1,
        metavar="N",
        help="say that N of these run at once on one GPU, each with seeds of its own: no seconds or joules",
    )
    parser.add_argument("--quick", action="store_true", help="every rule on 4,000 images, one seed")
    parser.add_argument("--full", action="store_true", help="the headline rows")
    parser.add_argument(
        "--results",
        type=Path,
        help="folder of the runs; what is in it is not run again (default: the kit's "
        "own results; with --quick runs/compare, so that it runs on your machine)",
    )
    given = parser.parse_args()
    if not (given.quick or given.full or (given.bed and given.policies)):
        parser.error("expected --quick, --full, or --bed with --policies")
    plan = QUICK if given.quick else FULL
    beds = {given.bed: plan.get(given.bed, ((0.2,), RULES))} if given.bed else plan
    seeds = [int(seed) for seed in given.seeds.split(",") if seed] or range(1 if given.quick else AT_MOST)
    results = given.results or (ROOT / "runs" / "compare" if given.quick else books.RESULTS)
    ast.keep_freed_memory()

    @functools.cache
    def load() -> ast.ImageData:
        return ast.load_data(Settings(data=given.data, data_dir="data"), print)

    for bed, compared in beds.items():
        if not given.bed and BEDS[bed].settings.get("device") == "cuda" and not torch.cuda.is_available():
            print(f"{bed}: left out, since there is no GPU", flush=True)
            continue
        chosen = split_names(given.policies) if given.policies else policies(BEDS[bed], *compared)
        for name in chosen:
            policy(name, BEDS[bed])  # a wrong name is refused before hours of training
        rivals = {a: b for a, b in RIVALS.items() if {a, b} <= {*chosen}}
        comparison = Comparison(bed, load(), given.held_out, results, given.side_by_side)
        comparison.run_all(chosen, seeds, rivals if given.full else None)
        print(f"\n{table(bed, 'held_out' if given.held_out else 'test', results)}\n", flush=True)


def split_names(text: str) -> list[str]:
    """Names of policies out of one text; a comma before `setting=` or `lean` belongs to the one before it."""
    return re.split(r",(?!\w+=|lean\b)", text)


if __name__ == "__main__":
    main()
