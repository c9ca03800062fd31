"""How many tokens training computes at once, and how many layers it recomputes for them: of what is predicted to fit,
what is predicted to take the least time.

    found = choose(footprint, config, budgets(config, "cuda", longest), fullest, micro_batches, takes, room, launch)

`budget.py` asks for a model that is loaded, `plan.py` for one that is not here. Free of torch.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

from qspin.config import Auto, TrainConfig
from qspin.fitting.footprint import MOST_TOKENS, Batch, Device, Footprint
from qspin.fitting.work import work_with_launches

FINER = 0.75  # of a budget of tokens is the next one to choose from

T = TypeVar("T", int, tuple[int, int, int])


class Budget(NamedTuple):
    """How much training holds at once."""

    tokens: int  # of a micro-batch
    recomputed: int  # layers, the first ones, of which the input alone is kept for the backward pass


def recomputable(wanted: bool | Auto, layers: int) -> range:
    """How many layers may be recomputed by `train.gradient_checkpointing`."""
    return range(layers + 1) if wanted == "auto" else range(layers, layers + 1) if wanted else range(1)


def budgets(config: TrainConfig, device: Device, longest: int) -> list[int]:
    """Tokens to choose from, the most first, down to where the longest pair, of so many, goes alone."""
    asked = config.tokens_per_micro_batch
    if isinstance(asked, int):
        return [asked]
    found = [MOST_TOKENS[device]]
    while found[-1] > longest:
        found.append(int(FINER * found[-1]))
    return found


def choose(
    footprint: Footprint,
    config: TrainConfig,
    tokens: Sequence[int],
    fullest: Callable[[int], Batch],
    micro_batches: Callable[[int], Sequence[Batch]],
    takes: Callable[[Footprint, Batch], float],
    room: float,
    launch: float,
) -> Budget:
    """The quickest of some budgets, each with the fewest layers recomputed with which it fits; where none does, the
    last of them with the most.

    Args:
        tokens: budgets, the one to take of equal ones first.
        fullest: budget → the micro-batch that takes the most memory.
        micro_batches: budget → all that there would be, or some that stand for them.
        takes: bytes, which must not be more than `room`.
        launch: work that the device could do while a layer's pass is launched, in floating-point operations.
    """
    allowed = recomputable(config.gradient_checkpointing, footprint.shape.layers)
    best, least = Budget(tokens[-1], allowed[-1]), math.inf
    for budget in tokens:
        batch = fullest(budget)
        for recomputed in allowed:
            with_it = replace(footprint, recomputed=recomputed)
            if takes(with_it, batch) <= room:
                batches = micro_batches(budget)
                work = sum(work_with_launches(with_it, batch, launch, training=True) for batch in batches)
                if work < least:
                    best, least = Budget(budget, recomputed), work
                break
    return best


def spread(members: Sequence[T], size: Callable[[T], int], room: int, multiple: int = 1) -> list[list[T]]:
    """As many bins as first fit takes, or the next multiple of a number, filled evenly.

    Each member, longest first, goes to the emptiest (Graham, SIAM J. Appl. Math. 17, 1969); where that overfills one,
    all are as first fit has them. What is too large goes alone.
    """
    fitted = first_fit(members, size, room)
    bins: list[list[T]] = [[] for _ in range(min(-(-len(fitted) // multiple) * multiple, len(members)))]
    emptiest = [(0, place) for place in range(len(bins))]  # a heap: what is in a bin, and which it is
    for member in sorted(members, key=lambda member: (-size(member), member)):
        held, place = emptiest[0]
        bins[place].append(member)
        heapq.heapreplace(emptiest, (held + size(member), place))
    within = all(held <= room or len(bins[place]) == 1 for held, place in emptiest)
    return bins if within else fitted


def first_fit(members: Sequence[T], size: Callable[[T], int], room: int) -> list[list[T]]:
    """First fit, longest first: within 11/9 of the fewest bins that would do. What is too large goes alone."""
    bins: list[list[T]] = []
    free: list[int] = []
    for member in sorted(members, key=lambda member: (-size(member), member)):
        need = size(member)
        place = next((i for i, left in enumerate(free) if left >= need), None)
        if place is None:
            bins.append([member])
            free.append(room - need)
        else:
            bins[place].append(member)
            free[place] -= need
    return bins
