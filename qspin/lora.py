"""A 4-bit linear layer with LoRA as one differentiable function: y = x·Wᵀ + (α/r)·(x·Aᵀ)·Bᵀ.

PEFT keeps the adapter's modules and file format; this replaces only how they compute. Against PEFT's own forward it
dequantises W without a detour, multiplies by A and B in the compute type (PEFT casts the activations up to the
fp32 master weights, which is slower), keeps x once for both gradients, and adds in place.

W is never written: bitsandbytes' repacking for inference on CPUs is bypassed, since training through it is wrong
and its inverse loses precision.
"""

from __future__ import annotations

import functools
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor
from torch.nn import functional


def fuse_lora(layer: Any, adapter: str) -> None:
    """Make a PEFT `lora.Linear4bit` compute through `LoraLinear4bit`."""
    layer.forward = functools.partial(_forward, layer, adapter)


def _forward(layer: Any, adapter: str, x: Tensor) -> Tensor:
    base = layer.base_layer
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    y: Tensor = LoraLinear4bit.apply(  # type: ignore[no-untyped-call]
        x, base.weight, base.weight.quant_state, base.bias, a, b, layer.scaling[adapter]
    )
    return y


class LoraLinear4bit(torch.autograd.Function):
    """x (…, in) in the compute type; A (r, in) and B (out, r) fp32 masters, as are their gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, state: Any, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])  # (N, in)
        low = flat @ a.to(x.dtype).t()  # (N, r)
        y = functional.linear(flat, _dequantised(weight, state), None if bias is None else bias.to(x.dtype))
        y.addmm_(low, b.to(x.dtype).t(), alpha=scaling)
        ctx.save_for_backward(flat, low, a, b)
        ctx.weight, ctx.state, ctx.scaling = weight, state, scaling
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, Tensor, Tensor, None]:
        flat, low, a, b = ctx.saved_tensors
        grad_flat = grad.reshape(-1, grad.shape[-1])  # (N, out)
        grad_low = (grad_flat @ b.to(grad.dtype)).mul_(ctx.scaling)  # (N, r)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_flat @ _dequantised(ctx.weight, ctx.state)
            grad_x.addmm_(grad_low, a.to(grad.dtype))
            grad_x = grad_x.view(*grad.shape[:-1], -1)
        grad_a = (grad_low.t() @ flat).to(a.dtype)
        grad_b = (grad_flat.t() @ low).to(b.dtype).mul_(ctx.scaling)
        return grad_x, None, None, None, grad_a, grad_b, None


def _dequantised(weight: Tensor, state: Any) -> Tensor:
    """(out, in) in the compute type, a fresh tensor that lives as long as one product."""
    matrix: Tensor = bnb.dequantize_4bit(weight.data, state)
    return matrix
