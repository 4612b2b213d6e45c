"""Download CIFAR-10 with the CIFAR-10 program's own mirrors, checksum and resume."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from . import BadInput, programs
from .files import cannot_write, make_folder


def fetch(folder: Path, force: bool, say: Callable[[str], None]) -> dict:
    """Have the archive in `folder`; returns what is there. Raises BadInput where no mirror gives it."""
    program = programs.cifar10()
    target = folder / program.CIFAR10_ARCHIVE
    report = {"path": str(target), "md5": program.CIFAR10_MD5, "downloaded": False}
    try:
        if target.exists():
            if md5(target) == program.CIFAR10_MD5:
                return report | {"bytes": target.stat().st_size}
            if not force:
                raise BadInput(
                    f"{target}: another file than CIFAR-10 by its md5, expected {program.CIFAR10_MD5}; "
                    "give --force to replace it, or another --to"
                )
        make_folder(folder)
        failed = program.download(target, True, say)
        if failed is not None:
            reasons = "; ".join(f"{url} ({reason})" for url, reason in failed.items()) or "no mirrors"
            raise BadInput(
                f"cifar10 fetch: no mirror sent it: {reasons}; try again later (what has arrived is kept), "
                f"or put {program.CIFAR10_ARCHIVE} into {folder}"
            )
        return report | {"downloaded": True, "bytes": target.stat().st_size}
    except OSError as error:
        raise cannot_write(target, error) from error


def md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
