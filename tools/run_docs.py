"""Run the documentation: `make docs` runs every command and every snippet of README.md, CONTRIBUTING.md and
docs/.

Python snippets of one page share a namespace and run in order. Commands run in the order of the pages, in the
project's folder with `.venv/bin` in front of PATH. Left out: `make test`, which is what CI runs; `make docs`,
which is this; `make soak`, `make bench` and `make compare`, which take half an hour and more; and
`pip install .`, which would replace the editable install, and has a test of its own in tests/packaging.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r'^```(\w+)\n(.*?)^```', re.MULTILINE | re.DOTALL)
NOT_HERE = {f'make {target}' for target in ('test', 'docs', 'soak', 'bench', 'compare')}
NOT_HERE |= {'pip install .', "pip install '.[llm]'"}
CONFIGS = """
from easydict import EasyDict
import atari_unizero_kv_config
main_config, create_config = atari_unizero_kv_config.make_config('PongNoFrameskip-v4', seed=0)
"""


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    language: str
    text: str


def pages() -> list[Path]:
    """The pages that make promises."""
    return [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').glob('*.md'))]


def results() -> list[Path]:
    """The long tables beside the commands that make them; their commands take hours and are not run."""
    return [ROOT / 'benchmarks' / 'results.md', ROOT / 'studies' / 'budget' / 'results.md']


def blocks(page: Path) -> Iterator[Block]:
    """Fenced blocks of a page, in order."""
    for language, text in BLOCK.findall(page.read_text(encoding='utf-8')):
        yield Block(page, language, text)


def language_model() -> str:
    """Python that makes a language model and a prompt for it: how the page of language models begins."""
    page = ROOT / 'docs' / 'language_models.md'
    first = next(block.text for block in blocks(page) if block.language == 'python')
    return first.partition('\ncache = ')[0]


def commands(page: Path) -> list[str]:
    """Shell commands of a page, one per line."""
    return [
        line.strip()
        for block in blocks(page)
        if block.language == 'bash'
        for line in block.text.splitlines()
        if line.strip()
    ]


def snippets(page: Path) -> str:
    """All Python of a page, as one program in which a config is at hand, and a model where it takes one."""
    found = [block.text for block in blocks(page) if block.language == 'python']
    text = '\n'.join(found)
    model = language_model() if 'enable(model' in text and 'LlamaConfig' not in text else ''
    return '\n'.join([CONFIGS, model, text]) if found else ''


def run_snippets(page: Path) -> None:
    """Run a page's Python in a process of its own.

    Raises:
        subprocess.CalledProcessError: a snippet fails.
    """
    if program := snippets(page):
        path = os.pathsep.join([str(ROOT), str(ROOT / 'configs')])
        subprocess.run(
            [sys.executable, '-c', program], check=True, cwd=ROOT, env={**os.environ, 'PYTHONPATH': path}
        )


def main() -> int:
    """Entry point: 0 when everything ran."""
    environment = {**os.environ, 'PATH': f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'}
    done: set[str] = set()
    for page in pages():
        run_snippets(page)
        for command in commands(page):
            if command in NOT_HERE or command in done:
                continue
            done.add(command)
            print(f'{page.name}: {command}', flush=True)
            begun = time.perf_counter()
            finished = subprocess.run(
                command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True
            )
            if finished.returncode:
                print(finished.stdout[-4000:], finished.stderr[-4000:], sep='\n')
                print(f'failed with exit status {finished.returncode}')
                return 1
            print(f'  {time.perf_counter() - begun:.0f} s', flush=True)
    return 0


if __name__ == '__main__':
    sys.exit(main())
