"""The eight invariants of the design, each on a real two-iteration run of a tiny model, each with a control that
breaks it and is caught.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qspin import spin
from qspin.adapters import load_adapter
from qspin.config import RunConfig, load_config
from qspin.errors import QspinError
from qspin.files import read_json, read_jsonl
from qspin.generation import Completion, Request, generate
from qspin.model import SlotModel
from qspin.packing import common_prefix, lengths_of, pack_row, plan_batches
from qspin.prepare import Prepared, prepare
from qspin.record import verify_base
from qspin.records import Pair, Score
from qspin.run_dir import RunDir
from qspin.sampling import noise_key
from qspin.scoring import pair_logps, score_pairs
from qspin.training import Task, train
from qspin.watch.progress import Silent

CAP = 10
ROWS = 20


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n * 7}, I say."} for n in range(ROWS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def prepared(tiny_folder: Callable[[str], Path], data: Path) -> Callable[..., Prepared]:
    def make(**changes: Any) -> Prepared:
        settings: dict[str, Any] = {
            "model.id": str(tiny_folder("llama")),
            "model.dtype": "bfloat16",
            "data.source": str(data),
            "data.heldout_rows": 4,
            "generation.max_new_tokens": CAP,
            "train.batch_size": 4,
            "train.lr": 0.02,
            "train.epochs": 6,
            "iterations": 2,
        }
        return prepare(load_config(None, settings | changes), datetime.date(2026, 1, 1))

    return make


@pytest.fixture(scope="module")
def run(prepared: Callable[..., Prepared], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return play(prepared(), tmp_path_factory.mktemp("runs") / "run")


def play(prepared: Prepared, out: Path) -> RunDir:
    spin.run(prepared, out, Silent())
    return RunDir(out)


def load(prepared: Prepared, adapter: Path | None = None) -> SlotModel:
    config: RunConfig = prepared.config
    model = SlotModel.load(prepared.base, config.model, config.lora, seed=config.seed, device=torch.device("cpu"))
    if adapter is not None:
        model.set_adapter(load_adapter(adapter))
    return model


def pairs_of(run: RunDir, iteration: int) -> list[Pair]:
    shards = len(read_json(run.iteration(iteration).generation_plan)["shards"])
    return [
        Pair.from_json(row) for shard in range(shards) for row in read_jsonl(run.iteration(iteration).generated(shard))
    ]


def scores_of(run: RunDir, iteration: int) -> dict[str, Score]:
    plan = read_json(run.iteration(iteration).training_plan)["batches"]
    rows = [row for shard in range(len(plan)) for row in read_jsonl(run.iteration(iteration).scores(shard))]
    return {row["key"]: Score(**row) for row in rows}


# 1. At step 0 of every iteration the margin is 0 and the loss is ℓ(0).


def test_1_step_zero(run: RunDir) -> None:
    for iteration in (0, 1):
        first = read_jsonl(run.iteration(iteration).metrics)[0]
        assert (first["margin"], first["real_reward"], first["generated_reward"]) == (0.0, 0.0, 0.0)
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)


def test_1_control_the_wrong_opponent(run: RunDir, prepared: Callable[..., Prepared], tmp_path: Path) -> None:
    """The scores of iteration 1 were made by iteration 0's policy; the base in the slot is another player."""
    pairs = [*pairs_of(run, 0), *pairs_of(run, 1)]
    plan = read_json(run.iteration(1).training_plan)["batches"]
    prefix = common_prefix([pair.prompt_ids for pair in pairs])
    task = Task(pairs, scores_of(run, 1), plan, 1, 0, prefix)
    right = load(prepared(), run.iteration(0).adapter)
    train(right, task, prepared().config.train, snapshots=tmp_path / "a", on_step=lambda _metrics, _pairs: None)
    wrong = load(prepared())
    with pytest.raises(QspinError, match="before the first step the policy must be the opponent"):
        train(wrong, task, prepared().config.train, snapshots=tmp_path / "b", on_step=lambda _metrics, _pairs: None)


# 2. The base weights do not change.


def test_2_the_base_stays(run: RunDir, prepared: Callable[..., Prepared]) -> None:
    assert read_json(run.record)["base_hash"] == load(prepared()).base_hash()


def test_2_control_a_moved_weight(run: RunDir, prepared: Callable[..., Prepared]) -> None:
    model = load(prepared())
    verify_base(run, model)
    norm = next(parameter for name, parameter in model.peft_model.named_parameters() if "input_layernorm" in name)
    with torch.no_grad():
        norm[0] *= 1.01
    with pytest.raises(QspinError, match="are not those"):
        verify_base(run, model)


# 3. Policy and opponent are scored through the same code, in the same mode, with the same kernels.


def test_3_one_way_of_scoring(run: RunDir, prepared: Callable[..., Prepared]) -> None:
    """A row scored without gradients equals the row in training bit for bit, whatever the model did before."""
    model = load(prepared(), run.iteration(0).adapter)
    pairs = pairs_of(run, 1)[:4]
    [score] = score_pairs(model, pairs, [[0, 1, 2, 3]])
    answer(model, pairs, width=2)
    real, generated = pair_logps(model, pack_row(pairs, model.device))
    assert real.requires_grad
    assert [s.opponent_real_logps for s in score] == real.tolist()
    assert [s.opponent_generated_logps for s in score] == generated.tolist()


def test_3_control_other_kernels(run: RunDir, prepared: Callable[..., Prepared]) -> None:
    """PEFT's own LoRA forward computes the same function, with other roundings."""
    model = load(prepared(), run.iteration(0).adapter)
    pairs = pairs_of(run, 1)[:4]
    [score] = score_pairs(model, pairs, [[0, 1, 2, 3]])
    for module in model.peft_model.modules():
        module.__dict__.pop("forward", None)  # the fused one
    real, _ = pair_logps(model, pack_row(pairs, model.device))
    assert [s.opponent_real_logps for s in score] != real.tolist()
    assert [s.opponent_real_logps for s in score] == pytest.approx(real.tolist(), rel=0.05)


# 4. One renderer: what is trained on is what generation saw and sampled, token for token.


def test_4_token_identity(run: RunDir, prepared: Callable[..., Prepared]) -> None:
    """The pairs hold the renderer's prompts, and completions that the opponent samples again from them."""
    made = prepared()
    model = load(made)
    pairs = pairs_of(run, 0)
    assert [pair.prompt_ids for pair in pairs] == [example.prompt_ids for example in made.train]
    assert [pair.real_ids for pair in pairs] == [example.real_ids for example in made.train]
    again = answer(model, pairs, width=read_json(run.iteration(0).generation_plan)["width"], stop_ids=made.stop_ids)
    assert [pair.generated_ids for pair in pairs] == [completion.ids for completion in again]


def test_4_control_a_retokenised_completion(run: RunDir, tokenizer: Any) -> None:
    """Decoding and encoding a sampled completion gives other tokens: ids must be what is kept."""

    def retokenised(ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False))

    assert any(retokenised(pair.generated_ids) != pair.generated_ids for pair in pairs_of(run, 0))


# 5. End-of-turn is the template's, and a capped completion has none.


def dishonest_ends(pairs: Iterable[Pair], end_of_turn: int, stop_ids: frozenset[int]) -> list[str]:
    """Pairs one of whose completions ends in another way than its player ended it."""
    return [
        pair.key
        for pair in pairs
        if pair.real_ids[-1] != end_of_turn
        or (pair.generated_ids[-1] in stop_ids) != pair.ended
        or (not pair.ended and len(pair.generated_ids) != CAP)
    ]


def test_5_ends_are_honest(run: RunDir, prepared: Callable[..., Prepared], tokenizer: Any) -> None:
    made = prepared()
    assert made.renderer.end_of_turn == tokenizer.convert_tokens_to_ids("<|im_end|>") != tokenizer.eos_token_id
    pairs = [*pairs_of(run, 0), *pairs_of(run, 1)]
    assert {pair.ended for pair in pairs} == {True, False}, "both kinds must occur for this to mean something"
    assert dishonest_ends(pairs, made.renderer.end_of_turn, made.stop_ids) == []


def test_5_control_a_false_end_of_turn(run: RunDir, prepared: Callable[..., Prepared]) -> None:
    made = prepared()
    capped = next(pair for pair in pairs_of(run, 0) if not pair.ended)
    false = replace(capped, generated_ids=(*capped.generated_ids[:-1], made.renderer.end_of_turn))
    assert dishonest_ends([false], made.renderer.end_of_turn, made.stop_ids) == [capped.key]


# 6. A score belongs to (pair, opponent).


def test_6_carried_pairs_are_scored_again(run: RunDir) -> None:
    before, after = scores_of(run, 0), scores_of(run, 1)
    assert before.keys() == {pair.key for pair in pairs_of(run, 0)}
    assert after.keys() == {pair.key for iteration in (0, 1) for pair in pairs_of(run, iteration)}
    assert all(before[key] != after[key] for key in before)


def test_6_control_a_score_kept_from_before(run: RunDir, prepared: Callable[..., Prepared], tmp_path: Path) -> None:
    pairs = [*pairs_of(run, 0), *pairs_of(run, 1)]
    stale = scores_of(run, 1) | scores_of(run, 0)
    prefix = common_prefix([pair.prompt_ids for pair in pairs])
    task = Task(pairs, stale, read_json(run.iteration(1).training_plan)["batches"], 1, 0, prefix)
    model = load(prepared(), run.iteration(0).adapter)
    with pytest.raises(QspinError, match="before the first step the policy must be the opponent"):
        train(model, task, prepared().config.train, snapshots=tmp_path, on_step=lambda _metrics, _pairs: None)


# 7. A stage is a pure function of (config, data, seed, previous adapter). Crashes: tests/test_resume.py.


def adapters(run: RunDir) -> list[dict[str, torch.Tensor]]:
    return [load_adapter(run.iteration(iteration).adapter) for iteration in (0, 1)]


def test_7_memory_settings_change_nothing_beyond_rounding(prepared: Callable[..., Prepared], tmp_path: Path) -> None:
    wide = play(prepared(**{"model.dtype": "float32", "train.lr": 0.001}), tmp_path / "wide")
    narrow = play(
        prepared(
            **{
                "model.dtype": "float32",
                "train.lr": 0.001,
                "generation.width": 3,
                "generation.shard_rows": 5,
                "train.tokens_per_micro_batch": 50,
                "train.gradient_checkpointing": True,
            }
        ),
        tmp_path / "narrow",
    )
    for iteration in (0, 1):
        assert pairs_of(wide, iteration) == pairs_of(narrow, iteration)
    for before, after in zip(adapters(wide), adapters(narrow), strict=True):
        for name in before:
            # by norm: where a gradient is nearly zero, Adam turns its rounding into steps of full size
            assert (before[name] - after[name]).norm() < 1e-2 * before[name].norm(), name


def test_7_the_same_again_is_the_same_bytes(run: RunDir, prepared: Callable[..., Prepared], tmp_path: Path) -> None:
    again = play(prepared(), tmp_path / "again")
    other = play(prepared(seed=1), tmp_path / "other")
    for iteration in (0, 1):
        weights = [folder.iteration(iteration).adapter / "adapter_model.safetensors" for folder in (run, again, other)]
        assert weights[0].read_bytes() == weights[1].read_bytes()
        assert weights[0].read_bytes() != weights[2].read_bytes()  # the control: another seed is another run


# 8. The effective batch is a number of pairs; the token budget never changes it.


def test_8_the_budget_leaves_the_effective_batch_alone(run: RunDir) -> None:
    lengths = [lengths_of(pair) for pair in pairs_of(run, 0)]

    def batches(batch_size: int, budget: int) -> list[set[int]]:
        plan = plan_batches(lengths, batch_size=batch_size, token_budget=budget, seed=0)
        return [{index for micro_batch in batch for index in micro_batch} for batch in plan]

    assert batches(4, 16) == batches(4, 100) == batches(4, 100_000)
    assert batches(4, 100) != batches(3, 100)  # the control: the batch size does


def answer(
    model: SlotModel, pairs: Sequence[Pair], *, width: int, stop_ids: frozenset[int] = frozenset()
) -> list[Completion]:
    return generate(
        model,
        [Request(pair.prompt_ids, noise_key(0, pair.iteration, pair.record_id)) for pair in pairs],
        max_new_tokens=CAP,
        temperature=1.0,
        top_p=1.0,
        width=width,
        stop_ids=stop_ids,
        on_step=lambda _tokens, _rows: None,
    )
