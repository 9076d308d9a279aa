"""The ladder: its rungs learn the same, allocate what they say, and their figures add up."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import neurogen_cy as ng
from neurogen_cy import allocations, gpu_watch, ladder, ladder_time, rungs, token_loop
from neurogen_cy.data import default_corpus

CFG = ng.Config(
    256, 32, (ng.Region("thalamus", 32, 0), ng.Region("broca", 64, 1)),
    (
        ng.Projection("embedding", "thalamus"), ng.Projection("thalamus", "broca"), ng.Projection("broca", "broca", 1),
        ng.Projection("broca", "broca_out"),
    ),
)  # fmt: skip
TEXT = default_corpus()[0][:20_000]
IDS = np.frombuffer(TEXT, np.uint8)[:25].astype(np.int32)
PLAN = ladder.Plan(
    tokens=(20, 50), row_seconds=0.05, count_seconds=5, steady_streams=4, steady_tokens=8, steady_seconds=0.1
)


def learnt(model, result):
    """Everything a step leaves behind, as bytes."""
    arrays = {key: view.numpy() for key, view in model.parameters().items()} | model.state()
    return result, model.step, {key: array.tobytes() for key, array in arrays.items()}


def test_the_ways_learn_the_same_bits(make_model):
    found = {}
    for way in (token_loop.COPIES, token_loop.POINTER, token_loop.BUFFERS):
        model = make_model(CFG)
        found[way] = learnt(model, token_loop.train_step(model, IDS[:-1], IDS[1:], way))
    assert found[token_loop.COPIES] == found[token_loop.POINTER] == found[token_loop.BUFFERS]
    untouched = make_model(CFG)
    assert found[token_loop.COPIES][2] != learnt(untouched, None)[2], "it must have learnt something"


@pytest.mark.parametrize("copies", [True, False])
def test_copies_chooses_the_way(make_model, monkeypatch, copies):
    model, seen = make_model(CFG, streams=2), []
    original = token_loop.train_step
    monkeypatch.setattr(token_loop, "train_step", lambda *args: seen.append(args[3]) or original(*args))
    ids = IDS[:24].reshape(2, 12)
    model.train_step(ids, ids, copies=copies)
    assert seen == [token_loop.COPIES if copies else token_loop.BUFFERS]


def test_a_pointer_shows_one_stream(make_model):
    model = make_model(CFG, streams=2)
    ids = IDS[:24].reshape(2, 12)
    with pytest.raises(ValueError, match="expected one stream"):
        token_loop.train_step(model, ids, ids, token_loop.POINTER)


def test_calls_and_waits_of_the_rungs(make_model):
    model = make_model(CFG, max_tokens=24)
    for rung, calls in ((0, 24), (1, 24), (2, 24), (3, 1)):
        with model.profile() as p:
            rungs.run(model, rung, IDS[:-1], IDS[1:])
        assert (p.calls, p.tokens) == (calls, 24)
        if model.backend == "cuda":
            assert p.counters["syncs"] == 1 if rung == 3 else p.counters["syncs"] >= 24
        assert p.counters["device_allocations"] == p.counters["host_allocations"] == 0


@pytest.fixture(scope="module")
def record():
    return ladder.measure(CFG, {"backend": "cpu", "threads": 1}, TEXT, PLAN, lambda line: None)


def test_rows(record):
    assert [(row["rung"], row["T"]) for row in record["rows"]] == [(rung, T) for T in (20, 50) for rung in range(4)]
    for row in record["rows"]:
        assert row["backend"] == "cpu" and row["B"] == 1 and row["syncs"] == row["launches"] == 0
        assert row["tok_s"] == pytest.approx(row["T"] / row["seconds"]) and row["cpu_percent"] > 0
        assert row["tok_s_spread"][0] <= row["tok_s"] * 1.001 and row["tok_s"] <= row["tok_s_spread"][1] * 1.001
        assert row["gpu_percent"] is None and 2 < row["loss"] < 6
    rate = {(row["rung"], row["T"]): row["tok_s"] for row in record["rows"]}
    assert rate[3, 50] > 2 * max(rate[0, 50], rate[1, 50], rate[2, 50])


def test_allocations_of_the_rungs(record):
    if record["no_allocation_counts"]:
        pytest.skip(record["no_allocation_counts"])
    for row in record["rows"]:
        rung = row["rung"]
        assert row["counted_tokens"] == row["T"] and row["native_allocs"] == 0
        assert row["host_allocs"] == row["python_allocs"] + row["array_allocs"] + row["native_allocs"]
        if rung == 3:
            assert row["array_allocs"] == 0 and 0 < row["host_alloc_bytes"] <= 100_000
            continue
        # Embedding, Broca's output and the word said; then one less; then none.
        assert row["array_allocs_per_token"] == (3, 2, 0)[rung] and row["native_allocs_per_token"] == 0
        assert row["host_copied_bytes"] >= row["T"] * 4 * CFG.dim
    of = {(row["rung"], row["T"]): row for row in record["rows"]}
    assert of[2, 20]["array_allocs"] == of[2, 50]["array_allocs"]
    assert of[1, 50]["host_copied_bytes"] == of[0, 50]["host_copied_bytes"] - 50 * 4 * CFG.dim


def test_time_adds_up(record):
    for row in record["rows"]:
        assert tuple(row["time"]) == ladder_time.PARTS and min(row["time"].values()) >= 0
        assert sum(row["time"].values()) == pytest.approx(row["seconds"], rel=0.05)
        assert row["time"]["learning"] > 0 and row["time"]["brain_decoder"] > 0 and not row["time"]["synchronisation"]
        assert (row["time"]["allocation"] > 0) == (row["rung"] < 2)


def test_steady(record):
    steady = record["steady"]
    assert (steady["B"], steady["T"]) == (4, 8) and steady["steps"] >= 1
    assert steady["tok_s"] == pytest.approx(steady["steps"] * 32 / steady["seconds"])
    assert steady["no_gpu_percent"] == "the model runs on the CPU"


def test_without_a_compiler_the_counts_are_empty(monkeypatch):
    def refuse(folder):
        raise allocations.Unavailable("no C compiler")

    monkeypatch.setattr(allocations, "environment", refuse)
    plan = ladder.Plan(
        tokens=(4,), row_seconds=0.001, count_seconds=1, steady_streams=1, steady_tokens=2, steady_seconds=0.001
    )
    found = ladder.measure(CFG, {"backend": "cpu"}, TEXT, plan, lambda line: None)
    assert found["no_allocation_counts"] == "no C compiler"
    assert all(row["host_allocs"] is None and row["tok_s"] > 0 for row in found["rows"])


def test_slow_loops_are_bounded(make_model):
    model, reader = make_model(CFG, max_tokens=64), rungs.Reader(rungs.text_tokens(TEXT, 256))
    assert rungs.tokens_within(model, 0, 64, reader, 1e-9) == rungs.WARM_TOKENS
    assert rungs.tokens_within(model, 0, 64, reader, 1e9) == 64
    assert rungs.tokens_within(model, 3, 64, reader, 1e-9) == 64


def test_text_and_windows():
    text = rungs.text_tokens(b"abcabdab", 256)
    assert text.tolist() == list(b"abcabdab")
    pairs = rungs.text_tokens(b"abcabdab", 32_000)
    assert len(pairs) == 7 and pairs[0] == pairs[3] == pairs[6] and len(set(pairs.tolist())) == 5
    assert pairs.max() < 32_000 and rungs.text_tokens(b"abc", 16).max() < 16
    reader = rungs.Reader(text)
    assert [array.tolist() for array in reader.take(3)] == [list(b"abc"), list(b"bca")]
    assert reader.take(3)[0].tolist() == list(b"abd") and reader.take(3)[0].tolist() == list(b"abc")
    ids, targets = rungs.Reader(text, 2).take(3)
    assert ids.tolist() == [list(b"abc"), list(b"bda")] and targets.tolist() == [list(b"bca"), list(b"dab")]
    with pytest.raises(ValueError, match="at least 10 tokens, got 8"):
        rungs.Reader(text, 2).take(4)
    with pytest.raises(ValueError, match="row_seconds: expected values > 0"):
        ladder.Plan(row_seconds=0)


# ---- looking at a GPU ----------------------------------------------------------------------------------------------


def fake_nvml(monkeypatch, percents, fails=None):
    """A pynvml that says these percentages one after the other, the last for ever."""
    seen, left = [], list(percents)

    def rates(handle):
        if fails:
            raise RuntimeError(fails)
        return SimpleNamespace(gpu=left.pop(0) if len(left) > 1 else left[0])

    module = SimpleNamespace(
        nvmlInit=lambda: None, nvmlDeviceGetHandleByIndex=seen.append, nvmlDeviceGetHandleByUUID=seen.append,
        nvmlDeviceGetUtilizationRates=rates,
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(gpu_watch, "INTERVAL", 0.01)
    monkeypatch.setattr(gpu_watch, "STALE", 0.02)
    return seen


def test_busy_by_nvml(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-7")
    seen = fake_nvml(monkeypatch, [1, 90, 90])
    with gpu_watch.GpuBusy(0) as busy:
        time.sleep(0.2)
    gpu_watch.GpuBusy(1)
    assert busy.percent == 90 and busy.reason is None and busy.cpu_s > 0 and seen == [3, "GPU-7"]


def test_busy_says_why_not(monkeypatch):
    fake_nvml(monkeypatch, [50], fails="Not Supported")
    assert gpu_watch.GpuBusy(0).reason == "NVML: Not Supported"
    fake_nvml(monkeypatch, [50])
    with gpu_watch.GpuBusy(0) as short:
        pass
    assert short.percent is None and "shorter than NVML's sampling" in short.reason
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "nvidia-ml-py is not installed" in gpu_watch.GpuBusy(0).reason


def test_device_clock_adds_kernels_and_copies(monkeypatch):
    def event(name, kind, us):
        return SimpleNamespace(name=name, device_type=kind, time_range=SimpleNamespace(start=1e6, end=1e6 + us))

    events = [event("run_brain", "gpu", 5e6), event("adam", "gpu", 1e6), event("Memcpy HtoD", "gpu", 2e6),
              event("cudaLaunchKernel", "cpu", 9e6)]  # fmt: skip

    class Trace:
        def __init__(self, activities):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def events(self):
            return events

    torch = SimpleNamespace(
        cuda=SimpleNamespace(is_available=lambda: True, init=lambda: None),
        profiler=SimpleNamespace(profile=Trace, ProfilerActivity=SimpleNamespace(CUDA=1)),
        autograd=SimpleNamespace(DeviceType=SimpleNamespace(CUDA="gpu")),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert gpu_watch.DeviceClock().seconds(lambda: None) == {"kernels": 6.0, "copies": 2.0}
    events.clear()
    clock = gpu_watch.DeviceClock()
    assert clock.seconds(lambda: None) is None and "saw no kernel" in clock.reason
    monkeypatch.setitem(sys.modules, "torch", None)
    clock = gpu_watch.DeviceClock()
    assert clock.seconds(lambda: None) is None and "not installed" in clock.reason


class Stub:
    """A clock that says the same of every call it makes: first what is heard, then the whole."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def seconds(self, body):
        body()
        return self.answers.pop(0)


@pytest.mark.parametrize("rung", [0, 3])
def test_time_on_a_device(make_model, monkeypatch, rung):
    """The arithmetic for a GPU, with a CPU model that claims to be on one."""
    model, reader = make_model(CFG, max_tokens=16), rungs.Reader(rungs.text_tokens(TEXT, 256))
    monkeypatch.setattr(model, "backend", "cuda")
    clock = Stub({"kernels": 1.0, "copies": 0.1}, {"kernels": 4.0, "copies": 0.5})
    parts, device_s = ladder_time.parts(model, rung, 16, 100.0, reader, clock)
    assert (parts["brain_decoder"], parts["learning"], parts["copying"]) == (1.0, 3.0, 0.5) and device_s == 4.5
    left = 100.0 - 4.5 - parts["allocation"] - parts["python"]  # the latter by the clock: all of it, where one stumbles
    assert parts["synchronisation"] == pytest.approx(max(0.0, left))
    parts, device_s = ladder_time.parts(model, rung, 16, 100.0, reader, Stub(None, None))
    assert parts["synchronisation"] is None and device_s is None


def test_the_page_runs():
    page = (Path(__file__).parent.parent / "docs" / "FROM_10.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    exec(compile(code, "FROM_10.md", "exec"), {})
    for name in ("ladder_cuda", "ladder_cpu", "ladder_time"):
        assert page.count(f"<!-- {name} -->") == page.count(f"<!-- /{name} -->") == 1
