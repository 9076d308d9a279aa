"""Long documents in pieces: the same tokens as whole ones, every byte accounted for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import tokenizer_makers as makers
from hypothesis import given, settings
from hypothesis import strategies as st

from neurogen_cy.data import default_corpus
from neurogen_cy.pieces import HeldOut, pieces, tokenised
from neurogen_cy.sources import Chunk

KINDS = [*makers.KINDS]


def chunks(documents: list[bytes], size: int = 700) -> Iterator[Chunk]:
    for number, document in enumerate(documents):
        for at in range(0, len(document), size):
            yield Chunk(document[at : at + size], at == 0, f"document {number}", at)


def made(kind: str):
    if kind.startswith("sp-"):
        pytest.importorskip("sentencepiece", reason="the extra sentencepiece is not installed")
    return makers.make(kind)


def texts() -> dict[str, bytes]:
    english = default_corpus()[0][100_000:140_000]
    return {
        "english": english,
        "unicode": (makers.MORE * 400).encode(),
        "lines": b"a line\n\n\n   indented\tmore.\n" * 800,
    }


@pytest.mark.parametrize("name", list(texts()))
@pytest.mark.parametrize("kind", KINDS)
def test_a_long_document_has_the_tokens_of_the_whole(kind: str, name: str) -> None:
    tokenizer, text = made(kind), texts()[name]
    cut = list(pieces(chunks([text]), tokenizer, limit=3000))
    assert len(cut) >= len(text) // 3000 and max(len(piece.data) for piece in cut) <= 3000
    ids = np.concatenate([ids for _, ids in tokenised(cut, tokenizer, batch=10_000)])
    np.testing.assert_array_equal(ids, tokenizer.encode(text))


@pytest.mark.parametrize("kind", KINDS)
def test_text_without_white_space_is_cut_all_the_same(kind: str) -> None:
    tokenizer = made(kind)
    text = "\u4e2d\u6587\u3002caf\u00e9".encode() * 500
    cut = list(pieces(chunks([text]), tokenizer, limit=1000))
    assert b"".join(piece.data for piece in cut) == text and max(piece.size for piece in cut) <= 1000
    for piece in cut:
        if kind != "bytes":
            piece.data.decode()  # between characters


documents = st.lists(st.text("ab \n\u00e9\u4e2d.", min_size=1, max_size=80).map(str.encode), min_size=1, max_size=8)


@settings(deadline=None)
@given(documents, st.integers(5, 40), st.integers(1, 30), st.floats(0.1, 0.9))
@pytest.mark.parametrize("kind", ["bytes", "byte-level"])
def test_every_byte_is_in_one_piece(kind: str, texts: list[bytes], limit: int, size: int, share: float) -> None:
    tokenizer = makers.make(kind)
    whole = b"\n".join(texts)
    held_out = HeldOut(len(whole), int(share * len(whole)))
    cut = list(pieces(chunks(texts, size), tokenizer, held_out, limit))
    rebuilt, starts = b"", []
    for piece in cut:
        assert piece.at == len(rebuilt) and len(piece.data) <= max(limit, 4)
        if piece.first:
            starts.append(piece.at)
            rebuilt += b"\n" if piece.at else b""
        assert whole[len(rebuilt) : len(rebuilt) + len(piece.data)] == piece.data
        rebuilt = whole[: len(rebuilt) + piece.size]
    assert rebuilt == whole and len(starts) == len(texts)
    ends = np.cumsum([len(text) + 1 for text in texts])
    assert starts == [0, *(ends[:-1] - 1)]
    if kind == "bytes" and not any(held_out.near(start) for start in starts):
        boundaries = {piece.at for piece in cut} | {start + 1 for start in starts}
        assert held_out.target in boundaries


def test_a_separator_stands_before_every_document_but_the_first() -> None:
    tokenizer = makers.make("byte-level")
    ids = [ids for _, ids in tokenised(pieces(chunks([b"one", b"two"]), tokenizer), tokenizer)]
    assert [row.tolist() for row in ids] == [
        tokenizer.encode("one").tolist(),
        [tokenizer.end, *tokenizer.encode("two")],
    ]


@pytest.mark.parametrize("kind", ["bytes", "byte-level", "word-piece"])
def test_little_of_a_text_is_in_memory_at_a_time(kind: str) -> None:
    taken, given = 0, 0

    def endless() -> Iterator[Chunk]:
        nonlocal taken
        for number in range(300):
            taken += 1000
            yield Chunk(b"some words more\n" * 62 + b"1234567\n", number % 100 == 0, "it", 0)

    for piece, _ in tokenised(pieces(endless(), makers.make(kind), limit=2000), makers.make(kind), batch=5000):
        given += len(piece.data)
        assert taken - given <= 5000 + 2000 + 1000
    assert given == taken == 300_000


def test_text_that_cannot_be_held_is_named() -> None:
    tokenizer = makers.make("word-piece")
    rows = tokenised(pieces(chunks([b"good", b"so " * 400 + b"bad \xff"]), tokenizer, limit=100), tokenizer)
    with pytest.raises(ValueError, match=r"document 1, from byte 1\d\d\d: expected UTF-8.*0xff at offset \d+"):
        list(rows)
