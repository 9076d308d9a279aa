"""Settings of the optimizer."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from neurogen_cy.shown import shown

FLOAT_TINY = float(np.finfo(np.float32).tiny)


def _number(name: str, value: Any, below: float = math.inf) -> float:
    """The value as a float: TypeError where it is no number, ValueError outside 0 <= value < below."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}: expected a number, got {shown(value)}")
    if not (0 <= value < below and value <= sys.float_info.max):  # an int may be larger than any float
        limit = "a finite number >= 0" if below == math.inf else f"a number in [0, {below:g})"
        raise ValueError(f"{name}: expected {limit}, got {shown(value)}")
    return float(value)


@dataclass(frozen=True)
class AdamW:
    """AdamW (Loshchilov and Hutter 2019) with a global norm clip.

    Weight decay acts on projection blocks and `decoder.weight` only. An untied embedding is updated lazily: only
    rows that have a gradient change, their moments too, and bias correction goes by the global step.

    Parameters
    ----------
    lr : float
        Learning rate; each call may bring its own. Schedules live in Python.
    betas : pair of float in [0, 1)
        Decay of the first and second moment.
    eps : float > 0
    weight_decay : float >= 0
        Decoupled: weights shrink by lr * weight_decay a step.
    clip : float >= 0
        Largest global gradient norm; 0 = no clipping.

    Raises
    ------
    TypeError, ValueError
        For a field that is no number or out of its range.
    """

    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise TypeError(f"betas: expected a pair of numbers, got {shown(self.betas)}")
        values = {name: _number(name, getattr(self, name)) for name in ("lr", "eps", "weight_decay", "clip")}
        if values["eps"] < FLOAT_TINY:  # where it rounds to 0, a gradient of 0 makes 0 / 0
            raise ValueError(f"eps: expected a number > 0, at least {FLOAT_TINY:.3g}, got {values['eps']:g}")
        betas = tuple(_number(f"betas[{i}]", beta, below=1) for i, beta in enumerate(self.betas))
        self.__dict__.update(values, betas=betas)

    def arguments(self, step: int, lr: Any = None) -> tuple[float, float, float, float, float, float, int]:
        """What the native update takes; `step` is its 1-based number, `lr` replaces the setting."""
        rate = self.lr if lr is None else _number("lr", lr)
        if not rate * self.weight_decay <= 2:
            raise ValueError(f"lr * weight_decay: expected at most 2, beyond which weights would grow by decaying, got "
                             f"{rate!r} * {self.weight_decay!r}")
        return rate, *self.betas, self.eps, self.weight_decay, self.clip, step
