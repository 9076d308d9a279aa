"""What may watch a training run and steer it: `Callback`, and those that come with the package.

`progress.ProgressBar` and `tensorboard.TensorBoard` are callbacks too.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurogen_cy.metrics import MetricsLog

if TYPE_CHECKING:
    from neurogen_cy.train import Trainer

Record = dict[str, Any]


class Callback:
    """Called by a `Trainer` around its run; override what you need.

    A callback may read everything of the trainer and its model, and may call `trainer.stop(reason)`: the step is
    finished, evaluated and saved where that is due, and the run ends. An exception does the same, so that nothing is
    lost, and then `Trainer.run` raises it; the other callbacks still hear everything.
    """

    def on_begin(self, trainer: Trainer) -> None:
        """Before the first step of `Trainer.run`, in a new run or a resumed one."""

    def on_step(self, trainer: Trainer, record: Record) -> None:
        """After an optimizer step. The keys of `record` are those of `Trainer.run`; it is JSON-able."""

    def on_skip(self, trainer: Trainer, record: Record) -> None:
        """After a step that was not finite and was skipped (`nonfinite="skip"`): `skipped` counts them."""

    def on_evaluation(self, trainer: Trainer, record: Record) -> None:
        """After an evaluation; a new best has been saved by then."""

    def on_sample(self, trainer: Trainer, record: Record) -> None:
        """When the model has written a sample: `text`, and the `prompt` it goes on from."""

    def on_save(self, trainer: Trainer, path: Path) -> None:
        """After a checkpoint was written."""

    def on_end(self, trainer: Trainer) -> None:
        """When the run ends, however it does; what was opened in `on_begin` is closed here."""


class Metrics(Callback):
    """Writes every record into `metrics.jsonl` in the folder of the run. Every trainer has one, called first."""

    FILE = "metrics.jsonl"

    def __init__(self) -> None:
        self._log: MetricsLog | None = None

    def on_begin(self, trainer: Trainer) -> None:
        """Open the file; what a crash left of later steps is removed."""
        self._log = MetricsLog(trainer.out / self.FILE, keep=trainer.tokens)

    def on_step(self, trainer: Trainer, record: Record) -> None:
        """Write the record."""
        if self._log is not None:
            self._log.write(record)

    on_skip = on_evaluation = on_sample = on_step

    def on_end(self, trainer: Trainer) -> None:
        """Close the file."""
        if self._log is not None:
            self._log.close()
            self._log = None


class EarlyStop(Callback):
    """Stops after `patience` evaluations in a row without a new best."""

    def __init__(self, patience: int) -> None:
        self.patience = patience

    def on_begin(self, trainer: Trainer) -> None:
        """Stop at once where a resumed run had been stopped by this."""
        self._look(trainer)

    def on_evaluation(self, trainer: Trainer, record: Record) -> None:
        """Stop where there were enough."""
        self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        if trainer.since_best >= self.patience:
            trainer.stop(f"no better validation in {trainer.since_best} evaluations")


class TimeBudget(Callback):
    """Stops after so many minutes of one run."""

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes
        self._begun = 0.0

    def on_begin(self, trainer: Trainer) -> None:
        """Look at the clock."""
        self._begun = time.monotonic()

    def on_step(self, trainer: Trainer, record: Record) -> None:
        """Stop where the time is over."""
        if time.monotonic() - self._begun >= 60 * self.minutes:
            trainer.stop(f"{self.minutes:g} minutes are over")

    on_skip = on_step


class Samples(Callback):
    """Has the model write now and then; the others get the text by `on_sample`.

    Parameters
    ----------
    every : int
        Steps in between.
    write : function
        `write(model, seed)` returns `prompt, text`. The seed changes with the step, so a resumed run writes what an
        unbroken one does.
    """

    def __init__(self, every: int, write: Callable[[Any, int], tuple[str, str]]) -> None:
        self.every = every
        self.write = write

    def on_step(self, trainer: Trainer, record: Record) -> None:
        """Write where it is due."""
        if trainer.model.step % self.every == 0:
            prompt, text = self.write(trainer.model, (trainer.model.seed + trainer.model.step) % 2**64)
            trainer.report({"event": "sample", "step": record["step"], "tokens": record["tokens"], "prompt": prompt,
                            "text": text})
