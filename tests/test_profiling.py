"""model.profile(): what a stretch of the user's own loop cost."""

import time

import numpy as np
import pytest

import neurogen_cy as ng

CFG = ng.Config(
    16, 32, (ng.Region("thalamus", 32, 0),),
    (ng.Projection("embedding", "thalamus"), ng.Projection("thalamus", "broca_out")),
)  # fmt: skip


@pytest.fixture
def model(make_model):
    return make_model(CFG, streams=2, max_tokens=8)


IDS = np.arange(16, dtype=np.int32).reshape(2, 8)


def test_calls_and_tokens_of_each_way(model):
    with model.profile() as batched:
        model.train_step_batch(IDS, IDS)
    with model.profile() as looped:
        model.train_step(IDS, IDS)
    with model.profile() as masked:
        model.backward_batch(IDS, IDS, (IDS < 3).astype(np.float32))
    assert (batched.calls, batched.tokens) == (1, 16)
    assert (looped.calls, looped.tokens) == (8, 16)
    assert (masked.calls, masked.tokens) == (1, 3)
    assert batched.tokens_per_s == pytest.approx(16 / batched.wall_s)


def test_counters_add_up(model):
    with model.profile() as whole:
        with model.profile() as first:
            model.evaluate(IDS, IDS)  # makes a state of its own
        with model.profile() as second:
            model.evaluate(IDS, IDS)
            model.evaluate(IDS, IDS)
    assert whole.counters == {name: first.counters[name] + second.counters[name] for name in model.counters}
    kind = "device_allocations" if model.backend == "cuda" else "host_allocations"
    assert first.counters[kind] >= 1 and second.counters[kind] == 2 * first.counters[kind]
    assert whole.tokens is None and whole.calls == 0 and whole.tokens_per_s is None
    if model.backend == "cuda":
        assert first.counters["syncs"] >= 1 and first.counters["h2d_bytes"] >= IDS.nbytes


def test_clocks_and_text(model):
    with model.profile() as asleep:
        time.sleep(0.05)
    assert asleep.wall_s >= 0.05 and asleep.cpu_percent < 50
    with model.profile() as awake:
        end = time.perf_counter() + 0.05
        while time.perf_counter() < end:
            pass
        awake.tokens = 500
    assert awake.cpu_s > asleep.cpu_s and awake.tokens == 500
    assert f"{awake.tokens_per_s:,.0f} tokens/s" in str(awake)
    assert awake.to_dict()["tokens_per_s"] == awake.tokens_per_s and "tokens/s" not in str(asleep)


def test_filled_in_when_the_block_raises(model):
    with pytest.raises(IndexError), model.profile() as p:
        model.train_step_batch(IDS, IDS)
        model.train_step_batch(IDS, IDS + 1)
    assert p.calls == 1 and p.wall_s > 0 and set(p.counters) == set(model.counters)
