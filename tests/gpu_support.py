"""What the tests of the GPU alone share; conftest.py skips or fails them where there is none."""

import importlib
import warnings

import pytest

from neurogen_cy import backend as backends


def other_library(name):
    """A library that brings device arrays of its own; skips where it is absent or sees no GPU."""
    with warnings.catch_warnings():  # warnings are errors here, but not those of others while they are imported
        warnings.simplefilter("ignore")
        try:
            module = importlib.import_module(name)
            probe = module if name.endswith(".cuda") else getattr(module, "cuda", None)
            usable = probe.is_available() if hasattr(probe, "is_available") else True  # PyCUDA fails at import
        except ImportError as error:
            pytest.skip(f"{name}: {error}")
    if not usable:
        pytest.skip(f"{name} sees no GPU")
    return module


def free_bytes():
    """Free memory of device 0, as the driver says."""
    return backends.load("cuda")[1].free_bytes(0)
