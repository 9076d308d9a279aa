"""`neurogen selftest`: is this installation right, on this machine?"""

from __future__ import annotations

import json
import sys
import textwrap
from typing import Any

import click

from neurogen_cy import selftest
from neurogen_cy.cli_common import backend_options, usage_errors


@click.command("selftest")
@click.option("--seconds", type=click.FloatRange(0.1), default=20.0, show_default=True, help="To measure speed.")
@click.option("--json", "as_json", is_flag=True, help="Print the record instead of a table.")
@backend_options
def command(seconds: float, as_json: bool, run_on: dict[str, Any]) -> None:
    """Check gradients, bits, checkpoints, learning and speed on this machine.

    Gradients are compared with a slow float64 model in NumPy, runs with the same runs again, and the GPU with the CPU
    where there is one. Takes less than two minutes. Exit status 0: all is well; 1: it is not.
    """
    with usage_errors(RuntimeError, MemoryError):
        record = selftest.run(run_on, seconds, None if as_json else _show)
    if as_json:
        click.echo(json.dumps(record, indent=1))
    else:
        click.echo(f"\nneurogen_cy {record['neurogen_cy']}, Python {record['python']}, NumPy {record['numpy']}, "
                   f"{record['machine']}")
        click.echo(f"backend {record['backend']}: {record['device']}")
        bad = [check["name"] for check in record["checks"] if check["passed"] is False]
        click.echo(f"verdict: NOT RIGHT here: {', '.join(bad)}" if bad else "verdict: all is well")
    sys.exit(0 if record["passed"] else 1)


def _show(check: selftest.Check) -> None:
    mark = {True: "ok", False: "FAILED", None: "skipped"}[check.passed]
    lines = textwrap.wrap(check.detail, 88, subsequent_indent=" " * 33) or [""]
    click.echo(f"{mark:8}{check.name:25}" + "\n".join(lines) + f"  [{check.seconds:.1f} s]")
