"""Tokenizers of the Hugging Face `tokenizers` library, from their JSON file."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from neurogen_cy.text_decoders import TextDecoder, Utf8Decoder, WindowDecoder
from neurogen_cy.tokenization import FILES, MAX_VOCABULARY, Int32, TextTokenizer, as_ids

ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|endofdocument|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "[SEP]")
"""What the token that ends a document is called, by the tokenizers there are; the first that is found counts."""


class JsonTokenizer(TextTokenizer):
    """Any tokenizer that `tokenizers` can load.

    Truncation and padding that the file asks for are switched off: they would drop and add text. Special tokens
    written out in a text are those tokens. Ids that no token has (holes) decode to nothing.

    Parameters
    ----------
    raw : bytes
        Content of the JSON file.
    name : path
        For messages.

    Raises
    ------
    ValueError
        If the library cannot load it or not use it, or its vocabulary is empty or too large.
    """

    kind = "json"
    file = FILES["json"]

    def __init__(self, raw: bytes, name: str | os.PathLike[str]) -> None:
        self.raw, self._name = raw, name
        self.sha256 = hashlib.sha256(raw).hexdigest()
        with _readable(name):
            self._library = tokenizers.Tokenizer.from_str(raw.decode("utf-8"))
            self._library.no_truncation()
            self._library.no_padding()
            vocabulary = self._library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if not 1 <= self.vocab_size <= MAX_VOCABULARY:
            raise ValueError(f"{name}: expected 1 to {MAX_VOCABULARY:,} tokens, got {self.vocab_size:,}")
        added = self._library.get_added_tokens_decoder()
        special = {token.content: number for number, token in added.items() if token.special}
        self.end = next((special[text] for text in ENDS if text in special), None)
        self._literal = {number: token.content.encode("utf-8", "replace") for number, token in added.items()}
        self._byte_level = isinstance(self._library.decoder, tokenizers.decoders.ByteLevel)
        self._byte_ids = _byte_ids(vocabulary, self._byte_level)
        with _readable(name):  # whatever is wrong with it shows now, not in the middle of a run
            self.decode(self.encode("Now, 1 caf\u00e9\n\n of the \U0001f600s.  "))

    def decode_bytes(self, ids: Sequence[int] | NDArray[Any]) -> bytes:
        """See `Tokenizer.decode_bytes`."""
        array = as_ids(ids, self.vocab_size)
        if self._byte_level:
            return b"".join([self._token_bytes[i] for i in array])
        with _readable(self._name):
            return str(self._library.decode(array.tolist(), skip_special_tokens=False)).encode("utf-8")

    def decoder(self) -> TextDecoder:
        """See `Tokenizer.decoder`."""
        if self._byte_level:
            return Utf8Decoder(self.decode_bytes)
        runs = set() if self._byte_ids is None else set(self._byte_ids.tolist())
        return WindowDecoder(self.decode, runs.__contains__)

    def _encode(self, texts: list[str]) -> list[Int32]:
        with _readable(self._name):
            encodings = self._library.encode_batch_fast(texts, add_special_tokens=False)
        out = [np.array(encoding.ids, np.int64) for encoding in encodings]
        for ids in out:  # an id that get_vocab does not know would reach the model
            as_ids(ids, self.vocab_size)
        return [ids.astype(np.int32) for ids in out]

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        """What each id stands for, of a byte-level tokenizer."""
        byte_of = {char: byte for byte, char in enumerate(_byte_alphabet())}
        out = []
        for number in range(self.vocab_size):
            token = self._library.id_to_token(number) or ""
            plain = number not in self._literal and all(char in byte_of for char in token)
            literal = self._literal.get(number, token.encode("utf-8", "replace"))
            out.append(bytes(byte_of[char] for char in token) if plain else literal)
        return out


def _byte_alphabet() -> list[str]:
    """Return the character that byte-level tokenizers write for each byte, GPT-2's table."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in kept else next(others)) for byte in range(256)]


def _byte_ids(vocabulary: dict[str, int], byte_level: bool) -> Int32 | None:
    """Return the id of each single byte [256], None where the vocabulary does not have them all."""
    names = _byte_alphabet() if byte_level else [f"<0x{byte:02X}>" for byte in range(256)]
    ids = [vocabulary.get(name, -1) for name in names]
    return None if min(ids) < 0 else np.array(ids, np.int32)


@contextmanager
def _readable(name: str | os.PathLike[str]) -> Iterator[None]:
    """Turn whatever the library raises into a ValueError: its panics are no `Exception`."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ValueError(f"{name}: expected a tokenizer that can be used, got: {error}") from error
        raise
