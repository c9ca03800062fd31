"""Attention of one packed row on this device, forward and backward: what `Packed` does against two ways of PyTorch.

    benchmarks/.venv/bin/python benchmarks/bench_attention.py

The peers are one fused call over the whole row under a dense mask, and one fused call a span (the last t of s places,
causally). The shape is SmolLM2-135M's: 9 query heads, 3 key heads of 64. The last line is the better peer's time over
ours, at pairs of 200 tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from harness import arguments, say, write
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qspin.layers.attention import Lengths, Packed, Rules

HEADS, KV_HEADS, SIZE = 9, 3, 64
PREFIX, PROMPT = 24, 20
RULES = Rules(SIZE**-0.5, None, None)
TOKENS = 2048
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    options = arguments(__doc__ or "", rows=0).parse_args()
    ratios = {}
    for length in (50, 100, 200, 400, 800):
        completion = (length - PROMPT) // 2
        row = Packed([Lengths(PROMPT, completion, completion)] * (TOKENS // length), DEVICE, PREFIX)
        seconds = _alternate({"qspin": _ours(row), "dense mask": _dense(row), "a call a span": _spans(row)}, row)
        say(f"pairs of {length} tokens: " + ", ".join(f"{name} {1e3 * s:.1f} ms" for name, s in seconds.items()))
        ratios[f"pairs of {length} tokens"] = min(seconds["dense mask"], seconds["a call a span"]) / seconds["qspin"]
    meaning = "time of the better of PyTorch's ways over qspin's, forward and backward, medians of 9"
    if options.write:
        write("attention", {"ratio": ratios["pairs of 200 tokens"], "ratio_means": meaning, "derived": ratios})
    say(meaning)
    say(f"ratio {ratios['pairs of 200 tokens']:.2f}")


def _ours(row: Packed) -> Attend:
    return lambda q, k, v: row.attend(0, q, k, v, RULES)


def _dense(row: Packed) -> Attend:
    total = row.queries[-1].stop
    seen = torch.zeros(total, total, dtype=torch.bool, device=DEVICE)
    for queries, keys, mask in zip(row.queries, row.keys, row.masks(RULES, torch.float32), strict=True):
        seen[queries, row.key_places[keys]] = mask == 0
    return lambda q, k, v: scaled_dot_product_attention(
        q[None], k[None], v[None], attn_mask=seen, scale=RULES.scaling, enable_gqa=True
    )[0].transpose(0, 1)


def _spans(row: Packed) -> Attend:
    masks = row.masks(RULES, torch.bfloat16)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outputs = [
            scaled_dot_product_attention(
                q[None, :, queries],
                k[:, row.key_places[keys]][None],
                v[:, row.key_places[keys]][None],
                attn_mask=mask,
                scale=RULES.scaling,
                enable_gqa=True,
            )[0]
            for queries, keys, mask in zip(row.queries, row.keys, masks, strict=True)
        ]
        return torch.cat(outputs, dim=1).transpose(0, 1)

    return attend


def _alternate(ways: dict[str, Attend], row: Packed) -> dict[str, float]:
    torch.manual_seed(0)
    total = row.queries[-1].stop
    q, k, v = (
        torch.randn(heads, total, SIZE, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(10):
        for name, attend in ways.items():
            started = time.perf_counter()
            attend(q, k, v).sum().backward()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            taken[name].append(time.perf_counter() - started)
    return {name: statistics.median(times[1:]) for name, times in taken.items()}


if __name__ == "__main__":
    main()
