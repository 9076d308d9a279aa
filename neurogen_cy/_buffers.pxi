# Borrowing host arrays: every check of the contract happens here, before a pointer is taken.

from cpython.buffer cimport (
    PyBUF_FORMAT, PyBUF_STRIDES, PyBuffer_IsContiguous, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer,
)

from neurogen_cy._neurogen cimport int32_t, int64_t

cdef str _HOST_KINDS = "a NumPy array, a buffer (memoryview, array.array) or a host DLPack array"
cdef str _WHERE_HOST = " (this call takes no device arrays)" if ON_DEVICE else f" for a model on the {BACKEND} backend"


cdef str _dtype_name(Py_buffer* view):
    """NumPy's name of a buffer's element type; the format itself where NumPy has none we take."""
    cdef str code = (<bytes>view.format).decode() if view.format != NULL else "B"
    cdef str kind = code[-1:]
    if code[:1] in (">", "!"):
        return f"big-endian {code!r}"
    if len(code.lstrip("@=<")) != 1:
        return f"{code!r}"
    if kind in "bhilqn":
        return f"int{8 * view.itemsize}"
    if kind in "BHILQN":
        return f"uint{8 * view.itemsize}"
    if kind in "efdg":
        return f"float{8 * view.itemsize}"
    return "bool" if kind == "?" else f"{code!r}"


cdef object _host_exporter(object source, str name):
    """The object whose buffer is taken: `source` itself, or NumPy's view of its DLPack capsule."""
    if _shows_device_memory(source):  # first: CuPy's arrays offer a buffer too, and refuse it
        raise TypeError(f"{name}: expected a host array{_WHERE_HOST}, got an array in CUDA device memory "
                        f"({type(source).__name__}); copy it to the host first")
    if PyObject_CheckBuffer(source):
        return source
    if hasattr(source, "__dlpack__") and hasattr(source, "__dlpack_device__"):
        device = int(source.__dlpack_device__()[0])
        if device != 1:
            raise TypeError(f"{name}: expected a host array{_WHERE_HOST}, got a DLPack array on device type {device} "
                            f"({type(source).__name__})")
        return _shared_dlpack(source)
    raise TypeError(f"{name}: expected {_HOST_KINDS}, got {type(source).__name__}")


cdef object _shared_dlpack(object source):
    """NumPy's view of a host DLPack array, writable where the producer's memory is."""
    array = np.from_dlpack(source)
    if not array.flags.writeable and hasattr(source, "__array__"):
        # Capsules from before DLPack 1.0 do not say whether they may be written, and NumPy takes them read-only.
        known = np.asarray(source)
        if known.__array_interface__["data"] == (array.__array_interface__["data"][0], False):
            return known
    return array


def host_array(source, str name, tuple dtypes):
    """`source` as a NumPy array of the same memory; kind and dtype are checked, the rest is the caller's."""
    try:
        array = np.asarray(_host_exporter(source, name))
    except (BufferError, RuntimeError, ValueError) as error:
        raise TypeError(f"{name}: expected {_HOST_KINDS}, got {type(source).__name__}: {error}") from error
    if array.dtype.name not in dtypes or not array.dtype.isnative:
        raise TypeError(f"{name}: expected dtype {' or '.join(dtypes)}, got {array.dtype}")
    return array


cdef class Held:
    """A checked, C-contiguous array of the caller's, held until this object dies."""

    cdef str name
    cdef str dtype
    cdef tuple shape
    cdef void* data
    cdef Py_ssize_t bytes, itemsize
    cdef bint written  # by the call

    cdef Py_ssize_t size(self):
        return self.bytes // self.itemsize

    cdef int check_shape(self, tuple expected) except -1:
        if self.shape != expected:
            raise ValueError(f"{self.name}: expected shape {expected}, got {self.shape}")
        return 0

    cdef int check_apart(self, Held other) except -1:
        """Refuses to write into memory that is read in the same call."""
        cdef char* mine = <char*>self.data
        cdef char* theirs = <char*>other.data
        if mine < theirs + other.bytes and theirs < mine + self.bytes:
            raise ValueError(f"{self.name}: expected memory apart from {other.name}, got overlapping arrays")
        return 0


cdef class Borrowed(Held):
    """The same in host memory."""

    cdef Py_buffer view
    cdef bint held

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)

    cdef int64_t integer(self, Py_ssize_t i) noexcept nogil:
        """Element i of an int32 or int64 buffer."""
        if self.itemsize == 4:
            return (<const int32_t*>self.data)[i]
        return (<const int64_t*>self.data)[i]

    cdef int check_finite(self) except -1:
        """Refuses NaN and infinity in a float32 buffer."""
        cdef const float* values = <const float*>self.data
        cdef Py_ssize_t i, count = self.size(), bad = -1
        with nogil:
            for i in range(count):
                if not isfinite(values[i]):
                    bad = i
                    break
        if bad >= 0:
            raise ValueError(f"{self.name}: expected finite values, got {values[bad]}")
        return 0


cdef Borrowed borrow(object source, str name, tuple dtypes, bint writable=False):
    """Takes a buffer: kind, dtype, contiguity, writability and emptiness are checked, in this order."""
    cdef Borrowed out = Borrowed.__new__(Borrowed)
    cdef Py_buffer* view = &out.view
    try:
        PyObject_GetBuffer(_host_exporter(source, name), view, PyBUF_FORMAT | PyBUF_STRIDES)
    except (BufferError, RuntimeError, ValueError) as error:  # the exporter's own refusal
        raise TypeError(f"{name}: expected {_HOST_KINDS}, got {type(source).__name__}: {error}") from error
    out.held = True
    out.name, out.dtype = name, _dtype_name(view)
    out.shape = tuple([view.shape[i] for i in range(view.ndim)])
    out.data, out.bytes, out.itemsize = view.buf, view.len, view.itemsize
    if out.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {' or '.join(dtypes)}, got {out.dtype}")
    if not PyBuffer_IsContiguous(view, b"C"):
        strides = tuple([view.strides[i] for i in range(view.ndim)])
        raise ValueError(f"{name}: expected a C-contiguous array, got shape {out.shape} with strides {strides}")
    if writable and view.readonly:
        raise ValueError(f"{name}: expected a writable array, got a read-only one")
    if view.len == 0:
        raise ValueError(f"{name}: expected at least one element, got shape {out.shape}")
    return out
