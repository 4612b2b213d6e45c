"""Count a data set's images, decode every one, and look for copies and for leakage into validation."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from . import printable
from .files import in_order, one_line
from .images import SPLITS, Images, decode

BLOCK = 16  # images; what a thread does at a time
SHOWN = 5  # examples of a problem in the summary for people; --json has all
COPIES = {
    "duplicates": "in one split and class",
    "leakage": "in both train and val",
    "conflicting_labels": "under different classes",
}
EXPECTED = {  # classes, and fewest and most images of each in train and in val
    "cifar10": (10, (5000, 5000), (1000, 1000)),
    "imagenet100": (100, (732, 1300), (50, 50)),
}


class Fact(NamedTuple):
    """What is known of a sample."""

    split: str
    label: int
    name: str
    digest: bytes = b""
    short_side: int = 0  # pixels
    deep: bool = False  # grey of more than 8 bits
    reason: str = ""  # why it is unreadable


def check(source: Images, name: str) -> dict:
    """Decode every image; returns the report, with sentences as "problems". `name` may be in EXPECTED."""
    facts: list[Fact] = []
    for split in SPLITS:
        pairs = zip(source.labels[split].tolist(), source.names[split], strict=True)
        facts += [Fact(split, label, name) for label, name in pairs]
    blocks = [facts[start : start + BLOCK] for start in range(0, len(facts), BLOCK)]
    looked = in_order(lambda block: [look(source, fact) for fact in block], blocks, source.workers)
    facts = [fact for block in tqdm(looked, "checking", len(blocks), disable=None) for fact in block]
    sides = [fact.short_side for fact in facts if not fact.reason] or [0]
    unreadable = [{"file": fact.name, "reason": fact.reason} for fact in facts if fact.reason]
    report = overview(source) | copies(facts) | {"unreadable": unreadable}
    report["short_side"] = {"min": min(sides), "median": int(np.median(sides)), "max": max(sides)}
    report["deep"] = sum(fact.deep for fact in facts)
    if unreadable:
        more = "; training refuses more than 1 %" if len(unreadable) > 0.01 * len(facts) else ""
        report["problems"].append(f"{len(unreadable)} of {len(facts)} images unreadable{more}")
    for kind, where in COPIES.items():
        if report[kind]:
            report["problems"].append(f"{len(report[kind])} groups of exact copies {where}")
    report["problems"] += unexpected(report, name) if name in EXPECTED else []
    return report


def look(source: Images, fact: Fact) -> Fact:
    """Read, hash and decode one image."""
    try:
        content = source.content(fact.name)
        fact = fact._replace(digest=hashlib.sha256(content).digest())
        _, short_side, deep = decode(content, 32)  # large JPEGs at reduced scale
        return fact._replace(short_side=short_side, deep=deep)
    except Exception as error:  # a damaged file can break a decoder in any way
        return fact._replace(reason=one_line(error))


def overview(source: Images) -> dict:
    """What can be told without decoding."""
    return {
        "path": str(source.path),
        "form": "image files",
        "classes": len(source.keys),
        "images": {split: len(source.names[split]) for split in SPLITS},
        "counts": {split: source.counts(source.labels[split]) for split in SPLITS},
        "told": source.told,
        "problems": [],
    }


def copies(facts: list[Fact]) -> dict[str, list[list[str]]]:
    """Groups of files with the same content, by what is wrong with them; a group may be wrong twice."""
    groups: dict[bytes, list[Fact]] = defaultdict(list)
    for fact in facts:
        groups[fact.digest].append(fact)
    found: dict[str, list[list[str]]] = {kind: [] for kind in COPIES}
    for digest, group in groups.items():
        names = [fact.name for fact in group]
        leaks, conflicts = len({fact.split for fact in group}) > 1, len({fact.label for fact in group}) > 1
        if digest and len(group) > 1:
            found["leakage"] += [names] if leaks else []
            found["conflicting_labels"] += [names] if conflicts else []
            found["duplicates"] += [] if leaks or conflicts else [names]
    return found


def unexpected(report: dict, name: str) -> list[str]:
    """Sentences on where counts differ from what the data set of this name holds."""
    classes, *usual = EXPECTED[name]
    sentences = []
    if report["classes"] != classes:
        sentences.append(f"{report['classes']} classes, {name} has {classes}")
    for split, (low, high) in zip(SPLITS, usual, strict=True):
        counts = report["counts"][split].items()
        if odd := [(key, count) for key, count in counts if not low <= count <= high]:
            text = f"{len(odd)} classes have not {span(low, high)} {split} images, as in {name}"
            sentences.append(f"{text}; the first is {odd[0][0]} with {odd[0][1]:,}")
    return sentences


def span(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def summary(report: dict) -> str:
    """A report for a person."""
    lines = [f"{report['path']}: {report['form']}, {report['classes']} classes"]
    for split, images in report["images"].items():
        counts = report["counts"][split]
        ranked = [f"{key} {counts[key]:,}" for key in sorted(counts, key=counts.get)]
        lines.append(
            f"  {split}: {images:,} images, {span(min(counts.values()), max(counts.values()))} a class"
        )
        lines.append("    " + ", ".join(ranked if len(ranked) <= 10 else [*ranked[:4], "...", *ranked[-4:]]))
    if sides := report.get("short_side"):
        lines.append(
            f"  shorter side: {sides['min']:,} to {sides['max']:,} pixels, median {sides['median']:,}"
        )
    if report.get("deep"):
        lines.append(f"  grey of more than 8 bits: {report['deep']:,} images, each scaled to its own range")
    lines += [f"  {line}" for line in report.get("told", [])]
    for item in report.get("unreadable", [])[:SHOWN]:
        lines.append(f"  unreadable: {item['file']} ({item['reason']})")
    for kind in COPIES:
        for names in report.get(kind, [])[:SHOWN]:
            lines.append(f"  {kind.replace('_', ' ')}: {' = '.join(names[:SHOWN])}")
    lines += [f"PROBLEM: {sentence}" for sentence in report["problems"]] or ["no problems found"]
    return "\n".join(map(printable, lines))
