"""What every benchmark records: the machine, the commit, medians and their spread."""

import datetime
import json
import os
import platform
import re
import statistics
import subprocess
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results"


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


def write(name, record):
    """Writes results/<name>.json and says where."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path}")
