"""The comparison: its beds, its rules, and its books."""

import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from matplotlib.figure import Figure

sys.path.insert(0, str(ROOT / "benchmarks"))
import beds
import compare
import controller
import evidence
import rules
import trials

ast = beds.ast
PER_CLASS, TESTED = 120, 20


@pytest.fixture
def data(monkeypatch):
    """Noise in the shape of CIFAR-10, and a held-out part to match."""
    monkeypatch.setattr(beds, "HELD_OUT", 200)
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), PER_CLASS)
    tested = np.repeat(np.arange(10), TESTED)
    images = rng.integers(0, 256, (len(labels) + len(tested), 32, 32, 3), dtype=np.uint8)
    trained, judges = images[: len(labels)], images[len(labels) :]
    classes = [str(i) for i in range(10)]
    return ast.ImageData("noise", True, classes, trained, labels, judges, tested, "a test")


def rows(images):
    return {image.tobytes() for image in images}


# --- beds ---


@pytest.mark.parametrize("name", beds.BEDS)
def test_what_judges_the_search_is_never_trained_on_nor_tested(data, name):
    bed = replace(beds.BEDS[name], size=min(beds.BEDS[name].size, 500))
    searched, final = bed.split(data, held_out=True), bed.split(data, held_out=False)
    assert len(rows(searched.judge_images)) == 200 // len(bed.classes) * len(bed.classes)
    assert not rows(searched.judge_images) & rows(searched.images)
    assert rows(final.judge_images) <= rows(data.val_images)
    assert not rows(searched.judge_images) & rows(final.judge_images)
    assert torch.bincount(searched.judge_labels).unique().numel() == 1, "as many of each class"
    assert searched.labels.unique().tolist() == list(range(len(bed.classes)))
    again = bed.split(data, held_out=True)
    assert (again.images == searched.images).all()
    assert torch.equal(again.labels, searched.labels)


def test_a_tail_thins_the_classes_one_after_the_other(data):
    counts = torch.bincount(beds.BEDS["tail"].split(data, held_out=False).labels).tolist()
    assert counts[0] == PER_CLASS
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] == int(PER_CLASS / 20)


def test_filmed_images_come_as_often_as_said_and_look_alike(data):
    bed = replace(beds.BEDS["filmed"], size=100)
    split = bed.split(data, held_out=False)
    counts = split.scenes.bincount()
    assert sorted(counts.tolist()) == [1] * 90 + [beds.FRAMES] * 10
    assert torch.equal(split.labels, split.labels[split.scenes]) and len(split.images) == len(split.scenes)
    plain = replace(bed, filmed=0.0).split(data, held_out=False)
    assert np.array_equal(split.images[:100], plain.images)
    for frame, scene in zip(split.images[100:], split.scenes[100:].tolist(), strict=True):
        away = [
            np.abs(frame[2:-2, 2:-2] - 1.0 * plain.images[scene][2 + y : 30 + y, 2 + x : 30 + x]).max()
            for y in range(-2, 3)
            for x in range(-2, 3)
        ]
        assert min(away) <= 0.1 * 255 + 1  # the image itself, moved and lit otherwise: noise is nowhere near
    moved = [
        frame
        for frame, scene in zip(split.images[100:], split.scenes[100:].tolist(), strict=True)
        if not np.array_equal(frame, plain.images[scene])
    ]
    assert len(moved) > 0.9 * 190
    assert np.array_equal(split.images, bed.split(data, held_out=False).images)


def test_distinct_chooses_every_scene_as_often(data):
    split = replace(beds.BEDS["filmed"], size=1000).split(data, held_out=False)
    gate = compare.KINDS["distinct"].gate(ast.ASTConfig(), split, None)
    times, generator = torch.zeros(len(split.labels)), torch.Generator().manual_seed(0)
    for _ in range(200):
        candidates = torch.randperm(len(times), generator=generator)
        times[gate.select(candidates, 0.1, generator)[0]] += 1
    by_scene = torch.zeros(1000).index_add(0, split.scenes, times)
    repeats = split.scenes.bincount() > 1
    assert by_scene[repeats].mean() == pytest.approx(float(by_scene[~repeats].mean()), rel=0.05)


@pytest.mark.parametrize("percent", [10, 20, 40])
def test_wrong_labels_are_as_many_as_said_and_never_right(data, percent):
    split = beds.BEDS[f"four-{percent}"].split(data, held_out=False)
    assert int((split.labels != split.truth).sum()) == percent * len(split.labels) // 100
    clean = beds.BEDS["four"].split(data, held_out=False)
    assert torch.equal(split.truth, clean.labels)
    assert torch.equal(split.judge_labels, clean.judge_labels)


# --- rules ---


def seen(gate, losses):
    gate.observe(torch.arange(len(losses)), losses)
    return gate


def test_infobatch_drops_among_the_easy_alone_and_keeps_the_gradient_unbiased(generator):
    losses = torch.cat([torch.full((600,), 0.1), torch.full((400,), 2.0)])
    gate = seen(rules.InfoBatch(ast.ASTConfig(), 1000), losses)
    kept, weights = gate.select(torch.arange(1000), 0.5, generator)
    hard = kept >= 600
    assert int(hard.sum()) == 400
    assert (weights[hard] == 1).all()
    assert (weights[~hard] == 2).all()
    assert float(weights.sum()) == pytest.approx(1000, rel=0.1)


def test_selective_backprop_keeps_the_share_asked_for_and_prefers_the_hard(generator):
    gate = rules.SelectiveBackprop(ast.ASTConfig(gate="live"), lambda images, labels: images[:, 0])
    kept = []
    for _ in range(60):
        scores = torch.rand(200, 1, generator=generator)
        views = ast.Views(torch.arange(200), scores, torch.zeros(200))
        kept.append(scores[gate.select(views, 0.25, generator)[0], 0])
    assert len(torch.cat(kept[20:])) / (40 * 200) == pytest.approx(0.25, abs=0.03)
    assert float(torch.cat(kept[20:]).mean()) > 0.7


def test_the_curriculum_begins_with_the_easy_and_ends_with_all(generator):
    gate = seen(rules.Curriculum(ast.ASTConfig(epochs=10), 1000), torch.rand(1000, generator=generator))
    first, _ = gate.select(torch.arange(1000), 0.2, generator)
    assert len(first) == 200
    assert float(gate.memory.rank(first).max()) <= 0.41
    gate.clock = 8.0
    last, _ = gate.select(torch.arange(1000), 0.2, generator)
    assert len(last) == 200
    assert float(gate.memory.rank(last).max()) > 0.9


def test_shuffled_scores_keep_the_rate_and_choose_by_chance(generator):
    gate = seen(rules.Shuffled(ast.ASTConfig(temperature=0.05), 2000), torch.arange(2000.0))
    kept, _ = gate.select(torch.arange(2000), 0.3, generator)
    assert len(kept) == pytest.approx(600, abs=1)
    assert float(kept.float().mean()) == pytest.approx(1000, abs=60)


@pytest.mark.parametrize("target", [0.1, 0.4])
def test_the_turned_gate_with_no_knob_turned_is_the_kits_own(generator, target):
    config, losses = ast.ASTConfig(weight_gamma=0.5), torch.rand(1000, generator=generator)
    ours = seen(ast.RememberedGate(config, 1000), losses)
    turned = seen(rules.Turned(config, 1000, rules.Knobs(), torch.zeros(1000)), losses)
    for clock in (0.0, 30.0):
        ours.clock = turned.clock = clock
        candidates = torch.randperm(1000, generator=generator)[:400]
        mine, weights = ours.select(candidates, target, generator)
        theirs, their_weights = turned.select(candidates, target, generator)
        assert len(set(mine.tolist()) & set(theirs.tolist())) >= len(mine) - 2
        torch.testing.assert_close(weights.sort().values, their_weights.sort().values, atol=2e-2, rtol=0)


def test_the_turned_gates_memory_is_the_kits_own(generator):
    ours, turned = (
        ast.RememberedGate(ast.ASTConfig(), 500),
        rules.Turned(ast.ASTConfig(), 500, rules.Knobs(), torch.zeros(500)),
    )
    for clock in range(6):
        ours.clock = turned.clock = float(clock)
        indices = torch.randperm(500, generator=generator)[:300]
        losses = torch.rand(300, generator=generator).index_fill(0, torch.tensor([3]), float("nan"))
        for gate in (ours, turned):
            gate.observe(indices, losses)
    everyone = torch.arange(500)
    assert (ours.memory.stuck >= 3).any()
    torch.testing.assert_close(ours.memory.rank(everyone), turned.memory.rank(everyone))


def test_balanced_choice_takes_every_class_alike_and_all_of_the_rare(generator):
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor([700, 280, 20]))
    kept, weights = rules.Balanced(ast.ASTConfig(weight_gamma=0.5), labels).select(
        torch.randperm(1000, generator=generator), 0.2, generator
    )
    counts = labels[kept].bincount()
    assert counts.tolist() == pytest.approx([90, 90, 20], abs=2)
    assert float(weights[labels[kept] == 0].mean()) > float(weights[labels[kept] == 2].mean())


@pytest.mark.parametrize(
    "knob",
    [
        {"by_value": True},
        {"pooled": 0.9},
        {"balance": True},
        {"per_class": 0.5},
        {"ageing": 0.3},
        {"floor": 0.0},
        {"temperature_of_rate": 0.25},
        {"relative": True},
        {"trend": 1.0},
        {"newest": 1.0},
        {"overdue": 0},
        {"guard_quantile": 0.5},
        {"guard_visits": 1},
        {"guard_fall": 1.0},
    ],
)
def test_a_turned_knob_keeps_the_rate_and_changes_the_choice(knob):
    labels = torch.arange(1000) % 4
    losses = torch.rand(6, 1000, generator=torch.Generator().manual_seed(1)) + labels
    losses[3:, ::2] *= 0.8

    def choice(**knobs):
        gate = rules.Turned(ast.ASTConfig(temperature=0.1), 1000, rules.Knobs(**knobs), labels)
        generator = torch.Generator().manual_seed(0)
        for clock, row in enumerate(losses):
            gate.clock = float(clock)
            seen_now = torch.arange(1000) if clock < 3 else torch.randperm(1000, generator=generator)[:700]
            gate.observe(seen_now, row[seen_now])
        gate.clock = 15.0
        return gate.select(torch.arange(1000), 0.2, generator)

    (kept, _), (usual, _) = choice(**knob), choice()
    assert len(kept) == pytest.approx(200, abs=2)
    assert set(kept.tolist()) != set(usual.tolist())


def test_natural_accuracy_counts_each_class_as_often_as_training_does(data):
    bed = replace(beds.BEDS["tail"], settings={**beds.BEDS["tail"].settings, "epochs": 2})
    split = bed.split(data, held_out=False)
    split.images, split.labels, split.truth = split.images[:64], split.labels[:64], split.truth[:64]
    found = compare.measure(bed, compare.policy("full", bed), 0, split, every_epoch=False)
    assert split.labels.unique().tolist() == [0]  # the commonest class alone: it answers nothing else
    assert found["natural_accuracy"] == 100.0
    assert found["accuracy"] < 50


# --- runs and their files ---


@pytest.mark.parametrize(
    "name", ["infobatch:balance=true", "random@0.2:balance=true", "live@0.2:balance=true", "ast@0.2:balance"]
)
def test_balance_is_refused_before_training_where_it_would_do_nothing(name):
    with pytest.raises(SystemExit, match=rf"policy {name}: "):
        compare.policy(name, beds.BEDS["four"])
    assert compare.policy("ast@0.2:balance=true", beds.BEDS["four"]).settings["balance"] is True


def test_the_headline_has_a_row_a_rate_and_one_for_lean_phases_and_balance():
    names = ["ast@0.1", "ast@0.2:weight_gamma=0.5", "ast@0.2", "ast@0.4:lean", "ast@0.4:balance=true"]
    others = ["ast@0.2:temperature=0.1", "ast@0.4:balance", "random@0.4", "full", "ast@0.6:weight_gamma=0.5"]
    assert evidence.default_rows(dict.fromkeys(names + others)) == [
        ("0.2", "ast@0.2"),
        ("0.1", "ast@0.1"),
        ("0.4, balance", "ast@0.4:balance=true"),
        ("0.4, lean", "ast@0.4:lean"),
    ]


@pytest.fixture
def tiny(monkeypatch, tmp_path, data):
    """A bed of two epochs, and results that go into a temporary folder."""
    settings = {**beds.BEDS["four"].settings, "epochs": 2, "batch_size": 32}
    monkeypatch.setitem(compare.BEDS, "tiny", replace(beds.BEDS["four"], size=160, settings=settings))
    monkeypatch.setattr(compare, "RESULTS", tmp_path)
    return compare.Comparison("tiny", data, held_out=False)


@pytest.mark.parametrize("kind", sorted(compare.KINDS))
def test_every_policy_runs_and_its_books_are_complete(tiny, kind):
    name = f"{kind}@0.5"
    found = tiny.run(name, 0)
    (file,) = compare.RESULTS.glob("test/tiny/*.json")
    assert json.loads(file.read_text()) == found
    assert found["program"] == tiny.program
    assert found["flops"] > 0
    assert 0 <= found["worst_class"] <= found["accuracy"] <= 100
    assert found["worst_class"] <= found["natural_accuracy"] <= 100
    assert found["curve"][-1][1] == found["accuracy"]
    if kind in ("full", "short", "rs2"):
        assert found["cost"] == pytest.approx({"full": 1.0}.get(kind, 0.5))
    if kind in ("live", "original", "selective-backprop"):  # a look at a view is a third of a step
        assert found["cost"] > found["activation_rate"] + 0.3 / 2  # in one epoch of the two
    if kind == "proxy":
        assert found["cost"] > found["activation_rate"] + 0.01
    assert f"--policies {name} --seeds 0" in found["command"]


def test_a_finished_run_is_not_repeated_and_an_unfinished_one_is(tiny, monkeypatch):
    made = []

    def measure(*_):
        made.append(1)
        return {"accuracy": 50.0 + len(made), "cost": 1.0, "train_seconds": 1.0}

    monkeypatch.setattr(compare, "measure", measure)
    tiny.run_all(["full", "ast"], [0, 1])
    assert len(made) == 4
    tiny.run_all(["full", "ast"], [0, 1])
    assert len(made) == 4
    next(compare.RESULTS.glob("test/tiny/ast-1.json")).unlink()
    tiny.run_all(["full", "ast"], [0, 1])
    assert len(made) == 5


def test_seeds_are_added_until_the_rivals_are_told_apart(tiny, monkeypatch):
    spread = iter(range(10_000))
    noise = {"ast@0.2": lambda: next(spread) % 2 * 3.0, "random@0.2": lambda: 0.0, "full": lambda: 0.0}
    asked = []

    def run(name, seed):
        if not any(key == (name, seed) for key, _ in asked):
            asked.append(((name, seed), {"accuracy": noise[name]()}))
        return dict(asked)[name, seed]

    monkeypatch.setattr(tiny, "run", run)
    tiny.run_all(["full", "ast@0.2", "random@0.2"], range(20), {"ast@0.2": "random@0.2"})
    seeds = [seed for (name, seed), _ in asked if name == "ast@0.2"]
    assert seeds == list(range(20)), "too noisy to be told apart: all the seeds there are"
    assert [seed for (name, seed), _ in asked if name == "full"] == list(range(5))
    asked.clear()
    noise["ast@0.2"] = lambda: 1.0
    tiny.run_all(["full", "ast@0.2", "random@0.2"], range(20), {"ast@0.2": "random@0.2"})
    assert {seed for (_, seed), _ in asked} == set(range(5))


def test_the_command_line_refuses_a_wrong_name_first_and_ends_with_a_table(monkeypatch, capsys, tiny, data):
    monkeypatch.setattr(ast, "load_data", lambda *_: data)
    asked = "compare.py --bed tiny --seeds 0 --policies"
    monkeypatch.setattr(sys, "argv", [*asked.split(), "full,nothing@0.2"])
    with pytest.raises(SystemExit, match=r"nothing@0\.2"):
        compare.main()
    assert not list(compare.RESULTS.rglob("*.json"))
    monkeypatch.setattr(sys, "argv", [*asked.split(), "ast@0.5:lean,random@0.5:lean"])
    compare.main()
    shown = capsys.readouterr().out
    assert "| ast@0.5:lean | 1 |" in shown and "| random@0.5:lean | 1 |" in shown
    assert len(list(compare.RESULTS.rglob("*.json"))) == 2


def test_names_are_split_at_commas_that_end_a_policy():
    text = "full,ast@0.2:temperature=0.1,weight_gamma=0,lean,turned@0.2:floor=0,random@0.2:lean"
    parts = ["full", "ast@0.2:temperature=0.1,weight_gamma=0,lean", "turned@0.2:floor=0", "random@0.2:lean"]
    assert compare.split_names(text) == parts


def test_results_of_other_code_are_kept_and_said_to_be(tiny, monkeypatch, capsys):
    monkeypatch.setattr(compare, "measure", lambda *_: {"accuracy": 1.0, "cost": 1.0, "train_seconds": 1.0})
    tiny.run("full", 0)
    tiny.ground = "another"
    capsys.readouterr()
    assert tiny.run("full", 0)["accuracy"] == 1.0
    tiny.run("full", 0)
    assert capsys.readouterr().out == "tiny: some kept results were made by another ground\n"


def test_rivals_get_what_ast_costs():
    for name in ("four", "long"):
        bed = beds.BEDS[name]
        names = compare.policies(bed, [0.2], [])
        assert names[:3] == ["full", "ast@0.2", "random@0.2"]
        short, rs2 = (float(name.partition("@")[2]) for name in names[3:])
        assert rs2 == pytest.approx(compare.paid(bed, 0.2), abs=1e-4)
        assert 0 <= short - rs2 < 1 / bed.settings["epochs"]
        assert compare.policy(names[3], bed).settings["epochs"] == round(short * bed.settings["epochs"])


def test_lean_phases_are_one_epoch_before_and_one_after():
    bed = beds.BEDS["long"]
    assert compare.policy("random@0.2:lean", bed).settings == {"gate": "random", "target_activation": 0.2} | (
        compare.LEAN
    )
    assert compare.paid(bed, "0.2:lean") == pytest.approx((2 + 58 * 0.2) / 60)
    assert compare.policies(bed, ["0.2:lean"], [])[1:4] == ["ast@0.2:lean", "random@0.2:lean", "short@0.2333"]


@pytest.mark.parametrize("name", ["nothing@0.2", "ast@0.2:floor=0", "ast@0.2:temprature=1"])
def test_an_unknown_policy_is_refused_in_a_sentence(name):
    with pytest.raises(SystemExit, match="expected"):
        compare.policy(name, beds.BEDS["four"])


def test_running_statistics_average_as_many_samples_whatever_the_batch():
    images = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)

    def momenta(batch_size):
        network = compare.compact(4, images, batch_size)
        return {m.momentum for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)}

    assert momenta(1024) == {0.4}, "airbench's own"
    assert momenta(32) == {0.4 / 32}


# --- what is said about them ---


def of(accuracies, cost=0.5, curve=()):
    keys = {"worst_class": 80.0, "activation_rate": 0.5, "total_seconds": 9.0, "joules": None}
    return {
        seed: {"accuracy": value, "cost": cost, "train_seconds": 10 * cost, "curve": list(curve), **keys}
        for seed, value in enumerate(accuracies)
    }


def test_an_interval_is_students_own():
    assert evidence.half_width([1.0, 2.0, 3.0]) == pytest.approx(4.302653 / math.sqrt(3))
    assert evidence.half_width([1.0]) == math.inf


def test_a_gap_is_paired_over_the_seeds_that_both_have():
    runs = {"a": of([91.0, 93.0, 95.0]), "b": of([90.0, 92.0])}
    found = evidence.gap(runs, "a", "b")
    assert (found.mean, found.half, found.seeds) == (1.0, 0.0, 2)
    assert evidence.gap(runs, "a", "c") is None


def test_saving_is_against_plain_training_of_the_same_accuracy():
    runs = {"full": of([96.0], 1.0), "short@0.5": of([94.0], 0.5), "ast@0.2": of([95.0], 0.3)}
    assert evidence.saving_at_equal_accuracy(runs, "ast@0.2") == pytest.approx(100 * (1 - 0.3 / 0.75))
    runs["ast@0.2"] = of([97.0], 0.3)
    assert evidence.saving_at_equal_accuracy(runs, "ast@0.2") is None


def test_plain_training_that_is_dearer_and_no_better_does_not_flatter_a_policy():
    runs = {"full": of([95.5], 1.0), "short@0.4": of([95.2], 0.4), "ast@0.2": of([95.25], 0.3)}
    without = evidence.saving_at_equal_accuracy(runs, "ast@0.2")
    runs["short@0.6"] = of([95.0], 0.6)
    assert evidence.saving_at_equal_accuracy(runs, "ast@0.2") == without


def test_no_saving_is_read_off_between_lengths_that_are_far_apart():
    runs = {"full": of([96.0], 1.0), "short@0.2": of([90.0], 0.2), "ast@0.2": of([94.0], 0.4)}
    assert evidence.saving_at_equal_accuracy(runs, "ast@0.2") is None
    runs["short@0.4"] = of([93.0], 0.4)
    runs["short@0.6"] = of([95.0], 0.6)
    assert evidence.saving_at_equal_accuracy(runs, "ast@0.2") == pytest.approx(100 * (1 - 0.4 / 0.5))


def test_natural_accuracy_is_told_of_the_runs_that_know_it_alone(monkeypatch):
    runs = {"ast@0.2": of([66.0, 68.0]), "random@0.2": of([64.0, 65.0]), "full": of([73.0], 1.0)}
    for name, value in (("ast@0.2", 80.0), ("random@0.2", 80.5)):
        runs[name][1]["natural_accuracy"] = value
    monkeypatch.setattr(evidence, "load", lambda bed: runs)
    rows = evidence.natural("bed").splitlines()[2:]
    assert sorted(rows) == [
        "| ast@0.2 | 1 | 0.500 | 68.00 | +3.00 (1) | 80.00 | -0.50 (1) |",
        "| random@0.2 | 1 | 0.500 | 65.00 | - | 80.50 | - |",
    ]
    del runs["ast@0.2"], runs["random@0.2"]
    assert evidence.natural("bed") == evidence.NOTHING


@pytest.mark.parametrize(
    "policy,rival",
    [
        ("ast@0.2", "random@0.2"),
        ("ast@0.1:weight_gamma=0", "random@0.1"),
        ("ast@0.2:anneal_epochs=0", "random@0.2:anneal_epochs=0"),
        ("ast@0.1:lean,temperature=0.1", "random@0.1:lean"),
        ("infobatch", None),
        ("short@0.4375", None),
        ("full", None),
    ],
)
def test_a_policy_is_held_against_random_of_its_own_rate_and_phases_alone(policy, rival):
    assert evidence.rival_of(policy) == rival


def test_the_headline_names_what_is_proven_and_what_is_not(monkeypatch):
    runs = {
        "full": of([96.0, 96.1, 95.9], 1.0),
        "short@0.3": of([80.0] * 3, 0.3),
        "short@0.9": of([85.0] * 3, 0.9),
        "short@0.5": of([99.0] * 3, 0.5),
        "random@0.2": of([95.5, 95.6, 95.4], 0.4),
        "short@0.42": of([95.0, 95.1, 94.9], 0.42),
        "ast@0.2": of([95.9, 96.0, 95.8], 0.4),
        "ast@0.1": of([94.0, 96.0, 95.0], 0.2),
        "random@0.1": of([95.0], 0.2),
        "ast@0.3:lean": of([91.0] * 3, 0.35),
        "ast@0.3": of([91.0] * 2, 0.4),  # too few seeds for a row
        "random@0.3:lean": of([90.0], 0.35),
        "infobatch": of([93.0] * 3, 0.25),
        "ast@0.1:temperature=1": of([99.0], 0.2),
        "ast@0.05:weight_gamma=0.5": of([90.0], 0.15),
    }
    monkeypatch.setattr(evidence, "load", lambda bed: runs)
    first, second, lean = evidence.headline({"bed": "words"}).splitlines()[2:]
    assert lean.startswith("| words | 0.3, lean | 91.00 | +1.00 (1) | - | - |"), "no short is near its cost"
    gaps = "+0.40 ± 0.00 (3) | - | +0.90 ± 0.00 (3) | - | -0.10 ± 0.00 (3) (not inferior)"
    assert first == f"| words | 0.2 | 95.90 | {gaps} | 60 %; 60 % |", (
        "short@0.3 is cheaper than AST, so no rival"
    )
    assert "not inferior" not in second
    assert "| -1.00 (1) |" in second
    assert "| +2.00 ± 2.48 (3) |" in second, "InfoBatch is a rival where it costs as much, or a little more"
    assert evidence.headline({"bed": "words"}, {"bed": ("0.1",)}).splitlines()[2:] == [second]


def test_held_out_rows_stand_beside_chance_and_plain_training_at_their_cost(monkeypatch):
    runs = {
        "ast@0.1:lean": of([70.0, 71.0], 0.16),
        "random@0.1:lean": of([69.0, 70.0], 0.16),
        "short@0.1667": of([68.0, 68.0], 0.1667),
        "short@0.4": of([75.0, 75.0], 0.4),
    }
    monkeypatch.setattr(evidence, "load", lambda *_: runs)
    _, _, *lines = evidence.rival_table({"bed": ["ast@0.1:lean", "short@0.1667", "not run yet"]}).splitlines()
    assert lines == [
        "| `ast@0.1:lean` | bed | 2 | 70.50 | +1.00 ± 0.00 (2) | +2.50 ± 6.35 (2) | - | 0.160 |",
        "| `short@0.1667` | bed | 2 | 68.00 | - | - | - | 0.167 |",
    ]


def test_seconds_of_two_machines_are_not_compared():
    runs = {"full": of([96.0, 96.0], 1.0), "ast@0.2": of([95.0, 95.0], 0.4)}
    for own in runs.values():
        own[0]["device"] = "a laptop"
    runs["full"][1]["device"], runs["ast@0.2"][1]["device"] = "a laptop", "a server"
    runs["ast@0.2"][1]["train_seconds"] = 0.1
    assert evidence.time_saved(runs, "ast@0.2") == "60 %"


def test_a_run_beside_others_on_a_gpu_says_so_and_keeps_no_joules(tiny, data, tmp_path):
    crowd = compare.Comparison("tiny", data, held_out=False, results=tmp_path / "crowd", side_by_side=14)
    alone, found = tiny.run("full", 0), crowd.run("full", 0)
    assert "side_by_side" not in alone and found["side_by_side"] == 14
    assert found["joules"] is None and "shared" in found["joules_method"]
    assert found["command"] == f"{alone['command']} --side-by-side 14"
    assert found["accuracy"] == alone["accuracy"]


def test_seconds_of_runs_that_shared_a_gpu_are_not_shown(monkeypatch):
    runs = {"full": of([96.0] * 3, 1.0), "ast@0.2": of([95.0] * 3, 0.4)}
    monkeypatch.setattr(evidence, "load", lambda *_: runs)
    assert evidence.time_saved(runs, "ast@0.2") == "60 %"
    assert " | 1.000 | 10 | 9 | " in evidence.table("bed")
    runs["full"][1]["side_by_side"] = 14
    assert evidence.time_saved(runs, "ast@0.2") == "-"
    assert evidence.headline({"bed": "words"}).endswith(" | -; 60 % |")
    full, sparse = evidence.table("bed").splitlines()[2:]
    assert " | 1.000 | - | - | " in full
    assert " | 0.400 | 4 | 9 | " in sparse
    axis = Figure().subplots()
    evidence.frontier(axis, runs)
    assert "FLOPs" in axis.get_xlabel()


@pytest.mark.parametrize(
    "now,then",
    [
        ("ast@0.2", "ast@0.2:weight_gamma=0.5"),
        ("ast@0.2:weight_gamma=0", "ast@0.2"),
        ("turned@0.2:floor=0", "turned@0.2:floor=0,weight_gamma=0.5"),
        ("ast@0.2:weight_gamma=1", "ast@0.2:weight_gamma=1"),
        ("random@0.2", "random@0.2"),
    ],
)
def test_a_trial_is_named_by_the_weights_it_was_made_with(now, then):
    assert trials.as_begun(now) == then


def test_tables_are_made_of_every_policy(monkeypatch):
    runs = {"full": of([96.0, 96.2], 1.0, [(5.0, 90.0), (10.0, 96.2)]), "ast@0.2": of([95.0, 95.2], 0.4)}
    runs["full"][0]["joules"], runs["full"][1]["joules"] = 90.0, 110.0
    monkeypatch.setattr(evidence, "load", lambda *_: runs)
    head, _, *lines = evidence.table("bed").splitlines()
    assert {line.count("|") for line in lines} == {head.count("|")}
    assert lines[0].endswith("| 100 |") and lines[1].endswith("| - |"), "joules only where they were measured"
    assert "-1.00 ± 0.00 (2)" in lines[1]
    assert "| 0.500 |" in lines[1], "no word of wrong labels where there are none"
    runs["ast@0.2"][0]["wrong_share"], runs["ast@0.2"][1]["wrong_share"] = 0.2, 0.3
    assert "| 0.500, 25% of the chosen wrong |" in evidence.table("bed")
    assert "| full | 5 s | 10 s | 10 s | 10 s |" in evidence.times("bed")


# --- the controller's responses ---


def answer(rate_at, target, decisions=400, size=100, n=5000):
    times = np.arange(1, decisions + 1) * size / n
    return controller.judge([(t, rate_at(t - controller.BEFORE)) for t in times], target, n)


def test_a_controller_that_steps_at_once_has_settled_at_once():
    found = answer(lambda t: 0.5 if t <= 0 else 0.1, 0.1)
    assert found == {"settling_epochs": 0.0, "overshoot": 0.0, "error_at_the_end": 0.0}


def test_one_that_creeps_settles_when_it_arrives_and_one_that_stays_never():
    creeping = answer(lambda t: max(0.1, 0.5 - 0.2 * max(0.0, t)), 0.1)
    assert 1.8 < creeping["settling_epochs"] < 2.7
    staying = answer(lambda t: 0.5, 0.1)
    assert staying["settling_epochs"] is None
    assert staying["error_at_the_end"] == pytest.approx(0.4)


def test_overshoot_is_what_lies_beyond_the_target():
    found = answer(lambda t: 0.5 if t <= 0 else 0.05 if t < 1 else 0.1, 0.1)
    assert found["overshoot"] == pytest.approx(0.05)


def test_a_saving_has_an_interval_over_seeds():
    runs = {"full": of([90.0, 92.0], 1.0), "short@0.5": of([80.0, 82.0], 0.5), "ast": of([85.0, 87.0], 0.6)}
    assert evidence.saving_interval(runs, "ast") == pytest.approx((20, 20)), "each seed as good as its own"
    runs["ast"][1]["accuracy"] = 83.0  # its own plain training would cost 0.55
    low, high = evidence.saving_interval(runs, "ast")
    assert low == pytest.approx(100 * (1 - 0.6 / 0.55))
    assert high == pytest.approx(20)
    runs["ast"][0]["accuracy"] = 99.0
    assert evidence.saving_interval(runs, "ast") is None, "some draws are above all plain training"


def test_a_draw_in_a_hundred_outside_plain_trainings_range_spoils_no_interval():
    runs = {"full": of([90.0] * 6, 1.0), "short@0.5": of([80.0] * 6, 0.5)}
    runs["ast"] = of([85.0] * 5 + [77.0], 0.6)  # drawn four times of six, the last falls below the range
    low, high = evidence.saving_interval(runs, "ast")
    assert low < 5 and high == pytest.approx(20)
    runs["ast"] = of([85.0] * 5 + [67.0], 0.6)  # twice are enough
    assert evidence.saving_interval(runs, "ast") is None


def test_the_time_to_a_share_of_fulls_accuracy_needs_every_seed():
    runs = {"full": of([90.0, 90.0]), "ast": of([90.0, 90.0], curve=[(1.0, 80.0), (2.0, 89.5)])}
    assert evidence.seconds_to(runs, "ast", 0.9) == 2.0
    assert evidence.seconds_to(runs, "ast", 0.88) == 1.0
    assert evidence.seconds_to(runs, "ast", 1.0) is None
    assert math.isnan(evidence.seconds_to({"ast": runs["ast"]}, "ast", 0.9)), "nothing to compare with"
    runs["ast"][0]["side_by_side"] = 14
    assert math.isnan(evidence.seconds_to(runs, "ast", 0.9))
