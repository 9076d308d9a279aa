"""The CPU kernels of every instruction set that this machine runs, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from neurogen_cy import _cpu

SETS = ["baseline", "avx2", "avx512"]
HERE = Path(__file__).parent


def run(wanted, *command):
    environment = {**os.environ, "NEUROGEN_CPU_ISA": wanted}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("wanted", SETS[: SETS.index(_cpu.instruction_set())])
def test_gradients_with_a_lower_set(wanted):
    named = run(wanted, "-c", "from neurogen_cy import _cpu; print(_cpu.instruction_set())")
    assert named.stdout.strip() == wanted
    tests = [str(HERE / name) for name in ("test_parity.py", "test_optimizer.py")]
    done = run(wanted, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider", *tests)
    assert done.returncode == 0, done.stdout


def test_an_unknown_set_is_refused():
    build = "import neurogen_cy as ng; ng.NeuroGen(ng.Config.preset('tiny'), backend='cpu')"
    done = run("sse9", "-c", build)
    assert done.returncode == 1
    assert "ValueError: NEUROGEN_CPU_ISA: expected baseline, avx2 or avx512" in done.stderr
    assert "got sse9" in done.stderr
