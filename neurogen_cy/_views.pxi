# Views of what a model holds, without a copy. A view on a device is ordered after the work that the model was asked for
# when it is shown; from then on the model's calls wait for the legacy default stream, or the one named by `stream=`.

from neurogen_cy._neurogen cimport uintptr_t


cdef class TensorView:
    """A named array of a model where it lies: a HostView or a DeviceView.

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

    cdef tuple where(self):
        """DLPack's device type and number."""
        return DL_CPU, 0

    cdef int order(self, object stream) except -1:
        """Makes a consumer's stream wait for the memory."""
        if stream is not None:
            raise ValueError(f"{self.key}: expected stream None for memory of the host, got {stream!r}")
        return 0

    def __dlpack_device__(self):
        return self.where()

    def __dlpack__(self, stream=None, *, max_version=None, dl_device=None, copy=None):
        """A DLPack capsule of the memory. Read-only views need a consumer that knows DLPack 1.0."""
        cdef bint versioned = max_version is not None and max_version[0] >= 1
        if copy:
            raise BufferError(f"{self.key}: expected copy None or False, got {copy!r}; its .numpy() is a copy")
        if dl_device is not None and tuple(dl_device) != self.where():
            raise BufferError(f"{self.key}: expected device {self.where()}, got {tuple(dl_device)}")
        if self.readonly and not versioned:
            raise BufferError(f"{self.key}: this view is read-only, which a capsule from before DLPack 1.0 cannot say")
        self.order(stream)
        kind, number = self.where()
        return dlpack_capsule(self, self.data, self.shape, self.dtype == np.float32, kind, number, self.readonly,
                              versioned)

    def __init__(self):
        raise TypeError(f"{type(self).__name__}: expected to be taken from a model (parameters, gradients), got a call")

    def __len__(self):
        return self.shape[0]

    def __repr__(self):
        return f"{type(self).__name__}({self.key!r}, shape={self.shape}, dtype={self.dtype}, readonly={self.readonly})"


cdef class HostView(TensorView):
    """A view by the buffer protocol: `numpy.asarray(view)` shares its memory."""

    cdef Py_ssize_t extents[4]
    cdef Py_ssize_t strides[4]

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


cdef class DeviceView(TensorView):
    """A view of device memory by `__cuda_array_interface__` (version 3) and DLPack."""

    cdef tuple where(self):
        return DL_CUDA, (<Core>self.owner).device

    cdef int show(self) except -1:
        """From now on training calls end with their work; one that did not may be under way."""
        cdef Core core = self.owner
        if not core.shown:
            core.shown = True
            deref(core.model).rest()
        return 0

    cdef int order(self, object stream) except -1:
        cdef Core core = self.owner
        if stream is not None and (isinstance(stream, bool) or not isinstance(stream, Integral) or stream < -1
                                   or stream == 0):
            raise ValueError(f"{self.key}: expected stream -1 (no order), 1 (legacy default), 2 (per-thread default) "
                             f"or the address of one, got {stream!r}")
        self.show()
        if stream == -1:
            return 0
        core.enter()
        try:
            deref(core.model).hand_over(LEGACY_STREAM if stream is None else stream)
        finally:
            core.busy = False
        return 0

    @property
    def __cuda_array_interface__(self):
        cdef Core core = self.owner
        self.show()
        return {"version": 3, "shape": self.shape, "typestr": self.dtype.str, "strides": None,
                "data": (<uintptr_t>self.data, self.readonly), "stream": deref(core.model).stream()}

    def __array__(self, dtype=None, copy=None):
        raise TypeError(f"{self.key}: expected a host array, got a view of device memory; its .numpy() is a host copy")

    def numpy(self):
        """A host copy as a NumPy array."""
        cdef Core core = self.owner
        core.enter()
        try:
            return core.read(self.data, self.shape)
        finally:
            core.busy = False


cdef TensorView tensor_view(Core core, str key, void* data, tuple shape, bint readonly):
    """A view of float32 memory of a model."""
    cdef DeviceView view
    if not ON_DEVICE:
        return host_view(core, key, data, shape, np.float32, readonly)
    view = DeviceView.__new__(DeviceView)
    _describe(view, core, key, data, shape, np.float32, readonly)
    return view


cdef HostView host_view(object owner, str key, void* data, tuple shape, object dtype, bint readonly):
    """A view of host memory that `owner` keeps."""
    cdef HostView view = HostView.__new__(HostView)
    cdef Py_ssize_t stride = 4
    cdef int axis
    _describe(view, owner, key, data, shape, dtype, readonly)
    for axis in reversed(range(len(shape))):
        view.extents[axis] = shape[axis]
        view.strides[axis] = stride
        stride *= shape[axis]
    return view


cdef int _describe(TensorView view, object owner, str key, void* data, tuple shape, object dtype,
                   bint readonly) except -1:
    view.owner, view.key, view.shape, view.dtype = owner, key, shape, np.dtype(dtype)
    view.data, view.readonly = data, readonly
    return 0
