"""What the command line prints, as text: corpus, validation tables, memory."""

from __future__ import annotations

import math
from collections.abc import Mapping

from neurogen_cy.corpus import Corpus
from neurogen_cy.model import NeuroGen
from neurogen_cy.ngram import baselines
from neurogen_cy.tokenization import Tokenizer
from neurogen_cy.tokens import Tokens

NGRAM_LIMIT = 50_000_000
"""Longest training text, in bytes, whose n-grams are counted unasked; the time and memory grow with it."""


def size_text(count: int) -> str:
    """Return a number of bytes in the unit that keeps it short, as in "1.5 MB"."""
    power = max(0, min(4, (len(str(count)) - 1) // 3))
    return f"{count / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def corpus_text(corpus: Corpus, tokenizer: Tokenizer) -> str:
    """Return the lines that say what is read: name, size, hash, split and tokens."""
    facts, training, validation = corpus.facts, corpus.training, corpus.validation
    if held := facts.get("validation"):
        split = f"all of it to train, the {validation.text_bytes:,} bytes of {held['name']} to validate"
    else:
        split = f"the first {training.text_bytes:,} bytes to train, the last {validation.text_bytes:,} to validate"
    lines = [
        f"corpus      {facts['name']} ({facts['source']})",
        f"            {facts['bytes']:,} bytes, sha256 {facts['sha256']}",
        f"split       {split}",
    ]
    if tokenizer.kind != "bytes":
        lines.append(
            f"tokens      {tokenizer.kind}, {tokenizer.vocab_size:,} of them; {len(training):,} to train, "
            f"{training.text_bytes / max(1, len(training)):.2f} bytes each"
        )
    return "\n".join(lines)


def model_text(name: str, model: NeuroGen) -> str:
    """Return the line that says what is trained and how wide a step is."""
    config = model.config
    groups = "" if model.accumulate == 1 else f"{model.accumulate} x "
    neurons = sum(region.neurons for region in config.regions)
    return (
        f"model       {name}: {neurons:,} neurons, {config.weights:,} weights, on {model.backend}, "
        f"{model.precision}, {groups}{model.streams} streams x {model.max_tokens} tokens a step"
    )


def sentence_of(text: bytes, window: int = 20_000, shortest: int = 40) -> bytes:
    """Return the line near the beginning that is most like a sentence: the largest share of letters and spaces."""
    lines = [line for line in text[:window].split(b"\n") if len(line) >= shortest] or [text[:shortest]]
    return max(lines, key=lambda line: sum(chr(c).isalpha() or c == 32 for c in line.strip()) / len(line))


def ngram_bits(text: tuple[bytes, bytes] | None) -> dict[int, float]:
    """Return `{order: bits per byte}` of the 3-, 4- and 5-gram on a training and a validation text.

    None of them for no text, or one above `NGRAM_LIMIT`.
    """
    return baselines(*text) if text is not None and len(text[0]) <= NGRAM_LIMIT else {}


def ngram_text(bits: Mapping[int, float]) -> str:
    """Return the line of baselines, in bits per byte."""
    if not bits:
        return f"baselines   left out: n-grams are counted on at most {size_text(NGRAM_LIMIT)} of text"
    values = ", ".join(f"{order}-gram {value:.3f}" for order, value in sorted(bits.items()))
    return f"baselines   {values} bits per byte (Witten-Bell, same split)"


def ngram_rows(bits: Mapping[int, float]) -> dict[str, float]:
    """Return the rows that baselines have in `validation_table`."""
    return {f"{order}-gram (Witten-Bell)": value for order, value in bits.items()}


def validation_table(rows: Mapping[str, float]) -> str:
    """Return a table of validation figures, the best first: bits per byte by what they are of."""
    width = max(len("validation"), *(len(row) for row in rows))
    lines = [f"{'validation':{width}}  bits/byte  nats/byte  perplexity"]
    for row, bits in sorted(rows.items(), key=lambda item: item[1]):
        lines.append(f"{row:{width}}  {bits:9.4f}  {bits * math.log(2):9.4f}  {2**bits:10.3f}")
    return "\n".join(lines)


def token_text(nats: float, tokens: Tokens, tokenizer: Tokenizer) -> str:
    """Return the line that says a loss by the token, none for bytes, where the table has it."""
    if tokenizer.kind == "bytes":
        return ""
    return (
        f"\nper token: {nats:.4f} nats, perplexity {math.exp(nats):.2f} "
        f"({tokens.text_bytes / len(tokens):.2f} bytes a token; the table counts bytes)"
    )
