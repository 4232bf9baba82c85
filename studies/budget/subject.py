"""Whom the study looks at: UniZero on the small memory task, with a budget or the full cache."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from easydict import EasyDict
from memory_recall_unizero_kv_config import make_config

from testing.models import load_weights, random_weights, world_model_of

Weights = dict[str, torch.Tensor]


def load_checkpoint(path: Path) -> Weights:
    """The weights of a model that LightZero saved."""
    saved = torch.load(path, map_location='cpu', weights_only=True)['model']
    return {name.removeprefix('_orig_mod.'): tensor for name, tensor in saved.items()}


def make_subject(
    weights: Weights | None,
    rows: int,
    budget: Mapping[str, Any] | None,
    *,
    smoke: bool = False,
    num_simulations: int | None = None,
) -> Any:
    """A policy with these weights (None: random ones) that plays `rows` environments at once.

    budget: `kv_cache.budget` of the world model; None for the full cache. smoke: the config's small size.
    """
    main_config, create_config = make_config('memory_recall', 0, smoke)
    policy = main_config.policy
    policy.update(collector_env_num=1, evaluator_env_num=rows, device='cpu', cuda=False)
    policy.num_simulations = num_simulations or policy.num_simulations
    world_model = policy.model.world_model_cfg
    world_model.update(env_num=rows, device='cpu')
    world_model.kv_cache = EasyDict({} if budget is None else {'budget': dict(budget)})
    subject = _quietly_created(policy, create_config)
    model = subject._model
    load_weights(subject, random_weights(_bare(model), 0) if weights is None else weights)
    _bare(model).eval()
    return subject


def forget_all(subject: Any) -> None:
    """New pools: nothing is left of earlier episodes, nor of what was learned about the layers."""
    config = subject._cfg
    environments = int(config.collector_env_num) + int(config.evaluator_env_num)
    world_model_of(subject).expect(environments, int(config.num_simulations))


def reported_bytes(subject: Any) -> dict[str, int]:
    """Bytes of one history's keys and values; of all tensors that hold any, as the manager says; and of what
    is remembered about the histories' attention and positions."""
    manager = world_model_of(subject).kv_cache_manager
    return {
        'node_bytes': manager.layout.row_bytes,
        'cache_bytes': int(manager.bytes),
        'remembered_bytes': manager.record_bytes,
    }


def _quietly_created(policy: EasyDict, create_config: EasyDict) -> Any:
    from ding.policy import create_policy
    from ding.utils import import_module
    from ding.utils.default_helper import deep_merge_dicts
    from lzero.policy.unizero import UniZeroPolicy

    with redirect_stdout(Path(os.devnull).open('w')):
        import_module(create_config.policy.import_names)
        config = deep_merge_dicts(UniZeroPolicy.default_config(), copy.deepcopy(policy))
        config.update(create_config.policy)
        return create_policy(config, enable_field=['learn', 'collect', 'eval'])


def _bare(model: Any) -> Any:
    return getattr(model, '_orig_mod', model)
