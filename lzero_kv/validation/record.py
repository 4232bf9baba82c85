"""Findings in files: tensors, numbers and strings only, so that reading one from a stranger runs no code."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from .causes import Cause, Fault
from .deviation import Deviation
from .finding import Finding

FORMAT = 'lzero_kv validation finding'
VERSION = 1


def save_finding(finding: Finding, path: Path) -> Finding:
    """Write ``finding`` to ``path``; gives it back with its ``file``.

    Raises:
        OSError: the file cannot be written.
    """
    plain: dict[str, Any] = {
        item.name: getattr(finding, item.name) for item in dataclasses.fields(finding) if item.name != 'file'
    }
    for name in ('manager', 'host', 'between'):
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
    try:
        content = torch.load(path, map_location='cpu', weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises whatever its reader meets: zip, pickle and key errors
        raise ValueError(
            f'{path} is no finding of a validation; give a file that cache_validation_mode saved'
        ) from error
    if not isinstance(content, dict) or content.get('format') != FORMAT:
        raise ValueError(
            f'{path} is no finding of a validation; give a file that cache_validation_mode saved'
        )
    if content['version'] != VERSION:
        raise ValueError(
            f'{path} has version {content["version"]}, expected {VERSION}; read it with the release that '
            f'wrote it'
        )
    plain = dict(content['finding'])
    for name in ('manager', 'host', 'between'):
        plain[name] = None if plain[name] is None else Deviation(**plain[name])
    plain['fault'] = None if plain['fault'] is None else Fault(plain['fault'])
    plain['causes'] = tuple(Cause(name) for name in plain['causes'])
    return Finding(**plain, file=path)
