"""`neurogen eval`: a checkpoint measured on text."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click

from neurogen_cy import checkpoint, report
from neurogen_cy.cli_common import (
    PATH,
    STREAMS,
    backend_options,
    checkpoint_in,
    load_model,
    show_tokenising,
    usage_errors,
)
from neurogen_cy.corpus import open_corpus, open_same_corpus
from neurogen_cy.streams import held_out
from neurogen_cy.train import BEST


@click.command("eval")
@click.argument("path", metavar="CHECKPOINT", type=PATH)
@click.option("--data", metavar="FILE_OR_DIR", help="Text to evaluate on, as for train.  [default: the one trained on]")
@click.option("--all", "whole", is_flag=True, help="Evaluate on all of the text, not only its last 10 %.")
@click.option("--ngrams", is_flag=True, help="Show 3-, 4- and 5-grams, counted on the first 90 %, beside it.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as one JSON object.")
@backend_options
def evaluate(
    path: Path, data: str | None, whole: bool, ngrams: bool, as_json: bool, run_on: dict[str, Any]
) -> None:
    """Measure a checkpoint on text: bits per byte, nats per byte, perplexity.

    CHECKPOINT is a checkpoint, or the folder of a run, whose best is then taken. The text is read as 16 streams from
    zero state, each token counted once.
    """
    if whole and ngrams:
        raise click.UsageError("expected --all or --ngrams, got both: n-grams need the first 90 % to count on")
    with usage_errors(ImportError):
        path = checkpoint_in(path, BEST)
        about = checkpoint.read_meta(path).get("extra") or {}
        model, tokenizer = load_model(path, run_on, STREAMS)
        if data is None and "corpus" in about:
            corpus = open_same_corpus(about["corpus"], tokenizer, progress=show_tokenising())
        else:
            corpus = open_corpus(data, tokenizer, progress=show_tokenising())
        tokens = corpus.whole if whole else corpus.validation
        parts = held_out(tokens)
    nats = model.evaluate(*parts)
    bits = tokens.bits_per_byte(nats)
    if as_json:
        facts = {
            "checkpoint": str(path), "step": model.step, "corpus": corpus.facts, "tokens": parts[1].size,
            "bits_per_byte": bits, "nats_per_token": nats, "perplexity_per_token": math.exp(nats),
        }  # fmt: skip
        click.echo(json.dumps({**facts, "ngrams": report.ngram_bits(corpus.text()) if ngrams else {}}))
        return
    counted = report.ngram_bits(corpus.text()) if ngrams else {}
    click.echo(f"{path}, step {model.step}")
    facts = corpus.facts
    click.echo(f"{facts['name']}, {parts[1].size:,} {tokens.unit} predicted, sha256 of the text {facts['sha256']}")
    if ngrams and not counted:
        click.echo(report.ngram_text(counted))
    rows = {**report.ngram_rows(counted), about.get("name", "this checkpoint"): bits}
    click.echo(report.validation_table(rows) + report.token_text(nats, tokens, tokenizer))
