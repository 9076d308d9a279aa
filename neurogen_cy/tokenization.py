"""Tokenizers: how text becomes token ids and comes back.

Three kinds behind one interface: bytes (`ByteTokenizer`), any Hugging Face `tokenizers` JSON file
(`tokenizer_json`) and SentencePiece models (`tokenizer_sentencepiece`). `load` opens one by its path,
`load_saved` the one that a checkpoint carries.

**Bytes that are no UTF-8** become the tokenizer's own tokens of single bytes where it has them (bytes, byte-level
BPE, byte fallback); any other tokenizer refuses the text, naming the byte and its offset. Nothing is replaced silently.
"""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neurogen_cy import checkpoint
from neurogen_cy.checkpoint import CheckpointError
from neurogen_cy.text_decoders import TextDecoder, Utf8Decoder

Int32 = NDArray[np.int32]

MAX_VOCABULARY = 1 << 24
MAX_FILE = 1 << 29
"""Largest tokenizer file in bytes: what is larger was meant as something else."""


class InvalidTextError(ValueError):
    """Text that this tokenizer cannot hold; `offset` is where in it, in bytes."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset


class Tokenizer(ABC):
    """A vocabulary and the way from text to ids and back.

    Attributes
    ----------
    vocab_size : int
        Ids are 0 .. vocab_size - 1; the `vocab_size` of the model's configuration is the same.
    sha256 : str
        Hexadecimal, of the file; what makes two tokenizers the same one.
    end : int or None
        Id of the token that ends a document (`<|endoftext|>`, `</s>`), None where there is none.
    file : str or None
        What its file is called inside a checkpoint; None where there is none.
    raw : bytes
        That file, as it was given.
    """

    kind: str
    vocab_size: int
    sha256: str
    end: int | None = None
    file: str | None = None
    raw: bytes = b""

    @abstractmethod
    def encode_batch(self, texts: Sequence[bytes]) -> list[Int32]:
        """Return the ids of each text. No text may be too long to be held some hundred times in memory.

        Raises
        ------
        InvalidTextError
            If a text has bytes that are no UTF-8 and the tokenizer has no tokens of single bytes.
        """

    @abstractmethod
    def decode_bytes(self, ids: Sequence[int] | NDArray[Any]) -> bytes:
        """Return the text of ids as bytes; for bytes, and byte-level BPE that normalises nothing, those encoded.

        Raises
        ------
        IndexError
            If an id is outside 0 .. vocab_size - 1.
        """

    @abstractmethod
    def decoder(self) -> TextDecoder:
        """Return a new incremental decoder."""

    def encode(self, text: bytes | str) -> Int32:
        """Return the ids of a text, int32 [n], without any special token put before or after it.

        A str with surrogate escapes (a command line's) stands for the bytes it came from. Raises as `encode_batch`.
        """
        return self.encode_batch([text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")])[0]

    def decode(self, ids: Sequence[int] | NDArray[Any]) -> str:
        """Return the text of ids; what is no UTF-8 becomes U+FFFD. Raises as `decode_bytes`."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    @property
    def separator(self) -> Int32:
        """What stands between two documents: `end`, or else a new line."""
        return self.encode(b"\n") if self.end is None else np.array([self.end], np.int32)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able facts: `kind`, `vocab_size`, `sha256`, `file`."""
        return {"kind": self.kind, "vocab_size": self.vocab_size, "sha256": self.sha256, "file": self.file}

    def files(self) -> dict[str, bytes]:
        """Return the files a checkpoint keeps so that it stands alone: `{name: content}`, none for bytes."""
        return {} if self.file is None else {self.file: self.raw}


class ByteTokenizer(Tokenizer):
    """256 ids, one for each byte; every text comes back as it was."""

    kind = "bytes"
    vocab_size = 256
    sha256 = hashlib.sha256(b"").hexdigest()

    def encode_batch(self, texts: Sequence[bytes]) -> list[Int32]:
        """See `Tokenizer.encode_batch`; never refuses."""
        return [np.frombuffer(text, np.uint8).astype(np.int32) for text in texts]

    def decode_bytes(self, ids: Sequence[int] | NDArray[Any]) -> bytes:
        """See `Tokenizer.decode_bytes`."""
        return as_ids(ids, self.vocab_size).astype(np.uint8).tobytes()

    def decoder(self) -> TextDecoder:
        """See `Tokenizer.decoder`."""
        return Utf8Decoder(self.decode_bytes)


class TextTokenizer(Tokenizer):
    """A tokenizer of UTF-8; `_byte_ids` [256] are its tokens of single bytes, None where it has not all of them."""

    _byte_ids: Int32 | None = None

    @abstractmethod
    def _encode(self, texts: list[str]) -> list[Int32]:
        """Return the ids of each text."""

    def encode_batch(self, texts: Sequence[bytes]) -> list[Int32]:
        """See `Tokenizer.encode_batch`."""
        try:
            whole = [text.decode("utf-8") for text in texts]
        except UnicodeDecodeError:
            return [self._encode_parts(text) for text in texts]
        return self._encode(whole)

    def _encode_parts(self, text: bytes) -> Int32:
        ids = [np.zeros(0, np.int32)]
        for offset, part in _utf8_parts(text):
            if isinstance(part, str):
                ids += self._encode([part])
            elif self._byte_ids is None:
                raise InvalidTextError(
                    f"expected UTF-8, as this tokenizer has no tokens of single bytes, got the byte "
                    f"0x{part[0]:02x} at offset {offset}",
                    offset,
                )
            else:
                ids.append(self._byte_ids[list(part)])
        return np.concatenate(ids)


def load(path: str | os.PathLike[str] | None) -> Tokenizer:
    """Open a tokenizer: a `tokenizers` JSON file, a SentencePiece model, or a folder with `tokenizer.json` or `.model`.

    None and "bytes" are the `ByteTokenizer`.

    Raises
    ------
    FileNotFoundError, OSError
        If there is nothing to read.
    ValueError
        If it is no tokenizer, or one that cannot be used.
    ModuleNotFoundError
        If it takes a package that is not installed; the message has the pip command.
    """
    if path is None or str(path) == "bytes":
        return ByteTokenizer()
    file = Path(path)
    if file.is_dir():
        inside = [file / name for name in FILES.values() if (file / name).is_file()]
        if not inside:
            raise FileNotFoundError(f"{file}: expected {' or '.join(FILES.values())} in this folder, got neither")
        file = inside[0]
    if not file.is_file():
        raise FileNotFoundError(f"expected the file of a tokenizer, got {file}: no such file")
    if file.stat().st_size > MAX_FILE:
        raise ValueError(f"{file}: expected a tokenizer of at most {MAX_FILE:,} bytes, got {file.stat().st_size:,}")
    raw = file.read_bytes()
    if raw.lstrip()[:1] == b"{" or file.suffix == ".json":
        return from_bytes("json", raw, file)
    if raw[:1] == b"\n" or file.suffix == ".model":  # as the first field of a model is written
        return from_bytes("sentencepiece", raw, file)
    raise ValueError(f"{file}: expected a tokenizers JSON file or a SentencePiece model, got neither")


FILES = {"json": "tokenizer.json", "sentencepiece": "tokenizer.model"}
"""What the file of each kind is called inside a checkpoint."""


def from_bytes(kind: str, raw: bytes, name: str | os.PathLike[str]) -> Tokenizer:
    """Return the tokenizer of a file's content; `name` is for messages. Raises as `load`."""
    if kind == "json":
        from neurogen_cy.tokenizer_json import JsonTokenizer

        return JsonTokenizer(raw, name)
    if kind == "sentencepiece":
        from neurogen_cy.tokenizer_sentencepiece import SentencePieceTokenizer

        return SentencePieceTokenizer(raw, name)
    raise ValueError(f"{name}: expected a tokenizer of kind bytes, {', '.join(FILES)}, got {kind!r}")


def load_saved(directory: str | os.PathLike[str]) -> Tokenizer:
    """Open the tokenizer that a checkpoint carries; of one that names none, and has 256 tokens, the bytes.

    Raises
    ------
    CheckpointError
        If the checkpoint cannot be read, its tokenizer is not the one it was saved with or does not fit its model.
    ModuleNotFoundError
        As `load`.
    """
    meta = checkpoint.read_meta(directory)
    try:
        vocabulary = meta["config"]["vocab_size"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{directory}: meta.json does not describe a model: {error!r}") from error
    facts = meta.get("tokenizer")
    if facts is None:
        if vocabulary != 256:
            raise CheckpointError(
                f"{directory}: expected a tokenizer in it, or 256 tokens, one a byte; got none, and {vocabulary} tokens"
            )
        return ByteTokenizer()
    tokenizer = _as_saved(directory, facts)
    if vocabulary != tokenizer.vocab_size:
        raise CheckpointError(f"{directory}: expected a tokenizer of {vocabulary} tokens, got {tokenizer.vocab_size}")
    return tokenizer


def _as_saved(directory: str | os.PathLike[str], facts: Any) -> Tokenizer:
    """Return the tokenizer with these facts, or refuse."""
    kind = facts.get("kind") if isinstance(facts, Mapping) else None
    if kind == ByteTokenizer.kind:
        tokenizer: Tokenizer = ByteTokenizer()
    elif isinstance(kind, str) and kind in FILES:
        raw = checkpoint.read_file(directory, FILES[kind])
        try:
            tokenizer = from_bytes(kind, raw, Path(directory, FILES[kind]))
        except ValueError as error:
            raise CheckpointError(str(error)) from error
    else:
        raise CheckpointError(f"{directory}: expected a tokenizer of kind bytes, {', '.join(FILES)}, got {facts!r}")
    if tokenizer.to_dict() != facts:
        raise CheckpointError(f"{directory}: expected the tokenizer {facts}, got {tokenizer.to_dict()}")
    return tokenizer


def expect_same(tokenizer: Tokenizer, saved: Tokenizer) -> None:
    """Raise ValueError unless both are the same tokenizer; `saved` is a checkpoint's."""
    if tokenizer.sha256 != saved.sha256 or tokenizer.kind != saved.kind:
        raise ValueError(
            f"expected the tokenizer of the checkpoint ({saved.kind}, {saved.vocab_size} tokens, "
            f"sha256 {saved.sha256}), got another ({tokenizer.kind}, {tokenizer.vocab_size} tokens, "
            f"sha256 {tokenizer.sha256})"
        )


def as_ids(ids: Sequence[int] | NDArray[Any], vocab_size: int) -> NDArray[np.int64]:
    """Return ids as an array [n], each in the vocabulary, or raise IndexError."""
    array = np.asarray(ids, np.int64).reshape(-1)
    bad = array[(array < 0) | (array >= vocab_size)]
    if bad.size:
        raise IndexError(f"expected token ids in 0..{vocab_size - 1}, got {bad[0]}")
    return array


def _utf8_parts(text: bytes) -> Iterator[tuple[int, str | bytes]]:
    """Cut a text into UTF-8, as str, and the bytes that are none; each with its offset in bytes."""
    offset = 0
    for part in re.split("([\udc80-\udcff]+)", text.decode("utf-8", "surrogateescape")):
        raw = part.encode("utf-8", "surrogateescape")
        if part:
            yield offset, raw if "\udc80" <= part[0] <= "\udcff" else part
        offset += len(raw)
