"""Every bad input of the issue's list, through the command line: what is said, the exit code, and that nothing is written.

In the tables, ` … ` stands for any text: every piece must be in the message, where and found first, what to do next last.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integration.helpers import Finished, Place, folder_bytes, run_main
from safetensors.torch import load_file, save_file
from tiny import CHARACTERS, save_tiny
from transformers import BertConfig, BertForMaskedLM

from transplant_ray.pipeline import sweeping

Spoil = Callable[[Place], object]

OVERRIDES: dict[str, dict[str, str]] = {
    "RecipeError": {
        "colour=red": "recipe.yaml: `colour` is not a key of a recipe",
        "sweep.kinds=[all]": "`sweep.kinds` is not a key of a recipe … Did you mean `sweep.kind`",
        "task.max_new_tokens=0": "`task.max_new_tokens` is 0 … greater than or equal to 1",
        "sweep.alpha=[1.5]": "`sweep.alpha` is [1.5] … add `sweep.extrapolate: true`",
        "sweep.race={rungs: [10, 40]}": "`sweep.race`: rung 40 has no effect, for there are 40 select examples",
        "sweep.screen={keep: 2}": "`sweep.screen.keep` is 2 … less than 1",
        "resources.batch_size=0": "`resources.batch_size` is 0 … a number of rows, 1 or more, or `auto`",
        "sweep.k=[1, 0]": "`sweep.k.1` is 0 … greater than or equal to 1",
        "sweep.k=[-2]": "`sweep.k.0` is -2 … greater than or equal to 1",
        "sweep.k=[]": "`sweep.k` is [] … at least one value",
        "sweep.kind=[down_prj]": "`sweep.kind`: 'down_prj' matches no compatible module … Nearest: down_proj",
        "rank.by=[lea]": "unknown ranker 'lea' … expected one of ['attribution',  … nearest: lae",
        "task.scorer=exakt": "unknown scorer 'exakt' … nearest: exact",
        "rank={by: [depth], trajectory: source}": "['trajectory'] has no effect … none of ['depth'] measures activations",
        "task.system=hello": "`system` has no effect without `chat_template: true`",
        "resources.gpus_per_model=1.5": "1.5 GPUs … fractions of one GPU, or gives whole ones",
        "sweep.k": "override 'sweep.k': expected key=value, for example sweep.k=[1,2]",
        "sweep.k=[": "override 'sweep.k=[': the value is not valid YAML",
        "name=../elsewhere": "`name` is '../elsewhere'",
        "source.model=zoo:nothing": "zoo:nothing: the zoo has no such file … e.g. zoo:cross-generation/source",
    },
    "DataError": {
        "task.data=nowhere.jsonl": "nowhere.jsonl: no such file … Give a .jsonl or .parquet file",
        "task.data=recipe.yaml": "recipe.yaml: … Give a .jsonl or .parquet file",
        'task.prompt="{promt}"': "row 1, `prompt`: no column 'promt'; columns are prompt, answer … Did you mean {prompt}?",
        'task.prompt="{prompt"': "template '{prompt' is malformed … {{ for a brace",
        "task.split.test=90": "90 examples, the splits need 138 … Make `task.split` smaller or add rows",
        "task.chat_template=true": "`task.chat_template: true`: the target's tokenizer has no chat template … Set it to false",
        "task.scorer=forced": "`scorer: forced`: the answer of example … could never be right. Use task.max_new_tokens=",
        "task.max_new_tokens=128": "exceed the model's 128 positions … Lower `task.max_new_tokens`",
    },
    "CheckpointError": {
        "source.model=./nowhere": "nowhere: no such folder … or a hub id",
        "target.model=./nowhere": "nowhere: no such folder … or a hub id",
        "source.revision=main": "`revision: main` has no effect on a local folder … Remove it",
    },
}
"""Override → what is said, by the error."""


def empty_data(place: Place) -> None:
    write_answers(place, [])


def data_that_is_no_json(place: Place) -> None:
    (place.path / "answers.jsonl").write_text("oh\n")


def rows_that_are_no_objects(place: Place) -> None:
    write_answers(place, [1])


def duplicate_examples(place: Place) -> None:
    rows = [json.loads(line) for line in (place.path / "answers.jsonl").read_text().splitlines()]
    write_answers(place, [*rows, rows[0]])


def empty_answer(place: Place) -> None:
    write_answers(place, [{"prompt": "1+1=", "answer": " "}])


def empty_column(place: Place) -> None:
    write_answers(place, [{"prompt": "1+1=", "answer": None}])


def no_weights(place: Place) -> None:
    weights(place).unlink()


def no_config(place: Place) -> None:
    (place.path / "source" / "config.json").unlink()


def encoder(place: Place) -> None:
    shutil.rmtree(place.path / "source")
    config = BertConfig(vocab_size=48, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertForMaskedLM(config).save_pretrained(place.path / "source")


def quantised(place: Place) -> None:
    edit_json(place.path / "source" / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})


def only_pickle(place: Place) -> None:
    torch.save(load_file(weights(place)), place.path / "source" / "pytorch_model.bin")
    weights(place).unlink()


def missing_shard(place: Place) -> None:
    next(sharded(place).parent.glob("model-00001*")).unlink()


def shard_outside_the_folder(place: Place) -> None:
    path = sharded(place)
    weight_map = json.loads(path.read_text())["weight_map"]
    edit_json(path, weight_map={**weight_map, next(iter(weight_map)): "../target/model.safetensors"})


def broken_index(place: Place) -> None:
    sharded(place).write_text("{")


def truncated_weights(place: Place) -> None:
    weights(place).write_bytes(weights(place).read_bytes()[:50_000])


def truncated_header(place: Place) -> None:
    weights(place).write_bytes(weights(place).read_bytes()[:100])


def corrupt_header(place: Place) -> None:
    weights(place).write_bytes((2).to_bytes(8, "little") + b"{!")


def other_size(place: Place) -> None:
    shutil.rmtree(place.path / "source")
    save_tiny(place.path / "source", hidden_size=16)


def other_vocabulary(place: Place) -> None:
    path = place.path / "source" / "tokenizer.json"
    first, second = CHARACTERS[:2]
    model = json.loads(path.read_text())["model"]
    vocabulary = model["vocab"]
    edit_json(path, model={**model, "vocab": {**vocabulary, first: vocabulary[second], second: vocabulary[first]}})


def other_segmentation(place: Place) -> None:
    edit_json(place.path / "source" / "tokenizer.json", post_processor=None)  # no `<s>` in front


SPOILT: dict[Spoil, tuple[str, str]] = {
    empty_data: ("DataError", "answers.jsonl: holds no rows"),
    data_that_is_no_json: ("DataError", "answers.jsonl, line 1: not JSON … Expected one object a line"),
    rows_that_are_no_objects: ("DataError", "line 1: found int, expected one JSON object a line"),
    duplicate_examples: ("DataError", "answers.jsonl: 1 duplicate examples … remove the duplicates"),
    empty_answer: ("DataError", "row 1: the reference answer is empty … Remove the row or mend the `answer` template"),
    empty_column: ("DataError", "row 1, `answer`: column 'answer' is empty … Fill it or remove the row"),
    no_weights: ("CheckpointError", "source: neither model.safetensors nor … Expected a checkpoint in safetensors"),
    no_config: ("CheckpointError", "source: config.json cannot be read … Expected the config of a decoder"),
    encoder: ("CheckpointError", "source: bert is not a decoder … Expected a causal language model"),
    quantised: ("CheckpointError", "source: the weights are quantised … Use the full-precision checkpoint"),
    only_pickle: ("CheckpointError", "source: only pickle weights (pytorch_model.bin) … accept: [pickle]"),
    missing_shard: ("CheckpointError", "shard 'model-00001-of … is missing … Download the checkpoint again"),
    shard_outside_the_folder: ("CheckpointError", "index.json … '../target/model.safetensors' … in the same folder"),
    broken_index: ("CheckpointError", "index.json: not a shard index … Download it again"),
    truncated_weights: ("CheckpointError", "model.safetensors: truncated … 50000 bytes … Download it again"),
    truncated_header: ("CheckpointError", "model.safetensors: truncated … 100 bytes … Download it again"),
    corrupt_header: ("CheckpointError", "model.safetensors: … header is corrupt … Download it again"),
    other_size: (
        "IncompatibleModels",
        "no compatible module … source is (16, 16), target is (32, 32) … models of one family and size",
    ),
    other_vocabulary: ("IncompatibleModels", "2 tokens differ, e.g. 'a' is 4 in the source and 3 in the target … [vocabulary]"),
    other_segmentation: ("IncompatibleModels", "segmentation: the prompt … accept: [segmentation]"),
}
"""What a file was turned into → the error and what is said."""


@pytest.fixture(autouse=True)
def nothing_starts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where MLflow or Ray is reached, but in tests that have a cluster."""
    if "cluster" not in request.fixturenames:
        monkeypatch.setattr(sweeping, "tracked", lambda *_: pytest.fail("MLflow was told"))
        monkeypatch.setattr(sweeping, "connect", lambda _: pytest.fail("Ray was started"))


def check_refused(finished: Finished, error: str, words: str) -> None:
    assert finished.code == 2, finished.out
    assert f"{error}: " in finished.err
    assert [piece for piece in words.split(" … ") if piece not in finished.err] == [], finished.err
    assert "Traceback" not in finished.err


@pytest.mark.parametrize(
    ("error", "override", "words"), [(error, *case) for error, cases in OVERRIDES.items() for case in cases.items()]
)
def test_a_recipe_that_cannot_be_is_refused_and_nothing_is_written(place: Place, error: str, override: str, words: str) -> None:
    recipe = place.recipe()
    before = folder_bytes(place.path)
    check_refused(run_main("sweep", recipe, override), error, words)
    assert folder_bytes(place.path) == before


@pytest.mark.parametrize("spoil", SPOILT, ids=lambda spoil: spoil.__name__)
def test_files_that_cannot_be_used_are_refused_and_nothing_is_written(place: Place, spoil: Spoil) -> None:
    recipe = place.recipe()
    spoil(place)
    before = folder_bytes(place.path)
    check_refused(run_main("sweep", recipe), *SPOILT[spoil])
    assert folder_bytes(place.path) == before


@pytest.mark.parametrize("error", OVERRIDES)
@pytest.mark.parametrize("command", ["plan", "rank"])
def test_plan_and_rank_refuse_what_a_sweep_refuses(place: Place, command: str, error: str) -> None:
    override, words = next(iter(OVERRIDES[error].items()))
    check_refused(run_main(command, place.recipe(), override), error, words)


def test_a_key_that_is_missing_is_named(place: Place) -> None:
    recipe = place.recipe(task={key: value for key, value in place.task.items() if key != "prompt"})
    check_refused(run_main("sweep", recipe), "RecipeError", "recipe.yaml: `task.prompt` is missing … no default")


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def write_answers(place: Place, rows: list[Any]) -> None:
    (place.path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def weights(place: Place) -> Path:
    return place.path / "source" / "model.safetensors"


def sharded(place: Place) -> Path:
    """Make the source a sharded checkpoint; returns its index."""
    shutil.rmtree(place.path / "source")
    save_tiny(place.path / "source", seed=1, shard="20KB")
    return place.path / "source" / "model.safetensors.index.json"


@pytest.mark.parametrize("text", ["", "[1, 2]", "name: [", "name: a\nname: b\n", "\x00", None])
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    check_refused(run_main("sweep", path), "RecipeError", f"{path}: ")


def test_storage_that_cannot_be_written_is_refused(place: Place, cluster: None) -> None:  # noqa: ARG001
    finished = run_main("sweep", place.recipe(storage=str(place.path / "answers.jsonl")))
    check_refused(finished, "RunError", "answers.jsonl … Choose another `storage`")


ACCEPTED = {"vocabulary": other_vocabulary, "segmentation": other_segmentation, "pickle": only_pickle}


@pytest.mark.parametrize(("accept", "spoil"), ACCEPTED.items())
def test_what_the_recipe_accepts_is_not_refused(place: Place, accept: str, spoil: Spoil) -> None:
    spoil(place)
    assert run_main("plan", place.recipe()).code == 2
    finished = run_main("plan", place.recipe(accept=[accept]))
    assert finished.code == 0, finished.err


def test_a_tokenizer_without_a_pad_token_is_handled(place: Place) -> None:
    for role in ("source", "target"):
        path = place.path / role / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        del settings["pad_token"]
        path.write_text(json.dumps(settings))
    finished = run_main("plan", place.recipe(), "--measure")
    assert finished.code == 0, finished.err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_when_they_are_loaded(place: Place, value: float) -> None:
    spoil_weight(place, value)
    finished = run_main("plan", place.recipe(), "--measure")  # loads in this process, by the code that every actor loads with
    check_refused(finished, "NumericsError", "source: model.layers.1.mlp.up_proj.weight holds 1 NaN … download it again")


def test_an_error_in_an_actor_arrives_as_it_was_raised(place: Place, cluster: None) -> None:  # noqa: ARG001
    # Through Ray once: it costs the start of two actors.
    spoil_weight(place, float("nan"))
    finished = run_main("rank", place.recipe())
    check_refused(finished, "NumericsError", "source: model.layers.1.mlp.up_proj.weight holds 1 NaN … download it again")
    assert not (place.path / "runs" / "tiny" / "rankings.parquet").exists()


def spoil_weight(place: Place, value: float) -> None:
    tensors = load_file(weights(place))
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, weights(place), metadata={"format": "pt"})
