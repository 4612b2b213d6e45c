"""Measures what the kit must reach, as ratios within one process, and keeps a line of results/bars.jsonl.

    python benchmarks/bars.py engine feed device control gate dashboard --data path/to/cifar10
    python benchmarks/bars.py ledger                                     # FLOPs
    python benchmarks/bars.py accuracy speed --data path/to/cifar10      # an hour on two cores; resumable

Run it on an otherwise idle machine. `accuracy` and `speed` need real CIFAR-10; the others time or count and
take any data of that shape (`--data shapes` will do, and is called synthetic in the result).
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import books
import numpy as np
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "standalone"))
import cifar10_ast as ast  # noqa: E402  (the program that ships, not a copy)

CPU = torch.device("cpu")
ORIGINAL_ACCURACY = 61.2  # percent, the original report's simple_cnn after 40 epochs and 628 s on a P100
BUDGET = {"epochs": 40, "warmup_epochs": 1, "ramp_epochs": 0, "anneal_epochs": 0, "target_activation": 0.081}


def trainer(
    data: ast.ImageData,
    source: type[ast.ArraySource] = ast.ArraySource,
    model: Callable[[torch.nn.Module], torch.nn.Module] = lambda model: model,
    **values: object,
) -> ast.AdaptiveSparseTrainer:
    """A trainer of the program's own model and recipe, silent; `values` are settings."""
    settings = ast.fitted(ast.fill_defaults(ast.Settings(device="cpu", **values)), data)
    torch.manual_seed(0)
    network = model(ast.build_model(settings, data))
    optimizer, criterion = ast.recipe(settings, network)
    size = settings.batch_size
    return ast.AdaptiveSparseTrainer(
        network,
        source(data.train_images, data.train_labels, CPU, size, ast.augment),
        ast.ArraySource(data.val_images[:500], data.val_labels[:500], CPU, size, ast.plain_view),
        ast.ASTConfig.of(settings),
        optimizer,
        criterion,
        listeners=[],
    )


def phase_seconds(result: dict, phase: str) -> list[float]:
    """Seconds per candidate of each epoch in a phase."""
    return [row["seconds"] / row["candidates"] for row in result["epochs"] if row["phase"] == phase]


SPARSE = {"warmup_epochs": 1, "ramp_epochs": 0, "anneal_epochs": 0}


def engine(data: ast.ImageData, rounds: int = 5) -> dict:
    """Seconds a candidate in the sparse phase ÷ seconds a sample of full training right before and after."""
    times: dict[str, list[float]] = {"full": [], "0.10": [], "0.40": []}

    def full() -> None:
        times["full"] += phase_seconds(trainer(data, gate="full", **SPARSE).train(epochs=2), "sparse")

    full()
    for _ in range(rounds):
        for target in ("0.10", "0.40"):
            run = trainer(data, target_activation=float(target), **SPARSE).train(epochs=3)
            times[target].append(statistics.mean(phase_seconds(run, "sparse")))
        full()
    around = [(before + after) / 2 for before, after in itertools.pairwise(times["full"])]
    ratios = {
        f"ratio_at_{target}": [one / whole for one, whole in zip(times[target], around, strict=True)]
        for target in ("0.10", "0.40")
    }
    median = {name: statistics.median(values) for name, values in (times | ratios).items()}
    return {name: median[name] for name in ratios} | {
        "rounds": {name: [round(one, 4) for one in values] for name, values in ratios.items()},
        "microseconds_per_candidate": {name: 1e6 * median[name] for name in times},
        "reach": "at most 0.13 and 0.43",
    }


class HeldSource(ast.ArraySource):
    """Gives the first batch of views again and again: steps without a feed."""

    def stream(self, batches: Iterable[tuple]) -> Iterator[ast.Batch]:
        held = None
        for indices, weights in batches:
            if held is None or len(held) != len(indices):  # once, and once more for the short last batch
                held = next(super().stream([(indices, weights)]))
            yield replace(held, indices=indices, weights=weights)


def feed(data: ast.ImageData, rounds: int = 4) -> dict:
    """Full-epoch time ÷ time of the same steps on one batch held in place."""
    fed, held = [], []
    for _ in range(rounds):
        fed += phase_seconds(trainer(data, gate="full", **SPARSE).train(epochs=2), "sparse")
        held += phase_seconds(trainer(data, HeldSource, gate="full", **SPARSE).train(epochs=2), "sparse")
    return {"ratio": statistics.median(fed) / statistics.median(held), "reach": "at most 1.08"}


def device(data: ast.ImageData, rounds: int = 3) -> dict:
    """Speed of `--amp auto`, channels last ÷ speed of float32, contiguous."""
    auto, plain = [], []

    class ContiguousSource(ast.ArraySource):
        def stream(self, batches: Iterable[tuple]) -> Iterator[ast.Batch]:
            for batch in super().stream(batches):
                yield replace(batch, images=batch.images.contiguous())

    def contiguous(network: torch.nn.Module) -> torch.nn.Module:
        return network.to(memory_format=torch.contiguous_format)

    for _ in range(rounds):
        auto += phase_seconds(trainer(data, gate="full", **SPARSE).train(epochs=2), "sparse")
        run = trainer(data, ContiguousSource, contiguous, gate="full", amp="off", **SPARSE)
        plain += phase_seconds(run.train(epochs=2), "sparse")
    amp = ast.fill_defaults(ast.Settings(device="cpu")).amp
    return {
        "amp": amp,
        "times_faster": statistics.median(plain) / statistics.median(auto),
        "reach": "at least 2",
    }


def control(data: ast.ImageData) -> dict:
    """Realised rates: every sparse epoch, steps of the target, and a tenth of the activated lost."""
    small = replace(data, train_images=data.train_images[:8000], train_labels=data.train_labels[:8000])
    worst = 0.0
    for target in (0.05, 0.1, 0.2, 0.4, 0.8):
        rows = trainer(small, target_activation=target, **SPARSE).train(epochs=4)["epochs"][1:]
        worst = max(worst, *(abs(row["activation_rate"] - target) for row in rows))
    return {
        "largest_error_of_a_sparse_epoch": worst,
        "steps": [
            target_step(small, 0.4, [(2.5, 0.1), (3.5, 0.4)]),
            target_step(small, 0.1, [(16.5, 0.4)]),
        ],
        "rate_with_a_tenth_lost": {str(a): rate_with_loss(a) for a in (0.1, 0.4)},
        "reach": "within 0.005; within 0.02 after 1/10 epoch, overshoot at most 0.05; within 0.01",
    }


def target_step(data: ast.ImageData, start: float, steps: list[tuple[float, float]]) -> dict:
    """Moves the target at given epochs; returns the rate's error from 1/10 epoch on, and its overshoot."""
    run = trainer(data, target_activation=start, **SPARSE)
    n, waiting, trace = len(data.train_labels), list(steps), []
    select = run.gate.select

    def spy(candidates, target, generator):
        indices, weights = select(candidates, target, generator)
        trace.append((run.controls.candidates / n, target, len(indices) / len(candidates)))
        return indices, weights

    def drag(event: str, data: dict) -> None:
        if waiting and run.controls.candidates >= waiting[0][0] * n:
            run.controls.set("target_activation", waiting.pop(0)[1])

    run.gate.select, run.listeners = spy, [drag]
    run.train(epochs=int(steps[-1][0]) + 2)
    settled, overshoot = 0.0, 0.0
    for at, target in steps:
        after = [(when, rate) for when, aim, rate in trace if at < when < at + 0.9 and aim == target]
        settled = max(settled, *(abs(rate - target) for when, rate in after if when > at + 0.1))
        away = [(target - rate if target < start else rate - target) for _, rate in after]
        overshoot, start = max(overshoot, *away), target
    return {"steps": steps, "error_after_a_tenth_of_an_epoch": settled, "overshoot": overshoot}


def rate_with_loss(target: float, n: int = 50_000, epochs: int = 8) -> float:
    """The rate delivered in the last epochs when a tenth of the activated comes back as lost."""
    generator = torch.Generator().manual_seed(0)
    gate, loss = ast.RememberedGate(ast.ASTConfig(), n), torch.rand(n, generator=generator)
    delivered = 0
    for epoch in range(epochs):
        for candidates in torch.randperm(n, generator=generator).chunk(20):
            indices, _ = gate.select(candidates, target, generator)
            lost = torch.rand(len(indices), generator=generator) < 0.1
            gate.observe(indices, torch.where(lost, torch.nan, loss[indices]))
            delivered += int((~lost).sum()) if epoch >= epochs - 3 else 0
    return delivered / (3 * n)


def gate(data: ast.ImageData, n: int = 1_281_167) -> dict:
    """Seconds the gate itself takes for an epoch of ImageNet's size, and bytes a sample."""
    seconds = {}
    for target in (0.1, 0.4):
        remembered = ast.RememberedGate(ast.ASTConfig(), n)
        remembered.observe(torch.arange(n), torch.rand(n))
        times = []
        for _ in range(5):
            chunks = torch.randperm(n).chunk(20)
            start = time.perf_counter()
            for candidates in chunks:
                indices, _ = remembered.select(candidates, target, None)
                remembered.observe(indices, torch.rand(len(indices)))
            times.append(time.perf_counter() - start)
        seconds[str(target)] = statistics.median(times)
    tensors = [v for v in remembered.state_dict().values() if isinstance(v, torch.Tensor)]
    held = sum(t.numel() * t.element_size() for t in tensors) / n
    return {
        "seconds_per_epoch": seconds,
        "bytes_per_sample": held + 4,  # and the epoch's order, int32
        "reach": "at most 0.5 s and 16 bytes",
    }


def dashboard(data: ast.ImageData, seconds: float = 140.0) -> dict:
    """Seconds an epoch with the dashboard ÷ without, training on every core and with one core free.

    Sliders, numbers and pictures are made as in a notebook, but for the sending: there is no kernel here.
    """
    found = {}
    threads = torch.get_num_threads()
    few = replace(data, train_images=data.train_images[:5000], train_labels=data.train_labels[:5000])
    for name, count in (("every_core", threads), ("a_core_free", max(1, threads - 1))):
        torch.set_num_threads(count)
        picture, pictures, times = watched_by_turns(few, seconds)
        found[name] = {
            "ratio": statistics.median(times[True]) / statistics.median(times[False]),
            "ratio_of_means": statistics.mean(times[True]) / statistics.mean(times[False]),
            "seconds_of_four_epochs": {"with": times[True], "without": times[False]},
            "picture_bytes": len(picture),
            "pictures_per_second": pictures / sum(times[True]),
        }
    torch.set_num_threads(threads)
    return found | {
        "threads": threads,
        "reach": "at most 1.03, 1.01 with a core free; at most 100 kB a picture",
    }


def watched_by_turns(data: ast.ImageData, seconds: float) -> tuple[bytes, int, dict[bool, list[float]]]:
    """Trains on everything in a worker, four epochs with the dashboard, four without, for so many seconds.

    Returns the last picture, how many there were, and the seconds of four epochs with and without. Short
    turns in one run, since the machine's own speed drifts by more than what is measured.
    """
    import ipywidgets

    run = trainer(data, gate="full", **SPARSE)
    histories, controls = ast.Histories(), run.controls
    panel = ast.Dashboard(ipywidgets.VBox(), histories, controls, ast.Settings())
    rows: list[float] = []
    pictures: list[dict] = []
    panel.image.observe(pictures.append, "value")
    run.listeners = [histories, lambda event, row: rows.append(row["seconds"]) if event == "epoch" else None]
    controls.deadline = time.monotonic() + seconds
    training = ast.begin_work(lambda: run.train(epochs=4000))

    async def pump() -> None:
        async with ast.Pump() as turn:
            while not training.done():
                began = time.monotonic()
                await turn()
                if len(rows) // 4 % 2:
                    panel.refresh()
                else:  # no share of this time may be saved up for drawing
                    panel.began += time.monotonic() - began

    asyncio.run(pump())
    training.result()
    whole = range(2, len(rows) // 4)  # the first turn of each warms up
    times = {on: [sum(rows[4 * i : 4 * i + 4]) for i in whole if i % 2 == on] for on in (True, False)}
    return panel.image.value, len(pictures), times


def conv(side: int, inputs: int, outputs: int, kernel: int = 3) -> float:
    """FLOPs of a convolution with `side` x `side` outputs: two for every multiply and add."""
    return 2.0 * side**2 * inputs * outputs * kernel**2


def by_hand() -> dict[str, tuple[torch.nn.Module, int, list[float]]]:
    """Model, image side, and the FLOPs of each layer forward, written down from the papers' tables."""
    import torchvision

    simple = [conv(32, 3, 32), conv(16, 32, 64), conv(8, 64, 128), 2.0 * 2048 * 256, 2.0 * 256 * 10]
    residual = [conv(32, 3, 32)]
    for side, inputs, outputs in ((16, 32, 64), (8, 64, 128), (4, 128, 256)):
        residual += [conv(side, inputs, outputs), conv(side, outputs, outputs), conv(side, outputs, outputs)]
    residual.append(2.0 * 256 * 10)
    resnet18 = [conv(112, 3, 64, 7), *[conv(56, 64, 64)] * 4]  # He et al. 2016, table 1
    for side, inputs, outputs in ((28, 64, 128), (14, 128, 256), (7, 256, 512)):
        resnet18 += [conv(side, inputs, outputs), *[conv(side, outputs, outputs)] * 3]
        resnet18.append(conv(side, inputs, outputs, 1))
    resnet18.append(2.0 * 512 * 1000)
    return {
        "simple_cnn": (ast.simple_cnn(10), 32, simple),
        "resnet": (ast.resnet(10), 32, residual),
        "resnet18": (torchvision.models.resnet18(), 224, resnet18),
    }


def ledger() -> dict:
    """FLOPs that the ledger counts ÷ FLOPs by hand, forward and with the backward pass.

    Backward costs twice the forward pass, but for the first layer, whose input needs no gradient.
    """
    ratios = {}
    for name, (model, side, layers) in by_hand().items():
        expected = {"forward": sum(layers), "training": 3 * sum(layers) - layers[0]}
        for mode, flops in expected.items():
            counted = ast.flops_per_sample(
                model, torch.zeros(2, 3, side, side), mode == "training", contextlib.nullcontext
            )[0]
            ratios[f"{name} {mode}"] = counted / flops
    return {"counted_by_hand": ratios, "reach": "0.99 to 1.01"}


def accuracy(data_path: str, seeds: str) -> dict:
    """Final accuracy at a mean activation of 0.104, beside random selection of as many samples and plain
    training of the fewest epochs that are not fewer samples."""
    out = str(ROOT / "runs" / "bars-accuracy")
    settings = ast.Settings(
        data=data_path,
        device="cpu",
        compare="random",
        seeds=seeds,
        out=out,
        batch_size=64,
        **BUDGET,
    )
    summary = ast.run(replace(settings, resume=(Path(out) / "config.json").exists()))
    ours, random = summary["policies"]["ast"], summary["policies"]["random"]
    epochs = math.ceil(BUDGET["epochs"] * ours["activation_rate"])
    plain = replace(settings, gate="full", compare="none", epochs=epochs, out=f"{out}-short")
    plain = ast.run(replace(plain, resume=(Path(plain.out) / "config.json").exists()))
    short = plain["policies"]["full"]
    return {
        "settings": BUDGET | {"batch_size": 64},
        "accuracy_per_seed": {
            "ast": ours["accuracy_per_seed"],
            "random": random["accuracy_per_seed"],
            "short": short["accuracy_per_seed"],
        },
        "mean_accuracy": {
            "ast": ours["final_accuracy"],
            "random": random["final_accuracy"],
            "short": short["final_accuracy"],
        },
        "epochs_of_short": epochs,
        "mean_activation": {"ast": ours["activation_rate"], "random": random["activation_rate"]},
        "reach": "ast at least 77.5 at a mean activation of at most 0.104, random and short not above ast",
    }


def speed(data_path: str) -> dict:
    """Seconds from the start of training to the original report's accuracy, evaluation included."""
    out = str(ROOT / "runs" / "bars-speed")
    settings = ast.Settings(data=data_path, device="cpu", epochs=2, compare="full", out=out, batch_size=64)
    ast.run(settings)
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    reached = {}
    for policy in ("ast", "full"):
        times = [
            r["elapsed_seconds"]
            for r in rows
            if r["policy"] == policy and r["val_accuracy"] >= ORIGINAL_ACCURACY
        ]
        reached[policy] = min(times, default=None)
    return {"seconds_to_61.2_percent": reached, "epochs": 2, "batch_size": 64, "reach": "at most 25 s"}


def main() -> None:
    measures = {"engine": engine, "feed": feed, "device": device, "control": control, "gate": gate}
    measures |= {"dashboard": dashboard}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("measures", nargs="+", choices=[*measures, "ledger", "accuracy", "speed"])
    parser.add_argument("--data", default="shapes", help="shapes, cifar10 or a path")
    parser.add_argument("--seeds", default="0,1,2")
    options = parser.parse_args()
    ast.keep_freed_memory()
    data = None
    for name in options.measures:
        if name in measures:
            data = data or ast.load_data(ast.fill_defaults(ast.Settings(data=options.data)), print)
            found = measures[name](data) | {"dataset": data.name, "synthetic": data.synthetic}
        elif name == "ledger":
            found = ledger()
        else:
            found = accuracy(options.data, options.seeds) if name == "accuracy" else speed(options.data)
        record(name, found)


def record(name: str, found: dict) -> None:
    """Adds a result with the machine and the day to the file, where the last of a name counts; prints it."""
    found |= {"machine": ast.device_name("cpu"), "torch": torch.__version__, "numpy": np.__version__}
    found["date"] = time.strftime("%Y-%m-%d")
    books.measured(name, found)
    print(name, json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
