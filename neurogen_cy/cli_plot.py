"""`neurogen plot`: the pictures of a run, of a checkpoint, or of a connectome."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from neurogen_cy import plots
from neurogen_cy.cli_common import PATH, backend_options, checkpoint_in, is_checkpoint, load_model, usage_errors
from neurogen_cy.config import Config
from neurogen_cy.train import BEST, METRICS

LONGEST = 4096  # bytes of a file that are heard


@click.command()
@click.argument("path", metavar="RUN|CHECKPOINT|FILE.toml", type=PATH)
@click.option("--text", metavar="TEXT", help="What the brain hears.  [default: a sentence]")
@click.option("--file", "source", type=PATH, metavar="FILE", help="The same, from the beginning of a file.")
@click.option(
    "--only", type=click.Choice(plots.KINDS), multiple=True, help="This picture, not all; may be given again."
)
@click.option("--format", "kind", type=click.Choice(plots.FORMATS), help="This kind of file, not both.")
@click.option(
    "--out", type=PATH, metavar="DIR", help="For the files.  [default: RUN/pictures, CHECKPOINT_pictures, here]"
)
@backend_options
def plot(
    path: Path, text: str | None, source: Path | None, only: tuple[str, ...], kind: str | None, out: Path | None,
    run_on: dict[str, Any],
) -> None:
    """Draw pictures: training curves, spike raster, gates, histograms, connectome, as PNG and SVG.

    RUN is the folder of a run, whose best checkpoint is looked at; a CHECKPOINT has no curves; of a connectome in
    FILE.toml there is nothing but the connectome.
    """
    reason = plots.unavailable()
    if reason is not None:
        raise click.ClickException(reason)
    if text is not None and source is not None:
        raise click.UsageError("expected --text or --file, got both")
    formats = plots.FORMATS if kind is None else (kind,)
    with usage_errors(RuntimeError, MemoryError, TypeError, OverflowError):
        heard = text if source is None else _beginning(source)
        pictures = _pictures(path, heard, only, run_on)
        for name in only:
            if name not in pictures:
                raise ValueError(f"--only {name}: expected one of {', '.join(pictures)} for {path}, got {name}")
        chosen = {name: draw for name, draw in pictures.items() if not only or name in only}
        folder = out or _folder(path)
        for file in plots.write(chosen, folder, formats):
            click.echo(file)


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(LONGEST)


def _folder(path: Path) -> Path:
    """Return where pictures go by themselves: never into a checkpoint, which is replaced as a whole."""
    if path.is_file():
        return Path(".")
    return path.with_name(f"{path.name}_{plots.FOLDER}") if is_checkpoint(path) else path / plots.FOLDER


def _pictures(path: Path, text: str | bytes | None, only: tuple[str, ...], run_on: dict[str, Any]) -> plots.Pictures:
    """Return what can be drawn of `path`; a model is loaded only where one of its pictures is asked for."""
    if path.suffix == ".toml":
        config = Config.from_toml(path)
        return {"connectome": lambda: plots.connectome(config)}
    out: plots.Pictures = {}
    if (path / METRICS).is_file():
        out["curves"] = lambda: plots.curves(path)
        if only == ("curves",):
            return out
    saved = checkpoint_in(path, BEST)
    if is_checkpoint(saved):
        model, tokenizer = load_model(saved, run_on, 1)
        out |= plots.model_pictures(model, text, tokenizer)
    if not out:
        raise ValueError(f"{path}: expected a run, a checkpoint or a connectome in a .toml file, got none of them")
    return out
