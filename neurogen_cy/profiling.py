"""What a stretch of the user's own program cost: `NeuroGen.profile`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neurogen_cy.model import NeuroGen


@dataclass
class Profile:
    """What happened inside `with model.profile() as profile`; filled in when the block ends, however it ends.

    Attributes
    ----------
    wall_s, cpu_s : float
        Seconds that passed, and seconds of CPU time of this process (all its threads).
    counters : dict of str to int
        What `NeuroGen.counters` grew by: launches, syncs, h2d_bytes, d2h_bytes, device_allocations, host_allocations.
    calls : int
        Training calls; a token of `train_step` is one.
    tokens : int or None
        Tokens of non-zero weight they learnt from; None where there were none. Set it yourself for a loop that does
        something else.
    """

    wall_s: float = 0.0
    cpu_s: float = 0.0
    counters: dict[str, int] = field(default_factory=dict)
    calls: int = 0
    tokens: int | None = None

    @property
    def cpu_percent(self) -> float:
        """CPU time in percent of one core."""
        return 100 * self.cpu_s / self.wall_s if self.wall_s else 0.0

    @property
    def tokens_per_s(self) -> float | None:
        """None where the tokens are not known."""
        return self.tokens / self.wall_s if self.tokens and self.wall_s else None

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain numbers."""
        return {**asdict(self), "cpu_percent": self.cpu_percent, "tokens_per_s": self.tokens_per_s}

    def __str__(self) -> str:
        lines = [f"wall {self.wall_s:.3f} s, host CPU {self.cpu_percent:.0f} % of one core"]
        if self.tokens_per_s is not None:
            lines[0] = f"{self.tokens_per_s:,.0f} tokens/s, {lines[0]}"
        if self.calls and self.tokens:
            lines.append(f"{self.calls:,} training calls, {self.tokens / self.calls:,.1f} tokens each")
        lines.append(", ".join(f"{name} {count:,}" for name, count in self.counters.items()))
        return "\n".join(lines)


@contextmanager
def profile(model: NeuroGen) -> Iterator[Profile]:
    """See `NeuroGen.profile`."""
    out = Profile()
    counters, calls, tokens = model.counters, model._trainings, model._trained_tokens
    cpu, begin = time.process_time(), time.perf_counter()
    try:
        yield out
    finally:
        out.wall_s, out.cpu_s = time.perf_counter() - begin, time.process_time() - cpu
        out.counters = {name: count - counters[name] for name, count in model.counters.items()}
        out.calls = model._trainings - calls
        if out.tokens is None and model._trained_tokens > tokens:
            out.tokens = model._trained_tokens - tokens
