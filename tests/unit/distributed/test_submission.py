"""The job client without a cluster: exit codes, a log that is told once, Ctrl-C, and what a head may answer."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
import yaml
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobType

from transplant_ray.distributed import submission
from transplant_ray.distributed.sending import attend, send
from transplant_ray.distributed.submission import Jobs, Request, Told, exit_code, last_words
from transplant_ray.errors import JobError, RecipeError


def job(status: str = "RUNNING", code: int | None = None, **facts: Any) -> JobDetails:
    facts = {"submission_id": "one", "entrypoint": "true", "type": JobType.SUBMISSION, **facts}
    return JobDetails(status=JobStatus(status), driver_exit_code=code, **facts)


@dataclass
class Head:
    """Stands for Ray's job client; it answers as a head would, or raises what stands in `troubles` first."""

    jobs: dict[str, JobDetails] = field(default_factory=lambda: {"one": job()})
    log: str = "first line\nsecond line\n"
    tails: list[Any] = field(default_factory=list)
    """For each attempt to follow: pieces of the log, or what is raised between them."""
    troubles: list[Exception] = field(default_factory=list)
    stopped: list[str] = field(default_factory=list)
    ends: tuple[str, int | None] = ("SUCCEEDED", 0)
    requests: list[dict[str, Any]] = field(default_factory=list)

    async def tail_job_logs(self, id: str) -> AsyncIterator[str]:
        for piece in self.tails.pop(0) if self.tails else [self.log]:
            if not isinstance(piece, str):
                raise piece
            yield piece
        self.jobs[id] = job(*self.ends)

    def get_job_info(self, id: str) -> JobDetails:
        if self.troubles:
            raise self.troubles.pop(0)
        if id not in self.jobs:
            raise RuntimeError(f"Request failed with status code 404: Job {id} does not exist.")
        return self.jobs[id]

    def get_job_logs(self, id: str) -> str:
        return self.log if self.jobs[id].status.is_terminal() else ""

    def list_jobs(self) -> list[JobDetails]:
        if self.troubles:
            raise self.troubles.pop(0)
        return list(self.jobs.values())

    def stop_job(self, id: str) -> bool:
        self.stopped.append(id)
        self.jobs[id] = job("STOPPED")
        return True

    def submit_job(self, **request: Any) -> str:
        if self.troubles:
            raise self.troubles.pop(0)
        self.requests.append(request)
        return str(request["submission_id"])


def at(head: Head) -> Jobs:
    return Jobs(head, "http://head:8265", sleep=lambda _: None)


def never(_: str) -> bool | None:
    raise AssertionError("nobody was to be asked")


def interrupted() -> list[Any]:
    return ["first line\n", KeyboardInterrupt()]


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0), ("FAILED", 1, 1), ("FAILED", 2, 2), ("FAILED", 137, 137), ("FAILED", -9, 137), ("FAILED", None, 2),
        ("STOPPED", None, 143), ("STOPPED", -15, 143),
    ],
)  # fmt: skip
def test_the_exit_code_is_what_a_shell_would_say(status: str, code: int | None, expected: int) -> None:
    assert exit_code(job(status, code)) == expected


def test_a_job_whose_command_never_ran_says_why_without_passwords() -> None:
    words = last_words(job("FAILED", message="pip failed: http://me:hush@index/simple"))
    assert "before its command ran: pip failed: http://index/simple" in words


def test_a_log_that_is_told_again_from_its_beginning_is_written_once() -> None:
    out = io.StringIO()
    told = Told(out.write)
    for tale in (["ab", "cd"], ["a", "bcde", "f"], ["abcdefg"], ["abc"]):
        told.restart()
        for piece in tale:
            told.hear(piece)
    assert out.getvalue() == "abcdefg"


def test_a_job_is_followed_over_broken_connections_and_a_head_that_is_away() -> None:
    head = Head(tails=[["first ", RuntimeError("WebSocket connection closed unexpectedly")], ["first line\nsec", OSError("reset")]])
    out, jobs = io.StringIO(), at(head)
    real = head.get_job_info
    away = iter([None, requests.ConnectionError("away"), RuntimeError("Request failed with status code 503: busy."), *[None] * 9])

    def info(id: str) -> JobDetails:
        if (trouble := next(away)) is not None:
            raise trouble
        return real(id)

    head.get_job_info = info  # type: ignore[method-assign]
    assert jobs.follow("one", Told(out.write)).status == "SUCCEEDED"
    assert out.getvalue() == head.log


def test_a_log_that_is_not_there_yet_does_not_end_the_following() -> None:
    head, out = Head(tails=[[RuntimeError("no log")]]), io.StringIO()
    logs = head.get_job_logs

    def not_yet(id: str) -> str:
        if not head.jobs[id].status.is_terminal():
            raise RuntimeError("Request failed with status code 500: no log")
        return logs(id)

    head.get_job_logs = not_yet  # type: ignore[method-assign]
    assert at(head).follow("one", Told(out.write)).status == "SUCCEEDED"
    assert out.getvalue() == head.log


def test_a_head_that_stays_away_ends_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    head = Head(tails=[[requests.ConnectionError("away")]])
    jobs = at(head)
    monkeypatch.setattr(submission, "LOST_SECONDS", 3)
    jobs.one("one")
    head.troubles = [requests.ConnectionError("away")] * 9
    with pytest.raises(JobError, match=r"http://head:8265 cannot be reached \(away\)"):
        jobs.follow("one", Told(print))


@pytest.mark.parametrize("status", ["SUCCEEDED", "FAILED"])
def test_a_job_that_ends_by_itself_asks_nothing(status: str) -> None:
    head = Head(ends=(status, 1 if status == "FAILED" else 0))
    out, said = io.StringIO(), list[str]()
    assert attend(at(head), "one", out.write, never, said.append) == (status == "FAILED")
    assert out.getvalue() == head.log
    assert status in said[-1]


def test_ctrl_c_and_yes_stops_the_job() -> None:
    head, said = Head(tails=[interrupted()]), list[str]()
    assert attend(at(head), "one", io.StringIO().write, lambda _: True, said.append) == 130
    assert head.stopped == ["one"]
    assert "STOPPED" in said[-1]


def test_ctrl_c_and_no_goes_on_where_the_log_was() -> None:
    head, out = Head(tails=[interrupted()]), io.StringIO()
    assert attend(at(head), "one", out.write, lambda _: False, lambda _: None) == 0
    assert (head.stopped, out.getvalue()) == ([], head.log)


def asked_twice(_: str) -> bool | None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("ask", [asked_twice, lambda _: None], ids=["ctrl-c again", "nobody there"])
def test_without_an_answer_the_job_is_left_running(ask: Callable[[str], bool | None]) -> None:
    head, said = Head(tails=[interrupted()]), list[str]()
    assert attend(at(head), "one", io.StringIO().write, ask, said.append) == 130
    assert head.stopped == []
    assert "transplant-ray stop one" in said[-1]


def test_a_job_that_ended_while_one_thought_about_it_keeps_its_exit_code() -> None:
    head = Head(tails=[interrupted()])

    def ask(_: str) -> bool:
        head.jobs["one"] = job("FAILED", 1)
        head.stop_job = lambda _: False  # type: ignore[method-assign,assignment]
        return True

    assert attend(at(head), "one", io.StringIO().write, ask, lambda _: None) == 1


def test_an_unknown_id_is_told_with_the_nearest() -> None:
    head = Head(jobs={"tiny-1234": job(submission_id="tiny-1234"), "other": job(submission_id="other")})
    for call in (at(head).one, at(head).log, at(head).stop, lambda id: at(head).follow(id, Told(print))):
        with pytest.raises(JobError, match=r"has no job 'tiny-1243'. Did you mean tiny-1234\?"):
            call("tiny-1243")
    assert head.stopped == []
    with pytest.raises(JobError, match="It has had no jobs yet"):
        at(Head(jobs={})).one("one")


@pytest.mark.parametrize("id", ["../version", "one/stop", "one?x"])
def test_an_id_that_would_be_another_address_is_never_sent(id: str) -> None:
    with pytest.raises(JobError, match="no submission id"):
        at(Head(troubles=[AssertionError("sent")])).stop(id)


def bad_answer() -> Exception:
    return requests.exceptions.JSONDecodeError("Expecting value", "<html>", 0)


@pytest.mark.parametrize(
    ("trouble", "mode", "words"),
    [
        (
            AuthenticationError("Authentication required: Unauthorized: Missing authentication token"),
            "",
            "Set RAY_AUTH_MODE=token, and",
        ),
        (
            AuthenticationError("Authentication failed: Forbidden: Invalid authentication token"),
            "token",
            "is another cluster's, or old",
        ),
        (
            AuthenticationError("Token authentication is enabled but no authentication token was found"),
            "token",
            "None was found: put",
        ),
        (
            ConnectionError("Failed to connect"),
            "token",
            "cannot be reached .* --address http://HEAD:8265 or RAY_API_SERVER_ADDRESS",
        ),
        (requests.ConnectTimeout("timed out"), "token", "cannot be reached"),
        (RuntimeError("Version check returned 404. Jobs API is not supported"), "token", r"takes no jobs .*ray\[default\]"),
        (RuntimeError("Request failed with status code 404: Not Found"), "token", "takes no jobs"),
        (bad_answer(), "token", "takes no jobs"),
        (
            RuntimeError("Request failed with status code 500: Traceback\n  x\nValueError: see http://me:hush@db/404"),
            "token",
            "refused: Val",
        ),
    ],
)
def test_what_a_head_answers_is_explained_with_the_next_step(
    monkeypatch: pytest.MonkeyPatch, trouble: Exception, mode: str, words: str
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    with pytest.raises(JobError, match=words) as caught:
        at(Head(troubles=[trouble])).all()
    assert "hush" not in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_jobs_that_were_not_submitted_are_not_listed_and_the_last_comes_first() -> None:
    listed = {"a": job(start_time=1, submission_id="a"), "b": job(start_time=2, submission_id="b"), "c": job(type=JobType.DRIVER)}
    assert [each.submission_id for each in at(Head(jobs=listed)).all()] == ["b", "a"]


def test_what_was_typed_counts_more_than_rays_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def client(place: str, headers: Any) -> Any:
        asked.append((place, submission.os.environ.get("RAY_ADDRESS"), headers))
        return SimpleNamespace(get_address=lambda: place)

    monkeypatch.setattr(submission, "JobSubmissionClient", client)
    monkeypatch.setattr(submission, "_reach", lambda _: None)
    monkeypatch.setenv("RAY_ADDRESS", "http://second:8265")
    monkeypatch.setenv("RAY_JOB_HEADERS", '{"Cookie": "c"}')
    assert Jobs.at("http://me:hush@typed:8265").address == "http://typed:8265"
    assert Jobs.at(None).address == "http://second:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://first:8265")
    assert Jobs.at(None).address == "http://first:8265"
    assert asked[0] == ("http://me:hush@typed:8265", None, {"Cookie": "c"})
    assert submission.os.environ["RAY_ADDRESS"] == "http://second:8265"


@pytest.mark.parametrize("address", ["htp://head:8265", "file:///etc", "os://x", "http://head:port"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(JobError):
        Jobs.at(address)


@pytest.mark.parametrize("password", ["opensesame#1", "opensesame/1", "opensesame?1", "[opensesame", "opensesame\u2100"])
@pytest.mark.parametrize("start", ["http://", "", "ray://"])
def test_an_address_that_cannot_be_read_is_refused_without_its_password(password: str, start: str) -> None:
    with pytest.raises(JobError, match=r"head:8265 cannot be read as an address") as caught:
        Jobs.at(f"{start}me:{password}@head:8265")
    assert "sesame" not in str(caught.value)


def test_a_password_that_is_read_as_a_path_is_not_told_where_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    def client(address: str, **_: Any) -> None:
        raise requests.ConnectionError(f"Max retries exceeded with url: {address.partition('8265')[2]}/api/version")

    monkeypatch.setattr(submission, "JobSubmissionClient", client)
    monkeypatch.setattr(submission, "_reach", lambda _: None)
    with pytest.raises(JobError, match="http://head:8265 cannot be reached") as caught:
        Jobs.at("http://me:8265/sesame@head:8265")
    assert "sesame" not in str(caught.value)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text('{"p": "1", "a": "2"}\n')
    settings = {
        "name": "tiny", "source": {"model": "zoo:siblings/source"}, "target": {"model": "zoo:siblings/target"},
        "task": {"data": "rows.jsonl", "prompt": "{p}", "answer": "{a}", "max_new_tokens": 4},
        "sweep": {"k": [1], "kind": ["all"]}, "storage": "/shared/runs", "tracking": {"uri": "http://me:hush@mlflow:5000"},
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_what_is_sent_is_what_was_asked_for_and_shows_no_password(recipe: Path) -> None:
    head = Head()
    sent = send(recipe, ["sweep.k=[2]"], command="rank", num_cpus=2, num_gpus=0.5, resources=["head=1"], connect=lambda _: at(head))
    (request,) = head.requests
    assert request["submission_id"] == sent.id
    assert sent.id.startswith("tiny-")
    assert request["entrypoint"] == "python -m transplant_ray.cli rank recipe.yaml"
    assert (request["entrypoint_num_cpus"], request["entrypoint_num_gpus"]) == (2, 0.5)
    assert request["entrypoint_resources"] == {"head": 1}
    assert sent.results == request["metadata"]["results"] == "/shared/runs/tiny"
    assert "hush" not in str(request)
    assert not Path(request["runtime_env"]["working_dir"]).exists()  # nothing stays behind here


def test_an_organ_recipe_is_sent_with_its_own_command_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("what it says")
    settings = {
        "name": "organs", "recipient": {"model": "org/model"}, "organs": {"a": "/shared/organ"}, "storage": "/shared/runs",
        "domain": {"data": "text.txt"}, "general": {"data": "text.txt"}, "tracking": {"uri": "http://mlflow:5000"},
    }  # fmt: skip
    path, head = tmp_path / "recipe.yaml", Head()
    path.write_text(yaml.safe_dump(settings))
    send(path, connect=lambda _: at(head))
    assert head.requests[0]["entrypoint"] == "python -m transplant_ray.cli organ sweep recipe.yaml"
    assert head.requests[0]["metadata"]["command"] == "organ sweep"
    for wrong in ("sweep", "organ compare"):
        with pytest.raises(JobError, match="organs is a recipe for organ sweep"):
            send(path, command=wrong, connect=lambda _: at(head))
    assert len(head.requests) == 1


def test_two_submissions_of_one_recipe_have_ids_of_their_own(recipe: Path) -> None:
    head = Head()
    assert send(recipe, connect=lambda _: at(head)).id != send(recipe, connect=lambda _: at(head)).id


def test_an_id_that_is_taken_is_refused_before_anything_is_uploaded(recipe: Path) -> None:
    head = Head()
    with pytest.raises(JobError, match="has a job 'one' already"):
        send(recipe, submission_id="one", connect=lambda _: at(head))
    assert head.requests == []


def test_nothing_is_sent_of_what_is_wrong(recipe: Path) -> None:
    def connect(_: str | None) -> Jobs:
        raise AssertionError("the cluster was asked")

    with pytest.raises(RecipeError, match="relative path 'runs'"):
        send(recipe, ["storage=runs"], connect=connect)
    with pytest.raises(JobError, match="no such command"):
        send(recipe, command="rm", connect=connect)
    with pytest.raises(JobError, match="no submission id"):
        send(recipe, submission_id="../x", connect=connect)


def test_ctrl_c_while_the_job_is_on_its_way_tells_how_to_find_it(recipe: Path) -> None:
    head = Head()
    head.submit_job = lambda **_: asked_twice("")  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(JobError, match="`transplant-ray status mine` tells whether it arrived"):
        send(recipe, submission_id="mine", connect=lambda _: at(head))


def test_a_request_does_not_show_its_variables() -> None:
    assert "hush" not in repr(Request("one", "true", {"env_vars": {"TOKEN": "hush"}}, {}))
