"""Pictures of a run and of a brain at work, as matplotlib figures and as files.

    figure = plots.raster(model, "A sentence that it hears.")
    plots.save(figure, "raster.svg")

No window is ever opened, and the settings of the user's matplotlib stay as they are. Needs the extra `plot`
(`pip install 'neurogen_cy[plot]'`); importing this module does not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from neurogen_cy.plots_activity import gates, heard, histograms, raster
from neurogen_cy.plots_connectome import connectome
from neurogen_cy.plots_run import curves
from neurogen_cy.plots_style import save, styled, unavailable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurogen_cy.model import NeuroGen
    from neurogen_cy.tokenization import Tokenizer

__all__ = [
    "FOLDER", "FORMATS", "KINDS", "SENTENCE", "Pictures", "connectome", "curves", "gates", "histograms",
    "model_pictures", "raster", "run_pictures", "save", "unavailable", "write",
]  # fmt: skip

KINDS = ("curves", "connectome", "raster", "gates", "histograms")
"""The pictures there are, by the names of their functions and files."""

FORMATS = ("png", "svg")
FOLDER = "pictures"
Pictures: TypeAlias = "dict[str, Callable[[], Figure]]"
"""What draws each picture, by its name."""

SENTENCE = "The brain hears a sentence, and says at every token what it expects next."


def run_pictures(
    run: str | os.PathLike[str],
    model: NeuroGen | None = None,
    text: Any = None,
    tokenizer: Tokenizer | None = None,
    formats: Sequence[str] = FORMATS,
) -> list[Path]:
    """Draw all pictures of a run into its folder `pictures`.

    Parameters
    ----------
    run : path
        Folder of the run, with its `metrics.jsonl`.
    model : NeuroGen, optional
        Whose connectome and activity to draw; nothing of it changes. The run's best checkpoint by default, on the CPU,
        and its tokenizer.
    text, tokenizer
        What it hears, by default a sentence; see `raster`.
    formats : sequence of str
        "png", "svg" or both.

    Returns
    -------
    list of Path
        The files, in the order of `KINDS`. Without gates in the connectome there is no picture of gates.

    Raises
    ------
    ModuleNotFoundError
        If matplotlib is not installed; the message has the pip command. `unavailable()` says so beforehand.
    ValueError, OSError
        If the metrics cannot be read, the text is not one for this model, or a file cannot be written.
    """
    with styled():  # asks for matplotlib before anything is computed
        run = Path(run)
    if model is None:
        from neurogen_cy.model import NeuroGen
        from neurogen_cy.tokenization import load_saved
        from neurogen_cy.train import BEST

        model = NeuroGen.load(run / BEST, backend="cpu", streams=1)
        tokenizer = load_saved(run / BEST)
    pictures = {"curves": lambda: curves(run), **model_pictures(model, text, tokenizer)}
    return write(pictures, run / FOLDER, formats)


def model_pictures(model: NeuroGen, text: Any = None, tokenizer: Tokenizer | None = None) -> Pictures:
    """Return what draws the pictures of a model that hears a text (once for all of them), by their names.

    Parameters
    ----------
    model, text, tokenizer
        As for `run_pictures`.
    """
    config = model.config
    record = heard(model, SENTENCE if text is None else text, tokenizer)
    out: Pictures = {
        "connectome": lambda: connectome(config),
        "raster": lambda: raster(model, record, tokenizer),
    }
    if record.gates:
        out["gates"] = lambda: gates(model, record, tokenizer)
    out["histograms"] = lambda: histograms(model, record)
    return out


def write(pictures: Pictures, folder: Path, formats: Iterable[str]) -> list[Path]:
    """Draw pictures and write each in every format; return the files in order."""
    for kind in formats:
        if kind not in FORMATS:
            raise ValueError(f"formats: expected {' or '.join(FORMATS)}, got {kind!r}")
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, draw in pictures.items():
        figure = draw()
        figure.set_layout_engine("none")  # it is laid out, once for all formats
        for kind in formats:
            files.append(folder / f"{name}.{kind}")
            save(figure, files[-1])
    return files
