"""What tests on a GPU share: when they are left out, backends, a model there, pairs, and how far rounding goes."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import moved_adapter
from torch import Tensor

from qspin.base import find_base
from qspin.config import BackendName, LoraConfig, ModelConfig
from qspin.model import SlotModel
from qspin.packing import pack_row
from qspin.records import Pair
from qspin.scoring import pair_logps

ON_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing here was tried"),
]
CUDA = torch.device("cuda")
unsloth_only = pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="no Unsloth here")
BACKENDS = ["transformers", pytest.param("unsloth", marks=unsloth_only)]
PAIRS = [
    Pair(str(n), 0, tuple(range(5, 15 + n)), tuple(range(20, 45 + n)), tuple(range(50, 80 - n)), ended=True)
    for n in range(6)
]
# log-probs and gradients of PAIRS in bfloat16 against fp32 on a CPU, ‖difference‖ / ‖fp32‖: these models are wild
ROUNDING = {"llama": (4.0e-3, 0.17), "mistral": (5.3e-3, 0.21), "qwen3": (2.0e-3, 0.16), "gemma2": (1.9e-3, 0.12)}


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def load(
    folder: Path,
    backend: BackendName,
    *,
    dtype: str = "bfloat16",
    seed: int = 3,
    rank: int = 4,
    device: torch.device = CUDA,
) -> SlotModel:
    config, slot = ModelConfig(id=str(folder), dtype=dtype), LoraConfig(rank=rank, alpha=2 * rank)  # type: ignore[arg-type]
    model = SlotModel.load(find_base(config), config, slot, seed=0, device=device, backend=backend)
    model.set_adapter(moved_adapter(model, seed=seed))
    return model


def computed(model: SlotModel, recomputed: int, pairs: Sequence[Pair] = PAIRS) -> tuple[Tensor, Tensor]:
    """Log-probs of both sides of pairs, and the adapter's gradient."""
    model.use_gradient_checkpointing(recomputed)
    real, generated = pair_logps(model, pack_row(pairs, model.device, prefix=4))
    (real - generated).sum().backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters.values() if p.grad is not None])
    return torch.cat([real, generated]).detach(), gradients
