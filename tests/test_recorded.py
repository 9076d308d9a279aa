"""`recorded.replay` against the oracle it abridges, token by token, on random connectomes."""

import numpy as np
import pytest
import reference
from connectomes import random_case
from recorded import first_flips, replay, to_bf16, to_e4m3, to_eight

import neurogen_cy as ng

CASES = 40


@pytest.mark.parametrize("seed", range(CASES))
def test_from_the_oracles_own_spikes_everything_agrees(seed):
    case = random_case(seed)
    weights = case.options["weights"]
    options = {**case.options, "weights": None if weights is None else np.abs(weights), "normalize": "sum"}
    options["masks"] = reference.dropout_masks(case.cfg, 1, 0, *case.ids.shape) if case.cfg.dropout else None
    expected = reference.forward_backward(case.cfg, case.params, case.ids, case.targets, **options)
    del options["normalize"]
    recorded = {name: (u, expected.s[name]) for name, u in expected.u.items()}
    got = replay(case.cfg, case.params, case.ids, case.targets, recorded, **options)
    assert got.loss == pytest.approx(expected.loss, rel=1e-12)
    for name, u in expected.u.items():
        np.testing.assert_allclose(got.u[name], u, rtol=1e-10, atol=1e-12)
    largest = max(np.abs(g).max() for g in expected.gradients.values())
    assert got.gradients.keys() == expected.gradients.keys()
    for key, gradient in expected.gradients.items():
        np.testing.assert_allclose(got.gradients[key], gradient, rtol=1e-9, atol=1e-12 * largest, err_msg=key)


def test_rounding_to_bf16():
    """Eight significant bits, ties to even, any sign and size; and rounded gradients are off by about that much."""
    x = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8 - 2**-20, 3e38, 1e-30, 0.0])
    expected = np.array([1.0, 1.0, 1 + 2**-6, -1 - 2**-7])
    np.testing.assert_array_equal(to_bf16(x)[:4], expected)
    assert (np.abs(to_bf16(x) - x) <= 2**-8 * np.abs(x)).all()
    case = random_case(3, rate_weight=0.5)
    expected = reference.forward_backward(case.cfg, case.params, case.ids, case.targets)
    recorded = {name: (u, expected.s[name]) for name, u in expected.u.items()}
    got = replay(case.cfg, case.params, case.ids, case.targets, recorded, rounded=to_bf16)
    for key, gradient in expected.gradients.items():
        if gradient.any():
            error = np.linalg.norm(got.gradients[key] - gradient) / np.linalg.norm(gradient)
            assert 2**-12 < error < 2**-4, key


@pytest.mark.parametrize(("name", "fraction", "lowest"), [("float8_e4m3fn", 3, -6), ("float8_e5m2", 2, -14)])
def test_rounding_to_eight_bits_is_pytorchs(name, fraction, lowest):
    torch = pytest.importorskip("torch")
    x = np.concatenate([2.0**power * np.linspace(1, 2, 97) for power in range(-20, 8)] + [np.zeros(1)])
    x = np.concatenate([x, -x]).astype(np.float32)
    expected = torch.from_numpy(x).to(getattr(torch, name)).double().numpy()
    np.testing.assert_array_equal(to_eight(x.astype(np.float64), fraction=fraction, lowest=lowest), expected)


def test_one_scale_of_all():
    """A power of two, which changes nothing but where small numbers end: 2^-9 / 128 of the largest."""
    x = np.array([1.5, 1.5625, -1.0, 3 * 2**-17, 2**-18])
    np.testing.assert_array_equal(to_e4m3(x), [1.5, 1.5, -1.0, 2**-15, 0.0])
    np.testing.assert_array_equal(to_e4m3(x * 2**-30), to_e4m3(x) * 2**-30)


def test_a_decoder_in_eight_bits_moves_what_it_should():
    """Gradients by the e5m2 errors' RMS of 2^-4, that of the bias not at all but through the logits."""
    case = random_case(3, rate_weight=0.5)
    expected = reference.forward_backward(case.cfg, case.params, case.ids, case.targets)
    recorded = {name: (u, expected.s[name]) for name, u in expected.u.items()}
    got = replay(case.cfg, case.params, case.ids, case.targets, recorded, rounded=to_bf16, eight=True)
    for key, gradient in expected.gradients.items():
        if gradient.any():
            error = np.linalg.norm(got.gradients[key] - gradient) / np.linalg.norm(gradient)
            assert 2**-12 < error < 2**-2, key


def test_first_flips_are_counted_until_a_stream_parts():
    """Three levels out of order, 3 streams x 4 tokens: one stream never parts, one at once, one in the middle."""
    sizes = {"top": (32, 5), "low": (64, 0), "middle": (96, 2)}
    regions = tuple(ng.Region(name, n, level) for name, (n, level) in sizes.items())
    chain = [("embedding", "low"), ("low", "middle"), ("middle", "top"), ("top", "broca_out")]
    cfg = ng.Config(7, 32, regions, tuple(ng.Projection(*pair) for pair in chain))
    rng = np.random.default_rng(0)
    one = {name: (rng.normal(size=(3, 4, n)), None) for name, (n, _) in sizes.items()}
    other = {name: (u.copy(), None) for name, (u, _) in one.items()}
    other["low"][0][1, 0, [3, 9]] *= -1  # two at once
    other["top"][0][1] *= -1  # what follows in that stream does not count
    other["middle"][0][2, 2, 50] *= -1
    other["top"][0][2, 2] *= -1
    neurons = 32 + 64 + 96
    assert first_flips(cfg, one, other) == (2 + 1, 4 * neurons + 64 + 2 * neurons + 64 + 96)
    assert first_flips(cfg, one, one) == (0, 3 * 4 * neurons)
