"""Optimising the adapter in the slot over a plan: order, rate, steps, and snapshots to go on from.

What is learnt is the caller's: a function that leaves the gradient of one effective batch in the adapter. Nothing
here draws a random number: the order comes from the seed, dropout is 0. State is kept as snapshots that hold
everything, so that a run cut off anywhere ends in the same bytes as one that was not. The last two are kept: should
one be damaged, the other is there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qspin.config import TrainConfig
from qspin.errors import QspinError, some
from qspin.files import check_folder, commit_folder, read_jsonl, remove, write_jsonl
from qspin.fitting.memory import OutOfMemory, refusals_told
from qspin.model import SlotModel
from qspin.packing import MicroBatch, Plan
from qspin.processes.workers import WorkerLost
from qspin.stopping import check_stop, stops_held

Metrics = dict[str, float]
# effective batch, step, s → its metrics; leaves the gradient of s times its mean loss in the adapter
Objective = Callable[[Sequence[MicroBatch], int, float], Metrics]

# What the loss is multiplied by in float16, whose gradients would vanish below 6e-8 (Micikevicius et al. 2018, section
# 3.2); halved when they grow beyond 65,504, and the step made again, so that no batch is left out.
FIRST_SCALE = 2.0**16
HIGHER_AGAIN = 200  # steps from one try of twice the scale to the next: a try in vain costs a step


def optimise(
    model: SlotModel,
    objective: Objective,
    plan: Plan,
    config: TrainConfig,
    *,
    lr: float,
    order: Sequence[int],
    record_ids: Sequence[str],
    snapshots: Path,
    on_step: Callable[[Metrics, int], None],
) -> list[Metrics]:
    """Train the adapter in the slot from the last snapshot if there is one, with a fresh optimiser if not.

    Args:
        model: recomputes as many layers as it was told to (`use_gradient_checkpointing`).
        config: optimiser, warmup, weight decay, clipping and how often to keep a snapshot.
        lr: peak rate.
        order: which effective batch of the plan each step takes (`step_order`).
        record_ids: of the pairs that the plan's indices name, for errors.
        snapshots: folder for snapshots; the caller removes it once the result is committed.
        on_step: hears of each step's metrics and number of pairs, those before the snapshot left out.

    Returns:
        The metrics of every optimiser step.

    Raises:
        QspinError: a gradient is not finite; nothing was learnt from it.
        OutOfMemory: a micro-batch did not fit; the steps before it are in a snapshot.
        WorkerLost, SystemExit, KeyboardInterrupt: a helper is gone, or the run is asked to stop; the steps that were
            finished are in a snapshot.
    """
    parameters = list(model.parameters.values())
    optimizer = make_optimizer(config, parameters, model.device)
    metrics = _restore(model, optimizer, snapshots)
    scaled = model.dtype == torch.float16
    scale = metrics[-1]["loss_scale"] if scaled and metrics else FIRST_SCALE if scaled else 1.0
    saved_at, between_steps = time.monotonic(), True
    try:
        for step in range(len(metrics), len(order)):
            check_stop()
            batch = plan[order[step]]
            if scaled and step and step % HIGHER_AGAIN == 0:
                scale = min(2 * scale, FIRST_SCALE)
            rate = learning_rate(step, len(order), peak=lr, warmup=config.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with refusals_told():
                figures, norm = _gradient(objective, batch, step, scale, parameters, config.max_grad_norm)
                while not math.isfinite(norm) and scale > 1:
                    scale /= 2
                    optimizer.zero_grad()
                    figures, norm = _gradient(objective, batch, step, scale, parameters, config.max_grad_norm)
                if not math.isfinite(norm):
                    bad = some([record_ids[index] for micro_batch in batch for index in micro_batch])
                    raise QspinError(
                        f"the gradient is not finite in the batch of {bad}; lower the learning rate, or drop these rows"
                    )
                figures |= {"loss_scale": scale} if scaled else {}
                with stops_held():
                    between_steps = False
                    optimizer.step()
                    metrics.append({"step": step, "epoch": step // len(plan), "lr": rate, **figures, "grad_norm": norm})
                    between_steps = True
            optimizer.zero_grad()
            on_step(metrics[-1], sum(len(micro_batch) for micro_batch in batch))
            if time.monotonic() - saved_at >= 60 * config.snapshot_minutes and step + 1 < len(order):
                _save(model, optimizer, snapshots, metrics)
                saved_at = time.monotonic()
    except (OutOfMemory, WorkerLost, KeyboardInterrupt, SystemExit):
        if between_steps and len(metrics) > steps_kept(snapshots):
            _save(model, optimizer, snapshots, metrics)
        raise
    finally:  # of a step that was not finished, which the next training would begin with
        optimizer.zero_grad()
    return metrics


def _gradient(
    objective: Objective,
    batch: Sequence[MicroBatch],
    step: int,
    scale: float,
    parameters: Sequence[torch.nn.Parameter],
    max_norm: float,
) -> tuple[Metrics, float]:
    """Leave the clipped gradient of an effective batch in the adapter; its metrics, and the norm before clipping."""
    figures = objective(batch, step, scale)
    if scale != 1:
        for parameter in parameters:
            if parameter.grad is not None:  # of an expert that no token was sent to there is none
                parameter.grad.div_(scale)
    return figures, float(torch.nn.utils.clip_grad_norm_(parameters, max_norm))


def steps_kept(snapshots: Path) -> int:
    """How many steps the last snapshot holds: where `optimise` will go on."""
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


def _save(model: SlotModel, optimizer: Any, snapshots: Path, metrics: list[Metrics]) -> None:
    """Keep adapter, optimiser state and metrics beside the last snapshot; those before it are let go of first."""
    for older in _snapshots(snapshots)[:-1]:
        remove(older)
    tensors = {f"adapter/{name}": tensor for name, tensor in model.adapter().items()}
    for index, parameter in enumerate(model.parameters.values()):
        # not from state_dict(), where bitsandbytes puts a layer around its own
        for key, value in optimizer.state[parameter].items():
            tensor = torch.as_tensor(value).contiguous()
            # bitsandbytes' tables are the same tensors for all weights, of which safetensors takes none twice
            tensors[f"optimizer/{index}/{key}"] = tensor.clone() if key.startswith("qmap") else tensor
    need = sum(tensor.nbytes for tensor in tensors.values())
    with stops_held(), commit_folder(snapshots / f"step-{len(metrics):06d}", need=need) as folder:
        save_file(tensors, folder / "state.safetensors")
        write_jsonl(folder / "metrics.jsonl", metrics)


def _restore(model: SlotModel, optimizer: Any, snapshots: Path) -> list[Metrics]:
    """Go back to the last snapshot; the metrics of the steps it holds, none without a snapshot."""
    found = _snapshots(snapshots)
    if not found:
        return []
    check_folder(found[-1])
    tensors = load_file(found[-1] / "state.safetensors")
    model.set_adapter({name.removeprefix("adapter/"): t for name, t in tensors.items() if name.startswith("adapter/")})
    state: dict[int, dict[str, Tensor | int]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/", 2)
            # bitsandbytes counts its steps in an int, torch in an fp32 tensor
            state.setdefault(int(index), {})[key] = int(tensor) if tensor.dtype == torch.int64 else tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return read_jsonl(found[-1] / "metrics.jsonl")


def _snapshots(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*")) if folder.is_dir() else []
