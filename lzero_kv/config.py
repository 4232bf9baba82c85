"""What a user may choose: ``world_model_cfg.kv_cache``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, model_validator

from lzero_kv.budget.config import BudgetConfig, Positive
from lzero_kv.mistakes import Mistakes, describe

Count = Annotated[int, Field(strict=True, ge=1)]


HYBRID = dict(mix=0.25, gamma=0.0)
"""Of selection='hace' with strategy='hybrid', where nothing else is given: a quarter of accumulated attention
in the mean attention of the last queries, without its variance."""


class NodeBudget(BudgetConfig):
    """Layer budgets of a world model: a :class:`BudgetConfig` with the defaults that lost least on a trained
    world model (docs/budget_study.md)."""

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

    @model_validator(mode='before')
    @classmethod
    def _complete_hybrid(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        hybrid = given.get('selection', 'hace') == 'hace' and given.get('strategy', 'hybrid') == 'hybrid'
        return {**HYBRID, **given} if hybrid else given


class KVCacheConfig(BaseModel):
    """Choices of the cache, each with a default. Frozen; every mistake is reported in one ValueError."""

    model_config = ConfigDict(
        frozen=True, extra='forbid', use_attribute_docstrings=True, validate_default=True
    )

    policy: Literal['lru', 'fifo', 'lfu', 'priority'] = 'lru'
    """Which entry makes room when a pool is full: the least recently used, the first stored, the least often
    used, or the one of lowest priority (visit counts)."""
    window: Literal['auto', 'shift', 'rebuild'] = 'auto'
    """What happens to a full context window when its oldest step leaves. 'rebuild' computes the kept tokens
    anew, without what was dropped: exact, and as in training, whose sequences begin at their first token.
    'shift' keeps their keys and values, which still know the dropped step, and corrects learned positions as
    the host does, which is approximate. 'auto' rebuilds, and shifts with padding='host'."""
    padding: Literal['masked', 'host'] = 'masked'
    """How histories of different length share a batch: 'masked' hides the padding from attention, 'host' pads
    with visible zeros as the host does, for comparison with published runs."""
    max_bytes: Count | None = 2 * 1024**3
    """Bound of the bytes of all pools of one world model together; None for no bound."""
    root_slots: Count = 1
    """Root histories kept for each environment."""
    recurrent_slots: Count | None = None
    """Search nodes kept for all environments together; None for the number of nodes of the largest search
    (rows times num_simulations + 1), which no search overflows. Nodes that share their root's history (long
    contexts) need none until their window moves."""
    budget: NodeBudget | None = None
    """How many tokens each layer keeps of a root's history, and which: a dict such as ``dict(ratio=0.25)``;
    None keeps all."""
    engine: Literal['auto', 'eager', 'compile', 'cudagraph'] = 'auto'
    """How the steps of a search run: 'eager' one operator after another, 'compile' as one function on static
    shapes, compiled by torch.compile (about a minute, once), 'cudagraph' as one captured CUDA graph. 'auto'
    is 'cudagraph' on a CUDA device, and 'eager' elsewhere, with padding='host', with a budget, and with long
    contexts. What fails falls back to 'eager' with a warning."""
    enable_stats: StrictBool = True
    """Whether events are counted."""
    tensorboard: StrictBool = True
    """Whether the counters are written to the TensorBoard log of the run."""
    histograms: StrictBool = True
    """Whether entry lifetimes and reuse distances are written as histograms beside the counters."""
    validation_rate: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    """Part of the searches whose nodes validation (``cache_validation_mode``) compares; roots always are."""
    validation_on_failure: Literal['raise', 'log'] = 'raise'
    """What happens when the manager is off or a difference has no proven cause: an error, or a logged warning
    and a count."""
    validation_atol: Annotated[float, Field(ge=0.0)] | None = None
    """Absolute tolerance of validation where rounding is allowed; None: 1e-3 in float32, 1e-9 in float64."""
    validation_rtol: Annotated[float, Field(ge=0.0)] | None = None
    """Relative tolerance, likewise."""
    validation_folder: str = 'kv_cache_findings'
    """Folder for the tensors of failures, which ``lzero-kv explain`` reads."""

    @model_validator(mode='after')
    def _refuse_impossible_pairs(self) -> KVCacheConfig:
        problems = _impossible_pairs({name: getattr(self, name) for name in self.model_fields_set})
        if problems:
            raise ValueError('; '.join(problems))
        return self

    def engine_on(self, device: str, *, sharing: bool) -> Literal['eager', 'compile', 'cudagraph']:
        """The engine of a model.

        Arguments:
            device: type of its device ('cpu', 'cuda', ...).
            sharing: whether its nodes share their roots' histories, which the eager engine alone can.
        """
        if self.engine != 'auto':
            return self.engine
        fits = self.padding != 'host' and self.budget is None and not sharing
        return 'cudagraph' if device == 'cuda' and fits else 'eager'

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
        values, problems = dict(given), []
        if isinstance(values.get('budget'), Mapping):
            try:
                values['budget'] = NodeBudget.read(values['budget'], 'kv_cache.budget')
            except Mistakes as error:
                problems = error.problems
                del values['budget']
        try:
            config = cls(**values)
        except ValidationError as error:
            # a wrong field keeps the model's own check from looking at the pairs
            items = [item for item in error.errors() if item['loc']]
            problems = (
                [describe(item, cls, _EXPECTED) for item in items] + _impossible_pairs(given) + problems
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


def _impossible_pairs(values: dict[str, Any]) -> list[str]:
    problems = []
    if values.get('window') == 'rebuild' and values.get('padding') == 'host':
        problems.append(
            "window: 'rebuild' cannot be combined with padding='host', which reproduces the host's shift; "
            "write window='shift' or padding='masked'"
        )
    if values.get('budget') is not None:
        problems += [
            f'budget: it cannot be combined with {name}={wrong!r}, which keeps what the host keeps; '
            f'write {name}={right!r} or leave budget out'
            for name, wrong, right in (('window', 'shift', 'auto'), ('padding', 'host', 'masked'))
            if values.get(name) == wrong
        ]
    if values.get('engine') in ('compile', 'cudagraph'):
        if values.get('padding') == 'host':
            problems.append(
                f"engine: {values['engine']!r} cannot be combined with padding='host', which repeats the "
                f"host's arithmetic operator by operator; write engine='eager' or padding='masked'"
            )
        if values.get('budget') is not None:
            problems.append(
                f'engine: {values["engine"]!r} cannot be combined with budget, whose layers keep different '
                f"numbers of tokens; write engine='eager' or leave budget out"
            )
    if values.get('enable_stats') is False and values.get('tensorboard') is True:
        problems.append(
            'tensorboard: True needs enable_stats=True; leave tensorboard out or write enable_stats=True'
        )
    return problems


def validation_mode_of(cfg: Any) -> Literal['store', 'model'] | None:
    """``cfg.cache_validation_mode``: what is compared with the old system, None for nothing; True means
    'store'.

    Raises:
        ValueError: it is something else.
    """
    mode = read_field(cfg, 'cache_validation_mode', False)
    if mode is None or mode is False:
        return None
    if mode is True:
        return 'store'
    if isinstance(mode, str) and mode in ('store', 'model'):
        return mode
    raise ValueError(
        f"cache_validation_mode={mode!r}: expected False, 'store' (the caches side by side; True means the "
        f"same) or 'model' (the models too)"
    )


_EXPECTED = {
    'validation_rate': 'a number in [0, 1]',
    'validation_atol': 'a number of at least 0 or None',
    'validation_rtol': 'a number of at least 0 or None',
    'validation_folder': 'a folder',
    'budget': 'a dict such as dict(ratio=0.25) or None',
    'max_bytes': 'an integer of at least 1 (bytes) or None',
    'root_slots': 'an integer of at least 1',
    'recurrent_slots': 'an integer of at least 1 or None',
}
