# Arguments of drawing tokens.

from neurogen_cy._neurogen cimport Sampling

cdef double _LEAST = np.finfo(np.float32).tiny
cdef double _MOST = np.finfo(np.float32).max


def check_sampling(temperature, top_k, top_p, seed):
    """Refuses sampling arguments outside their ranges."""
    check_real("temperature", temperature)
    if not _LEAST <= temperature <= _MOST:
        raise ValueError(f"temperature: expected a finite float32 number > 0 (greedy=True for the most probable "
                         f"token), got {temperature!r}")
    if isinstance(top_k, bool) or not isinstance(top_k, Integral):
        raise TypeError(f"top_k: expected an integer >= 0, got {top_k!r}")
    if top_k < 0:
        raise ValueError(f"top_k: expected an integer >= 0, got {top_k!r}")
    check_real("top_p", top_p)
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a number in (0, 1], got {top_p!r}")
    _check_word("seed", seed)


cdef Sampling sampling_of(object temperature, object top_k, object top_p, object greedy, object seed,
                          object position) except *:
    """The arguments of a draw, checked."""
    cdef Sampling out
    check_sampling(temperature, top_k, top_p, seed)
    _check_word("position", position)
    out.temperature, out.top_k, out.top_p = temperature, min(top_k, 2**31 - 1), top_p
    out.greedy, out.seed, out.position = greedy, seed, position
    return out


cdef int check_real(str name, object value) except -1:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    return 0


cdef int _check_word(str name, object value) except -1:
    """An unsigned 64-bit integer."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}: expected an integer in 0..2**64-1, got {value!r}")
    if not 0 <= value < 2**64:
        raise ValueError(f"{name}: expected an integer in 0..2**64-1, got {value!r}")
    return 0
