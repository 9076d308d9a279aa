"""Pictures of a brain that hears a text: spike raster, gates, histograms of firing rates and membrane potentials."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from neurogen_cy import plots_style as style
from neurogen_cy.recorder import Recording
from neurogen_cy.tokenization import ByteTokenizer, Tokenizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from neurogen_cy.config import Config
    from neurogen_cy.model import NeuroGen

SHOWN = 128  # neurons of a region in a raster, at most: more would be finer than a pixel
SPAN = 400  # tokens of a raster or of gates, at most
BINS = 40


def heard(model: NeuroGen, text: Any, tokenizer: Tokenizer | None = None) -> Recording:
    """Return the record of a text.

    Parameters
    ----------
    model : NeuroGen
    text : str, bytes, int array [S, L] or [L], or Recording
        A Recording comes back as it is. Without a tokenizer, str (as UTF-8) and bytes are for models of bytes.
    tokenizer : Tokenizer, optional
        Whose ids the model was trained on.
    """
    if isinstance(text, Recording):
        return text
    if isinstance(text, (str, bytes)):
        if not text:
            raise ValueError("text: expected at least one character, got an empty text")
        tokenizer = tokenizer or ByteTokenizer()
        if tokenizer.vocab_size != model.config.vocab_size:
            raise ValueError(
                f"text: expected token ids or a tokenizer of {model.config.vocab_size} tokens, got a text for one of "
                f"{tokenizer.vocab_size}"
            )
        text = tokenizer.encode(text)
    return model.record(np.asarray(text) if isinstance(text, (list, tuple)) else text)


def _labels(model: NeuroGen, ids: NDArray[Any], tokenizer: Tokenizer | None) -> list[str]:
    if tokenizer is None and model.config.vocab_size == ByteTokenizer.vocab_size:
        tokenizer = ByteTokenizer()
    return [str(i) if tokenizer is None else style.token_label(tokenizer.decode_bytes([i])) for i in ids.tolist()]


def _upwards(config: Config) -> list[Any]:
    """Regions from the highest level down: the input is at the bottom of the picture."""
    return sorted(config.regions, key=lambda region: -region.level)


def _width(tokens: int) -> float:
    return float(np.clip(2.4 + 0.13 * tokens, 7.0, 16.0))


@style.picture
def raster(model: NeuroGen, text: Any, tokenizer: Tokenizer | None = None) -> Figure:
    """Draw which neurons spike at which token, region by region, the input at the bottom.

    Parameters
    ----------
    model : NeuroGen
        Hears the text from zero state; its own state is not touched.
    text : str, bytes, int array [S, L] or [L], or Recording
        Of several streams the first is drawn, of a long text the first 400 tokens.
    tokenizer : Tokenizer, optional
        Of models whose tokens are not bytes: takes the text apart, and says what stands under each token.

    Returns
    -------
    matplotlib.figure.Figure
        A panel for each region, rows are neurons (at most 128, evenly chosen), the colour is a spike's amplitude.

    Raises
    ------
    ValueError
        If the text is empty, or is not one for this model.
    """
    record = heard(model, text, tokenizer)
    names = _labels(model, record.ids[0, :SPAN], tokenizer)
    regions = _upwards(model.config)
    shown = [np.unique(np.linspace(0, r.neurons - 1, min(r.neurons, SHOWN)).round().astype(int)) for r in regions]
    heights = [0.35 + len(rows) / SHOWN for rows in shown]
    figure = style.new_figure(_width(len(names)), 1.1 + 1.15 * sum(heights))
    panels = figure.subplots(len(regions), 1, squeeze=False, height_ratios=heights)[:, 0].tolist()
    top = max(2.0, *(float(values[0].max()) for values in record.s.values()))
    for axes, region, rows in zip(panels, regions, shown):
        spikes = record.s[region.name][0, :SPAN]
        image = _spikes(axes, spikes[:, rows].T, model.config.graded, top)
        some = f"{len(rows)} of {region.neurons:,}" if len(rows) < region.neurons else f"{region.neurons:,}"
        axes.set_title(f"{region.name}: {some} neurons, {(spikes > 0).mean():.3f} spikes per neuron and token")
        axes.set_ylabel("neuron")
        axes.set_yticks([])
        axes.grid(visible=False)
    style.token_axis(panels, names, record.ids.shape[1], _width(len(names)))
    if model.config.graded:
        figure.colorbar(image, ax=panels, label="spike amplitude (thresholds)", aspect=40, shrink=0.6, pad=0.01)
    return figure


def _spikes(axes: Axes, spikes: NDArray[Any], graded: bool, top: float) -> Any:
    """Silence is white; the weakest spike, 1 threshold, is well visible."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    shades = ListedColormap(colormaps["Blues"](np.linspace(0.45, 1.0, 256)) if graded else [style.BLUE])
    extent = (-0.5, spikes.shape[1] - 0.5, spikes.shape[0] - 0.5, -0.5)
    return axes.imshow(
        np.ma.masked_equal(spikes, 0.0), cmap=shades, vmin=1.0, vmax=top, aspect="auto", interpolation="nearest",
        extent=extent,
    )  # fmt: skip


@style.picture
def gates(model: NeuroGen, text: Any, tokenizer: Tokenizer | None = None) -> Figure:
    """Draw what the gates of each gated region do over a text: 0 shuts the drive off, 1 lets it through, 2 doubles it.

    Parameters
    ----------
    model, text, tokenizer
        As for `raster`.

    Returns
    -------
    matplotlib.figure.Figure
        A panel for each gated region: the mean over its neurons, the middle half and the middle nine tenths of them.

    Raises
    ------
    ValueError
        If no region has a gate, the text is empty, or is not one for this model.
    """
    record = heard(model, text, tokenizer)
    names = _labels(model, record.ids[0, :SPAN], tokenizer)
    regions = [region for region in _upwards(model.config) if region.name in record.gates]
    if not regions:
        raise ValueError("expected a connectome with gates, got one without projections of kind 'gate'")
    figure = style.new_figure(_width(len(names)), 1.0 + 1.5 * len(regions))
    panels = figure.subplots(len(regions), 1, squeeze=False)[:, 0].tolist()
    tokens = np.arange(len(names))
    for axes, region in zip(panels, regions):
        values = record.gates[region.name][0, :SPAN]
        low, lower, upper, high = np.quantile(values, [0.05, 0.25, 0.75, 0.95], axis=1)
        axes.fill_between(tokens, low, high, color=style.SKY, alpha=0.3, linewidth=0, label="middle 90 % of neurons")
        axes.fill_between(tokens, lower, upper, color=style.SKY, alpha=0.7, linewidth=0, label="middle half")
        axes.plot(tokens, values.mean(axis=1), ".-", color=style.BLUE, markersize=4, label="mean")
        axes.axhline(1.0, color=style.BLACK, linewidth=0.7, linestyle="--", label="drive unchanged: 1")
        axes.set_title(f"{region.name}, gated by {', '.join(_gating(model.config, region.name))}")
        axes.set_ylabel("gate G (factor)")
        axes.set_ylim(0, 2)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=4)
    style.token_axis(panels, names, record.ids.shape[1], _width(len(names)))
    return figure


def _gating(config: Config, name: str) -> list[str]:
    return [p.src for p in config.projections if p.kind == "gate" and p.dst == name]


@style.picture
def histograms(model: NeuroGen, text: Any, tokenizer: Tokenizer | None = None) -> Figure:
    """Draw how firing rates and membrane potentials are spread in each region while a text is heard.

    Parameters
    ----------
    model, text, tokenizer
        As for `raster`; all streams count.

    Returns
    -------
    matplotlib.figure.Figure
        A row of two panels for each region. Potentials beyond it are counted in the outermost bars.

    Raises
    ------
    ValueError
        If the text is empty, or is not one for this model.
    """
    record = heard(model, text, tokenizer)
    regions = _upwards(model.config)
    tokens = record.ids.size
    figure = style.new_figure(9, 0.8 + 1.35 * len(regions))
    panels = figure.subplots(len(regions), 2, sharex="col", squeeze=False)
    counts = {name: (values > 0).sum(axis=(0, 1)) for name, values in record.s.items()}  # spikes of each neuron
    wide = 1 + max(int(some.max()) for some in counts.values()) // BINS  # bars that hold whole numbers of spikes
    ends = np.arange(0, max(int(some.max()) for some in counts.values()) + wide + 1, wide)
    low = min(float(np.quantile(values, 0.01)) for values in record.u.values()) + 1
    high = max(float(np.quantile(values, 0.99)) for values in record.u.values()) + 1
    steps = np.linspace(min(low, 0.0), max(high, 1.5), 2 * BINS + 1)
    for (left, right), region in zip(panels, regions):
        some = counts[region.name]
        bars, _ = np.histogram(some, ends)
        left.stairs(bars, (ends - 0.5) / tokens, fill=True, color=style.SKY)
        left.axvline(some.mean() / tokens, color=style.BLUE, label=f"mean {some.mean() / tokens:.3f}")
        target = model.config.rate_target
        left.axvline(target, color=style.VERMILION, linestyle="--", label=f"target {target:g}")
        left.set_title(f"{region.name}: {(some == 0).mean():.0%} of {region.neurons:,} neurons silent")
        left.set_ylabel("neurons")
        left.legend(loc="upper right")
        potentials = record.u[region.name].ravel() + 1
        bars, _ = np.histogram(np.clip(potentials, steps[0], steps[-1]), steps)
        right.stairs(bars / potentials.size, steps, fill=True, color=style.SKY)
        right.axvline(1.0, color=style.VERMILION, linestyle="--", label="threshold")
        right.set_title(f"{region.name}: mean {potentials.mean():.2f}, standard deviation {potentials.std():.2f}")
        right.set_ylabel("share of values")
        right.legend(loc="upper left")
    panels[-1, 0].set_xlabel(f"firing rate (spikes per token), over {tokens:,} tokens")
    panels[-1, 1].set_xlabel("membrane potential v (thresholds)\noutermost bars: all beyond")
    return figure
