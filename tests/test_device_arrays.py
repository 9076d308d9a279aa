"""Arrays in CUDA memory: what a model on the GPU takes of them and refuses, and that the CPU takes none.

The memory is that of another model's parameters, so this needs no library of device arrays.
"""

import numpy as np
import pytest
from test_bad_input import IDS, B, D, T, V, X, check_refusal, generate, load, train, trained

import neurogen_cy as ng

ON_CPU = "expected a host array for a model on the cpu backend, got "
ON_GPU = r"expected a host array \(this call takes no device arrays\), got "


class Shown:
    """What a device array shows of itself; a fact that is None is not there."""

    def __init__(self, **changed):
        facts = {"shape": (B, T), "typestr": "<i4", "data": (256, False), "version": 3, **changed}
        self.__cuda_array_interface__ = {name: fact for name, fact in facts.items() if fact is not None}


class Unwilling:
    """A device array that does not show its memory, as a torch tensor that requires a gradient."""

    @property
    def __cuda_array_interface__(self):
        raise RuntimeError("not while it requires a gradient")


class DevicePack:
    """A DLPack array in CUDA memory (device type 2) that does not give it."""

    def __dlpack__(self, **options):
        raise BufferError("asked for its memory")

    def __dlpack_device__(self):
        return 2, 0


def host_only(where):
    """Device arrays where only host arrays are taken."""
    device = where + r"an array in CUDA device memory \(Shown\)"
    return {
        "broca.o": (load(broca_o=Shown(shape=(B, D), typestr="<f4")), TypeError, device),
        "prompts[0]": (generate([Shown()]), TypeError, device),
        "prompts[0] DLPack": (generate([DevicePack()]), TypeError, where + "a DLPack array on device type 2"),
    }


CPU_CALLS = {
    "ids": (train(Shown()), TypeError, ON_CPU + r"an array in CUDA device memory \(Shown\)"),
    "ids unwilling": (train(Unwilling()), TypeError, ON_CPU + "an array in CUDA device memory"),
    "ids DLPack": (train(DevicePack()), TypeError, ON_CPU + "a DLPack array on device type 2"),
    "weights": (train(weights=Shown(typestr="<f4")), TypeError, ON_CPU + "an array in CUDA device memory"),
    "predictions_out": (train(predictions_out=Shown()), TypeError, ON_CPU + "an array in CUDA device memory"),
    "out": (lambda m: m.embedding.encode_into(IDS, Shown()), TypeError, ON_CPU + "an array in CUDA device memory"),
    "x": (lambda m: m.brain.step(Shown()), TypeError, ON_CPU + "an array in CUDA device memory"),
    "stream": (lambda m: m.brain.step(X, stream=1), ValueError, "expected None for a model on the cpu backend, got 1"),
    **host_only(ON_CPU),
}
DTYPE = "expected dtype int32 or int64, got "
ADDRESS = "expected the address of int32 values in device memory, got "
STREAM = "expected stream 1 .* or the address of one, got "
GPU_CALLS = {
    "ids unwilling": (train(Unwilling()), TypeError, "got Unwilling: RuntimeError.*not while it requires"),
    "ids no typestr": (train(Shown(typestr=None)), TypeError, "__cuda_array_interface__, got Shown: KeyError.*typestr"),
    "ids version 1": (train(Shown(version=1)), TypeError, "of version 2 or 3 without a mask, got version 1"),
    "ids mask": (train(Shown(mask=Shown())), TypeError, "without a mask, got version 3 with a mask"),
    "ids float32": (train(Shown(typestr="<f4")), TypeError, DTYPE + "float32"),
    "ids big-endian": (train(Shown(typestr=">i4")), TypeError, DTYPE + "big-endian '>i4'"),
    "ids transposed": (train(Shown(strides=(4, 8))), ValueError, r"C-contiguous .* \(2, 3\) with strides \(4, 8\)"),
    "ids empty": (train(Shown(shape=(B, 0))), ValueError, r"expected at least one element, got shape \(2, 0\)"),
    "ids shape": (train(Shown(shape=(T, B))), ValueError, r"expected shape \[2, T\] .*, got \(3, 2\)"),
    "ids nowhere": (train(Shown(data=(0, False))), ValueError, ADDRESS + "0x0"),
    "ids odd address": (train(Shown(data=(258, False))), ValueError, ADDRESS + "0x102"),
    "ids stream 0": (train(Shown(stream=0)), ValueError, STREAM + "0"),
    "ids stream str": (train(Shown(stream="1")), ValueError, STREAM + "'1'"),
    "targets int16": (train(targets=Shown(typestr="<i2")), TypeError, DTYPE + "int16"),
    "targets shape": (train(targets=Shown(shape=(B, 2))), ValueError, r"expected shape \(2, 3\), got \(2, 2\)"),
    "weights float64": (train(weights=Shown(typestr="<f8")), TypeError, "expected dtype float32, got float64"),
    "resets int32": (train(resets=Shown()), TypeError, "expected dtype bool or uint8, got int32"),
    "ids DLPack": (train(DevicePack()), TypeError, "got DevicePack: BufferError.*asked for its memory"),
    "ids of nobody": (train(Shown()), TypeError, "expected memory of device 0, got an address that the driver"),
    "ids strides": (train(Shown(strides=(4,))), ValueError, r"expected a stride for every axis, got .*\(4,\)"),
    "ids negative": (train(Shown(shape=(-1, T))), ValueError, r"expected extents of an array .*, got shape \(-1, 3\)"),
    "ids huge": (train(Shown(shape=(2**40, 2**40))), ValueError, "expected extents of an array in memory, got shape"),
    "predictions_out read-only": (train(predictions_out=Shown(data=(256, True))), ValueError, "writable.*read-only"),
    "predictions_out int64": (train(predictions_out=Shown(typestr="<i8")), TypeError, "dtype int32, got int64"),
    "out float64": (lambda m: m.embedding.encode_into(IDS, Shown(typestr="<f8")), TypeError, "float32, got float64"),
    "out shape": (lambda m: m.brain.broca_output_into(Shown(typestr="<f4")), ValueError, r"\(2, 32\), got \(2, 3\)"),
    "x int32": (lambda m: m.brain.step(Shown()), TypeError, "expected dtype float32, got int32"),
    "stream list": (lambda m: m.brain.step(X, stream=[]), TypeError, "expected None, the address .*, got list"),
    "stream negative": (lambda m: m.brain.step(X, stream=-1), ValueError, "expected None, the address .*, got -1"),
    **host_only(ON_GPU),
}


@pytest.mark.parametrize("name", CPU_CALLS)
def test_the_cpu_takes_no_device_arrays(name):
    check_refusal("cpu", name, *CPU_CALLS[name])


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_CALLS)
def test_the_gpu_refuses(name):
    check_refusal("cuda", name, *GPU_CALLS[name])


@pytest.fixture
def memory():
    """A function that puts an array into device memory and shows it there."""
    keepers = []

    def put(array, **changed):
        """Its bits become parameters of a model: float32 numbers, most of them tiny."""
        bits = np.zeros((-(-array.nbytes // (4 * D)), D), np.float32)
        bits.ravel().view(np.uint8)[: array.nbytes] = array.ravel().view(np.uint8)
        cfg = ng.Config(
            len(bits), D, (ng.Region("r", 32, 0),), (ng.Projection("embedding", "r"), ng.Projection("r", "broca_out"))
        )
        keepers.append(ng.NeuroGen(cfg, backend="cuda", max_tokens=1))
        keepers[-1].load_parameters({"embedding.weight": bits})
        facts = keepers[-1].parameters()["embedding.weight"].__cuda_array_interface__
        return Shown(**{**facts, "shape": array.shape, "typestr": array.dtype.str, **changed})

    return put


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("stream", [None, 1, 2])
def test_device_arrays_train_as_host_arrays_do(memory, dtype, stream):
    ids, targets, resets = IDS.astype(dtype), (IDS + 1).astype(dtype), IDS == 2
    weights = np.linspace(0, 1, IDS.size, dtype=np.float32).reshape(IDS.shape)
    expected = trained("cuda").train_step_batch(ids, targets, weights, resets)
    arrays = [memory(a, stream=stream) for a in (ids, targets, weights, resets)]
    assert trained("cuda").train_step_batch(*arrays) == expected
    arrays[1].__cuda_array_interface__["strides"] = targets.strides
    arrays[2] = memory(weights, version=2)
    assert trained("cuda").train_step_batch(ids, *arrays[1:3], resets) == expected
    expected = trained("cuda").backward_batch(ids, targets, weights, resets)
    assert trained("cuda").backward_batch(*arrays[:2], weights, arrays[3]) == expected


@pytest.mark.gpu
def test_views_show_device_memory():
    m = trained("cuda")
    views = {**m.parameters(), **{f"gradient of {key}": view for key, view in m.gradients().items()}}
    for key, view in views.items():
        if key.endswith((".rows", ".cols")):
            assert np.array_equal(np.asarray(view), view.numpy())  # of the host
            continue
        facts = view.__cuda_array_interface__
        assert (facts["version"], facts["typestr"], facts["shape"], facts["strides"]) == (3, "<f4", view.shape, None)
        assert facts["data"][0] > 0 and facts["data"][1] == view.readonly != key.startswith("gradient")
        assert facts["stream"] > 2
        with pytest.raises(TypeError, match=r"expected a host array, .*its \.numpy\(\) is a host copy"):
            np.asarray(view)
        with pytest.raises(TypeError):
            memoryview(view)
    row, table = m.embedding.row_view(V - 1), m.parameters()["embedding.weight"]
    assert row.shape == (D,) and row.readonly and np.array_equal(row.numpy(), table.numpy()[-1])
    m.train_step_batch(IDS + 10, IDS)
    assert np.array_equal(row.numpy(), table.numpy()[-1])
