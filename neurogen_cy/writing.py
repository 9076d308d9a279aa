"""What a model writes, as text: decoded as it comes, cut at stop strings, several continuations side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neurogen_cy.generation import FINISHED
from neurogen_cy.model import NeuroGen
from neurogen_cy.tokenization import Tokenizer


class StopStrings:
    """Passes text on until one of the strings comes, and holds back what may be the beginning of one.

    Parameters
    ----------
    stops : sequence of str
        Not empty ones. Of two that begin at the same place, the longer one counts.
    skip_blank : bool
        Drop white space at the very beginning, and stops in it: a turn that begins with a new line is not over.

    Attributes
    ----------
    found : str or None
        The string that came.
    """

    def __init__(self, stops: Sequence[str], skip_blank: bool = False) -> None:
        if not all(stops):
            raise ValueError("stop: expected at least one character, got an empty text")
        self._stops = sorted(stops, key=len, reverse=True)
        self._held = ""
        self._blank = skip_blank
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Return what is certain to stand before any of the strings; nothing any more once one was found."""
        if self.found is not None:
            return ""
        self._held += text
        if self._blank:
            self._held = self._held.lstrip()
            self._blank = not self._held
        places = [(place, stop) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            place, self.found = min(places, key=lambda each: each[0])
            return self._release(place)
        return self._release(len(self._held) - max((self._begun(stop) for stop in self._stops), default=0))

    def finish(self) -> str:
        """Return what was held back, when no more comes."""
        return "" if self.found is not None else self._release(len(self._held))

    def _begun(self, stop: str) -> int:
        """How many of its first characters end the text that is held."""
        return next((n for n in range(len(stop) - 1, 0, -1) if self._held.endswith(stop[:n])), 0)

    def _release(self, count: int) -> str:
        out, self._held = self._held[:count], self._held[count:]
        return out


class Continuation:
    """The text that one stream writes; `stops` and `skip_blank` are those of `StopStrings`.

    Attributes
    ----------
    text : str
        What it has written so far, without the stop string.
    tokens : int
        How many tokens that took, the stop included.
    ending : str
        "tokens" as long as it may go on, the stop string that was found, or "end of document".
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), skip_blank: bool = False) -> None:
        self._decoder = tokenizer.decoder()
        self._end = tokenizer.end
        self._stops = StopStrings(stops, skip_blank)
        self.text = ""
        self.tokens = 0
        self.ending = "tokens"

    @property
    def finished(self) -> bool:
        """Whether it has come to its end before the tokens have."""
        return self.ending != "tokens"

    def push(self, token: int) -> str:
        """Take the next token; return the text that is new, perhaps none."""
        if self.finished or token == FINISHED:
            return ""
        self.tokens += 1
        if token == self._end:
            new = self.finish()
            self.ending = "end of document"
            return new
        return self._say(self._stops.push(self._decoder.push(token)))

    def finish(self) -> str:
        """Return what was held back, when no more tokens come."""
        return "" if self.finished else self._say(self._stops.push(self._decoder.finish()) + self._stops.finish())

    def _say(self, new: str) -> str:
        self.text += new
        if self._stops.found is not None:
            self.ending = self._stops.found
        return new


def write(
    model: NeuroGen, tokenizer: Tokenizer, prompts: Sequence[NDArray[np.int32]], tokens: int,
    continuations: Sequence[Continuation], **sampling: Any,
) -> Iterator[tuple[int, str]]:
    """Continue prompts side by side; yields the number of a continuation and its new text, as it comes.

    Parameters
    ----------
    model : NeuroGen
    tokenizer : Tokenizer
        The model's own; its end of a document ends a continuation.
    prompts : sequence of int32 arrays
    tokens : int
        Most tokens to write after each.
    continuations : sequence of Continuation
        One for each prompt; they keep the texts.
    sampling
        Passed on to `NeuroGen.generate`, which checks everything before the first token.
    """
    stops = () if tokenizer.end is None else (tokenizer.end,)
    drawn = model.generate(list(prompts), tokens, stop_ids=stops, **sampling)

    def pieces() -> Iterator[tuple[int, str]]:
        for ids in drawn:
            for number, (continuation, token) in enumerate(zip(continuations, ids.tolist())):
                if new := continuation.push(token):
                    yield number, new
            if all(continuation.finished for continuation in continuations):
                return
        for number, continuation in enumerate(continuations):
            if new := continuation.finish():
                yield number, new

    return pieces()


def written(model: NeuroGen, tokenizer: Tokenizer, prompt: str | bytes, tokens: int, **sampling: Any) -> str:
    """Return what the model writes after one prompt."""
    one = Continuation(tokenizer)
    for _ in write(model, tokenizer, [tokenizer.encode(prompt)], tokens, [one], **sampling):
        pass
    return one.text


def shown(text: str | bytes) -> str:
    """Return a text as it can be printed: what is no UTF-8 becomes U+FFFD."""
    raw = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
    return raw.decode("utf-8", "replace")
