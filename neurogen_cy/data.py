"""Byte corpora: where text comes from, how it is split, and how streams read it.

A corpus is a `bytes` object; its tokens are its byte values, 0..255. Training reads it as `B` endless
streams (`ByteStreams`), validation as `S` contiguous pieces (`evaluation_streams`).
"""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
Bool = NDArray[np.bool_]

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
        files = [p for p in _visible_files(root) if p.stat().st_size > 0]
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


def evaluation_streams(data: bytes, streams: int = 16) -> tuple[Int32, Int32]:
    """Cut a text into contiguous streams so that every predicted byte is counted exactly once.

    With `L = (len(data) - 1) // streams`, stream `s` reads bytes `s*L .. s*L + L - 1` and predicts bytes
    `s*L + 1 .. s*L + L`: it starts at its own first byte with no history, and that byte is predicted by
    the stream before it. So bytes `1 .. streams*L` are predicted once each; byte 0 is never predicted
    (nothing precedes it), nor are the last `(len(data) - 1) % streams` bytes, fewer than `streams`.

    Returns
    -------
    ids, targets : int32 arrays [streams, L]

    Raises
    ------
    ValueError
        If `streams < 1` or the text has fewer than `streams + 1` bytes.
    """
    _positive("streams", streams)
    length = (len(data) - 1) // streams
    if length < 1:
        raise ValueError(f"expected at least streams + 1 = {streams + 1} bytes to evaluate, got {len(data)}")
    tokens = np.frombuffer(data, np.uint8, streams * length + 1).astype(np.int32)
    return tokens[:-1].reshape(streams, length), tokens[1:].reshape(streams, length)


class ByteStreams:
    """`B` endless streams over one text, handed out `T` tokens at a time in the same buffers.

    The text is a ring of `len(data) - 1` positions: position `p` reads byte `p` and predicts byte `p + 1`,
    and after the last position comes position 0 again. Stream `b` starts at position
    `b * (len(data) - 1) // B`, so together the streams read every position once before any is read twice.
    Reading position 0 is the start of the document: `resets` is True there, else False.

    Parameters
    ----------
    data : bytes
        Text to train on, at least `streams * tokens + 1` bytes.
    streams, tokens : int
        `B` and `T`.

    Attributes
    ----------
    ids, targets : int32 arrays [B, T]
        What the last `next` filled in; overwritten by the following call.
    resets : bool array [B, T]

    Raises
    ------
    ValueError
        If the text is too short, or `streams` or `tokens` is not positive.
    """

    def __init__(self, data: bytes, streams: int, tokens: int) -> None:
        _positive("streams", streams)
        _positive("tokens", tokens)
        needed = streams * tokens + 1
        if len(data) < needed:
            raise ValueError(
                f"expected a training text of at least streams * tokens + 1 = {streams} * {tokens} + 1 = "
                f"{needed} bytes, got {len(data)}"
            )
        self._bytes: NDArray[np.uint8] = np.frombuffer(data, np.uint8)
        self._sha256 = hashlib.sha256(data).hexdigest()
        self._ring = len(data) - 1
        self._starts = [b * self._ring // streams for b in range(streams)]
        self._read = 0
        self.ids: Int32 = np.zeros((streams, tokens), np.int32)
        self.targets: Int32 = np.zeros((streams, tokens), np.int32)
        self.resets: Bool = np.zeros((streams, tokens), np.bool_)

    def next(self) -> tuple[Int32, Int32, Bool]:
        """Fill and return `ids`, `targets` and `resets`, each [B, T], and move on by `T` tokens."""
        tokens = self.ids.shape[1]
        self.resets.fill(False)
        for b, start in enumerate(self._starts):
            position = (start + self._read) % self._ring
            done = 0
            while done < tokens:
                if position == 0:
                    self.resets[b, done] = True
                count = min(tokens - done, self._ring - position)
                self.ids[b, done : done + count] = self._bytes[position : position + count]
                self.targets[b, done : done + count] = self._bytes[position + 1 : position + count + 1]
                done += count
                position = 0
        self._read += tokens
        return self.ids, self.targets, self.resets

    @property
    def cursor(self) -> dict[str, Any]:
        """Where the streams stand, as JSON-able facts; assign it to continue with the very next token.

        Assigning raises TypeError if it is no cursor, ValueError if it belongs to another text or another
        number of streams. `T` may differ.
        """
        return {"tokens_per_stream": self._read, "streams": len(self._starts), "sha256": self._sha256}

    @cursor.setter
    def cursor(self, cursor: Mapping[str, Any]) -> None:
        read = cursor.get("tokens_per_stream") if isinstance(cursor, Mapping) else None
        if type(read) is not int or read < 0:
            raise TypeError(
                f"expected a cursor with a whole number of tokens_per_stream >= 0, got {cursor!r}"
            )
        for key, expected in (("streams", len(self._starts)), ("sha256", self._sha256)):
            if cursor.get(key) != expected:
                raise ValueError(f"expected a cursor with {key} {expected}, got {cursor.get(key)}")
        self._read = read


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"expected {name} >= 1, got {value}")


def _visible_files(root: Path) -> list[Path]:
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
