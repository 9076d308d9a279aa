"""A text to learn from and one to validate on, as tokens: in memory where small, else in the token cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neurogen_cy import token_cache
from neurogen_cy.data import SEPARATOR
from neurogen_cy.pieces import HeldOut, Piece, pieces, tokenised
from neurogen_cy.sources import Chunk, Source, Spec, open_source
from neurogen_cy.tokenization import ByteTokenizer, Int32, Tokenizer
from neurogen_cy.tokens import Tokens

Progress = Callable[[int, int | None], None]

TRAINING = 0.9
"""Share of a text to train on, where validation has none of its own: the first."""

IN_MEMORY = 64_000_000
"""Longest text by bytes that needs no cache."""

TEXT_LIMIT = 60_000_000
"""Longest text that `Corpus.text` gives."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokens to train on and to validate on, and the facts that identify their text.

    Attributes
    ----------
    training, validation : Tokens
    whole : Tokens
        The text to learn, before its end was held out.
    facts : dict
        JSON-able: `name`, `source`, `field`, and of the whole text `bytes`, `sha256` (its documents joined by one new
        line) and `documents`; `validation` is the same of its own text, None where it is the end of this one.
    """

    training: Tokens
    validation: Tokens
    facts: dict[str, Any]
    whole: Tokens

    def text(self) -> tuple[bytes, bytes] | None:
        """Return the text of both parts, documents joined by one new line; None where it is too long for memory.

        Raises
        ------
        ValueError
            If the source has changed since it was tokenised.
        """
        own = self.facts["validation"]
        if self.facts["bytes"] + (own["bytes"] if own else 0) > TEXT_LIMIT:
            return None
        if own:
            return _joined(self.facts), _joined(own)
        data = _joined(self.facts)
        return data[: self.training.text_bytes], data[self.training.text_bytes :]


def open_corpus(
    spec: Spec | None = None,
    tokenizer: Tokenizer | None = None,
    *,
    validation: Spec | None = None,
    field: str = "text",
    cache: Spec | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """Open a text and have it as tokens.

    Without a text for validation the last tenth of this one is held out: of its bytes, so that it is the same text
    whatever the tokenizer. It begins with a document where one begins shortly before (within 5 % of the text).

    Parameters
    ----------
    spec, validation : path or str, optional
        See `sources.open_source`; None is the default corpus, and no validation text of its own.
    tokenizer : Tokenizer, optional
        Bytes by default.
    field : str
        Of a `.jsonl` record or one of a data set: where its text is.
    cache : path, optional
        Folder of token caches; see `token_cache.folder`. Small texts by bytes need none.
    progress : function, optional
        Called with the bytes tokenised so far and those in all, None where that is not known.

    Raises
    ------
    OSError, ValueError
        If a text cannot be read or held by the tokenizer, or is too short to hold a part of it out.
    ModuleNotFoundError
        If it takes a package that is not installed; the message has the pip command.
    """
    tokenizer = tokenizer or ByteTokenizer()
    root = token_cache.folder() if cache is None else Path(cache)
    source = open_source(spec, field)
    tokens, facts = _tokens(source, tokenizer, validation is None, root, field, progress)
    if validation is None:
        training, held = _divided(tokens)
        return Corpus(training, held, facts | {"validation": None}, tokens)
    held, own = _tokens(open_source(validation, field), tokenizer, False, root, field, progress)
    return Corpus(tokens, held, facts | {"validation": own}, tokens)


def open_same_corpus(
    facts: Mapping[str, Any], tokenizer: Tokenizer | None = None, *, spec: Spec | None = None,
    validation: Spec | None = None, cache: Spec | None = None, progress: Progress | None = None,
) -> Corpus:  # fmt: skip
    """Open the text with these facts, a checkpoint's, from where they say or from `spec` and `validation`.

    Raises
    ------
    ValueError
        If the text there is another one; else as `open_corpus`.
    """
    own = facts.get("validation")
    if validation is not None and own is None:
        raise ValueError("expected no text for validation, as this run holds out the end of its own, got one")
    corpus = open_corpus(
        facts["source"] if spec is None else spec, tokenizer, field=facts.get("field", "text"), cache=cache,
        validation=own["source"] if own and validation is None else validation, progress=progress,
    )  # fmt: skip
    expect_same_text(facts, corpus.facts)
    if own:
        expect_same_text(own, corpus.facts["validation"])
    return corpus


def expect_same_text(saved: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise ValueError unless both facts are of the same text."""
    if saved["sha256"] != found["sha256"]:
        raise ValueError(
            f"expected the text that was trained on ({saved['name']}, {saved['bytes']} bytes, sha256 "
            f"{saved['sha256']}), got {found['name']}, {found['bytes']} bytes, sha256 {found['sha256']}"
        )


def _tokens(
    source: Source, tokenizer: Tokenizer, hold_out: bool, root: Path, field: str, progress: Progress | None
) -> tuple[Tokens, dict[str, Any]]:
    """Return a whole text as tokens, and its facts."""
    about = {"name": source.name, "source": source.place, "field": field}
    digest = hashlib.sha256()
    if isinstance(tokenizer, ByteTokenizer) and source.at_most() <= IN_MEMORY:
        tokens = _in_memory(source, digest)
        return tokens, about | _facts(tokens, digest.hexdigest())

    def rows() -> Iterator[tuple[Piece, Int32]]:
        total = source.size(read=hold_out)
        held_out = HeldOut(total, int(total * TRAINING)) if hold_out and total is not None else None
        cut = pieces(_hashed(source.chunks(), digest), tokenizer, held_out)
        for piece, ids in tokenised(cut, tokenizer):
            yield piece, ids
            if progress is not None:
                progress(piece.end, total)

    identity = {"source": source.place, "field": field, "tokenizer": tokenizer.to_dict(), "held_out": hold_out}
    cache = token_cache.TokenCache(root, identity, source.manifest(), tokenizer.vocab_size)
    tokens, facts = cache.open_or_make(rows, lambda: {"sha256": digest.hexdigest()})
    return tokens, about | _facts(tokens, facts["sha256"])


def _facts(tokens: Tokens, sha256: str) -> dict[str, Any]:
    return {"bytes": tokens.text_bytes, "sha256": sha256, "documents": len(tokens.starts)}


def _in_memory(source: Source, digest: Any) -> Tokens:
    """Return a text as bytes that are tokens."""
    parts: list[bytes] = []
    starts: list[int] = []
    size = 0
    for chunk in _hashed(source.chunks(), digest):
        if chunk.first:
            starts.append(size)
            if size:
                parts.append(SEPARATOR)
                size += len(SEPARATOR)
        parts.append(chunk.data)
        size += len(chunk.data)
    if not size:
        raise ValueError(f"expected text in {source.name}, got none")
    return Tokens.of_bytes(b"".join(parts), np.array(starts, np.int64))


def _hashed(chunks: Iterable[Chunk], digest: Any) -> Iterator[Chunk]:
    """Hand chunks on; `digest` gets the whole text, documents joined by one new line."""
    begun = False
    for chunk in chunks:
        if chunk.first and begun:
            digest.update(SEPARATOR)
        digest.update(chunk.data)
        begun = True
        yield chunk


def _divided(tokens: Tokens) -> tuple[Tokens, Tokens]:
    """Cut off what is held out for validation."""
    total = tokens.text_bytes
    held_out = HeldOut(total, int(total * TRAINING))
    row = int(np.searchsorted(tokens.pieces[:, 1], held_out.target, "right")) - 1
    token, byte = (int(n) for n in tokens.pieces[row])
    start = int(tokens.starts[int(np.searchsorted(tokens.starts, token, "right")) - 1])
    before = int(tokens.pieces[int(np.searchsorted(tokens.pieces[:, 0], start)), 1])
    if held_out.near(before):
        token, byte = start, before
    elif tokens.unit == "bytes":
        token = byte = held_out.target
    if not 0 < token < len(tokens):
        raise ValueError(
            f"expected a text long enough to hold the end of it out for validation, got {total} bytes: "
            f"give a longer one, or a text to validate on"
        )
    return tokens.part(0, token, 0, byte), tokens.part(token, len(tokens), byte, total - byte)


def _joined(facts: Mapping[str, Any]) -> bytes:
    """Return the whole text with these facts."""
    digest = hashlib.sha256()
    text = _in_memory(open_source(facts["source"], facts["field"]), digest).ids.tobytes()
    expect_same_text(facts, dict(facts) | {"sha256": digest.hexdigest(), "bytes": len(text)})
    return text
