"""What a comparison leaves behind: the summary, its tables and report in the run folder, what was shipped, the same in MLflow."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transplant_ray.evaluate.learning import Contrast, Difference, Findings, find
from transplant_ray.files import writable_folder
from transplant_ray.organ.lessons import SHIPPED, Learnt
from transplant_ray.organ.pack import Pack
from transplant_ray.pipeline.comparison_lessons import Bench, Run
from transplant_ray.report.comparison import KIND, write_comparison
from transplant_ray.storage import RunFolder
from transplant_ray.tracking.comparison import summary_numbers
from transplant_ray.versions import environment


@dataclass(frozen=True)
class Compared:
    folder: RunFolder
    findings: Findings
    learnt: tuple[Learnt, ...]
    """Everything: the recipients as they are, the trainings that tuned, and those of the seeds."""
    summary: Mapping[str, Any]
    refused: tuple[str, ...] = ()
    """What MLflow did not take."""

    @property
    def failed(self) -> tuple[Learnt, ...]:
        return tuple(learnt for learnt in self.learnt if learnt.error is not None)

    @property
    def missing(self) -> tuple[str, ...]:
        """What has no result: methods without a learning rate that does not fail, and seeds. A rate that failed and was not chosen
        is a result."""
        methods = [f"{choice.model}, {choice.method}" for choice in self.findings.choices if choice.lr is None]
        seeds = [f"{each.model}, {each.method}, seed {each.seed}" for each in self.failed if each.stage == "confirm"]
        return (*methods, *seeds)


def record(run: Run, benches: Sequence[Bench], before: list[Learnt], tuned: list[Learnt], confirmed: list[Learnt]) -> Compared:
    findings, learnt = find(before, tuned, confirmed), (*before, *tuned, *confirmed)
    summary = {
        "kind": KIND,
        "name": run.recipe.name,
        "models": {bench.name: bench.recipient.model for bench in benches},
        "budget": {
            "tokens": benches[0].training.num_tokens,
            "steps": benches[0].training.num_steps,
            "trainings_to_tune": len(run.recipe.tune.lr),
            "seeds": list(run.recipe.seeds),
            "tuning_seed": run.recipe.tune.seed,
            "context": benches[0].training.context,
            "batch": benches[0].training.batch,
            "cpus": run.recipe.resources.cpus,
            "gpus": run.recipe.resources.gpus,
        },
        "text": {bench.name: _text(bench) for bench in benches},
        "said": sentences(findings),
        **findings.to_json(),
        "learnt": [each.in_short() for each in learnt],
        "shipped": _link(run, confirmed) if run.recipe.keep else {},
        "recalled": run.recalled,
        "seconds": run.watch.seconds,
        "environment": environment(),
        "mlflow_run": run.tracker.run_id,
    }
    files = write_comparison(run.folder, summary)
    run.tracker.log_findings("\n\n".join(summary["said"]), summary_numbers(summary["standings"]), files)
    return Compared(run.folder, findings, learnt, summary)


def sentences(findings: Findings) -> list[str]:
    """What it has shown, in words."""
    several = len({standing.model for standing in findings.standings}) > 1
    found: list[Difference | Contrast] = [*findings.differences, *findings.contrasts]
    lines = [f"{each.model}: {each.verdict}" if several else each.verdict for each in found]
    if found and all(each.interval is None for each in found):  # one sentence says it of all
        lines = ["a single seed, so nothing can be said of chance: no difference between methods or positions has an interval"]
    edges = [f"{choice.model}, {choice.method} (lr {choice.lr:g})" for choice in findings.choices if choice.at_edge]
    if edges:
        lines.append(f"tuned at the edge of the grid, so a wider grid might do better: {'; '.join(edges)}")
    failed = [f"{choice.model}, {choice.method}" for choice in findings.choices if choice.lr is None]
    return lines + [f"{each}: every learning rate failed" for each in failed]


def _link(run: Run, confirmed: Sequence[Learnt]) -> dict[str, str]:
    """`shipped/MODEL-METHOD-SEED`: names for what lies in the folders of lessons. Returns name → folder, inside of the run."""
    shutil.rmtree(run.folder.path / SHIPPED, ignore_errors=True)
    folder, found = writable_folder(run.folder.path / SHIPPED), {}
    for learnt in confirmed:
        if learnt.error is None:
            place = Path("lessons", learnt.name, SHIPPED)
            (folder / f"{learnt.model}-{learnt.method}-{learnt.seed}").symlink_to(Path("..", place))
            found[f"{learnt.model}-{learnt.method}-{learnt.seed}"] = str(place)
    return found


def _text(bench: Bench) -> dict[str, Any]:
    packs = {"training": bench.text, **bench.measured}
    sides = {name: Pack.open(folder).record for name, folder in packs.items()}
    return {
        name: {
            "sha256": record.text,
            **{side: said.model_dump() for side, said in record.sides.items()},
            "also_trained_on": bench.overlap.get(name, 0),
        }
        for name, record in sides.items()
    }
