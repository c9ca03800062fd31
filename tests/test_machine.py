"""What a machine can do: published figures of cards, and this one measured."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qspin import machine
from qspin.config import ModelConfig, load_config
from qspin.errors import QspinError
from qspin.fitting.memory import free_bytes
from qspin.four_bits import compute_dtype
from qspin.machine import CARDS, USABLE, card, copy_rate, nominal_rate, product_rate, this_machine
from qspin.units import GIB

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("gigabytes", "name"), [(6, "RTX 4060"), (8, "RTX 4060"), (15.9, "RTX 3060"), (80, "RTX 3090")]
)
def test_a_card_is_as_fast_as_the_largest_that_has_no_more(gigabytes: float, name: str) -> None:
    machine = card(gigabytes, ModelConfig())
    assert (machine.name, machine.device, machine.measured) == (name, "cuda", False)
    assert machine.memory == int(USABLE * gigabytes * GIB)


def test_figures_of_cards_are_of_the_right_size() -> None:
    for _, bandwidth, flops in CARDS.values():
        assert 2e11 < bandwidth < 1e12  # bytes a second
        assert 2e13 < flops < 1e14


@pytest.mark.parametrize(
    ("capability", "multiprocessors", "published"),
    [((8, 6), 28, CARDS[12][2]), ((8, 6), 82, CARDS[24][2]), ((8, 9), 34, CARDS[16][2]), ((9, 0), 132, 989e12)],
    ids=["RTX 3060", "RTX 3090", "RTX 4060 Ti", "H100"],
)
def test_a_nominal_rate_is_near_the_published_one(
    capability: tuple[int, int], multiprocessors: int, published: float
) -> None:
    major, minor = capability
    rate = nominal_rate(SimpleNamespace(major=major, minor=minor, multi_processor_count=multiprocessors))
    assert rate == pytest.approx(published, rel=0.35)


def test_fp32_takes_twice_the_bytes_and_time_on_a_card() -> None:
    half, full = (card(12, load_config(None, {"model.dtype": dtype}).model) for dtype in ("auto", "float32"))
    assert full.itemsize == 2 * half.itemsize
    assert full.flops == half.flops / 2


def test_this_machine_is_what_the_run_would_use() -> None:
    machine = this_machine(ModelConfig())
    assert machine.device == CPU.type
    assert machine.measured
    assert machine.itemsize == compute_dtype(ModelConfig(), CPU).itemsize
    assert 0 < machine.memory - free_bytes(CPU) < 8 * GIB  # with what this process holds already


def test_a_machine_with_too_little_memory_to_be_measured_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a card that a game has filled."""
    monkeypatch.setattr(machine, "copy_rate", lambda _device: float(torch.ones(1 << 60, dtype=torch.uint8).sum()))
    with pytest.raises(QspinError, match=r"^out of memory \(.*\); close other programs: .* --vram$"):
        this_machine(ModelConfig())


def test_rates_are_those_of_a_machine_of_our_time() -> None:
    assert 1e9 < product_rate(CPU, torch.float32) < 1e13
    assert 1e9 < copy_rate(CPU) < 1e12
