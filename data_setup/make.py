"""Build ImageNet-100, or any choice of classes, from ILSVRC-2012 as you have it: folders or published tars.

Everything is put into train.part/ and val.part/ first, each file under a temporary name until it is whole;
these two are renamed at the end, and a make that was cut short goes on with what is missing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from . import BadInput
from .archives import LARGEST_IMAGE, members, open_tar
from .files import (
    cannot_write,
    check_room,
    in_order,
    locked,
    one_line,
    refuse_inside,
    sync_folder,
    write_whole,
)

CMC = Path(__file__).with_name("imagenet100_cmc.txt")
WNID = r"n\d{8}"
TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
VAL_NAME = re.compile(r"ILSVRC2012_val_\d{8}\.JPEG")
LABEL_FILES = ("val_labels.txt", "LOC_val_solution.csv")
# Where the tree may begin below the folder that is named; the last two are Kaggle's.
BELOW = ("", "ILSVRC2012", "Data/CLS-LOC", "ILSVRC/Data/CLS-LOC")
TRAIN_IMAGES, VAL_IMAGES = (732, 1300), (50, 50)  # a class, fewest and most, in ILSVRC-2012
JOURNAL = "make.part.json"
SPLITS = ("train", "val")


def read_classes(path: Path) -> dict[str, str]:
    """Read a class list: {wnid: name, "" where there is none}. Raises BadInput.

    A text file with a wnid at the start of each line (what follows, empty lines and # are ignored), or a
    Labels.json as Kaggle's: {wnid: name}.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".json":
            entries = [(str(key), str(name)) for key, name in json.loads(text).items()]
        else:
            lines = [line.strip() for line in text.splitlines()]
            entries = [(line, "") for line in lines if line and not line.startswith("#")]
    except (OSError, ValueError, AttributeError) as error:
        raise BadInput(
            f"--classes {path}: expected a text file with a wnid a line, or {{wnid: name}} in JSON "
            f"({one_line(error)}); correct the path or the file"
        ) from error
    classes: dict[str, str] = {}
    for number, (key, name) in enumerate(entries, 1):
        wnid = re.match(rf"{WNID}\b", key)
        if not wnid or wnid[0] in classes:
            problem = "comes twice" if wnid else "expected a wnid such as n01440764"
            raise BadInput(f"--classes {path}: class {number}, {key[:40]!r}, {problem}; correct the file")
        classes[wnid[0]] = name
    if len(classes) < 2:
        raise BadInput(
            f"--classes {path}: {len(classes)} classes, expected two or more, one a line; add them"
        )
    return classes


def read_labels(path: Path) -> dict[str, str]:
    """Read {name of a validation image: wnid} from lines of `filename wnid`. Raises BadInput.

    A comma may part the two, the name may lack .JPEG, what follows is ignored, and the first line may be a
    heading: so Kaggle's LOC_val_solution.csv does too.
    """
    labels = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise BadInput(
            f"--val-labels {path}: cannot be read ({one_line(error)}); correct the path"
        ) from error
    for number, line in enumerate(lines, 1):
        found = re.match(rf"\s*(?:\S*/)?(ILSVRC2012_val_\d{{8}})(?:\.JPEG)?[\s,]+({WNID})\b", line)
        if found:
            labels[f"{found[1]}.JPEG"] = found[2]
        elif line.strip() and number > 1:
            raise BadInput(
                f"--val-labels {path}: line {number} is {line.strip()[:40]!r}, expected `filename wnid`, as "
                "`ILSVRC2012_val_00000001.JPEG n01751748`; Kaggle's LOC_val_solution.csv is accepted, the "
                "devkit's ILSVRC2012_validation_ground_truth.txt is not, since its numbers are no wnids"
            )
    if not labels:
        raise BadInput(
            f"--val-labels {path}: no line `filename wnid` in it, expected one an image; correct it"
        )
    return labels


@dataclass
class Tar:
    """Images to take out of a tar, perhaps one that lies in another."""

    path: Path
    wanted: Callable[[str], str | None]  # a member's name -> its class, or None
    form: re.Pattern[str]
    inner: tuple[str, ...] = ()  # the tars to open inside it
    size: int = 0  # bytes, at most


@dataclass
class Plan:
    """What goes where: single files, and tars to read."""

    files: list[tuple[Path, str]] = field(default_factory=list)  # source, name below the target
    tars: list[Tar] = field(default_factory=list)


def find_tree(source: Path) -> Path:
    """The folder below `source` that holds train and val, in folders or tars. Raises BadInput."""
    for below in BELOW:
        root = source / below
        if (root / "train").is_dir() or (root / TRAIN_TAR).is_file():
            return root
    problem = "holds neither" if source.is_dir() else "no such folder"
    raise BadInput(
        f"--from {source}: {problem}, expected train/<wnid>/*.JPEG or {TRAIN_TAR}, and val/ or {VAL_TAR}; "
        "name the folder that holds them"
    )


def images_in(folder: Path) -> list[Path]:
    """The .JPEG files in a folder. Raises BadInput where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if e.name.lower().endswith((".jpeg", ".jpg")) and e.is_file()]
    except OSError as error:
        raise BadInput(f"{folder}: cannot be read ({one_line(error)}); check path and permissions") from error
    return [folder / name for name in sorted(names) if not name.startswith(".")]


def plan_train(root: Path, classes: dict[str, str]) -> Plan:
    """Find every class of the training images. Raises BadInput where one is missing."""
    plan, missing = Plan(), []
    for wnid in sorted(classes):
        folder, tar = root / "train" / wnid, root / "train" / f"{wnid}.tar"
        if folder.is_dir():
            plan.files += [(path, f"train/{wnid}/{path.name}") for path in images_in(folder)]
        elif tar.is_file():
            plan.tars.append(train_tar(tar, tar.stat().st_size))
        else:
            missing.append(wnid)
    outer = root / TRAIN_TAR
    if missing and outer.is_file():
        with open_tar(outer) as tar:
            sizes = {m.name: m.size for m in members(outer, tar, re.compile(rf"{WNID}\.tar"), ignore, None)}
        inner = tuple(f"{wnid}.tar" for wnid in missing if f"{wnid}.tar" in sizes)
        missing = [wnid for wnid in missing if f"{wnid}.tar" not in sizes]
        plan.tars.append(train_tar(outer, sum(sizes[name] for name in inner), inner))
    if missing:
        raise BadInput(
            f"--from {root}: no training images of {', '.join(missing[:3])} ({len(missing)} of "
            f"{len(classes)} classes), expected train/<wnid>/, train/<wnid>.tar or {TRAIN_TAR}; add them or "
            "correct --classes"
        )
    return plan


def train_tar(path: Path, size: int, inner: tuple[str, ...] = ()) -> Tar:
    return Tar(path, lambda name: name[:9], re.compile(rf"{WNID}_\d+\.JPEG"), inner, size)


def plan_val(root: Path, classes: dict[str, str], labels: dict[str, str] | None) -> Plan:
    """Find the validation images of every class. Raises BadInput."""
    plan = Plan()
    if all((root / "val" / wnid).is_dir() for wnid in classes):
        for wnid in sorted(classes):
            plan.files += [(path, f"val/{wnid}/{path.name}") for path in images_in(root / "val" / wnid)]
        return plan
    flat = images_in(root / "val") if (root / "val").is_dir() else []
    if not flat and not (root / VAL_TAR).is_file():
        raise BadInput(
            f"--from {root}: no validation images of all classes, expected val/<wnid>/ for each, "
            f"val/ILSVRC2012_val_*.JPEG, or {VAL_TAR}; add them, or correct --classes"
        )
    if labels is None:
        raise BadInput(
            f"--from {root}: its validation images lie in no class folders, expected lines of "
            f"`filename wnid`; give --val-labels FILE, or put it there as {' or '.join(LABEL_FILES)}"
        )

    def wanted(name: str) -> str | None:
        return labels[name] if labels.get(name) in classes else None

    if flat:
        plan.files += [(path, f"val/{wanted(path.name)}/{path.name}") for path in flat if wanted(path.name)]
    else:
        count = sum(wnid in classes for wnid in labels.values())
        share = count / 50_000 * (root / VAL_TAR).stat().st_size
        plan.tars.append(Tar(root / VAL_TAR, wanted, VAL_NAME, (), int(1.2 * share)))
    return plan


def ignore(_: str) -> None:
    """For a first look; the second one tells what was passed by."""


def make(
    source: Path,
    classes: dict[str, str],
    target: Path,
    labels: Path | None,
    how: str,
    workers: int,
    force: bool,
    say: Callable[[str], None],
) -> dict:
    """Put `classes` of `source` into `target`; `how` is copy, hardlink or symlink. Returns the report.

    Goes on where an earlier make of the same stopped. Raises BadInput.
    """
    root = find_tree(source)
    refuse_inside(target, root / "train", root / "val")
    if os.path.realpath(target) == os.path.realpath(root):  # --force would replace all by a part of it
        refuse_inside(target, root)
    nearby = [path / name for path in (root, source) for name in LABEL_FILES]
    labels = labels or next((path for path in nearby if path.is_file()), None)
    plans = {
        "train": plan_train(root, classes),
        "val": plan_val(root, classes, read_labels(labels) if labels else None),
    }
    identity = {
        "source": os.path.abspath(root),
        "classes": sorted(classes),
        "labels": os.path.abspath(labels) if labels else None,
        "how": how,
    }
    skipped: list[str] = []
    with locked(target):
        try:
            if not begin(target, identity, force):
                skipped = fill(plans, target, how, workers, say)
                refuse_if_empty(target, classes, source)
                write_names(target / "Labels.json", classes)
                getattr(os, "sync", int)()  # once, since for every file it would take hours; Windows has none
                write_whole(target / JOURNAL, json.dumps(identity | {"publish": True}).encode())
            publish(target)
        except OSError as error:
            raise cannot_write(Path(error.filename or target), error) from error
    return report(target, classes, skipped)


def write_names(path: Path, classes: dict[str, str]) -> None:
    """Keep the classes' names for people where the list had them; others' would mislead."""
    path.unlink(missing_ok=True)
    if any(classes.values()):
        content = json.dumps({key: name or key for key, name in classes.items()}, indent=1)
        write_whole(path, content.encode() + b"\n")


def begin(target: Path, identity: dict, force: bool) -> bool:
    """Read or write the note on what is being made here; whether it is made, and lacks only its names.

    Raises BadInput where something else is there, and not `force`.
    """
    journal = target / JOURNAL
    if journal.exists():
        try:
            begun = json.loads(journal.read_text(encoding="utf-8"))
        except ValueError:
            begun = {}
        publishing = begun.pop("publish", False)
        changed = [key for key in identity if begun.get(key) != identity[key]]
        if not changed:
            return publishing
        if not force:
            raise BadInput(
                f"--to {target}: holds an unfinished make with another {changed[0]}, expected none or one of "
                "the same; give --force to start anew, or another --to"
            )
    names = (*SPLITS, "Labels.json", *(f"{split}.part" for split in SPLITS))
    there = [name for name in names if (target / name).exists()]
    if there and not force:
        raise BadInput(
            f"--to {target}: holds {there[0]}, expected a folder without it; give --force to replace it, or "
            "another --to"
        )
    for split in SPLITS:
        shutil.rmtree(target / f"{split}.part", ignore_errors=True)
    write_whole(journal, json.dumps(identity).encode())
    return False


def fill(
    plans: dict[str, Plan], target: Path, how: str, workers: int, say: Callable[[str], None]
) -> list[str]:
    """Put everything into train.part/ and val.part/; returns what was passed by in archives, and why."""
    skipped: list[str] = []
    files = [(path, part_name(target, name)) for plan in plans.values() for path, name in plan.files]
    tars = [tar for plan in plans.values() for tar in plan.tars]
    need = sum(tar.size for tar in tars)
    if how == "copy":
        need += sum(path.stat().st_size for path, _ in files)
    have = sum(path.stat().st_size for path in target.glob("*.part/*/*") if not path.is_symlink())
    check_room(target, max(0, need - have), say, f"{len(files):,} files and {len(tars)} tars")
    placed = {place for _, place in files}
    for folder in {place.parent for place in placed}:
        folder.mkdir(parents=True, exist_ok=True)
    with (
        tqdm(total=len(files), desc="images", unit=" images", mininterval=0.5, disable=None) as bar,
        in_order(lambda pair: put(*pair, how), files, workers) as results,
    ):
        for _ in results:
            bar.update()
    with tqdm(desc="images from tars", unit=" images", mininterval=0.5, disable=None) as bar:
        for split, plan in plans.items():
            for tar in plan.tars:
                for wnid, member, content in read_tar(tar, skipped.append):
                    place = part_name(target, f"{split}/{wnid}/{member.name}")
                    placed.add(place)
                    if not whole(place, member.size):
                        place.parent.mkdir(parents=True, exist_ok=True)
                        write_draft(place, content())
                    bar.update()
    for path in target.glob("*.part/*/*"):
        if path not in placed:  # a draft, or what the source no longer holds
            path.unlink()
    return skipped


def part_name(target: Path, name: str) -> Path:
    split, _, rest = name.partition("/")
    return target / f"{split}.part" / rest


def whole(place: Path, size: int) -> bool:
    return place.exists() and place.stat().st_size == size


def put(path: Path, place: Path, how: str) -> None:
    """Copy or link one file. Raises BadInput where it cannot be read, OSError where it cannot be written."""
    if how == "copy":
        try:
            content = None if whole(place, path.stat().st_size) else path.read_bytes()
        except OSError as error:
            raise BadInput(f"{path}: cannot be read ({one_line(error)}); mend or remove it") from error
        if content is not None:
            write_draft(place, content)
    elif not place.exists():
        place.unlink(missing_ok=True)  # a link that leads nowhere
        try:
            (os.link if how == "hardlink" else os.symlink)(path.resolve(), place)
        except OSError as error:
            raise BadInput(
                f"--how {how}: cannot link {place} to {path} ({error.strerror}); try --how copy"
            ) from error


def write_draft(place: Path, content: bytes) -> None:
    draft = place.with_name(f".{place.name}.draft")
    draft.write_bytes(content)
    os.replace(draft, place)


def read_tar(
    tar: Tar, skip: Callable[[str], None]
) -> Iterator[tuple[str, tarfile.TarInfo, Callable[[], bytes]]]:
    """The wanted images: class, member, and how to read it. Raises BadInput where the tar is damaged."""
    with ExitStack() as stack:
        outer = stack.enter_context(open_tar(tar.path))
        if not tar.inner:
            yield from wanted_members(tar, tar.path, outer, skip)
            return
        for member in members(tar.path, outer, re.compile(rf"{WNID}\.tar"), skip, None):
            if member.name in tar.inner:
                path = tar.path / member.name
                with open_tar(path, outer.extractfile(member)) as inner:
                    yield from wanted_members(tar, path, inner, skip)


def wanted_members(
    tar: Tar, path: Path, opened: tarfile.TarFile, skip: Callable[[str], None]
) -> Iterator[tuple[str, tarfile.TarInfo, Callable[[], bytes]]]:
    only = path.name.removesuffix(".tar")
    for member in members(path, opened, tar.form, skip, LARGEST_IMAGE):
        wnid = tar.wanted(member.name)
        if re.fullmatch(WNID, only) and wnid != only:
            skip(f"{path.name}: {member.name} belongs to another class")
        elif wnid:
            yield wnid, member, lambda member=member: read_member(path, opened, member)


def read_member(path: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = tar.extractfile(member).read()
    if len(content) != member.size:
        raise BadInput(f"{path}: ends within {member.name}, expected a whole tar; download it again")
    return content


def count(folder: Path, classes: dict[str, str]) -> dict[str, int]:
    """Images of each class in a folder of class folders."""
    there = {wnid: folder / wnid for wnid in sorted(classes)}
    return {wnid: len(images_in(path)) if path.is_dir() else 0 for wnid, path in there.items()}


def refuse_if_empty(target: Path, classes: dict[str, str], source: Path) -> None:
    for split in SPLITS:
        empty = [wnid for wnid, images in count(target / f"{split}.part", classes).items() if not images]
        if empty:
            raise BadInput(
                f"--from {source}: no {split} image of {empty[0]} ({len(empty)} of {len(classes)} classes "
                "have none), expected one at least; complete it, or correct --classes or --val-labels"
            )


def publish(target: Path) -> None:
    """Give the folders their names; can be done again where it was cut short."""
    for split in SPLITS:
        part, final, old = target / f"{split}.part", target / split, target / f"{split}.old.part"
        if part.exists():
            if final.exists():
                os.replace(final, old)
            os.replace(part, final)
        if old.is_symlink():
            old.unlink()  # what it leads to is not ours
        shutil.rmtree(old, ignore_errors=True)
    sync_folder(target)
    (target / JOURNAL).unlink()


def report(target: Path, classes: dict[str, str], skipped: list[str]) -> dict:
    """What is there now, against what ILSVRC-2012 has."""
    counts = {split: count(target / split, classes) for split in SPLITS}
    expected = {"train": TRAIN_IMAGES, "val": VAL_IMAGES}
    odd = {
        split: [wnid for wnid, number in counts[split].items() if not low <= number <= high]
        for split, (low, high) in expected.items()
    }
    return {
        "path": str(target),
        "classes": len(classes),
        "images": {split: sum(counts[split].values()) for split in SPLITS},
        "counts": counts,
        "expected_per_class": {split: list(expected[split]) for split in SPLITS},
        "unlike_expected": odd,
        "skipped": skipped,
    }


def summary(report: dict) -> str:
    """The report for a person: counts a class beside what ILSVRC-2012 has."""
    lines = [f"{report['path']}: {report['classes']} classes"]
    for split in SPLITS:
        low, high = report["expected_per_class"][split]
        usual = f"{high}" if low == high else f"{low} to {high:,}"
        lines.append(f"  {split}: {report['images'][split]:,} images; ILSVRC-2012 has {usual} a class")
        for number, classes in sorted(Counter(report["counts"][split].values()).items()):
            odd = "" if low <= number <= high else "  <- not as in ILSVRC-2012"
            lines.append(f"    {classes} classes of {number:,}{odd}")
    for text in report["skipped"][:5]:
        lines.append(f"  skipped: {text}")
    if len(report["skipped"]) > 5:
        lines.append(f"  … and {len(report['skipped']) - 5} more skipped")
    return "\n".join(lines)
