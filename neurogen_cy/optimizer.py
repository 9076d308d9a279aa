"""Settings of the optimizer."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class AdamW:
    """AdamW (Loshchilov and Hutter 2019) with a global norm clip.

    Weight decay acts on projection blocks and `decoder.weight` only. An untied embedding is updated lazily: only
    rows that have a gradient change, their moments too, and bias correction goes by the global step.

    Parameters
    ----------
    lr : float
        Learning rate; each call may bring its own. Schedules live in Python.
    beta1, beta2 : float in [0, 1)
        Decay of the first and second moment.
    eps : float > 0
    weight_decay : float >= 0
        Decoupled: weights shrink by lr * weight_decay a step.
    clip : float >= 0
        Largest global gradient norm; 0 = no clipping.
    """

    lr: float = 2e-3
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{field.name}: expected a number, got {value!r}")
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"{field.name}: expected a finite number >= 0, got {value!r}")
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name}: expected a number in [0, 1), got {getattr(self, name)!r}")
        if self.eps == 0:
            raise ValueError("eps: expected a number > 0, got 0")

    def arguments(self, step: int, lr: float | None = None) -> tuple[float, float, float, float, float, float, int]:
        """What the native update takes; `step` is its 1-based number, `lr` replaces the setting."""
        rate = self.lr if lr is None else float(lr)
        if not math.isfinite(rate) or rate < 0:
            raise ValueError(f"lr: expected a finite number >= 0, got {lr!r}")
        return rate, self.beta1, self.beta2, self.eps, self.weight_decay, self.clip, step
