"""Evaluating a small model: what is sampled, what is scored, and that nothing else has a say in it."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import moved_adapter

from qspin.config import load_config
from qspin.evaluate import evaluate
from qspin.figures.evaluation import Evaluation, panel
from qspin.model import SlotModel
from qspin.packing import pack_row
from qspin.prepare import Prepared, prepare
from qspin.records import Pair
from qspin.scoring import pair_logps
from qspin.watch.progress import evaluation_units

CAP = 12


@pytest.fixture(scope="module")
def prepared(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}, and so on and on and on and on."} for n in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model.id": str(tiny_folder("llama")),
        "model.dtype": "float32",
        "lora.rank": 4,
        "lora.alpha": 8,
        "data.source": str(data),
        "data.heldout_rows": 8,
        "generation.max_new_tokens": CAP,
    }
    return prepare(load_config(None, settings), datetime.date(2026, 1, 1))


def measure(model: SlotModel, prepared: Prepared, opponent: Evaluation | None = None, **how: Any) -> Evaluation:
    heard: list[float] = []
    config = how.pop("config", prepared.config)
    given = {"width": 3, "stop_ids": prepared.stop_ids, "on_rows": heard.append, **how}
    found = evaluate(model, prepared.renderer, prepared.heldout, config, opponent=opponent, **given)
    assert sum(heard) == pytest.approx(evaluation_units(8, opponent=opponent is not None))
    return found


def test_a_player_is_scored_on_its_own_its_opponents_and_the_real_completions(
    tiny_model: Callable[..., SlotModel], prepared: Prepared
) -> None:
    model = tiny_model()
    base = measure(model, prepared)
    model.set_adapter(moved_adapter(model))
    player = measure(model, prepared, base)
    assert player.generated_ids != base.generated_ids

    def logp(row: int, ids: list[int]) -> float:
        example = prepared.heldout[row]
        pair = Pair("", 0, example.prompt_ids, tuple(ids), (), ended=True)
        with torch.no_grad():
            return float(pair_logps(model, pack_row([pair], model.device))[0][0])

    for row, example in enumerate(prepared.heldout):
        assert -player.real_nll[row] == pytest.approx(logp(row, list(example.real_ids)), abs=1e-3)
        assert player.generated_logps[row] == pytest.approx(logp(row, player.generated_ids[row]), abs=1e-3)
        assert player.policy_logps[row] == pytest.approx(logp(row, base.generated_ids[row]), abs=1e-3)
    assert player.opponent_logps == base.generated_logps
    assert player.opponent_real_nll == base.real_nll
    assert player.opponent_tokens == [len(ids) for ids in base.generated_ids]
    assert base.policy_logps == []
    # on average a player finds its own samples likelier than another does (Gibbs' inequality)
    assert panel(player, "report", seed=0)["kl"].value > 0


def test_one_that_is_its_own_opponent_learned_nothing(tiny_model: Callable[..., SlotModel], prepared: Prepared) -> None:
    model = tiny_model()
    base = measure(model, prepared)
    again = measure(model, prepared, base)
    assert again.generated_ids == base.generated_ids
    assert again.policy_logps == pytest.approx(base.generated_logps, abs=1e-3)
    assert panel(again, "report", seed=0)["kl"].value == pytest.approx(0, abs=1e-3)


def test_neither_width_nor_what_training_samples_with_changes_anything(
    tiny_model: Callable[..., SlotModel], prepared: Prepared
) -> None:
    model = tiny_model()
    base = measure(model, prepared)
    cold = prepared.config.generation.model_copy(update={"temperature": 0.1, "top_p": 0.5})
    config = prepared.config.model_copy(update={"generation": cold})
    other = measure(model, prepared, width=8, tokens_at_once=64, config=config)
    assert other.generated_ids == base.generated_ids
    assert other.completions == base.completions
    assert other.real_nll == pytest.approx(base.real_nll, abs=1e-3)


def test_the_likeliest_completion_is_no_sample(tiny_model: Callable[..., SlotModel], prepared: Prepared) -> None:
    model = tiny_model()
    base = measure(model, prepared)
    assert base.greedy_completions != base.completions
    seeded = measure(model, prepared, config=prepared.config.model_copy(update={"seed": 1}))
    assert seeded.greedy_completions == base.greedy_completions
    assert seeded.completions != base.completions
    for tokens, ended in zip(base.greedy_tokens, base.greedy_ended, strict=True):
        assert ended or tokens == CAP


def test_real_completions_are_cut_where_generated_ones_are(
    tiny_model: Callable[..., SlotModel], prepared: Prepared
) -> None:
    """Else the cap would tell them apart."""
    base = measure(tiny_model(), prepared)
    assert all(tokens > CAP for tokens in base.real_tokens)
    assert base.real_ended == [False] * 8
    for example, text in zip(prepared.heldout, base.real_completions, strict=True):
        assert text == prepared.renderer.completion_text(example.real_ids[:CAP])
    whole = prepared.config.generation.model_copy(update={"max_new_tokens": 100})
    longer = measure(tiny_model(), prepared, config=prepared.config.model_copy(update={"generation": whole}))
    assert longer.real_ended == [True] * 8
    assert longer.real_completions[0].startswith("It is ")
