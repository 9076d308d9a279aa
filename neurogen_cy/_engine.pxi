# The calls of a model: arguments are checked and staged, then the library runs without the GIL.

from neurogen_cy._neurogen cimport (
    CAdamW, Input, Normalize, Output, Sampling, StepStats, Targets, Tokens, int32_t, int64_t, uint8_t, uint64_t, vector,
)


ctypedef fused token_id:
    int32_t
    int64_t


cdef bint take_ids(const token_id* ids, Py_ssize_t count, uint64_t vocab, int32_t* to) noexcept nogil:
    """Copies ids; whether all are in 0..vocab-1, which is asked of all in one pass without a branch."""
    cdef Py_ssize_t i
    cdef bint wrong = False
    for i in range(count):
        to[i] = <int32_t>ids[i]
        wrong |= <uint64_t>ids[i] >= vocab
    return not wrong


@cython.no_gc_clear
cdef class Engine(Core):
    """The native model behind a NeuroGen."""

    cdef vector[int32_t] ids, targets
    cdef vector[uint8_t] resets
    cdef StepStats stats

    def __cinit__(self, *_):
        cdef size_t rows = self.streams * <size_t>self.max_tokens
        self.ids.resize(rows)
        self.targets.resize(rows)
        self.resets.resize(rows)

    # ---- staging -------------------------------------------------------------------------------------------

    cdef tuple token_shape(self, Held ids):
        """(S, T) of a call on the model's own streams: [B, T], or [T] where B = 1."""
        shape = ids.shape
        if len(shape) == 1 and self.streams == 1:
            shape = (1, *shape)
        if len(shape) != 2 or shape[0] != self.streams or not 1 <= shape[1] <= self.max_tokens:
            flat = " or [T]" if self.streams == 1 else ""
            raise ValueError(f"{ids.name}: expected shape [{self.streams}, T]{flat} with 1 <= T <= "
                             f"{self.max_tokens}, got {ids.shape}")
        return shape

    cdef int check_ids(self, Borrowed ids) except -1:
        cdef Py_ssize_t i, count = ids.size(), bad = -1
        cdef int64_t id, vocab = self.config.vocab_size
        with nogil:
            for i in range(count):
                id = ids.integer(i)
                if id < 0 or id >= vocab:
                    bad = i
                    break
        if bad >= 0:
            where = ", ".join([str(k) for k in np.unravel_index(bad, ids.shape)])
            raise IndexError(f"{ids.name}[{where}]: expected a token id in 0..{vocab - 1}, got {ids.integer(bad)}")
        return 0

    cdef int stage_ids(self, Held ids, int32_t* staging, Input* out) except -1:
        """Ids of the host are checked and made int32; those of a device are read, and checked, where they are."""
        cdef Py_ssize_t count = ids.size()
        cdef int64_t vocab = self.config.vocab_size
        cdef bint right
        out[0] = as_input(ids)
        if out.device:
            return 0
        with nogil:
            if out.itemsize == sizeof(int32_t):
                right = take_ids(<const int32_t*>out.data, count, vocab, staging)
            else:
                right = take_ids(<const int64_t*>out.data, count, vocab, staging)
        if not right:
            self.check_ids(ids)  # names the first that is none
        out.data, out.itemsize = staging, sizeof(int32_t)
        return 0

    cdef int stage_resets(self, Held resets, Input* out) except -1:
        out[0] = as_input(resets)
        if not out.device:
            memcpy(self.resets.data(), resets.data, resets.bytes)
            out.data = self.resets.data()
        return 0

    cdef Held stage_call(self, Arrays arrays, object ids, object targets, object resets, tuple shape, Tokens* tokens,
                         Input* goal):
        """ids (returned), targets, resets of one call, all [S, T] or all [T]; shape: () = the model's own streams."""
        cdef Held a = arrays.read(ids, "ids", _IDS)
        cdef Held b
        if not shape:
            shape = self.token_shape(a)
        else:
            a.check_shape(shape)
        if targets is not None:
            b = arrays.read(targets, "targets", _IDS)
            b.check_shape(a.shape)
            self.stage_ids(b, self.targets.data(), goal)
        if resets is not None:
            b = arrays.read(resets, "resets", _FLAGS)
            b.check_shape(a.shape)
            self.stage_resets(b, &tokens.resets)
        self.stage_ids(a, self.ids.data(), &tokens.ids)
        tokens.streams, tokens.tokens = shape
        return a

    cdef int check_weights(self, Borrowed weights, bint signed) except -1:
        cdef const float* w = <const float*>weights.data
        for i in range(weights.size()):
            if not isfinite(w[i]):
                raise ValueError(f"weights: expected finite values, got {w[i]}")
            if w[i] < 0 and not signed:
                raise ValueError(f"weights: expected values >= 0 with normalize='sum', got {w[i]}; "
                                 "normalize='abs' takes signed weights")
        return 0

    # ---- learning ------------------------------------------------------------------------------------------

    def train(self, ids, targets, weights, resets, normalize, divisor, predictions_out, bint record,
              uint64_t call, adam, bint accumulate, stream=None):
        """Forward, loss and backward; with `adam` (see _adam) the update too. Returns the statistics as a tuple."""
        cdef Tokens tokens
        cdef Targets goal
        cdef CAdamW step
        cdef Held a, w
        cdef Arrays arrays = Arrays(self, stream)
        cdef bint updates = adam is not None
        self.enter()
        try:
            if targets is None:
                raise TypeError("targets: expected an array of token ids, got None")
            a = self.stage_call(arrays, ids, targets, resets, (), &tokens, &goal.ids)
            if normalize not in ("sum", "abs"):
                raise ValueError(f"normalize: expected 'sum' or 'abs', got {normalize!r}")
            goal.normalize = Normalize.absolute if normalize == "abs" else Normalize.sum
            if divisor is not None:
                check_real("divisor", divisor)
                goal.divisor = divisor
                if not (isfinite(goal.divisor) and goal.divisor >= 0):
                    raise ValueError(f"divisor: expected a finite number >= 0, got {divisor!r}")
            if weights is not None:
                w = arrays.read(weights, "weights", _FLOATS)
                w.check_shape(a.shape)
                if isinstance(w, Borrowed):
                    self.check_weights(w, normalize == "abs")
                goal.weights = as_input(w)
            if predictions_out is not None:
                w = arrays.write(predictions_out, "predictions_out", ("int32",))
                w.check_shape(a.shape)
                goal.predictions = as_output(w)
            arrays.begin()
            if updates:
                step = _adam(adam)
                step.awaited = self.shown or arrays.on_device  # others may look on as soon as this returns
            self.recorded_tokens = 0
            self.stats.grad_norm = NAN  # stays so where the loss is not finite
            with blas_at_one_thread, nogil:
                if updates:
                    deref(self.model).train(tokens, goal, step, call, &self.stats)
                else:
                    deref(self.model).backward(tokens, goal, call, accumulate, &self.stats)
            arrays.end(True)
            if record:
                self.keep_record(tokens, False)
            return self.take_stats()
        finally:
            self.busy = False

    def update(self, adam, stream=None):
        """AdamW on the gradients as they stand. Returns (gradient norm, finite)."""
        cdef CAdamW step = _adam(adam)
        cdef Arrays arrays = Arrays(self, stream)
        self.enter()
        try:
            arrays.begin()
            with nogil:
                deref(self.model).update(step, &self.stats)
            return self.stats.grad_norm, self.stats.finite
        finally:
            self.busy = False

    def learn_held(self, ids, targets, adam):
        """Learns from the open step (see Brain.step with hold): ids and targets [B], of the host."""
        cdef Tokens tokens
        cdef Targets goal
        cdef CAdamW step = _adam(adam)
        cdef Arrays arrays = Arrays(self, None)
        self.enter()
        try:
            self.stage_call(arrays, ids[:, None], targets[:, None], None, (), &tokens, &goal.ids)
            arrays.begin()
            step.awaited = self.shown
            self.stats.grad_norm = NAN
            with blas_at_one_thread, nogil:
                deref(self.model).learn_held(self.ids.data(), goal, step, &self.stats)
            return self.take_stats()
        finally:
            self.busy = False

    cdef int keep_record(self, Tokens tokens, bint gates) except -1:
        """`recorded` may be asked: what it reads stays where the call has left it until the next one."""
        self.recorded_streams, self.recorded_tokens, self.recorded_gates = tokens.streams, tokens.tokens, gates
        return 0

    cdef tuple take_stats(self):
        cdef list rates = [deref(self.model).rate(r) for r in range(len(self.config.regions))]
        return (self.stats.loss, self.stats.homeostasis, self.stats.correct, self.stats.tokens,
                self.stats.grad_norm, self.stats.finite, rates)

    # ---- running -------------------------------------------------------------------------------------------

    def own_state(self):
        """The model's own state, B streams."""
        cdef NeuronState out = NeuronState.__new__(NeuronState)
        out.core, out.state, out.streams = self, &deref(self.model).state(), self.streams
        return out

    def new_state(self, int streams):
        """A state from zero."""
        cdef NeuronState out = NeuronState.__new__(NeuronState)
        out.owned.reset(deref(self.model).new_state(streams).release())
        out.core, out.state, out.streams = self, out.owned.get(), streams
        return out

    def evaluate(self, NeuronState state not None, ids, targets, resets, int tokens):
        """Advances `state` over [S, tokens]; returns the summed cross-entropy in nats."""
        cdef Tokens call
        cdef Input goal
        cdef double total = 0
        cdef Arrays arrays = Arrays(self, None)
        self.enter()
        try:
            self.stage_call(arrays, ids, targets, resets, (state.streams, tokens), &call, &goal)
            arrays.begin()
            self.recorded_tokens = 0
            with blas_at_one_thread, nogil:
                total = deref(self.model).evaluate(deref(state.state), call, goal)
            arrays.end(True)
            return total
        finally:
            self.busy = False

    def advance(self, NeuronState state not None, ids, broca_out, bint record=False):
        """Advances `state` over ids [S, T]; broca_out [S, D] gets the output after the last token."""
        cdef Tokens call
        cdef Input goal
        cdef Borrowed out = borrow(broca_out, "broca_out", _FLOATS, True)
        cdef Borrowed a = borrow(ids, "ids", _IDS)
        cdef Arrays arrays = Arrays(self, None)
        cdef float* broca = <float*>out.data
        self.enter()
        try:
            out.check_shape((state.streams, self.config.dim))
            self.stage_call(arrays, ids, None, None, a.shape, &call, &goal)
            arrays.begin()
            self.recorded_tokens = 0
            with blas_at_one_thread, nogil:
                deref(self.model).advance(deref(state.state), call, broca)
            if record:
                self.keep_record(call, True)
        finally:
            self.busy = False

    def generate(self, NeuronState state not None, broca, int count, *, temperature, top_k, top_p, greedy, seed,
                 position):
        """Draws `count` tokens a stream; `state` hears each before the next is drawn. Returns ids [count, S].

        broca [S, D] is what the first is drawn from, and then what the next would be; draws are numbered from
        `position` (see Decoder.sample_into). Fewer ids come back where the state would not have stayed finite after
        the next token; it has heard those that do, and broca means nothing then.
        """
        cdef Sampling sampling = sampling_of(temperature, top_k, top_p, greedy, seed, position)
        cdef Borrowed a = borrow(broca, "broca", _FLOATS, True)
        cdef float* rows = <float*>a.data
        cdef int32_t[::1] ids
        cdef int32_t* to
        cdef int heard = 0
        if count < 1:
            raise ValueError(f"count: expected an integer >= 1, got {count}")
        a.check_shape((state.streams, self.config.dim))
        a.check_finite()
        out = np.empty((count, state.streams), np.int32)
        ids = out.reshape(-1)
        to = &ids[0]
        self.enter()
        try:
            self.recorded_tokens = 0
            with blas_at_one_thread, nogil:
                heard = deref(self.model).generate(deref(state.state), rows, sampling, count, to)
            return out[:heard]
        finally:
            self.busy = False


cdef CAdamW _adam(object adam) except *:
    """adam: (lr, beta1, beta2, eps, weight_decay, clip, 1-based step number)."""
    cdef CAdamW out
    out.lr, out.beta1, out.beta2, out.eps, out.weight_decay, out.clip, out.step = adam
    return out
