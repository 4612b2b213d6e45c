"""The test beds of `compare.py`: which images, which model, how long. Two cores will do, but for those whose
device is a GPU.

A bed is trained on CIFAR-10 images. While a rule is searched for, 5,000 of the training images are held out
and judge it; the test images are seen by the headline rows only.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "standalone"))
import cifar10_ast as ast

HELD_OUT = 5000  # training images that judge the search
FRAMES = 20  # of each filmed image, itself among them
SPLIT = 2026  # seed of every draw that defines a bed; runs have seeds of their own


@dataclass
class Settings(ast.Settings):
    """The program's settings, and what only the benchmarks turn."""

    label_smoothing: float = ast.option(0.0, "[0, 1)", "of the compact network's recipe")
    weight_gamma: float = ast.option(0.0, "[0, 1]", "γ of the weights (p/a)^-γ; 1 is unbiased")
    score_scale: float = ast.option(1.0, "(0, 1]", "share of the side at which `live` scores its views")


@dataclass(frozen=True)
class Bed:
    """Data, model and length of one comparison."""

    what: str
    classes: tuple[int, ...] = tuple(range(10))
    size: int = 0  # training images, evenly from the classes; 0 takes all
    tail: float = 1.0  # images of the rarest class ÷ images of the most frequent
    wrong: float = 0.0  # share of the training labels replaced by another class
    filmed: float = 0.0  # share of the training images that come as FRAMES frames each
    pretrained: bool = False  # begin with weights trained on the other classes
    width: int = 0  # of the program's `resnet`; 0: its `vit` where `settings` name it, or the compact network
    settings: dict = field(default_factory=dict)

    def split(self, data: ast.ImageData, held_out: bool) -> Split:
        """The bed's share of CIFAR-10; judged on held-out training images, or on the test images."""
        generator = torch.Generator().manual_seed(SPLIT)
        labels = torch.as_tensor(np.asarray(data.train_labels)).long()
        kept, judges = [], []
        for place, label in enumerate(self.classes):
            own = (labels == label).nonzero().flatten()
            own = own[torch.randperm(len(own), generator=generator)]
            aside = HELD_OUT // len(self.classes)
            judges.append(own[:aside])
            share = self.size // len(self.classes) or (len(own) - aside if held_out else len(own))
            share = int(share * self.tail ** (place / max(1, len(self.classes) - 1)))
            kept.append(own[aside : aside + share] if held_out or self.size else own[:share])
        kept, judges = torch.cat(kept), torch.cat(judges)
        place_of = torch.full((10,), -1)
        place_of[list(self.classes)] = torch.arange(len(self.classes))
        truth = place_of[labels[kept]]
        given = truth.clone()
        mislabelled = torch.randperm(len(truth), generator=generator)[: int(self.wrong * len(truth))]
        shift = torch.randint(1, len(self.classes), mislabelled.shape, generator=generator)
        given[mislabelled] = (given[mislabelled] + shift) % len(self.classes)
        if held_out:
            images, answers = data.train_images[judges.numpy()], place_of[labels[judges]]
        else:
            tested = torch.as_tensor(np.asarray(data.val_labels)).long()
            mine = (place_of[tested] >= 0).nonzero().flatten()
            images, answers = data.val_images[mine.numpy()], place_of[tested[mine]]
        split = Split(
            data.train_images[kept.numpy()], given, truth, torch.arange(len(given)), images, answers
        )
        return film(split, self.filmed, generator) if self.filmed else split


@dataclass
class Split:
    """Images uint8 [N, 32, 32, 3] and labels int64 [N] to train on, the true labels, scenes int64 [N]
    (the same for frames of one image), and the judges."""

    images: np.ndarray
    labels: torch.Tensor
    truth: torch.Tensor
    scenes: torch.Tensor
    judge_images: np.ndarray
    judge_labels: torch.Tensor
    weights: dict[str, torch.Tensor] | None = None  # to begin with, instead of random ones


def film(split: Split, share: float, generator: torch.Generator) -> Split:
    """Makes some images repeat as in a video: FRAMES - 1 more of each, shifted by up to 2 pixels each way
    and up to a tenth darker or lighter."""
    count, side = len(split.labels), split.images.shape[1]
    copies = torch.randperm(count, generator=generator)[: int(share * count)].repeat(FRAMES - 1)
    shifts = torch.randint(0, 5, (len(copies), 2), generator=generator).tolist()
    light = 0.9 + 0.2 * torch.rand(len(copies), 1, 1, 1, generator=generator).numpy()
    wide = np.pad(split.images[copies.numpy()], ((0, 0), (2, 2), (2, 2), (0, 0)), "edge")
    frames = np.stack([one[y : y + side, x : x + side] for one, (y, x) in zip(wide, shifts, strict=True)])
    scenes = torch.cat([torch.arange(count), copies])
    return replace(
        split,
        images=np.concatenate([split.images, (frames * light).clip(0, 255).astype(np.uint8)]),
        labels=split.labels[scenes],
        truth=split.truth[scenes],
        scenes=scenes,
    )


# Tuned for plain training on held-out images, also for `short` (docs/search.md); for all policies alike.
RECIPE = {"lr": 0.1, "batch_size": 32, "weight_decay": 4e-4}
ON_GPU = {"device": "cuda", "model": "resnet", "batch_size": 512, "lr": 0.56}
APART = (1, 6, 7, 8)  # automobile, frog, horse, ship
BEDS: dict[str, Bed] = {
    "four": Bed(
        "four well-separated classes of CIFAR-10, 16 epochs", classes=APART, settings={"epochs": 16, **RECIPE}
    ),
    "two": Bed(
        "two classes of CIFAR-10, automobile and frog, 16 epochs",
        classes=APART[:2],
        settings={"epochs": 16, **RECIPE},
    ),
    "two-long": Bed(
        "5,000 images of two classes of CIFAR-10, automobile and frog, 60 epochs",
        classes=APART[:2],
        size=5000,
        settings={"epochs": 60, **RECIPE},
    ),
    "quick": Bed(
        "4,000 images of four well-separated classes of CIFAR-10, 16 epochs",
        classes=APART,
        size=4000,
        settings={"epochs": 16, **RECIPE},
    ),
    "long": Bed(
        "5,000 images of four well-separated classes of CIFAR-10, 60 epochs",
        classes=APART,
        size=5000,
        settings={"epochs": 60, **RECIPE},
    ),
    "tuned": Bed(
        "four well-separated classes of CIFAR-10, fine-tuned 16 epochs from weights trained on the other six",
        classes=APART,
        pretrained=True,
        settings={"epochs": 16, **RECIPE, "lr": 0.05},
    ),
    "all": Bed("all of CIFAR-10, 16 epochs", settings={"epochs": 16, **RECIPE}),
    "ten": Bed("10,000 images of CIFAR-10, 30 epochs", size=10_000, settings={"epochs": 30, **RECIPE}),
    "twenty": Bed(
        "20,000 images of CIFAR-10, the program's `resnet` at half its width, 20 epochs",
        size=20_000,
        width=16,
        settings={"epochs": 20, "model": "resnet", "batch_size": 128},
    ),
    "vit": Bed(
        "20,000 images of CIFAR-10, the program's `vit`, 20 epochs",
        size=20_000,
        settings={"epochs": 20, "model": "vit", "batch_size": 128},
    ),
    "filmed": Bed(
        "3,500 images of CIFAR-10, a tenth of them as 20 frames each, slightly moved (made), 30 epochs",
        size=3500,
        filmed=0.1,
        settings={"epochs": 30, **RECIPE},
    ),
    "filmed-long": Bed(
        "1,748 images of four well-separated classes of CIFAR-10, a tenth of them as 20 frames each, "
        "slightly moved (made), 60 epochs",
        classes=APART,
        size=1750,
        filmed=0.1,
        settings={"epochs": 60, **RECIPE},
    ),
    "tail": Bed(
        "CIFAR-10 with a long tail: 20 images of the commonest class for one of the rarest, 16 epochs",
        tail=1 / 20,
        settings={"epochs": 16, **RECIPE},
    ),
    "whole": Bed(
        "all of CIFAR-10, the program's `resnet`, 20 epochs, on a GPU",
        width=32,
        settings={"epochs": 20, **ON_GPU},
    ),
    "whole-long": Bed(
        "all of CIFAR-10, the program's `resnet`, 60 epochs, on a GPU",
        width=32,
        settings={"epochs": 60, **ON_GPU},
    ),
    "whole-tail": Bed(
        "CIFAR-10 with a long tail (20 to 1), the program's `resnet`, 40 epochs, on a GPU",
        tail=1 / 20,
        width=32,
        settings={"epochs": 40, **ON_GPU, "batch_size": 128, "lr": 0.14},
    ),
}
BEDS["whole-alone"] = replace(BEDS["whole"], what=f"{BEDS['whole'].what}, one run at a time")
for name in ("two-long", "long", "tail"):
    on_cpu = BEDS[name]
    BEDS[f"{name}-gpu"] = replace(
        on_cpu, what=f"{on_cpu.what}, on a GPU", settings={**on_cpu.settings, "device": "cuda"}
    )
for percent in (10, 20, 40):
    BEDS[f"four-{percent}"] = replace(
        BEDS["four"], what=f"{BEDS['four'].what}, {percent} % of the labels wrong", wrong=percent / 100
    )
