"""Continuing prompts: prefill of unequal lengths, then one token at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from neurogen_cy.model import NeuroGen

FINISHED = -1
"""What a stream yields after one of its stop ids."""


def as_prompts(prompts: Any, vocab: int) -> list[NDArray[np.int32]]:
    """One array of ids per stream, checked. A single 1-D array is one prompt."""
    if isinstance(prompts, np.ndarray) and prompts.ndim == 1:
        prompts = [prompts]
    out = []
    for number, prompt in enumerate(prompts):
        ids = np.asarray(prompt)
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
        kept = state.arrays() if over.any() else None
        while begin < end:
            stop = min(begin + window, int(end))
            ids = np.zeros((len(prompts), stop - begin), np.int32)
            for stream, prompt in enumerate(prompts):
                if not over[stream]:
                    ids[stream] = prompt[begin:stop]
            engine.advance(state, ids, last)
            begin = stop
        if kept is not None:
            now = state.arrays()
            for key, values in now.items():
                values[over] = kept[key][over]
            state.load(now)
        broca[lengths == end] = last[lengths == end]
    return broca


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
    rows = as_prompts(prompts, vocab)
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, (int, np.integer)) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens: expected an integer >= 1, got {max_new_tokens!r}")
    seed = model.seed if seed is None else seed
    model._module.check_sampling(temperature, top_k, top_p, seed)
    stops = np.asarray(list(stop_ids), np.int64)
    if stops.size and (stops.min() < 0 or stops.max() >= vocab):
        raise IndexError(f"stop_ids: expected token ids in 0..{vocab - 1}, got {stops.tolist()}")
    if carry and len(rows) != model.streams:
        raise ValueError(f"prompts: expected {model.streams}, one per stream of the model (carry=True), got {len(rows)}")
    capacity = model.streams * model.max_tokens
    if len(rows) > capacity:
        raise ValueError(f"prompts: expected at most streams * max_tokens = {capacity}, got {len(rows)}")
    state = engine.own_state() if carry else engine.new_state(len(rows))

    def tokens() -> Iterator[NDArray[np.int32]]:
        broca = prefill(engine, state, rows, max(1, capacity // len(rows)))
        ids = np.empty(len(rows), np.int32)
        finished = np.zeros(len(rows), np.bool_)
        for position in range(max_new_tokens):
            model.decoder.sample_into(
                broca, ids, temperature=temperature, top_k=top_k, top_p=top_p, greedy=greedy, seed=seed,
                position=position,
            )
            yield np.where(finished, FINISHED, ids).astype(np.int32)
            finished |= np.isin(ids, stops)
            if finished.all():
                return
            if position + 1 < max_new_tokens or carry:
                engine.advance(state, ids[:, None], broca)

    return tokens()
