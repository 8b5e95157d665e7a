"""Speed and memory of the main job as one table: `make bench`, or this script with `--only NAME`, `--quick`, `--peers VENV`.

Numbers are those of the machine and the moment named under the table; only ratios travel.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # tiny.py
# One thread, as an evaluator has: torch reads it when it is imported.
os.environ |= {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}

from rows import ROWS
from table import main

if __name__ == "__main__":
    sys.exit(main(__doc__.splitlines()[0], ROWS))
