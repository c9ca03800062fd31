"""Flash attention over a row's spans in one call, on GPUs that have it.

The kernel is torch's, for sequences of different lengths side by side. A span's queries are the last of its keys, and
that is how the kernel aligns a causal mask. Only what surrounds it is here: keys and values are gathered span by span,
and in the backward pass the gradients of what several spans have read are summed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import deterministic

LARGEST_HEAD = 256  # features of a head, a multiple of 8


class Spans:
    """Where each span's queries and keys lie. N spans, T tokens, S keys of all spans together.

    Args:
        queries: t of each span; all spans' queries in turn are the row.
        keys: (s,) places in the row of each span's keys, on the CPU.
        prefix: so many places at the row's beginning are among every span's keys.
    """

    def __init__(self, queries: Sequence[int], keys: Sequence[Tensor], prefix: int, device: torch.device) -> None:
        places = torch.cat(list(keys))
        tokens = sum(queries)
        self.query_ends, self.most_queries = _ends(queries, device), max(queries)
        self.key_ends, self.most_keys = _ends([len(own) for own in keys], device), max(map(len, keys))
        self.key_places = places.to(device)  # (S,)
        # Of a place's keys one comes first; a prompt's has a second one, in the generated completion's span, and the
        # prefix's has one in each span. No index is twice in one sum, so sums are made in one order.
        order = torch.argsort(places, stable=True)
        ordered = places[order]
        before = torch.bincount(places, minlength=tokens).cumsum(0)
        rank = torch.arange(len(places)) - torch.cat([torch.zeros(1, dtype=torch.long), before[:-1]])[ordered]
        self._first = order[rank == 0].to(device)  # (T,) into S
        second = order[(rank > 0) & (ordered >= prefix)]
        self._second, self._second_places = second.to(device), places[second].to(device)
        self._prefix = order[ordered < prefix].view(prefix, len(keys)).t().to(device)  # (N, P) into S

    def gather(self, x: Tensor) -> Tensor:
        """(Hkv, T, D) → (S, Hkv, D)."""
        return x.transpose(0, 1).index_select(0, self.key_places)

    def gather_backward(self, grad: Tensor) -> Tensor:
        """(S, Hkv, D) → (Hkv, T, D), each sum rounded once."""
        total = grad.index_select(0, self._first)
        total.index_add_(0, self._second_places, grad.index_select(0, self._second))
        if self._prefix.numel():
            read = grad.index_select(0, self._prefix.flatten())
            read = read.view(*self._prefix.shape, *grad.shape[1:])  # (N, P, Hkv, D)
            total[: self._prefix.shape[1]] = read.sum(0, dtype=torch.float32)
        return total.transpose(0, 1)


def can_flash(query: Tensor) -> bool:
    """Whether the kernel takes queries of this type and shape, where they are."""
    return (
        query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] <= LARGEST_HEAD
        and query.shape[-1] % 8 == 0
        and has_flash(query.device)
    )


def has_flash(device: torch.device) -> bool:
    """Whether this GPU and this build of torch have the kernel."""
    return (
        torch.version.hip is None  # AMD's aligns a causal mask with the first keys, and knows no window
        and torch.backends.cuda.is_flash_attention_available()
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


class FlashAttention(torch.autograd.Function):
    """softmax(scaling·q·kᵀ)·v of each span, a query seeing no key after it nor any `window` places before it."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, spans: Spans, scaling: float, window: int | None
    ) -> Tensor:  # (H, T, D), (Hkv, T, D), (Hkv, T, D) → (T, H, D)
        options = {
            "scale": scaling,
            "window_size_left": -1 if window is None else window - 1,
            "window_size_right": 0,
        }
        output: Tensor
        output, log_sums, *random, _ = torch.ops.aten._flash_attention_forward(
            query.transpose(0, 1), spans.gather(key), spans.gather(value), *_lengths(spans), 0.0, True, False, **options
        )
        ctx.save_for_backward(query, key, value, output, log_sums, *random)
        ctx.spans, ctx.options = spans, options
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        query, key, value, output, log_sums, *random = ctx.saved_tensors
        spans: Spans = ctx.spans
        with in_one_order():  # the gradient of queries is such a sum
            grad_query, grad_keys, grad_values = torch.ops.aten._flash_attention_backward(
                grad.contiguous(),
                query.transpose(0, 1),
                spans.gather(key),
                spans.gather(value),
                output,
                log_sums,
                *_lengths(spans),
                0.0,
                True,
                *random,
                **ctx.options,
            )
        return (
            grad_query.transpose(0, 1),
            *spans.gather_backward(torch.cat([grad_keys, grad_values], 1)).chunk(2),  # both at once: half the launches
            None,
            None,
            None,
        )


@contextlib.contextmanager
def in_one_order() -> Iterator[None]:
    """Sums that several threads of a GPU add to are made in a fixed order, not in that of arrival."""
    before = torch.are_deterministic_algorithms_enabled(), deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    # else each new tensor is filled first; kernels write all that they ask for
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        deterministic.fill_uninitialized_memory = before[1]  # type: ignore[attr-defined]


def _lengths(spans: Spans) -> tuple[Tensor, Tensor, int, int]:
    return spans.query_ends, spans.key_ends, spans.most_queries, spans.most_keys


def _ends(lengths: Sequence[int], device: torch.device) -> Tensor:
    """(N + 1,) int32: 0, and where each ends."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device=device, dtype=torch.int32)
