"""The recomputation is right: its two forms agree, and the host agrees with it wherever the host is right."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lzero_kv.validation.oracle import Oracle, Token
from testing.episodes import Episodes, Root
from testing.families import FAMILIES
from testing.forest import Forest, Place
from testing.fresh import fresh_answers, history_of
from testing.judging import judge_nodes, judge_roots
from testing.models import make_policy, world_model_of
from testing.precision import precision
from testing.replay import child_of, root_of

EXACT: dict[str, Any] = dict(rtol=0.0, atol=1e-10)
BOTH_POSITIONS = pytest.mark.parametrize('family', ['lunarlander', 'cartpole'], ids=['learned', 'rope'])


def single(family: str, steps: int, **options: Any) -> tuple[Any, list[Root]]:
    """A float64 policy of one environment and its roots after ``steps`` steps; the stock position
    correction refreshed.
    """
    policy = make_policy(
        family,
        kv=False,
        dtype=torch.float64,
        num_simulations=options.pop('simulations', 12),
        collector_env_num=1,
        evaluator_env_num=1,
        **options,
    )
    if not FAMILIES[family].rotary:
        world_model_of(policy).precompute_pos_emb_diff_kv()
    return policy, Episodes(policy, [0]).run(steps)


@BOTH_POSITIONS
def test_token_by_token_equals_one_causal_pass(family: str) -> None:
    policy, roots = single(family, 3)
    oracle, root = Oracle(world_model_of(policy)), roots[-1]
    with precision(torch.float64), torch.no_grad():
        replayed = root_of(oracle, root.observations, root.actions)
        features, window = oracle.causal(history_of(oracle, root.observations, root.actions))
        torch.testing.assert_close(
            replayed.policy, oracle.model.head_policy.head_module(features[-1:])[0], **EXACT
        )
        assert len(replayed.window.tokens) == len(window.tokens) == 5
        for got, expected in ((replayed.window.keys, window.keys), (replayed.window.values, window.values)):
            for layer, other in zip(got, expected, strict=True):
                torch.testing.assert_close(torch.stack(layer), torch.stack(other), **EXACT)


@BOTH_POSITIONS
def test_it_equals_two_calls_of_the_host(family: str) -> None:
    policy, roots = single(family, 2)
    model, root = world_model_of(policy), roots[1]
    oracle = Oracle(model)
    with precision(torch.float64), torch.no_grad():
        first, second = (oracle.encode(observation)[None, None] for observation in root.observations)
        cache = model.transformer.generate_empty_keys_values(n=1, max_tokens=model.context_length)
        model.forward({'obs_embeddings': first}, cache, start_pos=0)
        action = torch.tensor([[int(root.actions[0])]])
        act = model.forward({'act_tokens': action}, cache, start_pos=[1])
        obs = model.forward({'obs_embeddings': second}, cache, start_pos=[1])
        answer = child_of(
            oracle, root_of(oracle, root.observations[:1], []), root.actions[0], second.reshape(-1)
        )
    assert answer.reward is not None and answer.latent is not None
    torch.testing.assert_close(answer.reward, act.logits_rewards.reshape(-1), **EXACT)
    torch.testing.assert_close(answer.latent, act.logits_observations.reshape(-1), **EXACT)
    torch.testing.assert_close(answer.policy, obs.logits_policy.reshape(-1), **EXACT)
    torch.testing.assert_close(answer.value, obs.logits_value.reshape(-1), **EXACT)
    for layer in oracle.layers:
        keys, values = cache[layer].get()
        torch.testing.assert_close(torch.stack(answer.window.keys[layer], 1), keys[0], **EXACT)
        torch.testing.assert_close(torch.stack(answer.window.values[layer], 1), values[0], **EXACT)


@pytest.mark.parametrize(
    ('family', 'context'),
    [
        pytest.param(name, context, marks=[pytest.mark.slow] * ((row + column) % 2))
        for row, name in enumerate(name for name in FAMILIES if not FAMILIES[name].rotary)
        for column, context in enumerate((2, 4))
    ],
)
def test_it_equals_the_host_through_search_and_overflow(family: str, context: int) -> None:
    """Where the host is right: one environment, its position correction refreshed, no more nodes than its
    ring holds.
    """
    policy, roots = single(family, 6, infer_context_length=context, simulations=6)
    assert judge_roots(policy, roots).wrong == 0
    verdict = judge_nodes(policy, roots)
    assert verdict.total == 36 and verdict.wrong == 0, verdict


def test_the_two_windows_differ_only_after_an_overflow() -> None:
    policy, roots = single('lunarlander', 6)
    shift, rebuild = (Oracle(world_model_of(policy), window) for window in ('shift', 'rebuild'))
    with precision(torch.float64):
        for root in roots:
            one, other = (root_of(oracle, root.observations, root.actions) for oracle in (shift, rebuild))
            # Five tokens stay of context 8; the answer of a step is given before its window is trimmed.
            assert torch.equal(one.policy, other.policy) is (root.step <= 3)
            assert len(one.window.tokens) == len(other.window.tokens) == min(2 * root.step + 1, 5)


@BOTH_POSITIONS
def test_a_rebuilt_window_is_the_hosts_pass_over_its_raw_tokens(family: str) -> None:
    policy, roots = single(family, 6)
    model, root = world_model_of(policy), roots[-1]
    oracle = Oracle(model, 'rebuild')
    with precision(torch.float64), torch.no_grad():
        window = root_of(oracle, root.observations, root.actions).window
        assert [token.position for token in window.tokens] == [6, 7, 8, 9, 10]
        tokens = history_of(oracle, root.observations, root.actions)[-5:]
        sequence = torch.stack([token.embedding for token in tokens])[None]
        if not oracle.rotary:
            sequence = sequence + model.pos_emb.weight[:5]
        cache = model.transformer.generate_empty_keys_values(n=1, max_tokens=model.context_length)
        model.transformer(sequence, cache, start_pos=[6])
        for layer in oracle.layers:
            keys, values = cache[layer].get()
            torch.testing.assert_close(torch.stack(window.keys[layer], 1), keys[0], **EXACT)
            torch.testing.assert_close(torch.stack(window.values[layer], 1), values[0], **EXACT)


def test_a_rotated_key_stays_through_a_shift() -> None:
    policy, roots = single('cartpole', 6)
    oracle = Oracle(world_model_of(policy))
    with precision(torch.float64):
        before = root_of(oracle, roots[-2].observations, roots[-2].actions).window
        after = root_of(oracle, roots[-1].observations, roots[-1].actions).window
    assert [token.position for token in after.tokens] == [6, 7, 8, 9, 10]
    for layer in oracle.layers:
        assert torch.equal(torch.stack(after.keys[layer][:3]), torch.stack(before.keys[layer][2:]))


def test_without_a_latent_the_predicted_one_is_taken() -> None:
    policy, roots = single('lunarlander', 1)
    oracle, root = Oracle(world_model_of(policy)), roots[0]
    with precision(torch.float64):
        top = root_of(oracle, root.observations, root.actions)
        predicted = child_of(oracle, top, 1)
        again = child_of(oracle, top, 1, predicted.latent)
    assert torch.equal(predicted.value, again.value)


@pytest.mark.parametrize('window', ['shift', 'rebuild'])
def test_a_judge_sees_one_wrong_number(window: str) -> None:
    policy, roots = single('tiny', 2, infer_context_length=17)
    node = roots[1].nodes[4]
    value = node.value.copy()
    value[3] += 1e-6
    nodes = [*roots[1].nodes]
    nodes[4] = type(node)(**{**vars(node), 'value': value})
    spoilt = type(roots[1])(**{**vars(roots[1]), 'nodes': tuple(nodes)})
    verdict = judge_nodes(policy, [spoilt], window)
    assert verdict.wrong == 1
    assert np.flatnonzero(verdict.differences > verdict.tolerance).tolist() == [4]


@pytest.mark.parametrize('family', ['lunarlander', 'cartpole', 'lunarlander_continuous', 'atari'])
def test_one_pass_over_the_tokens_in_sight_equals_token_by_token(family: str) -> None:
    """Roots and paths below them, before and after their windows overflow, all lengths at once."""
    policy, roots = single(family, 5, simulations=2)
    oracle = Oracle(world_model_of(policy), 'rebuild')
    with precision(torch.float64), torch.no_grad():
        histories, expected = [], []
        for root in roots:
            tokens, answer = (
                history_of(oracle, root.observations, root.actions),
                root_of(oracle, root.observations, root.actions),
            )
            for node in (None, *root.nodes):
                if node is not None:
                    latent, first = torch.from_numpy(node.latent), tokens[-1].position + 1
                    action = oracle.embed_action(node.action)
                    tokens = [*tokens, Token(action, first), Token(latent, first + 1)]
                    answer = child_of(oracle, answer, node.action, latent)
                histories.append(tokens)
                expected.append(answer.logits)
        answers = fresh_answers(oracle, histories)
    assert {len(tokens) for tokens in histories} == {1, 3, 5, 7, 9, 11, 13}
    for answer, logits in zip(answers, expected, strict=True):
        for name, of in logits.items():
            torch.testing.assert_close(answer[name], of, **EXACT)


@pytest.mark.parametrize('family', ['lunarlander', 'cartpole', 'lunarlander_continuous', 'atari'])
def test_a_forest_of_shifted_windows_equals_token_by_token(family: str) -> None:
    """Roots and paths below them, before and after their windows overflow."""
    policy, roots = single(family, 5, simulations=2)
    oracle = Oracle(world_model_of(policy), 'shift')
    forest, expected = Forest(oracle), dict[Place, Any]()
    with precision(torch.float64), torch.no_grad():
        for root in roots:
            top = forest.root(root.observations, root.actions)
            expected[top] = root_of(oracle, root.observations, root.actions)
            places = {0: top}
            for node in root.nodes:
                latent, parent = torch.from_numpy(node.latent), places[node.parent]
                places[node.number] = place = forest.child(parent, node.action, latent)
                expected[place] = child_of(oracle, expected[parent], node.action, latent)
        answers = forest.answers()
    assert len(expected) == len(answers) == 5 * 3, 'roots share their beginning'
    for place, answer in expected.items():
        for name, of in answer.logits.items():
            torch.testing.assert_close(answers[place][name], of, **EXACT)
