"""How much a layer asks for, read off its attention: dispersion over the keys and shift over the queries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from lzero_kv.budget.tokens import Tokens


class Preference(NamedTuple):
    """What one layer's attention says about its need, mean over the rows of a batch."""

    dispersion: float
    """``H``, in nats."""
    shift: float
    """``V``."""


def attention_dispersion(attention: torch.Tensor, evictable: torch.Tensor) -> torch.Tensor:
    """``H = -sum a log a`` over heads, queries and the keys that may be evicted (CAKE).

    Arguments:
        attention: ``[B, heads, W, n]``, probabilities of the last ``W`` queries.
        evictable: bool ``[B, n]``.

    Returns:
        ``[B]``, in nats, float32 (float64 for a float64 attention).
    """
    counted = _counted(attention, evictable)
    # xlogy is 0 at 0
    return -torch.special.xlogy(counted, counted).sum((1, 2, 3))


def attention_shift(attention: torch.Tensor, evictable: torch.Tensor) -> torch.Tensor:
    """``V``: sum over heads and the keys that may be evicted of the variance over the queries (CAKE).
    4.1). Sample variance; 0 for a single query.

    Arguments:
        attention: ``[B, heads, W, n]``, probabilities of the last ``W`` queries. A row with a key that may be
            evicted is longer than the window, so that none of its queries is padding.
        evictable: bool ``[B, n]``.

    Returns:
        ``[B]``, float32 (float64 for a float64 attention).
    """
    counted = _counted(attention, evictable)
    queries = torch.full((1, 1), attention.shape[2], device=attention.device)
    return query_moments(counted, queries)[1].sum((1, 2))


def query_moments(attention: torch.Tensor, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and sample variance over the queries that are no padding: ``[B, heads, n]`` each.

    Arguments:
        attention: ``[B, heads, W, n]``; 0 where a query is padding.
        queries: int64 ``[B, heads]`` or ``[B, 1]``: the last ones of the ``W`` queries that are no padding.
    """
    count = queries[..., None].to(attention.dtype)
    mean = attention.sum(2) / count.clamp(min=1)
    window = attention.shape[2]
    real = torch.arange(window, device=attention.device) >= window - queries[..., None]
    deviation = torch.where(real[..., None], attention - mean[:, :, None], attention.new_zeros(()))
    return mean, deviation.square().sum(2) / (count - 1).clamp(min=1)


def layer_preference(
    attention: torch.Tensor, lengths: torch.Tensor, *, window: int, sinks: int = 0, step: int = 1
) -> Preference:
    """Dispersion and shift of one layer, from its attention over a prompt.

    Arguments:
        attention: ``[B, heads, Q, n]``, probabilities of the last ``Q`` queries, of which the newest
            ``window`` are read.
        lengths: int64 ``[B]``: tokens of each right-aligned row.
        window, sinks, step: tokens that cannot be evicted, as in :class:`Tokens`.

    Returns:
        Means over the rows that have a token to evict; zeros when there is none.
    """
    recent = attention[:, :, -window:]
    tokens = Tokens.of_prompt(lengths[:, None], recent.shape[3], window=window, sinks=sinks, step=step)
    evictable = tokens.evictable[:, 0]
    rows = int(evictable.any(-1).sum())
    if not rows:
        return Preference(0.0, 0.0)
    dispersion = attention_dispersion(recent, evictable).sum() / rows
    shift = attention_shift(recent, evictable).sum() / rows
    return Preference(float(dispersion), float(shift))


class PreferenceAverage:
    """Exponential average of the preferences of all layers: ``x <- smoothing x + (1 - smoothing) new``.

    Arguments:
        layers: number of layers.
        smoothing: weight of the past, in [0, 1).

    Raises:
        ValueError: ``smoothing`` is out of range.
    """

    def __init__(self, layers: int, smoothing: float) -> None:
        if not 0 <= smoothing < 1:
            raise ValueError(f'smoothing must be in [0, 1), got {smoothing}; write 0.0 for no smoothing')
        self.layers = layers
        self.smoothing = smoothing
        self.preferences: list[Preference] = []
        """The averages, one for each layer; empty before the first observation."""

    def observe(self, preferences: Sequence[Preference]) -> None:
        """Take in one measurement of every layer; the first one is taken as it is.

        Raises:
            ValueError: there is not one preference for each layer; nothing is changed.
        """
        if len(preferences) != self.layers:
            raise ValueError(
                f'expected a preference for each of {self.layers} layers, got {len(preferences)}'
            )
        old, keep = self.preferences or preferences, self.smoothing
        self.preferences = [
            Preference(*(keep * past + (1 - keep) * now for past, now in zip(*pair, strict=True)))
            for pair in zip(old, preferences, strict=True)
        ]


def _counted(attention: torch.Tensor, evictable: torch.Tensor) -> torch.Tensor:
    attention = at_least_float32(attention)
    return torch.where(evictable[:, None, None], attention, attention.new_zeros(()))


def at_least_float32(values: torch.Tensor) -> torch.Tensor:
    """``values`` in float32, or as they are in float64: half precision cannot add up attention."""
    return values if values.dtype == torch.float64 else values.float()
