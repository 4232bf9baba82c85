"""Rows of a sweep: order, resuming, torn ends, other sweeps, several processes and a kill."""

from __future__ import annotations

import collections
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lzero_kv.llm.experiment.documents import Document
from lzero_kv.sweep.rows import ROWS, read_rows, unit_of, versions
from lzero_kv.sweep.sweep import Progress, Sweep, claimed
from tests.llm.experiment import made

ROOT = Path(__file__).resolve().parents[3]


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / ROWS).read_text().splitlines()]


def test_one_line_for_the_sweep_and_one_for_each_method_of_each_document(tmp_path: Path) -> None:
    documents = made.documents(3)
    rows = Sweep(tmp_path, made.HEADER).run(documents, made.score)
    assert rows == [row for document in documents for row in made.score(document)]
    assert lines(tmp_path) == [{'sweep': made.HEADER}, *rows]
    assert read_rows(tmp_path) == (made.HEADER, rows)


def test_a_second_start_measures_nothing_again(tmp_path: Path) -> None:
    documents, asked = made.documents(3), []

    def stopping(document: Document):
        if len(asked) == 4:
            raise KeyboardInterrupt
        asked.append(document)
        return made.score(document)

    with pytest.raises(KeyboardInterrupt):
        Sweep(tmp_path, made.HEADER).run(documents, stopping)
    assert [unit_of(row) for row in Sweep(tmp_path, made.HEADER).rows[:: len(made.METHODS)]] == [
        (document.task, document.id) for document in asked
    ]
    again = []
    Sweep(tmp_path, made.HEADER).run(
        documents, lambda document: again.append(document) or made.score(document)
    )
    assert again == documents[4:]
    assert len(lines(tmp_path)) == 1 + 6 * len(made.METHODS)


def test_what_is_left_is_counted_in_documents_and_in_work(tmp_path: Path) -> None:
    documents, seen = made.documents(1), []
    Sweep(tmp_path, made.HEADER).run(documents, made.score, seen.append)
    tokens = documents[0].size + documents[1].size
    assert documents[0].size != documents[1].size
    assert seen[0] == Progress(2, 0, tokens, 0, 'continuation text 0', False)
    assert Progress(2, 1, tokens, documents[0].size, 'needle text 0', False) in seen
    assert seen[-1] == Progress(2, 2, tokens, tokens, '', False)


@pytest.mark.parametrize('kept', [1, 37, 'all but the newline'])
def test_a_torn_line_is_cut_away_with_its_document(tmp_path: Path, kept: int | str) -> None:
    documents = made.documents(2)
    Sweep(tmp_path, made.HEADER).run(documents[:2], made.score)
    whole = (tmp_path / ROWS).read_bytes()
    torn = ''.join(json.dumps(row) + '\n' for row in made.score(documents[2])).encode()
    last = torn.rindex(b'{')
    end = len(torn) - 1 if isinstance(kept, str) else last + kept
    (tmp_path / ROWS).write_bytes(whole + torn[:end])
    assert len(Sweep(tmp_path, made.HEADER).rows) == 2 * len(made.METHODS)
    assert (tmp_path / ROWS).read_bytes() == whole
    Sweep(tmp_path, made.HEADER).run(documents, made.score)
    assert (tmp_path / ROWS).read_bytes().startswith(whole + torn)


def test_whole_lines_of_half_a_document_are_cut_away(tmp_path: Path) -> None:
    documents = made.documents(1)
    Sweep(tmp_path, made.HEADER).run(documents[:1], made.score)
    whole = (tmp_path / ROWS).read_bytes()
    half = ''.join(json.dumps(row) + '\n' for row in list(made.score(documents[1]))[:2])
    (tmp_path / ROWS).write_bytes(whole + half.encode() + b'\0' * 50 + b'\n')
    assert read_rows(tmp_path)[1] == list(made.score(documents[0]))
    Sweep(tmp_path, made.HEADER)
    assert (tmp_path / ROWS).read_bytes() == whole


def test_a_torn_end_of_another_process_is_cut_away_by_the_next_append(tmp_path: Path) -> None:
    first, second, third = made.documents(2)[:3]
    alive = Sweep(tmp_path, made.HEADER)
    alive.append(made.score(first))
    with (tmp_path / ROWS).open('ab') as dead:
        dead.write(b'{"task": "needle", "doc')
    alive.append(made.score(third))
    assert lines(tmp_path)[1:] == [*made.score(first), *made.score(third)]
    assert alive.append(made.score(second))


def test_a_document_that_another_process_wrote_is_not_written_again(tmp_path: Path) -> None:
    document = made.documents(1)[0]
    here, there = (Sweep(tmp_path, made.HEADER) for _ in range(2))
    assert there.append(made.score(document))
    assert not here.append(made.score(document))
    assert here.rows == there.rows == lines(tmp_path)[1:]


@pytest.mark.parametrize('torn', [b'', b'{"sw', b'{"sweep": {"mod', bytes(64)])
def test_a_header_that_was_torn_is_written_again(tmp_path: Path, torn: bytes) -> None:
    (tmp_path / ROWS).write_bytes(torn)
    Sweep(tmp_path, made.HEADER)
    assert lines(tmp_path) == [{'sweep': made.HEADER}]


def test_a_header_names_the_package_that_was_imported_installed_or_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr('lzero_kv.__version__', '7.5.3')
    found = versions('torch', 'no-such-package')
    assert (found['lzero_kv'], found['no-such-package']) == ('7.5.3', 'not installed')
    assert set(found) == {'torch', 'no-such-package', 'Python', 'lzero_kv'}


def test_another_sweep_is_refused_with_each_difference_and_changes_nothing(tmp_path: Path) -> None:
    Sweep(tmp_path, made.HEADER).run(made.documents(1), made.score)
    before = (tmp_path / ROWS).read_bytes()
    other = {
        **made.HEADER,
        'seed': 4,
        'methods': [*made.METHODS[:4], 'hace 0.25'],
        'versions': {'torch': '2.14.0'},
        'data': 'text.txt',
    }
    with pytest.raises(ValueError) as refused:
        Sweep(tmp_path, other)
    assert str(refused.value).splitlines()[1:] == [
        '  seed: 3 in the file, 4 now',
        '  methods: no longer "h2o 0.25"',
        '  methods: added "hace 0.25"',
        '  versions.torch: "2.13.0" in the file, "2.14.0" now',
        '  data: null in the file, "text.txt" now',
        'write the same as before to go on with it, or another --out to begin a new one',
    ]
    assert (tmp_path / ROWS).read_bytes() == before


@pytest.mark.parametrize('text', ['{"loss": 3}\n', '{"loss": 3}', 'x', '{"sweeps": 3}'])
def test_a_file_that_is_none_of_rows_is_refused_and_kept(tmp_path: Path, text: str) -> None:
    (tmp_path / ROWS).write_text(text)
    with pytest.raises(ValueError, match='does not begin with the header of a sweep; write another --out'):
        Sweep(tmp_path, made.HEADER)
    assert (tmp_path / ROWS).read_text() == text


def test_damage_in_the_middle_is_refused_and_nothing_is_cut(tmp_path: Path) -> None:
    Sweep(tmp_path, made.HEADER).run(made.documents(2), made.score)
    written = (tmp_path / ROWS).read_bytes().splitlines(keepends=True)
    written[8] = written[8][:20] + b'\n'
    (tmp_path / ROWS).write_bytes(b''.join(written))
    expected = 'line 7 of the rows is damaged and 10 lines follow it; .* up to line 11'
    for read in (lambda: Sweep(tmp_path, made.HEADER), lambda: read_rows(tmp_path)):
        with pytest.raises(ValueError, match=expected):
            read()
    assert (tmp_path / ROWS).read_bytes() == b''.join(written)


def test_rows_of_a_wrong_form_are_refused_before_they_are_written(tmp_path: Path) -> None:
    first, second = made.documents(1)
    file = Sweep(tmp_path, made.HEADER)
    for rows in (
        list(made.score(first))[:4],
        [*list(made.score(first))[:4], list(made.score(second))[4]],
        [*made.score(first), next(made.score(first))],
        [],
    ):
        with pytest.raises(ValueError, match='expected the rows of one document, one for each of'):
            file.append(rows)
    assert lines(tmp_path) == [{'sweep': made.HEADER}]


def test_two_documents_of_one_name_are_refused(tmp_path: Path) -> None:
    document = made.documents(1)[0]
    with pytest.raises(ValueError, match=r"got twice: \[\('continuation', 'text 0'\)\]"):
        Sweep(tmp_path, made.HEADER).run([document, document], made.score)


def test_files_of_several_machines_are_read_as_one(tmp_path: Path) -> None:
    documents = made.documents(2)
    for name, some in (('a', documents[:3]), ('b', documents[2:])):
        Sweep(tmp_path / name, made.HEADER).run(some, made.score)
        (tmp_path / name / ROWS).rename(tmp_path / f'rows-{name}.jsonl')
    header, rows = read_rows(tmp_path)
    assert header == made.HEADER
    assert rows == [row for document in documents for row in made.score(document)]


def test_files_of_different_sweeps_are_not_read_as_one(tmp_path: Path) -> None:
    for name, header in (('a', made.HEADER), ('b', {**made.HEADER, 'seed': 4})):
        Sweep(tmp_path / name, header)
        (tmp_path / name / ROWS).rename(tmp_path / f'rows-{name}.jsonl')
    with pytest.raises(
        ValueError, match=r'is of another sweep than .*rows-a.jsonl:\n  seed: 3 in the file, 4 now'
    ):
        read_rows(tmp_path)
    with pytest.raises(ValueError, match=r'holds no rows.jsonl; give the folder \(--out\) that'):
        read_rows(tmp_path / 'none')


def start(folder: Path, begun: Path, seconds: float = 0.15) -> subprocess.Popen:
    command = [sys.executable, '-m', 'tests.llm.experiment.made', str(folder), str(begun), str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)})


def begun_by(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.005)


def test_two_processes_divide_the_documents(tmp_path: Path) -> None:
    files = [tmp_path / 'first', tmp_path / 'second']
    processes = [start(tmp_path / 'sweep', file) for file in files]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    first, second = (begun_by(file) for file in files)
    assert sorted(first + second) == sorted(f'{one.task} {one.id}' for one in made.documents())
    rows = read_rows(tmp_path / 'sweep')[1]
    counts = collections.Counter((*unit_of(row), row['method']) for row in rows)
    assert set(counts.values()) == {1}
    assert len(counts) == len(made.documents()) * len(made.METHODS)


def test_a_killed_process_loses_its_document_alone_and_another_takes_it_over(tmp_path: Path) -> None:
    files = [tmp_path / 'killed', tmp_path / 'alive']
    killed = start(tmp_path / 'sweep', files[0], seconds=0.3)
    wait_for(lambda: len(begun_by(files[0])) == 3)  # two documents written, the third in work
    alive = start(tmp_path / 'sweep', files[1], seconds=0.3)
    wait_for(lambda: begun_by(files[1]))  # both at work
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait(timeout=60) == -signal.SIGKILL
    assert alive.wait(timeout=120) == 0
    lost = begun_by(files[0])[-1]
    assert sorted(set(begun_by(files[0])) & set(begun_by(files[1]))) == [lost]
    header, rows = read_rows(tmp_path / 'sweep')
    assert header == made.HEADER
    assert sorted(map(repr, rows)) == sorted(repr(row) for one in made.documents() for row in made.score(one))


def test_the_start_after_a_kill_measures_only_what_is_left(tmp_path: Path) -> None:
    begun, again = tmp_path / 'begun', tmp_path / 'again'
    process = start(tmp_path / 'sweep', begun)
    wait_for(lambda: len(begun_by(begun)) == 5)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(timeout=60)
    done = {' '.join(unit_of(row)) for row in read_rows(tmp_path / 'sweep')[1]}
    assert len(done) in (4, 5)
    assert start(tmp_path / 'sweep', again, seconds=0).wait(timeout=120) == 0
    assert begun_by(again) == [
        name for one in made.documents() if (name := f'{one.task} {one.id}') not in done
    ]
    assert len(read_rows(tmp_path / 'sweep')[1]) == len(made.documents()) * len(made.METHODS)


def test_a_claim_is_of_one_process_and_ends_with_it(tmp_path: Path) -> None:
    code = (
        'import sys, pathlib; from lzero_kv.sweep.sweep import claimed\n'
        'path = pathlib.Path(sys.argv[1])\n'
        'with claimed(path, 4, wait=False) as mine: print(mine, flush=True); sys.stdin.read()'
    )
    other = subprocess.Popen(
        [sys.executable, '-c', code, str(tmp_path / 'claims')],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
    )
    assert other.stdout.readline() == 'True\n'
    path = tmp_path / 'claims'
    with claimed(path, 4, wait=False) as mine:
        assert not mine
    with claimed(path, 5, wait=False) as mine:
        assert mine
    other.kill()
    with claimed(path, 4, wait=True) as mine:
        assert mine
    other.communicate()
