"""What steps on static shapes need from one search to the next: tensors that keep their place, weights that
are refreshed where they are, and runners made once."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch

from lzero_kv.cache.manager import KVCacheManager
from lzero_kv.cache.transfer import refill
from lzero_kv.lightzero.inference.flights import Flights
from lzero_kv.lightzero.inference.heads import StepOutputs
from lzero_kv.lightzero.inference.positions import RotaryPositions
from lzero_kv.lightzero.inference.static.runners import RUNNERS, Function, Run
from lzero_kv.lightzero.inference.static.step import (
    ACTION,
    CHILD,
    PARENT,
    TOKEN,
    WINDOW,
    StaticStep,
    StepInputs,
)
from lzero_kv.lightzero.inference.weights import Prepared

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Largest difference between a runner's first answer and that of the plain function, in parts of the largest
number; other dtypes 5e-2. A compiled step orders its sums in its own way; a wrong one is off by far more."""


class StaticEngine:
    """Runs the step of one world model for up to ``rows`` rows, however many of them are in use.

    The first failure switches it off, with one warning; then everything is served without it.

    Args:
        kind: 'compile' or 'cudagraph'.
        rows: rows of a batch.

    Attributes:
        numbers: int64 ``[rows, 7 + kept]`` on the host, to be filled in before a step: see
            :class:`StepInputs`.
        first_tokens: int64 ``[rows]``, where the tokens of each row begin among those of all.
    """

    def __init__(
        self, world_model: Any, manager: KVCacheManager, flights: Flights, kind: str, rows: int
    ) -> None:
        self.rows = rows
        self.numbers = np.zeros((rows, ACTION + 1 + flights.window.kept), np.int64)
        self.first_tokens = np.zeros(rows, np.int64)
        self._failed = False
        self._tokens = torch.zeros(rows, 0)
        self._world_model = world_model
        self._manager = manager
        self._flights = flights
        self._kind = kind
        self._weights: Prepared | None = None
        self._seen: Prepared | None = None
        self._step: StaticStep | None = None
        self._inputs: StepInputs | None = None
        self._runs: dict[bool, Run] = {}

    def serves(self, rows: int) -> bool:
        """Whether searches of so many rows go through here."""
        return not self._failed and rows <= self.rows

    @property
    def scratch(self) -> int:
        """Slot that belongs to nobody."""
        return self._manager.slab.slots

    def begin(self, rows: int, columns: int, shift: torch.Tensor | None) -> torch.Tensor:
        """Begin a search, with the weights as they are now.

        Args:
            rows: of the search.
            columns: raw tokens of each row's tree.
            shift: ``[2 * layers, kept, embed]``, the position correction by these weights; None for none.

        Returns:
            ``[rows, columns, embed]``, where the raw tokens of the trees belong, the roots' at the front.
        """
        if self._flights.prepared is not self._seen:
            self._take_weights()
        slab = self._manager.slab.tensor
        inputs = self._inputs
        if inputs is None or inputs.slab is not slab or self._tokens.shape[1] < columns:
            self._inputs = inputs = self._make_inputs(slab, columns, shift)
            self._runs = {}
        if shift is not None:
            inputs.shift.copy_(shift)
        # what a row that stands for nobody reads and writes
        self.numbers[:] = 0
        self.numbers[:, [PARENT, CHILD, WINDOW]] = self.scratch
        self.numbers[:, ACTION + 1 :] = self.numbers[:, TOKEN, None] = self.first_tokens[:, None]
        return self._tokens[:rows, :columns]

    @torch.no_grad()
    def run(self, actions: torch.Tensor, next_positions: np.ndarray, moved: bool) -> torch.Tensor | None:
        """Take a step with :attr:`numbers` as they are.

        Args:
            actions: int64 ``[B]``, or ``[B, action_space_size]`` where actions are continuous.
            next_positions: int64 ``[B]``, logical positions of the actions.
            moved: whether a window is pending.

        Returns:
            ``[B, ...]`` as of :meth:`StaticStep.plain`; None when this failed, now or before.
        """
        if self._failed or self._inputs is None or self._step is None:
            return None
        try:
            self._fill(self._inputs, actions, next_positions)
            if moved not in self._runs:
                step = self._step.moved if moved else self._step.plain
                return self._first_run(step, self._inputs, moved, len(actions))
            return self._runs[moved]()[: len(actions)]
        except Exception as error:  # compilers and drivers raise what they like
            self._give_up(f'{type(error).__name__}: {error}')
            return None

    def outputs(self, answers: torch.Tensor) -> StepOutputs:
        """The parts of what :meth:`run` gave, ``[B, 1, ...]`` each."""
        world_model = self._world_model
        embed, support = self._manager.layout.embed_dim, world_model.support_size
        actions = answers.shape[1] - 2 * embed - 2 * support
        hidden, latent, reward, policy, value = answers[:, None].split(
            [embed, embed, support, actions, support], dim=-1
        )
        return StepOutputs(hidden, latent, reward, policy, value)

    def _first_run(self, step: Function, inputs: StepInputs, moved: bool, rows: int) -> torch.Tensor:
        """Make a runner and compare its first answer in the rows in use. A step reads nothing that it
        writes, so it can be taken twice; the plain function comes last, so that what stays is its."""
        run = RUNNERS[self._kind](step, inputs)
        got, expected = run()[:rows], step(inputs)[:rows]
        if not torch.isfinite(expected).all():
            return expected  # broken weights, which the search refuses; nothing can be said about the runner
        largest = expected.abs().amax().clamp_min(1.0)
        tolerance = TOLERANCE.get(expected.dtype, 5e-2) * float(largest)
        if not torch.allclose(got, expected, rtol=0.0, atol=tolerance):
            self._give_up(f'its answers are off by up to {float((got - expected).abs().amax()):.2g}')
        else:
            self._runs[moved] = run
        return expected

    def _give_up(self, reason: str) -> None:
        self._failed, self._runs, self._inputs = True, {}, None
        warnings.warn(
            f'kv_cache.engine={self._kind!r} does not work here and searches go on with the engine '
            f"'eager', whose results are the same: {reason.strip()}",
            RuntimeWarning,
            stacklevel=2,
        )

    def _take_weights(self) -> None:
        """Weights that changed in place leave the runners valid; weights in other memory do not."""
        self._seen = self._flights.prepared
        if self._weights is not None and self._weights.in_place():
            self._weights.refresh()
            return
        self._weights = Prepared(self._world_model, as_host=False, packed=False)
        self._step = StaticStep(self._world_model, self._weights, self._flights.window.kept)
        self._runs = {}

    def _make_inputs(self, slab: torch.Tensor, columns: int, shift: torch.Tensor | None) -> StepInputs:
        world_model, kept = self._world_model, self._flights.window.kept
        layout = self._manager.layout
        with torch.inference_mode(False):
            self._tokens = slab.new_zeros(self.rows, columns, layout.embed_dim)
            self.first_tokens = np.arange(self.rows) * columns
            host = torch.from_numpy(self.numbers)
            continuous = world_model.action_space_size if world_model.continuous_action_space else 0
            rotation, positions = slab.new_zeros(0), self._flights.positions
            if isinstance(positions, RotaryPositions):
                like = positions.factors(np.zeros(1, np.int64))
                rotation = like.new_zeros(self.rows, kept + 2, layout.head_dim // 2, 2)
            return StepInputs(
                slab,
                self._tokens.view(self.rows * columns, layout.embed_dim),
                host if slab.device.type == 'cpu' else torch.empty_like(host, device=slab.device),
                slab.new_zeros(self.rows, continuous),
                rotation,
                slab.new_zeros(0) if shift is None else torch.zeros_like(shift),
            )

    def _fill(self, inputs: StepInputs, actions: torch.Tensor, next_positions: np.ndarray) -> None:
        rows = len(actions)
        if inputs.numbers.device.type != 'cpu':
            refill(inputs.numbers, self.numbers)
        if inputs.actions.numel():
            inputs.actions[:rows] = actions.to(inputs.actions)
        else:
            inputs.numbers[:rows, ACTION] = actions.reshape(-1)
        positions = self._flights.positions
        if isinstance(positions, RotaryPositions):
            shown = next_positions[:, None] + np.arange(-self._flights.window.kept, 2)
            inputs.rotation[:rows] = positions.factors(shown)
