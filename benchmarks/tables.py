"""Tables of the documentation, rendered from the results files that the commands wrote.

    python benchmarks/tables.py

writes each table between its marks, `<!-- table NAME -->` and `<!-- end of table -->`, in the pages of
:data:`PAGES`. The files are in `benchmarks/results`: `planning*.json` of `benchmark_kv_cache.py --out`, and a
folder of rows for each `lzero-kv compare --out`, and what `studies/planning` writes and prints.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lzero_kv.cli.comparison import PLUGIN, SEARCH, STOCK, WHOLE, Comparison, mean_return, seconds
from lzero_kv.lightzero.inference.precision import REDUCED
from lzero_kv.sweep.intervals import difference
from lzero_kv.sweep.rows import read_rows
from lzero_kv.telemetry.table import markdown_table
from studies.planning import long_pong

PAGES = (ROOT / 'docs' / 'measurements.md', ROOT / 'benchmarks' / 'results.md')
RESULTS = ROOT / 'benchmarks' / 'results'
MARKED = re.compile(r'(<!-- table ([\w-]+) -->\n)(?:.*?\n)??(<!-- end of table -->)', re.DOTALL)

Cells = Sequence[Sequence[str]]
"""Rows of a table, its head first."""

SHAPES = {
    'atari': '2 layers, 768 wide, 50 simulations',
    'stack4': '4 layers, 768 wide, 50 simulations',
    'multitask': '8 layers, 768 wide, 50 simulations',
    'memory': '4 layers, 256 wide, 162 tokens, 50 simulations',
    'lunarlander': '4 layers, 256 wide, 50 simulations',
    'cartpole': '2 layers, 64 wide, 25 simulations',
}
NAMES = {'stock': 'stock', 'rebuild': 'default', 'shift': "`'shift'`", 'floor': 'floor'}
"""Of the contestants in the pages."""
ON_A_GPU = {
    'rebuild': 'default, eager',
    'shift': 'shift, eager',
    'rebuild graph': 'default, captured',
    'shift graph': 'shift, captured',
}
"""Of the contestants on a GPU, where they have another name than in the results file."""
PLANNING = 'planning.json'
PROCESSORS = {'AVX-512 and AMX': PLANNING, 'AVX2': 'planning_avx2.json'}
"""Results files of `benchmark_kv_cache.py` by what the processor had."""


def planning(file: str = PLANNING) -> Cells:
    """Environment steps: times, ratios and bytes of each shape, one row."""
    rows = [['shape', 'stock, ms', 'default', 'shift', 'floor', 'cache, MiB: stock', 'default']]
    for shape, found in _shapes(file).items():
        stock, *others = (_timed(found[name]) for name in NAMES)
        faster = [_faster(one) for one in others]
        size = [_mib(found[name]) for name in ('stock', 'rebuild')]
        rows.append([f'{shape}: {SHAPES[shape]}', _ms(stock), *faster, *size])
    return rows


def planning_details() -> Cells:
    """Environment steps: a row for each shape and cache."""
    head = ['shape', 'cache', 'step, ms', 'times as fast as stock', 'over the floor']
    rows = [[*head, 'root inference, times as fast', 'model, cache, tree, rest: % of time', 'cache, MiB']]
    for shape, found in _shapes().items():
        label = f'{shape}: {SHAPES[shape]}'
        for name, shown in NAMES.items():
            time = _timed(found[name])
            row = [label, shown, _ms(time), _faster(time), f'{time["over_floor"]:.2f}']
            rows.append(row + (['', '', ''] if name == 'floor' else _details(found[name])))
            label = ''
    return rows


def counts() -> Cells:
    """What one simulation does beside computing: a row for each shape and cache."""
    head = ['shape', 'cache', 'operators', 'host reads', 'allocations', 'MiB allocated', 'MiB moved']
    rows = [[*head, 'peak above cache, MiB', 'kept after the step, MiB']]
    for shape, found in _shapes().items():
        for name in ('stock', 'rebuild', 'shift'):
            whole = [
                found[name][f'{part}_per_simulation'] for part in ('operators', 'host_reads', 'allocations')
            ]
            sizes = [found[name][f'mib_{part}_per_simulation'] for part in ('allocated', 'moved')]
            sizes += [found[name][f'step_{part}_mib'] for part in ('peak', 'kept')]
            row = [f'{count:.0f}' for count in whole] + [f'{size:.1f}' for size in sizes]
            rows.append([shape if name == STOCK else '', NAMES[name], *row])
    return rows


def collection() -> Cells:
    """Environment steps per second of real collection."""
    found = _document(PLANNING)['collection']
    rows = [['environment steps per second', 'stock', 'default', "`'shift'`"]]
    for task, caches in found.items():
        rates = {name: f'{one["steps_per_second"]["median"]:.0f}' for name, one in caches.items()}
        faster = [
            f'{rates[name]} ({caches[name]["times_as_fast"]:.2f} times)' for name in ('rebuild', 'shift')
        ]
        rows.append([task, rates[STOCK], *faster])
    return rows


def compiled() -> Cells:
    """The compiled backend beside the eager one, in times as fast as stock."""
    names = 'rebuild', 'rebuild compiled', 'shift', 'shift compiled', 'floor'
    head = ['default, eager', 'default, compiled', "`'shift'`, eager", "`'shift'`, compiled", 'floor']
    return [['shape', *head]] + [
        [shape, *(_faster(_timed(found[name])) for name in names)]
        for shape, found in _shapes().items()
        if 'rebuild compiled' in found
    ]


def reanalysis() -> Cells:
    """Reanalysis of a batch of roots."""
    rows = [['shape', 'roots', 'simulations', 'stock, s', 'default', "`'shift'`"]]
    for shape, found in _document(PLANNING)['reanalysis'].items():
        faster = [
            f'{found["stock_s"] / found[f"{name}_s"]:.2g} times as fast' for name in ('rebuild', 'shift')
        ]
        rows.append(
            [shape, str(found['roots']), str(found['simulations']), f'{found["stock_s"]:.1f}', *faster]
        )
    return rows


GROWN = {
    'layers': 'layers',
    'environments': 'environments',
    'simulations': 'simulations',
    'context': 'tokens of a window',
    'pool': 'windows that the pool holds',
}
"""Sizes of `cache_growth.py` as the pages call them."""


def growth() -> Cells:
    """A simulation at the smallest and the largest value of each size."""
    names = 'stock', 'rebuild', 'shift'
    counted = {'operators_per_simulation': 0, 'mib_moved_per_simulation': 1, 'cache_mib': 1}
    heads = ["operators: stock, default, `'shift'`", 'MiB moved', 'cache, MiB']
    rows = [['size, from → to', 'stock: ms', 'default: ms', "`'shift'`: ms", *heads]]
    for size, values in _document('growth.json')['growth'].items():
        (first, smallest), *_, (last, largest) = values.items()
        ends = {name: (smallest[name], largest[name]) for name in names if name in smallest}
        times = [_moved(ends[name], 'simulation_ms', 1) if name in ends else '' for name in names]
        counts = [', '.join(_moved(pair, *of) for pair in ends.values()) for of in counted.items()]
        rows.append([f'{GROWN[size]}, {first} → {last}', *times, *counts])
    return rows


def _moved(ends: tuple[dict[str, Any], dict[str, Any]], of: str, digits: int) -> str:
    return ' → '.join(f'{end[of]:.{digits}f}' for end in ends)


def eviction() -> Cells:
    """Tokens rebuilt with less room than a search needs."""
    found = _document('eviction.json')
    policies = next(iter(next(iter(found.values()))['rebuilt'].values()))
    rows = [['shape, windows of a search', 'room', *policies]]
    for shape, numbers in found.items():
        label = f'{shape}, {numbers["windows"]}'
        for part, rebuilt in numbers['rebuilt'].items():
            rows.append([label, f'{part} %', *(f'{value:.1f}' for value in rebuilt.values())])
            label = ''
    return rows


def device_traffic() -> Cells:
    """What a simulation and a root inference ask of an emulated GPU."""
    asked = {
        'simulation': ('launches', 'replays', 'to_device', 'to_host', 'waits'),
        'root inference': ('launches', 'waits'),
    }
    head = ['shape', 'cache', 'a simulation: operators', 'graph replays', 'copies to the device', 'reads']
    rows = [[*head, 'waits', 'root inference: operators', 'waits']]
    for shape, caches in _document('device_traffic.json').items():
        for name, parts in caches.items():
            counts = [f'{parts[part][of]:.3g}' for part, names in asked.items() for of in names]
            rows.append([shape if name == STOCK else '', ON_A_GPU.get(name, name), *counts])
    return rows


def planning_gpu() -> Cells:
    """Environment steps on a GPU: times and what one simulation asks of it."""
    head = ['shape', 'cache', 'step, ms', 'x stock', 'simulation, ms', 'root inference, ms', 'kernels']
    rows = [[*head, 'launches', 'GPU busy, ms', 'reads', 'cache, MiB']]
    for shape, found in _shapes('planning_gpu.json').items():
        for name, numbers in found.items():
            time = _timed(numbers)
            row = [shape if name == STOCK else '', ON_A_GPU.get(name, name)]
            row += [f'{time["step_ms"]["median"]:.1f}', _faster(time)]
            rows.append(row + (_on_a_gpu(numbers, time) if 'simulation_ms' in time else [''] * 7))
    return rows


def planning_main() -> Cells:
    """Environment steps on LightZero's git main."""
    head = ['shape', 'step, ms: flag off', 'its flag on', 'this cache']
    head += ['this cache, times as fast as flag off', 'as its flag on']
    rows = [[*head, 'root inference, times as fast as flag off', 'as its flag on']]
    for shape, found in _shapes('planning_main.json').items():
        arms = [_timed(found[f'upstream{arm}']) for arm in ('', ' flag', ' rebuild')]
        steps, roots = ([arm[part]['median'] for arm in arms] for part in ('step_ms', 'root_inference_ms'))
        ratios = [f'{other / of[2]:.2f}' for of in (steps, roots) for other in of[:2]]
        rows.append([shape, *(f'{step:,.0f}' for step in steps), *ratios])
    return rows


def _on_a_gpu(numbers: dict[str, Any], time: dict[str, Any]) -> list[str]:
    kernels, launches, busy, reads = (
        numbers[f'{name}_per_simulation']
        for name in ('kernels', 'launches', 'device_busy_ms', 'device_to_host_copies')
    )
    times = [f'{time["simulation_ms"]:.2f}', f'{time["root_inference_ms"]["median"]:.1f}']
    counts = [f'{kernels:.0f}', f'{launches:.0f}', f'{busy:.2f}', f'{reads:.0f}']
    return [*times, *counts, f'{numbers["cache_mib"]:.1f}']


def fewer_bits() -> Cells:
    """Reduced precisions: times as fast as stock, exact windows."""
    rows = [['processor', 'shape', 'float32', *REDUCED]]
    return rows + [[*of, *_by_precision(found, 'rebuild')] for of, found in _reduced()]


def fewer_bits_details() -> Cells:
    """Reduced precisions: times as fast as stock with both windows, and what the default decides beside
    float32."""
    head = ['processor', 'shape', 'default: float32', *REDUCED, 'shift: float32', *REDUCED]
    rows = [[*head, f'same root action: {", ".join(REDUCED)}', f'visits, nats: {", ".join(REDUCED)}']]
    for of, found in _reduced():
        faster = [*_by_precision(found, 'rebuild'), *_by_precision(found, 'shift')]
        quality = [found.get(f'rebuild {bits}', {}).get('quality') for bits in REDUCED]
        same = ', '.join(f'{100 * one["root_actions"]:.0f} %' if one else '-' for one in quality)
        nats = ', '.join(f'{one["nats"]:.4f}' if one else '-' for one in quality)
        rows.append([*of, *faster, same, nats])
    return rows


def _reduced() -> list[tuple[tuple[str, str], dict[str, Any]]]:
    """Processor and shape, and what was measured there."""
    return [
        ((processor, shape), found)
        for processor, file in PROCESSORS.items()
        for shape, found in _shapes(file).items()
        if 'rebuild float16' in found
    ]


def _by_precision(found: dict[str, Any], window: str) -> list[str]:
    names = [window, *(f'{window} {bits}' for bits in REDUCED)]
    return [_faster(_timed(found[name])) if name in found else 'refused' for name in names]


def trained_model() -> Cells:
    """What a trained model decides in fewer bits."""
    found = _lines('trained_model.jsonl')
    clear, size = found[0]['clear_roots'], found[0]['value_size']
    head = ['', 'same most visited action', f'the same, of {clear} roots whose visits differ by more than 2']
    rows = [[*head, 'visits, nats', f'value error, values are {size:.1f}', 'mean return of eight episodes']]
    for one in found[1:]:
        same = [f'{100 * one[name]:.1f} %' for name in ('same_action', 'same_action_where_clear')]
        errors = [f'{one[name]:.2g}' for name in ('visits_nats', 'value_error')]
        returns = found[0]['returns'] if one['returns'] is None else one['returns']
        rows.append([one['precision'], *same, *errors, f'{statistics.mean(returns):.0f}'])
    return rows


def wrong_entries() -> Cells:
    """Returns of one model with each cache."""
    rows = [
        ['simulations, episodes', "LightZero's cache", "`'shift'`: its windows", 'default, exact windows']
    ]
    for one in _lines('wrong_entries.jsonl'):
        means, differences = one['means'], one['differences']
        cells = [
            '{:.1f}: {:.1f} [{:.1f}, {:.1f}]'.format(means[name], *differences[name])
            for name in ('shift', 'default')
        ]
        number = f'{one["simulations"]}, {len(one["returns"]["stock"])}'
        rows.append([number, f'{means["stock"]:.1f}', *cells])
    return rows


def wrong_entries_models() -> Cells:
    """Returns of several models with each cache at 200 simulations, and their mean differences."""
    found = _lines('wrong_entries_models.jsonl')
    rows = [['model', "LightZero's cache", "`'shift'`: its windows", 'default, exact windows']]
    for one in found:
        arm, seed = one['checkpoint'].split('/')[0].rsplit('_', 1)
        means = [f'{one["means"][name]:.1f}' for name in ('stock', 'shift', 'default')]
        rows.append([f'trained with {arm}, seed {seed}', *means])
    values = {name: [one['means'][name] for one in found] for name in ('stock', 'shift', 'default')}
    cells = []
    for name in ('shift', 'default'):
        estimate = difference(values[name], values['stock'])
        more = f'{estimate.value:.1f} [{estimate.low:.1f}, {estimate.high:.1f}] more'
        cells.append(f'{statistics.mean(values[name]):.1f}: {more}')
    rows.append([f'mean of {len(found)}', f'{statistics.mean(values["stock"]):.1f}', *cells])
    return rows


def whole_training(folder: str) -> Cells:
    """What `lzero-kv compare` printed."""
    return _comparison(folder).cells()


def each_seed(folder: str) -> Cells:
    """The pairs of a comparison."""
    found = _comparison(folder)
    head = ['seed', 'search: stock', PLUGIN, 'whole: stock', PLUGIN, f'whole, {PLUGIN} / {STOCK}']
    reach = found.until is not None
    rows = [[*head, 'environment steps: stock' if reach else 'return: stock', PLUGIN]]
    for pair in zip(found.stock, found.plugin, strict=True):
        search, whole = ([seconds(found.clock, part, row) for row in pair] for part in (SEARCH, WHOLE))
        times = [f'{value:.1f}' for value in (*search, *whole)]
        rows.append([str(pair[0]['seed']), *times, f'{whole[1] / whole[0]:.2f}'])
        rows[-1] += [_end(row) if reach else f'{mean_return(row):.1f}' for row in pair]
    return rows


def _end(row: dict[str, Any]) -> str:
    return f'{row["env_steps"]:,}' if row['reached'] else f'not by {row["env_steps"]:,}'


@cache
def _comparison(folder: str) -> Comparison:
    return Comparison.of(read_rows(RESULTS / folder)[1])


def _lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RESULTS / name).read_text(encoding='utf-8').splitlines()]


@cache
def _document(file: str) -> dict[str, Any]:
    return json.loads((RESULTS / file).read_text(encoding='utf-8'))


def _shapes(file: str = PLANNING) -> dict[str, dict[str, Any]]:
    found = _document(file)['shapes']
    return {shape: found[shape] for shape in SHAPES if shape in found}


def _timed(numbers: dict[str, Any]) -> dict[str, Any]:
    return numbers['threads']['1']


def _faster(time: dict[str, Any]) -> str:
    return f'{time["times_as_fast"]:.2f}'


def _ms(time: dict[str, Any]) -> str:
    return f'{time["step_ms"]["median"]:,.0f}'


def _mib(numbers: dict[str, Any]) -> str:
    return f'{numbers["cache_mib"]:.{0 if numbers["cache_mib"] >= 2 else 1}f}'


def _details(numbers: dict[str, Any]) -> list[str]:
    shares = ' / '.join(
        f'{100 * numbers["share_of_time"][part]:.0f}' for part in ('model', 'cache', 'tree', 'rest')
    )
    return [f'{_timed(numbers)["root_times_as_fast"]:.2f}', shares, _mib(numbers)]


TABLES: dict[str, Callable[[], Cells]] = {
    'planning': planning,
    'planning-details': planning_details,
    'planning-avx2': partial(planning, PROCESSORS['AVX2']),
    'planning-gpu': planning_gpu,
    'planning-main': planning_main,
    'counts': counts,
    'collection': collection,
    'compiled': compiled,
    'reanalysis': reanalysis,
    'growth': growth,
    'eviction': eviction,
    'device-traffic': device_traffic,
    'fewer-bits': fewer_bits,
    'fewer-bits-details': fewer_bits_details,
    'trained-model': trained_model,
    'wrong-entries': wrong_entries,
    'wrong-entries-models': wrong_entries_models,
    'training-cartpole': partial(whole_training, 'cartpole'),
    'seeds-cartpole': partial(each_seed, 'cartpole'),
    'training-cartpole_195': partial(whole_training, 'cartpole_195'),
    'seeds-cartpole_195': partial(each_seed, 'cartpole_195'),
    'training-cartpole_int8': partial(whole_training, 'cartpole_int8'),
    'seeds-cartpole_int8': partial(each_seed, 'cartpole_int8'),
    'training-lunarlander': partial(whole_training, 'lunarlander'),
    'seeds-lunarlander': partial(each_seed, 'lunarlander'),
    'training-simulations': partial(whole_training, 'simulations'),
    'seeds-simulations': partial(each_seed, 'simulations'),
    'training-pong': partial(whole_training, 'pong'),
    'training-pong_gpu': partial(whole_training, 'pong_gpu'),
    'training-cartpole_gpu': partial(whole_training, 'cartpole_gpu'),
    'long-pong': lambda: long_pong.cells(read_rows(RESULTS / 'long_pong')[1]),
}


def rendered(text: str) -> str:
    """A page with its marked tables as the results files have them.

    Raises:
        ValueError: it has a mark of no table.
    """

    def table(found: re.Match[str]) -> str:
        begin, name, end = found.groups()
        if name not in TABLES:
            raise ValueError(f'no table {name!r}: write one of {", ".join(TABLES)}')
        return f'{begin}{markdown_table(TABLES[name]())}\n{end}'

    return MARKED.sub(table, text)


def main() -> None:
    """Render the tables of all pages in place."""
    for page in PAGES:
        page.write_text(rendered(page.read_text(encoding='utf-8')), encoding='utf-8')


if __name__ == '__main__':
    main()
