"""The checkpoints that stay beside `last` and `best`: `step-<number>`, the newest N of them.

A step's checkpoint shares its files with `last` (hard links) until `last` is replaced, so keeping it writes nothing
twice; where the file system has no links, they are copied.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from neurogen_cy import atomic

_NAME = re.compile(r"step-(\d+)")


def kept_steps(out: Path) -> dict[int, Path]:
    """Return `{step: checkpoint}` of those that stay in a run's folder, the oldest first."""
    found = {int(match[1]): path for path in out.iterdir() if (match := _NAME.fullmatch(path.name))}
    return {step: path for step, path in sorted(found.items()) if (path / "meta.json").exists()}


def keep(saved: Path, step: int, newest: int) -> None:
    """Keep the checkpoint `saved` as that of `step`, and no more than the `newest` beside it.

    Later steps, which a run leaves behind when it goes on from an earlier one, make room first.

    Raises
    ------
    OSError
        If the disk is full, or something else has the name; `saved` and those kept before stay.
    """
    place = saved.with_name(f"step-{step:06d}")
    if place.exists() and not (place / "meta.json").exists():
        raise FileExistsError(f"{place}: expected a checkpoint or nothing, got something else")

    def share(folder: Path) -> None:
        for file in saved.iterdir():
            try:
                os.link(file, folder / file.name)
            except OSError:
                shutil.copy2(file, folder / file.name)

    for left in saved.parent.glob(".step-*.removed"):  # by a crash
        shutil.rmtree(left)
    atomic.replace(place, share)
    found = kept_steps(saved.parent)
    order = [*(s for s in found if s > step), *(s for s in found if s <= step)]
    for old in order[: max(0, len(order) - newest)]:
        _remove(found[old])


def _remove(path: Path) -> None:
    """Remove a checkpoint so that a crash leaves it whole or under no checkpoint's name."""
    doomed = path.with_name(f".{path.name}.removed")
    os.rename(path, doomed)
    shutil.rmtree(doomed)
