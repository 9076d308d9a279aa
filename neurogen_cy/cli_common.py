"""What several commands share: errors as messages, the text to read, the checkpoint that is meant."""

from __future__ import annotations

import codecs
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np

from neurogen_cy import atomic
from neurogen_cy.data import default_corpus, read_corpus
from neurogen_cy.model import NeuroGen

PATH = click.Path(path_type=Path)


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
            type=click.Choice(["bf16", "fp32"]),
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


def load_same_corpus(path: Path | None, facts: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """Return the text with these facts, from where they say or from `path`.

    Raises
    ------
    ValueError
        If the text there is another one.
    """
    own = None if facts["source"] == "pydoc_data.topics" else Path(facts["source"])
    data, found = load_corpus(own if path is None else path)
    if found["sha256"] != facts["sha256"]:
        raise ValueError(
            f"expected the text that was trained on ({facts['name']}, {facts['bytes']} bytes, sha256 "
            f"{facts['sha256']}), got {found['name']}, {found['bytes']} bytes, sha256 {found['sha256']}"
        )
    return data, found


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


def stream_text(model: NeuroGen, prompt: bytes, tokens: int, **sampling: Any) -> Iterator[str]:
    """Yield what a byte model writes after `prompt`, as text as it comes; no UTF-8 becomes U+FFFD.

    Parameters
    ----------
    model : NeuroGen
        With a vocabulary of 256.
    prompt : bytes
        At least one.
    tokens : int
        Bytes to write.
    sampling
        Passed on to `NeuroGen.generate`.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for ids in model.generate([np.frombuffer(prompt, np.uint8).astype(np.int32)], tokens, **sampling):
        yield decoder.decode(bytes([int(ids[0])]))
    yield decoder.decode(b"", final=True)
