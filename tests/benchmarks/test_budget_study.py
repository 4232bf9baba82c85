"""The study's measures, and the study from end to end at a size of seconds."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from easydict import EasyDict
from hypothesis import given
from hypothesis import strategies as st

from lzero_kv import KVCacheConfig
from lzero_kv.budget import ALLOCATIONS, SELECTIONS
from studies.budget import methods
from studies.budget.measures import (
    agreement,
    averages,
    compare,
    mean_and_spread,
    pareto_front,
    policy_kl,
    visit_kl,
)
from studies.budget.plays import Answers

ROOT = Path(__file__).resolve().parents[2]
LOGITS = st.lists(st.floats(-8, 8), min_size=3, max_size=3)
COUNTS = st.lists(st.integers(0, 30), min_size=4, max_size=4)
FRAMES, ROWS, STEPS, ACTIONS, EMBED = 3, 2, 5, 4, 7


def slow_kl(first: list[float], second: list[float]) -> float:
    """Of two lists of positive weights, term by term."""
    p, q = [w / sum(first) for w in first], [w / sum(second) for w in second]
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


@given(LOGITS, LOGITS)
def test_divergence_of_policies(full: list[float], other: list[float]) -> None:
    expected = slow_kl([math.exp(x) for x in full], [math.exp(x) for x in other])
    assert policy_kl(np.array(full), np.array(other)) == pytest.approx(expected, abs=1e-12)


@given(COUNTS, COUNTS)
def test_divergence_of_visits(full: list[int], other: list[int]) -> None:
    expected = slow_kl([n + 1 for n in full], [n + 1 for n in other])
    found = visit_kl(np.array(full), np.array(other))
    assert found == pytest.approx(expected, abs=1e-12) and np.isfinite(found)


@given(COUNTS, COUNTS)
def test_agreement_is_about_the_first_of_the_most_visited(full: list[int], other: list[int]) -> None:
    same = full.index(max(full)) == other.index(max(other))
    assert agreement(np.array([full, other]), np.array([other, other])).tolist() == [float(same), 1.0]


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_pareto_front(points: list[tuple[int, int]]) -> None:
    def beaten(point: tuple[int, int]) -> bool:
        return any(o != point and o[0] <= point[0] and o[1] <= point[1] for o in points)

    expected = [i for i, point in enumerate(points) if not beaten(point)]
    front = pareto_front(points)
    assert sorted(front) == expected
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


def some_answers(seed: int) -> Answers:
    rng = np.random.default_rng(seed)
    return Answers(
        policy=rng.normal(size=(FRAMES, ROWS, 1 + STEPS, ACTIONS)),
        value=rng.normal(size=(FRAMES, ROWS, 1 + STEPS)),
        reward=rng.normal(size=(FRAMES, ROWS, STEPS)),
        latent=rng.normal(size=(FRAMES, ROWS, STEPS, EMBED)),
        visits=rng.integers(0, 9, size=(FRAMES, ROWS, ACTIONS)),
        seconds=np.ones(FRAMES),
    )


def test_what_is_compared_frame_by_frame() -> None:
    full, other = some_answers(0), some_answers(1)
    found = compare(full, other)
    for frame in range(FRAMES):
        for row in range(ROWS):
            at = frame, row
            kls = [
                slow_kl(np.exp(full.policy[at][node]).tolist(), np.exp(other.policy[at][node]).tolist())
                for node in range(1 + STEPS)
            ]
            distances = [math.dist(full.latent[at][k], other.latent[at][k]) for k in range(STEPS)]
            expected = {
                'policy_kl_root': kls[0],
                'policy_kl_nodes': sum(kls[1:]) / STEPS,
                'value_root': abs(full.value[at][0] - other.value[at][0]),
                'value_nodes': sum(abs(full.value[at][1:] - other.value[at][1:])) / STEPS,
                'reward_nodes': sum(abs(full.reward[at] - other.reward[at])) / STEPS,
                'latent_1': distances[0],
                'latent_5': distances[4],
                'agreement': float(full.visits[at].argmax() == other.visits[at].argmax()),
                'visit_kl': slow_kl((full.visits[at] + 1).tolist(), (other.visits[at] + 1).tolist()),
            }
            assert {name: of[at] for name, of in found.items()} == pytest.approx(expected)


def test_nothing_differs_from_itself() -> None:
    found = compare(some_answers(0), some_answers(0))
    assert all((of == (name == 'agreement')).all() for name, of in found.items())


def test_averages_are_over_the_chosen_frames() -> None:
    values, decisive = np.array([[1.0, 2.0], [4.0, 8.0]]), np.array([[False, True], [True, False]])
    assert averages({'x': values}, decisive) == {'decisive/x': 3.0, 'all/x': 3.75}
    assert math.isnan(averages({'x': values}, np.zeros((2, 2), bool))['decisive/x'])


def test_mean_and_spread() -> None:
    assert mean_and_spread([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt(7)))
    assert mean_and_spread([2.5]) == (2.5, 0.0)


def test_every_method_is_a_possible_budget_and_has_a_name_of_its_own() -> None:
    chosen = methods.published() + methods.grid() + methods.hybrids()
    for method in chosen:
        for ratio in (1.0, 0.5, 0.25, 0.125):
            cfg = {'kv_cache': {'budget': method.budget(ratio)}}
            budget = KVCacheConfig.from_world_model_cfg(EasyDict(cfg)).budget
            assert budget is not None and budget.sizes(layers=4, context=61).total == int(244 * ratio + 0.5)
    assert len({method.name for method in chosen}) == len(chosen)
    pairs = {(m.options['allocation'], m.options['selection']) for m in methods.grid()}
    assert pairs == {(a, s) for a in ALLOCATIONS for s in SELECTIONS}


def test_the_study_from_end_to_end(tmp_path: Path, warm_python: str) -> None:
    command = ['studies/budget/study.py', '--smoke', '--quick', '--episodes', '3']
    run = subprocess.run(
        [warm_python, *command, '--ratios', '1', '0.25', '--out', str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    document = json.loads(run.stdout.splitlines()[-1])
    assert document == json.loads((tmp_path / 'study.json').read_text())
    rows = {(row['cue'], row['ratio'], row['method']): row for row in document['rows']}
    assert len(rows) == 2 * (2 + len(methods.quick()))
    for (_, ratio, _), row in rows.items():
        if ratio == 1:
            assert row['all/agreement'] == 1 and row['all/policy_kl_nodes'] == row['all/latent_5'] == 0
        else:
            assert row['all/policy_kl_nodes'] > 0
            assert row['node_bytes'] < rows[row['cue'], 1.0, 'full cache']['node_bytes'] / 3.9
    assert (tmp_path / 'study.png').stat().st_size > 10_000
    lines = (tmp_path / 'study.csv').read_text().splitlines()
    assert len(lines) == 1 + len(rows) and lines[0].startswith('method,kind,ratio,cue')
