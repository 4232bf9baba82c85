"""The switch that gives every prompt of a model a cache under a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.cache_utils import DynamicCache

from lzero_kv.budget import BudgetConfig
from lzero_kv.llm.budget import PromptBudget
from lzero_kv.llm.cache import BudgetCache
from lzero_kv.llm.families import cache_argument
from lzero_kv.llm.shared_prefill import SharedPrefill


@dataclass(frozen=True)
class GiveCache:
    """Forward hook of an enabled model: a cache in the place of the empty one that ``generate`` made.

    Attributes:
        argument: of the model's ``forward``, which takes the cache.
        budget, options: of each cache.
    """

    argument: str
    budget: BudgetConfig
    options: Mapping[str, Any]

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = kwargs.get('cache', kwargs.get('past_key_values'))
        wanted = kwargs.get('use_cache')
        if given is None and not (module.config.use_cache if wanted is None else wanted):
            return None
        if isinstance(given, BudgetCache | SharedPrefill):
            return None
        if given is not None and not (type(given) is DynamicCache and not given.get_seq_length()):
            raise TypeError(
                f'this model runs under a budget: past_key_values must be a BudgetCache, an empty '
                f'DynamicCache or None, got {type(given).__name__}; write lzero_kv.llm.disable(model) first, '
                f'static, compiled and paged caches have no budget'
            )
        others = {key: value for key, value in kwargs.items() if key not in ('cache', 'past_key_values')}
        return args, {**others, self.argument: BudgetCache(module.config, self.budget, **self.options)}


def enable(model: Any, budget: BudgetConfig | Mapping[str, Any], **options: Any) -> Any:
    """Give every prompt of a model a :class:`BudgetCache` of its own, until :func:`disable`.

    Nothing is written on the model or its configuration: a forward hook puts the cache in the place of the
    empty one that ``generate`` made. Enabling again replaces the budget.

    Arguments:
        model: a causal language model of transformers.
        budget, options: as of :class:`BudgetCache`.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: the model or the budget is impossible; nothing is changed.
    """
    base = _base_of(model)
    chosen = PromptBudget.read(budget)
    BudgetCache(base.config, chosen, **options)
    disable(model)
    hook = GiveCache(cache_argument(type(base)), chosen, options)
    base.register_forward_pre_hook(hook, with_kwargs=True)
    return model


def disable(model: Any) -> Any:
    """Undo :func:`enable`; a model that is not enabled stays as it is. Returns the model."""
    base = _base_of(model)
    # by its kind: a copy of a model has a copy of the hook, and no handle of it
    hooks = base._forward_pre_hooks
    for number in [number for number, hook in hooks.items() if isinstance(hook, GiveCache)]:
        del hooks[number], base._forward_pre_hooks_with_kwargs[number]
    return model


def _base_of(model: Any) -> nn.Module:
    """The innermost model: adapters wrap a whole model and call it past the hooks of what they stand for."""
    base = getattr(model, 'base_model', None)
    while isinstance(base, nn.Module) and (inner := getattr(base, 'base_model', base)) is not base:
        base = inner
    if not isinstance(base, nn.Module) or not hasattr(base, 'config'):
        raise TypeError(f'expected a language model of transformers, got {type(model).__name__}')
    return base
