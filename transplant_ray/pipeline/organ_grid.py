"""An organ sweep made concrete: organs opened and held against their hashes, every place planned, all text packed. Whatever can be
refused is refused here, before a process is started."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from transplant_ray.errors import DataError, OrganError, RecipeError
from transplant_ray.evaluate.example import Rendered, Split
from transplant_ray.evaluate.generate import GenerationSettings, Rules, end_ids
from transplant_ray.evaluate.scorers import LOSS
from transplant_ray.files import writable_folder
from transplant_ray.models.checkpoint import Checkpoint, open_checkpoint, read_generation_ends
from transplant_ray.models.loading import load_tokenizer, read_tokenizer
from transplant_ray.models.rope import max_positions
from transplant_ray.organ.folder import Organ, open_organ
from transplant_ray.organ.grid import Grid, plan_grid
from transplant_ray.organ.pack import Blocks, PackRecord, measuring_cut, pack_text
from transplant_ray.organ.text import stream_passages
from transplant_ray.organ.untrained import find_untrained
from transplant_ray.pipeline.job import PreparedTask, batch_rows, check_task_positions, make_task
from transplant_ray.pipeline.watch import Stopwatch
from transplant_ray.recipe import DOMAIN, GENERAL, MeasuredSpec, OrganRecipe
from transplant_ray.storage import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXTS = (DOMAIN, GENERAL)
SIDES: tuple[Split, ...] = ("select", "test")


@dataclass(frozen=True)
class OrganJob:
    recipe: OrganRecipe
    recipient: Checkpoint
    organs: Mapping[str, Organ]
    grid: Grid
    asked: Mapping[str, PreparedTask]
    """What every model is asked: the two texts, block by block, and then the tasks."""
    texts: Mapping[str, PackRecord]
    folder: RunFolder

    @property
    def tasks(self) -> Mapping[str, PreparedTask]:
        return {name: task for name, task in self.asked.items() if name not in TEXTS}


@contextmanager
def prepared(recipe: OrganRecipe, stopwatch: Stopwatch) -> Iterator[OrganJob]:
    """Read and check everything that the recipe names; for the block the layers as they were before training are on disk."""
    with stopwatch.stage("prepare"):
        recipient = open_checkpoint(recipe.recipient.model, recipe.recipient.revision, accept=recipe.accept)
        positions = max_positions(recipient.config)
        if positions is not None and recipe.context > positions:
            raise RecipeError(
                f"`context` {recipe.context}: {recipient.model} was built for {positions} positions. Give at most so many."
            )
        organs = {name: _open(name, folder) for name, folder in recipe.organs.items()}
        folder = RunFolder.of(recipe.storage, recipe.name)
        folder.check_owner(recipe.identity())
    with _beside(folder.path) as place:
        with stopwatch.stage("plan the grid"):
            grid = _plan(recipe, recipient, organs, place)
        for told in grid.warnings:
            stopwatch.watch.note(f"warning: {told}")
        asked, texts = _ask(recipe, recipient, positions, stopwatch)
        yield OrganJob(recipe, recipient, organs, grid, asked, texts, folder)


def _plan(recipe: OrganRecipe, recipient: Checkpoint, organs: Mapping[str, Organ], place: Path) -> Grid:
    untrained: dict[str, Organ | str] = {}
    if recipe.controls.untrained:
        untrained = {name: find_untrained(organ, recipient, place / name) for name, organ in organs.items()}
    return plan_grid(
        recipient, organs, recipe.sweep, untrained=untrained, alone=recipe.controls.alone, vocabulary=recipe.vocabulary
    )


@contextmanager
def _beside(run: Path) -> Iterator[Path]:
    """A folder in the storage, which all nodes see, and that leaves nothing."""
    new = not run.parent.exists()
    try:
        with TemporaryDirectory(prefix=f".{run.name}.", dir=writable_folder(run.parent)) as place:
            yield Path(place).absolute()
    finally:
        if new:
            with suppress(OSError):  # it is not empty: there are results
                run.parent.rmdir()


def _open(name: str, folder: str) -> Organ:
    try:
        return open_organ(Path(folder).absolute())
    except OrganError as error:
        raise OrganError(f"`organs.{name}`: {error}") from None


def _ask(
    recipe: OrganRecipe, recipient: Checkpoint, positions: int | None, stopwatch: Stopwatch
) -> tuple[dict[str, PreparedTask], dict[str, PackRecord]]:
    asked: dict[str, PreparedTask] = {}
    texts: dict[str, PackRecord] = {}
    tokenizer = read_tokenizer(recipient)
    for name, spec in ((DOMAIN, recipe.domain), (GENERAL, recipe.general)):
        with stopwatch.stage(f"read the {name} text"):
            asked[name], texts[name] = _pack(recipe, name, spec, recipient, tokenizer)
    if recipe.tasks:
        padded = load_tokenizer(recipient)
        ends = end_ids(read_generation_ends(recipient), padded)
        tasks = {name: make_task(recipe, spec, padded, ends) for name, spec in recipe.tasks.items()}
        for task in tasks.values():
            check_task_positions(task, positions)
        asked |= tasks
    return asked, texts


def _pack(
    recipe: OrganRecipe, name: str, spec: MeasuredSpec, recipient: Checkpoint, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreparedTask, PackRecord]:
    """Blocks as examples whose loss is read: the first token is the prompt, and all others are the answer."""
    cut = measuring_cut(spec, recipe.context)
    with TemporaryDirectory(prefix="transplant_ray-") as folder:
        try:
            pack = pack_text(stream_passages(spec), tokenizer, recipient.config.vocab_size, cut, Path(folder) / "pack")
        except DataError as error:
            raise DataError(f"`{name}`: {error}") from None
        examples: dict[Split, tuple[Rendered, ...]] = {side: _blocks(pack.side(side), spec.contexts) for side in SIDES}
    rules = Rules(GenerationSettings(recipe.context - 1, (), (), batch_rows(recipe)), LOSS)
    return PreparedTask({**examples, "probe": ()}, {}, (), rules), pack.record


def _blocks(blocks: Blocks, most: int) -> tuple[Rendered, ...]:
    """Each under the hash of what it says; one that comes twice under another name."""
    seen: dict[str, int] = {}
    found = []
    for ids in blocks.read(range(min(blocks.num, most))).tolist():
        key = hashlib.sha256(json.dumps(ids).encode()).hexdigest()[:16]
        seen[key] = seen.get(key, 0) + 1
        found.append(Rendered(key if seen[key] == 1 else f"{key}/{seen[key]}", (ids[0],), tuple(ids[1:]), ""))
    return tuple(found)
