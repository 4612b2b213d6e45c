"""Fixtures: the program under test is the very file that ships, imported by its path."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # two threads beside a busy process are many times slower than one
    os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
CIFAR_PROGRAM = ROOT / "standalone" / "cifar10_ast.py"
REAL_CIFAR = ROOT.parent / "shared" / "data" / "cifar10-images.zip"
TIMED = {"seconds", "scoring_seconds", "elapsed_seconds", "data_wait_percent"}  # of a row: a clock's

for variable in [name for name in os.environ if name.startswith("AST_")]:
    del os.environ[variable]


@pytest.fixture(scope="session")
def cifar():
    """The CIFAR-10 program as a module; importing it must not train, print or write anything."""
    import cifar10_ast

    return cifar10_ast


@pytest.fixture(scope="session")
def imagenet():
    """The ImageNet-100 program as a module."""
    import imagenet100_ast

    return imagenet100_ast


@pytest.fixture(scope="session")
def real_cifar():
    """The path of the real images, where this machine has them."""
    if not REAL_CIFAR.exists():
        pytest.skip(f"no real CIFAR-10 images at {REAL_CIFAR}")
    return REAL_CIFAR


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


class Script:
    """The program as a user would have it: copied alone into an empty folder, isolated from all else."""

    def __init__(self, folder):
        self.folder, self.copied = folder, folder / "cifar10_ast.py"
        self.copied.write_bytes(CIFAR_PROGRAM.read_bytes())

    def command(self, *flags):
        return [sys.executable, "-I", "-B", "-u", str(self.copied), *map(str, flags)]

    def start(self, *flags, env=None, **options):
        """The running process; its output is text in pipes."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        return subprocess.Popen(self.command(*flags), cwd=self.folder, env=environment, **pipes, **options)

    def __call__(self, *flags, check=None, timeout=300, **options):
        """Runs it to its end. check: the exit status that is expected."""
        with self.start(*flags, **options) as process:
            out, err = process.communicate(timeout=timeout)
        assert check in (None, process.returncode), out + err
        return subprocess.CompletedProcess(flags, process.returncode, out, err)


@pytest.fixture
def script(tmp_path):
    return Script(tmp_path)


def at(event, number, action):
    """A listener that calls `action` at the `number`th `event`."""
    seen = itertools.count(1)
    return lambda name, data: action() if name == event and next(seen) == number else None


# --- what a run writes and reads ---


def rows(out, timed=True):
    """The rows of a run's metrics.jsonl; without what a clock measured, if not `timed`."""
    found = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return found if timed else untimed(found)


def untimed(rows):
    return [{key: value for key, value in row.items() if key not in TIMED} for row in rows]


def changes(out):
    return [json.loads(line) for line in (Path(out) / "events.jsonl").read_text().splitlines()]


def summary(out):
    return json.loads((Path(out) / "summary.json").read_text())


def files(folder):
    """Every path under a folder with its content."""
    paths = sorted(Path(folder).rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in paths}


def write_images(folder, train=40, test=10, classes=("ant", "bee", "cow")):
    """Class folders of 32 x 32 pictures: noise in a colour of the class; returns the folder."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 128, (32, 32, 3)) + 127 * np.eye(3, dtype=int)[label % 3]
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{number}.png")
    return folder


@pytest.fixture
def small_nets(cifar, monkeypatch):
    """Networks that a test can afford, with batch norm and with dropout from torch's own generator."""
    monkeypatch.setattr(cifar, "build_model", small_net)


@pytest.fixture(scope="module")
def small_nets_throughout(cifar):
    """The same for every test of a module, and for what its fixtures make."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar, "build_model", small_net)
        yield


def small_net(settings, data):
    layers = torch.nn.Conv2d(3, 8, 5, stride=4), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
    head = torch.nn.Dropout(0.1), torch.nn.Flatten(), torch.nn.Linear(8 * 7 * 7, len(data.classes))
    return torch.nn.Sequential(*layers, *head)
