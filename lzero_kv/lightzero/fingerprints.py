"""Fingerprints of the host's functions that the adapter replaces, calls or imitates, as they were tested."""

from __future__ import annotations

import hashlib
import inspect
from importlib import import_module

from lzero_kv.lightzero.host import MAIN, RELEASE

_MODULES = {
    'model': 'model.unizero_model:UniZeroModel',
    'world_model': 'model.unizero_world_models.world_model:WorldModel',
    'transformer': 'model.unizero_world_models.transformer:Transformer',
    'block': 'model.unizero_world_models.transformer:Block',
    'attention': 'model.unizero_world_models.transformer:SelfAttention',
    'head': 'model.unizero_world_models.slicer:Head',
    'search': 'mcts.tree_search.mcts_ctree:UniZeroMCTSCtree',
    'sampled_search': 'mcts.tree_search.mcts_ctree_sampled:SampledUniZeroMCTSCtree',
    'transform': 'policy.scaling_transform:InverseScalarTransform',
    'policy': 'policy.unizero:UniZeroPolicy',
    'sampled_policy': 'policy.sampled_unizero:SampledUniZeroPolicy',
    'buffer': 'mcts.buffer.game_buffer_unizero:UniZeroGameBuffer',
    'sampled_buffer': 'mcts.buffer.game_buffer_sampled_unizero:SampledUniZeroGameBuffer',
    'collector': 'worker.muzero_collector:MuZeroCollector',
    'segment_collector': 'worker.muzero_segment_collector:MuZeroSegmentCollector',
    'evaluator': 'worker.muzero_evaluator:MuZeroEvaluator',
}

TESTED = {
    RELEASE: {
        'model.initial_inference': '91807922',
        'model.recurrent_inference': '0735303d',
        'world_model.__init__': '59ab59de',
        'world_model._initialize_cache_structures': 'de5b8777',
        'world_model.forward': 'd2b7def8',
        'world_model._add_position_embeddings': '85817ac9',
        'world_model.forward_initial_inference': '4d678a03',
        'world_model.wm_forward_for_initial_infererence': '471dab48',
        'world_model.forward_recurrent_inference': '376d885a',
        'world_model.clear_caches': '24db9f7c',
        'transformer.forward': 'a6a14902',
        'block.__init__': '8b97f74b',
        'block.forward': '4c894c70',
        'attention.forward': 'c6912f7c',
        'head.forward': '4abc8038',
        'search.__init__': '1563fc4b',
        'search.search': '90e0702f',
        'sampled_search.__init__': '1563fc4b',
        'sampled_search.search': '9c8c2a1a',
        'transform.__call__': '166ca007',
        'policy._init_collect': '4912f6b8',
        'policy._init_eval': '2ba3aaa7',
        'policy._forward_collect': '94591d72',
        'policy._forward_eval': 'cff1ae9e',
        'policy._reset_collect': '0e90c6a5',
        'policy._reset_eval': '5f1c3fc1',
        'sampled_policy._forward_collect': 'be03029b',
        'sampled_policy._forward_eval': '696ec672',
        'buffer._compute_target_policy_reanalyzed': '45b366b8',
        'sampled_buffer._compute_target_policy_reanalyzed': 'dca7966f',
        'collector.collect': '3a02a2a4',
        'segment_collector.collect': '5a1b2294',
        'evaluator.eval': 'ade7bf24',
    },
    MAIN: {
        'model.initial_inference': '2f637c72',
        'model.recurrent_inference': '0735303d',
        'world_model.__init__': '1f9082b5',
        'world_model._initialize_cache_structures': 'b0bc8cca',
        'world_model.forward': 'adae2d8f',
        'world_model._add_position_embeddings': 'aaac3e22',
        'world_model.forward_initial_inference': '78a27ad1',
        'world_model.wm_forward_for_initial_infererence': '35688161',
        'world_model.forward_recurrent_inference': 'e61a1d22',
        'world_model.clear_caches': '64847d8c',
        'transformer.forward': '6a525c70',
        'block.__init__': '62063cab',
        'block.forward': '9227264e',
        'attention.forward': '67c1674c',
        'head.forward': '4abc8038',
        'search.__init__': 'd080544f',
        'search.search': 'b6c35937',
        'sampled_search.__init__': 'd080544f',
        'sampled_search.search': '5ceea5c0',
        'transform.__call__': '48a78fe6',
        'policy._init_collect': '708802e6',
        'policy._init_eval': 'fcb39158',
        'policy._forward_collect': '4b636e56',
        'policy._forward_eval': '609848cd',
        'policy._reset_collect': '16494aeb',
        'policy._reset_eval': 'b37fcd3c',
        'sampled_policy._forward_collect': '185ca470',
        'sampled_policy._forward_eval': 'b80eab4a',
        'buffer._compute_target_policy_reanalyzed': '18f14ac8',
        'sampled_buffer._compute_target_policy_reanalyzed': '0ab0f981',
        'collector.collect': 'e77dbebc',
        'segment_collector.collect': '39608572',
        'evaluator.eval': '109f2e2b',
    },
}
"""By profile: first digits of the SHA-256 of each function's source."""


def changed(profile: str) -> list[str]:
    """Names of the functions whose source is not the one that was tested with ``profile``."""
    return [_name(place) for place, digits in TESTED[profile].items() if fingerprint(place) != digits]


def fingerprint(place: str) -> str:
    """Digits of one function's source now, without trailing blanks; empty where it is gone."""
    owner, _, name = place.partition('.')
    module, _, kind = _MODULES[owner].partition(':')
    try:
        function = getattr(getattr(import_module(f'lzero.{module}'), kind), name)
        source = inspect.getsource(function)
    except (ImportError, AttributeError, OSError):
        return ''
    lines = '\n'.join(line.rstrip() for line in source.splitlines())
    return hashlib.sha256(lines.encode()).hexdigest()[:8]


def _name(place: str) -> str:
    owner, _, name = place.partition('.')
    return f'{_MODULES[owner].partition(":")[2]}.{name}'
