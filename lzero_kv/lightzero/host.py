"""Which LightZero the adapter knows, told by what it finds there: the development branch has the version
number of the release."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any

SUPPORTED = frozenset({'0.2.0'})


@dataclass(frozen=True)
class Probe:
    """One place of the host that the adapter rests on."""

    seam: str
    """The place."""
    expected: str
    """What release 0.2.0 has there."""
    look: Callable[[], str]
    """What is found there, in the same words."""

    def found(self) -> str:
        """What is there; what cannot be looked at is told, too.

        Raises:
            RuntimeError: a library that the host imports is missing.
        """
        try:
            return self.look() or 'nothing of that kind'
        except ImportError as error:
            if error.name and not error.name.startswith('lzero'):
                raise RuntimeError(f'LightZero cannot be imported: {error}; install {error.name}') from error
            return f'{type(error).__name__}: {error}'
        except Exception as error:  # whatever a changed host raises is a difference, not the end of doctor
            return f'{type(error).__name__}: {error}'


def _host(module: str, name: str) -> Any:
    return getattr(import_module(f'lzero.{module}'), name)


def _names(function: Any) -> frozenset[str]:
    """Names of the attributes that a function uses."""
    return frozenset(inspect.unwrap(function).__code__.co_names)


def _padding_function() -> str:
    return _host('entry.utils', 'initialize_zeros_batch').__name__


def _world_model_class() -> str:
    model = _host('model.unizero_model', 'UniZeroModel')
    return 'an attribute of the class' if hasattr(model, 'world_model_cls') else 'a name of the module'


def _search_arguments() -> str:
    search = _host('mcts.tree_search.mcts_ctree', 'UniZeroMCTSCtree').search
    return ', '.join(name for name in ('timestep', 'task_id') if name in inspect.signature(search).parameters)


def _scalar_transforms() -> str:
    names = _names(_host('mcts.tree_search.mcts_ctree', 'UniZeroMCTSCtree').__init__)
    return ', '.join(sorted(name for name in names if name.endswith('inverse_scalar_transform_handle')))


def _feed_forward() -> str:
    names = _names(_host('model.unizero_world_models.transformer', 'Block').__init__)
    return ', '.join(name for name in ('mlp', 'feed_forward') if name in names)


def _last_observations() -> str:
    names = _names(_host('policy.unizero', 'UniZeroPolicy')._forward_collect)
    return ', '.join(sorted(name for name in names if name.startswith('last_batch_obs')))


PROBES = (
    Probe('lzero.entry.utils', 'initialize_zeros_batch', _padding_function),
    Probe("UniZeroModel's world model", 'a name of the module', _world_model_class),
    Probe('arguments of UniZeroMCTSCtree.search', 'timestep', _search_arguments),
    Probe('scalar transforms of the search', 'inverse_scalar_transform_handle', _scalar_transforms),
    Probe('feed-forward part of a transformer block', 'mlp', _feed_forward),
    Probe('last observations of the policy', 'last_batch_obs', _last_observations),
)
"""What tells release 0.2.0 from other states of LightZero."""


def installed_version() -> str | None:
    """The version of the installed LightZero, None where there is none."""
    try:
        return metadata.version('LightZero')
    except metadata.PackageNotFoundError:
        return None


def check_supported() -> str:
    """The installed version, if the adapter knows it.

    Raises:
        RuntimeError: LightZero or a library of it is missing, it is of another version, or it differs from
            the release where the adapter touches it.
    """
    version = installed_version()
    known = ', '.join(sorted(SUPPORTED))
    if version is None:
        raise RuntimeError(
            f'expected LightZero {known}, found none; install it with: pip install "lzero-kv[lightzero]"'
        )
    if version not in SUPPORTED:
        raise RuntimeError(
            f'expected LightZero {known}, found LightZero {version}, whose caches lzero_kv does not know; '
            f'install a known version, or leave lzero_kv.plugin out of import_names'
        )
    pairs = [(probe, probe.found()) for probe in PROBES]
    other = [
        f'{probe.seam}: expected {probe.expected}, found {found}'
        for probe, found in pairs
        if found != probe.expected
    ]
    if other:
        raise RuntimeError(
            f'expected LightZero {known} as it was released, found one that says {version} and differs '
            f'({"; ".join(other)}); it is the development branch or a changed copy, which lzero_kv does not '
            f'know: pip install LightZero=={version}, or leave lzero_kv.plugin out of import_names'
        )
    return version
