"""The tokens that a layer holds: which columns are tokens at all, and which tokens may be dropped."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Tokens:
    """Tokens of one layer, in columns by position. Rows are right-aligned: the newest token lies in the last
    column, and the columns that a short row does not fill are in front.

    ``B`` is the batch, ``G`` the number of groups of heads that keep tokens of their own (1, or the key-value
    heads), ``n`` the columns.
    """

    positions: torch.Tensor
    """int64 ``[B, G, n]``: logical position of each token, increasing."""
    lengths: torch.Tensor
    """int64 ``[B, G]``: tokens in each row."""
    window: int | torch.Tensor
    """Newest tokens, never dropped; int64 ``[B, 1, 1]`` where rows differ."""
    sinks: int | torch.Tensor = 0
    """First tokens, never dropped; int64 ``[B, 1, 1]`` where rows differ."""
    step: int = 1
    """Tokens that are kept or dropped together: those whose position divided by ``step`` is the same. Window
    and sinks are multiples of it; a newest step that is not complete yet counts as a step of the window, and
    one step of sinks may have lost its first tokens."""

    @classmethod
    def of_prompt(
        cls, lengths: torch.Tensor, columns: int, *, window: int, sinks: int = 0, step: int = 1
    ) -> Tokens:
        """Tokens from which nothing was dropped yet.

        Arguments:
            lengths: int64 ``[B, G]``.
            columns: columns of the batch.
        """
        column = torch.arange(columns, device=lengths.device)
        positions = (column - columns + lengths[..., None]).clamp(min=0)
        return cls(positions, lengths, window, sinks, step)

    @cached_property
    def real(self) -> torch.Tensor:
        """bool ``[B, G, n]``: columns that hold a token."""
        return real_columns(self.lengths, self.positions.shape[-1])

    @cached_property
    def step_numbers(self) -> torch.Tensor:
        """int64 ``[B, G, n]``: number of each token's step among those held, from 0; 0 in padding."""
        if self.step == 1:
            columns = self.positions.shape[-1]
            first = columns - self.lengths[..., None]
            return (torch.arange(columns, device=first.device) - first).clamp(min=0)
        steps = self.positions // self.step
        begins = self.real.clone()
        begins[..., 1:] &= (steps[..., 1:] != steps[..., :-1]) | ~self.real[..., :-1]
        return (begins.cumsum(-1) - 1).clamp(min=0)

    @cached_property
    def evictable(self) -> torch.Tensor:
        """bool ``[B, G, n]``: tokens outside window and sinks."""
        numbers = self.step_numbers
        newest = numbers[..., -1:]
        # half a step of sinks may be left where the first tokens expire
        first, last = (self.sinks + self.step - 1) // self.step, self.window // self.step
        return self.real & (numbers >= first) & (numbers <= newest - last)

    def sum_of_steps(self, values: torch.Tensor) -> torch.Tensor:
        """``[B, G, n]``: for each token the sum of ``values`` over its step. Padding has to be 0."""
        if self.step == 1:
            return values
        return (
            torch.zeros_like(values).scatter_add_(-1, self.step_numbers, values).gather(-1, self.step_numbers)
        )

    def max_of_steps(self, values: torch.Tensor) -> torch.Tensor:
        """``[B, G, n]``: for each token the largest of ``values`` over its step."""
        if self.step == 1:
            return values
        # padding shares a number with the first step
        values = torch.where(self.real, values, values.new_tensor(-1))
        largest = torch.full_like(values, -1).scatter_reduce_(-1, self.step_numbers, values, 'amax')
        return largest.gather(-1, self.step_numbers)


def real_columns(lengths: torch.Tensor, columns: int) -> torch.Tensor:
    """bool ``[..., columns]``: the last ``lengths`` columns of each row. ``lengths`` is int64 ``[...]``."""
    return torch.arange(columns, device=lengths.device) >= columns - lengths[..., None]


def gather_tokens(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Take columns out of a tensor of tokens.

    Arguments:
        values: ``[B, heads, n]`` or ``[B, heads, n, d]``.
        indices: int64 ``[B, G, k]``; ``G`` divides ``heads``, neighbouring heads share a group.

    Returns:
        ``[B, heads, k]`` or ``[B, heads, k, d]``.
    """
    indices = indices.repeat_interleave(values.shape[1] // indices.shape[1], dim=1)
    if values.ndim == 3:
        return values.gather(2, indices)
    # whole rows of memory: a tenth of the time of gather with an index for every number
    batch, heads, columns, width = values.shape
    first = torch.arange(0, batch * heads * columns, columns, device=indices.device)
    rows = (indices + first.view(batch, heads, 1)).flatten()
    return values.reshape(-1, width).index_select(0, rows).view(*indices.shape, width)


def mean_of_groups(values: torch.Tensor, groups: int) -> torch.Tensor:
    """``[B, heads, ...]`` to ``[B, groups, ...]``: the mean over neighbouring heads that share a group."""
    return values.unflatten(1, (groups, -1)).mean(2)
