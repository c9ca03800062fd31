"""The four losses against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch

from qspin.loss import LossName, link, real_nll, spin_loss

LOSSES: tuple[LossName, ...] = get_args(LossName)

# Three pairs at β = 0.1:
#                     pair 0                 pair 1                pair 2
#   real        0.1·(−10 + 12) =  0.2  0.1·(−5 + 20) = 1.5  0.1·(−30 + 26) = −0.4
#   generated   0.1·(−20 + 15) = −0.5  0.1·(−9 + 4) = −0.5  0.1·( −7 + 13) =  0.6
#   margin                        0.7                   2.0                  −1.0
POLICY_REAL = [-10.0, -5.0, -30.0]
POLICY_GENERATED = [-20.0, -9.0, -7.0]
OPPONENT_REAL = [-12.0, -20.0, -26.0]
OPPONENT_GENERATED = [-15.0, -4.0, -13.0]
MARGINS = [0.7, 2.0, -1.0]
EXPECTED: dict[LossName, list[float]] = {
    # ln(1 + e^−0.7) = ln 1.4965853038;  ln(1 + e^−2) = ln 1.1353352832;  ln(1 + e) = ln 3.7182818285
    "logistic": [0.4031860488854579, 0.1269280110429726, 1.3132616875182228],
    # 1 − 0.7;  1 − 2 < 0;  1 + 1
    "hinge": [0.3, 0.0, 2.0],
    # e^−0.7;  e^−2;  e^1
    "exponential": [0.4965853037914095, 0.1353352832366127, 2.718281828459045],
    # 1 − 0.7;  1 − 2;  1 + 1
    "correlation": [0.3, -1.0, 2.0],
}


def vector(values: list[float], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_and_their_parts_by_hand(loss: LossName) -> None:
    result = spin_loss(
        vector(POLICY_REAL),
        vector(POLICY_GENERATED),
        vector(OPPONENT_REAL),
        vector(OPPONENT_GENERATED),
        beta=0.1,
        loss=loss,
    )
    torch.testing.assert_close(result.real_rewards, vector([0.2, 1.5, -0.4]), rtol=0, atol=1e-12)
    torch.testing.assert_close(result.generated_rewards, vector([-0.5, -0.5, 0.6]), rtol=0, atol=1e-12)
    torch.testing.assert_close(result.margins, vector(MARGINS), rtol=0, atol=1e-12)
    torch.testing.assert_close(result.losses, vector(EXPECTED[loss]), rtol=0, atol=1e-12)


def test_the_likelihood_beside_the_loss_by_hand() -> None:
    # 10 / 4;  5 / 5;  30 / 12
    result = real_nll(vector(POLICY_REAL), vector([4, 5, 12]))
    torch.testing.assert_close(result, vector([2.5, 1.0, 2.5]), rtol=0, atol=0)


def test_logistic_is_the_default() -> None:
    result = spin_loss(
        vector(POLICY_REAL), vector(POLICY_GENERATED), vector(OPPONENT_REAL), vector(OPPONENT_GENERATED), beta=0.1
    )
    torch.testing.assert_close(result.losses, vector(EXPECTED["logistic"]), rtol=0, atol=1e-12)


def test_margin_is_the_difference_of_the_rewards_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    policy_real, policy_generated, opponent_real, opponent_generated = -100 * torch.rand(4, 50, generator=generator)
    result = spin_loss(policy_real, policy_generated, opponent_real, opponent_generated, beta=0.3)
    assert torch.equal(result.margins, result.real_rewards - result.generated_rewards)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients_are_those_of_finite_differences(loss: LossName) -> None:
    # no margin is 1, where the hinge has no derivative
    policy = [vector(values).requires_grad_() for values in (POLICY_REAL, POLICY_GENERATED)]

    def losses(real: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
        return spin_loss(real, generated, vector(OPPONENT_REAL), vector(OPPONENT_GENERATED), beta=0.1, loss=loss).losses

    assert torch.autograd.gradcheck(losses, policy, eps=1e-6, atol=1e-8)


def test_a_step_downhill_raises_real_and_lowers_generated() -> None:
    # the sign: with it turned around, the policy would learn to imitate its opponent
    real, generated = vector([-10.0]).requires_grad_(), vector([-10.0]).requires_grad_()
    spin_loss(real, generated, vector([-10.0]), vector([-10.0]), beta=0.1).losses.sum().backward()
    assert real.grad is not None
    assert generated.grad is not None
    # ℓ'(0) = −½ of the logistic loss, times β
    torch.testing.assert_close(real.grad, vector([-0.05]))
    torch.testing.assert_close(generated.grad, vector([0.05]))


@pytest.mark.parametrize(
    ("loss", "far", "slopes"),
    [
        ("logistic", [1000.0, 0.0], [-1.0, 0.0]),
        ("hinge", [1001.0, 0.0], [-1.0, 0.0]),
        ("correlation", [1001.0, -999.0], [-1.0, -1.0]),
    ],
)
def test_no_overflow_far_from_zero(loss: LossName, far: list[float], slopes: list[float]) -> None:
    # the naive log(1 + exp(1000)) is inf in fp32, and its gradient NaN
    margins = torch.tensor([-1000.0, 1000.0], requires_grad=True)
    losses = link(margins, loss)
    losses.sum().backward()
    assert losses.tolist() == far
    assert margins.grad is not None
    assert margins.grad.tolist() == slopes


def test_exponential_vanishes_on_the_right_and_is_infinite_not_nan_on_the_left() -> None:
    # e^1000 is no number that a float can hold: training stops on it, and says so
    assert link(torch.tensor([1000.0, -1000.0]), "exponential").tolist() == [0.0, math.inf]


@pytest.mark.parametrize(
    ("loss", "at_zero"), [("logistic", math.log(2)), ("hinge", 1.0), ("exponential", 1.0), ("correlation", 1.0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_at_margin_zero(loss: LossName, at_zero: float, dtype: torch.dtype) -> None:
    logps = vector([-3.25, -1234.5], dtype)
    result = spin_loss(logps, logps * 2, logps, logps * 2, beta=0.1, loss=loss)
    assert result.margins.tolist() == [0.0, 0.0]
    # exact: the nearest number of the type to ℓ(0)
    assert torch.equal(result.losses, vector([at_zero, at_zero], dtype))
