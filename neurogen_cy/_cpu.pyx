# cython: language_level=3, embedsignature=True
# distutils: language = c++
"""The CPU backend: the classes of `_binding.pxi` over libneurogen_cpu."""

import psutil

from scipy.linalg.cython_blas cimport sgemm

from neurogen_cy._neurogen cimport (
    MemoryPlan, Model, ModelSpec, Sgemm, cpu_instruction_set, cpu_memory_plan, make_cpu_model,
)

from neurogen_cy import threads

BACKEND = "cpu"
PRECISIONS = ("fp32",)
TOKENS_AHEAD = 1  # computing a token that nobody reads would only take time
blas_at_one_thread = threads.blas_at_one_thread

cdef enum:
    ON_DEVICE = 0


cdef Model* make_model(const ModelSpec& spec) except NULL:
    return make_cpu_model(spec, <Sgemm>sgemm).release()


cdef MemoryPlan memory_plan_of(const ModelSpec& spec) except *:
    return cpu_memory_plan(spec)


def unavailable():
    """Why this backend cannot be used here: None, it always can."""
    return None


def free_bytes(device):
    """Memory that a model can take; ValueError for a device there is not."""
    if device != 0:
        raise ValueError(f"device: expected 0, got {device}")
    return psutil.virtual_memory().available


def describe(device):
    """What computes here, for people."""
    return f"{instruction_set()} kernels"


def instruction_set():
    """The kernels this machine runs: avx512, avx2 or baseline."""
    return (<bytes>cpu_instruction_set()).decode()


include "_binding.pxi"
