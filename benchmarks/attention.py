"""Sparse attention against unmasked `scaled_dot_product_attention`, by the length of the sequence.

    python benchmarks/attention.py            # three minutes on two cores; a line and a figure

Both get the same queries, keys and values, forward and backward: 4,096 patches in all, in sequences of 64 to
4,096 with 4 global tokens before each, at the width and heads of the original reports. Each case has a
process of its own, since peak memory never falls. Its fastest repeat counts: others may use the machine.
"""

import argparse
import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import books
import matplotlib.pyplot as plt
import torch
from beds import ast
from torch.nn import functional as F

ROOT = Path(__file__).parents[1]
LENGTHS, PATCHES, REPEATS = (64, 256, 1024, 4096), 4096, 7
CONFIG = ast.SparseAttentionConfig()
KINDS = {"dense": F.scaled_dot_product_attention, "sparse": partial(ast.sparse_attention, CONFIG)}


def case(length: int, kind: str, device: str) -> dict:
    """Seconds of a forward and a backward pass, and the MiB that they need beside their inputs."""
    shape = (
        PATCHES // length,
        CONFIG.n_heads,
        length + CONFIG.n_global_tokens,
        CONFIG.d_model // CONFIG.n_heads,
    )
    torch.manual_seed(0)
    inputs = [torch.randn(shape, device=device, requires_grad=True) for _ in range(3)]
    before, seconds = peak_mib(device), []
    for _ in range(REPEATS):
        began = time.perf_counter()
        KINDS[kind](*inputs).sum().backward()
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        for x in inputs:
            x.grad = None
    mib = round(peak_mib(device) - before, 1)
    return {"length": length, "kind": kind, "seconds": round(min(seconds), 5), "mib": mib}


def peak_mib(device: str) -> float:
    """Peak memory of this process."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def draw(cases: list[dict], device: str, path: Path) -> None:
    """Both kinds over the length: seconds, and memory."""
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    for axes, unit, title in zip(
        panels, ("seconds", "mib"), ("Seconds", "MiB beside the inputs"), strict=True
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
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, max_tasks_per_child=1) as pool:
        for found in pool.map(case, *zip(*asked, strict=True)):
            cases.append(found)
            print(found, flush=True)
    device = ast.device_name(given.device)
    found = {"cases": cases, "device": device, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    books.append(given.results / "attention.jsonl", {"command": "python benchmarks/attention.py"}, found)
    draw(cases, device, given.figure)


if __name__ == "__main__":
    main()
