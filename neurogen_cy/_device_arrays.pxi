# Borrowing arrays in CUDA memory, which show themselves by __cuda_array_interface__ (versions 2 and 3: PyCUDA, CuPy,
# torch, Numba) or by DLPack alone. What can be known without touching the device is checked here, and where the memory
# is by `Arrays` (_calls.pxi); values are checked by the kernel that reads them.

from neurogen_cy._neurogen cimport uintptr_t

cdef enum:
    LEGACY_STREAM = 1  # the legacy default stream, in the interface's numbers


cdef class DeviceArray(Held):
    """A checked, C-contiguous device array, kept alive until this object dies."""

    cdef object exporter
    cdef bint readonly
    cdef bint ordered      # the producer has made the model's stream wait for its own
    cdef uintptr_t stream  # where the producer works on it, in the interface's numbers; 0 = not said


cdef bint _shows_device_memory(object source):
    try:
        return hasattr(source, "__cuda_array_interface__")
    except RuntimeError:  # a tensor that requires a gradient: on a device, and unwilling to say where
        return True


cdef bint on_cuda_device(object source):
    """Whether an array of the caller's is one of a device, by either way of showing it."""
    if _shows_device_memory(source):
        return True
    if PyObject_CheckBuffer(source) or not hasattr(source, "__dlpack__") or not hasattr(source, "__dlpack_device__"):
        return False
    return int(source.__dlpack_device__()[0]) == DL_CUDA


cdef DeviceArray borrow_device(object source, str name, tuple dtypes, bint writable, object consumer):
    """Takes a device array: kind, dtype, contiguity, writability, emptiness, address and stream are checked, in this
    order. consumer: the stream that a DLPack producer makes wait for its own, -1 for none."""
    cdef DeviceArray out = DeviceArray.__new__(DeviceArray)
    cdef tuple strides
    out.exporter, out.name = source, name
    if _shows_device_memory(source):
        strides = _read_interface(out, source)
    else:
        strides = _read_dlpack(out, source, consumer)
    if out.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {' or '.join(dtypes)}, got {out.dtype}")
    out.bytes = out.itemsize
    for axis in reversed(range(len(out.shape))):
        if strides is not None and out.shape[axis] > 1 and strides[axis] != out.bytes:
            raise ValueError(f"{name}: expected a C-contiguous array, got shape {out.shape} with strides {strides}")
        out.bytes *= out.shape[axis]
    if writable and out.readonly:
        raise ValueError(f"{name}: expected a writable array, got a read-only one")
    if out.bytes == 0:
        raise ValueError(f"{name}: expected at least one element, got shape {out.shape}")
    if out.data == NULL or <uintptr_t>out.data % out.itemsize:
        raise ValueError(f"{name}: expected the address of {out.dtype} values in device memory, got "
                         f"{<uintptr_t>out.data:#x}")
    return out


cdef tuple _read_interface(DeviceArray out, object source):
    """Takes over what __cuda_array_interface__ says; returns the strides in bytes, None = contiguous."""
    try:
        facts = source.__cuda_array_interface__
        version, mask, strides = facts["version"], facts.get("mask"), facts.get("strides")
        dtype, address, readonly = np.dtype(facts["typestr"]), int(facts["data"][0]), bool(facts["data"][1])
        shape = tuple([int(extent) for extent in facts["shape"]])
        strides = None if strides is None else tuple([int(stride) for stride in strides])
        out.data = <void*><uintptr_t>address
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise TypeError(f"{out.name}: expected an array with a __cuda_array_interface__, got {type(source).__name__}: "
                        f"{error!r}") from error
    if version < 2 or mask is not None:
        raise TypeError(f"{out.name}: expected a __cuda_array_interface__ of version 2 or 3 without a mask, got "
                        f"version {version}{'' if mask is None else ' with a mask'}")
    _check_extents(out, shape, strides, source)
    out.shape, out.readonly, out.itemsize = shape, readonly, dtype.itemsize
    out.dtype = dtype.name if dtype.isnative else f"big-endian {dtype.str!r}"
    stream = facts.get("stream")
    if stream is not None:
        if isinstance(stream, bool) or not isinstance(stream, Integral) or not 0 < stream < 2**64:
            raise ValueError(f"{out.name}: expected stream 1 (legacy default), 2 (per-thread default) or the address "
                             f"of one, got {stream!r}")
        out.stream = stream
    return strides


cdef tuple _read_dlpack(DeviceArray out, object source, object consumer):
    """Takes over a DLPack capsule; returns the strides in bytes, None = contiguous."""
    cdef Pack pack
    cdef DLTensor* tensor
    try:
        try:
            capsule = source.__dlpack__(stream=consumer, max_version=(1, 0))
        except TypeError:  # a producer from before version 1
            capsule = source.__dlpack__(stream=consumer)
        pack = open_capsule(capsule)
    except (AttributeError, BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{out.name}: expected a DLPack array on a CUDA device, got {type(source).__name__}: "
                        f"{error!r}") from error
    tensor = pack.tensor
    if tensor.device_type != DL_CUDA:
        raise TypeError(f"{out.name}: expected a DLPack array on a CUDA device (type {DL_CUDA}), got a capsule of "
                        f"device type {tensor.device_type}")
    shape = tuple([tensor.shape[axis] for axis in range(tensor.ndim)])
    out.exporter, out.ordered, out.readonly = pack, consumer != -1, pack.readonly
    out.itemsize = max(1, tensor.bits * tensor.lanes // 8)
    kind = _DL_KINDS.get(tensor.kind, f"DLPack type {tensor.kind} of bits ")
    out.dtype = "bool" if kind == "bool" and tensor.bits == 8 else f"{kind}{tensor.bits}"
    if tensor.lanes != 1:
        out.dtype = f"{out.dtype} in vectors of {tensor.lanes}"
    out.data = <char*>tensor.data + tensor.byte_offset
    strides = None
    if tensor.strides != NULL:
        strides = tuple([tensor.strides[axis] * out.itemsize for axis in range(tensor.ndim)])
    _check_extents(out, shape, strides, source)
    out.shape = shape
    return strides


cdef int _check_extents(DeviceArray out, tuple shape, tuple strides, object source) except -1:
    """What no exporter should say, and sizes that would overflow."""
    if any([extent < 0 for extent in shape]) or math.prod(shape) >= 2**48:
        raise ValueError(f"{out.name}: expected extents of an array in memory, got shape {shape} "
                         f"({type(source).__name__})")
    if strides is not None and len(strides) != len(shape):
        raise ValueError(f"{out.name}: expected a stride for every axis, got shape {shape} with strides {strides}")
    return 0


def stream_handle(stream):
    """The stream a caller names: an int as in the interface (0 = the legacy default stream too), or an object that has
    one: __cuda_stream__ (cuda.core), cuda_stream (torch), ptr (CuPy) or handle (PyCUDA, Numba)."""
    expected = "stream: expected None, the address of a CUDA stream or an object that has one"
    found = stream
    if not isinstance(stream, Integral):
        for name in ("__cuda_stream__", "cuda_stream", "ptr", "handle"):
            found = getattr(stream, name, None)
            if found is not None:
                break
        if name == "__cuda_stream__" and found is not None:
            found = (found() if callable(found) else found)[1]  # (version of the protocol, handle)
        if found is None:
            raise TypeError(f"{expected} (cuda_stream, ptr, handle), got {type(stream).__name__}")
    found = getattr(found, "value", found)  # ctypes.c_void_p: None where it is 0
    try:
        handle = 0 if found is None else int(found)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{expected}, got {stream!r}") from error
    if isinstance(stream, bool) or not 0 <= handle < 2**64:
        raise ValueError(f"{expected}, got {stream!r}")
    return handle or LEGACY_STREAM


def device_array_facts(source, str name="array", tuple dtypes=("float32", "int32", "int64", "bool", "uint8"), *,
                       bint writable=False):
    """What a call would take over from a device array, or the exception it would raise; where the memory is, and
    whose, only the call can say."""
    cdef DeviceArray array = borrow_device(source, name, dtypes, writable, -1)
    return {"shape": array.shape, "dtype": array.dtype, "data": <uintptr_t>array.data, "bytes": array.bytes,
            "readonly": bool(array.readonly), "stream": array.stream or None}
