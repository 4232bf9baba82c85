"""The host's own collectors, evaluator and replay buffers with real environments and the flag on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

from lzero_kv.lightzero.host import is_release
from lzero_kv.telemetry.metrics import METRICS, SPEED, SPEED_METRICS, tag
from lzero_kv.validation.oracle import Oracle
from testing.models import collect_model, world_model_of
from testing.precision import precision
from testing.recorder import replaced
from testing.repeatable_tree import host_trees, repeatable
from testing.replay import child_of, root_of

from .workers import TASKS, Workers, task_policy

TWO_ENVIRONMENTS = dict(collector_env_num=2, evaluator_env_num=1, policy=dict(n_episode=2, num_segments=2))


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def short_episodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pendulum never ends by itself: after 31 steps instead of 200, which is no multiple of a segment."""
    monkeypatch.setattr(gymnasium.spec('Pendulum-v1'), 'max_episode_steps', 31)


def root_statistics(policy: Any) -> Any:
    return world_model_of(policy).kv_cache_manager.stats_snapshot()['roots']


@pytest.mark.parametrize('manager', ['base', 'subprocess'])
@pytest.mark.parametrize('collector', ['episode', 'segment'])
def test_every_continued_step_of_cartpole_finds_its_root(collector: str, manager: str) -> None:
    policy = task_policy('cartpole')
    with Workers(policy, 'cartpole', collector, manager) as workers:
        for iteration in range(2):
            workers.collect(iteration)
            workers.evaluate(iteration)
    assert workers.rows.wrong == []
    assert workers.rows.continued > 60
    assert root_statistics(policy).misses == 0
    assert root_statistics(policy).hits >= workers.rows.continued


@pytest.mark.parametrize('collector, manager', [('episode', 'base'), ('segment', 'subprocess')])
def test_every_continued_step_of_pendulum_finds_its_root(collector: str, manager: str) -> None:
    policy = task_policy('pendulum', **TWO_ENVIRONMENTS)
    with Workers(policy, 'pendulum', collector, manager) as workers:
        workers.collect()
        if collector == 'episode':
            workers.evaluate()
        workers.collect(1)
    assert workers.rows.wrong == []
    assert workers.rows.continued > 50
    assert root_statistics(policy).misses == 0


@pytest.mark.parametrize('collector', ['episode', 'segment'])
def test_statistics_go_to_the_log_of_the_host(collector: str) -> None:
    policy = task_policy('cartpole')
    with Workers(policy, 'cartpole', collector, 'base') as workers:
        counted = []
        for iteration in range(2):
            workers.collect(iteration)
            counted.append((workers.collector.envstep, root_statistics(policy)))
            workers.evaluate(iteration)
    scalars = scalars_of(workers.log)
    names = [name for name in METRICS if name != 'hit_rate']
    steps = [step for step, _ in counted]
    for pool in ('roots', 'nodes', 'total'):
        for name in names:
            assert [point.step for point in scalars[tag(pool, name)]] == steps
    values = {name: [point.value for point in scalars[tag('roots', name)]] for name in METRICS}
    assert values['queries'] == [counted[0][1].queries, counted[1][1].queries - counted[0][1].queries]
    assert (values['hit_rate'], values['misses']) == ([1.0, 1.0], [0.0, 0.0])
    speed = {name: [point.value for point in scalars[tag(SPEED, name)]] for name in SPEED_METRICS}
    # evaluations search, too, and stand between the two collections
    assert speed['searches'] == speed['root_inferences'] and speed['train_iterations'] == [0, 1]
    per_search = policy._cfg.num_simulations * policy._cfg.collector_env_num
    assert 0 < speed['simulations'][0] <= per_search * speed['searches'][0]
    assert all(
        0 < part < whole
        for part, whole in zip(speed['planning_seconds'], speed['collect_seconds'], strict=True)
    )
    assert speed['planning_seconds'][0] == pytest.approx(
        speed['search_seconds'][0] + speed['root_seconds'][0]
    )
    assert speed['planning_seconds'][1] < speed['search_seconds'][1] + speed['root_seconds'][1]
    assert len(speed['env_steps_per_second']) == 1
    assert not any('/reanalysis/' in name for name in scalars)  # the target model searched nothing
    assert {name.split('/')[0] for name in scalars} >= {'collector_iter', 'collector_step', 'evaluator_iter'}


def scalars_of(log: str) -> dict[str, list[Any]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(log, size_guidance=dict(scalars=0))
    events.Reload()
    return {name: events.Scalars(name) for name in events.Tags()['scalars']}


BUFFERS = {'cartpole': 'UniZeroGameBuffer', 'pendulum': 'SampledUniZeroGameBuffer'}


def filled_buffer(task: str, policy: Any, segments: Any) -> Any:
    from lzero import mcts

    buffer = getattr(mcts, BUFFERS[task])(policy._cfg)
    buffer.push_game_segments(segments)
    return buffer


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('ratio', [0.5, 1])
def test_a_training_step_on_reanalysed_data(task: str, ratio: float) -> None:
    policy = task_policy(
        task, **{**TWO_ENVIRONMENTS, 'policy': dict(TWO_ENVIRONMENTS['policy'], reanalyze_ratio=ratio)}
    )
    with Workers(policy, task, 'segment', 'base') as workers:
        buffer = filled_buffer(task, policy, workers.collect())
        manager = policy._target_model.world_model.kv_cache_manager
        for iteration in range(2):
            data = buffer.sample(policy._cfg.batch_size, policy)
            assert np.isfinite(data[1][2]).all()
            losses = policy.learn_mode.forward([*data, iteration])
            policy.recompute_pos_emb_diff_and_clear_cache()
            assert np.isfinite(losses['weighted_total_loss'])
        workers.collect(1)
    assert policy._target_model.world_model.kv_cache_manager is manager
    searched = manager.stats_snapshot()['nodes']
    roots = 2 * int(policy._cfg.batch_size * ratio) * (policy._cfg.num_unroll_steps + 1)
    assert searched.queries == roots * policy._cfg.num_simulations, 'roots are windows of the search, too'
    assert searched.misses == searched.stores >= roots
    assert searched.rebuilt_tokens == searched.evictions == 0
    assert workers.rows.wrong == []
    charted = scalars_of(workers.log)[tag('reanalysis', 'queries')]
    assert [point.value for point in charted] == [searched.queries]


@pytest.mark.parametrize('task', TASKS)
def test_the_whole_buffer_is_reanalysed(task: str) -> None:
    """As the host's segment training does between updates: new visits, with the actions that they belong
    to."""
    sizes = dict(reanalyze_batch_size=4, reanalyze_partition=0.75, reanalyze_ratio=0)
    policy = task_policy(task, **{**TWO_ENVIRONMENTS, 'policy': TWO_ENVIRONMENTS['policy'] | sizes})
    with Workers(policy, task, 'segment', 'base') as workers:
        segments = workers.collect()
    buffer = filled_buffer(task, policy, segments)
    before = [np.array(segment.child_visit_segment) for segment in segments[0]]
    drawn_before = [np.array(segment.root_sampled_actions) for segment in segments[0] if task == 'pendulum']
    buffer.reanalyze_buffer(4, policy)
    after = [np.array(segment.child_visit_segment) for segment in segments[0]]
    renewed = [(old != new).any(axis=1) for old, new in zip(before, after, strict=True)]
    assert sum(map(sum, renewed)) > 0
    for visits in after:
        np.testing.assert_allclose(visits.sum(axis=1), 1.0)
    if task == 'pendulum':
        for segment, old, rows in zip(segments[0], drawn_before, renewed, strict=True):
            new = np.array(segment.root_sampled_actions)
            assert new.shape == old.shape
            assert (new != old).any(axis=(1, 2))[rows[: len(new)]].all()


class Watch:
    """What the host's reanalysis gave to its search: observations, root policies, and the noise of each
    root."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.noises: list[np.ndarray] = []

    def dirichlet(self, alphas: Any) -> np.ndarray:
        self.noises.append(np.random.default_rng([7, len(self.noises)]).dirichlet(alphas))
        return self.noises[-1]

    def initial_inference(self, observations: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        answer = type(self.model).initial_inference(self.model, observations, *arguments, **named)
        if self.model.world_model.reanalyze_phase:
            self.observations, self.policies = observations, answer.policy_logits
        return answer


def slow_searches(watch: Watch, buffer: Any, scalar: Any, window: Any) -> tuple[np.ndarray, list[Any]]:
    """One root after the other, every node recomputed from the root's observation: visits and sampled
    actions."""
    config = search_config(buffer)
    visits, sampled = [], []
    for observation, logits, noise in zip(watch.observations, watch.policies, watch.noises, strict=True):
        oracle = Oracle(watch.model.world_model, window)
        roots = slow_search(oracle, config, scalar, observation, logits, noise)
        visits.append(roots.get_distributions()[0])
        sampled.append(roots.get_sampled_actions()[0] if config.model.continuous_action_space else None)
    return np.array(visits), sampled


def search_config(buffer: Any) -> Any:
    from lzero.mcts.tree_search.mcts_ctree import UniZeroMCTSCtree
    from lzero.mcts.tree_search.mcts_ctree_sampled import SampledUniZeroMCTSCtree

    search = SampledUniZeroMCTSCtree if buffer._cfg.model.continuous_action_space else UniZeroMCTSCtree
    return search(buffer._cfg)._cfg


def slow_search(
    oracle: Oracle,
    config: Any,
    scalar: Any,
    observation: torch.Tensor,
    logits: torch.Tensor,
    noise: np.ndarray,
) -> Any:
    sizes, continuous = config.model, config.model.continuous_action_space
    tree = host_trees()[continuous]
    if continuous:
        choices = sizes.num_of_sampled_actions
        roots = tree.Roots(1, [[-1] * choices], sizes.action_space_size, choices, True)
    else:
        roots = tree.Roots(1, [list(range(sizes.action_space_size))])
    noises = [noise.astype(np.float32).tolist()]
    roots.prepare(config.root_noise_weight, noises, [0.0], [logits.tolist()], [-1])
    bounds = tree.MinMaxStatsList(1)
    bounds.set_delta(config.value_delta_max)
    nodes = [root_of(oracle, [observation], [])]
    for simulation in range(config.num_simulations):
        results = tree.ResultsWrapper(num=1)
        weights = (config.pb_c_base, config.pb_c_init, config.discount_factor, bounds, results, [-1])
        parents, _, actions, players = tree.batch_traverse(roots, *weights, *([True] if continuous else []))
        node = child_of(oracle, nodes[parents[0]], np.asarray(actions[0]))
        nodes.append(node)
        reward, value = (
            scalar(part[None].clone()).reshape(-1).tolist() for part in (node.reward, node.value)
        )
        tree.batch_backpropagate(
            simulation + 1,
            config.discount_factor,
            reward,
            value,
            [node.policy.tolist()],
            bounds,
            results,
            players,
        )
    return roots


@pytest.mark.skipif(not is_release(), reason="git main's buffer makes float32 of observations")
@pytest.mark.parametrize('window', ['shift', 'rebuild'])
@pytest.mark.parametrize('task', TASKS)
def test_reanalysed_targets_are_those_of_searching_each_root_alone(task: str, window: str) -> None:
    """In float64 and with the same noise: the same number of visits for every action of every root."""
    single = task_policy(task, **TWO_ENVIRONMENTS)
    with Workers(single, task, 'segment', 'base') as workers:
        segments = workers.collect()
    options = dict(
        TWO_ENVIRONMENTS, policy=dict(reanalyze_ratio=0.5), num_simulations=20, kv_cache=dict(window=window)
    )
    policy = task_policy(task, dtype=torch.float64, **options)
    for segment in segments[0]:
        segment.obs_segment = segment.obs_segment.astype(np.float64)
    buffer = filled_buffer(task, policy, segments)
    model = policy._target_model
    watch = Watch(unwrapped_target(policy))
    with precision(torch.float64), repeatable(*host_trees()):
        with (
            replaced(np.random, 'dirichlet', watch.dirichlet),
            replaced(watch.model, 'initial_inference', watch.initial_inference),
        ):
            batch, targets = buffer.sample(policy._cfg.batch_size, policy)
        visits, sampled = slow_searches(watch, buffer, policy.inverse_scalar_transform_handle, window)
    nodes = model.world_model.kv_cache_manager.stats_snapshot()['nodes']
    assert nodes.misses == nodes.stores and nodes.rebuilt_tokens == nodes.evictions == 0
    sequences, steps = buffer.reanalyze_num, policy._cfg.num_unroll_steps + 1
    reanalysed = targets[2][:sequences].reshape(sequences * steps, -1)
    outside = ~reanalysed.any(axis=1)  # behind the end of a segment the host puts zeros
    assert (~outside).sum() >= sequences
    expected = visits / visits.sum(axis=1, keepdims=True)
    assert np.array_equal(reanalysed[~outside], expected[~outside])
    if task == 'pendulum':
        actions = batch[2][:sequences].reshape(sequences * steps, -1)
        np.testing.assert_allclose(actions, np.array(sampled).reshape(actions.shape), rtol=0, atol=1e-6)


def unwrapped_target(policy: Any) -> Any:
    """The target model itself, without DI-engine's and torch.compile's wrappers."""
    return next(
        module for module in policy._target_model.modules() if type(module) is type(collect_model(policy))
    )
