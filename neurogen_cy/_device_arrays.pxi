# Borrowing arrays in CUDA memory, which show themselves by __cuda_array_interface__ (versions 2 and 3): PyCUDA, CuPy,
# torch, Numba. What can be known without touching the device is checked here; the values are checked by the kernel that
# reads them.

from neurogen_cy._neurogen cimport uintptr_t


cdef class DeviceArray(Held):
    """A checked, C-contiguous device array, kept alive until this object dies."""

    cdef object exporter
    cdef uintptr_t stream  # what writes it, in the interface's numbers; 0 = it is ready


cdef bint _shows_device_memory(object source):
    try:
        return hasattr(source, "__cuda_array_interface__")
    except RuntimeError:  # a tensor that requires a gradient: on a device, and unwilling to say where
        return True


cdef Held borrow_input(object source, str name, tuple dtypes):
    """An array that a call reads: of the host or, for a model on a device, of that device."""
    if ON_DEVICE and _shows_device_memory(source):
        return _borrow_device(source, name, dtypes)
    return borrow(source, name, dtypes)


cdef DeviceArray _borrow_device(object source, str name, tuple dtypes):
    """Takes a device array: kind, dtype, contiguity, emptiness, address and stream are checked, in this order."""
    cdef DeviceArray out = DeviceArray.__new__(DeviceArray)
    try:
        facts = source.__cuda_array_interface__
        version, mask, strides = facts["version"], facts.get("mask"), facts.get("strides")
        dtype, address = np.dtype(facts["typestr"]), int(facts["data"][0])
        out.shape = tuple([int(extent) for extent in facts["shape"]])
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name}: expected an array with a __cuda_array_interface__, got {type(source).__name__}: "
                        f"{error!r}") from error
    if version < 2 or mask is not None:
        raise TypeError(f"{name}: expected a __cuda_array_interface__ of version 2 or 3 without a mask, got version "
                        f"{version}{'' if mask is None else ' with a mask'}")
    out.exporter, out.name, out.itemsize = source, name, dtype.itemsize
    out.dtype = dtype.name if dtype.isnative else f"big-endian {dtype.str!r}"
    if out.dtype not in dtypes:
        raise TypeError(f"{name}: expected dtype {' or '.join(dtypes)}, got {out.dtype}")
    out.bytes = out.itemsize
    for axis in reversed(range(len(out.shape))):
        if strides is not None and out.shape[axis] > 1 and strides[axis] != out.bytes:
            raise ValueError(f"{name}: expected a C-contiguous array, got shape {out.shape} with strides {strides}")
        out.bytes *= out.shape[axis]
    if out.bytes == 0:
        raise ValueError(f"{name}: expected at least one element, got shape {out.shape}")
    if address <= 0 or address % out.itemsize:
        raise ValueError(f"{name}: expected the address of {out.dtype} values in device memory, got {address:#x}")
    out.data = <void*><uintptr_t>address
    stream = facts.get("stream")
    if stream is not None:
        if not isinstance(stream, Integral) or stream <= 0:
            raise ValueError(f"{name}: expected stream 1 (legacy default), 2 (per-thread default) or the address of "
                             f"one, got {stream!r}")
        out.stream = stream
    return out
