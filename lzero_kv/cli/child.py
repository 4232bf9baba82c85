"""`python -m lzero_kv.cli.child MODULE DESCRIPTOR REQUEST`: one training of `compare`, `validate` or a study.

Reports on an open file, in lines of JSON: some with `progress`, the last one with `run` or with `error`. All
other output is the host's.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from typing import Any

from lzero_kv.cli.training import Request
from lzero_kv.cli.training_call import ConfigError


def main(module: str, descriptor: str, request: str) -> int:
    """Run ``train`` of a module; 1 when an error was reported."""
    with os.fdopen(int(descriptor), 'w', encoding='utf-8') as report:

        def tell(**answer: Any) -> None:
            print(json.dumps(answer), file=report, flush=True)

        try:
            train = importlib.import_module(module).train
            tell(run=train(Request(**json.loads(request)), lambda numbers: tell(progress=numbers)))
        except Exception as error:
            traceback.print_exc()
            kind = '' if isinstance(error, ConfigError) else f'{type(error).__name__}: '
            tell(error=f'{kind}{error}')
            return 1
    return 0


if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
