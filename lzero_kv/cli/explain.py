"""`lzero-kv explain`: a saved finding of a validation, and the truth recomputed."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.table import Table

from lzero_kv.cli.console import show_line, show_table
from lzero_kv.telemetry.table import text_table
from lzero_kv.validation.findings import Finding, load_finding, recomputed
from lzero_kv.validation.tolerance import Tolerance

CACHES = {'cache': 'cache', 'stock': 'stock cache'}
DISTANCES = tuple(head for name in CACHES.values() for head in (f'{name}, largest', 'mean'))
ANSWERS = ('policy', 'value', 'reward', 'latent')
SAME = Tolerance(atol=1e-5, rtol=1e-4)
"""Of the recomputed truth and the stored one. Both are the same computation in float32, but another processor
or number of threads adds up in another order; over the layers of a world model that stays well below this."""


def explain(file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar='FILE')]) -> int:
    """Read a finding of a validation, compute the truth again, and print which cache is wrong by how much.

    Reading a file runs no code of it. The recomputation needs LightZero, and no environment.

    Args:
        file: what a validation with validation_on_failure='log' or 'raise' saved.

    Returns:
        0 when the recomputation confirms the truth in the file, else 1.
    """
    finding = load_finding(file)
    try:
        parts, (confirmed, sentence) = _explained(finding)
    except Exception as error:  # the file holds a model's configuration and weights, which may be anything
        why = f'{type(error).__name__}: {" ".join(str(error).split())}'
        raise ValueError(
            f'{file} cannot be computed again ({why}); give a file that a validation saved'
        ) from error
    for part in [*parts, sentence]:
        show_table(part) if isinstance(part, Table) else show_line(part)
    return 0 if confirmed else 1


def _explained(finding: Finding) -> tuple[list[str | Table], tuple[bool, str]]:
    """What is shown about a finding, and the verdict."""
    truth = _replayed(finding)
    no_kv = 'an episode begins here: nothing was served, so there are no keys and values to compare'
    parts: list[str | Table] = [str(finding), *_reasons(finding)]
    parts.append(layers_table(finding, truth) if 'kv' in truth else no_kv)
    return [*parts, answers_table(finding, truth)], verdict(finding, truth)


def _replayed(finding: Finding) -> dict[str, torch.Tensor]:
    # LightZero is loaded here, and prints.
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return recomputed(finding)


def _reasons(finding: Finding) -> list[str]:
    causes = [f'proven of the stock cache: {cause.value}: {cause.sentence}' for cause in finding.causes]
    if finding.fault is None:
        return causes
    return [f'fault: {finding.fault.value}: {finding.fault.sentence}', *causes]


def layers_table(finding: Finding, truth: dict[str, torch.Tensor]) -> Table:
    """How far each layer's keys and values of both caches are from the recomputation.

    Args:
        finding: with `kv` `[2 * layers, T, embed]` of each cache that served keys and values.
        truth: the recomputation, with `kv` of the same form.
    """
    rows = [
        (str(block // 2), 'values' if block % 2 else 'keys', *_distances(finding, 'kv', right, block))
        for block, right in enumerate(truth['kv'])
    ]
    return text_table(
        [('layer', '', *DISTANCES), *rows], 'keys and values, difference from the recomputation'
    )


def answers_table(finding: Finding, truth: dict[str, torch.Tensor]) -> Table:
    """How far each cache's policy, value, reward and latent state are from the recomputation's."""
    rows = [(name, *_distances(finding, name, truth[name])) for name in ANSWERS if name in truth]
    head = ('answer', *DISTANCES)
    return text_table([head, *rows], 'answers, difference from the recomputation', left=('answer',))


def _distances(finding: Finding, name: str, right: torch.Tensor, block: int | None = None) -> Iterator[str]:
    """The columns of both caches for what they served under a name, or a block of it."""
    for cache in CACHES:
        served = (finding.tensors.get(cache) or {}).get(name)
        if served is not None and block is not None:
            served = served[block] if block < len(served) else None
        yield from _distance(served, right)


def _distance(served: torch.Tensor | None, right: torch.Tensor) -> tuple[str, str]:
    if served is None:
        return '-', '-'
    if served.shape != right.shape:
        return f'{list(served.shape)}, not {list(right.shape)}', '-'
    deviation = Tolerance().deviation(served, right)
    return f'{deviation.largest:.3g}', f'{deviation.mean:.3g}'


def verdict(finding: Finding, truth: dict[str, torch.Tensor]) -> tuple[bool, str]:
    """Whether the recomputation confirms the truth in the file, and a sentence about it."""
    stored: dict[str, Any] = finding.tensors.get('truth') or {}
    common = [name for name in truth if stored.get(name) is not None]
    if not common:
        return False, 'The file holds no truth to compare the recomputation with.'
    found = [SAME.deviation(truth[name], stored[name]) for name in common]
    worst = max(found, key=lambda deviation: deviation.excess)
    if not worst.within:
        return False, (
            f'The recomputation does NOT confirm the truth in the file: they are {worst.largest:.3g} apart. '
            'The weights in the file and those of the finding differ, or the recomputation is wrong.'
        )
    which = 'the cache was wrong' if finding.fault is not None else 'no cause is proven for the difference'
    return True, (
        f'The recomputation confirms the truth in the file (largest difference {worst.largest:.3g}): '
        f'{which}; it is {finding.cache.largest:.3g} from it, the stock cache '
        f'{"without an answer" if finding.stock is None else format(finding.stock.largest, ".3g")}.'
    )
