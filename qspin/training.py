"""One iteration's optimisation: the policy starts as the opponent and learns to tell real from generated."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from qspin.config import TrainConfig, at_iteration
from qspin.errors import QspinError, some
from qspin.loss import SpinLoss, real_nll, spin_loss
from qspin.model import SlotModel
from qspin.optimisation import Metrics, optimise, step_order
from qspin.packing import MicroBatch, Plan, pack_row
from qspin.processes.dealing import work_together
from qspin.processes.workers import ALONE, Crew
from qspin.records import Pair, Score
from qspin.scoring import pair_logps

# |log-prob − the opponent's| at step 0, nats. The same rows through the same kernels agree bit for bit on a CPU, and on
# the H100 that was tried; on CUDA a library may choose another order of summation, and a wrong opponent is off by more.
STEP_ZERO_BOUND = {"cpu": 0.0, "cuda": 0.05}


@dataclass(frozen=True, slots=True)
class Task:
    """What one iteration trains on."""

    pairs: Sequence[Pair]
    scores: Mapping[str, Score]  # by Pair.key, under the opponent in the slot
    plan: Plan
    iteration: int
    seed: int
    prefix: int = 0  # tokens that all prompts begin with

    def order(self, epochs: int) -> list[int]:
        """Which effective batch each step takes."""
        return step_order(len(self.plan), epochs, self.seed + self.iteration)


def train(
    model: SlotModel,
    task: Task,
    config: TrainConfig,
    *,
    snapshots: Path,
    on_step: Callable[[Metrics, int], None],
    crew: Crew = ALONE,
) -> list[Metrics]:
    """Train the adapter in the slot, which must be the opponent's; as `optimise`.

    Raises:
        QspinError: the opponent's scores are not those of the model in the slot; a loss is not finite; the
            correlation loss ran away.
        OutOfMemory: a micro-batch did not fit; the steps before it are in a snapshot.
    """
    return optimise(
        model,
        lambda batch, step, scale: _gradients(model, task, batch, config, crew, first=step == 0, scale=scale),
        task.plan,
        config,
        lr=at_iteration(config.lr, task.iteration),
        order=task.order(config.epochs),
        record_ids=[pair.record_id for pair in task.pairs],
        snapshots=snapshots,
        on_step=on_step,
    )


def _gradients(
    model: SlotModel,
    task: Task,
    batch: Sequence[MicroBatch],
    config: TrainConfig,
    crew: Crew,
    *,
    first: bool,
    scale: float,
) -> Metrics:
    """The mean loss of an effective batch times `scale`, backward; its metrics are means over its pairs."""
    size = sum(len(micro_batch) for micro_batch in batch)
    settings = {
        "scores": [task.scores[task.pairs[index].key].to_json() for micro_batch in batch for index in micro_batch],
        "iteration": task.iteration,
        "prefix": task.prefix,
        "config": config.model_dump(mode="json"),
        "size": size,
        "first": first,
        "scale": scale,
    }
    results = work_together(
        crew,
        "train",
        task.pairs,
        batch,
        settings,
        lambda own: backward(model, task, own, config, size=size, first=first, scale=scale),
        lambda told: PairFigures(*map(torch.tensor, told)),
        gradients=True,
    )

    def mean(part: Callable[[PairFigures], Tensor]) -> float:
        return float(torch.cat([part(result) for result in results]).mean())

    figures = {
        "loss": mean(lambda r: r.losses),
        "margin": mean(lambda r: r.margins),
        "accuracy": mean(lambda r: (r.margins > 0).float()),
        "real_reward": mean(lambda r: r.real_rewards),
        "generated_reward": mean(lambda r: r.generated_rewards),
        "real_nll": mean(lambda r: r.real_nll),
    }
    drop = -figures["real_reward"] / at_iteration(config.beta, task.iteration)
    if config.loss == "correlation" and drop > config.max_real_logp_drop:
        raise QspinError(
            f"the correlation loss ran away: real completions lost {drop:.0f} nats on average "
            f"(train.max_real_logp_drop = {config.max_real_logp_drop:g}); lower train.lr or take train.loss=logistic"
        )
    return figures


class PairFigures(NamedTuple):
    """Of the pairs of a micro-batch, on the CPU, (B,) each: as in `SpinLoss`, and the real ones' NLL a token."""

    losses: Tensor
    margins: Tensor
    real_rewards: Tensor
    generated_rewards: Tensor
    real_nll: Tensor


def backward(
    model: SlotModel,
    task: Task,
    micro_batches: Sequence[MicroBatch],
    config: TrainConfig,
    *,
    size: int,
    first: bool,
    scale: float,
) -> list[PairFigures]:
    """Add the gradient of some micro-batches of an effective batch of `size` pairs to the slot's."""
    found = []
    for micro_batch in micro_batches:
        pairs = [task.pairs[index] for index in micro_batch]
        game, nll = _losses(model, task, pairs, config)
        loss = game.losses + config.sft_weight * nll if config.sft_weight else game.losses
        (loss.sum() / size * scale).backward()  # type: ignore[no-untyped-call]
        parts = (game.losses, game.margins, game.real_rewards, game.generated_rewards, nll)
        # not looked at before: a GPU would have nothing to do until the backward pass is launched
        figures = PairFigures(*torch.stack([part.detach() for part in parts]).cpu())
        _check(figures, task, pairs, config, STEP_ZERO_BOUND[model.device.type] if first else math.inf)
        found.append(figures)
    return found


def _losses(model: SlotModel, task: Task, pairs: Sequence[Pair], config: TrainConfig) -> tuple[SpinLoss, Tensor]:
    """ℓ of each pair, and the NLL a token of its real completion, (B,)."""
    scores = [task.scores[pair.key] for pair in pairs]
    opponent_real = torch.tensor([score.opponent_real_logps for score in scores], device=model.device)
    opponent_generated = torch.tensor([score.opponent_generated_logps for score in scores], device=model.device)
    tokens = torch.tensor([len(pair.real_ids) for pair in pairs], device=model.device)
    policy_real, policy_generated = pair_logps(model, pack_row(pairs, model.device, task.prefix))
    result = spin_loss(
        policy_real,
        policy_generated,
        opponent_real,
        opponent_generated,
        beta=at_iteration(config.beta, task.iteration),
        loss=config.loss,
    )
    return result, real_nll(policy_real, tokens)


def _check(figures: PairFigures, task: Task, pairs: Sequence[Pair], config: TrainConfig, bound: float) -> None:
    """Raises a QspinError if a loss is not finite, or the policy further than so many nats from the opponent."""
    finite = torch.isfinite(figures.losses).tolist()
    if not all(finite):
        bad = [pair.record_id for pair, ok in zip(pairs, finite, strict=True) if not ok]
        raise QspinError(f"the loss is not finite for {some(bad)}; lower train.lr or train.beta, or drop these rows")
    rewards = torch.cat([figures.real_rewards, figures.generated_rewards])
    gap = float(rewards.abs().max()) / at_iteration(config.beta, task.iteration)
    if not gap <= bound:
        raise QspinError(
            f"before the first step the policy must be the opponent, but their log-probs differ by {gap:.4g} nats: "
            f"the scores of iteration {task.iteration} were made by another model, or by other versions; "
            "delete its scores, a folder in its own, and run again"
        )
