"""The small models that `jobs/recipes/organ-comparison.yaml` and `organ-demo.yaml` name, trained from nothing, and their text.

    python jobs/organ_models.py [--family gpt2] [--out runs/organ-demo] [--domain GSM8K/train.jsonl] [--threads 2]

Each is some 330 seconds of one core, some 0.6 million parameters, by the same function that `transplant-ray organ demo` calls. What is
there is taken, and what was begun goes on. The recipe of the full comparison is written beside them, so on a cluster, with a
folder that all nodes see:

    ray job submit --working-dir . -- python jobs/organ_models.py --out /shared/organ-demo
    ray job submit --working-dir . -- python jobs/organ.py compare /shared/organ-demo/organ-comparison.yaml \
        storage=/shared/runs tracking.uri=http://mlflow:5000
"""

import argparse
from pathlib import Path

from rich.console import Console

from transplant_ray.console import TerminalWatch
from transplant_ray.files import write_text
from transplant_ray.models.scratch import SMALL_FAMILIES
from transplant_ray.pipeline.demo_models import describe_model
from transplant_ray.pipeline.organ_demo import DEFAULT_FOLDER, Place, build
from transplant_ray.recipe import DemoSpec

RECIPE = Path(__file__).with_name("recipes") / "organ-comparison.yaml"
HERE = "../../runs/organ-demo/"
"""How that recipe calls the folder."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=[*SMALL_FAMILIES, "all"], default="all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=DEFAULT_FOLDER)
    parser.add_argument("--domain", type=Path, help="GSM8K's train.jsonl; made-up problems where it is not there")
    parser.add_argument("--threads", type=int, help="by default all that there are")
    arguments = parser.parse_args()
    console = Console(emoji=False)
    for family in SMALL_FAMILIES if arguments.family == "all" else [arguments.family]:
        spec = DemoSpec(family=family, seed=arguments.seed)
        with TerminalWatch(console) as watch:
            text, model = build(
                spec, Place.of(arguments.out, spec), domain=arguments.domain, threads=arguments.threads, watch=watch
            )
        for line in [f"{model.folder}", *describe_model(model), f"domain text: {text.domain_is}"]:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    write_text(arguments.out / RECIPE.name, RECIPE.read_text(encoding="utf-8").replace(HERE, "./"))


if __name__ == "__main__":
    main()
