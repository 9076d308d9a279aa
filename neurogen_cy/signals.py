"""Ctrl-C and SIGTERM as a request to stop, so that a step in progress is finished and saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Stop:
    """Who asked to stop: the signal that was received, and the reason in words. Both None as long as nobody has."""

    received: signal.Signals | None = None
    reason: str | None = None

    def ask(self, reason: str) -> None:
        """Note a reason; the first one stays."""
        self.reason = self.reason or reason


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """While entered, the first SIGINT or SIGTERM is only noted; a second one raises KeyboardInterrupt.

    Outside the main thread, where Python takes no signals, nothing is changed.
    """
    stop = Stop()

    def note(number: int, frame: FrameType | None) -> None:
        if stop.received is not None:
            raise KeyboardInterrupt
        stop.received = signal.Signals(number)
        stop.ask(stop.received.name)

    numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    former = {number: signal.signal(number, note) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
