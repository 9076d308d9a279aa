"""Which backends there are, and why one cannot be used."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

NAMES = ("cuda", "cpu")  # in the order in which "auto" prefers them
_started: set[str] = set()
_FORKED: dict[str, str] = {}  # {backend: why this child of a fork cannot use it}


def _import(name: str) -> tuple[ModuleType | None, str | None]:
    """(extension module, None) or (None, why it does not load)."""
    try:
        return importlib.import_module(f"neurogen_cy._{name}"), None
    except ModuleNotFoundError as error:
        if error.name != f"neurogen_cy._{name}":
            raise
        return None, f"the extension neurogen_cy._{name} was not built into this installation"
    except ImportError as error:
        return None, f"the extension neurogen_cy._{name} does not load: {error}"


def _usable(name: str) -> tuple[ModuleType | None, str | None]:
    """(extension module, None) or (None, why no model can be made with it here)."""
    module, reason = _import(name)
    reason = reason if module is None else _FORKED.get(name) or module.unavailable()
    if reason is None:
        _started.add(name)
    return (module, None) if reason is None else (None, reason)


def _after_fork() -> None:
    if "cuda" in _started:
        _FORKED["cuda"] = (
            "this process was forked from one that had started CUDA, which does not live through a fork; use "
            "multiprocessing's 'spawn' or 'forkserver' start method"
        )


os.register_at_fork(after_in_child=_after_fork)


def available() -> dict[str, str | None]:
    """{backend: None where it can be used, else the reason why not}."""
    return {name: _usable(name)[1] for name in NAMES}


def load(name: str, *, built: bool = False) -> tuple[str, ModuleType]:
    """The extension module of a backend; "auto" takes the first that can be used.

    With `built`, a backend that is named need only be in this installation (to ask for its memory plan).

    Raises
    ------
    ValueError
        For an unknown name.
    RuntimeError
        When the backend cannot be used; the message says why.
    """
    if name != "auto" and name not in NAMES:
        raise ValueError(f"backend: expected 'auto', 'cpu' or 'cuda', got {name!r}")
    reasons = []
    for candidate in NAMES if name == "auto" else (name,):
        module, reason = _import(candidate) if built and name != "auto" else _usable(candidate)
        if module is not None:
            return candidate, module
        reasons.append(f"{candidate}: {reason}")
    raise RuntimeError("no usable backend; " + "; ".join(reasons))


def precision(module: ModuleType, value: str | None) -> str:
    """A precision of this backend, checked; None is its default."""
    known: tuple[str, ...] = module.PRECISIONS
    if value is None:
        return known[0]
    if value not in known:
        choices = " or ".join(repr(choice) for choice in (None, *known))
        raise ValueError(f"precision: expected {choices} on the {module.BACKEND} backend, got {value!r}")
    return value
