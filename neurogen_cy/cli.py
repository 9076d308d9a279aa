"""The command line `neurogen`: train, eval, generate, chat, plot, tokenizer, info, diagnose, selftest."""

from __future__ import annotations

import click

from neurogen_cy import __version__
from neurogen_cy.cli_chat import chat
from neurogen_cy.cli_diagnose import diagnose
from neurogen_cy.cli_eval import evaluate
from neurogen_cy.cli_generate import generate
from neurogen_cy.cli_info import info
from neurogen_cy.cli_plot import plot
from neurogen_cy.cli_selftest import command as selftest
from neurogen_cy.cli_tokenizer import tokenizer
from neurogen_cy.cli_train import train


@click.group("neurogen", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="neurogen")
def main() -> None:
    """A brain-inspired language model: spiking cortical regions that learn to write."""


main.add_command(train)
main.add_command(evaluate)
main.add_command(generate)
main.add_command(chat)
main.add_command(plot)
main.add_command(tokenizer)
main.add_command(info)
main.add_command(diagnose)
main.add_command(selftest)
