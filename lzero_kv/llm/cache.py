"""transformers' cache under a layer budget."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lzero_kv.budget import BudgetConfig, BudgetedCache, LayerCache, Preference
from lzero_kv.budget.allocation import AttentionBased
from lzero_kv.budget.cascade import least
from lzero_kv.budget.config import INTERVAL
from lzero_kv.llm.budget import PromptBudget
from lzero_kv.llm.families import check_attention, check_family, sliding_windows

Function = TypeVar('Function', bound=Callable[..., Any])


def uncompiled(function: Function) -> Function:
    """The function, outside of what ``torch.compile(model)`` compiles: its sizes follow the data."""
    wrapped: Any = torch.compiler.disable(function)
    return wrapped


class BudgetCache(Cache):
    """Keys and values of one prompt and what is generated behind it, each layer within its budget.

    ``model.generate(**inputs, past_key_values=BudgetCache(model.config, dict(ratio=0.25)))``. The prompt is
    cut layer by layer while it is computed, generated tokens every few steps. A budget that covers the
    context changes no bit. Rows of a batch have budgets of their own and may be padded on the left.

    Arguments:
        config: ``model.config``.
        budget: fields of a :class:`~lzero_kv.llm.budget.PromptBudget` as a dict, or a BudgetConfig. ``ratio``
            is meant of the tokens seen so far; a sequence that is too short for it keeps the window, the
            sinks and ``interval`` other tokens in each layer.
        dynamic: whether slots move while tokens are generated; False leaves them as the prompt made them.
        interval: generated tokens between two choices.
        measure: whether :attr:`preferences` and :attr:`importance` are read off the attention where the
            allocation does not need them.

    Raises:
        TypeError, ValueError: the model or the budget is impossible: one sentence says why.
    """

    def __init__(
        self,
        config: Any,
        budget: BudgetConfig | Mapping[str, Any],
        *,
        dynamic: bool = True,
        interval: int = INTERVAL,
        measure: bool = False,
    ) -> None:
        check_family(config)
        check_attention(config)
        self.budget = PromptBudget.read(budget)
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise ValueError(f'interval must be an integer of at least 1, got {interval!r}')
        windows = sliding_windows(config)
        limits = [None if window is None else window - 1 for window in windows]
        self._empty = partial(
            BudgetedCache, self.budget, len(windows), limits=limits, dynamic=dynamic, interval=interval,
            measure=measure,
        )  # fmt: skip
        self._tokens = self._empty()
        longest = getattr(config, 'max_position_embeddings', None)
        # for every model of the process; keys of others pass it as they are
        AttentionInterface.register('sdpa', budget_attention)
        super().__init__(
            layers=[
                BudgetLayer(self._tokens, number, window, longest) for number, window in enumerate(windows)
            ]
        )

    @property
    def slots(self) -> list[tuple[int, ...]]:
        """For each row the tokens that each layer may hold."""
        return list(self._tokens.slots)

    @property
    def preferences(self) -> list[list[Preference]]:
        """For each row the dispersion and shift of each layer; empty where neither the allocation nor
        ``measure`` reads them."""
        return [list(row) for row in self._tokens.preferences]

    @property
    def importance(self) -> list[tuple[float, ...]]:
        """For each row each layer's share of ``P_l = H_l^(1/tau1) V_l^(1/tau2)``, as CAKE weighs layers;
        empty where :attr:`preferences` is."""
        budget = self.budget
        cake = AttentionBased(1.0, budget.tau1, budget.tau2, budget.preference)
        weights = [cake.weights(len(row), row) if row else [] for row in self._tokens.preferences]
        return [tuple(float(weight / sum(row)) for weight in row) for row in weights]

    @property
    def bytes(self) -> int:
        """Bytes of all layers, with what is remembered of the attention."""
        return self._tokens.bytes

    @property
    def peak_tokens(self) -> int:
        """Most tokens of all layers together that were held at once, for each row."""
        return self._tokens.peak_tokens

    @property
    def seen(self) -> list[int]:
        """Tokens of each row so far, padding not counted."""
        return list(self._tokens.seen)

    def __getitem__(self, layer: int) -> LayerCache:
        """The tokens of a layer: ``cache[layer].positions`` int64 ``[B, G, n]``, right-aligned."""
        return self._tokens[layer]

    def __len__(self) -> int:
        return len(self.layers)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row ``b`` becomes what row ``beam_idx[b]`` was."""
        self._tokens.select_rows(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows."""
        self._tokens.select_rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._tokens.select_rows(torch.arange(len(self._tokens.seen)).repeat_interleave(repeats))

    def crop(self, *_: Any, **__: Any) -> None:
        """Refused: dropped tokens do not come back.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            'a cache under a budget cannot be cropped, its dropped tokens do not come back; assisted '
            'decoding and prompt lookup need a full cache'
        )

    def reset(self) -> None:
        """Forget everything: the cache of a new prompt."""
        self._tokens = self._empty()
        own: list[Any] = self.layers
        for layer in own:
            layer.tokens, layer.length = self._tokens, 0


class BudgetLayer(CacheLayerMixin):
    """One layer of a :class:`BudgetCache`, as transformers sees it: as long as the tokens it has seen."""

    is_compileable = False
    is_croppable = False

    def __init__(self, tokens: BudgetedCache, number: int, window: int | None, longest: int | None) -> None:
        super().__init__()
        self.tokens = tokens
        self._number = number
        self._window = window
        self._longest = longest
        self.is_sliding = window is not None
        self.length = 0
        """Columns seen so far, padding counted."""

    def lazy_initialization(self, *_: Any, **__: Any) -> None:
        """Nothing: the first block brings device and dtype."""
        self.is_initialized = True

    @uncompiled
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the layer with the new ones behind; :func:`budget_attention` goes on from there.

        Raises:
            ValueError: gradients are wanted, or the sequence is longer than the model.
            RuntimeError: the layer before was not attended by :func:`budget_attention`.
        """
        if key_states.requires_grad:
            raise ValueError(
                'no gradients go through a cache under a budget; write torch.no_grad() around the call, or '
                'use_cache=False to train'
            )
        block, longest = key_states.shape[2], self._longest
        if longest is not None and self.length + block > longest:
            raise ValueError(
                f'the model has positions for {longest} tokens (max_position_embeddings), got '
                f'{self.length + block}; shorten the prompt or max_new_tokens'
            )
        try:
            joined: tuple[Any, torch.Tensor] = self.tokens.join(self._number, key_states, value_states)
        except RuntimeError as error:
            raise RuntimeError(
                "the attention of the layer before was not seen: a budget needs attn_implementation='sdpa' "
                'all the time, and a cache whose last call failed cannot go on'
            ) from error
        self.length += block
        self.is_initialized = True
        joined[0].budget_layer = self
        return joined

    @property
    def whole(self) -> bool:
        """Whether the layer holds every token that is within its limit."""
        return self.tokens.whole(self._number)

    def begin(self, mask: torch.Tensor | None, queries: torch.Tensor) -> torch.Tensor | None:
        """Add the tokens of the block; the mask of their attention.

        Arguments:
            mask: what transformers made of the padding, bool ``[B, 1, Q, columns]``; None without any.
            queries: of the block, ``[B, heads, Q, head_dim]``.

        Raises:
            ValueError: the mask has holes, or padding on the right.
        """
        tokens, number, (heads, block) = self.tokens, self._number, queries.shape[1:3]
        held = tokens.append(number, None if number else self._added(mask, block))
        if self.whole and (mask is None or mask.shape[-1] == held.columns):
            return mask
        if block == 1 and tokens.all_real(number):
            return None
        # a single token sees all that has not expired
        seen = held.visible(block, None if block == 1 else self._window)
        # groups drop as many tokens as each other, but not as many of them have left a sliding window
        alike = seen.shape[1] == 1 or (held.step == 1 and self._window is None)
        return seen[:, :1] if alike else seen.repeat_interleave(heads // seen.shape[1], dim=1)

    def end(self, queries: torch.Tensor, scale: float | None) -> None:
        """Take in the queries of the block, and drop what is over the budget."""
        self.tokens.scale = scale
        self.tokens.observe(self._number, queries)

    def _added(self, mask: torch.Tensor | None, block: int) -> list[int] | None:
        """Tokens of the block in each row, read from the mask: a token sees itself, padding sees nothing."""
        if mask is None:
            return None
        seen = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
        own = seen.diagonal(seen.shape[2] - block, dim1=1, dim2=2)
        added, visible_last = own.sum(1).tolist(), seen[:, -1].sum(1).tolist()
        before = self.tokens.seen or [0] * len(added)
        padded_left = own.long().diff(dim=1).ge(0).all().item()
        longest = [least(count + new, self._window) for count, new in zip(before, added, strict=True)]
        inside = any(count and new < block for count, new in zip(before, added, strict=True))
        if not padded_left or inside or visible_last != longest:
            raise ValueError(
                'a cache under a budget takes padding on the left of a row alone, without holes; write '
                "tokenizer.padding_side = 'left'"
            )
        return added

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """Columns that a full cache would have, and the first one's number."""
        block = query_length if isinstance(query_length, int) else query_length.shape[0]
        first = 0 if self._window is None else max(0, self.length - self._window + 1)
        return self.length - first + block, first

    def get_seq_length(self, *_: Any) -> int:
        """Tokens seen so far, padding counted: positions follow from it."""
        return self.length

    def get_max_length(self) -> int:
        """-1: no maximum."""
        return -1

    get_max_cache_shape = get_max_length


@uncompiled
def budget_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: Any,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' ``sdpa`` attention; keys that a :class:`~lzero_kv.llm.BudgetCache` returned bring their
    layer with them, all others pass as they are."""
    layer = getattr(key, 'budget_layer', None)
    if layer is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **others)
    # the layer holds these keys: without the way back both are freed with the last reference
    del key.budget_layer
    if others.get('output_attentions'):
        raise ValueError('output_attentions=True is not possible under a budget; leave it out')
    mask = layer.begin(attention_mask, query)
    with nullcontext() if query.shape[2] > 1 or layer.whole else NO_PLANS:
        output = sdpa_attention_forward(module, query, key, value, mask, **others)
    layer.end(query, others.get('scaling'))
    return output


class _NoPlans:
    """Attention without cuDNN, which torch prefers on a Hopper GPU in half precision.

    cuDNN makes a plan for each number of keys that it has not seen, in 35 ms on an H200: at a single token,
    one for each layer whose number of tokens is its own. Layers that hold every token keep torch's choice,
    and with it every bit of transformers. torch has one switch for all threads: the first one inside turns
    it off, the last one outside sets it as it was.
    """

    def __init__(self) -> None:
        self._lock, self._inside, self._allowed = threading.Lock(), 0, True

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._allowed = torch.backends.cuda.cudnn_sdp_enabled()
                torch.backends.cuda.enable_cudnn_sdp(False)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                torch.backends.cuda.enable_cudnn_sdp(self._allowed)


NO_PLANS = _NoPlans()
