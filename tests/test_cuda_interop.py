"""Device arrays of torch, CuPy, Numba and PyCUDA in every call that takes them: same bits, no host wait, no copy."""

import gc
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from device_libraries import NAMES, Busy, DLPackOnly, library
from gpu_support import other_library
from test_determinism import CONFIG, D, V, batch, build, contents

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]  # what the libraries warn of is not ours
B = 3
PAGE = Path(__file__).parents[1] / "docs/INTEROP.md"
each_library = pytest.mark.parametrize("name", NAMES)


def word(m, x, broca, logits, ids, rows, **options):
    """One token through the model, every array the caller's."""
    m.brain.step(x, **options)
    m.brain.broca_output_into(broca, **options)
    m.decoder.logits_into(broca, logits, **options)
    m.decoder.sample_into(broca, ids, 0.7, 5, 0.9, seed=3, **options)
    m.embedding.encode_into(ids, rows, **options)


def arrays(seed=0):
    """What `word` takes, on the host."""
    x = np.random.default_rng(seed).normal(size=(B, D)).astype(np.float32)
    return [x, np.zeros((B, D), np.float32), np.zeros((B, V), np.float32), np.zeros(B, np.int32),
            np.zeros((B, D), np.float32)]  # fmt: skip


def waits(m, call):
    before = m.counters
    call()
    return m.counters["syncs"] - before["syncs"]


def same(one, other):
    return all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in zip(one, other, strict=True))


@each_library
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_method_gives_the_bits_of_the_host_call(name, precision):
    lib, here, there = library(name), build("cuda", precision=precision), build("cuda", precision=precision)
    for token in range(4):
        host = arrays(token)
        device = [lib.put(a) for a in host]
        word(here, *host)
        assert waits(there, lambda: word(there, *device)) == 0  # noqa: B023
        assert same([lib.get(a) for a in device], host) and host[1].any() and host[4].any()
    assert contents(here) == contents(there)
    ids = batch(5, B)[0].astype(np.int64)
    out, expected = lib.put(np.zeros((*ids.shape, D), np.float32)), here.embedding.encode(ids)
    there.embedding.encode_into(lib.put(ids), out)
    assert same([lib.get(out), there.embedding.encode(lib.put(ids))], [expected, expected])


@each_library
def test_host_and_device_arrays_mix(name):
    """With an array of the host among them a call is finished when it returns."""
    lib, here, there = library(name), build("cuda"), build("cuda")
    host, mixed, on_device = arrays(), arrays(), (1, 3)
    for i in on_device:
        mixed[i] = lib.put(mixed[i])
    word(here, *host)
    assert waits(there, lambda: word(there, *mixed)) >= 3
    assert same([lib.get(a) if i in on_device else a for i, a in enumerate(mixed)], host)
    ids, rows = batch(0, B)[0], np.zeros((B, 6, D), np.float32)
    out = lib.put(rows)
    there.embedding.encode_into(ids, out)
    there.embedding.encode_into(lib.put(ids), rows)
    assert same([lib.get(out), rows], [here.embedding.encode(ids)] * 2)


@each_library
@pytest.mark.parametrize("stream", [None, 0, 1])
def test_training_on_nothing_but_device_arrays(name, stream):
    lib, here, there = library(name), build("cuda"), build("cuda")
    for call in range(3):
        ids, targets, weights, resets = batch(call, B)
        said, host = lib.put(np.full_like(ids, -1)), np.full_like(ids, -1)
        device = [lib.put(a) for a in (ids, targets, weights, resets.view(np.uint8))]
        for method in ("backward_batch", "train_step_batch"):
            expected = getattr(here, method)(ids, targets, weights, resets, predictions_out=host)
            step = lambda: getattr(there, method)(*device, predictions_out=said, stream=stream)  # noqa: B023
            result = step()
            assert result.loss == expected.loss and result.predictions is said
            assert same([lib.get(said)], [host]) and (host >= 0).all()
    assert contents(here) == contents(there)
    assert waits(there, step) == 1


def test_who_takes_a_view_finds_the_update_done_that_was_under_way():
    """A training call returns before its update; not so once a view was shown. One wait either way, and the same bits.

    By CuPy, which takes read-only views.
    """
    lib, seen, alone = library("cupy"), build("cuda"), build("cuda")
    for call in range(5):
        assert waits(seen, lambda: seen.train_step_batch(*batch(call, B))) == 1  # noqa: B023
        alone.train_step_batch(*batch(call, B))
        if call < 2:  # several updates in a row that nobody has looked at
            continue
        for key, view in seen.parameters().items():
            expected = alone.parameters()[key].numpy()
            assert same([lib.get(lib.cupy.asarray(view))], [expected]), (call, key)
    assert contents(seen) == contents(alone)


@each_library
def test_views_are_the_models_memory(name):
    lib, m = library(name), build("cuda", CONFIG)
    m.backward_batch(*batch(0, B)[:2])
    for key, view in m.gradients().items():
        for array in lib.views(view):
            assert lib.address(array) == view.__cuda_array_interface__["data"][0]
            assert same([np.ascontiguousarray(lib.get(array)).reshape(view.shape)], [view.numpy()]), key
    if name != "pycuda":  # which makes no array of another's view by itself
        row = m.embedding.row_view(V - 1)
        assert row.readonly and row.__cuda_array_interface__["data"][1]


@each_library
def test_what_is_written_into_a_gradient_is_what_is_learnt(name):
    lib, m = library(name), build("cuda")
    m.backward_batch(*batch(0, B)[:2])
    for which in range(len(lib.views(m.gradients()["decoder.bias"]))):
        before = {key: view.numpy() for key, view in m.parameters().items()}
        for key, view in m.gradients().items():
            values = np.zeros(view.shape, np.float32)
            if key == "embedding.weight":
                values[11, 7] = -0.25
            lib.write(lib.views(view)[which], values)
        assert m.optimizer_step() == 0.25  # no synchronisation since the writing
        if which == 0:  # later Adam's moments move the others too
            changed = [key for key, view in m.parameters().items() if not np.array_equal(view.numpy(), before[key])]
            assert changed == ["embedding.weight"]


@pytest.mark.parametrize("name", ["torch", "cupy"])
def test_dlpack_alone_is_enough(name):
    lib, here, there = library(name), build("cuda"), build("cuda")
    host = arrays()
    device = [lib.put(a) for a in host]
    word(here, *host)
    assert waits(there, lambda: word(there, *(DLPackOnly(a) for a in device))) == 0
    assert same([lib.get(a) for a in device], host)
    ids, targets, weights, resets = batch(1, B)
    expected = here.train_step_batch(ids, targets, weights, resets)
    wrapped = [DLPackOnly(lib.put(a)) for a in (ids, targets, weights, resets.view(np.uint8))]
    assert there.train_step_batch(*wrapped) == expected and contents(here) == contents(there)
    wrapped = DLPackOnly(there.parameters()["embedding.weight"])
    with pytest.raises(ValueError, match="out: expected a writable array, got a read-only one"):
        there.decoder.logits_into(np.zeros((V, D), np.float32), wrapped)
    capsule = there.gradients()["decoder.bias"].__dlpack__(max_version=(1, 0), stream=-1)
    assert "dltensor_versioned" in repr(capsule)


@each_library
def test_streams_order_what_nobody_waits_for(name):
    """x arrives late on the caller's stream, and what comes out is copied there: right, and no host waited."""
    lib, here, there = library(name), build("cuda"), build("cuda")
    host = arrays()
    word(there, *(lib.put(a) for a in arrays(1)))  # loads kernels
    word(here, *arrays(1)), word(here, *host)
    device, source = [lib.put(np.zeros_like(a)) for a in host], lib.put(host[0])
    results = [lib.put(np.zeros_like(a)) for a in host]
    stream = lib.stream()
    for to, start in zip(results, device):
        lib.copy(to, start, stream)
    other_library("torch").cuda.synchronize()
    there.brain.broca_output()  # lets go of earlier arrays: Numba and PyCUDA free them there and then, which waits
    busy = Busy(stream)
    lib.copy(device[0], source, stream)
    assert waits(there, lambda: word(there, *device, stream=stream)) == 0
    assert not busy.done, "the calls must return while the stream they wait for is still at work"
    for to, start in zip(results, device):
        lib.copy(to, start, stream)
    busy.synchronize()
    assert same([lib.get(a) for a in results], host)


@each_library
def test_training_waits_for_the_callers_stream(name):
    lib, here, there = library(name), build("cuda"), build("cuda")
    ids, targets = batch(0, B)[:2]
    late, source, stream = lib.put(np.zeros_like(ids)), lib.put(ids), lib.stream()
    lib.copy(late, source, stream)
    lib.write(late, np.zeros_like(ids))
    other_library("torch").cuda.synchronize()
    busy = Busy(stream)
    lib.copy(late, source, stream)
    assert not busy.done
    assert there.train_step_batch(late, targets, stream=stream) == here.train_step_batch(ids, targets)
    assert busy.done


@each_library
def test_arrays_dropped_at_once_live_until_the_work_is_done(name):
    lib, here, there = library(name), build("cuda"), build("cuda")
    host = arrays()
    word(here, *host)
    x, stream = [lib.put(host[0])], lib.stream()
    other_library("torch").cuda.synchronize()
    owned = sys.getrefcount(x[0])
    busy = Busy(stream)
    there.brain.step(x[0], stream=stream)
    assert not busy.done and sys.getrefcount(x[0]) > owned
    del x[0]
    gc.collect()
    rubbish = [lib.put(np.full((B, D), np.nan, np.float32)) for _ in range(64)]  # takes freed memory first
    assert np.array_equal(there.brain.broca_output(), host[1])
    kept = lib.put(host[0])
    owned = sys.getrefcount(kept)
    there.brain.step(kept)
    other_library("torch").cuda.synchronize()
    there.brain.broca_output()
    assert sys.getrefcount(kept) == owned, "given back by the next call"
    del rubbish


def blocks():
    return dict(re.findall(r"^## (\w+)\n(?:(?!^## ).)*?```python\n(.*?)```", PAGE.read_text(), flags=re.S | re.M))


@pytest.mark.parametrize("name", ["NumPy", "torch", "CuPy", "Numba", "PyCUDA"])
def test_the_page_on_interop_does_what_it_says(name):
    if name.lower() in NAMES:
        library(name.lower())
    exec(compile(blocks()[name], f"INTEROP.md, {name}", "exec"), {})
