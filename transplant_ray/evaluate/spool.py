"""The spool: outcomes that a run will want again, in a file of the driver's machine that nobody else sees.

A sweep of a thousand variants on a thousand examples has a million completions: gigabytes, were they in memory, and each is wanted
once or twice. Short runs never reach the disk.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from operator import attrgetter
from threading import Lock
from typing import IO

from transplant_ray.errors import RunError
from transplant_ray.evaluate.outcome import Outcome

IN_MEMORY = 16 * 2**20
"""Bytes of a spool that are kept in memory; with more it becomes a file in the folder for temporary files."""

_values = attrgetter(*(field.name for field in fields(Outcome)))


@dataclass(frozen=True, slots=True)
class Slip:
    """Where some outcomes lie in a spool."""

    start: int
    size: int


class Spool:
    """RunError where the disk has no room; what was kept before is still there."""

    def __init__(self) -> None:
        self._memory = bytearray()
        self._file: IO[bytes] | None = None
        self._end = 0
        self._lock = Lock()  # the evaluation goes on in a thread of its own while trials report

    def keep(self, outcomes: Sequence[Outcome]) -> Slip:
        content = json.dumps([_values(outcome) for outcome in outcomes]).encode()
        with self._lock, _named():
            slip = Slip(self._end, len(content))
            if self._file is None and self._end + len(content) > IN_MEMORY:
                self._move_to_disk()
            if self._file is None:
                self._memory += content
            else:
                _write(self._file, content, self._end)
            self._end += len(content)
        return slip

    def read(self, slip: Slip) -> tuple[Outcome, ...]:
        with self._lock, _named():
            content = _read(self._file, slip) if self._file else self._memory[slip.start : slip.start + slip.size]
        return tuple(Outcome(*values) for values in json.loads(content))

    def _move_to_disk(self) -> None:
        file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  # it lasts as long as the spool
        _write(file, self._memory, 0)
        self._file, self._memory = file, bytearray()


def _write(file: IO[bytes], content: bytes | bytearray, at: int) -> None:
    left = memoryview(content)
    while left:  # a disk that is nearly full takes a part, and nothing the next time
        done = os.pwrite(file.fileno(), left, at)
        left, at = left[done:], at + done


def _read(file: IO[bytes], slip: Slip) -> bytes:
    content = b""
    while len(content) < slip.size:
        piece = os.pread(file.fileno(), slip.size - len(content), slip.start + len(content))
        if not piece:
            raise OSError("it is shorter than it was")
        content += piece
    return content


@contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place, reason = tempfile.tempdir or "a temporary file", error.strerror or error
        raise RunError(
            f"answers cannot be kept in {place}: {reason}. Make room there, or name another folder in TMPDIR, and run the same "
            "command again: what the ledger has is not evaluated again."
        ) from error
