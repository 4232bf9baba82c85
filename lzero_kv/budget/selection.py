"""Which tokens of a layer stay: scores of the tokens, and the choice of the best ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F

from lzero_kv.budget.attention import AttentionRecord
from lzero_kv.budget.tokens import Tokens


class Selection(ABC):
    """A score for every token that may be evicted; the lowest go first."""

    @property
    def reads(self) -> frozenset[str]:
        """What is read of an :class:`AttentionRecord`: ``'accumulated'``, ``'recent'``, both or nothing."""
        return frozenset()

    @property
    def decay(self) -> float:
        """Factor of the accumulated attention at each query, ``rho``."""
        return 1.0

    @abstractmethod
    def scores(self, record: AttentionRecord, tokens: Tokens) -> torch.Tensor:
        """``[B, G, n]``; what it says about tokens that are not evictable is not read."""


@dataclass(frozen=True)
class Streaming(Selection):
    """The newest tokens (StreamingLLM, Xiao et al., ICLR 2024, with sinks)."""

    def scores(self, record: AttentionRecord, tokens: Tokens) -> torch.Tensor:
        # float32 tells positions apart up to 16,777,216
        return tokens.positions.double()


@dataclass(frozen=True)
class H2O(Selection):
    """Accumulated attention (Heavy-Hitter Oracle, Zhang et al., NeurIPS 2023); ``rho`` < 1 forgets."""

    rho: float | None

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({'accumulated'})

    @property
    def decay(self) -> float:
        return 1.0 if self.rho is None else self.rho

    def scores(self, record: AttentionRecord, tokens: Tokens) -> torch.Tensor:
        return accumulated_of(record)


@dataclass(frozen=True)
class Cake(Selection):
    """Mean attention of the last queries plus ``gamma`` times its variance, pooled (CAKE)."""

    gamma: float
    kernel: int

    @property
    def reads(self) -> frozenset[str]:
        return frozenset({'recent'})

    def scores(self, record: AttentionRecord, tokens: Tokens) -> torch.Tensor:
        return indicator(record, tokens, self.gamma, self.kernel)


@dataclass(frozen=True)
class SnapKV(Cake):
    """Mean attention of the last queries, pooled (SnapKV, Li et al., NeurIPS 2024)."""

    gamma: float = field(init=False, default=0.0)


@dataclass(frozen=True)
class HACE(Selection):
    """``mix s / sum s + (1 - mix) I / sum I`` with ``s`` of :class:`H2O` and ``I`` of :class:`Cake`.

    The name (Hierarchical Adaptive Cache Eviction) and its strategies were published without a definition;
    this one is our own. ``'attention'`` is accumulation alone, ``'time_decay'`` accumulation that forgets,
    ``'hybrid'`` both scores. Scores under ``theta`` times a row's largest count as 0, so that the oldest of
    those tokens goes first.
    """

    strategy: str
    mix: float | None
    rho: float | None
    gamma: float
    kernel: int
    theta: float

    defaults: ClassVar[dict[str, tuple[float, float]]] = {
        'attention': (1.0, 1.0),
        'time_decay': (1.0, 0.95),
        'hybrid': (0.5, 1.0),
    }
    """``mix`` and ``rho`` of each strategy."""

    @property
    def reads(self) -> frozenset[str]:
        share = self.accumulated_share
        return frozenset([name for name, part in (('accumulated', share), ('recent', 1 - share)) if part])

    @property
    def decay(self) -> float:
        return self.defaults[self.strategy][1] if self.rho is None else self.rho

    @property
    def accumulated_share(self) -> float:
        """Weight of the accumulated attention, ``lambda``."""
        return self.defaults[self.strategy][0] if self.mix is None else self.mix

    def scores(self, record: AttentionRecord, tokens: Tokens) -> torch.Tensor:
        share, mixed = self.accumulated_share, torch.zeros(())
        if share > 0:
            mixed = share * _share_of_row(accumulated_of(record), tokens)
        if share < 1:
            recent = indicator(record, tokens, self.gamma, self.kernel)
            mixed = mixed + (1 - share) * _share_of_row(recent, tokens)
        threshold = self.theta * mixed.amax(-1, keepdim=True)
        return torch.where(mixed >= threshold, mixed, mixed.new_zeros(()))


SELECTIONS: dict[str, type[Selection]] = {
    'streaming': Streaming,
    'h2o': H2O,
    'snapkv': SnapKV,
    'cake': Cake,
    'hace': HACE,
}
"""The class of each selection. The fields of a class are the parameters of BudgetConfig that it reads."""


def accumulated_of(record: AttentionRecord) -> torch.Tensor:
    """``[B, G, n]``: accumulated attention.

    Raises:
        RuntimeError: nothing was observed.
    """
    if record.accumulated is None:
        raise RuntimeError('no attention was observed; call observe before asking for scores')
    return record.accumulated


def indicator(record: AttentionRecord, tokens: Tokens, gamma: float, kernel: int) -> torch.Tensor:
    """``pool(mean_q a + gamma var_q a)``, ``[B, G, n]``: average pooling over ``kernel`` neighbours in the
    order of positions, among the tokens that may be evicted, with zeros beyond the first and the last."""
    mean, variance = record.moments()
    value = mean + gamma * variance
    value = torch.where(tokens.evictable, value, value.new_zeros(()))
    return F.avg_pool1d(value, kernel, stride=1, padding=kernel // 2)


def _share_of_row(values: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """Each evictable token's share of its row's sum; zeros where the sum is 0."""
    values = torch.where(tokens.evictable, values, values.new_zeros(()))
    total = values.sum(-1, keepdim=True)
    return values / torch.where(total > 0, total, total.new_ones(()))


class Kept(NamedTuple):
    """Which columns stay, right-aligned again."""

    indices: torch.Tensor
    """int64 ``[B, G, k]``: columns of the kept tokens, increasing in the last ``lengths`` places; the places
    in front name column 0 and mean nothing."""
    lengths: torch.Tensor
    """int64 ``[B, G]``: tokens that are kept, at most ``k``."""


def select(scores: torch.Tensor, tokens: Tokens, slots: int | Sequence[int]) -> Kept:
    """Window, sinks, and the tokens with the highest scores; of equal ones the later. A score that is not
    finite counts as the largest or smallest finite number, one that is no number as the smallest.

    With ``tokens.step`` > 1 a step's tokens share the sum of their scores, and the best steps are taken until
    the next one does not fit.

    Arguments:
        scores: ``[B, G, n]``; of tokens that are not evictable it is not read.
        tokens: the tokens of the layer.
        slots: tokens to keep, of every row or one number for each; a row with fewer tokens keeps all.

    Returns:
        Indices ``[B, G, k]`` with the most slots of a row as ``k``, at most ``n``; and lengths.

    Raises:
        ValueError: window and sinks do not fit into ``slots``, where all three are one number for all rows.
    """
    columns = scores.shape[-1]
    if isinstance(slots, int):
        _check_always_kept(min(slots, columns), tokens, columns)
    stays = tokens.real & (rank(scores, tokens).needed < room_of(slots, scores.device))
    place = torch.arange(columns, device=scores.device)
    indices = torch.where(stays, place, -1).sort(-1).values[..., columns - most_of(slots, columns) :]
    return Kept(indices.clamp(min=0), stays.sum(-1))


class Ranking(NamedTuple):
    """The order in which the tokens of a layer are kept: each number of slots keeps the first ones."""

    best_first: torch.Tensor
    """int64 ``[B, G, n]``: columns; window and sinks in front, padding behind."""
    needed: torch.Tensor
    """int64 ``[B, G, n]``: slots, less one, with which the token of each column is kept."""


def rank(scores: torch.Tensor, tokens: Tokens) -> Ranking:
    """Rank the tokens as :func:`select` keeps them; arguments as there."""
    bounds, columns = torch.finfo(scores.dtype), scores.shape[-1]
    scores = torch.nan_to_num(scores, nan=bounds.min, posinf=bounds.max, neginf=bounds.min)
    worth = tokens.sum_of_steps(torch.where(tokens.evictable, scores, scores.new_zeros(())))
    worth = worth.clamp(bounds.min, bounds.max)
    worth = torch.where(tokens.evictable, worth, torch.inf)
    worth = torch.where(tokens.real, worth, -torch.inf)
    # sorted from the newest token to the oldest, so that a stable sort leaves the later one in front
    best_first = columns - 1 - worth.flip(-1).sort(dim=-1, descending=True, stable=True).indices
    place = torch.arange(columns, device=scores.device).expand_as(best_first)
    return Ranking(
        best_first, tokens.max_of_steps(torch.empty_like(best_first).scatter_(-1, best_first, place))
    )


def room_of(slots: int | Sequence[int], device: torch.device) -> int | torch.Tensor:
    """``slots`` beside numbers ``[B, G, n]``."""
    return slots if isinstance(slots, int) else torch.tensor(slots, device=device)[:, None, None]


def most_of(slots: int | Sequence[int], columns: int) -> int:
    """The most slots of a row, at most ``columns``."""
    return min(slots if isinstance(slots, int) else max(slots), columns)


def _check_always_kept(slots: int, tokens: Tokens, columns: int) -> None:
    always = tokens.window + tokens.sinks
    if isinstance(always, int) and slots < min(always, columns):
        raise ValueError(
            f'window and sinks are always kept: expected at least {always} slots, got '
            f'{slots}; raise the budget or lower window={tokens.window}, sinks={tokens.sinks}'
        )
