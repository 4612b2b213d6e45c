"""Selection rules to compare the kit's with, as gates of the kit's own interface; each names its source.

A gate has select(candidates, target, generator) -> (indices, weights), observe(indices, losses),
state_dict() and load_state_dict(state); `needs_views` says that it looks at augmented images.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from beds import ast
from torch import Tensor
from torch.nn import functional as F


class Shuffled(ast.RememberedGate):
    """The kit's gate with its ranks dealt out anew: keeps rate and weights, loses the information.

    Sanity check of Okanovic et al. 2024; what it reaches is due to the schedule, not to significance.
    """

    def __init__(self, config: ast.ASTConfig, n: int):
        super().__init__(config, n)
        generator = torch.Generator().manual_seed(n)
        rank = self.memory.rank
        self.memory.rank = lambda indices, labels: rank(indices, labels)[
            torch.randperm(len(indices), generator=generator)
        ]


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
        self, candidates: ast.Views, target: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Keeps by chance, harder views more often; 2 random ones if none."""
        scores = self.score(candidates.images, candidates.labels).cpu()
        self.recent = torch.cat([self.recent, scores[scores.isfinite()]])[-self.RECENT :]
        kept = torch.rand(len(scores), generator=generator) < self.rank(scores) ** (1 / target - 1)
        taken = kept.nonzero().flatten()
        if not len(taken):
            taken = torch.randperm(len(scores), generator=generator)[:2]
        return candidates.indices[taken], torch.ones(len(taken))


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


class Shrinking(ast.AdaptiveSparseTrainer):
    """Gives each skipped sample a step at half resolution, a quarter of the FLOPs, instead of none.

    Progressive resizing (Howard 2018; Touvron et al. 2019, FixRes), here by sample. Shrunk samples are not
    remembered: their losses are on another scale.
    """

    def _train_epoch(self) -> None:
        self.aside = torch.empty(0, dtype=torch.int64)
        super()._train_epoch()

    def _offer(self, candidates: Tensor) -> tuple[Tensor, Tensor]:
        chosen, weights = super()._offer(candidates)
        skipped = candidates[~torch.isin(candidates, chosen)]
        self.aside = torch.cat([self.aside, skipped])
        return chosen, weights

    def _batches(self, plan: ast.Plan) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        for batch in super()._batches(plan):
            yield batch
            while len(self.aside) >= plan.batch_size:
                yield self._shrunk(plan.batch_size)
        if len(self.aside) > 1:
            yield self._shrunk(len(self.aside))

    def _shrunk(self, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        indices, self.aside = self.aside[:count], self.aside[count:]
        _, images, labels = next(self.train_source.stream([indices]))
        self.side = images.shape[-1]
        small = F.interpolate(images, scale_factor=0.5, mode="bilinear", antialias=True)
        return indices, torch.ones(count), small.contiguous(memory_format=torch.channels_last), labels

    def _step(self, indices: Tensor, weights: Tensor, images: Tensor, labels: Tensor) -> None:
        self.shrunk = hasattr(self, "side") and images.shape[-1] < self.side
        unread = len(self.unread)
        super()._step(indices, weights, images, labels)
        if self.shrunk:
            del self.unread[unread:]

    def _count(self, samples: int) -> None:
        if not self.shrunk:
            return super()._count(samples)
        self.ledger.accounts[self.schedule.phase(len(self.rows))].flops += (
            samples * self.flops["training"] / 4
        )


class Balanced(ast.RandomGate):
    """By chance, but of every class as many, which takes labels and no significance: what a long tail's
    gain may be owed to (class-balanced sampling, Kang et al. 2020). Weighted like the kit's gate."""

    def __init__(self, config: ast.ASTConfig, labels: Tensor):
        super().__init__()
        self.config, self.labels, self.phase = config, labels, 0.5

    def select(self, candidates: Tensor, target: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Activates target·m of the m candidates; classes with too few give all they have."""
        p = even_shares(self.labels, candidates, target)
        taken, self.phase = ast.systematic(p, self.phase)
        return candidates[taken], ast.importance_weights(p[taken], self.config.weight_gamma, target)


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
    cap: float = 4.0  # largest weight before scaling
    temperature_of_rate: float = 0.0  # T = min(temperature, this · a); 0: T alone
    guard_quantile: float = ast.Memory.TOP  # a loss above this quantile, visit after visit, ranks as average
    guard_visits: int = ast.Memory.VISITS  # that many visits
    guard_fall: float = ast.Memory.FALL  # a loss below this share of the one before counts as falling


class Turned(ast.RememberedGate):
    """The kit's gate with its knobs turned, for the search."""

    def __init__(self, config: ast.ASTConfig, n: int, knobs: Knobs, labels: Tensor):
        super().__init__(config, n)
        self.knobs, self.labels, self.mean = knobs, labels, 1.0
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
        forced = self.overdue(candidates, target)
        if knobs.balance:
            p = self.balanced(u, candidates, forced, target)
        else:
            p = self.probability(u, candidates, forced, target)
        if knobs.per_class:
            p = self.raise_classes(p, candidates, target)
        taken, self.phase = ast.systematic(torch.where(forced, 1.0, p), self.phase)
        self.clock += m / len(self.memory.visited)
        weights = (p[taken].clamp(min=1e-6) / target).pow(-self.config.weight_gamma).clamp(max=knobs.cap)
        return candidates[taken], weights / weights.mean() if len(weights) else weights

    def rank_pooled(self, candidates: Tensor) -> Tensor:
        """Ranks among the candidates of a mixture of each one's significance and its class's mean."""
        own, labels = self.memory.significance[candidates].clamp(max=1e3), self.labels[candidates]
        sums = torch.zeros(int(labels.max()) + 1).index_add(0, labels, own)
        mixed = own.lerp((sums / labels.bincount())[labels], self.knobs.pooled)
        ordered = mixed.sort().values
        below, upto = (torch.searchsorted(ordered, mixed, side=side) for side in ("left", "right"))
        return (below + upto) / (2 * len(mixed))

    def overdue(self, candidates: Tensor, target: float) -> Tensor:
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
