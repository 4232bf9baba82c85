"""Policies whose cache is validated, and what is checked about every validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lzero_kv.telemetry.counters import Counters, ValidationCounters
from testing.models import collect_model, load_weights, make_policy, world_model_of

MODES = ('store', 'model')
WINDOWS = ('rebuild', 'shift')


def validated_policy(
    mode: str,
    folder: Path,
    *,
    family: str = 'tiny',
    environments: int = 3,
    on_failure: str = 'raise',
    kv_cache: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """The family's policy with ``environments`` environments, compared with the stock one in ``mode``;
    findings go to ``folder``.
    """
    choices = dict(validation_folder=str(folder), validation_on_failure=on_failure) | (kv_cache or {})
    defaults: dict[str, Any] = dict(
        collector_env_num=environments, evaluator_env_num=1, num_simulations=4
    ) | dict(world_model=dict(cache_validation_mode=mode))
    return make_policy(family, kv=True, kv_cache=choices, **defaults | options)


def counters_of(policy: Any) -> ValidationCounters:
    """The counters so far."""
    found = world_model_of(policy).validation
    assert found is not None
    return found


def stock_of(policy: Any) -> Any:
    """The stock world model beside the policy's; there once an inference was made."""
    validator = world_model_of(policy).validator
    assert validator is not None
    return validator.stock


def assert_accounted(counters: Counters) -> None:
    """Every compared row has one verdict, and none is a failure."""
    assert (
        counters.equal + counters.different + counters.unexplained + counters.cache_wrong == counters.compared
    )
    assert (counters.unexplained, counters.cache_wrong) == (0, 0), (counters.causes, counters.faults)
    assert sum(counters.causes.values()) >= counters.different
    # Rounding, and far below what is tolerated.
    assert counters.largest_cache < 1e-3


def position_correction_refreshed(policy: Any) -> None:
    """What the host computes from weights that are then overwritten is computed from those of now."""
    world_model_of(policy).precompute_pos_emb_diff_kv()


def heads_zeroed(policy: Any, *heads: str) -> None:
    """Zero the last layer of prediction heads, as in a fresh model: what they predict is then always the
    same.
    """
    weights = dict(collect_model(policy).state_dict())
    names = [name for name in weights if any(f'{head}.head_module.2' in name for head in heads)]
    assert names
    load_weights(policy, weights | {name: torch.zeros_like(weights[name]) for name in names})


def assert_compared(policy: Any) -> None:
    """Roots and nodes were compared, and each is accounted for."""
    for counters in (counters_of(policy).roots, counters_of(policy).nodes):
        assert counters.compared > 0
        assert_accounted(counters)
