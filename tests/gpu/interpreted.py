"""Triton's interpreter, which computes what kernels would on a CPU: TRITON_INTERPRET=1. What it lacks is added here."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ptx import carried_out

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PROCESSORS = 132  # an H100's


class _Results(tuple[Any, ...]):
    get_result = tuple.__getitem__


def make_complete(patch: pytest.MonkeyPatch) -> None:
    """The interpreter knows neither inline PTX nor NVIDIA's tanh, and there is no GPU to ask for its processors."""
    import triton.language as tl
    import unsloth.kernels.geglu
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def inline(_builder: Any, asm: str, _names: str, given: Any, types: Any, _pure: bool, pack: int) -> _Results:
        assert pack == 4
        (packed,) = (np.ascontiguousarray(handle.data) for handle in given)
        registers = carried_out(asm, packed.view("<u4"))
        results = []
        for names, block in zip((("$0", "$1"), ("$2", "$3")), types, strict=True):
            halves = np.stack([registers[name] for name in names], -1).view("<u2").reshape(packed.shape)
            results.append(TensorHandle(halves.view(np.float16), block.scalar))
        return _Results(results)

    def tanh(x: Any) -> Any:
        return 2 * tl.sigmoid(2 * x) - 1

    patch.setattr(InterpreterBuilder, "create_inline_asm", inline)
    patch.setattr(unsloth.kernels.geglu, "triton_tanh", tanh)
    found = SimpleNamespace(multi_processor_count=PROCESSORS)
    patch.setattr(torch.cuda, "get_device_properties", lambda _device: found)
