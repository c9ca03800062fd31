"""Summed log-probs of both completions of each pair, without materialising all logits.

The same function scores the opponent (once, to disk) and the policy (in training): same rows, same kernels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qspin.fitting.footprint import vocabulary_step
from qspin.model import SlotModel
from qspin.packing import MicroBatch, Row, pack_row
from qspin.records import Pair, Score


def pair_logps(model: SlotModel, row: Row) -> tuple[Tensor, Tensor]:
    """(B,), (B,) fp32: log-prob of each real and generated completion, summed over its tokens, end-of-turn included.

    Differentiable in the adapter.
    """
    hidden = model.hidden(model.embed(row.input_ids), row.position_ids, row.layout)  # (T, D)
    token_logps = _TokenLogps.apply(hidden[row.predictors], row.targets, model)  # type: ignore[no-untyped-call]  # (C,)
    # each sum in order of its tokens, where index_add on a GPU adds in order of arrival; unsafe leaves out a check of
    # the lengths that would wait for the GPU
    sums = torch.segment_reduce(token_logps, "sum", lengths=row.lengths, unsafe=True)
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
    """log softmax(head(h))[target], a block of the vocabulary at a time: memory does not grow with tokens × vocabulary.

    Sums over the vocabulary are made as flash attention makes them over keys: relative to the largest logit so far,
    and rescaled when a larger one turns up.

    The loss weighs all tokens of a completion alike, by a factor that is known only when every one of them has been
    summed. But the direction of d logp / d h needs no factor, so it is summed in the same pass, while the logits are
    at hand, and scaled in the backward pass: no logits are made twice.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, targets: Tensor, model: SlotModel) -> Tensor:  # (C, D), (C,) → (C,)
        count = len(targets)
        peak = torch.full((count,), float("-inf"), device=hidden.device)
        total, target_logits = torch.zeros_like(peak), torch.zeros_like(peak)
        others = torch.zeros(hidden.shape, device=hidden.device) if ctx.needs_input_grad[0] else None  # (C, D)
        head, step = model.head, vocabulary_step(hidden.device.type, count)
        for start in range(0, model.vocabulary, step):
            tokens = slice(start, min(start + step, model.vocabulary))
            part = head.part(tokens)
            logits = part.logits(hidden)  # (C, v)
            columns = (targets - start).clamp(0, tokens.stop - start - 1)[:, None]
            here = (targets >= start) & (targets < tokens.stop)
            target_logits = torch.where(here, logits.gather(1, columns)[:, 0], target_logits)
            higher = torch.maximum(peak, logits.amax(-1))
            decay = (peak - higher).exp_()
            slope = head.slope(logits)
            weights = logits.sub_(higher[:, None]).exp_()  # softmax, but for the normaliser
            total = total * decay + weights.sum(-1)
            if others is not None:
                weights.scatter_(1, columns, weights.gather(1, columns).masked_fill_(here[:, None], 0.0))
                others.mul_(decay[:, None]).add_(part.backward(weights, slope))
            peak = higher
            del part  # which may be a copy, before the next
        logps = target_logits - peak - total.log()
        if others is not None:
            # d logp / d logits = onehot − softmax; 1 − p of the target by expm1, or it would be lost near p = 1
            own = head.gradients(targets, head.slope(target_logits)) * -torch.expm1(logps)[:, None]
            ctx.save_for_backward((own - others / total[:, None]).to(hidden.dtype))
        return logps

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (directions,) = ctx.saved_tensors  # (C, D)
        return (directions * grad[:, None]).to(directions.dtype), None, None
