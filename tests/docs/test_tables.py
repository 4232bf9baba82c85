"""Tables of the documentation are those that the results files give."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

TABLES: dict[str, Any] = runpy.run_path(str(Path(__file__).resolve().parents[2] / 'benchmarks' / 'tables.py'))


@pytest.mark.parametrize('page', TABLES['PAGES'], ids=lambda page: page.name)
def test_a_page_has_the_numbers_of_the_results_files(page: Path) -> None:
    text = page.read_text(encoding='utf-8')
    marks = TABLES['MARKED'].findall(text)
    assert len(marks) == text.count('<!-- table ') == text.count('<!-- end of table -->') > 1
    assert TABLES['rendered'](text) == text, 'run python benchmarks/tables.py'


def test_each_table_stands_in_a_page() -> None:
    text = ''.join(page.read_text(encoding='utf-8') for page in TABLES['PAGES'])
    assert {name for _, name, _ in TABLES['MARKED'].findall(text)} == TABLES['TABLES'].keys()


def test_a_number_written_by_hand_is_replaced() -> None:
    page = next(iter(TABLES['PAGES']))
    text = page.read_text(encoding='utf-8')
    row = next(line for line in text.splitlines() if line.startswith('| whole training |'))
    changed = text.replace(row, row.replace(row[-4], str((int(row[-4]) + 1) % 10)))
    assert changed != text and TABLES['rendered'](changed) == text


def test_a_mark_of_no_table_is_named() -> None:
    with pytest.raises(ValueError, match=r"no table 'plannin': write one of planning, "):
        TABLES['rendered']('<!-- table plannin -->\n| a |\n<!-- end of table -->')
