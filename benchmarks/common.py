"""What every benchmark records: the machine, the commit, medians and their spread."""

import json
import platform
import statistics
import subprocess
from pathlib import Path

import numpy as np

RESULTS = Path(__file__).parent / "results"


def machine():
    """Processor, commit and versions of a record."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {"processor": model, "python": platform.python_version(), "numpy": np.__version__, "commit": commit}


def spread(values):
    """Median, smallest and largest of a list of timings or ratios."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def write(name, record):
    """Writes results/<name>.json and says where."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path}")
