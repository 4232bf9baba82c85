"""Findings: rows that must not be, saved in files and recomputed from them.

A file holds tensors, numbers and strings only, so that reading one from a stranger runs no code.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Mapping
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from lzero_kv.config import KVCacheConfig
from lzero_kv.telemetry.counters import Cause, Fault
from lzero_kv.validation.histories import Course
from lzero_kv.validation.oracle import Token, TokenWindow, oracle_of
from lzero_kv.validation.tolerance import Deviation

FORMAT = 'lzero_kv validation finding'
VERSION = 2
SAVED = 3
"""Findings that a world model writes to files at most: each holds the weights of the model."""
DEVIATIONS = ('cache', 'stock', 'between')


@dataclass(frozen=True)
class Finding:
    """One row of one inference where the cache is wrong, or where a difference has no proven cause.

    Attributes:
        kind: ``'roots'``, ``'nodes'`` or ``'reanalysis'``.
        env_id: number of the environment in the pools; in reanalysis, the row of the batch.
        row: row of the batch.
        node: the parent of the recurrent inference, by simulation (0: the root); None at root inference.
        part: what differs most: ``'keys and values'``, ``'policy'``, ``'value'``, ``'reward'``,
            ``'latent'``.
        cache: the cache's distance from the recomputation.
        stock: the stock cache's distance from the recomputation; None where it gave no answer.
        between: distance between the two.
        cache_key: the cache's name of the history.
        stock_key: key that the stock cache looked for, or says why there is none.
        fault: what the cache served instead; None for an unexplained difference.
        causes: what is proven about the stock cache, which does not account for the difference.
        tensors: ``cache``, ``stock`` and ``truth``: keys and values ``[2 * layers, T, embed]`` as
            served (``kv``), and the answers by name.
        replay: weights, configuration and tokens, from which :func:`recomputed` gives the truth.
        file: where it was saved.
    """

    kind: str
    env_id: int
    row: int
    node: int | None
    part: str
    cache: Deviation
    stock: Deviation | None
    between: Deviation
    cache_key: str
    stock_key: str
    fault: Fault | None
    causes: tuple[Cause, ...] = ()
    tensors: dict[str, Any] = field(default_factory=dict, repr=False)
    replay: dict[str, Any] = field(default_factory=dict, repr=False)
    file: Path | None = None

    @property
    def where(self) -> str:
        """The place, for people."""
        node = '' if self.node is None else f', node {self.node}'
        return f'pool {self.kind}, environment {self.env_id}, row {self.row}{node}'

    def __str__(self) -> str:
        if self.fault is not None:
            head = f'the cache is wrong ({self.fault.value}): {self.fault.sentence}'
            worst = self.cache
        else:
            head = 'the two caches differ and no cause is proven'
            worst = self.between
        layer = '' if worst.layer is None else f' in layer {worst.layer}'
        stock = 'no answer' if self.stock is None else f'{self.stock.largest:.3g}'
        lines = [
            f'{head}; {self.where}',
            f'  {self.part}: largest difference {worst.largest:.3g}, mean {worst.mean:.3g}{layer}',
            f'  distance from the recomputation: cache {self.cache.largest:.3g}, stock cache {stock}',
            f'  key of the cache: {self.cache_key}; key of the stock cache: {self.stock_key}',
        ]
        if self.file is not None:
            lines.append(f'  saved; look at it with: lzero-kv explain {self.file}')
        return '\n'.join(lines)


class ValidationError(RuntimeError):
    """A wrong cache, or a difference without a proven cause; ``finding`` holds the tensors."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(str(finding))
        self.finding = finding


class FindingLog:
    """Findings of one world model: saved, and raised or logged.

    Args:
        world_model: the caching world model, whose weights go into the files.
        mode: of validation.
        config: where to save, and whether to raise.
        rule: of the windows, see :class:`Oracle`.
    """

    def __init__(self, world_model: Any, mode: str, config: KVCacheConfig, rule: str) -> None:
        self.world_model = world_model
        self._mode = mode
        self._config = config
        self._rule = rule
        self._saved = 0

    def report(self, finding: Finding, course: Course) -> None:
        """Save one of the first findings; then raise it or log it.

        Raises:
            ValidationError: with ``validation_on_failure='raise'``.
        """
        if self._saved < SAVED:
            self._saved += 1
            finding = dataclasses.replace(finding, replay=replay_data(self.world_model, self._rule, course))
            stem = f'finding_{self._mode}_{finding.kind}_{finding.env_id}_{finding.row}_{finding.node or 0}'
            finding = save_finding(finding, new_file(Path(self._config.validation_folder), stem))
        if self._config.validation_on_failure == 'raise':
            raise ValidationError(finding)
        logging.getLogger(__name__).warning('%s', finding)


def new_file(folder: Path, stem: str) -> Path:
    """An empty file of that name, made here: findings of earlier runs, of the same node, and of other
    processes stay."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        path = folder / (f'{stem}_{number}.pt' if number > 1 else f'{stem}.pt')
        with suppress(FileExistsError):
            path.touch(exist_ok=False)
            break
    return path


def save_finding(finding: Finding, path: Path) -> Finding:
    """Write ``finding`` to ``path`` and return it with its ``file``.

    Raises:
        OSError: the file cannot be written.
    """
    plain: dict[str, Any] = {
        item.name: getattr(finding, item.name) for item in dataclasses.fields(finding) if item.name != 'file'
    }
    for name in DEVIATIONS:
        plain[name] = None if plain[name] is None else dataclasses.asdict(plain[name])
    plain['fault'] = None if finding.fault is None else finding.fault.value
    plain['causes'] = [cause.value for cause in finding.causes]
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({'format': FORMAT, 'version': VERSION, 'finding': plain}, path)
    return dataclasses.replace(finding, file=path)


def load_finding(path: Path) -> Finding:
    """Read what :func:`save_finding` wrote.

    Raises:
        ValueError: the file is none of these, or of another version.
        OSError: it cannot be read.
    """
    wrong = f'{path} is no finding of a validation; give a file that cache_validation_mode saved'
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
    except OSError as error:
        why = error.strerror or error
        raise type(error)(f'cannot read {path}: {why}; give a file that a validation saved') from error
    except Exception as error:  # torch raises whatever its reader meets: zip, pickle and key errors
        raise ValueError(wrong) from error
    if not isinstance(content, dict) or content.get('format') != FORMAT:
        raise ValueError(wrong)
    if content.get('version') != VERSION:
        raise ValueError(
            f'{path} has version {content.get("version")}, expected {VERSION}; read it with the release that '
            f'wrote it'
        )
    try:
        return Finding(**_read(content['finding']), file=path)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f'{wrong} ({type(error).__name__}: {error})') from error


def _read(finding: Mapping[str, Any]) -> dict[str, Any]:
    plain = dict(finding)
    for name in DEVIATIONS:
        plain[name] = None if plain[name] is None else Deviation(**plain[name])
    plain['fault'] = None if plain['fault'] is None else Fault(plain['fault'])
    plain['causes'] = tuple(Cause(name) for name in plain['causes'])
    return plain


def replay_data(world_model: Any, rule: str, course: Course) -> dict[str, Any]:
    """Input of :func:`recomputed`: weights (without the encoder's), configuration, and the tokens.

    Tensors, numbers and strings only.
    """
    weights = {
        name: tensor.detach().cpu()
        for name, tensor in world_model.state_dict().items()
        if not name.startswith('tokenizer.')
    }
    base, steps = course.base, [token for step in course.steps for token in step]
    window = None
    if not isinstance(base, list):
        window = {'kv': base.kv().detach().cpu(), 'next_position': base.next_position}
    return {
        'rule': rule,
        'config': _plain(world_model.config),
        'weights': weights,
        'base': _packed(base) if isinstance(base, list) else None,
        'window': window,
        'steps': _packed(steps) if steps else None,
    }


@torch.no_grad()
def recomputed(finding: Finding) -> dict[str, torch.Tensor]:
    """The truth of a finding, computed again with the model that its file holds.

    Returns:
        ``kv`` ``[2 * layers, T, embed]`` that the row must be served (absent where an episode begins), and
        the logits it must answer, by name.

    Raises:
        ValueError: the finding holds nothing to replay.
    """
    data = finding.replay
    if not data:
        raise ValueError('the finding holds no tokens and weights; give a file that a validation saved')
    oracle = oracle_of(_model(data), data['rule'])
    if data['steps'] is None:
        return oracle.begin(_unpacked(data['base'])[0]).logits
    if data['base'] is None:
        following = TokenWindow.of(data['window']['kv'], data['window']['next_position'], oracle.heads)
    else:
        following = oracle.causal(_unpacked(data['base']))[1]
    steps = _unpacked(data['steps'])
    for action, latent in zip(steps[0::2], steps[1::2], strict=True):
        served = following
        answer = oracle.step(served, action, latent)
        following = answer.window
    found = {'kv': served.kv(), **answer.logits}
    return {name: found[name] for name in found if name == 'kv' or name in finding.tensors['truth']}


def _model(data: Mapping[str, Any]) -> Any:
    # Imported here: LightZero takes seconds to load, and reading a file needs none of it.
    from easydict import EasyDict
    from lzero.model.unizero_world_models.world_model import WorldModel

    config: Any = EasyDict(data['config'])
    config.device, config.use_new_cache_manager = 'cpu', False
    with redirect_stdout(StringIO()):
        model = WorldModel(config, SimpleNamespace(encoder=None))  # nothing is encoded
    weights = data['weights']
    dtype = weights['transformer.ln_f.weight'].dtype
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():  # rotary factors are complex, and would lose a half
            tensor.data = tensor.data.to(dtype)
    model.load_state_dict(weights, strict=False)
    return model.eval()


def _packed(tokens: list[Token]) -> dict[str, torch.Tensor]:
    return {
        'embeddings': torch.stack([token.embedding.detach().cpu() for token in tokens]),
        'positions': torch.tensor([token.position for token in tokens]),
    }


def _unpacked(packed: Mapping[str, torch.Tensor]) -> list[Token]:
    pairs = zip(packed['embeddings'], packed['positions'].tolist(), strict=True)
    return [Token(embedding, position) for embedding, position in pairs]


def _plain(value: Any) -> Any:
    """A configuration as dicts, lists, numbers and strings; what is none of these is left out."""
    if isinstance(value, Mapping):
        items = ((str(name), _plain(item)) for name, item in value.items())
        return {name: item for name, item in items if item is not _LEFT_OUT}
    if isinstance(value, (list, tuple)):
        return [item for item in map(_plain, value) if item is not _LEFT_OUT]
    return value if value is None or isinstance(value, (bool, int, float, str)) else _LEFT_OUT


_LEFT_OUT = object()
