# What a model holds: parameters, gradients, moments. All copies to and from it go through Model::read and write, so
# that it does not matter where its memory is.

from posix.unistd cimport getpid

from neurogen_cy._neurogen cimport Counters, Model, Tensor, int32_t, uint64_t, unique_ptr, vector


@cython.no_gc_clear  # arrays in `lent` outlive the work on them
cdef class Core:
    """Owns the native model and admits one thread at a time."""

    cdef unique_ptr[Model] model
    cdef readonly object config
    cdef readonly int streams, max_tokens, device
    cdef dict topology
    cdef bint busy
    cdef int process      # that made the model
    cdef bint shown       # another library has seen device memory of this model
    cdef list lent        # (mark, [array, ..]) of calls that did not wait, the oldest first
    cdef uint64_t marked  # the last mark made
    cdef int recorded_streams, recorded_tokens
    cdef bint recorded_gates

    def __cinit__(self, cfg, dict topology, int streams, int max_tokens, int threads, uint64_t seed, int device,
                  str precision, str sync):
        self.config, self.topology = cfg, topology
        self.streams, self.max_tokens, self.device, self.lent = streams, max_tokens, device, []
        self.process = getpid()
        self.model.reset(make_model(make_spec(cfg, topology, streams, max_tokens, threads, seed, device, precision,
                                              sync)))

    def __dealloc__(self):
        if ON_DEVICE and self.process != getpid():
            self.model.release()  # a forked child has no driver to give memory back to
        self.model.reset()  # waits for the work that `lent` is kept for

    cdef int enter(self) except -1:
        if ON_DEVICE and self.process != getpid():
            raise RuntimeError(f"this model was made by process {self.process}, and this is process {getpid()}, forked "
                               "from it: CUDA does not live through a fork; start processes by 'spawn' or 'forkserver'")
        # The GIL is held here, so looking and setting cannot be split by another thread.
        if self.busy:
            raise RuntimeError("this model is in use by another thread: a model serves one thread at a time")
        self.busy = True
        if self.lent:
            try:
                self.give_back()
            except BaseException:
                self.busy = False
                raise
        return 0

    cdef int give_back(self) except -1:
        """Lets go of arrays whose calls are over."""
        cdef uint64_t passed = deref(self.model).passed()
        cdef Py_ssize_t over = 0
        while over < len(self.lent) and self.lent[over][0] <= passed:
            over += 1
        del self.lent[:over]
        return 0

    # ---- copies: the caller has entered ----------------------------------------------------------------------

    cdef object read(self, const void* source, tuple shape):
        """A host copy of float32 memory of the model."""
        cdef float[::1] values
        cdef float* to
        cdef size_t bytes
        out = np.empty(shape, np.float32)
        if out.size:
            values = out.reshape(-1)
            to, bytes = &values[0], out.nbytes
            with nogil:
                deref(self.model).read(source, to, bytes)
        return out

    cdef int write(self, void* to, object value) except -1:
        """Copies a float32 array into memory of the model."""
        cdef const float[::1] values
        cdef const float* source
        cdef size_t bytes
        if value.size:
            values = np.ascontiguousarray(value).reshape(-1)
            source, bytes = &values[0], value.nbytes
            with nogil:
                deref(self.model).write(to, source, bytes)
        return 0

    # ---- tensors -----------------------------------------------------------------------------------------------

    def parameters(self):
        """{key: read-only view} of every model tensor."""
        cdef vector[Tensor]* tensors = &deref(self.model).tensors()
        cdef int32_t[::1] array
        out = {}
        for i in range(tensors.size()):
            key = deref(tensors)[i].key.decode()
            out[key] = tensor_view(self, key, deref(tensors)[i].data, tuple(deref(tensors)[i].shape), True)
            if key.endswith(".blocks"):
                base = key[: -len(".blocks")]
                cols = self.topology[base]
                k = cols.size // (self.config.width(base.split(".")[2]) // 32)
                rows = np.repeat(np.arange(cols.size // k, dtype=np.int32), k)
                for name, values in (("rows", rows), ("cols", cols)):
                    array = values
                    out[f"{base}.{name}"] = host_view(values, f"{base}.{name}", &array[0], values.shape, np.int32, True)
        return out

    def load_parameters(self, values):
        """Copies float parameters by key; nothing changes unless all of them fit."""
        cdef vector[Tensor]* tensors = &deref(self.model).tensors()
        _check_mapping("parameters", values)
        self.enter()
        try:
            places = {deref(tensors)[i].key.decode(): i for i in range(tensors.size())}
            pairs = []
            for key in values:
                if key not in places:
                    raise ValueError(f"parameters: expected keys of this model, got {key!r}")
                pairs.append((places[key], _new_value(values, key, tuple(deref(tensors)[<int>places[key]].shape))))
            deref(self.model).parameters_written()
            for place, value in pairs:
                self.write(deref(tensors)[<int>place].data, value)
        finally:
            self.busy = False

    def gradients(self):
        """{key: writable view} of every trainable tensor's gradient."""
        deref(self.model).gradients_exposed()
        return self.trainable_views(0)

    def moments(self):
        """{key: (first, second)} views of AdamW's moments."""
        first, second = self.trainable_views(1), self.trainable_views(2)
        return {key: (first[key], second[key]) for key in first}

    def load_moments(self, values):
        """Copies moments as `moments` gives them, {key: (first, second)}; every one has to be there."""
        cdef vector[Tensor]* tensors = &deref(self.model).tensors()
        cdef float* data
        self.enter()
        try:
            pairs = []
            for i in range(tensors.size()):
                key, shape = deref(tensors)[i].key.decode(), tuple(deref(tensors)[i].shape)
                for which in range(2 if deref(tensors)[i].gradient != NULL else 0):
                    value = host_array(values[key][which], f"moments[{key!r}][{which}]", _FLOATS)
                    if value.shape != shape:
                        raise ValueError(f"moments[{key!r}][{which}]: expected shape {shape}, got {value.shape}")
                    pairs.append((i, which, value))
            for place, which, value in pairs:
                data = deref(tensors)[<int>place].moment2 if which else deref(tensors)[<int>place].moment1
                self.write(data, value)
        finally:
            self.busy = False

    cdef dict trainable_views(self, int which):
        """0: gradients, 1 and 2: the optimizer's moments."""
        cdef vector[Tensor]* tensors = &deref(self.model).tensors()
        cdef float* data
        out = {}
        for i in range(tensors.size()):
            data = deref(tensors)[i].gradient
            if data == NULL:
                continue
            if which:
                data = deref(tensors)[i].moment1 if which == 1 else deref(tensors)[i].moment2
            key = deref(tensors)[i].key.decode()
            out[key] = tensor_view(self, key, data, tuple(deref(tensors)[i].shape), False)
        return out

    # ---- looking -------------------------------------------------------------------------------------------

    def recorded(self, int region):
        """(u, s, G) of the last call with record=True, copies [S, T, n]; G: None without a gate and after learning."""
        cdef float[::1] values
        cdef float* to_u
        cdef size_t cells
        cdef bint gated
        self.enter()
        try:
            if not self.recorded_tokens:
                raise RuntimeError("recorded: expected the last call to be one with record=True, got none")
            name = self.config.regions[region].name
            gated = self.recorded_gates and any(p.kind == "gate" and p.dst == name for p in self.config.projections)
            shape = (self.recorded_tokens, self.recorded_streams, self.config.regions[region].neurons)
            out = np.empty((3 if gated else 2, *shape), np.float32)
            values = out.reshape(-1)
            to_u, cells = &values[0], out[0].size
            with nogil:
                deref(self.model).recorded(region, to_u, to_u + cells, to_u + 2 * cells if gated else NULL)
            arrays = [np.ascontiguousarray(array.transpose(1, 0, 2)) for array in out]
            return arrays[0], arrays[1], arrays[2] if gated else None
        finally:
            self.busy = False

    def counters(self):
        """Launches, synchronisations, bytes and allocations since construction."""
        cdef Counters c = deref(self.model).counters()
        return {"launches": c.launches, "syncs": c.syncs, "h2d_bytes": c.h2d_bytes, "d2h_bytes": c.d2h_bytes,
                "device_allocations": c.device_allocations, "host_allocations": c.host_allocations}

    def execution_plan(self):
        """{name: value}, for people: how this model runs on this machine."""
        return {part.first.decode(): part.second.decode() for part in deref(self.model).execution_plan()}


cdef int _check_mapping(str name, object values) except -1:
    if not isinstance(values, Mapping):
        raise TypeError(f"{name}: expected a mapping of key to array, got {type(values).__name__}")
    return 0


cdef object _new_value(object values, str key, tuple shape):
    """values[key], checked against the array it will be copied into."""
    if key not in values:
        raise ValueError(f"{key}: expected a value, got none")
    value = host_array(values[key], key, _FLOATS)
    if value.shape != shape:
        raise ValueError(f"{key}: expected shape {shape}, got {value.shape}")
    if not np.isfinite(value).all():
        raise ValueError(f"{key}: expected finite values, got NaN or infinity")
    return value
