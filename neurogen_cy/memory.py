"""Memory this process may still take: what the machine has, its control groups and its own limits allow."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import psutil

_CGROUPS = Path("/sys/fs/cgroup")
_PROCESS = Path("/proc/self/cgroup")


def available() -> int:
    """Bytes of host memory that can be allocated now; inside a container, what its limit leaves."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    room = psutil.virtual_memory().available
    if limit != resource.RLIM_INFINITY:
        room = min(room, limit - psutil.Process().memory_info().vms)
    return max(0, int(min([room, *_group_rooms()])))


def _group_rooms() -> Iterator[int]:
    """Of each control group around this process that has a limit, the memory it leaves (version 2, then version 1)."""
    for folder, most, used, inactive in _groups():
        try:
            limit = int((folder / most).read_text())
            taken = int((folder / used).read_text())
            facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such group here, or "max": no limit
            continue
        yield limit - (taken - int(facts.get(inactive, 0)))  # cached files give way


def _groups() -> Iterator[tuple[Path, str, str, str]]:
    """(folder, its files of the limit and of what is used, the key of cached files in memory.stat)."""
    try:
        lines = [line.split(":", 2) for line in _PROCESS.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in lines:
        if controllers == "":
            root, names = _CGROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = _CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inner = root / path.strip("/")  # inside a container the path may be the host's: its root is the limit then
        for folder in (inner, *inner.parents):
            yield (folder, *names)
            if folder == root:
                break
