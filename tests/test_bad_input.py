"""Bad calls: the right exception, a message with argument, expected and got, and a model that never noticed."""

import functools
import re

import numpy as np
import pytest

import neurogen_cy as ng
from neurogen_cy import backend as backends

B, T, V, D = 2, 3, 17, 32
CONFIG = ng.Config(
    vocab_size=V,
    dim=D,
    regions=(ng.Region("low", 32, 0), ng.Region("high", 64, 2)),
    projections=(
        ng.Projection("embedding", "low"),
        ng.Projection("embedding", "high", kind="gate"),
        ng.Projection("low", "high"),
        ng.Projection("high", "low", delay=3),
        ng.Projection("high", "broca_out"),
    ),
    dropout=0.1,
)
IDS = np.array([[1, 2, 3], [4, 5, 6]], np.int32)
X = np.ones((B, D), np.float32)
OUT = np.zeros((B, V), np.float32)
BIG_ENDIAN = IDS.astype(">i4")
HOST = "expected a NumPy array, a buffer .*"
SHAPE = r"expected shape \[2, T\] with 1 <= T <= 5, got "


def train(ids=IDS, targets=IDS, **options):
    return lambda m: m.train_step_batch(ids, targets, **options)


def backward(**options):
    return lambda m: m.backward_batch(IDS, IDS, **options)


def sample(broca=X, ids_out=None, **options):
    return lambda m: m.decoder.sample_into(broca, np.zeros(B, np.int32) if ids_out is None else ids_out, **options)


def generate(prompts=((1, 2),), count=3, **options):
    return lambda m: m.generate(prompts, count, **options)


def load(**changed):
    return lambda m: m.load_state({**m.state(), **{key.replace("_", "."): a for key, a in changed.items()}})


def filled(shape, value, dtype=np.float32):
    return np.full(shape, value, dtype)


def overlapping():
    both = np.zeros(B * D, np.float32)
    return both.reshape(B, D), both[: B * V].reshape(B, V)


def read_only(shape, dtype=np.float32):
    array = np.zeros(shape, dtype)
    array.flags.writeable = False
    return array


SHARED = IDS.copy()
TALL, WIDE = filled((T, B), 1, np.int32), filled((B, 2 * T), 1, np.int32)
CALLS = {
    "ids list": (train([[0]]), TypeError, HOST + "got list"),
    "ids None": (train(None), TypeError, HOST + "got NoneType"),
    "ids str": (train("text"), TypeError, HOST + "got str"),
    "ids float64": (train(IDS.astype(float)), TypeError, "expected dtype int32 or int64, got float64"),
    "ids int16": (train(IDS.astype(np.int16)), TypeError, "expected dtype int32 or int64, got int16"),
    "ids uint32": (train(IDS.astype(np.uint32)), TypeError, "expected dtype int32 or int64, got uint32"),
    "ids big-endian": (train(BIG_ENDIAN), TypeError, "expected dtype int32 or int64, got big-endian '>i'"),
    "ids object": (train(IDS.astype(object)), TypeError, "expected dtype int32 or int64, got 'O'"),
    "ids datetime": (train(IDS.astype("M8[s]")), TypeError, HOST + "got ndarray: cannot include dtype 'M'"),
    "ids transposed": (train(TALL.T), ValueError, r"expected a C-contiguous array, got shape \(2, 3\) with strides"),
    "ids strided": (train(WIDE[:, ::2]), ValueError, r"expected a C-contiguous array, got shape \(2, 3\) with strides"),
    "ids one axis": (train(IDS[0]), ValueError, SHAPE + r"\(3,\)"),
    "ids three axes": (train(IDS[None]), ValueError, SHAPE + r"\(1, 2, 3\)"),
    "ids streams": (train(TALL), ValueError, SHAPE + r"\(3, 2\)"),
    "ids T > max_tokens": (train(WIDE, WIDE), ValueError, SHAPE + r"\(2, 6\)"),
    "ids T = 0": (train(IDS[:, :0]), ValueError, r"expected at least one element, got shape \(2, 0\)"),
    "ids -1": (train(IDS - 2), IndexError, r"\[0, 0\]: expected a token id in 0..16, got -1"),
    "ids V": (train(IDS + V - 6), IndexError, r"\[1, 2\]: expected a token id in 0..16, got 17"),
    "ids INT32_MAX": (train(filled((B, T), 2**31 - 1, np.int32)), IndexError, "in 0..16, got 2147483647"),
    "ids int64": (train(IDS + np.int64(2**32)), IndexError, r"\[0, 0\]: .*in 0..16, got 4294967297"),
    "targets None": (train(targets=None), TypeError, "expected an array of token ids, got None"),
    "targets V": (train(targets=IDS + V - 6), IndexError, r"\[1, 2\]: expected a token id in 0..16, got 17"),
    "targets shape": (train(targets=IDS[:, :2].copy()), ValueError, r"expected shape \(2, 3\), got \(2, 2\)"),
    "weights float64": (train(weights=np.ones((B, T))), TypeError, "expected dtype float32, got float64"),
    "weights shape": (train(weights=filled((T,), 1)), ValueError, r"expected shape \(2, 3\), got \(3,\)"),
    "weights negative": (train(weights=filled((B, T), -1)), ValueError, "expected values >= 0 .*, got -1.0"),
    "weights NaN": (train(weights=filled((B, T), np.nan)), ValueError, "expected finite values, got nan"),
    "weights infinite": (backward(weights=filled((B, T), np.inf), normalize="abs"), ValueError, "values, got inf"),
    "resets float": (train(resets=filled((B, T), 0)), TypeError, "expected dtype bool or uint8, got float32"),
    "resets shape": (train(resets=filled((B, 2), 0, bool)), ValueError, r"expected shape \(2, 3\), got \(2, 2\)"),
    "normalize": (train(normalize="mean"), ValueError, "expected 'sum' or 'abs', got 'mean'"),
    "normalize None": (backward(normalize=None), ValueError, "expected 'sum' or 'abs', got None"),
    "lr negative": (train(lr=-1.0), ValueError, r"expected a finite number >= 0, got -1\.0"),
    "lr NaN": (train(lr=np.nan), ValueError, "expected a finite number >= 0, got nan"),
    "lr 1e39": (train(lr=1e39), ValueError, r"expected a step size within float32, got 1e\+39"),
    "lr str": (train(lr="1e-3"), TypeError, "expected a number, got '1e-3'"),
    "lr infinite in optimizer_step": (lambda m: m.optimizer_step(lr=np.inf), ValueError, "expected a finite .*inf"),
    "lr list in optimizer_step": (lambda m: m.optimizer_step(lr=[1]), TypeError, r"expected a number, got \[1\]"),
    "divisor negative": (backward(divisor=-1), ValueError, "expected a finite number >= 0, got -1"),
    "divisor NaN": (backward(divisor=np.nan), ValueError, "expected a finite number >= 0, got nan"),
    "divisor str": (backward(divisor="3"), TypeError, "expected a number, got '3'"),
    "predictions_out int64": (train(predictions_out=np.int64(IDS)), TypeError, "expected dtype int32, got int64"),
    "predictions_out shape": (train(predictions_out=TALL), ValueError, r"expected shape \(2, 3\), got \(3, 2\)"),
    "predictions_out read-only": (train(predictions_out=read_only((B, T), np.int32)), ValueError, "a writable.*-only"),
    "predictions_out bytes": (train(predictions_out=bytes(24)), TypeError, "expected dtype int32, got uint8"),
    "predictions_out is ids": (train(SHARED, predictions_out=SHARED), ValueError, "apart from ids, got overlapping"),
    "predictions_out is targets": (train(targets=SHARED, predictions_out=SHARED), ValueError, "apart from targets"),
    "ids in train_step": (lambda m: m.train_step([[0]], IDS), TypeError, HOST + "got list"),
    "targets in train_step": (lambda m: m.train_step(IDS, IDS + 16), IndexError, r"\[0, 0\]: .*in 0..16, got 17"),
    "ids of encode_into": (lambda m: m.embedding.encode_into(7, X), TypeError, HOST + "got int"),
    "ids empty": (lambda m: m.embedding.encode(IDS[:0]), ValueError, r"at least one element, got shape \(0, 3\)"),
    "ids of encode": (lambda m: m.embedding.encode(IDS + V), IndexError, r"\[0, 0\]: .*in 0..16, got 18"),
    "out None": (lambda m: m.embedding.encode_into(IDS, None), TypeError, HOST + "got NoneType"),
    "out float64": (lambda m: m.embedding.encode_into(IDS[0], np.zeros((3, D))), TypeError, "float32, got float64"),
    "out shape": (lambda m: m.embedding.encode_into(IDS, X), ValueError, r"expected shape \(2, 3, 32\), got \(2, 32\)"),
    "out read-only": (lambda m: m.embedding.encode_into(IDS[0], read_only((3, D))), ValueError, "writable.*read-only"),
    "out strided": (lambda m: m.embedding.encode_into(IDS[0], filled((3, 64), 0)[:, ::2]), ValueError, "C-contiguous"),
    "id V": (lambda m: m.embedding.row_view(V), IndexError, "expected a token id in 0..16, got 17"),
    "id -1": (lambda m: m.embedding.row_view(-1), IndexError, "expected a token id in 0..16, got -1"),
    "id float": (lambda m: m.embedding.row_view(1.0), TypeError, "expected an integer, got float"),
    "x width": (lambda m: m.brain.step(X[:, :31].copy()), ValueError, r"expected shape \(2, 32\), got \(2, 31\)"),
    "x one axis": (lambda m: m.brain.step(X[0]), ValueError, r"expected shape \(2, 32\), got \(32,\)"),
    "x None": (lambda m: m.brain.step(None), TypeError, HOST + "got NoneType"),
    "x NaN": (lambda m: m.brain.step(filled((B, D), np.nan)), ValueError, "expected finite values, got nan"),
    "out of broca_output_into": (lambda m: m.brain.broca_output_into(OUT), ValueError, r"\(2, 32\), got \(2, 17\)"),
    "streams B": (lambda m: m.brain.reset(B), IndexError, "expected 0..1, got 2"),
    "streams -1": (lambda m: m.brain.reset([0, -1]), IndexError, "expected 0..1, got -1"),
    "streams float": (lambda m: m.brain.reset([0.5]), TypeError, "expected integers, got 0.5"),
    "broca one axis": (lambda m: m.decoder.logits_into(X[0], OUT[:1]), ValueError, r"shape \[M, 32\], got \(32,\)"),
    "out of logits_into": (lambda m: m.decoder.logits_into(X, OUT[:1]), ValueError, r"\(2, 17\), got \(1, 17\)"),
    "out overlaps": (lambda m: m.decoder.logits_into(*overlapping()), ValueError, "memory apart from broca, got overl"),
    "broca float64": (sample(np.ones((B, D))), TypeError, "expected dtype float32, got float64"),
    "broca infinite": (sample(X * np.inf), ValueError, "expected finite values, got inf"),
    "ids_out int64": (sample(ids_out=filled(B, 0, np.int64)), TypeError, "expected dtype int32, got int64"),
    "ids_out shape": (sample(ids_out=filled(3, 0, np.int32)), ValueError, r"expected shape \(2,\), got \(3,\)"),
    "temperature 0": (sample(temperature=0), ValueError, r"expected a finite float32 number > 0 .*, got 0"),
    "temperature NaN": (sample(temperature=np.nan), ValueError, "expected a finite float32 number > 0 .*, got nan"),
    "temperature 1e-60": (sample(temperature=1e-60), ValueError, "expected a finite float32 number > 0 .*, got 1e-60"),
    "temperature None": (sample(temperature=None), TypeError, "expected a number, got None"),
    "top_k -1": (sample(top_k=-1), ValueError, "expected an integer >= 0, got -1"),
    "top_k float": (sample(top_k=1.0), TypeError, r"expected an integer >= 0, got 1\.0"),
    "top_p 0": (sample(top_p=0), ValueError, r"expected a number in \(0, 1\], got 0"),
    "top_p 1.1": (generate(top_p=1.1), ValueError, r"expected a number in \(0, 1\], got 1.1"),
    "seed -1": (sample(seed=-1), ValueError, r"expected an integer in 0..2\*\*64-1, got -1"),
    "seed 2^64": (generate(seed=2**64), ValueError, r"expected an integer in 0..2\*\*64-1, got 18446744073709551616"),
    "position -1": (sample(position=-1), ValueError, r"expected an integer in 0..2\*\*64-1, got -1"),
    "prompts None": (generate(None), TypeError, HOST + "got NoneType"),
    "prompts none": (generate([]), ValueError, "expected at least one prompt, got none"),
    "prompts[0] empty": (generate([[]]), ValueError, r"expected a 1-D array of at least one id, got shape \(0,\)"),
    "prompts[1] V": (generate([[1], [V]]), IndexError, "expected token ids in 0..16, got 17"),
    "prompts[0] float": (generate([[1.5]]), TypeError, "expected integer ids, got dtype float64"),
    "prompts too many": (generate([[1]] * 11), ValueError, r"at most streams \* max_tokens = 10, got 11"),
    "prompts for carry": (generate(carry=True), ValueError, "expected 2, one per stream .*, got 1"),
    "max_new_tokens 0": (generate(count=0), ValueError, "expected an integer in 1..2147483647, got 0"),
    "max_new_tokens float": (generate(count=2.5), TypeError, "expected an integer in 1..2147483647, got 2.5"),
    "stop_ids V": (generate(stop_ids=[0, V]), IndexError, "expected token ids in 0..16, got 17"),
    "stop_ids float": (generate(stop_ids=[1.5]), TypeError, r"expected a sequence of integers, got \[1.5\]"),
    "stop_ids int": (generate(stop_ids=3), TypeError, "expected a sequence of integers, got 3"),
    "ids of evaluate": (lambda m: m.evaluate(IDS.tolist(), IDS), TypeError, HOST + "got list"),
    "ids V in evaluate": (lambda m: m.evaluate(WIDE * V, WIDE), IndexError, r"\[0, 0\]: .*in 0..16, got 17"),
    "targets of evaluate": (lambda m: m.evaluate(IDS, WIDE), ValueError, r"expected shape \(2, 3\), got \(2, 6\)"),
    "resets of evaluate": (lambda m: m.evaluate(IDS, IDS, IDS), TypeError, "expected dtype bool or uint8, got int32"),
    "ids empty in evaluate": (lambda m: m.evaluate(IDS[:, :0], IDS), ValueError, r"at least one token, got \(2, 0\)"),
    "state None": (lambda m: m.load_state(None), TypeError, "expected a mapping of key to array, got NoneType"),
    "state unknown": (load(more=X), ValueError, r"expected no other keys than the model's, got \['more'\]"),
    "region.low.v missing": (lambda m: m.load_state({}), ValueError, "expected a value, got none"),
    "broca.o float64": (load(broca_o=np.zeros((B, D))), TypeError, "expected dtype float32, got float64"),
    "broca.o shape": (load(broca_o=X[:1]), ValueError, r"expected shape \(2, 32\), got \(1, 32\)"),
    "broca.o NaN": (load(broca_o=X * np.nan), ValueError, "expected finite values, got NaN or infinity"),
    "parameters None": (lambda m: m.load_parameters(None), TypeError, "a mapping of key to array, got NoneType"),
    "parameters x": (lambda m: m.load_parameters({"x": X}), ValueError, "expected keys of this model, got 'x'"),
    "decoder.bias NaN": (lambda m: m.load_parameters({"decoder.bias": OUT[0] * np.nan}), ValueError, "finite.*got NaN"),
    "decoder.bias shape": (lambda m: m.load_parameters({"decoder.bias": OUT}), ValueError, r"\(17,\), got \(2, 17\)"),
    "region": (lambda m: m.recorded("middle"), ValueError, "expected one of low, high, got 'middle'"),
    "recorded": (lambda m: m.recorded("low"), RuntimeError, "expected the last call .* record=True, got none"),
}
MODELS = {
    "config": (lambda: ng.NeuroGen(None), TypeError, "expected a neurogen_cy.Config, got NoneType"),
    "backend": (lambda: ng.NeuroGen(CONFIG, "tpu"), ValueError, "expected 'auto', 'cpu' or 'cuda', got 'tpu'"),
    "device": (lambda: ng.NeuroGen(CONFIG, "cpu", device=1), ValueError, "expected 0, got 1"),
    "streams": (lambda: ng.NeuroGen(CONFIG, streams=0), ValueError, r"integer in 1\.\.2147483647, got 0"),
    "max_tokens": (lambda: ng.NeuroGen(CONFIG, max_tokens=2.5), TypeError, "expected an integer .*, got 2.5"),
    "streams * max_tokens": (lambda: ng.NeuroGen(CONFIG, streams=2**30), ValueError, "expected at most 2147483647"),
    "seed": (lambda: ng.NeuroGen(CONFIG, seed=-1), ValueError, "expected an integer .*, got -1"),
    "precision": (lambda: ng.NeuroGen(CONFIG, precision="fp8"), ValueError, "expected .*'fp32' .*, got 'fp8'"),
    "precision bf16": (lambda: ng.NeuroGen(CONFIG, "cpu", precision="bf16"), ValueError, "'fp32' on the cpu .*'bf16'"),
    "device float": (lambda: ng.NeuroGen(CONFIG, device=0.5), TypeError, r"expected an integer in 0\.\..*, got 0\.5"),
    "device -1": (lambda: ng.NeuroGen(CONFIG, "cpu", device=-1), ValueError, "expected an integer .*, got -1"),
    "threads": (lambda: ng.NeuroGen(CONFIG, threads=10**6), ValueError, "integer in 1..1024, got 1000000"),
    "optimizer": (lambda: ng.NeuroGen(CONFIG, optimizer="adam"), TypeError, "expected a neurogen_cy.AdamW, got str"),
    "sync": (lambda: ng.NeuroGen(CONFIG, sync="poll"), ValueError, "expected 'block' or 'spin', got 'poll'"),
    "nonfinite": (lambda: ng.NeuroGen(CONFIG, nonfinite="no"), ValueError, "expected 'raise' or 'skip', got 'no'"),
    "streams of memory_plan": (lambda: ng.memory_plan(CONFIG, "2"), TypeError, "expected an integer .*, got '2'"),
    "lr of AdamW": (lambda: ng.AdamW(lr="1"), TypeError, "expected a number, got '1'"),
    "eps of AdamW": (lambda: ng.AdamW(eps=0), ValueError, "expected a number > 0, at least 1.18e-38, got 0"),
    "eps of AdamW, 0 in float32": (lambda: ng.AdamW(eps=1e-320), ValueError, "at least 1.18e-38, got 9.99989e-321"),
    "clip beyond any float": (lambda: ng.AdamW(clip=10**400), ValueError, "expected a finite number >= 0, got 1000"),
    "betas of AdamW": (lambda: ng.AdamW(betas=(0.9, 1.0)), ValueError, r"betas\[1\]: expected a number in \[0, 1\)"),
    "clip of AdamW": (lambda: ng.AdamW(clip=np.nan), ValueError, "expected a finite number >= 0, got nan"),
}


def snapshot(m):
    """Everything a bad call must not touch."""
    views = {**m.parameters(), **{f"gradient of {key}": view for key, view in m.gradients().items()}}
    for key, moments in m._engine.moments().items():
        views.update({f"moment {i} of {key}": view for i, view in enumerate(moments)})
    arrays = {**{key: view.numpy() for key, view in views.items()}, **m.state()}
    return {**{key: a.tobytes() for key, a in arrays.items()}, "counts": (m.step, m.calls, m.skipped)}


def trained(backend):
    """A model with moments, gradients and a state to lose."""
    m = ng.NeuroGen(CONFIG, backend=backend, streams=B, max_tokens=5, seed=3, threads=1, precision="fp32")
    m.train_step_batch(IDS, IDS + 1)
    m.backward_batch(IDS + 2, IDS)
    return m


def go_on(m):
    return m.train_step_batch(IDS, IDS[::-1].copy(), resets=IDS == 2)


@functools.cache
def undisturbed(backend):
    """Before, result and after of a good call to a model that never saw a bad one."""
    m = trained(backend)
    return snapshot(m), go_on(m), snapshot(m)


def refuse(name, call, error, message):
    with pytest.raises(error) as caught:
        call()
    text = str(caught.value)
    argument = name if "*" in name else name.split()[0]
    assert caught.type is error and text.startswith(argument) and "expected" in text
    caught.match(message)


@pytest.mark.parametrize("name", CALLS)
def test_a_bad_call_leaves_no_trace(backend, name):
    check_refusal(backend, name, *CALLS[name])


def check_refusal(backend, name, call, error, message):
    """A call is refused as it should be, and the model goes on as one that never saw it."""
    before, result, after = undisturbed(backend)
    m, given = trained(backend), IDS.copy()
    refuse(name, lambda: call(m), error, message)
    assert np.array_equal(IDS, given) and np.array_equal(SHARED, given)
    assert snapshot(m) == before
    assert go_on(m) == result
    assert snapshot(m) == after


@pytest.mark.parametrize("name", MODELS)
def test_a_bad_setting_is_refused(name):
    refuse(name, *MODELS[name])


def test_a_decay_that_would_make_weights_grow_is_refused(backend):
    m = ng.NeuroGen(CONFIG, backend=backend, streams=B, max_tokens=T, optimizer=ng.AdamW(weight_decay=1e30))
    before = snapshot(m)
    with pytest.raises(ValueError, match=r"lr \* weight_decay: expected at most 2, .* got 0.002 \* 1e\+30"):
        m.train_step_batch(IDS, IDS)
    assert snapshot(m) == before


def test_a_plan_beyond_64_bits_is_refused(backend):
    """2**31 neurons x 2**31 rows x 4 bytes is 0 in 64 bits: such a model must not seem to fit."""
    n = 2**31 - 32
    cfg = ng.Config(256, 64, (ng.Region("a", n, 0),), (ng.Projection("embedding", "a", density=1e-9),
                                                       ng.Projection("a", "broca_out", density=1e-9)))
    for make in (ng.NeuroGen, functools.partial(ng.memory_plan, streams=2**20, max_tokens=2047)):
        with pytest.raises(MemoryError, match=r"this model needs more than [\d,]+ TiB|MiB are free"):
            make(cfg, backend=backend)


def test_an_absent_backend_says_why():
    reasons = [reason for reason in backends.available().values() if reason]
    if not reasons:
        pytest.skip("every backend is here")
    with pytest.raises(RuntimeError, match=f"no usable backend; .*: {re.escape(reasons[0])}"):
        ng.NeuroGen(CONFIG, backend=next(name for name, reason in backends.available().items() if reason))


def test_a_model_larger_than_the_memory_shows_its_plan(backend):
    plan = r"this model needs [\d,.]+ MiB at streams=1024, max_tokens=1048576.* MiB are free:\n  parameters"
    with pytest.raises(MemoryError, match=plan):
        ng.NeuroGen(ng.Config.preset("small"), backend=backend, streams=2**10, max_tokens=2**20)


def test_refused_calls_write_no_output(backend):
    m = trained(backend)
    out, ids_out = filled((B, T, D), 7), filled((B, T), 7, np.int32)
    for call in (
        lambda: m.embedding.encode_into(np.where(IDS == 6, V, IDS).astype(np.int32), out),
        lambda: m.decoder.logits_into(X, out.reshape(-1)[: B * V].reshape(V, B)),
        lambda: m.decoder.sample_into(X, ids_out[0, :B], top_p=2.0),
        lambda: m.train_step_batch(IDS, IDS + V, predictions_out=ids_out),
        lambda: m.train_step_batch(IDS, IDS, lr=-1.0, predictions_out=ids_out),
    ):
        with pytest.raises((ValueError, IndexError)):
            call()
    assert (out == 7).all() and (ids_out == 7).all()


def test_parts_of_a_model_are_not_made_by_hand(backend):
    """A half-built object would read memory that is not there."""
    part = trained(backend)._engine.own_state()
    for kind in (type(part), type(trained(backend).parameters()["broca.kappa"])):
        with pytest.raises(TypeError, match="expected to be taken from"):
            kind()
    for kind in (ng.TokenEmbedding, ng.Brain, ng.Decoder):
        with pytest.raises(TypeError, match="Engine"):
            kind(None)
        with pytest.raises(TypeError):
            kind.__new__(kind)
