"""Supervised training: the adapter learns the real completions alone, by the same packed engine, on their −log p.

A base that was never fine-tuned does so before it plays: SPIN's first opponent is a fine-tuned model (section 4 of
arXiv 2401.01335). And it is what self-play has to be better than.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from qspin.config import TrainConfig
from qspin.errors import QspinError, some
from qspin.model import SlotModel
from qspin.optimisation import Metrics, optimise
from qspin.packing import MicroBatch, Plan, pack_row
from qspin.processes.dealing import work_together
from qspin.processes.workers import ALONE, Crew
from qspin.records import Pair
from qspin.scoring import pair_logps


def train_supervised(
    model: SlotModel,
    rows: Sequence[Pair],
    plan: Plan,
    config: TrainConfig,
    *,
    lr: float,
    order: Sequence[int],
    prefix: int,
    snapshots: Path,
    on_step: Callable[[Metrics, int], None],
    crew: Crew = ALONE,
) -> list[Metrics]:
    """Train the adapter in the slot on real completions alone; as `optimise`.

    Args:
        rows: pairs without generated completions.
        prefix: tokens that all prompts begin with.

    Raises:
        QspinError: a loss is not finite.
        OutOfMemory: a micro-batch did not fit; the steps before it are in a snapshot.
    """
    return optimise(
        model,
        lambda batch, _step, scale: _gradients(model, rows, batch, prefix, scale, crew),
        plan,
        config,
        lr=lr,
        order=order,
        record_ids=[row.record_id for row in rows],
        snapshots=snapshots,
        on_step=on_step,
    )


def _gradients(
    model: SlotModel, rows: Sequence[Pair], batch: Sequence[MicroBatch], prefix: int, scale: float, crew: Crew
) -> Metrics:
    """−log p of an effective batch's completions, nats a token, times `scale`, backward."""
    tokens = sum(len(rows[index].real_ids) for micro_batch in batch for index in micro_batch)
    sums = work_together(
        crew,
        "supervise",
        rows,
        batch,
        {"prefix": prefix, "tokens": tokens, "scale": scale},
        lambda own: backward_real(model, rows, own, prefix, tokens=tokens, scale=scale),
        float,
        gradients=True,
    )
    loss = 0.0
    for logp in sums:
        loss -= logp / tokens
    return {"loss": loss}


def backward_real(
    model: SlotModel,
    rows: Sequence[Pair],
    micro_batches: Sequence[MicroBatch],
    prefix: int,
    *,
    tokens: int,
    scale: float,
) -> list[float]:
    """Add the gradient of some micro-batches of an effective batch of so many real tokens to the slot's; the summed
    log-prob of each."""
    sums = []
    for micro_batch in micro_batches:
        members = [rows[index] for index in micro_batch]
        logps, _ = pair_logps(model, pack_row(members, model.device, prefix))  # (B,)
        if not bool(torch.isfinite(logps).all()):
            bad = [row.record_id for row, ok in zip(members, torch.isfinite(logps).tolist(), strict=True) if not ok]
            raise QspinError(
                f"the loss is not finite for {some(bad)}; lower its learning rate (sft.lr, or --lr of the baseline), "
                "or drop these rows"
            )
        (-logps.sum() / tokens * scale).backward()  # type: ignore[no-untyped-call]
        sums.append(float(logps.detach().sum()))
    return sums
