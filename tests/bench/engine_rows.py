"""What is measured of the engine: one function a row, each with its bar.

The strong baseline is what a good engineer would write in an hour: one process, the resident pair, pointers swapped for one variant
after another, `generate` of transformers at the batch size that suits it best.
"""

from __future__ import annotations

import json
import os
import random
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from measure import interleaved, peak_above_baseline, seconds_of
from table import Row
from tiny import tiny_pair
from torch.nn.functional import cross_entropy

from transplant_ray.evaluate.decode import decode
from transplant_ray.evaluate.engine import Engine
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.generate import GenerationSettings, generate
from transplant_ray.evaluate.measure_rows import measure_rows
from transplant_ray.evaluate.teacher_forcing import lay_out, logits_at
from transplant_ray.graft.export import export_checkpoint
from transplant_ray.graft.resident import ResidentPair, load_resident_pair
from transplant_ray.graft.routed import Router
from transplant_ray.graft.variant import Variant
from transplant_ray.models.checkpoint import open_checkpoint
from transplant_ray.models.compare import Comparison, compare
from transplant_ray.models.loading import load_model, load_tokenizer
from transplant_ray.probe import resident_rankers
from transplant_ray.probe.resident_rankers import measure
from transplant_ray.zoo import HOME

PAIR = HOME / "cross-generation"
NEW_TOKENS = 32
SEED = 0


class Bench:
    """A resident pair with its tokenizer, variants as a sweep has them, and examples."""

    def __init__(self, comparison: Comparison, examples: Sequence[Rendered], device: str = "cpu", dtype: str = "float32") -> None:
        self.comparison = comparison
        self.pair = load_resident_pair(comparison, dtype, device)
        self.tokenizer = load_tokenizer(comparison.target)
        self.examples = examples
        self.names = list(comparison.pairs)

    def variants(self, count: int) -> list[Variant]:
        """Nested top-K sets of several orders, as a sweep over rankers and random controls has."""
        sizes = [round(len(self.names) * share) for share in (0.05, 0.15, 0.3, 0.6)]
        orders = [random.Random(seed).sample(self.names, len(self.names)) for seed in range(-(-count // len(sizes)))]
        return [Variant.uniform(order[: max(1, size)]) for order in orders for size in sizes][:count]

    def packed(self, variants: Sequence[Variant], examples: Sequence[Rendered], settings: GenerationSettings, scorer: str) -> None:
        shards = list(Engine(self.pair, self.tokenizer, settings, scorer).answer(variants, examples))
        assert len(shards) == len(variants)
        assert not any(shard.error for shard in shards)

    def one_by_one(self, variants: Sequence[Variant], examples: Sequence[Rendered], settings: GenerationSettings) -> None:
        for variant in variants:
            with self.pair.grafted(variant) as model:
                generate(model, self.tokenizer, [example.prompt_ids for example in examples], settings)

    def rows(self, examples: Sequence[Rendered], new_tokens: int, most: int) -> int:
        return measure_rows(self.pair.model, max(len(e.prompt_ids) for e in examples) + new_tokens, most)


def zoo_bench() -> Bench:
    comparison = compare(open_checkpoint(str(PAIR / "source")), open_checkpoint(str(PAIR / "target")))
    tokenizer = load_tokenizer(comparison.target)
    rows = [json.loads(line) for line in (PAIR / "tasks" / "lost.jsonl").read_text().splitlines()]
    return Bench(comparison, [render(row, tokenizer) for row in rows])


def render(row: dict[str, str], tokenizer: Any) -> Rendered:
    answer = (*tokenizer(row["answer"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id)
    return Rendered(row["prompt"], tuple(tokenizer(row["prompt"])["input_ids"]), answer, row["answer"])


def random_bench(folder: Path, width: int, layers: int, examples: Sequence[Rendered]) -> Bench:
    """Random weights of a Llama; its vocabulary is larger than the zoo's, so that the zoo's prompts fit."""
    shape = {"hidden_size": width, "intermediate_size": width * 11 // 4, "num_hidden_layers": layers, "vocab_size": 512}
    heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 64, "max_position_embeddings": 1024}
    return Bench(tiny_pair(folder, **shape, **heads), examples)


def packing(options: Namespace) -> Iterator[Row]:
    """Many variants in one batch against one variant after another, every row 32 new tokens long."""
    bench = zoo_bench()
    bars = {(16, 16): 2.0, (16, 50): 1.2}
    sizes = [(16, 16), (16, 50)] if options.quick else [(16, 16), (16, 50), (2, 16), (4, 100), (16, 200), (1, 300)]
    for count, n in sizes:
        yield _packing(bench, "zoo cross-generation", count, n, bars.get((count, n), 0.95), options)
    with TemporaryDirectory() as folder:
        wide = random_bench(Path(folder), 512, 4, bench.examples)
        for count, n in [(4, 16)] if options.quick else [(16, 16), (16, 50)]:
            yield _packing(wide, "random Llama, 4 × 512", count, n, 0.95, options)


def _packing(bench: Bench, name: str, count: int, n: int, bar: float, options: Namespace) -> Row:
    variants, examples = bench.variants(count), bench.examples[:n]
    settings = GenerationSettings(NEW_TOKENS, ())
    rows = bench.rows(examples, NEW_TOKENS, count * n)
    best = _best_batch(lambda size: bench.one_by_one(variants[:1], examples, replace(settings, batch_size=size)), n)
    calls = {
        "packed": partial(bench.packed, variants, examples, replace(settings, batch_size=rows), "exact"),
        "one by one": partial(bench.one_by_one, variants, examples, replace(settings, batch_size=best)),
    }
    sizes = f"{name}, {count} variants × {n} prompts × {NEW_TOKENS} tokens; {rows} rows, theirs {best}"
    return _against("packing: one by one ÷ packed", sizes, calls, "one by one", "packed", bar, options)


def _best_batch(run: Callable[[int], None], n: int) -> int:
    """The batch size at which the baseline is fastest."""
    sizes = sorted({min(size, n) for size in (16, 32, 64, 128, 256)})
    return min(sizes, key=lambda size: min(seconds_of(partial(run, size)) for _ in range(2)))


def _against(
    what: str, sizes: str, calls: dict[str, Callable[[], object]], slow: str, fast: str, bar: float, options: Namespace
) -> Row:
    return _ratio(what, sizes, interleaved(calls, 1 if options.quick else 5), slow, fast, bar)


def _ratio(what: str, sizes: str, seconds: Mapping[str, list[float]], slow: str, fast: str, bar: float | None = None) -> Row:
    ratio = median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))
    shown = ", ".join(f"{name} {median(seconds[name]):.3g} s" for name in (fast, slow))
    held = () if bar is None else (f"≥ {bar:g} ×", ratio >= bar)
    return Row(what, sizes, f"median of {len(seconds[fast])}, A/B", f"{ratio:.2f} × ({shown})", *held)


def forced(options: Namespace) -> Iterator[Row]:
    """Reading references against decoding: against the strong baseline, and against decoding that is packed as well."""
    bench, variants = zoo_bench(), 8
    ends = (bench.examples[0].answer_ids[-1],)
    long = [replace(example, answer_ids=_tokens(example.id, 64)) for example in bench.examples]
    cases = (
        (bench.examples[:100], GenerationSettings(4, ends), "its own answers", 1.5),
        (long[:50], GenerationSettings(64, ()), "64", 5),
    )
    for examples, settings, answers, bar in cases:
        rows = bench.rows(examples, settings.max_new_tokens, variants * len(examples))
        sized, chosen = replace(settings, batch_size=rows), bench.variants(variants)
        batch = replace(settings, batch_size=len(examples))
        calls = {
            "forced": partial(bench.packed, chosen, examples, sized, "forced"),
            "decoded one by one": partial(bench.one_by_one, chosen, examples, batch),
            "decoded packed": partial(bench.packed, chosen, examples, sized, "exact"),
        }
        sizes = f"zoo cross-generation, {variants} variants × {len(examples)} prompts, answer tokens: {answers}; {rows} rows"
        seconds = interleaved(calls, 1 if options.quick else 5)
        yield _ratio("forced: decoding one by one ÷ reading", sizes, seconds, "decoded one by one", "forced", bar)
        yield _ratio("forced: decoding packed ÷ reading", sizes, seconds, "decoded packed", "forced")


def _tokens(seed: str, count: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randrange(5, 40) for _ in range(count))


def lengths(options: Namespace) -> Iterator[Row]:
    """Completions of 8 to 256 tokens: rows that leave and join against a static batch to its longest row."""
    bench, n, end = zoo_bench(), 128, 2
    prompts = [bench.examples[0].prompt_ids] * n
    rng = random.Random(SEED)
    targets = [round(8 * 32 ** rng.random()) for _ in prompts]
    settings = GenerationSettings(256, (end,))
    size = bench.rows(bench.examples[:1], 256, n // 2)
    with _Ending(bench.pair, len(prompts[0]), end) as ending:

        def leaving() -> None:
            found = dict(decode(bench.pair.model, bench.tokenizer, prompts, settings, ending.told(targets), size))
            assert [len(found[i].token_ids) for i in range(n)] == targets  # type: ignore[union-attr]

        def static() -> None:
            for start in range(0, n, size):
                ending.lengths = torch.tensor(targets[start : start + size])
                generate(bench.pair.model, bench.tokenizer, prompts[start : start + size], replace(settings, batch_size=size))

        sizes = f"zoo cross-generation, {n} prompts, 8–256 tokens (mean {sum(targets) / n:.0f}); {size} rows both"
        calls = {"rows leave and join": leaving, "static": static}
        yield _against("lengths: static ÷ rows that leave", sizes, calls, "static", "rows leave and join", 1.8, options)


class _Ending:
    """Makes row b of a batch end after `lengths[b]` new tokens, whatever the model would say."""

    def __init__(self, pair: ResidentPair, prompt: int, end: int) -> None:
        self.prompt, self.end = prompt, end
        self.lengths = torch.zeros(0)
        self.handle = pair.model.register_forward_hook(self._end, with_kwargs=True)

    def __enter__(self) -> _Ending:
        return self

    def __exit__(self, *exc: object) -> None:
        self.handle.remove()

    def told(self, targets: Sequence[int]) -> Callable[[Sequence[int]], None]:
        def assign(rows: Sequence[int]) -> None:
            self.lengths = torch.tensor([targets[row] for row in rows])

        return assign

    def _end(self, _module: object, _args: object, kwargs: dict[str, Any], output: Any) -> None:
        said_B = kwargs["position_ids"][:, -1] + 2 - self.prompt  # with the token that is chosen now
        output.logits[:, -1, self.end] = torch.where(said_B >= self.lengths, 1e9, -1e9)


def screen(options: Namespace) -> Iterator[Row]:
    """The loss of the reference answers against generating."""
    bench, count, n = zoo_bench(), 8 if options.quick else 64, 100
    variants, examples = bench.variants(count), bench.examples[:n]
    settings = GenerationSettings(NEW_TOKENS, (), batch_size=bench.rows(examples, NEW_TOKENS, 16 * n))
    engine = Engine(bench.pair, bench.tokenizer, settings, "exact")
    calls = {
        "loss": partial(engine.losses, variants, examples),
        "generation, packed": partial(bench.packed, variants, examples, settings, "exact"),
    }
    sizes = f"zoo cross-generation, {count} variants × {n} prompts, {NEW_TOKENS} new tokens; {settings.batch_size} rows"
    yield _against("screen: generating ÷ loss", sizes, calls, "generation, packed", "loss", 5, options)


def memory(options: Namespace) -> Iterator[Row]:
    """Peak of a process that loads a pair and answers, above what it was before, against weights and cache by arithmetic."""
    width, layers, count, n = (512, 4, 4, 16) if options.quick else (1024, 16, 8, 32)
    with TemporaryDirectory() as folder:
        examples = zoo_bench().examples[:n]
        with get_context("spawn").Pool(
            1, maxtasksperchild=1
        ) as processes:  # what writing leaves to the allocator is not the work's
            processes.apply(_write_pair, (folder, width, layers))
            runs = [processes.apply(_weigh, (folder, width, layers, count, examples)) for _ in range(1 if options.quick else 5)]
    shares = sorted(peak / (used + cache) for peak, used, cache in runs)
    _, used, cache = runs[0]
    sizes = f"random Llama, {layers} × {width}, {count} variants × {n} prompts × {NEW_TOKENS} tokens in one batch"
    parts = f"weights {used / 1e6:.0f} MB + cache {cache / 1e6:.0f} MB"
    result = f"{median(shares):.3f} × (from {shares[0]:.3f} to {shares[-1]:.3f}; {parts})"
    yield Row("memory: peak ÷ weights and cache", sizes, f"median of {len(shares)}", result, "≤ 1.1 ×", median(shares) <= 1.1)


def _write_pair(folder: str, width: int, layers: int) -> None:
    random_bench(Path(folder), width, layers, ())


def _weigh(folder: str, width: int, layers: int, count: int, examples: Sequence[Rendered]) -> tuple[int, int, int]:
    """Bytes: the peak, the weights that are needed, the cache of all rows at their full length."""
    small = random_bench(Path(folder, "small"), 64, 1, examples)
    small.packed(small.variants(1), examples[:1], GenerationSettings(1, ()), "exact")  # imports what has to be
    source, target = (open_checkpoint(str(Path(folder, role))) for role in ("source", "target"))
    comparison = compare(source, target)
    names = frozenset(sorted(comparison.pairs)[: len(comparison.pairs) // 2])
    settings = GenerationSettings(NEW_TOKENS, (), batch_size=count * len(examples))
    variants = [Variant.uniform(sorted(names)[index:]) for index in range(count)]

    def work() -> None:
        pair = load_resident_pair(comparison, "float32", names=names)
        list(Engine(pair, load_tokenizer(target), settings, "exact").answer(variants, examples))

    _, peak = peak_above_baseline(work)
    used = 4 * (target.num_parameters + sum(comparison.pairs[name].source.num_parameters for name in names))
    columns = max(len(example.prompt_ids) for example in examples) + NEW_TOKENS
    cache = 4 * 2 * layers * width * columns * settings.batch_size
    return peak, used, cache


def rounding(options: Namespace) -> Iterator[Row]:
    """Tokens that differ between a routed pack and each variant exported, reloaded and decoded by itself."""
    for dtype in ("float32", "bfloat16"):
        zoo = zoo_bench()
        bench = Bench(zoo.comparison, zoo.examples, dtype=dtype)
        variants, examples = bench.variants(2 if options.quick else 8), bench.examples[:100]
        settings = GenerationSettings(NEW_TOKENS, ())
        prompts = [example.prompt_ids for example in examples]
        requests = [(place, prompt) for place in range(len(variants)) for prompt in prompts]
        with Router(bench.pair, variants) as router:
            told = partial(_assign, router, [place for place, _ in requests])
            rows = decode(bench.pair.model, bench.tokenizer, [prompt for _, prompt in requests], settings, told, 256)
            routed = [completion for _, completion in sorted(rows, key=lambda row: row[0])]
        differ = close = 0
        for place, variant in enumerate(variants):
            with TemporaryDirectory() as folder:
                checkpoint = export_checkpoint(zoo.comparison, variant, Path(folder, "out"), card="")
                model = load_model(open_checkpoint(str(checkpoint)), dtype)
            mine = routed[place * len(prompts) : (place + 1) * len(prompts)]
            for alone, packed in zip(generate(model, bench.tokenizer, prompts, settings), mine, strict=True):
                assert packed is not None
                differ += sum(a != b for a, b in zip(alone.token_ids, packed.token_ids, strict=True))
                close += packed.num_close
        total = len(requests) * NEW_TOKENS
        sizes = f"zoo cross-generation, {len(variants)} variants × {len(prompts)} prompts × {NEW_TOKENS} tokens, {dtype}"
        bar = ("0 but for close steps", differ == 0 or close > 0) if dtype == "float32" else ("–", None)
        yield Row(
            "rounding: tokens that differ, routed and exported", sizes, "1", f"{differ} of {total}; {close} close steps", *bar
        )


def _assign(router: Router, variants: Sequence[int], rows: Sequence[int]) -> None:
    router.assign([variants[row] for row in rows])


def attribution(options: Namespace) -> Iterator[Row]:
    """A step of the path, the two losses at its ends shared among the steps, against a forward and backward pass without gradients
    of weights."""
    bench, steps, n = zoo_bench(), 4, 128
    examples = bench.examples[:n]
    engine = Engine(bench.pair, bench.tokenizer, GenerationSettings(NEW_TOKENS, ()), "exact")
    ranking = resident_rankers.Bench(engine, lambda: bench.pair.model, examples, steps)
    calls = {"ranking": partial(measure, "attribution", ranking), "passes": partial(_forward_backward, bench, examples, steps)}
    seconds = interleaved(calls, 3 if options.quick else 21)
    ratio = median(a / b for a, b in zip(seconds["ranking"], seconds["passes"], strict=True))
    sizes = f"zoo cross-generation, {len(bench.names)} modules, {n} examples, {steps} steps"
    result = f"{ratio:.2f} × ({median(seconds['ranking']):.3g} s, {median(seconds['passes']):.3g} s)"
    repetitions = f"median of {len(seconds['passes'])}, A/B"
    yield Row("attribution: a step ÷ forward and backward", sizes, repetitions, result, "≤ 3 ×", ratio <= 3)


def _forward_backward(bench: Bench, examples: Sequence[Rendered], rounds: int) -> None:
    """Plain passes over the examples, in the batches that the ranker makes; gradients flow to the embedded prompts alone."""
    model = bench.pair.model
    embedded = model.get_input_embeddings().register_forward_hook(lambda _module, _ids, output: output.requires_grad_())
    try:
        for batch in resident_rankers.batches(examples, (model,), GenerationSettings.batch_size):
            chosen = [examples[i] for i in batch]
            answers = [example.answer_ids for example in chosen]
            ids_BS, place_N = lay_out([example.prompt_ids for example in chosen], answers, model.device)
            reference_N = torch.tensor([token for answer in answers for token in answer])
            for _ in range(rounds):
                cross_entropy(logits_at(model, ids_BS, place_N), reference_N).backward()
    finally:
        embedded.remove()


def attribution_memory(options: Namespace) -> Iterator[Row]:
    """What the ranking holds above plain forward and backward passes over the same batches, in layers of weights."""
    width, layers = (256, 4) if options.quick else (1024, 8)
    with TemporaryDirectory() as folder, patch.dict(os.environ, {"MALLOC_MMAP_THRESHOLD_": "65536"}):  # what is freed is gone
        examples = zoo_bench().examples[:16]
        with get_context("spawn").Pool(1, maxtasksperchild=1) as processes:
            processes.apply(_write_pair, (folder, width, layers))
            rounds = 1 if options.quick else 5
            asked = [(folder, layers, examples, ranks) for _ in range(rounds) for ranks in (True, False)]
            weighed = [processes.apply(_weigh_attribution, each) for each in asked]
    extra = sorted((ranking - passes) / layer for (ranking, layer), (passes, _) in zip(weighed[::2], weighed[1::2], strict=True))
    sizes = f"random Llama, {layers} × {width}, 16 examples, 4 steps; a layer is {weighed[0][1] / 1e6:.0f} MB"
    result = f"{median(extra):.2f} layers (from {extra[0]:.2f} to {extra[-1]:.2f})"
    yield Row("attribution: memory above passes ÷ a layer", sizes, f"median of {len(extra)}", result, "≤ 1", median(extra) <= 1)


def _weigh_attribution(folder: str, layers: int, examples: Sequence[Rendered], ranks: bool) -> tuple[int, int]:
    """Bytes: the peak above a loaded pair, and the weights of a layer."""
    small = random_bench(Path(folder, f"small{ranks}"), 64, 1, examples)
    _rank_or_pass(small, examples, ranks)  # imports what has to be
    bench = Bench(compare(*(open_checkpoint(str(Path(folder, role))) for role in ("source", "target"))), examples)
    for graft in bench.pair.grafts.values():
        graft.source.weight.sum()  # what is mapped from a file is not there before somebody reads it
    _, peak = peak_above_baseline(lambda: _rank_or_pass(bench, examples, ranks))
    in_a_layer = sum(pair.source.num_parameters for pair in bench.comparison.pairs.values()) // layers
    return peak, 4 * in_a_layer


def _rank_or_pass(bench: Bench, examples: Sequence[Rendered], ranks: bool) -> None:
    if not ranks:
        _forward_backward(bench, examples, 4)
        return
    engine = Engine(bench.pair, bench.tokenizer, GenerationSettings(NEW_TOKENS, ()), "exact")
    measure("attribution", resident_rankers.Bench(engine, lambda: bench.pair.model, examples, 4))


def gpu(options: Namespace) -> Iterator[Row]:
    """A 3B-like model with grouped-query attention on a GPU; without one the same code on a small model, which has no bar."""
    on_gpu = torch.cuda.is_available()
    device, shape = ("cuda:0", LIKE_3B) if on_gpu else ("cpu", {**LIKE_3B, **SMALL})
    count, n, new_tokens = (16, 50, 256) if on_gpu else (4, 4, 8)
    with TemporaryDirectory() as folder:
        comparison = tiny_pair(Path(folder), dtype=torch.bfloat16, **shape)
        bench = Bench(comparison, zoo_bench().examples[:n], device, "bfloat16")
    settings, variants = GenerationSettings(new_tokens, ()), bench.variants(count)
    rows = bench.rows(bench.examples, new_tokens, count * n)
    calls = {
        "packed": partial(bench.packed, variants, bench.examples, replace(settings, batch_size=rows), "exact"),
        "one by one": partial(bench.one_by_one, variants, bench.examples, replace(settings, batch_size=n)),
    }
    seconds = interleaved(calls, 1 if options.quick else 3)
    name = torch.cuda.get_device_name() if on_gpu else "no GPU, so a small model on CPU"
    weights = f"random Llama, {comparison.target.num_parameters / 1e9:.2g} G parameters, bfloat16"
    sizes = f"{name}: {weights}, {count} variants × {n} prompts × {new_tokens} tokens; {rows} rows"
    yield _ratio("gpu: one by one ÷ packed", sizes, seconds, "one by one", "packed", 4 if on_gpu else None)
    took, bound = median(seconds["packed"]), _bandwidth_bound(bench, variants, count * n, rows, new_tokens)
    result = f"{count * n * new_tokens / took:.0f} tokens/s, {bound / took:.0%} of what memory allows"
    yield Row("gpu: tokens/s", sizes, f"median of {len(seconds['packed'])}", result)


LIKE_3B = {
    "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128_256, "max_position_embeddings": 1024,
}  # fmt: skip
SMALL = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2}


def _bandwidth_bound(bench: Bench, variants: Sequence[Variant], num_answers: int, rows: int, new_tokens: int) -> float:
    """Seconds in which the device could read what the decode steps must read: the weights of both sides, and keys and values."""
    config: Any = bench.pair.model.config
    used = {name for variant in variants for name in variant.coefficients}
    sources = sum(bench.comparison.pairs[name].source.num_parameters for name in used)
    weights = 2 * (bench.comparison.target.num_parameters + sources)
    columns = max(len(example.prompt_ids) for example in bench.examples) + new_tokens / 2
    cache = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * columns * num_answers
    waves = -(-num_answers // rows)
    return new_tokens * (waves * weights + cache) / _bytes_per_second(bench.pair.model.device)


def _bytes_per_second(device: torch.device) -> float:
    """Of a large copy, which reads and writes; the best of several."""
    data = torch.zeros(2**28 if device.type == "cuda" else 2**26, device=device)
    copy = torch.empty_like(data)

    def run() -> None:
        copy.copy_(data)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return 2 * data.nbytes / min(seconds_of(run) for _ in range(10))


def peers(options: Namespace) -> Iterator[Row]:
    """24 variants, whole processes: ours once, theirs a round of two commands each."""
    what, bar, count = "24 variants: mergekit-yaml + lm_eval ÷ one process of ours", 20, 24
    try:
        from peers import HOW_TO_MAKE, Peers

        from transplant_ray.pipeline.job import prepare
        from transplant_ray.recipe import load_recipe
        from transplant_ray.zoo import recipe_path
    except ImportError as missing:
        yield Row(what, "", "0", f"skipped: this machine has no {missing.name}", f"≥ {bar} ×")
        return
    if not (options.peers / "bin" / "mergekit-yaml").exists():
        yield Row(what, "", "0", HOW_TO_MAKE, f"≥ {bar} ×")
        return
    job = prepare(load_recipe(recipe_path(PAIR.name)))
    with TemporaryDirectory() as folder:
        theirs = Peers(options.peers, Path(folder))
        theirs.prepare(job, Variant.uniform(list(job.comparison.pairs)[:8]))
        rounds = [sum(theirs.round()) for _ in range(1 if options.quick else 5)]
    ours = [_own_process(count) for _ in range(1 if options.quick else 5)]
    ratio = count * median(rounds) / median(ours)
    result = f"{ratio:.0f} × ({count} × {median(rounds):.1f} s, {median(ours):.1f} s)"
    sizes = f"zoo {PAIR.name}, n = {len(job.examples['select'])}, start-up and loading included"
    yield Row(what, sizes, f"median of {len(rounds)} and {len(ours)}", result, f"≥ {bar} ×", ratio >= bar)


def _own_process(count: int) -> float:
    """Seconds of a new interpreter that loads the pair and answers for `count` variants on 300 examples."""
    with get_context("spawn").Pool(1) as processes:
        return seconds_of(lambda: processes.apply(_answer_all, (count,)))


def _answer_all(count: int) -> None:
    bench = zoo_bench()
    settings = GenerationSettings(4, (bench.examples[0].answer_ids[-1],))
    rows = bench.rows(bench.examples[:300], 4, 16 * 128)
    bench.packed(bench.variants(count), bench.examples[:300], replace(settings, batch_size=rows), "exact")


ROWS = {
    row.__name__: row for row in (packing, forced, lengths, screen, memory, attribution, attribution_memory, rounding, gpu, peers)
}
