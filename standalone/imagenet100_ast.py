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
# <!-- /badges -->
#
# Fine-tunes a pretrained network on a folder of images, and in each epoch decodes and trains only those that
# still teach the model something. Plain training, plain training cut short to the same cost, and random
# selection run beside it; what that saved is printed, whichever way it falls.
#
# <!-- measured -->
# On 10,000 images of 100 classes at 64 pixels, `resnet18` from scratch, 10 epochs, AST was +0.04 ± 0.25
# points beside plain training cut to its cost, -0.37 ± 0.23 beside random selection (95 % intervals, 3
# seeds; cpu (AMD EPYC, 1 threads), 2026-11-23); fine-tuning was not measured.
# <!-- /measured -->
#
# Name your data in the form "Your run", then Run all. The same file is a script, alone, anywhere. It needs
# torch 2.10 or newer, torchvision, numpy, Pillow, matplotlib and tqdm. It is meant for a GPU such as a T4; a
# CPU takes it too, with smaller images and a smaller network.

# %% Your run [markdown]
# ### Your run
#
# A form in Colab, a few lines to edit elsewhere; 0 leaves a value to the device. For your own images put the
# path of a folder with a folder for each class, or of a `.zip` like it, into `data`. To see it work without
# any data, choose `shapes`, with `weights` set to `none` and `image_size` to 32. Then Run all.

# %% Your run tags=["active-ipynb"]
# data = "auto"  # @param ["auto", "imagenet100", "shapes"] {"allow-input": true}
# weights = "imagenet"  # @param ["imagenet", "none"] {"allow-input": true}
# image_size = 0  # @param {"type": "integer"}
# profile = "accuracy"  # @param ["accuracy", "efficiency"]
# gate = "remembered"  # @param ["remembered", "live", "random"]
# epochs = 0  # @param {"type": "integer"}
# your_run = {"data": data, "weights": weights, "image_size": image_size or None}
# your_run |= {"profile": profile, "gate": gate, "epochs": epochs or None}

# %% The dashboard, still empty [markdown] tags=["shared"]
# ## The dashboard
#
# Run all, and it fills here and below "Run": drag *target activation*, and see the rate follow at once and
# the energy bend. *Stop and save* keeps what there is. Without ipywidgets the run prints a table instead.

# %% The dashboard, still empty tags=["shared", "fold", "active-ipynb"]
# # @title The dashboard, still empty
# import importlib.util
# import os
#
# from IPython.display import display
#
# panel = None
# if importlib.util.find_spec("ipywidgets") and os.environ.get("KAGGLE_KERNEL_RUN_TYPE") != "Batch":
#     import ipywidgets
#
#     words = "importing PyTorch, then reading the data: some seconds; if this stays, a cell below says why"
#     panel = ipywidgets.VBox([ipywidgets.HTML(words)])
#     view = {"model_id": panel.model_id, "version_major": 2, "version_minor": 0}
#     shown = {"application/vnd.jupyter.widget-view+json": view, "text/plain": "the dashboard"}
#     display(shown, raw=True, display_id=panel.model_id)

# %% Imports tags=["fold"]
# @title Imports
from __future__ import annotations

import argparse
import asyncio
import contextlib
import copy
import csv
import ctypes
import functools
import hashlib
import html
import http.client
import importlib.util
import io
import itertools
import json
import lzma
import math
import multiprocessing
import operator
import os
import pickle
import platform
import queue
import random
import re
import shutil
import signal
import struct
import sys
import textwrap
import threading
import time
import tokenize
import urllib.request
import warnings
import zipfile
import zlib
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import Field, InitVar, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import matplotlib
import numpy as np
import torch
import torchvision
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, Subset, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.vision_transformer import interpolate_embeddings
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# %% What can be set tags=["shared", "fold"]
# @title What can be set
SCORED = ("remembered", "live")  # gates that look at significance
GATES = (*SCORED, "random", "full")
RESOLUTIONS = ("full", "progressive")
SIGNIFICANCES = ("loss", "loss+entropy", "loss+intensity", "gradient")


class BadInput(ValueError):
    """Something a person can mend; the message is one sentence. A script ends with exit status 2 on it."""

    def __init__(self, sentence: str):
        super().__init__(printable(" ".join(str(sentence).splitlines())))


def option(default: object, bound: str | tuple, text: str) -> Any:
    """A setting: its default, what it takes, and its help.

    bound: an interval such as "(0, 1]" for numbers, choices or a pattern for words, "" for whatever it is.
    """
    return field(default=default, metadata={"bound": bound, "help": text})


def check(item: Field, value: object, label: str) -> None:
    """Raises BadInput if a field does not take `value`; `label` is how a person wrote the field."""
    bound, kind = item.metadata["bound"], item.type.removesuffix(" | None")
    if value is None and kind != item.type:
        return
    types, expected = KINDS[kind]
    good = isinstance(value, types) and (kind == "bool" or not isinstance(value, bool))
    if isinstance(bound, tuple):
        good, expected = value in bound, "one of " + ", ".join(bound)
    elif bound and kind == "str":
        good = good and re.fullmatch(bound, value)
    elif bound:
        good, expected = good and within(value, bound), f"{expected} in {bound}"
    if not good:
        raise BadInput(f"{label} {value}: expected {expected}: {item.metadata['help']}")


KINDS = {
    "int": (int, "a whole number"),
    "float": (int | float, "a number"),
    "bool": (bool, "1 or 0"),
    "str": (str, "words"),
}


def within(value: float, bound: str) -> bool:
    """Whether a number lies in an interval such as "(0, 1]"."""
    low, high = map(float, bound[1:-1].split(","))
    inside = low < value < high or (bound[0], value) == ("[", low) or (bound[-1], value) == ("]", high)
    return inside and math.isfinite(value)


@dataclass
class ASTConfig:
    """The method's settings; a program's `Settings` are these and its own.

    Raises BadInput for a value that cannot be.
    """

    target_activation: float = option(0.4, "(0, 1]", "a*, fraction of the candidates trained on; 0.4 is 40 %")
    gate: str = option("remembered", GATES, "what decides which samples are trained on")
    epochs: int | None = option(None, "[1, 100000]", "passes over the candidates; the device decides")
    warmup_epochs: int | None = option(None, "[0, inf)", "epochs on everything at first; max(1, 8 %) if None")
    ramp_epochs: int | None = option(None, "[0, inf)", "epochs down to the target; 20 % if None")
    anneal_epochs: int | None = option(None, "[0, inf)", "epochs on everything at the end; 12.5 % if None")
    significance: str = option("loss", SIGNIFICANCES, "what a sample is judged by")
    temperature: float = option(0.25, "(0, inf)", "T, softness of the gate in ranks; 0.1 chooses strictly")
    guard: bool = option(True, "", "rank as average what stays hard visit after visit")
    balance: bool = option(False, "", "activate as many of every class, for classes that are rare")
    resolution: str = option("full", RESOLUTIONS, "pixels of a step: all, or fewer at first")
    feedforward: bool = option(True, "", "solve for θ; off is the pure PI of the original reports")
    initial_threshold: float = option(0.5, "(-inf, inf)", "θ at the start of the pure PI, on the rank scale")
    adapt_kp: float = option(0.005, "[0, inf)", "proportional gain of the pure PI, θ per rate")
    adapt_ki: float = option(0.0001, "[0, inf)", "integral gain of the pure PI, θ per rate and chunk")
    ema_alpha: float = option(0.3, "(0, 1]", "weight of the newest chunk in the controller's smoothed error")
    batch_size: int | None = option(None, "[1, 100000]", "samples a step; the device decides")
    lr: float | None = option(None, "(0, inf)", "peak learning rate; the model decides")
    device: str = option("auto", r"auto|cpu|cuda(:\d+)?", "auto, cpu or cuda")
    amp: str = option("auto", ("auto", "off", "fp16", "bf16"), "mixed precision; the device decides")

    keep_tokens, keep_by = 1.0, "chance"  # settings of a program whose models can leave patches out

    # The original reports' names for target_activation, lr and amp: taken, not kept.
    target_activation_rate: InitVar[float | None] = None
    learning_rate: InitVar[float | None] = None
    use_amp: InitVar[bool] = True

    def __post_init__(self, rate: float | None, lr: float | None, amp: bool):
        self.target_activation = self.target_activation if rate is None else rate
        self.lr, self.amp = self.lr if lr is None else lr, self.amp if amp else "off"
        self.device = str(self.device)  # a torch.device will do
        for item in fields(self):
            check(item, getattr(self, item.name), f"ASTConfig {item.name}")

    @classmethod
    def of(cls, config: ASTConfig | dict | None) -> ASTConfig:
        """A checked copy of `config`: a program's settings too, or a dict of fields. Raises BadInput."""
        if isinstance(config, ASTConfig):
            config = copy.copy(config)
            ASTConfig.__post_init__(config, None, None, True)
            return config
        try:
            return cls(**(config or {}))
        except TypeError as error:
            raise BadInput(f"ASTConfig: expected its fields ({one_line(error)}); rename them") from error


# %% Settings [markdown]
# ## Settings
#
# Every field is also a flag (`--target-activation 0.2`) and an environment variable
# (`AST_TARGET_ACTIVATION=0.2`). A flag beats a variable, a variable beats this cell, this cell beats the
# profile, and what is left at `None` the device decides: the run prints what it settled on.

# %% Settings tags=["fold"]
# @title Settings
PROGRAM = "imagenet100_ast"
KAGGLE_DATA = "ambityga/imagenet100"  # the data set to attach to a notebook on Kaggle
POLICY = "(full|random|short|dense|dense-short)"
PROFILES = {
    "accuracy": {"target_activation": 0.4},
    "efficiency": {"target_activation": 0.15, "warmup_epochs": 1, "ramp_epochs": 0, "anneal_epochs": 1},
}


@dataclass
class Settings(ASTConfig):
    """All settings of this program, flat: the method's, and these."""

    data: str = option(
        "auto", "", "auto, imagenet100, shapes, a PATH, kaggle:OWNER/NAME or hf:NAME (public: no login)"
    )
    data_dir: str | None = option(None, "", "searched first, for data and weights; the platform decides")
    train_size: int = option(0, "[0, inf)", "training samples, drawn evenly from the classes; 0 takes all")
    val_fraction: float = option(0.2, "(0, 1)", "share of a single folder of classes kept for validation")
    image_size: int | None = option(None, "[8, 2048]", "pixels, side of a view; the device decides")
    workers: int | None = option(None, "[1, 256]", "threads that decode; one a core, at most 8, if None")
    model: str | None = option(None, "", "a classifier of torchvision, as resnet50; the device decides")
    weights: str = option("imagenet", "", "imagenet, none or a FILE; what does not fit begins anew")
    weight_decay: float = option(1e-4, "[0, inf)", "per step, times the learning rate")
    seeds: str = option("0", r"\d{1,9}(,\d{1,9})*", "one run of every policy per seed, such as 0,1,2")
    profile: str = option("accuracy", tuple(PROFILES), "settings that go together, shown at the start")
    compare: str = option("full,random,short", f"|none|{POLICY}(,{POLICY})*", "run beside it, or none")
    probe_first: bool = option(False, "", "begin with a last layer trained alone, on frozen weights")
    out: str | None = option(None, "", "folder for results, of one run at a time; the platform decides")
    resume: bool = option(False, "", "go on from the last checkpoint in --out")
    time_limit: float = option(0.0, "[0, inf)", "minutes until the run saves and stops; 0 for none")


settings = Settings()

# %% Significance [markdown] tags=["shared"]
# ## The method
#
# ### Significance: how much a sample still teaches
#
# The score comes from the forward pass that trains the sample anyway, so it costs nothing:
#
# $$s = \ell = -\log p_y$$
#
# the raw cross-entropy, without label smoothing. Optional terms: the entropy of the prediction (the
# published package's $0.7\,\ell + 0.3\,H$), the deviation of the image's intensity (the first report's
# $0.7\,\ell + 0.3\,\mathrm{std}(x)$), or $\lVert p - \mathrm{onehot}(y) \rVert$, the length of the gradient
# at the logits (Paul et al. 2021, EL2N).
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
    loss = F.cross_entropy(logits, labels, reduction="none")
    if kind == "loss+entropy":
        return 0.7 * loss + 0.3 * -(logits.softmax(1) * logits.log_softmax(1)).sum(1)
    if kind == "loss+intensity":
        return 0.7 * loss + 0.3 * images.detach().float().flatten(1).std(1)
    return loss


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


# %% The gate [markdown] tags=["shared"]
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


# %% The controller [markdown] tags=["shared"]
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

    KP, KI = 0.5, 0.2  # share of an error taken back at once, and a chunk; stable for ema_alpha 0.1 to 1

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


# %% Selection [markdown] tags=["shared"]
# ### Selection: an exact count
#
# Tossing a coin for each sample would make the batch count jump about. *Systematic* sampling lays the
# probabilities end to end on a line and takes the sample under every whole number: each is taken with its
# own $p$, none twice, and the count is $\sum p$ to the sample. All that are taken weigh alike: weights that
# undo the choice took back what choosing gained.


# %% Selection tags=["shared"]
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


# %% Gates [markdown] tags=["shared"]
# ### Gates
#
# A gate has four methods, and the trainer takes any object that has them, yours too:
#
#     select(candidates, target, generator) -> (indices, weights)
#     observe(indices, losses)               # every selected sample comes back; NaN says it was lost
#     state_dict(), load_state_dict(state)
#
# `candidates` is a chunk of sample indices in random order. A skipped sample is never decoded, moved or
# forwarded. In phases that train on everything the gate is not asked, only told.


# %% Gates tags=["shared"]
class RememberedGate:
    """Activates by remembered significance; costs a·n training steps an epoch and nothing else."""

    def __init__(self, config: ASTConfig, n: int):
        self.config = config
        self.memory = Memory(n, config.guard)
        self.controller = Controller(config)
        self.clock = 0.0  # epochs of candidates seen
        self.phase = 0.5

    def select(self, candidates: Tensor, target: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Activates target·m of the m candidates (int64 [m]), rounded; weights are 1."""
        taken, self.phase = systematic(self.probabilities(candidates, target), self.phase)
        self.controller.update(len(taken), len(candidates), target, exact=self.config.feedforward)
        self.clock += len(candidates) / len(self.memory.visited)
        return candidates[taken], torch.ones(len(taken))

    def probabilities(self, candidates: Tensor, target: float) -> Tensor:
        """p [m] of the candidates, by rank; 1 for those that have waited long enough."""
        stale, temperature = self.stale(candidates, target), self.config.temperature
        u = self.rank(candidates)
        waiting = u[~stale]
        solved = solve_threshold(waiting, target * len(u) - int(stale.sum()), target, temperature)
        slope = threshold_slope(waiting, solved, target, temperature)
        threshold = self.controller.threshold(solved, slope)
        return torch.where(stale, 1.0, activation_probability(u, threshold, target, temperature))

    def stale(self, candidates: Tensor, target: float) -> Tensor:
        """Mask of the samples that waited 2/a epochs or more: the oldest, at most half of what is activated.

        Without that cap, a raised target would make most samples stale at once.
        """
        wait = self.wait(candidates)
        oldest = wait.topk(int(0.5 * target * len(candidates))).indices
        mask = torch.zeros(len(candidates), dtype=torch.bool)
        mask[oldest] = wait[oldest] >= 2 / target
        return mask

    def rank(self, candidates: Tensor) -> Tensor:
        return self.memory.rank(candidates)

    def wait(self, candidates: Tensor) -> Tensor:
        """Epochs since each was last trained."""
        return self.clock - self.memory.visited[candidates]

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
        some = self.memory.significance[:: max(1, len(self.memory.significance) // Memory.REFERENCE)]
        return some[some.isfinite()]

    def state_dict(self) -> dict:
        memory = {name: getattr(self.memory, name) for name in ("significance", "visited", "stuck")}
        return memory | {
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
    """Activates by chance, exactly target·m of every m candidates in the long run: what AST must beat."""

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


# %% A balanced gate [markdown] tags=["shared"]
# Rare classes are hard, so a gate that looks for what is hard leans to them, but not far. `--balance` is for
# classes that differ in size and matter alike: ranks are taken within a class, and the same number of
# activations is dealt out so that every class gets as many, as far as it has them.


# %% A balanced gate tags=["shared", "fold"]
# @title A balanced gate
class BalancedGate(RememberedGate):
    """A RememberedGate that activates as many of every class, the significant ones of each more often."""

    def __init__(self, config: ASTConfig, n: int, labels: Tensor | None):
        """labels: int64 [n]. Raises BadInput without them."""
        if labels is None or labels.shape != (n,) or int(labels.min()) < 0:
            found = "none" if labels is None else f"{list(labels.shape)}, from {labels.min()} up"
            raise BadInput(f"balance: labels {found}: expected {n} of 0 or more, as a dataset's `targets`")
        super().__init__(config, n)
        self.labels = labels.cpu()
        self.sizes = self.labels.bincount().float()
        even = n / int((self.sizes > 0).sum())
        self.class_wait = (even / self.sizes).clamp(max=1)  # a large class's turn comes round more slowly

    def probabilities(self, candidates: Tensor, target: float) -> Tensor:
        """As many of every class; with so many classes that few are of one, that comes close to chance."""
        p = super().probabilities(candidates, target)
        free = ~self.stale(candidates, target)
        p[free] = class_quota((p / self.sizes[self.labels[candidates]])[free], float(p[free].sum()))
        return p

    def rank(self, candidates: Tensor) -> Tensor:
        return self.memory.rank(candidates, self.labels[candidates])

    def wait(self, candidates: Tensor) -> Tensor:
        return super().wait(candidates) * self.class_wait[self.labels[candidates]]


def class_quota(shares: Tensor, count: float) -> Tensor:
    """The multiple of shares [m] (above 0), cut off at 1 each, whose sum is `count`, float32 [m]."""
    largest_first = shares.double().sort(descending=True).values
    rest = largest_first.flip(0).cumsum(0).flip(0)  # the sum of a share and all smaller ones
    factors = (count - torch.arange(len(shares))) / rest  # if so many of the largest are cut off
    enough = (factors * largest_first <= 1).nonzero()
    return (shares * factors[enough[0]]).clamp(max=1).float() if len(enough) else torch.ones(len(shares))


def rank_within(u: Tensor, labels: Tensor) -> Tensor:
    """The ranks in (0, 1) of u [m] among those of the same label (int64 [m]), float32 [m]."""
    order = u.argsort()
    order = order[labels[order].argsort(stable=True)]
    sizes = labels.bincount()
    place, ranks = torch.arange(len(u)) - (sizes.cumsum(0) - sizes)[labels[order]], torch.empty(len(u))
    ranks[order] = (place + 0.5) / sizes[labels[order]]
    return ranks


# %% A gate after the loader [markdown] tags=["shared"]
# ### A gate that stands after the loader
#
# What is hard may be the *view*: this crop, this flip. The `live` gate sees the augmented candidates,
# scores them with a forward pass in eval mode, and trains on those above $\theta$. That pass is a third of
# a training step, so live selection at rate $a$ costs $\tfrac13 + a$, and the ledger charges it: below $a
# \approx \tfrac23$ it still saves, but never as much as not looking at all. A gate with `needs_views =
# True` receives a `Batch` of views in place of indices.


# %% A gate after the loader tags=["shared"]
class LiveGate:
    """Activates the views whose own significance exceeds θ; costs a scoring pass a candidate, plus a."""

    needs_views = True
    RECENT = 4096  # scores that a rank is measured against

    def __init__(self, config: ASTConfig, score: Callable[[Tensor, Tensor], Tensor]):
        """`score` gives the significance [m] of images [m, ...] with labels [m], on their device."""
        self.score = score
        self.controller = Controller(config)
        self.recent = torch.empty(0)

    def select(self, candidates: Batch, target: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Activates what ranks above θ; 2 random ones if nothing does."""
        scores = self.score(candidates.images, candidates.labels).cpu()  # the one sync per candidate batch
        finite = scores.isfinite()
        self.recent = torch.cat([self.recent, scores[finite]])[-self.RECENT :]
        above = self.rank(scores) > self.controller.threshold(1 - target, -1.0)
        taken = (finite & above).nonzero().flatten()
        if not len(taken):
            taken = torch.randperm(len(scores), generator=generator)[:2]
        self.controller.update(len(taken), len(scores), target, exact=False)
        return candidates.indices[taken], torch.ones(len(taken))

    def rank(self, scores: Tensor) -> Tensor:
        return torch.searchsorted(self.recent.sort().values, scores).float() / max(1, len(self.recent))

    def observe(self, indices: Tensor, losses: Tensor) -> None:
        """Only counts the lost: the next scoring pass sees everything afresh."""
        self.controller.lost += int((~losses.isfinite()).sum())

    @property
    def threshold(self) -> float:
        return self.controller.value

    @property
    def scores(self) -> Tensor:
        """The significances of the newest candidates [at most 4096]."""
        return self.recent

    def state_dict(self) -> dict:
        return {"recent": self.recent, "controller": self.controller.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.recent = state["recent"].clone()
        self.controller.load_state_dict(state["controller"])


# %% The schedule [markdown] tags=["shared"]
# ### The schedule: when to skip
#
# Four phases of whole epochs. *Warm-up* trains on everything once, so that every sample has a score. *Ramp*
# lowers the rate along a cosine. *Sparse* is where the saving is. *Anneal* returns to everything while the
# learning rate goes to zero, so that the last steps see the true distribution. The learning rate follows
# *progress* in [0, 1], not the step number: each step moves it by (1 − progress) / (steps remaining at the
# current target), so the rate stays continuous and ends at zero whatever happens to the target on the way.
#
# With `progressive` resolution the first epochs see small views, which cost by the square of their side, and
# the last ones see whole ones. Evaluation sees whole ones always.


# %% The schedule tags=["shared"]
@dataclass
class Schedule:
    """Phases, target activation rate and resolution, epoch by epoch."""

    STAGES = ((0.1, 0.5), (0.3, 0.625), (0.5, 0.75), (0.7, 0.875))  # up to a share of the epochs: of the side

    epochs: int
    warmup: int
    ramp: int
    anneal: int
    progressive: bool = False
    keep: float = 1.0  # share of a sample's patches, before the anneal
    rates: list[float] | None = None  # given rates, epoch by epoch: another run's realised ones

    @classmethod
    def of(cls, config: ASTConfig, epochs: int) -> Schedule:
        """The phases of `config`. Raises BadInput if they do not fit into the epochs."""
        share = [max(1, int(0.08 * epochs + 0.5)), int(0.2 * epochs + 0.5), int(0.125 * epochs + 0.5)]
        if epochs <= 3:  # too short for a ramp
            share[1] = 0
        given = [config.warmup_epochs, config.ramp_epochs, config.anneal_epochs]
        warmup, ramp, anneal = (g if g is not None else s for g, s in zip(given, share, strict=True))
        if warmup + ramp + anneal > epochs:
            phases = f"warm-up {warmup}, ramp {ramp}, anneal {anneal}"
            raise BadInput(f"{phases}: expected at most {epochs} epochs together; shorten them")
        return cls(epochs, warmup, ramp, anneal, config.resolution == "progressive", config.keep_tokens)

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

    def side(self, epoch: int) -> float:
        """The side of an epoch's views, as a share of the whole side."""
        stages = self.STAGES if self.progressive and epoch < self.epochs - 1 else ()
        return next((side for until, side in stages if epoch < until * self.epochs), 1.0)

    def kept(self, epoch: int) -> float:
        """The share of a sample's patches that a step of an epoch sees: at the end all."""
        return self.keep if epoch < self.epochs - max(1, self.anneal) else 1.0

    def steps(self, first: int, target: float, n: int, batch_size: int) -> int:
        """Steps of n candidates an epoch from the epoch `first` to the end."""
        return sum(math.ceil(n * self.rate(e, target) / batch_size) for e in range(first, self.epochs))


def learning_rate_shape(progress: float) -> float:
    """Share of the peak learning rate: up from 1/5 over the first fifth, then down a line to 0."""
    return 0.2 + 4.0 * progress if progress < 0.2 else (1 - progress) / 0.8


# %% The ledger [markdown] tags=["shared"]
# ### The ledger: what was really spent
#
# Three currencies, never called by each other's name. *FLOPs* are counted by PyTorch on a copy of the
# model, once per mode. *Unit energy* is the model of the original reports: 10.0 for an activated sample, 0.1
# for a skipped one; it knows nothing of scoring, evaluation or a waiting GPU. *Joules* are measured by the
# hardware, or said to be unavailable and why.

# %% The ledger tags=["shared"]
STEPS = ("warmup", "ramp", "sparse", "anneal")
TRAINING_PHASES = (*STEPS, "scoring")
PHASES = (*TRAINING_PHASES, "evaluation", "checkpoint", "repeated")  # repeated: a cut epoch, trained again
UNIT_ACTIVATED, UNIT_SKIPPED = 10.0, 0.1  # unit energy a sample, the original reports' model


@dataclass
class Cost:
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
        self.costs = {phase: Cost() for phase in PHASES}
        self.open: str | None = None
        self.since = (0.0, None)

    def switch(self, phase: str | None) -> str | None:
        """Closes the open phase, opens `phase`, and returns the one closed; None stands for none."""
        now = (time.perf_counter(), self.meter.joules())
        if self.open:
            cost = self.costs[self.open]
            cost.seconds += now[0] - self.since[0]
            if now[1] is not None and self.since[1] is not None:
                cost.joules = (cost.joules or 0.0) + now[1] - self.since[1]
        before, self.open, self.since = self.open, phase, now
        return before

    @contextmanager
    def charge(self, phase: str | None) -> Iterator[None]:
        """Charges the block to `phase` (None: to nobody), then goes on with the one that was open before."""
        before = self.switch(phase)
        try:
            yield
        finally:
            self.switch(before)

    def total(self, phases: Iterable[str] = PHASES) -> Cost:
        """What the phases cost so far, the open one included."""
        self.switch(self.open)
        costs = [self.costs[phase] for phase in phases]
        joules = [cost.joules for cost in costs if cost.joules is not None]
        sums = {n: sum(getattr(c, n) for c in costs) for n in ("seconds", "candidates", "activated", "flops")}
        return Cost(**sums, joules=sum(joules) if joules else None)

    def state_dict(self) -> dict:
        self.switch(self.open)
        return {phase: asdict(cost) for phase, cost in self.costs.items()}

    def load_state_dict(self, state: dict) -> None:
        self.costs = {phase: Cost(**cost) for phase, cost in state.items()}


def unit_saved(cost: Cost) -> float:
    """Unit energy saved against activating every candidate, percent: a model, not a measurement."""
    return 100 * (1 - cost.unit_energy / (UNIT_ACTIVATED * cost.candidates)) if cost.candidates else 0.0


# %% One step [markdown] tags=["shared"]
# ## The training loop
#
# ### One step
#
# Data flows one way: source → batch → step → memory → ledger → listeners. One loss that is not finite would
# poison every weight through the optimiser, and masking it is not enough: the backward pass multiplies zero
# by infinity. So the step looks at the gradients' norm, and where that is not finite, weights and batch-norm
# statistics keep their old values. All of it stays on the device; nobody waits.


# %% One step tags=["shared"]
@dataclass
class Batch:
    """Samples on their way: indices int64 [B] and weights float32 [B] on the CPU, views and labels on the
    device; missing: int64 [k], asked for with them and unreadable; whole: indices of the batch that this is
    one process's part of, or else its own."""

    indices: Tensor
    weights: Tensor
    images: Tensor
    labels: Tensor
    missing: Tensor
    whole: Tensor | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __post_init__(self):
        self.whole = self.indices if self.whole is None else self.whole

    def rows(self, indices: Tensor, weights: Tensor) -> Batch:
        """Those of its samples that `indices` names, int64 [k], with new weights."""
        order = self.indices.argsort()
        rows = order[torch.searchsorted(self.indices[order], indices.contiguous())]
        rows = rows.to(self.labels.device, non_blocking=True)
        return Batch(indices, weights, self.images[rows], self.labels[rows], self.missing[:0])

    def cut(self, size: int) -> tuple[Batch, Batch]:
        """The first `size` samples, and the rest."""
        parts = [getattr(self, item.name).tensor_split([size]) for item in fields(self)[:5]]
        return Batch(*(part[0] for part in parts)), Batch(*(part[1] for part in parts))

    def joined(self, other: Batch) -> Batch:
        """The samples of both."""
        pairs = [(getattr(self, item.name), getattr(other, item.name)) for item in fields(self)[:5]]
        return Batch(*(torch.cat(pair) for pair in pairs))


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batch: Batch,
    criterion: Callable[[Tensor, Tensor], Tensor],
    judge: Callable[[Tensor, Tensor, Tensor], Tensor],
    autocast: Callable[[], torch.autocast],
    clip_norm: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """One optimiser step on a batch; `judge` gives significances. Several processes average their gradients.

    Returns losses [B], significances [B] (NaN where the loss is not finite), and whether the step was taken,
    a bool; all still on the device. Raises BadInput for a criterion that gives no loss a sample.
    """
    before, weights = joined(float_buffers(model)), batch.weights.to(batch.labels.device, non_blocking=True)
    optimizer.zero_grad(set_to_none=True)
    with autocast():
        logits = model(batch.images)
    losses = criterion(logits.float(), batch.labels)
    check_losses(losses, batch.labels)
    finite = losses.detach().isfinite()
    scaler.scale((torch.where(finite, losses, 0) * weights).sum() * world()[1] / len(batch.whole)).backward()
    scores = torch.where(finite, judge(logits, batch.labels, batch.images), math.nan)
    return losses.detach(), scores, guarded_step(model, optimizer, scaler, before, clip_norm)


# %% What may change while it trains [markdown] tags=["shared"]
# ### What may change, and what is counted
#
# A person's wish arrives through `Controls` and takes hold at the next chunk of candidates. The counters of
# the epoch in hand are a `Tally`; its losses stay on the device and are read once a chunk.


# %% What may change while it trains tags=["shared"]
class Controls:
    """What a person may change while it trains, from any thread; `stop`, once it names a reason, ends the
    run cleanly after the step in hand."""

    def __init__(self):
        self.values = {"target_activation": None, "learning_rate_factor": 1.0}  # None: the run's own
        self.asked: deque[dict] = deque()  # not yet taken up
        self.candidates = 0  # offered so far, as the trainer counts them
        self.deadline = math.inf  # on time.monotonic()'s clock
        self.paused = False
        self.stop: str | None = None
        self.heeded = False  # whether anybody has looked yet, who then saves and ends

    def set(self, control: str, value: float) -> None:
        """Asks for a target_activation (fraction) or a learning_rate_factor. Raises BadInput."""
        bounds = {"target_activation": "(0, 1]", "learning_rate_factor": "(0, inf)"}
        if control not in bounds or not within(value, bounds[control]):
            known = " or ".join(f"{name} in {bound}" for name, bound in bounds.items())
            raise BadInput(f"control {control} {value}: expected {known}")
        self._ask(control, float(value))

    def pause(self, paused: bool) -> None:
        """Pauses after the step in hand, or goes on."""
        self.paused = paused
        self._ask("paused", paused)

    def ask_stop(self, reason: str) -> None:
        """A person's wish to save and stop, logged as such; `reason` goes into the summary."""
        self._ask("stop", reason)
        self.stop = reason

    def _ask(self, control: str, new: object) -> None:
        self.asked.append({"time": time.time(), "control": control, "new": new, "set_at": self.candidates})

    def take(self, target: float, pausing: bool = False) -> Iterator[dict]:
        """Takes up what was asked; each change with its old value. target: the run's own. A pause, and what
        was asked after it, is left until it begins (`pausing`)."""
        if not summed(torch.tensor(len(self.asked))):
            return
        self.asked = agreed(self.asked)
        while self.asked and (pausing or not self.paused or self.asked[0]["control"] != "paused"):
            change = self.asked.popleft()
            own = {"target_activation": target, "paused": not change["new"], "stop": None}
            old = self.values.get(change["control"]) or own.get(change["control"])
            if change["control"] in self.values:
                self.values[change["control"]] = change["new"]
            words = f"{change['control'].replace('_', ' ')} {change['new']}"
            short = {"paused True": "paused", "paused False": "resumed", "stop stop button": "stop"}
            yield change | {"old": old, "candidates": self.candidates, "words": short.get(words, words)}

    def stopping(self) -> bool:
        """Whether to end; several processes agree on that, and on a pause, whenever they ask."""
        self.heeded = True
        if self.stop is None and time.monotonic() > self.deadline:
            self.stop = "time limit"
        if world()[1] == 1:
            return self.stop is not None
        stops, pauses = summed(torch.tensor([self.stop is not None, self.paused], dtype=torch.int64)).tolist()
        self.paused = pauses > 0
        if stops:
            self.stop = next(filter(None, gathered(self.stop)))
        return stops > 0

    def wait_or_stop(self, ledger: Ledger, tell: Callable[[bool], None]) -> bool:
        """Waits while paused, at nobody's cost, and tells of it; then says whether to stop."""
        if self.paused:
            tell(True)
            with ledger.charge(None):
                while self.paused and not self.stopping():
                    time.sleep(0.02)
        return self.stopping()


@dataclass
class Tally:
    """What is being counted of the epoch in hand."""

    n: int  # samples that will be offered
    began: float  # training seconds on the ledger when it began
    scoring: float  # scoring seconds then
    candidates: int = 0  # offered
    waiting: int = 0  # asked of the source, or about to be, and not here yet
    held: int = 0  # chosen after the loader, not yet in a batch
    trained: int = 0  # samples that went through a step
    finite: int = 0  # of these, with a finite loss
    side: int | None = None  # pixels of the last views
    loss: float = 0.0  # sum over those
    skipped_steps: int = 0  # steps not taken
    waited: float = 0.0  # seconds in which the step waited for data
    pending: list[tuple[Tensor, ...]] = field(default_factory=list)  # losses still on the device

    def add(self, batch: Batch, losses: Tensor, scores: Tensor, taken: Tensor) -> None:
        """Counts a step, without waiting for it."""
        finite = losses.isfinite()
        sums = torch.stack([torch.where(finite, losses, 0).sum(), finite.sum(), taken])
        self.pending.append((batch.whole, batch.indices, scores, sums))
        self.trained += len(batch.whole)
        self.side = batch.images.shape[-1] if batch.images.ndim == 4 else None

    def read(self) -> tuple[Tensor, Tensor]:
        """Indices and significances, on the CPU, of what was trained since the last call: the one sync."""
        whole, own, scores, sums = zip(*self.pending, strict=True)
        indices, own = torch.cat(whole), torch.cat(own)
        flat = brought_together(torch.cat([*scores, *sums]).cpu(), own, indices)
        for loss, finite, taken in flat[len(indices) :].reshape(-1, 3).tolist():
            self.loss += loss
            self.finite += int(finite)
            self.skipped_steps += not taken
        self.pending = []
        return indices, flat[: len(indices)]


# %% The trainer [markdown] tags=["shared"]
# ### The trainer
#
# An epoch offers every sample once, in random order, chunk by chunk. `choose` decides on a chunk only when
# its batches are asked for, so the gate knows the newest scores. What it activates is packed into full
# batches. The trainer prints nothing: it emits events, and the table, the bar, the files and the dashboard
# are listeners.


# %% The trainer tags=["shared"]
class AdaptiveSparseTrainer:
    """Trains any classifier on the samples that its gate activates.

        trainer = AdaptiveSparseTrainer(model, train_loader, val_loader, ASTConfig(target_activation=0.4))
        results = trainer.train(epochs=100, warmup_epochs=10)

    model: [B, ...] images to [B, C] logits. train_loader, val_loader: a DataLoader, a map-style dataset of
    (image, label), or two arrays. config: an ASTConfig or a dict of its fields. optimizer: AdamW if None; its
    learning rates are the peaks of the schedule. criterion: per-sample losses [B]; cross-entropy if None.
    With one of your own, training labels pass to it as they are; else they must be classes, as in validation.
    gate: a gate object in place of the one that `config.gate` names. policy: the name in the records.
    listeners: called with (event, data); a table if None. rates: activation rates to repeat, epoch by epoch.
    save: called at the start and after each epoch, where `state_of` is all that is needed to go on.

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
        clip_norm: float = 0.0,
        save: Callable[[], None] = lambda: None,
    ):
        self.config = config = ASTConfig.of(config)
        self.device = pick_device(config.device)
        self.dtype = pick_dtype(config.amp, self.device)
        mixed = {"dtype": self.dtype or torch.bfloat16, "enabled": self.dtype is not None}
        self.autocast = functools.partial(torch.autocast, self.device.type, **mixed)
        self.model = able_to_keep(model, config.keep_tokens).to(self.device)
        how = self.device, config.batch_size
        self.train_source = as_source(train_loader, *how, "train_loader", classes=criterion is None)
        self.val_source = as_source(val_loader, *how, "val_loader")
        self.optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=config.lr or 1e-3, fused=True)
        self.peak_lrs = [group["lr"] for group in self.optimizer.param_groups]
        self.criterion = criterion or nn.CrossEntropyLoss(reduction="none")
        self.judge = functools.partial(judge, self)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)
        self.score = functools.partial(score_views, self)
        self.gate = gate or make_gate(config, self.train_source, self.score)
        self.policy = policy or ("ast" if gate or config.gate in SCORED else config.gate)
        self.listeners = [print_table()] if listeners is None else list(listeners)
        self.controls = controls or Controls()
        self.rates, self.seed, self.clip_norm, self.save = rates, seed, clip_norm, save
        self.rows, self.changes, self.resumed = [], [], False
        self.asks = optimizer is None and config.lr is None  # for an optimizer

    def train(self, epochs: int | None = None, warmup_epochs: int | None = None) -> dict:
        """Trains to the end, or until `controls` stops it, and returns the results; again trains anew, on the
        weights as they are.

        Keys: final_accuracy and best_accuracy (percent), activation_rate (fraction), energy_savings (percent,
        unit model), speedup with speedup_method, train_seconds, total_seconds, flops, joules with
        joules_method, phases, and epochs, the rows of metrics.jsonl.
        """
        if not self.resumed:
            begin(self, epochs, warmup_epochs)
            with self.ledger.charge("checkpoint"):
                self.save()
        self.resumed = False  # `restore` sets it
        self.emit("start", **about(self))
        while self.epoch < self.schedule.epochs and not self.controls.stopping():
            with self.ledger.charge(self.phase):
                whole = self.train_epoch()
            accuracy = evaluate(self) if whole else None
            if accuracy is None:
                break  # a resumed run trains this epoch again
            self.rows.append(epoch_row(self, accuracy))
            self.tally = None
            self.emit("epoch", **self.rows[-1], epochs=self.schedule.epochs)
            with self.ledger.charge("checkpoint"):
                self.save()
        self.apply_controls()  # what was asked after the last chunk: a stop, above all
        results = results_of(self)
        self.emit("end", **results)
        return results

    def compare(self, policies: Sequence[str] = ("full", "random"), **epochs: int) -> dict[str, dict]:
        """Trains, then each of the policies from the same weights; results by policy, `speedup` measured."""
        return compared(self, policies, **epochs)

    def train_epoch(self) -> bool:
        """Offers every sample to the gate once and trains on what it activates; False where stopped."""
        seconds = self.ledger.total(TRAINING_PHASES).seconds, self.ledger.costs["scoring"].seconds
        self.tally = Tally(int(self.readable.sum()), *seconds)
        self.train_source.side = self.schedule.side(self.epoch)
        self.apply_controls()
        batches = arrivals(self, stream_of_shares(self, self.choose()))
        if needs_views(self.gate):
            batches = packed(filtered(self, batches), self.train_source.batch_size, self.tally)
        waiting = time.perf_counter()
        for batch in batches:
            self.tally.waited += time.perf_counter() - waiting
            self.step(share_of(batch))
            if self.controls.wait_or_stop(self.ledger, self.apply_controls):
                return False
            waiting = time.perf_counter()
        self.remember()
        return True

    def choose(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Indices and weights of one batch after the other, decided on when the source asks for them."""
        readable = self.readable.nonzero().flatten()
        order = readable[torch.randperm(len(readable), generator=self.generator)]
        size, tally = self.train_source.batch_size, self.tally
        indices, weights = order[:0], torch.empty(0)
        while True:
            while len(indices) < 2 * size and tally.candidates < len(order):
                chunk = math.ceil(min(len(self.readable) / 20, 4 * size / self.rate))
                chosen = self.decide(order[tally.candidates : tally.candidates + chunk])
                tally.waiting += len(chosen[0])
                indices, weights = torch.cat([indices, chosen[0]]), torch.cat([weights, chosen[1]])
            if not len(indices):
                return
            take = batch_length(len(indices), size)
            yield indices[:take], weights[:take]
            indices, weights = indices[take:], weights[take:]

    def decide(self, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """What of a chunk is trained on, and its weights; all of it where the gate wants to see it first."""
        began = time.perf_counter()
        self.remember()
        self.tally.waited -= time.perf_counter() - began  # that was for the device, not for data
        self.apply_controls()
        for counter in (self.tally, self.controls, self.ledger.costs[self.phase]):
            counter.candidates += len(candidates)
        chosen = candidates, torch.ones(len(candidates))
        if not needs_views(self.gate):
            if self.rate < 1:
                chosen = self.gate.select(candidates, self.rate, self.generator)
            self.emit("chunk", **decision(self, candidates, chosen[0]))
        return chosen

    def step(self, batch: Batch) -> None:
        """One step at the learning rate of the moment, counted and charged."""
        if len(batch.whole) < min(2, self.train_source.batch_size) * world()[1]:  # batch norm needs two
            return give_up(self.gate, batch.whole)
        shape = learning_rate_shape(self.progress) * self.controls.values["learning_rate_factor"]
        set_rates(self.optimizer, self.peak_lrs, shape)
        how = self.criterion, self.judge, self.autocast, self.clip_norm
        batch, flops = thinned(self, batch)
        with enough_memory():
            model = self.model if world()[1] == 1 else distributed(self.model)
            self.tally.add(batch, *train_step(model, self.optimizer, self.scaler, batch, *how))
        cost = self.ledger.costs[self.phase]
        cost.activated += len(batch.whole)
        cost.flops += flops * len(batch.whole) / len(batch)
        self.progress += (1 - self.progress) / steps_left(self)

    def remember(self) -> None:
        """Reads losses and scores from the device, and lets the gate remember them."""
        if self.tally.pending:
            indices, scores = self.tally.read()
            self.gate.observe(indices, scores)
            self.times_activated[indices] += self.rate < 1

    def apply_controls(self, pausing: bool = False) -> None:
        """Takes up what a person asked for, and tells of it."""
        for change in self.controls.take(self.config.target_activation, pausing):
            at = self.epoch + (self.tally.candidates / self.tally.n if self.tally else 0)
            self.changes.append(change | {"epochs": at, "seconds": self.ledger.total().seconds})
            self.emit("control", **self.changes[-1])

    def emit(self, event: str, **data: object) -> None:
        for listener in self.listeners:
            listener(event, data)

    @property
    def epoch(self) -> int:
        """The epoch in hand, counted from 0."""
        return len(self.rows)

    @property
    def phase(self) -> str:
        return self.schedule.phase(self.epoch)

    @property
    def target(self) -> float:
        return self.controls.values["target_activation"] or self.config.target_activation

    @property
    def rate(self) -> float:
        """The activation rate aimed at now."""
        return self.schedule.rate(self.epoch, self.target)


# %% Around the loop tags=["shared", "fold"]
# @title Around the loop
def make_gate(config: ASTConfig, source: ArraySource, score: Callable[[Tensor, Tensor], Tensor]) -> object:
    """The gate that `config.gate` names, for the samples of `source`. Raises BadInput."""
    if config.gate == "live":
        return LiveGate(config, score)
    if config.gate == "remembered" and config.balance:
        return BalancedGate(config, len(source), getattr(source, "labels", None))
    return RememberedGate(config, len(source)) if config.gate == "remembered" else RandomGate()


def set_rates(optimizer: torch.optim.Optimizer, peaks: list[float], share: float = 1.0) -> None:
    """Sets the learning rate of each group to a share of its peak."""
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = peak * share


def judge(trainer: AdaptiveSparseTrainer, logits: Tensor, labels: Tensor, images: Tensor) -> Tensor:
    """Significance [B]; the criterion's own loss where labels are no classes, which alone it can read."""
    if are_classes(labels):
        return significance(logits, labels, images, trainer.config.significance)
    return trainer.criterion(logits.detach().float(), labels).detach()


def give_up(gate: object, indices: Tensor) -> None:
    """Tells the gate of selected samples [k] that are not trained on."""
    if len(indices):
        gate.observe(indices, torch.full((len(indices),), math.nan))


def needs_views(gate: object) -> bool:
    """Whether a gate stands after the loader."""
    return getattr(gate, "needs_views", False)


def begin(trainer: AdaptiveSparseTrainer, epochs: int | None, warmup_epochs: int | None) -> None:
    """Sets everything that a run counts to its start. Raises BadInput."""
    given = {"epochs": epochs, "warmup_epochs": warmup_epochs}
    config = replace(trainer.config, **{name: value for name, value in given.items() if value is not None})
    trainer.schedule = Schedule.of(config, config.epochs or 10)
    full = config.gate == "full" and isinstance(trainer.gate, RandomGate) and trainer.rates is None
    trainer.schedule.rates = [1.0] * trainer.schedule.epochs if full else trainer.rates
    trainer.generator = torch.Generator().manual_seed(trainer.seed)
    trainer.train_source.generator.manual_seed(trainer.seed)
    trainer.ledger = Ledger(energy_meter(trainer.device))
    n = len(trainer.train_source)
    trainer.readable = torch.ones(n, dtype=torch.bool)
    trainer.times_activated = torch.zeros(n, dtype=torch.int16)  # in gated epochs
    trainer.rows, trainer.changes, trainer.tally = [], [], None
    trainer.progress, trainer.flops, trainer.uncounted, trainer.advised = 0.0, {}, [], False
    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(trainer.device)
    if trainer.asks:
        text = "no optimizer given: AdamW at a peak of 0.001; pass the one that suits your model"
        trainer.emit("notice", text=text)
    if not trainer.model.training:  # else what was frozen in eval mode stays so
        trainer.model.train()


def compared(trainer: AdaptiveSparseTrainer, policies: Sequence[str], **epochs: int) -> dict[str, dict]:
    """See `AdaptiveSparseTrainer.compare`; epochs: as `train` takes them."""
    set_rates(trainer.optimizer, trainer.peak_lrs)  # an earlier training ended at 0
    start = copy.deepcopy((trainer.model, trainer.optimizer))
    first = trainer.train(**epochs)
    results = {trainer.policy: first}
    config = replace(trainer.config, **epochs | {"epochs": trainer.schedule.epochs})
    for policy in policies:
        model, optimizer = copy.deepcopy(start)
        settings, rates = rival(policy, config, first["epochs"], [])
        what = model, trainer.train_source, trainer.val_source, settings, optimizer, trainer.criterion
        same = {name: getattr(trainer, name) for name in ("listeners", "controls", "seed", "clip_norm")}
        results[policy] = AdaptiveSparseTrainer(*what, policy=policy, rates=rates, **same).train()
    if speedup := measured(results, trainer.policy)["speedup_vs_full"]:
        first |= {"speedup": speedup, "speedup_method": "measured against full training"}
    return results


def batch_length(held: int, size: int) -> int:
    """Samples of the next batch, of `held` ones.

    The last two batches share what is left: the gradient of four samples left over is mostly noise, and would
    take a step of the whole learning rate. A lone last sample joins the batch before it, since batch norm
    cannot train on one; so does what would leave one of several processes with fewer than two.
    """
    if held >= 2 * size:
        return size
    return held if held < max(size + 2, 4 * world()[1]) else math.ceil(held / 2)


def arrivals(trainer: AdaptiveSparseTrainer, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches that could be read; what is missing of them is offered no more."""
    for batch in batches:
        trainer.tally.waiting -= len(batch.whole) + len(batch.missing)
        trainer.readable[batch.missing] = False
        give_up(trainer.gate, batch.missing)
        if len(batch):
            began = time.perf_counter()
            count_flops(trainer, trainer.train_source, batch.images, batch.labels)
            trainer.tally.waited -= time.perf_counter() - began  # that was no waiting for data
            yield batch


def filtered(trainer: AdaptiveSparseTrainer, batches: Iterable[Batch]) -> Iterator[Batch]:
    """What a gate that needs views activates of each batch."""
    for batch in batches:
        chosen = batch
        if trainer.rate < 1:
            with trainer.ledger.charge("scoring"):
                chosen = batch.rows(*trainer.gate.select(batch, trainer.rate, trainer.generator))
        trainer.emit("chunk", **decision(trainer, batch.indices, chosen.indices))
        yield chosen


def packed(batches: Iterable[Batch], size: int, tally: Tally) -> Iterator[Batch]:
    """The same samples in full batches; `tally.held` counts those that wait for one."""
    held = None
    for batch in batches:
        held = batch if held is None else held.joined(batch)
        while len(held) >= 2 * size:
            full, held = held.cut(size)
            tally.held = len(held)
            yield full
        tally.held = len(held)
    while held is not None and len(held):
        full, held = held.cut(batch_length(len(held), size))
        tally.held = len(held)
        yield full


def steps_left(trainer: AdaptiveSparseTrainer) -> int:
    """Steps to the end of the run at the current target, the one in hand included."""
    tally, size, rate = trainer.tally, trainer.train_source.batch_size, trainer.rate
    through = rate if needs_views(trainer.gate) else 1.0
    left = (tally.held + through * tally.waiting + rate * (tally.n - tally.candidates)) / size
    later = trainer.schedule.steps(trainer.epoch + 1, trainer.target, tally.n, size)
    return 1 + math.ceil(left - 1e-6) + later


def score_views(trainer: AdaptiveSparseTrainer, images: Tensor, labels: Tensor) -> Tensor:
    """Significance [m] of views [m, ...] with labels int64 [m], by the model as it is now; charged."""
    mode = mode_at("evaluation", images, trainer.train_source)
    trainer.ledger.costs["scoring"].flops += len(images) * trainer.flops[mode]
    every = torch.arange(len(images))
    images, labels, own = map(own_share, (images, labels, every))
    with evaluating(trainer.model), trainer.autocast(), enough_memory():
        scores = trainer.judge(trainer.model(images), labels, images)
    return brought_together(scores, own, every)


def evaluate(trainer: AdaptiveSparseTrainer) -> float | None:
    """Accuracy on the validation set, percent; charged. None where a stop was asked for meanwhile."""
    right, count = torch.zeros((), device=trainer.device), 0
    with trainer.ledger.charge("evaluation"), evaluating(trainer.model):
        if world()[1] > 1:  # running statistics become the mean of the processes'
            put_back(float_buffers(trainer.model), summed(joined(float_buffers(trainer.model))) / world()[1])
        for images, labels in trainer.val_source.in_order(*world()):
            if trainer.controls.stop:
                count = math.nan  # whichever process stops, all do
                break
            count_flops(trainer, trainer.val_source, images, labels)
            with trainer.autocast(), enough_memory():
                right += (trainer.model(images).argmax(1) == labels).sum()
            count += len(labels)
        tell_unreadable(trainer.val_source, trainer.val_source.unreadable)
        right, count = summed(torch.tensor([float(right), count], dtype=torch.float64)).tolist()
        if math.isnan(count):
            return None
        trainer.ledger.costs["evaluation"].flops += count * trainer.flops.get("evaluation", 0.0)
        return 100 * right / count


def mode_at(mode: str, images: Tensor, source: ArraySource, share: float = 1.0) -> str:
    """What the FLOPs of a view in a mode are filed under: with its side and the share of its patches, where
    these are not the whole ones."""
    mode = mode if getattr(source, "side", 1.0) == 1 else f"{mode} at {images.shape[-1]} pixels"
    return mode if share == 1 else f"{mode} on {share:.4g} of the patches"


def count_flops(
    trainer: AdaptiveSparseTrainer, source: ArraySource, images: Tensor, labels: Tensor, share: float = 1.0
) -> None:
    """FLOPs a view of each mode, once a side and share of the patches, of which only training leaves some
    out; at nobody's cost. Raises BadInput for a model that does not fit."""
    modes = ("evaluation", "training") if share == 1 else ("training",)
    modes = {mode_at(mode, images, source, share): mode == "training" for mode in modes}
    if modes.keys() <= trainer.flops.keys():
        return
    first = not trainer.flops
    if hasattr(trainer.model, "kept_shares"):
        trainer.model.kept_shares = (share,)
    few = images[[0, -1]]  # batch norm needs two
    with trainer.ledger.charge(None):
        for mode, training in modes.items():
            how = few, training, trainer.autocast
            try:
                trainer.flops[mode], uncounted, logits = flops_per_sample(trainer.model, *how)
            except RuntimeError as error:
                found = f"a model that cannot take {images.dtype} images {list(few.shape)}"
                raise BadInput(f"{found}: {one_line(error)}; expected one that can; change either") from error
            check_outputs(logits, labels)
            trainer.uncounted = sorted({*trainer.uncounted, *uncounted})
    if first and not are_classes(labels):
        text = "labels that are no classes: the significance of a sample is its own loss"
        trainer.emit("notice", text=text)


# %% Patches left out tags=["shared", "fold"]
# @title Patches left out
PARTS, GRAIN = 4, 8  # of a batch, by significance, each with one share: a multiple of an eighth


def able_to_keep(model: nn.Module, share: float) -> nn.Module:
    """The model. Raises BadInput where it is to keep a share of the patches, and has no `kept_shares`."""
    if share < 1 and not hasattr(model, "kept_shares"):
        raise BadInput(
            f"--keep-tokens {share:g}: expected 1, as this model takes whole images; change either"
        )
    return model


def thinned(trainer: AdaptiveSparseTrainer, batch: Batch) -> tuple[Batch, float]:
    """A batch in the order in which the step takes it, and the FLOPs of the step. Tells a model that can
    leave patches out which share to keep in each of equal parts of the batch."""
    model, source, config = trainer.model, trainer.train_source, trainer.config
    shares, memory = (trainer.schedule.kept(trainer.epoch),), getattr(trainer.gate, "memory", None)
    if shares[0] < 1 and config.keep_by == "sample" and memory:
        shares, order = shares_by_rank(memory.rank(batch.indices), shares[0], config.temperature)
        whole = batch.whole if world()[1] > 1 else None
        batch = replace(batch.rows(batch.indices[order], batch.weights[order]), whole=whole)
    flops, parts = 0.0, batch.images.tensor_split(len(shares))
    for part, share in zip(parts, shares, strict=True):
        count_flops(trainer, source, batch.images, batch.labels, share)
        flops += len(part) * trainer.flops[mode_at("training", part, source, share)]
    if hasattr(model, "kept_shares"):
        model.kept_shares, model.keep_by = shares, config.keep_by
    return batch, flops


def shares_by_rank(u: Tensor, keep: float, temperature: float) -> tuple[tuple[float, ...], Tensor]:
    """Shares of the patches, one for each of at most PARTS parts of samples with ranks u [m], on average
    `keep`; and the samples' order, int64 [m]. A share follows the rank as an activation probability does."""
    theta = solve_threshold(u, keep * len(u), keep, temperature)
    p, order = activation_probability(u, theta, keep, temperature).sort()
    means = torch.stack([part.mean() for part in p.tensor_split(min(PARTS, len(u)))])
    ends = (GRAIN * means).cumsum(0).round()  # so that rounding moves the sum by half a grain at most
    grains = ends.diff(prepend=torch.zeros(1)).clamp(1, GRAIN)
    return tuple((grains / GRAIN).tolist()), order


# %% Rows and results tags=["shared", "fold"]
# @title Rows and results
def about(trainer: AdaptiveSparseTrainer) -> dict:
    """What a run begins with."""
    n, epochs = len(trainer.train_source), trainer.schedule.epochs
    run = {"policy": trainer.policy, "seed": trainer.seed, "epochs": epochs, "n": n}
    return run | {"rows": list(trainer.rows), "changes": list(trainer.changes)}


def decision(trainer: AdaptiveSparseTrainer, offered: Tensor, activated: Tensor) -> dict:
    """What a decision of the gate came to, how far the epoch is, and what the run has cost."""
    tally, ledger, total = trainer.tally, trainer.ledger, trainer.ledger.total()
    now = {"candidates": tally.candidates, "n": tally.n, "progress": trainer.progress, "phase": trainer.phase}
    now |= {"rate": trainer.rate, "gate": trainer.gate if trainer.rate < 1 else None}
    now |= {"offered": len(offered), "activated": len(activated), "flops_per_sample": trainer.flops}
    trained = ledger.total(TRAINING_PHASES)
    now |= {"seconds": total.seconds, "joules": total.joules, "train_seconds": trained.seconds}
    return now | {"trained": trained.activated, "flops": trained.flops, "resolution": tally.side}


PATIENCE = 20  # percent of an epoch that may be spent waiting for data before the trainer says so


def epoch_row(trainer: AdaptiveSparseTrainer, accuracy: float) -> dict:
    """The row of metrics.jsonl for the epoch just trained. Raises BadInput where no loss was finite."""
    tally, number, rate = trainer.tally, trainer.epoch + 1, trainer.rate
    finite = all(bool(weight.isfinite().all()) for weight in trainer.model.parameters())
    if tally.trained and not (tally.finite and finite):
        found = f"weights or losses that are not finite after epoch {number}"
        raise BadInput(f"{found}: expected finite ones; lower the learning rate")
    if tally.skipped_steps:
        text = f"epoch {number}: {tally.skipped_steps} steps not taken, their gradients not being finite"
        trainer.emit("notice", text=text)
    seconds = trainer.ledger.total(TRAINING_PHASES).seconds - tally.began
    scoring = trainer.ledger.costs["scoring"].seconds - tally.scoring
    waited = 100 * (tally.waited - scoring) / seconds
    if waited > PATIENCE and seconds > 1 and not trainer.advised:
        trainer.advised = True
        text = f"training waited for data in {waited:.0f} % of epoch {number}; {trainer.train_source.remedy}"
        trainer.emit("notice", text=text)
    gate, total = trainer.gate if rate < 1 else None, trainer.ledger.total()
    controller = getattr(gate, "controller", None)
    return {
        "policy": trainer.policy,
        "seed": trainer.seed,
        "epoch": number,
        "phase": trainer.phase,
        "train_loss": tally.loss / max(1, tally.finite),
        "val_accuracy": accuracy,
        "target_activation": rate,
        "activation_rate": tally.trained / tally.candidates,
        "mean_activation": total.activated / total.candidates,
        "threshold": getattr(gate, "threshold", None),
        "controller": controller.state(rate) if controller else None,
        "significance_quantiles": quantiles(trainer.gate),
        "candidates": tally.candidates,
        "activated": tally.trained,
        "seconds": seconds,
        "scoring_seconds": scoring,
        "elapsed_seconds": total.seconds,
        "flops": total.flops,
        "data_wait_percent": waited,
        "learning_rate": trainer.optimizer.param_groups[0]["lr"],
        "resolution": tally.side,
        "kept": trainer.schedule.kept(trainer.epoch),
    }


def results_of(trainer: AdaptiveSparseTrainer) -> dict:
    """The run so far; see `AdaptiveSparseTrainer.train`."""
    ledger, meter = trainer.ledger, trainer.ledger.meter
    total, accuracies = ledger.total(), [row["val_accuracy"] for row in trainer.rows]
    phases = {phase: asdict(cost) | {"unit_energy": cost.unit_energy} for phase, cost in ledger.costs.items()}
    if meter.method == "unavailable":
        total.joules = None
    return asdict(total) | {
        "policy": trainer.policy,
        "seed": trainer.seed,
        "complete": trainer.epoch == trainer.schedule.epochs,
        "final_accuracy": accuracies[-1] if accuracies else None,
        "best_accuracy": max(accuracies, default=None),
        "activation_rate": total.activated / max(1, total.candidates),
        "energy_savings": unit_saved(total),
        "speedup": UNIT_ACTIVATED * total.candidates / max(total.unit_energy, 1e-9),
        "speedup_method": "unit model",
        "train_seconds": ledger.total(TRAINING_PHASES).seconds,
        "total_seconds": total.seconds,
        "flops_per_sample": dict(trainer.flops),
        "flops_uncounted": trainer.uncounted,
        "unit_energy": total.unit_energy,
        "joules_method": meter.method + (f" ({meter.reason})" if meter.reason else ""),
        "peak_memory_mib": peak_memory_mib(trainer.device),
        "phases": phases,
        "epochs": trainer.rows,
        "changes": trainer.changes,
    }


def scores_of(gate: object) -> Tensor:
    """The finite significances [k] that a gate ranks by; none if its `scores` are something else."""
    scores = getattr(gate, "scores", None)
    known = isinstance(scores, Tensor) and scores.ndim == 1
    return scores[scores.isfinite()] if known else torch.empty(0)


def quantiles(gate: object) -> list[float] | None:
    """The 0, 5, … 100 % quantiles of the significances that a gate ranks by; None if it knows none."""
    scores = scores_of(gate)
    return [round(float(q), 5) for q in scores.quantile(torch.linspace(0, 1, 21))] if len(scores) else None


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


# %% State and checkpoints [markdown] tags=["shared"]
# ### State
#
# State is saved at the end of an epoch, when nothing is in flight; a cut epoch is trained again. A checkpoint
# is written beside its final name, flushed to disk, and only then renamed, so a crash at any moment leaves a
# whole one. It begins with the SHA-256 of the rest, and names its settings and data: where it is damaged or
# of another run, the one before it serves. Loading uses `weights_only=True`, which runs no code from it.
# One run at a time has a folder; only what a run made is ever renamed.


# %% State and checkpoints tags=["shared", "fold"]
# @title State and checkpoints
def state_of(trainer: AdaptiveSparseTrainer) -> dict:
    """Everything that a bit-exact continuation needs, between two epochs."""
    loaded = {name: getattr(trainer, name).state_dict() for name in LOADED}
    return loaded | {
        "schedule": asdict(trainer.schedule),
        "generators": [trainer.generator.get_state(), trainer.train_source.generator.get_state()],
        "random_states": random_states(trainer.device),
        "controls": dict(trainer.controls.values),
        "candidates": trainer.controls.candidates,
        "unreadable": dict(trainer.train_source.unreadable),
        **{name: getattr(trainer, name) for name in KEPT},
    }


LOADED = ("model", "optimizer", "scaler", "gate", "ledger")
KEPT = ("readable", "times_activated", "rows", "changes", "progress", "flops", "uncounted")


def restore(trainer: AdaptiveSparseTrainer, state: dict) -> None:
    """Takes up a `state_of`; the next `train` goes on from there."""
    begin(trainer, state["schedule"]["epochs"], state["schedule"]["warmup"])
    for name in LOADED:
        getattr(trainer, name).load_state_dict(state[name])
    for name in KEPT:
        forms = [(type(v), getattr(v, "shape", None)) for v in (state[name], getattr(trainer, name))]
        if forms[0] != forms[1]:
            raise ValueError(f"{name} of another form")
        setattr(trainer, name, state[name])
    trainer.schedule, trainer.resumed = Schedule(**state["schedule"]), True
    trainer.generator.set_state(state["generators"][0])
    trainer.train_source.generator.set_state(state["generators"][1])
    restore_random_states(trainer.device, state["random_states"])
    trainer.controls.values, trainer.controls.candidates = dict(state["controls"]), state["candidates"]
    trainer.train_source.unreadable = dict(state["unreadable"])


def random_states(device: torch.device) -> list:
    """States of the generators that a dataset of the user's may draw from."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    kind, keys, *rest = np.random.get_state()
    return [torch.get_rng_state(), cuda, random.getstate(), (kind, keys.tolist(), *rest)]


def restore_random_states(device: torch.device, states: list) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
    random.setstate(states[2])
    np.random.set_state(states[3])


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Makes a folder, and keeps other runs out of it while the block lasts. Raises BadInput.

    The lock dies with its process. It is best effort on shared drives, and Windows has none. Of several
    processes the first keeps it.
    """
    try:
        out.resolve().mkdir(parents=True, exist_ok=True)
        handle = None if fcntl is None or world()[0] else os.open(out, os.O_RDONLY)
    except (OSError, ValueError) as error:
        raise BadInput(
            f"--out {out}: expected a folder that can be written ({error}); name another"
        ) from error
    try:
        if busy(out, handle):
            raise BadInput(f"--out {out}: another run writes to it; wait until it has ended, or name another")
        yield
    finally:
        if handle is not None:
            os.close(handle)


def busy(out: Path, handle: int | None) -> bool:
    """Locks an open folder; whether another run has."""
    try:
        if handle is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return not os.path.samestat(os.fstat(handle), os.stat(out))  # renamed by another just now
    except OSError as error:  # or a drive that cannot lock
        return isinstance(error, BlockingIOError | FileNotFoundError)
    return False


def rotate_folder(out: Path, say: Callable[[str], None]) -> None:
    """Renames the run in a folder to <out>-1, -2, …. Raises BadInput where it holds somebody else's files."""
    try:
        there = sorted(path.name for path in out.iterdir() if path.name[0] != "." and path.suffix != ".part")
        if there and read_config(out).get("program") not in PROGRAMS:
            found = printable(there[0])
            raise BadInput(
                f"--out {out}: expected a new folder, or one of a run; found {found}; name another"
            )
        if there:
            place = out.resolve()
            names = (place.with_name(f"{place.name}-{number}") for number in itertools.count(1))
            new = place.rename(next(path for path in names if not path.exists()))
            say(f"the run in {out} is now in {new}")
    except OSError as error:
        raise BadInput(
            f"--out {out}: expected a folder that can be written ({error}); name another"
        ) from error


def read_config(out: Path) -> dict:
    """The config.json of a run's folder; {} where there is none, or it is damaged."""
    try:
        return dict(json.loads((out / "config.json").read_text(encoding="utf-8")))
    except DAMAGE:
        return {}


def check_apart(out: Path, data: Path) -> None:
    """Raises BadInput where results would lie among the data, or the data among the results."""
    ours, theirs = out.resolve(), data.resolve()
    if theirs.exists() and (ours.is_relative_to(theirs) or theirs.is_relative_to(ours)):
        raise BadInput(f"--out {out}: expected a folder apart from the data in {data}; name another")


def as_json(value: object, indent: int | None = None) -> bytes:
    """UTF-8 JSON, with null for a number that is not finite, which strict readers refuse."""
    plain = json.loads(json.dumps(value), parse_constant=lambda name: None)
    return json.dumps(plain, indent=indent).encode()


def write_by(path: Path, writer: Callable[[BinaryIO], None]) -> None:
    """Writes a file so that it is there whole or not at all, of several processes the first. Raises BadInput
    where the disk refuses."""
    if world()[0]:
        return
    draft = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(draft, "wb") as file:
            writer(file)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.replace(draft, path)
        except (FileExistsError, PermissionError):  # a mounted drive may not rename over what is there
            path.unlink()
            os.rename(draft, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        reason = f"expected a folder with room to write in ({error.strerror}); choose another --out"
        raise BadInput(f"{path}: {reason}") from error


def write_whole(path: Path, content: bytes) -> None:
    """As `write_by`."""
    write_by(path, lambda file: file.write(content))


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first; what has another name is not ours."""
    return sorted(path for path in folder.glob("*.ckpt") if re.fullmatch(r"\d{6}", path.stem))


def save_checkpoint(folder: Path, state: dict) -> None:
    """Writes `state` as the newest checkpoint in `folder` and keeps the one before it."""
    there = checkpoints(folder)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    path = folder / f"{int(there[-1].stem) + 1 if there else 0:06d}.ckpt"
    write_whole(path, hashlib.sha256(payload).digest() + payload)
    for old in there[:-1] * (world()[0] == 0):
        old.unlink()


def read_checkpoint(path: Path) -> dict:
    """What was saved. Raises one of UNFIT."""
    content = path.read_bytes()
    if hashlib.sha256(content[32:]).digest() != content[:32]:
        raise ValueError("it is damaged")
    return torch.load(io.BytesIO(content[32:]), weights_only=True, map_location="cpu")


# %% The model [markdown]
# ## The model
#
# Any classifier of torchvision, with as many outputs as there are classes. Weights that were trained on
# ImageNet are what makes fine-tuning short; only the last layer, which has another shape, begins anew.
# Weights that cannot be had are an error: a model that silently began at random would learn far less, and
# no figure of the run would say why.


# %% The model
def build_model(settings: Settings, data: ImageData | int, say: Callable = lambda line: None) -> nn.Module:
    """The model and weights that the settings name, from views [B, 3, S, S] to logits [B, classes].

    data: or a number of classes. say: told what of it begins anew. With `probe_first` the last layer is the
    linear probe's, and needs the data. Raises BadInput for weights that are not there or belong to another
    model, and sizes that the model cannot take.
    """
    classes = data if isinstance(data, int) else len(data.classes)
    model, new = bare_model(settings.model, classes, settings.image_size), []
    if settings.weights != "none":
        new = load_weights(settings, model)
    say(f"weights: {settings.weights}" + (f"; begun anew: {', '.join(new)}" if new else ""))
    name, head = head_of(model)
    model.new_head = f"{name}.weight" in new and not settings.probe_first
    if settings.probe_first:
        weight, bias = probe_head(settings, data)
        say(f"linear probe: {data.references['linear probe']['words']}")
        fitted = {"weight": weight.view_as(head.weight), "bias": bias}
        head.load_state_dict({key: fitted[key] for key in head.state_dict()})
    return model.to(memory_format=torch.channels_last)


def takes_small_views(settings: Settings) -> bool:
    """Whether the model can do with views of half the side."""
    with torch.device("meta"):  # shapes alone
        model = bare_model(settings.model, 2, settings.image_size).eval()
        try:
            model(torch.zeros(1, 3, settings.image_size // 2, settings.image_size // 2))
        except (RuntimeError, AssertionError, ValueError):
            return False
    return True


def head_of(model: nn.Module) -> tuple[str, nn.Module]:
    """Name and module of a classifier's last layer, the one that makes its logits."""
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1]


# %% Views and the recipe [markdown]
# ## Views and the recipe
#
# A *view* is what the model sees of an image. Cropping belongs to decoding, further down: a JPEG need not be
# decoded finer than the crop asks for. All else is done for the whole batch at once on the training device:
# flip, colours, and a rectangle erased now and then.

# %% Views
PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet, 0 to 255
JITTER = 0.2  # largest change of brightness, contrast and saturation, as a fraction
ERASE = 0.1  # share of the views in which a rectangle is erased


@functools.cache
def pixel_statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each colour, copied to the device once: a copy in every step would wait."""
    return torch.tensor(PIXEL_MEAN, device=device), torch.tensor(PIXEL_STD, device=device)


def plain_view(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """For evaluation, nothing drawn: [B, H, W, 3], 0 to 255, to about zero mean and unit variance,
    float [B, 3, H, W], channels last."""
    mean, std = pixel_statistics(images.device)
    return ((images - mean) / std).permute(0, 3, 1, 2)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """A random flip, change of colours and erased rectangle, per sample.

    images: uint8 [B, H, W, 3]. The generator is the CPU's, so that views do not depend on the device.
    """
    drawn = torch.rand(9, len(images), 1, 1, 1, generator=generator).to(images.device, non_blocking=True)
    images = torch.where(drawn[0] < 0.5, images.flip(2), images).float()
    images = change_colours(images, 1 + JITTER * (2 * drawn[1:4] - 1))
    return erase_rectangle(plain_view(images), drawn[4:9])


def change_colours(images: Tensor, factors: Tensor) -> Tensor:
    """Scales brightness, contrast and saturation by `factors` [3, B, 1, 1, 1]; images float [B, H, W, 3]."""
    brightness, contrast, saturation = factors
    grey = images.mean(3, keepdim=True)
    middle = grey.mean((1, 2), keepdim=True)
    images = grey + (images - grey) * saturation
    return ((images - middle) * contrast + middle).mul_(brightness).clamp_(0, 255)


def erase_rectangle(views: Tensor, drawn: Tensor) -> Tensor:
    """Zeroes a rectangle of 2 to 33 % of the area in a share of the views [B, 3, H, W].

    drawn: uniform [5, B, 1, 1, 1]. Zhong et al. 2020, Random Erasing Data Augmentation.
    """
    chance, size, shape, top, left = (part.view(-1, 1, 1, 1) for part in drawn)
    height, width = views.shape[2:]
    area, ratio = 0.02 + 0.31 * size, torch.exp(math.log(0.3) * (2 * shape - 1))  # sides from 0.3 to 3.3
    tall, broad = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    rows = (torch.arange(height, device=views.device)[:, None] + 0.5) / height - top * (1 - tall)
    columns = (torch.arange(width, device=views.device) + 0.5) / width - left * (1 - broad)
    inside = (rows >= 0) & (rows < tall) & (columns >= 0) & (columns < broad) & (chance < ERASE)
    return views.masked_fill_(inside, 0.0)  # a copy would lose channels last


# %% The recipe
LABEL_SMOOTHING = 0.1  # of the loss that trains; significance uses the raw loss
CLIP_NORM = 5.0  # largest norm of a step's gradients
HEAD_RATE = 10  # learning rate of a new last layer on pretrained weights, times that of the rest


def recipe(settings: Settings, model: nn.Module) -> tuple[torch.optim.Optimizer, nn.Module]:
    """SGD with momentum for networks with batch norm, AdamW for others; a per-sample cross-entropy."""
    convolutional = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    pretrained = settings.weights != "none"
    peak = {(True, True): 0.02, (True, False): 0.1, (False, True): 1e-4, (False, False): 1e-3}
    rate = settings.lr or peak[convolutional, pretrained] * (settings.batch_size / 128) ** 0.5
    head = set(map(id, head_of(model)[1].parameters()))
    groups = []
    for new, decayed in itertools.product((False, True), (True, False)):
        chosen = [p for p in model.parameters() if (id(p) in head) is new and (p.ndim > 1) is decayed]
        faster = HEAD_RATE if new and getattr(model, "new_head", False) else 1
        own = {"lr": rate * faster, "weight_decay": settings.weight_decay * decayed}
        groups += [{"params": chosen} | own] if chosen else []
    optimizer = torch.optim.AdamW(groups, lr=rate, fused=True)
    if convolutional:
        optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True, fused=True)
    return optimizer, nn.CrossEntropyLoss(reduction="none", label_smoothing=LABEL_SMOOTHING)


def default_recipe(device: torch.device, dtype: torch.dtype | None) -> dict[str, object]:
    """What the device decides of the training; a CPU gets a smaller network, smaller images, less time."""
    workers = {"workers": min(8, os.cpu_count() or 1)}
    if device.type == "cuda":
        return workers | {"model": "resnet50", "image_size": 224, "epochs": 20, "batch_size": 128}
    return workers | {"model": "resnet18", "image_size": 128, "epochs": 8, "batch_size": 64}


def sources(settings: Settings, data: ImageData, device: torch.device) -> tuple[CropSource, CropSource]:
    """Where training and validation samples come from: crops, decoded when they are asked for."""
    settings = replace(settings, device=str(device))
    train = CropSource(data.train_images, data.train_labels, settings, training=True)
    return train, CropSource(data.val_images, data.val_labels, settings, training=False)


# %% The data [markdown]
# ## The data
#
# A hundred classes of ImageNet are some 130,000 photographs, more than memory holds as pixels: they stay on
# the disk, and each is decoded when it is trained on. Decoding is what a small machine waits for most, and
# where skipping pays first: *a photograph that the gate skips is never read.* Who wants more speed packs them
# once, shrunk, into one array (`python -m data_setup`); both forms train.


# %% Image data tags=["fold"]
# @title Image data
@dataclass
class ImageData:
    """What is trained on: pictures on the disk, or arrays uint8 [N, H, W, 3].

    Labels are int64 [N] with values in [0, len(classes)).
    """

    name: str  # "imagenet100", "shapes", or the path's name
    synthetic: bool  # True where the images are drawn, so accuracies say nothing about photographs
    classes: list[str]  # names for people, all different
    train_images: np.ndarray | Photos
    train_labels: np.ndarray
    val_images: np.ndarray | Photos
    val_labels: np.ndarray
    source: str  # where it is read from, for the log
    difficulty: np.ndarray | None = None  # uint8 [N_train], shapes only: 0 easy, 1 hard, 2 mislabelled
    unreadable: list[str] = field(default_factory=list)  # files that were skipped
    references: dict[str, dict] = field(default_factory=dict)  # for the summary, measured without a gate
    heads: dict[tuple, tuple[Tensor, Tensor]] = field(default_factory=dict)  # of linear probes

    def __post_init__(self):
        self.name, self.source = printable(self.name), printable(self.source)
        self.classes = [printable(str(name)) for name in self.classes]


# %% Layouts [markdown] tags=["shared"]
# ### Layouts
#
# Folders of images come in many forms: `train/<class>/` with `val/`, `valid/` or `test/`; one folder a class
# and no validation images; Kaggle's `ambityga/imagenet100` in parts, `train.X1` to `train.X4`, of 25 classes
# each. Competitions let images lie flat and name their classes in `train.csv`. All of it may lie some folders
# deeper than you think, or in a `.zip`. One listing reads it where it lies, and tells what it leaves out.

# %% Layouts tags=["shared", "fold"]
# @title Layouts
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
SUFFIXES = {suffix: form for suffix, form in Image.registered_extensions().items() if form in FORMATS}
LARGEST_FILE = 64 << 20  # bytes
SPLIT = r"(train|training|val|valid|validation|test|testing)(?:\.X[^/]*|_images)?/"
LAYOUT = re.compile(rf"((?:[^/]+/)*?)(?:{SPLIT})+([^/]+)/.*", re.IGNORECASE)  # folder, split, class
TABLE = re.compile(r"(?:^|[/\\])(train|labels|val|valid|validation|test)\.csv$", re.IGNORECASE)
CLASS = re.compile("label|class|categor|target|species|breed", re.IGNORECASE)  # names of a column of classes


def names_in(root: Path | Rows) -> list[str]:
    """The files below `root`, a folder or a .zip, sorted; links are followed. Raises one of DAMAGE."""
    if isinstance(root, Rows):
        return root.names
    names, faults, above = [], [], {str(root): ()}
    if not root.is_dir():
        with zipfile.ZipFile(plain(root)) as archive:
            return sorted(archive.namelist())
    for place, folders, files in os.walk(root, onerror=faults.append, followlinks=True):
        way = *above.pop(place), os.path.realpath(place)
        if way[-1] in way[:-1]:  # a link led back
            folders.clear()
            continue
        above |= {os.path.join(place, folder): way for folder in folders}
        parts = Path(place).relative_to(root).parts
        names += ["/".join((*parts, name)) for name in files]
    if faults:
        raise faults[0]
    return sorted(names)


def find_layout(path: Path, names: list[str], fraction: float) -> tuple[list[str], dict, list[str]]:
    """Reads classes and splits out of `names`, the files below `path`; the topmost set counts.

    A class is a folder with all that lies in it. A fraction of each is set aside where no validation images
    have classes. Returns the classes, {"train" and "val": (files, labels int64 [N])}, and lines to tell.
    Raises BadInput where there is no set, more than one, or a class in one split only.
    """
    images, others, told, splits = defaultdict(list), defaultdict(list), [], {}  # "a/b/" -> files in it
    for name in names:
        *parts, file = name.replace("\\", "/").split("/")  # Windows writes such .zips
        if not any(part[:1] in ("", ".") or part in ("__MACOSX", "Labels.json") for part in (*parts, file)):
            known = os.path.splitext(file)[1].lower() in SUFFIXES
            (images if known else others)["".join(f"{part}/" for part in parts)].append(name)
    train, val = find_classes(path, images, others)
    if not val:
        told = [f"no validation images in class folders: {fraction:.0%} of each class are kept for it"]
        train, val = divide(train, fraction).values()
    if alone := ", ".join(sorted(train.keys() ^ val.keys())):
        raise BadInput(
            f"--data {path}: only in train or only in val: {alone[:300]}; expected each in both; add "
            f"images, or name train's folder alone, of which {fraction:.0%} are then kept for validation"
        )
    classes = sorted(train)
    for split, found in (("train", train), ("val", val)):
        labels = np.repeat(np.arange(len(classes)), [len(found[label]) for label in classes])
        splits[split] = [name for label in classes for name in found[label]], labels
    if left := left_out(images, others, {*splits["train"][0], *splits["val"][0]}):
        told.append(f"left out: {left}")
    return [printable(label) for label in classes], splits, told


def find_classes(path: Path, images: dict[str, list], others: dict[str, list]) -> tuple[dict, dict]:
    """{class: files} to train and to validate on, the second {} where none has classes. Raises BadInput."""
    sets = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))  # of a folder, a split, a class
    ranked = defaultdict(list)
    for folder, files in images.items():
        if match := LAYOUT.fullmatch(folder):
            sets[match[1]][match[2][:2].lower()][match[3]] += files
        for part in re.finditer("[^/]+/", folder):
            if folder[: part.end()] in images:
                sets[folder[: part.start()]][""][part[0][:-1]] += files
    for folder, found in sets.items():
        train, depth = found["tr"], folder.count("/")
        val = next((found[split] for split in ("va", "te") if found[split].keys() & train.keys()), {})
        many = {label: files for label, files in (train or found[""]).items() if len(files) > 1}
        if val and len(train.keys() | val.keys()) > 1:
            ranked[0, depth].append((folder, train, val))
        elif len(many) > 1 and not all(re.fullmatch(SPLIT, f"{label}/", re.IGNORECASE) for label in many):
            ranked[0 if train else 1, depth].append((folder, many, {}))
    tops = ranked[min(ranked)] if ranked else read_tables(path, images, others)
    if len(tops) != 1:
        found = ", ".join(top[0] for top in tops) or left_out(images, others, set()) or "no files"
        raise BadInput(
            f"--data {path}: expected one set of two or more classes, train/<class>/ with val/<class>/ or "
            f"test/<class>/, or a folder for each, or train.csv of files and their label; found "
            f"{found[:300]}; name the folder of one set"
        )
    return tops[0][1:]


def read_tables(path: Path, images: dict[str, list], others: dict[str, list]) -> list[tuple]:
    """[(folder, train, val)] of the topmost train.csv, or labels.csv, and val.csv or test.csv; [] if none."""
    for folder in sorted(others, key=lambda folder: folder.count("/")):
        tables = {match[1][:2].lower(): name for name in others[folder] if (match := TABLE.search(name))}
        found = {split: read_table(opened(path), name, images) for split, name in tables.items()}
        train = found.get("tr", found.get("la", {}))
        val = next((found[s] for s in ("va", "te") if s in found and found[s].keys() == train.keys()), {})
        train = {label: files for label, files in train.items() if val or len(files) > 1}
        if len(train) > 1:
            others[folder] = [name for name in others[folder] if name not in tables.values()]
            return [(folder, train, val)]
    return []


def read_table(root: Path | zipfile.ZipFile, table: str, images: dict[str, list]) -> dict[str, list[str]]:
    """{class: files} of a .csv; {} where no column names images, or none is known to hold classes."""
    text = io.StringIO(read_file(root, table).decode("utf-8-sig", "backslashreplace"), newline="")
    lines = [[cell.strip() for cell in line] for line in csv.reader(text) if line] or [[""]]
    head, rows = lines[0], [line for line in lines[1:] if len(line) == len(lines[0])]
    home, split = re.fullmatch("(.*/)?(.*)", table[:-4].replace("\\", "/")).groups("")
    names = {name.replace("\\", "/"): name for files in images.values() for name in files}
    known, classes = {os.path.splitext(name)[0]: names[name] for name in names} | names, defaultdict(list)
    folders = "", f"{split}/", f"{split}_images/", "images/", "train/", "train_images/"
    columns = itertools.product(range(len(head)), [home + folder for folder in folders])
    column, place = max(columns, key=lambda at: sum(at[1] + row[at[0]] in known for row in rows))
    label = class_column([name for name in head if name != head[column]])
    for row in rows if label else ():
        file, value = known.pop(place + row[column], None), row[head.index(label)]
        if file and value:
            classes[value].append(file)
    return classes


def class_column(names: list[str]) -> str | None:
    """Which column holds classes: by its name, or the only one."""
    return next(filter(CLASS.search, names), names[0] if len(names) == 1 else None)


def divide(classes: dict[str, list[str]], fraction: float) -> dict[str, dict[str, list[str]]]:
    """Sets a fraction of every class aside, evenly spread: the first image always, the second never."""
    splits: dict[str, dict[str, list[str]]] = {"train": {}, "val": {}}
    share = round(1000 * fraction)
    for label, files in classes.items():
        for place, name in enumerate(files):
            split = "val" if place * share % 1000 < share else "train"
            splits[split].setdefault(label, []).append(name)
    return splits


def left_out(images: dict[str, list], others: dict[str, list], used: set[str]) -> str:
    """Counts what is not used: images by folder, other files by suffix."""
    counts = Counter()
    for folder, files in images.items():
        counts[f"images in {folder or 'no folder'}"] = sum(name not in used for name in files)
    for folder in filter(None, others):
        counts.update(os.path.splitext(name)[1].lower() or "without suffix" for name in others[folder])
    parts = [f"{count:,} {what}" for what, count in (+counts).most_common()]
    return printable(", ".join(parts[:8] + ["..."] * (len(parts) > 8)))


def printable(text: str) -> str:
    """A name from a file, with escapes for what is no text and for what a terminal would obey."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def plain(path: Path) -> Path:
    """The same path. Raises ValueError for a pipe, socket or device, where a reader may wait for ever."""
    if not path.is_file() and not path.is_dir() and path.exists():
        raise ValueError("a pipe, a socket or a device, not a file")
    return path


def opened(path: Path | Rows) -> Path | Rows | zipfile.ZipFile:
    """What `read_file` reads from."""
    return zipfile.ZipFile(path) if isinstance(path, Path) and path.is_file() else path


def read_file(root: Path | Rows | zipfile.ZipFile, name: str) -> bytes:
    """A file's bytes. What is damaged, missing or too large may raise anything."""
    with plain(root / name).open("rb") if isinstance(root, Path) else root.open(name) as file:
        raw = file.read(LARGEST_FILE + 1)
    if len(raw) > LARGEST_FILE:
        raise ValueError(f"more than {LARGEST_FILE:,} bytes")
    return raw


def open_image(raw: bytes) -> Image.Image:
    """A picture, upright, from a file's bytes; a JPEG's are not yet decoded. Damage may raise anything."""
    image = Image.open(io.BytesIO(raw), formats=sorted(set(SUFFIXES.values())))
    if image.getexif().get(0x112, 1) != 1:  # EXIF's orientation
        image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # grey of more than 8 bits, of which often 10 or 12 are used
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        values -= min(0, values.min())
        bits = max(0 if image.mode == "F" else 8, math.ceil(math.log2(values.max() or 1)))
        image = Image.fromarray((values * (255 / 2.0**bits)).astype(np.uint8))
    return image


# %% Public sets [markdown] tags=["shared"]
# ### Public sets
#
# Two libraries fetch public data: `kagglehub` gives a folder, and `datasets` a table of files, of which only
# the rows that are asked for are read. Both keep what they fetched, for when there is no network.

# %% Public sets tags=["shared", "fold"]
# @title Public sets
FETCHERS = {"kaggle": ("kagglehub", "dataset_download"), "hf": ("datasets", "load_dataset")}
HUB = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
PROBE_SECONDS = 3.0
NETWORK = (OSError, http.client.HTTPException, futures.TimeoutError)


def fetch(data: str) -> Path | Rows | None:
    """What "kaggle:OWNER/NAME" or "hf:NAME" is, or "hf:" and a folder; None for others. Raises BadInput."""
    kind, _, name = data.partition(":")
    if kind not in FETCHERS:
        return None
    package, function = FETCHERS[kind]
    if kind == "hf" and not Path(name).exists():
        try:
            probe(HUB)
        except NETWORK:  # or `datasets` tries for half a minute, and then reads its store
            os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        found = getattr(importlib.import_module(package), function)(name)
        return Path(found) if kind == "kaggle" else Rows(data, found)
    except Exception as error:  # a library may raise anything
        raise BadInput(
            f"--data {data}: {one_line(error)}; expected the package {package} (pip install it), a network, "
            f"and a set of labelled images, public or yours by login; mend that, or name a folder of images"
        ) from error


def probe(address: str) -> None:
    """Raises one of NETWORK unless a server answers within PROBE_SECONDS."""
    answer = ThreadPoolExecutor(1).submit(urllib.request.urlopen, address, timeout=PROBE_SECONDS)
    answer.result(PROBE_SECONDS).close()  # in a thread, since nothing else ends a name look-up that hangs


class Rows:
    """The pictures of a set of `datasets`, named as if in class folders: <split>/<class>/<row>.png."""

    def __init__(self, name: str, parts: dict[str, Any]):
        """parts: {split: dataset}. Raises ValueError where no column has pictures, or none is their class."""
        self.name, self.stem, self.names, self.parts = name, name.rpartition("/")[2], [], {}
        for split, part in parts.items():
            kinds = {type(kind).__name__: column for column, kind in reversed(part.features.items())}
            image = kinds.get("Image")
            label = kinds.get("ClassLabel") or class_column([c for c in part.features if c != image])
            if not image or not label:
                raise ValueError(f"columns {', '.join(part.features)}")
            undecoded = part.cast_column(image, type(part.features[image])(decode=False))
            self.parts[split] = undecoded.select_columns(image)
            titles = getattr(part.features[label], "names", None)
            for row, value in enumerate(part[label][:]):
                if value not in (None, -1):  # -1 is what tests have instead of a class
                    title = re.sub(r"[/\\]", "_", str(titles[value] if titles else value))
                    self.names.append(f"{split}/{title}/{row}.png")

    def __str__(self) -> str:
        return self.name

    def open(self, name: str) -> BinaryIO:
        """The file of a row."""
        split, _, row = name.removesuffix(".png").split("/")
        (file,) = self.parts[split][int(row)].values()
        return io.BytesIO(file["bytes"]) if file["bytes"] else Path(file["path"]).open("rb")


# %% Photographs [markdown]
# ### Photographs
#
# A box is drawn on the upright picture, and no more is decoded than it needs: where it is at least twice as
# large as wanted, a JPEG is decoded at a half, a quarter or an eighth of its size.

# %% Photographs tags=["fold"]
# @title Photographs
PICTURE = 96  # pixels, height and width of the plain pictures shown in the lessons
KEEP = 1 << 30  # bytes of plain pictures held in memory
DRAWS = 40  # numbers that choose a box: ten tries of four


def crop_box(width: int, height: int, draws: Sequence[float] = ()) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a crop, in pixels.

    draws: DRAWS numbers in [0, 1) give, as torchvision's RandomResizedCrop, 8 to 100 % of the area, from 3:4
    to 4:3; none give the square in the middle whose side is 7/8 of the short side, as 224 is of 256.
    """
    for share, shape, across, down in zip(*[iter(draws)] * 4, strict=True):
        area, ratio = width * height * (0.08 + 0.92 * share), 0.75 * (16 / 9) ** shape
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(across * (width - w + 1)), int(down * (height - h + 1))
            return left, top, left + w, top + h
    side = 7 / 8 * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def decode(raw: bytes, side: int, box: Callable[[int, int], tuple]) -> np.ndarray:
    """The part of a picture that box(width, height) gives, uint8 [side, side, 3]. May raise anything."""
    image = open_image(raw)
    width, height = image.size
    box = box(width, height)
    shrink = min(box[2] - box[0], box[3] - box[1]) / side
    if draft := image.draft(None, (int(width / shrink), int(height / shrink))):  # None but for JPEGs
        box = tuple(edge * draft[1][2] / width for edge in box)
    image = image if image.mode == "RGB" else image.convert("RGB")
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box))


def crop_array(pixels: np.ndarray, side: int, draws: Sequence[float] = ()) -> np.ndarray:
    """As `decode`, of an array uint8 [H, W, 3]: torch does it several times as fast as PIL."""
    left, top, right, bottom = map(round, crop_box(pixels.shape[1], pixels.shape[0], draws))
    batch = torch.from_numpy(pixels[top:bottom, left:right].copy())[None].permute(0, 3, 1, 2)
    batch = F.interpolate(batch, (side, side), mode="bilinear", antialias=True)
    return batch[0].permute(1, 2, 0).numpy()


class Photos:
    """Pictures that are decoded when asked for; indexing gives plain ones to look at."""

    def __init__(self, place: Path | Rows | np.ndarray, names: Sequence):
        """place: a folder or a .zip, names: files in it; or an array uint8 [N, H, W, 3] and its rows."""
        self.place, self.names, self.root = place, names, opened(place)
        self.kept: dict[tuple[int, int], np.ndarray] = {}
        warnings.filterwarnings("ignore", module=r"PIL\.")  # of broken EXIF and its like

    def chosen(self, rows: Iterable[int]) -> Photos:
        """Those of some rows."""
        return self.named([self.names[row] for row in rows])

    def named(self, names: Sequence) -> Photos:
        """Others of the same place."""
        photos = copy.copy(self)
        photos.names, photos.kept = names, {}
        return photos

    def read(self, index: int) -> bytes:
        return read_file(self.root, self.names[index])

    def crop(self, index: int, side: int, draws: Sequence[float] = ()) -> np.ndarray:
        """As `decode`; what nothing was drawn for is kept while KEEP allows."""
        if not draws and (index, side) in self.kept:
            return self.kept[index, side]
        if isinstance(self.place, np.ndarray):
            return crop_array(self.place[self.names[index]], side, draws)
        picture = decode(self.read(index), side, functools.partial(crop_box, draws=draws))
        if not draws and len(self.kept) < KEEP // picture.nbytes:
            self.kept[index, side] = picture
        return picture

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: object) -> np.ndarray:
        """Plain pictures, uint8 [..., PICTURE, PICTURE, 3]; unreadable ones are grey."""
        rows = np.arange(len(self))[index]
        pictures = np.full((*rows.shape, PICTURE, PICTURE, 3), 128, dtype=np.uint8)
        for place, row in np.ndenumerate(rows):
            with contextlib.suppress(Exception):  # a damaged file can break a decoder in any way
                pictures[place] = self.crop(row, PICTURE)
        return pictures


# %% Crops [markdown]
# ### Crops
#
# Threads decode, four batches ahead of the step and no further, since the gate should decide late, when it
# knows the newest losses. All chance is drawn in the thread that trains: results do not depend on how many
# threads there are.

# %% Crops tags=["fold"]
# @title Crops
AHEAD = 4  # batches decoded before they are needed: about one chunk of the gate


class CropSource:
    """Crops of images, decoded by threads, batch by batch, and made the model's input on the device."""

    def __init__(self, images: np.ndarray | Photos, labels: np.ndarray, settings: Settings, training: bool):
        """training: random crops, augmented; else the plain middle."""
        self.images = images if isinstance(images, Photos) else Photos(images, range(len(images)))
        self.device, self.pixels, self.side = torch.device(settings.device), settings.image_size, 1.0
        self.labels = torch.as_tensor(labels).long().to(self.device)
        self.batch_size, self.workers = settings.batch_size, settings.workers
        self.training, self.generator = training, torch.Generator()
        self.unreadable: dict[int, str] = {}  # index -> "name: reason"
        self.remedy = f"raise --workers, now {self.workers}, or pack the images: python -m data_setup"

    def __len__(self) -> int:
        return len(self.labels)

    def stream(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Batch]:
        """A `Batch` for each pair of indices (int64 [B], CPU) and weights (float32 [B]), in their order.

        Raises BadInput where more than 1 % of the images are unreadable.
        """
        pool, waiting = ThreadPoolExecutor(self.workers, "decode"), deque()
        pinned, numbers = self.device.type == "cuda", DRAWS if self.training else 0
        side = pixels_at(self.side, self.pixels)
        try:
            for indices, weights in batches:
                pictures = torch.empty((len(indices), side, side, 3), dtype=torch.uint8, pin_memory=pinned)
                draws = torch.rand(len(indices), numbers, generator=self.generator).tolist()
                fill = functools.partial(self.fill, pictures.numpy(), indices.tolist(), draws)
                waiting.append((indices, weights, pictures, pool.map(fill, range(self.workers))))
                if len(waiting) > AHEAD:
                    yield self.finish(*waiting.popleft())
            while waiting:
                yield self.finish(*waiting.popleft())
        finally:
            pool.shutdown(cancel_futures=True)

    def in_order(self, first: int = 0, step: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Views and labels of all readable samples, for evaluation; or of every `step`th batch."""
        batches = torch.arange(len(self)).split(self.batch_size)[first::step]
        for batch in self.stream((indices, torch.ones(len(indices))) for indices in batches):
            if len(batch):
                yield batch.images, batch.labels

    def fill(self, pictures: np.ndarray, indices: list[int], draws: list, first: int) -> dict[int, str]:
        """A thread's share of a batch, from `first` on; returns {index: why it cannot be read}."""
        bad = {}
        for place in range(first, len(indices), self.workers):
            index = indices[place]
            try:
                pictures[place] = self.images.crop(index, pictures.shape[1], draws[place])
            except Exception as error:  # a damaged file can break a decoder in any way
                bad[index] = reason(self.images.names[index], error)
        return bad

    def finish(self, indices: Tensor, weights: Tensor, pictures: Tensor, shares: Iterator[dict]) -> Batch:
        """The batch, once its pictures are there."""
        bad = {index: reason for share in shares for index, reason in share.items()}
        self.unreadable |= bad
        check_unreadable(self.unreadable, len(self))
        missing = torch.tensor(list(bad), dtype=torch.int64)
        if bad:
            good = ~torch.isin(indices, missing)
            indices, weights, pictures = indices[good], weights[good], pictures[good]
        pictures = pictures.to(self.device, non_blocking=True)
        views = augment(pictures, self.generator) if self.training else plain_view(pictures)
        labels = self.labels[indices.to(self.device, non_blocking=True)]
        return Batch(indices, weights, views, labels, missing)


# %% Folders and arrays [markdown]
# ### Folders and arrays
#
# Packed images are four `.npy` files and the names of the classes. They are mapped, not read: the operating
# system loads the pages that are touched, so a set larger than memory opens at once, and a skipped picture is
# never loaded.

# %% Folders and arrays tags=["fold"]
# @title Folders and arrays
PACKED = ("train_images", "train_labels", "val_images", "val_labels")


def read_folders(path: Path | Rows, val_fraction: float, say: Callable[[str], None]) -> ImageData:
    """The photographs below `path`, a folder or a .zip, in any layout. Raises BadInput."""
    photos = Photos(path, names_in(path))
    classes, splits, told = find_layout(path, photos.names, val_fraction)
    for line in told:
        say(printable(f"{path}: {line}"))
    arrays = {}
    for split, (names, labels) in splits.items():
        arrays |= {f"{split}_images": photos.named(names), f"{split}_labels": labels}
    return ImageData(path.stem, False, titles_of(classes, photos), **arrays, source=str(path))


def titles_of(labels: list[str], photos: Photos) -> list[str]:
    """Names for people: of Kaggle's Labels.json, {folder: "name, synonym"}, or the folders'."""
    tables = [row for row, name in enumerate(photos.names) if name.endswith("Labels.json")]
    table = dict(json.loads(photos.read(tables[0]))) if tables else {}
    titles = [str(table.get(label, label)).partition(",")[0] for label in labels]
    twice = {name for name, count in Counter(titles).items() if count > 1}  # ImageNet has two cranes
    return [f"{name} ({key})" if name in twice else name for name, key in zip(titles, labels, strict=True)]


def read_packed(path: Path) -> ImageData:
    """Maps packed arrays. Raises one of DAMAGE where one is missing, damaged, or of the wrong shape."""
    arrays = {name: np.lib.format.open_memmap(plain(path / f"{name}.npy"), mode="r") for name in PACKED}
    classes = json.loads(plain(path / "classes.json").read_text(encoding="utf-8"))
    if not isinstance(classes, list):
        raise ValueError("classes.json is no list of names")
    for split in ("train", "val"):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"].astype(int, casting="same_kind")
        good = images.dtype == np.uint8 and images.shape[3:] == (3,) and labels.shape == images.shape[:1]
        if not good or set(labels.tolist()) != set(range(len(classes))):
            found = f"{images.dtype} {list(images.shape)}, labels to {labels.max()}"
            raise ValueError(f"{split}: {found}, expected some of all {len(classes)} classes")
        arrays |= {f"{split}_images": Photos(images, range(len(labels))), f"{split}_labels": labels}
    return ImageData(path.stem, False, classes, **arrays, source=str(path))


# %% Where the data lie tags=["fold"]
# @title Where the data lie
PARTS = ("train", "train.X1", "train.X2", "train.X3", "train.X4")


def load_data(settings: Settings, say: Callable[[str], None]) -> ImageData:
    """The images that `settings.data` names: "auto", "imagenet100", "shapes" or a path.

    Raises BadInput, in one sentence, for them, and for weights that cannot be had or do not fit.
    """
    settings = settings if settings.data_dir and settings.out else fill_defaults(settings)
    check_apart(Path(settings.out), Path(settings.weights).expanduser())
    data = shapes(settings.train_size) if settings.data == "shapes" else read_data(settings, say)
    build_model(settings, data, say)
    return data


def read_data(settings: Settings, say: Callable[[str], None]) -> ImageData:
    """The images on the disk that the settings name. Raises BadInput."""
    path = fetch(settings.data) or find_data(settings)
    globs = ("train_images.npy", "*/train_images.npy") if isinstance(path, Path) else ()
    packed = [file.parent for glob in globs for file in path.glob(glob)]
    try:
        data = read_packed(packed[0]) if packed else read_folders(path, settings.val_fraction, say)
        if len(data.classes) < 2:
            raise ValueError(f"the only class is {data.classes[0]}")
    except BadInput:
        raise
    except DAMAGE as error:
        raise BadInput(
            f"--data {path}: {one_line(error)}; expected a folder, or a whole .zip, whose Labels.json is "
            f" {{class: name}}, or {', '.join(PACKED)} .npy with classes.json; correct or unpack it"
        ) from error
    if settings.train_size:
        rows = balanced_subset(data.train_labels, settings.train_size, len(data.classes))
        data.train_images, data.train_labels = data.train_images.chosen(rows), data.train_labels[rows]
    data.name = "imagenet100" if settings.data == "imagenet100" else printable(path.stem)
    return data


def find_data(settings: Settings) -> Path:
    """The path that `settings.data` is, or where ImageNet-100 lies. Raises BadInput."""
    if settings.data not in ("auto", "imagenet100"):
        return Path(settings.data).expanduser().absolute()
    folder = Path(settings.data_dir).expanduser()
    for root in (folder, KAGGLE_INPUT):
        if found := search(root, holds_imagenet, "imagenet"):
            return found
    raise BadInput(
        f"--data {settings.data}: not found in {folder} nor in {KAGGLE_INPUT}, expected ImageNet-100 in one "
        f"of them; attach {KAGGLE_DATA} to the notebook on Kaggle, or make it with python -m data_setup "
        "imagenet100 make from an ILSVRC-2012 tree, or name a PATH"
    )


def holds_imagenet(path: Path) -> Path | None:
    """`path` where a hundred classes named as ImageNet's lie, or packed arrays of a hundred; else None."""
    if (path / "classes.json").is_file():
        keys = json.loads((path / "classes.json").read_bytes())
    elif path.is_file():
        keys = set(re.findall(r"/(n\d{8})/", "\n".join(names_in(path))))
    else:
        keys = {folder.name for part in PARTS for folder in (path / part).glob("n????????")}
    return path if len(keys) == 100 else None


# %% Weights tags=["fold"]
# @title Weights
def bare_model(name: str, classes: int, side: int) -> nn.Module:
    """A classifier of torchvision with `classes` outputs and random weights.

    Raises BadInput for a name that is none, or views of a size that it cannot take.
    """
    try:
        if name not in torchvision.models.list_models(module=torchvision.models):
            raise ValueError("there is none of that name")
        options = {"image_size": side} if name.startswith("vit_") else {}
        if name in ("googlenet", "inception_v3"):  # they return more than logits unless told
            options = {"aux_logits": False, "init_weights": True, "transform_input": True}
        model = torchvision.models.get_model(name, num_classes=classes, **options)
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, side, side))
    except (*DAMAGE, AssertionError) as error:
        raise BadInput(
            f"--model {name} --image-size {side}: expected a classifier of torchvision, such as resnet50, "
            f"and a size that it takes, such as 224 ({one_line(error)}); correct them"
        ) from error
    return model.train()


class Unread:
    """Stands for each object in a file of weights that is no tensor, so that none of its code is run."""

    __init__ = __setstate__ = lambda self, *parts: None


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, bare or among what training programs save beside it: of the dicts in the
    file, the one with the most tensors. Raises one of DAMAGE, and what torch raises."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    objects = []
    if zipfile.is_zipfile(path):  # else it is of before torch 1.6
        objects = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    try:
        with torch.serialization.safe_globals([(Unread, name) for name in objects]):
            parts, most, seen = [torch.load(path, map_location="cpu", weights_only=True)], {}, set()
    except pickle.UnpicklingError as error:
        raise ValueError(f"not only tensors: {', '.join(objects) or one_line(error)}") from error
    for part in parts:  # a list that grows meanwhile
        if isinstance(part, dict) and id(part) not in seen:  # which may hold itself
            seen.add(id(part))
            parts += part.values()
            tensors = {str(name): value for name, value in part.items() if isinstance(value, Tensor)}
            most = max(most, tensors, key=len)
    if not most:
        raise ValueError(f"no state dict, but {', '.join(objects) or type(parts[0]).__name__}")
    return most


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """As `read_state`."""
    if not importlib.util.find_spec("safetensors"):
        raise ValueError("the package safetensors is missing: pip install safetensors")
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(one_line(error)) from error


def named_as(own: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that `own` has names for, whatever wrapper's name stands before them in `state`, such as
    module. or _orig_mod.: the one that fits most of them."""
    starts = dict.fromkeys(name[: dot.end()] for name in ("", *state) for dot in re.finditer(r"^|\.", name))
    start = max(starts, key=lambda start: sum(start + name in state for name in own))
    return {name: state[start + name] for name in own if start + name in state}


def read_weights(settings: Settings) -> dict[str, Tensor]:
    """The state dict that `settings.weights` names, of which no code is run: a file's, or torchvision's,
    searched for and else downloaded. Raises what torch raises."""
    if settings.weights != "imagenet":
        return read_state(plain(Path(settings.weights).expanduser()))
    weights, found = torchvision.models.get_model_weights(settings.model).DEFAULT, None
    name = weights.url.rpartition("/")[2]
    for root in (Path(settings.data_dir).expanduser(), KAGGLE_INPUT):
        found = found or search(root, lambda folder: folder if (folder / name).is_file() else None)
    how = {"map_location": "cpu", "check_hash": True, "weights_only": True}
    return weights.get_state_dict(model_dir=found, **how)  # None: torch's cache


def load_weights(settings: Settings, model: nn.Module) -> list[str]:
    """Loads what fits of the weights that the settings name. Returns the names in the model that are left.

    Raises BadInput where there are no weights, or they belong to another model.
    """
    # DenseNets are published with names that torchvision no longer uses: norm.1 for norm1.
    old, own = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)"), model.state_dict()
    try:
        held = {old.sub(r"\1\2", name): value for name, value in read_weights(settings).items()}
        state = named_as(own, held)
        if "encoder.pos_embedding" in state:  # positions belong to one size of image
            state = interpolate_embeddings(settings.image_size, model.patch_size, state)
        for name, value in state.items():
            if value.layout != torch.strided or value.is_quantized or value.is_meta:
                raise ValueError(f"{name} is sparse, quantised or without numbers (meta)")
        fitting = {name: value for name, value in state.items() if value.shape == own[name].shape}
        missing = [name for name in own if name not in fitting and not name.endswith("num_batches_tracked")]
        if sum(v.numel() for v in fitting.values()) < 0.5 * sum(v.numel() for v in model.parameters()):
            raise ValueError(
                f"it holds {len(held)} tensors, such as {next(iter(held))}; of the model's {len(missing)} "
                f"are missing or of another shape, first {missing[0]}"
            )
        own.update(fitting)
        model.load_state_dict(own)
    except UNFIT as error:
        url = torchvision.models.get_model_weights(settings.model).DEFAULT.url
        raise BadInput(
            f"--weights {settings.weights}: {one_line(error)}; expected those of {settings.model}: imagenet "
            f"({url}, downloaded, or put into {settings.data_dir} or {KAGGLE_INPUT}), a FILE written by "
            "torch.save(model.state_dict(), FILE), or none, to begin at random"
        ) from error
    return missing


# %% The linear probe [markdown]
# ### The linear probe
#
# Everything frozen, only a new last layer trained, on features computed once: minutes for ImageNet-100. See
# how near it comes to the fine-tuned model: where it does, fine-tuning bought little, whoever selected its
# samples. `--probe-first` begins with that layer.


# %% The linear probe tags=["fold"]
# @title The linear probe
def probe_head(settings: Settings, data: ImageData) -> tuple[Tensor, Tensor]:
    """Weight [classes, d] and bias of the last layer that fits best on frozen weights, computed once; its
    accuracy (percent) and seconds stand in `data.references`."""
    key, settings = (settings.model, settings.weights, settings.image_size), fitted(settings, data)
    if key not in data.heads:
        began = time.perf_counter()
        model = build_model(replace(settings, probe_first=False), data)
        model.set_submodule(head_of(model)[0], nn.Identity())
        train, val = sources(settings, data, torch.device(settings.device))
        train.training, train.images = False, train.images.chosen(range(len(train)))  # plain, and not kept
        features, labels = features_of(model, train)
        val_features, val_labels = features_of(model, val)
        weight, bias = fit_last_layer(features, labels, len(data.classes))
        right = F.linear(val_features, weight, bias).argmax(1) == val_labels
        accuracy, seconds = 100 * float(right.float().mean()), time.perf_counter() - began
        words = f"{accuracy:.2f} % with everything but a new last layer frozen, in {seconds:.1f} s"
        data.references["linear probe"] = {"accuracy": accuracy, "seconds": seconds, "words": words}
        data.heads[key] = weight, bias
    return data.heads[key]


@torch.no_grad()
def features_of(model: nn.Module, source: CropSource) -> tuple[Tensor, Tensor]:
    """What a frozen model makes of the views of a source, float32 [N, d], and their labels [N]."""
    model.to(source.device).eval()
    parts = [(model(views), labels) for views, labels in source.in_order()]
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def fit_last_layer(features: Tensor, labels: Tensor, classes: int, epochs: int = 30) -> tuple[Tensor, Tensor]:
    """Logistic regression on features [N, d] by AdamW; the same weight and bias every time."""
    mean, spread = features.mean(0), features.std(0) + 0.1 * features.std() + 1e-6  # some features are dead
    generator = torch.Generator().manual_seed(0)
    weight = torch.zeros(classes, features.shape[1], device=features.device, requires_grad=True)
    bias = torch.zeros(classes, device=features.device, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=generator).to(labels.device).split(256):
            optimizer.zero_grad()
            F.cross_entropy(F.linear((features[rows] - mean) / spread, weight, bias), labels[rows]).backward()
            optimizer.step()
        schedule.step()
    weight = weight.detach() / spread  # for features as they are
    return weight, bias.detach() - weight @ mean


def show_probe(settings: Settings, data: ImageData) -> None:
    """Prints what a new last layer alone reaches on the frozen weights."""
    probe_head(settings, data)
    print(f"linear probe: {data.references['linear probe']['words']}")


# %% One picture tags=["fold"]
# @title One picture
def view_side(settings: Settings) -> int:
    """Pixels, the side of what the model sees."""
    return settings.image_size


def read_view(raw: bytes, side: int) -> np.ndarray:
    """What the model sees of a picture, from a file's bytes: uint8 [side, side, 3]. Raises one of DAMAGE."""
    return decode(raw, side, crop_box)


# %% Pick a balanced subset tags=["shared", "fold"]
# @title Pick a balanced subset
def balanced_subset(labels: np.ndarray, size: int, classes: int) -> np.ndarray | slice:
    """Choose `size` of the labels (int64 [N]), evenly over the classes; the same choice every time.

    Returns sorted indexs, or the whole slice where size is 0.
    Raises BadInput where size is below the number of classes or above N.
    """
    if size == 0:
        return slice(None)
    if not classes <= size <= len(labels):
        raise BadInput(f"--train-size {size}: expected 0 (all), or {classes} to {len(labels)}; change it")
    order = np.random.default_rng(0).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    turn = np.empty(len(labels), dtype=np.int64)  # place in the queue of its class; all firsts come first
    turn[by_class] = np.concatenate([np.arange(count) for count in np.bincount(labels)])
    return np.sort(order[np.argsort(turn[order], kind="stable")[:size]])


# %% What every reader needs tags=["shared", "fold"]
# @title What every reader needs
SPLITS = ("train", "val", "test")
KAGGLE_INPUT = Path("/kaggle/input")  # holds <slug>/ and datasets/<owner>/<slug>/
MOST_DRAWN = 200_000  # training images of `shapes`: about a minute and 1.3 GB
SEARCH_FOLDERS = 1000  # looked into, and names read in each: inputs may be millions of files on a slow disk
DAMAGE = (OSError, EOFError, ValueError, RuntimeError, MemoryError, LookupError, SyntaxError, TypeError)
DAMAGE += (struct.error, zlib.error, lzma.LZMAError, zipfile.BadZipFile, csv.Error, tokenize.TokenError)
DAMAGE += (Image.DecompressionBombError, ArithmeticError, pickle.UnpicklingError)
UNFIT = (*DAMAGE, AttributeError)  # what a checkpoint or weights may raise


def one_line(error: Exception) -> str:
    """An error's own words on one line, since bad input gets one sentence."""
    words = str(error).rpartition("WeightsUnpickler error: ")[2]  # before it torch advises to trust the file
    return printable(" ".join(words.split()))[:200] or type(error).__name__


def reason(name: str, error: Exception) -> str:
    """Why a file is left out, less an address in memory: the same file is the same line."""
    return printable(f"{name}: {one_line(error).partition(' <')[0]}")


def search(root: Path, test: Callable[[Path], Any], word: str = "") -> Any:
    """Look for data in `root` and its folders, nearest first, bounded in folders and in names read.

    test(path) is asked of every folder, and of every .zip with `word` in its name (none where it is ""), and
    answers None where it knows nothing. Returns the first answer that is not None, else None.
    """
    places = [root]
    for place in itertools.islice(places, SEARCH_FOLDERS):  # of a list that grows meanwhile
        with contextlib.suppress(*DAMAGE):  # not there, not ours to read, or not whole
            if (answer := test(place)) is not None:
                return answer
            with os.scandir(place) as names:
                entries = sorted(itertools.islice(names, SEARCH_FOLDERS), key=lambda entry: entry.name)
            for entry in entries:
                zipped = word and word in entry.name.lower() and entry.name.lower().endswith(".zip")
                if zipped or (entry.is_dir() and entry.name.partition(".")[0] not in SPLITS):
                    places += [place / entry.name]
    return None


# %% Drawn images [markdown] tags=["shared"]
# ### Drawn images
#
# A notebook without internet must still show something, and a test of the gate needs to know the truth about
# every sample. So `shapes` is drawn: ten kinds of bright figure on a darker ground, turned a little, with
# noise. Of the training images, chosen by chance,
#
# - 60 % are **easy**: large, in strong contrast, at most one stroke beside the figure;
# - 35 % are **hard**: two of low contrast, small, partly covered, crowded;
# - 5 % are **mislabelled**: drawn as easy ones, but with a wrong label. Their loss stays high whatever the
#   model learns, so a gate that trusts the loss alone keeps paying for them.
#
# Validation images are easy and hard, and their labels are all right.


# %% Drawn images tags=["shared", "fold"]
# @title Drawn images
# A figure is its corners, x + iy with y down, in units of its radius: one multiplication turns and scales it.
# No figure is another one's mirror image, since training flips pictures.
CIRCLE = np.exp(1j * np.linspace(0, 2 * np.pi, 61))
FIGURES: dict[str, np.ndarray] = {
    "arrow": np.array([-1j, 0.95, 0.3, 0.3 + 0.95j, -0.3 + 0.95j, -0.3, -0.95]),
    "circle": 0.9 * CIRCLE,
    "crescent": 0.35 + np.append(CIRCLE[15:46], 0.4 * CIRCLE[45:14:-1].real + 1j * CIRCLE[45:14:-1].imag),
    "heart": 0.75 * (CIRCLE - 1j * np.sqrt(np.abs(CIRCLE.real))) + 0.2j,
    "hourglass": np.array([-0.8 - 0.95j, 0.8 - 0.95j, -0.8 + 0.95j, 0.8 + 0.95j]),
    "plus": np.outer([1, 1j, -1, -1j], [0.95 - 0.28j, 0.95 + 0.28j, 0.28 + 0.28j]).ravel(),
    "ring": np.append(0.95 * CIRCLE, 0.55 * CIRCLE[::-1]),
    "square": np.array([-0.8 - 0.8j, 0.8 - 0.8j, 0.8 + 0.8j, -0.8 + 0.8j]),
    "star": 1.1 * CIRCLE[3:60:6] * np.tile([0.42, 1], 5),
    "triangle": 0.2j + 1.15 * CIRCLE[5:60:20],
}


def draw(rng: np.random.Generator, figure: np.ndarray, hard: bool) -> np.ndarray:
    """Draw a figure (complex [corners]) at twice the size, and shrink it. Returns uint8 [32, 32, 3]."""
    low_contrast, small, covered, crowded = hard & (rng.permutation(4) < 2)  # two of the four
    ground = rng.integers(20, 80, 3)
    contrast = rng.uniform(25, 40) if low_contrast else rng.uniform(140, 170)
    colour = (ground + contrast * rng.uniform(0.6, 1, 3)).astype(int)
    image = Image.new("RGB", (64, 64), tuple(ground))
    pen = ImageDraw.Draw(image)

    def stroke(middle: complex, reach: float, width: float) -> None:
        ends = middle + reach * rng.uniform(-1, 1, 4).view(complex)
        pen.line(ends.view(float).tolist(), tuple(rng.integers(0, 256, 3)), round(width))

    for _ in range(8 if crowded else rng.integers(2)):
        stroke(32 + 32j, 32, rng.uniform(2, 5))
    radius = rng.uniform(8, 12) if small else rng.uniform(19, 25)
    centre = 32 + 32j + max(4, 28 - radius) * complex(*rng.uniform(-1, 1, 2))
    corners = centre + radius * np.exp(1j * rng.uniform(-0.35, 0.35)) * figure
    pen.polygon(corners.view(float).tolist(), tuple(colour))
    if covered:
        stroke(centre, radius, 0.8 * radius)
    noisy = np.asarray(image.reduce(2)) + rng.normal(0, 8, (32, 32, 3))
    return noisy.clip(0, 255).astype(np.uint8)


def shapes(n_train: int = 0, n_val: int = 1_000, seed: int = 0) -> ImageData:
    """Draw the embedded ten-class set; the same seed gives the same bytes.

    Returns n_train (0: 6,000) and n_val pictures; `difficulty` holds exactly 60 % easy, 35 % hard, 5 %
    mislabelled. Raises BadInput for fewer than the ten classes, or too many.
    """
    count, figures, n_train = len(FIGURES), list(FIGURES.values()), n_train or 6_000
    for n in (n_train, n_val):
        if not count <= n <= MOST_DRAWN:
            expected = f"0 (6,000), or {count} to {MOST_DRAWN:,}"
            raise BadInput(f"--train-size {n}: expected {expected}; change it")
    rng = np.random.default_rng(seed)

    def split(n: int, mislabelled: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        labels = rng.permutation(np.arange(n) % count)
        hard = round(0.35 * n)
        difficulty = rng.permutation(np.repeat([0, 1, 2], [n - hard - mislabelled, hard, mislabelled]))
        images = [draw(rng, figures[k], d == 1) for k, d in zip(labels, difficulty, strict=True)]
        wrong = difficulty == 2
        labels[wrong] = (labels[wrong] + rng.integers(1, count, mislabelled)) % count
        return np.stack(images), labels, difficulty.astype(np.uint8)

    train_images, train_labels, difficulty = split(n_train, round(0.05 * n_train))
    val_images, val_labels, _ = split(n_val, 0)
    arrays = train_images, train_labels, val_images, val_labels
    return ImageData("shapes", True, list(FIGURES), *arrays, f"the drawing seed {seed}", difficulty)


# %% Where samples come from [markdown] tags=["shared"]
# ## Machinery
#
# ### Where samples come from
#
# A source turns batches of indices into batches of views, and is asked for activated samples only. Arrays
# live on the training device as uint8 and are augmented there. A `DataLoader` of yours gives up its
# dataset, batch size, workers and collate function; its workers then see only the indices that the gate let
# through.


# %% Where samples come from tags=["shared", "fold"]
# @title Where samples come from
def as_input(images: Tensor) -> Tensor:
    """A model's float32 input: uint8 becomes 0 to 1, colours that stand last go first, [B, C, H, W], and grey
    pictures, uint8 [B, H, W], get their one; what else there is stays."""
    if images.dtype == torch.uint8:
        images = images.float() / 255
        images = images[..., None] if images.ndim == 3 else images
    colours = (1, 3, 4)
    last = images.ndim == 4 and images.shape[3] in colours and images.shape[1] not in colours
    return images.permute(0, 3, 1, 2).float() if last else images.float()


def shrunk(images: Tensor, side: float) -> Tensor:
    """Views float [B, C, H, W] at a share of their side. Raises BadInput for others."""
    if side == 1:
        return images
    if images.ndim != 4:
        raise BadInput(
            f"views {list(images.shape)}: expected [B, C, H, W] for progressive resolution; use full"
        )
    sides = [pixels_at(side, whole) for whole in images.shape[2:]]
    return F.interpolate(images, sides, mode="bilinear", antialias=True)


def pixels_at(side: float, whole: int) -> int:
    """A share of a whole side, in pixels, in steps of four."""
    return whole if side == 1 else max(4, 4 * round(side * whole / 4))


def are_classes(labels: Tensor) -> bool:
    """Whether labels are class numbers, one a sample."""
    return labels.ndim == 1 and not labels.is_floating_point()


def as_labels(labels: object, classes: bool = True) -> Tensor:
    """Class numbers, int64 [N], from numbers [N] or [N, 1] of any type, or one-hot rows [N, C].

    Without `classes`, since a loss of the user's own reads them, their form stays. Raises BadInput.
    """
    try:
        labels = torch.as_tensor(labels if isinstance(labels, Tensor) else np.asarray(labels))
    except (TypeError, ValueError) as error:
        raise BadInput(f"labels that are no numbers: expected class numbers ({one_line(error)})") from error
    if not classes:
        return labels if labels.is_floating_point() else labels.long()
    rows = labels.reshape(len(labels), labels[:1].numel() or 1)
    if rows.shape[1] > 1 and bool((rows.amax(1) == 1).all()) and int(rows.count_nonzero()) == len(rows):
        rows = rows.long().argmax(1, keepdim=True)
    if rows.shape[1] > 1 or bool((rows != rows.long()).any()):
        found = f"labels {list(labels.shape)} such as {rows[0, :5].tolist()}"
        raise BadInput(f"{found}: expected class numbers, or a loss function of yours that reads such labels")
    return rows[:, 0].long()


def known_labels(data: object) -> Tensor | None:
    """Labels that a dataset tells without loading images: `targets`, as torchvision's have, or a
    TensorDataset's, or a Subset's of these; None without, and where a `target_transform` changes them."""
    if isinstance(data, Subset):
        labels = known_labels(data.dataset)
        return None if labels is None else labels[torch.as_tensor(data.indices)]
    targets = data.tensors[-1] if isinstance(data, TensorDataset) else getattr(data, "targets", None)
    changed = getattr(data, "target_transform", None) is not None
    values = np.asarray(None if changed else targets)
    return as_labels(values) if values.dtype.kind in "biuf" else None


class ArraySource:
    """Images [N, ...] and labels [N] held on the training device; `view(images, generator)` makes a batch of
    images the model's input."""

    remedy = "the data lie on the device, so the processor is slow or busy: raise the batch size"

    def __init__(
        self,
        images: object,
        labels: object,
        device: torch.device,
        batch_size: int,
        view: Callable = lambda images, generator: as_input(images),
        classes: bool = True,
    ):
        """classes: labels are made class numbers; else they stay as they are."""
        with warnings.catch_warnings():  # memory-mapped arrays are read-only, and we only read
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            self.images = torch.as_tensor(images).to(device)
        self.labels = as_labels(labels, classes).to(device)
        if len(self.images) != len(self.labels):
            raise BadInput(f"{len(self.images)} images, {len(self.labels)} labels: expected as many of each")
        self.batch_size, self.view, self.generator = batch_size, view, torch.Generator(device)
        self.side = 1.0
        self.unreadable: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def stream(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Batch]:
        """A Batch for each (indices int64 [B], weights [B]), in their order."""
        for indices, weights in batches:
            rows = indices.to(self.labels.device, non_blocking=True)
            views = shrunk(self.view(self.images[rows], self.generator), self.side)
            yield Batch(indices, weights, views, self.labels[rows], indices[:0])

    def in_order(self, first: int = 0, step: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Views and labels of all samples, for evaluation; of every `step`th batch, from the `first` on."""
        size = max(self.batch_size, 500 * 3072 // max(1, self.images[0].numel()))  # 500 pictures of 32 pixels
        batches = zip(self.images.split(size), self.labels.split(size), strict=True)
        for images, labels in itertools.islice(batches, first, None, step):
            yield self.view(images, self.generator), labels


# %% A dataset of your own tags=["shared", "fold"]
# @title A dataset of your own
class DatasetSource:
    """A map-style dataset of (image, label), read by a DataLoader with the user's own settings."""

    remedy = "give the DataLoader more workers"

    def __init__(self, loader: DataLoader, device: torch.device, classes: bool = True):
        """classes: labels are made class numbers; else they stay as they are."""
        self.loader, self.device, self.classes = loader, device, classes
        self.batch_size, self.side = loader.batch_size, 1.0
        self.unreadable: dict[int, str] = {}
        self.generator = torch.Generator()
        names = ("collate_fn", "num_workers", "prefetch_factor", "pin_memory", "worker_init_fn", "timeout")
        self.how = {name: getattr(loader, name) for name in (*names, "multiprocessing_context")}
        if loader.num_workers and not workers_can_see(loader):
            text = "workers cannot see what the cells of a notebook define, so samples are read without them"
            warnings.warn(text, stacklevel=2)
            self.how |= {"num_workers": 0, "prefetch_factor": None, "timeout": 0}
            self.how["multiprocessing_context"] = None

    def __len__(self) -> int:
        return len(self.loader.dataset)

    @property
    def labels(self) -> Tensor | None:
        return known_labels(self.loader.dataset)

    def stream(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Batch]:
        """A Batch for each (indices, weights). No class of ours goes to a worker, however it starts."""
        asked: deque[tuple[Tensor, Tensor]] = deque()

        def rows() -> Iterator[list[int]]:
            for batch in batches:
                asked.append(batch)
                yield batch[0].tolist()

        how = {"batch_sampler": rows(), "generator": self.generator, **self.how}
        samples = iter(DataLoader(self.loader.dataset, **how))
        while True:
            missing: list[int] = []
            try:
                images, labels = self.move(next(samples), self.classes)
                if len(labels) != len(asked[0][0]):
                    raise LookupError(f"{len(labels)} of {len(asked[0][0])} samples came back")
            except StopIteration:
                return
            except BadInput:
                raise
            except Exception as error:  # a dataset raises what it likes
                if not asked:
                    raise  # whoever decides on batches did
                images, labels, missing = self.one_by_one(asked[0][0].tolist(), error)
            indices, weights = asked.popleft()
            lost = torch.isin(indices, torch.tensor(missing, dtype=torch.int64))
            yield Batch(indices[~lost], weights[~lost], images, labels, indices[lost])

    def one_by_one(self, indices: list[int], error: Exception) -> tuple[Tensor, Tensor, list[int]]:
        """Images and labels of those samples that can be read, and the others, at most 1 % of the set.

        Raises BadInput with the `error` that the batch failed with where each can be read alone.
        """
        good, bad = [], {}
        for index in indices:
            try:
                sample = self.loader.dataset[index]
                if len(self.move(self.loader.collate_fn([sample]), self.classes)[1]) != 1:
                    raise LookupError("left out by the loader's collate_fn")
                good.append(sample)
            except Exception as reason:
                bad[index] = one_line(reason)
        if not bad:
            raise BadInput(f"a batch fails whose samples are whole ({one_line(error)}): mend them") from error
        self.unreadable.update(bad)
        check_unreadable(self.unreadable, len(self))
        none = torch.empty(0), torch.empty(0)
        return *(self.move(self.loader.collate_fn(good), self.classes) if good else none), list(bad)

    def move(self, batch: object, classes: bool) -> tuple[Tensor, Tensor]:
        """A model's input and labels, on the device. Raises BadInput where a batch is of another form."""
        if not (isinstance(batch, list | tuple) and len(batch) == 2):
            parts = f" of {len(batch)}" if isinstance(batch, list | tuple | dict) else ""
            raise BadInput(f"a batch that is a {type(batch).__name__}{parts}: expected (images, labels)")
        images, labels = torch.as_tensor(batch[0]), as_labels(batch[1], classes)
        images, labels = (part.to(self.device, non_blocking=True) for part in (images, labels))
        return shrunk(as_input(images), self.side), labels

    def in_order(self, first: int = 0, step: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """All samples, or every `step`th from the `first` on, labels as classes. Raises BadInput."""
        samples = range(first, len(self), step)
        try:
            for batch in DataLoader(self.loader.dataset, self.batch_size, sampler=samples, **self.how):
                yield self.move(batch, classes=True)
        except BadInput:
            raise
        except Exception as error:  # a dataset raises what it likes
            found = f"a validation sample ({one_line(error)})"
            raise BadInput(f"{found}: expected readable ones; mend it or leave it out") from error


def workers_can_see(loader: DataLoader) -> bool:
    """Whether a worker process finds all that it is sent; not so, unless forked, what a notebook defines."""
    context = loader.multiprocessing_context or multiprocessing.get_context()
    if context.get_start_method() == "fork" or hasattr(sys.modules["__main__"], "__file__"):
        return True
    try:
        sent = pickle.dumps((loader.dataset, loader.collate_fn, loader.worker_init_fn))
    except (pickle.PicklingError, AttributeError, TypeError):  # a lambda, an open file
        return False
    return b"__main__" not in sent


def check_unreadable(unreadable: dict[int, str], count: int) -> None:
    """Raises BadInput where more than 1 % of `count` samples are unreadable."""
    if len(unreadable) > 0.01 * count:
        index, reason = next(iter(unreadable.items()))
        found = f"{len(unreadable)} of {count} samples unreadable, such as {index} ({reason})"
        raise BadInput(f"{found}: expected at most 1 %; mend or remove them")


def as_source(
    data: object, device: torch.device, batch_size: int | None, name: str, classes: bool = True
) -> ArraySource | DatasetSource:
    """A source for a DataLoader, a map-style dataset or a pair of arrays; a source is taken as it is.

    classes: labels are made class numbers; else a loss of the user's own reads them.

    Raises BadInput for a loader whose sampler would be lost, for what is none of these, and for no samples.
    """
    if isinstance(data, tuple | list) and len(data) == 2 and all(hasattr(part, "shape") for part in data):
        data = ArraySource(*data, device, batch_size or 64, classes=classes)
    elif not hasattr(data, "stream"):
        if not isinstance(data, DataLoader):
            if not (hasattr(data, "__getitem__") and hasattr(data, "__len__")):
                raise BadInput(f"{name}, {type(data)}: expected a DataLoader, a dataset or two arrays")
            data = DataLoader(data, batch_size=batch_size or 64)
        sampler = data.sampler
        plain = isinstance(sampler, SequentialSampler | RandomSampler) and len(sampler) == len(data.dataset)
        if not plain or getattr(sampler, "replacement", False) or data.batch_size is None:
            raise BadInput(
                f"{name} with {type(sampler).__name__} and batch size {data.batch_size}: expected a plain or "
                "shuffling DataLoader of a map-style dataset, since the gate does the sampling"
            )
        data = DatasetSource(data, device, classes)
    if not len(data):
        raise BadInput(f"{name} of 0 samples: expected at least one")
    if world()[1] > 1 and data.batch_size < 2 * world()[1]:
        raise BadInput(f"batch size {data.batch_size}: expected two samples or more a process; raise it")
    return data


# %% Devices [markdown] tags=["shared"]
# ### Devices
#
# Half the bits are faster where the hardware computes with them, and slower or pointless elsewhere. The
# choice is made from what the device reports, never from timing, so that runs repeat.


# %% Devices tags=["shared", "fold"]
# @title Devices
def pick_device(name: str) -> torch.device:
    """The device for auto, cpu or cuda. Raises BadInput if there is none, or torch has no code for it."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    name = "auto" if world()[1] > 1 else name  # each of several has its own
    try:
        device = torch.device("cuda", torch.cuda.current_device()) if name == "auto" else torch.device(name)
        torch.zeros(1, device=device).add(1).item()
    except (RuntimeError, AssertionError) as error:  # none, or a P100, for which most builds have no code
        found = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        raise BadInput(
            f"--device {name}: expected a GPU that torch {torch.__version__} has code for, such as a T4; "
            f"found {found} ({one_line(error)}); try --device cpu"
        ) from error
    return device


def cpu_has_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor reports bf16 arithmetic (avx512_bf16 or amx_bf16)."""
    return cpuinfo.exists() and re.search(r"\b(avx512_bf16|amx_bf16)\b", cpuinfo.read_text()) is not None


def pick_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The autocast type for `--amp` on a device; None for plain float32."""
    if amp == "fp16" and device.type == "cpu":
        raise BadInput("--amp fp16: expected bf16, off or auto on a CPU, where fp16 loses small gradients")
    if amp != "auto":
        return {"off": None, "fp16": torch.float16, "bf16": torch.bfloat16}[amp]
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


@contextmanager
def enough_memory() -> Iterator[None]:
    """Turns an error of memory in the block into BadInput."""
    try:
        yield
    except RuntimeError as error:
        if not re.search("out of memory|DefaultCPUAllocator|ALLOC_FAILED", str(error)):  # GPU, CPU, cuDNN
            raise
        raise BadInput(f"a batch: expected memory for it ({one_line(error)}); halve --batch-size") from error


def guarded_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    before: Tensor,
    clip_norm: float = 0.0,
) -> Tensor:
    """Steps, or leaves no trace where gradients or buffers are not finite; returns which, on the device.

    before: the floating-point buffers, `joined`, as before the forward pass. clip_norm: gradients of a larger
    norm are scaled down to it; 0 leaves them. A fused optimizer decides on the device; another waits for it.
    """
    weights = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    scaler.unscale_(optimizer)
    norm = nn.utils.get_total_norm([p.grad for p in weights])
    after = joined(float_buffers(model))
    ok = norm.isfinite() & after.isfinite().all().to(norm.device)
    if world()[1] > 1:
        ok = summed((~ok).int()) == 0
    if clip_norm:
        nn.utils.clip_grads_with_norm_(weights, clip_norm, norm)
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        begin_at_zero(optimizer)
        optimizer.grad_scale, optimizer.found_inf = None, (~ok).float()
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf
    elif ok:
        try:
            scaler.step(optimizer)
        except (TypeError, AssertionError) as error:  # LBFGS; SAM
            found = f"{type(optimizer).__name__} ({one_line(error)})"
            raise BadInput(f"{found}: expected an optimizer that needs no closure, such as AdamW") from error
    scaler.update()
    put_back(float_buffers(model), torch.where(ok.to(before.device), after, before))
    return ok


def begin_at_zero(optimizer: torch.optim.Optimizer) -> None:
    """Momenta where there are none yet: a skipped first step would leave them as memory happened to be."""
    for group in optimizer.param_groups:
        for weight in group["params"] if group.get("momentum") else ():
            if weight.grad is not None and "momentum_buffer" not in optimizer.state[weight]:
                optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)


def float_buffers(model: nn.Module) -> list[Tensor]:
    return [b for b in model.buffers() if b.is_floating_point()]


def joined(values: list[Tensor]) -> Tensor:
    """A flat copy of all values: one kernel, since a fast GPU waits for launches more than for bytes."""
    return torch.cat([value.flatten() for value in values]) if values else torch.empty(0)


@torch.no_grad()
def put_back(values: list[Tensor], copy: Tensor) -> None:
    """Gives values what `joined` made of them."""
    if values:
        parts = copy.split([value.numel() for value in values])
        torch._foreach_copy_(values, [part.view_as(v) for part, v in zip(parts, values, strict=True)])


def check_losses(losses: Tensor, labels: Tensor) -> None:
    """Raises BadInput unless there is one loss for each of the labels [B]."""
    if losses.shape != labels.shape[:1]:
        raise BadInput(f"losses of shape {list(losses.shape)}: expected one a sample; use reduction='none'")


def check_outputs(logits: object, labels: Tensor) -> None:
    """Raises BadInput unless `logits` are [samples, classes], and labels [B] lie below the classes."""
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 2:
        what = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise BadInput(f"a model that returns {what}: expected logits [samples, classes]")
    low, high, classes = int(labels.min()), int(labels.max()), logits.shape[1]
    if are_classes(labels) and (low < 0 or high >= classes):
        raise BadInput(f"labels from {low} to {high}: expected 0 to {classes - 1}, the outputs of the model")


# %% Several processes [markdown] tags=["shared"]
# ### Several processes
#
# Under `torchrun --standalone --nproc_per_node=2` the same program trains on two devices, or, with
# `--nnodes`, on many machines. Every process holds the same gate, draws the same numbers and makes the same
# choice. It trains on its stride of every batch. Gradients are averaged by PyTorch's DistributedDataParallel;
# losses come together once a chunk. The first process alone prints and writes.

# %% Several processes tags=["shared", "fold"]
# @title Several processes
TEAM: dict[str, Any] = {}  # this process's place among several; the launcher's store, which outlives them


def world() -> tuple[int, int]:
    """Rank of this process, and how many train together: (0, 1) but under torchrun."""
    return TEAM.get("place", (0, 1))


def join() -> None:
    """Joins the processes that torchrun started, if it did, of which the first alone prints."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    if cuda := torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    TEAM["store"], *TEAM["place"] = next(torch.distributed.rendezvous("env://"))
    rank, size = TEAM["place"]
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    torch.distributed.init_process_group(backend, store=TEAM["store"], rank=rank, world_size=size)
    if rank:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.environ["TQDM_DISABLE"] = "1"
        warnings.simplefilter("ignore")


def ended(status: int, words: str = "") -> int:
    """Returns the exit status, having said why; of several processes the first to fail says it, and each ends
    here, without a farewell that another might never answer."""
    if words and (not TEAM or TEAM["store"].add("ended", 1) == 1):
        print(words, file=sys.stderr, flush=True)
    if TEAM:
        os._exit(status)
    return status


def gathered(value: Any) -> list:
    """Every process's value, by rank."""
    values = [value] * world()[1]
    if len(values) > 1:
        torch.distributed.all_gather_object(values, value)
    return values


def agreed(value: Any) -> Any:
    """The first process's value, in all of them."""
    return gathered(value)[0]


def check_alike(value: object, what: str) -> None:
    """Raises BadInput where a process has another value than the first."""
    if agreed(value) != value:
        raise BadInput(f"{what}: expected what process 0 finds there; give every machine the same")


def summed(values: Tensor) -> Tensor:
    """The sum of every process's tensor, of one shape, in place."""
    if world()[1] > 1:
        torch.distributed.all_reduce(values)
    return values


def own_share(values: Tensor) -> Tensor:
    """This process's stride of what all have [m]."""
    return values[world()[0] :: world()[1]]


def brought_together(flat: Tensor, own: Tensor, every: Tensor) -> Tensor:
    """Values [m] of the indices `every`, from each process's of its `own`, on the CPU if there are several;
    numbers that stand behind the values are summed."""
    if world()[1] == 1:
        return flat
    whole, order = torch.zeros(len(every) + len(flat) - len(own), dtype=flat.dtype), every.argsort()
    whole[order[torch.searchsorted(every[order], own.contiguous())]] = flat[: len(own)].cpu()
    whole[len(every) :] = flat[len(own) :]
    parts = [torch.empty_like(whole) for _ in range(world()[1])]
    torch.distributed.all_gather(parts, whole)  # over TCP in half of the time that a sum takes
    return torch.stack(parts).sum(0)


def share_of(batch: Batch) -> Batch:
    """This process's part of a batch that is all here."""
    if world()[1] == 1 or len(batch.whole) > len(batch):
        return batch
    return replace(batch.rows(*map(own_share, (batch.indices, batch.weights))), whole=batch.indices)


def tell_unreadable(source: ArraySource, lost: dict[int, str]) -> list[dict[int, str]]:
    """What each process could not read of a source, {index: why}, now known to all. Raises BadInput."""
    parts = gathered(lost)
    source.unreadable |= {index: why for part in parts for index, why in part.items()}
    check_unreadable(source.unreadable, len(source))
    return parts


def stream_of_shares(trainer: AdaptiveSparseTrainer, batches: Iterable[tuple]) -> Iterator[Batch]:
    """As the source's own stream. Of several processes each reads its stride of a batch; all of it where the
    gate wants to see the views. What one cannot read is missing in all."""
    source, size, seen = trainer.train_source, world()[1], needs_views(trainer.gate)
    if size == 1:
        yield from source.stream(batches)
        return
    seed = hash((trainer.seed, trainer.epoch, 0 if seen else world()[0])) % 2**63  # views of its own
    torch.manual_seed(seed)
    source.generator.manual_seed(seed)
    asked = deque()

    def strides() -> Iterator[tuple[Tensor, Tensor]]:
        for batch in batches:
            asked.append(batch[0])
            yield batch if seen else tuple(map(own_share, batch))

    for part in source.stream(strides()):
        indices, lost = asked.popleft(), [{}] * size
        if not isinstance(source, ArraySource):
            lost = tell_unreadable(source, {i: source.unreadable[i] for i in part.missing.tolist()})
        missing = torch.tensor(sorted(set().union(*lost)), dtype=torch.int64)
        kept = indices[~torch.isin(indices, missing)]
        if min(len(indices[rank::size]) - len(lost[rank]) for rank in range(size)) < 2:
            give_up(trainer.gate, kept)  # batch norm cannot train on a lone sample
            trainer.tally.waiting -= len(kept)
            yield replace(part.cut(0)[0], missing=missing)
        elif seen:
            yield replace(part.rows(kept, torch.ones(len(kept))), missing=missing)
        else:
            yield replace(part, missing=missing, whole=kept)


@functools.lru_cache(1)
def distributed(model: nn.Module) -> nn.Module:
    """A twin of the model, with the same weights and buffers, that averages gradients over the processes. On
    GPUs its batch norm sees the whole batch; on a CPU each process has its own statistics of a step."""
    if next(model.parameters()).is_cuda and any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):
        same = {id(value): value for value in (*model.parameters(), *model.buffers())}
        model = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model, same))
    warnings.filterwarnings("ignore", "`broadcast_buffers`")  # whose new name torch 2.10 does not know
    return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, static_graph=True)


# %% FLOPs and joules tags=["shared", "fold"]
# @title FLOPs and joules
class FlopCount(FlopCounterMode):
    """PyTorch's FLOP counter, which also lists the operators that it has no formula for."""

    def __init__(self):
        super().__init__(display=False)
        self.uncounted: set[str] = set()

    def _count_flops(self, func_packet, out, args, kwargs):
        if func_packet not in self.flop_registry:
            self.uncounted.add(str(func_packet).removeprefix("aten."))
        return super()._count_flops(func_packet, out, args, kwargs)


def flops_per_sample(model: nn.Module, images: Tensor, training: bool, autocast: Callable) -> tuple:
    """FLOPs of one sample (forward, and backward if `training`), the operators left uncounted, and logits.

    images: a float batch [B, ...] of the resolution in question. Neither the model nor any RNG is touched.
    """
    devices = [images.device] if images.is_cuda else []
    exact = nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH)  # the CPU's fused attention has no formula
    with torch.random.fork_rng(devices=devices), exact, FlopCount() as counter:
        twin = copy.deepcopy(model)
        if not training:
            twin.eval().requires_grad_()  # without gradients attention is one operator that has no formula
        with torch.enable_grad():
            with autocast():
                logits = twin(images)
            if training:
                logits.float().sum().backward()
    return counter.get_total_flops() / len(images), sorted(counter.uncounted), logits


class EnergyMeter:
    """Joules since it was made, by a GPU's own counter.

    `method` is nvml-counter or unavailable, and `reason` says why: no NVIDIA GPU, one from before Volta, no
    pynvml. A counter that fails later becomes unavailable too, rather than stand still. Of several processes
    on a machine it counts all their GPUs.
    """

    def __init__(self, device: torch.device):
        self.method, self.reason = "nvml-counter", ""
        self.start, alone = 0.0, [device.index or 0]
        self.indices = alone if world()[1] == 1 else range(int(os.environ["LOCAL_WORLD_SIZE"]))
        if device.type != "cuda" or world()[1] > len(self.indices):
            where = "GPUs of several machines" if device.type == "cuda" else f"a {device.type}"
            self.method, self.reason = "unavailable", f"no sensor for {where}"
        self.start = self.joules()

    def joules(self) -> float | None:
        """Joules so far; None where there is no counter."""
        if self.method == "unavailable":
            return None
        try:
            import pynvml  # optional

            pynvml.nvmlInit()  # counts its calls; only the first one costs anything
            handles = map(pynvml.nvmlDeviceGetHandleByIndex, self.indices)
            return sum(map(pynvml.nvmlDeviceGetTotalEnergyConsumption, handles)) / 1000 - self.start
        except Exception as error:  # drivers fail in many ways, and none may stop the training
            self.method, self.reason = "unavailable", f"{type(error).__name__}: {one_line(error)}"
            return None


@functools.cache
def energy_meter(device: torch.device) -> EnergyMeter:
    """The process's one meter for a device."""
    return EnergyMeter(device)


# %% The table tags=["shared", "fold"]
# @title The table
HEADER = "policy       epoch  phase   accuracy   loss  rate  target      θ    time     ETA"


def clock(seconds: float) -> str:
    """Seconds as 12 s, 3:05 or 1:02:03."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


def epoch_line(row: dict, number: str, left: float | None) -> str:
    """One row of the table. number: of the epoch among all. left: seconds to the end of all."""
    theta = "-" if row["threshold"] is None else f"{row['threshold']:.3f}"
    phase = "-" if row["policy"] in ("full", "short", "dense", "dense-short", "keep-short") else row["phase"]
    return (
        f"{row['policy']:<11} {number:>7} {phase:<7} {row['val_accuracy']:>6.2f} % {row['train_loss']:>6.3f} "
        f"{row['activation_rate']:>5.3f} {row['target_activation']:>7.3f} {theta:>6} "
        f"{clock(row['seconds']):>7} {'-' if left is None else clock(left):>7}"
    )


def print_table(bar: bool = True, say: Callable[[str], None] = tqdm.write) -> Callable[[str, dict], None]:
    """A listener: a row an epoch, and a progress bar within the epoch where there is a terminal."""
    histories, shown = Histories(), None

    def listen(event: str, data: dict) -> None:
        nonlocal shown
        histories(event, data)
        if event == "start":
            say(HEADER)
        elif event == "notice":
            say(data["text"])
        elif event == "control":
            say(f"{data['control']} {data['old']} -> {data['new']} at {data['candidates']} candidates")
        elif event == "chunk" and bar:
            shown = shown or tqdm(total=data["n"], unit=" candidates", leave=False, disable=None)
            shown.update(data["candidates"] - shown.n)
        if event in ("epoch", "end") and shown is not None:
            shown.close()
            shown = None
        if event == "epoch":
            say(epoch_line(data, "/".join(map(str, histories.epochs())), histories.outlook()[1]))

    return listen


# %% Flags [markdown] tags=["shared"]
# ### Settings from flags and variables
#
# One dataclass feeds the command line, the environment and the notebook. A refusal is one sentence: the
# value, what was expected, what it means.


# %% Flags tags=["shared", "fold"]
# @title Flags
EPILOG = "--predict PATH ... trains nothing: it classifies pictures by the model of the run in --out"


class Flags(argparse.ArgumentParser):
    """A command line whose complaints are one sentence."""

    def error(self, message: str) -> None:
        raise BadInput(message.removeprefix("argument ") + "; --help lists the flags")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def convert(item: Field, text: str, label: str) -> object:
    """The value of a field from what a person typed. Raises BadInput."""
    kind, value = item.type.removesuffix(" | None"), text
    if kind != item.type and text.lower() in ("", "auto", "none"):
        return None
    if kind == "bool":
        value = {"1": True, "true": True, "0": False, "false": False}.get(text.lower(), text)
    elif kind != "str":
        with contextlib.suppress(ValueError):  # no number: refused below
            value = int(text) if kind == "int" else float(text)
    check(item, value, label)
    return value


def parse(settings: ASTConfig, arguments: list[str], environment: dict[str, str]) -> ASTConfig:
    """The settings after their profile, AST_* variables and flags, of which a later one beats an earlier one.

    Raises BadInput for unknown flags and variables, and for values that cannot be.
    """
    items, values = {item.name: item for item in fields(settings)}, {}
    parser = Flags(f"{PROGRAM}.py", epilog=EPILOG, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for name, item in items.items():
        shown = getattr(settings, name)
        text = f"{item.metadata['help']} (default: {'auto' if shown is None else shown})".replace("%", "%%")
        how = {"action": argparse.BooleanOptionalAction} if item.type == "bool" else {"metavar": name.upper()}
        parser.add_argument(flag(name), help=text, **how)
    for variable, text in environment.items():
        if variable.startswith("AST_"):
            name = variable.removeprefix("AST_").lower()
            if name not in items:
                raise BadInput(f"{variable}={text}: expected AST_ and the name of a setting; unset it")
            values[name] = convert(items[name], text, f"{variable}=")
    for name, text in vars(parser.parse_args(arguments)).items():
        if not isinstance(text, str | bool):
            raise BadInput(f"{flag(name)} {text}: expected one value; --help lists the flags")
        values[name] = text if isinstance(text, bool) else convert(items[name], text, flag(name))
    profile = PROFILES.get(values.get("profile", getattr(settings, "profile", "")), {})
    profile = {name: v for name, v in profile.items() if getattr(settings, name) == items[name].default}
    settings = replace(settings, **(profile | values))
    for name, item in items.items():
        check(item, getattr(settings, name), f"{name} =")
    return settings


def platform_name() -> str:
    """kaggle, colab or local; Kaggle first, since its image derives from Colab's."""
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        return "kaggle"
    return "colab" if "COLAB_RELEASE_TAG" in os.environ else "local"


PLACES = {
    "kaggle": ("/kaggle/working", "/kaggle/temp"),
    "colab": ("/content", "/content"),
    "local": ("runs", "."),
}


def fill_defaults(settings: ASTConfig) -> ASTConfig:
    """Fills what was left open, from the device and the platform."""
    device, (out, data) = pick_device(settings.device), PLACES[platform_name()]
    dtype = pick_dtype(settings.amp, device)
    amp = {None: "off", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    found = {"device": str(device), "amp": amp, "out": f"{out}/{PROGRAM}", "data_dir": f"{data}/data"}
    found |= default_recipe(device, dtype) | {"batch_size": settings.batch_size}  # that follows the data, too
    return replace(settings, **{n: v for n, v in found.items() if getattr(settings, n) in (None, "auto")})


# %% The run [markdown] tags=["shared"]
# ### The run
#
# For each seed: the gate under test first, then every policy it is compared with, in the same process, from
# the same initial weights. `random` repeats, epoch by epoch, the activated counts that AST realised; `short`
# is plain training of as many epochs as AST paid for, its learning rate scheduled to match.
# "Saved" is against the full run beside it, or else labelled as the unit model's word.

# %% Policies tags=["shared", "fold"]
# @title Policies


def policies_of(settings: ASTConfig) -> list[str]:
    """The gate under test, then what it is compared with."""
    first = "ast" if settings.gate in SCORED else settings.gate
    return list(dict.fromkeys(filter(None, [first, *settings.compare.replace("none", "").split(",")])))


def rival(
    policy: str, config: ASTConfig, rows: list[dict], planned: list[float]
) -> tuple[ASTConfig, list | None]:
    """A policy's settings, and the rates that it repeats: those of the rows of AST's run, else planned."""
    rates = [row["activated"] / row["candidates"] for row in rows] or planned
    if policy == "ast":
        return config, None
    if policy == "random":
        return replace(config, gate="random"), rates
    cost, sides = work(config, rates), config.resolution if policy.startswith("dense") else "full"
    config = replace(config, gate="full", resolution=sides)
    if config.keep_tokens < 1 and not policy.startswith("dense"):
        config = replace(
            config, keep_by="chance", keep_tokens=config.keep_tokens if "keep" in policy else 1.0
        )
    if policy.endswith("short"):  # an epoch of a shorter run costs another share, so near lengths are tried
        epochs, anneal = config.epochs, Schedule.of(config, config.epochs).anneal * (config.keep_tokens < 1)
        about = round(cost * epochs / work(config, [1.0] * epochs))
        near = range(about + 2, max(0, about - 3), -1)
        ends = [round(anneal * n / epochs) for n in near]
        none = {"warmup_epochs": 0, "ramp_epochs": 0}
        cut = [replace(config, epochs=n, anneal_epochs=m, **none) for n, m in zip(near, ends, strict=True)]
        config = min(cut, key=lambda shorter: abs(work(shorter, [1.0] * shorter.epochs) - cost))
    return config, None


def work(config: ASTConfig, rates: list[float]) -> float:
    """What epochs of these activation rates cost, in epochs of everything: all pixels, and all patches."""
    schedule = Schedule.of(config, config.epochs)
    return sum(rate * schedule.side(epoch) ** 2 * schedule.kept(epoch) for epoch, rate in enumerate(rates))


def contents(data: ImageData) -> str:
    """A digest of what the data hold, wherever they lie: classes, names of files, labels. Raises BadInput
    where processes hold different ones."""
    names = [list(getattr(images, "names", ())) for images in (data.train_images, data.val_images)]
    held = repr((data.classes, names)).encode() + data.train_labels.tobytes() + data.val_labels.tobytes()
    check_alike(digest := hashlib.sha256(held).hexdigest(), data.source)
    return digest


# %% The run tags=["shared", "fold"]
# @title The run
VERSION = 3  # of the form of a checkpoint
PROGRAMS = ("cifar10_ast", "imagenet100_ast")  # whose runs may be renamed
FREE_ON_RESUME = {"out", "resume", "time_limit", "workers", "data", "data_dir"}  # data: what they hold counts


@dataclass
class Run:
    """All policies and seeds of one call, with everything that is written about them."""

    settings: ASTConfig
    data: ImageData
    say: Callable[[str], None]
    listeners: list[Callable]
    controls: Controls
    finished: list[dict] = field(default_factory=list)  # results
    trainer: AdaptiveSparseTrainer | None = None  # in hand
    foretold: bool = False

    def __post_init__(self):
        settings, data = self.settings, self.data
        self.out, self.config = Path(settings.out), ASTConfig.of(settings)
        self.skipped = dict.fromkeys(data.unreadable)  # files and why, in the order they were met
        self.policies = policies_of(settings)
        self.seeds = list(dict.fromkeys(int(seed) for seed in settings.seeds.split(",")))
        fixed = {name: value for name, value in asdict(settings).items() if name not in FREE_ON_RESUME}
        digest = hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()
        self.identity = [VERSION, digest, contents(data)]  # of its checkpoints
        self.histories = Histories()
        self.listeners = [self.histories, functools.partial(record, self), *self.listeners]

    def execute(self) -> dict:
        """Trains what is not finished yet and returns the summary. Raises BadInput."""
        words = f"{describe(self.data)}, in batches of {self.settings.batch_size}"
        self.say(textwrap.fill(words, 80, subsequent_indent="  ", break_long_words=False))
        if self.settings.resume:
            with held(self.out):
                check_alike(found := self.resume(), f"--out {self.out}")
                if found:
                    return self.train_all()
            self.say(f"no checkpoint to resume in {self.out}: starting afresh")
        self.finished, self.trainer = [], None
        self.make_trainer(self.policies[0], self.seeds[0])  # refuses what cannot be before anything moves
        with held(self.out):
            if world()[0] == 0:
                rotate_folder(self.out, self.say)
        with held(self.out):
            config = {"program": PROGRAM, "settings": asdict(self.settings)}
            write_whole(self.out / "config.json", as_json(config, indent=2))
            return self.train_all()

    def train_all(self) -> dict:
        """Trains policy after policy, until one is cut, and returns the summary."""
        ahead = {policy: self.ahead(policy) for policy in self.policies}
        for listener in self.listeners:
            listener("plan", {"work": ahead, "left": self.left(), "synthetic": self.data.synthetic})
        for policy, seed in self.left():
            if self.trainer or not self.controls.stopping():
                self.train(policy, seed)
            if self.trainer:  # it was cut
                break
        return self.close()

    def left(self) -> list[tuple[str, int]]:
        """Policies and seeds that are not finished, in their order."""
        done = [(run["policy"], run["seed"]) for run in self.finished]
        runs = itertools.product(self.seeds, self.policies)
        return [(policy, seed) for seed, policy in runs if (policy, seed) not in done]

    def resume(self) -> bool:
        """Takes up the newest checkpoint that fits; False where there is none. Raises BadInput where one is
        of another run, and none of this one."""
        unfit, other = [], None
        for path in reversed(agreed(checkpoints(self.out / "checkpoints"))):
            try:
                self.take_up(read_checkpoint(path))
            except UNFIT as error:
                other = error if isinstance(error, BadInput) else other
                self.say(f"warning: {path}: {one_line(error)[:99]}; trying the checkpoint before it")
                unfit.append(path)
            else:
                for passed in unfit * (world()[0] == 0):  # else it would count among the two that are kept
                    passed.rename(passed.with_suffix(".unfit"))
                return True
        if other:
            raise other
        return False

    def take_up(self, stored: dict) -> None:
        """Goes on from a checkpoint. Raises BadInput where it is of another run, else one of UNFIT."""
        if stored["identity"] != self.identity:
            what = f"the {len(self.data.train_labels)} images in {self.data.source}"
            raise BadInput(f"{self.out}: expected a checkpoint of this program, these settings and {what}")
        self.finished, self.trainer = stored["finished"], None
        if stored["trainer"]:
            self.trainer = self.make_trainer(*self.left()[0])
            restore(self.trainer, stored["trainer"])
        self.skipped |= dict.fromkeys(stored["skipped"])
        events, running = self.out / "events.jsonl", stored["trainer"] or {"changes": []}
        known = [change["control"] for run in (*self.finished, running) for change in run["changes"]]
        told = events.read_text(encoding="utf-8", errors="replace") if events.is_file() else ""
        later = sum(told.count(f'"{name}"') - known.count(name) for name in self.controls.values)
        if later > 0:
            self.say(f"{later} changes by hand in the epoch that was cut are dropped: it is trained again")

    def planned(self) -> list[float]:
        """The activation rates that AST aims at, epoch by epoch."""
        schedule = Schedule.of(self.config, self.config.epochs)
        return [schedule.rate(epoch, self.config.target_activation) for epoch in range(schedule.epochs)]

    def ahead(self, policy: str) -> tuple[int, float]:
        """Epochs of a policy, and their cost in epochs of everything at full resolution."""
        config, rates = rival(policy, self.config, [], self.planned())
        if config.gate == "full":
            rates = [1.0] * config.epochs
        return config.epochs, work(config, rates or self.planned())

    def make_trainer(self, policy: str, seed: int) -> AdaptiveSparseTrainer:
        """A trainer for a policy, as it stands before its first epoch."""
        torch.manual_seed(seed)
        model = build_model(self.settings, self.data)
        optimizer, criterion = recipe(self.settings, model)
        ast = [run["epochs"] for run in self.finished if (run["policy"], run["seed"]) == ("ast", seed)]
        config, rates = rival(policy, self.config, ast[0] if ast else [], self.planned())
        return AdaptiveSparseTrainer(
            model,
            *sources(self.settings, self.data, pick_device(config.device)),
            config,
            optimizer,
            criterion,
            policy=policy,
            listeners=self.listeners,
            controls=self.controls,
            rates=rates if policy != self.policies[0] else None,
            seed=seed,
            clip_norm=CLIP_NORM,
            save=self.save,
        )

    def train(self, policy: str, seed: int) -> None:
        """Trains one policy with one seed, from where a checkpoint left it, and keeps what came of it."""
        trainer = self.trainer = self.trainer or self.make_trainer(policy, seed)
        result = trainer.train()
        if (policy, seed) == (self.policies[0], self.seeds[0]):
            model = portable(self.settings, self.data.classes, trainer.model)
            model["synthetic"] = self.data.synthetic
            write_by(self.out / "model.pt", functools.partial(torch.save, model))
            times = {"times_activated": trainer.times_activated.numpy()}
            write_by(self.out / "samples.npz", lambda file: np.savez_compressed(file, **times))
        if result["complete"]:
            self.finished.append(result)
            self.trainer = None
            self.save()
        elif trainer.tally:
            self.charge_cut_epoch()

    def save(self) -> None:
        """Writes a checkpoint of the finished runs and of the one in hand."""
        state = {"identity": self.identity, "finished": self.finished, "skipped": list(self.skipped)}
        state["trainer"] = state_of(self.trainer) if self.trainer else None
        save_checkpoint(self.out / "checkpoints", state)
        agreed(None)  # several processes wait for the one that writes

    def charge_cut_epoch(self) -> None:
        """Adds to the checkpoint, as `repeated`, what was spent since: that epoch will be trained again."""
        try:
            stored = read_checkpoint(checkpoints(self.out / "checkpoints")[-1])
        except UNFIT:  # somebody deleted it meanwhile
            return
        costs, now = stored["trainer"]["ledger"], asdict(self.trainer.ledger.total())
        for unit in ("seconds", "joules"):
            if now[unit] is not None:
                before = sum(cost[unit] or 0 for cost in costs.values())
                costs["repeated"][unit] = (costs["repeated"][unit] or 0) + now[unit] - before
        save_checkpoint(self.out / "checkpoints", stored)

    def results(self) -> list[dict]:
        """Finished runs, and the one in hand if it got anywhere."""
        return self.finished + ([results_of(self.trainer)] if self.trainer and self.trainer.rows else [])

    def close(self) -> dict:
        """Writes summary.json and curves.png, and returns the summary."""
        summary, results = summary_of(self), self.results()
        write_whole(self.out / "summary.json", as_json(summary, indent=2))
        if results:
            mark = " (synthetic images)" if self.data.synthetic else ""
            title = f"{self.settings.model} on {self.data.name}{mark}, {summary['n_train']} samples, "
            title += summary["device"] + ("" if summary["complete"] else ": stopped early")
            curves(results, title, self.out / "curves.png")
        return summary


# %% Records tags=["shared", "fold"]
# @title Records
METRICS = (
    "policy seed epoch phase train_loss val_accuracy target_activation activation_rate mean_activation "
    "threshold controller candidates activated seconds elapsed_seconds data_wait_percent learning_rate "
    "significance_quantiles resolution"
).split()
CHANGES = ("time", "candidates", "control", "old", "new", "set_at", "applied_at")


def record(run: Run, event: str, data: dict) -> None:
    """A listener: the files that grow while it trains are written whole; a short time limit is told."""
    if event in ("start", "epoch", "control"):
        rows = [row for result in run.results() for row in result["epochs"]]
        changes = [change for result in run.finished for change in result["changes"]]
        changes += run.trainer.changes if run.trainer else []
        changes = [change | {"applied_at": change["candidates"]} for change in changes]
        for name, keys, lines in (("metrics", METRICS, rows), ("events", CHANGES, changes)):
            text = b"".join(as_json({key: line[key] for key in keys}) + b"\n" for line in lines)
            write_whole(run.out / f"{name}.jsonl", text)
    if event in ("epoch", "end"):
        for source in (run.trainer.train_source, run.trainer.val_source):
            run.skipped |= dict.fromkeys(source.unreadable.values())
    if run.skipped and event in ("plan", "epoch", "end"):  # names of files may be no text
        lines = "\n".join(run.skipped) + "\n"
        write_whole(run.out / "skipped_images.txt", lines.encode(errors="backslashreplace"))
    if event == "chunk" and not run.foretold:
        foretell(run, data)


def foretell(run: Run, chunk: dict) -> None:
    """Says, once it can be told, how long it takes, and where the time limit ends before an epoch can."""
    tally, limit = run.trainer.tally, run.settings.time_limit
    share, left = tally.trained / (tally.n * chunk["rate"]), run.histories.outlook()[1]
    if share > 0.05 and (left or limit):
        run.foretold, expected = True, (chunk["train_seconds"] - tally.began) / share
        if left:
            run.say(f"about {clock(left)} to go in all")
        if 0 < 60 * limit < expected:
            run.say(
                f"--time-limit {limit:g}: an epoch takes about {clock(expected)}, and only whole ones "
                "are kept; allow more minutes, or train on less with --train-size"
            )


# %% The report tags=["shared", "fold"]
# @title The report
MEANS = (
    "final_accuracy best_accuracy activation_rate candidates activated train_seconds total_seconds flops "
    "unit_energy joules joules_method flops_per_sample flops_uncounted phases"
).split()


def summary_of(run: Run) -> dict:
    """The content of summary.json."""
    results = run.results()
    policies = {name: mean_result([r for r in results if r["policy"] == name]) for name in run.policies}
    policies = {name: value for name, value in policies.items() if value}
    runs = [result["policy"] for result in run.finished]
    whole = {name: value for name, value in policies.items() if runs.count(name) == len(run.seeds)}
    complete = len(run.finished) == len(run.policies) * len(run.seeds)
    changes = [c for result in results for c in result["changes"] if c["control"] not in ("paused", "stop")]
    return {
        "program": PROGRAM,
        "dataset": run.data.name,
        "synthetic": run.data.synthetic,
        "n_train": len(run.data.train_labels),
        "n_val": len(run.data.val_labels),
        "chance_percent": 100 * int(np.bincount(run.data.val_labels).max()) / len(run.data.val_labels),
        "steps_per_epoch": math.ceil(len(run.data.train_labels) / run.settings.batch_size),
        "model": run.settings.model,
        "device": f"{world()[1]} x " * (world()[1] > 1) + device_name(run.settings.device),
        "platform": f"{platform_name()}, {platform.system()}, Python {platform.python_version()}",
        "torch": torch.__version__,
        "out": str(run.out),
        "seeds": run.seeds,
        "complete": complete,
        "stopped_by": None if complete else run.controls.stop,
        "changes_by_hand": len(changes),
        "skipped_images": len(run.skipped),
        "policies": policies,
        "references": run.data.references,
        "measured": measured(whole, run.policies[0]),
        "clock": doubt(results),
    }


UNEQUAL = 1.5  # times as long: equal work that takes it says that something else was running


def doubt(results: list[dict]) -> str | None:
    """Why the runs' seconds cannot be compared: equal work that took unequal time; None where they can."""
    for result in results:  # the first epoch of a process warms it up
        equal = 1.0, result["epochs"][-1]["resolution"], 1.0
        seen = operator.itemgetter("target_activation", "resolution", "kept")
        rows = [row for row in result["epochs"][1:] if seen({"kept": 1.0} | row) == equal]
        full = [row["seconds"] for row in rows]
        if full and max(full) > max(1, UNEQUAL * min(full)):
            return f"equal epochs of {result['policy']} took {min(full):.1f} to {max(full):.1f} s"
    seconds = {(r["policy"], r["seed"]): r["train_seconds"] for r in results if r["complete"]}
    scored = any(result["phases"]["scoring"]["seconds"] for result in results)
    for (policy, seed), chance in seconds.items():
        gated = seconds.get(("ast", seed), 0) * (policy == "random" and not scored)
        if gated and max(chance, gated) > max(1, UNEQUAL * min(chance, gated)):
            return f"as many samples took ast {gated:.1f} s and random {chance:.1f} s"
    return None


def mean_of(values: list) -> object:
    """The mean of numbers, or of the numbers in dicts, key by key; of all else the first."""
    if isinstance(values[0], dict):
        return {key: mean_of([value[key] for value in values]) for key in values[0]}
    numbers = all(isinstance(value, int | float) for value in values)
    return float(np.mean(values)) if numbers else None if None in values else values[0]


def mean_result(results: list[dict]) -> dict | None:
    """One policy's entry in the summary: means over its finished seeds, or over what there is."""
    results = [r for r in results if r["complete"]] or results
    if not results:
        return None
    return mean_of([{name: r[name] for name in MEANS} for r in results]) | {
        "accuracy_per_seed": {str(r["seed"]): r["final_accuracy"] for r in results},
        "energy_savings_percent": mean_of([r["energy_savings"] for r in results]),
        "peak_memory_mib": max([r["peak_memory_mib"] or 0.0 for r in results]) or None,
    }


MEASURED = {  # of the first policy and the one beside it: which, what of it, how they are compared
    "speedup_vs_full": ("full", "train_seconds", lambda a, b: b / a),
    "total_speedup_vs_full": ("full", "total_seconds", lambda a, b: b / a),
    "flops_saved_percent_vs_full": ("full", "flops", lambda a, b: 100 * (1 - a / b)),
    "joules_saved_percent_vs_full": ("full", "joules", lambda a, b: 100 * (1 - a / b)),
}
RIVALS = {
    "full": "plain training",
    "random": "random selection of as many samples",
    "short": "plain training of as few epochs",
    "dense": "every sample at its pixels",
    "dense-short": "as few epochs of every sample at its pixels",
    "keep-short": "as few epochs of a share of every sample's patches",
}
MEASURED |= {f"accuracy_minus_{name}": (name, "final_accuracy", operator.sub) for name in RIVALS}


def measured(policies: dict[str, dict], main: str) -> dict[str, float | None]:
    """What the first policy saved and lost against those run beside it; None where none was."""
    found = {}
    for name, (rival, key, compare) in MEASURED.items():
        a, b = (policies.get(policy, {}).get(key) for policy in (main, rival))
        found[name] = None if rival == main or a is None or b is None else compare(a, b)
    return found


def device_name(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"cpu ({name[1] if name else platform.processor()}, {torch.get_num_threads()} threads)"


def describe(data: ImageData) -> str:
    """One line on what is trained on."""
    mark = "SYNTHETIC images, made by this program: " if data.synthetic else ""
    skipped = f", {len(data.unreadable)} unreadable images skipped" if data.unreadable else ""
    return (
        f"data: {mark}{data.name}, {len(data.train_labels)} training and {len(data.val_labels)} validation "
        f"images of {len(data.classes)} classes, from {data.source}{skipped}"
    )


def table_of(policies: dict[str, dict]) -> list[str]:
    """Every policy side by side, a line each."""
    lines = ["policy      accuracy activated  training     total   TFLOPs unit energy   joules"]
    for name, p in policies.items():
        joules = "-" if p["joules"] is None else f"{p['joules']:.0f}"
        accuracy = "-" if p["final_accuracy"] is None else f"{p['final_accuracy']:.2f} %"
        lines.append(
            f"{name:<11} {accuracy:>8} {100 * p['activation_rate']:>7.1f} % {p['train_seconds']:>7.1f} s "
            f"{p['total_seconds']:>7.1f} s {p['flops'] / 1e12:>8.1f} {p['unit_energy']:>11.3g} {joules:>8}"
        )
    return lines


def saving(summary: dict) -> list[str]:
    """What was saved against full training, as measured, and what other counts would say and why."""
    m, first = summary["measured"], next(iter(summary["policies"]), "ast")
    if m["speedup_vs_full"] is None:
        words = "no whole full run beside it (--compare full), so what is saved was not measured"
        return [] if first == "full" else [words]
    mine, full = summary["policies"][first], summary["policies"]["full"]
    fewer, unit = (100 * (1 - mine[key] / full[key]) for key in ("activated", "unit_energy"))
    time, whole = (100 * (1 - 1 / m[key]) for key in ("speedup_vs_full", "total_speedup_vs_full"))
    flops, points = m["flops_saved_percent_vs_full"], m["accuracy_minus_full"]
    what, saved = ("FLOPs", flops) if summary["clock"] else ("time", time)
    lines = [f"{first} saved {saved:.1f} % of full training's {what}, at {points:+.2f} points of accuracy"]
    lines.append(f"  it trained on {fewer:.1f} % fewer samples")
    each = [sum(p["phases"][phase]["flops"] for phase in STEPS) / p["activated"] for p in (mine, full)]
    if each[0] != each[1]:
        lines.append(f"  and spent {100 * (1 - each[0] / each[1]):.1f} % less on each, seeing less of it")
    if summary["clock"]:
        lines.append(f"  no time is quoted, as {summary['clock']}")
    else:
        lines.append(f"  with evaluation and checkpoints, which cost both as much: {whole:.1f} %")
        lines.append(f"  FLOPs, of which choosing and moving data are none: {flops:.1f} %")
    lines.append(f"  unit energy (a model: a skipped sample costs 1 %, all else nothing): {unit:.1f} %")
    return lines


def caution(summary: dict) -> list[str]:
    """What an accuracy is to be read beside."""
    n, steps = summary["n_val"], summary["steps_per_epoch"]
    lines = [f"naming the commonest class each time would be right in {summary['chance_percent']:.1f} %"]
    if n < 500:
        lines.append(f"only {n} validation images: each is {100 / n:.2f} points")
    if steps < 20:
        lines.append(f"only {steps} steps an epoch: a smaller --batch-size learns faster")
    return lines


def report(summary: dict) -> str:
    """The table at the end, then what was measured, whichever way it fell."""
    first, lines = next(iter(summary["policies"]), "ast"), saving(summary)
    for name, words in list(RIVALS.items())[1:]:  # full's stands in the saving
        if (points := summary["measured"][f"accuracy_minus_{name}"]) is not None:
            ahead = "ahead of" if points > 0 else "not ahead of"
            lines.append(f"{first} is {ahead} {words}: {points:+.2f} points")
    lines += [f"seeds: {len(summary['seeds'])} (one proves nothing)", *caution(summary)]
    lines += [f"{name}: {reference['words']}" for name, reference in summary["references"].items()]
    if summary["skipped_images"]:
        lines.append(f"unreadable images skipped: {summary['skipped_images']} (skipped_images.txt)")
    if changes := summary["changes_by_hand"]:
        lines.append(f"changes made by hand: {changes} (events.jsonl), so the policies' settings differ")
    if summary["synthetic"]:
        lines.append("SYNTHETIC data: these figures say nothing about real images")
    if not summary["complete"]:
        lines.append(f"stopped by {summary['stopped_by']}: go on with --resume (or settings.resume = True)")
    return "\n".join(["", *table_of(summary["policies"]), "", *lines])


# %% Prediction [markdown] tags=["shared"]
# ### Prediction
#
# `model.pt` is all it takes to use the model, here or in another program: the weights, the model that they
# belong to, the classes in the order of its outputs, and how a picture becomes its input.


# %% Prediction tags=["shared", "fold"]
# @title Prediction
def portable(settings: ASTConfig, classes: Sequence[str], model: nn.Module) -> dict:
    """What `model.pt` holds. Mean and std are those of red, green and blue, from 0 to 255."""
    return {
        "program": PROGRAM,
        "model": settings.model,
        "classes": list(map(str, classes)),
        "image_size": view_side(settings),
        "mean": PIXEL_MEAN,
        "std": PIXEL_STD,
        "state_dict": {name: value.cpu() for name, value in model.state_dict().items()},
    }


def load_model(chosen: ASTConfig) -> tuple[nn.Module, dict]:
    """The model of the run in `chosen.out`, ready to predict, and all that its `model.pt` holds.

    Raises BadInput where there is none, or it is not this program's.
    """
    path = Path(chosen.out) / "model.pt"
    try:
        saved = torch.load(plain(path), map_location="cpu", weights_only=True)
        if saved.get("program") != PROGRAM:
            raise ValueError(f"written by {saved.get('program', 'another program')}")
        model = bare_model(saved["model"], len(saved["classes"]), saved["image_size"])
        model.load_state_dict(saved["state_dict"])
        saved["classes"] = [printable(name) for name in saved["classes"]]
    except UNFIT as error:
        raise BadInput(
            f"{path}: {one_line(error)}; expected program, model, classes, image_size and state_dict, as a "
            f"run of {PROGRAM}.py leaves them; name the folder of such a run with --out"
        ) from error
    return model.to(chosen.device).eval(), saved


@torch.no_grad()
def predict(*paths: str, chosen: ASTConfig | None = None, controls: Controls | None = None) -> None:
    """Prints the five likeliest classes of a picture, and in a notebook shows it as the model sees it. For a
    folder, or several paths, writes predictions.csv: file, likeliest class, its probability.

    chosen: settings whose `out` holds the model; the program's if None. Raises BadInput.
    """
    if not any(paths):
        return print("no picture: write its path between the quotes")
    chosen = fill_defaults(chosen or settings)
    model, saved = load_model(chosen)
    if saved.get("synthetic"):
        print("a model of SYNTHETIC images, which knows nothing of real ones")
    places, rows, lost = [Path(path) for path in paths], [], []
    inside = [sorted(place.rglob("[!.]*")) if place.is_dir() else [place] for place in places]
    files = [file for file in itertools.chain(*inside) if not file.is_dir()]
    for file in tqdm(files, "predicting", leave=False, disable=None):
        if controls and controls.stopping():
            break
        try:
            view = read_view(read_file(file.parent, file.name), saved["image_size"])
        except Exception as error:  # a damaged file can break a decoder in any way
            lost.append(reason(str(file), error))
            continue
        images = torch.tensor(view, device=chosen.device)[None]
        chances = model(plain_view(images, None))[0].softmax(0)
        label, name = int(chances.argmax()), file.relative_to(places[0]) if len(places) == 1 else file
        rows.append((name.as_posix(), saved["classes"][label], round(float(chances[label]), 4)))
    if not rows:
        found = lost[0] if lost else f"{paths[0]}: no file in it"
        raise BadInput(f"{found}; expected a picture, or a folder of pictures; name another")
    if files == places[:1] == places:
        if kernel() is not None:
            from IPython.display import display

            display(Image.fromarray(view).resize((224, 224)))
        for label in chances.argsort(descending=True)[:5].tolist():
            print(f"{100 * chances[label]:5.1f} %  {saved['classes'][label]}")
        return
    out = Path(chosen.out if os.access(chosen.out, os.W_OK) else "") / "predictions.csv"
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("file", "class", "probability"), *rows])
    write_whole(out, text.getvalue().encode(errors="surrogateescape"))
    print(f"{len(rows)} of {len(files)} files: {out}")
    for line in lost:
        print(f"left out: {line}", file=sys.stderr)


@torch.no_grad()
def show_mistakes(chosen: ASTConfig, data: ImageData) -> None:
    """Each class of the validation set: what the model in `chosen.out` takes it for, how often it is right,
    and how often the gate chose it; then the images that it is surest to get wrong, and right.

    Raises BadInput where the model is of other classes than the data.
    """
    model, saved = load_model(chosen)
    if saved["classes"] != data.classes:
        raise BadInput(f"{chosen.out}: expected a model of the data's {len(data.classes)} classes; train one")
    source = sources(chosen, data, torch.device(chosen.device))[1]
    parts = [(model(views).softmax(1).cpu(), labels.cpu()) for views, labels in source.in_order()]
    chances, labels = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
    found, names = chances.argmax(1), [name[:12] for name in data.classes]
    if len(names) <= 1_000:  # else the square of what is taken for what has too many fields
        show_classes(labels, found, names, mean_times(Path(chosen.out), data))
    readable = np.setdiff1d(np.arange(len(source)), list(source.unreadable))
    order, rows = np.argsort(chances[np.arange(len(labels)), labels]), {}
    for word, which in (("lowest", order[:10]), ("highest", order[:-11:-1])):
        title = f"Validation images of the {word} probability of their label: label, likeliest class"
        shares = 100 * chances.max(1)
        captions = [f"{names[labels[i]]}\n{names[found[i]][:8]} {shares[i]:.0f} %" for i in which]
        rows[title] = data.val_images[readable[which]], captions, np.zeros(len(which), bool)
    show_images(rows)


def show_classes(labels: np.ndarray, found: np.ndarray, names: list[str], times: np.ndarray) -> None:
    """What each class (a row) is taken for, its accuracy, and how often an image of it was chosen."""
    counts = np.bincount(labels * len(names) + found, minlength=len(names) ** 2).reshape(2 * [len(names)])
    shares, rows = 100 * counts / counts.sum(1, keepdims=True).clip(1), np.arange(len(names))
    with drawing():
        figure = Figure(figsize=(9.8, 4.8), layout="constrained")
        taken, right, chosen = figure.subplots(1, 3, sharey=True, width_ratios=(2, 1, 1))
        taken.imshow(shares, cmap="Oranges", vmin=0, aspect="auto")
        taken.set(title="What each class is taken for (darker: more often)", ylabel="label")
        taken.grid(False)
        right.barh(rows, shares.diagonal(), color="#666666")
        right.set(title="Accuracy (%)", xlim=(0, 100))
        chosen.barh(rows, times, color=COLOURS["ast"])
        chosen.set(title="Times an image was chosen")
        if len(names) <= 20:
            taken.set_xticks(rows, names, rotation=90)
            taken.set_yticks(rows, names)
        show_png(png_of(figure))


def mean_times(out: Path, data: ImageData) -> np.ndarray:
    """How often a gate chose an image of each class, float64 [classes], in the run whose folder is `out`."""
    times, labels = np.load(out / "samples.npz")["times_activated"], data.train_labels
    if len(times) != len(labels):
        found = f"{len(labels)} samples"
        raise BadInput(f"{found}: expected the run's {len(times)}; call prepare(settings) again")
    return np.bincount(labels, times) / np.bincount(labels).clip(1)


# %% From settings to results tags=["shared", "fold"]
# @title From settings to results
def keep_freed_memory() -> None:
    """Tells glibc to keep freed memory, not to hand it back after a step and fault it in again in the next.

    On a CPU that took a third of the time of the first policy in a process, and of no other, so the
    comparison was unfair to the gate under test. Does nothing without glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        glibc = ctypes.CDLL("libc.so.6")
        glibc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD, bytes
        glibc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD, bytes


def settings_for_run(settings: ASTConfig, arguments: Iterable[str] = ()) -> ASTConfig:
    """The settings that will run. Raises BadInput."""
    settings = parse(settings, list(arguments), dict(os.environ))
    return agreed(fill_defaults(settings_of_run(settings) if settings.resume else settings))


def fitted(settings: ASTConfig, data: ImageData) -> ASTConfig:
    """The settings with the device's batch size, or a smaller one that leaves 20 steps an epoch.

    Raises BadInput for progressive resolution where the model's views have one size.
    """
    usual = default_recipe(torch.device(settings.device), None)["batch_size"]
    size = max(2 * world()[1], min(usual, len(data.train_labels) // 20))
    if settings.resolution == "progressive" and not takes_small_views(settings):
        found = f"{settings.model}, whose views have one size"
        raise BadInput(f"--resolution progressive: expected full for {found}; or choose another --model")
    return replace(settings, batch_size=settings.batch_size or size)


def settings_of_run(settings: ASTConfig) -> ASTConfig:
    """The settings of the run that `--resume` goes on with. Raises BadInput where a given setting differs."""
    out = Path(settings.out or fill_defaults(settings).out)
    config, found = out / "config.json", {}
    if config.exists():
        try:
            stored = read_config(out)["settings"]
            kept = FREE_ON_RESUME - {"data", "data_dir"}
            found = {item: stored[item.name] for item in fields(settings) if item.name not in kept}
        except (KeyError, TypeError) as error:
            expected = "expected the settings of a run; leave --resume out and name another --out"
            raise BadInput(f"{config}: {expected}") from error
    for item, value in found.items():
        check(item, value, f"{config}: {item.name}")
        asked = getattr(settings, item.name)
        if asked != item.default and item.name in FREE_ON_RESUME:
            found[item] = asked  # the same data may lie elsewhere now
        elif asked not in (item.default, value):
            raise BadInput(
                f"{flag(item.name)} {asked}: expected {value}, as in the run in {out}; leave it out"
            )
    return replace(settings, out=str(out), **{item.name: value for item, value in found.items()})


def copied(out: str, say: Callable[[str], None]) -> str:
    """A copy of an output folder that can only be read, such as one among Kaggle's inputs, to go on in."""
    home = fill_defaults(replace(settings, out=None)).out
    with held(Path(home)):
        if world()[0] == 0:
            rotate_folder(Path(home), say)
            shutil.copytree(out, home, dirs_exist_ok=True, copy_function=shutil.copyfile)
    say(f"{out} can only be read: it was copied to {home}, where it goes on")
    return home


def overview(settings: ASTConfig) -> list[str]:
    """What will run, in a line; then what was set, or decided by the device."""
    policies, seeds = policies_of(settings), len(set(settings.seeds.split(",")))
    runs, times = len(policies) * seeds, f", with {seeds} seeds each" if seeds > 1 else ""
    first = f"{PROGRAM}: {runs} {'run' if runs == 1 else 'runs'}: {', '.join(policies)}{times}"
    values = [(item.name, getattr(settings, item.name), item.default) for item in fields(settings)]
    changed = [f"{name}={value}" for name, value, default in values if value != default]
    wrapped = textwrap.wrap(printable(", ".join(changed)), 80, initial_indent="  ", subsequent_indent="  ")
    norm = "each process's own" if settings.device == "cpu" else "synchronised"
    team = f", {world()[1]} processes; batch norm: {norm}" if world()[1] > 1 else ""
    return [first, f"  torch {torch.__version__} on {device_name(settings.device)}{team}", *wrapped]


def run(
    settings: ASTConfig,
    arguments: Iterable[str] = (),
    listeners: Iterable[Callable] | None = None,
    controls: Controls | None = None,
    say: Callable[[str], None] = tqdm.write,
    data: ImageData | None = None,
) -> dict:
    """Trains every policy and seed of the settings, writes the output folder, and returns the summary.

    listeners: called with (event, data), in the thread that trains; a printed table if None. say: prints a
    line. data: what the settings name, if it was loaded before. Raises BadInput, in one sentence, for
    anything a person can mend.
    """
    settings = settings_for_run(settings, arguments)
    keep_freed_memory()
    controls = controls or Controls()
    if settings.time_limit:
        controls.deadline = time.monotonic() + 60 * settings.time_limit
    listeners = [print_table(say=say)] if listeners is None else listeners
    if settings.resume and Path(settings.out).is_dir() and not os.access(settings.out, os.W_OK):
        settings = replace(settings, out=copied(settings.out, say))
    check_apart(Path(settings.out), Path(settings.data).expanduser())
    say("\n".join(overview(settings)))
    if world()[1] == 1 or os.environ["LOCAL_RANK"] == "0":
        data = data or load_data(settings, say)
    gathered(None)  # the others find what the first on their machine has fetched
    data = data or load_data(settings, say)
    settings = fitted(settings, data)
    summary = Run(settings, data, say, listeners, controls).execute()
    say(report(summary))
    say(f"\nresults: {settings.out}")
    return summary


def prepare(settings: ASTConfig) -> tuple[ASTConfig, ImageData]:
    """The settings that will run, and the data they name, for the lessons and the run. Raises BadInput."""
    settings = settings_for_run(settings)
    data = load_data(settings, print)
    print(describe(data))
    return fitted(settings, data), data


class Outlet:
    """A standard stream; what it cannot take, since nobody reads any more or a disk is full, goes nowhere."""

    def __init__(self, stream: io.TextIOWrapper | None):
        """stream: None, where a program is started without."""
        self.stream = stream or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        self.stream.reconfigure(errors="backslashreplace", line_buffering=True)  # it may lack letters

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self._tried(self.stream.write, text) or len(text)

    def flush(self) -> None:
        self._tried(self.stream.flush)

    def _tried(self, work: Callable, *arguments: str) -> int | None:
        try:
            return work(*arguments)
        except OSError:  # what is held back would fail again at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            return None


def main() -> int:
    """The script: exit status 0 done or out of time, 2 bad input, 128 + its number after a signal."""
    controls, codes = Controls(), {}

    def stop(number: int, frame: object) -> None:
        controls.stop = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        codes[controls.stop] = 128 + number
        mute = world()[0] or (TEAM and TEAM["store"].add("ended", 0))  # or another process has said why
        out = os.open(os.devnull, os.O_WRONLY) if mute else 2
        if not controls.heeded:  # nothing to save, and threads that wait for a disk must not hold it
            os.write(out, f"{controls.stop}: ended before there was anything to save\n".encode())
            os._exit(128 + number)
        signal.signal(number, signal.SIG_DFL)  # a second one ends it at once
        os.write(out, f"{controls.stop}: saving and stopping; once more to stop at once\n".encode())

    sys.stdout, sys.stderr = Outlet(sys.stdout), Outlet(sys.stderr)
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), stop)
    parser = Flags(add_help=False, allow_abbrev=False)
    parser.add_argument("--predict", nargs="+", default=[])
    try:
        join()
        asked, arguments = parser.parse_known_args(sys.argv[1:])
        if asked.predict:
            predict(*asked.predict, chosen=settings_for_run(settings, arguments), controls=controls)
        else:
            run(settings, arguments, controls=controls)
    except BadInput as error:
        return ended(2, str(error))
    except RuntimeError as error:
        if not re.search("gloo|nccl", str(error), re.IGNORECASE):
            raise
        return ended(1)  # another process did, and has said why
    return ended(codes.get(controls.stop, 0))


# %% Pictures [markdown] tags=["shared"]
# ### Pictures
#
# A *history* is what one policy has done; the trainer's events make it grow. One function draws its panels,
# for the dashboard, `curves.png` and the lessons. A policy has one colour everywhere: AST orange, full grey,
# random blue, which any colour vision tells apart.

# %% Histories tags=["shared", "fold"]
# @title Histories
COLOURS = {"ast": "#d55e00", "full": "#666666", "random": "#0072b2", "short": "#009e73"}
COLOURS |= {"dense": "#cc79a7", "dense-short": "#56b4e9", "keep-short": "#e69f00"}
COLOURS |= {"solve and PI": "#d55e00", "PI alone": "#0072b2"}  # in the controller's lesson
STYLE = {"font.size": 8.5, "axes.titlesize": 9.5, "axes.titlelocation": "left", "axes.xmargin": 0}
STYLE |= {"axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False}
STYLE |= {"axes.titley": 1.0}  # to look for a free place would take an eighth of the drawing
STYLE |= {"text.parse_math": False}  # names may hold a $
DRAWING = threading.RLock()  # matplotlib has one style for all threads
POINTS = 400  # decisions that a history keeps; a panel is hardly wider
LINES = {  # panel: title with the unit, x, y, and what is dotted beside it
    "accuracy": ("Validation accuracy (%)", "seconds", "accuracy", ""),
    "compute": ("Validation accuracy (%)", "TFLOPs, with evaluation", "accuracy", ""),
    "samples": ("Validation accuracy (%)", "thousand samples", "accuracy", ""),
    "rate": ("Activation rate (dotted: target)", "epochs", "rate", "target"),
    "threshold": ("Threshold θ (a rank)", "epochs", "threshold", ""),
    "energy": ("Unit energy, thousand (dotted: all)", "epochs", "energy", "energy_of_all"),
    "flops": ("TFLOPs (dotted: all samples)", "epochs", "flops", "flops_of_all"),
    "joules": ("Joules, measured", "epochs", "joules", ""),
    "side": ("Side of a view (pixels)", "epochs", "resolution", ""),
}
LIVE = ("accuracy", "rate", "energy", "flops", "threshold", "histogram")
CURVES = ("accuracy", "compute", "samples", "rate", "threshold", "energy")  # above: at three costs


class History:
    """What one policy has done with one seed; the worker appends to it, the notebook's thread reads it."""

    def __init__(self, policy: str, seed: int, epochs: int, rows: list[dict], changes: list[dict]):
        """epochs: that it is to train. rows: those it has trained. changes: by hand, "control" events."""
        self.policy, self.seed, self.epochs, self.changes = policy, seed, epochs, list(changes)
        self.colour = COLOURS.get(policy, "black")
        sums = "candidates activated epochs seconds energy energy_of_all heeded".split()
        self.now = dict.fromkeys(sums, 0) | {"rate": 1.0, "target": 1.0, "progress": 0.0}
        self.now["resolution"] = rows[0]["resolution"] if rows else None
        self.points = [self.now]  # what `now` was; holds x and y of `LINES`, as far as they were known
        self.row: dict = {}  # the newest epoch
        self.scores: tuple[np.ndarray, float | None] | None = None  # and θ, a rank among them
        for row in rows:
            values = {"target": row["target_activation"], "threshold": row["threshold"]}
            values["resolution"] = row["resolution"]
            self.now = self.after(row["candidates"], row["activated"], **values)
            self.ended(row)

    def after(self, candidates: int, activated: int, **more: object) -> dict:
        """The state once so many more samples were decided on; `more` is known then."""
        now, before = dict(self.now), self.points[-1]
        now["candidates"] += candidates
        now["activated"] += activated
        now["rate"] = (now["activated"] - before["activated"]) / (now["candidates"] - before["candidates"])
        now["thousand samples"] = 1e-3 * now["activated"]
        now["energy"] = 1e-3 * Cost(0.0, now["candidates"], now["activated"]).unit_energy
        now["energy_of_all"] = 1e-3 * UNIT_ACTIVATED * now["candidates"]
        return now | more

    def decided(self, data: dict) -> None:
        """Takes in a decision of the gate; keeps `POINTS` of them, and each that met a new target."""
        theta, before = getattr(data["gate"], "threshold", None), self.points[-1]
        more = {name: data[name] for name in ("phase", "seconds", "joules", "progress", "resolution")}
        more |= {"target": data["rate"], "threshold": theta, "heeded": len(self.changes)}
        more["epochs"] = self.row.get("epoch", 0) + data["candidates"] / data["n"]
        now = self.after(data["offered"], data["activated"], **more)
        if each := data["flops_per_sample"].get("training", 0):
            now["flops"] = 1e-12 * (data["flops"] + each * (now["activated"] - data["trained"]))
            now["flops_of_all"] = 1e-12 * each * now["candidates"]
        self.now, offered = now, now["candidates"] - before["candidates"]
        if data["rate"] != before["target"] or offered >= self.epochs * data["n"] / POINTS:
            self.points.append(now)
            if len(scores := scores_of(data["gate"])):
                self.scores = scores.numpy(), theta

    def ended(self, row: dict) -> None:
        """Takes in an epoch that has ended."""
        now = self.now | {"epochs": row["epoch"], "seconds": row["elapsed_seconds"]}
        now["TFLOPs, with evaluation"] = 1e-12 * row.get("flops", math.nan)  # nan: from an older checkpoint
        now["progress"] = 1.0 if row["epoch"] == self.epochs else now["progress"]
        self.row, self.now = row, now
        self.points.append(now | {"accuracy": row["val_accuracy"]})

    def line(self, x: str, y: str) -> np.ndarray:
        """What is known of y over x, float64 [2, points]."""
        known = [(point[x], point[y]) for point in list(self.points) if point.get(y) is not None]
        return np.array(known, dtype=float).reshape(-1, 2).T


class Histories:
    """The histories of a session: a listener in the worker, read by the notebook's thread."""

    def __init__(self):
        self.title = ""  # of pictures
        self.runs: list[History] = []  # the newest last
        self.planned: dict[tuple, tuple[int, float]] = {}  # of a policy and seed: epochs, work in full epochs

    def __call__(self, event: str, data: dict) -> None:
        if event == "plan":
            self.title = "SYNTHETIC images" if data["synthetic"] else ""
            self.planned = {(policy, seed): data["work"][policy] for policy, seed in data["left"]}
        elif event == "start":
            run = data["policy"], data["seed"]
            self.planned[run] = data["epochs"], self.planned.get(run, (0, 1.0))[1]
            others = [history for history in self.runs if (history.policy, history.seed) != run]
            self.runs = [*others, History(*run, data["epochs"], data["rows"], data["changes"])]
        elif event == "chunk":
            self.runs[-1].decided(data)
        elif event == "epoch":
            self.runs[-1].ended(data)
        elif event == "control":
            self.runs[-1].changes.append(data)

    def epochs(self) -> tuple[int, int]:
        """Epochs trained, and epochs in all."""
        return sum(h.row.get("epoch", 0) for h in self.runs), sum(e for e, _ in self.planned.values())

    def outlook(self) -> tuple[float, float | None]:
        """The share of the work that is done, and the seconds that the rest takes at the pace so far."""
        whole = sum(work for _, work in list(self.planned.values())) or 1.0  # it may grow meanwhile
        done = sum(self.planned[h.policy, h.seed][1] * h.now["progress"] for h in self.runs) / whole
        seconds = sum(history.now["seconds"] for history in self.runs)
        return done, seconds * (1 / done - 1) if done and seconds > 3 else None


# %% Pictures tags=["shared", "fold"]
# @title Pictures
@contextmanager
def drawing() -> Iterator[None]:
    """Our style, in one thread at a time, and no warning for each letter that the font lacks."""
    with DRAWING, warnings.catch_warnings(), matplotlib.rc_context(STYLE):
        warnings.filterwarnings("ignore", "Glyph")
        yield


def png_of(figure: Figure) -> bytes:
    """Draws the figure; returns a PNG with a palette of at most 256 colours, a third of the size."""
    canvas, buffer = FigureCanvasAgg(figure), io.BytesIO()
    canvas.draw()
    image = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")
    image.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(buffer, "png")
    return buffer.getvalue()


def picture(histories: list[History], panels: Sequence[str], title: str = "", dpi: int = 100) -> bytes:
    """The PNG of some panels; of several seeds, the last one's are drawn."""
    with drawing():
        figure = Figure(figsize=(9.8 if len(panels) < 7 else 12.6, 4.8), dpi=dpi)
        figure.suptitle(title, x=0.01, ha="left")
        draw_panels(figure, [h for h in histories if h.seed == histories[-1].seed], panels)
        return png_of(figure)


def draw_panels(figure: Figure, histories: list[History], panels: Sequence[str]) -> None:
    """Fills a figure with panels: of `LINES`, or "histogram". The first history is under test."""
    rows = 1 if len(panels) < 4 else 2
    space = {"left": 0.052, "right": 0.985, "top": 0.9, "bottom": 0.09, "wspace": 0.5, "hspace": 0.45}
    grid = figure.subplots(rows, len(panels) // rows, squeeze=False, gridspec_kw=space)
    for name, axes in zip(panels, grid.flat, strict=True):
        if name == "histogram":
            draw_histogram(axes, histories)
        else:
            draw_lines(axes, histories, *LINES[name])
        if not axes.has_data():
            axes.set_yticks([])
            axes.text(0.5, 0.5, "none so far", ha="center", transform=axes.transAxes)
        if name in LINES and LINES[name][1] in ("epochs", "seconds"):
            mark_changes(axes, histories, LINES[name][1], named=name == "rate")
    label_ends(grid[0, 0], histories, *LINES[panels[0]][1:3])


def draw_lines(axes: Axes, histories: list[History], title: str, x: str, y: str, dotted: str) -> None:
    """y of each history over x, the first on top; and what is dotted, of the first."""
    lines = [(history.line(x, y), {"color": history.colour}) for history in reversed(histories)]
    lines += [(history.line(x, dotted), {"color": "black", "ls": ":"}) for history in histories[:1]]
    steps = "steps-pre" if y in ("rate", "resolution") else "default"  # they are of what led to the point
    for line, style in lines:
        if line.size:
            axes.plot(*line, marker="." if y == "accuracy" else None, drawstyle=steps, **style)
    axes.set(title=title, xlabel=x)
    axes.locator_params(nbins=5)
    axes.locator_params("x", integer=x == "epochs", min_n_ticks=1)
    longest = max((history.epochs for history in histories), default=1)
    axes.set_xlim(0, longest if x == "epochs" else None)
    if y not in ("accuracy", "threshold"):
        axes.set_ylim(bottom=0)


def label_ends(axes: Axes, histories: list[History], x: str, y: str) -> None:
    """Names each line at the right edge, at the height of its end, pushed apart so that none overlap."""
    ends = sorted((curve[1, -1], h.policy, h.colour) for h in histories if (curve := h.line(x, y)).size)
    low, high = axes.get_ylim()
    line = 0.16 * axes.figure.dpi / axes.bbox.height  # inches, as a share of the height
    room = line * (high - low) * np.arange(len(ends))
    heights = np.maximum.accumulate(np.array([end for end, _, _ in ends]) - room) + room
    for height, (_, name, colour) in zip(np.minimum(heights, high - room[::-1]), ends, strict=True):
        axes.text(1.02, height, name, color=colour, va="center", transform=axes.get_yaxis_transform())


def mark_changes(axes: Axes, histories: list[History], x: str, named: bool) -> None:
    """A line in the policy's colour for each change by hand; named where there is room for it."""
    changes = [(change, history) for history in histories for change in list(history.changes)]
    last, end, room = -math.inf, axes.get_xlim()[1], 0.06 * np.ptp(axes.get_xlim())
    for change, history in sorted(changes, key=lambda pair: pair[0][x]):
        at = min(change[x], end)  # a stop lies in an epoch that was cut
        axes.axvline(at, color=history.colour, linewidth=0.8)
        if named and at - last > room:
            where = {"rotation": 90, "ha": "right" if at > room else "left", "va": "top"}
            axes.text(at, 0.92, change["words"], transform=axes.get_xaxis_transform(), **where)
            last = at if at > room else at + room


def draw_histogram(axes: Axes, histories: list[History]) -> None:
    """The significances at the newest look at the first history's gate, and its θ among them."""
    axes.set(title="Significance, % (dashed: θ)", xlabel="significance")
    for scores, theta in [history.scores for history in histories[:1] if history.scores]:
        high = float(np.quantile(scores, 0.98)) or 1.0
        counts, edges = np.histogram(np.clip(scores, 0, high), 30, (0, high))
        axes.stairs(100 * counts / len(scores), edges, fill=True, color=histories[0].colour, alpha=0.5)
        if theta is not None and math.isfinite(theta):
            at = float(np.quantile(scores, min(1.0, max(0.0, theta))))
            axes.axvline(min(high, at), color="black", linestyle="--")


def curves(results: list[dict], title: str, path: Path) -> None:
    """Draws finished or stopped runs, of the first seed, into a PNG."""
    shown = [r for r in results if r["epochs"] and r["seed"] == results[0]["seed"]]
    histories = [History(r["policy"], r["seed"], len(r["epochs"]), r["epochs"], r["changes"]) for r in shown]
    sides = {row["resolution"] for result in shown for row in result["epochs"]}
    panels = CURVES if len(sides) < 2 else (*CURVES[:-1], "side")  # unit energy knows nothing of pixels
    write_whole(path, picture(histories, panels, title, 140))


# %% The worker and the pump [markdown] tags=["shared"]
# ### A run you can talk to
#
# A cell that trains keeps the kernel busy: no slider is heard until it ends. A cell that returns at once is
# no better, since "Run all" would go on before there is anything to show. So a worker thread trains, and the
# cell awaits a *pump* that lets widget messages in, and holds back the cells that come next. The worker
# touches no widget: it appends to lists and reads `Controls`.

# %% The worker and the pump tags=["shared", "fold"]
# @title The worker and the pump
PUMP_SECONDS = 0.1  # between two looks at the sliders


def kernel() -> object | None:
    """The ipykernel that runs this notebook; None in a script."""
    get_ipython = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)
    return getattr(get_ipython(), "kernel", None)


WORKER = "adaptive sparse training"  # its thread's name


def begin_work(work: Callable[[], dict]) -> Future:
    """Runs `work` beside the notebook, in a daemon, so that a restarted kernel never waits for it."""
    outcome = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:  # raised again in the cell
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True, name=WORKER).start()
    return outcome


class Pump:
    """Lets widget messages in while a cell awaits it; cells that were asked for meanwhile run afterwards.

    ipykernel before 7 (Colab, Kaggle) reads messages only between cells, so we turn its loop ourselves and
    keep execute requests for later. From 7 on it reads them while a cell awaits, but does not tell that it
    has handled them, which a slider waits for before it sends again. Without a kernel there is nothing to do.
    """

    def __init__(self):
        self.kernel, self.held = kernel(), []  # held: requests as they lay in the queue
        self.turned = hasattr(self.kernel, "msg_queue") and hasattr(self.kernel, "schedule_dispatch")
        self.handlers = {} if self.turned else getattr(self.kernel, "shell_handlers", {})
        self.handle = self.handlers.get("comm_msg")

    async def __aenter__(self) -> Pump:
        if self.turned:
            ident = getattr(self.kernel, "_parent_ident", None)
            self.cell = (ident.get("shell") if hasattr(ident, "get") else ident, self.kernel.get_parent())
        if self.handle:
            self.handlers["comm_msg"] = self._handled
        return self

    def _handled(self, stream: object, ident: object, message: dict) -> object:
        result = self.handle(stream, ident, message)
        self.kernel._publish_status("idle", "shell", message)
        return result

    async def __call__(self) -> None:
        """Waits for `PUMP_SECONDS`, and handles what has arrived."""
        if self.turned and self.kernel.msg_queue.qsize():
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
        if self.handle:
            self.handlers["comm_msg"] = self.handle
        if self.turned:
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


# %% The dashboard [markdown] tags=["shared"]
# ### The dashboard
#
# Once a second the cell reads the histories and updates the numbers. Drawing takes time from training, so
# there is a picture as often as a small share of the time allows, and at once after a change by hand.


# %% The dashboard tags=["shared", "fold"]
# @title The dashboard
class Dashboard:
    """Sliders and buttons that write `controls`, numbers and panels that show `histories`, in `panel`."""

    def __init__(self, panel: object, histories: Histories, controls: Controls, settings: ASTConfig):
        """panel: an `ipywidgets.VBox`; a new one if None."""
        import ipywidgets as widgets  # a script needs none

        self.panel, self.histories, self.controls = panel or widgets.VBox(), histories, controls
        self.share = 0.03 if torch.get_num_threads() >= (os.cpu_count() or 1) else 0.02  # for pictures
        self.told = self.began = self.due = time.monotonic()  # due: when there will be another picture
        self.changes = 0  # by hand, and those that a decision has heeded, in the newest picture
        self.shown: History | None = None
        self.said = ""  # the log
        wide, wrapped = widgets.Layout(width="300px"), widgets.Layout(flex_flow="row wrap")
        style = {"readout_format": ".2f", "layout": wide, "style": {"description_width": "initial"}}
        target = settings.target_activation
        self.target = widgets.FloatSlider(target, min=min(0.02, target), max=1, step=0.01, **style)
        self.factor = widgets.FloatLogSlider(1.0, min=-1, max=1, step=0.05, **style)
        self.target.description, self.factor.description = "target activation", "learning rate ×"
        for control, slider in (("target_activation", self.target), ("learning_rate_factor", self.factor)):
            slider.continuous_update = False
            slider.observe(functools.partial(self._moved, control), "value")
        self.pause = widgets.ToggleButton(description="Pause", icon="pause")
        self.pause.observe(lambda change: controls.pause(change["new"]), "value")
        self.stop = widgets.Button(description="Stop and save", icon="stop")
        self.stop.on_click(lambda button: controls.ask_stop("stop button"))
        self.bar = widgets.FloatProgress(0.0, min=0.0, max=1.0, layout=wide)
        self.words = widgets.HTML("loading the data", layout=widgets.Layout(min_height="4.5em"))
        self.image = widgets.Image(value=live_picture(histories), layout=widgets.Layout(max_width="100%"))
        rows = [self.target, self.factor], [self.pause, self.stop, self.bar]
        self.panel.children = [*(widgets.HBox(row, layout=wrapped) for row in rows), self.words, self.image]

    def _moved(self, control: str, change: dict) -> None:
        """Asks for what a slider shows, unless it only follows what is in force."""
        new = round(change["new"], 3)
        if self.controls.asked or new != self.controls.values[control]:
            self.controls.set(control, new)

    def show(self) -> None:
        """Shows the panel, under an id that `finish` knows: ipywidgets 7 would show a widget without one.
        Below it stands the log, as plain text, which a saved notebook keeps.
        """
        from IPython.display import display

        view = {"model_id": self.panel.model_id, "version_major": 2, "version_minor": 0}
        shown = {"application/vnd.jupyter.widget-view+json": view, "text/plain": "the dashboard"}
        display(shown, raw=True, display_id=self.panel.model_id)
        self.log = display({"text/plain": ""}, raw=True, display_id=True)

    def say(self, line: str) -> None:
        """Adds a line to the log."""
        self.said += line + "\n"
        self.log.update({"text/plain": self.said}, raw=True)

    def refresh(self) -> None:
        """Numbers once a second, the picture as often as its cost allows; cheap in between."""
        now, runs = time.monotonic(), self.histories.runs
        changes = sum(len(run.changes) + run.now["heeded"] for run in runs)
        if not runs or (now - self.told < 1 and changes == self.changes):
            return
        self.told = now
        if runs[-1] is not self.shown:
            self._follow(runs[-1])
        self.bar.value, left = self.histories.outlook()
        self.words.value = self._numbers(runs[-1], left)
        if changes != self.changes or now >= self.due:
            self.changes, self.image.value = changes, live_picture(self.histories)
            spent = time.monotonic() - now
            self.due = now + min(spent / self.share, now - self.began)  # the first ones come sooner

    def _follow(self, run: History) -> None:
        """A policy begins: only the first of a seed can be steered; a resumed run has values of its own."""
        later = self.shown is not None and self.shown.seed == run.seed
        self.target.disabled = later or run.policy == "full"
        self.shown, values = run, self.controls.values
        if not self.controls.asked:
            self.target.value = values["target_activation"] or self.target.value
            self.factor.value = values["learning_rate_factor"]

    def _numbers(self, run: History, left: float | None) -> str:
        now, row, epoch = run.now, run.row, min(run.row.get("epoch", 0) + 1, run.epochs)
        state = "stopping" if self.controls.stop else "paused" if self.controls.paused else run.policy
        parts = [f"<b>{state}</b>, seed {run.seed}: epoch {epoch} of {run.epochs}"]
        if "phase" not in now:
            return parts[0]
        parts += [now["phase"], f"{clock(now['seconds'])} spent"]
        parts += [f"{now['resolution']} pixels"] if now["resolution"] else []
        parts += [] if left is None else [f"about {clock(left)} to go"]
        parts += [f"accuracy {row['val_accuracy']:.2f} %"] if row else []
        parts += [f"activation {now['rate']:.3f}, target {now['target']:.3f}"]
        parts += ["no θ" if now["threshold"] is None else f"θ {now['threshold']:.3f}"]
        for key, words in (("energy", "unit energy saved (a model)"), ("flops", "FLOPs saved")):
            parts += [f"{words} {100 * (1 - now[key] / now[f'{key}_of_all']):.1f} %"] if key in now else []
        parts += ["joules: no sensor" if now["joules"] is None else f"{now['joules']:.0f} J spent"]
        return " · ".join(parts)

    def finish(self, png: bytes | None) -> None:
        """Folds the log, and puts a plain picture wherever the panel is shown: widgets are not saved."""
        from IPython.display import HTML, update_display
        from IPython.display import Image as Shown

        update_display(Shown(png) if png else HTML(""), display_id=self.panel.model_id)
        rows, self.panel.children = self.panel.children, ()
        for widget in (part for row in rows for part in (*getattr(row, "children", ()), row)):
            widget.close()
        folded = f"<details><summary>Log of the run</summary><pre>{html.escape(self.said)}</pre></details>"
        self.log.update({"text/plain": self.said, "text/html": folded}, raw=True)


def live_picture(histories: Histories) -> bytes:
    """The panels of the dashboard; two more where there is a sensor."""
    sensor = any(run.now.get("joules") is not None for run in histories.runs)
    return picture(histories.runs, LIVE + ("joules", "samples") * sensor, histories.title)


def widgets_serve() -> bool:
    """Whether there may be somebody to move a slider: a kernel with ipywidgets, not Kaggle's batch run."""
    watched = os.environ.get("KAGGLE_KERNEL_RUN_TYPE", "") != "Batch"
    return watched and kernel() is not None and importlib.util.find_spec("ipywidgets") is not None


async def run_live(settings: ASTConfig, data: ImageData | None = None, panel: object = None) -> dict:
    """As `run`, in a notebook: `summary = await run_live(settings)`, with a dashboard where widgets work.

    panel: an `ipywidgets.VBox` that may be shown already; a new one if None. Interrupting the cell saves and
    stops. Raises what the run raises, and BadInput while another run is on.
    """
    if any(thread.name == WORKER for thread in threading.enumerate()):
        raise BadInput("another run in this notebook: expected none; wait until it has saved, then run again")
    controls, lines, histories = Controls(), queue.SimpleQueue(), Histories()
    settled = settings_for_run(settings)
    dashboard = live = Dashboard(panel, histories, controls, settled) if widgets_serve() else None
    if dashboard:
        dashboard.show()
    say = dashboard.say if dashboard else print
    listeners = [histories, print_table(False, lines.put)]
    worker = begin_work(lambda: run(settings, (), listeners, controls, lines.put, data))
    async with Pump() as pump:
        while not worker.done() or not lines.empty():
            try:
                await pump()
                while not lines.empty():
                    say(lines.get())
                if live:
                    try:
                        live.refresh()
                    except Exception as error:  # a picture that fails must not end the cell before the run
                        live = None
                        say(f"the dashboard stands still from here on: {one_line(error)}")
            except (KeyboardInterrupt, asyncio.CancelledError):
                if controls.stop:  # a second time: at once
                    raise
                controls.ask_stop("interrupt")
    try:
        png = live_picture(histories) if histories.runs else None
    except Exception as error:  # nor may the last one lose the results
        png = None
        say(f"no last picture: {one_line(error)}")
    if dashboard:
        dashboard.finish(png)
    summary = worker.result()
    if png:
        write_whole(Path(summary["out"]) / "dashboard.png", png)
    return summary


# %% Lessons [markdown] tags=["shared"]
# ### Lessons
#
# Pictures to look at before and after a run. Each is a function, called from a cell of its own further down,
# so you can call it again with other values.


# %% Lessons tags=["shared", "fold"]
# @title Lessons
def show_png(png: bytes) -> None:
    """Displays a PNG in a notebook."""
    from IPython.display import Image as Shown  # a script needs no IPython
    from IPython.display import display

    display(Shown(png))


def show_images(rows: dict[str, tuple[np.ndarray, list[str], np.ndarray]]) -> None:
    """Rows of images, uint8 [k, side, side, 3], each row with a title, a caption an image, and which labels
    are wrong, bool [k]: those images are framed."""
    with drawing():
        figure = Figure(figsize=(9.8, 1.75 * len(rows)))
        grid = figure.subplots(len(rows), gridspec_kw={"left": 0.01, "right": 0.99, "hspace": 0.6})
        for axes, (title, (images, captions, wrong)) in zip(grid, rows.items(), strict=True):
            side = images.shape[2]
            axes.imshow(np.hstack(images))
            axes.vlines(side * np.arange(1, len(images)), 0, side - 1, color="white", linewidth=4)
            axes.set_xticks(side * np.arange(len(images)) + side / 2, captions)
            for left in side * np.flatnonzero(wrong):
                axes.axvspan(left + 1, left + side - 2, fill=False, edgecolor="red", linewidth=5)
            axes.set(title=f"{title}; framed: wrong label" if any(wrong) else title, yticks=[])
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            axes.grid(False)
        show_png(png_of(figure))


def wrong_labels(data: ImageData, which: np.ndarray) -> np.ndarray:
    """Which of some training images (int64 [k]) are known to have a wrong label, bool [k]."""
    return np.zeros(len(which), bool) if data.difficulty is None else data.difficulty[which] == 2


def show_significance(
    settings: ASTConfig, data: ImageData, samples: int = 3000, epochs: int = 5, seconds: float = 8.0
) -> None:
    """Trains briefly on some samples, and shows the most and the least significant with their scores."""
    some = np.random.default_rng(0).permutation(len(data.train_labels))[:samples]
    images, labels = data.train_images[some], data.train_labels[some]
    few = {"train_images": images, "train_labels": labels}
    few = replace(data, **few, val_images=images[:100], val_labels=labels[:100])
    settings = replace(settings, batch_size=32)  # small batches: many steps in little time
    torch.manual_seed(0)
    model = build_model(settings, few)
    optimizer, criterion = recipe(settings, model)
    config = replace(ASTConfig.of(settings), gate="remembered", ramp_epochs=0, anneal_epochs=0)
    config.resolution = "full"
    train, val = sources(settings, few, torch.device(settings.device))
    trainer = AdaptiveSparseTrainer(model, train, val, config, optimizer, criterion, listeners=[])
    trainer.controls.deadline = time.monotonic() + seconds
    print(f"training on {len(some)} images, for at most {seconds:.0f} s")
    trainer.train(epochs, warmup_epochs=epochs)
    scores = trainer.gate.memory.significance.numpy()
    seen = np.flatnonzero(np.isfinite(scores))
    order, rows = seen[np.argsort(scores[seen])], {}
    for word, which in (("Most", order[:-11:-1]), ("Least", order[:10])):
        title = f"{word} significant of {len(seen)} images after brief training: label, remembered loss"
        captions = [f"{data.classes[labels[i]][:12]}\n{scores[i]:.2f}" for i in which]
        rows[title] = images[which], captions, wrong_labels(data, some[which])
    show_images(rows)


def respond(target: float, kp: float, ki: float, lost: float, feedforward: bool) -> History:
    """What a controller does in 100 chunks, when the target steps from 0.6 to `target` after 40.

    lost: share of the activated that come back without a finite loss, which no solve can know.
    """
    config = ASTConfig(feedforward=feedforward, adapt_kp=kp, adapt_ki=ki)
    controller, phase, size = Controller(config), 0.5, 640
    controller.KP, controller.KI = kp, ki
    generator = torch.Generator().manual_seed(0)
    history = History("solve and PI" if feedforward else "PI alone", 0, 5, [], [])
    for chunk in range(100):
        a = target if chunk >= 40 else 0.6
        u = torch.rand(size, generator=generator)
        solved = solve_threshold(u, a * size, a, config.temperature)
        theta = controller.threshold(solved, threshold_slope(u, solved, a, config.temperature))
        taken, phase = systematic(activation_probability(u, theta, a, config.temperature), phase)
        controller.lost = int((torch.rand(len(taken), generator=generator) < lost).sum())
        back = len(taken) - controller.lost
        controller.update(len(taken), size, a, exact=feedforward)
        history.now = history.after(size, back, target=a, threshold=theta, epochs=(chunk + 1) / 20)
        history.points.append(history.now)
    return history


def show_response(target: float = 0.2, kp: float = 0.5, ki: float = 0.2, lost: float = 0.0) -> None:
    """The step responses of the solve with PI, and of PI alone, lost samples taken off."""
    histories = [respond(target, kp, ki, lost, feedforward) for feedforward in (True, False)]
    show_png(picture(histories, ("rate", "threshold")))


def playground() -> None:
    """Sliders for the controller; without widgets, one picture with its defaults."""
    if not widgets_serve():
        return show_response()
    import ipywidgets

    spans = {"target": (0.02, 1, 0.02), "kp": (0, 2, 0.02), "ki": (0, 1, 0.02), "lost": (0, 0.5, 0.02)}
    ipywidgets.interact(show_response, **spans)


def show_results(summary: dict) -> None:
    """What was measured, and the curves."""
    print(report(summary))
    path = Path(summary["out"]) / "curves.png"
    if path.exists():
        show_png(path.read_bytes())
    else:
        print("no epoch was finished, so there is no curve")


def show_chosen(summary: dict, data: ImageData) -> None:
    """The classes and images that the gate chose most and least often.

    Raises BadInput where `data` is not what the run trained on.
    """
    path, labels, names = Path(summary["out"]) / "samples.npz", data.train_labels, data.classes
    times = np.load(path)["times_activated"] if path.exists() else np.zeros(len(labels), np.int16)
    if not times.any():
        return print("no epoch with a gate was begun, so nothing was chosen")
    means = mean_times(path.parent, data)
    order, rows = np.argsort(means)[::-1], {}
    for word, classes, count in (("most", order[:5], times.max()), ("least", order[-5:], times.min())):
        print(f"classes chosen {word}:", ", ".join(f"{names[c]} {means[c]:.1f} times" for c in classes))
        same = np.flatnonzero(times == count)
        some = np.sort(np.random.default_rng(0).permutation(same)[:10])
        title = f"Images chosen {word}: {count} times ({len(same)} images, {len(some)} shown)"
        rows[title] = data.train_images[some], [names[c][:12] for c in labels[some]], wrong_labels(data, some)
    show_images(rows)


# %% Look before you train [markdown] tags=["shared"]
# ## Look before you train
#
# First the settings as they will run, and the data that they name: the lessons and the run share them.

# %% Look before you train tags=["shared", "active-ipynb"]
# settings, data = prepare(replace(settings, **your_run))

# %% What significance looks like [markdown]
# ### What significance looks like
#
# A little training is enough to tell apart what is learned at once and what is not. See in it that
# low scores look like a textbook, and that the highest are odd, hidden, or labelled wrongly: a high loss
# alone does not say whether a sample teaches something.

# %% What significance looks like tags=["active-ipynb"]
# show_significance(settings, data, samples=1000, epochs=3)

# %% The linear probe, measured tags=["active-ipynb"]
# show_probe(settings, data)

# %% Play with the controller [markdown] tags=["shared"]
# ### Play with the controller
#
# Nothing is trained here. The gate decides on a few hundred samples at a time, a *chunk*. The *solve* finds
# the threshold that gives the target rate; PI alone moves the threshold a little after each chunk. See that
# the solve meets a new target at once where PI alone creeps there. *Lost* is the share of the chosen samples
# that turn out unreadable, which no solve can know: the rate bends only until the integral has answered.

# %% Play with the controller tags=["shared", "active-ipynb"]
# playground()

# %% Run [markdown] tags=["shared"]
# ## Run
#
# The same call in both forms: a script reads flags and sets an exit status, a notebook takes the settings
# above. Interrupting the cell, or *stop and save*, keeps what there is, and the cells below show it.

# %% Run as a script tags=["shared", "active-py"]
if __name__ == "__main__":
    sys.exit(main())

# %% Run in a notebook tags=["shared", "active-ipynb"]
# summary = await run_live(settings, data, panel)

# %% What came out [markdown] tags=["shared"]
# ## What came out
#
# See the order of the policies change with what one counts: a rule that wins over samples may lose over
# seconds, unit energy is a model, and choosing was worth only what it is ahead of `random`.

# %% What came out tags=["shared", "active-ipynb"]
# show_results(summary)

# %% What was chosen [markdown] tags=["shared"]
# ### What was chosen
#
# See what the gate thinks is learned, and what it keeps coming back to: hard classes, and wrong labels.

# %% What was chosen tags=["shared", "active-ipynb"]
# show_chosen(summary, data)

# %% What it gets wrong [markdown] tags=["shared"]
# ### What it gets wrong
#
# See which classes the model takes for one another, whether the gate came back to those it gets wrong, and
# where the label rather than the model is wrong. It is the model of the run's first policy and seed.

# %% What it gets wrong tags=["shared", "active-ipynb"]
# show_mistakes(settings, data)

# %% Your own picture [markdown] tags=["shared"]
# ## Your own picture
#
# Write the path of a picture between the quotes, and see it with its five likeliest classes. A folder gives
# `predictions.csv` among the results.

# %% Your own picture tags=["shared", "active-ipynb"]
# predict("")
