"""Plans cover every pair once under the token budget; a packed row is what one would write by hand."""

from __future__ import annotations

import random

import pytest
import torch

from qspin.layers.attention import Lengths
from qspin.packing import Plan, common_prefix, lengths_of, pack_row, plan_batches
from qspin.records import Pair

CPU = torch.device("cpu")


def some_lengths(count: int = 43) -> list[Lengths]:
    """Rows of 3 to 60 tokens: some of them longer than the smaller budgets below."""
    generator = random.Random(0)
    return [Lengths(generator.randint(1, 20), generator.randint(1, 20), generator.randint(1, 20)) for _ in range(count)]


def flat(plan: Plan) -> list[list[int]]:
    """The pairs of each effective batch, in order of their numbers."""
    return [sorted(index for micro_batch in batch for index in micro_batch) for batch in plan]


def pair(name: str, prompt: tuple[int, ...], real: tuple[int, ...], generated: tuple[int, ...]) -> Pair:
    return Pair(name, 0, prompt, real, generated, ended=True)


BUDGETS = (16, 40, 64, 200, 4096)


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_pair_once_in_batches_of_the_effective_size(budget: int) -> None:
    plan = plan_batches(some_lengths(), batch_size=8, token_budget=budget, seed=5)
    assert sorted(index for batch in flat(plan) for index in batch) == list(range(43))
    assert [len(batch) for batch in flat(plan)] == [8, 8, 8, 8, 8, 3]
    assert all(micro_batch for batch in plan for micro_batch in batch)


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_budget_is_kept_but_for_single_longer_pairs(budget: int) -> None:
    lengths = some_lengths()
    plan = plan_batches(lengths, batch_size=8, token_budget=budget, seed=5)
    over = [
        micro_batch
        for batch in plan
        for micro_batch in batch
        if sum(lengths[index].total for index in micro_batch) > budget
    ]
    too_long = [index for index in range(43) if lengths[index].total > budget]
    assert sorted(over) == [[index] for index in too_long]
    assert bool(too_long) == (budget < 60)  # both cases occur


def test_pairs_are_packed_and_not_sent_one_by_one() -> None:
    # as many as first fit takes, by hand: of 20 tokens 8 + 6 + 5 and 3 + 2, of 12 tokens 8 + 3, 6 + 5 and 2
    lengths = [Lengths(n) for n in (2, 8, 5, 6, 3)]
    assert plan_batches(lengths, batch_size=5, token_budget=24, seed=0) == [[[1, 3, 2, 4, 0]]]
    assert plan_batches(lengths, batch_size=5, token_budget=20, seed=0) == [[[1, 4, 0], [3, 2]]]
    assert plan_batches(lengths, batch_size=5, token_budget=12, seed=0) == [[[1], [3, 0], [2, 4]]]


def test_no_micro_batch_is_much_fuller_than_the_others() -> None:
    (batch,) = plan_batches(some_lengths(), batch_size=43, token_budget=200, seed=0)
    sizes = [sum(some_lengths()[index].total for index in micro_batch) for micro_batch in batch]
    assert max(sizes) - min(sizes) <= 15


def test_where_even_ones_would_overflow_they_are_as_first_fit_has_them() -> None:
    lengths = [Lengths(n) for n in (3, 3, 2, 2, 2)]
    assert plan_batches(lengths, batch_size=5, token_budget=6, seed=0) == [[[0, 1], [2, 3, 4]]]
    assert plan_batches([Lengths(9), *lengths], batch_size=6, token_budget=7, seed=0) == [[[0], [1, 3, 5], [2, 4]]]


def test_a_pair_that_just_fits_is_within_the_budget() -> None:
    assert plan_batches([Lengths(4, 3, 3), Lengths(2, 2, 2)], batch_size=2, token_budget=16, seed=0) == [[[0, 1]]]
    assert plan_batches([Lengths(4, 3, 3), Lengths(2, 2, 2)], batch_size=2, token_budget=15, seed=0) == [[[0], [1]]]


def test_the_seed_makes_the_plan() -> None:
    plans = [plan_batches(some_lengths(), batch_size=8, token_budget=64, seed=seed) for seed in (5, 5, 6)]
    assert plans[0] == plans[1]
    assert flat(plans[0]) != flat(plans[2])
    # shuffled: not cut from the file's order
    assert flat(plans[0])[0] != list(range(8))


def test_the_budget_never_changes_who_makes_an_effective_batch() -> None:
    plans = [plan_batches(some_lengths(), batch_size=8, token_budget=budget, seed=5) for budget in BUDGETS]
    assert all(flat(plan) == flat(plans[0]) for plan in plans)
    # negative control: it does change the micro-batches
    assert len({str(plan) for plan in plans}) == len(BUDGETS)


def test_lengths_neither_order_the_effective_batches() -> None:
    # nor may which pairs are long: else short rows would train together
    same = plan_batches([Lengths(1)] * 43, batch_size=8, token_budget=64, seed=5)
    assert flat(same) == flat(plan_batches(some_lengths(), batch_size=8, token_budget=64, seed=5))


def test_no_pairs_no_batches() -> None:
    assert plan_batches([], batch_size=8, token_budget=64, seed=0) == []


def test_a_row_by_hand() -> None:
    row = pack_row([pair("a", (10, 11), (20, 21, 22), (30, 31)), pair("b", (12,), (23,), (32,))], CPU)
    #                                 a: prompt, real, generated; b: prompt, real, generated
    assert row.input_ids.tolist() == [10, 11, 20, 21, 22, 30, 31, 12, 23, 32]
    # both completions go on where their prompt ends
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 2, 3, 0, 1, 1]
    # place 1 holds the last prompt token, which predicts both 20 and 30; the last token of each side predicts nothing
    assert row.predictors.tolist() == [1, 2, 3, 1, 5, 7, 7]
    assert row.targets.tolist() == [20, 21, 22, 30, 31, 23, 32]
    assert row.lengths.tolist() == [3, 2, 1, 1]
    assert row.pairs == 2
    assert row.layout.groups == (Lengths(2, 3, 2), Lengths(1, 1, 1))


def test_an_empty_generated_side_predicts_nothing() -> None:
    row = pack_row([pair("a", (10, 11), (20, 21), ()), pair("b", (12,), (23,), (32,))], CPU)
    assert row.input_ids.tolist() == [10, 11, 20, 21, 12, 23, 32]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 1]
    assert row.predictors.tolist() == [1, 2, 4, 4]
    assert row.targets.tolist() == [20, 21, 23, 32]
    assert row.lengths.tolist() == [2, 0, 1, 1]
    assert row.pairs == 2
    assert row.layout.groups == (Lengths(2, 2, 0), Lengths(1, 1, 1))


def test_an_empty_real_side_predicts_nothing_and_the_generated_one_all_the_same() -> None:
    row = pack_row([pair("a", (10, 11), (), (30, 31)), pair("b", (12,), (23,), (32,))], CPU)
    assert row.input_ids.tolist() == [10, 11, 30, 31, 12, 23, 32]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 1]
    assert row.predictors.tolist() == [1, 2, 4, 4]
    assert row.targets.tolist() == [30, 31, 23, 32]
    assert row.lengths.tolist() == [0, 2, 1, 1]


def test_a_row_with_a_prefix_by_hand() -> None:
    pairs = [pair("a", (8, 9, 10, 11), (20, 21), (30,)), pair("b", (8, 9, 12), (23,), (32, 33))]
    row = pack_row(pairs, CPU, prefix=2)
    # the prefix once; then a: prompt's rest, real, generated; b: the same
    assert row.input_ids.tolist() == [8, 9, 10, 11, 20, 21, 30, 12, 23, 32, 33]
    assert row.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 4, 2, 3, 3, 4]
    assert row.predictors.tolist() == [3, 4, 3, 7, 7, 9]
    assert row.targets.tolist() == [20, 21, 30, 23, 32, 33]
    assert row.lengths.tolist() == [2, 1, 1, 2]
    assert row.pairs == 2
    assert row.layout.prefix == 2
    assert row.layout.groups == (Lengths(2, 2, 1), Lengths(1, 1, 2))


def test_a_row_of_one_pair_with_a_prefix() -> None:
    row = pack_row([pair("a", (8, 9, 10), (20,), (30,))], CPU, prefix=2)
    assert row.input_ids.tolist() == [8, 9, 10, 20, 30]
    assert row.predictors.tolist() == [2, 2]


def test_lengths_of_a_pair() -> None:
    assert lengths_of(pair("a", (1, 2, 3), (4, 5), (6,))) == Lengths(3, 2, 1)
    assert lengths_of(pair("a", (1, 2, 3), (4, 5), (6,)), 2) == Lengths(1, 2, 1)
    assert Lengths(3, 2, 1).total == 6


@pytest.mark.parametrize(
    ("prompts", "length"),
    [
        ([(1, 2, 3, 4), (1, 2, 3, 5), (1, 2, 9, 4)], 2),
        ([(1, 2, 3, 4), (5, 2, 3, 4)], 0),
        ([(1, 2), (1, 2)], 1),  # the last token of a prompt predicts the completion: it stays with its pair
        ([(1, 2), (1, 2, 3)], 1),
        ([(1, 2, 3), (1,)], 0),
        ([(9, 2, 3), (10, 2, 3), (9, 2, 4)], 0),  # as numbers, not as text
        ([(1, 2, 3)], 2),
    ],
)
def test_common_prefix(prompts: list[tuple[int, ...]], length: int) -> None:
    assert common_prefix(prompts) == length
    assert common_prefix(prompts[::-1]) == length
