"""Pages and results: snippets run; commands, files, links and their anchors exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import run_docs

from lzero_kv.telemetry.counters import Cause, Fault

PAGES = run_docs.pages()
FILES = [*PAGES, *run_docs.results()]
LINK = re.compile(r'\]\(([^)#\s]*)(?:#([^)]*))?\)')
NAMED = re.compile(r'`((?:benchmarks|configs|lzero_kv|studies|testing|tests|tools)/[\w/.]*)`')


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_python_snippets_run(page: Path, warm_python: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, 'executable', warm_python)
    run_docs.run_snippets(page)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the heads of a page."""
    heads = re.findall(r'^#+ (.+)$', page.read_text(encoding='utf-8'), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', head.lower()).replace(' ', '-') for head in heads}


@pytest.mark.parametrize('page', FILES, ids=lambda page: f'{page.parent.name}/{page.name}')
def test_links_lead_somewhere(page: Path) -> None:
    missing = []
    for target, anchor in LINK.findall(page.read_text(encoding='utf-8')):
        if target.startswith('http'):
            continue
        to = page.parent / target if target else page
        if not to.exists() or (anchor and anchor not in anchors(to)):
            missing.append(f'{target}#{anchor}')
    assert not missing


@pytest.mark.parametrize('page', FILES, ids=lambda page: f'{page.parent.name}/{page.name}')
def test_files_that_the_text_names_exist(page: Path) -> None:
    named = NAMED.findall(page.read_text(encoding='utf-8'))
    assert not [name for name in named if not (run_docs.ROOT / name).exists()]


def test_make_targets_in_the_pages_exist() -> None:
    makefile = (run_docs.ROOT / 'Makefile').read_text(encoding='utf-8')
    targets = set(re.findall(r'^([a-z-]+):', makefile, re.MULTILINE))
    named = {
        command.split()[1]
        for page in FILES
        for command in run_docs.commands(page)
        if command.startswith('make ')
    }
    assert named
    assert named <= targets


def test_files_that_commands_name_exist() -> None:
    commands = [command for page in FILES for command in run_docs.commands(page)]
    named = {word for command in commands for word in command.split() if word.endswith('.py')}
    written = {command.split(' > ')[1] for command in commands if ' > ' in command}
    assert named
    assert not [name for name in named - written if not (run_docs.ROOT / name).is_file()]


def test_each_cause_and_fault_stands_in_the_page_of_validation() -> None:
    page = (run_docs.ROOT / 'docs' / 'validation.md').read_text(encoding='utf-8')
    rows = re.findall(r'^\| `(\w+)` \| (.+) \|$', page, re.MULTILINE)
    expected = [(name.value, name.sentence) for names in (Cause, Fault) for name in names]
    assert [row for row in rows if row in expected] == expected


def test_a_failing_snippet_is_noticed(
    tmp_path: Path, warm_python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, 'executable', warm_python)
    page = tmp_path / 'page.md'
    page.write_text('```python\nraise SystemExit(3)\n```\n', encoding='utf-8')
    with pytest.raises(subprocess.CalledProcessError):
        run_docs.run_snippets(page)
