"""Budgets that follow the attention, but only when they are told to."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from lzero_kv.budget.allocation import allocate
from lzero_kv.budget.config import BudgetConfig
from lzero_kv.budget.preference import Preference, PreferenceAverage


class BudgetTracker:
    """Slots of each layer for a model whose layers all hold ``context`` tokens.

    Preferences are averaged as they are observed; the slots change in :meth:`advance` alone, which is called
    between searches, and only when the weights have moved by more than ``config.hysteresis``.

    Arguments:
        config: what was chosen.
        layers: layers of the model.
        context: tokens that a layer would hold without a budget.

    Raises:
        ValueError: the budget does not hold what is always kept.
    """

    def __init__(self, config: BudgetConfig, layers: int, context: int) -> None:
        self.config = config
        self.layers = layers
        self.context = context
        self.sizes = config.sizes(layers, context)
        self._allocation = config.allocator()
        self._average = PreferenceAverage(layers, config.smoothing)
        # nothing is known yet: every layer the same
        unknown = [Preference(0.0, 0.0)] * layers
        self._weights = self._shares(unknown)
        self.slots: tuple[int, ...] = self._slots()
        """Tokens that each layer holds."""

    @property
    def needs_preference(self) -> bool:
        """Whether :meth:`observe` changes anything."""
        return self._allocation.needs_preference

    @property
    def preferences(self) -> tuple[Preference, ...]:
        """Averages of what was observed, one for each layer; empty before the first observation."""
        return tuple(self._average.preferences)

    def observe(self, preferences: Sequence[Preference]) -> None:
        """Take in one measurement of every layer. The slots stay as they are.

        Raises:
            ValueError: there is not one preference for each layer; nothing is changed.
        """
        self._average.observe(preferences)

    def advance(self) -> bool:
        """Bring the slots up to date; whether they changed."""
        if not self.needs_preference or not self._average.preferences:
            return False
        weights = self._shares(self._average.preferences)
        moved = sum(abs(new - old) for new, old in zip(weights, self._weights, strict=True)) / 2
        if moved <= self.config.hysteresis:
            return False
        before, self._weights = self.slots, weights
        self.slots = self._slots()
        return self.slots != before

    def _shares(self, preferences: Sequence[Preference]) -> list[Fraction]:
        weights = self._allocation.weights(self.layers, preferences)
        return [weight / sum(weights) for weight in weights]

    def _slots(self) -> tuple[int, ...]:
        sizes = self.sizes
        return allocate(
            self._weights,
            sizes.total,
            [self.context] * self.layers,
            window=sizes.window,
            sinks=sizes.sinks,
            minimum=sizes.minimum,
            step=sizes.step,
        )
