"""Memory of a device: how much is free, how much a piece of work takes, and running out of it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import threading
import traceback
from collections.abc import Iterator

import psutil
import torch

from qspin.fitting.footprint import MAPPED
from qspin.fitting.main_memory import main_memory

# mallopt's parameters, from glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


ATTEMPTS = 3  # at one piece of work, each half as large as the one before

# what torch and Triton say where they raise a plain RuntimeError
_REFUSALS = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",  # each thread makes a handle, in memory of its own
)
# In the names of kernels under which memory that can grow fails at the first tensor: WSL's, and that of NVIDIA's boards
# (github.com/pytorch/pytorch/issues/192330, github.com/unslothai/unsloth/issues/2401).
_NOT_EXPANDABLE = ("microsoft", "tegra")


class OutOfMemory(Exception):
    """The device refused a tensor. Whoever cut the work into pieces catches it and cuts smaller ones."""


@contextlib.contextmanager
def refusals_told() -> Iterator[None]:
    """Raise `OutOfMemory` where torch, or Python, raises one of its errors for a refused allocation.

    Whoever holds the error, nothing of the work is left: its functions' tensors, and in torch 2.11 and before what its
    checkpointing has put between autograd and what that saves. It is taken away with a function's frame, and were that
    in the midst of the next try, what a layer saves then would go to the refused one.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_refusal(error):
            traceback.clear_frames(error.__traceback__)
            raise OutOfMemory(str(error).partition("\n")[0] or type(error).__name__) from None
        raise


def is_refusal(error: RuntimeError | MemoryError) -> bool:
    """Whether what a library raises is of a refused allocation."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(refusal in str(error) for refusal in _REFUSALS)


def keep_freed_memory() -> None:
    """Let malloc use freed blocks again instead of giving them back to the system, and CUDA's allocator pieces of any
    size, where the system can: to be called before the first tensor.

    By default glibc maps every large tensor afresh and the kernel clears its pages at first touch, which a CPU run
    does thousands of times a step. The largest stay mapped: beside the products that they are for this costs little,
    and they would leave large holes in the heap. Elsewhere than on glibc that half does nothing. On a GPU, blocks of
    sizes that no longer come up would stay reserved, which a full card has no room for.
    """
    settings = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # the old name counts where both are set
    if _has_expandable_segments() and not any(name in os.environ for name in settings):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, MAPPED)
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def _has_expandable_segments() -> bool:
    return platform.system() == "Linux" and not any(name in platform.release().lower() for name in _NOT_EXPANDABLE)


def give_back_freed_memory() -> None:
    """Undo once what `keep_freed_memory` has kept, on glibc: freed blocks are the system's again, so that it knows what
    is free and a peak shows. What is freed from here on is kept."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def free_bytes(device: torch.device) -> int:
    """What this process may still take: on a GPU within its share, freed blocks that torch holds included. The
    processes of one launch share a machine's memory."""
    if device.type == "cpu":
        return main_memory().available // processes_here()
    free, total = torch.cuda.mem_get_info(device)
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    share = int(total * torch.cuda.get_per_process_memory_fraction(torch.cuda.current_device()))
    return min(free + held, share - torch.cuda.memory_allocated(device))


def processes_here() -> int:
    """How many processes one launch started on this machine (workers.py)."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def used_and_total(device: torch.device) -> tuple[int, int]:
    """Bytes that this process holds and that the device has: resident memory on a CPU, torch's tensors on a GPU."""
    if device.type == "cpu":
        return psutil.Process().memory_info().rss, main_memory().total
    return torch.cuda.memory_allocated(device), torch.cuda.get_device_properties(device).total_memory


class Peak:
    """The most memory that was taken since this was made, in bytes: resident memory on a CPU, as far as it is looked
    at, and torch's tensors on a GPU, which torch watches."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._process, self._lock = device, psutil.Process(), threading.Lock()
        if device.type != "cpu":
            torch.cuda.reset_peak_memory_stats(device)
        self.most = 0
        self._before = self.look()

    def look(self) -> int:
        """The most until now."""
        cpu = self._device.type == "cpu"
        taken = self._process.memory_info().rss if cpu else torch.cuda.max_memory_allocated(self._device)
        with self._lock:
            self.most = max(self.most, taken)
            return self.most

    @property
    def above(self) -> int:
        """What was there before is not counted."""
        return self.most - self._before


@contextlib.contextmanager
def peak(device: torch.device, every: float = 0.01) -> Iterator[Peak]:
    """Measure the block inside; on a CPU by a look every so many seconds."""
    result, done = Peak(device), threading.Event()

    def watch() -> None:
        while not done.wait(every):
            result.look()

    watcher = threading.Thread(target=watch, daemon=True)
    if device.type == "cpu":
        watcher.start()
    try:
        yield result
        result.look()
    finally:
        done.set()
        if device.type == "cpu":
            watcher.join()
