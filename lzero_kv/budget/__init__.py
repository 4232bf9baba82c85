"""Layer budgets: how many tokens each layer of a transformer keeps, and which.

Attention probabilities come in, slots and indices of the kept tokens go out. Nothing here knows a host, a
pool or a world model.
"""

from __future__ import annotations

from lzero_kv.budget.allocation import ALLOCATIONS, Allocation, allocate, apportion
from lzero_kv.budget.cascade import BudgetedCache
from lzero_kv.budget.config import BudgetConfig, Sizes
from lzero_kv.budget.preference import (
    Preference,
    PreferenceAverage,
    attention_dispersion,
    attention_shift,
    layer_preference,
)
from lzero_kv.budget.ragged import LayerKV, attend
from lzero_kv.budget.reading import BudgetReading
from lzero_kv.budget.record import AttentionRecord
from lzero_kv.budget.selection import SELECTIONS, Kept, Selection, select
from lzero_kv.budget.tally import BudgetTally, LayerLoss
from lzero_kv.budget.tokens import Tokens, gather_tokens
from lzero_kv.budget.tracker import BudgetTracker

__all__ = [
    'ALLOCATIONS',
    'SELECTIONS',
    'Allocation',
    'AttentionRecord',
    'BudgetConfig',
    'BudgetReading',
    'BudgetTally',
    'BudgetTracker',
    'BudgetedCache',
    'Kept',
    'LayerKV',
    'LayerLoss',
    'Preference',
    'PreferenceAverage',
    'Selection',
    'Sizes',
    'Tokens',
    'allocate',
    'apportion',
    'attend',
    'attention_dispersion',
    'attention_shift',
    'gather_tokens',
    'layer_preference',
    'select',
]
