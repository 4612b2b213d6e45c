"""Build ImageNet-100, or any choice of classes, from ILSVRC-2012 as you have it: folders or published tars.

Everything is put into make.part/ first, each file under a temporary name until it is whole; train/ and val/
move up at the end, and a make that was cut short goes on with what is missing. Of tars only members are read
whose name is exactly of the publisher's form: absolute paths, "..", links, devices and giants are passed by.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from . import BadInput, files
from .check import overview, unexpected
from .files import one_line
from .images import SPLITS, Images

CMC = Path(__file__).with_name("imagenet100_cmc.txt")
WNID = r"n\d{8}"
TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
LABEL_FILES = ("val_labels.txt", "LOC_val_solution.csv")
# Where the tree may begin below the folder that is named; the last two are Kaggle's.
BELOW = ("", "ILSVRC2012", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")
OUTPUTS = (*SPLITS, "Labels.json")
LARGEST_IMAGE, LARGEST_CLASS = 64 << 20, 4 << 30  # bytes
LINKS = {"hardlink": os.link, "symlink": os.symlink}


def read_classes(path: Path) -> dict[str, str]:
    """Read {wnid: name} from a JSON of that, or from lines that begin with a wnid. Raises BadInput."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            entries = {key: str(name) for key, name in json.loads(text).items()}
        else:
            entries = {line: "" for line in text.splitlines() if line.strip() and not line.startswith("#")}
    except (ValueError, AttributeError) as error:
        raise BadInput(f"--classes {path}: expected wnids in lines or JSON ({one_line(error)})") from error
    wrong = [key for key in entries if not re.match(rf"{WNID}\b", key)]
    classes = {key[:9]: name for key, name in entries.items()}
    if wrong or len(classes) < 2:
        found = repr(wrong[0][:40]) if wrong else f"{len(classes)} classes"
        raise BadInput(f"--classes {path}: {found}, expected two or more, each as n01440764; correct it")
    return classes


def read_labels(path: Path) -> dict[str, str]:
    """Read {name of a validation image: wnid} from lines of `filename wnid`. Raises BadInput.

    A comma may part the two, the name may lack .JPEG, what follows is ignored, and the first line may be a
    heading: so Kaggle's LOC_val_solution.csv does too.
    """
    labels = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig", errors="replace").splitlines(), 1):
        if found := re.match(rf"\s*(?:\S*/)?(ILSVRC2012_val_\d{{8}})(?:\.JPEG)?[\s,]+({WNID})\b", line):
            labels[f"{found[1]}.JPEG"] = found[2]
        elif line.strip() and number > 1:
            raise BadInput(
                f"--val-labels {path}: line {number} is {line.strip()[:40]!r}, expected `filename wnid`, as "
                "in Kaggle's LOC_val_solution.csv; the numbers of the devkit's ground truth are no wnids"
            )
    return labels


def find_tree(source: Path) -> Path:
    """The folder below `source` that holds train and val, in folders or tars. Raises BadInput."""
    for root in (source / below for below in BELOW):
        train, val = root / "train", root / "val"
        if (train.is_dir() or (root / TRAIN_TAR).is_file()) and (val.is_dir() or (root / VAL_TAR).is_file()):
            return root
    problem = "not found in it" if source.is_dir() else "no such folder"
    raise BadInput(
        f"--from {source}: {problem}, expected train/<wnid>/*.JPEG or {TRAIN_TAR}, and val/ or {VAL_TAR}; "
        "name the folder that holds them"
    )


def images_in(folder: Path) -> list[Path]:
    """The .JPEG files in a folder, [] where there is none."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    return [folder / name for name in names if re.fullmatch(r"[^.].*\.jpe?g", name, re.I)]


def find_files(root: Path, classes: dict[str, str], labels: dict[str, str]) -> list[tuple[Path, str]]:
    """Images that lie in no tar, and where each belongs: "train/<wnid>/<name>"."""
    folders = [f"{split}/{wnid}" for split in SPLITS for wnid in sorted(classes)]
    found = [(path, f"{folder}/{path.name}") for folder in folders for path in images_in(root / folder)]
    flat = [(path, labels.get(path.name)) for path in images_in(root / "val")]
    return found + [(path, f"val/{wnid}/{path.name}") for path, wnid in flat if wnid in classes]


@contextmanager
def open_tar(path: Path, file: BinaryIO | None = None) -> Iterator[tarfile.TarFile]:
    """Open a tar that is not compressed; `file` where it lies in another. Raises BadInput if damaged."""
    try:
        with tarfile.open(path, "r:", fileobj=file) as tar:
            yield tar
    except (tarfile.TarError, EOFError) as error:
        raise BadInput(f"{path}: expected a whole, uncompressed tar ({one_line(error)})") from error


def members(tar: tarfile.TarFile, form: str, largest: int) -> Iterator[tarfile.TarInfo]:
    """The plain files in a tar whose whole name is of the given form. Raises ReadError if it is damaged."""
    for member in tar:
        plain = member.isreg() and not member.issparse() and member.size <= largest
        if plain and re.fullmatch(form, member.name):
            yield member
    # Where a header is damaged, tarfile just stops, as if the tar ended there; a whole one ends in zeros.
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no header and no end at byte {tar.offset:,}")


def unpack(path: Path, form: str, place: Callable[[str], Path | None], file: BinaryIO | None = None) -> None:
    """Write images of a tar to where `place(name)` says, None for nowhere. Raises BadInput."""
    with open_tar(path, file) as tar:
        found = tqdm(members(tar, form, LARGEST_IMAGE), path.name, unit=" images", leave=False, disable=None)
        for member in found:
            if target := place(member.name):
                write_image(target, member.size, tar.extractfile(member).read)


def unpack_train(root: Path, wnids: list[str], part: Path) -> None:
    """Unpack classes, each from its own tar, or from the one of all classes."""

    def unpack_class(path: Path, wnid: str, file: BinaryIO | None = None) -> None:
        unpack(path, rf"{wnid}_\d+\.JPEG", (part / "train" / wnid).joinpath, file)

    alone = [wnid for wnid in wnids if (root / "train" / f"{wnid}.tar").is_file()]
    for wnid in alone:
        unpack_class(root / "train" / f"{wnid}.tar", wnid)
    inside, path = set(wnids) - set(alone), root / TRAIN_TAR
    if inside and path.is_file():
        with open_tar(path) as tar:
            for member in members(tar, rf"{WNID}\.tar", LARGEST_CLASS):
                if (wnid := member.name[:9]) in inside:
                    unpack_class(path / member.name, wnid, tar.extractfile(member))


def write_image(place: Path, size: int, read: Callable[[], bytes]) -> None:
    """Write one image, whole or not at all, if it is not there; one sync of all comes later."""
    if place.is_symlink() or not place.exists() or place.stat().st_size != size:
        draft = place.with_name(f".{place.name}.draft")
        draft.write_bytes(read())
        os.replace(draft, place)


def put(path: Path, place: Path, how: str) -> None:
    """Copy or link one file, if it is not there yet. Raises OSError."""
    if how in LINKS:
        if not os.path.lexists(place):
            LINKS[how](path.resolve(), place)
    else:
        write_image(place, path.stat().st_size, path.read_bytes)


def make(source: Path, classes: dict[str, str], target: Path, labels: Path | None, how: str) -> dict:
    """Put `classes` of `source` into `target`; `how` is "copy" or one of LINKS, for files in no tar.

    Returns the report. Goes on where an earlier make stopped. Raises BadInput.
    """
    root, part = find_tree(source), target / "make.part"
    for split in SPLITS:
        files.refuse_inside(target, root / split)
    if not (part / files.PROGRESS).exists():
        files.refuse_existing(target, OUTPUTS)
        nearby = [path / name for path in (root, source) for name in LABEL_FILES]
        labels = labels or next((path for path in nearby if path.is_file()), None)
        fill(root, classes, read_labels(labels) if labels else {}, part, how)
        for split, wnid in ((split, wnid) for split in SPLITS for wnid in sorted(classes)):
            if not images_in(part / split / wnid):
                raise BadInput(
                    f"--from {source}: no {split} image of {wnid}, expected one; complete it, correct "
                    "--classes, or give --val-labels where validation images lie in no class folders"
                )
        files.complete(part, {})
    files.publish(part, OUTPUTS)
    report = overview(Images(target))
    return report | {"problems": unexpected(report, "imagenet100")}


def fill(root: Path, classes: dict[str, str], labels: dict[str, str], part: Path, how: str) -> None:
    """Put all that is still missing into `part`, and take out what has no place there."""
    (part / "Labels.json").unlink(missing_ok=True)
    for folder in part.glob("*/*"):
        if folder.name not in classes:  # of an earlier try with another list
            shutil.rmtree(folder)
    for path in part.glob("val/*/*"):
        if labels.get(path.name, path.parent.name) != path.parent.name:  # or with other labels
            path.unlink()
    for wnid in classes:
        for split in SPLITS:
            (part / split / wnid).mkdir(parents=True, exist_ok=True)
    found = find_files(root, classes, labels)
    copied = files.in_order(lambda pair: put(pair[0], part / pair[1], how), found)
    for _ in tqdm(copied, "images", len(found), unit=" images", mininterval=0.5, disable=None):
        pass
    folders = {name.rpartition("/")[0] for _, name in found}
    unpack_train(root, [wnid for wnid in sorted(classes) if f"train/{wnid}" not in folders], part)
    if (root / VAL_TAR).is_file() and not any(folder.startswith("val/") for folder in folders):
        places = {name: part / "val" / wnid / name for name, wnid in labels.items() if wnid in classes}
        unpack(root / VAL_TAR, r"ILSVRC2012_val_\d{8}\.JPEG", places.get)
    if any(classes.values()):
        files.write_json(part / "Labels.json", {wnid: name or wnid for wnid, name in classes.items()})
