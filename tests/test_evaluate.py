"""The figures of the table, on made evaluations whose answers are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qspin.evaluate import Evaluation, nll_change

PLAYER = Evaluation(
    real_nll=[10.0, 30.0, 20.0],
    real_tokens=[5, 10, 5],
    generated_tokens=[4, 8, 6],
    ended=[True, False, True],
    completions=["One.\nTry it: two.", "One. Try it: two.", "  One.\nTry it: two.\nThree.\n"],
)


def test_shares_and_means() -> None:
    assert PLAYER.nll == 3.0  # 60 nats over 20 tokens: rows weigh by their tokens
    assert PLAYER.ended_share == pytest.approx(2 / 3)
    assert PLAYER.style_share(r"[^\n]+\nTry it: [^\n]+") == pytest.approx(1 / 3)
    assert PLAYER.style_share(r"[^\n]+\nTry it: [\s\S]+") == pytest.approx(2 / 3)


def test_it_survives_its_file() -> None:
    assert Evaluation(**PLAYER.to_json()) == PLAYER


def test_no_change_is_zero_and_an_even_change_is_certain() -> None:
    assert nll_change(PLAYER, PLAYER) == (0.0, 0.0, 0.0)
    better = replace(PLAYER, real_nll=[5.0, 20.0, 15.0])  # one nat less a token, in every row
    assert nll_change(PLAYER, better) == pytest.approx((-1.0, -1.0, -1.0))


def test_the_interval_covers_as_often_as_it_says() -> None:
    """Of 1,000 experiments whose true change is −0.1, about 95% have it inside the interval, with 64 rows each."""
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(1000):
        change = generator.normal(-0.1, 0.3, size=64)
        before = Evaluation([50.0] * 64, [10] * 64, [1] * 64, [True] * 64, [""] * 64)
        after = replace(before, real_nll=[50.0 + 10 * float(c) for c in change])
        middle, low, high = nll_change(before, after)
        assert low < middle < high
        covered += low <= -0.1 <= high
    assert 925 <= covered <= 970
