"""One call on the GPU: what it costs, the device arrays it takes, and that a refused one leaves no trace."""

import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gpu_support import free_bytes, other_library
from test_determinism import CONFIG, STREAMS, V, batch, build, contents, train

import neurogen_cy as ng

pytestmark = pytest.mark.gpu
LIBRARIES = ("torch", "cupy")
foreign = pytest.mark.filterwarnings("default")  # what torch and cupy warn of is not ours


def difference(model, call):
    """What `call` adds to the model's counters."""
    before = model.counters
    call()
    return {name: count - before[name] for name, count in model.counters.items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("streams", STREAMS)
def test_a_train_step_waits_once_and_allocates_nothing(streams, precision):
    model = build("cuda", streams=streams, precision=precision)
    train(model, range(3))
    costs = [difference(model, lambda: train(model, [3])) for _ in range(5)]
    for cost in costs:
        assert (cost["syncs"], cost["device_allocations"], cost["host_allocations"]) == (1, 0, 0), cost
        assert cost["launches"] > 0 and cost == costs[0], "every step of one shape costs the same"
    tokens = streams * 6
    # ids and targets (4 bytes each), weights (4) and, where there are any, resets (1) go there; a verdict and the
    # regions' rates come back.
    assert 12 * tokens <= costs[0]["h2d_bytes"] <= 16 * tokens + 4096 and 0 < costs[0]["d2h_bytes"] <= 4096


def test_the_driver_confirms_one_launch_of_the_brain_and_one_wait(tmp_path):
    """CUPTI's list of every call into the driver during one warm train step of `base`."""
    script = Path(__file__).with_name("cupti_listing.py")
    folder = Path(os.environ.get("OUT", tmp_path))
    environment = {**os.environ, "PYTHONPATH": str(Path(ng.__file__).parents[1])}
    run = subprocess.run(
        [sys.executable, str(script), str(folder)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    counted = json.loads((folder / "launches.json").read_text())
    assert counted["brain_launches"] == 1, counted
    assert len(counted["waits"]) == 1, counted
    assert counted["allocations"] == [], counted
    assert counted["counters"]["syncs"] == 1 and counted["counters"]["device_allocations"] == 0


def on_device(library, array):
    if library.__name__ == "torch":
        return library.from_numpy(array).to("cuda")
    return library.asarray(array)


def synchronize(library):
    """torch's arrays do not say which stream writes them: whoever hands them over waits."""
    (library.cuda if library.__name__ == "torch" else library.cuda.Device()).synchronize()


@foreign
@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_device_arrays_teach_the_same_bits_as_host_arrays(name, dtype):
    library = other_library(name)
    here, there = build("cuda", streams=16), build("cuda", streams=16)
    for call in range(4):
        ids, targets, weights, resets = batch(call, 16)
        arrays = [ids.astype(dtype), targets.astype(dtype), weights, resets]
        device = [on_device(library, array) for array in arrays]
        synchronize(library)
        assert there.train_step_batch(*device) == here.train_step_batch(*arrays)
        mixed = (device[0], arrays[1], device[2], arrays[3])
        assert there.backward_batch(*mixed) == here.backward_batch(*arrays)
    assert contents(there) == contents(here)


@foreign
def test_the_model_waits_for_the_stream_that_still_writes():
    """CuPy names the stream in the interface: what it has queued there must have happened before ids are read."""
    cupy = other_library("cupy")
    ids, targets = batch(0, 16)[:2]
    expected = build("cuda", streams=16).train_step_batch(ids, targets)
    model = build("cuda", streams=16)
    source, late, big = cupy.asarray(ids), cupy.zeros(ids.shape, cupy.int32), cupy.ones((4096, 4096), cupy.float32)

    def write_late():
        for _ in range(20):  # 2 * 4096^3 operations each: tens of milliseconds in all
            cupy.matmul(big, big, out=work)
        late[...] = source

    work = cupy.empty_like(big)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        write_late()  # compiles what it needs
        stream.synchronize()
        late[...] = 0
        write_late()
        assert not stream.done, "the ids must still be under way for this to say something"
        assert model.train_step_batch(late, targets) == expected


@foreign
@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("which", ["ids", "targets"])
@pytest.mark.parametrize("wrong", [-1, V, 2**31 - 1, 2**32 + 5, -(2**32) + 5])  # the last two are 5 in 32 bits
def test_an_id_out_of_range_in_a_device_array_changes_nothing(name, which, wrong):
    library = other_library(name)
    model, spared = build("cuda", streams=16), build("cuda", streams=16)
    train(model, range(3)), train(spared, range(3))
    before = contents(model)
    arrays = {"ids": batch(3, 16)[0].astype(np.int64), "targets": batch(3, 16)[1].astype(np.int64)}
    arrays[which][11, 4] = wrong
    device = {key: on_device(library, array) for key, array in arrays.items()}
    synchronize(library)
    for call in (model.train_step_batch, model.backward_batch):
        with pytest.raises(IndexError, match=rf"\[11, 4\]: expected token ids in 0\.\.{V - 1}"):
            call(device["ids"], device["targets"])
        assert contents(model) == before
    assert train(model, range(3, 6)) == train(spared, range(3, 6))
    assert contents(model) == contents(spared)


@foreign
def test_a_wrong_weight_in_a_device_array_changes_nothing():
    library = other_library("torch")
    model = build("cuda", streams=16)
    train(model, range(2))
    before = contents(model)
    ids, targets, weights, _ = batch(2, 16)
    for wrong in (np.nan, np.inf, -1.0):
        weights[3, 2] = wrong
        device = on_device(library, weights)
        synchronize(library)
        with pytest.raises(ValueError, match="weights"):
            model.train_step_batch(ids, targets, device)
        assert contents(model) == before


def test_a_model_too_large_is_refused_with_its_plan_and_what_would_fit():
    cfg, streams, tokens = ng.Config.preset("base"), 2048, 2**19
    free = free_bytes()
    with pytest.raises(MemoryError) as refused:
        ng.NeuroGen(cfg, backend="cuda", streams=streams, max_tokens=tokens)
    assert free_bytes() == free, "nothing was allocated"
    message = str(refused.value)
    for part, size in ng.memory_plan(cfg, streams, tokens, "cuda").items():
        assert re.search(rf"{re.escape(part)} +{size / 2**20:,.1f} MiB", message), part
    fits = int(re.search(r"max_tokens=(\d+) is the largest that fits", message)[1])
    assert 1 <= fits < tokens
    small, large = (sum(ng.memory_plan(cfg, streams, n, "cuda").values()) for n in (fits, fits + 1))
    assert small <= free < large


def test_a_second_model_works_after_the_first_died():
    first = build("cuda")
    expected = train(first, range(3))
    del first
    gc.collect()
    assert train(build("cuda"), range(3)) == expected


def test_a_model_outlives_another_that_is_at_work():
    """Two models side by side, one dying in the middle: neither notices the other."""
    alone = train(build("cuda"), range(6))
    one, other = build("cuda"), build("cuda", seed=7)
    results = []
    for call in range(6):
        results += train(one, [call])
        if call == 3:
            del other
            gc.collect()
        elif call < 3:
            train(other, [call])
    assert results == alone


def test_a_refused_call_leaves_a_model_that_works():
    model, spared = build("cuda"), build("cuda")
    ids, targets = batch(0, 3)[:2]
    refusals = (
        (ValueError, lambda: model.train_step_batch(ids[:, :0], targets[:, :0])),
        (TypeError, lambda: model.train_step_batch(ids.astype(np.float32), targets)),
        (IndexError, lambda: model.train_step_batch(ids + V, targets)),
        (ValueError, lambda: ng.NeuroGen(CONFIG, backend="cuda", device=1000)),
    )
    for call, (error, body) in enumerate(refusals):
        with pytest.raises(error):
            body()
        assert train(model, [call]) == train(spared, [call])
    assert contents(model) == contents(spared)
