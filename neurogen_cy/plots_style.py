"""How the pictures look, and how they are made: no window, no pyplot, and the user's matplotlib settings untouched.

matplotlib is imported where a picture is drawn, so that the package works without it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ParamSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Drawing = ParamSpec("Drawing")

# Okabe and Ito (2008): told apart with every kind of colour vision; their yellow is too pale for a line.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000",
)  # fmt: skip
GREY, PALE = "#6b6b6b", "#d9d9d9"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK)
DASHES = ("-", "--", ":", "-.")  # a line is told by its dashes too

STYLE = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "lines.linewidth": 1.4,
    "savefig.dpi": 150,
    "figure.dpi": 150,
    "figure.facecolor": "white",
    "svg.hashsalt": "neurogen",  # the same picture, the same file
}


def unavailable() -> str | None:
    """Say what to install where there is no matplotlib; None where pictures can be drawn."""
    if find_spec("matplotlib") is None:
        return "pictures need matplotlib: pip install 'neurogen_cy[plot]'"
    return None


@contextmanager
def styled() -> Iterator[None]:
    """Draw in the style of this package; the user's settings are back afterwards.

    Raises
    ------
    ModuleNotFoundError
        If matplotlib is not installed; the message has the pip command.
    """
    reason = unavailable()
    if reason is not None:
        raise ModuleNotFoundError(reason, name="matplotlib")
    import matplotlib.style

    with matplotlib.style.context(["default", STYLE]):
        yield


def picture(draw: Callable[Drawing, Figure]) -> Callable[Drawing, Figure]:
    """Make a function draw its figure in the style of this package, laid out to the end."""

    @functools.wraps(draw)
    def drawn(*args: Drawing.args, **kwargs: Drawing.kwargs) -> Figure:
        with styled():
            figure = draw(*args, **kwargs)
            figure.draw_without_rendering()  # ticks are made here: under this style
        return figure

    return drawn


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of that size in inches, outside of pyplot."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def line_style(number: int) -> dict[str, Any]:
    """Return colour and dashes of the line `number`, no two alike among the first 28."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "linestyle": DASHES[(number % len(COLOURS) + number // len(COLOURS)) % len(DASHES)],
    }


def thousands(axis: Any) -> None:
    """Write the ticks of an axis as 1,200,000."""
    axis.set_major_formatter(lambda value, _: f"{value:,.10g}")


@functools.cache
def _glyphs() -> frozenset[int]:
    """Code points that the font of token labels can show."""
    from matplotlib.font_manager import findfont
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(findfont("DejaVu Sans Mono")).get_charmap())


def token_label(token: bytes) -> str:
    """Return what an axis says of a token: signs for blanks, escapes for what the font lacks, hex for single bytes."""
    shown = {" ": "\u2423", "\n": "\u21b5", "\t": "\u2192"}
    try:
        text = token.decode("utf-8")
    except UnicodeDecodeError:
        return token.hex()
    return "".join(
        shown.get(c) or (c if c.isprintable() and ord(c) in _glyphs() else c.encode("unicode_escape").decode())
        for c in text
    )


def token_axis(panels: Sequence[Axes], labels: Sequence[str], tokens: int, inches: float) -> None:
    """Put the tokens under panels whose unit is the token, their places in the text where they would not fit.

    Parameters
    ----------
    panels : sequence of Axes
        From top to bottom; only the last one gets ticks, which cost more time than all the rest.
    labels : sequence of str
        One for each token that is drawn.
    tokens : int
        Tokens of the whole text.
    inches : float
        Width of the figure.
    """
    from matplotlib.ticker import NullLocator

    count = len(labels)
    for axes in panels:
        axes.set_xlim(-0.5, count - 0.5)
        if axes is not panels[-1]:
            axes.set_xticks([])
    axes.xaxis.set_minor_locator(NullLocator())
    widest = max(map(len, labels))
    if count * 0.1 <= inches:
        axes.set_xticks(range(count), labels)
        upright = widest > 1 and widest * count * 0.1 > inches
        for label in axes.get_xticklabels():
            label.set(parse_math=False, family="monospace", size=8, rotation=90 if upright else 0)
    what = "token" if count * 0.1 <= inches else "position in the text (tokens)"
    axes.set_xlabel(what if count == tokens else f"{what}, the first {count:,} of {tokens:,}")


def save(figure: Figure, path: Any) -> None:
    """Write a figure as a file of the kind that its name says: .png or .svg (or another that matplotlib knows).

    Parameters
    ----------
    figure : matplotlib.figure.Figure
    path : path
        The same figure gives the same bytes.

    Raises
    ------
    ValueError
        If matplotlib knows no such kind.
    OSError
        If the file cannot be written.
    """
    kind = str(path).rpartition(".")[2].lower()
    with styled():
        figure.savefig(path, metadata={"Date": None} if kind == "svg" else None)
