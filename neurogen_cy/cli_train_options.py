"""The options of `neurogen train`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import click

from neurogen_cy.cli_common import PATH, STREAMS, TOKENS
from neurogen_cy.optimizer import AdamW
from neurogen_cy.presets import SIZES
from neurogen_cy.train_settings import TrainSettings

SEED = 0
WEIGHT_DECAY = 0.5  # holds back the growth of recurrent loops, and generalises better (preset tiny: 0.15 bits)

COUNT = click.IntRange(1)
POSITIVE = click.FloatRange(0, min_open=True)


def _groups(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int | None] | None:
    """"2" -> (2, None), "2x32" -> (2, 32): groups of streams, and how many streams each has."""
    match = re.fullmatch(r"([1-9]\d{0,8})(?:x([1-9]\d{0,8}))?", value or "1")
    if match is None:
        raise click.BadParameter(f"expected N or NxB as in 2x32, whole numbers >= 1, got {value!r}")
    return None if value is None else (int(match[1]), int(match[2]) if match[2] else None)


def _option(name: str, kind: Any, text: str, default: Any = None, metavar: str | None = None) -> Any:
    """An option whose absence can be told from its default, as resuming has to."""
    return click.option(
        f"--{name}", type=kind, metavar=metavar, help=text if default is None else f"{text}  [default: {default}]"
    )


_OPTIONS = (
    _option("data", str, "Text to learn: a file or a folder, .jsonl and .zst too, or hf:NAME.",
            "the topics of Python's help", "FILE_OR_DIR"),
    _option("validation", str, "Text to validate on.", "the last 10 % of the text to learn", "FILE_OR_DIR"),
    _option("field", str, "What the text is called in the objects of a .jsonl.", "text", "NAME"),
    _option("tokenizer", str, "A tokenizer's JSON file or SentencePiece model, or bytes.", "bytes", "FILE"),
    _option("config", PATH, "Connectome of your own, instead of a preset.", metavar="FILE.toml"),
    _option("preset", click.Choice(list(SIZES)), "Size of the default connectome.", "tiny"),
    _option("steps", COUNT, "Optimizer steps in all.", TrainSettings.steps),
    _option("max-tokens", COUNT, "Tokens to read in all: as many steps as they are enough for, at most --steps."),
    _option("max-minutes", POSITIVE, "Stop, saved, after so long; counted from the start of this command."),
    _option("streams", COUNT, "Streams read side by side.", STREAMS),
    click.option("--accumulate", callback=_groups, metavar="N|NxB", help="Groups of streams that take turns: a step of "
                 "N x streams in the memory of one group.  [default: 1]"),
    _option("tokens", COUNT, "Tokens of each stream in a step.", TOKENS),
    _option("lr", float, "Highest learning rate.", TrainSettings.lr),
    _option("warmup", click.IntRange(0), "Steps in which the rate rises.",
            f"{TrainSettings.warmup}, at most a tenth of all", "STEPS"),
    _option("dropout", float, "Share of spikes that are not heard in training.", "0, or as the config says"),
    _option("weight-decay", float, "How fast weights shrink.", WEIGHT_DECAY),
    _option("clip", float, "Largest norm of a gradient; 0: any.", AdamW.clip),
    _option("seed", click.IntRange(0, 2**64 - 1), "Seed of all that is random.", SEED),
    _option("nonfinite", click.Choice(["raise", "skip"]), "What a step that is not finite does: ends the run, or is "
            "left out and counted.", "raise"),
    _option("evaluate-every", COUNT, "Steps between evaluations.",
            f"{TrainSettings.evaluate_every}, at most a tenth of all", "STEPS"),
    _option("patience", COUNT, "Stop after so many evaluations in a row without a new best.", metavar="EVALUATIONS"),
    _option("sample-every", COUNT, "Steps between samples of what it writes.", metavar="STEPS"),
    _option("save-every", COUNT, "Steps between checkpoints.", TrainSettings.save_every, "STEPS"),
    _option("save-minutes", POSITIVE, "Minutes between checkpoints, besides.", metavar="MINUTES"),
    _option("keep", click.IntRange(0), "Checkpoints of earlier steps that stay, beside last and best.",
            TrainSettings.keep, "N"),
    click.option("--tensorboard", is_flag=True, help="Write the metrics for TensorBoard too, in OUT/tensorboard."),
    click.option("--pictures/--no-pictures", default=True, help="Draw the run at its end, in OUT/pictures."),
    _option("out", PATH, "Folder of the run.", "runs/NAME of preset or config", "DIR"),
    _option("resume", str, "Continue from a checkpoint; auto: from OUT/last if it is there, else begin.",
            metavar="auto|DIR"),
)  # fmt: skip


def train_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add all options of `neurogen train` but where it computes."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def groups_of(
    accumulate: tuple[int, int | None] | None, streams: int | None, total: int | None = None
) -> tuple[int, int]:
    """Return how many groups of how many streams the options ask for.

    Parameters
    ----------
    accumulate : groups and their streams, None where they are not said
    streams : int or None
    total : int or None
        Streams of a run that goes on: they may be grouped anew.

    Raises
    ------
    ValueError
        If they contradict each other, or the run.
    """
    groups, width = accumulate or (None, None)
    if width is not None and streams not in (None, width):
        raise ValueError(f"expected --streams {width} or none, as --accumulate {groups}x{width} says it, got {streams}")
    width = width or streams
    if total is None:
        return groups or 1, width or STREAMS
    groups = groups or (max(1, total // width) if width else 1)
    width = width or total // groups
    if groups * width != total:
        raise ValueError(f"expected {total} streams in all, as the run has, got {groups} x {width}")
    return groups, width
