"""Fixtures: every behavioural test runs on each backend of this installation."""

import os

import numpy as np
import pytest

import neurogen_cy as ng
from neurogen_cy import backend as backends

REQUIRE_GPU = os.environ.get("NEUROGEN_REQUIRE_GPU") == "1"


def pytest_report_header():
    """Says which backends these tests run on, and why one is left out."""
    return [f"backend {name}: {reason or 'tested'}" for name, reason in backends.available().items()]


def pytest_generate_tests(metafunc):
    """A test that asks for `backend` runs once per backend that can be used here; the GPU's runs are marked `gpu`.

    NEUROGEN_REQUIRE_GPU=1 adds the GPU even where it cannot be used, so that its tests fail instead of missing.
    """
    if "backend" in metafunc.fixturenames:
        usable = [name for name, reason in backends.available().items() if reason is None]
        names = ["cpu"] + ["cuda"] * (REQUIRE_GPU or "cuda" in usable)
        marks = {"cuda": [pytest.mark.gpu], "cpu": []}
        metafunc.parametrize("backend", [pytest.param(name, marks=marks[name]) for name in names], indirect=True)


@pytest.fixture
def backend(request):
    """Name of a backend, which can be used."""
    reason = backends.available()[request.param]
    if reason is not None:
        pytest.fail(f"backend {request.param}: {reason}")
    return request.param


@pytest.fixture
def make_model(backend):
    """Builds a model, by default at one thread, with given parameters and state where they are passed."""

    def make(cfg, *, params=None, state=None, **settings):
        model = ng.NeuroGen(cfg, backend=backend, **{"threads": 1, **settings}, _parameters=_float32(params))
        if state is not None:
            model.load_state(_float32(state))
        return model

    return make


def _float32(arrays):
    """The oracle's float64 arrays as the model wants them; integer arrays as they are."""
    if arrays is None:
        return None
    return {key: a if a.dtype.kind == "i" else a.astype(np.float32) for key, a in arrays.items()}
