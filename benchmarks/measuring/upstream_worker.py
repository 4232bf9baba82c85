"""Plays LightZero's development branch for ``upstream.py``: python upstream_worker.py FILE_DESCRIPTOR.

The branch differs from the release in more than its cache. So that caches are compared, its model gets the
release's heads and normalisation, and the release's weights under the branch's names.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path[1:1] = [str(Path(__file__).resolve().parents[2])]
sys.path[0] = str(Path(__file__).resolve().parents[1])

import lzero
import torch
from torch import nn

RENAMED = (('.mlp.', '.feed_forward.'), ('.linear.0.', '.linear.'))
"""Parts of the names of weights: the release's, the branch's."""

SIMNORM = {f'final_norm_option_in_{where}': 'SimNorm' for where in ('encoder', 'head', 'obs_head')}
"""Options that give the branch the release's normalisation."""

PLUGIN = dict(window='rebuild', backend='eager')
"""Options of ``kv_cache`` of the contestant that plays the branch with the plugin."""


def make_as_released() -> None:
    """Give the branch's model the release's heads; its own are wider, with two norms more."""
    from lzero.model.unizero_world_models.slicer import Head
    from lzero.model.unizero_world_models.world_model import WorldModel

    def create_head(self: Any, block_mask: torch.Tensor, output_dim: int, norm_layer: Any = None) -> Head:
        width = self.config.embed_dim
        layers = [nn.Linear(width, width), nn.GELU(approximate='tanh'), nn.Linear(width, output_dim)]
        layers += [norm_layer] if norm_layer else []
        return Head(self.config.max_blocks + 1, block_mask, nn.Sequential(*layers))

    WorldModel._create_head = WorldModel._create_head_for_latent = create_head


def load_released(policy: Any, file: str) -> None:
    """Give the policy the release's weights; RuntimeError when a name has no counterpart."""
    from testing.models import collect_model, load_weights

    def renamed(name: str) -> str:
        for before, after in RENAMED:
            name = name.replace(before, after)
        return name

    own = collect_model(policy).state_dict()
    given = {
        renamed(name): tensor
        for name, tensor in torch.load(file, map_location='cpu', weights_only=True).items()
    }
    # The branch has a second name for its heads and computes its rotations; no search decodes anything.
    given |= {name: given[name.replace('head_dict.', '')] for name in own if 'head_dict.' in name}
    left = ('decoder_network', 'freqs_cis')
    given = {name: tensor for name, tensor in given.items() if not any(part in name for part in left)}
    given |= {name: tensor for name, tensor in own.items() if any(part in name for part in left)}
    if set(own) != set(given):
        raise RuntimeError(f'expected the same weights; only one has {sorted(set(own) ^ set(given))[:20]}')
    load_weights(policy, given)


def answer_unvisited(search: Any) -> None:
    """The branch asks a search for the latent state after the chosen action, to decode texts. Actions come
    from a script here, and the search may not have tried them: they get None, which nobody reads.
    """
    found = search.search

    def searched(*args: Any) -> dict[int, Any]:
        return {row: defaultdict(lambda: None, latents) for row, latents in found(*args).items()}

    search.search = searched


def player(name: str, cache: str, family: Any, weights: str, folder: str, device: str) -> Any:
    """The contestant of this process; ``cache`` is the branch's own with its flag 'off' or 'on', or the
    plugin's, 'kv'."""
    if not Path(lzero.__file__).is_relative_to(folder):
        raise RuntimeError(f'expected lzero of {folder}, got {lzero.__file__}')

    from measuring.contestants import Contestant, quiet
    from measuring.players import Player
    from testing.episodes import Episodes
    from testing.models import make_policy, options_of_device

    make_as_released()
    options = options_of_device(device)
    options['world_model'] |= SIMNORM
    if cache != 'kv':
        options['world_model'] |= dict(use_new_cache_manager=cache == 'on')
    with quiet():
        policy = make_policy(family, kv=cache == 'kv', kv_cache=PLUGIN, **options)
        load_released(policy, weights)
        if cache != 'kv':  # the plugin's search answers for each action
            answer_unvisited(policy._mcts_collect)
        episodes = Episodes(policy, range(family.collectors), record=False, timesteps=family.timesteps)
    return Player(Contestant(name, policy, episodes), family.simulations)


def main() -> None:
    """Build what the first message names, then answer calls until the pipe closes."""
    pipe = Connection(int(sys.argv[1]))
    playing = player(*pipe.recv())
    pipe.send('ready')
    while True:
        try:
            call, args = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(playing, call)(*args))


if __name__ == '__main__':
    main()
