"""Streams over tokens: `B` endless ones to train on, `S` contiguous pieces to evaluate on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neurogen_cy.tokens import Tokens

Int32 = NDArray[np.int32]
Bool = NDArray[np.bool_]


def held_out(tokens: Tokens, streams: int = 16) -> tuple[Int32, Int32, Bool]:
    """Cut a text into contiguous streams so that every predicted token is counted exactly once.

    With `L = (len(tokens) - 1) // streams`, stream `s` reads tokens `s*L .. s*L + L - 1` and predicts tokens
    `s*L + 1 .. s*L + L`: it starts at its own first token with no history, and that token is predicted by
    the stream before it. So tokens `1 .. streams*L` are predicted once each; token 0 is never predicted
    (nothing precedes it), nor are the last `(len(tokens) - 1) % streams`, fewer than `streams`.

    Returns
    -------
    ids, targets : int32 arrays [streams, L]
    resets : bool array [streams, L]
        True where a document begins.

    Raises
    ------
    ValueError
        If `streams < 1` or the text has fewer than `streams + 1` tokens.
    """
    _positive("streams", streams)
    length = (len(tokens) - 1) // streams
    if length < 1:
        raise ValueError(
            f"expected at least streams + 1 = {streams + 1} {tokens.unit} to evaluate, got {len(tokens)}"
        )
    count = streams * length
    ids = tokens.ids[: count + 1].astype(np.int32)
    resets = np.zeros(count, np.bool_)
    resets[tokens.starts[: np.searchsorted(tokens.starts, count)]] = True
    shape = (streams, length)
    return ids[:-1].reshape(shape), ids[1:].reshape(shape), resets.reshape(shape)


def evaluation_streams(data: bytes, streams: int = 16) -> tuple[Int32, Int32]:
    """Return ids and targets of `held_out` for a text of bytes that is one document."""
    return held_out(Tokens.of_bytes(data), streams)[:2]


class TokenStreams:
    """`B` endless streams over one text, handed out `T` tokens at a time in the same buffers.

    The text is a ring of `n - 1` positions, `n` its tokens: position `p` reads token `p` and predicts token `p + 1`,
    and after the last position comes position 0 again. Stream `b` starts at position `b * (n - 1) // B`, so together
    the streams read every position once before any is read twice. `resets` is True where a document begins, position 0
    among them, else False.

    Parameters
    ----------
    text : Tokens or bytes
        Text to train on, at least `streams * tokens + 1` tokens; bytes are one document.
    streams, tokens : int
        `B` and `T`.

    Attributes
    ----------
    ids, targets : int32 arrays [B, T]
        What the last `next` filled in; overwritten by the following call.
    resets : bool array [B, T]

    Raises
    ------
    ValueError
        If the text is too short, or `streams` or `tokens` is not positive.
    """

    def __init__(self, text: Tokens | bytes, streams: int, tokens: int) -> None:
        _positive("streams", streams)
        _positive("tokens", tokens)
        self._text = text if isinstance(text, Tokens) else Tokens.of_bytes(text)
        needed = streams * tokens + 1
        if len(self._text) < needed:
            raise ValueError(
                f"expected a training text of at least streams * tokens + 1 = {streams} * {tokens} + 1 = "
                f"{needed} {self._text.unit}, got {len(self._text)}"
            )
        self._ring = len(self._text) - 1
        self._starts = [b * self._ring // streams for b in range(streams)]
        self._read = 0
        self.ids: Int32 = np.zeros((streams, tokens), np.int32)
        self.targets: Int32 = np.zeros((streams, tokens), np.int32)
        self.resets: Bool = np.zeros((streams, tokens), np.bool_)

    def next(self) -> tuple[Int32, Int32, Bool]:
        """Fill and return `ids`, `targets` and `resets`, each [B, T], and move on by `T` tokens."""
        source, documents = self._text.ids, self._text.starts
        tokens = self.ids.shape[1]
        self.resets.fill(False)
        for b, start in enumerate(self._starts):
            position = (start + self._read) % self._ring
            done = 0
            while done < tokens:
                count = min(tokens - done, self._ring - position)
                self.ids[b, done : done + count] = source[position : position + count]
                self.targets[b, done : done + count] = source[position + 1 : position + count + 1]
                first, last = np.searchsorted(documents, (position, position + count))
                self.resets[b, done + documents[first:last] - position] = True
                done += count
                position = 0
        self._read += tokens
        return self.ids, self.targets, self.resets

    @property
    def epochs(self) -> float:
        """How often the text was read so far."""
        return self._read * len(self._starts) / self._ring

    @property
    def cursor(self) -> dict[str, Any]:
        """Where the streams stand, as JSON-able facts; assign it to continue with the very next token.

        Assigning raises TypeError if it is no cursor, ValueError if it belongs to another text or another
        number of streams or of tokens a call.
        """
        streams, tokens = self.ids.shape
        return {
            "tokens_per_stream": self._read,
            "streams": streams,
            "tokens": tokens,
            "sha256": self._text.sha256,
        }

    @cursor.setter
    def cursor(self, cursor: Mapping[str, Any]) -> None:
        read = cursor.get("tokens_per_stream") if isinstance(cursor, Mapping) else None
        if type(read) is not int or read < 0:
            raise TypeError(
                f"expected a cursor with a whole number of tokens_per_stream >= 0, got {cursor!r}"
            )
        own = self.cursor
        for key in ("streams", "tokens", "sha256"):
            given = cursor.get(key, own[key] if key == "tokens" else None)  # it was not noted at first
            if given != own[key]:
                raise ValueError(f"expected a cursor with {key} {own[key]}, got {given}")
        self._read = read


ByteStreams = TokenStreams
"""Its first name, when every token was a byte."""


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"expected {name} >= 1, got {value}")
