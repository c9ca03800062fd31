"""A CUDA device for processes that have this folder in PYTHONPATH, where there is none: STAND_IN names what device.cpp
was built into, STAND_IN_GIB how much memory the device has.

Tensors on it are computed by the CPU's kernels, so that code for a GPU runs as it is: who mixes devices, reads memory
that was never written, asks for more than there is, or looks at numbers while a graph is recorded, is found out. What a
GPU's own kernels compute, and how fast, is not seen.
"""

import contextlib
import ctypes
import itertools
import os
import signal
from collections.abc import Iterator
from types import SimpleNamespace

LIBRARY = ctypes.CDLL(os.environ["STAND_IN"], ctypes.RTLD_GLOBAL)  # before torch asks who is there

import bitsandbytes.functional  # noqa: E402  # while it finds no GPU, whose own kernels it would look for
import plain_flash  # noqa: E402
import torch  # noqa: E402
from torch import cuda  # noqa: E402

TOTAL = int(float(os.environ.get("STAND_IN_GIB", "4")) * 2**30)
NUMBERS = itertools.count()
for name in ("taken", "most_taken"):
    getattr(LIBRARY, name).restype = ctypes.c_size_t


class Stream:
    """Nothing waits for anything."""


@contextlib.contextmanager
def signals_after() -> Iterator[None]:
    """As a GPU replays a graph in one call, while some operations here are Python."""
    came: list[int] = []
    handlers = {
        number: signal.signal(number, lambda number, _frame: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for number in came:
        signal.raise_signal(number)


class Graph:
    """What was recorded, carried out again in the same memory."""

    def __init__(self) -> None:
        self._number = ctypes.c_int64(next(NUMBERS))

    def capture_begin(self) -> None:
        LIBRARY.begin(self._number)

    def capture_end(self) -> None:
        LIBRARY.end()

    def replay(self) -> None:
        with signals_after():
            LIBRARY.play(self._number)

    def pool(self) -> tuple[int, int]:
        return 0, 0

    def __del__(self) -> None:
        LIBRARY.drop(self._number)


class Capture:
    """torch.cuda.graph: records on a stream of its own."""

    def __init__(self, graph: Graph, pool: object = None) -> None:  # noqa: ARG002
        self._graph = graph

    def __enter__(self) -> None:
        self._before = cuda.current_stream()
        cuda.set_stream(Stream())
        self._graph.capture_begin()

    def __exit__(self, *_: object) -> None:
        self._graph.capture_end()
        cuda.set_stream(self._before)


class State:
    stream = Stream()
    share = 1.0


def set_share(share: float, _device: object = None) -> None:
    State.share = share
    LIBRARY.set_limit(ctypes.c_size_t(int(share * TOTAL)))


def set_stream(stream: Stream) -> None:
    State.stream = stream


set_share(1.0)
PROPERTIES = SimpleNamespace(name="stand-in", total_memory=TOTAL, multi_processor_count=84, major=8, minor=6)
for name, value in {
    "_lazy_init": lambda: None,
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "init": lambda: None,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda _device: None,
    "synchronize": lambda _device=None: None,
    "empty_cache": lambda: None,
    "manual_seed": lambda _seed: None,
    "manual_seed_all": lambda _seed: None,
    "is_bf16_supported": lambda **_: True,
    "get_arch_list": lambda: ["sm_86"],
    "get_device_name": lambda _device=None: PROPERTIES.name,
    "get_device_capability": lambda _device=None: (PROPERTIES.major, PROPERTIES.minor),
    "get_device_properties": lambda _device=None: PROPERTIES,
    "mem_get_info": lambda _device=None: (TOTAL - LIBRARY.taken(), TOTAL),
    "memory_allocated": lambda _device=None: LIBRARY.taken(),
    "memory_reserved": lambda _device=None: LIBRARY.taken(),
    "max_memory_allocated": lambda _device=None: LIBRARY.most_taken(),
    "reset_peak_memory_stats": lambda _device=None: LIBRARY.forget_most(),
    "get_per_process_memory_fraction": lambda _device=None: State.share,
    "set_per_process_memory_fraction": set_share,
    "current_stream": lambda _device=None: State.stream,
    "set_stream": set_stream,
    "Stream": Stream,
    "CUDAGraph": Graph,
    "graph": Capture,
}.items():
    setattr(cuda, name, value)

FLASH = torch.library.Library("aten", "IMPL")
FLASH.impl("_flash_attention_forward", plain_flash.forward, "CUDA")
FLASH.impl("_flash_attention_backward", plain_flash.backward, "AutogradCUDA")
torch.backends.cuda.is_flash_attention_available = lambda: True

# memory that a GPU and its host share, for 8-bit optimisers
malloc = ctypes.CDLL(None).malloc
malloc.argtypes, malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
pages = bitsandbytes.functional.lib
pages.cget_managed_ptr = malloc
pages.cfill_uint8 = lambda pointer, _, value, count: ctypes.memset(pointer, value.value, count.value)
pages.cprefetch = lambda *_: None
