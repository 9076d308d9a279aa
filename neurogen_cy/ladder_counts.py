"""What the rungs allocate and copy on the host, counted in a process that starts with the hooks of `allocations`.

    python -m neurogen_cy.ladder_counts JOB.json     the inside of that process; prints its counts as JSON
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from neurogen_cy import allocations

if TYPE_CHECKING:
    from neurogen_cy.ladder import Plan

FIELDS = (
    "host_alloc_bytes", "host_allocs", "python_allocs", "python_alloc_bytes", "array_allocs", "array_alloc_bytes",
    "native_allocs", "native_alloc_bytes", "other_native_allocs", "host_copied_bytes", "array_allocs_per_token",
    "native_allocs_per_token", "counted_tokens",
)  # fmt: skip


def add_to(
    rows: list[dict[str, Any]], config: Any, settings: Mapping[str, Any], text: NDArray[np.int32], plan: Plan
) -> str | None:
    """Put `FIELDS` into every row, of one sequence of T tokens; None and the reason where they cannot be counted.

    host_allocs and host_alloc_bytes are the sum of the Python interpreter's, those of array data, and the native
    library's own; other_native_allocs are everybody else's (drivers, BLAS). host_copied_bytes is what the native
    library copied by memcpy, its own staging included. *_per_token is what one token more takes: the difference
    between two lengths, so that what a call allocates once is not in it.
    """
    for row in rows:
        row.update(dict.fromkeys(FIELDS))
    try:
        with tempfile.TemporaryDirectory() as name:
            counted = _counted(Path(name), rows, config, settings, text, plan.count_seconds)
    except allocations.Unavailable as reason:
        return str(reason)
    for row, counts in zip(rows, counted):
        row.update(counts)
    return None


def _counted(
    folder: Path, rows: list[dict[str, Any]], config: Any, settings: Mapping[str, Any], text: NDArray[np.int32],
    seconds: float,
) -> list[dict[str, float | None]]:
    """What the process with the hooks prints."""
    environment = allocations.environment(folder)
    np.save(folder / "text.npy", text)
    job = {
        "config": config.to_dict(), "settings": dict(settings), "text": str(folder / "text.npy"), "seconds": seconds,
        "rows": [[row["rung"], row["T"]] for row in rows],
    }  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "neurogen_cy.ladder_counts", str(folder / "job.json")]
    environment["PYTHONPATH"] = ":".join([str(Path(__file__).parent.parent), *filter(None, sys.path)])
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise allocations.Unavailable(f"the process with the allocation hooks ended with {done.returncode}: {last}")
    out: list[dict[str, float | None]] = json.loads(done.stdout.splitlines()[-1])
    return out


def main(path: str) -> None:
    """The inside of the process."""
    from neurogen_cy import rungs
    from neurogen_cy.config import Config
    from neurogen_cy.model import NeuroGen

    job = json.loads(Path(path).read_text())
    reader = rungs.Reader(np.load(job["text"]))
    model = NeuroGen(
        Config.from_dict(job["config"]), **job["settings"], streams=1, max_tokens=max(T for _, T in job["rows"])
    )
    counting = allocations.Counting(f"neurogen_cy/_{model.backend}.")
    out = []
    for rung, T in job["rows"]:
        tokens = rungs.tokens_within(model, rung, T, reader, job["seconds"])
        ids, targets = reader.take(tokens)
        whole = counting.counted(lambda: rungs.run(model, rung, ids, targets))  # noqa: B023
        each: dict[str, float] = {}
        if rung != rungs.BATCHED and tokens > 1:
            few = tokens // 2
            counts = counting.counted(lambda: rungs.run(model, rung, ids[:few], targets[:few]))  # noqa: B023
            each = {name: (whole[name] - count) / (tokens - few) for name, count in counts.items()}
        out.append(_of_sequence(whole, each, T, tokens))
    print(json.dumps(out))


def _of_sequence(
    counts: Mapping[str, int], each: Mapping[str, float], T: int, tokens: int
) -> dict[str, float | None]:
    """What was counted; where those are fewer tokens than T, with what `each` further token takes."""
    per = {name: count + each[name] * (T - tokens) if T > tokens else count for name, count in counts.items()}
    kinds = ("python", "array", "native")
    return {
        "host_alloc_bytes": sum(per[f"{kind}_bytes"] for kind in kinds),
        "host_allocs": sum(per[f"{kind}_allocs"] for kind in kinds),
        "python_allocs": per["python_allocs"], "python_alloc_bytes": per["python_bytes"],
        "array_allocs": per["array_allocs"], "array_alloc_bytes": per["array_bytes"],
        "native_allocs": per["native_allocs"], "native_alloc_bytes": per["native_bytes"],
        "other_native_allocs": per["all_native_allocs"] - per["native_allocs"],
        "host_copied_bytes": per["copied_bytes"], "array_allocs_per_token": each.get("array_allocs"),
        "native_allocs_per_token": each.get("native_allocs"), "counted_tokens": tokens,
    }  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
