"""Kernels on a GPU against plain arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from on_cuda import CUDA, ON_CUDA, load, relative, unsloth_only
from torch import Tensor

from qspin.layers.attention import Lengths, Packed, Rules, _SpanAttention
from qspin.layers.kernels import Kernels

pytestmark = ON_CUDA


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


@unsloth_only
def test_dequantised_weights_are_the_same(tiny_folder: Callable[[str], Path]) -> None:
    model = load(tiny_folder("llama"), "unsloth")
    kernels = model._layers[0]._kernels
    for layers in model._layers:
        for data, constants, _ in layers.packed:
            assert torch.equal(kernels.dequantise(data, constants), Kernels().dequantise(data, constants))
