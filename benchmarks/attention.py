"""Sparse attention against unmasked `scaled_dot_product_attention`, by the length of the sequence.

    python benchmarks/attention.py            # three minutes on two cores; a line and a figure

Both get the same queries, keys and values, forward and backward: 4,096 patches in all, in sequences of 64 to
4,096 with 4 global tokens before each, at the width and heads of the original reports. They take turns, and
the fastest repeat counts; on a CPU in processor seconds, since others may use the machine. Memory is taken in
processes of their own.
"""

import argparse
import math
import multiprocessing
import resource
import time
from functools import partial
from pathlib import Path

import books
import matplotlib.pyplot as plt
import torch
from beds import ast
from torch.nn import functional as F

ROOT = Path(__file__).parents[1]
LENGTHS, PATCHES, REPEATS = (64, 256, 1024, 4096), 4096, 5
CONFIG = ast.SparseAttentionConfig()
KINDS = {"dense": F.scaled_dot_product_attention, "sparse": partial(ast.sparse_attention, CONFIG)}


def inputs_of(length: int, device: str) -> list[torch.Tensor]:
    """Queries, keys and values [sequences, heads, tokens, channels]."""
    tokens, channels = length + CONFIG.n_global_tokens, CONFIG.d_model // CONFIG.n_heads
    shape = PATCHES // length, CONFIG.n_heads, tokens, channels
    torch.manual_seed(0)
    return [torch.randn(shape, device=device, requires_grad=True) for _ in range(3)]


def seconds(length: int, device: str) -> dict[str, float]:
    """Of a forward and a backward pass of each kind, in turn: the fastest of REPEATS."""
    inputs, best = inputs_of(length, device), dict.fromkeys(KINDS, math.inf)
    now = time.process_time if device == "cpu" else time.perf_counter
    for kind in [*KINDS] * REPEATS:
        began = now()
        KINDS[kind](*inputs).sum().backward()
        if device != "cpu":
            torch.cuda.synchronize()
        best[kind] = min(best[kind], now() - began)
        for x in inputs:
            x.grad = None
    return best


def mib(length: int, kind: str, device: str) -> float:
    """What a forward and a backward pass need beside their inputs, in a process of its own."""
    inputs = inputs_of(length, device)
    before = peak_mib(device)
    KINDS[kind](*inputs).sum().backward()
    return peak_mib(device) - before


def peak_mib(device: str) -> float:
    """Peak memory of this process."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def draw(cases: list[dict], device: str, path: Path) -> None:
    """Both kinds over the length: seconds, and memory."""
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for axes, unit, title in zip(
        panels, ("seconds", "mib"), ("Processor seconds", "MiB beside the inputs"), strict=True
    ):
        for kind, colour in (("dense", "#666666"), ("sparse", "#d55e00")):
            own = [found for found in cases if found["kind"] == kind]
            axes.plot(
                *zip(*((c["length"], c[unit]) for c in own), strict=True), "o-", color=colour, label=kind
            )
        axes.set(xscale="log", yscale="log", xlabel="tokens of a sequence", title=title)
        axes.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS])
        axes.minorticks_off()
        axes.grid(alpha=0.25)
    panels[0].legend()
    figure.suptitle(f"Forward and backward pass over {PATCHES:,} patches, {device}", fontsize=9)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measures, adds a line to benchmarks/results/attention.jsonl, and draws docs/attention.png."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "attention.png")
    parser.add_argument("--results", type=Path, default=books.RESULTS)
    given, cases = parser.parse_args(), []
    asked = [(length, kind, given.device) for length in LENGTHS for kind in KINDS]
    context = multiprocessing.get_context("fork" if given.device == "cpu" else "spawn")
    with context.Pool(1, maxtasksperchild=1) as pool:
        memory = pool.starmap(mib, asked, chunksize=1)
    for length in LENGTHS:
        for kind, best in seconds(length, given.device).items():
            needed = memory[len(cases)]
            found = {"length": length, "kind": kind, "seconds": round(best, 5), "mib": round(needed, 1)}
            cases.append(found)
            print(found, flush=True)
    device = ast.device_name(given.device)
    found = {"cases": cases, "device": device, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    books.append(given.results / "attention.jsonl", {"command": "python benchmarks/attention.py"}, found)
    draw(cases, device, given.figure)


if __name__ == "__main__":
    main()
