"""The log of a run: `log.jsonl` in its folder, one JSON object a line, through the logger `transplant_ray`.

Whoever puts a handler of their own on that logger gets the same records; `record.facts` is what a line holds.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transplant_ray.distributed.facts import Fact, StageEnds, SweepBegins, SweepEnds, VariantsPlanned
from transplant_ray.distributed.meters import Meters
from transplant_ray.errors import RunError, Terminated, TransplantError
from transplant_ray.pipeline.watch import Silent, Stopwatch, Watch, Watches
from transplant_ray.recipe import AnyRecipe, redact
from transplant_ray.storage import RunFolder

LOGGER = logging.getLogger("transplant_ray")
MOST_REASON = 2000
"""Characters of an error that nobody foresaw: Ray puts tracebacks into them."""


class JsonLines(logging.Formatter):
    """A record of ours as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        facts = getattr(record, "facts", {})
        return json.dumps({"time": when, "level": record.levelname, "event": record.getMessage(), **facts}, ensure_ascii=False)


class QuietFile(logging.FileHandler):
    """Appends to a file, line by line. A full disk is for the results to complain of, not for every line of a log."""

    def __init__(self, path: Path) -> None:
        if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):  # whoever wrote was killed within a line
            with path.open("a") as file:
                file.write("\n")
        super().__init__(path, encoding="utf-8")
        self.setFormatter(JsonLines())

    def handleError(self, record: logging.LogRecord) -> None: ...


class Journal:
    """Makes a record of every fact. What happens before the run folder is the recipe's own waits until it is."""

    def __init__(self, recipe: AnyRecipe) -> None:
        started = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        self.ids = {"run": recipe.name, "recipe": recipe.identity(), "attempt": f"{started}-{secrets.token_hex(2)}"}
        self.labels: Mapping[str, str] = {}
        self.waiting: list[logging.LogRecord] | None = []
        self.folder: RunFolder | None = None
        self.exit = 0
        """What the command line will say where nothing is raised."""

    def hear(self, fact: Fact) -> None:
        if isinstance(fact, VariantsPlanned):
            self.labels = fact.labels
        if not LOGGER.isEnabledFor(fact.level) and self.waiting is None:
            return
        record = LOGGER.makeRecord(LOGGER.name, fact.level, __file__, 0, fact.event(), (), None, extra={"facts": self._line(fact)})
        if self.waiting is not None:
            self.waiting.append(record)
        else:
            LOGGER.handle(record)
        if isinstance(fact, StageEnds):
            self.send()

    def send(self) -> None:
        """To where the results go; a log that cannot be sent is no reason to end a sweep."""
        if self.folder is not None:
            with suppress(RunError):
                self.folder.send(self.folder.log)

    @contextmanager
    def kept(self, folder: RunFolder, verb: str, tell: Callable[[Fact], None] | None = None) -> Iterator[None]:
        """Write the log while the block runs, behind what earlier attempts wrote, and how the block ended.

        `tell` lets others hear of beginning and end too, and this one with them.
        """
        tell = tell or self.hear
        start = time.perf_counter()
        with suppress(RunError):
            _fetch(folder)
        with _written(folder.log, self.ids["attempt"]):
            self.folder, waiting, self.waiting = folder, self.waiting or [], None
            for record in waiting:
                if LOGGER.isEnabledFor(record.levelno):
                    LOGGER.handle(record)
            tell(SweepBegins(verb, folder.public_address or str(folder.path)))
            reason = None
            try:
                yield
            except BaseException as error:
                self.exit, reason = _exit_code(error), f"{type(error).__name__}: {error}".removesuffix(": ")[:MOST_REASON]
                raise
            finally:
                tell(SweepEnds(self.exit, round(time.perf_counter() - start, 3), reason))
                self.send()

    def _line(self, fact: Fact) -> dict[str, Any]:
        """What is not known is left out."""
        facts = asdict(fact)
        if isinstance(fact, VariantsPlanned):
            facts = {"variants": len(fact.labels)}
        if "trial" not in facts and (label := self.labels.get(facts.get("variant", ""))) is not None:
            facts = {"label": label, **facts}
        return {**self.ids, **{name: _plain(value) for name, value in facts.items() if value not in (None, "")}}


def watched(recipe: AnyRecipe, watch: Watch | None) -> tuple[Stopwatch, Journal]:
    """A stopwatch whose facts the log and Ray's metrics hear beside the watch."""
    journal = Journal(recipe)
    return Stopwatch(Watches(watch or Silent(), (journal, Meters(recipe.name)))), journal


@contextmanager
def _written(path: Path, attempt: str) -> Iterator[None]:
    """The logger writes to a file, and passes on what a log is made of, whatever the program has told other loggers."""
    try:
        handler: logging.Handler = QuietFile(path)
    except OSError:  # whoever writes results next says what is wrong with the place
        handler = logging.NullHandler()
    handler.addFilter(lambda record: getattr(record, "facts", {}).get("attempt") == attempt)  # another sweep may run in a thread
    level, disabled = LOGGER.level, LOGGER.disabled
    LOGGER.addHandler(handler)
    LOGGER.disabled = False
    if level == logging.NOTSET:
        LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        handler.close()
        LOGGER.setLevel(level)
        LOGGER.disabled = disabled


def _fetch(folder: RunFolder) -> None:
    """The log as it is at the address of the run; more of it may be here, of an attempt that was killed before it sent it."""
    if folder.address is None:
        return
    here = folder.log.read_bytes() if folder.log.exists() else b""
    folder.fetch_present(folder.log)
    there = folder.log.read_bytes() if folder.log.exists() else b""
    if here.startswith(there):
        folder.log.write_bytes(here)


def _plain(value: Any) -> Any:
    """Texts without the passwords that an address in them may hold."""
    if isinstance(value, str):
        return redact(value)
    return [_plain(each) for each in value] if isinstance(value, (list, tuple)) else value


def _exit_code(error: BaseException) -> int:
    """What the command line makes of it."""
    if isinstance(error, Terminated):
        return Terminated.EXIT
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, TransplantError) else 1
