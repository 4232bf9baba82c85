"""The LightZero that the adapter knows is told by what is in it; anything else is refused by name."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from lzero.entry import utils
from lzero.mcts.tree_search.mcts_ctree import UniZeroMCTSCtree
from lzero.model import unizero_model
from lzero.model.unizero_world_models.transformer import Block
from lzero.policy.unizero import UniZeroPolicy

import lzero_kv
from lzero_kv.cli.checks import Mark, host_check
from lzero_kv.lightzero import host


def renamed(function: Any, old: str, new: str) -> Any:
    """A function that uses another attribute."""

    def changed(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    names = tuple(new if name == old else name for name in function.__code__.co_names)
    changed.__code__ = changed.__code__.replace(co_names=changed.__code__.co_names + names)
    return changed


def search_with_task(
    self: Any, roots: Any, model: Any, latents: Any, to_play: Any, timestep: Any, task_id: Any = None
) -> None:
    """The development branch's arguments."""


MODULE_NAME = "UniZeroModel's world model: expected a name of the module, found an attribute of the class"

CHANGES: dict[str, Any] = {
    'lzero.entry.utils: expected initialize_zeros_batch': lambda patch: patch.delattr(
        utils, 'initialize_zeros_batch'
    ),
    MODULE_NAME: lambda patch: patch.setattr(
        unizero_model.UniZeroModel, 'world_model_cls', object, raising=False
    ),
    'arguments of UniZeroMCTSCtree.search: expected timestep, found timestep, task_id': lambda patch: (
        patch.setattr(UniZeroMCTSCtree, 'search', search_with_task)
    ),
    'scalar transforms of the search: expected inverse_scalar_transform_handle, found '
    'value_inverse_scalar_transform_handle': lambda patch: patch.setattr(
        UniZeroMCTSCtree,
        '__init__',
        renamed(
            UniZeroMCTSCtree.__init__,
            'inverse_scalar_transform_handle',
            'value_inverse_scalar_transform_handle',
        ),
    ),
    'feed-forward part of a transformer block: expected mlp, found feed_forward': lambda patch: patch.setattr(
        Block, '__init__', renamed(Block.__init__, 'mlp', 'feed_forward')
    ),
    'last observations of the policy: expected last_batch_obs, found last_batch_obs_collect': lambda patch: (
        patch.setattr(
            UniZeroPolicy,
            '_forward_collect',
            renamed(UniZeroPolicy._forward_collect, 'last_batch_obs', 'last_batch_obs_collect'),
        )
    ),
}


def test_the_release_is_known():
    assert host.check_supported() == '0.2.0'
    assert host_check().mark is Mark.OK
    assert len(CHANGES) == len(host.PROBES)


@pytest.mark.parametrize('sentence', CHANGES)
def test_each_difference_is_refused_by_name_and_nothing_is_installed(sentence, monkeypatch):
    lzero_kv.uninstall()
    CHANGES[sentence](monkeypatch)
    before = unizero_model.WorldModel, inspect.getattr_static(UniZeroPolicy, '__init__')
    with pytest.raises(RuntimeError) as caught:
        lzero_kv.install()
    assert sentence in str(caught.value)
    assert str(caught.value).count('expected') == 2
    assert (unizero_model.WorldModel, inspect.getattr_static(UniZeroPolicy, '__init__')) == before
    seen = host_check()
    assert seen.mark is Mark.FAIL
    assert seen.remedy == str(caught.value)


def test_a_missing_library_of_the_host_is_named(monkeypatch):
    def look() -> str:
        raise ModuleNotFoundError("No module named 'easydict'", name='easydict')

    monkeypatch.setattr(host, 'PROBES', (host.Probe('a place', 'anything', look),))
    with pytest.raises(RuntimeError, match=r"^LightZero cannot be imported: .*'easydict'; install easydict$"):
        host.check_supported()


def test_whatever_a_changed_host_raises_is_a_difference(monkeypatch):
    def look() -> str:
        raise OSError('no such thing')

    monkeypatch.setattr(host, 'PROBES', (host.Probe('a place', 'anything', look),))
    with pytest.raises(RuntimeError, match='a place: expected anything, found OSError: no such thing'):
        host.check_supported()
