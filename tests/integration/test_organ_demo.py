"""The organ demo as a newcomer runs it, in miniature: every stage is the real one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from integration.helpers import Finished, Place, run_main
from transformers import AutoModelForCausalLM

from transplant_ray.organ.folder import open_organ

pytestmark = pytest.mark.slow
SIZES = {
    "characters": 200_000, "problems": 300, "vocabulary": 300, "layers": 3, "width": 16, "heads": 2, "context": 16, "batch": 4,
    "tokens": 6_400, "organ_tokens": 640, "contexts": 4,
}  # fmt: skip


def run_demo(folder: Path, uri: str, **changes: int) -> Finished:
    settings = [part for key, value in {**SIZES, **changes}.items() for part in ("--set", f"{key}={value}")]
    return run_main("organ", "demo", "--out", str(folder / "demo"), "--cpus", "1", "--tracking", uri, *settings)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("organ-demo") / "checkout"


@pytest.fixture(scope="module")
def finished(place: Path, cluster: None, template: Place) -> Finished:  # noqa: ARG001
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "transplant_ray.pipeline.organ_demo.find_gsm8k", lambda given: given
        )  # wherever the tests run, it is not there
        return run_demo(place, template.uri)


def test_it_says_what_came_of_it_and_on_which_text(finished: Finished) -> None:
    assert finished.code == 0, finished.err
    for said in (
        "300 made-up word problems",
        "a count of pairs",
        "trained 10 steps",
        "perplexity on select",
        "LoRA",
        "full fine-tuning",
    ):
        assert said in finished.out


def test_everything_is_where_it_says(place: Path, finished: Finished) -> None:  # noqa: ARG001
    here = place / "demo" / "gpt2-0"
    assert AutoModelForCausalLM.from_pretrained(here / "model").config.num_hidden_layers == 3
    assert open_organ(here / "organ").manifest.training is not None
    for name in ("sweep/report.html", "compare/report.html", "sweep.yaml", "compare.yaml"):
        assert (here / name).is_file()
    assert "at_once: 1" in (here / "compare.yaml").read_text()
    assert "evaluators: 1" in (here / "sweep.yaml").read_text()
    assert json.loads((here / "demo.json").read_text())["stand_in"] is True
    assert not [path for path in here.iterdir() if path.name.endswith(".training")]


def test_again_it_trains_nothing_and_says_the_same(place: Path, finished: Finished, template: Place) -> None:
    weights = [place / "demo" / "gpt2-0" / name for name in ("model/model.safetensors", "organ/organ.safetensors")]
    before = [path.stat().st_mtime_ns for path in weights]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transplant_ray.pipeline.organ_demo.find_gsm8k", lambda given: given)
        again = run_demo(place, template.uri)
    assert again.code == 0, again.err
    assert [path.stat().st_mtime_ns for path in weights] == before
    table = "perplexity on test"
    assert again.out[again.out.index(table) :] == finished.out[finished.out.index(table) :]


def test_other_settings_in_the_same_place_are_refused(place: Path, finished: Finished, template: Place) -> None:  # noqa: ARG001
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transplant_ray.pipeline.organ_demo.find_gsm8k", lambda given: given)
        refused = run_demo(place, template.uri, tokens=12_800)
    assert refused.code == 2
    assert "other settings or text" in refused.err
