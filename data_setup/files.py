"""Writing files whole, and working on many at once."""

import hashlib
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from . import BadInput

Item, Result = TypeVar("Item"), TypeVar("Result")


def one_line(error: BaseException) -> str:
    """An error's own words on one line, since bad input gets one sentence."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def cores() -> int:
    """Processor cores that this process may use."""
    with suppress(AttributeError):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def size_text(count: float) -> str:
    """Bytes in words: 25.9 GB."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def make_folder(path: Path) -> None:
    """Create a folder and those above it. Raises BadInput where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all. Raises BadInput where the disk refuses."""
    draft = path.with_name(path.name + ".part")
    try:
        with open(draft, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
        sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise cannot_write(path, error) from error


def cannot_write(path: Path, error: OSError) -> BadInput:
    return BadInput(
        f"{path}: expected a place with room to write in ({error.strerror or one_line(error)}); free some, "
        "or choose another --to; what is done is kept, and the same command goes on from there"
    )


def sync_folder(path: Path) -> None:
    """Make renames in a folder outlast a power cut."""
    with suppress(OSError):  # Windows opens no folder
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Make the target folder and hold it for this process, where the system can.

    Raises BadInput if another process holds it, or it cannot be made.
    """
    make_folder(target)
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(target, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise BadInput(
            f"--to {target}: another process is writing there, expected none; wait for it or choose another"
        ) from error
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        with suppress(OSError):
            os.close(handle)


def refuse_inside(target: Path, *sources: Path) -> None:
    """Raise BadInput where `target` is, or would become a part of, what is read: a class perhaps."""
    inner = os.path.realpath(target)
    for source in sources:
        outer = os.path.realpath(source)
        if inner == outer or inner.startswith(os.path.join(outer, "")):
            raise BadInput(
                f"--to {target}: is or lies in what is read, {source}, expected a place outside of it; "
                "choose another"
            )


def check_room(path: Path, need: int, say: Callable[[str], None], what: str) -> None:
    """Say how many bytes are needed at `path` and how many are free. Raises BadInput where it is too few."""
    free = shutil.disk_usage(path).free
    say(f"{what}: {size_text(need)} to write, {size_text(free)} free at {path}")
    if need > free:
        raise BadInput(
            f"--to {path}: expected {size_text(need)} of free space ({size_text(free)} are free); "
            "free some, or choose another disk"
        )


def sha256(path: Path, progress: Callable[[int], object] = lambda _: None) -> str:
    """A file's SHA-256 in hexadecimal; `progress` is told the bytes read. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()


@contextmanager
def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Iterator[Iterator[Result]]:
    """Results of `function` in the order of `items`, made by threads a few items ahead, never all at once.

    Leaving the block, by an error or Ctrl-C too, drops what has not begun and waits for what has.
    """
    pool, waiting = ThreadPoolExecutor(workers), deque[Future[Result]]()

    def results() -> Iterator[Result]:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        yield results()
    finally:
        pool.shutdown(cancel_futures=True)
