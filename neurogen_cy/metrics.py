"""`metrics.jsonl`: one JSON object a line, for every training step, evaluation and what else happens in a run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class MetricsLog:
    """An open `metrics.jsonl`; every line is in the file when `write` returns.

    Parameters
    ----------
    path : Path
        Its folder must exist.
    keep : int
        Lines written when no more tokens than this had been read stay, later ones are removed: a run that resumes
        at step 300 writes 301 anew. 0 starts an empty file.

    Raises
    ------
    ValueError
        If a line that is to stay cannot be read, except a last one that was cut short.
    """

    def __init__(self, path: Path, keep: int = 0) -> None:
        kept = [line for line, record in _records(path, "tokens") if record["tokens"] <= keep] if keep else []
        beside = path.with_name(path.name + ".tmp")
        beside.write_text("".join(kept), encoding="utf-8")
        os.replace(beside, path)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append a record; `step` and `tokens` are among its keys and every number is finite."""
        self._file.write(json.dumps(record, allow_nan=False) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the records of a `metrics.jsonl` in order, without a last line that was cut short.

    Raises ValueError naming a line that is no record.
    """
    return [record for _, record in _records(Path(path))]


def _records(path: Path, key: str = "step") -> list[tuple[str, dict[str, Any]]]:
    """Return each whole line of the file, none if it is absent, with the record in it; `key` is a whole number."""
    if not path.exists():
        return []
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
            if not isinstance(record[key], int):
                raise TypeError("no whole number")
        except (ValueError, TypeError, KeyError) as error:
            expected = "a record with a step" if key == "step" else f"a record with {key}"
            raise ValueError(f"{path}: line {number}: expected {expected}, got {line!r}") from error
        pairs.append((line, record))
    return pairs
