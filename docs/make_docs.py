"""Writes what is derived: docs/api.md from the docstrings, and in README.md, docs/ and the first
cells of the programs the marked places: flags from `Settings`, figures from benchmarks/results.

    python docs/make_docs.py, then python build_notebooks.py
"""

import inspect
import math
import re
import sys
import textwrap
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "standalone"), str(ROOT / "benchmarks")]
import books  # noqa: E402
import evidence as proof  # noqa: E402
import trials  # noqa: E402

import cifar10_ast as program  # noqa: E402
import imagenet100_ast as images  # noqa: E402

CHAPTERS = {
    "Train a model of your own": ["ASTConfig", "AdaptiveSparseTrainer", "Controls", "BadInput"],
    "Run the whole program": ["Settings", "prepare", "run", "run_live", "ImageData"],
    "Gates": ["RememberedGate", "LiveGate", "RandomGate", "Batch"],
    "What it cost": ["Ledger"],
}
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
        if inspect.isfunction(function) and not method.startswith("_") and function.__doc__:
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


def seeds(found: dict, policy: str) -> str:
    return ", ".join(f"{value:.2f}" for value in found["accuracy_per_seed"][policy].values())


# What is measured, how a result shows it, what is to be reached, and whether a result reaches it.
Row = tuple[str, Callable[[dict], str], str, Callable[[dict], bool]]
ROWS: dict[str, list[Row]] = {
    "engine": [
        (
            "seconds a candidate in the sparse phase ÷ seconds a sample of full training, a = 0.10 and 0.40",
            lambda r: f"{r['ratio_at_0.10']:.3f} and {r['ratio_at_0.40']:.3f}",
            "≤ 0.13 and ≤ 0.43",
            lambda r: r["ratio_at_0.10"] <= 0.13 and r["ratio_at_0.40"] <= 0.43,
        )
    ],
    "feed": [
        (
            "a full epoch ÷ the same steps on one held batch",
            lambda r: f"{r['ratio']:.3f}",
            "≤ 1.08",
            lambda r: r["ratio"] <= 1.08,
        )
    ],
    "device": [
        (
            "`--amp auto` against float32, contiguous",
            lambda r: f"{r['times_faster']:.2f} ×",
            "≥ 2 ×",
            lambda r: r["times_faster"] >= 2,
        )
    ],
    "control": [
        (
            "largest error of a sparse epoch's activation rate, targets 0.05 to 0.8",
            lambda r: f"{r['largest_error_of_a_sparse_epoch']:.4f}",
            "≤ 0.005",
            lambda r: r["largest_error_of_a_sparse_epoch"] <= 0.005,
        ),
        (
            "target moved in mid-epoch: error after 1/10 epoch; overshoot",
            lambda r: (
                f"{max(s['error_after_a_tenth_of_an_epoch'] for s in r['steps']):.4f}; "
                f"{max(s['overshoot'] for s in r['steps']):.4f}"
            ),
            "≤ 0.02; ≤ 0.05",
            lambda r: all(
                s["error_after_a_tenth_of_an_epoch"] <= 0.02 and s["overshoot"] <= 0.05 for s in r["steps"]
            ),
        ),
        (
            "rate restored when a tenth of the activated is lost, targets 0.1 and 0.4",
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
            "seconds an epoch with the dashboard ÷ without, on every core and with one free; largest picture",
            lambda r: (
                f"{r['every_core']['ratio']:.3f} and {r['a_core_free']['ratio']:.3f}; "
                f"{max(r[k]['picture_bytes'] for k in ('every_core', 'a_core_free')) / 1000:.0f} kB"
            ),
            "≤ 1.03 and ≤ 1.01; ≤ 100 kB",
            lambda r: (
                r["every_core"]["ratio"] <= 1.03
                and r["a_core_free"]["ratio"] <= 1.01
                and max(r[k]["picture_bytes"] for k in ("every_core", "a_core_free")) <= 100_000
            ),
        )
    ],
    "ledger": [
        (
            "FLOPs counted ÷ FLOPs by hand, three models, forward and with the backward pass",
            lambda r: f"{min(r['counted_by_hand'].values()):.4f} to {max(r['counted_by_hand'].values()):.4f}",
            "0.99 to 1.01",
            lambda r: all(0.99 <= v <= 1.01 for v in r["counted_by_hand"].values()),
        )
    ],
    "accuracy": [
        (
            "CIFAR-10, simple_cnn, 40 epochs at a mean activation of "
            "0.104: AST, mean of 3 seeds (the original report: 61.2 %)",
            lambda r: f"{r['mean_accuracy']['ast']:.2f} % ({seeds(r, 'ast')})",
            "≥ 77.5 %",
            lambda r: r["mean_accuracy"]["ast"] >= 77.5,
        ),
        *[
            (
                f"{words}; AST minus it (paired, 95 % interval)",
                lambda r, rival=rival: (
                    f"{r['mean_accuracy'][rival]:.2f} % ({seeds(r, rival)}); {paired(r, rival)}"
                ),
                "not above AST",
                lambda r, rival=rival: r["mean_accuracy"][rival] <= r["mean_accuracy"]["ast"],
            )
            for rival, words in (
                ("random", "`random` beside it, as many samples"),
                ("short", "plain training of as few epochs, rounded up to whole ones"),
            )
        ],
    ],
    "speed": [
        (
            "seconds to 61.2 % on CIFAR-10 (the original report: 628 s on a P100): "
            "AST, in its warm-up epoch, where nothing is skipped yet; full",
            lambda r: "; ".join(
                "not reached" if v is None else f"{v:.1f} s" for v in r["seconds_to_61.2_percent"].values()
            ),
            "≤ 25 s",
            lambda r: (r["seconds_to_61.2_percent"]["ast"] or math.inf) <= 25,
        )
    ],
}


def times_faster(found: dict) -> str:
    return " and ".join(f"{found[f'workers_{count}']['times_faster']:.2f} ×" for count in (1, 2))


def paired(found: dict, rival: str) -> str:
    """AST minus a rival, seed by seed, with the half-width of its 95 % interval."""
    ours, theirs = (found["accuracy_per_seed"][policy] for policy in ("ast", rival))
    gaps = [ours[seed] - theirs[seed] for seed in ours]
    return str(proof.Gap(sum(gaps) / len(gaps), proof.half_width(gaps), len(gaps)))


def interval(gap: dict) -> str:
    width = gap["half_width"]
    return f"{gap['mean']:+.2f}" + ("" if width is None else f" ± {width:.2f}")


ROWS |= {
    "images_skip": [
        (
            "seconds a candidate at a = 0.25 ÷ seconds an image of full training: "
            "full-size JPEGs, a tiny model",
            lambda r: f"{r['ratio']:.3f}",
            "≤ 0.30",
            lambda r: r["ratio"] <= 0.30,
        )
    ],
    "images_compute": [
        (
            "the same, `resnet18` on JPEGs of 64 pixels",
            lambda r: f"{r['ratio']:.3f}",
            "≤ 0.29",
            lambda r: r["ratio"] <= 0.29,
        ),
    ],
    "images_decode": [
        (
            "160-pixel random crops a second from full-size JPEGs, beside torchvision's `ImageFolder` in a "
            "`DataLoader`, with 1 and 2 workers each",
            times_faster,
            "≥ 1.6 ×",
            lambda r: all(r[f"workers_{count}"]["times_faster"] >= 1.6 for count in (1, 2)),
        )
    ],
    "images_packed": [
        (
            "the same crops from packed arrays",
            times_faster,
            "≥ 10 ×",
            lambda r: all(r[f"workers_{count}"]["times_faster"] >= 10 for count in (1, 2)),
        )
    ],
    "images_pack": [
        (
            "images packed at 256 pixels a processor second, checksums and journal included, beside a plain "
            "loop of PIL that saves PNGs; that saves JPEGs",
            lambda r: f"{r['times_faster']:.2f} ×; {r['times_faster_than_saving_as_jpeg']:.2f} ×",
            "≥ 1.5 ×, of PNGs",
            lambda r: r["times_faster"] >= 1.5,
        )
    ],
    "images_memory": [
        (
            "growth of resident memory over 3 epochs of 20,000 images",
            lambda r: f"{r['growth_percent']:.2f} %",
            "≤ 2 %",
            lambda r: r["growth_percent"] <= 2,
        )
    ],
    "images_budget": [
        (
            "100 classes of ImageNet, 64 pixels, `resnet18` from scratch: AST, plain training of as few "
            "epochs, random selection",
            lambda r: (
                ", ".join(f"{r['mean_accuracy'][p]:.2f} %" for p in ("ast", "short", "random"))
                + f" ({r['training_images']:,} images, {r['epochs']} epochs, "
                + f"{len(r['accuracy_per_seed']['ast'])} seeds)"
            ),
            "AST ahead of both",
            lambda r: all(r["mean_accuracy"]["ast"] > r["mean_accuracy"][p] for p in ("short", "random")),
        ),
        (
            "AST minus plain training at its cost; minus random selection (paired, 95 % interval)",
            lambda r: "; ".join(interval(r["ast_minus"][p]) for p in ("short", "random")),
            "above 0",
            lambda r: all(
                r["ast_minus"][p]["mean"] > (r["ast_minus"][p]["half_width"] or 0)
                for p in ("short", "random")
            ),
        ),
    ],
}


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
    ours, random = found["mean_accuracy"]["ast"], found["mean_accuracy"]["random"]
    rate, count = found["mean_activation"]["ast"], len(found["accuracy_per_seed"]["ast"])
    return (
        f"Measured on CIFAR-10 (as JPEGs), `simple_cnn`, 40 epochs on {rate:.1%} of the samples, mean of "
        f"{count} seeds: AST {ours:.2f} %, random selection of as many {random:.2f} %, a "
        f"difference of {paired(found, 'random')}; plain training of {found['epochs_of_short']} epochs, "
        f"{found['epochs_of_short'] / (found['settings']['epochs'] * rate) - 1:.0%} dearer, "
        f"{found['mean_accuracy']['short']:.2f} %, {paired(found, 'short')}. "
        f"{found['machine']}, {found['date']}."
    )


def evidence_on_images() -> str:
    """The measured sentences in the ImageNet-100 program's first cell."""
    sentences = []
    if found := result("images_budget"):
        mean, gap = found["mean_accuracy"], found["ast_minus"]
        sentences.append(
            f"Measured on {found['training_images']:,} images of 100 classes of ImageNet at 64 pixels, "
            f"`resnet18` from scratch, {found['epochs']} epochs, {len(found['accuracy_per_seed']['ast'])} "
            f"seeds: AST {mean['ast']:.2f} %, after {found['seconds']['ast']:.0f} s of "
            f"training. That is {interval(gap['short'])} points against plain training cut to that cost, and "
            f"{interval(gap['random'])} against random selection (95 % intervals; {found['machine']}, "
            f"{found['date']})."
        )
        if all(abs(one["mean"]) <= (one["half_width"] or math.inf) for one in gap.values()):
            sentences.append("Neither is a difference: here choosing was worth nothing that shows.")
    if found := result("images_skip"):
        sentences.append(
            f"From full-size JPEGs, a candidate at a = 0.25 takes {found['ratio']:.2f} of the time of a "
            f"trained image ({found['machine']}, {found['date']})."
        )
    return " ".join([*sentences, "Not measured on a GPU yet."] if sentences else ["Nothing measured yet."])


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
        docs / "scale.md": filled(docs / "scale.md", scale()),
        ROOT / "README.md": filled(ROOT / "README.md", {"result": in_short(), "wins": wins()}),
    }
    for name, words in (("cifar10_ast", evidence()), ("imagenet100_ast", evidence_on_images())):
        script = standalone / f"{name}.py"
        wrapped = textwrap.fill(words, 105)
        files[script] = between(script.read_text(encoding="utf-8"), "measured", wrapped, "# ")
    files[docs / "search.md"] = search()
    files[docs / "evidence.md"] = all_evidence()
    return files


def filled(path: Path, contents: dict[str, str]) -> str:
    """The text of a file with the contents between the marks of their names."""
    text = path.read_text(encoding="utf-8")
    for name, content in contents.items():
        text = between(text, name, content)
    return text


def search() -> str:
    """docs/search.md with a table under each chapter's mark."""
    text = (ROOT / "docs" / "search.md").read_text(encoding="utf-8")
    for chapter, tried in trials.CHAPTERS.items():
        text = between(text, chapter, proof.trial_table(tried, trials.as_begun(trials.DEFAULT)))
    text = between(text, "sparer", proof.rival_table(trials.SPARER))
    text = between(text, "repeats", proof.rival_table(trials.REPEATS))
    text = between(text, "few looks", proof.rival_table(trials.FEW_LOOKS))
    text = between(text, "margin", proof.rival_table(trials.MARGIN))
    text = between(text, "on a GPU", proof.rival_table(trials.ON_A_GPU))
    named = {(bed, t.run) for tried in trials.CHAPTERS.values() for t in tried for bed in t.beds}
    lists = (trials.SPARER, trials.REPEATS, trials.FEW_LOOKS, trials.MARGIN, trials.ON_A_GPU)
    named |= {(bed, name) for tried in lists for bed, names in tried.items() for name in names}
    text = between(text, "besides", proof.rival_table(proof.besides(named)))
    sentences = [f"`{bed}`: {proof.where(bed, judged='held_out')}" for bed in proof.searched()]
    return between(text, "where", "\n\n".join(sentences))


def peer(bed: str) -> str:
    """The published package beside the kit and plain training on a bed, seed by seed."""
    runs = books.read(books.RESULTS / f"peer_{bed}.jsonl")
    if not runs:
        return proof.NOTHING
    rows = [
        "| seed | | accuracy, % | activated | training s | what it says it saved |",
        "|---|---|---|---|---|---|",
    ]
    for run in runs:
        saved = f"{run['peer']['saving_it_prints_percent']:.1f} %"
        whose = {"peer": run["package"], **KIT_BESIDE_PEER, "full": "plain training"}
        for name, who in ((name, who) for name, who in whose.items() if name in run):
            one = run[name]
            rows.append(
                f"| {run['seed']} | {who} | {one['accuracy']:.2f} | {one['activation_rate']:.3f} | "
                f"{one['train_seconds']:.0f} | {saved if name == 'peer' else '-'} |"
            )
    against = [beside(runs, name, words) for name, words in KIT_BESIDE_PEER.items()]
    where = {f"{run['bed']}; {run['device']}, torch {run['torch']}, {run['date']}" for run in runs}
    command = runs[0]["command"].replace("SEED", ",".join(str(run["seed"]) for run in runs))
    return "\n".join([*rows, "", *filter(None, against), "", f"{'; '.join(sorted(where))}; `{command}`."])


KIT_BESIDE_PEER = {
    "ast": "the kit, as many samples",
    "shipped": "the kit as it ships, same target",
    "no_ramp": "the kit without its ramp, same target",
}


def beside(runs: list[dict], name: str, words: str) -> str:
    """The package against one of the kit's rows, seed by seed; nothing where that was not run."""
    runs = [run for run in runs if name in run]
    times = ", ".join(f"{run['peer']['train_seconds'] / run[name]['train_seconds']:.2f}" for run in runs)
    gains = ", ".join(f"{run[name]['accuracy'] - run['peer']['accuracy']:+.2f}" for run in runs)
    if not runs:
        return ""
    return f"- {words}: {times} times as fast as the package; accuracy minus the package's {gains}."


def responses() -> str:
    """Step responses of the controllers."""
    found = result("controller")
    if not found:
        return proof.NOTHING
    rows = [
        "| gate | controller | target | settled after, epochs | overshoot | error at the end |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        settled = "never" if row["settling_epochs"] is None else f"{row['settling_epochs']:.2f}"
        rows.append(
            f"| {row['gate']} | {row['controller']} | {row['target']} | {settled} | {row['overshoot']:.3f} | "
            f"{row['error_at_the_end']:+.3f} |"
        )
    words = (
        f"Stream: {found['stream']}; the target steps {found['step']} of the replay. Settled: the rate, "
        f"averaged over {found['smoothed']:,} candidates, stays within {found['band']:.0%} of the target or "
        f"what chance makes of it. {found['device']}, "
        f"{found['date']}; `{found['command']}`."
    )
    return "\n".join([*rows, "", words])


def headline() -> str:
    """AST beside its rivals on the beds that have been judged on test images."""
    beds = {
        "whole": "50,000 images of ten classes, 20 epochs of `resnet` on a GPU",
        "whole-long": "the same, 60 epochs of `resnet` on a GPU",
        "all": "50,000 images of ten classes, 16 epochs",
        "ten": "10,000 images of ten classes, 30 epochs",
        "long-gpu": "5,000 images of four classes, 60 epochs, on a GPU",
        "two-long": "5,000 images of two classes, 60 epochs",
        "two-long-gpu": "the same on a GPU",
        "tail-gpu": "ten classes, 20 images of the commonest for one of the rarest, 16 epochs, on a GPU",
        "tail": "the same on a processor",
        "whole-tail": "the same images, 40 epochs of `resnet` on a GPU",
        "filmed": "3,500 images of ten classes, a tenth of them as 20 frames each (made), 30 epochs",
    }
    some = {
        "tail": ("0.4", "0.2", "0.1", "0.4, balance", "0.2, balance"),
        "whole-tail": ("0.4", "0.4, balance"),
        "filmed": ("0.4", "0.2"),
    }
    return proof.headline(beds, some) + sources_of(*beds)


# The rows of README's table: bed, rate, and both in words. Wins, ties and losses, one of each kind of task.
WINS = [
    ("whole", "0.4", "all of CIFAR-10, 20 epochs of `resnet`"),
    ("whole-long", "0.2", "the same, 60 epochs"),
    ("ten", "0.2", "10,000 of its images, 30 epochs of a small network"),
    ("two-long-gpu", "0.2", "two of its classes, trained longer than they need"),
    ("tail-gpu", "0.4, balance", "rare classes that count as much as others, 16 epochs, `--balance`"),
    ("whole-tail", "0.4, balance", "the same images, 40 epochs of `resnet`"),
]


def wins() -> str:
    """AST beside chance, fewer epochs and full training on a few kinds of task."""
    rows = [
        "| trained on | a | beside `random` | beside `short` | beside `full` | FLOPs saved |",
        "|" + "---|" * 6,
    ]
    for bed, rate, words in WINS:
        runs = proof.load(bed)
        name = dict(proof.default_rows(runs)).get(rate)
        if not name or "full" not in runs:
            continue
        rivals = (proof.rival_of(name), proof.plain_at_its_cost(runs, name), "full")
        gaps = " | ".join(told(rival and proof.gap(runs, name, rival)) for rival in rivals)
        share = 1 - proof.mean(runs[name], "cost")
        rows.append(f"| {words} | {rate.partition(',')[0]} | {gaps} | {share:.0%} |")
    return "\n".join(rows) if len(rows) > 2 else proof.NOTHING


def told(gap: proof.Gap | None) -> str:
    """A difference, and which way it falls where its interval is clear of 0."""
    if gap is None:
        return "-"
    sides = "ahead" if gap.mean > 0 else "behind"
    return f"{sides if abs(gap.mean) > gap.half else 'open'}: {gap}"


def in_short() -> str:
    """The sentences at the head of README."""
    runs = proof.load("whole")
    name = dict(proof.default_rows(runs)).get("0.4")
    gaps = [proof.gap(runs, name, rival) for rival in ("full", proof.rival_of(name))] if name else [None]
    if None in gaps:
        return proof.NOTHING
    less = 1 - proof.mean(runs[name], "cost")
    words = (
        f"In 20 epochs on all of CIFAR-10, with {less:.0%} less computation, AST was {distance(gaps[0])} "
        f"full training, and {distance(gaps[1])} as many images chosen at random (95 % intervals, "
        f"{gaps[0].seeds} seeds). Against plain training cut to the same accuracy it saved "
        f"{at_equal_accuracy(runs, name)} of the computation."
    )
    return textwrap.fill(words, 118)


def distance(gap: proof.Gap) -> str:
    """A difference in words, to stand before the rival's name."""
    return f"{abs(gap.mean):.2f} ± {gap.half:.2f} points {'ahead of' if gap.mean > 0 else 'behind'}"


def saved(bed: str) -> str:
    """What AST saves on a bed at equal accuracy."""
    runs = proof.load(bed)
    ours = {name: f" at a = {rate}" for rate, name in proof.default_rows(runs)}
    if "full" not in runs or "infobatch" not in runs:
        return proof.NOTHING
    return (
        "Against plain training cut to the same accuracy AST saves "
        f"{listed([at_equal_accuracy(runs, name) + words for name, words in ours.items()])} of the FLOPs "
        f"there; InfoBatch {at_equal_accuracy(runs, 'infobatch')}. In brackets: 95 %, by a bootstrap over "
        "seeds. Plain training's cost is read off a straight line between the lengths that were run, which "
        "favours both a little."
    )


def at_equal_accuracy(runs: dict, name: str) -> str:
    """A saving and its interval in words."""
    share, ends = proof.saving_at_equal_accuracy(runs, name), proof.saving_interval(runs, name)
    return "-" if share is None else f"{share:.0f} %" + (f" ({ends[0]:.0f} to {ends[1]:.0f})" if ends else "")


def listed(words: list[str]) -> str:
    """Words with commas, the last two with "and"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def sources_of(*beds: str) -> str:
    """Below a table: where its runs were made; nothing where there are none."""
    words = proof.where(*beds)
    return "" if words == proof.NOTHING else f"\n\n{words}"


def all_evidence() -> str:
    """docs/evidence.md with its tables."""
    text = filled(ROOT / "docs" / "evidence.md", {"headline": headline()})
    text = between(text, "saved", textwrap.fill(saved("whole"), 118), "  ")
    for bed in (*trials.compare.FULL, *trials.compare.QUICK):
        text = between(text, f"table {bed}", proof.table(bed) + sources_of(bed))
    for bed in ("whole-alone", "all", "tail", "filmed", "ten", "two-long", "long"):
        text = between(text, f"times {bed}", proof.times(bed))
    for bed in ("tail", "tail-gpu", "whole-tail"):
        text = between(text, f"natural {bed}", proof.natural(bed))
    for bed in ("four", "two-long"):
        text = between(text, f"peer {bed}", peer(bed))
    return between(text, "controller", responses())


if __name__ == "__main__":
    for path, content in derived().items():
        path.write_text(content, encoding="utf-8")
