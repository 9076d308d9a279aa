"""SentencePiece models, by the `sentencepiece` package (the extra of that name)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neurogen_cy.text_decoders import TextDecoder, WindowDecoder
from neurogen_cy.tokenization import FILES, MAX_VOCABULARY, Int32, TextTokenizer, as_ids


class SentencePieceTokenizer(TextTokenizer):
    """A SentencePiece `.model`. Its own rules hold: most of them change white space.

    Parameters
    ----------
    raw : bytes
        Content of the model file.
    name : path
        For messages.

    Raises
    ------
    ModuleNotFoundError
        If `sentencepiece` is not installed.
    ValueError
        If it is no such model, or its vocabulary is empty or too large.
    """

    kind = "sentencepiece"
    file = FILES["sentencepiece"]

    def __init__(self, raw: bytes, name: str | os.PathLike[str]) -> None:
        try:
            import sentencepiece
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{name}: expected the package sentencepiece for this tokenizer, got none: "
                "pip install 'neurogen_cy[sentencepiece]' or pip install sentencepiece"
            ) from error
        self.raw, self._name = raw, name
        self.sha256 = hashlib.sha256(raw).hexdigest()
        try:
            self._library = sentencepiece.SentencePieceProcessor(model_proto=raw)
            self.vocab_size = int(self._library.vocab_size())
            if not 1 <= self.vocab_size <= MAX_VOCABULARY:
                raise ValueError(f"expected 1 to {MAX_VOCABULARY:,} tokens, got {self.vocab_size:,}")
            byte_ids = [self._library.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
            fallback = all(self._library.is_byte(i) for i in byte_ids)
            self._byte_ids = np.array(byte_ids, np.int32) if fallback else None
            self.decode(self.encode("Now, 1 caf\u00e9\n\n of the \U0001f600s.  "))
        except Exception as error:
            raise ValueError(f"{name}: expected a SentencePiece model that can be used, got: {error}") from error
        end = int(self._library.eos_id())
        self.end = end if end >= 0 else None

    def decode_bytes(self, ids: Sequence[int] | NDArray[Any]) -> bytes:
        """See `Tokenizer.decode_bytes`."""
        return str(self._library.decode(as_ids(ids, self.vocab_size).tolist())).encode("utf-8")

    def decoder(self) -> TextDecoder:
        """See `Tokenizer.decoder`."""
        return WindowDecoder(self.decode, lambda _: False)

    def _encode(self, texts: list[str]) -> list[Int32]:
        return [np.array(ids, np.int32) for ids in self._library.encode(texts, out_type=int)]
