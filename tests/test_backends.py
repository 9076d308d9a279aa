"""Which backend a model gets, and what is said where one cannot be used. No GPU is needed."""

import importlib
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import neurogen_cy as ng
from neurogen_cy import _cpu, cublas, sizes
from neurogen_cy import backend as backends

TINY = ng.Config.preset("tiny")


@pytest.fixture
def cuda(monkeypatch):
    """Puts an extension that is unavailable for a given reason, or for none, in the place of the CUDA one."""

    def put(reason):
        module = SimpleNamespace(
            BACKEND="cuda", PRECISIONS=("bf16", "fp32", "fp8"), unavailable=lambda: reason, memory_plan=_cpu.memory_plan
        )
        monkeypatch.setitem(sys.modules, "neurogen_cy._cuda", module)

    return put


def test_an_extension_that_was_not_built_is_named(monkeypatch):
    def missing(name):
        if name == "neurogen_cy._cuda":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return importlib.import_module(name)

    monkeypatch.setattr(backends, "importlib", SimpleNamespace(import_module=missing))
    expected = "the extension neurogen_cy._cuda was not built into this installation"
    assert backends.available() == {"cuda": expected, "cpu": None}
    with pytest.raises(RuntimeError, match=f"no usable backend; cuda: {expected}"):
        ng.memory_plan(TINY, backend="cuda")


def test_auto_falls_to_the_cpu_and_cuda_says_why(cuda):
    cuda("no CUDA device can be used: there is none")
    assert backends.available() == {"cuda": "no CUDA device can be used: there is none", "cpu": None}
    assert backends.load("auto")[0] == "cpu" == ng.NeuroGen(TINY, threads=1).backend
    with pytest.raises(RuntimeError, match="no usable backend; cuda: no CUDA device can be used: there is none"):
        ng.NeuroGen(TINY, backend="cuda")
    cuda(None)
    assert backends.load("auto")[0] == backends.load("cuda")[0] == "cuda"


def test_a_memory_plan_needs_no_device(cuda):
    cuda("no CUDA device can be used")
    assert ng.memory_plan(TINY, backend="cuda", precision="bf16", threads=1) == ng.memory_plan(TINY, threads=1)
    with pytest.raises(ValueError, match="expected None or 'bf16' or 'fp32' or 'fp8' on the cuda backend, got 'fp16'"):
        ng.memory_plan(TINY, backend="cuda", precision="fp16")
    with pytest.raises(ValueError, match="expected None or 'fp32' on the cpu backend, got 'bf16'"):
        ng.memory_plan(TINY, backend="cpu", precision="bf16")


def test_the_built_extension_loads_without_a_driver():
    """The one of this installation, if it has one: it imports, plans memory, and says why it cannot run."""
    module = pytest.importorskip("neurogen_cy._cuda")
    reason = module.unavailable()
    assert reason is None or re.search("no CUDA device can be used|cuBLASLt", reason)
    for precision in module.PRECISIONS:
        plan = ng.memory_plan(TINY, 2, 16, "cuda", precision=precision)
        assert sum(plan.values()) > 4 * TINY.weights and all(size > 0 for size in plan.values())
    assert {"Engine", "Brain", "Decoder", "TokenEmbedding", "DeviceView"} <= vars(module).keys()


def test_precision_of_a_model():
    assert ng.NeuroGen(TINY, "cpu", threads=1).precision == "fp32"
    assert ng.NeuroGen(TINY, "cpu", threads=1, precision="fp32").precision == "fp32"
    cuda = SimpleNamespace(PRECISIONS=("bf16", "fp32", "fp8"))
    assert backends.precision(cuda, None) == "bf16" and backends.precision(cuda, "fp32") == "fp32"


@pytest.mark.parametrize("fitting", [0, 1, 77, 1023])
def test_what_does_not_fit_is_told_what_would(monkeypatch, fitting):
    need = {tokens: sum(ng.memory_plan(TINY, 4, tokens, "cpu", 1).values()) for tokens in (fitting or 1, fitting + 1)}
    free = need[fitting] if fitting else need[1] - 1
    monkeypatch.setattr(_cpu, "free_bytes", lambda device: free)
    with pytest.raises(MemoryError) as refused:
        ng.NeuroGen(TINY, "cpu", streams=4, max_tokens=1024, threads=1)
    message = str(refused.value)
    assert f"at streams=4, max_tokens=1024, and {free / 2**20:,.1f} MiB are free:\n  parameters" in message
    for part, size in ng.memory_plan(TINY, 4, 1024, "cpu", 1).items():
        assert re.search(rf"\n  {part} +{size / 2**20:,.1f} MiB", message), part
    advice = f"max_tokens={fitting} is the largest that fits" if fitting else "not even max_tokens=1 fits"
    assert message.endswith(f"\n{advice}")
    if fitting:
        sizes.check_memory(_cpu, TINY, 4, fitting, 1, 0, "fp32")


def test_execution_plan_of_the_cpu():
    plan = ng.NeuroGen(TINY, "cpu", streams=4, threads=2).execution_plan
    assert plan["kernels"] == _cpu.instruction_set() and plan["threads"] == "2" and "groups" in plan["schedule"]
    one = ng.NeuroGen(ng.Config.preset("small"), "cpu", streams=1, max_tokens=1, threads=2)
    assert "groups" in one.execution_plan["schedule"]


def test_cublas_is_looked_for_in_wheels_then_toolkits_then_by_name(tmp_path, monkeypatch):
    (tmp_path / "wheel_of_this_test/lib").mkdir(parents=True)
    wheel = tmp_path / "wheel_of_this_test/lib/libcublasLt.so.13"
    wheel.touch()
    homes = {}
    for name, variable in (("home", "CUDA_HOME"), ("path", "CUDA_PATH")):
        homes[name] = tmp_path / name / "lib64/libcublasLt.so.12"
        homes[name].parent.mkdir(parents=True)
        homes[name].touch()
        monkeypatch.setenv(variable, str(tmp_path / name))
    monkeypatch.setattr(cublas, "WHEELS", ("no_such_package.at_all", "wheel_of_this_test"))
    monkeypatch.syspath_prepend(tmp_path)
    paths = cublas.library_paths()
    assert paths[:3] == [str(wheel), str(homes["home"]), str(homes["path"])]
    assert paths[-2:] == ["libcublasLt.so.13", "libcublasLt.so.12"]


def test_views_of_the_cpu_are_host_memory():
    model = ng.NeuroGen(TINY, "cpu", threads=1)
    view = model.parameters()["broca.kappa"]
    assert not hasattr(view, "__cuda_array_interface__") and np.shares_memory(np.asarray(view), np.asarray(view))
    assert repr(view) == "HostView('broca.kappa', shape=(128,), dtype=float32, readonly=True)"
