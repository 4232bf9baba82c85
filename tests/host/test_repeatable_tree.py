"""The compiled trees repeat themselves inside ``repeatable()`` and nowhere else."""

from __future__ import annotations

from types import ModuleType

import pytest

from testing.repeatable_tree import RAND, host_trees, pointer_slots, repeatable, unsupported_reason

pytestmark = pytest.mark.skipif(unsupported_reason() is not None, reason=str(unsupported_reason()))

ACTIONS, ROOTS, SIMULATIONS, DISCOUNT = 7, 3, 40, 0.997


def tied_search(tree: ModuleType) -> list[list[int]]:
    """Visit counts [ROOTS, ACTIONS] of a search in which every prior, value and reward is the same."""
    roots = tree.Roots(ROOTS, [list(range(ACTIONS))] * ROOTS)
    logits = [[0.0] * ACTIONS] * ROOTS
    roots.prepare_no_noise([0.0] * ROOTS, logits, [-1] * ROOTS)
    bounds = tree.MinMaxStatsList(ROOTS)
    bounds.set_delta(0.01)
    for simulation in range(SIMULATIONS):
        results = tree.ResultsWrapper(num=ROOTS)
        to_play = tree.batch_traverse(roots, 19652, 1.25, DISCOUNT, bounds, results, [-1] * ROOTS)[3]
        tree.batch_backpropagate(
            simulation + 1, DISCOUNT, [0.0] * ROOTS, [0.0] * ROOTS, logits, bounds, results, to_play
        )
    return roots.get_distributions()


def sampled_root_actions(tree: ModuleType) -> list[list[list[float]]]:
    """The actions that the sampled tree draws at its roots from equal continuous policies."""
    roots = tree.Roots(ROOTS, [[-1] * ACTIONS] * ROOTS, 2, ACTIONS, True)
    roots.prepare_no_noise([0.0] * ROOTS, [[0.0, 0.0, 1.0, 1.0]] * ROOTS, [-1] * ROOTS)
    return roots.get_sampled_actions()


def test_tied_searches_agree_inside_and_differ_outside() -> None:
    tree, _ = host_trees()
    with repeatable(tree):
        first, second = tied_search(tree), tied_search(tree)
    assert first == second
    assert first[0] == first[1] == first[2], 'equal roots must be searched equally'
    # The seed is the microsecond of the clock, so one repetition may agree by luck; twenty cannot.
    assert any(tied_search(tree) != first for _ in range(20))


def test_sampled_actions_agree_inside_and_differ_outside() -> None:
    _, tree = host_trees()
    with repeatable(tree):
        first, second = sampled_root_actions(tree), sampled_root_actions(tree)
    assert first == second
    assert any(sampled_root_actions(tree) != first for _ in range(20))


def test_the_table_is_restored_after_an_error() -> None:
    import ctypes

    for tree in host_trees():
        slots = pointer_slots(tree, RAND)
        before = [ctypes.c_void_p.from_address(slot).value for slot in slots]
        with pytest.raises(KeyError), repeatable(tree):
            assert [ctypes.c_void_p.from_address(slot).value for slot in slots] != before
            raise KeyError
        assert [ctypes.c_void_p.from_address(slot).value for slot in slots] == before


def test_an_extension_without_rand_is_refused() -> None:
    import xxhash._xxhash as other

    with pytest.raises(RuntimeError, match='found no pointer'), repeatable(other):
        pass
