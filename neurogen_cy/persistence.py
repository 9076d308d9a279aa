"""What of a model goes into a checkpoint, and how it comes back. The file format is checkpoint.py's."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from neurogen_cy import checkpoint
from neurogen_cy._version import __version__
from neurogen_cy.checkpoint import CheckpointError
from neurogen_cy.config import Config
from neurogen_cy.connectome import BLOCK, parameter_shapes, state_shapes, trainable_keys
from neurogen_cy.optimizer import AdamW
from neurogen_cy.shown import shown
from neurogen_cy.sizes import MAX_COUNT, model_sizes
from neurogen_cy.tokenization import Tokenizer

if TYPE_CHECKING:
    from neurogen_cy.model import NeuroGen

MOMENTS = ("moment1", "moment2")
FACTS = ("config", "optimizer", "nonfinite", "streams", "max_tokens", "seed", "step", "calls", "skipped")
LARGEST_MOMENT = float(np.sqrt(np.finfo(np.float32).max))  # no step is done on a gradient whose square is no float32
Shapes = dict[str, tuple[tuple[int, ...], "np.dtype[Any]"]]


def save(
    model: NeuroGen, directory: str | os.PathLike[str], cursor: Mapping[str, Any] | None,
    extra: Mapping[str, Any] | None, tokenizer: Tokenizer | None = None, state: Mapping[str, Any] | None = None,
) -> None:
    """See `NeuroGen.save`."""
    if tokenizer is not None and tokenizer.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"tokenizer: expected one of {model.config.vocab_size} tokens, as the model has, got {tokenizer.vocab_size}"
        )
    state = model.state() if state is None else dict(state)
    moments = model._engine.moments()
    tensors = {
        "model": {key: _host(view) for key, view in model.parameters().items()},
        "optimizer": {
            f"{key}.{name}": _host(view) for key, pair in moments.items() for name, view in zip(MOMENTS, pair)
        },
        "state": state,
    }
    meta = {
        "versions": {"neurogen_cy": __version__, "numpy": np.__version__},
        "config": model.config.to_dict(),
        "optimizer": asdict(model.optimizer),
        "streams": len(state["broca.o"]),
        "max_tokens": model.max_tokens,
        "seed": model.seed,
        "step": model.step,
        "calls": model.calls,
        "skipped": model.skipped,
        "nonfinite": model.nonfinite,
        "cursor": None if cursor is None else dict(cursor),
        "extra": None if extra is None else dict(extra),
        "tokenizer": None if tokenizer is None else tokenizer.to_dict(),
    }
    checkpoint.write(directory, tensors, meta, None if tokenizer is None else tokenizer.files())


def _host(view: Any) -> Any:
    """The array of a view: its own memory where that is the host's, else a copy."""
    return view.numpy() if hasattr(view, "__cuda_array_interface__") else np.asarray(view)


def load(
    cls: type[NeuroGen], directory: str | os.PathLike[str], backend: str, device: int, streams: int | None,
    max_tokens: int | None, settings: dict[str, Any],
) -> NeuroGen:
    """See `NeuroGen.load`. What the checkpoint holds is checked whole before a model is made of it."""
    tensors, meta = checkpoint.read(directory)
    try:
        if missing := [name for name in FACTS if name not in meta]:
            raise ValueError(f"expected the facts {', '.join(FACTS)}, got no {missing[0]}")
        cfg = Config.from_dict(meta["config"])
        settings = {"optimizer": AdamW(**_table(meta, "optimizer")), "nonfinite": _nonfinite(meta), **settings}
        saved, saved_tokens = _count(meta, "streams", MAX_COUNT, 1), _count(meta, "max_tokens", MAX_COUNT, 1)
        seed = _count(meta, "seed", 2**64 - 1)
        step, calls, skipped = (_count(meta, name, 2**62) for name in ("step", "calls", "skipped"))
        model_sizes(saved, saved_tokens, 1)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{directory}: meta.json does not describe a model: {error}") from error
    check(directory, cfg, saved, tensors)
    model = cls(
        cfg, backend, device, saved if streams is None else streams, saved_tokens if max_tokens is None else max_tokens,
        seed, _parameters=tensors["model"], **settings,
    )
    moments = tensors["optimizer"]
    model._engine.load_moments(
        {key: [moments[f"{key}.{name}"] for name in MOMENTS] for key in trainable_keys(cfg)}
    )
    if model.streams == saved:
        model.load_state(tensors["state"])
    model.step, model.calls, model.skipped = step, calls, skipped
    return model


def _count(meta: Mapping[str, Any], name: str, most: int, least: int = 0) -> int:
    value = meta[name]
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name}: expected an integer in {least}..{most}, got {shown(value)}")
    return value


def _table(meta: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = meta[name]
    if not isinstance(value, dict):
        raise ValueError(f"{name}: expected a table of settings, got {shown(value)}")
    return value


def _nonfinite(meta: Mapping[str, Any]) -> str:
    if meta["nonfinite"] not in ("raise", "skip"):
        raise ValueError(f"nonfinite: expected 'raise' or 'skip', got {shown(meta['nonfinite'])}")
    return str(meta["nonfinite"])


def check(directory: Any, cfg: Config, streams: int, tensors: Mapping[str, Mapping[str, Any]]) -> None:
    """CheckpointError unless these are all the tensors of such a model, with values that it can have."""
    shapes = parameter_shapes(cfg)
    groups: dict[str, Shapes] = {
        "model": shapes,
        "optimizer": {f"{key}.{name}": shapes[key] for key in trainable_keys(cfg) for name in MOMENTS},
        "state": {key: (shape, np.dtype(np.float32)) for key, shape in state_shapes(cfg, streams).items()},
    }
    if set(tensors) != set(groups):
        raise CheckpointError(f"{directory}: expected {', '.join(groups)}.safetensors, got {shown(sorted(tensors))}")
    for group, expected in groups.items():
        where = f"{directory}: {group}.safetensors: "
        if unknown := sorted(set(tensors[group]) - set(expected)):
            raise CheckpointError(f"{where}expected only this model's tensors, got {shown(unknown[:3])}")
        for key, (shape, dtype) in expected.items():
            if key not in tensors[group]:
                raise CheckpointError(f"{where}{key}: expected a tensor, got none")
            array = tensors[group][key]
            if array.shape != shape or array.dtype != dtype:
                raise CheckpointError(f"{where}{key}: expected {dtype} {shape}, got {array.dtype} {array.shape}")
            if dtype == np.float32:
                _check_values(where + key, array)
    _check_blocks(f"{directory}: model.safetensors: ", cfg, tensors["model"])


def _check_values(where: str, array: NDArray[np.float32]) -> None:
    if array.size == 0:
        return
    low, high = float(array.min()), float(array.max())  # NaN wherever there is one
    least, most = -math.inf, math.inf
    if where.endswith(".moment1"):
        least, most = -LARGEST_MOMENT, LARGEST_MOMENT
    elif where.endswith(".moment2"):
        least = 0.0  # its root is taken
    if not (math.isfinite(low) and math.isfinite(high) and least <= low and high <= most):
        raise CheckpointError(f"{where}: expected finite values in {least:g}..{most:g}, got {low} to {high}")


def _check_blocks(where: str, cfg: Config, model: Mapping[str, Any]) -> None:
    """Rows as the configuration has them, and in each row ascending columns: what the kernels index by."""
    for projection in cfg.projections:
        key, k = cfg.key(projection), cfg.blocks_per_row(projection)
        rows, columns = cfg.width(projection.dst) // BLOCK, cfg.width(projection.src) // BLOCK
        if (model[f"{key}.rows"] != np.repeat(np.arange(rows, dtype=np.int32), k)).any():
            raise CheckpointError(f"{where}{key}.rows: expected 0 to {rows - 1}, each {k} times, got others")
        cols = model[f"{key}.cols"].reshape(rows, k)
        if cols.min() < 0 or cols.max() >= columns or (np.diff(cols, axis=1) <= 0).any():
            raise CheckpointError(
                f"{where}{key}.cols: expected {k} ascending columns in 0..{columns - 1} for every row, got others"
            )
