"""Stopwatches and scales: interleaved seconds, bytes of tensors that a block makes, peak memory of a call."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Call = Callable[[], object]


def seconds_of(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleaved(calls: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call, A B A B …: what else the machine does falls on all alike. A first round is not counted."""
    turns = [{name: seconds_of(call) for name, call in calls.items()} for _ in range(rounds + 1)]
    return {name: [turn[name] for turn in turns[1:]] for name in calls}


class TensorBytes(TorchDispatchMode):
    """Bytes of all tensors that torch operators return inside the block."""

    total = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        self.total += result.nbytes if isinstance(result, torch.Tensor) else 0
        return result


def peak_above_baseline(call: Call) -> tuple[float, int]:
    """Seconds of a call, and by how many bytes resident memory of this process rose in it. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins again at what is resident now
    before = _high_water()
    return seconds_of(call), _high_water() - before


def _high_water() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
