"""What may be chosen about layer budgets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError, model_validator

from lzero_kv.budget.allocation import ALLOCATIONS, Allocation
from lzero_kv.budget.choices import impossible_choices, parameters_of
from lzero_kv.budget.selection import SELECTIONS, Selection
from lzero_kv.mistakes import Mistakes, describe

Natural = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[int, Field(strict=True, ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Method = TypeVar('Method')
INTERVAL = 8
"""Single tokens between two choices, where nothing else is asked for."""


class Sizes(NamedTuple):
    """Numbers of tokens that follow from a :class:`BudgetConfig` for one model."""

    total: int
    """Slots of all layers together, also where that is more than there are tokens."""
    window: int
    """Newest tokens, kept in every layer."""
    sinks: int
    """First tokens, kept in every layer."""
    minimum: int
    """Other tokens that a layer keeps at least."""
    step: int
    """Tokens that are kept or dropped together."""


class BudgetConfig(BaseModel):
    """How many tokens each layer keeps, and which. Frozen; every mistake is reported in one ValueError."""

    model_config = ConfigDict(
        frozen=True, extra='forbid', use_attribute_docstrings=True, validate_default=True
    )
    hybrid: ClassVar[Mapping[str, float]] = {}
    """Of selection='hace' with strategy='hybrid', where nothing else is given."""

    ratio: Share | None = None
    """Slots as a part of all tokens; rounded to the nearest number for all layers together."""
    tokens: Positive | None = None
    """Slots of a layer, in the mean over the layers; 1024 in the experiments of CAKE."""
    allocation: str = 'attention_based'
    """How the slots are divided among the layers: one of ALLOCATIONS."""
    selection: str = 'cake'
    """Which tokens stay: one of SELECTIONS."""
    window: Positive = 32
    """Newest tokens, always kept; their queries are the ones whose attention is read."""
    sinks: Natural = 0
    """First tokens, always kept."""
    minimum: Natural = 1
    """Tokens besides window and sinks that every layer keeps, as far as the slots suffice."""
    step: Positive = 1
    """Tokens that are kept or dropped together; 2 keeps whole pairs of observation and action."""
    per_head: StrictBool = True
    """Whether every key-value head keeps tokens of its own; False: all heads of a layer keep the same."""
    beta: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    """'adaptive': the first layer's share divided by the last one's, on a straight line; None for weights L,
    L - 1, ..., 1. 'pyramid' is 20."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 1.0
    """'attention_based': part of the weights that follows the attention, the rest is uniform; 1 is CAKE."""
    tau1: Annotated[float, Field(ge=0.05, le=100)] = 1.0
    """'attention_based': temperature of the dispersion."""
    tau2: Annotated[float, Field(ge=0.05, le=100)] = 1.0
    """'attention_based': temperature of the shift."""
    preference: Literal['normal', 'reverse_disp', 'reverse'] = 'normal'
    """'attention_based': H V, V / H or 1 / (H V)."""
    heavy_ratio: Share | None = None
    """'h2o': tokens with the largest accumulated attention, as a part of the context, rounded down but at
    least one; with recent_ratio in the place of ratio, tokens and window. H2O's own are 0.1, 0.2 and 0.3."""
    recent_ratio: Share | None = None
    """'h2o': newest tokens as a part of the context, rounded down but at least one."""
    rho: Annotated[float, Field(gt=0, le=1)] | None = None
    """'h2o', 'hace': factor of the accumulated attention at each query; None for 1, and for 0.95 with
    strategy='time_decay'."""
    gamma: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 200.0
    """'cake', 'hace': weight of the variance over the queries."""
    kernel: Positive = 5
    """'snapkv', 'cake', 'hace': neighbours in a pool, an odd number."""
    strategy: Literal['attention', 'time_decay', 'hybrid'] = 'hybrid'
    """'hace': accumulated attention, the same with rho < 1, or mixed with the score of 'cake'."""
    mix: Annotated[float, Field(ge=0, le=1)] | None = None
    """'hace' with strategy='hybrid': part of the accumulated attention in the score; None for 0.5."""
    theta: Annotated[float, Field(ge=0, le=1)] = 0.0
    """'hace': scores under theta times the largest go first, the oldest of them before the others."""

    @model_validator(mode='before')
    @classmethod
    def _complete_hybrid(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        chosen = cls._defaults() | dict(given)
        hybrid = chosen['selection'] == 'hace' and chosen['strategy'] == 'hybrid'
        return {**cls.hybrid, **given} if hybrid else given

    @model_validator(mode='after')
    def _refuse_impossible_choices(self) -> BudgetConfig:
        if problems := impossible_choices(
            {name: getattr(self, name) for name in self.model_fields_set}, self._defaults()
        ):
            raise ValueError('; '.join(problems))
        return self

    @classmethod
    def read(cls, given: Self | Mapping[str, Any], name: str = 'budget') -> Self:
        """A mapping as a config.

        Raises:
            TypeError: ``given`` is something else.
            ValueError: unknown names, wrong values or impossible choices: one line for each, all at once.
        """
        if isinstance(given, cls):
            return given
        if not isinstance(given, Mapping):
            raise TypeError(f'{name} must be a dict such as dict(ratio=0.25), got {type(given).__name__}')
        values = dict(given)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            # a wrong field keeps the model's own check from looking at the choices
            items = [item for item in error.errors() if item['loc']]
        wrong = {item['loc'][0] for item in items}
        sound = {field: value for field, value in values.items() if field not in wrong}
        problems = [describe(item, cls, _EXPECTED) for item in items]
        raise Mistakes(name, problems + impossible_choices(sound, cls._defaults(), unsure=wrong))

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        return {name: field.default for name, field in cls.model_fields.items()}

    def interval(self, wanted: int) -> int:
        """Single tokens between two choices: ``wanted``, at most the whole steps that window and sinks leave
        of :attr:`tokens`, at least 1."""
        if self.tokens is None:
            return wanted
        steps = (self.tokens - self.window - self.sinks) // self.step
        return max(1, min(wanted, steps * self.step))

    def sizes(self, layers: int, context: int, interval: int = 0) -> Sizes:
        """The numbers of tokens for a model.

        Arguments:
            layers: layers of the model.
            context: tokens that a layer would hold without a budget: of a prompt, or of a full window.
            interval: single tokens between two choices, for which every layer leaves room.

        Raises:
            ValueError: the slots do not hold what is always kept.
        """
        sizes, needed = self._sizes(context, [context] * layers, interval)
        if sizes.total < needed:
            heavy = self.heavy_ratio is not None
            name, part = ('heavy_ratio', layers * sizes.minimum) if heavy else ('ratio', needed)
            enough = math.ceil(Fraction(1000 * part, layers * context)) / 1000
            of = 'a layer' if layers == 1 else f'{layers} layers'
            raise ValueError(
                f'window={sizes.window}, sinks={self.sinks} and minimum={sizes.minimum} of {of} need '
                f'{needed} slots, the budget for {context} tokens has {sizes.total}; write '
                f'{name}={enough} or more, or lower window or sinks'
            )
        return sizes

    def sizes_at(self, seen: int, contexts: Sequence[int], interval: int) -> Sizes:
        """The numbers of tokens for a sequence as long as it is now: always enough for what is always kept.

        Arguments:
            seen: tokens of the sequence.
            contexts: tokens that each layer would hold of them without a budget.
            interval: as of :meth:`sizes`.
        """
        sizes, needed = self._sizes(seen, contexts, interval)
        return sizes._replace(total=max(sizes.total, needed))

    def _sizes(self, seen: int, contexts: Sequence[int], interval: int) -> tuple[Sizes, int]:
        """Numbers of tokens, and the slots that are needed at least."""
        # the tokens between two choices come in whole steps of slots
        between = -(-(interval - 1) // self.step) * self.step
        window, minimum = self.window, max(self.minimum, interval, between)
        layers, full = len(contexts), sum(contexts)
        if self.heavy_ratio is not None and self.recent_ratio is not None:
            window = max(1, math.floor(_exact(self.recent_ratio) * seen))
            heavy = max(1, math.floor(_exact(self.heavy_ratio) * seen))
            total = layers * (window + self.sinks + heavy)
        elif self.ratio is not None:
            total = math.floor(_exact(self.ratio) * full + Fraction(1, 2))
        else:
            total = layers * self.tokens if self.tokens else full
        needed = sum(min(context, window + self.sinks + minimum) for context in contexts)
        return Sizes(total, window, self.sinks, minimum, self.step), needed

    def allocator(self) -> Allocation:
        """The allocation with its parameters."""
        return _build(ALLOCATIONS[self.allocation], self)

    def selector(self) -> Selection:
        """The selection with its parameters."""
        return _build(SELECTIONS[self.selection], self)


def _exact(value: float) -> Fraction:
    """The decimal number that was written: 0.3 of 10 tokens are 3, which the nearest binary number misses."""
    return Fraction(repr(value))


def _build(method: type[Method], config: BudgetConfig) -> Method:
    return method(**{name: getattr(config, name) for name in parameters_of(method)})


_EXPECTED = {
    'ratio': 'a number greater than 0 and at most 1',
    'heavy_ratio': 'a number greater than 0 and at most 1',
    'recent_ratio': 'a number greater than 0 and at most 1',
    'tokens': 'an integer of at least 1 or None',
    'window': 'an integer of at least 1',
    'step': 'an integer of at least 1',
    'kernel': 'an odd integer of at least 1',
    'sinks': 'an integer of at least 0',
    'minimum': 'an integer of at least 0',
    'per_head': 'True or False',
    'beta': 'a number of at least 1 or None',
    'alpha': 'a number in [0, 1]',
    'tau1': 'a number in [0.05, 100]',
    'tau2': 'a number in [0.05, 100]',
    'rho': 'a number greater than 0 and at most 1, or None',
    'gamma': 'a number of at least 0',
    'mix': 'a number in [0, 1] or None',
    'theta': 'a number in [0, 1]',
    'smoothing': 'a number in [0, 1)',
    'hysteresis': 'a number in [0, 1]',
    'allocation': 'a name',
    'selection': 'a name',
}
