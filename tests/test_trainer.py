"""The trainer from Python: other people's models on other people's data, and a hand on the controls."""

import math
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TIMED, at
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import cifar10_ast as ast

TRAIN = 800  # digits to train on; with batches of 32, a chunk is 40 and an epoch 20 chunks


@pytest.fixture(scope="module")
def digits():
    """scikit-learn's digits as (images [N, 1, 8, 8] in [0, 1], labels)."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.tensor(data.target)[order]


@pytest.fixture
def loaders(digits):
    train, val = (
        TensorDataset(*(part[where] for part in digits)) for where in (slice(TRAIN), slice(-500, None))
    )
    return DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=500)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))


def keeping(event, into):
    """A listener that keeps what it is told at `event`."""
    return lambda name, data: into.append(dict(data)) if name == event else None


class Counting(Dataset):
    """Counts how often each sample is read."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels
        self.reads = torch.zeros(len(images), dtype=torch.int64).share_memory_()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.reads[index] += 1
        return self.images[index], self.labels[index]


# --- the snippets of the original reports, imports and sizes of the data aside ---


def test_snippet_with_positional_config(model, loaders):
    train_loader, val_loader = loaders
    config = ast.ASTConfig(target_activation_rate=0.40)
    trainer = ast.AdaptiveSparseTrainer(model, train_loader, val_loader, config)
    results = trainer.train(epochs=100, warmup_epochs=10)
    assert results["final_accuracy"] > 94
    assert [row["phase"] for row in results["epochs"][:11]] == ["warmup"] * 10 + ["ramp"]
    assert len(results["epochs"]) == 100
    assert 30 < float(f"{results['energy_savings']:.2f}") < 60
    assert float(f"{results['speedup']:.2f}") > 1
    assert results["speedup_method"] == "unit model"


def test_snippet_with_a_dict(model, loaders):
    train_loader, val_loader = loaders
    trainer = ast.AdaptiveSparseTrainer(
        model=model,
        train_loader=train_loader,
        val_loader=val_loader,
        config={"target_activation_rate": 0.40, "epochs": 12, "learning_rate": 0.002},
    )
    results = trainer.train()
    assert len(results["epochs"]) == 12
    assert max(row["learning_rate"] for row in results["epochs"]) == pytest.approx(0.002, rel=0.2)
    assert results["final_accuracy"] > 90


def test_snippet_with_gains_optimizer_and_criterion(model, loaders):
    train_loader, val_loader = loaders
    config = ast.ASTConfig(
        target_activation_rate=0.40,
        initial_threshold=3.0,
        adapt_kp=0.005,
        adapt_ki=0.0001,
        ema_alpha=0.1,
        use_amp=True,
        device="cuda",
    )
    arguments = {
        "optimizer": torch.optim.Adam(model.parameters(), lr=0.001),
        "criterion": torch.nn.CrossEntropyLoss(reduction="none"),
    }
    if not torch.cuda.is_available():
        with pytest.raises(ast.BadInput, match=r"--device cuda: expected a GPU.*try --device cpu"):
            ast.AdaptiveSparseTrainer(model, train_loader, val_loader, config, **arguments)
        config.device = "cpu"
    trainer = ast.AdaptiveSparseTrainer(model, train_loader, val_loader, config, **arguments)
    results = trainer.train(epochs=4)
    assert trainer.optimizer is arguments["optimizer"]
    assert float(f"{results['energy_savings']:.2f}") > 0
    assert float(f"{results['speedup']:.2f}") > 1


# --- any data, any gate ---


@pytest.mark.parametrize("workers", [0, 2])
def test_only_activated_samples_are_read(digits, loaders, model, workers):
    data = Counting(*(part[:TRAIN] for part in digits))
    loader = DataLoader(data, batch_size=32, shuffle=True, num_workers=workers)
    config = ast.ASTConfig(target_activation=0.3, ramp_epochs=0, anneal_epochs=0, warmup_epochs=1)
    results = ast.AdaptiveSparseTrainer(model, loader, loaders[1], config, listeners=[]).train(epochs=3)
    assert int(data.reads.sum()) == results["activated"] == round(TRAIN * 1.6)
    assert results["candidates"] == 3 * TRAIN


def test_the_live_gate_reads_every_candidate_and_charges_its_scoring(digits, loaders, model):
    data = Counting(*(part[:TRAIN] for part in digits))
    config = ast.ASTConfig(gate="live", target_activation=0.3, ramp_epochs=0, anneal_epochs=0)
    loader = DataLoader(data, batch_size=32)
    results = ast.AdaptiveSparseTrainer(model, loader, loaders[1], config, listeners=[]).train(epochs=4)
    assert int(data.reads.sum()) == 4 * TRAIN
    assert results["activation_rate"] == pytest.approx((1 + 3 * 0.3) / 4, abs=0.02)
    scoring, forward = results["phases"]["scoring"], results["flops_per_sample"]["evaluation"]
    assert scoring["flops"] == pytest.approx(3 * TRAIN * forward)
    assert scoring["seconds"] > 0
    assert sum(row["scoring_seconds"] for row in results["epochs"]) == pytest.approx(scoring["seconds"])


@pytest.mark.parametrize("gate", ast.GATES)
def test_each_gate_holds_its_rate_and_learns(loaders, model, gate):
    config = ast.ASTConfig(gate=gate, target_activation=0.4, lr=3e-3)
    results = ast.AdaptiveSparseTrainer(model, *loaders, config, listeners=[]).train(epochs=10)
    assert results["final_accuracy"] > 88
    assert results["policy"] == ("ast" if gate in ast.SCORED else gate)
    for row in results["epochs"]:
        assert row["activation_rate"] == pytest.approx(row["target_activation"], abs=0.05)
    assert (results["activation_rate"] == 1) == (gate == "full")


class EveryOther:
    """A gate of one's own; `views`: one that stands after the loader."""

    def __init__(self, views):
        self.needs_views, self.observed = views, []

    def select(self, candidates, target, generator):
        if self.needs_views:
            assert len(candidates.images) == len(candidates.labels) == len(candidates.indices)
            candidates = candidates.indices
        return candidates[::2], torch.ones(len(candidates[::2]))

    def observe(self, indices, losses):
        self.observed += zip(indices.tolist(), losses.tolist(), strict=True)


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("given", ["to the trainer", "afterwards"])
def test_a_gate_of_ones_own_is_taken(loaders, model, views, given):
    gate, config = EveryOther(views), {"warmup_epochs": 0, "ramp_epochs": 0, "anneal_epochs": 0}
    options = {"gate": gate} if given == "to the trainer" else {}
    trainer = ast.AdaptiveSparseTrainer(model, *loaders, config, listeners=[], **options)
    trainer.gate = gate
    results = trainer.train(epochs=2)
    assert results["activation_rate"] == pytest.approx(0.5, abs=0.02)
    assert len(gate.observed) == results["activated"]
    assert all(math.isfinite(loss) and loss >= 0 for _, loss in gate.observed)
    assert results["policy"] == "ast"
    assert results["epochs"][-1]["threshold"] is results["epochs"][-1]["significance_quantiles"] is None


# --- any model, optimizer and criterion ---


def test_optimizers_that_need_a_closure_are_told(loaders, model):
    class Sharpness(torch.optim.SGD):
        def step(self, closure=None):
            assert closure is not None, "it looks twice"

    for optimizer in (torch.optim.LBFGS(model.parameters()), Sharpness(model.parameters(), 0.1)):
        trainer = ast.AdaptiveSparseTrainer(model, *loaders, {"device": torch.device("cpu")}, optimizer)
        with pytest.raises(ast.BadInput, match=r"expected an optimizer that needs no closure, such as AdamW"):
            trainer.train(epochs=1)


@pytest.mark.parametrize(
    "wrong,told",
    [
        (nn.Sequential(nn.Flatten(0), nn.Linear(128, 10)), r"returns \[10\]: expected logits \[samples,"),
        (nn.Identity(), r"returns \[2, 1, 8, 8\]: expected logits"),
        (nn.Sequential(nn.Flatten(2), nn.RNN(64, 10, batch_first=True)), "returns tuple: expected logits"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), r"labels from \d to \d: expected 0 to 4"),
    ],
    ids=["too few dimensions", "too many", "a tuple", "too few classes"],
)
def test_a_model_that_does_not_fit_is_told_before_a_step_is_taken(loaders, wrong, told):
    before = [p.clone() for p in wrong.parameters()]
    optimizer = torch.optim.SGD([*wrong.parameters(), nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ast.BadInput, match=told):
        ast.AdaptiveSparseTrainer(wrong, *loaders, optimizer=optimizer, listeners=[]).train(epochs=1)
    assert all(torch.equal(p, q) for p, q in zip(before, wrong.parameters(), strict=True))


def test_a_criterion_of_ones_own_trains_and_scores_stay_raw_losses(loaders, model):
    def doubled(logits, labels):
        return 2 * nn.functional.cross_entropy(logits, labels, reduction="none")

    gate = EveryOther(False)
    trainer = ast.AdaptiveSparseTrainer(model, *loaders, criterion=doubled, gate=gate, listeners=[])
    row = trainer.train(epochs=1)["epochs"][0]
    assert row["train_loss"] == pytest.approx(2 * np.mean([loss for _, loss in gate.observed]), rel=1e-4)


def test_every_group_keeps_its_share_of_the_learning_rate(loaders, model):
    groups = [{"params": model[1].parameters(), "lr": 0.1}, {"params": model[4].parameters(), "lr": 0.02}]
    optimizer, rates = torch.optim.SGD(groups), []
    model[1].register_forward_hook(lambda *_: rates.append([group["lr"] for group in optimizer.param_groups]))
    ast.AdaptiveSparseTrainer(model, *loaders, optimizer=optimizer, listeners=[]).train(epochs=6)
    rates = np.array(rates[2:])  # after the two passes that count FLOPs
    assert rates[:, 0] == pytest.approx(5 * rates[:, 1])
    assert rates[:, 0].max() == pytest.approx(0.1, rel=0.05)
    assert rates[0, 0] < 0.03
    assert 0 <= rates[-1, 0] < 0.002, "it ends at zero"
    peak = int(rates[:, 0].argmax())
    assert (np.diff(rates[:peak, 0]) >= 0).all()
    assert (np.diff(rates[peak:, 0]) <= 0).all()


def test_clip_norm_bounds_a_step(digits):
    def moved(clip_norm):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        before, optimizer = network[1].weight.clone(), torch.optim.SGD(network[1:].parameters(), lr=1.0)
        config = {"amp": "off", "batch_size": len(digits[0]), "device": "cpu"}
        how = {"listeners": [], "clip_norm": clip_norm}
        ast.AdaptiveSparseTrainer(network, digits, digits, config, optimizer, **how).train(epochs=1)
        return float((network[1].weight - before).detach().norm())

    assert moved(1e-3) <= 0.2 * 1e-3 * 1.01 < moved(0.0) / 10, "0.2: the schedule's share of the only step"


def test_frozen_batch_norm_stays_frozen(loaders, model):
    norm = model[2].eval()
    before = norm.running_mean.clone()
    ast.AdaptiveSparseTrainer(model, *loaders, {"gate": "live"}, listeners=[]).train(epochs=4)
    assert not norm.training
    assert model[0].training
    assert torch.equal(norm.running_mean, before)


# --- a person's wishes ---


def trained(loaders, model, listeners=(), controls=None, epochs=5, **config):
    """The trainer after a run, and its results."""
    config = {"target_activation": 0.4, "ramp_epochs": 0, "anneal_epochs": 0, "device": "cpu"} | config
    trainer = ast.AdaptiveSparseTrainer(model, *loaders, config, listeners=listeners, controls=controls)
    return trainer, trainer.train(epochs=epochs)


def test_a_dragged_target_takes_hold_at_the_next_chunk_and_the_rate_still_ends_at_zero(loaders, model):
    controls, chunks, told = ast.Controls(), [], []
    drag = at("chunk", 30, lambda: controls.set("target_activation", 0.1))
    listeners = [keeping("chunk", chunks), drag, keeping("control", told)]
    _, results = trained(loaders, model, listeners, controls)
    assert [chunk["rate"] for chunk in chunks[28:32]] == [0.4, 0.4, 0.1, 0.1]
    [change] = told
    assert results["changes"] == [change]
    assert (change["control"], change["old"], change["new"]) == ("target_activation", 0.4, 0.1)
    assert change["set_at"] == change["candidates"] == 30 * TRAIN / 20
    assert change["epochs"] == pytest.approx(1.5)
    assert abs(change["time"] - time.time()) < 600
    assert change["words"] == "target activation 0.1"
    assert [row["activation_rate"] for row in results["epochs"][2:]] == pytest.approx([0.1] * 3, abs=0.01)
    rates = [row["learning_rate"] for row in results["epochs"]]
    assert rates[-1] < 0.1 * max(rates)


def test_a_learning_rate_factor_multiplies_what_the_schedule_says(digits, model):
    def train(wish):
        torch.manual_seed(0)
        network, controls, rates = nn.Linear(64, 10), ast.Controls(), []
        flat = digits[0].flatten(1)[:TRAIN], digits[1][:TRAIN]
        ask = at("chunk", 50, lambda: wish and controls.set("learning_rate_factor", wish))
        watch = lambda event, data: rates.append(trainer.optimizer.param_groups[0]["lr"])  # noqa: E731
        trainer = ast.AdaptiveSparseTrainer(network, flat, flat, listeners=[ask, watch], controls=controls)
        trainer.train(epochs=4)
        return rates

    usual, tenth = train(None), train(0.1)
    assert len(tenth) == len(usual) + 1, "the change itself is an event"
    assert tenth[:50] == usual[:50]
    assert tenth[60:] == pytest.approx([0.1 * rate for rate in usual[59:]])


def test_only_the_target_of_sparse_and_ramp_epochs_can_be_moved(loaders, model):
    controls = ast.Controls()
    controls.set("target_activation", 0.1)
    _, results = trained(loaders, model, (), controls, warmup_epochs=1, anneal_epochs=1)
    assert [round(row["activation_rate"], 2) for row in results["epochs"]] == [1, 0.1, 0.1, 0.1, 1]


WRONG = [("target_activation", value) for value in (0, 1.5, math.nan)]
WRONG += [("learning_rate_factor", 0), ("learning_rate_factor", math.inf), ("temperature", 0.5)]


@pytest.mark.parametrize("control,value", WRONG)
def test_a_wish_that_cannot_be_is_refused_and_changes_nothing(control, value):
    controls = ast.Controls()
    with pytest.raises(ast.BadInput, match=rf"control {control} {value}: expected target_activation in"):
        controls.set(control, value)
    assert controls.values == ast.Controls().values
    assert not controls.asked


@pytest.mark.parametrize("gate", ast.SCORED)
def test_progress_never_goes_back_and_ends_at_one_whatever_is_dragged(loaders, model, gate):
    controls, chunks = ast.Controls(), []
    up = at("chunk", 30, lambda: controls.set("target_activation", 0.9))
    down = at("chunk", 55, lambda: controls.set("target_activation", 0.05))
    trainer, _ = trained(loaders, model, [keeping("chunk", chunks), up, down], controls, gate=gate)
    seen = [chunk["progress"] for chunk in chunks] + [trainer.progress]
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0, 1)


def test_a_stop_ends_after_the_step_in_hand_with_results_so_far(loaders, model):
    controls, chunks, steps = ast.Controls(), [], []
    model.register_forward_hook(lambda *_: steps.append(len(chunks)) if model.training else None)
    stop = at("chunk", 50, lambda: controls.ask_stop("stop button"))
    _, results = trained(loaders, model, [keeping("chunk", chunks), stop], controls)
    assert sum(decided >= 50 for decided in steps) == 1, "one step after the wish"
    assert not results["complete"]
    assert [row["epoch"] for row in results["epochs"]] == [1, 2]
    assert results["final_accuracy"] == results["epochs"][-1]["val_accuracy"]
    assert results["candidates"] == len(chunks) * TRAIN / 20 < 3 * TRAIN, "what the cut epoch has cost counts"
    [change] = results["changes"]
    assert (change["control"], change["new"], change["old"]) == ("stop", "stop button", None)
    assert change["epochs"] == pytest.approx(2.5)


@pytest.mark.parametrize("chunk", [0, 3])
def test_stopped_before_an_epoch_has_ended_results_claim_nothing(loaders, model, chunk):
    controls = ast.Controls()
    controls.stop = None if chunk else "enough"
    stop = at("chunk", chunk, lambda: controls.ask_stop("enough"))
    _, results = trained(loaders, model, [stop], controls)
    assert not results["complete"]
    assert results["epochs"] == []
    assert results["final_accuracy"] is results["best_accuracy"] is None


def paused(loaders):
    """A run in a thread that was paused in its third epoch and stands still."""
    torch.manual_seed(0)
    made = SimpleNamespace(controls=ast.Controls(), chunks=[], results=[], began=time.perf_counter())
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    listeners = [keeping("chunk", made.chunks), at("chunk", 50, lambda: made.controls.pause(True))]
    work = lambda: made.results.append(trained(loaders, network, listeners, made.controls)[1])  # noqa: E731
    made.worker = threading.Thread(target=work, daemon=True)
    made.worker.start()
    until, made.stood = time.monotonic() + 60, 0
    while made.stood < 50 or len(made.chunks) > made.stood:  # it stands still
        assert time.monotonic() < until
        made.stood = len(made.chunks)
        time.sleep(0.2)
    return made


def ended(made):
    made.worker.join(60)
    assert not made.worker.is_alive()
    return made.results[0]


def test_a_pause_offers_no_candidate_costs_nobody_and_changes_nothing(digits):
    arrays = [tuple(part[:TRAIN] for part in digits)] * 2
    torch.manual_seed(0)
    _, undisturbed = trained(arrays, nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    made = paused(arrays)
    stood = time.perf_counter()
    time.sleep(0.5)
    assert len(made.chunks) == made.stood < 60
    stood = time.perf_counter() - stood
    made.controls.pause(False)
    results = ended(made)
    assert results["total_seconds"] <= time.perf_counter() - made.began - stood
    told = [[change[key] for key in ("control", "old", "new", "words")] for change in results["changes"]]
    assert told == [["paused", False, True, "paused"], ["paused", True, False, "resumed"]]
    for row, expected in zip(results["epochs"], undisturbed["epochs"], strict=True):
        assert {k: v for k, v in row.items() if expected[k] != v}.keys() <= TIMED


@pytest.mark.parametrize("how", ["stop button", "time limit"])
def test_a_paused_run_can_be_stopped_and_ends_at_its_time_limit(digits, how):
    made = paused([digits, digits])
    if how == "stop button":
        made.controls.ask_stop(how)
    else:
        made.controls.deadline = time.monotonic()
    assert not ended(made)["complete"]
    assert made.controls.stop == how
    assert len(made.chunks) == made.stood


# --- events and results ---


def test_listeners_are_told_in_order_what_the_run_does(loaders, model):
    told = []
    listener = lambda event, data: told.append((event, dict(data)))  # noqa: E731
    config = {"target_activation": 0.4, "warmup_epochs": 1, "ramp_epochs": 1, "anneal_epochs": 1}
    trainer = ast.AdaptiveSparseTrainer(model, *loaders, config, listeners=[listener], seed=7)
    results = trainer.train(epochs=4)
    told = [(event, data) for event, data in told if event != "notice"]  # a busy machine waits for data
    epoch = [*["chunk"] * 20, "epoch"]
    assert [event for event, _ in told] == ["start", *epoch, *epoch, *epoch, *epoch, "end"]
    about = {"policy": "ast", "seed": 7, "epochs": 4, "n": TRAIN}
    assert told[0][1] == about | {"rows": [], "changes": []}
    assert told[-1][1] == results
    chunks = [data for event, data in told if event == "chunk"]
    assert [chunk["candidates"] for chunk in chunks[:21]] == [*range(40, 801, 40), 40]
    assert {chunk["n"] for chunk in chunks} == {TRAIN}
    assert [chunk["phase"] for chunk in chunks[::20]] == ["warmup", "ramp", "sparse", "anneal"]
    assert [chunk["gate"] for chunk in chunks[::20]] == [None, trainer.gate, trainer.gate, None]
    assert [chunk["rate"] for chunk in chunks[::20]] == [1, 0.7, 0.4, 1]
    assert sum(chunk["offered"] for chunk in chunks) == results["candidates"]
    assert sum(chunk["activated"] for chunk in chunks) == results["activated"]
    for key in ("seconds", "train_seconds", "flops"):
        assert [chunk[key] for chunk in chunks] == sorted(chunk[key] for chunk in chunks)
    assert chunks[-1]["flops_per_sample"] == results["flops_per_sample"]
    epochs = [data for event, data in told if event == "epoch"]
    for data, row in zip(epochs, results["epochs"], strict=True):
        assert data.items() >= (row | {"epochs": 4}).items()


def test_results_follow_from_the_epochs(loaders, model):
    trainer, results = trained(loaders, model, epochs=6, anneal_epochs=1)
    epochs = results["epochs"]
    assert results["complete"]
    assert (results["policy"], results["seed"]) == ("ast", 0)
    assert results["final_accuracy"] == epochs[-1]["val_accuracy"]
    assert results["best_accuracy"] == max(row["val_accuracy"] for row in epochs)
    for key in ("candidates", "activated"):
        assert results[key] == sum(row[key] for row in epochs)
    assert results["activation_rate"] == pytest.approx(results["activated"] / (6 * TRAIN))
    assert results["activation_rate"] == pytest.approx(epochs[-1]["mean_activation"])
    unit = 10 * results["activated"] + 0.1 * (6 * TRAIN - results["activated"])
    assert results["unit_energy"] == pytest.approx(unit)
    assert results["energy_savings"] == pytest.approx(100 * (1 - unit / (10 * 6 * TRAIN)))
    assert results["speedup"] == pytest.approx(10 * 6 * TRAIN / unit)
    assert results["train_seconds"] == pytest.approx(sum(row["seconds"] for row in epochs), rel=0.05)
    assert results["train_seconds"] < results["total_seconds"]
    assert (results["joules"] is None) == results["joules_method"].startswith("unavailable (")
    assert int(trainer.times_activated.sum()) == sum(r["activated"] for r in epochs if r["phase"] == "sparse")


@pytest.mark.parametrize("trained_before", [False, True])
def test_policies_are_compared_from_the_same_weights_and_the_speedup_is_measured(
    loaders, model, trained_before
):
    config, notices = {"device": "cpu", "amp": "off", "target_activation": 0.3}, []
    options = {"listeners": [keeping("notice", notices)]}
    trainer = ast.AdaptiveSparseTrainer(model, *loaders, config, **options)
    if trained_before:
        trainer.train(epochs=2)
    found = trainer.compare(["full", "random", "short"], epochs=8, warmup_epochs=1)
    assert list(found) == ["ast", "full", "random", "short"]
    assert ["no optimizer given" in notice["text"] for notice in notices] == [True] * (1 + trained_before)
    counts = {name: [row["activated"] for row in result["epochs"]] for name, result in found.items()}
    assert counts["random"] == counts["ast"] and counts["full"] == [TRAIN] * 8
    assert abs(sum(counts["short"]) - sum(counts["ast"])) <= TRAIN / 2
    assert min(result["final_accuracy"] for result in found.values()) > 60, "all have learned"
    first = found["ast"]
    assert first["speedup"] == pytest.approx(found["full"]["train_seconds"] / first["train_seconds"])
    assert first["speedup_method"] == "measured against full training"


def test_training_again_begins_anew_on_the_weights_as_they_are(loaders, model):
    trainer = ast.AdaptiveSparseTrainer(model, *loaders, {"lr": 1e-3}, listeners=[])
    first, second = trainer.train(epochs=2), trainer.train(epochs=3)
    assert [row["epoch"] for row in second["epochs"]] == [1, 2, 3]
    assert second["epochs"][0]["train_loss"] < first["epochs"][0]["train_loss"]
    assert second["candidates"] == 3 * TRAIN
    assert (len(first["epochs"]), first["candidates"]) == (2, 2 * TRAIN), "as they were"


def test_a_table_is_printed_unless_there_are_listeners(loaders, model, capfd):
    ast.AdaptiveSparseTrainer(model, *loaders, listeners=[]).train(epochs=2)
    assert capfd.readouterr() == ("", "")
    ast.AdaptiveSparseTrainer(model, *loaders).train(epochs=2)
    shown = [
        line
        for line in capfd.readouterr().out.splitlines()
        if not line.startswith(("training waited", "no optimizer"))
    ]
    assert [line.split()[1:3] for line in shown] == [["epoch", "phase"], ["1/2", "warmup"], ["2/2", "sparse"]]


# --- waiting ---


@pytest.mark.parametrize(
    "reading,computing,remembering,told",
    [(1.0, 0.01, 0.0, 1), (0.001, 1.0, 0.0, 0), (0.0, 0.01, 100.0, 0)],
    ids=["data are slow", "steps are slow", "losses are read slowly"],
)
def test_waiting_for_data_and_for_nothing_else_brings_one_line_of_advice(
    digits, monkeypatch, reading, computing, remembering, told
):
    clock, notices = SimpleNamespace(now=1000.0), []
    clock.perf_counter = clock.monotonic = lambda: clock.now
    monkeypatch.setattr(ast, "time", clock)

    def takes(seconds):
        clock.now += seconds

    class Slow(Counting):
        def __getitem__(self, index):
            takes(reading)
            return super().__getitem__(index)

    class Device(nn.Linear):
        def forward(self, x):
            takes(computing * len(x))
            return super().forward(x.flatten(1))

    gate = EveryOther(False)
    gate.observe = lambda indices, losses: takes(remembering)
    data, val = Slow(*(part[:64] for part in digits)), (digits[0][:8], digits[1][:8])
    trainer = ast.AdaptiveSparseTrainer(
        Device(64, 10), DataLoader(data, batch_size=8), val, {"device": "cpu", "lr": 0.001},
        gate=gate, listeners=[keeping("notice", notices)],
    )  # fmt: skip
    results = trainer.train(epochs=3)
    assert [notice["text"].partition(";")[0] for notice in notices] == [
        "training waited for data in 99 % of epoch 1"
    ][:told]
    assert all("give the DataLoader more workers" in notice["text"] for notice in notices)
    whole = reading + computing + remembering
    for row in results["epochs"]:
        assert row["data_wait_percent"] == pytest.approx(100 * reading / whole, abs=3)
