"""What computes the pieces of a layer that are neither products nor attention.

`Kernels` is torch itself, through the model's own modules; `UnslothKernels`, in unsloth_kernels.py, are Unsloth's
fused kernels for a GPU. Layers are told which, and nothing else knows.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

import bitsandbytes.functional as bnb
import torch
from bitsandbytes import matmul_4bit
from torch import Tensor, nn

from qspin.units import NF4_BLOCK

Rotate = Callable[..., tuple[Tensor, Tensor]]  # queries, keys, cosines, sines → queries and keys
INS = 256  # inputs are a multiple of so many
ROWS = range(2, 129)  # for which `nf4_product` is the fastest where memory is fast; bitsandbytes is for one
MOST_RANK = 256  # of which A's and B's parts fit into a processor's own memory
ActivationName = Literal["silu", "gelu_tanh", "gelu"]


class GatedKernel(Protocol):
    """act(gate)·up of one activation, all (…, F)."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor: ...

    def backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of gate and up. May write over all that it is given."""
        ...


class Kernels:
    """torch's and bitsandbytes' own."""

    def dequantise(self, data: Tensor, constants: Any) -> Tensor:
        """(out, in) in the type it was quantised from; good until the next call."""
        matrix: Tensor = bnb.dequantize_4bit(data, constants)
        return matrix

    def multiplies_packed(self, x: Tensor) -> bool:  # noqa: ARG002
        """Whether `few_rows_product` is the fastest for x, (…, in), in decoding on a GPU."""
        return True  # bitsandbytes makes W where it knows its own kernel to be slower

    def few_rows_product(
        self, x: Tensor, data: Tensor, constants: Any, low: Tensor, b: Tensor, bias: Tensor | None
    ) -> Tensor:
        """(N, in), (α/r)·x·Aᵀ, (N, r), and B (out, r) → x·Wᵀ + (α/r)·x·Aᵀ·Bᵀ + bias, (N, out), of few rows."""
        if TRITON and fast_memory(x) and multipliable(x, data, constants, low):
            from qspin.layers.nf4_product import product

            return product(x, data, constants, low, b, bias)
        y: Tensor = matmul_4bit(x, data.t(), constants, bias=bias)
        return y.addmm_(low, b.t())

    def rms_norm(self, norm: nn.Module, *, one_plus: bool) -> Callable[[Tensor], Tensor] | None:  # noqa: ARG002
        """x → x / rms(x) times weight, or 1 + weight, differentiable in x; None: nothing better than the module."""
        return None

    def gated(self, activation: ActivationName | None) -> GatedKernel | None:  # noqa: ARG002
        """None: nothing better than the activation's own function."""
        return None

    def rotary(self, own: Rotate) -> Rotate | None:  # noqa: ARG002
        """What does as a model's own rotary embedding does; None: nothing better."""
        return None


def compiles() -> bool:
    """Whether Triton is beside torch, with what it builds its launcher with: a C compiler and Python's headers."""
    if importlib.util.find_spec("triton") is None:
        return False
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # Debian's, which has no headers
    headers = Path(sysconfig.get_path("include", scheme), "Python.h")
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return os.name == "nt" or (compiler is not None and headers.is_file())


TRITON = compiles()


def multipliable(x: Tensor, data: Tensor, constants: Any, low: Tensor) -> bool:
    """Whether `nf4_product` computes this. A base that came quantised may be in FP4, or packed in another type."""
    shapes = len(x) in ROWS and x.shape[-1] % INS == 0 and low.shape[1] <= MOST_RANK
    packed = (data.dtype, constants.quant_type, constants.blocksize) == (torch.uint8, "nf4", NF4_BLOCK)
    return shapes and packed and x.dtype != torch.float32 and torch.version.hip is None  # its look-up is NVIDIA's


def fast_memory(x: Tensor) -> bool:
    """On a GPU with HBM3: bitsandbytes' kernel is slower there than making W, but for a few rows."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] in (9, 10)


def few(x: Tensor) -> bool:
    """(…, in) of so few rows, and such inputs, that a product by 4 bits beats making W there."""
    rows = x.numel() // x.shape[-1]
    return rows < ROWS.start or (rows < ROWS.stop and x.shape[-1] % INS == 0)
