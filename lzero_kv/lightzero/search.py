"""Monte Carlo tree search over cached nodes: the host's tree, statistics and transforms, with nodes named by
the search."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lzero_kv.cache.transfer import to_device
from lzero_kv.lightzero.host import scalar_transforms
from lzero_kv.lightzero.inference.heads import expected_scalars


def cached_search(
    mcts: Any,
    tree: Any,
    roots: Any,
    model: Any,
    latent_state_roots: np.ndarray,
    to_play_batch: Any,
    timestep: Any = None,
    task_id: Any = None,
) -> FirstActions:
    """Run ``num_simulations`` simulations for a batch of prepared roots.

    The host passes only latent states from one simulation to the next; here each child names its parent, so
    that equal latents with different histories stay apart, no latent leaves the device, and positions need no
    search depth.

    Args:
        mcts: the host's search object, for its configuration and its transform of value and reward logits.
        tree: the host's compiled tree module.
        roots: prepared roots, expanded in place.
        model: a UniZero model whose world model keeps the cache.
        latent_state_roots: ``[B, 1, embed]`` as the host passes it.
        to_play_batch: player of each root.
        timestep: step of the episode of each root; only roots without a stored history need it.
        task_id: not read; the host's git main names it. All of these names are the host's.

    Returns:
        The latent states behind the first actions.

    Raises:
        RuntimeError: the model predicts nan or inf; names rows and simulation.
    """
    begun = time.perf_counter()
    config, rows, device = mcts._cfg, roots.num, torch.device(mcts._cfg.device)
    continuous = bool(config.model.get('continuous_action_space', False))
    sampled = hasattr(roots, 'get_sampled_actions')
    more = [continuous] if sampled else []
    if 'deterministic' in config and not sampled:
        more.append(bool(config.deterministic))
    transforms = scalar_transforms(mcts)
    first = FirstActions()
    # a step of a small model takes 0.9 of its time so; captured graphs were not run like this
    with torch.inference_mode() if device.type == 'cpu' else torch.no_grad():
        if model.training:  # walking through all modules takes as long as a third of a simulation
            model.eval()
        grown = model.world_model.begin_search(latent_state_roots, timestep, config.num_simulations)
        bounds = tree.MinMaxStatsList(rows)
        bounds.set_delta(config.value_delta_max)
        with model.world_model.clean_on_failure():
            for simulation in range(config.num_simulations):
                results = tree.ResultsWrapper(num=rows)
                players = to_play_batch if config.env_type == 'not_board_games' else list(to_play_batch)
                arguments = [
                    roots,
                    config.pb_c_base,
                    config.pb_c_init,
                    config.discount_factor,
                    bounds,
                    results,
                    players,
                ]
                parents, _, actions, players = tree.batch_traverse(*arguments, *more)
                traversed = parents, actions
                actions = to_device(np.asarray(actions), device)
                output = grown.expand(np.asarray(parents), actions if continuous else actions.long())
                first.add(*traversed, output.latent)
                value, reward = expected_scalars(transforms, (output.value, output.reward))
                policy = output.policy.squeeze(1).cpu().numpy()
                check_finite(simulation, value=value, reward=reward, policy=policy)
                tree.batch_backpropagate(
                    simulation + 1,
                    config.discount_factor,
                    reward.tolist(),
                    value.tolist(),
                    policy.tolist(),
                    bounds,
                    results,
                    players,
                )
    simulations = rows * config.num_simulations
    model.world_model.timings.count_search(simulations, time.perf_counter() - begun)
    return first


class FirstActions:
    """Latent states behind the first actions of a search, ``[row][action]`` as the host's dictionaries.

    The host reads them to decode texts alone, so nothing is copied before. An action that was never tried
    has None.
    """

    def __init__(self) -> None:
        self._steps: list[tuple[list[int], list[Any], torch.Tensor]] = []

    def add(self, parents: list[int], actions: list[Any], latents: torch.Tensor) -> None:
        """Note a simulation: its parents, actions and children's latent states ``[B, 1, embed]``."""
        self._steps.append((parents, actions, latents))

    def __getitem__(self, key: int) -> Any:
        return _FirstActionsOfRow(self._steps, key)


@dataclass(frozen=True)
class _FirstActionsOfRow:
    steps: list[tuple[list[int], list[Any], torch.Tensor]]
    row: int

    def __getitem__(self, action: int) -> np.ndarray | None:
        for parents, actions, latents in self.steps:
            if not parents[self.row] and int(actions[self.row]) == int(action):
                return latents[self.row].cpu().numpy()
        return None


def check_finite(simulation: int, **predictions: np.ndarray) -> None:
    """Refuse predictions (each ``[B, ...]``) that the tree could not order.

    Raises:
        RuntimeError: names what is not finite, in which rows and at which simulation.
    """
    for name, rows in predictions.items():
        finite = np.isfinite(rows)
        if not finite.all():
            broken = np.flatnonzero(~finite.reshape(len(rows), -1).all(axis=1)).tolist()
            raise RuntimeError(
                f'expected finite predictions, got nan or inf in {name} of rows {broken} at simulation '
                f'{simulation}; check the weights of the world model'
            )
