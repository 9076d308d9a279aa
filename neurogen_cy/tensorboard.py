"""The metrics of a run for TensorBoard, by the writer of the tensorboardX package (no torch, no TensorFlow)."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neurogen_cy.callbacks import Callback, Record

if TYPE_CHECKING:
    from neurogen_cy.train import Trainer

_NOT_SHOWN = ("event", "step")


class TensorBoard(Callback):
    """Writes every number of the records as a scalar and samples as text, by the step.

    Parameters
    ----------
    folder : path, optional
        Where the event files go; `tensorboard` in the folder of the run by default.

    Raises
    ------
    ModuleNotFoundError
        If tensorboardX is not installed.
    """

    def __init__(self, folder: Path | None = None) -> None:
        try:
            self._writer_of: Any = importlib.import_module("tensorboardX").SummaryWriter
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "TensorBoard needs the package tensorboardX: pip install 'neurogen_cy[tensorboard]'", name=error.name
            ) from error
        self._folder = folder
        self._writer: Any = None

    def on_begin(self, trainer: Trainer) -> None:
        """Open a new event file; what an earlier one has of later steps is marked as void."""
        folder = self._folder or trainer.out / "tensorboard"
        step = trainer.model.step  # in the name: files are told apart by the second alone, and a resume can be quicker
        self._writer = self._writer_of(str(folder), purge_step=step + 1, filename_suffix=f".{step}")

    def on_step(self, trainer: Trainer, record: Record) -> None:
        """Write the numbers."""
        for name, value in _numbers(record):
            self._writer.add_scalar(name, value, record["step"])

    on_skip = on_evaluation = on_step

    def on_sample(self, trainer: Trainer, record: Record) -> None:
        """Write the text, as it is rather than as Markdown."""
        text = (record["prompt"] + "|" + record["text"]).replace("\n", "\n    ")
        self._writer.add_text("sample", "    " + text, record["step"])

    def on_save(self, trainer: Trainer, path: Path) -> None:
        """Have everything in the file by now."""
        self._writer.flush()

    def on_end(self, trainer: Trainer) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _numbers(record: Record) -> Iterator[tuple[str, float]]:
    """Names, grouped as TensorBoard shows them, and values."""
    group = {"step": "training", "skip": "training"}.get(record["event"], "validation")
    for key, value in record.items():
        if isinstance(value, dict):
            yield from ((f"{key}/{name}", number) for name, number in value.items())
        elif key not in _NOT_SHOWN and not isinstance(value, str):
            yield f"{group}/{key.removeprefix('validation_')}", float(value)
