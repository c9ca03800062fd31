"""The optimiser's rate, order and snapshots; steps that are cut off, by a request to stop, by memory or by numbers that
are no numbers, are made whole or not."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from qspin import optimisation
from qspin.config import TrainConfig
from qspin.errors import QspinError
from qspin.fitting.memory import OutOfMemory
from qspin.model import Adapter, SlotModel
from qspin.optimisation import (
    FIRST_SCALE,
    Metrics,
    Objective,
    learning_rate,
    make_optimizer,
    optimise,
    step_order,
    steps_kept,
)
from qspin.packing import Plan, pack_row
from qspin.records import Pair
from qspin.scoring import pair_logps
from qspin.stopping import heed_stops

LoadModel = Callable[..., SlotModel]
PLAN: Plan = [[[0, 1]], [[2], [3]], [[4]], [[5, 6]]]
IDS = [f"row-{index}" for index in range(7)]
EPOCHS, STEPS = 2, 8


def descend(model: SlotModel) -> Objective:
    """A bowl whose lowest point is elsewhere for each batch: the result depends on every step, and on their order."""

    def objective(batch: Any, _step: int, scale: float) -> Metrics:
        for parameter in model.parameters.values():
            parameter.grad = scale * (parameter.detach() - 0.1 * batch[0][0])
        return {"loss": float(batch[0][0])}

    return objective


def ignore(_metrics: Metrics, _pairs: int) -> None:
    pass


def run(
    model: SlotModel,
    objective: Objective,
    snapshots: Path,
    on_step: Callable[[Metrics, int], None] = ignore,
    **changes: Any,
) -> list[Metrics]:
    config = TrainConfig(**{"snapshot_minutes": 1000, "warmup": 0.0, **changes})
    return optimise(
        model,
        objective,
        PLAN,
        config,
        lr=0.01,
        order=step_order(len(PLAN), EPOCHS, 0),
        record_ids=IDS,
        snapshots=snapshots,
        on_step=on_step,
    )


@pytest.fixture
def undisturbed(tiny_model: LoadModel, tmp_path: Path) -> tuple[list[Metrics], Adapter]:
    model = tiny_model()
    return run(model, descend(model), tmp_path / "undisturbed"), model.adapter()


def same_bits(one: Adapter, other: Adapter) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def cut_off(model: SlotModel, at: int, how: Callable[[], None]) -> Objective:
    """As `descend`, but at one step something happens, once, when half of the gradients are there."""
    whole = descend(model)
    left = [how]

    def objective(batch: Any, step: int, scale: float) -> Metrics:
        figures = whole(batch, step, scale)
        if step == at and left:
            next(iter(model.parameters.values())).grad = None
            left.pop()()
        return figures

    return objective


def interrupt() -> None:
    raise KeyboardInterrupt


def terminate() -> None:
    raise SystemExit(143)


def exhaust() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


# --- rate, order and optimiser ---


def test_learning_rate_by_hand() -> None:
    # 10 steps, the first 3 of them rise by thirds; the other 7 fall by sevenths, from the peak on
    rates = [learning_rate(step, 10, peak=21.0, warmup=0.3) for step in range(10)]
    assert rates == pytest.approx([7, 14, 21, 21, 18, 15, 12, 9, 6, 3], rel=1e-12)
    # a share of a step is a step: ⌈0.1 · 4⌉ = 1
    assert [learning_rate(step, 4, peak=3.0, warmup=0.1) for step in range(4)] == pytest.approx([3, 3, 2, 1])
    assert [learning_rate(step, 4, peak=4.0, warmup=0.0) for step in range(4)] == pytest.approx([4, 3, 2, 1])
    # warmup to the end, and a single step
    assert [learning_rate(step, 4, peak=4.0, warmup=0.99) for step in range(4)] == pytest.approx([1, 2, 3, 4])
    assert learning_rate(0, 1, peak=4.0, warmup=0.1) == 4.0


def test_every_epoch_takes_every_batch_once_in_an_order_of_its_own() -> None:
    order = step_order(5, 3, seed=7)
    epochs = [order[:5], order[5:10], order[10:]]
    assert epochs[0] == [0, 1, 2, 3, 4]  # as planned: step 0 must be among the first scored
    assert [sorted(epoch) for epoch in epochs] == [[0, 1, 2, 3, 4]] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert step_order(5, 3, seed=7) == order
    assert step_order(5, 3, seed=8) != order
    assert step_order(5, 1, seed=7) == [0, 1, 2, 3, 4]


def test_the_paged_optimiser_needs_a_gpu() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(QspinError) as caught:
        make_optimizer(TrainConfig(optimizer="paged_adamw_8bit"), [parameter], torch.device("cpu"))
    assert str(caught.value) == (
        "train.optimizer: paged_adamw_8bit pages between a GPU and its host; use adamw on a CPU"
    )


# --- steps that are cut off ---


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
@pytest.mark.parametrize(
    ("how", "raised"), [(interrupt, KeyboardInterrupt), (terminate, SystemExit), (exhaust, OutOfMemory)]
)
def test_the_steps_before_are_kept_and_the_run_goes_on_to_the_same_bits(
    how: Callable[[], None],
    raised: type[BaseException],
    optimizer: str,
    tiny_model: LoadModel,
    tmp_path: Path,
) -> None:
    whole = tiny_model()
    metrics = run(whole, descend(whole), tmp_path / "whole", optimizer=optimizer)
    model = tiny_model()
    with pytest.raises(raised):
        run(model, cut_off(model, 5, how), tmp_path / "cut", optimizer=optimizer)
    assert steps_kept(tmp_path / "cut") == 5
    again = tiny_model()
    assert run(again, descend(again), tmp_path / "cut", optimizer=optimizer) == metrics
    assert same_bits(again.adapter(), whole.adapter())


def test_before_the_first_step_there_is_nothing_to_keep(tiny_model: LoadModel, tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(KeyboardInterrupt):
        run(model, cut_off(model, 0, interrupt), tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


@pytest.fixture
def heeded() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    heed_stops()
    yield
    heed_stops()  # what was asked is forgotten
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("heeded")
def test_an_update_that_has_begun_is_finished_and_kept(
    undisturbed: tuple[list[Metrics], Adapter], tiny_model: LoadModel, tmp_path: Path
) -> None:
    """The signal comes when some weights have moved and others have not."""
    model, steps = tiny_model(), 0

    def on_update(*_: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    hook = register_optimizer_step_pre_hook(on_update)
    with pytest.raises(SystemExit) as stop:
        run(model, descend(model), tmp_path / "cut")
    hook.remove()
    assert stop.value.code == 143
    assert steps_kept(tmp_path / "cut") == 3
    heed_stops()
    again = tiny_model()
    assert run(again, descend(again), tmp_path / "cut") == undisturbed[0]
    assert same_bits(again.adapter(), undisturbed[1])


def test_a_request_between_two_steps_keeps_both(
    undisturbed: tuple[list[Metrics], Adapter], tiny_model: LoadModel, tmp_path: Path
) -> None:
    """As when the status is written, or the view drawn."""
    model = tiny_model()

    def on_step(metrics: Metrics, _pairs: int) -> None:
        if metrics["step"] == 1:
            terminate()

    with pytest.raises(SystemExit):
        run(model, descend(model), tmp_path / "cut", on_step=on_step)
    assert steps_kept(tmp_path / "cut") == 2
    again = tiny_model()
    assert run(again, descend(again), tmp_path / "cut") == undisturbed[0]
    assert same_bits(again.adapter(), undisturbed[1])


# --- numbers that are no numbers ---


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_at_once_and_moves_nothing(
    value: float, tiny_model: LoadModel, tmp_path: Path
) -> None:
    model = tiny_model()
    whole, before = descend(model), {}

    def objective(batch: Any, step: int, scale: float) -> Metrics:
        figures = whole(batch, step, scale)
        if step == 3:
            before.update(model.adapter())
            gradient = list(model.parameters.values())[-1].grad
            assert gradient is not None
            gradient[0, 0] = value
        return figures

    with pytest.raises(QspinError) as caught:
        run(model, objective, tmp_path / "snapshots", snapshot_minutes=0)
    assert str(caught.value) == (
        "the gradient is not finite in the batch of row-5, row-6; lower the learning rate, or drop these rows"
    )
    assert same_bits(model.adapter(), before)
    assert steps_kept(tmp_path / "snapshots") == 3  # the last good one


def overflowing(model: SlotModel, most: float) -> Objective:
    """As `descend`, in a type whose numbers end above a scale of `most`."""
    whole = descend(model)

    def objective(batch: Any, step: int, scale: float) -> Metrics:
        figures = whole(batch, step, scale)
        if scale > most:
            last = list(model.parameters.values())[-1].grad
            assert last is not None
            last[0, 0] = float("inf")
        return figures

    return objective


def test_float16_scales_its_loss_and_leaves_no_batch_out(tiny_model: LoadModel, tmp_path: Path) -> None:
    other = tiny_model()
    assert all("loss_scale" not in row for row in run(other, descend(other), tmp_path / "other"))
    whole, model = tiny_model(dtype="float16"), tiny_model(dtype="float16")
    assert {row["loss_scale"] for row in run(whole, descend(whole), tmp_path / "whole")} == {FIRST_SCALE}
    metrics = run(model, overflowing(model, 64.0), tmp_path / "half")
    assert [row["loss_scale"] for row in metrics] == [64.0] * STEPS  # from 65,536 in the first step, by halves
    assert same_bits(model.adapter(), whole.adapter()), "powers of two round nothing"

    cut, again = tiny_model(dtype="float16"), tiny_model(dtype="float16")
    with pytest.raises(KeyboardInterrupt):
        run(cut, cut_off(cut, 5, interrupt), tmp_path / "cut")
    assert run(again, descend(again), tmp_path / "cut")[4]["loss_scale"] == FIRST_SCALE
    assert same_bits(again.adapter(), whole.adapter())

    never = tiny_model(dtype="float16")
    with pytest.raises(QspinError, match="the gradient is not finite"):
        run(never, overflowing(never, 0.5), tmp_path / "never")


def test_the_scale_recovers_from_a_batch_that_needed_a_small_one(
    tiny_model: LoadModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimisation, "HIGHER_AGAIN", 2)

    def scales(model: SlotModel, once: Callable[[int], Callable[[], None] | None] = lambda _step: None) -> list[float]:
        whole, small = overflowing(model, FIRST_SCALE), overflowing(model, FIRST_SCALE / 4)

        def objective(batch: Any, step: int, scale: float) -> Metrics:
            if stop := once(step):
                stop()
            return (small if step in {1, 2} else whole)(batch, step, scale)

        return [row["loss_scale"] / FIRST_SCALE for row in run(model, objective, tmp_path / "scales")]

    wanted = [1, 1 / 4, 1 / 4, 1 / 4, 1 / 2, 1 / 2, 1, 1]  # at step 2 twice as much is tried in vain
    cut, again = tiny_model(dtype="float16"), tiny_model(dtype="float16")
    with pytest.raises(KeyboardInterrupt):
        scales(cut, lambda step: interrupt if step == 5 else None)
    assert steps_kept(tmp_path / "scales") == 5
    assert scales(again) == wanted


def test_small_gradients_survive_in_float16(tiny_model: LoadModel) -> None:
    pairs = [Pair(str(n), 0, (1, 2, 3 + n), (20, 21, 22 + n), (40 + n, 41), ended=True) for n in range(3)]

    def gradient(dtype: str, scale: float) -> torch.Tensor:
        model = tiny_model(dtype=dtype, moved=True)
        real, generated = pair_logps(model, pack_row(pairs, model.device))
        ((real - generated).sum() * 1e-7 * scale).backward()  # type: ignore[no-untyped-call]
        found = [p.grad.flatten() for p in model.parameters.values() if p.grad is not None]
        return torch.cat(found) / scale

    wanted = gradient("float32", 1.0)

    def off(found: torch.Tensor) -> float:
        return float((found - wanted).norm() / wanted.norm())

    assert off(gradient("float16", FIRST_SCALE)) < 0.05
    assert off(gradient("float16", 1.0)) > 0.2, "this is no test of scaling"


# --- snapshots ---


def test_the_last_two_snapshots_are_kept(tiny_model: LoadModel, tmp_path: Path) -> None:
    model = tiny_model()
    run(model, descend(model), tmp_path, snapshot_minutes=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000006", "step-000007"]
    assert not list(tmp_path.rglob("*.partial"))


def test_no_snapshots_are_taken_before_their_time(tiny_model: LoadModel, tmp_path: Path) -> None:
    model = tiny_model()
    run(model, descend(model), tmp_path / "snapshots", snapshot_minutes=5)
    assert not (tmp_path / "snapshots").exists()


def test_a_damaged_snapshot_is_named(tiny_model: LoadModel, tmp_path: Path) -> None:
    model, again = tiny_model(), tiny_model()
    run(model, descend(model), tmp_path, snapshot_minutes=0)
    file = tmp_path / "step-000007" / "state.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(QspinError, match=r"state\.safetensors: missing or altered"):
        run(again, descend(again), tmp_path)


def test_a_weight_without_a_gradient_is_passed_over_where_gradients_are_scaled() -> None:
    """An expert that no token was sent to."""
    seen, unseen = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))

    def objective(_batch: Any, _step: int, scale: float) -> dict[str, float]:
        seen.grad = torch.full((2,), 3.0 * scale)
        return {}

    _, norm = optimisation._gradient(objective, [], 0, 4.0, [seen, unseen], 100.0)
    assert norm == pytest.approx(3 * 2**0.5)
    assert unseen.grad is None
