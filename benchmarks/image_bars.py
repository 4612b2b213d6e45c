"""Measures what the ImageNet-100 program must reach, as ratios within one process.

    python benchmarks/image_bars.py skip decode packed pack --photographs path/to/full-size/images
    python benchmarks/image_bars.py compute memory --data path/to/imagenet100
    python benchmarks/image_bars.py budget --data path/to/imagenet100      # an hour on two cores; resumable

Photographs: a folder or .zip of full-size JPEGs, in any arrangement. Data: what the program takes as --data.
Adds lines to benchmarks/results/bars.jsonl. Run it on an otherwise idle machine.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from bars import CPU, ROOT, SPARSE, phase_seconds, record
from evidence import half_width
from PIL import Image
from torch import nn
from torchvision import transforms

sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "standalone"))
import imagenet100_ast as program

SIDE = 160  # pixels, of the crops that are timed
PACKED_SIDE = 256  # pixels, of the packed images


def all_in(path: Path, repeats: int = 1) -> program.Photos:
    """Every JPEG in a folder, or in a .zip, so many times."""
    names = [name for name in program.names_in(path) if name.lower().endswith((".jpg", ".jpeg"))]
    return program.Photos(path, names * repeats)


def tiny(side: int, classes: int) -> nn.Module:
    """A model that costs next to nothing, so that what is measured is the loader."""
    return nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(3 * (side // 16) ** 2, classes))


def ratio_of_skipping(make: Callable[[str], program.AdaptiveSparseTrainer], rounds: int) -> dict:
    """Seconds a candidate at a = 0.25 ÷ seconds a sample of full training; rounds interleaved."""
    times: dict[str, list[float]] = {"full": [], "remembered": []}
    for _ in range(rounds):
        for gate, epochs in (("full", 2), ("remembered", 3)):
            times[gate] += phase_seconds(make(gate).train(epochs=epochs), "sparse")
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "ratio": median["remembered"] / median["full"],
        "milliseconds_per_candidate": {name: 1e3 * value for name, value in median.items()},
        "samples": times,
    }


def settings_of(**values: object) -> program.Settings:
    """Settings as a run on this CPU would have them."""
    fixed = {"device": "cpu", "weights": "none", **SPARSE, "target_activation": 0.25}
    return program.fill_defaults(program.Settings(**fixed | values))


def trainer(
    settings: program.Settings, data: program.ImageData, model: nn.Module, *optimized: object
) -> program.AdaptiveSparseTrainer:
    """A silent trainer; `optimized`: what trains the model, and the criterion."""
    sources = program.sources(settings, data, CPU)
    config = program.ASTConfig.of(settings)
    return program.AdaptiveSparseTrainer(model, *sources, config, *optimized, listeners=[])


def skip(photographs: Path, repeats: int = 12, rounds: int = 3) -> dict:
    """Skipping where the loader is what takes the time: full-size JPEGs and a tiny model."""
    photos = all_in(photographs, repeats)
    labels = np.arange(len(photos)) % 10
    few = photos.chosen(range(20))
    data = program.ImageData("photographs", False, list("0123456789"), photos, labels, few, labels[:20], "")

    def make(gate: str) -> program.AdaptiveSparseTrainer:
        torch.manual_seed(0)
        model = tiny(SIDE, 10)
        settings = settings_of(gate=gate, image_size=SIDE, batch_size=64)
        return trainer(settings, data, model, torch.optim.SGD(model.parameters(), lr=0.01))

    return ratio_of_skipping(make, rounds) | {"images": len(photos), "reach": "at most 0.30; limit 0.25"}


def compute(data: program.ImageData, rounds: int = 2) -> dict:
    """Skipping where the model is what takes the time: resnet18 at 64 pixels, from JPEG files."""

    def make(gate: str) -> program.AdaptiveSparseTrainer:
        settings = settings_of(gate=gate, model="resnet18", image_size=64, batch_size=64)
        torch.manual_seed(0)
        model = program.build_model(settings, data)
        return trainer(settings, data, model, *program.recipe(settings, model))

    found = ratio_of_skipping(make, rounds)
    return found | {"images": len(data.train_labels), "reach": "at most 0.29; limit 0.25"}


def rates(
    ways: dict[str, Callable[[], int]], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Images a second of each way, the median of interleaved rounds."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = clock()
            count = way()
            found[name].append(count / (clock() - began))
    return {name: statistics.median(values) for name, values in found.items()}


def plain_pipeline(folder: Path, workers: int) -> Callable[[], int]:
    """One epoch of torchvision's `ImageFolder`, `RandomResizedCrop`, `ToTensor` and a `DataLoader`."""
    views = transforms.Compose([transforms.RandomResizedCrop(SIDE), transforms.ToTensor()])
    images = torchvision.datasets.ImageFolder(str(folder), views)
    loader = torch.utils.data.DataLoader(
        images, batch_size=64, shuffle=True, num_workers=workers, persistent_workers=True
    )
    return lambda: sum(len(labels) for _, labels in loader)


def as_tensor(views: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """What `ToTensor` makes of an image, for a whole batch."""
    return views.permute(0, 3, 1, 2).float().div_(255)


def our_pipeline(images: program.Photos | np.ndarray, workers: int) -> Callable[[], int]:
    """One epoch of `CropSource`, on as many threads as the other has processes, to the same float batches."""
    program.augment = as_tensor
    settings = settings_of(image_size=SIDE, batch_size=64, workers=workers)
    source = program.CropSource(images, np.zeros(len(images), np.int64), settings, training=True)

    def epoch() -> int:
        batches = ((indices, torch.ones(len(indices))) for indices in torch.randperm(len(images)).split(64))
        return sum(len(batch) for batch in source.stream(batches))

    return epoch


def crops(photographs: Path, packed: bool, repeats: int = 6, rounds: int = 5) -> dict:
    """Random crops a second beside torchvision's pipeline, on one worker and on two."""
    photos, found = all_in(photographs, repeats), {}
    with tempfile.TemporaryDirectory() as temporary:
        for index in range(len(photos)):
            path = Path(temporary) / str(index % 2) / f"{index}.jpg"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(photos.read(index))
        mine = all_in(Path(temporary))
        if packed:
            mine = np.stack([mine.crop(index, PACKED_SIDE) for index in range(len(mine))])
        for workers in (1, 2):
            ways = {
                "torchvision": plain_pipeline(Path(temporary), workers),
                "ours": our_pipeline(mine, workers),
            }
            for way in ways.values():  # starts the processes, fills the caches
                way()
            per_second = rates(ways, rounds)
            found[f"workers_{workers}"] = {
                "times_faster": per_second["ours"] / per_second["torchvision"],
                "images_per_second": per_second,
            }
    return found


def decode(photographs: Path) -> dict:
    """From full-size JPEGs."""
    return crops(photographs, packed=False) | {"reach": "at least 1.6"}


def packed(photographs: Path) -> dict:
    """From packed arrays, against the same pipeline on the JPEGs."""
    return crops(photographs, packed=True) | {"reach": "at least 10"}


def pack(photographs: Path, repeats: int = 5, rounds: int = 5) -> dict:
    """`python -m data_setup folder pack` against plain loops of PIL, images a processor second."""
    from data_setup.images import Images
    from data_setup.pack import pack as write_packed

    photos = all_in(photographs, repeats)
    with tempfile.TemporaryDirectory() as temporary:
        tree = Path(temporary) / "tree"
        for index in range(len(photos)):
            split = "val" if index % 10 == 0 else "train"
            path = tree / split / str(index // 10 % 2) / f"{index}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(photos.read(index))
        paths = sorted(tree.rglob("*.jpg"))

        def packing() -> int:
            with tempfile.TemporaryDirectory(dir=temporary) as target:
                write_packed(Images(tree), Path(target), PACKED_SIDE, lambda line: None)
            return len(paths)

        def loop(kind: str) -> int:
            with tempfile.TemporaryDirectory(dir=temporary) as target:
                for index, path in enumerate(paths):
                    plainly_shrunk(path).save(f"{target}/{index}.{kind}")
            return len(paths)

        ways = {"data_setup": packing, "plain_png": lambda: loop("png"), "plain_jpeg": lambda: loop("jpg")}
        per_second = rates(ways, rounds, time.process_time)
    return {
        "times_faster": per_second["data_setup"] / per_second["plain_png"],
        "times_faster_than_saving_as_jpeg": per_second["data_setup"] / per_second["plain_jpeg"],
        "images_per_processor_second": per_second,
        "images": len(photos),
        "reach": "at least 1.5",
    }


def plainly_shrunk(path: Path) -> Image.Image:
    """Open, resize the short side, crop: what anyone would write."""
    image = Image.open(path).convert("RGB")
    scale = PACKED_SIDE / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)))
    left, top = (image.width - PACKED_SIDE) // 2, (image.height - PACKED_SIDE) // 2
    return image.crop((left, top, left + PACKED_SIDE, top + PACKED_SIDE))


def resident() -> int:
    """Bytes of this process in memory."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def memory(data: program.ImageData, epochs: int = 4) -> dict:
    """Growth of resident memory over three epochs of 20,000 images, after a first that fills the caches."""
    settings = settings_of(image_size=64, batch_size=64, gate="remembered", target_activation=0.5)
    torch.manual_seed(0)
    model = tiny(64, len(data.classes))
    sizes: list[int] = []

    def listen(event: str, _: dict) -> None:
        if event == "epoch":
            sizes.append(resident())

    run = trainer(settings, data, model, torch.optim.SGD(model.parameters(), lr=0.01))
    run.listeners = [listen]
    run.train(epochs=epochs)
    return {
        "growth_percent": 100 * (sizes[-1] / sizes[0] - 1),
        "resident_mib_after_each_epoch": [round(size / 2**20, 1) for size in sizes],
        "images": len(data.train_labels),
        "reach": "at most 2 %",
    }


def budget(data: str, seeds: str, epochs: int, train_size: int) -> dict:
    """AST against plain training of as few epochs, and against random selection, at the same cost."""
    out = ROOT / "runs" / "image-bars-budget"
    settings = program.Settings(
        data=data,
        model="resnet18",
        image_size=64,
        weights="none",
        device="cpu",
        epochs=epochs,
        train_size=train_size,
        batch_size=64,
        compare="random,short",
        seeds=seeds,
        out=str(out),
        resume=(out / "config.json").exists(),
    )
    summary = program.run(settings)
    policies = summary["policies"]
    per_seed = {name: list(policy["accuracy_per_seed"].values()) for name, policy in policies.items()}
    return {
        "settings": "resnet18 from scratch, 64 px, a = 0.4",
        "epochs": epochs,
        "dataset": summary["dataset"],
        "training_images": summary["n_train"],
        "accuracy_per_seed": {name: policy["accuracy_per_seed"] for name, policy in policies.items()},
        "mean_accuracy": {name: policy["final_accuracy"] for name, policy in policies.items()},
        "seconds": {name: policy["train_seconds"] for name, policy in policies.items()},
        "activated": {name: policy["activated"] for name, policy in policies.items()},
        "ast_minus": {rival: difference(per_seed["ast"], per_seed[rival]) for rival in ("short", "random")},
        "reach": "above 0 for both",
    }


def difference(ours: list[float], theirs: list[float]) -> dict:
    """Mean paired difference, and half the width of its 95 % interval, None for one seed."""
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    return {"mean": statistics.mean(gaps), "half_width": half_width(gaps) if len(gaps) > 1 else None}


def main() -> None:
    on_photographs = {"skip": skip, "decode": decode, "packed": packed, "pack": pack}
    on_data = {"compute": (compute, 6400), "memory": (memory, 20_000)}
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("measures", nargs="+", choices=[*on_photographs, *on_data, "budget"])
    parser.add_argument("--photographs", type=Path, help="folder or .zip of full-size JPEGs")
    parser.add_argument("--data", help="what the program takes as --data")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", type=int, default=10, help="of the budget")
    parser.add_argument("--train-size", type=int, default=10_000, help="images of the budget; 0 takes all")
    options = parser.parse_args()
    program.keep_freed_memory()
    for name in options.measures:
        if name in on_photographs:
            found = on_photographs[name](options.photographs)
        elif name in on_data:
            measure, size = on_data[name]
            settings = settings_of(data=options.data, train_size=size, image_size=64, model="resnet18")
            found = measure(program.load_data(settings, print))
        else:
            found = budget(options.data, options.seeds, options.epochs, options.train_size)
        record(f"images_{name}", found)


if __name__ == "__main__":
    main()
