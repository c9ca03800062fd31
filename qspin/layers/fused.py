"""Pieces of a decoder layer that keep less for the backward pass than autograd would, RMS norm and gated MLP, or are
computed by one kernel in the place of many.

The first two compute forward as the model's own modules do, through them or through a kernel that was found to do the
same, so that whatever a family does there is what happens; only what is kept, and the backward pass itself, are ours.
A norm keeps its input, an MLP its gate and up; the 4-bit layers after them, which need their own input for the gradient
of A, are told how to make it again from those.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qspin.layers.kernels import ActivationName, GatedKernel, Kernels, Rotate
from qspin.layers.lora import remade

Activation = Callable[[Tensor], Tensor]
ROTARY = "apply_rotary_pos_emb"  # as transformers calls it in every family's module


def fuse_norm(norm: nn.Module, kernels: Kernels) -> None:
    """Make an RMS norm keep only its input; a norm that is not x / rms(x) · scale stays as it is."""
    weight, eps = getattr(norm, "weight", None), getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    if not isinstance(weight, Tensor) or not isinstance(eps, float) or weight.requires_grad:
        return
    own = norm.forward
    probe = torch.linspace(-2, 3, len(weight), dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        found = own(probe[None])[0]
        unit = probe.float() * torch.rsqrt(probe.float().pow(2).mean() + eps)
        # Llama's scale is its weight, Gemma's 1 + weight
        for one_plus, scale in enumerate((weight.float(), 1 + weight.float())):
            if torch.allclose(found.float(), unit * scale, rtol=2 * torch.finfo(weight.dtype).eps, atol=1e-6):
                kernel = kernels.rms_norm(norm, one_plus=bool(one_plus))
                normed = functools.partial(_normed, own, scale, eps) if kernel is None else kernel
                norm.forward = functools.partial(_told, normed, own if kernel is None else kernel)
                return


def _told(normed: Activation, again: Activation, x: Tensor) -> Tensor:
    return remade(normed(x), again, x.detach())


def _normed(own: Activation, scale: Tensor, eps: float, x: Tensor) -> Tensor:
    y: Tensor = _RMSNorm.apply(x, own, scale, eps)  # type: ignore[no-untyped-call]
    return y


class _RMSNorm(torch.autograd.Function):
    """x / √(mean(x²) + ε) · scale over the last dimension; x in the compute type, scale (D,) fp32 and frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, own: Activation, scale: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.scale, ctx.eps = scale, eps
        return own(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        x_fp32 = x.float()
        inverse = torch.rsqrt(x_fp32.square().mean(-1, keepdim=True).add_(ctx.eps))
        grad_unit = grad.float() * ctx.scale
        # d/dx of x·inverse: what points along x doesn't change it
        along = (grad_unit * x_fp32).mean(-1, keepdim=True).mul_(inverse * inverse)
        return torch.addcmul(grad_unit, x_fp32, along, value=-1).mul_(inverse).to(x.dtype), None, None, None


def fuse_gated_mlp(mlp: Any, kernels: Kernels) -> None:
    """Make down(act(gate(x)) · up(x)) keep gate and up only; an MLP of another shape stays as it is."""
    if {name for name, _ in mlp.named_children()} == {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        kernel = kernels.gated(_activation_name(mlp.act_fn))
        mlp.forward = functools.partial(_gated_mlp, mlp, kernel)


def _gated_mlp(mlp: Any, kernel: GatedKernel | None, x: Tensor) -> Tensor:
    gate, up = mlp.gate_proj(x), mlp.up_proj(x)
    if kernel is None:
        activated = _Activated(mlp.act_fn)
        product, again = _Gated.apply(gate, up, activated), activated.product  # type: ignore[no-untyped-call]
    else:
        product, again = _GatedByKernel.apply(gate, up, kernel), kernel.forward  # type: ignore[no-untyped-call]
    y: Tensor = mlp.down_proj(remade(product, again, gate.detach(), up.detach()))
    return y


def _activation_name(function: Activation) -> ActivationName | None:
    """Which of those that kernels exist for, by what it computes."""
    probe = torch.linspace(-4, 4, 65)
    names: dict[ActivationName, Tensor] = {
        "silu": functional.silu(probe),
        "gelu": functional.gelu(probe),
        "gelu_tanh": functional.gelu(probe, approximate="tanh"),
    }
    with torch.no_grad():
        found = function(probe)
    return next((name for name, value in names.items() if torch.allclose(found, value, rtol=0, atol=1e-6)), None)


def fuse_rotary(attention: nn.Module, kernels: Kernels) -> None:
    """Have a kernel rotate queries and keys; a family that does it in another way than Llama keeps its own.

    The function is one of the family's modelling code, so that it is replaced for every model of the family.
    """
    home = sys.modules[type(attention).__module__]
    found = getattr(home, ROTARY, None)
    if found is None:
        return
    own = getattr(found, "own", found)  # as it was before another model's kernels took its place
    kernel = kernels.rotary(own)
    if kernel is None or not _rotates_halves(own):
        setattr(home, ROTARY, own)
        return
    kernel.own = own  # type: ignore[attr-defined]
    setattr(home, ROTARY, kernel)


def _rotates_halves(rotary: Rotate) -> bool:
    """Whether it is x·cos + (−x₂, x₁)·sin, of x = (x₁, x₂) halves of a head."""
    q, k, cos, sin = torch.randn(4, 1, 2, 3, 8, generator=torch.Generator().manual_seed(0))
    try:
        found = rotary(q, k, cos[:, 0], sin[:, 0])
    except (TypeError, RuntimeError):  # it takes other arguments, as Gemma 4's, or heads of another shape
        return False
    turned = [torch.cat([-x[..., 4:], x[..., :4]], -1) for x in (q, k)]
    wanted = [x * cos[:, :1] + turn * sin[:, :1] for x, turn in zip((q, k), turned, strict=True)]
    return all(torch.allclose(one, other, atol=1e-6) for one, other in zip(found, wanted, strict=True))


class _Activated:
    """An activation made again once in the backward pass: for down's input first, then for the gate's gradient."""

    def __init__(self, function: Activation) -> None:
        self.function = function
        self._again: tuple[Tensor, Tensor] | None = None

    def product(self, gate: Tensor, up: Tensor) -> Tensor:
        """down's input; what it took is kept for `again`."""
        self._again = self._make(gate)
        return self._again[1].detach() * up

    def again(self, gate: Tensor) -> tuple[Tensor, Tensor]:
        """The gate as a leaf, and the activation with its graph; let go of here."""
        found, self._again = self._again or self._make(gate), None
        return found

    def _make(self, gate: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            return leaf, self.function(leaf)


class _Gated(torch.autograd.Function):
    """act(gate) · up, whose activation is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activated: _Activated) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activated = activated
        return activated.function(gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        leaf, activation = ctx.activated.again(gate)
        (grad_gate,) = torch.autograd.grad(activation, leaf, grad * up)
        return grad_gate, grad * activation.detach(), None


class _GatedByKernel(torch.autograd.Function):
    """act(gate) · up, both ways by a kernel."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kernel: GatedKernel) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kernel = kernel
        return kernel.forward(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        # last to read gate and up: down's input has been made of them already
        return *ctx.kernel.backward(grad, *ctx.saved_tensors), None
