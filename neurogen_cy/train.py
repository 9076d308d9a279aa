"""The training loop over a text: rate schedule, evaluation, callbacks, checkpoints, resuming.

A run lives in a folder: `metrics.jsonl`, `last/` (the newest checkpoint), `best/` (the one with the lowest
validation loss so far) and, where asked for, `step-<number>/`. Its length is counted in steps, so the same settings
give the same weights; a run that was stopped and resumed ends like one that was not, bit for bit.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from neurogen_cy import checkpoint, keeping
from neurogen_cy.callbacks import Callback, EarlyStop, Metrics, Record, TimeBudget
from neurogen_cy.model import NeuroGen
from neurogen_cy.results import StepResult
from neurogen_cy.signals import Stop, stop_on_signals
from neurogen_cy.stream_groups import StreamGroups
from neurogen_cy.streams import TokenStreams, held_out
from neurogen_cy.tokenization import ByteTokenizer, Tokenizer
from neurogen_cy.tokens import Tokens
from neurogen_cy.train_settings import TrainSettings

LAST, BEST, METRICS = "last", "best", Metrics.FILE

KEPT = ("best", "best_step", "since_best", "validation", "validation_step")
"""Attributes of a trainer that a checkpoint keeps as they are."""

MOST_SKIPPED = 100
"""So many steps in a row that are not finite end a run: nothing is learnt any more."""


class Trainer:
    """A model, the text it reads and the folder it leaves its traces in.

    Parameters
    ----------
    model : NeuroGen
        Its `streams`, `accumulate` and `max_tokens` are the `B`, `N` and `T` of a step, which reads `N * B` streams.
    training, validation : Tokens or bytes
        Text to train on, at least `N * B * T + 1` tokens, and to evaluate on, at least 17. Of a corpus
        (`ng.open_corpus`) they are its parts; bytes are one document of a byte model.
    settings : TrainSettings
    out : path
        Folder of the run; made if absent.
    about : dict, optional
        JSON-able facts, such as the corpus, kept in every checkpoint beside the run's own.
    callbacks : sequence of Callback
        Called in this order, after those that write the metrics and stop by `patience` and `max_minutes`.
    tokenizer : Tokenizer, optional
        Kept in every checkpoint, so that it can write without the file; bytes by default.

    Attributes
    ----------
    best, validation : float or None
        Lowest and newest validation loss, nats a token.
    evaluated : Tokens
        What of the validation text is evaluated.
    best_step, validation_step, since_best : int
        Steps of these two evaluations, and how many there were since the best.
    tokens : int
        Tokens read so far.

    Raises
    ------
    ValueError
        If a text is too short, or the model has another number of tokens than the tokenizer.

    Examples
    --------
    >>> import neurogen_cy as ng
    >>> text = open("my.txt", "rb").read()                                              # doctest: +SKIP
    >>> model = ng.NeuroGen(ng.Config.preset("tiny"), streams=16, max_tokens=64)
    >>> trainer = ng.Trainer(model, text[:-20_000], text[-20_000:], out="runs/mine")    # doctest: +SKIP
    >>> trainer.run()                                                                   # doctest: +SKIP
    """

    def __init__(
        self,
        model: NeuroGen,
        training: Tokens | bytes,
        validation: Tokens | bytes,
        settings: TrainSettings | None = None,
        out: str | os.PathLike[str] = "run",
        about: Mapping[str, Any] | None = None,
        callbacks: Sequence[Callback] = (),
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.tokenizer = ByteTokenizer() if tokenizer is None else tokenizer
        if self.tokenizer.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"expected a model of the tokenizer's {self.tokenizer.vocab_size} tokens, got one of "
                f"{model.config.vocab_size}"
            )
        self.model = model
        self.out = Path(out)
        self.about = dict(about or {})
        self.best: float | None = None
        self.best_step = self.validation_step = self.since_best = self.tokens = 0
        self.validation: float | None = None
        self._groups = StreamGroups(model)
        self.settings = (settings or TrainSettings()).within_budget(self._groups.streams * model.max_tokens)
        self.training = _tokens(training)
        self.evaluated = _tokens(validation).head(self.settings.evaluate_tokens)
        self._reader = TokenStreams(self.training, self._groups.streams, model.max_tokens)
        self._held_out = held_out(self.evaluated)
        self._elapsed, self._begun = 0.0, time.perf_counter()
        self._skipped = 0  # in a row
        self._restored: Path | None = None
        self._stop = Stop()
        self._failure: Exception | None = None
        self.callbacks: list[Callback] = [Metrics()]
        if self.settings.patience is not None:
            self.callbacks.append(EarlyStop(self.settings.patience))
        if self.settings.max_minutes is not None:
            self.callbacks.append(TimeBudget(self.settings.max_minutes))
        self.callbacks += callbacks

    def restore(self, saved: str | os.PathLike[str]) -> None:
        """Take up the run whose checkpoint the model was loaded from.

        The streams may be grouped in another way than they were (64 as 2 x 32), not be more or fewer.

        Raises
        ------
        ValueError
            If the checkpoint is of no run, or of one over another text or with other streams.
        """
        meta = checkpoint.read_meta(saved)
        run = run_facts(meta, saved)
        self._reader.cursor = meta["cursor"]
        if self.model.streams != meta["streams"]:
            self._groups.load_state(checkpoint.read(saved, ("state",))[0]["state"])
        for name in KEPT:
            setattr(self, name, run[name])
        self.tokens, self._elapsed = run["tokens_read"], run["elapsed"]
        self._restored = Path(saved)

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return bool(self.model.step >= self.settings.steps)

    def stop(self, reason: str) -> None:
        """Ask the run to end after this step, saved; for callbacks. The first reason stays."""
        self._stop.ask(reason)

    def run(self) -> Stop:
        """Train until all steps are done or somebody asks to stop, then save.

        Every record goes to the callbacks, the first of which writes it into `metrics.jsonl`. All have `event`, `step`,
        `tokens` (read so far) and `elapsed` (seconds). "step": `loss` (nats a token), `bits_per_byte`, `accuracy`,
        `homeostasis`, `lr`, `grad_norm`, `rates` (spikes a neuron and token, by region), `tokens_per_s`. "skip":
        `skipped`, how many were by now. "evaluation": `validation_loss` (nats a token), `validation_bits_per_byte`,
        `best`. "sample": `prompt`, `text`.

        Returns
        -------
        Stop
            Its `reason` says in words why the run stopped, None when it went to its end; `received` is the signal, if
            it was one.

        Raises
        ------
        OSError
            If a checkpoint cannot be written; the former ones stay.
        FloatingPointError
            If a loss, a gradient or a validation loss is not finite, or with `nonfinite="skip"` too many in a row were
            not; `last` stays as it was saved last.
        KeyboardInterrupt
            At a second signal, at once and without saving.
        Exception
            What a callback raised, after the run was saved.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        self._failure = None
        self._begun = time.perf_counter() - self._elapsed
        try:
            with stop_on_signals() as self._stop:
                self._tell("on_begin")
                if self._failure is None:
                    self._loop()
        except Exception as error:
            if self._failure is not None:
                raise error from self._failure
            raise
        finally:
            self._tell("on_end")
        if self._failure is not None:
            raise self._failure
        return self._stop

    def report(self, record: Record) -> None:
        """Hand a record to the callbacks: "sample" to `on_sample`, and so on. For callbacks that make records."""
        self._elapsed = time.perf_counter() - self._begun
        record["elapsed"] = round(self._elapsed, 3)
        self._tell(f"on_{record['event']}", record)

    def save(self, name: str) -> None:
        """Write the checkpoint `name` of this run."""
        model = self.model
        run = {
            **asdict(replace(self.settings, max_minutes=None)),
            "streams": model.streams,
            "accumulate": model.accumulate,
            "tokens": model.max_tokens,
            "seed": model.seed,
            **{name: getattr(self, name) for name in KEPT},
            "tokens_read": self.tokens,
            "elapsed": self._elapsed,
        }
        path = self.out / name
        extra = {**self.about, "run": run}
        model.save(path, self._reader.cursor, extra, self.tokenizer, self._groups.state())
        self._tell("on_save", path)

    def _loop(self) -> None:
        saved = self.finished or self._restored is not None
        last = self.out / LAST
        if self._restored is not None and last.exists() and last.samefile(self._restored):
            self._keep()  # a crash may have come between the two
        clock = time.monotonic()
        while not (self.finished or self._stop.reason or self._failure):
            saved = False
            if not self._step():
                continue
            if self._due(self.settings.evaluate_every):
                self._evaluate()
            minutes = self.settings.save_minutes
            late = minutes is not None and time.monotonic() - clock >= 60 * minutes
            if late or self._due(self.settings.save_every):
                self.save(LAST)
                self._keep()
                saved, clock = True, time.monotonic()
        if not saved:
            self.save(LAST)

    def _keep(self) -> None:
        """Keep `last` as the checkpoint of this step, where it is one of those."""
        if self.settings.keep and self._due(self.settings.save_every):
            keeping.keep(self.out / LAST, self.model.step, self.settings.keep)

    def _due(self, every: int) -> bool:
        return self.finished or self.model.step % every == 0

    def _step(self) -> bool:
        """Train on the next tokens and report it; False where that was skipped."""
        start = time.perf_counter()
        lr = self.settings.rate(self.model.step)
        before = self.model.step
        ids, targets, resets = self._reader.next()
        result = self._groups.train_step(ids, targets, resets, lr)
        seconds = time.perf_counter() - start
        self.tokens += ids.size
        done = self.model.step > before
        self._skipped = 0 if done else self._skipped + 1
        if done:
            self.report(self._step_record(result, lr, ids.size / seconds))
        else:
            self.report({"event": "skip", "step": before, "tokens": self.tokens, "skipped": self.model.skipped})
        if self._skipped >= MOST_SKIPPED:
            raise FloatingPointError(f"step {before + 1}: {self._skipped} in a row were not finite and were skipped")
        return done

    def _step_record(self, result: StepResult, lr: float, tokens_per_s: float) -> Record:
        return {
            "event": "step",
            "step": self.model.step,
            "tokens": self.tokens,
            "loss": result.loss,
            "bits_per_byte": self.training.bits_per_byte(result.loss),
            "accuracy": result.accuracy,
            "homeostasis": result.homeostasis,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "rates": result.rates,
            "tokens_per_s": round(tokens_per_s, 1),
        }

    def _evaluate(self) -> None:
        step = self.model.step
        loss = self.model.evaluate(*self._held_out)
        if not math.isfinite(loss):
            raise FloatingPointError(f"step {step}: expected a finite validation loss, got {loss}")
        self.validation, self.validation_step = loss, step
        best = self.best is None or loss < self.best
        self.since_best = 0 if best else self.since_best + 1
        if best:
            self.best, self.best_step = loss, step
            self.save(BEST)
        self.report({
            "event": "evaluation",
            "step": step,
            "tokens": self.tokens,
            "validation_loss": loss,
            "validation_bits_per_byte": self.evaluated.bits_per_byte(loss),
            "best": best,
        })

    def _tell(self, event: str, *arguments: Any) -> None:
        """Call all callbacks; the first exception of one is kept for the end of the run."""
        for callback in self.callbacks:
            try:
                getattr(callback, event)(self, *arguments)
            except Exception as error:
                self._failure = self._failure or error


def run_facts(meta: Mapping[str, Any], saved: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a checkpoint's facts say about its run; ValueError if it is of none."""
    run = (meta.get("extra") or {}).get("run")
    if run is None or meta.get("cursor") is None:
        raise ValueError(f"{saved}: expected a checkpoint of a training run, got one that was saved otherwise")
    return dict(run)


def settings_of(run: Mapping[str, Any], **changed: Any) -> TrainSettings:
    """Return the settings of a run to go on with: its own, and what is changed."""
    return TrainSettings(**{field.name: run[field.name] for field in fields(TrainSettings)} | changed)


def _tokens(text: Tokens | bytes) -> Tokens:
    return text if isinstance(text, Tokens) else Tokens.of_bytes(text)
