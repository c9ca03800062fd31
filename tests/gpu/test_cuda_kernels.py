"""Kernels on a GPU against plain arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from on_cuda import CUDA, ON_CUDA, load, relative, unsloth_only
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.llama import modeling_llama

from qspin.layers.attention import Lengths, Packed, Rules, _SpanAttention
from qspin.layers.backends import unsloth_kernels
from qspin.layers.fused import _GatedByKernel
from qspin.layers.kernels import Kernels

pytestmark = ON_CUDA
if torch.cuda.is_available():
    from qspin.layers import nf4_product


@pytest.mark.parametrize("prefix", [0, 17])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(9, 3, 64), (8, 8, 128)])
def test_flash_attention_is_attention(prefix: int, window: int | None, heads: int, kv_heads: int, size: int) -> None:
    row = Packed([Lengths(30, 50, 70), Lengths(5, 9, 1), Lengths(64, 20)], CUDA, prefix)
    tokens = prefix + sum(group.total for group in row.groups)
    rules = Rules(size**-0.5, window, None)
    torch.manual_seed(0)
    shapes = ((heads, tokens, size), (kv_heads, tokens, size), (kv_heads, tokens, size))
    inputs = [torch.randn(shape, device=CUDA, dtype=torch.bfloat16) for shape in shapes]
    grad = torch.randn(tokens, heads, size, device=CUDA, dtype=torch.bfloat16)

    def both(attend: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        output = attend(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(dtype))]

    wanted = both(lambda *x: _SpanAttention.apply(*x, row, rules), torch.float32)
    found = both(lambda q, k, v: row.attend(0, q, k, v, rules), torch.bfloat16)
    again = both(lambda q, k, v: row.attend(0, q, k, v, rules), torch.bfloat16)
    for one, other, reference in zip(found, again, wanted, strict=True):
        assert relative(one, reference) < 1e-2
        assert torch.equal(one, other), "sums in order of arrival"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("rows", "ins", "outs", "rank"), [(1, 256, 80, 4), (16, 1024, 2064, 16), (40, 512, 8208, 8), (128, 4096, 1024, 64)]
)
def test_product_by_4_bits(
    rows: int, ins: int, outs: int, rank: int, biased: bool, double_quant: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, device=CUDA, dtype=dtype)

    data, constants = bnb.quantize_4bit(some(outs, ins), quant_type="nf4", compress_statistics=double_quant)
    x, both, b, bias = some(rows, ins), some(rows, 2 * rank), some(outs, rank), some(outs) if biased else None
    low = both[:, rank:]  # as of one of several layers
    found = nf4_product.product(x, data, constants, low, b, bias)
    wanted = x.float() @ bnb.dequantize_4bit(data, constants).float().t() + low.float() @ b.float().t()
    assert relative(found, wanted if bias is None else wanted + bias) < (5e-3 if dtype == torch.bfloat16 else 1e-3)
    assert torch.equal(found, nf4_product.product(x, data, constants, low, b, bias))


@unsloth_only
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])
def test_gated_kernels(name: Any) -> None:
    functions = {"silu": functional.silu, "gelu": functional.gelu}
    function = functions.get(name, lambda x: functional.gelu(x, approximate="tanh"))
    torch.manual_seed(0)
    gate, up, grad = (torch.randn(1, 70, 192, device=CUDA, dtype=torch.bfloat16) for _ in range(3))
    leaves = [x.float().requires_grad_() for x in (gate, up)]
    wanted = function(leaves[0]) * leaves[1]
    wanted_grads = torch.autograd.grad(wanted, leaves, grad.float())
    ours = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    found = _GatedByKernel.apply(*ours, unsloth_kernels().gated(name))
    assert relative(found, wanted) < 1e-2
    for one, other in zip(torch.autograd.grad(found, ours, grad.clone()), wanted_grads, strict=True):
        assert relative(one, other) < 1e-2


@unsloth_only
@pytest.mark.parametrize("one_plus", [False, True])
def test_norm_kernel(one_plus: bool) -> None:
    norm = nn.RMSNorm(192, eps=1e-6, device=CUDA, dtype=torch.bfloat16)
    torch.manual_seed(0)
    norm.weight.data.uniform_(-0.5, 1.5)
    norm.requires_grad_(False)
    x, grad = (torch.randn(1, 70, 192, device=CUDA, dtype=torch.bfloat16) for _ in range(2))
    leaf, ours = x.float().requires_grad_(), x.clone().requires_grad_()
    scale = norm.weight.float() + one_plus
    wanted = leaf * torch.rsqrt(leaf.pow(2).mean(-1, keepdim=True) + 1e-6) * scale
    kernel = unsloth_kernels().rms_norm(norm, one_plus=one_plus)
    assert kernel is not None
    found = kernel(ours)
    assert relative(found, wanted) < 1e-2
    (found_grad,), (wanted_grad,) = (
        torch.autograd.grad(found, ours, grad),
        torch.autograd.grad(wanted, leaf, grad.float()),
    )
    assert relative(found_grad, wanted_grad) < 1e-2


@unsloth_only
def test_dequantised_weights_are_the_same(tiny_folder: Callable[[str], Path]) -> None:
    model = load(tiny_folder("llama"), "unsloth")
    kernels = model._layers[0]._kernels
    for layers in model._layers:
        for data, constants, _ in layers.packed:
            assert torch.equal(kernels.dequantise(data, constants), Kernels().dequantise(data, constants))


@unsloth_only
def test_rotary_kernel() -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(1, 60, heads, 64, device=CUDA, dtype=torch.bfloat16).transpose(1, 2) for heads in (6, 2))
    # of either half of a head the same
    cos, sin = (torch.randn(1, 60, 32, device=CUDA, dtype=torch.bfloat16).repeat(1, 1, 2) for _ in range(2))
    grads = [torch.randn_like(x) for x in (q, k)]
    leaves, ours = ([x.clone().requires_grad_() for x in (q, k)] for _ in range(2))
    own = getattr(modeling_llama.apply_rotary_pos_emb, "own", modeling_llama.apply_rotary_pos_emb)
    kernel = unsloth_kernels().rotary(own)
    assert kernel is not None
    wanted, found = own(*leaves, cos, sin), kernel(*(x * 1 for x in ours), cos, sin)
    for one, other in zip(found, wanted, strict=True):
        assert relative(one, other) < 1e-2
    for one, other in zip(
        torch.autograd.grad(found, ours, grads), torch.autograd.grad(wanted, leaves, grads), strict=True
    ):
        assert relative(one, other) < 1e-2
