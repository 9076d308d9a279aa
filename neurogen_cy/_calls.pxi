# The caller's arrays of one call: taken and checked one by one, and all together before the call; on a device ordered
# against the streams of those who work on them, and kept alive until the work is done.

from neurogen_cy._neurogen cimport Input, Output, Place, uintptr_t


cdef class Arrays:
    """read() and write() take the arrays, begin() and end() stand around the native call.

    On a device the model's stream waits for the streams that the arrays name (`stream`, where the caller names one,
    stands for all of them; the legacy default stream for what says nothing), and these wait for the model's.
    """

    cdef Core core
    cdef list held
    cdef uintptr_t stream  # 0 = not said
    cdef bint waits        # an array of the host is among them: the call is finished when it returns
    cdef bint on_device

    def __cinit__(self, Core core not None, object stream):
        self.core, self.held = core, []
        if stream is None:
            return
        if not ON_DEVICE:
            raise ValueError(f"stream: expected None for a model on the {BACKEND} backend, got {stream!r}")
        self.stream = stream_handle(stream)

    cdef Held read(self, object source, str name, tuple dtypes):
        """An array that the call reads: of the host or, for a model on a device, of that device."""
        return self.borrow(source, name, dtypes, False)

    cdef Held write(self, object source, str name, tuple dtypes):
        """An array that the call writes."""
        return self.borrow(source, name, dtypes, True)

    cdef Held borrow(self, object source, str name, tuple dtypes, bint writable):
        cdef Held out
        if ON_DEVICE and on_cuda_device(source):
            own = deref(self.core.model).stream()
            out = borrow_device(source, name, dtypes, writable, -1 if self.stream else own)
            self.on_device = True
        else:
            out = borrow(source, name, dtypes, writable)
            self.waits = True
        out.written = writable
        self.held.append(out)
        return out

    cdef int begin(self) except -1:
        """The caller has entered; nothing was launched yet."""
        cdef Held out, other
        cdef list lent = []
        for out in self.held:
            for other in self.held:
                if out.written and other is not out:
                    out.check_apart(other)
        if not ON_DEVICE:
            return 0
        for out in self.held:
            if isinstance(out, DeviceArray):
                self.check_place(out)
                if (<DeviceArray>out).stream != deref(self.core.model).stream():  # a view of the model keeps the model
                    lent.append(out)
        if lent:  # until a mark passes that was made after all of this call
            self.core.lent.append((self.core.marked + 1, lent))
        for stream in self.streams(True):
            deref(self.core.model).wait_for(stream)
        return 0

    cdef int end(self, bint waited) except -1:
        """All was launched; waited: and is done."""
        if not self.on_device:
            return 0
        if waited:
            self.core.lent.clear()
            return 0
        self.core.marked = deref(self.core.model).mark()
        for stream in self.streams(False):
            deref(self.core.model).hand_over(stream)
        return 0

    cdef set streams(self, bint before):
        """Whom to wait for, or who waits."""
        cdef set out = set()
        cdef DeviceArray array
        if self.stream:
            return {self.stream} if self.on_device or self.core.shown else out
        for held in self.held:
            if isinstance(held, DeviceArray):
                array = held
                if not (before and array.ordered):
                    out.add(array.stream or LEGACY_STREAM)
        if before and self.core.shown:  # somebody may be writing through a view
            out.add(LEGACY_STREAM)
        return out

    cdef int check_place(self, DeviceArray array) except -1:
        cdef Place place = deref(self.core.model).place(array.data)
        expected = f"{array.name}: expected memory of device {self.core.device}"
        if not place.known:
            raise TypeError(f"{expected}, got an address that the driver does not know: host memory, or freed")
        if place.host:
            raise TypeError(f"{expected}, got host memory")
        if place.device != self.core.device:
            raise ValueError(f"{expected}, got memory of device {place.device}")
        if not place.own_context:
            raise ValueError(f"{expected} in its primary context, got memory of another context; with PyCUDA, import "
                             "pycuda.autoprimaryctx instead of pycuda.autoinit, which makes a context of its own")
        if 0 <= place.bytes < array.bytes:
            raise ValueError(f"{array.name}: expected {array.bytes} bytes for shape {array.shape} of {array.dtype}, "
                             f"got {place.bytes} from its address to the end of its allocation")
        return 0


cdef Input as_input(Held array):
    cdef Input out
    out.data, out.itemsize, out.device = array.data, array.itemsize, isinstance(array, DeviceArray)
    return out


cdef Output as_output(Held array):
    cdef Output out
    out.data, out.device = array.data, isinstance(array, DeviceArray)
    return out
