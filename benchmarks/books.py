"""Files of finished runs, benchmarks/results/<bed>.jsonl: a line a run, appended when it ends.

The first line holds what all runs of the file share; every other line adds what is its own, or differs.
"""

import json
import os
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def read(file: Path) -> list[dict]:
    """The runs in a file, as they ended; none without a file. A line left unfinished does not count."""
    lines = whole_lines(file)
    return [lines[0] | run for run in lines[1:]]


def append(file: Path, shared: dict, run: dict) -> None:
    """Adds a run in one write, so that processes may share a file; `shared` begins a new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = whole_lines(file)[:1]
    first = lines[0] if lines else shared
    own = {key: value for key, value in run.items() if key not in first or first[key] != value}
    added = [own] if lines else [shared, own]
    text = "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in added)
    with file.open("a+b", buffering=0) as log:
        if log.tell():
            log.seek(-1, os.SEEK_END)
            text = text if log.read() == b"\n" else f"\n{text}"
        log.write(text.encode())


def measured(name: str, found: dict) -> None:
    """Adds what a measure of bars.py came to; of a name the last line counts."""
    command = "python benchmarks/bars.py MEASURE"
    append(RESULTS / "bars.jsonl", {"command": command}, {"measure": name, **found})


def whole_lines(file: Path) -> list[dict]:
    """Every line but those that a killed process left unfinished."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]
