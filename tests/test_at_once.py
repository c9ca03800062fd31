"""What is chosen of what fits: tokens at once, and layers that are recomputed."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from qspin.config import TrainConfig, load_config
from qspin.fitting.at_once import Budget, budgets, choose, first_fit, recomputable, spread
from qspin.fitting.footprint import Batch, Device, Footprint
from qspin.fitting.work import A_PASS, LAUNCH, work_with_launches
from qspin.units import GIB

PAIR = (256, 256, 256)
PAIRS = [PAIR] * 16  # an effective batch
LAYERS = 32


def footprint(device: Device = "cuda") -> Footprint:
    shape = load_config("zephyr-7b-sft").model.architecture
    assert shape is not None
    return Footprint(shape, 16, None, device, 2, recomputed=0)


def micro_batches(tokens: int) -> list[Batch]:
    return [Batch.of(members) for members in spread(PAIRS, sum, tokens)]


def chosen(room: float, device: Device = "cuda", launch: float = 0.0, **settings: Any) -> Budget:
    config = TrainConfig(**settings)
    return choose(
        footprint(device),
        config,
        budgets(config, device, sum(PAIR)),
        lambda tokens: micro_batches(tokens)[0],
        micro_batches,
        Footprint.activations,
        room,
        launch,
    )


def work(budget: Budget) -> float:
    with_it = replace(footprint(), recomputed=budget.recomputed)
    return sum(work_with_launches(with_it, batch, 0.0, training=True) for batch in micro_batches(budget.tokens))


def takes(budget: Budget) -> int:
    return replace(footprint(), recomputed=budget.recomputed).activations(micro_batches(budget.tokens)[0])


ALL = [
    Budget(tokens, recomputed)
    for tokens in budgets(TrainConfig(), "cuda", sum(PAIR))
    for recomputed in recomputable("auto", LAYERS)
]


def test_budgets_go_down_to_where_the_longest_pair_is_alone() -> None:
    assert budgets(TrainConfig(), "cuda", 6000) == [16384, 12288, 9216, 6912, 5184]
    assert budgets(TrainConfig(), "cuda", 6912) == [16384, 12288, 9216, 6912]
    assert budgets(TrainConfig(), "cpu", 10**5) == [4096]
    assert budgets(TrainConfig(tokens_per_micro_batch=999), "cuda", 768) == [999]


def test_large_rooms_recompute_nothing_small_ones_all_and_others_some() -> None:
    assert chosen(60 * GIB) == Budget(16384, 0)
    assert chosen(GIB // 2).recomputed >= LAYERS - 1  # the last one is recomputed beside nothing that was kept
    assert 0 < chosen(GIB).recomputed < LAYERS - 1
    nowhere = chosen(1)
    assert nowhere == Budget(691, LAYERS)
    assert takes(nowhere) > 1, "and the caller sees that it does not fit"


@pytest.mark.parametrize("room", [GIB // 2, GIB, 2 * GIB, 4 * GIB, 8 * GIB, 16 * GIB, 32 * GIB])
def test_nothing_else_that_fits_is_less_work(room: int) -> None:
    found = chosen(room)
    assert takes(found) <= room
    assert work(found) == min(work(budget) for budget in ALL if takes(budget) <= room)


def test_more_room_is_never_more_work() -> None:
    found = [work(chosen(room)) for room in range(GIB // 2, 40 * GIB, GIB // 4)]
    assert all(more <= less for less, more in itertools.pairwise(found))
    assert len(set(found)) > 10


def test_with_given_tokens_more_room_recomputes_less() -> None:
    found = [chosen(room, tokens_per_micro_batch=8192).recomputed for room in range(GIB, 40 * GIB, GIB // 4)]
    assert found == sorted(found, reverse=True)
    assert (found[0], found[-1], len(set(found)) > 10) == (LAYERS, 0, True)


def test_a_setting_of_all_or_none_is_kept_to() -> None:
    for room in (GIB, 4 * GIB, 16 * GIB):
        assert chosen(room, gradient_checkpointing=True).recomputed == LAYERS
        assert chosen(room, gradient_checkpointing=False).recomputed == 0
        assert chosen(room, tokens_per_micro_batch=2048, gradient_checkpointing=False) == Budget(2048, 0)


def test_what_a_pass_takes_is_weighed_against_recomputing(monkeypatch: pytest.MonkeyPatch) -> None:
    room = 8 * GIB
    monkeypatch.setitem(A_PASS, "cuda", 0)
    assert chosen(room).recomputed == 0, "micro-batches cost nothing"
    monkeypatch.setitem(A_PASS, "cuda", 10**6)
    assert chosen(room).tokens == 16384, "each costs more than all layers"
    assert 0 < chosen(room).recomputed < LAYERS


def test_a_gpu_does_not_wait_for_launches_where_room_allows_it_more_at_once() -> None:
    slow, fast = (LAUNCH * rate for rate in (30e12, 919e12))  # an RTX 4060's and an H100's
    assert chosen(2 * GIB, launch=slow) == chosen(2 * GIB)
    assert chosen(8 * GIB) == Budget(2916, 0)
    quick = chosen(8 * GIB, launch=fast)
    assert quick.tokens > 2916
    assert 0 < quick.recomputed < LAYERS
    assert chosen(40 * GIB, launch=fast) == Budget(16384, 0)


def test_three_thirds_are_chosen_where_two_halves_want_layers_recomputed() -> None:
    """16 pairs of 768 tokens on a fast GPU: 6, 5 and 5 of them, which is 13% less work than 10 and 6 with 14 layers."""
    assert [len(members) for members in spread(PAIRS, sum, 5184)] == [6, 5, 5]
    assert [len(members) for members in first_fit(PAIRS, sum, 9216)] == [12, 4]
    assert [len(members) for members in spread(PAIRS, sum, 9216)] == [8, 8]
    assert chosen(14 * GIB, launch=LAUNCH * 919e12) == Budget(5184, 0)
    some, halves = replace(footprint(), recomputed=14), (Batch.of(PAIRS[:10]), Batch.of(PAIRS[:6]))
    less = work(Budget(5184, 0)) / sum(work_with_launches(some, batch, 0.0, training=True) for batch in halves)
    assert less == pytest.approx(0.87, abs=0.005)


def test_what_is_spread_is_in_as_many_bins() -> None:
    sizes = [7, 7, 6, 5, 5, 4, 3, 2, 2, 1, 30]
    for room in range(1, 50):
        bins, fitted = spread(sizes, lambda size: size, room), first_fit(sizes, lambda size: size, room)
        assert sorted(size for members in bins for size in members) == sorted(sizes)
        assert len(bins) == len(fitted)
        assert all(sum(members) <= room or len(members) == 1 for members in bins)


def test_first_fit_leaves_what_is_too_large_alone() -> None:
    assert first_fit([5, 1, 9, 4], lambda size: size, 6) == [[9], [5, 1], [4]]
    assert first_fit([(1, 2, 3), (0, 0, 1)], sum, 7) == [[(1, 2, 3), (0, 0, 1)]]
