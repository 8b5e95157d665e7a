"""Whose token ids an organ has seen: the embedding below it is the recipient's, and so should mean the same."""

from __future__ import annotations

import hashlib
import json
from typing import Literal

from pydantic import BaseModel, ConfigDict

from transplant_ray.errors import CheckpointError
from transplant_ray.models.checkpoint import Checkpoint
from transplant_ray.models.loading import read_tokenizer

VocabularyChoice = Literal["refuse", "warn"]
CHOICES: tuple[VocabularyChoice, ...] = ("refuse", "warn")


class Vocabulary(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    size: int
    """Rows of the embedding."""
    tokenizer: str | None
    """SHA-256 over all tokens with their ids; None where there is no tokenizer beside the weights."""


def read_vocabulary(checkpoint: Checkpoint) -> Vocabulary:
    return Vocabulary(size=checkpoint.config.vocab_size, tokenizer=_fingerprint(checkpoint))


def compare_vocabularies(organ: Vocabulary, recipient: Vocabulary) -> tuple[str | None, str | None]:
    """In what they differ, and what could not be compared; None where there is nothing to say."""
    if organ.tokenizer is not None and recipient.tokenizer is not None:
        if organ.tokenizer == recipient.tokenizer:
            return None, None  # embeddings may be padded to different sizes
        return f"the vocabulary: tokens or their ids are others ({_shown(organ)}; {_shown(recipient)})", None
    if organ.size != recipient.size:
        return f"the vocabulary: the organ has seen {organ.size} tokens, the recipient has {recipient.size}", None
    return None, "the vocabulary could be compared by its size alone, for one of the two came without a tokenizer"


def _fingerprint(checkpoint: Checkpoint) -> str | None:
    try:
        tokens = read_tokenizer(checkpoint).get_vocab()
    except CheckpointError:  # there is none, or none that can be read: whoever compares says so
        return None
    return hashlib.sha256(json.dumps(sorted(tokens.items())).encode()).hexdigest()


def _shown(vocabulary: Vocabulary) -> str:
    return f"{vocabulary.size} of fingerprint {str(vocabulary.tokenizer)[:10]}"
