"""What computes the pieces of a layer that are neither products nor attention.

`Kernels` is torch itself, through the model's own modules; `UnslothKernels`, in unsloth_kernels.py, are Unsloth's
fused kernels for a GPU. Layers are told which, and nothing else knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import bitsandbytes.functional as bnb
from torch import Tensor, nn

Rotate = Callable[..., tuple[Tensor, Tensor]]  # queries, keys, cosines, sines → queries and keys
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

    def packed_product(self, x: Tensor) -> bool:  # noqa: ARG002
        """Whether W is better left to bitsandbytes' own product by 4 bits when x, (…, in), are the few rows of a
        decoding step. It makes W itself where it knows its kernel to be slower."""
        return True

    def rms_norm(self, norm: nn.Module, *, one_plus: bool) -> Callable[[Tensor], Tensor] | None:  # noqa: ARG002
        """x → x / rms(x) times weight, or 1 + weight, differentiable in x; None: nothing better than the module."""
        return None

    def gated(self, activation: ActivationName | None) -> GatedKernel | None:  # noqa: ARG002
        """None: nothing better than the activation's own function."""
        return None

    def rotary(self, own: Rotate) -> Rotate | None:  # noqa: ARG002
        """What does as a model's own rotary embedding does; None: nothing better."""
        return None
