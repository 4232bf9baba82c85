"""Choices about layer budgets that contradict each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Set
from typing import Any

from lzero_kv.budget.allocation import ALLOCATIONS
from lzero_kv.budget.selection import SELECTIONS
from lzero_kv.mistakes import did_you_mean

_SMOOTHED = ('smoothing', 'hysteresis')
"""Of world models' budgets, which move between searches."""


def impossible_choices(
    values: dict[str, Any], defaults: dict[str, Any], unsure: Set[Any] = frozenset()
) -> list[str]:
    """What cannot be, among values that are right for themselves: one line for each.

    Arguments:
        values: the fields that were given.
        defaults: of all fields.
        unsure: fields that were given with a wrong value: nothing is said about their choice.
    """
    full = defaults | values
    problems = [
        f'{name}: expected one of {list(table)}, got {full[name]!r}'
        f'{did_you_mean(str(full[name]), list(table))}'
        for name, table in (('allocation', ALLOCATIONS), ('selection', SELECTIONS))
        if full[name] not in table and name not in unsure
    ]
    if not problems and not unsure & {'allocation', 'selection'}:
        problems += _never_read(values, full['allocation'], full['selection'])
    if not unsure & {'ratio', 'tokens', 'heavy_ratio', 'recent_ratio'}:
        problems += _sizes_given(values, full)
    if not unsure & {'window', 'sinks', 'step', 'kernel', 'tokens', 'minimum'}:
        problems += _sizes_that_do_not_fit(full)
    return problems + _strategy_refused(full, unsure)


def _never_read(values: dict[str, Any], allocation: str, selection: str) -> list[str]:
    tables = {'allocation': ALLOCATIONS, 'selection': SELECTIONS}
    chosen = {'allocation': allocation, 'selection': selection}
    readers: dict[str, list[str]] = {'heavy_ratio': ["selection='h2o'"], 'recent_ratio': ["selection='h2o'"]}
    readers |= {name: ["allocation='attention_based'"] for name in _SMOOTHED}
    for kind, table in tables.items():
        for method, cls in table.items():
            for name in parameters_of(cls):
                readers.setdefault(name, []).append(f'{kind}={method!r}')
    now = {f'{kind}={method!r}' for kind, method in chosen.items()}
    return [
        f'{name}: it is read with {" or ".join(readers[name])}, not with {" and ".join(sorted(now))}; '
        f'leave it out'
        for name in values
        if name in readers and not now & set(readers[name])
    ]


def _sizes_given(values: dict[str, Any], full: dict[str, Any]) -> list[str]:
    given = [name for name in ('ratio', 'tokens') if full[name] is not None]
    parts = [name for name in ('heavy_ratio', 'recent_ratio') if full[name] is not None]
    if len(parts) == 2:
        too_many = [*given, *(name for name in ('window',) if name in values)]
        problems = [
            f'{name}: heavy_ratio and recent_ratio say it already; leave it out or write ratio and window in '
            f'their place'
            for name in too_many
        ]
        if full['heavy_ratio'] + full['recent_ratio'] > 1:
            problems.append(
                f'heavy_ratio: expected at most 1 together with recent_ratio, got {full["heavy_ratio"]} and '
                f'{full["recent_ratio"]}'
            )
        if full['step'] != 1:
            problems.append(
                f'step: {full["step"]} needs a window in whole steps; write ratio and window in the place of '
                f'heavy_ratio and recent_ratio'
            )
        return problems
    if parts:
        return [f'{parts[0]}: it needs the other one of heavy_ratio and recent_ratio; write both']
    if len(given) != 1:
        got = 'both' if given else 'neither'
        return [
            f'ratio: expected either ratio or tokens, got {got}; write ratio=0.25 (of all tokens) or '
            f'tokens=1024 (of a layer)'
        ]
    return []


def _sizes_that_do_not_fit(full: dict[str, Any]) -> list[str]:
    problems = []
    step, tokens = full['step'], full['tokens']
    for name in ('window', 'sinks'):
        if full[name] % step and full['heavy_ratio'] is None:
            up = -(-full[name] // step) * step
            problems.append(f'{name}: expected whole steps of {step} tokens, got {full[name]}; write {up}')
    least = full['window'] + full['sinks'] + full['minimum']
    if tokens is not None and tokens < least:
        problems.append(
            f'tokens: expected at least window + sinks + minimum = {least}, got {tokens}; write {least} or '
            f'lower window'
        )
    if full['kernel'] % 2 == 0:
        problems.append(f'kernel: expected an odd number, got {full["kernel"]}; write {full["kernel"] + 1}')
    if full['allocation'] == 'attention_based' and full['window'] < 2 and full['heavy_ratio'] is None:
        problems.append(
            "window: allocation='attention_based' needs the variance over 2 queries at least, got 1"
        )
    return problems


def _strategy_refused(full: dict[str, Any], unsure: Set[Any]) -> list[str]:
    if full['selection'] != 'hace' or unsure & {'strategy', 'mix', 'rho'}:
        return []
    problems, strategy = [], full['strategy']
    if full['mix'] is not None and strategy != 'hybrid':
        problems.append(f"mix: strategy={strategy!r} reads the accumulated attention alone; write 'hybrid'")
    if full['rho'] == 1 and strategy == 'time_decay':
        problems.append("rho: strategy='time_decay' needs rho < 1, got 1; write strategy='attention'")
    if full['rho'] not in (None, 1) and strategy == 'attention':
        problems.append(f"rho: strategy='attention' has rho = 1, got {full['rho']}; write 'time_decay'")
    return problems


def parameters_of(method: type) -> list[str]:
    """Names of the fields of a BudgetConfig that a method reads: those of its own constructor."""
    return [field.name for field in dataclasses.fields(method) if field.init]
