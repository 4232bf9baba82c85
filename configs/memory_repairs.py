"""Lets LightZero's memory tasks run: repairs of pycolab 1.2 and of one line of LightZero 0.2.0.

pycolab, the game engine of 2018, calls what Python 3.11 and NumPy 1.26 no longer have; LightZero cannot build
its model for these tasks. Each repair is made in the module at fault, so that no other library sees a change.
Environment workers inherit them, because DI-engine forks its workers.
"""

from __future__ import annotations

import collections.abc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pycolab.ascii_art
import pycolab.storytelling
from lzero.model import unizero_model
from lzero.model.unizero_world_models.tokenizer import Tokenizer
from torch import nn


class TokenizerOfMemoryTasks(Tokenizer):
    """The host's tokenizer, its absent perceptual network empty instead of None.

    The model's constructor counts that network's parameters (lzero/model/unizero_model.py:150), and fails on
    None. An empty module has none, and adds nothing to a checkpoint.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.lpips is None:
            self.lpips = nn.Identity()


def ascii_codes(art: Sequence[str]) -> np.ndarray:
    """The character codes [rows, columns], uint8, of a drawing given as strings of one length.

    Raises ValueError unless all rows are ASCII and of one length; TypeError if a row is not a string.
    """
    for row in art:
        if not isinstance(row, str):
            raise TypeError(f'art: expected a list of strings, found a row of type {type(row).__name__}')
    if len({len(row) for row in art}) != 1:
        raise ValueError(f'art: expected rows of one length, found lengths {[len(row) for row in art]}')
    return np.array([np.frombuffer(row.encode('ascii'), dtype=np.uint8) for row in art])


def repair_memory_tasks() -> None:
    """Make the repairs; a second call changes nothing."""
    # The original hands np.vstack a generator, which takes a list only, and reads text with np.fromstring.
    pycolab.ascii_art.ascii_art_to_uint8_nparray = ascii_codes
    # The module wants Mapping and Sequence, which Python 3.10 took out of collections.
    pycolab.storytelling.collections = collections.abc
    unizero_model.Tokenizer = TokenizerOfMemoryTasks
