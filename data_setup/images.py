"""Image files in class folders or a .zip: which there are, what is on them, and how they are decoded.

Classes, labels and the part kept for validation are those that the programs give to the same path.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import math
import os
import re
import zipfile
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from . import BadInput, printable
from .files import one_line

SPLITS = ("train", "val")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
SUFFIXES = {suffix: form for suffix, form in Image.registered_extensions().items() if form in FORMATS}
READ = sorted(set(SUFFIXES.values()))  # the formats that this Pillow has
LARGEST_FILE = 64 << 20  # bytes; a photograph of 90 megapixels takes about 40 MB
SPLIT = r"(train|training|val|valid|validation|test|testing)(?:\.X[^/]*|_images)?/"  # Kaggle's has train.X1
LAYOUT = re.compile(rf"((?:[^/]+/)*?)(?:{SPLIT})+([^/]+)/.*", re.I)  # folder of the set, split, class
TABLE = re.compile(r"(?:^|[/\\])(train|labels|val|valid|validation|test)\.csv$", re.I)
CLASS = re.compile("label|class|categor|target|species|breed", re.I)  # names of a column of classes
Classes = dict[str, list[str]]  # a class -> its image files, named from the root
Folders = dict[str, list[str]]  # a folder, "" or "a/b/" -> files that lie in it itself


def list_names(root: Path) -> list[str]:
    """Files in a .zip, or in a folder (links are followed), sorted. Raises BadInput."""
    names, errors, above = [], [], {str(root): ()}
    try:
        if not root.is_dir():
            if root.exists() and not root.is_file():
                raise ValueError("a pipe, a socket or a device")
            with zipfile.ZipFile(root) as archive:
                return sorted(archive.namelist())
        for place, folders, files in os.walk(root, onerror=errors.append, followlinks=True):
            way = *above.pop(place), os.path.realpath(place)
            if way[-1] in way[:-1]:  # a link led back
                folders.clear()
                continue
            above |= {os.path.join(place, folder): way for folder in folders}
            parts = Path(place).relative_to(root).parts
            names += ["/".join((*parts, name)) for name in files]
        if errors:
            raise errors[0]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        problem = f"expected a folder or a whole .zip ({one_line(error)})"
        raise BadInput(f"{root}: {problem}; correct it, or unpack another archive") from error
    return sorted(names)


def find_layout(path: Path, names: list[str], fraction: float) -> tuple[dict[str, Classes], list[str]]:
    """{split: {class: files}} of the files below a path, and what to tell of it. Raises BadInput."""
    images, others, told = defaultdict(list), defaultdict(list), []
    for name in names:
        *parts, file = name.replace("\\", "/").split("/")  # Windows writes such .zips
        if not any(part[:1] in ("", ".") or part in ("__MACOSX", "Labels.json") for part in (*parts, file)):
            known = os.path.splitext(file)[1].lower() in SUFFIXES
            (images if known else others)["".join(f"{part}/" for part in parts)].append(name)
    train, val = find_classes(path, images, others)
    if not val:
        told = [f"no validation images in class folders: {fraction:.0%} of each class are kept for it"]
        train, val = divide(train, fraction).values()
    if alone := ", ".join(sorted(train.keys() ^ val.keys())):
        raise BadInput(
            f"{path}: only in train or only in val: {alone[:300]}; expected each in both; add "
            f"images, or name train's folder alone, of which {fraction:.0%} are then kept for validation"
        )
    classes = sorted(train)
    splits = {"train": {key: train[key] for key in classes}, "val": {key: val[key] for key in classes}}
    used = {name for part in splits.values() for files in part.values() for name in files}
    if left := left_out(images, others, used):
        told.append(f"left out: {left}")
    return splits, told


def find_classes(path: Path, images: Folders, others: Folders) -> tuple[Classes, Classes]:
    """{class: files} to train and to validate on, the second {} where none has classes. Raises BadInput."""
    sets = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))  # of a folder, a split, a class
    ranked = defaultdict(list)
    for folder, files in images.items():
        if match := LAYOUT.fullmatch(folder):
            sets[match[1]][match[2][:2].lower()][match[3]] += files
        for part in re.finditer("[^/]+/", folder):
            if folder[: part.end()] in images:
                sets[folder[: part.start()]][""][part[0][:-1]] += files
    for folder, found in sets.items():
        train, depth = found["tr"], folder.count("/")
        val = next((found[split] for split in ("va", "te") if found[split].keys() & train.keys()), {})
        many = {label: files for label, files in (train or found[""]).items() if len(files) > 1}
        if val and len(train.keys() | val.keys()) > 1:
            ranked[0, depth].append((folder, train, val))
        elif len(many) > 1 and not all(re.fullmatch(SPLIT, f"{label}/", re.I) for label in many):
            ranked[0 if train else 1, depth].append((folder, many, {}))
    tops = ranked[min(ranked)] if ranked else read_tables(path, images, others)
    if len(tops) != 1:
        found = ", ".join(top[0] for top in tops) or left_out(images, others, set()) or "no files"
        raise BadInput(
            f"{path}: expected one set of two or more classes, train/<class>/ with val/<class>/ or "
            f"test/<class>/, or a folder for each, or train.csv of files and their label; found "
            f"{found[:300]}; name the folder of one set"
        )
    return tops[0][1:]


def read_tables(path: Path, images: Folders, others: Folders) -> list[tuple]:
    """[(folder, train, val)] of the topmost train.csv, or labels.csv, and val.csv or test.csv; [] if none."""
    for folder in sorted(others, key=lambda folder: folder.count("/")):
        tables = {match[1][:2].lower(): name for name in others[folder] if (match := TABLE.search(name))}
        found = {split: read_table(path, name, images) for split, name in tables.items()}
        train = found.get("tr", found.get("la", {}))
        val = next((found[s] for s in ("va", "te") if s in found and found[s].keys() == train.keys()), {})
        train = {label: files for label, files in train.items() if val or len(files) > 1}
        if len(train) > 1:
            others[folder] = [name for name in others[folder] if name not in tables.values()]
            return [(folder, train, val)]
    return []


def read_table(path: Path, table: str, images: Folders) -> Classes:
    """{class: files} of a .csv; {} where no column names images, or none is known to hold classes."""
    raw = (path / table).read_bytes() if path.is_dir() else zipfile.ZipFile(path).read(table)
    text = io.StringIO(raw.decode("utf-8-sig", "backslashreplace"), newline="")
    try:
        lines = [[cell.strip() for cell in line] for line in csv.reader(text) if line] or [[""]]
    except csv.Error as error:
        raise BadInput(f"{path / table}: {one_line(error)}; expected a table; mend a copy") from error
    head, rows = lines[0], [line for line in lines[1:] if len(line) == len(lines[0])]
    home, split = re.fullmatch("(.*/)?(.*)", table[:-4].replace("\\", "/")).groups("")
    names = {name.replace("\\", "/"): name for files in images.values() for name in files}
    known, classes = {os.path.splitext(name)[0]: names[name] for name in names} | names, defaultdict(list)
    folders = "", f"{split}/", f"{split}_images/", "images/", "train/", "train_images/"
    columns = itertools.product(range(len(head)), [home + folder for folder in folders])
    column, place = max(columns, key=lambda at: sum(at[1] + row[at[0]] in known for row in rows))
    label = class_column([name for name in head if name != head[column]])
    for row in rows if label else ():
        file, value = known.pop(place + row[column], None), row[head.index(label)]
        if file and value:
            classes[value].append(file)
    return classes


def class_column(names: list[str]) -> str | None:
    """Which column holds classes: by its name, or the only one."""
    return next(filter(CLASS.search, names), names[0] if len(names) == 1 else None)


def divide(classes: Classes, fraction: float) -> dict[str, Classes]:
    """Sets a fraction of every class aside, evenly spread: the first image always, the second never."""
    if not 0 < fraction < 1:
        raise BadInput(f"--val-fraction {fraction}: expected a fraction in (0, 1); 0.2 keeps a fifth")
    splits: dict[str, Classes] = {"train": {}, "val": {}}
    share = round(1000 * fraction)
    for label, files in classes.items():
        for place, name in enumerate(files):
            split = "val" if place * share % 1000 < share else "train"
            splits[split].setdefault(label, []).append(name)
    return splits


def left_out(images: Folders, others: Folders, used: set[str]) -> str:
    """Counts what is not used: images by folder, other files by suffix."""
    counts = Counter()
    for folder, files in images.items():
        counts[f"images in {folder or 'no folder'}"] = sum(name not in used for name in files)
    for folder in filter(None, others):
        counts.update(os.path.splitext(name)[1].lower() or "without suffix" for name in others[folder])
    parts = [f"{count:,} {what}" for what, count in (+counts).most_common()]
    return ", ".join(parts[:8] + ["..."] * (len(parts) > 8))


class Images:
    """A data set of image files: `keys`, the class folders (label i is keys[i]); `classes`, names for people;
    `names` and `labels` (int64 [N]) of the samples of each split, in training's order; `told`, to be told."""

    def __init__(self, path: Path, val_fraction: float = 0.2, workers: int = 0):
        """Find the images. Raises BadInput where there are none, or too few for two classes and splits."""
        names = list_names(path)
        splits, self.told = find_layout(path, names, val_fraction)
        self.keys = [printable(key) for key in splits["train"]]
        self.path, self.workers = path, workers
        self.archive = None if path.is_dir() else zipfile.ZipFile(path)
        self.names, self.labels = {}, {}
        for split, classes in splits.items():
            self.names[split] = [name for files in classes.values() for name in files]
            counts = [len(files) for files in classes.values()]
            self.labels[split] = np.repeat(np.arange(len(self.keys)), counts)
        tables = [name for name in names if name.endswith("Labels.json")]
        self.classes = self.titles(tables[0]) if tables else self.keys

    def titles(self, name: str) -> list[str]:
        """The classes' names, from Kaggle's Labels.json, {folder: "name, synonym, ..."}."""
        try:
            table = json.loads(self.content(name))
            titles = [printable(table.get(key, key).partition(",")[0]) for key in self.keys]
        except Exception as error:  # a damaged file can break a decoder in any way
            found = one_line(error)
            raise BadInput(f"{self.path / name}: expected {{folder: name}} in JSON ({found})") from error
        pairs, counts = zip(self.keys, titles, strict=True), Counter(titles)
        return [f"{title} ({key})" if counts[title] > 1 else title for key, title in pairs]  # two cranes

    def __len__(self) -> int:
        return sum(map(len, self.names.values()))

    def counts(self, labels: np.ndarray) -> dict[str, int]:
        """How many of `labels` each class has."""
        return dict(zip(self.keys, np.bincount(labels, minlength=len(self.keys)).tolist(), strict=True))

    def content(self, name: str) -> bytes:
        """One whole file. What is damaged, missing or too large may raise anything."""
        file = self.path / name
        if not self.archive and file.exists() and not file.is_file():  # where a reader may wait for ever
            raise ValueError("a pipe, a socket or a device, not a file")
        size = self.archive.getinfo(name).file_size if self.archive else file.stat().st_size
        if size > LARGEST_FILE:
            raise ValueError(f"{size:,} bytes, more than {LARGEST_FILE:,}")
        return self.archive.read(name) if self.archive else file.read_bytes()

    def median_side(self) -> int:
        """The median shorter side, in pixels, of up to 200 images; 0 where none can be opened."""
        names, sides = self.names["train"], []
        for name in names[:: max(1, len(names) // 200)]:
            with suppress(Exception):  # counted as unreadable later
                sides.append(min(Image.open(io.BytesIO(self.content(name)), formats=READ).size))
        return int(np.median(sides or [0]))

    def fingerprint(self) -> str:
        """A digest of names, order, sizes and times of the files: another, and it is another source."""
        parts: list[object] = [self.classes, self.names]
        files = [self.path / name for names in self.names.values() for name in names]
        for file in [self.path] if self.archive else files:
            with suppress(OSError):  # unreadable, and counted as such
                parts.append((file.stat().st_size, file.stat().st_mtime_ns))
        return hashlib.sha256(repr(parts).encode()).hexdigest()


def decode(content: bytes, side: int) -> tuple[np.ndarray, int, bool]:
    """The centre square, uint8 [side, side, 3], the shorter side in pixels, and whether it is deep grey.

    All of the file is decoded. What is damaged may raise anything.
    """
    image = Image.open(io.BytesIO(content), formats=READ)
    pixels, deep = min(image.size), image.mode[0] in "IF"
    image.draft(None, (side, side))  # a JPEG at a half, a quarter or an eighth, where that is large enough
    image = ImageOps.exif_transpose(image)
    if deep:  # grey, of which often 10 or 12 bits are used; convert() would cut it off at 255
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        values -= min(0, values.min())
        bits = max(0 if image.mode == "F" else 8, math.ceil(math.log2(values.max() or 1)))
        image = Image.fromarray((values * (255 / 2.0**bits)).astype(np.uint8))
    short = min(image.size)
    left, top = (image.width - short) / 2, (image.height - short) / 2
    box = (left, top, left + short, top + short)
    picture = image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR, box=box)
    return np.asarray(picture), pixels, deep
