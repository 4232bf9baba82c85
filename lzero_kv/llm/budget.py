"""What may be chosen about the budget of a language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lzero_kv.budget.config import BudgetConfig, Natural, Positive


class PromptBudget(BudgetConfig):
    """Layer budgets of a language model: a :class:`BudgetConfig` with the defaults that lost least on real
    text (docs/language_model_study.md)."""

    hybrid: ClassVar[Mapping[str, float]] = dict(rho=0.99, mix=0.8)
    """Mostly accumulated attention, which halves every 69 queries."""
    selection: str = 'hace'
    """Which tokens stay: one of SELECTIONS. With 'hace' and its strategy 'hybrid', rho is 0.99 and mix
    0.8 unless they are given."""
    window: Positive = 64
    """Newest tokens, always kept; their queries are the ones whose attention is read."""
    sinks: Natural = 4
    """First tokens, always kept."""

    @classmethod
    def read(cls, given: BudgetConfig | Mapping[str, Any], name: str = 'budget') -> BudgetConfig:
        """A mapping as a config; a :class:`BudgetConfig` as it is, with its own defaults.

        Raises:
            TypeError, ValueError: as of :meth:`BudgetConfig.read`.
        """
        return given if isinstance(given, BudgetConfig) else super().read(given, name)
