"""The spool: outcomes that a run will want again, in a file of the driver's machine that nobody else sees.

A sweep of a thousand variants on a thousand examples has a million completions. In memory they are gigabytes, and are needed once:
when the tables are written. Short runs never reach the disk.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from operator import attrgetter
from threading import Lock

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
    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115  # it lasts as long as the spool
        self._end = 0
        self._lock = Lock()  # the evaluation goes on in a thread of its own while trials report

    def keep(self, outcomes: Sequence[Outcome]) -> Slip:
        """RunError where the disk has no room."""
        content = json.dumps([_values(outcome) for outcome in outcomes]).encode()
        with self._lock:
            slip = Slip(self._end, len(content))
            try:
                self._file.seek(self._end)
                self._file.write(content)
            except OSError as error:
                raise RunError(
                    f"answers cannot be kept in {tempfile.gettempdir()}: {error.strerror}. Make room there, or name another folder "
                    "in TMPDIR, and run the same command again: it goes on where this one stopped."
                ) from error
            self._end += len(content)
        return slip

    def read(self, slip: Slip) -> tuple[Outcome, ...]:
        with self._lock:
            self._file.seek(slip.start)
            content = self._file.read(slip.size)
        return tuple(Outcome(*values) for values in json.loads(content))
