# DLPack (dmlc/dlpack, versions 0 and 1): an array crosses between libraries in a capsule, with a deleter for whoever is
# done last. From version 1 on the capsule says whether the memory may be written.

from cpython.pycapsule cimport PyCapsule_GetPointer, PyCapsule_IsValid, PyCapsule_New, PyCapsule_SetName
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.stdint cimport uint16_t, uint32_t
from libc.stdlib cimport calloc, free

from neurogen_cy._neurogen cimport int32_t, int64_t, uint8_t, uint64_t

cdef enum:
    DL_CPU = 1
    DL_CUDA = 2
    DL_READ_ONLY = 1  # a flag of version 1
    DL_MOST_AXES = 4  # of an array that leaves here

cdef dict _DL_KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}

cdef struct DLTensor:
    void* data
    int32_t device_type
    int32_t device
    int32_t ndim
    uint8_t kind
    uint8_t bits
    uint16_t lanes
    int64_t* shape
    int64_t* strides  # in elements; null = C-contiguous
    uint64_t byte_offset

cdef struct DLOld:  # DLManagedTensor, in a capsule named dltensor
    DLTensor tensor
    void* owner
    void (*deleter)(DLOld*) noexcept

cdef struct DLNew:  # DLManagedTensorVersioned, in a capsule named dltensor_versioned
    uint32_t major
    uint32_t minor
    void* owner
    void (*deleter)(DLNew*) noexcept
    uint64_t flags
    DLTensor tensor

cdef struct OldPack:  # what leaves here, in one piece: `managed` first
    DLOld managed
    int64_t extents[2 * DL_MOST_AXES]

cdef struct NewPack:
    DLNew managed
    int64_t extents[2 * DL_MOST_AXES]


cdef void _delete_old(DLOld* managed) noexcept with gil:
    Py_DECREF(<object>managed.owner)
    free(managed)


cdef void _delete_new(DLNew* managed) noexcept with gil:
    Py_DECREF(<object>managed.owner)
    free(managed)


cdef void _drop_capsule(object capsule) noexcept:
    """Of a capsule that nobody took: takers rename it."""
    cdef DLOld* old
    cdef DLNew* new
    if PyCapsule_IsValid(capsule, b"dltensor"):
        old = <DLOld*>PyCapsule_GetPointer(capsule, b"dltensor")
        old.deleter(old)
    elif PyCapsule_IsValid(capsule, b"dltensor_versioned"):
        new = <DLNew*>PyCapsule_GetPointer(capsule, b"dltensor_versioned")
        new.deleter(new)


cdef int _describe_dl(DLTensor* tensor, int64_t* extents, void* data, tuple shape, bint floats, int device_type,
                      int device) except -1:
    cdef int axis
    cdef int64_t stride = 1
    tensor.data, tensor.device_type, tensor.device = data, device_type, device
    tensor.ndim, tensor.kind, tensor.bits, tensor.lanes = len(shape), 2 if floats else 0, 32, 1
    tensor.shape, tensor.strides = extents, extents + DL_MOST_AXES
    for axis in reversed(range(len(shape))):
        tensor.shape[axis], tensor.strides[axis] = shape[axis], stride
        stride *= shape[axis]
    return 0


cdef object dlpack_capsule(object owner, void* data, tuple shape, bint floats, int device_type, int device,
                           bint readonly, bint versioned):
    """A capsule that shows 32-bit values of `owner`, which it keeps alive."""
    cdef OldPack* old
    cdef NewPack* new
    if versioned:
        new = <NewPack*>calloc(1, sizeof(NewPack))
        if new == NULL:
            raise MemoryError()
        _describe_dl(&new.managed.tensor, new.extents, data, shape, floats, device_type, device)
        new.managed.major, new.managed.flags = 1, DL_READ_ONLY if readonly else 0
        new.managed.owner, new.managed.deleter = <PyObject*>owner, _delete_new
        Py_INCREF(owner)
        return PyCapsule_New(new, b"dltensor_versioned", _drop_capsule)
    old = <OldPack*>calloc(1, sizeof(OldPack))
    if old == NULL:
        raise MemoryError()
    _describe_dl(&old.managed.tensor, old.extents, data, shape, floats, device_type, device)
    old.managed.owner, old.managed.deleter = <PyObject*>owner, _delete_old
    Py_INCREF(owner)
    return PyCapsule_New(old, b"dltensor", _drop_capsule)


cdef class Pack:
    """A DLPack array taken out of its capsule; deleted with this object."""

    cdef DLOld* old
    cdef DLNew* new
    cdef DLTensor* tensor
    cdef bint readonly

    def __dealloc__(self):
        if self.old != NULL and self.old.deleter != NULL:
            self.old.deleter(self.old)
        if self.new != NULL and self.new.deleter != NULL:
            self.new.deleter(self.new)


cdef Pack open_capsule(object capsule):
    """Takes what a capsule holds; TypeError for a capsule that holds no array."""
    cdef Pack out = Pack.__new__(Pack)
    if PyCapsule_IsValid(capsule, b"dltensor_versioned"):
        out.new = <DLNew*>PyCapsule_GetPointer(capsule, b"dltensor_versioned")
        PyCapsule_SetName(capsule, b"used_dltensor_versioned")
        if out.new.major != 1:  # the layout after the deleter is another one
            raise TypeError(f"DLPack version {out.new.major}.{out.new.minor}; version 1 or older is understood")
        out.tensor, out.readonly = &out.new.tensor, out.new.flags & DL_READ_ONLY != 0
    elif PyCapsule_IsValid(capsule, b"dltensor"):
        out.old = <DLOld*>PyCapsule_GetPointer(capsule, b"dltensor")
        PyCapsule_SetName(capsule, b"used_dltensor")
        out.tensor = &out.old.tensor
    else:
        raise TypeError("__dlpack__ gave no capsule of an array")
    return out
