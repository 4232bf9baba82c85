"""`lzero-kv config`: a config with the cache in it, to copy."""

from __future__ import annotations

import ast
import sys
from importlib import resources
from typing import Annotated

import tyro

from lzero_kv.cli.console import show_line
from lzero_kv.mistakes import did_you_mean

COMMON = {'unizero', 'sampled', 'kv', 'config'}  # words of a file's name that tell no config from another


def config(
    name: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar='[NAME]')] = None,
) -> int:
    """Print a config that trains with this cache, or the names of all.

    It imports LightZero and lzero_kv alone, so a copy runs anywhere: lzero-kv config atari > my_config.py

    Args:
        name: of the config.

    Returns:
        0, or 1 when there is none of that name.
    """
    texts = config_texts()
    if name is None:
        for each, text in texts.items():
            show_line(f'{each:<15} {(ast.get_docstring(ast.parse(text)) or "").splitlines()[0]}')
        return 0
    if name not in texts:
        raise ValueError(f'there is no config {name!r}{did_you_mean(name, list(texts))}')
    sys.stdout.write(texts[name])
    return 0


def config_texts() -> dict[str, str]:
    """The source of each config by its name."""
    found = {}
    for file in resources.files('lzero_kv.configs').iterdir():
        stem, _, suffix = file.name.rpartition('.')
        if suffix == 'py' and stem.endswith('_config'):
            name = '_'.join(word for word in stem.split('_') if word not in COMMON)
            found[name] = file.read_text(encoding='utf-8')
    return dict(sorted(found.items()))
