"""The Custom Scalars page, and the text that explains the metrics beside it."""

from __future__ import annotations

from lzero_kv.telemetry.metrics import (
    BUDGET_CHARTS,
    BUDGET_HISTOGRAMS,
    BUDGET_METRICS,
    CHARTS,
    HISTOGRAMS,
    LAYER_PREFIX,
    METRICS,
    POOLS,
    RANK_METRICS,
    VALIDATION,
    VALIDATION_CHARTS,
    VALIDATION_METRICS,
    Axis,
    Kind,
)

LAYOUT_TITLES: dict[Axis, str] = {
    Axis.ENV_STEP: 'KV cache by environment step',
    Axis.TRAIN_ITER: 'KV cache by training iteration',
}


def dashboard_layout(*, validation: bool = False, budget: bool = False) -> dict[str, dict[str, list[object]]]:
    """Return the layout of the Custom Scalars page, as `SummaryWriter.add_custom_scalars` takes it.

    Args:
        validation: whether the charts of the validation follow those of the pools.
        budget: whether those of the layer budgets do.

    TensorBoard matches an entry as a regular expression against the beginning of a tag. One closed expression
    per chart draws whichever pools report, and a pool that never reports is no missing tag.
    """
    layout: dict[str, dict[str, list[object]]] = {}
    for axis, title in LAYOUT_TITLES.items():
        layout[title] = {
            chart.heading: ['Multiline', [f'{axis.value}/({"|".join(chart.pools)})/{chart.metric}$']]
            for chart in CHARTS
        }
        for chart in VALIDATION_CHARTS if validation else ():
            entry = f'{axis.value}/{VALIDATION}/({"|".join(chart.metrics)})$'
            layout[title][chart.heading] = ['Multiline', [entry]]
        for chart in BUDGET_CHARTS if budget else ():
            entry = f'{axis.value}/{LAYER_PREFIX}[0-9]+/{chart.metric}$'
            layout[title][chart.title] = ['Multiline', [entry]]
    return layout


def explanation(*, validation: bool = False, budget: bool = False, ranks: bool = False) -> str:
    """Return a Markdown table that says what each metric, pool and histogram means, and, with `validation`,
    a second one of its metrics; likewise with `budget`. With `ranks` the first has RANK_METRICS too.
    """
    kinds = {
        Kind.COUNTER: 'since the previous point',
        Kind.GAUGE: 'at this moment',
        Kind.RATIO: 'since the previous point',
    }
    lines = ['| metric | unit | value | meaning |', '|---|---|---|---|']
    metrics = [*METRICS.values(), *(RANK_METRICS.values() if ranks else ())]
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
