"""Where a training keeps what it needs to go on after it was stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transplant_ray.distributed.training import find_progress
from transplant_ray.errors import RunError, TransplantError
from transplant_ray.files import locked, writable_folder, write_json

CLAIM, LOCK = "training.json", ".lock"


@dataclass(frozen=True)
class Workplace:
    folder: Path

    @property
    def organ(self) -> Path:
        return self.folder / "organ"

    @property
    def pack(self) -> Path:
        return self.folder / "pack"

    @contextmanager
    def claimed(self, identity: Mapping[str, Any]) -> Iterator[None]:
        """For the block this training's alone; after an error before its first checkpoint nothing is left of it.

        RunError where another training was begun here, or this one is running.
        """
        claim = writable_folder(self.folder) / CLAIM
        busy = f"{self.folder}: this training is running in another process. Wait for it, or choose another place."
        with locked(self.folder / LOCK, busy):
            try:
                if claim.exists() and not _says(claim, identity):
                    raise _Other(
                        f"{self.folder}: another training into this place was stopped, with other settings, model or text. Give "
                        "the same to go on with it; or remove the folder, or choose another place."
                    )
                write_json(claim, identity)
                yield
            except _Other as error:
                raise RunError(str(error)) from None
            except TransplantError:
                if find_progress(self.folder) is None:
                    self.remove()
                raise

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class _Other(RunError):
    """The folder is somebody else's: it stays."""


def _says(claim: Path, identity: Mapping[str, Any]) -> bool:
    try:
        return bool(json.loads(claim.read_text(encoding="utf-8")) == json.loads(json.dumps(identity)))
    except (OSError, ValueError, RecursionError):
        return False
