"""What a run shows while it goes: a bar on a terminal, now and then a plain line anywhere else."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, TextIO

from tqdm import tqdm

from neurogen_cy.callbacks import Callback, Record
from neurogen_cy.report import size_text
from neurogen_cy.sizes import memory_plan

if TYPE_CHECKING:
    from neurogen_cy.train import Trainer

LINE_SECONDS = 10.0
"""Between two plain lines."""


class ProgressBar(Callback):
    """Shows the steps with loss, bits per byte, tokens a second, firing rate, gradient norm and the model's memory.

    Parameters
    ----------
    file : text file, optional
        Standard error by default, and standard output for evaluations and samples. Where it is no terminal, lines
        take the place of the bar.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = file
        self._bar: tqdm[None] | None = None
        self._shares: dict[str, float] = {}
        self._memory = ""
        self._tokens_per_s: float | None = None
        self._shown_at = 0.0

    def on_begin(self, trainer: Trainer) -> None:
        """Open the bar."""
        model = trainer.model
        regions = model.config.regions
        self._shares = {r.name: r.neurons / sum(each.neurons for each in regions) for r in regions}
        plan = memory_plan(
            model.config, model.streams, model.max_tokens, model.backend, model.threads, model.precision
        )
        self._memory = size_text(sum(plan.values()))
        self._tokens_per_s, self._shown_at = None, time.monotonic()
        file = self._file or sys.stderr
        if file.isatty():
            self._bar = tqdm(
                total=trainer.settings.steps, initial=model.step, unit="step", mininterval=0.5, dynamic_ncols=True,
                file=file,
            )

    def on_step(self, trainer: Trainer, record: Record) -> None:
        """Move on."""
        now, before = record["tokens_per_s"], self._tokens_per_s
        self._tokens_per_s = now if before is None else 0.9 * before + 0.1 * now
        rate = sum(share * record["rates"][name] for name, share in self._shares.items())
        skipped = f", skipped {trainer.model.skipped}" if trainer.model.skipped else ""
        text = (
            f"loss {record['loss']:.3f}, {record['bits_per_byte']:.3f} bits/byte, {self._tokens_per_s:,.0f} tokens/s, "
            f"firing {rate:.3f}, grad {record['grad_norm']:.2g}, {self._memory}{skipped}"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()
        elif time.monotonic() - self._shown_at >= LINE_SECONDS or trainer.finished:
            self._shown_at = time.monotonic()
            tqdm.write(f"step {record['step']}/{trainer.settings.steps}: {text}", file=self._file or sys.stderr)

    def on_evaluation(self, trainer: Trainer, record: Record) -> None:
        """Say what it gave."""
        mark = ", the best so far" if record["best"] else ""
        bits = record["validation_bits_per_byte"]
        self._say(f"step {record['step']}: validation {bits:.3f} bits per byte{mark}")

    def on_sample(self, trainer: Trainer, record: Record) -> None:
        """Show it."""
        self._say(f"step {record['step']} writes: {record['prompt']}|{record['text']}\n")

    def on_end(self, trainer: Trainer) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _say(self, line: str) -> None:
        tqdm.write(line, file=self._file or sys.stdout)
