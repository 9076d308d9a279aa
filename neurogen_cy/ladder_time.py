"""Where the time of a rung goes, in seconds of one sequence: the rows of a table of five.

synchronisation  the GPU had nothing to do: the host waits for it, wakes up, decides and launches again
allocation       making and freeing the arrays of a token
copying          handing vectors over: from and to the caller, on a GPU between host and device
brain_decoder    forward: brain, decoder and, token by token, the word said
learning         backward pass and the update of the weights
python           the rest: the loop itself

On the CPU nothing waits. On a GPU the device's own clock (CUPTI) tells work from waiting; without it, the waits are in
the pieces they belong to, and synchronisation is None. A batched call is one piece, so its forward part is timed by
`evaluate`, and learning is what remains.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

from neurogen_cy import rungs, token_loop

if TYPE_CHECKING:
    from neurogen_cy.gpu_watch import DeviceClock
    from neurogen_cy.model import NeuroGen

Parts = dict[str, float | None]
PARTS = ("synchronisation", "allocation", "copying", "brain_decoder", "learning", "python")
LISTENERS = (token_loop.copying, token_loop.pointing, token_loop.in_place)
NEW_VECTORS = (2, 1, 0)  # arrays [B, D] that a token of each loop makes
LOOP_SECONDS, DEVICE_TOKENS = 0.6, 16


class Stopwatch:
    """Adds up the time between marks by what they are called."""

    def __init__(self) -> None:
        self.parts = dict.fromkeys(("copying", "brain_decoder", "learning", "python"), 0.0)
        self._last = time.perf_counter()

    def mark(self, name: str) -> None:
        """What was done since the last mark was this."""
        now = time.perf_counter()
        self.parts[name] += now - self._last
        self._last = now

    def skip(self) -> None:
        """What was done since the last mark does not count."""
        self._last = time.perf_counter()


def parts(
    model: NeuroGen, rung: int, T: int, wall_s: float, reader: rungs.Reader, clock: DeviceClock
) -> tuple[Parts, float | None]:
    """({part: seconds}, seconds of the device or None) of one sequence of T tokens that takes wall_s."""
    measured = _batched if rung == rungs.BATCHED else _looped
    return measured(model, rung, T, wall_s, reader, clock)


def _looped(
    model: NeuroGen, rung: int, T: int, wall_s: float, reader: rungs.Reader, clock: DeviceClock
) -> tuple[Parts, float | None]:
    tokens = max(1, min(T, int(LOOP_SECONDS * T / wall_s)))
    watch, (ids, targets) = Stopwatch(), reader.take(tokens)
    begin = time.perf_counter()
    watch.skip()
    rungs.run(model, rung, ids, targets, watch.mark)
    # The marked loop is a little slower than the one that was timed; its shares count.
    share = wall_s / (time.perf_counter() - begin)
    found = {name: seconds * share for name, seconds in watch.parts.items()}
    allocation = allocation_s(model, rung) * T
    out: Parts = {
        "synchronisation": 0.0, "allocation": allocation, "copying": max(0.0, found["copying"] - allocation),
        "brain_decoder": found["brain_decoder"], "learning": found["learning"],
        "python": wall_s - sum(found.values()) + found["python"],
    }  # fmt: skip
    if model.backend == "cpu":
        return out, None
    few = min(T, DEVICE_TOKENS)
    ids, targets = reader.take(few)
    heard, whole = (
        clock.seconds(lambda: _hear(model, rung, ids)),
        clock.seconds(lambda: rungs.run(model, rung, ids, targets)),
    )
    if heard is None or whole is None:
        return {**out, "synchronisation": None}, None
    scale = T / few
    out["copying"] = whole["copies"] * scale
    out["brain_decoder"] = heard["kernels"] * scale
    out["learning"] = max(0.0, whole["kernels"] - heard["kernels"]) * scale
    device_s = (whole["kernels"] + whole["copies"]) * scale
    out["synchronisation"] = max(0.0, wall_s - device_s - allocation - (out["python"] or 0.0))
    return out, device_s


def _hear(model: NeuroGen, rung: int, ids: rungs.Int32) -> None:
    """The loop of a rung without learning."""
    for id in ids:
        model._token_buffers.ids.fill(id)
        LISTENERS[rung](model, model._token_buffers, hold=False)


def _batched(
    model: NeuroGen, rung: int, T: int, wall_s: float, reader: rungs.Reader, clock: DeviceClock
) -> tuple[Parts, float | None]:
    ids, targets = reader.take(T)
    state = model._engine.new_state(1)

    def forward() -> Any:
        return model._engine.evaluate(state, ids[None], targets[None], None, T)

    forward()
    begin = time.perf_counter()
    forward()
    forward_s = min(wall_s, time.perf_counter() - begin)
    out: Parts = {
        "synchronisation": 0.0, "allocation": 0.0, "copying": 0.0, "brain_decoder": forward_s,
        "learning": wall_s - forward_s, "python": 0.0,
    }  # fmt: skip
    if model.backend == "cpu":
        return out, None
    heard, whole = clock.seconds(forward), clock.seconds(lambda: rungs.run(model, rung, ids, targets))
    if heard is None or whole is None:
        return {**out, "synchronisation": None}, None
    out["copying"], out["brain_decoder"] = whole["copies"], heard["kernels"]
    out["learning"] = max(0.0, whole["kernels"] - heard["kernels"])
    device_s = whole["kernels"] + whole["copies"]
    out["synchronisation"] = max(0.0, wall_s - device_s)
    return out, device_s


def allocation_s(model: NeuroGen, rung: int, times: int = 2000) -> float:
    """Seconds that the arrays of one token take to make and free: as many of that size, timed alone."""
    vectors, shape = NEW_VECTORS[rung], (model.streams, model.config.dim)
    if not vectors:
        return 0.0
    begin = time.perf_counter()
    for _ in range(times):
        for _ in range(vectors):
            np.empty(shape, np.float32)
        np.empty(model.streams, np.int32)  # the word said
    return (time.perf_counter() - begin) / times
