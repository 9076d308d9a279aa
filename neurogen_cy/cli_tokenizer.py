"""`neurogen tokenizer`: make a tokenizer from text, look at one."""

from __future__ import annotations

import os
from pathlib import Path

import click
import numpy as np

from neurogen_cy import tokenization
from neurogen_cy.cli_common import PATH, checkpoint_in, is_checkpoint, usage_errors
from neurogen_cy.pieces import pieces, tokenised
from neurogen_cy.report import size_text
from neurogen_cy.sources import Source, open_source
from neurogen_cy.train import BEST

VOCABULARY = 32_000
SHOWN = 60

field_option = click.option(
    "--field", default="text", show_default=True, help="Where the text of a .jsonl or data set record is."
)


@click.group()
def tokenizer() -> None:
    """Make a tokenizer from your text, or look at one."""


@tokenizer.command("train")
@click.option(
    "--data", metavar="TEXT", help="File, folder, .jsonl, .zst or hf:name.  [default: the topics of Python's help]"
)
@click.option(
    "--vocab-size", type=click.IntRange(1), default=VOCABULARY, show_default=True, help="Tokens at most."
)
@click.option(
    "--out", type=PATH, metavar="FILE", default=Path("tokenizer.json"), show_default=True, help="Where to write it."
)
@field_option
@click.option("--force", is_flag=True, help="Replace a file that is there.")
def train_tokenizer(data: str | None, vocab_size: int, out: Path, field: str, force: bool) -> None:
    """Make a byte-level BPE tokenizer: any text can be written in it, and comes back byte for byte.

    The same text and size give the same file. Needs no network. It is used by: neurogen train --tokenizer FILE.
    """
    if out.exists() and not force:
        raise click.UsageError(f"--out {out}: expected a new file, got one that exists; --force replaces it")
    with usage_errors(ImportError):
        if not out.absolute().parent.is_dir():
            raise ValueError(f"--out {out}: expected a folder to write into, got none at {out.absolute().parent}")
        from neurogen_cy.tokenizer_training import train_bpe

        source = open_source(data, field)
        made = train_bpe(source, vocab_size)
    beside = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    try:
        beside.write_bytes(made.raw)
        os.replace(beside, out)
    except OSError as error:
        raise click.ClickException(f"{out}: expected to write the tokenizer, got: {error}") from error
    finally:
        beside.unlink(missing_ok=True)
    fewer = "" if made.vocab_size == vocab_size else f" (the text has no more pairs that repeat; asked: {vocab_size:,})"
    click.echo(f"{out}: {made.vocab_size:,} tokens{fewer}, sha256 {made.sha256}")
    click.echo(_measure(made, source))


@tokenizer.command("info")
@click.argument("path", metavar="FILE_OR_CHECKPOINT", type=PATH)
@click.option("--data", metavar="TEXT", help="Text to measure it on: file, folder, .jsonl, .zst or hf:name.")
@field_option
@click.option("--show", metavar="TEXT", help="Show the tokens of this text.")
def tokenizer_info(path: Path, data: str | None, field: str, show: str | None) -> None:
    """Say what a tokenizer is; with --data, how many bytes one of its tokens stands for there.

    It is a tokenizers JSON file, a SentencePiece model, "bytes", a checkpoint or the folder of a run.
    """
    with usage_errors(ImportError):
        path = checkpoint_in(path, BEST)
        opened = tokenization.load_saved(path) if is_checkpoint(path) else tokenization.load(path)
        click.echo(f"{path}: {opened.kind}, {opened.vocab_size:,} tokens, sha256 {opened.sha256}")
        if opened.end is None:
            click.echo(f"between documents: a new line, {_shown(opened, opened.separator)}")
        else:
            click.echo(f"between documents: token {opened.end}, {opened.decode([opened.end])!r}")
        if show is not None:
            click.echo(_shown(opened, opened.encode(show)))
        if data is not None:
            click.echo(_measure(opened, open_source(data, field)))


def _measure(opened: tokenization.Tokenizer, source: Source) -> str:
    """Return how a text fares: bytes a token, and whether it comes back as it was."""
    size = tokens = 0
    used = np.zeros(opened.vocab_size, np.bool_)
    exact = True
    for piece, ids in tokenised(pieces(source.chunks(), opened), opened):
        size = piece.end
        tokens += len(ids)
        used[ids] = True
        own = ids[len(opened.separator) :] if piece.separated else ids
        exact = exact and opened.decode_bytes(own) == piece.data
    if not tokens:
        raise ValueError(f"expected text in {source.name}, got none")
    back = "comes back byte for byte" if exact else "does not come back byte for byte"
    return (
        f"{source.name}: {size_text(size)}, {tokens:,} tokens, {size / tokens:.3f} bytes a token; "
        f"{np.count_nonzero(used):,} of {opened.vocab_size:,} are used; the text {back}"
    )


def _shown(opened: tokenization.Tokenizer, ids: tokenization.Int32) -> str:
    """Return ids with the text of each, or its bytes where they are a part of a character."""
    texts = [(int(i), opened.decode([i])) for i in ids[:SHOWN]]
    text = " ".join(f"{i}:{opened.decode_bytes([i]) if chr(0xFFFD) in said else said!r}" for i, said in texts)
    return text + (f" ... ({len(ids)} in all)" if len(ids) > SHOWN else "")
