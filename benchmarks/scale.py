"""What the gate and several processes cost, with the shipped code on arrays of that size.

    python benchmarks/scale.py gate               # seconds and bytes a sample, up to 100 million: 8 GB
    python benchmarks/scale.py wire               # what a chunk and a step exchange, 1 to 8 processes
    python benchmarks/scale.py share              # choices that differ between one process and several

Adds lines to benchmarks/results/scale.jsonl, which docs/make_docs.py writes into docs/scale.md.
"""

import argparse
import datetime
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import books
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "standalone"))
import cifar10_ast as ast

FILE = books.RESULTS / "scale.jsonl"
SIZES = (1_000_000, 1_281_167, 14_000_000, 100_000_000)  # samples
GATES = {"remembered": {}, "balance": {"balance": True}, "random": {"gate": "random"}}
BATCH, TARGET, CLASSES = 128, 0.4, 1000
CHUNKS = 300  # timed, of an epoch
WORLDS = (1, 2, 4, 8)


class Numbers:
    """A source of n samples that nobody looks at."""

    def __init__(self, n: int):
        self.labels = torch.randint(0, CLASSES, (n,), generator=torch.Generator().manual_seed(0))
        self.batch_size, self.generator, self.unreadable = BATCH, torch.Generator(), {}

    def __len__(self) -> int:
        return len(self.labels)

    def stream(self, batches: object) -> None:
        """Never asked."""


def trainer_of(source: object, **config: object) -> ast.AdaptiveSparseTrainer:
    phases = {"warmup_epochs": 0, "ramp_epochs": 0, "anneal_epochs": 0}
    config = phases | {"device": "cpu", "amp": "off", "target_activation": TARGET} | config
    model = nn.Linear(4, CLASSES)
    return ast.AdaptiveSparseTrainer(model, source, source, config, listeners=[], gate=None)


def resident() -> int:
    """Bytes of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def most_resident() -> int:
    """The most that it held."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def gate(name: str, n: int) -> dict:
    """Seconds an epoch of n samples in choosing and remembering, and bytes a sample; on one thread."""
    torch.set_num_threads(1)
    source = Numbers(n)
    before = resident()
    trainer = trainer_of(source, **GATES[name])
    ast.begin(trainer, 1, 0)
    trainer.flops = {"training": 1.0}
    kept = trainer.gate.state_dict() | {"readable": trainer.readable, "times": trainer.times_activated}
    kept = sum(value.nbytes for value in kept.values() if isinstance(value, torch.Tensor))
    if hasattr(trainer.gate, "memory"):
        trainer.gate.memory.significance.copy_(torch.rand(n))
    trainer.tally = ast.Tally(n, 0.0, 0.0)
    batches, chunks, generator = trainer.choose(), [], torch.Generator().manual_seed(1)
    began = time.perf_counter()
    asked, _ = next(batches)
    first = time.perf_counter() - began
    seen = trainer.tally.candidates
    while len(chunks) < CHUNKS and len(asked):
        scores = torch.rand(len(asked), generator=generator)
        trainer.tally.pending.append((asked, asked, scores, torch.tensor([1.0, len(asked), 1.0])))
        trainer.tally.waiting -= len(asked)
        began = time.perf_counter()
        asked, _ = next(batches)
        spent = time.perf_counter() - began
        if trainer.tally.candidates > seen:  # it decided on a chunk
            chunks.append(spent / (trainer.tally.candidates - seen))
            seen = trainer.tally.candidates
    seconds = first + n * statistics.median(chunks)
    peak = most_resident() - before
    return {"seconds": seconds, "order_seconds": first, "bytes_kept": kept / n, "bytes_peak": peak / n}


def wire() -> dict:
    """Milliseconds of what several processes exchange: a chunk's losses, and the flags of a step or chunk."""
    torch.set_num_threads(1)
    tally, batches = ast.Tally(1, 0.0, 0.0), torch.arange(4 * BATCH).split(BATCH)
    controls, spent = ast.Controls(), {"chunk": [], "step": []}
    for _ in range(200):
        for batch in batches:
            own = ast.own_share(batch)
            tally.pending.append((batch, own, torch.rand(len(own)), torch.ones(3)))
        for name, work in (("chunk", tally.read), ("step", controls.stopping)):
            ast.gathered(None)  # all begin together
            began = time.perf_counter()
            work()
            spent[name].append(1000 * (time.perf_counter() - began))
    found = {f"{name}_ms": statistics.median(times) for name, times in spent.items()}
    return found | {"chunk_bytes": 4 * (4 * BATCH + 3 * len(batches)), "step_bytes": 16}


class Exact(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self[0].weight.dtype))


def choices(dtype: torch.dtype, gate: str, n: int = 4000, epochs: int = 4) -> list[list[int]]:
    """The samples that each gated epoch activates, of drawn clusters."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 10, (n,), generator=generator)
    images = torch.randn(n, 20, generator=generator) + 2 * nn.functional.one_hot(labels, 20)
    torch.manual_seed(0)
    model = Exact(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10)).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    config = {"gate": gate, "batch_size": 64, "device": "cpu", "amp": "off", "anneal_epochs": 0}
    data = images.numpy(), labels.numpy()
    trainer = ast.AdaptiveSparseTrainer(model, data, data, config, optimizer, listeners=[])
    chosen, select = [[] for _ in range(epochs)], trainer.gate.select

    def told(*asked: object) -> tuple:
        found = select(*asked)
        chosen[trainer.epoch] += found[0].tolist()
        return found

    trainer.gate.select = told
    trainer.train(epochs, warmup_epochs=1)
    return chosen[1:]


def all_choices() -> dict:
    kinds = itertools.product(("float64", "float32"), ("remembered", "live"))
    return {f"{dtype} {gate}": choices(getattr(torch, dtype), gate) for dtype, gate in kinds}


WORK = {"wire": wire, "share": all_choices}


def in_processes(count: int, work: str) -> dict:
    """What the first of `count` processes found."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    command = [sys.executable, *(torchrun if count > 1 else []), __file__, "--work", work]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def differing(mine: list[list[int]], theirs: list[list[int]]) -> list[float]:
    """Of each gated epoch's activated samples, the percent that another run did not activate."""
    pairs = zip(mine, theirs, strict=True)
    return [100 * len(set(a) - set(b)) / len(a) for a, b in pairs]


def record(measure: str, **found: object) -> None:
    where = {"device": ast.device_name("cpu"), "torch": torch.__version__}
    line = {"measure": measure, **found, **where, "date": datetime.datetime.now().date().isoformat()}
    books.append(FILE, {"command": "python benchmarks/scale.py MEASURE"}, line)
    print(json.dumps(line))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("measures", nargs="*", help="gate, wire, share")
    parser.add_argument("--work", help="what to do in this process: no measure of its own")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    asked = parser.parse_args()
    if asked.work:
        name, *values = asked.work.split(":")
        ast.join()
        print(json.dumps(gate(values[0], int(values[1])) if name == "gate" else WORK[name]()), flush=True)
        sys.exit(ast.ended(0))
    sizes = map(int, asked.sizes.split(","))
    for name, n in itertools.product(GATES, sizes) if "gate" in asked.measures else ():
        record("gate", gate=name, n=n, **in_processes(1, f"gate:{name}:{n}"))
    for count in WORLDS if "wire" in asked.measures else ():
        record("wire", processes=count, **in_processes(count, "wire"))
    if "share" in asked.measures:
        mine = in_processes(1, "share")
        for count in (2, 4):
            found = in_processes(count, "share")
            record("share", processes=count, percent={k: differing(mine[k], found[k]) for k in mine})


if __name__ == "__main__":
    main()
