"""`neurogen train`: begin or resume a run, show it, and say what came of it."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click

from neurogen_cy import checkpoint, report
from neurogen_cy.cli_common import (
    PATH,
    backend_options,
    checkpoint_in,
    is_checkpoint,
    load_corpus,
    load_same_corpus,
    run_checkpoint,
    stream_text,
    usage_errors,
)
from neurogen_cy.config import Config
from neurogen_cy.data import split
from neurogen_cy.model import NeuroGen
from neurogen_cy.optimizer import AdamW
from neurogen_cy.presets import SIZES
from neurogen_cy.train import BEST, LAST, Settings, Trainer

STREAMS, TOKENS, SEED = 16, 64, 0
WEIGHT_DECAY = 0.5  # holds back the growth of recurrent loops, and generalises better (preset tiny: 0.15 bits)
SAMPLE_BYTES, SAMPLE_TEMPERATURE = 400, 0.6


@dataclass
class Run:
    """A run ready to go: its trainer, what it is called and the text with its facts."""

    trainer: Trainer
    name: str
    corpus: dict[str, Any]
    training: bytes
    validation: bytes


@click.command()
@click.option(
    "--data", type=PATH, metavar="FILE_OR_DIR", help="Text to learn.  [default: the topics of Python's help]"
)
@click.option("--config", type=PATH, metavar="FILE.toml", help="Connectome of your own, instead of a preset.")
@click.option(
    "--preset", type=click.Choice(list(SIZES)), help="Size of the default connectome.  [default: tiny]"
)
@click.option("--steps", type=click.IntRange(1), help=f"Optimizer steps in all.  [default: {Settings.steps}]")
@click.option("--streams", type=click.IntRange(1), help=f"Streams read side by side.  [default: {STREAMS}]")
@click.option(
    "--tokens", type=click.IntRange(1), help=f"Tokens of each stream in a step.  [default: {TOKENS}]"
)
@click.option("--lr", type=float, help=f"Highest learning rate.  [default: {Settings.lr}]")
@click.option("--seed", type=click.IntRange(0), help=f"Seed of all that is random.  [default: {SEED}]")
@click.option(
    "--save-every",
    type=click.IntRange(1),
    metavar="STEPS",
    help=f"Steps between checkpoints.  [default: {Settings.save_every}]",
)
@click.option(
    "--out", type=PATH, metavar="DIR", help="Folder of the run.  [default: runs/NAME of preset or config]"
)
@click.option(
    "--resume",
    metavar="auto|DIR",
    help="Continue from a checkpoint; auto: from OUT/last if it is there, else begin.",
)
@backend_options
def train(**options: Any) -> None:
    """Train a brain on text, byte by byte: the first 90 % to learn, the last 10 % to validate.

    OUT holds metrics.jsonl and the checkpoints last and best. A resumed run keeps its text and its settings:
    only --steps (a new total), --save-every, --out and where it runs may change. Ctrl-C or SIGTERM
    finishes the step, saves, and exits with status 130 or 143; a second one stops at once.
    """
    with usage_errors():
        run = _resume(options) or _begin(options)
    trainer, model = run.trainer, run.trainer.model
    steps, saved = trainer.settings.steps, trainer.out / LAST
    if trainer.finished:
        click.echo(f"{saved}: finished, {model.step} of {steps} steps are done; --steps sets a new total")
        return
    ngrams = _announce(run)
    bar = report.ProgressBar(model.config, model.step, steps)
    try:
        stop = trainer.run(bar.show)
    except (OSError, ArithmeticError) as error:  # disk full; a loss or state that is not finite
        kept = f"the newest checkpoint is {saved}" if is_checkpoint(saved) else "no checkpoint was saved yet"
        raise click.ClickException(f"{error} ({kept})") from error
    finally:
        bar.close()
    if stop.received is not None:
        click.echo(f"stopped by {stop.received.name} at step {model.step} of {steps}, saved in {saved}")
        click.echo(f"to continue: neurogen train --resume auto --out {trainer.out}")
        raise SystemExit(128 + stop.received)
    _conclude(run, ngrams)


def _announce(run: Run) -> dict[int, float]:
    """Print what is about to be trained on what; return the baselines."""
    trainer, model = run.trainer, run.trainer.model
    ngrams = report.ngram_bits(run.training, run.validation)
    click.echo(report.corpus_text(run.corpus, run.training, run.validation))
    click.echo(report.ngram_text(ngrams))
    where = f"{model.backend}, {model.precision}"
    click.echo(report.model_text(run.name, model.config, where, model.streams, model.max_tokens))
    click.echo(f"run         {trainer.out}, steps {model.step} to {trainer.settings.steps}")
    return ngrams


def _conclude(run: Run, ngrams: dict[int, float]) -> None:
    """Print what came of a finished run: validation, a sample and where the checkpoints are."""
    trainer, model = run.trainer, run.trainer.model
    assert trainer.validation is not None  # every run ends with an evaluation
    click.echo("\n" + report.validation_table(f"{run.name}, step {model.step}", trainer.validation, ngrams))
    prompt = report.sentence_of(run.validation)
    text = stream_text(model, prompt, SAMPLE_BYTES, temperature=SAMPLE_TEMPERATURE, seed=model.seed)
    click.echo(f"\nsample: {len(prompt)} bytes of the validation text | {SAMPLE_BYTES} bytes of its own\n")
    click.echo(prompt.decode("utf-8", "replace") + "|" + "".join(text))
    best = trainer.out / BEST
    click.echo(f"\ncheckpoints: {trainer.out / LAST}, {best}")
    click.echo(f'to hear more: neurogen generate {best} --prompt "The "')


def _begin(options: dict[str, Any]) -> Run:
    """Return a new run as the options say."""
    name, config = _config(options)
    out = options["out"] or Path("runs", name)
    if run_checkpoint(out, LAST) is not None:
        raise click.UsageError(
            f"{out}: expected a folder without a run, got one with a checkpoint: "
            f"continue it with --resume auto, or name another with --out"
        )
    data, corpus = load_corpus(options["data"])
    training, validation = split(data)
    streams, tokens = options["streams"] or STREAMS, options["tokens"] or TOKENS
    steps = options["steps"] or Settings.steps
    settings = Settings(
        steps=steps,
        lr=Settings.lr if options["lr"] is None else options["lr"],
        warmup=min(Settings.warmup, steps // 10),
        evaluate_every=max(1, min(Settings.evaluate_every, steps // 10)),
        save_every=options["save_every"] or Settings.save_every,
    )
    with usage_errors(RuntimeError, MemoryError):
        model = NeuroGen(
            config,
            streams=streams,
            max_tokens=tokens,
            seed=options["seed"] or SEED,
            optimizer=AdamW(lr=settings.lr, weight_decay=WEIGHT_DECAY),
            **options["run_on"],
        )
    trainer = Trainer(model, training, validation, settings, out, {"name": name, "corpus": corpus})
    return Run(trainer, name, corpus, training, validation)


def _resume(options: dict[str, Any]) -> Run | None:
    """Return the run to continue, None where none is asked for or there is none yet."""
    if options["resume"] is None:
        return None
    if options["resume"] == "auto":
        out = options["out"] or Path(
            "runs", options["config"].stem if options["config"] else options["preset"] or "tiny"
        )
        found = run_checkpoint(out, LAST)
        if found is None:
            click.echo(f"{out}: no checkpoint yet, a new run begins")
            return None
        saved = found
    else:
        saved = checkpoint_in(Path(options["resume"]), LAST)
        home = Path(os.path.abspath(saved)).parent
        out = options["out"] or home
        if run_checkpoint(out, LAST) is not None and not out.samefile(home):
            raise click.UsageError(
                f"{out}: expected the folder of {saved} or one without a run, got another run's"
            )
    meta = checkpoint.read_meta(saved)
    about = meta.get("extra") or {}
    if "run" not in about:
        raise ValueError(
            f"{saved}: expected a checkpoint of a training run, got one that was saved otherwise"
        )
    run = about["run"]
    for key in ("streams", "tokens", "lr", "seed"):
        if options[key] is not None and options[key] != run[key]:
            raise click.UsageError(f"--{key}: expected {run[key]}, as in {saved}, got {options[key]}")
    data, corpus = load_same_corpus(options["data"], about["corpus"])
    training, validation = split(data)
    changed = {key: options[key] for key in ("steps", "save_every") if options[key] is not None}
    settings = Settings(**{field.name: run[field.name] for field in fields(Settings)} | changed)
    with usage_errors(RuntimeError, MemoryError):
        model = NeuroGen.load(saved, streams=run["streams"], max_tokens=run["tokens"], **options["run_on"])
    if (options["preset"] or options["config"]) and _config(options)[1] != model.config:
        given = "--config" if options["config"] else "--preset"
        raise click.UsageError(
            f"{given}: expected the connectome {about['name']} of {saved}, got another one"
        )
    trainer = Trainer(model, training, validation, settings, out, {"name": about["name"], "corpus": corpus})
    trainer.restore(meta)
    return Run(trainer, about["name"], corpus, training, validation)


def _config(options: dict[str, Any]) -> tuple[str, Config]:
    """Return the connectome that is asked for and what to call it."""
    path, preset = options["config"], options["preset"]
    if path is None:
        return preset or "tiny", Config.preset(preset or "tiny", vocab_size=256)
    if preset is not None:
        raise click.UsageError("expected --config or --preset, got both")
    try:
        config = Config.from_toml(path)
    except (ValueError, TypeError, OSError) as error:
        raise click.UsageError(f"--config {path}: {error}") from error
    if config.vocab_size != 256:
        raise click.UsageError(
            f"--config {path}: expected vocab_size 256, one for each byte, got {config.vocab_size}"
        )
    return path.stem, config
