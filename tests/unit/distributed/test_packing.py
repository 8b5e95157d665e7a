"""What a submitted job is made of: what travels, what stays, what is refused, and what nobody may see."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from transplant_ray.distributed import packing
from transplant_ray.distributed.packing import (
    COMMANDS,
    Pack,
    check_id,
    command_for,
    entrypoint,
    environment,
    metadata,
    pack,
    read_environment,
    read_resources,
)
from transplant_ray.errors import CheckpointError, DataError, JobError, OrganError, RecipeError, TransplantError
from transplant_ray.organ.text import stream_passages
from transplant_ray.recipe import CompareRecipe, OrganRecipe, Recipe, load_any_recipe, load_recipe

SETTINGS: dict[str, Any] = {
    "name": "tiny",
    "source": {"model": "zoo:siblings/source"},
    "target": {"model": "/shared/models/target"},
    "task": {"data": "rows.jsonl", "prompt": "{p}", "answer": "{a}", "max_new_tokens": 4},
    "sweep": {"k": [1], "kind": ["all"]},
    "storage": "/shared/runs",
    "tracking": {"uri": "http://mlflow:5000"},
}
COMMON: dict[str, Any] = {"name": "tiny", "storage": "/shared/runs", "tracking": {"uri": "http://mlflow:5000"}}
ORGANS: dict[str, Any] = {
    **COMMON,
    "recipient": {"model": "./mine"},
    "organs": {"a": "organs/a", "b": "/shared/organs/b"},
    "domain": {"data": ["rows.jsonl", "hub:some/text"], "text": "{p}", "share": [0, 0.2]},
    "general": {"data": "docs/**/*.md"},
}
COMPARE: dict[str, Any] = {
    **COMMON,
    "models": {"one": {"model": "./mine"}, "other": {"model": "org/model"}},
    "training": {"data": "rows.jsonl", "text": "{p}", "share": [0.2, 1], "context": 8, "steps": 1},
    "methods": ["organ", "full"],
    "domain": {"data": "./rows.jsonl", "text": "{p}", "share": [0, 0.2]},
    "general": {"data": ["docs"]},
}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Where a person has recipe and data."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "rows.jsonl").write_text('{"p": "1", "a": "2"}\n')
    (folder / "notes.txt").write_text("nobody needs this")
    return folder


@pytest.fixture
def bench(home: Path) -> Path:
    """Where a person has a model, an organ and texts too."""
    model(home / "mine")
    (home / "organs" / "a").mkdir(parents=True)
    for name in ("organ.json", "organ.safetensors", "README.md"):
        (home / "organs" / "a" / name).write_text(name)
    for name in ("b.md", "a/z.md", "a/y.txt"):
        (home / "docs" / name).parent.mkdir(parents=True, exist_ok=True)
        (home / "docs" / name).write_text(f"what {name} says")
    return home


@pytest.fixture
def luggage(tmp_path: Path) -> Path:
    folder = tmp_path / "luggage"
    folder.mkdir()
    return folder


def recipe(home: Path, **changes: Any) -> Path:
    path = home / "recipe.yaml"
    path.write_text(yaml.safe_dump({**SETTINGS, **changes}))
    return path


def organs(home: Path, **changes: Any) -> Path:
    path = home / "organs.yaml"
    path.write_text(yaml.safe_dump({**ORGANS, **changes}))
    return path


def comparison(home: Path, **changes: Any) -> Path:
    path = home / "compare.yaml"
    path.write_text(yaml.safe_dump({**COMPARE, **changes}))
    return path


def model(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "token").write_text("secret")
    return folder


def carried(packed: Pack) -> dict[str, bytes]:
    """File name → content of what travels beside the recipe."""
    return {Path(name).name: (packed.folder / name).read_bytes() for name in packed.files if name != "recipe.yaml"}


def test_the_recipe_and_what_it_names_by_relative_paths_travel_and_nothing_else(home: Path, luggage: Path) -> None:
    packed = pack(recipe(home), [], luggage)
    assert carried(packed) == {"rows.jsonl": (home / "rows.jsonl").read_bytes()}
    assert packed.recipe.source.model == "zoo:siblings/source"
    assert packed.recipe.target.model == "/shared/models/target"
    assert Path(str(packed.recipe.task.data)).read_text() == (home / "rows.jsonl").read_text()
    assert str(home) not in packed.text


def test_data_of_guards_shots_and_text_travel_too(home: Path, luggage: Path) -> None:
    for name in ("guard", "shots", "text"):
        (home / f"{name}.jsonl").write_text(f'{{"p": "{name}", "a": "2"}}\n')
    task = {**SETTINGS["task"], "shots": {"num": 1, "data": "shots.jsonl"}}
    guards = {"tasks": {"one": {**SETTINGS["task"], "data": "./guard.jsonl"}}, "text": {"data": "text.jsonl", "text": "{p}"}}
    packed = pack(recipe(home, task=task, guards=guards), [], luggage)
    assert carried(packed).keys() == {"rows.jsonl", "guard.jsonl", "shots.jsonl", "text.jsonl"}
    assert Path(str(packed.recipe.guards.tasks["one"].data)).read_bytes() == (home / "guard.jsonl").read_bytes()


def test_a_model_folder_travels_without_what_is_hidden(home: Path, luggage: Path) -> None:
    model(home / "mine")
    packed = pack(recipe(home, target={"model": "./mine"}), [], luggage)
    assert carried(packed).keys() == {"rows.jsonl", "config.json", "model.safetensors"}
    assert (Path(packed.recipe.target.model) / "model.safetensors").read_bytes() == b"weights"


def test_overrides_are_in_the_recipe_and_their_paths_start_where_they_are_typed(
    home: Path, luggage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = home / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "rows.jsonl").write_text('{"p": "other", "a": "2"}\n')
    monkeypatch.chdir(elsewhere)
    packed = pack(recipe(home), ["task.data=rows.jsonl", "name=other", "sweep.k=[2]"], luggage)
    assert (packed.recipe.name, packed.recipe.sweep.k) == ("other", (2,))
    assert carried(packed)["rows.jsonl"] == (elsewhere / "rows.jsonl").read_bytes()


def test_an_input_that_an_override_replaces_does_not_travel_and_need_not_be_there(home: Path, luggage: Path) -> None:
    packed = pack(
        recipe(home, target={"model": "./lost"}), ["task.data=/shared/rows.jsonl", "target.model=/shared/target"], luggage
    )
    assert carried(packed) == {}
    assert packed.recipe.task.data == "/shared/rows.jsonl"


def test_a_path_in_somebodys_home_is_looked_up_on_the_cluster(home: Path, luggage: Path) -> None:
    packed = pack(recipe(home, target={"model": "~/target"}), ["storage=~/runs"], luggage)
    assert "~/target" in packed.text
    assert "~/runs" in packed.text


MODEL = {"config.json", "model.safetensors"}


def test_of_an_organ_sweep_recipient_organs_and_texts_travel(bench: Path, luggage: Path) -> None:
    packed = pack(organs(bench), [], luggage)
    assert isinstance(packed.recipe, OrganRecipe)
    assert carried(packed).keys() == MODEL | {"organ.json", "organ.safetensors", "README.md", "rows.jsonl", "b.md", "z.md"}
    assert (Path(packed.recipe.organs["a"]) / "organ.json").read_text() == "organ.json"
    assert packed.recipe.organs["b"] == "/shared/organs/b"
    assert packed.recipe.domain.data[1] == load_any_recipe(organs(bench)).domain.data[1]  # type: ignore[union-attr]
    assert str(bench) not in packed.text


def test_of_a_comparison_models_and_texts_travel_each_file_once(bench: Path, luggage: Path) -> None:
    packed = pack(comparison(bench), ["tune.lr=[0.001]"], luggage)
    assert isinstance(packed.recipe, CompareRecipe)
    assert carried(packed).keys() == MODEL | {"rows.jsonl", "b.md", "z.md", "y.txt"}
    assert packed.recipe.training.data == packed.recipe.domain.data
    assert (packed.recipe.models["other"].model, packed.recipe.tune.lr) == ("org/model", (0.001,))
    assert str(bench) not in packed.text


@pytest.mark.parametrize("data", ["docs", "docs/*", "docs/**/*.md", "docs/b.md", ["docs/a/*.txt", "docs"]])
def test_a_text_that_travelled_is_read_as_it_was(bench: Path, luggage: Path, data: str | list[str]) -> None:
    recipe = organs(bench, general={"data": data})
    here, there = load_any_recipe(recipe), pack(recipe, [], luggage).recipe
    assert isinstance(here, OrganRecipe)
    assert isinstance(there, OrganRecipe)
    assert list(stream_passages(there.general)) == list(stream_passages(here.general)) != []


def test_organ_recipes_count_what_travelled_by_its_content(bench: Path, tmp_path: Path) -> None:
    for write in (organs, comparison):
        found = []
        for number in range(3):
            (bench / "docs" / "b.md").write_text(f"what it says {number // 2}")
            (tmp_path / f"{write.__name__}-{number}").mkdir()
            found.append(pack(write(bench), [], tmp_path / f"{write.__name__}-{number}").recipe.identity())
        assert found[0] == found[1] != found[2]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"organs": {"a": "docs"}}, OrganError, "docs: no such organ. Expected a folder with organ.json"),
        ({"general": {"data": "none/*.md"}}, DataError, "none/.*: no such file, folder or pattern"),
        ({"general": {"data": "mine"}}, DataError, r"config.json: does not travel with a job; .*absolute path"),
        ({"general": {"data": "mine/.cache/*"}}, DataError, "token: does not travel"),
        ({"general": {"data": ".hidden.txt"}}, DataError, "hidden.txt: does not travel"),
        ({"storage": "runs"}, RecipeError, "e.g. storage=/shared/runs"),
        ({"tracking": {"uri": "sqlite:///m.db"}}, RecipeError, "e.g. tracking.uri=sqlite:////shared/m.db"),
        ({"sweep": {"k": [1]}}, RecipeError, "`sweep.k` is not a key of a recipe"),
    ],
)
def test_what_cannot_be_of_an_organ_recipe_is_refused_here(
    bench: Path, luggage: Path, changes: dict[str, Any], error: type[TransplantError], words: str
) -> None:
    (bench / ".hidden.txt").write_text("hush")
    with pytest.raises(error, match=words):
        pack(organs(bench, **changes), [], luggage)


def test_a_comparison_that_would_lose_its_results_is_refused_here(bench: Path, luggage: Path) -> None:
    with pytest.raises(RecipeError, match=r"e\.g\. storage=/shared/runs"):
        pack(comparison(bench), ["storage=runs"], luggage)
    assert not list(luggage.iterdir())


def test_what_a_job_does_follows_from_the_recipe_and_nothing_else_fits(bench: Path) -> None:
    kinds = {Recipe: recipe(bench), OrganRecipe: organs(bench), CompareRecipe: comparison(bench)}
    loaded = {kind: load_any_recipe(path) for kind, path in kinds.items()}
    assert [command_for(each, None) for each in loaded.values()] == ["sweep", "organ sweep", "organ compare"]
    for command, kind in COMMANDS.items():
        assert command_for(loaded[kind], command) == command
        for other in loaded.keys() - {kind}:
            with pytest.raises(JobError, match=f"--command '{command}': does not fit. tiny is a recipe for"):
                command_for(loaded[other], command)
    with pytest.raises(JobError, match=r"no such command\. tiny is a recipe for sweep or rank: give that, or no --command"):
        command_for(loaded[Recipe], "rm")


def test_equal_recipes_make_equal_packs_wherever_they_lie(home: Path, tmp_path: Path) -> None:
    """Ray unpacks every head's jobs into another folder; the results of one recipe must stay one recipe's."""
    packs = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        packs.append(pack(recipe(home), [], tmp_path / name))
    assert packs[0].text == packs[1].text
    assert packs[0].recipe.identity() == packs[1].recipe.identity()
    (home / "rows.jsonl").write_text('{"p": "1", "a": "3"}\n')
    (tmp_path / "third").mkdir()
    assert pack(recipe(home), [], tmp_path / "third").recipe.identity() != packs[0].recipe.identity()


@pytest.mark.parametrize(
    ("override", "fix"),
    [("storage=runs", "storage=/shared/runs"), ("tracking.uri=sqlite:///mlflow.db", "tracking.uri=sqlite:////shared/mlflow.db")],
)
def test_results_that_would_be_lost_on_the_cluster_are_refused_here(home: Path, luggage: Path, override: str, fix: str) -> None:
    with pytest.raises(RecipeError, match=f"e.g. {fix}"):
        pack(recipe(home), [override], luggage)
    assert not list(luggage.iterdir())


def test_a_recipe_that_is_none_is_refused_here(home: Path, luggage: Path) -> None:
    with pytest.raises(RecipeError, match="Did you mean `storage`"):
        pack(recipe(home), ["storag=/shared"], luggage)
    assert not list(luggage.iterdir())


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"task": {**SETTINGS["task"], "data": "lost.jsonl"}}, DataError, "lost.jsonl: no such data file"),
        ({"task": {**SETTINGS["task"], "data": "../home/notes.txt"}}, DataError, "notes.txt: no such data file. Give a .jsonl"),
        ({"target": {"model": "./nowhere"}}, CheckpointError, "nowhere: no such model"),
        ({"target": {"model": "./"}}, CheckpointError, "no such model"),
        ({"task": {"lm_eval": "lost.yaml"}}, DataError, "lost.yaml: no such file"),
    ],
)
def test_an_input_that_is_not_what_it_should_be_is_refused_here(
    home: Path, luggage: Path, changes: dict[str, Any], error: type[TransplantError], words: str
) -> None:
    with pytest.raises(error, match=words):
        pack(recipe(home, **changes), [], luggage)


def test_what_is_too_large_to_travel_is_refused_with_the_way_out(
    home: Path, luggage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.truncate(home / "rows.jsonl", packing.LIMIT + 1)  # sparse: it takes no room
    with pytest.raises(RecipeError, match=r"rows.jsonl has 100.0 MiB.* 100 MiB may.*absolute path"):
        pack(recipe(home), [], luggage)
    (home / "rows.jsonl").write_text("x" * 600)
    (home / "more.jsonl").write_text("x" * 600)
    monkeypatch.setattr(packing, "LIMIT", 1000)  # together they are too many
    with pytest.raises(RecipeError, match=r"with it 0\.0 MiB would travel"):
        pack(recipe(home, guards={"text": {"data": "more.jsonl"}}), [], luggage)
    pack(recipe(home, guards={"text": {"data": "rows.jsonl"}}), [], luggage)  # one file for two is one file


def test_the_file_of_a_harness_task_travels_where_it_stands_alone(home: Path, luggage: Path) -> None:
    (home / "facts.yaml").write_text("task: facts\ndoc_to_text: '{{p}}'\n")
    packed = pack(recipe(home, task={"lm_eval": "facts.yaml"}), [], luggage)
    assert carried(packed).keys() == {"facts.yaml"}


@pytest.mark.parametrize(
    "line", ["include: base.yaml", "process_docs: !function utils.clean", "dataset_kwargs: {data_files: rows.jsonl}"]
)
def test_the_file_of_a_harness_task_that_leans_on_others_is_refused(home: Path, luggage: Path, line: str) -> None:
    (home / "facts.yaml").write_text(f"task: facts\n{line}\n")
    with pytest.raises(RecipeError, match="does not stand alone"):
        pack(recipe(home, task={"lm_eval": "facts.yaml"}), [], luggage)


def test_no_credential_is_in_the_command_or_the_metadata(home: Path, luggage: Path) -> None:
    secrets = ["storage=s3://me:hush@bucket/runs?secret_key=hush2&scheme=http", "tracking.uri=http://me:hush3@mlflow:5000"]
    packed = pack(recipe(home), secrets, luggage)
    assert packed.recipe.tracking.uri == "http://me:hush3@mlflow:5000"  # the job itself needs it
    shown = metadata(packed.recipe, "sweep")
    assert shown["results"] == "s3://bucket/runs/tiny"
    assert (shown["recipe"], shown["command"], shown["identity"]) == ("tiny", "sweep", packed.recipe.identity())
    assert "hush" not in json.dumps(shown) + entrypoint("sweep")


@pytest.mark.parametrize("password", ["open-sesame", "open/ses+ame", "open?ses=ame", "open#sesame", "open@ses/ame", ":/open//x"])
def test_where_results_go_is_said_without_a_password_however_it_is_typed(home: Path, password: str) -> None:
    loaded = load_any_recipe(recipe(home, storage=f"s3://AKIA:{password}@bucket/runs/?secret_key=sesame#me"))
    assert metadata(loaded, "sweep")["results"] == "s3://bucket/runs/tiny"


def test_the_command_is_one_that_a_shell_reads_as_it_was_meant() -> None:
    assert entrypoint("sweep") == "python -m transplant_ray.cli sweep recipe.yaml"
    assert entrypoint("organ compare") == "python -m transplant_ray.cli organ compare recipe.yaml"
    assert shlex.split(entrypoint("rank", "/opt/my env/python; rm"))[0] == "/opt/my env/python; rm"


def test_the_environment_holds_what_was_given_the_folder_and_the_package(home: Path, luggage: Path) -> None:
    packed = pack(recipe(home), [], luggage)
    given = {
        "env_vars": {"HF_TOKEN": "t", "RAY_JOB_STOP_WAIT_TIME_S": "5"},
        "pip": ["x"],
        "py_modules": ["mine"],
        "excludes": ["zoo"],
    }
    made = environment(given, packed, Path("/site/transplant_ray"))
    assert made["working_dir"] == str(luggage)
    assert made["py_modules"] == ["mine", "/site/transplant_ray"]
    assert made["env_vars"] == {"HF_TOKEN": "t", "RAY_JOB_STOP_WAIT_TIME_S": "5"}
    assert made["pip"] == ["x"]
    assert made["excludes"] == ["__pycache__", "/zoo/cross-generation", "/zoo/base-instruct"]  # siblings is in the recipe
    assert int(environment({}, packed)["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) > 3  # a sweep ends cleanly in its own time


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "found list"),
        ("working_dir: .", "`working_dir` is what `submit` packs"),
        ("env_vars: [hush]", "`env_vars` is a list"),
        ("env_vars: {TOKEN: 123456789}", "`env_vars.TOKEN` is a int, expected text"),
        ("py_modules: hush", "`py_modules` is a str"),
        ("env_vars: {A: 'hush", "not valid YAML"),
        ("env_vars: !!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_a_runtime_environment_that_is_none_is_refused_without_its_secrets(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "env.yaml"
    path.write_text(text)
    with pytest.raises(JobError, match=words) as caught:
        read_environment(path)
    assert "hush" not in str(caught.value)
    assert "123456789" not in str(caught.value)


def test_the_runtime_environment_of_the_repository_is_one() -> None:
    assert read_environment(Path(__file__).parents[3] / "cluster" / "runtime-env.yaml")["env_vars"]


def test_resources_are_names_with_positive_amounts() -> None:
    assert read_resources(["head=1", "role-a=0.5"]) == {"head": 1, "role-a": 0.5}
    for wrong in ("head", "=1", "head=", "head=0", "head=-1", "head=inf", "head=nan"):
        with pytest.raises(JobError, match="NAME=N"):
            read_resources([wrong])


def test_a_submission_id_is_a_plain_word() -> None:
    assert check_id("tiny-1.a_B") == "tiny-1.a_B"
    for wrong in ("", "../version", "a/b", ".hidden", "a b", "a?x=1", "é", "a" * 151, "a\n"):
        with pytest.raises(JobError, match="no submission id"):
            check_id(wrong)


def test_a_packed_recipe_is_the_recipe(home: Path, luggage: Path) -> None:
    path = recipe(home, name="x")
    here, there = load_recipe(path).model_dump(), pack(path, [], luggage).recipe.model_dump()
    here["task"].pop("data"), there["task"].pop("data")
    assert here == there
