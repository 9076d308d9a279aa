"""Training curves: what a run left in `metrics.jsonl`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from neurogen_cy import plots_style as style
from neurogen_cy.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Float64 = NDArray[np.float64]
STEP_KEYS = ("bits_per_byte", "loss", "lr", "grad_norm", "tokens_per_s")
VALIDATION_KEYS = ("validation_bits_per_byte", "validation_loss")


@dataclass(frozen=True)
class Curves:
    """What a `metrics.jsonl` says, as arrays; a value that a record does not have is NaN.

    Attributes
    ----------
    steps, evaluations : float64 arrays
        The numbers of the steps that were recorded, and of those after which there was an evaluation.
    values : dict of str to float64 array
        By key, as long as `steps`; keys starting with `validation_` are as long as `evaluations`.
    rates : dict of str to float64 array
        Firing rate by region, as long as `steps`.
    """

    steps: Float64
    evaluations: Float64
    values: dict[str, Float64]
    rates: dict[str, Float64]


def read_curves(path: str | os.PathLike[str]) -> Curves:
    """Read a `metrics.jsonl` for plotting.

    Raises
    ------
    ValueError
        If there is no step in it, or a line is not what a run writes; the message says which line.
    FileNotFoundError
        If there is no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the metrics of a run, got no such file")
    try:
        records = read_metrics(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got {error}") from error
    except RecursionError as error:
        raise ValueError(f"{path}: expected records without nesting, got lists or objects too deep") from error
    steps = [(line, record) for line, record in enumerate(records, 1) if record.get("event") == "step"]
    evaluations = [(line, record) for line, record in enumerate(records, 1) if record.get("event") == "evaluation"]
    if not steps:
        raise ValueError(f"{path}: expected at least one training step, got {len(records)} records without one")
    values = {key: _column(path, steps, key) for key in STEP_KEYS}
    values |= {key: _column(path, evaluations, key) for key in VALIDATION_KEYS}
    names = list(dict.fromkeys(name for line, record in steps for name in _rates(path, line, record)))
    rates = {
        name: np.array([_number(path, line, f"rates.{name}", _rates(path, line, r).get(name)) for line, r in steps])
        for name in names
    }
    return Curves(_ascending(path, steps), _ascending(path, evaluations), values, rates)


def _ascending(path: Path, records: list[tuple[int, dict[str, Any]]]) -> Float64:
    before = -1
    for line, record in records:
        step = record["step"]
        if isinstance(step, bool) or not before < step < 2**53:
            raise ValueError(f"{path}: line {line}: expected steps in ascending order, got {step!r:.40} after {before}")
        before = step
    return np.array([record["step"] for _, record in records], np.float64)


def _column(path: Path, records: list[tuple[int, dict[str, Any]]], key: str) -> Float64:
    return np.array([_number(path, line, key, record.get(key)) for line, record in records], np.float64)


def _rates(path: Path, line: int, record: dict[str, Any]) -> dict[str, Any]:
    rates = record.get("rates")
    if rates is None:
        return {}
    if not isinstance(rates, dict):
        raise ValueError(f"{path}: line {line}: rates: expected a rate for each region, got {rates!r:.80}")
    return rates


def _number(path: Path, line: int, key: str, value: Any) -> float:
    """The value as a float, NaN where the record has none."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= 1e300:
        raise ValueError(f"{path}: line {line}: {key}: expected a finite number, got {value!r:.80}")
    return float(value)


def smoothed(values: Float64, width: int) -> Float64:
    """The mean of the `width` values around every place (of fewer at the ends), NaN left out."""
    known = np.isfinite(values)
    sums = np.cumsum(np.concatenate([[0.0], np.where(known, values, 0.0)]))
    counts = np.cumsum(np.concatenate([[0], known]))
    first = np.maximum(0, np.arange(len(values)) - (width - 1) // 2)
    last = np.minimum(len(values), np.arange(len(values)) + width // 2 + 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray((sums[last] - sums[first]) / (counts[last] - counts[first]), np.float64)


@style.picture
def curves(run: str | os.PathLike[str]) -> Figure:
    """Draw the training curves of a run: loss and validation, rate, gradient norm, firing rates, tokens a second.

    Parameters
    ----------
    run : path
        Folder of a run, or its `metrics.jsonl`.

    Returns
    -------
    matplotlib.figure.Figure
        A panel for each of what the run recorded.

    Raises
    ------
    FileNotFoundError
        If there is no `metrics.jsonl`.
    ValueError
        If it holds no step, or a line is not what a run writes.
    """
    path = Path(run)
    path = path / "metrics.jsonl" if path.is_dir() else path
    data = read_curves(path)
    values = data.values
    bits = np.isfinite(values["bits_per_byte"]).any()
    panels: list[Callable[[Axes], None]] = [lambda axes: _losses(axes, data, "bits_per_byte" if bits else "loss")]
    if np.isfinite(values["lr"]).any():
        panels.append(lambda axes: _line(axes, data, "lr", "learning rate", "step size"))
    if np.isfinite(values["grad_norm"]).any():
        panels.append(lambda axes: _line(axes, data, "grad_norm", "gradient norm before clipping", "L2 norm", log=True))
    if np.isfinite(values["tokens_per_s"]).any():
        panels.append(lambda axes: _line(axes, data, "tokens_per_s", "speed", "tokens per second"))
    if data.rates:
        panels.append(lambda axes: _firing(axes, data))
    rows = 1 + len(panels) // 2
    figure = style.new_figure(10, 1 + 2.4 * rows)
    grid = figure.add_gridspec(rows, 2, height_ratios=[1.5] + [1] * (rows - 1))
    places = [grid[0, :]] + [grid[i // 2, i % 2] for i in range(2, 2 * rows)]
    for draw, place in zip(panels, places):
        axes = figure.add_subplot(place)
        draw(axes)
        axes.set_xlim(0, max(data.steps[-1], data.evaluations[-1] if len(data.evaluations) else 0))
        axes.set_xlabel("optimizer step")
        style.thousands(axes.xaxis)
    figure.suptitle(f"Training of {path.parent.resolve().name}", x=0.01, ha="left", weight="bold", parse_math=False)
    return figure


def _width(data: Curves) -> int:
    return max(1, len(data.steps) // 50)


def _losses(axes: Axes, data: Curves, key: str) -> None:
    held_out = data.values[f"validation_{key}"]
    unit = "bits per byte" if key == "bits_per_byte" else "nats per token"
    spread = float(np.nanmax(data.values[key]) / max(np.nanmin(data.values[key]), 1e-30))
    _line(axes, data, key, "cross-entropy", unit, log=spread > 3)
    if np.isfinite(held_out).any():
        best = int(np.nanargmin(held_out))
        label = f"validation, best {held_out[best]:.3f} at step {data.evaluations[best]:,.0f}"
        axes.plot(data.evaluations, held_out, "o-", color=style.VERMILION, ms=3.5, label=label, clip_on=False, zorder=3)
    axes.legend(loc="upper right")


def _line(axes: Axes, data: Curves, key: str, title: str, unit: str, log: bool = False) -> None:
    """Every step in pale, the mean of neighbours over it."""
    values, width = data.values[key], _width(data)
    if width > 1 and key != "lr":
        pale: dict[str, Any] = {"color": style.SKY, "linewidth": 0.6, "alpha": 0.6, "rasterized": len(values) > 3000}
        axes.plot(data.steps, values, label="training, each step", **pale)
        axes.plot(data.steps, smoothed(values, width), color=style.BLUE, label=f"training, mean of {width} steps")
    else:
        axes.plot(data.steps, values, color=style.BLUE, label="training, each step")
    axes.set_title(title)
    axes.set_ylabel(unit)
    if log and np.nanmin(values) > 0:
        axes.set_yscale("log")
        wide = np.nanmax(values) > 30 * np.nanmin(values)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: "" if wide else f"{value:g}")
        axes.grid(visible=True, axis="y", which="major" if wide else "both")
    elif key == "tokens_per_s":
        axes.set_ylim(bottom=0)
        style.thousands(axes.yaxis)


def _firing(axes: Axes, data: Curves) -> None:
    for number, (name, rates) in enumerate(data.rates.items()):
        line = style.line_style(number)
        axes.plot(data.steps, smoothed(rates, _width(data)), label=name, **line)
    axes.set_title("firing rate by region")
    axes.set_ylabel("spikes per token")
    axes.set_ylim(0, 1.1 * axes.get_ylim()[1] * (1 + 0.11 * (2 + (len(data.rates) - 1) // 3)))
    axes.legend(loc="upper right", ncols=3, handlelength=2.6)
