"""The slot, and the 4-bit base under it that nothing may move."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, moved_adapter

from qspin.model import SlotModel


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_loads_and_its_head_is_understood(
    architecture: str, tiny_model: Callable[..., SlotModel]
) -> None:
    model = tiny_model(architecture)
    assert len(model.parameters) > 0
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters.values())
