"""Witten-Bell interpolated byte n-grams: the yardstick that validation figures stand beside.

With `h` the `n - 1` bytes before `c`, `h'` the same without its first byte, and `T(h)` the number of
distinct bytes that follow `h` in the training text::

    p_n(c | h) = (count(h, c) + T(h) * p_{n-1}(c | h')) / (count(h) + T(h)),      p_0(c) = 1 / 256

An `h` that the training text never continues leaves all to `p_{n-1}`.
Witten and Bell (1991), method C; interpolated as in Chen and Goodman (1998).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

MAX_ORDER = 8
"""Longest n-gram in bytes: one fits in a 64-bit key."""


def witten_bell(train: bytes, valid: bytes, order: int) -> float:
    """Return the bits per byte of `valid` under an n-gram of `order` bytes counted on `train`.

    Every byte of `valid` but the first is predicted, from at most `order - 1` bytes before it inside
    `valid`, so near its start the history is shorter.

    Raises
    ------
    ValueError
        If `order` is not in 1..8, `train` has fewer than `order` bytes or `valid` fewer than 2.
    """
    return baselines(train, valid, (order,))[order]


def baselines(train: bytes, valid: bytes, orders: Iterable[int] = (3, 4, 5)) -> dict[int, float]:
    """Return `{order: bits per byte}` for several orders at the price of the highest; see `witten_bell`."""
    wanted = sorted(set(orders))
    if not wanted or wanted[0] < 1 or wanted[-1] > MAX_ORDER:
        raise ValueError(f"expected orders in 1..{MAX_ORDER}, got {wanted}")
    if len(train) < wanted[-1]:
        raise ValueError(f"expected at least {wanted[-1]} bytes to count on, got {len(train)}")
    if len(valid) < 2:
        raise ValueError(f"expected at least 2 bytes to predict in, got {len(valid)}")
    probability = np.full(len(valid), 1.0 / 256.0)
    bits: dict[int, float] = {}
    for order in range(1, wanted[-1] + 1):
        _raise_order(probability, train, valid, order)
        if order in wanted:
            bits[order] = float(-np.mean(np.log2(probability[1:])))
    return bits


def _raise_order(probability: NDArray[np.float64], train: bytes, valid: bytes, order: int) -> None:
    """Turn `p_{order-1}` of each byte of `valid` [len(valid)] into `p_order`, in place."""
    grams, counts = np.unique(_keys(train, order), return_counts=True)
    histories, first = np.unique(grams >> np.uint64(8), return_index=True)
    followers = np.diff(first, append=grams.size)
    totals = np.add.reduceat(counts, first)

    keys = _keys(valid, order)
    gram = _find(grams, keys)
    history = _find(histories, keys >> np.uint64(8))
    count = np.where(gram >= 0, counts[gram], 0)
    distinct = np.where(history >= 0, followers[history], 1)
    total = np.where(history >= 0, totals[history], 0)
    tail = probability[order - 1 :]
    tail[:] = (count + distinct * tail) / (total + distinct)


def _keys(data: bytes, order: int) -> NDArray[np.uint64]:
    """Return each run of `order` bytes as one big-endian number, [len(data) - order + 1]."""
    tokens = np.frombuffer(data, np.uint8)
    size = max(0, len(data) - order + 1)
    keys = np.zeros(size, np.uint64)
    for i in range(order):
        keys <<= np.uint64(8)
        keys |= tokens[i : i + size]
    return keys


def _find(table: NDArray[np.uint64], keys: NDArray[np.uint64]) -> NDArray[np.intp]:
    """Return the index of each key in the sorted `table`, -1 where it is absent."""
    index = np.minimum(np.searchsorted(table, keys), table.size - 1)
    return np.where(table[index] == keys, index, -1)
