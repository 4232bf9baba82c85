"""CAKE experiments in the words of their configuration: ``apply_cake_to_model`` and its keys."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError

from lzero_kv.llm.budget import PromptBudget
from lzero_kv.llm.families import FAMILIES, check_family
from lzero_kv.llm.switch import disable, enable
from lzero_kv.mistakes import Mistakes, describe

log = logging.getLogger(__name__)

CAKE_GAMMA = 200
"""``gamma`` of CAKE's own code."""

Ratio = Annotated[float, Field(gt=0, le=1)]
Budget = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Temperature = Annotated[float, Field(ge=0.05, le=100)]


class _Given(BaseModel):
    """Keys that were given; all mistakes are reported in one ValueError."""

    model_config = ConfigDict(frozen=True, extra='forbid', use_attribute_docstrings=True)

    @classmethod
    def read(cls, given: Any, name: str) -> Any:
        """A mapping as keys.

        Raises:
            TypeError: ``given`` is something else.
            ValueError: unknown keys or wrong values: one line for each, all at once.
        """
        if isinstance(given, cls):
            return given
        if not isinstance(given, Mapping):
            raise TypeError(f'{name} must be a dict, got {type(given).__name__}')
        try:
            return cls.model_validate(dict(given))
        except ValidationError as error:
            raise Mistakes(name, [describe(item, cls, _EXPECTED) for item in error.errors()]) from None


class LayerAnalysis(_Given):
    """``layer_analysis_configs``: what is looked at in each layer."""

    attention_pattern_analysis: StrictBool = False
    """Whether each layer's dispersion and shift are kept: ``cache.preferences``."""
    layer_importance_scoring: StrictBool = False
    """Whether each layer's importance is kept: ``cache.importance``."""
    dynamic_allocation: StrictBool = True
    """Whether budgets move while tokens are generated; False leaves them as the prompt made them."""


class CAKEExperimentConfig(_Given):
    """What a series of experiments compares."""

    cake_enabled: StrictBool = True
    """Whether CAKE is run at all; False takes a budget off the model, and sets none."""
    h2o_ratios: list[Ratio] = []
    """H2O's and HACE's ratios: heavy hitters and newest tokens, each such a part of the tokens."""
    layer_allocation_strategies: list[Literal['uniform', 'adaptive', 'attention_based']] = ['attention_based']
    """How CAKE divides the slots among the layers."""
    cache_budgets: list[Budget] = [0.25]
    """Parts of the tokens that are kept, up to 1; above 1 slots of a layer."""
    layer_analysis_configs: LayerAnalysis = LayerAnalysis()
    """What is looked at in each layer."""

    def budgets(self, specific: Mapping[str, Any] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        """Name and budget of every experiment: H2O and HACE at each ratio, CAKE with each strategy and
        budget.

        Arguments:
            specific: ``cake_model_specific_config``.
        """
        own = ModelSpecific.read(specific or {}, 'cake_model_specific_config')
        for ratio in self.h2o_ratios:
            h2o = dict(selection='h2o', allocation='uniform', sinks=0, heavy_ratio=ratio, recent_ratio=ratio)
            yield f'h2o {ratio:g}', h2o
            hace = dict(selection='hace', allocation='uniform', sinks=0, ratio=min(1.0, 2 * ratio))
            yield f'hace {ratio:g}', hace | dict(window=own.window_size, gamma=own.gamma)
        if self.cake_enabled:
            for strategy in self.layer_allocation_strategies:
                for budget in self.cache_budgets:
                    yield f'cake {strategy} {budget:g}', own.budget(strategy, budget)


class ModelSpecific(_Given):
    """``cake_model_specific_config``: parameters that CAKE chooses for each model."""

    window_size: Annotated[int, Field(ge=1, strict=True)] = 32
    """Newest tokens, always kept; their queries are read."""
    gamma: Annotated[float, Field(ge=0, allow_inf_nan=False)] = float(CAKE_GAMMA)
    """Weight of the variance in a token's score."""
    tau1: Temperature = 1.0
    """Temperature of the dispersion; read with ``attention_based``."""
    tau2: Temperature = 1.0
    """Temperature of the shift; read with ``attention_based``."""

    def budget(self, strategy: str, budget: float) -> dict[str, Any]:
        """The fields of a :class:`~lzero_kv.llm.budget.PromptBudget`; CAKE keeps no sinks."""
        size = dict(ratio=budget) if budget <= 1 else dict(tokens=int(budget))
        temperatures = dict(tau1=self.tau1, tau2=self.tau2) if strategy == 'attention_based' else {}
        own = dict(selection='cake', allocation=strategy, window=self.window_size, sinks=0, gamma=self.gamma)
        return own | size | temperatures


EXPERIMENT_CONFIG: dict[str, Any] = {
    'h2o_ratios': [0.1, 0.2, 0.3],
    'cake_enabled': True,
    'layer_allocation_strategies': ['uniform', 'adaptive', 'attention_based'],
    'cache_budgets': [0.2, 0.4, 0.6, 0.8],
    'layer_analysis_configs': {
        'attention_pattern_analysis': True,
        'layer_importance_scoring': True,
        'dynamic_allocation': True,
    },
}
"""A series of experiments; :meth:`CAKEExperimentConfig.budgets` lists them."""


class CAKEModelAdapter:
    """CAKE on a model, as :func:`apply_cake_to_model` puts it there.

    Arguments:
        model: a causal language model of transformers.
        model_config_hf: its configuration, or that as a dict.
        cake_experiment_config: keys of :class:`CAKEExperimentConfig`, with one strategy and one budget.
        cake_model_specific_config: keys of :class:`ModelSpecific`.

    Raises:
        TypeError, ValueError: a key or a model is impossible; nothing is changed.
    """

    supported_models: ClassVar[tuple[str, ...]] = tuple(FAMILIES)

    def __init__(
        self,
        model: Any,
        model_config_hf: Any,
        cake_experiment_config: CAKEExperimentConfig | Mapping[str, Any],
        cake_model_specific_config: Mapping[str, Any],
    ) -> None:
        check_family(model.config)
        _check_same_model(model.config, model_config_hf)
        self.model = model
        self.experiment = CAKEExperimentConfig.read(cake_experiment_config, 'cake_experiment_config')
        self.specific = ModelSpecific.read(cake_model_specific_config, 'cake_model_specific_config')
        strategy = _only(self.experiment.layer_allocation_strategies, 'layer_allocation_strategies')
        budget = _only(self.experiment.cache_budgets, 'cache_budgets')
        self.budget = PromptBudget.read(
            self.specific.budget(strategy, budget), 'cake_experiment_config and cake_model_specific_config'
        )

    def apply(self) -> Any:
        """Enable the budget; the model."""
        if not self.experiment.cake_enabled:
            return disable(self.model)
        budget, analysis = self.budget, self.experiment.layer_analysis_configs
        log.info(
            'CAKE on %s: %s, allocation %s, window %d, gamma %g (CAKE itself has %d), tau1 %g, tau2 %g%s',
            self.model.config.model_type,
            f'{budget.ratio:g} of the tokens' if budget.ratio else f'{budget.tokens} tokens a layer',
            budget.allocation,
            budget.window,
            budget.gamma,
            CAKE_GAMMA,
            self.specific.tau1,
            self.specific.tau2,
            '' if budget.allocation == 'attention_based' else f' (not read by {budget.allocation})',
        )
        return enable(
            self.model,
            budget,
            dynamic=analysis.dynamic_allocation,
            measure=analysis.attention_pattern_analysis or analysis.layer_importance_scoring,
        )

    def remove(self) -> Any:
        """Undo :meth:`apply`; the model."""
        return disable(self.model)


def apply_cake_to_model(
    model: Any,
    model_config_hf: Any,
    cake_experiment_config: CAKEExperimentConfig | Mapping[str, Any],
    cake_model_specific_config: Mapping[str, Any],
) -> Any:
    """Run every prompt of a model under CAKE, until :func:`remove_cake_from_model`.

    Arguments and errors as of :class:`CAKEModelAdapter`. Returns the model.
    """
    return CAKEModelAdapter(
        model, model_config_hf, cake_experiment_config, cake_model_specific_config
    ).apply()


def remove_cake_from_model(model: Any) -> Any:
    """Leave a model as it was before :func:`apply_cake_to_model`. Returns the model."""
    return disable(model)


def _only(given: list[Any], name: str) -> Any:
    if len(given) != 1:
        raise ValueError(
            f'{name} must hold one value for one model, got {given}; lzero-kv llm run compares several'
        )
    return given[0]


def _check_same_model(config: Any, given: Any) -> None:
    values = given if isinstance(given, Mapping) else given.to_dict()
    for name in ('model_type', 'num_hidden_layers', 'num_attention_heads', 'num_key_value_heads'):
        if name in values and values[name] != getattr(config, name, None):
            raise ValueError(
                f"model_config_hf must be the model's own configuration: {name} is "
                f'{getattr(config, name, None)!r} there, got {values[name]!r}'
            )


_EXPECTED = {
    'h2o_ratios': 'a list of numbers greater than 0 and at most 1',
    'cake_enabled': 'True or False',
    'layer_allocation_strategies': "a list of 'uniform', 'adaptive' and 'attention_based'",
    'cache_budgets': 'a list of numbers greater than 0: parts of the tokens up to 1, else slots of a layer',
    'layer_analysis_configs': 'a dict of attention_pattern_analysis, layer_importance_scoring and '
    'dynamic_allocation, each True or False',
    'attention_pattern_analysis': 'True or False',
    'layer_importance_scoring': 'True or False',
    'dynamic_allocation': 'True or False',
    'window_size': 'an integer of at least 1',
    'gamma': 'a number of at least 0',
    'tau1': 'a number in [0.05, 100]',
    'tau2': 'a number in [0.05, 100]',
}
