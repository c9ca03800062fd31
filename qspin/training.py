"""One iteration's optimisation: the policy starts as the opponent and learns to tell real from generated.

Nothing here draws a random number: the order comes from the seed, dropout is 0. State is kept as snapshots that
hold everything, so that a run cut off anywhere ends in the same bytes as one that was not.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qspin.config import TrainConfig, at_iteration
from qspin.errors import QspinError
from qspin.files import check_folder, commit_folder, read_json
from qspin.loss import SpinLoss, spin_loss
from qspin.memory import OutOfMemory, refusals_told
from qspin.model import SlotModel
from qspin.packing import MicroBatch, Plan, pack_row
from qspin.records import Pair, Score
from qspin.scoring import pair_logps

# |log-prob − the opponent's| at step 0, nats. The same rows through the same kernels agree bit for bit on a CPU.
# Not yet measured on CUDA, where a kernel may choose another order of summation from call to call.
STEP_ZERO_BOUND = {"cpu": 0.0, "cuda": 0.05}

Metrics = dict[str, float]


@dataclass(frozen=True, slots=True)
class Task:
    """What one iteration trains on."""

    pairs: Sequence[Pair]
    scores: Mapping[str, Score]  # by Pair.key, under the opponent in the slot
    plan: Plan
    iteration: int
    seed: int
    prefix: int = 0  # tokens that all prompts begin with


def train(
    model: SlotModel, task: Task, config: TrainConfig, *, snapshots: Path, on_step: Callable[[Metrics, int], None]
) -> list[Metrics]:
    """Train the adapter in the slot, which must be the opponent's, from the last snapshot if there is one.

    Args:
        snapshots: folder for snapshots; the caller removes it once the result is committed.
        on_step: hears of each step's metrics and number of pairs, those before the snapshot left out.

    Returns:
        The metrics of every optimiser step.

    Raises:
        QspinError: the opponent's scores are not those of the model in the slot; a loss is not finite; the
            correlation loss ran away.
        OutOfMemory: a micro-batch did not fit; the steps before it are in a snapshot.
    """
    model.use_gradient_checkpointing(config.gradient_checkpointing)
    parameters = model.parameters
    optimizer = make_optimizer(config, list(parameters.values()), model.device)
    order = step_order(len(task.plan), config.epochs, task.seed + task.iteration)
    metrics = _restore(model, optimizer, snapshots)
    saved_at = time.monotonic()
    for step in range(len(metrics), len(order)):
        rate = learning_rate(step, len(order), peak=at_iteration(config.lr, task.iteration), warmup=config.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        try:
            with refusals_told():
                figures = _step(model, optimizer, task, task.plan[order[step]], config, first=step == 0)
        except OutOfMemory:
            optimizer.zero_grad()
            if metrics:
                _save(model, optimizer, snapshots, metrics)
            raise
        metrics.append({"step": step, "epoch": step // len(task.plan), "lr": rate, **figures})
        on_step(metrics[-1], sum(len(micro_batch) for micro_batch in task.plan[order[step]]))
        if time.monotonic() - saved_at >= 60 * config.snapshot_minutes and step + 1 < len(order):
            _save(model, optimizer, snapshots, metrics)
            saved_at = time.monotonic()
    return metrics


def steps_kept(snapshots: Path) -> int:
    """How many steps the last snapshot holds: where `train` will go on."""
    found = _snapshots(snapshots)
    return int(found[-1].name.removeprefix("step-")) if found else 0


def step_order(batches: int, epochs: int, seed: int) -> list[int]:
    """Which effective batch each step takes: every epoch its own order of whole batches, the first as planned."""
    generator = torch.Generator().manual_seed(seed)
    order = list(range(batches))
    for _ in range(epochs - 1):
        order += torch.randperm(batches, generator=generator).tolist()
    return order


def learning_rate(step: int, steps: int, *, peak: float, warmup: float) -> float:
    """Linear: up to the peak over the first `warmup` share of the steps, then down towards 0."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return peak * (step + 1) / rising
    return peak * (steps - step) / (steps - rising)


def make_optimizer(config: TrainConfig, parameters: list[torch.nn.Parameter], device: torch.device) -> Any:
    """A fresh optimiser; its rate is set at each step.

    Raises:
        QspinError: the optimiser does not exist on this device.
    """
    match config.optimizer:
        case "rmsprop":
            return torch.optim.RMSprop(parameters, lr=0.0, weight_decay=config.weight_decay)
        case "adamw":
            return torch.optim.AdamW(parameters, lr=0.0, weight_decay=config.weight_decay, fused=True)
        case "paged_adamw_8bit":
            if device.type != "cuda":
                raise QspinError(
                    "train.optimizer: paged_adamw_8bit pages between a GPU and its host; use adamw on a CPU"
                )
            import bitsandbytes.optim

            return bitsandbytes.optim.PagedAdamW8bit(parameters, lr=0.0, weight_decay=config.weight_decay)


def _step(
    model: SlotModel, optimizer: Any, task: Task, batch: Sequence[MicroBatch], config: TrainConfig, *, first: bool
) -> Metrics:
    """One optimiser step over an effective batch; its metrics are means over its pairs."""
    size = sum(len(micro_batch) for micro_batch in batch)
    results = []
    for micro_batch in batch:
        pairs = [task.pairs[index] for index in micro_batch]
        result = _losses(model, task, pairs, config, first=first)
        (result.losses.sum() / size).backward()  # type: ignore[no-untyped-call]
        results.append(result)
    norm = torch.nn.utils.clip_grad_norm_(list(model.parameters.values()), config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()

    def mean(part: Callable[[SpinLoss], Tensor]) -> float:
        return float(torch.cat([part(result).detach() for result in results]).mean())

    figures = {
        "loss": mean(lambda r: r.losses),
        "margin": mean(lambda r: r.margins),
        "accuracy": mean(lambda r: (r.margins > 0).float()),
        "real_reward": mean(lambda r: r.real_rewards),
        "generated_reward": mean(lambda r: r.generated_rewards),
        "grad_norm": float(norm),
    }
    drop = -figures["real_reward"] / at_iteration(config.beta, task.iteration)
    if config.loss == "correlation" and drop > config.max_real_logp_drop:
        raise QspinError(
            f"the correlation loss ran away: real completions lost {drop:.0f} nats on average "
            f"(train.max_real_logp_drop = {config.max_real_logp_drop:g}); lower train.lr or take train.loss=logistic"
        )
    return figures


def _losses(model: SlotModel, task: Task, pairs: Sequence[Pair], config: TrainConfig, *, first: bool) -> SpinLoss:
    scores = [task.scores[pair.key] for pair in pairs]
    opponent_real = torch.tensor([score.opponent_real_logps for score in scores], device=model.device)
    opponent_generated = torch.tensor([score.opponent_generated_logps for score in scores], device=model.device)
    policy_real, policy_generated = pair_logps(model, pack_row(pairs, model.device, task.prefix))
    result = spin_loss(
        policy_real,
        policy_generated,
        opponent_real,
        opponent_generated,
        beta=at_iteration(config.beta, task.iteration),
        loss=config.loss,
    )
    if not bool(torch.isfinite(result.losses).all()):
        bad = [pair.record_id for pair, ok in zip(pairs, torch.isfinite(result.losses).tolist(), strict=True) if not ok]
        raise QspinError(f"the loss is not finite for {', '.join(bad[:5])}; lower train.lr, or drop these rows")
    if first:
        gaps = torch.cat([policy_real - opponent_real, policy_generated - opponent_generated]).detach()
        gap = float(gaps.abs().max())
        if not gap <= STEP_ZERO_BOUND[model.device.type]:
            raise QspinError(
                f"before the first step the policy must be the opponent, but their log-probs differ by {gap:.4g} nats: "
                f"the scores of iteration {task.iteration} were made by another model, or by other versions; "
                "delete its folder and run again"
            )
    return result


def _save(model: SlotModel, optimizer: Any, snapshots: Path, metrics: list[Metrics]) -> None:
    """Keep adapter, optimiser state and metrics; then let go of older snapshots."""
    older = _snapshots(snapshots)
    tensors = {f"adapter/{name}": tensor for name, tensor in model.adapter().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{key}": torch.as_tensor(value).contiguous() for key, value in state.items()}
    with commit_folder(snapshots / f"step-{len(metrics):06d}") as folder:
        save_file(tensors, folder / "state.safetensors")
        (folder / "metrics.json").write_text(json.dumps(metrics))
    for folder in older:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def _restore(model: SlotModel, optimizer: Any, snapshots: Path) -> list[Metrics]:
    """Go back to the last snapshot; the metrics of the steps it holds, none without a snapshot."""
    found = _snapshots(snapshots)
    if not found:
        return []
    check_folder(found[-1])
    tensors = load_file(found[-1] / "state.safetensors")
    model.set_adapter({name.removeprefix("adapter/"): t for name, t in tensors.items() if name.startswith("adapter/")})
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/", 2)
            state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    metrics: list[Metrics] = read_json(found[-1] / "metrics.json")
    return metrics


def _snapshots(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*")) if folder.is_dir() else []
