"""Kills, signals and damage at random moments, as many as you like: what a run has is never lost or mixed up.

    python tests/campaign.py --kills 200 --signals 40 --damages 300

Each trial runs a program as a user does, alone in a folder, with two seeds and every policy. The counts are
printed as they grow, and at the end a line for each trial that went wrong; exit status 1 if there were any.
The suite runs a short version.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from conftest import ROOT, rows, write_images

PROGRAMS = {
    "cifar10_ast": "--batch-size 16",
    "imagenet100_ast": "--weights none --model resnet18 --image-size 32 --batch-size 16",
}
COMMON = "--data images --epochs 3 --warmup-epochs 0 --compare full,random,short --seeds 3,1 --device cpu"
PATIENCE = 10.0  # seconds from a signal to the end
NEVER = 600.0


class Trials:
    """Runs of one program in a folder of its own, and the run that nobody disturbed."""

    def __init__(self, program: str, folder: Path, chance: random.Random):
        self.program, self.folder, self.chance = program, folder, chance
        folder.mkdir()
        shutil.copy(ROOT / "standalone" / f"{program}.py", folder)
        write_images(folder / "images", train=20, test=4)
        began = time.monotonic()
        assert self.start("whole").wait(NEVER) == 0, self.said()
        self.seconds = time.monotonic() - began

    def start(self, out: str, resume: bool = False) -> subprocess.Popen:
        flags = ["--resume"] if resume else f"{COMMON} {PROGRAMS[self.program]}".split()
        command = [sys.executable, "-I", f"{self.program}.py", *flags, "--out", out]
        with open(self.folder / "said", "w") as said:
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            return subprocess.Popen(command, cwd=self.folder, env=env, stdout=said, stderr=said)

    def said(self) -> str:
        return (self.folder / "said").read_text()

    def disturbed(self, how: signal.Signals, most: int) -> tuple[str | None, int, float]:
        """Disturbs a run up to `most` times, and resumes it each time.

        Returns what was wrong in the end, how often it was disturbed, and the longest wait for its end, in
        seconds.
        """
        out, count, longest, fault = f"out{self.chance.getrandbits(32)}", 0, 0.0, None
        while count < most:
            resume = (self.folder / out / "config.json").exists()
            process, until = self.start(out, resume), self.chance.uniform(0, 1.1 * self.seconds)
            try:
                process.wait(until)
                break
            except subprocess.TimeoutExpired:
                process.send_signal(how)
            asked = time.monotonic()
            status = process.wait(NEVER)
            count, longest = count + 1, max(longest, time.monotonic() - asked)
            listening = f"{self.program}: " in self.said()  # not yet while Python imports
            if listening and ("Traceback" in self.said() or status not in (-how, 128 + how, 0)):
                fault = f"status {status}: {self.said()[-300:]}"
            if how != signal.SIGKILL and longest > PATIENCE:
                fault = f"{longest:.1f} s until it had ended"
        if self.start(out, (self.folder / out / "config.json").exists()).wait(NEVER) or fault:
            return fault or self.said()[-300:], count, longest
        fault = self.different(self.folder / out)
        shutil.rmtree(self.folder / out)
        return fault, count, longest

    def different(self, out: Path) -> str | None:
        """In what a finished run differs from the undisturbed one."""
        whole = self.folder / "whole"
        if rows(out, timed=False) != rows(whole, timed=False):
            return "other rows"
        models = [torch.load(f / "model.pt", weights_only=True)["state_dict"] for f in (out, whole)]
        if any(not torch.equal(value, models[1][name]) for name, value in models[0].items()):
            return "other weights"
        return None if json.loads((out / "summary.json").read_text())["complete"] else "incomplete"

    def damaged(self, out: str) -> str | None:
        """Damages a file of a copy of the run `out`, which was cut, and resumes it."""
        copy = self.folder / f"copy{self.chance.getrandbits(32)}"
        shutil.copytree(self.folder / out, copy)
        path = self.chance.choice([p for p in sorted(copy.rglob("*")) if p.is_file()])
        content = bytearray(path.read_bytes())
        kind = self.chance.choice(("flip", "cut", "zeros", "foreign"))
        if kind == "flip" and content:
            content[self.chance.randrange(len(content))] ^= 1 << self.chance.randrange(8)
        elif kind == "cut":
            del content[self.chance.randrange(len(content) + 1) :]
        elif kind == "zeros":
            content[self.chance.randrange(len(content) + 1) :] = bytes(len(content) // 2)
        elif path.suffix == ".ckpt":  # rightly hashed, of a run with other settings
            state = torch.load(self.folder / "foreign.pt", weights_only=True)
            torch.save(state, self.folder / "draft")
            payload = (self.folder / "draft").read_bytes()
            content = hashlib.sha256(payload).digest() + payload
        path.write_bytes(bytes(content))
        status = self.start(copy.name, resume=True).wait(NEVER)
        fault = f"{path.name}, {kind}: status {status}: {self.said()[-300:]}"
        if status == 0:
            found = self.different(copy)
            fault = found and f"{path.name}, {kind}: {found}"
        elif status == 2 and "Traceback" not in self.said():
            fault = None
        shutil.rmtree(copy)
        return fault

    def cut(self) -> str:
        """A run that was stopped amid its training, and beside it the state of one with another seed."""
        process = self.start("cut")
        while len(list((self.folder / "cut").glob("checkpoints/*.ckpt"))) < 2:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        process.wait(NEVER)
        content = sorted((self.folder / "cut").glob("checkpoints/*.ckpt"))[-1].read_bytes()
        (self.folder / "payload").write_bytes(content[32:])
        state = torch.load(self.folder / "payload", weights_only=True)
        state["identity"][1] = "0" * 64
        torch.save(state, self.folder / "foreign.pt")
        return "cut"


def campaign(
    kills: int, signals: int, damages: int, seed: int | None = None, programs: Iterable[str] = PROGRAMS
) -> list[str]:
    """Tries so many on the programs together; tells what went wrong, and prints the counts."""
    chance, faults, counts, longest = random.Random(seed), [], {}, 0.0
    with tempfile.TemporaryDirectory() as place:
        both = [Trials(program, Path(place) / program, chance) for program in programs]
        for name, hows, wanted in (
            ("kills", (signal.SIGKILL,), kills),
            ("signals", (signal.SIGTERM, signal.SIGINT, signal.SIGHUP), signals),
        ):
            counts[name] = 0
            while counts[name] < wanted:
                trials = chance.choice(both)
                fault, count, wait = trials.disturbed(chance.choice(hows), min(4, wanted - counts[name]))
                counts[name] += count
                longest = max(longest, wait if name == "signals" else 0)
                faults += [f"{trials.program}, {name}: {fault}"] if fault else []
                print(f"{counts}, {len(faults)} wrong, at most {longest:.1f} s to the end", flush=True)
                print(faults[-1] if fault else "", end="\n" * bool(fault), flush=True)
        runs = [trials.cut() for trials in both if damages]
        for number in range(damages):
            trials, run = both[number % len(both)], runs[number % len(both)]
            if fault := trials.damaged(run):
                faults.append(f"{trials.program}: {fault}")
            print(f"{number + 1} damages, {len(faults)} wrong", flush=True)
    print(f"{counts} and {damages} damages: {len(faults)} wrong; {longest:.1f} s from a signal to the end")
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, usual in (("kills", 200), ("signals", 40), ("damages", 300), ("seed", None)):
        parser.add_argument(f"--{name}", type=int, default=usual)
    faults = campaign(**vars(parser.parse_args()))
    print("\n".join(faults))
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
