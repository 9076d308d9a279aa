"""The ladder from token by token with copies to one batched call, measured on a model and a text of the user's.

Four rungs (`rungs`) train the same model on the same text. Speed and traffic are measured by `Ladder.row` and `steady`;
what a rung allocates is counted in a process of its own (ladder_counts), where its time goes is in ladder_time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from neurogen_cy import ladder_counts, ladder_time
from neurogen_cy.config import Config
from neurogen_cy.gpu_watch import DeviceClock, GpuBusy
from neurogen_cy.model import NeuroGen
from neurogen_cy.rungs import RUNGS, Int32, Reader, run, text_tokens, tokens_within


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes
    ----------
    tokens : tuple of int
        T of the sequences, one stream.
    row_seconds : float
        Time for one rung at one T. A loop that would take longer is measured over fewer tokens.
    count_seconds : float
        The same for counting allocations.
    steady_streams, steady_tokens : int
        Size of the consecutive batched steps that show how busy host and GPU are.
    steady_seconds : float
        How long those run.
    """

    tokens: tuple[int, ...] = (100, 500, 1000, 3000)
    row_seconds: float = 1.5
    count_seconds: float = 0.8
    steady_streams: int = 16
    steady_tokens: int = 64
    steady_seconds: float = 3.0

    def __post_init__(self) -> None:
        for name in ("tokens", "row_seconds", "count_seconds", "steady_streams", "steady_tokens", "steady_seconds"):
            value = getattr(self, name)
            if not value or min(value if isinstance(value, tuple) else (value,)) <= 0:
                raise ValueError(f"{name}: expected values > 0, got {value}")


class Ladder:
    """A model of one stream that climbs: every row begins as the first, with the same weights and the same text.

    What a token costs depends on how many neurons fire, and so on what was learnt before.
    """

    def __init__(self, model: NeuroGen, text: Int32, plan: Plan, clock: DeviceClock) -> None:
        self.model, self.reader, self.plan, self.clock = model, Reader(text), plan, clock
        views = model.parameters()
        self._start = {key: view.numpy() for key, view in views.items() if not key.endswith((".rows", ".cols"))}
        zeros = {key: np.broadcast_to(np.float32(0), view.shape) for key, view in views.items()}
        self._unmoved = {key: (zeros[key], zeros[key]) for key in model._engine.moments()}

    def row(self, rung: int, T: int) -> dict[str, Any]:
        """Speed and traffic of one rung; counts and bytes are of one sequence of T tokens."""
        model, loss = self.model, 0.0
        seconds: list[float] = []
        self._begin()
        tokens = tokens_within(model, rung, T, self.reader, self.plan.row_seconds)
        with busy(model) as gpu, model.profile() as profile:
            while not seconds or sum(seconds) + seconds[-1] < 1.2 * self.plan.row_seconds:
                ids, targets = self.reader.take(tokens)
                begin = time.perf_counter()
                loss = run(model, rung, ids, targets).loss
                seconds.append(time.perf_counter() - begin)
        per_sequence = T / (tokens * len(seconds))
        wall_s = statistics.median(seconds) * T / tokens
        return {
            "rung": rung, "name": RUNGS[rung], "backend": model.backend, "precision": model.precision, "B": 1, "T": T,
            "tok_s": T / wall_s, "tok_s_spread": [tokens / max(seconds), tokens / min(seconds)], "seconds": wall_s,
            "measured_tokens": tokens, "sequences": len(seconds), "loss": loss,
            **{name: profile.counters[name] * per_sequence for name in ("syncs", "launches", "h2d_bytes", "d2h_bytes")},
            "cpu_percent": 100 * (profile.cpu_s - gpu.cpu_s) / profile.wall_s,
            "gpu_percent": gpu.percent, "gpu_percent_by": "NVML" if gpu.percent is not None else None,
        }  # fmt: skip

    def _begin(self) -> None:
        model = self.model
        model.load_parameters(self._start)
        model._engine.load_moments(self._unmoved)
        model.brain.reset()
        model.step = 0
        self.reader.rewind()

    def explain(self, row: dict[str, Any]) -> None:
        """Put into a row where its time goes and, by what that says, how busy the GPU was."""
        wall_s = row["seconds"]
        row["time"], device_s = ladder_time.parts(self.model, row["rung"], row["T"], wall_s, self.reader, self.clock)
        if device_s is not None:
            row.update(gpu_percent=100 * device_s / wall_s, gpu_percent_by="kernels")


class NoGpu:
    """What `GpuBusy` says where nothing runs on a GPU."""

    percent, cpu_s = None, 0.0
    reason = "the model runs on the CPU"

    def __enter__(self) -> NoGpu:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def busy(model: NeuroGen) -> GpuBusy | NoGpu:
    """Watches the GPU of a model."""
    return GpuBusy(model.device) if model.backend == "cuda" else NoGpu()


def steady(config: Config, settings: Mapping[str, Any], text: Int32, plan: Plan) -> dict[str, Any]:
    """Consecutive batched steps of many streams: how fast, and how busy are host and GPU meanwhile."""
    B, T = plan.steady_streams, plan.steady_tokens
    model = NeuroGen(config, **settings, streams=B, max_tokens=T)
    reader, steps = Reader(text, B), 0
    batches = [reader.take(T) for _ in range(8)]
    for batch in batches[:2]:
        model.train_step_batch(*batch)
    with busy(model) as gpu, model.profile() as profile:
        end = time.perf_counter() + plan.steady_seconds
        while not steps or time.perf_counter() < end:
            model.train_step_batch(*batches[steps % len(batches)])
            steps += 1
    return {
        "backend": model.backend, "B": B, "T": T, "steps": steps, "seconds": profile.wall_s,
        "tok_s": steps * B * T / profile.wall_s, "syncs_per_step": profile.counters["syncs"] / steps,
        "launches_per_step": profile.counters["launches"] / steps,
        "cpu_percent": 100 * (profile.cpu_s - gpu.cpu_s) / profile.wall_s,
        "gpu_percent": gpu.percent, "gpu_percent_by": "NVML" if gpu.percent is not None else None,
        "no_gpu_percent": gpu.reason,
    }  # fmt: skip


def measure(
    config: Config, settings: Mapping[str, Any], data: bytes, plan: Plan, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Climb the ladder with a model of `config`; rows, the steady run, and what could not be measured.

    Parameters
    ----------
    config : Config
    settings : dict
        Of `NeuroGen`: backend, device, precision, threads.
    data : bytes
        The text.
    plan : Plan
    say : callable
        Gets a line of progress now and then.
    """
    text = text_tokens(data, config.vocab_size)
    longest = max(plan.tokens)
    Reader(text).take(longest)  # a short text is refused before anything is built
    Reader(text, plan.steady_streams).take(plan.steady_tokens)
    say(f"consecutive steps, {plan.steady_streams} streams x {plan.steady_tokens} tokens")
    many = steady(config, settings, text, plan)
    model = NeuroGen(config, **settings, streams=1, max_tokens=longest)
    clock = DeviceClock()
    ladder, rows = Ladder(model, text, plan, clock), []
    for T in plan.tokens:
        for rung, name in enumerate(RUNGS):
            rows.append(ladder.row(rung, T))
            say(f"T = {T:5} rung {rung} {rows[-1]['tok_s']:12,.1f} tokens/s  {name}")
    say("where the time goes")
    for row in rows:  # after all of them: the device's clock slows launches down
        ladder.explain(row)
    facts = {
        "backend": model.backend, "precision": model.precision, "threads": model.threads,
        "on": model._module.describe(model.device), "vocab_size": config.vocab_size, "dim": config.dim,
        "weights": config.weights, "tokens_are": "bytes" if config.vocab_size <= 256 else "pairs of bytes",
        "no_device_time": NoGpu.reason if model.backend == "cpu" else clock.reason,
    }  # fmt: skip
    del model, ladder
    say("counting allocations")
    facts["no_allocation_counts"] = ladder_counts.add_to(rows, config, settings, text, plan)
    return {**facts, "rows": rows, "steady": many}
