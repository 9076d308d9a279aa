"""`neurogen info`: what is installed, what runs here and how; what is in a checkpoint."""

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
from neurogen_cy.cli_common import PATH, STREAMS, TOKENS, backend_options, checkpoint_in, usage_errors
from neurogen_cy.config import Config
from neurogen_cy.model import NeuroGen
from neurogen_cy.presets import SIZES
from neurogen_cy.sizes import memory_plan
from neurogen_cy.train import BEST


@click.command()
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
