"""How long, how fast and how watchfully to train."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class TrainSettings:
    """Settings of a training run. What is counted in steps gives the same weights every time; minutes do not.

    Parameters
    ----------
    steps : int
        Optimizer steps in all, counted from the very first.
    lr : float
        Highest learning rate.
    warmup : int
        Steps over which the rate rises linearly to `lr`; then it falls to 0 along a cosine.
    evaluate_every, save_every : int
        Steps between evaluations, and between checkpoints in `last`; both also happen at the end.
    evaluate_tokens : int
        Of the validation text, about the first so many are evaluated.
    save_minutes : float, optional
        `last` is written after so many minutes too, whatever the step.
    keep : int
        Of the checkpoints that `save_every` asks for, the newest so many stay as `step-<number>` beside `last`, `best`.
    patience : int, optional
        Stop after so many evaluations in a row without a new best.
    sample_every : int, optional
        Steps between samples of what the model writes.
    max_tokens : int, optional
        Tokens to read in all: lowers `steps` to what they are enough for, so the rate still falls to 0.
    max_minutes : float, optional
        Stop, saved, after so many minutes of one `Trainer.run`; a resumed run gets them anew.

    Raises
    ------
    ValueError
        For a value out of its range.
    """

    steps: int = 2500
    lr: float = 4e-3
    warmup: int = 200
    evaluate_every: int = 100
    save_every: int = 100
    evaluate_tokens: int = 1 << 18
    save_minutes: float | None = None
    keep: int = 0
    patience: int | None = None
    sample_every: int | None = None
    max_tokens: int | None = None
    max_minutes: float | None = None

    def __post_init__(self) -> None:
        counts = ("steps", "evaluate_every", "save_every", "evaluate_tokens", "patience", "sample_every", "max_tokens")
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"expected {name} >= 1, got {value}")
        for name in ("warmup", "keep"):
            if getattr(self, name) < 0:
                raise ValueError(f"expected {name} >= 0, got {getattr(self, name)}")
        for name in ("lr", "save_minutes", "max_minutes"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                raise ValueError(f"expected a finite {name} > 0, got {value}")

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        rise = (step + 1) / (self.warmup + 1)
        fallen = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * min(1.0, rise, 0.5 + 0.5 * math.cos(math.pi * min(1.0, max(0.0, fallen))))

    def within_budget(self, tokens_a_step: int) -> TrainSettings:
        """Return these settings with `steps` lowered to what `max_tokens` are enough for.

        Raises
        ------
        ValueError
            If they are not enough for one step.
        """
        if self.max_tokens is None:
            return self
        return replace(self, steps=min(self.steps, steps_of(self.max_tokens, tokens_a_step)))


def steps_of(max_tokens: int, tokens_a_step: int) -> int:
    """Return how many steps a budget of tokens is enough for; ValueError if not for one."""
    if max_tokens < tokens_a_step:
        raise ValueError(f"expected max_tokens of at least a step, {tokens_a_step}, got {max_tokens}")
    return max_tokens // tokens_a_step
