"""Runs the tests of the GPU and records what came of it, with a hash of the sources they ran on.

    python tests/gpu_record.py [options of pytest]

Writes benchmarks/results/gpu_tests.json. A GPU that cannot be used is a failure.
"""

import glob
import hashlib
import importlib.metadata
import os
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # the package need not be installed
os.environ["NEUROGEN_REQUIRE_GPU"] = "1"  # read by conftest.py

import common  # noqa: E402


def sources_sha256():
    """Of every file of the native library and the binding: names and contents, in the order of the names."""
    files = [path for path in glob.glob("src_cuda/**/*", root_dir=ROOT, recursive=True) if (ROOT / path).is_file()]
    files += [path for end in ("pyx", "pxd", "pxi") for path in glob.glob(f"neurogen_cy/*.{end}", root_dir=ROOT)]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.encode() + b"\0" + (ROOT / path).read_bytes())
    return digest.hexdigest()


def libraries():
    """{name: version} of those whose arrays the tests exchange with ours; null where one is absent."""
    found = {}
    for distribution in importlib.metadata.distributions():
        name = (distribution.metadata["Name"] or "").lower()
        if name in ("numpy", "torch", "numba", "numba-cuda", "pycuda", "nvidia-cublas") or name.startswith("cupy"):
            found[name] = distribution.version
    return {**dict.fromkeys(("torch", "numba", "pycuda")), **dict(sorted(found.items()))}


class Outcomes:
    """Counts tests, as pytest's own summary does, and names those that went wrong."""

    def __init__(self):
        self.counts = {"passed": 0, "failed": 0, "skipped": 0, "errors": 0}
        self.wrong = []

    def pytest_runtest_logreport(self, report):
        if report.skipped:
            self.counts["skipped"] += 1
        elif report.failed:
            self.counts["failed" if report.when == "call" else "errors"] += 1
            self.wrong.append(report.nodeid)
        elif report.when == "call":
            self.counts["passed"] += 1

    def pytest_collectreport(self, report):
        if report.failed:
            self.counts["errors"] += 1
            self.wrong.append(report.nodeid)


def main(options):
    hashed, outcomes, begin = sources_sha256(), Outcomes(), time.perf_counter()
    arguments = ["-m", "gpu", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=120", str(ROOT / "tests"), *options]
    status = int(pytest.main(arguments, plugins=[outcomes]))
    common.write("gpu_tests", {
        **outcomes.counts,
        "wrong": outcomes.wrong,
        "options": options,
        "seconds": round(time.perf_counter() - begin, 1),
        "sources_sha256": hashed,
        "libraries": libraries(),
        **common.gpu(),
    })
    print(", ".join(f"{count} {name}" for name, count in outcomes.counts.items()))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
