"""Image files in class folders or a .zip: which there are, what is on them, and how they are decoded.

Classes, labels and the part kept for validation are those that the programs give to the same path.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zipfile
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from . import BadInput
from .files import one_line

SPLITS = ("train", "val")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
LARGEST_FILE = 64 << 20  # bytes; a photograph of 90 megapixels takes about 40 MB
# Where images are split: PREFIX/SPLIT/CLASS or SPLIT/CLASS; Kaggle's ImageNet-100 has train.X1 to train.X4.
SPLIT_CLASS = re.compile(
    r"(?:([^/]+)/)?(train(?:ing)?|val(?:id|idation)?|test(?:ing)?)(?:\.X[^/]*)?/([^/]+)", re.I
)
Classes = dict[str, list[str]]  # a class -> its image files, named from the root


def list_names(root: Path) -> list[str]:
    """Names in a .zip, or in a folder, three deep (links are followed); those of folders end in "/"."""
    if not root.is_dir():
        with zipfile.ZipFile(root) as archive:
            return archive.namelist()
    names, errors = [], []
    for folder, folders, files in os.walk(root, onerror=errors.append, followlinks=True):
        above = Path(folder).relative_to(root).parts
        names += ["/".join((*above, name)) for name in files]
        names += ["/".join((*above, name, "")) for name in folders]
        if len(above) == 3:
            folders.clear()
    if errors:
        raise errors[0]
    return names


def find_classes(path: Path, val_fraction: float) -> tuple[str, dict[str, Classes]]:
    """The folder below `path` in which the data lies, and {split: {class: files}}. Raises BadInput."""
    folders: dict[str, set[str]] = defaultdict(set)
    try:
        names = list_names(path)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise BadInput(
            f"{path}: expected a folder or a whole .zip ({one_line(error)}); correct it"
        ) from error
    for name in names:
        *above, file = name.split("/")
        if not any(part.startswith((".", "__MACOSX")) for part in (*above, file)):
            for depth in range(1, len(above) + 1):
                folders["/".join(above[:depth])]  # there, perhaps without an image
            if file.lower().endswith(SUFFIXES):
                folders["/".join(above)].add(name)
    trees: dict[str, dict[str, Classes]] = defaultdict(lambda: defaultdict(dict))
    plain: dict[str, Classes] = defaultdict(dict)
    for folder, images in sorted(folders.items()):
        if found := SPLIT_CLASS.fullmatch(folder):
            classes = trees[found[1] or ""][found[2].lower()[:3]]
            classes.setdefault(found[3], []).extend(sorted(images))
        prefix, _, key = folder.rpartition("/")
        plain[prefix][key] = sorted(images)
    for prefix, tree in sorted(trees.items()):
        if tree["tra"] and (val := tree["val"] or tree["tes"]):
            return prefix, {"train": tree["tra"], "val": val}
    shallow = [prefix for prefix in sorted(plain) if "/" not in prefix]
    holding = [prefix for prefix in shallow if sum(map(bool, plain[prefix].values())) >= 2]
    if not holding or (holding[0] and len(holding) > 1):
        found = f"class folders in each of {', '.join(holding[:5])}" if holding else "no known form of data"
        raise BadInput(
            f"{path}: {found}, expected train/<class>/ with val/<class>/ or test/<class>/, one folder for "
            "each of two or more classes, or Kaggle's train.X1 and so on with val.X; correct it"
        )
    return holding[0], divide(plain[holding[0]], val_fraction)


def divide(classes: Classes, fraction: float) -> dict[str, Classes]:
    """Set a fraction of every class aside, evenly spread: the first image always, the second never."""
    if not 0 < fraction < 1:
        raise BadInput(f"--val-fraction {fraction}: expected a fraction in (0, 1); 0.2 keeps a fifth")
    splits: dict[str, Classes] = {split: {key: [] for key in classes} for split in SPLITS}
    share = round(1000 * fraction)
    for key, names in classes.items():
        for place, name in enumerate(names):
            splits["val" if place * share % 1000 < share else "train"][key].append(name)
    return splits


class Images:
    """A data set of image files: `keys`, the class folders (label i is keys[i]); `classes`, names for people;
    `names` and `labels` (int64 [N]) of the samples of each split, in training's order."""

    def __init__(self, path: Path, val_fraction: float = 0.2):
        """Find the images. Raises BadInput where there are none, or too few for two classes and splits."""
        prefix, splits = find_classes(path, val_fraction)
        self.path, self.keys = path, sorted(splits["train"])
        self.archive = None if path.is_dir() else zipfile.ZipFile(path)
        if odd := sorted(splits["train"].keys() ^ splits["val"].keys()):
            raise BadInput(f"{path}: class {', '.join(odd[:5])} in only one of train and val; mend that")
        if len(self.keys) < 2:
            raise BadInput(f"{path}: the only class is {self.keys[0]}, expected two or more; add folders")
        for split, classes in splits.items():
            if empty := [key for key in self.keys if not classes[key]]:
                raise BadInput(f"{path}: class {empty[0]} has no image for {split}; add some or remove it")
        self.names, self.labels = {}, {}
        for split in SPLITS:
            counts = [len(splits[split][key]) for key in self.keys]
            self.names[split] = [name for key in self.keys for name in splits[split][key]]
            self.labels[split] = np.repeat(np.arange(len(self.keys)), counts)
        self.classes = self.titles(f"{prefix}/Labels.json".removeprefix("/"))

    def titles(self, name: str) -> list[str]:
        """The classes' names: from Kaggle's Labels.json, {folder: "name, synonym, ..."}, or the folders'."""
        try:
            table = json.loads(self.content(name))
            titles = [table.get(key, "").partition(",")[0].strip() or key for key in self.keys]
        except (FileNotFoundError, KeyError):
            return self.keys
        except (ValueError, AttributeError) as error:
            problem = one_line(error)
            raise BadInput(f"{self.path / name}: expected {{folder: name}} in JSON ({problem})") from error
        pairs = zip(self.keys, titles, strict=True)  # of equal ones (two cranes) each gets its key too
        return [f"{title} ({key})" if titles.count(title) > 1 else title for key, title in pairs]

    def __len__(self) -> int:
        return sum(map(len, self.names.values()))

    def counts(self, labels: np.ndarray) -> dict[str, int]:
        """How many of `labels` each class has."""
        return dict(zip(self.keys, np.bincount(labels, minlength=len(self.keys)).tolist(), strict=True))

    def content(self, name: str) -> bytes:
        """One whole file. What is damaged, missing or too large may raise anything."""
        file = self.path / name
        size = self.archive.getinfo(name).file_size if self.archive else file.stat().st_size
        if size > LARGEST_FILE:
            raise ValueError(f"{size:,} bytes, more than {LARGEST_FILE:,}")
        return self.archive.read(name) if self.archive else file.read_bytes()

    def fingerprint(self) -> str:
        """A digest of names, order, sizes and times of the files: another, and it is another source."""
        parts: list[object] = [self.classes, self.names]
        files = [self.path / name for names in self.names.values() for name in names]
        for file in [self.path] if self.archive else files:
            with suppress(OSError):  # unreadable, and counted as such
                parts.append((file.stat().st_size, file.stat().st_mtime_ns))
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def decode(content: bytes, side: int) -> tuple[np.ndarray, int]:
    """The centre square, uint8 [side, side, 3], and the picture's shorter side in pixels.

    All of the file is decoded. What is damaged may raise anything.
    """
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    pixels = min(image.size)
    image.draft(None, (side, side))  # a JPEG at a half, a quarter or an eighth, where that is large enough
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would cut off at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    short = min(image.size)
    left, top = (image.width - short) / 2, (image.height - short) / 2
    box = (left, top, left + short, top + short)
    return np.asarray(image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR, box=box)), pixels
