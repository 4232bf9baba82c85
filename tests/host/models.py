"""Small real policies of every shape family LightZero ships, with every dimension a different number.

A policy is built by the host's own ``create_policy`` from the host's own default configuration, so its model, search and
``_forward_collect`` are the real ones; only widths are small. Prediction heads start at zero in the host, which makes all
latents and priors equal, so every weight is drawn anew from a seed.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from types import MethodType
from typing import Any

import torch
from torch import nn

SUPPORT_SCALE = 6  # 13 bins of value and reward
SAMPLED_ACTIONS = 9  # actions the sampled tree draws at a node


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
            return "vector"
        return "image" if self.observation[-1] == 64 else "image_memory"


FAMILIES = {
    family.name: family
    for family in (
        Family("atari", 2, 3, 36, 4, 8, (3, 64, 64), 5, 50),
        Family("stack4", 4, 3, 30, 5, 8, (4, 64, 64), 6, 50, frames=4),
        Family("multitask", 8, 6, 42, 3, 10, (3, 64, 64), 5, 50),
        Family("memory", 4, 5, 40, 8, 34, (3, 5, 5), 6, 50, evaluators=10, timesteps=False),
        Family("lunarlander", 4, 3, 36, 6, 8, 7, 5, 50, timesteps=False),
        Family("lunarlander_continuous", 4, 3, 36, 6, 8, 7, 2, 50, continuous=True, timesteps=False),
        Family("cartpole", 2, 3, 30, 5, 8, 7, 4, 25, rotary=True),
        # Not one of the host's: the smallest that shows a defect, so that hundreds of simulations stay cheap.
        Family("tiny", 2, 3, 24, 6, 8, 7, 5, 50),
    )
}


def make_policy(
    shape: str | Family,
    *,
    kv: bool,
    kv_cache: dict[str, Any] | None = None,
    seed: int = 0,
    num_simulations: int | None = None,
    collector_env_num: int | None = None,
    evaluator_env_num: int | None = None,
    infer_context_length: int | None = None,
    dtype: torch.dtype = torch.float32,
    policy: dict[str, Any] | None = None,
    world_model: dict[str, Any] | None = None,
) -> Any:
    """The host's policy of a family on the CPU, in evaluation mode, with random weights.

    ``kv`` turns the cache manager on (and installs it into the host); ``kv_cache`` are its options. ``infer_context_length``
    is in steps of two tokens. What is None comes from the family. ``policy`` and ``world_model`` override host options.
    Run a float64 policy inside ``precision(torch.float64)``: the host allocates its caches in torch's default dtype.
    """
    family = FAMILIES[shape] if isinstance(shape, str) else shape
    family = replace(
        family,
        simulations=num_simulations or family.simulations,
        collectors=collector_env_num or family.collectors,
        evaluators=evaluator_env_num or family.evaluators,
        context=family.context if infer_context_length is None else 2 * infer_context_length,
    )
    if kv:
        import lzero_kv

        lzero_kv.install()
    config = _policy_config(family, kv, kv_cache, policy or {}, world_model or {})
    from ding.policy import create_policy

    with precision(dtype), torch.random.fork_rng(devices=[]), _buildable_memory_model(family), redirect_stdout(StringIO()):
        torch.manual_seed(seed)
        built = create_policy(config, model=None, enable_field=["learn", "collect", "eval"])
    for model in (collect_model(built), _unwrap(built._target_model)):
        _prepare_dtype(model, family, dtype)
        model.eval()
    load_weights(built, random_weights(collect_model(built), seed))
    return built


def collect_model(policy: Any) -> Any:
    """The model that collection and evaluation share, without torch.compile's wrapper."""
    return _unwrap(policy._collect_model)


def world_model_of(policy: Any) -> Any:
    return collect_model(policy).world_model


def load_weights(policy: Any, weights: dict[str, torch.Tensor]) -> None:
    """Load a model state dict into the policy's model and target model, as the host does with a checkpoint."""
    for model in (collect_model(policy), _unwrap(policy._target_model)):
        model.load_state_dict(weights)


def copy_weights(src: Any, dst: Any) -> None:
    """Give the policy ``dst`` the weights of the policy ``src``; their dtypes may differ."""
    load_weights(dst, collect_model(src).state_dict())


def random_weights(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """A state dict for ``model`` in which every parameter is drawn from ``seed``; the same draws in any dtype."""
    generator = torch.Generator().manual_seed(seed)
    norms = {name for name, module in model.named_modules() if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d, nn.BatchNorm1d))}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drawn: dict[int, torch.Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in drawn:  # a module reached by two names keeps one set of weights
            draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            owner, kind = name.rsplit(".", 1)
            drawn[id(parameter)] = _scaled(draw, kind, owner in norms, "embedding_table" in name or "pos_emb" in name)
        state[name] = drawn[id(parameter)].to(parameter.dtype)
    return state


@contextmanager
def precision(dtype: torch.dtype) -> Iterator[None]:
    """Torch's default dtype for the block; in float64 the host's rotation no longer rounds to float32."""
    from lzero.model.unizero_world_models import transformer

    before, rotate = torch.get_default_dtype(), transformer.apply_rotary_emb
    torch.set_default_dtype(dtype)
    if dtype == torch.float64:
        transformer.apply_rotary_emb = _rotate_in_float64
    try:
        yield
    finally:
        torch.set_default_dtype(before)
        transformer.apply_rotary_emb = rotate


def _scaled(draw: torch.Tensor, kind: str, norm: bool, table: bool) -> torch.Tensor:
    if norm:
        return 1 + 0.1 * draw if kind == "weight" else 0.1 * draw
    if table:
        return 0.7 * draw
    if draw.ndim < 2:
        return 0.1 * draw
    fan_in = draw[0].numel()
    # Wide enough that latents, priors and values of different histories differ clearly.
    return draw * (2.0 / fan_in**0.5)


def _policy_config(
    family: Family, kv: bool, kv_cache: dict[str, Any] | None, policy: dict[str, Any], world_model: dict[str, Any]
) -> Any:
    from ding.utils import deep_merge_dicts
    from easydict import EasyDict

    kind = "sampled_unizero" if family.continuous else "unizero"
    imports = [f"lzero.policy.{kind}"]
    cls = importlib.import_module(imports[0]).POLICY_REGISTRY.get(kind)
    blocks = max(family.context // 2 + 3, 6)
    sizes = dict(continuous_action_space=family.continuous, num_of_sampled_actions=SAMPLED_ACTIONS, action_space_size=family.actions)
    wm: dict[str, Any] = dict(
        sizes, max_blocks=blocks, max_tokens=2 * blocks, context_length=family.context, device="cpu", num_layers=family.layers,
        num_heads=family.heads, embed_dim=family.embed, group_size=family.group, support_size=2 * SUPPORT_SCALE + 1,
        env_num=max(family.collectors, family.evaluators), obs_type=family.observation_type, rotary_emb=family.rotary,
        max_seq_len=64, policy_loss_type="kl", sigma_type="conditioned", fixed_sigma_value=0.5, bound_type=None,
        num_unroll_steps=3, **world_model,
    )  # fmt: skip
    if kv:
        wm |= dict(use_new_cache_manager=True, kv_cache=kv_cache or {})
        imports.append("lzero_kv.plugin")
    model = dict(
        sizes, model_type="mlp" if isinstance(family.observation, int) else "conv", observation_shape=family.observation,
        frame_stack_num=family.frames, image_channel=1 if family.frames > 1 else 3, support_scale=SUPPORT_SCALE,
        norm_type="LN" if isinstance(family.observation, int) else "BN", num_channels=64, world_model_cfg=wm,
    )  # fmt: skip
    overrides: dict[str, Any] = dict(
        type=kind, import_names=imports, model=model, device="cpu", cuda=False, num_simulations=family.simulations,
        collector_env_num=family.collectors, evaluator_env_num=family.evaluators, num_unroll_steps=3, td_steps=2,
        batch_size=4, game_segment_length=12, reanalyze_ratio=0.0, replay_buffer_size=100, sampled_algo=family.continuous, **policy,
    )  # fmt: skip
    return deep_merge_dicts(cls.default_config(), EasyDict(overrides))


def _prepare_dtype(model: Any, family: Family, dtype: torch.dtype) -> None:
    """Free what the host fixes to float32: the rotation table, the memory encoder's input and continuous actions."""
    if dtype != torch.float64:
        return
    if family.rotary:
        table = model.world_model.transformer.freqs_cis
        angle = 1.0 / 10000 ** (torch.arange(0, 2 * table.shape[1], 2, dtype=dtype) / (2 * table.shape[1]))
        turns = torch.outer(torch.arange(table.shape[0], dtype=dtype), angle)
        model.world_model.transformer.freqs_cis = torch.polar(torch.ones_like(turns), turns)
    if family.observation_type == "image_memory":
        encoder = model.tokenizer.encoder
        encoder.forward = MethodType(_encode_in_float64, encoder)
    if family.continuous:
        model.world_model.act_embedding_table.register_forward_pre_hook(_input_in_float64)


def _encode_in_float64(encoder: Any, image: torch.Tensor) -> torch.Tensor:
    return encoder.sim_norm(encoder.linear(encoder.cnn(image).flatten(1)))


def _input_in_float64(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.double() for tensor in inputs)


def _rotate_in_float64(q: torch.Tensor, k: torch.Tensor, freqs_cis: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    def rotate(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        shape = [size if axis in (0, 2, pairs.ndim - 1) else 1 for axis, size in enumerate(pairs.shape)]
        return torch.view_as_real(pairs * freqs_cis.view(*shape)).flatten(-2)

    return rotate(q), rotate(k)


def _unwrap(model: Any) -> Any:
    """Through DI-engine's model wrappers and torch.compile to the module itself."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None:
            inner = model.__dict__.get("_model")
        if inner is None:
            return model
        model = inner


def _buildable_memory_model(family: Family) -> Any:
    """The host's memory model fails to build: it counts the parameters of ``tokenizer.lpips``, which is None by default."""
    return _parameterless_lpips() if family.observation_type == "image_memory" else nullcontext()


@contextmanager
def _parameterless_lpips() -> Iterator[None]:
    from lzero.model import unizero_model

    original = unizero_model.Tokenizer

    def tokenizer(*args: Any, **kwargs: Any) -> Any:
        built = original(*args, **kwargs)
        if built.lpips is None:
            built.lpips = nn.Identity()
        return built

    unizero_model.Tokenizer = tokenizer
    try:
        yield
    finally:
        unizero_model.Tokenizer = original
