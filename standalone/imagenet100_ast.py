# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
#   jupytext:
#     cell_metadata_filter: tags,title,-all
#     comment_magics: false
#     formats: notebooks///ipynb,standalone///py:percent
#     notebook_metadata_filter: accelerator,colab,language_info,-jupytext.text_representation.jupytext_version
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   language_info:
#     name: python
# ---

# %% Adaptive sparse training on ImageNet-100, or on your images [markdown]
# # Adaptive sparse training on ImageNet-100, or on your images
#
# <!-- badges -->
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/your-name/ast-notebook-kit/blob/main/notebooks/imagenet100_ast.ipynb)
# [![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/your-name/ast-notebook-kit/blob/main/notebooks/imagenet100_ast.ipynb)
# <!-- /badges -->
#
# Fine-tunes a pretrained network on ImageNet-100, or on any folder of images, and in each epoch reads,
# decodes and trains only the images that still teach the model something. Plain training, plain training cut
# short to the same cost, and random selection run beside it in the same process; what was measured is
# printed, whichever way it falls.
#
# <!-- measured -->
# Measured on 10,000 images of 100 classes of ImageNet at 64 pixels, `resnet18` from scratch, 10 epochs, 3
# seeds: AST 17.71 %, after 416 s of training. That is +0.04 ± 0.25 points against plain training cut to
# that cost, and -0.37 ± 0.23 against random selection (95 % intervals; cpu (AMD EPYC, 1 threads),
# 2026-11-23). From full-size JPEGs, a candidate at a = 0.25 takes 0.25 of the time of a trained image (cpu
# (Intel(R) Xeon(R) Processor, 2 threads), 2026-11-22). Not measured on a GPU yet.
# <!-- /measured -->
#
# As a script, alone, anywhere:
#
#     python imagenet100_ast.py --data path/to/images       # train/<class>/, val/<class>/, or just <class>/
#     python imagenet100_ast.py --profile efficiency        # on Kaggle, ambityga/imagenet100 attached
#     python imagenet100_ast.py --data images.zip --weights none --image-size 64
#
# As a notebook: name your data in the form "Your run", then Run all. Needs torch 2.10 or newer, torchvision,
# numpy, Pillow, matplotlib and tqdm. A GPU such as a T4 is what it is meant for; a CPU takes it too, with
# smaller images and a smaller network.

# %% Imports
import argparse
import asyncio
import contextlib
import copy
import ctypes
import difflib
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import platform
import queue
import re
import shutil
import signal
import struct
import sys
import tarfile
import threading
import time
import warnings
import zipfile
import zlib
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import matplotlib.colors
import matplotlib.patheffects
import numpy as np
import torch
import torch.utils.checkpoint
import torchvision
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image  # matplotlib and torchvision bring it
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

# %% Settings [markdown]
# ## Settings
#
# Every field is also a flag (`--target-activation 0.2`) and an environment variable
# (`AST_TARGET_ACTIVATION=0.2`). A flag beats a variable, a variable beats this cell, this cell beats the
# profile, and what is left at `None` the device decides: the run prints what it settled on. In a notebook,
# edit this cell, or the short form below it.

# %% Settings
PROGRAM = "imagenet100_ast"
KAGGLE_DATA = "ambityga/imagenet100"  # the data set to attach to a notebook on Kaggle


@dataclass
class Settings:
    """All settings of this program, flat; the comment behind each field is its help text."""

    # What is trained on what
    data: str = "auto"  # auto, imagenet100, shapes, or a PATH: folder of images, .zip, or packed .npy
    data_dir: str | None = None  # the first folder searched, for data and weights; the platform decides
    train_size: int = 0  # training samples, drawn evenly from the classes; 0 takes all
    val_fraction: float = 0.2  # share of a single folder of classes that is kept for validation
    image_size: int | None = None  # pixels, side of what the model sees; the device decides
    workers: int | None = None  # threads that read and decode; one a core, at most 8, if None
    model: str | None = None  # any classifier of torchvision, such as resnet50; the device decides
    weights: str = "imagenet"  # imagenet, none, or a FILE with a state dict; what does not fit is new
    epochs: int | None = None  # passes over the candidates; the device decides
    batch_size: int | None = None  # samples a step; the device decides
    lr: float | None = None  # peak learning rate; by kind of network and whether it is pretrained
    weight_decay: float = 1e-4  # per step, times the learning rate
    label_smoothing: float = 0.1  # fraction in [0, 1); significance uses the raw loss all the same
    jitter: float = 0.2  # strength of changes in brightness, contrast and saturation; 0 for none
    erase: float = 0.1  # share of the training views in which a rectangle is erased
    clip_norm: float = 5.0  # largest norm of a step's gradients; 0 clips none
    ema: float = 0.0  # decay of averaged weights, which are then evaluated and kept; 0.999; 0 for none
    head_epochs: int = 0  # epochs at the start that train the new last layer alone
    probe: bool = True  # also measure the weights untrained, and with a new last layer alone
    grad_checkpoint: bool = False  # compute activations twice instead of keeping them: time for memory
    compile: bool = False  # torch.compile the model: minutes at the start, faster steps on a recent GPU
    seeds: str = "0"  # one run of every policy per seed, such as 0,1,2
    # Adaptive sparse training
    profile: str = "accuracy"  # accuracy or efficiency: settings that go together, shown when a run starts
    target_activation: float = 0.4  # a*, fraction of the candidates trained on, in (0, 1]
    gate: str = "remembered"  # remembered, live, proxy, random, rs2 or full
    compare: str = "full,random,short"  # run beside it, also rs2; short: full, as many samples; or none
    warmup_epochs: int | None = None  # whole epochs on everything at the start; max(1, 8 %) if None
    ramp_epochs: int | None = None  # whole epochs from everything down to the target; 20 % if None
    anneal_epochs: int | None = None  # whole epochs on everything at the end; 12.5 % if None
    significance: str = "loss"  # loss, loss+entropy, loss+intensity, gradient or margin
    temperature: float = 0.25  # T, softness of the gate's edge in ranks; 0.1 chooses hard samples strictly
    weight_gamma: float = 0.0  # γ of the weights (p/a)^-γ; 0 weighs all alike, 1 is unbiased
    guard: bool = True  # remembered: rank as average what stays hard visit after visit
    balance: bool = False  # remembered: activate as many of every class, for classes that are rare
    live_rule: str = "threshold"  # threshold or topk, for --gate live
    score_scale: float = 1.0  # image side used for live scoring, fraction of the full side in (0, 1]
    feedforward: bool = True  # solve for θ; --no-feedforward is the pure PI of the original reports
    initial_threshold: float = 0.5  # θ at the start of the pure PI, on the rank scale
    adapt_kp: float = 0.005  # proportional gain of the pure PI, θ per unit of activation rate
    adapt_ki: float = 0.0001  # integral gain of the pure PI, θ per unit of activation rate and chunk
    ema_alpha: float = 0.3  # weight of the newest chunk in the controller's smoothed error, in (0, 1]
    # Where and how it runs
    device: str = "auto"  # auto, cpu or cuda
    amp: str = "auto"  # auto, off, fp16 or bf16
    out: str | None = None  # folder for results; the platform decides
    resume: bool = False  # go on from the last checkpoint in --out
    time_limit: float = 0.0  # minutes until the run saves and stops; 0 for none
    checkpoint_seconds: float = 300.0  # seconds between checkpoints; 0 saves after every step


PROFILES = {
    "accuracy": {"target_activation": 0.4},
    "efficiency": {"target_activation": 0.15, "warmup_epochs": 1, "ramp_epochs": 0, "anneal_epochs": 1},
}
CHOICES = {"profile": tuple(PROFILES)}

settings = Settings()

# %% Your run [markdown]
# ### Your run
#
# What most people change: a form in Colab, a few lines to edit elsewhere. To train on your own images, put
# the path of a folder with a folder for each class, or of a `.zip` like it, into `data`, and Run all. To see
# it work without any data, choose `shapes`, with `weights` set to `none` and `image_size` to 32.

# %% Your run tags=["active-ipynb"]
# data = "auto"  # @param ["auto", "imagenet100", "shapes"] {"allow-input": true}
# weights = "imagenet"  # @param ["imagenet", "none"] {"allow-input": true}
# image_size = 0  # @param {"type": "integer"}
# profile = "accuracy"  # @param ["accuracy", "efficiency"]
# gate = "remembered"  # @param ["remembered", "live", "proxy", "random"]
# epochs = 0  # @param {"type": "integer"}
# settings = replace(settings, data=data, weights=weights, image_size=image_size or None, profile=profile)
# settings = replace(settings, gate=gate, epochs=epochs or None)

# %% Why photographs stay on the disk [markdown]
# ## The data
#
# A hundred classes of ImageNet are some 130,000 photographs, more than memory holds as pixels: they stay on
# the disk, and each is decoded when it is trained on. Decoding is what a small machine waits for most, and
# where skipping pays first: *a photograph that the gate skips is never read.*
#
# Who wants more speed packs them once, shrunk, into one array (`python -m data_setup`); both forms train.


# %% Image data
@dataclass
class ImageData:
    """What is trained on: images in an array, perhaps memory-mapped, or photographs on the disk.

    Arrays are uint8 [N, H, W, 3]; labels are int64 [N] with values in [0, len(classes)).
    """

    name: str  # "imagenet100", "shapes", or the path's name
    synthetic: bool  # True where the images are drawn, so accuracies say nothing about photographs
    classes: list[str]  # names for people, all different
    train_images: "np.ndarray | Photos"
    train_labels: np.ndarray
    val_images: "np.ndarray | Photos"
    val_labels: np.ndarray
    source: str  # where it is read from, for the log
    difficulty: np.ndarray | None = None  # uint8 [N_train], shapes only: 0 easy, 1 hard, 2 mislabelled
    unreadable: list[str] = field(default_factory=list)  # files that were skipped
    keys: list[str] = field(default_factory=list)  # the classes' folders, such as ImageNet's n01440764


# %% Why so many layouts [markdown]
# ### Which form is it?
#
# Kaggle's `ambityga/imagenet100` comes in parts, `train.X1` to `train.X4`, of 25 classes each: a class index
# made part by part would give four classes the label 0. Others have `train/` and `val/`, or one folder a
# class and no validation images at all. All of it may lie one folder deeper than you think, or in a `.zip`.
# One listing reads them all; nothing is unpacked.


# %% Look into a folder or a zip
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
Look = Callable[[str], tuple[list[str], list[str]]]  # a folder below the root -> its folders, its files


def hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))


def look_into(root: Path) -> Look:
    """How to list the folders below `root`, a folder or a .zip; "" is the root itself. Links are followed.

    Raises BadInput where something cannot be read.
    """
    inside: defaultdict[str, tuple[set, set]] = defaultdict(lambda: (set(), set()))
    if root.is_file():
        try:
            with zipfile.ZipFile(root) as archive:
                names = archive.namelist()
        except DAMAGE as error:
            raise BadInput(
                f"{root}: expected a whole .zip ({one_line(error)}); copy or download it again"
            ) from error
        for name in names:
            *folders, file = name.split("/")
            if not any(map(hidden, (*folders, file))):
                for depth, folder in enumerate(folders):
                    inside["/".join(folders[:depth])][0].add(folder)
                if file:
                    inside["/".join(folders)][1].add(file)

    @functools.cache
    def look(folder: str) -> tuple[list[str], list[str]]:
        if root.is_file():
            folders, files = inside.get(folder, ((), ()))
        else:
            folders, files = set(), set()
            try:
                with os.scandir(root / folder) as entries:
                    for entry in entries:
                        if not hidden(entry.name):
                            (folders if entry.is_dir() else files).add(entry.name)
            except OSError as error:
                raise BadInput(
                    f"{root / folder}: cannot be read ({one_line(error)}); check path and permissions"
                ) from error
        return sorted(folders), sorted(files)

    return look


def join(*parts: str) -> str:
    return "/".join(filter(None, parts))


def images_in(look: Look, folder: str) -> list[str]:
    """Names of the image files that lie in `folder` itself, relative to the root."""
    return [join(folder, file) for file in look(folder)[1] if file.lower().endswith(IMAGE_SUFFIXES)]


# %% Find the splits
def find_splits(look: Look, prefix: str) -> dict[str, list[str]]:
    """The folders of class folders for "train" and "val" below `prefix`, train.X1 and its like too; or {}."""
    parts = {
        split: [
            join(prefix, name)
            for name in look(prefix)[0]
            if re.fullmatch(rf"({split})(\.X.*)?", name, re.IGNORECASE) and look(join(prefix, name))[0]
        ]
        for split in ("train|training", "val|valid|validation", "test|testing")
    }
    train, val, test = parts.values()
    splits = {"train": train, "val": val or test}
    return splits if all(splits.values()) else {}


def holds_classes(look: Look, prefix: str) -> bool:
    """Whether two or more folders of `prefix` hold images."""
    return sum(1 for name in look(prefix)[0] if images_in(look, join(prefix, name))) >= 2


# %% The listing
@dataclass
class Listing:
    """Which images there are, and what is on them. The label of a class is its place in `keys`."""

    root: Path  # a folder or a .zip
    keys: list[str]  # names of the class folders, sorted
    classes: list[str]  # their names for people, all different
    splits: dict[str, tuple[list[str], np.ndarray]]  # "train", "val": names below the root, labels int64 [N]


def list_images(path: Path, val_fraction: float = 0.2) -> Listing:
    """List the images below `path`, a folder or a .zip, in any layout this program knows.

    `val_fraction` of every class becomes validation where there is no folder for it, the same each time.
    Raises BadInput where there are no images, or a class has too few or stands in one split only.
    """
    look = look_into(path)
    prefixes = ["", *look("")[0]]
    prefix = next((prefix for prefix in prefixes if find_splits(look, prefix)), None)
    if prefix is not None:
        folders = {split: gather(look, parts) for split, parts in find_splits(look, prefix).items()}
        if odd := sorted(folders["train"].keys() ^ folders["val"].keys()):
            raise BadInput(
                f"{path}: class {', '.join(odd[:5])} in only one of train and val; add or remove folders"
            )
    else:
        holding = [prefix for prefix in prefixes if holds_classes(look, prefix)]
        if not holding:
            raise BadInput(unknown_form(path))
        prefix = holding[0]
        if prefix and len(holding) > 1:
            raise BadInput(
                f"{path}: class folders in {', '.join(holding[:5])}, expected train/ with val/ or test/, or "
                "one of them alone; rename them, or name the one to use"
            )
        folders = {"train": gather(look, [prefix])}
    keys = sorted(folders["train"])
    if len(keys) < 2:
        raise BadInput(f"{path}: the only class is {keys[0]}, expected two or more; add folders of others")
    for split, images in folders.items():
        if empty := [key for key in keys if not images[key]]:
            raise BadInput(
                f"{path}: class {empty[0]} has no image in {split}, expected one or more "
                f"({', '.join(IMAGE_SUFFIXES)}); fill its folder or remove it"
            )
    if "val" not in folders:
        folders = divide(path, folders["train"], val_fraction)
    splits = {}
    for split, images in folders.items():
        labels = np.repeat(np.arange(len(keys)), [len(images[key]) for key in keys])
        splits[split] = [name for key in keys for name in images[key]], labels
    titles = read_titles(path, prefix) if "Labels.json" in look(prefix)[1] else {}
    return Listing(path, keys, named(keys, titles), splits)


def gather(look: Look, parts: list[str]) -> dict[str, list[str]]:
    """The image files of every class in `parts`, the folders that hold class folders."""
    classes: dict[str, list[str]] = {}
    for part in parts:
        for key in look(part)[0]:
            classes.setdefault(key, []).extend(images_in(look, join(part, key)))
    return classes


def divide(path: Path, images: dict[str, list[str]], val_fraction: float) -> dict[str, dict[str, list[str]]]:
    """Set `val_fraction` of every class aside, at least one image, and leave at least one."""
    if not 0 < val_fraction < 1:
        raise BadInput(
            f"--val-fraction {val_fraction}: expected a fraction between 0 and 1; 0.2 keeps a fifth"
        )
    rng = np.random.default_rng(0)
    splits: dict[str, dict[str, list[str]]] = {"train": {}, "val": {}}
    for key, names in sorted(images.items()):
        if len(names) < 2:
            raise BadInput(
                f"{path}: class {key} has one image, expected two or more, since one trains and one "
                f"validates; add images or remove the folder"
            )
        count = min(max(1, round(val_fraction * len(names))), len(names) - 1)
        chosen = set(rng.permutation(len(names))[:count].tolist())
        splits["val"][key] = [name for row, name in enumerate(names) if row in chosen]
        splits["train"][key] = [name for row, name in enumerate(names) if row not in chosen]
    return splits


def unknown_form(path: Path) -> str:
    """The sentence that refuses a path without class folders."""
    return (
        f"{path}: no known form of data, expected train/<class>/ with val/<class>/ or test/<class>/, "
        f"Kaggle's train.X1 and so on with val.X, one folder for each of two or more classes, a .zip of any, "
        f"or train_images.npy and its fellows; correct the path or arrange the images so"
    )


# %% Names for people
def read_titles(root: Path, prefix: str) -> dict[str, str]:
    """Read Kaggle's Labels.json: {folder: "name, synonym, ..."}. Raises BadInput where it is not that."""
    name = join(prefix, "Labels.json")
    try:
        with Files(root) as files:
            titles = json.loads(files.read(name))
        if not isinstance(titles, dict) or not all(isinstance(title, str) for title in titles.values()):
            raise ValueError("not a table of names")
    except DAMAGE as error:
        raise BadInput(
            f"{root / name}: expected {{folder: name}} in JSON ({one_line(error)}); mend or remove it"
        ) from error
    return titles


def named(keys: list[str], titles: dict[str, str]) -> list[str]:
    """The first synonym of each class, else its folder's name; equal ones (two cranes) get their key too."""
    names = [titles.get(key, "").partition(",")[0].strip() or key for key in keys]
    return [
        f"{name} ({key})" if names.count(name) > 1 else name for key, name in zip(keys, names, strict=True)
    ]


# %% Read one file of many
LARGEST_FILE = 64 << 20  # bytes; a photograph of 90 megapixels takes about 40 MB


class Files:
    """The files below a folder or in a .zip, for many threads at once."""

    def __init__(self, root: Path):
        self.root = root
        self.archive = None if root.is_dir() else zipfile.ZipFile(root)

    def read(self, name: str) -> bytes:
        """One whole file. Raises ValueError over LARGEST_FILE, OSError or KeyError where there is none."""
        if self.archive:
            length = self.archive.getinfo(name).file_size
            if length <= LARGEST_FILE:
                return self.archive.read(name)
        else:
            with open(os.path.join(self.root, name), "rb", buffering=0) as file:
                length = os.fstat(file.fileno()).st_size
                if length <= LARGEST_FILE:
                    return file.readall()
        raise ValueError(f"{length} bytes, more than {LARGEST_FILE}")

    def close(self) -> None:
        if self.archive:
            self.archive.close()

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# %% Why crops are hashed, not drawn [markdown]
# ### Which part of the picture
#
# Training shows a random part of every photograph, between 8 and 100 % of its area. Threads decode in any
# order, so a generator would hand the same photograph another crop on every machine. Instead the numbers are
# a *hash* of (seed, epoch, sample): whoever asks, whenever, gets the same crop, and a resumed run goes on
# exactly where it was.


# %% Numbers from a hash
def mixed(numbers: np.ndarray) -> np.ndarray:
    """One step of splitmix64 on uint64 [...]: every bit of the input changes half the bits of the output."""
    numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def uniforms(seed: int, epoch: int, ids: np.ndarray, count: int) -> np.ndarray:
    """`count` numbers in [0, 1) for each of the samples `ids`: float64 [len(ids), count]."""
    state = mixed(np.array([seed % 2**64], dtype=np.uint64))
    state = mixed(state + np.uint64(epoch))
    state = mixed(state + np.asarray(ids).astype(np.uint64))
    state = mixed(state[:, None] + np.arange(count, dtype=np.uint64))
    return (state >> np.uint64(11)) * 2.0**-53


# %% Boxes
Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
CROP_SCALE = (0.08, 1.0)  # share of the picture's area
CROP_RATIO = (3 / 4, 4 / 3)  # width over height
DRAWS = 40  # numbers a random box may need: ten tries of four


def random_box(width: int, height: int, draws: np.ndarray) -> Box:
    """A random part of a picture, as torchvision's RandomResizedCrop; `draws` are DRAWS numbers in [0, 1)."""
    narrow, wide = CROP_RATIO
    for share, shape, across, down in draws.reshape(-1, 4).tolist():
        area = width * height * (CROP_SCALE[0] + share * (CROP_SCALE[1] - CROP_SCALE[0]))
        ratio = narrow * (wide / narrow) ** shape
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(across * (width - w + 1)), int(down * (height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * wide)), min(height, round(width / narrow))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def centre_box(width: int, height: int, share: float = 7 / 8) -> Box:
    """The square in the middle whose side is `share` of the short side; 7/8 is 224 of 256."""
    side = share * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


# %% Decode
UNREADABLE = (
    OSError,  # truncated, or not there
    SyntaxError,  # what PIL raises for a file that is not of its kind
    ValueError,
    EOFError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    KeyError,  # what zipfile raises for a name that is not there
    Image.DecompressionBombError,  # a frame larger than the picture it belongs to
)
FORMATS = {
    b"\xff\xd8": JpegImageFile,
    b"\x89PNG": PngImageFile,
    b"GIF8": GifImageFile,
    b"RIFF": WebPImageFile,
    b"BM": BmpImageFile,
}


def orientation(exif: bytes) -> int:
    """EXIF's orientation, 1 (upright) to 8; 1 where it says nothing that makes sense."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order and len(tiff) >= 10:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        count = int.from_bytes(tiff[start : start + 2], "little" if order == "<" else "big")
        for at in range(start + 2, min(start + 2 + 12 * count, len(tiff) - 11), 12):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, at)
            if tag == 0x112:
                return value if 1 <= value <= 8 else 1
    return 1


def as_rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB: palettes looked up, transparency dropped, 16 bits a pixel scaled to 8."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")
    return image if image.mode == "RGB" else image.convert("RGB")


# %% Why only part of a JPEG is decoded [markdown]
# ### Decoding no more than the crop needs
#
# Where the crop is at least twice as large as wanted, a JPEG is decoded at a half, a quarter or an eighth of
# its size. The rows below the crop are not decoded at all: the file's head is told that the picture ends
# there. And only the crop is resized.


# %% A JPEG's head
FRAME_MARKERS = set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # the segment that tells height and width
SCAN_MARKER, EXIF_MARKER, END = 0xDA, 0xE1, b"\xff\xd9"


def jpeg_head(raw: bytes) -> tuple[int, int]:
    """Where the frame's segment begins, and that of EXIF (0: none).

    Raises OSError where the file is not whole: the decoder will not read so far as to notice.
    """
    at, exif = 2, 0
    while at + 9 < len(raw) and raw[at] == 0xFF and raw[at + 1] != SCAN_MARKER:
        marker = raw[at + 1]
        if marker in FRAME_MARKERS:
            if raw.rfind(END) < at:
                break
            return at, exif
        if marker == EXIF_MARKER and raw.startswith(b"Exif", at + 4):
            exif = exif or at
        at += 1 if marker == 0xFF else 2 + int.from_bytes(raw[at + 2 : at + 4], "big")
    raise OSError("a truncated or damaged JPEG")


def begin_jpeg(raw: bytes, head: tuple[int, int], side: int, part: Box) -> tuple[JpegImageFile, int]:
    """The JPEG, ready to decode what `part` needs, and the scale it is reduced by: 1, 2, 4 or 8."""
    frame, exif = head
    shrink = min(part[2] - part[0], part[3] - part[1]) / side
    scale = next((scale for scale in (8, 4, 2) if shrink >= scale), 1)
    height = int.from_bytes(raw[frame + 5 : frame + 7], "big")
    rows = min(height, math.ceil(part[3]) + 2 * scale)  # colour is interpolated from the rows beyond
    changed = bytearray(raw)
    changed[frame + 5 : frame + 7] = rows.to_bytes(2, "big")
    if exif:
        changed[exif + 4 : exif + 8] = bytes(4)  # PIL would read it too, and warn where it is broken
    image = JpegImageFile(io.BytesIO(changed))
    image.draft(None, (image.width // scale, image.height // scale))
    return image, scale


# %% Decode a crop
def resized(pixels: np.ndarray, side: int) -> np.ndarray:
    """Resize uint8 [h, w, 3] to [side, side, 3], bilinear, antialiased, on this thread alone."""
    batch = torch.from_numpy(np.array(pixels)).unsqueeze(0)  # first this, or torch misses the layout below
    batch = batch.permute(0, 3, 1, 2)  # channels last, which it resizes twice as fast
    batch = F.interpolate(batch, (side, side), mode="bilinear", antialias=True)
    return batch.permute(0, 2, 3, 1)[0].numpy()


def whole_pixels(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    """The box rounded to pixels of a picture of this size, at least one each way."""
    left, top, right, bottom = (round(edge) for edge in box)
    left, top = min(max(left, 0), width - 1), min(max(top, 0), height - 1)
    return left, top, min(max(right, left + 1), width), min(max(bottom, top + 1), height)


def crop(image: np.ndarray, side: int, box: Callable[[int, int], Box]) -> np.ndarray:
    """One part of a picture, uint8 [H, W, 3], resized: uint8 [side, side, 3]; `box(W, H)` says which part."""
    height, width = image.shape[:2]
    left, top, right, bottom = whole_pixels(box(width, height), width, height)
    return resized(image[top:bottom, left:right], side)


def decode(raw: bytes, side: int, box: Callable[[int, int], Box]) -> np.ndarray:
    """As `crop`, from a file's bytes; the picture is upright when the box is asked for.

    Raises one of UNREADABLE.
    """
    kind = next((kind for start, kind in FORMATS.items() if raw.startswith(start)), None)
    if kind is None:
        raise ValueError(f"{len(raw)} bytes that are no JPEG, PNG, WebP, GIF or BMP")
    if kind is JpegImageFile:
        frame, at = head = jpeg_head(raw)
        height, width = struct.unpack_from(">HH", raw, frame + 5)
        exif = raw[at + 4 : at + 2 + int.from_bytes(raw[at + 2 : at + 4], "big")] if at else b""
    else:
        image = kind(io.BytesIO(raw))
        (width, height), exif = image.size, image.info.get("exif", b"")
    if not 0 < width * height <= Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{width}x{height} pixels, expected at most {Image.MAX_IMAGE_PIXELS}")
    turned = orientation(exif)
    flip_x, flip_y, swap = turned in (2, 3, 6, 7), turned in (3, 4, 7, 8), turned >= 5
    part, scale = stored(width, height, box, flip_x, flip_y, swap), 1
    if kind is JpegImageFile:
        image, scale = begin_jpeg(raw, head, side, part)
    # PIL's own resize lets other threads run; handing the whole crop to torch's, itself faster, would not.
    part = tuple(edge / scale for edge in part)
    pixels = np.asarray(as_rgb(image).resize((side, side), Image.Resampling.BILINEAR, box=part))
    pixels = pixels.transpose(1, 0, 2) if swap else pixels
    return pixels[:: -1 if flip_y else 1, :: -1 if flip_x else 1]


def stored(
    width: int, height: int, box: Callable[[int, int], Box], flip_x: bool, flip_y: bool, swap: bool
) -> Box:
    """Where the box, drawn on the upright picture, lies in one of width x height as it is stored."""
    width, height = (height, width) if swap else (width, height)
    left, top, right, bottom = box(width, height)
    if flip_x:
        left, right = width - right, width - left
    if flip_y:
        top, bottom = height - bottom, height - top
    return (top, left, bottom, right) if swap else (left, top, right, bottom)


# %% Some rows of an array
class Rows:
    """Some rows of an array that stays on the disk; indexing copies no more than what is asked for."""

    def __init__(self, array: np.ndarray, rows: np.ndarray):
        self.array, self.rows = array, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: object) -> np.ndarray:
        return self.array[self.rows[index]]

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.rows), *self.array.shape[1:]


# %% Photographs on the disk
PICTURE = 96  # pixels, height and width of the plain pictures shown in the lessons
KEEP = 1 << 30  # bytes of decoded validation pictures held in memory


class Photos:
    """Photographs on the disk; indexing gives plain pictures to look at, `view` what training sees."""

    def __init__(self, files: Files, names: list[str]):
        self.files, self.names = files, names
        self.kept: dict[int, tuple[Tensor, Tensor, dict[int, str]]] = {}  # side -> rows, pictures, unreadable

    def __len__(self) -> int:
        return len(self.names)

    def view(self, index: int, side: int, box: Callable[[int, int], Box]) -> np.ndarray:
        """One part of one photograph, uint8 [side, side, 3]. Raises one of UNREADABLE."""
        return decode(self.files.read(self.names[index]), side, box)

    def __getitem__(self, index: object) -> np.ndarray:
        """Plain pictures, uint8 [..., PICTURE, PICTURE, 3]: the centre square; unreadable ones are grey."""
        rows = np.arange(len(self))[index]
        pictures = np.full((*rows.shape, PICTURE, PICTURE, 3), 128, dtype=np.uint8)
        for place, row in np.ndenumerate(rows):
            try:
                pictures[place] = self.view(row, PICTURE, functools.partial(centre_box, share=1))
            except UNREADABLE:
                continue
        return pictures


# %% Why threads, and a chunk ahead [markdown]
# ### Decoding beside training
#
# Decoding releases Python's lock, so threads are enough: no processes to start, nothing to send between them.
# They work four batches ahead of the step, no further, since the gate should decide late, when it knows the
# newest losses. What leaves this source depends on neither the number of threads nor their order.


# %% Where photographs come from
AHEAD = 4  # batches decoded before they are needed: about one chunk of the gate
BLOCK = 8  # images a thread takes at a time


class CropSource:
    """Crops of images, decoded by threads, batch by batch; `view` makes them the model's input."""

    def __init__(
        self,
        images: "np.ndarray | Photos",
        labels: np.ndarray,
        device: torch.device,
        batch_size: int,
        side: int,
        view: Callable[[Tensor, torch.Generator], Tensor],
        workers: int,
        draw: bool,
    ):
        """`view(uint8 [B, side, side, 3] on the device, generator)`; `draw`: random crops, not the centre."""
        self.images, self.device, self.batch_size = images, device, batch_size
        self.labels = torch.as_tensor(labels).long().to(device)
        self.side, self.view, self.workers, self.draw = side, view, workers, draw
        self.generator = torch.Generator(device)
        self.unreadable: dict[int, str] = {}  # index -> "name: reason"
        self.moment = (0, 0)  # seed and epoch, which decide the crops

    @property
    def remedy(self) -> str:
        """What to do where training waits for data."""
        more = f"raise --workers, now {self.workers}, or " if self.workers < (os.cpu_count() or 1) else ""
        packing = "pack the images once with python -m data_setup"
        return more + (packing if isinstance(self.images, Photos) else "use a faster disk")

    def __len__(self) -> int:
        return len(self.labels)

    def stream(self, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each batch of indices (int64 [B], CPU): those that could be read, their views, their labels."""
        with closing(self._decoded(batches)) as decoded:
            for indices, pictures in decoded:
                yield indices, *self._ready(indices, pictures)

    def in_order(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All readable samples, for evaluation; photographs are decoded once if they fit into KEEP."""
        kept = self.images.kept if isinstance(self.images, Photos) and not self.draw else {}
        if self.side in kept:
            rows, pictures, unreadable = kept[self.side]
            self._refuse_if_many(unreadable)
            for start in range(0, len(rows), self.batch_size):
                part = slice(start, start + self.batch_size)
                yield self._ready(rows[part], pictures[part])
            return
        size = len(self) * self.side**2 * 3
        rows, pictures = [], torch.empty(0)
        if isinstance(self.images, Photos) and not self.draw and size <= KEEP:
            pictures = torch.empty((len(self), self.side, self.side, 3), dtype=torch.uint8)
        with closing(self._decoded(torch.arange(len(self)).split(self.batch_size))) as decoded:
            for indices, batch in decoded:
                if len(pictures):
                    pictures[sum(map(len, rows)) :][: len(batch)] = batch
                rows.append(indices)
                if len(indices):
                    yield self._ready(indices, batch)
        if len(pictures):
            kept.clear()
            found = torch.cat(rows)
            kept[self.side] = found, pictures[: len(found)], dict(self.unreadable)

    def _ready(self, indices: Tensor, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Views and labels on the device."""
        if not len(indices):
            return torch.empty(0), torch.empty(0)
        pictures = pictures.to(self.device, non_blocking=True)
        rows = indices.to(self.device, non_blocking=True)
        return self.view(pictures, self.generator), self.labels[rows]

    def _decoded(self, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Indices that could be read and their pictures, uint8 [b, side, side, 3], in the order asked for."""
        pool = ThreadPoolExecutor(self.workers, "decode")
        waiting: deque[tuple[Tensor, Tensor, list[Future]]] = deque()
        try:
            for indices in batches:
                waiting.append(self._begin(pool, indices))
                if len(waiting) > AHEAD:
                    yield self._finish(*waiting.popleft())
            while waiting:
                yield self._finish(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def _begin(self, pool: ThreadPoolExecutor, indices: Tensor) -> tuple[Tensor, Tensor, list[Future]]:
        ids = indices.numpy()
        boxes: list[Callable[[int, int], Box]] = [centre_box] * len(ids)
        if self.draw:
            boxes = [functools.partial(random_box, draws=row) for row in uniforms(*self.moment, ids, DRAWS)]
        shape = (len(ids), self.side, self.side, 3)
        pictures = torch.empty(shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        target = pictures.numpy()

        def work(start: int) -> dict[int, str]:
            bad = {}
            for place in range(start, min(start + BLOCK, len(ids))):
                try:
                    target[place] = self._crop(ids[place], boxes[place])
                except UNREADABLE as error:
                    bad[int(ids[place])] = f"{self._name(ids[place])}: {one_line(error)}"
            return bad

        return indices, pictures, [pool.submit(work, start) for start in range(0, len(ids), BLOCK)]

    def _crop(self, index: int, box: Callable[[int, int], Box]) -> np.ndarray:
        if isinstance(self.images, Photos):
            return self.images.view(index, self.side, box)
        return crop(self.images[index], self.side, box)

    def _name(self, index: int) -> str:
        return self.images.names[index] if isinstance(self.images, Photos) else f"image {index}"

    def _finish(self, indices: Tensor, pictures: Tensor, parts: list[Future]) -> tuple[Tensor, Tensor]:
        bad = {index: reason for part in parts for index, reason in part.result().items()}
        if not bad:
            return indices, pictures
        self._refuse_if_many(bad)
        good = ~torch.isin(indices, torch.tensor(list(bad)))
        return indices[good], pictures[good]

    def _refuse_if_many(self, bad: dict[int, str]) -> None:
        self.unreadable.update(bad)
        if len(self.unreadable) > 0.01 * len(self):
            raise BadInput(
                f"{len(self.unreadable)} of {len(self)} images: expected at most 1 % unreadable; replace or "
                f"remove them (the first is {next(iter(self.unreadable.values()))})"
            )


# %% Why packed arrays are mapped [markdown]
# ### Packed arrays
#
# Four `.npy` files and the names of the classes. They are mapped, not read: the operating system loads the
# pages that are touched, so a set larger than memory opens at once, and a skipped picture is never loaded.
# Out of a `.zip` they must be read whole.


# %% Map packed arrays
LARGEST_UNZIPPED = 4 << 30  # bytes of an array that is read whole


def packed_array(folder: Path | zipfile.Path, name: str) -> np.ndarray:
    """An array of packed data, mapped from a folder, or read out of a .zip. Raises one of DAMAGE."""
    file = folder / f"{name}.npy"
    if isinstance(folder, Path):
        return np.lib.format.open_memmap(file, mode="r")  # unlike np.load it never takes pickled objects
    with file.open("rb") as stream:
        size = file.root.getinfo(file.at).file_size
        if size > LARGEST_UNZIPPED:
            raise ValueError(f"{size} bytes inside a .zip, where they cannot be mapped: unpack it first")
        return np.lib.format.read_array(stream, allow_pickle=False)


def read_packed(path: Path | zipfile.Path, size: int) -> ImageData:
    """Open packed arrays. Raises BadInput where one is missing, damaged, or of the wrong shape."""
    arrays = {}
    for name in PACKED:
        try:
            arrays[name] = packed_array(path, name)
        except DAMAGE as error:
            raise BadInput(
                f"{path / name}.npy: expected a whole array ({one_line(error)}); pack it again"
            ) from error
    classes = class_names(path / "classes.json")
    for split in ("train", "val"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        square = images.ndim == 4 and images.shape[2:] == (images.shape[1], 3) and images.size > 0
        square = square and images.dtype == np.uint8
        if not square or labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
            raise BadInput(
                f"{path}: {split} images are {images.dtype} {list(images.shape)} and labels {labels.dtype} "
                f"{list(labels.shape)}, expected uint8 [N, S, S, 3] and int64 [N]; pack them again"
            )
        if labels.min() < 0 or labels.max() >= len(classes):
            raise BadInput(
                f"{path}: {split} labels run from {labels.min()} to {labels.max()}, expected 0 to "
                f"{len(classes) - 1} for {len(classes)} classes; correct the labels or the list of classes"
            )
        arrays[f"{split}_labels"] = labels.astype(np.int64)
    rows = balanced_subset(arrays["train_labels"], size, len(classes))
    subset = Rows(arrays["train_images"], rows) if size else arrays["train_images"]
    arrays |= {"train_images": subset, "train_labels": arrays["train_labels"][rows]}
    return ImageData(Path(str(path)).stem, False, classes, **arrays, source=str(path))


# %% Read a path
IMAGENET_KEY = re.compile(r"n\d{8}")  # how ImageNet names its classes


def is_packed(path: Path | zipfile.Path) -> bool:
    return any((path / f"{name}.npy").is_file() for name in PACKED)


def read_path(path: Path, settings: "Settings") -> ImageData:
    """Read the data at `path`, in any form, or in a folder of it. Raises BadInput if there is none."""
    zipped = path.is_file() and path.suffix.lower() == ".zip"
    try:
        root = zipfile.Path(path) if zipped else path
        inner = [entry for entry in root.iterdir() if entry.is_dir()] if root.is_dir() else []
        packed = next(filter(is_packed, (root, *sorted(inner, key=str))), None)
    except DAMAGE as error:
        raise BadInput(
            f"--data {path}: expected {'a whole .zip' if zipped else 'a folder that can be read'} "
            f"({one_line(error)}); copy or download it again, or check permissions"
        ) from error
    if packed:
        return read_packed(packed, settings.train_size)
    if not path.is_dir() and not zipped:
        found = "no folder and no .zip" if path.exists() else "no such path"
        raise BadInput(
            f"--data {path}: {found}, expected auto, imagenet100, shapes, or the path of a folder or "
            f".zip with class folders, or of packed arrays; correct it"
        )
    listing = list_images(path, settings.val_fraction)
    files = Files(path)
    names, labels = listing.splits["train"]
    rows = np.arange(len(names))[balanced_subset(labels, settings.train_size, len(listing.keys))]
    val_names, val_labels = listing.splits["val"]
    return ImageData(
        name=path.stem,
        synthetic=False,
        classes=listing.classes,
        train_images=Photos(files, [names[row] for row in rows]),
        train_labels=labels[rows],
        val_images=Photos(files, val_names),
        val_labels=val_labels,
        source=str(path),
        keys=listing.keys,
    )


# %% Find ImageNet-100
def holds_imagenet(path: Path) -> Path | None:
    """`path` where a hundred classes named as ImageNet's lie, or packed arrays of a hundred; else None."""
    if is_packed(path):
        return path if len(class_names(path / "classes.json")) == 100 else None
    keys = set(classes_in(path))
    return path if len(keys) == 100 and all(map(IMAGENET_KEY.fullmatch, keys)) else None


def holds_data(path: Path) -> Path | None:
    """`path` where any split into class folders, or packed arrays, lie in it; else None."""
    return path if is_packed(path) or classes_in(path) else None


def classes_in(path: Path) -> list[str]:
    """Names of the class folders of `path` where it is split, told without listing their images; else []."""
    if not path.is_file() and not any((path / name).is_dir() for name in ("train", "train.X1")):
        return []  # and so a folder of a million files costs two questions
    look = look_into(path)
    prefixes = ["", *look("")[0]] if path.is_file() else [""]
    splits = next(filter(None, (find_splits(look, prefix) for prefix in prefixes)), {})
    return [key for part in splits.get("train", ()) for key in look(part)[0]]


def read_data(settings: "Settings", say: Callable[[str], None]) -> ImageData:
    """Load what `settings.data` names: "auto", "imagenet100", "shapes" or a path; `say` tells what was found.

    Reads `data`, `data_dir`, `train_size` (0: all) and `val_fraction`. Raises BadInput, in one sentence.
    """
    if settings.data == "shapes":
        return drawn(settings.train_size)
    if settings.data not in ("auto", "imagenet100"):
        data = read_path(Path(settings.data).expanduser(), settings)
        data.name = Path(os.path.abspath(Path(settings.data).expanduser())).stem
        return data
    folder = Path(settings.data_dir).expanduser()
    test = holds_data if settings.data == "auto" else holds_imagenet
    found = search(folder, test, "imagenet")
    if not found and settings.data == "auto" and folder.is_dir() and holds_classes(look_into(folder), ""):
        found = folder
    for holds in (holds_imagenet, test):  # of several inputs ImageNet-100, if it is one of them
        found = found or search(KAGGLE_INPUT, holds, "imagenet")
    if not found:
        raise BadInput(
            f"--data {settings.data}: not found in {folder} nor in {KAGGLE_INPUT}, expected ImageNet-100 in "
            f"one of them; attach ambityga/imagenet100 to the notebook on Kaggle, or make it with python -m "
            f"data_setup imagenet100 make from an ILSVRC-2012 tree, or name a PATH"
        )
    data = read_path(found, settings)
    data.name = "imagenet100" if holds_imagenet(found) else found.stem
    say(f"{data.name}: found in {found}")
    return data


# %% Where training starts [markdown]
# ## The model
#
# Any classifier of torchvision, with as many outputs as there are classes. Starting from weights that were
# trained on ImageNet is what makes fine-tuning short; only what has another shape, the last layer, starts
# anew. Weights that cannot be had are an error: a model that silently began at random would learn far less,
# and no figure of the run would say why.


# %% Find the weights
def find_weights(settings: Settings, say: Callable[[str], None]) -> Path | None:
    """The file of the weights that `settings.weights` names, downloaded where it must be; None for none.

    Raises BadInput where there is no such file, or no way to get it.
    """
    if settings.weights == "none":
        return None
    if settings.weights != "imagenet":
        path = Path(settings.weights).expanduser()
        if not path.is_file():
            raise BadInput(f"--weights {path}: expected imagenet, none or a file; correct the path")
        return path
    versions = published_weights(settings.model)
    cache, own = Path(torch.hub.get_dir()) / "checkpoints", Path(settings.data_dir).expanduser()
    names = [url.rpartition("/")[2] for url in versions]

    def in_folder(folder: Path) -> Path | None:
        return next((folder / name for name in names if (folder / name).is_file()), None)

    if found := in_folder(cache) or search(own, in_folder) or search(KAGGLE_INPUT, in_folder):
        return found
    say(f"downloading {versions[0]} to {cache}")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        expected = re.search(r"-([0-9a-f]{8,})\.", names[0])  # torchvision's names end with their SHA-256
        torch.hub.download_url_to_file(versions[0], str(cache / names[0]), expected and expected[1], False)
    except (OSError, RuntimeError) as error:
        raise BadInput(
            f"--weights imagenet: {names[0]} is not in {cache}, {own} or {KAGGLE_INPUT}, and {versions[0]} "
            f"cannot be downloaded ({one_line(error)}); put the file into {own}, attach a data set with it, "
            "switch the internet on, or start without: --weights none"
        ) from error
    return cache / names[0]


def published_weights(model: str) -> list[str]:
    """Addresses of the weights that torchvision publishes for a model, its default first. Raises BadInput."""
    known = torchvision.models.list_models(module=torchvision.models)
    if model not in known:
        close = difflib.get_close_matches(model, known, 3, 0.4) or ["resnet18", "resnet50"]
        raise BadInput(f"--model {model}: expected a classifier of torchvision, such as {', '.join(close)}")
    versions = torchvision.models.get_model_weights(model)
    return list(dict.fromkeys([versions.DEFAULT.url, *(version.url for version in versions)]))


# %% Read the weights
def read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict from a file, runs no code from it. Raises BadInput where it holds none."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (*DAMAGE, pickle.UnpicklingError, AttributeError, LookupError, TypeError) as error:
        raise BadInput(
            f"--weights {path}: expected a state dict saved by torch ({one_line(error)}); save "
            "model.state_dict() with torch.save"
        ) from error
    for key in ("state_dict", "model"):  # how training programs wrap it
        state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise BadInput(f"--weights {path}: expected a state dict, found {type(state).__name__}; save one")
    # DenseNets are published with names that torchvision no longer uses: norm.1 for norm1.
    old = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")
    return {old.sub(r"\1\2", name.removeprefix("module.")): value for name, value in state.items()}


def fit(model: nn.Module, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The part of `state` that fits the model, and the names in the model that it leaves out."""
    own = model.state_dict()
    if isinstance(model, torchvision.models.VisionTransformer) and "encoder.pos_embedding" in state:
        place = model.image_size, model.patch_size  # positions belong to one size of image
        with contextlib.suppress(ValueError):  # of no square grid: left as they are, so told to be new
            state = torchvision.models.vision_transformer.interpolate_embeddings(*place, OrderedDict(state))
    fitting = OrderedDict(
        (name, v) for name, v in state.items() if name in own and v.shape == own[name].shape
    )
    fitting._metadata = own._metadata  # MNASNet asks for its version
    return fitting, [name for name in own if name not in fitting and not name.endswith("num_batches_tracked")]


# %% Build the model
NO_AUXILIARY = {"googlenet", "inception_v3"}  # in training they return more than logits unless told


def bare_model(settings: Settings, classes: int) -> nn.Module:
    """A classifier of torchvision with `classes` outputs and random weights.

    Raises BadInput for a name that is none, or images of a size that it cannot take.
    """
    name, side = settings.model, settings.image_size
    published_weights(name)
    options = {"aux_logits": False, "init_weights": True} if name in NO_AUXILIARY else {}
    options |= {"transform_input": settings.weights != "none"} if name in NO_AUXILIARY else {}
    options |= {"image_size": side} if name.startswith("vit_") else {}
    try:
        model = torchvision.models.get_model(name, num_classes=classes, **options)
        with torch.no_grad():  # shapes alone, nothing is computed
            copy.deepcopy(model).to("meta").eval()(torch.empty(2, 3, side, side, device="meta"))
    except (RuntimeError, AssertionError) as error:
        raise BadInput(
            f"--image-size {side}: expected a size that {name} takes ({one_line(error)}); 224 is usual"
        ) from error
    return model


def build_model(settings: Settings, classes: int) -> nn.Module:
    """The model and weights that the settings name, from images [B, 3, S, S] to logits [B, classes].

    Raises BadInput for weights that are not there or belong to another model.
    """
    model = bare_model(settings, classes)
    if path := find_weights(settings, lambda line: None):
        state, missing = fit(model, read_weights(path))
        if sum(value.numel() for value in state.values()) < 0.5 * sum(v.numel() for v in model.parameters()):
            raise BadInput(
                f"--weights {path}: expected those of {settings.model}, of whose tensors {len(missing)} are "
                f"not there or have another shape, first {missing[0]}; choose the --model they belong to"
            )
        model.load_state_dict(state, strict=False)
    if settings.grad_checkpoint:
        recompute(model)
    if settings.compile:
        compile_model(settings, model)
    return model.to(memory_format=torch.channels_last)


# %% Load data and weights
def load_data(settings: Settings, say: Callable[[str], None]) -> ImageData:
    """What a run stands on: the images that `settings.data` names, and weights that can be had; says which.

    Raises BadInput, in one sentence.
    """
    for flag_name, used in (("--data", settings.data), ("--weights", settings.weights)):
        place = Path(used).expanduser().resolve()
        if place.exists() and Path(settings.out).resolve() in place.parents and not settings.resume:
            raise BadInput(
                f"{flag_name} {used}: lies in --out {settings.out}, expected a place that a run does not "
                "rename; copy it, or choose another --out"
            )
    data = read_data(settings, say)
    path = find_weights(settings, say)
    if path is None:
        say(f"weights: none, {settings.model} starts at random")
    else:
        _, missing = fit(bare_model(settings, len(data.classes)), read_weights(path))
        new = f"; new, since it holds none of their shape: {', '.join(missing)}" if missing else ""
        say(f"weights: {path}{new}")
    return data


# %% Memory against time [markdown]
# ### Memory against time
#
# Training keeps every layer's output for the backward pass. With `--grad-checkpoint` each block keeps its
# input alone and computes the rest a second time: one more forward pass, for a fraction of the memory. Batch
# norm must not count a batch twice, so its running statistics stand still the second time.


# %% Blocks that compute twice
def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The children of a model's sequences, such as the residual blocks of each stage of a ResNet."""
    parts = [p for c in model.children() for p in ([c] if isinstance(c, nn.Sequential) else c.children())]
    stages = [part for part in parts if isinstance(part, nn.Sequential)]
    return [block for stage in stages for block in stage if any(True for _ in block.parameters())]


def recompute(model: nn.Module) -> None:
    """Makes each block of a model keep its input only, and compute the rest again in the backward pass.

    Raises BadInput for a model that is not made of such blocks.
    """
    blocks = blocks_of(model)
    held = sum(weight.numel() for block in blocks for weight in block.parameters())
    if held < 0.5 * sum(weight.numel() for weight in model.parameters()):
        raise BadInput(
            f"--grad-checkpoint: expected a network of sequences of blocks, such as resnet50, not "
            f"{type(model).__name__}; leave it out"
        )
    for block in blocks:
        contexts = functools.partial(second_pass, block)
        block.forward = functools.partial(
            torch.utils.checkpoint.checkpoint, block.forward, use_reentrant=False, context_fn=contexts
        )


def second_pass(block: nn.Module) -> tuple[contextlib.nullcontext, contextlib.AbstractContextManager]:
    return contextlib.nullcontext(), still_statistics(block)


@contextmanager
def still_statistics(block: nn.Module) -> Iterator[None]:
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    kept = [(norm, norm.momentum) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in kept:
            norm.momentum = momentum


def compile_model(settings: Settings, model: nn.Module) -> None:
    """Compiles the model in place. Raises BadInput where that cannot work."""
    device = torch.device(settings.device)
    reason = ""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (7, 0):
        reason = f"Triton has no code for {torch.cuda.get_device_name(device)}"
    elif device.type == "cpu" and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        reason = "there is no C++ compiler"
    elif settings.grad_checkpoint:
        reason = "--grad-checkpoint does what it cannot follow"
    elif not torch._dynamo.is_dynamo_supported():
        reason = f"torch {torch.__version__} does not compile under Python {platform.python_version()}"
    if reason:
        raise BadInput(f"--compile: expected a device it can work on, but {reason}; leave it out")
    model.compile()


# %% Views and the recipe [markdown]
# ## Views and the recipe
#
# A *view* is what the model sees of an image. Cropping belongs to decoding, above: a thread draws the crop,
# and a JPEG need not be decoded finer than the crop asks for. All else is done for the whole batch at once on
# the training device: flip, colours, and a rectangle erased now and then.

# %% Views
PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet, 0 to 255


def normalise(images: Tensor) -> Tensor:
    """[B, H, W, 3], 0 to 255, to float [B, 3, H, W] of about zero mean and unit variance, channels last."""
    mean, std = pixel_statistics(images.device)
    return ((images - mean) / std).permute(0, 3, 1, 2)


@functools.cache
def pixel_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each colour, copied to the device once: a copy in every step would wait."""
    return torch.tensor(PIXEL_MEAN, device=device), torch.tensor(PIXEL_STD, device=device)


def plain_view(images: Tensor, generator: torch.Generator) -> Tensor:
    """The view for evaluation: nothing drawn."""
    return normalise(images)


def augment(images: Tensor, generator: torch.Generator, jitter: float, erase: float) -> Tensor:
    """A random flip, change of colours and erased rectangle, per sample.

    images: uint8 [B, H, W, 3] on the device of the generator. Returns float [B, 3, H, W].
    """
    drawn = torch.rand(9, len(images), 1, 1, 1, generator=generator, device=images.device)
    images = torch.where(drawn[0] < 0.5, images.flip(2), images).float()
    if jitter:
        images = change_colours(images, 1 + jitter * (2 * drawn[1:4] - 1))
    views = normalise(images)
    return erase_rectangle(views, drawn[4:9], erase) if erase else views


def change_colours(images: Tensor, factors: Tensor) -> Tensor:
    """Scales brightness, contrast and saturation by `factors` [3, B, 1, 1, 1]; images float [B, H, W, 3]."""
    brightness, contrast, saturation = factors
    grey = images.mean(3, keepdim=True)
    middle = grey.mean((1, 2), keepdim=True)
    images = grey + (images - grey) * saturation
    return ((images - middle) * contrast + middle).mul_(brightness).clamp_(0, 255)


def erase_rectangle(views: Tensor, drawn: Tensor, share: float) -> Tensor:
    """Zeroes a rectangle of 2 to 33 % of the area in a share of the views [B, 3, H, W].

    drawn: uniform [5, B, 1, 1, 1]. Zhong et al. 2020, Random Erasing Data Augmentation.
    """
    chance, size, shape, top, left = (part.view(-1, 1, 1, 1) for part in drawn)
    height, width = views.shape[2:]
    area, ratio = 0.02 + 0.31 * size, torch.exp(math.log(0.3) * (2 * shape - 1))  # sides from 0.3 to 3.3
    tall, broad = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    rows = (torch.arange(height, device=views.device)[:, None] + 0.5) / height - top * (1 - tall)
    columns = (torch.arange(width, device=views.device) + 0.5) / width - left * (1 - broad)
    inside = (rows >= 0) & (rows < tall) & (columns >= 0) & (columns < broad) & (chance < share)
    return views.masked_fill_(inside, 0.0)  # a copy would lose channels last


# %% The recipe
def sources(settings: Settings, data: ImageData, device: torch.device) -> "tuple[Source, Source]":
    """Where training and validation samples come from: crops, decoded when they are asked for."""
    view = functools.partial(augment, jitter=settings.jitter, erase=settings.erase)
    place = device, settings.batch_size, settings.image_size
    train = CropSource(data.train_images, data.train_labels, *place, view, settings.workers, draw=True)
    val = CropSource(data.val_images, data.val_labels, *place, plain_view, settings.workers, draw=False)
    return train, val


def default_recipe(device: torch.device, dtype: torch.dtype | None) -> dict[str, object]:
    """What the device decides of the training; a CPU gets a smaller network, smaller images, less time."""
    workers = {"workers": min(8, os.cpu_count() or 1)}
    if device.type == "cuda":
        return workers | {"model": "resnet50", "image_size": 224, "epochs": 20, "batch_size": 128}
    return workers | {"model": "resnet18", "image_size": 128, "epochs": 8, "batch_size": 64}


def recipe(settings: Settings, model: nn.Module) -> tuple[torch.optim.Optimizer, nn.Module]:
    """SGD with momentum for networks with batch norm, AdamW for others; a per-sample cross-entropy.

    On pretrained weights a new last layer learns HEAD_RATE times faster than the rest, which needs less.
    """
    convolutional = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    pretrained = settings.weights != "none"
    peak = {(True, True): 0.02, (True, False): 0.1, (False, True): 1e-4, (False, False): 1e-3}
    rate = settings.lr or peak[convolutional, pretrained] * (settings.batch_size / 128) ** 0.5
    head = set(map(id, head_of(model)[1].parameters()))
    faster = HEAD_RATE if has_new_head(settings, model) else 1
    groups = []
    for new in (False, True):
        for decayed in (True, False):
            chosen = [p for p in model.parameters() if (id(p) in head) is new and (p.ndim > 1) is decayed]
            own = {"weight_decay": settings.weight_decay * decayed, "lr": rate * (faster if new else 1)}
            wait = {"first_epoch": settings.head_epochs} if settings.head_epochs and not new else {}
            groups.append({"params": chosen} | own | wait)
    groups = [group for group in groups if group["params"]]
    if convolutional:
        optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True, fused=True)
    else:
        optimizer = torch.optim.AdamW(groups, lr=rate, fused=True)
    return optimizer, nn.CrossEntropyLoss(reduction="none", label_smoothing=settings.label_smoothing)


HEAD_RATE = 10  # times the learning rate of the rest


def has_new_head(settings: Settings, model: nn.Module) -> bool:
    """Whether the weights serve all of the model but its last layer, their classes being others."""
    path = find_weights(settings, lambda line: None)
    name, head = head_of(model)
    known = read_weights(path).get(f"{name}.weight") if path else head.weight
    return known is None or known.shape != head.weight.shape


def head_of(model: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of a classifier's last layer, the one that makes its logits."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]


# %% What a skeptic asks [markdown]
# ### What a skeptic asks of fine-tuning
#
# Was there anything left to learn? Two cheap answers stand beside the results. *Untrained*: the accuracy of
# the weights as they came, where their classes include yours. *Linear probe*: everything frozen, only a new
# last layer trained, on features computed once. Where a probe comes near the fine-tuned model, fine-tuning
# bought little, whoever selected its samples.


# %% References
AMBIGUOUS = {"crane", "maillot"}  # ImageNet has two classes of each of these names


def untrained(
    settings: Settings, data: ImageData, say: Callable[[str], None], stopping: Callable[[], bool]
) -> dict[str, object]:
    """Accuracy of the weights before any training, percent, on the classes that they know, and what to say.

    None, and nothing to say, without pretrained weights or with `--no-probe`.
    """
    path = find_weights(settings, say) if settings.probe else None
    if path is None:
        return {"accuracy": None, "words": ""}
    state = read_weights(path)
    last = state.get(head_of(bare_model(settings, 2))[0] + ".weight")
    if last is None:
        return {"accuracy": None, "words": f"{path} holds no last layer"}
    model = bare_model(settings, outputs := len(last))
    model.load_state_dict(fit(model, state)[0], strict=False)
    names = published_classes(settings.model) if outputs == 1000 else data.classes
    known = {name: column for column, name in enumerate(names) if name not in AMBIGUOUS}
    pairs = [(label, known[name]) for label, name in enumerate(data.classes) if name in known]
    if outputs not in (1000, len(data.classes)) or len(pairs) < 2:
        words = f"not measured, the weights' {outputs} classes having other names than the data's"
        return {"accuracy": None, "words": words}
    labels, columns = (torch.tensor(part, device=settings.device) for part in zip(*pairs, strict=True))
    right = asked = 0
    for logits, truth in passes(settings, model, data, stopping):
        mine = torch.isin(truth, labels)
        right += int((labels[logits[mine][:, columns].argmax(1)] == truth[mine]).sum())
        asked += int(mine.sum())
    accuracy = 100 * right / max(1, asked)
    words = f"{accuracy:.2f} % before any training, "
    if outputs == 1000:
        words += f"on {len(pairs)} of {len(data.classes)} classes, by name"
    else:  # nothing in the file says which they are
        words += f"if the {outputs} classes of the weights are those of the data, in their order"
    return {"accuracy": accuracy, "classes": len(pairs), "words": words}


def published_classes(model: str) -> list[str]:
    """The names of ImageNet's 1,000 classes, in the order of torchvision's weights."""
    return torchvision.models.get_model_weights(model).DEFAULT.meta["categories"]


@torch.no_grad()
def passes(
    settings: Settings,
    model: nn.Module,
    data: ImageData,
    stopping: Callable[[], bool],
    training: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs and labels of a frozen model for the plain views of a split, batch by batch."""
    device = torch.device(settings.device)
    dtype = pick_dtype(settings.amp, device)
    if training:
        images = data.train_images
        if isinstance(images, Photos):  # its own, so that what is decoded here is not kept
            images = Photos(images.files, images.names)
        data = replace(data, val_images=images, val_labels=data.train_labels)
    model = model.to(device, memory_format=torch.channels_last).eval()
    few = replace(settings, batch_size=min(64, settings.batch_size))
    for images, labels in sources(few, data, device)[1].in_order():
        if stopping():
            return
        with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            outputs = model(images).float()
        yield outputs, labels  # outside, or whoever asked would compute in half precision too


def linear_probe(
    settings: Settings, data: ImageData, say: Callable[[str], None], stopping: Callable[[], bool]
) -> dict[str, object]:
    """Accuracy of a new last layer on frozen weights, percent, and its seconds; None where `untrained` is."""
    if settings.weights == "none" or not settings.probe:
        return {"accuracy": None, "words": ""}
    say("linear probe: features of all images, once")
    began = time.perf_counter()
    model = build_model(replace(settings, compile=False, grad_checkpoint=False), len(data.classes))
    model.set_submodule(head_of(model)[0], nn.Identity())
    splits = []
    for training in (True, False):
        parts = list(passes(settings, model, data, stopping, training))
        if stopping():
            return {}
        splits.append([torch.cat(part) for part in zip(*parts, strict=True)])
    (features, labels), (val_features, val_labels) = splits
    mean, spread = features.mean(0), features.std(0) + 1e-6
    features, val_features = (features - mean) / spread, (val_features - mean) / spread
    layer = fit_last_layer(features, labels, len(data.classes))
    with torch.no_grad():
        accuracy = 100 * float((layer(val_features).argmax(1) == val_labels).float().mean())
    seconds = time.perf_counter() - began
    words = f"{accuracy:.2f} % with everything but a new last layer frozen, in {seconds:.1f} s"
    return {"accuracy": accuracy, "seconds": seconds, "words": words}


def fit_last_layer(features: Tensor, labels: Tensor, classes: int, epochs: int = 30) -> nn.Linear:
    """Logistic regression on features [N, d] by AdamW; the same layer every time."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(features.shape[1], classes).to(features.device)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=generator).to(labels.device).split(256):
            optimizer.zero_grad()
            F.cross_entropy(layer(features[rows]), labels[rows]).backward()
            optimizer.step()
        schedule.step()
    return layer


REFERENCES = {"untrained": untrained, "linear probe": linear_probe}


# %% Why shapes [markdown] tags=["shared"]
# ### A data set that needs no download
#
# From here to the lessons, this program and its siblings share every line.
#
# A notebook without internet must still show something real, and a test of the gate needs to know the truth
# about every sample. Photographs offer neither, so we draw: ten kinds of figure, coloured, textured, rotated,
# on a cluttered ground. Each training sample is drawn to be
#
# - **easy** (60 %): large, in strong contrast, little clutter;
# - **hard** (35 %): two of low contrast, small, half covered, heavy clutter;
# - **mislabelled** (5 %): easy to see, but the label is wrong. Its loss stays high whatever the model learns,
#   so a gate that trusts the loss alone keeps paying for it.
#
# Validation labels are all right.


# %% Figures as distances tags=["shared"]
# Each figure is a signed distance: negative inside, positive outside, y up, in units of the figure's
# radius. One formula draws it at any size and angle with a smooth edge. No figure is another one's mirror
# image, since training flips pictures.
Outline = Callable[[np.ndarray, np.ndarray], np.ndarray]


def arrow(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    head = np.maximum(0.707 * (np.abs(x) + y - 0.95), -0.05 - y)
    shaft = np.maximum(np.abs(x) - 0.27, np.abs(y + 0.45) - 0.5)
    return np.minimum(head, shaft)


def crescent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.hypot(x, y) - 0.95, 0.78 - np.hypot(x - 0.45, y))


def heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    side = 0.46  # half the side of the square that stands on its corner, and the radius of both lobes
    a, b = (x + y + 0.1) * 0.707, (y + 0.1 - x) * 0.707
    lobes = np.minimum(np.hypot(a - side, b), np.hypot(a, b - side))
    return np.minimum(np.maximum(np.abs(a), np.abs(b)), lobes) - side


def hourglass(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(0.76 * (np.abs(x) - 0.85 * np.abs(y) - 0.05), np.abs(y) - 0.9)


def plus(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    upright = np.maximum(np.abs(x) - 0.27, np.abs(y) - 0.92)
    return np.minimum(upright, np.maximum(np.abs(y) - 0.27, np.abs(x) - 0.92))


def star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    sector = 2 * np.pi / 5
    angle = np.abs((np.arctan2(x, y) + sector / 2) % sector - sector / 2)  # fold five points into half a one
    radius = np.hypot(x, y)
    edge = np.array([0.42 * np.sin(sector / 2), 0.42 * np.cos(sector / 2) - 1.0])  # from the tip to the notch
    normal = np.array([-edge[1], edge[0]], dtype=np.float32) / np.float32(np.hypot(*edge))
    return radius * np.sin(angle) * normal[0] + (radius * np.cos(angle) - 1) * normal[1]


FIGURES: dict[str, Outline] = {
    "arrow": arrow,
    "circle": lambda x, y: np.hypot(x, y) - 0.9,
    "crescent": crescent,
    "heart": heart,
    "hourglass": hourglass,
    "plus": plus,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.72) - 0.2,
    "square": lambda x, y: np.maximum(np.abs(x), np.abs(y)) - 0.78,
    "star": star,
    "triangle": lambda x, y: np.maximum(0.866 * np.abs(x) + 0.5 * y, -y) - 0.5,
}

# %% Why clutter and texture [markdown] tags=["shared"]
# A flat figure on a flat ground is solved by counting coloured pixels. Texture and clutter take that short
# cut away: stripes and blotches vary inside figure and ground alike, and loose strokes in any colour lie
# around (and, on hard samples, one lies across).


# %% Strokes and textures tags=["shared"]
DRAWN_SIZE = 32  # pixels, height and width of a drawn image
GRID_Y, GRID_X = (g.astype(np.float32) + 0.5 for g in np.mgrid[:DRAWN_SIZE, :DRAWN_SIZE])  # pixel centres


def blotches(rng: np.random.Generator, n: int, cells: int) -> np.ndarray:
    """Smooth noise, float32 [n, 32, 32], about -1 to 1: a coarse random grid, interpolated."""
    coarse = rng.uniform(-1, 1, (n, cells + 1, cells + 1)).astype(np.float32)
    at = (np.arange(DRAWN_SIZE, dtype=np.float32) + 0.5) * cells / DRAWN_SIZE
    weight = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(cells + 1)))  # [32, cells + 1], linear hats
    weight = weight.astype(np.float32)
    return weight @ coarse @ weight.T


def column(rng: np.random.Generator, n: int, low: float, high: float) -> np.ndarray:
    """Uniform draws, float32 [n, 1, 1], one a picture."""
    return rng.uniform(low, high, (n, 1, 1)).astype(np.float32)


def stroke(rng: np.random.Generator, n: int, x: np.ndarray, y: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Coverage in [0, 1], float32 [n, 32, 32], of a random stroke a picture at (x, y); width in pixels."""
    angle, half = column(rng, n, 0, np.pi), column(rng, n, 0, 12)
    dx, dy = GRID_X - x, GRID_Y - y
    along = np.clip(dx * np.cos(angle) + dy * np.sin(angle), -half, half)
    distance = np.hypot(dx - along * np.cos(angle), dy - along * np.sin(angle))
    return np.clip(0.5 + width / 2 - distance, 0, 1)


def paint(canvas: np.ndarray, coverage: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Lay colour [n, 3, 1 or 32, 1 or 32] over canvas [n, 3, 32, 32] where coverage [n, 32, 32] is 1."""
    return canvas + coverage[:, None] * (colour - canvas)


# %% Draw figures tags=["shared"]
def draw(rng: np.random.Generator, figures: np.ndarray, hard: np.ndarray) -> np.ndarray:
    """Draw one picture a row of `figures` (int64 [n]); `hard` is bool [n]. Returns uint8 [n, 32, 32, 3]."""
    n = len(figures)
    ranks = rng.random((n, 4)).argsort(axis=1)  # a hard picture gets two hardships of the four
    low_contrast, small, covered, crowded = ((ranks < 2) & hard[:, None]).T[:, :, None, None]

    def colours(low: float = 0, high: float = 1) -> np.ndarray:
        return rng.uniform(low, high, (n, 3, 1, 1)).astype(np.float32)

    ground, direction = colours(0.15, 0.85), rng.standard_normal((n, 3, 1, 1), dtype=np.float32)
    contrast = np.where(low_contrast, np.float32(0.25), column(rng, n, 0.55, 0.8))  # distance in RGB
    away = contrast[:, None] * direction / np.linalg.norm(direction, axis=1, keepdims=True)
    away = np.where(np.abs(ground + away - 0.5) > 0.5, -away, away)  # stay inside [0, 1]
    colour = ground + away

    canvas = ground + colours(0, 0.24) * blotches(rng, n, 3)[:, None]
    for index in range(7):
        shown = crowded if index > 1 else column(rng, n, 0, 1) < 0.6 + 0.4 * crowded
        x, y, width = column(rng, n, 0, 32), column(rng, n, 0, 32), column(rng, n, 1, 3.5)
        canvas = paint(canvas, 0.8 * shown * stroke(rng, n, x, y, width), colours())

    radius = np.where(small, column(rng, n, 5, 7), column(rng, n, 8, 12))
    x, y = (16 + column(rng, n, -0.7, 0.7) * np.maximum(1, 15 - radius) for _ in range(2))
    angle = column(rng, n, -0.3, 0.3) * (1 + 0.5 * hard[:, None, None].astype(np.float32))  # radians
    dx, dy, cos, sin = GRID_X - x, GRID_Y - y, np.cos(angle) / radius, np.sin(angle) / radius
    u, v = dx * cos + dy * sin, dx * sin - dy * cos
    distance = np.empty_like(u)
    for index, figure in enumerate(FIGURES.values()):
        rows = figures == index
        distance[rows] = figure(u[rows], v[rows])
    stripes = np.sin(u * column(rng, n, 5, 14) + v * column(rng, n, -9, 9))
    texture = np.where(column(rng, n, -1, 1) < 0, stripes, 1.5 * blotches(rng, n, 8))
    depth = np.where(low_contrast, np.float32(0.04), column(rng, n, 0.03, 0.13))
    canvas = paint(canvas, np.clip(0.5 - distance * radius, 0, 1), colour + (texture * depth)[:, None])

    x, y = (centre + column(rng, n, -0.6, 0.6) * radius for centre in (x, y))
    over = covered * stroke(rng, n, x, y, radius * column(rng, n, 0.4, 0.65))
    canvas = paint(canvas, over, colours())
    canvas += np.float32(0.03) * rng.standard_normal(canvas.shape, dtype=np.float32)
    return (np.clip(canvas, 0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)


# %% Make the shapes set tags=["shared"]
def shapes(n_train: int = 12_000, n_val: int = 2_000, seed: int = 0) -> ImageData:
    """Draw the embedded ten-class set; the same seed gives the same bytes.

    Returns n_train and n_val pictures; `difficulty` holds exactly 60 % easy, 35 % hard, 5 % mislabelled.
    Raises BadInput where either count is below the ten classes.
    """
    count = len(FIGURES)
    if min(n_train, n_val) < count:
        raise BadInput(f"shapes with {min(n_train, n_val)} images: expected at least {count}, one a class")
    rng = np.random.default_rng(seed)

    def split(n: int, mislabelled: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        labels = rng.permutation(np.arange(n) % count)
        hard = round(0.35 * n)
        difficulty = rng.permutation(np.repeat([0, 1, 2], [n - hard - mislabelled, hard, mislabelled]))
        blocks = [slice(i, i + 500) for i in range(0, n, 500)]  # blocks that stay in the processor's cache
        images = np.concatenate([draw(rng, labels[b], difficulty[b] == 1) for b in blocks])
        wrong = difficulty == 2
        labels[wrong] = (labels[wrong] + rng.integers(1, count, mislabelled)) % count
        return images, labels, difficulty.astype(np.uint8)

    train_images, train_labels, difficulty = split(n_train, round(0.05 * n_train))
    val_images, val_labels, _ = split(n_val, 0)
    arrays = train_images, train_labels, val_images, val_labels
    return ImageData("shapes", True, list(FIGURES), *arrays, f"the drawing seed {seed}", difficulty)


# %% Why a subset is balanced [markdown] tags=["shared"]
# ### Fewer samples, the same classes
#
# `--train-size` trades accuracy for time. The samples it keeps are the same on every run, and as many of
# each class as the size allows, so that two runs at one size differ in what you changed and in nothing
# else.


# %% Pick a balanced subset tags=["shared"]
def balanced_subset(labels: np.ndarray, size: int, classes: int) -> np.ndarray | slice:
    """Choose `size` of the labels (int64 [N]), evenly over the classes; the same choice every time.

    Returns sorted positions, or the whole slice where size is 0.
    Raises BadInput where size is below the number of classes or above N.
    """
    if size == 0:
        return slice(None)
    if not classes <= size <= len(labels):
        raise BadInput(
            f"--train-size {size}: expected 0 (all) or a number from {classes} (one a class) to "
            f"{len(labels)} (all there are); change it"
        )
    order = np.random.default_rng(0).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    counts = np.bincount(labels, minlength=classes)
    turn = np.empty(len(labels), dtype=np.int64)  # a sample's place in the queue of its class
    turn[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    return np.sort(
        order[np.argsort(turn[order], kind="stable")[:size]]
    )  # first of each class, then second, ...


# %% Why readers share a little [markdown] tags=["shared"]
# ### What every reader of data needs
#
# The names of packed arrays, a bounded search (inputs may be millions of files on a slow disk), and the
# errors that a damaged file can raise.

# %% What every reader needs tags=["shared"]
PACKED = ["train_images", "train_labels", "val_images", "val_labels"]
SPLITS = ("train", "val", "test")
KAGGLE_INPUT = Path("/kaggle/input")  # holds <slug>/ and datasets/<owner>/<slug>/
SEARCH_LEVELS = 5  # folders below a root
SEARCH_ENTRIES = 20_000  # names read before a search gives up: inputs may be millions of files on a slow disk
DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    MemoryError,
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
)


def one_line(error: Exception) -> str:
    """An error's own words on one line, since bad input gets one sentence."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def class_names(path: Path) -> list[str]:
    """Read classes.json: a list of two or more different names. Raises BadInput otherwise."""
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
        if (
            isinstance(names, list)
            and all(isinstance(name, str) for name in names)
            and 1 < len(names) == len(set(names))
        ):
            return names
        problem = str(names)[:60]
    except (OSError, ValueError) as error:
        problem = one_line(error)
    raise BadInput(
        f"{path}: expected a list of two or more different class names ({problem}); write it again"
    )


def drawn(size: int) -> ImageData:
    """Draw `shapes` with `size` training images (0: 12,000). Raises BadInput below one a class."""
    if size and size < len(FIGURES):
        raise BadInput(f"--train-size {size}: expected 0 (12,000) or {len(FIGURES)} and more; raise it")
    return shapes(size or 12_000)


def search(root: Path, test: Callable[[Path], Any], word: str | None = None) -> Any:
    """Look for data in `root` and its folders, nearest first, bounded in depth and in names read.

    test(path) is asked of every folder, and of every .zip with `word` in its name (None: of no .zip), and
    answers None where it knows nothing. Returns the first answer that is not None, else None.
    """
    level, seen, budget = [root], set(), SEARCH_ENTRIES
    for _ in range(SEARCH_LEVELS + 1):
        below: list[Path] = []
        for folder in level:
            real = os.path.realpath(folder)
            if real in seen:  # a link may lead back to a folder above it
                continue
            seen.add(real)
            with contextlib.suppress(OSError, BadInput):  # not there, not ours to read, or somebody else's
                if (answer := test(folder)) is not None:
                    return answer
                with os.scandir(folder) as names:
                    entries = sorted(itertools.islice(names, budget), key=lambda entry: entry.name)
                budget -= len(entries)
                below += [
                    folder / entry.name
                    for entry in entries
                    if entry.is_dir() and entry.name.partition(".")[0] not in SPLITS
                ]
                for entry in entries:
                    named = word and word in entry.name.lower() and entry.name.lower().endswith(".zip")
                    if named and (answer := test(folder / entry.name)) is not None:
                        return answer
        level = below
    return None


# %% Why every value is checked first [markdown] tags=["shared"]
# ## Adaptive sparse training
#
# First what can be set: `ASTConfig` holds the method alone. Every value is checked before anything is
# trained, and a refusal is one sentence: the value, what was expected, what to do.

# %% What can be set, and what is refused tags=["shared"]
LEARNED = ("remembered", "live", "proxy")  # gates that look at significance
GATES = (*LEARNED, "random", "rs2", "full")
SIGNIFICANCES = ("loss", "loss+entropy", "loss+intensity", "gradient", "margin")


class BadInput(ValueError):
    """Something a person can mend; the message is one sentence. A script ends with exit status 2 on it."""

    def __init__(self, sentence: str):
        super().__init__(" ".join(str(sentence).splitlines()))


def whole(low: int) -> Callable[[object], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= low


def real(test: Callable[[float], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, int | float) and math.isfinite(value) and test(value)


def one_of(names: Iterable[str]) -> tuple[Callable[[object], bool], str]:
    names = tuple(names)
    return (lambda value: value in names), "one of " + ", ".join(names)


EPOCHS_OR_NONE = (
    lambda v: v is None or whole(0)(v),
    "a whole number of epochs, 0 or more; leave it out for the default",
)
RULES: dict[str, tuple[Callable[[object], bool], str]] = {
    "target_activation": (
        real(lambda v: 0 < v <= 1),
        "a fraction in (0, 1]; 0.4 trains on 40 % of the samples",
    ),
    "gate": one_of(GATES),
    "significance": one_of(SIGNIFICANCES),
    "live_rule": one_of(("threshold", "topk")),
    "amp": one_of(("auto", "off", "fp16", "bf16")),
    "device": (lambda v: re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(v)) is not None, "auto, cpu or cuda"),
    "epochs": (lambda v: v is None or whole(1)(v), "a whole number of epochs, 1 or more"),
    "batch_size": (lambda v: v is None or whole(1)(v), "a whole number of samples, 1 or more"),
    "lr": (lambda v: v is None or real(lambda x: x > 0)(v), "a learning rate above 0"),
    "warmup_epochs": EPOCHS_OR_NONE,
    "ramp_epochs": EPOCHS_OR_NONE,
    "anneal_epochs": EPOCHS_OR_NONE,
    "temperature": (real(lambda v: v > 0), "a width in ranks, above 0; 0.1 chooses hard samples strictly"),
    "weight_gamma": (real(lambda v: 0 <= v <= 1), "an exponent in [0, 1]; 0 switches the weights off"),
    "score_scale": (
        real(lambda v: 0 < v <= 1),
        "a fraction of the image side in (0, 1]; 0.5 costs a quarter",
    ),
    "initial_threshold": (real(lambda v: True), "a number; ranks lie in [0, 1]"),
    "adapt_kp": (real(lambda v: v >= 0), "a gain, 0 or more"),
    "adapt_ki": (real(lambda v: v >= 0), "a gain, 0 or more"),
    "ema_alpha": (real(lambda v: 0 < v <= 1), "a fraction in (0, 1]; 1 does not smooth"),
    "clip_norm": (real(lambda v: v >= 0), "a norm above 0, or 0 for no clipping"),
    "ema": (real(lambda v: 0 <= v < 1), "a decay in [0, 1), such as 0.999; 0 keeps no average"),
    "train_size": (whole(0), "a whole number of samples; 0 takes all"),
    "weight_decay": (real(lambda v: v >= 0), "0 or more; 5e-4 is usual"),
    "val_fraction": (real(lambda v: 0 < v < 1), "a fraction in (0, 1); 0.2 keeps a fifth for validation"),
    "image_size": (lambda v: v is None or whole(8)(v), "a whole number of pixels, 8 or more; 224 is usual"),
    "workers": (lambda v: v is None or whole(1)(v), "a whole number of threads, 1 or more"),
    "jitter": (real(lambda v: 0 <= v < 1), "a strength in [0, 1); 0 leaves the colours alone"),
    "erase": (real(lambda v: 0 <= v <= 1), "a fraction in [0, 1]; 0 erases nothing"),
    "head_epochs": (whole(0), "a whole number of epochs, 0 or more"),
    "label_smoothing": (real(lambda v: 0 <= v < 1), "a fraction in [0, 1); 0 switches it off"),
    "time_limit": (real(lambda v: v >= 0), "minutes, 0 or more; 0 sets no limit"),
    "checkpoint_seconds": (real(lambda v: v >= 0), "seconds, 0 or more"),
    "seeds": (
        lambda v: re.fullmatch(r"\d{1,9}(,\d{1,9})*", str(v)) is not None,
        "whole numbers with commas between them, such as 0,1,2",
    ),
    "compare": (
        lambda v: v in ("", "none") or set(str(v).split(",")) <= {"full", "random", "rs2", "short"},
        "policies with commas between them, out of full, random, rs2 and short; or none",
    ),
}


def check(name: str, value: object, label: str, rules: dict = RULES) -> None:
    """Raises BadInput if `value` is not what the field `name` takes; `label` is how a person wrote it."""
    test, expected = rules.get(name, (lambda v: True, ""))
    if not test(value):
        raise BadInput(f"{label} {value}: expected {expected}")


@dataclass
class ASTConfig:
    """The method's settings; the fields mean what they mean in `Settings`.

    `target_activation_rate`, `learning_rate` and `use_amp` are the original reports' names for
    `target_activation`, `lr` and `amp`. Raises BadInput for a value that cannot be.
    """

    target_activation: float = 0.4
    gate: str = "remembered"
    epochs: int | None = None
    warmup_epochs: int | None = None
    ramp_epochs: int | None = None
    anneal_epochs: int | None = None
    significance: str = "loss"
    temperature: float = 0.25
    weight_gamma: float = 0.0
    guard: bool = True
    balance: bool = False
    live_rule: str = "threshold"
    score_scale: float = 1.0
    feedforward: bool = True
    initial_threshold: float = 0.5
    adapt_kp: float = 0.005
    adapt_ki: float = 0.0001
    ema_alpha: float = 0.3
    batch_size: int | None = None
    lr: float | None = None
    clip_norm: float = 0.0
    ema: float = 0.0
    device: str = "auto"
    amp: str = "auto"

    def __post_init__(self):
        for item in fields(self):
            check(item.name, getattr(self, item.name), f"ASTConfig {item.name}")

    @classmethod
    def from_settings(cls, settings: object) -> "ASTConfig":
        """The method's share of a program's flat `Settings`, field by field of the same name."""
        return cls(**{item.name: getattr(settings, item.name) for item in fields(cls)})

    @classmethod
    def of(cls, config: "ASTConfig | dict | None") -> "ASTConfig":
        """`config` itself, or one made from a dict. Raises BadInput for a key that is no field."""
        if isinstance(config, cls):
            return config
        known = [item.name for item in fields(cls)] + list(ALIASES)
        for key in config or {}:
            if key not in known:
                raise BadInput(f"ASTConfig {key}: expected one of {', '.join(known)}; rename it")
        return cls(**(config or {}))


# The original reports' names: given by them, and read by them.
ALIASES = {
    "target_activation_rate": ("target_activation", lambda rate: rate),
    "learning_rate": ("lr", lambda rate: rate),
    "use_amp": ("amp", lambda use: "auto" if use else "off"),
}


def accept_aliases(init: Callable) -> Callable:
    @functools.wraps(init)
    def with_aliases(self: ASTConfig, *values: object, **named: object) -> None:
        for alias in named.keys() & ALIASES.keys():
            name, convert = ALIASES[alias]
            named[name] = convert(named.pop(alias))
        init(self, *values, **named)

    return with_aliases


ASTConfig.__init__ = accept_aliases(ASTConfig.__init__)
ASTConfig.target_activation_rate = property(lambda self: self.target_activation)
ASTConfig.learning_rate = property(lambda self: self.lr)
ASTConfig.use_amp = property(lambda self: self.amp != "off")

# %% Why a significance [markdown] tags=["shared"]
# ### Significance: how much a sample still teaches
#
# The score comes from the forward pass that trains the sample anyway, so it costs nothing:
#
# $$s = \ell = -\log p_y$$
#
# the raw cross-entropy, without label smoothing. Optional terms: the entropy of the prediction (the
# published package's $0.7\,\ell + 0.3\,H$), the deviation of the image's intensity (the first report's
# $0.7\,\ell + 0.3\,\mathrm{std}(x)$), $\lVert p - \mathrm{onehot}(y) \rVert$, the length of the gradient
# at the logits (Paul et al. 2021, EL2N), or one minus the margin between the two likeliest classes, which
# never looks at the label (Scheffer et al. 2001).
#
# A wrong label is hard for ever, and a rule that looks for what is hard would live on wrong labels. The
# *guard* notices: a sample that was among the hardest fifth three visits in a row, its loss never below 0.7
# of what was remembered, ranks as average until its loss falls.


# %% Significance tags=["shared"]
def significance(logits: Tensor, labels: Tensor, images: Tensor, kind: str = "loss") -> Tensor:
    """Significance of each sample.

    logits [B, C], labels int64 [B], images [B, ...]; returns float32 [B] there, without gradient.
    """
    logits = logits.detach().float()
    if kind == "gradient":
        return (logits.softmax(1) - F.one_hot(labels, logits.shape[1])).norm(dim=1)
    if kind == "margin":
        likeliest = logits.softmax(1).topk(min(2, logits.shape[1])).values
        return 1 - (likeliest[:, 0] - likeliest[:, -1])
    loss = F.cross_entropy(logits, labels, reduction="none")
    if kind == "loss+entropy":
        return 0.7 * loss + 0.3 * -(logits.softmax(1) * logits.log_softmax(1)).sum(1)
    if kind == "loss+intensity":
        return 0.7 * loss + 0.3 * images.detach().float().flatten(1).std(1)
    return loss


def rank_within(u: Tensor, labels: Tensor) -> Tensor:
    """The ranks in (0, 1) of u [m] among those of the same label (int64 [m]), float32 [m]."""
    order = u.argsort()
    order = order[labels[order].argsort(stable=True)]
    sizes = labels.bincount()
    place, ranks = torch.arange(len(u)) - (sizes.cumsum(0) - sizes)[labels[order]], torch.empty(len(u))
    ranks[order] = (place + 0.5) / sizes[labels[order]]
    return ranks


class Memory:
    """The remembered significance of n samples, and when each was last trained: 9 bytes a sample.

    A sample not yet seen has infinite significance, so it ranks highest.
    """

    REFERENCE = 16_384  # scores that a rank is measured against; more would move it by under 1 %
    TOP, FALL, VISITS = 0.8, 0.7, 3  # the guard: a quantile, a share of what was remembered, a count

    def __init__(self, n: int, guard: bool = True):
        """guard: rank as average what was in the top VISITS times in a row without a clear fall."""
        self.significance = torch.full((n,), math.inf)
        self.visited = torch.zeros(n)  # epochs on the gate's clock
        self.stuck = torch.zeros(n, dtype=torch.uint8)  # visits in a row in the top without a clear fall
        self.guard = guard

    def observe(self, indices: Tensor, values: Tensor, now: float) -> None:
        """Remembers half the new value and half the old; a value that is not finite changes nothing."""
        finite = values.isfinite()
        indices, values = indices[finite], values[finite].float()
        before = self.significance[indices]
        if self.guard and len(values):
            stays = (values > self._top()) & (before.isinf() | (values >= self.FALL * before))
            self.stuck[indices] = torch.where(stays, (self.stuck[indices] + 1).clamp(max=self.VISITS), 0)
        self.significance[indices] = torch.where(before.isinf(), values, 0.5 * values + 0.5 * before)
        self.visited[indices] = now

    def _top(self) -> float:
        """The significance above which the highest are, as far as is known."""
        some = self.significance[:: max(1, 8 * len(self.significance) // self.REFERENCE)]
        some = some[some.isfinite()]
        return float(some.quantile(self.TOP)) if len(some) else math.inf

    def rank(self, indices: Tensor, labels: Tensor | None = None) -> Tensor:
        """u in [0, 1]: the share of the memory below each sample's significance, ties counted half; with
        labels (int64, as many) its rank among the indices of its own class instead."""
        stride = max(1, len(self.significance) // self.REFERENCE)
        reference = np.sort(self.significance[::stride].numpy())  # many times faster than torch on a CPU
        value = self.significance[indices].numpy()
        below = np.searchsorted(reference, value, side="left")
        upto = np.searchsorted(reference, value, side="right")
        u = torch.from_numpy((below + upto) / (2 * len(reference))).float()
        u = u if labels is None else rank_within(u, labels)
        return torch.where(self.stuck[indices] >= self.VISITS, 0.5, u) if self.guard else u


# %% Why a soft gate on ranks [markdown] tags=["shared"]
# ### The gate: from significance to a probability
#
# A sample's *rank* $u \in [0,1]$ among all remembered scores is compared with a threshold $\theta$:
#
# $$p(u) = f + (1-f)\,\sigma\!\left(\frac{u-\theta}{T}\right), \qquad f = \tfrac14 a$$
#
# Ranks keep their meaning while losses fall, so one $\theta$ scale serves the whole run. The floor $f$ keeps
# looking at easy samples (they may have been forgotten). The temperature $T$ makes the edge soft: a hard cut
# trains the same few samples over and over, while at $T = \tfrac14$ a hard sample is a few times likelier
# than an easy one, no more. $\theta$ is *solved for*: the one value with $\sum p = a\,n$.


# %% The gate tags=["shared"]
def activation_probability(u: Tensor, threshold: float, target: float, temperature: float) -> Tensor:
    """p(u) of each rank u [m] at a threshold θ, a target activation rate a (fraction) and a temperature T."""
    floor = 0.25 * target
    return floor + (1 - floor) * torch.sigmoid((u - threshold) / temperature)


def solve_threshold(u: Tensor, count: float, target: float, temperature: float) -> float:
    """θ at which Σ p(u) is `count` samples, by Newton's method, safeguarded by halving.

    p falls with θ, so there is one such θ; `count` outside what p can reach gives an end of the bracket.
    """
    low, high, threshold = -12 * temperature, 1 + 12 * temperature, 0.5  # σ(±12) is 0 or 1 for our purposes
    for _ in range(50):
        excess = float(activation_probability(u, threshold, target, temperature).sum()) - count
        if abs(excess) < 1e-3 or high - low < 1e-9:  # samples; θ
            break
        low, high = (threshold, high) if excess > 0 else (low, threshold)
        slope = threshold_slope(u, threshold, target, temperature)
        newton = threshold - excess / min(slope * len(u), -1e-12)
        threshold = newton if low < newton < high else 0.5 * (low + high)
    return threshold


def threshold_slope(u: Tensor, threshold: float, target: float, temperature: float) -> float:
    """d(Σp/m)/dθ, the plant's own gain: how the activation rate answers a move of the threshold (below 0)."""
    edge = torch.sigmoid((u - threshold) / temperature)
    return -float((edge * (1 - edge)).mean()) * (1 - 0.25 * target) / temperature


# %% Why a controller [markdown] tags=["shared"]
# ### The controller: holding the activation rate
#
# The solve is *feed-forward*: it knows every remembered rank, so it is right at once, also when somebody
# drags the target. What it cannot know is left to *feedback*: samples that turn out unreadable, losses that
# are not finite, a live score distribution that drifts. A PI loop smooths the error $e = a - \hat a$ and
# moves $\theta$ by
#
# $$\Delta\theta = \frac{k_p\,\bar e + k_i \sum \bar e}{d\hat a / d\theta}$$
#
# where the slope in the denominator makes the same gains fit every target. Undisturbed, $\Delta\theta$
# stays 0. `feedforward=False` is the loop of the original reports instead: no solve, fixed gains, a
# wandering threshold.


# %% The controller tags=["shared"]
class Controller:
    """A PI loop with EMA and anti-windup around the activation rate; one update per chunk of candidates."""

    KP, KI = (
        0.5,
        0.2,
    )  # share of an error taken back at once, and per chunk; stable for ema_alpha from 0.1 to 1

    def __init__(self, config: ASTConfig):
        self.config = config
        self.error = 0.0  # smoothed, fraction of the candidates
        self.integral = 0.0  # fraction of the candidates; in the pure PI, sum of the smoothed errors
        self.lost = 0  # samples reported lost since the last update
        self.stops = (-5 * config.temperature, 1 + 5 * config.temperature)  # beyond, θ moves nothing
        self.value = config.initial_threshold if not config.feedforward else 0.5
        self.solved = self.value

    def threshold(self, solved: float, slope: float) -> float:
        """θ for the next chunk, from the feed-forward θ and the plant's slope at it."""
        if self.config.feedforward:
            self.solved = solved
            self.value = solved + (self.KP * self.error + self.integral) / min(slope, -1e-3)
        else:
            self.solved = self.config.initial_threshold
            correction = self.config.adapt_kp * self.error + self.config.adapt_ki * self.integral
            self.value = min(self.stops[1], max(self.stops[0], self.solved - correction))
        return self.value

    def update(self, activated: int, candidates: int, target: float, exact: bool) -> None:
        """Takes in what a chunk came to; `exact` says the count was meant to be met to the sample."""
        error = target - (activated - self.lost) / candidates
        self.lost = 0
        if exact and abs(error) * candidates < 1:
            error = 0.0  # rounding to whole samples, no disturbance
        alpha = self.config.ema_alpha
        self.error += alpha * (error - self.error)
        if self.config.feedforward:
            room = min(target, 1 - target)  # anti-windup: ask for at most that much more or less
            self.integral = min(room, max(-room, self.integral + self.KI * self.error))
        elif self.stops[0] < self.value < self.stops[1] or self.error * (self.value - 0.5) > 0:
            self.integral += self.error  # anti-windup: not beyond a threshold that is already at its stop

    def state(self, target: float) -> dict[str, float]:
        """What the epoch row shows: smoothed rate, the two corrections, and the feed-forward threshold."""
        kp, ki = (self.KP, 1.0) if self.config.feedforward else (self.config.adapt_kp, self.config.adapt_ki)
        return {
            "ema": target - self.error,
            "p": kp * self.error,
            "i": ki * self.integral,
            "feedforward": self.solved if self.config.feedforward else 0.0,
        }

    def state_dict(self) -> dict:
        names = ("error", "integral", "lost", "value", "solved")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict) -> None:
        self.__dict__.update(state)


# %% Why systematic selection and weights [markdown] tags=["shared"]
# ### Selection: an exact count, and weights that could undo the choice
#
# Tossing a coin for each sample would make the batch count jump about. *Systematic* sampling lays the
# probabilities end to end on a line and takes the sample under every whole number: each is taken with its
# own $p$, none twice, and the count is $\sum p$ to the sample. A sample taken with a small $p$ stands for
# its skipped peers: its loss weighs $w = \min((p/a)^{-\gamma}, 4)$, scaled to mean 1. $\gamma = 1$ makes the
# gradient that of full training, and takes back what choosing gained; $\gamma = 0$, the default, weighs all
# alike: where some classes are rare that was better than ½, elsewhere no difference showed.


# %% Selection and weights tags=["shared"]
def systematic(p: Tensor, phase: float) -> tuple[Tensor, float]:
    """Positions taken with probability p [m] each, none twice; and the phase at which the next call goes on.

    Systematic sampling (Madow 1949). Over several calls the total count is Σp, rounded down or up.
    """
    # numpy: torch would wake every core to round a few thousand numbers, which takes milliseconds. Sums of
    # these fractions are exact in float64, so that a rounding error never takes one too many.
    grid = 2.0**32
    edges = phase + np.cumsum(np.round(p.double().numpy() * grid) / grid)
    whole = np.floor(edges)
    taken = np.flatnonzero(whole > np.concatenate([[0.0], whole[:-1]]))
    return torch.from_numpy(taken), float(edges[-1]) % 1.0 if len(p) else phase


def importance_weights(p: Tensor, gamma: float, target: float) -> Tensor:
    """w = min((p/a)^-γ, 4) of the activated samples, scaled to mean 1. p [k], returns float32 [k]."""
    weights = (p.float().clamp(min=1e-6) / target).pow(-gamma).clamp(max=4.0)
    return weights / weights.mean() if len(weights) else weights


# %% Why a gate before the loader [markdown] tags=["shared"]
# ### Gates that stand before the loader
#
# A gate has four methods, and the trainer takes any object that has them, yours too:
#
#     select(candidates, target, generator) -> (indices, weights)
#     observe(indices, losses)               # every selected sample comes back; NaN says it was lost
#     state_dict(), load_state_dict(state)
#
# `candidates` is a chunk of sample indices in random order. A skipped sample is never decoded, moved or
# forwarded. In phases that train on everything the gate is not asked, only told.
#
# Rare classes are hard, so a gate that looks for what is hard leans to them, but not far. `balance=True` is
# for classes that differ in size and matter alike: ranks are taken within a class, and the same number of
# activations is dealt out so that every class gets as many, as far as it has them. Within a class is within
# its part of the chunk: with so many classes that few are of one, choosing among them comes close to chance.


# %% Gates before the loader tags=["shared"]
def deal_out(shares: Tensor, count: float) -> Tensor:
    """The multiple of shares [m] (above 0), cut off at 1 each, whose sum is `count`, float32 [m]."""
    largest_first = shares.double().sort(descending=True).values
    rest = largest_first.flip(0).cumsum(0).flip(0)  # the sum of a share and all smaller ones
    factors = (count - torch.arange(len(shares))) / rest  # if so many of the largest are cut off
    enough = (factors * largest_first <= 1).nonzero()
    return (shares * factors[enough[0]]).clamp(max=1).float() if len(enough) else torch.ones(len(shares))


class RememberedGate:
    """Activates by remembered significance; costs a·n training steps an epoch and nothing else."""

    needs_views = False

    def __init__(self, config: ASTConfig, n: int, labels: Tensor | None = None):
        """labels: int64 [n] on the CPU, which `config.balance` needs. Raises BadInput without them."""
        if config.balance and (labels is None or labels.shape != (n,) or int(labels.min()) < 0):
            found = "none" if labels is None else f"{list(labels.shape)}, from {labels.min()} up"
            raise BadInput(
                f"balance: labels that can be had without loading an image: {found}; expected {n} of 0 or "
                "more; give arrays or a dataset with such `targets`, or leave it off"
            )
        self.config = config
        self.labels = labels
        if config.balance:
            self.sizes = labels.bincount().float()
            even = len(labels) / int((self.sizes > 0).sum())
            self.pace = (even / self.sizes).clamp(max=1)  # a large class's turn comes round more slowly
        self.memory = Memory(n, config.guard)
        self.controller = Controller(config)
        self.clock = 0.0  # epochs of candidates seen
        self.phase = 0.5

    def select(self, candidates: Tensor, target: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Activates target·m of the m candidates (int64 [m]), rounded; weights have mean 1."""
        m = len(candidates)
        labels = self.labels[candidates] if self.config.balance else None
        u = self.memory.rank(candidates, labels)
        overdue = self.overdue(candidates, target)
        waiting = u[~overdue]
        temperature = self.config.temperature
        solved = solve_threshold(waiting, target * m - (m - len(waiting)), target, temperature)
        slope = threshold_slope(waiting, solved, target, temperature)
        threshold = self.controller.threshold(solved, slope)
        p = activation_probability(u, threshold, target, temperature)
        if labels is not None:
            p[~overdue] = deal_out((p / self.sizes[labels])[~overdue], float(p[~overdue].sum()))
        taken, self.phase = systematic(torch.where(overdue, 1.0, p), self.phase)
        self.controller.update(len(taken), m, target, exact=self.config.feedforward)
        self.clock += m / len(self.memory.visited)
        return candidates[taken], importance_weights(p[taken], self.config.weight_gamma, target)

    def overdue(self, candidates: Tensor, target: float) -> Tensor:
        """Mask of the samples that waited 2/a epochs or more: the oldest, at most half of what is activated.

        Without that cap, a raised target would make most samples overdue at once. With `balance` a class has
        as much longer as it is larger than the average one.
        """
        wait = self.clock - self.memory.visited[candidates]
        if self.config.balance:
            wait = wait * self.pace[self.labels[candidates]]
        oldest = wait.topk(int(0.5 * target * len(candidates))).indices
        mask = torch.zeros(len(candidates), dtype=torch.bool)
        mask[oldest] = wait[oldest] >= 2 / target
        return mask

    def observe(self, indices: Tensor, losses: Tensor) -> None:
        """Remembers the significance [k] of the samples `indices` [k]; NaN counts as lost."""
        self.memory.observe(indices, losses, self.clock)
        self.controller.lost += int((~losses.isfinite()).sum())

    @property
    def threshold(self) -> float:
        return self.controller.value

    @property
    def scores(self) -> Tensor:
        """Remembered significances, finite, [at most 32,768]: a sample of the memory for pictures."""
        stride = max(1, len(self.memory.significance) // Memory.REFERENCE)
        some = self.memory.significance[::stride]
        return some[some.isfinite()]

    def state_dict(self) -> dict:
        return {
            "significance": self.memory.significance,
            "visited": self.memory.visited,
            "stuck": self.memory.stuck,
            "controller": self.controller.state_dict(),
            "clock": self.clock,
            "phase": self.phase,
        }

    def load_state_dict(self, state: dict) -> None:
        for name in ("significance", "visited", "stuck"):
            setattr(self.memory, name, state[name].clone())
        self.controller.load_state_dict(state["controller"])
        self.clock, self.phase = state["clock"], state["phase"]


class RandomGate:
    """Activates by chance, exactly target·m of every m candidates in the long run: what AST must beat.

    It serves `random` (AST's phases, and the count that AST activated in every epoch) and `rs2` (a fresh
    random share each epoch without phases; Okanovic et al. 2024, Repeated Sampling of Random Subsets).
    """

    needs_views = False
    controller = None
    threshold = None

    def __init__(self):
        self.owed = 0.0  # samples, the fraction carried to the next chunk

    def select(self, candidates: Tensor, target: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A random subset of the candidates (int64 [m]), with weights 1."""
        self.owed += target * len(candidates)
        count = min(len(candidates), math.floor(self.owed + 0.5))
        self.owed -= count
        taken = torch.randperm(len(candidates), generator=generator)[:count]
        return candidates[taken], torch.ones(count)

    def observe(self, indices: Tensor, losses: Tensor) -> None:
        """Chance remembers nothing."""

    def state_dict(self) -> dict:
        return {"owed": self.owed}

    def load_state_dict(self, state: dict) -> None:
        self.owed = state["owed"]


# %% Why a gate after the loader [markdown] tags=["shared"]
# ### A gate that stands after the loader
#
# What is hard may be the *view*: this crop, this flip. The `live` gate sees the augmented candidates,
# scores them with a forward pass in eval mode, and trains on those above $\theta$. That pass is a third of
# a training step, so live selection at rate $a$ costs $\tfrac13 + a$, and the ledger charges it: below $a
# \approx \tfrac23$ it still saves, but never as much as not looking at all. A gate with `needs_views =
# True` receives `Views` in place of indices. Weights are 1, since here the hard views are the point.
#
# `proxy` leaves the scoring to a small network that is trained beside, on the hardest quarter of all views
# (as airbench96_faster does; Jordan 2024). Its work is charged too: much beside a tiny model, little beside
# a large one. A gate that has a method `watch(views)` is also shown what full phases train on.


# %% Gates after the loader tags=["shared"]
@dataclass
class Views:
    """Augmented candidates: indices int64 [m] on the CPU; images [m, ...], labels int64 [m] on the device."""

    indices: Tensor
    images: Tensor
    labels: Tensor


class LiveGate:
    """Activates the views whose own significance exceeds θ; costs a scoring pass a candidate, plus a."""

    needs_views = True
    RECENT = 4096  # scores that a rank is measured against

    def __init__(self, config: ASTConfig, score: Callable[[Tensor, Tensor], Tensor]):
        """`score` gives the significance [m] of images [m, ...] with labels [m], on their device."""
        self.config = config
        self.score = score
        self.controller = Controller(config)
        self.recent = torch.empty(0)
        self.owed = 0.0

    def select(self, candidates: Views, target: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Activates by threshold, or the hardest share (`live_rule="topk"`); 2 random ones if none passes."""
        scores = self.score(candidates.images, candidates.labels).cpu()  # the one sync per candidate batch
        finite = scores.isfinite()
        self.recent = torch.cat([self.recent, scores[finite]])[-self.RECENT :]
        if self.config.live_rule == "topk":
            taken = self.hardest(scores, finite, target)
        else:
            taken = (
                (finite & (self.rank(scores) > self.controller.threshold(1 - target, -1.0)))
                .nonzero()
                .flatten()
            )
        if not len(taken):
            taken = torch.randperm(len(scores), generator=generator)[:2]
        self.controller.update(len(taken), len(scores), target, exact=False)
        return candidates.indices[taken], torch.ones(len(taken))

    def hardest(self, scores: Tensor, finite: Tensor, target: float) -> Tensor:
        self.owed += target * len(scores)
        count = min(int(finite.sum()), math.floor(self.owed + 0.5))
        self.owed = min(self.owed - count, 1.0)
        return torch.where(finite, scores, -math.inf).topk(count).indices

    def rank(self, scores: Tensor) -> Tensor:
        order = self.recent.sort().values
        return torch.searchsorted(order, scores).float() / max(1, len(order))

    def observe(self, indices: Tensor, losses: Tensor) -> None:
        """Only counts the lost: the next scoring pass sees everything afresh."""
        self.controller.lost += int((~losses.isfinite()).sum())

    @property
    def threshold(self) -> float | None:
        return None if self.config.live_rule == "topk" else self.controller.value

    @property
    def scores(self) -> Tensor:
        """The significances of the newest candidates [at most 4096]."""
        return self.recent

    def state_dict(self) -> dict:
        return {"recent": self.recent, "owed": self.owed, "controller": self.controller.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.recent, self.owed = state["recent"].clone(), state["owed"]
        self.controller.load_state_dict(state["controller"])


class ProxyGate(LiveGate):
    """Activates the hardest share of the views, as a small network trained beside judges them.

    The proxy sees every candidate, and learns by AdamW from the hardest quarter of each batch, also in the
    phases before the anneal that train on everything. Its work is charged to scoring.
    """

    LEARNS = 0.25  # share of the views that the proxy learns from
    SIDE = 64  # pixels; larger images are shrunk to this for the proxy

    def __init__(
        self,
        config: ASTConfig,
        make: Callable[[Tensor, Tensor, Sequence[int]], nn.Module],
        charge: Callable[[nn.Module, str, Tensor], None],
        autocast: Callable[[], torch.autocast],
    ):
        """`make(images, labels, shape)` gives a network for inputs of that shape, with as many outputs as the
        model has for such images; `charge(network, mode, images)` is told of its work."""
        super().__init__(replace(config, live_rule="topk"), self._judge)
        self.make, self.charge, self.autocast = make, charge, autocast
        self.network: nn.Module | None = None
        self.state: dict | None = None  # loaded, for the network that the first views will make

    def watch(self, views: Views) -> None:
        """Learns from views [m] that nobody selects from."""
        self._judge(views.images, views.labels)

    def _judge(self, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy [m] of views by the proxy, which then learns from the hardest of them."""
        small = self._small(images)
        if self.network is None:
            self._begin(self.make(images, labels, small.shape[1:]))
        broken = ~small.flatten(1).isfinite().all(1)  # one would spoil the batch norm of all
        images = torch.where(broken.view(-1, *[1] * (small.ndim - 1)), 0, small)
        self.charge(self.network, "scoring", images)
        with torch.no_grad(), self.autocast():
            logits = self.network(images)
        losses = F.cross_entropy(logits.float(), labels, reduction="none").masked_fill(broken, math.nan)
        hardest = torch.nan_to_num(losses, nan=-1.0).topk(math.ceil(self.LEARNS * len(labels))).indices
        if len(hardest) > 1:  # batch norm cannot learn from one
            self._learn(images[hardest], labels[hardest])
        return losses

    def _learn(self, images: Tensor, labels: Tensor) -> None:
        self.charge(self.network, "training", images)
        with self.autocast():
            logits = self.network(images)
        self.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(logits.float(), labels).backward()
        guarded_step(self.network, self.optimizer, torch.amp.GradScaler(enabled=False), torch.empty(0))

    def _begin(self, network: nn.Module) -> None:
        self.network = network
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=2e-3, fused=True)
        if self.state:
            self.network.load_state_dict(self.state["network"])
            self.optimizer.load_state_dict(self.state["optimizer"])
            self.state = None

    def _small(self, images: Tensor) -> Tensor:
        side = max(images.shape[-2:])
        if images.ndim != 4 or side <= self.SIDE:
            return images
        size = [max(1, round(length * self.SIDE / side)) for length in images.shape[-2:]]
        return F.interpolate(images, size=size, mode="bilinear", antialias=True)

    def state_dict(self) -> dict:
        state = super().state_dict() | {"proxy": self.state}
        if self.network is not None:
            state["proxy"] = {
                "network": self.network.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            }
        return state

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self.network, self.state = None, state["proxy"]


def proxy_network(shape: Sequence[int], classes: int) -> nn.Module:
    """For images [C, H, W] three 3x3 convolutions, 16, 32 and 64 wide, the sides halved twice, then the mean;
    for inputs of another shape one hidden layer of 64."""
    if len(shape) != 3:
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 64), nn.ReLU(), nn.Linear(64, classes))
    blocks: list[nn.Module] = []
    for inputs, outputs, stride in ((shape[0], 16, 1), (16, 32, 2), (32, 64, 2)):
        conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        blocks += [conv, nn.BatchNorm2d(outputs, track_running_stats=False), nn.ReLU()]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


# %% Why four phases [markdown] tags=["shared"]
# ### The schedule: when to skip
#
# Four phases of whole epochs. *Warm-up* trains on everything once, so that every sample has a score. *Ramp*
# lowers the rate along a cosine. *Sparse* is where the saving is. *Anneal* returns to everything while the
# learning rate goes to zero, so that the last steps see the true distribution. The learning rate follows
# *progress* in [0, 1], not the step number: each step moves it by (1 − progress) / (steps remaining at the
# current target), so the rate stays continuous and ends at zero whatever happens to the target on the way.


# %% The schedule tags=["shared"]
@dataclass
class Schedule:
    """Phases and target activation rate, epoch by epoch."""

    epochs: int
    warmup: int
    ramp: int
    anneal: int
    rates: list[float] | None = None  # given rates, epoch by epoch: another run's realised ones

    @classmethod
    def of(cls, config: ASTConfig, epochs: int, phases: bool = True) -> "Schedule":
        """The phases of `config`; without `phases` all is sparse. Raises BadInput if they do not fit."""
        if not phases:
            return cls(epochs, 0, 0, 0)
        share = [max(1, int(0.08 * epochs + 0.5)), int(0.2 * epochs + 0.5), int(0.125 * epochs + 0.5)]
        if epochs <= 3:  # too short for all four: drop the ramp, then the anneal
            share[1] = 0
            share[2] = 0 if share[0] + share[2] >= epochs else share[2]
        given = [config.warmup_epochs, config.ramp_epochs, config.anneal_epochs]
        warmup, ramp, anneal = (g if g is not None else s for g, s in zip(given, share, strict=True))
        if warmup + ramp + anneal > epochs:
            raise BadInput(
                f"warm-up {warmup}, ramp {ramp} and anneal {anneal}: expected at most {epochs} epochs "
                "together; shorten them or raise --epochs"
            )
        return cls(epochs, warmup, ramp, anneal)

    def phase(self, epoch: int) -> str:
        """The phase of an epoch counted from 0: warmup, ramp, sparse or anneal."""
        if epoch < self.warmup:
            return "warmup"
        if epoch < self.warmup + self.ramp:
            return "ramp"
        return "anneal" if epoch >= self.epochs - self.anneal else "sparse"

    def rate(self, epoch: int, target: float) -> float:
        """The activation rate aimed at in an epoch, for a target activation `target` in the sparse phase."""
        if self.rates is not None:
            return self.rates[epoch]
        phase = self.phase(epoch)
        if phase == "ramp":
            t = (epoch - self.warmup + 1) / (self.ramp + 1)
            return target + (1 - target) * 0.5 * (1 + math.cos(math.pi * t))
        return target if phase == "sparse" else 1.0


def learning_rate_shape(progress: float) -> float:
    """Share of the peak learning rate: up from 1/5 over the first fifth, then down a line to 0."""
    return 0.2 + 4.0 * progress if progress < 0.2 else (1 - progress) / 0.8


# %% Why a ledger [markdown] tags=["shared"]
# ### The ledger: what was really spent
#
# Three currencies, never called by each other's name. *FLOPs* are counted by PyTorch on a copy of the
# model, once per mode and resolution. *Unit energy* is the model of the original reports: 10.0 for an
# activated sample, 0.1 for a skipped one; it knows nothing of scoring, evaluation or a waiting GPU.
# *Joules* are measured by the hardware, or said to be unavailable and why.


# %% The ledger: FLOPs tags=["shared"]
class FlopCount(FlopCounterMode):
    """PyTorch's FLOP counter, which also lists the operators that it has no formula for."""

    def __init__(self):
        super().__init__(display=False)
        self.uncounted: set[str] = set()

    def _count_flops(self, func_packet, out, args, kwargs):
        if func_packet not in self.flop_registry:
            self.uncounted.add(str(func_packet).removeprefix("aten."))
        return super()._count_flops(func_packet, out, args, kwargs)


def flops_per_sample(
    model: nn.Module, images: Tensor, training: bool, autocast: Callable
) -> tuple[float, list[str]]:
    """FLOPs of one sample (forward, and backward if `training`), and the operators left uncounted.

    images: a float batch [B, ...] of the resolution in question. Neither the model nor any RNG is touched.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    devices = [images.device] if images.is_cuda else []
    exact = nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH)  # the CPU's fused attention has no formula
    with torch.random.fork_rng(devices=devices), exact, FlopCount() as counter:
        torch.backends.mha.set_fastpath_enabled(False)  # the fast path is one operator without a formula
        try:
            twin = copy.deepcopy(model)
            if not training:
                twin.eval()
            with torch.set_grad_enabled(training), autocast():
                logits = twin(images)
            if training:
                logits.float().sum().backward()
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
    return counter.get_total_flops() / len(images), sorted(counter.uncounted)


# %% The ledger: joules tags=["shared"]
class EnergyMeter:
    """Joules since it was made, from the best sensor there is.

    `method` is nvml-counter, nvml-polled, rapl or unavailable; `reason` says why, for the last. A sensor that
    fails later becomes unavailable too, rather than stand still.
    """

    def __init__(self, device: torch.device, powercap: Path = Path("/sys/class/powercap")):
        self.method, self.reason = "unavailable", ""
        self._read: Callable[[], float] = lambda: 0.0
        try:
            if device.type == "cuda":
                self._open_nvml(device.index or 0)
            else:
                self._open_rapl(powercap)
        except Exception as error:  # drivers fail in many ways, and none may stop the training
            self._give_up(error)

    def joules(self) -> float | None:
        """Joules so far; None where there is no sensor."""
        if self.method == "unavailable":
            return None
        try:
            return self._read()
        except Exception as error:
            self._give_up(error)
            return None

    def _give_up(self, error: Exception) -> None:
        self.method, self.reason = "unavailable", f"{type(error).__name__}: {error}".splitlines()[0]

    def _open_nvml(self, index: int) -> None:
        import pynvml  # optional

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(index)
        try:
            start = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)  # mJ
        except pynvml.NVMLError:  # no counter before Volta, such as on P100
            self._poll(lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000)
        else:
            self._read = lambda: (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - start) / 1000
            self.method = "nvml-counter"

    def _poll(self, watts: Callable[[], float], seconds: float = 0.05) -> None:
        total, last = 0.0, (time.monotonic(), watts())

        def sample() -> None:
            nonlocal total, last
            while self.method == "nvml-polled":
                time.sleep(seconds)
                try:
                    now = (time.monotonic(), watts())
                except Exception as error:
                    return self._give_up(error)
                total += (now[0] - last[0]) * 0.5 * (now[1] + last[1])
                last = now

        self._read, self.method = lambda: total, "nvml-polled"
        threading.Thread(target=sample, daemon=True, name="power").start()

    def _open_rapl(self, powercap: Path) -> None:
        packages = sorted(p for p in powercap.glob("intel-rapl:*") if re.fullmatch(r"intel-rapl:\d+", p.name))
        if not packages:
            raise FileNotFoundError(f"no RAPL counter under {powercap} (virtual machines rarely show one)")
        wraps = [int((p / "max_energy_range_uj").read_text()) for p in packages]
        last = [int((p / "energy_uj").read_text()) for p in packages]
        total = 0.0

        def read() -> float:
            nonlocal total
            for i, (package, wrap) in enumerate(zip(packages, wraps, strict=True)):
                now = int((package / "energy_uj").read_text())
                total += ((now - last[i]) % (wrap + 1)) / 1e6
                last[i] = now
            return total

        self._read, self.method = read, "rapl"


@functools.cache
def energy_meter(device: torch.device) -> EnergyMeter:
    """The process's one meter for a device."""
    return EnergyMeter(device)


# %% The ledger: accounts tags=["shared"]
TRAINING_PHASES = ("warmup", "ramp", "sparse", "anneal", "scoring")
PHASES = (*TRAINING_PHASES, "evaluation", "checkpoint")
UNIT_ACTIVATED, UNIT_SKIPPED = 10.0, 0.1  # unit energy a sample, the original reports' model


@dataclass
class Account:
    """What one phase cost."""

    seconds: float = 0.0
    candidates: int = 0
    activated: int = 0
    flops: float = 0.0
    joules: float | None = None

    @property
    def unit_energy(self) -> float:
        return UNIT_ACTIVATED * self.activated + UNIT_SKIPPED * (self.candidates - self.activated)


class Ledger:
    """Seconds and joules go to the phase that is open; samples and FLOPs to the phase named with them."""

    def __init__(self, meter: EnergyMeter):
        self.meter = meter
        self.accounts = {phase: Account() for phase in PHASES}
        self.open: str | None = None
        self.since = (0.0, None)

    def switch(self, phase: str | None) -> str | None:
        """Closes the open phase, opens `phase`, and returns the one closed; None stands for none."""
        now = (time.perf_counter(), self.meter.joules())
        if self.open:
            account = self.accounts[self.open]
            account.seconds += now[0] - self.since[0]
            if now[1] is not None and self.since[1] is not None:
                account.joules = (account.joules or 0.0) + now[1] - self.since[1]
        before, self.open, self.since = self.open, phase, now
        return before

    @contextmanager
    def charge(self, phase: str) -> Iterator[Account]:
        """Charges the block to `phase`, then goes on with the phase that was open before."""
        before = self.switch(phase)
        try:
            yield self.accounts[phase]
        finally:
            self.switch(before)

    def seconds(self, phases: Iterable[str] = PHASES) -> float:
        running = time.perf_counter() - self.since[0] if self.open in phases else 0.0
        return running + sum(self.accounts[phase].seconds for phase in phases)

    def total(self) -> Account:
        parts = self.accounts.values()
        joules = [p.joules for p in parts if p.joules is not None]
        return Account(
            self.seconds(),
            sum(p.candidates for p in parts),
            sum(p.activated for p in parts),
            sum(p.flops for p in parts),
            sum(joules) if joules else None,
        )

    def state_dict(self) -> dict:
        return {phase: asdict(account) for phase, account in self.accounts.items()}

    def load_state_dict(self, state: dict) -> None:
        self.accounts = {phase: Account(**account) for phase, account in state.items()}


# %% Why sources [markdown] tags=["shared"]
# ### Where samples come from
#
# A source turns batches of indices into batches of views, and is asked for activated samples only. Arrays
# live on the training device as uint8 and are augmented there. A `DataLoader` of yours gives up its
# dataset, batch size, workers and collate function; its workers then see only the indices that the gate let
# through.


# %% Where samples come from tags=["shared"]
def as_input(images: Tensor) -> Tensor:
    """A model's float32 input: uint8 [B, H, W, C] becomes [B, C, H, W] in [0, 1]; others stay."""
    if images.dtype != torch.uint8:
        return images.float()
    images = images.float() / 255
    return images.permute(0, 3, 1, 2) if images.ndim == 4 and images.shape[-1] in (1, 3) else images


@runtime_checkable
class Source(Protocol):
    """What the trainer takes samples from: `ArraySource`, `DatasetSource`, or your own."""

    batch_size: int
    generator: torch.Generator  # what views are drawn with; checkpoints hold its state
    moment: tuple[int, int]  # seed and epoch, set before each epoch, for draws that need no state
    unreadable: dict[int, str]  # index of each sample that could not be read, and why
    remedy: str  # what to do where training waits for data

    def __len__(self) -> int: ...

    def stream(self, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each batch of indices (int64 [B], CPU): those that could be read, their views, their labels."""

    def in_order(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Views and labels of all samples, for evaluation."""


class ArraySource:
    """Images and labels held on the training device; `view` makes a batch of images the model's input."""

    def __init__(
        self,
        images: object,
        labels: object,
        device: torch.device,
        batch_size: int,
        view: Callable | None = None,
    ):
        """images [N, ...], labels [N]; `view(images, generator)` makes a batch the model's input."""
        with warnings.catch_warnings():  # memory-mapped arrays are read-only, and we only read
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            self.images = torch.as_tensor(images).to(device)
        self.labels = torch.as_tensor(labels).long().to(device)
        if len(self.images) != len(self.labels):
            raise BadInput(
                f"{len(self.images)} images with {len(self.labels)} labels: expected as many of each"
            )
        self.device, self.batch_size = device, batch_size
        self.view = view or (lambda images, generator: as_input(images))
        self.generator = torch.Generator(device)
        self.unreadable: dict[int, str] = {}
        self.moment = (0, 0)
        self.remedy = "the data lie on the device, so the processor is slow or busy: raise the batch size"

    def __len__(self) -> int:
        return len(self.labels)

    def stream(self, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """As `Source.stream`; all can be read."""
        for indices in batches:
            rows = indices.to(self.device, non_blocking=True)
            yield indices, self.view(self.images[rows], self.generator), self.labels[rows]

    def in_order(self) -> Iterator[tuple[Tensor, Tensor]]:
        """As `Source.in_order`."""
        size = max(self.batch_size, 500)
        for start in range(0, len(self), size):
            images = self.images[start : start + size]
            yield self.view(images, self.generator), self.labels[start : start + size]


def refuse_if_many(unreadable: dict[int, str], count: int) -> None:
    """Raises BadInput where more than 1 % of `count` samples are unreadable."""
    if len(unreadable) > 0.01 * count:
        index, reason = next(iter(unreadable.items()))
        raise BadInput(
            f"{len(unreadable)} of {count} samples: expected at most 1 % unreadable; mend or remove them "
            f"(the first is sample {index}: {reason})"
        )


class Readable(Dataset):
    """A dataset that answers (index, sample), or (index, the error) for a sample that cannot be read."""

    def __init__(self, dataset: object):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, object]:
        try:
            return index, self.dataset[index]
        except OSError as error:  # what PIL and the file system raise for a broken image
            return index, error


class Collate:
    """Splits off the unreadable and hands the rest to the user's collate function."""

    def __init__(self, collate: Callable):
        self.collate = collate

    def __call__(self, items: list[tuple[int, object]]) -> tuple[Tensor, object, dict[int, str]]:
        good = [(index, sample) for index, sample in items if not isinstance(sample, OSError)]
        bad = {index: str(sample) for index, sample in items if isinstance(sample, OSError)}
        batch = self.collate([sample for _, sample in good]) if good else None
        return torch.tensor([index for index, _ in good], dtype=torch.int64), batch, bad


class DatasetSource:
    """A map-style dataset of (image, label), read by a DataLoader with the user's own settings."""

    def __init__(self, loader: DataLoader, device: torch.device):
        self.loader, self.device, self.batch_size = loader, device, loader.batch_size
        self.unreadable: dict[int, str] = {}
        self.generator = torch.Generator()
        self.moment, self.remedy = (0, 0), "give the DataLoader more workers"

    def __len__(self) -> int:
        return len(self.loader.dataset)

    @property
    def labels(self) -> Tensor | None:
        """What the dataset tells without loading images: `targets`, as torchvision's have, or a
        TensorDataset's; None without either, and where a `target_transform` changes them."""
        data = self.loader.dataset
        targets = data.tensors[-1] if isinstance(data, TensorDataset) else getattr(data, "targets", None)
        changed = getattr(data, "target_transform", None) is not None
        values = np.asarray(None if changed else targets)
        return torch.from_numpy(values).long() if values.dtype.kind in "iu" else None

    def stream(self, batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """As `Source.stream`; asks the dataset for these indices and no others."""
        loader = DataLoader(
            Readable(self.loader.dataset),
            batch_sampler=(indices.tolist() for indices in batches),
            collate_fn=Collate(self.loader.collate_fn),
            num_workers=self.loader.num_workers,
            prefetch_factor=self.loader.prefetch_factor,
            pin_memory=self.loader.pin_memory,
            worker_init_fn=self.loader.worker_init_fn,
            timeout=self.loader.timeout,
            generator=self.generator,
        )
        for indices, batch, bad in loader:
            self.unreadable.update(bad)
            refuse_if_many(self.unreadable, len(self))
            images, labels = self.move(batch) if len(indices) else (torch.empty(0), torch.empty(0))
            yield indices, images, labels

    def move(self, batch: object) -> tuple[Tensor, Tensor]:
        if not (isinstance(batch, list | tuple) and len(batch) == 2):
            raise BadInput(
                f"a batch of type {type(batch).__name__}: expected (images, labels) from the dataset"
            )
        images, labels = (torch.as_tensor(part).to(self.device, non_blocking=True) for part in batch)
        return as_input(images), labels.long()

    def in_order(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All samples as the user's own loader gives them, for evaluation. Raises BadInput."""
        try:
            yield from map(self.move, self.loader)
        except OSError as error:
            text = f"a validation sample ({error}): expected readable ones; mend or remove it"
            raise BadInput(text) from error


def as_source(data: object, device: torch.device, batch_size: int, name: str) -> Source:
    """A source for a DataLoader, a map-style dataset, a pair of arrays, or any `Source`.

    Raises BadInput for a loader whose sampler would be lost, and for what is none of these.
    """
    if isinstance(data, Source):
        return data
    if isinstance(data, tuple | list) and len(data) == 2 and all(hasattr(part, "shape") for part in data):
        return ArraySource(*data, device, batch_size)
    if not isinstance(data, DataLoader):
        if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
            raise BadInput(
                f"{name} of type {type(data).__name__}: expected a DataLoader, a dataset or two arrays"
            )
        data = DataLoader(data, batch_size=batch_size)
    if isinstance(data.dataset, IterableDataset):
        raise BadInput(
            f"{name} over an IterableDataset: expected a map-style dataset, so that samples can be skipped"
        )
    plain = isinstance(data.sampler, SequentialSampler) or (
        isinstance(data.sampler, RandomSampler) and not data.sampler.replacement
    )
    if data.batch_size is None or not plain or len(data.sampler) != len(data.dataset):
        raise BadInput(
            f"{name} with {type(data.sampler).__name__} and batch size {data.batch_size}: expected a plain "
            "or shuffling DataLoader with a batch size, since the gate does the sampling; leave it out"
        )
    return DatasetSource(data, device)


# %% Why a plan [markdown] tags=["shared"]
# ### An epoch's plan
#
# An epoch offers every sample once, in random order, chunk by chunk. The gate decides on a chunk only when
# its batches are asked for, so it always knows the newest scores, and a dragged slider takes hold at the
# next chunk, not the next epoch. What it activates is packed into full batches; a remainder waits for the
# next chunk, and at the end of the epoch is shared between the last two.


# %% An epoch's plan tags=["shared"]
class Plan:
    """The batches of one epoch, chosen lazily; its state is all that a resumed run needs to go on."""

    def __init__(
        self,
        order: Tensor,
        batch_size: int,
        chunk: Callable[[], int],
        select: Callable[[Tensor], tuple[Tensor, Tensor]],
    ):
        """`chunk()`: how many candidates to offer next; `select(candidates)` returns (indices, weights)."""
        self.order, self.batch_size, self.chunk, self.select = order, batch_size, chunk, select
        self.position = 0  # candidates offered
        self.indices = torch.empty(0, dtype=torch.int64)  # activated, not yet in a batch
        self.weights = torch.empty(0)
        self.on_the_way: deque[tuple[Tensor, Tensor]] = deque()  # asked of the source, not yet received
        self.views: list[tuple[Tensor, ...]] = []  # activated after the loader, not yet in a batch

    @property
    def offered_all(self) -> bool:
        return self.position >= len(self.order)

    def batches(self) -> Iterator[Tensor]:
        """Indices of one batch after the other; a resumed plan first repeats what was on the way."""
        for indices, _ in list(self.on_the_way):
            yield indices
        while True:
            while len(self.indices) < 2 * self.batch_size and not self.offered_all:
                self._offer()
            if not len(self.indices):
                return
            take = self._take(len(self.indices))
            batch = (self.indices[:take], self.weights[:take])
            self.indices, self.weights = self.indices[take:], self.weights[take:]
            self.on_the_way.append(batch)
            yield batch[0]

    def _offer(self) -> None:
        candidates = self.order[self.position : self.position + max(1, self.chunk())].long()
        indices, weights = self.select(candidates)
        self.position += len(candidates)
        self.indices, self.weights = torch.cat([self.indices, indices]), torch.cat([self.weights, weights])

    def _take(self, held: int) -> int:
        # The last two batches share what is left: the gradient of four samples left over is mostly noise,
        # and would take a step of the whole learning rate. A lone last sample joins the batch before it,
        # since batch norm cannot train on one.
        if held >= 2 * self.batch_size:
            return self.batch_size
        return held if held <= self.batch_size + 1 else math.ceil(held / 2)

    def received(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of the samples that arrived, and the indices of those that did not."""
        asked, weights = self.on_the_way.popleft()
        if len(asked) == len(indices):
            return weights, asked[:0]
        arrived = torch.isin(asked, indices)
        return weights[arrived], asked[~arrived]

    def pack(self) -> Iterator[tuple[Tensor, ...]]:
        """Full batches out of `views`; at the end of the epoch, the rest."""
        done = self.offered_all and not self.on_the_way and not len(self.indices)
        while (held := sum(len(part[0]) for part in self.views)) >= (1 if done else 2 * self.batch_size):
            waiting = tuple(torch.cat(parts) for parts in zip(*self.views, strict=True))
            take = self._take(held)
            rest = [
                tuple(part[take:].clone() for part in waiting)
            ]  # the whole would be held, and saved, with it
            self.views = rest if held > take else []
            yield tuple(part[:take] for part in waiting)

    def batches_left(self, rate: float, through: float) -> float:
        """Estimate of the batches still to come, the one in hand not counted.

        rate: share of the candidates not yet offered that will be trained; through: of those already chosen
        (1, or `rate` where the gate stands after the loader).
        """
        chosen = sum(len(batch[0]) for batch in self.on_the_way) + len(self.indices)
        packed = sum(len(part[0]) for part in self.views)
        return (packed + through * chosen + rate * (len(self.order) - self.position)) / self.batch_size

    def state_dict(self) -> dict:
        names = ("order", "position", "indices", "weights", "views")
        return {name: getattr(self, name) for name in names} | {"on_the_way": list(self.on_the_way)}

    def load_state_dict(self, state: dict) -> None:
        self.__dict__.update(state | {"on_the_way": deque(state["on_the_way"])})


# %% Why half precision, and a guard [markdown] tags=["shared"]
# ### Precision and the step
#
# Half the bits are faster where the hardware computes with them, and slower or pointless elsewhere. The
# choice is made from what the device reports, never from timing, so that runs repeat.
#
# One loss that is not finite would poison every weight through the optimiser. Masking the loss is not
# enough: the backward pass multiplies zero by infinity. So the step looks at the gradients' norm, and where
# that is not finite, weights and batch-norm statistics keep their old values. All of it stays on the
# device; nobody waits.


# %% Precision and the step tags=["shared"]
def pick_device(name: str) -> torch.device:
    """The device for auto, cpu or cuda. Raises BadInput if there is none, or torch has no code for it."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise BadInput(
            f"--device {name}: expected a CUDA GPU that torch can use, and there is none; try --device cpu"
        )
    device = torch.device("cuda", torch.cuda.current_device()) if name == "auto" else torch.device(name)
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise BadInput(
            f"--device {name}: expected an index below {torch.cuda.device_count()}, the number of GPUs"
        )
    capability = torch.cuda.get_device_capability(device)
    if not has_code_for(capability, torch.cuda.get_arch_list()):
        raise BadInput(
            f"{torch.cuda.get_device_name(device)} (sm_{capability[0]}{capability[1]}): expected one of "
            f"{', '.join(torch.cuda.get_arch_list())}, for which torch {torch.__version__} was built; choose "
            "a T4, install a torch built for it, or run with --device cpu"
        )
    return device


def has_code_for(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether a GPU can run code built for `architectures`: sm_XY of its generation, or older compute_XY."""
    for name in architectures:
        parts = re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name)
        if not parts:  # another maker's names, which we cannot judge
            return True
        built = (int(parts[2]), int(parts[3]))
        if built <= capability and (parts[1] == "compute" or built[0] == capability[0]):
            return True
    return False


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor reports bf16 arithmetic (avx512_bf16 or amx_bf16)."""
    return cpuinfo.exists() and re.search(r"\b(avx512_bf16|amx_bf16)\b", cpuinfo.read_text()) is not None


def pick_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The autocast type for `--amp` on a device; None for plain float32."""
    if amp in ("fp16", "bf16"):
        if amp == "fp16" and device.type == "cpu":
            raise BadInput("--amp fp16: expected bf16, off or auto on a CPU, whose gradients fp16 would lose")
        return torch.float16 if amp == "fp16" else torch.bfloat16
    if amp == "off":
        return None
    if device.type == "cpu":
        return torch.bfloat16 if cpu_has_bf16() else None
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16 if torch.cuda.get_device_capability(device) >= (7, 0) else None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; then every module's own flag is back (frozen batch norm stays frozen)."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag


def guarded_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    before: Tensor,
    clip_norm: float = 0.0,
) -> Tensor:
    """Steps, or leaves no trace where the gradients are not finite; returns which, a bool on the device.

    before: the floating-point buffers, `joined`, as before the forward pass. clip_norm: gradients of a larger
    norm are scaled down to it; 0 leaves them. An optimizer that is not fused costs a copy of the weights, and
    one sync a step on a GPU: for fp16 GradScaler reads its own flag, and Adam counts steps on the CPU.
    """
    weights = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    scaler.unscale_(optimizer)
    norm = nn.utils.get_total_norm([p.grad for p in weights])
    ok = norm.isfinite()
    if clip_norm:
        nn.utils.clip_grads_with_norm_(weights, clip_norm, norm)
    if getattr(optimizer, "_step_supports_amp_scaling", False):  # a fused one skips by itself, on the device
        begin_at_zero(optimizer)
        optimizer.grad_scale, optimizer.found_inf = None, (~ok).float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    else:
        step_or_undo(optimizer, scaler, weights, ok)
    scaler.update()
    if buffers := float_buffers(model):
        put_back(buffers, torch.where(ok.to(before.device), joined(buffers), before))
    return ok


def begin_at_zero(optimizer: torch.optim.Optimizer) -> None:
    """Momenta where there are none yet: a skipped first step would leave them as memory happened to be."""
    for group in optimizer.param_groups:
        for weight in group["params"] if group.get("momentum") else ():
            if weight.grad is not None and "momentum_buffer" not in optimizer.state[weight]:
                optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)


def step_or_undo(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, weights: list[Tensor], ok: Tensor
) -> None:
    """Steps, and where `ok` is false puts back every weight and moment, which takes a copy of them."""
    held = [(p, p.detach().clone()) for p in weights]
    held += [(value, value.clone()) for p in weights for value in moments(optimizer, p)]
    known = {id(value) for value, _ in held}
    scaler.step(optimizer)
    with torch.no_grad():
        fresh = [
            (v, torch.zeros_like(v)) for p in weights for v in moments(optimizer, p) if id(v) not in known
        ]
        for value, old in [*held, *fresh]:
            value.copy_(torch.where(ok.to(value.device), value, old))


def out_of_memory(error: RuntimeError) -> bool:
    """Whether the GPU, or the CPU's allocator, had too little memory left."""
    words = ("DefaultCPUAllocator", "ALLOC_FAILED")  # the second from cuBLAS and cuDNN
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def moments(optimizer: torch.optim.Optimizer, weight: Tensor) -> list[Tensor]:
    return [value for value in optimizer.state.get(weight, {}).values() if isinstance(value, Tensor)]


def float_buffers(model: nn.Module) -> list[Tensor]:
    return [b for b in model.buffers() if b.is_floating_point()]


def joined(values: list[Tensor]) -> Tensor:
    """A flat copy of all values: one kernel, since a fast GPU waits for launches more than for bytes."""
    return torch.cat([value.flatten() for value in values]) if values else torch.empty(0)


@torch.no_grad()
def put_back(values: list[Tensor], copy: Tensor) -> None:
    """Gives values what `joined` made of them."""
    parts = copy.split([value.numel() for value in values])
    torch._foreach_copy_(values, [part.view_as(v) for part, v in zip(parts, values, strict=True)])


# %% Why a trainer that prints nothing [markdown] tags=["shared"]
# ### The trainer
#
# Data flows one way: plan → source → step → memory → ledger → listeners. The trainer prints nothing: it
# emits events, and the table, the progress bar and the files are listeners. A person's wishes arrive
# through `Controls` and take hold at the next chunk.


# %% The trainer tags=["shared"]
class Controls:
    """What may change while it trains. Any thread calls it; the trainer applies a value at the next chunk, a
    gate at the next epoch, and pauses or stops after the step in hand.

    `stop`, once it names a reason, ends the run cleanly.
    """

    def __init__(self):
        self.values = {
            "target_activation": None,
            "learning_rate_factor": 1.0,
            "gate": None,
        }  # None: the run's
        self.asked: deque[tuple[str, object, int]] = deque()  # control, value, candidates when asked
        self.candidates = 0  # offered so far, as the trainer counts them
        self.deadline = math.inf  # on time.monotonic()'s clock
        self.paused = False
        self.stop: str | None = None

    def set(self, control: str, value: float | str) -> None:
        """Asks for a target_activation (fraction), learning_rate_factor or gate. May raise BadInput."""
        if control not in self.values:
            raise BadInput(f"control {control}: expected one of {', '.join(self.values)}")
        rules = {
            **RULES,
            "learning_rate_factor": (real(lambda v: v > 0), "a factor above 0; 1 changes nothing"),
        }
        check(control, value, control, rules | {"gate": one_of((*LEARNED, "random"))})
        self.asked.append((control, value if control == "gate" else float(value), self.candidates))

    def pause(self, paused: bool) -> None:
        """Pauses after the step in hand, or goes on."""
        self.paused = paused
        self.asked.append(("paused", paused, self.candidates))

    def ask_stop(self, reason: str) -> None:
        """A person's wish to save and stop, logged as such; `reason` goes into the summary."""
        self.asked.append(("stop", reason, self.candidates))
        self.stop = reason

    def stopping(self) -> bool:
        if self.stop is None and time.monotonic() > self.deadline:
            self.stop = "time limit"
        return self.stop is not None


PATIENCE = 20  # percent of an epoch that may be spent waiting for data before the trainer says so


@dataclass
class Epoch:
    """What is being counted of the epoch in hand."""

    plan: Plan
    started: float  # training seconds on the ledger when it began
    scored: float  # scoring seconds then, which are no waiting for data
    loss: float = 0.0  # sum over the trained samples
    trained: int = 0  # samples with a finite loss
    activated: int = 0  # samples that went through a step
    candidates: int = 0  # offered
    decided: int = 0  # of these, how many the gate has decided on
    chosen: int = 0  # of these, how many it lets through
    spoiled: int = 0  # steps not taken
    waited: float = 0.0  # seconds in which the step waited for data


class AdaptiveSparseTrainer:
    """Trains any classifier on the samples that its gate activates.

        trainer = AdaptiveSparseTrainer(model, train_loader, val_loader, ASTConfig(target_activation=0.4))
        results = trainer.train(epochs=100, warmup_epochs=10)

    model: [B, ...] images to [B, C] logits. train_loader, val_loader: a DataLoader, a map-style dataset of
    (image, label), or two arrays. config: an ASTConfig or a dict of its fields. optimizer: AdamW if None; its
    learning rates are the peaks of the schedule, and a parameter group with a key `first_epoch` stays frozen
    before that epoch, counted from 0. criterion: per-sample losses [B]; cross-entropy if None.
    gate: a gate object in place of the one that `config.gate` names. listeners: called with (event, data); a
    table if None.

    Raises BadInput, in one sentence, for anything a person can mend.
    """

    def __init__(
        self,
        model: nn.Module,
        train_loader: object,
        val_loader: object,
        config: ASTConfig | dict | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        gate: object | None = None,
        policy: str | None = None,
        listeners: Iterable[Callable[[str, dict], None]] | None = None,
        controls: Controls | None = None,
        rates: list[float] | None = None,
        seed: int = 0,
        save: Callable[[], None] | None = None,
        save_seconds: float = math.inf,
    ):
        """policy: the name in the records. rates: activation rates to repeat, epoch by epoch. save: called
        every `save_seconds`, and when a run stops, where `state_dict` is all that is needed to go on."""
        self.config = config = ASTConfig.of(config)
        self.device = pick_device(config.device)
        self.dtype = pick_dtype(config.amp, self.device)
        self.model = model.to(self.device)
        self.train_source = as_source(train_loader, self.device, config.batch_size or 64, "train_loader")
        self.val_source = as_source(val_loader, self.device, config.batch_size or 64, "val_loader")
        if not len(self.train_source) or not len(self.val_source):
            raise BadInput("0 samples: expected at least one to train on and one to validate on")
        self.optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=config.lr or 1e-3)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.criterion = criterion or nn.CrossEntropyLoss(reduction="none")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)
        self.gate_name = config.gate if gate is None else "given"
        self.gates = {self.gate_name: gate or self._make_gate(config.gate)}  # all that served so far
        self.learned = gate is not None or config.gate in LEARNED
        self.policy = policy or ("ast" if self.learned else config.gate)
        self.listeners = [print_table()] if listeners is None else list(listeners)
        self.controls = controls or Controls()
        self.rates, self.seed = rates, seed
        self.save, self.save_seconds, self.saved_at = save, save_seconds, time.monotonic()
        self.taken_up = False  # a loaded state is what the next `train` goes on with
        self.average = copy.deepcopy(self.model).requires_grad_(False) if config.ema else None

    def _make_gate(self, name: str) -> object:
        if name == "remembered":
            labels = getattr(self.train_source, "labels", None) if self.config.balance else None
            labels = None if labels is None else torch.as_tensor(labels).cpu()
            return RememberedGate(self.config, len(self.train_source), labels)
        if name == "proxy":
            return ProxyGate(self.config, self._make_proxy, self._charge_proxy, self._proxy_precision)
        return LiveGate(self.config, self.score) if name == "live" else RandomGate()

    def _make_proxy(self, images: Tensor, labels: Tensor, shape: Sequence[int]) -> nn.Module:
        """A small network for inputs of `shape`, with as many outputs as the model gives for images."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            with evaluating(self.model), self.autocast():
                logits = self.model(images[:2])
            refuse_outputs(logits, len(labels[:2]), labels)
            torch.manual_seed(self.seed)
            return proxy_network(shape, logits.shape[1]).to(self.device)

    def _proxy_precision(self) -> torch.autocast:
        """bf16 where the run has it; fp16 would want a scaler, and the proxy is small."""
        bf16 = self.dtype is torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)

    def _charge_proxy(self, network: nn.Module, mode: str, images: Tensor) -> None:
        """Charges to scoring what the proxy does with images [B, ...]."""
        name = f"proxy {mode}"
        if name not in self.flops:
            self._count_flops(name, images[:2], network)
        self.ledger.accounts["scoring"].flops += len(images) * self.flops[name]

    @property
    def gate(self) -> object:
        """The gate that selects now."""
        return self.gates[self.gate_name]

    @property
    def after_loader(self) -> bool:
        return getattr(self.gate, "needs_views", False)

    def autocast(self) -> torch.autocast:
        """The run's mixed precision, as a context."""
        return torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    # --- a run ---

    def train(self, epochs: int | None = None, warmup_epochs: int | None = None) -> dict:
        """Trains to the end, or until `controls` stops it, and returns the results; again trains further.

        Keys: final_accuracy and best_accuracy (percent), activation_rate (fraction), energy_savings (percent,
        unit model), speedup with speedup_method, train_seconds, total_seconds, flops, joules with
        joules_method, phases, and epochs, the rows of metrics.jsonl.
        """
        if not self.taken_up:
            self._begin(epochs, warmup_epochs)
        self.taken_up = False
        self.emit(
            "start",
            policy=self.policy,
            seed=self.seed,
            epochs=self.schedule.epochs,
            n=len(self.train_source),
            rows=list(self.rows),
            changes=self.changes,
            begun=(self.epoch.decided, self.epoch.chosen) if self.epoch else (0, 0),
        )
        while len(self.rows) < self.schedule.epochs and not self.controls.stopping():
            self._train_epoch()
            if not self.unfinished:
                self._finish_epoch()
        self._apply_controls()  # what was asked after the last chunk: a stop, above all
        if self.save and self.controls.stop and len(self.rows) < self.schedule.epochs:
            self._save()
        self.ledger.switch(None)
        results = self.results()
        self.emit("end", **results)
        return results

    def _begin(self, epochs: int | None, warmup_epochs: int | None) -> None:
        config = self.config
        if warmup_epochs is not None:
            config = replace(config, warmup_epochs=warmup_epochs)
        epochs = epochs if epochs is not None else config.epochs or 10
        check("epochs", epochs, "epochs")
        full = config.gate == "full" and self.rates is None and isinstance(self.gate, RandomGate)
        self.schedule = Schedule.of(config, epochs, phases=config.gate != "rs2")
        self.schedule.rates = [1.0] * epochs if full else self.rates
        self.generator = torch.Generator().manual_seed(self.seed)
        self.train_source.generator.manual_seed(self.seed)
        self.ledger = Ledger(energy_meter(self.device))
        self.alive = torch.ones(len(self.train_source), dtype=torch.bool)  # not found unreadable
        self.times_activated = torch.zeros(len(self.train_source), dtype=torch.int16)  # in gated epochs
        self.rows: list[dict] = []
        self.changes: list[tuple[float, float, str]] = []  # by hand: epochs, seconds, what
        self.epoch: Epoch | None = None
        self.unfinished = False
        self.unread: list[tuple[Tensor, Tensor, Tensor]] = []  # indices; scores and sums, still on the device
        self.progress = 0.0
        self.frozen: int | None = None  # parameters that wait for their `first_epoch`
        self.stilled: list[nn.Module] = []  # put into eval mode until then
        self.at_once: dict[str, int] = {}  # samples a pass, by mode, once memory has run out
        self.advised = False
        self.flops: dict[str, float] = {}
        self.uncounted: list[str] = []
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        if not self.model.training:
            self.model.train()
        idle = dict.fromkeys(
            ("initial_threshold", "adapt_kp", "adapt_ki"), "acts with feedforward=False only"
        )
        idle = idle if config.feedforward else {}
        if config.gate == "proxy":
            idle |= dict.fromkeys(("significance", "score_scale", "live_rule"), "acts with other gates only")
        if config.gate in ("live", "proxy"):
            idle["balance"] = "acts with the gate remembered only"
        for name, when in idle.items():
            if getattr(config, name) != getattr(ASTConfig, name):
                self.emit("notice", text=f"{name} {when}")

    def emit(self, event: str, **data: object) -> None:
        for listener in self.listeners:
            listener(event, data)

    # --- an epoch ---

    def _train_epoch(self) -> None:
        self.ledger.switch(self.schedule.phase(len(self.rows)))
        self.train_source.moment = self.seed, len(self.rows)
        self._freeze(len(self.rows))
        if self.epoch is None:
            self._apply_controls()
            self._change_gate()
            kept = self.alive.nonzero().flatten()
            order = kept[torch.randperm(len(kept), generator=self.generator)].to(torch.int32)
            started, scored = self.ledger.seconds(TRAINING_PHASES), self.ledger.seconds(["scoring"])
            self.epoch = Epoch(self._plan(order), started, scored)
        self.unfinished = True
        waiting = time.perf_counter()
        for batch in self._batches(self.epoch.plan):
            self.epoch.waited += time.perf_counter() - waiting
            self._step(*batch)
            if self.controls.paused:
                self._pause()
            if self.controls.stopping():
                return
            if self.save and time.monotonic() - self.saved_at >= self.save_seconds:
                self._save()
            waiting = time.perf_counter()
        self.unfinished = False

    def _freeze(self, epoch: int) -> None:
        """Freezes the groups whose `first_epoch` is still to come, thaws the others; norms follow suit."""
        waiting = set()
        for group in self.optimizer.param_groups:
            for weight in group["params"] if "first_epoch" in group else ():
                weight.requires_grad_(epoch >= group["first_epoch"])
                waiting |= set() if weight.requires_grad else {id(weight)}
        for module in self.stilled:
            module.training = True
        weights = [(module, list(module.parameters(recurse=False))) for module in self.model.modules()]
        still = [m for m, own in weights if own and m.training and all(id(w) in waiting for w in own)]
        for module in still:
            module.training = False
        self.stilled = still
        if self.frozen is not None and self.frozen != len(waiting):
            self.flops.pop("training", None)  # a frozen part has no backward pass: count again
        self.frozen = len(waiting)

    def _plan(self, order: Tensor) -> Plan:
        return Plan(order, self.train_source.batch_size, self._chunk, self._offer)

    def _pause(self) -> None:
        """Saves, and waits until somebody resumes or stops it; the ledger does not run meanwhile."""
        self._flush()
        self._apply_controls(pausing=True)
        if self.save:
            self._save()
        phase = self.ledger.switch(None)
        while self.controls.paused and not self.controls.stopping():
            time.sleep(0.02)
        self.ledger.switch(phase)
        self._apply_controls(pausing=True)

    def _change_gate(self) -> None:
        name = self.controls.values["gate"] or self.gate_name
        if self.learned and name != self.gate_name:
            try:
                if name == "live" and self.config.score_scale < 1:
                    self.refuse_scale(next(self.val_source.in_order())[0])
                if name not in self.gates:
                    self.gates[name] = self._make_gate(name)
            except BadInput as error:
                self.controls.values["gate"] = None
                return self.emit("notice", text=f"gate {name} not taken: {error}")
            self.gate_name = name
            if controller := getattr(self.gate, "controller", None):
                controller.lost = 0  # what others lost meanwhile is not its disturbance

    def _rate(self, epoch: int | None = None) -> float:
        target = self.controls.values["target_activation"] or self.config.target_activation
        return self.schedule.rate(len(self.rows) if epoch is None else epoch, target)

    def _chunk(self) -> int:
        """Candidates per decision: a twentieth of an epoch, or four batches' worth where that is less."""
        return math.ceil(min(len(self.train_source) / 20, 4 * self.train_source.batch_size / self._rate()))

    def _offer(self, candidates: Tensor) -> tuple[Tensor, Tensor]:
        began = time.perf_counter()
        self._flush()
        self.epoch.waited -= time.perf_counter() - began  # that was for the device, not for data
        self._apply_controls()
        rate = self._rate()
        self.epoch.candidates += len(candidates)
        self.controls.candidates += len(candidates)
        self.ledger.accounts[self.schedule.phase(len(self.rows))].candidates += len(candidates)
        if self.after_loader:
            return candidates, torch.ones(len(candidates))  # decided on once they are loaded
        chosen = candidates, torch.ones(len(candidates))
        if rate < 1:
            chosen = self.gate.select(candidates, rate, self.generator)
        self._decided(len(candidates), len(chosen[0]))
        return chosen

    def _decided(self, offered: int, activated: int) -> None:
        """Tells of one decision of the gate, and of what has been spent by now."""
        rate, spent = self._rate(), self.ledger.total()
        self.epoch.decided += offered
        self.epoch.chosen += activated
        self.emit(
            "chunk",
            candidates=self.epoch.decided,
            n=len(self.epoch.plan.order),
            phase=self.schedule.phase(len(self.rows)),
            rate=rate,
            offered=offered,
            activated=activated,
            gate=self.gate if rate < 1 else None,
            progress=self.progress,
            seconds=spent.seconds,
            train_seconds=self.ledger.seconds(TRAINING_PHASES),
            joules=spent.joules,
            scoring_flops=self.ledger.accounts["scoring"].flops,
            flops_per_sample=self.flops,
        )

    def _apply_controls(self, pausing: bool = False) -> None:
        """Takes up what was asked; a new gate only between epochs, a pause where it begins."""
        later = []
        while self.controls.asked:
            control, value, set_at = self.controls.asked.popleft()
            due_later = control == "paused" and value and self.controls.paused and not pausing
            if due_later or (control == "gate" and (self.epoch is not None or not self.learned)):
                later.append((control, value, set_at))
                continue
            own = {"target_activation": self.config.target_activation, "gate": self.gate_name}
            own |= {"paused": not value, "stop": None}
            old = self.controls.values.get(control) or own.get(control)
            if control in self.controls.values:
                self.controls.values[control] = value
            change = {"control": control, "old": old, "new": value, "set_at": set_at}
            self.emit("control", time=time.time(), candidates=self.controls.candidates, **change)
            at = len(self.rows) + (self.epoch.decided / len(self.epoch.plan.order) if self.epoch else 0)
            self.changes.append((at, self.ledger.seconds(), change_words(change)))
        self.controls.asked.extendleft(reversed(later))

    def _batches(self, plan: Plan) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Indices and weights (CPU), views and labels (device) of one step after the other."""
        yield from plan.pack()
        for indices, images, labels in self.train_source.stream(plan.batches()):
            weights, missing = plan.received(indices)
            if self.after_loader and self._rate() == 1:
                self._decided(len(indices) + len(missing), len(indices) + len(missing))
                self._show(indices, images, labels)
            if len(missing):
                self.alive[missing] = False
                self._observe(missing, torch.full((len(missing),), math.nan))
            if not len(indices):
                continue
            if self.after_loader and self._rate() < 1:
                plan.views.append(self._gate_views(indices, images, labels))
                yield from plan.pack()
            else:
                yield indices, weights, images, labels
        yield from plan.pack()

    def _show(self, indices: Tensor, images: Tensor, labels: Tensor) -> None:
        """Lets a gate that learns by looking watch a full phase; after the last sparse epoch it need not."""
        if hasattr(self.gate, "watch") and self.schedule.phase(len(self.rows)) != "anneal" and len(indices):
            with self.ledger.charge("scoring"):
                self.gate.watch(Views(indices, images, labels))

    def _gate_views(self, indices: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        with self.ledger.charge("scoring"):
            chosen, weights = self.gate.select(Views(indices, images, labels), self._rate(), self.generator)
        self._decided(len(indices), len(chosen))
        order = indices.argsort()
        rows = order[torch.searchsorted(indices[order], chosen)]
        rows_there = rows.to(self.device, non_blocking=True)
        return chosen, weights, images[rows_there], labels[rows_there]

    def score(self, images: Tensor, labels: Tensor) -> Tensor:
        """Significance [m] of views by the model as it is now, at `score_scale` of the resolution.

        images: [m, ...], labels: int64 [m], on the training device. The ledger charges the forward pass.
        """
        small = self._shrink(images)
        if "scoring" not in self.flops:
            self.refuse_scale(images)
            self._count_flops("scoring", small[:2])
        self.ledger.accounts["scoring"].flops += len(images) * self.flops["scoring"]

        def attempt(parts: int) -> Tensor:
            split = (part.tensor_split(parts) for part in (small, labels, images))
            return torch.cat(
                [
                    significance(self.model(scaled), label, image, self.config.significance)
                    for scaled, label, image in zip(*split, strict=True)
                ]
            )

        with evaluating(self.model), self.autocast():
            return self._afford("scoring", len(labels), attempt)

    def _shrink(self, images: Tensor) -> Tensor:
        scale = self.config.score_scale
        if scale == 1.0:
            return images
        if images.ndim != 4:
            raise BadInput(
                f"score_scale {scale}: expected 1 for inputs of shape {list(images.shape)}, not images"
            )
        side = [max(1, round(scale * length)) for length in images.shape[-2:]]
        return F.interpolate(images, size=side, mode="bilinear", antialias=True)

    # --- a step ---

    def _step(self, indices: Tensor, weights: Tensor, images: Tensor, labels: Tensor) -> None:
        weights = weights.to(self.device, non_blocking=True)
        shape = learning_rate_shape(self.progress) * self.controls.values["learning_rate_factor"]
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * shape
        before = joined(float_buffers(self.model))

        def attempt(parts: int) -> tuple[Tensor, Tensor]:
            self.optimizer.zero_grad(set_to_none=True)
            split = (part.tensor_split(parts) for part in (images, labels, weights))
            pairs = [self._backward(*part, len(labels)) for part in zip(*split, strict=True)]
            losses, scores = zip(*pairs, strict=True)
            return torch.cat(losses), torch.cat(scores)

        def undo() -> None:
            self.optimizer.zero_grad(set_to_none=True)
            if buffers := float_buffers(self.model):
                put_back(buffers, before)

        losses, score = self._afford("training", len(labels), attempt, undo)
        ok = guarded_step(self.model, self.optimizer, self.scaler, before, self.config.clip_norm)
        if self.average is not None:
            self._update_average()
        finite = losses.isfinite()
        sums = torch.stack([torch.where(finite, losses, 0).sum(), finite.sum(), ok])
        self.unread.append((indices, torch.where(finite, score, math.nan), sums))
        self._count(len(indices))

    def _backward(self, images: Tensor, labels: Tensor, weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Adds to the gradients this part's share of the mean over `count` samples; losses and scores [B]."""
        with self.autocast():
            logits = self.model(images)
        if "training" not in self.flops:
            self._first_batch(images, logits, labels)
        losses = self.criterion(logits.float(), labels)
        if losses.shape != labels.shape:
            raise BadInput(
                f"a criterion that returned shape {list(losses.shape)} for {len(labels)} samples: expected "
                "one loss a sample; use reduction='none'"
            )
        finite = losses.detach().isfinite()
        self.scaler.scale((torch.where(finite, losses, 0) * weights).sum() / count).backward()
        return losses.detach(), significance(logits, labels, images, self.config.significance)

    def _afford(
        self, mode: str, count: int, attempt: Callable[[int], Any], undo: Callable[[], None] = lambda: None
    ) -> Any:
        """`attempt(parts)` on `count` samples; where memory runs out, redone in twice the parts."""
        limit = self.at_once.get(mode, count)
        while True:
            try:
                answer = attempt(min(math.ceil(count / limit), max(1, count // 2)))  # batch norm needs two
                break
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                reason = one_line(error)
            undo()  # outside the except block, where the error would hold on to what it failed with
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if limit <= 2:
                raise BadInput(
                    f"two samples at a time: expected them to fit into memory ({reason}); choose smaller "
                    "images or a smaller model"
                )
            limit = math.ceil(min(limit, count) / 2)
        if limit < self.at_once.get(mode, count):
            self.at_once[mode] = limit
            text = f"out of memory: {mode} goes on with at most {limit} samples at a time"
            if mode == "training":
                text += ", whose gradients add up to the same batch (batch norm sees a part of it)"
            self.emit("notice", text=text)
        return answer

    def _update_average(self) -> None:
        update = torch.optim.swa_utils.get_ema_multi_avg_fn(self.config.ema)
        update(list(self.average.parameters()), list(self.model.parameters()), None)
        for value, new in zip(self.average.buffers(), self.model.buffers(), strict=True):
            value.copy_(new)

    @property
    def judged(self) -> nn.Module:
        """The model that is evaluated and kept: the averaged one, where there is one."""
        return self.model if self.average is None else self.average

    def _first_batch(self, images: Tensor, logits: Tensor, labels: Tensor) -> None:
        """What can only be known once there is data: shapes, and FLOPs a sample."""
        refuse_outputs(logits, len(labels), labels)
        self._count_flops("evaluation", images[:2])
        if self.gate_name == "live" and "scoring" not in self.flops:
            self.refuse_scale(images)
            self._count_flops("scoring", self._shrink(images[:2]))
        self._count_flops("training", images[:2])  # last: where memory runs out before, all is counted anew

    def _count_flops(self, mode: str, images: Tensor, network: nn.Module | None = None) -> None:
        phase = self.ledger.switch(None)
        try:
            self.flops[mode], uncounted = flops_per_sample(
                network or self.model, images, mode.endswith("training"), self.autocast
            )
            self.uncounted = sorted({*self.uncounted, *uncounted})
        finally:
            self.ledger.switch(phase)

    def refuse_scale(self, images: Tensor) -> None:
        """Raises BadInput where the model cannot take images [B, ...] at `score_scale` of their size."""
        small = self._shrink(images[:2])
        try:
            with evaluating(self.model), self.autocast():
                self.model(small)
        except RuntimeError as error:
            raise BadInput(
                f"score_scale {self.config.score_scale}: expected a model that takes images of "
                f"{small.shape[-2]} x {small.shape[-1]} pixels; use 1 ({str(error).splitlines()[0]})"
            ) from error

    def _count(self, samples: int) -> None:
        epoch = self.epoch
        epoch.activated += samples
        account = self.ledger.accounts[self.schedule.phase(len(self.rows))]
        account.activated += samples
        account.flops += samples * self.flops["training"]
        rate = self._rate()
        left = epoch.plan.batches_left(rate, rate if self.after_loader else 1.0)
        n, size = len(epoch.plan.order), epoch.plan.batch_size
        later = sum(
            math.ceil(n * self._rate(e) / size) for e in range(len(self.rows) + 1, self.schedule.epochs)
        )
        self.progress += (1 - self.progress) / (1 + math.ceil(left - 1e-6) + later)

    def _flush(self) -> None:
        """Reads losses and scores from the device, once a chunk, and lets the gate remember them."""
        if not self.unread:
            return
        indices = torch.cat([indices for indices, _, _ in self.unread])
        flat = torch.cat([score for _, score, _ in self.unread] + [sums for _, _, sums in self.unread]).cpu()
        self._observe(indices, flat[: len(indices)])
        if self._rate() < 1:
            self.times_activated[indices] += 1
        sums = flat[len(indices) :].reshape(-1, 3)
        for loss in sums[:, 0].tolist():  # one by one, so that the sum does not depend on when it is read
            self.epoch.loss += loss
        self.epoch.trained += int(sums[:, 1].sum())
        self.epoch.spoiled += int((sums[:, 2] == 0).sum())
        self.unread = []

    def _observe(self, indices: Tensor, scores: Tensor) -> None:
        for gate in self.gates.values():  # those at rest too, so that they come back with fresh memories
            gate.observe(indices, scores)

    # --- after an epoch ---

    def evaluate(self) -> float:
        """Accuracy on the validation set, percent."""
        model, right, count = self.judged, torch.zeros((), device=self.device), 0
        with self.ledger.charge("evaluation") as account, evaluating(model):
            for images, labels in self.val_source.in_order():

                def attempt(parts: int, images: Tensor = images) -> Tensor:
                    with self.autocast():
                        return torch.cat([model(part).argmax(1) for part in images.tensor_split(parts)])

                right += (self._afford("evaluation", len(labels), attempt) == labels).sum()
                count += len(labels)
            account.flops += count * self.flops.get("evaluation", 0.0)
            return 100 * float(right) / count

    def _finish_epoch(self) -> None:
        self._flush()
        epoch, number = self.epoch, len(self.rows)
        if epoch.activated and not epoch.trained:
            raise BadInput(
                f"train loss nan in epoch {number + 1}: expected at least one finite loss; lower the "
                f"learning rate (now {self.peaks[0]:g} at its peak) or look for broken inputs"
            )
        if epoch.spoiled:
            self.emit(
                "notice",
                text=f"epoch {number + 1}: {epoch.spoiled} steps not taken, their gradients not being finite",
            )
        seconds = self.ledger.seconds(TRAINING_PHASES) - epoch.started
        scoring = self.ledger.seconds(["scoring"]) - epoch.scored
        waited = epoch.waited - scoring
        accuracy = self.evaluate()
        spent = self.ledger.total()
        controller = getattr(self.gate, "controller", None)
        gated = self._rate() < 1
        row = {
            "policy": self.policy,
            "seed": self.seed,
            "epoch": number + 1,
            "phase": self.schedule.phase(number),
            "train_loss": epoch.loss / max(1, epoch.trained),
            "val_accuracy": accuracy,
            "target_activation": self._rate(),
            "activation_rate": epoch.activated / epoch.candidates,
            "mean_activation": spent.activated / spent.candidates,
            "threshold": getattr(self.gate, "threshold", None) if gated else None,
            "controller": controller.state(self._rate()) if controller and gated else None,
            "significance_quantiles": quantiles(self.gate),
            "candidates": epoch.candidates,
            "activated": epoch.activated,
            "seconds": seconds,
            "scoring_seconds": scoring,
            "elapsed_seconds": spent.seconds,
            "data_wait_percent": 100 * waited / seconds,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
        }
        self.rows.append(row)
        self.epoch = None
        if row["data_wait_percent"] > PATIENCE and not self.advised:
            self.advised = True
            waited = f"{row['data_wait_percent']:.0f} % of epoch {number + 1}"
            self.emit("notice", text=f"training waited for data in {waited}; {self.train_source.remedy}")
        if len(self.rows) == self.schedule.epochs:
            self.progress = 1.0
        left = spent.seconds * (1 - self.progress) / max(self.progress, 1e-9)
        self.emit("epoch", **row, epochs=self.schedule.epochs, unit_saved=unit_saved(spent), eta_seconds=left)

    def results(self) -> dict:
        """The run so far; see `train`."""
        total = self.ledger.total()
        accuracies = [row["val_accuracy"] for row in self.rows]
        accounts = {
            phase: asdict(a) | {"unit_energy": a.unit_energy} for phase, a in self.ledger.accounts.items()
        }
        return {
            "policy": self.policy,
            "seed": self.seed,
            "complete": len(self.rows) == self.schedule.epochs,
            "final_accuracy": accuracies[-1] if accuracies else None,
            "best_accuracy": max(accuracies, default=None),
            "activation_rate": total.activated / max(1, total.candidates),
            "candidates": total.candidates,
            "activated": total.activated,
            "energy_savings": unit_saved(total),
            "speedup": UNIT_ACTIVATED * total.candidates / max(total.unit_energy, 1e-9),
            "speedup_method": "unit model",
            "train_seconds": self.ledger.seconds(TRAINING_PHASES),
            "total_seconds": total.seconds,
            "flops": total.flops,
            "flops_per_sample": dict(self.flops),
            "flops_uncounted": self.uncounted,
            "unit_energy": total.unit_energy,
            "joules": total.joules if self.ledger.meter.method != "unavailable" else None,
            "joules_method": self.ledger.meter.method
            + (f" ({self.ledger.meter.reason})" if self.ledger.meter.reason else ""),
            "peak_memory_mib": peak_memory_mib(self.device),
            "samples_at_once": self.at_once.get("training", self.train_source.batch_size),
            "phases": accounts,
            "epochs": self.rows,
            "changes": self.changes,
        }

    # --- state ---

    def _save(self) -> None:
        self._flush()
        with self.ledger.charge("checkpoint"):
            self.save()
        self.saved_at = time.monotonic()

    def state_dict(self) -> dict:
        """Everything that a bit-exact continuation needs."""
        self._flush()
        phase = self.ledger.switch(None)
        self.ledger.switch(phase)  # brings the accounts up to now
        epoch = {k: v for k, v in vars(self.epoch).items() if k != "plan"} if self.epoch else None
        return {
            "model": self.model.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "gates": {name: gate.state_dict() for name, gate in self.gates.items()},
            "gate_name": self.gate_name,
            "schedule": asdict(self.schedule),
            "generators": [
                self.generator.get_state(),
                self.train_source.generator.get_state(),
                *rng_states(self.device),
            ],
            "ledger": self.ledger.state_dict(),
            "controls": dict(self.controls.values),
            "asked": [list(wish) for wish in self.controls.asked if wish[0] == "gate"],
            "controls_candidates": self.controls.candidates,
            "alive": self.alive,
            "times_activated": self.times_activated,
            "unreadable": dict(self.train_source.unreadable),
            "rows": list(self.rows),
            "changes": list(self.changes),
            "epoch": epoch,
            "plan": self.epoch.plan.state_dict() if self.epoch else None,
            "progress": self.progress,
            "flops": dict(self.flops),
            "uncounted": list(self.uncounted),
            "at_once": dict(self.at_once),
            "frozen": self.frozen,
        }

    def load_state_dict(self, state: dict) -> None:
        """Takes up a `state_dict`; the next `train` goes on from there."""
        self._begin(state["schedule"]["epochs"], None)
        for name in ("model", "optimizer", "scaler", "ledger"):
            getattr(self, name).load_state_dict(state[name])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        for name, gate in state["gates"].items():
            if name not in self.gates:
                self.gates[name] = self._make_gate(name)
            self.gates[name].load_state_dict(gate)
        self.gate_name = state["gate_name"]
        self.schedule, self.taken_up = Schedule(**state["schedule"]), True
        self.generator.set_state(state["generators"][0])
        self.train_source.generator.set_state(state["generators"][1])
        set_rng_states(self.device, state["generators"][2:])
        self.controls.values = dict(state["controls"])
        self.controls.asked.extendleft(tuple(wish) for wish in reversed(state["asked"]))
        self.controls.candidates = state["controls_candidates"]
        self.alive, self.rows, self.progress = state["alive"], list(state["rows"]), state["progress"]
        self.times_activated = state["times_activated"].clone()
        self.changes = [tuple(change) for change in state["changes"]]
        self.train_source.unreadable = dict(state["unreadable"])
        self.flops, self.uncounted = dict(state["flops"]), list(state["uncounted"])
        self.at_once, self.frozen = dict(state["at_once"]), state["frozen"]
        if state["epoch"] is not None:
            plan = self._plan(state["plan"]["order"])
            plan.load_state_dict(state["plan"])
            plan.views = [
                (indices, weights, images.to(self.device), labels.to(self.device))
                for indices, weights, images, labels in plan.views
            ]
            self.epoch = Epoch(plan, **state["epoch"])


def refuse_outputs(logits: object, count: int, labels: Tensor) -> None:
    """Raises BadInput unless `logits` are [count, classes], and labels [B] lie below the classes."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != count:
        what = f"shape {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise BadInput(
            f"a model that returned {what} for {count} samples: expected logits [{count}, classes]"
        )
    low, high, classes = int(labels.min()), int(labels.max()), logits.shape[1]
    if low < 0 or high >= classes:
        raise BadInput(
            f"labels from {low} to {high}: expected 0 to {classes - 1}, since the model has {classes} "
            "outputs; widen the model or mend the labels"
        )


def change_words(data: dict) -> str:
    """A change by hand, in a few words: target 0.1."""
    names = {"target_activation": "target", "learning_rate_factor": "lr ×"}
    if data["control"] == "paused":
        return "paused" if data["new"] else "resumed"
    new = data["new"] if isinstance(data["new"], str) else f"{data['new']:.3g}"
    return new if data["control"] == "stop" else f"{names.get(data['control'], data['control'])} {new}"


def scores_of(gate: object) -> Tensor:
    """The finite significances [k] that a gate ranks by; none if its `scores` are something else."""
    scores = getattr(gate, "scores", None)
    known = isinstance(scores, Tensor) and scores.ndim == 1
    return scores[scores.isfinite()] if known else torch.empty(0)


def quantiles(gate: object) -> list[float] | None:
    """The 0, 5, … 100 % quantiles of the significances that a gate ranks by; None if it knows none."""
    scores = scores_of(gate)
    return [round(float(q), 5) for q in scores.quantile(torch.linspace(0, 1, 21))] if len(scores) else None


def unit_saved(account: Account) -> float:
    """Unit energy saved against activating every candidate, percent: a model, not a measurement."""
    return (
        100 * (1 - account.unit_energy / (UNIT_ACTIVATED * account.candidates)) if account.candidates else 0.0
    )


def rng_states(device: torch.device) -> list[Tensor]:
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def set_rng_states(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def peak_memory_mib(device: torch.device) -> float | None:
    """Peak memory: of torch on a GPU, of the whole process on a CPU (None where the system does not tell)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource  # Unix only
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


# %% Why checkpoints are written so [markdown] tags=["shared"]
# ### Checkpoints
#
# A checkpoint is written beside its final name, flushed to disk, and only then renamed, so a crash at any
# moment leaves a whole one. It begins with the SHA-256 of the rest: a damaged file is noticed, and the one
# before it serves. Loading uses `weights_only=True`, which runs no code from the file.


# %% Checkpoints tags=["shared"]
def write_whole(path: Path, content: bytes) -> None:
    """Writes a file so that it is there whole or not at all. Raises BadInput where the disk refuses."""
    draft = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(draft, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> BadInput:
    return BadInput(
        f"{path}: expected a folder with room to write in ({error.strerror}); free some, or choose "
        "another --out"
    )


def save_checkpoint(folder: Path, state: dict) -> Path:
    """Writes `state` as the newest checkpoint in `folder` and keeps the one before it."""
    there = sorted(folder.glob("*.ckpt"))
    number = int(there[-1].stem) + 1 if there else 0
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    path = folder / f"{number:06d}.ckpt"
    write_whole(path, hashlib.sha256(payload).digest() + payload)
    for old in there[:-1]:
        old.unlink()
    return path


def load_checkpoint(folder: Path, say: Callable[[str], None]) -> dict | None:
    """The newest whole checkpoint in `folder`, or None. Says so where a damaged one is passed over."""
    damaged = []
    for path in sorted(folder.glob("*.ckpt"), reverse=True):
        content = path.read_bytes()
        if hashlib.sha256(content[32:]).digest() == content[:32]:
            for other in damaged:  # else one would count among the two that are kept
                other.unlink()
            return torch.load(io.BytesIO(content[32:]), weights_only=True, map_location="cpu")
        say(f"warning: {path} is damaged; trying the checkpoint before it")
        damaged.append(path)
    return None


# %% Why records [markdown] tags=["shared"]
# ### Records
#
# `metrics.jsonl` has a line an epoch, `events.jsonl` a line for every change made by hand. A resumed run
# cuts both back to where its checkpoint stood.

# %% Records tags=["shared"]
METRICS = (
    "policy seed epoch phase train_loss val_accuracy target_activation activation_rate mean_activation "
    "threshold controller candidates activated seconds elapsed_seconds data_wait_percent learning_rate "
    "significance_quantiles"
).split()
CHANGES = ("time", "candidates", "control", "old", "new", "set_at", "applied_at")


class Records:
    """A listener that writes metrics.jsonl and events.jsonl into a folder."""

    def __init__(self, folder: Path):
        self.paths = {"epoch": folder / "metrics.jsonl", "control": folder / "events.jsonl"}

    def __call__(self, event: str, data: dict) -> None:
        if event == "epoch":
            self._append(event, {name: data[name] for name in METRICS})
        elif event == "control":
            row = {**data, "applied_at": data["candidates"]}
            self._append(event, {name: row[name] for name in CHANGES})

    def _append(self, event: str, row: dict) -> None:
        try:
            with open(self.paths[event], "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise cannot_write(self.paths[event], error) from error

    def changes(self) -> int:
        """How many settings were changed while it trained."""
        rows = self.paths["control"].read_text(encoding="utf-8").splitlines()
        return sum(json.loads(row)["control"] not in ("paused", "stop") for row in rows)

    def sizes(self) -> dict[str, int]:
        return {event: path.stat().st_size if path.exists() else 0 for event, path in self.paths.items()}

    def cut(self, sizes: dict[str, int]) -> None:
        """Shortens both files to `sizes` bytes, and makes them if they are not there."""
        try:
            for event, path in self.paths.items():
                with open(path, "ab") as file:
                    file.truncate(sizes.get(event, 0))
        except OSError as error:
            raise cannot_write(path, error) from error


# %% The table and the bar tags=["shared"]
HEADER = (
    f"{'policy':<7} {'epoch':>7} {'phase':<7} {'val acc':>8} {'loss':>6} {'rate':>6} {'target':>6} "
    f"{'theta':>6} "
    f"{'unit-model saved':>16} {'seconds':>8} {'waited':>6} {'elapsed':>8} {'ETA':>8}"
)


def clock(seconds: float) -> str:
    """Seconds as 12 s, 3:05 or 1:02:03."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def epoch_line(row: dict) -> str:
    """One row of the table."""
    theta = "-" if row["threshold"] is None else f"{row['threshold']:.3f}"
    return (
        f"{row['policy']:<7} {row['epoch']:>3}/{row['epochs']:<3} {row['phase']:<7} "
        f"{row['val_accuracy']:>6.2f} % {row['train_loss']:>6.3f} "
        f"{row['activation_rate']:>6.3f} {row['target_activation']:>6.3f} {theta:>6} "
        f"{row['unit_saved']:>14.1f} % {row['seconds']:>8.1f} "
        f"{row['data_wait_percent']:>4.0f} % {clock(row['elapsed_seconds']):>8} "
        f"{clock(row['eta_seconds']):>8}"
    )


def print_table(bar: bool = True, say: Callable[[str], None] = tqdm.write) -> Callable[[str, dict], None]:
    """A listener: a row an epoch, and a progress bar within the epoch where there is a terminal."""
    progress = None

    def listen(event: str, data: dict) -> None:
        nonlocal progress
        if event == "start":
            say(HEADER)
        elif event == "notice":
            say(data["text"])
        elif event == "control":
            say(f"{data['control']} {data['old']} -> {data['new']} at {data['candidates']} candidates")
        elif event == "chunk" and bar:
            progress = progress or tqdm(total=data["n"], unit=" candidates", leave=False, disable=None)
            progress.update(data["candidates"] - progress.n)
        if event in ("epoch", "end") and progress is not None:
            progress.close()
            progress = None
        if event == "epoch":
            say(epoch_line(data))

    return listen


# %% Why one colour a policy [markdown] tags=["shared"]
# ### Pictures
#
# One colour a policy everywhere: AST orange, full grey, random blue (distinguishable with any colour vision).

# %% Pictures tags=["shared"]
COLOURS = {"ast": "#d55e00", "full": "#666666", "random": "#0072b2", "rs2": "#009e73", "short": "#cc79a7"}
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "lines.linewidth": 1.8,
    "figure.constrained_layout.use": True,
}


PLATE = {"color": "white", "alpha": 0.75, "pad": 0.5, "linewidth": 0}  # behind words that lines may cross


def curves(results: list[dict], title: str, path: Path) -> None:
    """Draws accuracy, activation, threshold and cost of finished or stopped runs into a PNG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 7))
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, 3)
        figure.suptitle(title, ha="left", x=0.01, fontsize=12)
        shown = [r for r in results if r["epochs"] and r["seed"] == results[0]["seed"]]
        draw_accuracy(axes[0, 0], shown, "epoch", "epoch")
        draw_accuracy(axes[0, 1], shown, "elapsed_seconds", "seconds, training + evaluation + checkpoints")
        draw_rate(axes[0, 2], shown)
        draw_threshold(axes[1, 0], shown)
        draw_saved_by_phase(axes[1, 1], shown)
        draw_cost(axes[1, 2], shown)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=100, format="png")
    write_whole(path, buffer.getvalue())


def draw_accuracy(axes: object, results: list[dict], x: str, label: str) -> None:
    for result in results:
        rows, colour = result["epochs"], COLOURS.get(result["policy"], "black")
        axes.plot([r[x] for r in rows], [r["val_accuracy"] for r in rows], color=colour, marker=".")
    axes.set(title="Validation accuracy", xlabel=label, ylabel="accuracy (%)")
    label_ends(axes, results)
    mark_changes(axes, results, x)


def label_ends(axes: object, results: list[dict], at: float = 1.01) -> None:
    """Names each line at the right edge, at the height of its end, pushed apart so that no two overlap.

    at: where, a fraction of the width.
    """
    low, high = axes.get_ylim()
    step, last = 0.075 * (high - low), -math.inf
    for result in sorted(results, key=lambda r: r["epochs"][-1]["val_accuracy"]):
        last = max(result["epochs"][-1]["val_accuracy"], last + step)
        colour = COLOURS.get(result["policy"], "black")
        axes.text(at, last, result["policy"], transform=axes.get_yaxis_transform(), va="center", color=colour)


def draw_rate(axes: object, results: list[dict]) -> None:
    rows = results[0]["epochs"] if results else []
    epochs = [r["epoch"] for r in rows]
    axes.step(
        epochs,
        [r["target_activation"] for r in rows],
        where="mid",
        color="black",
        linestyle=":",
        label="target",
    )
    colour = COLOURS.get(rows[0]["policy"] if rows else "", "black")
    axes.plot(epochs, [r["activation_rate"] for r in rows], "o", markersize=4, color=colour, label="realised")
    axes.set(title="Activation rate", xlabel="epoch", ylabel="activated / candidates", ylim=(0, 1.08))
    axes.legend(frameon=False, loc="lower left")
    mark_changes(axes, results, "epoch", named=True)


def mark_changes(axes: object, results: list[dict], x: str, named: bool = False) -> None:
    """A line for each change by hand during the first result, over an axis of epochs or of seconds."""
    last, (left, right) = -math.inf, axes.get_xlim()
    for epochs, seconds, words in results[0]["changes"] if results else []:
        at = epochs + 0.5 if x == "epoch" else seconds  # an epoch's own mark stands in its middle
        axes.axvline(at, color="black", linewidth=0.8, alpha=0.5)
        if named and at - last > 0.05 * (right - left):
            last = at
            where = {"transform": axes.get_xaxis_transform(), "rotation": 90, "fontsize": 7.5, "ha": "right"}
            axes.text(at, 0.3, words + " ", va="bottom", bbox=PLATE, **where)
    if x == "epoch":
        axes.xaxis.get_major_locator().set_params(integer=True)


def draw_threshold(axes: object, results: list[dict]) -> None:
    rows = [r for r in results[0]["epochs"] if r["threshold"] is not None] if results else []
    axes.set(title="Threshold", xlabel="epoch", ylabel="θ (rank of the significance)")
    if not rows:
        axes.text(0.5, 0.5, "this gate has no threshold", ha="center", transform=axes.transAxes)
        return
    axes.plot(
        [r["epoch"] for r in rows], [r["threshold"] for r in rows], "o-", markersize=4, color=COLOURS["ast"]
    )
    axes.set_xlim(0.5, results[0]["epochs"][-1]["epoch"] + 0.5)
    mark_changes(axes, results, "epoch")


def draw_saved_by_phase(axes: object, results: list[dict]) -> None:
    axes.set(title="Energy saved by phase (unit model)", ylabel="saved against every candidate (%)")
    phases = (
        [(name, Account(**only_account(results[0]["phases"][name]))) for name in TRAINING_PHASES]
        if results
        else []
    )
    phases = [(name, account) for name, account in phases if account.candidates]
    bars = axes.bar(
        [name for name, _ in phases], [unit_saved(a) for _, a in phases], color=COLOURS["ast"], width=0.6
    )
    axes.bar_label(bars, fmt="%.0f %%", padding=2)
    axes.margins(y=0.15)
    axes.grid(axis="x", visible=False)


def only_account(phase: dict) -> dict:
    return {name: value for name, value in phase.items() if name != "unit_energy"}


def draw_cost(axes: object, results: list[dict]) -> None:
    """Seconds by kind, one bar a policy: what a user waits for."""
    kinds = {"training": ("warmup", "ramp", "sparse", "anneal"), "scoring": ("scoring",)}
    kinds |= {"evaluation": ("evaluation",), "checkpoints": ("checkpoint",)}
    shades = {"training": 1.0, "scoring": 0.65, "evaluation": 0.4, "checkpoints": 0.2}
    names = [r["policy"] for r in results]
    left = [0.0] * len(names)
    for kind, phases in kinds.items():
        width = [sum(r["phases"][p]["seconds"] for p in phases) for r in results]
        if sum(width) < 0.01 * sum(r["total_seconds"] for r in results):
            continue
        colours = [COLOURS.get(name, "#000000") for name in names]
        bars = axes.barh(names, width, left=left, color=colours, alpha=shades[kind], height=0.55)
        words = [kind if w > 0.2 * max(r["total_seconds"] for r in results) else "" for w in width]
        axes.bar_label(bars, words, label_type="center", color="white")
        left = [a + b for a, b in zip(left, width, strict=True)]
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(title="Measured time (pale: evaluation)", xlabel="seconds")


# %% Why one dataclass feeds all [markdown] tags=["shared"]
# ### Settings from flags and variables
#
# One dataclass feeds the command line, the environment and the notebook. Each field's comment in the
# settings cell is its help text.


# %% Settings from flags and variables tags=["shared"]
def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def convert(name: str, kind: object, text: str, label: str) -> object:
    """The value of a field from what a person typed. Raises BadInput."""
    kinds = getattr(kind, "__args__", (kind,))
    if type(None) in kinds and text.lower() in ("", "auto", "none"):
        return None
    try:
        if bool in kinds:
            return {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}[
                text.lower()
            ]
        return next(k for k in kinds if k is not type(None))(text)
    except (ValueError, KeyError):
        expected = RULES[name][1] if name in RULES else "1 or 0" if bool in kinds else "a number"
        raise BadInput(f"{label} {text}: expected {expected}") from None


class Flags(argparse.ArgumentParser):
    """A command line whose complaints are one sentence."""

    def error(self, message: str) -> None:
        raise BadInput(message.replace("argument ", "", 1) + "; --help lists the flags")


def field_comments() -> dict[str, str]:
    """The comment behind each field of `Settings`; none in a notebook, which has no source file."""
    source = Path(__file__).read_text(encoding="utf-8") if "__file__" in globals() else ""
    source = source.partition("class Settings:")[2].partition("\n\n\n")[0]
    return dict(re.findall(r"^    (\w+): [^#\n]+  # (.+)$", source, re.MULTILINE))


def flag_parser(settings: object) -> argparse.ArgumentParser:
    """A parser with a flag for every field, its help taken from the comment behind the field."""
    comments = field_comments()
    parser = Flags(
        prog=f"{PROGRAM}.py", allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for item in fields(settings):
        text = comments.get(item.name, "").replace("%", "%%")
        options = {"help": text, "default": argparse.SUPPRESS, "dest": item.name}
        shown = getattr(settings, item.name)
        options["help"] += f" (default: {'auto' if shown is None else shown})"
        if item.type is bool:
            parser.add_argument(flag(item.name), action=argparse.BooleanOptionalAction, **options)
        else:
            parser.add_argument(flag(item.name), metavar=item.name.upper()[:12], **options)
    return parser


def resolve(
    settings: object, arguments: list[str], environment: dict[str, str]
) -> tuple[object, dict[str, str]]:
    """Settings after flags and AST_* variables, and how each was given ("flag", "AST_X", "settings cell").

    Raises BadInput for unknown flags and variables, and for values that cannot be.
    """
    kinds = {item.name: item.type for item in fields(settings)}
    fresh = type(settings)()
    given = {name: "settings cell" for name in kinds if getattr(settings, name) != getattr(fresh, name)}
    values = asdict(settings)
    for variable, text in environment.items():
        if variable.startswith("AST_"):
            name = variable.removeprefix("AST_").lower()
            if name not in kinds or variable != variable.upper():
                known = ["AST_" + n.upper() for n in kinds]
                close = difflib.get_close_matches(variable.upper(), known, 1) or ["AST_DATA"]
                raise BadInput(
                    f"{variable}={text}: expected a variable that names a setting, such as {close[0]}; "
                    "unset it"
                )
            values[name] = convert(name, kinds[name], text, f"{variable}=")
            given[name] = variable
    parsed, unknown = flag_parser(settings).parse_known_args(arguments)
    if unknown:
        close = difflib.get_close_matches(unknown[0], [flag(name) for name in kinds], 1)
        raise BadInput(
            f"{unknown[0]}: expected a flag of this program"
            + (f", such as {close[0]}" if close else "; --help lists them")
        )
    for name, value in vars(parsed).items():
        if not isinstance(value, str | bool):
            raise BadInput(f"{flag(name)} {value}: expected one value; --help lists the flags")
        values[name] = value if isinstance(value, bool) else convert(name, kinds[name], value, flag(name))
        given[name] = flag(name)
    for name, value in PROFILES.get(values.get("profile"), {}).items():
        if name not in given:
            values[name], given[name] = value, f"--profile {values['profile']}"
    rules = RULES | {name: one_of(names) for name, names in CHOICES.items()}
    for name, value in values.items():
        label = given.get(name, "settings cell")
        check(name, value, f"{name} =" if label == "settings cell" else label, rules)
    return type(settings)(**values), given


def platform_name() -> str:
    """kaggle, colab or local; Kaggle first, since its image derives from Colab's."""
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        return "kaggle"
    return "colab" if "COLAB_RELEASE_TAG" in os.environ else "local"


def let_device_decide(settings: object) -> tuple[object, dict[str, str]]:
    """Fills what was left open, from the device and the platform; returns also why, for each."""
    device = pick_device(settings.device)
    dtype = pick_dtype(settings.amp, device)
    where = platform_name()
    roots = {
        "kaggle": ("/kaggle/working", "/kaggle/temp"),
        "colab": ("/content", "/content"),
        "local": ("runs", "."),
    }
    amp = {None: "off", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    by_device = {"device": str(device), "amp": amp} | default_recipe(device, dtype)
    by_platform = {"out": f"{roots[where][0]}/{PROGRAM}", "data_dir": f"{roots[where][1]}/data"}
    reasons = dict.fromkeys(by_device, f"decided by the {device.type} device")
    reasons |= dict.fromkeys(by_platform, f"decided by the {where} platform")
    found = {n: v for n, v in (by_device | by_platform).items() if getattr(settings, n) in (None, "auto")}
    return replace(settings, **found), {name: reasons[name] for name in found}


# %% Why everything runs side by side [markdown] tags=["shared"]
# ### The whole run
#
# For each seed: the gate under test first, then every policy it is compared with, in the same process, from
# the same initial weights. `random` repeats, epoch by epoch, the activated counts that AST realised; `short`
# is plain training of as many epochs as AST paid for, its learning rate scheduled to match.
# "Saved" is against the full run beside it, or else labelled as the unit model's word.

# %% The whole run tags=["shared"]
FREE_ON_RESUME = {"out", "resume", "time_limit", "checkpoint_seconds", "workers"}
OUTPUTS = (
    "config.json metrics.jsonl events.jsonl summary.json curves.png model.pt samples.npz skipped_images.txt "
    "checkpoints"
).split()


def make_room(out: Path) -> None:
    """Renames a folder that holds a run to <out>-1, -2, …, and makes a new one. Raises BadInput."""
    try:
        if any((out / name).exists() for name in OUTPUTS):
            number = next(i for i in range(1, 10**6) if not out.with_name(f"{out.name}-{i}").exists())
            out.rename(out.with_name(f"{out.name}-{number}"))
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"--out {out}: expected a folder that can be made and written ({error}); choose another"
        ) from error


def take_up(settings: object, given: dict[str, str]) -> object:
    """The settings of the run that `--resume` goes on with. Raises BadInput where a given setting differs."""
    config = Path(settings.out) / "config.json"
    if not config.exists():
        return settings
    try:
        stored = json.loads(config.read_text(encoding="utf-8"))["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{config}: expected the settings of a run; start afresh without --resume") from error
    for name, how in given.items():
        value = getattr(settings, name)
        left_open = value is None or (name in ("device", "amp") and value == "auto")
        free = name in FREE_ON_RESUME or how.startswith("--profile ")  # the run's own profile counts
        if not free and not left_open and value != stored.get(name, value):
            raise BadInput(
                f"{how} {value}: expected {stored[name]}, as in the run that "
                f"{settings.out} holds; leave it out, or start afresh without --resume"
            )
    return replace(
        settings, **{n: v for n, v in stored.items() if n not in FREE_ON_RESUME and hasattr(settings, n)}
    )


class Run:
    """All policies and seeds of one call, with everything that is written about them."""

    def __init__(
        self, settings: object, say: Callable[[str], None], listeners: Iterable[Callable], controls: Controls
    ):
        self.settings, self.say, self.controls = settings, say, controls
        self.out = Path(settings.out)
        self.records = Records(self.out)
        self.listeners = [self.records, *listeners]
        self.finished: list[dict] = []
        self.trainer: AdaptiveSparseTrainer | None = None
        self.skipped: dict[str, None] = {}  # unreadable files and why, in the order they were met
        self.references: dict[str, dict] = {}
        learned = settings.gate in LEARNED
        others = [] if settings.compare in ("", "none") else settings.compare.split(",")
        self.policies = list(dict.fromkeys(["ast" if learned else settings.gate, *others]))
        self.seeds = list(dict.fromkeys(int(seed) for seed in settings.seeds.split(",")))

    def execute(self, ready: "Ready | None" = None) -> dict:
        """Trains what is not finished yet and returns the summary."""
        stored = load_checkpoint(self.out / "checkpoints", self.say) if self.settings.resume else None
        fresh = ready is None or ready.settings != self.settings
        self.data = load_data(self.settings, self.say) if fresh else ready.data
        what = [self.data.name, len(self.data.train_labels)]
        if stored and stored["data"] != what:
            raise BadInput(
                f"--data: expected {stored['data']} as in {self.out}, found {what}; give the same data"
            )
        if self.settings.resume and stored is None:
            self.say(f"no checkpoint to resume in {self.out}: starting afresh")
        if stored is None:
            self._refuse_early()
            make_room(self.out)
            config = {"program": PROGRAM, "settings": asdict(self.settings)}
            write_whole(self.out / "config.json", json.dumps(config, indent=2).encode())
        self.records.cut(stored["records"] if stored else {})
        self.finished = stored["finished"] if stored else []
        self.references = stored["references"] if stored else {}
        self.skipped = dict.fromkeys([*self.data.unreadable, *(stored["skipped"] if stored else [])])
        self.say(describe(self.data))
        for listener in self.listeners:
            listener("plan", self._work())
        done = {(r["policy"], r["seed"]) for r in self.finished}
        for seed in self.seeds:
            for policy in self.policies:
                if (policy, seed) not in done and not self.controls.stopping():
                    self._train(policy, seed, stored)
                    stored = None
        if len(self.finished) == len(self.policies) * len(self.seeds):
            self._refer()
        return self.close()

    def _refer(self) -> None:
        """Measures the references; all else is on the disk before, since they may take a while."""
        for name, reference in REFERENCES.items():
            self.close()
            if name not in self.references and not self.controls.stopping():
                found = reference(self.settings, self.data, self.say, self.controls.stopping)
                if not self.controls.stopping():
                    self.references[name] = found
                    self.save()

    def _work(self) -> dict:
        """How many samples each policy is expected to train on, a seed."""
        config, epochs = ASTConfig.from_settings(self.settings), self.settings.epochs
        schedules = {p: Schedule.of(config, epochs, phases=p != "rs2") for p in self.policies}
        rates = {
            p: sum(1.0 if p == "full" else schedule.rate(e, config.target_activation) for e in range(epochs))
            for p, schedule in schedules.items()
        }
        n = len(self.data.train_labels)
        done = [(result["policy"], result["seed"]) for result in self.finished]
        return {"work": {p: n * rate for p, rate in rates.items()}, "seeds": self.seeds, "done": done}

    def _refuse_early(self) -> None:
        """Raises BadInput for what would otherwise come out only once an earlier run has been moved away."""
        Schedule.of(ASTConfig.from_settings(self.settings), self.settings.epochs)
        trainer = self._trainer(self.policies[0], self.seeds[0])
        if trainer.gate_name == "live":
            _, images, _ = next(trainer.train_source.stream([torch.arange(2)]))
            if len(images):
                trainer.refuse_scale(images)

    def _trainer(self, policy: str, seed: int) -> AdaptiveSparseTrainer:
        torch.manual_seed(seed)
        model = build_model(self.settings, len(self.data.classes))
        optimizer, criterion = recipe(self.settings, model)
        config = ASTConfig.from_settings(self.settings)
        if policy == "short":
            phases = dict.fromkeys(("warmup_epochs", "ramp_epochs", "anneal_epochs"), 0)
            config = replace(config, gate="full", epochs=self._epochs_paid_for(seed), **phases)
        elif policy != "ast":
            config = replace(config, gate=policy)
        return AdaptiveSparseTrainer(
            model,
            *sources(self.settings, self.data, torch.device(config.device)),
            config,
            optimizer,
            criterion,
            policy=policy,
            listeners=self.listeners,
            controls=self.controls,
            rates=self._rates_of_ast(seed) if policy == "random" else None,
            seed=seed,
            save=self.save,
            save_seconds=self.settings.checkpoint_seconds,
        )

    def _train(self, policy: str, seed: int, stored: dict | None) -> None:
        self.trainer = self._trainer(policy, seed)
        if stored and stored["trainer"] is not None:
            self.trainer.load_state_dict(stored["trainer"])
        try:
            result = self.trainer.train()
        finally:
            self._list_skipped()
        if policy == self.policies[0] and seed == self.seeds[0]:
            buffer = io.BytesIO()
            torch.save(
                {name: value.cpu() for name, value in self.trainer.judged.state_dict().items()}, buffer
            )
            write_whole(self.out / "model.pt", buffer.getvalue())
            buffer = io.BytesIO()
            np.savez_compressed(buffer, times_activated=self.trainer.times_activated.numpy())
            write_whole(self.out / "samples.npz", buffer.getvalue())
        if result["complete"]:
            self.finished.append(result)
            self.trainer = None
            self.save()
            write_whole(self.out / "summary.json", json.dumps(self.summary(), indent=2).encode())

    def _rates_of_ast(self, seed: int) -> list[float] | None:
        rows = [r["epochs"] for r in self.finished if r["policy"] == "ast" and r["seed"] == seed]
        return [row["activated"] / row["candidates"] for row in rows[0]] if rows else None

    def _epochs_paid_for(self, seed: int) -> int:
        """How many full epochs train on as many samples as AST did, or as it is expected to."""
        config, epochs = ASTConfig.from_settings(self.settings), self.settings.epochs
        planned = Schedule.of(config, epochs)
        rates = self._rates_of_ast(seed) or [planned.rate(e, config.target_activation) for e in range(epochs)]
        return max(1, round(sum(rates)))

    def _list_skipped(self) -> None:
        """Writes skipped_images.txt, a line a file that could not be read, if there is any."""
        for source in (self.trainer.train_source, self.trainer.val_source) if self.trainer else ():
            self.skipped |= dict.fromkeys(source.unreadable.values())
        if self.skipped:
            lines = "\n".join(self.skipped) + "\n"  # names of files may be no text
            write_whole(self.out / "skipped_images.txt", lines.encode(errors="backslashreplace"))

    def save(self) -> None:
        """Writes a checkpoint of the finished runs and of the one in hand."""
        self._list_skipped()
        trainer = self.trainer.state_dict() if self.trainer else None
        data = [self.data.name, len(self.data.train_labels)]
        state = {"data": data, "records": self.records.sizes(), "finished": self.finished, "trainer": trainer}
        state |= {"references": self.references, "skipped": list(self.skipped)}
        save_checkpoint(self.out / "checkpoints", state)

    def results(self) -> list[dict]:
        """Finished runs, and the one in hand if it got anywhere."""
        running = [self.trainer.results()] if self.trainer and self.trainer.rows else []
        return self.finished + running

    def summary(self) -> dict:
        """The content of summary.json."""
        results = self.results()
        policies = {p: mean_result([r for r in results if r["policy"] == p]) for p in self.policies}
        policies = {p: value for p, value in policies.items() if value}
        complete = len(self.finished) == len(self.policies) * len(self.seeds)
        complete &= len(self.references) == len(REFERENCES)
        return {
            "program": PROGRAM,
            "dataset": self.data.name,
            "synthetic": self.data.synthetic,
            "n_train": len(self.data.train_labels),
            "n_val": len(self.data.val_labels),
            "model": self.settings.model,
            "device": device_name(self.settings.device),
            "platform": f"{platform_name()}, {platform.system()}, Python {platform.python_version()}",
            "torch": torch.__version__,
            "out": str(self.out),
            "seeds": self.seeds,
            "complete": complete,
            "stopped_by": None if complete else self.controls.stop,
            "changes_by_hand": self.records.changes(),
            "skipped_images": len(self.skipped),
            "policies": policies,
            "references": self.references,
            "measured": measured({p: v for p, v in policies.items() if self._whole(p)}, self.policies[0]),
        }

    def _whole(self, policy: str) -> bool:
        return sum(r["policy"] == policy for r in self.finished) == len(self.seeds)

    def close(self) -> dict:
        """Writes summary.json and curves.png, and returns the summary."""
        summary, results = self.summary(), self.results()
        write_whole(self.out / "summary.json", json.dumps(summary, indent=2).encode())
        if results:
            mark = " (synthetic images)" if self.data.synthetic else ""
            title = f"{self.settings.model} on {self.data.name}{mark}, {summary['n_train']} samples, "
            title += summary["device"]
            curves(
                results, title + ("" if summary["complete"] else ": stopped early"), self.out / "curves.png"
            )
        return summary


MEANS = (
    "final_accuracy best_accuracy activation_rate candidates activated train_seconds total_seconds flops "
    "unit_energy"
).split()


def mean_result(results: list[dict]) -> dict | None:
    """One policy's entry in the summary: means over its finished seeds, or over what there is."""
    results = [r for r in results if r["complete"]] or results
    if not results:
        return None
    entry = {name: float(np.mean([r[name] for r in results])) for name in MEANS}
    joules = [r["joules"] for r in results]
    peaks = [r["peak_memory_mib"] for r in results if r["peak_memory_mib"] is not None]
    phases = {}
    for phase in PHASES:
        accounts = [r["phases"][phase] for r in results]
        phases[phase] = {k: float(np.mean([a[k] for a in accounts])) for k in accounts[0] if k != "joules"}
        known = [a["joules"] for a in accounts if a["joules"] is not None]
        phases[phase]["joules"] = float(np.mean(known)) if known else None
    return entry | {
        "accuracy_per_seed": {str(r["seed"]): r["final_accuracy"] for r in results},
        "energy_savings_percent": float(np.mean([r["energy_savings"] for r in results])),
        "joules": None if None in joules else float(np.mean(joules)),
        "joules_method": results[0]["joules_method"],
        "peak_memory_mib": max(peaks, default=None),
        "flops_per_sample": results[0]["flops_per_sample"],
        "flops_uncounted": results[0]["flops_uncounted"],
        "phases": phases,
    }


def measured(policies: dict[str, dict], main: str) -> dict[str, float | None]:
    """What the first policy saved and lost against those run beside it; None where none was."""
    ast, full, random, short = (policies.get(name) for name in (main, "full", "random", "short"))

    def against(other: dict | None, name: str, compare: Callable[[float, float], float]) -> float | None:
        if ast is None or other is None or other is ast or ast[name] is None or other[name] is None:
            return None
        return compare(ast[name], other[name])

    def saved(a: float, b: float) -> float:
        return 100 * (1 - a / b)

    return {
        "speedup_vs_full": against(full, "train_seconds", lambda a, b: b / a),
        "total_speedup_vs_full": against(full, "total_seconds", lambda a, b: b / a),
        "flops_saved_percent_vs_full": against(full, "flops", saved),
        "joules_saved_percent_vs_full": against(full, "joules", saved),
        "accuracy_minus_full": against(full, "final_accuracy", lambda a, b: a - b),
        "accuracy_minus_random": against(random, "final_accuracy", lambda a, b: a - b),
        "accuracy_minus_short": against(short, "final_accuracy", lambda a, b: a - b),
    }


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return (
        f"cpu ({name[1] if name else platform.processor() or 'unknown'}, {torch.get_num_threads()} threads)"
    )


def describe(data: object) -> str:
    """One line on what is trained on."""
    mark = "SYNTHETIC images, made by this program: " if data.synthetic else ""
    skipped = f", {len(data.unreadable)} unreadable images skipped" if data.unreadable else ""
    return (
        f"data: {mark}{data.name}, {len(data.train_labels)} training and {len(data.val_labels)} validation "
        f"images of {len(data.classes)} classes, from {data.source}{skipped}"
    )


def report(summary: dict) -> str:
    """The table at the end: every policy side by side, then what was measured, whichever way it fell."""
    lines = [
        "",
        f"{'policy':<7} {'accuracy':>9} {'activated':>10} {'TFLOPs':>8} {'training':>10} {'total':>9} "
        f"{'unit-model saved':>17} {'joules':>9}",
    ]
    for name, p in summary["policies"].items():
        joules = "-" if p["joules"] is None else f"{p['joules']:.0f}"
        accuracy = "-" if p["final_accuracy"] is None else f"{p['final_accuracy']:.2f} %"
        lines.append(
            f"{name:<7} {accuracy:>9} {100 * p['activation_rate']:>8.1f} % {p['flops'] / 1e12:>8.1f} "
            f"{p['train_seconds']:>8.1f} s {p['total_seconds']:>7.1f} s "
            f"{p['energy_savings_percent']:>15.1f} % {joules:>9}"
        )
    first, m = next(iter(summary["policies"]), "ast"), summary["measured"]
    lines.append("")
    if m["speedup_vs_full"] is not None:
        lines.append(
            f"measured against full training: {m['speedup_vs_full']:.2f} times its training speed "
            f"({m['total_speedup_vs_full']:.2f} times with evaluation and checkpoints), "
            f"{m['flops_saved_percent_vs_full']:.1f} % FLOPs saved, "
            f"{m['accuracy_minus_full']:+.2f} points of accuracy"
        )
    else:
        lines.append(
            "no full run beside it (--compare full): what is saved is the unit model's word, unmeasured"
        )
    rivals = {"random": "random selection of as many samples", "short": "plain training of as few epochs"}
    for name, words in rivals.items():
        if (ahead := m[f"accuracy_minus_{name}"]) is not None:
            lines.append(
                f"{first} is {'ahead of' if ahead > 0 else 'not ahead of'} {words}: {ahead:+.2f} points, "
                f"seeds: {len(summary['seeds'])} (one proves nothing)"
            )
    lines += [f"{name}: {r['words']}" for name, r in summary["references"].items() if r["words"]]
    if summary["skipped_images"]:
        lines.append(f"unreadable images skipped: {summary['skipped_images']} (skipped_images.txt)")
    if summary["changes_by_hand"]:
        lines.append(
            f"changes made by hand while it trained: {summary['changes_by_hand']} (events.jsonl), so the "
            "policies did not run under the same settings"
        )
    if summary["synthetic"]:
        lines.append("SYNTHETIC data: these figures say nothing about real images")
    if not summary["complete"]:
        lines.append(
            f"stopped by {summary['stopped_by']}: go on with --resume (in a notebook: settings.resume = True)"
        )
    return "\n".join(lines)


# %% From a person's settings to results tags=["shared"]
def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory, not to hand it back after a step and fault it in again in the next.

    On a CPU that took a third of the time of the first policy in a process, and of no other, so the
    comparison was unfair to the gate under test. Does nothing without glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        glibc = ctypes.CDLL("libc.so.6")
        glibc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD, bytes
        glibc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD, bytes


def settle(settings: object, arguments: Iterable[str] = ()) -> tuple[object, dict[str, str], dict[str, str]]:
    """The settings that will run; how each was given, and why the device decided it. Raises BadInput."""
    settings, given = resolve(settings, list(arguments), dict(os.environ))
    if settings.resume:
        settings = take_up(replace(settings, out=settings.out or let_device_decide(settings)[0].out), given)
    settings, decided = let_device_decide(settings)
    return settings, given, decided


def run(
    settings: object,
    arguments: Iterable[str] = (),
    listeners: Iterable[Callable] | None = None,
    controls: Controls | None = None,
    say: Callable[[str], None] = tqdm.write,
    ready: "Ready | None" = None,
) -> dict:
    """Settles the settings, trains every policy and seed, writes the output folder, and returns the summary.

    listeners: called with (event, data), in the thread that trains; a printed table if None. say: prints a
    line. ready: the data, if it was loaded for these settings before. Raises BadInput, in one sentence, for
    anything a person can mend.
    """
    settings, given, decided = settle(settings, arguments)
    keep_freed_memory()
    controls = controls or Controls()
    if settings.time_limit:
        controls.deadline = time.monotonic() + 60 * settings.time_limit
    finished = Path(settings.out) / "summary.json"
    if settings.resume and finished.exists():
        summary = {"complete": False}
        with contextlib.suppress(ValueError):  # a damaged summary is written anew
            summary = json.loads(finished.read_text(encoding="utf-8"))
        if summary["complete"]:
            say(f"the run in {settings.out} is finished: nothing to do")
            return summary
    say(f"{PROGRAM}: torch {torch.__version__} on {device_name(settings.device)}")
    for name, value in asdict(settings).items():
        how = given.get(name) or decided.get(name)
        say(f"  {name} = {'the default' if value is None else value}" + (f"  ({how})" if how else ""))
    listeners = [print_table(say=say)] if listeners is None else listeners
    summary = Run(settings, say, listeners, controls).execute(ready)
    say(report(summary))
    say(f"\nresults: {settings.out}")
    return summary


def main() -> int:
    """The script: exit status 0 done or stopped by the time limit, 2 bad input, 130 or 143 after a signal."""
    controls, codes = Controls(), {"Ctrl-C": 130, "SIGTERM": 143}

    def stop(number: int, frame: object) -> None:
        controls.stop = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
        os.write(2, f"{controls.stop}: saving and stopping; once more to stop at once\n".encode())

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        run(settings, sys.argv[1:], controls=controls)
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    return codes.get(controls.stop, 0)


# %% Why a worker and a pump [markdown] tags=["shared"]
# ### A run you can talk to
#
# A cell that trains keeps the kernel busy: no slider is heard until it ends. A cell that returns at once is
# no better, since "Run all" would go on before there is anything to show. So a worker thread trains, and the
# cell awaits a *pump* that lets widget messages in, and holds back the cells that come next. The worker
# touches no widget: it appends to lists and reads `Controls`.

# %% The worker and the pump tags=["shared"]
PUMP_SECONDS = 0.1  # between two looks at the sliders


def kernel() -> object | None:
    """The ipykernel that runs this notebook; None in a script."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)
    return getattr(get_ipython(), "kernel", None)


class Worker(threading.Thread):
    """Runs `work` beside the notebook. A daemon, so that a restarted kernel never waits for it."""

    NAME = "adaptive sparse training"

    def __init__(self, work: Callable[[], dict]):
        super().__init__(daemon=True, name=self.NAME)
        self.work, self.summary, self.error = work, None, None
        self.start()

    def run(self) -> None:
        try:
            self.summary = self.work()
        except BaseException as error:  # raised again in the cell, by `result`
            self.error = error

    def result(self) -> dict:
        """What `work` returned; raises what it raised, with its traceback."""
        self.join()
        if self.error is not None:
            raise self.error
        return self.summary


class Pump:
    """Lets widget messages in while a cell awaits it; cells that were asked for meanwhile run afterwards.

    ipykernel before 7 (Colab, Kaggle) reads messages only between cells, so we turn its loop ourselves and
    keep execute requests for later. From 7 on it reads them while a cell awaits; without a kernel there is
    nothing to do.
    """

    def __init__(self):
        self.kernel = kernel()
        if not hasattr(self.kernel, "msg_queue") or not hasattr(self.kernel, "schedule_dispatch"):
            self.kernel = None
        self.held: list[tuple] = []  # as they lay in the queue

    async def __aenter__(self) -> "Pump":
        if self.kernel:
            ident = getattr(self.kernel, "_parent_ident", None)
            self.cell = (ident.get("shell") if hasattr(ident, "get") else ident, self.kernel.get_parent())
        return self

    async def __call__(self) -> None:
        """Waits for `PUMP_SECONDS`, and handles what has arrived."""
        if self.kernel and self.kernel.msg_queue.qsize():
            sys.stdout.flush()  # what is printed belongs to whose message is in hand when it is sent
            sys.stderr.flush()
            for _ in range(min(10, self.kernel.msg_queue.qsize())):  # a drag sends several
                _, dispatch, arguments = self.kernel.msg_queue.get_nowait()
                if self._executes(arguments):
                    self.held.append((dispatch, *arguments))
                else:
                    await dispatch(*arguments)
            self.kernel.set_parent(*self.cell)  # output belongs to this cell, not to the slider's message
        await asyncio.sleep(PUMP_SECONDS)

    async def __aexit__(self, *error: object) -> None:
        if self.kernel:
            while self.kernel.msg_queue.qsize():  # what came later stays later
                _, dispatch, arguments = self.kernel.msg_queue.get_nowait()
                self.held.append((dispatch, *arguments))
            for request in self.held:
                self.kernel.schedule_dispatch(*request)

    def _executes(self, arguments: tuple) -> bool:
        """Whether a queued message asks for a cell; unread, since whoever reads it tells that it is busy."""
        if not arguments:
            return False
        frames = self.kernel.session.feed_identities(arguments[0], copy=False)[1]  # signature, header, …
        return json.loads(frames[1].bytes)["msg_type"] == "execute_request"


# %% Why a monitor [markdown] tags=["shared"]
# ### The dashboard
#
# The *monitor* is a listener in the worker: it keeps what the picture needs, and nothing more. Every second
# the cell reads it, updates the numbers, and draws the picture anew where that is due. Drawing takes
# time from training, so a picture that takes long is drawn less often: it never costs more than a small
# share, whatever the machine.

# %% The monitor tags=["shared"]
POINTS = 400  # a policy, along the epochs; a picture is hardly wider


@dataclass
class Point:
    """The state of a run after a decision of the gate; counts are of the whole run so far."""

    epochs: float
    candidates: int
    activated: int
    rate: float  # since the point before
    target: float
    threshold: float = math.nan
    scoring_flops: float = 0.0
    joules: float = math.nan


@dataclass
class Trace:
    """What one policy with one seed has done so far."""

    policy: str
    seed: int
    epochs: int
    n: int
    rows: list[dict]
    begun: tuple[int, int] = (0, 0)  # decided and chosen of the epoch in hand, in the session before
    points: list[Point] = field(default_factory=list)
    changes: list[tuple[float, float, str]] = field(default_factory=list)  # the trainer's own list
    candidates: int = 0
    activated: int = 0
    latest: dict = field(default_factory=dict)  # the newest chunk
    began: tuple[float, float] | None = None  # progress and seconds at this session's first chunk

    def __post_init__(self):
        for row in self.rows:  # of the session before
            self.candidates += row["candidates"]
            self.activated += row["activated"]
            theta = math.nan if row["threshold"] is None else row["threshold"]
            rates = row["activation_rate"], row["target_activation"]
            self.points.append(Point(row["epoch"], self.candidates, self.activated, *rates, theta))
        self.candidates += self.begun[0]
        self.activated += self.begun[1]

    def decided(self, data: dict) -> None:
        self.candidates += data["offered"]
        self.activated += data["activated"]
        self.latest = data
        self.began = self.began or (data["progress"], data["seconds"])
        before = self.points[-1] if self.points else Point(0, 0, 0, math.nan, data["rate"])
        offered = self.candidates - before.candidates
        if offered < self.epochs * self.n / POINTS and before.target == data["rate"]:
            return
        theta = getattr(data["gate"], "threshold", None)
        self.points.append(
            Point(
                len(self.rows) + data["candidates"] / data["n"],
                self.candidates,
                self.activated,
                (self.activated - before.activated) / offered,
                data["rate"],
                math.nan if theta is None else theta,
                data["scoring_flops"],
                math.nan if data["joules"] is None else data["joules"],
            )
        )

    @property
    def seconds(self) -> float:
        return self.latest.get("seconds", self.rows[-1]["elapsed_seconds"] if self.rows else 0.0)

    def flops(self, point: Point) -> tuple[float, float]:
        """FLOPs of training and scoring up to a point, and of training on all its candidates."""
        each = self.latest.get("flops_per_sample", {}).get("training", 0.0)
        return point.activated * each + point.scoring_flops, point.candidates * each

    def seconds_saved(self) -> float | None:
        """Percent of training seconds saved, had every candidate cost what it cost in this run's warm-up."""
        full = [row for row in self.rows if row["phase"] == "warmup"]
        if not full or not self.latest:
            return None
        trained = sum(row["seconds"] - row["scoring_seconds"] for row in full)
        pace = trained / sum(row["candidates"] for row in full)
        return 100 * (1 - self.latest["train_seconds"] / (pace * self.candidates))


class Monitor:
    """A listener that remembers what the dashboard shows; written by the worker, read by the notebook."""

    def __init__(self):
        self.work: dict[str, float] = {}  # samples that each policy is expected to train on, a seed
        self.left: list[tuple[str, int]] = []  # policies and seeds not yet begun
        self.traces: list[Trace] = []
        self.scores: tuple[np.ndarray, float] | None = None  # significances, and θ as a rank among them
        self.looked = -math.inf  # when `scores` was taken, on time.monotonic()'s clock

    def __call__(self, event: str, data: dict) -> None:
        if event == "plan":
            self.work = data["work"]
            self.left = [(p, s) for s in data["seeds"] for p in self.work if (p, s) not in data["done"]]
        elif event == "start":
            names = ("policy", "seed", "epochs", "n", "rows", "changes", "begun")
            self.traces.append(Trace(**{name: data[name] for name in names if name in data}))
            self.left = [run for run in self.left if run != (data["policy"], data["seed"])]
        elif event == "chunk":
            self.traces[-1].decided(data)
            self._look(data["gate"])
        elif event == "epoch":
            self.traces[-1].rows.append(data)

    def _look(self, gate: object) -> None:
        if time.monotonic() - self.looked >= 1 and len(scores := scores_of(gate)):
            theta = getattr(gate, "threshold", None)
            theta = math.nan if theta is None else theta
            self.scores, self.looked = (scores.numpy().copy(), theta), time.monotonic()

    @property
    def now(self) -> Trace | None:
        """The run in hand, or the last one."""
        return self.traces[-1] if self.traces else None

    @property
    def main(self) -> Trace | None:
        """The newest run of the gate under test: the first policy of its seed."""
        seeds = [trace for trace in self.traces if trace.seed == self.traces[-1].seed]
        return seeds[0] if seeds else None

    def progress(self) -> tuple[float, float | None]:
        """Share of all the work that is done, and the seconds that the rest takes at this session's pace."""
        done = spent = this = 0.0
        for trace in self.traces:
            work, at = self.work.get(trace.policy, 0.0), trace.latest.get("progress", 0.0)
            at = 1.0 if len(trace.rows) == trace.epochs else at
            began = trace.began or (0.0, 0.0)
            done, this = done + work * at, this + work * (at - began[0])
            spent += trace.seconds - began[1]
        rest = sum(self.work.get(policy, 0.0) for policy, _ in self.left)
        rest += sum(self.work.get(t.policy, 0.0) for t in self.traces) - done
        share = done / (done + rest) if done + rest else 0.0
        return share, spent / this * rest if this > 0 and spent > 3 else None


# %% The live picture tags=["shared"]
LIVE_STYLE = STYLE | {
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "lines.linewidth": 1.5,
    "figure.constrained_layout.use": False,  # which would take half of the drawing time
}


def png_of(figure: Figure) -> bytes:
    """Draws the figure; returns a PNG with a palette of at most 256 colours, a third of the size."""
    figure.canvas.draw()
    return encode(figure.canvas)


def encode(canvas: FigureCanvasAgg) -> bytes:
    """What is on the canvas, as such a PNG."""
    picture = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")
    buffer = io.BytesIO()
    picture.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(buffer, "png")
    return buffer.getvalue()


def nice(value: float) -> float:
    """The next of …, 1, 1.4, 2, 2.8, 4, …: limits that rarely move, so that axes are rarely drawn anew."""
    return 2.0 ** (math.ceil(2 * math.log2(max(value, 1e-9))) / 2)


PANELS = {  # title, x and y of each; the last one where there is a sensor
    "accuracy": ("Validation accuracy", "seconds", "accuracy (%)"),
    "rate": ("Activation rate (dotted: target)", "epochs", "activated / candidates"),
    "threshold": ("Threshold", "epochs", "θ (rank of the significance)"),
    "energy": ("Unit energy (a model, not joules)", "epochs", "thousand units"),
    "flops": ("FLOPs of training and scoring", "epochs", "TFLOPs"),
    "histogram": ("Significance of the samples", "significance", "samples (%)"),
    "joules": ("Measured energy", "epochs", "joules"),
}


class LivePicture:
    """The panels of a run in progress, drawn again and again on one figure.

    Axes and their numbers are most of the drawing, so they are kept as a background, each until its limits
    move, and only the data is drawn onto it.
    """

    def __init__(self, monitor: Monitor):
        """Has a panel for joules if the monitor has seen any."""
        joules = monitor.now is not None and monitor.now.latest.get("joules") is not None
        with matplotlib.rc_context(LIVE_STYLE):
            self.figure = Figure(figsize=(12.6 if joules else 9.8, 4.8), dpi=100)
            FigureCanvasAgg(self.figure)
            space = {"left": 0.06, "right": 0.985, "top": 0.94, "bottom": 0.1, "hspace": 0.46, "wspace": 0.3}
            grid = self.figure.add_gridspec(2, 4 if joules else 3, **space)
            cells = [grid[i // 3, i % 3] for i in range(6)] + ([grid[:, 3]] if joules else [])
            self.axes = {n: self.figure.add_subplot(c) for n, c in zip(PANELS, cells, strict=False)}
            for name, axes in self.axes.items():
                axes.autoscale(False)
                axes.set(**dict(zip(("title", "xlabel", "ylabel"), PANELS[name], strict=True)))
        self.limits: dict[str, tuple[float, float, float, float]] = {}  # x from, to, y from, to
        self.sheets: dict[str, np.ndarray] = {}  # each panel's empty axes, uint8 [height, width, 4]

    def draw(self, monitor: Monitor) -> bytes:
        """The PNG of what the monitor knows now."""
        self.furnish(self.find_limits(monitor))
        canvas = self.figure.canvas
        np.copyto(np.asarray(canvas.buffer_rgba()), self.background)
        with matplotlib.rc_context(LIVE_STYLE):
            for name, axes in self.axes.items():
                getattr(self, name)(axes, monitor)
                for artist in [*axes.collections, *axes.patches, *axes.lines, *axes.texts]:
                    axes.draw_artist(artist)
                    artist.remove()
        return encode(canvas)

    def furnish(self, limits: dict[str, tuple[float, float, float, float]]) -> None:
        """Draws the empty axes whose limits moved, each on a white sheet, and lays the sheets together."""
        canvas, renderer = self.figure.canvas, self.figure.canvas.get_renderer()
        moved = [name for name in self.axes if limits[name] != self.limits.get(name)]
        with matplotlib.rc_context(LIVE_STYLE):
            for name in moved:
                self.axes[name].set(xlim=limits[name][:2], ylim=limits[name][2:])
                self.figure.patch.draw(renderer)
                self.axes[name].draw(renderer)
                self.sheets[name] = np.array(canvas.buffer_rgba())
        if moved:
            self.background, self.limits = np.minimum.reduce(list(self.sheets.values())), limits

    def find_limits(self, monitor: Monitor) -> dict[str, tuple[float, float, float, float]]:
        """What each panel must show; energy and FLOPs reach to what training on everything will cost."""
        trace = monitor.main
        epochs, points = (trace.epochs, trace.points) if trace else (1, [])
        seconds = max([1.0, *(t.seconds for t in monitor.traces)])
        thetas = [p.threshold for p in points if math.isfinite(p.threshold)]
        total = epochs * trace.n if trace else 1000
        full = trace.flops(Point(0, total, 0, 0, 0))[1] if trace else 0.0
        high, tallest = 1.0, 10.0
        if monitor.scores is not None:
            counts, edges = self.bins(monitor.scores[0])
            high, tallest = edges[-1], nice(1.2 * counts.max())
        low, up = math.floor(4 * min([0.0, *thetas])) / 4, math.ceil(4 * max([1.0, *thetas])) / 4
        joules = nice(max([p.joules for p in points if math.isfinite(p.joules)], default=1.0))
        return {
            "accuracy": (0, nice(1.3 * seconds), 0, 100),
            "rate": (0, epochs, 0, 1.04),
            "threshold": (0, epochs, low, up),
            "energy": (0, epochs, 0, 1e-3 * UNIT_ACTIVATED * total),
            "flops": (0, epochs, 0, 1e-12 * full or 1.0),
            "histogram": (0, high, 0, tallest),
            "joules": (0, epochs, 0, joules),
        }

    def accuracy(self, axes: object, monitor: Monitor) -> None:
        shown = [t for t in monitor.traces if t.seed == monitor.now.seed and t.rows] if monitor.now else []
        for trace in shown:
            xy = [(row["elapsed_seconds"], row["val_accuracy"]) for row in trace.rows]
            axes.plot(*zip(*xy, strict=True), ".-", color=COLOURS.get(trace.policy, "black"))
        label_ends(axes, [{"policy": t.policy, "epochs": t.rows} for t in shown], 0.8)
        self.marks(axes, monitor, 1)

    def rate(self, axes: object, monitor: Monitor) -> None:
        points = self.points(monitor)
        x = [p.epochs for p in points]
        axes.plot(x, [p.rate for p in points], color=self.colour(monitor))
        axes.step(x, [p.target for p in points], where="pre", color="black", linestyle=":")
        self.marks(axes, monitor, 0, named=True)

    def threshold(self, axes: object, monitor: Monitor) -> None:
        points = self.points(monitor)
        axes.plot([p.epochs for p in points], [p.threshold for p in points], color=self.colour(monitor))
        self.marks(axes, monitor, 0)

    def energy(self, axes: object, monitor: Monitor) -> None:
        points = self.points(monitor)
        spent = [1e-3 * Account(0.0, p.candidates, p.activated).unit_energy for p in points]
        self.areas(axes, monitor, points, spent, [1e-3 * UNIT_ACTIVATED * p.candidates for p in points])

    def flops(self, axes: object, monitor: Monitor) -> None:
        points = self.points(monitor)
        flops = np.array([monitor.main.flops(p) for p in points]).reshape(-1, 2) * 1e-12
        self.areas(axes, monitor, points, flops[:, 0], flops[:, 1])

    def joules(self, axes: object, monitor: Monitor) -> None:
        points = self.points(monitor)
        axes.plot([p.epochs for p in points], [p.joules for p in points], color=self.colour(monitor))
        self.marks(axes, monitor, 0)

    def histogram(self, axes: object, monitor: Monitor) -> None:
        if monitor.scores is None:
            learns = not monitor.main or monitor.main.policy == "ast"
            words = (
                "scored from the first\nsparse epoch on" if learns else "this gate remembers\nno significance"
            )
            axes.text(0.5, 0.5, words, ha="center", transform=axes.transAxes)
            return
        scores, theta = monitor.scores
        counts, edges = self.bins(scores)
        axes.stairs(counts, edges, fill=True, color=COLOURS["ast"], alpha=0.45)
        if math.isfinite(theta):
            at = min(edges[-1], float(np.quantile(scores, min(1.0, max(0.0, theta)))))
            axes.axvline(at, color="black", linestyle="--")
            side = "right" if at > edges[-1] / 2 else "left"
            height = {"va": "top", "transform": axes.get_xaxis_transform(), "bbox": PLATE}
            axes.text(at, 0.97, f"  θ = {theta:.2f}{', above all' if theta > 1 else ''}  ", ha=side, **height)

    @staticmethod
    def bins(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Percent of the samples in each of 30 bins, and their edges; the last one holds all beyond."""
        high = nice(float(np.quantile(scores, 0.98)))
        counts, edges = np.histogram(np.clip(scores, 0, high), 30, (0, high))
        return 100 * counts / len(scores), edges

    @staticmethod
    def points(monitor: Monitor) -> list[Point]:
        """Those of the gate under test."""
        return list(monitor.main.points) if monitor.main else []

    def areas(self, axes: object, monitor: Monitor, points: list[Point], spent: object, full: object) -> None:
        """What was spent, as an area below what training on everything would have spent by now."""
        x, colour = [p.epochs for p in points], self.colour(monitor)
        axes.fill_between(x, full, color=COLOURS["full"], alpha=0.3, linewidth=0)
        axes.fill_between(x, spent, color=colour, alpha=0.75, linewidth=0)
        style = {"va": "top", "transform": axes.transAxes, "bbox": PLATE}
        axes.text(0.03, 0.95, "training on everything", color="#444444", **style)
        name = monitor.main.policy if monitor.main else "ast"
        if points and full[-1] > 0:
            saved = 100 * (1 - spent[-1] / full[-1])
            name += f": {abs(saved):.0f} % {'less' if saved >= 0 else 'more'} so far"
        axes.text(0.03, 0.84, name, color=colour, **style)
        self.marks(axes, monitor, 0)

    def marks(self, axes: object, monitor: Monitor, x: int, named: bool = False) -> None:
        """A line for every change by hand, at its epochs (x = 0) or seconds (1)."""
        last, traces = -math.inf, [monitor.main] if monitor.main else []
        if x:  # seconds are every policy's own
            traces = [trace for trace in monitor.traces if trace.seed == monitor.now.seed]
        for mark in [mark for trace in traces for mark in list(trace.changes)]:
            axes.axvline(mark[x], color="black", linewidth=0.8, alpha=0.5)
            if named and mark[x] - last > 0.05 * monitor.main.epochs:
                where = {"transform": axes.get_xaxis_transform(), "rotation": 90, "fontsize": 7.5}
                side = "right" if mark[x] > 0.05 * monitor.main.epochs else "left"
                axes.text(mark[x], 0.03, mark[2] + " ", ha=side, va="bottom", **where)
                last = mark[x]

    @staticmethod
    def colour(monitor: Monitor) -> str:
        return COLOURS.get(monitor.main.policy if monitor.main else "ast", "black")


# %% The dashboard tags=["shared"]
def show_png(picture: bytes) -> None:
    """Displays a PNG in a notebook."""
    from IPython.display import Image as Shown  # a script needs no IPython
    from IPython.display import display

    display(Shown(picture))


class Dashboard:
    """Sliders and buttons that write `controls`, panels that show `monitor`; all in the cell's own thread."""

    DRAWING = 1 / 60  # share of the time that drawing may take, on the whole

    def __init__(self, monitor: Monitor, controls: Controls, settings: object):
        import ipywidgets as widgets  # a script needs none

        self.monitor, self.controls = monitor, controls
        self.picture: LivePicture | None = None
        self.told = self.began = time.monotonic()
        self.drawing = 0.0  # seconds of this thread's own time spent on pictures
        self.shown: Trace | None = None
        self.following = False  # whether the values move by themselves
        self.works = True
        layout, wrapped = widgets.Layout(width="300px"), widgets.Layout(flex_flow="row wrap")
        steered = {"layout": layout, "style": {"description_width": "initial"}}
        slider = {"continuous_update": False, "readout_format": ".2f", **steered}
        target, names = settings.target_activation, [*LEARNED, "random"]
        self.target = widgets.FloatSlider(target, min=min(0.02, target), max=1.0, step=0.01, **slider)
        self.target.description = "target activation"
        self.factor = widgets.FloatLogSlider(1.0, min=-1, max=1, step=0.05, **slider)
        self.factor.description = "learning rate ×"
        self.gate = widgets.Dropdown(options=names, description="gate, from the next epoch", **steered)
        self.gate.value = settings.gate if settings.gate in names else None
        self.pause = widgets.Button(description="Pause", icon="pause")
        self.stop = widgets.Button(description="Stop and save", icon="stop")
        self.bar = widgets.FloatProgress(0.0, min=0.0, max=1.0, layout=layout)
        self.words = widgets.HTML("loading the data")
        self.image = widgets.Image(format="png", layout=widgets.Layout(max_width="100%"))
        rows = [
            widgets.HBox([self.target, self.factor, self.gate], layout=wrapped),
            widgets.HBox([self.pause, self.stop, self.bar], layout=wrapped),
            self.words,
            self.image,
        ]
        self.box = widgets.VBox(rows)
        steering = {"target_activation": self.target, "learning_rate_factor": self.factor, "gate": self.gate}
        for control, widget in steering.items():
            widget.observe(functools.partial(self._moved, control), "value")
        self.pause.on_click(lambda button: self._paused(not self.controls.paused))
        self.stop.on_click(lambda button: self._stopped())

    def _moved(self, control: str, change: dict) -> None:
        if not self.following:
            self.controls.set(control, change["new"])

    def _paused(self, paused: bool) -> None:
        self.controls.pause(paused)
        self.pause.description, self.pause.icon = ("Resume", "play") if paused else ("Pause", "pause")

    def _stopped(self) -> None:
        self.controls.ask_stop("stop button")
        self.pause.disabled = self.stop.disabled = True

    def show(self) -> None:
        from IPython.display import display

        self.image.value = LivePicture(self.monitor).draw(self.monitor)
        view = {"model_id": self.box.model_id, "version_major": 2, "version_minor": 0}
        shown = {"application/vnd.jupyter.widget-view+json": view, "text/plain": "the dashboard"}
        self.handle = display(shown, raw=True, display_id=True)  # ipywidgets 7 shows a widget without its id

    def refresh(self) -> None:
        """Numbers once a second, the picture as often as its cost allows; cheap in between."""
        now = time.monotonic()
        if now - self.told < 1:
            return
        self.told = now
        self.bar.value, left = self.monitor.progress()
        self.words.value = self._numbers(left)
        if self.monitor.now is not self.shown:
            self._follow(self.monitor.now)
        due = self.drawing <= self.DRAWING * (now - self.began + 5)  # the first ones on credit
        if self.monitor.now and self.monitor.now.latest and due:
            self._draw()

    def _draw(self) -> None:
        # The worker asks for Python's lock after every operation: let it have it at once, not after 5 ms.
        patience, began = sys.getswitchinterval(), time.thread_time()
        sys.setswitchinterval(1e-4)
        try:
            self.picture = self.picture or LivePicture(self.monitor)
            self.image.value = self.picture.draw(self.monitor)
        finally:
            sys.setswitchinterval(patience)
        self.drawing += time.thread_time() - began

    def _follow(self, trace: Trace) -> None:
        """A policy begins: only the gate under test can be steered, and a resumed run has its own values."""
        self.shown, values = trace, self.controls.values
        self.target.disabled = trace is not self.monitor.main or trace.policy == "full"
        self.gate.disabled = trace is not self.monitor.main or trace.policy != "ast"
        if not self.controls.asked:
            self.following = True
            self.target.value = values["target_activation"] or self.target.value
            self.factor.value = values["learning_rate_factor"]
            self.gate.value = values["gate"] or self.gate.value
            self.following = False

    def _numbers(self, left: float | None) -> str:
        trace = self.monitor.now
        if trace is None or not trace.points:
            return (
                "loading the data" if trace is None else f"<b>{trace.policy}</b>, seed {trace.seed}: begins"
            )
        point, chunk = trace.points[-1], trace.latest
        accuracy = f"{trace.rows[-1]['val_accuracy']:.2f} %" if trace.rows else "after the first epoch"
        theta = f"θ {point.threshold:.3f}" if math.isfinite(point.threshold) else "no θ yet"
        spent, full = trace.flops(point)
        units = Account(0.0, trace.candidates, trace.activated)
        saved = [f"unit energy {unit_saved(units):.1f} % (a model)"]
        saved += [f"FLOPs {100 * (1 - spent / full):.1f} %"] if full else []
        seconds = trace.seconds_saved()
        saved += [] if seconds is None else [f"training time {seconds:.1f} % (at its warm-up's pace)"]
        saved += ["joules: no sensor" if chunk.get("joules") is None else f"{chunk['joules']:.0f} J spent"]
        after = ", then " + ", ".join(policy for policy, _ in self.monitor.left) if self.monitor.left else ""
        state = "<b>paused</b>" if self.controls.paused else f"<b>{trace.policy}</b>, seed {trace.seed}"
        epoch = min(trace.epochs, len(trace.rows) + 1)
        lines = [
            f"{state}: epoch {epoch} of {trace.epochs} ({chunk.get('phase', 'done')}){after} · "
            f"{clock(trace.seconds)} spent{f', about {clock(left)} to go' if left else ''}",
            f"accuracy {accuracy} · activation {point.rate:.3f}, target {point.target:.3f} · {theta}",
            f"saved against full training: {' · '.join(saved)}",
        ]
        return f'<div style="line-height: 1.5; min-height: 4.5em">{"<br>".join(lines)}</div>'

    def finish(self, picture: bytes | None) -> None:
        """Puts a plain picture in the dashboard's place, since a saved notebook keeps no widgets."""
        from IPython.display import HTML
        from IPython.display import Image as Shown

        self.handle.update(Shown(picture) if picture else HTML(""))
        rows = self.box.children
        for widget in (self.box, *rows, *(part for row in rows for part in getattr(row, "children", ()))):
            widget.close()


def widgets_serve() -> bool:
    """Whether there may be somebody to move a slider: a kernel with ipywidgets, not Kaggle's batch run."""
    watched = os.environ.get("KAGGLE_KERNEL_RUN_TYPE", "") != "Batch"
    return watched and kernel() is not None and importlib.util.find_spec("ipywidgets") is not None


async def run_live(settings: object, ready: "Ready | None" = None) -> dict:
    """As `run`, in a notebook: `summary = await run_live(settings)`, with a dashboard where widgets work.

    Interrupting the cell saves and stops. Raises what the run raises, and BadInput while another run is on.
    """
    if any(thread.name == Worker.NAME for thread in threading.enumerate()):
        raise BadInput("another run in this notebook: expected none; wait until it has saved, then run again")
    monitor, controls, lines = Monitor(), Controls(), queue.SimpleQueue()
    listeners = [monitor, print_table(False, lines.put)]
    settled = settle(settings)[0]
    panel = Dashboard(monitor, controls, settled) if widgets_serve() else None
    if panel:
        panel.show()
    worker = Worker(lambda: run(settings, (), listeners, controls, lines.put, ready))

    def tell() -> None:
        while not lines.empty():
            print(lines.get())
        if panel and panel.works:
            try:
                panel.refresh()
            except Exception as error:  # a picture that fails must not end the cell before the training
                panel.works = False
                print(f"the dashboard stands still from here on: {one_line(error)}")

    async with Pump() as pump:
        while worker.is_alive():
            try:
                await pump()
                tell()
            except (KeyboardInterrupt, asyncio.CancelledError):
                if controls.stop:  # a second time: at once
                    raise
                controls.ask_stop("interrupt")
    tell()
    picture = LivePicture(monitor).draw(monitor) if monitor.traces else None
    if panel:
        panel.finish(picture)
    elif picture and kernel():
        show_png(picture)
    summary = worker.result()
    if picture:
        write_whole(Path(summary["out"]) / "dashboard.png", picture)
    return summary


# %% Why lessons [markdown] tags=["shared"]
# ### Lessons
#
# Pictures to look at before and after a run. Each is a function, called from a cell of its own further down,
# so you can call it again with other values.


# %% What lessons share tags=["shared"]
@dataclass
class Ready:
    """Settings as they will run, and the data they name."""

    settings: object
    data: object


def prepare(settings: object) -> Ready:
    """Settles the settings and loads the data, once for the lessons and the run. Raises BadInput."""
    settled = settle(settings)[0]
    ready = Ready(settled, load_data(settled, print))
    print(describe(ready.data))
    return ready


def new_figure(width: float, height: float, columns: int) -> tuple[Figure, np.ndarray]:
    """A figure of one row, inches, and its axes; to be filled under `STYLE`."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def show(figure: Figure, path: Path | None = None) -> None:
    """Displays a figure in a notebook, and writes it to `path`."""
    picture = png_of(figure)
    show_png(picture)
    if path:
        write_whole(path, picture)


def show_images(rows: dict[str, tuple[np.ndarray, list[str]]], path: Path | None = None) -> None:
    """Rows of images, uint8 [k, H, W, 3], each row with a title and a caption an image."""
    columns = max(len(images) for images, _ in rows.values())
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(1.05 * columns + 0.3, 1.75 * len(rows)))
        FigureCanvasAgg(figure)
        for part, (title, (images, captions)) in zip(
            np.ravel(figure.subfigures(len(rows), 1)), rows.items(), strict=True
        ):
            part.suptitle(title, ha="left", x=0.01, fontsize=10)
            for axes, image, caption in itertools.zip_longest(
                part.subplots(1, columns, squeeze=False)[0], images, captions
            ):
                axes.axis("off")
                if image is not None:
                    axes.imshow(image, interpolation="nearest")
                    axes.set_title(caption, fontsize=7.5, loc="center")
        show(figure, path)


# %% Lesson: significance tags=["shared"]
def show_significance(ready: Ready, samples: int = 3000, epochs: int = 5, shown: int = 10) -> None:
    """Trains briefly on some samples, and shows the most and the least significant with their scores."""
    settings, data = ready.settings, ready.data
    some = np.random.default_rng(0).permutation(len(data.train_labels))[:samples]
    images, labels = data.train_images[some], data.train_labels[some]
    torch.manual_seed(0)
    settings = replace(settings, batch_size=32)  # small batches: many steps in little time
    model = build_model(settings, len(data.classes))
    optimizer, criterion = recipe(settings, model)
    config = replace(ASTConfig.from_settings(settings), gate="remembered", warmup_epochs=epochs)
    config = replace(config, ramp_epochs=0, anneal_epochs=0)
    few = {"train_images": images, "train_labels": labels}
    few |= {"val_images": images[:100], "val_labels": labels[:100]}
    trainer = AdaptiveSparseTrainer(
        model,
        *sources(settings, replace(data, **few), torch.device(settings.device)),
        config,
        optimizer,
        criterion,
        listeners=[],
    )
    trainer.train(epochs)
    scores = trainer.gate.memory.significance.numpy()
    order = np.argsort(scores)

    def row(chosen: np.ndarray) -> tuple[np.ndarray, list[str]]:
        return images[chosen], [f"{data.classes[labels[i]][:12]}\n{scores[i]:.2f}" for i in chosen]

    title = f"significant of {len(some)} training images after {epochs} passes: label, remembered loss"
    show_images({f"Most {title}": row(order[::-1][:shown]), f"Least {title}": row(order[:shown])})


# %% Lesson: the controller tags=["shared"]
def step_response(
    target: float, kp: float, ki: float, lost: float, feedforward: bool, chunks: int = 90, size: int = 640
) -> tuple[list[float], list[float]]:
    """Activation rate and θ, chunk by chunk, when the target steps from 0.6 to `target` after a third.

    lost: share of the activated that come back without a finite loss, which no solve can know.
    """
    config = ASTConfig(feedforward=feedforward, adapt_kp=kp, adapt_ki=ki)
    controller, phase = Controller(config), 0.5
    controller.KP, controller.KI = kp, ki
    generator = torch.Generator().manual_seed(0)
    rates, thresholds = [], []
    for chunk in range(chunks):
        a = target if chunk >= chunks // 3 else 0.6
        u = torch.rand(size, generator=generator)
        solved = solve_threshold(u, a * size, a, config.temperature)
        theta = controller.threshold(solved, threshold_slope(u, solved, a, config.temperature))
        taken, phase = systematic(activation_probability(u, theta, a, config.temperature), phase)
        controller.lost = int((torch.rand(len(taken), generator=generator) < lost).sum())
        rates.append((len(taken) - controller.lost) / size)
        thresholds.append(theta)
        controller.update(len(taken), size, a, exact=feedforward)
    return rates, thresholds


def draw_response(target: float = 0.2, kp: float = 0.5, ki: float = 0.2, lost: float = 0.0) -> Figure:
    """The step responses of the solve with PI, and of PI alone."""
    with matplotlib.rc_context(STYLE):
        figure, (left, right) = new_figure(9.6, 3.2, 2)
        for feedforward, colour, name in ((False, "#0072b2", "PI alone"), (True, "#d55e00", "solve and PI")):
            rates, thresholds = step_response(target, kp, ki, lost, feedforward)
            left.plot(rates, color=colour, label=name)
            right.plot(thresholds, color=colour, label=name)
        left.step(
            [0, 30, 89], [0.6, target, target], where="post", color="black", linestyle=":", label="target"
        )
        left.set(
            title="Activation rate, lost samples taken off", xlabel="chunks", ylabel="activated / candidates"
        )
        left.set_ylim(0, 1.04)
        left.legend(loc="upper left", frameon=False, handlelength=1.2, borderaxespad=0.1, fontsize=8)
        right.set(title="Threshold", xlabel="chunks", ylabel="θ (rank of the significance)")
        figure.canvas.draw()
    return figure


def playground() -> None:
    """Sliders for the controller; without widgets, one picture with its defaults."""
    if not widgets_serve():
        show(draw_response())
        return
    import ipywidgets as widgets
    from IPython.display import display

    image = widgets.Image(format="png", layout=widgets.Layout(max_width="100%"))
    spans = {
        "target": (0.2, 0.02, 1.0),
        "kp": (0.5, 0.0, 2.0),
        "ki": (0.2, 0.0, 1.0),
        "lost": (0.0, 0.0, 0.5),
    }
    sliders = {
        name: widgets.FloatSlider(value=value, min=low, max=high, step=0.02, description=name)
        for name, (value, low, high) in spans.items()
    }

    def draw(change: object = None) -> None:
        image.value = png_of(draw_response(**{name: slider.value for name, slider in sliders.items()}))

    for slider in sliders.values():
        slider.observe(draw, "value")
    draw()
    pairs = list(sliders.values())
    display(widgets.VBox([widgets.HBox(pairs[:2]), widgets.HBox(pairs[2:]), image]))


# %% Lessons: what it cost tags=["shared"]
def first_seed(summary: dict) -> dict[str, list[dict]]:
    """The rows of metrics.jsonl of the first seed, by policy."""
    lines = (Path(summary["out"]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["seed"] == summary["seeds"][0]]
    return {
        policy: found
        for policy in summary["policies"]
        if (found := [r for r in rows if r["policy"] == policy])
    }


def show_costs(summary: dict) -> None:
    """Accuracy of every policy over samples, seconds and unit energy."""
    by_policy = first_seed(summary)
    if not by_policy:
        print("no epoch was finished, so there is nothing to compare")
        return
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure(12, 3.6, 3)
        for policy, rows in by_policy.items():
            activated = np.cumsum([row["activated"] for row in rows])
            candidates = np.cumsum([row["candidates"] for row in rows])
            units = UNIT_ACTIVATED * activated + UNIT_SKIPPED * (candidates - activated)
            seconds = [row["elapsed_seconds"] for row in rows]
            for panel, x in zip(axes, (1e-3 * activated, seconds, 1e-3 * units), strict=True):
                panel.plot(x, [row["val_accuracy"] for row in rows], ".-", color=COLOURS.get(policy, "black"))
        labels = ("thousand samples trained on", "seconds", "thousand units of energy (a model)")
        titles = ("Accuracy over samples", "Accuracy over seconds, measured", "Accuracy over unit energy")
        for panel, label, title in zip(axes, labels, titles, strict=True):
            panel.set(xlabel=label, ylabel="validation accuracy (%)", title=title)
            label_ends(panel, [{"policy": p, "epochs": rows} for p, rows in by_policy.items()])
        show(figure, Path(summary["out"]) / "costs.png")


def show_table(summary: dict) -> None:
    """What was measured, a row a policy."""
    from IPython.display import Markdown, display

    head = [
        "policy",
        "accuracy (%)",
        "activated (%)",
        "training (s)",
        "total (s)",
        "TFLOPs",
        "unit energy (thousand)",
    ]
    lines = [" | ".join([*head, "joules"]), " | ".join(["---"] * (len(head) + 1))]
    for name, p in summary["policies"].items():
        joules = "-" if p["joules"] is None else f"{p['joules']:.0f}"
        numbers = p["train_seconds"], p["total_seconds"], p["flops"] / 1e12, p["unit_energy"] / 1e3
        accuracy = "-" if p["final_accuracy"] is None else f"{p['final_accuracy']:.2f}"
        cells = [name, accuracy, f"{100 * p['activation_rate']:.1f}", *(f"{x:.1f}" for x in numbers), joules]
        lines.append(" | ".join(cells))
    print(report(summary).split("\n\n", 1)[-1])
    print("joules:", *{p["joules_method"] for p in summary["policies"].values()})
    display(Markdown("\n".join(lines)))


# %% Lessons: what was chosen tags=["shared"]
def chosen(summary: dict, ready: Ready) -> tuple[np.ndarray, int]:
    """How often each sample was activated in gated epochs, int16 [n], and the number of those epochs.

    Raises BadInput where `ready` holds other data than the run had.
    """
    path, n = Path(summary["out"]) / "samples.npz", len(ready.data.train_labels)
    if not path.exists():  # stopped before any training
        return np.zeros(n, np.int16), 0
    times = np.load(path)["times_activated"]
    if len(times) != n:
        raise BadInput(f"{n} samples: expected the {len(times)} of the run; call prepare(settings) again")
    rows = next(iter(first_seed(summary).values()), [])
    return times, max(sum(row["target_activation"] < 1 for row in rows), int(times.max()))


def show_classes(summary: dict, ready: Ready, most: int = 20) -> None:
    """How often the samples of each class were activated; of many classes, the extremes."""
    times, epochs = chosen(summary, ready)
    if not epochs:
        print("no epoch with a gate was begun, so nothing was chosen")
        return
    labels, names = ready.data.train_labels, ready.data.classes
    share = (
        np.bincount(labels, times, len(names))
        / np.maximum(1, np.bincount(labels, minlength=len(names)))
        / epochs
    )
    order = np.argsort(share)
    if len(order) > most:
        order = np.concatenate([order[: most // 2], order[-most // 2 :]])
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure(7.5, 1.2 + 0.24 * len(order), 1)
        axes.barh(range(len(order)), share[order], color=COLOURS["ast"], height=0.65)
        axes.set_yticks(range(len(order)), [names[i][:24] for i in order])
        axes.axvline(times.mean() / epochs, color="black", linestyle=":")
        axes.text(times.mean() / epochs, len(order) - 0.45, "all classes", ha="center", fontsize=8)
        axes.set(
            title=f"Activation by class, {epochs} epochs with a gate", xlabel="share of its samples, an epoch"
        )
        axes.grid(axis="y", visible=False)
        show(figure, Path(summary["out"]) / "classes.png")


def show_memory(summary: dict) -> None:
    """Quantiles of the remembered significance, epoch by epoch, with the threshold on the same scale."""
    rows = next(iter(first_seed(summary).values()), [])
    known = [row for row in rows if row["significance_quantiles"]]
    if not known:
        print("this gate remembers no significance, or no epoch was finished")
        return
    grid = np.full((21, len(rows)), np.nan)
    for row in known:
        grid[:, row["epoch"] - 1] = row["significance_quantiles"]
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure, (axes,) = new_figure(9, 3.6, 1)
        span = (0.5, len(rows) + 0.5, -0.025, 1.025)
        norm = matplotlib.colors.PowerNorm(0.5, vmin=np.nanmin(grid), vmax=np.nanquantile(grid, 0.98))
        image = axes.imshow(grid, origin="lower", aspect="auto", extent=span, cmap="cividis", norm=norm)
        figure.colorbar(image, label="significance", extend="max")
        thetas = [math.nan if row["threshold"] is None else row["threshold"] for row in rows]
        line = {"path_effects": [matplotlib.patheffects.withStroke(linewidth=4, foreground="black")]}
        axes.plot([row["epoch"] for row in rows], thetas, "o-", color="white", **line)
        whole_epochs = matplotlib.ticker.MaxNLocator(integer=True, min_n_ticks=1)
        axes.xaxis.set_major_locator(whole_epochs)
        low, high = np.nanmin([*thetas, 0.0]) - 0.04, np.nanmax([*thetas, 1.0]) + 0.04
        axes.set(xlabel="epoch", ylabel="rank of the sample", xlim=span[:2], ylim=(low, high))
        axes.set_title("Significance by rank, and the threshold θ (white)")
        show(figure, Path(summary["out"]) / "significance.png")


def show_chosen(summary: dict, ready: Ready, shown: int = 10) -> None:
    """Images that the gate chose least and most often."""
    times, epochs = chosen(summary, ready)
    if not epochs:
        print("no epoch with a gate was begun, so nothing was chosen")
        return
    data, rows = ready.data, {}
    for word, count in (("least", int(times.min())), ("most", int(times.max()))):
        same = np.flatnonzero(times == count)
        some = np.sort(np.random.default_rng(0).permutation(same)[:shown])
        title = f"Chosen {word}: in {count} of {epochs} epochs ({len(same)} images, {len(some)} shown)"
        rows[title] = data.train_images[some], [data.classes[data.train_labels[i]][:12] for i in some]
    show_images(rows, Path(summary["out"]) / "chosen.png")


# %% Look before you train [markdown]
# ## Look before you train
#
# First the data that the settings name: the lessons and the run share it.

# %% Load the data tags=["active-ipynb"]
# ready = prepare(settings)

# %% What significance looks like [markdown]
# ### What significance looks like
#
# A little training is enough to tell apart what is learned at once and what is not. See in it that
# low scores look like a textbook, and that the highest are odd, hidden, or labelled wrongly: a high loss
# alone does not say whether a sample teaches something.

# %% What significance looks like tags=["active-ipynb"]
# show_significance(ready, samples=1000, epochs=3)

# %% Play with the controller [markdown]
# ### Play with the controller
#
# No training here: only the loop that holds the activation rate. See in it that with the solve the rate
# meets a new target at once; that PI alone creeps there, and overshoots where `ki` is large and `kp` 0; and
# that losing samples (`lost`) bends the rate only until the integral has answered.

# %% Play with the controller tags=["active-ipynb"]
# playground()

# %% Run [markdown]
# ## Run
#
# The same call in both forms: a script reads flags and sets an exit status, a notebook takes the settings
# cell. In a notebook, drag *target activation* and watch the rate follow at once and the energy bend; *stop
# and save*, or interrupting the cell, keeps what there is, and the cells below show it.

# %% Run as a script tags=["active-py"]
if __name__ == "__main__":
    sys.exit(main())

# %% Run in a notebook tags=["active-ipynb"]
# summary = await run_live(settings, ready)

# %% What came out [markdown]
# ## What came out
#
# The table of what was measured: AST saved only what its own seconds say beside those of `full`, and choosing
# was worth only what it is ahead of `random`.

# %% What came out tags=["active-ipynb"]
# show_table(summary)

# %% The picture [markdown]
# `curves.png`, also in the output folder: see the activation rate sit on its target, and what of the run was
# really training.


# %% The picture
def show_curves(summary: dict) -> None:
    """Shows a run's curves.png in a notebook."""
    path = Path(summary["out"]) / "curves.png"
    if path.exists():
        show_png(path.read_bytes())
    else:
        print("no epoch was finished, so there is no curve")


# %% The curves tags=["active-ipynb"]
# show_curves(summary)

# %% Over samples, seconds, energy [markdown]
# ### The same accuracy over three costs
#
# See how the order of the policies changes with what one counts: a rule that wins over samples may lose over
# seconds, and unit energy is a model.

# %% Over samples, seconds, energy tags=["active-ipynb"]
# show_costs(summary)

# %% Which classes [markdown]
# ### Which classes were trained on
#
# See which classes the gate finds hard: they are activated more often than the dotted average.

# %% Which classes tags=["active-ipynb"]
# show_classes(summary, ready)

# %% Significance over the epochs [markdown]
# ### Significance over the epochs
#
# See the colours fade as the losses fall, while θ, on the scale of ranks, keeps its meaning.

# %% Significance over the epochs tags=["active-ipynb"]
# show_memory(summary)

# %% Never and always [markdown]
# ### Never chosen, always chosen
#
# See what the gate thinks is learned, and what it keeps coming back to, wrong labels among them.

# %% Never and always tags=["active-ipynb"]
# show_chosen(summary, ready)
