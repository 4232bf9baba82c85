"""Every method with its parameters: the shared tests run over these tables."""

from __future__ import annotations

from typing import Any

from lzero_kv.budget import ALLOCATIONS, SELECTIONS, BudgetConfig

ALLOCATION_VARIANTS: list[dict[str, Any]] = [
    *(dict(allocation=name) for name in ALLOCATIONS),
    dict(allocation='adaptive', beta=3.5),
    dict(allocation='attention_based', alpha=0.0),
    dict(allocation='attention_based', alpha=0.3, tau1=1.6, tau2=0.4),
    dict(allocation='attention_based', tau1=0.5, tau2=0.7, preference='reverse_disp'),
    dict(allocation='attention_based', tau1=1.9, tau2=1.8, preference='reverse'),
]
SELECTION_VARIANTS: list[dict[str, Any]] = [
    *(dict(selection=name) for name in SELECTIONS),
    dict(selection='h2o', rho=0.8),
    dict(selection='snapkv', kernel=3),
    dict(selection='cake', gamma=7.5, kernel=1),
    dict(selection='hace', mix=0.3, rho=0.9, theta=0.4, kernel=3),
    dict(selection='hace', strategy='attention'),
    dict(selection='hace', strategy='time_decay', theta=0.2),
]


def label(variant: dict[str, Any]) -> str:
    """A name for a parametrised test."""
    first, *rest = variant.items()
    return '-'.join([str(first[1]), *(f'{name}={value}' for name, value in rest)])


def config_of(*variants: dict[str, Any], **others: Any) -> BudgetConfig:
    """A config of an allocation variant, a selection variant and sizes."""
    merged: dict[str, Any] = {}
    for variant in variants:
        merged |= variant
    return BudgetConfig(**merged | others)
