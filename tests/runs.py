"""Run folders made by code, as a sweep would leave them: for what reads a run and should not have to wait for one."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from transplant_ray.evaluate.metrics import recovery, tir, wilson_interval
from transplant_ray.evaluate.results import OUTCOME_SCHEMA, RESULT_SCHEMA
from transplant_ray.files import write_json, write_text
from transplant_ray.graft.variant import ORIGIN
from transplant_ray.probe.rankers import SCHEMA as RANKING_SCHEMA
from transplant_ray.storage import RunFolder
from transplant_ray.tables import write_rows

PROJECTIONS = {"attn": ("q", "k", "v", "o"), "ffn": ("gate", "up", "down")}
NEWER = {
    "moved": pa.float64(), "kl": pa.float64(), "guard_share": pa.float64(), "parsed": pa.int32(), "cut_off": pa.int32(),
    "channels": pa.float64(), "penalty": pa.float64(),
}  # fmt: skip
GUARD_SCHEMA = pa.schema(
    [("variant", pa.string()), ("label", pa.string()), ("role", pa.string()), ("guard", pa.string()), ("split", pa.string()),
     ("held_out", pa.bool_()), ("n", pa.int32()), ("correct", pa.int32()), ("accuracy", pa.float64()), ("ci_low", pa.float64()),
     ("ci_high", pa.float64()), ("share", pa.float64())]
)  # fmt: skip
EXAMPLE_SCHEMA = pa.schema([("split", pa.string()), ("example", pa.string()), ("prompt", pa.string()), ("answer", pa.string())])
ACCURACY = {"target": 0.4, "source": 0.95, "all": 0.88}

Row = dict[str, Any]
Change = Callable[[Row], Row]


@dataclass(frozen=True)
class Made:
    """What is in a made run; the default is some 200 variants on 300 examples with everything measured."""

    rankers: tuple[str, ...] = ("lae", "attribution", "weight_delta", "channel")
    kinds: tuple[str, ...] = ("attn", "ffn", "all")
    ks: tuple[int, ...] = (1, 2, 4, 8, 12, 16, 24, 32)
    penalties: tuple[float, ...] = (0.0, 0.3, 1.0, 3.0)
    num_layers: int = 12
    num_examples: int = 300
    guards: tuple[str, ...] = ("facts", "grammar")
    newer: bool = True
    """Whether the table has the columns of NEWER."""
    winner: bool = True
    texts: Sequence[str] = ()
    """Prompts, answers and completions, in turn; made up where there are none."""
    change: Change = field(default=lambda row: row)
    """Applied to every row of results.parquet."""

    @property
    def modules(self) -> list[Row]:
        return [
            {"module": f"model.layers.{layer}.{kind}.{name}_proj", "layer": layer, "kind": kind, "projection": name}
            for layer in range(self.num_layers)
            for kind, names in PROJECTIONS.items()
            for name in names
        ]


def write_run(path: Path, made: Made | None = None) -> RunFolder:
    """A run folder at `path`; the same `made` gives the same one."""
    made = made or Made()
    folder = RunFolder(path)
    rows = [made.change(row) for row in result_rows(made)]
    known = {*RESULT_SCHEMA.names}
    newer = [pa.field(name, kind) for name, kind in NEWER.items() if name not in known] if made.newer else []
    older = [f for f in RESULT_SCHEMA if made.newer or f.name not in NEWER]
    write_rows(folder.results, rows, pa.schema([*older, *newer]))
    write_rows(folder.rankings, ranking_rows(made), RANKING_SCHEMA)
    write_json(folder.summary, summary(made, rows))
    write_text(folder.recipe, yaml.safe_dump(recipe(made), sort_keys=False, allow_unicode=True))
    outcomes = list(outcome_rows(made))
    write_rows(folder.outcomes / "test.parquet", outcomes, OUTCOME_SCHEMA)
    if made.newer:
        asked = {row["example"]: row for row in outcomes}
        prompts = [{"split": "test", "example": e, "prompt": text(made, i, "prompt"), "answer": text(made, i, "answer")}
                   for i, e in enumerate(asked)]  # fmt: skip
        write_rows(folder.examples, prompts, EXAMPLE_SCHEMA)
    if made.guards:
        write_rows(folder.guards, list(guard_rows(made, rows)), GUARD_SCHEMA)
    if made.winner:
        chosen = {row["module"]: 1.0 for row in made.modules[: made.ks[-1]]}
        write_json(folder.delta / "variant.json", {"format": 1, "coefficients": chosen})
    return folder


def result_rows(made: Made) -> list[Row]:
    """Baselines, trials, controls on select; baselines and the winner on test."""
    rows = [row_of(made, role=role) for role in ("target", "source", "all")]
    for ranker in made.rankers:
        rows += [row_of(made, "trial", ranker, kind, k) for kind in made.kinds for k in made.ks]
    rows += [row_of(made, "trial", "gates", "all", None, penalty=penalty) for penalty in made.penalties]
    rows += [row_of(made, "control", "depth", kind, k) for kind in made.kinds for k in made.ks]
    rows += [row_of(made, "control", "random", kind, k, seed=s) for s in range(3) for kind in made.kinds for k in made.ks]
    rows += [row_of(made, "control", "uniform", "all", len(made.modules), alpha=alpha) for alpha in (0.25, 0.5, 0.75)]
    if made.winner:
        trials = [row for row in rows if row["role"] == "trial"]
        max(trials, key=lambda row: row["accuracy"])["winner"] = True
        rows += [row_of(made, role=role, split="test") for role in ("target", "source", "all")]
        rows += [{**row, "split": "test"} for row in trials if row["winner"]]
    return rows


def row_of(
    made: Made, role: str, ranker: str | None = None, kind: str | None = None, k: int | None = None, *, split: str = "select",
    alpha: float | None = None, seed: int | None = None, penalty: float | None = None,
) -> Row:  # fmt: skip
    """A row with numbers that look like those of a sweep: accuracy grows with the share that is moved, guards shrink with it."""
    drawn = random.Random(f"{role} {ranker} {kind} {k} {alpha} {seed} {penalty}")
    size = {"target": 0, "source": 0, "all": len(made.modules)}.get(role, k if k is not None else len(made.modules) // 2)
    moved = (alpha or 1.0) * size / len(made.modules)
    skill = {"attribution": 0.6, "gates": 0.7, "lae": 1.3, "random": 1.2, "depth": 0.8}.get(str(ranker), 1.0)
    reached = ACCURACY.get(role, 0.4 + 0.48 * moved**skill + drawn.uniform(-0.03, 0.03))
    n = made.num_examples
    correct = round(n * min(reached, 1.0))
    low, high = wilson_interval(correct, n)
    target, source = (round(n * ACCURACY[name]) / n for name in ("target", "source"))
    identity = {"target": ORIGIN.id, "source": "source"}.get(role, f"{drawn.getrandbits(40):010x}")
    harm = (0.02 if ranker == "gates" else 0.5) * moved ** (skill + 0.5)
    return {
        "variant": identity, "role": role, "ranker": ranker, "kind": kind, "k": k, "split": split, "seed": seed, "n": n,
        "alpha": 1.0 if role in ("trial", "control") and alpha is None else alpha, "correct": correct, "accuracy": correct / n,
        "ci_low": low, "ci_high": high, "tir": tir(correct / n, target=target), "winner": False, "error": None, "seconds": 1.5,
        "recovery": recovery(correct / n, target=target, source=source), "num_modules": size, "num_parameters": 1000 * size,
        "moved": moved, "kl": 0.6 * harm, "guard_share": 1 - harm, "parsed": n - 2, "cut_off": 2, "channels": None,
        "penalty": penalty,
    }  # fmt: skip


def ranking_rows(made: Made) -> Iterator[Row]:
    for ranker in made.rankers:
        drawn = random.Random(ranker)
        scored = [{**module, "score": drawn.gauss(0.3, 0.4) * (1 - module["layer"] / 20)} for module in made.modules]
        scored.sort(key=lambda row: -row["score"])
        yield from ({**row, "ranker": ranker, "rank": rank} for rank, row in enumerate(scored, start=1))


def outcome_rows(made: Made) -> Iterator[Row]:
    """Of the target and the exported checkpoint on test: a third is gained, a tenth lost."""
    for index in range(made.num_examples):
        for variant, correct in ((ORIGIN.id, index % 3 != 0), ("exported", index % 10 != 1)):
            yield {
                "variant": variant, "example": f"{index:016x}", "completion": text(made, index, variant), "correct": correct,
                "num_tokens": 5, "finished": True, "num_close": 0, "parsed": True,
            }  # fmt: skip


def text(made: Made, index: int, what: str) -> str:
    return (
        made.texts[index % len(made.texts)] if made.texts else f"{what} of example {index}: " + "some words of it " * (index % 40)
    )


def guard_rows(made: Made, rows: Sequence[Row]) -> Iterator[Row]:
    for place, guard in enumerate(made.guards):
        for row in rows:
            n, before = 200, 160
            correct = round(before * (row["guard_share"] or 0) * (1 - 0.05 * place))
            low, high = wilson_interval(correct, n)
            yield {
                "variant": row["variant"], "label": f"{row['role']} {row['ranker']}", "role": row["role"], "guard": guard,
                "split": row["split"], "held_out": place == 1, "n": n, "correct": correct, "accuracy": correct / n, "ci_low": low,
                "ci_high": high, "share": correct / before,
            }  # fmt: skip


def summary(made: Made, rows: Sequence[Row]) -> Mapping[str, Any]:
    winner = next((row for row in rows if row["winner"]), None)
    cost = {"forwards": 2, "backwards": 0, "decodings": 1, "seconds": 3.0}
    steady = {"spearman": 0.9, "overlap": {}, "num_examples": 128, "resamples": 200, "seed": 42}
    ranked = {"cost": cost, "spearman_with_depth": 0.4, "stability": steady}
    return {
        "name": "made",
        "recipe": "0" * 64,
        "winner": None if winner is None else told_winner(made, winner),
        "verdict": None if winner is None else told_verdict(made),
        "failed": [],
        "stopped": {},
        "close": {"n": 60000, "close": 12},
        "warnings": [],
        "excluded": [{"name": "x", "reason": "shape"}],
        "rankings": {
            "by_ranker": dict.fromkeys(made.rankers, ranked),
            "agreement": [{"first": "lae", "second": "channel", "spearman": 0.2, "overlap": {"4": 0.25, "8": 0.5}}],
        },
        "environment": {"python": "3.11", "torch": "2.13.0"},
        "seconds": {"prepare": 0.3, "evaluate": 31.0},
        "rows_per_step": 512,
        "places": {"source": {"device": "cpu"}},
        "mlflow_run": "f" * 32,
        "test_opened": 2,
        "guards": list(made.guards),
    }


def told_winner(made: Made, winner: Row) -> Mapping[str, Any]:
    numbers = {"n": made.num_examples, "accuracy": winner["accuracy"]}
    interval = {"low": 0.31, "high": 0.47, "undefined_share": 0.0, "reason": None}
    return {
        "label": "the winner",
        "select": numbers,
        "test": {**numbers, "reachable_recovery": 0.9, "intervals": {"difference": interval}},
        "same_as": [],
        "best_control": {"label": "depth all k=32", "accuracy": 0.5},
        "exported_agrees": {"n": 300, "equal": 299},
    }


def told_verdict(made: Made) -> Mapping[str, Any]:
    gained = sum(index % 3 == 0 and index % 10 != 1 for index in range(made.num_examples))
    return {
        "conclusion": "confirmed, with loss",
        "sentence": "the winner is right on more examples.",
        "guards": [{"name": name, "margin": 0.02, "p_holm": 0.03} for name in made.guards],
        "gain": {"gained": gained, "lost": 20},
        "arms": {"sets_each": 24, "scores_on_test": [0.6333, 0.6267]},
    }


def recipe(made: Made) -> Mapping[str, Any]:
    return {
        "name": "made", "source": {"model": "newer/model", "revision": None}, "target": {"model": "older/model", "revision": "abc"},
        "task": {"data": "task.jsonl", "prompt": "{prompt}", "answer": "{answer}", "scorer": "exact", "max_new_tokens": 8,
                 "split": {"probe": 128, "select": made.num_examples, "test": made.num_examples, "seed": 42}},
        "rank": {"by": list(made.rankers), "trajectory": "own"}, "sweep": {"k": list(made.ks), "kind": list(made.kinds)},
        "resources": {"dtype": "float32"},
    }  # fmt: skip
