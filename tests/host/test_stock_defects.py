"""What the stock cache does wrong, seen through real searches; the cache manager must do it right.

Every test states the right behaviour. It is expected to fail with the stock cache, for the reason given,
and must pass with the manager. Where several defects would show at once, the stock policy is helped over
the others, so that each test fails for its own reason: short windows keep all rows equally long (no
padding), one environment leaves nothing to pad, and ``position_correction_refreshed`` renews what the host
computes from weights that it then overwrites.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lzero_kv.validation.oracle import Oracle
from testing.episodes import Episodes, Root
from testing.judging import judge_nodes, judge_reanalysis, judge_roots
from testing.lookups import StockLookups
from testing.models import collect_model, load_weights, make_policy, random_weights, world_model_of
from testing.reanalysis import reanalyze
from testing.replay import child_of, root_of

ONE_STEP, TWO_STEPS, FOUR_STEPS = 1, 2, 4  # infer_context_length: windows of 2, 4 and 8 tokens


def stock_fails(reason: str, raises: Any = AssertionError) -> Callable[[Any], Any]:
    """Run a test with the stock cache, expected to fail, and with the manager and either of its windows."""
    stock = pytest.param('stock', marks=pytest.mark.xfail(strict=True, raises=raises, reason=reason))
    return pytest.mark.parametrize('cache', [stock, 'shift', 'rebuild'])


def policy_with(cache: str, family: str, environments: int, **options: Any) -> Any:
    """The family's policy with ``environments`` environments to collect from, served by ``cache``: 'stock',
    or the manager with the window of that name.
    """
    policy = untouched_policy_with(cache, family, environments, **options)
    if cache == 'stock':
        position_correction_refreshed(policy)
    return policy


def untouched_policy_with(cache: str, family: str, environments: int, **options: Any) -> Any:
    defaults: dict[str, Any] = dict(collector_env_num=environments, evaluator_env_num=1)
    if cache == 'stock':
        return make_policy(family, kv=False, **defaults | options)
    return make_policy(family, kv=True, kv_cache={'window': cache}, **defaults | options)


def window_of(cache: str) -> str:
    """The rule by which a window of ``cache`` is to be judged."""
    return 'rebuild' if cache == 'rebuild' else 'shift'


def position_correction_refreshed(policy: Any) -> None:
    model = world_model_of(policy)
    if not model.config.rotary_emb:
        model.precompute_pos_emb_diff_kv()


def last_of(roots: list[Root], environments: int) -> list[Root]:
    return roots[-environments:]


@pytest.mark.parametrize('simulations', [100, 200])
@stock_fails('the recurrent ring holds 50 nodes per environment, and keys of overwritten slots stay')
def test_no_node_is_served_another_nodes_keys_and_values(cache: str, simulations: int) -> None:
    policy = policy_with(cache, 'tiny', 8, num_simulations=simulations, infer_context_length=TWO_STEPS)
    roots = last_of(Episodes(policy, range(8)).run(2), 8)
    verdict = judge_nodes(policy, roots, window_of(cache))
    assert verdict.total == 8 * simulations
    assert verdict.wrong == 0, str(verdict)


def test_the_stock_ring_is_right_as_long_as_a_search_fits() -> None:
    """Control: with 50 simulations nothing is overwritten, and every node of the stock search equals its
    recomputation.
    """
    policy = policy_with('stock', 'tiny', 8, num_simulations=50, infer_context_length=TWO_STEPS)
    lookups = StockLookups(policy)
    with lookups.counted():
        roots = Episodes(policy, range(8)).run(2)
    assert (lookups.wrong, lookups.total) == (0, 800)
    verdict = judge_nodes(policy, last_of(roots, 8))
    assert verdict.wrong == 0, str(verdict)


@pytest.mark.parametrize('simulations', [100, 200])
def test_the_stock_ring_serves_wrong_keys_and_values_beyond(simulations: int) -> None:
    """Control: lookups of the stock package counted at the source; recomputation finds every wrong one."""
    policy = policy_with('stock', 'tiny', 8, num_simulations=simulations, infer_context_length=TWO_STEPS)
    lookups = StockLookups(policy)
    with lookups.counted():
        roots = Episodes(policy, range(8)).run(1)
    assert lookups.total == 8 * simulations
    assert 0.01 < lookups.wrong / lookups.total < 0.5
    # Nodes below a wrong one are wrong too, though their own lookup is right.
    assert judge_nodes(policy, roots).wrong >= lookups.wrong


@stock_fails('a recurrent miss indexes a list with None; a window of one step never stores', raises=TypeError)
def test_a_window_of_one_step_is_searched(cache: str) -> None:
    policy = policy_with(cache, 'tiny', 3, num_simulations=10, infer_context_length=ONE_STEP)
    roots = Episodes(policy, range(3)).run(3)
    assert judge_roots(policy, roots, window_of(cache)).wrong == 0
    assert judge_nodes(policy, roots, window_of(cache)).wrong == 0


@stock_fails('a recurrent miss indexes a list with None', raises=TypeError)
def test_a_cache_cleared_below_the_root_is_rebuilt(cache: str) -> None:
    policy = policy_with(cache, 'tiny', 2)
    model, world_model = collect_model(policy), world_model_of(policy)
    observations, timestep = torch.randn(2, 7), [np.array(0), np.array(0)]
    root = model.initial_inference(torch.zeros(2, 7), [-1, -1], observations, timestep)
    for store in (*world_model.past_kv_cache_init_infer_envs, world_model.past_kv_cache_recurrent_infer):
        store.clear()
    actions = torch.tensor([1, 3])
    answer = model.recurrent_inference([(root.latent_state.numpy(), actions)], 0, [1, 1], timestep)
    oracle = Oracle(world_model, window_of(cache))
    for row in range(2):
        expected = child_of(oracle, root_of(oracle, [observations[row]], []), actions[row])
        torch.testing.assert_close(answer.value[row], expected.value, rtol=0.0, atol=1e-3)


@stock_fails('the row number is taken for the environment id when only some environments are ready')
def test_ready_environments_keep_their_own_contexts(cache: str) -> None:
    policy = policy_with(cache, 'tiny', 3, num_simulations=3, infer_context_length=FOUR_STEPS)
    roots = Episodes(policy, range(3)).run([{0, 1, 2}, {0, 1, 2}, {1, 2}])
    assert [root.env for root in roots[-2:]] == [1, 2]
    verdict = judge_roots(policy, roots[-2:], window_of(cache))
    assert verdict.wrong == 0, str(verdict)


@stock_fails('shorter rows are padded in front with zero keys that attention sees')
def test_a_neighbours_depth_changes_nothing(cache: str) -> None:
    plays = []
    for neighbour in (1, 2):
        policy = policy_with(
            cache, 'tiny', 2, num_simulations=25, infer_context_length=FOUR_STEPS, dtype=torch.float64
        )
        plays.append([root for root in Episodes(policy, [0, neighbour]).run(3) if root.env == 0])
    for root, again in zip(*plays, strict=True):
        assert [node.parent for node in root.nodes] == [node.parent for node in again.nodes]
        assert root.visits == again.visits
        largest = max(np.abs(a.policy - b.policy).max() for a, b in zip(root.nodes, again.nodes, strict=True))
        assert largest < 1e-9


@stock_fails('the position correction is not renewed by load_state_dict')
def test_positions_are_right_after_loading_weights(cache: str) -> None:
    policy = policy_with(cache, 'tiny', 1, num_simulations=2, infer_context_length=FOUR_STEPS)
    load_weights(policy, random_weights(collect_model(policy), seed=5))
    verdict = judge_roots(policy, Episodes(policy, [0]).run(6), window_of(cache))
    assert verdict.wrong == 0, str(verdict)


@stock_fails('the position correction is computed before the weights are initialised')
def test_positions_are_right_in_a_fresh_model(cache: str) -> None:
    policy = untouched_policy_with(cache, 'tiny', 1, num_simulations=2)
    verdict = judge_roots(policy, Episodes(policy, [0]).run(6), window_of(cache))
    assert verdict.wrong == 0, str(verdict)


@pytest.mark.parametrize('cache', ['stock', 'shift', 'rebuild'])
def test_positions_are_right_after_training(cache: str) -> None:
    """The host's training loop announces new weights; both caches must then use them."""
    policy = policy_with(cache, 'tiny', 1, num_simulations=2, infer_context_length=FOUR_STEPS)
    Episodes(policy, [0]).run(6)
    with torch.no_grad():
        for parameter in collect_model(policy).parameters():
            parameter.mul_(1.2).add_(0.01)
    policy.recompute_pos_emb_diff_and_clear_cache()
    verdict = judge_roots(policy, Episodes(policy, [1]).run(6), window_of(cache))
    assert verdict.wrong == 0, str(verdict)


@pytest.mark.parametrize('environments, context', [(1, FOUR_STEPS), (4, TWO_STEPS)])
@stock_fails('the key is a hash of the latent alone: different histories with equal latents share an entry')
def test_equal_latents_of_different_histories_stay_apart(cache: str, environments: int, context: int) -> None:
    policy = policy_with(cache, 'tiny', environments, num_simulations=25, infer_context_length=context)
    weights = dict(collect_model(policy).state_dict())
    for name in [name for name in weights if 'head_observations.head_module.2' in name]:
        weights[name] = torch.zeros_like(
            weights[name]
        )  # as in a fresh model: every predicted latent is the same
    load_weights(policy, weights)
    if cache == 'stock':
        position_correction_refreshed(policy)
    roots = Episodes(policy, range(environments)).run(2)
    assert len({node.latent.tobytes() for root in roots for node in root.nodes}) == 1
    verdict = judge_nodes(policy, roots, window_of(cache))
    assert verdict.wrong == 0, str(verdict)


@stock_fails('root keys are hashes of a latent encoded again, whose bits depend on the batch size')
def test_a_root_is_found_again_in_a_smaller_batch(cache: str) -> None:
    policy = policy_with(cache, 'tiny', 8, infer_context_length=FOUR_STEPS)
    model, oracle = collect_model(policy), Oracle(world_model_of(policy), window_of(cache))
    draw, actions = torch.Generator().manual_seed(0), [1] * 8
    for ready in (7, 3, 1):
        first, second, third = torch.randn(3, 8, 7, generator=draw)
        model.initial_inference(torch.zeros(8, 7), [-1] * 8, first, [np.array(0)] * 8)
        model.initial_inference(first, actions, second, [np.array(1)] * 8)
        answer = model.initial_inference(
            second[:ready], actions[:ready], third[:ready], [np.array(2)] * ready
        )
        histories = list(zip(first, second, third, strict=True))[:ready]
        expected = [root_of(oracle, history, actions[:2]).policy for history in histories]
        torch.testing.assert_close(answer.policy_logits, torch.stack(expected), rtol=0.0, atol=1e-3)


@stock_fails('nothing cached is ever read in reanalysis: below depth one every context is lost')
def test_a_reanalysed_node_keeps_its_path(cache: str) -> None:
    policy = policy_with(cache, 'tiny', 3, num_simulations=20, infer_context_length=FOUR_STEPS)
    verdict = judge_reanalysis(policy, reanalyze(policy, 2), window_of(cache))
    assert verdict.total == 2 * 4 * 20
    assert verdict.wrong == 0, str(verdict)


@stock_fails('reanalysis runs every root by itself in every simulation')
def test_reanalysis_is_batched(cache: str) -> None:
    products = [
        reanalyze(policy_with(cache, 'tiny', 3, num_simulations=10), segments, counted=True).products
        for segments in (1, 4)
    ]
    assert products[1] < 1.2 * products[0], products


@stock_fails(
    'a step without all environments wipes the last inputs of all; root keys depend on the batch size'
)
def test_eight_then_seven_then_eight_environments_keep_their_roots(cache: str) -> None:
    policy = policy_with(cache, 'tiny', 8, num_simulations=3)
    everyone = set(range(8))
    roots = Episodes(policy, range(8)).run([everyone, everyone, everyone - {7}, everyone])
    verdict = judge_roots(policy, roots[16:], window_of(cache))
    assert verdict.total == 15
    assert verdict.wrong == 0, str(verdict)


@stock_fails("the end of one environment's episode wipes the last inputs of all")
def test_the_end_of_an_episode_leaves_the_others_their_contexts(cache: str) -> None:
    policy = policy_with(cache, 'tiny', 3, num_simulations=3)
    roots = Episodes(policy, range(3), lengths={1: [2]}).run(4)
    verdict = judge_roots(policy, roots, window_of(cache))
    assert [root.step for root in last_of(roots, 3)] == [3, 1, 3]
    assert verdict.wrong == 0, str(verdict)


@stock_fails('evaluation and collection share one cache and one set of last inputs')
def test_an_evaluation_between_leaves_collection_its_contexts(cache: str) -> None:
    policy = policy_with(cache, 'tiny', 3, num_simulations=3, evaluator_env_num=2)
    collection = Episodes(policy, [0, 1, 2])
    roots = collection.run(2)
    roots += Episodes(policy, [10, 11], mode='eval', lengths={10: [3], 11: [3]}).run(3)
    roots += collection.run(2)
    verdict = judge_roots(policy, roots, window_of(cache))
    assert verdict.wrong == 0, str(verdict)


@stock_fails('with RoPE the first simulated step stands two positions too late')
def test_rotary_positions_of_simulated_steps(cache: str) -> None:
    policy = policy_with(cache, 'cartpole', 1, num_simulations=10)
    roots = Episodes(policy, [0]).run(3)
    assert judge_roots(policy, roots, window_of(cache)).wrong == 0
    verdict = judge_nodes(policy, roots, window_of(cache))
    assert verdict.wrong == 0, str(verdict)


@stock_fails('with RoPE a root rebuilt from the last observation stands two positions too late')
def test_rotary_positions_of_a_rebuilt_root(cache: str) -> None:
    policy = policy_with(cache, 'cartpole', 1, num_simulations=3)
    episodes = Episodes(policy, [0])
    episodes.run(3)
    episodes.reset(
        env_id=0, current_steps=200, reset_init_data=False
    )  # the host clears its caches every 200 steps
    (root,) = episodes.step()
    oracle = Oracle(world_model_of(policy), window_of(cache))
    whole = root_of(oracle, root.observations, root.actions)
    newest = root_of(oracle, root.observations[-2:], root.actions[-1:], first_step=root.step - 1)
    # Both are right: a context rebuilt from everything that was seen, or from what the host passes again.
    differences = [np.abs(answer.policy.numpy() - root.policy).max() for answer in (whole, newest)]
    assert min(differences) < 1e-3, differences


@stock_fails('a cache that is full drops the token and counts it all the same', raises=pytest.fail.Exception)
def test_a_full_window_refuses_another_token(cache: str) -> None:
    from lzero.model.unizero_world_models.kv_caching import KeysValues

    source = KeysValues(1, 3, 4, 24, 2, torch.device('cpu'))
    for layer in source:
        layer.update(torch.randn(1, 3, 4, 8), torch.randn(1, 3, 4, 8))
    if cache == 'stock':
        full = KeysValues(1, 3, 3, 24, 2, torch.device('cpu'))
        for layer in full:
            layer.update(torch.randn(1, 3, 3, 8), torch.randn(1, 3, 3, 8))
            with pytest.raises((AssertionError, ValueError, RuntimeError, IndexError)):
                layer.update(torch.randn(1, 3, 1, 8), torch.randn(1, 3, 1, 8))
    else:
        from lzero_kv import KVCachePool, KVLayout

        pool = KVCachePool(5, layout=KVLayout(layers=2, heads=3, head_dim=8, tokens=3))
        with pytest.raises(ValueError):
            pool.set('key', source)
        assert len(pool) == 0
