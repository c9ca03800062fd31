"""Floating-point operations, and bytes that decoding moves, by hand."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import TINY

from qspin.fitting.footprint import Batch, Device, Footprint
from qspin.fitting.work import forward_work, step_bytes, training_work, work_with_launches

BATCH = Batch.of([(10, 20, 30)])  # T 60, spans of 30·30 and 30·40


def tiny(*, device: Device = "cpu", recomputed: int = 0, **shape: Any) -> Footprint:
    return Footprint(TINY.model_copy(update=shape), 4, None, device, 4, recomputed)


def test_bytes_of_a_decoding_step_by_hand() -> None:
    head, row = 512 * 64 * 4, 2 * 3 * 32 * 100 * 4 + 24 * 512
    base, packed = 110_592 * 4, 110_592 * 9 // 16
    assert step_bytes(tiny(), 70, 100, unpacked=True) == base + head + 70 * row
    assert step_bytes(tiny(), 7, 100, unpacked=False) == 2 * base + packed + head + 7 * row
    assert step_bytes(tiny(device="cuda"), 129, 100, unpacked=False) == 2 * base + packed + head + 129 * row
    assert step_bytes(tiny(device="cuda"), 128, 100, unpacked=False) == packed + head + 128 * row


def test_work_by_hand() -> None:
    base, adapter, attention, head = 2 * 110_592 * 60, 2 * 12_288 * 60, 4 * 3 * 64 * 2100, 2 * 512 * 64 * 50
    assert forward_work(tiny(), BATCH) == base + adapter + attention + head
    training = 2 * base + 3 * (adapter + attention) + 2 * head
    assert training_work(tiny(), BATCH) == training
    last = 2 * 64 * 128 * 60  # of a layer, from the MLP's width to the model's
    again = (base + adapter + attention) // 3
    assert training_work(tiny(recomputed=3), BATCH) == training + 3 * (again - last)
    assert training_work(tiny(recomputed=1), BATCH) == training + again - last
    with_norm = training_work(tiny(family="gemma2", recomputed=3), BATCH)
    assert with_norm - training_work(tiny(family="gemma2"), BATCH) == 3 * again


def test_work_counts_a_third_pass_by_the_layers_that_make_it() -> None:
    """Forward and backward dequantise each weight once, and so does what is recomputed; a pass alone does so once."""
    for recomputed, passes in ((0, 2), (1, 7 / 3), (3, 3)):
        with_it = tiny(device="cuda", recomputed=recomputed)
        a_pass = 2 * with_it.linear_weights * 100
        trained = work_with_launches(with_it, BATCH, 0.0, training=True)
        assert trained == pytest.approx(training_work(with_it, BATCH) + passes * a_pass, rel=1e-12)
        scored = work_with_launches(with_it, BATCH, 0.0, training=False)
        assert scored == pytest.approx(forward_work(with_it, BATCH) + a_pass, rel=1e-12)
    assert work_with_launches(tiny(), BATCH, 1e16, training=True) == 2 * 3 * 1e16
    assert work_with_launches(tiny(), BATCH, 1e16, training=False) == 3 * 1e16
