"""Speed and memory as one table: `make bench`, or this script with `--only NAME`, `--quick`, `--peers VENV`.

Numbers are those of the machine and the moment named under the table; only ratios travel. Exits with 1 where a bar is missed.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # tiny.py
# One thread, as an evaluator has: torch reads it when it is imported.
os.environ |= {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}

import torch
import transformers
from rows import ROWS

HEAD = ("what", "n and sizes", "repetitions", "result", "bar", "met")
MET = {True: "yes", False: "NO", None: "–"}
QUIET_LOAD = 0.5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=ROWS, action="append", help="measure this alone; may be given several times")
    parser.add_argument("--quick", action="store_true", help="few repetitions: does it run, not how fast is it")
    parser.add_argument("--peers", type=Path, default=Path("/tmp/peers"), metavar="VENV", help="where mergekit and lm_eval are")
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    load, missed = os.getloadavg()[0], 0
    print(_line(HEAD), _line(["---"] * len(HEAD)), sep="\n", flush=True)
    for name in options.only or ROWS:
        for row in ROWS[name](options):
            print(_line([row.what, row.sizes, row.repetitions, row.result, row.bar, MET[row.met]]), flush=True)
            missed += row.met is False
    print(f"\n{_machine(load)}\nbars missed: {missed}")
    return min(missed, 1)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _machine(load: float) -> str:
    cpus = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    text = f"machine: {cpus[0] if cpus else platform.machine()}, {os.cpu_count()} cores; {versions}; load {load:.2f} at the start"
    busy = f"\nwarning: the load was above {QUIET_LOAD} at the start: others used the machine, and they are in these numbers."
    return text + busy if load > QUIET_LOAD else text


if __name__ == "__main__":
    sys.exit(main())
