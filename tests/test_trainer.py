"""The Python use: other people's models on other people's data, and the snippets of the original reports."""

import math
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler

TRAIN = 1400


@pytest.fixture(scope="module")
def digits():
    """scikit-learn's digits as (images [N, 1, 8, 8] in [0, 1], labels)."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.tensor(data.target)[order]


@pytest.fixture
def loaders(digits):
    images, labels = digits
    train = TensorDataset(images[:TRAIN], labels[:TRAIN])
    val = TensorDataset(images[TRAIN:], labels[TRAIN:])
    return DataLoader(train, batch_size=32, shuffle=True), DataLoader(val, batch_size=100)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 10))


def noticed(texts):
    """Listeners that add each notice to `texts`."""
    return [lambda event, data: texts.append(data["text"]) if event == "notice" else None]


class Counting(Dataset):
    """Counts how often each sample is read; `broken` ones raise what PIL raises."""

    def __init__(self, images, labels, broken=()):
        self.images, self.labels, self.broken = images, labels, set(broken)
        self.reads = torch.zeros(len(images), dtype=torch.int64)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.reads[index] += 1
        if index in self.broken:
            raise OSError(f"cannot identify image file {index}")
        return self.images[index], self.labels[index]


# --- the snippets of the original reports, imports and sizes of the data aside ---


def test_snippet_with_positional_config(cifar, model, loaders):
    train_loader, val_loader = loaders
    config = cifar.ASTConfig(target_activation_rate=0.40)
    trainer = cifar.AdaptiveSparseTrainer(model, train_loader, val_loader, config)
    results = trainer.train(epochs=100, warmup_epochs=10)
    assert results["final_accuracy"] > 95
    assert [row["phase"] for row in results["epochs"][:11]] == ["warmup"] * 10 + ["ramp"]
    assert len(results["epochs"]) == 100
    assert 30 < float(f"{results['energy_savings']:.2f}") < 60
    assert float(f"{results['speedup']:.2f}") > 1
    assert results["speedup_method"] == "unit model"


def test_snippet_with_a_dict(cifar, model, loaders):
    train_loader, val_loader = loaders
    trainer = cifar.AdaptiveSparseTrainer(
        model=model,
        train_loader=train_loader,
        val_loader=val_loader,
        config={"target_activation_rate": 0.40, "epochs": 100, "learning_rate": 0.001},
    )
    results = trainer.train()
    assert len(results["epochs"]) == 100
    assert results["final_accuracy"] > 95


def test_snippet_with_gains_optimizer_and_criterion(cifar, model, loaders):
    train_loader, val_loader = loaders
    config = cifar.ASTConfig(
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
        with pytest.raises(cifar.BadInput, match="cuda: expected a CUDA GPU"):
            cifar.AdaptiveSparseTrainer(model, train_loader, val_loader, config, **arguments)
        config.device = "cpu"
    said = []
    trainer = cifar.AdaptiveSparseTrainer(
        model, train_loader, val_loader, config, listeners=[lambda *event: said.append(event)], **arguments
    )
    results = trainer.train(epochs=4)
    assert float(f"{results['energy_savings']:.2f}") > 0
    assert float(f"{results['speedup']:.2f}") > 1
    assert any(event == "notice" and "feedforward=False" in data["text"] for event, data in said)


# --- what a skipped sample costs ---


@pytest.mark.parametrize("workers", [0, 2])
def test_only_activated_samples_are_read(cifar, digits, loaders, model, workers):
    dataset = Counting(digits[0][:TRAIN], digits[1][:TRAIN])
    dataset.reads.share_memory_()
    loader = DataLoader(dataset, batch_size=32, shuffle=True, num_workers=workers)
    config = cifar.ASTConfig(target_activation=0.3, ramp_epochs=0, anneal_epochs=0, warmup_epochs=1)
    trainer = cifar.AdaptiveSparseTrainer(model, loader, loaders[1], config, listeners=[])
    results = trainer.train(epochs=4)
    assert int(dataset.reads.sum()) == results["activated"] == round(TRAIN * 1.9)
    assert results["candidates"] == 4 * TRAIN


def test_the_live_gate_reads_every_candidate_and_charges_its_scoring(cifar, digits, loaders, model):
    dataset = Counting(digits[0][:TRAIN], digits[1][:TRAIN])
    config = cifar.ASTConfig(gate="live", target_activation=0.3, ramp_epochs=0, anneal_epochs=0)
    loader = DataLoader(dataset, batch_size=32)
    trainer = cifar.AdaptiveSparseTrainer(model, loader, loaders[1], config, listeners=[])
    results = trainer.train(epochs=4)
    assert int(dataset.reads.sum()) == 4 * TRAIN
    assert results["activation_rate"] == pytest.approx((1 + 3 * 0.3) / 4, abs=0.02)
    forward = results["flops_per_sample"]["scoring"]
    assert results["phases"]["scoring"]["flops"] == pytest.approx(3 * TRAIN * forward)
    assert results["phases"]["scoring"]["seconds"] > 0


class Watched:
    """Keeps what the proxy's parameters were after each epoch."""

    def __init__(self):
        self.trainer, self.epochs = None, []

    def __call__(self, event, data):
        if event == "epoch":
            weights = nn.utils.parameters_to_vector(self.trainer.gate.network.parameters())
            self.epochs.append(weights.detach().clone())


def test_the_proxy_gate_charges_its_network_and_learns_until_the_anneal(cifar, digits, loaders, model):
    watched = Watched()
    config = cifar.ASTConfig(gate="proxy", target_activation=0.3, ramp_epochs=0, anneal_epochs=1)
    trainer = cifar.AdaptiveSparseTrainer(model, *loaders, config, listeners=[watched])
    watched.trainer = trainer
    results = trainer.train(epochs=5)
    assert results["activated"] == pytest.approx(TRAIN * (2 + 3 * 0.3), abs=2)
    per = results["flops_per_sample"]
    # three convolutions on one channel of 8 x 8 pixels, the sides halved twice, and the last layer
    by_hand = 2 * (9 * 16 * 64 + 9 * 16 * 32 * 16 + 9 * 32 * 64 * 4 + 64 * 10)
    assert per["proxy scoring"] == pytest.approx(by_hand)
    batches = [32] * (TRAIN // 32 - 1) + [math.ceil((32 + TRAIN % 32) / 2), (32 + TRAIN % 32) // 2]
    learned = sum(math.ceil(0.25 * size) for size in batches)
    expected = 4 * (TRAIN * per["proxy scoring"] + learned * per["proxy training"])
    assert results["phases"]["scoring"]["flops"] == pytest.approx(expected)
    moved = [not torch.equal(a, b) for a, b in zip(watched.epochs, watched.epochs[1:], strict=False)]
    assert moved == [True, True, True, False], (
        "it learns in warm-up and sparse epochs, and rests in the anneal"
    )


def test_the_proxy_leaves_the_model_and_its_random_numbers_alone(cifar, loaders):
    def trained(gate):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Dropout(0.2), nn.Linear(144, 10))
        config = cifar.ASTConfig(gate=gate, target_activation=1.0, warmup_epochs=1)
        cifar.AdaptiveSparseTrainer(model, *loaders, config, listeners=[]).train(epochs=2)
        return nn.utils.parameters_to_vector(model.parameters())

    assert torch.equal(trained("proxy"), trained("full"))


def test_the_proxy_takes_inputs_that_are_no_images(cifar, digits):
    flat = TensorDataset(digits[0].flatten(1), digits[1])
    config = {"gate": "proxy", "target_activation": 0.4, "lr": 3e-3}
    trainer = cifar.AdaptiveSparseTrainer(nn.Linear(64, 10), flat, flat, config, listeners=[])
    assert trainer.train(epochs=15)["final_accuracy"] > 85
    assert sum(p.numel() for p in trainer.gate.network.parameters()) == 64 * 64 + 64 + 64 * 10 + 10


def test_a_broken_image_does_not_blind_the_proxy_to_its_batch(cifar, digits, model):
    images = digits[0].clone()
    images[::50] = math.nan
    config = cifar.ASTConfig(
        gate="proxy", target_activation=0.4, ramp_epochs=0, anneal_epochs=0, device="cpu"
    )
    broken, whole = TensorDataset(images, digits[1]), TensorDataset(*digits)
    watched = Watched()
    trainer = cifar.AdaptiveSparseTrainer(model, broken, whole, config, listeners=[watched])
    watched.trainer = trainer
    results = trainer.train(epochs=3)
    assert results["epochs"][-1]["activation_rate"] == pytest.approx(0.4, abs=0.02)
    assert all(weights.isfinite().all() for weights in watched.epochs)
    assert not torch.equal(watched.epochs[0], watched.epochs[-1])
    views = cifar.Views(torch.arange(100), images[:100], digits[1][:100])
    chosen, _ = trainer.gate.select(views, 0.5, torch.Generator())
    assert not set(chosen.tolist()) & {0, 50}, "a broken view is never among the hardest"


class Picky(nn.Module):
    """A network for images of 80 x 100 pixels and no others."""

    def __init__(self, outputs=3):
        super().__init__()
        self.last = nn.Linear(80 * 100, outputs)

    def forward(self, images):
        assert images.shape[-2:] == (80, 100)
        return self.last(images.mean(1).flatten(1))


def test_the_proxy_shrinks_large_images_for_itself_alone(cifar):
    images, labels = torch.rand(64, 3, 80, 100), torch.arange(64) % 3
    config = {"gate": "proxy", "target_activation": 0.5, "batch_size": 16, "ramp_epochs": 0}
    trainer = cifar.AdaptiveSparseTrainer(Picky(), (images, labels), (images, labels), config, listeners=[])
    results = trainer.train(epochs=4)
    per = results["flops_per_sample"]
    by_hand = 2 * (27 * 16 * 51 * 64 + 9 * 16 * 32 * 26 * 32 + 9 * 32 * 64 * 13 * 16 + 64 * 3)
    assert per["proxy scoring"] == pytest.approx(by_hand), "64 pixels at the longer side"


def test_a_model_that_the_proxy_cannot_serve_is_refused_in_a_sentence(cifar):
    class Pair(Picky):
        def forward(self, images):
            return super().forward(images), images

    images, labels = torch.rand(32, 3, 80, 100), torch.arange(32) % 3
    data = ((images, labels), (images, labels))
    for model, words in ((Pair(), "a model that returned tuple"), (Picky(2), "labels from 0 to 2")):
        trainer = cifar.AdaptiveSparseTrainer(model, *data, {"gate": "proxy"}, listeners=[])
        with pytest.raises(cifar.BadInput, match=words):
            trainer.train(epochs=3)


def test_settings_that_the_proxy_does_not_read_are_said_to_be_idle(cifar, loaders, model):
    texts = []
    config = {"gate": "proxy", "significance": "margin", "target_activation": 1.0}
    cifar.AdaptiveSparseTrainer(model, *loaders, config, listeners=noticed(texts)).train(epochs=1)
    texts = [text for text in texts if "waited for data" not in text]  # which a busy machine adds
    assert texts == ["significance acts with other gates only"]


class Targets(Counting):
    """As torchvision's datasets: the labels can be had without loading an image."""

    @property
    def targets(self):
        return self.labels.tolist()


@pytest.mark.parametrize("kind", ["arrays", "targets", "tensors"])
def test_balance_activates_rare_classes_as_often_as_common_ones(cifar, digits, model, kind):
    images, labels = digits
    kept = torch.cat([(labels == c).nonzero().flatten()[: 20 if c < 5 else 170] for c in range(10)])
    images, labels = images[kept], labels[kept]
    wrapped = {"arrays": lambda i, k: (i, k), "targets": Targets, "tensors": TensorDataset}[kind](
        images, labels
    )
    data = wrapped if kind == "arrays" else DataLoader(wrapped, batch_size=32, shuffle=True)
    config = {"target_activation": 0.2, "balance": True, "warmup_epochs": 1, "ramp_epochs": 0}
    trainer = cifar.AdaptiveSparseTrainer(model, data, (images, labels), config, listeners=[])
    results = trainer.train(epochs=12)
    assert results["epochs"][5]["activation_rate"] == pytest.approx(0.2, abs=0.01)
    by_class = torch.zeros(10).index_add(0, labels, trainer.times_activated.float())
    assert by_class[:5].mean() > 0.5 * by_class[5:].mean(), "by chance it would be an eighth"


def test_balance_without_labels_to_go_by_is_refused_in_a_sentence(cifar, digits, loaders, model):
    train = DataLoader(Counting(*digits), batch_size=32, shuffle=True)
    with pytest.raises(cifar.BadInput, match="image: none; expected 1797 of 0 or more; give arrays"):
        cifar.AdaptiveSparseTrainer(model, train, loaders[1], {"balance": True})


@pytest.mark.parametrize("targets", [["cat"] * 1797, {"a": 1}, None])
def test_targets_that_are_no_classes_are_no_labels_to_balance(cifar, digits, loaders, model, targets):
    data = Counting(*digits)
    data.targets = targets
    with pytest.raises(cifar.BadInput, match="without loading an image: none; expected 1797"):
        cifar.AdaptiveSparseTrainer(
            model, DataLoader(data, batch_size=32, shuffle=True), loaders[1], {"balance": True}
        )


def test_labels_that_a_dataset_changes_are_not_balanced_by(cifar, digits, loaders, model):
    data = Targets(*digits)
    data.target_transform = lambda label: label // 5
    with pytest.raises(cifar.BadInput, match="balance"):
        cifar.AdaptiveSparseTrainer(
            model, DataLoader(data, batch_size=32, shuffle=True), loaders[1], {"balance": True}
        )


def test_choosing_a_gate_that_cannot_be_made_is_told_and_changes_nothing(cifar, digits, loaders, model):
    texts, controls = [], cifar.Controls()
    controls.values["gate"] = "remembered"
    data = DataLoader(Counting(*digits), batch_size=32, shuffle=True)
    config = {"gate": "live", "balance": True}
    trainer = cifar.AdaptiveSparseTrainer(
        model, data, loaders[1], config, listeners=noticed(texts), controls=controls
    )
    trainer.train(epochs=3)
    assert any(str(text).startswith("gate remembered not taken: balance: ") for text in texts)
    assert trainer.gate_name == "live"


@pytest.mark.parametrize("gate", ["live", "proxy"])
def test_balance_is_said_to_be_idle_where_views_are_chosen(cifar, loaders, model, gate):
    texts = []
    config = {"gate": gate, "balance": True, "target_activation": 1.0}
    cifar.AdaptiveSparseTrainer(model, *loaders, config, listeners=noticed(texts)).train(epochs=1)
    assert "balance acts with the gate remembered only" in texts


@pytest.mark.parametrize("gate", ["remembered", "random", "rs2", "live", "proxy", "full"])
def test_each_gate_holds_its_rate_and_learns(cifar, loaders, model, gate):
    config = cifar.ASTConfig(gate=gate, target_activation=0.4, lr=3e-3)
    trainer = cifar.AdaptiveSparseTrainer(model, *loaders, config, listeners=[])
    results = trainer.train(epochs=12)
    assert results["final_accuracy"] > 90
    for row in results["epochs"]:
        assert row["activation_rate"] == pytest.approx(row["target_activation"], abs=0.03)
    if gate == "full":
        assert results["activation_rate"] == 1
    if gate == "rs2":
        assert {row["phase"] for row in results["epochs"]} == {"sparse"}


def test_arrays_and_map_style_datasets_serve_as_well(cifar, digits):
    images, labels = (part.numpy() for part in digits)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    arrays = cifar.AdaptiveSparseTrainer(
        linear, (images, labels), (images, labels), {"batch_size": 16, "lr": 0.01}, listeners=[]
    )
    assert arrays.train(epochs=5)["final_accuracy"] > 80
    pairs = Counting(*digits)
    dataset = cifar.AdaptiveSparseTrainer(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), pairs, pairs, listeners=[]
    )
    assert dataset.train(epochs=3)["candidates"] == 3 * len(pairs)


def test_uint8_images_reach_the_model_as_floats_channels_first(cifar):
    seen = []

    class Probe(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x):
            seen.append((x.shape[1:], x.dtype, float(x.max())))
            return self.head(x.mean((2, 3)))

    images = np.random.default_rng(0).integers(0, 256, (64, 6, 5, 3), dtype=np.uint8)
    arrays = (images, np.arange(64) % 2)
    cifar.AdaptiveSparseTrainer(Probe(), arrays, arrays, listeners=[]).train(epochs=1)
    assert {shape for shape, _, _ in seen} == {(3, 6, 5)}
    assert all(dtype == torch.float32 and top <= 1 for _, dtype, top in seen)


def test_a_gate_of_ones_own_is_taken(cifar, loaders, model):
    class EveryOther:
        def __init__(self):
            self.observed = 0

        def select(self, candidates, target, generator):
            return candidates[::2], torch.ones(len(candidates[::2]))

        def observe(self, indices, losses):
            self.observed += len(indices)

        def state_dict(self):
            return {"observed": self.observed}

        def load_state_dict(self, state):
            self.observed = state["observed"]

    gate = EveryOther()
    config = cifar.ASTConfig(warmup_epochs=0, ramp_epochs=0, anneal_epochs=0)
    trainer = cifar.AdaptiveSparseTrainer(model, *loaders, config, gate=gate, listeners=[])
    results = trainer.train(epochs=2)
    assert results["activation_rate"] == pytest.approx(0.5, abs=0.02)
    assert gate.observed == results["activated"]
    assert results["policy"] == "ast"


# --- a person's wishes ---


def test_a_dragged_target_takes_hold_at_the_next_chunk_and_the_rate_still_ends_at_zero(cifar, loaders, model):
    controls, said = cifar.Controls(), []

    def listen(event, data):
        said.append((event, dict(data)))
        if event == "chunk" and data["rate"] == 0.4 and data["candidates"] > TRAIN // 2 and len(said) < 400:
            controls.set("target_activation", 0.1)

    config = cifar.ASTConfig(target_activation=0.4, ramp_epochs=0, anneal_epochs=0)
    trainer = cifar.AdaptiveSparseTrainer(model, *loaders, config, controls=controls, listeners=[listen])
    results = trainer.train(epochs=5)
    changes = [data for event, data in said if event == "control"]
    assert (changes[0]["old"], changes[0]["new"]) == (0.4, 0.1)
    assert 0 <= changes[0]["candidates"] - changes[0]["set_at"] <= TRAIN / 20
    assert [row["activation_rate"] for row in results["epochs"][2:]] == pytest.approx([0.1] * 3, abs=0.01)
    assert results["epochs"][-1]["learning_rate"] < 0.1 * max(r["learning_rate"] for r in results["epochs"])


@pytest.mark.parametrize("gate", ["remembered", "live"])
def test_progress_never_goes_back_and_ends_at_one(cifar, loaders, model, gate):
    seen = []
    config = cifar.ASTConfig(gate=gate, target_activation=0.3)
    trainer = cifar.AdaptiveSparseTrainer(
        model, *loaders, config, listeners=[lambda *_: seen.append(trainer.progress)]
    )
    trainer.train(epochs=5)
    assert seen == sorted(seen)
    assert seen[0] == 0
    assert seen[-1] == 1


def test_stop_ends_after_the_step_in_hand_with_results_so_far(cifar, loaders, model):
    controls, saved = cifar.Controls(), []

    def listen(event, data):
        if event == "epoch" and data["epoch"] == 2:
            controls.stop = "stop button"

    trainer = cifar.AdaptiveSparseTrainer(
        model,
        *loaders,
        controls=controls,
        listeners=[listen],
        save=lambda: saved.append(trainer.state_dict()),
    )
    results = trainer.train(epochs=5)
    assert len(results["epochs"]) == 2
    assert not results["complete"]
    assert len(saved) == 1


# --- what goes wrong ---


def test_a_wrong_output_shape_is_told_at_the_first_step(cifar, loaders):
    wrong = nn.Sequential(nn.Flatten(0), nn.Linear(32 * 64, 10))
    with pytest.raises(cifar.BadInput, match=r"shape \[10\] for 32 samples: expected logits \[32, classes\]"):
        cifar.AdaptiveSparseTrainer(wrong, *loaders, listeners=[]).train(epochs=1)


def test_labels_outside_the_classes_are_told(cifar, loaders):
    narrow = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    with pytest.raises(cifar.BadInput, match=r"labels from \d to 9: expected 0 to 4"):
        cifar.AdaptiveSparseTrainer(narrow, *loaders, listeners=[]).train(epochs=1)


def test_a_scalar_criterion_is_told_at_the_first_step(cifar, loaders, model):
    trainer = cifar.AdaptiveSparseTrainer(model, *loaders, criterion=nn.CrossEntropyLoss(), listeners=[])
    with pytest.raises(cifar.BadInput, match=r"shape \[\] for 32 samples.*reduction='none'"):
        trainer.train(epochs=1)


def test_a_sample_that_is_not_finite_never_reaches_weights_or_scores(cifar, digits, loaders, model):
    images = digits[0][:TRAIN].clone()
    images[5], images[77] = math.nan, math.inf
    said = []
    trainer = cifar.AdaptiveSparseTrainer(
        model,
        TensorDataset(images, digits[1][:TRAIN]),
        loaders[1],
        {"batch_size": 32},
        listeners=[lambda *event: said.append(event)],
    )
    results = trainer.train(epochs=6)
    assert results["final_accuracy"] > 80
    assert all(torch.isfinite(v).all() for v in model.state_dict().values())
    significance = trainer.gate.memory.significance
    assert significance[[5, 77]].isinf().all()
    assert significance.isfinite().sum() >= TRAIN - 70
    assert any(event == "notice" and "steps not taken" in data["text"] for event, data in said)


def test_a_run_that_diverges_says_so(cifar, loaders, model):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e30)
    with pytest.raises(cifar.BadInput, match=r"lower the learning rate \(now 1e\+30"):
        cifar.AdaptiveSparseTrainer(model, *loaders, optimizer=optimizer, listeners=[]).train(epochs=4)


def test_few_unreadable_samples_are_dropped_and_many_refused(cifar, digits, loaders, model):
    few = Counting(digits[0][:TRAIN], digits[1][:TRAIN], broken=range(0, 1400, 140))
    trainer = cifar.AdaptiveSparseTrainer(model, few, loaders[1], {"ramp_epochs": 0}, listeners=[])
    results = trainer.train(epochs=3)
    assert set(trainer.train_source.unreadable) == few.broken
    assert all(few.reads[index] == 1 for index in few.broken)
    assert results["epochs"][1]["candidates"] == TRAIN - 10
    many = Counting(digits[0][:TRAIN], digits[1][:TRAIN], broken=range(0, 1400, 40))
    with pytest.raises(cifar.BadInput, match=r"at most 1 % unreadable.*cannot identify image file"):
        cifar.AdaptiveSparseTrainer(model, many, loaders[1], listeners=[]).train(epochs=1)


def test_a_loader_whose_sampler_would_be_lost_is_refused(cifar, digits, loaders, model):
    sampler = WeightedRandomSampler(torch.ones(TRAIN), TRAIN)
    loader = DataLoader(TensorDataset(*digits), batch_size=8, sampler=sampler)
    with pytest.raises(cifar.BadInput, match="WeightedRandomSampler"):
        cifar.AdaptiveSparseTrainer(model, loader, loaders[1])


def test_a_model_that_cannot_take_the_scaled_size_is_refused_at_start(cifar, loaders, model):
    config = cifar.ASTConfig(gate="live", score_scale=0.5)
    with pytest.raises(
        cifar.BadInput, match=r"score_scale 0\.5: expected a model that takes images of 4 x 4"
    ):
        cifar.AdaptiveSparseTrainer(model, *loaders, config, listeners=[]).train(epochs=5)


def test_frozen_batch_norm_stays_frozen(cifar, loaders, model):
    norm = model[2].eval()
    before = norm.running_mean.clone()
    config = cifar.ASTConfig(gate="live", device="cpu")
    cifar.AdaptiveSparseTrainer(model, *loaders, config, listeners=[]).train(epochs=4)
    assert not norm.training
    assert torch.equal(norm.running_mean, before)


def test_training_again_goes_on_with_the_model_and_what_the_gate_remembers(cifar, loaders, model):
    trainer = cifar.AdaptiveSparseTrainer(model, *loaders, {"lr": 1e-4}, listeners=[])
    first, second = trainer.train(epochs=2), trainer.train(epochs=3)
    assert len(second["epochs"]) == 3
    assert second["epochs"][0]["train_loss"] < first["epochs"][0]["train_loss"]
    assert trainer.gate.memory.significance.isfinite().all()


def test_the_trainer_itself_prints_nothing(cifar, loaders, model, capfd):
    cifar.AdaptiveSparseTrainer(model, *loaders, listeners=[]).train(epochs=2)
    assert capfd.readouterr() == ("", "")
    cifar.AdaptiveSparseTrainer(model, *loaders).train(epochs=2)
    assert "unit-model saved" in capfd.readouterr().out


def test_a_second_policy_given_the_first_ones_rates_activates_as_many(cifar, loaders, digits):
    def train(**options):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        return cifar.AdaptiveSparseTrainer(network, *loaders, listeners=[], **options).train(epochs=6)

    first = train(config={"target_activation": 0.17})
    rates = [row["activated"] / row["candidates"] for row in first["epochs"]]
    second = train(config={"gate": "random"}, rates=rates)
    assert [r["activated"] for r in second["epochs"]] == [r["activated"] for r in first["epochs"]]


# --- memory, averages, frozen layers, waiting ---


class Cramped(nn.Module):
    """A network on a device that holds at most `room` samples of it at a time."""

    def __init__(self, body, room, error=torch.OutOfMemoryError):
        super().__init__()
        self.body, self.room, self.error, self.seen = body, room, error, []

    def forward(self, x):
        self.seen.append(len(x))
        if len(x) > self.room:
            raise self.error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")
        return self.body(x)


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def run_two_epochs(cifar, loaders, model, notices=None, **config):
    def listen(event, data):
        if event == "notice" and notices is not None:
            notices.append(data["text"])

    config = {"amp": "off", "batch_size": 32, **config}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = cifar.AdaptiveSparseTrainer(model, *loaders, config, optimizer, listeners=[listen])
    return trainer, trainer.train(epochs=2)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_out_of_memory_halves_what_goes_through_at_once_and_changes_no_result(cifar, loaders, error):
    notices = []
    whole, results = run_two_epochs(cifar, loaders, two_layers())
    _, cramped = run_two_epochs(cifar, loaders, model := Cramped(two_layers(), 9, error), notices)
    assert cramped["samples_at_once"] == 8
    assert results["samples_at_once"] == 32
    assert max(model.seen[-20:]) <= 9, "what was learned about memory is kept"
    for kind in ("training", "evaluation"):
        assert sum(kind in text and "out of memory" in text for text in notices) == 1, "said once"
    assert cramped["activated"] == results["activated"]
    for ours, theirs in zip(model.body.parameters(), whole.model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-4), "parts add up to the same step"


def test_out_of_memory_while_scoring_live_is_survived(cifar, loaders):
    notices = []
    model = Cramped(two_layers(), 9)
    config = {"gate": "live", "target_activation": 0.4, "warmup_epochs": 1}
    _, results = run_two_epochs(cifar, loaders, model, notices, **config)
    assert results["complete"]
    assert sum("scoring" in text for text in notices) == 1


def test_a_redone_step_counts_its_batch_once_in_batch_norm(cifar, digits):
    """The first attempt fails after the norm has seen the batch; the second starts from the old figures."""

    class FailsOnce(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.head, self.failed = nn.BatchNorm1d(64, momentum=1.0), nn.Linear(64, 10), False

        def forward(self, x):
            x = self.norm(x.flatten(1))
            if self.training and not self.failed:
                self.failed = True
                self.norm.running_mean.fill_(1e6)
                raise torch.OutOfMemoryError("CUDA out of memory")
            return self.head(x)

    images, labels = digits
    arrays = (images[:32].numpy(), labels[:32].numpy())
    model = FailsOnce()
    trainer = cifar.AdaptiveSparseTrainer(
        model, arrays, arrays, {"amp": "off", "batch_size": 32}, listeners=[]
    )
    trainer.train(epochs=1)
    assert model.norm.running_mean.abs().max() < 10


def test_two_samples_that_do_not_fit_are_told(cifar, loaders):
    with pytest.raises(cifar.BadInput, match="two samples at a time"):
        run_two_epochs(cifar, loaders, Cramped(two_layers(), 0))


def test_another_runtime_error_is_no_lack_of_memory(cifar, loaders):
    class Broken(nn.Module):
        weight = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    model = nn.Sequential(two_layers(), Broken())
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run_two_epochs(cifar, loaders, model)


def test_clipping_bounds_the_step(cifar, loaders):
    start = two_layers()

    def moved(clip):
        model = two_layers()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        steps = []
        with_clip = {"amp": "off", "batch_size": 1400, "clip_norm": clip, "device": "cpu"}
        images = [part for loader in loaders for part in [loader.dataset.tensors]]
        trainer = cifar.AdaptiveSparseTrainer(model, *images, with_clip, optimizer, listeners=[])
        trainer.train(epochs=1)
        steps = [(a - b).flatten() for a, b in zip(model.parameters(), start.parameters(), strict=True)]
        return float(torch.cat(steps).detach().norm())

    free, clipped = moved(0.0), moved(1e-3)
    rate = 0.2  # the schedule's share of the peak in the only step
    assert free > 10 * clipped
    assert clipped == pytest.approx(rate * 1e-3, rel=1e-2)


def test_averaged_weights_are_judged_kept_and_taken_up_again(cifar, loaders):
    trainer, results = run_two_epochs(cifar, loaders, two_layers(), ema=0.99)
    assert trainer.judged is trainer.average
    drift = [
        float((a - b).detach().abs().max())
        for a, b in zip(trainer.model.parameters(), trainer.average.parameters(), strict=True)
    ]
    assert max(drift) > 1e-3, "an average lags behind"
    assert trainer.evaluate() == results["final_accuracy"]
    again = cifar.AdaptiveSparseTrainer(
        two_layers(),
        *loaders,
        {"amp": "off", "batch_size": 32, "ema": 0.99},
        torch.optim.SGD(two_layers().parameters(), lr=0.1, momentum=0.9),
        listeners=[],
    )
    again.load_state_dict(trainer.state_dict())
    assert again.evaluate() == results["final_accuracy"]
    still, _ = run_two_epochs(cifar, loaders, two_layers())
    assert still.judged is still.model


def test_a_group_with_a_first_epoch_is_frozen_until_then_and_costs_less(cifar, digits):
    images, labels = digits
    torch.manual_seed(0)
    body, head = (
        nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()),
        nn.Linear(64, 10),
    )
    model = nn.Sequential(body, head)
    groups = [{"params": list(body.parameters()), "first_epoch": 2}, {"params": list(head.parameters())}]
    seen = []

    def listen(event, data):
        if event == "epoch":
            weights = [p.detach().clone() for p in body.parameters()]
            seen.append((weights, body[2].training, body[2].running_mean.clone(), dict(trainer.flops)))

    arrays = (images[:640].numpy(), labels[:640].numpy())
    config = {"amp": "off", "batch_size": 64}
    trainer = cifar.AdaptiveSparseTrainer(
        model, arrays, arrays, config, torch.optim.SGD(groups, lr=0.1), listeners=[listen]
    )
    before = [p.detach().clone() for p in body.parameters()]
    results = trainer.train(epochs=4)
    for epoch in (0, 1):
        assert all(torch.equal(a, b) for a, b in zip(before, seen[epoch][0], strict=True))
        assert not seen[epoch][1], "a frozen norm uses what it knows"
        assert not seen[epoch][2].any(), "and learns nothing"
    assert seen[2][1]
    assert not all(torch.equal(a, b) for a, b in zip(before, seen[2][0], strict=True))
    assert seen[1][3]["training"] < seen[2][3]["training"], "no backward pass through what is frozen"
    charged = [account["flops"] for account in results["phases"].values()]
    assert sum(charged) == results["flops"]


def test_frozen_groups_are_taken_up_again_where_they_were(cifar, digits):
    """Stopped between the frozen epoch and the next, a run counts the thawed model's FLOPs all the same."""
    images, labels = digits
    arrays = (images[:320].numpy(), labels[:320].numpy())

    def make(listeners=()):
        torch.manual_seed(0)
        body, head = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.BatchNorm1d(64)), nn.Linear(64, 10)
        groups = [{"params": list(body.parameters()), "first_epoch": 1}, {"params": list(head.parameters())}]
        return cifar.AdaptiveSparseTrainer(
            nn.Sequential(body, nn.ReLU(), head), arrays, arrays, {"amp": "off", "batch_size": 64},
            torch.optim.SGD(groups, lr=0.1), listeners=listeners,
        )  # fmt: skip

    whole = make().train(epochs=3)
    controls = []
    first = make([lambda event, data: controls[0].ask_stop("a test") if event == "epoch" else None])
    controls.append(first.controls)
    assert len(first.train(epochs=3)["epochs"]) == 1
    second = make()
    second.load_state_dict(first.state_dict())
    resumed = second.train()
    assert resumed["flops"] == whole["flops"]
    assert resumed["final_accuracy"] == whole["final_accuracy"]


def test_a_norm_that_its_owner_froze_stays_so_when_its_group_thaws(cifar, digits):
    images, labels = digits
    arrays = (images[:128].numpy(), labels[:128].numpy())
    model = nn.Sequential(
        nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Linear(32, 10)
    )
    model[1].eval()
    groups = [
        {"params": list(model[:4].parameters()), "first_epoch": 1},
        {"params": list(model[4].parameters())},
    ]
    trainer = cifar.AdaptiveSparseTrainer(
        model, arrays, arrays, {"amp": "off", "batch_size": 64}, torch.optim.SGD(groups, lr=0.1), listeners=[]
    )
    trainer.train(epochs=2)
    assert not model[1].training
    assert model[3].training


def test_the_ledger_runs_on_when_memory_ends_while_flops_are_counted(cifar, loaders, monkeypatch):
    count, calls = cifar.flops_per_sample, []

    def scarce(*arguments):
        calls.append(arguments[2])
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return count(*arguments)

    monkeypatch.setattr(cifar, "flops_per_sample", scarce)
    _, results = run_two_epochs(cifar, loaders, two_layers())
    assert results["flops_per_sample"].keys() == {"training", "evaluation"}
    assert results["phases"]["evaluation"]["flops"] > 0
    assert all(row["data_wait_percent"] <= 100 for row in results["epochs"])
    assert sum(row["seconds"] for row in results["epochs"]) > 0.5 * results["train_seconds"]


def test_waiting_for_the_device_is_no_waiting_for_data(cifar, digits, monkeypatch):
    """A device that computes long keeps the reading of losses waiting, while the data are there."""
    images, labels = digits
    arrays = (images[:256].numpy(), labels[:256].numpy())
    flush = cifar.AdaptiveSparseTrainer._flush

    def slow(self):
        if self.unread:
            time.sleep(0.05)
        flush(self)

    monkeypatch.setattr(cifar.AdaptiveSparseTrainer, "_flush", slow)
    notices = []
    _, results = run_two_epochs(cifar, (arrays, arrays), two_layers(), notices)
    assert all(row["data_wait_percent"] < 50 for row in results["epochs"])


class Slow(Dataset):
    """A dataset whose samples take longer to read than to train on."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        time.sleep(0.002)
        return self.images[index], self.labels[index]


@pytest.mark.parametrize("slow", [True, False])
def test_waiting_for_data_brings_one_line_of_advice(cifar, digits, slow):
    images, labels = digits
    data = (Slow if slow else TensorDataset)(images[:128], labels[:128])
    model, notices = nn.Sequential(nn.Flatten(), *[nn.Linear(64, 64), nn.ReLU()] * 30, nn.Linear(64, 10)), []
    loaders = DataLoader(data, batch_size=32), DataLoader(TensorDataset(images, labels), batch_size=500)
    _, results = run_two_epochs(cifar, loaders, model, notices)
    waits = [row["data_wait_percent"] > 20 for row in results["epochs"]]
    advice = [text for text in notices if "waited for data" in text]
    assert len(advice) == (1 if any(waits) else 0)
    if slow:
        assert waits[0], "the sleep outlasts the steps"
        assert "more workers" in advice[0]


SCARCE = """
import resource, sys
import torch
sys.path.insert(0, sys.argv[1])
import cifar10_ast as program

program.keep_freed_memory()
torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Conv2d(3, 64, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(64, 64, 3, padding=1),
    torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(64, 10),
)
images = torch.randint(0, 256, (256, 64, 64, 3), dtype=torch.uint8).numpy()
labels = (torch.arange(256) % 10).numpy()
notices = []
trainer = program.AdaptiveSparseTrainer(
    model, (images, labels), (images[:32], labels[:32]), {"batch_size": 256, "amp": "off", "device": "cpu"},
    torch.optim.SGD(model.parameters(), lr=0.01),
    listeners=[lambda event, data: notices.append(data["text"]) if event == "notice" else None],
)
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + 500 * 2**20,) * 2)  # one pass of 256 keeps 1.3 GB
results = trainer.train(epochs=1)
print(results["complete"], results["samples_at_once"], *notices)
"""  # fmt: skip


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits its own memory as Linux does")
def test_training_survives_memory_that_really_runs_out():
    command = [sys.executable, "-c", SCARCE, str(ROOT / "standalone")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    complete, at_once, *notice = done.stdout.split()
    assert complete == "True"
    assert 1 <= int(at_once) < 256
    assert notice[:3] == ["out", "of", "memory:"]
