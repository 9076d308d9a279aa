# The three organs a user holds: embedding, brain, decoder. Views of one Engine, no state of their own.

# Arrays may be the host's or, on the CUDA backend, the device's. With nothing but device arrays a call returns when its
# work is on the model's stream: no host waits, and streams are ordered by events (_calls.pxi).

from neurogen_cy._neurogen cimport Input, Output, Sampling, int32_t, int64_t

cdef class TokenEmbedding:
    """Token embedding E [V, D] of a model.

    Examples
    --------
    >>> out = np.empty((len(ids), model.config.dim), np.float32)   # doctest: +SKIP
    >>> model.embedding.encode_into(ids, out)                      # doctest: +SKIP
    """

    cdef Engine engine
    cdef TensorView table  # whose rows are shown; made when the first one is

    def __cinit__(self, Engine engine not None):
        self.engine = engine

    def encode_into(self, ids, out, *, stream=None):
        """Writes E[ids] into the caller's array.

        Parameters
        ----------
        ids : int32 or int64 array, any shape
            Token ids in 0..V-1.
        out : float32 array, shape ids.shape + (D,)
            C-contiguous, writable, apart from `ids`. Complete on return if one of them is the host's.
        stream : int or stream object, optional
            The caller's stream, for device arrays (docs/INTEROP.md).

        Raises
        ------
        TypeError, ValueError, IndexError
            Wrong kind or dtype; shape, contiguity, read-only, overlap, empty or elsewhere; an id outside the
            vocabulary. Nothing is written then. Where both arrays are a device's, such an id makes a row of NaN, and
            the next call that waits raises the IndexError.
        """
        cdef Arrays arrays = Arrays(self.engine, stream)
        cdef Held a = arrays.read(ids, "ids", _IDS)
        cdef Held b = arrays.write(out, "out", _FLOATS)
        cdef Input source = as_input(a)
        cdef Output target = as_output(b)
        cdef int64_t count = a.size()
        b.check_shape((*a.shape, self.engine.config.dim))
        self.engine.enter()
        try:
            arrays.begin()
            if source.device:
                with nogil:
                    deref(self.engine.model).encode(source, count, target)
            else:
                self._encode_host(a, target)
            arrays.end(arrays.waits)
        finally:
            self.engine.busy = False

    cdef int _encode_host(self, Borrowed ids, Output target) except -1:
        """Through the staging buffer of ids: no allocation, whatever the count."""
        cdef int32_t* piece = self.engine.ids.data()
        cdef int64_t i, some, first = 0, count = ids.size(), room = self.engine.ids.size()
        cdef int64_t row = sizeof(float) * <int64_t>self.engine.config.dim
        cdef char* out = <char*>target.data
        cdef Input source
        source.data, source.itemsize = piece, sizeof(int32_t)
        self.engine.check_ids(ids)
        with nogil:
            while first < count:
                some = min(room, count - first)
                for i in range(some):
                    piece[i] = <int32_t>ids.integer(first + i)
                target.data = out + first * row
                deref(self.engine.model).encode(source, some, target)
                first += some
        return 0

    def encode(self, ids):
        """E[ids] as a new array; `encode_into` is the same without the allocation."""
        cdef Held a = Arrays(self.engine, None).read(ids, "ids", _IDS)
        out = np.empty((*a.shape, self.engine.config.dim), np.float32)
        self.encode_into(ids, out)
        return out

    def row_view(self, id):
        """A read-only view [D] of one token's embedding, which follows training: a NumPy array on the CPU, a DeviceView
        on a device. IndexError outside 0..V-1."""
        cdef TensorView table = self.table
        cdef int64_t first
        if isinstance(id, bool) or not isinstance(id, Integral):
            raise TypeError(f"id: expected an integer, got {type(id).__name__}")
        vocab = self.engine.config.vocab_size
        if not 0 <= id < vocab:
            raise IndexError(f"id: expected a token id in 0..{vocab - 1}, got {id}")
        if table is None:
            table = self.table = self.engine.parameters()["embedding.weight"]
        if not ON_DEVICE:
            return np.asarray(table)[id]
        dim, first = table.shape[1], id * table.shape[1]
        return tensor_view(self.engine, f"embedding.weight[{id}]", <float*>table.data + first, (dim,), True)


cdef class Brain:
    """The cortical regions of a model, up to Broca's output, one token at a time."""

    cdef Engine engine
    cdef NeuronState state

    def __cinit__(self, Engine engine not None):
        self.engine = engine
        self.state = engine.own_state()

    def step(self, x, *, hold=False, stream=None):
        """Runs one token through all levels and advances the model's own state.

        Parameters
        ----------
        x : float32 array [B, D], or [D] if B = 1
            What the regions hear as the embedding.
        hold : bool
            Keep the step open for `Engine.learn_held` (the token-by-token training loop); the state advances
            only there.
        stream : int or stream object, optional
            The caller's stream, for device arrays (docs/INTEROP.md).

        Raises
        ------
        TypeError, ValueError
            Wrong kind or dtype; shape, contiguity, empty, elsewhere, or values that are not finite.
        OverflowError
            When the neuron state would not be finite; it stays as it was. With x on a device this and values that
            are not finite are raised by the next call that waits, and nothing has changed since the step.
        """
        cdef Arrays arrays = Arrays(self.engine, stream)
        cdef Held a = arrays.read(x, "x", _FLOATS)
        cdef Input rows = as_input(a)
        cdef bint keep_open = hold
        self._check_width(a)
        check_finite_here(a)
        self.engine.enter()
        try:
            arrays.begin()
            self.engine.recorded_tokens = 0
            with nogil:
                deref(self.engine.model).step(rows, keep_open)
            arrays.end(arrays.waits or keep_open)
        finally:
            self.engine.busy = False

    def broca_output_into(self, out, *, stream=None):
        """Writes Broca's output after the last token into the caller's array.

        broca = o / sqrt(mean(o^2) + 1e-5), o the leaky integral of what Broca's area and its helpers say.

        Parameters
        ----------
        out : float32 array [B, D], or [D] if B = 1
            C-contiguous, writable. Complete on return if it is the host's.
        stream : int or stream object, optional
            The caller's stream, for device arrays (docs/INTEROP.md).

        Raises
        ------
        TypeError, ValueError
            Wrong kind or dtype; shape, contiguity, read-only, empty or elsewhere. Nothing is written then.
        """
        cdef Arrays arrays = Arrays(self.engine, stream)
        cdef Held a = arrays.write(out, "out", _FLOATS)
        cdef Output to = as_output(a)
        self._check_width(a)
        self.engine.enter()
        try:
            arrays.begin()
            with nogil:
                deref(self.engine.model).broca_output(to)
            arrays.end(arrays.waits)
        finally:
            self.engine.busy = False

    def broca_output(self):
        """Broca's output after the last token as a new array [B, D]."""
        out = np.empty((self.engine.streams, self.engine.config.dim), np.float32)
        self.broca_output_into(out)
        return out

    def reset(self, streams=None):
        """Clears v, w, o and past spikes of all streams, or of those in `streams` (IndexError outside 0..B-1)."""
        self.state.reset(streams)

    cdef int _check_width(self, Held a) except -1:
        if self.engine.streams > 1 or len(a.shape) != 1:
            return a.check_shape((self.engine.streams, self.engine.config.dim))
        return a.check_shape((self.engine.config.dim,))


cdef class Decoder:
    """The vocabulary decoder of a model: logits = W broca + c, and sampling from them."""

    cdef Engine engine

    def __cinit__(self, Engine engine not None):
        self.engine = engine

    def logits_into(self, broca, out, *, stream=None):
        """Writes logits = W broca + c into the caller's array.

        Parameters
        ----------
        broca : float32 array [M, D]
        out : float32 array [M, V]
            C-contiguous, writable, apart from `broca`. Complete on return if one of them is the host's.
        stream : int or stream object, optional
            The caller's stream, for device arrays (docs/INTEROP.md).

        Raises
        ------
        TypeError, ValueError
            Wrong kind or dtype; shape, contiguity, read-only, overlap, empty or elsewhere. Nothing is written then.
        """
        cdef Arrays arrays = Arrays(self.engine, stream)
        cdef Held a = arrays.read(broca, "broca", _FLOATS)
        cdef Held b = arrays.write(out, "out", _FLOATS)
        cdef int64_t rows = self._rows(a)
        cdef Input source = as_input(a)
        cdef Output to = as_output(b)
        b.check_shape((rows, self.engine.config.vocab_size))
        self.engine.enter()
        try:
            arrays.begin()
            with blas_at_one_thread, nogil:
                deref(self.engine.model).logits(source, rows, to)
            arrays.end(arrays.waits)
        finally:
            self.engine.busy = False

    def sample_into(self, broca, ids_out, temperature=1.0, top_k=0, top_p=1.0, greedy=False, seed=0, position=0, *,
                    stream=None):
        """Draws one token per row of `broca`.

        Parameters
        ----------
        broca : float32 array [M, D]
        ids_out : int32 array [M]
            Apart from `broca`; complete on return if one of them is the host's.
        temperature : float > 0
        top_k : int >= 0
            Keep the k most probable tokens; 0 keeps all.
        top_p : float in (0, 1]
            Keep the shortest prefix, most probable first, that holds this share of what top_k left.
        greedy : bool
            The most probable token (lowest id on ties) instead of a draw.
        seed, position : int in 0..2**64-1
            Row m draws from Philox keyed by (seed, position, m): the same arguments give the same tokens.
        stream : int or stream object, optional
            The caller's stream, for device arrays (docs/INTEROP.md).

        Raises
        ------
        TypeError, ValueError
            Wrong kind or dtype; shape, contiguity, read-only, overlap, empty or elsewhere; values that are not
            finite. Nothing is written then. Where both arrays are a device's, values that are not finite are raised
            by the next call that waits.
        """
        cdef Arrays arrays = Arrays(self.engine, stream)
        cdef Held a = arrays.read(broca, "broca", _FLOATS)
        cdef Held b = arrays.write(ids_out, "ids_out", ("int32",))
        cdef int64_t rows = self._rows(a)
        cdef Input source = as_input(a)
        cdef Output to = as_output(b)
        cdef Sampling sampling = sampling_of(temperature, top_k, top_p, greedy, seed, position)
        check_finite_here(a)
        b.check_shape((rows,))
        self.engine.enter()
        try:
            arrays.begin()
            with blas_at_one_thread, nogil:
                deref(self.engine.model).sample(source, rows, sampling, to)
            arrays.end(arrays.waits)
        finally:
            self.engine.busy = False

    cdef int64_t _rows(self, Held broca) except -1:
        dim = self.engine.config.dim
        if len(broca.shape) != 2 or broca.shape[1] != dim:
            raise ValueError(f"{broca.name}: expected shape [M, {dim}], got {broca.shape}")
        return broca.shape[0]


cdef int check_finite_here(Held array) except -1:
    """Of an array of the host; those of a device are checked where they are."""
    return (<Borrowed>array).check_finite() if isinstance(array, Borrowed) else 0
