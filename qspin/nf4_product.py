"""y = x·Wᵀ + low·B of a decoding step's few rows, W in NF4 as bitsandbytes packs it, in one Triton kernel.

W is never written out: each program reads the packed weights of some outputs once, and multiplies by them as it goes.
Where memory is fast, as on Hopper, making W and multiplying by it is several times the traffic of that.

Layout (bitsandbytes): row-major, two weights a byte, the first in the high half; a constant each 64 weights, in 8 bits
with a constant and an offset of its own each 256 of them where quantisation is nested.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from qspin.nf4_levels import look_up

BLOCK, NESTED_BLOCK = 64, 256
STAGES = 3


@triton.jit  # type: ignore[untyped-decorator]
def _product(  # type: ignore[no-untyped-def]
    x, packed, constants, codes, groups, offset, low, b, bias, y, rows, outs, ins, rank, stride,
    NESTED: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr, OUTS: tl.constexpr, RANK: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, NESTED_BLOCK: tl.constexpr, LOOK_UP: tl.constexpr,
):  # fmt: skip
    # x (rows, ins), packed (outs·ins/2,), constants (outs·ins/64,), groups (outs·ins/64/256,), low (rows, rank) of a
    # given stride, b (rank, outs), y (rows, outs); the sums of a program lie the other way round, (OUTS, ROWS)
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
    for start in range(0, ins // BLOCK, BLOCKS):
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
    inner = tl.arange(0, RANK)
    inside = inner < rank
    lows = tl.load(low + row[:, None] * stride + inner[None, :], mask=there[:, None] & inside[None, :], other=0.0)
    bs = tl.load(b + inner[None, :] * outs + out[:, None], mask=known[:, None] & inside[None, :], other=0.0)
    total = tl.dot(bs, tl.trans(lows), total)
    if BIASED:
        total += tl.load(bias + out, mask=known, other=0.0).to(tl.float32)[:, None]
    tl.store(y + row[None, :] * outs + out[:, None], total.to(y.dtype.element_ty), mask=known[:, None] & there[None, :])


def product(x: Tensor, packed: Tensor, constants: Any, low: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    """(N, in) and x·Aᵀ, (N, r) → (N, out); B (r, out) is (α/r)·Bᵀ. All of one 16-bit type, without gaps in a row.

    Args:
        packed, constants: of bitsandbytes, in blocks of 64 along `in`.
    """
    x = x.contiguous()
    rows, ins = x.shape
    outs = constants.shape[0]
    y = x.new_empty(rows, outs)
    nested = constants.nested
    second = constants.state2 if nested else constants
    at_once, blocks, warps = _tile(rows, outs)
    _product[(triton.cdiv(outs, at_once),)](
        x, packed, constants.absmax, second.code, second.absmax, constants.offset if nested else constants.absmax,
        low, b, x if bias is None else bias, y, rows, outs, ins, low.shape[1], low.stride(0),
        NESTED=nested, BIASED=bias is not None, ROWS=max(16, triton.next_power_of_2(rows)), OUTS=at_once,
        RANK=max(16, triton.next_power_of_2(low.shape[1])), BLOCK=BLOCK, BLOCKS=blocks, NESTED_BLOCK=NESTED_BLOCK,
        LOOK_UP=look_up(x.dtype), num_warps=warps, num_stages=STAGES,
    )  # fmt: skip
    return y


def _tile(rows: int, outs: int) -> tuple[int, int, int]:
    """Outputs of a program, blocks at once and warps: the fastest of 54 on an H200, for 16 and 64 rows of the layers of
    a 7B model. Few outputs are cut into smaller parts, so that there is one for each of the GPU's processors."""
    if outs <= 2048 or (rows > 16 and outs <= 8192):
        return 16, 4, 4
    return (32, 4, 2) if rows <= 16 else (64, 2, 4)
