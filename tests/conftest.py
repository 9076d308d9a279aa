"""Fixtures: every behavioural test runs on the CPU and on the GPU."""

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

import neurogen_cy as ng
from neurogen_cy import backend as backends

_caches = tempfile.TemporaryDirectory(prefix="neurogen-tests-")
os.environ["NEUROGEN_CACHE"] = _caches.name  # not the user's own

REQUIRE_GPU = os.environ.get("NEUROGEN_REQUIRE_GPU") == "1"


def pytest_report_header():
    """Says which backends these tests run on, and why one is skipped."""
    return [f"backend {name}: {reason or 'tested'}" for name, reason in backends.available().items()]


def pytest_generate_tests(metafunc):
    """A test that asks for `backend` runs once per backend; the GPU's runs are marked `gpu`."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Where the GPU cannot be used its tests skip and say why; NEUROGEN_REQUIRE_GPU=1 makes them fail instead."""
    reason = backends.available()["cuda"] if item.get_closest_marker("gpu") else None
    if reason is not None:
        (pytest.fail if REQUIRE_GPU else pytest.skip)(f"backend cuda: {reason}")


@pytest.fixture(autouse=True, scope="session")
def installed_package(tmp_path_factory):
    """Where the package under test is installed, processes that a test starts here must not find its bare sources."""
    if Path(ng.__file__).parents[1] == Path.cwd() or not Path("neurogen_cy").exists():
        yield
        return
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield
    os.chdir(before)


@pytest.fixture
def make_model(backend):
    """Builds a model, by default in fp32 and at one thread, with given parameters and state where they are passed."""

    def make(cfg, *, params=None, state=None, **settings):
        settings = {"precision": "fp32", "threads": 1, **settings}
        model = ng.NeuroGen(cfg, backend=backend, **settings, _parameters=_float32(params))
        if state is not None:
            model.load_state(_float32(state))
        return model

    return make


def _float32(arrays):
    """The oracle's float64 arrays as the model wants them; integer arrays as they are."""
    if arrays is None:
        return None
    return {key: a if a.dtype.kind == "i" else a.astype(np.float32) for key, a in arrays.items()}
