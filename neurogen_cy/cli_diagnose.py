"""`neurogen diagnose`: what the ladder gives on this machine, with the user's own configuration and text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from neurogen_cy import backend
from neurogen_cy import diagnose as diagnosis
from neurogen_cy.cli_common import PATH, backend_options, load_corpus, usage_errors
from neurogen_cy.config import Config
from neurogen_cy.ladder import Plan
from neurogen_cy.presets import SIZES

DEFAULT_PRESET = {"cpu": "tiny", "cuda": "base"}


def _lengths(_: click.Context, __: click.Parameter, value: str) -> tuple[int, ...]:
    """"100,500" -> (100, 500)"""
    try:
        lengths = tuple(sorted({int(part) for part in value.split(",")}))
    except ValueError:
        lengths = (0,)
    if lengths[0] < 1:
        raise click.BadParameter(f"expected whole numbers >= 1 as in 100,500, got {value!r}")
    return lengths


@click.command("diagnose")
@click.option("--config", type=PATH, metavar="FILE.toml", help="Your connectome, instead of a preset.")
@click.option(
    "--preset",
    type=click.Choice(list(SIZES)),
    help="Size of the default connectome.  [default: base on a GPU, tiny on the CPU]",
)
@click.option(
    "--data", type=PATH, metavar="FILE_OR_DIR", help="Your text.  [default: the topics of Python's help]"
)
@click.option(
    "--tokens", callback=_lengths, default="100,500", show_default=True, metavar="T,T,...", help="Sequence lengths."
)
@click.option(
    "--streams", type=click.IntRange(1), default=16, show_default=True, help="Streams of the consecutive steps."
)
@click.option("--seconds", type=click.FloatRange(0.05), default=1.5, show_default=True, help="For each figure.")
@click.option("--own-rate", type=click.FloatRange(0, min_open=True), help="Tokens/s of your own loop, to be placed.")
@click.option("--json", "as_json", is_flag=True, help="Print the record instead of tables.")
@backend_options
def diagnose(
    config: Path | None, preset: str | None, data: Path | None, tokens: tuple[int, ...], streams: int, seconds: float,
    own_rate: float | None, as_json: bool, run_on: dict[str, Any],
) -> None:
    """Measure the ways of training, from token by token to one batched call, with your model and text.

    Says tokens a second, allocations, copies and synchronisations of each, where the time goes and what to change.
    Takes less than two minutes; leave the machine alone meanwhile.
    """
    if config is not None and preset is not None:
        raise click.UsageError("expected --config or --preset, got both")
    with usage_errors(RuntimeError, TypeError):
        name, model = _config(config, preset, run_on["backend"])
        text, corpus = load_corpus(data)
        plan = Plan(
            tokens=tokens, row_seconds=seconds, count_seconds=seconds / 2, steady_streams=streams,
            steady_tokens=min(64, max(tokens)), steady_seconds=2 * seconds,
        )  # fmt: skip
    say = lambda line: click.echo(line, err=True)
    with usage_errors(RuntimeError, MemoryError):
        record = diagnosis.diagnose(name, model, run_on, text, corpus, plan, own_rate, say)
    click.echo(json.dumps(record, indent=1) if as_json else "\n" + diagnosis.tables(record))


def _config(path: Path | None, preset: str | None, asked: str) -> tuple[str, Config]:
    """What is measured, and what to call it."""
    if path is not None:
        return path.stem, Config.from_toml(path)
    preset = preset or DEFAULT_PRESET[backend.load(asked)[0]]
    return preset, Config.preset(preset)
