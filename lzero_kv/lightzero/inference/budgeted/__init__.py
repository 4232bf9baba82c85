"""Layer budgets in the world model: what root inference keeps of its histories, and how searches find it."""

from __future__ import annotations

from lzero_kv.lightzero.inference.budgeted.flights import BudgetedFlights, limiting_budget

__all__ = ['BudgetedFlights', 'limiting_budget']
