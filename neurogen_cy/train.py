"""The training loop over a text: rate schedule, evaluation, metrics, checkpoints, resuming.

A run lives in a folder: `metrics.jsonl`, `last/` (the newest checkpoint) and `best/` (the one with the lowest
validation loss so far). Its length is counted in steps, never in time, so the same settings give the same
weights; a run that was stopped and resumed ends like one that was not, bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from neurogen_cy.data import ByteStreams, evaluation_streams
from neurogen_cy.metrics import MetricsLog
from neurogen_cy.model import NeuroGen
from neurogen_cy.signals import Stop, stop_on_signals

Record = dict[str, Any]
LAST, BEST, METRICS = "last", "best", "metrics.jsonl"


@dataclass(frozen=True)
class Settings:
    """How long and how fast to train.

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
    """

    steps: int = 2500
    lr: float = 4e-3
    warmup: int = 200
    evaluate_every: int = 100
    save_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "evaluate_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, got {getattr(self, name)}")
        if self.warmup < 0:
            raise ValueError(f"expected warmup >= 0, got {self.warmup}")
        if not 0.0 < self.lr < math.inf:
            raise ValueError(f"expected a finite lr > 0, got {self.lr}")

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        rise = (step + 1) / (self.warmup + 1)
        fallen = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * min(1.0, rise, 0.5 + 0.5 * math.cos(math.pi * min(1.0, max(0.0, fallen))))


class Trainer:
    """A model, the text it reads and the folder it leaves its traces in.

    Parameters
    ----------
    model : NeuroGen
        Its `streams` and `max_tokens` are the `B` and `T` of a step.
    training, validation : bytes
        Text to train on, at least `B * T + 1` bytes, and to evaluate on, at least 17.
    settings : Settings
    out : Path
        Folder of the run; made if absent.
    about : dict, optional
        JSON-able facts, such as the corpus, kept in every checkpoint beside the run's own.

    Raises
    ------
    ValueError
        If a text is too short.
    """

    def __init__(
        self,
        model: NeuroGen,
        training: bytes,
        validation: bytes,
        settings: Settings,
        out: Path,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.settings = settings
        self.out = out
        self.about = dict(about or {})
        self.best: float | None = None
        self.validation: float | None = None
        self._reader = ByteStreams(training, model.streams, model.max_tokens)
        self._held_out = evaluation_streams(validation)
        self._elapsed = 0.0

    def restore(self, meta: Mapping[str, Any]) -> None:
        """Take up the run whose checkpoint the model was loaded from.

        Parameters
        ----------
        meta : dict
            The facts of that checkpoint, from `checkpoint.read_meta`.

        Raises
        ------
        ValueError
            If the checkpoint is of no run, or of one over another text or with other streams.
        """
        run = (meta.get("extra") or {}).get("run")
        if run is None or meta.get("cursor") is None:
            raise ValueError("expected a checkpoint of a training run, got one that was saved otherwise")
        self._reader.cursor = meta["cursor"]
        self.best, self.validation, self._elapsed = run["best"], run["validation"], run["elapsed"]

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return bool(self.model.step >= self.settings.steps)

    def run(self, progress: Callable[[Record], None] | None = None) -> Stop:
        """Train until all steps are done or a signal asks to stop, then save.

        Parameters
        ----------
        progress : function, optional
            Called with every record that goes into `metrics.jsonl`, right after it was written. One of a
            step has `event` "step", `step`, `tokens` (read so far), `loss` (nats), `bits_per_byte`,
            `accuracy`, `homeostasis`, `lr`, `grad_norm`, `rates` (spikes a neuron and token, by region),
            `tokens_per_s` and `elapsed` (seconds); one of an evaluation has `event` "evaluation", `step`,
            `tokens`, `validation_loss` (nats a byte), `validation_bits_per_byte`, `best` and `elapsed`.

        Returns
        -------
        Stop
            Its `received` tells which signal stopped the run, None when it went to its end.

        Raises
        ------
        OSError
            If a checkpoint cannot be written; the former ones stay.
        FloatingPointError
            If a loss, a gradient or a validation loss is not finite; `last` stays as it was saved last.
        KeyboardInterrupt
            At a second signal, at once and without saving.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        log = MetricsLog(self.out / METRICS, keep=self.model.step)
        begun = time.perf_counter() - self._elapsed

        def report(record: Record) -> None:
            self._elapsed = time.perf_counter() - begun
            record["elapsed"] = round(self._elapsed, 3)
            log.write(record)
            if progress is not None:
                progress(record)

        try:
            with stop_on_signals() as stop:
                saved = self.finished
                while not self.finished and stop.received is None:
                    report(self._step())
                    if self._due(self.settings.evaluate_every):
                        report(self._evaluate())
                    saved = self._due(self.settings.save_every)
                    if saved:
                        self.save(LAST)
                if not saved:
                    self.save(LAST)
        finally:
            log.close()
        return stop

    def save(self, name: str) -> None:
        """Write the checkpoint `name` of this run."""
        model = self.model
        run = {
            **asdict(self.settings),
            "streams": model.streams,
            "tokens": model.max_tokens,
            "seed": model.seed,
            "best": self.best,
            "validation": self.validation,
            "elapsed": self._elapsed,
        }
        model.save(self.out / name, cursor=self._reader.cursor, extra={**self.about, "run": run})

    def _due(self, every: int) -> bool:
        return self.finished or self.model.step % every == 0

    @property
    def _tokens(self) -> int:
        return int(self.model.step * self.model.streams * self.model.max_tokens)

    def _step(self) -> Record:
        start = time.perf_counter()
        lr = self.settings.rate(self.model.step)
        ids, targets, resets = self._reader.next()
        result = self.model.train_step_batch(ids, targets, resets=resets, lr=lr)
        seconds = time.perf_counter() - start
        return {
            "event": "step",
            "step": self.model.step,
            "tokens": self._tokens,
            "loss": result.loss,
            "bits_per_byte": result.loss / math.log(2),
            "accuracy": result.accuracy,
            "homeostasis": result.homeostasis,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "rates": result.rates,
            "tokens_per_s": round(result.tokens / seconds, 1),
        }

    def _evaluate(self) -> Record:
        loss = self.model.evaluate(*self._held_out)
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {self.model.step}: expected a finite validation loss, got {loss}")
        self.validation = loss
        best = self.best is None or loss < self.best
        if best:
            self.best = loss
            self.save(BEST)
        return {
            "event": "evaluation",
            "step": self.model.step,
            "tokens": self._tokens,
            "validation_loss": loss,
            "validation_bits_per_byte": loss / math.log(2),
            "best": best,
        }
