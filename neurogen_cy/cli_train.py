"""`neurogen train`: begin or resume a run, show it, and say what came of it."""

from __future__ import annotations

from typing import Any

import click

from neurogen_cy import plots, report
from neurogen_cy.callbacks import Samples
from neurogen_cy.cli_common import backend_options, is_checkpoint, usage_errors
from neurogen_cy.cli_run import Run, begin, resume
from neurogen_cy.cli_train_options import train_options
from neurogen_cy.model import NeuroGen
from neurogen_cy.progress import ProgressBar
from neurogen_cy.tensorboard import TensorBoard
from neurogen_cy.train import BEST, LAST
from neurogen_cy.writing import shown, written

SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 400, 0.6
SHORT_SAMPLE = 120  # tokens, of those while it trains


@click.command()
@train_options
@backend_options
def train(**options: Any) -> None:
    """Train a brain on text: the first 90 % to learn, the last 10 % to validate.

    OUT holds metrics.jsonl and the checkpoints last and best. A resumed run keeps its text and its settings: how long
    it goes, what it shows and saves, how its streams are grouped and where it runs may change. Ctrl-C or SIGTERM
    finishes the step, saves, and exits with status 130 or 143; a second one stops at once.
    """
    with usage_errors(ImportError):
        run = resume(options) or begin(options)
        callbacks = [*_samples(run), ProgressBar(), *([TensorBoard()] if options["tensorboard"] else [])]
    trainer, model = run.trainer, run.trainer.model
    trainer.callbacks += callbacks
    steps, saved = trainer.settings.steps, trainer.out / LAST
    if trainer.finished:
        click.echo(f"{saved}: finished, {model.step} of {steps} steps are done; --steps sets a new total")
        return
    ngrams = _announce(run)
    try:
        stop = trainer.run()
    except (OSError, ArithmeticError) as error:  # disk full; a loss or state that is not finite
        kept = f"the newest checkpoint is {saved}" if is_checkpoint(saved) else "no checkpoint was saved yet"
        raise click.ClickException(f"{error} ({kept})") from error
    if stop.reason is not None:
        reason = f"by {stop.reason}" if stop.received else f"({stop.reason})"
        click.echo(f"stopped {reason} at step {model.step} of {steps}, saved in {saved}")
    if stop.received is not None or trainer.validation_step != model.step:
        click.echo(f"to continue: neurogen train --resume auto --out {trainer.out}")
    else:
        _conclude(run, ngrams)
        if options["pictures"]:
            _draw(run)
    if stop.received is not None:
        raise SystemExit(128 + stop.received)


def _samples(run: Run) -> list[Samples]:
    """Return the callback that lets the model write while it trains, where that is asked for."""
    tokenizer, every = run.trainer.tokenizer, run.trainer.settings.sample_every
    prompt = _prompt(run)

    def write(model: NeuroGen, seed: int) -> tuple[str, str]:
        text = written(model, tokenizer, prompt, SHORT_SAMPLE, temperature=SAMPLE_TEMPERATURE, seed=seed)
        return shown(prompt), text

    return [] if every is None else [Samples(every, write)]


def _prompt(run: Run) -> bytes:
    """Return a sentence of the validation text, whole characters of it where the tokenizer needs them."""
    tokenizer = run.trainer.tokenizer
    sentence = report.sentence_of(tokenizer.decode_bytes(run.trainer.evaluated.ids[:20_000]))
    return sentence if tokenizer.kind == "bytes" else sentence.decode("utf-8", "ignore").encode("utf-8")


def _announce(run: Run) -> dict[int, float]:
    """Print what is about to be trained on what; return the baselines."""
    trainer = run.trainer
    ngrams = report.ngram_bits(run.text)
    click.echo(report.corpus_text(run.corpus, trainer.tokenizer))
    if len(trainer.evaluated) < len(run.corpus.validation):
        click.echo(f"            while it trains, the first {trainer.evaluated.text_bytes:,} bytes of them")
    click.echo(report.ngram_text(ngrams))
    click.echo(report.model_text(run.name, trainer.model))
    click.echo(f"run         {trainer.out}, steps {trainer.model.step} to {trainer.settings.steps}")
    return ngrams


def _conclude(run: Run, ngrams: dict[int, float]) -> None:
    """Print what came of a run: validation, a sample and where the checkpoints are."""
    trainer, model = run.trainer, run.trainer.model
    evaluated = trainer.evaluated
    assert trainer.validation is not None and trainer.best is not None  # it was evaluated at this step
    rows = report.ngram_rows(ngrams)
    rows[f"{run.name}, step {model.step}"] = evaluated.bits_per_byte(trainer.validation)
    if trainer.best_step != model.step:
        rows[f"{run.name}, step {trainer.best_step}, the best"] = evaluated.bits_per_byte(trainer.best)
    per_token = report.token_text(trainer.validation, evaluated, trainer.tokenizer)
    click.echo("\n" + report.validation_table(rows) + per_token)
    prompt = _prompt(run)
    text = written(
        model, trainer.tokenizer, prompt, SAMPLE_TOKENS, temperature=SAMPLE_TEMPERATURE, seed=model.seed
    )
    unit = "bytes" if trainer.tokenizer.kind == "bytes" else "tokens"
    click.echo(f"\nsample: {len(prompt)} bytes of the validation text | {SAMPLE_TOKENS} {unit} of its own\n")
    click.echo(f"{shown(prompt)}|{text}")
    best = trainer.out / BEST
    click.echo(f"\ncheckpoints: {trainer.out / LAST}, {best}")
    click.echo(f'to hear more: neurogen generate {best} --prompt "The "')


def _draw(run: Run) -> None:
    """Draw the run and its brain, and print where the pictures are, or why there are none."""
    trainer = run.trainer
    if (reason := plots.unavailable()) is not None:
        click.echo(reason)
        return
    try:
        plots.run_pictures(trainer.out, trainer.model, text=_prompt(run), tokenizer=trainer.tokenizer)
    except (OSError, ValueError) as error:  # the run itself is finished and saved
        click.echo(f"no pictures: {error}")
    else:
        click.echo(f"pictures: {trainer.out / plots.FOLDER}")
