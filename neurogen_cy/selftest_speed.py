"""Tokens a second of `tiny`, and what that is beside the rate of this machine's own matrix products."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.linalg.blas import sgemm

from neurogen_cy.config import Config
from neurogen_cy.model import NeuroGen

STREAMS, TOKENS = 16, 64
LEAST = 0.05
"""Of what the products alone would allow: a machine that does less computes with the wrong kernels or threads."""


@dataclass
class Speed:
    """Medians over alternating rounds."""

    tokens_per_s: float
    flop_per_token: float
    sgemm_flops: float | None
    share_of_sgemm: float | None
    preset: str = "tiny"
    streams: int = STREAMS
    tokens: int = TOKENS

    @property
    def passed(self) -> bool:
        """A share is a ratio of two figures of the same minutes, so that a busy machine does not fail it."""
        return self.share_of_sgemm is None or self.share_of_sgemm >= LEAST

    @property
    def detail(self) -> str:
        said = f"{self.preset}, {self.streams} x {self.tokens}: {self.tokens_per_s:,.0f} tokens/s"
        if self.sgemm_flops is None or self.share_of_sgemm is None:
            return said
        return (f"{said}; sgemm {self.sgemm_flops / 1e9:,.0f} GFLOP/s, of which dense products of this size would need "
                f"{self.share_of_sgemm:.0%} (expected: {LEAST:.0%} or more)")


def measure_speed(settings: dict[str, Any], seconds: float) -> Speed:
    """Train steps and, on the CPU, products of 1024 x 1024 in turn, for about so many seconds."""
    cfg = Config.preset("tiny", vocab_size=256)
    model = NeuroGen(cfg, **settings, streams=STREAMS, max_tokens=TOKENS)
    rng = np.random.default_rng(0)
    batches = [rng.integers(0, 256, (2, STREAMS, TOKENS), np.int32) for _ in range(4)]
    on_cpu = settings["backend"] == "cpu"
    ours: list[float] = []
    products: list[float] = []
    end = time.perf_counter() + seconds
    while len(ours) < 4 or time.perf_counter() < end:
        begin = time.perf_counter()
        for ids, targets in batches:
            model.train_step_batch(ids, targets)
        ours.append(len(batches) * STREAMS * TOKENS / (time.perf_counter() - begin))
        if on_cpu:
            products.append(_sgemm_rate())
    tokens_per_s = float(np.median(ours[1:]))  # the first round warms up
    flop = 6.0 * cfg.weights  # one product forward and two backward: a multiplication and an addition a weight
    rate = float(np.median(products[1:])) if on_cpu else None
    return Speed(tokens_per_s, flop, rate, None if rate is None else tokens_per_s * flop / rate)


def _sgemm_rate(size: int = 1024) -> float:
    """FLOP/s of BLAS on as many threads as it takes by itself."""
    a = np.asfortranarray(np.random.default_rng(0).standard_normal((size, size)), np.float32)
    begin = time.perf_counter()
    sgemm(1.0, a, a)
    return 2.0 * size**3 / (time.perf_counter() - begin)
