"""One iteration's training: step 0 is exact, batches are what they say, and a resumed run is the same run."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes.optim
import pytest
import torch
from conftest import moved_adapter
from safetensors.torch import load_file
from test_optimisation import ignore, same_bits
from torch import Tensor

from qspin import optimisation
from qspin.adapters import Adapter
from qspin.config import TrainConfig
from qspin.errors import QspinError
from qspin.model import SlotModel
from qspin.optimisation import Metrics, step_order
from qspin.packing import Plan, lengths_of, pack_row, plan_batches
from qspin.records import Pair, Score
from qspin.scoring import pair_logps, score_pairs
from qspin.training import Task, train

LoadModel = Callable[..., SlotModel]
CPU = torch.device("cpu")
# begins all prompts; its tokens, and those of the chat template, are in every pair
SYSTEM = (1, 40, 41)


def make_pairs() -> list[Pair]:
    """Pairs of 8 to 22 tokens, system message included; token 500 + i is in the i-th one only."""
    generator = random.Random(0)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(generator.randrange(3, 500) for _ in range(generator.randint(low, high)))

    return [Pair(f"row-{i}", 0, (*SYSTEM, *ids(2, 5), 500 + i), ids(2, 6), ids(2, 6), ended=True) for i in range(7)]


PAIRS = make_pairs()
PLAN = plan_batches([lengths_of(pair, 3) for pair in PAIRS], batch_size=3, token_budget=32, seed=0)
UNCUT: Plan = [[[0, 1]], [[2, 3, 4]], [[5, 6]]]  # a micro-batch a step


def scores_of(model: SlotModel, plan: Plan) -> dict[str, Score]:
    """As `qspin run` makes them: by the plan's micro-batches."""
    parts = score_pairs(model, PAIRS, [micro_batch for batch in plan for micro_batch in batch], len(SYSTEM))
    return {score.key: score for part in parts for score in part}


def task_for(model: SlotModel, plan: Plan = PLAN, iteration: int = 0) -> Task:
    return Task(PAIRS, scores_of(model, plan), plan, iteration, seed=0, prefix=len(SYSTEM))


def settings(**changes: Any) -> TrainConfig:
    defaults: dict[str, Any] = {"batch_size": 3, "epochs": 2, "lr": 1e-3, "snapshot_minutes": 1000}
    return TrainConfig(**(defaults | changes))


def run(model: SlotModel, task: Task, config: TrainConfig, snapshots: Path) -> list[Metrics]:
    return train(model, task, config, snapshots=snapshots, on_step=ignore)


def distance(a: Adapter, b: Adapter) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


# --- rate and order ---


def test_the_rate_is_that_of_the_step_and_of_the_iteration(tiny_model: LoadModel, tmp_path: Path) -> None:
    model = tiny_model(moved=True)
    for iteration, peak in enumerate([6e-4, 3e-4, 3e-4]):  # the last value of the list goes on
        config = settings(lr=[6e-4, 3e-4])
        metrics = run(model, task_for(model, iteration=iteration), config, tmp_path / str(iteration))
        assert [row["lr"] for row in metrics] == pytest.approx([peak * x for x in (1, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5)])
        assert [(row["step"], row["epoch"]) for row in metrics] == [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (5, 1)]


def test_steps_take_the_batches_of_that_order(tiny_model: LoadModel, tmp_path: Path) -> None:
    # batches of 3, 3 and 1 pairs: the one of 1 is the last of epoch 0, and elsewhere in others
    model = tiny_model(moved=True)
    assert [sum(map(len, batch)) for batch in PLAN] == [3, 3, 1]
    heard: list[tuple[Metrics, int]] = []
    metrics = train(
        model,
        task_for(model, iteration=1),
        settings(epochs=4),
        snapshots=tmp_path / "snapshots",
        on_step=lambda *step: heard.append(step),
    )
    sizes = [3, 3, 1]
    assert [pairs for _, pairs in heard] == [sizes[batch] for batch in step_order(3, 4, seed=1)]
    assert [row for row, _ in heard] == metrics


# --- step 0 ---


@pytest.mark.parametrize("loss", ["logistic", "hinge", "exponential", "correlation"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_at_step_0_the_policy_is_the_opponent_to_the_bit(
    dtype: str, loss: str, tiny_model: LoadModel, tmp_path: Path
) -> None:
    model = tiny_model("mistral", dtype=dtype, moved=True)
    metrics = run(model, task_for(model), settings(loss=loss, epochs=1), tmp_path / "snapshots")
    first = {key: metrics[0][key] for key in ("loss", "margin", "accuracy", "real_reward", "generated_reward")}
    at_zero = float(torch.tensor(math.log(2))) if loss == "logistic" else 1.0  # ln 2 as fp32 has it
    assert first == {"loss": at_zero, "margin": 0.0, "accuracy": 0.0, "real_reward": 0.0, "generated_reward": 0.0}
    assert metrics[0]["grad_norm"] > 0
    assert metrics[1]["margin"] != 0  # it is the beginning only


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_control_another_opponents_scores_are_refused(dtype: str, tiny_model: LoadModel, tmp_path: Path) -> None:
    model = tiny_model(dtype=dtype, moved=True)
    policy = model.adapter()
    for other in (
        moved_adapter(model, scale=0.0),  # the base: a run that forgot to swap the adapter in
        moved_adapter(model, seed=4),
        # a neighbour: bf16 rounds the smallest moves away, so it gets a larger one
        {name: tensor + (1e-4 if dtype == "float32" else 1e-2) for name, tensor in policy.items()},
    ):
        model.set_adapter(other)
        task = task_for(model)
        model.set_adapter(policy)
        with pytest.raises(QspinError, match="before the first step the policy must be the opponent"):
            run(model, task, settings(), tmp_path / "snapshots")
        assert same_bits(model.adapter(), policy)  # nothing was learnt from them


def test_control_one_wrong_score_is_refused(tiny_model: LoadModel, tmp_path: Path) -> None:
    model = tiny_model(moved=True)
    task = task_for(model)
    first = PAIRS[PLAN[0][0][0]]
    for side in ("opponent_real_logps", "opponent_generated_logps"):
        score = getattr(task.scores[first.key], side)
        next_number = float(torch.nextafter(torch.tensor(score), torch.tensor(0.0)))
        for other, gap in ((score + 0.5, r"0\.5"), (next_number, r"\d\.\d+e-0\d")):
            changes: dict[str, Any] = {side: other}
            wrong = {**task.scores, first.key: replace(task.scores[first.key], **changes)}
            with pytest.raises(QspinError, match=f"log-probs differ by {gap} nats: the scores of iteration 0"):
                run(model, replace(task, scores=wrong), settings(), tmp_path / "snapshots")


# --- the effective batch ---


def first_gradient(snapshots: Path) -> dict[str, Tensor]:
    """The gradient that AdamW's first step was made of, from the snapshot after it: exp_avg is (1 − β₁) of it."""
    state = load_file(snapshots / "step-000001" / "state.safetensors")
    return {name: 10 * tensor for name, tensor in state.items() if name.endswith("/exp_avg")}


def keep_first(snapshots: Path, kept: Path) -> Callable[[Metrics, int], None]:
    """Copy the snapshot of step 0 once it is there, which is when the next step is over."""

    def on_step(metrics: Metrics, _pairs: int) -> None:
        if metrics["step"] == 1:
            shutil.copytree(snapshots, kept)

    return on_step


def gradient_of_mean_loss(model: SlotModel, pairs: Sequence[Pair], beta: float, sft: float) -> list[Tensor]:
    """By hand, of the logistic loss where the margin is 0: −β/2 · ∇(logπ(real) − logπ(generated)), pair by pair, and
    of the real completion's NLL a token."""
    total = [torch.zeros_like(parameter) for parameter in model.parameters.values()]
    for pair in pairs:
        real, generated = pair_logps(model, pack_row([pair], CPU))
        loss = -beta / 2 * (real - generated) - sft * real / len(pair.real_ids)
        gradients = torch.autograd.grad(loss.sum(), list(model.parameters.values()))
        total = [t + gradient / len(pairs) for t, gradient in zip(total, gradients, strict=True)]
    return total


@pytest.mark.parametrize("sft_weight", [0.0, 0.7])
@pytest.mark.parametrize("which", ["full", "partial"])
def test_a_step_follows_the_mean_over_its_own_pairs(
    which: str, sft_weight: float, tiny_model: LoadModel, tmp_path: Path
) -> None:
    # 3 pairs in two micro-batches; and the last batch of 1 pair, put first, which must not be divided by 3
    plan = PLAN if which == "full" else PLAN[::-1]
    members = [index for micro_batch in plan[0] for index in micro_batch]
    assert len(members) == (3 if which == "full" else 1)
    assert len(plan[0]) == (2 if which == "full" else 1)
    model = tiny_model(moved=True)
    expected = gradient_of_mean_loss(model, [PAIRS[index] for index in members], beta=0.3, sft=sft_weight)
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in expected))

    snapshots, kept = tmp_path / "snapshots", tmp_path / "kept"
    config = settings(beta=0.3, sft_weight=sft_weight, max_grad_norm=1e9, snapshot_minutes=0)
    metrics = train(model, task_for(model, plan), config, snapshots=snapshots, on_step=keep_first(snapshots, kept))
    assert metrics[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)
    for index, gradient in enumerate(expected):
        ours = first_gradient(kept)[f"optimizer/{index}/exp_avg"]
        torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-5 * norm)


def test_with_an_sft_weight_the_loss_is_still_that_of_the_game(tiny_model: LoadModel, tmp_path: Path) -> None:
    model = tiny_model(moved=True)
    scores = scores_of(model, PLAN)
    [row, *_] = run(model, task_for(model), settings(sft_weight=5.0), tmp_path / "snapshots")
    members = [PAIRS[index] for micro_batch in PLAN[0] for index in micro_batch]
    nlls = [-scores[pair.key].opponent_real_logps / len(pair.real_ids) for pair in members]
    assert row["loss"] == pytest.approx(math.log(2))
    assert row["real_nll"] == pytest.approx(sum(nlls) / len(nlls), rel=1e-5)


def test_gradients_are_clipped_to_their_norm(tiny_model: LoadModel, tmp_path: Path) -> None:
    gradients, norms = {}, {}
    for limit in (1e9, 0.01):
        model = tiny_model(moved=True)
        snapshots, kept = tmp_path / f"snapshots-{limit}", tmp_path / f"kept-{limit}"
        metrics = train(
            model,
            task_for(model),
            settings(max_grad_norm=limit, snapshot_minutes=0),
            snapshots=snapshots,
            on_step=keep_first(snapshots, kept),
        )
        gradients[limit], norms[limit] = first_gradient(kept), metrics[0]["grad_norm"]
    # the metric is the norm before
    assert norms[0.01] == norms[1e9] > 0.1
    clipped = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients[0.01].values()))
    assert clipped == pytest.approx(0.01, rel=1e-3)
    # one factor for all weights: the direction stays
    for name, gradient in gradients[1e9].items():
        torch.testing.assert_close(gradients[0.01][name] * norms[1e9] / 0.01, gradient, rtol=1e-3, atol=1e-6)


def test_the_token_budget_changes_rounding_only(tiny_model: LoadModel, tmp_path: Path) -> None:
    lengths = [lengths_of(pair, len(SYSTEM)) for pair in PAIRS]
    adapters, counts = [], []
    for budget in (16, 64, 4096):
        model = tiny_model(moved=True)
        opponent = model.adapter()
        plan = plan_batches(lengths, batch_size=3, token_budget=budget, seed=0)
        metrics = run(model, task_for(model, plan), settings(epochs=1), tmp_path / str(budget))
        assert len(metrics) == 3
        adapters.append(model.adapter())
        counts.append(sum(map(len, plan)))
    assert counts[0] > counts[1] >= counts[2] == 3  # else nothing is compared
    assert distance(adapters[0], adapters[1]) < 1e-5
    assert distance(adapters[0], adapters[2]) < 1e-5
    assert distance(adapters[0], opponent) > 1e-3


def test_gradient_checkpointing_changes_no_bit(tiny_model: LoadModel, tmp_path: Path) -> None:
    adapters = []
    for recomputed in (0, 1, 3):
        model = tiny_model(moved=True)
        model.use_gradient_checkpointing(recomputed)
        run(model, task_for(model), settings(epochs=1), tmp_path / str(recomputed))
        adapters.append(model.adapter())
    assert same_bits(adapters[0], adapters[1])
    assert same_bits(adapters[0], adapters[2])


def test_it_learns(tiny_model: LoadModel, tmp_path: Path) -> None:
    # the sign of it all: real completions gain on generated ones
    model = tiny_model(moved=True)
    metrics = run(model, task_for(model), settings(epochs=4, lr=5e-3, beta=0.5), tmp_path / "snapshots")
    last_epoch = metrics[-3:]
    assert all(row["margin"] > 1 and row["accuracy"] == 1 and row["loss"] < math.log(2) for row in last_epoch)


# --- snapshots ---


def eight_bits(_config: TrainConfig, parameters: list[torch.nn.Parameter], _device: torch.device) -> Any:
    """What a GPU's paged optimiser keeps, on a CPU, where nothing is paged; the smallest weights' moments are fp32."""
    return bitsandbytes.optim.AdamW8bit(parameters, lr=0.0, weight_decay=0.01, min_8bit_size=300)


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop", "paged_adamw_8bit"])
def test_a_resumed_run_ends_in_the_same_bits(
    optimizer: str, tiny_model: LoadModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(optimizer=optimizer, snapshot_minutes=0, weight_decay=0.01)
    if optimizer == "paged_adamw_8bit":
        monkeypatch.setattr(optimisation, "make_optimizer", eight_bits)
    model = tiny_model(moved=True)
    opponent = model.adapter()
    task = task_for(model)
    snapshots = tmp_path / "snapshots"

    def keep(metrics: Metrics, _pairs: int) -> None:
        # as a crash would find it after so many steps
        if snapshots.is_dir():
            shutil.copytree(snapshots, tmp_path / f"crashed-{int(metrics['step'])}")

    metrics = train(model, task, config, snapshots=snapshots, on_step=keep)
    trained = model.adapter()
    assert distance(trained, opponent) > 1e-3
    assert sorted(path.name for path in snapshots.iterdir()) == ["step-000004", "step-000005"]  # older ones are let go

    for step in range(1, 6):  # within both epochs, and before the last step
        fresh = tiny_model()
        fresh.set_adapter(opponent)
        heard: list[Metrics] = []
        resumed = train(
            fresh,
            task,
            config,
            snapshots=tmp_path / f"crashed-{step}",
            on_step=lambda row, _pairs, heard=heard: heard.append(row),  # type: ignore[misc]
        )
        assert resumed == metrics
        assert heard == metrics[step:]
        assert same_bits(fresh.adapter(), trained)
