"""A warm training step allocates nothing: not in the native library, and nothing lasting in Python."""

import gc
import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import neurogen_cy as ng

HOOK = Path(__file__).with_name("allocation_hook.c")
STEPS = 100

COUNT = f"""
import ctypes, json, sys
import numpy as np, neurogen_cy as ng

hook = ctypes.CDLL(None)
def counted(body):
    out = (ctypes.c_long * 2)()
    hook.allocation_hook_start(b"_cpu.")
    body()
    hook.allocation_hook_stop(out)
    return list(out)

cfg = ng.Config.preset("tiny", dropout=0.1)
threads = int(sys.argv[1])
rng = np.random.default_rng(0)
ids = rng.integers(0, 256, (16, 32)).astype(np.int32)
resets = rng.random(ids.shape) < 0.05
predictions = np.empty_like(ids)
models = []
def build():
    models.append(ng.NeuroGen(cfg, backend="cpu", streams=16, max_tokens=32, threads=threads))
built = counted(build)
def train(steps):
    for _ in range(steps):
        models[0].train_step_batch(ids, ids, resets=resets, predictions_out=predictions)
        models[0].embedding.encode_into(ids, x)
        models[0].brain.broca_output_into(o)
x, o = np.empty((16, 32, cfg.dim), np.float32), np.empty((16, cfg.dim), np.float32)
train(5)
before = models[0].counters["host_allocations"]
control = counted(lambda: bytearray(1 << 24))
print(json.dumps({{"built": built, "control": control, "trained": counted(lambda: train({STEPS})),
                  "counter": models[0].counters["host_allocations"] - before}}))
"""


@pytest.mark.parametrize("threads", [1, 2])
def test_no_native_allocation_in_a_step(tmp_path, threads):
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to build the allocation hook with")
    library = tmp_path / "allocation_hook.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, HOOK, "-ldl"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    command = [sys.executable, "-c", COUNT, str(threads)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    counts = json.loads(run.stdout)
    assert counts["built"][0] >= 2, "the hook must see the arenas of a model being built"
    assert counts["control"] == [0, 1], "the hook must see an allocation of the interpreter, and whose it is"
    assert counts["trained"][0] == 0
    assert counts["counter"] == 0


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
