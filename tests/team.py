"""What each of several processes does in test_torchrun.py, and what one alone does for comparison:

    python -m torch.distributed.run --standalone --nproc_per_node=2 tests/team.py FOLDER

plays every case, and writes what came of it to FOLDER/<rank>.json.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).parents[1] / "standalone"))
import cifar10_ast as ast

GATES = {
    "remembered": {},
    "balance": {"balance": True},
    "live": {"gate": "live"},
    "random": {"gate": "random"},
    "full": {"gate": "full"},
    "pure PI": {"feedforward": False},
}
N, EPOCHS, CLASSES = 203, 5, 3


class Exact(nn.Sequential):
    """Layers in float64, so that the order of a sum hardly matters."""

    def forward(self, x):
        return super().forward(x.double())


class OnOneOnly(Dataset):
    """Samples of which the last process alone cannot read some."""

    BROKEN = tuple(range(7, 2030, 150))

    def __init__(self, broken):
        self.broken = broken if int(os.environ.get("RANK", "0")) == ast.world()[1] - 1 else ()

    def __len__(self):
        return 10 * N

    def __getitem__(self, index):
        if index in self.broken:
            raise OSError("a bad sector")
        return torch.full((4,), index / N), index % CLASSES


def arrays(n=N):
    """Images float [n, 4], of which the first number is the index, and labels."""
    rng = np.random.default_rng(0)
    labels = np.searchsorted([0.6, 0.9], rng.random(n))
    images = rng.normal(size=(n, 4)) + labels[:, None]
    images[:, 0] = np.arange(n)
    return images.astype(np.float32), labels


def trainer_of(model, data, config, **options):
    config = {"batch_size": 16, "device": "cpu", "amp": "off", "target_activation": 0.4} | config
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return ast.AdaptiveSparseTrainer(model, data, arrays(60), config, optimizer, listeners=[], **options)


def layers(norm=True):
    torch.manual_seed(0)
    middle = [nn.BatchNorm1d(8)] if norm else []
    return [nn.Linear(4, 8), *middle, nn.ReLU(), nn.Linear(8, CLASSES)]


def choices_of(trainer, epochs=EPOCHS):
    """A digest a chunk of what the gate was told: which samples were trained, and their scores."""
    found, observe, select = [], trainer.gate.observe, trainer.gate.select

    def told(indices, losses):
        found.append(hashlib.sha256(indices.numpy().tobytes() + losses.numpy().tobytes()).hexdigest()[:9])
        observe(indices, losses)

    def chosen(*asked):
        indices, weights = select(*asked)
        found.append(hashlib.sha256(indices.numpy().tobytes()).hexdigest()[:9])
        return indices, weights

    trainer.gate.observe, trainer.gate.select = told, chosen
    results = trainer.train(epochs, warmup_epochs=1)
    return found, results


def digest(model):
    """Of all weights and statistics."""
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in model.state_dict().values())).hexdigest()


def recorded(gate):
    """Five epochs in which every loss is one of a table: what is chosen depends on the gate alone."""
    table = torch.rand(N, EPOCHS, generator=torch.Generator().manual_seed(1))
    model = nn.Sequential(*layers())
    trainer = trainer_of(model, arrays(), GATES[gate])
    trainer.judge = lambda logits, labels, images: table[images[:, 0].long(), trainer.epoch]
    found, results = choices_of(trainer)
    counts = {key: results[key] for key in ("candidates", "activated", "flops", "unit_energy")}
    return {"choices": found, "model": digest(model), "counts": counts}


def learned(gate):
    """Three epochs that learn, without batch norm, in float64: one process or several do the same."""
    model = Exact(*layers(norm=False)).double()
    images, labels = arrays()
    images[:, 0] = 0
    trainer = trainer_of(model, (images, labels), GATES[gate], seed=1)
    chosen, select = [], trainer.gate.select

    def remembered(*asked):
        indices, weights = select(*asked)
        chosen.append(indices.tolist())
        return indices, weights

    trainer.gate.select = remembered
    results = trainer.train(3, warmup_epochs=1)
    weights = [float(w.detach().norm()) for w in model.parameters()]
    return {"choices": chosen, "weights": weights, "accuracy": results["final_accuracy"]}


def unreadable(gate, broken, batch_size):
    """Samples that one process alone cannot read; in small batches that leaves it with one."""
    model, sizes = nn.Sequential(*layers()), []
    trainer = trainer_of(model, OnOneOnly(broken), GATES[gate] | {"batch_size": batch_size})
    step = trainer.step
    trainer.step = lambda batch: (sizes.append(len(batch)), step(batch))
    found, results = choices_of(trainer, epochs=2)
    lost = sorted(trainer.train_source.unreadable), int((~trainer.readable).sum())
    counts = {"steps": len(sizes), "smallest": min(sizes), "activated": results["activated"]}
    return counts | {"choices": found, "model": digest(model), "lost": lost}


def by_hand():
    """A slider moved in the first process and a stop asked for in the last, each in no other."""
    rank, size = ast.world()
    trainer = trainer_of(nn.Sequential(*layers()), arrays(), GATES["remembered"])
    controls, steps = trainer.controls, []

    def listen(event, data):
        if event == "chunk" and trainer.epoch == 1 and not rank and not controls.asked:
            controls.set("target_activation", 0.2)
        if event == "chunk" and trainer.epoch == 3 and rank == size - 1:
            controls.stop = "enough"

    trainer.listeners.append(listen)
    step = trainer.step
    trainer.step = lambda batch: (steps.append(len(batch.whole)), step(batch))
    results = trainer.train(EPOCHS, warmup_epochs=1)
    targets = [row["target_activation"] for row in results["epochs"]]
    weights = [float(w.detach().norm()) for w in trainer.model.parameters()]
    return {"steps": steps, "targets": targets, "stop": controls.stop, "weights": weights}


def play():
    """Everything that the tests compare."""
    with torch.random.fork_rng(devices=[]):
        return {
            "recorded": {gate: recorded(gate) for gate in GATES},
            "learned": {gate: learned(gate) for gate in ("remembered", "live")},
            "unreadable": {gate: unreadable(gate, OnOneOnly.BROKEN, 16) for gate in ("remembered", "live")},
            "by hand": by_hand(),
            "small": unreadable("remembered", OnOneOnly.BROKEN, 2 * ast.world()[1]),
        }


if __name__ == "__main__":
    ast.join()
    text = json.dumps(play())
    (Path(sys.argv[1]) / f"{ast.world()[0]}.json").write_text(text)
    ast.ended(0)
