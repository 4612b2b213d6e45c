"""What is checked and packed: image files as the program lists them, or arrays, behind one face."""

from __future__ import annotations

import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from . import BadInput, programs
from .files import one_line

SPLITS = ("train", "val")
SMALL = 32  # pixels; the size that `size` decodes to, so that large JPEGs decode at reduced scale
PACKED = ("train_images", "train_labels", "val_images", "val_labels")


@dataclass
class Source(ABC):
    """A data set: samples in training's order, each with raw content and the picture that it decodes to."""

    path: Path
    form: str  # in words
    keys: list[str]  # folder names; label i is keys[i]
    classes: list[str]  # names for people, unique
    names: dict[str, list[str]]  # of the samples of each split
    labels: dict[str, np.ndarray]  # int64 [N]
    unreadable: tuple[type[Exception], ...] = field(default=(OSError, ValueError), kw_only=True)

    @abstractmethod
    def read(self, split: str, index: int) -> bytes:
        """A sample's content. Raises one of `unreadable`."""

    @abstractmethod
    def picture(self, content: bytes, side: int) -> np.ndarray:
        """The centre square as uint8 [side, side, 3]. Raises one of `unreadable`."""

    @abstractmethod
    def size(self, content: bytes) -> tuple[int, int]:
        """Upright width and height in pixels, with every pixel decoded. Raises one of `unreadable`."""

    @abstractmethod
    def stamps(self) -> Iterator[object]:
        """What tells that content has changed since: sizes and times."""

    def fingerprint(self) -> str:
        """A digest of names, labels, order, sizes and times: another, and it is another source."""
        digest = hashlib.sha256()
        for split in SPLITS:
            digest.update("\n".join([split, *self.names[split]]).encode(errors="surrogatepass"))
            digest.update(self.labels[split].tobytes())
        digest.update(repr((self.keys, self.classes, list(self.stamps()))).encode(errors="backslashreplace"))
        return digest.hexdigest()

    def __len__(self) -> int:
        return sum(map(len, self.names.values()))

    def close(self) -> None:  # noqa: B027  (most have nothing open)
        """Give back what is open."""


class Images(Source):
    """Image files in a folder or a .zip."""

    def __init__(self, path: Path, val_fraction: float = 0.2):
        self.program = programs.imagenet100()
        listing = self.program.list_images(path, val_fraction)
        super().__init__(
            path,
            "image files",
            listing.keys,
            listing.classes,
            {split: list(listing.splits[split][0]) for split in SPLITS},
            {split: np.asarray(listing.splits[split][1], dtype=np.int64) for split in SPLITS},
            unreadable=self.program.UNREADABLE,
        )
        self.root = Path(listing.root)
        self.files = self.program.Files(listing.root)

    def read(self, split: str, index: int) -> bytes:
        return self.files.read(self.names[split][index])

    def picture(self, content: bytes, side: int) -> np.ndarray:
        return self.program.decode(content, side, functools.partial(self.program.centre_box, share=1))

    def size(self, content: bytes) -> tuple[int, int]:
        found = []

        def whole(width: int, height: int) -> tuple[float, float, float, float]:
            found.append((width, height))
            return 0.0, 0.0, float(width), float(height)  # the centre alone may end above what is damaged

        self.program.decode(content, SMALL, whole)
        return found[0]

    def stamps(self) -> Iterator[object]:
        if self.root.is_file():
            status = self.root.stat()
            yield status.st_size, status.st_mtime_ns
            return
        for split in SPLITS:
            for name in self.names[split]:
                try:
                    status = (self.root / name).stat()
                    yield status.st_size, status.st_mtime_ns
                except OSError:  # unreadable, and counted as such
                    yield None

    def close(self) -> None:
        self.files.close()


class Arrays(Source):
    """Pictures in arrays, uint8 [N, H, W, 3]: CIFAR-10 as published, or what `pack` wrote."""

    def __init__(self, path: Path, form: str, classes: list[str], arrays: dict[str, np.ndarray]):
        self.arrays = arrays
        super().__init__(
            path,
            form,
            classes,
            classes,
            {s: [f"{s}[{row}]" for row in range(len(arrays[f"{s}_images"]))] for s in SPLITS},
            {s: np.asarray(arrays[f"{s}_labels"], dtype=np.int64) for s in SPLITS},
        )
        self.shape = arrays["train_images"].shape[1:]

    def read(self, split: str, index: int) -> bytes:
        return self.arrays[f"{split}_images"][index].tobytes()

    def picture(self, content: bytes, side: int) -> np.ndarray:
        image = np.frombuffer(content, dtype=np.uint8).reshape(self.shape)
        if self.shape[:2] == (side, side):
            return image
        program = programs.imagenet100()
        return program.crop(image, side, functools.partial(program.centre_box, share=1))

    def size(self, content: bytes) -> tuple[int, int]:
        return self.shape[1], self.shape[0]

    def stamps(self) -> Iterator[object]:
        for split in SPLITS:
            images = self.arrays[f"{split}_images"]
            if isinstance(images, np.memmap):
                status = Path(images.filename).stat()
                yield status.st_size, status.st_mtime_ns
            else:
                yield hashlib.sha256(images).hexdigest()


def count(keys: list[str], labels: np.ndarray) -> dict[str, int]:
    """How many labels (int64 [N]) each class has."""
    return dict(zip(keys, np.bincount(labels, minlength=len(keys)).tolist(), strict=True))


def open_folder(path: Path, val_fraction: float = 0.2) -> Source:
    """Open image folders, a .zip of them, or packed arrays. Raises BadInput."""
    if (path / "train_images.npy").is_file():
        return open_packed(path)
    return Images(path, val_fraction)


def open_cifar10(path: Path, val_fraction: float = 0.2) -> Source:
    """Open CIFAR-10 in any form that the CIFAR-10 program reads. Raises BadInput."""
    program = programs.cifar10()
    try:
        inner = sorted(entry for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else []
        found = next(filter(None, map(program.recognise, (path, *inner))), None)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({one_line(error)}); check path and permissions") from error
    if found is None:
        problem = "no known form of CIFAR-10" if path.exists() else "no such path"
        raise BadInput(
            f"{path}: {problem}, expected {program.CIFAR10_ARCHIVE}, cifar-10-batches-py, or image folders; "
            "`python -m data_setup cifar10 fetch` gets it"
        )
    reader, where = found
    if reader is program.read_images:
        return Images(where, val_fraction)
    if reader is program.read_packed:
        return open_packed(where)
    data = reader(where, 0)
    arrays = {name: getattr(data, name) for name in PACKED}
    return Arrays(where, "CIFAR-10's batches", data.classes, arrays)


def open_packed(path: Path) -> Arrays:
    """Map packed arrays. Raises BadInput where one is missing, damaged, or does not go with the others."""
    data = programs.imagenet100().read_packed(path, 0)
    return Arrays(path, "packed arrays", data.classes, {name: getattr(data, name) for name in PACKED})
