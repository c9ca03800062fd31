"""The instructions that look up NF4's levels, carried out one by one."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from ptx import carried_out

from qspin.layers.kernels import compiles, few, multipliable
from qspin.layers.nf4_levels import look_up


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_levels_are_those_of_bitsandbytes(dtype: torch.dtype) -> None:
    levels = bnb.get_4bit_type("nf4", device="cpu").to(dtype).view(torch.int16).numpy().view(np.uint16)
    packed = np.random.default_rng(0).integers(0, 256, (500, 4), np.uint8)
    registers = carried_out(look_up(dtype), packed.view("<u4").ravel())
    high, low = (
        np.stack([registers[name] for name in names], 1).astype("<u4").view("<u2")
        for names in (("$0", "$1"), ("$2", "$3"))
    )
    assert (high == levels[packed >> 4]).all()
    assert (low == levels[packed & 15]).all()


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
