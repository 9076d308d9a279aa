"""Corpora, the split, and the streams that read them."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurogen_cy.data import ByteStreams, default_corpus, evaluation_streams, read_corpus, split


def test_default_corpus_is_english_with_its_hash() -> None:
    data, facts = default_corpus()
    assert data == default_corpus()[0]
    assert 300_000 < len(data) == facts["bytes"]
    assert facts["sha256"] == hashlib.sha256(data).hexdigest()
    assert b"statement" in data and b"\0" not in data
    assert json.loads(json.dumps(facts)) == facts


def test_default_corpus_without_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(
        FileNotFoundError, match=r"expected the module pydoc_data\.topics.*got a Python without"
    ):
        default_corpus()


def test_read_corpus_takes_a_file_as_it_is(tmp_path: Path) -> None:
    text = "na\u00efve\r\n".encode("latin-1")
    (tmp_path / "a.txt").write_bytes(text)
    data, facts = read_corpus(tmp_path / "a.txt")
    assert data == text
    assert facts["name"] == "a.txt" and facts["source"] == str(tmp_path / "a.txt")


def test_read_corpus_joins_a_directory_in_order(tmp_path: Path) -> None:
    for name, text in {
        "b.txt": "two",
        "a/z.md": "one",
        "c": "three",
        ".hidden": "no",
        "empty.txt": "",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("no")
    assert read_corpus(tmp_path)[0] == b"one\ntwo\nthree"


def test_read_corpus_refuses_what_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a text file or a directory.*got .*absent"):
        read_corpus(tmp_path / "absent")
    with pytest.raises(ValueError, match="expected text files below .*, got none"):
        read_corpus(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="expected text in .*, got an empty file"):
        read_corpus(tmp_path / "empty")
    (tmp_path / "image").write_bytes(b"ab\0c")
    for path in (tmp_path, tmp_path / "image"):
        with pytest.raises(ValueError, match="expected text in .*image, got a NUL byte at offset 2"):
            read_corpus(path)


def test_split_keeps_every_byte() -> None:
    assert split(b"0123456789") == (b"012345678", b"9")
    assert split(b"0123", 0.5) == (b"01", b"23")
    for fraction in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="expected 0 < fraction < 1, got"):
            split(b"0123", fraction)
    with pytest.raises(ValueError, match="expected a text long enough.*got 1 bytes"):
        split(b"0")


@given(st.integers(2, 300), st.integers(1, 20))
def test_evaluation_counts_every_predicted_byte_once(size: int, streams: int) -> None:
    data = bytes(np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8))
    if size < streams + 1:
        with pytest.raises(ValueError, match=f"expected at least .*{streams + 1} bytes.*got {size}"):
            evaluation_streams(data, streams)
        return
    ids, targets = evaluation_streams(data, streams)
    count = streams * ((size - 1) // streams)
    assert ids.shape == targets.shape == (streams, count // streams)
    assert ids.dtype == targets.dtype == np.int32
    assert ids.flags.c_contiguous and targets.flags.c_contiguous
    assert targets.tobytes() == np.frombuffer(data[1 : count + 1], np.uint8).astype(np.int32).tobytes()
    np.testing.assert_array_equal(ids[:, 1:], targets[:, :-1])
    assert size - 1 - count < streams


def test_evaluation_refuses_no_streams() -> None:
    with pytest.raises(ValueError, match="expected streams >= 1, got 0"):
        evaluation_streams(b"abc", 0)


@given(st.integers(2, 80), st.integers(1, 5), st.integers(1, 7), st.integers(1, 30))
def test_streams_follow_the_ring(size: int, streams: int, tokens: int, calls: int) -> None:
    data = bytes(range(100, 100 + size))
    if size < streams * tokens + 1:
        with pytest.raises(ValueError, match=rf"at least streams \* tokens \+ 1 = .* bytes, got {size}"):
            ByteStreams(data, streams, tokens)
        return
    reader = ByteStreams(data, streams, tokens)
    seen = [[array.copy() for array in reader.next()] for _ in range(calls)]
    ids, targets, resets = (np.concatenate(parts, axis=1) for parts in zip(*seen, strict=True))
    starts = np.arange(streams)[:, None] * (size - 1) // streams
    position = (starts + np.arange(calls * tokens)) % (size - 1)
    np.testing.assert_array_equal(ids, 100 + position)
    np.testing.assert_array_equal(targets, 101 + position)
    np.testing.assert_array_equal(resets, position == 0)


def test_streams_cover_the_text_once_before_any_repeat() -> None:
    reader = ByteStreams(bytes(range(121)), 4, 10)
    seen = np.concatenate([reader.next()[0].flatten() for _ in range(3)])
    np.testing.assert_array_equal(np.sort(seen), np.arange(120))


def test_streams_fill_the_same_buffers() -> None:
    reader = ByteStreams(bytes(range(50)), 3, 4)
    first, second = reader.next(), reader.next()
    assert all(a is b for a, b in zip(first, second, strict=True))
    assert [array.dtype for array in first] == [np.int32, np.int32, np.bool_]


def test_cursor_continues_with_the_very_next_token() -> None:
    data = bytes(range(97))
    whole, part = ByteStreams(data, 3, 5), ByteStreams(data, 3, 5)
    for _ in range(17):
        whole.next()
    part.cursor = json.loads(json.dumps(whole.cursor))
    for _ in range(30):
        for a, b in zip(whole.next(), part.next(), strict=True):
            np.testing.assert_array_equal(a, b)
    assert whole.cursor == part.cursor


def test_cursor_of_other_streams_is_refused() -> None:
    reader = ByteStreams(bytes(range(97)), 3, 5)
    reader.next()
    before = reader.cursor
    for cursor in (None, {}, {**before, "tokens_per_stream": -1}, {**before, "tokens_per_stream": True}):
        with pytest.raises(TypeError, match="expected a cursor with a whole number.*got"):
            reader.cursor = cursor  # type: ignore[assignment]
    with pytest.raises(ValueError, match="expected a cursor with streams 3, got 4"):
        reader.cursor = {**before, "streams": 4}
    with pytest.raises(ValueError, match="expected a cursor with sha256 .*, got 00"):
        reader.cursor = {**before, "sha256": "00"}
    assert reader.cursor == before


@pytest.mark.parametrize(
    ("streams", "tokens", "message"), [(0, 4, "streams >= 1, got 0"), (2, -1, "tokens >= 1, got -1")]
)
def test_streams_refuse_no_streams_or_tokens(streams: int, tokens: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ByteStreams(bytes(50), streams, tokens)
