"""Tasks of lm-evaluation-harness on our engine: its requests and its scores, our splits, variants and batches.

A task is loaded where the sweep is prepared. The harness builds its requests over all its evaluation documents, few-shot contexts
included; each document becomes an example. `harness_judge` scores what models answer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from difflib import get_close_matches
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from transplant_ray.errors import DataError, RecipeError
from transplant_ray.evaluate.example import Example, Rendered, longest_choice
from transplant_ray.evaluate.harness_code import check_code
from transplant_ray.evaluate.harness_judge import INSTALL, judge
from transplant_ray.evaluate.harness_process import Heard, JudgeSpec, library_tasks, sandbox_templates
from transplant_ray.evaluate.prepared import SPLITS, Prepared
from transplant_ray.evaluate.task import split_examples
from transplant_ray.recipe import TaskSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEEDS = {"random": 0, "numpy": 1234, "shots": 1234}
"""The defaults of `lm_eval`: some tasks shuffle as they are loaded, and shots are drawn."""

DEFAULT_NEW_TOKENS = 256
HARMLESS = frozenset({"do_sample", "temperature", "top_p", "top_k", "until"})
"""Settings of greedy decoding that change nothing, once it is known to be greedy, or that are taken over."""
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of the limit, in the order in which the harness prefers them."""

TRIED = 8
"""Examples on which metrics are tried before a sweep."""


def load_harness_task(spec: TaskSpec, name: str, tokenizer: PreTrainedTokenizerBase, accept: Collection[str]) -> Prepared:
    """The task as models are asked it. RecipeError where it cannot be used here, DataError where its data cannot."""
    if find_spec("lm_eval") is None:
        raise RecipeError(f"`task.lm_eval: {name}`: lm-evaluation-harness is not installed. Install it with {INSTALL}.")
    from transplant_ray.evaluate.harness_tokens import RequestEncoder

    sandbox_templates()
    path = _find(name, accept)
    encoder = RequestEncoder(tokenizer)
    with _as_in_lm_eval():
        task = _load(path, name)
        _check_task(task, name, accept)
        _set_shots(task, spec)
        by_document = _requests(task, spec, encoder, name)
    documents = [_Document(task, requests, encoder, spec.chat_template) for requests in by_document]
    known = {document.id: document for document in reversed(documents)}  # of equal rows, the first stays
    drawn = split_examples([Example(document, "", "") for document in known], spec.split, name)
    examples = {split: tuple(known[example.id].rendered() for example in drawn[split]) for split in SPLITS}
    everything = [example for split in SPLITS for example in examples[split]]
    limit, stop = (
        _limits(spec, by_document[0][0].args[1], name) if task.OUTPUT_TYPE == "generate_until" else (longest_choice(everything), ())
    )
    texts = tuple(dict.fromkeys(str(request.args[0]) for example in everything for request in known[example.id].requests))
    scorer = _choose_metric(task, spec, path, everything, name)
    prompts = {example.id: str(known[example.id].requests[0].args[0]) for example in everything}
    return Prepared(examples, prompts, texts, scorer, limit, stop)


def _find(name: str, accept: Collection[str]) -> Path:
    """The YAML file of a task. A file that runs code is refused; the library's own are as trusted as the library."""
    from lm_eval.tasks import TaskManager

    if name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser().resolve()
        if "task_code" not in accept:
            check_code(path, library_tasks())
        return path
    manager = TaskManager()
    entry = manager.task_index.get(name)
    if name in manager.all_subtasks and entry is not None and entry.yaml_path is not None and entry.kind.name == "TASK":
        return Path(entry.yaml_path)
    if name in manager.all_groups or name in manager.all_tags:
        raise RecipeError(f"`task.lm_eval: {name}` stands for several tasks. Name one of them: `lm_eval ls tasks` lists them.")
    if entry is not None:
        raise RecipeError(
            f"`task.lm_eval: {name}` is made by a Python class of its own, and only tasks of a YAML file can be used."
        )
    near = get_close_matches(name, manager.all_subtasks, n=3)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise RecipeError(f"`task.lm_eval: {name}`: no such task.{hint} Give a name that `lm_eval ls tasks` lists, or a YAML file.")


@contextmanager
def _as_in_lm_eval() -> Iterator[None]:
    """Python's and numpy's generators as `lm_eval` sets them, and afterwards as they were; its progress bars are not shown."""
    python, vectors = random.getstate(), np.random.get_state()
    random.seed(SEEDS["random"])
    np.random.seed(SEEDS["numpy"])
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(vectors)
        log.setLevel(level)


def _load(path: Path, name: str) -> Any:
    from lm_eval.tasks import TaskManager

    try:
        loaded = TaskManager(include_defaults=False).load(str(path))
    except Exception as error:  # a task may run functions of its own, and what they and the library raise is nothing narrower
        raise DataError(f"`task.lm_eval: {name}`: cannot be loaded ({type(error).__name__}: {error}).") from error
    if loaded.get("groups") or len(loaded["tasks"]) != 1:
        raise RecipeError(f"`task.lm_eval: {name}` stands for several tasks. Name one of them.")
    (task,) = loaded["tasks"].values()
    return task


def _check_task(task: Any, name: str, accept: Collection[str]) -> None:
    if getattr(task, "UNSAFE_CODE", False) and "task_code" not in accept:
        raise RecipeError(
            f"`task.lm_eval: {name}` runs code that the models write. Where that is meant, add `accept: [task_code]` to the recipe."
        )
    if task.OUTPUT_TYPE not in ("generate_until", "multiple_choice", "loglikelihood") or getattr(task, "MULTIMODAL", False):
        raise RecipeError(
            f"`task.lm_eval: {name}` asks for {'images or sound' if getattr(task, 'MULTIMODAL', False) else task.OUTPUT_TYPE}; "
            "expected generate_until, multiple_choice or loglikelihood, on text."
        )


def _set_shots(task: Any, spec: TaskSpec) -> None:
    own = task.config.num_fewshot
    if own == 0 and spec.num_fewshot:
        raise RecipeError("`task.num_fewshot` has no effect: the task says that it has 0 shots, and the harness keeps to that.")
    if spec.num_fewshot is not None or own is None:
        task.set_config(key="num_fewshot", value=spec.num_fewshot or 0)
    task.set_fewshot_seed(seed=SEEDS["shots"])


def _requests(task: Any, spec: TaskSpec, encoder: Any, name: str) -> list[list[Any]]:
    """Requests of every document, in the order of the documents: those of a whole evaluation, whose shots are drawn in turn."""
    if spec.chat_template and not encoder.tokenizer.chat_template:
        raise DataError("`task.chat_template: true`: the target's tokenizer has no chat template. Set it to false.")
    chat = {"apply_chat_template": True, "fewshot_as_multiturn": True, "chat_template": encoder.apply_chat_template}
    try:
        task.build_all_requests(system_instruction=spec.system, **(chat if spec.chat_template else {}))
    except Exception as error:  # functions of the task, too: they make its prompts
        raise DataError(f"`task.lm_eval: {name}`: requests cannot be made ({type(error).__name__}: {error}).") from error
    by_document: dict[int, list[Any]] = defaultdict(list)
    for request in task.instances:
        by_document[request.doc_id].append(request)
    return [sorted(requests, key=lambda request: request.idx) for requests in by_document.values()]


class _Document:
    """A row of a task with its requests."""

    def __init__(self, task: Any, requests: Sequence[Any], encoder: Any, chat: bool) -> None:
        self.task, self.requests, self.encoder, self.chat = task, requests, encoder, chat
        self.doc: dict[str, Any] = dict(requests[0].doc)
        text = json.dumps(self.doc, sort_keys=True, ensure_ascii=False, default=str)
        self.id = hashlib.sha256(text.encode()).hexdigest()[:16]

    def rendered(self) -> Rendered:
        return self._written() if self.task.OUTPUT_TYPE == "generate_until" else self._read()

    def _written(self) -> Rendered:
        """The reference follows the prompt as it follows the questions of shots."""
        (context, _), answer = self.requests[0].args, self._target()
        prompt = self.encoder.prompt(context)
        text = context + self._delimiter(answer) + answer
        reference = self.encoder.encode(text, self.encoder.tokenizer.bos_token)[len(prompt) :]
        end = [] if self.encoder.tokenizer.eos_token_id is None else [self.encoder.eot_token_id]
        if not prompt:
            raise DataError(f"example {self.id}: the prompt is empty after tokenization.")
        return Rendered(self.id, tuple(prompt), (*reference, *end), answer, doc=self.doc)

    def _delimiter(self, answer: str) -> str:
        """What stands before the answer: after a beginning of it a space where there is none, and in a chat nothing."""
        from lm_eval.api.utils import requires_delimiter

        if beginning := self.task.doc_to_prefix(self.doc):
            return " " if answer and requires_delimiter(beginning, answer) else ""
        return "" if self.chat else str(self.task.config.target_delimiter)

    def _read(self) -> Rendered:
        """Every request is a choice; of a task without choices there is one."""
        pairs = self.encoder.pairs(self.requests)
        choices = tuple(
            Rendered(f"{self.id}/{place}", tuple(context), tuple(continuation), request.args[1])
            for place, (request, (context, continuation)) in enumerate(zip(self.requests, pairs, strict=True))
        )
        if not all(choice.answer_ids for choice in choices):
            raise DataError(f"example {self.id}: a choice is empty after tokenization.")
        right = choices[self._gold() if len(choices) > 1 else 0]
        return Rendered(self.id, right.prompt_ids, right.answer_ids, right.answer, choices, self.doc)

    def _target(self) -> str:
        target = self.task.doc_to_target(self.doc)
        target = target[0] if isinstance(target, list) and target else target
        if isinstance(target, int) and self.task.config.doc_to_choice is not None:
            target = self.task.doc_to_choice(self.doc)[target]
        return str(target)

    def _gold(self) -> int:
        """Place of the right choice; of several, the first."""
        gold = self.task.doc_to_text(self.doc) if self.task.multiple_input else self.task.doc_to_target(self.doc)
        gold = gold[0] if isinstance(gold, list) and gold else gold
        choices = self.task.doc_to_choice(self.doc)
        place = choices.index(gold) if gold in choices else gold
        if not isinstance(place, int) or not 0 <= place < len(choices):
            raise DataError(f"example {self.id}: the answer {gold!r} is none of the choices {choices}.")
        return place


def _limits(spec: TaskSpec, settings: Mapping[str, Any], name: str) -> tuple[int, tuple[str, ...]]:
    """Most new tokens, and what ends a completion. RecipeError where more than greedy decoding is asked for."""
    others = sorted(settings.keys() - HARMLESS - set(LIMITS))
    if settings.get("do_sample") or others:
        asked = "sampling (`do_sample: true`)" if settings.get("do_sample") else f"{others}"
        raise RecipeError(f"`task.lm_eval: {name}`: its `generation_kwargs` ask for {asked}, and completions here are greedy.")
    limits = [settings[key] for key in LIMITS if settings.get(key) is not None]
    until = settings.get("until") or []
    stop = tuple(text for text in (until if isinstance(until, list) else [until]) if text)
    return spec.max_new_tokens or int(limits[0] if limits else DEFAULT_NEW_TOKENS), stop


def _choose_metric(task: Any, spec: TaskSpec, path: Path, examples: Sequence[Rendered], name: str) -> str:
    """The scorer: the filter and the metric that count. Metrics are tried on a few answers: only 0 and 1 are wrong and right."""
    if task.OUTPUT_TYPE != "generate_until" and spec.max_new_tokens is not None:
        raise RecipeError(f"`task.max_new_tokens` has no effect: `lm_eval: {name}` reads choices, and decodes nothing.")
    filters = [each["name"] for each in task.config.filter_list or ()] or ["none"]
    metrics = [metric for metric, how in task.aggregation().items() if getattr(how, "__name__", "") == "mean"]
    _check_named("filter", spec.filter, filters, name)
    _check_named("metric", spec.metric, list(task.aggregation()), name)
    library, troubles = library_tasks(), []
    file = str(path.relative_to(library)) if path.is_relative_to(library) else str(path)
    for metric in [spec.metric] if spec.metric else metrics:
        of_task = (tuple(task.features), task.multiple_input, task.multiple_target)
        scorer = JudgeSpec(file, metric, spec.filter or filters[0], *of_task).scorer
        trouble = _try(task, scorer, metric, examples)
        if trouble is None:
            return scorer
        troubles.append(trouble)
    found = "; ".join(troubles) or f"its metrics are {list(task.aggregation())}, and none is a mean"
    raise RecipeError(
        f"`task.lm_eval: {name}`: no metric says right or wrong of one example: {found}. Choose another task or `metric`."
    )


def _check_named(what: str, given: str | None, known: Sequence[str], name: str) -> None:
    if given is not None and given not in known:
        raise RecipeError(f"`task.{what}` is {given!r}; `lm_eval: {name}` has {list(known)}.")


def _try(task: Any, scorer: str, metric: str, examples: Sequence[Rendered]) -> str | None:
    """Why the metric does not say right or wrong; None where it does."""
    if not task.higher_is_better().get(metric, True):
        return f"of {metric} less is better"
    for place, example in enumerate(examples[:TRIED]):
        for heard in _tried(example, place):
            if (error := judge(scorer, example, heard).error) is not None:
                return error
    return None


def _tried(example: Rendered, place: int) -> Iterator[list[Heard]]:
    """Answers of a made-up model: the reference, parts of it and nothing; or choices, each likeliest in turn."""
    if not example.choices:
        half = example.answer[: len(example.answer) // 2]
        for text in (example.answer, half, f"{half} {example.answer} and more", ""):
            yield [text]
    else:
        number = len(example.choices)
        yield [(-1.0 - (other + place) % number, (other + place) % number == 0) for other in range(number)]
