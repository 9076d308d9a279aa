"""Memory is shared, not copied: the caller's outputs in any kind of buffer, and views of what a model holds."""

import array
import ctypes
import gc
import io
import math

import numpy as np
import pytest

import neurogen_cy as ng

V, D, T = 19, 32, 5
CONFIG = ng.Config(
    vocab_size=V,
    dim=D,
    regions=(ng.Region("low", 64, 0), ng.Region("high", 96, 1)),
    projections=(
        ng.Projection("embedding", "low"),
        ng.Projection("embedding", "high", kind="gate"),
        ng.Projection("low", "high", density=0.5),
        ng.Projection("high", "low", delay=2),
        ng.Projection("high", "broca_out"),
        ng.Projection("embedding", "broca_out"),
    ),
    rate_weight=0.0,
)
IDS, TARGETS = np.array([3, 1, 3, 0, 7], np.int32), np.array([1, 3, 0, 7, 2], np.int32)


class OldPack:
    """A DLPack exporter from before version 1.0: the capsule does not say that it may be written."""

    def __init__(self, memory):
        self.memory = memory

    def __dlpack__(self, stream=None):
        return self.memory.__dlpack__()

    def __dlpack_device__(self):
        return self.memory.__dlpack_device__()

    def __array__(self, dtype=None, copy=None):
        return self.memory


def as_array(shape, dtype):
    memory = array.array("f" if dtype == np.float32 else "i", bytes(4 * math.prod(shape)))
    return memory if len(shape) == 1 else memoryview(memory).cast("B").cast(memory.typecode, shape)


def as_bytearray(shape, dtype):
    return memoryview(bytearray(4 * math.prod(shape))).cast("f" if dtype == np.float32 else "i", shape)


def as_ctypes(shape, dtype):
    kind = ctypes.c_float if dtype == np.float32 else ctypes.c_int32
    for extent in reversed(shape):
        kind = kind * extent
    return kind()


def as_torch(shape, dtype):
    torch = pytest.importorskip("torch")
    return torch.zeros(shape, dtype=torch.float32 if dtype == np.float32 else torch.int32)


KINDS = {
    "numpy": np.zeros,
    "memoryview": lambda shape, dtype: memoryview(np.zeros(shape, dtype)),
    "array.array": as_array,
    "bytearray": as_bytearray,
    "ctypes": as_ctypes,
    "torch": as_torch,
    "old DLPack": lambda shape, dtype: OldPack(np.zeros(shape, dtype)),
}


def build(backend, **settings):
    return ng.NeuroGen(CONFIG, backend=backend, max_tokens=T, seed=1, threads=1, precision="fp32", **settings)


@pytest.fixture
def model(backend):
    return build(backend)


@pytest.fixture
def host_model():
    """A model whose views are host memory."""
    return build("cpu")


def address(view):
    return np.asarray(view).ctypes.data


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_land_in_the_callers_memory(model, kind):
    make = lambda shape, dtype=np.float32: KINDS[kind](shape, dtype)
    rows = make((T, D))
    model.embedding.encode_into(IDS, rows)
    assert np.array_equal(np.asarray(rows), model.parameters()["embedding.weight"].numpy()[IDS])

    model.brain.step(model.embedding.encode(IDS[:1]))
    broca = make((D,))
    model.brain.broca_output_into(broca)
    said = model.brain.broca_output()
    assert np.array_equal(np.asarray(broca), said[0]) and said.any()

    logits = make((1, V))
    model.decoder.logits_into(said, logits)
    parameters = model.parameters()
    expected = said @ parameters["decoder.weight"].numpy().T + parameters["decoder.bias"].numpy()
    np.testing.assert_allclose(np.asarray(logits), expected, rtol=1e-5, atol=1e-6)

    ids = make((1,), np.int32)
    model.decoder.sample_into(said, ids, greedy=True)
    assert np.asarray(ids)[0] == np.argmax(np.asarray(logits))

    predictions = make((T,), np.int32)
    other = np.full(T, -1, np.int32)
    before = model.state()
    result = model.backward_batch(IDS, TARGETS, predictions_out=predictions)
    model.load_state(before)
    model.backward_batch(IDS, TARGETS, predictions_out=other)
    assert result.predictions is predictions
    assert np.array_equal(np.asarray(predictions), other) and (other >= 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_any_kind_are_read_alike(model, kind):
    def given(values):
        memory = KINDS[kind](values.shape, values.dtype)
        np.asarray(memory)[...] = values
        return memory

    weights = np.linspace(0, 1, T, dtype=np.float32)
    expected = model.backward_batch(IDS, TARGETS, weights, IDS == 0)
    model.brain.reset()
    resets = bytearray((IDS == 0).astype(np.uint8))
    assert model.backward_batch(given(IDS), given(TARGETS), given(weights), resets) == expected
    assert model.evaluate(given(IDS), given(TARGETS), resets) == model.evaluate(IDS, TARGETS, IDS == 0)
    model.brain.step(given(model.embedding.encode(IDS[:1])[0]))


def test_parameters_follow_training_in_one_place(host_model):
    held = {key: (np.asarray(view), view.numpy()) for key, view in host_model.parameters().items()}
    for _ in range(3):
        host_model.train_step_batch(IDS, TARGETS)
    gradients = host_model.gradients()
    for key, view in host_model.parameters().items():
        live, before = held[key]
        assert address(view) == live.ctypes.data
        assert (not np.array_equal(live, before)) == (key in gradients), key
        assert np.array_equal(live, view.numpy())
    for key, view in gradients.items():
        assert address(view) == address(host_model.gradients()[key])


def test_state_is_a_copy(model):
    before = model.state()
    kept = {key: a.copy() for key, a in before.items()}
    model.train_step_batch(IDS, TARGETS)
    assert all(np.array_equal(before[key], a) for key, a in kept.items())
    after = model.state()
    for key, a in after.items():
        assert a.flags.c_contiguous and (a.size == 0 or not np.array_equal(a, kept[key]))
        a += 1
    assert all(a.size == 0 or not np.array_equal(a, after[key]) for key, a in model.state().items())


def test_parameters_are_read_only_and_numpy_is_a_copy(host_model):
    for view in host_model.parameters().values():
        live = np.asarray(view)
        assert view.readonly and memoryview(view).readonly and not live.flags.writeable
        with pytest.raises(ValueError, match="WRITEABLE"):
            live.setflags(write=True)
        with pytest.raises(TypeError, match="read-write"):
            io.BytesIO(bytes(4)).readinto(view)
        copy = view.numpy()
        copy.ravel()[0] += 1
        assert not np.shares_memory(copy, live) and copy.ravel()[0] != live.ravel()[0]


@pytest.mark.parametrize("tied", [False, True])
def test_written_gradients_train_ranks_alike(tied):
    """Two ranks that average their gradients take the very same step, also in rows only the other one read."""
    cfg = ng.Config(**{**{f: getattr(CONFIG, f) for f in CONFIG.__dataclass_fields__}, "tie_decoder": tied})
    ids = np.array([[1, 2, 1, 3], [4, 5, 4, 3]], np.int32)
    settings = {"backend": "cpu", "max_tokens": 4, "seed": 2, "threads": 1}
    ranks = [ng.NeuroGen(cfg, **settings) for _ in ids]
    whole = ng.NeuroGen(cfg, streams=2, **settings)
    for step in range(3):
        targets = (ids + step) % V
        for rank, heard, wanted in zip(ranks, ids, targets):
            rank.backward_batch(heard, wanted)
        views = [{key: np.asarray(view) for key, view in rank.gradients().items()} for rank in ranks]
        if not tied and step == 0:
            assert not views[0]["embedding.weight"][4:6].any() and views[1]["embedding.weight"][4:6].any()
        for key in views[0]:
            views[0][key] += views[1][key]
            views[0][key] *= 0.5
            views[1][key][...] = views[0][key]
        norms = [rank.optimizer_step() for rank in ranks]
        assert norms[0] == norms[1] == pytest.approx(whole.train_step_batch(ids, targets).grad_norm, rel=1e-5)
    for key, view in ranks[0].parameters().items():
        assert np.array_equal(view.numpy(), ranks[1].parameters()[key].numpy()), key
        apart = np.abs(view.numpy() - whole.parameters()[key].numpy()).max()
        assert apart <= 0.02 * whole.optimizer.lr, key


def test_a_written_gradient_is_the_one_that_is_used(host_model):
    lr = host_model.optimizer.lr
    before = {key: view.numpy() for key, view in host_model.parameters().items()}
    for view in host_model.gradients().values():
        np.asarray(view)[...] = 0
    np.asarray(host_model.gradients()["embedding.weight"])[11, 7] = -0.25
    assert host_model.optimizer_step() == 0.25
    for key, view in host_model.parameters().items():
        changed = np.argwhere(view.numpy() != before[key])
        assert changed.tolist() == ([[11, 7]] if key == "embedding.weight" else []), key
    step = host_model.parameters()["embedding.weight"].numpy()[11, 7] - before["embedding.weight"][11, 7]
    assert step == pytest.approx(lr, rel=1e-3)  # Adam's first step has size lr
    assert np.asarray(host_model.gradients()["embedding.weight"])[11, 7] == -0.25  # not cleared
    np.asarray(host_model.gradients()["embedding.weight"])[12, 3] = 1.0
    host_model.backward_batch(IDS, TARGETS)
    rows = np.asarray(host_model.gradients()["embedding.weight"]).any(axis=1)
    assert np.array_equal(np.flatnonzero(rows), np.unique(IDS))  # overwritten, rows 11 and 12 too


def test_a_view_outlives_its_model():
    cfg = ng.Config.preset("tiny", vocab_size=4096)  # arrays large enough to leave the process when freed
    model = ng.NeuroGen(cfg, backend="cpu", max_tokens=T, threads=1)
    copies = {key: view.numpy() for key, view in model.parameters().items()}
    views = {key: np.asarray(view) for key, view in model.parameters().items()}
    row, gradient = model.embedding.row_view(5), np.asarray(model.gradients()["embedding.weight"])
    organs = model.embedding, model.brain, model.decoder
    del model
    gc.collect()
    assert np.array_equal(organs[0].encode(IDS), copies["embedding.weight"][IDS])
    organs[1].step(organs[0].encode(IDS[:1]))
    del organs
    gc.collect()
    gradient[...] = 1
    for key, view in views.items():
        assert np.array_equal(view, copies[key]), key
    assert np.array_equal(row, copies["embedding.weight"][5])


@pytest.mark.parametrize("tied", [False, True])
def test_every_key_is_there(backend, tied):
    cfg = ng.Config(**{**{f: getattr(CONFIG, f) for f in CONFIG.__dataclass_fields__}, "tie_decoder": tied})
    model = ng.NeuroGen(cfg, backend=backend, threads=1)
    blocks = {
        "proj.embedding.low.drive.0": [(i, 0) for i in range(2)],
        "proj.embedding.high.gate.0": [(i, 0) for i in range(3)],
        "proj.low.high.drive.0": 3,  # one of two block columns in each of three rows
        "proj.high.low.drive.2": [(i, j) for i in range(2) for j in range(3)],
        "proj.high.broca_out.drive.0": [(0, j) for j in range(3)],
        "proj.embedding.broca_out.drive.0": [(0, 0)],
    }
    trainable = {"embedding.weight": (V, D), "decoder.bias": (V,), "region.low.bias": (64,), "region.high.bias": (96,)}
    trainable |= {} if tied else {"decoder.weight": (V, D)}
    trainable |= {f"{key}.blocks": (at if isinstance(at, int) else len(at), 32, 32) for key, at in blocks.items()}
    shapes = {**trainable, "broca.kappa": (D,)}
    constants = ("alpha", "rho", "a", "b")
    shapes |= {f"region.{name}.{x}": (n,) for name, n in (("low", 64), ("high", 96)) for x in constants}
    shapes |= {f"{key}.{axis}": trainable[f"{key}.blocks"][:1] for key in blocks for axis in ("rows", "cols")}
    parameters, gradients = model.parameters(), model.gradients()
    assert {key: view.shape for key, view in parameters.items()} == shapes
    assert {key: view.shape for key, view in gradients.items()} == trainable
    for key, view in [*parameters.items(), *gradients.items()]:
        expected = np.int32 if key.endswith((".rows", ".cols")) else np.float32
        assert view.key == key and view.dtype == view.numpy().dtype == expected and view.numpy().shape == view.shape
    for key, at in blocks.items():
        rows, cols = parameters[f"{key}.rows"].numpy().tolist(), parameters[f"{key}.cols"].numpy().tolist()
        if isinstance(at, int):
            assert rows == [0, 1, 2] and set(cols) == {0, 1}  # every source is heard
        else:
            assert list(zip(rows, cols)) == at


def test_row_view_follows_training(host_model):
    row = host_model.embedding.row_view(3)
    before = row.copy()
    host_model.train_step_batch(IDS, TARGETS)
    weight = host_model.parameters()["embedding.weight"]
    assert np.array_equal(row, weight.numpy()[3]) and not np.array_equal(row, before)
    assert np.shares_memory(row, np.asarray(weight)) and row.shape == (D,) and not row.flags.writeable
    assert np.array_equal(host_model.embedding.row_view(np.int64(V - 1)), weight.numpy()[-1])
    with pytest.raises(ValueError, match="read-only"):
        row[0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        row.setflags(write=True)
