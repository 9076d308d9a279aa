"""A warm training step allocates nothing: not in the native library, and nothing lasting in Python."""

import gc
import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

import neurogen_cy as ng
from neurogen_cy import allocations

STEPS = 30

COUNT = f"""
import json, sys
import numpy as np, neurogen_cy as ng
from neurogen_cy.allocations import Counting

backend = sys.argv[2]
counting = Counting(f"neurogen_cy/_{{backend}}.")
cfg = ng.Config.preset("tiny", dropout=0.1)
threads = int(sys.argv[1])
rng = np.random.default_rng(0)
ids = rng.integers(0, 256, (16, 32)).astype(np.int32)
resets = rng.random(ids.shape) < 0.05
predictions = np.empty_like(ids)
models, kept = [], []
def build():
    models.append(ng.NeuroGen(cfg, backend=backend, streams=16, max_tokens=32, threads=threads))
built = counting.counted(build)
x, o = np.empty((16, 32, cfg.dim), np.float32), np.empty((16, cfg.dim), np.float32)
def train(steps):
    for _ in range(steps):
        models[0].train_step_batch(ids, ids, resets=resets, predictions_out=predictions)
        models[0].embedding.encode_into(ids, x)
        models[0].brain.broca_output_into(o)
train(5)
before = models[0].counters["host_allocations"]
print(json.dumps({{
    "built": built,
    "nothing": counting.counted(lambda: None),
    "bytes": counting.counted(lambda: kept.append(bytearray(1 << 24))),
    "arrays": counting.counted(lambda: kept.extend((np.empty(4, np.float32), np.zeros(1 << 20, np.float32)))),
    "encoded": counting.counted(lambda: models[0].embedding.encode_into(ids, x)),
    "trained": counting.counted(lambda: train({STEPS})),
    "counter": models[0].counters["host_allocations"] - before,
}}))
"""


def counted(tmp_path, backend, threads):
    try:
        environment = allocations.environment(tmp_path)
    except allocations.Unavailable as reason:
        pytest.skip(str(reason))
    command = [sys.executable, "-c", COUNT, str(threads), backend]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("threads", [1, 2])
def test_no_native_allocation_in_a_step(tmp_path, threads):
    counts = counted(tmp_path, "cpu", threads)
    assert counts["built"]["native_allocs"] >= 2, "the hooks must see the arenas of a model being built"
    nothing = counts["nothing"]
    assert nothing.pop("python_allocs") <= 1 and nothing.pop("python_bytes") < 1024  # CPython 3.10: the call's frame
    assert set(nothing.values()) == {0}, "counting itself must not be counted"
    assert counts["bytes"]["python_bytes"] >= 1 << 24 and counts["bytes"]["all_native_allocs"] == 0
    assert (counts["arrays"]["array_allocs"], counts["arrays"]["array_bytes"]) == (2, 16 + (4 << 20))
    rows = 16 * 32  # embeddings, each copied by one memcpy
    assert (counts["encoded"]["copies"], counts["encoded"]["copied_bytes"]) == (rows, rows * 128 * 4)
    trained = counts["trained"]
    assert trained["native_allocs"] == 0 and trained["array_allocs"] == 0
    assert trained["python_allocs"] >= STEPS, "a step's result is an object at least"
    assert counts["counter"] == 0


@pytest.mark.gpu
def test_no_native_allocation_in_a_step_of_a_gpu(tmp_path):
    counts = counted(tmp_path, "cuda", 1)
    assert counts["built"]["native_allocs"] >= 2, "the hooks must see a model being built"
    trained = counts["trained"]
    assert (trained["native_allocs"], trained["array_allocs"], counts["counter"]) == (0, 0, 0), trained


def test_counting_needs_the_hooks(tmp_path, monkeypatch):
    with pytest.raises(allocations.Unavailable, match="not started with the allocation hooks"):
        allocations.Counting("neurogen_cy/_cpu.")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(allocations.Unavailable, match="no C compiler"):
        allocations.environment(tmp_path)


def test_python_heap_does_not_grow():
    cfg = ng.Config.preset("tiny")
    model = ng.NeuroGen(cfg, backend="cpu", streams=2, max_tokens=4, threads=1)
    ids = np.zeros((2, 4), np.int32)
    for _ in range(50):
        model.train_step_batch(ids, ids)
    gc.collect()
    tracemalloc.start()
    try:
        model.train_step_batch(ids, ids)
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(1000):
            model.train_step_batch(ids, ids)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (after - before) / 1000 <= 100
