"""`neurogen chat`: talk with a brain, line by line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from neurogen_cy.cli_common import PATH, backend_options, checkpoint_in, load_model, usage_errors
from neurogen_cy.cli_generate import any_seed, sampling_options
from neurogen_cy.conversation import Conversation
from neurogen_cy.train import BEST
from neurogen_cy.writing import shown

HELP = """\
/reset            forget everything that was said
/temperature X    lower is safer, higher is wilder
/save FILE        write the conversation: what was said, and the brain's state
/load FILE        go on with one that was saved
/help             this list
/quit             or Ctrl-D: the end; Ctrl-C ends an answer"""


@click.command()
@click.argument("path", metavar="CHECKPOINT", type=PATH)
@click.option("--tokens", type=click.IntRange(1), default=200, show_default=True, help="Most tokens of an answer.")
@click.option(
    "--stop", "stops", multiple=True, metavar="TEXT",
    help="Ends an answer, once there is one; may come again.  [default: a new line]",
)
@sampling_options
@backend_options
def chat(
    path: Path, tokens: int, stops: tuple[str, ...], seed: int | None, run_on: dict[str, Any], **sampling: Any
) -> None:
    """Talk with a brain: it hears a line, goes on writing, and keeps in its neurons what was said.

    CHECKPOINT is a checkpoint, or the folder of a run, whose best is then taken. It was trained to go on with texts,
    so it answers as its texts do. /help lists the commands.
    """
    with usage_errors():
        path = checkpoint_in(path, BEST)
        model, tokenizer = load_model(path, run_on, 1)
        seed = any_seed() if seed is None else seed
        talk = Conversation(model, tokenizer, stops or ("\n",), tokens, seed, **sampling)
        model.generate([[0]], 1, seed=seed, **sampling)  # checks them now; nothing is drawn
    click.echo(f"{path}, step {model.step}; /help lists the commands, Ctrl-D ends", err=True)
    for line in _lines():
        if line.strip() == "/quit":
            break
        with _told():
            if line.startswith("/"):
                _obey(talk, *line[1:].split(maxsplit=1))
            else:
                _answer(talk, line + "\n")
    click.echo(err=True)


class _told(suppress):
    """Says what was wrong with a line, and goes on."""

    def __init__(self) -> None:
        super().__init__(ValueError, OSError)

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        known = super().__exit__(kind, error, trace)
        if known and error is not None:
            click.echo(str(error), err=True)
        return bool(known)


def _answer(talk: Conversation, heard: str) -> None:
    try:
        for new in talk.answer(heard):
            click.echo(new, nl=False)
            sys.stdout.flush()
    except KeyboardInterrupt:  # the brain has heard itself up to here
        pass
    click.echo()


def _obey(talk: Conversation, command: str = "", argument: str = "") -> None:
    """Carry out a command; ValueError or OSError where that cannot be."""
    if command in ("save", "load", "temperature") and not argument:
        raise ValueError(f"/{command}: expected something after it, as in /help")
    if command == "reset":
        talk.reset()
        click.echo("forgotten", err=True)
    elif command == "save":
        talk.save(argument)
        click.echo(f"saved in {argument}", err=True)
    elif command == "load":
        talk.load(argument)
        click.echo("".join(shown(heard) + shown(answer) + "\n" for heard, answer in talk.said), nl=False)
    elif command == "temperature":
        value = float(argument)
        if not 0 < value < float("inf"):
            raise ValueError(f"/temperature: expected a finite number > 0, got {argument}")
        talk.sampling["temperature"] = value
    elif command == "help":
        click.echo(HELP, err=True)
    else:
        raise ValueError(f"/{command}: no such command; /help lists them")


def _lines() -> Iterator[str]:
    """Yield the lines that are typed, or piped in."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with suppress(ImportError):
        importlib.import_module("readline")  # arrow keys and history
    while True:
        try:
            yield input("> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            click.echo(err=True)
