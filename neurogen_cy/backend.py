"""Which backends there are, and why one is missing."""

from __future__ import annotations

import importlib
from types import ModuleType

NAMES = ("cuda", "cpu")  # in the order in which "auto" prefers them


def _import(name: str) -> tuple[ModuleType | None, str | None]:
    """(extension module, None) or (None, why it cannot be used)."""
    try:
        return importlib.import_module(f"neurogen_cy._{name}"), None
    except ModuleNotFoundError as error:
        if error.name != f"neurogen_cy._{name}":
            raise
        return None, f"the extension neurogen_cy._{name} was not built into this installation"
    except ImportError as error:
        return None, f"the extension neurogen_cy._{name} does not load: {error}"


def available() -> dict[str, str | None]:
    """{backend: None where it can be used, else the reason why not}."""
    return {name: _import(name)[1] for name in NAMES}


def load(name: str) -> tuple[str, ModuleType]:
    """The extension module of a backend; "auto" takes the first that can be used.

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
        module, reason = _import(candidate)
        if module is not None:
            return candidate, module
        reasons.append(f"{candidate}: {reason}")
    raise RuntimeError("no usable backend; " + "; ".join(reasons))
