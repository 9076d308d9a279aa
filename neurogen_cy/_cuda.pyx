# cython: language_level=3, embedsignature=True
# distutils: language = c++
"""The CUDA backend: the classes of `_binding.pxi` over libneurogen_cuda. Importing it needs no driver and no GPU."""

import functools
from contextlib import nullcontext

from neurogen_cy._neurogen cimport (
    CudaDevice, MemoryPlan, Model, ModelSpec, cuda_device, cuda_device_count, cuda_memory_plan, load_cublas,
    make_cuda_model, string, vector,
)

from neurogen_cy import cublas

BACKEND = "cuda"
PRECISIONS = ("bf16", "fp32", "fp8")  # the default first
TOKENS_AHEAD = 64  # the device draws so many before the host looks

cdef enum:
    ON_DEVICE = 1

blas_at_one_thread = nullcontext()  # there is no BLAS on the host


cdef Model* make_model(const ModelSpec& spec) except NULL:
    return make_cuda_model(spec).release()


cdef MemoryPlan memory_plan_of(const ModelSpec& spec) except *:
    return cuda_memory_plan(spec)


@functools.cache
def unavailable():
    """Why this backend cannot be used here, None where it can. Looks once, and loads cuBLASLt."""
    cdef vector[string] paths
    for path in cublas.library_paths():
        paths.push_back(path.encode())
    try:
        cuda_device_count()
        load_cublas(paths)
    except RuntimeError as error:
        return str(error)
    return None


def free_bytes(device):
    """Memory of a device that a model can take; ValueError for a device there is not."""
    return cuda_device(device).free_bytes


def describe(device):
    """What computes here, for people."""
    cdef CudaDevice found = cuda_device(device)
    return (f"{found.name.decode()}, driver {found.driver.decode()}, {found.free_bytes / 2**30:.1f} of "
            f"{found.total_bytes / 2**30:.1f} GiB free")


include "_binding.pxi"
