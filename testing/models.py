"""Small real policies of the host.

A policy is built by the host's own ``create_policy`` from the host's own default configuration, so its
model, search and ``_forward_collect`` are the real ones; only widths are small. Prediction heads start at
zero in the host, which makes all latents and priors equal, so every weight is drawn anew from a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from functools import cache
from inspect import signature
from io import StringIO
from typing import Any

import torch
from torch import nn

from .families import FAMILIES, Family, policy_config
from .precision import free_from_float32, precision
from .recorder import replaced


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

    ``kv`` turns the cache manager on (and installs it into the host); ``kv_cache`` are its options.
    ``infer_context_length`` is in steps of two tokens. What is None comes from the family. ``policy`` and
    ``world_model`` override host options. Run a float64 policy inside ``precision(torch.float64)``: the
    host allocates its caches in torch's default dtype.
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
    config = policy_config(family, kv, kv_cache, policy or {}, world_model or {})
    from ding.policy import create_policy

    with (
        precision(dtype),
        torch.random.fork_rng(devices=[]),
        buildable_memory_model() if family.observation_type == 'image_memory' else nullcontext(),
        buildable_vector_model(),
        savable_sampled_policy(),
        _shared_slices(),
        redirect_stdout(StringIO()),
    ):
        torch.manual_seed(seed)
        built = create_policy(config, model=None, enable_field=['learn', 'collect', 'eval'])
    for model in (collect_model(built), _unwrap(built._target_model)):
        if dtype == torch.float64:
            free_from_float32(model)
        model.eval()
    load_weights(built, random_weights(collect_model(built), seed))
    return built


def options_of_device(device: str) -> dict[str, Any]:
    """What the host wants to be told, for :func:`make_policy`."""
    return dict(policy=dict(device=device, cuda=device == 'cuda'), world_model=dict(device=device))


def collect_model(policy: Any) -> Any:
    """The model that collection and evaluation share, without torch.compile's wrapper."""
    return _unwrap(policy._collect_model)


def world_model_of(policy: Any) -> Any:
    return collect_model(policy).world_model


def load_weights(policy: Any, weights: dict[str, torch.Tensor]) -> None:
    """Load a model's state dict into the policy's model and target model, as the host does a checkpoint."""
    for model in (collect_model(policy), _unwrap(policy._target_model)):
        model.load_state_dict(weights)


def copy_weights(src: Any, dst: Any) -> None:
    """Give the policy ``dst`` the weights of the policy ``src``; their dtypes may differ."""
    load_weights(dst, collect_model(src).state_dict())


def random_weights(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """A state dict for ``model`` with every parameter drawn from ``seed``; the same draws in any dtype."""
    generator = torch.Generator().manual_seed(seed)
    norms = {
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d, nn.BatchNorm1d))
    }
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    drawn: dict[int, torch.Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in drawn:  # a module reached by two names keeps one set of weights
            draw = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            owner, kind = name.rsplit('.', 1)
            drawn[id(parameter)] = _scaled(
                draw, kind, owner in norms, 'embedding_table' in name or 'pos_emb' in name
            )
        state[name] = drawn[id(parameter)].to(parameter.dtype)
    return state


def _scaled(draw: torch.Tensor, kind: str, norm: bool, table: bool) -> torch.Tensor:
    if norm:
        return 1 + 0.1 * draw if kind == 'weight' else 0.1 * draw
    if table:
        return 0.7 * draw
    if draw.ndim < 2:
        return 0.1 * draw
    fan_in = draw[0].numel()
    # Wide enough that latents, priors and values of different histories differ clearly.
    return draw * (2.0 / fan_in**0.5)


def _unwrap(model: Any) -> Any:
    """Through DI-engine's model wrappers and torch.compile to the module itself."""
    while True:
        inner = getattr(model, '_orig_mod', None)
        if inner is None:
            inner = model.__dict__.get('_model')
        if inner is None:
            return model
        model = inner


class _Slices(dict[tuple[int, int], torch.Tensor]):
    """Token indices of a head for each pair of steps; only ever read, so a copy of a model shares them."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Slices:
        return self


@cache
def _slices(compute: Callable[..., None], max_blocks: int, mask: tuple[float, ...]) -> dict[str, Any]:
    """The attributes that the host's slicer computes."""
    from lzero.model.unizero_world_models.slicer import Slicer

    slicer = Slicer.__new__(Slicer)
    compute(slicer, max_blocks, torch.tensor(mask))
    slicer.cache = _Slices(slicer.cache)
    return {name: value for name, value in vars(slicer).items() if name not in vars(nn.Module())}


@contextmanager
def _shared_slices() -> Iterator[None]:
    """The host computes the indices of each head anew and copies them, tensor by tensor, into the target
    model: nine tenths of the time that a small policy takes.
    """
    from lzero.model.unizero_world_models.slicer import Slicer

    compute = Slicer.__init__

    def __init__(self: Any, max_blocks: int, block_mask: torch.Tensor) -> None:
        nn.Module.__init__(self)
        vars(self).update(_slices(compute, max_blocks, tuple(block_mask.tolist())))

    with replaced(Slicer, '__init__', __init__):
        yield


@contextmanager
def buildable_vector_model() -> Iterator[None]:
    """The development branch of LightZero fails to build vector models: its encoder and decoder are given
    arguments of other names than theirs.
    """
    from lzero.model import unizero_model as models

    encoder, decoder = models.RepresentationNetworkMLP, models.VectorDecoderForMemoryEnv
    if 'num_layers' not in signature(encoder).parameters:
        yield
        return

    def encoded(*args: Any, layer_num: int, **options: Any) -> nn.Module:
        return encoder(*args, num_layers=layer_num, **options)

    def decoded(embedding_dim: int, output_shape: int) -> nn.Module:
        return decoder(embedding_dim, output_dim=output_shape)

    with (
        replaced(models, 'RepresentationNetworkMLP', encoded),
        replaced(models, 'VectorDecoderForMemoryEnv', decoded),
    ):
        yield


@contextmanager
def savable_sampled_policy() -> Iterator[None]:
    """The development branch of LightZero never sets what its sampled policy asks for at a checkpoint."""
    from lzero.policy.sampled_unizero import SampledUniZeroPolicy as Policy

    Policy.use_adaptive_entropy_weight = False
    try:
        yield
    finally:
        del Policy.use_adaptive_entropy_weight


@contextmanager
def buildable_memory_model() -> Iterator[None]:
    """The host's memory model fails to build: it counts the parameters of ``tokenizer.lpips``, which is
    None by default.
    """
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
