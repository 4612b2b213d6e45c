"""Sixty faults, a line each, that the tests must catch: a guard over the tests themselves.

    python tests/faults.py               # every fault; takes minutes, so the suite does not run it
    python tests/faults.py --only WORDS  # those with WORDS in their name

A copy of the repository gets one fault at a time, and only that fault's tests run there; once without any
fault first, since a test that fails anyway catches nothing. `test_faults.py` holds that all still apply.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
NEEDED = "standalone tests data_setup benchmarks docs notebooks build_notebooks.py pyproject.toml README.md"
NEEDED += " requirements.txt requirements-dev.txt"
PATIENCE = 600  # seconds for the tests of one fault

# A name > the fastest test that catches it; "gate ties" is the one of test_gate.py that begins with test_ties
#   @  the program, where it is not cifar10_ast.py (of a shared cell either serves)
#   -  the old line, which stands once in the program; how far it is indented does not matter
#   +  the new line
FAULTS = r"""
# --- gate and memory ---
significance: softmax over the samples, not over the classes > gate significance_is_what_a
- return (logits.softmax(1) - F.one_hot(labels, logits.shape[1])).norm(dim=1)
+ return (logits.softmax(0) - F.one_hot(labels, logits.shape[1])).norm(dim=1)
memory: a tenth of the new value in place of half > gate memory_halves_old_and
- self.significance[indices] = torch.where(before.isinf(), values, 0.5 * values + 0.5 * before)
+ self.significance[indices] = torch.where(before.isinf(), values, 0.1 * values + 0.9 * before)
memory: ties count in full > gate unseen_samples_rank_highest
- u = torch.from_numpy((below + upto) / (2 * len(reference))).float()
+ u = torch.from_numpy(upto / len(reference)).float()
guard: waits for one visit more than are counted > gate the_guard_lets_go
- return torch.where(self.stuck[indices] >= self.VISITS, 0.5, u) if self.guard else u
+ return torch.where(self.stuck[indices] > self.VISITS, 0.5, u) if self.guard else u
guard: holds a hard sample although its loss falls > gate the_guard_lets_go
- stays = (values > self._top()) & (before.isinf() | (values >= self.FALL * before))
+ stays = values > self._top()
gate: no floor below the easy samples > gate probability_rises_with_rank
- return floor + (1 - floor) * torch.sigmoid((u - threshold) / temperature)
+ return (1 - floor) * torch.sigmoid((u - threshold) / temperature)
gate: what has waited may fill the whole choice > gate a_raised_target_does
- oldest = wait.topk(int(0.5 * target * len(candidates))).indices
+ oldest = wait.topk(int(target * len(candidates))).indices
balance: max for min in the waiting time of a class > gate balance_activates_as_many
- self.class_wait = (even / self.sizes).clamp(max=1)  # a large class's turn comes round more slowly
+ self.class_wait = (even / self.sizes).clamp(min=1)  # a large class's turn comes round more slowly
live gate: measures against the oldest scores > gate the_live_gate_holds
- self.recent = torch.cat([self.recent, scores[finite]])[-self.RECENT :]
+ self.recent = torch.cat([self.recent, scores[finite]])[: self.RECENT]
live gate: takes a sample whose score is not finite > gate the_live_gate_holds
- taken = (finite & above).nonzero().flatten()
+ taken = above.nonzero().flatten()
# --- controller ---
controller: the correction has the wrong sign > controller feedback_restores_the_rate
- self.value = solved + (self.KP * self.error + self.integral) / min(slope, -1e-3)
+ self.value = solved - (self.KP * self.error + self.integral) / min(slope, -1e-3)
controller: lost samples count as delivered > controller feedback_restores_the_rate
- error = target - (activated - self.lost) / candidates
+ error = target - (activated + self.lost) / candidates
controller: max for min in the room of the integral > controller the_feedback_asks_for
- room = min(target, 1 - target)  # anti-windup: ask for at most that much more or less
+ room = max(target, 1 - target)  # anti-windup: ask for at most that much more or less
controller: the pure loop winds up at its stop > controller the_integral_does_not
- elif self.stops[0] < self.value < self.stops[1] or self.error * (self.value - 0.5) > 0:
+ elif self.stops[0] < self.value < self.stops[1] or self.error * (self.value - 0.5) < 0:
controller: the smoothed error forgets what was before > controller the_pure_loop_with
- self.error += alpha * (error - self.error)
+ self.error = alpha * error
controller: a row shows the rate mirrored at the target > controller the_feedback_asks_for
- "ema": target - self.error,
+ "ema": target + self.error,
# --- selection and schedule ---
selection: every chunk begins at the same phase > controller every_epoch_meets_its
- return torch.from_numpy(taken), float(edges[-1]) % 1.0 if len(p) else phase
+ return torch.from_numpy(taken), phase
random gate: the fraction is not carried to the next chunk > gate random_realises_given_counts
- self.owed -= count
+ self.owed = 0.0
threshold: the bracket closes from the wrong side > gate the_solved_threshold_meets
- low, high = (threshold, high) if excess > 0 else (low, threshold)
+ low, high = (threshold, high) if excess < 0 else (low, threshold)
schedule: the anneal begins an epoch late > controller phases_follow_one_another
- return "anneal" if epoch >= self.epochs - self.anneal else "sparse"
+ return "anneal" if epoch > self.epochs - self.anneal else "sparse"
schedule: the ramp begins an epoch late > trainer listeners_are_told_in
- t = (epoch - self.warmup + 1) / (self.ramp + 1)
+ t = (epoch - self.warmup) / (self.ramp + 1)
schedule: the learning rate jumps down after its rise > controller the_learning_rate_is
- return 0.2 + 4.0 * progress if progress < 0.2 else (1 - progress) / 0.8
+ return 0.2 + 4.0 * progress if progress < 0.2 else 1 - progress
# --- ledger, FLOPs and joules ---
unit energy: the activated are charged as skipped as well > ledger unit_energy_is_ten
- return UNIT_ACTIVATED * self.activated + UNIT_SKIPPED * (self.candidates - self.activated)
+ return UNIT_ACTIVATED * self.activated + UNIT_SKIPPED * self.candidates
ledger: after a charge nobody pays > ledger every_second_and_joule
- self.switch(before)
+ self.switch(None)
ledger: joules of the last stretch only > ledger every_second_and_joule
- cost.joules = (cost.joules or 0.0) + now[1] - self.since[1]
+ cost.joules = now[1] - self.since[1]
FLOPs: of a batch, not of a sample > ledger flops_of_simple_cnn
- return counter.get_total_flops() / len(images), sorted(counter.uncounted), logits
+ return counter.get_total_flops(), sorted(counter.uncounted), logits
joules: since the driver was loaded, not since the start > ledger the_counter_is_read
- return sum(map(pynvml.nvmlDeviceGetTotalEnergyConsumption, handles)) / 1000 - self.start
+ return sum(map(pynvml.nvmlDeviceGetTotalEnergyConsumption, handles)) / 1000
ledger: the scoring pass is charged to the phase > trainer the_live_gate_reads
- with trainer.ledger.charge("scoring"):
+ with trainer.ledger.charge(trainer.phase):
# --- one step ---
step: buffers that are not finite are not looked at > step a_step_where_something
- ok = norm.isfinite() & after.isfinite().all().to(norm.device)
+ ok = norm.isfinite()
step: weights are left out > step a_step_has_the_losses
- scaler.scale((torch.where(finite, losses, 0) * weights).sum() * world()[1] / len(batch.whole)).backward()
+ scaler.scale(torch.where(finite, losses, 0).sum() * world()[1] / len(batch.whole)).backward()
step: a score stays where the loss is not finite > step a_sample_whose_loss
- scores = torch.where(finite, judge(logits, batch.labels, batch.images), math.nan)
+ scores = judge(logits, batch.labels, batch.images)
out of memory: every error is taken for it > step memory_that_ends
- if not re.search("out of memory|DefaultCPUAllocator|ALLOC_FAILED", str(error)):  # GPU, CPU, cuDNN
+ if not str(error):
resolution: small views last an epoch too long > resolution flops_are_counted
- return next((side for until, side in stages if epoch < until * self.epochs), 1.0)
+ return next((side for until, side in stages if epoch <= until * self.epochs), 1.0)
evaluation: frozen batch norm thaws > step evaluating_gives_every_module
- module.training = flag
+ module.training = True
# --- the loop ---
loop: the gate is asked with less than two batches in hand > sources the_gate_is_asked
- while len(indices) < 2 * size and tally.candidates < len(order):
+ while len(indices) < size and tally.candidates < len(order):
loop: what is chosen after the loader are other samples' images > sources every_activated_sample_is
- rows = order[torch.searchsorted(self.indices[order], indices.contiguous())]
+ rows = torch.searchsorted(self.indices[order], indices)
loop: packing leaves a short last batch > sources every_activated_sample_is
- full, held = held.cut(batch_length(len(held), size))
+ full, held = held.cut(size)
loop: epochs without a gate count as chosen > trainer results_follow_from_the
- self.times_activated[indices] += self.rate < 1
+ self.times_activated[indices] += 1
progress: the epoch in hand counts twice > trainer progress_never_goes_back
- later = trainer.schedule.steps(trainer.epoch + 1, trainer.target, tally.n, size)
+ later = trainer.schedule.steps(trainer.epoch, trainer.target, tally.n, size)
progress: waits for samples that cannot be read > sources unreadable_samples_are_lost
- trainer.tally.waiting -= len(batch.whole) + len(batch.missing)
+ trainer.tally.waiting -= len(batch.whole)
# --- resume and checkpoints ---
resume: progress begins again > resume a_trainer_goes_on
- KEPT = ("readable", "times_activated", "rows", "changes", "progress", "flops", "uncounted")
+ KEPT = ("readable", "times_activated", "rows", "changes", "flops", "uncounted")
resume: the gate forgets the phase of its selection > gate a_gate_restored_from
- self.clock, self.phase = state["clock"], state["phase"]
+ self.clock = state["clock"]
resume: views are drawn with the state of the order's generator > resume cut_at_any_moment
- trainer.train_source.generator.set_state(state["generators"][1])
+ trainer.train_source.generator.set_state(state["generators"][0])
resume: a checkpoint of other settings is taken up > resume where_the_newest_checkpoint
- if stored["identity"] != self.identity:
+ if stored["identity"][2] != self.identity[2]:
checkpoints: the one before the newest is not kept > resume a_checkpoint_comes_back
- for old in there[:-1] * (world()[0] == 0):
+ for old in there * (world()[0] == 0):
checkpoints: a cut epoch that is trained again costs nothing > resume what_a_cut_epoch
- costs["repeated"][unit] = (costs["repeated"][unit] or 0) + now[unit] - before
+ costs["repeated"][unit] = costs["repeated"][unit] or 0
# --- data and sources ---
views: an edge is repeated, not reflected > run a_view_is_the
- return torch.where(index < size, index, 2 * (size - 1) - index)
+ return torch.where(index < size, index, 2 * size - 1 - index)
subset: the first that come, whatever their classes > data a_subset_is_as
- return np.sort(order[np.argsort(turn[order], kind="stable")[:size]])
+ return np.sort(order[:size])
sources: one percent unreadable is too many already > sources up_to_one_percent
- if len(unreadable) > 0.01 * count:
+ if len(unreadable) >= 0.01 * count:
photographs: width and height of the box are mixed up > photos boxes_lie_in_the
@ imagenet100_ast.py
- left, top = int(across * (width - w + 1)), int(down * (height - h + 1))
+ left, top = int(across * (width - h + 1)), int(down * (height - w + 1))
photographs: the second of a class is set aside as well > photos a_single_folder_of
@ imagenet100_ast.py
- split = "val" if place * share % 1000 < share else "train"
+ split = "val" if place * share % 1000 <= share else "train"
recipe: a last layer that fits is hurried like a new one > finetuning a_new_head_on
@ imagenet100_ast.py
- faster = HEAD_RATE if new and getattr(model, "new_head", False) else 1
+ faster = HEAD_RATE if new else 1
# --- pump, dashboard and pictures ---
pump: a front end is told that its slider is still in hand > kernels a_front_end_is[newest]
- self.kernel._publish_status("idle", "shell", message)
+ self.kernel._publish_status("busy", "shell", message)
dashboard: nobody may change their mind before a wish is taken up > dashboard a_person_may_change
- if self.controls.asked or new != self.controls.values[control]:
+ if new != self.controls.values[control]:
pictures: the rate is the mean since the start > pictures a_history_of_results
- now["rate"] = (now["activated"] - before["activated"]) / (now["candidates"] - before["candidates"])
+ now["rate"] = now["activated"] / now["candidates"]
pictures: of several seeds the first one's are drawn > pictures of_several_seeds_the
- draw_panels(figure, [h for h in histories if h.seed == histories[-1].seed], panels)
+ draw_panels(figure, [h for h in histories if h.seed == histories[0].seed], panels)
# --- run, report, flags, settings ---
run: the file of events is not told of a change > resume a_stop_is_no
- if event in ("start", "epoch", "control"):
+ if event in ("start", "epoch"):
report: a run that was cut counts in the means > resume a_run_that_was
- results = [r for r in results if r["complete"]] or results
+ results = [r for r in results if r["epochs"]]
flags: the profile beats what a person typed > finetuning a_profile_sets_what
@ imagenet100_ast.py
- settings = replace(settings, **(profile | values))
+ settings = replace(settings, **(values | profile))
settings: an interval leaves out its upper end > controller feedback_restores_the_rate
- inside = low < value < high or (bound[0], value) == ("[", low) or (bound[-1], value) == ("]", high)
+ inside = low < value < high or (bound[0], value) == ("[", low)
"""


@dataclass
class Fault:
    """A slip of one line, and the test that is to catch it."""

    name: str
    test: str
    program: str = "cifar10_ast.py"
    old: str = ""
    new: str = ""

    def into(self, text: str) -> str:
        """A program's text with the fault. Raises ValueError unless the old line is in it once."""
        lines = text.splitlines(keepends=True)
        places = [place for place, line in enumerate(lines) if line.strip() == self.old]
        if len(places) != 1:
            raise ValueError(f"does not apply, {len(places)} lines of {self.program} are: {self.old}")
        lines[places[0]] = lines[places[0]].replace(self.old, self.new)
        return "".join(lines)


def read(text: str = FAULTS) -> list[Fault]:
    """The faults that a text such as FAULTS tells of."""
    faults: list[Fault] = []
    for line in text.strip().splitlines():
        mark, _, rest = line.partition(" ")
        if mark in ("@", "-", "+"):
            setattr(faults[-1], {"@": "program", "-": "old", "+": "new"}[mark], rest)
        elif mark != "#":
            name, _, test = line.rpartition(" > ")
            faults.append(Fault(name, test_of(*test.split(" "))))
    return faults


def test_of(file: str, words: str) -> str:
    """The id of the only test of a file that begins with these words. Raises ValueError for none or more."""
    start, bracket, case = words.partition("[")
    path = f"tests/test_{file}.py"
    found = re.findall(rf"^def (test_{start}\w*)", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
    if len(found) != 1:
        raise ValueError(f"{path}: expected one test that begins with test_{start}, found {found}")
    return f"{path}::{found[0]}{bracket}{case}"


def outcome(folder: Path, *tests: str) -> tuple[int, str]:
    """pytest's exit status in a copy of the repository, and the test that failed, or else its last words."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    how = {"cwd": folder, "env": environment, "timeout": PATIENCE, "capture_output": True, "text": True}
    try:
        done = subprocess.run(command, check=False, **how)
    except subprocess.TimeoutExpired:
        return 124, f"no end after {PATIENCE} s"
    failed = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return done.returncode, failed[1] if failed else (done.stdout + done.stderr).strip().splitlines()[-1]


def tried(fault: Fault, folder: Path) -> tuple[int, str]:
    """The outcome of a fault's tests in a copy that has it; the copy is mended again."""
    program = folder / "standalone" / fault.program
    notebook = folder / "notebooks" / f"{program.stem}.ipynb"  # which kernels are given
    whole = {path: path.read_text(encoding="utf-8") for path in (program, notebook)}
    try:
        program.write_text(fault.into(whole[program]), encoding="utf-8")
        old, new = (json.dumps(line)[1:-1] for line in (fault.old, fault.new))
        notebook.write_text(whole[notebook].replace(old, new), encoding="utf-8")
        return outcome(folder, fault.test)
    except ValueError as error:
        return 2, str(error)
    finally:
        for path, text in whole.items():
            path.write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="WORDS", default="", help="faults with these words in their name")
    only, began, caught = parser.parse_args().only, time.monotonic(), 0
    faults = [fault for fault in read() if only in fault.name]
    with tempfile.TemporaryDirectory() as name:
        for path in (ROOT / needed for needed in NEEDED.split()):
            (shutil.copytree if path.is_dir() else shutil.copy)(path, Path(name) / path.name)
        status, words = outcome(Path(name), *sorted({fault.test for fault in faults}))
        if status:
            print(f"without any fault, {words}: mend that first")
            return 1
        for fault in faults:
            status, words = tried(fault, Path(name))
            verdict = {0: "MISSED", 1: f"caught by {words}"}.get(status, f"NOT TRIED, {words}")
            print(f"{fault.name}: {verdict}", flush=True)
            caught += status == 1
    print(f"{caught} of {len(faults)} caught in {time.monotonic() - began:.0f} s")
    return int(caught < len(faults))


if __name__ == "__main__":
    sys.exit(main())
