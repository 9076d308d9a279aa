"""Counts that size a model, and the memory they cost."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import psutil

from neurogen_cy import backend as backends
from neurogen_cy.config import Config
from neurogen_cy.threads import default_threads

MAX_COUNT = 2**31 - 1
MAX_THREADS = 1024
"""More than any machine has cores; far more than that would end the process inside the OpenMP runtime."""


def integer(name: str, value: Any, most: int = MAX_COUNT) -> int:
    """A checked count."""
    expected = f"{name}: expected an integer in 1..{most}, got {value!r}"
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(expected)
    if not 1 <= value <= most:
        raise ValueError(expected)
    return int(value)


def memory_plan(
    cfg: Config, streams: int = 1, max_tokens: int = 128, backend: str = "auto", threads: int | None = None
) -> dict[str, int]:
    """Bytes by part that a model would allocate; nothing is allocated."""
    module = backends.load(backend)[1]
    return dict(module.memory_plan(cfg, *model_sizes(streams, max_tokens, threads)))


def model_sizes(streams: Any, max_tokens: Any, threads: Any) -> tuple[int, int, int]:
    """The three, checked: rows of a call are numbered in 32 bits."""
    streams, max_tokens = integer("streams", streams), integer("max_tokens", max_tokens)
    if streams * max_tokens > MAX_COUNT:
        raise ValueError(f"streams * max_tokens: expected at most {MAX_COUNT}, got {streams * max_tokens}")
    threads = default_threads() if threads is None else integer("threads", threads, most=MAX_THREADS)
    return streams, max_tokens, threads


def check_memory(module: ModuleType, cfg: Config, streams: int, max_tokens: int, threads: int) -> None:
    """MemoryError with the plan's table where a model would not fit into what is free."""
    plan = module.memory_plan(cfg, streams, max_tokens, threads)
    total, free = sum(plan.values()), psutil.virtual_memory().available
    if total > free:
        table = "\n".join(f"  {part:<22}{size / 2**20:12,.1f} MiB" for part, size in plan.items())
        raise MemoryError(
            f"this model needs {total / 2**20:,.1f} MiB at streams={streams}, max_tokens={max_tokens}, and "
            f"{free / 2**20:,.1f} MiB are free:\n{table}"
        )
