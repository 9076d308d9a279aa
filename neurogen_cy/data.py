"""Byte corpora: where text comes from, how it is split, and how streams read it.

Here a corpus is a `bytes` object; its tokens are its byte values, 0..255. `corpus` has texts of any size in any
vocabulary, `streams` what reads them.
"""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

from neurogen_cy.streams import ByteStreams, TokenStreams, evaluation_streams, held_out

__all__ = [
    "ByteStreams", "TokenStreams", "default_corpus", "describe", "evaluation_streams", "held_out", "read_corpus",
    "split",
]  # fmt: skip

SEPARATOR = b"\n"
"""What stands between the topics of the default corpus and between the files of a directory."""


def describe(data: bytes, name: str, source: str) -> dict[str, Any]:
    """Return the facts that identify a corpus: `name`, `source`, `bytes` and `sha256` (hexadecimal)."""
    return {"name": name, "source": source, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def default_corpus() -> tuple[bytes, dict[str, Any]]:
    """Return the English text that every Python carries, about 0.47 MB, and its facts.

    The strings of `pydoc_data.topics.topics` in the order of their keys, joined by one newline, as UTF-8.
    The text differs between Python versions, hence the hash in the facts.

    Returns
    -------
    data : bytes
    facts : dict
        As from `describe`; `source` is "pydoc_data.topics".

    Raises
    ------
    FileNotFoundError
        If this Python was installed without `pydoc_data`.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise FileNotFoundError(
            "expected the module pydoc_data.topics of the standard library, got a Python without it: "
            "give a text of your own instead"
        ) from error
    data = SEPARATOR.join(topics[key].encode("utf-8") for key in sorted(topics))
    name = f"the language topics of Python {platform.python_version()}"
    return data, describe(data, name, "pydoc_data.topics")


def read_corpus(path: str | os.PathLike[str]) -> tuple[bytes, dict[str, Any]]:
    """Read a text file, or every text file below a directory.

    A directory is read recursively, its files in the order of their relative paths and joined by one
    newline; hidden files and folders and empty files are left out. The encoding does not matter as long
    as it has no NUL bytes.

    Returns
    -------
    data : bytes
    facts : dict
        As from `describe`; `source` is the absolute path.

    Raises
    ------
    FileNotFoundError
        If there is no such file or directory.
    ValueError
        If there is no text in it, or a file holds a NUL byte (so it is not text).
    """
    root = Path(path)
    if root.is_dir():
        files = [p for p in visible_files(root) if p.stat().st_size > 0]
        if not files:
            raise ValueError(f"expected text files below {root}, got none that is visible and not empty")
    elif root.is_file():
        files = [root]
    else:
        raise FileNotFoundError(
            f"expected a text file or a directory of text files, got {root}: no such path"
        )
    data = SEPARATOR.join(_read_text(file) for file in files)
    if not data:
        raise ValueError(f"expected text in {root}, got an empty file")
    return data, describe(data, root.name or str(root), str(root.resolve()))


def split(data: bytes, fraction: float = 0.9) -> tuple[bytes, bytes]:
    """Cut a text in two: the first `int(fraction * len(data))` bytes to train on, the rest to validate.

    Raises
    ------
    ValueError
        If `fraction` is not inside (0, 1), or one of the parts would be empty.
    """
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"expected 0 < fraction < 1, got {fraction}")
    cut = int(len(data) * fraction)
    if cut == 0 or cut == len(data):
        raise ValueError(f"expected a text long enough to cut at {fraction}, got {len(data)} bytes")
    return data[:cut], data[cut:]


def visible_files(root: Path) -> list[Path]:
    """Return the regular files below `root` that are not hidden, ordered by relative path."""
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted((p for p in found if p.is_file()), key=lambda p: p.relative_to(root).as_posix())


def _read_text(file: Path) -> bytes:
    data = file.read_bytes()
    nul = data.find(b"\0")
    if nul >= 0:
        raise ValueError(f"expected text in {file}, got a NUL byte at offset {nul}")
    return data
