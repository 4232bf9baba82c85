"""Layer budgets for language models under Hugging Face ``generate``.

Public names load their modules on first use: importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
    'BudgetCache': 'cache',
    'CAKEExperimentConfig': 'compatibility',
    'CAKEModelAdapter': 'compatibility',
    'EXPERIMENT_CONFIG': 'compatibility',
    'apply_cake_to_model': 'compatibility',
    'disable': 'switch',
    'enable': 'switch',
    'prefill': 'shared_prefill',
    'remove_cake_from_model': 'compatibility',
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    value = globals()[name] = getattr(import_module(f'{__name__}.{_MODULES[name]}'), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
