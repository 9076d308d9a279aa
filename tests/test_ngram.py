"""Witten-Bell n-grams against the definition, written with dictionaries."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neurogen_cy.data import default_corpus, split
from neurogen_cy.ngram import baselines, witten_bell


def by_definition(train: bytes, valid: bytes, order: int) -> float:
    """Return bits per byte of `valid[1:]`, straight from the recursion."""
    follows: dict[bytes, Counter[int]] = defaultdict(Counter)
    for n in range(1, order + 1):
        for i in range(len(train) - n + 1):
            follows[train[i : i + n - 1]][train[i + n - 1]] += 1

    def probability(history: bytes, byte: int) -> float:
        lower = probability(history[1:], byte) if history else 1 / 256
        counts = follows.get(history)
        if counts is None:
            return lower
        return (counts[byte] + len(counts) * lower) / (counts.total() + len(counts))

    bits = [-math.log2(probability(valid[max(0, i - order + 1) : i], valid[i])) for i in range(1, len(valid))]
    return sum(bits) / len(bits)


letters = st.text("abc", min_size=8, max_size=60).map(str.encode)


@given(letters, letters, st.integers(1, 8))
def test_matches_the_definition_on_few_letters(train: bytes, valid: bytes, order: int) -> None:
    assert witten_bell(train, valid, order) == pytest.approx(by_definition(train, valid, order), rel=1e-12)


@given(st.binary(min_size=8, max_size=80), st.binary(min_size=2, max_size=40), st.integers(1, 8))
def test_matches_the_definition_on_any_bytes(train: bytes, valid: bytes, order: int) -> None:
    assert witten_bell(train, valid, order) == pytest.approx(by_definition(train, valid, order), rel=1e-12)


def test_matches_the_definition_on_english() -> None:
    text = default_corpus()[0]
    train, valid = text[:4000], text[4000:6000]
    expected = {order: pytest.approx(by_definition(train, valid, order), rel=1e-12) for order in (1, 2, 3, 5)}
    assert baselines(train, valid, (1, 2, 3, 5)) == expected


def test_probabilities_sum_to_one() -> None:
    train, history = b"abracadabra alakazam", b"abra"
    for order in (1, 3, 5):
        # bits of "abra" + c are a sum over bytes 1..4 of it; the rest belongs to c alone
        known = 3 * witten_bell(train, history, order)
        total = sum(2 ** -(4 * witten_bell(train, history + bytes([c]), order) - known) for c in range(256))
        assert total == pytest.approx(1.0, rel=1e-9)


def test_longer_histories_help_on_the_default_corpus_within_seconds() -> None:
    start = time.perf_counter()
    bits = baselines(*split(default_corpus()[0]))
    assert time.perf_counter() - start < 10.0
    # the text differs a little between Python versions
    assert bits == {
        3: pytest.approx(2.47, abs=0.1),
        4: pytest.approx(2.02, abs=0.1),
        5: pytest.approx(1.90, abs=0.1),
    }


@pytest.mark.parametrize(
    ("train", "valid", "order", "message"),
    [
        (b"abcabc", b"abc", 0, r"expected orders in 1\.\.8, got \[0\]"),
        (b"abcabc" * 9, b"abc", 9, r"expected orders in 1\.\.8, got \[9\]"),
        (b"ab", b"abc", 3, "expected at least 3 bytes to count on, got 2"),
        (b"abcabc", b"a", 3, "expected at least 2 bytes to predict in, got 1"),
    ],
)
def test_refuses_what_it_cannot_count(train: bytes, valid: bytes, order: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        witten_bell(train, valid, order)


def test_refuses_no_orders() -> None:
    with pytest.raises(ValueError, match=r"expected orders in 1\.\.8, got \[\]"):
        baselines(b"abc", b"abc", ())
