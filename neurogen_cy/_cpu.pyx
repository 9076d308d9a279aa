# cython: language_level=3, embedsignature=True
# distutils: language = c++
"""The CPU backend: the classes of `_binding.pxi` over libneurogen_cpu."""

from scipy.linalg.cython_blas cimport sgemm

from neurogen_cy._neurogen cimport (
    CAdamW, Counters, MemoryPlan, Model, ModelSpec, Normalize, ProjectionSpec, RegionSpec, Sgemm,
    StepStats, Targets, Tensor, Tokens, cpu_instruction_set, cpu_memory_plan, int32_t, int64_t, make_cpu_model,
    uint8_t, uint64_t, unique_ptr, vector,
)

BACKEND = "cpu"


cdef Model* make_model(const ModelSpec& spec) except NULL:
    return make_cpu_model(spec, <Sgemm>sgemm).release()


cdef MemoryPlan memory_plan_of(const ModelSpec& spec) except *:
    return cpu_memory_plan(spec)


def instruction_set():
    """The kernels this machine runs: avx512, avx2 or baseline."""
    return (<bytes>cpu_instruction_set()).decode()


include "_binding.pxi"
