"""The libraries of device arrays behind one face: torch, CuPy, Numba, PyCUDA. A test skips where one is absent."""

import functools

import numpy as np
from gpu_support import other_library

from neurogen_cy import backend as backends

SLEEP = 600_000_000  # clock cycles: a third of a second


class Torch:
    def __init__(self):
        self.torch = other_library("torch")

    def put(self, values):
        return self.torch.from_numpy(values.copy()).to("cuda")

    def get(self, array):
        return array.cpu().numpy()

    def address(self, array):
        return array.data_ptr()

    def stream(self):
        return self.torch.cuda.Stream()

    def copy(self, to, source, stream):
        with self.torch.cuda.stream(stream):
            to.copy_(source, non_blocking=True)

    def views(self, view):
        """Arrays over a view of a model, by every protocol the library knows."""
        return [self.torch.from_dlpack(view), self.torch.as_tensor(view, device="cuda")]

    def write(self, array, values):
        array.copy_(self.put(values))


class CuPy:
    def __init__(self):
        self.cupy = other_library("cupy")

    def put(self, values):
        return self.cupy.asarray(values)

    def get(self, array):
        return array.get()

    def address(self, array):
        return array.data.ptr

    def stream(self):
        return self.cupy.cuda.Stream(non_blocking=True)

    def copy(self, to, source, stream):
        with stream:
            to[...] = source

    def views(self, view):
        return [self.cupy.from_dlpack(view), self.cupy.asarray(view)]

    def write(self, array, values):
        array[...] = self.put(values)


class Numba:
    def __init__(self):
        self.cuda = other_library("numba.cuda")

    def put(self, values):
        return self.cuda.to_device(values)

    def get(self, array):
        return array.copy_to_host()

    def address(self, array):
        return array.__cuda_array_interface__["data"][0]

    def stream(self):
        return self.cuda.stream()

    def copy(self, to, source, stream):
        to.copy_to_device(source, stream=stream)

    def views(self, view):
        return [self.cuda.as_cuda_array(view)]

    def write(self, array, values):
        array.copy_to_device(values)


class PyCUDA:
    def __init__(self):
        other_library("pycuda.autoprimaryctx")
        self.driver, self.gpuarray = other_library("pycuda.driver"), other_library("pycuda.gpuarray")

    def put(self, values):
        return self.gpuarray.to_gpu(values)

    def get(self, array):
        return array.get()

    def address(self, array):
        return int(array.gpudata)

    def stream(self):
        return self.driver.Stream()

    def copy(self, to, source, stream):
        self.driver.memcpy_dtod_async(to.gpudata, source.gpudata, source.nbytes, stream)

    def views(self, view):
        facts = view.__cuda_array_interface__
        return [self.gpuarray.GPUArray(facts["shape"], np.dtype(facts["typestr"]), gpudata=facts["data"][0])]

    def write(self, array, values):
        array.set(values)


NAMES = {"torch": Torch, "cupy": CuPy, "numba": Numba, "pycuda": PyCUDA}


@functools.cache
def library(name):
    return NAMES[name]()


class Busy:
    """Keeps a stream at work for a while; `done` says whether it still is."""

    def __init__(self, stream):
        cuda = other_library("torch").cuda
        handle = backends.load("cuda")[1].stream_handle(stream)
        self.stream = cuda.ExternalStream(handle)
        self.event = cuda.Event()
        with cuda.stream(self.stream):
            cuda._sleep(SLEEP)
            self.event.record(self.stream)

    @property
    def done(self):
        return self.event.query()

    def synchronize(self):
        """Waits for this stream alone."""
        self.stream.synchronize()


class DLPackOnly:
    """An array that shows itself by nothing but DLPack."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()
