"""Tokens of a text in a folder, memory-mapped: written once, beside and renamed, and verified whenever it is opened.

::

    <key>/tokens.bin    the ids, uint8, uint16 or int32 by the size of the vocabulary
    <key>/starts.bin    int64 [d], the token that each document begins at
    <key>/pieces.bin    int64 [p, 2], tokens and bytes before each piece
    <key>/meta.json     what they were made of (source, tokenizer), how many they are, sha256 of each file and of itself

The key is of the source's place, the tokenizer and the settings, so a text that changes takes its own folder again. A
cache is used where size and time of change of every file of the source are as noted, and all its own bytes have the
sha256 noted; anything else is said aloud and made anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neurogen_cy import atomic
from neurogen_cy.pieces import Piece
from neurogen_cy.tokenization import Int32
from neurogen_cy.tokens import Tokens

FORMAT = 1
META = "meta.json"
DTYPES = ((1 << 8, "uint8"), (1 << 16, "uint16"), (1 << 31, "int32"))
FILES = {"tokens.bin": "uint8", "starts.bin": "<i8", "pieces.bin": "<i8"}

log = logging.getLogger(__name__)


class CacheError(ValueError):
    """A token cache that cannot be used: absent, of another text or tokenizer, damaged."""


def folder() -> Path:
    """Return where caches are: `NEUROGEN_CACHE`, else `neurogen` in the user's cache folder."""
    own = os.environ.get("NEUROGEN_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "neurogen")


class TokenCache:
    """The cache of one text in one vocabulary.

    Parameters
    ----------
    root : Path
        Folder of caches; made if absent.
    identity : dict
        JSON-able: the place of the source, the tokenizer, the settings. It gives the key.
    manifest : object
        JSON-able: what changes when the source does.
    vocab_size : int
        Chooses the width of an id.
    """

    def __init__(self, root: Path, identity: Mapping[str, Any], manifest: Any, vocab_size: int) -> None:
        self._made_of = json.loads(json.dumps({"identity": dict(identity), "manifest": manifest}))
        self._types = FILES | {"tokens.bin": next(name for limit, name in DTYPES if vocab_size <= limit)}
        self.path = root / _digest(dict(identity) | {"format": FORMAT})[:32]

    def open_or_make(
        self, rows: Callable[[], Iterable[tuple[Piece, Int32]]], facts: Callable[[], Mapping[str, Any]]
    ) -> tuple[Tokens, dict[str, Any]]:
        """Return the tokens and the facts beside them; made from `rows` where there is no good cache.

        Processes that want the same cache at once wait for the one that makes it.

        Parameters
        ----------
        rows : function
            Gives pieces with their ids, in order.
        facts : function
            Called when they are used up; JSON-able.

        Raises
        ------
        OSError
            If the cache cannot be written; a former one stays.
        ValueError
            What `rows` raises, or if it gives no token.
        """
        with _locked(self.path):
            try:
                return self.read()
            except FileNotFoundError:
                pass
            except CacheError as error:
                log.warning("token cache made anew: %s", error)
            atomic.replace(self.path, lambda fresh: self._fill(fresh, rows(), facts))
            return self.read()

    def read(self) -> tuple[Tokens, dict[str, Any]]:
        """Return tokens and facts, verified to the last byte.

        Raises
        ------
        FileNotFoundError
            If there is no cache.
        CacheError
            If it is of another state of the source, or damaged: expected and got.
        """
        path = atomic.current(self.path)
        meta = _read_meta(path / META)
        if meta["made_of"] != self._made_of:
            raise CacheError(f"{path}: expected one of {_short(self._made_of)}, got one of {_short(meta['made_of'])}")
        ids, starts, pieces = (
            _mapped(path / name, dtype, meta["files"].get(name)) for name, dtype in self._types.items()
        )
        tokens = Tokens(ids, starts, meta["bytes"], meta["sha256"], pieces.reshape(-1, 2))
        return tokens, meta["facts"]

    def _fill(
        self, fresh: Path, rows: Iterable[tuple[Piece, Int32]], facts: Callable[[], Mapping[str, Any]]
    ) -> None:
        """Write all files of a cache into an empty folder."""
        writers = {name: _Writer(fresh / name, dtype) for name, dtype in self._types.items()}
        tokens, starts, pieces = writers.values()
        text_bytes = 0
        try:
            for piece, ids in rows:
                pieces.write(np.array([tokens.count, piece.at]))
                if piece.first:
                    starts.write(np.array([tokens.count]))
                tokens.write(ids)
                text_bytes = piece.end
        finally:
            for writer in writers.values():
                writer.close()
        if not tokens.count:
            raise ValueError("expected a text that gives tokens, got none from it")
        files = {name: writer.facts for name, writer in writers.items()}
        meta = {
            "format": FORMAT,
            "made_of": self._made_of,
            "files": files,
            "tokens": tokens.count,
            "documents": starts.count,
            "bytes": text_bytes,
            "sha256": _digest([files[name] for name in ("tokens.bin", "starts.bin")]),
            "facts": dict(facts()),
        }
        text = json.dumps(meta | {"checksum": _digest(meta)}, indent=1)
        (fresh / META).write_text(text + "\n", encoding="utf-8")


class _Writer:
    """A file of numbers of one type, hashed as it is written."""

    def __init__(self, path: Path, dtype: str) -> None:
        self._file, self._dtype, self._digest = path.open("wb"), dtype, hashlib.sha256()
        self.count = 0

    def write(self, values: NDArray[Any]) -> None:
        data = values.astype(self._dtype).tobytes()
        self._digest.update(data)
        self._file.write(data)
        self.count += len(values)

    def close(self) -> None:
        self._file.close()

    @property
    def facts(self) -> dict[str, Any]:
        return {"bytes": self.count * np.dtype(self._dtype).itemsize, "sha256": self._digest.hexdigest()}


def _mapped(path: Path, dtype: str, facts: Any) -> NDArray[Any]:
    """Map a file whose size and hash are as noted."""
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise CacheError(f"{path}: expected a readable file, got: {error}") from error
    found = {"bytes": size, "sha256": digest.hexdigest()}
    if found != facts:
        raise CacheError(f"{path}: expected {facts}, got {found}")
    return np.memmap(path, dtype, "r")


def _read_meta(path: Path) -> dict[str, Any]:
    try:
        meta: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CacheError(f"{path}: expected a readable JSON file, got: {error}") from error
    stated = meta.pop("checksum", None) if isinstance(meta, dict) else None
    if stated is None or stated != _digest(meta):
        raise CacheError(f"{path}: expected the checksum of its own text, got {stated}")
    if meta.get("format") != FORMAT:
        raise CacheError(f"{path}: expected format {FORMAT}, got {meta.get('format')!r}")
    return dict(meta)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock beside `path`, alone among processes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(path.name + ".lock").open("w")
    except OSError as error:
        raise OSError(f"expected a folder for token caches, set by NEUROGEN_CACHE, got: {error}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("%s: waiting for another process that makes or reads this token cache", path)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _digest(facts: Any) -> str:
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def _short(facts: Any, longest: int = 300) -> str:
    text = json.dumps(facts)
    return text if len(text) <= longest else text[:longest] + "..."
