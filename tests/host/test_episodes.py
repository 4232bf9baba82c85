"""The driver plays the same episodes however they are batched, and leaves nothing behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from testing.episodes import Episodes
from testing.families import FAMILIES
from testing.models import make_policy, world_model_of
from testing.recorder import replaced


def policy_of(environments: int, **options: object) -> object:
    return make_policy(
        'tiny',
        kv=False,
        collector_env_num=environments,
        evaluator_env_num=1,
        **{'num_simulations': 8, **options},
    )


def test_two_plays_are_equal() -> None:
    one, other = (Episodes(policy_of(3), range(3)).run(3) for _ in range(2))
    for root, again in zip(one, other, strict=True):
        assert root.visits == again.visits and root.action == again.action
        assert all(np.array_equal(a.latent, b.latent) for a, b in zip(root.nodes, again.nodes, strict=True))


def test_a_stream_is_the_same_alone_and_among_others() -> None:
    together = [root for root in Episodes(policy_of(3), [5, 6, 7]).run(4) if root.env == 1]
    alone = Episodes(policy_of(1), [6]).run(4)
    for root, again in zip(together, alone, strict=True):
        assert torch.equal(torch.stack(root.observations), torch.stack(again.observations))
        assert root.actions == again.actions
    # The first root has neither a context nor a padded neighbour.
    np.testing.assert_allclose(together[0].policy, alone[0].policy, atol=1e-4)


def test_streams_seeds_and_episodes_differ() -> None:
    first = Episodes(policy_of(2), [0, 1], lengths={0: [2]}).run(3)
    seen = [root.observations[-1] for root in first] + [
        Episodes(policy_of(1), [0], seed=1).run(1)[0].observations[-1]
    ]
    assert len({tuple(observation.tolist()) for observation in seen}) == len(seen)


def test_episodes_end_after_their_lengths() -> None:
    roots = Episodes(policy_of(2), [0, 1], lengths={0: [2, 3], 1: [4]}).run(6)
    assert [root.step for root in roots if root.env == 0] == [0, 1, 0, 1, 2, 0]
    assert [root.episode for root in roots if root.env == 0] == [0, 0, 1, 1, 1, 2]
    assert [root.step for root in roots if root.env == 1] == [0, 1, 2, 3, 0, 1]


def test_an_environment_that_is_not_ready_waits() -> None:
    roots = Episodes(policy_of(3), range(3)).run([{0, 1, 2}, {0, 2}, {0, 1, 2}])
    assert [(root.env, root.step) for root in roots] == [
        (0, 0),
        (1, 0),
        (2, 0),
        (0, 1),
        (2, 1),
        (0, 2),
        (1, 1),
        (2, 2),
    ]


@pytest.mark.parametrize('family', ['tiny', 'lunarlander_continuous'])
def test_every_expanded_node_is_recorded(family: str) -> None:
    shape = FAMILIES[family]
    policy = make_policy(family, kv=False, num_simulations=8, collector_env_num=2, evaluator_env_num=1)
    for root in Episodes(policy, range(2)).run(2):
        assert [node.number for node in root.nodes] == list(range(1, 9))
        assert all(0 <= node.parent < node.number for node in root.nodes)
        assert root.nodes[0].parent == 0
        for node in root.nodes:
            assert node.latent.shape == (shape.embed,) and node.reward.shape == node.value.shape == (13,)
            assert node.policy.shape == root.policy.shape == (shape.actions * (1 + shape.continuous),)
            assert node.action.shape == ((shape.actions,) if shape.continuous else ())


def test_the_host_is_left_as_found() -> None:
    import lzero.policy.unizero as module

    from testing.repeatable_tree import host_trees

    policy = policy_of(1)
    before = (np.random.dirichlet, module.select_action, host_trees()[0].batch_traverse)
    Episodes(policy, [0]).run(1)
    assert (np.random.dirichlet, module.select_action, host_trees()[0].batch_traverse) == before
    assert 'forward_recurrent_inference' not in vars(world_model_of(policy))


def test_replaced_restores_after_an_error() -> None:
    class Host:
        setting = 1

    host = Host()
    with pytest.raises(KeyError), replaced(host, 'setting', 2):
        assert host.setting == 2
        raise KeyError
    assert host.setting == 1 and 'setting' not in vars(host)
