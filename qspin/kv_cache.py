"""The two layouts of generation, and the keys and values that they keep.

- `Prefill`: plain causal sequences whose keys and values go into slots of a `KVCache`.
- `Decode`: one new token for each of the cache's live slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from qspin.attention import Lengths, Packed, Rules, additive


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
            output = torch.matmul((rules.softcap * torch.tanh(scores / rules.softcap) + mask).softmax(-1), seen_values)
        return output.reshape(live, heads, size)

    def _mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        cached = self._masks.get((window, dtype))
        if cached is None:
            keys = torch.arange(self.longest, device=self.places.device)
            seen = keys <= self.places[:, None]  # (B, S)
            if window is not None:
                seen &= keys > self.places[:, None] - window
            cached = additive(seen, dtype)[:, None, None, :]
            self._masks[window, dtype] = cached
        return cached
