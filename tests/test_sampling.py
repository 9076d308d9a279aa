"""Draws: each the inverse of the oracle's cumulative distribution at its own Philox number, ties and edges too."""

import itertools

import numpy as np
import pytest
import reference
from scipy import stats

import neurogen_cy as ng

D, M = 32, 300
NEAR = 1e-6  # a number this close to a boundary may fall on either side of it in float32
TAG = int.from_bytes(b"samp", "big")


@pytest.fixture
def make(backend):
    def make(vocab, **settings):
        cfg = ng.Config(
            vocab, D, (ng.Region("low", 32, 0),), (ng.Projection("embedding", "low"), ng.Projection("low", "broca_out"))
        )
        settings = {"max_tokens": 512, "seed": 8, "threads": 1, "precision": "fp32", **settings}
        return ng.NeuroGen(cfg, backend=backend, **settings)

    return make


def outputs(rows, seed=0):
    """Broca outputs, whose mean square is 1."""
    return np.random.default_rng(seed).standard_normal((rows, D)).astype(np.float32)


def draw(m, broca, **options):
    ids = np.full(len(broca), -1, np.int32)
    m.decoder.sample_into(broca, ids, **options)
    return ids


def logits_of(m, broca):
    out = np.empty((len(broca), m.config.vocab_size), np.float32)
    m.decoder.logits_into(broca, out)
    return out.astype(np.float64)


def uniforms(rows, seed, position):
    """The 53-bit number of every row: counter (row, position low, position high, tag), key (seed low, seed high)."""
    low = 0xFFFFFFFF
    counter = np.stack([np.arange(rows)] + [np.full(rows, x) for x in (position & low, position >> 32, TAG)], axis=-1)
    words = reference.philox4x32(counter, np.array([seed & low, seed >> 32])).astype(np.uint64)
    return ((words[:, 0] >> np.uint64(5)) * 2.0**26 + (words[:, 1] >> np.uint64(6))) * 2.0**-53


def check(m, broca, seed, position, temperature, top_k, top_p):
    """Number of draws that another rounding could have decided otherwise; every other one must be exact."""
    got = draw(m, broca, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed, position=position)
    logits = logits_of(m, broca)
    cumulative = np.cumsum(reference.sampling_probabilities(logits, temperature, top_k, top_p), axis=-1)
    u = uniforms(len(broca), seed, position)[:, None]
    near = (np.abs(cumulative - u) < NEAR).any(axis=-1)
    if top_p < 1:  # the prefix itself may be one token longer
        kept = np.sort(reference.sampling_probabilities(logits, temperature, top_k), axis=-1)[:, ::-1]
        near |= (np.abs(np.cumsum(kept, axis=-1) - top_p) < NEAR).any(axis=-1)
    wrong = got != (cumulative > u).argmax(axis=-1)
    assert not (wrong & ~near).any(), (temperature, top_k, top_p, np.flatnonzero(wrong & ~near))
    return int(near.sum())


def test_every_draw_inverts_the_oracles_distribution(make):
    m, broca = make(67), outputs(M)
    combinations = list(itertools.product((0.25, 0.7, 1.0, 3.0), (0, 1, 5, 40, 500), (1.0, 0.9, 0.5, 0.01)))
    near = 0
    for number, (temperature, top_k, top_p) in enumerate(combinations):
        near += check(m, broca, 2**40 * number + 11, 2**33 + number, temperature, top_k, top_p)
    assert near <= 0.002 * M * len(combinations)  # 24,000 draws, a few of them near a boundary


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.8, 50, 0.95), (1.5, 2000, 0.7)])
def test_large_vocabulary(make, temperature, top_k, top_p):
    m, broca = make(3001), outputs(100)
    assert check(m, broca, 2**64 - 1, 2**64 - 1, temperature, top_k, top_p) <= 5


def test_a_top_p_that_keeps_every_token_changes_no_draw(make):
    """The kept tokens are walked by id even where finding them put them in order of probability."""
    m, broca = make(9), outputs(M)
    almost = np.nextafter(np.float32(1), np.float32(0)).item()  # of which nine such tokens leave nothing out
    options = {"temperature": 3.0, "seed": 4, "position": 2}
    assert np.array_equal(draw(m, broca, top_p=almost, **options), draw(m, broca, **options))


def test_draws_do_not_depend_on_threads_and_grouping(make):
    broca = outputs(700)
    expected = draw(make(67), broca, seed=3)
    assert np.array_equal(draw(make(67, threads=2), broca, seed=3), expected)
    narrow = make(67, max_tokens=9)  # a workspace of 9 rows: 78 groups
    assert np.mean(draw(narrow, broca, seed=3) == expected) > 0.99
    assert np.array_equal(draw(make(67), broca[:10], seed=3), expected[:10])
    assert np.mean(draw(make(67), broca, seed=4) == expected) < 0.5
    assert np.mean(draw(make(67), broca, seed=3, position=1) == expected) < 0.5


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 9, "top_p": 0.6}]
)
def test_frequencies(make, options):
    m, row = make(16), outputs(1)
    ids = draw(m, np.repeat(row, 20_000, axis=0), seed=1, **options)
    p = reference.sampling_probabilities(logits_of(m, row)[0], **options)
    counts = np.bincount(ids, minlength=16)
    assert not counts[p == 0].any()
    assert stats.chisquare(counts[p > 0], 20_000 * p[p > 0]).pvalue > 1e-3


@pytest.mark.parametrize("change", [{"position": 1}, {"seed": 2}, {"seed": 1 + 2**32}, {"position": 2**32}])
def test_draws_of_other_keys_are_independent(make, change):
    m, broca = make(6), np.repeat(outputs(1), 20_000, axis=0)
    one, other = (draw(m, broca, **{"seed": 1, "position": 0, **keys}) for keys in ({}, change))
    table = np.zeros((6, 6))
    np.add.at(table, (one, other), 1)
    assert (table > 0).all() and stats.chi2_contingency(table).pvalue > 1e-3


def test_greedy_takes_the_largest_and_of_equals_the_lowest(make):
    m, broca = make(67), outputs(M)
    logits = logits_of(m, broca)
    assert np.array_equal(draw(m, broca, greedy=True), logits.argmax(axis=-1))
    assert len(set(logits.argmax(axis=-1))) > 20
    for seed in range(3):
        assert np.array_equal(draw(m, broca, top_k=1, seed=seed), logits.argmax(axis=-1))
        assert np.array_equal(draw(m, broca, top_p=1e-9, seed=seed), logits.argmax(axis=-1))
        assert np.array_equal(draw(m, broca, temperature=1e-30, seed=seed), logits.argmax(axis=-1))
    bias = np.tile(np.array([0, 2, 5, 1, 5], np.float32), 14)[:67]
    m.load_parameters({"decoder.weight": np.zeros((67, D), np.float32), "decoder.bias": bias})
    assert (draw(m, broca, greedy=True) == 2).all() and (draw(m, broca, top_k=1, seed=5) == 2).all()
    assert set(draw(m, broca, top_k=3, seed=5).tolist()) == {2, 4, 7}
    assert set(draw(m, broca, top_p=0.11, seed=5).tolist()) == {2, 4, 7}  # 26 equals hold 0.96, 3 of them 0.1110
