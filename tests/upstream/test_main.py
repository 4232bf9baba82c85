"""The adapter on LightZero's git main: main's own manager, its options, and what is refused."""

from __future__ import annotations

import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

import lzero
import numpy as np
import pytest
import torch

import lzero_kv
from lzero_kv.cli.doctor import PLUGIN, Check, Mark, call_checks, host_check
from lzero_kv.cli.training_call import ConfigError, training_call
from lzero_kv.lightzero.host import MAIN, check_supported
from lzero_kv.lightzero.settings import POLICIES, check_policy
from testing.episodes import Episodes, Root
from testing.families import FAMILIES, policy_config
from testing.judging import judge_nodes, judge_reanalysis, judge_roots
from testing.models import (
    buildable_memory_model,
    buildable_vector_model,
    collect_model,
    copy_weights,
    make_policy,
    savable_sampled_policy,
    world_model_of,
)
from testing.reanalysis import reanalyze

SMALL: dict[str, Any] = dict(collector_env_num=3, evaluator_env_num=2, num_simulations=7)
READY = [{0, 1, 2}, {0, 2}, {0, 1, 2}, {1}, {0, 1, 2}, {1, 2}, {0, 1, 2}, {0, 1, 2}]
"""All, and parts of them; windows of four steps are full at the end."""


def mains_own(family: str, **world_model: Any) -> Any:
    """A policy of main without the plugin; a search also answers for actions that it did not try."""
    lzero_kv.uninstall()
    policy = make_policy(family, kv=False, world_model=world_model, **SMALL)
    policy._mcts_collect.search = answering(policy._mcts_collect.search)
    return policy


def played(policy: Any, **options: Any) -> list[Root]:
    lengths = {1: [3], 2: [4, 2]}
    return Episodes(policy, range(3), lengths=lengths, **options).run(READY)


def test_this_is_the_main_that_was_tested() -> None:
    assert check_supported() == MAIN
    assert host_check() == Check(Mark.OK, 'host', f'LightZero {MAIN} (as tested)')


@pytest.mark.parametrize('family', ['atari', 'stack4'])
def test_searches_are_those_of_mains_own_manager_with_exact_windows(family: str) -> None:
    own = mains_own(family, use_new_cache_manager=True, rebuild_kv_window_from_tokens=True)
    assert type(world_model_of(own).kv_cache_manager).__module__.startswith('lzero.')
    expected = played(own, record=False)
    ours = make_policy(family, kv=True, **SMALL)
    copy_weights(own, ours)
    found = played(ours, record=False)
    assert len(found) == sum(map(len, READY))
    assert judge_roots(ours, found, 'rebuild').wrong == 0
    # main loses the root of an observation that a batch of another size encodes to other digits
    right = [not judge_roots(own, [root], 'rebuild').wrong for root in expected]
    assert sum(right) >= len(right) - 2
    for root, other, comparable in zip(found, expected, right, strict=True):
        if comparable:
            assert root.visits == other.visits
            assert root.searched_value == pytest.approx(other.searched_value, abs=1e-3)


def test_without_the_flag_main_is_as_it_was_to_the_last_bit() -> None:
    own = mains_own('atari')
    expected = played(own, record=False)
    make_policy('atari', kv=True, **SMALL)  # installed, and the searches are replaced
    off = make_policy('atari', kv=False, **SMALL)
    off._mcts_collect.search = answering(off._mcts_collect.search)
    for root, other in zip(played(off, record=False), expected, strict=True):
        assert (root.visits, root.searched_value) == (other.visits, other.searched_value)
        assert np.array_equal(root.policy, other.policy)


def answering(search: Any) -> Any:
    def searched(*args: Any, **kwargs: Any) -> dict[int, Any]:
        return {row: defaultdict(lambda: None, latents) for row, latents in search(*args, **kwargs).items()}

    return searched


def test_last_observations_keep_what_is_behind_the_point() -> None:
    policy = make_policy('tiny', kv=True, **SMALL)
    for mode in ('collect', 'eval'):
        Episodes(policy, range(2), mode=mode, record=False).run(4)
        last = getattr(policy, f'last_batch_obs_{mode}')
        assert last.dtype == torch.float32 and len(last) == {'collect': 3, 'eval': 2}[mode]
        assert (last[:2] != last[:2].round()).all()
    pools = world_model_of(policy).kv_cache_manager.init_pools
    hits = [pool.stats.hits for pool in pools]
    assert hits == [3, 3, 0, 3, 3], 'each of three continued steps found its root'


@pytest.mark.parametrize('method', ['hard', 'soft_tanh', 'normalize_max', 'normalize_mean', 'adaptive'])
def test_policy_logits_are_controlled(method: str) -> None:
    limits = dict(policy_logits_clip_min=-0.3, policy_logits_clip_max=0.3)
    options = dict(use_policy_logits_clip=True, policy_logits_clip_method=method, **limits)
    policy = make_policy('tiny', kv=True, world_model=options, **SMALL)
    roots = Episodes(policy, range(3)).run(2)
    assert judge_roots(policy, roots, 'rebuild').wrong == judge_nodes(policy, roots, 'rebuild').wrong == 0
    logits = np.stack([node.policy for root in roots for node in root.nodes])
    assert np.abs(logits).max() <= 0.3 + 1e-6
    assert np.abs(logits).max() > 0.2


def test_simulations_of_both_phases_and_the_first_latent_states() -> None:
    numbers = dict(collect_num_simulations=3, eval_num_simulations=9)
    policy = make_policy('tiny', kv=True, policy=numbers, **SMALL)
    returned = []
    search = policy._mcts_collect.search
    policy._mcts_collect.search = lambda *args: returned.append(search(*args)) or returned[-1]
    (root,) = Episodes(policy, range(1)).run(1)
    assert sum(root.visits) == 3
    assert sum(Episodes(policy, range(1), mode='eval').run(1)[0].visits) == 9
    first = {int(node.action): node.latent for node in reversed(root.nodes) if node.parent == 0}
    for action in range(5):
        latent = returned[0][0][action]
        assert (latent is None) is (action not in first)
        if latent is not None:
            np.testing.assert_array_equal(np.ravel(latent), first[action])


def test_evaluation_breaks_ties_the_same_way_each_time() -> None:
    policy = make_policy('tiny', kv=True, **SMALL)
    model = world_model_of(policy)
    for head in (model.head_policy, model.head_value, model.head_rewards):
        torch.nn.init.zeros_(head.head_module[-1].weight)
        torch.nn.init.zeros_(head.head_module[-1].bias)
    model.clear_caches()

    def trees(mode: str) -> set[tuple[int, ...]]:
        plays = [Episodes(policy, range(2), mode=mode, tie_rule=False).run(1) for _ in range(6)]
        return {tuple(int(node.action) for root in play for node in root.nodes) for play in plays}

    assert len(trees('eval')) == 1


def test_reanalysis_is_right() -> None:
    policy = make_policy('atari', kv=True, **SMALL | dict(collector_env_num=4))
    verdict = judge_reanalysis(policy, reanalyze(policy, segments=1), 'rebuild')  # four roots, one chunk
    assert verdict.total == 4 * 7 and verdict.wrong == 0, str(verdict)


def test_checkpoints_go_both_ways() -> None:
    own, ours = mains_own('atari'), make_policy('atari', kv=True, **SMALL)
    names = [list(collect_model(policy).state_dict()) for policy in (own, ours)]
    assert names[0] == names[1]
    copy_weights(own, ours)
    copy_weights(ours, own)


def test_a_single_environment_that_ends_is_forgotten() -> None:
    policy = make_policy('tiny', kv=True, **SMALL)
    episodes = Episodes(policy, range(2), record=False)
    episodes.run(2)
    episodes.reset(0, current_steps=None, task_id=None)
    steps = policy._last_steps['collect']._steps
    assert sorted(steps) == [1]


UNSERVED = {
    'task_embed_option': 'register_task_embed',
    'moe_in_transformer': True,
    'exact_kv_window_reset': True,
}


@pytest.mark.parametrize('option', UNSERVED)
def test_options_that_would_be_ignored_are_refused(option: str) -> None:
    with pytest.raises(ValueError, match=rf'does not fit use_new_cache_manager=True(.|\n)*{option}='):
        make_policy('tiny', kv=True, world_model={option: UNSERVED[option]}, **SMALL)


def test_contextual_reanalysis_is_refused_before_a_model_is_built(caplog: pytest.LogCaptureFixture) -> None:
    with (
        caplog.at_level(logging.INFO),
        pytest.raises(ValueError, match='contextual_reanalysis=True: contexts'),
    ):
        make_policy('tiny', kv=True, policy=dict(contextual_reanalysis=True), **SMALL)
    assert 'self.device' not in caplog.text


LORA = dict(
    lora_r=3,
    lora_alpha=2,
    lora_scale_init=1.5,
    lora_target_modules=['attn', 'feed_forward'],
    curriculum_stage_num=3,
)


def test_adapters_of_a_curriculum_are_part_of_the_weights() -> None:
    from lzero.model.unizero_world_models.transformer import set_curriculum_stage

    policy = make_policy('atari', kv=True, world_model=LORA, **SMALL)
    first = Episodes(policy, range(3), record=False).run(1)
    set_curriculum_stage(world_model_of(policy), 2)
    world_model_of(policy).clear_caches()
    roots = Episodes(policy, range(3)).run(READY)
    assert judge_roots(policy, roots, 'rebuild').wrong == judge_nodes(policy, roots, 'rebuild').wrong == 0
    assert abs(roots[0].predicted_value - first[0].predicted_value) > 0.01


UNTRAINABLE = {
    'tiny': "obs_type='vector': this LightZero cannot build the model; .* num_layers=2",
    'memory': "obs_type='image_memory': this LightZero cannot build the model; .*lpips",
    'lunarlander_continuous': 'this LightZero stops at its first checkpoint; .*adaptive_entropy_weight',
}


@pytest.mark.parametrize('family', UNTRAINABLE)
def test_what_main_itself_cannot_train_is_refused_until_it_is_mended(family: str) -> None:
    config = policy_config(FAMILIES[family], True, None, {}, {})
    with pytest.raises(ValueError, match=UNTRAINABLE[family]):
        check_policy(POLICIES[config.type], config)
    with buildable_vector_model(), savable_sampled_policy(), buildable_memory_model():
        check_policy(POLICIES[config.type], config)


def test_texts_are_refused() -> None:
    config = policy_config(FAMILIES['atari'], True, None, {}, {})
    check_policy('UniZeroModel', config)
    config.model.world_model_cfg.obs_type = 'text'
    with pytest.raises(ValueError, match=r"obs_type='text': this LightZero cannot build .* Tokenizer"):
        check_policy('UniZeroModel', config)


ZOO = {
    'atari/config/atari_unizero_config': [],
    'atari/config/atari_unizero_segment_config': [],
    'atari/config/atari_unizero_ddp_config': [(Mark.WARN, 'multi_gpu', 'stops at its second update')],
    'atari/config/atari_unizero_ppo_config': [(Mark.FAIL, 'policy', 'must be one of unizero')],
    'atari/config/atari_unizero_multitask_segment_ddp_config': [
        (Mark.FAIL, 'config', 'train_unizero_multitask_segment_ddp takes no pair of configs')
    ],
    'memory/config/memory_unizero_config': [(Mark.FAIL, 'world model', "'image_memory'")],
    'classic_control/cartpole/config/cartpole_unizero_config': [(Mark.FAIL, 'world model', "'vector'")],
    'classic_control/pendulum/config/pendulum_cont_sampled_unizero_config': [
        (Mark.FAIL, 'world model', 'stops at its first checkpoint')
    ],
}
"""What doctor finds in main's own configs with the two lines added, beside what is in order."""


@pytest.mark.parametrize('name', ZOO)
def test_doctors_verdicts_of_the_zoo(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a config may write
    path = Path(lzero.__file__).parents[1] / 'zoo' / f'{name}.py'
    try:
        call = training_call(path)
        call.config.policy.model.world_model_cfg.use_new_cache_manager = True
        call.create_config.policy.import_names = [*call.create_config.policy.import_names, PLUGIN]
        checks = call_checks(call)
    except ConfigError as error:
        checks = [Check(Mark.FAIL, 'config', str(path), str(error))]
    found = [check for check in checks if check.mark is not Mark.OK]
    assert [(check.mark, check.subject) for check in found] == [entry[:2] for entry in ZOO[name]]
    for check, (*_, words) in zip(found, ZOO[name], strict=True):
        assert words in check.remedy


def test_policies_with_world_models_of_their_own_are_refused() -> None:
    from lzero.policy.unizero_ppo import UniZeroPPOPolicy

    for model in (UniZeroPPOPolicy.default_model(UniZeroPPOPolicy)[0], 'UniZeroMTModel'):
        with pytest.raises(ValueError, match=rf'builds a {model}: expected one of UniZeroModel'):
            check_policy(model, {})


def test_the_log_says_whose_manager_the_flag_means(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        make_policy('tiny', kv=True, **SMALL)
    begin = f'lzero_kv {lzero_kv.__version__} with LightZero main 2026-08: on: caches of lzero_kv'
    assert begin in caplog.text
