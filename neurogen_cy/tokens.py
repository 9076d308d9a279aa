"""Tokens of a text in a row, with where its documents begin and how many bytes of text they stand for."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Tokens:
    """Token ids of one text, or of a part of it: in memory, or mapped from a file.

    Attributes
    ----------
    ids : uint8, uint16 or int32 array [n]
    starts : int64 array [d]
        Rising positions at which documents begin; the first is 0. Where a separator stands before a document, that is
        its first token.
    text_bytes : int
        Of the text that these tokens stand for, a separator counted as one. The same for every tokenizer, so that
        `bits_per_byte` compares.
    sha256 : str
        Of ids and starts: what makes two texts of tokens the same.
    pieces : int64 array [p, 2]
        Tokens and bytes before some positions, rising: where `head` may cut knowing the bytes. The first is (0, 0).
    unit : str
        What one of them is called in messages.
    """

    ids: NDArray[Any]
    starts: Int64
    text_bytes: int
    sha256: str
    pieces: Int64
    unit: str = "tokens"

    @classmethod
    def of_bytes(cls, data: bytes, starts: Int64 | None = None) -> Tokens:
        """Return bytes as tokens; they are one document where `starts` does not say otherwise."""
        starts = np.zeros(1, np.int64) if starts is None else starts
        digest = hashlib.sha256(data)
        if len(starts) > 1:
            digest.update(starts.tobytes())
        pieces = np.stack([starts, starts], axis=1)
        return cls(np.frombuffer(data, np.uint8), starts, len(data), digest.hexdigest(), pieces, "bytes")

    def __len__(self) -> int:
        return len(self.ids)

    def bits_per_byte(self, nats_per_token: float) -> float:
        """Return a mean loss over these tokens as bits per byte of their text."""
        return nats_per_token * (len(self) / self.text_bytes) / math.log(2)

    def part(self, begin: int, end: int, bytes_before: int, bytes_in: int) -> Tokens:
        """Return the tokens `begin .. end - 1`, which stand for `bytes_in` bytes after the first `bytes_before`."""
        if (begin, end) == (0, len(self)):
            return self
        inside = self.starts[np.searchsorted(self.starts, begin, "right") : np.searchsorted(self.starts, end)]
        starts = np.concatenate([np.zeros(1, np.int64), inside - begin])
        if self.unit == "bytes":
            return Tokens.of_bytes(self.ids[begin:end].tobytes(), starts)
        first, last = np.searchsorted(self.pieces[:, 0], (begin + 1, end))
        pieces = np.concatenate([np.zeros((1, 2), np.int64), self.pieces[first:last] - (begin, bytes_before)])
        digest = hashlib.sha256(f"{self.sha256} {begin} {end}".encode())
        return Tokens(self.ids[begin:end], starts, bytes_in, digest.hexdigest(), pieces, self.unit)

    def head(self, limit: int) -> Tokens:
        """Return the first tokens, about `limit` and never fewer: up to the next place whose bytes are known."""
        if self.unit == "bytes":
            return self.part(0, min(limit, len(self)), 0, min(limit, len(self)))
        at = int(np.searchsorted(self.pieces[:, 0], limit))
        if at >= len(self.pieces):
            return self
        return self.part(0, int(self.pieces[at, 0]), 0, int(self.pieces[at, 1]))
