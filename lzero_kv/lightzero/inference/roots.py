"""Root inference: each ready environment's stored history grows by its last action and its new
observation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lzero_kv.cache.keys import NO_SLOT, NodeKey, RootKey, digest_rows
from lzero_kv.cache.manager import KVCacheManager
from lzero_kv.cache.transfer import to_device
from lzero_kv.lightzero.inference.contexts import RootContext, RootContexts
from lzero_kv.lightzero.inference.events import NO_HISTORIES, RootsInferred
from lzero_kv.lightzero.inference.flight import Flight
from lzero_kv.lightzero.inference.flights import Flights
from lzero_kv.lightzero.inference.heads import StepOutputs, action_embeddings, predict_policy_value

NO_ACTION = -1


@dataclass(frozen=True)
class RootBatch:
    """The roots of the latest root inference, which a search starts from.

    Attributes:
        keys: one per row.
        latents: ``[B, 1, embed]``.
        tokens: ``[B, T, embed]`` raw embeddings of each root's window, right-aligned, zero in front.
        lengths: int64 ``[B]``, how many of them belong to the root.
        next_positions: int64 ``[B]``, logical position of each root's next token.
        kv: ``[B, 2 * layers, T, embed]`` keys and values of roots that are not stored under their keys; None
            where they are.
    """

    keys: list[RootKey] | list[NodeKey]
    latents: torch.Tensor
    tokens: torch.Tensor
    lengths: np.ndarray
    next_positions: np.ndarray
    kv: torch.Tensor | None = None


class RootInference:
    """Serves ``forward_initial_inference`` of collection and evaluation."""

    def __init__(self, world_model: Any, manager: KVCacheManager, flights: Flights) -> None:
        self._world_model = world_model
        self._manager = manager
        self._flights = flights
        self.contexts = RootContexts(flights.window.observations)

    def infer(
        self,
        env_ids: Sequence[int],
        last_observations: torch.Tensor,
        last_actions: Sequence[Any],
        observations: torch.Tensor,
        timesteps: np.ndarray,
    ) -> tuple[RootBatch, StepOutputs]:
        """Append (last action, new observation) to each environment's history and predict at its end.

        Args:
            env_ids: one per row, all different.
            last_observations: ``[B, ...]``, what the last action was chosen for; ignored in rows without one.
            last_actions: one per row; -1 where the episode begins.
            observations: ``[B, ...]``, the new ones.
            timesteps: int64 ``[B]``, step of the episode, negative where the environment does not tell.

        Raises:
            ValueError: non-finite latent states, unknown environments or actions, or inputs of different
                lengths. Nothing is stored.
            RuntimeError: the transformer gives nan or inf. Nothing is stored.
        """
        first = np.array([is_first_step(action) for action in last_actions])
        self._check(env_ids, last_observations, last_actions, observations, first)
        self._flights.begin_roots()
        latents = self._encode(observations, env_ids)
        digests = digest_rows(observations)
        last_digests = [0] * len(first) if first.all() else digest_rows(last_observations[: len(first)])
        actions = None if first.all() else action_embeddings(self._world_model, last_actions, first)
        flight, found = self._load(env_ids, last_digests, first, last_observations, timesteps)
        observers = self._world_model.observers
        copied = any(observer.needs_histories for observer in observers)
        served = flight.histories(found) if copied else NO_HISTORIES
        shift = self._flights.window_shift()
        if self._flights.host_padding and not first.all():
            flight.pad_as_host(~first)
        tokens = self._grown_windows(env_ids, last_digests, first, actions, latents)
        moving = self._flights.moving(flight.lengths, first)
        positions = 2 * np.maximum(timesteps, 0)
        stays = tokens[to_device(moving, tokens.device)]
        hidden = flight.append_step(actions, latents[:, 0], first, positions, moving, stays)
        self._check_finite(hidden, env_ids)
        outputs = predict_policy_value(self._flights.prepared, hidden)
        self._remember(env_ids, first, last_actions, observations, digests, flight, actions, latents)
        keys = [RootKey(env_id, digest) for env_id, digest in zip(env_ids, digests, strict=True)]
        for env_id in env_ids:
            self._manager.init_pools[env_id].clear()  # a root's predecessor is never asked for again
        for row in moving:
            self._manager.count_window(self._flights.window.kept, env_id=env_ids[row])
        flight.slide(shift)
        flight.store(keys)
        if observers:
            stored = flight.histories(np.ones(len(first), dtype=bool)) if copied else NO_HISTORIES
            event = RootsInferred(
                env_ids,
                first,
                last_observations,
                last_actions,
                observations,
                timesteps,
                keys,
                latents,
                served,
                stored,
                outputs,
            )
            for observer in observers:
                observer.roots_inferred(event)
        return RootBatch(keys, latents, tokens, flight.lengths, flight.next_positions), outputs

    def _check(
        self,
        env_ids: Sequence[int],
        last_observations: torch.Tensor,
        last_actions: Sequence[Any],
        observations: torch.Tensor,
        first: np.ndarray,
    ) -> None:
        rows, pools = len(observations), len(self._manager.init_pools)
        if (
            len(last_actions) != rows
            or len(env_ids) != rows
            or (not first.all() and len(last_observations) < rows)
        ):
            raise ValueError(
                f'expected one last observation, last action and environment id for each of {rows} '
                f'observations, got {len(last_observations)}, {len(last_actions)} and {len(env_ids)}'
            )
        unknown = [env_id for env_id in env_ids if not 0 <= env_id < pools]
        if unknown or len(set(env_ids)) != rows:
            raise ValueError(
                f'expected different environment ids in [0, {pools}), got {list(env_ids)}; '
                f'write env_num=max(collector_env_num, evaluator_env_num) in world_model_cfg'
            )

    def _encode(self, observations: torch.Tensor, env_ids: Sequence[int]) -> torch.Tensor:
        latents = self._world_model.tokenizer.encode_to_obs_embeddings(observations)
        finite = torch.isfinite(latents).flatten(1).all(dim=1).tolist()
        if not all(finite):
            broken = [env_id for env_id, ok in zip(env_ids, finite, strict=True) if not ok]
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

    def _load(
        self,
        env_ids: Sequence[int],
        last_digests: list[int],
        first: np.ndarray,
        last_observations: torch.Tensor,
        timesteps: np.ndarray,
    ) -> tuple[Flight, np.ndarray]:
        """The rows' stored histories, computed again where they are gone; and which were found (bool
        ``[B]``)."""
        slots = np.full(len(first), NO_SLOT, dtype=np.int64)
        known = np.flatnonzero(~first)
        for row in known:
            if self.contexts.get(env_ids[row], last_digests[row]) is None:
                self._manager.init_pools[env_ids[row]].clear()  # keys and values of another episode, if any
        if len(known):
            slots[known] = self._manager.lookup([RootKey(env_ids[row], last_digests[row]) for row in known])
        missed = [int(row) for row in known if slots[row] == NO_SLOT]
        flight = self._flights.load(slots, watched=True)
        if missed:
            contexts = [
                self._context(env_ids[row], last_digests[row], last_observations[row], int(timesteps[row]))
                for row in missed
            ]
            self._restore_tokens(contexts)
            kept = self._flights.window.kept
            lengths = np.array([len(context.tokens) for context in contexts], dtype=np.int64)
            positions = np.array([context.next_position for context in contexts], dtype=np.int64)
            tokens = torch.stack([right_aligned(list(context.tokens), kept) for context in contexts])
            flight.restore(np.array(missed), tokens, lengths, positions)
            for row, length in zip(missed, lengths.tolist(), strict=True):
                self._manager.count_rebuilt(length, roots=True, env_id=env_ids[row])
        return flight, slots != NO_SLOT

    def _context(self, env_id: int, digest: int, observation: torch.Tensor, timestep: int) -> RootContext:
        """The window that a missing root is computed from: the environment's, or the last observation
        alone."""
        context = self.contexts.get(env_id, digest)
        if context is None:
            context = self.contexts.start(env_id, observation, digest, 2 * max(timestep - 1, 0) + 1)
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
        self,
        env_ids: Sequence[int],
        last_digests: list[int],
        first: np.ndarray,
        actions: torch.Tensor | None,
        latents: torch.Tensor,
    ) -> torch.Tensor:
        """Raw embeddings ``[B, kept, embed]`` of every row's window after this step, right-aligned, zero in
        front."""
        kept, windows = self._flights.window.kept, []
        for row, env_id in enumerate(env_ids):
            tokens = [latents[row, 0]]
            context = None if first[row] else self.contexts.get(env_id, last_digests[row])
            if context is not None and actions is not None:
                tokens = [*context.tokens, actions[row], *tokens]
            windows.append(right_aligned(tokens[-kept:], kept))
        return torch.stack(windows)

    def _remember(
        self,
        env_ids: Sequence[int],
        first: np.ndarray,
        last_actions: Sequence[Any],
        observations: torch.Tensor,
        digests: list[int],
        flight: Flight,
        actions: torch.Tensor | None,
        latents: torch.Tensor,
    ) -> None:
        """Extend every environment's window by this step."""
        for row, env_id in enumerate(env_ids):
            if first[row]:
                context = self.contexts.start(
                    env_id, observations[row], digests[row], int(flight.next_positions[row])
                )
            else:
                context = self.contexts.extend(env_id, last_actions[row], observations[row], digests[row])
                if actions is not None:
                    context.tokens.append(actions[row])
            context.tokens.append(latents[row, 0])


def is_first_step(action: Any) -> bool:
    """Whether ``action`` is the host's mark of a step that nothing came before: the number -1."""
    return np.ndim(action) == 0 and int(action) == NO_ACTION


def right_aligned(tokens: Sequence[torch.Tensor], width: int) -> torch.Tensor:
    """Tokens, each ``[embed]``, at the end of ``[width, embed]``, zeros in front."""
    out = tokens[0].new_zeros(width, tokens[0].shape[-1])
    out[width - len(tokens) :] = torch.stack(list(tokens))
    return out
