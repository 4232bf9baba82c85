"""Layer budgets: how many tokens each layer of a transformer keeps, and which.

Attention probabilities come in, slots and indices of the kept tokens go out. Nothing here knows a host, a
pool or a world model.
"""

from __future__ import annotations

from lzero_kv.budget.allocation import ALLOCATIONS, Allocation, allocate, apportion
from lzero_kv.budget.attention import AttentionRecord, Preference, dispersion_and_shift, layer_preference
from lzero_kv.budget.cascade import BudgetedCache
from lzero_kv.budget.config import BudgetConfig, Sizes
from lzero_kv.budget.layer import LayerCache, attend
from lzero_kv.budget.selection import SELECTIONS, Kept, Selection, select
from lzero_kv.budget.state import BudgetCounters, BudgetSnapshot, BudgetTracker, LayerLoss
from lzero_kv.budget.tokens import Tokens, gather_tokens

__all__ = [
    'ALLOCATIONS',
    'SELECTIONS',
    'Allocation',
    'AttentionRecord',
    'BudgetConfig',
    'BudgetCounters',
    'BudgetSnapshot',
    'BudgetTracker',
    'BudgetedCache',
    'Kept',
    'LayerCache',
    'LayerLoss',
    'Preference',
    'Selection',
    'Sizes',
    'Tokens',
    'allocate',
    'apportion',
    'attend',
    'dispersion_and_shift',
    'gather_tokens',
    'layer_preference',
    'select',
]
