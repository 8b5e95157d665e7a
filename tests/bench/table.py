"""A table of measured rows, and the script around it, which exits with 1 where a bar is missed."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

HEAD = ("what", "n and sizes", "repetitions", "result", "bar", "met")
MET = {True: "yes", False: "NO", None: "–"}
QUIET_LOAD = 0.5


@dataclass(frozen=True)
class Row:
    what: str
    sizes: str
    repetitions: str
    result: str
    bar: str = "–"
    met: bool | None = None


Rows = Callable[[Namespace], Iterator[Row]]


def main(title: str, rows: Mapping[str, Rows]) -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(description=title)
    parser.add_argument("--only", choices=rows, action="append", help="measure this alone; may be given several times")
    parser.add_argument("--quick", action="store_true", help="few repetitions: does it run, not how fast is it")
    parser.add_argument("--peers", type=Path, default=Path("/tmp/peers"), metavar="VENV", help="where mergekit and lm_eval are")
    options = parser.parse_args()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    load, missed = os.getloadavg()[0], 0
    print(_line(HEAD), _line(["---"] * len(HEAD)), sep="\n", flush=True)
    for name in options.only or rows:
        for row in rows[name](options):
            print(_line([row.what, row.sizes, row.repetitions, row.result, row.bar, MET[row.met]]), flush=True)
            missed += row.met is False
    print(f"\n{_machine(load)}\nbars missed: {missed}")
    sys.stdout.flush()
    return min(missed, 1)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _machine(load: float) -> str:
    cpus = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    where = ", ".join([cpus[0] if cpus else platform.machine(), f"{os.cpu_count()} cores", *devices])
    text = f"machine: {where}; {torch.get_num_threads()} threads; {versions}; load {load:.2f} at the start"
    busy = f"\nwarning: the load was above {QUIET_LOAD} at the start: others used the machine, and they are in these numbers."
    return text + busy if load > QUIET_LOAD else text
