"""The native backends against the float64 oracle, on random connectomes."""

import numpy as np
import pytest
import reference
from connectomes import NEURON_TOKENS, random_case, retry_off_threshold
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

EXAMPLES = 60
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
SMALLEST = 1e-7  # gradients below this share of the largest one in the model are rounding, not signal


def oracle(case):
    """The oracle's answer to a case, with the dropout of the model's first training call."""
    masks = None
    if case.cfg.dropout:
        masks = reference.dropout_masks(case.cfg, case.model_seed, 0, *case.ids.shape)
    return reference.forward_backward(
        case.cfg, case.params, case.ids, case.targets, masks=masks, **case.options
    )


def draw(seed):
    def attempt(number):
        case = random_case([seed, number])
        case.model_seed = seed
        return case

    return retry_off_threshold(attempt, oracle)


def run(make_model, case, **settings):
    streams, tokens = case.ids.shape
    weights = case.options["weights"]
    model = make_model(
        case.cfg, params=case.params, state=case.options["state"], streams=streams, max_tokens=tokens,
        seed=case.model_seed, **settings,
    )
    predictions = np.full(case.ids.shape, -1, np.int32)
    result = model.backward_batch(
        case.ids, case.targets, None if weights is None else weights.astype(np.float32), case.options["resets"],
        normalize=case.options["normalize"], predictions_out=predictions, record=True,
    )
    return model, result


def worst(got, expected, floor=0.0):
    """Largest difference as a share of the largest expected value."""
    return np.abs(np.asarray(got) - expected).max() / max(np.abs(expected).max(), floor, 1e-30)


def compare(model, result, case, expected):
    assert sum(u.size for u in expected.u.values()) <= NEURON_TOKENS
    scale = abs(expected.loss) if case.options["normalize"] == "sum" else max(abs(expected.loss), 1.0)
    assert abs(result.loss - expected.loss) <= LOSS_TOLERANCE * max(scale, 1e-12)
    assert result.homeostasis == pytest.approx(expected.homeostasis, rel=1e-5, abs=1e-12)
    assert result.tokens == expected.tokens
    assert result.rates == pytest.approx(expected.rates, abs=1e-7)
    gaps = np.sort(expected.logits, axis=-1)
    clear = gaps[..., -1] - gaps[..., -2] > 1e-4  # two tokens at the same height: either may win in float32
    assert (result.predictions == expected.predictions)[clear].all()
    for region in case.cfg.regions:
        u, s = model.recorded(region.name)
        assert worst(u, expected.u[region.name], 1.0) <= 1e-4
        assert ((s > 0) == (expected.s[region.name] > 0)).all()
    floor = SMALLEST * max(np.abs(g).max() for g in expected.gradients.values())
    gradients = model.gradients()
    assert set(gradients) == set(expected.gradients)
    for key, gradient in expected.gradients.items():
        assert worst(gradients[key], gradient, floor) <= GRADIENT_TOLERANCE, key
    for key, value in model.state().items():
        assert value.size == 0 or worst(value, expected.state[key], 1.0) <= 1e-4, key


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(seed=st.integers(0, 2**32 - 1), threads=st.sampled_from([1, 2]))
def test_loss_and_every_gradient(make_model, seed, threads):
    case, expected, redraws = draw(seed)
    note(f"case {[seed, redraws]}: redrawn {redraws} times for neurons at the threshold")
    model, result = run(make_model, case, threads=threads)
    compare(model, result, case, expected)


@pytest.mark.parametrize("seed", range(6))
def test_many_streams_in_groups(make_model, seed):
    """Enough streams that threads take groups of them: the other schedule of the CPU's forward pass."""
    rng = np.random.default_rng(seed)

    def attempt(number):
        case = random_case([seed, number])
        case.model_seed = seed
        shape = (16, 2)
        case.ids = rng.integers(0, case.cfg.vocab_size, shape).astype(np.int32)
        case.targets = rng.integers(0, case.cfg.vocab_size, shape).astype(np.int32)
        case.options = {"weights": None, "resets": rng.random(shape) < 0.2, "state": None, "normalize": "sum"}
        return case

    case, expected, _ = retry_off_threshold(attempt, oracle)
    model, result = run(make_model, case, threads=2)
    compare(model, result, case, expected)


def test_homeostasis_alone(make_model):
    """Divisor 0: the loss is 0 and only the firing-rate term has a gradient."""
    case, *_ = draw(5)
    case.options["weights"] = np.zeros(case.ids.shape)
    expected = oracle(case)
    model, result = run(make_model, case)
    assert result.loss == 0.0 == expected.loss
    compare(model, result, case, expected)
