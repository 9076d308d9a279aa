"""`neurogen diagnose`: the record of a real run, and the advice that figures lead to."""

import copy
import json

import pytest
from click.testing import CliRunner

from neurogen_cy import Config, Projection, Region
from neurogen_cy.cli import main
from neurogen_cy.data import default_corpus
from neurogen_cy.diagnose import advice, tables

OPTIONS = ["--seconds", "0.05", "--tokens", "16,40", "--streams", "2", "--backend", "cpu", "--threads", "1"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diagnose")
    regions = (Region("thalamus", 32, 0), Region("broca", 32, 1))
    ends = (("embedding", "thalamus", 0), ("thalamus", "broca", 0), ("broca", "broca", 1), ("broca", "broca_out", 0))
    Config(
        vocab_size=1000, dim=32, regions=regions, projections=tuple(Projection(a, b, delay) for a, b, delay in ends)
    ).to_toml(folder / "brain.toml")
    (folder / "text.txt").write_bytes(default_corpus()[0][:4000])
    return folder


def invoke(files, *options):
    return CliRunner().invoke(
        main, ["diagnose", "--config", str(files / "brain.toml"), "--data", str(files / "text.txt"), *options]
    )


@pytest.fixture(scope="module")
def record(files):
    result = invoke(files, *OPTIONS, "--json", "--own-rate", "1")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_json(record, files):
    assert record["preset"] == "brain" and record["backend"] == "cpu" and record["vocab_size"] == 1000
    assert record["text"]["bytes"] == 4000 and record["tokens_are"] == "pairs of bytes"
    assert record["no_gpu"] == "--backend cpu was asked for" and record["own_tok_s"] == 1
    assert [(row["rung"], row["T"]) for row in record["rows"]] == [(rung, T) for T in (16, 40) for rung in range(4)]
    wanted = {"rung", "backend", "B", "T", "tok_s", "host_alloc_bytes", "host_allocs", "syncs", "launches", "h2d_bytes",
              "d2h_bytes", "host_copied_bytes", "cpu_percent", "gpu_percent", "time"}  # fmt: skip
    assert all(wanted <= set(row) for row in record["rows"])
    assert (record["steady"]["B"], record["steady"]["T"]) == (2, 40)
    assert record["machine"]["cores"] >= 1 and record["machine"]["memory_bytes"] > record["machine"]["available_bytes"]
    assert record["advice"] == advice(record)
    assert "below every rung" in " ".join(record["advice"])


def test_text_ends_with_advice(record):
    text = tables(record)
    for row in record["rows"]:
        assert row["name"] in text and f"{row['tok_s']:,.0f}" in text
    assert "Measured on the CPU backend: --backend cpu was asked for" in text
    assert text.endswith("\n".join(f"- {line}" for line in record["advice"]))
    assert max(len(line) for line in text.split("What to change")[0].splitlines()) < 160


def test_missing_figures_are_said(record):
    bare = copy.deepcopy(record)
    bare.update(backend="cuda", no_allocation_counts="no C compiler", no_device_time="no torch")
    bare["steady"]["no_gpu_percent"] = "nvidia-ml-py is not installed"
    for row in bare["rows"]:
        row.update(host_allocs=None, array_allocs=None, native_allocs=None, host_alloc_bytes=None,
                   host_copied_bytes=None)  # fmt: skip
        row["time"]["synchronisation"] = None
    text = tables(bare)
    assert "allocations were not counted: no C compiler" in text
    assert "own time is not known: no torch" in text
    assert "NVML gives no utilisation: nvidia-ml-py is not installed" in text and "Measured on the CPU" not in text


def test_refusals(files):
    assert "--config or --preset, got both" in invoke(files, "--preset", "tiny").output
    for lengths in ("0,5", "a", ""):
        result = invoke(files, "--tokens", lengths)
        assert result.exit_code == 2 and "expected whole numbers >= 1" in result.output
    result = invoke(files, *OPTIONS, "--tokens", "5000")
    assert result.exit_code == 2 and "expected at least 5,001 tokens, got 3,999" in result.output
    (files / "broken.toml").write_text("vocab_size = 'many'")
    result = CliRunner().invoke(main, ["diagnose", "--config", str(files / "broken.toml")])
    assert result.exit_code == 2 and "vocab_size" in result.output


# ---- advice --------------------------------------------------------------------------------------------------------


def synthetic(rates=(10, 12, 20, 1000), short=400, **more):
    """A record of these tokens/s at T = 500; the batched call's at T = 100 is `short`."""
    def row(rung, T, rate):
        time = {"synchronisation": 0.5, "allocation": 0.1, "copying": 0.1, "brain_decoder": 0.1, "learning": 0.1,
                "python": 0.1}  # fmt: skip
        return {"rung": rung, "T": T, "tok_s": rate, "seconds": 1.0, "time": time, "name": f"way {rung}"}

    steady = {"tok_s": 5000, "B": 16, "T": 64, "cpu_percent": 5.0, "gpu_percent": 97.0, **more.pop("steady", {})}
    rows = [row(rung, 100, rate) for rung, rate in enumerate((*rates[:3], short))]
    rows += [row(rung, 500, rate) for rung, rate in enumerate(rates)]
    return {"rows": rows, "steady": steady, "backend": "cuda", "no_gpu": None, "own_tok_s": None,
            "machine": {"busy_before_percent": 0.0}, **more}  # fmt: skip


def said(**more):
    return "\n".join(advice(synthetic(**more)))


@pytest.mark.parametrize(
    "rate, place",
    [(3, "below every rung (the slowest gives 10)"), (10, "rungs 0 to 1, token by token"), (12, "rungs 0 to 1"),
     (21, "rung 2, token by token: train_step_batch would give 47.6 times"), (300, "rung 2, token by token"),
     (990, "rung 3: you are at the top already")],
)  # fmt: skip
def test_a_rate_finds_its_rung(rate, place):
    assert place in said(own_tok_s=rate)


def test_without_a_rate_it_says_how_to_find_out():
    assert "model.profile()" in said() and "--own-rate" in said()


def test_advice_follows_the_figures():
    assert "waiting for each other takes 50 % of the time; without copies and allocations the loop is 2.00" in said()
    assert "One train_step_batch over 500 tokens is 100.0 times as fast" in said()
    assert "changes hardly anything (1.00 times)" in said(rates=(10, 10, 10, 1000))
    assert "less than this machine's figures vary" in said(rates=(10, 10, 5, 1000))
    assert "is no faster here" in said(rates=(10, 10, 10, 10))
    assert "T = 500 in a call gives 2.50 times" in said() and "raise max_tokens" in said()
    assert "no faster than T = 100 (1.00 times)" in said(short=1000)
    assert "5.00 times one stream: cut the text into streams" in said()
    assert "already fills this machine" in said(steady={"tok_s": 1000})


def test_advice_about_the_machine():
    assert "GPU is busy" not in said() and "of a core in consecutive" not in said() and "cores were busy" not in said()
    assert "The GPU is busy 40 % of the time" in said(steady={"gpu_percent": 40.0})
    assert 'takes 80 % of a core in consecutive steps: use sync="block"' in said(steady={"cpu_percent": 80.0})
    assert "50 % of the cores were busy" in said(machine={"busy_before_percent": 50.0})
    assert "The GPU is busy" not in said(steady={"gpu_percent": None})
    cpu = said(backend="cpu", no_gpu="no driver", steady={"cpu_percent": 200.0})
    assert "figures of the CPU backend (no driver)" in cpu and "sync=" not in cpu
