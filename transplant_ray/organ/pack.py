"""Text as token ids on disk: written once, and then read in blocks of the context's length, in any order, at no cost.

    train.bin, held_out.bin     token ids, one after another: a file for each side
    pack.json                   how many, of what, and the hash of all text: what an organ may say of its data

The files lie beside the training's checkpoints, never in an organ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from transplant_ray.errors import DataError, RunError
from transplant_ray.files import whole_folder, write_json
from transplant_ray.models.header import brief
from transplant_ray.organ.text import Passage, number_of, place_of
from transplant_ray.recipe import MeasuredSpec, TrainingSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORD = "pack.json"
PURPOSES = {
    "train": "to train on", "held_out": "held out", "select": "to choose by", "test": "to confirm on",
}  # fmt: skip
"""Sides, and what is done on them."""
TOGETHER = 256
"""Passages that the tokenizer is given at a time."""


class Side(BaseModel):
    """What is trained on, or what is held out of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    documents: int
    """That begin in it; of a plain file, whose pieces may be on several sides, so do pieces after one that is on another."""
    tokens: int
    blocks: int
    """Whole contexts; what is left over is not read."""


class PackRecord(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    context: int
    dtype: str
    sides: dict[str, Side]
    text: str
    """SHA-256 over the hashes of all passages that were read, in their order."""


@dataclass(frozen=True)
class Cut:
    """How text is cut up: into contexts, and each passage to one side."""

    context: int
    wanted: Mapping[str, int | None]
    """Sides, and how many tokens are needed of each at most; None takes what comes while the others fill."""
    side: Callable[[bytes], str]
    """By the hash of what a passage says, so that the same text is never on two."""


def training_cut(spec: TrainingSpec) -> Cut:
    """`train`, as much as the training reads, and `held_out`."""

    def side(digest: bytes) -> str:
        return "held_out" if place_of(digest, str(spec.seed)) < spec.held_out else "train"

    return Cut(spec.context, {"train": spec.num_tokens, "held_out": None}, side)


def measuring_cut(spec: MeasuredSpec, context: int) -> Cut:
    """`select` and `test`."""

    def side(digest: bytes) -> str:
        return "select" if place_of(digest, "select") < 0.5 else "test"

    most = spec.contexts * context
    return Cut(context, {"select": most, "test": most}, side)


@dataclass(frozen=True)
class Pack:
    folder: Path
    record: PackRecord

    @classmethod
    def open(cls, folder: Path) -> Pack:
        try:
            return cls(folder, PackRecord.model_validate_json((folder / RECORD).read_bytes()))
        except (OSError, ValueError) as error:
            raise RunError(f"{folder}: not readable packed text ({brief(error)}). Remove it; it is made again.") from error

    def side(self, name: str) -> Blocks:
        return Blocks(self.folder / f"{name}.bin", self.record.sides[name].blocks, self.record.context, self.record.dtype)

    @cached_property
    def train(self) -> Blocks:
        return self.side("train")

    @cached_property
    def held_out(self) -> Blocks:
        return self.side("held_out")


@dataclass(frozen=True)
class Blocks:
    path: Path
    num: int
    context: int
    dtype: str

    def read(self, indices: Sequence[int]) -> torch.Tensor:
        """(len(indices), context), int64."""
        return torch.from_numpy(self._tokens[list(indices)].astype(np.int64))

    @cached_property
    def _tokens(self) -> np.ndarray:
        flat = np.memmap(self.path, dtype=self.dtype, mode="r")
        return flat[: self.num * self.context].reshape(self.num, self.context)


@dataclass(frozen=True)
class Order:
    """In which order blocks are read: every one once, then every one once more in another order, and so on."""

    num_blocks: int
    seed: int

    def blocks(self, start: int, stop: int) -> list[int]:
        """At the positions from `start` to before `stop`."""
        places = (divmod(position, self.num_blocks) for position in range(start, stop))
        return [int(_shuffled(self.num_blocks, f"{self.seed}:{turn}")[place]) for turn, place in places]


@lru_cache(maxsize=2)  # a step may need the end of one and the beginning of the next
def _shuffled(num: int, seed: str) -> np.ndarray:
    shuffled: np.ndarray = torch.randperm(num, generator=torch.Generator().manual_seed(number_of(seed))).numpy()
    return shuffled


def pack_text(passages: Iterable[Passage], tokenizer: PreTrainedTokenizerBase, vocabulary: int, cut: Cut, folder: Path) -> Pack:
    """Write what is wanted of the text, and no more, into `folder`.

    `vocabulary` is the number of ids that the embedding knows. DataError where there is less than one context of what is needed, or
    an id that the embedding does not know; RunError where there is no room. Then there is no folder.
    """
    ends = _ends(tokenizer)
    dtype = "uint16" if vocabulary <= 1 << 16 else "uint32"
    hashes = hashlib.sha256()
    with whole_folder(folder, replace=True) as new, ExitStack() as files:
        streams = {
            name: _Stream(files.enter_context((new / f"{name}.bin").open("wb")), dtype, ends, most)
            for name, most in cut.wanted.items()
        }
        for passage, ids in _encoded(passages, tokenizer, vocabulary):
            hashes.update(passage.digest)
            here = streams[cut.side(passage.digest)]
            for other in streams.values():
                if other is not here:
                    other.close()
            if not here.full:
                here.put(passage, ids)
            if all(stream.full for stream in streams.values() if stream.most is not None):
                break
        for stream in streams.values():
            stream.close()
        sides = {name: stream.side(cut.context) for name, stream in streams.items()}
        record = PackRecord(context=cut.context, dtype=dtype, sides=sides, text=hashes.hexdigest())
        _check(record, cut)
        write_json(new / RECORD, record.model_dump())
    return Pack(folder, record)


def _check(record: PackRecord, cut: Cut) -> None:
    if not any(side.tokens for side in record.sides.values()):
        raise DataError("`data`: holds no text. Give files with text, and `text` a template over its columns.")
    for name, most in cut.wanted.items():
        if most is not None and record.sides[name].blocks == 0:
            found = ", ".join(f"{side.tokens} tokens {PURPOSES[each]}" for each, side in record.sides.items())
            raise DataError(
                f"`data`: {found}; {PURPOSES[name]} there must be one context of {record.context} at least. Give more text, or a "
                "shorter `context`."
            )


def _ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What begins a document (where the tokenizer itself begins texts so) and what ends it."""
    if tokenizer.eos_token_id is None:
        raise DataError("the model's tokenizer has no end token, which goes between documents. Give it one, or another model.")
    begin = tokenizer.bos_token_id
    begins = begin is not None and list(tokenizer("a")["input_ids"])[:1] == [begin]
    return [begin] if begins else [], [tokenizer.eos_token_id]


def _encoded(
    passages: Iterable[Passage], tokenizer: PreTrainedTokenizerBase, vocabulary: int
) -> Iterator[tuple[Passage, list[int]]]:
    source = iter(passages)
    while some := list(islice(source, TOGETHER)):
        found = tokenizer([passage.text for passage in some], add_special_tokens=False, verbose=False)["input_ids"]
        for passage, ids in zip(some, found, strict=True):
            if ids and max(ids) >= vocabulary:
                raise DataError(
                    f"the tokenizer has a token {max(ids)}, and the embedding only {vocabulary} rows. They are not of one model."
                )
            yield passage, ids


class _Stream:
    """Tokens of one side; a document that goes on elsewhere ends here."""

    def __init__(self, file: IO[bytes], dtype: str, ends: tuple[list[int], list[int]], most: int | None) -> None:
        self.file, self.dtype, self.ends, self.most = file, dtype, ends, most
        self.documents = self.tokens = 0
        self.open = False

    @property
    def full(self) -> bool:
        return self.most is not None and self.tokens >= self.most

    def put(self, passage: Passage, ids: Sequence[int]) -> None:
        begins = passage.first or not self.open
        if begins:
            self.close()
            self.documents += 1
        self._write([*self.ends[0], *ids] if begins else ids)
        self.open = True
        if passage.last:
            self.close()

    def close(self) -> None:
        if self.open:
            self._write(self.ends[1])
        self.open = False

    def side(self, context: int) -> Side:
        self.file.flush()
        return Side(documents=self.documents, tokens=self.tokens, blocks=self.tokens // context)

    def _write(self, ids: Sequence[int]) -> None:
        np.asarray(ids, dtype=self.dtype).tofile(self.file)
        self.tokens += len(ids)
