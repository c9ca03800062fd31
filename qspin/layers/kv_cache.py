"""The two layouts of generation, and the keys and values that they keep.

- `Prefill`: plain causal sequences whose keys and values go into slots of a `KVCache`.
- `Decode`: one new token for each of the cache's live slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from qspin.fitting.footprint import GROWTH
from qspin.layers.attention import Lengths, Packed, Rules, additive


class KVCache:
    """Keys and values of up to `slots` sequences; slots are used again, and places grow as sequences do.

    A layer holds (slots, Hkv, places, D), so that the first slots are one piece of memory: products over them need no
    copy, which they would if each step took as many places as it has tokens.
    """

    def __init__(self, *, slots: int, device: torch.device) -> None:
        self.slots = slots
        self.places = 0
        self.device = device
        self.lengths = torch.zeros(slots, dtype=torch.long)  # tokens in each slot; on the CPU, for bookkeeping
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def reserve(self, length: int) -> None:
        """Make room for sequences of so many tokens."""
        if length > self.places:
            growth = GROWTH[self.device.type]
            grown = -(-length // growth) * growth
            for index, (keys, values) in self._layers.items():
                padding = (0, 0, 0, grown - self.places)
                self._layers[index] = functional.pad(keys, padding), functional.pad(values, padding)
            self.places = grown

    def advance(self, live: int) -> Tensor:
        """Where the new token of each of the first `live` slots goes, (live,), on the CPU; there is room for it."""
        places = self.lengths[:live].clone()
        self.reserve(int(places.max()) + 1)
        self.lengths[:live] += 1
        return places

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer, made when first needed."""
        if index not in self._layers:
            heads, _, size = like.shape
            shape = (self.slots, heads, self.places, size)
            # zeros, not empty: masked positions are multiplied by 0, and 0 · NaN is NaN
            self._layers[index] = (like.new_zeros(shape), like.new_zeros(shape))
        return self._layers[index]

    def move(self, source: int, target: int) -> None:
        """Overwrite one slot with another."""
        self.lengths[target] = self.lengths[source]
        stores = [store for layer in self._layers.values() for store in layer]
        # whole slots, which are one piece of memory each, so that a GPU copies those of all layers in a launch or two
        torch._foreach_copy_([store[target] for store in stores], [store[source] for store in stores])


class Prefill:
    """Prompts side by side after their common prefix, each written whole into its slot of the cache."""

    def __init__(self, cache: KVCache, slots: range, lengths: Sequence[int], prefix: int) -> None:
        self.cache = cache
        self.slots = slice(slots.start, slots.stop)
        self.packed = Packed([Lengths(length - prefix) for length in lengths], cache.device, prefix)
        cache.reserve(max(lengths))
        cache.lengths[self.slots] = torch.tensor(lengths)
        # of the tokens after the prefix, (T', 1)
        self._slots = torch.tensor(slots).repeat_interleave(torch.tensor(lengths) - prefix)[:, None]
        self._places = torch.cat([torch.arange(prefix, length) for length in lengths])[:, None]
        self._rows: dict[int, Tensor] = {}  # by key heads: all layers have as many, as a rule

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor:
        prefix = self.packed.prefix
        heads, _, size = key.shape
        if heads not in self._rows:
            rows = (self._slots * heads + torch.arange(heads)) * self.cache.places + self._places  # (T', Hkv)
            self._rows[heads] = rows.flatten().to(self.cache.device)
        for store, new in zip(self.cache.layer(layer, key), (key, value), strict=True):
            store[self.slots, :, :prefix] = new[:, :prefix]
            # one copy for all prompts: theirs would be hundreds of launches a layer
            own = new[:, prefix:].transpose(0, 1).reshape(-1, size)
            store.view(-1, size).index_copy_(0, self._rows[heads], own)
        return self.packed.attend(layer, query, key, value, rules)


class Decode:
    """One new token a live slot: it joins the cache, and attends to all that its slot holds.

    The live slots are the cache's first `live`, so that nothing is gathered and nothing copied.
    """

    def __init__(self, cache: KVCache, places: Tensor) -> None:
        """`places`: as `KVCache.advance` says, on the device."""
        self.cache = cache
        self.places = places
        self.rows = torch.arange(len(places), device=cache.device)
        self._masks: dict[tuple[int | None, torch.dtype], Tensor] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor:
        keys, values = self.cache.layer(layer, key)
        keys[self.rows, :, self.places] = key.transpose(0, 1)
        values[self.rows, :, self.places] = value.transpose(0, 1)
        heads, live, size = query.shape
        kv_heads = len(key)
        # Products over (slot, key head): the query heads that share a key head are rows of one, no key is repeated,
        # and both sides are views of the cache. Beats the fused kernel, which is made for more than a few queries.
        grouped = query.view(kv_heads, -1, live, size).permute(2, 0, 1, 3).reshape(live * kv_heads, -1, size)
        seen_keys, seen_values = keys[:live].flatten(0, 1), values[:live].flatten(0, 1)  # (B·Hkv, S, D)
        mask = self._mask(rules.window, query.dtype, kv_heads)
        if rules.softcap is None:
            mask = mask.expand(-1, grouped.shape[1], -1)
            scores = torch.baddbmm(mask, grouped, seen_keys.transpose(1, 2), alpha=rules.scaling)  # (B·Hkv, G, S)
        else:
            scores = grouped @ seen_keys.transpose(1, 2) * (rules.scaling / rules.softcap)
            scores = rules.softcap * torch.tanh(scores) + mask
        return torch.bmm(scores.softmax(-1), seen_values).view(live, heads, size)

    def _mask(self, window: int | None, dtype: torch.dtype, kv_heads: int) -> Tensor:
        """(B·Hkv, 1, S) additive, made once a step for all layers."""
        cached = self._masks.get((window, dtype))
        if cached is None:
            keys = torch.arange(self.cache.places, device=self.cache.device)
            seen = keys <= self.places[:, None]  # (B, S)
            if window is not None:
                seen &= keys > self.places[:, None] - window
            cached = additive(seen, dtype).repeat_interleave(kv_heads, 0)[:, None, :]
            self._masks[window, dtype] = cached
        return cached
