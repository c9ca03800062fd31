"""Summed log-probs of both completions of each pair, without materialising all logits.

The same function scores the opponent (once, to disk) and the policy (in training): same rows, same kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qspin.model import SlotModel
from qspin.packing import MicroBatch, Row, pack_row
from qspin.records import Pair, Score

HEAD_CHUNK = 256  # completion tokens whose logits exist at once: 256 × 49k fp32 are 48 MiB


def pair_logps(model: SlotModel, row: Row) -> tuple[Tensor, Tensor]:
    """(B,), (B,) fp32: log-prob of each real and generated completion, summed over its tokens, end-of-turn included.

    Differentiable in the adapter.
    """
    hidden = model.hidden(row.input_ids, row.position_ids, row.layout)  # (T, D)
    token_logps = _TokenLogps.apply(hidden[row.predictors], row.targets, model)  # type: ignore[no-untyped-call]  # (C,)
    sums = torch.zeros(2 * row.pairs, dtype=torch.float32, device=hidden.device)
    sums = sums.index_add(0, row.owners, token_logps)
    return sums[0::2], sums[1::2]


def score_pairs(
    model: SlotModel, pairs: Sequence[Pair], micro_batches: Sequence[MicroBatch], prefix: int = 0
) -> Iterator[list[Score]]:
    """Scores of each micro-batch in turn under whoever is in the slot."""
    for micro_batch in micro_batches:
        members = [pairs[index] for index in micro_batch]
        with torch.no_grad():
            real, generated = pair_logps(model, pack_row(members, model.device, prefix))
        yield [
            Score(pair.key, float(r), float(g))
            for pair, r, g in zip(members, real.tolist(), generated.tolist(), strict=True)
        ]


class _TokenLogps(torch.autograd.Function):
    """log softmax(head(h))[target], chunk by chunk: memory is HEAD_CHUNK × vocabulary whatever the number of tokens.

    The loss weighs all tokens of a completion alike, by a factor that is known only when every one of them has been
    summed. But the direction of d logp / d h is known as soon as a token's logits are, so it is made at once, while
    they are at hand, and scaled in the backward pass: no logits are made twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, model: SlotModel) -> Tensor:
        logps, directions = [], []
        for h, target in zip(_chunks(hidden), _chunks(targets), strict=True):
            logits = model.logits(h)  # (c, V) fp32
            normaliser = logits.logsumexp(-1)  # (c,)
            logps.append(logits.gather(1, target[:, None])[:, 0] - normaliser)
            if ctx.needs_input_grad[0]:
                # d logp / d logits = onehot − softmax
                grad_logits = (logits - normaliser[:, None]).exp_().neg_()
                grad_logits[torch.arange(len(target), device=target.device), target] += 1
                directions.append(model.logits_backward(grad_logits, logits))
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.cat(directions))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (directions,) = ctx.saved_tensors  # (C, D)
        return (directions * grad[:, None]).to(directions.dtype), None, None


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tensor, HEAD_CHUNK)
