"""A text to learn from and one to validate on, as tokens: in memory where small, else in the token cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from neurogen_cy.data import default_corpus, split
from neurogen_cy.tokenization import ByteTokenizer, Tokenizer
from neurogen_cy.tokens import Tokens

Spec = str | os.PathLike[str]
Progress = Callable[[int, int | None], None]
HELD_OUT = 0.1


@dataclass(frozen=True, eq=False)
class Corpus:
    """Tokens to train on and to validate on, and the facts that identify their text.

    Attributes
    ----------
    training, validation : Tokens
    facts : dict
        JSON-able: `name`, `source`, `bytes` and `sha256` of the text, `documents`, and `validation` (the same of its
        own text, None where it is the last tenth).
    """

    training: Tokens
    validation: Tokens
    facts: dict[str, Any]


def open_corpus(
    spec: Spec | None,
    tokenizer: Tokenizer | None = None,
    *,
    validation: Spec | None = None,
    field: str = "text",
    cache: Spec | None = None,
    progress: Progress | None = None,
) -> Corpus:
    """Work in progress: the default corpus by bytes."""
    data, facts = default_corpus()
    training, held = split(data, 1 - HELD_OUT)
    return Corpus(Tokens.of_bytes(training), Tokens.of_bytes(held), facts | {"documents": 1, "validation": None})
