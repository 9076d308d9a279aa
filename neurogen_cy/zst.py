"""Reading `.zst` files: Python's own `compression.zstd` where there is one, else the `zstandard` package."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

FED = 8192
"""Compressed bytes handed over at a time: what comes out of so few is at most some 200 MB."""


@contextmanager
def open_zst(path: Path) -> Iterator[BinaryIO]:
    """Open what a `.zst` file holds, all its frames one after the other.

    Raises
    ------
    ModuleNotFoundError
        If no module can read it; the message has the pip command.
    ValueError
        While reading, if it is damaged or ends too soon.
    """
    with path.open("rb") as compressed:
        yield cast(BinaryIO, io.BufferedReader(_Frames(compressed, path), 1 << 20))


class _Frames(io.RawIOBase):
    """What the frames of an open file hold."""

    def __init__(self, compressed: BinaryIO, path: Path) -> None:
        self._new, self._damage = _decompressor(path)
        self._compressed, self._path = compressed, path
        self._frame: Any = None  # the one that is being read, None between two
        self._left = b""  # not handed to a decompressor yet
        self._out = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._out:
            fed = self._left or self._compressed.read(FED)
            if not fed:
                if self._frame is not None:
                    raise ValueError(f"{self._path}: expected whole zstd frames, got a file that ends inside one")
                return 0
            self._frame = self._frame or self._new()
            try:
                self._out = memoryview(self._frame.decompress(fed))
            except self._damage as error:
                raise ValueError(f"{self._path}: expected zstd data, got: {error}") from error
            self._left = b""
            if self._frame.eof:
                self._left, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._out))
        buffer[:count] = self._out[:count]
        self._out = self._out[count:]
        return count


def _decompressor(path: Path) -> tuple[Any, type[Exception]]:
    """Return what makes a decompressor of one frame, and what it raises."""
    try:
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]

        return zstd.ZstdDecompressor, zstd.ZstdError
    except ModuleNotFoundError:
        pass
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path}: expected the package zstandard to read it, got none: "
            "pip install 'neurogen_cy[zstd]' or pip install zstandard"
        ) from error
    decompressor = zstandard.ZstdDecompressor()
    return decompressor.decompressobj, zstandard.ZstdError
