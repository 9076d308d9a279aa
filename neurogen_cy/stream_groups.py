"""Gradient accumulation: groups of streams that take turns in one model.

A step of N groups of B streams reads what one of N * B streams reads. Each group has a neuron state of its own, kept
on the host while the others run; gradients add up over the groups and are applied once. Forward and state are the
same bits as those of the one big call. Weight gradients are the same sums, added in another order: equal within
rounding, not bit for bit. Two terms depend on the grouping by what they are: homeostasis is of a call's own rates (the
mean over the groups stands in for the whole), and dropout draws other masks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neurogen_cy.model import NeuroGen
from neurogen_cy.results import StepResult

State = dict[str, NDArray[np.float32]]


class StreamGroups:
    """`model.accumulate` groups of `model.streams` streams, all from zero state unless there is only one.

    One group is the model itself: its own state, and `train_step_batch`.
    """

    def __init__(self, model: NeuroGen) -> None:
        self._model = model
        self._states: list[State] = []
        if model.accumulate > 1:
            zero = {key: np.zeros_like(a) for key, a in model.state().items()}
            self._states = [zero] * model.accumulate

    @property
    def streams(self) -> int:
        """Streams of all groups."""
        return self._model.streams * self._model.accumulate

    def train_step(self, ids: NDArray[Any], targets: NDArray[Any], resets: NDArray[Any], lr: float) -> StepResult:
        """One optimizer step on `[streams, T]` tokens, in as many calls as there are groups.

        All states advance or none: where `model.skipped` has grown, or the call raises, nothing was learnt.
        """
        model = self._model
        if not self._states:
            return model.train_step_batch(ids, targets, resets=resets, lr=lr)
        skipped = model.skipped
        results: list[StepResult] = []
        states: list[State] = []
        for number, state in enumerate(self._states):
            part = slice(number * model.streams, (number + 1) * model.streams)
            model.load_state(state)
            results.append(
                model.backward_batch(
                    ids[part], targets[part], resets=resets[part], accumulate=number > 0, divisor=ids.size
                )
            )
            if model.skipped > skipped:
                return results[-1]
            states.append(model.state())
        norm = model.optimizer_step(lr)
        if model.skipped == skipped:
            self._states = states
        return _whole(results, norm)

    def state(self) -> State:
        """Neuron state of all streams, as `NeuroGen.state` of a model of so many would give it."""
        if not self._states:
            return self._model.state()
        return {key: np.concatenate([state[key] for state in self._states]) for key in self._states[0]}

    def load_state(self, values: Mapping[str, NDArray[np.float32]]) -> None:
        """Put back what `state` gave, under whichever grouping.

        Raises
        ------
        TypeError, ValueError
            If an array does not fit; nothing changes.
        """
        width = self._model.streams
        for key, array in values.items():
            if len(array) != self.streams:
                raise ValueError(f"state: {key}: expected {self.streams} streams, got {len(array)}")
        states = [
            {key: np.ascontiguousarray(a[first : first + width]) for key, a in values.items()}
            for first in range(0, self.streams, width)
        ]
        for state in states:  # each is checked against the model's shapes
            self._model.load_state(state)
        if self._states:
            self._states = states


def _whole(results: list[StepResult], grad_norm: float) -> StepResult:
    """The result of the one step that these parts are; losses and homeostasis are shares already."""
    tokens = sum(result.tokens for result in results)
    return StepResult(
        loss=sum(result.loss for result in results),
        homeostasis=sum(result.homeostasis for result in results),
        accuracy=sum(result.accuracy * result.tokens for result in results) / tokens,
        tokens=tokens,
        grad_norm=grad_norm,
        rates={name: sum(r.rates[name] for r in results) / len(results) for name in results[0].rates},
    )
