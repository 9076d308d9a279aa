"""The sanitizer lane of .ci/run: it runs the library that it built, and would see an access beyond an array."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from neurogen_cy import _cpu

SANITIZERS = os.environ.get("NEUROGEN_SANITIZE", "").split(",")
pytestmark = pytest.mark.skipif("address" not in SANITIZERS, reason="for the sanitizer lane of .ci/run")

# Parameters lie in one allocation: what is read here is the model's memory, but no array's.
BEYOND = """
import ctypes, numpy as np, neurogen_cy as ng
cfg = ng.Config.preset("tiny", vocab_size=5)
model = ng.NeuroGen(cfg, backend="cpu", streams=1, max_tokens=2, threads=1)
bias = np.asarray(model.parameters()["decoder.bias"])  # no copy
to = ctypes.create_string_buffer(64)
ctypes.memmove(to, bias.ctypes.data, bias.nbytes)
print("inside", flush=True)
ctypes.memmove(to, bias.ctypes.data, bias.nbytes + 4)
print("beyond", flush=True)
"""


def test_the_library_is_the_one_with_sanitizers():
    with open(_cpu.__file__, "rb") as file:
        data = file.read()
    assert b"__asan_init" in data and b"__ubsan_handle" in data, _cpu.__file__


def test_reading_one_value_too_many_ends_the_process():
    here = Path(__file__).parent  # not where the package's own folder would be found first
    done = subprocess.run([sys.executable, "-c", BEYOND], capture_output=True, text=True, cwd=here)
    assert done.stdout == "inside\n" and done.returncode != 0
    assert "AddressSanitizer: use-after-poison" in done.stderr
