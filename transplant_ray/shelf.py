"""A shelf: small files that appear whole, in a folder or in an object store."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs

from transplant_ray.addresses import redact, redact_address
from transplant_ray.errors import RunError
from transplant_ray.files import whole_file


@dataclass(frozen=True)
class Shelf:
    """Small files that appear whole, in a folder or at an address; names are relative, with `/`."""

    place: str

    def names(self, under: str) -> list[str]:
        """Parquet files in a folder of the shelf, in order; none where it is not there."""
        with _shelf(self.place) as (system, root):
            selector = pyarrow.fs.FileSelector(f"{root}/{under}", allow_not_found=True)
            found = [info.base_name for info in system.get_file_info(selector) if info.is_file]
        return sorted(f"{under}/{name}" for name in found if name.endswith(".parquet") and not name.startswith("."))

    def read(self, name: str) -> bytes:
        with _shelf(self.place) as (system, root), system.open_input_stream(f"{root}/{name}") as stream:
            content: bytes = stream.read()
            return content

    def read_present(self, name: str) -> bytes | None:
        """None where it is not there, or not any more."""
        with _shelf(self.place) as (system, root):
            try:
                with system.open_input_stream(f"{root}/{name}") as stream:
                    content: bytes = stream.read()
                    return content
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """Whole or not at all."""
        with _shelf(self.place) as (system, root):
            put(system, f"{root}/{name}", content)

    def remove(self, folder: str) -> None:
        """A folder of the shelf, with all that is in it."""
        with _shelf(self.place) as (system, root):
            system.delete_dir(f"{root}/{folder}")

    def discard(self, name: str) -> None:
        """A file of the shelf, where it is there."""
        with _shelf(self.place) as (system, root), suppress(FileNotFoundError):
            system.delete_file(f"{root}/{name}")

    def set_aside(self, name: str) -> None:
        """Out of `names`, and still there for who wants to look."""
        with _shelf(self.place) as (system, root):
            path = f"{root}/{name}"
            try:
                system.move(path, f"{path}.damaged")
            except OSError:  # an object store has no error of its own for what is not there
                if system.get_file_info(path).type != pyarrow.fs.FileType.NotFound:
                    raise
                # another driver has seen it too


@contextmanager
def _shelf(place: str) -> Iterator[tuple[Any, str]]:
    """File system and path of a folder or an address; its troubles become RunErrors."""
    if "://" in place:
        with remote(place) as found:
            yield found
        return
    try:
        yield pyarrow.fs.LocalFileSystem(), place
    except OSError as error:
        raise RunError(f"{place}: the ledger cannot be used ({error}). Check the disk and the rights.") from error


@contextmanager
def remote(address: str) -> Iterator[tuple[Any, str]]:
    """File system and path of an address; its troubles become RunErrors."""
    try:
        yield _file_system(address)
    except (OSError, pa.ArrowException) as error:
        shown, reason = redact_address(address).partition("?")[0], redact(str(error), address)
        raise RunError(
            f"{shown}: the storage cannot be used ({reason}). Check address, credentials and bucket, and whether there is room."
        ) from None  # pyarrow quotes the address, and a traceback would show it


@lru_cache(maxsize=16)
def _file_system(address: str) -> tuple[Any, str]:
    """Once an address: making one asks the object store for region and rights. Threads may share it."""
    system, root = pa.fs.FileSystem.from_uri(address)
    return system, root


def put(system: Any, path: str, content: bytes) -> None:
    """Whole or not at all: a folder's file is renamed when it is complete, an object store shows it when it is closed."""
    if isinstance(system, pyarrow.fs.LocalFileSystem):
        with whole_file(Path(path)) as temporary:
            temporary.write_bytes(content)
        return
    try:
        stream = system.open_output_stream(path)
    except FileNotFoundError:  # not an object store: it has folders, and this one is not there yet
        system.create_dir(path.rpartition("/")[0])
        stream = system.open_output_stream(path)
    with stream:
        stream.write(content)
