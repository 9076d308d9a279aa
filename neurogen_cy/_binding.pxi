# The binding, one text for every backend. The including .pyx defines BACKEND, ON_DEVICE, blas_at_one_thread,
# make_model() and memory_plan_of().
# Layers: the Python face (model.py) decides policy; here arguments are checked, the GIL is released and
# native errors become exceptions; the library computes.

import math
from collections.abc import Mapping
from numbers import Integral, Real

import numpy as np

cimport cython
from cython.operator cimport dereference as deref
from libc.math cimport NAN, isfinite
from libc.string cimport memcpy

cdef tuple _IDS = ("int32", "int64")
cdef tuple _FLOATS = ("float32",)
cdef tuple _FLAGS = ("bool", "uint8")

include "_buffers.pxi"  # arrays of the caller
include "_dlpack.pxi"
include "_device_arrays.pxi"
include "_spec.pxi"  # what a model is
include "_core.pxi"  # what it holds
include "_views.pxi"
include "_calls.pxi"  # the caller's arrays of one call
include "_state.pxi"
include "_sampling.pxi"
include "_engine.pxi"  # what it does
include "_modules.pxi"
