"""`organ sweep` as a whole, with trials in this process in the place of Tune: what is measured, chosen, recalled and refused."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from pages import Page
from stacks import contents, load, save_model, trained_copy
from trainings import sums

from transplant_ray.distributed.cluster import JOB_CONFIG, Capacity
from transplant_ray.distributed.organ_trials import TrialDone, Trials, answer_trial
from transplant_ray.distributed.preflight import Needs, look
from transplant_ray.distributed.probing import Asked, Said
from transplant_ray.errors import DataError, IncompatibleModels, NumericsError, OrganError, RecipeError, ResourceError, RunError
from transplant_ray.evaluate.answers import VariantShard
from transplant_ray.evaluate.organ_results import ORGAN_SCHEMA
from transplant_ray.evaluate.outcome import answer_examples
from transplant_ray.models.checkpoint import Checkpoint, open_checkpoint
from transplant_ray.models.loading import load_model, load_tokenizer, read_tokenizer
from transplant_ray.organ.losses import block_losses
from transplant_ray.organ.pack import measuring_cut, pack_text
from transplant_ray.organ.resident import Resident
from transplant_ray.organ.text import stream_passages
from transplant_ray.pipeline import organ_measuring as module
from transplant_ray.pipeline import organ_recording, organ_sweeping
from transplant_ray.pipeline.organ_recording import OrganSweepResult
from transplant_ray.pipeline.organ_sweeping import plan_organs, sweep_organs
from transplant_ray.pipeline.organs import extract
from transplant_ray.pipeline.reporting import report
from transplant_ray.recipe import OrganRecipe, parse_organ_recipe
from transplant_ray.report.tables import escape_latex
from transplant_ray.storage import RunFolder
from transplant_ray.tables import write_rows

CONTEXT = 16


class Cluster:
    """In the place of Ray: trials one after another in this process; `fails` holds labels whose process dies for good."""

    def __init__(self) -> None:
        self.measured: list[str] = []
        self.loaded: list[str] = []
        self.fails: set[str] = set()
        self.needs: list[Needs] = []

    def run(self, job: Trials, _: object) -> Iterator[TrialDone]:
        resident = Resident(torch.float32)
        for id, trial in job.trials.items():
            if trial.label in self.fails:
                yield TrialDone(id, (), "ResourceError: its process died 4 times", None, 4)
                continue
            self.measured.append(trial.label)
            yield TrialDone(id, *answer_trial(job, id, resident))

    def answer(self, _: object, checkpoint: Checkpoint, name: str, asked: list[Asked], *__: object) -> Said:
        self.loaded.append(str(checkpoint.folder))
        model, tokenizer = load_model(checkpoint, "float32"), load_tokenizer(checkpoint)
        said: Said = []
        for one in asked:
            outcomes = answer_examples(name, model, tokenizer, one.examples, one.rules.generation, one.rules.scorer)
            said.append((one, VariantShard(name, outcomes, 0.0)))
        return said


class Room(Capacity):
    """Of a cluster that is not there."""

    num_elsewhere = 0
    grows = False


class Tracker:
    """In the place of MLflow."""

    run_id, refused = "run", ()
    """In the place of a cluster too."""

    def __init__(self) -> None:
        self.children: list[str] = []

    def log_child(self, label: str, *_: object) -> str:
        self.children.append(label)
        return label

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


@pytest.fixture(autouse=True)
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster()

    @contextmanager
    def nothing(*_: object) -> Iterator[Any]:
        yield Tracker()

    monkeypatch.setattr(module, "connect", lambda resources: nullcontext(Room(resources)))
    monkeypatch.setattr(module, "preflight", lambda needs, *_: cluster.needs.append(needs))
    monkeypatch.setattr(module, "run_organ_trials", cluster.run)
    monkeypatch.setattr(module, "answer_made", cluster.answer)
    monkeypatch.setattr(organ_sweeping, "tracked", nothing)
    monkeypatch.setattr(organ_recording, "build_organ_report", lambda _: None)  # figures take most of the time
    monkeypatch.setattr(organ_recording, "position_figures", lambda _: {})
    return cluster


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, an organ that was trained (every weight is a little larger), the same before, and texts."""
    folder = tmp_path_factory.mktemp("made")
    save_model(folder / "model")
    trained_copy(extract(str(folder / "model"), "1-2", folder / "before"), folder / "organ")
    for name, texts in (("sums", list(sums(60))), ("others", [text[::-1] for text in sums(60, seed=1)])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def recipe(made: Path, storage: Path, **changes: Any) -> OrganRecipe:
    return parse_organ_recipe(
        {
            "name": "tiny",
            "recipient": {"model": str(made / "model")},
            "organs": {"a": str(made / "organ")},
            "sweep": {"positions": [1, 4]},
            "domain": {"data": str(made / "sums.jsonl"), "contexts": 8},
            "general": {"data": str(made / "others.jsonl"), "contexts": 8},
            "context": CONTEXT,
            "storage": str(storage / "runs"),
            **changes,
        }
    )


@pytest.fixture(scope="module")
def swept(made: Path, tmp_path_factory: pytest.TempPathFactory) -> OrganSweepResult:
    with pytest.MonkeyPatch.context() as patch:
        calm = Cluster()

        @contextmanager
        def nothing(*_: object) -> Iterator[Any]:
            yield Tracker()

        patch.setattr(module, "connect", lambda resources: nullcontext(Room(resources)))
        patch.setattr(module, "preflight", lambda *_: None)
        patch.setattr(module, "run_organ_trials", calm.run)
        patch.setattr(module, "answer_made", calm.answer)
        patch.setattr(organ_sweeping, "tracked", nothing)
        return sweep_organs(recipe(made, tmp_path_factory.mktemp("swept")))


def test_all_is_measured_on_select_and_three_models_on_test(swept: OrganSweepResult) -> None:
    select = [(row.role, row.mode, row.at) for row in swept.results if row.split == "select"]
    places = [("insert", 1), ("insert", 4), ("replace", 1), ("replace", 4)]
    assert select == [
        ("recipient", None, None), *(("trial", *place) for place in places), *(("untrained", *place) for place in places),
        ("alone", None, None),
    ]  # fmt: skip
    assert [row.role for row in swept.results if row.split == "test"] == ["recipient", "trial", "untrained"]
    assert sorted({path.name for path in swept.folder.outcomes.iterdir()}) == [
        "domain-select.parquet", "domain-test.parquet", "general-select.parquet", "general-test.parquet",
    ]  # fmt: skip


def test_the_winner_has_the_smallest_domain_loss_and_its_checkpoint_says_the_same(swept: OrganSweepResult) -> None:
    trials = [row for row in swept.results if row.split == "select" and row.role == "trial"]
    winner = min(trials, key=lambda row: row.domain_loss or 0)
    assert swept.winner == winner
    assert swept.summary["confirmed"]["exported_agrees"] == {"n": 16, "equal": 16, "largest": 0.0}
    model = load(swept.folder.checkpoint)
    assert model.config.num_hidden_layers == winner.num_layers
    on_test = next(row for row in swept.results if row.split == "test" and row.winner)
    assert on_test.domain_n == swept.summary["confirmed"]["texts"]["domain"]["n"] == 8


def test_losses_are_those_of_the_blocks_read_plainly(swept: OrganSweepResult, made: Path, tmp_path: Path) -> None:
    """Against `block_losses`, which organ training and comparisons use, on the text packed once more."""

    spec = recipe(made, tmp_path).domain
    tokenizer = read_tokenizer(open_checkpoint(str(made / "model")))
    pack = pack_text(stream_passages(spec), tokenizer, len(tokenizer), measuring_cut(spec, CONTEXT), tmp_path / "pack")
    for split, who, model in (("select", "recipient", made / "model"), ("test", "winner", swept.folder.checkpoint)):
        row = next(r for r in swept.results if r.split == split and (r.winner if who == "winner" else r.role == "recipient"))
        losses = list(block_losses(load(model), pack.side(split), range(8), 3))
        assert row.domain_loss == pytest.approx(sum(losses) / 8, rel=1e-5)


def test_the_same_again_measures_nothing(swept: OrganSweepResult, made: Path, cluster: Cluster) -> None:
    again = sweep_organs(recipe(made, swept.folder.path.parents[1]))
    assert (cluster.measured, cluster.loaded, cluster.needs) == ([], [], [])
    assert again.summary["measured"] == 0
    assert again.summary["recalled"] == swept.summary["measured"]
    assert [{**row.__dict__, "seconds": 0} for row in again.results] == [{**row.__dict__, "seconds": 0} for row in swept.results]


def test_changed_weights_and_text_are_measured_anew_and_nothing_else(
    swept: OrganSweepResult, made: Path, tmp_path: Path, cluster: Cluster
) -> None:
    for name in ("runs", "organ"):
        source = swept.folder.path.parent if name == "runs" else made / "organ"
        shutil.copytree(source, tmp_path / name)
    other = trained_copy(
        extract(str(made / "model"), "1-2", tmp_path / "cut"), tmp_path / "other", note="another"
    ).checkpoint.folder
    both = recipe(made, tmp_path, name="both", organs={"a": str(tmp_path / "organ"), "b": str(other)}, controls={"alone": False})
    sweep_organs(both)
    assert cluster.measured == []  # the weights are the same, whatever the manifest says
    more = recipe(made, tmp_path, name="more", domain={"data": str(made / "sums.jsonl"), "contexts": 8, "share": [0, 0.9]})
    sweep_organs(more)
    assert "recipient" in cluster.measured
    cluster.measured.clear()
    save_model(tmp_path / "model", seed=5)
    sweep_organs(recipe(made, tmp_path, name="third", recipient={"model": str(tmp_path / "model")}, controls={"untrained": False}))
    assert len(cluster.measured) >= 6


def test_a_trial_whose_process_dies_for_good_is_a_row_and_the_rest_goes_on(made: Path, tmp_path: Path, cluster: Cluster) -> None:
    cluster.fails = {"a insert 1"}
    result = sweep_organs(recipe(made, tmp_path))
    assert [row.label for row in result.failed] == ["a insert 1"]
    assert result.summary["failed"] == {"a insert 1": "ResourceError: its process died 4 times"}
    assert result.winner is not None
    cluster.fails, cluster.measured = set(), []
    assert sweep_organs(recipe(made, tmp_path)).failed == []
    assert "a insert 1" in cluster.measured
    assert len(cluster.measured) <= 3  # and a winner's test half, where it has changed


def test_a_folder_in_which_another_process_works_is_left_alone(made: Path, tmp_path: Path, cluster: Cluster) -> None:
    spec = recipe(made, tmp_path)
    folder = RunFolder.of(spec.storage, spec.name)
    with folder.claimed(spec.identity(), "theirs"), pytest.raises(RunError, match="tiny: another process works in it"):
        sweep_organs(spec)
    assert cluster.measured == []
    assert folder.recipe.read_text() == "theirs"


def log(result: OrganSweepResult) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.folder.log.read_text().splitlines()]


def test_the_log_tells_it_from_the_plan_to_the_end(swept: OrganSweepResult, made: Path) -> None:
    told = [line for line in log(swept) if line["attempt"] == log(swept)[0]["attempt"]]
    count = Counter(line["event"] for line in told)
    assert (told[-1]["event"], told[-1]["exit"]) == ("sweep ends", 0)
    begins, planned, winner, exported = (
        next(line for line in told if line["event"] == event)
        for event in ("sweep begins", "variants planned", "winner", "exported")
    )
    assert (begins["verb"], begins["run"], begins["recipe"]) == (
        "organ sweep", "tiny", recipe(made, swept.folder.path).identity(),
    )  # fmt: skip
    assert planned["variants"] == count["variant done"] == len({row.variant for row in swept.results if row.split == "select"})
    assert swept.winner is not None
    assert winner["trial"] == swept.winner.label
    assert winner["score"] == pytest.approx(-(swept.winner.domain_loss or 0))
    assert exported["checkpoint"] == str(swept.folder.checkpoint)
    outcomes = sum(len(pq.read_table(path)) for path in (swept.folder.path / "outcomes").iterdir())
    assert sum(line["examples"] for line in told if line["event"] == "shard done") == outcomes
    assert {line["label"] for line in told if line["event"] == "shard done" and line["variant"] != "exported"} == {
        row.label for row in swept.results if row.split == "select"
    }
    stages = [line["stage"] for line in told if line["event"] == "stage ends"]
    assert stages[-4:] == ["export", "confirm on test", "record", "send to MLflow"]
    assert {"prepare", "preflight", "measure on select"} < set(stages)


def test_deaths_failures_and_what_was_known_are_in_the_log(made: Path, tmp_path: Path, cluster: Cluster) -> None:
    cluster.fails = {"a insert 1"}
    first = sweep_organs(recipe(made, tmp_path))
    told = log(first)
    failed = next(line for line in told if line["event"] == "variant failed")
    assert {"label": "a insert 1", "level": "WARNING"}.items() <= failed.items()
    deaths = [line for line in told if line["event"] == "evaluator died"]
    assert [line["variants"] for line in deaths] == [[failed["variant"]]] * 4
    assert told[-1]["exit"] == 1
    cluster.fails = set()
    again = log(sweep_organs(recipe(made, tmp_path)))[len(told) :]
    asked = {line["label"] for line in again if line["event"] == "shard done" and line["split"] == "select"} - {"exported"}
    assert "a insert 1" in asked
    planned = next(line["variants"] for line in again if line["event"] == "variants planned")
    assert Counter(line["event"] for line in again)["variant done"] == planned
    assert again[-1]["exit"] == 0


def test_what_costs_too_much_does_not_win(made: Path, tmp_path: Path) -> None:
    result = sweep_organs(recipe(made, tmp_path, sweep={"positions": [1, 4], "most_lost": 0}))
    recipient = result.results[0].general_loss or 0
    vetoed = {row.label for row in result.results if row.role == "trial" and (row.general_loss or 0) > recipient}
    assert set(result.summary["vetoed"]) == vetoed
    assert result.winner is None or result.winner.label not in vetoed
    if result.winner is None:
        assert "No winner" in Page.of(report(result.folder.path).read_text()).text


def test_every_node_must_see_recipient_organs_and_controls_and_be_able_to_score(
    made: Path, tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(module, "preflight", lambda needs, *_: (cluster.needs.append(needs), seen.append(look(needs))))
    sweep_organs(recipe(made, tmp_path))
    (needs,) = cluster.needs
    assert list(needs.checkpoints) == ["recipient"]
    assert list(needs.organs) == ["organs.a", "controls.untrained of a"]
    assert needs.scorers == ("loss",)
    assert needs.shelf == RunFolder(tmp_path / "runs" / "tiny").ledger
    assert seen[0].problems == ()
    (gone,) = look(needs).problems  # the controls are there for as long as trials may want them
    assert re.match(r"OrganError: .*/\.tiny\..*organ\.json: not the manifest", gone)


def test_a_task_is_asked_beside_and_chooses_nothing(made: Path, tmp_path: Path) -> None:
    rows = [{"q": f"{a}+{b}=", "a": f"{a + b}"} for a in range(6) for b in range(6)]
    (tmp_path / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "data": str(tmp_path / "task.jsonl"), "prompt": "{q}", "answer": "{a}", "max_new_tokens": 3,
        "split": {"probe": 1, "select": 10, "test": 10},
    }  # fmt: skip
    result = sweep_organs(recipe(made, tmp_path, sweep={"positions": [1], "modes": ["insert"]}, tasks={"adding": task}))
    assert [(row.label, row.split, row.n) for row in result.tasks] == [*((row.label, row.split, 10) for row in result.results)]
    assert all(row.accuracy is not None for row in result.tasks)


def test_a_recipient_that_cannot_be_measured_is_an_error(made: Path, tmp_path: Path, cluster: Cluster) -> None:
    cluster.fails = {"recipient"}
    with pytest.raises(NumericsError, match="the recipient itself could not be measured"):
        sweep_organs(recipe(made, tmp_path))


def test_a_dry_run_lists_the_grid_and_leaves_nothing(made: Path, tmp_path: Path, cluster: Cluster) -> None:
    grid, blocks = plan_organs(recipe(made, tmp_path, sweep={"positions": [1, 5]}))
    assert [trial.label for trial in grid.of("trial")] == ["a insert 1", "a insert 5", "a replace 1"]
    assert [(misfit.mode, misfit.at) for misfit in grid.misfits] == [("replace", 5)]
    assert blocks == {"domain": {"select": 8, "test": 8}, "general": {"select": 8, "test": 8}}
    assert cluster.measured == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"organs": {"a": "/none"}}, OrganError, "`organs.a`: /none/organ.json: not the manifest"),
        ({"sweep": {"positions": [99]}}, OrganError, "position 99"),
        ({"context": 999}, RecipeError, "`context` 999: .* was built for 128 positions"),
        ({"domain": {"data": "/none.txt"}}, DataError, "`domain`: /none.txt: no such file"),
        ({"general": {"data": "MADE/sums.jsonl", "share": [0, 0.0001]}}, DataError, "`general`: `data`: "),
    ],
)
def test_what_cannot_be_is_said_and_nothing_is_left(
    made: Path, tmp_path: Path, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    text = json.dumps(changes).replace("MADE", str(made))
    with pytest.raises(error, match=words):
        sweep_organs(recipe(made, tmp_path, **json.loads(text)))
    assert list(tmp_path.iterdir()) == []


def test_a_submitted_job_writes_nothing_where_it_would_be_lost(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(JOB_CONFIG, "{}")
    with pytest.raises(RecipeError, match="`storage` is the relative path 'runs'"):
        sweep_organs(recipe(made, tmp_path).model_copy(update={"storage": "runs"}))


def test_an_organ_that_was_tampered_with_is_refused(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "organ", tmp_path / "organ")
    weights = tmp_path / "organ" / "organ.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(OrganError, match="missing or damaged"):
        sweep_organs(recipe(made, tmp_path, organs={"a": str(tmp_path / "organ")}))
    assert [path.name for path in tmp_path.iterdir()] == ["organ"]


def test_an_organ_of_another_model_is_refused(made: Path, tmp_path: Path) -> None:
    wide = save_model(tmp_path / "wide", hidden_size=64, num_attention_heads=8)
    with pytest.raises(IncompatibleModels, match=r"`organs.a`: [\s\S]*hidden_size"):
        sweep_organs(recipe(made, tmp_path, recipient={"model": str(wide)}))


def test_results_of_another_recipe_stay(swept: OrganSweepResult, made: Path, cluster: Cluster) -> None:
    before = contents(swept.folder.path)
    with pytest.raises(RunError, match="results of another recipe"):
        sweep_organs(recipe(made, swept.folder.path.parents[1], context=8))
    assert contents(swept.folder.path) == before
    assert cluster.measured == []


# -- the report --------------------------------------------------------------------------------------------------------------


def test_the_page_says_what_was_found_and_needs_no_network(swept: OrganSweepResult) -> None:
    html = swept.folder.report.read_text()
    page = Page.of(html)
    assert swept.summary["verdict"]["sentence"][1:] in page.text
    for row in swept.results:
        assert row.label in page.text
    assert not [value for _, name, value in page.attributes if name in ("src", "href") and not value.startswith("#")]
    assert "script" not in page.tags
    assert html.count("<svg") >= 3
    assert len(swept.folder.variants_csv.read_text().splitlines()) == 1 + len(swept.results)
    table = swept.folder.variants_tex.read_text()
    body = table[table.index(r"\endfoot") : table.index(r"\end{longtable}")]
    assert body.count(r"\\") == len(swept.results)
    assert [escape_latex(row.label) in body for row in swept.results] == [True] * len(swept.results)
    assert body.count(r"$\star$") == sum(row.winner for row in swept.results)
    assert {line.count("&") for line in body.splitlines()[1:] if line} == {6}


def test_it_is_made_again_of_the_run_folder_alone(swept: OrganSweepResult) -> None:
    before = swept.folder.report.read_bytes()
    assert report(swept.folder.path) == swept.folder.report
    assert swept.folder.report.read_bytes().split(b"Run</h3>")[0] == before.split(b"Run</h3>")[0]


def test_whatever_a_run_says_is_text_on_the_page(swept: OrganSweepResult, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    shutil.copytree(swept.folder.path, tmp_path / "run")
    table = pq.read_table(tmp_path / "run" / "results.parquet").to_pylist()
    for row in table:
        row |= {"label": f"{row['label']}{evil}", "organ": row["organ"] and f"{row['organ']}{evil}$x_1$"}
    table[-1]["error"] = f"\x1b[31m{evil}"

    write_rows(tmp_path / "run" / "results.parquet", table, ORGAN_SCHEMA)
    summary = (tmp_path / "run" / "summary.json").read_text().replace("organ a,", f"organ {evil.replace('/', chr(92) + '/')},")
    (tmp_path / "run" / "summary.json").write_text(summary)
    html = report(tmp_path / "run").read_text()
    assert "<script" not in html
    assert "\x1b" not in html
    assert evil in Page.of(html).text


def test_a_folder_without_results_is_said(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"kind": "organs"}')
    with pytest.raises(RunError, match=r"results.parquet: not there"):
        report(tmp_path)
    assert RunFolder(tmp_path).summary.exists()


# Storage at an address.


def addressed(made: Path, folder: Path, **changes: Any) -> OrganRecipe:
    return recipe(made, folder, **changes).model_copy(update={"storage": f"file://{folder}/store"})


def test_a_sweep_into_an_address_is_one_into_a_folder(
    made: Path, swept: OrganSweepResult, cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    spec = addressed(made, tmp_path)
    first = sweep_organs(spec)
    assert [{**row.__dict__, "seconds": 0} for row in first.results] == [{**row.__dict__, "seconds": 0} for row in swept.results]
    there = tmp_path / "store" / "tiny"
    assert {"results.parquet", "summary.json", "tasks.parquet", "checkpoint", "outcomes"} <= {path.name for path in there.iterdir()}
    cluster.measured.clear()
    cluster.loaded.clear()
    again = sweep_organs(spec)
    assert (cluster.measured, cluster.loaded) == ([], [])
    assert again.summary["recalled"] == first.summary["measured"]


@pytest.mark.parametrize(("untrained", "refused"), [(True, True), (False, False)])
def test_controls_that_other_nodes_would_not_see_are_refused(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, untrained: bool, refused: bool
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(Room, "num_elsewhere", 1)
    spec = addressed(made, tmp_path, controls={"untrained": untrained})
    if refused:
        with pytest.raises(ResourceError, match=r"store/tiny: the untrained controls .* 1 other nodes .* controls.untrained=false"):
            sweep_organs(spec)
    else:
        assert not sweep_organs(spec).failed
