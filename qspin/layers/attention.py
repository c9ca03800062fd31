"""Who attends to whom in a row: one attention function, and the layout of rows to score and to train on.

Every forward pass runs on one row of T tokens without padding; a layout says how the row is cut. `Packed`, here, puts
pairs side by side, each as prompt, real and generated completion (its prompt computed once: both completions see it,
and neither sees the other), or as a plain causal sequence. `Prefill` and `Decode`, in kv_cache.py, generate.

The layout travels as a keyword argument through the decoder of any transformers model that hands its keyword
arguments to its attention function; `attend` is that function.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qspin.layers.flash import FlashAttention, Spans, can_flash, in_one_order

IMPLEMENTATION = "qspin"  # the name under which `attend` is registered with transformers


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of one group in a packed row: a prompt, then up to two completions of it."""

    prompt: int
    real: int = 0
    generated: int = 0

    @property
    def total(self) -> int:
        return self.prompt + self.real + self.generated


@dataclass(frozen=True, slots=True)
class Rules:
    """What a model's layer asks of attention."""

    scaling: float
    window: int | None  # a query sees this many positions, itself included
    softcap: float | None  # scores become softcap·tanh(score / softcap)


class Layout(Protocol):
    """How a row is cut: who attends to whom in it."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor:
        """(H, T, D), (Hkv, T, D), (Hkv, T, D) → (T, H, D)."""
        ...


def attend(
    module: torch.nn.Module,
    query: Tensor,  # (1, H, T, D)
    key: Tensor,  # (1, Hkv, T, D)
    value: Tensor,  # (1, Hkv, T, D)
    attention_mask: Tensor | None,
    *,
    scaling: float,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,  # dropout, position ids and whatever else a model passes on
) -> tuple[Tensor, None]:  # (1, T, H, D)
    """The attention function of a transformers layer, by the layout that the forward pass was called with."""
    if layout is None or attention_mask is not None:
        raise RuntimeError("this model attends by layouts: call it through qspin.model.SlotModel")
    rules = Rules(scaling, sliding_window, softcap)
    # not query[0], whose gradient would be written into zeros of its size
    q, k, v = query.squeeze(0), key.squeeze(0), value.squeeze(0)
    output = layout.attend(int(module.layer_idx), q, k, v, rules)  # type: ignore[arg-type]
    return output.unsqueeze(0), None


class Cut:
    """A row cut into spans.

    Args:
        queries: each span's own places; all spans in turn are the row.
        places: (s,) of each span, the places that it may look at, in order of position: its own are the last.
        prefix: so many places at the row's beginning are among every span's.
    """

    def __init__(self, queries: list[slice], places: list[Tensor], device: torch.device, prefix: int = 0) -> None:
        self.queries, self.places = queries, places
        self.device = device
        self.prefix = prefix
        ends = list(itertools.accumulate(map(len, self.places)))
        self.keys = [slice(end - len(own), end) for own, end in zip(self.places, ends, strict=True)]  # into key_places
        self.key_places = torch.cat(places).to(device)  # (S,) the keys of all spans, one span after the other
        self._flash: Spans | None = None
        self._masks: dict[tuple[int, int, int, int | None, torch.dtype], Tensor] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor:  # noqa: ARG002
        if rules.softcap is None and can_flash(query):
            if self._flash is None:
                lengths = [queries.stop - queries.start for queries in self.queries]
                self._flash = Spans(lengths, self.places, self.prefix, self.device)
            flashed: Tensor = FlashAttention.apply(  # type: ignore[no-untyped-call]
                query, key, value, self._flash, rules.scaling, rules.window
            )
            return flashed
        output: Tensor = _SpanAttention.apply(query, key, value, self, rules)  # type: ignore[no-untyped-call]
        return output

    def masks(self, rules: Rules, dtype: torch.dtype, repeats: int = 1) -> list[Tensor]:
        """For each span (repeats·t, s), additive: 0 where a query may look, -inf elsewhere."""
        return [
            self._mask(queries.stop - queries.start, keys.stop - keys.start, rules.window, dtype, repeats)
            for queries, keys in zip(self.queries, self.keys, strict=True)
        ]

    def _mask(self, queries: int, keys: int, window: int | None, dtype: torch.dtype, repeats: int) -> Tensor:
        found = self._masks.get((queries, keys, repeats, window, dtype))
        if found is None:
            places = torch.arange(keys, device=self.device)
            own = places[keys - queries :, None]
            seen = places <= own
            if window is not None:
                seen &= places > own - window
            found = additive(seen, dtype).repeat(repeats, 1)
            self._masks[queries, keys, repeats, window, dtype] = found
        return found


class Packed(Cut):
    """Groups side by side, after a prefix that begins the prompts of all of them and is computed once.

    Every group attends to the prefix and within itself, its generated completion not to its real one.
    """

    def __init__(self, groups: Sequence[Lengths], device: torch.device, prefix: int = 0) -> None:
        self.groups = tuple(groups)
        spans = tuple(_spans(self.groups, prefix))
        places = [torch.cat([torch.arange(part.start, part.stop) for part in span.keys]) for span in spans]
        super().__init__([span.queries for span in spans], places, device, prefix)


@dataclass(frozen=True, slots=True)
class _Span:
    """t queries and the s keys they may look at, in order of position: the queries' own places are the last t.

    So every span is plain causal attention, whatever a row is made of.
    """

    queries: slice
    keys: tuple[slice, ...]


def _spans(groups: Sequence[Lengths], prefix: int) -> Iterator[_Span]:
    before: tuple[slice, ...] = ()
    if prefix:
        before = (slice(0, prefix),)
        yield _Span(slice(0, prefix), before)
    start = prefix
    for group in groups:
        prompt_end = start + group.prompt
        real = slice(start, prompt_end + group.real)
        generated = slice(real.stop, real.stop + group.generated)
        yield _Span(real, (*before, real))
        if group.generated:
            yield _Span(generated, (*before, slice(start, prompt_end), generated))
        start = generated.stop


def group_positions(group: Lengths) -> Tensor:
    """(T,) position ids: both completions go on where the prompt ends."""
    prompt, real, generated = group.prompt, group.real, group.generated
    return torch.cat(
        [torch.arange(prompt), torch.arange(prompt, prompt + real), torch.arange(prompt, prompt + generated)]
    )


class _SpanAttention(torch.autograd.Function):
    """softmax(q·kᵀ)·v of each span as plain products, wherever the flash kernel is not to be had: on a CPU these beat
    the fused kernel at the lengths of chat rows, its backward above all (benchmarks/bench_attention.py), and they know
    soft-caps.

    The query heads that share a key head are rows of one product. Keys and values are gathered once for all spans,
    and their gradients, to which several spans add, are summed in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, row: Cut, rules: Rules
    ) -> Tensor:  # (H, T, D), (Hkv, T, D), (Hkv, T, D) → (T, H, D)
        heads, length, size = query.shape
        kv_heads = len(key)
        masks = row.masks(rules, query.dtype, heads // kv_heads)
        output = query.new_empty(length, heads, size)
        keys, values = _gathered(key, value, row)
        kept: list[Tensor] = []
        for queries, seen, mask in zip(row.queries, row.keys, masks, strict=True):
            q = query[:, queries].reshape(kv_heads, -1, size)  # (Hkv, G·t, D)
            k = keys[:, seen].transpose(1, 2)
            if rules.softcap is None:
                scores = torch.baddbmm(mask[None].expand(kv_heads, -1, -1), q, k, alpha=rules.scaling)  # (Hkv, G·t, s)
            else:
                capped = rules.softcap * torch.tanh((q @ k) * (rules.scaling / rules.softcap))
                kept.append(capped)
                scores = capped + mask
            weights = scores.softmax(-1)
            kept.append(weights)
            output[queries] = (weights @ values[:, seen]).view(heads, -1, size).transpose(0, 1)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.row, ctx.rules = row, rules
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        query, key, value, *kept = ctx.saved_tensors
        row, rules = ctx.row, ctx.rules
        heads, length, size = query.shape
        kv_heads = len(key)
        keys, values = _gathered(key, value, row)
        grad_query = torch.empty_like(query)
        grad_gathered = key.new_empty(2 * kv_heads, len(row.key_places), size)
        tensors = iter(kept)
        for queries, seen in zip(row.queries, row.keys, strict=True):
            capped = None if rules.softcap is None else next(tensors)
            weights = next(tensors)  # (Hkv, G·t, s)
            q = query[:, queries].reshape(kv_heads, -1, size)
            g = grad[queries].transpose(0, 1).reshape(kv_heads, -1, size)
            grad_gathered[kv_heads:, seen] = weights.transpose(1, 2) @ g
            grad_weights = g @ values[:, seen].transpose(1, 2)
            grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype)
            if capped is not None:
                grad_scores = grad_scores * (1 - (capped / rules.softcap) ** 2)
            grad_gathered[:kv_heads, seen] = grad_scores.transpose(1, 2) @ q
            grad_query[:, queries] = (grad_scores @ keys[:, seen]).view(heads, -1, size)
        grad_gathered[:kv_heads] *= rules.scaling
        total = torch.zeros(2 * kv_heads, length, size, device=key.device)
        with in_one_order():
            total = total.index_add_(1, row.key_places, grad_gathered.float()).to(key.dtype)
        return grad_query.mul_(rules.scaling), total[:kv_heads], total[kv_heads:], None, None


def _gathered(key: Tensor, value: Tensor, row: Cut) -> tuple[Tensor, Tensor]:
    """(Hkv, T, D) twice → (Hkv, S, D) twice, the keys and values of all spans."""
    both = torch.cat([key, value]).index_select(1, row.key_places)
    return both[: len(key)], both[len(key) :]


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to scores: 0 where a query may look, -inf elsewhere."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
