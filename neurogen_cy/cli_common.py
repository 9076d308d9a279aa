"""What several commands share: errors as messages, where to compute, the text to read, the checkpoint that is meant."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from neurogen_cy import atomic
from neurogen_cy.data import default_corpus, read_corpus
from neurogen_cy.model import NeuroGen
from neurogen_cy.tokenization import Tokenizer, load_saved

PATH = click.Path(path_type=Path)
STREAMS, TOKENS = 16, 64
"""Of a training step, and of an evaluation."""


@contextmanager
def usage_errors(*more: type[Exception]) -> Iterator[None]:
    """Turn what is wrong with the user's input into a message and exit status 2."""
    kinds: tuple[type[Exception], ...] = (ValueError, OSError, *more)
    try:
        yield
    except kinds as error:
        raise click.UsageError(str(error)) from error


def backend_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add `--backend`, `--device`, `--precision` and `--threads`, and hand them over as `run_on`.

    `run_on` has the arguments of `NeuroGen` and of `NeuroGen.load` by their names.
    """

    @functools.wraps(command)
    def with_backend(**options: Any) -> Any:
        names = ("backend", "device", "precision", "threads")
        return command(run_on={name: options.pop(name) for name in names}, **options)

    where = "Where to compute; auto: on the GPU where it can be used."
    for option in (
        click.option("--threads", type=click.IntRange(1), help="CPU threads.  [default: all cores]"),
        click.option(
            "--precision",
            type=click.Choice(["bf16", "fp32", "fp8"]),
            help="Of products.  [default: bf16 on the GPU, fp32 on the CPU]",
        ),
        click.option(
            "--device", type=click.IntRange(0), default=0, show_default=True, help="Number of the GPU."
        ),
        click.option(
            "--backend",
            type=click.Choice(["auto", "cpu", "cuda"]),
            default="auto",
            show_default=True,
            help=where,
        ),
    ):
        with_backend = option(with_backend)
    return with_backend


def load_corpus(path: Path | None) -> tuple[bytes, dict[str, Any]]:
    """Return the user's text, or the default corpus where no path is given, with its facts."""
    return default_corpus() if path is None else read_corpus(path)


def show_tokenising() -> Callable[[int, int | None], None]:
    """Return a `progress` for `open_corpus`: a bar, on a terminal alone, once there is something to wait for."""
    bars: list[tqdm[None]] = []

    def show(done: int, total: int | None) -> None:
        if not bars:
            bars.append(tqdm(total=total, unit="B", unit_scale=True, desc="tokenising", disable=None, leave=False))
        bars[0].update(done - bars[0].n)
        if done == total:
            bars[0].close()

    return show


def load_model(
    path: Path, run_on: dict[str, Any], streams: int, max_tokens: int = TOKENS
) -> tuple[NeuroGen, Tokenizer]:
    """Return the model in a checkpoint, ready for this many streams, and its tokenizer."""
    with usage_errors(RuntimeError, MemoryError, ImportError):
        tokenizer = load_saved(path)
        return NeuroGen.load(path, streams=streams, max_tokens=max_tokens, **run_on), tokenizer


def run_checkpoint(out: Path, name: str) -> Path | None:
    """Return the checkpoint `name` of the run in `out`, None where there is none.

    Raises
    ------
    ValueError
        If `out` is itself a checkpoint.
    """
    if is_checkpoint(out):
        raise ValueError(f"{out}: expected the folder of a run, got a checkpoint")
    return out / name if is_checkpoint(out / name) else None


def is_checkpoint(path: Path) -> bool:
    """Say whether a checkpoint is meant by `path`, be it damaged."""
    try:
        return (atomic.current(path) / "meta.json").exists()
    except FileNotFoundError:
        return False


def checkpoint_in(path: Path, name: str) -> Path:
    """Return `path`, or the checkpoint `name` in it where it is the folder of a run."""
    return path / name if not is_checkpoint(path) and is_checkpoint(path / name) else path
