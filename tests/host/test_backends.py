"""``kv_cache.backend``: the step on static shapes against the eager backend.

The step is run as it is, which takes milliseconds instead of half a minute; ``test_compiled_backend.py`` runs
what torch.compile makes of it. Capture needs a CUDA device.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lzero_kv.lightzero.inference import backends
from lzero_kv.lightzero.inference.attention import rotate
from lzero_kv.lightzero.inference.compiled import (
    CompiledSearch,
    StaticStep,
    StepFunction,
    StepInputs,
    rotated,
)
from lzero_kv.lightzero.inference.expand import Search
from lzero_kv.lightzero.inference.weights import InferenceWeights
from testing.families import FAMILIES, Family
from testing.judging import judge_nodes, judge_reanalysis, judge_roots
from testing.models import collect_model, make_policy, random_weights, world_model_of
from testing.reanalysis import reanalyze

from .direct import Drive, Step, largest_difference
from .plays import fail_with_nan
from .test_engine import BOTH_WINDOWS, managed, uneven_episodes
from .test_operators import Operators
from .validated import MODES, assert_compared, validated_policy

TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-3}
"""Of a largest difference. Sums in another order differ by units in the last place (2e-16 and 1e-7), and the
random weights of these models amplify that along a path, whose latent states are predicted one from the
other: the same ten thousand units are allowed in both."""

EACH_KIND = pytest.mark.parametrize(
    ('family', 'dtype'),
    [
        ('tiny', torch.float64),
        ('cartpole', torch.float32),
        ('lunarlander_continuous', torch.float64),
        ('multitask', torch.float32),
    ],
)
"""Families with each kind of positions and actions, and their dtypes."""

ROWS = 4
SIMULATIONS = 9


class Counted:
    """Runs functions as they are; how many runners were made."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, function: backends.Function, inputs: StepInputs) -> backends.Run:
        self.made += 1
        return lambda: function(inputs)


@pytest.fixture
def as_is(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted = Counted()
    monkeypatch.setitem(backends.RUNNERS, 'compile', counted)
    return counted


def model_of(backend: str, family: str | Family = 'tiny', **options: Any) -> Any:
    kv_cache = dict(backend=backend) | options.pop('kv_cache', {})
    defaults: dict[str, Any] = dict(
        num_simulations=SIMULATIONS, collector_env_num=ROWS, evaluator_env_num=1, dtype=torch.float64
    )
    return collect_model(make_policy(family, kv=True, kv_cache=kv_cache, **defaults | options))


UNEVEN = [
    Step((0, 1, 2, 3)),
    Step((0, 1, 2, 3), ends=(2,)),
    Step((3, 0, 2)),
    Step((1,)),
    Step((0, 1, 2, 3), ends=(0, 3)),
    Step((2, 0)),
    Step((0, 1, 2, 3)),
    Step((0, 1, 3)),
]
"""Environments that come and go; the first windows are full at the fourth step."""


@cache
def expected_answers(window: str = 'rebuild', steps: tuple[Step, ...] = tuple(UNEVEN)) -> list[torch.Tensor]:
    """Of the eager backend."""
    return Drive(model_of('eager', kv_cache=dict(window=window)), ROWS, SIMULATIONS).play(steps)


@BOTH_WINDOWS
@EACH_KIND
def test_answers_equal_those_of_the_eager_backend(
    as_is: Counted, family: str, dtype: torch.dtype, window: str
) -> None:
    plays, seen = [], FAMILIES[family].observation
    for backend in ('eager', 'compile'):
        model = model_of(backend, family, dtype=dtype, kv_cache=dict(window=window))
        plays.append(Drive(model, ROWS, SIMULATIONS, observation=seen).play(UNEVEN))
    assert largest_difference(plays[1], plays[0]) < TOLERANCE[dtype]
    assert as_is.made == (2 if window == 'rebuild' else 1), 'one runner for each kind of step'


@pytest.fixture(scope='module')
def twins() -> dict[tuple[str, str], Any]:
    """Models by backend and window, with equal weights."""
    return {
        (backend, window): model_of(backend, kv_cache=dict(window=window))
        for backend in ('eager', 'compile')
        for window in ('shift', 'rebuild')
    }


@st.composite
def random_steps(draw: st.DrawFn) -> list[Step]:
    steps = []
    for _ in range(draw(st.integers(1, 7))):
        ready = draw(st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=ROWS, unique=True))
        ends = draw(st.lists(st.sampled_from(ready), unique=True)) if draw(st.booleans()) else []
        weights = draw(st.sampled_from([None, None, None, 1, 2]))
        change = _nothing if weights is None else _weights_of(weights)
        steps.append(Step(tuple(ready), tuple(ends), change))
    return steps


def _nothing(model: Any) -> None:
    pass


def _weights_of(seed: int) -> Callable[[Any], None]:
    return lambda model: model.load_state_dict(random_weights(model, seed))


@settings(max_examples=30, deadline=None)
@given(steps=random_steps(), seed=st.integers(0, 10), window=st.sampled_from(['shift', 'rebuild']))
def test_random_searches(
    twins: dict[tuple[str, str], Any], steps: list[Step], seed: int, window: str
) -> None:
    plays, made = [], Counted()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends.RUNNERS, 'compile', made)
        for backend in ('eager', 'compile'):
            model = twins[backend, window]
            model.load_state_dict(random_weights(model, 0))
            model.world_model.end_episodes(range(ROWS))
            plays.append(Drive(model, ROWS, SIMULATIONS, seed).play(steps))
    assert largest_difference(plays[1], plays[0]) < TOLERANCE[torch.float64]
    assert made.made <= 2, 'made once, whoever is ready and whatever the weights'


def scale(model: Any, factor: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)


def scale_around_autograd(model: Any, factor: float) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(factor)
    model.world_model.clear_caches()


def replace_tensors(model: Any, factor: float) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * factor
    model.world_model.clear_caches()


@BOTH_WINDOWS
@pytest.mark.parametrize('change', [scale, scale_around_autograd, replace_tensors])
def test_changed_weights_need_no_new_runner_unless_they_moved(
    as_is: Counted, change: Callable[[Any, float], None], window: str
) -> None:
    steps = (*UNEVEN[:5], Step((0, 1, 2), before=lambda model: change(model, 0.9)), *UNEVEN[2:6])
    answers = Drive(model_of('compile', kv_cache=dict(window=window)), ROWS, SIMULATIONS).play(steps)
    assert largest_difference(answers, expected_answers(window, steps)) < TOLERANCE[torch.float64]
    kinds = 2 if window == 'rebuild' else 1
    assert as_is.made == (2 * kinds if change is replace_tensors else kinds)


@pytest.mark.parametrize(
    ('family', 'window'), [('tiny', 'shift'), *((family, 'rebuild') for family in FAMILIES)]
)
def test_every_root_and_node_equals_its_recomputation(
    as_is: Counted, family: str, window: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Search, 'expand', _refused)
    steps = FAMILIES[family].context // 2 + 2
    policy = managed(
        family, window, num_simulations=4 if steps > 10 else 10, kv_cache=dict(backend='compile')
    )
    roots = uneven_episodes(policy, family, steps)
    for verdict in (judge_roots(policy, roots, window), judge_nodes(policy, roots[-9:], window)):
        assert verdict.wrong == 0, str(verdict)


def test_a_failed_search_leaves_nothing_behind(as_is: Counted) -> None:
    policy = managed('tiny', 'rebuild', kv_cache=dict(backend='compile'))
    uneven_episodes(policy, 'tiny', 2)
    fail_with_nan(policy, range(3))
    verdict = judge_nodes(policy, uneven_episodes(policy, 'tiny', 3), 'rebuild')
    assert verdict.wrong == 0, str(verdict)


def test_half_precision_is_rotated_as_by_the_eager_backend() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 2, 4, 6, generator=generator).bfloat16()
    factors = torch.polar(torch.ones(3, 2, 3), torch.randn(3, 2, 3, generator=generator))
    found = rotated(x, torch.view_as_real(factors))
    rotate(x, factors[:, :, None])
    assert found.dtype == x.dtype and torch.equal(found, x)


def _refused(*args: Any) -> None:
    raise AssertionError('expected every simulation on static shapes')


@pytest.mark.parametrize('policy', ['lru', 'priority'])
def test_a_full_pool_is_left_to_the_eager_backend(as_is: Counted, policy: str) -> None:
    window, kv_cache = 'rebuild', dict(backend='compile', window_slots=3 * 3, policy=policy)
    small = managed('tiny', window, num_simulations=24, kv_cache=kv_cache)
    roots = uneven_episodes(small, 'tiny', 4)
    verdict = judge_nodes(small, roots, window)
    nodes = world_model_of(small).kv_cache_manager.get_stats_summary()['nodes']
    assert nodes['evictions'] > 0 and nodes['rebuilt_tokens'] > 0
    assert verdict.wrong == 0, str(verdict)


@pytest.mark.parametrize('where', ['clear_recur_cache', 'clear_init_caches', 'clear_caches'])
@BOTH_WINDOWS
def test_a_clear_within_a_search_changes_no_answer(as_is: Counted, where: str, window: str) -> None:
    plays = []
    for backend in ('eager', 'compile'):
        model = model_of(backend, kv_cache=dict(window=window))
        drive = Drive(model, ROWS, SIMULATIONS)
        drive.play(UNEVEN[:3])
        with pytest.MonkeyPatch.context() as patch:
            for owner in (Search, CompiledSearch):
                patch.setattr(owner, 'expand', _clearing(owner.expand, getattr(model.world_model, where)))
            plays.append(drive.play(UNEVEN[3:]))
    assert largest_difference(plays[1], plays[0]) < TOLERANCE[torch.float64]


def _clearing(expand: Callable[..., Any], clear: Callable[[], None]) -> Callable[..., Any]:
    def cleared(self: Search, *args: Any) -> Any:
        if self.expanded == SIMULATIONS // 2:
            clear()
        return expand(self, *args)

    return cleared


@BOTH_WINDOWS
def test_statistics_are_those_of_the_eager_backend(as_is: Counted, window: str) -> None:
    found = []
    for backend in ('eager', 'compile'):
        model = model_of(backend, kv_cache=dict(window=window))
        Drive(model, ROWS, SIMULATIONS).play(UNEVEN)
        found.append(model.world_model.kv_cache_manager)
    eager, static = (manager.get_stats_summary() for manager in found)
    for kind in ('roots', 'nodes'):
        for size in ('bytes', 'capacity', 'occupancy'):  # the step takes its room when the search begins
            assert static[kind].pop(size) >= 0 and eager[kind].pop(size) >= 0
        assert static[kind] == eager[kind]


@BOTH_WINDOWS
@pytest.mark.parametrize('mode', MODES)
def test_validation_accounts_for_every_row(as_is: Counted, mode: str, window: str, tmp_path: Path) -> None:
    policy = validated_policy(mode, tmp_path, kv_cache=dict(backend='compile', window=window))
    uneven_episodes(policy, 'tiny', 6)
    assert_compared(policy)


@pytest.mark.parametrize(
    ('window', 'rows', 'refused'), [('shift', None, False), ('rebuild', 60, False), ('rebuild', 30, True)]
)
def test_long_contexts(as_is: Counted, window: str, rows: int | None, refused: bool) -> None:
    """Paths grow longer than those of the step, and ``max_bytes`` has no room for a window of every node, or
    for the step."""
    options: dict[str, Any] = dict(num_simulations=24, infer_context_length=14)
    row_bytes = model_of('eager', **options).world_model.kv_cache_manager.layout.row_bytes
    bound = None if rows is None else rows * row_bytes
    plays = []
    for backend in ('eager', 'compile'):
        model = model_of(backend, kv_cache=dict(max_bytes=bound, window=window), **options)
        plays.append(Drive(model, ROWS, 24).play(UNEVEN[:5]))
    assert largest_difference(plays[1], plays[0]) < TOLERANCE[torch.float64]
    manager = model.world_model.kv_cache_manager
    assert bound is None or manager.bytes <= bound
    assert (as_is.made == 0) == refused


def test_reanalysis_of_more_rows_than_environments_stays_eager(as_is: Counted) -> None:
    policy = managed('tiny', 'rebuild', kv_cache=dict(backend='compile'))
    verdict = judge_reanalysis(policy, reanalyze(policy, 2), 'rebuild')
    assert verdict.wrong == 0, str(verdict)
    assert as_is.made == 0


@pytest.mark.parametrize('window', ['shift', 'rebuild'])
def test_operators_of_a_simulation_depend_neither_on_depth_nor_on_who_is_ready(
    as_is: Counted, window: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted over a whole search once windows are full."""
    model = model_of('compile', kv_cache=dict(window=window))
    drive = Drive(model, ROWS, SIMULATIONS)
    drive.play(UNEVEN * 2)
    counts: set[tuple[bool, int]] = set()

    def run(self: Any, actions: Any, next_positions: Any, pending: bool) -> Any:
        with Operators() as operators:
            answer = step(self, actions, next_positions, pending)
        counts.add((pending, sum(operators.counts.values())))
        return answer

    step = StaticStep.run
    monkeypatch.setattr(StaticStep, 'run', run)
    drive.play([Step((0, 1, 2, 3)), Step((2,)), Step((3, 1))])
    assert len(counts) == (2 if window == 'rebuild' else 1), counts


@pytest.mark.parametrize('how', [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_an_backend_of_their_own(as_is: Counted, how: Callable[[Any], Any]) -> None:
    model = model_of('compile')
    expected = Drive(model, ROWS, SIMULATIONS).play(UNEVEN)
    twin = how(model)
    assert twin.world_model._session is None
    assert largest_difference(Drive(twin, ROWS, SIMULATIONS).play(UNEVEN), expected) == 0.0
    assert twin.world_model.session._static is not model.world_model.session._static


class Faulty:
    """Runners that are wrong in one way."""

    @staticmethod
    def raising(function: backends.Function, inputs: StepInputs) -> backends.Run:
        raise OSError('no such compiler')

    @staticmethod
    def raising_later(function: backends.Function, inputs: StepInputs) -> backends.Run:
        calls = []

        def run() -> torch.Tensor:
            calls.append(1)
            if len(calls) > 5:
                raise RuntimeError('launch failed')
            return function(inputs)

        return run

    @staticmethod
    def wrong(function: backends.Function, inputs: StepInputs) -> backends.Run:
        def run() -> torch.Tensor:
            inputs.storage.mul_(1.5)
            answer = function(inputs)
            inputs.storage.div_(1.5)
            return answer

        return run


@BOTH_WINDOWS
@pytest.mark.parametrize('fault', ['raising', 'raising_later', 'wrong'])
def test_a_failure_falls_back_with_one_warning(
    fault: str, window: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = expected_answers(window)
    monkeypatch.setitem(backends.RUNNERS, 'compile', getattr(Faulty, fault))
    model = model_of('compile', kv_cache=dict(window=window))
    with pytest.warns(RuntimeWarning, match="backend='compile' does not work here") as caught:
        answers = Drive(model, ROWS, SIMULATIONS).play(UNEVEN)
    assert len([warning for warning in caught if warning.category is RuntimeWarning]) == 1
    assert largest_difference(answers, expected) < TOLERANCE[torch.float64]
    assert not model.world_model.session._static.serves(1)


def test_a_graph_without_cuda_falls_back() -> None:
    expected = expected_answers(steps=tuple(UNEVEN[:2]))
    model = model_of('cudagraph')
    with pytest.warns(RuntimeWarning, match='expected the model on a CUDA device, got cpu'):
        answers = Drive(model, ROWS, SIMULATIONS).play(UNEVEN[:2])
    assert largest_difference(answers, expected) < TOLERANCE[torch.float64]


def test_auto_is_eager_on_a_cpu() -> None:
    world_model = model_of('auto').world_model
    assert world_model.backend == 'eager' and world_model.session._static is None
    assert not world_model.kv_cache_manager.scratch


def _blind(self: StepFunction, inputs: StepInputs, count: int, before: int, like: torch.Tensor) -> Any:
    return like.new_zeros(len(inputs.numbers), 1, count, before + 1)


def _unwritten(owner: type, name: str, part: str) -> tuple[type, str, Callable[..., Any]]:
    """The step writes one of its tensors to where nothing reads it."""
    original = getattr(owner, name)

    def step(self: Any, inputs: StepInputs, *args: Any) -> Any:
        return original(self, inputs._replace(**{part: getattr(inputs, part).clone()}), *args)

    return owner, name, step


SCALED = (*UNEVEN[:5], Step((0, 1, 2), before=lambda model: scale(model, 0.9)))

FAULTS = {
    'padding is seen': (StepFunction, '_mask', _blind),
    'a pending window is not computed': (StepFunction, 'deriving', StepFunction.plain),
    'a derived window is not stored': _unwritten(StepFunction, 'deriving', 'storage'),
    'a step is not stored': _unwritten(StepFunction, '_two_tokens', 'steps'),
    'raw tokens are not stored': _unwritten(StepFunction, '_two_tokens', 'tokens'),
    'weights are those of the first search': (InferenceWeights, 'refresh', lambda self: None),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_a_planted_fault_is_seen(as_is: Counted, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, replacement = FAULTS[fault]
    monkeypatch.setattr(owner, name, replacement)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', RuntimeWarning)  # padding differs from one run to the next
        answers = Drive(model_of('compile'), ROWS, SIMULATIONS).play(SCALED)
    assert largest_difference(answers, expected_answers(steps=SCALED)) > 1e-3
