"""Directories replaced as one, so that at every moment a complete one can be found.

The new directory is filled as `.<name>.tmp-<pid>` beside its place and fsynced with every file in it; then
the former one becomes `<name>.old`, the new one `<name>`, and the former is removed. A crash between the two
renames leaves `<name>.old` alone, which `current` then returns. One writer at a time.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path


def replace(directory: Path, fill: Callable[[Path], None]) -> None:
    """Put a new directory in this place.

    Parameters
    ----------
    directory : Path
        Its place; parents are made. What is there is removed whole at the end, so look at it first.
    fill : function
        Writes the files, no folders, into the new and empty directory it is given.

    Raises
    ------
    OSError
        If writing or renaming fails; what was there stays, and what was written is removed. If only the very last
        step fails, syncing the parent, both are there: the new one in its place, the former as `old(directory)`.
    """
    former = old(directory)
    fresh = directory.with_name(f".{directory.name}.tmp-{os.getpid()}")
    directory.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(directory, former)
    try:
        fresh.mkdir()
        fill(fresh)
        for path in (*fresh.iterdir(), fresh):
            _fsync(path)
        _swap(fresh, directory, former)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    shutil.rmtree(former, ignore_errors=True)


def old(directory: Path) -> Path:
    """Return where the former directory stands while the new one takes its place."""
    return directory.with_name(directory.name + ".old")


def current(directory: Path) -> Path:
    """Return `directory`, or where it does not exist `old(directory)`, the one to read now.

    Raises
    ------
    FileNotFoundError
        If neither exists.
    """
    for path in (directory, old(directory), directory):  # once more: it may be in the middle of a swap
        if path.exists():
            return path
    raise FileNotFoundError(f"{directory}: no such path")


def identity(path: Path) -> tuple[int, int] | None:
    """Return what changes when another directory takes this place, None while there is none."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _clear_leftovers(directory: Path, former: Path) -> None:
    """Undo what a crash left: a half-written directory, or the former one set aside."""
    for path in directory.parent.iterdir():
        if path.name.startswith(f".{directory.name}.tmp-"):
            shutil.rmtree(path)
    if directory.exists() and not any(directory.iterdir()):
        directory.rmdir()
    if former.exists():
        if directory.exists():
            shutil.rmtree(former)
        else:
            os.rename(former, directory)


def _swap(fresh: Path, directory: Path, former: Path) -> None:
    """Put `fresh` in the place of `directory`, which becomes `former`; on failure it is put back."""
    if directory.exists():
        os.rename(directory, former)
        try:
            os.rename(fresh, directory)
        except BaseException:
            if not directory.exists():
                os.rename(former, directory)
            raise
    else:
        os.rename(fresh, directory)
    _fsync(directory.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
