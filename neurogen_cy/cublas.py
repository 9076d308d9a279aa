"""Where cuBLASLt may be: it is loaded when the first CUDA model asks for it, and never linked."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

WHEELS = ("nvidia.cu13", "nvidia.cublas")  # namespace packages of the wheels, the newer layout first
SONAMES = ("libcublasLt.so.13", "libcublasLt.so.12")


def library_paths() -> list[str]:
    """Paths to try, in this order: installed wheels, CUDA toolkits, what the dynamic linker finds by itself."""
    folders = [*_wheel_folders(), *_toolkit_folders()]
    return [str(path) for folder in folders for name in SONAMES if (path := folder / name).exists()] + list(SONAMES)


def _wheel_folders() -> Iterator[Path]:
    for package in WHEELS:
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:  # no wheel of NVIDIA's at all
            continue
        for place in (spec and spec.submodule_search_locations) or ():
            yield Path(place, "lib")


def _toolkit_folders() -> Iterator[Path]:
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home:
            yield Path(home, "lib64")
