"""The command line `neurogen`: train, eval, generate, info, diagnose, selftest."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import click
import numpy as np
from threadpoolctl import threadpool_info

from neurogen_cy import __version__, backend, checkpoint, report
from neurogen_cy.cli_common import (
    PATH,
    backend_options,
    checkpoint_in,
    load_corpus,
    load_same_corpus,
    stream_text,
    usage_errors,
)
from neurogen_cy.cli_diagnose import diagnose
from neurogen_cy.cli_selftest import command as selftest
from neurogen_cy.cli_train import STREAMS, TOKENS, train
from neurogen_cy.config import Config
from neurogen_cy.data import evaluation_streams, split
from neurogen_cy.model import NeuroGen
from neurogen_cy.presets import SIZES
from neurogen_cy.sizes import memory_plan
from neurogen_cy.train import BEST


@click.group("neurogen", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="neurogen")
def main() -> None:
    """A brain-inspired language model: spiking cortical regions that learn to write."""


main.add_command(train)
main.add_command(diagnose)
main.add_command(selftest)


@main.command("eval")
@click.argument("path", metavar="CHECKPOINT", type=PATH)
@click.option(
    "--data", type=PATH, metavar="FILE_OR_DIR", help="Text to evaluate on.  [default: the one trained on]"
)
@click.option("--all", "whole", is_flag=True, help="Evaluate on all of the text, not only its last 10 %.")
@click.option("--ngrams", is_flag=True, help="Show 3-, 4- and 5-grams, counted on the first 90 %, beside it.")
@backend_options
def evaluate(path: Path, data: Path | None, whole: bool, ngrams: bool, run_on: dict[str, Any]) -> None:
    """Measure a checkpoint on text: nats per byte, bits per byte, perplexity.

    CHECKPOINT is a checkpoint, or the folder of a run, whose best is then taken. The text is read as 16
    streams from zero state, each byte counted once.
    """
    if whole and ngrams:
        raise click.UsageError(
            "expected --all or --ngrams, got both: n-grams need the first 90 % to count on"
        )
    with usage_errors():
        path = checkpoint_in(path, BEST)
        about = checkpoint.read_meta(path).get("extra") or {}
        if data is None and "corpus" in about:
            text, facts = load_same_corpus(None, about["corpus"])
        else:
            text, facts = load_corpus(data)
        training, validation = split(text)
        held_out = evaluation_streams(text if whole else validation)
        model = _load(path, run_on, STREAMS)
    nats = model.evaluate(*held_out)
    bits = report.ngram_bits(training, validation) if ngrams else {}
    click.echo(f"{path}, step {model.step}")
    click.echo(f"{facts['name']}, {held_out[1].size:,} bytes predicted, sha256 of the text {facts['sha256']}")
    if ngrams and not bits:
        click.echo(report.ngram_text(bits))
    click.echo(report.validation_table(about.get("name", "this checkpoint"), nats, bits))


@main.command()
@click.argument("path", metavar="CHECKPOINT", type=PATH)
@click.option("--prompt", default="\n", metavar="TEXT", help="Text to continue.  [default: a new line]")
@click.option("--tokens", type=click.IntRange(1), default=400, show_default=True, help="Bytes to write.")
@click.option(
    "--temperature", type=float, default=0.7, show_default=True, help="Lower is safer, higher is wilder."
)
@click.option(
    "--top-k", type=click.IntRange(0), default=0, show_default=True, help="Among the k likeliest; 0: all."
)
@click.option(
    "--top-p", type=float, default=1.0, show_default=True, help="Among the likeliest that sum up to p."
)
@click.option("--greedy", is_flag=True, help="Always the likeliest.")
@click.option("--seed", type=click.IntRange(0), help="For the same text again.  [default: another each time]")
@backend_options
def generate(
    path: Path, prompt: str, tokens: int, run_on: dict[str, Any], seed: int | None, **sampling: Any
) -> None:
    """Continue a text, printed as it is written.

    CHECKPOINT is a checkpoint, or the folder of a run, whose best is then taken.
    """
    if not prompt:
        raise click.UsageError("--prompt: expected at least one character, got an empty text")
    with usage_errors():
        text = prompt.encode("utf-8", "surrogateescape")
        model = _load(checkpoint_in(path, BEST), run_on, 1)
        seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
        pieces = stream_text(model, text, tokens, seed=seed, **sampling)
        first = next(pieces)
    click.echo(text.decode("utf-8", "replace") + first, nl=False)
    for piece in pieces:
        click.echo(piece, nl=False)
    click.echo()


@main.command()
@click.argument("path", metavar="[CHECKPOINT]", type=PATH, required=False)
@click.option(
    "--preset",
    type=click.Choice(list(SIZES)),
    default="tiny",
    show_default=True,
    help="Whose execution plan to show.",
)
@click.option(
    "--streams", type=click.IntRange(1), default=STREAMS, show_default=True, help="Streams side by side."
)
@click.option(
    "--tokens", type=click.IntRange(1), default=TOKENS, show_default=True, help="Tokens of each in a call."
)
@backend_options
def info(path: Path | None, preset: str, streams: int, tokens: int, run_on: dict[str, Any]) -> None:
    """Say what is installed, what runs here and how; with a CHECKPOINT, what is in it."""
    if path is not None:
        with usage_errors():
            meta = checkpoint.read_meta(checkpoint_in(path, BEST))
        click.echo(json.dumps(meta, indent=2))
        return
    click.echo(f"neurogen_cy {__version__}, Python {platform.python_version()}, NumPy {np.__version__}")
    for name, reason in backend.available().items():
        ready = reason is None and f"ready, {backend.load(name)[1].describe(0)}"
        click.echo(f"backend {name}: {ready or f'not available: {reason}'}")
    for pool in threadpool_info():
        kind, version = pool["internal_api"], pool.get("version") or "of unknown version"
        click.echo(f"{pool['user_api']}: {kind} {version}, {pool['num_threads']} threads, {pool['filepath']}")
    click.echo(f"cores: {len(os.sched_getaffinity(0))} for this process, {os.cpu_count()} in all")
    with usage_errors(RuntimeError, MemoryError):
        config = Config.preset(preset, vocab_size=256)
        model = NeuroGen(config, streams=streams, max_tokens=tokens, **run_on)
    click.echo(f"\nexecution plan of {preset} on the {model.backend} backend, {streams} streams x {tokens} tokens")
    for name, value in model.execution_plan.items():
        click.echo(f"  {name}: {value}")
    click.echo(f"\nmemory there at {streams} streams x {tokens} tokens, bytes as tokens")
    click.echo(f"{'preset':8}{'neurons':>10}{'weights':>14}{'memory':>10}  of which")
    for name in SIZES:
        config = Config.preset(name, vocab_size=256)
        plan = memory_plan(config, streams, tokens, model.backend, model.threads, model.precision)
        parts = ", ".join(f"{part} {report.size_text(count)}" for part, count in plan.items())
        neurons = sum(region.neurons for region in config.regions)
        total = report.size_text(sum(plan.values()))
        click.echo(f"{name:8}{neurons:>10,}{config.weights:>14,}{total:>10}  {parts}")


def _load(path: Path, run_on: dict[str, Any], streams: int) -> NeuroGen:
    """Return the byte model in a checkpoint, ready for this many streams."""
    with usage_errors(RuntimeError, MemoryError):
        model = NeuroGen.load(path, streams=streams, max_tokens=TOKENS, **run_on)
    if model.config.vocab_size != 256:
        raise click.UsageError(
            f"{path}: expected a model of bytes, vocab_size 256, got {model.config.vocab_size}"
        )
    return model
