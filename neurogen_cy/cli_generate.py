"""`neurogen generate`: continue texts, printed as they are written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import click
import numpy as np

from neurogen_cy.cli_common import PATH, TOKENS, backend_options, checkpoint_in, load_model, usage_errors
from neurogen_cy.train import BEST
from neurogen_cy.writing import Continuation, shown, write

Command = Callable[..., Any]


def sampling_options(command: Command) -> Command:
    """Add `--temperature`, `--top-k`, `--top-p`, `--greedy` and `--seed`."""
    for option in reversed((
        click.option(
            "--temperature", type=float, default=0.7, show_default=True, help="Lower is safer, higher is wilder."
        ),
        click.option(
            "--top-k", type=click.IntRange(0), default=0, show_default=True, help="Among the k likeliest; 0: all."
        ),
        click.option(
            "--top-p", type=float, default=1.0, show_default=True, help="Among the likeliest that sum up to p."
        ),
        click.option("--greedy", is_flag=True, help="Always the likeliest."),
        click.option(
            "--seed", type=click.IntRange(0, 2**64 - 1), help="For the same text again.  [default: another each time]"
        ),
    )):
        command = option(command)
    return command


def any_seed() -> int:
    """Return a seed that nobody has chosen."""
    return int(np.random.SeedSequence().generate_state(1)[0])


@click.command()
@click.argument("path", metavar="CHECKPOINT", type=PATH)
@click.option("--prompt", "given", multiple=True, metavar="TEXT", help="Text to continue; may come again.")
@click.option(
    "--prompts", "file", type=click.File(encoding="utf-8", errors="surrogateescape"), metavar="FILE",
    help="Texts to continue, one a line; - reads them from standard input.",
)
@click.option(
    "--continuations", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Of each text."
)
@click.option("--tokens", type=click.IntRange(1), default=400, show_default=True, help="Most tokens to write.")
@click.option("--stop", "stops", multiple=True, metavar="TEXT", help="End before this text; may come again.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a continuation, when it is finished.")
@sampling_options
@backend_options
def generate(
    path: Path, given: tuple[str, ...], file: TextIO | None, continuations: int, tokens: int, stops: tuple[str, ...],
    as_json: bool, run_on: dict[str, Any], seed: int | None, **sampling: Any,
) -> None:
    """Continue texts, printed as they are written; a new line is continued where none is given.

    CHECKPOINT is a checkpoint, or the folder of a run, whose best is then taken. Several texts, and several
    continuations of one, are written side by side and printed one after another.
    """
    with usage_errors():
        lines = [text for line in file or () if (text := line.rstrip("\n"))]
        prompts = [*given, *lines] or ["\n"]
        if file is not None and not lines:
            raise ValueError(f"--prompts: expected texts in {file.name}, one a line, got none")
        if not all(prompts):
            raise ValueError("--prompt: expected at least one character, got an empty text")
        texts = [prompt for prompt in prompts for _ in range(continuations)]
        model, tokenizer = load_model(checkpoint_in(path, BEST), run_on, 1, max(TOKENS, len(texts)))
        ids = [row for prompt in prompts for row in [tokenizer.encode(prompt)] * continuations]
        several = [Continuation(tokenizer, stops) for _ in texts]
        seed = any_seed() if seed is None else seed
        pieces = write(model, tokenizer, ids, tokens, several, seed=seed, **sampling)
    if as_json:
        _print_objects(pieces, texts, several, seed)
    elif len(texts) == 1:
        click.echo(shown(texts[0]), nl=False)
        for _, new in pieces:
            click.echo(new, nl=False)
        click.echo()
    else:
        _print_texts(pieces, texts, several)


def _print_objects(
    pieces: Iterable[tuple[int, str]], prompts: Sequence[str], several: Sequence[Continuation], seed: int
) -> None:
    for _ in pieces:
        pass
    for number, (prompt, one) in enumerate(zip(prompts, several), start=1):
        facts = {"number": number, "prompt": shown(prompt), "text": one.text, "tokens": one.tokens,
                 "ending": one.ending, "seed": seed}
        click.echo(json.dumps(facts, ensure_ascii=False))


def _print_texts(pieces: Iterator[tuple[int, str]], prompts: Sequence[str], several: Sequence[Continuation]) -> None:
    """Print the first text as it comes, each of the others from when those before it are finished."""
    more = True
    for number, (prompt, one) in enumerate(zip(prompts, several), start=1):
        click.echo(f"[{number} of {len(prompts)}] {shown(prompt)}", nl=False)
        said, ended = 0, False
        while not ended:
            ended = one.finished or not more
            click.echo(one.text[said:], nl=False)
            said = len(one.text)
            more = more and (ended or next(pieces, None) is not None)
        click.echo("\n" if number < len(prompts) else "")
