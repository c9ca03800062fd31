"""What torch's flash kernel says that it computes, by plain products: for where there is no GPU."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor


def attention(
    query: Tensor, key: Tensor, value: Tensor, ends: tuple[Tensor, Tensor], scale: float, left: int
) -> Tensor:  # (T, H, D), (S, Hkv, D), (S, Hkv, D) → (T, H, D)
    """A sequence's last query sees its last key."""
    repeats, outputs = query.shape[1] // key.shape[1], []
    for (q_start, q_end), (k_start, k_end) in zip(*map(itertools.pairwise, ends), strict=True):
        parts = (query[q_start:q_end], key[k_start:k_end], value[k_start:k_end])
        q, k, v = (x.transpose(0, 1).float() for x in parts)
        scores = scale * q @ k.repeat_interleave(repeats, 0).transpose(1, 2)  # (H, t, s)
        apart = torch.arange(k.shape[1] - q.shape[1], k.shape[1])[:, None] - torch.arange(k.shape[1])
        seen = (apart >= 0) & ((apart <= left) | (left < 0))
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        outputs.append((weights @ v.repeat_interleave(repeats, 0)).transpose(0, 1))
    return torch.cat(outputs).to(query.dtype)


def forward(
    query: Tensor, key: Tensor, value: Tensor, query_ends: Tensor, key_ends: Tensor, *_: Any,
    scale: float, window_size_left: int, window_size_right: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert window_size_right == 0
    inputs = (x.cpu() for x in (query, key, value))
    output = attention(*inputs, (query_ends.cpu(), key_ends.cpu()), scale, window_size_left)
    return output.to(query.device), *torch.zeros(4, 1, device=query.device).unbind()


def backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, _output: Tensor, _sums: Tensor, query_ends: Tensor,
    key_ends: Tensor, *_: Any, scale: float, window_size_left: int, window_size_right: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert window_size_right == 0
    leaves = [x.detach().cpu().clone().requires_grad_() for x in (query, key, value)]
    with torch.enable_grad():
        output = attention(*leaves, (query_ends.cpu(), key_ends.cpu()), scale, window_size_left)
    return tuple(x.to(query.device) for x in torch.autograd.grad(output, leaves, grad.cpu()))
