"""Where text comes from: files, folders, JSON lines, zstd, Hugging Face datasets. Read as documents, a chunk at a time.

A document is a file, or a record of a `.jsonl` file or of a dataset. Its text is bytes, as they are; empty ones are
left out. The whole text of a source is its documents joined by one new line.
"""

from __future__ import annotations

import json
import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from neurogen_cy.data import default_corpus, visible_files
from neurogen_cy.zst import open_zst

Spec = str | os.PathLike[str]

CHUNK = 1 << 20
LONGEST_RECORD = 1 << 28
JSON_LINES = (".jsonl", ".ndjson")


class Chunk(NamedTuple):
    """A stretch of a document: `offset` bytes after the beginning of `where`, the first of its document or not."""

    data: bytes
    first: bool
    where: str
    offset: int


class Source(ABC):
    """A text, document by document.

    Attributes
    ----------
    name, place : str
        What to call it; what `open_source` opens it by, whatever the working directory.
    """

    name: str
    place: str

    @abstractmethod
    def chunks(self) -> Iterator[Chunk]:
        """Yield all documents in order, never an empty chunk.

        Raises
        ------
        OSError, ValueError
            Naming the file, the line or offset, and what was expected and found there.
        """

    @abstractmethod
    def manifest(self) -> Any:
        """Return JSON-able facts that change when the text does: path, size and time of change of each file."""

    def at_most(self) -> float:
        """Return a number of bytes that the whole text does not exceed, without reading it."""
        return math.inf

    def size(self, read: bool = True) -> int | None:
        """Return the bytes of the whole text, None where that is not known without reading it and `read` is False.

        None too where reading means fetching.
        """
        if not read:
            return None
        total = -1
        for chunk in self.chunks():
            total += len(chunk.data) + chunk.first
        return max(total, 0)


class DefaultSource(Source):
    """The English text that every Python carries, one document; see `data.default_corpus`."""

    place = "pydoc_data.topics"

    def __init__(self) -> None:
        self._data, self._facts = default_corpus()
        self.name = self._facts["name"]

    def chunks(self) -> Iterator[Chunk]:
        """See `Source.chunks`."""
        yield Chunk(self._data, True, self.place, 0)

    def manifest(self) -> Any:
        """See `Source.manifest`."""
        return self._facts["sha256"]

    def at_most(self) -> float:
        """See `Source.at_most`."""
        return len(self._data)


class FileSource(Source):
    """A file, or every visible file below a folder in the order of their relative paths.

    `.jsonl` and `.ndjson` have a record a line, whose `field` is the text; `.zst` is decompressed first; anything else
    is text as it stands and has no NUL byte.
    """

    def __init__(self, path: Path, field: str) -> None:
        self._root, self._field = path, field
        self.name, self.place = path.name or str(path), str(path.resolve())
        if not path.exists():
            raise FileNotFoundError(f"expected a text file or a directory of text files, got {path}: no such path")
        self._files = [p for p in visible_files(path) if p.stat().st_size > 0] if path.is_dir() else [path]
        if not self._files:
            raise ValueError(f"expected text files below {path}, got none that is visible and not empty")

    def chunks(self) -> Iterator[Chunk]:
        """See `Source.chunks`."""
        for path in self._files:
            with open_zst(path) if path.suffix == ".zst" else path.open("rb") as file:
                yield from (_records(file, path, self._field) if _is_lines(path) else _text(file, path))

    def manifest(self) -> Any:
        """See `Source.manifest`."""
        stats = [(path, path.stat()) for path in self._files]
        return [[os.path.relpath(path, self._root), s.st_size, s.st_mtime_ns] for path, s in stats]

    def at_most(self) -> float:
        """See `Source.at_most`; a record of JSON is longer than the text in it."""
        if any(path.suffix == ".zst" for path in self._files):
            return math.inf
        return sum(path.stat().st_size for path in self._files) + len(self._files) - 1

    def size(self, read: bool = True) -> int | None:
        """See `Source.size`; plain text need not be read for it."""
        if any(path.suffix == ".zst" or _is_lines(path) for path in self._files):
            return super().size(read)
        return int(self.at_most())


def open_source(spec: Spec | None, field: str = "text") -> Source:
    """Open a text by its path, or by `hf:name[:config][:split]`; None is the default corpus.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is nothing of that name, or no text in it.
    ModuleNotFoundError
        If it takes a package that is not installed; the message has the pip command.
    """
    if spec is None or spec == DefaultSource.place:
        return DefaultSource()
    if os.fspath(spec).startswith("hf:"):
        from neurogen_cy.source_datasets import DatasetSource

        return DatasetSource(os.fspath(spec), field)
    return FileSource(Path(spec), field)


def record_text(record: Any, field: str, where: str) -> bytes:
    """Return the text of a record; lone surrogates, which JSON can write, become bytes that are no UTF-8."""
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        if not isinstance(record, dict):
            got = f"a {type(record).__name__}"
        else:
            got = f"{type(record[field]).__name__} there" if field in record else f"the fields {sorted(record)[:8]}"
        raise ValueError(f"{where}: expected a record with text in its field {field!r}, got {got}")
    return str(record[field]).encode("utf-8", "surrogatepass")


def _is_lines(path: Path) -> bool:
    return Path(path.stem if path.suffix == ".zst" else path.name).suffix in JSON_LINES


def _text(file: BinaryIO, path: Path) -> Iterator[Chunk]:
    offset = 0
    while data := file.read(CHUNK):
        nul = data.find(b"\0")
        if nul >= 0:
            raise ValueError(f"expected text in {path}, got a NUL byte at offset {offset + nul}")
        yield Chunk(data, offset == 0, str(path), offset)
        offset += len(data)


def _records(file: BinaryIO, path: Path, field: str) -> Iterator[Chunk]:
    number = 0
    while line := file.readline(LONGEST_RECORD + 1):
        number += 1
        where = f"{path}: line {number}"
        if len(line) > LONGEST_RECORD:
            raise ValueError(f"{where}: expected a record of at most {LONGEST_RECORD:,} bytes, got a longer line")
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: expected a JSON object, got: {error}") from error
        if text := record_text(record, field, where):
            yield Chunk(text, True, where, 0)
