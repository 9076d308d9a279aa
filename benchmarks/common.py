"""What the benchmarks share: the machine and the commit of a record, timing, medians and their spread."""

import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import time
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results"
BATCHES = 4  # different ones, in turn


def output(*command):
    """What a command prints, "" where it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent).stdout.strip()
    except OSError:
        return ""


def commit():
    """Of the sources, from git or from NEUROGEN_COMMIT where there is none; "" where unknown."""
    return os.environ.get("NEUROGEN_COMMIT") or output("git", "describe", "--always", "--dirty", "--abbrev=12")


def machine():
    """Processor, commit and versions of a record."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {"processor": model, "python": platform.python_version(), "numpy": np.__version__, "commit": commit()}


def gpu():
    """GPU, driver, CUDA toolkit, commit and date of a record; null where unknown."""
    facts = output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader").split("\n")[0]
    name, _, driver = facts.partition(", ")
    release = next(
        (found for nvcc in ("nvcc", "/usr/local/cuda/bin/nvcc")
         if (found := re.search(r"release ([\d.]+)", output(nvcc, "--version")))), None
    )  # fmt: skip
    return {
        "gpu": name or None,
        "driver": driver or None,
        "cuda": release[1] if release else None,
        "commit": commit() or None,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def spread(values):
    """Median, smallest and largest of a list of timings or ratios."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def batches(vocab, B, T):
    """Pairs of random token ids and targets, int32 [B, T]: no likely tokens, and as many different ones as can be."""
    rng = np.random.default_rng(B)
    return [tuple(rng.integers(0, vocab, (2, B, T)).astype(np.int32)) for _ in range(BATCHES)]


def seconds(step, data, count):
    """Wall-clock time of each of `count` steps, which wait for their loss."""
    out = []
    for number in range(count):
        begin = time.perf_counter()
        loss = step(*data[number % len(data)])
        out.append(time.perf_counter() - begin)
        if not np.isfinite(loss):
            raise FloatingPointError(f"expected a finite loss, got {loss}")
    return out


def first_line(error):
    """What a row that could not be measured says of it."""
    return f"{type(error).__name__}: {error}".split("\n")[0][:300]


def write(name, record, say=True):
    """Writes results/<name>.json and says where; one that is killed meanwhile leaves the former file."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps(record, indent=1) + "\n")
    beside.replace(path)
    if say:
        print(f"wrote {path}")
