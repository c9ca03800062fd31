"""A piece of work is dealt evenly, and dealing changes no effective batch."""

from __future__ import annotations

import pytest
import torch

from qspin.layers.attention import Lengths
from qspin.packing import plan_batches
from qspin.processes.dealing import deal
from qspin.processes.workers import _sum_gradients


def test_the_largest_goes_to_whoever_has_least() -> None:
    assert deal([5, 9, 4, 4, 2], 2) == [[1, 3], [0, 2, 4]]
    assert deal([3, 3], 3) == [[0], [1], []]
    assert deal([1, 3, 2], 1) == [[0, 1, 2]]


def test_a_batch_is_cut_for_all_workers_and_stays_the_same_batch() -> None:
    lengths = [Lengths(10, 10 + index % 7, 10) for index in range(32)]

    def plan(workers: int) -> list[list[list[int]]]:
        return plan_batches(lengths, batch_size=16, token_budget=10_000, seed=0, workers=workers)

    assert [len(batch) for batch in plan(1)] == [1, 1]
    assert [len(batch) for batch in plan(4)] == [4, 4]
    for cut, whole in zip(plan(4), plan(1), strict=True):
        assert sorted(index for micro_batch in cut for index in micro_batch) == sorted(whole[0])
        tokens = [sum(lengths[index].total for index in micro_batch) for micro_batch in cut]
        shares = [sum(tokens[place] for place in places) for places in deal(tokens, 4)]
        assert max(shares) < 1.1 * sum(shares) / 4


@pytest.mark.parametrize("theirs", [0.0, 2.0])
def test_a_gradient_that_a_helper_alone_has_is_summed_too(theirs: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert that tokens of its share alone were sent to; one that none were sent to has none anywhere."""
    seen, unseen = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(2))
    seen.grad = torch.ones(3)

    def reduce(flat: torch.Tensor, _to: int) -> None:
        flat[3:] += theirs

    monkeypatch.setattr("torch.distributed.reduce", reduce)
    _sum_gradients([seen, unseen])
    assert seen.grad.tolist() == [1.0] * 3
    assert (unseen.grad is None) if not theirs else unseen.grad is not None and unseen.grad.tolist() == [2.0] * 2
