"""Monte Carlo tree search over cached nodes: the host's tree, statistics and transforms, with nodes named by
the search."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from lzero_kv.cache.transfer import to_device
from lzero_kv.lightzero.inference.heads import expected_scalars


def cached_search(
    mcts: Any,
    tree: Any,
    roots: Any,
    model: Any,
    latent_state_roots: np.ndarray,
    to_play: Any,
    timestep: Any = None,
) -> None:
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
        to_play: player of each root.
        timestep: step of the episode of each root; only roots without a stored history need it.

    Raises:
        RuntimeError: the model predicts nan or inf; names rows and simulation.
    """
    config, rows, device = mcts._cfg, roots.num, torch.device(mcts._cfg.device)
    continuous = bool(config.model.get('continuous_action_space', False))
    sampled = hasattr(roots, 'get_sampled_actions')
    with torch.no_grad():
        model.eval()
        grown = model.world_model.begin_search(latent_state_roots, timestep, config.num_simulations)
        bounds = tree.MinMaxStatsList(rows)
        bounds.set_delta(config.value_delta_max)
        with model.world_model.clean_on_failure():
            for simulation in range(config.num_simulations):
                results = tree.ResultsWrapper(num=rows)
                players = to_play if config.env_type == 'not_board_games' else list(to_play)
                arguments = [
                    roots,
                    config.pb_c_base,
                    config.pb_c_init,
                    config.discount_factor,
                    bounds,
                    results,
                    players,
                ]
                parents, _, actions, players = tree.batch_traverse(
                    *arguments, *([continuous] if sampled else [])
                )
                actions = to_device(np.asarray(actions), device)
                output = grown.expand(np.asarray(parents), actions if continuous else actions.long())
                value, reward = expected_scalars(
                    mcts.inverse_scalar_transform_handle, (output.value, output.reward)
                )
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
