"""How much is computed at once, from the memory that is free: tokens in training, rows in generation.

Neither changes a result beyond rounding (architecture.md, invariants 7 and 8), so neither needs to be known by hand.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from qspin.errors import QspinError
from qspin.memory import OutOfMemory, free_bytes, peak, refusals_told
from qspin.model import SlotModel
from qspin.packing import Plan, lengths_of, pack_row
from qspin.records import Pair
from qspin.scoring import pair_logps

# more than this makes nothing faster (docs/performance.md for the CPU; the GPU's are estimates)
MOST_TOKENS = {"cpu": 4096, "cuda": 16384}
MOST_ROWS = {"cpu": 128, "cuda": 256}
SHARE = 0.8  # of the free memory; the rest is for the optimiser's state, and for others
FIRST_PROBE = 8  # the first probe takes this part of the most


def token_budget(model: SlotModel, pairs: Sequence[Pair], plan: Callable[[int], Plan], prefix: int) -> int:
    """The largest budget whose longest planned micro-batch fits into memory, forward and backward.

    A small micro-batch is tried first and tells how much a token takes. If what that promises for the largest budget
    is less than half of the free memory, that is that; else the longest micro-batch is tried, and halved until it
    fits.

    Args:
        plan: budget → plan.

    Raises:
        QspinError: not even the longest pair fits.
    """
    most = MOST_TOKENS[model.device.type]
    free = SHARE * free_bytes(model.device)
    small = _longest(pairs, plan(most // FIRST_PROBE), prefix)
    try:
        a_token = _need(model, small, prefix) / _tokens(small, prefix)
    except OutOfMemory:
        raise _too_long(max(small, key=lambda pair: lengths_of(pair).total)) from None
    budget = most
    while budget > most // FIRST_PROBE and a_token * budget > free:
        budget //= 2
    if a_token * max(budget, _tokens(_longest(pairs, plan(budget), prefix), prefix)) < free / 2:
        return budget
    while True:
        longest = _longest(pairs, plan(budget), prefix)
        if _fits(model, longest, prefix, free):
            return budget
        if len(longest) == 1:
            raise _too_long(longest[0])
        budget //= 2


def smaller(pairs: Sequence[Pair], plan: Plan, prefix: int) -> int:
    """A budget that cuts the longest micro-batch of a plan in two, after it didn't fit.

    Raises:
        QspinError: it is one pair.
    """
    longest = _longest(pairs, plan, prefix)
    if len(longest) == 1:
        raise _too_long(longest[0])
    return _tokens(longest, prefix) // 2


def _too_long(pair: Pair) -> QspinError:
    return QspinError(
        f"{pair.record_id}: its {lengths_of(pair).total} tokens alone are more than memory holds; set "
        "train.gradient_checkpointing=true, or lower data.max_completion_tokens and generation.max_new_tokens"
    )


def rows_at_once(model: SlotModel, places: int) -> int:
    """How many completions to decode side by side, each of up to so many places, prompt included."""
    free = free_bytes(model.device) - model.unpacked_bytes
    fit = int(SHARE * free / 2 / model.decoding_bytes(places))
    return max(1, min(MOST_ROWS[model.device.type], fit))


def _longest(pairs: Sequence[Pair], plan: Plan, prefix: int) -> list[Pair]:
    micro_batches = ([pairs[index] for index in micro_batch] for micro_batch in itertools.chain(*plan))
    return max(micro_batches, key=lambda members: _tokens(members, prefix))


def _tokens(pairs: Sequence[Pair], prefix: int) -> int:
    return prefix + sum(lengths_of(pair, prefix).total for pair in pairs)


def _fits(model: SlotModel, pairs: Sequence[Pair], prefix: int, free: float) -> bool:
    try:
        return _need(model, pairs, prefix) <= free
    except OutOfMemory:
        return False


def _need(model: SlotModel, pairs: Sequence[Pair], prefix: int) -> int:
    """Bytes that a forward and backward pass of a micro-batch takes at most."""
    with peak(model.device) as measured, refusals_told():
        real, generated = pair_logps(model, pack_row(pairs, model.device, prefix))
        (real - generated).sum().backward()  # type: ignore[no-untyped-call]
    for parameter in model.parameters.values():
        parameter.grad = None
    return measured.above
