"""The supervised warm start: what it learns is −log p a token, and self-play begins with what it ended with."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from qspin import spin
from qspin.adapters import load_adapter
from qspin.config import RunConfig, load_config
from qspin.errors import QspinError
from qspin.figures.report import tables
from qspin.files import read_json, read_jsonl
from qspin.model import SlotModel
from qspin.optimisation import Metrics, step_order
from qspin.packing import Plan, lengths_of, pack_row, plan_batches
from qspin.prepare import Prepared, prepare
from qspin.records import Pair
from qspin.run_dir import RunDir
from qspin.scoring import pair_logps
from qspin.warm_start import train_supervised
from qspin.watch.progress import Silent

LoadModel = Callable[..., SlotModel]
ROWS = [
    Pair(f"row-{i}", 0, (1, 40, 41, 50 + i), tuple(range(60 + i, 63 + 3 * i)), (), ended=True) for i in range(6)
]  # completions of 3 to 13 tokens


def plan_for(batch_size: int, tokens: int = 1000) -> Plan:
    lengths = [lengths_of(row) for row in ROWS]
    return plan_batches(lengths, batch_size=batch_size, token_budget=tokens, seed=0)


def config_for(**changes: Any) -> RunConfig:
    return load_config(None, {"sft.epochs": 2, "sft.lr": 1e-3, "train.snapshot_minutes": 1000} | changes)


def learn(
    model: SlotModel,
    plan: Plan,
    config: RunConfig,
    snapshots: Path,
    on_step: Callable[[Metrics, int], None] = lambda _metrics, _rows: None,
) -> list[Metrics]:
    order = step_order(len(plan), config.sft.epochs, config.seed)
    return train_supervised(
        model, ROWS, plan, config.train, lr=config.sft.lr, order=order, prefix=0, snapshots=snapshots, on_step=on_step
    )


def nll(model: SlotModel, rows: Sequence[Pair] = ROWS) -> float:
    """Nats a token, one row at a time."""
    with torch.no_grad():
        total = sum(float(pair_logps(model, pack_row([row], model.device))[0]) for row in rows)
    return -total / sum(len(row.real_ids) for row in rows)


def test_a_step_follows_the_mean_over_its_tokens(tiny_model: LoadModel, tmp_path: Path) -> None:
    # plain gradient descent on one batch: RMSprop's first step is g / (√(0.01·g²) + ε), the sign of g times 10
    model = tiny_model(moved=True)
    before = model.adapter()
    total, _ = pair_logps(model, pack_row(ROWS, model.device))
    (-total.sum() / sum(len(row.real_ids) for row in ROWS)).backward()  # type: ignore[no-untyped-call]
    gradients = {name: parameter.grad.clone() for name, parameter in model.parameters.items()}  # type: ignore[union-attr]
    for parameter in model.parameters.values():
        parameter.grad = None
    norm = float(torch.cat([gradient.flatten() for gradient in gradients.values()]).norm())
    config = config_for(
        **{"train.optimizer": "rmsprop", "train.warmup": 0.0, "train.max_grad_norm": 1e6, "sft.epochs": 1}
    )
    expected = nll(model)
    [metrics] = learn(model, plan_for(6), config, tmp_path)
    assert metrics["loss"] == pytest.approx(expected, rel=1e-4)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    for name, after in model.adapter().items():
        clear = gradients[name].abs() > 1e-3 * gradients[name].abs().max()
        step = (after - before[name])[clear] / 1e-3
        torch.testing.assert_close(step, -10 * gradients[name][clear].sign(), rtol=0.02, atol=0.02)


def test_it_learns_the_real_completions(tiny_model: LoadModel, tmp_path: Path) -> None:
    model = tiny_model(moved=True)
    before = nll(model)
    metrics = learn(model, plan_for(2), config_for(**{"sft.epochs": 8, "sft.lr": 5e-3}), tmp_path)
    assert len(metrics) == 8 * 3
    assert nll(model) < before - 1


def test_the_token_budget_changes_rounding_only(tiny_model: LoadModel, tmp_path: Path) -> None:
    results = []
    for tokens in (1000, 20):
        model = tiny_model(moved=True)
        plan = plan_for(3, tokens)
        results.append((sum(map(len, plan)), learn(model, plan, config_for(), tmp_path), model.adapter()))
    assert results[0][0] == 2 < results[1][0]
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    for name, tensor in results[0][2].items():
        torch.testing.assert_close(tensor, results[1][2][name], rtol=0, atol=2e-4)


def test_a_resumed_run_ends_in_the_same_bits(tiny_model: LoadModel, tmp_path: Path) -> None:
    model, config, plan = tiny_model(moved=True), config_for(**{"train.snapshot_minutes": 0}), plan_for(2)
    start, snapshots = model.adapter(), tmp_path / "snapshots"

    def keep(metrics: Metrics, _rows: int) -> None:
        if metrics["step"] == 4:
            shutil.copytree(snapshots, tmp_path / "crashed")

    metrics = learn(model, plan, config, snapshots, keep)
    fresh = tiny_model()
    fresh.set_adapter(start)
    heard: list[Metrics] = []
    assert learn(fresh, plan, config, tmp_path / "crashed", lambda row, _rows: heard.append(row)) == metrics
    assert heard == metrics[4:]
    trained = model.adapter()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in fresh.adapter().items())


def test_a_loss_that_is_not_finite_names_its_row(tiny_model: LoadModel, tmp_path: Path) -> None:
    model = tiny_model("qwen2", moved=True)  # whose head is not its embeddings
    embeddings = model.peft_model.get_base_model().get_input_embeddings().weight
    with torch.no_grad():
        embeddings[53] = float("nan")  # the prompt of row-3
    with pytest.raises(QspinError, match=r"^the loss is not finite for row-3; lower its learning rate \(sft\.lr"):
        learn(model, [[[index] for index in range(6)]], config_for(), tmp_path)


# --- in a run


@pytest.fixture(scope="module")
def prepared(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n * 7}, I say."} for n in range(20)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model.id": str(tiny_folder("llama")), "model.dtype": "float32", "data.source": str(data),
        "data.heldout_rows": 4, "generation.max_new_tokens": 10, "train.batch_size": 4, "sft.epochs": 3, "sft.lr": 0.01,
        "iterations": 1,
    }  # fmt: skip
    return prepare(load_config(None, settings), datetime.date(2026, 1, 1))


class Phases(Silent):
    """Of which iteration each phase was, and whether it was the warm start's."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, int | None, bool]] = []

    def phase(self, name: str, *, iteration: int | None, warm_start: bool = False, **_: object) -> None:
        self.heard.append((name, iteration, warm_start))


@pytest.fixture(scope="module")
def phases() -> Phases:
    return Phases()


@pytest.fixture(scope="module")
def run(prepared: Prepared, phases: Phases, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    out = tmp_path_factory.mktemp("runs") / "run"
    spin.run(prepared, out, phases)
    return RunDir(out)


def test_self_play_begins_with_what_it_ended_with(run: RunDir, prepared: Prepared) -> None:
    config, folder = prepared.config, run.iteration(0)
    model = SlotModel.load(prepared.base, config.model, config.lora, seed=config.seed, device=torch.device("cpu"))
    pairs = [Pair.from_json(row) for row in read_jsonl(folder.generated(0))]
    shards = range(len(read_json(folder.training_plan)["batches"]))
    rows = [row for shard in shards for row in read_jsonl(folder.scores(shard))]
    scores = {row["key"]: row["opponent_real_logps"] for row in rows}
    recorded = [scores[pair.key] for pair in pairs]

    def real_logps() -> list[float]:
        with torch.no_grad():
            found: list[float] = pair_logps(model, pack_row(pairs, model.device))[0].tolist()
        return found

    assert real_logps() != pytest.approx(recorded, rel=1e-2)  # the untouched base is another player
    model.set_adapter(load_adapter(run.warm_start.adapter))
    assert real_logps() == pytest.approx(recorded, rel=1e-4)
    assert read_jsonl(folder.metrics)[0]["margin"] == 0.0


@pytest.mark.usefixtures("run")
def test_its_phases_are_told_from_those_of_the_base(phases: Phases) -> None:
    before = [("evaluate", None, False), ("warm start", None, True), ("evaluate", None, True)]
    assert phases.heard == [*before, *((name, 0, False) for name in ("generate", "score", "train", "evaluate"))]


def test_it_is_evaluated_and_shown(run: RunDir, prepared: Prepared) -> None:
    table = {row[0]: row for row in tables(run, prepared.config)[0].rows}
    assert list(table) == ["base", "sft", "0"]
    assert float(table["sft"][1].split()[0]) < float(table["base"][1].split()[0])
    assert table["sft"][2].startswith("-")
    assert run.summary.read_text().startswith(f"# {prepared.base.name}: 1 of 1 iterations")
    assert not run.warm_start.snapshots.exists()
    assert "train" in run.warm_start.seconds()


def test_a_finished_warm_start_is_not_done_again(run: RunDir, prepared: Prepared, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(run.path, out)
    shutil.rmtree(out / "iteration-0")
    (out / "warm-start" / "metrics.jsonl").unlink()  # would come back
    spin.run(prepared, out, Silent())
    assert not (out / "warm-start" / "metrics.jsonl").exists()
    name = "iteration-0/adapter/adapter_model.safetensors"
    assert (out / name).read_bytes() == (run.path / name).read_bytes()


def test_without_epochs_there_is_none(prepared: Prepared, tmp_path: Path) -> None:
    config = prepared.config.model_copy(update={"sft": prepared.config.sft.model_copy(update={"epochs": 0})})
    spin.run(prepare(config, datetime.date(2026, 1, 1)), tmp_path / "run", Silent())
    assert not RunDir(tmp_path / "run").warm_start.path.exists()
