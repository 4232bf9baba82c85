"""What the adapter reads of the host's configuration, and what it refuses."""

from __future__ import annotations

from typing import Any

import torch

from lzero_kv.cache.window import Window
from lzero_kv.config import KVCacheConfig, Precision, ValidationMode, option_of, validation_mode_of
from lzero_kv.lightzero.host import RELEASE, faults, is_release
from lzero_kv.lightzero.inference.precision import REDUCED, lacking

FLAG = 'use_new_cache_manager'
PLACE = 'policy.model.world_model_cfg'


def flag_of(world_model_cfg: Any) -> bool:
    """The value of ``use_new_cache_manager``.

    Raises:
        TypeError: it is not a bool.
    """
    flag = world_model_cfg.get(FLAG, False)
    if not isinstance(flag, bool):
        raise TypeError(f'expected {FLAG}=True or False in world_model_cfg, got {flag!r}')
    return flag


def choices_of(world_model_cfg: Any) -> tuple[KVCacheConfig, ValidationMode | None]:
    """The user's choices and what validation compares.

    Raises:
        ValueError, TypeError: they are impossible, or do not fit the world model; says what to write.
    """
    config, mode = KVCacheConfig.from_world_model_cfg(world_model_cfg), validation_mode_of(world_model_cfg)
    check_world_model_config(world_model_cfg)
    kept = Window(int(world_model_cfg.context_length)).kept
    if config.limiting_budget(int(world_model_cfg.num_layers), kept) is not None and mode is not None:
        raise ValueError(
            f'cache_validation_mode={mode!r} compares whole histories, and kv_cache.budget keeps a part of '
            f'them: the differences would be its own; leave one of the two out'
        )
    return config, mode


def check_world_model_config(config: Any) -> None:
    """Refuse a world model that the cache cannot serve.

    Raises:
        ValueError: says which field of ``world_model_cfg`` to change, and to what.
    """
    problems = []
    window = Window(int(config.context_length))
    if not config.rotary_emb and config.max_tokens < window.in_flight:
        problems.append(
            f'max_tokens={config.max_tokens}: expected at least {window.in_flight} learned positions for '
            f'context_length={config.context_length}; write max_tokens=2 * max_blocks with more blocks'
        )
    if config.num_heads < 1 or config.embed_dim % config.num_heads:
        problems.append(
            f'num_heads={config.num_heads}: expected at least 1, a divisor of embed_dim={config.embed_dim}'
        )
    if config.tokens_per_block != 2:
        problems.append(
            f'tokens_per_block={config.tokens_per_block}: expected 2 (one observation and one action token)'
        )
    problems += _unserved(config)
    precision = option_of(config, 'precision')
    try:
        mode = validation_mode_of(config)
        if precision in REDUCED:
            problems += _unreduced(config, precision, mode)
        if mode in ('store', 'model') and not is_release():
            problems.append(
                f'cache_validation_mode={mode!r}: it compares with the caches of LightZero {RELEASE}, which '
                f"this LightZero has not; write cache_validation_mode='recompute'"
            )
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise ValueError(
            'world_model_cfg does not fit use_new_cache_manager=True:\n  ' + '\n  '.join(problems)
        )


def _unserved(config: Any) -> list[str]:
    """Options of the host that would be ignored in silence."""
    problems = []
    task = config.get('task_embed_option')
    if task not in (None, 'none'):
        problems.append(
            f"task_embed_option={task!r}: register tokens and task embeddings are not served; write 'none'"
        )
    if config.get('exact_kv_window_reset'):
        problems.append(
            'exact_kv_window_reset=True: it keeps only the newest observation of a full window, lzero_kv '
            'all but its oldest step; leave it out'
        )
    if config.get('rebuild_kv_window_from_tokens') and option_of(config, 'window') == 'shift':
        problems.append(
            "kv_cache.window='shift' is not what rebuild_kv_window_from_tokens=True asks for; leave one out"
        )
    for name in ('moe_in_transformer', 'multiplication_moe_in_transformer'):
        if config.get(name):
            problems.append(f'{name}=True: mixtures of experts are not served; write False')
    return problems


def _unreduced(config: Any, precision: Precision, mode: str | None) -> list[str]:
    """What stands against planning in a reduced precision."""
    problems, name = [], f'kv_cache.precision={precision!r}'
    # configs name a GPU and run without one: the host takes the CPU then
    if str(config.get('device', 'cpu')) != 'cpu' and torch.cuda.is_available():
        problems.append(f'{name}: it is for planning on a CPU, got device={config.device!r}; leave it out')
    elif reason := lacking(precision, config.embed_dim):
        problems.append(f'{name}: {reason}; leave it out')
    if precision in ('bfloat16', 'int8') and mode is not None:
        # one node of a hundred is 0.05 or 0.2 away: a number at the edge of two levels (test_precision.py)
        problems.append(
            f'{name}: a number that rounds to the next level moves a logit as far as a wrong entry may, '
            f'so cache_validation_mode={mode!r} could not tell them apart; write '
            f"'float16' or 'float32' to validate"
        )
    elif mode in ('store', 'model'):
        problems.append(
            f'{name}: cache_validation_mode={mode!r} compares with products in float32; write '
            f"cache_validation_mode='recompute'"
        )
    return problems


POLICIES = {'unizero': 'UniZeroModel', 'sampled_unizero': 'SampledUniZeroModel'}
"""Policies that are served, as create_config calls them, and the models that they build."""


def check_policy(model: str, config: Any) -> None:
    """Refuse a policy that the cache cannot serve.

    Args:
        model: name of the model that its class builds by default.
        config: of the policy.

    Raises:
        ValueError: says what to change.
    """
    problems = []
    if model not in POLICIES.values():
        problems.append(
            f'the policy builds a {model}: expected one of {", ".join(POLICIES.values())}; others (of '
            f'several tasks, of PPO) are not served, write use_new_cache_manager=False'
        )
    if config.get('contextual_reanalysis'):
        problems.append(
            'contextual_reanalysis=True: contexts of replayed roots are not served; write '
            'contextual_reanalysis=False'
        )
    problems += faults(model, config)
    if problems:
        raise ValueError('the policy does not fit use_new_cache_manager=True:\n  ' + '\n  '.join(problems))
