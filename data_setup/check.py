"""Count a data set's images, decode every one, and look for copies and for leakage into validation."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .files import in_order, one_line, sha256
from .sources import SPLITS, Arrays, Source, count

BLOCK = 64  # images; what a thread does at a time
SHOWN = 5  # examples of a problem in the summary for people; --json has all

Sample = tuple[str, int]  # split, index
Facts = tuple[bytes | None, tuple[int, int], str]  # digest, (width, height), why it is unreadable


@dataclass
class Expected:
    """What a known data set holds."""

    name: str
    classes: int
    train: tuple[int, int]  # fewest and most images a class
    val: tuple[int, int]
    names: tuple[str, ...] = ()


def check(source: Source, expected: Expected | None, workers: int) -> dict:
    """Read and decode every image; returns the report, whose "problems" are sentences. Raises BadInput."""
    samples = [(split, index) for split in SPLITS for index in range(len(source.names[split]))]
    blocks = [samples[start : start + BLOCK] for start in range(0, len(samples), BLOCK)]
    facts: list[Facts] = []
    with (
        tqdm(total=len(samples), desc="checking", unit=" images", mininterval=0.5, disable=None) as bar,
        in_order(lambda block: [look(source, *sample) for sample in block], blocks, workers) as results,
    ):
        for found in results:
            facts += found
            bar.update(len(found))
    unreadable = [
        {"file": source.names[split][index], "reason": reason}
        for (split, index), (_, _, reason) in zip(samples, facts, strict=True)
        if reason
    ]
    report = {
        "path": str(source.path),
        "form": source.form,
        "classes": len(source.keys),
        "images": {split: len(source.names[split]) for split in SPLITS},
        "counts": {split: count(source.keys, source.labels[split]) for split in SPLITS},
        "sizes": sizes([size for _, size, reason in facts if not reason]),
        "unreadable": unreadable,
        **copies(source, samples, [digest for digest, _, _ in facts]),
    }
    damaged = changed_files(source) if isinstance(source, Arrays) else []
    report["problems"] = damaged + problems(report) + (unexpected(report, expected) if expected else [])
    return report


def look(source: Source, split: str, index: int) -> Facts:
    """Read, hash and decode one image."""
    digest, size = None, (0, 0)
    try:
        content = source.read(split, index)
        digest = hashlib.sha256(content).digest()[:16]
        size = source.size(content)
    except source.unreadable as error:
        return digest, size, one_line(error)
    return digest, size, ""


def sizes(found: list[tuple[int, int]]) -> dict[str, dict[str, int]]:
    """Least, median and greatest width, height and shorter side, in pixels."""
    if not found:
        return {}
    pixels = np.array(found)
    columns = {"width": pixels[:, 0], "height": pixels[:, 1], "short_side": pixels.min(axis=1)}
    return {
        name: {"min": int(column.min()), "median": int(np.median(column)), "max": int(column.max())}
        for name, column in columns.items()
    }


def copies(source: Source, samples: list[Sample], digests: list[bytes | None]) -> dict[str, list[list[str]]]:
    """Groups of files with the same content, by what is wrong with them; a group may be wrong twice."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for position, digest in enumerate(digests):
        if digest is not None:
            groups[digest].append(position)
    found: dict[str, list[list[str]]] = {"duplicates": [], "leakage": [], "conflicting_labels": []}
    for group in groups.values():
        if len(group) == 1:
            continue
        members = [samples[position] for position in group]
        names = [source.names[split][index] for split, index in members]
        splits = {split for split, _ in members}
        labels = {int(source.labels[split][index]) for split, index in members}
        found["duplicates"] += [names] if len(splits) == len(labels) == 1 else []
        found["leakage"] += [names] if len(splits) > 1 else []
        found["conflicting_labels"] += [names] if len(labels) > 1 else []
    return found


def problems(report: dict) -> list[str]:
    """Sentences on what is wrong in any data set."""
    total, lost = sum(report["images"].values()), len(report["unreadable"])
    more = "; training refuses more than 1 %" if lost > 0.01 * total else ""
    sentences = {
        "unreadable": f"{lost} of {total} images unreadable{more}",
        "duplicates": "{} groups of exact copies in one split and class",
        "leakage": "{} groups of exact copies in both train and val",
        "conflicting_labels": "{} groups of exact copies under different classes",
    }
    return [text.format(len(report[kind])) for kind, text in sentences.items() if report[kind]]


def unexpected(report: dict, expected: Expected) -> list[str]:
    """Sentences on where counts and classes differ from what the data set is known to hold."""
    sentences = []
    if report["classes"] != expected.classes:
        sentences.append(f"{report['classes']} classes, {expected.name} has {expected.classes}")
    if expected.names and (strange := sorted(set(report["counts"]["train"]) - set(expected.names))):
        sentences.append(f"class {strange[0]} is none of {expected.name}'s ({len(strange)} are not)")
    for split in SPLITS:
        low, high = getattr(expected, split)
        odd = {key: n for key, n in report["counts"][split].items() if not low <= n <= high}
        if odd:
            key, count = next(iter(odd.items()))
            sentences.append(
                f"{len(odd)} classes differ in {split} from {span(low, high)} images a class, "
                f"the first is {key} with {count:,}"
            )
    return sentences


def changed_files(source: Source) -> list[str]:
    """Packed files whose SHA-256 is not the one in their manifest.json, if there is one."""
    try:
        files = json.loads((source.path / "manifest.json").read_text(encoding="utf-8"))["files"]
        return [
            f"{name} is not what was packed: its SHA-256 differs from manifest.json"
            for name, facts in files.items()
            if sha256(source.path / Path(name).name) != facts["sha256"]
        ]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"manifest.json cannot be read: {one_line(error)}"]


def span(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def summary(report: dict) -> str:
    """The report for a person."""
    lines = [f"{report['path']}: {report['form']}, {report['classes']} classes"]
    for split in SPLITS:
        counts = list(report["counts"][split].values())
        images = f"{report['images'][split]:,} images"
        lines.append(f"  {split}: {images}, {span(min(counts), max(counts))} a class")
    for name, facts in report["sizes"].items():
        text = f"{facts['min']:,} / {facts['median']:,} / {facts['max']:,}"
        lines.append(f"  {name.replace('_', ' ')}: {text} pixels (least / median / greatest)")
    for item in report["unreadable"][:SHOWN]:
        lines.append(f"  unreadable: {item['file']} ({item['reason']})")
    for kind in ("duplicates", "leakage", "conflicting_labels"):
        for names in report[kind][:SHOWN]:
            lines.append(f"  {kind.replace('_', ' ')}: {' = '.join(names[:SHOWN])}")
    lines += [f"PROBLEM: {sentence}" for sentence in report["problems"]] or ["no problems found"]
    return "\n".join(lines)
