"""How busy a GPU is: NVML's utilisation over a run of seconds, and what CUPTI timed on the device in a short one.

Both need a package that is not a dependency (nvidia-ml-py of the extra `cuda`; torch, whose profiler carries CUPTI);
where one is missing the answer is None, with the reason.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

INTERVAL = 0.1  # seconds between two looks
STALE = 1.0  # NVML's figure is of up to the last second: looks in the first one would see what was before


def is_copy(name: str) -> bool:
    """Whether an event of the device is a copy or a fill rather than a kernel."""
    return name.lower().startswith(("memcpy", "memset"))


class GpuBusy:
    """Looks at NVML's utilisation from a thread of its own while a `with` block runs.

    Attributes
    ----------
    percent : float or None
        Mean share of the time in which a kernel ran.
    reason : str or None
        Why there is none.
    cpu_s : float
        CPU time that looking took.
    """

    def __init__(self, device: int) -> None:
        self.percent: float | None = None
        self.reason: str | None = None
        self.cpu_s = 0.0
        self._seen: list[float] = []
        self._done = threading.Event()
        try:
            self._nvml: Any = importlib.import_module("pynvml")
            self._nvml.nvmlInit()
            self._handle = self._find(device)
            self._look()
        except ImportError:
            self.reason = "nvidia-ml-py is not installed (the extra cuda brings it)"
        except Exception as error:  # NVML's own class, which only the module could name
            self.reason = f"NVML: {error}"

    def _find(self, device: int) -> Any:
        """NVML counts all GPUs of the machine, CUDA those that CUDA_VISIBLE_DEVICES leaves."""
        visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
        name = visible[device] if device < len(visible) else str(device)
        if name.isdigit():
            return self._nvml.nvmlDeviceGetHandleByIndex(int(name))
        return self._nvml.nvmlDeviceGetHandleByUUID(name)

    def _look(self) -> float:
        return float(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu)

    def _watch(self) -> None:
        begin = time.monotonic()
        while not self._done.wait(INTERVAL):
            if time.monotonic() - begin >= STALE:
                self._seen.append(self._look())
        self.cpu_s = time.thread_time()

    def __enter__(self) -> GpuBusy:
        if self.reason is None:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        if self.reason is not None:
            return
        self._thread.join()
        if self._seen:
            self.percent = sum(self._seen) / len(self._seen)
        else:
            self.reason = f"the run was shorter than NVML's sampling, {STALE:g} s"


class DeviceClock:
    """Times what a call does on the GPU, kernel by kernel, by torch's profiler (CUPTI).

    Once it has, launches of this process cost more: what is timed by the wall comes before.

    Attributes
    ----------
    reason : str or None
        Why it cannot; `seconds` then gives None.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._torch: Any = None

    def _load(self) -> None:
        try:
            self._torch = importlib.import_module("torch")
            if not self._torch.cuda.is_available():
                self.reason = "torch, whose profiler times kernels, sees no GPU"
            else:
                self._torch.cuda.init()
        except ImportError:
            self.reason = "torch, whose profiler times kernels, is not installed"
        except Exception as error:  # a torch that does not load must not end a measurement
            self.reason = f"torch does not load: {error}"

    def events(self, body: Callable[[], Any]) -> list[tuple[str, float, float]] | None:
        """Call `body`, which waits for what it starts; (name, begin, end) in seconds of all that the device did."""
        if self._torch is None and self.reason is None:
            self._load()
            if self.reason is None:  # the first trace starts CUPTI, and may miss what runs meanwhile
                self.events(body)
                self.reason = None
        if self.reason is not None:
            return None
        profiler = self._torch.profiler
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about CPU activity, which is not asked for
            with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as trace:
                body()
            out = [
                (str(event.name), event.time_range.start / 1e6, event.time_range.end / 1e6)
                for event in trace.events() if event.device_type == self._torch.autograd.DeviceType.CUDA
            ]  # fmt: skip
        if not out:
            self.reason = "torch's profiler saw no kernel"
            return None
        return sorted(out, key=lambda event: event[1])

    def seconds(self, body: Callable[[], Any]) -> dict[str, float] | None:
        """Call `body`, which waits for what it starts; seconds on the device of "kernels" and "copies"."""
        events = self.events(body)
        if events is None:
            return None
        out = {"kernels": 0.0, "copies": 0.0}
        for name, begin, end in events:
            out["copies" if is_copy(name) else "kernels"] += end - begin
        return out
