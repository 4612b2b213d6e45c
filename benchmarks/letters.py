"""AST on another modality: a language model of letters, on a text that ships with Python.

    python benchmarks/letters.py                  # twenty quiet minutes on one core; five seeds

Runs AST, full training, as many sequences by chance, and plain training of as few epochs, and adds bits a
letter on held-out sequences to benchmarks/results/bars.jsonl. docs/extending.md shows the code.
"""

import argparse
import math
import statistics
import time
from pydoc_data.topics import topics

import books
import torch
from beds import ast
from evidence import half_width
from torch import Tensor, nn
from torch.nn import functional as F

LENGTH, HELD_OUT = 64, 1000  # letters a sequence; sequences that judge


class Letters(nn.Module):
    """Causal convolutions: letters [B, L] to logits of the next, [B, L * letters], in eval mode the last."""

    def __init__(self, letters: int, width: int = 64):
        super().__init__()
        self.embed = nn.Embedding(letters, width)
        self.layers = nn.ModuleList(nn.Conv1d(width, width, 3, dilation=2**i) for i in range(5))
        self.head = nn.Linear(width, letters)

    def forward(self, letters: Tensor) -> Tensor:
        x = self.embed(letters.long()).transpose(1, 2)
        for layer in self.layers:
            past = F.pad(x, (2 * layer.dilation[0], 0))
            x = x + F.gelu(layer(past))
        logits = self.head(x.transpose(1, 2))
        return logits.flatten(1) if self.training else logits[:, -1]


def sequence_loss(logits: Tensor, following: Tensor) -> Tensor:
    """One loss a sequence [B], the mean over its letters, of logits [B, L * letters]."""
    logits = logits.view(*following.shape, -1).transpose(1, 2)
    return F.cross_entropy(logits, following, reduction="none").mean(1)


def sequences(limit: int | None = None) -> tuple[Tensor, int]:
    """The text as letters int64 [N, LENGTH + 1], in random order, and how many letters there are."""
    text = "".join(topics.values())[:limit]
    places = {letter: place for place, letter in enumerate(sorted(set(text)))}
    codes = torch.tensor([places[letter] for letter in text])
    rows = codes[: len(codes) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))], len(places)


def trainer_of(rows: Tensor, letters: int, config: ast.ASTConfig, **how: object) -> ast.AdaptiveSparseTrainer:
    """A trainer that judges by the last letter of the first HELD_OUT sequences, and trains on the others."""
    model, (held, taught) = Letters(letters), rows.tensor_split([HELD_OUT])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    data = (taught[:, :-1], taught[:, 1:]), (held[:, :-1], held[:, -1])
    return ast.AdaptiveSparseTrainer(model, *data, config, optimizer, sequence_loss, **how)


def bits(model: nn.Module, rows: Tensor) -> float:
    """Bits a letter of the held-out sequences."""
    with torch.no_grad():
        losses = sequence_loss(model.train()(rows[:HELD_OUT, :-1]), rows[:HELD_OUT, 1:])
    return float(losses.mean()) / math.log(2)


def compare(seeds: int, epochs: int, limit: int | None = None) -> dict:
    """Bits a letter and cost of each policy, by seed."""
    rows, letters = sequences(limit)
    found = {policy: [] for policy in ("ast", "random", "short", "full")}
    for seed in range(seeds):
        taken: list[dict] = []
        for policy, runs in found.items():
            config = ast.ASTConfig(epochs=epochs, target_activation=0.4, batch_size=32)
            config, rates = ast.rival(policy, config, taken, [])
            torch.manual_seed(seed)
            trainer = trainer_of(rows, letters, config, policy=policy, rates=rates, seed=seed)
            results = trainer.train()
            taken = taken or results["epochs"]
            runs.append({"bits": bits(trainer.model, rows), "flops": results["flops"]})
    return found


def main() -> None:
    """Runs, and adds a line to benchmarks/results/bars.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=12)
    given = parser.parse_args()
    found = compare(given.seeds, given.epochs)
    rows = []
    for policy, runs in found.items():
        own = [run["bits"] for run in runs]
        gaps = [a["bits"] - b["bits"] for a, b in zip(found["ast"], runs, strict=True)]
        cost = statistics.mean(a["flops"] / b["flops"] for a, b in zip(runs, found["full"], strict=True))
        row = {"policy": policy, "seeds": len(runs), "cost": cost, "bits": statistics.mean(own)}
        rows.append(row | {"ast_minus": statistics.mean(gaps), "half_width": half_width(gaps)})
    for row in rows:
        print(row)
    how = {
        "command": "python benchmarks/letters.py",
        "device": ast.device_name("cpu"),
        "epochs": given.epochs,
    }
    books.measured("letters", {"rows": rows, **how, "date": time.strftime("%Y-%m-%d")})


if __name__ == "__main__":
    main()
