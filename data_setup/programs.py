"""The programs whose listing, decoding and downloading are used here rather than written twice.

They are imported by path when first asked for: `--help` and `imagenet100 make` need no torch.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType

from . import BadInput

ROOT = Path(__file__).resolve().parents[1]
CIFAR10 = ROOT / "standalone" / "cifar10_ast.py"
IMAGENET100 = ROOT / "standalone" / "imagenet100_ast.py"


def cifar10() -> ModuleType:
    """The CIFAR-10 program. Raises BadInput where it is missing or cannot be imported."""
    return load(CIFAR10)


def imagenet100() -> ModuleType:
    """The ImageNet-100 program. Raises BadInput where it is missing or cannot be imported."""
    return load(IMAGENET100)


def load(path: Path) -> ModuleType:
    if path.stem in sys.modules:
        return sys.modules[path.stem]
    if not path.exists():
        raise BadInput(f"{path}: no such program, expected it beside data_setup/; take the whole repository")
    sys.path.insert(0, str(path.parent))  # by path, so that the file that ships is the one that runs
    try:
        return importlib.import_module(path.stem)
    except ImportError as error:
        raise BadInput(f"{path.name}: {error}; run `pip install -r {ROOT / 'requirements.txt'}`") from error
    finally:
        sys.path.remove(str(path.parent))


def refusals() -> tuple[type[Exception], ...]:
    """BadInput, and what the programs loaded so far call by that name."""
    loaded = [sys.modules.get(path.stem) for path in (CIFAR10, IMAGENET100)]
    return BadInput, *(program.BadInput for program in loaded if program)
