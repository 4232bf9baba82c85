"""The step of a search as one function of tensors on static shapes, and ways to run it."""

from __future__ import annotations

from .engine import StaticEngine
from .nodes import StaticNodes

__all__ = ['StaticEngine', 'StaticNodes']
