"""Fetch, make, check and pack the data sets that the programs train on.

    python -m data_setup cifar10 fetch                        # 170 MB; resumes, and checks its md5
    python -m data_setup imagenet100 make --from ILSVRC --classes cmc --to data/imagenet100
    python -m data_setup imagenet100 check data/imagenet100   # damaged images, copies, leakage into val
    python -m data_setup imagenet100 pack data/imagenet100 --to data/packed --side 256
    python -m data_setup folder check my_photographs.zip --json

Exit status: 0 done, and clean; 1 `check` found problems; 2 bad input; 130 after Ctrl-C. What was stopped goes
on with the same command, and nothing that exists is overwritten. SET --help and SET COMMAND --help show more.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import warnings
from pathlib import Path

from . import BadInput, check, cifar10, make, pack, printable
from .files import locked
from .images import Images

RAW = argparse.RawDescriptionHelpFormatter
FETCH = """Download cifar-10-python.tar.gz (170 MB); goes on where it stopped.

    python -m data_setup cifar10 fetch --to /data

All mirrors are asked at once, slow ones left for the next; the published md5 decides.
"""
MAKE = """Build train/<wnid>/ and val/<wnid>/ from ILSVRC-2012.

    python -m data_setup imagenet100 make --from ILSVRC --classes cmc --to data/imagenet100

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
CHECK = """Read every image, and tell what is wrong.

    python -m data_setup SET check PATH --json > report.json

Tells counts, sizes, damaged images, exact copies, copies in both train and val, copies under different
classes, and counts that are not those of the data set named. CIFAR-10 as published is known by its md5s.
Exit status 1 if there are problems. Damage in the middle of a JPEG that the decoder can hide is not found.
"""
PACK = """Decode every image once, into arrays that training maps.

    python -m data_setup SET pack PATH --to packed --side 256

The short side is resized to --side and the centre cut out. Writes train_images.npy, train_labels.npy,
val_images.npy, val_labels.npy, classes.json, and manifest.json, which tells of what they were made. Goes on
where it was stopped, by whatever. Up to 1 % unreadable images are left out and listed.
"""
FOLDERS = "class folders in train/ and val/, Kaggle's train.X1 ..., or in one folder; a folder or a .zip"
CIFAR10 = "cifar-10-python.tar.gz, cifar-10-batches-py, or image folders (default: data)"
SETS = {  # title, a path in examples, forms, commands
    "cifar10": ("CIFAR-10", "data", CIFAR10, {"fetch": FETCH, "check": CHECK}),
    "imagenet100": ("ImageNet-100", "imagenet100", FOLDERS, {"make": MAKE, "check": CHECK, "pack": PACK}),
    "folder": ("any images in class folders", "photographs", FOLDERS, {"check": CHECK, "pack": PACK}),
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m data_setup", description=__doc__, formatter_class=RAW)
    sets = parser.add_subparsers(dest="set", metavar="SET", required=True)
    for name, (title, path, forms, commands) in SETS.items():
        texts = {key: text.replace("SET", name).replace("PATH", path) for key, text in commands.items()}
        about = f"{title}.\n\n" + "\n".join(text.splitlines()[2] for text in texts.values())
        one = sets.add_parser(name, help=title, description=about, formatter_class=RAW)
        subs = one.add_subparsers(dest="command", metavar="COMMAND", required=True)
        for command, text in texts.items():
            first = text.partition("\n")[0]
            flags = subs.add_parser(command, help=first, description=text, formatter_class=RAW).add_argument
            if command == "fetch":
                flags("--to", type=Path, default=Path("data"), metavar="DIR", help="folder (default: data)")
            elif command == "make":
                flags("--from", dest="source", type=Path, required=True, metavar="ILSVRC", help="see above")
                flags("--classes", required=True, metavar="FILE", help="cmc, or a file; see above")
                nearby = "see above (default: val_labels.txt or LOC_val_solution.csv in ILSVRC)"
                flags("--val-labels", type=Path, metavar="FILE", help=nearby)
                how = "for images that lie in no tar (default: copy)"
                flags("--how", choices=("copy", *make.LINKS), default="copy", help=how)
            else:
                default = {"nargs": "?", "default": Path("data")} if name == "cifar10" else {}
                flags("path", type=Path, metavar="PATH", help=forms, **default)
                fraction = "of each class, for validation, where there is no folder for it (default: 0.2)"
                flags("--val-fraction", type=float, default=0.2, metavar="F", help=fraction)
                flags("--workers", type=int, default=0, help="threads (default: four more than cores)")
            if command in ("make", "pack"):
                flags("--to", type=Path, required=True, metavar="DIR", help="folder to put it in")
            if command == "pack":
                flags("--side", type=int, default=256, help="pixels (default: 256)")
                flags("--enlarge", action="store_true", help="also where --side is above the images' own")
            flags("--json", action="store_true", help="print one JSON object, for a program")
    return parser


def say(text: str) -> None:
    """Tell what matters meanwhile, in a line; results alone go to standard output."""
    print(printable(text), file=sys.stderr, flush=True)


def run(options: argparse.Namespace) -> tuple[dict, str]:
    """Run the command; returns its report, and the same for a person."""
    program = "cifar10_ast" if options.set == "cifar10" else "imagenet100_ast"
    train = f"train on it: python standalone/{program}.py --data "
    source = [getattr(options, name, None) for name in ("path", "val_fraction", "workers")]
    if options.command == "check":
        report = cifar10.check_published(options.path) if options.set == "cifar10" else None
        report = report or check.check(Images(*source), options.set)
        return report, f"{check.summary(report)}\n{train}{printable(shlex.quote(str(options.path)))}"
    with locked(options.to):
        if options.command == "fetch":
            report = cifar10.fetch(options.to, say)
            return report, f"{report['path']}: {report['bytes']:,} bytes, md5 as published"
        if options.command == "make":
            classes = make.read_classes(make.CMC if options.classes == "cmc" else Path(options.classes))
            report = make.make(options.source, classes, options.to, options.val_labels, options.how)
            return report, check.summary(report)
        images = Images(*source)
        for line in images.told:
            say(line)
        manifest = pack.pack(images, options.to, options.side, say, options.enlarge)
    images = " and ".join(f"{count:,} {split}" for split, count in manifest["images"].items())
    lines = [f"{options.to}: {images} images of {len(manifest['keys'])} classes at {manifest['side']} pixels"]
    lines += [f"  left out: {item['file']} ({item['reason']})" for item in manifest["unreadable"]]
    return {"path": str(options.to), **manifest}, "\n".join(
        map(printable, [*lines, train + shlex.quote(str(options.to))])
    )


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = make_parser().parse_args(arguments)
    warnings.filterwarnings("ignore", module="PIL")  # what cannot be read is told here
    try:
        report, text = run(options)
        print(json.dumps(report) if options.json else text, flush=True)
        return 1 if options.command == "check" and report["problems"] else 0
    except KeyboardInterrupt:
        say("data_setup: stopped; the same command goes on from there, and a check begins anew")
        return 130
    except BadInput as error:
        sentence = str(error)
    except OSError as error:
        place, reason = error.filename or getattr(options, "to", ""), error.strerror or error
        sentence = f"{place}: {reason}, expected what can be read, or a place with room to write; mend that"
    if options.json:
        print(json.dumps({"error": sentence}))
    say(f"data_setup: {sentence}")
    return 2


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # names of files may be no text at all
        stream.reconfigure(errors="backslashreplace")
    sys.exit(main())
