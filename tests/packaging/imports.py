"""What a package imports, read from its source."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path


def imported_names(source: str) -> Iterator[str]:
    """Top-level names of the absolute imports anywhere in a module's source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition('.')[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition('.')[0]


def third_party_imports(package: Path) -> dict[str, list[str]]:
    """Name of each imported package that is neither Python's nor this one, with the files that import it."""
    found: dict[str, list[str]] = {}
    for path in sorted(package.rglob('*.py')):
        if path.parent.name == 'configs':  # scripts, in the wheel to be copied out of it
            continue
        for name in set(imported_names(path.read_text(encoding='utf-8'))):
            if name not in sys.stdlib_module_names and name != package.name:
                found.setdefault(name, []).append(str(path.relative_to(package)))
    return found
