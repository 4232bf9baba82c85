"""A finding in a file is the same finding, and no other file is one."""

from __future__ import annotations

import dataclasses
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from lzero_kv.telemetry.counters import Cause
from lzero_kv.validation.findings import (
    FORMAT,
    VERSION,
    Finding,
    ValidationError,
    load_finding,
    new_file,
    save_finding,
)

from .drawn import a_finding, findings


def same(left: object, right: object) -> bool:
    """Equality that looks into tensors."""
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(same(left[name], right[name]) for name in left)
    return left == right


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(findings())
def test_what_was_saved_is_read_back(tmp_path: Path, finding: Finding) -> None:
    path = tmp_path / 'folder' / 'finding.pt'
    saved = save_finding(finding, path)
    assert saved.file == path
    read = load_finding(path)
    for item in dataclasses.fields(Finding):
        assert same(getattr(read, item.name), getattr(saved, item.name)), item.name


def test_findings_that_are_saved_at_once_get_files_of_their_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(6) as pool:
        paths = list(pool.map(lambda _: new_file(tmp_path / 'folder', 'finding_0_1_0'), range(48)))
    assert len(set(paths)) == 48
    assert sorted(tmp_path.rglob('*.pt')) == sorted(paths)
    assert {'finding_0_1_0.pt', 'finding_0_1_0_48.pt'} < {path.name for path in paths}


class Trap:
    """What a hostile file would hold: reading it naively makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


def test_reading_runs_no_code_of_the_file(tmp_path: Path) -> None:
    path, trapped = tmp_path / 'finding.pt', tmp_path / 'trapped'
    torch.save({'format': FORMAT, 'version': VERSION, 'finding': Trap(trapped)}, path)
    with pytest.raises(ValueError, match='is no finding of a validation'):
        load_finding(path)
    assert not trapped.exists()
    torch.load(path, weights_only=False)
    assert trapped.exists(), 'the trap must work, or nothing was shown'


@pytest.mark.parametrize('content', [b'', b'no file of torch', pickle.dumps({'format': FORMAT})])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / 'finding.pt'
    path.write_bytes(content)
    with pytest.raises(ValueError, match='is no finding of a validation; give a file that'):
        load_finding(path)


@pytest.mark.parametrize('content', [torch.zeros(3), {'format': 'another'}, [1, 2]])
def test_a_file_of_torch_with_something_else_is_refused(tmp_path: Path, content: object) -> None:
    path = tmp_path / 'finding.pt'
    torch.save(content, path)
    with pytest.raises(ValueError, match='is no finding of a validation; give a file that'):
        load_finding(path)


def test_another_version_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / 'finding.pt'
    torch.save({'format': FORMAT, 'version': 7, 'finding': {}}, path)
    with pytest.raises(ValueError, match='has version 7, expected 2'):
        load_finding(path)


def test_a_missing_file_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_finding(tmp_path / 'missing.pt')


def test_a_finding_tells_where_what_how_much_and_both_keys() -> None:
    text = str(ValidationError(a_finding(layer=2, by=0.5)))
    assert 'the cache is wrong (stale_entry): what was served belongs to an earlier state' in text
    assert 'pool nodes, environment 2, row 1, node 6' in text
    assert 'keys and values: largest difference 0.5, mean 0.00238 in layer 2' in text
    assert 'distance from the recomputation: cache 0.5, stock cache 0' in text
    assert 'key of the cache: environment 2, root 9, node 6; key of the stock cache: -8123' in text


def test_a_difference_without_cause_says_so(tmp_path: Path) -> None:
    finding = save_finding(a_finding(fault=None), tmp_path / 'finding.pt')
    assert finding.causes == (Cause.EQUAL_LATENTS,)
    text = str(finding)
    assert text.startswith('the two caches differ and no cause is proven; pool nodes, environment 2')
    assert text.splitlines()[-1] == f'  saved; look at it with: lzero-kv explain {tmp_path / "finding.pt"}'
