"""The report of a sweep: numbers from the rows alone, the page, its pictures, TensorBoard scalars."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lzero_kv.cli import main
from lzero_kv.llm.experiment.report import SCALARS, best_sentences, in_order, page, tables, write_scalars
from lzero_kv.llm.experiment.summary import Summary, pareto_front, summaries
from lzero_kv.sweep.rows import ROWS
from tests.llm.experiment import drawn

PICTURES = ['kept.png', 'layers.png', 'quality.png', 'speed.png']


def of(found: list[Summary], task: str, method: str) -> Summary:
    return next(one for one in found if (one.task, one.method) == (task, method))


def rows_of(rows: list[dict], task: str, method: str) -> list[dict]:
    return [row for row in rows if (row['task'], row['method']) == (task, method)]


def text_of(found: list[Summary]) -> str:
    console = Console(width=132, record=True, quiet=True)
    with console.capture() as captured:
        console.quiet = False
        for table in tables(found):
            console.print(table)
    return captured.get()


@pytest.fixture(scope='module')
def rows() -> list[dict]:
    random = np.random.default_rng(4)
    return [*drawn.sweep(), *(row for number in range(3) for row in drawn.timed(f'long {number}', random))]


@pytest.fixture(scope='module')
def found(rows: list[dict]) -> list[Summary]:
    return summaries(rows)


def test_numbers_are_means_over_the_documents(rows: list[dict], found: list[Summary]) -> None:
    name = 'cake attention_based 0.25'
    one, made = of(found, 'needle_after', name), rows_of(rows, 'needle_after', name)
    full = rows_of(rows, 'needle_after', 'full')
    assert one.documents == len(made) == 8
    for measure in ('kl', 'score', 'agreement'):
        assert getattr(one, measure).value == pytest.approx(np.mean([row[measure] for row in made]))
    logarithms = [math.log(row['perplexity']) for row in made]
    assert one.perplexity.value == pytest.approx(math.exp(np.mean(logarithms)))
    assert one.relative.value == pytest.approx(
        100 * sum(row['score'] for row in made) / sum(row['score'] for row in full)
    )
    assert one.memory.part == pytest.approx(0.26, abs=1e-3)
    assert one.memory.peak_part == pytest.approx(0.25 + 1 / drawn.LAYERS)
    assert one.memory.shares == pytest.approx(np.mean([row['slots'] for row in made], 0) / drawn.TOKENS)
    assert one.memory.kept.shape == (drawn.LAYERS, drawn.BINS)
    assert (one.first_token, one.next_token) == (None, None)


def test_intervals_hold_the_mean_and_narrow_with_more_documents() -> None:
    few, many = (of(summaries(drawn.sweep(count)), 'needle', 'h2o uniform 0.125') for count in (6, 60))
    for one in (few, many):
        assert one.kl.low < one.kl.value < one.kl.high
    assert many.kl.high - many.kl.low < 0.6 * (few.kl.high - few.kl.low)


def test_the_full_cache_stands_first_and_is_its_own_control(found: list[Summary]) -> None:
    for task in ('continuation', 'needle', 'needle_after', 'speed'):
        assert [one.method for one in found if one.task == task] == [one.name for one in drawn.METHODS]
    control = of(found, 'needle', 'full')
    assert (control.kl.value, control.relative.value, control.memory.part) == (0.0, 100.0, 1.0)


def test_a_method_given_by_its_parts_has_the_ratio_that_it_holds() -> None:
    given = [dict(row, ratio=None) if row['algorithm'] == 'h2o' else row for row in drawn.sweep(2)]
    assert of(summaries(given), 'needle', 'h2o uniform 0.25').ratio == 0.25


def test_documents_without_the_control_are_refused(rows: list[dict]) -> None:
    without = [row for row in rows if (row['method'], row['document']) != ('full', 'needle 3')]
    with pytest.raises(ValueError, match=r"task needle has no rows of the full cache for \['needle 3'\]"):
        summaries(without)


def test_a_number_that_is_not_finite_is_refused_by_name(rows: list[dict]) -> None:
    broken = [dict(row, kl=math.nan) if row['document'] == 'needle 3' else row for row in rows]
    with pytest.raises(ValueError, match='kl of full on needle needle 3 is not finite: the model overflowed'):
        summaries(broken)


def test_tables_show_what_a_task_measures(found: list[Summary]) -> None:
    text = text_of(found)
    one = of(found, 'needle', 'hace uniform 0.125')
    assert 'needle: 8 documents, full cache 4.5 MiB' in text
    line = next(line for line in text.partition('needle: ')[2].splitlines() if one.method in line)
    assert line.split()[:4] == ['hace', 'uniform', '0.125', f'{one.score.value:.3f}']
    assert f'{one.kl.value:.4f} [{one.kl.low:.4f}, {one.kl.high:.4f}]' in line
    assert re.search(r'13\.5 % +29\.2 %$', line.rstrip())
    speed = text.partition('speed: 3 documents')[2]
    assert 'KL' not in speed
    assert f'{1000 * of(found, "speed", "full").next_token.value:.1f} ms' in speed
    assert 'next token' not in text.partition('speed: ')[0]


def test_the_best_method_is_named_with_those_that_are_as_good(rows: list[dict]) -> None:
    scored = [row for row in rows if 'kl' in row]
    worse = [dict(row, kl=row['kl'] * (1 if row['algorithm'] in ('cake', 'hace') else 9)) for row in scored]
    found = summaries(worse)
    line = best_sentences(found)[0].splitlines()[1]
    named = re.match(r'- ratio 0.5: lowest KL [\d.]+ \[.*\] with (.*) \(not told apart from (.*)\);', line)
    assert named is not None
    assert sorted(named.groups()) == ['cake attention_based 0.5', 'hace uniform 0.5']
    clear = [dict(row, kl=row['kl'] / 5) if row['algorithm'] == 'hace' else row for row in worse]
    assert 'with hace uniform 0.5;' in best_sentences(summaries(clear))[0]


def test_the_best_score_is_named_with_those_that_are_as_good(rows: list[dict]) -> None:
    """Scores that are equal document by document, and none where no method has any."""
    scores = {'cake': 1.0, 'hace': 1.0, 'full': 1.0, 'h2o': 0.0, 'snapkv': 0.0, 'streaming': 0.0}
    half = [dict(row, score=scores[row['algorithm']]) for row in rows if row['task'] == 'needle']
    for line in best_sentences(summaries(half))[0].splitlines()[1:]:
        named = re.search(
            r'; best score 100 % of full with (\w+) .* \(not told apart from (\w+) [^,]*\)$', line
        )
        assert named is not None and set(named.groups()) == {'cake', 'hace'}
    none = [dict(row, score=float(row['algorithm'] == 'full')) for row in half]
    assert 'best score' not in best_sentences(summaries(none))[0]


def test_a_task_that_the_full_cache_cannot_do_says_so(rows: list[dict]) -> None:
    guessed = [dict(row, chance=0.97) if row['task'] == 'needle' else row for row in rows]
    continuation, needle = best_sentences(summaries(guessed))[:2]
    assert 'a guess 0.97: the scores say nothing, the model cannot do this task' in needle
    assert 'cannot' not in continuation


def test_the_page_has_a_table_for_each_task_and_all_settings(found: list[Summary]) -> None:
    header = {
        'model': 'a|b',
        'seed': 5,
        'data': {'text.txt': '01ab'},
        'methods': [],
        'versions': {'torch': '2'},
    }
    text = page(header, found, {'quality.png': 'Quality against bytes'}, 'folder')
    one = of(found, 'continuation', 'snapkv uniform 0.5')
    row = next(line for line in text.splitlines() if line.startswith(f'| {one.method} |'))
    assert f'| {one.kl.value:.4f} [{one.kl.low:.4f}, {one.kl.high:.4f}] |' in row
    assert text.count('\n## ') == 4 + 1 + 1
    assert '![Quality against bytes](quality.png)' in text
    for line in (
        '| model | a\\|b |',
        '| data | text.txt 01ab |',
        '| torch | 2 |',
        'lzero-kv llm report folder',
    ):
        assert line in text


def test_tasks_stand_in_the_order_in_which_they_were_asked_for(found: list[Summary]) -> None:
    mixed = [one for task in ('speed', 'needle_after', 'continuation') for one in found if one.task == task]
    named = [replace(one, task='needle/story') if one.task == 'needle_after' else one for one in mixed]
    ordered = in_order(named, ['continuation', 'needle'])
    assert list(dict.fromkeys(one.task for one in ordered)) == ['continuation', 'needle/story', 'speed']
    assert [one.method for one in ordered[:16]] == [one.name for one in drawn.METHODS]


def test_pareto_front_is_what_nothing_beats() -> None:
    points = [(0.5, 0.02), (0.25, 0.05), (0.25, 0.04), (0.5, 0.03), (0.125, 0.2), (0.6, 0.02)]
    assert pareto_front(points) == [4, 2, 0]


def test_the_command_writes_page_pictures_and_scalars(
    rows: list[dict], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = drawn.write(tmp_path / 'sweep', rows)
    assert main(['llm', 'report', str(folder)]) == 0
    shown = capsys.readouterr().out
    assert shown.rstrip().endswith(f'report: {folder / "report.md"}')
    assert shown.index('full ') < shown.index('cake attention_based 0.5')
    assert sorted(path.name for path in folder.glob('*.png')) == PICTURES
    text = (folder / 'report.md').read_text()
    assert sorted(re.findall(r'!\[.*\]\((.*)\)', text)) == PICTURES
    for name in PICTURES:
        picture = imread(folder / name)
        assert min(picture.shape[:2]) > 300
        colours = (255 * picture).round().astype(np.uint8).view(np.uint32)  # of four channels one number
        assert len(np.unique(colours)) > 20


def test_the_full_cache_alone_says_what_the_model_can_do(rows: list[dict], tmp_path: Path) -> None:
    folder = drawn.write(tmp_path, [dict(row, chance=0.25) for row in rows if row['method'] == 'full'])
    assert main(['llm', 'report', str(folder)]) == 0
    needle = of(summaries(rows), 'needle', 'full').score.value
    text = (folder / 'report.md').read_text()
    assert f'**needle**, full cache {needle:.2f}, a guess 0.25\n' in text
    assert re.findall(r'!\[.*\]\((.*)\)', text) == ['speed.png']


def scalars(folder: Path, run: str) -> dict[str, list[tuple[int, float]]]:
    log = EventAccumulator(str(folder / SCALARS / run)).Reload()
    return {tag: [(one.step, one.value) for one in log.Scalars(tag)] for tag in log.Tags()['scalars']}


def test_scalars_of_a_method_run_over_its_ratios(rows: list[dict], tmp_path: Path) -> None:
    folder, found = tmp_path, summaries(rows)
    for _ in range(2):  # a second report takes the place of the first
        write_scalars(found, folder / SCALARS)
    ratios = (0.125, 0.25, 0.5)
    read = scalars(folder, 'cake attention_based')
    for task, name in (('needle', 'kl'), ('continuation', 'perplexity'), ('speed', 'next_token')):
        expected = [getattr(of(found, task, f'cake attention_based {ratio}'), name).value for ratio in ratios]
        assert [step for step, _ in read[f'{task}/{name}']] == [125, 250, 500]
        assert [value for _, value in read[f'{task}/{name}']] == pytest.approx(expected)
    assert scalars(folder, 'full')['needle/part'] == [(1000, 1.0)]


def test_a_folder_without_rows_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(['llm', 'report', str(tmp_path)]) == 1
    assert f'{tmp_path} holds no rows.jsonl; give the folder' in capsys.readouterr().err
    drawn.write(tmp_path, [])
    assert main(['llm', 'report', str(tmp_path)]) == 1
    assert 'holds no finished document yet; run the sweep first' in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == [ROWS]
