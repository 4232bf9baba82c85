"""Small shapes of every family of configurations LightZero ships, with every dimension a different number."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

SUPPORT_SCALE = 6  # 13 bins of value and reward
SUPPORT_RANGE = (-float(SUPPORT_SCALE), SUPPORT_SCALE + 1.0, 1.0)
"""The same, as LightZero's development branch asks for it."""
SAMPLED_ACTIONS = 9  # actions the sampled tree draws at a node
UNROLL_STEPS = 3


@dataclass(frozen=True)
class Family:
    """Shape of one family of LightZero configurations, at a small width."""

    name: str
    layers: int
    heads: int
    embed: int
    """Width of a token; ``group`` divides it."""
    group: int
    """Size of a softmax group of a latent state."""
    context: int
    """Tokens of a window, twice the host's ``infer_context_length``."""
    observation: int | tuple[int, int, int]
    actions: int
    """Number of discrete actions, or dimensions of a continuous one."""
    simulations: int
    evaluators: int = 3
    collectors: int = 8
    rotary: bool = False
    continuous: bool = False
    frames: int = 1
    """Stacked frames of an observation."""
    timesteps: bool = True
    """Whether the family's environments report a timestep; the host passes -1 for those that do not."""

    @property
    def observation_type(self) -> str:
        if isinstance(self.observation, int):
            return 'vector'
        return 'image' if self.observation[-1] == 64 else 'image_memory'


FAMILIES = {
    family.name: family
    for family in (
        Family('atari', 2, 3, 36, 4, 8, (3, 64, 64), 5, 50),
        Family('stack4', 4, 3, 30, 5, 8, (4, 64, 64), 6, 50, frames=4),
        Family('multitask', 8, 6, 42, 3, 10, (3, 64, 64), 5, 50),
        Family('memory', 4, 5, 40, 8, 34, (3, 5, 5), 6, 50, evaluators=10, timesteps=False),
        Family('lunarlander', 4, 3, 36, 6, 8, 7, 5, 50, timesteps=False),
        Family('lunarlander_continuous', 4, 3, 36, 6, 8, 7, 2, 50, continuous=True, timesteps=False),
        Family('cartpole', 2, 3, 30, 5, 8, 7, 4, 25, rotary=True),
        # Not one of the host's: the smallest that shows a defect, so that hundreds of simulations stay cheap.
        Family('tiny', 2, 3, 24, 6, 8, 7, 5, 50),
    )
}


def policy_config(
    family: Family,
    kv: bool,
    kv_cache: dict[str, Any] | None,
    policy: dict[str, Any],
    world_model: dict[str, Any],
) -> Any:
    """The host's default configuration of the family's policy, with the family's sizes and the overrides."""
    from ding.utils import deep_merge_dicts
    from easydict import EasyDict

    kind = 'sampled_unizero' if family.continuous else 'unizero'
    imports = [f'lzero.policy.{kind}']
    default = importlib.import_module(imports[0]).POLICY_REGISTRY.get(kind).default_config()
    wm = _world_model_config(family) | world_model
    if kv:
        wm |= dict(use_new_cache_manager=True, kv_cache=kv_cache or {})
        imports.append('lzero_kv.plugin')
    vector = isinstance(family.observation, int)
    model = dict(
        model_type='mlp' if vector else 'conv',
        norm_type='LN' if vector else 'BN',
        observation_shape=family.observation,
        frame_stack_num=family.frames,
        image_channel=1 if family.frames > 1 else 3,
        support_scale=SUPPORT_SCALE,
        value_support_range=SUPPORT_RANGE,
        reward_support_range=SUPPORT_RANGE,
        continuous_action_space=family.continuous,
        num_of_sampled_actions=SAMPLED_ACTIONS,
        action_space_size=family.actions,
        world_model_cfg=wm,
    )
    overrides = dict(
        type=kind,
        import_names=imports,
        model=model,
        device='cpu',
        cuda=False,
        num_simulations=family.simulations,
        collect_num_simulations=family.simulations,  # these two are read by LightZero's git main alone
        eval_num_simulations=family.simulations,
        collector_env_num=family.collectors,
        evaluator_env_num=family.evaluators,
        num_unroll_steps=UNROLL_STEPS,
        td_steps=2,
        batch_size=4,
        game_segment_length=12,
        replay_buffer_size=100,
        sampled_algo=family.continuous,
    )
    return deep_merge_dicts(default, deep_merge_dicts(EasyDict(overrides), EasyDict(policy)))


def _world_model_config(family: Family) -> dict[str, Any]:
    blocks = max(family.context // 2 + 3, 6)
    return dict(
        obs_type=family.observation_type,
        num_layers=family.layers,
        num_heads=family.heads,
        embed_dim=family.embed,
        group_size=family.group,
        context_length=family.context,
        max_blocks=blocks,
        max_tokens=2 * blocks,
        num_unroll_steps=UNROLL_STEPS,
        rotary_emb=family.rotary,
        max_seq_len=64,
        action_space_size=family.actions,
        continuous_action_space=family.continuous,
        num_of_sampled_actions=SAMPLED_ACTIONS,
        support_size=2 * SUPPORT_SCALE + 1,
        env_num=max(family.collectors, family.evaluators),
        device='cpu',
        # The sampled policy asks for these four.
        policy_loss_type='kl',
        sigma_type='conditioned',
        fixed_sigma_value=0.5,
        bound_type=None,
    )
