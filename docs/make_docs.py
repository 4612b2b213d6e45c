"""Writes what is derived: docs/api.md from the docstrings, and in README.md, docs/ and the first
cells of the programs the marked places: flags from `Settings`, figures from benchmarks/results.

    python docs/make_docs.py, then python build_notebooks.py
"""

import functools
import inspect
import math
import re
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "standalone"), str(ROOT / "benchmarks")]
import books  # noqa: E402
import controller  # noqa: E402
import evidence as proof  # noqa: E402
import finetuning  # noqa: E402
import letters  # noqa: E402
import torch  # noqa: E402
import trials  # noqa: E402

import cifar10_ast as program  # noqa: E402
import imagenet100_ast as images  # noqa: E402

CHAPTERS = {
    "Train a model of your own": ["ASTConfig", "AdaptiveSparseTrainer", "Controls", "BadInput"],
    "Run the whole program": ["Settings", "prepare", "run", "run_live", "ImageData"],
    "Gates": ["RememberedGate", "LiveGate", "RandomGate", "Batch"],
    "What it cost": ["Ledger"],
}
LOOP = "train_epoch choose decide step remember apply_controls take wait_or_stop".split()  # who calls these
T4 = 1198 / 3  # images a second, ResNet-50, fp16: NVIDIA's 1,198 forward; training costs three times that
GRADIENTS, LINK = 4 * 25_557_032, 6e9  # bytes of ResNet-50's gradients; bytes a second between two T4s
OPENING = """\
# The public names

Every program in `standalone/` holds these, since the cells are shared. Import a program, or use the names in
its notebook. Written from the docstrings by `python docs/make_docs.py`.
"""


def entry(name: str) -> str:
    """The markdown of one public name, with its public methods."""
    thing = getattr(program, name)
    lines = [f"### `{name}{signature(thing)}`", "", inspect.cleandoc(thing.__doc__)]
    for method, value in vars(thing).items() if inspect.isclass(thing) else ():
        function = getattr(value, "__func__", value)  # a classmethod wraps its function
        if inspect.isfunction(function) and function.__doc__ and method not in LOOP and method[0] != "_":
            lines += ["", f"**`{method}{signature(function)}`**", "", inspect.cleandoc(function.__doc__)]
    return "\n".join(lines) + "\n"


def signature(thing: object) -> str:
    """Parameter names and plain defaults; the types are in the source."""
    if isinstance(thing, type) and issubclass(thing, Exception):
        return "(sentence)"
    parameters = []
    for item in inspect.signature(thing).parameters.values():
        if item.name in ("self", "cls"):
            continue
        star = {item.VAR_POSITIONAL: "*", item.VAR_KEYWORD: "**"}.get(item.kind, "")
        default = "" if item.default is item.empty else f"={item.default!r}"
        parameters.append(star + item.name + (default if "<" not in default else "=…"))
    text = ", ".join(parameters)
    return f"({text})" if len(text) < 450 else "(…)"


def api() -> str:
    """The whole of docs/api.md."""
    parts = [OPENING]
    for chapter, names in CHAPTERS.items():
        parts += [f"## {chapter}\n", *(entry(name) for name in names)]
    return "\n".join(parts)


def flags(module: object) -> list[str]:
    """The rows of a program's table of flags."""
    rows = []
    for item in fields(module.Settings):
        default = {"None": "auto", "True": "on", "False": "off"}.get(str(item.default), item.default)
        bound, meaning = item.metadata["bound"], item.metadata["help"].replace("|", "/")
        meaning += f": {', '.join(bound)}" if isinstance(bound, tuple) else ""
        rows.append(f"| `{module.flag(item.name)}` | {default} | {meaning} |")
    return rows


def table_of_flags(rows: list[str]) -> str:
    return "\n".join(["| flag | default | meaning |", "|---|---|---|", *rows])


def result(name: str) -> dict | None:
    """What benchmarks/bars.py measured last under a name, if it did."""
    return {found["measure"]: found for found in books.read(books.RESULTS / "bars.jsonl")}.get(name)


# What is measured, how a result shows it, what is to be reached, and whether a result reaches it.
Row = tuple[str, Callable[[dict], str], str, Callable[[dict], bool]]


def ratio(what: str, most: float, key: str = "ratio") -> Row:
    """A ratio that is to stay at or under `most`."""
    return what, lambda r: f"{r[key]:.3f}", f"≤ {most:.2f}", lambda r: r[key] <= most


def faster(what: str, least: float, *keys: str) -> Row:
    """Times faster, one number a path of keys, none of which is to be under `least`."""

    def times(found: dict) -> list[float]:
        return [functools.reduce(dict.get, key.split("."), found) for key in keys]

    return (
        what,
        lambda r: " and ".join(f"{t:.2f} ×" for t in times(r)),
        f"≥ {least:g} ×",
        lambda r: min(times(r)) >= least,
    )


def largest(steps: list[dict], key: str) -> float:
    return max(step[key] for step in steps)


def loads(found: dict) -> tuple[list[float], int]:
    """What the dashboard costs, on every core and with one free, and the bytes of its largest picture."""
    both = found["every_core"], found["a_core_free"]
    return [one["ratio"] for one in both], max(one["picture_bytes"] for one in both)


WORKERS = "workers_1.times_faster", "workers_2.times_faster"
ROWS: dict[str, list[Row]] = {
    "engine": [
        ratio("seconds a candidate at a = 0.10 ÷ seconds a sample of full training", 0.13, "ratio_at_0.10"),
        ratio("the same at a = 0.40", 0.43, "ratio_at_0.40"),
    ],
    "feed": [ratio("a full epoch ÷ the same steps on one held batch", 1.08)],
    "device": [faster("`--amp auto` against float32", 2, "times_faster")],
    "control": [
        (
            "largest error of a sparse epoch's rate, targets 0.05 to 0.8",
            lambda r: f"{r['largest_error_of_a_sparse_epoch']:.4f}",
            "≤ 0.005",
            lambda r: r["largest_error_of_a_sparse_epoch"] <= 0.005,
        ),
        (
            "target moved in mid-epoch: error after 1/10 epoch; overshoot",
            lambda r: (
                f"{largest(r['steps'], 'error_after_a_tenth_of_an_epoch'):.4f}; "
                f"{largest(r['steps'], 'overshoot'):.4f}"
            ),
            "≤ 0.02; ≤ 0.05",
            lambda r: (
                largest(r["steps"], "error_after_a_tenth_of_an_epoch") <= 0.02
                and largest(r["steps"], "overshoot") <= 0.05
            ),
        ),
        (
            "rate where a tenth of the activated is lost, targets 0.1 and 0.4",
            lambda r: " and ".join(f"{v:.4f}" for v in r["rate_with_a_tenth_lost"].values()),
            "within 0.01",
            lambda r: all(abs(v - float(aim)) <= 0.01 for aim, v in r["rate_with_a_tenth_lost"].items()),
        ),
    ],
    "gate": [
        (
            "gate time an epoch at 1,281,167 samples, a = 0.1 and 0.4; bytes a sample",
            lambda r: (
                " and ".join(f"{v:.2f} s" for v in r["seconds_per_epoch"].values())
                + f"; {r['bytes_per_sample']:.0f}"
            ),
            "≤ 0.5 s; ≤ 16",
            lambda r: max(r["seconds_per_epoch"].values()) <= 0.5 and r["bytes_per_sample"] <= 16,
        )
    ],
    "dashboard": [
        (
            "an epoch with the dashboard ÷ without, on every core and with one free; largest picture",
            lambda r: " and ".join(f"{t:.3f}" for t in loads(r)[0]) + f"; {loads(r)[1] / 1000:.0f} kB",
            "≤ 1.03 and ≤ 1.01; ≤ 100 kB",
            lambda r: loads(r)[0][0] <= 1.03 and loads(r)[0][1] <= 1.01 and loads(r)[1] <= 100_000,
        )
    ],
    "ledger": [
        (
            "FLOPs counted ÷ FLOPs by hand, three models",
            lambda r: f"{min(r['counted_by_hand'].values()):.4f} to {max(r['counted_by_hand'].values()):.4f}",
            "0.99 to 1.01",
            lambda r: all(0.99 <= v <= 1.01 for v in r["counted_by_hand"].values()),
        )
    ],
    "accuracy": [
        (
            "CIFAR-10, `simple_cnn`, 40 epochs at a mean activation of 0.104, mean of 3 seeds (the original "
            "report: 61.2 %)",
            lambda r: f"{r['mean_accuracy']['ast']:.2f} %",
            "≥ 77.5 %",
            lambda r: r["mean_accuracy"]["ast"] >= 77.5,
        ),
        *[
            (
                f"AST minus {words}, points",
                lambda r, rival=rival: paired(r, rival),
                "not below 0",
                lambda r, rival=rival: r["mean_accuracy"][rival] <= r["mean_accuracy"]["ast"],
            )
            for rival, words in (("random", "random selection"), ("short", "plain training of as few epochs"))
        ],
    ],
    "speed": [
        (
            "seconds to 61.2 % on CIFAR-10, AST and full, nothing skipped yet (the original report: 628 s)",
            lambda r: "; ".join(f"{v:.1f} s" for v in r["seconds_to_61.2_percent"].values() if v),
            "≤ 25 s",
            lambda r: (r["seconds_to_61.2_percent"]["ast"] or math.inf) <= 25,
        )
    ],
    "images_skip": [
        ratio("a candidate at a = 0.25 ÷ an image of full training, full-size JPEGs, a tiny model", 0.30)
    ],
    "images_compute": [ratio("the same, `resnet18` on JPEGs of 64 pixels", 0.29)],
    "images_decode": [
        faster(
            "crops from full-size JPEGs, beside torchvision's `ImageFolder`, 1 and 2 workers", 1.6, *WORKERS
        )
    ],
    "images_packed": [faster("the same crops from packed arrays", 10, *WORKERS)],
    "images_pack": [
        faster("images packed a processor second, beside a plain loop that saves PNGs", 1.5, "times_faster")
    ],
    "images_memory": [
        (
            "growth of memory over 3 epochs of 20,000 images",
            lambda r: f"{r['growth_percent']:.2f} %",
            "≤ 2 %",
            lambda r: r["growth_percent"] <= 2,
        )
    ],
    "images_budget": [
        (
            f"100 classes of ImageNet, `resnet18` from scratch, 3 seeds: AST minus {words}, points",
            lambda r, rival=rival: interval(r["ast_minus"][rival]),
            "above 0",
            lambda r, rival=rival: r["ast_minus"][rival]["mean"] > (r["ast_minus"][rival]["half_width"] or 0),
        )
        for rival, words in (("short", "plain training at its cost"), ("random", "random selection"))
    ],
}


def paired(found: dict, rival: str) -> str:
    """AST minus a rival, seed by seed, with the half-width of its 95 % interval."""
    ours, theirs = (found["accuracy_per_seed"][policy] for policy in ("ast", rival))
    gaps = [ours[seed] - theirs[seed] for seed in ours]
    return str(proof.Gap(sum(gaps) / len(gaps), proof.half_width(gaps), len(gaps)))


def interval(gap: dict) -> str:
    width = gap["half_width"]
    return f"{gap['mean']:+.2f}" + ("" if width is None else f" ± {width:.2f}")


def measured() -> str:
    """The table of what was measured, with the machine and the day."""
    rows, where = ["| measure | measured | to reach | reached |", "|---|---|---|---|"], set()
    for name, lines in ROWS.items():
        if found := result(name):
            rows += [
                f"| {what} | {show(found)} | {reach} | {'yes' if met(found) else '**no**'} |"
                for what, show, reach, met in lines
            ]
            where.add(f"{found['machine']}, torch {found['torch']}, {found['date']}")
    return "\n".join([*rows, "", "Taken on: " + "; ".join(sorted(where)) + "."])


def scale() -> dict[str, str]:
    """The tables of docs/scale.md: what benchmarks/scale.py measured last, and what follows from it."""
    found = {}
    for row in books.read(books.RESULTS / "scale.jsonl"):
        found[row["measure"], row.get("gate"), row.get("n", row.get("processes"))] = row
    gates = [row for row in found.values() if row["measure"] == "gate"]
    one = {row["gate"]: row["seconds"] / row["n"] for row in gates if row["n"] == 10**6}
    table = ["| gate | samples | seconds an epoch | ÷ linear from 1 M | bytes a sample kept; at most |"]
    for row in gates:
        times, bytes_ = row["seconds"] / row["n"] / one[row["gate"]], f"{row['bytes_kept']:.0f}"
        table.append(
            f"| `{row['gate']}` | {row['n']:,} | {row['seconds']:.1f} | {times:.2f} "
            f"| {bytes_}; {row['bytes_peak']:.0f} |"
        )
    wires = {row["processes"]: row for row in found.values() if row["measure"] == "wire"}
    wire = ["| processes | a chunk's losses | of what training it takes on one T4 | flags |"]
    for count, row in wires.items():
        share = row["chunk_ms"] / 10 / (512 / T4)
        wire.append(
            f"| {count} | {row['chunk_bytes']:,} bytes, {row['chunk_ms']:.2f} ms | {share:.2f} % "
            f"| {row['step_bytes']} bytes, {row['step_ms']:.2f} ms |"
        )
    shares = ["| processes | arithmetic and gate | percent chosen differently, epoch by epoch |"]
    for row in (row for row in found.values() if row["measure"] == "share"):
        for name, percent in row["percent"].items():
            shares.append(f"| {row['processes']} | {name} | {', '.join(f'{p:.1f}' for p in percent)} |")
    tables = {"gates": table, "wire": wire, "shares": shares, "model": expected(wires)}
    return {
        name: "\n".join([t[0], "|---" * (t[0].count("|") - 1) + "|", *t[1:]]) for name, t in tables.items()
    }


def expected(wires: dict[int, dict]) -> list[str]:
    """What the model of docs/scale.md expects of ResNet-50 on T4s, from T4, LINK and what was exchanged."""
    rows = ["| GPUs | batch | compute | gradients | exchanged, hidden | images a second | of W × one |"]
    for count, batch in ((1, 128), (2, 128), (8, 128), (8, 1024)):
        wire = wires[count]
        compute, gradients = batch / count / T4, 2 * (count - 1) / count * GRADIENTS / LINK
        exchanged = (1.25 * wire["step_ms"] + wire["chunk_ms"] / 4) / 1000 * (count > 1)
        step = compute + max(0.0, gradients - 2 / 3 * compute) + exchanged
        rows.append(
            f"| {count} | {batch} | {1000 * compute:.0f} ms | {1000 * gradients:.0f} ms "
            f"| {1000 * exchanged:.1f} ms, {1000 * min(gradients, 2 / 3 * compute):.0f} ms "
            f"| {batch / step:.0f} | {batch / step / count / T4:.2f} |"
        )
    return rows


def evidence() -> str:
    """The measured sentence in the CIFAR-10 program's first cell."""
    found = result("accuracy")
    if not found:
        return "Nothing measured yet."
    rate, epochs = found["mean_activation"]["ast"], found["settings"]["epochs"]
    dearer, count = found["epochs_of_short"] / (epochs * rate) - 1, len(found["accuracy_per_seed"]["ast"])
    gaps = {rival: paired(found, rival).removesuffix(f" ({count})") for rival in ("random", "short")}
    return (
        f"In {epochs} epochs of `simple_cnn` on {rate:.1%} of the samples AST reached "
        f"{found['mean_accuracy']['ast']:.2f} %: {gaps['random']} points beside random selection of as "
        f"many, {gaps['short']} beside plain training that was {dearer:.0%} dearer (95 % intervals, "
        f"{count} seeds; {found['machine']}, {found['date']})."
    )


def evidence_on_images() -> str:
    """The measured sentence in the ImageNet-100 program's first cell."""
    found = result("images_budget")
    if not found:
        return "Nothing measured yet."
    gap, count = found["ast_minus"], len(found["accuracy_per_seed"]["ast"])
    return (
        f"On {found['training_images']:,} images of 100 classes at 64 pixels, `resnet18` from scratch, "
        f"{found['epochs']} epochs, AST was {interval(gap['short'])} points beside plain training cut to its "
        f"cost, {interval(gap['random'])} beside random selection (95 % intervals, {count} seeds; "
        f"{found['machine']}, {found['date']}); fine-tuning was not measured."
    )


def attention() -> str:
    """From which length sparse attention pays, and what it does at the 64 tokens of an image."""
    runs = books.read(books.RESULTS / "attention.jsonl")
    if not runs:
        return "Not measured yet."
    seconds = {(case["length"], case["kind"]): case["seconds"] for case in runs[-1]["cases"]}
    lengths = sorted({length for length, _ in seconds})
    times = {n: seconds[n, "sparse"] / seconds[n, "dense"] for n in lengths}
    pays = [n for n in lengths if all(times[m] < 1 for m in lengths if m >= n)]
    words = f"it pays from {pays[0]:,} tokens on" if pays else "it never pays"
    first, last = lengths[0], lengths[-1]
    return (
        f"Forward and backward, it takes {times[first]:.2f} times as long as dense attention at the {first} "
        f"tokens of an image, and {times[last]:.2f} times at {last:,}; of the lengths tried {words} "
        f"({runs[-1]['device']}, {runs[-1]['date']})."
    )


def between(text: str, name: str, content: str, prefix: str = "") -> str:
    """`text` with `content` between the marks of that name."""
    body = "\n".join((prefix + line).rstrip() for line in content.splitlines())
    begin, end = (re.escape(f"{prefix}<!-- {mark}{name} -->") for mark in ("", "/"))
    text, count = re.subn(rf"({begin}\n)(?:.*\n)*?({end})", lambda m: m[1] + body + "\n" + m[2], text)
    if count != 1:
        raise ValueError(f"marks {name}: expected one pair, found {count}")
    return text


def derived() -> dict[Path, str]:
    """Every derived file and what it should hold."""
    docs, standalone = ROOT / "docs", ROOT / "standalone"
    differing = [row for row in flags(images) if row not in flags(program)]
    tables = {"flags": table_of_flags(flags(program)), "flags imagenet100": table_of_flags(differing)}
    files = {
        docs / "api.md": api(),
        docs / "configuration.md": filled(docs / "configuration.md", tables),
        docs / "measures.md": filled(docs / "measures.md", {"measured": measured()}),
        docs / "method.md": filled(
            docs / "method.md", {"responses": responses(), "poles": poles(), "bias": bias()}
        ),
        docs / "extending.md": filled(docs / "extending.md", {"letters code": code(), "letters": language()}),
        docs / "search.md": search(),
        docs / "evidence.md": all_evidence(),
        ROOT / "README.md": filled(ROOT / "README.md", {"result": in_short(), "five": five()}),
        docs / "scale.md": filled(docs / "scale.md", scale()),
    }
    for name, words in (("cifar10_ast", evidence()), ("imagenet100_ast", evidence_on_images())):
        script = standalone / f"{name}.py"
        wrapped = textwrap.fill(words, 105)
        files[script] = between(script.read_text(encoding="utf-8"), "measured", wrapped, "# ")
    script = standalone / "cifar10_ast.py"
    files[script] = between(files[script], "attention", textwrap.fill(attention(), 105), "# ")
    return files


def filled(path: Path, contents: dict[str, str]) -> str:
    """The text of a file with the contents between the marks of their names."""
    text = path.read_text(encoding="utf-8")
    for name, content in contents.items():
        text = between(text, name, content)
    return text


def search() -> str:
    """docs/search.md with a line a chapter."""
    begun = trials.as_begun(trials.DEFAULT)
    rows = [(name, *proof.spread(tried, begun)) for name, tried in trials.CHAPTERS.items()]
    heads = "what was tried", "trials", "best, minus the rule", "worst, minus the rule"
    found = proof.as_markdown(dict(zip(heads, zip(*rows, strict=True), strict=True)))
    held_out = proof.where(*proof.searched(), judged="held_out")
    return filled(ROOT / "docs" / "search.md", {"trials": found, "where": held_out})


def peer() -> str:
    """The published package beside the kit and plain training: means over the seeds."""
    whose = {"peer": "the published package", **KIT_BESIDE_PEER, "full": "plain training"}
    rows = []
    for bed in ("four", "two-long"):
        runs = books.read(books.RESULTS / f"peer_{bed}.jsonl")
        for name, who in whose.items():
            own = {run["seed"]: run[name] for run in runs if name in run}
            if own:
                means = [proof.mean(own, k) for k in ("accuracy", "activation_rate", "train_seconds")]
                saved = proof.mean(own, "saving_it_prints_percent") if name == "peer" else None
                claim = f"{saved:.0f} %" if saved else "-"
                figures = f"{means[0]:.2f} | {means[1]:.3f} | {means[2]:.0f} | {claim}"
                rows.append(f"| {bed} | {who} | {len(own)} | {figures} |")
    head = "| bed | | seeds | accuracy, % | activated | training s | says it saved |"
    return "\n".join([head, "|" + "---|" * 7, *rows]) if rows else proof.NOTHING


KIT_BESIDE_PEER = {
    "ast": "the kit, as many samples",
    "shipped": "the kit as it ships, same target",
    "no_ramp": "the kit without its ramp, same target",
}


def responses() -> str:
    """Step responses of the controllers: the worst of all targets."""
    found = result("controller")
    if not found:
        return proof.NOTHING
    rows = [
        "| gate | controller | targets settled | slowest, epochs | overshoot | error at the end |",
        "|" + "---|" * 6,
    ]
    kinds = dict.fromkeys((row["gate"], row["controller"]) for row in found["rows"])
    for kind in kinds:
        own = [row for row in found["rows"] if (row["gate"], row["controller"]) == kind]
        settled = [row["settling_epochs"] for row in own if row["settling_epochs"] is not None]
        error = max(abs(row["error_at_the_end"]) for row in own)
        slowest = f"{max(settled):.2f}" if len(settled) == len(own) else "never"
        many, over = f"{len(settled)} of {len(own)}", largest(own, "overshoot")
        rows.append(f"| {' | '.join(kind)} | {many} | {slowest} | {over:.3f} | {error:.3f} |")
    words = f"Stream: {found['stream']}. {found['device']}, {found['date']}; `{found['command']}`."
    return "\n".join([*rows, "", words])


def poles() -> str:
    """The slowest pole of the linearised loops, and how far the slope may be wrong."""
    rows = [
        "| controller | `ema_alpha` | slowest pole | chunks until 2 % is left | stable up to | seen late |",
        "|" + "---|" * 6,
    ]
    for row in controller.poles():
        limits = f"{row['stable_to']:.1f} × | {row['stable_to_late']:.1f} ×"
        figures = f"{row['pole']:.5f} | {row['chunks']:,} | {limits}"
        rows.append(f"| {row['controller']} | {row['ema_alpha']} | {figures} |")
    return "\n".join(rows)


def bias() -> str:
    """How much likelier than a the easiest and the hardest are chosen."""
    rows = ["| a | easiest, p ÷ a | hardest, p ÷ a | hardest ÷ easiest |", "|---|---|---|---|"]
    for rate in (0.1, 0.2, 0.4, 0.6):
        ranks = (torch.arange(1000) + 0.5) / 1000
        threshold = program.solve_threshold(ranks, 1000 * rate, rate, 0.25)
        low, *_, high = (program.activation_probability(ranks, threshold, rate, 0.25) / rate).tolist()
        rows.append(f"| {rate} | {low:.2f} | {high:.2f} | {high / low:.1f} |")
    return "\n".join(rows)


def code() -> str:
    """The model, the loss and the trainer of the language model, as they are in benchmarks/letters.py."""
    parts = (letters.Letters, letters.sequence_loss, letters.trainer_of)
    return "```python\n" + "\n\n\n".join(inspect.getsource(part).strip() for part in parts) + "\n```"


def language() -> str:
    """Bits a letter of the language model, AST beside its rivals."""
    found = result("letters")
    if not found:
        return proof.NOTHING
    rows = ["| policy | seeds | FLOPs ÷ full's | bits a letter | AST minus it |", "|" + "---|" * 5]
    for row in found["rows"]:
        gap = "-" if row["policy"] == "ast" else f"{row['ast_minus']:+.3f} ± {row['half_width']:.3f}"
        figures = f"{row['seeds']} | {row['cost']:.3f} | {row['bits']:.3f} | {gap}"
        rows.append(f"| {row['policy']} | {figures} |")
    words = f"{found['epochs']} epochs, fewer bits are better. {found['device']}, {found['date']}"
    return "\n".join([*rows, "", f"{words}; `{found['command']}`."])


# The rows at the head of docs/evidence.md: a bed, AST's name there, and both in words. Wins, ties and losses.
WINS = [
    ("whole", "ast@0.4", "all of CIFAR-10, 20 epochs"),
    ("whole-long", "ast@0.2", "the same, 60 epochs"),
    ("ten", "ast@0.2", "10,000 of its images, a small network"),
    ("long-gpu", "ast@0.2", "four classes, trained long"),
    ("two-long-gpu", "ast@0.2", "two classes, trained longer than they need"),
    ("tail-gpu", "ast@0.4:balance=true", "a long tail, 16 epochs, `--balance`"),
    ("whole-tail", "ast@0.4:balance=true", "the same images, 40 epochs of `resnet`"),
    ("filmed", "ast@0.4", "images that repeat"),
    ("tuned", "ast@0.2", "fine-tuned"),
    ("four-40", "ast@0.2", "two fifths of the labels wrong"),
]


def wins() -> str:
    """AST beside chance, fewer epochs and full training on each kind of task."""
    heads = "trained on | a | beside `random` | beside `short` | beside `full` | FLOPs saved"
    rows = [f"| {heads} |", "|" + "---|" * 6]
    for bed, name, words in WINS:
        runs = proof.load(bed)
        if name in runs:
            rivals = (proof.rival_of(name), proof.plain_at_its_cost(runs, name), "full")
            gaps = " | ".join(told(proof.gap(runs, name, rival)) for rival in rivals)
            rate, share = name[4:7], 1 - proof.mean(runs[name], "cost")
            rows.append(f"| {words} (`{bed}`) | {rate} | {gaps} | {share:.0%} |")
    return "\n".join(rows) if len(rows) > 2 else proof.NOTHING


def told(gap: proof.Gap | None) -> str:
    """A difference, and which way it falls where its interval is clear of 0."""
    if gap is None:
        return "-"
    sides = "ahead" if gap.mean > 0 else "behind"
    return f"{sides if abs(gap.mean) > gap.half else 'open'}: {gap}"


# README's five rows: what for, the bed, AST's name there, what is told, and a remark.
FIVE = [
    ("from scratch, all of CIFAR-10, 20 epochs", "whole", "ast@0.4", "saved", "all-of-cifar-10", ""),
    ("a vision transformer", "vit", "ast@0.4", "saved", "", ""),
    (
        "fine-tuning, four classes",
        "tuned",
        "ast@0.2",
        "random",
        "evidence",
        "",
    ),
    (
        "a long tail, 16 epochs, `--balance`",
        "tail-gpu",
        "ast@0.4:balance=true",
        "saved",
        "a-long-tail",
        "; as many of every class by chance do as well",
    ),
    ("where it loses: two fifths of the labels wrong", "four-40", "ast@0.2", "random", "wrong-labels", ""),
]


def five() -> str:
    """README's table: a number, its seeds, and a link a row."""
    rows = ["| task | AST | seeds | |", "|---|---|---|---|"]
    for task, bed, name, kind, place, remark in FIVE:
        runs = proof.load(bed)
        if name not in runs:
            rows.append(f"| {task} | not measured yet | - | |")
            continue
        gap = proof.gap(runs, name, proof.rival_of(name))
        if kind == "saved":
            words = f"saves {proof.saved(runs, name)} of the FLOPs at equal accuracy"
        elif abs(gap.mean) > gap.half:
            words = f"{distance(gap)} random selection"
        else:
            words = f"no difference to random selection shows: {gap.mean:+.2f} ± {gap.half:.2f} points"
        rows.append(f"| {task} | {words}{remark} | {gap.seeds} | [table](docs/evidence.md#{place}) |")
    return "\n".join(rows)


def in_short() -> str:
    """The sentences at the head of README."""
    runs, name = proof.load("whole"), "ast@0.4"
    full, chance = (proof.gap(runs, name, rival) for rival in ("full", "random@0.4"))
    less = 1 - proof.mean(runs[name], "cost")
    words = (
        f"In 20 epochs on all of CIFAR-10, with {less:.0%} less computation, AST was {distance(full)} full "
        f"training, and {distance(chance)} as many images chosen at random (95 % intervals, {full.seeds} "
        "seeds). Plain training cut to the same accuracy would have cost more: AST saved "
        f"{proof.saved(runs, name)} of its computation."
    )
    return textwrap.fill(words, 118)


def distance(gap: proof.Gap) -> str:
    """A difference in words, to stand before the rival's name."""
    return f"{abs(gap.mean):.2f} ± {gap.half:.2f} points {'ahead of' if gap.mean > 0 else 'behind'}"


# The tables of docs/evidence.md: a bed, a pattern of the policies shown, and columns left out.
ALIKE = "worst class, natural, natural minus `random`"
AT_0_4 = r"^(full|infobatch|short@0.6.*|\w+@0.4(:balance=true)?)$"
BEDS = {
    "whole": ("", ALIKE),
    "whole-alone": ("", f"minus `random`, minus `short`, minus `full`, saved at equal accuracy, {ALIKE}"),
    "whole-long": ("", ALIKE),
    "two-long-gpu": ("", ALIKE),
    "long-gpu": ("", ALIKE),
    "tail-gpu": (r"^(?!.*@0.(1|37))", ""),
    "tail": (AT_0_4, "natural, natural minus `random`"),
    "whole-tail": (AT_0_4, "worst class, seeds"),
    "filmed": ("^(full|short|.*@0.4)", ALIKE),
    "quick": ("^(?!ast@0.2:)", f"seeds, minus `balanced`, minus `short`, saved at equal accuracy, {ALIKE}"),
    "four-20": ("", ALIKE),
    "four-40": ("^(?!.*guard)", ALIKE),
}


def all_evidence() -> str:
    """docs/evidence.md with its tables."""
    tables = {"wins": wins(), "peer": peer(), "where": machines()}
    tables["finetuning"] = finetuning.table()
    for bed, (shown, without) in BEDS.items():
        tables[bed] = proof.table(bed, shown=shown, without=without)
    return filled(ROOT / "docs" / "evidence.md", tables)


def machines() -> str:
    """Which beds ran where, a line a machine."""
    beds = defaultdict(list)
    for bed in BEDS:
        beds[proof.where(bed).partition(" runs on ")[2].partition(", torch")[0]].append(f"`{bed}`")
    return "\n".join(f"- {', '.join(names)}: {where}." for where, names in beds.items() if where)


if __name__ == "__main__":
    for path, content in derived().items():
        path.write_text(content, encoding="utf-8")
