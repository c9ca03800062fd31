"""Unsloth's fused Triton kernels in the place of torch's: dequantisation in one launch, RMS norm,
gated MLP, rotary embedding.

Importing this imports Unsloth, which needs a GPU, takes some seconds and patches other libraries; only
`backends.unsloth_kernels` does, for a model whose backend it is and for the doctor.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import unsloth.kernels as triton
from torch import Tensor, nn

from qspin.layers.kernels import ActivationName, GatedKernel, Kernels, Rotate, fast_memory, few


class _Gated:
    def __init__(self, forward: Callable[..., Tensor], backward: Callable[..., tuple[Tensor, Tensor, Tensor]]) -> None:
        self.forward = forward
        self._backward = backward

    def backward(self, grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        flat = [x.contiguous().view(-1, x.shape[-1]) for x in (grad, gate, up)]
        _, grad_up, grad_gate = self._backward(*flat)
        return grad_gate.view(gate.shape), grad_up.view(up.shape)


class UnslothKernels(Kernels):
    def __init__(self) -> None:
        self._gated: dict[ActivationName, GatedKernel] = {
            "silu": _Gated(triton.swiglu_fg_kernel, triton.swiglu_DWf_DW_dfg_kernel),
            "gelu_tanh": _Gated(triton.geglu_approx_forward_kernel, triton.geglu_approx_backward_kernel),
            "gelu": _Gated(triton.geglu_exact_forward_kernel, triton.geglu_exact_backward_kernel),
        }

    def dequantise(self, data: Tensor, constants: Any) -> Tensor:
        # into one buffer for all layers: a product is computed before the next matrix is made
        matrix: Tensor = triton.fast_dequantize(data, constants, use_global_buffer=True)
        return matrix

    def multiplies_packed(self, x: Tensor) -> bool:
        return not fast_memory(x) or few(x)  # Unsloth makes W faster than bitsandbytes does

    def rms_norm(self, norm: nn.Module, *, one_plus: bool) -> Callable[[Tensor], Tensor] | None:
        return functools.partial(triton.fast_rms_layernorm, norm, gemma=one_plus)

    def gated(self, activation: ActivationName | None) -> GatedKernel | None:
        return None if activation is None else self._gated[activation]

    def rotary(self, own: Rotate) -> Rotate | None:
        def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
            # a row of many positions has a cosine for each; a head of which a part is rotated has fewer
            if not q.is_cuda or unsqueeze_dim != 1 or len(q) != 1 or cos.shape != (1, q.shape[2], q.shape[3]):
                return own(q, k, cos, sin, unsqueeze_dim)
            rotated: tuple[Tensor, Tensor] = triton.fast_rope_embedding(q, k, cos, sin)
            return rotated

        return rotate
