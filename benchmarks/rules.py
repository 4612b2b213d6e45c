"""Selection rules beside the kit's own, as gates of its interface; each names its source.

A gate has select(candidates, target, generator) -> (indices, weights) and observe(indices, losses);
`needs_views` says that it looks at augmented images. Nothing here is saved: compare.py goes on run by run.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from beds import ast
from torch import Tensor, nn
from torch.nn import functional as F


def margin(logits: Tensor, labels: Tensor, images: Tensor) -> Tensor:
    """One minus the margin between the two likeliest classes (active learning; Scheffer et al. 2001), [B]."""
    likeliest = logits.detach().float().softmax(1).topk(2).values
    return 1 - (likeliest[:, 0] - likeliest[:, 1])


def importance_weights(p: Tensor, gamma: float, target: float) -> Tensor:
    """w = min((p/a)^-γ, 4) of the activated samples, scaled to mean 1. p [k], returns float32 [k]."""
    weights = (p.float().clamp(min=1e-6) / target).pow(-gamma).clamp(max=4.0)
    return weights / weights.mean() if len(weights) else weights


class Weighted(ast.RememberedGate):
    """The kit's gate with weights (p/a)^-γ that undo the choice: in full at γ = 1, not at all at 0."""

    def __init__(self, config: ast.ASTConfig, n: int, gamma: float = 0.0):
        super().__init__(config, n)
        self.gamma, self.p = gamma, torch.empty(n)

    def rank(self, candidates: Tensor) -> Tensor:
        self.u = super().rank(candidates)
        return self.u

    def select(self, candidates: Tensor, target: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """As RememberedGate, weighted by each one's own p, without what its waiting added."""
        chosen, _ = super().select(candidates, target, generator)
        temperature = self.config.temperature
        self.p[candidates] = ast.activation_probability(self.u, self.threshold, target, temperature)
        return chosen, importance_weights(self.p[chosen], self.gamma, target)


class Shuffled(Weighted):
    """The kit's gate with its ranks dealt out anew: keeps rate and weights, loses the information.

    Sanity check of Okanovic et al. 2024; what it reaches is due to the schedule, not to significance.
    """

    def __init__(self, config: ast.ASTConfig, n: int, gamma: float = 0.0):
        super().__init__(config, n, gamma)
        generator = torch.Generator().manual_seed(n)
        rank = self.memory.rank
        self.memory.rank = lambda some: rank(some)[torch.randperm(len(some), generator=generator)]


class InfoBatch(ast.RememberedGate):
    """InfoBatch (Qin et al. 2024): of the samples below the mean loss, drops a share r by chance and weighs
    the rest of them 1/(1 - r); everything again after 87.5 % of the epochs. It sets its own rate."""

    def __init__(self, config: ast.ASTConfig, n: int, drop: float = 0.5):
        super().__init__(config, n)
        self.drop = drop

    def select(self, candidates: Tensor, target: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Drops by the rule, whatever the target."""
        known = self.memory.significance[self.memory.significance.isfinite()]
        easy = self.memory.significance[candidates] < known.mean()
        kept = ~easy | (torch.rand(len(candidates), generator=generator) >= self.drop)
        self.controller.update(int(kept.sum()), len(candidates), target, exact=False)
        self.clock += len(candidates) / len(self.memory.visited)
        return candidates[kept], torch.where(easy, 1 / (1 - self.drop), 1.0)[kept]

    def observe(self, indices: Tensor, losses: Tensor) -> None:
        """Remembers the newest loss alone, as the paper does."""
        finite = losses.isfinite()
        self.memory.significance[indices[finite]] = losses[finite]


class SelectiveBackprop(ast.LiveGate):
    """Selective Backprop (Jiang et al. 2019): keeps a view with probability percentile^β, its loss's
    percentile among the recent ones; β = 1/a - 1 makes that a of them."""

    def select(
        self, candidates: ast.Batch, target: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Keeps by chance, harder views more often; 2 random ones if none."""
        scores = self.score(candidates.images, candidates.labels).cpu()
        self.recent = torch.cat([self.recent, scores[scores.isfinite()]])[-self.RECENT :]
        kept = torch.rand(len(scores), generator=generator) < self.rank(scores) ** (1 / target - 1)
        taken = kept.nonzero().flatten()
        if not len(taken):
            taken = torch.randperm(len(scores), generator=generator)[:2]
        return candidates.indices[taken], torch.ones(len(taken))


class TopK(ast.LiveGate):
    """Keeps the hardest views of every batch, exactly the share asked for, in place of those above θ."""

    def __init__(self, config: ast.ASTConfig, score: Callable[[Tensor, Tensor], Tensor]):
        super().__init__(config, score)
        self.owed = 0.0  # samples, the fraction carried to the next batch

    def select(
        self, candidates: ast.Batch, target: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The hardest; 2 random ones where none is due."""
        scores = self.score(candidates.images, candidates.labels).cpu()
        finite = scores.isfinite()
        self.owed += target * len(scores)
        count = min(int(finite.sum()), math.floor(self.owed + 0.5))
        self.owed = min(self.owed - count, 1.0)
        taken = torch.where(finite, scores, -math.inf).topk(count).indices
        if not len(taken):
            taken = torch.randperm(len(scores), generator=generator)[:2]
        return candidates.indices[taken], torch.ones(len(taken))


def scaled(trainer: ast.AdaptiveSparseTrainer, scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    """`trainer.score` of views shrunk to a share of their side, charged as what that takes."""
    flops: list[float] = []  # a sample

    def score(images: Tensor, labels: Tensor) -> Tensor:
        side = round(scale * images.shape[-1])
        small = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
        if not flops:
            flops.append(ast.flops_per_sample(trainer.model, small[:2], False, trainer.autocast)[0])
        cost = trainer.ledger.costs["scoring"]
        charged = cost.flops + len(images) * flops[0]
        scores = trainer.score(small, labels)
        cost.flops = charged
        return scores

    return score


class Proxy(TopK):
    """Keeps the hardest views as a small network trained beside judges them (airbench96_faster; Jordan 2024).

    It sees every candidate, also in the warm-up, and learns by AdamW from the hardest quarter of each batch.
    Its work is charged to scoring.
    """

    LEARNS = 0.25  # share of the views that the proxy learns from

    def __init__(self, trainer: ast.AdaptiveSparseTrainer, classes: int):
        super().__init__(trainer.config, self.judge)
        self.trainer, self.stream, self.flops = trainer, trainer.train_source.stream, {}
        trainer.train_source.stream = self.watch
        with torch.random.fork_rng():
            torch.manual_seed(trainer.seed)
            self.network = proxy_network(classes).to(trainer.device)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=2e-3, fused=True)

    def watch(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[ast.Batch]:
        """The source's stream, judged on the way in the warm-up, where nobody selects."""
        for batch in self.stream(batches):
            if self.trainer.phase == "warmup":
                with self.trainer.ledger.charge("scoring"):
                    self.judge(batch.images, batch.labels)
            yield batch

    def judge(self, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy [m] of views by the proxy, which then learns from the hardest of them."""
        self.charge("scoring", images)
        with torch.no_grad(), self.autocast():
            logits = self.network(images)
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        hardest = losses.topk(math.ceil(self.LEARNS * len(labels))).indices
        if len(hardest) > 1:  # batch norm cannot learn from one
            self.charge("training", images[hardest])
            with self.autocast():
                logits = self.network(images[hardest])
            self.optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(logits.float(), labels[hardest]).backward()
            self.optimizer.step()
        return losses

    def charge(self, mode: str, images: Tensor) -> None:
        """Charges to scoring what the proxy does with images [B, ...]."""
        if mode not in self.flops:
            training = mode == "training"
            self.flops[mode] = ast.flops_per_sample(self.network, images[:2], training, self.autocast)[0]
        self.trainer.ledger.costs["scoring"].flops += len(images) * self.flops[mode]

    def autocast(self) -> torch.autocast:
        """bf16 where the run has it; fp16 would want a scaler, and the proxy is small."""
        bf16 = self.trainer.dtype is torch.bfloat16
        return torch.autocast(self.trainer.device.type, torch.bfloat16, enabled=bf16)


def proxy_network(classes: int) -> nn.Module:
    """Three 3x3 convolutions, 16, 32 and 64 wide, the sides halved twice, then the mean."""
    blocks: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 16, 1), (16, 32, 2), (32, 64, 2)):
        conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        blocks += [conv, nn.BatchNorm2d(outputs, track_running_stats=False), nn.ReLU()]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes))


class Curriculum(ast.RememberedGate):
    """Easy first (Bengio et al. 2009; pacing as in Hacohen & Weinshall 2019): draws by chance from the
    easiest samples, a share that grows from twice the target to all over the first 60 % of the epochs."""

    def __init__(self, config: ast.ASTConfig, n: int):
        super().__init__(replace(config, guard=False), n)
        self.chance = ast.RandomGate()

    def select(self, candidates: Tensor, target: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """As many as the target says, out of the easiest share of the candidates."""
        pace = min(1.0, self.clock / (0.6 * self.config.epochs))
        share = min(1.0, 2 * target + (1 - 2 * target) * pace)
        self.clock += len(candidates) / len(self.memory.visited)
        easiest = self.memory.rank(candidates).argsort()[: math.ceil(share * len(candidates))]
        rate = target * len(candidates) / len(easiest)
        return self.chance.select(candidates[easiest], min(1.0, rate), generator)


STAGES = {  # sides other than the program's: up to a share of the epochs, of the whole side
    "two": ((0.6, 0.5),),
    "eighty": ((0.5, 80 / 96),),  # of 96 pixels
    "three": ((0.3, 0.5), (0.6, 0.75)),
    "high": ((0.2, 0.625), (0.45, 0.75), (0.7, 0.875)),
    "low": ((0.15, 0.375), (0.35, 0.5), (0.55, 0.625), (0.75, 0.75), (0.9, 0.875)),
    "turns": tuple(((epoch + 1) / 20, 0.5 if epoch % 2 else 0.75) for epoch in range(14)),
}


def staged(name: str) -> type[ast.AdaptiveSparseTrainer]:
    """A trainer whose sides follow STAGES; its settings say `progressive`. Raises KeyError."""
    stages = STAGES[name]

    class Staged(ast.AdaptiveSparseTrainer):
        def train_epoch(self) -> bool:
            self.schedule.STAGES = stages
            return super().train_epoch()

    return Staged


class Shrinking(ast.AdaptiveSparseTrainer):
    """Gives each skipped sample a step at half resolution, a quarter of the FLOPs, instead of none.

    Progressive resizing (Howard 2018; Touvron et al. 2019, FixRes), here by sample. Shrunk samples are not
    remembered, nor counted as activated: their losses are on another scale.
    """

    def decide(self, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """As the trainer; sets aside what is skipped."""
        chosen, weights = super().decide(candidates)
        self.aside = torch.cat([self.aside, candidates[~torch.isin(candidates, chosen)]])
        return chosen, weights

    def train_epoch(self) -> bool:
        """As the trainer, from a source that also delivers what was set aside."""
        self.train_source.stream = self.delivered
        try:
            return super().train_epoch()
        finally:
            del self.train_source.stream

    def delivered(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[ast.Batch]:
        """The source's own batches, and those of what was set aside."""
        self.aside, self.shrunk = torch.empty(0, dtype=torch.int64), None
        size = self.train_source.batch_size
        for batch in type(self.train_source).stream(self.train_source, batches):
            yield batch
            while len(self.aside) >= size:
                yield self.shrink(size)
        if len(self.aside) > 1:
            yield self.shrink(len(self.aside))

    def shrink(self, count: int) -> ast.Batch:
        """A batch of the first `count` that were set aside, at half resolution."""
        indices, self.aside = self.aside[:count], self.aside[count:]
        (batch,) = type(self.train_source).stream(self.train_source, [(indices, torch.ones(count))])
        small = F.interpolate(batch.images, scale_factor=0.5, mode="bilinear", antialias=True)
        self.shrunk = replace(batch, images=small.contiguous(memory_format=torch.channels_last))
        self.tally.waiting += count  # nobody waits for them
        return self.shrunk

    def step(self, batch: ast.Batch) -> None:
        """As the trainer; a shrunk batch costs a quarter, and leaves no other trace in the books."""
        progress = self.progress
        super().step(batch)
        if batch is self.shrunk:
            self.progress = progress
            self.tally.pending.pop()
            self.tally.trained -= len(batch)
            cost = self.ledger.costs[self.phase]
            cost.activated -= len(batch)
            cost.flops -= 0.75 * len(batch) * self.flops["training"]


class Sized(ast.AdaptiveSparseTrainer):
    """Trains on every sample: what the gate chooses at full resolution, the others at half.

    One backward pass over both, so every score is fresh; the activation rate steers the cost.
    """

    def train(self, *epochs: int) -> dict:
        """As the trainer."""
        self.small, self.taken = torch.zeros(len(self.train_source), dtype=torch.bool), 0
        return super().train(*epochs)

    def decide(self, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """All candidates; keeps which are to be small."""
        chosen, _ = super().decide(candidates)
        self.small[candidates] = True
        self.small[chosen] = False
        return candidates, torch.ones(len(candidates))

    def step(self, batch: ast.Batch) -> None:
        """As the trainer, by a model that halves what is to be small; that costs a quarter."""
        small, whole = self.small[batch.indices], self.model
        if small.sum() in (1, len(small) - 1):  # batch norm cannot train on one
            small[:] = small.sum() > 1
        self.model = Halving(whole, small.to(batch.images.device))
        super().step(batch)
        self.model = whole
        saved = 0.75 * int(small.sum()) * self.flops["training"]
        self.ledger.costs[self.phase].flops -= saved
        self.taken += 1
        steps = self.schedule.epochs * math.ceil(len(self.small) / self.train_source.batch_size)
        self.progress = min(1.0, self.taken / steps)


class Halving(nn.Module):
    """A model that sees some images of a batch, bool [B], at half their side."""

    def __init__(self, model: nn.Module, small: Tensor):
        super().__init__()
        self.model, self.small = model, small

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, C] of images [B, 3, H, W]."""
        order = self.small.int().argsort(stable=True)
        whole, rest = images[order].tensor_split([int((~self.small).sum())])
        parts = [self.model(part) for part in (whole, ast.shrunk(rest, 0.5)) if len(part)]
        return torch.cat(parts)[order.argsort()]


class Balanced(ast.RandomGate):
    """By chance, but of every class as many, which takes labels and no significance: what a long tail's
    gain may be owed to (class-balanced sampling, Kang et al. 2020)."""

    def __init__(self, labels: Tensor, gamma: float = 0.0):
        super().__init__()
        self.labels, self.gamma, self.phase = labels, gamma, 0.5

    def select(self, candidates: Tensor, target: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Activates target·m of the m candidates; classes with too few give all they have."""
        p = even_shares(self.labels, candidates, target)
        taken, self.phase = ast.systematic(p, self.phase)
        return candidates[taken], importance_weights(p[taken], self.gamma, target)


def even_shares(labels: Tensor, candidates: Tensor, target: float) -> Tensor:
    """The rate of each candidate's class, [m], that activates as many of every class and target·m in all."""
    inverse = 1 / labels.bincount()[labels[candidates]]
    count = target * len(candidates)
    return probability_of(count, lambda level: (inverse * math.exp(-level)).clamp(max=1))[0]


def probability_of(count: float, p_at: Callable[[float], Tensor]) -> tuple[Tensor, float]:
    """The probabilities `p_at(level)`, falling with the level, whose sum is `count`; and that level."""
    low, high = -30.0, 30.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if float(p_at(middle).sum()) > count else (low, middle)
    return p_at(low), low


@dataclass(frozen=True)
class Knobs:
    """What the search turns in the kit's own gate; the defaults are the kit's."""

    floor: float = 0.25  # exploration floor f, as a share of the activation rate
    newest: float = 0.5  # share of a new loss in the remembered one
    relative: bool = False  # remember loss ÷ the running mean loss at that moment
    trend: float = 0.0  # add this times |new - old|
    ageing: float = 0.0  # ranks gained per 1/a epochs without a visit
    overdue: float = 2.0  # forced after this many 1/a epochs; 0 forces none
    by_value: bool = False  # p in proportion to the loss, not by its rank
    pooled: float = 0.0  # share of the class's mean in each sample's significance
    balance: bool = False  # as many of every class, by significance within each
    per_class: float = 0.0  # each class activates at least this share of its fair count
    temperature_of_rate: float = 0.0  # T = min(temperature, this · a); 0: T alone
    guard_quantile: float = ast.Memory.TOP  # a loss above this quantile, visit after visit, ranks as average
    guard_visits: int = ast.Memory.VISITS  # that many visits
    guard_fall: float = ast.Memory.FALL  # a loss below this share of the one before counts as falling


class Turned(ast.RememberedGate):
    """The kit's gate with its knobs turned, for the search."""

    def __init__(self, config: ast.ASTConfig, labels: Tensor, knobs: Knobs, gamma: float = 0.0):
        super().__init__(config, len(labels))
        self.knobs, self.labels, self.gamma, self.mean = knobs, labels, gamma, 1.0
        self.memory.TOP, self.memory.FALL = knobs.guard_quantile, knobs.guard_fall
        self.memory.VISITS = knobs.guard_visits

    def select(self, candidates: Tensor, target: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """As RememberedGate, by the knobs."""
        knobs, m = self.knobs, len(candidates)
        u = self.memory.rank(candidates)
        if knobs.pooled:
            u = self.rank_pooled(candidates)
        if knobs.ageing:
            u = u + knobs.ageing * (self.clock - self.memory.visited[candidates]) * target
        forced = self.stale(candidates, target)
        if knobs.balance:
            p = self.balanced(u, candidates, forced, target)
        else:
            p = self.probability(u, candidates, forced, target)
        if knobs.per_class:
            p = self.raise_classes(p, candidates, target)
        taken, self.phase = ast.systematic(torch.where(forced, 1.0, p), self.phase)
        self.clock += m / len(self.memory.visited)
        return candidates[taken], importance_weights(p[taken], self.gamma, target)

    def rank_pooled(self, candidates: Tensor) -> Tensor:
        """Ranks among the candidates of a mixture of each one's significance and its class's mean."""
        own, labels = self.memory.significance[candidates].clamp(max=1e3), self.labels[candidates]
        sums = torch.zeros(int(labels.max()) + 1).index_add(0, labels, own)
        mixed = own.lerp((sums / labels.bincount())[labels], self.knobs.pooled)
        ordered = mixed.sort().values
        below, upto = (torch.searchsorted(ordered, mixed, side=side) for side in ("left", "right"))
        return (below + upto) / (2 * len(mixed))

    def stale(self, candidates: Tensor, target: float) -> Tensor:
        if not self.knobs.overdue:
            return torch.zeros(len(candidates), dtype=torch.bool)
        wait = self.clock - self.memory.visited[candidates]
        oldest = wait.topk(int(0.5 * target * len(candidates))).indices
        mask = torch.zeros(len(candidates), dtype=torch.bool)
        mask[oldest] = wait[oldest] >= self.knobs.overdue / target
        return mask

    def probability(self, u: Tensor, candidates: Tensor, forced: Tensor, target: float) -> Tensor:
        floor, count = self.knobs.floor * target, target * len(u) - int(forced.sum())
        if self.knobs.by_value:
            value = self.memory.significance[candidates].clamp(max=1e3)
            guarded = (self.memory.stuck[candidates] >= self.memory.VISITS) & self.memory.guard
            value = torch.where(guarded, value.median(), value)

            def p_at(level: float) -> Tensor:
                return floor + (1 - floor) * (value * math.exp(-level)).clamp(max=1)
        else:
            width = self.config.temperature
            if self.knobs.temperature_of_rate:
                width = min(width, self.knobs.temperature_of_rate * target)

            def p_at(level: float) -> Tensor:
                return floor + (1 - floor) * torch.sigmoid((u - level) / width)

        _, self.controller.value = probability_of(count, lambda level: p_at(level)[~forced])
        return p_at(self.controller.value)

    def balanced(self, u: Tensor, candidates: Tensor, forced: Tensor, target: float) -> Tensor:
        """Probabilities by rank within each class, at the rates that activate as many of every class."""
        labels, p = self.labels[candidates], torch.empty(len(candidates))
        shares = even_shares(self.labels, candidates, target)
        for label in labels.unique():
            own = (labels == label).nonzero().flatten()
            u_in_class = torch.empty(len(own))
            u_in_class[u[own].argsort()] = (torch.arange(len(own)) + 0.5) / len(own)
            p[own] = self.probability(u_in_class, candidates[own], forced[own], float(shares[own[0]]))
        return p

    def raise_classes(self, p: Tensor, candidates: Tensor, target: float) -> Tensor:
        """Lifts classes below their share of the target, and lowers all to the same sum."""
        labels, wanted = self.labels[candidates], float(p.sum())
        for label in labels.unique():
            own = labels == label
            least = self.knobs.per_class * target
            if float(p[own].mean()) < least:
                p = torch.where(own, (p * least / p[own].mean()).clamp(max=1), p)
        return p * wanted / float(p.sum())

    def observe(self, indices: Tensor, losses: Tensor) -> None:
        """As RememberedGate, by the knobs."""
        knobs, memory = self.knobs, self.memory
        good = losses.isfinite()
        if knobs.relative and good.any():
            self.mean += 0.2 * (float(losses[good].mean()) - self.mean)
            losses = losses / self.mean
        at, value, before = indices[good], losses[good].float(), memory.significance[indices[good]]
        super().observe(indices, losses)
        old = torch.where(before.isinf(), value, before)
        memory.significance[at] = (
            knobs.newest * value + (1 - knobs.newest) * old + knobs.trend * (value - old).abs()
        )
