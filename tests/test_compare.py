"""When an exported model is another than the trained one."""

from __future__ import annotations

import pytest

from qspin.exports.compare import drifted


def test_a_run_in_fp32_rounds_nothing_away() -> None:
    check = {"nll_difference": 0.1, "top1_agreement": 0.9, "onto": "dequantised", "dtype": "float32"}
    assert not drifted(check | {"trained_in": "bfloat16"})
    assert drifted(check | {"trained_in": "float32"})


@pytest.mark.parametrize(
    ("difference", "agreement", "expected"),
    [(0.04, 0.91, False), (0.06, 1.0, True), (-0.06, 1.0, True), (0.0, 0.8, True)],
)
def test_drift_is_judged_by_both_figures(difference: float, agreement: float, expected: bool) -> None:
    assert drifted({"nll_difference": difference, "top1_agreement": agreement}) is expected
