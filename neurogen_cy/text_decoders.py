"""Incremental decoders: the text of token ids as they come."""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


class TextDecoder(ABC):
    """Ids in, text out as it comes: never half a character, and all of it joined equals `Tokenizer.decode`."""

    @abstractmethod
    def push(self, ids: int | Sequence[int] | NDArray[Any]) -> str:
        """Take the next ids; return what is certain by now, perhaps nothing."""

    @abstractmethod
    def finish(self) -> str:
        """Return what was held back. The decoder is then as new."""


class Utf8Decoder(TextDecoder):
    """For tokenizers whose tokens are bytes of their own, whatever stands beside them."""

    def __init__(self, decode_bytes: Callable[[Sequence[int]], bytes]) -> None:
        self._decode_bytes = decode_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: int | Sequence[int] | NDArray[Any]) -> str:
        """See `TextDecoder.push`."""
        return self._utf8.decode(self._decode_bytes(_listed(ids)))

    def finish(self) -> str:
        """See `TextDecoder.finish`."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class WindowDecoder(TextDecoder):
    """For tokenizers whose tokens depend on their neighbours: decodes the newest ids again and says what was added.

    Held back: text that ends in U+FFFD, which the next token may complete, and text after which `open_run` is true
    of the last id (byte fallback: one invalid byte turns the whole run of bytes into U+FFFD).
    """

    CONTEXT, WINDOW = 16, 64

    def __init__(self, decode: Callable[[Sequence[int]], str], open_run: Callable[[int], bool]) -> None:
        self._decode, self._open_run = decode, open_run
        self._ids: list[int] = []
        self._said = ""

    def push(self, ids: int | Sequence[int] | NDArray[Any]) -> str:
        """See `TextDecoder.push`."""
        self._ids += _listed(ids)
        text = self._decode(self._ids)
        if not self._ids or text.endswith("\ufffd") or self._open_run(self._ids[-1]) or not text.startswith(self._said):
            return ""
        added = text[len(self._said) :]
        self._said = text
        if len(self._ids) > self.WINDOW:
            newest = self._decode(self._ids[-self.CONTEXT :])
            if text.endswith(newest):
                self._ids, self._said = self._ids[-self.CONTEXT :], newest
        return added

    def finish(self) -> str:
        """See `TextDecoder.finish`."""
        text = self._decode(self._ids)[len(self._said) :]
        self._ids, self._said = [], ""
        return text


def _listed(ids: int | Sequence[int] | NDArray[Any]) -> list[int]:
    return [int(i) for i in np.asarray(ids).reshape(-1)]
