"""Jobs on a Ray cluster, through its job client: send one, look at it, follow its log, stop it.

The cluster's token is Ray's own business: its client reads it where RAY_AUTH_MODE=token says so, and sends it with every request.
"""

from __future__ import annotations

import asyncio
import difflib
import json
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, urlsplit
from urllib.request import getproxies

from aiohttp import ClientError
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobDetails, JobSubmissionClient, JobType
from requests import RequestException

from transplant_ray.distributed.packing import check_id
from transplant_ray.errors import JobError
from transplant_ray.recipe import redact, redact_address

ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Ray's own, in its order; the first wins over every argument of its client."""
AUTH_MODE = "RAY_AUTH_MODE"
HEADERS = "RAY_JOB_HEADERS"
REACH_SECONDS = 10
LOST_SECONDS = 120
"""How long a head may be away while a job is followed: time to restart it."""
POLL_SECONDS = 1.0
INTERRUPTED, TERMINATED = 130, 143
"""What shells make of SIGINT and SIGTERM."""

for _chatty in ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env.packaging"):
    logging.getLogger(_chatty).setLevel(logging.WARNING)  # they say each upload and each connection, in the midst of a job's log

_TROUBLES = (RequestException, ClientError, OSError, RayError, RuntimeError, ValueError)
"""What Ray's client lets out: no answer, a connection that breaks off, an answer that says no, an answer that is none."""


@dataclass(frozen=True)
class Request:
    """A job to be."""

    id: str
    entrypoint: str
    runtime_env: dict[str, Any] = field(repr=False)  # its variables may be secrets
    metadata: dict[str, str]
    num_cpus: float | None = None
    num_gpus: float | None = None
    resources: dict[str, float] | None = None


@dataclass(frozen=True)
class Jobs:
    """The jobs of one cluster. Every method raises JobError, with what to do next."""

    client: Any
    """Ray's JobSubmissionClient."""
    address: str
    """As it may be shown."""
    sleep: Callable[[float], None] = time.sleep

    @classmethod
    def at(cls, address: str | None) -> Jobs:
        """The cluster at an address, or at the one that Ray's variables name, or the one on this machine."""
        place = address or next((os.environ[name] for name in ADDRESS_VARIABLES if os.environ.get(name)), None)
        known = place if place is None or "//" in place else f"//{place}"  # by which a password is found
        shown = redact_address(known or "this machine").removeprefix("//")
        _check_address(place, shown)
        with _explained(shown, known or ""), _without_variables():
            _reach(place)
            client = JobSubmissionClient(place, headers=_headers())
        return cls(client, redact_address(client.get_address()))

    def submit(self, request: Request) -> None:
        """Upload what the job needs, and start it."""
        with _explained(self.address):
            if request.id in self._ids():
                raise JobError(f"{self.address} has a job {request.id!r} already. Give another --submission-id, or none.")
            self.client.submit_job(
                entrypoint=request.entrypoint,
                submission_id=request.id,
                runtime_env=request.runtime_env,
                metadata=request.metadata,
                entrypoint_num_cpus=request.num_cpus,
                entrypoint_num_gpus=request.num_gpus,
                entrypoint_resources=request.resources or None,
            )

    def all(self) -> list[JobDetails]:
        """Every job that was submitted, the last first."""
        with _explained(self.address):
            jobs = [job for job in self.client.list_jobs() if job.type == JobType.SUBMISSION]
        return sorted(jobs, key=lambda job: job.start_time or 0, reverse=True)

    def one(self, id: str) -> JobDetails:
        with _explained(self.address):
            try:
                job: JobDetails = self.client.get_job_info(check_id(id))
                return job
            except RuntimeError as error:
                if not _is_status(error, "404"):
                    raise
        raise JobError(self._missing(id))

    def log(self, id: str) -> str:
        """All that the job has said."""
        self.one(id)
        with _explained(self.address):
            log: str = self.client.get_job_logs(id)
        return log

    def follow(self, id: str, told: Told) -> JobDetails:
        """Tell what the job says until it has ended. A connection that breaks off is made again."""
        self.one(id)
        while True:
            with suppress(*_TROUBLES):  # the job goes on, and so do we: asked below, the head explains itself
                asyncio.run(_tail(self.client, id, told))
            job = self._patiently(id)
            with suppress(*_TROUBLES):  # of a job that waits for its resources there is no log yet
                told.again(self.client.get_job_logs(id))  # what a proxy without websockets held back
            if job.status.is_terminal():
                return job
            self.sleep(POLL_SECONDS)

    def stop(self, id: str) -> JobDetails:
        """Ask the job to end, and wait until it has: it gets SIGTERM, and SIGKILL where that does not help."""
        self.one(id)
        with _explained(self.address):
            self.client.stop_job(id)
        while not (job := self._patiently(id)).status.is_terminal():
            self.sleep(POLL_SECONDS)
        return job

    def _patiently(self, id: str) -> JobDetails:
        """The job, of a head that may be away for a while."""
        for _ in range(int(LOST_SECONDS / POLL_SECONDS)):
            try:
                job: JobDetails = self.client.get_job_info(id)
                return job
            except _TROUBLES as error:
                if not isinstance(error, (RequestException, OSError)) and not _is_status(error, "5.."):
                    break
            self.sleep(POLL_SECONDS)
        return self.one(id)

    def _ids(self) -> list[str]:
        return [str(job.submission_id) for job in self.all()]

    def _missing(self, id: str) -> str:
        ids = self._ids()
        near = difflib.get_close_matches(id, ids, n=2, cutoff=0.5) or ids[:2]
        known = f"Did you mean {' or '.join(near)}?" if near else "It has had no jobs yet."
        return f"{self.address} has no job {id!r}. {known} `transplant-ray status` lists all; a new head starts with none."


def exit_code(job: JobDetails) -> int:
    """What a shell would say of the job's command."""
    if job.status == "SUCCEEDED":
        return 0
    if job.status == "STOPPED":
        return TERMINATED
    code = job.driver_exit_code or 2  # none where it never started
    return code if code > 0 else 128 - code


def last_words(job: JobDetails) -> str:
    """How a job ended, where its log may not say."""
    if job.status == "FAILED" and job.driver_exit_code is None:
        return f"job {job.submission_id} failed before its command ran: {redact(job.message or 'Ray does not say why')}"
    code = "" if job.driver_exit_code is None else f", exit code {job.driver_exit_code}"
    return f"job {job.submission_id}: {job.status}{code}"


class Told:
    """A log that is told from its beginning, perhaps several times: every character is written once."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self.write = write
        self.written = self.heard = 0

    def restart(self) -> None:
        self.heard = 0

    def hear(self, text: str) -> None:
        self.heard += len(text)
        if self.heard > self.written:
            self.write(text[self.written - self.heard :])
            self.written = self.heard

    def again(self, log: str) -> None:
        self.restart()
        self.hear(log)


async def _tail(client: Any, id: str, told: Told) -> None:
    told.restart()
    async for text in client.tail_job_logs(id):
        told.hear(text)


def _check_address(place: str | None, shown: str) -> None:
    scheme, separator, _ = (place or "").partition("://")
    if separator and scheme not in ("http", "https", "ray"):
        raise JobError(f"{shown}: {scheme}:// is no address of a head. Give http://HEAD:8265, where Ray's dashboard is.")
    try:
        _ = _split(place or "").port
    except ValueError:  # which quotes what stands where the port should be, and so perhaps a password
        raise JobError(
            f"{shown} cannot be read as an address. Give http://HEAD:8265, where Ray's dashboard is; in a password write what is "
            "neither letter nor digit as %23 (#), %2F (/), %3F (?) or %40 (@)."
        ) from None


def _split(place: str) -> SplitResult:
    return urlsplit(place if "://" in place else f"http://{place}")


def _reach(place: str | None) -> None:
    """Ask briefly before Ray's client does, which would wait minutes for a machine that is not there."""
    if place is None or place == "auto" or getproxies():
        return
    parts = _split(place)
    port = parts.port or {"https": 443, "ray": 10001}.get(parts.scheme, 80)
    socket.create_connection((parts.hostname or "", port), REACH_SECONDS).close()


@contextmanager
def _without_variables() -> Iterator[None]:
    """Ray's client reads its variables before its argument; what was typed should count more."""
    before = {name: os.environ.pop(name, None) for name in ADDRESS_VARIABLES}
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _headers() -> dict[str, Any] | None:
    """What `ray job` sends too, for a proxy in front of the head."""
    if HEADERS not in os.environ:
        return None
    try:
        headers = json.loads(os.environ[HEADERS])
    except ValueError:
        headers = None
    if not isinstance(headers, dict):
        raise JobError(f'{HEADERS} is not a JSON object; expected one such as {{"Cookie": "…"}}.')
    return headers


@contextmanager
def _explained(address: str, known: str = "") -> Iterator[None]:
    """What Ray's client lets out, in our words. No message holds a token: neither Ray's nor ours quote one.

    `known` is the address as it was typed; what a message says of it may be a piece of a password.
    """
    try:
        yield
    except AuthenticationError as error:
        raise JobError(f"{address} wants its token. {_token_advice(str(error))}") from None
    except (RequestException, OSError, ClientError, RayError) as error:
        if getattr(error, "response", None) is not None or isinstance(error, ValueError):
            raise JobError(_no_jobs(address, redact(str(error), known))) from None
        raise JobError(
            f"{address} cannot be reached ({_short(error, known)}). Give the head's dashboard with --address http://HEAD:8265 or "
            f"{ADDRESS_VARIABLES[0]}; where it listens on loopback only, forward the port: ssh -L 8265:127.0.0.1:8265 HEAD."
        ) from None
    except RuntimeError as error:
        if _is_status(error, "404"):
            raise JobError(_no_jobs(address, "no job interface there")) from None
        raise JobError(f"{address} refused: {_short(error, known)}.") from None
    except (ValueError, TypeError) as error:
        raise JobError(f"{address}: {_short(error, known)}. Is it the address of a head, and does --runtime-env fit Ray?") from None


def _token_advice(message: str) -> str:
    if os.environ.get(AUTH_MODE, "").lower() != "token":
        return (
            f"Set {AUTH_MODE}=token, and put what `ray get-auth-token` prints on the head into ~/.ray/auth_token, or set "
            "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH."
        )
    if "invalid" in message.lower():
        return "The one that was sent is another cluster's, or old: take what `ray get-auth-token` prints on the head."
    return "None was found: put what `ray get-auth-token` prints on the head into ~/.ray/auth_token, or set RAY_AUTH_TOKEN_PATH."


def _no_jobs(address: str, why: str) -> str:
    return (
        f"{address} answers, but takes no jobs ({why}). Is it the dashboard of a Ray head (port 8265 as a rule)? The head needs "
        "`pip install 'ray[default]'` and must be started with its dashboard."
    )


def _is_status(error: Exception, status: str) -> bool:
    """Whether the head answered with this HTTP status, which Ray's client has in words only."""
    return isinstance(error, RuntimeError) and re.match(rf"[^:]*(status code|returned) {status}\b", str(error)) is not None


def _short(error: Exception, known: str) -> str:
    """The last line of what may be a traceback of the head, without credentials."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()] or [type(error).__name__]
    return redact(re.sub(r"\s+", " ", lines[-1]), known)[:500].rstrip(".")
