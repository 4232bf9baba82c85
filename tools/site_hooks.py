"""Hooks of mkdocs: links that leave the site, and roles in docstrings."""

from __future__ import annotations

import re
from typing import Any

OUTSIDE = re.compile(r'\[([^\]]+)\]\(\.\./[^)\s]*\)')
ROLE = re.compile(r':(?:class|meth|func|attr|mod):<code>')


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with the text alone of links to files that are not part of the site."""
    return OUTSIDE.sub(r'\1', markdown)


def on_page_content(html: str, **_: Any) -> str:
    """The page without the roles of docstrings."""
    return ROLE.sub('<code>', html)
