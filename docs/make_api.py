"""Writes docs/api.md from the docstrings of standalone/cifar10_ast.py: python docs/make_api.py"""

import inspect
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "standalone"))
import cifar10_ast as program  # noqa: E402

CHAPTERS = {
    "Train a model of your own": ["ASTConfig", "AdaptiveSparseTrainer", "Controls", "BadInput"],
    "Run the whole program": ["Settings", "run", "load_data", "ImageData", "shapes"],
    "The method, piece by piece": [
        *("significance", "Memory", "activation_probability", "solve_threshold", "Controller"),
        *("systematic", "importance_weights", "Schedule", "learning_rate_shape"),
    ],
    "Gates": ["RememberedGate", "LiveGate", "Views", "RandomGate"],
    "What it cost": ["Ledger", "EnergyMeter", "flops_per_sample"],
    "Where samples come from": ["ArraySource", "DatasetSource", "as_source"],
}
OPENING = """\
# The public names

Every program in `standalone/` holds these, since the cells are shared. Import a program, or use the names in
its notebook. Written from the docstrings by `python docs/make_api.py`.
"""


def entry(name: str) -> str:
    """The markdown of one public name, with its public methods."""
    thing = getattr(program, name)
    lines = [f"### `{name}{signature(thing)}`", "", inspect.cleandoc(thing.__doc__)]
    for method, value in vars(thing).items() if inspect.isclass(thing) else ():
        function = getattr(value, "__func__", value)  # a classmethod wraps its function
        if inspect.isfunction(function) and not method.startswith("_") and function.__doc__:
            lines += ["", f"**`{method}{signature(function)}`**", "", inspect.cleandoc(function.__doc__)]
    return "\n".join(lines) + "\n"


def signature(thing: object) -> str:
    """Parameter names and plain defaults; the types are in the source."""
    if isinstance(thing, type) and issubclass(thing, Exception):
        return "(sentence)"
    parameters = []
    for item in inspect.signature(thing).parameters.values():
        if item.name in ("self", "cls"):
            continue
        star = {item.VAR_POSITIONAL: "*", item.VAR_KEYWORD: "**"}.get(item.kind, "")
        default = "" if item.default is item.empty else f"={item.default!r}"
        parameters.append(star + item.name + (default if "<" not in default else "=…"))
    text = ", ".join(parameters)
    return f"({text})" if len(text) < 400 else "(…)"


def api() -> str:
    """The whole of docs/api.md."""
    parts = [OPENING]
    for chapter, names in CHAPTERS.items():
        parts += [f"## {chapter}\n", *map(entry, names)]
    return "\n".join(parts)


if __name__ == "__main__":
    (ROOT / "docs" / "api.md").write_text(api(), encoding="utf-8")
