"""One row that must not be: where it is, what is off, and by how much."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .causes import Cause, Fault
from .deviation import Deviation


@dataclass(frozen=True)
class Finding:
    """One row of one inference where the manager is off, or where a difference has no proven cause.

    Attributes:
        kind: ``'roots'``, ``'nodes'`` or ``'reanalysis'``.
        env_id: number of the environment at the manager; in reanalysis, the row of the batch.
        row: row of the batch.
        node: the parent of the recurrent inference, by simulation (0: the root); None at root inference.
        part: what differs most: ``'keys and values'``, ``'policy'``, ``'value'``, ``'reward'``,
            ``'latent'``.
        manager: the manager's distance from the recomputation.
        host: the old system's distance from the recomputation; None where it gave no answer.
        between: distance between the two.
        manager_key: name of the history at the manager.
        host_key: key that the old system looked for, or says why there is none.
        fault: what the manager served instead; None for an unexplained difference.
        causes: what is proven about the old system, which does not account for the difference.
        tensors: ``manager``, ``host`` and ``truth``: keys and values ``[2 * layers, T, embed]`` as
            served (``kv``), and the answers by name.
        replay: what is needed to compute the truth again (the host's adapter fills it).
        file: where it was saved.
    """

    kind: str
    env_id: int
    row: int
    node: int | None
    part: str
    manager: Deviation
    host: Deviation | None
    between: Deviation
    manager_key: str
    host_key: str
    fault: Fault | None
    causes: tuple[Cause, ...] = ()
    tensors: dict[str, Any] = field(default_factory=dict, repr=False)
    replay: dict[str, Any] = field(default_factory=dict, repr=False)
    file: Path | None = None

    @property
    def where(self) -> str:
        """The place, for people."""
        node = '' if self.node is None else f', node {self.node}'
        return f'pool {self.kind}, environment {self.env_id}, row {self.row}{node}'

    def __str__(self) -> str:
        if self.fault is not None:
            head = f'the manager is off ({self.fault.value}): {self.fault.sentence}'
            worst = self.manager
        else:
            head = 'the two systems differ and no cause is proven'
            worst = self.between
        layer = '' if worst.layer is None else f' in layer {worst.layer}'
        host = 'no answer' if self.host is None else f'{self.host.largest:.3g}'
        lines = [
            f'{head}; {self.where}',
            f'  {self.part}: largest difference {worst.largest:.3g}, mean {worst.mean:.3g}{layer}',
            f'  off from the recomputation: manager {self.manager.largest:.3g}, old system {host}',
            f'  key of the manager: {self.manager_key}; key of the old system: {self.host_key}',
        ]
        if self.file is not None:
            lines.append(f'  saved; look at it with: lzero-kv explain {self.file}')
        return '\n'.join(lines)


class ValidationError(RuntimeError):
    """The manager is off, or a difference has no proven cause; ``finding`` holds the tensors."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(str(finding))
        self.finding = finding
