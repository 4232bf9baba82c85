"""Layer budgets for language models under Hugging Face ``generate``.

Public names load their modules on first use: importing this package loads neither torch nor transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lzero_kv.llm.cache import BudgetCache
    from lzero_kv.llm.enable import disable, enable

__all__ = ['BudgetCache', 'disable', 'enable']

_MODULES = {
    'BudgetCache': 'lzero_kv.llm.cache',
    'disable': 'lzero_kv.llm.enable',
    'enable': 'lzero_kv.llm.enable',
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    # the submodule of the same name as a function stands in its way once it is loaded
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
