"""What a search for a variant looks at, and what it lowers: task loss + λ · guard loss, on the probe set.

    task loss    mean token loss of the task's reference answers
    guard loss   mean over guards of the mean token loss of theirs, plus KL(target ‖ variant) per token of general text

All of it is in nats a token, so λ says how many nats of the task one nat of damage is worth, however many guards there are. Text
comes on top of the guards, for among several it would fade.

Shapes: O output channels of a module, N tokens of a batch, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from transplant_ray.errors import DataError, NumericsError, RecipeError
from transplant_ray.evaluate.engine import Engine
from transplant_ray.evaluate.example import Rendered
from transplant_ray.evaluate.read import LOGITS
from transplant_ray.evaluate.routing import Request
from transplant_ray.evaluate.teacher_forcing import lay_out, logits_at
from transplant_ray.graft.path import at_point
from transplant_ray.graft.variant import Variant
from transplant_ray.models.catalogue import select_kind
from transplant_ray.probe.measured import Cost
from transplant_ray.probe.resident_rankers import Bench, batches

Gates = Mapping[str, torch.Tensor]
"""Module → its coefficient: a number, or one for each channel (O,)."""


@dataclass(frozen=True)
class Search:
    """A resident pair, and the examples that a search may look at."""

    bench: Bench
    """`bench.examples` are those of the task."""
    guards: Mapping[str, Sequence[Rendered]]
    """Probe examples of the guards that may be fitted on; one that is held out is never here."""
    texts: Sequence[Rendered] = ()
    """General text: the first token of each is its prompt."""

    @property
    def num_said(self) -> int:
        """Tokens of the texts that are predicted."""
        return sum(len(text.answer_ids) for text in self.texts)

    def modules(self, kind: str, where: str) -> tuple[str, ...]:
        """RecipeError where the kind matches nothing; `where` is the key that says it."""
        return tuple(module.name for module in select_kind(self.bench.engine.pair.modules.values(), kind, where))


@dataclass(frozen=True)
class Losses:
    task: float
    guard: float
    """0 where nothing guards."""

    def objective(self, penalty: float) -> float:
        return self.task + penalty * self.guard


@dataclass(frozen=True)
class Found:
    """A variant that was searched for. Losses are those on the probe set, which it was fitted to."""

    variant: Variant
    """Every coefficient is 0 or 1."""
    penalty: float
    """λ."""
    task_loss: float
    guard_loss: float
    task_loss_before_rounding: float
    guard_loss_before_rounding: float
    num_coefficients: int
    """How many numbers were fitted: so many chances to fit the probe set alone."""
    cost: Cost
    """A pass is one over the probe examples of task and guards, and the texts."""
    order: tuple[str, ...] = ()
    """Modules as they were added, where they were added one by one; any first few of them are a variant too."""

    @classmethod
    def of(
        cls, variant: Variant, penalty: float, before: Losses, after: Losses, count: int, cost: Cost, order: tuple[str, ...] = ()
    ) -> Found:
        return cls(variant, penalty, after.task, after.guard, before.task, before.guard, count, cost, order)


def check_search(search: Search, penalties: Sequence[float], where: str) -> None:
    """RecipeError for a λ without effect, DataError for guards without examples."""
    if any(penalties) and not search.guards and not search.texts:
        raise RecipeError(
            f"`{where}.penalty`: {max(penalties):g} has no effect, for there is neither a guard nor general text to lose on. "
            f"Name guards, or use {where}.penalty=[0]."
        )
    for guard, examples in search.guards.items():
        if not examples:
            raise DataError(f"guard {guard}: it has no probe examples. Give it some, or hold it out.")


def losses(search: Search, variants: Sequence[Variant]) -> list[Losses]:
    """Of each. NumericsError where one is not a number."""
    bench = search.bench
    task = bench.losses(variants)
    guards = [Bench(bench.engine, bench.source, examples, bench.steps).losses(variants) for examples in search.guards.values()]
    text = _divergences(search, variants) if search.texts else [0.0] * len(variants)
    guard = [sum(losses) / max(1, len(losses)) for losses in zip(*guards, strict=True)] if guards else [0.0] * len(variants)
    return [Losses(*each) for each in zip(task, map(sum, zip(guard, text, strict=True)), strict=True)]


def gradients(search: Search, gates: Gates, penalty: float) -> dict[str, torch.Tensor]:
    """∂(task loss + λ · guard loss)/∂c at these coefficients, in their shapes. NumericsError where one is not finite.

    Deterministic: all examples, in one order. Holds one module's worth of weights beside the pair, and what a batch keeps.
    """
    engine, total = search.bench.engine, {name: torch.zeros_like(gate) for name, gate in gates.items()}

    def add(weight: float, loss: _Loss, examples: Sequence[Rendered]) -> None:
        with torch.enable_grad():
            found = torch.autograd.grad(loss(engine, examples, gates), list(gates.values()), allow_unused=True)
        for name, gradient in zip(gates, found, strict=True):
            if gradient is not None:  # an expert that no token reached
                total[name] += weight * gradient

    for examples, weight, loss in _parts(search, penalty):
        _each_batch(engine, examples, partial(add, weight, loss))
    for name, gradient in total.items():
        if not gradient.isfinite().all():
            raise NumericsError(f"search: the gradient of {name} is not finite. Try `resources.dtype: float32`.")
    return total


def _parts(search: Search, penalty: float) -> Iterator[tuple[Sequence[Rendered], float, _Loss]]:
    """What the objective sums up: examples, their weight, and the loss of each. Nothing guards at λ = 0."""
    examples = search.bench.examples
    yield examples, 1 / len(examples), _reading
    if penalty:
        for guard in search.guards.values():
            yield guard, penalty / len(search.guards) / len(guard), _reading
        if search.texts:
            yield search.texts, penalty / search.num_said, _diverging


def step_share(search: Search, penalty: float) -> tuple[float, float]:
    """Forward and backward passes of one gradient. λ = 0 reads no guard; for text, the target reads it too."""
    task, guards, text = _tokens(search)
    rest = guards + text if penalty else 0
    whole = task + guards + text
    return (task + rest + (text if penalty else 0)) / whole, (task + rest) / whole


def _tokens(search: Search) -> tuple[int, int, int]:
    def of(examples: Sequence[Rendered]) -> int:
        return sum(len(example.prompt_ids) + len(example.answer_ids) - 1 for example in examples)

    return of(search.bench.examples), sum(map(of, search.guards.values())), of(search.texts)


_Loss = Callable[[Engine, Sequence[Rendered], Gates], torch.Tensor]
"""Of a batch, summed over its examples. Not weighed yet: float16 has no room for small gradients."""


def _reading(engine: Engine, examples: Sequence[Rendered], gates: Gates) -> torch.Tensor:
    """Mean token loss of each reference."""
    answers = [example.answer_ids for example in examples]
    with at_point(engine.pair, gates):
        logits_NV = _logits(engine, examples)
        reference_N = torch.tensor([token for answer in answers for token in answer], device=logits_NV.device)
        share_N = torch.tensor([1 / len(answer) for answer in answers for _ in answer], device=logits_NV.device)
        return (cross_entropy(logits_NV, reference_N, reduction="none") * share_N).sum()


def _diverging(engine: Engine, examples: Sequence[Rendered], gates: Gates) -> torch.Tensor:
    """KL(target ‖ variant) of every token. The target is the same model with coefficients 0, and reads this batch alone."""
    with torch.no_grad():
        target_NV = log_softmax(_logits(engine, examples), -1)
    with at_point(engine.pair, gates):
        return _divergence(target_NV, _logits(engine, examples))


def _divergence(target_NV: torch.Tensor, logits_NV: torch.Tensor) -> torch.Tensor:
    return kl_div(log_softmax(logits_NV, -1), target_NV, reduction="sum", log_target=True)


def _logits(engine: Engine, examples: Sequence[Rendered]) -> torch.Tensor:
    model = engine.pair.model
    return logits_at(
        model, *lay_out([example.prompt_ids for example in examples], [example.answer_ids for example in examples], model.device)
    )


def _divergences(search: Search, variants: Sequence[Variant]) -> list[float]:
    """KL(target ‖ variant) per token of the texts. NumericsError where one is not a number."""
    found = search.bench.engine.divergences(variants, search.texts)
    return [_per_token(search, found[variant.id]) for variant in variants]


def _per_token(search: Search, means: Sequence[float | None]) -> float:
    known = [mean for mean in means if mean is not None]
    if len(known) < len(means):
        raise NumericsError("search: a divergence on general text is not finite. Try `resources.dtype: float32`.")
    return sum(mean * len(text.answer_ids) for mean, text in zip(known, search.texts, strict=True)) / search.num_said


def _each_batch(engine: Engine, examples: Sequence[Rendered], use: Callable[[Sequence[Rendered]], None]) -> None:
    """Every example in one batch of its own kind of length; a batch that finds no memory is done again in halves."""
    requests = [Request(0, example) for example in examples]
    deque(engine.until_done(requests, partial(_work, engine, use)), maxlen=0)


def _work(
    engine: Engine, use: Callable[[Sequence[Rendered]], None], requests: Sequence[Request], rows: int
) -> Iterator[tuple[int, None]]:
    examples = [request.example for request in requests]
    model = engine.pair.model
    most = LOGITS // GRADIENT_COPIES // model.config.vocab_size // max(len(example.answer_ids) for example in examples)
    for batch in batches(examples, (model,), max(1, min(rows, most))):
        use([examples[i] for i in batch])
        yield from ((i, None) for i in batch)


GRADIENT_COPIES = 4
"""Logits, their logarithms and the gradients of both are there together."""
