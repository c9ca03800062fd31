"""PTX instructions carried out one by one, as the manual describes them, on as many numbers at once as are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Registers = NDArray[np.uint32]


def carried_out(instructions: str, given: Registers) -> dict[str, Registers]:
    """What the registers hold in the end; `given` is in $4."""
    registers = {"$4": given}
    for line in filter(None, map(str.strip, instructions.strip("{} ").split(";"))):
        name, _, rest = line.partition(" ")
        if name == ".reg":
            continue
        target, *operands = map(str.strip, rest.split(","))
        values = [registers[operand] if operand in registers else np.uint32(int(operand, 0)) for operand in operands]
        registers[target] = INSTRUCTIONS[name](*values)
    return registers


def _pick_bytes(first: Any, second: Any, selector: Any) -> Registers:
    """`prmt.b32`: each byte is one of the eight of both numbers, by three bits of the selector's nibble."""
    first, second, selector = np.broadcast_arrays(first, second, selector)
    pool = np.stack([value >> np.uint32(8 * byte) & np.uint32(255) for value in (first, second) for byte in range(4)])
    found = np.zeros_like(selector)
    for byte in range(4):
        choice = selector >> np.uint32(4 * byte) & np.uint32(15)
        assert choice.max() < 8, "a selector's highest bit means something else"
        found |= np.take_along_axis(pool, choice[None].astype(np.int64), 0)[0] << np.uint32(8 * byte)
    return found


INSTRUCTIONS: dict[str, Callable[..., Any]] = {
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "shr.b32": np.right_shift,
    "prmt.b32": _pick_bytes,
}
