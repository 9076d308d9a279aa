"""Streams over documents: every token once an epoch, resets where documents begin, cursors that go on."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurogen_cy.streams import TokenStreams, held_out
from neurogen_cy.tokens import Tokens


def text(lengths: list[int], vocabulary: int = 1000, seed: int = 0) -> Tokens:
    """Documents of these lengths, as a token cache gives them."""
    ids = np.random.default_rng(seed).integers(0, vocabulary, sum(lengths), np.uint16)
    starts = np.cumsum([0, *lengths[:-1]])
    return Tokens(ids, starts, 3 * len(ids), f"{seed} {lengths}", np.stack([starts, 3 * starts], axis=1))


lengths = st.lists(st.integers(1, 12), min_size=1, max_size=10)


def read(reader: TokenStreams, calls: int) -> list[np.ndarray]:
    """Ids, targets and resets of some calls, side by side."""
    parts = [[array.copy() for array in reader.next()] for _ in range(calls)]
    return [np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True)]


@given(lengths, st.integers(1, 5), st.integers(1, 7), st.integers(1, 20))
def test_streams_follow_the_ring_and_reset_at_documents(sizes: list[int], b: int, t: int, calls: int) -> None:
    tokens = text(sizes)
    ring = len(tokens) - 1
    if len(tokens) < b * t + 1:
        with pytest.raises(ValueError, match=rf"at least streams \* tokens \+ 1 = .* tokens, got {len(tokens)}"):
            TokenStreams(tokens, b, t)
        return
    ids, targets, resets = read(TokenStreams(tokens, b, t), calls)
    position = (np.arange(b)[:, None] * ring // b + np.arange(calls * t)) % ring
    np.testing.assert_array_equal(ids, tokens.ids[position])
    np.testing.assert_array_equal(targets, tokens.ids[position + 1])
    np.testing.assert_array_equal(resets, np.isin(position, tokens.starts))


@given(lengths, st.integers(1, 5))
def test_every_token_is_read_once_an_epoch(sizes: list[int], b: int) -> None:
    tokens = text([*sizes, 5 * b])
    ring = (len(tokens) - 1) // b * b  # all streams equally long
    tokens = tokens.part(0, ring + 1, 0, 3 * (ring + 1))
    ids, _, resets = read(TokenStreams(tokens, b, 1), 2 * ring // b)
    for epoch in (slice(0, ring // b), slice(ring // b, None)):
        assert sorted(ids[:, epoch].flatten()) == sorted(tokens.ids[:-1])
        assert resets[:, epoch].sum() == np.count_nonzero(tokens.starts < ring)


@given(lengths, st.integers(1, 4), st.integers(1, 6), st.integers(0, 30))
def test_a_cursor_goes_on_with_the_very_next_token(sizes: list[int], b: int, t: int, calls: int) -> None:
    tokens = text([*sizes, b * t + 1])
    whole = TokenStreams(tokens, b, t)
    for _ in range(calls):
        whole.next()
    for _ in range(2):  # stopped twice
        part = TokenStreams(tokens, b, t)
        part.cursor = json.loads(json.dumps(whole.cursor))
        for one, two in zip(read(whole, 5), read(part, 5), strict=True):
            np.testing.assert_array_equal(one, two)
        assert whole.cursor == part.cursor and whole.epochs == part.epochs


def test_another_cursor_is_refused() -> None:
    tokens = text([40, 30])
    reader = TokenStreams(tokens, 2, 5)
    reader.next()
    for other, message in (
        (TokenStreams(tokens, 3, 5), "expected a cursor with streams 2, got 3"),
        (TokenStreams(tokens, 2, 6), "expected a cursor with tokens 5, got 6"),
        (TokenStreams(text([40, 30], seed=1), 2, 5), "expected a cursor with sha256 0 .*, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            reader.cursor = other.cursor
    assert reader.cursor["tokens_per_stream"] == 5
    reader.cursor = {key: value for key, value in reader.cursor.items() if key != "tokens"}  # an earlier version's


@given(lengths, st.integers(1, 6))
def test_every_token_held_out_is_predicted_once(sizes: list[int], streams: int) -> None:
    tokens = text(sizes)
    if len(tokens) < streams + 1:
        with pytest.raises(ValueError, match=f"expected at least .*{streams + 1} tokens.*got {len(tokens)}"):
            held_out(tokens, streams)
        return
    ids, targets, resets = held_out(tokens, streams)
    count = ids.size
    assert ids.dtype == targets.dtype == np.int32 and resets.dtype == np.bool_
    assert all(array.flags.c_contiguous and len(array) == streams for array in (ids, targets, resets))
    np.testing.assert_array_equal(ids.flatten(), tokens.ids[:count])
    np.testing.assert_array_equal(targets.flatten(), tokens.ids[1 : count + 1])
    np.testing.assert_array_equal(np.flatnonzero(resets), tokens.starts[tokens.starts < count])
    assert len(tokens) - 1 - count < streams


@given(lengths, st.data())
def test_a_part_has_its_own_documents(sizes: list[int], data: st.DataObject) -> None:
    tokens = text([*sizes, 2])
    begin = data.draw(st.integers(0, len(tokens) - 1))
    end = data.draw(st.integers(begin + 1, len(tokens)))
    part = tokens.part(begin, end, 3 * begin, 3 * (end - begin))
    np.testing.assert_array_equal(part.ids, tokens.ids[begin:end])
    inside = tokens.starts[(tokens.starts > begin) & (tokens.starts < end)] - begin
    np.testing.assert_array_equal(part.starts, [0, *inside])
    np.testing.assert_array_equal(part.pieces[1:], np.stack([inside, 3 * inside], axis=1))
    assert part.pieces[0].tolist() == [0, 0]
