"""4-bit linear layers with LoRA as one differentiable function: y = x·Wᵀ + (α/r)·(x·Aᵀ)·Bᵀ.

PEFT keeps the adapter's modules and file format; this replaces only how they compute. Against PEFT's own forward it
dequantises W without a detour, multiplies by A and B in the compute type (PEFT casts the activations up to the
fp32 master weights, which is slower), keeps x once for both gradients, and adds in place. Layers that read the same
input (query, key and value; gate and up) are computed by one call: one dequantisation, one product with all their A,
and gradients of x that add up inside the products.

W is never written: bitsandbytes' repacking for inference on CPUs is bypassed, since training through it is wrong
and its inverse loses precision.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor
from torch.nn import functional

from qspin.layers.kernels import Kernels

Linear = Callable[[Tensor], Tensor]
MakeAgain = Callable[..., Tensor]


def _itself(x: Tensor) -> Tensor:
    return x


def remade(tensor: Tensor, make: MakeAgain, *parts: Tensor) -> Tensor:
    """The tensor, with what it can be made from again: a layer that reads it keeps the parts instead."""
    tensor.make_again = (make, parts)  # type: ignore[attr-defined]
    return tensor


def fuse_lora(layers: Sequence[Any], adapter: str, kernels: Kernels) -> FusedLayers:
    """Make PEFT's `lora.Linear4bit` layers that read the same input compute together."""
    fused = FusedLayers(layers, adapter, kernels)
    for index, layer in enumerate(layers):
        layer.forward = functools.partial(fused.output, index)
    return fused


def laid_out(weight: Tensor, bias: Tensor | None) -> Linear:
    """x → x·Wᵀ + bias for many products without gradient, on a CPU, of a W (out, in) that stays as it is.

    oneDNN computes on blocks of W. It makes them at each call from a plain matrix, which takes longer than a product
    with a few rows itself; here they are made once.
    """
    if not _onednn_computes(weight.dtype):
        return lambda x: functional.linear(x, weight, bias)
    blocks = torch.ops.mkldnn._reorder_linear_weight(weight)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, blocks, bias, "none", [], "")


def _onednn_computes(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.float32:
        return True
    asked = torch.ops.mkldnn
    return bool(asked._is_mkldnn_bf16_supported() if dtype == torch.bfloat16 else asked._is_mkldnn_fp16_supported())


class FusedLayers:
    """n layers of `out` features each, of rank r and with the same `in`."""

    def __init__(self, layers: Sequence[Any], adapter: str, kernels: Kernels) -> None:
        self._kernels = kernels
        bases = [layer.base_layer for layer in layers]
        self.packed = _stacked([base.weight for base in bases])
        self.biases = [base.bias for base in bases]
        self.a = [layer.lora_A[adapter].weight for layer in layers]
        self.b = [layer.lora_B[adapter].weight for layer in layers]
        self._masters = _in_one([*self.a, *self.b])
        self.scaling: float = layers[0].scaling[adapter]  # α/r
        self.outs = [len(b) for b in self.b]
        self.ranks = [len(a) for a in self.a]
        self.recomputed = False  # what is kept for the backward pass lasts until the layer is computed again, or not
        self._input: Tensor | None = None
        self._outputs: list[Tensor | None] = [None] * len(layers)
        self._low_rank: tuple[Any, Tensor, list[Tensor]] | None = None
        self._unpacked: tuple[Linear, Tensor] | None = None
        self.few_rows = False  # on a GPU: these are the steps of decoding, and W need not be made for them

    @property
    def weights(self) -> int:
        """How many weights W has in all."""
        return sum(math.prod(constants.shape) for _, constants, _ in self.packed)

    def unpack(self, dtype: torch.dtype) -> None:
        """Until `pack`: have W in the compute type rather than make it at each call, for generation on a CPU.

        Whoever is in the slot stays there: W and A become one matrix.
        """
        a, bs = self.low_rank(dtype, training=False)
        biases = [
            a.new_zeros(out) if bias is None else bias.to(dtype)
            for out, bias in zip(self.outs, self.biases, strict=True)
        ]
        bias = torch.cat([*biases, a.new_zeros(len(a))]) if any(bias is not None for bias in self.biases) else None
        # with few rows a product costs its call, so all B are one too, (Σ r, Σ out)
        b: Tensor = torch.block_diag(*bs).t().contiguous()  # type: ignore[no-untyped-call]
        self._unpacked = laid_out(torch.cat([*self.matrices(), a]), bias), b.mul_(self.scaling)

    def pack(self) -> None:
        self._unpacked = None

    def forget(self) -> None:
        """Hold nothing that was kept to be quicker the next time."""
        self._low_rank = None
        self.let_go()

    def let_go(self) -> None:
        """Hold nothing of a pass that was refused between two of the layers, as by a norm of queries: what was made
        for the next of them has all that was kept before it in its graph."""
        self._input, self._outputs = None, [None] * len(self._outputs)

    def output(self, index: int, x: Tensor) -> Tensor:
        """What one of the layers makes of x; the first to be asked computes for all."""
        if x is not self._input or self._outputs[index] is None:
            self._input = None  # if memory runs out now, nothing of an unfinished pass is held
            if torch.is_grad_enabled():
                outputs = self._differentiable_product(x)
            elif self._unpacked is not None:
                outputs = self._unpacked_product(x, *self._unpacked)
            elif self.few_rows and self._kernels.multiplies_packed(x):
                outputs = self._few_rows_product(x)
            else:
                a, bs = self.low_rank(x.dtype, training=False)
                outputs = self.product(x, self._low(x, a), bs)
            self._input, self._outputs = x, list(outputs)
        output, self._outputs[index] = self._outputs[index], None
        if not any(left is not None for left in self._outputs):
            self._input = None
        assert output is not None
        return output

    def _low(self, x: Tensor, a: Tensor) -> Tensor:
        """(…, in), (Σ r, in) → (α/r)·x·Aᵀ of all layers, (N, Σ r)."""
        flat = x.reshape(-1, x.shape[-1])
        return flat.new_empty(len(flat), len(a)).addmm_(flat, a.t(), beta=0, alpha=self.scaling)

    def product(self, x: Tensor, low: Tensor, bs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """(…, in), and (α/r)·x·Aᵀ of all layers, (N, Σ r) → (…, out) for each layer."""
        flat = x.reshape(-1, x.shape[-1])  # (N, in)
        outputs = []
        for matrix, bias, part, b in zip(self.matrices(), self.biases, _parts(low, self.ranks, 1), bs, strict=True):
            y = x.new_empty(*x.shape[:-1], len(b))  # no view: a family may write into it, as OLMo to clip it
            rows = y.view(-1, len(b))
            # on a GPU what is written first is read where the large product is computed, and costs no time there
            first, then = ((part, b), (flat, matrix)) if x.is_cuda else ((flat, matrix), (part, b))
            if bias is None:
                torch.mm(first[0], first[1].t(), out=rows)
            else:
                torch.addmm(bias.to(x.dtype), first[0], first[1].t(), out=rows)
            rows.addmm_(then[0], then[1].t())
            outputs.append(y)
        return tuple(outputs)

    def _differentiable_product(self, x: Tensor) -> tuple[Tensor, ...]:
        """(…, in) → (…, out) for each layer."""
        make, parts = getattr(x, "make_again", (_itself, (x,)))
        a, bs = self.low_rank(x.dtype, training=True)
        with torch.no_grad():
            low = self._low(x, a)
        tensors = (low, a, *bs, *parts)
        kept = _Kept.apply(self.a[0], *tensors) if self.recomputed else None  # type: ignore[no-untyped-call]
        outputs: tuple[Tensor, ...] = LoraLinear4bit.apply(  # type: ignore[no-untyped-call]
            x, kept, tensors, make, self, *self.a, *self.b
        )
        return outputs

    def _unpacked_product(self, x: Tensor, linear: Linear, b: Tensor) -> tuple[Tensor, ...]:
        """(…, in) → (…, out) for each layer."""
        both = linear(x.reshape(-1, x.shape[-1]))  # (N, Σ out + Σ r)
        ys = both[:, : b.shape[1]].addmm_(both[:, b.shape[1] :], b)
        return tuple(y.view(*x.shape[:-1], -1) for y in _parts(ys, self.outs, 1))

    def _few_rows_product(self, x: Tensor) -> tuple[Tensor, ...]:
        """(…, in) → (…, out) for each layer, of which each has been packed by itself."""
        a, bs = self.low_rank(x.dtype, training=False)
        flat = x.reshape(-1, x.shape[-1])
        lows = _parts(self._low(x, a), self.ranks, 1)
        outputs = []
        for (data, constants, _), bias, low, b in zip(self.packed, self.biases, lows, bs, strict=True):
            y = self._kernels.few_rows_product(
                flat, data, constants, low, b, None if bias is None else bias.to(x.dtype)
            )
            outputs.append(y.view(*x.shape[:-1], -1))
        return tuple(outputs)

    def matrices(self) -> Iterator[Tensor]:
        """(out, in) in the compute type for each layer, each good until the next is asked for."""
        for data, constants, layers in self.packed:
            matrix = self._kernels.dequantise(data, constants)
            yield from _parts(matrix, [self.outs[layer] for layer in layers])

    def low_rank(self, dtype: torch.dtype, *, training: bool) -> tuple[Tensor, list[Tensor]]:
        """All A stacked, (Σ r, in), and each B, (out, r).

        Kept from call to call while nothing is trained, until the weights' versions say that another player is in the
        slot. Optimisers may write past the versions, so in training they are made anew, and nothing is kept.
        """
        if training:
            self._low_rank = None
            return self._divided(self._masters.to(dtype))
        key = (dtype, [parameter._version for parameter in (*self.a, *self.b)])
        if self._low_rank is None or self._low_rank[0] != key:
            with torch.inference_mode(False):  # a backward pass may keep them
                self._low_rank = key, *self._divided(self._masters.to(dtype))
        return self._low_rank[1:]

    def _divided(self, numbers: Tensor) -> tuple[Tensor, list[Tensor]]:
        """All weights of A and B in turn, as `_masters` has them → A stacked, (Σ r, in), and each B, (out, r)."""
        ins = self.a[0].shape[1]
        a, *bs = torch.split(numbers, [sum(self.ranks) * ins, *(b.numel() for b in self.b)])
        return a.view(-1, ins), [part.view(len(b), -1) for part, b in zip(bs, self.b, strict=True)]

    def gradients(
        self, x: Tensor, low: Tensor, a: Tensor, bs: Sequence[Tensor], grads: Sequence[Tensor], *, of_x: bool
    ) -> tuple[Tensor | None, list[Tensor]]:
        """(N, in), (N, Σ r), A, every B, and (N, out) for each layer → d/d x if asked for, and d/d A and d/d B of each
        layer in fp32."""
        grad_low = low.new_empty(low.shape)
        for part, grad, b in zip(_parts(grad_low, self.ranks, 1), grads, bs, strict=True):
            part.addmm_(grad, b, beta=0, alpha=self.scaling)
        grad_x = None
        if of_x:
            grad_x = grad_low @ a
            for grad, matrix in zip(grads, self.matrices(), strict=True):
                grad_x.addmm_(grad, matrix)
        numbers = low.new_empty(len(self._masters))
        grad_a, grad_bs = self._divided(numbers)
        torch.mm(grad_low.t(), x, out=grad_a)
        for grad_b, grad, part in zip(grad_bs, grads, _parts(low, self.ranks, 1), strict=True):
            torch.mm(grad.t(), part, out=grad_b)
        grad_a, grad_bs = self._divided(numbers.float())  # as one, as calls cost more than these few numbers
        return grad_x, [*_parts(grad_a, self.ranks), *grad_bs]


class _Kept(torch.autograd.Function):
    """A node that keeps tensors for LoraLinear4bit's backward pass, and gives no gradient.

    A node's tensors are kept once its output is there, and gradient checkpointing computes a layer again until all
    that it kept is: with a node of their own that is before the layer's last product, a quarter of its work.
    """

    @staticmethod
    def forward(ctx: Any, master: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return master.new_empty(0)

    @staticmethod
    def backward(ctx: Any, _grad: Tensor) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)


class LoraLinear4bit(torch.autograd.Function):
    """x (…, in) in the compute type → (…, out) for each layer; every A (r, in) and B (out, r) fp32 masters, as are
    their gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, kept: Tensor | None, tensors: Sequence[Tensor], make: MakeAgain, layers: FusedLayers,
        *_masters: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        if kept is None:
            ctx.save_for_backward(*tensors)
        ctx.kept, ctx.make, ctx.layers = kept, make, layers
        low, _, *rest = tensors
        return layers.product(x, low, rest[: len(layers.outs)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        layers: FusedLayers = ctx.layers
        low, a, *rest = ctx.saved_tensors if ctx.kept is None else ctx.kept.grad_fn.saved_tensors
        bs, parts = rest[: len(layers.outs)], rest[len(layers.outs) :]
        x = ctx.make(*parts)
        grad_x, grad_masters = layers.gradients(
            x.reshape(-1, x.shape[-1]), low, a, bs, [grad.reshape(-1, grad.shape[-1]) for grad in grads],
            of_x=ctx.needs_input_grad[0],
        )  # fmt: skip
        if grad_x is not None:
            grad_x = grad_x.view(*grads[0].shape[:-1], -1)
        return grad_x, None, None, None, None, *grad_masters


def _in_one(parameters: Sequence[Tensor]) -> Tensor:
    """All numbers of some parameters in turn, which go on as views of it: what is done to all is one call."""
    numbers = torch.cat([parameter.detach().reshape(-1) for parameter in parameters])
    for parameter, part in zip(parameters, torch.split(numbers, [p.numel() for p in parameters]), strict=True):
        parameter.data = part.view(parameter.shape)
    return numbers


def _parts(tensor: Tensor, sizes: list[int], dim: int = 0) -> Sequence[Tensor]:
    """As `torch.split`, which takes as long as a launch also where there is nothing to split."""
    return torch.split(tensor, sizes, dim) if len(sizes) > 1 else (tensor,)


def _stacked(weights: Sequence[Any]) -> list[tuple[Tensor, Any, range]]:
    """Packed data and quantisation constants of what is to be dequantised in one call, and which weights those are.

    On a CPU they become one: calls are what dequantising costs there. The weights go on as views of it, and constants
    that are quantised themselves, whose blocks don't end where a weight does, are unpacked once and for all, for 0.37
    bits a weight more.
    """
    states = [weight.quant_state for weight in weights]
    if weights[0].device.type != "cpu":
        return [(weight.data, weight.quant_state, range(i, i + 1)) for i, weight in enumerate(weights)]
    data = torch.cat([weight.data for weight in weights])
    for weight, part in zip(weights, torch.split(data, [len(weight) for weight in weights]), strict=True):
        weight.data = part
    absmax = [
        bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
        for state in states
    ]
    rows = sum(state.shape[0] for state in states)
    first = states[0]
    together = bnb.QuantState(
        absmax=torch.cat(absmax).float(),
        shape=torch.Size([rows, first.shape[1]]),
        code=first.code,
        blocksize=first.blocksize,
        quant_type=first.quant_type,
        dtype=first.dtype,
    )
    return [(data, together, range(len(weights)))]
