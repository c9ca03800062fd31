"""The embedded model itself on a GPU, in NF4, for both backends: does it answer as it should, and as on a CPU?"""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_model import check_knowledge, check_playing
from on_cuda import BACKENDS, CUDA, ON_CUDA
from torch import Tensor

from qspin.config import BackendName, load_config
from qspin.model import SlotModel
from qspin.packing import pack_row
from qspin.prepare import Prepared, prepare
from qspin.records import Pair
from qspin.scoring import pair_logps

pytestmark = ON_CUDA
ROUNDING = 3.8e-3  # of log-probs in bfloat16 on a CPU against fp32 there, ‖difference‖ / ‖fp32‖


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return prepare(load_config("quickstart", {"data.limit": 24}), datetime.date(2026, 1, 1))


@pytest.fixture(scope="module", params=BACKENDS)
def model(prepared: Prepared, request: pytest.FixtureRequest) -> SlotModel:
    return load(prepared, CUDA, request.param)


def load(prepared: Prepared, device: torch.device, backend: BackendName, dtype: str = "bfloat16") -> SlotModel:
    config: Any = prepared.config.model.model_copy(update={"dtype": dtype})
    return SlotModel.load(prepared.base, config, prepared.config.lora, seed=0, device=device, backend=backend)


def test_it_knows_what_it_knows(model: SlotModel, prepared: Prepared) -> None:
    check_knowledge(model, prepared)


def test_log_probs_are_those_of_a_cpu(model: SlotModel, prepared: Prepared) -> None:
    pairs = [
        Pair(str(n), 0, one.prompt_ids, one.real_ids, other.real_ids, ended=True)
        for n, (one, other) in enumerate(zip(prepared.train, prepared.train[1:], strict=False))
    ]

    def logps(model: SlotModel) -> Tensor:
        with torch.no_grad():
            return torch.cat(pair_logps(model, pack_row(pairs, model.device))).cpu()

    wanted = logps(load(prepared, torch.device("cpu"), "transformers", "float32"))
    assert float((logps(model) - wanted).norm() / wanted.norm()) < 1.5 * ROUNDING


@pytest.mark.parametrize("recomputed", [0, 13, 30])
def test_playing_leaves_the_base_alone_and_scoring_equals_training(
    model: SlotModel, prepared: Prepared, tmp_path: Path, recomputed: int
) -> None:
    check_playing(model, prepared, tmp_path, recomputed)
