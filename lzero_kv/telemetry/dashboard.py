"""The Custom Scalars page, and the text that explains the metrics beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lzero_kv.telemetry.metrics import (
    BUDGET_CHARTS,
    BUDGET_HISTOGRAMS,
    BUDGET_METRICS,
    CHARTS,
    HISTOGRAMS,
    LAYER_PREFIX,
    METRICS,
    POOLS,
    PREFIX,
    RANK_METRICS,
    SPEED_CHARTS,
    SPEED_METRICS,
    VALIDATION,
    VALIDATION_CHARTS,
    VALIDATION_METRICS,
    Kind,
    LinesChart,
)

MOVING, STEADY = 'KV cache', 'KV cache: constant in a healthy training'


def dashboard_layout(*, validation: bool = False, budget: bool = False) -> dict[str, dict[str, list[object]]]:
    """Return the layout of the Custom Scalars page, as `SummaryWriter.add_custom_scalars` takes it: what
    moves first, what is constant in a healthy training in a group of its own.

    Args:
        validation: whether the charts of the validation follow those of the pools.
        budget: whether those of the layer budgets do.

    TensorBoard matches an entry as a regular expression against the beginning of a tag. One closed expression
    per chart draws whichever pools report, and a pool that never reports is no missing tag.
    """
    charts = (*SPEED_CHARTS, *CHARTS, *(VALIDATION_CHARTS if validation else ()))
    layout: dict[str, dict[str, list[object]]] = {MOVING: {}, STEADY: {}}
    for chart in charts:
        names = chart.metrics if isinstance(chart, LinesChart) else (chart.metric,)
        places = (chart.section,) if isinstance(chart, LinesChart) else chart.pools
        layout[STEADY if chart.steady else MOVING][chart.heading] = _lines(_any(places), _any(names))
    for chart in BUDGET_CHARTS if budget else ():
        layout[MOVING][chart.title] = _lines(f'{LAYER_PREFIX}[0-9]+', chart.metric)
    return layout


def _lines(place: str, metric: str) -> list[object]:
    return ['Multiline', [f'{PREFIX}/{place}/{metric}$']]


def _any(names: Sequence[str]) -> str:
    return f'({"|".join(names)})' if len(names) > 1 else names[0]


def explanation(
    *,
    validation: bool = False,
    budget: bool = False,
    ranks: bool = False,
    choices: Mapping[str, object] | None = None,
) -> str:
    """Return Markdown tables: the configuration of the cache (``choices``), what each metric, pool and
    histogram means, and, with `validation` or `budget`, further metrics. With `ranks` RANK_METRICS too.
    """
    kinds = {
        Kind.COUNTER: 'since the previous point',
        Kind.GAUGE: 'at this moment',
        Kind.RATIO: 'since the previous point',
    }
    lines = ['| option of kv_cache | value |', '|---|---|'] if choices else []
    lines += [f'| {name} | {value} |' for name, value in (choices or {}).items()]
    lines += ['', '| metric | unit | value | meaning |', '|---|---|---|---|']
    metrics = [*SPEED_METRICS.values(), *METRICS.values(), *(RANK_METRICS.values() if ranks else ())]
    lines += [f'| {m.name} | {m.unit.value} | {kinds[m.kind]} | {m.sentence} |' for m in metrics]
    lines += [
        f'| {name} | histogram | since the previous point | {text} |' for name, text in HISTOGRAMS.items()
    ]
    lines += ['', '| pool | meaning |', '|---|---|']
    lines += [f'| {name} | {text} |' for name, text in POOLS.items()]
    if validation:
        lines += ['', f'| {VALIDATION} | unit | value | meaning |', '|---|---|---|---|']
        lines += [
            f'| {m.name} | {m.unit.value} | {kinds[m.kind]} | {m.sentence} |'
            for m in VALIDATION_METRICS.values()
        ]
    if budget:
        lines += ['', '| each layer | unit | value | meaning |', '|---|---|---|---|']
        lines += [
            f'| {m.name} | {m.unit.value} | {kinds[m.kind]} | {m.sentence} |' for m in BUDGET_METRICS.values()
        ]
        lines += [
            f'| {name} | histogram | at this moment | {text} |' for name, text in BUDGET_HISTOGRAMS.items()
        ]
    return '\n'.join(lines)
