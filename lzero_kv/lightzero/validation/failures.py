"""What happens to a row that must not be: it is saved, and raised or logged."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

from lzero_kv.config import KVCacheConfig
from lzero_kv.lightzero.validation.opinion import Compared
from lzero_kv.lightzero.validation.replay import replay_data
from lzero_kv.validation.finding import Finding, ValidationError
from lzero_kv.validation.record import save_finding

SAVED = 3
"""Findings that a world model writes to files at most: each holds the weights of the model."""


class Failures:
    """Saves, raises and logs findings.

    Args:
        world_model: the caching world model, whose weights go into the files.
        mode: of validation.
        config: where to save, and whether to raise.
        rule: of the windows, see :class:`Recompute`.
    """

    def __init__(self, world_model: Any, mode: str, config: KVCacheConfig, rule: str) -> None:
        self.world_model = world_model
        self._mode = mode
        self._config = config
        self._rule = rule
        self._saved = 0

    def report(self, finding: Finding, row: Compared) -> None:
        """Save one of the first findings; then raise it or log it.

        Raises:
            ValidationError: with ``validation_on_failure='raise'``.
        """
        if self._saved < SAVED:
            self._saved += 1
            replay = replay_data(self.world_model, self._rule, row.course)
            finding = dataclasses.replace(finding, replay=replay)
            stem = f'finding_{self._mode}_{row.kind}_{row.name.root}_{row.row}_{row.node or 0}'
            finding = save_finding(finding, unused_path(Path(self._config.validation_folder), stem))
        if self._config.validation_on_failure == 'raise':
            raise ValidationError(finding)
        logging.getLogger(__name__).warning('%s', finding)


def unused_path(folder: Path, stem: str) -> Path:
    """A file of that name that is not there yet: findings of earlier runs, and of the same node, stay."""
    path, number = folder / f'{stem}.pt', 1
    while path.exists():
        number += 1
        path = folder / f'{stem}_{number}.pt'
    return path
