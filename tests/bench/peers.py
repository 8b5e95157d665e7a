"""One variant the way it is done today: `mergekit-yaml` writes a checkpoint, `lm_eval` loads and evaluates it."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
import yaml
from measure import seconds_of
from safetensors.torch import load_file

from transplant_ray.evaluate.task import load_task
from transplant_ray.graft.mergekit import variant_yaml
from transplant_ray.graft.variant import Variant
from transplant_ray.pipeline.job import Job

PINS = "torch==2.13.0 transformers==5.23.0 mergekit==0.1.5 lm_eval==0.4.13"
HOW_TO_MAKE = f"skipped: no peers. `python3 -m venv VENV && VENV/bin/pip install {PINS}`, then `--peers VENV`"
MODEL = "pretrained=merged,dtype=float32,add_bos_token=True"
MERGE = "mergekit-yaml merge.yml merged --quiet"
EVALUATE = (
    f"lm_eval run --model hf --model_args {MODEL} --device cpu --batch_size 64 --tasks lost --include_path tasks --output_path out"
)
TASK = {
    "task": "lost",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "examples.jsonl"}},
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}


@dataclass(frozen=True)
class Peers:
    """`folder` takes what the peers read and write for one variant; `venv` has both of them."""

    venv: Path
    folder: Path

    def prepare(self, job: Job, variant: Variant) -> None:
        rows = [json.dumps({"prompt": e.prompt, "answer": e.answer}) for e in load_task(job.recipe.task).select]
        limits = {"until": ["</s>"], "max_gen_toks": job.generation.max_new_tokens, "do_sample": False}
        (self.folder / "tasks").mkdir()
        (self.folder / "examples.jsonl").write_text("\n".join(rows))
        (self.folder / "merge.yml").write_text(variant_yaml(job.comparison, variant))
        (self.folder / "tasks" / "lost.yaml").write_text(yaml.safe_dump({**TASK, "generation_kwargs": limits}))

    def round(self) -> tuple[float, float]:
        """Seconds of both commands, as a user types them, start-up included."""
        return seconds_of(partial(self._run, MERGE)), seconds_of(partial(self._run, EVALUATE))

    def without_start(self, rounds: int) -> tuple[float, float]:
        """Medians of the same work in one process that has everything imported; a first round is not counted."""
        printed = self._run(f"python {Path(__file__).with_name('peers_loop.py')} lost {MODEL} {rounds + 1}")
        merges, evaluations = zip(*json.loads(printed.splitlines()[-1])[1:], strict=True)
        return median(merges), median(evaluations)

    def accuracy(self) -> float:
        report = max((self.folder / "out").rglob("results_*.json"))
        return float(json.loads(report.read_text())["results"]["lost"]["exact_match,none"])

    def check_same_weights(self, checkpoint: Path) -> None:
        """RuntimeError where one tensor differs from `checkpoint`'s: only the same variant may be compared."""
        theirs, ours = load_file(next((self.folder / "merged").glob("*.safetensors"))), load_file(checkpoint / "model.safetensors")
        if theirs.keys() != ours.keys() or not all(torch.equal(ours[name], theirs[name]) for name in ours):
            raise RuntimeError("mergekit made another variant than `export_checkpoint`: their times do not compare.")

    def _run(self, command: str) -> str:
        env = {**os.environ, "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(self.folder / "hub")}  # no waiting for a network
        program = f"{self.venv.absolute()}/bin/{command}"
        done = subprocess.run(program.split(), cwd=self.folder, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{command} exited with {done.returncode}:\n{done.stderr[-2000:]}")
        return done.stdout
