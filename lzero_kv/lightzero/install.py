"""Puts the adapter into an installed LightZero, and takes it out again. Nothing of the host's files is
touched."""

from __future__ import annotations

import functools
from typing import Any

from lzero_kv.lightzero.host import check_supported
from lzero_kv.lightzero.settings import check_policy, flag_of

_MISSING = object()


class _Patches:
    """Attributes that were replaced on the host, with what was there before."""

    def __init__(self) -> None:
        self._originals: list[tuple[Any, str, Any]] = []

    def __bool__(self) -> bool:
        return bool(self._originals)

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Replace an attribute; what is inherited counts as absent, so that undoing leaves no copy behind."""
        self._originals.append((owner, name, vars(owner).get(name, _MISSING)))
        setattr(owner, name, value)

    def undo(self) -> None:
        """Put everything back, newest first."""
        while self._originals:
            owner, name, original = self._originals.pop()
            if original is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, original)


_seams = _Patches()
_hot_seams = _Patches()


def install() -> None:
    """Let UniZero world models with ``use_new_cache_manager=True`` keep their caches in a ``KVCacheManager``.

    Until such a world model is built, only constructors are replaced: with the flag off the host runs its own
    code. Installing twice is the same as once.

    Raises:
        RuntimeError: LightZero is missing, or is not one that the adapter knows. The host is left as it was.
    """
    if _seams:
        return
    check_supported()
    from lzero.model import sampled_unizero_model, unizero_model
    from lzero.policy.unizero import UniZeroPolicy

    for module in (unizero_model, sampled_unizero_model):
        _seams.set(module, 'WorldModel', _world_model_factory(module.WorldModel))
    model: Any = unizero_model.UniZeroModel
    if hasattr(model, 'world_model_cls'):  # a subclass with a world model of its own keeps it
        _seams.set(model, 'world_model_cls', staticmethod(_world_model_factory(model.world_model_cls)))
    _seams.set(UniZeroPolicy, '__init__', _engaging(UniZeroPolicy.__init__))


def uninstall() -> None:
    """Leave the host as it was before :func:`install`. Models that exist keep their caches and go on
    working."""
    _hot_seams.undo()
    _seams.undo()


def installed() -> bool:
    """Whether :func:`install` was called."""
    return bool(_seams)


def _world_model_factory(stock: type) -> Any:
    def world_model(config: Any, tokenizer: Any) -> Any:
        if not flag_of(config):
            return stock(config, tokenizer)
        from lzero_kv.lightzero.world_model import KVWorldModel

        _replace_searches()
        return KVWorldModel(config, tokenizer)

    return world_model


def _engaging(original: Any) -> Any:
    """A policy constructor that, with the flag on, puts ``KVPolicy`` in front of the policy's class."""

    @functools.wraps(original)
    def __init__(self: Any, cfg: Any, *args: Any, **kwargs: Any) -> None:
        from lzero_kv.lightzero.start import announce, planned

        self._cfg = cfg  # as the host does; its __del__ reads it where a check below refuses
        engaged = flag_of(cfg.model.world_model_cfg)
        if engaged:
            check_policy(self.default_model()[0], cfg)
        # before the model is built, which may take a minute
        announce(cfg, planned(cfg) if engaged else None, type(self).default_config())
        original(self, cfg, *args, **kwargs)
        if not engaged:
            return
        from lzero_kv.lightzero.policy import KVPolicy
        from lzero_kv.lightzero.world_model import KVWorldModel

        if not isinstance(self._model.world_model, KVWorldModel):
            raise RuntimeError(
                f'expected a model that was built after lzero_kv.install(), got one with the stock '
                f'{type(self._model.world_model).__name__}; '
                f'build it later, or put lzero_kv.plugin into import_names'
            )
        kind = type(self)
        self.__class__ = type(f'KV{kind.__name__}', (KVPolicy, kind), {'__module__': kind.__module__})
        self.engage()

    return __init__


def _replace_searches() -> None:
    """Send searches over a caching world model to :func:`cached_search`; all others run the host's."""
    if _hot_seams:
        return
    from lzero.mcts.ctree.ctree_muzero import mz_tree  # type: ignore[attr-defined]
    from lzero.mcts.ctree.ctree_sampled_muzero import smz_tree  # type: ignore[attr-defined]
    from lzero.mcts.tree_search.mcts_ctree import UniZeroMCTSCtree
    from lzero.mcts.tree_search.mcts_ctree_sampled import SampledUniZeroMCTSCtree

    from lzero_kv.lightzero.reanalysis import replace_sampled_reanalysis
    from lzero_kv.lightzero.reporting import replace_collector_logs

    for search, tree in ((UniZeroMCTSCtree, mz_tree), (SampledUniZeroMCTSCtree, smz_tree)):
        _hot_seams.set(search, 'search', _searching(search.search, tree))
    replace_collector_logs(_hot_seams.set)
    replace_sampled_reanalysis(_hot_seams.set)


def _searching(original: Any, tree: Any) -> Any:
    from lzero_kv.lightzero.search import cached_search
    from lzero_kv.lightzero.world_model import KVWorldModel

    @functools.wraps(original)
    def search(self: Any, roots: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(model.world_model, KVWorldModel):
            return cached_search(self, tree, roots, model, *args, **kwargs)
        return original(self, roots, model, *args, **kwargs)

    return search
