"""Tasks of lm-evaluation-harness: our engine gives the answers and scores that `lm_eval` itself gives the exported checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from transplant_ray.evaluate.engine import Engine
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.generate import GenerationSettings, end_ids
from transplant_ray.evaluate.outcome import Outcome, answer_examples
from transplant_ray.evaluate.prepared import Prepared, prepare_task
from transplant_ray.graft.export import export_checkpoint
from transplant_ray.graft.resident import ResidentPair, load_resident_pair
from transplant_ray.graft.variant import ORIGIN, Variant
from transplant_ray.models.checkpoint import open_checkpoint, read_generation_ends
from transplant_ray.models.compare import Comparison, compare
from transplant_ray.models.loading import load_model, load_tokenizer
from transplant_ray.recipe import TaskSpec
from transplant_ray.zoo import resolve

pytest.importorskip("lm_eval")

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"
NUM_ROWS = 48
SPLIT = {"probe": 10, "select": 18, "test": 20}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


@dataclass(frozen=True)
class Pair:
    comparison: Comparison
    resident: ResidentPair
    variant: Variant
    exported: Path


def make_pair(source: str, target: str, folder: Path, step: int) -> Pair:
    """One module of every `step` is the source's, resident and as a checkpoint."""
    comparison = compare(open_checkpoint(source), open_checkpoint(target))
    resident = load_resident_pair(comparison, "float32")
    variant = Variant.uniform(list(resident.modules)[::step])
    exported = export_checkpoint(comparison, variant, folder / "checkpoint", "card")
    return Pair(comparison, resident, variant, exported)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    sides = [f"zoo:cross-generation/{side}" for side in ("source", "target")]
    return make_pair(*sides, tmp_path_factory.mktemp("exported"), 2)


def write_data(folder: Path, file: str, choices_of: Callable[[str], list[str]]) -> Path:
    """Rows of the zoo, with choices near the answer, which comes first of them and goes to another place in every row."""
    lines = Path(resolve(file)).read_text().splitlines()[: NUM_ROWS + 20]
    rows = []
    for number, row in enumerate(map(json.loads, lines)):
        choices, place = choices_of(row["answer"]), number % 4
        choices[0], choices[place] = choices[place], choices[0]
        rows.append({**row, "choices": choices, "gold": place, "sentences": [f"{row['prompt']}{choice}" for choice in choices]})
    for name, part in (("test", rows[:NUM_ROWS]), ("train", rows[NUM_ROWS:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sums."""
    folder = tmp_path_factory.mktemp("data")
    file = "zoo:cross-generation/tasks/lost.jsonl"
    return write_data(folder, file, lambda answer: [str(int(answer) + more) for more in (0, 1, 2, 10)])


def mean_of(*metrics: str) -> list[dict[str, Any]]:
    return [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics]


REGEX = [{"function": "regex", "regex_pattern": "([0-9]+)"}, {"function": "take_first"}]
LAST_NUMBER = [{"function": "regex", "regex_pattern": "([0-9]+)", "group_select": -1}, {"function": "take_first"}]
WRITTEN: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_text": "{{prompt}}",
    "doc_to_target": "{{answer}}",
    "target_delimiter": "",
    "generation_kwargs": {"until": ["\n", "7"], "max_gen_toks": 6, "do_sample": False, "temperature": 0.0},
    "filter_list": [{"name": "strict", "filter": REGEX}, {"name": "loose", "filter": LAST_NUMBER}],
    "metric_list": mean_of("exact_match"),
}
CHOSEN = {
    "output_type": "multiple_choice",
    "doc_to_text": "prompt",
    "doc_to_target": "gold",
    "doc_to_choice": "choices",
    "target_delimiter": "",
    "metric_list": mean_of("acc", "acc_norm"),
}
TASKS: Mapping[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "written": (WRITTEN, {}, "exact_match", "strict"),
    "written by the other filter, with shots": (WRITTEN, {"num_fewshot": 2, "filter": "loose"}, "exact_match", "loose"),
    "written without filters": ({**WRITTEN, "filter_list": None, "repeats": 2}, {"max_new_tokens": 3}, "exact_match", "none"),
    "chosen": (CHOSEN, {}, "acc", "none"),
    "chosen by length": (CHOSEN, {"metric": "acc_norm", "num_fewshot": 1}, "acc_norm", "none"),
    "chosen after a space": ({**CHOSEN, "doc_to_text": "add {{prompt}} ", "target_delimiter": " "}, {}, "acc", "none"),
    "chosen against no prompt": ({**CHOSEN, "metric_list": mean_of("acc_mutual_info")}, {}, "acc_mutual_info", "none"),
    "chosen among beginnings": (
        {**CHOSEN, "doc_to_text": "{{gold}}", "doc_to_choice": "sentences", "doc_to_target": "."},
        {},
        "acc",
        "none",
    ),
    "heard": (
        {
            "output_type": "loglikelihood", "doc_to_text": "prompt", "doc_to_target": "answer", "metric_list": mean_of("acc"),
        },
        {},
        "acc",
        "none",
    ),
}  # fmt: skip


def write_task(folder: Path, data: Path, settings: Mapping[str, Any]) -> Path:
    files = {split: str(data / f"{split}.jsonl") for split in ("train", "test")}
    source = {"task": "sums", "dataset_path": "json", "dataset_kwargs": {"data_files": files}}
    splits = {"test_split": "test", "fewshot_split": "train"}
    path = folder / "sums.yaml"
    path.write_text(json.dumps({**source, **splits, **settings}))  # JSON is YAML
    return path


def prepare(pair: Pair, path: Path, **settings: Any) -> Prepared:
    spec = TaskSpec.model_validate({"lm_eval": str(path), "split": SPLIT, **settings})
    return prepare_task(spec, load_tokenizer(pair.comparison.target))


def everything(task: Prepared) -> list[Rendered]:
    return [example for examples in task.examples.values() for example in examples]


def settings_of(pair: Pair, task: Prepared) -> GenerationSettings:
    ends = end_ids(read_generation_ends(pair.comparison.target), load_tokenizer(pair.comparison.target))
    return GenerationSettings(task.max_new_tokens, ends, task.stop)


def ours(pair: Pair, task: Prepared) -> dict[str, Outcome]:
    """What the variant answers when it is packed with others, by the rows' prompts."""
    engine = Engine(pair.resident, load_tokenizer(pair.comparison.target), settings_of(pair, task), task.scorer)
    pack = [ORIGIN, pair.variant, Variant.uniform(pair.resident.modules)]
    shards = {shard.variant: shard for shard in engine.answer(pack, everything(task))}
    assert all(shard.error is None for shard in shards.values())
    return by_prompt(task, shards[pair.variant.id].outcomes)


def by_prompt(task: Prepared, outcomes: tuple[Outcome, ...]) -> dict[str, Outcome]:
    pairs = zip(everything(task), outcomes, strict=True)
    return {example.doc["prompt"]: outcome for example, outcome in pairs if example.doc is not None}


def theirs(pair: Pair, path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """`lm_eval` on the exported checkpoint."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(str(pair.exported), device="cpu", dtype="float32", batch_size=8)
    limit = settings.get("max_new_tokens")
    results: dict[str, Any] = lm_eval.simple_evaluate(
        model, tasks=[str(path)], task_manager=TaskManager(include_defaults=False), num_fewshot=settings.get("num_fewshot"),
        gen_kwargs={"max_gen_toks": limit} if limit else None, bootstrap_iters=0,
        apply_chat_template=settings.get("chat_template", False), system_instruction=settings.get("system"),
    )  # fmt: skip
    return results


def agreed_score(found: Mapping[str, Outcome], samples: Sequence[Any], metric: str, output_type: str) -> float:
    """Our score, once every answer and judgement is lm_eval's."""
    assert len(found) == len(samples) == NUM_ROWS
    for sample in samples:
        outcome = found[sample["doc"]["prompt"]]
        assert outcome.error is None
        assert outcome.correct is bool(sample[metric]), sample
        if output_type == "generate_until":
            assert outcome.completion == sample["resps"][0][0]
    return sum(outcome.correct for outcome in found.values()) / NUM_ROWS


@pytest.mark.parametrize("name", TASKS)
def test_answers_and_scores_are_those_of_lm_eval(pair: Pair, data: Path, tmp_path: Path, name: str) -> None:
    settings, given, metric, chosen = TASKS[name]
    path = write_task(tmp_path, data, settings)
    task = prepare(pair, path, **given)
    found, results = ours(pair, task), theirs(pair, path, given)
    samples = [sample for sample in results["samples"]["sums"] if sample["filter"] == chosen]
    score = agreed_score(found, samples, metric, settings["output_type"])
    assert score == pytest.approx(results["results"]["sums"][f"{metric},{chosen}"], abs=1e-9)
    assert 0 < score < 1 or given.get("num_fewshot") == 2  # the zoo never saw shots
    if settings["output_type"] == "generate_until":
        assert any(not outcome.parsed for outcome in found.values()) or chosen == "none"
        assert any("7" in sample["doc"]["answer"] for sample in samples)  # what ends a completion matters


# In a chat: the instruct model of the zoo has a template, and learnt two of its abilities through it.

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ ('' if m.role == 'system' else '<|' + m.role + '|>') + m.content }}"
    "{{ eos_token if m.role == 'assistant' and not loop.last }}{% endfor %}{{ '<|assistant|>' if add_generation_prompt }}"
)
"""Unlike the zoo's own it takes a system message."""
WORDS = {
    **WRITTEN,
    "generation_kwargs": {"until": ["E"], "max_gen_toks": 9},
    "filter_list": None,
    "target_delimiter": " ",
}  # fmt: skip
PICKED = {**CHOSEN, "target_delimiter": " ", "metric_list": mean_of("acc")}
CHATS: Mapping[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "written": (WORDS, {}, "zoo's"),
    "written after shots": (WORDS, {"num_fewshot": 2}, "zoo's"),
    "written to a system that the template refuses": (WORDS, {"system": "be short"}, "zoo's"),
    "written to a system": ({**WORDS, "description": "letters"}, {"system": "be short", "num_fewshot": 1}, "with system"),
    "written from a beginning": ({**WORDS, "gen_prefix": "A"}, {"num_fewshot": 1}, "with system"),
    "chosen": (PICKED, {}, "zoo's"),
    "chosen after shots": (PICKED, {"num_fewshot": 1}, "zoo's"),
    "chosen after a beginning": ({**PICKED, "gen_prefix": "so:"}, {"system": "be short"}, "with system"),
    "chosen among beginnings": (
        {**PICKED, "doc_to_text": "{{gold}}", "doc_to_choice": "sentences", "doc_to_target": "."},
        {},
        "zoo's",
    ),
    "heard": ({**PICKED, "output_type": "loglikelihood", "doc_to_target": "answer"}, {}, "zoo's"),
}


@pytest.fixture(scope="module")
def chat_pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    folder = tmp_path_factory.mktemp("chat")
    source, target = (resolve(f"zoo:base-instruct/{side}") for side in ("source", "target"))
    shutil.copytree(target, folder / "target")
    (folder / "target" / "chat_template.jinja").write_text(TEMPLATE)
    targets = {"zoo's": target, "with system": str(folder / "target")}
    return {name: make_pair(source, model, folder / name, 6) for name, model in targets.items()}


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    def near(answer: str) -> list[str]:
        return [answer, answer[::-1], answer[:-1] + answer[0], answer[1:]]

    return write_data(tmp_path_factory.mktemp("words"), "zoo:base-instruct/tasks/shared.jsonl", near)


@pytest.mark.parametrize("name", CHATS)
def test_in_a_chat_requests_and_answers_are_those_of_lm_eval(
    chat_pairs: dict[str, Pair], words: Path, tmp_path: Path, name: str
) -> None:
    settings, given, template = CHATS[name]
    metric = settings["metric_list"][0]["metric"]
    pair, given = chat_pairs[template], {"chat_template": True, **given}
    path = write_task(tmp_path, words, settings)
    task = prepare(pair, path, **given)
    found, results = ours(pair, task), theirs(pair, path, given)
    samples = results["samples"]["sums"]
    asked = {request[0] for sample in samples for request in sample["arguments"]}
    assert set(task.texts) == asked
    assert all("<|assistant|>" in text for text in asked)
    score = agreed_score(found, samples, metric, settings["output_type"])
    assert score == pytest.approx(results["results"]["sums"][f"{metric},none"], abs=1e-9)
    assert 0 < score < 1 or "shots" in name or template != "zoo's"  # the zoo never saw shots, and no system
    assert len({outcome.completion for outcome in found.values()}) > 5 or name == "chosen among beginnings"


@pytest.mark.parametrize("beginning", [None, "so:", "so: "])
def test_in_a_chat_the_reference_is_the_assistants_turn(
    chat_pairs: dict[str, Pair], words: Path, tmp_path: Path, beginning: str | None
) -> None:
    """A task's delimiter is for plain text; after a beginning of the answer the library writes a space where there is none."""
    path = write_task(tmp_path, words, {**WORDS, "gen_prefix": beginning})
    tokenizer = load_tokenizer(chat_pairs["zoo's"].comparison.target)
    for example in everything(prepare(chat_pairs["zoo's"], path, chat_template=True)):
        assert example.doc is not None
        said = example.doc["answer"] if beginning is None else f"so: {example.doc['answer']}"
        turns = [{"role": "user", "content": example.doc["prompt"]}, {"role": "assistant", "content": said}]
        assert tokenizer.decode(example.prompt_ids + example.answer_ids) == tokenizer.apply_chat_template(turns, tokenize=False)


@pytest.fixture
def babbler(tmp_path: Path) -> Path:
    """A model with room for long prompts that has learnt nothing, and the zoo's tokenizer."""
    tokenizer = load_tokenizer(open_checkpoint(resolve("zoo:siblings/target")))
    torch.manual_seed(0)
    shape = {"n_positions": 2048, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.5}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "babbler")
    tokenizer.save_pretrained(tmp_path / "babbler")
    return tmp_path / "babbler"


@pytest.mark.slow
@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not there")
def test_a_task_of_the_harness_by_its_name_on_its_own_data(babbler: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`lm_eval: gsm8k`: its prompts, shots and filters, with its data from a copy, for the hub is not reached from here."""
    import datasets
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    files = {split: str(GSM8K / f"{split}.jsonl") for split in ("train", "test")}
    rows = {split: datasets.load_dataset("json", data_files=files, split=f"{split}[:{NUM_ROWS}]") for split in files}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.DatasetDict(rows))
    checkpoint = open_checkpoint(str(babbler))
    tokenizer = load_tokenizer(checkpoint)
    spec = TaskSpec.model_validate({"lm_eval": "gsm8k", "split": SPLIT, "num_fewshot": 1, "max_new_tokens": 12})
    task = prepare_task(spec, tokenizer)
    settings = GenerationSettings(task.max_new_tokens, (tokenizer.eos_token_id,), task.stop)
    model = load_model(checkpoint, "float32")
    outcomes = answer_examples("v", model, tokenizer, everything(task), settings, task.scorer)
    mine = {example.doc["question"]: o for example, o in zip(everything(task), outcomes, strict=True) if example.doc}
    results: Any = lm_eval.simple_evaluate(
        HFLM(str(babbler), device="cpu", dtype="float32", batch_size=8, max_length=2048),
        tasks=["gsm8k"], num_fewshot=1, gen_kwargs={"max_gen_toks": 12}, bootstrap_iters=0,
    )  # fmt: skip
    samples = [sample for sample in results["samples"]["gsm8k"] if sample["filter"] == "strict-match"]
    assert len(samples) == len(mine) == NUM_ROWS
    for sample in samples:
        outcome = mine[sample["doc"]["question"]]
        assert outcome.completion == sample["resps"][0][0]
        assert outcome.correct is bool(sample["exact_match"])
    assert len({outcome.completion for outcome in mine.values()}) > 10


def test_log_likelihoods_are_those_of_lm_eval(pair: Pair, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transplant_ray.evaluate import outcome as module

    path = write_task(tmp_path, data, CHOSEN)
    task, heard = prepare(pair, path), {}
    judge = module.judge

    def listen(scorer: str, example: Rendered, said: Any) -> Any:
        assert example.doc is not None
        heard[example.doc["prompt"]] = said
        return judge(scorer, example, said)

    monkeypatch.setattr(module, "judge", listen)
    model = load_model(open_checkpoint(str(pair.exported)), "float32")
    tokenizer = load_tokenizer(pair.comparison.target)
    alone = answer_examples("v", model, tokenizer, everything(task), settings_of(pair, task), task.scorer)
    monkeypatch.undo()
    for sample in theirs(pair, path, {})["samples"]["sums"]:
        ours_heard, theirs_heard = heard[sample["doc"]["prompt"]], [response[0] for response in sample["resps"]]
        assert [likelihood for likelihood, _ in ours_heard] == pytest.approx([float(each[0]) for each in theirs_heard], abs=1e-4)
        assert [greedy for _, greedy in ours_heard] == [each[1] in (True, "True") for each in theirs_heard]
    assert {o.correct for o in alone} == {True, False}


def test_the_reference_is_what_shots_would_show(pair: Pair, data: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(pair.comparison.target)
    for settings in (WRITTEN, CHOSEN):
        task = prepare(pair, write_task(tmp_path, data, settings), num_fewshot=1)
        for example in everything(task):
            assert example.doc is not None
            assert tokenizer.decode(example.prompt_ids, skip_special_tokens=True).endswith(f"\n\n{example.doc['prompt']}")
            assert tokenizer.decode(example.answer_ids, skip_special_tokens=True) == example.doc["answer"] == example.answer
    splits = [[example.id for example in examples] for examples in task.examples.values()]
    plain = prepare(pair, write_task(tmp_path, data, CHOSEN))
    assert [[example.id for example in examples] for examples in plain.examples.values()] == splits  # shots change no split


@pytest.fixture
def recipe_of(data: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "name": "harness",
        "source": {"model": "zoo:cross-generation/source"},
        "target": {"model": "zoo:cross-generation/target"},
        "task": {"lm_eval": str(write_task(tmp_path, data, CHOSEN)), "split": SPLIT},
        "sweep": {"k": [2], "kind": ["all"]},
        "rank": {"by": ["depth"]},
        "storage": str(tmp_path / "runs"),
    }


def test_a_recipe_is_prepared_with_it(recipe_of: dict[str, Any]) -> None:
    from transplant_ray.pipeline.job import prepare as prepare_job
    from transplant_ray.recipe import parse_recipe

    job = prepare_job(parse_recipe(recipe_of))
    assert {split: len(examples) for split, examples in job.examples.items()} == SPLIT
    assert job.rules.scorer.startswith("lm_eval:")
    choices = [choice for examples in job.examples.values() for example in examples for choice in example.choices]
    assert job.generation.max_new_tokens == max(len(choice.answer_ids) for choice in choices)
