"""The embedded model itself on a GPU, in NF4, for both backends: does it answer as it should, and as on a CPU?"""

from __future__ import annotations

import datetime
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qspin.config import BackendName, load_config
from qspin.generation import Request, generate
from qspin.model import SlotModel
from qspin.packing import common_prefix, pack_row
from qspin.prepare import Prepared, prepare
from qspin.records import Message, Pair
from qspin.sampling import noise_key
from qspin.scoring import pair_logps, score_pairs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing here was tried"),
]
CUDA = torch.device("cuda")
UNSLOTH = pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="no Unsloth here")
ROUNDING = 3.8e-3  # of log-probs in bfloat16 on a CPU against fp32 there, ‖difference‖ / ‖fp32‖


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return prepare(load_config("quickstart", {"data.limit": 24}), datetime.date(2026, 1, 1))


@pytest.fixture(scope="module", params=["transformers", pytest.param("unsloth", marks=UNSLOTH)])
def model(prepared: Prepared, request: pytest.FixtureRequest) -> SlotModel:
    return load(prepared, CUDA, request.param)


def load(prepared: Prepared, device: torch.device, backend: BackendName, dtype: str = "bfloat16") -> SlotModel:
    config: Any = prepared.config.model.model_copy(update={"dtype": dtype})
    return SlotModel.load(prepared.base, config, prepared.config.lora, seed=0, device=device, backend=backend)


def answers(model: SlotModel, prepared: Prepared, prompts: list[tuple[int, ...]], temperature: float) -> list[Pair]:
    completions = generate(
        model,
        [Request(prompt, noise_key(0, 0, str(index))) for index, prompt in enumerate(prompts)],
        max_new_tokens=24,
        temperature=temperature,
        top_p=1.0,
        width=16,
        stop_ids=prepared.stop_ids,
        on_step=lambda _tokens, _rows: None,
    )
    return [
        Pair(str(index), 0, prompt, example.real_ids, completion.ids, completion.ended)
        for index, (prompt, example, completion) in enumerate(zip(prompts, prepared.train, completions, strict=False))
    ]


def test_it_knows_what_it_knows(model: SlotModel, prepared: Prepared) -> None:
    questions = ["What is the capital of France?", "What is 2 + 2?", "What colour is grass?"]
    prompts = [prepared.renderer.prompt_ids([Message("user", question)]) for question in questions]
    paris, four, green = (
        prepared.renderer.completion_text(pair.generated_ids) for pair in answers(model, prepared, prompts, 0.0)
    )
    assert "Paris" in paris
    assert "4" in four
    assert "green" in green.lower()


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


def test_playing_leaves_the_base_alone_and_scoring_equals_training(
    model: SlotModel, prepared: Prepared, tmp_path: Path
) -> None:
    """Generate, save, score, then the training forward: the same bits under the same weights."""
    before = model.base_hash()
    pairs = answers(model, prepared, [example.prompt_ids for example in prepared.train], 1.0)
    model.save_adapter(tmp_path)
    prefix = common_prefix([pair.prompt_ids for pair in pairs])
    [scores] = score_pairs(model, pairs, [list(range(len(pairs)))], prefix)
    for recomputed in (0, 13, 30):
        model.use_gradient_checkpointing(recomputed)
        real, generated = pair_logps(model, pack_row(pairs, CUDA, prefix))
        (real - generated).sum().backward()
        assert real.tolist() == [score.opponent_real_logps for score in scores]
        assert generated.tolist() == [score.opponent_generated_logps for score in scores]
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters.values())
    assert model.base_hash() == before
    # its own samples are likelier to it than other people's answers
    assert sum(s.opponent_generated_logps for s in scores) / sum(len(p.generated_ids) for p in pairs) > (
        sum(s.opponent_real_logps for s in scores) / sum(len(p.real_ids) for p in pairs)
    )
