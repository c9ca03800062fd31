"""The four SPIN losses: pure functions of log-probs.

The paper (arXiv 2401.01335, assumption 5.1) asks of ℓ to be convex and decreasing, and names these four.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

LossName = Literal["logistic", "hinge", "exponential", "correlation"]


@dataclass(frozen=True, slots=True)
class SpinLoss:
    """The loss of each pair, and what it was made of. All (B,), in nats times β but for `losses`."""

    losses: Tensor
    margins: Tensor  # real_rewards − generated_rewards
    real_rewards: Tensor
    generated_rewards: Tensor


def spin_loss(
    policy_real_logps: Tensor,  # (B,), summed over completion tokens
    policy_generated_logps: Tensor,  # (B,)
    opponent_real_logps: Tensor,  # (B,)
    opponent_generated_logps: Tensor,  # (B,)
    *,
    beta: float,
    loss: LossName = "logistic",
) -> SpinLoss:
    """Equation 4.7: ℓ(β·[(log π(y|x) − log π_opp(y|x)) − (log π(y′|x) − log π_opp(y′|x))]).

    Args:
        beta: λ in the SPIN paper.
        loss: ℓ; see `link`.
    """
    real_rewards = beta * (policy_real_logps - opponent_real_logps)
    generated_rewards = beta * (policy_generated_logps - opponent_generated_logps)
    margins = real_rewards - generated_rewards
    return SpinLoss(link(margins, loss), margins, real_rewards, generated_rewards)


def real_nll(policy_real_logps: Tensor, real_tokens: Tensor) -> Tensor:
    """(B,), (B,) → (B,): −log π(y|x) in nats a token, the term that `train.sft_weight` adds to ℓ.

    A margin also grows while both completions become less likely, the real one a little more slowly. This term pulls
    the real one up (Pang et al. 2024, arXiv 2404.19733, equation 1).
    """
    return -policy_real_logps / real_tokens


def link(margins: Tensor, loss: LossName) -> Tensor:
    """ℓ(t), elementwise. `correlation`, a linear loss, is unbounded below (section 4.1)."""
    match loss:
        case "logistic":
            return -functional.logsigmoid(margins)  # log(1 + exp(−t)) without overflow
        case "hinge":
            return torch.clamp(1 - margins, min=0)
        case "exponential":
            return torch.exp(-margins)
        case "correlation":
            return 1 - margins
