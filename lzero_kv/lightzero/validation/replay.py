"""A finding's truth, computed again from what its file holds."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import torch

from lzero_kv.lightzero.validation.enactment import answers_of
from lzero_kv.lightzero.validation.histories import Course
from lzero_kv.lightzero.validation.recompute import Recompute, Token, TokenWindow
from lzero_kv.validation.finding import Finding


def replay_data(world_model: Any, rule: str, course: Course) -> dict[str, Any]:
    """What :func:`replay` needs: weights (without the encoder's), configuration, and the tokens.

    Tensors, numbers and strings only.
    """
    weights = {
        name: tensor.detach().cpu()
        for name, tensor in world_model.state_dict().items()
        if not name.startswith('tokenizer.')
    }
    steps = [token for step in course.steps for token in step]
    return {
        'rule': rule,
        'config': _plain(world_model.config),
        'weights': weights,
        'base': _packed(course.base) if isinstance(course.base, list) else None,
        'window': None if isinstance(course.base, list) else _window(course.base),
        'steps': _packed(steps) if steps else None,
    }


@torch.no_grad()
def replay(finding: Finding) -> dict[str, torch.Tensor]:
    """Compute the truth of a finding again, with the model that its file holds.

    Returns:
        ``kv`` ``[2 * layers, T, embed]`` that the row must be served (absent where an episode begins), and
        the logits it must answer, by name.

    Raises:
        ValueError: the finding holds nothing to replay.
    """
    data = finding.replay
    if not data:
        raise ValueError('the finding holds no tokens and weights; give a file that a validation saved')
    oracle = Recompute(_model(data), data['rule'])
    steps = _unpacked(data['steps']) if data['steps'] is not None else []
    if not steps:
        return answers_of(oracle.begin(_unpacked(data['base'])[0]))
    if data['base'] is None:
        following = TokenWindow.of(data['window']['kv'], data['window']['next_position'], oracle.heads)
    else:
        following = oracle.causal(_unpacked(data['base']))[1]
    for action, latent in zip(steps[0::2], steps[1::2], strict=True):
        served = following
        answer = oracle.step(served, action, latent)
        following = answer.window
    found = {'kv': served.kv(), **answers_of(answer)}
    return {name: found[name] for name in found if name == 'kv' or name in finding.tensors['truth']}


def _model(data: Mapping[str, Any]) -> Any:
    from easydict import EasyDict
    from lzero.model.unizero_world_models.world_model import WorldModel

    config: Any = EasyDict(data['config'])
    config.device, config.use_new_cache_manager = 'cpu', False
    with redirect_stdout(StringIO()):
        model = WorldModel(config, None)
    weights = data['weights']
    dtype = weights['transformer.ln_f.weight'].dtype
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():  # rotary factors are complex, and would lose a half
            tensor.data = tensor.data.to(dtype)
    model.load_state_dict(weights, strict=False)
    return model.eval()


def _window(window: TokenWindow) -> dict[str, Any]:
    return {'kv': window.kv().detach().cpu(), 'next_position': window.next_position}


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
