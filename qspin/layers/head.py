"""The head: hidden states to logits and gradients back, without a graph, some tokens of the vocabulary at a time.

Where the embedding table is the head too, and lies in main memory because a GPU has little room
(`SlotModel._set_aside`), every pass copies it over, part by part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from qspin.fitting.footprint import vocabulary_step
from qspin.layers.lora import Linear, laid_out


@dataclass(frozen=True, slots=True)
class Part:
    """The head for v tokens of the vocabulary, on the device."""

    weight: Tensor  # (v, D)
    bias: Tensor | None  # (v,)
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, D) → (N, v) fp32. Makes no graph: `backward` is its derivative."""
        with torch.no_grad():
            return _capped(functional.linear(hidden, self.weight, self.bias).float(), self.softcap)

    def backward(self, grad: Tensor, slope: Tensor | None) -> Tensor:
        """d/d hidden, (N, D), of what `logits` made, from d/d logits, (N, v) fp32."""
        if slope is not None:
            grad = grad * slope
        return grad.to(self.weight.dtype) @ self.weight


class Head:
    """The last linear layer, with what caps its logits."""

    def __init__(self, linear: nn.Linear, softcap: float | None, device: torch.device) -> None:
        self._linear, self._softcap, self._device = linear, softcap, device
        self._unpacked: Linear | None = None

    @property
    def weight(self) -> Tensor:
        """(V, D), wherever it lies."""
        return self._linear.weight

    @property
    def aside(self) -> bool:
        """Whether it lies in main memory, and is copied over by each pass."""
        return self.weight.device.type != self._device.type

    def part(self, tokens: slice) -> Part:
        """Of some tokens, copied over where it lies aside."""
        weight, bias = self.weight[tokens].to(self._device, non_blocking=True), self._linear.bias
        return Part(weight, None if bias is None else bias[tokens], self._softcap)

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, D) → (N, V) fp32, without a graph."""
        if self._unpacked is not None:
            with torch.no_grad():
                return _capped(self._unpacked(hidden).float(), self._softcap)
        vocabulary = len(self.weight)
        step = vocabulary_step(self._device.type, 1)
        if step >= vocabulary:
            return self.part(slice(vocabulary)).logits(hidden)
        found = torch.empty(len(hidden), vocabulary, device=self._device)
        for start in range(0, vocabulary, step):
            tokens = slice(start, start + step)
            found[:, tokens] = self.part(tokens).logits(hidden)
        return found

    def slope(self, logits: Tensor) -> Tensor | None:
        """Of the same shape: d/d x of softcap·tanh(x / softcap), from what it made of x. None without a soft-cap."""
        return None if self._softcap is None else 1 - (logits / self._softcap) ** 2

    def gradients(self, tokens: Tensor, slope: Tensor | None) -> Tensor:
        """(N, D) fp32: d/d hidden of one token's logit a row, for N tokens."""
        rows = self.weight[tokens.to(self.weight.device)].to(self._device).float()
        return rows if slope is None else rows * slope[:, None]

    def unpack(self) -> None:
        """In oneDNN's layout, for decoding on a CPU."""
        self._unpacked = laid_out(self._linear.weight, self._linear.bias)

    def pack(self) -> None:
        """Undo that."""
        self._unpacked = None


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
