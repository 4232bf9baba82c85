"""A notebook's cells run in order, without Jupyter: `python -m testing.notebook FILE` keeps what they print.

Jupyter's own runners need some twenty packages beside the pins; cells that only print need none of them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any


def run(path: Path) -> dict[str, Any]:
    """The notebook with new outputs. As in Jupyter, it runs in its own folder, and its cells share names."""
    notebook = json.loads(path.read_text(encoding='utf-8'))
    names: dict[str, Any] = {'__name__': '__main__'}
    cells = [cell for cell in notebook['cells'] if cell['cell_type'] == 'code']
    with contextlib.chdir(path.parent):
        sys.path.insert(0, os.getcwd())
        for number, cell in enumerate(cells, 1):
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(''.join(cell['source']), f'{path.name}, cell {number}', 'exec'), names)
            text = printed.getvalue().splitlines(keepends=True)
            shown = dict(output_type='stream', name='stdout', text=text)
            cell |= dict(execution_count=number, outputs=[shown] if text else [])
        sys.path.remove(os.getcwd())
    return notebook


if __name__ == '__main__':
    ran = run(Path(sys.argv[1]))
    Path(sys.argv[1]).write_text(json.dumps(ran, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
