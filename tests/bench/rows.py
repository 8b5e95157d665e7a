"""What is measured: one function a row, each with its bar."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from measure import TensorBytes, interleaved, peak_above_baseline, seconds_of
from peers import HOW_TO_MAKE, Peers
from processes import run_and_weigh
from table import Row
from tiny import tiny_pair

from transplant_ray import zoo
from transplant_ray.evaluate.generate import length_batches
from transplant_ray.evaluate.outcome import answer_examples
from transplant_ray.graft.card import write_card
from transplant_ray.graft.export import export_checkpoint
from transplant_ray.graft.resident import load_resident_pair
from transplant_ray.graft.variant import Variant
from transplant_ray.models.checkpoint import open_checkpoint
from transplant_ray.models.compare import Comparison, compare
from transplant_ray.models.loading import load_model, load_tokenizer
from transplant_ray.pipeline.job import Job, prepare
from transplant_ray.probe.statistics import replay
from transplant_ray.recipe import load_recipe

PAIR = "cross-generation"


def demo(options: Namespace) -> Iterator[Row]:
    """As a user's first run: a new folder, so a new database; Ray and MLflow start; threads as the machine has."""
    command = [str(Path(sys.executable).with_name("transplant-ray")), "demo", *(["sweep.k=[4]"] if options.quick else [])]
    env = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "RAY_ADDRESS")}
    with TemporaryDirectory() as folder:
        seconds, peak = run_and_weigh(command, Path(folder), env)
        stages = json.loads(Path(folder, "runs", PAIR, "summary.json").read_text())["seconds"]
    shown = ", ".join(f"{stage} {value:.1f}" for stage, value in {**stages, "else": seconds - sum(stages.values())}.items())
    sizes = f"zoo {' '.join([PAIR, *command[2:]])}"
    yield Row("demo: wall time", sizes, "1, first run", f"{seconds:.1f} s ({shown})", "< 120 s", seconds < 120)
    yield Row("demo: peak of all processes (PSS)", sizes, "1, every 0.5 s", f"{peak / 1e9:.2f} GB", "< 6 GB", peak < 6e9)


def variant(options: Namespace) -> Iterator[Row]:
    """Ours beyond the first variant, with the one thread that an evaluator has; the peers get one thread too."""
    job = _zoo_job()
    chosen = Variant.uniform(list(job.comparison.pairs)[:8])
    ours, correct = _seconds_per_variant(job, chosen, 8 if options.quick else 24)
    sizes = f"zoo {PAIR}, n = {len(job.examples['select'])}, 1 thread"
    yield Row("variant: resident pair", f"{sizes}, variants of the plan", f"median of {len(ours)}", f"{median(ours):.3f} s")
    sizes += f", 8 of {len(job.comparison.pairs)} modules"
    what, bar, rounds, warm_rounds = "variant: mergekit-yaml, then lm_eval", "≥ 20 ×", *((1, 1) if options.quick else (2, 5))
    if not (options.peers / "bin" / "mergekit-yaml").exists():
        yield Row(what, sizes, "0", HOW_TO_MAKE, bar)
        return
    with TemporaryDirectory() as folder:
        peers = Peers(options.peers, Path(folder))
        peers.prepare(job, chosen)
        merge, evaluate = min((peers.round() for _ in range(rounds)), key=sum)
        peers.check_same_weights(export_checkpoint(job.comparison, chosen, Path(folder, "ours"), card=""))
        theirs, warm = peers.accuracy(), peers.without_start(warm_rounds)
    ratio = (merge + evaluate) / median(ours)
    same = f"equal tensors, accuracy {correct:.4f} (ours) and {theirs:.4f}"
    result = f"{merge:.1f} + {evaluate:.1f} s = {ratio:.0f} × ours; {same}"
    yield Row(what, sizes, f"best of {rounds}", result, bar, ratio >= 20 and abs(correct - theirs) < 1e-9)
    result = f"{warm[0]:.2f} + {warm[1]:.2f} s = {sum(warm) / median(ours):.1f} × ours"
    yield Row("variant: theirs in one warm process, no start-up", sizes, f"median of {warm_rounds}", result)


def graft(options: Namespace) -> Iterator[Row]:
    rounds = 21 if options.quick else 101
    for name, comparison in _pairs():
        pair = load_resident_pair(comparison, "float32")
        calls = {"apply": partial(pair.apply, Variant.uniform(pair.modules)), "undo": pair.undo}
        sizes = f"{name}, {len(pair.modules)} modules, {comparison.target.num_parameters / 1e6:.1f} M parameters"
        for verb, seconds in interleaved(calls, rounds).items():
            each = median(seconds) / len(pair.modules)
            yield Row(f"graft: {verb}, a module", sizes, f"median of {rounds}", f"{each * 1e6:.1f} µs", "< 1 ms", each < 1e-3)
        with TensorBytes() as swapped:
            [call() for call in calls.values()]
        with TensorBytes() as blended:  # shows that the scale works
            pair.apply(Variant.uniform(pair.modules, 0.5))
        result = f"{swapped.total} B (a blend at 0.5 makes {blended.total / 1e6:.0f} MB)"
        yield Row("graft: tensors made", sizes, "1 apply, 1 undo", result, "no copy", swapped.total == 0 < blended.total)


def hooks(options: Namespace) -> Iterator[Row]:
    """All that the probe does for its statistics, the hooks and what is around them, against the forward pass alone."""
    probe = _zoo_job().examples["probe"]
    for (name, comparison), batch, rounds in zip(_pairs(), (64, 16), (101, 15), strict=True):
        examples = [probe[i] for i in next(length_batches([len(e.prompt_ids) for e in probe], batch))]
        texts, modules = [example.answer_ids for example in examples], tuple(comparison.pairs)
        model = load_model(comparison.target, "float32")
        hooked = partial(replay, model, examples, texts, modules)
        inputs = _inputs_of(model.base_model, hooked)
        bare = torch.inference_mode()(partial(model.base_model, **inputs))
        seconds = interleaved({"bare": bare, "hooked": hooked}, 7 if options.quick else rounds)
        ratio = median(a / b for a, b in zip(seconds["hooked"], seconds["bare"], strict=True))
        tokens = " × ".join(map(str, inputs["input_ids"].shape))
        sizes = f"{name}, {len(modules)} modules, {tokens} tokens, {sum(map(len, texts))} steps, 1 thread"
        result, repetitions = f"{ratio:.3f} × {median(seconds['bare']) * 1e3:.1f} ms", f"median of {len(seconds['bare'])}, A/B"
        yield Row("hooks: probe ÷ bare forward", sizes, repetitions, result, "≤ 1.15 ×", ratio <= 1.15)


def export(options: Namespace) -> Iterator[Row]:
    rounds = 1 if options.quick else 5
    with TemporaryDirectory() as folder:
        comparison = tiny_pair(Path(folder), shard="52MB", **_shape(512))
        shards = [Path(folder, "target", file).stat().st_size for file in comparison.target.weight_files()]
        for coefficient in (1.0, 0.5):
            with get_context("spawn").Pool(1, maxtasksperchild=1) as processes:  # each export in a process of its own
                done = [processes.apply(_export_once, (folder, coefficient)) for _ in range(rounds)]
            seconds, peak, bar = median(s for s, _ in done), max(p for _, p in done), 1.2 * max(shards)
            sizes = f"{sum(shards) / 1e6:.0f} MB in {len(shards)} shards, all {len(comparison.pairs)} modules at {coefficient:g}"
            result = f"{seconds:.2f} s; {peak / 1e6:.1f} MB above baseline = {peak / max(shards):.2f} × the largest shard"
            yield Row("export: seconds, peak memory", sizes, f"median, maximum of {rounds}", result, "≤ 1.2 ×", peak <= bar)


ROWS = {"demo": demo, "variant": variant, "graft": graft, "hooks": hooks, "export": export}


def _seconds_per_variant(job: Job, chosen: Variant, count: int) -> tuple[list[float], float]:
    """Seconds of `count` variants of the plan, answered as an evaluator does, and the accuracy of `chosen`."""
    size, examples = job.recipe.resources.shard_size, job.examples["select"]
    pair, tokenizer = load_resident_pair(job.comparison, job.recipe.resources.dtype), load_tokenizer(job.comparison.target)
    shards = [examples[start : start + size] for start in range(0, len(examples), size)]

    def answer(v: Variant) -> list[bool]:
        pair.apply(v)
        ask = partial(answer_examples, v.id, pair.model, tokenizer, settings=job.generation, scorer=job.recipe.task.scorer)
        return [outcome.correct for shard in shards for outcome in ask(shard)]

    correct = sum(answer(chosen)) / len(examples)
    return [seconds_of(partial(answer, v)) for v in job.provisional_plan().variants[:count]], correct


def _inputs_of(module: torch.nn.Module, call: partial[Any]) -> dict[str, Any]:
    """The keyword arguments that `call` gives to `module`."""
    seen: dict[str, Any] = {}
    handle = module.register_forward_pre_hook(lambda _module, _args, kwargs: seen.update(kwargs), with_kwargs=True)
    call()
    handle.remove()
    return seen


def _export_once(folder: str, coefficient: float) -> tuple[float, int]:
    comparison = compare(open_checkpoint(f"{folder}/source"), open_checkpoint(f"{folder}/target"))
    changed = Variant.uniform(comparison.pairs, coefficient)
    card = partial(write_card, "bench", comparison, changed, [])
    return peak_above_baseline(lambda: export_checkpoint(comparison, changed, Path(folder, "out"), card(), replace=True))


def _zoo_job() -> Job:
    return prepare(load_recipe(zoo.recipe_path(PAIR)))


def _pairs() -> Iterator[tuple[str, Comparison]]:
    small = _zoo_job().comparison
    yield f"zoo {PAIR}", small
    with TemporaryDirectory() as folder:  # the zoo's vocabulary, so that its prompts fit
        yield "random Llama, 16 × 1024", tiny_pair(Path(folder), vocab_size=small.target.config.vocab_size, **_shape(1024))


def _shape(width: int) -> dict[str, int]:
    sizes = {"hidden_size": width, "intermediate_size": width * 11 // 4, "num_hidden_layers": 16}
    return {**sizes, "num_attention_heads": width // 64, "num_key_value_heads": width // 64}
