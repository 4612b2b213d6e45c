"""Fetch, make, check and pack the data sets that the programs train on.

    python -m data_setup cifar10 fetch                        # 170 MB; resumes, and checks its md5
    python -m data_setup imagenet100 make --from ILSVRC --classes cmc --to data/imagenet100
    python -m data_setup imagenet100 check data/imagenet100   # damaged images, copies, leakage into val
    python -m data_setup imagenet100 pack data/imagenet100 --to data/packed --side 256
    python -m data_setup folder check my_photographs.zip --json

Exit status: 0 done, and clean; 1 `check` found problems; 2 bad input; 130 after Ctrl-C. What was stopped
goes on with the same command, and nothing that exists is overwritten without --force. SET --help and
SET COMMAND --help show more.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from . import VERSION, BadInput, programs
from .files import cores, refuse_inside

RAW = argparse.RawDescriptionHelpFormatter

FETCH = """Download cifar-10-python.tar.gz (170 MB); goes on where it stopped.

    python -m data_setup cifar10 fetch
    python -m data_setup cifar10 fetch --to /data

All mirrors are asked at once, slow ones left for the next; the published md5 decides.
"""
MAKE = """Build train/<wnid>/ and val/<wnid>/ from ILSVRC-2012.

    python -m data_setup imagenet100 make --from ILSVRC --classes cmc --to data/imagenet100
    python -m data_setup imagenet100 make --from ILSVRC --classes mine.txt --to data/mine --how symlink

You must have ILSVRC-2012; it may not be passed on. What --from may hold:
  training images    train/<wnid>/*.JPEG, or train/<wnid>.tar, or ILSVRC2012_img_train.tar
  validation images  val/<wnid>/*.JPEG; or, with --val-labels, val/ILSVRC2012_val_*.JPEG or
                     ILSVRC2012_img_val.tar
The same below ILSVRC2012/, Data/CLS-LOC/ or ILSVRC/Data/CLS-LOC/ (as in Kaggle's competition data).

--classes must be given, since data sets of different classes go by the name ImageNet-100:
  cmc   the list of "Contrastive Multiview Coding", which most papers use (data_setup/imagenet100_cmc.txt)
  FILE  a text file with a wnid a line, what follows it is ignored; or a Labels.json {wnid: name}, such as the
        one in Kaggle's ambityga/imagenet100, whose classes are others

--val-labels: lines of `filename wnid`; Kaggle's LOC_val_solution.csv will do. Not accepted: the devkit's
ILSVRC2012_validation_ground_truth.txt, since its numbers are no wnids.
"""
CHECK = """Read and decode every image, and tell what is wrong.

    python -m data_setup {set} check {path}
    python -m data_setup {set} check {path} --json > report.json

Tells counts, sizes, damaged images, exact copies, copies in both train and val, and copies under different
classes{expected}. Exit status 1 if there are problems. Damage in the middle of a JPEG that the decoder
can hide is not found.
"""
PACK = """Decode every image once, into arrays that training maps.

    python -m data_setup {set} pack {path} --to packed --side {side}

The short side is resized to SIDE and the centre cut out. Writes train_images.npy, train_labels.npy,
val_images.npy, val_labels.npy, classes.json, and manifest.json with sources and checksums. Goes on where it
was stopped, by whatever. Up to 1 % unreadable images are left out and listed.
"""


@dataclass
class DataSet:
    """What the command line says about one kind of data."""

    title: str
    forms: str  # of the PATH
    example: str
    side: int  # pixels
    own: dict[str, str] = field(default_factory=dict)  # commands of its own, and their text
    expected: str = ""


SETS = {
    "cifar10": DataSet(
        "CIFAR-10",
        "cifar-10-python.tar.gz, cifar-10-batches-py, or image folders (default: data, as for fetch)",
        "data/cifar-10-python.tar.gz",
        32,
        {"fetch": FETCH},
        ", and counts that are not CIFAR-10's (10 classes of 5,000 and 1,000 images)",
    ),
    "imagenet100": DataSet(
        "ImageNet-100",
        "train/<wnid>/ and val/<wnid>/, or Kaggle's ambityga/imagenet100; folder or .zip; or packed arrays",
        "data/imagenet100",
        256,
        {"make": MAKE},
        ", and counts that are not ILSVRC-2012's (732 to 1,300 and 50 images a class)",
    ),
    "folder": DataSet(
        "any images in class folders",
        "train/<class>/ and val/<class>/, or a folder for each class; a folder or a .zip; or packed arrays",
        "photographs",
        256,
    ),
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m data_setup", description=__doc__, formatter_class=RAW)
    parser.add_argument("--version", action="version", version=f"data_setup {VERSION}")
    sets = parser.add_subparsers(dest="set", metavar="SET", required=True)
    for name, data in SETS.items():
        words = {"set": name, "path": data.example, "side": data.side, "expected": data.expected}
        texts = data.own | {"check": CHECK.format(**words), "pack": PACK.format(**words)}
        examples = [
            line for text in texts.values() for line in text.splitlines() if line.startswith("    py")
        ]
        about = "\n".join([f"{data.title}.\n", *examples])
        one = sets.add_parser(name, help=data.title, description=about, formatter_class=RAW)
        commands = one.add_subparsers(dest="command", metavar="COMMAND", required=True)
        for command, text in texts.items():
            title = text.partition("\n")[0]
            sub = commands.add_parser(command, help=title, description=text, formatter_class=RAW)
            flags, run = COMMANDS[command]
            sub.set_defaults(run=run)
            flags(sub, name)
            sub.add_argument("--json", action="store_true", help="print one JSON object, for a program")
    return parser


def fetch_flags(parser: argparse.ArgumentParser, _: str) -> None:
    parser.add_argument("--to", type=Path, default=Path("data"), metavar="DIR", help="folder (default: data)")
    force_flag(parser)


def make_flags(parser: argparse.ArgumentParser, _: str) -> None:
    parser.add_argument("--from", dest="source", type=Path, required=True, metavar="ILSVRC", help="see above")
    parser.add_argument("--classes", required=True, metavar="FILE", help="cmc, or a file; see above")
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder to make it in")
    default = "val_labels.txt or LOC_val_solution.csv in ILSVRC"
    parser.add_argument("--val-labels", type=Path, metavar="FILE", help=f"see above (default: {default})")
    ways = ("copy", "hardlink", "symlink")
    parser.add_argument("--how", choices=ways, default="copy", help="for single files (default: copy)")
    force_flag(parser)
    workers_flag(parser)


def check_flags(parser: argparse.ArgumentParser, name: str) -> None:
    path_flags(parser, name)
    workers_flag(parser)


def pack_flags(parser: argparse.ArgumentParser, name: str) -> None:
    path_flags(parser, name)
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="folder for the arrays")
    parser.add_argument(
        "--side", type=int, default=SETS[name].side, help=f"pixels (default: {SETS[name].side})"
    )
    force_flag(parser)
    workers_flag(parser)


def path_flags(parser: argparse.ArgumentParser, name: str) -> None:
    optional = {"nargs": "?", "default": Path("data")} if name == "cifar10" else {}
    parser.add_argument("path", type=Path, metavar="PATH", help=SETS[name].forms, **optional)
    if name == "folder":
        help_text = "of each class, for validation, where there is no folder for it (default: 0.2)"
        parser.add_argument("--val-fraction", type=float, default=0.2, metavar="F", help=help_text)


def force_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="replace what is there")


def workers_flag(parser: argparse.ArgumentParser) -> None:
    text = f"threads (default: one a core, {cores()})"
    parser.add_argument("--workers", type=int, default=cores(), metavar="N", help=text)


def say(text: str) -> None:
    """Tell what matters meanwhile; results alone go to standard output."""
    print(text, file=sys.stderr, flush=True)


def run_fetch(options: argparse.Namespace) -> tuple[dict, str, int]:
    from .fetch import fetch

    report = fetch(options.to.expanduser(), options.force, say)
    state = "downloaded" if report["downloaded"] else "already there"
    return report, f"{report['path']}: {state}, {report['bytes']:,} bytes, md5 as published", 0


def run_make(options: argparse.Namespace) -> tuple[dict, str, int]:
    from .make import CMC, make, read_classes, summary

    target = options.to.expanduser()
    classes = read_classes(CMC if options.classes == "cmc" else Path(options.classes).expanduser())
    labels = options.val_labels.expanduser() if options.val_labels else None
    source = options.source.expanduser()
    report = make(source, classes, target, labels, options.how, workers(options), options.force, say)
    return report, summary(report), 0


def run_check(options: argparse.Namespace) -> tuple[dict, str, int]:
    from .check import Expected, check, summary
    from .make import TRAIN_IMAGES, VAL_IMAGES

    expected = None
    if options.set == "cifar10":
        names = tuple(programs.cifar10().CIFAR10_CLASSES)
        expected = Expected("CIFAR-10", 10, (5000, 5000), (1000, 1000), names)
    elif options.set == "imagenet100":
        expected = Expected("ImageNet-100", 100, TRAIN_IMAGES, VAL_IMAGES)
    source = open_source(options)
    try:
        report = check(source, expected, workers(options))
    finally:
        source.close()
    return report, summary(report), 1 if report["problems"] else 0


def run_pack(options: argparse.Namespace) -> tuple[dict, str, int]:
    from .pack import LARGEST_SIDE, pack

    if not 1 <= options.side <= LARGEST_SIDE:
        raise BadInput(
            f"--side {options.side}: expected 1 to {LARGEST_SIDE} pixels; 256 suits training at 224"
        )
    target = options.to.expanduser()
    source = open_source(options)
    try:
        refuse_inside(target, source.path)
        manifest = pack(source, target, options.side, workers(options), options.force, say)
    finally:
        source.close()
    images = " and ".join(f"{count:,} {split}" for split, count in manifest["images"].items())
    lines = [f"{target}: {images} images of {len(manifest['keys'])} classes at {manifest['side']} pixels"]
    lines += [f"  left out: {item['file']} ({item['reason']})" for item in manifest["unreadable"][:5]]
    if (more := len(manifest["unreadable"]) - 5) > 0:
        lines.append(f"  … and {more} more, listed in manifest.json")
    lines.append(f"train on it: --data {target}")
    return {"path": str(target), **manifest}, "\n".join(lines), 0


def open_source(options: argparse.Namespace):
    from .sources import open_cifar10, open_folder

    opener: Callable = open_cifar10 if options.set == "cifar10" else open_folder
    return opener(options.path.expanduser(), getattr(options, "val_fraction", 0.2))


def workers(options: argparse.Namespace) -> int:
    if not 1 <= options.workers <= 1024:
        raise BadInput(
            f"--workers {options.workers}: expected 1 to 1024 threads; leave it out for one a core"
        )
    return options.workers


COMMANDS = {
    "fetch": (fetch_flags, run_fetch),
    "make": (make_flags, run_make),
    "check": (check_flags, run_check),
    "pack": (pack_flags, run_pack),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = make_parser().parse_args(arguments)
    try:
        report, text, status = options.run(options)
        print(json.dumps(report) if options.json else text, flush=True)
        return status
    except programs.refusals() as error:
        if options.json:
            print(json.dumps({"error": str(error)}))
        say(f"data_setup: {error}")
        return 2
    except KeyboardInterrupt:
        again = "" if options.command == "check" else "; the same command goes on where it stopped"
        say(f"data_setup: stopped{again}")
        return 130
    except BrokenPipeError:  # `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # names of files may be no text at all
        stream.reconfigure(errors="backslashreplace")
    sys.exit(main())
