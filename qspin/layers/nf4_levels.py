"""NF4's levels, looked up in registers by a few instructions of a GPU."""

from __future__ import annotations

import functools

import bitsandbytes.functional as bnb
import torch


@functools.cache
def look_up(dtype: torch.dtype) -> str:
    """PTX: four bytes of packed weights → the levels of their high halves, and of their low ones.

    A level's two bytes are looked up apart, four weights at once, each in a table of 16 bytes that lies in four
    registers: `prmt` picks bytes from two of them by three bits of a weight, and by its fourth bit from what both pairs
    gave.
    """
    levels = bnb.get_4bit_type("nf4", device="cpu").to(dtype).view(torch.int16).tolist()
    low, high = (
        [sum((levels[4 * part + i] >> shift & 255) << 8 * i for i in range(4)) for part in range(4)] for shift in (0, 8)
    )

    def two(halves: str, first: str, second: str) -> str:
        lines = [f"and.b32 sel, {halves}, 0x7777", f"and.b32 pick, {halves}, 0x8888", "shr.b32 pick, pick, 1"]
        lines += ["or.b32 pick, pick, 0x3210"]
        for name, table in (("low", low), ("high", high)):
            lines += [f"prmt.b32 one, {table[0]}, {table[1]}, sel", f"prmt.b32 other, {table[2]}, {table[3]}, sel"]
            lines += [f"prmt.b32 {name}, one, other, pick"]
        lines += [f"prmt.b32 {first}, low, high, 0x7351", f"prmt.b32 {second}, low, high, 0x6240"]
        return "; ".join(lines) + ";"

    registers = ".reg .b32 sel, pick, one, other, low, high, upper;"
    return f"{{ {registers} {two('$4', '$0', '$2')} shr.b32 upper, $4, 16; {two('upper', '$1', '$3')} }}"
