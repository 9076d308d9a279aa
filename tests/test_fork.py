"""After a fork: on the CPU the child computes, with threads, the same bits; on CUDA it is refused. It never hangs."""

import hashlib
import multiprocessing
import os
import signal
import threading
import time
import warnings

import numpy as np
import pytest
from test_determinism import batch, build, contents

import neurogen_cy as ng
from neurogen_cy import backend as backends
from neurogen_cy.threads import blas_at_one_thread

SECONDS = 60  # for what takes one


def in_child(work):
    """What `work` returned in a forked child, as text; ends the child where it hangs."""
    here, there = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 says that threads and fork do not mix
        pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(SECONDS)
            try:
                said = work()
            except BaseException as error:
                said = f"{type(error).__name__}: {error}"
            os.write(there, str(said).encode())
        finally:
            os._exit(0)
    os.close(there)
    with os.fdopen(here, "rb") as pipe:
        said = pipe.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, f"the child ended with {status}"
    return said


def trained(model):
    """A digest of the model after one more step."""
    model.train_step_batch(*batch(1, model.streams))
    return hashlib.sha256(repr(contents(model)).encode()).hexdigest()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_child_goes_on_as_its_parent_would(threads):
    """GCC's OpenMP would wait for its parent's threads for ever (src_cuda/cpu/fork.cpp)."""
    model = build("cpu", streams=4, threads=threads)
    model.train_step_batch(*batch(0, 4))
    child = in_child(lambda: trained(model))
    assert child == trained(model)  # the parent, whose threads were given back for the fork
    fresh = lambda: trained(build("cpu", streams=4, threads=threads))
    assert in_child(fresh) == fresh()


def pool_job(number):
    model = MODELS["parent"]
    return float(model.evaluate(*(a[:2] for a in batch(number, 4)[:2])))


MODELS = {}


def test_a_pool_of_forked_processes():
    MODELS["parent"] = model = build("cpu", streams=4, threads=2)
    model.train_step_batch(*batch(0, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with multiprocessing.get_context("fork").Pool(2) as pool:
            values = pool.map_async(pool_job, range(6)).get(SECONDS)
    assert values == [pool_job(number) for number in range(6)]


def test_a_fork_in_the_middle_of_a_call_is_refused_not_waited_for():
    """The thread that was in the call is not in the child; what it left half done is not used."""
    model = build("cpu", streams=4, threads=1)
    stop = threading.Event()

    def work():
        while not stop.is_set():
            model.train_step_batch(*batch(0, 4))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        said = set()
        for _ in range(20):
            time.sleep(0.002)
            said.add(in_child(lambda: model.brain.reset() or "served").split(":")[0])
    finally:
        stop.set()
        thread.join()
    assert said <= {"RuntimeError", "served"}


def test_locks_of_blas_do_not_outlive_a_fork():
    with blas_at_one_thread:
        model = build("cpu", streams=4, threads=1)
        blas_at_one_thread._lock.acquire()  # as another thread might hold it
        try:
            said = in_child(lambda: [model.train_step_batch(*batch(0, 4)).tokens, blas_at_one_thread._users])
        finally:
            blas_at_one_thread._lock.release()
    tokens = model.train_step_batch(*batch(0, 4)).tokens
    assert said == f"[{tokens}, 0]"


@pytest.mark.gpu
def test_a_child_is_refused_on_cuda():
    model = build("cuda", streams=4)
    model.train_step_batch(*batch(0, 4))
    view = model.parameters()["decoder.bias"]
    for call in (lambda: model.train_step_batch(*batch(1, 4)), model.state, view.numpy, lambda: build("cuda")):
        said = in_child(call)
        assert said.startswith("RuntimeError") and "forked from" in said and "'spawn'" in said
    assert in_child(lambda: backends.load("auto")[0]) == "cpu"
    assert np.isfinite(model.train_step_batch(*batch(1, 4)).loss)


@pytest.mark.gpu
def test_a_child_may_drop_its_parents_model():
    MODELS["cuda"] = build("cuda", streams=4)
    assert in_child(lambda: MODELS.pop("cuda") and "dropped") == "dropped"
    model = MODELS.pop("cuda")
    assert np.isfinite(model.train_step_batch(*batch(1, 4)).loss)


def test_backends_know_that_they_were_forked(monkeypatch):
    monkeypatch.setattr(backends, "_started", {"cuda"})
    monkeypatch.setattr(backends, "_import", lambda name: (ng._cpu, None))
    assert backends.load("auto")[0] == "cuda"

    def asked():
        auto = backends.load("auto")[0]
        try:
            backends.load("cuda")
        except RuntimeError as error:
            return f"{auto}, {error}"

    said = in_child(asked)
    assert said.startswith("cpu, no usable backend; cuda: this process was forked from one that had started CUDA")
