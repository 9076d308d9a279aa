"""Making a tokenizer from the user's own text: byte-level BPE by the `tokenizers` library, without a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from neurogen_cy.pieces import pieces
from neurogen_cy.sources import Source
from neurogen_cy.tokenization import ByteTokenizer
from neurogen_cy.tokenizer_json import ENDS, JsonTokenizer

SMALLEST = 257
"""A token for each byte, and the one that ends a document."""

SHORTEST_MERGE = 2
"""How often a pair must be there to become a token."""


def train_bpe(source: Source, vocab_size: int, progress: Callable[[int], None] | None = None) -> JsonTokenizer:
    """Make a byte-level BPE tokenizer of a text; the same text gives the same one, byte for byte.

    Words are found as GPT-2 finds them, and no token reaches over two. Bytes that are no UTF-8 are not counted (they
    have their tokens all the same).

    Parameters
    ----------
    source : Source
        Read once, piece by piece; in memory are only its distinct words.
    vocab_size : int
        At least `SMALLEST`. A text that does not have as many pairs that repeat gives fewer.
    progress : function, optional
        Called with the bytes read so far.

    Raises
    ------
    ValueError
        If `vocab_size` is too small, or what reading the source raises.
    """
    if vocab_size < SMALLEST:
        raise ValueError(f"expected vocab_size >= {SMALLEST}, one a byte and one to end a document, got {vocab_size}")
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=SHORTEST_MERGE,
        special_tokens=[ENDS[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(_texts(source, progress), trainer)
    return JsonTokenizer(library.to_str().encode("utf-8"), "the new tokenizer")


def _texts(source: Source, progress: Callable[[int], None] | None) -> Iterator[str]:
    seen = False
    for piece in pieces(source.chunks(), ByteTokenizer()):
        seen = True
        yield piece.data.decode("utf-8", "ignore")
        if progress is not None:
            progress(piece.end)
    if not seen:
        raise ValueError(f"expected text in {source.name}, got none")
