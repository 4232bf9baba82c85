"""What a training says when it begins, and what it would build, before anything is built."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lzero_kv import __version__
from lzero_kv.cache.manager import KVCacheManager
from lzero_kv.config import KVCacheConfig
from lzero_kv.lightzero.host import check_supported, simulations_of
from lzero_kv.lightzero.inference.resources import make_manager
from lzero_kv.lightzero.inference.session import check_room
from lzero_kv.lightzero.settings import FLAG, PLACE, choices_of
from lzero_kv.mistakes import close_name

logger = logging.getLogger(__name__)

OPTIONS = (FLAG, 'kv_cache', 'cache_validation_mode')
"""What the plugin reads, all of it in :data:`PLACE`."""


@dataclass(frozen=True)
class Plan:
    """The caches of one world model of a policy, as a training would size them."""

    config: KVCacheConfig
    manager: KVCacheManager
    """Its storage is not allocated."""
    validation: str | None

    @property
    def bytes(self) -> int:
        """Bytes of the pools as a training begins with them; they grow up to ``max_bytes``."""
        return self.manager.storage.slots * self.manager.layout.row_bytes

    def __str__(self) -> str:
        manager, config = self.manager, self.config
        bound = 'no bound' if config.max_bytes is None else f'at most {config.max_bytes:,}'
        return (
            f'window={config.window}, backend={config.backend_on(manager.layout.device)}, '
            f'precision={config.precision}, {manager.env_num} environments, '
            f'pools of {manager.storage.slots} histories ({self.bytes:,} bytes, {bound}), '
            f'budget={"none" if config.budget is None else _given(config.budget)}, '
            f'validation={self.validation or "off"}'
        )


def _given(budget: Any) -> str:
    return ' '.join(f'{name}={value}' for name, value in budget.model_dump(exclude_unset=True).items())


def planned(policy_cfg: Any) -> Plan:
    """The caches that a policy would have. Nothing is built or allocated.

    Args:
        policy_cfg: the host's, defaults included.

    Raises:
        ValueError, TypeError: they are impossible; says what to write.
    """
    model = policy_cfg['model']['world_model_cfg']
    config, mode = choices_of(model)
    phases = int(policy_cfg['collector_env_num']), int(policy_cfg['evaluator_env_num'])
    device, simulations = torch.device(device_of(policy_cfg)), simulations_of(policy_cfg)
    manager = make_manager(model, config, torch.float32, device, sum(phases), simulations)
    check_room(manager, model, max(phases))
    return Plan(config, manager, mode)


def device_of(policy_cfg: Mapping[str, Any]) -> str:
    """The device that the host takes for a policy: its own default is a GPU where there is one."""
    return 'cuda' if policy_cfg.get('cuda', True) and torch.cuda.is_available() else 'cpu'


def misplaced_options(policy: Any, known: Mapping[str, Collection[str]] | None = None) -> list[str]:
    """Options of the plugin that are nearly right: at a wrong place, or under a name that is close to one.

    Args:
        policy: the config's part ``policy``, a mapping.
        known: for each place the names that the host itself has there.
    """
    found, known = [], known or {}
    parts = {'policy': policy, 'policy.model': _part(policy, 'model')}
    parts[PLACE] = _part(parts['policy.model'], 'world_model_cfg')
    for place, part in parts.items():
        for name in part:
            if name in known.get(place, ()) or (place == PLACE and name in OPTIONS):
                continue
            option = name if name in OPTIONS else close_name(str(name), OPTIONS)
            if option is not None:
                found.append(f'{place}.{name} is not read; did you mean {PLACE}.{option}?')
    return found


def _part(tree: Any, name: str) -> Mapping[str, Any]:
    part = tree.get(name) if isinstance(tree, Mapping) else None
    return part if isinstance(part, Mapping) else {}


def announce(policy_cfg: Any, plan: Plan | None, default: Any) -> None:
    """Log the state of the caches in one line at the start of a training, and each option that is not read.

    Args:
        policy_cfg: the host's, defaults included.
        plan: the caches; None for the stock ones, with the flag off.
        default: the policy's default configuration.
    """
    state = 'off, stock caches' if plan is None else f'on: caches of lzero_kv, {plan}'
    logger.info('lzero_kv %s with LightZero %s: %s', __version__, check_supported(), state)
    for text in misplaced_options(policy_cfg, known_names(default)):
        logger.warning('lzero_kv: %s', text)


def known_names(default: Any) -> dict[str, Collection[str]]:
    """The host's own names at each place, from a policy's default configuration."""
    model = _part(default, 'model')
    return {'policy': set(default), 'policy.model': set(model), PLACE: set(_part(model, 'world_model_cfg'))}
