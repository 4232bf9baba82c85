"""Measure layer budgets beside the full cache: `lzero-kv llm run` with the same words, from a checkout.

python tools/run_experiment.py --algorithm full cake h2o hace --ratios 0.5 0.25 --out FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lzero_kv.cli import main

if __name__ == '__main__':
    sys.exit(main(['llm', 'run', *sys.argv[1:]]))
