"""Helpers of the integration tests: the pair, its recipe, the command line in this process, and a slow plain reference."""

from __future__ import annotations

import io
import json
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import requests
import torch
from ray.job_submission import JobSubmissionClient
from ray.util.state import list_nodes
from tiny import EOS, tiny_model, tiny_tokenizer, write_recipe, write_task
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from transplant_ray import cli

REPOSITORY = Path(__file__).parents[2]
NUM_ROWS = 90
MAX_NEW_TOKENS = 4
SPLIT = {"probe": 8, "select": 40, "test": 30, "seed": 1}
RESULT_COLUMNS = [
    "variant", "role", "ranker", "kind", "k", "alpha", "seed", "split", "n", "correct", "accuracy", "ci_low", "ci_high", "tir",
    "recovery", "num_modules", "num_parameters", "seconds", "winner", "error",
    "loss", "stopped", "channels", "penalty", "size", "parsed", "cut_off", "moved", "kl", "guard_share", "score", "worth",
    "worth_error", "vetoed_by",
]  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A folder with the pair, `answers.jsonl` and a recipe."""

    path: Path
    uri: str
    """Address of the database that all tests share: making one takes 9 seconds."""

    def copy(self, to: Path, uri: str | None = None) -> Place:
        """The pair and its task once more, to be spoiled."""
        for name in ("source", "target"):
            shutil.copytree(self.path / name, to / name)
        shutil.copy(self.path / "answers.jsonl", to)
        return Place(to, uri or self.uri)

    @property
    def task(self) -> dict[str, Any]:
        return {
            "data": str(self.path / "answers.jsonl"), "prompt": "{prompt}", "answer": "{answer}",
            "max_new_tokens": MAX_NEW_TOKENS, "split": SPLIT,
        }  # fmt: skip

    def recipe(self, **changes: Any) -> Path:
        """Write the recipe, with other top-level keys; returns its path."""
        settings = {
            "task": self.task,
            "sweep": {"k": [2, 6, 16], "kind": ["attn", "all"]},
            "tracking": {"uri": self.uri},
        }
        return write_recipe(self.path, **{**settings, **changes})


@dataclass(frozen=True)
class Finished:
    """What a command said, and its exit code."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Swept:
    """A finished sweep."""

    folder: Path
    place: Place
    finished: Finished

    @property
    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.folder / "summary.json").read_text())
        return summary

    @property
    def results(self) -> pd.DataFrame:
        return read_results(self.folder)


@dataclass(frozen=True)
class Job:
    """A submitted job that has ended."""

    code: int
    log: str


@dataclass(frozen=True)
class Head:
    """A Ray that takes jobs."""

    client: JobSubmissionClient
    port: int

    def run(self, script: str, *argv: object) -> Job:
        """`ray job submit` of `jobs/<script>.py` as the README says, with `jobs` alone as working directory, to its end."""
        id = f"{script}-{secrets.token_hex(4)}"
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(REPOSITORY / "jobs", Path(folder) / "jobs", ignore=shutil.ignore_patterns("__pycache__"))
            address = ["--address", self.client.get_address(), "--working-dir", folder, "--submission-id", id]
            command = [str(Path(sys.executable).with_name("ray")), "job", "submit", *address, "--", sys.executable]
            sent = subprocess.run([*command, f"jobs/{script}.py", *map(str, argv)], capture_output=True, text=True)
        code = self.client.get_job_info(id).driver_exit_code
        assert (sent.returncode == 0) == (code == 0), sent.stderr
        return Job(code, self.client.get_job_logs(id))

    @contextmanager
    def joined(self, **resources: float) -> Iterator[str]:
        """For the block one more node, with no CPU but these resources; gives its id.

        It has a folder of its own, as a machine has: in the head's, each would replace the working directory of the other's jobs.
        """
        before, folder = self.nodes(), tempfile.mkdtemp(prefix="ray-", dir="/tmp")
        command = [Path(sys.executable).with_name("ray"), "start", "--block", f"--address=127.0.0.1:{self.port}", "--num-cpus=0"]
        command += [f"--resources={json.dumps(resources)}", f"--dashboard-agent-listen-port={free_port()}", f"--temp-dir={folder}"]
        with tempfile.TemporaryFile() as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_until(lambda: len(self.nodes() - before) == 1, process)
            (node,) = self.nodes() - before
            yield node
        finally:
            process.terminate()  # it stops what it started
            process.wait(60)
            shutil.rmtree(folder, ignore_errors=True)

    def nodes(self) -> set[str]:
        address = self.client.get_address()
        return {node.node_id for node in list_nodes(address, filters=[("state", "=", "ALIVE")])}


def run_main(*argv: object) -> Finished:
    """The command line in this process, through the entry point that the console script calls."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with patch.object(sys, "argv", ["transplant-ray", *map(str, argv)]), redirect_stdout(out), redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return Finished(code, out.getvalue(), err.getvalue())


def read_results(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "results.parquet")


def timeless(results: pd.DataFrame) -> pd.DataFrame:
    """A results table without what differs from run to run."""
    return results.drop(columns="seconds")


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def weight_bytes(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in folder_bytes(folder).items() if name.endswith(".safetensors")}


def related_pair(folder: Path, family: str = "llama") -> None:
    """A target, and a source that is the target with every linear map a step away: all swapped is the source itself."""
    target, source, other = tiny_model(family, 2), tiny_model(family, 2), tiny_model(family, 1)
    with torch.no_grad():
        for (name, ours), theirs in zip(source.named_parameters(), other.parameters(), strict=True):
            if ".layers." in name and ours.dim() > 1:
                ours.lerp_(theirs, 0.2)
    for model, name in ((source, "source"), (target, "target")):
        model.save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    _write_answers(folder, source, target)


def plain_completion(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """What a model says by itself: one prompt, no padding, no cache, one argmax after another."""
    ids = list(tokenizer(prompt)["input_ids"])
    new: list[int] = []
    with torch.inference_mode():
        while len(new) < MAX_NEW_TOKENS and EOS not in new:
            new.append(int(model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax()))
    text: str = tokenizer.decode(new, skip_special_tokens=True)
    return text


def _write_answers(folder: Path, source: PreTrainedModel, target: PreTrainedModel) -> None:
    """A task whose answers are the source's own, every fifth the target's: accuracies are neither 0 nor 1."""
    prompts = [json.loads(line)["prompt"] for line in write_task(folder / "sums.jsonl", 2 * NUM_ROWS).read_text().splitlines()]
    rows: list[dict[str, str]] = []
    for prompt in prompts:
        speaker = target if len(rows) % 5 == 0 else source
        answer = plain_completion(speaker, tiny_tokenizer(), prompt).strip()
        if answer and len(rows) < NUM_ROWS:
            rows.append({"prompt": prompt, "answer": answer})
    (folder / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_source_overflow(folder: Path) -> None:
    """Make layer 0's down projection enormous but finite, and silent in the source itself, whose up projection becomes zero.

    A variant that takes the one without the other has NaN logits; the source, and all swapped, are well. The task is again the
    source's own, for without a gap test stays shut.
    """
    model, target = (AutoModelForCausalLM.from_pretrained(folder / name) for name in ("source", "target"))
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight.data.zero_()
    mlp.down_proj.weight.data.fill_(3e38)
    model.save_pretrained(folder / "source")
    _write_answers(folder, model, target)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 240) -> None:
    """Until `ready`, which may raise while nobody listens; fails at once where the process ends."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, f"{process.args} ended with {process.returncode}"
        try:
            if ready():
                return
        except (requests.RequestException, OSError):
            pass
        time.sleep(0.2)
    raise AssertionError(f"{process.args} was not ready within {seconds:g} seconds")
