"""What a machine has and can do: memory, matrix products and bytes a second.

machine = card(12, config.model)      # one that is not here: a card's published figures
machine = this_machine(config.model)  # this one, measured in a few seconds
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil

from qspin.config import ModelConfig
from qspin.errors import QspinError
from qspin.fitting.footprint import Device
from qspin.units import GIB

if TYPE_CHECKING:
    import torch

CUDA_CONTEXT = 0.8 * GIB  # CUDA's context with the kernels of torch and bitsandbytes, on an H200; it differs by driver
# Of the GiB that a card is sold with, what CUDA has to give: 23.6 of 24, 11.75 of 12 and 5.8 of 6, as reported at
# github.com in 3DTopia/Phidias-Diffusion/issues/8, Kunhao-Liu/StyleGaussian/issues/12 and
# facebookresearch/meshrcnn/issues/92.
USABLE = 0.97
LIBRARIES = 0.5 * GIB  # Python with torch, transformers, peft and bitsandbytes in main memory: 0.4 seen, and kernels


@dataclass(frozen=True, slots=True)
class Machine:
    """Where a run would compute."""

    name: str
    device: Device
    memory: int  # bytes for the run, the libraries' own included
    itemsize: int  # of the compute type
    flops: float  # of matrix products in that type, a second
    bandwidth: float  # bytes a second
    measured: bool  # the last two: here and now, or published
    flash: bool = True  # as of `Footprint`

    @property
    def libraries(self) -> int:
        """What is taken before the first weight."""
        return int(CUDA_CONTEXT if self.device == "cuda" else LIBRARIES)


# GiB → name, bytes a second, bf16 products with fp32 sums a second: of two common cards of a size the slower.
# Bandwidths are those of NVIDIA's product pages. The rates are an eighth (Ada: 8 bits, sparse) or a quarter (Ampere: 16
# bits, sparse, fp16 sums) of the tensor figures there: 242 and 353 AI TOPS, 102 and 285 tensor TFLOPS. For the RTX 3090
# NVIDIA's GA102 whitepaper (table 2) gives the 71 TFLOPS itself.
CARDS = {
    8: ("RTX 4060", 272e9, 30.2e12),
    12: ("RTX 3060", 360e9, 25.5e12),
    16: ("RTX 4060 Ti", 288e9, 44.1e12),
    24: ("RTX 3090", 936e9, 71e12),
}

# 16-bit products with fp32 sums, in operations a clock of one multiprocessor, by capability; and clocks a second
A_CLOCK = {(7, 5): 1024, (8, 0): 2048, (9, 0): 4096, (10, 0): 8192, (10, 3): 8192}
OTHERS, CLOCK = 512, 1.7e9


def card(gigabytes: float, model: ModelConfig) -> Machine:
    """An NVIDIA card of so many GiB, as fast as the largest one listed that has no more."""
    size = max((listed for listed in CARDS if listed <= gigabytes), default=min(CARDS))
    name, bandwidth, flops = CARDS[size]
    itemsize = 2
    if model.dtype == "float32":  # on the shaders, at half the rate on these cards
        itemsize, flops = 4, flops / 2
    return Machine(name, "cuda", int(USABLE * gigabytes * GIB), itemsize, flops, bandwidth, measured=False)


def computing_device() -> torch.device:
    """Where a run computes: on the GPU that this process has from torch, or else on the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def this_machine(model: ModelConfig) -> Machine:
    """The machine that a run started now would compute on, its rates measured for about a second.

    Raises:
        QspinError: too little memory is free to measure them in; torch has no kernels for the GPU.
    """
    import torch

    from qspin.fitting.memory import OutOfMemory, free_bytes, refusals_told
    from qspin.four_bits import compute_dtype
    from qspin.layers.backends import check_kernels
    from qspin.layers.flash import has_flash

    device = computing_device()
    check_kernels(device)
    dtype = compute_dtype(model, device)
    try:
        with refusals_told():
            flops, bandwidth = product_rate(device, dtype), copy_rate(device)
    except OutOfMemory as error:
        raise QspinError(
            f"out of memory ({error}); close other programs: this machine can't be measured in what is free; or name a "
            "card with --vram"
        ) from None
    if device.type == "cuda":
        memory = free_bytes(device) + int(CUDA_CONTEXT)  # the context is there by now
        name, flash = torch.cuda.get_device_name(device), has_flash(device)
        return Machine(name, "cuda", memory, dtype.itemsize, flops, bandwidth, measured=True, flash=flash)
    memory = free_bytes(device) + psutil.Process().memory_info().rss
    name = f"{torch.get_num_threads()} CPU threads"
    return Machine(name, "cpu", memory, dtype.itemsize, flops, bandwidth, measured=True)


def nominal_rate(properties: Any) -> float:
    """Floating-point operations a second of 16-bit products at best, reckoned from what a GPU says of itself
    (`torch.cuda.get_device_properties`): for what two runs must choose alike, as they would not by a measurement."""
    a_clock = A_CLOCK.get((properties.major, properties.minor), OTHERS)
    return float(properties.multi_processor_count * a_clock * CLOCK)


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a product of the size that layers have."""
    import torch

    rows, width = (1024, 2048) if device.type == "cpu" else (8192, 4096)
    x = torch.randn(rows, width, device=device).to(dtype)
    weight = torch.randn(width, width, device=device).to(dtype)
    return 2 * rows * width * width / _seconds(lambda: torch.mm(x, weight), device)


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy that no cache holds."""
    import torch

    source = torch.ones(1 << 26, device=device)  # 256 MiB
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), device)


def _seconds(work: Callable[[], object], device: torch.device, budget: float = 0.4) -> float:
    """Of the fastest of the calls that fit into so many seconds, at least three, after one that warms up."""
    import torch

    def once() -> float:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    once()
    taken = [once() for _ in range(3)]
    while sum(taken) < budget:
        taken.append(once())
    return min(taken)
