"""Everything that code could have replaced in the host: the attributes of its modules and of the classes in
them.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from typing import Any

PACKAGES = ('lzero', 'ding.policy', 'ding.worker', 'ding.model')
_ABSENT = object()


def host_attributes() -> dict[str, Any]:
    """Every attribute of the host's modules and classes by its full name, with the object itself as its
    value.
    """
    _import_lazily_loaded_modules()
    found: dict[str, Any] = {}
    for module_name, module in sorted(sys.modules.items()):
        if module is None or not _of_host(module_name):
            continue
        for name, value in list(vars(module).items()):
            found[f'{module_name}.{name}'] = value
            if isinstance(value, type) and value.__module__ == module_name:
                for attribute, member in list(vars(value).items()):
                    found[f'{module_name}.{name}.{attribute}'] = member
    return found


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """Names whose object is another one, is new, or is gone."""
    return {
        name
        for name in before.keys() | after.keys()
        if before.get(name, _ABSENT) is not after.get(name, _ABSENT)
    }


def _of_host(module_name: str) -> bool:
    return any(module_name == package or module_name.startswith(f'{package}.') for package in PACKAGES)


def _import_lazily_loaded_modules() -> None:
    """A module that is first imported between two looks would itself count as a change of its package."""
    for package in (
        'lzero.policy',
        'lzero.worker',
        'lzero.mcts',
        'lzero.mcts.buffer',
        'lzero.mcts.tree_search',
    ):
        module = importlib.import_module(package)
        if package in ('lzero.policy', 'lzero.mcts.buffer', 'lzero.mcts.tree_search'):
            for entry in pkgutil.iter_modules(module.__path__):
                if 'unizero' in entry.name or 'mcts' in entry.name:
                    importlib.import_module(f'{package}.{entry.name}')
