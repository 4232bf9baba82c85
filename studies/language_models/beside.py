"""The grid of a sweep beside kvpress on the same documents: tables and a picture.

    python -m studies.language_models.beside --folder FOLDER --kvpress FILE

FOLDER holds the rows of `lzero-kv llm run --grid studies/language_models/grid.toml --out FOLDER`, FILE
those of `studies/language_models/kvpress_rows.py`. Writes beside.md and beside.png to FOLDER.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lzero_kv.sweep.intervals import mean, quotient
from lzero_kv.sweep.rows import read_rows

OURS = {
    'hace attention_based': ('#aa3377', '-o'),
    'h2o attention_based': ('#0072b2', '-o'),
    'cake attention_based': ('#d55e00', '-o'),
    "cake attention_based, CAKE's own window": ('#d55e00', ':o'),
    "h2o uniform, H2O's own": ('#0072b2', ':o'),
    'kvpress SnapKV': ('#009e73', '--s'),
    'kvpress PyramidKV': ('#66ccee', '--s'),
    'kvpress ExpectedAttention': ('#ccbb44', '--s'),
    'kvpress StreamingLLM': ('#999999', '--s'),
}
"""Lines of the picture."""
Kls = dict[tuple[str, float], dict[str, float]]
"""KL of each document, by method and ratio."""


def main(folder: Path, kvpress: Path) -> None:
    """Write the tables and the picture."""
    kls = _ours(read_rows(folder)[1])
    for line in kvpress.read_text(encoding='utf-8').splitlines():
        row = json.loads(line)
        kls.setdefault((f'kvpress {row["method"]}', row['ratio']), {})[row['document']] = row['kl']
    ratios = sorted({ratio for _, ratio in kls}, reverse=True)
    (folder / 'beside.md').write_text('\n'.join(_tables(kls, ratios)) + '\n', encoding='utf-8')
    _draw(kls, ratios, folder / 'beside.png')


def _ours(rows: list[dict[str, Any]]) -> Kls:
    kls: Kls = {}
    for row in rows:
        if row['algorithm'] != 'full':
            kls.setdefault((_line(row), row['ratio']), {})[row['document']] = row['kl']
    return kls


def _line(row: dict[str, Any]) -> str:
    name = f'{row["algorithm"]} {row["allocation"]}'
    if row['options'].get('mix') == 0.5:
        return f'{name}, mix=0.5'
    if row['options'].get('window') != 32:
        return name
    return f'{name}, ' + ("CAKE's own window" if row['algorithm'] == 'cake' else "H2O's own")


def _tables(kls: Kls, ratios: list[float]) -> Iterator[str]:
    yield f'| KL, nats per token | {" | ".join(f"{ratio:g}" for ratio in ratios)} |'
    yield '| --- |' + ' --- |' * len(ratios)
    for name in dict.fromkeys(name for name, _ in kls):
        cells = [mean(list(kls[name, ratio].values())) for ratio in ratios]
        said = ' | '.join(f'{one.value:.4f} [{one.low:.4f}, {one.high:.4f}]' for one in cells)
        yield f'| {name} | {said} |'
    yield ''
    for ratio in ratios:
        yield from _against(kls, ratio)


def _against(kls: Kls, ratio: float) -> Iterator[str]:
    """The default beside every other method, document by document."""
    own = kls['hace attention_based', ratio]
    yield f'| at {ratio:g} | KL / that of hace attention_based | hace is lower in |'
    yield '| --- | --- | --- |'
    for name in dict.fromkeys(name for name, _ in kls):
        other = kls[name, ratio]
        if other is own:
            continue
        names = sorted(own.keys() & other.keys())
        mine, theirs = (np.array([some[document] for document in names]) for some in (own, other))
        one = quotient(theirs, mine)
        yield (
            f'| {name} | {one.value:.2f} [{one.low:.2f}, {one.high:.2f}] | '
            f'{int((mine < theirs).sum())} of {len(names)} |'
        )
    yield ''


def _draw(kls: Kls, ratios: list[float], path: Path) -> None:
    figure = Figure(figsize=(7.4, 4.6), layout='constrained')
    FigureCanvasAgg(figure)
    panel = figure.add_subplot()
    for place, (name, (colour, style)) in enumerate(OURS.items()):
        estimates = [mean(list(kls[name, ratio].values())) for ratio in ratios]
        beside = 2 ** (0.03 * (place - len(OURS) / 2))
        panel.errorbar(
            [100 * ratio * beside for ratio in ratios],
            [one.value for one in estimates],
            np.array([[one.value - one.low, one.high - one.value] for one in estimates]).T,
            fmt=style, color=colour, label=name, markersize=4, lw=1.1, elinewidth=0.7,
        )  # fmt: skip
    panel.set_xscale('log', base=2)
    panel.set_yscale('log')
    panel.set_xticks([100 * ratio for ratio in ratios], [f'{100 * ratio:g}' for ratio in ratios])
    panel.minorticks_off()
    ticks = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
    panel.set_yticks(ticks, [f'{tick:g}' for tick in ticks])
    panel.grid(alpha=0.3, axis='y')
    panel.set_xlabel('tokens kept, % of the prompt')
    panel.set_ylabel('KL to the full cache, nats per token')
    panel.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)


if __name__ == '__main__':
    tyro.cli(main)
