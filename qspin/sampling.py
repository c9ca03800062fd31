"""Sampling as a pure function: one uniform number a token, through the inverse distribution function.

The number depends on (seed, iteration, example, position) and nothing else, so a completion does not depend on which
others were decoded beside it, on their order, or on a crash in between. Each iteration has numbers of its own.

Free of torch until a token is sampled: figures of finished runs take their numbers from here as well.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from qspin.errors import QspinError

if TYPE_CHECKING:
    from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1

BLOCK = 256  # tokens summed at once
COLDEST = 1e-30  # temperature below which only the likeliest token has any weight, and fp32 would overflow


def noise_key(seed: int, iteration: int, example: str) -> int:
    """64 bits that stand for one completion's stream of numbers."""
    text = f"{seed}\0{iteration}\0{example}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


def uniform(key: int, position: int) -> float:
    """The number in [0, 1) of a position: splitmix64's output function on a counter (Steele et al. 2014)."""
    z = (key + (position + 1) * _GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((z ^ (z >> 31)) >> 11) * 2.0**-53


def sample(logits: Tensor, uniforms: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """(B, V) fp32 logits, (B,) fp64 numbers in [0, 1) → (B,) token ids. A temperature of 0 takes the likeliest.

    The token is the first whose cumulative probability, in order of token ids, exceeds the number. Sums are made in
    blocks and only the chosen block is summed token by token, so that the cost is one pass over the logits.

    Raises:
        QspinError: a row's largest logit is NaN or infinite; its tokens would be the first of the vocabulary for ever.
    """
    import torch

    if temperature < COLDEST:
        highest, tokens = logits.max(-1)
    else:
        weights = logits / temperature if temperature != 1 else logits
        highest = weights.amax(-1, keepdim=True)
        tokens = _drawn((weights - highest).exp_(), uniforms, top_p)
    if not bool(torch.isfinite(highest).all()):  # asked last: a GPU has been given all its work by now
        raise QspinError(
            "the player's logits are not finite numbers: its training went too far (lower train.lr or sft.lr), or the "
            "base overflows in float16 (set model.dtype)"
        )
    return tokens


def _drawn(weights: Tensor, uniforms: Tensor, top_p: float) -> Tensor:
    """(B, V) weights up to a factor a row, (B,) → (B,)."""
    import torch

    if top_p < 1:
        weights = _nucleus(weights / weights.sum(-1, keepdim=True), top_p)
    rows, vocabulary = weights.shape
    if vocabulary % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, -vocabulary % BLOCK))
    blocks = weights.view(rows, -1, BLOCK)
    ends = blocks.sum(-1).double().cumsum(-1)  # (B, blocks)
    wanted = uniforms * ends[:, -1]
    chosen = (ends <= wanted[:, None]).sum(-1).clamp_(max=ends.shape[1] - 1)  # (B,)
    index = torch.arange(rows, device=weights.device)
    before = torch.where(chosen > 0, ends[index, chosen - 1], 0.0)
    inside = blocks[index, chosen].double()  # (B, BLOCK)
    offset = (inside.cumsum(-1) <= (wanted - before)[:, None]).sum(-1)
    # rounding can point past the block's last token that has any weight
    last = BLOCK - 1 - (inside > 0).flip(-1).int().argmax(-1)
    return chosen * BLOCK + torch.minimum(offset, last)


def _nucleus(weights: Tensor, top_p: float) -> Tensor:
    """Zero outside the smallest set of likeliest tokens whose weights reach top_p (Holtzman et al. 2020)."""
    ordered, order = weights.sort(dim=-1, descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p
    outside[:, 0] = False  # in fp32 a top_p below 1e-45 is 0, which what is before the first token reaches
    return weights.masked_fill(outside.scatter(-1, order, outside), 0.0)
