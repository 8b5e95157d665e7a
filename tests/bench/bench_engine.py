"""Speed and memory of the engine as one table: `make bench`, or this script with `--only NAME`, `--quick`, `--peers VENV`.

Needs torch, transformers and safetensors alone, so that it runs on a bare GPU machine; rows that need more say so. Every ratio is
of medians of interleaved rounds within one run.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # tiny.py
sys.path.insert(0, str(Path(__file__).parents[2]))  # the package, where it is not installed
os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}

from engine_rows import ROWS
from table import main

if __name__ == "__main__":
    sys.exit(main(__doc__.splitlines()[0], ROWS))
