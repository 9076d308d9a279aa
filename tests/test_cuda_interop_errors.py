"""Device arrays that a call refuses, and errors that only the device sees: clear, and without a trace."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from device_libraries import library
from gpu_support import other_library
from test_cuda_interop import B, arrays, each_library, same, waits
from test_determinism import D, V, batch, build, contents, train

import neurogen_cy as ng

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]  # what the libraries warn of is not ours


@each_library
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("wrong", [-1, V, 2**31 - 1])
def test_a_wrong_id_is_a_row_of_nan_and_the_next_waits_error(name, dtype, wrong):
    lib, m, spared = library(name), build("cuda"), build("cuda")
    train(m, range(2)), train(spared, range(2))
    before, ids = contents(m), np.array([1, wrong, 2], dtype)
    out = lib.put(np.zeros((B, D), np.float32))
    m.embedding.encode_into(lib.put(ids), out)
    m.brain.step(lib.put(arrays()[0]))  # until the error is heard nothing changes
    rows = lib.get(out)
    assert np.isnan(rows[1]).all() and same([rows[::2]], [m.parameters()["embedding.weight"].numpy()[1:3]])
    with pytest.raises(IndexError, match=rf"ids of encode_into .*element 1: expected token ids in 0\.\.{V - 1}"):
        m.train_step_batch(*batch(2, B))
    assert contents(m) == before
    with pytest.raises(IndexError, match="ids"):  # with an array of the host: at once, and nothing is written
        m.embedding.encode_into(lib.put(ids), rows)
    assert np.isnan(rows[1]).all()
    assert train(m, range(2, 4)) == train(spared, range(2, 4)) and contents(m) == contents(spared)


@each_library
def test_values_that_are_not_finite_are_heard_of(name):
    lib, m, spared = library(name), build("cuda"), build("cuda")
    wrong = arrays()[0]
    wrong[1, 5] = np.inf
    said = lib.put(np.zeros(B, np.int32))
    before = contents(m)
    for leave, message in (
        (lambda: m.brain.step(lib.put(wrong)), r"x of step .*\[1, 5\]: expected finite values"),
        (lambda: m.decoder.sample_into(lib.put(wrong), said), r"broca of sample_into .*\[1, 5\]: expected finite"),
    ):
        assert waits(m, leave) == 0
        with pytest.raises(ValueError, match=message):
            m.brain.broca_output()
        m.brain.broca_output()  # said once
        assert contents(m) == before
    with pytest.raises(ValueError, match="broca of sample_into"):
        m.decoder.sample_into(lib.put(wrong), np.zeros(B, np.int32))
    with pytest.raises(OverflowError, match="neuron state of step"):
        m.brain.step(lib.put(np.full((B, D), 3e38, np.float32)))
        m.brain.broca_output()
    assert contents(m) == before
    assert train(m, range(3)) == train(spared, range(3))


class Shown:
    """Facts of another's array, some of them changed."""

    def __init__(self, array, **changed):
        self.array = array
        self.__cuda_array_interface__ = {**array.__cuda_array_interface__, **changed}


@each_library
def test_arrays_that_are_not_what_they_say(name):
    lib, m = library(name), build("cuda")
    host = arrays()
    before = contents(m)
    x, out = lib.put(host[0]), lib.put(host[2])
    address, host_address = lib.address(x), host[0].ctypes.data
    step, broca, logits = m.brain.step, m.brain.broca_output_into, lambda array: m.decoder.logits_into(array, out)
    cases = [
        (step, Shown(x, data=(host_address, False)), TypeError, "x: .*device 0, got an address .*: host memory, or"),
        (step, Shown(x, data=(address + 2, False)), ValueError, "x: expected the address of float32 values"),
        (step, Shown(x, strides=(4, 12)), ValueError, "x: expected a C-contiguous array"),
        (step, Shown(x, typestr="<f8"), TypeError, "x: expected dtype float32, got float64"),
        (step, Shown(x, shape=(B, D + 1), strides=None), ValueError, "x: expected shape"),
        (step, Shown(x, shape=(B,), strides=None), ValueError, "x: expected shape"),
        (broca, Shown(x, data=(address, True)), ValueError, "out: expected a writable array, got a read-only one"),
        (logits, Shown(x, data=(lib.address(out), False)), ValueError, "out: expected memory apart from broca"),
    ]
    for call, array, error, message in cases:
        with pytest.raises(error, match=message):
            call(array)
        assert contents(m) == before
    assert m.train_step_batch(*batch(0, B)) == build("cuda").train_step_batch(*batch(0, B))


def test_memory_that_ends_too_soon_is_freed_or_anothers():
    cupy, m = other_library("cupy"), build("cuda")
    memory = cupy.cuda.Memory(1 << 21)  # outside the pool: an allocation of its own
    inside = cupy.ndarray((B, D), cupy.float32, cupy.cuda.MemoryPointer(memory, (1 << 21) - 8 * D))
    facts = {**inside.__cuda_array_interface__}
    with pytest.raises(ValueError, match=r"x: expected 768 bytes .*got 512 from its address to the end"):
        m.brain.step(inside)
    del inside, memory
    gone = type("Gone", (), {"__cuda_array_interface__": facts})()
    with pytest.raises(TypeError, match="x: expected memory of device 0, got an address that the driver does not know"):
        m.brain.step(gone)
    mapped = cupy.cuda.alloc_pinned_memory(4 * B * D)
    pinned = type("Pinned", (), {"__cuda_array_interface__": {**facts, "data": (mapped.ptr, False)}})()
    with pytest.raises(TypeError, match="x: expected memory of device 0, got host memory"):
        m.brain.step(pinned)
    for other in range(1, cupy.cuda.runtime.getDeviceCount()):
        with cupy.cuda.Device(other):
            far = cupy.zeros((B, D), cupy.float32)
        with pytest.raises(ValueError, match=f"x: expected memory of device 0, got memory of device {other}"):
            m.brain.step(far)


@each_library
def test_a_cpu_model_takes_no_device_arrays(name):
    lib, m = library(name), build("cpu")
    x, out = lib.put(arrays()[0]), lib.put(arrays()[2])
    for call in (
        lambda: m.brain.step(x),
        lambda: m.brain.broca_output_into(x),
        lambda: m.decoder.logits_into(arrays()[1], out),
        lambda: m.train_step_batch(lib.put(batch(0, B)[0]), batch(0, B)[1]),
    ):
        with pytest.raises(TypeError, match="expected a host array for a model on the cpu backend, got an array in"):
            call()


AUTOINIT = """
import numpy as np, pycuda.autoinit, pycuda.gpuarray as gpuarray, neurogen_cy as ng
model = ng.NeuroGen(ng.Config.preset("tiny"), backend="cuda", max_tokens=4)
x = gpuarray.to_gpu(np.ones((1, model.config.dim), np.float32))
try:
    model.brain.step(x)
except ValueError as error:
    print("refused:", error)
ids = np.array([1, 2, 3], np.int32)
print("host arrays:", np.isfinite(model.train_step_batch(ids, ids).loss))
print("their context:", (x.get() == 1).all(), (gpuarray.to_gpu(ids).get() == ids).all())
"""


def test_autoinit_of_pycuda_is_refused_with_the_way_out():
    other_library("pycuda")
    paths = [str(Path(ng.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    run = subprocess.run([sys.executable, "-c", AUTOINIT], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert re.search("refused: x: expected memory of device 0 in its primary .*pycuda.autoprimaryctx", run.stdout)
    assert "host arrays: True" in run.stdout and "their context: True True" in run.stdout
