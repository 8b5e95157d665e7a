"""A small model from nothing: a tokenizer, first weights, a training on general text; the checkpoint is like any other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from transplant_ray.distributed.facts import StepsDone
from transplant_ray.distributed.training import ATTEMPT, CHECKPOINT, KEPT, find_progress
from transplant_ray.errors import RunError
from transplant_ray.evaluate.metrics import perplexity
from transplant_ray.files import whole_folder, write_json, write_text
from transplant_ray.models.scratch import first_weights, save_tokenizer, small_config, train_tokenizer
from transplant_ray.organ.losses import block_losses
from transplant_ray.organ.ngrams import Counts
from transplant_ray.organ.pack import Blocks, Pack, measuring_cut, pack_text, training_cut
from transplant_ray.organ.progress import save_progress
from transplant_ray.organ.text import stream_passages
from transplant_ray.organ.training import Point, Training
from transplant_ray.pipeline.demo_text import DemoText
from transplant_ray.pipeline.ending import terminable
from transplant_ray.pipeline.watch import Silent, Watch
from transplant_ray.pipeline.workplace import Workplace
from transplant_ray.recipe import CorpusSpec, DemoSpec, MeasuredSpec, TrainingSpec
from transplant_ray.versions import environment

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECORD = "training.json"
CHECKPOINTS = 10


@dataclass(frozen=True)
class SmallModel:
    folder: Path
    record: Mapping[str, Any]
    """How it was trained, and what it reaches: `training.json` in its folder."""


def make_model(spec: DemoSpec, text: DemoText, out: Path, threads: int, watch: Watch | None = None) -> SmallModel:
    """Train a tokenizer and a model on the general text and write both as a checkpoint folder; one that is there is taken.

    Stopped, the same call goes on from its last checkpoint and ends with the same weights, on as many threads. RunError where
    another model is there, or was begun there.
    """
    watch, identity = watch or Silent(), _identity(spec, text)
    if out.exists():
        return _read(out, identity)
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    place = Workplace(out.with_name(f".{out.name}.training"))
    with terminable(), place.claimed(identity):
        tokenizer = _tokenizer(spec, text, place.folder / "tokenizer", watch)
        training_spec, measured_spec = _training(spec, text), _measured(spec, text)
        pack = _packed(training_spec, tokenizer, place.pack, training_cut(training_spec))
        measured = _packed(measured_spec, tokenizer, place.folder / "measured", measuring_cut(measured_spec, spec.context))
        config = small_config(
            spec.family, vocabulary=len(tokenizer), layers=spec.layers, width=spec.width, heads=spec.heads, context=spec.context
        )
        training = Training(first_weights(config, spec.seed), pack, training_spec)
        _train(training, place, watch)
        record = _record(identity, training, measured, threads)
        _write(training.model, tokenizer, record, out)
    place.remove()
    return SmallModel(out, record)


def describe_model(model: SmallModel) -> list[str]:
    """What it is and what it reaches, in sentences."""
    said = model.record
    reached = said["perplexity"]
    return [
        f"model: {said['asked']['family']}, {said['asked']['layers']} layers, {said['parameters']:,} parameters, trained from "
        f"nothing on {said['tokens']:,} tokens",
        f"perplexity on {reached['contexts']} contexts of general text that it has not seen: {reached['model']:.4g} (a count of "
        f"tokens alone reaches {reached['unigram']:.4g}, a count of pairs {reached['bigram']:.4g})",
    ]


def _identity(spec: DemoSpec, text: DemoText) -> dict[str, Any]:
    """What decides the weights. How long organs are trained does not."""
    asked = spec.model_dump(mode="json", exclude={"organ_tokens", "organ_lr", "contexts"})
    return {"asked": asked, "text": {name: text.record[name]["sha256"] for name in ("general", "domain")}}


def _read(out: Path, identity: Mapping[str, Any]) -> SmallModel:
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{out}: is there, and no model of a demo ({error}). Choose another place, or move it away.") from error
    if any(record.get(key) != value for key, value in identity.items()):
        raise RunError(f"{out}: is a model of other settings or text. Give the same, choose another place, or move it away.")
    return SmallModel(out, record)


def _training(spec: DemoSpec, text: DemoText) -> TrainingSpec:
    sizes = {"context": spec.context, "batch": spec.batch, "tokens": spec.tokens, "lr": spec.lr, "seed": spec.seed}
    training = TrainingSpec.model_validate({**text.trained_on("general"), **sizes, "dtype": "float32"})
    return training.model_copy(update={"checkpoint_every": max(1, training.num_steps // CHECKPOINTS)})


def _measured(spec: DemoSpec, text: DemoText) -> MeasuredSpec:
    return MeasuredSpec.model_validate({**text.measured_on("general"), "contexts": spec.contexts})


def _tokenizer(spec: DemoSpec, text: DemoText, folder: Path, watch: Watch) -> PreTrainedTokenizerFast:
    """Of what is trained on, general and domain; what is measured has no say in it."""
    if not folder.exists():
        watch.stage("train the tokenizer", 0)
        corpora = [CorpusSpec.model_validate(text.trained_on(which)) for which in ("general", "domain")]
        texts = (passage.text for passage in chain.from_iterable(map(stream_passages, corpora)))
        with whole_folder(folder) as new:
            save_tokenizer(train_tokenizer(texts, spec.vocabulary), new)
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer


def _packed(spec: Any, tokenizer: PreTrainedTokenizerFast, folder: Path, cut: Any) -> Pack:
    if not folder.exists():
        pack_text(stream_passages(spec), tokenizer, len(tokenizer), cut, folder)
    return Pack.open(folder)


def _train(training: Training, place: Workplace, watch: Watch) -> None:
    watch.stage("train the model", training.spec.num_steps, "steps")
    if (so_far := find_progress(place.folder)) is not None:
        so_far.restore(training)
        watch.advance(so_far.step)
        watch.note(f"goes on after step {so_far.step:,} of {training.spec.num_steps:,}")
    step = training.step
    for point in training.run():
        watch.advance(point.step - step)
        watch.hear(
            StepsDone(point.step, (point.step - step) * training.spec.batch * training.spec.context, point.loss, point.held_out)
        )
        step = point.step
        if training.is_due(point):
            _keep(training, place.folder)


def _keep(training: Training, folder: Path) -> None:
    """A checkpoint, and the one before it."""
    place = folder / f"{ATTEMPT}0"
    with whole_folder(place / f"{CHECKPOINT}{training.step:08}", replace=True) as new:
        save_progress(training, new)
    for old in sorted(place.glob(f"{CHECKPOINT}*"))[:-KEPT]:
        shutil.rmtree(old, ignore_errors=True)


def _record(identity: Mapping[str, Any], training: Training, measured: Pack, threads: int) -> dict[str, Any]:
    """Both halves of what is measured together: nothing was chosen by either."""
    blocks = [measured.side(name) for name in ("select", "test")]
    losses = [loss for side in blocks for loss in _losses(training, side)]
    vocabulary = int(training.model.config.vocab_size)  # type: ignore[union-attr, arg-type]  # what transformers gives every model
    counts = Counts.of(training.pack.train, vocabulary)
    weights = [side.num / len(losses) for side in blocks]

    def mean(loss_of: Any) -> float:
        return float(sum(share * loss_of(side) for share, side in zip(weights, blocks, strict=True)))

    return {
        **identity,
        "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
        "tokens": training.spec.num_tokens,
        "steps": training.step,
        "text_tokens": training.pack.record.sides["train"].tokens,
        "threads": threads,
        "curve": [point.to_json() for point in _thinned(training.curve)],
        "perplexity": {
            "contexts": len(losses),
            "model": perplexity(sum(losses) / len(losses)),
            "unigram": perplexity(mean(counts.unigram_loss)),
            "bigram": perplexity(mean(counts.bigram_loss)),
        },
        "environment": environment(),
    }


def _losses(training: Training, blocks: Blocks) -> list[float]:
    training.model.eval()
    return list(block_losses(training.model, blocks, range(blocks.num), training.spec.batch))


def _thinned(curve: list[Point]) -> Iterator[Point]:
    return (point for point in curve if point.held_out is not None)


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, record: Mapping[str, Any], out: Path) -> None:
    with whole_folder(out) as folder:
        model.save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
        write_json(folder / RECORD, record)
        write_text(folder / "README.md", _card(record))


def _card(record: Mapping[str, Any]) -> str:
    asked, reached = record["asked"], record["perplexity"]
    return "\n".join(
        [
            f"# A small {asked['family']} for demonstrations",
            "",
            f"{record['parameters']:,} parameters in {asked['layers']} layers, trained from nothing on {record['tokens']:,} tokens",
            f"of documentation and source of the Python standard library, seed {asked['seed']}.",
            f"Perplexity on text of the same kind: {reached['model']:.4g} on {reached['contexts']} contexts (unigram "
            f"{reached['unigram']:.4g}, bigram {reached['bigram']:.4g}).",
            f"It is there to try `transplant-ray organ` on, and of no other use. How it was made is in `{RECORD}`.",
            "",
        ]
    )
