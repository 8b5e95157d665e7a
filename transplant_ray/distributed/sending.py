"""`submit`: from a recipe to a job that has been sent, and the person who waits for it."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transplant_ray.distributed.packing import (
    check_id,
    command_for,
    entrypoint,
    environment,
    metadata,
    pack,
    read_environment,
    read_resources,
    shown_results,
)
from transplant_ray.distributed.submission import INTERRUPTED, Jobs, Request, Told, exit_code, last_words
from transplant_ray.errors import JobError


@dataclass(frozen=True)
class Sent:
    """A job that the cluster has."""

    jobs: Jobs
    id: str
    results: str
    """Where it will write, as it may be shown."""


def send(
    recipe: Path,
    overrides: Sequence[str] = (),
    *,
    address: str | None = None,
    command: str | None = None,
    runtime_env: Path | None = None,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    resources: Sequence[str] = (),
    submission_id: str | None = None,
    python: str = "python",
    connect: Callable[[str | None], Jobs] = Jobs.at,
) -> Sent:
    """Submit a recipe of any kind; `command` is by default what it is for.

    Whatever can be refused here is refused before the cluster hears of it.
    """
    given = {} if runtime_env is None else read_environment(runtime_env)
    custom = read_resources(resources)
    with tempfile.TemporaryDirectory(prefix="transplant-ray-") as folder:
        packed = pack(recipe, overrides, Path(folder))
        verb = command_for(packed.recipe, command)
        id = check_id(submission_id or f"{packed.recipe.name}-{secrets.token_hex(4)}")
        request = Request(
            id=id,
            entrypoint=entrypoint(verb, python),
            runtime_env=environment(given, packed),
            metadata=metadata(packed.recipe, verb),
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            resources=custom,
        )
        jobs = connect(address)
        try:
            jobs.submit(request)
        except KeyboardInterrupt:
            raise JobError(
                f"interrupted while job {id} was on its way: `transplant-ray status {id}` tells whether it arrived."
            ) from None
    return Sent(jobs, id, shown_results(packed.recipe))


def attend(
    jobs: Jobs, id: str, write: Callable[[str], object], ask: Callable[[str], bool | None], say: Callable[[str], object]
) -> int:
    """Follow a job until it ends; returns the exit code for the shell.

    Ctrl-C asks whether to stop it. `ask` answers yes, no (go on), or None where there is no answer: Ctrl-C again, or nobody there.
    Then the job goes on alone, for it may be days of work.
    """
    told = Told(write)
    while True:
        try:
            job = jobs.follow(id, told)
            say(last_words(job))
            return exit_code(job)
        except KeyboardInterrupt:
            try:
                wanted = ask(f"Stop job {id}? (no: go on showing its log; Ctrl-C again: leave it running)")
                if wanted:
                    job = jobs.stop(id)
                    say(last_words(job))
                    return INTERRUPTED if job.status == "STOPPED" else exit_code(job)
            except KeyboardInterrupt:
                wanted = None
            if wanted is None:
                say(f"job {id} is left to itself: `transplant-ray logs {id} --follow` shows it, `transplant-ray stop {id}` ends it")
                return INTERRUPTED
