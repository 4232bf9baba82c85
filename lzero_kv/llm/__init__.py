"""Layer budgets for language models under Hugging Face ``generate``.

Public names load their modules on first use: importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lzero_kv.lazy import lazy_names

if TYPE_CHECKING:
    from lzero_kv.llm.cache import BudgetCache
    from lzero_kv.llm.compatibility import (
        EXPERIMENT_CONFIG,
        CAKEExperimentConfig,
        CAKEModelAdapter,
        apply_cake_to_model,
        remove_cake_from_model,
    )
    from lzero_kv.llm.shared_prefill import prefill
    from lzero_kv.llm.switch import disable, enable

__all__ = [
    'EXPERIMENT_CONFIG',
    'BudgetCache',
    'CAKEExperimentConfig',
    'CAKEModelAdapter',
    'apply_cake_to_model',
    'disable',
    'enable',
    'prefill',
    'remove_cake_from_model',
]

_MODULES = {
    'BudgetCache': 'lzero_kv.llm.cache',
    'CAKEExperimentConfig': 'lzero_kv.llm.compatibility',
    'CAKEModelAdapter': 'lzero_kv.llm.compatibility',
    'EXPERIMENT_CONFIG': 'lzero_kv.llm.compatibility',
    'apply_cake_to_model': 'lzero_kv.llm.compatibility',
    'disable': 'lzero_kv.llm.switch',
    'enable': 'lzero_kv.llm.switch',
    'prefill': 'lzero_kv.llm.shared_prefill',
    'remove_cake_from_model': 'lzero_kv.llm.compatibility',
}
__getattr__, __dir__ = lazy_names(__name__, _MODULES, __all__)
