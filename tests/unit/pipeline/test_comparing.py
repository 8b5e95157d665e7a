"""`organ compare` as a whole, with a loop in this process in the place of tutors and a tracker that keeps what it is told."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from filelock import FileLock
from rich.console import Console
from stacks import contents, save_model
from trainings import sums

from transplant_ray import cli
from transplant_ray.cli_organ_compare import print_comparison
from transplant_ray.distributed.cluster import JOB_CONFIG, Capacity
from transplant_ray.distributed.lessons import OnLearnt, OnPoint
from transplant_ray.distributed.preflight import Needs
from transplant_ray.errors import DataError, NumericsError, OrganError, RecipeError, RunError
from transplant_ray.organ.folder import open_organ
from transplant_ray.organ.lessons import Learnt, Lesson, carry_out, failed
from transplant_ray.organ.training import CPU, Point
from transplant_ray.pipeline import comparing as module
from transplant_ray.pipeline.comparing import compare
from transplant_ray.pipeline.comparison_planning import plan
from transplant_ray.pipeline.comparison_recording import Compared, sentences
from transplant_ray.pipeline.organ_sweeping import sweep_organs
from transplant_ray.pipeline.reporting import report, show_comparison
from transplant_ray.recipe import CompareRecipe, ModelSpec, ResourceSpec, parse_organ_recipe
from transplant_ray.report.comparison import budget


class Trials:
    """In the place of tutors; keeps who was carried out, and ends like Ctrl-C after so many."""

    def __init__(self) -> None:
        self.done: list[Lesson] = []
        self.told: list[Learnt] = []
        self.needs: list[Needs] = []
        self.stop: int | None = None

    def carry_out(self, lessons: Sequence[Lesson], on_point: OnPoint, on_learnt: OnLearnt) -> dict[str, Learnt]:
        found = {}
        for lesson in lessons:
            if len(self.done) == self.stop:
                raise KeyboardInterrupt
            self.done.append(lesson)
            for told in carry_out(lesson, CPU):
                if isinstance(told, Learnt):
                    on_learnt(told)
                    found[lesson.key] = told
                else:
                    on_point(lesson, told)
        return found

    @property
    def trained(self) -> list[tuple[str, str, float | None, int | None]]:
        return [(each.method, each.stage, each.lr, each.seed) for each in self.done if each.trained]

    run_id, refused = "id", ()

    def log_learnt(self, learnt: Learnt) -> None:
        self.told.append(learnt)

    def log_findings(self, *_: Any) -> None: ...


@contextmanager
def patched() -> Iterator[Trials]:
    trials = Trials()

    @contextmanager
    def tracked(*_: Any) -> Iterator[Trials]:
        yield trials

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "connect", lambda _: nullcontext(Capacity(ResourceSpec())))
        patch.setattr(module, "preflight", lambda needs, *_: trials.needs.append(needs))
        patch.setattr(module, "tracked_comparison", tracked)
        patch.setattr(module, "tutors", lambda *_: nullcontext(trials))
        yield trials


@pytest.fixture(autouse=True)
def trials() -> Iterator[Trials]:
    with patched() as trials:
        yield trials


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two layers: an organ of one has five places to go."""
    return save_model(tmp_path_factory.mktemp("model") / "model", num_hidden_layers=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for name, seed in (("domain", 0), ("general", 1)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in sums(80, seed)))
    return folder


def recipe(model: Path, text: Path, place: Path, **changes: Any) -> CompareRecipe:
    settings = {
        "name": "c",
        "model": {"model": str(model)},
        "training": {"data": str(text / "domain.jsonl"), "share": [0.5, 1], "context": 16, "steps": 2, "batch": 4},
        "methods": {"full": {}},
        "tune": {"lr": [1e-3, 1e-2]},
        "seeds": [0, 1],
        "domain": {"data": str(text / "domain.jsonl"), "share": [0, 0.5], "contexts": 3},
        "general": {"data": str(text / "general.jsonl"), "contexts": 3},
        "storage": str(place),
    }
    return CompareRecipe.model_validate({**settings, **changes})


BOTH = {"organ": {"layers": "0"}, "full": {}}


@dataclass(frozen=True)
class Done:
    compared: Compared
    trials: Trials
    place: Path


@pytest.fixture(scope="module")
def done(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    place = tmp_path_factory.mktemp("done")
    with patched() as trials:
        return Done(compare(recipe(model, text, place, methods=BOTH)), trials, place)


def test_every_method_is_tuned_and_confirmed_and_all_of_it_is_written(done: Done) -> None:
    trials, compared, folder = done.trials, done.compared, done.place / "c"
    rates = {choice.method: choice.lr for choice in compared.findings.choices}
    expected = [(method, "tune", lr, 1000) for method in ("organ", "full") for lr in (1e-3, 1e-2)]
    expected += [(method, "confirm", rates[method], seed) for method in ("organ", "full") for seed in (0, 1)]
    assert trials.trained == expected
    for choice in compared.findings.choices:
        assert choice.lr == min(choice.rates, key=lambda rate: rate.loss or 0).lr
    results = pd.read_parquet(folder / "results.parquet")
    assert len(results) == 1 + len(expected) == len(trials.told)
    assert results[results.stage == "tune"].domain_loss.isna().all()  # test is not opened to choose
    assert set(pd.read_parquet(folder / "positions.parquet")["mode"]) == {"insert", "replace"}
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["budget"]["tokens"] == 2 * 4 * 16
    assert "organ" in (folder / "report.html").read_text()
    assert "\\toprule" in (folder / "comparison.tex").read_text()
    assert open_organ(folder / "shipped" / "model-organ-0").manifest.training is not None
    assert (folder / "shipped" / "model-full-1" / "model.safetensors").is_file()


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_the_log_tells_stages_and_steps_of_each_lesson_and_how_it_ended(done: Done) -> None:
    told = log(done.place / "c")
    assert (told[-1]["event"], told[-1]["exit"]) == ("sweep ends", 0)
    assert next(line["verb"] for line in told if line["event"] == "sweep begins") == "organ compare"
    assert [line["stage"] for line in told if line["event"] == "stage ends"] == list(done.compared.summary["seconds"])
    steps = {line["lesson"]: line["step"] for line in told if line["event"] == "steps done"}
    assert steps == {lesson.folder.name: 2 for lesson in done.trials.done if lesson.trained}


def test_the_log_ends_with_the_exit_code_of_the_command(model: Path, text: Path, tmp_path: Path) -> None:
    compare(recipe(model, text, tmp_path, tune={"lr": [1e-3, 1e30]}, seeds=[0]))
    assert log(tmp_path / "c")[-1]["exit"] == 0
    with pytest.raises(NumericsError):
        compare(recipe(model, text, tmp_path, name="d", tune={"lr": [1e30]}))
    assert log(tmp_path / "d")[-1]["exit"] == 2


def test_every_node_must_see_the_models_and_the_run_folder_and_have_what_the_methods_need(
    model: Path, text: Path, tmp_path: Path, trials: Trials
) -> None:
    compare(recipe(model, text, tmp_path, methods={"full": {}}, seeds=[0]))
    alone = recipe(model, text, tmp_path, name="d", methods={"lora": {}}, seeds=[0])
    compare(alone.model_copy(update={"model": None, "models": {"one": ModelSpec(model=str(model))}}))
    first, second = trials.needs
    assert (list(first.checkpoints), list(second.checkpoints)) == (["model"], ["models.one"])
    assert [Path(needs.shelf.place) for needs in trials.needs] == [tmp_path / "c", tmp_path / "d"]
    assert second.versions.keys() - first.versions.keys() == {"peft"}


def test_once_more_it_trains_nothing_and_a_seed_more_is_trained_alone(
    model: Path, text: Path, tmp_path: Path, trials: Trials
) -> None:
    first = compare(recipe(model, text, tmp_path))
    trained = list(trials.trained)
    again = compare(recipe(model, text, tmp_path))
    assert trials.trained == trained
    assert again.findings == first.findings
    assert again.summary["recalled"] == len(trained) == 4
    compare(recipe(model, text, tmp_path, seeds=[0, 1, 2]))
    assert [(method, stage, seed) for method, stage, _, seed in trials.trained[4:]] == [("full", "confirm", 2)]


def test_what_it_prints_fits_a_terminal(done: Done) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    print_comparison(console, done.compared.summary)
    said = console.export_text()
    assert "full fine-tuning" in said
    assert "cannot be told apart" in said or "is better" in said or "is worse" in said
    assert "…" not in said
    assert max(map(len, said.split("Each method had")[0].splitlines())) <= 80


def test_stopped_it_goes_on_with_what_is_left(model: Path, text: Path, tmp_path: Path, trials: Trials) -> None:
    trials.stop = 3
    with pytest.raises(KeyboardInterrupt):
        compare(recipe(model, text, tmp_path))
    assert not (tmp_path / "c" / "summary.json").exists()
    trials.stop = None
    compare(recipe(model, text, tmp_path))
    assert len(trials.trained) == len(set(trials.trained)) == 4


def test_other_text_is_other_trainings(model: Path, text: Path, tmp_path: Path, trials: Trials) -> None:
    compare(recipe(model, text, tmp_path, seeds=[0]))
    other = tmp_path / "other"
    other.mkdir()
    for name in ("domain", "general"):
        (other / f"{name}.jsonl").write_text((text / f"{name}.jsonl").read_text().replace("=", " = "))
    compare(recipe(model, other, tmp_path, seeds=[0]))
    assert len(trials.trained) == 6


def test_a_rate_that_diverges_is_a_row_and_loses(model: Path, text: Path, tmp_path: Path) -> None:
    found = compare(recipe(model, text, tmp_path, tune={"lr": [1e-3, 1e30]}, methods={"full": {}}, seeds=[0]))
    (choice,) = found.findings.choices
    assert (choice.lr, choice.at_edge) == (1e-3, True)
    (failure,) = found.failed
    assert (failure.lr, failure.stage) == (1e30, "tune")
    assert found.missing == ()
    assert "What failed" in (tmp_path / "c" / "report.html").read_text()
    assert found.findings.standings[0].interval["domain"] is None


def test_where_all_diverge_it_is_said_after_what_there_is_was_kept(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match=r"no method has a learning rate that does not diverge.*tune.lr"):
        compare(recipe(model, text, tmp_path, tune={"lr": [1e30]}, methods={"full": {}}, seeds=[0]))
    results = pd.read_parquet(tmp_path / "c" / "results.parquet")
    assert list(results.stage) == ["before", "tune"]
    assert results.error.notna().sum() == 1
    assert (tmp_path / "c" / "report.html").is_file()


def test_one_method_whose_rates_all_diverge_does_not_stop_the_others(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = carry_out

    def spoilt(lesson: Lesson, *rest: Any) -> Iterator[Point | Learnt]:
        yield from [failed(lesson, "the loss is nan")] if lesson.method == "full" else calm(lesson, *rest)

    monkeypatch.setitem(globals(), "carry_out", spoilt)
    found = compare(recipe(model, text, tmp_path, seeds=[0], methods=BOTH))
    assert [standing.method for standing in found.findings.standings] == ["organ"]
    assert "model, full: every learning rate failed" in found.summary["said"]
    assert log(tmp_path / "c")[-1]["exit"] == 1
    assert found.missing == ("model, full",)


def test_that_no_difference_has_an_interval_is_said_once(done: Done) -> None:
    findings = done.compared.findings
    verdicts = [each.verdict for each in (*findings.differences, *findings.contrasts)]
    assert set(verdicts) <= set(sentences(findings))
    first, *rest = (replace(each, interval=None, verdict="nothing") for each in findings.differences)
    some = replace(findings, differences=[first, *findings.differences[1:]])
    assert [line for line in sentences(some) if "single seed" in line] == []
    assert "nothing" in sentences(some)
    none = replace(findings, differences=[first, *rest], contrasts=[replace(each, interval=None) for each in findings.contrasts])
    assert len([line for line in sentences(none) if "a single seed" in line]) == 1
    assert "nothing" not in sentences(none)


def test_a_seed_without_a_result_is_missed(
    done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = next(each for each in done.compared.learnt if (each.method, each.stage, each.seed) == ("full", "confirm", 1))
    learnt = [replace(each, error="it died 4 times") if each is lost else each for each in done.compared.learnt]
    found = replace(done.compared, learnt=tuple(learnt))
    assert found.missing == ("model, full, seed 1",)
    monkeypatch.setattr(module, "compare", lambda *_: found)
    path = tmp_path / "recipe.yaml"
    path.write_text((done.place / "c" / "recipe.yaml").read_text())
    assert main(monkeypatch, "organ", "compare", str(path)) == 1
    assert "without a result: model, full, seed 1." in capsys.readouterr().err
    monkeypatch.setattr(module, "compare", lambda *_: done.compared)
    assert main(monkeypatch, "organ", "compare", str(path)) == 0


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"methods": {"organ": {"layers": "4-9"}}}, OrganError, "expected a stretch of 0-1"),
        ({"training": {"context": 999}}, RecipeError, "`context` 999: .* was built for 128 positions"),
        ({"training": {"data": "none.jsonl"}}, DataError, "no such file, folder or pattern"),
        ({"general": {"data": "none.jsonl"}}, DataError, "no such file, folder or pattern"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_written(
    model: Path, text: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    asked = recipe(model, text, tmp_path)
    merged = {key: {**asked.model_dump(exclude_none=True)[key], **value} for key, value in changes.items() if key != "methods"}
    spoilt = recipe(model, text, tmp_path, **{**changes, **merged})
    for verb in (compare, plan):
        with pytest.raises(error, match=words):
            verb(spoilt)
    assert not list(tmp_path.iterdir())


def test_too_little_text_names_the_section(model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a b c")
    with pytest.raises(DataError, match=r"`general`: `data`: .* must be one context of 16"):
        compare(recipe(model, text, tmp_path, general={"data": str(tmp_path / "short.txt")}))


def test_documents_that_are_trained_on_too_are_counted_and_said(model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "copy.jsonl").write_text((text / "domain.jsonl").read_text())
    found = compare(recipe(model, text, tmp_path, general={"data": str(tmp_path / "copy.jsonl")}, methods={"full": {}}, seeds=[0]))
    assert found.summary["text"]["model"]["general"]["also_trained_on"] > 0
    assert found.summary["text"]["model"]["domain"]["also_trained_on"] == 0


def test_a_folder_of_a_sweep_or_of_a_running_comparison_is_left_alone(model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    with FileLock(tmp_path / "c" / ".lock"), pytest.raises(RunError, match="another process works in it"):
        compare(recipe(model, text, tmp_path))
    (tmp_path / "c" / "recipe.yaml").write_text("name: c")
    with pytest.raises(RunError, match="holds the results of another recipe of this name"):
        compare(recipe(model, text, tmp_path))
    assert sorted(path.name for path in (tmp_path / "c").iterdir() if path.name != ".lock") == ["recipe.yaml"]


def test_a_sweep_leaves_the_folder_of_a_comparison_alone(done: Done, model: Path, text: Path) -> None:
    folder, texts = done.place / "c", {name: {"data": str(text / f"{name}.jsonl"), "contexts": 3} for name in ("domain", "general")}
    organs = {"a": str(folder / "shipped" / "model-organ-0")}
    before = contents(folder)
    settings = {
        "name": "c",
        "recipient": {"model": str(model)},
        "organs": organs,
        **texts,
        "context": 16,
        "storage": str(done.place),
    }
    with pytest.raises(RunError, match="holds the results of another recipe of this name"):
        sweep_organs(parse_organ_recipe(settings))
    assert contents(folder) == before


def test_its_report_is_made_again_and_it_is_shown_again(
    done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(done.place / "c", tmp_path / "c", symlinks=True)
    files = [tmp_path / "c" / name for name in ("report.html", "comparison.csv", "comparison.tex")]
    before = [path.read_bytes() for path in files]
    for path in files:
        path.unlink()
    assert main(monkeypatch, "report", str(tmp_path / "c")) == 0
    assert capsys.readouterr().out.split() == ["wrote", str(files[0])]
    assert [path.read_bytes() for path in files] == before
    assert main(monkeypatch, "show", str(tmp_path / "c")) == 0
    shown = capsys.readouterr().out
    assert "full fine-tuning" in shown
    assert budget(done.compared.summary) in shown


def test_a_summary_that_is_not_whole_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "summary.json").write_text('{"kind": "comparison", "name": "c"}')
    for verb in (report, show_comparison):
        with pytest.raises(RunError, match=r"summary.json: not the whole summary of a comparison \('models' is missing\)"):
            verb(tmp_path)
    assert main(monkeypatch, "show", str(tmp_path)) == 2


def main(monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    """Exit code of the command line."""
    monkeypatch.setattr(sys, "argv", ["transplant-ray", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_a_submitted_job_writes_nothing_where_it_would_be_lost(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(JOB_CONFIG, "{}")
    with pytest.raises(RecipeError, match="`storage` is the relative path 'runs'"):
        compare(recipe(model, text, Path("runs")))
    with pytest.raises(RecipeError, match=r"`tracking\.uri` is the relative path"):
        compare(recipe(model, text, tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_plan_counts_what_will_be_trained_and_measured(done: Done, model: Path, text: Path) -> None:
    (planned,) = plan(recipe(model, text, done.place, methods=BOTH))
    assert planned.trainings == 8
    assert planned.tokens == 2 * 4 * 16
    assert planned.layers == {"organ": "0"}
    sites = {len(learnt.sites) for learnt in done.compared.learnt if learnt.method == "organ"}
    assert sites == {3 + 2}
    assert planned.measurings == 4 * (5 + 1) + 2 * 2 * 2 + 1 + 2
