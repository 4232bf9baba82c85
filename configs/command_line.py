"""The command line that the configs of this folder share."""

from __future__ import annotations

import argparse
from collections.abc import Iterable


def parse_arguments(
    description: str, default_env: str, known_envs: Iterable[str], *, budget: bool = False
) -> argparse.Namespace:
    """Read --env, --seed, --smoke, --model-path, and --no-kv, which is there as `kv`: True unless given.

    budget: whether the config takes --budget, a ratio.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        '--env', default=default_env, choices=sorted(known_envs), metavar='ENV',
        help=f'the environment (default: {default_env})',
    )  # fmt: skip
    parser.add_argument('--seed', type=int, default=0, help='the seed (default: 0)')
    parser.add_argument(
        '--smoke', action='store_true',
        help='a size that goes once through collection, training and evaluation on a CPU within minutes',
    )  # fmt: skip
    parser.add_argument(
        '--no-kv', dest='kv', action='store_false', help="the host's own cache: the run to compare with"
    )
    parser.add_argument('--model-path', metavar='FILE', help='a checkpoint (.pth.tar) to begin with')
    if budget:
        parser.add_argument(
            '--budget', type=float, metavar='RATIO', help='layer budgets: the part of all tokens that is kept'
        )
    return parser.parse_args()


def require_known(env_id: str, known_envs: Iterable[str]) -> None:
    """Raise ValueError unless `env_id` is one of `known_envs`."""
    known = sorted(known_envs)
    if env_id not in known:
        raise ValueError(f'env_id: expected one of {", ".join(known)}; found {env_id!r}')
