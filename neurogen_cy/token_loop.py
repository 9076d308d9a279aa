"""Training token by token, the way it was done before: kept to be measured against the batched step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from neurogen_cy.evaluation import token_ids
from neurogen_cy.results import StepResult

if TYPE_CHECKING:
    from neurogen_cy.model import NeuroGen


def train_step(model: NeuroGen, ids: Any, targets: Any) -> StepResult:
    """See `NeuroGen.train_step`."""
    ids, targets = _columns(model, ids, "ids"), _columns(model, targets, "targets")
    if ids.shape != targets.shape:
        raise ValueError(f"targets: expected shape {ids.shape}, got {targets.shape}")
    with model._alone():
        steps = zip(ids.T.copy(), targets.T.copy())
        results = [_token_step(model, now, wanted) for now, wanted in steps]

    def mean(name: str) -> float:
        return float(np.mean([getattr(result, name) for result in results]))

    rates = {name: float(np.mean([result.rates[name] for result in results])) for name in results[0].rates}
    return StepResult(mean("loss"), mean("homeostasis"), mean("accuracy"), ids.size, mean("grad_norm"), rates)


def _columns(model: NeuroGen, tokens: Any, name: str) -> NDArray[Any]:
    array = token_ids(model, tokens, name)
    array = array[None] if array.ndim == 1 and model.streams == 1 else array
    if array.ndim != 2 or array.shape[0] != model.streams or array.shape[1] == 0:
        raise ValueError(f"{name}: expected shape [{model.streams}, T], got {array.shape}")
    return array


def _token_step(model: NeuroGen, ids: NDArray[Any], targets: NDArray[Any]) -> StepResult:
    model.brain.step(model.embedding.encode(ids), hold=True)
    said = np.empty(model.streams, np.int32)
    model.decoder.sample_into(model.brain.broca_output(), said, greedy=True)
    result, finite = model._result(model._engine.learn_held(ids, targets, model._update()))
    model._guard(finite, f"loss {result.loss}, gradient norm {result.grad_norm}")
    model.step += finite
    return result
