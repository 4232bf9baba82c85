"""Policies whose cache is validated, and what is checked about every validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lzero_kv.validation.tally import Tally, ValidationTally
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
    """The family's policy with ``environments`` environments, compared with the old system in ``mode``;
    findings go to ``folder``.
    """
    choices = dict(validation_folder=str(folder), validation_on_failure=on_failure) | (kv_cache or {})
    defaults: dict[str, Any] = dict(
        collector_env_num=environments, evaluator_env_num=1, num_simulations=4
    ) | dict(world_model=dict(cache_validation_mode=mode))
    return make_policy(family, kv=True, kv_cache=choices, **defaults | options)


def tally_of(policy: Any) -> ValidationTally:
    """What was found so far."""
    found = world_model_of(policy).validation
    assert found is not None
    return found


def twin_of(policy: Any) -> Any:
    """The host's world model that runs beside; there once an inference was made."""
    validator = world_model_of(policy).validator
    assert validator is not None
    return validator._twin


def assert_accounted(tally: Tally) -> None:
    """Every compared row has one verdict, and none is a failure."""
    assert tally.equal + tally.different + tally.unexplained + tally.manager_off == tally.compared
    assert (tally.unexplained, tally.manager_off) == (0, 0), (tally.causes, tally.faults)
    assert sum(tally.causes.values()) >= tally.different
    # Rounding, and far below what is tolerated.
    assert tally.largest_manager < 1e-3


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
