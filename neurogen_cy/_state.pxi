# Neuron state as arrays, and the checks of arrays that are copied into a model.

from neurogen_cy._neurogen cimport State


cdef class NeuronState:
    """Neuron state of S streams: the model's own, or one that belongs to an evaluation or a generation."""

    cdef Engine engine
    cdef unique_ptr[State] owned
    cdef State* state
    cdef readonly int streams

    def __init__(self):
        raise TypeError("NeuronState: expected to be taken from an Engine (own_state, new_state), got a call")

    def arrays(self):
        """{key: copy}: region.<name>.v and .w [S, n], .spikes [S, K, n] (newest first), broca.o [S, D]."""
        self.engine.enter()
        try:
            return {view.key: np.array(_streams_first(view), order="C") for view in self.views(True)}
        finally:
            self.engine.busy = False

    def load(self, values):
        """Copies arrays as `arrays` gives them; nothing changes unless all of them fit."""
        _check_mapping("state", values)
        self.engine.enter()
        try:
            pairs = [(_streams_first(view), _new_value(values, view)) for view in self.views(False)]
            unknown = set(values) - {view.key for view in self.views(True)}
            if unknown:
                raise ValueError(f"state: expected no other keys than the model's, got {sorted(map(str, unknown))}")
            for to, value in pairs:
                to[...] = value
        finally:
            self.engine.busy = False

    def reset(self, streams=None):
        """Clears all streams, or those numbered in `streams`."""
        cdef unsigned char[::1] flags
        which = np.zeros(self.streams, np.uint8)
        for stream in range(self.streams) if streams is None else np.atleast_1d(streams).tolist():
            if isinstance(stream, bool) or not isinstance(stream, int):
                raise TypeError(f"streams: expected integers, got {stream!r}")
            if not 0 <= stream < self.streams:
                raise IndexError(f"streams: expected 0..{self.streams - 1}, got {stream}")
            which[stream] = 1
        flags = which
        self.engine.enter()
        try:
            self.state.clear(&flags[0])
        finally:
            self.engine.busy = False

    cdef list views(self, bint readonly):
        cdef vector[Tensor] tensors = self.state.arrays()
        out = []
        for i in range(tensors.size()):
            out.append(make_view(tensors[i].key.decode(), self, tensors[i].data, tuple(tensors[i].shape),
                                 np.float32, readonly))
        return out


cdef object _streams_first(TensorView view):
    """Spikes are [K, S, n] inside and [S, K, n] outside."""
    array = np.asarray(view)
    return array.transpose(1, 0, 2) if view.key.endswith(".spikes") else array


cdef int _check_mapping(str name, object values) except -1:
    if not isinstance(values, Mapping):
        raise TypeError(f"{name}: expected a mapping of key to array, got {type(values).__name__}")
    return 0


cdef object _new_value(object values, TensorView view):
    """values[key], checked against the array it will be copied into."""
    if view.key not in values:
        raise ValueError(f"{view.key}: expected a value, got none")
    value = host_array(values[view.key], view.key, (view.dtype.name,))
    expected = _streams_first(view).shape
    if value.shape != expected:
        raise ValueError(f"{view.key}: expected shape {expected}, got {value.shape}")
    if not np.isfinite(value).all():
        raise ValueError(f"{view.key}: expected finite values, got NaN or infinity")
    return value
