"""Trainings of two processes, as torchrun starts them, on a machine without GPUs."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import runpy
import subprocess
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WORLD = 2
ROOT = Path(__file__).parents[2]


def train_together(folder: Path, kv: bool, python: str) -> list[dict[str, Any]]:
    """Train CartPole with two processes of ``python`` in ``folder``; what each one reports, by rank.

    A fork of the process of the tests would not do: once it has run autograd, its forks cannot.

    Raises:
        RuntimeError: one failed; its output is in the message.
    """
    folder.mkdir()
    paths = os.pathsep.join([str(ROOT), str(ROOT / 'configs')])
    environment = os.environ | dict(PYTHONPATH=paths, OMP_NUM_THREADS='1', WORLD_SIZE=str(WORLD))
    processes = [
        subprocess.Popen(
            [python, '-m', 'tests.host.processes', str(folder), str(int(kv))],
            cwd=ROOT,
            env=environment | dict(RANK=str(rank)),
        )
        for rank in range(WORLD)
    ]
    hanging = 0
    for process in processes:
        try:
            process.wait(timeout=300)
        except subprocess.TimeoutExpired:
            hanging += 1
            process.kill()
    if hanging or any(process.returncode for process in processes):
        raise RuntimeError(f'a process failed; {hanging} hang\n' + _outputs(folder))
    return _reports(folder)


def start(config: Path, folder: Path) -> list[dict[str, Any]]:
    """Let torchrun start a config with two processes in ``folder``; what each one reports, by rank.

    Raises:
        RuntimeError: it failed; the output of each process is in the message.
    """
    folder.mkdir()
    torchrun = [sys.executable, '-m', 'torch.distributed.run', f'--nproc_per_node={WORLD}', '-m']
    done = subprocess.run([*torchrun, 'tests.host.processes', str(folder), str(config)], cwd=ROOT)
    if done.returncode:
        raise RuntimeError('torchrun failed\n' + _outputs(folder))
    return _reports(folder)


def _outputs(folder: Path) -> str:
    return '\n'.join(file.read_text()[-3000:] for file in sorted(folder.glob('[0-9].txt')))


def _reports(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f'{rank}.json').read_text()) for rank in range(WORLD)]


def _run(folder: Path, rank: int, what: str) -> None:
    """One process: a config that torchrun starts, else CartPole with the cache ('1') or without ('0')."""
    os.chdir(folder)
    logging.getLogger().handlers.clear()
    with Path(f'{rank}.txt').open('w') as output, redirect_stdout(output), redirect_stderr(output):
        try:
            if what.isdigit():
                _train_without_gpus(f'file://{folder}/store')
                report = _train(rank, bool(int(what)))
            else:
                _train_without_gpus('env://')
                report = _train_config(what)
            Path(f'{rank}.json').write_text(json.dumps(report))
        except Exception:
            traceback.print_exc()
            raise


def _train_without_gpus(store: str) -> None:
    """Four places where LightZero and DI-engine take GPUs for granted, and what stands there on a CPU; and a
    fault of git main, which stops at its second update.
    """
    from ding.policy import Policy
    from ding.utils import pytorch_ddp_dist_helper as helper
    from ding.worker.learner import learner_hook
    from lzero.policy.unizero import UniZeroPolicy
    from lzero.worker import muzero_collector

    from lzero_kv.lightzero.host import is_release

    def begin() -> None:  # the original begins NCCL and chooses a CUDA device
        rank, world = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
        dist.init_process_group('gloo', init_method=store, rank=rank, world_size=world)

    def add_up(number: float, op: str) -> float:  # the original puts the number on a CUDA device
        tensor = torch.tensor([number])
        dist.all_reduce(tensor)
        return tensor.item()

    def sync_gradients(self: Any, model: torch.nn.Module) -> None:
        # the original reads the gradients of all parameters, and those of the decoder of vector observations
        # have no loss
        for parameter in model.parameters():
            if parameter.grad is not None:
                helper.allreduce(parameter.grad)

    if not is_release():
        forward_learn = UniZeroPolicy._forward_learn
        UniZeroPolicy._forward_learn = lambda *args: _numbers(forward_learn(*args))
    helper.dist_init = begin
    muzero_collector.allreduce_data = add_up
    Policy.sync_gradients = sync_gradients
    learner_hook.get_rank = lambda: 'cpu'  # the original moves what is logged to CUDA device number <rank>


def _numbers(logged: dict[str, Any]) -> dict[str, Any]:
    """What an update logs, its tensors of one element as numbers."""
    one = {
        name: value.item() for name, value in logged.items() if torch.is_tensor(value) and value.numel() == 1
    }
    return logged | one


def _train(rank: int, kv: bool) -> dict[str, Any]:
    from ding.utils import DDPContext
    from lzero.config.utils import lz_to_ddp_config
    from lzero.entry import train_unizero

    calls = _counted_calls()
    sys.modules.pop('lzero_kv.plugin', None)  # another test may have imported and uninstalled it
    with DDPContext():
        main, create = _configs(kv)
        policy = train_unizero([lz_to_ddp_config(main), create], seed=rank, max_env_step=60)
    return _report(policy, kv) | calls


def _train_config(path: str) -> dict[str, Any]:
    """What the config's own command line trains with ``--smoke``."""
    import lzero.entry

    calls, train, policies = _counted_calls(), lzero.entry.train_unizero, list[Any]()
    lzero.entry.train_unizero = lambda *args, **options: policies.append(train(*args, **options))
    sys.argv = [path, '--smoke']
    runpy.run_path(path, run_name='__main__')
    return _report(policies[0], kv=True) | calls


def _counted_calls() -> dict[str, int]:
    """How often the processes did what all of them have to do equally often, from now on."""
    from ding.config import config
    from ding.policy import Policy
    from lzero.worker import MuZeroCollector

    config.save_config = lambda *args, **kwargs: None  # to format the file takes longer than to train
    calls = {'collections': 0, 'gathers': 0, 'updates': 0}
    _counted(Policy, 'sync_gradients', calls, 'updates')
    _counted(MuZeroCollector, 'collect', calls, 'collections')
    _counted(dist, 'all_gather_object', calls, 'gathers')
    return calls


def _report(policy: Any, kv: bool) -> dict[str, Any]:
    return {'weights': _digest(policy._learn_model), 'statistics': _statistics(policy) if kv else {}}


def _digest(model: torch.nn.Module) -> str:
    """Of the parameters: statistics of batch norm are each process's own, in LightZero too."""
    parameters = [tensor.detach().numpy().tobytes() for tensor in model.parameters()]
    return hashlib.sha256(b''.join(parameters)).hexdigest()


def _statistics(policy: Any) -> dict[str, Any]:
    manager = policy.kv_world_models['acting'].kv_cache_manager
    summary = manager.get_stats_summary()
    return {pool: summary[pool] for pool in ('roots', 'nodes')}


def _counted(owner: Any, name: str, calls: dict[str, int], counter: str) -> None:
    original = getattr(owner, name)

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls[counter] += 1
        return original(*args, **kwargs)

    counting.__wrapped__ = original  # type: ignore[attr-defined]
    setattr(owner, name, counting)


def _configs(kv: bool) -> tuple[Any, Any]:
    from cartpole_unizero_kv_config import SMOKE, make_config
    from easydict import EasyDict

    size = EasyDict(SMOKE, num_simulations=5, embed_dim=16, reanalyze_ratio=0.0, batch_size=8, eval_freq=1000)
    main, create = make_config('CartPole-v0', 0, kv=kv, size=size)
    main.exp_name = 'cartpole'
    main.policy.multi_gpu, main.policy.update_per_collect, main.policy.n_episode = True, 2, 4
    return main, create


if __name__ == '__main__':
    _run(Path(sys.argv[1]), int(os.environ['RANK']), sys.argv[2])
