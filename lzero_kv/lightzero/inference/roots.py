"""Root inference: each ready environment's stored history grows by its last action and its new
observation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lzero_kv.cache.keys import NO_SLOT, NodeKey, RootKey
from lzero_kv.cache.transfer import to_device
from lzero_kv.cache.window import TOKENS_PER_STEP

from .attention import WindowsBeside, additive_mask, decode
from .budget import BudgetedRootStep, WindowBudget
from .contexts import RootContext, RootContexts
from .events import NO_HISTORIES, Histories, RootsInferred
from .heads import StepOutputs, action_embeddings, predict_policy_value
from .inputs import RootInputs
from .resources import InferenceResources
from .rows import ResidentRows


@dataclass(frozen=True)
class RootBatch:
    """The roots that a search starts from.

    Attributes:
        keys: one per row.
        latents: ``[B, 1, embed]``.
        tokens: ``[B, T, embed]`` raw embeddings of each root's window, right-aligned, zero in front.
        lengths: int64 ``[B]``, how many of them belong to the root.
        next_positions: int64 ``[B]``, logical position of each root's next token.
        held: int64 ``[B, 1 or layers]``, tokens that the layers hold of each root.
        stored: whether root inference stored their keys and values; else the search computes them.
    """

    keys: list[RootKey] | list[NodeKey]
    latents: torch.Tensor
    tokens: torch.Tensor
    lengths: np.ndarray
    next_positions: np.ndarray
    held: np.ndarray
    stored: bool = True


class RootStep:
    """Histories of a batch of environments, from load to store.

    Args:
        resources: of the world model.
        slots: int64 ``[B]``, where the histories are stored; ``NO_SLOT`` for none, or to be restored.

    Attributes:
        lengths: int64 ``[B]``, tokens of each history.
        next_positions: int64 ``[B]``, logical position of each history's next token.
    """

    def __init__(self, resources: InferenceResources, slots: np.ndarray) -> None:
        self._resources = resources
        self._manager = resources.manager
        self._moved: tuple[np.ndarray, torch.Tensor] | None = None
        geometry, rows = resources.geometry, len(slots)
        memory = resources.memory(ResidentRows.elements(geometry, rows, TOKENS_PER_STEP))
        self._resident = ResidentRows(geometry, self._manager, memory, rows, TOKENS_PER_STEP)
        self.lengths = np.zeros(rows, np.int64)
        self.next_positions = np.zeros(rows, np.int64)
        present = np.flatnonzero(slots != NO_SLOT)
        if len(present):
            self.lengths[present] = self._manager.lengths(slots[present])
            self.next_positions[present] = self._manager.next_positions(slots[present])
            self._resident.load(present, slots[present], int(self.lengths.max()))

    def restore(
        self, rows: np.ndarray, tokens: torch.Tensor, lengths: np.ndarray, next_positions: np.ndarray
    ) -> None:
        """Compute histories that are not stored.

        Args:
            rows: int64 ``[N]``.
            tokens: ``[N, kept, embed]`` raw embeddings, right-aligned.
            lengths, next_positions: int64 ``[N]``.
        """
        kv = self._resources.prefilled(tokens, lengths, next_positions)
        window = self._resident.buffer[..., : self._resources.window.kept, :]
        window.index_copy_(0, to_device(rows, kv.device), kv)
        self.lengths[rows], self.next_positions[rows] = lengths, next_positions

    def append(
        self,
        actions: torch.Tensor | None,
        observations: torch.Tensor,
        first: np.ndarray,
        positions: np.ndarray,
        windows: torch.Tensor,
    ) -> torch.Tensor:
        """Append an action and the observation behind it to every row, in one pass.

        Args:
            actions: ``[B, embed]`` raw embeddings; None where no row has one.
            observations: ``[B, embed]`` raw embeddings.
            first: bool ``[B]``: rows that begin with their observation and have no action.
            positions: int64 ``[B]``, logical positions of the observations in those rows.
            windows: ``[B, kept, embed]`` raw embeddings of the windows after this step. Those that overflow
                are computed from them in the same pass, where windows are exact.

        Returns:
            ``[B, embed]``, the transformer's output of the observations.
        """
        resources = self._resources
        places = np.stack([self.lengths, self.lengths + ~first], axis=1)
        ahead = self.next_positions
        logical = np.stack([ahead, np.where(first, positions, ahead + 1)], axis=1)
        new, x = TOKENS_PER_STEP, observations[:, None]
        if actions is None:
            new, places, logical = 1, places[:, 1:], logical[:, 1:]
        else:
            x = torch.stack([actions, observations], dim=1)
        held = int(self.lengths.max())
        columns = np.arange(held + new)
        behind = (
            np.arange(held, held + new)[:, None] - columns
        )  # how far in front of the token a column stands
        visible = (behind >= 0) & (behind <= places[:, :, None])
        mask = additive_mask(visible[:, None], x)
        end = self._resident.buffer.shape[4]
        placed = resources.positions.at(places, logical)
        beside = self._windows_that_move(first, logical[:, -1] + 1, windows)
        hidden = decode(
            resources.weights,
            self._resident.columns(self._resident.buffer, [end - new - held], end, new, mask),
            placed.add_to(x),
            placed.rotation,
            windows=beside,
        )
        self.lengths, moved = resources.window.advance(places[:, -1] + 1)
        self.next_positions = logical[:, -1] + 1
        shift = resources.shift_table()
        if beside is not None:
            self._moved = np.flatnonzero(moved), beside.out
        elif shift is not None and moved.any():
            kept = resources.window.kept
            added = (shift[:kept] - shift[TOKENS_PER_STEP : kept + TOKENS_PER_STEP]).permute(1, 2, 3, 0, 4)
            rows = np.flatnonzero(moved)
            kv = self._resident.buffer.index_select(0, to_device(rows, added.device))
            self._moved = rows, kv[..., TOKENS_PER_STEP:, :] + added
        return hidden

    def _windows_that_move(
        self, first: np.ndarray, next_positions: np.ndarray, windows: torch.Tensor
    ) -> WindowsBeside | None:
        """The windows that this step overflows, where they are exact; computed in a tensor of their own."""
        resources = self._resources
        moving = np.flatnonzero(
            resources.window.advance(self.lengths + np.where(first, 1, TOKENS_PER_STEP))[1]
        )
        if not resources.exact or not len(moving):
            return None
        tokens = windows.index_select(0, to_device(moving, windows.device))
        out = torch.empty_like(self._resident.buffer[: len(moving), ..., TOKENS_PER_STEP:, :])
        lengths = np.full(len(moving), tokens.shape[1])
        return resources.windows_beside(tokens, lengths, next_positions[moving], out, None)

    @property
    def held(self) -> np.ndarray:
        """int64 ``[B, 1 or layers]``: tokens that the layers hold of each history."""
        return self.lengths[:, None]

    def store(self, keys: Sequence[RootKey]) -> None:
        """Store all histories under their keys, without what left their windows."""
        kept = self._resident.buffer[..., TOKENS_PER_STEP:, :]
        if self._moved is not None:
            rows, windows = self._moved
            kept.index_copy_(0, to_device(rows, windows.device), windows)
        newest = int(self.lengths.max())
        kv = kept[..., kept.shape[4] - newest :, :].flatten(1, 2)
        self._manager.store(keys, kv, self.lengths, self.next_positions)

    def histories(self, behind: int) -> list[torch.Tensor]:
        """Copies of the histories, whose newest tokens stand ``behind`` columns from the end."""
        end = self._resident.buffer.shape[4] - behind
        return [
            row[..., end - length : end, :].flatten(0, 1).transpose(1, 2).flatten(2).clone()
            for row, length in zip(self._resident.buffer, self.lengths.tolist(), strict=True)
        ]


class RootInference:
    """Serves ``forward_initial_inference`` of collection and evaluation.

    Args:
        resources: of the world model.
        budget: layer budgets of the windows; None where all tokens are kept.
    """

    def __init__(self, resources: InferenceResources, budget: WindowBudget | None) -> None:
        self._resources = resources
        self._budget = budget
        self._world_model = resources.world_model
        self._manager = resources.manager
        self._several = resources.manager.cache_config.root_slots > 1
        self.contexts = RootContexts(resources.window.observations, resources.manager.cache_config.root_slots)

    def infer(self, given: RootInputs) -> tuple[RootBatch, StepOutputs]:
        """Append (last action, new observation) to each environment's history and predict at its end.

        Raises:
            ValueError: non-finite latent states, unknown environments or actions, or inputs of different
                lengths. Nothing is stored.
            RuntimeError: the transformer gives nan or inf. Nothing is stored.
        """
        given.check(environments=len(self._manager.init_pools))
        resources, first = self._resources, given.first
        resources.take_weights()
        latents = self._encode(given)
        actions = None if first.all() else action_embeddings(self._world_model, given.last_actions, first)
        if self._budget is not None:
            self._budget.advance()
        step, found = self._load(given)
        copied = any(observer.needs_histories for observer in resources.observers)
        served = Histories(step.histories(TOKENS_PER_STEP), found) if copied else NO_HISTORIES
        windows = self._grown_windows(given, actions, latents)
        before = np.where(found, step.lengths, 0)
        moved = resources.window.advance(step.lengths + given.new_tokens)[1]
        hidden = step.append(actions, latents[:, 0], first, 2 * np.maximum(given.timesteps, 0), windows)
        self._check_finite(hidden, given.env_ids)
        outputs = predict_policy_value(resources.weights, hidden)
        self._remember(given, step, actions, latents)
        self._count(given, step.lengths, before, moved)
        self._store(given, step)
        if resources.observers:
            stored = NO_HISTORIES
            if copied:
                rounded = resources.shift_table() is not None
                stored = Histories(step.histories(0), np.ones(len(first), dtype=bool), rounded)
            event = RootsInferred(given, latents, served, stored, outputs)
            for observer in resources.observers:
                observer.roots_inferred(event)
        roots = RootBatch(given.keys, latents, windows, step.lengths, step.next_positions, step.held)
        return roots, outputs

    def _count(self, given: RootInputs, lengths: np.ndarray, before: np.ndarray, moved: np.ndarray) -> None:
        """Count the tokens that were computed and those that were served: of ``before`` tokens (int64
        ``[B]``) that were there, ``lengths`` are held now."""
        for row, env_id in enumerate(given.env_ids):
            if moved[row] and self._resources.exact:
                self._manager.count_window(int(lengths[row]), env_id=env_id)
            else:
                self._manager.count_step(int(given.new_tokens[row]), int(before[row]), env_id=env_id)

    def _store(self, given: RootInputs, step: RootStep | BudgetedRootStep) -> None:
        for row, env_id in enumerate(given.env_ids):
            if given.first[row] or not self._several:
                self._manager.init_pools[env_id].clear()  # what came before is not asked for again
        step.store(given.keys)

    def _encode(self, given: RootInputs) -> torch.Tensor:
        latents = self._world_model.tokenizer.encode_to_obs_embeddings(given.observations)
        finite = torch.isfinite(latents).flatten(1).all(dim=1).tolist()
        if not all(finite):
            broken = [env_id for env_id, ok in zip(given.env_ids, finite, strict=True) if not ok]
            raise ValueError(
                f'expected finite latent states, got nan or inf for environments {broken}; '
                f'check their observations and the weights of the encoder. Nothing was stored'
            )
        return latents

    def _check_finite(self, hidden: torch.Tensor, env_ids: Sequence[int]) -> None:
        finite = torch.isfinite(hidden).all(dim=1).tolist()
        if not all(finite):
            broken = [env_id for env_id, ok in zip(env_ids, finite, strict=True) if not ok]
            raise RuntimeError(
                f'expected finite predictions, got nan or inf at the roots of environments {broken}; '
                f'check the weights of the world model. Nothing was stored'
            )

    def _load(self, given: RootInputs) -> tuple[RootStep | BudgetedRootStep, np.ndarray]:
        """The rows' stored histories, computed again where they are gone; and which were found (bool
        ``[B]``)."""
        slots = np.full(len(given.first), NO_SLOT, dtype=np.int64)
        known = np.flatnonzero(~given.first)
        before = [RootKey(given.env_ids[row], given.last_digests[row]) for row in known]
        for key in before:
            if self.contexts.get(*key) is None:
                self._manager.init_pools[key.env_id].clear()  # keys and values of another episode, if any
        if before:
            slots[known] = self._manager.lookup(before)
        missed = [int(row) for row in known if slots[row] == NO_SLOT]
        step = self._step(slots)
        if missed:
            contexts = [self._context(given, row) for row in missed]
            self._restore_tokens(contexts)
            kept = self._resources.window.kept
            lengths = np.array([len(context.tokens) for context in contexts], dtype=np.int64)
            positions = np.array([context.next_position for context in contexts], dtype=np.int64)
            tokens = torch.stack([right_aligned(list(context.tokens), kept) for context in contexts])
            step.restore(np.array(missed), tokens, lengths, positions)
            for row, length in zip(missed, lengths.tolist(), strict=True):
                self._manager.count_rebuilt(length, roots=True, env_id=given.env_ids[row])
        return step, slots != NO_SLOT

    def _step(self, slots: np.ndarray) -> RootStep | BudgetedRootStep:
        """The histories in ``slots`` (int64 ``[B]``)."""
        if self._budget is None:
            return RootStep(self._resources, slots)
        return BudgetedRootStep(self._resources, self._budget, slots)

    def _context(self, given: RootInputs, row: int) -> RootContext:
        """The window that a missing root is computed from: the environment's, or the last observation
        alone."""
        env_id, digest = given.env_ids[row], given.last_digests[row]
        context = self.contexts.get(env_id, digest)
        if context is None:
            position = 2 * max(int(given.timesteps[row]) - 1, 0) + 1
            context = self.contexts.start(env_id, given.last_observations[row].clone(), digest, position)
        return context

    def _restore_tokens(self, contexts: Sequence[RootContext]) -> None:
        """Embed the raw windows of ``contexts`` again, all observations in one batch."""
        stale = [context for context in contexts if not context.tokens]
        if not stale:
            return
        observations = torch.stack([observation for context in stale for observation in context.observations])
        latents = iter(self._world_model.tokenizer.encode_to_obs_embeddings(observations)[:, 0])
        actions = [action for context in stale for action in context.actions]
        embedded = iter(action_embeddings(self._world_model, actions)) if actions else iter(())
        for context in stale:
            for step in range(len(context.observations)):
                if step:
                    context.tokens.append(next(embedded))
                context.tokens.append(next(latents))

    def _grown_windows(
        self, given: RootInputs, actions: torch.Tensor | None, latents: torch.Tensor
    ) -> torch.Tensor:
        """Raw embeddings ``[B, kept, embed]`` of every row's window after this step, right-aligned, zero in
        front."""
        kept, windows = self._resources.window.kept, []
        for row, env_id in enumerate(given.env_ids):
            tokens = [latents[row, 0]]
            context = None if given.first[row] else self.contexts.get(env_id, given.last_digests[row])
            if context is not None and actions is not None:
                tokens = [*context.tokens, actions[row], *tokens]
            windows.append(right_aligned(tokens[-kept:], kept))
        return torch.stack(windows)

    def _remember(
        self,
        given: RootInputs,
        step: RootStep | BudgetedRootStep,
        actions: torch.Tensor | None,
        latents: torch.Tensor,
    ) -> None:
        """Extend every environment's window by this step."""
        for row, (env_id, digest) in enumerate(given.keys):
            observation = given.observations[row]
            if given.first[row]:
                context = self.contexts.start(env_id, observation, digest, int(step.next_positions[row]))
            else:
                context = self.contexts.extend(
                    env_id, given.last_digests[row], given.last_actions[row], observation, digest
                )
                if actions is not None:
                    context.tokens.append(actions[row])
            context.tokens.append(latents[row, 0])


def right_aligned(tokens: Sequence[torch.Tensor], width: int) -> torch.Tensor:
    """Tokens, each ``[embed]``, at the end of ``[width, embed]``, zeros in front."""
    out = tokens[0].new_zeros(width, tokens[0].shape[-1])
    out[width - len(tokens) :] = torch.stack(list(tokens))
    return out
