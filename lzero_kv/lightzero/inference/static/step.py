"""One simulation as one function of tensors: gather, two tokens, heads, window and scatter, on static shapes.

What :class:`SearchNodes` does with Python between its operators, done with masks and index operations alone:
nothing depends on the data but the data, so that the step can be compiled, or captured as a graph, once. All
rows take part in every step; a row that stands for nobody has a history of length 0 and reads from and writes
to the scratch row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from lzero_kv.cache.window import TOKENS_PER_STEP
from lzero_kv.lightzero.inference.attention import MASK_ROW
from lzero_kv.lightzero.inference.weights import Prepared

PARENT, CHILD, WINDOW, LENGTH, TOKEN, PENDING, ACTION = range(7)
"""Columns of :attr:`StepInputs.numbers` in front of the tokens of the window."""


class StepInputs(NamedTuple):
    """Where a step reads and writes. Tensors keep their place from step to step; only numbers in them change.

    Attributes:
        slab: ``[slots, 2 * layers, kept, embed]``, histories by slot. Written in place.
        tokens: ``[B * columns, embed]``, every raw token of every row's tree. Written in place.
        numbers: int64 ``[B, 7 + kept]``: slot of the parent; slot that the child is written to; slot that the
            parent's window is written to; tokens of the parent's history; the row of ``tokens`` where the
            child's action goes, its observation behind it; whether the parent's window is pending, that is
            moved and not computed yet (0 or 1); the action; the rows of ``tokens`` that the parent's window
            shows.
        actions: ``[B, action_space_size]`` where actions are continuous, else empty.
        rotation: ``[B, kept + 2, head_dim / 2, 2]`` rotary factors (cosine, sine) of the window's tokens, the
            action and the observation; empty where positions are learned.
        shift: ``[2 * layers, kept, embed]``, the position correction of windows that move; empty where there
            is none.
    """

    slab: torch.Tensor
    tokens: torch.Tensor
    numbers: torch.Tensor
    actions: torch.Tensor
    rotation: torch.Tensor
    shift: torch.Tensor


class StaticStep:
    """The step of one world model, for one number of rows.

    Args:
        world_model: the host's; embeddings of actions and positions are read from its modules.
        prepared: its transformer and heads, not packed.
        kept: tokens that a window keeps.
    """

    def __init__(self, world_model: Any, prepared: Prepared, kept: int) -> None:
        self._prepared = prepared
        self._kept = kept
        self._continuous = bool(world_model.continuous_action_space)
        self._embed_action = world_model.act_embedding_table
        self._places = None if world_model.config.rotary_emb else world_model.pos_emb.weight

    def plain(self, inputs: StepInputs) -> torch.Tensor:
        """A step in which no parent's window is pending.

        Returns:
            ``[B, embed + embed + support + actions + support]``: output of the last token, latent state,
            reward, policy and value, side by side.
        """
        stored = inputs.slab.index_select(0, inputs.numbers[:, PARENT])
        action = self._action(inputs)
        histories = [stored[:, block] for block in range(stored.shape[1])]
        return self._two_tokens(inputs, action, action[:, None], histories)

    def moved(self, inputs: StepInputs) -> torch.Tensor:
        """A step in which windows are pending: they are computed from their raw tokens in the pass of the
        action, and stored. Answers as :meth:`plain`."""
        stored = inputs.slab.index_select(0, inputs.numbers[:, PARENT])
        action, columns = self._action(inputs), inputs.numbers[:, ACTION + 1 :]
        window = inputs.tokens.index_select(0, columns.reshape(-1)).view(*columns.shape, -1)
        histories = [stored[:, block] for block in range(stored.shape[1])]
        return self._two_tokens(inputs, action, torch.cat([window, action[:, None]], dim=1), histories)

    def _action(self, inputs: StepInputs) -> torch.Tensor:
        return self._embed_action(inputs.actions if self._continuous else inputs.numbers[:, ACTION])

    def _two_tokens(
        self, inputs: StepInputs, action: torch.Tensor, x: torch.Tensor, histories: list[torch.Tensor]
    ) -> torch.Tensor:
        """``x`` ``[B, n, embed]``: the action, perhaps behind the tokens of the window; ``histories``: for
        each block of keys or values ``[B, kept, embed]``."""
        prepared, numbers, kept = self._prepared, inputs.numbers, self._kept
        slab, first = inputs.slab, numbers[:, TOKEN]
        hidden = self._append(inputs, x, histories)
        if x.shape[1] > 1:
            slab.index_copy_(
                0, numbers[:, WINDOW], torch.stack([block[:, :kept] for block in histories], dim=1)
            )
        reward, latent = prepared.reward(hidden), prepared.latent(hidden)
        hidden = self._append(inputs, latent[:, None], histories)
        policy, value = prepared.policy(hidden), prepared.value(hidden)
        if isinstance(policy, dict):
            policy = torch.cat([policy['mu'], policy['sigma']], dim=-1)
        children = torch.stack([block[:, TOKENS_PER_STEP:] for block in histories], dim=1)
        if inputs.shift.numel():
            slid = (numbers[:, LENGTH] + TOKENS_PER_STEP > kept)[:, None, None, None]
            children = torch.where(slid, children + inputs.shift, children)
        slab.index_copy_(0, numbers[:, CHILD], children)
        inputs.tokens.index_copy_(0, first, action)
        inputs.tokens.index_copy_(0, first + 1, latent)
        return torch.cat([hidden, latent, reward, policy, value], dim=1)

    def _append(self, inputs: StepInputs, x: torch.Tensor, histories: list[torch.Tensor]) -> torch.Tensor:
        """Run tokens ``[B, n, embed]`` through the transformer; their last is the newest of its row.

        ``histories`` grow by the newest token. With ``n > 1`` the tokens in front of it are those of the
        window, whose keys and values take the place of the stored ones in rows where they are pending.

        Returns:
            ``[B, embed]``, the output of the newest token.
        """
        prepared, kept, heads = self._prepared, self._kept, self._prepared.heads
        rows, count, embed = x.shape
        before = histories[0].shape[1]
        end, length = before + 1, inputs.numbers[:, LENGTH, None]
        column = torch.arange(end - count, end, device=x.device)
        if self._places is not None:
            # the oldest token of a row stands at place 0; columns in front of it are masked
            x = x + F.embedding((column + length - kept).clamp_min(0), self._places)
        mask = self._mask(inputs, column, end, x)
        pending = inputs.numbers[:, PENDING, None, None] > 0
        for layer, block in enumerate(prepared.blocks):
            normed = block.norm1(x.reshape(rows * count, embed))
            query, keys, values = block.qkv(normed).view(rows, count, 3, embed).unbind(2)
            if inputs.rotation.numel():
                factors = inputs.rotation[:, end - count : end]
                query, keys = rotated(query, factors, heads), rotated(keys, factors, heads)
            for which, new in ((2 * layer, keys), (2 * layer + 1, values)):
                old = histories[which]
                if count > 1:
                    old = torch.where(pending, new[:, :kept], old)
                histories[which] = torch.cat([old, new[:, -1:]], dim=1)
            if layer == len(prepared.blocks) - 1:  # nobody asks what the window's tokens become
                query, x, mask, count = query[:, -1:], x[:, -1:], mask[:, :, -1:], 1
            split = (heads, embed // heads)
            shown = [
                t.unflatten(-1, split).transpose(1, 2) for t in (query, *histories[2 * layer : 2 * layer + 2])
            ]
            attended = F.scaled_dot_product_attention(*shown, attn_mask=mask)
            flat = attended.transpose(1, 2).reshape(rows * count, embed)
            x = block.finish(x.reshape(rows * count, embed), flat).view(rows, count, embed)
        return prepared.norm(x[:, -1])

    def _mask(self, inputs: StepInputs, column: torch.Tensor, end: int, like: torch.Tensor) -> torch.Tensor:
        """``[B, 1, n, end]``: 0 where the tokens of ``column`` may look, -inf elsewhere."""
        keys = torch.arange(end + -end % MASK_ROW, device=column.device)
        inside = keys >= self._kept - inputs.numbers[:, LENGTH, None]
        visible = (keys <= column[:, None]) & inside[:, None, :]
        visible = visible | (keys == column[:, None])  # no softmax runs over nothing
        # not torch.where of two numbers, which copies them to the device: a graph must not
        return like.new_zeros(visible.shape).masked_fill(~visible, float('-inf'))[:, None, :, :end]


def rotated(x: torch.Tensor, factors: torch.Tensor, heads: int) -> torch.Tensor:
    """:func:`~.transformer.rotate` without complex numbers, which compilers do not know: ``x``
    ``[B, n, embed]``, ``factors`` ``[B, n, head_dim / 2, 2]``."""
    pairs = x.unflatten(-1, (heads, -1, 2))
    cosine, sine = factors.unsqueeze(2).unbind(-1)
    even, odd = pairs.unbind(-1)
    turned = torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1)
    return turned.flatten(2)
