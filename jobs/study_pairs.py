"""One sweep for every pair that `build_zoo.py` has trained, all by the same recipe: what `compare_rankers.py` compares.

    python jobs/build_zoo.py --pair low-rank --seed 1 --out zoo/seed-1
    python jobs/study_pairs.py zoo/* [--storage studies]
    python jobs/compare_rankers.py studies/*

A sweep that is finished is not run again. Ranked by `lae` and `attribution`, held against depth order, 20 random sets a size, and
uniform merges of the same number of modules; gates are fitted on the task and on the ability that only the target has, and the
ability that both have is held out.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import transplant_ray
from transplant_ray.recipe import Recipe

KS = (1, 2, 4, 8, 12, 16, 20, 24)
GUARDS = ("target_only", "shared")  # the last is held out


def recipe(pair: Path, record: dict[str, Any], name: str, storage: Path) -> Recipe:
    """Every K of the grid that is no full swap."""
    num_modules = record["modules"]
    ks = [k for k in KS if k < num_modules]
    tasks = {
        task: {
            "data": str(pair / "tasks" / f"{task}.jsonl"),
            "prompt": "{prompt}",
            "answer": "{answer}",
            "max_new_tokens": record["tasks"][task]["max_new_tokens"],
        }
        for task in ("lost", *GUARDS)
    }
    split = {"probe": 60, "select": 100, "test": 100}
    return Recipe.model_validate(
        {
            "name": name,
            "source": {"model": str(pair / "source")},
            "target": {"model": str(pair / "target")},
            "task": tasks["lost"],
            "guards": {"tasks": {guard: {**tasks[guard], "split": split} for guard in GUARDS}, "text": None},
            "rank": {"by": ["lae", "attribution"]},
            "search": {"gates": {"penalty": [0, 1, 3]}},
            "sweep": {"k": ks, "loss": False, "controls": {"random": 20, "alpha": [round(k / num_modules, 4) for k in ks]}},
            "storage": str(storage),
            "tracking": {"uri": f"sqlite:///{storage / name}.db", "upload": "none"},
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("zoos", nargs="+", type=Path, help="folders with a zoo.json")
    parser.add_argument("--storage", type=Path, default=Path("studies"))
    arguments = parser.parse_args()
    arguments.storage.mkdir(parents=True, exist_ok=True)
    for zoo in arguments.zoos:
        for pair, record in json.loads((zoo / "zoo.json").read_text(encoding="utf-8")).items():
            name = f"{pair}.seed{record['seed'] // 1000}"
            if (arguments.storage / name / "summary.json").exists():
                print(f"{name}: finished before")
                continue
            result = transplant_ray.sweep(recipe((zoo / pair).resolve(), record, name, arguments.storage.resolve()))
            print(f"{name}: winner {result.winner.label if result.winner else 'none'}", flush=True)


if __name__ == "__main__":
    main()
