"""Where samples come from: arrays, datasets and DataLoaders; unreadable samples; batches on their way."""

import copy
import importlib.util
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils import data
from torch.utils.data import DataLoader, TensorDataset

import cifar10_ast as ast

CPU = torch.device("cpu")


class OwnError(Exception):
    """What only the user knows."""


class Numbers(data.Dataset):
    """Sample i is the number i with label i % 3; asking for one of `broken` fails as a broken image does."""

    def __init__(self, n, broken=(), error=OSError):
        self.n, self.broken, self.error, self.asked = n, set(broken), error, []

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        self.asked.append(index)
        if index in self.broken:
            raise self.error(f"cannot identify image {index}")
        return torch.full((2,), float(index)), index % 3


def told(targets, target_transform=None):
    """As torchvision's datasets: the labels can be had without loading an image."""
    numbers = Numbers(10)
    numbers.targets, numbers.target_transform = targets, target_transform
    return numbers


def source_of(samples, batch_size=4):
    return ast.as_source(samples, CPU, batch_size, "train_loader")


def gather(source, wanted):
    """(indices, values, labels) of each batch; what has gone missing leaves together with its weight."""
    found, asked = [], [(torch.tensor(indices), torch.tensor(indices) + 0.5) for indices in wanted]
    for (indices, _), batch in zip(asked, source.stream(asked), strict=True):
        assert torch.equal(batch.indices, indices[~torch.isin(indices, batch.missing)])
        assert torch.equal(batch.weights, batch.indices + 0.5)
        values = batch.images[:, 0].tolist() if len(batch) else []
        found.append((batch.indices.tolist(), values, batch.labels.tolist()))
    return found


TEN = Numbers(10)
REFUSED = {
    "weighted sampler": DataLoader(TEN, sampler=data.WeightedRandomSampler([1.0] * 10, 10)),
    "subset sampler": DataLoader(TEN, sampler=data.SubsetRandomSampler([1, 2])),
    "with replacement": DataLoader(TEN, sampler=data.RandomSampler(TEN, replacement=True)),
    "shorter sampler": DataLoader(TEN, sampler=data.SequentialSampler(range(5))),
    "batch sampler": DataLoader(TEN, batch_sampler=[[0, 1], [2]]),
    "no batches": DataLoader(TEN, batch_size=None),
    "stream": data.ChainDataset([]),
    "loader of a stream": DataLoader(data.ChainDataset([]), batch_size=2),
    "nothing": None,
    "a generator": iter([(1, 2)]),
    "no samples": [],
    "unequal arrays": (np.zeros((4, 2)), np.zeros(3)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_source_is_refused_in_a_sentence(what):
    with pytest.raises(ast.BadInput, match="expected") as refusal:
        source_of(REFUSED[what])
    assert "train_loader" in str(refusal.value) or what == "unequal arrays"


@pytest.mark.parametrize("wrap", [tuple, lambda arrays: TensorDataset(*map(torch.as_tensor, arrays))])
@pytest.mark.parametrize(
    "dtype,shape,channels_last",
    [
        (np.uint8, (4, 8, 8, 3), True),
        (np.uint8, (4, 8, 8, 4), True),
        (np.float32, (4, 8, 8, 1), True),
        (np.uint8, (4, 5), False),
        (np.float64, (4, 3, 8, 8), False),
    ],
)
def test_images_become_float_inputs_channels_first(wrap, dtype, shape, channels_last):
    images = (np.random.default_rng(0).random(shape) * 200).astype(dtype)
    (batch,) = source_of(wrap([images, np.arange(4)])).stream([(torch.tensor([2, 0]), torch.ones(2))])
    expected = torch.tensor(images[[2, 0]]).float() / (255 if dtype == np.uint8 else 1)
    torch.testing.assert_close(batch.images, expected.permute(0, 3, 1, 2) if channels_last else expected)
    assert batch.labels.tolist() == [2, 0]


ARRAYS = torch.arange(6.0)[:, None], torch.arange(6)


KNOWN = [(torch.rand(10, 2), np.arange(10)), TensorDataset(torch.rand(10, 2), torch.arange(10))]
KNOWN += [told(list(range(10))), told(torch.arange(10)), told(np.arange(10.0)[:, None])]
KNOWN += [data.Subset(told([0, 0, *range(10)]), range(2, 12))]
UNKNOWN = [Numbers(10), told(["cat"] * 10), told({"a": 1}), told(list(range(10)), lambda label: label // 5)]


@pytest.mark.parametrize("samples,known", [(s, True) for s in KNOWN] + [(s, False) for s in UNKNOWN])
def test_balance_needs_labels_that_are_known_before_loading(samples, known):
    config, source = ast.ASTConfig(balance=True), source_of(samples)
    if known:
        assert ast.make_gate(config, source, None).labels.tolist() == list(range(10))
    else:
        with pytest.raises(ast.BadInput, match="balance: labels none: expected 10"):
            ast.make_gate(config, source, None)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_delivers_what_was_asked_for_in_its_owners_way_and_nothing_else(workers, shuffle):
    def collate(samples):
        return torch.stack([image for image, _ in samples]) + 1000, torch.tensor([y for _, y in samples])

    numbers = Numbers(500)
    source = source_of(DataLoader(numbers, 3, shuffle, collate_fn=collate, num_workers=workers), 64)
    assert (len(source), source.batch_size) == (500, 3)
    wanted = [[7, 3, 499, 0], [12, 11], [5], [300, 301, 302], [1], [2], [8]]
    assert gather(source, wanted) == [(i, [1000 + k for k in i], [k % 3 for k in i]) for i in wanted]
    assert numbers.asked == ([] if workers else [k for i in wanted for k in i])


def test_what_workers_draw_repeats_from_the_sources_generator():
    def add_chance(samples):
        return torch.rand(1, 2), torch.zeros(1)

    source = source_of(DataLoader(Numbers(10), batch_size=4, num_workers=1, collate_fn=add_chance))
    drawn = []
    for seed in (3, 4, 3):
        source.generator.manual_seed(seed)
        drawn += gather(source, [[1]])
    assert drawn[0] == drawn[2] != drawn[1]


def test_no_class_of_the_program_goes_to_a_worker():
    """A worker that is spawned, as on macOS and Windows, could not import what a notebook's cells define."""
    spec = importlib.util.spec_from_file_location("cells_of_a_notebook", ast.__file__)
    program = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(program)
        loader = DataLoader(TensorDataset(*ARRAYS), 4, num_workers=1, multiprocessing_context="spawn")
        source = program.as_source(loader, CPU, 4, "train_loader")
        assert gather(source, [[4, 1], [5]]) == [([4, 1], [4, 1], [4, 1]), ([5], [5], [5])]
    finally:
        del sys.modules[spec.name]


@pytest.mark.parametrize("sample", [torch.zeros(2), (torch.zeros(2), 1, 2)], ids=["no label", "three parts"])
def test_a_dataset_that_gives_something_else_is_told_so(sample):
    with pytest.raises(ast.BadInput, match=r"expected \(images, labels\)"):
        gather(source_of([sample] * 3), [[0, 1, 2]])


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_gate_raises_comes_through_as_it_is(workers):
    def choices():
        yield torch.arange(4), torch.ones(4)
        raise OwnError("a gate of the user's")

    with pytest.raises(OwnError, match="a gate of the user's"):
        list(source_of(DataLoader(Numbers(40), batch_size=4, num_workers=workers)).stream(choices()))


@pytest.mark.parametrize("workers,error", [(0, OSError), (0, OwnError), (2, OSError)])
def test_up_to_one_percent_unreadable_samples_are_dropped_and_counted_once(workers, error):
    source = source_of(DataLoader(Numbers(200, [3, 8], error), batch_size=4, num_workers=workers))
    for _ in range(2):
        got = gather(source, [[1, 2, 3, 4], [8], [9, 10]])
        assert got == [([1, 2, 4], [1, 2, 4], [1, 2, 1]), ([], [], []), ([9, 10], [9, 10], [0, 1])]
    assert source.unreadable == {3: "cannot identify image 3", 8: "cannot identify image 8"}


def test_more_than_one_percent_unreadable_samples_are_refused_with_an_example():
    source = source_of(Numbers(200, broken=[3, 8, 9]))
    with pytest.raises(ast.BadInput, match=r"3 of 200 samples.*cannot identify image 3.*at most 1 %"):
        gather(source, [[1, 2, 3, 4], [8], [9, 10]])


class Chosen:
    """A gate that activates a share of the samples, the same whoever asks, and keeps what it hears."""

    def __init__(self, thousandths, needs_views=False):
        self.thousandths, self.needs_views = thousandths, needs_views
        self.asked, self.told, self.lost = [], [], []

    def select(self, candidates, target, generator):
        indices = candidates.indices if self.needs_views else candidates
        self.asked += indices.tolist()
        taken = indices[indices * 7919 % 1000 < self.thousandths]
        return taken, torch.ones(len(taken))

    def observe(self, indices, losses):
        self.told += indices.tolist()
        self.lost += indices[losses.isnan()].tolist()


@pytest.mark.parametrize("views", [False, True])
def test_unreadable_samples_are_lost_to_the_gate_and_not_asked_for_again(views):
    numbers, gate = Numbers(200, broken=[17, 40]), Chosen(1000, views)
    config = {"device": "cpu", "batch_size": 16, "anneal_epochs": 0}
    options = {"gate": gate, "listeners": []}
    trainer = ast.AdaptiveSparseTrainer(nn.Linear(2, 3), numbers, Numbers(9), config, **options)
    trainer.train(epochs=1)
    assert trainer.progress == 1, "nobody waits for what is lost"
    results = trainer.train(epochs=3)
    assert sorted(gate.lost) == [17, 17, 40, 40], "once in each run"
    assert numbers.asked.count(17) == numbers.asked.count(40) == 4, "with its batch, then by itself"
    assert [row["candidates"] for row in results["epochs"]] == [200, 198, 198]
    assert results["epochs"][0]["activated"] == 198


def test_an_unreadable_validation_sample_is_refused_in_a_sentence():
    with pytest.raises(ast.BadInput, match=r"validation sample.*cannot identify image 5"):
        list(source_of(Numbers(40, broken=[5])).in_order())


CLASSES = torch.arange(12) % 3
SURE = {
    "columns": CLASSES[:, None].to(torch.uint8),
    "floats": CLASSES.double(),
    "a column of floats": CLASSES[:, None].float(),
    "one-hot": nn.functional.one_hot(CLASSES),
    "one-hot floats": nn.functional.one_hot(CLASSES).float(),
    "numpy": CLASSES.numpy().astype(np.int16),
    "booleans": CLASSES > 0,
}
UNSURE = {
    "soft": nn.functional.one_hot(CLASSES, 3) * 0.8 + 0.2 / 3,
    "fractions": CLASSES + 0.5,
    "not a number": CLASSES * math.nan,
    "two columns": torch.stack([CLASSES, CLASSES], 1),
    "words": np.array(["ant", "bee", "cow"] * 4),
}
KINDS_OF_DATA = {
    "arrays": lambda labels: (torch.eye(3)[CLASSES], labels),
    "loader": lambda labels: DataLoader(list(zip(torch.eye(3)[CLASSES], labels, strict=True)), 4),
}


@pytest.mark.parametrize("form", KINDS_OF_DATA)
@pytest.mark.parametrize("kind", SURE)
def test_labels_are_taken_where_they_can_only_mean_classes(kind, form):
    samples = KINDS_OF_DATA[form](SURE[kind])
    source = ast.as_source(samples, CPU, 4, "train_loader")
    expected = CLASSES.bool().long() if kind == "booleans" else CLASSES
    assert torch.equal(torch.cat([labels for _, labels in source.in_order()]), expected)
    options = {"config": {"device": "cpu", "lr": 0.5}, "listeners": []}
    trained = ast.AdaptiveSparseTrainer(nn.Linear(3, 3), samples, samples, **options).train(epochs=5)
    assert trained["final_accuracy"] == 100


@pytest.mark.parametrize("side", ["train", "val"])
@pytest.mark.parametrize("form", KINDS_OF_DATA)
@pytest.mark.parametrize("kind", UNSURE)
def test_labels_of_another_meaning_are_refused_before_a_step_is_taken(kind, form, side):
    good, bad = KINDS_OF_DATA[form](CLASSES), KINDS_OF_DATA[form](UNSURE[kind])
    model, sides = nn.Linear(3, 3), (bad, good) if side == "train" else (good, bad)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ast.BadInput, match=r"labels.*expected"):
        trainer = ast.AdaptiveSparseTrainer(model, *sides, {"device": "cpu"}, listeners=[])
        trainer.train(epochs=2)
    assert side == "val" or all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("form", KINDS_OF_DATA)
def test_a_loss_of_ones_own_reads_labels_as_they_are(form):
    def loss(logits, labels):
        assert labels.dtype == UNSURE["soft"].dtype and labels.shape == logits.shape
        return -(labels * logits.log_softmax(1)).sum(1)

    told, soft, hard = [], *(KINDS_OF_DATA[form](labels) for labels in (UNSURE["soft"], CLASSES))
    options = {"criterion": loss, "listeners": [lambda event, data: told.append((event, data))]}
    trainer = ast.AdaptiveSparseTrainer(nn.Linear(3, 3), soft, hard, {"device": "cpu", "lr": 0.5}, **options)
    assert trainer.train(epochs=5)["final_accuracy"] == 100
    notices = [data["text"] for event, data in told if event == "notice"]
    assert notices == ["labels that are no classes: the significance of a sample is its own loss"]
    assert trainer.gate.memory.significance.isfinite().all()


class Uneven(Numbers):
    """Every sample is good, and no two make a batch."""

    def __getitem__(self, index):
        return torch.zeros(index + 1), 0


LIST = data.default_collate
COLLATES = {
    "one is dropped": (200, lambda samples: LIST([s for s in samples if s[0][0] != 7]), None),
    "all are dropped": (200, lambda samples: [], r"200 of 200 samples unreadable|batch that is a list"),
    "three parts": (20, lambda samples: [*LIST(samples), 0], "a batch that is a list of 3: expected .images"),
    "a dict": (
        20,
        lambda samples: dict(zip("ab", LIST(samples), strict=True)),
        "a batch that is a dict of 2",
    ),
    "uneven": (20, LIST, "a batch fails whose samples are whole"),
}


@pytest.mark.parametrize("kind", COLLATES)
def test_a_collate_that_drops_or_breaks_samples_loses_a_few_or_is_told(kind):
    n, collate, refusal = COLLATES[kind]
    samples = Uneven(n) if kind == "uneven" else Numbers(n)
    loader = DataLoader(samples, 8, collate_fn=collate)
    config = {"device": "cpu"}
    trainer = ast.AdaptiveSparseTrainer(nn.Linear(2, 3), loader, Numbers(9), config, listeners=[])
    if refusal:
        with pytest.raises(ast.BadInput, match=refusal):
            trainer.train(epochs=1)
    else:
        assert trainer.train(epochs=1)["activated"] == n - 1
        assert list(trainer.train_source.unreadable) == [7]


NOTEBOOK = """
import sys; sys.argv = ["x"]; globals().pop("__file__", None)
import multiprocessing; multiprocessing.set_start_method("{method}", force=True)
sys.path.insert(0, {folder!r})
import torch; from torch import nn; from cifar10_ast import *
class Own(torch.utils.data.Dataset):
    def __len__(self): return 16
    def __getitem__(self, index): return torch.zeros(3), index % 2
data = {data}
loader = torch.utils.data.DataLoader(data, 8, num_workers=1)
trainer = AdaptiveSparseTrainer(nn.Linear(3, 2), loader, loader, dict(device="cpu"), listeners=[])
print(trainer.train(epochs=1)["activated"], trainer.train_source.how["num_workers"])
"""
SEEN = "torch.utils.data.TensorDataset(torch.zeros(16, 3), torch.arange(16) % 2)"


@pytest.mark.slow
@pytest.mark.parametrize(
    "method,what",
    [("spawn", "Own()"), ("forkserver", "Subset(Own(), range(16))"), ("spawn", SEEN), ("fork", "Own()")],
)
def test_workers_serve_in_a_notebook_or_are_left_out_where_they_cannot_see(method, what):
    folder = str(Path(ast.__file__).parent)
    code = NOTEBOOK.format(method=method, folder=folder, data=what)
    done = subprocess.run([sys.executable, "-"], input=code, capture_output=True, text=True, check=False)
    hidden = what != SEEN and method != "fork"
    assert done.stdout.split() == ["16", str(int(not hidden))], done.stderr
    assert done.stderr.count("workers cannot see") == hidden, "once"


def one_epoch(n, size, gate):
    """The samples 0, 1, …, n - 1 of one epoch, batch by batch; and how many the gate had seen at each."""

    class Recording(nn.Linear):
        def forward(self, x):
            if self.training:
                batches.append(x[:, 0].tolist())
                seen.append(len(gate.asked))
            return super().forward(x)

    batches, seen, arrays = [], [], (torch.arange(float(n))[:, None], torch.arange(n) % 2)
    config = {"device": "cpu", "batch_size": size, "warmup_epochs": 0, "ramp_epochs": 0, "anneal_epochs": 0}
    options = {"gate": gate, "listeners": []}
    ast.AdaptiveSparseTrainer(Recording(1, 2), arrays, arrays, config, **options).train(epochs=1)
    return batches[1:], seen[1:]  # the first pass only counts FLOPs


@given(n=st.integers(1, 300), size=st.integers(1, 40), share=st.integers(0, 1000), views=st.booleans())
@example(n=33, size=32, share=1000, views=False)
@example(n=65, size=32, share=1000, views=True)
@settings(deadline=None, max_examples=30)
def test_every_activated_sample_is_trained_on_once_in_full_batches(n, size, share, views):
    gate = Chosen(share, views)
    batches, _ = one_epoch(n, size, gate)
    expected = [i for i in range(n) if i * 7919 % 1000 < share]
    assert sorted(gate.asked) == list(range(n))
    lone = len(expected) == 1 < size  # batch norm cannot train on one
    assert sorted(i for batch in batches for i in batch) == ([] if lone else expected)
    assert sorted(gate.told) == expected and sorted(gate.lost) == (expected if lone else [])
    lengths = [len(batch) for batch in batches]
    assert all(length == size for length in lengths[:-2])
    assert len(lengths) < 2 or size + 1 >= max(lengths) >= min(lengths) >= size / 2, "the last two share"
    assert size == 1 or min(lengths, default=2) > 1


def test_the_gate_is_asked_only_when_its_batches_are_due():
    _, seen = one_epoch(1000, 32, Chosen(1000))
    # A chunk is a twentieth; two batches' worth is held, so that the last two can share a remainder.
    assert seen[:4] == [100, 100, 150, 200]
