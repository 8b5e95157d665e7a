"""Where results live: the run folder, here or in an object store."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import pyarrow as pa
import pyarrow.fs

from transplant_ray.addresses import redact_address
from transplant_ray.errors import RunError
from transplant_ray.files import locked, remove, remove_debris, writable_folder, write_json, write_text
from transplant_ray.shelf import Shelf, put, remote

LEDGER = ".ledger"
"""No run can have this name."""
LOCK, MARK = ".lock", ".identity"
LENT = ".lent-"


@dataclass(frozen=True)
class RunFolder:
    """`<storage>/<name>/`: what one sweep or comparison wrote.

    Where storage is an object store (`s3://…`, any address that pyarrow reads), work is done in a local copy, which `publish`
    writes to `address`.
    """

    path: Path
    address: str | None = None

    @classmethod
    def of(cls, storage: str, name: str) -> RunFolder:
        if "://" not in storage:
            return cls(_expanded(storage) / name)
        parts = urlsplit(storage)
        address = urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))
        return cls(_local_copy(address), address)

    @property
    def ledger(self) -> Shelf:
        """Beside the runs of this storage: outcomes that any of them may use."""
        if self.address is None:
            return Shelf(str(self.path.parent.absolute() / LEDGER))
        parts = urlsplit(self.address)
        return Shelf(urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{LEDGER}")))

    @classmethod
    def open(cls, run: str) -> RunFolder:
        """A finished run by its folder or address; of a remote one, the tables are fetched and the checkpoint is not."""
        if "://" not in run:
            return cls(_expanded(run))
        folder = cls(_local_copy(run), run)
        writable_folder(folder.path)
        for path in (folder.recipe, folder.results, folder.summary):
            folder.fetch(path)
        folder.fetch_present(folder.rankings, folder.variants, folder.guards, folder.examples, folder.tasks)
        return folder

    def fetch(self, path: Path) -> None:
        """Copy one file of a remote run here; RunError where it is not there."""
        if self.address is not None:
            with remote(self.address) as (system, root), system.open_input_stream(f"{root}/{self._inside(path)}") as stream:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(stream.read())

    def fetch_present(self, *paths: Path) -> None:
        """Copy those files of a remote run here that are there; what is not there is not here either."""
        if self.address is None:
            return
        with remote(self.address) as (system, root):
            infos = system.get_file_info([f"{root}/{self._inside(path)}" for path in paths])
        for path, info in zip(paths, infos, strict=True):
            path.unlink(missing_ok=True)
            if info.is_file:
                self.fetch(path)

    def send(self, *paths: Path) -> None:
        """Copy single files to `address`; nothing to do for a local folder."""
        if self.address is not None:
            with remote(self.address) as (system, root):
                for path in paths:
                    put(system, f"{root}/{self._inside(path)}", path.read_bytes())

    def publish(self) -> None:
        """Copy everything to `address` but what only matters here; nothing to do for a local folder."""
        if self.address is None:
            return
        with remote(self.address) as (system, root):
            system.create_dir(root)  # copy_files makes only the folders inside
            for path in sorted(self.path.iterdir()):
                if path.name.startswith(".") and path.name != MARK:  # the lock, Tune's state, debris
                    continue
                there = f"{root}/{path.name}"
                if path.is_dir():
                    system.create_dir(there)
                pa.fs.copy_files(str(path), there, destination_filesystem=system)

    @contextmanager
    def lent(self, folder: Path) -> Iterator[str | None]:
        """Address from which other nodes may copy a folder of this run, for the block; None for a local run, which they share."""
        if self.address is None:
            yield None
            return
        inside = f"{LENT}{uuid4().hex}"
        parts = urlsplit(self.address)
        with remote(self.address) as (system, root):
            system.create_dir(f"{root}/{inside}")
            pa.fs.copy_files(str(folder), f"{root}/{inside}", destination_filesystem=system)
        try:
            yield urlunsplit(parts._replace(path=f"{parts.path}/{inside}"))
        finally:
            with remote(self.address) as (system, root):
                system.delete_dir(f"{root}/{inside}")

    @property
    def public_address(self) -> str | None:
        """The address without credentials and connection settings."""
        return None if self.address is None else redact_address(self.address).partition("?")[0]

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def mark(self) -> Path:
        """Says whose the folder is: the identity of a recipe, or a name that any comparison goes by."""
        return self.path / MARK

    @property
    def rankings(self) -> Path:
        return self.path / "rankings.parquet"

    @property
    def results(self) -> Path:
        return self.path / "results.parquet"

    @property
    def variants(self) -> Path:
        return self.path / "variants.parquet"

    @property
    def modules(self) -> Path:
        return self.path / "modules.parquet"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def log(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def guards(self) -> Path:
        return self.path / "guards.parquet"

    @property
    def examples(self) -> Path:
        return self.path / "examples.parquet"

    @property
    def tasks(self) -> Path:
        """Of an organ sweep."""
        return self.path / "tasks.parquet"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def variants_csv(self) -> Path:
        return self.path / "variants.csv"

    @property
    def variants_tex(self) -> Path:
        return self.path / "variants.tex"

    @property
    def reports(self) -> tuple[Path, ...]:
        """What `build_report` writes."""
        return self.report, self.variants_csv, self.variants_tex

    @property
    def outcomes(self) -> Path:
        return self.path / "outcomes"

    @property
    def tune(self) -> Path:
        """Tune's own state while a sweep runs: pickles, which nobody reads."""
        return self.path / ".tune"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    @property
    def delta(self) -> Path:
        return self.path / "delta"

    @property
    def openings(self) -> Path:
        """Beside the runs of this storage: which test splits were opened, when, and by which run."""
        return self.path.parent / "test-splits.json"

    def open_tests(self, examples: Mapping[str, Sequence[str]], recipe: str) -> dict[str, int]:
        """Say that a run looks at the test splits of these tasks, each known by the ids of its examples.

        Returns how many recipes have looked, this one included: the same recipe run again sees nothing new. Runs on one machine
        wait for each other; of two machines that write to one address in the same second, one may be forgotten.
        """
        splits = {task: hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest()[:16] for task, ids in examples.items()}
        now = {"run": self.path.name, "recipe": recipe, "at": datetime.now(UTC).isoformat(timespec="seconds")}
        with locked(self.openings.with_name(f"{self.openings.name}{LOCK}")):
            if self.address is not None:
                self._mirror_openings()
            opened = _read_json(self.openings, "record of test splits") if self.openings.exists() else {}
            for split in splits.values():
                looks = opened.setdefault(split, [])
                if all(look.get("recipe") != recipe for look in looks):
                    looks.append(now)
            write_json(self.openings, opened)
            if self.address is not None:
                with remote(self.address) as (system, root):
                    put(system, _beside(root, self.openings), self.openings.read_bytes())
        return {task: len(opened[split]) for task, split in splits.items()}

    def _mirror_openings(self) -> None:
        self.openings.unlink(missing_ok=True)
        with remote(self.address or "") as (system, root):
            there = _beside(root, self.openings)
            if system.get_file_info(there).is_file:
                self.openings.write_bytes(system.open_input_stream(there).read())

    @contextmanager
    def claimed(self, identity: str, recipe_text: str) -> Iterator[None]:
        """The folder is, for the block, that one process's alone; a process that is killed lets go of it.

        RunError where another process works in it, or where it holds the results of another recipe. Of storage at an address it
        is the local copy that is locked: this keeps apart what runs on one machine, and not several machines.
        """
        lock = writable_folder(self.path) / LOCK
        busy = (
            f"{self._shown}: another process works in it. Wait for it or stop it, or give this one another `name` or `storage`. "
            f"(It holds {lock}, which on a file system without locks is left by a process that is killed, and can be removed then.)"
        )
        with locked(lock, busy):
            self.claim(identity, recipe_text)
            yield

    def check_owner(self, identity: str) -> None:
        """RunError where the folder holds the results of another recipe, of whatever kind of run."""
        if self._owner() not in (None, identity):
            raise RunError(
                f"{self._shown}: holds the results of another recipe of this name. Give this one another `name` or `storage`, "
                "or move the folder away."
            )

    def claim(self, identity: str, recipe_text: str) -> None:
        """Make the folder its that is called so: a recipe's, or any comparison's of this name. RunError where it is another's.

        What a killed process has left half done is removed from it, so nobody else may work there; so is, of a local copy, what
        is of another run.
        """
        self.check_owner(identity)  # again: whoever had this name may have finished since it was looked at
        writable_folder(self.path)
        if self.address is not None:
            if {self._owner(), self._owner_here()} != {identity}:
                self._empty_copy()
            self._remove_lent()
        remove_debris(self.path)
        write_text(self.mark, identity)  # first: a recipe without its mark would be taken for another's
        write_text(self.recipe, recipe_text)

    def _owner(self) -> str | None:
        """Whose results are there, at the address or here: None where there are none, empty where nothing says whose."""
        if self.address is None:
            return self._owner_here()
        there = Shelf(self.address)
        if there.read_present(self.recipe.name) is None:
            return None
        return (there.read_present(MARK) or b"").decode(errors="replace")

    def _owner_here(self) -> str | None:
        try:
            if not self.recipe.exists():
                return None
            return self.mark.read_text() if self.mark.exists() else ""
        except OSError as error:  # no right to look, or a name that no folder can have
            raise RunError(f"{self.path}: cannot be read ({error.strerror}). Choose another `storage`.") from error

    def _empty_copy(self) -> None:
        """The local copy is kept between runs: that of one which is gone from the address would be published with the next.

        A log that the address knows of stays, for there may be more of it here (`Journal` holds one against the other).
        """
        with remote(self.address or "") as (system, root):
            logged = system.get_file_info(f"{root}/{self.log.name}").is_file
        kept = {LOCK, self.log.name} if logged else {LOCK}
        try:
            for path in self.path.iterdir():
                if path.name not in kept:
                    remove(path)
        except OSError as error:
            raise RunError(f"{self.path}: holds another run and cannot be emptied ({error.strerror}). Remove it.") from error

    def _remove_lent(self) -> None:
        """A killed driver leaves a whole checkpoint at the address."""
        with remote(self.address or "") as (system, root):
            for info in system.get_file_info(pyarrow.fs.FileSelector(root, allow_not_found=True)):
                if info.base_name.startswith(LENT):
                    system.delete_dir(info.path)

    @property
    def _shown(self) -> str:
        return self.public_address or str(self.path)

    def _inside(self, path: Path) -> str:
        return path.relative_to(self.path).as_posix()

    def require(self, path: Path) -> Path:
        if not path.exists():
            raise RunError(f"{path}: not there. Is {self.path} a run folder, and did its sweep finish? Run the sweep again.")
        return path

    def read_summary(self) -> dict[str, Any]:
        return _read_json(self.require(self.summary), "summary")


def copy_here(address: str, folder: Path) -> None:
    """All files of a folder at an address. RunError where it is not there."""
    with remote(address) as (system, root):
        pa.fs.copy_files(root, str(folder), source_filesystem=system)


def _read_json(path: Path, what: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"found {type(content).__name__}, expected an object")
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path}: not a readable {what} ({error}). Move it away and run the sweep again.") from error
    return content


def _expanded(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError as error:  # the home of a user who is not there
        raise RunError(f"{text}: {error} Give another folder.") from error


def _local_copy(address: str) -> Path:
    """Where a remote run is worked on: one place an address, kept between runs."""
    home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
    return home / "transplant_ray" / hashlib.sha256(address.encode()).hexdigest()[:16] / Path(urlsplit(address).path).name


def _beside(root: str, path: Path) -> str:
    """The place of a local file next to a run, at the address of the run."""
    return f"{root.rpartition('/')[0]}/{path.name}"
