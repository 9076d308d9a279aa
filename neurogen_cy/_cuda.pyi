"""The CUDA backend: the classes of `_binding.pxi` over libneurogen_cuda. `_cpu.pyi` describes what both have."""

from typing import Any, Final

from neurogen_cy._cpu import Brain as Brain
from neurogen_cy._cpu import Decoder as Decoder
from neurogen_cy._cpu import DeviceView as DeviceView
from neurogen_cy._cpu import Engine as Engine
from neurogen_cy._cpu import HostView as HostView
from neurogen_cy._cpu import NeuronState as NeuronState
from neurogen_cy._cpu import TensorView as TensorView
from neurogen_cy._cpu import TokenEmbedding as TokenEmbedding
from neurogen_cy._cpu import check_sampling as check_sampling
from neurogen_cy._cpu import device_array_facts as device_array_facts
from neurogen_cy._cpu import host_array as host_array
from neurogen_cy._cpu import memory_plan as memory_plan
from neurogen_cy._cpu import stream_handle as stream_handle

BACKEND: Final[str]
PRECISIONS: Final[tuple[str, ...]]
TOKENS_AHEAD: Final[int]
blas_at_one_thread: Final[Any]

def unavailable() -> str | None: ...
def free_bytes(device: int) -> int: ...
def describe(device: int) -> str: ...
