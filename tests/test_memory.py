"""Too little memory: models are refused before they take any, and a call that gets none leaves its model as it was."""

import subprocess
import sys
from pathlib import Path

import pytest

import neurogen_cy as ng
from neurogen_cy import memory

HERE = Path(__file__).parent
PLAN = r"this model needs [\d,.]+ MiB at streams=64, max_tokens=512, and [\d,.]+ MiB are free:\n  parameters"

OUT_OF_MEMORY = """
import resource, sys
sys.path.insert(0, sys.argv[1])
import numpy as np, psutil
from test_determinism import batch, build, contents

m = build("cpu", streams=4)
for call in range(3):
    m.train_step_batch(*batch(call, 4))
before = contents(m)
ids = np.zeros(10**6, np.int32)
limit = psutil.Process().memory_info().vms + (40 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
for attempt in range(10):
    for call in (lambda: m._engine.new_state(60_000), lambda: m.embedding.encode(ids)):  # native memory, and NumPy's
        try:
            call()
        except MemoryError:
            print("MemoryError")
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
assert contents(m) == before
m.train_step_batch(*batch(3, 4))
again = build("cpu", streams=4)
for call in range(4):
    again.train_step_batch(*batch(call, 4))
assert contents(m) == contents(again)
"""


def test_a_call_that_gets_no_memory_leaves_the_model_as_it_was():
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY, str(HERE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["MemoryError"] * 20


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Makes control groups: {folder: (files of the limit and of what is used, cached bytes)}."""
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "_PROCESS", tmp_path / "cgroup")

    def make(lines, **folders):
        (tmp_path / "cgroup").write_text(lines)
        for folder, (files, stat) in folders.items():
            place = tmp_path / folder.replace("__", "/")
            place.mkdir(parents=True, exist_ok=True)
            for name, value in {**files, "memory.stat": stat}.items():
                (place / name).write_text(f"{value}\n")

    return make


def test_the_limits_of_control_groups_count(groups):
    groups(
        "0::/a/b\n",
        a=({"memory.max": 900 << 20, "memory.current": 500 << 20}, f"anon 5\ninactive_file {100 << 20}"),
        a__b=({"memory.max": "max", "memory.current": 1}, "inactive_file 0"),
    )
    assert memory.available() == 500 << 20
    groups("0::/a/b\n", a__b=({"memory.max": 30 << 20, "memory.current": 10 << 20}, "inactive_file 0"))
    assert memory.available() == 20 << 20
    groups("0::/elsewhere\n")  # as inside a container that sees its host's path
    assert memory.available() > 0


def test_the_limits_of_the_older_control_groups_count(groups):
    files = {"memory.limit_in_bytes": 64 << 20, "memory.usage_in_bytes": 32 << 20}
    groups("9:name=systemd:/\n4:cpu,memory:/a\n", memory__a=(files, f"total_inactive_file {8 << 20}"))
    assert memory.available() == 40 << 20


def test_a_model_beyond_the_limit_of_its_container_shows_its_plan(groups):
    groups("0::/\n", **{"": ({"memory.max": 50 << 20, "memory.current": 0}, "inactive_file 0")})
    with pytest.raises(MemoryError, match=PLAN):
        ng.NeuroGen(ng.Config.preset("tiny"), backend="cpu", streams=64, max_tokens=512)
