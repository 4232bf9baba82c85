"""The stock configs of LightZero, as their files hand them to the training entry."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import zoo

from lzero_kv.cli.training_call import TrainingCall, training_call


def stock_call(path: str) -> TrainingCall:
    """The training call of a file under `zoo`."""
    return training_call(Path(zoo.__file__).parent / path)


def flat(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """Every leaf of a nested config by its dotted path; an empty mapping is a leaf."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            leaves.update(flat(value, f'{prefix}{key}.'))
        else:
            leaves[prefix + key] = tuple(value) if isinstance(value, list) else value
    return leaves
