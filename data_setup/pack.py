"""Decode every image once, into arrays that training maps: train_images.npy and its fellows.

Pictures are only ever appended, in the samples' order, to files in pack.part/, whose progress.json says how
many are on the disk. So whatever ends a pack, the same command cuts the file back to what was noted and goes
on, and the result has the same bytes. An unreadable image leaves no hole: its successor takes its place.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import PIL
from tqdm import tqdm

from . import BadInput, files
from .files import PROGRESS, one_line
from .images import SPLITS, Images, decode

ARRAYS = ("train_images.npy", "train_labels.npy", "val_images.npy", "val_labels.npy")
OUTPUTS = (*ARRAYS, "classes.json", "manifest.json")
HEADER = 128  # bytes before the pixels, as NumPy writes them for any count of pictures
BLOCK_BYTES = 4 << 20  # of pictures, which a thread decodes at a time
COMMIT_SECONDS = 1.0  # of work that a kill may cost, beside what the threads hold


def pack(source: Images, target: Path, side: int, say: Callable[[str], None], enlarge: bool = False) -> dict:
    """Write `source` to `target` at `side` x `side` pixels; returns the manifest.

    Goes on where an earlier pack of the same source and side stopped. Raises BadInput.
    """
    if not 1 <= side <= 4096:
        raise BadInput(f"--side {side}: expected 1 to 4,096 pixels; 256 suits training at 224")
    if not enlarge and 0 < (median := source.median_side()) < side:
        expected = f"expected at most {median}, the images' median shorter side"
        raise BadInput(f"--side {side}: {expected}; name a smaller one, or --enlarge them")
    files.refuse_inside(target, source.path)
    part, manifest = target / "pack.part", files.read_json(target / "manifest.json")
    identity = {"source": os.path.abspath(source.path), "side": side, "fingerprint": source.fingerprint()}
    identity["decoder"] = f"Pillow {PIL.__version__}"  # another may give other pixels
    progress = files.read_json(part / PROGRESS)
    if not progress and manifest | identity == manifest:
        say(f"{target}: packed already on {manifest['date']}")
        return manifest
    if progress and any(progress[key] != identity[key] for key in ("source", "side")):
        begun = f"{progress['source']} at {progress['side']} pixels"
        raise BadInput(f"--to {target}: holds an unfinished pack of {begun}; delete {part.name} there")
    if not progress.get("complete"):
        files.refuse_existing(target, OUTPUTS)
        progress = begin(progress, identity, part, source, say)
        for split in SPLITS:
            write_images(source, split, part, progress)
        finish(source, part, progress)
        files.complete(part, progress)
    files.publish(part, OUTPUTS)
    return files.read_json(target / "manifest.json")


def begin(progress: dict, identity: dict, part: Path, source: Images, say: Callable[[str], None]) -> dict:
    """What is done so far of this pack. Raises BadInput where the disk is too small."""
    if progress | identity != progress:  # none, or of files that have changed since
        progress = identity | {"done": dict.fromkeys(SPLITS, 0), "unreadable": {s: [] for s in SPLITS}}
        files.write_json(part / PROGRESS, progress)
    left = len(source) - sum(progress["done"].values())
    need, free = left * (progress["side"] ** 2 * 3 + 8), shutil.disk_usage(part).free
    text = f"{need / 1e6:,.0f} MB to write, {free / 1e6:,.0f} MB free"
    say(f"{left:,} of {len(source):,} images to pack: {text}")
    if need > free:
        raise BadInput(f"--to {part.parent}: too little room, {text}; free some, or choose another disk")
    return progress


def write_images(source: Images, split: str, part: Path, progress: dict) -> None:
    """Append the pictures that a split still lacks. Raises BadInput where too many are unreadable."""
    done, unreadable, side = progress["done"], progress["unreadable"][split], progress["side"]
    row, names = side * side * 3, source.names[split]
    rows = max(1, BLOCK_BYTES // row)
    blocks = [range(start, min(start + rows, len(names))) for start in range(done[split], len(names), rows)]

    def decode_block(block: range) -> tuple[np.ndarray, list[tuple[int, str]]]:
        """The block's readable pictures, one after another, and why others are not."""
        pictures, broken = np.empty((len(block), side, side, 3), dtype=np.uint8), []
        for index in block:
            try:
                pictures[index - block.start - len(broken)] = decode(source.content(names[index]), side)[0]
            except Exception as error:  # a damaged file can break a decoder in any way
                broken.append((index, one_line(error)))
        return pictures[: len(block) - len(broken)], broken

    path, size = part / f"{split}_images.npy", HEADER + (done[split] - len(unreadable)) * row
    with (
        path.open("r+b" if done[split] else "w+b") as file,
        tqdm(desc=split, total=len(names), initial=done[split], unit=" images", disable=None) as bar,
    ):
        if done[split] and file.seek(0, os.SEEK_END) < size:
            raise BadInput(f"{path}: shorter than the {size:,} bytes noted of it; delete {part}, begin anew")
        file.truncate(size)
        file.seek(size)
        committed = time.monotonic()
        for block, (pictures, broken) in zip(
            blocks, files.in_order(decode_block, blocks, source.workers), strict=True
        ):
            file.write(pictures)
            unreadable += broken
            done[split] = block.stop
            refuse_if_many(source, part, progress)
            if block.stop == len(names) or time.monotonic() - committed >= COMMIT_SECONDS:
                file.flush()
                os.fsync(file.fileno())  # first the pictures reach the disk, then the note that counts them
                files.write_json(part / PROGRESS, progress)
                committed = time.monotonic()
            bar.update(len(block))


def refuse_if_many(source: Images, part: Path, progress: dict) -> None:
    """Raise BadInput where over 1 % are unreadable; nothing is kept, since the source must change first."""
    lost = [(source.names[split][row], why) for split in SPLITS for row, why in progress["unreadable"][split]]
    if len(lost) > 0.01 * len(source):
        shutil.rmtree(part)
        raise BadInput(
            f"{source.path}: {len(lost)} of {len(source)} images are unreadable, the first is {lost[0][0]} "
            f"({lost[0][1]}), expected at most 1 %; mend them, or name a copy without them"
        )


def finish(source: Images, part: Path, progress: dict) -> None:
    """Write what goes with the pictures. Raises BadInput where a class has no readable image."""
    manifest = {key: progress[key] for key in ("source", "side", "fingerprint", "decoder")}
    manifest |= {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "keys": source.keys}
    manifest |= {"images": {}, "counts": {}, "unreadable": []}
    for split, names in source.names.items():
        broken = dict(progress["unreadable"][split])
        labels = np.delete(source.labels[split], list(broken))
        manifest["unreadable"] += [{"file": names[row], "reason": why} for row, why in broken.items()]
        manifest["images"][split], manifest["counts"][split] = len(labels), source.counts(labels)
        if lost := [key for key, count in manifest["counts"][split].items() if not count]:
            shutil.rmtree(part)
            raise BadInput(f"{source.path}: no {split} image of {lost[0]} is readable; replace them")
        header = {"descr": "|u1", "fortran_order": False}
        header["shape"] = (len(labels), progress["side"], progress["side"], 3)
        with (part / f"{split}_images.npy").open("r+b") as file:
            np.lib.format.write_array_header_1_0(file, header)
        np.save(part / f"{split}_labels.npy", labels)
    files.write_json(part / "classes.json", source.classes)
    files.write_json(part / "manifest.json", manifest)
