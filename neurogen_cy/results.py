"""What training calls return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a training call did.

    Attributes
    ----------
    loss : float
        Weighted cross-entropy in nats, without homeostasis.
    homeostasis : float
        The firing-rate term; gradients are of the sum of both.
    accuracy : float
        Share of tokens of non-zero weight whose most probable prediction was the target (0 where there are none).
    tokens : int
        Tokens of non-zero weight.
    grad_norm : float or None
        Global gradient norm before clipping; None from `backward_batch`.
    rates : dict of str to float
        Mean firing rate of each region, spikes per neuron and token.
    predictions : int32 array [B, T] or None
        What was passed as `predictions_out`, filled.
    """

    loss: float
    homeostasis: float
    accuracy: float
    tokens: int
    grad_norm: float | None
    rates: dict[str, float]
    predictions: Any = None
