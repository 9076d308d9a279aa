"""A conversation: what was said, and the neuron state of the brain that has heard it. There is no other memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from neurogen_cy.model import NeuroGen
from neurogen_cy.tokenization import Tokenizer
from neurogen_cy.writing import Continuation, write

_KIND = "neurogen_cy conversation"


class Conversation:
    """Talks with a model of one stream, whose own state it carries on from line to line.

    Parameters
    ----------
    model : NeuroGen
        With `streams` 1; its state is cleared.
    tokenizer : Tokenizer
    stops : sequence of str
        What ends the model's turn, once it has said something.
    tokens : int
        Most tokens of one turn.
    seed : int
        Each turn draws anew from it.
    sampling
        `temperature`, `top_k`, `top_p`, `greedy` of `NeuroGen.generate`; `temperature` may be changed.
    """

    def __init__(
        self, model: NeuroGen, tokenizer: Tokenizer, stops: Sequence[str], tokens: int, seed: int, **sampling: Any
    ) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._stops, self._tokens, self._seed = stops, tokens, seed
        self.sampling = sampling
        self.said: list[tuple[str, str]] = []
        """Turns: what the model heard, and what it answered."""
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.said = []
        self._model.brain.reset()

    def answer(self, heard: str) -> Iterator[str]:
        """Hear a text, then yield the answer as it is written. Whoever stops listening has the state of that moment."""
        seed = (self._seed + len(self.said)) % 2**64
        one = Continuation(self._tokenizer, self._stops, skip_blank=True)
        ids = self._tokenizer.encode(heard)
        pieces = write(self._model, self._tokenizer, [ids], self._tokens, [one], carry=True, seed=seed, **self.sampling)
        self.said.append((heard, ""))
        for _, new in pieces:
            self.said[-1] = heard, one.text
            yield new

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the turns and the neuron state as one safetensors file, which replaces another one at once.

        Raises
        ------
        OSError
            If it cannot be written; what was there stays.
        """
        target = Path(path)
        beside = target.with_name(f".{target.name}.tmp-{os.getpid()}")
        facts = {"kind": _KIND, "said": json.dumps(self.said)}
        try:
            save_file(self._model.state(), beside, facts)
            with beside.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(beside, target)
        except SafetensorError as error:
            raise OSError(f"{path}: expected to write the conversation, got: {error}") from error
        finally:
            beside.unlink(missing_ok=True)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on with a conversation that `save` wrote.

        Raises
        ------
        ValueError, OSError
            If it is none, or another model's; the present one stays.
        """
        try:
            with safe_open(path, framework="np") as file:
                facts = file.metadata() or {}
                state = {key: file.get_tensor(key) for key in file.keys()}
            said = [(str(heard), str(answer)) for heard, answer in json.loads(facts["said"])]
            if facts.get("kind") != _KIND:
                raise ValueError(f"got kind {facts.get('kind')!r}")
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: expected a conversation, got: {error!r}") from error
        if not all(np.isfinite(array).all() for array in state.values()):
            raise ValueError(f"{path}: expected finite neuron state, got NaN or infinity")
        try:
            self._model.load_state(state)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: expected a conversation with this model: {error}") from error
        self.said = said
