# The binding, one text for every backend. The including .pyx defines BACKEND, make_model() and memory_plan_of().
# Layers: the Python face (model.py) decides policy; here arguments are checked, the GIL is released and
# native errors become exceptions; the library computes.

from collections.abc import Mapping
from numbers import Integral, Real

import numpy as np

from cython.operator cimport dereference as deref
from libc.math cimport NAN, isfinite
from libc.string cimport memcpy

from neurogen_cy.threads import blas_at_one_thread

include "_buffers.pxi"

cdef tuple _IDS = ("int32", "int64")
cdef tuple _FLOATS = ("float32",)
cdef tuple _FLAGS = ("bool", "uint8")


cdef ModelSpec make_spec(object cfg, dict topology, int streams, int max_tokens, int threads,
                         uint64_t seed) except *:
    """The native description of a Config; `topology` maps projection keys to their block columns (int32)."""
    cdef ModelSpec spec
    cdef RegionSpec region_spec
    cdef ProjectionSpec projection_spec
    cdef const int32_t[::1] cols
    spec.vocab, spec.dim = cfg.vocab_size, cfg.dim
    spec.graded, spec.tied = cfg.graded, cfg.tie_decoder
    spec.surrogate_k, spec.dropout = cfg.surrogate_k, cfg.dropout
    spec.max_spike = float("inf") if cfg.max_spike is None else cfg.max_spike
    spec.rate_target, spec.rate_weight = cfg.rate_target, cfg.rate_weight
    spec.streams, spec.max_tokens, spec.threads, spec.seed = streams, max_tokens, threads, seed
    index = {"embedding": -1, "broca_out": len(cfg.regions)}
    for number, region in enumerate(cfg.regions):
        index[region.name] = number
        region_spec.name = region.name.encode()
        region_spec.neurons, region_spec.level = region.neurons, region.level
        spec.regions.push_back(region_spec)
    for projection in cfg.projections:
        key = cfg.key(projection)
        projection_spec.key = key.encode()
        projection_spec.src, projection_spec.dst = index[projection.src], index[projection.dst]
        projection_spec.delay, projection_spec.gate = projection.delay, projection.kind == "gate"
        projection_spec.blocks_per_row = cfg.blocks_per_row(projection)
        projection_spec.cols.clear()
        if key in topology:
            cols = topology[key]
            projection_spec.cols.assign(&cols[0], &cols[0] + cols.shape[0])
        spec.projections.push_back(projection_spec)
    return spec


def memory_plan(cfg, int streams, int max_tokens, int threads):
    """Bytes by part that a model of this configuration allocates, before anything is allocated."""
    plan = memory_plan_of(make_spec(cfg, {}, streams, max_tokens, threads, 0))
    return {part.first.decode(): part.second for part in plan}


include "_state.pxi"


cdef class Engine:
    """The native model behind a NeuroGen: owns it, stages arguments, admits one thread at a time."""

    cdef unique_ptr[Model] model
    cdef readonly object config
    cdef readonly int streams, max_tokens
    cdef dict topology
    cdef bint busy
    cdef vector[int32_t] ids, targets
    cdef vector[uint8_t] resets
    cdef StepStats stats
    cdef int recorded_streams, recorded_tokens

    def __cinit__(self, cfg, dict topology, int streams, int max_tokens, int threads, uint64_t seed):
        self.config, self.topology = cfg, topology
        self.streams, self.max_tokens = streams, max_tokens
        self.ids.resize(streams * <size_t>max_tokens)
        self.targets.resize(streams * <size_t>max_tokens)
        self.resets.resize(streams * <size_t>max_tokens)
        self.model.reset(make_model(make_spec(cfg, topology, streams, max_tokens, threads, seed)))

    cdef int enter(self) except -1:
        # The GIL is held here, so looking and setting cannot be split by another thread.
        if self.busy:
            raise RuntimeError("this model is in use by another thread: a model serves one thread at a time")
        self.busy = True
        return 0

    # ---- staging -------------------------------------------------------------------------------------------

    cdef tuple token_shape(self, Borrowed ids):
        """(S, T) of a call on the model's own streams: [B, T], or [T] where B = 1."""
        shape = ids.shape()
        if len(shape) == 1 and self.streams == 1:
            shape = (1, *shape)
        if len(shape) != 2 or shape[0] != self.streams or not 1 <= shape[1] <= self.max_tokens:
            flat = " or [T]" if self.streams == 1 else ""
            raise ValueError(f"{ids.name}: expected shape [{self.streams}, T]{flat} with 1 <= T <= "
                             f"{self.max_tokens}, got {ids.shape()}")
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
            where = ", ".join([str(k) for k in np.unravel_index(bad, ids.shape())])
            raise IndexError(f"{ids.name}[{where}]: expected a token id in 0..{vocab - 1}, got {ids.integer(bad)}")
        return 0

    cdef int stage_ids(self, Borrowed ids, int32_t* out) except -1:
        cdef Py_ssize_t i, count = ids.size()
        self.check_ids(ids)
        with nogil:
            for i in range(count):
                out[i] = <int32_t>ids.integer(i)
        return 0

    cdef int stage_call(self, object ids, object targets, object resets, tuple shape, Tokens* tokens) except -1:
        """ids, targets and resets of one call, all [S, T] or all [T]; shape: () = the model's own streams."""
        cdef Borrowed a = borrow(ids, "ids", _IDS)
        cdef Borrowed b
        if not shape:
            shape = self.token_shape(a)
        else:
            a.check_shape(shape)
        if targets is not None:
            b = borrow(targets, "targets", _IDS)
            b.check_shape(a.shape())
            self.stage_ids(b, self.targets.data())
        tokens.resets = NULL
        if resets is not None:
            b = borrow(resets, "resets", _FLAGS)
            b.check_shape(a.shape())
            memcpy(self.resets.data(), b.view.buf, b.view.len)
            tokens.resets = self.resets.data()
        self.stage_ids(a, self.ids.data())
        tokens.streams, tokens.tokens = shape
        tokens.ids = self.ids.data()
        return 0

    cdef int check_weights(self, Borrowed weights, bint signed) except -1:
        cdef const float* w = <const float*>weights.view.buf
        for i in range(weights.size()):
            if not isfinite(w[i]):
                raise ValueError(f"weights: expected finite values, got {w[i]}")
            if w[i] < 0 and not signed:
                raise ValueError(f"weights: expected values >= 0 with normalize='sum', got {w[i]}; "
                                 "normalize='abs' takes signed weights")
        return 0

    # ---- learning ------------------------------------------------------------------------------------------

    def train(self, ids, targets, weights, resets, normalize, divisor, predictions_out, bint record,
              uint64_t call, adam, bint accumulate):
        """Forward, loss and backward; with `adam` (see _adam) the update too. Returns the statistics as a tuple."""
        cdef Tokens tokens
        cdef Targets goal
        cdef CAdamW step
        cdef Borrowed a, p, w = None
        cdef bint updates = adam is not None
        self.enter()
        try:
            if targets is None:
                raise TypeError("targets: expected an array of token ids, got None")
            self.stage_call(ids, targets, resets, (), &tokens)
            a = borrow(ids, "ids", _IDS)
            goal.ids = self.targets.data()
            if normalize not in ("sum", "abs"):
                raise ValueError(f"normalize: expected 'sum' or 'abs', got {normalize!r}")
            goal.normalize = Normalize.absolute if normalize == "abs" else Normalize.sum
            if divisor is not None:
                check_real("divisor", divisor)
                goal.divisor = divisor
                if not (isfinite(goal.divisor) and goal.divisor >= 0):
                    raise ValueError(f"divisor: expected a finite number >= 0, got {divisor!r}")
            if weights is not None:
                w = borrow(weights, "weights", _FLOATS)
                w.check_shape(a.shape())
                self.check_weights(w, normalize == "abs")
                goal.weights = <const float*>w.view.buf
            if predictions_out is not None:
                p = borrow(predictions_out, "predictions_out", ("int32",), True)
                p.check_shape(a.shape())
                p.check_apart(a)
                if w is not None:
                    p.check_apart(w)
                p.check_apart(borrow(targets, "targets", _IDS))
                goal.predictions = <int32_t*>p.view.buf
            if updates:
                step = _adam(adam)
            self.recorded_tokens = 0
            self.stats.grad_norm = NAN  # stays so where the loss is not finite
            with blas_at_one_thread, nogil:
                if updates:
                    deref(self.model).train(tokens, goal, step, call, &self.stats)
                else:
                    deref(self.model).backward(tokens, goal, call, accumulate, &self.stats)
            if record:
                self.recorded_streams, self.recorded_tokens = tokens.streams, tokens.tokens
            return self.take_stats()
        finally:
            self.busy = False

    def update(self, adam):
        """AdamW on the gradients as they stand. Returns (gradient norm, finite)."""
        cdef CAdamW step = _adam(adam)
        self.enter()
        try:
            with nogil:
                deref(self.model).update(step, &self.stats)
            return self.stats.grad_norm, self.stats.finite
        finally:
            self.busy = False

    def learn_held(self, ids, targets, adam):
        """Learns from the open step (see Brain.step with hold): ids and targets [B]."""
        cdef Tokens tokens
        cdef Targets goal
        cdef CAdamW step = _adam(adam)
        self.enter()
        try:
            self.stage_call(ids[:, None], targets[:, None], None, (), &tokens)
            goal.ids = self.targets.data()
            self.stats.grad_norm = NAN
            with blas_at_one_thread, nogil:
                deref(self.model).learn_held(self.ids.data(), goal, step, &self.stats)
            return self.take_stats()
        finally:
            self.busy = False

    cdef tuple take_stats(self):
        cdef list rates = [deref(self.model).rate(r) for r in range(len(self.config.regions))]
        return (self.stats.loss, self.stats.homeostasis, self.stats.correct, self.stats.tokens,
                self.stats.grad_norm, self.stats.finite, rates)

    # ---- running -------------------------------------------------------------------------------------------

    def own_state(self):
        """The model's own state, B streams."""
        cdef NeuronState out = NeuronState.__new__(NeuronState)
        out.engine, out.state, out.streams = self, &deref(self.model).state(), self.streams
        return out

    def new_state(self, int streams):
        """A state from zero."""
        cdef NeuronState out = NeuronState.__new__(NeuronState)
        out.owned.reset(deref(self.model).new_state(streams).release())
        out.engine, out.state, out.streams = self, out.owned.get(), streams
        return out

    def evaluate(self, NeuronState state not None, ids, targets, resets, int tokens):
        """Advances `state` over [S, tokens]; returns the summed cross-entropy in nats."""
        cdef Tokens call
        cdef double total = 0
        self.enter()
        try:
            self.stage_call(ids, targets, resets, (state.streams, tokens), &call)
            self.recorded_tokens = 0
            with blas_at_one_thread, nogil:
                total = deref(self.model).evaluate(deref(state.state), call, self.targets.data())
            return total
        finally:
            self.busy = False

    def advance(self, NeuronState state not None, ids, broca_out):
        """Advances `state` over ids [S, T]; broca_out [S, D] gets the output after the last token."""
        cdef Tokens call
        cdef Borrowed out = borrow(broca_out, "broca_out", _FLOATS, True)
        cdef Borrowed a = borrow(ids, "ids", _IDS)
        cdef float* broca = <float*>out.view.buf
        self.enter()
        try:
            out.check_shape((state.streams, self.config.dim))
            self.stage_call(ids, None, None, a.shape(), &call)
            self.recorded_tokens = 0
            with blas_at_one_thread, nogil:
                deref(self.model).advance(deref(state.state), call, broca)
        finally:
            self.busy = False

    # ---- looking -------------------------------------------------------------------------------------------

    def parameters(self):
        """{key: read-only view} of every model tensor."""
        cdef vector[Tensor]* tensors = &deref(self.model).tensors()
        cdef int32_t[::1] array
        out = {}
        for i in range(tensors.size()):
            key = deref(tensors)[i].key.decode()
            out[key] = make_view(key, self, deref(tensors)[i].data, tuple(deref(tensors)[i].shape), np.float32, True)
            if key.endswith(".blocks"):
                base = key[: -len(".blocks")]
                cols = self.topology[base]
                k = cols.size // (self.config.width(base.split(".")[2]) // 32)
                rows = np.repeat(np.arange(cols.size // k, dtype=np.int32), k)
                for name, values in (("rows", rows), ("cols", cols)):
                    array = values
                    out[f"{base}.{name}"] = make_view(f"{base}.{name}", values, &array[0], values.shape, np.int32,
                                                      True)
        return out

    def load_parameters(self, values):
        """Copies float parameters by key; nothing changes unless all of them fit."""
        _check_mapping("parameters", values)
        self.enter()
        try:
            views = self.writable_tensors()
            pairs = []
            for key in values:
                if key not in views:
                    raise ValueError(f"parameters: expected keys of this model, got {key!r}")
                pairs.append((np.asarray(views[key]), _new_value(values, views[key])))
            for to, value in pairs:
                to[...] = value
            deref(self.model).parameters_written()
        finally:
            self.busy = False

    cdef dict writable_tensors(self):
        cdef vector[Tensor]* tensors = &deref(self.model).tensors()
        return {view.key: view for view in [
            make_view(deref(tensors)[i].key.decode(), self, deref(tensors)[i].data, tuple(deref(tensors)[i].shape),
                      np.float32, False) for i in range(tensors.size())]}

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
            out[key] = make_view(key, self, data, tuple(deref(tensors)[i].shape), np.float32, False)
        return out

    def gradients(self):
        """{key: writable view} of every trainable tensor's gradient."""
        deref(self.model).gradients_exposed()
        return self.trainable_views(0)

    def moments(self):
        """{key: (first, second)} writable views of AdamW's moments."""
        first, second = self.trainable_views(1), self.trainable_views(2)
        return {key: (first[key], second[key]) for key in first}

    def recorded(self, int region):
        """(u, s) of the last training call with record=True, [B, T, n] copies."""
        cdef float[:, :, ::1] to_u
        cdef float[:, :, ::1] to_s
        self.enter()
        try:
            if not self.recorded_tokens:
                raise RuntimeError("recorded: expected the last call to be a training call with record=True, got none")
            shape = (self.recorded_tokens, self.recorded_streams, self.config.regions[region].neurons)
            u, s = np.empty(shape, np.float32), np.empty(shape, np.float32)
            to_u, to_s = u, s
            deref(self.model).recorded(region, &to_u[0, 0, 0], &to_s[0, 0, 0])
            return np.ascontiguousarray(u.transpose(1, 0, 2)), np.ascontiguousarray(s.transpose(1, 0, 2))
        finally:
            self.busy = False

    def counters(self):
        """Launches, synchronisations, bytes and allocations since construction."""
        cdef Counters c = deref(self.model).counters()
        return {"launches": c.launches, "syncs": c.syncs, "h2d_bytes": c.h2d_bytes, "d2h_bytes": c.d2h_bytes,
                "device_allocations": c.device_allocations, "host_allocations": c.host_allocations}


cdef CAdamW _adam(object adam) except *:
    """adam: (lr, beta1, beta2, eps, weight_decay, clip, 1-based step number)."""
    cdef CAdamW out
    out.lr, out.beta1, out.beta2, out.eps, out.weight_decay, out.clip, out.step = adam
    return out


include "_modules.pxi"
