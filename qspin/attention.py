"""Who attends to whom: one attention function, three layouts of the tokens in a row.

Every forward pass runs on one row of T tokens without padding; a layout says how the row is cut.

- `Packed`: pairs side by side, each as prompt, real and generated completion (its prompt computed once: both
  completions see it, and neither sees the other), or as a plain causal sequence.
- `Prefill`: plain causal sequences whose keys and values go into slots of a `KVCache`.
- `Decode`: one new token for each of the cache's live slots.

The layout travels as a keyword argument through the decoder of any transformers model that hands its keyword
arguments to its attention function; `attend` is that function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

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
    output = layout.attend(int(module.layer_idx), query[0], key[0], value[0], rules)  # type: ignore[arg-type]
    return output.unsqueeze(0), None


class Packed:
    """Groups side by side, after a prefix that begins the prompts of all of them and is computed once.

    Every group attends to the prefix and within itself.
    """

    def __init__(self, groups: Sequence[Lengths], device: torch.device, prefix: int = 0) -> None:
        self.groups = tuple(groups)
        self.device = device
        self.prefix = prefix
        self._masks: dict[tuple[Lengths, int, int | None, torch.dtype], Tensor] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor:  # noqa: ARG002
        outputs = []
        start = self.prefix
        if start:
            mask = self._mask(Lengths(start), 0, rules.window, query.dtype)
            outputs.append(_attention(query[:, :start], key[:, :start], value[:, :start], mask, rules))
        for group in self.groups:
            rows = slice(start, start + group.total)
            mask = self._mask(group, self.prefix, rules.window, query.dtype)
            outputs.append(_attention(query[:, rows], self._seen(key, rows), self._seen(value, rows), mask, rules))
            start += group.total
        return torch.cat(outputs)

    def _seen(self, tensor: Tensor, rows: slice) -> Tensor:
        """Keys or values that a group may look at: (Hkv, prefix + T, D)."""
        own = tensor[:, rows]
        return torch.cat([tensor[:, : self.prefix], own], dim=1) if self.prefix else own

    def _mask(self, group: Lengths, prefix: int, window: int | None, dtype: torch.dtype) -> Tensor:
        """(T, prefix + T) additive: 0 where a query may look, -inf elsewhere. Made once a row, for all layers."""
        cached = self._masks.get((group, prefix, window, dtype))
        if cached is None:
            end_of_real = group.prompt + group.real
            seen = torch.ones(group.total, group.total, dtype=torch.bool).tril()
            seen[end_of_real:, group.prompt : end_of_real] = False
            seen = torch.cat([torch.ones(group.total, prefix, dtype=torch.bool), seen], dim=1)
            if window is not None:
                queries = group_positions(group) + prefix
                seen &= queries[:, None] - torch.cat([torch.arange(prefix), queries])[None, :] < window
            cached = _additive(seen.to(self.device), dtype)
            self._masks[group, prefix, window, dtype] = cached
        return cached


class KVCache:
    """Keys and values of up to `slots` sequences of up to `capacity` tokens each; slots are used again."""

    def __init__(self, *, slots: int, capacity: int, device: torch.device) -> None:
        self.slots = slots
        self.capacity = capacity
        self.device = device
        self.lengths = torch.zeros(slots, dtype=torch.long)  # tokens in each slot; on the CPU, for bookkeeping
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The (slots, Hkv, capacity, D) keys and values of a layer, made when first needed."""
        if index not in self._layers:
            heads, _, size = like.shape
            shape = (self.slots, heads, self.capacity, size)
            # zeros, not empty: masked positions are multiplied by 0, and 0 · NaN is NaN
            self._layers[index] = (like.new_zeros(shape), like.new_zeros(shape))
        return self._layers[index]

    def move(self, source: int, target: int) -> None:
        """Overwrite one slot with another."""
        length = int(self.lengths[source])
        self.lengths[target] = length
        for keys, values in self._layers.values():
            keys[target, :, :length] = keys[source, :, :length]
            values[target, :, :length] = values[source, :, :length]


class Prefill:
    """Prompts side by side after their common prefix, each written whole into its slot of the cache."""

    def __init__(self, cache: KVCache, slots: Sequence[int], lengths: Sequence[int], prefix: int) -> None:
        self.cache = cache
        self.slots = tuple(slots)
        self.packed = Packed([Lengths(length - prefix) for length in lengths], cache.device, prefix)
        cache.lengths[list(slots)] = torch.tensor(lengths)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor:
        prefix = self.packed.prefix
        for store, new in zip(self.cache.layer(layer, key), (key, value), strict=True):
            start = prefix
            for slot, group in zip(self.slots, self.packed.groups, strict=True):
                store[slot, :, :prefix] = new[:, :prefix]
                store[slot, :, prefix : prefix + group.total] = new[:, start : start + group.total]
                start += group.total
        return self.packed.attend(layer, query, key, value, rules)


class Decode:
    """One new token a live slot: it joins the cache, and attends to all that its slot holds.

    The live slots are the cache's first `live`, so that nothing is gathered and nothing copied.
    """

    def __init__(self, cache: KVCache, live: int) -> None:
        self.cache = cache
        self.live = live
        self.places = cache.lengths[:live].clone().to(cache.device)  # a copy: the lengths grow below
        self.rows = torch.arange(live, device=cache.device)
        self.longest = int(cache.lengths[:live].max()) + 1
        self._masks: dict[tuple[int | None, torch.dtype], Tensor] = {}
        cache.lengths[:live] += 1

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor:
        keys, values = self.cache.layer(layer, key)
        keys[self.rows, :, self.places] = key.transpose(0, 1)
        values[self.rows, :, self.places] = value.transpose(0, 1)
        heads, live, size = query.shape
        kv_heads = key.shape[0]
        # the query heads that share a key head become rows of one small product: no key is repeated
        grouped = query.view(kv_heads, heads // kv_heads, live, size).permute(2, 0, 1, 3)  # (B, Hkv, G, D)
        mask = self._mask(rules.window, query.dtype)
        seen_keys, seen_values = keys[:live, :, : self.longest], values[:live, :, : self.longest]
        if rules.softcap is None:
            output = functional.scaled_dot_product_attention(
                grouped, seen_keys, seen_values, attn_mask=mask, scale=rules.scaling
            )
        else:
            scores = torch.matmul(grouped * rules.scaling, seen_keys.transpose(2, 3))
            output = torch.matmul((_capped(scores, rules.softcap) + mask).softmax(-1), seen_values)
        return output.reshape(live, heads, size)

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        cached = self._masks.get((window, dtype))
        if cached is None:
            keys = torch.arange(self.longest, device=self.places.device)
            seen = keys <= self.places[:, None]  # (B, S)
            if window is not None:
                seen &= keys > self.places[:, None] - window
            cached = _additive(seen, dtype)[:, None, None, :]
            self._masks[window, dtype] = cached
        return cached


def group_positions(group: Lengths) -> Tensor:
    """(T,) position ids: both completions go on where the prompt ends."""
    prompt, real, generated = group.prompt, group.real, group.generated
    return torch.cat(
        [torch.arange(prompt), torch.arange(prompt, prompt + real), torch.arange(prompt, prompt + generated)]
    )


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, rules: Rules) -> Tensor:
    """(H, T, D) queries on (Hkv, S, D) keys under a (T, S) mask → (T, H, D).

    On a CPU plain products beat the fused kernel at the lengths of chat rows, its backward above all; elsewhere
    the fused kernel keeps the (H, T, S) scores out of memory.
    """
    heads, length, size = query.shape
    kv_heads, seen = key.shape[:2]
    if query.device.type != "cpu" and rules.softcap is None:
        output = functional.scaled_dot_product_attention(
            query[None], key[None], value[None], attn_mask=mask, scale=rules.scaling, enable_gqa=kv_heads != heads
        )
        return output[0].transpose(0, 1)
    grouped = (query * rules.scaling).reshape(kv_heads, heads // kv_heads * length, size)
    scores = torch.matmul(grouped, key.transpose(1, 2)).view(heads, length, seen)
    if rules.softcap is not None:
        scores = _capped(scores, rules.softcap)
    weights = (scores + mask).softmax(-1).view(kv_heads, heads // kv_heads * length, seen)
    return torch.matmul(weights, value).view(heads, length, size).transpose(0, 1)


def _capped(scores: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(scores / softcap)


def _additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
