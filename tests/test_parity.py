"""The native backends against the float64 oracle, on random connectomes."""

import numpy as np
import pytest
import reference
from connectomes import NEURON_TOKENS, random_case, retry_off_threshold
from hypothesis import HealthCheck, event, given, note, settings
from hypothesis import strategies as st

import neurogen_cy as ng

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
    return np.abs(got - expected).max() / max(np.abs(expected).max(), floor, 1e-30)


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
        assert worst(gradients[key].numpy(), gradient, floor) <= GRADIENT_TOLERANCE, key
    for key, value in model.state().items():
        assert value.size == 0 or worst(value, expected.state[key], 1.0) <= 1e-4, key


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_loss_and_every_gradient(make_model, seed):
    case, expected, redraws = draw(seed)
    note(f"case {[seed, redraws]}")
    event(f"drawn again {redraws} times for neurons at the threshold")
    model, result = run(make_model, case)
    compare(model, result, case, expected)


def large_brain():
    """Enough neurons that the threads of the CPU share one stream's tokens: its wavefront schedule."""
    sizes = {"low": (4096, 0), "high": (2048, 3), "top": (2048, 4)}
    regions = tuple(ng.Region(name, n, level) for name, (n, level) in sizes.items())
    sparse = 32 / 2048
    projections = (
        ng.Projection("embedding", "low"),
        ng.Projection("embedding", "high"),
        ng.Projection("low", "high", density=sparse),
        ng.Projection("high", "top", density=sparse),
        ng.Projection("low", "top", kind="gate", density=sparse),
        ng.Projection("low", "low", 1, density=sparse),
        ng.Projection("high", "high", 2, density=sparse),
        ng.Projection("top", "low", 5, density=sparse),
        ng.Projection("top", "broca_out", density=0.1),
        ng.Projection("high", "broca_out", density=0.1),
    )
    return ng.Config(40, 64, regions, projections, dropout=0.1)


@pytest.mark.parametrize(
    ("cfg", "streams"), [(large_brain(), 1), (ng.Config.preset("tiny", dropout=0.1), 5)], ids=["wavefront", "groups"]
)
def test_threads_do_not_change_a_bit(cfg, streams):
    """One thread runs a schedule of its own, which the oracle checks above; two and three give the same bits."""
    rng = np.random.default_rng(0)
    ids, targets = rng.integers(0, 40, (2, streams, 12)).astype(np.int32)
    resets = rng.random(ids.shape) < 0.1
    last = cfg.regions[-1].name
    answers = []
    for threads in (1, 2, 3):
        model = ng.NeuroGen(cfg, backend="cpu", streams=streams, max_tokens=12, threads=threads)
        losses = [model.train_step_batch(ids, targets, resets=resets, record=True).loss for _ in range(3)]
        arrays = [*model.recorded(last), *(view.numpy() for view in model.parameters().values())]
        answers.append((losses, arrays))
    assert answers[0][1][1].any(), "the last region must speak for this to say something"
    for losses, arrays in answers[1:]:
        assert losses == answers[0][0]
        assert all((x == y).all() for x, y in zip(arrays, answers[0][1]))


def test_homeostasis_alone(make_model):
    """Divisor 0: the loss is 0 and only the firing-rate term has a gradient."""
    case, *_ = draw(5)
    case.options["weights"] = np.zeros(case.ids.shape)
    expected = oracle(case)
    model, result = run(make_model, case)
    assert result.loss == 0.0 == expected.loss
    compare(model, result, case, expected)
