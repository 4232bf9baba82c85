"""Which LightZero the adapter stands on, told by what is found there: its states share one version number.

Each seam is probed once into a :class:`Host`. A host that equals a known profile is served; any other is
refused, and what is new in it is named. Functions that read a seam of either profile stand here too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from importlib import import_module, metadata
from typing import Any

import torch

SUPPORTED = frozenset({'0.2.0'})
"""Version numbers of LightZero that the profiles have."""


def _host(module: str, name: str) -> Any:
    return getattr(import_module(f'lzero.{module}'), name)


def _code(function: Any) -> Any:
    return inspect.unwrap(function).__code__


def _names(function: Any) -> frozenset[str]:
    """Names of the attributes that a function uses."""
    return frozenset(_code(function).co_names)


def _arguments(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)[1:]


def _search() -> Any:
    return _host('mcts.tree_search.mcts_ctree', 'UniZeroMCTSCtree')


def _policy() -> Any:
    return _host('policy.unizero', 'UniZeroPolicy')


def _world_model() -> Any:
    return _host('model.unizero_world_models.world_model', 'WorldModel')


def _zeros_batch() -> str:
    places = ('entry.utils', 'policy.utils')
    found = [place for place in places if hasattr(import_module(f'lzero.{place}'), 'initialize_zeros_batch')]
    return f'lzero.{found[0]}' if found else ''


def _world_model_class() -> str:
    model = _host('model.unizero_model', 'UniZeroModel')
    return 'an attribute of the class' if hasattr(model, 'world_model_cls') else 'a name of the module'


def _cache_structures() -> str:
    names = _names(_world_model()._initialize_cache_structures)
    return 'dictionaries or kv_cache_manager' if 'kv_cache_manager' in names else 'dictionaries'


def _cache_clears() -> str:
    name = 'kv_cache_clear_interval'
    return name if name in _code(_policy()._reset_collect).co_consts else 'a number in the code'


def _transforms(search: Any) -> str:
    return ', '.join(
        sorted(name for name in _names(search.__init__) if name.endswith('inverse_scalar_transform_handle'))
    )


def _feed_forward() -> str:
    names = _names(_host('model.unizero_world_models.transformer', 'Block').__init__)
    return ', '.join(name for name in ('mlp', 'feed_forward') if name in names)


def _returned() -> str:
    name = 'first_action_latent_map'
    return name if name in _code(_search().search).co_varnames else 'nothing'


def last_observations(policy: type, phase: str) -> str:
    """Name of the attribute in which a policy class keeps the last observations of a phase ('collect' or
    'eval')."""
    for owner in policy.__mro__:  # a subclass may call the method that reads them
        method = vars(owner).get(f'_forward_{phase}')
        names = [] if method is None else sorted(_names(method))
        if found := [name for name in names if name.startswith('last_batch_obs')]:
            return ', '.join(found)
    return ''


def _simulations() -> str:
    policy = _policy()
    names = _names(policy._init_collect) | _names(policy._init_eval)
    own = sorted(name for name in names if name.endswith('_num_simulations'))
    return ', '.join(own) or 'num_simulations'


def _policy_logits() -> str:
    name = '_apply_policy_logits_control'
    return name if hasattr(_world_model(), name) else 'none'


def _reanalysis() -> str:
    seeds = hasattr(_world_model(), 'seed_reanalysis_root_caches')
    return 'latent states, or contexts by seed_reanalysis_root_caches' if seeds else 'latent states alone'


def _sampled_reanalysis() -> str:
    buffer = _host('mcts.buffer.game_buffer_sampled_unizero', 'SampledUniZeroGameBuffer')
    chunks = hasattr(buffer, '_search_sampled_reanalyzed_roots_in_chunks')
    return 'in chunks' if chunks else 'all roots at once'


def _task_tokens() -> str:
    names = _names(_host('model.unizero_world_models.transformer', 'Transformer').__init__)
    return 'task_embed_option' if 'task_embed_option' in names else 'none'


def _initial_inference() -> str:
    return ', '.join(_arguments(_host('model.unizero_model', 'UniZeroModel').initial_inference))


def _search_arguments() -> str:
    return ', '.join(name for name in _arguments(_search().search) if name in ('timestep', 'task_id'))


def _ties() -> str:
    names = _names(_search().search)
    return 'by the option deterministic' if 'deterministic' in names else 'at random'


def _scalar_transforms() -> str:
    return _transforms(_search())


def _sampled_transforms() -> str:
    return _transforms(_host('mcts.tree_search.mcts_ctree_sampled', 'SampledUniZeroMCTSCtree'))


def _last_inputs() -> str:
    return last_observations(_policy(), 'collect')


def _sampled_last_inputs() -> str:
    return last_observations(_host('policy.sampled_unizero', 'SampledUniZeroPolicy'), 'collect')


def _resets() -> str:
    return ', '.join(_arguments(_policy()._reset_collect))


def _seam(words: str, look: Callable[[], str]) -> Any:
    return field(metadata={'words': words, 'look': look})


@dataclass(frozen=True)
class Host:
    """The seams of one LightZero, each in words that a message can show."""

    zeros_batch: str = _seam('module of initialize_zeros_batch', _zeros_batch)
    world_model: str = _seam("UniZeroModel's world model", _world_model_class)
    initial_inference: str = _seam('arguments of UniZeroModel.initial_inference', _initial_inference)
    cache_structures: str = _seam('caches of WorldModel', _cache_structures)
    cache_clears: str = _seam('steps between two clears of all caches', _cache_clears)
    feed_forward: str = _seam('feed-forward part of a transformer block', _feed_forward)
    search: str = _seam('arguments of UniZeroMCTSCtree.search', _search_arguments)
    search_returns: str = _seam('what UniZeroMCTSCtree.search returns', _returned)
    ties: str = _seam('how the search breaks ties', _ties)
    scalar_transforms: str = _seam('scalar transforms of the search', _scalar_transforms)
    sampled_transforms: str = _seam('scalar transforms of the sampled search', _sampled_transforms)
    last_inputs: str = _seam('last observations of the policy', _last_inputs)
    sampled_last_inputs: str = _seam('last observations of the sampled policy', _sampled_last_inputs)
    resets: str = _seam('arguments of UniZeroPolicy._reset_collect', _resets)
    simulations: str = _seam('numbers of simulations of the policy', _simulations)
    policy_logits: str = _seam('control of policy logits', _policy_logits)
    reanalysis: str = _seam('roots of reanalysis', _reanalysis)
    sampled_reanalysis: str = _seam('reanalysis of the sampled buffer', _sampled_reanalysis)
    task_tokens: str = _seam('tokens of tasks in the transformer', _task_tokens)


RELEASE, MAIN = '0.2.0', 'main 2026-08'
PROFILES = {
    RELEASE: Host(
        zeros_batch='lzero.entry.utils',
        world_model='a name of the module',
        initial_inference='obs_batch, action_batch, current_obs_batch, start_pos',
        cache_structures='dictionaries',
        cache_clears='a number in the code',
        feed_forward='mlp',
        search='timestep',
        search_returns='nothing',
        ties='at random',
        scalar_transforms='inverse_scalar_transform_handle',
        sampled_transforms='inverse_scalar_transform_handle',
        last_inputs='last_batch_obs',
        sampled_last_inputs='last_batch_obs',
        resets='env_id, current_steps, reset_init_data',
        simulations='num_simulations',
        policy_logits='none',
        reanalysis='latent states alone',
        sampled_reanalysis='all roots at once',
        task_tokens='none',
    ),
    MAIN: Host(
        zeros_batch='lzero.policy.utils',
        world_model='an attribute of the class',
        initial_inference='obs_batch, action_batch, current_obs_batch, start_pos, ready_env_id',
        cache_structures='dictionaries or kv_cache_manager',
        cache_clears='kv_cache_clear_interval',
        feed_forward='feed_forward',
        search='timestep, task_id',
        search_returns='first_action_latent_map',
        ties='by the option deterministic',
        scalar_transforms='reward_inverse_scalar_transform_handle, value_inverse_scalar_transform_handle',
        sampled_transforms='reward_inverse_scalar_transform_handle, value_inverse_scalar_transform_handle',
        last_inputs='last_batch_obs_collect',
        sampled_last_inputs='last_batch_obs',
        resets='env_id, current_steps, reset_init_data, task_id',
        simulations='collect_num_simulations, eval_num_simulations',
        policy_logits='_apply_policy_logits_control',
        reanalysis='latent states, or contexts by seed_reanalysis_root_caches',
        sampled_reanalysis='in chunks',
        task_tokens='task_embed_option',
    ),
}
"""Hosts that the adapter was tested on, by name."""


def probed() -> Host:
    """The host that is installed; what cannot be looked at is told in the place of what is found.

    Raises:
        RuntimeError: a library that the host imports is missing.
    """
    return Host(**{seam.name: _found(seam.metadata['look']) for seam in fields(Host)})


def _found(look: Callable[[], str]) -> str:
    try:
        return look() or 'nothing of that kind'
    except ImportError as error:
        if error.name and not error.name.startswith('lzero'):
            raise RuntimeError(f'LightZero cannot be imported: {error}; install {error.name}') from error
        return f'{type(error).__name__}: {error}'
    except Exception as error:  # whatever a changed host raises is a difference, not the end of doctor
        return f'{type(error).__name__}: {error}'


def differences(host: Host, profile: Host) -> list[str]:
    """What a host has in the place of a profile's seams, a sentence for each."""
    return [
        f'{seam.metadata["words"]}: expected {expected}, found {found}'
        for seam in fields(Host)
        if (found := getattr(host, seam.name)) != (expected := getattr(profile, seam.name))
    ]


def installed_version() -> str | None:
    """The version of the installed LightZero, None where there is none."""
    try:
        return metadata.version('LightZero')
    except metadata.PackageNotFoundError:
        return None


def check_supported() -> str:
    """The name of the installed LightZero's profile.

    Raises:
        RuntimeError: LightZero or a library of it is missing, it is of another version, or it equals no
            profile.
    """
    version = installed_version()
    if version is None:
        raise RuntimeError(f'expected LightZero {_KNOWN}, found none; install it as its README says')
    if version not in SUPPORTED:
        raise RuntimeError(
            f'expected LightZero {_KNOWN}, found LightZero {version}, whose caches lzero_kv does not know; '
            f'install a known version, or leave lzero_kv.plugin out of import_names'
        )
    host = probed()
    new = {name: differences(host, profile) for name, profile in PROFILES.items()}
    nearest = min(new, key=lambda name: len(new[name]))
    if new[nearest]:
        raise RuntimeError(
            f'expected LightZero {_KNOWN}, found one that says {version} and is neither; from {nearest} it '
            f'differs in {len(new[nearest])} of {len(fields(Host))} places ({"; ".join(new[nearest])}): '
            f'pip install LightZero==0.2.0, or leave lzero_kv.plugin out of import_names'
        )
    return nearest


_KNOWN = ' or '.join(PROFILES)


def feed_forward(block: Any) -> Any:
    """The feed-forward part of a transformer block, without its residual."""
    return block.mlp if hasattr(block, 'mlp') else block.feed_forward


def scalar_transforms(search: Any) -> tuple[Any, Any]:
    """The inverse transforms of a search's values and rewards; the same object where they do the same."""
    name = 'inverse_scalar_transform_handle'
    if hasattr(search, name):
        return getattr(search, name), getattr(search, name)
    value, reward = getattr(search, f'value_{name}'), getattr(search, f'reward_{name}')
    return value, value if torch.equal(value.value_support, reward.value_support) else reward


def is_release() -> bool:
    """Whether the host's own caches are those of the release, with which validation can compare."""
    return _cache_structures() == PROFILES[RELEASE].cache_structures


def policy_control(world_model: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What the host does to policy logits ``[B, actions]`` of its head; None where it leaves them."""
    clips = getattr(world_model, 'use_policy_logits_clip', False)
    return world_model._apply_policy_logits_control if clips else None


SIMULATIONS = ('num_simulations', 'collect_num_simulations', 'eval_num_simulations')
"""Names in a policy's configuration: git main searches with the second and the third, the release and
reanalysis with the first."""


def simulations_of(config: Any) -> int:
    """The most simulations of a search by a policy's configuration, in any phase."""
    return max(int(config[name]) for name in SIMULATIONS if config.get(name) is not None)


def faults(model: str, config: Any) -> list[str]:
    """Faults of the host itself that end a training, with the plugin or without; each with its mending.

    Args:
        model: name of the model that the policy builds.
        config: of the policy, defaults included.
    """
    if model == 'SampledUniZeroModel':
        return [] if _saves_sampled_policies() else [_SAMPLED_CHECKPOINTS]
    kind = config['model']['world_model_cfg'].get('obs_type') if model == 'UniZeroModel' else None
    builds, mending = _MODELS.get(kind, (lambda: True, ''))
    return [] if builds() else [f'obs_type={kind!r}: this LightZero cannot build the model; {mending}']


_SAMPLED_CHECKPOINTS = (
    'sampled_unizero: this LightZero stops at its first checkpoint; in its sampled_unizero.py write '
    'self.use_adaptive_entropy_weight = False at the end of _init_learn'
)


def _takes_what_is_passed(called: str, name: str) -> bool:
    """Whether what UniZeroModel calls has the argument that it passes."""
    code = _code(_host('model.unizero_model', 'UniZeroModel').__init__)
    passed = any(name in names for names in code.co_consts if isinstance(names, tuple))
    parameters = inspect.signature(_host('model.unizero_model', called)).parameters
    return not passed or name in parameters or 'kwargs' in parameters


def _builds_memory_models() -> bool:
    tokenizer = _host('model.unizero_model', 'Tokenizer')
    return tokenizer(torch.nn.Identity(), torch.nn.Identity()).lpips is not None


_MODELS: dict[str | None, tuple[Callable[[], bool], str]] = {
    'vector': (
        lambda: _takes_what_is_passed('RepresentationNetworkMLP', 'layer_num'),
        'in its unizero_model.py write num_layers=2 for layer_num=2, and output_dim=25 for the '
        'output_shape=25 of VectorDecoderForMemoryEnv',
    ),
    'text': (
        lambda: _takes_what_is_passed('Tokenizer', 'encoder_option'),
        'its Tokenizer takes none of what unizero_model.py passes for texts',
    ),
    'image_memory': (
        _builds_memory_models,
        'in its unizero_model.py leave out self.tokenizer.lpips, which is None, where parameters are counted',
    ),
}
"""For each kind of observations: whether the host builds a UniZeroModel for it, and what to change."""


def _saves_sampled_policies() -> bool:
    policy, name = _host('policy.sampled_unizero', 'SampledUniZeroPolicy'), 'use_adaptive_entropy_weight'
    read = name in _names(policy._state_dict_learn)
    return not read or name in _names(policy._init_learn) or hasattr(policy, name)


def zeros_batch(observation_shape: Any, rows: int, device: Any) -> Any:
    """The host's float zeros ``[rows, *observation_shape]``."""
    return _host(_zeros_batch().removeprefix('lzero.'), 'initialize_zeros_batch')(
        observation_shape, rows, device
    )
