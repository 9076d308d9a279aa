"""Training token by token, the way it was done before, and with what was copied left out, one thing at a time.

Kept to be measured against the batched step (`ladder`). Every token is a brain step, a decision on the host and an
update of its own; the three ways differ in how vectors are handed over, and learn the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from neurogen_cy.evaluation import token_ids
from neurogen_cy.results import StepResult

if TYPE_CHECKING:
    from neurogen_cy.model import NeuroGen

COPIES, POINTER, BUFFERS = "copies", "pointer", "buffers"
"""New arrays for every token; a view of the embedding instead of its copy; the caller's arrays, written over."""

Mark = Callable[[str], None]
"""Called after each piece of a token with its name: "copying", "brain_decoder", "learning" or "python", the rest."""


def unmarked(_: str) -> None:
    """Nobody measures."""


class Buffers:
    """What a token needs at hand: the arrays of a caller who allocates once."""

    def __init__(self, streams: int, dim: int) -> None:
        self.ids, self.targets, self.said = (np.zeros(streams, np.int32) for _ in range(3))
        self.embedded, self.broca = (np.zeros((streams, dim), np.float32) for _ in range(2))


def train_step(model: NeuroGen, ids: Any, targets: Any, way: str = COPIES, mark: Mark = unmarked) -> StepResult:
    """See `NeuroGen.train_step`; the statistics are means over the tokens."""
    ids, targets = _columns(model, ids, "ids"), _columns(model, targets, "targets")
    if ids.shape != targets.shape:
        raise ValueError(f"targets: expected shape {ids.shape}, got {targets.shape}")
    if way == POINTER and model.streams > 1:
        raise ValueError(f"way: expected one stream, whose embedding a pointer can show, got {model.streams}")
    listen, tokens = {COPIES: copying, POINTER: pointing, BUFFERS: in_place}[way], ids.shape[1]
    sums, rates = [0.0] * 4, dict.fromkeys((region.name for region in model.config.regions), 0.0)
    with model._alone():
        buffers = model._token_buffers
        for token in range(tokens):
            np.copyto(buffers.ids, ids[:, token])
            np.copyto(buffers.targets, targets[:, token])
            mark("python")
            listen(model, buffers, mark, hold=True)
            result, finite = model._result(model._engine.learn_held(buffers.ids, buffers.targets, model._update()))
            mark("learning")
            model._guard(finite, f"loss {result.loss}, gradient norm {result.grad_norm}")
            model.step += finite
            values = (result.loss, result.homeostasis, result.accuracy, result.grad_norm or 0.0)
            for i, value in enumerate(values):
                sums[i] += value
            for name, rate in result.rates.items():
                rates[name] += rate
    loss, homeostasis, accuracy, norm = (total / tokens for total in sums)
    return StepResult(
        loss, homeostasis, accuracy, ids.size, norm, {name: rate / tokens for name, rate in rates.items()}
    )


# One token each, up to the decoder's word: heard, run through the brain, answered, sampled.


def copying(model: NeuroGen, buffers: Buffers, mark: Mark = unmarked, *, hold: bool) -> None:
    """The user's loop as it was: a new array for each of what is heard, answered and said."""
    x = model.embedding.encode(buffers.ids)
    mark("copying")
    _answer(model, x, mark, hold)


def pointing(model: NeuroGen, buffers: Buffers, mark: Mark = unmarked, *, hold: bool) -> None:
    """The embedding is read where it lies."""
    x = model.embedding.row_view(int(buffers.ids[0]))
    mark("copying")
    _answer(model, x, mark, hold)


def _answer(model: NeuroGen, x: Any, mark: Mark, hold: bool) -> None:
    model.brain.step(x, hold=hold)
    mark("brain_decoder")
    broca = model.brain.broca_output()
    mark("copying")
    model.decoder.sample_into(broca, np.empty(model.streams, np.int32), greedy=True)
    mark("brain_decoder")


def in_place(model: NeuroGen, buffers: Buffers, mark: Mark = unmarked, *, hold: bool) -> None:
    """Everything is written into arrays that are there."""
    model.embedding.encode_into(buffers.ids, buffers.embedded)
    mark("copying")
    model.brain.step(buffers.embedded, hold=hold)
    mark("brain_decoder")
    model.brain.broca_output_into(buffers.broca)
    mark("copying")
    model.decoder.sample_into(buffers.broca, buffers.said, greedy=True)
    mark("brain_decoder")


def _columns(model: NeuroGen, tokens: Any, name: str) -> NDArray[Any]:
    array = token_ids(model, tokens, name)
    array = array[None] if array.ndim == 1 and model.streams == 1 else array
    if array.ndim != 2 or array.shape[0] != model.streams or array.shape[1] == 0:
        raise ValueError(f"{name}: expected shape [{model.streams}, T], got {array.shape}")
    return array
