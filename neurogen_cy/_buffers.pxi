# Borrowing host arrays: every check of the contract happens here, before a pointer is taken.

from cpython.buffer cimport (
    PyBUF_FORMAT, PyBUF_STRIDES, PyBuffer_IsContiguous, PyBuffer_Release, PyObject_CheckBuffer, PyObject_GetBuffer,
)

cdef object _HOST_KINDS = "a NumPy array, a buffer (memoryview, array.array) or a host DLPack array"


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
    if PyObject_CheckBuffer(source):
        return source
    if hasattr(source, "__cuda_array_interface__"):
        raise TypeError(f"{name}: expected a host array for a model on the {BACKEND} backend, got an array in "
                        f"CUDA device memory ({type(source).__name__}); copy it to the host first")
    if hasattr(source, "__dlpack__") and hasattr(source, "__dlpack_device__"):
        device = int(source.__dlpack_device__()[0])
        if device != 1:
            raise TypeError(f"{name}: expected a host array for a model on the {BACKEND} backend, got a DLPack "
                            f"array on device type {device} ({type(source).__name__})")
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


cdef class Borrowed:
    """A checked, C-contiguous host buffer, held until this object dies."""

    cdef Py_buffer view
    cdef bint held
    cdef str name
    cdef str dtype

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)

    cdef tuple shape(self):
        return tuple([self.view.shape[i] for i in range(self.view.ndim)])

    cdef Py_ssize_t size(self):
        return self.view.len // self.view.itemsize

    cdef int64_t integer(self, Py_ssize_t i) noexcept nogil:
        """Element i of an int32 or int64 buffer."""
        if self.view.itemsize == 4:
            return (<const int32_t*>self.view.buf)[i]
        return (<const int64_t*>self.view.buf)[i]

    cdef int check_shape(self, tuple expected) except -1:
        if self.shape() != expected:
            raise ValueError(f"{self.name}: expected shape {expected}, got {self.shape()}")
        return 0

    cdef int check_finite(self) except -1:
        """Refuses NaN and infinity in a float32 buffer."""
        cdef const float* values = <const float*>self.view.buf
        cdef Py_ssize_t i, count = self.size(), bad = -1
        with nogil:
            for i in range(count):
                if not isfinite(values[i]):
                    bad = i
                    break
        if bad >= 0:
            raise ValueError(f"{self.name}: expected finite values, got {values[bad]}")
        return 0

    cdef int check_apart(self, Borrowed other) except -1:
        """Refuses to write into memory that is read in the same call."""
        cdef char* mine = <char*>self.view.buf
        cdef char* theirs = <char*>other.view.buf
        if mine < theirs + other.view.len and theirs < mine + self.view.len:
            raise ValueError(f"{self.name}: expected memory apart from {other.name}, got overlapping arrays")
        return 0


cdef Borrowed borrow(object source, str name, tuple dtypes, bint writable=False):
    """Takes a buffer: kind, dtype, contiguity, writability and emptiness are checked, in this order."""
    cdef Borrowed out = Borrowed.__new__(Borrowed)
    try:
        PyObject_GetBuffer(_host_exporter(source, name), &out.view, PyBUF_FORMAT | PyBUF_STRIDES)
    except (BufferError, RuntimeError, ValueError) as error:  # the exporter's own refusal
        raise TypeError(f"{name}: expected {_HOST_KINDS}, got {type(source).__name__}: {error}") from error
    out.held = True
    out.name = name
    out.dtype = _dtype_name(&out.view)
    if out.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {' or '.join(dtypes)}, got {out.dtype}")
    if not PyBuffer_IsContiguous(&out.view, b"C"):
        strides = tuple([out.view.strides[i] for i in range(out.view.ndim)])
        raise ValueError(f"{name}: expected a C-contiguous array, got shape {out.shape()} with strides {strides}")
    if writable and out.view.readonly:
        raise ValueError(f"{name}: expected a writable array, got a read-only one")
    if out.view.len == 0:
        raise ValueError(f"{name}: expected at least one element, got shape {out.shape()}")
    return out


cdef class TensorView:
    """A named array of a model, without a copy: buffer protocol, so `numpy.asarray(view)` shares its memory.

    It keeps the model alive. `numpy()` gives a copy of its own. Parameters are read-only (write them with
    `NeuroGen.load_parameters`), gradients are writable.

    Attributes
    ----------
    key : str
    shape : tuple of int
    dtype : numpy.dtype
        float32, or int32 for `rows` and `cols`.
    readonly : bool
    """

    cdef readonly str key
    cdef readonly tuple shape
    cdef readonly object dtype
    cdef readonly bint readonly
    cdef object owner
    cdef void* data
    cdef Py_ssize_t extents[4]
    cdef Py_ssize_t strides[4]

    def __init__(self):
        raise TypeError("TensorView: expected to be taken from a model (parameters, gradients), got a call")

    def __getbuffer__(self, Py_buffer* view, int flags):
        if self.readonly and flags & 1:  # PyBUF_WRITABLE
            raise BufferError(f"{self.key}: this view is read-only")
        cdef Py_ssize_t itemsize = 4
        cdef Py_ssize_t count = 1
        cdef int axis
        for axis in range(len(self.shape)):
            count *= self.extents[axis]
        view.buf = self.data
        view.obj = self
        view.len = count * itemsize
        view.itemsize = itemsize
        view.readonly = self.readonly
        view.ndim = len(self.shape)
        view.format = b"f" if self.dtype == np.float32 else b"i"
        view.shape = self.extents
        view.strides = self.strides
        view.suboffsets = NULL
        view.internal = NULL

    def numpy(self):
        """A copy as a NumPy array."""
        return np.array(self, copy=True)

    def __len__(self):
        return self.shape[0]

    def __repr__(self):
        return f"TensorView({self.key!r}, shape={self.shape}, dtype={self.dtype}, readonly={self.readonly})"


cdef TensorView make_view(str key, object owner, void* data, tuple shape, object dtype, bint readonly):
    cdef TensorView view = TensorView.__new__(TensorView)
    cdef Py_ssize_t stride = 4
    cdef int axis
    view.key, view.shape, view.dtype, view.owner = key, shape, np.dtype(dtype), owner
    view.readonly, view.data = readonly, data
    for axis in reversed(range(len(shape))):
        view.extents[axis] = shape[axis]
        view.strides[axis] = stride
        stride *= shape[axis]
    return view
