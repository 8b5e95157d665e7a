"""Seconds and memory of a command and all that it starts."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil


def run_and_weigh(command: Sequence[str], folder: Path, env: Mapping[str, str]) -> tuple[float, int]:
    """Wall seconds of a command, and the peak in bytes of all its processes, their shared pages counted once (PSS)."""
    start, peak = time.perf_counter(), 0
    with (folder / "output.txt").open("w") as output:
        process = psutil.Popen(command, cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT)
    family: set[psutil.Process] = {process}
    while process.poll() is None:
        peak = max(peak, _weigh(process, family))
        with suppress(psutil.TimeoutExpired):
            process.wait(0.5)
    if process.returncode:
        raise RuntimeError(f"{command[0]} exited with {process.returncode}:\n{(folder / 'output.txt').read_text()[-2000:]}")
    return time.perf_counter() - start, peak


def _weigh(command: psutil.Popen, family: set[psutil.Process]) -> int:
    """Bytes now. Who was seen once stays in `family` when its parent ends, as Ray's daemons may."""
    total = 0
    with suppress(psutil.Error):  # it ended
        family.update(command.children(recursive=True))
    for process in family:
        with suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total
