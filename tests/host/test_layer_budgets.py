"""Layer budgets in the world model: every root and node against the token-by-token oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from lzero_kv.budget import ALLOCATIONS, SELECTIONS, Kept
from testing.episodes import Episodes, Root
from testing.families import FAMILIES, Family
from testing.judging import TOLERANCE, tree_differences
from testing.models import collect_model, make_policy, world_model_of
from testing.precision import precision

from .plays import assert_same_play, fail_with_nan
from .slow_budgets import Answer, SlowBudgets

ROWS = 3
SIMULATIONS = 5
MEMORY = replace(FAMILIES['memory'], heads=2, embed=28, group=7)
"""Two heads: the oracle goes through the tokens of each layer and head one by one."""


def budgeted_policy(
    family: str | Family = MEMORY, budget: dict[str, Any] | None = None, **options: Any
) -> Any:
    """A small policy whose windows hold 15 tokens."""
    cache = dict(budget=budget, **options.pop('kv_cache', {}))
    defaults = dict(
        num_simulations=SIMULATIONS, collector_env_num=ROWS, evaluator_env_num=1, infer_context_length=9,
        dtype=torch.float64,
    )  # fmt: skip
    return make_policy(family, kv=True, kv_cache=cache, **defaults | options)


class Judge:
    """Plays a policy and its oracle side by side."""

    def __init__(self, policy: Any, **episodes: Any) -> None:
        self.policy, self.model = policy, world_model_of(policy)
        self.tracker = self.model.session.budget.tracker
        self.oracle = SlowBudgets(self.model, self.model.cache_config.budget, self.tracker.slots)
        self.episodes = Episodes(policy, range(ROWS), **episodes)
        self.roots: dict[int, tuple[int, Answer]] = {}
        self.differences: list[float] = []
        self.slots = [self.tracker.slots]

    def play(self, schedule: Any) -> Judge:
        for ready in [None] * schedule if isinstance(schedule, int) else schedule:
            self.judge(self.episodes.step(ready))
        return self

    def judge(self, roots: list[Root]) -> None:
        with precision(torch.float64):
            if self.tracker.slots != self.oracle.slots:  # budgets moved before this step
                self.oracle.slots = self.tracker.slots
                self.slots.append(self.tracker.slots)
                for _, answer in self.roots.values():
                    self.oracle.shrunk(answer.history)
            for root in roots:
                answer = self._root(root)
                self.roots[root.env] = root.episode, answer
                self.differences.append(float(np.abs(answer.policy.numpy() - root.policy).max()))
                self.differences += tree_differences(self.oracle, [(root.nodes, answer)]).tolist()

    def _root(self, root: Root) -> Answer:
        episode, before = self.roots.get(root.env, (None, None))
        if before is None or episode != root.episode:
            return self.oracle.root(None, None, root.observations[-1])
        return self.oracle.root(before.history, root.actions[-1], root.observations[-1])

    @property
    def worst(self) -> float:
        return max(self.differences)


def methods() -> list[Any]:
    """Each allocation with half of the selections and each selection with half of the allocations; the other
    pairs are slow tests. ``tests/budget`` has every pair: the world model hands it sizes and scores."""
    return [
        pytest.param(allocation, selection, marks=[pytest.mark.slow] * ((row + column) % 2))
        for row, allocation in enumerate(ALLOCATIONS)
        for column, selection in enumerate(SELECTIONS)
    ]


@pytest.mark.parametrize(('allocation', 'selection'), methods())
def test_every_root_and_node_equals_the_oracle(allocation: str, selection: str) -> None:
    """Uneven episodes, some environments not ready, windows that overflow in roots and in searches."""
    moving = dict(alpha=1.0, smoothing=0.0, hysteresis=0.0)
    options: dict[str, Any] = moving if allocation == 'attention_based' else {}
    budget = dict(ratio=0.55, allocation=allocation, selection=selection, window=2, sinks=2, **options)
    judge = Judge(budgeted_policy(budget=budget), lengths={1: [5, 3]})
    judge.play([{0, 1, 2}] * 3 + [{1}, {0, 2}, {2}] + [{0, 1, 2}] * 4)
    assert judge.worst < TOLERANCE[torch.float64]
    nodes = judge.model.kv_cache_manager.get_stats_summary()['nodes']
    assert nodes['evictions'] == nodes['rebuilt_tokens'] == 0 < nodes['window_tokens']
    assert (len(set(judge.slots)) > 1) == (allocation == 'attention_based')


@pytest.mark.parametrize(
    ('family', 'budget'),
    [
        (MEMORY, dict(ratio=0.5, selection='cake', per_head=True, window=4)),
        ('cartpole', dict(ratio=0.5, selection='cake', window=4)),
        (
            'cartpole',
            dict(ratio=0.4, selection='h2o', allocation='uniform', per_head=True, window=2, sinks=0),
        ),
        (
            'lunarlander_continuous',
            dict(ratio=0.5, selection='h2o', allocation='uniform', step=1, rho=0.8, window=3, sinks=1),
        ),
        (MEMORY, dict(ratio=0.4, selection='hace', allocation='pyramid', strategy='time_decay', window=2)),
        (
            'lunarlander_continuous',
            dict(tokens=7, selection='snapkv', allocation='adaptive', beta=3.0, kernel=3, window=2),
        ),
        (
            'cartpole',
            dict(heavy_ratio=0.2, recent_ratio=0.2, selection='h2o', allocation='uniform', step=1, sinks=0),
        ),
    ],
    ids=['cake-heads', 'cake-rotary', 'h2o-heads', 'decay', 'time-decay', 'snapkv', 'two-ratios'],
)
def test_options_equal_the_oracle(family: str | Family, budget: dict[str, Any]) -> None:
    """Learned and rotary positions, discrete and continuous actions, windows of any length."""
    judge = Judge(budgeted_policy(family, budget), lengths={2: [4]}).play(9)
    assert judge.worst < TOLERANCE[torch.float64]


def test_short_windows_can_be_budgeted() -> None:
    budget = dict(ratio=0.7, selection='h2o', allocation='uniform', window=1, sinks=0, step=1)
    judge = Judge(budgeted_policy('tiny', budget, infer_context_length=4), lengths={2: [4]}).play(9)
    assert judge.worst < TOLERANCE[torch.float64]


def test_preferences_are_those_of_the_attention() -> None:
    moving = dict(allocation='attention_based', smoothing=0.0, hysteresis=1.0)
    budget = dict(ratio=0.5, selection='h2o', window=4, sinks=2, **moving)
    judge = Judge(budgeted_policy(budget=budget)).play(8)
    for layer, (dispersion, shift) in enumerate(judge.tracker.preferences):
        measured = [
            judge.oracle.preference(answer.seen, layer) for _, answer in judge.roots.values() if answer.seen
        ]
        assert dispersion == pytest.approx(np.mean([one[0] for one in measured if one]), rel=1e-9)
        assert shift == pytest.approx(np.mean([one[1] for one in measured if one]), rel=1e-9)


def test_cleared_roots_are_computed_again() -> None:
    """From the whole window, with the attention of that pass: not what token by token would have kept, but a
    root under the same budget."""
    policy = budgeted_policy(budget=dict(ratio=0.5, window=4, sinks=2))
    judge = Judge(policy).play(5)
    judge.model.clear_caches()
    with precision(torch.float64), torch.no_grad():
        for env, (episode, answer) in judge.roots.items():
            answer.history = judge.oracle.shrunk(judge.oracle.computed(answer.history.window))
            judge.roots[env] = episode, answer
    judge.play(3)
    assert judge.worst < TOLERANCE[torch.float64]
    assert judge.model.kv_cache_manager.get_stats_summary()['roots']['rebuilt_tokens'] > 0


@pytest.mark.parametrize('budget', [dict(ratio=1.0), dict(tokens=15), dict(tokens=500, selection='h2o')])
def test_a_full_budget_changes_no_bit(budget: dict[str, Any]) -> None:
    plays = [
        Episodes(budgeted_policy(budget=one, dtype=torch.float32), range(ROWS), lengths={0: [6]}).run(12)
        for one in (None, budget)
    ]
    assert_same_play(*plays, tolerance=0.0)


def test_bytes_go_down_by_the_ratio() -> None:
    rows = {}
    for ratio in (1.0, 0.5, 0.25):
        policy = budgeted_policy(budget=dict(ratio=ratio, window=2, sinks=0), infer_context_length=42)
        Episodes(policy, range(ROWS), record=False).run(3)
        manager = world_model_of(policy).kv_cache_manager
        rows[ratio] = manager.layout.row_bytes
        assert manager.storage.bytes == manager.storage.slots * rows[ratio]
        assert manager.bytes == manager.storage.bytes + manager.search_bytes + manager.record_bytes
        assert manager.storage.tensor.nbytes == manager.storage.bytes
        assert manager.search_bytes == manager._search.nbytes
        kept = world_model_of(policy).session.budget
        held = [] if kept is None else [t for t in vars(kept).values() if isinstance(t, torch.Tensor)]
        assert manager.record_bytes == sum(tensor.nbytes for tensor in held)
        assert manager.get_stats_summary()['total']['bytes'] == manager.bytes
    tokens = 4 * 81  # of all layers
    assert rows[0.5] * tokens == rows[1.0] * round(0.5 * tokens)
    assert rows[0.25] * tokens == rows[1.0] * round(0.25 * tokens)


def test_what_does_not_read_the_attention_does_not_look(monkeypatch: pytest.MonkeyPatch) -> None:
    from lzero_kv.lightzero.inference import attention
    from lzero_kv.lightzero.inference import budget as budgets

    def look(*args: Any) -> None:
        raise AssertionError('the attention was read')

    for module in (budgets, attention):
        monkeypatch.setattr(module, 'attention_probabilities', look)
    blind = budgeted_policy(budget=dict(ratio=0.5, allocation='adaptive', selection='streaming', sinks=2))
    Episodes(blind, range(ROWS), record=False).run(12)
    looking = budgeted_policy(budget=dict(ratio=0.5, selection='h2o', allocation='uniform'))
    with pytest.raises(AssertionError, match='was read'):
        Episodes(looking, range(ROWS), record=False).run(2)


def test_searches_alone_and_together_are_the_same() -> None:
    budget = dict(ratio=0.5, allocation='uniform', selection='cake', window=4, sinks=2)
    together = Episodes(budgeted_policy(budget=budget), range(ROWS)).run(7)
    alone = Episodes(budgeted_policy(budget=budget), [1]).run(7)
    assert [root.visits for root in together if root.env == 1] == [root.visits for root in alone]


def test_nan_leaves_no_trace() -> None:
    budget = dict(ratio=0.5, selection='hace', window=4, sinks=2)
    policy, undisturbed = budgeted_policy(budget=budget), budgeted_policy(budget=budget)
    fail_with_nan(policy, range(ROWS))
    assert_same_play(Episodes(policy, range(ROWS)).run(9), Episodes(undisturbed, range(ROWS)).run(9))


def test_a_refused_root_inference_leaves_the_budgets_as_they_are() -> None:
    """Budgets move where a root inference begins; one that is refused leaves the running search intact."""
    moving = dict(ratio=0.5, window=2, allocation='attention_based', alpha=1.0, hysteresis=0.0, smoothing=0.0)
    policy = budgeted_policy(budget=moving)
    model, session = collect_model(policy), world_model_of(policy).session
    generator = torch.Generator().manual_seed(0)
    moved, last = 0, torch.zeros(ROWS, *policy._cfg.model.observation_shape, dtype=torch.float64)
    for step in range(24):
        before = session.geometry.widths
        new = torch.randn(last.shape, generator=generator, dtype=torch.float64)
        for bad in (dict(current_obs_batch=new * torch.nan), dict(action_batch=[99] * ROWS)):
            if step:
                given = dict(obs_batch=last, action_batch=[step % 4] * ROWS, current_obs_batch=new)
                with pytest.raises(ValueError, match='expected'):
                    model.initial_inference(**given | bad, start_pos=[np.array(step)] * ROWS)
        assert session.geometry.widths == before
        model.initial_inference(last, [step % 4 if step else -1] * ROWS, new, [np.array(step)] * ROWS)
        moved += session.geometry.widths != before
        last = new
    assert moved


def test_a_search_may_be_the_first_to_ask_for_the_session() -> None:
    """In inference mode, where tensors are made that could not be written to outside it."""
    policy, undisturbed = (budgeted_policy(budget=dict(ratio=0.5)) for _ in range(2))
    model = world_model_of(policy)
    with torch.inference_mode():
        model.begin_search(np.zeros((ROWS, 1, model.embed_dim)), None, SIMULATIONS)
    assert_same_play(Episodes(policy, range(ROWS)).run(3), Episodes(undisturbed, range(ROWS)).run(3))


def test_attention_that_is_not_finite_names_layer_and_rows() -> None:
    budget = dict(ratio=0.5, selection='hace', window=4, sinks=2)
    policy, undisturbed = budgeted_policy(budget=budget), budgeted_policy(budget=budget)
    weight = world_model_of(policy).transformer.blocks[1].attn.key.weight
    good = weight.detach().clone()
    with torch.no_grad():
        weight[2] = torch.nan
    with pytest.raises(RuntimeError, match=r'layer 1 of the world model: .* got others in rows \[0, 1'):
        Episodes(policy, range(ROWS), seed=3).run(1)
    with torch.no_grad():
        weight.copy_(good)
    world_model_of(policy).clear_caches()
    assert_same_play(Episodes(policy, range(ROWS)).run(6), Episodes(undisturbed, range(ROWS)).run(6))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match='window=4, sinks=0 and minimum=1 of 4 layers need 20 slots'):
        budgeted_policy(budget=dict(ratio=0.1))
    with pytest.raises(ValueError, match=r"kv_cache\.budget: it cannot be combined with window='shift'"):
        budgeted_policy(budget=dict(ratio=0.5), kv_cache=dict(window='shift'))
    with pytest.raises(ValueError, match='compares whole histories'):
        budgeted_policy(budget=dict(ratio=0.5), world_model=dict(cache_validation_mode='store'))
    budgeted_policy(budget=dict(ratio=1.0), world_model=dict(cache_validation_mode='store'))
    policy = budgeted_policy(budget=dict(ratio=0.5))
    row = world_model_of(policy).kv_cache_manager.layout.row_bytes
    tight = budgeted_policy(budget=dict(ratio=0.5), kv_cache=dict(max_bytes=22 * row), num_simulations=90)
    with pytest.raises(RuntimeError, match=r'inference needs .* beside the pools; raise kv_cache\.max_bytes'):
        Episodes(tight, range(ROWS), record=False).run(1)


def _newest(layer: Any, slots: int) -> Kept:
    kept = layer.newest(min(slots, layer.columns))
    return Kept(kept.indices, kept.lengths.clamp(max=kept.indices.shape[2]))


FAULTS: dict[str, tuple[str, str, Any]] = {
    'the newest tokens stay whatever the scores': (
        'WindowBudget', 'choose',
        lambda choose, self, layer, number: _newest(layer, self.tracker.slots[number]),
    ),
    'attention of the past is forgotten': (
        'WindowBudget', '_note', lambda note, self, slots, layers, lengths: (
            note(self, slots, layers, lengths), self._accumulated.zero_(), self._recent.zero_()
        ),
    ),
    'positions are forgotten': (
        'WindowBudget', '_note', lambda note, self, slots, layers, lengths: (
            note(self, slots, layers, lengths), self._positions.add_(1)
        ),
    ),
    'a neighbour\'s root': (
        'WindowBudget', 'load', lambda load, self, slots, room=0: load(self, slots[::-1].copy(), room)
    ),
    'searches see one token too many': (
        'BudgetedRootStep', 'held', lambda held, self: held.fget(self) + 1
    ),
    'a derived window shows one token too many': (
        'WindowBudget', 'derive', lambda derive, self, *args: derive(self, *args) + 1
    ),
    'what moved keeps its old tokens': (
        'BudgetedRootStep', 'restore', lambda restore, self, *args: None
    ),
}  # fmt: skip


@pytest.mark.parametrize('fault', FAULTS)
def test_a_planted_fault_is_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lzero_kv.lightzero.inference import budget as budgets

    owner, name, planted = FAULTS[fault]
    holder = getattr(budgets, owner)
    original = vars(holder)[name]

    def faulty(self: Any, *args: Any, **kwargs: Any) -> Any:
        return planted(original, self, *args, **kwargs)

    budget = dict(ratio=0.55, allocation='uniform', selection='hace', window=2, sinks=2)
    policy = budgeted_policy(budget=budget)
    judge = Judge(policy, lengths={1: [5, 3]})
    monkeypatch.setattr(holder, name, property(faulty) if isinstance(original, property) else faulty)
    assert any(judge.play(1).worst > TOLERANCE[torch.float64] for _ in range(9))
