"""Runs the published package adaptive-sparse-training 1.0.1 beside this kit, in an environment of its own.

    python benchmarks/peer.py --data path/to/cifar10 --seeds 0,1,2

Same network, data, augmentation, optimizer and learning-rate schedule, in one process, turn about: the peer
(its threshold starts at the lowest it may have, since from its default of 3 it hardly activates anything),
plain training, the kit, which activates as many samples in all, its warm-up and anneal included; and the
kit asked for the same rate, with its own longer phases, and with these but for the ramp.
The peer's forward pass gets the kit's bf16 (its own mixed precision is for CUDA only), and its loader hands
out ready batches, so that neither slows it down. Written: the saving that it prints, and seconds.
"""

import argparse
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from pathlib import Path

import books

ROOT = Path(__file__).parents[1]
PACKAGE = "adaptive-sparse-training==1.0.1"
TARGET, WARMUP, ANNEAL = 0.2, 1, 1  # rate asked of the peer; epochs on everything first, and the kit's last
BEDS_HERE = ("four", "two-long")


def inside(data: str, seeds: list[int], bed_name: str) -> None:
    """The comparison; the peer is importable here."""
    import adaptive_sparse_training as peer
    import compare
    import torch
    from beds import BEDS, ast

    class Batches:
        """What the peer takes for a loader: augmented batches in random order."""

        def __init__(self, source: ast.ArraySource, seed: int):
            self.source, self.generator = source, torch.Generator().manual_seed(seed)
            source.generator.manual_seed(seed)

        def __len__(self) -> int:
            return math.ceil(len(self.source) / self.source.batch_size)

        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            order = torch.randperm(len(self.source), generator=self.generator)
            batches = ((indices, torch.ones(len(indices))) for indices in order.split(self.source.batch_size))
            for batch in self.source.stream(batches):
                yield batch.images, batch.labels

    class InOrder:
        def __init__(self, source: ast.ArraySource):
            self.source = source

        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            return self.source.in_order()

    class Autocast(torch.nn.Module):
        """The network with the kit's precision in its forward pass."""

        def __init__(self, model: torch.nn.Module, autocast: object):
            super().__init__()
            self.model, self.autocast = model, autocast

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            with self.autocast():
                return self.model(images).float()

    bed, file = BEDS[bed_name], books.RESULTS / f"peer_{bed_name}.jsonl"
    ast.keep_freed_memory()
    split = bed.split(ast.load_data(ast.Settings(data=data, data_dir="data"), print), False)
    epochs = bed.settings["epochs"]

    def with_peer(seed: int) -> dict:
        ours = compare.build(bed, compare.policy("full", bed), seed, split)
        config = peer.ASTConfig(
            target_activation_rate=TARGET, initial_threshold=0.5, use_amp=False, device="cpu"
        )
        loader = Batches(ours.train_source, seed)
        steps, done = epochs * len(loader), 0

        def schedule(*_: object) -> None:
            nonlocal done
            done += 1
            for group, peak in zip(ours.optimizer.param_groups, ours.peak_lrs, strict=True):
                group["lr"] = peak * ast.learning_rate_shape(min(1.0, done / steps))

        for group, peak in zip(ours.optimizer.param_groups, ours.peak_lrs, strict=True):
            group["lr"] = peak * ast.learning_rate_shape(0.0)
        ours.optimizer.register_step_post_hook(schedule)
        trainer = peer.AdaptiveSparseTrainer(
            Autocast(ours.model, ours.autocast), loader, InOrder(ours.val_source), config, ours.optimizer
        )
        judge, judging = trainer.evaluate, 0.0

        def timed() -> float:
            nonlocal judging
            began = time.perf_counter()
            accuracy = judge()
            judging += time.perf_counter() - began
            return accuracy

        trainer.evaluate = timed
        began = time.perf_counter()
        trainer.train(epochs=epochs, warmup_epochs=WARMUP)
        seconds = time.perf_counter() - began - judging
        history = trainer.history
        return {
            "accuracy": history["val_acc"][-1],
            "train_seconds": seconds,
            "saving_it_prints_percent": history["energy_savings"][-1],
            "activation_rate": sum(history["activation_rates"]) / epochs,
        }

    def with_kit(name: str, seed: int) -> dict:
        found = compare.measure(bed, compare.policy(name, bed), seed, split)
        kept = ("accuracy", "train_seconds", "activation_rate", "cost")
        return {key: found[key] for key in kept}

    command = f"python benchmarks/peer.py --bed {bed_name} --seeds SEED"
    shared = {"bed": bed.what, "command": command, "judged_on": "test images", "target": TARGET}
    machine = {
        "package": f"adaptive-sparse-training {importlib.metadata.version('adaptive-sparse-training')}",
        "torch": torch.__version__,
        "device": ast.device_name("cpu"),
        "date": time.strftime("%Y-%m-%d"),
        "edition": compare.EDITION,
        "program": compare.digest(Path(ast.__file__)),
    }
    finished = [run["seed"] for run in books.read(file)]  # goes on after a stop
    for seed in (seed for seed in seeds if seed not in finished):
        run = {"seed": seed}
        if seed % 2:
            run["full"] = with_kit("full", seed)
        run["peer"] = with_peer(seed)
        whole = WARMUP + ANNEAL
        rate = (run["peer"]["activation_rate"] * epochs - whole) / (epochs - whole)
        phases = f"warmup_epochs={WARMUP},ramp_epochs=0,anneal_epochs={ANNEAL}"
        run["ast"] = with_kit(f"ast@{rate:.4f}:{phases}", seed)
        run["shipped"] = with_kit(f"ast@{TARGET}", seed)
        run["no_ramp"] = with_kit(f"ast@{TARGET}:ramp_epochs=0", seed)
        if "full" not in run:
            run["full"] = with_kit("full", seed)
        books.append(file, shared, run | machine)
        print(json.dumps(run), flush=True)


def main() -> None:
    """Makes the environment, runs the comparison in it, and removes it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", default="cifar10", help="CIFAR-10: a path, or cifar10 to search for it")
    parser.add_argument("--bed", choices=BEDS_HERE, default=BEDS_HERE[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--package", default=PACKAGE, help="a name for pip, or the path of a wheel")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        return inside(given.data, [int(seed) for seed in given.seeds.split(",")], given.bed)
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = str(Path(folder) / "bin" / "python")
        requirements = ["-r", str(ROOT / "requirements.txt"), "scipy", given.package]
        subprocess.run([python, "-m", "pip", "install", "-q", *requirements], check=True)
        command = [python, __file__, "--inside", "--data", given.data, "--seeds", given.seeds]
        command += ["--bed", given.bed]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)})


if __name__ == "__main__":
    sys.exit(main())
