"""What counting alone reaches on a text: the references that a small model must leave behind."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from transplant_ray.organ.pack import Blocks


@dataclass(frozen=True)
class Counts:
    """How often tokens, and pairs of them, stand in a text; V tokens in the vocabulary."""

    single_V: np.ndarray
    pairs_VV: np.ndarray

    @classmethod
    def of(cls, blocks: Blocks, vocabulary: int) -> Counts:
        ids_BT = blocks.read(range(blocks.num)).numpy()
        pairs_VV = np.zeros((vocabulary, vocabulary), dtype=np.float64)
        np.add.at(pairs_VV, (ids_BT[:, :-1].ravel(), ids_BT[:, 1:].ravel()), 1)
        return cls(np.bincount(ids_BT.ravel(), minlength=vocabulary).astype(np.float64), pairs_VV)

    def unigram_loss(self, blocks: Blocks) -> float:
        """Mean loss in nats a token by frequencies alone, one added to each; no block's first token is asked for."""
        following_BT = blocks.read(range(blocks.num)).numpy()[:, 1:]
        return float(-np.log(self._shares_V[following_BT]).mean())

    def bigram_loss(self, blocks: Blocks) -> float:
        """The same by the token before, smoothed by frequencies as Witten and Bell 1991 do (method C): nothing is tuned."""
        ids_BT = blocks.read(range(blocks.num)).numpy()
        before, after = ids_BT[:, :-1].ravel(), ids_BT[:, 1:].ravel()
        kinds_V, seen_V = (self.pairs_VV > 0).sum(1), self.pairs_VV.sum(1)
        kinds_V = np.maximum(kinds_V, 1)  # after a token that was never seen, frequencies alone
        chances = (self.pairs_VV[before, after] + kinds_V[before] * self._shares_V[after]) / (seen_V + kinds_V)[before]
        return float(-np.log(chances).mean())

    @property
    def _shares_V(self) -> np.ndarray:
        shares: np.ndarray = (self.single_V + 1) / (self.single_V + 1).sum()
        return shares
