"""The run from end to end: policies and seeds, what it writes and prints, where, and how it ends."""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from conftest import ROOT, changes, files, rows, small_net, summary, write_images

import cifar10_ast as ast

pytestmark = pytest.mark.usefixtures("small_nets")
N, VAL, EPOCHS = 120, 40, 5  # training and validation images; an epoch of 20 chunks, batches of 16
OUTPUTS = "config.json metrics.jsonl events.jsonl summary.json curves.png model.pt samples.npz checkpoints"
POLICIES = ["ast", "full", "random", "short"]


def settings_of(out, **given):
    values = {"data": "shapes", "train_size": N, "batch_size": 16, "epochs": EPOCHS, "device": "cpu"}
    return replace(ast.Settings(), **values | {"amp": "off", "lr": 0.02, "out": str(out)} | given)


class Ran:
    """A run on a few shapes, and all that it said and told."""

    def __init__(self, out, listeners=(), controls=None, data=None, **given):
        self.out, self.said, self.told = out, [], []
        listeners = [ast.print_table(False, self.said.append), *listeners]
        listeners.append(lambda event, data: self.told.append((event, dict(data))))
        data = data or ast.shapes(N, VAL)
        self.summary = ast.run(settings_of(out, **given), (), listeners, controls, self.said.append, data)
        self.printed = "\n".join(self.said).splitlines()


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A finished run of every policy with two seeds."""
    folder = tmp_path_factory.mktemp("ran")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ast, "build_model", small_net)
        return Ran(folder / "out", compare="full,random,short", seeds="3,1")


# --- files, and the keys that other programs read ---


def test_the_folder_holds_everything_and_nothing_is_written_beside_it(ran):
    assert {path.name for path in ran.out.iterdir()} == set(OUTPUTS.split())
    assert [path.name for path in ran.out.parent.iterdir()] == ["out"]
    assert {path.suffix for path in (ran.out / "checkpoints").iterdir()} == {".ckpt"}
    config = json.loads((ran.out / "config.json").read_text())
    assert config["program"] == "cifar10_ast"
    expected = settings_of(
        ran.out, compare="full,random,short", seeds="3,1", data_dir="./data", resolution="full"
    )
    assert config["settings"] == vars(expected)
    assert ran.summary == summary(ran.out)


NUMBER, MAYBE = (int, float), (int, float, type(None))
SUMMARY = {"program": str, "dataset": str, "synthetic": bool, "n_train": int, "n_val": int}
SUMMARY |= {"chance_percent": NUMBER, "steps_per_epoch": int, "model": str}
SUMMARY |= {"device": str, "platform": str, "torch": str, "out": str, "seeds": list, "complete": bool}
SUMMARY |= {"stopped_by": (str, type(None)), "changes_by_hand": int, "skipped_images": int}
SUMMARY |= {"policies": dict, "references": dict, "measured": dict, "clock": (str, type(None))}
POLICY = dict.fromkeys("final_accuracy best_accuracy activation_rate candidates activated".split(), NUMBER)
POLICY |= dict.fromkeys("train_seconds total_seconds flops unit_energy".split(), NUMBER)
POLICY |= {"joules": MAYBE, "joules_method": str, "flops_per_sample": dict, "flops_uncounted": list}
POLICY |= {"phases": dict, "accuracy_per_seed": dict, "energy_savings_percent": NUMBER}
POLICY |= {"peak_memory_mib": MAYBE}
MEASURED = "speedup_vs_full total_speedup_vs_full flops_saved_percent_vs_full joules_saved_percent_vs_full"
MEASURED += " accuracy_minus_full accuracy_minus_random accuracy_minus_short accuracy_minus_dense"
MEASURED += " accuracy_minus_dense-short accuracy_minus_keep-short"
METRICS = "policy seed epoch phase train_loss val_accuracy target_activation activation_rate mean_activation"
METRICS += " threshold controller candidates activated seconds elapsed_seconds data_wait_percent"
METRICS += " learning_rate significance_quantiles resolution"


def assert_types(found, expected):
    assert list(found) == list(expected)
    for name, kind in expected.items():
        assert isinstance(found[name], kind), name


def test_the_summary_has_the_keys_and_types_of_the_first_edition(ran):
    found = summary(ran.out)
    assert_types(found, SUMMARY)
    assert (found["program"], found["dataset"], found["synthetic"]) == ("cifar10_ast", "shapes", True)
    assert (found["n_train"], found["n_val"], found["seeds"]) == (N, VAL, [3, 1])
    assert (found["complete"], found["stopped_by"]) == (True, None)
    assert list(found["policies"]) == POLICIES
    assert list(found["measured"]) == MEASURED.split()
    for policy in found["policies"].values():
        assert_types(policy, POLICY)
        assert list(policy["phases"]) == list(ast.PHASES)
        for phase in policy["phases"].values():
            assert set(phase) == {"seconds", "candidates", "activated", "flops", "joules", "unit_energy"}


def test_the_summarys_figures_follow_from_one_another_and_are_means_over_seeds(ran):
    policies, epochs = summary(ran.out)["policies"], rows(ran.out)
    for name, policy in policies.items():
        own = [row for row in epochs if row["policy"] == name]
        last = {str(row["seed"]): row["val_accuracy"] for row in own}
        assert policy["accuracy_per_seed"] == last
        assert list(last) == ["3", "1"]
        assert policy["final_accuracy"] == pytest.approx(sum(last.values()) / 2)
        best = [max(row["val_accuracy"] for row in own if row["seed"] == seed) for seed in (3, 1)]
        assert policy["best_accuracy"] == pytest.approx(sum(best) / 2)
        for key in ("candidates", "activated"):
            assert policy[key] == sum(row[key] for row in own) / 2
            assert policy[key] == sum(phase[key] for phase in policy["phases"].values())
        assert policy["activation_rate"] == pytest.approx(policy["activated"] / policy["candidates"])
        unit = 10 * policy["activated"] + 0.1 * (policy["candidates"] - policy["activated"])
        assert policy["unit_energy"] == pytest.approx(unit)
        saved = 100 * (1 - unit / (10 * policy["candidates"]))
        assert policy["energy_savings_percent"] == pytest.approx(saved)
        seconds = {phase: cost["seconds"] for phase, cost in policy["phases"].items()}
        assert policy["total_seconds"] == pytest.approx(sum(seconds.values()))
        beside = sum(seconds[phase] for phase in ("evaluation", "checkpoint", "repeated"))
        assert policy["train_seconds"] == pytest.approx(policy["total_seconds"] - beside)
        per, evaluated = policy["flops_per_sample"], VAL * len(own) / 2
        flops = policy["activated"] * per["training"] + evaluated * per["evaluation"]
        assert policy["flops"] == pytest.approx(flops)
        assert (policy["joules"] is None) == policy["joules_method"].startswith("unavailable (")
    measured, main, full = summary(ran.out)["measured"], policies["ast"], policies["full"]
    assert measured["speedup_vs_full"] == pytest.approx(full["train_seconds"] / main["train_seconds"])
    assert measured["flops_saved_percent_vs_full"] == pytest.approx(100 * (1 - main["flops"] / full["flops"]))
    for name in POLICIES[1:]:
        gap = main["final_accuracy"] - policies[name]["final_accuracy"]
        assert measured[f"accuracy_minus_{name}"] == pytest.approx(gap)


def test_metrics_have_a_row_an_epoch_with_the_keys_of_the_first_edition(ran):
    found = rows(ran.out)
    short = round(sum(row["activation_rate"] for row in found[:EPOCHS]))
    lengths = {"ast": EPOCHS, "full": EPOCHS, "random": EPOCHS, "short": short}
    expected = [(s, p, e) for s in (3, 1) for p in POLICIES for e in range(1, lengths[p] + 1)]
    assert [(row["seed"], row["policy"], row["epoch"]) for row in found] == expected
    for row in found:
        assert list(row) == METRICS.split()
        assert row["candidates"] == N
        assert row["activation_rate"] == pytest.approx(row["activated"] / N)
        assert 0 <= row["val_accuracy"] <= 100
        assert row["data_wait_percent"] <= 100
        assert math.isfinite(row["train_loss"])
        gated = row["policy"] == "ast" and row["phase"] in ("ramp", "sparse")
        assert (row["controller"] is not None) == (row["threshold"] is not None) == gated
        whole = row["policy"] in ("full", "short")
        assert row["activation_rate"] == (1 if whole else pytest.approx(row["target_activation"], abs=0.01))
    told = [data for event, data in ran.told if event == "epoch"]
    assert [{key: row[key] for key in METRICS.split()} for row in told] == found


def test_random_activates_as_many_as_ast_in_every_epoch_and_short_costs_as_much(ran):
    def counts(policy, seed):
        own = [row for row in rows(ran.out) if (row["policy"], row["seed"]) == (policy, seed)]
        return [row["activated"] for row in own]

    for seed in (3, 1):
        assert counts("random", seed) == counts("ast", seed)
        assert counts("ast", seed)[2] < N
        assert sum(counts("short", seed)) == pytest.approx(sum(counts("ast", seed)), abs=N / 2)
    last = [row for row in rows(ran.out) if row["policy"] == "short"][-1]
    assert last["learning_rate"] < 0.005, "its learning rate ends at zero as well"


def test_events_have_the_keys_of_the_first_edition_and_the_report_counts_changes(tmp_path):
    controls, seen, written = ast.Controls(), [], []

    def steer(event, data):
        seen.append(event)
        written.extend([len(changes(tmp_path / "out"))] if event == "control" else [])
        if seen.count("chunk") == 45 and event == "chunk":
            controls.set("target_activation", 0.1)
            controls.pause(True)
            controls.pause(False)

    ran = Ran(tmp_path / "out", [steer], controls, compare="none")
    first, *pauses = changes(ran.out)
    assert list(first) == ["time", "candidates", "control", "old", "new", "set_at", "applied_at"]
    assert (first["control"], first["old"], first["new"]) == ("target_activation", 0.4, 0.1)
    assert first["set_at"] <= first["applied_at"] == first["candidates"] < first["set_at"] + N / 10
    assert ([change["new"] for change in pauses], written) == ([True, False], [1, 2, 3]), "at once"
    assert ran.summary["changes_by_hand"] == 1, "a pause changes nothing"
    assert any("changes made by hand: 1 (events.jsonl)" in line for line in ran.printed)


def test_the_saved_model_is_the_first_policys_of_the_first_seed(ran):
    model = small_net(None, ast.shapes(N, VAL))
    saved = torch.load(ran.out / "model.pt", weights_only=True)
    assert saved["synthetic"] is True
    model.load_state_dict(saved["state_dict"])
    data = ast.shapes(N, VAL)
    with torch.no_grad():
        views = ast.plain_view(torch.from_numpy(data.val_images))
        right = model.eval()(views).argmax(1) == torch.from_numpy(data.val_labels)
    accuracy = summary(ran.out)["policies"]["ast"]["accuracy_per_seed"]["3"]
    assert 100 * float(right.float().mean()) == pytest.approx(accuracy, abs=100 / VAL)


def test_samples_tell_how_often_each_was_chosen(ran):
    times = np.load(ran.out / "samples.npz")["times_activated"]
    gated = [row["activated"] for row in rows(ran.out)[:EPOCHS] if row["phase"] in ("ramp", "sparse")]
    assert (len(times), times.sum(), times.max()) == (N, sum(gated), len(gated))


def test_another_run_renames_the_folder_and_overwrites_nothing(tmp_path):
    out, at_once = tmp_path / "out", {"time_limit": 1e-9, "compare": "none"}
    Ran(out, lr=0.03, **at_once)
    (out / "notes.txt").write_text("mine")
    first = files(out)
    Ran(out, lr=0.01, **at_once)
    assert files(tmp_path / "out-1") == first
    second = files(out)
    Ran(out, lr=0.02, **at_once)
    assert (files(tmp_path / "out-1"), files(tmp_path / "out-2")) == (first, second)
    assert json.loads((out / "config.json").read_text())["settings"]["lr"] == 0.02


def test_unreadable_images_are_counted_and_listed(tmp_path):
    data = replace(ast.shapes(N, VAL), unreadable=["train/a/1.png: no image", "train/b/\udcff.png: cut off"])
    ran = Ran(tmp_path / "out", data=data, compare="none", epochs=1)
    assert ran.summary["skipped_images"] == 2
    lines = (ran.out / "skipped_images.txt").read_text().splitlines()
    assert lines == ["train/a/1.png: no image", r"train/b/\udcff.png: cut off"]
    assert "unreadable images skipped: 2 (skipped_images.txt)" in ran.printed


# --- what is run ---


@pytest.mark.parametrize(
    "given,expected",
    [
        ({"compare": "none"}, {"ast": [0]}),
        ({"compare": "", "seeds": "2,2,2"}, {"ast": [2]}),
        ({"compare": "short,short", "seeds": "1,0,1"}, {"ast": [1, 0], "short": [1, 0]}),
        ({"gate": "live", "compare": "random"}, {"ast": [0], "random": [0]}),
        ({"gate": "random", "compare": "full,random"}, {"random": [0], "full": [0]}),
        ({"gate": "full", "compare": "full"}, {"full": [0]}),
    ],
    ids=str,
)
def test_each_policy_runs_once_a_seed_the_gate_under_test_first(tmp_path, given, expected):
    ran = Ran(tmp_path / "out", epochs=2, **given)
    found = {name: [int(s) for s in p["accuracy_per_seed"]] for name, p in ran.summary["policies"].items()}
    assert list(found.items()) == list(expected.items())
    plan = next(data for event, data in ran.told if event == "plan")
    assert list(plan["work"]) == list(expected)
    started = [(data["seed"], data["policy"]) for event, data in ran.told if event == "start"]
    assert started == [(seed, policy) for seed in next(iter(expected.values())) for policy in expected]
    assert started == [(seed, policy) for policy, seed in plan["left"]]
    assert (ran.summary["measured"]["speedup_vs_full"] is None) == (list(expected)[1:] != ["full"])


def test_a_view_is_the_image_shifted_by_up_to_four_pixels_and_maybe_mirrored_by_its_generator_alone():
    images = torch.randint(0, 256, (60, 16, 16, 3), generator=torch.Generator().manual_seed(1)).byte()
    state, found = torch.get_rng_state(), set()
    views, again, other = (ast.augment(images, torch.Generator().manual_seed(n)) for n in (2, 2, 3))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(views, again)
    assert not torch.equal(views, other)
    for image, view in zip(images.numpy(), views, strict=True):
        padded = torch.from_numpy(np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="reflect"))
        crops = {(y, x): padded[y : y + 16, x : x + 16] for y in range(9) for x in range(9)}
        ways = crops | {(*place, "mirrored"): crop.flip(1) for place, crop in crops.items()}
        plain = ast.plain_view(torch.stack(list(ways.values())), torch.Generator())
        [match] = (plain == view).flatten(1).all(1).nonzero().flatten().tolist()
        found.add(list(ways)[match])
    assert len(found) > 30
    assert {len(way) for way in found} == {2, 3}


def test_a_seed_decides_everything(tmp_path):
    one, same, other = (
        rows(Ran(tmp_path / name, compare="none", epochs=2, seeds=seed).out, timed=False)
        for name, seed in (("one", "5"), ("same", "5"), ("other", "6"))
    )
    assert one == same
    assert [row["train_loss"] for row in one] != [row["train_loss"] for row in other]


def test_prepared_data_serve_the_run(tmp_path, capsys):
    settings, data = ast.prepare(settings_of(tmp_path / "out", compare="none", epochs=1))
    assert "SYNTHETIC images, made by this program: shapes, 120 training" in capsys.readouterr().out
    assert (settings.device, settings.data_dir) == ("cpu", "./data")
    found = ast.run(settings, listeners=[], say=lambda line: None, data=data)
    assert (found["n_train"], found["n_val"], found["complete"]) == (N, 1000, True)


KAGGLE, COLAB = {"KAGGLE_KERNEL_RUN_TYPE": "Batch"}, {"COLAB_RELEASE_TAG": "release"}
PLATFORMS = [({}, "runs/cifar10_ast", "./data"), (COLAB, "/content/cifar10_ast", "/content/data")]
PLATFORMS += [(env, "/kaggle/working/cifar10_ast", "/kaggle/temp/data") for env in (KAGGLE, COLAB | KAGGLE)]


@pytest.mark.parametrize("env,out,data_dir", PLATFORMS)
def test_results_and_downloads_go_where_the_platform_keeps_them(monkeypatch, env, out, data_dir):
    for name in KAGGLE | COLAB:
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    found = ast.settings_for_run(replace(ast.Settings(), device="cpu"))
    assert (found.out, found.data_dir) == (out, data_dir)
    own = ast.settings_for_run(replace(ast.Settings(), device="cpu", out="here", data_dir="there"))
    assert (own.out, own.data_dir) == ("here", "there")


# --- what it says ---


def test_only_settings_that_differ_from_the_defaults_are_printed(ran):
    assert ran.printed[0] == "cifar10_ast: 8 runs: ast, full, random, short, with 2 seeds each"
    assert ran.printed[1].startswith("  torch ")
    first = next(place for place, line in enumerate(ran.printed) if line.startswith("data: "))
    assert max(map(len, ran.printed[2:first])) <= 80
    text = " ".join(line.strip() for line in ran.printed[2:first])
    shown = dict(re.findall(r"(\w+)=(\S+?)(?:, |$)", text))
    settings = replace(settings_of(ran.out), compare="full,random,short", seeds="3,1", data_dir="./data")
    own = {item.name: item.default for item in fields(settings)}
    assert shown == {n: str(v) for n, v in vars(settings).items() if n in own and v != own[n]}


def test_synthetic_data_are_called_so_at_the_beginning_and_at_the_end(ran):
    assert next(line for line in ran.printed if line.startswith("data:")).startswith("data: SYNTHETIC images")
    assert ran.printed[-3:] == [
        *("SYNTHETIC data: these figures say nothing about real images", ""),
        f"results: {ran.out}",
    ]


def test_the_tables_fit_80_columns_and_line_up(ran):
    starts = [line for line in ran.printed if line.startswith("policy ")]
    lines = [line for line in ran.printed if re.match(r"(ast|full|random|short) +\d", line)]
    assert len(starts) == 8 + 1, "one before each run, one at the end"
    assert len(lines) == len(rows(ran.out)) + 4
    assert {len(line) for line in lines[-4:]} == {len(starts[-1])}
    assert {len(line) for line in lines[:-4]} == {len(starts[0])}
    row = {"policy": "dense-short", "epoch": 100, "epochs": 100, "phase": "warmup", "val_accuracy": 100.0}
    row |= {"train_loss": 12.3456, "activation_rate": 1.0, "target_activation": 1.0, "threshold": -1.25}
    assert len(ast.epoch_line(row | {"seconds": 35999.9}, "299/300", 35999)) <= 80
    numbers = [line.split()[1] for line in lines[:-4]]
    whole = len(rows(ran.out))
    assert numbers == [f"{epoch}/{whole}" for epoch in range(1, whole + 1)], "counted over the whole run"
    phases = {line.split()[2] for line in lines[:-4] if line.startswith(("full", "short"))}
    assert phases == {"-"}, "plain training has none"
    costs = {"final_accuracy": 100.0, "activation_rate": 1.0, "train_seconds": 86400, "total_seconds": 90000}
    costs |= {"flops": 9e17, "unit_energy": 1.3e12, "joules": 87654321.0}
    assert all(len(line) <= 80 for line in ast.table_of({"dense-short": costs}))
    assert [ast.clock(s) for s in (0, 59.4, 61, 3600, 86399)] == "0 s,59 s,1:01,1:00:00,23:59:59".split(",")


@pytest.mark.parametrize(
    "measured,told",
    [
        ({"speedup_vs_full": None},
         "no whole full run beside it (--compare full), so what is saved was not measured"),
        ({"accuracy_minus_random": 0.004}, "ast is ahead of random selection of as many samples: +0.00 "),
        ({"accuracy_minus_random": -2.0}, "ast is not ahead of random selection of as many samples: -2.00 "),
        ({"accuracy_minus_short": 0.0}, "ast is not ahead of plain training of as few epochs: +0.00 points"),
    ],
)  # fmt: skip
def test_the_report_tells_what_was_measured_whichever_way_it_fell(ran, measured, told):
    none = dict.fromkeys(MEASURED.split())
    lines = ast.report(ran.summary | {"measured": none | measured}).splitlines()
    [line] = [line for line in lines if line.startswith(told)]
    assert line.endswith("points") == ("ahead of" in told)
    assert "seeds: 2 (one proves nothing)" in lines
    others = [line for line in lines if "measured" in line or "ahead of" in line]
    assert len(others) == (1 if "speedup_vs_full" in measured else 2)


SPEED = {"speedup_vs_full": 0.8, "total_speedup_vs_full": 0.9, "flops_saved_percent_vs_full": 12.34}
SPEED |= {"accuracy_minus_full": -1.5}


@pytest.mark.parametrize("clock", [None, "equal epochs of full took 1.0 to 3.0 s"])
def test_one_saving_is_told_as_measured_and_no_time_where_the_clock_cannot_be_trusted(ran, clock):
    measured = dict.fromkeys(MEASURED.split()) | SPEED
    lines = ast.report(ran.summary | {"measured": measured, "clock": clock}).splitlines()
    told = lines[lines.index("", 1) + 1 :]
    if clock:
        assert told[0] == "ast saved 12.3 % of full training's FLOPs, at -1.50 points of accuracy"
        assert told[2] == f"  no time is quoted, as {clock}"
        assert not any("-25.0 %" in line or "-11.1 %" in line for line in told)
    else:
        assert told[0] == "ast saved -25.0 % of full training's time, at -1.50 points of accuracy"
        assert told[2] == "  with evaluation and checkpoints, which cost both as much: -11.1 %"
        assert told[3] == "  FLOPs, of which choosing and moving data are none: 12.3 %"
    assert re.fullmatch(r"  it trained on \d+.\d % fewer samples", told[1])
    assert sum(line.startswith("  unit energy (a model: ") for line in told) == 1
    assert max(map(len, told)) <= 80


def of(policy, seconds, rate=1.0, scoring=0.0, side=32):
    epochs = [{"seconds": s, "target_activation": rate, "resolution": side} for s in seconds]
    phases = {"scoring": {"seconds": scoring}}
    train = {"policy": policy, "seed": 0, "complete": True, "train_seconds": sum(seconds)}
    return train | {"epochs": epochs, "phases": phases}


@pytest.mark.parametrize(
    "results,doubted",
    [
        ([of("full", [9, 3, 3.4, 3])], None),
        ([of("full", [3, 3, 5, 3])], "equal epochs of full took 3.0 to 5.0 s"),
        ([of("full", [0.1, 0.1, 0.3])], None),
        ([of("ast", [3, 3], 0.4), of("random", [3, 3.5], 0.4)], None),
        (
            [of("ast", [3, 3], 0.4), of("random", [6, 6], 0.4)],
            "as many samples took ast 6.0 s and random 12.0 s",
        ),
        ([of("ast", [6, 6], 0.4, scoring=5.0), of("random", [3, 3], 0.4)], None),
    ],
)
def test_a_clock_is_doubted_where_equal_work_took_unequal_time(results, doubted):
    assert ast.doubt(results) == doubted


def test_an_accuracy_stands_beside_chance_and_what_few_images_can_tell(ran):
    few = {"n_val": 18, "steps_per_epoch": 2, "chance_percent": 50.0}
    assert ast.caution(ran.summary | few) == [
        "naming the commonest class each time would be right in 50.0 %",
        "only 18 validation images: each is 5.56 points",
        "only 2 steps an epoch: a smaller --batch-size learns faster",
    ]
    many = {"n_val": 500, "steps_per_epoch": 20, "chance_percent": 10.0}
    assert len(ast.caution(ran.summary | many)) == 1


@pytest.mark.parametrize("n,given,expected", [(20_000, None, 64), (90, None, 4), (30, None, 2), (90, 32, 32)])
def test_a_batch_leaves_twenty_steps_an_epoch_unless_somebody_set_it(n, given, expected):
    asked = ast.fill_defaults(ast.Settings(device="cpu", batch_size=given))
    assert ast.fitted(asked, ast.ImageData(*"abc", None, np.zeros(n), *"def")).batch_size == expected


def test_the_report_tells_of_references_and_how_to_go_on(ran):
    stopped = {"complete": False, "stopped_by": "SIGTERM", "references": {"a rule": {"words": "78 %, alone"}}}
    lines = ast.report(ran.summary | stopped).splitlines()
    assert "a rule: 78 %, alone" in lines
    assert lines[-1] == "stopped by SIGTERM: go on with --resume (or settings.resume = True)"


# --- the script ---


def test_the_script_alone_in_an_empty_folder_trains_on_ones_own_images(script):
    write_images(script.folder / "images", train=12, test=4)
    env = {"AST_DATA": "images", "AST_EPOCHS": "3", "AST_BATCH_SIZE": "16"}
    done = script("--batch-size", 8, "--compare", "random", env=env, check=0)
    assert done.stderr == ""
    assert {path.name for path in script.folder.iterdir()} == {"cifar10_ast.py", "images", "runs"}
    found = summary(out := script.folder / "runs" / "cifar10_ast")
    assert {path.name for path in out.iterdir()} == set(OUTPUTS.split())
    assert (found["dataset"], found["synthetic"]) == ("images", False)
    assert (found["n_train"], found["n_val"]) == (36, 12)
    assert json.loads((out / "config.json").read_text())["settings"]["batch_size"] == 8
    assert "SYNTHETIC" not in done.stdout
    assert f"results: {out.relative_to(script.folder)}" in done.stdout
    assert len([line for line in done.stdout.splitlines() if re.match(r"(ast|random) +\d/6", line)]) == 6
    assert found["policies"]["ast"]["final_accuracy"] > 50, "three colours are learned"


def test_importing_the_program_prints_and_writes_nothing_and_help_lists_every_setting(script):
    before = files(script.folder)
    code = f"import sys; sys.path.insert(0, {str(script.folder)!r}); import cifar10_ast; "
    code += "sys.argv[1:] = ['--help']; print('imported'); cifar10_ast.main()"
    done = subprocess.run(
        [sys.executable, "-I", "-B", "-c", code], cwd=script.folder, env={**os.environ, "COLUMNS": "1000"},
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    first, shown = " ".join(done.stdout.split()).split(" ", 1)
    assert (first, done.stderr) == ("imported", "")
    assert files(script.folder) == before
    for item in fields(ast.Settings):
        assert re.search(rf" {ast.flag(item.name)}[ ,].*{re.escape(item.metadata['help'])}", shown), item.name
    assert {"(default: 0.4)", "(default: auto)"} <= set(re.findall(r"\(default: \S+\)", shown))
    assert "--predict PATH" in shown, "no setting, but a flag"


@pytest.mark.parametrize(
    "name,code,words", [("SIGINT", 130, "Ctrl-C"), ("SIGTERM", 143, "SIGTERM"), ("SIGHUP", 129, "SIGHUP")]
)
def test_a_signal_saves_and_stops_with_128_and_its_number(tmp_path, monkeypatch, capfd, name, code, words):
    number, out = getattr(signal, name), tmp_path / "out"
    flags = f"--data shapes --train-size {N} --batch-size 16 --epochs 900 --compare none --out {out}"
    monkeypatch.setattr(sys, "argv", ["cifar10_ast.py", *flags.split()])
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(number, lambda *_: pytest.fail("the program does not listen"))

    def send():
        while not (out / "metrics.jsonl").exists() or not rows(out):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    try:
        assert ast.main() == code
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    shown, err = capfd.readouterr()
    assert err == f"{words}: saving and stopping; once more to stop at once\n"
    assert "--resume" in shown
    found = summary(out)
    assert (found["complete"], found["stopped_by"]) == (False, words)
    assert {path.name for path in out.iterdir()} == set(OUTPUTS.split())
    state = ast.read_checkpoint(ast.checkpoints(out / "checkpoints")[-1])
    assert found["policies"]["ast"]["final_accuracy"] == rows(out)[-1]["val_accuracy"]
    assert len(state["trainer"]["rows"]) == len(rows(out))


def test_a_time_limit_is_a_clean_end(tmp_path, monkeypatch):
    flags = f"--data shapes --train-size 20 --time-limit 1e-9 --out {tmp_path}/o"
    monkeypatch.setattr(sys, "argv", ["cifar10_ast.py", *flags.split()])
    assert ast.main() == 0
    found = summary(tmp_path / "o")
    assert (found["complete"], found["stopped_by"], found["policies"]) == (False, "time limit", {})
    assert set(found["measured"].values()) == {None}


HANGS = """
import sys, time, urllib.request
sys.path.insert(0, {folder!r})
import {program} as program

def hang(*args, **kwargs):
    print("it hangs", flush=True)
    time.sleep(100)

urllib.request.urlopen = lambda *args, **how: open(program.os.devnull)  # there is a network
program.{function} = hang
sys.argv[1:] = {flags!r}
sys.exit(program.main())
"""


@contextlib.contextmanager
def hanging(program, function, flags, folder):
    """The process of a program that waits for ever in one of its functions, once it is there."""
    named = {"program": program, "function": function, "flags": flags.split()}
    code, pipe = HANGS.format(folder=str(ROOT / "standalone"), **named), subprocess.PIPE
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=folder, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            assert any(line.startswith("it hangs") for line in process.stdout), process.stderr.read()
            yield process
        finally:
            process.kill()


BEFORE_A_RUN = [  # where it waits: for a server, a disk, in threads that decode, for a picture to be drawn
    ("cifar10_ast", "download_and_extract_archive", "--data cifar10", "SIGTERM"),
    ("cifar10_ast", "names_in", "--data images", "SIGHUP"),
    ("cifar10_ast", "decode", "--data images", "SIGINT"),
    ("cifar10_ast", "draw", "--data shapes", "SIGINT"),
    ("cifar10_ast", "load_model", "--predict images", "SIGTERM"),
    ("imagenet100_ast", "decode", "--data images --weights none --model resnet18 --probe-first", "SIGTERM"),
    ("imagenet100_ast", "read_weights", "--data shapes --model resnet18 --image-size 32", "SIGHUP"),
]


@pytest.mark.parametrize("program,function,flags,name", BEFORE_A_RUN)
def test_a_signal_before_there_is_a_run_ends_it_wherever_it_waits(tmp_path, program, function, flags, name):
    write_images(tmp_path / "images", train=4, test=2)
    with hanging(program, function, flags, tmp_path) as process:
        process.send_signal(getattr(signal, name))
        assert process.wait(20) == 128 + getattr(signal, name)
        words = "Ctrl-C" if name == "SIGINT" else name
        assert process.stderr.read().endswith(f"{words}: ended before there was anything to save\n")
    assert not (tmp_path / "runs").exists()


def test_a_second_signal_ends_it_at_once(tmp_path):
    flags = "--data shapes --train-size 40 --epochs 1 --device cpu"
    with hanging("cifar10_ast", "evaluate", flags, tmp_path) as process:
        process.send_signal(signal.SIGTERM)
        assert any("SIGTERM: saving and stopping; once more" in line for line in process.stderr)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
