"""Every call into the CUDA runtime and driver during one warm train step, as CUPTI reports them.

    python tests/cupti_listing.py FOLDER [PRESET STREAMS TOKENS]

Writes FOLDER/launches.txt, one call a line in order (kernel launches with the kernel's name), and FOLDER/launches.json,
what was counted. CUPTI's callback interface is called by ctypes: it sees the whole process, whoever linked what.
"""

import ctypes
import glob
import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np

import neurogen_cy as ng

DRIVER, RUNTIME = 1, 2  # CUpti_CallbackDomain
ENTER = 0  # CUpti_ApiCallbackSite
WAITS = re.compile(r"cu(da)?(\w+Synchronize|Memcpy(?!\w*Async)\w*|Memset(?!\w*Async)\w*)")
ALLOCATIONS = re.compile(r"cu(da)?(\w*Malloc\w*|MemAlloc\w*|HostAlloc\w*|MemHostAlloc\w*|MemCreate\w*|HostRegister\w*)")
BRAIN = ("run_brain", "run_register", "run_wide", "run_dense")


class CallbackData(ctypes.Structure):
    """CUpti_CallbackData."""

    _fields_ = [
        ("site", ctypes.c_int),
        ("function", ctypes.c_char_p),
        ("parameters", ctypes.c_void_p),
        ("result", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),  # the kernel's name, of launches only
    ]


CALLBACK = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32, ctypes.POINTER(CallbackData)
)  # user data, domain, number of the function, data


def library():
    """CUPTI of NVIDIA's wheels or of the toolkit."""
    patterns = ["/usr/local/cuda/extras/CUPTI/lib64/libcupti.so*", "/usr/local/cuda/lib64/libcupti.so*"]
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec and spec.submodule_search_locations) or ():
        patterns.insert(0, f"{folder}/*/lib/libcupti.so*")
    for path in [path for pattern in patterns for path in sorted(glob.glob(pattern))]:
        try:
            return ctypes.CDLL(path)
        except OSError as error:
            print(f"{path}: {error}", file=sys.stderr)
    sys.exit(f"no libcupti in {patterns}")


class Listing:
    """Records calls between start() and stop()."""

    def __init__(self):
        self.calls = []
        self.inside = 0  # the runtime's own calls into the driver are not the program's
        self.callback = CALLBACK(self.record)
        self.cupti = library()
        self.subscriber = ctypes.c_void_p()
        self.check(self.cupti.cuptiSubscribe(ctypes.byref(self.subscriber), self.callback, None))

    @staticmethod
    def check(status):
        if status:
            sys.exit(f"CUPTI: status {status}")

    def record(self, _, domain, number, data):
        call = data.contents
        if call.site == ENTER and not self.inside:
            self.calls.append((call.function.decode(), (call.symbol or b"").decode()))
        if domain == RUNTIME:
            self.inside += 1 if call.site == ENTER else -1

    def switch(self, on):
        for domain in (RUNTIME, DRIVER):
            self.check(self.cupti.cuptiEnableDomain(ctypes.c_uint32(on), self.subscriber, domain))


def main(folder, preset="base", streams="4", tokens="64"):
    streams, tokens = int(streams), int(tokens)
    cfg = ng.Config.preset(preset)
    model = ng.NeuroGen(cfg, backend="cuda", streams=streams, max_tokens=tokens)
    ids, targets = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, streams, tokens)).astype(np.int32)
    for _ in range(3):
        model.train_step_batch(ids, targets)
    listing, before = Listing(), model.counters
    listing.switch(True)
    model.train_step_batch(ids, targets)
    listing.switch(False)
    counters = {name: count - before[name] for name, count in model.counters.items()}
    names = [name for name, _ in listing.calls]
    counted = {
        "preset": preset, "B": streams, "T": tokens, "precision": model.precision,
        "brain_launches": sum(any(name in symbol for name in BRAIN) for _, symbol in listing.calls),
        "kernel_launches": sum(bool(symbol) for _, symbol in listing.calls),
        "waits": [name for name in names if WAITS.match(name)],
        "allocations": [name for name in names if ALLOCATIONS.match(name)],
        "calls": {name: names.count(name) for name in sorted(set(names))},
        "counters": counters,
    }  # fmt: skip
    Path(folder, "launches.txt").write_text("\n".join(f"{name} {symbol}".rstrip() for name, symbol in listing.calls))
    Path(folder, "launches.json").write_text(json.dumps(counted, indent=1) + "\n")
    print(json.dumps(counted, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
