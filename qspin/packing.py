"""Pairs → micro-batches under a token budget.

A plan is made once an iteration and kept: scoring and every epoch of training run the same micro-batches, since
16-bit rounding depends on a batch's company. Free of any model.

    plan = plan_batches(lengths, batch_size=16, token_budget=2048, seed=0)
    plan[i] is effective batch i; plan[i][j] its micro-batch j; plan[i][j][k] an index into the pairs
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qspin.fitting.at_once import spread
from qspin.layers.attention import Lengths, Packed, group_positions
from qspin.records import Pair

MicroBatch = list[int]
Plan = list[list[MicroBatch]]


@dataclass(frozen=True, slots=True)
class Row:
    """One packed micro-batch of B pairs: T tokens computed, C completion tokens predicted."""

    input_ids: Tensor  # (T,) on the CPU
    position_ids: Tensor  # (T,)
    layout: Packed
    predictors: Tensor  # (C,) places in the row whose hidden state predicts a completion token
    targets: Tensor  # (C,) those tokens
    lengths: Tensor  # (2·B,) tokens of each completion in turn, a pair's real one before its generated one
    pairs: int  # B


def plan_batches(
    lengths: Sequence[Lengths], *, batch_size: int, token_budget: int, seed: int, workers: int = 1
) -> Plan:
    """Shuffle the pairs, cut the order into effective batches, and pack each under the token budget.

    A pair longer than the budget gets a micro-batch of its own. The last effective batch may be smaller. Each effective
    batch is cut into as many micro-batches as there are workers, or twice as many and so on, where it has the pairs.
    """
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return [spread(batch, lambda index: lengths[index].total, token_budget, workers) for batch in batches]


def common_prefix(prompts: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all prompts begin with (a system message, most often), the last of each left out."""
    first, last = min(prompts), max(prompts)  # all others stand between these two
    most = min(len(prompt) for prompt in prompts) - 1
    return next((i for i in range(most) if first[i] != last[i]), most)


def lengths_of(pair: Pair, prefix: int = 0) -> Lengths:
    """Tokens of a pair's parts; those that all prompts begin with are not counted."""
    return Lengths(len(pair.prompt_ids) - prefix, len(pair.real_ids), len(pair.generated_ids))


def pack_row(pairs: Sequence[Pair], device: torch.device, prefix: int = 0) -> Row:
    """The tensors of one micro-batch, whose prompts all begin with the same `prefix` tokens.

    The last prompt token predicts the first token of both completions, so it stands among the predictors twice.
    """
    groups = [lengths_of(pair, prefix) for pair in pairs]
    input_ids = list(pairs[0].prompt_ids[:prefix])
    predictors: list[int] = []
    targets: list[int] = []
    for pair, group in zip(pairs, groups, strict=True):
        last_prompt = len(input_ids) + group.prompt - 1
        input_ids += pair.prompt_ids[prefix:]
        for completion in (pair.real_ids, pair.generated_ids):
            if not completion:
                continue
            start = len(input_ids)
            input_ids += completion
            predictors += [last_prompt, *range(start, start + len(completion) - 1)]
            targets += completion
    return Row(
        input_ids=torch.tensor(input_ids),
        position_ids=torch.cat([torch.arange(prefix), *(group_positions(group) + prefix for group in groups)]).to(
            device
        ),
        layout=Packed(groups, device, prefix),
        predictors=torch.tensor(predictors, device=device),
        targets=torch.tensor(targets, device=device),
        lengths=torch.tensor(
            [len(own) for pair in pairs for own in (pair.real_ids, pair.generated_ids)], device=device
        ),
        pairs=len(groups),
    )
