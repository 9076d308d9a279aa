"""A check of this installation on this machine: gradients, bits, checkpoints, learning, speed; and a verdict.

Every check makes its own small models and compares them with something that could differ: gradients with the float64
oracle (reference.py), a run with the same run again, on other threads, over a checkpoint, on the other backend. None
needs a network, a text or a GPU.
"""

from __future__ import annotations

import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neurogen_cy import backend as backends
from neurogen_cy import persistence, reference
from neurogen_cy._version import __version__
from neurogen_cy.checkpoint import CheckpointError
from neurogen_cy.config import Config, Projection, Region
from neurogen_cy.connectome import initial_parameters
from neurogen_cy.model import NeuroGen
from neurogen_cy.selftest_speed import measure_speed

LOSS, GRADIENT = 1e-5, 1e-4
"""Largest differences from the oracle, in float32: of the loss, and of a gradient as a share of its largest value."""
MARGIN = 1e-4
"""A neuron closer to its threshold than that may fire or not by rounding alone: such a case is drawn again."""
B, T, V = 3, 10, 29

CONFIG = Config(
    V, 64,
    regions=(Region("low", 64, 0), Region("middle", 96, 1), Region("high", 64, 2)),
    projections=(
        Projection("embedding", "low"), Projection("embedding", "high", kind="gate"),
        Projection("low", "middle", density=0.5), Projection("low", "high", kind="gate"),
        Projection("middle", "high"), Projection("middle", "middle", delay=1), Projection("high", "low", delay=3),
        Projection("middle", "broca_out", density=0.5), Projection("high", "broca_out"),
    ),
    max_spike=4.0,
)  # fmt: skip
CONFIGS = {
    "graded spikes": CONFIG,
    "binary spikes": replace(CONFIG, graded=False),
    "tied decoder": replace(CONFIG, tie_decoder=True),
}


@dataclass
class Check:
    """What one check came to. `passed` is None where it could not be made here."""

    name: str
    passed: bool | None
    detail: str
    values: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def run(run_on: dict[str, Any], seconds: float = 20.0, report: Callable[[Check], None] | None = None) -> dict[str, Any]:
    """Make all checks.

    Parameters
    ----------
    run_on : dict
        `backend`, `device`, `precision` and `threads`, as NeuroGen takes them.
    seconds : float
        For the measurement of speed; the other checks take about as long as they need.
    report : function, optional
        Called with each check when it is done.

    Returns
    -------
    dict
        `passed`; `checks`, a list of name, passed, detail, values and seconds; and what it ran on. JSON-able.

    Raises
    ------
    ValueError, RuntimeError
        If there is no such backend, device or precision here.
    """
    name, module = backends.load(run_on.get("backend", "auto"))
    settings = {**run_on, "backend": name}
    NeuroGen(CONFIG, **settings)  # refuses what cannot be
    exact = {**settings, "precision": "fp32"}
    steps: dict[str, Callable[[], Check]] = {
        **{f"gradients, {kind}": partial(_gradients, cfg, exact) for kind, cfg in CONFIGS.items()},
        "two runs": partial(_two_runs, settings),
        "threads": partial(_threads, settings),
        "checkpoint": partial(_checkpoint, settings),
        "damaged checkpoint": partial(_damage, settings),
        "CPU and GPU": partial(_backends, exact),
        "learning": partial(_learning, settings),
        "speed": partial(_speed, settings, seconds),
    }
    checks = []
    for title, step in steps.items():
        begin = time.perf_counter()
        try:
            check = step()
        except Exception as error:  # whatever it is, it is the answer
            check = Check("", False, f"{type(error).__name__}: {error}")
        check.name, check.seconds = title, round(time.perf_counter() - begin, 2)
        checks.append(check)
        if report is not None:
            report(check)
    return {
        "passed": all(check.passed is not False for check in checks),
        "checks": [asdict(check) for check in checks],
        "neurogen_cy": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "backend": name,
        "device": module.describe(run_on.get("device", 0)),
    }


def _batches(count: int, streams: int = B, tokens: int = T) -> Iterator[tuple[NDArray[Any], ...]]:
    """(ids, targets, weights, resets) of `count` calls."""
    for number in range(count):
        rng = np.random.default_rng(number)
        ids, targets = rng.integers(0, V, (2, streams, tokens), np.int32)
        yield ids, targets, rng.random((streams, tokens), np.float32), rng.random((streams, tokens)) < 0.1


def _model(cfg: Config, settings: dict[str, Any], **more: Any) -> NeuroGen:
    return NeuroGen(cfg, **{"streams": B, "max_tokens": T, "seed": 3, **settings, **more})


def _bits(model: NeuroGen) -> dict[str, bytes]:
    """Everything that the next step depends on."""
    moments = model._engine.moments()
    arrays = {**model.parameters(), **model.state()}
    arrays |= {f"{key}.{i}": view for key, pair in moments.items() for i, view in enumerate(pair)}
    bits = {key: persistence._host(array).tobytes() for key, array in arrays.items()}
    return {**bits, "counters": repr((model.step, model.calls, model.skipped)).encode()}


def _differences(one: NeuroGen, other: NeuroGen) -> list[str]:
    a, b = _bits(one), _bits(other)
    return sorted(key for key in a | b if a.get(key) != b.get(key))


def _same(what: str, one: NeuroGen, other: NeuroGen) -> Check:
    different = _differences(one, other)
    if different:
        return Check("", False, f"{what}: other bits in {len(different)} arrays, such as {different[0]}")
    return Check("", True, f"{what}: every bit of {len(_bits(one))} arrays equal")


def _nearest(us: list[NDArray[Any]]) -> float:
    """How near any neuron came to its threshold, or to the bound of its spike."""
    bound = reference.largest_spike(CONFIG) - 1.0
    return float(min(min(np.abs(u).min(), np.abs(u - bound).min()) for u in us))


def _gradients(cfg: Config, settings: dict[str, Any]) -> Check:
    ids, targets, weights, resets = next(_batches(1))
    for seed in range(100):
        values = initial_parameters(cfg, seed)
        expected = reference.forward_backward(cfg, values, ids, targets, weights, resets)
        near = _nearest(list(expected.u.values()))
        if near >= MARGIN:
            break
    model = _model(cfg, settings, _parameters=values)
    result = model.backward_batch(ids, targets, weights, resets)
    loss = abs(result.loss / expected.loss - 1.0)
    largest = max(np.abs(gradient).max() for gradient in expected.gradients.values())
    worst, where = 0.0, ""
    for key, view in model.gradients().items():
        gradient = expected.gradients[key]
        difference = float(np.abs(view.numpy() - gradient).max() / max(np.abs(gradient).max(), 1e-7 * largest))
        if not difference <= worst:
            worst, where = difference, key
    return Check(
        "", bool(near >= MARGIN and loss <= LOSS and worst <= GRADIENT),
        f"loss within {loss:.1e}, {len(expected.gradients)} gradients within {worst:.1e} of float64 NumPy ({where})",
        {"loss": loss, "gradient": worst, "seed": seed},
    )  # fmt: skip


def _two_runs(settings: dict[str, Any]) -> Check:
    cfg = replace(CONFIG, dropout=0.2)
    models = [_model(cfg, settings) for _ in range(2)]
    for model in models:
        for call in _batches(20):
            model.train_step_batch(*call)
    return _same("20 steps twice", *models)


def _threads(settings: dict[str, Any]) -> Check:
    if settings["backend"] != "cpu":
        return Check("", None, "the GPU has its own")
    for streams in (1, 4):
        models = [_model(CONFIG, {**settings, "threads": count}, streams=streams, max_tokens=48) for count in (1, 2)]
        for model in models:
            for call in _batches(5, streams, 48):
                model.train_step_batch(*call)
        check = _same("1 and 2 threads, 1 and 4 streams", *models)
        if not check.passed:
            break
    return check


def _checkpoint(settings: dict[str, Any]) -> Check:
    cfg, calls = replace(CONFIG, dropout=0.2), list(_batches(12))
    straight, first = _model(cfg, settings), _model(cfg, settings)
    for number, call in enumerate(calls):
        straight.train_step_batch(*call)
        if number < 6:
            first.train_step_batch(*call)
    with tempfile.TemporaryDirectory() as folder:
        first.save(Path(folder, "last"))
        second = NeuroGen.load(Path(folder, "last"), **settings)
    for call in calls[6:]:
        second.train_step_batch(*call)
    return _same("saved, loaded and continued, beside never stopped", straight, second)


def _damage(settings: dict[str, Any]) -> Check:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "last")
        _model(CONFIG, settings).save(place)
        names = sorted(path.name for path in place.iterdir())
        for name in names:
            data = (place / name).read_bytes()
            changed = bytearray(data)
            changed[len(data) // 2] ^= 1
            (place / name).write_bytes(changed)
            try:
                NeuroGen.load(place, **settings)
            except CheckpointError:
                (place / name).write_bytes(data)
            else:
                return Check("", False, f"a changed bit in {name} was not noticed")
        NeuroGen.load(place, **settings)
    return Check("", True, f"a changed bit in any of {len(names)} files is refused")


def _backends(settings: dict[str, Any]) -> Check:
    reason = backends.available()["cuda"]
    if reason is not None:
        return Check("", None, f"no GPU to compare with: {reason}")
    ids, targets, weights, resets = next(_batches(1))
    other = {"backend": "cpu" if settings["backend"] == "cuda" else "cuda", "precision": "fp32"}
    for seed in range(100):  # as in _gradients: where rounding alone decides a spike there is nothing to compare
        models = [_model(CONFIG, chosen, seed=seed) for chosen in (settings, other)]
        results = [model.backward_batch(ids, targets, weights, resets, record=True) for model in models]
        u = [model.recorded(region.name)[0] for model in models for region in CONFIG.regions]
        if _nearest(u) >= MARGIN:
            break
    one, two = (
        {key: persistence._host(view).astype(np.float64) for key, view in model.gradients().items()} for model in models
    )
    largest = max(np.abs(gradient).max() for gradient in one.values())
    worst = max(float(np.abs(a - two[key]).max() / max(np.abs(a).max(), 1e-7 * largest)) for key, a in one.items())
    loss = abs(results[0].loss / results[1].loss - 1.0)
    return Check(
        "", bool(loss <= LOSS and worst <= GRADIENT), f"loss within {loss:.1e}, gradients within {worst:.1e}",
        {"loss": loss, "gradient": worst},
    )  # fmt: skip


def _learning(settings: dict[str, Any]) -> Check:
    """Thirty tokens over and over, heard by four streams at four places of it."""
    text = np.random.default_rng(2).permutation(V)[np.arange(4 * 1000) % 30 % V].astype(np.int32)
    model = _model(CONFIG, settings, streams=4, max_tokens=30)
    losses = []
    for step in range(100):
        rows = np.stack([np.roll(text, -7 * stream)[step * 30 : step * 30 + 31] for stream in range(4)])
        losses.append(model.train_step_batch(rows[:, :-1].copy(), rows[:, 1:].copy(), lr=1e-2).loss)
    first, last = losses[0], losses[-1]
    return Check(
        "", bool(np.isfinite(last) and last < 0.25 * first), f"loss {first:.2f} to {last:.3f} nats in 100 steps",
        {"first": first, "last": last},
    )  # fmt: skip


def _speed(settings: dict[str, Any], seconds: float) -> Check:
    speed = measure_speed(settings, seconds)
    return Check("", speed.passed, speed.detail, asdict(speed))
