"""The instructions that look up NF4's levels, carried out one by one."""

from __future__ import annotations

import os
import random
import sysconfig
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch

from qspin.layers.kernels import compiles, few, multipliable
from qspin.layers.nf4_levels import look_up


def carried_out(instructions: str, given: int) -> dict[str, int]:
    """What the registers hold in the end, of PTX as its manual describes it; `given` is in $4."""
    registers = {"$4": given}
    for line in filter(None, map(str.strip, instructions.strip("{} ").split(";"))):
        name, _, rest = line.partition(" ")
        target, *operands = map(str.strip, rest.split(","))
        if name == ".reg":
            continue
        values = [registers[operand] if operand in registers else int(operand, 0) for operand in operands]
        assert all(0 <= value < 2**32 for value in values)
        match name:
            case "and.b32":
                found = values[0] & values[1]
            case "or.b32":
                found = values[0] | values[1]
            case "shr.b32":
                found = values[0] >> values[1]
            case "prmt.b32":
                pool = [value >> 8 * byte & 255 for value in values[:2] for byte in range(4)]
                chosen = [values[2] >> 4 * byte & 15 for byte in range(4)]
                assert max(chosen) < 8, "a selector's highest bit means something else"
                found = sum(pool[choice] << 8 * byte for byte, choice in enumerate(chosen))
            case _:
                raise AssertionError(line)
        registers[target] = found
    return registers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_levels_are_those_of_bitsandbytes(dtype: torch.dtype) -> None:
    levels = [level & 0xFFFF for level in bnb.get_4bit_type("nf4", device="cpu").to(dtype).view(torch.int16).tolist()]
    chance = random.Random(0)
    for _ in range(500):
        packed = [chance.randrange(256) for _ in range(4)]
        found = carried_out(look_up(dtype), sum(byte << 8 * place for place, byte in enumerate(packed)))
        halves = [found[f"${register}"] >> shift & 0xFFFF for register in range(4) for shift in (0, 16)]
        assert halves[:4] == [levels[byte >> 4] for byte in packed]
        assert halves[4:] == [levels[byte & 15] for byte in packed]


@pytest.mark.parametrize(
    ("other", "computed"),
    [
        ({}, True),
        ({"compress_statistics": True}, True),
        ({"rows": 1}, False),
        ({"rows": 2}, True),
        ({"rows": 128}, True),
        ({"rows": 129}, False),
        ({"ins": 320}, False),
        ({"rank": 256}, True),
        ({"rank": 257}, False),
        ({"dtype": torch.float32}, False),
        ({"quant_type": "fp4"}, False),
        ({"blocksize": 128}, False),
        ({"quant_storage": torch.bfloat16}, False),
    ],
)
def test_what_our_kernel_computes(other: dict[str, Any], computed: bool) -> None:
    asked = {"rows": 16, "ins": 512, "rank": 8, "dtype": torch.bfloat16, "quant_type": "nf4"} | other
    rows, ins, rank, dtype = (asked.pop(name) for name in ("rows", "ins", "rank", "dtype"))
    data, constants = bnb.quantize_4bit(torch.randn(64, ins, dtype=dtype), **asked)
    x = torch.randn(rows, ins, dtype=dtype)
    assert multipliable(x, data, constants, x.new_zeros(rows, rank)) == computed


@pytest.mark.parametrize(
    ("rows", "ins", "known"),
    [(1, 512, True), (1, 320, True), (2, 512, True), (2, 320, False), (128, 512, True), (129, 512, False)],
)
def test_few_rows_are_multiplied_by_4_bits_where_that_beats_making_w(rows: int, ins: int, known: bool) -> None:
    assert few(torch.zeros(1, rows, ins)) == known


@pytest.mark.skipif(os.name == "nt", reason="Triton for Windows brings its own compiler")
def test_triton_without_a_compiler_is_of_no_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "triton.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert not compiles()
    (tmp_path / "gcc").write_text("#!/bin/sh\n")
    (tmp_path / "gcc").chmod(0o755)
    assert compiles() == (Path(sysconfig.get_path("include")) / "Python.h").is_file()
