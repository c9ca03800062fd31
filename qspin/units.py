"""What memory is counted in: GiB, for people, and the blocks of NF4. Free of torch."""

from __future__ import annotations

GIB = 1 << 30

# NF4 weights that share a constant, and such constants that share one of their own: bitsandbytes' defaults
NF4_BLOCK, NESTED_BLOCK = 64, 256


def gib(size: float) -> str:
    """Bytes, for people."""
    return f"{size / GIB:.1f} GiB"
