"""Steps of several groups of streams: what equals one big call bit for bit, what within rounding, and resuming."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runs import CONFIG, SETTINGS, AtStep, assert_same_run, begin, contents, resume, untimed

from neurogen_cy import Config, NeuroGen, checkpoint
from neurogen_cy.stream_groups import StreamGroups

# Without the two terms that depend on the grouping by what they are.
PLAIN = dataclasses.replace(CONFIG, dropout=0.0, rate_weight=0.0)
STREAMS, TOKENS, STEPS = 64, 8, 10
EPSILON = float(np.finfo(np.float32).eps)


def trained(
    accumulate: int, config: Config = PLAIN, noise: int | None = None, threads: int = 1
) -> tuple[NeuroGen, StreamGroups, list[Any]]:
    """Ten steps of 64 streams in this many groups; `noise` moves every weight by up to one rounding at the start."""
    model = NeuroGen(
        config, "cpu", streams=STREAMS // accumulate, max_tokens=TOKENS, seed=1, threads=threads, accumulate=accumulate
    )
    if noise is not None:
        rng = np.random.default_rng(noise)
        model.load_parameters({
            key: a * (1 + EPSILON * rng.uniform(-1, 1, a.shape).astype(np.float32))
            for key, a in ((key, np.asarray(view)) for key, view in model.parameters().items() if key in TRAINABLE)
        })
    groups = StreamGroups(model)
    rng = np.random.default_rng(2)
    results = []
    for _ in range(STEPS):
        ids, targets = rng.integers(0, 256, (2, STREAMS, TOKENS), np.int32)
        results.append(groups.train_step(ids, targets, rng.random((STREAMS, TOKENS)) < 0.05, 5e-3))
    return model, groups, results


TRAINABLE = set(NeuroGen(PLAIN, "cpu", threads=1).gradients())


def weights(model: NeuroGen) -> np.ndarray[Any, Any]:
    """All trained weights, one after another."""
    return np.concatenate([np.asarray(model.parameters()[key]).ravel() for key in sorted(TRAINABLE)])


def test_2x32_equals_1x64_within_rounding() -> None:
    """The yardstick is 1x64 itself, from weights that differ by less than one rounding."""
    whole, groups, expected = trained(1)
    halves, halved, results = trained(2)
    assert results[0].loss == pytest.approx(expected[0].loss, rel=2 * EPSILON)
    assert results[0].rates == pytest.approx(expected[0].rates, rel=2 * EPSILON)
    assert results[0].accuracy == expected[0].accuracy and results[0].tokens == expected[0].tokens == STREAMS * TOKENS
    assert results[0].grad_norm == pytest.approx(expected[0].grad_norm, rel=1e-6)
    shaken = [trained(1, noise=seed)[0] for seed in range(3)]
    rounding = max(np.abs(weights(model) - weights(whole)).max() for model in shaken)
    assert 0 < np.abs(weights(halves) - weights(whole)).max() <= 4 * rounding < 0.1 * 5e-3 * STEPS
    assert halves.step == whole.step == STEPS


def test_the_first_step_leaves_the_same_state_bit_for_bit() -> None:
    ids, targets = np.random.default_rng(0).integers(0, 256, (2, STREAMS, TOKENS), np.int32)
    resets = np.zeros(ids.shape, np.bool_)
    states = []
    for accumulate in (1, 2, 8):
        sizes = {"streams": STREAMS // accumulate, "accumulate": accumulate}
        model = NeuroGen(PLAIN, "cpu", **sizes, max_tokens=TOKENS, threads=1)
        groups = StreamGroups(model)
        groups.train_step(ids, targets, resets, 1e-3)
        states.append({key: a.tobytes() for key, a in groups.state().items()})
    assert states[0] == states[1] == states[2]


def test_homeostasis_weighs_as_much_under_every_grouping() -> None:
    """Of streams that all read the same, every group has the rates of the whole: then it is the same term."""
    config = dataclasses.replace(CONFIG, dropout=0.0, rate_weight=50.0)
    line = np.random.default_rng(0).integers(0, 256, (2, 1, TOKENS), np.int32)
    ids, targets = (np.ascontiguousarray(np.repeat(row, 4, axis=0)) for row in line)
    gradients, terms = [], []
    for accumulate in (1, 4):
        model = NeuroGen(config, "cpu", streams=4 // accumulate, max_tokens=TOKENS, threads=1, accumulate=accumulate)
        result = StreamGroups(model).train_step(ids, targets, np.zeros(ids.shape, np.bool_), 0.0)
        gradients.append({key: np.array(view) for key, view in model.gradients().items()})
        terms.append(result.homeostasis)
    assert terms[1] == pytest.approx(terms[0], rel=1e-6) and terms[0] > 0.1
    for key, gradient in gradients[0].items():
        np.testing.assert_allclose(gradients[1][key], gradient, atol=2e-6 * np.abs(gradient).max(), err_msg=key)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_threads_do_not_change_a_bit(accumulate: int) -> None:
    one, two = (trained(accumulate, CONFIG, threads=threads) for threads in (1, 2))
    assert weights(one[0]).tobytes() == weights(two[0]).tobytes()
    assert {k: a.tobytes() for k, a in one[1].state().items()} == {k: a.tobytes() for k, a in two[1].state().items()}
    assert one[2] == two[2]


def test_a_skipped_group_skips_the_step_and_keeps_every_state() -> None:
    model = NeuroGen(PLAIN, "cpu", streams=2, max_tokens=TOKENS, threads=1, accumulate=2, nonfinite="skip")
    groups = StreamGroups(model)
    ids, targets = np.random.default_rng(0).integers(0, 250, (2, 4, TOKENS), np.int32)
    resets = np.zeros(ids.shape, np.bool_)
    groups.train_step(ids, targets, resets, 1e-3)
    table = np.asarray(model.parameters()["embedding.weight"]).copy()
    table[255] = 3e38  # read by the second group alone
    model.load_parameters({"embedding.weight": table})
    before = {key: a.tobytes() for key, a in groups.state().items()}, weights(model).tobytes()
    ids[3] = 255
    groups.train_step(ids, targets, resets, 1e-3)
    assert (model.skipped, model.step) == (1, 1)
    assert ({key: a.tobytes() for key, a in groups.state().items()}, weights(model).tobytes()) == before
    ids[3] = 0
    assert np.isfinite(groups.train_step(ids, targets, resets, 1e-3).loss) and model.step == 2


GROUPED = {"streams": 2, "accumulate": 2}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in two groups of two streams that went through."""
    out = tmp_path_factory.mktemp("unbroken")
    assert begin(out, **GROUPED).run().reason is None
    return out


@pytest.mark.parametrize("threads", [1, 2])
def test_stopped_and_resumed_equals_unbroken(tmp_path: Path, unbroken: Path, threads: int) -> None:
    begin(tmp_path, SETTINGS, AtStep(7, lambda: signal.raise_signal(signal.SIGTERM)), **GROUPED).run()
    resume(tmp_path / "last", **GROUPED, threads=threads).run()
    assert_same_run(tmp_path, unbroken)


def test_a_checkpoint_goes_on_under_another_grouping(tmp_path: Path, unbroken: Path) -> None:
    """The state of all streams is in it; the resumed runs differ by rounding and by the draws of dropout."""
    saved = unbroken / "last"
    assert checkpoint.read_meta(saved)["streams"] == 4
    state = checkpoint.read(saved, ("state",))[0]["state"]
    for streams in (4, 2, 1):
        trainer = resume(saved, streams=streams, accumulate=4 // streams)
        assert all(np.array_equal(a, state[key]) for key, a in trainer._groups.state().items())
        trainer.out = tmp_path / str(streams)
        trainer.save("last")
        one, other = contents(trainer.out / "last"), contents(saved)
        assert one[0] == other[0]
    with pytest.raises(ValueError, match="expected a cursor with streams 6, got 4"):
        resume(saved, streams=2, accumulate=3)
    steps = [record for record in untimed(unbroken) if record["event"] == "step"]
    assert [record["tokens"] for record in steps] == [32 * step for step in range(1, 13)]
