"""The comparison: its beds, its rules, and its books."""

import copy
import io
import itertools
import math
import re
import sys
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from test_gate import first_pixel, views

sys.path.insert(0, str(ROOT / "benchmarks"))
import bars
import beds
import books
import compare
import controller
import evidence
import finetuning
import rules

ast = beds.ast
PER_CLASS = 120


@pytest.fixture
def data(monkeypatch):
    """Noise in the shape of CIFAR-10, and a held-out part to match."""
    monkeypatch.setattr(beds, "HELD_OUT", 200)
    rng = np.random.default_rng(0)
    trained, tested = (np.repeat(np.arange(10), each) for each in (PER_CLASS, 20))
    images, judges = (rng.integers(0, 256, (len(of), 32, 32, 3), dtype=np.uint8) for of in (trained, tested))
    return ast.ImageData("noise", True, list("0123456789"), images, trained, judges, tested, "a test")


def rows(images):
    return {image.tobytes() for image in images}


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
    assert (again.images == searched.images).all() and torch.equal(again.labels, searched.labels)


def test_a_tail_thins_the_classes_one_after_the_other(data):
    counts = torch.bincount(beds.BEDS["tail"].split(data, held_out=False).labels).tolist()
    assert counts == sorted(counts, reverse=True)
    assert (counts[0], counts[-1]) == (PER_CLASS, int(PER_CLASS / 20))


def test_filmed_images_come_as_often_as_said_and_look_alike(data):
    bed = replace(beds.BEDS["filmed"], size=100)
    split = bed.split(data, held_out=False)
    assert sorted(split.scenes.bincount().tolist()) == [1] * 90 + [beds.FRAMES] * 10
    assert torch.equal(split.labels, split.labels[split.scenes]) and len(split.images) == len(split.scenes)
    plain = replace(bed, filmed=0.0).split(data, held_out=False)
    assert np.array_equal(split.images[:100], plain.images)
    for frame, scene in zip(split.images[100:], split.scenes[100:].tolist(), strict=True):
        moved = [1.0 * plain.images[scene][y : y + 28, x : x + 28] for y in range(5) for x in range(5)]
        away = min(np.abs(frame[2:-2, 2:-2] - image).max() for image in moved)
        assert away <= 0.1 * 255 + 1  # the image itself, moved and lit otherwise: noise is nowhere near
    assert not np.array_equal(split.images[100:], plain.images[split.scenes[100:]])
    assert np.array_equal(split.images, bed.split(data, held_out=False).images)


@pytest.mark.parametrize("percent", [10, 20, 40])
def test_wrong_labels_are_as_many_as_said_and_never_right(data, percent):
    split = beds.BEDS[f"four-{percent}"].split(data, held_out=False)
    assert int((split.labels != split.truth).sum()) == percent * len(split.labels) // 100
    clean = beds.BEDS["four"].split(data, held_out=False)
    assert torch.equal(split.truth, clean.labels)
    assert torch.equal(split.judge_labels, clean.judge_labels)


def seen(gate, losses):
    gate.observe(torch.arange(len(losses)), losses)
    return gate


def test_infobatch_drops_among_the_easy_alone_and_keeps_the_gradient_unbiased(generator):
    losses = torch.cat([torch.full((600,), 0.1), torch.full((400,), 2.0)])
    gate = seen(rules.InfoBatch(ast.ASTConfig(), 1000), losses)
    kept, weights = gate.select(torch.arange(1000), 0.5, generator)
    hard = kept >= 600
    assert int(hard.sum()) == 400
    assert (weights[hard] == 1).all() and (weights[~hard] == 2).all()
    assert float(weights.sum()) == pytest.approx(1000, rel=0.1)


def test_selective_backprop_keeps_the_share_asked_for_and_prefers_the_hard(generator):
    gate, kept = rules.SelectiveBackprop(ast.ASTConfig(gate="live"), first_pixel), []
    for _ in range(60):
        scores = torch.rand(200, generator=generator)
        kept.append(scores[gate.select(views(scores, torch.arange(200)), 0.25, generator)[0]])
    assert len(torch.cat(kept[20:])) / (40 * 200) == pytest.approx(0.25, abs=0.03)
    assert float(torch.cat(kept[20:]).mean()) > 0.7


def test_top_k_keeps_the_hardest_and_the_exact_share(generator):
    gate, kept = rules.TopK(ast.ASTConfig(gate="live"), first_pixel), 0
    for _ in range(30):
        scores = torch.rand(9, generator=generator)
        scores[4] = math.nan
        chosen, _ = gate.select(views(scores, torch.arange(9)), 0.3, generator)
        hardest = scores.nan_to_num(-1).topk(len(chosen)).indices
        assert set(chosen.tolist()) == set(hardest.tolist())
        kept += len(chosen)
    assert kept == round(0.3 * 9 * 30)


def test_the_margin_is_small_where_two_classes_are_likely():
    logits = torch.tensor([[5.0, 5.0, -9.0], [9.0, -9.0, -9.0]])
    torch.testing.assert_close(rules.margin(logits, None, None), torch.tensor([1.0, 0.0]), atol=1e-4, rtol=0)


def test_weights_undo_the_choice_as_far_as_gamma_says(generator):
    losses, config, found = torch.rand(4000, generator=generator), ast.ASTConfig(temperature=0.1), []
    for gamma in (0, 0.5, 1):
        gate = seen(rules.Weighted(config, 4000, gamma), losses)
        chosen, weights = gate.select(torch.arange(4000), 0.25, generator)
        assert float(weights.mean()) == pytest.approx(1.0)
        found.append(float((weights * losses[chosen]).mean() / losses.mean()))
    assert found[0] > 1.3 and found == sorted(found, reverse=True)
    assert found[2] < 1.15, "hardly a bias is left: no weight is over 4"


def test_the_curriculum_begins_with_the_easy_and_ends_with_all(generator):
    gate = seen(rules.Curriculum(ast.ASTConfig(epochs=10), 1000), torch.rand(1000, generator=generator))
    first, _ = gate.select(torch.arange(1000), 0.2, generator)
    gate.clock = 8.0
    last, _ = gate.select(torch.arange(1000), 0.2, generator)
    assert len(first) == len(last) == 200
    assert float(gate.memory.rank(first).max()) <= 0.41 and float(gate.memory.rank(last).max()) > 0.9


def test_shuffled_scores_keep_the_rate_and_choose_by_chance(generator):
    gate = seen(rules.Shuffled(ast.ASTConfig(temperature=0.05), 2000), torch.arange(2000.0))
    kept, _ = gate.select(torch.arange(2000), 0.3, generator)
    assert len(kept) == pytest.approx(600, abs=1)
    assert float(kept.float().mean()) == pytest.approx(1000, abs=60)


@pytest.mark.parametrize("target", [0.1, 0.4])
def test_the_turned_gate_with_no_knob_turned_is_the_kits_own(generator, target):
    config, losses = ast.ASTConfig(), torch.rand(1000, generator=generator)
    ours = seen(rules.Weighted(config, 1000, 0.5), losses)
    turned = seen(rules.Turned(config, torch.zeros(1000), rules.Knobs(), 0.5), losses)
    for clock in (0.0, 30.0):
        ours.clock = turned.clock = clock
        candidates = torch.randperm(1000, generator=generator)[:400]
        mine, weights = ours.select(candidates, target, generator)
        theirs, their_weights = turned.select(candidates, target, generator)
        assert len(set(mine.tolist()) & set(theirs.tolist())) >= len(mine) - 2
        torch.testing.assert_close(weights.sort().values, their_weights.sort().values, atol=2e-2, rtol=0)


def test_balanced_choice_takes_every_class_alike_and_all_of_the_rare(generator):
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor([700, 280, 20]))
    candidates = torch.randperm(1000, generator=generator)
    kept, weights = rules.Balanced(labels, 0.5).select(candidates, 0.2, generator)
    assert labels[kept].bincount().tolist() == pytest.approx([90, 90, 20], abs=2)
    assert float(weights[labels[kept] == 0].mean()) > float(weights[labels[kept] == 2].mean())


KNOBS = """by_value=true pooled=0.9 balance=true per_class=0.5 ageing=0.3 floor=0.0 temperature_of_rate=0.25
    relative=true trend=1 newest=1 overdue=0 guard_quantile=0.5 guard_visits=1 guard_fall=1.0""".split()


@pytest.mark.parametrize("knob", KNOBS)
def test_a_turned_knob_keeps_the_rate_and_changes_the_choice(knob):
    labels = torch.arange(1000) % 4
    losses = torch.rand(6, 1000, generator=torch.Generator().manual_seed(1)) + labels
    losses[3:, ::2] *= 0.8

    def choice(**knobs):
        gate = rules.Turned(ast.ASTConfig(temperature=0.1), labels, rules.Knobs(**knobs))
        generator = torch.Generator().manual_seed(0)
        for clock, row in enumerate(losses):
            gate.clock = float(clock)
            seen_now = torch.arange(1000) if clock < 3 else torch.randperm(1000, generator=generator)[:700]
            gate.observe(seen_now, row[seen_now])
        gate.clock = 15.0
        return gate.select(torch.arange(1000), 0.2, generator)[0].tolist()

    name, _, value = knob.partition("=")
    kept = choice(**{name: compare.value(value)})
    assert len(kept) == pytest.approx(200, abs=2) and set(kept) != set(choice())


@pytest.fixture
def tiny(monkeypatch, tmp_path, data):
    """A bed of two epochs, and results that go into a temporary folder."""
    monkeypatch.setattr(books, "RESULTS", tmp_path)
    settings = {**beds.BEDS["four"].settings, "epochs": 2, "batch_size": 32}
    monkeypatch.setitem(compare.BEDS, "tiny", replace(beds.BEDS["four"], size=160, settings=settings))
    return compare.Comparison("tiny", data, held_out=False)


@pytest.fixture
def made(monkeypatch):
    """What `measure` is asked for, which then takes no time; each run is more accurate than the last."""
    made = []

    def measure(bed, chosen, seed, split):
        made.append(seed)
        return {"accuracy": 50.0 + len(made), "cost": 1.0, "train_seconds": 1.0}

    monkeypatch.setattr(compare, "measure", measure)
    return made


@pytest.mark.parametrize("kind", sorted(compare.KINDS))
def test_every_policy_runs_and_its_books_are_complete(tiny, kind):
    name = f"{kind}@0.5"
    found = tiny.run(name, 0)
    (kept,) = books.read(tiny.file)
    assert kept.items() >= found.items()
    assert (kept["policy"], kept["seed"], kept["judged_on"]) == (name, 0, "test images")
    assert kept["command"] == "python benchmarks/compare.py --bed tiny --policies POLICY --seeds SEED"
    assert (found["program"], found["edition"]) == (tiny.program, 2)
    assert found["flops"] > 0 and 0 <= found["worst_class"] <= found["accuracy"] <= 100
    assert found["worst_class"] <= found["natural_accuracy"] <= 100
    assert found["curve"][-1][1] == found["accuracy"]
    if kind in ("full", "short", "rs2"):
        assert found["cost"] == pytest.approx({"full": 1.0}.get(kind, 0.5))
    if kind in ("live", "original", "selective-backprop"):  # a look at a view is a third of a step
        assert found["cost"] > found["activation_rate"] + 0.3 / 2  # in one epoch of the two
    if kind == "proxy":
        assert found["cost"] > found["activation_rate"] + 0.01
    if "sized" in kind:  # half of one epoch of the two at a quarter
        assert found["activation_rate"] == 1 and found["cost"] == pytest.approx(1 - 0.75 * 0.25, abs=0.01)
    if "shrink" in kind:
        assert found["cost"] == pytest.approx(found["activation_rate"] + 0.25 * 0.25, abs=0.01)


def test_sides_have_names_in_the_search(tiny):
    found = tiny.run("full:resolution=progressive,stages=two", 0)
    assert found["cost"] == pytest.approx((0.25 + 1) / 2, abs=0.05), "one epoch of the two at half the side"
    with pytest.raises(KeyError):
        compare.policy("full:stages=none", tiny.bed)


def test_what_is_halved_is_the_same_sample_at_another_size():
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    images = torch.arange(6.0).view(-1, 1, 1, 1).expand(6, 3, 8, 8)
    small = torch.tensor([1, 0, 0, 1, 1, 0]).bool()
    sizes = []
    model.register_forward_hook(lambda module, given, _: sizes.append(list(given[0].shape)))
    logits = rules.Halving(model, small)(images)
    assert sizes == [[3, 3, 8, 8], [3, 3, 4, 4]] and torch.allclose(logits, images.mean((2, 3)), atol=1e-5)


def test_the_bed_of_the_transformer_keeps_patches_as_a_policys_name_says(monkeypatch, tmp_path, data):
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(ast, "vit", lambda classes: ast.ViT(classes, 8, 2, 32, 4, 0, attend))
    bed = beds.BEDS["vit"]
    small = replace(bed, size=100, settings={**bed.settings, "epochs": 2, "batch_size": 25})
    monkeypatch.setitem(compare.BEDS, "tiny", small)
    tiny = compare.Comparison("tiny", data, held_out=False, results=tmp_path)
    assert tiny.run("full", 0)["cost"] == pytest.approx(1)
    found = tiny.run("ast@1.0:keep_tokens=0.5,keep_by=sample", 0)["cost"]
    assert (
        0.6 < found < 0.76
    )  # the last of two epochs sees all; less than half of the tokens' attention is left


@pytest.mark.parametrize("changes", ["ast@0.5:weight_gamma=1", "live@0.5:score_scale=0.5"])
def test_what_only_the_benchmarks_turn_changes_a_run(tiny, changes):
    plain, turned = tiny.run(changes.partition(":")[0], 0), tiny.run(changes, 0)
    if "scale" in changes:
        assert turned["cost"] < plain["cost"] - 0.2 / 2
    else:
        assert turned["cost"] == plain["cost"] and turned["train_loss"] != plain["train_loss"]


def test_a_finished_run_is_not_repeated_and_an_unfinished_one_is(tiny, data, made):
    tiny.run_all(["full", "ast"], [0, 1])
    tiny.run_all(["full", "ast"], [0, 1])
    assert len(made) == 4
    lines = tiny.file.read_text().splitlines()
    tiny.file.write_text("\n".join(lines[:4]) + "\n" + lines[4][:30])  # killed while it wrote the last one
    again = compare.Comparison("tiny", data, held_out=False)
    again.run_all(["full", "ast"], [0, 1])
    assert [run["accuracy"] for run in books.read(tiny.file)] == [51.0, 52.0, 53.0, 55.0]
    compare.Comparison("tiny", data, held_out=True).run("full", 0)
    assert len(made) == 6, "held-out images are another judge, in the same file"
    assert len(evidence.load("tiny", "held_out")["full"]) == 1 and len(evidence.load("tiny")["full"]) == 2
    assert evidence.searched() == ["tiny"]


def test_the_first_line_holds_what_all_share_and_another_what_differs(tmp_path):
    file = tmp_path / "deep" / "bed.jsonl"
    for device, seed in (("a", 0), ("b", 1)):
        books.append(file, {"bed": "x", "device": "a"}, {"device": device, "seed": seed, "θ": None})
    first, *runs = file.read_text(encoding="utf-8").split()
    assert first == '{"bed":"x","device":"a"}'
    assert runs == ['{"seed":0,"θ":null}', '{"device":"b","seed":1,"θ":null}']
    assert books.read(file)[1] == {"bed": "x", "device": "b", "seed": 1, "θ": None}
    assert books.read(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(
    "edition,said", [(2, "tiny: some kept results were made by another ground\n"), (1, "")]
)
def test_results_of_other_code_count_and_are_said_to_be_but_for_edition_1(tiny, capsys, edition, said):
    kept = {"accuracy": 1.0, "edition": edition, "program": tiny.program, "ground": "another"}
    tiny.kept = {"full": {0: kept}}
    assert tiny.run("full", 0) == tiny.run("full", 0) == kept
    assert capsys.readouterr().out == said


def test_seeds_are_added_until_the_rivals_are_told_apart(tiny, monkeypatch):
    asked, rivals = [], {"ast@0.2": "random@0.2"}
    lead = {"ast@0.2": lambda seed: seed % 2 * 3.0}

    def run(name, seed):
        asked.append((name, seed))
        return {"accuracy": lead[name](seed) if name in lead else 0.0}

    monkeypatch.setattr(tiny, "run", run)
    tiny.run_all(["full", *rivals, *rivals.values()], range(20), rivals)
    assert {seed for name, seed in asked if name in rivals} == set(range(20)), "too noisy to be told apart"
    assert {seed for name, seed in asked if name == "full"} == set(range(5))
    asked.clear()
    lead["ast@0.2"] = lambda seed: 1.0
    tiny.run_all(["full", *rivals, *rivals.values()], range(20), rivals)
    assert {seed for _, seed in asked} == set(range(5))


def test_the_command_line_refuses_a_wrong_name_first_and_ends_with_a_table(monkeypatch, capsys, tiny, data):
    monkeypatch.setattr(ast, "load_data", lambda *_: data)
    asked = "compare.py --bed tiny --seeds 0 --policies"
    monkeypatch.setattr(sys, "argv", [*asked.split(), "full,nothing@0.2"])
    with pytest.raises(SystemExit, match=r"nothing@0\.2"):
        compare.main()
    assert not tiny.file.exists()
    monkeypatch.setattr(sys, "argv", [*asked.split(), "ast@0.5:lean,random@0.5:lean"])
    compare.main()
    shown = capsys.readouterr().out
    assert "| ast@0.5:lean | 1 |" in shown and "| random@0.5:lean | 1 |" in shown


def test_rivals_get_what_ast_costs():
    for name in ("four", "long"):
        bed = beds.BEDS[name]
        names = compare.policies(bed, [0.2], [])
        assert names[:3] == ["full", "ast@0.2", "random@0.2"]
        short, rs2 = (float(name.partition("@")[2]) for name in names[3:])
        assert rs2 == pytest.approx(compare.paid(bed, 0.2), abs=1e-4)
        assert 0 <= short - rs2 < 1 / bed.settings["epochs"]
        assert compare.policy(names[3], bed).settings["epochs"] == round(short * bed.settings["epochs"])
    assert compare.policy("random@0.2:lean", bed).settings.items() >= compare.LEAN.items()
    assert compare.paid(bed, "0.2:lean") == pytest.approx((2 + 58 * 0.2) / 60)


WRONG = "nothing@0.2 ast@0.2:floor=0 ast@0.2:temprature=1 ast@0.2:balance infobatch:balance=true".split()


@pytest.mark.parametrize("name", [*WRONG, "random@0.2:balance=true", "ast@0.2:balance=true,weight_gamma=1"])
def test_a_policy_that_cannot_be_is_refused_in_a_sentence(name):
    with pytest.raises(SystemExit, match=rf"policy {name}: .*expected|expected .*policy"):
        compare.policy(name, beds.BEDS["four"])


def test_a_run_beside_others_on_a_gpu_says_so_and_keeps_no_joules(data, tiny, made):
    crowd = compare.Comparison("tiny", data, held_out=False, side_by_side=14)
    alone, found = tiny.run("full", 0), crowd.run("full", 1)
    assert "side_by_side" not in alone and found["side_by_side"] == 14
    assert found["joules"] is None and "shared" in found["joules_method"]


def of(accuracies, cost=0.5):
    keys = {"worst_class": 80.0, "activation_rate": 0.5, "total_seconds": 9.0, "joules": None}
    own = {"cost": cost, "train_seconds": 10 * cost, "device": "a laptop", **keys}
    return {seed: {"accuracy": value, **own} for seed, value in enumerate(accuracies)}


def test_a_gap_is_paired_over_the_seeds_that_both_have_and_its_interval_students():
    runs = {"a": of([91.0, 93.0, 95.0]), "b": of([90.0, 92.0])}
    found = evidence.gap(runs, "a", "b")
    assert (found.mean, found.half, found.seeds) == (1.0, 0.0, 2)
    assert evidence.gap(runs, "a", "c") is None
    assert evidence.half_width([1.0, 2.0, 3.0]) == pytest.approx(4.302653 / math.sqrt(3))
    assert evidence.half_width([1.0]) == math.inf


def test_saving_is_against_plain_training_of_the_same_accuracy():
    runs = {"full": of([96.0], 1.0), "short@0.5": of([94.0], 0.5), "ast@0.2": of([95.0], 0.3)}
    expected = pytest.approx(100 * (1 - 0.3 / 0.75))
    assert evidence.saving_at_equal_accuracy(runs, "ast@0.2") == expected
    runs["short@0.6"] = of([93.0], 0.6)
    assert evidence.saving_at_equal_accuracy(runs, "ast@0.2") == expected, "dearer and no better: no rival"
    runs["ast@0.2"] = of([97.0], 0.3)
    assert evidence.saving_at_equal_accuracy(runs, "ast@0.2") is None
    runs = {"full": of([96.0], 1.0), "short@0.4": of([90.0], 0.4), "ast@0.2": of([94.0], 0.4)}
    assert evidence.saving_at_equal_accuracy(runs, "ast@0.2") is None, "a line would be too long"


def test_a_saving_has_an_interval_over_seeds():
    runs = {"full": of([90.0, 92.0], 1.0), "short@0.5": of([80.0, 82.0], 0.5), "ast": of([85.0, 87.0], 0.6)}
    assert evidence.saving_interval(runs, "ast") == pytest.approx((20, 20)), "each seed as good as its own"
    runs["ast"][1]["accuracy"] = 83.0  # its own plain training would cost 0.55
    assert evidence.saving_interval(runs, "ast") == pytest.approx((100 * (1 - 0.6 / 0.55), 20))
    runs["ast"][0]["accuracy"] = 99.0
    assert evidence.saving_interval(runs, "ast") is None, "some draws are above all plain training"


def test_a_policy_is_held_against_random_of_its_own_rate_and_phases_alone():
    rivals = {"ast@0.2": "random@0.2", "ast@0.1:weight_gamma=0": "random@0.1"}
    rivals |= {"ast@0.2:anneal_epochs=0": "random@0.2:anneal_epochs=0"}
    rivals |= {"ast@0.1:lean,temperature=0.1": "random@0.1:lean", "short@0.4375": None, "full": None}
    assert {policy: evidence.rival_of(policy) for policy in rivals} == rivals


def cells(table):
    """A markdown table as a dict of dicts: by policy, then by heading."""
    head, _, *rows = (line.strip("| ").split(" | ") for line in table.splitlines())
    return {row[0]: dict(zip(head, row, strict=True)) for row in rows}


def test_a_table_names_what_is_proven_and_leaves_out_columns_that_tell_nothing(monkeypatch):
    runs = {
        "full": of([96.0, 96.1, 95.9], 1.0),
        "short@0.3": of([80.0] * 3, 0.3),
        "random@0.2": of([95.5, 95.6, 95.4], 0.4),
        "short@0.42": of([95.0, 95.1, 94.9], 0.42),
        "ast@0.2": of([95.9, 96.0, 95.8], 0.4),
        "ast@0.1": of([94.0, 96.0, 95.0], 0.2),
        "random@0.1": of([95.0], 0.2),
        "infobatch": of([93.0] * 3, 0.25),
    }
    monkeypatch.setattr(evidence, "load", lambda *_: runs)
    found = cells(evidence.table("bed"))
    first, second = found["ast@0.2"], found["ast@0.1"]
    assert (first["minus `random`"], first["minus `short`"]) == ("+0.40 ± 0.00", "+0.90 ± 0.00")
    assert first["minus `full`"] == "-0.10 ± 0.00 (not inferior)"
    assert first["minus `infobatch`"] == "-", "InfoBatch is a rival where it costs as much, or a little more"
    assert second["minus `infobatch`"] == "+2.00 ± 2.48"
    assert second["minus `random`"] == "-1.00 (1)", "its seeds, where they are not those of the row"
    assert second["minus `short`"] == "-", "short@0.3 is far dearer: no rival"
    assert first["seeds"] == "3" and next(iter(found)) == "full", "the dearest first"
    told = set(first)
    assert {"training s"} <= told and not {"joules", "minus `balanced`", "chosen wrong"} & told
    assert list(cells(evidence.table("bed", shown="^ast", without="seeds"))) == ["ast@0.2", "ast@0.1"]
    assert "seeds" not in cells(evidence.table("bed", without="seeds"))["full"]
    assert evidence.table("bed", shown="nobody") == evidence.NOTHING


def test_what_is_saved_is_told_with_its_interval_and_from_four_seeds_on(monkeypatch):
    many = {"full": of([90.0] * 4, 1.0), "short@0.5": of([88.0] * 4, 0.5), "ast@0.4": of([89.0] * 4, 0.6)}
    assert evidence.saved(many, "ast@0.4") == "20 % (20 to 20)"
    assert evidence.saved(many, "short@0.5") == "-"
    few = {name: dict(list(own.items())[:3]) for name, own in many.items()}
    assert evidence.saved(few, "ast@0.4") == "-"
    assert evidence.saved(many | {"ast@0.4": of([99.0] * 4, 0.6)}, "ast@0.4") == "-", "beyond full training"


def test_seconds_and_joules_of_a_shared_gpu_are_not_told(monkeypatch):
    runs = {"full": of([96.0] * 3, 1.0), "ast@0.2": of([95.0] * 3, 0.4)}
    monkeypatch.setattr(evidence, "load", lambda *_: runs)
    runs["full"][1]["side_by_side"] = 14
    runs["full"][2]["joules"] = 9.0  # and no joules where a run has none
    found = cells(evidence.table("bed"))
    assert (found["full"]["training s"], found["ast@0.2"]["training s"]) == ("-", "4")
    assert "joules" not in found["full"]
    axis = Figure().subplots()
    evidence.frontier(axis, runs)
    assert "FLOPs" in axis.get_xlabel()


@pytest.mark.parametrize("name", evidence.PICTURES)
def test_no_name_in_a_picture_lies_on_another(monkeypatch, tmp_path, name):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    evidence.draw(name)
    (figure,) = drawn
    figure.draw_without_rendering()
    texts = [text for text in figure.axes[0].texts if text.get_text()]
    boxes = [text.get_window_extent() for text in texts]
    assert len(boxes) == 5
    assert not [1 for a, b in itertools.combinations(boxes, 2) if a.overlaps(b)]
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)
    pixels = 830 / figure.get_figwidth() / 72  # a point, at README's width
    assert min(text.get_fontsize() * pixels for text in figure.findobj(Text) if text.get_text()) >= 9


def test_a_response_is_judged_by_when_it_settles_its_overshoot_and_its_end():
    def answer(rate_at, target=0.1, size=100, n=5000):
        times = np.arange(1, 401) * size / n
        return controller.judge([(t, rate_at(t - controller.BEFORE)) for t in times], target, n)

    at_once = answer(lambda t: 0.5 if t <= 0 else 0.1)
    assert at_once == {"settling_epochs": 0.0, "overshoot": 0.0, "error_at_the_end": 0.0}
    creeping = answer(lambda t: max(0.1, 0.5 - 0.2 * max(0.0, t)))
    assert 1.8 < creeping["settling_epochs"] < 2.7
    staying = answer(lambda t: 0.5)
    assert staying["settling_epochs"] is None and staying["error_at_the_end"] == pytest.approx(0.4)
    assert answer(lambda t: 0.5 if t <= 0 else 0.05 if t < 1 else 0.1)["overshoot"] == pytest.approx(0.05)


def test_every_name_that_the_measures_take_from_a_program_is_there(imagenet):
    for path in (ROOT / "benchmarks").glob("*.py"):
        for module, name in re.findall(
            r"\b(ast|program|images)\.([A-Za-z_]+)\b", path.read_text(encoding="utf-8")
        ):
            assert hasattr(imagenet if module == "program" else ast, name) or module == "images", (path, name)


def test_the_measures_train_as_the_program_does(data):
    trainer = bars.trainer(data, target_activation=0.1, **bars.SPARSE)
    assert trainer.train_source.batch_size == 60, "twenty steps an epoch"
    assert trainer.train(epochs=2)["activation_rate"] == pytest.approx(0.55)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A .zip of 10 classes in ImageNet-100's layout, of which 2 are taken, 3 images each to train on."""
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for number, (split, label, _) in enumerate(itertools.product(("train", "val"), range(10), range(6))):
            buffer = io.BytesIO()
            Image.new("RGB", (8, 8), (number, label, 0)).save(buffer, "png")
            archive.writestr(f"{split}/{label}/{number:03d}.png", buffer.getvalue())
    for name, small in {"SIDE": 32, "MARGIN": 4, "CLASSES": 2, "EACH": 3}.items():
        monkeypatch.setattr(finetuning, name, small)
    network = timm.create_model(finetuning.MODEL, num_classes=2)
    monkeypatch.setattr(finetuning, "network", lambda: copy.deepcopy(network))
    return tmp_path / "photos.zip"


def test_fine_tuning_is_judged_on_other_images_than_it_is_tuned_on_or_trained_on(photos):
    images, labels, judges, _ = finetuning.read(photos)
    again, _, held_out, _ = finetuning.read(photos, held_out=True)
    assert torch.equal(images, again) and labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images.shape[1:] == (36, 36, 3) and len(judges) == 12 and len(held_out) == 6
    kinds = [{image[0, 0].numpy().tobytes() for image in part} for part in (images, judges, held_out)]
    assert not any(a & b for a, b in itertools.combinations(kinds, 2))


@pytest.mark.slow
def test_policies_of_fine_tuning_cost_what_they_train(photos):
    data = finetuning.read(photos)
    found = {name: finetuning.measure(finetuning.policy(name), 0, data) for name in finetuning.POLICIES}
    assert found["full"]["cost"] == 1 and len(found["full"]["curve"]) == finetuning.EPOCHS
    assert found["short"]["cost"] == found["ast"]["cost"] == found["random"]["cost"] == pytest.approx(4 / 6)
    assert found["probed"]["cost"] == pytest.approx(1 + found["probe"]["cost"])
    assert found["half"]["cost"] < 0.8 and found["dense"]["cost"] < 1
    assert finetuning.policy("full lr=0.1") == replace(finetuning.POLICIES["full"], lr=0.1)
