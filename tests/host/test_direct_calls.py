"""The model called without a policy and without our search: latent states are all that names a node."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

import numpy as np
import pytest
import torch

import lzero_kv
from lzero_kv.validation.oracle import Oracle
from testing.episodes import Episodes
from testing.models import collect_model, load_weights, make_policy, world_model_of
from testing.precision import precision
from testing.replay import child_of, root_of

from .plays import assert_same_play

ROWS = 2
SIZES = dict(collector_env_num=ROWS, evaluator_env_num=1, infer_context_length=3, dtype=torch.float64)


def small_policy(family: str = 'tiny', **options: Any) -> Any:
    return make_policy(
        family, **{**SIZES, 'kv': True, 'num_simulations': 8, 'kv_cache': dict(window='rebuild'), **options}
    )


@pytest.mark.parametrize('window', ['shift', 'rebuild'])
@pytest.mark.parametrize('family', ['tiny', 'cartpole', 'lunarlander_continuous'])
def test_the_hosts_own_search_loop_gives_the_same_search(family: str, window: str) -> None:
    """After uninstalling, the host's search runs over the caching model and passes latent states alone."""
    options = dict(num_simulations=25, kv_cache=dict(window=window))
    named = Episodes(small_policy(family, **options), range(ROWS)).run(4)
    latents = {node.latent.tobytes() for root in named for node in root.nodes}
    assert len(latents) == sum(len(root.nodes) for root in named)  # else nothing tells nodes apart

    policy = small_policy(family, **options)
    lzero_kv.uninstall()
    assert_same_play(Episodes(policy, range(ROWS)).run(4), named)
    statistics = world_model_of(policy).kv_cache_manager.stats_snapshot()
    assert statistics['roots'].misses == statistics['roots'].rebuilt_tokens == 0
    assert statistics['nodes'].rebuilt_tokens == 0
    assert bool(statistics['nodes'].window_tokens) == (window == 'rebuild')


@dataclass
class Caller:
    """Two environments whose model is called as the host calls it, with the history that a test may compare
    with."""

    model: Any
    seed: int = 0
    observations: list[torch.Tensor] = field(default_factory=list)
    actions: list[Any] = field(default_factory=list)

    @property
    def manager(self) -> Any:
        return self.model.world_model.kv_cache_manager

    def observe(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + len(self.observations))
        return torch.randn(ROWS, 7, generator=generator, dtype=torch.float64)

    def root(self, **changes: Any) -> Any:
        """The next root inference; ``changes`` replace its arguments, and then nothing is noted as seen."""
        step, new = len(self.observations), self.observe()
        arguments = dict(
            obs_batch=self.observations[-1] if step else torch.zeros(ROWS, 7, dtype=torch.float64),
            action_batch=self.actions[-1] if step else [-1] * ROWS,
            current_obs_batch=new,
            start_pos=[np.array(step)] * ROWS,
        )
        answer = self.model.initial_inference(**{**arguments, **changes})
        self.observations.append(new)
        self.actions.append([1, 3])
        return answer

    def child(self, latents: torch.Tensor, actions: Any, simulation: int) -> Any:
        return self.model.recurrent_inference(
            [(latents.numpy(), torch.as_tensor(actions))],
            simulation,
            [1] * ROWS,
            [np.array(len(self.observations) - 1)] * ROWS,
        )

    def state(self) -> tuple[Any, ...]:
        manager = self.manager
        pools = tuple(tuple(pool.keys()) for pool in (*manager.init_pools, manager.recur_pool))
        return pools, {name: stats.as_dict() for name, stats in manager.stats_snapshot().items()}


def answers(output: Any) -> dict[str, torch.Tensor]:
    return {name: getattr(output, name) for name in ('latent_state', 'policy_logits', 'value')}


def assert_same(one: Any, other: Any) -> None:
    for name, expected in answers(other).items():
        assert torch.equal(answers(one)[name], expected), name


def new_caller(family: str = 'tiny', **options: Any) -> Caller:
    """A caller with a model that no policy holds; only what the world model's own configuration says is known
    to it."""
    from lzero.model.unizero_model import UniZeroModel

    template = small_policy(family, **options)
    with precision(torch.float64), redirect_stdout(StringIO()):
        model = UniZeroModel(**template._cfg.model)
    model.load_state_dict(collect_model(template).state_dict())
    return Caller(model.eval())


def test_a_model_without_a_policy_keeps_contexts_by_row() -> None:
    caller = new_caller()
    oracle = Oracle(caller.model.world_model, 'rebuild')
    for step in range(5):
        root = caller.root()
        history = torch.stack(caller.observations)
        actions = np.array(caller.actions[:-1]).reshape(step, ROWS)
        first = caller.child(root.latent_state, [0, 2], 0)
        second = caller.child(first.latent_state, [4, 1], 1)
        for row in range(ROWS):
            top = root_of(oracle, list(history[:, row]), actions[:, row].tolist())
            torch.testing.assert_close(root.policy_logits[row], top.policy, rtol=0, atol=1e-9)
            node = child_of(oracle, child_of(oracle, top, [0, 2][row]), [4, 1][row])
            torch.testing.assert_close(second.value[row], node.value, rtol=0, atol=1e-9)
            torch.testing.assert_close(second.reward[row], node.reward, rtol=0, atol=1e-9)
    assert caller.manager.stats_snapshot()['roots'].misses == 0


def test_latents_that_no_root_inference_gave_begin_a_search_of_their_own() -> None:
    """As in reanalysis: the latent state is the whole history."""
    caller = new_caller()
    caller.root()
    latents = torch.softmax(torch.randn(ROWS, 1, 4, 6, dtype=torch.float64), -1).flatten(2)
    first = caller.child(latents, [0, 2], 0)
    alone = new_caller().child(latents, [0, 2], 0)
    assert_same(first, alone)
    second = caller.child(first.latent_state, [3, 3], 1)
    assert second.value.isfinite().all()


@pytest.mark.parametrize('root_slots', [1, 2])
@pytest.mark.parametrize('window', ['shift', 'rebuild'])
def test_root_slots_say_from_how_many_roots_an_environment_can_go_on(window: str, root_slots: int) -> None:
    """With two, another action is tried from the root before the latest one, and then one from there; with
    one, the earlier root is forgotten, and its last observation begins anew."""
    caller = new_caller(kv_cache=dict(root_slots=root_slots, window=window))
    oracle = Oracle(caller.model.world_model, window)
    for _ in range(5):
        caller.root()
    seen, actions = caller.observations[:4], [*caller.actions[:3], [2, 0]]
    for step in (4, 5):
        answer = caller.root(obs_batch=seen[-1], action_batch=actions[-1], start_pos=[np.array(step)] * ROWS)
        seen = [*seen, caller.observations[-1]]
        history = torch.stack(seen)
        for row in range(ROWS):
            top = root_of(oracle, list(history[:, row]), [action[row] for action in actions])
            equal = torch.allclose(answer.policy_logits[row], top.policy, rtol=0, atol=1e-9)
            # an exact window knows no more than it shows, and is whole again two steps later
            assert equal == (root_slots == 2 or (step == 5 and window == 'rebuild'))
        actions = [*actions, [4, 1]]
    roots = caller.manager.stats_snapshot()['roots']
    assert (roots.misses == 0) == (root_slots == 2)
    assert (roots.evictions > 0) == (root_slots == 2)


def test_environments_may_be_named_by_a_tensor() -> None:
    models = [new_caller().model.world_model for _ in range(2)]
    seen = torch.zeros(ROWS, 7, dtype=torch.float64)
    for step in range(3):
        new, expected = seen + step, []
        given = {'obs': seen, 'action': [step - 1] * ROWS, 'current_obs': new}
        for model, names in zip(models, ([1, 0], torch.tensor([1, 0])), strict=True):
            outputs = model.forward_initial_inference({**given, 'ready_env_id': names}, [step] * ROWS)
            expected.append(outputs[4])
        assert torch.equal(*expected)
        seen = new
    with pytest.raises(TypeError):
        models[0].forward_initial_inference({**given, 'ready_env_id': [0.5, 1.5]}, [3] * ROWS)


@dataclass(frozen=True)
class BadCall:
    """A call that must be refused with one message, and leave everything as it was."""

    call: Callable[[Caller, Any], Any]
    message: str
    error: type[Exception] = ValueError


def with_value(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[1, ..., 0] = value
    return tensor


TIMESTEPS = 'expected a timestep for each of 2 rows, got '
LENGTHS = 'expected one last observation, last action and environment id for each of 2 observations'
NOT_FINITE = r'expected finite latent states, got nan or inf for environments \[1\]'
BAD_ROOTS = {
    'no timesteps': BadCall(lambda c, _: c.root(start_pos=[]), f'{TIMESTEPS}0'),
    'too many timesteps': BadCall(lambda c, _: c.root(start_pos=[np.array(1)] * 3), f'{TIMESTEPS}3'),
    'too many rows': BadCall(
        lambda c, _: c.root(
            obs_batch=torch.zeros(9, 7).double(),
            action_batch=[-1] * 9,
            current_obs_batch=torch.zeros(9, 7).double(),
            start_pos=[0] * 9,
        ),
        r'expected different environment ids in \[0, \d\), got',
    ),
    'too few actions': BadCall(lambda c, _: c.root(action_batch=[1]), LENGTHS),
    'too few last observations': BadCall(lambda c, _: c.root(obs_batch=c.observations[-1][:1]), LENGTHS),
    'nan observation': BadCall(
        lambda c, _: c.root(current_obs_batch=with_value(c.observe(), math.nan)), NOT_FINITE
    ),
    'infinite observation': BadCall(
        lambda c, _: c.root(current_obs_batch=with_value(c.observe(), math.inf)), NOT_FINITE
    ),
    'unknown action': BadCall(
        lambda c, _: c.root(action_batch=[1, 5]), r'expected actions in \[0, 5\), got \[5\]'
    ),
    'negative action': BadCall(
        lambda c, _: c.root(action_batch=[-2, 1]), r'expected actions in \[0, 5\), got \[-2\]'
    ),
}
BAD_CHILDREN = {
    'unknown latents': BadCall(
        lambda c, a: c.child(with_value(a.latent_state, 0.25), [1, 1], 2),
        r'expected latent states of this search .* got others in rows \[1\]',
    ),
    'latents of the other row': BadCall(
        lambda c, a: c.child(a.latent_state.flip(0), [1, 1], 2), r'got others in rows \[0, 1\]'
    ),
    'nan latents': BadCall(
        lambda c, a: c.child(with_value(a.latent_state, math.nan), [1, 1], 2), r'got others in rows \[1\]'
    ),
    'nan latents for a new search': BadCall(
        lambda c, a: c.child(with_value(a.latent_state, math.nan), [1, 1], 0),
        r'expected finite latent states, got nan or inf in rows \[1\]',
    ),
    'too few latents': BadCall(lambda c, a: c.child(a.latent_state[:1], [1], 2), 'expected 2 parents in'),
    'too few actions': BadCall(
        lambda c, a: c.child(a.latent_state, [1], 2), 'expected 2 actions, got 1 numbers'
    ),
    'unknown action': BadCall(
        lambda c, a: c.child(a.latent_state, [1, 5], 2), r'expected actions in \[0, 5\), got \[5\]'
    ),
}


def begin(caller: Caller) -> Any:
    """Three steps, and two simulations below the last of them."""
    for _ in range(3):
        root = caller.root()
    first = caller.child(root.latent_state, [0, 2], 0)
    return caller.child(first.latent_state, [4, 1], 1)


@pytest.mark.parametrize(
    'bad',
    [*BAD_ROOTS.values(), *BAD_CHILDREN.values()],
    ids=[*(f'root: {name}' for name in BAD_ROOTS), *(f'child: {name}' for name in BAD_CHILDREN)],
)
def test_a_bad_inference_is_refused_and_changes_nothing(bad: BadCall) -> None:
    caller, undisturbed = new_caller(), new_caller()
    answer, expected = begin(caller), begin(undisturbed)
    before = caller.state()
    with pytest.raises(bad.error, match=bad.message):
        bad.call(caller, answer)
    assert caller.state() == before
    assert_same(
        caller.child(answer.latent_state, [2, 2], 2),
        undisturbed.child(expected.latent_state, [2, 2], 2),
    )
    assert_same(caller.root(), undisturbed.root())


def test_more_simulations_than_were_announced_are_refused() -> None:
    caller = new_caller(world_model=dict(num_simulations=3))
    answer = begin(caller)
    caller.child(answer.latent_state, [1, 1], 2)
    before = caller.state()
    with pytest.raises(ValueError, match='expected at most 3 simulations, got one more; begin a new search'):
        caller.child(answer.latent_state, [1, 1], 3)
    assert caller.state() == before
    undisturbed = new_caller()
    begin(undisturbed)
    assert_same(caller.root(), undisturbed.root())


@pytest.mark.parametrize('action', [np.zeros(3), np.array([0.5, np.nan])], ids=['shape', 'nan'])
def test_a_bad_continuous_action_is_refused(action: np.ndarray) -> None:
    policies = [small_policy('lunarlander_continuous') for _ in range(2)]
    callers = [Caller(collect_model(policy)) for policy in policies]
    good = [np.array([0.1, -0.2]), np.array([0.3, 0.4])]
    for caller in callers:
        caller.root()
        caller.actions[-1] = good
    before = callers[0].state()
    with pytest.raises(ValueError, match='expected actions of 2 finite numbers'):
        callers[0].root(action_batch=[good[0], action])
    assert callers[0].state() == before
    assert_same(callers[0].root(), callers[1].root())


def test_a_bad_first_child_is_refused_and_the_search_begins_as_if_it_had_not_been() -> None:
    caller, undisturbed = new_caller(), new_caller()
    root, expected = caller.root(), undisturbed.root()
    with pytest.raises(ValueError, match='expected actions in'):
        caller.child(root.latent_state, [1, 5], 0)
    one = caller.child(root.latent_state, [1, 4], 0)
    other = undisturbed.child(expected.latent_state, [1, 4], 0)
    assert_same(one, other)
    assert caller.state() == undisturbed.state()


def broken_weights(model: Any, where: str) -> dict[str, torch.Tensor]:
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = next(name for name in weights if name.endswith(where))
    weights[name] = torch.full_like(weights[name], math.nan)
    return weights


@pytest.mark.parametrize(
    'where',
    ['blocks.0.attn.key.weight', 'blocks.1.attn.value.weight', 'head_observations.head_module.2.weight'],
)
def test_broken_weights_leave_nothing_behind(where: str) -> None:
    """A search over nan is refused; once good weights are loaded, no masked column holds a trace of it."""
    options = dict(infer_context_length=4, num_simulations=25)
    policy, undisturbed = small_policy(**options), small_policy(**options)
    good, broken = dict(collect_model(policy).state_dict()), broken_weights(collect_model(policy), where)
    good = {name: tensor.clone() for name, tensor in good.items()}
    lengths = {1: [2, 3]}
    episodes = Episodes(policy, range(ROWS), seed=4)
    episodes.run(5)
    load_weights(policy, broken)
    for _ in range(2):
        with pytest.raises((RuntimeError, ValueError), match='expected finite'):
            episodes.run(1)
    load_weights(policy, good)
    roots = Episodes(policy, range(ROWS), lengths=lengths).run(6)
    assert_same_play(roots, Episodes(undisturbed, range(ROWS), lengths=lengths).run(6))


@pytest.mark.parametrize('where', ['blocks.0.attn.value.weight', 'head_observations.head_module.2.weight'])
def test_broken_weights_are_refused_in_direct_calls_and_leave_nothing_behind(where: str) -> None:
    caller, undisturbed = (Caller(collect_model(small_policy(infer_context_length=4))) for _ in range(2))
    good = {name: tensor.clone() for name, tensor in caller.model.state_dict().items()}
    begin(caller)
    caller.model.load_state_dict(broken_weights(caller.model, where))
    with pytest.raises(RuntimeError, match='expected finite predictions, got nan or inf'):
        root = caller.root()
        caller.child(root.latent_state, [1, 1], 0)
    caller.model.load_state_dict(good)
    fresh = Caller(caller.model)
    for _ in range(3):
        assert_same(begin(fresh), begin(undisturbed))
