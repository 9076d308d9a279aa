"""The command line, run in a folder, with its exit status checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from neurogen_cy.cli import main

Run = Callable[..., Result]


def runner_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return what runs `neurogen ARGUMENTS...` there and expects `status`."""
    monkeypatch.chdir(folder)

    def invoke(*arguments: object, status: int = 0) -> Result:
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code == status, result.output
        return result

    return invoke
