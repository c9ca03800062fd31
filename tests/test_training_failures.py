"""Training that goes wrong: it is stopped in one line that names the pairs, or a step is made again."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY
from test_optimisation import same_bits
from test_training import UNCUT, run, settings, task_for

from qspin import optimisation
from qspin.errors import QspinError
from qspin.model import SlotModel
from qspin.optimisation import Metrics
from qspin.packing import Plan
from qspin.training import train

LoadModel = Callable[..., SlotModel]


def test_a_correlation_loss_that_runs_away_is_stopped(tiny_model: LoadModel, tmp_path: Path) -> None:
    # at an absurd rate the real completions lose some nats too; the bound is put on either side of the most they lose
    model = tiny_model(moved=True)
    opponent = model.adapter()
    task = task_for(model)

    def attempt(loss: str, bound: float) -> list[Metrics]:
        model.set_adapter(opponent)
        return run(model, task, settings(loss=loss, max_real_logp_drop=bound, lr=0.3), tmp_path / "snapshots")

    whole = attempt("correlation", 1e6)
    most = max(-row["real_reward"] / 0.1 for row in whole)  # nats, not nats times β = 0.1
    assert most > 1
    assert len(attempt("correlation", most + 0.1)) == 6
    with pytest.raises(QspinError) as caught:
        attempt("correlation", most - 0.1)
    assert str(caught.value) == (
        f"the correlation loss ran away: real completions lost {most:.0f} nats on average "
        f"(train.max_real_logp_drop = {most - 0.1:g}); lower train.lr or take train.loss=logistic"
    )
    assert attempt("correlation", 1e6) == whole, "something of the step that was not finished stayed"
    # losses that are bounded below are left alone
    assert max(-row["real_reward"] / 0.1 for row in attempt("logistic", 1e-3)) > 1e-3


def test_a_loss_that_is_not_finite_names_its_pair(tiny_model: LoadModel, tmp_path: Path) -> None:
    # a weight that only one pair meets, with others in its micro-batch; qwen2's head does not share it
    model = tiny_model("qwen2", moved=True)

    def spoil(metrics: Metrics, _pairs: int) -> None:
        if metrics["step"] == 0:
            with torch.no_grad():
                model.peft_model.get_input_embeddings().weight[503] = float("nan")

    assert VOCABULARY > 503
    with pytest.raises(QspinError) as caught:
        train(model, task_for(model, UNCUT), settings(), snapshots=tmp_path / "snapshots", on_step=spoil)
    assert str(caught.value) == "the loss is not finite for row-3; lower train.lr or train.beta, or drop these rows"


def test_a_spoilt_adapter_names_all_pairs_or_five_and_how_many_more(tiny_model: LoadModel, tmp_path: Path) -> None:
    model = tiny_model(moved=True)
    plan: Plan = [[[6]], [[0, 1, 2, 3, 4, 5]]]

    def spoil(metrics: Metrics, _pairs: int) -> None:
        if metrics["step"] == 0:
            with torch.no_grad():
                next(iter(model.parameters.values()))[0, 0] = float("nan")

    said = r"^the loss is not finite for row-0, row-1, row-2, row-3, row-4 and 1 more; lower train\.lr"
    with pytest.raises(QspinError, match=said):
        train(model, task_for(model, plan), settings(), snapshots=tmp_path / "snapshots", on_step=spoil)


def test_a_base_that_is_not_finite_names_its_pair_at_step_0_too(tiny_model: LoadModel, tmp_path: Path) -> None:
    model = tiny_model("qwen2", moved=True)
    with torch.no_grad():
        model.peft_model.get_input_embeddings().weight[501] = float("nan")
    with pytest.raises(QspinError, match="row-1"):
        run(model, task_for(model, UNCUT), settings(), tmp_path / "snapshots")


def test_a_step_that_overflows_in_float16_is_made_again_as_if_it_had_not(
    tiny_model: LoadModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers that do overflow, as they would on a GPU without bfloat16."""
    assert optimisation.FIRST_SCALE < 2.0**40
    monkeypatch.setattr(optimisation, "FIRST_SCALE", 2.0**40)
    model = tiny_model(dtype="float16", moved=True)
    metrics = run(model, task_for(model), settings(), tmp_path / "from above")
    scale = metrics[-1]["loss_scale"]
    assert 1 < scale < 2.0**40
    assert all(math.isfinite(row["grad_norm"]) and row["grad_norm"] > 0 for row in metrics)
    assert metrics[0]["loss"] == pytest.approx(math.log(2))

    monkeypatch.setattr(optimisation, "FIRST_SCALE", metrics[0]["loss_scale"])
    again = tiny_model(dtype="float16", moved=True)
    assert run(again, task_for(again), settings(), tmp_path / "from there") == metrics
    assert same_bits(again.adapter(), model.adapter())

    exact = tiny_model(dtype="float32", moved=True)
    wanted = run(exact, task_for(exact), settings(), tmp_path / "float32")
    assert [row["grad_norm"] for row in metrics] == pytest.approx([row["grad_norm"] for row in wanted], rel=0.05)
