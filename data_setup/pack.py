"""Decode every image once, into arrays that training maps: train_images.npy and its fellows.

What is written is only ever appended, in the samples' order, and a journal says how much of it is on the
disk: first the pictures reach the disk, then the line that counts them. So whatever ends a pack, a kill -9 or
a power cut included, the same command cuts the file back to the journal's last line and goes on, and the
result has the same bytes. An unreadable image leaves no hole, since its successor is written in its place.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL
from tqdm import tqdm

from . import VERSION, BadInput, programs
from .files import cannot_write, check_room, in_order, locked, one_line, sha256, sync_folder, write_whole
from .sources import PACKED, SPLITS, Source, count

JOURNAL = "pack.journal"
OUTPUTS = (*(f"{name}.npy" for name in PACKED), "classes.json", "manifest.json")
HEADER = 128  # bytes before the pixels, as np.save writes them; room for any count of pictures
BLOCK_BYTES = 2 << 20  # of pictures, which a thread decodes at a time: what fits a cache is written faster
COMMIT_SECONDS = 1.0  # of work that a kill may cost, beside what the threads hold
LARGEST_SIDE = 4096  # pixels


class Hopeless(BadInput):
    """A pack that cannot be finished before its source changes."""


@dataclass
class Done:
    """How far a split is: images taken from the source, and the indices and reasons of those left out."""

    images: int = 0
    unreadable: dict[int, str] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return self.images - len(self.unreadable)


def pack(
    source: Source, target: Path, side: int, workers: int, force: bool, say: Callable[[str], None]
) -> dict:
    """Write `source` to `target` at `side` x `side` pixels; returns the manifest, less the files' names.

    Goes on where an earlier pack of the same source and side stopped. Raises BadInput.
    """
    with locked(target):
        try:
            packer = Packer(source, target, side, workers, say)
            try:
                return packer.run(force)
            except Hopeless:
                packer.discard()
                raise
        except OSError as error:  # of reading the source there is none: that is an unreadable image
            raise cannot_write(target, error) from error


class Packer:
    """One pack: its journal, its unfinished files, and how far they are."""

    def __init__(self, source: Source, target: Path, side: int, workers: int, say: Callable[[str], None]):
        self.source, self.target, self.side = source, target, side
        self.workers, self.say = workers, say
        self.row_bytes = side * side * 3
        self.journal = target / JOURNAL
        # Another decoder may give other pixels, and half of each would be neither.
        program = programs.imagenet100()
        versions = f"Pillow {PIL.__version__}, torch {program.torch.__version__}"
        self.identity = {
            "source": os.path.abspath(source.path),
            "fingerprint": source.fingerprint(),
            "side": side,
            "decoder": f"{sha256(Path(program.__file__))[:16]}, {versions}",
        }
        self.done = {split: Done() for split in SPLITS}
        self.publishing = False

    def part(self, name: str) -> Path:
        return self.target / f"{name}.part"

    def run(self, force: bool) -> dict:
        manifest = self.packed_before()
        if manifest and not force and not self.journal.exists():
            same = manifest["decoder"] == self.identity["decoder"]
            other = "" if same else " by another version of the program, Pillow or torch"
            self.say(f"{self.target}: packed already on {manifest['date']}{other}; --force packs again")
        else:
            self.resume_or_begin(force)
            if not self.publishing:
                for split in SPLITS:
                    self.write_images(split)
                self.finish()
                self.note({"publish": True})
                sync_folder(self.target)
            self.publish()
            manifest = self.packed_before()
        return {key: value for key, value in manifest.items() if key != "names"}

    def packed_before(self) -> dict:
        """The manifest of a finished pack of this very source and side, or {}."""
        try:
            manifest = json.loads((self.target / "manifest.json").read_text(encoding="utf-8"))
            same = all(manifest[key] == self.identity[key] for key in ("source", "fingerprint", "side"))
            there = all((self.target / name).stat().st_size for name in manifest["files"])
            return manifest if same and there and manifest["decoder"] else {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}

    # Beginning, or going on

    def resume_or_begin(self, force: bool) -> None:
        """Read the journal, or start one. Raises BadInput where that would lose something and not `force`."""
        lines = self.read_journal()
        changed = [key for key, value in self.identity.items() if lines and lines[0].get(key) != value]
        if changed and not force:
            words = {"fingerprint": "other files in it"}
            was = words.get(changed[0], f"{changed[0]} {lines[0].get(changed[0])}")
            now = "" if changed[0] in words else f" (now {self.identity[changed[0]]})"
            raise BadInput(
                f"--to {self.target}: holds an unfinished pack of {lines[0].get('source')} with {was}{now}, "
                "expected none or one of the same source and side; give --force to start anew or another --to"
            )
        if lines and not changed:
            for line in lines[1:]:
                self.take(line)
            if self.publishing or self.whole():
                done = sum(done.images for done in self.done.values())
                self.say(f"going on after {done:,} of {len(self.source):,} images")
                self.room()
                return
            self.say(f"{self.target}: the unfinished files are shorter than the journal says; starting anew")
            self.done = {split: Done() for split in SPLITS}
        names = [name for output in OUTPUTS for name in (output, f"{output}.part")]
        there = [name for name in names if (self.target / name).exists()]
        if there and not force and not lines:
            raise BadInput(
                f"--to {self.target}: holds {there[0]}, expected a folder without packed arrays; "
                "give --force to replace them, or another --to"
            )
        for name in (*OUTPUTS, JOURNAL):
            self.part(name).unlink(missing_ok=True)
        self.room()
        write_whole(self.journal, json.dumps(self.identity).encode() + b"\n")

    def read_journal(self) -> list[dict]:
        """The journal's whole lines; what follows a torn one is as if never written."""
        lines = []
        with suppress(FileNotFoundError), self.journal.open("rb") as file:
            for line in file:
                try:
                    lines.append(json.loads(line) if line.endswith(b"\n") else None)
                except ValueError:
                    lines.append(None)
                if not isinstance(lines[-1], dict):
                    return lines[:-1]
        return lines

    def take(self, line: dict) -> None:
        """Follow a line of the journal."""
        if "publish" in line:
            self.publishing = True
        else:
            done = self.done[line["split"]]
            done.images = line["images"]
            done.unreadable.update({index: reason for index, reason in line["unreadable"]})

    def whole(self) -> bool:
        """Whether the unfinished files hold all that the journal counts."""
        for split, done in self.done.items():
            part = self.part(f"{split}_images.npy")
            need = HEADER + done.rows * self.row_bytes
            if done.images and (not part.exists() or part.stat().st_size < need):
                return False
        return True

    def room(self) -> None:
        """Say what is still to be written. Raises BadInput where there is no room for it."""
        if self.publishing:
            return
        written = sum(self.part(f"{s}_images.npy").stat().st_size for s in SPLITS if self.done[s].images)
        need = len(self.source) * (self.row_bytes + 8) - written
        counts = " and ".join(f"{len(self.source.names[split]):,} {split}" for split in SPLITS)
        what = f"packing {counts} images at {self.side} x {self.side} pixels"
        check_room(self.target, max(0, need), self.say, what)

    def note(self, line: dict) -> None:
        """Append a line to the journal, on the disk when this returns."""
        content = self.journal.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # less what a power cut tore
        with self.journal.open("r+b") as file:
            file.truncate(len(whole))
            file.seek(len(whole))
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    # Pictures

    def write_images(self, split: str) -> None:
        names, done = self.source.names[split], self.done[split]
        rows = max(1, BLOCK_BYTES // self.row_bytes)
        starts = range(done.images, len(names), rows)
        blocks = [range(start, min(start + rows, len(names))) for start in starts]
        with (
            open_to_append(self.part(f"{split}_images.npy"), HEADER + done.rows * self.row_bytes) as file,
            tqdm(
                total=len(names),
                initial=done.images,
                desc=f"packing {split}",
                unit=" images",
                mininterval=0.5,
                disable=None,
            ) as bar,
            in_order(lambda block: self.decode(split, block), blocks, self.workers) as results,
        ):
            pending: dict[int, str] = {}
            committed = time.monotonic()
            for block, (images, unreadable) in zip(blocks, results, strict=True):
                file.write(memoryview(images).cast("B"))
                done.images = block.stop
                done.unreadable.update(unreadable)
                pending.update(unreadable)
                bar.update(len(block))
                self.refuse_if_many()
                if time.monotonic() - committed >= COMMIT_SECONDS or block is blocks[-1]:
                    self.commit(file, split, pending)
                    pending, committed = {}, time.monotonic()
        self.refuse_if_emptied(split)

    def decode(self, split: str, block: range) -> tuple[np.ndarray, dict[int, str]]:
        """The block's readable pictures, one after another, and why others are not."""
        images = np.empty((len(block), self.side, self.side, 3), dtype=np.uint8)
        kept, unreadable = 0, {}
        for index in block:
            try:
                images[kept] = self.source.picture(self.source.read(split, index), self.side)
                kept += 1
            except self.source.unreadable as error:
                unreadable[index] = one_line(error)
        return images[:kept], unreadable

    def commit(self, file: BinaryIO, split: str, unreadable: dict[int, str]) -> None:
        """Bring the pictures to the disk, and then the line that counts them."""
        file.flush()
        os.fsync(file.fileno())
        self.note({"split": split, "images": self.done[split].images, "unreadable": list(unreadable.items())})

    def refuse_if_many(self) -> None:
        lost = sum(len(done.unreadable) for done in self.done.values())
        if lost > 0.01 * len(self.source):
            split = next(split for split in SPLITS if self.done[split].unreadable)
            index, reason = next(iter(self.done[split].unreadable.items()))
            raise Hopeless(
                f"{self.source.path}: {lost} of {len(self.source)} images are unreadable, the first is "
                f"{self.source.names[split][index]} ({reason}), expected at most 1 %; mend or remove them"
            )

    def refuse_if_emptied(self, split: str) -> None:
        lost = np.setdiff1d(np.arange(len(self.source.keys)), self.labels(split))
        if len(lost):
            raise Hopeless(
                f"{self.source.path}: no {split} image of {self.source.classes[lost[0]]} is readable, "
                "expected one at least; replace them"
            )

    def discard(self) -> None:
        """Leave nothing of a pack that cannot be finished: its source must change first."""
        for path in (*map(self.part, OUTPUTS), self.journal):
            path.unlink(missing_ok=True)

    # What goes with the pictures

    def kept(self, split: str) -> list[int]:
        return [i for i in range(len(self.source.names[split])) if i not in self.done[split].unreadable]

    def labels(self, split: str) -> np.ndarray:
        return self.source.labels[split][self.kept(split)]

    def finish(self) -> None:
        """Write what goes with the pictures, all still under the names of unfinished files."""
        files = {}
        for split in SPLITS:
            done, path = self.done[split], self.part(f"{split}_images.npy")
            with path.open("r+b") as file:
                file.write(npy_header((done.rows, self.side, self.side, 3)))
                file.flush()
                os.fsync(file.fileno())
            buffer = io.BytesIO()
            np.save(buffer, self.labels(split))
            self.write(f"{split}_labels.npy", buffer.getvalue())
        self.write("classes.json", json.dumps(self.source.classes, indent=1).encode() + b"\n")
        total = sum(self.part(name).stat().st_size for name in OUTPUTS[:-1])
        with tqdm(total=total, desc="checksums", unit="B", unit_scale=True, disable=None) as bar:
            for name in OUTPUTS[:-1]:
                path = self.part(name)
                files[name] = {"bytes": path.stat().st_size, "sha256": sha256(path, bar.update)}
        self.write("manifest.json", json.dumps(self.manifest(files), indent=1).encode() + b"\n")

    def manifest(self, files: dict) -> dict:
        source = self.source
        return {
            "program": f"data_setup pack {VERSION}",
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **self.identity,
            "form": source.form,
            "keys": source.keys,
            "images": {split: self.done[split].rows for split in SPLITS},
            "counts": {split: count(source.keys, self.labels(split)) for split in SPLITS},
            "unreadable": [
                {"file": source.names[split][index], "reason": reason}
                for split in SPLITS
                for index, reason in self.done[split].unreadable.items()
            ],
            "files": files,
            "names": {split: [source.names[split][index] for index in self.kept(split)] for split in SPLITS},
        }

    def write(self, name: str, content: bytes) -> None:
        with self.part(name).open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())

    def publish(self) -> None:
        """Give the files their names, the manifest last; can be done again where it was cut short."""
        if self.part("manifest.json").exists():
            (self.target / "manifest.json").unlink(missing_ok=True)  # an old one would vouch for new files
        for name in OUTPUTS:
            if self.part(name).exists():
                os.replace(self.part(name), self.target / name)
        sync_folder(self.target)
        self.journal.unlink()


@contextmanager
def open_to_append(path: Path, size: int):
    """Open a file cut, or stretched with zeros, to `size` bytes, to go on from there."""
    with path.open("r+b" if path.exists() else "w+b") as file:
        file.truncate(size)
        file.seek(size)
        yield file


def npy_header(shape: tuple[int, ...]) -> bytes:
    """The header of a uint8 .npy file, always HEADER bytes, so that it can be written last."""
    text = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}"
    start = np.lib.format.magic(1, 0) + (HEADER - 10).to_bytes(2, "little")
    return start + text.ljust(HEADER - 11).encode() + b"\n"
