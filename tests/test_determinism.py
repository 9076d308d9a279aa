"""Same inputs, same bits: over processes, threads and checkpoints; and what is refused or skipped leaves no trace."""

import dataclasses
import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import neurogen_cy as ng

V, D = 29, 64
STREAMS = (1, 3, 16)  # few streams share tiles among threads, many go in groups
CONFIG = ng.Config(
    vocab_size=V,
    dim=D,
    regions=(ng.Region("low", 96, 0), ng.Region("middle", 128, 1), ng.Region("high", 64, 2)),
    projections=(
        ng.Projection("embedding", "low"),
        ng.Projection("embedding", "high", kind="gate"),
        ng.Projection("low", "middle"),
        ng.Projection("low", "high", kind="gate", density=0.5),
        ng.Projection("middle", "high", density=0.5),
        ng.Projection("middle", "middle", delay=1),
        ng.Projection("high", "low", delay=3),
        ng.Projection("middle", "broca_out"),
        ng.Projection("high", "broca_out", density=0.5),
    ),
    dropout=0.2,
)
PLAIN = dataclasses.replace(CONFIG, dropout=0.0, rate_weight=0.0)


def batch(number, streams, tokens=6):
    """ids, targets, weights and resets of call `number`."""
    rng = np.random.default_rng(number)
    ids, targets = rng.integers(0, V, (2, streams, tokens), np.int32)
    return ids, targets, rng.random((streams, tokens), np.float32), rng.random((streams, tokens)) < 0.05


def build(backend, cfg=CONFIG, **settings):
    settings = {"streams": 3, "max_tokens": 6, "seed": 6, "threads": 1, "precision": "fp32", **settings}
    return ng.NeuroGen(cfg, backend=backend, **settings)


def train(m, calls):
    return [m.train_step_batch(*batch(call, m.streams), lr=1e-3 * (1 + call % 3)) for call in calls]


def contents(m):
    """Every bit that training goes on from."""
    arrays = {**{key: view.numpy() for key, view in m.parameters().items()}, **m.state()}
    for key, pair in m._engine.moments().items():
        arrays.update({f"{key}.moment{i}": view.numpy() for i, view in enumerate(pair)})
    return {"counts": (m.step, m.calls), **{key: (a.shape, a.tobytes()) for key, a in arrays.items()}}


def digest(backend, threads, streams):
    m = build(backend, threads=threads, streams=streams)
    train(m, range(50))
    assert m.step == 50
    return hashlib.sha256(repr(sorted(contents(m).items())).encode()).hexdigest()


def test_two_processes_at_one_and_two_threads(backend):
    path = os.pathsep.join([str(Path(ng.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    lines = []
    for hash_seed, threads in (("1", "12"), ("2", "21")):
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": hash_seed, "OMP_WAIT_POLICY": "passive"}
        command = [sys.executable, __file__, backend, threads]
        lines += subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split("\n")
    runs = [line.split() for line in lines if line]
    assert [threads for threads, *_ in runs] == ["1", "2", "2", "1"]
    assert len({tuple(digests) for _, *digests in runs}) == 1 and len(set(runs[0][1:])) == len(STREAMS)


def test_saved_loaded_and_continued_is_never_stopped(backend, tmp_path):
    unbroken, stopped = build(backend), build(backend)
    train(stopped, range(7))
    stopped.save(tmp_path / "at7")
    resumed = ng.NeuroGen.load(tmp_path / "at7", backend=backend, threads=2, precision="fp32")
    assert contents(resumed) == contents(stopped)
    results = train(unbroken, range(14))
    assert train(resumed, range(7, 14)) == results[7:] == train(stopped, range(7, 14))
    assert contents(resumed) == contents(unbroken) == contents(stopped)


def test_two_half_batches_make_the_whole_gradient(backend):
    ids, targets, weights, resets = batch(3, 4)
    whole, half = build(backend, PLAIN, streams=4), build(backend, PLAIN, streams=2)
    whole.backward_batch(*batch(0, 4)[:2])
    start = whole.state()
    expected = whole.backward_batch(ids, targets, weights, resets)
    assert any(a.any() for a in start.values()) and expected.homeostasis == 0
    loss, halves = 0.0, (slice(0, 2), slice(2, 4))
    half.backward_batch(*batch(9, 2)[:2])  # overwritten by the first half
    for part in halves:
        half.load_state({key: a[part] for key, a in start.items()})
        result = half.backward_batch(
            ids[part], targets[part], weights[part], resets[part],
            divisor=float(weights.sum(dtype=np.float64)), accumulate=part.start > 0,
        )  # fmt: skip
        loss += result.loss
        assert all(np.array_equal(a, whole.state()[key][part]) for key, a in half.state().items())
    assert loss == pytest.approx(expected.loss, rel=1e-6)
    gradients = half.gradients()
    for key, view in whole.gradients().items():
        gradient = view.numpy()
        assert np.abs(gradients[key].numpy() - gradient).max() <= 1e-6 * np.abs(gradient).max() > 0, key
    assert half.optimizer_step() == pytest.approx(whole.optimizer_step(), rel=1e-6)


def overflow_loss(m):
    m.load_parameters({"decoder.weight": np.full((V, D), 3e38, np.float32)})


def overflow_neurons(m):
    """Silent neurons: the loss stays finite, the gradient does not."""
    rows = np.full((V, D), 3e38, np.float32)
    rows[:, ::2] *= -1
    m.load_parameters({"embedding.weight": rows})


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("poison", [overflow_loss, overflow_neurons])
def test_a_step_that_is_not_finite_changes_nothing(backend, poison, nonfinite):
    m, spared = (build(backend, nonfinite=nonfinite) for _ in range(2))
    train(m, range(3)), train(spared, range(3))
    healthy = {key: m.parameters()[key].numpy() for key in m.gradients()}
    poison(m)
    before = contents(m)
    for count, call in enumerate((m.train_step_batch, m.train_step_batch, m.train_step), 1):
        arguments = batch(3, 3)[:2]
        if nonfinite == "raise":
            with pytest.raises(FloatingPointError, match="step 4: expected a finite loss.* got loss"):
                call(*arguments)
        else:
            assert not np.isfinite(call(*arguments).grad_norm)
        assert contents(m) == before
        assert m.skipped == (0 if nonfinite == "raise" else 8 if call == m.train_step else count)  # 6 tokens
    m.load_parameters(healthy)
    assert train(m, range(3, 6)) == train(spared, range(3, 6))
    assert contents(m) == contents(spared)


@pytest.mark.parametrize("poison", [overflow_loss, overflow_neurons])
def test_a_backward_pass_that_is_not_finite_keeps_state_and_gradients(backend, poison):
    m = build(backend)
    train(m, range(3))
    m.backward_batch(*batch(3, 3))
    gradients = {key: view.numpy().tobytes() for key, view in m.gradients().items()}
    poison(m)
    before = contents(m)
    for nonfinite in ("raise", "skip"):
        m.nonfinite = nonfinite
        if nonfinite == "raise":
            with pytest.raises(FloatingPointError, match="step 4: expected a finite loss"):
                m.backward_batch(*batch(3, 3), accumulate=True)
        else:
            m.backward_batch(*batch(3, 3), accumulate=True)
        assert contents(m) == before
        assert {key: view.numpy().tobytes() for key, view in m.gradients().items()} == gradients
    assert m.skipped == 1


def test_running_never_keeps_a_state_that_is_not_finite(backend):
    m = build(backend)
    train(m, range(3))
    overflow_neurons(m)
    before = contents(m)
    ids = batch(3, 3)[0]
    x = np.full((m.streams, D), 3e38, np.float32)
    x[:, ::2] *= -1
    for call in (lambda: m.brain.step(x), lambda: m.evaluate(ids, ids), lambda: list(m.generate(ids[0], 3))):
        with pytest.raises(OverflowError, match="neuron state: expected finite values"):
            call()
        assert contents(m) == before


@pytest.mark.parametrize("nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])  # 1e30 squared leaves float32
def test_a_gradient_that_is_not_finite_changes_nothing(value, nonfinite):
    m = build("cpu", nonfinite=nonfinite)  # whose views are host memory
    train(m, range(2))
    m.backward_batch(*batch(2, 3))
    gradient = np.asarray(m.gradients()["proj.low.middle.drive.0.blocks"])
    kept, before = gradient.copy(), contents(m)
    gradient[3, 4, 5] = value
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError, match="step 3: expected .* got gradient norm"):
            m.optimizer_step()
    else:
        assert not np.isfinite(m.optimizer_step())
    assert contents(m) == before and m.skipped == (nonfinite == "skip")
    gradient[...] = kept
    assert m.optimizer_step() > 0 and m.step == 3


def test_two_threads_are_served_one_at_a_time(backend):
    """Steps, dropout keys and bias corrections stay in order, however the threads take turns."""
    m, results, refusals = build(backend), [], []
    arguments = batch(1, 3)

    def call():
        while len(results) < 400:
            try:
                results.append(m.train_step_batch(*arguments))
            except RuntimeError as error:
                refusals.append(str(error))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=call) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert len(results) + len(refusals) > 2000 and len(results) == m.step == m.calls
    assert set(refusals) == {"this model is in use by another thread: a model serves one thread at a time"}
    alone = build(backend)
    expected = [alone.train_step_batch(*arguments) for _ in results]
    assert sorted(r.loss for r in results) == sorted(r.loss for r in expected)
    assert contents(m) == contents(alone)


def test_other_calls_of_a_second_thread_are_refused(backend):
    m, free = build(backend, streams=16, max_tokens=64), threading.Event()
    arguments, errors = batch(1, 16, 64), []

    def train_on():
        while not free.is_set():
            m.train_step_batch(*arguments)

    thread = threading.Thread(target=train_on)
    thread.start()
    out = np.empty((1, V), np.float32)
    calls = (m.state, m.brain.reset, lambda: m.decoder.logits_into(np.ones((1, D), np.float32), out),
             lambda: m.embedding.encode(arguments[0]), lambda: m.recorded("low"), m.optimizer_step)  # fmt: skip
    for call in calls:
        for _ in range(10_000):
            try:
                call()
            except RuntimeError as error:
                if "in use by another thread" in str(error):
                    errors.append(call)
                    break
    free.set()
    thread.join()
    assert errors == list(calls)


def test_the_token_loop_learns_the_same(backend):
    loop, batched = build(backend, PLAIN), build(backend, PLAIN)
    ids, targets = batch(2, 3)[:2]
    result = loop.train_step(ids, targets)
    expected = [batched.train_step_batch(ids[:, t : t + 1].copy(), targets[:, t : t + 1].copy()) for t in range(6)]
    for name in ("loss", "homeostasis", "accuracy", "grad_norm"):
        assert getattr(result, name) == pytest.approx(np.mean([getattr(r, name) for r in expected]), rel=1e-6), name
    assert result.tokens == 18 and loop.step == batched.step == 6
    for key, view in loop.parameters().items():
        scale = np.abs(view.numpy()).max()
        np.testing.assert_allclose(view.numpy(), batched.parameters()[key].numpy(), atol=1e-6 * scale, err_msg=key)
    for key, a in loop.state().items():
        np.testing.assert_allclose(a, batched.state()[key], rtol=1e-6, atol=1e-6, err_msg=key)


def test_the_token_loop_learns(backend):
    m = build(backend, streams=1, optimizer=ng.AdamW(lr=5e-3))
    text = np.tile(np.array([1, 5, 2, 8, 3], np.int32), 40)
    before = m.evaluate(text[:50], text[1:51])
    result = m.train_step(text[:199], text[1:])
    assert before > 3.0 and m.evaluate(text[:50], text[1:51]) < 0.3 * before and result.accuracy > 0.6
    assert m.step == result.tokens == 199


if __name__ == "__main__":
    for count in sys.argv[2]:
        print(count, *(digest(sys.argv[1], int(count), streams) for streams in STREAMS))
