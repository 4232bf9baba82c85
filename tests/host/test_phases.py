"""Collection, evaluation, ends of episodes and cleared caches in the middle of each other."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from typing import Any

import numpy as np
import pytest
import torch
from lzero.policy.unizero import UniZeroPolicy

from lzero_kv.lightzero.inference.events import NodesExpanded, Observer
from testing.episodes import Episodes, Root
from testing.judging import judge_nodes, judge_roots
from testing.models import collect_model, load_weights, make_policy, world_model_of
from testing.precision import free_from_float32, precision

from .plays import assert_same_play, of_environment

WINDOW_STEPS = 3  # observations with the actions between them: five tokens of which three are kept
EVALUATED = 10  # streams of evaluation are numbered from here


def small_policy(family: str = 'tiny', **options: Any) -> Any:
    defaults = dict(
        kv=True, kv_cache=dict(window='rebuild'), dtype=torch.float64, num_simulations=6,
        collector_env_num=3, evaluator_env_num=2, infer_context_length=WINDOW_STEPS,
    )  # fmt: skip
    return make_policy(family, **{**defaults, **options})


def root_statistics(policy: Any) -> Any:
    return world_model_of(policy).kv_cache_manager.stats_snapshot()['roots']


FAMILIES = ['tiny', 'cartpole', 'lunarlander_continuous']


@pytest.mark.parametrize(
    'environments, family, window',
    [((3, 2), family, window) for family in FAMILIES for window in ('shift', 'rebuild')]
    + [((2, 3), 'tiny', 'rebuild'), ((1, 4), 'cartpole', 'shift')],
)
def test_interleaved_phases_leave_each_other_their_contexts(
    environments: tuple[int, int], family: str, window: str
) -> None:
    def begin(policy: Any) -> tuple[Episodes, Episodes]:
        lengths = {0: [3, 4], EVALUATED: [2, 5]}
        collected, evaluated = range(environments[0]), range(EVALUATED, EVALUATED + environments[1])
        return Episodes(policy, collected, lengths=lengths), Episodes(
            policy, evaluated, lengths=lengths, mode='eval'
        )

    options = dict(
        collector_env_num=environments[0], evaluator_env_num=environments[1], kv_cache=dict(window=window)
    )
    (collection, _), (_, evaluation) = (
        begin(small_policy(family, **options)),
        begin(small_policy(family, **options)),
    )
    undisturbed = collection.run(6), evaluation.run(5)

    policy = small_policy(family, **options)
    collection, evaluation = begin(policy)
    collected, evaluated = [], []
    for collect_steps, eval_steps in ((2, 1), (1, 3), (2, 1), (1, 0)):
        collected += collection.run(collect_steps)
        evaluated += evaluation.run(eval_steps)
    assert_same_play(collected, undisturbed[0])
    assert_same_play(evaluated, undisturbed[1])
    assert root_statistics(policy).misses == 0


@pytest.mark.parametrize('family', ['tiny', 'cartpole'])
def test_the_end_of_an_episode_touches_that_environment_only(family: str) -> None:
    endless = Episodes(small_policy(family), range(3)).run(6)
    policy = small_policy(family)
    roots = Episodes(policy, range(3), lengths={1: [2, 3]}).run(6)
    for env in (0, 2):
        assert_same_play(of_environment(roots, env), of_environment(endless, env))
    assert [root.step for root in of_environment(roots, 1)] == [0, 1, 0, 1, 2, 0]
    verdict = judge_roots(policy, roots, 'rebuild')
    assert verdict.wrong == 0, str(verdict)
    assert root_statistics(policy).misses == 0


@pytest.mark.parametrize('window', ['shift', 'rebuild'])
def test_any_number_of_ready_environments(window: str) -> None:
    """8, 7, 8, 3 and 8 are ready: each plays as it does alone, and none loses its context."""
    options = dict(collector_env_num=8, num_simulations=4, kv_cache=dict(window=window))
    everyone = set(range(8))
    schedule = [everyone, everyone - {2}, everyone, {1, 4, 6}, everyone]
    policy = small_policy(**options)
    roots = Episodes(policy, range(8)).run(schedule)
    for env in range(8):
        alone = Episodes(small_policy(**options), [env]).run(sum(env in ready for ready in schedule))
        assert_same_play(of_environment(roots, env), alone)
    assert root_statistics(policy).misses == 0


def clear_roots(policy: Any) -> None:
    for store in world_model_of(policy).past_kv_cache_init_infer_envs:
        store.clear()


def clear_nodes(policy: Any) -> None:
    world_model_of(policy).past_kv_cache_recurrent_infer.clear()


def clear_list(policy: Any) -> None:
    world_model_of(policy).keys_values_wm_list.clear()


def clear_everything(policy: Any) -> None:
    policy.recompute_pos_emb_diff_and_clear_cache()


Clear = Callable[[Any], None]
CLEARS = [clear_roots, clear_nodes, clear_list, clear_everything]
ROOT_CLEARS = {clear_roots, clear_everything}


@cache
def undisturbed_play(family: str) -> list[Root]:
    """Ten steps of three environments that nothing disturbs."""
    return Episodes(small_policy(family), range(3)).run(10)


def play_and_clear(policy: Any, clear: Clear, steps: int) -> tuple[list[Root], Episodes, Any]:
    """``steps`` steps, a clear, one more step: the roots, the episodes, and what the last step counted."""
    episodes = Episodes(policy, range(3))
    roots = episodes.run(steps)
    before = root_statistics(policy)
    clear(policy)
    roots += episodes.run(1)
    return roots, episodes, root_statistics(policy) - before


def each_pair(*axes: list[Any]) -> list[Any]:
    """Combinations in which each value meets each value of the other axes; the others are slow tests."""
    return [
        pytest.param(
            first, second, third, id=f'{first}-{second}-{third.__name__}',
            marks=[pytest.mark.slow] * ((row + column + number) % len(axes[1]) != 0),
        )
        for row, first in enumerate(axes[0])
        for column, second in enumerate(axes[1])
        for number, third in enumerate(axes[2])
    ]  # fmt: skip


@pytest.mark.parametrize(('family', 'steps', 'clear'), each_pair(FAMILIES, [1, 2, 6], CLEARS))
def test_a_clear_between_two_steps_changes_no_answer(family: str, steps: int, clear: Clear) -> None:
    policy = small_policy(family)
    roots, episodes, since = play_and_clear(policy, clear, steps)
    roots += episodes.run(3)
    assert_same_play(roots, undisturbed_play(family)[: len(roots)])
    window = min(2 * steps - 1, 2 * WINDOW_STEPS - 3)
    lost = clear in ROOT_CLEARS
    assert since.misses == 3 * lost
    assert since.rebuilt_tokens == 3 * window * lost


@pytest.mark.parametrize('clear', [clear_roots, clear_everything], ids=lambda clear: clear.__name__)
@pytest.mark.parametrize('steps', [1, 2, 6])
@pytest.mark.parametrize('family', ['tiny', 'cartpole'])
def test_a_cleared_root_is_that_of_its_whole_window(family: str, steps: int, clear: Clear) -> None:
    """A shifted window keeps traces of steps that left it; what is rebuilt is the window alone, as
    window='rebuild'."""
    policy = small_policy(family, kv_cache=dict(window='shift'))
    roots, _, since = play_and_clear(policy, clear, steps)
    verdict = judge_roots(policy, roots[-3:], 'rebuild')
    assert verdict.wrong == 0, str(verdict)
    assert (since.misses, since.rebuilt_tokens) == (3, 3 * min(2 * steps - 1, 2 * WINDOW_STEPS - 3))
    if steps == 1:  # nothing has left the window yet
        assert judge_roots(policy, roots, 'shift').wrong == 0
        assert judge_nodes(policy, roots, 'shift').wrong == 0


def test_a_clear_of_one_phase_is_counted_and_harms_none() -> None:
    """The host's evaluator and collectors clear through the same names."""
    policy, quiet = small_policy(), small_policy()
    plays = []
    for played, clear in ((policy, True), (quiet, False)):
        collection = Episodes(played, range(3))
        evaluation = Episodes(played, range(EVALUATED, EVALUATED + 2), mode='eval')
        roots = collection.run(3) + evaluation.run(3)
        if clear:
            clear_roots(played)
        plays.append(roots + collection.run(2) + evaluation.run(2))
    assert_same_play(*plays)
    assert root_statistics(policy).misses == 3 + 2
    assert root_statistics(policy).rebuilt_tokens > root_statistics(quiet).rebuilt_tokens


@pytest.mark.parametrize('window', ['shift', 'rebuild'])
@pytest.mark.parametrize('family', ['tiny', 'cartpole'])
@pytest.mark.parametrize('clear', [clear_nodes, clear_roots, clear_list], ids=lambda clear: clear.__name__)
def test_a_clear_within_a_search_changes_no_answer(clear: Clear, family: str, window: str) -> None:
    """Shifted windows are known to root inference alone, so there the search is an episode's first."""
    options = dict(num_simulations=12, infer_context_length=4, kv_cache=dict(window=window))
    steps = 1 if window == 'shift' else 4
    expected = Episodes(small_policy(family, **options), range(3), record=False).run(steps)
    policy = small_policy(family, **options)

    class Clearing(Observer):
        def nodes_expanded(self, event: NodesExpanded) -> None:
            if event.simulation in (3, 7, 8, 11):
                clear(policy)

    world_model_of(policy).observers.append(Clearing())
    roots = Episodes(policy, range(3), record=False).run(steps)
    assert_same_play(roots, expected)
    nodes = world_model_of(policy).kv_cache_manager.stats_snapshot()['nodes']
    assert (nodes.rebuilt_tokens > 0) == (window == 'rebuild' and clear is not clear_list)


def test_the_hosts_regular_clear_loses_nothing() -> None:
    """Its collectors report every step with its number, and expect caches to be dropped every 200 steps."""
    policy, quiet = small_policy(), small_policy()
    episodes, undisturbed = Episodes(policy, range(3)), Episodes(quiet, range(3))
    roots = episodes.run(3)
    episodes.reset(env_id=1, current_steps=200, reset_init_data=False)
    assert_same_play(roots + episodes.run(3), undisturbed.run(6))
    assert root_statistics(policy).misses == 0


class StaleTimesteps(Episodes):
    """Passes timesteps as the host's segment collector does: read when a call of ``collect`` begins, then
    frozen."""

    frozen: dict[int, int] | None = None

    def begin_collect_call(self) -> None:
        self.frozen = {env: len(actions) for env, actions in enumerate(self.actions)}

    def _timestep(self, env: int) -> np.ndarray:
        return np.array(len(self.actions[env]) if self.frozen is None else self.frozen[env])


@pytest.mark.parametrize('family', ['tiny', 'cartpole'])
@pytest.mark.parametrize('lengths', [{}, {1: [4, 5, 3], 2: [7]}], ids=['endless', 'ends'])
def test_stale_timesteps_disturb_nothing(lengths: dict[int, list[int]], family: str) -> None:
    honest = Episodes(small_policy(family), range(3), lengths=lengths).run(11)
    policy = small_policy(family)
    stale = StaleTimesteps(policy, range(3), lengths=lengths)
    roots = []
    for steps in (3, 5, 1, 2):
        stale.begin_collect_call()
        roots += stale.run(steps)
    assert_same_play(roots, honest)
    assert root_statistics(policy).misses == 0


class Unreported(Episodes):
    """Episodes end without a word; only the timestep tells that another one begins."""

    def reset(self, *args: Any, **kwargs: Any) -> None:
        pass


def test_a_timestep_of_zero_begins_another_episode() -> None:
    policy = small_policy('cartpole')
    roots = Unreported(policy, range(3), lengths={1: [2, 4]}).run(5)
    verdict = judge_roots(policy, roots, 'rebuild')
    assert verdict.wrong == 0, str(verdict)
    assert_same_play(roots, Episodes(small_policy('cartpole'), range(3), lengths={1: [2, 4]}).run(5))


def own_loop(policy: Any, method: str) -> None:
    """Call the policy as a loop of one's own may: arguments by position, one tensor for all observations,
    actions that are written over when they were used."""
    original, buffers = getattr(policy, method), {}
    names = list(inspect.signature(getattr(UniZeroPolicy, method)).parameters)[2:]

    def forward(data: torch.Tensor, *args: Any, **kwargs: Any) -> dict[int, Any]:
        buffer = buffers.setdefault(data.shape, torch.empty_like(data)).copy_(data)
        given = [*args, *(kwargs[name] for name in names[len(args) :])]
        output = original(buffer, *given)
        answer = copy.deepcopy(output)
        for of_env in output.values():
            if isinstance(of_env['action'], np.ndarray) and of_env['action'].ndim:
                of_env['action'][:] = 7
        return answer

    setattr(policy, method, forward)


@pytest.mark.parametrize('mode', ['collect', 'eval'])
@pytest.mark.parametrize('family', ['tiny', 'lunarlander_continuous'])
def test_what_is_remembered_is_a_copy(family: str, mode: str) -> None:
    """Roots that are computed again from what is remembered included."""
    policies = small_policy(family), small_policy(family)
    own_loop(policies[0], f'_forward_{mode}')
    plays = [Episodes(policy, range(2), mode=mode, lengths={1: [2, 4]}) for policy in policies]
    for _ in range(2):
        assert_same_play(plays[0].run(3), plays[1].run(3))
        for policy in policies:
            world_model_of(policy).clear_caches()


def test_an_environment_that_the_policy_does_not_have_is_refused() -> None:
    policy = small_policy()
    episodes, undisturbed = Episodes(policy, range(3)), Episodes(small_policy(), range(3))
    roots = episodes.run(2)
    with pytest.raises(ValueError, match=r'expected environment ids in \[0, 3\), got 3; write the real'):
        Episodes(policy, range(4)).run(1)
    assert [root.visits for root in roots] == [root.visits for root in undisturbed.run(2)]


@pytest.mark.parametrize('mode', ['collect', 'eval'])
def test_an_unknown_environment_is_refused_and_no_other_is_forgotten(mode: str) -> None:
    options = dict(world_model=dict(cache_validation_mode='store'), kv_cache=dict(window='shift'))
    policies = [small_policy(evaluator_env_num=3, **options) for _ in range(2)]
    plays = [Episodes(policy, range(3), mode=mode) for policy in policies]
    for episodes in plays:
        episodes.run(2)
    inputs = policies[0]._last_inputs(mode)
    with pytest.raises(ValueError, match=r'expected environment ids in \[0, 3\), got 7'):
        getattr(policies[0], f'_reset_{mode}')([0, 7])
    assert all(one is other for one, other in zip(inputs, policies[0]._last_inputs(mode), strict=True))
    assert_same_play(plays[0].run(2), plays[1].run(2))


@pytest.mark.parametrize('validated', [False, 'store'])
@pytest.mark.parametrize('mode', ['collect', 'eval'])
def test_one_environment_can_be_reset_by_its_number(mode: str, validated: Any) -> None:
    options = dict(world_model=dict(cache_validation_mode=validated), kv_cache=dict(window='shift'))
    policies = [small_policy(evaluator_env_num=3, **options) for _ in range(2)]
    plays = [Episodes(policy, range(3), mode=mode) for policy in policies]
    for policy, episodes, env_id in zip(policies, plays, (1, [1]), strict=True):
        episodes.run(2)
        getattr(policy, f'_reset_{mode}')(env_id)
        assert sorted(policy._last_steps[mode]._steps) == [0, 2]
    assert_same_play(plays[0].run(2), plays[1].run(2))


class ResetsItself(UniZeroPolicy):
    """A policy with resets of its own, as a user may write it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.resets: list[tuple[Any, ...]] = []
        super().__init__(*args, **kwargs)

    def _reset_collect(self, env_id: Any = None, current_steps: Any = None, **more: Any) -> None:
        self.resets.append(('collect', _hashable(env_id), current_steps))
        super()._reset_collect(env_id, current_steps, **more)

    def _reset_eval(self, env_id: Any = None) -> None:
        self.resets.append(('eval', _hashable(env_id)))


def _hashable(env_id: Any) -> Any:
    return tuple(env_id) if isinstance(env_id, list) else env_id


def test_resets_of_a_policys_own_are_called() -> None:
    """They may call the host's, which clears roots now and then: those are computed again."""
    template = small_policy()
    with precision(torch.float64), redirect_stdout(StringIO()):
        policy = ResetsItself(copy.deepcopy(template._cfg), None, ['learn', 'collect', 'eval'])
    load_weights(policy, collect_model(template).state_dict())
    for model in (collect_model(policy), policy._target_model):
        free_from_float32(model)
        model.eval()
    policy.resets.clear()
    plays = [Episodes(one, range(3), lengths={1: [2]}) for one in (policy, template)]
    roots, expected = (episodes.run(3) for episodes in plays)
    policy._reset_collect(0, 200, reset_init_data=False)
    policy._reset_eval([1])
    assert_same_play(roots + plays[0].run(2), expected + plays[1].run(2))
    # the end of an episode, a step that the host's collectors report, and the evaluation's
    assert {('collect', (1,), None), ('collect', 0, 200), ('eval', (1,))} <= set(policy.resets)
    assert root_statistics(policy).rebuilt_tokens > 0
