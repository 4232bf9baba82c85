"""What a user may choose: ``world_model_cfg.kv_cache``."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, model_validator

from lzero_kv.budget.config import BudgetConfig, Positive
from lzero_kv.mistakes import Mistakes, describe

Count = Annotated[int, Field(strict=True, ge=1)]
Precision = Literal['float32', 'float16', 'bfloat16', 'int8']
ValidationMode = Literal['recompute', 'store', 'model']


class NodeBudget(BudgetConfig):
    """Layer budgets of a world model: a :class:`BudgetConfig` with the defaults that lost least on a trained
    world model (docs/budget_study.md)."""

    hybrid: ClassVar[Mapping[str, float]] = dict(mix=0.25, gamma=0.0)
    """A quarter of accumulated attention in the mean attention of the last queries, without its variance."""
    allocation: str = 'uniform'
    """How the slots are divided among the layers: one of ALLOCATIONS."""
    selection: str = 'hace'
    """Which tokens stay: one of SELECTIONS. With 'hace' and its strategy 'hybrid', mix is 0.25 and gamma 0
    unless they are given."""
    window: Positive = 4
    """Newest tokens of a root, always kept; their queries are the ones whose attention is read."""
    step: Positive = 2
    """Tokens that are kept or dropped together; 2 keeps whole pairs of observation and action."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """'attention_based': part of the weights that follows the attention, the rest is uniform: with few layers
    the attention alone would give most of the tokens to one."""
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """'attention_based' between searches: weight of the past in the average of the preferences."""
    hysteresis: Annotated[float, Field(ge=0, le=1)] = 0.05
    """'attention_based' between searches: budgets stay until this part of the weights would move."""


class KVCacheConfig(BaseModel):
    """Choices of the cache, each with a default. Frozen; every mistake is reported in one ValueError."""

    model_config = ConfigDict(
        frozen=True, extra='forbid', use_attribute_docstrings=True, validate_default=True
    )

    policy: Literal['lru', 'fifo', 'lfu', 'priority'] = 'lru'
    """Which entry makes room when a pool is full: the least recently used, the first stored, the least often
    used, or the one of lowest priority (visit counts)."""
    window: Literal['rebuild', 'shift'] = 'rebuild'
    """What happens to a full context window when its oldest step leaves. 'rebuild' computes the kept tokens
    anew, without what was dropped: exact, and as in training, whose sequences begin at their first token.
    'shift' keeps their keys and values, which still know the dropped step, and corrects learned positions as
    the host does, which is approximate. 'auto' is another name of 'rebuild'."""
    max_bytes: Count | None = 2 * 1024**3
    """Bound of the bytes of all pools of one world model together; None for no bound."""
    root_slots: Count = 1
    """Root histories kept for each environment. With 1 a root replaces its predecessor."""
    window_slots: Count | None = None
    """Windows of search nodes kept for all environments together: those that lost their oldest step. None for
    as many as a search needs: the pool grows, as far as max_bytes allows, before the policy evicts."""
    budget: NodeBudget | None = None
    """How many tokens each layer keeps of a root's history, and which: a dict such as ``dict(ratio=0.25)``;
    None keeps all."""
    backend: Literal['auto', 'eager', 'compile', 'cudagraph'] = 'auto'
    """How the steps of a search run: 'eager' one operator after another, 'compile' as one function on static
    shapes, compiled by torch.compile (about a minute, once), 'cudagraph' as one captured CUDA graph. 'auto'
    is 'cudagraph' on a GPU without a budget, else 'eager'. What fails falls back to 'eager' with a
    warning."""
    precision: Precision = 'float32'
    """Precision of the large weights in planning on a CPU. 'float32' is exact. 'float16' rounds the weights,
    'bfloat16' (for processors with AMX) and 'int8' the weights and what they are multiplied with: faster, and
    approximate. Training, its targets and checkpoints are not touched."""
    enable_stats: StrictBool = True
    """Whether events are counted."""
    tensorboard: StrictBool = True
    """Whether the counters are written to the TensorBoard log of the run."""
    histograms: StrictBool = True
    """Whether entry lifetimes and reuse distances are written as histograms beside the counters."""
    validation_rate: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    """Part of the searches whose nodes validation (``cache_validation_mode``) compares; roots always are."""
    validation_on_failure: Literal['raise', 'log'] = 'raise'
    """What happens when the cache is wrong or a difference has no proven cause: an error, or a logged warning
    and a count."""
    validation_atol: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] | None = None
    """Absolute tolerance of validation where rounding is allowed; None: 1e-3 in float32, 1e-9 in float64."""
    validation_rtol: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] | None = None
    """Relative tolerance, likewise."""
    validation_folder: str = 'kv_cache_findings'
    """Folder for the tensors of failures, which ``lzero-kv explain`` reads."""

    @model_validator(mode='before')
    @classmethod
    def _read_old_names(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        values, problems = _with_new_names(given)
        if problems:
            raise ValueError('; '.join(problems))
        return values

    @model_validator(mode='after')
    def _refuse_impossible_pairs(self) -> KVCacheConfig:
        problems = _impossible_pairs({name: getattr(self, name) for name in self.model_fields_set})
        if problems:
            raise ValueError('; '.join(problems))
        return self

    def backend_on(self, device: Any) -> Literal['eager', 'compile', 'cudagraph']:
        """The backend that steps begin with on a device, a torch.device or its name."""
        if self.backend != 'auto':
            return self.backend
        return 'cudagraph' if str(device).startswith('cuda') and self.budget is None else 'eager'

    def limiting_budget(self, layers: int, kept: int) -> NodeBudget | None:
        """The budget, if it holds less than the ``kept`` tokens of a full window in every layer.

        Raises:
            ValueError: it does not hold what is always kept.
        """
        budget = self.budget
        if budget is None or budget.sizes(layers, kept).total >= layers * kept:
            return None
        return budget

    @classmethod
    def from_world_model_cfg(cls, cfg: Any) -> KVCacheConfig:
        """Read ``cfg.kv_cache``: a mapping, a :class:`KVCacheConfig`, None or absent (all defaults).

        Raises:
            TypeError: ``kv_cache`` is something else.
            ValueError: unknown names, wrong values or impossible pairs of values: one line for each, all at
                once.
        """
        given = read_field(cfg, 'kv_cache', None)
        if given is None:
            return cls()
        if isinstance(given, cls):
            return given
        if not isinstance(given, dict):
            raise TypeError(f"kv_cache must be a dict such as dict(policy='lru'), got {type(given).__name__}")
        values, problems = _with_new_names(given)
        if isinstance(values.get('budget'), Mapping):
            try:
                values['budget'] = NodeBudget.read(values['budget'], 'kv_cache.budget')
            except Mistakes as error:
                problems += error.problems
                del values['budget']
        try:
            config = cls(**values)
        except ValidationError as error:
            # a wrong field keeps the model's own check from looking at the pairs
            items = [item for item in error.errors() if item['loc']]
            problems = (
                [describe(item, cls, _EXPECTED) for item in items] + _impossible_pairs(values) + problems
            )
        else:
            if not problems:
                return config
        raise Mistakes('world_model_cfg.kv_cache', problems)


def read_field(cfg: Any, name: str, default: Any) -> Any:
    """``cfg.name`` or ``cfg['name']``, whichever ``cfg`` has; else ``default``."""
    if isinstance(cfg, dict):
        return cfg.get(name, default)
    return getattr(cfg, name, default)


def option_of(cfg: Any, name: str) -> Any:
    """An option of ``cfg.kv_cache`` as it was given, unchecked; its default where it was not."""
    given = read_field(cfg, 'kv_cache', None) or {}
    return read_field(given, name, KVCacheConfig.model_fields[name].default)


def _with_new_names(given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """``given`` under the names of today, and what is wrong with the names of yesterday."""
    values, problems = dict(given), []
    for old, new in _RENAMED.items():
        if old in values:
            if new in values:
                problems.append(f'{old}: it is the old name of {new}, got both; leave {old} out')
            else:
                _warn(f'kv_cache.{old} is now called {new}; write {new}={values[old]!r}')
                values[new] = values[old]
            del values[old]
    padding = values.pop('padding', None)
    if padding == 'masked':
        _warn("kv_cache.padding is no longer an option: padding is always masked; leave padding='masked' out")
    elif padding is not None:
        problems.append(
            f"padding: {padding!r} is gone; padding is always masked, and cache_validation_mode='store' "
            'compares with the stock cache itself; leave padding out'
        )
    if values.get('window') == 'auto':
        values['window'] = 'rebuild'
    return values, problems


@functools.cache
def _warn(text: str) -> None:
    # The option stands in the user's own script, where Python shows warnings of this kind; the stack that
    # leads here is the host's.
    warnings.warn_explicit(text, DeprecationWarning, 'world_model_cfg.kv_cache', 1, module='__main__')


def _impossible_pairs(values: dict[str, Any]) -> list[str]:
    problems = []
    if values.get('budget') is not None:
        if values.get('window') == 'shift':
            problems.append(
                "budget: it cannot be combined with window='shift', which keeps what the host keeps; "
                "write window='rebuild' or leave budget out"
            )
        if values.get('backend') in ('compile', 'cudagraph'):
            problems.append(
                f'backend: {values["backend"]!r} cannot be combined with budget, whose layers keep different '
                f"numbers of tokens; write backend='eager' or leave budget out"
            )
    if values.get('precision', 'float32') != 'float32' and values.get('backend') in ('compile', 'cudagraph'):
        problems.append(
            f'precision: {values["precision"]!r} cannot be combined with backend={values["backend"]!r}, '
            f"which compiles the products of float32; write backend='eager' or leave precision out"
        )
    if values.get('enable_stats') is False and values.get('tensorboard') is True:
        problems.append(
            'tensorboard: True needs enable_stats=True; leave tensorboard out or write enable_stats=True'
        )
    return problems


def validation_mode_of(cfg: Any) -> ValidationMode | None:
    """``cfg.cache_validation_mode``: what is compared, None for nothing; True means 'store'.

    Raises:
        ValueError: it is something else.
    """
    mode = read_field(cfg, 'cache_validation_mode', False)
    if mode is None or mode is False:
        return None
    if mode is True:
        return 'store'
    if isinstance(mode, str) and mode in ('recompute', 'store', 'model'):
        return mode
    raise ValueError(
        f"cache_validation_mode={mode!r}: expected False, 'recompute' (each answer computed again without a "
        f"cache), 'store' (the caches side by side, too; True means the same) or 'model' (the models, too)"
    )


_RENAMED = {'recurrent_slots': 'window_slots', 'engine': 'backend'}

_EXPECTED = {
    'validation_rate': 'a number in [0, 1]',
    'validation_atol': 'a finite number of at least 0 or None',
    'validation_rtol': 'a finite number of at least 0 or None',
    'validation_folder': 'a folder',
    'budget': 'a dict such as dict(ratio=0.25) or None',
    'max_bytes': 'an integer of at least 1 (bytes) or None',
    'root_slots': 'an integer of at least 1',
    'window_slots': 'an integer of at least 1 or None',
}
