"""The evaluation engine: many variants of one pair answer many examples, in batches that are kept full.

A pack is the rows of all variants on a shard of examples, variants ordered so that nested sets of modules are neighbours. It is
worked off at most `rows` at a time (`measure_rows`), which changes how fast it goes and not what comes out.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from math import inf, isfinite
from typing import TYPE_CHECKING, TypeVar

import torch

from transplant_ray.errors import NumericsError, ResourceError, TransplantError
from transplant_ray.evaluate.answers import VariantShard
from transplant_ray.evaluate.decode import can_decode, decode
from transplant_ray.evaluate.divergence import diverge
from transplant_ray.evaluate.example import Example, Rendered, check_lengths, check_references, encode_example
from transplant_ray.evaluate.generate import NAN_LOGITS, Completion, GenerationSettings, end_ids, generate
from transplant_ray.evaluate.outcome import READS, Outcome, choose, read_outcome, score
from transplant_ray.evaluate.read import Reading, read
from transplant_ray.evaluate.routing import Request, Routed, requests_of
from transplant_ray.evaluate.scorers import FORCED, LOSS
from transplant_ray.graft.resident import ResidentPair, load_resident_pair
from transplant_ray.graft.routed import nested_order, takes_rows
from transplant_ray.graft.variant import ORIGIN, Variant, check_variant
from transplant_ray.models.checkpoint import open_checkpoint, read_generation_ends
from transplant_ray.models.compare import check_vocabulary, compare
from transplant_ray.models.loading import check_devices, devices_of, load_tokenizer
from transplant_ray.models.rope import max_positions, rope_boundary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OUT_OF_MEMORY = ("out of memory", "DefaultCPUAllocator: can't allocate memory")
"""What torch says of it on GPUs and on CPU."""

VARIANTS_PER_PACK = 16
"""Variants in one unit of work: what is lost, and done again, when an evaluator dies."""

Note = Callable[[str], None]
T = TypeVar("T")


Values = Iterator[tuple[int, T | None]]
"""(index of a request, what came of it); None where a logit was NaN."""


class Engine:
    """A resident pair that answers for many variants at once."""

    def __init__(
        self,
        pair: ResidentPair,
        tokenizer: PreTrainedTokenizerBase,
        settings: GenerationSettings,
        scorer: str,
        note: Note = lambda _: None,
    ) -> None:
        """At most `settings.batch_size` rows are in flight. `note` is told, once, what a user should know."""
        self.pair = pair
        self.tokenizer = tokenizer
        self.settings = settings
        self.scorer = scorer
        self.rows = settings.batch_size
        self.note = note

    @classmethod
    def load(
        cls,
        source: str,
        target: str,
        *,
        max_new_tokens: int,
        scorer: str = "exact",
        dtype: str = "float32",
        device_map: str = "cpu",
        batch_size: int = 64,
    ) -> Engine:
        """An engine for two folders, hub ids or `zoo:` names. CheckpointError or IncompatibleModels where they do not fit."""
        comparison = compare(open_checkpoint(source), open_checkpoint(target))
        tokenizer = load_tokenizer(comparison.target)
        check_vocabulary(load_tokenizer(comparison.source).get_vocab(), tokenizer.get_vocab(), accept=())
        ends = end_ids(read_generation_ends(comparison.target), tokenizer)
        settings = GenerationSettings(max_new_tokens, ends, batch_size=batch_size)
        return cls(load_resident_pair(comparison, dtype, device_map), tokenizer, settings, scorer)

    def examples(self, answers: Mapping[str, str]) -> tuple[Rendered, ...]:
        """Prompt → reference answer, as the engine takes them."""
        return tuple(
            encode_example(Example.of(prompt, answer), lambda text: list(self.tokenizer(text)["input_ids"]), self.tokenizer)
            for prompt, answer in answers.items()
        )

    def answer(self, variants: Sequence[Variant], examples: Sequence[Rendered]) -> Iterator[VariantShard]:
        """One result per variant, as they are done. A variant that fails is a result with its reason; the others go on.

        DataError before anything runs where an example and its completion would exceed the model's positions.
        """
        self._check(examples, reads=self.scorer in READS, decodes=self.scorer != LOSS)
        fitting = []
        for variant in variants:
            try:
                fitting.append(check_variant(variant, self.pair.modules))
            except TransplantError as error:
                yield _failed(variant, error)
        for pack in self._packs(fitting):
            yield from self._answer_pack(pack, examples)

    def losses(self, variants: Sequence[Variant], examples: Sequence[Rendered]) -> dict[str, float | None]:
        """Variant id → mean token loss of the reference answers, every example counted once; None where it is not a number.

        VariantError where a variant does not fit, DataError where an example exceeds the model's positions.
        """
        self._check(examples, reads=True, decodes=False)
        for variant in variants:
            check_variant(variant, self.pair.modules)
        return self._measure(self._packs(variants), lambda pack: self._read_pack(pack, examples), None)

    def _read_pack(self, pack: Sequence[Variant], examples: Sequence[Rendered]) -> dict[str, float | None]:
        found: dict[int, list[float | None]] = defaultdict(list)
        with Routed(self.pair, pack) as routed:
            for request, reading in self.until_done(requests_of(pack, examples), self._reader(routed, decodes=False)):
                found[request.variant].append(None if reading is None else reading.loss)
        return {pack[place].id: _mean(losses) for place, losses in found.items()}

    def divergences(self, variants: Sequence[Variant], texts: Sequence[Rendered]) -> dict[str, tuple[float | None, ...]]:
        """Variant id → KL(target ‖ variant) on each text, nats a token; the first token of a text is its prompt. None: no number.

        VariantError where a variant does not fit, DataError where a text exceeds the model's positions.
        """
        self._check(texts, reads=True, decodes=False)
        for variant in variants:
            check_variant(variant, self.pair.modules)
        together = self._share_batches(variants)
        nothing: tuple[float | None, ...] = (None,) * len(texts)
        return self._measure(self._packs(variants), lambda pack: self._diverge_pack(pack, texts, together=together), nothing)

    def _diverge_pack(
        self, pack: Sequence[Variant], texts: Sequence[Rendered], *, together: bool
    ) -> dict[str, tuple[float | None, ...]]:
        requests = [Request(place, text) for text in texts for place in range(len(pack))]
        found: dict[str, dict[str, float | None]] = {variant.id: {} for variant in pack}
        with Routed(self.pair, [*pack, ORIGIN]) as routed:
            for request, mean in self.until_done(requests, self._diverger(routed, together=together)):
                found[pack[request.variant].id][request.example.id] = mean
        return {variant: tuple(means[text.id] for text in texts) for variant, means in found.items()}

    def _measure(
        self, packs: Sequence[Sequence[Variant]], measure: Callable[[Sequence[Variant]], dict[str, T]], failed: T
    ) -> dict[str, T]:
        """A failure of a whole pack is looked for variant by variant, as in `_answer_pack`; what fails alone is `failed`."""
        found: dict[str, T] = {}
        for pack in packs:
            try:
                found |= measure(pack)
            except (ResourceError, RuntimeError):
                check_devices(*devices_of(self.pair.model))
                found |= {pack[0].id: failed} if len(pack) == 1 else self._measure([[variant] for variant in pack], measure, failed)
        return found

    def until_done(
        self, requests: Sequence[Request], work: Callable[[Sequence[Request], int], Values[T]]
    ) -> Iterator[tuple[Request, T | None]]:
        """Do the work and give out each request with what came of it; where memory runs out, go on with half the rows.

        `work` is given requests and the most rows of a pass, and gives out indices of requests with their values.
        """
        left = list(requests)
        while left:
            done: set[int] = set()
            try:
                for index, value in work(left, self.rows):
                    done.add(index)
                    yield left[index], value
            except RuntimeError as error:
                self._halve(error)
            if len(done) < len(left):
                gc.collect()  # what the failed pass held
                torch.cuda.empty_cache()
            left = [request for index, request in enumerate(left) if index not in done]

    def _check(self, examples: Sequence[Rendered], *, reads: bool, decodes: bool = True) -> None:
        positions = max_positions(self.pair.model.config)
        chooses = any(example.choices for example in examples)
        if decodes and not chooses:
            check_lengths(examples, self.settings.max_new_tokens, positions)
        if reads or chooses:
            check_references(examples, positions)

    def _packs(self, variants: Sequence[Variant]) -> list[list[Variant]]:
        """All together in their best order, or each alone where a module mixes the rows of a batch."""
        ordered = [variants[place] for place in nested_order(variants)]
        return [ordered] if ordered and self._share_batches(variants) else [[variant] for variant in ordered]

    def _share_batches(self, variants: Sequence[Variant]) -> bool:
        return takes_rows(self.pair, {name for variant in variants for name in variant.coefficients})

    def _answer_pack(self, pack: Sequence[Variant], examples: Sequence[Rendered]) -> Iterator[VariantShard]:
        """A failure of the whole pack is looked for variant by variant, so that it is one variant's."""
        done: dict[int, dict[str, Outcome | None]] = {place: {} for place in range(len(pack))}
        failure: Exception | None = None
        with Routed(self.pair, pack) as routed:
            try:
                for request, outcome in self._outcomes(requests_of(pack, examples), pack, routed):
                    mine = done[request.variant]
                    mine[request.example.id] = outcome
                    if len(mine) == len(examples):
                        outcomes = [mine[example.id] for example in examples]
                        yield _shard(pack[request.variant].id, outcomes, routed.seconds(request.variant))
            except (TransplantError, RuntimeError) as error:  # torch reports what a device cannot do as RuntimeError
                failure = error
        if failure is not None:
            check_devices(*devices_of(self.pair.model))  # else it would be every variant's that comes
            for variant in [pack[place] for place, mine in done.items() if len(mine) < len(examples)]:
                yield from [_failed(variant, failure)] if len(pack) == 1 else self._answer_pack([variant], examples)

    def _outcomes(
        self, requests: Sequence[Request], pack: Sequence[Variant], routed: Routed
    ) -> Iterator[tuple[Request, Outcome | None]]:
        if self.scorer in READS:
            for request, reading in self.until_done(requests, self._reader(routed, decodes=self.scorer == FORCED)):
                name = pack[request.variant].id
                yield request, read_outcome(name, request.example, reading, self.tokenizer, self.scorer) if reading else None
            return
        if any(request.example.choices for request in requests):
            yield from self._chosen(requests, pack, routed)
            return
        most = self._longest_together()
        together = [request for request in requests if len(request.example.prompt_ids) <= most]
        apart = [request for request in requests if len(request.example.prompt_ids) > most]
        for some, work in ((together, self._decoder(routed)), (apart, self._generator(routed))):
            for request, completion in self.until_done(some, work):
                name = pack[request.variant].id
                yield request, score(name, request.example, completion, self.scorer) if completion else None

    def _chosen(
        self, requests: Sequence[Request], pack: Sequence[Variant], routed: Routed
    ) -> Iterator[tuple[Request, Outcome | None]]:
        """Each choice is a row of its own; an outcome is given out when its last choice has been read."""
        heard: dict[tuple[int, str], list[Reading | None]] = defaultdict(list)
        asked = {(request.variant, choice.id): request for request in requests for choice in request.example.choices}
        rows = [Request(request.variant, choice) for request in requests for choice in request.example.choices]
        for row, reading in self.until_done(rows, self._reader(routed, decodes=False)):
            request = asked[row.variant, row.example.id]
            readings = heard[request.variant, request.example.id]
            readings.append(reading)
            if len(readings) == len(request.example.choices):
                known = [reading for reading in readings if reading is not None]
                name = pack[request.variant].id
                yield request, choose(name, request.example, known, self.scorer) if len(known) == len(readings) else None

    def _longest_together(self) -> float:
        """Tokens of the longest prompt that shares batches; others go through `transformers` itself, for neighbours matter."""
        boundary = rope_boundary(self.pair.model.config)
        if not can_decode(self.pair.model):
            return 0
        return inf if boundary is None else boundary - self.settings.max_new_tokens

    def _decoder(self, routed: Routed) -> Callable[[Sequence[Request], int], Values[Completion]]:
        def work(requests: Sequence[Request], rows: int) -> Values[Completion]:
            prompts = [request.example.prompt_ids for request in requests]
            return decode(self.pair.model, self.tokenizer, prompts, self.settings, routed.by(requests), rows)

        return work

    def _diverger(self, routed: Routed, *, together: bool) -> Callable[[Sequence[Request], int], Values[float]]:
        def work(requests: Sequence[Request], rows: int) -> Values[float]:
            asked = [(request.variant, request.example) for request in requests]
            return diverge(self.pair.model, asked, routed.assign, rows, together=together)

        return work

    def _reader(self, routed: Routed, *, decodes: bool = True) -> Callable[[Sequence[Request], int], Values[Reading]]:
        def work(requests: Sequence[Request], rows: int) -> Values[Reading]:
            examples = [request.example for request in requests]
            return read(self.pair.model, self.tokenizer, examples, self.settings, routed.by(requests), rows, decodes=decodes)

        return work

    def _generator(self, routed: Routed) -> Callable[[Sequence[Request], int], Values[Completion]]:
        """One variant after another."""

        def work(requests: Sequence[Request], rows: int) -> Values[Completion]:
            settings = replace(self.settings, batch_size=rows)
            for _, group in groupby(enumerate(requests), key=lambda numbered: numbered[1].variant):
                indices = [index for index, _ in group]
                routed.by(requests)(indices[:1])
                prompts = [requests[index].example.prompt_ids for index in indices]
                completions: Sequence[Completion | None]
                try:
                    completions = generate(self.pair.model, self.tokenizer, prompts, settings)
                except NumericsError:
                    completions = [None] * len(indices)
                yield from zip(indices, completions, strict=True)

        return work

    def _halve(self, error: RuntimeError) -> None:
        """From now on. Raises the error again where it is another one, ResourceError where one row is too many."""
        if not any(sign in str(error) for sign in OUT_OF_MEMORY):
            raise error
        if self.rows == 1:
            raise ResourceError(
                "evaluation: out of memory with a single row. Lower `task.max_new_tokens`, drop long prompts, choose a smaller "
                "`resources.dtype`, or give each model more with `resources.gpus_per_model`."
            ) from error
        self.rows //= 2
        self.note(f"out of memory: {self.rows} rows at a time from here on; `resources.batch_size: {self.rows}` starts there")


def _shard(variant: str, outcomes: Sequence[Outcome | None], seconds: float) -> VariantShard:
    known = tuple(outcome for outcome in outcomes if outcome is not None)
    if len(known) < len(outcomes):
        return VariantShard(variant, (), seconds, _reason(NumericsError(NAN_LOGITS)))
    return VariantShard(variant, known, seconds)


def _failed(variant: Variant, error: Exception) -> VariantShard:
    return VariantShard(variant.id, (), 0.0, _reason(error))


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _mean(losses: Sequence[float | None]) -> float | None:
    known = [loss for loss in losses if loss is not None and isfinite(loss)]
    return sum(known) / len(known) if len(known) == len(losses) else None
