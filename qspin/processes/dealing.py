"""One piece of work among the processes of a launch: requests in groups, micro-batches by their tokens.

With one process everything is its own, in the order of the plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from qspin.generation import Completion, Request
from qspin.packing import MicroBatch, lengths_of
from qspin.processes.workers import Crew
from qspin.records import Pair, Score

T = TypeVar("T")


def complete_together(
    crew: Crew,
    groups: Sequence[Sequence[Request]],
    settings: dict[str, Any],
    own: Callable[[Sequence[Request]], list[Completion]],
) -> list[list[Completion]]:
    """The completions of each group; the first group is this process's own, and each process has one at most.

    Args:
        settings: those of `generate`.
    """
    pieces = [
        {"requests": [[request.prompt_ids, request.key] for request in group], "settings": settings}
        for group in [*groups[1:], *[()] * (crew.count - len(groups))]
    ]
    completions, others = crew.share("generate", pieces, lambda: own(groups[0]))
    told = [[Completion(tuple(ids), ended) for ids, ended in group] for group in others]
    return [completions, *told[: len(groups) - 1]]


def deal(sizes: Sequence[int], hands: int) -> list[list[int]]:
    """Which pieces each hand is dealt, in their order: the largest that is left goes to whoever has least."""
    dealt: list[list[int]] = [[] for _ in range(hands)]
    has = [0] * hands
    for piece in sorted(range(len(sizes)), key=lambda piece: (-sizes[piece], piece)):
        hand = has.index(min(has))
        dealt[hand].append(piece)
        has[hand] += sizes[piece]
    return [sorted(pieces) for pieces in dealt]


def score_together(
    crew: Crew,
    pairs: Sequence[Pair],
    micro_batches: Sequence[MicroBatch],
    prefix: int,
    own: Callable[[Sequence[MicroBatch]], list[list[Score]]],
) -> list[list[Score]]:
    """The scores of each micro-batch under whoever is in the slot, as `score_pairs` gives them.

    Args:
        own: this process's micro-batches → the scores of each.
    """
    settings = {"prefix": prefix}
    return work_together(
        crew, "score", pairs, micro_batches, settings, own, lambda part: [Score(**score) for score in part]
    )


def work_together(
    crew: Crew,
    job: str,
    pairs: Sequence[Pair],
    micro_batches: Sequence[MicroBatch],
    settings: dict[str, Any],
    own: Callable[[Sequence[MicroBatch]], list[T]],
    told: Callable[[Any], T],
    *,
    gradients: bool = False,
) -> list[T]:
    """What came of each micro-batch. Scoring and training of a batch are dealt alike: who scores a pair trains on it.

    Args:
        job, gradients: as for Crew.share.
        settings: what a helper needs to know beside its pairs.
        own: this process's micro-batches → what came of each.
        told: JSON that came from a helper for one of its own → the same.
    """
    dealt = deal([sum(lengths_of(pairs[i]).total for i in micro_batch) for micro_batch in micro_batches], crew.count)
    hands = [[micro_batches[place] for place in places] for places in dealt]
    pieces = [{**settings, "micro_batches": [[pairs[i].to_json() for i in mb] for mb in hand]} for hand in hands[1:]]
    made, others = crew.share(job, pieces, lambda: own(hands[0]), gradients=gradients)
    results = dict(zip(dealt[0], made, strict=True))
    for places, parts in zip(dealt[1:], others, strict=True):
        results |= zip(places, map(told, parts), strict=True)
    return [results[place] for place in range(len(micro_batches))]
