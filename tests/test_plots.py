"""Pictures of a brain at work show what was recorded, say what they show, and leave the user's matplotlib alone."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from pictures import CONFIG, check_files, outside, overlapping

import neurogen_cy as ng
from neurogen_cy import plots
from neurogen_cy.tokenization import ByteTokenizer

matplotlib = pytest.importorskip("matplotlib")
TEXT = "It hears $x_1$,\tand writes."
PIP = "pictures need matplotlib: pip install 'neurogen_cy[plot]'"


@pytest.fixture(scope="module")
def model():
    return ng.NeuroGen(CONFIG, backend="cpu", streams=1, max_tokens=16, seed=3, threads=1)


@pytest.fixture(scope="module")
def record(model):
    return model.record(np.frombuffer(TEXT.encode(), np.uint8).astype(np.int32))


def tick_texts(axes):
    return [label.get_text() for label in axes.get_xticklabels()]


def stairs(axes):
    (steps,) = [patch for patch in axes.patches if hasattr(patch, "get_data")]
    return steps.get_data()


def test_raster_shows_every_spike_region_by_region(model, record):
    figure = plots.raster(model, TEXT)
    *panels, bar = figure.axes
    assert [axes.get_title(loc="left").split(":")[0] for axes in panels] == ["speech", "will", "memory", "senses"]
    for axes, name in zip(panels, ("speech", "will", "memory", "senses")):
        (image,) = axes.images
        shown = image.get_array()
        spikes = record.s[name][0].T
        rows = np.unique(np.linspace(0, len(spikes) - 1, min(len(spikes), 128)).round().astype(int))
        assert np.array_equal(shown.filled(0.0), spikes[rows]), name
        assert np.array_equal(shown.mask, spikes[rows] == 0), "silence is blank"
        assert f"{(spikes > 0).mean():.3f} spikes per neuron and token" in axes.get_title(loc="left")
        assert axes.get_ylabel() == "neuron"
        assert image.get_extent() == [-0.5, len(TEXT) - 0.5, len(rows) - 0.5, -0.5]
    assert "128 of 160 neurons" in panels[2].get_title(loc="left")
    assert tick_texts(panels[-1]) == [{" ": "\u2423", "\t": "\u2192"}.get(c, c) for c in TEXT]
    assert panels[-1].get_xlabel() == "token" and bar.get_ylabel() == "spike amplitude (thresholds)"
    assert not overlapping(figure) and not outside(figure)


def test_raster_of_binary_spikes_has_one_colour_and_no_scale():
    binary = ng.NeuroGen(dataclasses.replace(CONFIG, graded=False, max_spike=None), backend="cpu", threads=1)
    figure = plots.raster(binary, TEXT)
    assert len(figure.axes) == 4
    assert all(set(axes.images[0].get_array().compressed()) <= {1.0} for axes in figure.axes)
    assert {axes.images[0].cmap.N for axes in figure.axes} == {1}


def test_gates_show_mean_and_spread_of_each_gated_region(model, record):
    figure = plots.gates(model, record)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "speech, gated by senses, memory", "memory, gated by embedding",
    ]  # fmt: skip
    for axes, name in zip(figure.axes, ("speech", "memory")):
        gate = record.gates[name][0]
        mean, unchanged = axes.lines
        assert np.array_equal(mean.get_xdata(), np.arange(len(TEXT)))
        assert np.array_equal(mean.get_ydata(), gate.mean(axis=1))
        assert list(unchanged.get_ydata()) == [1.0, 1.0]
        for band, (low, high) in zip(axes.collections, ((0.05, 0.95), (0.25, 0.75))):
            box = band.get_paths()[0].get_extents()
            assert box.y0 == pytest.approx(np.quantile(gate, low, axis=1).min())
            assert box.y1 == pytest.approx(np.quantile(gate, high, axis=1).max())
        assert axes.get_ylabel() == "gate G (factor)" and axes.get_ylim() == (0, 2)
    assert figure.axes[-1].get_xlabel() == "token"
    assert not overlapping(figure) and not outside(figure)


def test_histograms_count_every_neuron_and_every_potential(model, record):
    figure = plots.histograms(model, TEXT)
    panels = np.reshape(figure.axes, (4, 2))
    for (left, right), name in zip(panels, ("speech", "will", "memory", "senses")):
        rates = (record.s[name] > 0).mean(axis=(0, 1))
        bars, edges, _ = stairs(left)
        assert bars.sum() == len(rates)
        assert np.array_equal(bars, np.histogram(rates, edges)[0])
        assert left.lines[0].get_xdata()[0] == pytest.approx(rates.mean())
        assert left.lines[1].get_xdata()[0] == CONFIG.rate_target
        assert left.get_ylabel() == "neurons"
        potentials = record.u[name].ravel() + 1
        bars, edges, _ = stairs(right)
        assert bars.sum() == pytest.approx(1.0)
        assert bars == pytest.approx(np.histogram(np.clip(potentials, edges[0], edges[-1]), edges)[0] / potentials.size)
        assert right.lines[0].get_xdata()[0] == 1.0, "the threshold"
        assert f"mean {potentials.mean():.2f}, standard deviation {potentials.std():.2f}" in right.get_title(loc="left")
    assert panels[-1, 0].get_xlabel() == f"firing rate (spikes per token), over {len(TEXT)} tokens"
    assert panels[-1, 1].get_xlabel().startswith("membrane potential v (thresholds)")
    assert not overlapping(figure) and not outside(figure)


def curve(arc):
    """Points of an arc in the units of its axes, [points, 2]."""
    return arc._path_original.vertices


def test_connectome_has_an_arc_for_each_projection_and_says_levels_and_delays():
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    figure = plots.connectome(CONFIG)
    (axes,) = figure.axes
    arcs = [patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]
    kinds = ("drive, same", "gate", "drive of")
    by_kind = {kind: [arc for arc in arcs if arc.get_gid().startswith(kind)] for kind in kinds}
    assert {kind: len(some) for kind, some in by_kind.items()} == {"drive, same": 5, "gate": 3, "drive of": 4}
    assert len({some[0].get_edgecolor() for some in by_kind.values()}) == 3
    ends = {(round(curve(arc)[0, 0]), round(curve(arc)[-1, 0])) for arc in by_kind["gate"]}
    assert ends == {(0, 2), (1, 3), (2, 3)}, "embedding, senses, memory, speech, will, broca_out from left to right"
    below = {round(curve(arc)[:, 1].min(), 3) for arc in by_kind["drive of"]}
    assert len(below) == 4 and max(below) < 0, "two recurrences of one region do not lie over each other"
    texts = [text.get_text() for text in axes.texts]
    assert sorted(text for text in texts if text.isdigit()) == ["1", "1", "2", "4"]
    names = [patch.get_gid() for patch in axes.patches if isinstance(patch, FancyBboxPatch)]
    assert names == ["embedding", "senses", "memory", "speech", "will", "broca_out"]
    assert "160 neurons\nlevel 1" in texts and "32 wide" in texts
    assert f"{CONFIG.weights:,} weights" in axes.get_title(loc="left")
    legend = [text.get_text() for text in axes.get_legend().get_texts()]
    assert legend == ["drive, same token", "gate, same token", "drive of earlier tokens (number: delay in tokens)"]
    assert not overlapping(figure) and not outside(figure)
    assert len({arc.get_linewidth() for arc in by_kind["drive, same"]}) > 1, "thicker with more synapses"


@pytest.mark.parametrize("preset", ["tiny", "base"])
def test_connectomes_of_presets_are_readable(preset):
    figure = plots.connectome(ng.Config.preset(preset))
    assert not overlapping(figure) and not outside(figure)


def test_names_stay_inside_their_boxes():
    from matplotlib.patches import FancyBboxPatch

    name = "anterior_cingulate_cortex_left"
    config = ng.Config(
        8, 32, (ng.Region(name, 32, 0), ng.Region("b", 32, 0)),
        (ng.Projection("embedding", name), ng.Projection("embedding", "b"), ng.Projection(name, "broca_out")),
    )  # fmt: skip
    figure = plots.connectome(config)
    (axes,) = figure.axes
    boxes = {p.get_gid(): p.get_window_extent() for p in axes.patches if isinstance(p, FancyBboxPatch)}
    (text,) = [text for text in axes.texts if text.get_text() == name]
    assert boxes[name].x0 < text.get_window_extent().x0 and text.get_window_extent().x1 < boxes[name].x1


class Words(ByteTokenizer):
    """A tokenizer of five words."""

    vocab_size = 5
    words = (b"the ", b"brain ", "gr\u00fc\u00df $ ".encode(), b"\xff\xfe", b"")

    def encode(self, text):
        return np.array([self.words.index(word) for word in text.encode().split(b"|")])

    def decode_bytes(self, ids):
        return b"".join(self.words[i] for i in ids)


def test_tokens_of_a_tokenizer_stand_under_the_axis():
    model = ng.NeuroGen(dataclasses.replace(CONFIG, vocab_size=5), backend="cpu", threads=1)
    figure = plots.gates(model, [2, 3, 0, 1, 4, 0], Words())
    expected = ["gr\u00fc\u00df\u2423$\u2423", "fffe", "the\u2423", "brain\u2423", "", "the\u2423"]
    assert tick_texts(figure.axes[-1]) == expected
    assert tick_texts(plots.gates(model, "the |brain ", Words()).axes[-1]) == ["the\u2423", "brain\u2423"]
    assert tick_texts(plots.gates(model, [2, 3]).axes[-1]) == ["2", "3"]
    assert not overlapping(figure) and not outside(figure)
    with pytest.raises(ValueError, match="token ids or a tokenizer of 5 tokens, got a text for one of 256"):
        plots.raster(model, "text")


def test_many_tokens_are_numbered_and_a_long_text_is_cut(model):
    rng = np.random.default_rng(0)
    for tokens, shown, label in (
        (90, 90, "token"), (300, 300, "position in the text (tokens)"),
        (1500, 400, "position in the text (tokens), the first 400 of 1,500"),
    ):  # fmt: skip
        record = model.record(rng.integers(0, 256, (1, tokens)))
        figure = plots.raster(model, record)
        assert figure.axes[0].images[0].get_array().shape[1] == shown
        assert figure.axes[-2].get_xlabel() == label
        assert not overlapping(figure) and not outside(figure)
    assert "over 1,500 tokens" in plots.histograms(model, record).axes[-2].get_xlabel()


def test_what_cannot_be_drawn_is_said(model):
    plain = ng.Config(256, 32, (ng.Region("only", 32, 0),), (
        ng.Projection("embedding", "only"), ng.Projection("only", "broca_out"),
    ))  # fmt: skip
    without = ng.NeuroGen(plain, backend="cpu", threads=1)
    with pytest.raises(ValueError, match="expected a connectome with gates"):
        plots.gates(without, TEXT)
    assert list(plots.model_pictures(without)) == ["connectome", "raster", "histograms"]
    with pytest.raises(ValueError, match="at least one character, got an empty text"):
        plots.raster(model, "")
    with pytest.raises(IndexError, match=r"expected a token id in 0\.\.255, got 256"):
        plots.raster(model, [256])
    with pytest.raises(TypeError, match="ids: expected"):
        plots.raster(model, 3.5)


def test_files_are_pictures_and_the_same_each_time(model, tmp_path):
    drawn = plots.model_pictures(model, TEXT)
    files = plots.write(drawn, tmp_path / "new", plots.FORMATS)
    assert [file.name for file in files] == [
        f"{name}.{kind}" for name in ("connectome", "raster", "gates", "histograms") for kind in ("png", "svg")
    ]
    check_files(files)
    with matplotlib.rc_context({"axes.facecolor": "red", "font.size": 30, "savefig.dpi": 10, "svg.hashsalt": "other"}):
        again = plots.write({"raster": drawn["raster"]}, tmp_path, plots.FORMATS)
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in files[2:4]]
    with pytest.raises(ValueError, match="formats: expected png or svg, got 'pdf'"):
        plots.write(drawn, tmp_path, ["pdf"])
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        plots.write(drawn, tmp_path / "file", ["png"])


ALONE = """
import sys
import neurogen_cy as ng
assert "matplotlib" not in sys.modules, "importing the package is quick"
import matplotlib
matplotlib.rcParams["lines.linewidth"] = 7
before = dict(dict.items(matplotlib.rcParams))  # looking at its backend would choose one
ng.plots.save(ng.plots.connectome(ng.Config.preset("tiny")), sys.argv[1])
assert dict(dict.items(matplotlib.rcParams)) == before
assert "matplotlib.pyplot" not in sys.modules and "tkinter" not in sys.modules
"""


def test_no_window_no_pyplot_and_the_users_settings_stay(tmp_path):
    subprocess.run([sys.executable, "-W", "error", "-c", ALONE, str(tmp_path / "x.svg")], check=True)
    check_files([tmp_path / "x.svg"])


def test_without_matplotlib_the_message_has_the_pip_command(monkeypatch, model, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plots.unavailable() == PIP
    for draw in (lambda: plots.raster(model, TEXT), lambda: plots.run_pictures(tmp_path)):
        with pytest.raises(ModuleNotFoundError) as error:
            draw()
        assert str(error.value) == PIP and error.value.name == "matplotlib"
    assert list(tmp_path.iterdir()) == []
