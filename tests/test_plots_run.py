"""Training curves are what `metrics.jsonl` says, and a damaged one is refused by line; `neurogen plot`."""

import json
import math
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import CONFIG, check_files, outside, overlapping

import neurogen_cy as ng
from neurogen_cy import cli, plots
from neurogen_cy.plots_run import read_curves, smoothed

pytest.importorskip("matplotlib")


def step(number, /, **changes):
    record = {
        "event": "step", "step": number, "tokens": 64 * number, "loss": 5.0 / number, "lr": 1e-3 * number,
        "bits_per_byte": 5.0 / number / math.log(2), "grad_norm": 40.0 / number**2, "tokens_per_s": 900.0 + number,
        "rates": {"senses": 0.1 + 0.001 * number, "speech": 0.2}, "elapsed": 0.1 * number,
    }  # fmt: skip
    return {**record, **changes}


def evaluation(number, nats):
    return {
        "event": "evaluation", "step": number, "tokens": 64 * number, "validation_loss": nats,
        "validation_bits_per_byte": nats / math.log(2), "best": True, "elapsed": 0.1 * number,
    }  # fmt: skip


STEPS = [step(number) for number in range(1, 201)]
RECORDS = [*STEPS[:100], evaluation(100, 1.5), *STEPS[100:], {"event": "sample", "step": 200}, evaluation(200, 1.25)]


@pytest.fixture
def run(tmp_path):
    write(tmp_path, RECORDS)
    return tmp_path


def write(folder, records):
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8", newline="")


def column(key, event="step"):
    return [record[key] for record in RECORDS if record["event"] == event]


def test_every_panel_shows_the_records(run):
    figure = plots.curves(run)
    loss, rate, norm, speed, firing = figure.axes
    assert [(axes.get_title(loc="left"), axes.get_ylabel()) for axes in figure.axes] == [
        ("cross-entropy", "bits per byte"), ("learning rate", "step size"),
        ("gradient norm before clipping", "L2 norm"), ("speed", "tokens per second"),
        ("firing rate by region", "spikes per token"),
    ]  # fmt: skip
    assert {axes.get_xlabel() for axes in figure.axes} == {"optimizer step"}
    assert {axes.get_xlim() for axes in figure.axes} == {(0.0, 200.0)}
    for axes, key in ((loss, "bits_per_byte"), (norm, "grad_norm"), (speed, "tokens_per_s")):
        each, mean = axes.lines[:2]
        assert list(each.get_xdata()) == column("step") and list(each.get_ydata()) == column(key)
        assert np.array_equal(mean.get_ydata(), smoothed(np.array(column(key)), 4))
    assert list(rate.lines[0].get_ydata()) == column("lr")
    validation = loss.lines[2]
    assert list(validation.get_xdata()) == [100, 200]
    assert list(validation.get_ydata()) == column("validation_bits_per_byte", "evaluation")
    assert validation.get_label() == f"validation, best {1.25 / math.log(2):.3f} at step 200"
    assert [line.get_label() for line in firing.lines] == ["senses", "speech"]
    assert np.allclose(firing.lines[1].get_ydata(), 0.2)
    assert len({line.get_color() for line in firing.lines}) == len({line.get_linestyle() for line in firing.lines}) == 2
    assert not overlapping(figure) and not outside(figure)


def test_a_panel_for_each_of_what_there_is(tmp_path):
    bare = [{"event": "step", "step": number, "loss": 3.0} for number in (1, 2)]
    write(tmp_path, bare)
    (axes,) = plots.curves(tmp_path / "metrics.jsonl").axes
    assert axes.get_ylabel() == "nats per token" and list(axes.lines[0].get_ydata()) == [3.0, 3.0]
    write(tmp_path, [step(1, grad_norm=None, lr=None), step(2, grad_norm=None, lr=None, rates=None)])
    figure = plots.curves(tmp_path)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["cross-entropy", "speed", "firing rate by region"]
    assert math.isnan(figure.axes[2].lines[0].get_ydata()[1]), "a gap"
    write(tmp_path, [step(7)])
    assert len(plots.curves(tmp_path).axes) == 5, "one step is enough"


def test_many_regions_many_steps(tmp_path):
    names = [f"region_{i}" for i in range(15)]
    write(tmp_path, [step(n, loss=2.0 + math.sin(n), rates={name: 0.1 for name in names}) for n in range(1, 4001)])
    figure = plots.curves(tmp_path)
    firing = figure.axes[-1]
    styles = {(line.get_color(), line.get_linestyle()) for line in firing.lines}
    assert len(styles) == 15, "no two lines alike"
    assert figure.axes[0].lines[0].get_rasterized(), "an SVG stays small"
    assert not overlapping(figure) and not outside(figure)


@given(st.lists(st.one_of(st.floats(-1e9, 1e9), st.just(math.nan)), min_size=1, max_size=40), st.integers(1, 9))
def test_the_mean_of_neighbours(values, width):
    got = smoothed(np.array(values), width)
    for i, value in enumerate(got):
        near = [x for x in values[max(0, i - (width - 1) // 2) : i + width // 2 + 1] if not math.isnan(x)]
        assert math.isnan(value) if not near else value == pytest.approx(np.mean(near), rel=1e-9, abs=1e-3)


@pytest.mark.parametrize(
    "records, message",
    [
        ([], "expected at least one training step, got 0 records without one"),
        ([evaluation(1, 2.0)], "got 1 records without one"),
        ([step(1), "{"], "line 2: expected a record with a step"),
        ([step(1), "[]"], "line 2: expected a record with a step"),
        ([step(1), {"event": "step"}], "line 2: expected a record with a step"),
        ([step(1), ""], "line 2: expected a record with a step"),
        ([step(2), step(2)], "line 2: expected steps in ascending order, got 2 after 2"),
        ([step(2), step(1)], "line 2: expected steps in ascending order, got 1 after 2"),
        ([step(True)], "line 1: expected steps in ascending order, got True"),
        ([step(-5)], "line 1: expected steps in ascending order, got -5"),
        ([step(1, step=10**400)], "line 1: expected steps in ascending order, got 1000"),
        ([step(1), step(2, loss="low")], "line 2: loss: expected a finite number, got 'low'"),
        ([step(1, lr=True)], "line 1: lr: expected a finite number, got True"),
        ([step(1, grad_norm=math.nan)], "line 1: grad_norm: expected a finite number, got nan"),
        ([step(1, tokens_per_s=math.inf)], "tokens_per_s: expected a finite number, got inf"),
        ([step(1, loss=10**400)], "loss: expected a finite number, got 1000"),
        ([step(1), {**evaluation(1, 2.0), "validation_loss": [1]}], r"line 2: validation_loss: .* number, got \[1\]"),
        ([step(1, rates=[0.1])], r"line 1: rates: expected a rate for each region, got \[0.1\]"),
        ([step(1, rates={"a": {}})], "line 1: rates.a: expected a finite number, got {}"),
    ],
)
def test_a_damaged_file_is_refused_by_line(tmp_path, records, message):
    write(tmp_path, records)
    with pytest.raises(ValueError, match=message) as error:
        plots.curves(tmp_path)
    assert "metrics.jsonl" in str(error.value) and len(str(error.value)) < 2000


@pytest.mark.parametrize(
    "content, message", [(b"\xff\xfe\n", "expected UTF-8"), (b"[" * 100_000 + b"\n", "line 1: expected|too deep")]
)
def test_bytes_that_are_no_metrics(tmp_path, content, message):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        plots.curves(tmp_path)


def test_no_metrics_and_a_line_cut_short(tmp_path, run):
    with pytest.raises(FileNotFoundError, match="expected the metrics of a run, got no such file"):
        plots.curves(tmp_path / "nothing")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "step", "step": 201, "lo')  # as after a kill
    assert len(read_curves(run / "metrics.jsonl").steps) == 200


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    number=st.integers(0, len(RECORDS) - 1),
    key=st.sampled_from(["event", "step", "loss", "rates", "lr", "validation_loss", "new"]),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=4,
    ),
)
def test_one_changed_value_is_drawn_or_refused(tmp_path, number, key, value):
    records = [dict(record) for record in RECORDS]
    records[number][key] = value
    write(tmp_path, records)
    try:
        data = read_curves(tmp_path / "metrics.jsonl")
    except ValueError as error:
        assert "metrics.jsonl" in str(error)
    else:
        assert len(data.steps) in (199, 200)


# ---- neurogen plot -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run: metrics and a checkpoint."""
    folder = tmp_path_factory.mktemp("runs") / "own"
    folder.mkdir()
    write(folder, RECORDS)
    ng.NeuroGen(CONFIG, backend="cpu", streams=2, max_tokens=8, threads=1).save(folder / "best")
    return folder


def plot(*arguments):
    return CliRunner().invoke(cli.main, ["plot", *map(str, arguments), "--backend", "cpu", "--threads", "1"])


def test_all_pictures_of_a_run(trained):
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    result = plot(trained)
    assert result.exit_code == 0, result.output
    files = [trained / "pictures" / f"{name}.{kind}" for name in plots.KINDS for kind in plots.FORMATS]
    assert result.output.split() == [str(file) for file in files]
    assert sorted((trained / "pictures").iterdir()) == sorted(files)
    check_files(files)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_some_pictures_of_a_checkpoint_a_file_or_a_connectome(trained, tmp_path, monkeypatch):
    result = plot(trained / "best", "--only", "gates", "--format", "svg")
    assert result.output.split() == [str(trained / "best_pictures" / "gates.svg")], "not inside the checkpoint"
    source = tmp_path / "long.txt"
    source.write_bytes(bytes(range(256)) * 40)
    result = plot(trained, "--file", source, "--only", "raster", "--format", "png", "--out", tmp_path / "there")
    assert result.output.split() == [str(tmp_path / "there" / "raster.png")]
    CONFIG.to_toml(tmp_path / "own.toml")
    monkeypatch.chdir(tmp_path)
    assert plot("own.toml").output.split() == ["connectome.png", "connectome.svg"]
    check_files([tmp_path / "connectome.png", tmp_path / "connectome.svg", tmp_path / "there" / "raster.png"])


def test_curves_alone_need_no_checkpoint(run):
    result = plot(run, "--only", "curves", "--format", "png")
    assert result.output.split() == [str(run / "pictures" / "curves.png")]
    assert plot(run).output.split() == [str(run / "pictures" / f"curves.{kind}") for kind in plots.FORMATS]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["{}/nothing"], "expected a run, a checkpoint or a connectome in a .toml file, got none of them"),
        (["{}", "--text", "a", "--file", "b"], "expected --text or --file, got both"),
        (["{}", "--text", ""], "text: expected at least one character"),
        (["{}", "--file", "{}/no.txt"], "No such file"),
        (["{}/best", "--only", "curves"], "--only curves: expected one of connectome, raster, gates, histograms"),
        (["{}/metrics.jsonl"], "expected a run, a checkpoint"),
        (["{}/no.toml"], "No such file"),
    ],
)
def test_wrong_arguments_are_named(trained, arguments, message):
    result = plot(*(argument.format(trained) for argument in arguments))
    assert result.exit_code == 2 and message in result.output


def test_a_damaged_run_or_checkpoint_is_named(trained, tmp_path):
    write(tmp_path, [step(1, loss="low")])
    result = plot(tmp_path)
    assert result.exit_code == 2 and "line 1: loss: expected a finite number, got 'low'" in result.output
    (tmp_path / "broken.toml").write_text("dim = ")
    assert plot(tmp_path / "broken.toml").exit_code == 2


def test_without_matplotlib_the_command_says_what_to_install(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = plot(trained)
    assert result.exit_code == 1
    assert result.output == "Error: pictures need matplotlib: pip install 'neurogen_cy[plot]'\n"


def test_run_pictures_by_model_and_by_checkpoint(trained, tmp_path):
    write(tmp_path, RECORDS)
    model = ng.NeuroGen.load(trained / "best", backend="cpu", threads=1)
    model.train_step_batch(*np.zeros((2, 2, 8), np.int32))
    state = model.state()
    files = plots.run_pictures(tmp_path, model, b"heard", formats=("png",))
    assert [file.name for file in files] == [f"{name}.png" for name in plots.KINDS]
    assert all(np.array_equal(value, state[key]) for key, value in model.state().items())
    check_files(files)
    (tmp_path / "bad").mkdir()
    write(tmp_path / "bad", RECORDS)
    with pytest.raises(ng.CheckpointError, match="expected a checkpoint directory, got no such path"):
        plots.run_pictures(tmp_path / "bad")
