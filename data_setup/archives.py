"""Read image files out of tars without ever trusting a name in them.

Nothing is unpacked by the names that an archive gives: a member is taken only if its name is exactly of the
form that the publisher uses, so absolute paths, "..", other cases, links, devices and sparse giants are all
passed by, each with a word. (`check` and `pack` read zips in place, and write nothing by a name from them.)
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from . import BadInput
from .files import one_line

LARGEST_IMAGE = 64 << 20  # bytes, as in the programs
MOST_MEMBERS = 200_000  # of one tar; ILSVRC-2012's largest has 50,000


@contextmanager
def open_tar(path: Path, file: BinaryIO | None = None) -> Iterator[tarfile.TarFile]:
    """Open a tar that is not compressed; `file` where it lies in another. Raises BadInput if damaged."""
    try:
        with tarfile.open(path, "r:", fileobj=file) as tar:
            yield tar
    except (tarfile.TarError, EOFError) as error:
        raise BadInput(
            f"{path}: expected a whole, uncompressed tar as published ({one_line(error)}); download it again"
        ) from error
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({one_line(error)}); check path and permissions") from error


def members(
    path: Path, tar: tarfile.TarFile, form: re.Pattern[str], skip: Callable[[str], None], largest: int | None
) -> Iterator[tarfile.TarInfo]:
    """The plain files in a tar whose whole name is of the given form, each name once.

    `skip` is told of every other member, and why. `largest` is in bytes.
    """
    seen: set[str] = set()
    for count, member in enumerate(tar):
        tar.members = []  # else it keeps every header it has read
        if count >= MOST_MEMBERS:
            raise BadInput(
                f"{path}: over {MOST_MEMBERS:,} members, expected a tar as published; get that one"
            )
        name = member.name
        if member.isdir():
            continue
        if not form.fullmatch(name):
            skip(f"{path.name}: {name!r} is no name of an image here")
        elif not member.isreg() or member.issparse():
            skip(f"{path.name}: {name} is no plain file")
        elif largest is not None and member.size > largest:
            skip(f"{path.name}: {name} has {member.size:,} bytes, more than {largest:,}")
        elif name in seen:
            skip(f"{path.name}: {name} comes twice")
        else:
            seen.add(name)
            yield member
    # Where a header is damaged, tarfile just stops, as if the tar ended there; a whole one ends in zeros.
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no header and no end at byte {tar.offset:,}")
