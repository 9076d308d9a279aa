"""What every neuron did while a text was heard: membrane, spikes and gates, token by token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
from numpy.typing import NDArray

from neurogen_cy.evaluation import token_ids

if TYPE_CHECKING:
    from neurogen_cy.model import NeuroGen

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Recording:
    """What `NeuroGen.record` saw: S streams of L tokens, by the names of regions in the order of the configuration.

    Attributes
    ----------
    ids : int array [S, L]
        The tokens that were heard.
    u : dict of str to float32 array [S, L, n]
        Distance to threshold; the membrane potential is u + 1.
    s : dict of str to float32 array [S, L, n]
        Spikes, 0 where the neuron was silent.
    gates : dict of str to float32 array [S, L, n]
        G = 2 sigmoid(g), the factor on the drive, of gated regions only.
    """

    ids: NDArray[Any]
    u: dict[str, Float32]
    s: dict[str, Float32]
    gates: dict[str, Float32]


def record(model: NeuroGen, ids: Any, state: Mapping[str, Any] | None) -> Recording:
    """See `NeuroGen.record`."""
    heard = token_ids(model, ids, "ids")
    if heard.ndim not in (1, 2) or heard.size == 0:
        raise ValueError(f"ids: expected shape [S, L] or [L] with at least one token, got {heard.shape}")
    heard = np.atleast_2d(heard)
    streams, length = heard.shape
    rows = model.streams * model.max_tokens
    if streams > rows:
        raise ValueError(f"ids: expected at most streams * max_tokens = {rows} streams, got {streams}")
    own = model._engine.new_state(streams)
    if state is not None:
        own.load(state)
    gated = {p.dst for p in model.config.projections if p.kind == "gate"}
    sizes = {region.name: region.neurons for region in model.config.regions}
    needed = heard.size * 4 * (2 * sum(sizes.values()) + sum(sizes[name] for name in gated))
    free = psutil.virtual_memory().available
    if needed > free:
        raise MemoryError(f"ids: expected a text whose record fits into {free:,} bytes of free memory, got {needed:,}")
    u, s, gates = (
        {name: np.empty((streams, length, n), np.float32) for name, n in sizes.items() if name in kept}
        for kept in (sizes, sizes, gated)
    )
    broca = np.empty((streams, model.config.dim), np.float32)
    window = rows // streams
    for begin in range(0, length, window):
        cut = slice(begin, begin + window)
        model._engine.advance(own, np.ascontiguousarray(heard[:, cut]), broca, True)
        for number, name in enumerate(sizes):
            for kept, array in zip((u, s, gates), model._engine.recorded(number)):
                if array is not None:
                    kept[name][:, cut] = array
    return Recording(heard.copy(), u, s, gates)
