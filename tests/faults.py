"""Sixty faults, a line each, that the tests must catch: a guard over the tests themselves.

    python tests/faults.py               # every fault; takes minutes, so the suite does not run it
    python tests/faults.py --only WORDS  # those with WORDS in their name
    python tests/faults.py --list        # names and tests

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
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
NEEDED = "standalone tests data_setup benchmarks docs notebooks build_notebooks.py pyproject.toml README.md"
NEEDED += " requirements.txt requirements-dev.txt"
PATIENCE = 600  # seconds for the tests of one fault

# A name, then lines that begin with
#   @  the program, where it is not cifar10_ast.py (of a shared cell either serves)
#   -  the old line, which stands once in the program; how far it is indented does not matter
#   +  the new line
#   >  the fastest test that catches it; "gate ties" is test_ties of test_gate.py
FAULTS = r"""
# --- gate and memory ---
significance: softmax over the samples, not over the classes
- return (logits.softmax(1) - F.one_hot(labels, logits.shape[1])).norm(dim=1)
+ return (logits.softmax(0) - F.one_hot(labels, logits.shape[1])).norm(dim=1)
> gate significance_is_what_a_hand_computes_without_gradient
memory: a tenth of the new value in place of half
- self.significance[indices] = torch.where(before.isinf(), values, 0.5 * values + 0.5 * before)
+ self.significance[indices] = torch.where(before.isinf(), values, 0.1 * values + 0.9 * before)
> gate memory_halves_old_and_new_and_ignores_what_is_not_finite
memory: ties count in full
- u = torch.from_numpy((below + upto) / (2 * len(reference))).float()
+ u = torch.from_numpy(upto / len(reference)).float()
> gate unseen_samples_rank_highest_and_ties_share_a_rank
guard: waits for one visit more than are counted
- return torch.where(self.stuck[indices] >= self.VISITS, 0.5, u) if self.guard else u
+ return torch.where(self.stuck[indices] > self.VISITS, 0.5, u) if self.guard else u
> gate the_guard_lets_go_of_a_sample_whose_loss_falls
guard: holds a hard sample although its loss falls
- stays = (values > self._top()) & (before.isinf() | (values >= self.FALL * before))
+ stays = values > self._top()
> gate the_guard_lets_go_of_a_sample_whose_loss_falls
gate: no floor below the easy samples
- return floor + (1 - floor) * torch.sigmoid((u - threshold) / temperature)
+ return (1 - floor) * torch.sigmoid((u - threshold) / temperature)
> gate probability_rises_with_rank_and_never_falls_below_the_floor
gate: what has waited may fill the whole choice
- oldest = wait.topk(int(0.5 * target * len(candidates))).indices
+ oldest = wait.topk(int(target * len(candidates))).indices
> gate a_raised_target_does_not_fill_the_choice_with_what_has_waited
balance: max for min in the waiting time of a class
- self.class_wait = (even / self.sizes).clamp(max=1)  # a large class's turn comes round more slowly
+ self.class_wait = (even / self.sizes).clamp(min=1)  # a large class's turn comes round more slowly
> gate balance_activates_as_many_of_every_class_the_significant_first
live gate: measures against the oldest scores
- self.recent = torch.cat([self.recent, scores[finite]])[-self.RECENT :]
+ self.recent = torch.cat([self.recent, scores[finite]])[: self.RECENT]
> gate the_live_gate_holds_the_rate_on_a_drifting_stream_and_takes_the_hardest
live gate: takes a sample whose score is not finite
- taken = (finite & above).nonzero().flatten()
+ taken = above.nonzero().flatten()
> gate the_live_gate_holds_the_rate_on_a_drifting_stream_and_takes_the_hardest
# --- controller ---
controller: the correction has the wrong sign
- self.value = solved + (self.KP * self.error + self.integral) / min(slope, -1e-3)
+ self.value = solved - (self.KP * self.error + self.integral) / min(slope, -1e-3)
> controller feedback_restores_the_rate_where_samples_are_lost
controller: lost samples count as delivered
- error = target - (activated - self.lost) / candidates
+ error = target - (activated + self.lost) / candidates
> controller feedback_restores_the_rate_where_samples_are_lost
controller: max for min in the room of the integral
- room = min(target, 1 - target)  # anti-windup: ask for at most that much more or less
+ room = max(target, 1 - target)  # anti-windup: ask for at most that much more or less
> controller the_feedback_asks_for_no_more_than_there_is
controller: the pure loop winds up at its stop
- elif self.stops[0] < self.value < self.stops[1] or self.error * (self.value - 0.5) > 0:
+ elif self.stops[0] < self.value < self.stops[1] or self.error * (self.value - 0.5) < 0:
> controller the_integral_does_not_wind_up_while_the_threshold_is_at_its_stop
controller: the smoothed error forgets what was before
- self.error += alpha * (error - self.error)
+ self.error = alpha * error
> controller the_pure_loop_with_the_documented_gains_finds_its_target
controller: a row shows the rate mirrored at the target
- "ema": target - self.error,
+ "ema": target + self.error,
> controller the_feedback_asks_for_no_more_than_there_is
# --- selection and schedule ---
selection: every chunk begins at the same phase
- return torch.from_numpy(taken), float(edges[-1]) % 1.0 if len(p) else phase
+ return torch.from_numpy(taken), phase
> controller every_epoch_meets_its_target_and_undisturbed_the_feedback_stays_zero
random gate: the fraction is not carried to the next chunk
- self.owed -= count
+ self.owed = 0.0
> gate random_realises_given_counts_exactly
threshold: the bracket closes from the wrong side
- low, high = (threshold, high) if excess > 0 else (low, threshold)
+ low, high = (threshold, high) if excess < 0 else (low, threshold)
> gate the_solved_threshold_meets_the_count
schedule: the anneal begins an epoch late
- return "anneal" if epoch >= self.epochs - self.anneal else "sparse"
+ return "anneal" if epoch > self.epochs - self.anneal else "sparse"
> controller phases_follow_one_another_and_end_full
schedule: the ramp begins an epoch late
- t = (epoch - self.warmup + 1) / (self.ramp + 1)
+ t = (epoch - self.warmup) / (self.ramp + 1)
> trainer listeners_are_told_in_order_what_the_run_does
schedule: the learning rate jumps down after its rise
- return 0.2 + 4.0 * progress if progress < 0.2 else (1 - progress) / 0.8
+ return 0.2 + 4.0 * progress if progress < 0.2 else 1 - progress
> controller the_learning_rate_is_continuous_and_ends_at_zero
# --- ledger, FLOPs and joules ---
unit energy: the activated are charged as skipped as well
- return UNIT_ACTIVATED * self.activated + UNIT_SKIPPED * (self.candidates - self.activated)
+ return UNIT_ACTIVATED * self.activated + UNIT_SKIPPED * self.candidates
> ledger unit_energy_is_ten_for_the_activated_and_a_tenth_for_the_skipped
ledger: after a charge nobody pays
- self.switch(before)
+ self.switch(None)
> ledger every_second_and_joule_goes_to_one_phase_only
ledger: joules of the last stretch only
- cost.joules = (cost.joules or 0.0) + now[1] - self.since[1]
+ cost.joules = now[1] - self.since[1]
> ledger every_second_and_joule_goes_to_one_phase_only
FLOPs: of a batch, not of a sample
- return counter.get_total_flops() / len(images), sorted(counter.uncounted), logits
+ return counter.get_total_flops(), sorted(counter.uncounted), logits
> ledger flops_of_simple_cnn_are_what_a_hand_counts
joules: the last power for the whole interval
- self.total += (now - before) * 0.5 * (last + power)
+ self.total += (now - before) * power
> ledger without_a_counter_power_is_polled_at_ten_hertz_or_more_until_that_fails_too
ledger: the scoring pass is charged to the phase
- with trainer.ledger.charge("scoring"):
+ with trainer.ledger.charge(trainer.phase):
> trainer the_live_gate_reads_every_candidate_and_charges_its_scoring
# --- one step ---
step: buffers that are not finite are not looked at
- ok = norm.isfinite() & after.isfinite().all().to(norm.device)
+ ok = norm.isfinite()
> step a_step_where_something_is_not_finite_is_as_if_never_taken
step: the mean over a part, not over the batch
- scaler.scale((torch.where(finite, losses, 0) * weights).sum() / count).backward()
+ scaler.scale((torch.where(finite, losses, 0) * weights).mean()).backward()
> step a_step_in_halves_has_the_losses_scores_and_gradients_of_the_whole_batch
step: a score stays where the loss is not finite
- return losses, torch.where(losses.isfinite(), scores, math.nan), taken
+ return losses, scores, taken
> step a_sample_whose_loss_is_not_finite_has_no_score
out of memory: a step done again counts its batch twice
- put_back(float_buffers(model), before)
+ put_back(float_buffers(model), joined(float_buffers(model)))
> step a_step_that_is_done_again_counts_its_batch_once_in_batch_norm
out of memory: a sample may be left alone
- parts = max(1, min(math.ceil(count / self.limit), count // 2))  # batch norm needs two
+ parts = max(1, min(math.ceil(count / self.limit), count))  # batch norm needs two
> step parts_fit_miss_nothing_leave_no_sample_alone_and_are_learned_once
evaluation: frozen batch norm thaws
- module.training = flag
+ module.training = True
> step evaluating_gives_every_module_its_own_flag_back
# --- the loop ---
loop: the gate is asked with less than two batches in hand
- while len(indices) < 2 * size and tally.candidates < len(order):
+ while len(indices) < size and tally.candidates < len(order):
> sources the_gate_is_asked_only_when_its_batches_are_due
loop: what is chosen after the loader are other samples' images
- rows = order[torch.searchsorted(self.indices[order], indices.contiguous())]
+ rows = torch.searchsorted(self.indices[order], indices)
> sources every_activated_sample_is_trained_on_once_in_full_batches
loop: packing leaves a short last batch
- full, held = held.cut(batch_length(len(held), size))
+ full, held = held.cut(size)
> sources every_activated_sample_is_trained_on_once_in_full_batches
loop: epochs without a gate count as chosen
- self.times_activated[indices] += self.rate < 1
+ self.times_activated[indices] += 1
> trainer results_follow_from_the_epochs
progress: the epoch in hand counts twice
- later = trainer.schedule.steps(trainer.epoch + 1, trainer.target, tally.n, size)
+ later = trainer.schedule.steps(trainer.epoch, trainer.target, tally.n, size)
> trainer progress_never_goes_back_and_ends_at_one_whatever_is_dragged
progress: waits for samples that cannot be read
- self.tally.waiting -= len(batch) + len(batch.missing)
+ self.tally.waiting -= len(batch)
> sources unreadable_samples_are_lost_to_the_gate_and_not_asked_for_again
# --- resume and checkpoints ---
resume: progress begins again
- KEPT = ("readable", "times_activated", "rows", "changes", "progress", "flops", "uncounted")
+ KEPT = ("readable", "times_activated", "rows", "changes", "flops", "uncounted")
> resume a_trainer_goes_on_from_the_end_of_any_epoch_to_the_same_bits
resume: the gate forgets the phase of its selection
- self.clock, self.phase = state["clock"], state["phase"]
+ self.clock = state["clock"]
> gate a_gate_restored_from_its_state_goes_on_alike
resume: views are drawn with the state of the order's generator
- trainer.train_source.generator.set_state(state["generators"][1])
+ trainer.train_source.generator.set_state(state["generators"][0])
> resume cut_at_any_moment_and_resumed_a_run_ends_as_if_nobody_had_cut_it
resume: how much memory has room for is not saved
- "limit": trainer.in_parts.limit,
+ "limit": math.inf,
> resume what_a_person_set_and_what_was_learned_of_the_data_and_of_memory_go_on
checkpoints: the one before the newest is not kept
- for old in there[:-1]:
+ for old in there:
> resume a_checkpoint_comes_back_as_it_was_and_two_are_kept
checkpoints: a cut epoch that is trained again costs nothing
- repeated.seconds += now.seconds - before.seconds
+ repeated.seconds += 0.0
> resume what_a_cut_epoch_cost_counts_as_repeated
# --- data and sources ---
views: an edge is repeated, not reflected
- return torch.where(index < size, index, 2 * (size - 1) - index)
+ return torch.where(index < size, index, 2 * size - 1 - index)
> run a_view_is_the_image_shifted_by_up_to_four_pixels_and_maybe_mirrored_by_its_generator_alone
subset: the first that come, whatever their classes
- return np.sort(order[np.argsort(turn[order], kind="stable")[:size]])
+ return np.sort(order[:size])
> data a_subset_is_as_even_as_the_classes_allow
sources: one percent unreadable is too many already
- if len(unreadable) > 0.01 * count:
+ if len(unreadable) >= 0.01 * count:
> sources up_to_one_percent_unreadable_samples_are_dropped_and_counted_once
photographs: width and height of the box are mixed up
@ imagenet100_ast.py
- left, top = int(across * (width - w + 1)), int(down * (height - h + 1))
+ left, top = int(across * (width - h + 1)), int(down * (height - w + 1))
> photos boxes_lie_in_the_picture
photographs: the second of a class is set aside as well
@ imagenet100_ast.py
- split = "val" if place * share % 1000 < share else "train"
+ split = "val" if place * share % 1000 <= share else "train"
> photos a_single_folder_of_classes_is_split_by_class
recipe: a last layer that fits is hurried like a new one
@ imagenet100_ast.py
- faster = HEAD_RATE if new and getattr(model, "new_head", False) else 1
+ faster = HEAD_RATE if new else 1
> finetuning a_new_head_on_pretrained_weights_learns_faster_than_the_rest
# --- pump, dashboard and pictures ---
pump: a front end is told that its slider is still in hand
- self.kernel._publish_status("idle", "shell", message)
+ self.kernel._publish_status("busy", "shell", message)
> kernels a_front_end_is_told_at_once_that_a_slider_was_heard[newest-cifar10_ast]
dashboard: nobody may change their mind before a wish is taken up
- if self.controls.asked or new != self.controls.values[control]:
+ if new != self.controls.values[control]:
> dashboard a_person_may_change_their_mind_before_anything_is_applied
pictures: the rate is the mean since the start
- now["rate"] = (now["activated"] - before["activated"]) / (now["candidates"] - before["candidates"])
+ now["rate"] = now["activated"] / now["candidates"]
> pictures a_history_of_results_tells_what_the_events_told
pictures: of several seeds the first one's are drawn
- draw_panels(figure, [h for h in histories if h.seed == histories[-1].seed], panels)
+ draw_panels(figure, [h for h in histories if h.seed == histories[0].seed], panels)
> pictures of_several_seeds_the_last_ones_runs_are_drawn
# --- run, report, flags, settings ---
run: the file of events is not told of a change
- if event in ("start", "epoch", "control"):
+ if event in ("start", "epoch"):
> resume a_stop_is_no_change_that_could_be_dropped
report: a run that was cut counts in the means
- results = [r for r in results if r["complete"]] or results
+ results = [r for r in results if r["epochs"]]
> resume a_run_that_was_cut_counts_in_no_mean_and_in_no_comparison
flags: the profile beats what a person typed
@ imagenet100_ast.py
- settings = replace(settings, **(profile | values))
+ settings = replace(settings, **(values | profile))
> finetuning a_profile_sets_what_nobody_else_did_and_bad_values_are_refused
settings: an interval leaves out its upper end
- inside = low < value < high or (bound[0], value) == ("[", low) or (bound[-1], value) == ("]", high)
+ inside = low < value < high or (bound[0], value) == ("[", low)
> controller feedback_restores_the_rate_where_samples_are_lost
"""


@dataclass
class Fault:
    """A slip of one line, and the tests that are to catch it."""

    name: str
    program: str = "cifar10_ast.py"
    old: str = ""
    new: str = ""
    tests: list[str] = field(default_factory=list)

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
        if mark == ">":
            file, _, test = rest.partition(" ")
            faults[-1].tests.append(f"tests/test_{file}.py::test_{test}")
        elif mark in ("@", "-", "+"):
            setattr(faults[-1], {"@": "program", "-": "old", "+": "new"}[mark], rest)
        elif mark != "#":
            faults.append(Fault(line))
    return faults


def outcome(folder: Path, tests: Iterable[str]) -> tuple[int, str]:
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
        return outcome(folder, fault.tests)
    except ValueError as error:
        return 2, str(error)
    finally:
        for path, text in whole.items():
            path.write_text(text, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="WORDS", default="", help="faults with these words in their name")
    parser.add_argument("--list", action="store_true", help="names and tests, without a run")
    options, began, caught = parser.parse_args(), time.monotonic(), 0
    faults = [fault for fault in read() if options.only in fault.name]
    if options.list:
        print("\n".join(f"{fault.name}\n    {' '.join(fault.tests)}" for fault in faults))
        return 0
    with tempfile.TemporaryDirectory() as name:
        for path in (ROOT / needed for needed in NEEDED.split()):
            (shutil.copytree if path.is_dir() else shutil.copy)(path, Path(name) / path.name)
        status, words = outcome(Path(name), sorted({test for fault in faults for test in fault.tests}))
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
