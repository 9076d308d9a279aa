"""AdamW as the model applies it, against the float64 oracle fed with the model's own gradients."""

import dataclasses

import numpy as np
import pytest
import reference

import neurogen_cy as ng

V, D, B, T = 31, 32, 2, 5
CONFIG = ng.Config(
    vocab_size=V,
    dim=D,
    regions=(ng.Region("low", 32, 0), ng.Region("high", 64, 1)),
    projections=(
        ng.Projection("embedding", "low"),
        ng.Projection("embedding", "high", kind="gate"),
        ng.Projection("low", "high"),
        ng.Projection("high", "low", delay=2),
        ng.Projection("high", "broca_out"),
        ng.Projection("embedding", "broca_out"),
    ),
)
STEPS = 6
UNIT = 2.0**-24  # relative error of one float32 rounding


def build(backend, cfg=CONFIG, **settings):
    fixed = {"streams": B, "max_tokens": T, "seed": 2, "threads": 1, "precision": "fp32"}
    return ng.NeuroGen(cfg, backend=backend, **fixed, **settings)


def batch(number):
    """Ids of a few rows only: some never heard, some heard once and then left alone."""
    rng = np.random.default_rng(number)
    heard = [[1, 2, 3], [3, 4, 5], [1, 9], [7], [2, 4], [3, 11]][number % 6]
    return rng.choice(heard, (B, T)).astype(np.int32), rng.integers(0, V, (B, T), np.int32)


def tolerances(optimizer, lr, step, parameter, gradient, old_m, moments):
    """What float32 may cost one step, to first order: of the parameter and of both moments.

    beta is rounded, which costs 1 - beta a relative UNIT / (1 - beta); every product, sum, root and quotient costs
    a UNIT of its result. Sums may cancel, so their errors count against their terms. The parameter is rounded three
    times: in the factor of its decay, in the product with it and in the difference.
    """
    m, v = moments
    beta1, beta2 = optimizer.betas
    of_m = UNIT * (4 * beta1 * np.abs(old_m) + (4 + 1 / (1 - beta1)) * (1 - beta1) * np.abs(gradient))
    share_of_v = UNIT * (6 + 1 / (1 - beta2))
    slope = lr / (1 - beta1**step) / (np.sqrt(v / (1 - beta2**step)) + optimizer.eps)  # of the step by m
    of_step = slope * (of_m + np.abs(m) * (share_of_v / 2 + 6 * UNIT))
    return 3 * UNIT * np.abs(parameter) + of_step, of_m, share_of_v * v


def arrays(views):
    return {key: view.numpy() for key, view in views.items()}


def moments_of(m):
    return {key: tuple(view.numpy().astype(np.float64) for view in pair) for key, pair in m._engine.moments().items()}


def check_step(m, optimizer, step, heard, update, lr=None):
    """One update of the model beside the oracle's from the same float32 numbers."""
    lr = optimizer.lr if lr is None else lr
    gradients, before = arrays(m.gradients()), arrays(m.parameters())
    moments = moments_of(m)
    expected, expected_moments, norm = reference.adamw(
        before, gradients, moments, step, lr=lr, betas=optimizer.betas, eps=optimizer.eps,
        weight_decay=optimizer.weight_decay, clip=optimizer.clip or None, touched=np.unique(heard),
    )  # fmt: skip
    assert update() == pytest.approx(norm, rel=1e-6)
    after, after_moments = arrays(m.parameters()), moments_of(m)
    for key in before:
        if key not in gradients:
            assert np.array_equal(after[key], before[key]), key
            continue
        pairs = [(after[key], expected[key]), *zip(after_moments[key], expected_moments[key])]
        clipped = gradients[key] * min(1, (optimizer.clip or np.inf) / norm)
        allowed = tolerances(
            optimizer, lr, step + 1, before[key], clipped, moments[key][0], expected_moments[key]
        )  # fmt: skip
        for name, (got, wanted), most in zip(("parameter", "m", "v"), pairs, allowed):
            assert (np.abs(got - wanted) <= most + 1e-44).all(), (key, name, step)  # 1e-44: below float32's range
    return norm


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "optimizer",
    [
        ng.AdamW(clip=0),
        ng.AdamW(lr=1e-2, betas=(0.8, 0.999), weight_decay=0.1, clip=0.5),
        ng.AdamW(betas=(0.0, 0.5), eps=1e-3, weight_decay=0.01, clip=1e6),
    ],
    ids=["no clip", "clip and decay", "clip inactive, large eps"],
)
def test_updates_follow_the_oracle(backend, optimizer, tied):
    cfg = dataclasses.replace(CONFIG, tie_decoder=tied)
    m = build(backend, cfg, optimizer=optimizer)
    start, norms = arrays(m.parameters()), []
    for step in range(STEPS):
        ids, targets = batch(step)
        m.backward_batch(ids, targets)
        norms.append(check_step(m, optimizer, step, ids, m.optimizer_step))
    assert m.step == STEPS
    clipped = [norm > optimizer.clip > 0 for norm in norms]
    assert all(clipped) if optimizer.clip == 0.5 else not any(clipped)
    changed = (m.parameters()["embedding.weight"].numpy() != start["embedding.weight"]).any(axis=1)
    heard = np.unique(np.concatenate([batch(step)[0].ravel() for step in range(STEPS)]))
    assert np.array_equal(np.flatnonzero(changed), np.arange(V) if tied else heard)


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_clipping_begins_at_the_norm(backend, factor):
    m = build(backend)
    for step in range(2):  # Adam's first step hides a scale
        ids, targets = batch(step)
        m.backward_batch(ids, targets)
        norm = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in arrays(m.gradients()).values()))
        m.optimizer = ng.AdamW(clip=factor * norm)
        check_step(m, m.optimizer, step, ids, m.optimizer_step)


def test_train_step_batch_is_backward_and_update(backend):
    whole, parts = (build(backend) for _ in range(2))
    for step in range(STEPS):
        result = whole.train_step_batch(*batch(step), lr=1e-3 * step)
        separate = parts.backward_batch(*batch(step))
        norm = parts.optimizer_step(lr=1e-3 * step)
        assert dataclasses.replace(result, grad_norm=None) == separate and result.grad_norm == norm
        for key, view in whole.parameters().items():
            assert np.array_equal(view.numpy(), parts.parameters()[key].numpy()), key


def test_lr_of_one_call(backend):
    """An lr of its own acts on this step alone; 0 moves moments and no weight."""
    optimizer = ng.AdamW(weight_decay=0.05)
    m = build(backend, optimizer=optimizer)
    for step, lr in enumerate((None, 0.05, None)):
        ids, targets = batch(step)
        m.backward_batch(ids, targets)
        check_step(m, optimizer, step, ids, lambda lr=lr: m.optimizer_step(lr), lr)
    before, moments = arrays(m.parameters()), moments_of(m)
    m.train_step_batch(*batch(0), lr=0.0)
    assert all(np.array_equal(view.numpy(), before[key]) for key, view in m.parameters().items())
    assert not np.array_equal(moments_of(m)["decoder.bias"][0], moments["decoder.bias"][0])


def test_decay_reaches_synapses_and_the_decoder_alone(backend):
    optimizer = ng.AdamW(lr=1e-2, weight_decay=0.5)
    cfg = dataclasses.replace(CONFIG, rate_weight=0.0)
    m = build(backend, cfg, optimizer=optimizer)
    m.load_parameters({"decoder.bias": np.ones(V, np.float32)})
    m.backward_batch(*batch(0), weights=np.zeros((B, T), np.float32))  # and rate_weight 0: no gradient at all
    assert not any(gradient.any() for gradient in arrays(m.gradients()).values())
    before = arrays(m.parameters())
    m.optimizer_step()
    for key in m.gradients():
        decayed = key == "decoder.weight" or key.startswith("proj.")
        expected = before[key] * (1 - 0.5e-2 * decayed)
        np.testing.assert_allclose(m.parameters()[key].numpy(), expected, rtol=2 * UNIT * decayed, err_msg=key)


def test_the_lazy_embedding_waits(backend):
    """A row that is not heard keeps weight and moments; when it is, the global step corrects its bias."""
    m = build(backend)
    rows = []
    for step in range(3):
        ids = np.full((B, T), 6 if step == 1 else 5, np.int32)
        m.train_step_batch(ids, ids)
        rows.append((m.parameters()["embedding.weight"].numpy()[5], moments_of(m)["embedding.weight"][0][5]))
    assert all(np.array_equal(a, b) for a, b in zip(rows[0], rows[1]))
    assert all((a != b).all() for a, b in zip(rows[1], rows[2]))
