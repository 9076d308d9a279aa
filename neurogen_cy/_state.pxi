# Neuron state as arrays. Spikes are [K, S, n] inside and [S, K, n] outside.

from neurogen_cy._neurogen cimport State, Tensor, unique_ptr, vector


cdef class NeuronState:
    """Neuron state of S streams: the model's own, or one that belongs to an evaluation or a generation."""

    cdef Core core
    cdef unique_ptr[State] owned
    cdef State* state
    cdef readonly int streams

    def __init__(self):
        raise TypeError("NeuronState: expected to be taken from an Engine (own_state, new_state), got a call")

    def arrays(self):
        """{key: copy}: region.<name>.v and .w [S, n], .spikes [S, K, n] (newest first), broca.o [S, D]."""
        cdef vector[Tensor] tensors
        self.core.enter()
        try:
            tensors = self.state.arrays()
            out = {}
            for i in range(tensors.size()):
                key, array = tensors[i].key.decode(), self.core.read(tensors[i].data, tuple(tensors[i].shape))
                out[key] = np.ascontiguousarray(array.transpose(1, 0, 2)) if _is_spikes(key) else array
            return out
        finally:
            self.core.busy = False

    def load(self, values):
        """Copies arrays as `arrays` gives them; nothing changes unless all of them fit."""
        cdef vector[Tensor] tensors
        _check_mapping("state", values)
        self.core.enter()
        try:
            tensors = self.state.arrays()
            known, pairs = set(), []
            for i in range(tensors.size()):
                key, shape = tensors[i].key.decode(), tuple(tensors[i].shape)
                known.add(key)
                if _is_spikes(key):
                    value = _new_value(values, key, (shape[1], shape[0], shape[2])).transpose(1, 0, 2)
                    if (value < 0).any():
                        raise ValueError(f"state: {key}: expected spikes >= 0, got {value.min()}")
                else:
                    value = _new_value(values, key, shape)
                pairs.append((i, value))
            if unknown := set(values) - known:
                raise ValueError(f"state: expected no other keys than the model's, got {sorted(map(str, unknown))}")
            for place, value in pairs:
                self.core.write(tensors[<int>place].data, value)
        finally:
            self.core.busy = False

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
        self.core.enter()
        try:
            self.state.clear(&flags[0])
        finally:
            self.core.busy = False


cdef bint _is_spikes(str key):
    return key.endswith(".spikes")
