"""Weights & Biases beside TensorBoard: a short CartPole training whose charts go to both.

    WANDB_MODE=offline python examples/weights_and_biases.py

Leave WANDB_MODE out where you have an account. Leave LightZero's `policy.use_wandb` False: it begins a run of
its own, without TensorBoard's charts.
"""

from __future__ import annotations

import wandb

from lzero_kv.configs.cartpole_unizero_kv_config import make_config


def main(env_steps: int = 40) -> None:
    """Train, with every chart of the TensorBoard log in the run, too."""
    from lzero.entry import train_unizero

    main_config, create_config = make_config('CartPole-v0', seed=0, smoke=True)
    # before the training opens its log
    with wandb.init(project='lzero_kv', config=dict(main_config), sync_tensorboard=True):
        train_unizero([main_config, create_config], seed=0, max_env_step=env_steps)


if __name__ == '__main__':
    main()
