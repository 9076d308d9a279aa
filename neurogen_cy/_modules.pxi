# The three organs a user holds: embedding, brain, decoder. Views of one Engine, no state of their own.

from neurogen_cy._neurogen cimport Sampling, int32_t, int64_t

cdef class TokenEmbedding:
    """Token embedding E [V, D] of a model.

    Examples
    --------
    >>> out = np.empty((len(ids), model.config.dim), np.float32)   # doctest: +SKIP
    >>> model.embedding.encode_into(ids, out)                      # doctest: +SKIP
    """

    cdef Engine engine

    def __cinit__(self, Engine engine not None):
        self.engine = engine

    def encode_into(self, ids, out):
        """Writes E[ids] into the caller's array.

        Parameters
        ----------
        ids : int32 or int64 array, any shape
            Token ids in 0..V-1.
        out : float32 array, shape ids.shape + (D,)
            C-contiguous, writable, apart from `ids`. Complete on return.

        Raises
        ------
        TypeError, ValueError, IndexError
            Wrong kind or dtype; shape, contiguity, read-only, overlap or empty; an id outside the vocabulary.
            Nothing is written then.
        """
        cdef Borrowed a = borrow(ids, "ids", _IDS)
        cdef Borrowed b = borrow(out, "out", _FLOATS, True)
        cdef float* to = <float*>b.data
        cdef int32_t* piece = self.engine.ids.data()
        cdef int64_t i, some, first = 0, count = a.size(), room = self.engine.ids.size(), dim = self.engine.config.dim
        b.check_shape((*a.shape, self.engine.config.dim))
        b.check_apart(a)
        self.engine.enter()
        try:
            self.engine.check_ids(a)
            with nogil:
                while first < count:  # through the staging buffer: no allocation, whatever the count
                    some = min(room, count - first)
                    for i in range(some):
                        piece[i] = <int32_t>a.integer(first + i)
                    deref(self.engine.model).encode(piece, some, to + first * dim)
                    first += some
        finally:
            self.engine.busy = False

    def encode(self, ids):
        """E[ids] as a new array; `encode_into` is the same without the allocation."""
        cdef Borrowed a = borrow(ids, "ids", _IDS)
        out = np.empty((*a.shape, self.engine.config.dim), np.float32)
        self.encode_into(ids, out)
        return out

    def row_view(self, id):
        """A read-only view [D] of one token's embedding, which follows training: a NumPy array on the CPU, a DeviceView
        on a device. IndexError outside 0..V-1."""
        cdef TensorView table
        cdef int64_t first
        if isinstance(id, bool) or not isinstance(id, Integral):
            raise TypeError(f"id: expected an integer, got {type(id).__name__}")
        vocab = self.engine.config.vocab_size
        if not 0 <= id < vocab:
            raise IndexError(f"id: expected a token id in 0..{vocab - 1}, got {id}")
        table = self.engine.parameters()["embedding.weight"]
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

    def step(self, x, *, hold=False):
        """Runs one token through all levels and advances the model's own state.

        Parameters
        ----------
        x : float32 array [B, D], or [D] if B = 1
            What the regions hear as the embedding.
        hold : bool
            Keep the step open for `Engine.learn_held` (the token-by-token training loop); the state advances
            only there.

        Raises
        ------
        TypeError, ValueError
            Wrong kind or dtype; shape, contiguity, empty, or values that are not finite.
        OverflowError
            When the neuron state would not be finite; it stays as it was.
        """
        cdef Borrowed a = borrow(x, "x", _FLOATS)
        cdef const float* rows = <const float*>a.data
        cdef bint keep_open = hold
        self._check_width(a)
        a.check_finite()
        self.engine.enter()
        try:
            self.engine.recorded_tokens = 0
            with nogil:
                deref(self.engine.model).step(rows, keep_open)
        finally:
            self.engine.busy = False

    def broca_output_into(self, out):
        """Writes Broca's output after the last token into the caller's array.

        broca = o / sqrt(mean(o^2) + 1e-5), o the leaky integral of what Broca's area and its helpers say.

        Parameters
        ----------
        out : float32 array [B, D], or [D] if B = 1
            C-contiguous, writable. Complete on return.

        Raises
        ------
        TypeError, ValueError
            Wrong kind or dtype; shape, contiguity, read-only, overlap or empty. Nothing is written then.
        """
        cdef Borrowed a = borrow(out, "out", _FLOATS, True)
        cdef float* to = <float*>a.data
        self._check_width(a)
        self.engine.enter()
        try:
            with nogil:
                deref(self.engine.model).broca_output(to)
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

    cdef int _check_width(self, Borrowed a) except -1:
        if self.engine.streams > 1 or len(a.shape) != 1:
            return a.check_shape((self.engine.streams, self.engine.config.dim))
        return a.check_shape((self.engine.config.dim,))


cdef class Decoder:
    """The vocabulary decoder of a model: logits = W broca + c, and sampling from them."""

    cdef Engine engine

    def __cinit__(self, Engine engine not None):
        self.engine = engine

    def logits_into(self, broca, out):
        """Writes logits = W broca + c into the caller's array.

        Parameters
        ----------
        broca : float32 array [M, D]
        out : float32 array [M, V]
            C-contiguous, writable, apart from `broca`. Complete on return.

        Raises
        ------
        TypeError, ValueError
            Wrong kind or dtype; shape, contiguity, read-only, overlap or empty. Nothing is written then.
        """
        cdef Borrowed a = borrow(broca, "broca", _FLOATS)
        cdef Borrowed b = borrow(out, "out", _FLOATS, True)
        cdef int64_t rows = self._rows(a)
        cdef const float* source = <const float*>a.data
        cdef float* to = <float*>b.data
        b.check_shape((rows, self.engine.config.vocab_size))
        b.check_apart(a)
        self.engine.enter()
        try:
            with blas_at_one_thread, nogil:
                deref(self.engine.model).logits(source, rows, to)
        finally:
            self.engine.busy = False

    def sample_into(self, broca, ids_out, temperature=1.0, top_k=0, top_p=1.0, greedy=False, seed=0, position=0):
        """Draws one token per row of `broca`.

        Parameters
        ----------
        broca : float32 array [M, D]
        ids_out : int32 array [M]
            Apart from `broca`; complete on return.
        temperature : float > 0
        top_k : int >= 0
            Keep the k most probable tokens; 0 keeps all.
        top_p : float in (0, 1]
            Keep the shortest prefix, most probable first, that holds this share of what top_k left.
        greedy : bool
            The most probable token (lowest id on ties) instead of a draw.
        seed, position : int in 0..2**64-1
            Row m draws from Philox keyed by (seed, position, m): the same arguments give the same tokens.

        Raises
        ------
        TypeError, ValueError
            Wrong kind or dtype; shape, contiguity, read-only, overlap or empty. Nothing is written then.
        """
        cdef Borrowed a = borrow(broca, "broca", _FLOATS)
        cdef Borrowed b = borrow(ids_out, "ids_out", ("int32",), True)
        cdef int64_t rows = self._rows(a)
        cdef const float* source = <const float*>a.data
        cdef int32_t* to = <int32_t*>b.data
        cdef Sampling sampling = sampling_of(temperature, top_k, top_p, greedy, seed, position)
        a.check_finite()
        b.check_shape((rows,))
        b.check_apart(a)
        self.engine.enter()
        try:
            with blas_at_one_thread, nogil:
                deref(self.engine.model).sample(source, rows, sampling, to)
        finally:
            self.engine.busy = False

    cdef int64_t _rows(self, Borrowed broca) except -1:
        dim = self.engine.config.dim
        if len(broca.shape) != 2 or broca.shape[1] != dim:
            raise ValueError(f"{broca.name}: expected shape [M, {dim}], got {broca.shape}")
        return broca.shape[0]
