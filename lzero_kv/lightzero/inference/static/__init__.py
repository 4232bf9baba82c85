"""The step of a search as one function of tensors on static shapes, and ways to run it."""

from __future__ import annotations

from lzero_kv.lightzero.inference.static.engine import StaticEngine
from lzero_kv.lightzero.inference.static.nodes import StaticNodes

__all__ = ['StaticEngine', 'StaticNodes']
