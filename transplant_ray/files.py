"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from transplant_ray.errors import RunError

PART, OLD = ".part", ".old"
"""How names end of what is not whole yet, and of what was set aside for it."""
LEFT = re.compile(rf"\.(?P<name>.+)\.\w+(?:{re.escape(PART)}|{re.escape(OLD)})")
CANNOT_WRITE = (OSError, SafetensorError)
"""What a full disk comes as: safetensors, and `save_pretrained` with it, has an error of its own for it."""


def writable_folder(path: Path) -> Path:
    """Create a folder and prove that it can be written; RunError where not."""
    _refuse_address(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror}). Choose another `storage`.") from error


def _refuse_address(path: Path) -> None:
    """`s3://bucket/x` as a path is a folder of the name `s3:`, where nobody would look for it."""
    first = path.parts[0] if path.parts else ""
    if first.endswith(":") and len(first) > 2:  # shorter is a drive
        raise RunError(f"{path}: an address, where only a folder can be written. Give a folder, and copy it from there.")


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name when the block ends well, and vanishes when it does not."""
    temporary = _beside(path, PART)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except CANNOT_WRITE as error:
        raise RunError(f"{path}: cannot be written ({_reason(error)}). Free space or choose another place.") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def whole_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends well, and vanishes when it does not."""
    if path.exists() and not replace:
        raise RunError(f"{path}: is there already. Choose another place, or move it away; nothing was written.")
    writable_folder(path.parent)
    temporary, old = _beside(path, PART), _beside(path, OLD)
    try:
        temporary.mkdir(mode=0o700)
        yield temporary
        temporary.chmod(0o755)
        if path.exists():  # aside first: a crash between the two leaves one of them
            path.rename(old)
        temporary.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    except CANNOT_WRITE as error:
        raise RunError(f"{path}: cannot be written ({_reason(error)}). Free space or choose another place.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_debris(folder: Path) -> None:
    """Remove what a process that was killed has left half written in a folder or below it; nobody else may be writing there.

    What it had set aside for something that never came takes its name again.
    """
    names = [Path(place) / name for place, folders, files in os.walk(folder) for name in (*folders, *files)]
    for path in sorted(names):
        left = LEFT.fullmatch(path.name)
        if left is None:
            continue
        with suppress(OSError):  # what cannot be removed only takes room
            if path.suffix == OLD and not (whole := path.with_name(left["name"])).exists():
                path.rename(whole)
            else:
                remove(path)


def remove(path: Path) -> None:
    """A file, or a folder with all that is in it; nothing where it is not there. OSError where that cannot be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, busy: str | None = None) -> Iterator[None]:
    """One process at a time: the others wait, or get a RunError that says `busy`. RunError where the lock cannot be made."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=-1 if busy is None else 0)
    except Timeout:
        raise RunError(str(busy)) from None
    except (OSError, NotImplementedError) as error:  # the latter where a file system has no locks
        raise RunError(
            f"{path}: cannot be written ({getattr(error, 'strerror', None) or error}). Choose another `storage`."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _beside(path: Path, ending: str) -> Path:
    """A name that nobody else has, on whichever machine: process ids say nothing where several write to one file system."""
    return path.with_name(f".{path.name}.{uuid4().hex}{ending}")


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
