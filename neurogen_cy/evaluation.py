"""Measuring a model on text of any length: windows of a state of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from neurogen_cy.model import NeuroGen


def token_ids(model: NeuroGen, tokens: Any, name: str) -> NDArray[Any]:
    """Token ids as a NumPy array of the same memory, of any shape, each in the vocabulary."""
    array: NDArray[Any] = model._module.host_array(tokens, name, ("int32", "int64"))
    bad = np.argwhere((array < 0) | (array >= model.config.vocab_size))
    if len(bad):
        where = ", ".join(str(index) for index in bad[0])
        raise IndexError(f"{name}[{where}]: expected a token id in 0..{model.config.vocab_size - 1}, got "
                         f"{array[tuple(bad[0])]}")
    return array


def evaluate(model: NeuroGen, ids: Any, targets: Any, resets: Any) -> float:
    """See `NeuroGen.evaluate`."""
    arrays = [token_ids(model, ids, "ids"), token_ids(model, targets, "targets")]
    if resets is not None:
        arrays.append(model._module.host_array(resets, "resets", ("bool", "uint8")))
    if arrays[0].ndim not in (1, 2) or arrays[0].size == 0:
        raise ValueError(f"ids: expected shape [S, L] or [L] with at least one token, got {arrays[0].shape}")
    for name, values in zip(("targets", "resets"), arrays[1:]):
        if values.shape != arrays[0].shape:
            raise ValueError(f"{name}: expected shape {arrays[0].shape}, got {values.shape}")
    inputs = [np.atleast_2d(values) for values in arrays]
    shape = inputs[0].shape
    rows = model.streams * model.max_tokens
    total = 0.0
    for first in range(0, shape[0], rows):
        group = slice(first, min(first + rows, shape[0]))
        streams = group.stop - group.start
        window = rows // streams
        state = model._engine.new_state(streams)
        for begin in range(0, shape[1], window):
            part = (group, slice(begin, min(begin + window, shape[1])))
            cut = [np.ascontiguousarray(values[part]) for values in inputs]
            flags = cut[2] if len(cut) == 3 else None
            total += float(model._engine.evaluate(state, cut[0], cut[1], flags, part[1].stop - begin))
    return total / arrays[0].size
