"""Files that are whole or not there, work that goes on where it was stopped, and many images at once."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from . import BadInput

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PROGRESS = "progress.json"  # in TARGET/NAME.part, the folder of unfinished work: of what it is, and how far


def one_line(error: BaseException) -> str:
    """An error's own words on one line, since bad input gets one sentence."""
    text = re.sub(" <_io.*?>", "", " ".join(str(error).split()))  # PIL's name for bytes
    return text[:200] or type(error).__name__


def checksum(path: Path, name: str) -> str:
    """A file's "md5" or "sha256" in hexadecimal. Raises OSError."""
    digest = hashlib.new(name, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_json(path: Path) -> dict:
    """What stands in a file of JSON, or {} where there is none."""
    with suppress(FileNotFoundError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return {}


def write_json(path: Path, content: object) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def complete(part: Path, progress: dict) -> None:
    """Bring all of `part` to the disk, and note that nothing is missing."""
    getattr(os, "sync", int)()  # Windows has none
    write_json(part / PROGRESS, progress | {"complete": True})


def publish(part: Path, names: Iterable[str]) -> None:
    """Move `names` out of `part` into the folder above; can be done again where it was cut short."""
    for name in names:
        if (part / name).exists():
            os.replace(part / name, part.parent / name)
    shutil.rmtree(part)


def refuse_existing(target: Path, names: Iterable[str]) -> None:
    """Raise BadInput where one of `names` is in `target`: whatever it is, it is not overwritten."""
    for name in names:
        if os.path.lexists(target / name):
            raise BadInput(f"--to {target}: holds {name}, expected none; choose another, or move it away")


def refuse_inside(target: Path, source: Path) -> None:
    """Raise BadInput where `target` is, or would become a part of, what is read: a class, perhaps."""
    inner, outer = os.path.realpath(target), os.path.realpath(source)
    if inner == outer or inner.startswith(os.path.join(outer, "")):
        raise BadInput(f"--to {target}: is or lies in what is read, {source}; choose a place outside of it")


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Make the target folder and hold it for this process. Raises BadInput if another process holds it."""
    target.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    handle = os.open(target, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadInput(f"--to {target}: another process writes there; wait, or choose another") from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


def in_order(function: Callable[[Any], Any], items: Iterable[Any], workers: int = 0) -> Iterator[Any]:
    """Results of `function` in the order of `items`, made by threads a few items ahead, never all at once."""
    waiting: deque = deque()
    workers = workers or min(32, (os.cpu_count() or 1) + 4)  # some wait for the disk
    pool = ThreadPoolExecutor(workers)
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:  # after Ctrl-C nothing else is begun
        pool.shutdown(cancel_futures=True)
