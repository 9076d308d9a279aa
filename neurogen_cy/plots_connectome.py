"""The connectome as a picture: regions on a line in order of level, projections as arcs between them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from neurogen_cy import plots_style as style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from neurogen_cy.config import Config, Projection

WIDTH, HEIGHT = 0.74, 0.5  # of a region's box; its neighbours are 1 apart
FLAT = 0.62  # height of an arc over half its width


@dataclass(frozen=True)
class Kind:
    """How projections of a kind are drawn: above or below the line, and where on a box they leave and arrive."""

    name: str
    colour: str
    dashes: Literal["-", "--"]
    side: int
    leaves: float
    arrives: float


DRIVE = Kind("drive, same token", style.BLUE, "-", 1, 0.2, -0.1)
GATE = Kind("gate, same token", style.VERMILION, "--", 1, 0.32, -0.28)
DELAYED = Kind("drive of earlier tokens (number: delay in tokens)", style.GREEN, "-", -1, 0.365, -0.365)


@style.picture
def connectome(config: Config) -> Figure:
    """Draw a connectome: a box for each region, its level, and an arc for each projection with its kind and delay.

    Parameters
    ----------
    config : Config

    Returns
    -------
    matplotlib.figure.Figure
        Arcs over the line carry this token's spikes, drives and gates; those under it bring earlier tokens' back.
        The thicker a line, the more synapses it stands for.
    """
    nodes = ["embedding", *(r.name for r in sorted(config.regions, key=lambda region: region.level)), "broca_out"]
    place = {name: float(i) for i, name in enumerate(nodes)}
    most = max(_synapses(config, p) for p in config.projections)
    figure = style.new_figure(1.0 + 1.45 * len(nodes), 6)
    axes = figure.add_subplot()
    tops = [0.6]
    bottoms = [-1.0]
    alike = Counter[tuple[str, str]]()  # delayed ones between the same two, a step further out each
    for p in sorted(config.projections, key=lambda p: (-abs(place[p.dst] - place[p.src]), p.delay)):
        kind = _kind(p)
        width = 0.7 + 2.3 * float(np.sqrt(_synapses(config, p) / most))
        reach = _arc(axes, place[p.src], place[p.dst], kind, width, p.delay, 0.3 * alike[p.src, p.dst])
        alike[p.src, p.dst] += p.delay > 0
        (tops if kind.side > 0 else bottoms).append(reach)
    for name, x in place.items():
        _box(axes, config, name, x)
    axes.set_xlim(-0.6, len(nodes) - 0.4)
    axes.set_ylim(min(bottoms) - 0.45, max(tops) + 0.25)
    figure.set_figheight(1.2 + 1.35 * (axes.get_ylim()[1] - axes.get_ylim()[0]))
    axes.set_axis_off()
    _legend(axes, config)
    total = sum(region.neurons for region in config.regions)
    axes.set_title(
        f"{len(config.regions)} regions, {total:,} neurons, {sum(_synapses(config, p) for p in config.projections):,} "
        f"synapses (the thicker a line, the more), {config.weights:,} weights with the vocabulary's"
    )
    return figure


def _kind(p: Projection) -> Kind:
    return DELAYED if p.delay else GATE if p.kind == "gate" else DRIVE


def _synapses(config: Config, p: Projection) -> int:
    return config.width(p.dst) * 32 * config.blocks_per_row(p)


def _arc(axes: Axes, src: float, dst: float, kind: Kind, width: float, delay: int, further: float) -> float:
    """Draw an arc with its arrow; return how far from the line it reaches."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path

    edge = kind.side * HEIGHT / 2
    if src == dst:
        start, end, reach = src - 0.13, dst + 0.13, edge + kind.side * (0.42 + further)
        spread = 0.12
    else:
        ahead = 1 if dst > src else -1
        start, end = src + ahead * kind.leaves * WIDTH, dst + ahead * kind.arrives * WIDTH
        reach = edge + kind.side * (FLAT * abs(end - start) ** 0.8 + further)
        spread = 0.0
    # A cubic curve whose ends stand upright reaches 3/4 of the way to its control points.
    control = edge + (reach - edge) / 0.75
    path = Path(
        [(start, edge), (start - spread, control), (end + spread, control), (end, edge)],
        [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4],
    )
    axes.add_patch(
        FancyArrowPatch(
            path=path, arrowstyle="-|>", mutation_scale=7 + width, color=kind.colour, linestyle=kind.dashes,
            linewidth=width, alpha=0.85, shrinkA=0, shrinkB=0, gid=kind.name, zorder=1,
        )
    )  # fmt: skip
    if delay:
        axes.text(
            (start + end) / 2, reach, str(delay), ha="center", va="center", size=8, color=kind.colour, weight="bold",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )  # fmt: skip
    return reach


def _box(axes: Axes, config: Config, name: str, x: float) -> None:
    from matplotlib.patches import FancyBboxPatch

    outside = name in ("embedding", "broca_out")
    axes.add_patch(
        FancyBboxPatch(
            (x - WIDTH / 2, -HEIGHT / 2), WIDTH, HEIGHT, boxstyle="round,pad=0.0,rounding_size=0.08",
            facecolor="#f4f4f4" if outside else "white", edgecolor=style.GREY if outside else style.BLACK, zorder=2,
            gid=name,
        )
    )  # fmt: skip
    about = f"{config.dim:,} wide" if outside else f"{config.region(name).neurons:,} neurons"
    level = "" if outside else f"\nlevel {config.region(name).level}"
    axes.text(x, 0, name, ha="center", va="bottom", weight="bold", size=min(8.0, 108 / len(name)), zorder=3)
    axes.text(x, -0.02, about + level, ha="center", va="top", size=7, zorder=3, color=style.GREY)


def _legend(axes: Axes, config: Config) -> None:
    from matplotlib.lines import Line2D

    kinds = {_kind(p) for p in config.projections}
    handles: list[Any] = [
        Line2D([], [], color=kind.colour, linestyle=kind.dashes, linewidth=1.6, label=kind.name)
        for kind in (DRIVE, GATE, DELAYED)
        if kind in kinds
    ]
    axes.legend(handles=handles, loc="upper left", handlelength=3)
