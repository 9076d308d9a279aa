"""What of a model goes into a checkpoint, and how it comes back. The file format is checkpoint.py's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from neurogen_cy import checkpoint
from neurogen_cy._version import __version__
from neurogen_cy.checkpoint import CheckpointError
from neurogen_cy.config import Config
from neurogen_cy.connectome import parameter_shapes
from neurogen_cy.optimizer import AdamW
from neurogen_cy.tokenization import Tokenizer

if TYPE_CHECKING:
    from neurogen_cy.model import NeuroGen

MOMENTS = ("moment1", "moment2")


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
    """See `NeuroGen.load`."""
    tensors, meta = checkpoint.read(directory)
    try:
        cfg = Config.from_dict(meta["config"])
        settings = {"optimizer": AdamW(**meta["optimizer"]), "nonfinite": meta["nonfinite"], **settings}
        saved = int(meta["streams"])
        seed, step, calls, skipped = (int(meta[name]) for name in ("seed", "step", "calls", "skipped"))
        max_tokens = int(meta["max_tokens"]) if max_tokens is None else max_tokens
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{directory}: meta.json does not describe a model: {error}") from error
    _check_model(directory, cfg, tensors)
    model = cls(
        cfg, backend, device, saved if streams is None else streams, max_tokens, seed, _parameters=tensors["model"],
        **settings,
    )
    model._engine.load_moments({
        key: [_fitting(directory, tensors, "optimizer", f"{key}.{name}", view.shape) for name in MOMENTS]
        for key, (view, _) in model._engine.moments().items()
    })
    if model.streams == saved:
        try:
            model.load_state(tensors["state"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{directory}: state.safetensors: {error}") from error
    model.step, model.calls, model.skipped = step, calls, skipped
    return model


def _check_model(directory: Any, cfg: Config, tensors: Mapping[str, Any]) -> None:
    for group in ("model", "optimizer", "state"):
        if group not in tensors:
            raise CheckpointError(f"{directory}: expected {group}.safetensors, got {sorted(tensors)}")
    shapes = parameter_shapes(cfg)
    for key, (shape, dtype) in shapes.items():
        _fitting(directory, tensors, "model", key, shape, dtype)
    if unknown := sorted(set(tensors["model"]) - set(shapes)):
        raise CheckpointError(f"{directory}: model.safetensors: expected only this model's tensors, got {unknown[:3]}")


def _fitting(
    directory: Any, tensors: Mapping[str, Any], group: str, key: str, shape: tuple[int, ...],
    dtype: Any = np.float32,
) -> Any:
    where = f"{directory}: {group}.safetensors: {key}"
    if key not in tensors[group]:
        raise CheckpointError(f"{where}: expected a tensor, got none")
    array = tensors[group][key]
    if array.shape != tuple(shape) or array.dtype != dtype:
        raise CheckpointError(f"{where}: expected {dtype} {tuple(shape)}, got {array.dtype} {array.shape}")
    return array
