"""Text as token ids on disk: written once, and then read in blocks of the context's length, in any order, at no cost.

    train.bin, held_out.bin     token ids, one after another
    pack.json                   how many, of what, and the hash of all text: what an organ may say of its data

The files lie beside the training's checkpoints, never in an organ.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedTokenizerBase

from transplant_ray.errors import DataError, RunError
from transplant_ray.files import whole_folder, write_json
from transplant_ray.models.header import brief
from transplant_ray.organ.text import Passage
from transplant_ray.recipe import TrainingSpec

TRAIN, HELD_OUT = "train", "held_out"
RECORD = "pack.json"
TOGETHER = 256
"""Passages that the tokenizer is given at a time."""


class Side(BaseModel):
    """What is trained on, or what is held out of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    documents: int
    """That begin in it; of a plain file, whose pieces may be on both sides, so do pieces after one that is on the other."""
    tokens: int
    blocks: int
    """Whole contexts; what is left over is not read."""


class PackRecord(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    context: int
    dtype: str
    train: Side
    held_out: Side
    text: str
    """SHA-256 over the hashes of all passages that were read, in their order."""


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

    @cached_property
    def train(self) -> Blocks:
        return self._blocks(TRAIN, self.record.train)

    @cached_property
    def held_out(self) -> Blocks:
        return self._blocks(HELD_OUT, self.record.held_out)

    def _blocks(self, name: str, side: Side) -> Blocks:
        return Blocks(self.folder / f"{name}.bin", side.blocks, self.record.context, self.record.dtype)


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
    shuffled: np.ndarray = torch.randperm(num, generator=torch.Generator().manual_seed(_number(seed))).numpy()
    return shuffled


def pack_text(
    passages: Iterable[Passage], tokenizer: PreTrainedTokenizerBase, vocabulary: int, spec: TrainingSpec, folder: Path
) -> Pack:
    """Write what the training needs of the text, and no more, into `folder`.

    `vocabulary` is the number of ids that the embedding knows. DataError where there is less than one context, or an id that the
    embedding does not know; RunError where there is no room. Then there is no folder.
    """
    ends = _ends(tokenizer)
    dtype = "uint16" if vocabulary <= 1 << 16 else "uint32"
    hashes, most = hashlib.sha256(), spec.num_tokens
    with whole_folder(folder, replace=True) as new, (new / "train.bin").open("wb") as t, (new / "held_out.bin").open("wb") as h:
        train, held = _Stream(t, dtype, ends), _Stream(h, dtype, ends)
        for passage, ids in _encoded(passages, tokenizer, vocabulary):
            digest = hashlib.sha256(passage.text.encode()).digest()
            hashes.update(digest)
            here, there = (held, train) if _is_held_out(digest, spec) else (train, held)
            there.close()
            here.put(passage, ids)
            if train.tokens >= most:
                break
        train.close()
        held.close()
        record = PackRecord(
            context=spec.context, dtype=dtype, train=train.side(spec.context), held_out=held.side(spec.context),
            text=hashes.hexdigest(),
        )  # fmt: skip
        _check(record)
        write_json(new / RECORD, record.model_dump())
    return Pack(folder, record)


def _check(record: PackRecord) -> None:
    if record.train.tokens == 0 and record.held_out.tokens == 0:
        raise DataError("`data`: holds no text. Give files with text, and `text` a template over its columns.")
    if record.train.blocks == 0:
        raise DataError(
            f"`data`: {record.train.tokens} tokens to train on ({record.held_out.tokens} are held out), fewer than one context of "
            f"{record.context}. Give more text, or a shorter `context`."
        )


def _is_held_out(digest: bytes, spec: TrainingSpec) -> bool:
    """By what the passage says and the seed, wherever it stands: the same text is never on both sides."""
    return _number(f"{spec.seed}:{digest.hex()}") < spec.held_out * 2**63


def _number(text: str) -> int:
    """From 0 to below 2⁶³."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


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

    def __init__(self, file: IO[bytes], dtype: str, ends: tuple[list[int], list[int]]) -> None:
        self.file, self.dtype, self.ends = file, dtype, ends
        self.documents = self.tokens = 0
        self.open = False

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
