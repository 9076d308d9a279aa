"""The benchmarks of the GPU at their smallest, on the CPU: what they record, and what where they cannot measure."""

import dataclasses
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import common
import growth
import kernels
import numpy as np
import peers
import pytest
import tables
import traces
import train_step
import words

import neurogen_cy as ng
from neurogen_cy.connectome import initial_parameters

ROOT = Path(__file__).parent.parent
CUDA = "void neurogen::cuda::(anonymous namespace)::"
TINY = ng.Config.preset("tiny")
SWEEPS = {
    "preset": "tiny", "T": 4, "values": {"B": (1, 2), "T": (2, 4), "V": (256, 300), "N": (0.5, 1)},
    "streams": {"B": (None,), "T": (1, 2), "V": (2,), "N": (1,)},
}  # fmt: skip


@pytest.fixture(autouse=True)
def results(monkeypatch, tmp_path):
    """Records go to a folder of the test."""
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    return tmp_path


def read(name):
    return json.loads((common.RESULTS / f"{name}.json").read_text())


# ---- growth --------------------------------------------------------------------------------------------------------


def test_twenty_times_base_is_large():
    base = ng.Config.preset("base")
    assert growth.scaled(base, 20) == ng.Config.preset("large") and growth.scaled(base, 1) == base
    tenth = growth.scaled(base, 0.1)
    assert [region.neurons for region in tenth.regions] == [96, 1024, 512, 1024, 256, 1024]
    rows = {p.src: p.density * tenth.regions[1].neurons / 32 for p in tenth.projections if p.src == "wernicke"}
    assert rows["wernicke"] == pytest.approx(8)  # blocks a row, of the readout: as many as in base


def test_values_that_sizes_share_are_those_of_each():
    drawn = growth.Parameters(TINY, 400)
    for cfg in (TINY, growth.scaled(TINY, 0.5), dataclasses.replace(TINY, vocab_size=400)):
        expected, got = initial_parameters(cfg, 0), drawn.of(cfg)
        assert got.keys() == expected.keys()
        assert all(np.array_equal(got[key], expected[key]) for key in expected)


def test_rows_of_growth(monkeypatch):
    monkeypatch.setitem(growth.SWEEPS, "cpu", SWEEPS)
    growth.main(["--backend", "cpu", "--row-seconds", "0.001"])
    rows = read("growth_cpu")["rows"]
    assert [(row["sweep"], row["B"], row["T"], row["N"], row["V"]) for row in rows] == [
        ("B", 1, 4, 1088, 256), ("B", 2, 4, 1088, 256), ("T", 1, 2, 1088, 256), ("T", 2, 2, 1088, 256),
        ("T", 1, 4, 1088, 256), ("T", 2, 4, 1088, 256), ("V", 2, 4, 1088, 256), ("V", 2, 4, 1088, 300),
        ("N", 1, 4, 544, 256), ("N", 1, 4, 1088, 256),
    ]  # fmt: skip
    for row in rows:
        low, high = row["ms_spread"]
        assert 0 < low <= row["ms"] <= high and row["steps"] >= growth.LEAST_STEPS
        assert row["tok_s"] == pytest.approx(1e3 * row["B"] * row["T"] / row["ms"])
        assert row["allocated_bytes"] is None
    planned = sum(ng.memory_plan(TINY, 2, 4, "cpu").values())
    assert {row["planned_bytes"] for row in rows if (row["B"], row["T"], row["N"], row["V"]) == (2, 4, 1088, 256)} == {
        planned
    }


def test_what_does_not_fit_or_comes_late_is_a_row(monkeypatch):
    monkeypatch.setitem(growth.SWEEPS, "cpu", SWEEPS)
    growth.main(["--backend", "cpu", "--sweeps", "B", "V", "--row-seconds", "0.001"])
    before = read("growth_cpu")["rows"]

    def full(*_, streams, **__):
        raise MemoryError(f"this model needs much at streams={streams}:\nits table")

    monkeypatch.setattr(ng, "NeuroGen", full)
    growth.main(["--backend", "cpu", "--sweeps", "B"])
    after = read("growth_cpu")["rows"]
    assert [row for row in after if row["sweep"] == "V"] == [row for row in before if row["sweep"] == "V"]
    again = [row for row in after if row["sweep"] == "B"]
    assert [row["error"] for row in again] == [f"MemoryError: this model needs much at streams={B}:" for B in (1, 2)]
    assert all(row["planned_bytes"] > 0 and "tok_s" not in row for row in again)
    growth.main(["--backend", "cpu", "--sweeps", "N", "--seconds", "0"])
    assert {row["error"] for row in read("growth_cpu")["rows"] if row["sweep"] == "N"} == {
        "not measured: 0 seconds were over"
    }


def grown():
    """A record as of a GPU, with a size that did not fit."""
    rows = []
    for sweep, B, T, cfg in growth.points(growth.SWEEPS["cuda"], "BTVN"):
        size = {"B": B, "T": T, "N": sum(region.neurons for region in cfg.regions), "V": cfg.vocab_size}
        found = {"tok_s": 1000.0 * B, "tok_s_spread": [900.0 * B, 1100.0 * B], "allocated_bytes": 2_000_000_000 + T}
        if (B, T) == (64, 4096):
            found = {"error": "MemoryError: this model needs 1,000 MiB"}
        rows.append({"sweep": sweep, **size, "planned_bytes": 2_000_000_000, **found})
    return {"gpu": "a GPU", "commit": "abc", "preset": "base", "rows": rows}


def test_table_of_growth():
    common.write("growth", grown())
    lines = tables.growth().splitlines()
    assert "| streams B | 1 | 2 | 4 | 8 | 16 | 32 | 64 | 128 | 256 |" in lines
    assert "| neurons N | 3,936 | 9,856 | 19,712 | 39,424 | 78,848 | 197,120 | 394,240 | 788,480 |" in lines
    last = [line for line in lines if line.startswith("| B = 64: ")][:3]
    assert [line.split(" | ")[-1] for line in last] == ["- |", "2.00 |", " |"]
    refused = "64 x 4096, 39,424 neurons, V = 32,000: MemoryError: this model needs 1,000 MiB."
    assert lines[-1].endswith(f"medians. Not run: {refused}")


def test_picture_of_growth(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    figure = growth.panel(grown())
    assert [axes.get_xlabel()[-1] for axes in figure.axes] == list("BTNVBT")
    assert all(axes.get_xscale() == axes.get_yscale() == "log" for axes in figure.axes)
    labels = figure.axes[5].get_legend_handles_labels()[1]
    assert labels == ["memory_plan, B = 1", "allocated, B = 1", "memory_plan, B = 64", "allocated, B = 64",
                      "not run, B = 64"]  # fmt: skip
    monkeypatch.setattr(growth, "PLOT", tmp_path / "growth.png")
    common.write("growth", grown())
    growth.main(["--plot"])
    assert (tmp_path / "growth.png").stat().st_size > 10_000


# ---- kernels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "own", "decoder"),
    [
        (f"{CUDA}score_rows_kernel<__nv_bfloat16>(__nv_bfloat16*, neurogen::cuda::ScoreJob)", "score_rows_kernel", 1),
        ("_ZN8neurogen4cuda12_GLOBAL__N_117score_rows_kernelI13__nv_bfloat16EEvPT_", "score_rows_kernel", 1),
        (f"{CUDA}run_brain_kernel<neurogen::cuda::Shape<1, 2> >(neurogen::cuda::Job)", "run_brain_kernel", 0),
        (f"{CUDA}turn_kernel<unsigned char>(neurogen::cuda::TurnJob<unsigned char>)", "turn_kernel", 1),
        ("neurogen::cuda::commit_kernel(int)", "commit_kernel", 0),
        ("nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT", "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_NNT", 1),
        ("void cutlass::Kernel2<cutlass_80_wmma>(cutlass::Params)", "cutlass::Kernel2", 1),
        ("Memcpy HtoD (Pageable -> Device)", "Memcpy HtoD", 0),
    ],
)
def test_names_of_kernels(name, own, decoder):
    assert (traces.short(name), traces.of_decoder(name)) == (own, bool(decoder))


TRACE = [
    ("Memset (Device)", 0.0, 0.001), (f"{CUDA}run_brain_kernel<int>(int)", 0.001, 0.011),
    ("nvjet", 0.012, 0.016), (f"{CUDA}score_rows_kernel<int>(int)", 0.015, 0.018), ("nvjet", 0.02, 0.021),
    (f"{CUDA}update_kernel(int)", 0.02, 0.03),
]  # fmt: skip


def test_what_a_trace_covers():
    assert traces.union([]) == 0 and traces.union([(3, 4), (0, 2), (1, 3), (1, 2)]) == 4
    assert traces.covered(TRACE, traces.of_decoder) == pytest.approx(0.007)
    assert traces.covered(TRACE) == pytest.approx(0.027) and traces.span(TRACE) == pytest.approx(0.03)
    slower = [(name, begin, end + 0.002 * (name == "nvjet")) for name, begin, end in TRACE]
    rows = traces.table([TRACE, slower, TRACE])
    assert [(row["name"], row["launches"]) for row in rows[:3]] == [
        ("run_brain_kernel", 1), ("update_kernel", 1), ("nvjet", 2)
    ]  # fmt: skip
    assert rows[2]["ms"] == pytest.approx(5) and sum(row["share"] for row in rows) == pytest.approx(1)


class Clock:
    """A device that always does the same."""

    reason = None

    def events(self, call):
        call()
        return TRACE


SMALL = {"preset": "tiny", "generation": (1, 2), "new_tokens": 40, "decoder": ((2, 8, None),), "steps": ("tiny:2:8",)}


def test_kernels_on_the_cpu(monkeypatch):
    """What needs no kernels is measured, and the rest says why it is not."""
    monkeypatch.setitem(kernels.SIZES, "cpu", SMALL)
    monkeypatch.setattr(kernels, "Peers", NoPeers)
    assert kernels.main(["--backend", "cpu"]) == 0
    record = read("kernels_cpu")
    assert [(row["B"], row["how"]) for row in record["generation"]] == [
        (1, "temperature 1"), (1, "greedy"), (2, "temperature 1"), (2, "greedy")
    ]  # fmt: skip
    assert all(row["tok_s"]["min"] > 0 and row["tok_s_with_prompt"]["min"] > 0 for row in record["generation"])
    (row,) = record["decoder"]
    assert row["tflops"] is None and row["at_least"]["median"] > 0 and row["no_kernels"] == "the model runs on the CPU"
    assert row["peers"] == [{"peer": "decoder", "error": "absent"}]
    assert record["steps"][0]["error"] == "no kernels: the model runs on the CPU"


class NoPeers:
    def __init__(self, kinds, device, limit):
        self.kinds = kinds

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def build(self, **sizes):
        assert sizes["vocab"] * sizes["dim"] * sizes["B"] * sizes["T"] > 0

    def ready(self):
        return [], {kind: "absent" for kind in self.kinds}


def test_kernels_by_the_clock(monkeypatch):
    """The arithmetic of a GPU's figures, with a CPU model and an invented trace."""
    monkeypatch.setitem(kernels.SIZES, "cpu", SMALL)
    monkeypatch.setattr(kernels, "Peers", NoPeers)
    monkeypatch.setattr(kernels, "DeviceClock", Clock)
    monkeypatch.setattr(kernels, "WITHOUT_KERNELS", {})
    assert kernels.main(["--backend", "cpu", "--parts", "decoder", "steps"]) == 0
    record = read("kernels_cpu")
    (row,), work = record["decoder"], 6 * 16 * 256 * 128
    assert row["tflops"]["median"] == pytest.approx(work / 0.007 / 1e12)
    assert [kernel["name"] for kernel in row["counted"]] == ["nvjet", "score_rows_kernel"]
    (row,) = record["steps"]
    assert row["ticks"] == 8 + 6 - 1 and row["us_tick"]["median"] == pytest.approx(10_000 / 13)
    assert row["device_ms"]["median"] == pytest.approx(27) and row["span_ms"]["median"] == pytest.approx(30)
    common.write("kernels", {**record, "gpu": "a GPU", "generation": [{"error": "none"}]})
    assert "| 16 | fp32 | 0 (0 to 0) |" in tables.decoder()
    assert "| 10.000 | 769.23 (769.23 to 769.23) |" in tables.ticks()
    assert "| `run_brain_kernel` | 1 | 10.000 | 34.5 |" in tables.step_kernels()
    with pytest.raises(FileNotFoundError, match="no generation in kernels.json"):
        tables.generation()


def test_a_part_that_fails_leaves_the_others(monkeypatch, capsys):
    monkeypatch.setitem(kernels.SIZES, "cpu", {**SMALL, "generation": (1,)})
    monkeypatch.setattr(kernels.Bench, "decoder", lambda self: iter([1 / 0]))
    assert kernels.main(["--backend", "cpu"]) == 1
    record = read("kernels_cpu")
    assert len(record["generation"]) == 2 and len(record["steps"]) == 1
    assert record["decoder"] == [{"error": "ZeroDivisionError: division by zero"}]
    assert "ZeroDivisionError" in capsys.readouterr().err
    common.write("kernels", {**record, "gpu": "a GPU"})
    assert "40 new tokens after a prompt of 16" in tables.generation()
    assert kernels.main(["--backend", "cpu", "--parts", "steps", "--steps", "tiny:1:2", "--seconds", "0"]) == 1
    record = read("kernels_cpu")
    assert len(record["generation"]) == 2 and record["steps"][-1]["error"].startswith("TimeoutError: 0 seconds")


@pytest.mark.gpu
def test_kernels_of_the_gpu_are_found_by_name(tmp_path):
    """What counts as the brain's and as the decoder's is found among the kernels of a step."""
    pytest.importorskip("torch")
    code = (
        f"import common, kernels, pathlib; common.RESULTS = pathlib.Path({str(tmp_path)!r});"
        "kernels.main(['--parts', 'steps', '--steps', 'tiny:2:16'])"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=120)
    (row,) = read("kernels")["steps"]
    assert row["us_tick"]["min"] > 0 and row["decoder_tflops"]["min"] > 0, row
    names = [kernel["name"] for kernel in row["kernels"]]
    assert "run_brain_kernel" in names and any(traces.DECODER.search(name) for name in names), names


# ---- peers ---------------------------------------------------------------------------------------------------------

SIZES = {"vocab": 50, "dim": 16, "B": 2, "T": 6}


def test_torch_in_a_process_of_its_own(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    train_step.main(["--backend", "cpu", "--rows", "tiny:2:6", "small:60000:30000", "--peers", "lstm", "compiled",
                     "--peer-of", "tiny", "--rounds", "2", "--round-seconds", "0.001"])  # fmt: skip
    record = read("train_step_cpu")
    assert record["refused"] == ["small:60000:30000"]
    kinds = [tables.peer_kind(row["peer"]) if row["peer"] else None for row in record["rows"]]
    assert kinds == [None, "LSTM + AdamW", "LSTM", "LSTM, loss compiled"]
    assert all(row["tok_s"] == pytest.approx(12e3 / row["ms"]) and row["steps"] >= 4 for row in record["rows"])
    common.write("train_step", {**record, "gpu": "a GPU", "driver": "1"})
    head, _, row = tables.train_step().splitlines()[:3]
    assert head.endswith("| tokens/s | LSTM + AdamW | LSTM | LSTM, loss compiled |") and row.count("(") == 4


def test_a_peer_that_ends_is_started_again():
    pytest.importorskip("torch")
    with peers.Peers(["lstm"], "cpu", 120) as group:
        group.build(**SIZES)
        names, errors = group.ready()
        assert len(names) == 2 and not errors and len(group.seconds(names[0], 3)) == 3
        group.processes[0].process.kill()
        with pytest.raises(peers.Failed, match="its process ended with status -9"):
            group.seconds(names[0], 1)
        group.build(**SIZES, nonsense=1)
        assert "unexpected keyword argument 'nonsense'" in group.ready()[1]["lstm"]
        group.processes[0].limit = 0.001
        group.build(**SIZES)
        assert group.ready() == ([], {"lstm": "no answer within 0.001 s"}) and group.processes[0].process is None


def test_an_absent_library_is_a_row(monkeypatch, tmp_path):
    (tmp_path / "jax.py").write_text("raise ImportError('no JAX here')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    train_step.main(["--backend", "cpu", "--rows", "tiny:1:4", "--peers", "alif", "--peer-of", "tiny", "--rounds", "1",
                     "--round-seconds", "0.001"])  # fmt: skip
    ours, absent = read("train_step_cpu")["rows"]
    assert ours["peer"] is None and ours["tok_s"] > 0
    assert absent == {"preset": "tiny", "B": 1, "T": 4, "peer": "alif", "error": "ImportError: no JAX here"}
    with pytest.raises(ValueError, match="peer: expected one of lstm, compiled, alif, decoder, got 'gru'"):
        peers.Peers(["gru"], "cpu", 1)


def test_losses_in_pieces_are_the_loss(monkeypatch):
    """Rows of logits taken in pieces, the last one shorter, give the loss and step of all at once."""
    pytest.importorskip("torch")
    data, found = common.batches(SIZES["vocab"], SIZES["B"], SIZES["T"]), []
    for rows in (100, 5):
        monkeypatch.setattr(peers, "LARGEST_LOSS", rows)
        step = next(iter(peers.lstm("cpu", **SIZES).values()))
        found.append([step(*batch) for batch in data * 2])
    assert found[0] == pytest.approx(found[1], rel=1e-4) and abs(found[0][0] - np.log(50)) < 0.5


def test_jax_learns_from_every_weight(monkeypatch):
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "cpu":
        pytest.skip("JAX has taken a GPU here")
    data, found = common.batches(SIZES["vocab"], SIZES["B"], SIZES["T"]), []
    for rows in (100, 5):
        monkeypatch.setattr(peers, "COMPILED_ROWS", rows)
        ((name, step),) = peers.alif("cpu", **SIZES).items()
        found.append([step(*batch) for batch in data])
    assert found[0] == pytest.approx(found[1], rel=1e-5) and tables.peer_kind(name) == "JAX scan"
    with pytest.raises(RuntimeError, match="jax: expected a backend for cuda, got cpu"):
        peers.alif("cuda", **SIZES)


# ---- words ---------------------------------------------------------------------------------------------------------


def test_words(tmp_path):
    """A sentence over and over is learnt; rare words are one word; the record and its table say what was done."""
    text = "the cat sat on the mat and the dog sat on the log\n"
    (tmp_path / "train.txt").write_text(text * 40 + "a rare word\n")
    (tmp_path / "valid.txt").write_text(text * 4)
    assert words.words(tmp_path / "valid.txt")[-3:] == ["the", "log", words.END]
    words.main([
        "--data", str(tmp_path), "--preset", "tiny", "--vocab", "10", "--streams", "2", "--tokens", "8", "--steps", "6",
        "--every", "3", "--seeds", "2", "--backend", "cpu", "--precisions", "fp32",
    ])  # fmt: skip
    record = read("words")
    assert record["words"] == {"training": 40 * 14 + 4, "validation": 56}
    line = [*text.split(), words.END]
    share = [(40 * line.count(word) + (word == words.END) + 1) / (564 + 10) for word in line]
    assert record["unigram_nats"] == pytest.approx(-np.log(share).mean(), abs=1e-4)
    assert [row["seed"] for row in record["rows"]] == [0, 1]
    assert [step for step, _, _ in record["rows"][1]["curve"]] == [3, 6]
    assert record["rows"][0]["curve"] != record["rows"][1]["curve"]
    made = tables.words().splitlines()
    assert made[0] == "| precision | step 3 | step 6 | tokens/s |" and made[2].startswith("| fp32 | ")


# ---- the script of all stages --------------------------------------------------------------------------------------


def test_stages(tmp_path):
    """`growth` and `kernels` are stages, within a time of their own; an unknown one is refused before anything runs."""
    script, environment = ROOT / "benchmarks" / "device.sh", {"PATH": "/usr/bin:/bin", "PYTHON": "echo"}
    done = subprocess.run(
        [script, "growth", "kernels"], env={**environment, "OUT": str(tmp_path), "KERNELS_OPTIONS": "--parts steps"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "benchmarks/growth.py --seconds 75\n" in done.stdout
    assert "benchmarks/kernels.py --seconds 60 --parts steps\n" in done.stdout
    with tarfile.open(tmp_path / "records.tar") as records:
        assert {"./train_step.json", "./gpu_tests.json", "sanitizer.txt"} <= set(records.getnames())
    refused = subprocess.run([script, "growing"], env=environment, capture_output=True, text=True)
    assert refused.returncode == 2 and "unknown stage growing: expected build" in refused.stderr
