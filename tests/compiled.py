"""`python compiled.py GENERATION DTYPE`: what Triton makes of our kernel for a GPU that need not be there, as JSON."""

from __future__ import annotations

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget

from qspin.layers import nf4_product
from qspin.layers.nf4_levels import look_up
from qspin.units import NESTED_BLOCK, NF4_BLOCK

MULTIPLIERS = "tcgen05.mma", "wgmma", "mma.sync"
BYTES, FLOATS = "*u8", "*fp32"
TYPES = {"packed": BYTES, "constants": BYTES, "codes": FLOATS, "groups": FLOATS, "offset": FLOATS, "y": FLOATS}


def main(generation: int, dtype: str) -> None:
    kernel = nf4_product._product
    types = TYPES | dict.fromkeys(("x", "low", "b", "bias"), {"bfloat16": "*bf16", "float16": "*fp16"}[dtype])
    made = {}
    for rows in (32, 128):
        outs, blocks, warps, _ = nf4_product._tile(rows)
        fixed = {
            "NESTED": True, "BIASED": True, "ROWS": rows, "OUTS": outs, "RANK": 64, "BLOCK": NF4_BLOCK,
            "BLOCKS": blocks, "NESTED_BLOCK": NESTED_BLOCK, "LOOK_UP": look_up(getattr(torch, dtype)),
        }  # fmt: skip
        source = triton.compiler.ASTSource(
            fn=kernel,
            signature={name: "constexpr" if name in fixed else types.get(name, "i32") for name in kernel.arg_names},
            constexprs={(kernel.arg_names.index(name),): value for name, value in fixed.items()},
        )
        options = {"num_warps": warps, "num_stages": nf4_product.STAGES}
        done = triton.compile(source, target=GPUTarget("cuda", generation, 32), options=options)
        made[rows] = {
            "shared": done.metadata.shared,
            "multipliers": [name for name in MULTIPLIERS if name in done.asm["ptx"]],
            "code": len(done.asm["cubin"]),
        }
    sys.stdout.write(json.dumps(made))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
