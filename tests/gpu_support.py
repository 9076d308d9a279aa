"""What the tests of the GPU alone share; conftest.py skips or fails them where there is none."""

import importlib
import warnings

import pytest

from neurogen_cy import backend as backends


def other_library(name):
    """torch or cupy, which bring device arrays of their own; skips where it is absent or sees no GPU."""
    with warnings.catch_warnings():  # warnings are errors here, but not those of others while they are imported
        warnings.simplefilter("ignore")
        try:
            module = importlib.import_module(name)
            usable = module.cuda.is_available()
        except ImportError as error:
            pytest.skip(f"{name}: {error}")
    if not usable:
        pytest.skip(f"{name} sees no GPU")
    return module


def free_bytes():
    """Free memory of device 0, as the driver says."""
    return backends.load("cuda")[1].free_bytes(0)
