"""`model.record`: what every neuron did over a text, held to the oracle, and what recording costs (nothing)."""

import dataclasses

import numpy as np
import pytest
from connectomes import random_case, retry_off_threshold
from reference import forward_backward
from test_determinism import CONFIG, PLAIN, V, batch, build, contents

import neurogen_cy as ng

B = 3
SPENT = ("launches", "syncs", "h2d_bytes", "d2h_bytes", "device_allocations", "host_allocations")


def spent(model, call, *arguments, **options):
    before = model.counters
    call(*arguments, **options)
    return {name: model.counters[name] - before[name] for name in SPENT}


@pytest.mark.parametrize("seed", range(4))
def test_membrane_spikes_and_gates_are_the_oracles(make_model, seed):
    def answer(case):
        return forward_backward(case.cfg, case.params, case.ids, case.targets, state=case.options["state"])

    case, expected, _ = retry_off_threshold(lambda n: random_case(9000 + 100 * seed + n), answer)
    streams, tokens = case.ids.shape
    model = make_model(case.cfg, params=case.params, streams=streams, max_tokens=tokens)
    state = case.options["state"]
    state = None if state is None else {key: value.astype(np.float32) for key, value in state.items()}
    got = model.record(case.ids, state=state)
    gated = {p.dst for p in case.cfg.projections if p.kind == "gate"}
    assert list(got.u) == list(got.s) == [region.name for region in case.cfg.regions]
    assert set(got.gates) == gated
    assert np.array_equal(got.ids, case.ids)
    for name in got.u:
        np.testing.assert_allclose(got.u[name], expected.u[name], atol=1e-4)
        np.testing.assert_allclose(got.s[name], expected.s[name], atol=1e-4)
    for name, gate in got.gates.items():
        assert gate.dtype == np.float32 and gate.std() > 0
        np.testing.assert_allclose(gate, expected.gate[name], atol=1e-4)


def test_a_long_text_is_heard_in_windows_and_the_models_own_state_stays(backend):
    ids = np.random.default_rng(1).integers(0, V, (2, 50), np.int32)
    short = build(backend, streams=3, max_tokens=6)  # 18 rows: 9 tokens of two streams at a time
    whole = build(backend, streams=2, max_tokens=50)
    short.train_step_batch(*batch(0, 3))
    values = {key: view.numpy() for key, view in short.parameters().items()}
    whole.load_parameters({key: value for key, value in values.items() if value.dtype.kind == "f"})
    before = contents(short)
    pieces, at_once = short.record(ids), whole.record(ids)
    assert contents(short) == before
    for name in ("u", "s", "gates"):
        for region, values in getattr(pieces, name).items():
            assert values.shape == (2, 50, CONFIG.region(region).neurons)
            assert np.array_equal(values, getattr(at_once, name)[region]), (name, region)


def test_a_record_goes_on_from_a_state(backend):
    model = build(backend, PLAIN, streams=2, max_tokens=8)
    ids = np.random.default_rng(2).integers(0, V, (2, 16), np.int32)
    whole = model.record(ids)
    first = ids[:, :8].copy()
    model.backward_batch(first, first)  # the model's own state hears the first half
    rest = model.record(ids[:, 8:], state=model.state())
    assert list(whole.gates) == ["high"]
    for name in ("u", "s", "gates"):
        for region, values in getattr(rest, name).items():
            assert np.array_equal(values, getattr(whole, name)[region][:, 8:])


def test_one_stream_may_be_flat_and_dropout_is_off(backend):
    model = build(backend, dataclasses.replace(CONFIG, dropout=0.9), streams=1, max_tokens=6)
    plain = build(backend, dataclasses.replace(CONFIG, dropout=0.0), streams=1, max_tokens=6)
    ids = np.arange(6)
    got, expected = model.record(ids), plain.record(ids[None])
    assert all(np.array_equal(got.s[name], expected.s[name]) for name in got.s)
    assert got.s["low"].any() and got.s["low"].shape == (1, 6, 96)


def test_recording_adds_no_synchronisation_launch_copy_or_allocation(backend):
    plain, recorded = build(backend, streams=B), build(backend, streams=B)
    ids, targets, _, _ = batch(3, B)
    for name in ("backward_batch", "train_step_batch"):
        call, call_recorded = getattr(plain, name), getattr(recorded, name)
        for record in (False, True):  # the first call of each has something to set up
            call(ids, targets)
            call_recorded(ids, targets, record=record)
        cost = spent(plain, call, ids, targets)
        assert spent(recorded, call_recorded, ids, targets, record=True) == cost
        assert cost["syncs"] == (backend == "cuda")
    broca = np.empty((B, CONFIG.dim), np.float32)
    state = plain._engine.new_state(B)
    cost = spent(plain, plain._engine.advance, state, ids, broca, False)
    assert spent(plain, plain._engine.advance, state, ids, broca, True) == cost
    assert contents(plain) == contents(recorded), "and changes no bit of what is learnt"


def test_gates_of_a_call_that_learnt_are_not_to_be_had(backend):
    model = build(backend)
    ids, targets, _, _ = batch(0, 3)
    model.train_step_batch(ids, targets, record=True)
    u, s = model.recorded("high")
    assert u.shape == s.shape == (3, 6, 64)
    assert model._engine.recorded(2)[2] is None, "errors by then"
    model.record(ids)
    assert model._engine.recorded(2)[2] is not None
    model.evaluate(ids, targets)
    with pytest.raises(RuntimeError, match="expected the last call to be one with record=True, got none"):
        model.recorded("high")


@pytest.mark.parametrize(
    "ids, state, error, message",
    [
        (np.zeros((2, 0), np.int32), None, ValueError, r"ids: expected shape \[S, L\] or \[L\].*got \(2, 0\)"),
        (np.zeros((1, 1, 1), np.int32), None, ValueError, r"got \(1, 1, 1\)"),
        (np.zeros(3, np.float32), None, TypeError, "ids: expected dtype int32 or int64, got float32"),
        (np.array([0, V]), None, IndexError, rf"ids\[1\]: expected a token id in 0\.\.{V - 1}, got {V}"),
        (np.zeros((19, 1), np.int32), None, ValueError, r"expected at most streams \* max_tokens = 18 streams, got 19"),
        (np.zeros((3, 2), np.int32), {}, ValueError, "expected a value, got none"),
        (np.zeros((3, 2), np.int32), 7, TypeError, "state: expected a mapping"),
    ],
)
def test_wrong_input_is_named(backend, ids, state, error, message):
    with pytest.raises(error, match=message):
        build(backend).record(ids, state=state)


def test_a_state_of_other_streams_is_refused(backend):
    model = build(backend)
    with pytest.raises(ValueError, match=r"expected shape \(2, 96\), got \(3, 96\)"):
        model.record(np.zeros((2, 4), np.int32), state=model.state())
    assert isinstance(model.record(np.zeros((3, 4), np.int32), state=model.state()), ng.Recording)
