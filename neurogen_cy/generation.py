"""Continuing prompts: prefill of unequal lengths, then some tokens at a time, which stay on the device meanwhile."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from neurogen_cy.sizes import integer

if TYPE_CHECKING:
    from neurogen_cy.model import NeuroGen

FINISHED = -1
"""What a stream yields after one of its stop ids."""

INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))


def as_prompts(prompts: Any, vocab: int, host_array: Callable[..., NDArray[Any]]) -> list[NDArray[np.int32]]:
    """One array of ids per stream, checked. A 1-D array is one prompt, a 2-D array one a row."""
    if not isinstance(prompts, (list, tuple)):
        array = host_array(prompts, "prompts", INTEGERS)
        prompts = [array] if array.ndim == 1 else list(np.atleast_1d(array))
    out = []
    for number, prompt in enumerate(prompts):
        listed = isinstance(prompt, (list, tuple))
        ids = np.asarray(prompt) if listed else host_array(prompt, f"prompts[{number}]", INTEGERS)
        if ids.ndim != 1 or ids.size == 0:
            raise ValueError(f"prompts[{number}]: expected a 1-D array of at least one id, got shape {ids.shape}")
        if ids.dtype.kind not in "iu":
            raise TypeError(f"prompts[{number}]: expected integer ids, got dtype {ids.dtype}")
        if ids.min() < 0 or ids.max() >= vocab:
            bad = ids[(ids < 0) | (ids >= vocab)][0]
            raise IndexError(f"prompts[{number}]: expected token ids in 0..{vocab - 1}, got {bad}")
        out.append(np.ascontiguousarray(ids, np.int32))
    if not out:
        raise ValueError("prompts: expected at least one prompt, got none")
    return out


def as_stop_ids(stop_ids: Any, vocab: int) -> NDArray[np.int64]:
    """Checked stop ids."""
    try:
        stops = [operator.index(stop) for stop in stop_ids]
    except TypeError:
        raise TypeError(f"stop_ids: expected a sequence of integers, got {stop_ids!r}") from None
    for stop in stops:
        if not 0 <= stop < vocab:
            raise IndexError(f"stop_ids: expected token ids in 0..{vocab - 1}, got {stop}")
    return np.array(stops, np.int64)


def prefill(engine: Any, state: Any, prompts: Sequence[NDArray[np.int32]], window: int) -> NDArray[np.float32]:
    """Runs every prompt through its stream of `state`; Broca outputs after each prompt's last token, [S, D].

    Streams run side by side. Where prompts end at different tokens, the state of a finished stream is put back
    after each stretch that only the longer prompts needed.
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    broca = np.empty((len(prompts), engine.config.dim), np.float32)
    last = np.empty_like(broca)
    begin = 0
    for end in np.unique(lengths):
        over = lengths <= begin
        with unchanged(state, over):
            while begin < end:
                stop = min(begin + window, int(end))
                ids = np.zeros((len(prompts), stop - begin), np.int32)
                for stream, prompt in enumerate(prompts):
                    if not over[stream]:
                        ids[stream] = prompt[begin:stop]
                engine.advance(state, ids, last)
                begin = stop
        broca[lengths == end] = last[lengths == end]
    return broca


@contextmanager
def unchanged(state: Any, streams: NDArray[np.bool_]) -> Iterator[None]:
    """Puts these streams of `state` back as they were."""
    kept = state.arrays() if streams.any() else None
    yield
    if kept is not None:
        now = state.arrays()
        for key, values in now.items():
            values[streams] = kept[key][streams]
        state.load(now)


def until_stops(
    drawn: NDArray[np.int32], finished: NDArray[np.bool_], stops: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """What streams say of what was drawn, [count, S], and which are finished before each token and at the end.

    Of all tokens at once, for the device waits meanwhile.
    """
    over = np.logical_or.accumulate(np.vstack((finished[None], np.isin(drawn, stops))), axis=0)
    return np.where(over[:-1], np.int32(FINISHED), drawn), over


def generate(
    model: NeuroGen,
    prompts: Any,
    max_new_tokens: int,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    greedy: bool,
    seed: int | None,
    stop_ids: Sequence[int],
    carry: bool,
) -> Iterator[NDArray[np.int32]]:
    """See `NeuroGen.generate`. Arguments are checked here, before the first token is asked for."""
    engine, vocab = model._engine, model.config.vocab_size
    rows = as_prompts(prompts, vocab, model._module.host_array)
    max_new_tokens = integer("max_new_tokens", max_new_tokens)
    seed = model.seed if seed is None else seed
    model._module.check_sampling(temperature, top_k, top_p, seed)
    stops = as_stop_ids(stop_ids, vocab)
    count, capacity = len(rows), model.streams * model.max_tokens
    if carry and count != model.streams:
        raise ValueError(f"prompts: expected {model.streams}, one per stream of the model (carry=True), got {count}")
    if count > capacity:
        raise ValueError(f"prompts: expected at most streams * max_tokens = {capacity}, got {count}")
    state = engine.own_state() if carry else engine.new_state(count)

    def tokens(ahead: int) -> Iterator[NDArray[np.int32]]:
        broca = prefill(engine, state, rows, capacity // count)
        finished = np.zeros(count, np.bool_)
        position = 0
        while position < max_new_tokens:
            # Before the yield: whoever holds a token also has a state that has heard it.
            count_now = min(ahead, max_new_tokens - position)
            with unchanged(state, finished & carry):
                drawn = engine.generate(
                    state, broca, count_now, temperature=temperature, top_k=top_k, top_p=top_p, greedy=greedy,
                    seed=seed, position=position,
                )
            said, over = until_stops(drawn, finished, stops)
            for ids, done in zip(said, over[1:], strict=True):
                yield ids
                if done.all():
                    return
            if len(drawn) < count_now:
                raise OverflowError("neuron state: expected finite values, got NaN or infinity")
            finished = over[-1]
            position += len(drawn)

    return tokens(1 if carry else model._module.TOKENS_AHEAD)  # a conversation hears no more than was said
