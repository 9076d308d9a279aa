"""What the command line prints, as text: corpus, validation tables, memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from neurogen_cy.config import Config
from neurogen_cy.ngram import baselines

NGRAM_LIMIT = 50_000_000
"""Longest training text, in bytes, whose n-grams are counted unasked; the time and memory grow with it."""


def size_text(count: int) -> str:
    """Return a number of bytes in the unit that keeps it short, as in "1.5 MB"."""
    power = max(0, min(4, (len(str(count)) - 1) // 3))
    return f"{count / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def corpus_text(facts: Mapping[str, Any], training: bytes, validation: bytes) -> str:
    """Return the lines that say what is read: name, size, hash and split."""
    return (
        f"corpus      {facts['name']} ({facts['source']})\n"
        f"            {facts['bytes']:,} bytes, sha256 {facts['sha256']}\n"
        f"split       the first {len(training):,} bytes to train, the last {len(validation):,} to validate"
    )


def model_text(name: str, config: Config, where: str, streams: int, tokens: int) -> str:
    """Return the line that says what is trained and how wide a step is."""
    neurons = sum(region.neurons for region in config.regions)
    return (
        f"model       {name}: {neurons:,} neurons, {config.weights:,} weights, on {where}, "
        f"{streams} streams x {tokens} tokens a step"
    )


def sentence_of(text: bytes, window: int = 20_000, shortest: int = 40) -> bytes:
    """Return the line near the beginning that is most like a sentence: the largest share of letters and spaces."""
    lines = [line for line in text[:window].split(b"\n") if len(line) >= shortest] or [text[:shortest]]
    return max(lines, key=lambda line: sum(chr(c).isalpha() or c == 32 for c in line.strip()) / len(line))


def ngram_bits(training: bytes, validation: bytes) -> dict[int, float]:
    """Return `{order: bits per byte}` of the 3-, 4- and 5-gram; none for a text above `NGRAM_LIMIT`."""
    return baselines(training, validation) if len(training) <= NGRAM_LIMIT else {}


def ngram_text(bits: Mapping[int, float]) -> str:
    """Return the line of baselines, in bits per byte."""
    if not bits:
        return f"baselines   left out: n-grams are counted on at most {size_text(NGRAM_LIMIT)} of text"
    values = ", ".join(f"{order}-gram {value:.3f}" for order, value in sorted(bits.items()))
    return f"baselines   {values} bits per byte (Witten-Bell, same split)"


def validation_table(name: str, nats: float, ngrams: Mapping[int, float]) -> str:
    """Return a table of validation figures, the best first.

    Parameters
    ----------
    name : str
        What the model is called in it.
    nats : float
        Its loss, nats per byte.
    ngrams : {order: bits per byte}
        What stands beside it.
    """
    rows = [(f"{order}-gram (Witten-Bell)", bits) for order, bits in ngrams.items()]
    rows.append((name, nats / math.log(2)))
    width = max(len("validation"), *(len(row) for row, _ in rows))
    lines = [f"{'validation':{width}}  bits/byte  nats/byte  perplexity"]
    for row, bits in sorted(rows, key=lambda item: item[1]):
        lines.append(f"{row:{width}}  {bits:9.4f}  {bits * math.log(2):9.4f}  {2**bits:10.3f}")
    return "\n".join(lines)
