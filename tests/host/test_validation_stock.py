"""Mistakes of the stock cache: ours is found right, and each difference gets its cause by evidence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lzero_kv.lightzero.inference.events import NodesExpanded, Observer
from lzero_kv.telemetry.counters import Cause
from testing.episodes import Episodes
from testing.lookups import StockLookups
from testing.models import collect_model, load_weights, make_policy, random_weights, world_model_of
from testing.reanalysis import reanalyze

from .validated import (
    MODES,
    assert_accounted,
    counters_of,
    heads_zeroed,
    position_correction_refreshed,
    validated_policy,
)

BOTH_MODES = pytest.mark.parametrize('mode', MODES)


def play(policy: Any, schedule: Any, environments: int = 3, **options: Any) -> Any:
    """Play, and give back the counters, of which every row is accounted for."""
    Episodes(policy, range(environments), record=False, **options).run(schedule)
    counters = counters_of(policy)
    assert_accounted(counters.total)
    return counters


class RingOracle(Observer):
    """Counts lookups of parents that a ring of ``size`` slots has overwritten: child ``n`` of row ``r`` was
    the ``(n - 1) * rows + r``-th that was stored in its search."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.overwritten = 0

    def nodes_expanded(self, event: NodesExpanded) -> None:
        rows = len(event.parents)
        stored = (event.simulation - 1) * rows
        for row, parent in enumerate(event.parents.tolist()):
            self.overwritten += parent > 0 and stored - ((parent - 1) * rows + row) > self.size


def test_more_simulations_than_the_ring_holds(tmp_path: Path) -> None:
    """50 slots for each of two environments, 100 simulations."""
    policy = validated_policy('store', tmp_path, environments=2, num_simulations=100, infer_context_length=2)
    ring = RingOracle(2 * 50)
    world_model_of(policy).observers.append(ring)
    nodes = play(policy, 1, 2).nodes
    assert nodes.compared == 2 * 100
    assert nodes.causes == {Cause.SLOT_OVERWRITTEN: ring.overwritten}
    assert nodes.different == ring.overwritten > 0
    assert nodes.largest_stock > 0.1, 'other histories are far'
    assert nodes.policy.count == nodes.value.count == nodes.different and nodes.value.largest > 0.1


@pytest.mark.parametrize('simulations, equal', [(50, True), (100, False)])
def test_as_many_lookups_are_wrong_as_in_the_stock_package(
    simulations: int, equal: bool, tmp_path: Path
) -> None:
    """With constant rewards, priors and values both search the same trees, whatever the caches serve."""
    wrong = []
    for kv in (False, True):
        options: dict[str, Any] = dict(num_simulations=simulations, infer_context_length=2)
        if kv:
            policy = validated_policy('store', tmp_path, environments=2, **options)
        else:
            policy = make_policy('tiny', kv=False, collector_env_num=2, evaluator_env_num=1, **options)
        heads_zeroed(policy, 'head_value', 'head_policy', 'head_rewards')
        if kv:
            nodes = play(policy, 1, 2).nodes
            wrong.append((nodes.compared, nodes.different, nodes.causes[Cause.SLOT_OVERWRITTEN]))
        else:
            lookups = StockLookups(policy)
            with lookups.counted():
                Episodes(policy, range(2), record=False).run(1)
            wrong.append((lookups.total, lookups.wrong, lookups.wrong))
    assert wrong[0] == wrong[1]
    assert (wrong[0][1] == 0) is equal


def test_overwritten_slots_move_everything_below(tmp_path: Path) -> None:
    """In the whole model a wrong lookup makes the nodes below it wrong, and the cause is handed down."""
    policy = validated_policy(
        'model', tmp_path, environments=1, num_simulations=150, kv_cache=dict(window='shift')
    )
    position_correction_refreshed(policy)
    ring = RingOracle(50)
    world_model_of(policy).observers.append(ring)
    nodes = play(policy, 1, 1).nodes
    # Two nodes that were served the same keys and values lead to equal latent states.
    assert {Cause.SLOT_OVERWRITTEN} <= set(nodes.causes) <= {Cause.SLOT_OVERWRITTEN, Cause.EQUAL_LATENTS}
    assert nodes.causes[Cause.SLOT_OVERWRITTEN] > ring.overwritten > 0


@BOTH_MODES
def test_a_subset_of_ready_environments(mode: str, tmp_path: Path) -> None:
    policy = validated_policy(mode, tmp_path, infer_context_length=8)
    roots = play(policy, [{0, 1, 2}, {0, 1, 2}, {1, 2}, {0, 1, 2}, {0, 1, 2}]).roots
    assert roots.compared == 14
    # The third step looks for environments 1 and 2 in the dictionaries of 0 and 1, then wipes all inputs.
    assert roots.causes[Cause.OTHER_ENVIRONMENT] == 2
    assert roots.causes[Cause.RESTARTED] == (3 if mode == 'store' else 6)


@BOTH_MODES
def test_an_episodes_end_restarts_all(mode: str, tmp_path: Path) -> None:
    policy = validated_policy(mode, tmp_path, infer_context_length=8)
    roots = play(policy, 3, lengths={1: [2]}).roots
    # Environment 1 begins anew and is right; the other two lost their context.
    assert roots.causes == {Cause.RESTARTED: 2}
    assert roots.equal == 9 - 2


@BOTH_MODES
@pytest.mark.parametrize('environments', [1, 4])
def test_equal_latent_states_of_different_histories(mode: str, environments: int, tmp_path: Path) -> None:
    # Windows that move keep one token, whose keys and values equal latent states share.
    context = 8 if mode == 'store' else 2
    policy = validated_policy(
        mode, tmp_path, environments=environments, num_simulations=12, infer_context_length=context
    )
    heads_zeroed(policy, 'head_observations')
    position_correction_refreshed(policy)
    nodes = play(policy, 2, environments).nodes
    assert nodes.causes[Cause.EQUAL_LATENTS] > 0
    assert (nodes.causes[Cause.OTHER_ENVIRONMENT] > 0) is (environments > 1)
    assert Cause.SLOT_OVERWRITTEN not in nodes.causes
    if mode == 'store':
        assert nodes.causes[Cause.EQUAL_LATENTS] == nodes.different


def test_zero_padding(tmp_path: Path) -> None:
    """Rows of different depth share a batch; alone in its batch, the same row is right."""
    several_counters = []
    for environments in (2, 1):
        policy = validated_policy(
            'model', tmp_path, environments=environments, num_simulations=12, infer_context_length=16
        )
        several_counters.append(play(policy, 2, environments).nodes)
    together, alone = several_counters
    assert together.causes == {Cause.ZERO_PADDING: together.different} and together.different > 0
    assert alone.equal == alone.compared


def test_a_root_lost_by_encoding_its_observation_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = validated_policy('store', tmp_path)
    episodes = Episodes(policy, range(3), record=False)
    episodes.run(2)
    tokenizer = world_model_of(policy).tokenizer
    encode, calls = tokenizer.encode_to_obs_embeddings, []

    def in_other_bits(observations: torch.Tensor) -> torch.Tensor:
        calls.append(len(observations))
        latents = encode(observations)
        return latents if len(calls) == 1 else latents * (1 + 1e-6)  # the manager encodes first, once

    monkeypatch.setattr(tokenizer, 'encode_to_obs_embeddings', in_other_bits)
    episodes.step()
    counters = counters_of(policy)
    assert_accounted(counters.total)
    assert counters.roots.causes == {Cause.ROOT_LOST: 3}


def test_a_root_lost_in_a_smaller_batch(tmp_path: Path) -> None:
    """The same without a patch: what the encoder computes depends on the batch size in its last bits."""
    policy = validated_policy('model', tmp_path, environments=8)
    model, draw = collect_model(policy), torch.Generator().manual_seed(0)
    for ready in (7, 3, 1):
        first, second, third = torch.randn(3, 8, 7, generator=draw)
        model.initial_inference(torch.zeros(8, 7), [-1] * 8, first, [np.array(0)] * 8)
        model.initial_inference(first, [1] * 8, second, [np.array(1)] * 8)
        model.initial_inference(second[:ready], [1] * ready, third[:ready], [np.array(2)] * ready)
    roots = counters_of(policy).roots
    assert_accounted(roots)
    assert roots.compared == 3 * 16 + 11
    # which rows are lost is the processor's: where not all of a batch are, they are shorter than the rest
    assert roots.causes[Cause.ROOT_LOST] == roots.different > 0
    assert set(roots.causes) <= {Cause.ROOT_LOST, Cause.ZERO_PADDING}


@BOTH_MODES
def test_a_crash_on_a_miss(mode: str, tmp_path: Path) -> None:
    """A window of one step is never stored."""
    policy = validated_policy(mode, tmp_path, infer_context_length=1)
    counters = play(policy, 2)
    assert counters.roots.causes == {Cause.CRASHED: 3}, (
        'an observation, an action and an observation are three'
    )
    # The model does not run on after its crash; the dictionaries are asked for every row.
    assert counters.nodes.causes == {Cause.CRASHED: 2 * 3 * 4 if mode == 'store' else 3}


@BOTH_MODES
def test_a_crash_after_a_clear_between_root_and_search(mode: str, tmp_path: Path) -> None:
    policy = validated_policy(mode, tmp_path, environments=2)
    model, world_model = collect_model(policy), world_model_of(policy)
    timestep = [np.array(0), np.array(0)]
    root = model.initial_inference(torch.zeros(2, 7), [-1, -1], torch.randn(2, 7), timestep)
    for store in (*world_model.past_kv_cache_init_infer_envs, world_model.past_kv_cache_recurrent_infer):
        store.clear()
    model.recurrent_inference([(root.latent_state.numpy(), torch.tensor([1, 3]))], 0, [1, 1], timestep)
    assert_accounted(counters_of(policy).total)
    assert counters_of(policy).nodes.causes == {Cause.CRASHED: 2}


@BOTH_MODES
def test_fewer_last_inputs_than_rows_crash_the_host(mode: str, tmp_path: Path) -> None:
    """An evaluation of fewer environments leaves its own last inputs to collection."""
    policy = validated_policy(mode, tmp_path, evaluator_env_num=2)
    collection = Episodes(policy, range(3), record=False)
    collection.run(2)
    Episodes(policy, [10, 11], mode='eval', record=False).run(2)
    collection.step()
    assert_accounted(counters_of(policy).total)
    assert counters_of(policy).roots.causes[Cause.CRASHED] == 3


def test_a_search_whose_nodes_were_not_compared_does_not_count(tmp_path: Path) -> None:
    """LightZero's root inference has room for one environment of two, so that no search follows in it."""
    policy = validated_policy('model', tmp_path, environments=2, world_model=dict(
        cache_validation_mode='model', env_num=1
    ))  # fmt: skip
    counters = play(policy, 4, environments=2)
    assert (counters.roots.causes[Cause.CRASHED], counters.roots.compared) == (6, 8)
    assert (counters.searches, counters.validated, counters.nodes.compared) == (4, 0, 0)


def test_a_root_without_timesteps_crashes_the_host(tmp_path: Path) -> None:
    """It cuts them to the batch, whatever was passed."""
    policy = validated_policy('model', tmp_path, environments=2)
    world_model, draw = world_model_of(policy), torch.randn(3, 2, 7)
    world_model.forward_initial_inference(dict(obs=draw[0], action=[-1, -1], current_obs=draw[1]))
    world_model.forward_initial_inference(dict(obs=draw[1], action=[1, 3], current_obs=draw[2]))
    assert_accounted(counters_of(policy).total)
    assert counters_of(policy).roots.causes == {Cause.CRASHED: 2}


@pytest.mark.parametrize('refreshed', [False, True])
def test_a_stale_window_correction(refreshed: bool, tmp_path: Path) -> None:
    policy = validated_policy(
        'model', tmp_path, environments=1, kv_cache=dict(window='shift'), infer_context_length=2
    )
    load_weights(policy, random_weights(collect_model(policy), seed=5))
    if refreshed:
        position_correction_refreshed(policy)
    total = play(policy, 4, 1).total
    assert total.causes == ({} if refreshed else {Cause.WINDOW_CORRECTION: total.different})
    assert (total.different == 0) is refreshed


def test_a_refreshed_correction_is_no_cause_of_what_another_fault_moved(tmp_path: Path) -> None:
    """A restarted row's window moves too, by the right correction: that is not why it differs."""
    policy = validated_policy('model', tmp_path, environments=2, kv_cache=dict(window='shift'))
    position_correction_refreshed(policy)
    total = play(policy, 9, 2, lengths={1: [2, 9]}).total
    assert total.causes[Cause.RESTARTED] > 0
    assert Cause.WINDOW_CORRECTION not in total.causes


def test_a_window_that_is_not_rebuilt(tmp_path: Path) -> None:
    """However fresh the correction, it is an approximation of a rebuilt window."""
    policy = validated_policy('model', tmp_path, environments=1, infer_context_length=3)
    position_correction_refreshed(policy)
    total = play(policy, 4, 1).total
    assert total.causes == {Cause.WINDOW_CORRECTION: total.different} and total.different > 0


def test_rotary_positions(tmp_path: Path) -> None:
    """Every simulated step stands two positions too far; roots are right."""
    policy = validated_policy(
        'model', tmp_path, family='cartpole', environments=1, kv_cache=dict(window='shift')
    )
    counters = play(policy, 3, 1)
    assert counters.roots.equal == 3
    assert counters.nodes.causes == {Cause.ROTARY_POSITION: 3 * 4}


@pytest.mark.parametrize(('timesteps', 'max_seq_len'), [(False, 8192), (True, 6), (False, 5)])
def test_rotary_positions_that_leave_the_table(timesteps: bool, max_seq_len: int, tmp_path: Path) -> None:
    """Environments without a timestep (-1), and episodes longer than the table: the host begins again."""
    policy = validated_policy(
        'model',
        tmp_path,
        family='cartpole',
        environments=2,
        num_simulations=3,
        world_model=dict(cache_validation_mode='model', max_seq_len=max_seq_len),
    )
    Episodes(policy, range(2), lengths={1: [2, 5]}, record=False, timesteps=timesteps).run(6)
    counters = counters_of(policy)
    assert_accounted(counters.total)
    assert counters.total.causes[Cause.ROTARY_POSITION] > counters.nodes.compared


@BOTH_MODES
def test_reanalysis_restarts_at_every_node(mode: str, tmp_path: Path) -> None:
    policy = validated_policy(mode, tmp_path, environments=8, num_simulations=6)
    reanalyze(policy, 2)
    counters = policy._target_model.world_model.validation
    assert_accounted(counters.total)
    assert counters.reanalysis.compared == 2 * 4 * 6
    assert counters.reanalysis.causes == {Cause.RESTARTED: counters.reanalysis.different}
    assert counters.reanalysis.equal >= 2 * 4, 'children of roots have no more history'


@BOTH_MODES
def test_where_the_stock_cache_is_right(mode: str, tmp_path: Path) -> None:
    """50 simulations, all ready, distinct latent states, a refreshed correction, rows of one length."""
    policy = validated_policy(
        mode,
        tmp_path,
        environments=2,
        num_simulations=50,
        kv_cache=dict(window='shift'),
        infer_context_length=2,
    )
    position_correction_refreshed(policy)
    counters = play(policy, 2, 2)
    assert counters.nodes.equal == 2 * 2 * 50 and counters.roots.equal == 2 * 2
