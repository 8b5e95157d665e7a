"""`organ demo`: text, a small model from nothing, an organ that is trained on domain text, where it goes, and what else would do.

    text/                      general and domain text
    gpt2-0/model               the model, family and seed in the folder's name
    gpt2-0/organ               its middle layers, trained on domain text
    gpt2-0/sweep.yaml, sweep/      every position, and the report
    gpt2-0/compare.yaml, compare/  organ, LoRA and full fine-tuning, and the report
    gpt2-0/demo.json           which text it was, and what came of it

What is there is taken, and what was begun goes on: a demo can be stopped at any time and given again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from transplant_ray.errors import RunError
from transplant_ray.files import write_json, write_text
from transplant_ray.organ.folder import open_organ
from transplant_ray.pipeline.comparing import compare
from transplant_ray.pipeline.comparison_recording import Compared
from transplant_ray.pipeline.demo_models import SmallModel, make_model
from transplant_ray.pipeline.demo_text import DemoText, find_gsm8k, make_text
from transplant_ray.pipeline.organ_recording import OrganSweepResult
from transplant_ray.pipeline.organ_sweeping import sweep_organs
from transplant_ray.pipeline.organ_training import Trained, train
from transplant_ray.pipeline.watch import Silent, Watch
from transplant_ray.recipe import DemoSpec, TrackingSpec, TrainingSpec, WorkerSpec, load_compare_recipe, load_organ_recipe

RECORD = "demo.json"
DEFAULT_FOLDER = Path("runs", "organ-demo")
METHODS = ("organ", "full", "lora")
"""LoRA is left out, and that is said, where peft is not installed."""
TUNED = {"lr": [3e-4, 1e-3, 3e-3]}
"""The same rates for every method; chosen before anything was measured."""


@dataclass(frozen=True)
class Demo:
    """What a demo has come to."""

    folder: Path
    text: DemoText
    model: SmallModel
    trained: Trained
    sweep: OrganSweepResult
    compared: Compared


@dataclass(frozen=True)
class Place:
    """Where the pieces of a model lie."""

    folder: Path
    """Of all models and their text."""
    name: str

    @classmethod
    def of(cls, folder: Path, spec: DemoSpec) -> Place:
        return cls(folder.absolute(), f"{spec.family}-{spec.seed}")

    @property
    def here(self) -> Path:
        return self.folder / self.name

    @property
    def text(self) -> Path:
        return self.folder / "text"

    @property
    def model(self) -> Path:
        return self.here / "model"

    @property
    def organ(self) -> Path:
        return self.here / "organ"


def organ_demo(
    spec: DemoSpec,
    folder: str | Path = DEFAULT_FOLDER,
    *,
    domain: str | Path | None = None,
    cpus: int | None = None,
    tracking: TrackingSpec | None = None,
    watch: Watch | None = None,
) -> Demo:
    """All of the demo, in `folder`. `domain` is GSM8K's train.jsonl; where neither it nor a copy beside the repository is there, a
    stand-in is made. `cpus`: cores that are used at a time; by default all that there are.

    RunError where the folder holds a demo of other settings.
    """
    place, watch, threads = Place.of(Path(folder), spec), watch or Silent(), cpus or num_cpus()
    tracking = tracking or TrackingSpec(experiment="organs")
    if not has_peft():
        watch.note("peft is not installed, so LoRA is left out of the comparison: pip install 'transplant-ray[lora]' brings it")
    text, model = build(spec, place, domain=domain, threads=threads, watch=watch)
    trained = _trained(spec, place, text, threads, tracking, watch)
    sweep = sweep_organs(load_organ_recipe(_write(place, "sweep", sweep_recipe(spec, place, text, tracking, cpus))), watch)
    compared = compare(load_compare_recipe(_write(place, "compare", compare_recipe(spec, place, text, tracking, cpus))), watch)
    demo = Demo(place.here, text, model, trained, sweep, compared)
    write_json(place.here / RECORD, _record(demo))
    return demo


def build(
    spec: DemoSpec, place: Place, *, domain: str | Path | None = None, threads: int | None = None, watch: Watch | None = None
) -> tuple[DemoText, SmallModel]:
    """The text and the model: all that recipes need."""
    watch = watch or Silent()
    watch.stage("gather the text", 0)
    text = make_text(spec, place.text, find_gsm8k(domain))
    return text, make_model(spec, text, place.model, threads or num_cpus(), watch)


def has_peft() -> bool:
    return find_spec("peft") is not None


def num_cpus() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def sweep_recipe(spec: DemoSpec, place: Place, text: DemoText, tracking: TrackingSpec, cpus: int | None = None) -> dict[str, Any]:
    """Every position in both modes, untrained layers beside them; paths are relative to the recipe's folder.

    A process measures in one thread, so as many as there are `cpus` measure side by side.
    """
    return {
        "name": "sweep",
        "recipient": {"model": "./model"},
        "organs": {"domain": "organ"},
        "domain": {**_relative(text.measured_on("domain"), place), "contexts": spec.contexts},
        "general": {**_relative(text.measured_on("general"), place), "contexts": spec.contexts},
        "context": spec.context,
        **({} if cpus is None else {"resources": {"evaluators": cpus}}),
        "tracking": tracking.model_dump(mode="json"),
        "storage": str(place.here),
    }


def compare_recipe(spec: DemoSpec, place: Place, text: DemoText, tracking: TrackingSpec, cpus: int | None = None) -> dict[str, Any]:
    """The organ's budget for every method, tuned alike, confirmed under one seed; a training is one thread."""
    return {
        "name": "compare",
        "model": {"model": "./model"},
        "training": {
            **_relative(text.trained_on("domain"), place),
            "context": spec.context,
            "tokens": spec.organ_tokens,
            "batch": spec.batch,
        },
        "methods": [method for method in METHODS if method != "lora" or has_peft()],
        "tune": TUNED,
        "seeds": [spec.seed],
        "domain": {**_relative(text.measured_on("domain"), place), "contexts": spec.contexts},
        "general": {**_relative(text.measured_on("general"), place), "contexts": spec.contexts},
        **({} if cpus is None else {"resources": {"at_once": cpus}}),
        "tracking": tracking.model_dump(mode="json"),
        "storage": str(place.here),
    }


def _relative(corpus: Mapping[str, Any], place: Place) -> dict[str, Any]:
    return {**corpus, "data": [os.path.relpath(path, place.here) for path in corpus["data"]]}


def _write(place: Place, name: str, settings: Mapping[str, Any]) -> Path:
    path = place.here / f"{name}.yaml"
    write_text(path, yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))
    return path


def _record(demo: Demo) -> dict[str, Any]:
    return {
        "domain": demo.text.domain_is,
        "stand_in": demo.text.stand_in,
        "text": {name: demo.text.record[name]["sha256"] for name in ("general", "domain")},
        "model": demo.model.record["perplexity"],
        "organ": demo.trained.organ.manifest.training,
        "sweep": demo.sweep.summary["verdict"],
        "compare": demo.compared.summary["said"],
    }


def _trained(spec: DemoSpec, place: Place, text: DemoText, threads: int, tracking: TrackingSpec, watch: Watch) -> Trained:
    """The default layers of the model, trained on domain text; those of an earlier demo where they are there."""
    sizes = {"context": spec.context, "batch": spec.batch, "tokens": spec.organ_tokens, "lr": spec.organ_lr, "seed": spec.seed}
    training = TrainingSpec.model_validate({**text.trained_on("domain"), **sizes, "dtype": "float32"})
    if not place.organ.exists():
        crew = WorkerSpec(cpus=threads)
        return train(str(place.model), training, place.organ, workers=crew, tracking=tracking, watch=watch)
    organ = open_organ(place.organ)
    said = (organ.manifest.training or {}).get("settings", {})
    if any(said.get(key) != value for key, value in {**sizes}.items()):
        raise RunError(f"{place.organ}: was trained by other settings. Give the same, or another `--out`.")
    return Trained(organ, (), ())
