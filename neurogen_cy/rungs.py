"""The four rungs from token by token with copies to one batched call, and the text that all of them read.

0. token by token, a new array for every vector that is handed over (`train_step`);
1. the same, the embedding's row read where it lies (`row_view`);
2. the same, into arrays allocated once (`encode_into`, `broca_output_into`; `train_step(copies=False)`);
3. all tokens in one call (`train_step_batch`).
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from neurogen_cy import token_loop
from neurogen_cy.model import NeuroGen
from neurogen_cy.results import StepResult

Int32 = NDArray[np.int32]
RUNGS = (
    "token by token, new arrays",
    "token by token, pointer",
    "token by token, own buffers",
    "one batched call",
)
WAYS = (token_loop.COPIES, token_loop.POINTER, token_loop.BUFFERS)
BATCHED = 3
WARM_TOKENS = 4  # of a loop; they tell how many fit into the time


def text_tokens(data: bytes, vocab: int) -> Int32:
    """A text as token ids: its bytes or, in a vocabulary beyond them, its pairs of neighbours.

    Pairs stand in for words: there are about as many different ones, and they repeat as unevenly.
    """
    text = np.frombuffer(data, np.uint8).astype(np.int64)
    if vocab > 256:
        text = text[:-1] * 257 + text[1:]
    return (text % vocab).astype(np.int32)


class Reader:
    """Consecutive windows of one text, which begins anew at its end."""

    def __init__(self, text: Int32, streams: int = 1) -> None:
        self._rows = text[: len(text) // streams * streams].reshape(streams, -1)
        self._at = 0

    def rewind(self) -> None:
        """Start from the beginning of the text."""
        self._at = 0

    def take(self, tokens: int) -> tuple[Int32, Int32]:
        """ids and targets [streams, tokens], or [tokens] of a single stream."""
        length = self._rows.shape[1]
        if length < tokens + 1:
            raise ValueError(
                f"text: expected at least {(tokens + 1) * len(self._rows):,} tokens, got {self._rows.size:,}"
            )
        if self._at + tokens >= length:
            self._at = 0
        window = self._rows[:, self._at : self._at + tokens + 1]
        self._at += tokens
        both = np.ascontiguousarray(window[:, :-1]), np.ascontiguousarray(window[:, 1:])
        return both if len(self._rows) > 1 else (both[0][0], both[1][0])


def run(
    model: NeuroGen, rung: int, ids: Int32, targets: Int32, mark: token_loop.Mark = token_loop.unmarked
) -> StepResult:
    """Train on one sequence the way of this rung."""
    if rung == BATCHED:
        return model.train_step_batch(ids, targets)
    return token_loop.train_step(model, ids, targets, WAYS[rung], mark)


def tokens_within(model: NeuroGen, rung: int, T: int, reader: Reader, seconds: float) -> int:
    """Warm a rung up; return how many of T tokens a loop has time for (a batched call takes them all)."""
    if rung == BATCHED:
        run(model, rung, *reader.take(T))
        return T
    warm = min(WARM_TOKENS, T)
    run(model, rung, *reader.take(warm))
    begin = time.perf_counter()
    run(model, rung, *reader.take(warm))
    return min(T, max(warm, int(seconds * warm / (time.perf_counter() - begin))))
