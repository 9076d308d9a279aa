"""A disk that is full, or fails in any call of a save: the checkpoint that was there stays, and the error says what."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from neurogen_cy.checkpoint import read, write

HERE = Path(__file__).parent


def sample(number, size=300):
    """A checkpoint's tensors and facts, other ones for every number."""
    rng = np.random.default_rng(number)
    groups = {"model": {"a": rng.normal(size=size)}, "optimizer": {"m": rng.normal(size=2 * size)}, "state": {}}
    return groups, {"step": number}


def number_of(place):
    """Which of the samples is there, whole."""
    tensors, meta = read(place)
    expected = sample(meta["step"], tensors["model"]["a"].size)[0]
    for group, members in expected.items():
        assert {key: a.tobytes() for key, a in tensors[group].items()} == {k: a.tobytes() for k, a in members.items()}
    return meta["step"]


EVERY_CALL = """
import ctypes, errno, json, os, sys
sys.path.insert(0, sys.argv[2])
from pathlib import Path
from test_disk_full import number_of, sample
from neurogen_cy.checkpoint import write

shim = ctypes.CDLL(sys.argv[1])
shim.failed.restype = ctypes.c_char_p
place = Path(sys.argv[3], "last")
seen = []
for error in (errno.ENOSPC, errno.EIO):
    write(place, *sample(0))
    for call in range(1000):
        shim.fail_in(call, error)
        try:
            write(place, *sample(call + 1))
            said = None
        except OSError as caught:
            said = caught
        name = shim.failed().decode()
        shim.fail_in(-1, 0)
        if said is None:
            assert number_of(place) == call + 1
            if not name:
                break
            seen.append((call, name, None))  # of no consequence
            write(place, *sample(0))
            continue
        assert name and (said.errno == error or os.strerror(error) in str(said)), (name, said)
        seen.append((call, name, number_of(place)))
        write(place, *sample(0))
        assert number_of(place) == 0 and os.listdir(place.parent) == ["last"], os.listdir(place.parent)
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    """The library that makes calls fail."""
    compiler = shutil.which(os.environ.get("CC", "gcc"))
    if compiler is None:
        pytest.skip("no C compiler")
    path = tmp_path_factory.mktemp("shim") / "failing_calls.so"
    subprocess.run([compiler, "-shared", "-fPIC", str(HERE / "failing_calls.c"), "-o", str(path), "-ldl"], check=True)
    return path


def test_every_call_of_a_save_may_fail(shim, tmp_path):
    """One after the other, with "no space left" and with an I/O error. From the last rename on the new one is there."""
    command = [sys.executable, "-c", EVERY_CALL, str(shim), str(HERE), str(tmp_path)]
    environment = {**os.environ, "LD_PRELOAD": " ".join([str(shim), os.environ.get("LD_PRELOAD", "")]).strip()}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    names = [name for _, name, _ in seen]
    assert {"write", "fsync", "rename", "mkdir"} <= set(names)
    for call, name, number in seen:
        if number is None:
            assert name in ("mkdir", "chmod")  # the parent, which is there; the mode of a file
        else:
            assert number == 0 or (number == call + 1 and name == "fsync")  # of the parent, after both renames


def test_a_full_file_system_keeps_the_former(tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        write(place / "last", *sample(1))
        for size in (2000, 4000, 6000):  # where the first, the second or no file fits any more
            with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
                write(place / "last", *sample(2, size))
            assert number_of(place / "last") == 1 and os.listdir(place) == ["last"]
        write(place / "last", *sample(3))
        assert number_of(place / "last") == 3
    finally:
        subprocess.run(["umount", str(place)], check=True)
