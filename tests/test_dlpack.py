"""DLPack in and out, and what device arrays say of themselves, without a device: capsules are made and read here."""

import ctypes
import gc
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import neurogen_cy as ng
from neurogen_cy import _cpu

CONFIG = ng.Config.preset("tiny")


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("kind", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]  # fmt: skip


Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class Old(ctypes.Structure):
    _fields_ = [("tensor", Tensor), ("owner", ctypes.c_void_p), ("deleter", Deleter)]


class New(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("owner", ctypes.c_void_p), ("deleter", Deleter),
        ("flags", ctypes.c_uint64), ("tensor", Tensor),
    ]  # fmt: skip


new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype, new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class Exporter:
    """A DLPack exporter of memory that is nowhere; counts deletions."""

    def __init__(self, versioned=True, shape=(2, 3), strides=None, flags=0, major=1, **facts):
        extents = ctypes.c_int64 * len(shape)
        self.shape, self.strides = extents(*shape), extents(*strides) if strides else None
        facts = {"data": 4096, "device_type": 2, "ndim": len(shape), "kind": 2, "bits": 32, "lanes": 1, **facts}
        tensor = Tensor(shape=self.shape, strides=self.strides, **facts)
        self.deleted, self.asked = 0, []
        self.deleter = Deleter(self.delete)
        self.versioned, self.device_type = versioned, facts["device_type"]
        if versioned:
            self.managed = New(major=major, deleter=self.deleter, flags=flags, tensor=tensor)
        else:
            self.managed = Old(tensor=tensor, deleter=self.deleter)

    def delete(self, managed):
        assert managed == ctypes.addressof(self.managed)
        self.deleted += 1

    def __dlpack__(self, *, stream, **options):
        if not self.versioned and options:
            raise TypeError("no max_version before version 1")
        self.asked.append(stream)
        name = b"dltensor_versioned" if self.versioned else b"dltensor"
        return new_capsule(ctypes.addressof(self.managed), name, None)

    def __dlpack_device__(self):
        return 2, 0


@pytest.mark.parametrize("versioned", [False, True])
def test_a_capsule_is_taken_and_given_back_once(versioned):
    source = Exporter(versioned, byte_offset=64)
    facts = _cpu.device_array_facts(source)
    assert facts == {"shape": (2, 3), "dtype": "float32", "data": 4160, "bytes": 24, "readonly": False, "stream": None}
    assert source.deleted == 1 and source.asked == [-1]


def test_what_capsules_say():
    facts = _cpu.device_array_facts
    assert facts(Exporter(strides=(3, 1)))["shape"] == (2, 3)
    assert facts(Exporter(shape=(1, 3), strides=(99, 1)))["bytes"] == 12
    assert facts(Exporter(kind=0, bits=64))["dtype"] == "int64" and facts(Exporter(kind=6, bits=8))["dtype"] == "bool"
    assert facts(Exporter(flags=1))["readonly"] and not facts(Exporter(flags=2))["readonly"]
    assert facts(Exporter(shape=()))["bytes"] == 4


BAD = {
    "read-only": ({"flags": 1}, ValueError, "a: expected a writable array, got a read-only one"),
    "strides": ({"strides": (1, 2)}, ValueError, r"C-contiguous array, got shape \(2, 3\) with strides \(4, 8\)"),
    "empty": ({"shape": (0, 3)}, ValueError, "expected at least one element"),
    "negative": ({"shape": (-2, 3)}, ValueError, "expected extents of an array"),
    "null": ({"data": 0}, ValueError, "expected the address of float32 values in device memory, got 0x0"),
    "odd": ({"byte_offset": 2}, ValueError, "got 0x1002"),
    "float64": ({"bits": 64}, TypeError, "expected dtype .*, got float64"),
    "bfloat16": ({"kind": 4, "bits": 16}, TypeError, "expected dtype .*, got bfloat16"),
    "vectors": ({"lanes": 4}, TypeError, "got float32 in vectors of 4"),
    "unknown": ({"kind": 17}, TypeError, "got DLPack type 17 of bits 32"),
    "version 2": ({"major": 2}, TypeError, r"DLPack version 2\.0"),
    "host memory": ({"device_type": 1}, TypeError, r"on a CUDA device \(type 2\), got a capsule of device type 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_capsule_that_does_not_fit_is_refused_and_given_back(name):
    changed, error, message = BAD[name]
    source = Exporter(**changed)
    with pytest.raises(error, match=message):
        _cpu.device_array_facts(source, "a", writable=True)
    gc.collect()
    assert source.deleted == 1


def test_what_is_no_capsule_of_an_array_is_refused():
    for given in (None, new_capsule(4096, b"used_dltensor", None)):
        source = SimpleNamespace(__dlpack__=lambda given=given, **_: given, __dlpack_device__=lambda: (2, 0))
        with pytest.raises(TypeError, match="a: expected a DLPack array on a CUDA device, got Simple.*: TypeError"):
            _cpu.device_array_facts(source, "a")


@pytest.fixture(scope="module")
def model():
    m = ng.NeuroGen(CONFIG, "cpu", max_tokens=4, threads=1)
    m.backward_batch(np.array([1, 2, 3], np.int32), np.array([2, 3, 4], np.int32))
    return m


def test_views_leave_by_dlpack_without_a_copy(model):
    for key, view in {**model.parameters(), **{f"gradient of {k}": v for k, v in model.gradients().items()}}.items():
        array = np.from_dlpack(view)
        assert array.ctypes.data == np.asarray(view).ctypes.data and array.dtype == view.dtype, key
        assert array.shape == view.shape and array.flags.writeable != view.readonly, key
        assert view.__dlpack_device__() == (1, 0)


def test_torch_writes_into_a_gradient(model):
    torch = pytest.importorskip("torch")
    for key, view in model.gradients().items():
        torch.from_dlpack(view).fill_(0.5)
        assert (view.numpy() == 0.5).all(), key


@pytest.mark.parametrize("versioned", [False, True])
def test_the_capsule_is_laid_out_as_the_standard_says(model, versioned):
    view = model.gradients()["decoder.weight"]
    owned = sys.getrefcount(view)
    capsule = view.__dlpack__(max_version=(1, 1) if versioned else None)
    name, kind = (b"dltensor_versioned", New) if versioned else (b"dltensor", Old)
    managed = kind.from_address(pointer_of(capsule, name))
    tensor = managed.tensor
    assert tensor.data == np.asarray(view).ctypes.data and (tensor.device_type, tensor.device) == (1, 0)
    assert (tensor.kind, tensor.bits, tensor.lanes, tensor.ndim, tensor.byte_offset) == (2, 32, 1, 2, 0)
    assert tuple(tensor.shape[:2]) == view.shape and tuple(tensor.strides[:2]) == (view.shape[1], 1)
    assert not versioned or (managed.major, managed.flags) == (1, 0)
    assert sys.getrefcount(view) == owned + 1
    del capsule
    assert sys.getrefcount(view) == owned, "nobody took it: deleted with the capsule"


def test_a_read_only_view_says_so_or_stays(model):
    view = model.parameters()["broca.kappa"]
    capsule = view.__dlpack__(max_version=(1, 0))
    assert New.from_address(pointer_of(capsule, b"dltensor_versioned")).flags == 1
    with pytest.raises(BufferError, match="broca.kappa: this view is read-only"):
        view.__dlpack__()
    gradient = model.gradients()["decoder.bias"]
    for options in ({"copy": True}, {"dl_device": (2, 0)}):
        with pytest.raises(BufferError, match="decoder.bias: expected"):
            gradient.__dlpack__(**options)
    with pytest.raises(ValueError, match="decoder.bias: expected stream None for memory of the host, got 1"):
        gradient.__dlpack__(stream=1)


def test_streams_by_any_name():
    handle = _cpu.stream_handle
    assert (handle(0), handle(1), handle(2), handle(4096)) == (1, 1, 2, 4096)
    for stream in (
        SimpleNamespace(cuda_stream=4096), SimpleNamespace(ptr=4096), SimpleNamespace(handle=4096),
        SimpleNamespace(handle=ctypes.c_void_p(4096)), SimpleNamespace(__cuda_stream__=lambda: (0, 4096)),
    ):  # fmt: skip
        assert handle(stream) == 4096
    assert handle(SimpleNamespace(handle=ctypes.c_void_p(0))) == handle(SimpleNamespace(cuda_stream=0)) == 1
    for wrong in (True, -1, 2**64):
        with pytest.raises(ValueError, match="stream: expected None, the address of a CUDA stream"):
            handle(wrong)
    for wrong in ("1", 1.5, object(), SimpleNamespace(ptr="x")):
        with pytest.raises(TypeError, match="stream: expected None, the address of a CUDA stream"):
            handle(wrong)
