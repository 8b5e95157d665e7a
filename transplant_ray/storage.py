"""Where results live: the run folder, and files and folders that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from transplant_ray.errors import RunError


@dataclass(frozen=True)
class RunFolder:
    """`<storage>/<name>/`: what one sweep wrote."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def rankings(self) -> Path:
        return self.path / "rankings.parquet"

    @property
    def results(self) -> Path:
        return self.path / "results.parquet"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def outcomes(self) -> Path:
        return self.path / "outcomes"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    @property
    def delta(self) -> Path:
        return self.path / "delta"

    def claim(self, identity: str, recipe_text: str) -> None:
        """Make the folder this recipe's; RunError where it holds the results of another recipe."""
        mark = self.path / ".identity"
        if self.recipe.exists() and (not mark.exists() or mark.read_text() != identity):
            raise RunError(
                f"{self.path}: holds the results of another recipe of this name. Give this one another `name` or `storage`, "
                "or move the folder away."
            )
        writable_folder(self.path)
        write_text(self.recipe, recipe_text)
        write_text(mark, identity)

    def require(self, path: Path) -> Path:
        if not path.exists():
            raise RunError(f"{path}: not there. Is {self.path} a run folder, and did its sweep finish? Run the sweep again.")
        return path

    def read_summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads(self.require(self.summary).read_text())
        return summary


def writable_folder(path: Path) -> Path:
    """Create a folder and prove that it can be written; RunError where not."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror}). Choose another `storage`.") from error


def write_text(path: Path, text: str) -> None:
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> None:
    """Rows as one Parquet file, replaced in one step."""
    with whole_file(path) as temporary:
        pq.write_table(pa.Table.from_pylist([dict(row) for row in rows], schema=schema), temporary)


def read_rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise RunError(f"{path}: not a readable Parquet file ({error}). Run the sweep again.") from error
    return rows


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its name when the block ends well, and vanishes when it does not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error}). Free space or choose another place.") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends well, and vanishes when it does not."""
    if path.exists() and not replace:
        raise RunError(f"{path}: is there already. Choose another place, or move it away; nothing was written.")
    writable_folder(path.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)
    except OSError as error:
        raise RunError(f"{path}: cannot be written ({error.strerror or error}). Free space or choose another place.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
