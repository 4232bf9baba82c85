"""Hooks of mkdocs: tables of results as pages, links that leave the site, and roles in docstrings."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files  # pyright: ignore[reportMissingImports]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = {
    'benchmarks/results.md': 'results/benchmarks.md',
    'studies/budget/results.md': 'results/layer_budgets.md',
    'studies/language_models/results.md': 'results/language_models.md',
}
"""Files outside of docs/ and the pages that the site makes of them."""

SOURCES = {page: file for file, page in RESULTS.items()}
LINK = re.compile(r'\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)')
ROLE = re.compile(r':(?:class|meth|func|attr|mod):<code>')


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """The files of docs/ and those of results."""
    for source, page in RESULTS.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page with links as the site has them, and of links to files that are no pages the text alone."""
    at = page.file.src_uri
    folder = Path(SOURCES.get(at, f'docs/{at}')).parent

    def linked(link: re.Match[str]) -> str:
        text, target, anchor = link.groups(default='')
        file = os.path.normpath(folder / target)
        if not (ROOT / file).exists():
            return link[0]
        to = RESULTS.get(file, file.removeprefix('docs/'))
        return text if to == file else f'[{text}]({os.path.relpath(to, Path(at).parent)}{anchor})'

    return LINK.sub(linked, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """The page without the roles of docstrings."""
    return ROLE.sub('<code>', html)
