"""Who owns the threads: OpenMP does. BLAS runs at one thread inside the tiles that OpenMP hands out."""

from __future__ import annotations

import os
import threading
from typing import Any

from threadpoolctl import ThreadpoolController


def default_threads() -> int:
    """CPU cores this process may use (its affinity mask, not the machine's size)."""
    return len(os.sched_getaffinity(0))


class _BlasAtOneThread:
    """Reentrant context: the BLAS libraries run single-threaded until the last user leaves.

    A second pool of BLAS threads would compete with OpenMP's for the same cores, and a product cut by BLAS's
    own thread count would change bits with it. The setting is the process's, so it is counted across threads
    and put back at the end; other code's BLAS calls in between are single-threaded too, never wrong.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before: list[int] = []
        self._libraries: list[Any] | None = None
        os.register_at_fork(after_in_child=self._forked)

    def _forked(self) -> None:
        """The other threads are gone, and with them who would have released the lock and put the setting back."""
        self._lock = threading.Lock()
        if self._users:
            self._users = 0
            for library, count in zip(self._libraries or (), self._before):
                library.set_num_threads(count)

    def __enter__(self) -> None:
        with self._lock:
            if self._libraries is None:  # SciPy's BLAS is loaded by the time the first model exists
                self._libraries = list(ThreadpoolController().select(user_api="blas").lib_controllers)
            self._users += 1
            if self._users == 1:
                self._before = [library.get_num_threads() for library in self._libraries]
                for library in self._libraries:
                    library.set_num_threads(1)

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                for library, count in zip(self._libraries or (), self._before):
                    library.set_num_threads(count)


blas_at_one_thread = _BlasAtOneThread()
