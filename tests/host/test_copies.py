"""Copies, checkpoints and conversions of a model that keeps a cache."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import lzero_kv
from lzero_kv.validation.oracle import Oracle
from testing.episodes import Episodes, Root
from testing.judging import judge_nodes, judge_roots
from testing.models import collect_model, load_weights, make_policy, random_weights, world_model_of
from testing.replay import root_of

from .plays import assert_same_play

ENVIRONMENTS = 2


def small_policy(family: str = 'tiny', **options: Any) -> Any:
    defaults = dict(
        kv=True,
        num_simulations=6,
        collector_env_num=ENVIRONMENTS,
        evaluator_env_num=1,
        infer_context_length=3,
    )
    return make_policy(family, **{**defaults, **options})


def first_answer(model: Any, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Predictions for the first step of two episodes and for one action below."""
    observations = torch.randn(2, 7, generator=torch.Generator().manual_seed(3)).to(dtype)
    timesteps = [np.array(0), np.array(0)]
    root = model.initial_inference(torch.zeros(2, 7, dtype=dtype), [-1, -1], observations, timesteps)
    child = model.recurrent_inference(
        [(root.latent_state.numpy(), torch.tensor([1, 3]))], 0, [1, 1], timesteps
    )
    return dict(
        latent=root.latent_state,
        policy=root.policy_logits,
        value=root.value,
        child_latent=child.latent_state,
        child_reward=child.reward,
        child_policy=child.policy_logits,
        child_value=child.value,
    )


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, expected in one.items():
        assert torch.equal(expected, other[name]), name


def entries(model: Any) -> int:
    manager = model.world_model.kv_cache_manager
    return len(manager.recur_pool) + sum(map(len, manager.init_pools))


COPIES = {
    'deepcopy': copy.deepcopy,
    'pickle': lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize('how', COPIES)
def test_a_copy_has_an_empty_cache_of_its_own_and_predicts_the_same(how: str) -> None:
    policy = small_policy()
    model = collect_model(policy)
    Episodes(policy, range(ENVIRONMENTS)).run(2)
    kept = entries(model)
    twin = COPIES[how](model)
    assert entries(twin) == twin.world_model.kv_cache_manager.bytes == 0
    assert twin.world_model.kv_cache_manager is not model.world_model.kv_cache_manager
    assert twin.world_model.kv_cache_manager.stats_snapshot()['roots'].queries == 0
    answer = first_answer(twin)
    assert entries(model) == kept > 0
    for store in (
        *twin.world_model.past_kv_cache_init_infer_envs,
        twin.world_model.past_kv_cache_recurrent_infer,
    ):
        store.clear()
    assert (entries(twin), entries(model)) == (0, kept)
    assert_equal(first_answer(model), answer)


@pytest.mark.parametrize('how', COPIES)
def test_a_copy_serves_no_context_of_its_original(how: str) -> None:
    """Playing the copy leaves the original's episodes as they are."""
    undisturbed = Episodes(small_policy(dtype=torch.float64), range(ENVIRONMENTS)).run(4)
    policy = small_policy(dtype=torch.float64)
    episodes = Episodes(policy, range(ENVIRONMENTS))
    roots = episodes.run(2)
    first_answer(COPIES[how](collect_model(policy)), torch.float64)
    assert_same_play(roots + episodes.run(2), undisturbed)


def test_pools_are_no_part_of_a_pickle() -> None:
    model = collect_model(small_policy(policy=dict(num_simulations=200)))
    before = len(pickle.dumps(model))
    first_answer(model)
    assert model.world_model.kv_cache_manager.bytes > 100_000
    assert len(pickle.dumps(model)) - before < 2_000


def test_the_compiled_model_of_a_policy_works() -> None:
    from torch._dynamo.eval_frame import OptimizedModule

    policy = small_policy()
    assert isinstance(policy._model, OptimizedModule) and policy._collect_model is policy._model
    assert policy._model.world_model is collect_model(policy).world_model
    roots = Episodes(policy, range(ENVIRONMENTS)).run(3)
    assert judge_roots(policy, roots, 'rebuild').wrong == judge_nodes(policy, roots, 'rebuild').wrong == 0
    assert_equal(first_answer(torch.compile(collect_model(policy))), first_answer(collect_model(policy)))


def test_the_target_model_has_a_cache_of_its_own() -> None:
    policy = small_policy()
    Episodes(policy, range(ENVIRONMENTS)).run(1)
    acting, target = world_model_of(policy), policy._target_model.world_model
    assert target.kv_cache_manager is not acting.kv_cache_manager
    assert target.kv_cache_manager.bytes == 0 < acting.kv_cache_manager.bytes
    assert target.kv_cache_manager.env_num == acting.kv_cache_manager.env_num == ENVIRONMENTS + 1


@pytest.mark.parametrize('family', ['tiny', 'cartpole', 'lunarlander_continuous'])
def test_the_state_dict_is_that_of_the_stock_model(family: str) -> None:
    stock = small_policy(family, kv=False).learn_mode.state_dict()
    policy = small_policy(family)
    fresh = shapes(policy.learn_mode.state_dict())
    Episodes(policy, range(ENVIRONMENTS), record=False).run(2)
    assert shapes(stock) == fresh == shapes(policy.learn_mode.state_dict())


def shapes(state: dict[str, Any]) -> dict[str, dict[str, torch.Size]]:
    return {
        part: {name: tensor.shape for name, tensor in state[part].items()}
        for part in ('model', 'target_model')
    }


@pytest.mark.parametrize('source, target', [(True, False), (False, True), (True, True)])
def test_a_checkpoint_is_loaded_with_and_without_the_flag(source: bool, target: bool, tmp_path: Path) -> None:
    """One environment, so that the stock cache is right: no neighbour to be padded to."""
    alone = dict(collector_env_num=1, kv_cache=dict(window='shift'), dtype=torch.float64)
    writer, reader = small_policy(kv=source, seed=1, **alone), small_policy(kv=target, seed=2, **alone)
    played = play(writer)
    path = tmp_path / 'checkpoint.pth.tar'
    torch.save(writer.learn_mode.state_dict(), path)
    reader.learn_mode.load_state_dict(torch.load(path, map_location='cpu'))
    written, read = collect_model(writer).state_dict(), collect_model(reader).state_dict()
    assert all(torch.equal(tensor, read[name]) for name, tensor in written.items())
    assert_same_play(play(reader), played)


def play(policy: Any) -> list[Root]:
    policy.recompute_pos_emb_diff_and_clear_cache()  # as the host's training loop does
    return Episodes(policy, [0]).run(5)


def test_another_dtype_makes_new_pools() -> None:
    policy = small_policy(kv_cache=dict(window='rebuild'))
    model = collect_model(policy)
    first_answer(model)
    single = model.world_model.kv_cache_manager
    model.double()
    double = model.world_model.kv_cache_manager
    assert (single.layout.dtype, double.layout.dtype) == (torch.float32, torch.float64)
    assert double is not single and double.bytes == 0
    assert double.env_num == single.env_num and double.num_simulations == single.num_simulations
    observations = torch.randn(4, 1, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    answer = model.initial_inference(torch.zeros_like(observations[0]), [-1], observations[0], [np.array(0)])
    for step in (1, 2, 3):
        answer = model.initial_inference(observations[step - 1], [2], observations[step], [np.array(step)])
    expected = root_of(Oracle(model.world_model, 'rebuild'), list(observations[:, 0]), [2, 2, 2])
    torch.testing.assert_close(answer.policy_logits[0], expected.policy, rtol=0, atol=1e-9)
    assert double.storage.layout.dtype == torch.float64


def test_moving_to_the_same_device_keeps_pools_statistics_and_contexts() -> None:
    """The host's replay buffer moves the target model before every sample."""
    undisturbed = Episodes(small_policy(dtype=torch.float64), range(ENVIRONMENTS)).run(4)
    policy = small_policy(dtype=torch.float64)
    episodes = Episodes(policy, range(ENVIRONMENTS))
    roots = episodes.run(2)
    manager = world_model_of(policy).kv_cache_manager
    queries = manager.stats_snapshot()['nodes'].queries
    collect_model(policy).to('cpu')
    assert world_model_of(policy).kv_cache_manager is manager
    assert manager.stats_snapshot()['nodes'].queries == queries > 0
    assert_same_play(roots + episodes.run(2), undisturbed)


@pytest.mark.parametrize('window', ['shift', 'rebuild'])
@pytest.mark.parametrize('steps', [1, 2, 7])
def test_new_weights_in_the_middle_of_an_episode(steps: int, window: str) -> None:
    """The next root is that of the same window under the new weights, computed again from raw
    observations."""
    policy = small_policy(kv_cache=dict(window=window), dtype=torch.float64)
    episodes = Episodes(policy, range(ENVIRONMENTS))
    episodes.run(steps)
    before = world_model_of(policy).kv_cache_manager.stats_snapshot()['roots']
    load_weights(policy, random_weights(collect_model(policy), seed=11))
    roots = episodes.run(1)
    verdict = judge_roots(policy, roots, 'rebuild')
    assert verdict.wrong == 0, str(verdict)
    since = world_model_of(policy).kv_cache_manager.stats_snapshot()['roots'] - before
    window_tokens = min(2 * steps - 1, world_model_of(policy).context_length - 3)
    assert since.misses == ENVIRONMENTS
    slid = (
        0
        if window == 'shift' or 2 * steps + 1 <= world_model_of(policy).context_length - 3
        else window_tokens
    )
    assert since.rebuilt_tokens == ENVIRONMENTS * window_tokens
    assert since.window_tokens == ENVIRONMENTS * slid


def test_new_weights_reach_both_models_of_a_policy() -> None:
    policy = small_policy()
    checkpoint = small_policy(seed=9).learn_mode.state_dict()
    Episodes(policy, range(ENVIRONMENTS)).run(2)
    policy.learn_mode.load_state_dict(checkpoint)
    expected = first_answer(collect_model(small_policy(seed=9)))
    assert_equal(first_answer(collect_model(policy)), expected)
    lzero_kv.uninstall()
    assert_equal(first_answer(policy._target_model), expected)
