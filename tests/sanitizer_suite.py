"""A few small models through every kind of call, for compute-sanitizer, which makes kernels a hundred times slower.

    compute-sanitizer --tool memcheck --error-exitcode 9 python tests/sanitizer_suite.py [--quick]

Reduced to: three regions with gates, delays, dropout and sparse blocks, odd V; 3 streams x 5 tokens (tied and not,
graded and binary spikes) and 33 x 2 in groups of 16; both precisions; 1 x 5, 3 x 5, 1,030 x 2 and 41 x 5 of a sparse
connectome whose weights stay in registers, the last with credit by copies in bulk; 33 x 2 of a dense connectome with a
vocabulary of 5,003 in bf16, which has kernels of its own; that and 3 x 5 in fp8. Training, gradients accumulated, the
token-by-token loop, evaluation, generation by every kind of sampling, arrays in device memory, read and written, with
and without a wrong id (where CuPy is installed), a checkpoint saved and loaded.

--quick, for racecheck: it keeps every access to shared memory since the last barrier, and the brain launch has one
barrier in all. Three models of 2 streams x 3 tokens, two training steps each, an evaluation, two tokens drawn.
"""

import dataclasses
import os
import sys
import tempfile
from itertools import product
from pathlib import Path

import numpy as np
from test_determinism import CONFIG, V, batch

import neurogen_cy as ng

DENSE = ng.Config(
    5003, 256, (ng.Region("low", 128, 0), ng.Region("high", 128, 1)),
    (
        ng.Projection("embedding", "low"), ng.Projection("embedding", "high", kind="gate"),
        ng.Projection("low", "high"), ng.Projection("low", "high", kind="gate"),
        ng.Projection("low", "low", delay=1), ng.Projection("high", "low", delay=2),
        ng.Projection("low", "broca_out"), ng.Projection("high", "broca_out"),
    ), max_spike=4.0, dropout=0.1,
)  # fmt: skip
# Few terms a tile, so that they have places in registers, and few tiles, so that several warps have the same one.
SPARSE = ng.Config(
    300, 96, (ng.Region("low", 160, 0), ng.Region("mid", 96, 1), ng.Region("high", 192, 2)),
    (
        ng.Projection("embedding", "low", density=0.5), ng.Projection("embedding", "mid", kind="gate", density=0.1),
        ng.Projection("embedding", "high", density=0.1), ng.Projection("embedding", "high", kind="gate", density=0.1),
        ng.Projection("low", "mid", density=0.4), ng.Projection("low", "high", kind="gate", density=0.1),
        ng.Projection("mid", "high", density=0.1), ng.Projection("low", "low", delay=1, density=0.1),
        ng.Projection("mid", "mid", delay=1),
        ng.Projection("high", "high", delay=3, density=0.3), ng.Projection("high", "low", delay=4, density=0.2),
        ng.Projection("mid", "broca_out"), ng.Projection("high", "broca_out", density=0.5),
    ), max_spike=4.0,
)  # fmt: skip
BRAINS = {
    "plain": CONFIG,
    "tied": dataclasses.replace(CONFIG, tie_decoder=True, max_spike=4.0),
    "binary": dataclasses.replace(CONFIG, graded=False, dropout=0.0, rate_weight=0.0),
}


def learn(model, tokens):
    calls = [batch(number, model.streams, tokens) for number in range(3)]
    for call in calls:
        assert np.isfinite(model.train_step_batch(*call).loss)
    assert np.isfinite(model.train_step_batch(*calls[0][:2]).loss)  # without resets
    for accumulate in (False, True):
        model.backward_batch(*calls[0], accumulate=accumulate, record=True)
    for region in model.config.regions:
        assert np.isfinite(model.recorded(region.name)[0]).all()
    gradients = {key: view.numpy() for key, view in model.gradients().items()}
    assert any(gradient.any() for gradient in gradients.values())
    assert model.optimizer_step() > 0
    ids, targets = calls[1][:2]
    assert np.isfinite(model.train_step(ids[:, :2].copy(), targets[:, :2].copy()).loss)


def run(model):
    rng = np.random.default_rng(1)
    ids, targets = rng.integers(0, V, (2, 4, 11), np.int32)
    assert 0 < model.evaluate(ids, targets, rng.random((4, 11)) < 0.1) < 100
    for sampling in ({"greedy": True}, {"top_k": 5}, {"top_p": 0.7, "temperature": 1.3}):
        said = list(model.generate([ids[0, :3], ids[1, :7]], 4, seed=3, **sampling))
        assert len(said) == 4 and all(0 <= tokens.min() <= tokens.max() < model.config.vocab_size for tokens in said)
    model.brain.reset([0])
    model.brain.step(model.embedding.encode(np.resize(ids, model.streams)))
    logits = np.empty((model.streams, model.config.vocab_size), np.float32)
    model.decoder.logits_into(model.brain.broca_output(), logits)
    assert np.isfinite(logits).all()
    model.load_state(model.state())


def from_device_memory(model, tokens):
    """True where there is a library to make such arrays with."""
    try:
        import cupy
    except ImportError:
        return False
    ids, targets, weights, resets = (cupy.asarray(array) for array in batch(7, model.streams, tokens))
    said = cupy.empty_like(ids)
    result = model.train_step_batch(ids.astype(cupy.int64), targets, weights, resets, predictions_out=said)
    assert np.isfinite(result.loss)
    x, broca = (cupy.empty((model.streams, model.config.dim), cupy.float32) for _ in range(2))
    vocab, word = model.config.vocab_size, ids[:, 0].copy()
    logits = cupy.empty((model.streams, vocab), cupy.float32)
    for _ in range(2):
        model.embedding.encode_into(word, x)
        model.brain.step(x)
        model.brain.broca_output_into(broca)
        model.decoder.logits_into(broca, logits)
        model.decoder.sample_into(broca, word, top_k=5)
    assert np.isfinite(logits.get()).all() and 0 <= int(said.min()) <= int(said.max()) < vocab
    wrong = targets.copy()
    wrong[0, 0] = vocab
    try:
        model.train_step_batch(ids, wrong)
    except IndexError:
        return True
    raise AssertionError("a wrong id was taken")


def glance(model):
    """One of each kind of launch."""
    for arrays in (4, 2):  # with resets and without
        assert np.isfinite(model.train_step_batch(*batch(0, model.streams, 3)[:arrays]).loss)
    ids, targets = np.random.default_rng(1).integers(0, V, (2, 2, 3), np.int32)
    assert 0 < model.evaluate(ids, targets) < 100
    said = list(model.generate([ids[0], ids[1]], 2, seed=3, top_k=5, top_p=0.7))
    vocab = model.config.vocab_size
    assert len(said) == 2 and all((tokens >= 0).all() and (tokens < vocab).all() for tokens in said)


def quick():
    for precision in ("fp32", "bf16"):
        glance(ng.NeuroGen(BRAINS["plain"], streams=2, max_tokens=3, backend="cuda", precision=precision))
    glance(ng.NeuroGen(SPARSE, streams=2, max_tokens=3, backend="cuda", precision="bf16"))
    print("suite finished: quick, plain fp32 and bf16, sparse bf16, 2 x 3")


def whole(name, cfg, precision, streams, tokens):
    """Every kind of call; what was done, and whether arrays of device memory were among it."""
    arguments = {"backend": "cuda", "precision": precision}
    model = ng.NeuroGen(cfg, streams=streams, max_tokens=tokens, **arguments)
    learn(model, tokens)
    run(model)
    arrays = from_device_memory(model, tokens)
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder, "model"))
        learn(ng.NeuroGen.load(Path(folder, "model"), **arguments), tokens)
    return f"{name} {precision} {streams} x {tokens}", arrays


def main():
    cases = [(name, BRAINS[name], precision, 3, 5) for precision, name in product(("fp32", "bf16"), BRAINS)]
    done = [whole(*case) for case in cases]
    done += [whole("sparse", SPARSE, "bf16", streams, 5) for streams in (1, 3)]
    done.append(whole("sparse", SPARSE, "bf16", 1030, 2))  # more than eight streams a warp, more than 2,048 rows
    os.environ.update(NEUROGEN_CREDIT="bulk")
    done.append(whole("sparse", SPARSE, "bf16", 41, 5))
    os.environ.update(NEUROGEN_STREAM_GROUP="16")
    done += [whole("plain", BRAINS["plain"], precision, 33, 2) for precision in ("fp32", "bf16")]
    os.environ.update(NEUROGEN_BRAIN="dense")
    done.append(whole("dense", DENSE, "bf16", 33, 2))
    done += [whole("plain", BRAINS["plain"], "fp8", 3, 5), whole("dense", DENSE, "fp8", 33, 2)]
    names, arrays = "; ".join(name for name, _ in done), all(arrays for _, arrays in done)
    print(f"suite finished: {len(done)} models ({names}), device arrays: {'yes' if arrays else 'no'}")


if __name__ == "__main__":
    quick() if "--quick" in sys.argv[1:] else main()
