"""Counting what a process allocates and copies, by the hooks of allocation_hook.c.

The hooks have to be there before anything else is loaded, so what is counted runs in a process of its own
(`environment`); inside it, `Counting` counts one call at a time.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SOURCE = Path(__file__).with_name("allocation_hook.c")
_SET_HANDLER = 304  # PyDataMem_SetHandler in NumPy's table of C functions, since 1.22
# The order of allocation_hook.c.
NAMES = (
    "native_allocs", "all_native_allocs", "native_bytes", "python_allocs", "python_bytes", "array_allocs",
    "array_bytes", "copies", "copied_bytes",
)  # fmt: skip


class Unavailable(Exception):
    """Why allocations cannot be counted here."""


def environment(folder: Path) -> dict[str, str]:
    """Compile the hooks into `folder`; return the environment of a process that has them.

    Raises
    ------
    Unavailable
    """
    compiler = next((found for name in (os.environ.get("CC", ""), "gcc", "cc") if (found := shutil.which(name))), None)
    if compiler is None:
        raise Unavailable("no C compiler (gcc, cc) to build the allocation hooks with")
    library = folder / "allocation_hook.so"
    # Without built-ins: the compiler must not turn the hooks into calls of what they hook.
    command = [compiler, "-shared", "-fPIC", "-O1", "-fno-builtin", "-o", str(library), str(SOURCE), "-ldl"]
    made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        raise Unavailable(f"the allocation hooks do not compile: {made.stderr.strip().splitlines()[-1:]}")
    return {**os.environ, "LD_PRELOAD": str(library)}


class Counting:
    """Counts what calls allocate, in a process started with `environment`.

    Parameters
    ----------
    library : str
        Part of the file name of the native library whose allocations and copies are told apart, as "_cpu.".
    """

    def __init__(self, library: str) -> None:
        self._hook = ctypes.PyDLL(None)  # with the GIL: the interpreter's allocators are changed under it
        if not hasattr(self._hook, "allocation_hook_start"):
            raise Unavailable("this process was not started with the allocation hooks")
        self._library = library.encode()
        if not self._hook.allocation_hook_python():
            raise Unavailable("this Python does not export PyMem_SetAllocator")
        self._hook_numpy()
        self.counted(_nothing)  # what the first use of all this allocates
        self._own = self.counted(_nothing)

    def counted(self, body: Callable[[], Any]) -> dict[str, int]:
        """Call `body`; return what it allocated and copied, by the names in `NAMES`."""
        out = (ctypes.c_long * len(NAMES))()
        self._hook.allocation_hook_start(self._library)
        try:
            body()
        finally:
            self._hook.allocation_hook_stop(out)
        own = getattr(self, "_own", {})
        return {name: count - own.get(name, 0) for name, count in zip(NAMES, out)}

    def _hook_numpy(self) -> None:
        """Have NumPy take the data of arrays from here on through the hooks; arrays know who frees theirs."""
        api = ctypes.pythonapi
        api.PyCapsule_GetPointer.restype = ctypes.c_void_p
        api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
        api.PyCapsule_New.restype = ctypes.py_object
        api.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        core = importlib.import_module("numpy._core" if int(np.__version__.split(".")[0]) >= 2 else "numpy.core")
        table = ctypes.cast(
            api.PyCapsule_GetPointer(core._multiarray_umath._ARRAY_API, None), ctypes.POINTER(ctypes.c_void_p)
        )
        handler = ctypes.addressof(ctypes.c_char.in_dll(self._hook, "allocation_hook_arrays"))
        set_handler = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(table[_SET_HANDLER] or 0)
        self._name = b"mem_handler"  # the capsule points to it
        self._before = set_handler(api.PyCapsule_New(handler, self._name, None))


def _nothing() -> None:
    """What counting itself costs."""
