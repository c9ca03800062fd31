"""y = x·Wᵀ + low·Bᵀ of a decoding step's few rows, W in NF4 as bitsandbytes packs it, in one Triton kernel.

W is never written out: each program reads the packed weights of some outputs once, and multiplies by them as it goes.
Where memory is fast, as on Hopper, making W and multiplying by it is several times the traffic of that. Of few outputs
there are too few programs to keep such a GPU busy, and each waits for memory most of the time: their inputs are cut
into shares, whose sums are added by a second kernel, in one order.

Layout (bitsandbytes): row-major, two weights a byte, the first in the high half; a constant each 64 weights, in 8 bits
with a constant and an offset of its own each 256 of them where quantisation is nested.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qspin.layers.nf4_levels import look_up
from qspin.units import NESTED_BLOCK, NF4_BLOCK

STAGES = 3
SUMMED = 256  # outputs that a program of the second kernel adds up


@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    x, packed, constants, codes, groups, offset, low, b, bias, y, rows, outs, ins, rank, stride, share,
    NESTED: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, RANK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, NESTED_BLOCK: tl.constexpr, LOOK_UP: tl.constexpr,
):  # fmt: skip
    # x (rows, ins), packed (outs·ins/2,), constants (outs·ins/64,), groups (outs·ins/64/256,), low (rows, rank) of a
    # given stride, b (outs, rank), y (shares, rows, outs), of `share` blocks of the inputs each; the sums of a program
    # lie the other way round, (OUTS, ROWS)
    out = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    known = out < outs
    row = tl.arange(0, ROWS)
    there = row < rows
    byte = tl.arange(0, BLOCKS * BLOCK // 2)
    column = tl.arange(0, BLOCKS * BLOCK)
    own = tl.arange(0, BLOCKS)
    total = tl.zeros((OUTS, ROWS), tl.float32)
    if NESTED:
        shift = tl.load(offset)
    begin = tl.program_id(1) * share
    for start in range(begin, tl.minimum(begin + share, ins // BLOCK), BLOCKS):
        place = out * (ins // BLOCK) + start
        pairs = tl.load(packed + place[:, None] * (BLOCK // 2) + byte[None, :], mask=known[:, None], other=0)
        places = place[:, None] + own[None, :]
        if NESTED:
            code = tl.load(constants + places, mask=known[:, None], other=0)
            group = tl.load(groups + places // NESTED_BLOCK, mask=known[:, None], other=0.0)
            scale = tl.load(codes + code) * group + shift
        else:
            scale = tl.load(constants + places, mask=known[:, None], other=0.0)
        scale = tl.broadcast_to(scale[:, :, None], (OUTS, BLOCKS, BLOCK // 2))
        scale = tl.reshape(scale, (OUTS, BLOCKS * BLOCK // 2))
        part = tl.load(x + row[:, None] * ins + start * BLOCK + column[None, :], mask=there[:, None], other=0.0)
        even, odd = tl.split(tl.reshape(part, (ROWS, BLOCKS * BLOCK // 2, 2)))
        first, second = tl.inline_asm_elementwise(
            LOOK_UP, "=r,=r,=r,=r,r", [pairs], dtype=(part.dtype, part.dtype), is_pure=True, pack=4
        )
        total = tl.dot((first * scale).to(part.dtype), tl.trans(even), total)
        total = tl.dot((second * scale).to(part.dtype), tl.trans(odd), total)
    if tl.program_id(1) == 0:
        inner = tl.arange(0, RANK)
        inside = inner < rank
        lows = tl.load(low + row[:, None] * stride + inner[None, :], mask=there[:, None] & inside[None, :], other=0.0)
        bs = tl.load(b + out[:, None] * rank + inner[None, :], mask=known[:, None] & inside[None, :], other=0.0)
        total = tl.dot(bs, tl.trans(lows), total)
        if BIASED:
            total += tl.load(bias + out, mask=known, other=0.0).to(tl.float32)[:, None]
    places = (tl.program_id(1) * rows + row[None, :]) * outs + out[:, None]
    tl.store(y + places, total.to(y.dtype.element_ty), mask=known[:, None] & there[None, :])


@triton.jit  # type: ignore[untyped-decorator]
def _sum(parts, y, shares, size, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    # parts (shares, size) fp32, y (size,)
    place = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    there = place < size
    total = tl.zeros((SIZE,), tl.float32)
    for share in range(shares):
        total += tl.load(parts + share * size + place, mask=there, other=0.0)
    tl.store(y + place, total.to(y.dtype.element_ty), mask=there)


def product(x: Tensor, packed: Tensor, constants: Any, low: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """(N, in), (α/r)·x·Aᵀ, (N, r), and B (out, r) → (N, out). All of one 16-bit type, without gaps in a row.

    Args:
        packed, constants: of bitsandbytes, in blocks of 64 along `in`.
    """
    x = x.contiguous()
    rows, ins = x.shape
    outs = constants.shape[0]
    y = x.new_empty(rows, outs)
    nested = constants.nested
    second = constants.state2 if nested else constants
    at_once, blocks, warps, most = _tile(rows)
    programs, steps = triton.cdiv(outs, at_once), ins // (blocks * NF4_BLOCK)
    most *= torch.cuda.get_device_properties(x.device).multi_processor_count
    share = triton.cdiv(steps, max(1, min(most // programs, steps)))  # steps of a program
    shares = triton.cdiv(steps, share)
    sums = y if shares == 1 else x.new_empty(shares, rows, outs, dtype=torch.float32)
    _product[(programs, shares)](
        x, packed, constants.absmax, second.code, second.absmax, constants.offset if nested else constants.absmax,
        low, b, x if bias is None else bias, sums, rows, outs, ins, low.shape[1], low.stride(0), share * blocks,
        NESTED=nested, BIASED=bias is not None, ROWS=max(16, triton.next_power_of_2(rows)), OUTS=at_once,
        RANK=max(16, triton.next_power_of_2(low.shape[1])), BLOCK=NF4_BLOCK, BLOCKS=blocks, NESTED_BLOCK=NESTED_BLOCK,
        LOOK_UP=look_up(x.dtype), num_warps=warps, num_stages=STAGES,
    )  # fmt: skip
    if shares > 1:
        _sum[(triton.cdiv(y.numel(), SUMMED),)](sums, y, shares, y.numel(), SIZE=SUMMED)
    return y


def _tile(rows: int) -> tuple[int, int, int, int]:
    """Outputs of a program, blocks at once, warps, and how many programs each of the GPU's processors may have: the
    fastest of 54, for 1 to 128 rows of the layers of a 7B model on an H200."""
    return (32, 4, 2, 4) if rows <= 32 else (64, 2, 4, 2)
