"""Counts that size a model, and the memory they cost."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from neurogen_cy import backend as backends
from neurogen_cy import memory
from neurogen_cy.config import Config
from neurogen_cy.connectome import longest_delays
from neurogen_cy.threads import default_threads

MAX_COUNT = 2**31 - 1
MAX_BYTES = 2**50
"""More than any machine has memory; plans of far more would overflow the 64 bits they are counted in."""
MAX_THREADS = 1024
"""More than any machine has cores; far more than that would end the process inside the OpenMP runtime."""


def integer(name: str, value: Any, most: int = MAX_COUNT, least: int = 1) -> int:
    """A checked count."""
    expected = f"{name}: expected an integer in {least}..{most}, got {value!r}"
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(expected)
    if not least <= value <= most:
        raise ValueError(expected)
    return int(value)


def memory_plan(
    cfg: Config, streams: int = 1, max_tokens: int = 128, backend: str = "auto", threads: int | None = None,
    precision: str | None = None,
) -> dict[str, int]:
    """Bytes by part that a model would allocate; nothing is allocated, and "cuda" needs no device for it.

    MemoryError where they are beyond any machine's memory.
    """
    module = backends.load(backend, built=True)[1]
    sizes = model_sizes(streams, max_tokens, threads)
    _check_countable(cfg, *sizes[:2])
    plan = module.memory_plan(cfg, *sizes, backends.precision(module, precision))
    return dict(plan)


def model_sizes(streams: Any, max_tokens: Any, threads: Any) -> tuple[int, int, int]:
    """The three, checked: rows of a call are numbered in 32 bits."""
    streams, max_tokens = integer("streams", streams), integer("max_tokens", max_tokens)
    if streams * max_tokens > MAX_COUNT:
        raise ValueError(f"streams * max_tokens: expected at most {MAX_COUNT}, got {streams * max_tokens}")
    threads = default_threads() if threads is None else integer("threads", threads, most=MAX_THREADS)
    return streams, max_tokens, threads


def _check_countable(cfg: Config, streams: int, max_tokens: int) -> None:
    """MemoryError where the largest parts alone are beyond any machine: weights, u, s, v, w, d, spikes kept."""
    delays = longest_delays(cfg)
    kept = sum(region.neurons * (2 + delays[region.name]) for region in cfg.regions)
    neurons = sum(region.neurons for region in cfg.regions)
    least = 4 * (4 * cfg.weights + streams * (kept + cfg.dim) + streams * max_tokens * (5 * neurons + 6 * cfg.dim))
    if least > MAX_BYTES:
        raise MemoryError(
            f"this model needs more than {least / 2**40:,.0f} TiB at streams={streams}, max_tokens={max_tokens}, and "
            f"no machine has more than {MAX_BYTES // 2**40} TiB: {neurons} neurons, {cfg.weights} weights"
        )


def check_memory(
    module: ModuleType, cfg: Config, streams: int, max_tokens: int, threads: int, device: int, precision: str
) -> None:
    """MemoryError with the plan's table, and the largest max_tokens that fits, where a model does not fit."""
    _check_countable(cfg, streams, max_tokens)
    free: int = module.free_bytes(device)
    if module.BACKEND == "cpu":
        free = min(free, memory.available())

    def plan(tokens: int) -> dict[str, int]:
        return dict(module.memory_plan(cfg, streams, tokens, threads, precision))

    def fits(tokens: int) -> bool:
        return sum(plan(tokens).values()) <= free

    if fits(max_tokens):
        return
    most, too_many = 0, max_tokens
    while too_many - most > 1:
        middle = (most + too_many) // 2
        most, too_many = (middle, too_many) if fits(middle) else (most, middle)
    parts = plan(max_tokens)
    table = "\n".join(f"  {part:<22}{size / 2**20:12,.1f} MiB" for part, size in parts.items())
    advice = f"max_tokens={most} is the largest that fits" if most else "not even max_tokens=1 fits"
    raise MemoryError(
        f"this model needs {sum(parts.values()) / 2**20:,.1f} MiB at streams={streams}, max_tokens={max_tokens}, and "
        f"{free / 2**20:,.1f} MiB are free:\n{table}\n{advice}"
    )
