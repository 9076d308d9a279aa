"""From documents to tokens with bounded memory: long documents are tokenised in pieces.

A document of at most `PIECE` bytes is one piece. A longer one is cut at white space where the tokens around the cut
are the same with and without it, as far as `CONTEXT` bytes on either side tell: for byte-level BPE behind a new line,
for SentencePiece in place of one. So its tokens are those of the whole document. Where a tokenizer has no such place
(text without white space; rules that look further) the piece ends before the limit all the same, between characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from neurogen_cy.sources import Chunk
from neurogen_cy.tokenization import ByteTokenizer, Int32, InvalidTextError, Tokenizer

PIECE = 1 << 18
CONTEXT = 512
BATCH = 1 << 22
"""Bytes that are tokenised at a time: enough for the library's threads."""

SITES = 32
"""Places that are tried before a piece ends anywhere."""

_WHITE = re.compile(rb"(?<=[^\s])[\n ](?=[^\s])")


@dataclass(frozen=True)
class Piece:
    """A stretch of a document that is tokenised as one.

    Attributes
    ----------
    data : bytes
    size : int
        Bytes of the document that it stands for: a white space in place of the cut belongs to the piece before it.
    at : int
        Its first byte in the whole text; if `first`, the separator's.
    first : bool
        Whether its document begins with it.
    where, offset : str, int
        For messages.
    """

    data: bytes
    size: int
    at: int
    first: bool
    where: str
    offset: int

    @property
    def separated(self) -> bool:
        """Whether a separator stands before it."""
        return self.first and self.at > 0

    @property
    def end(self) -> int:
        """The byte of the whole text behind it."""
        return self.at + self.separated + self.size


@dataclass(frozen=True)
class HeldOut:
    """The place in a text of `total` bytes behind which it is for validation: byte `target`.

    Where a document begins shortly before it (`NEAR` of the text), that is the place. Else the document is cut in two.
    """

    total: int
    target: int

    NEAR = 0.05

    def near(self, start: int) -> bool:
        """Say whether a document that begins at byte `start` is to be held out as a whole."""
        return 0 < start <= self.target and self.target - start <= self.NEAR * self.total


def pieces(
    chunks: Iterable[Chunk], tokenizer: Tokenizer, held_out: HeldOut | None = None, limit: int = PIECE
) -> Iterator[Piece]:
    """Cut documents into pieces of at most `limit` bytes, one of them at the place of `held_out`."""
    cutter = _Cutter(tokenizer, limit)
    buffer, document, position = b"", 0, 0  # text that waits, where its document begins, and where it does itself
    where, offset, first = "", 0, True

    def take(end: int, begin: int) -> Piece:
        """Take the first `begin` bytes from the buffer, `end` of them as a piece."""
        nonlocal buffer, position, offset, first
        piece = Piece(buffer[:end], begin, document if first else position, first, where, offset)
        buffer, position, offset, first = buffer[begin:], position + begin, offset + begin, False
        return piece

    def ready(rest: int) -> Iterator[Piece]:
        """Yield pieces until at most `rest` bytes wait."""
        while len(buffer) > rest:
            ahead = -1 if held_out is None or held_out.near(document) else held_out.target - position
            if 0 < ahead < min(len(buffer), limit) and (end := _between_characters(buffer, ahead, tokenizer)):
                yield take(end, end)
            elif len(buffer) > limit:
                yield take(*cutter.cut(buffer))
            else:
                yield take(len(buffer), len(buffer))

    for chunk in chunks:
        if chunk.first:
            yield from ready(0)
            document = position
            position += position > 0  # the separator
            buffer, where, offset, first = chunk.data, chunk.where, chunk.offset, True
        else:
            buffer += chunk.data
        yield from ready(limit)
    yield from ready(0)


def tokenised(
    source: Iterable[Piece], tokenizer: Tokenizer, batch: int = BATCH
) -> Iterator[tuple[Piece, Int32]]:
    """Yield each piece with its ids, the separator's before them where it begins a document, but the very first.

    Raises
    ------
    ValueError
        If the tokenizer cannot hold a piece: where, what was expected and found.
    """
    waiting: list[Piece] = []
    size = 0
    for piece in source:
        waiting.append(piece)
        size += len(piece.data)
        if size >= batch:
            yield from _encoded(waiting, tokenizer)
            waiting, size = [], 0
    yield from _encoded(waiting, tokenizer)


def _encoded(batch: list[Piece], tokenizer: Tokenizer) -> Iterator[tuple[Piece, Int32]]:
    try:
        rows = tokenizer.encode_batch([piece.data for piece in batch])
    except InvalidTextError:
        rows = [_encode(piece, tokenizer) for piece in batch]
    separator = tokenizer.separator
    for piece, ids in zip(batch, rows):
        yield piece, np.concatenate([separator, ids]) if piece.separated else ids


def _encode(piece: Piece, tokenizer: Tokenizer) -> Int32:
    try:
        return tokenizer.encode(piece.data)
    except InvalidTextError as error:
        raise ValueError(f"{piece.where}, from byte {piece.offset}: {error}") from error


def _between_characters(data: bytes, at: int, tokenizer: Tokenizer) -> int:
    """Return the nearest place not behind `at` that does not cut a character in two; for bytes every place."""
    if not isinstance(tokenizer, ByteTokenizer):
        for back in range(min(4, at + 1)):
            if data[at - back] & 0xC0 != 0x80:
                return at - back
    return at


class _Cutter:
    """Finds where to cut the text of one tokenizer; see the module."""

    VARIANTS = ((1, 1), (0, 0), (0, 1))  # behind a white space, before it, in place of it

    def __init__(self, tokenizer: Tokenizer, limit: int) -> None:
        self._tokenizer, self._limit = tokenizer, limit
        self._variants = list(self.VARIANTS)  # the one that was right last stands first

    def cut(self, data: bytes) -> tuple[int, int]:
        """Return where the piece ends and where the next begins, in a text longer than the limit."""
        if isinstance(self._tokenizer, ByteTokenizer):
            return self._limit, self._limit
        begin = max(1, self._limit // 2)
        sites = [match.start() for match in _WHITE.finditer(data, begin, self._limit)]
        lines = [site for site in sites if data[site] == 10][-SITES:]
        for site in (*reversed(lines), *reversed(sites[-SITES:])):
            for variant in self._variants:
                end, start = site + variant[0], site + variant[1]
                if self._same(data, end, start):
                    self._variants.sort(key=lambda other: other != variant)
                    return end, start
        end = sites[-1] + 1 if sites else _between_characters(data, self._limit, self._tokenizer)
        return end, end

    def _same(self, data: bytes, end: int, start: int) -> bool:
        """Say whether the tokens around a cut are those without it."""
        left = data[_between_characters(data, max(0, end - CONTEXT), self._tokenizer) : end]
        stop = min(len(data), start + CONTEXT)
        right = data[start : _between_characters(data, stop, self._tokenizer) if stop < len(data) else stop]
        try:
            whole, *parts = self._tokenizer.encode_batch([left + data[end:start] + right, left, right])
        except InvalidTextError:
            return False  # tokenising the piece says where
        return np.array_equal(whole, np.concatenate(parts))
