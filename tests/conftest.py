"""Fixtures: the program under test is the very file that ships, imported by its path."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # two threads beside a busy process are many times slower than one
    os.environ["OMP_NUM_THREADS"] = "1"

import torch

ROOT = Path(__file__).parents[1]
CIFAR_PROGRAM = ROOT / "standalone" / "cifar10_ast.py"
REAL_CIFAR = ROOT.parent / "shared" / "data" / "cifar10-images.zip"

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


@pytest.fixture
def script(tmp_path):
    """Runs the program as a user would: copied alone into an empty folder, isolated from all else."""
    copied = tmp_path / "cifar10_ast.py"
    copied.write_bytes(CIFAR_PROGRAM.read_bytes())

    def command(*flags):
        return [sys.executable, "-I", str(copied), *map(str, flags)]

    def call(*flags, env=None, check=None, timeout=300):
        done = subprocess.run(
            command(*flags),
            cwd=tmp_path,
            env={**os.environ, **(env or {})},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if check is not None:
            assert done.returncode == check, done.stdout + done.stderr
        return done

    call.command, call.folder = command, tmp_path
    return call
