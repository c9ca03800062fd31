"""How much is computed at once, from the memory that is free: tokens in training, rows in generation.

Neither changes a result beyond rounding (architecture.md, invariants 7 and 8), so neither needs to be known by hand.
What a piece of work takes is predicted by footprint.py, as `qspin plan` does, and then tried.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from qspin.errors import QspinError
from qspin.footprint import MOST_TOKENS, SHARE, Batch
from qspin.memory import OutOfMemory, free_bytes, give_back_freed_memory, peak, refusals_told
from qspin.model import SlotModel
from qspin.packing import Plan, lengths_of, pack_row
from qspin.records import Pair
from qspin.scoring import pair_logps

FIRST_PROBE = 8  # the first probe takes this part of the most


def token_budget(
    model: SlotModel, pairs: Sequence[Pair], plan: Callable[[int], Plan], prefix: int, optimizer: str
) -> int:
    """The largest budget whose longest planned micro-batch fits into memory, forward and backward.

    A small micro-batch is tried first, halved until it fits, and tells how far the prediction is off. If the
    prediction, set right by that, is less than half of the room, that is that; else the longest micro-batch is tried,
    and halved until it fits.

    Args:
        plan: budget → plan.
        optimizer: whose state will be there too.

    Raises:
        QspinError: not even the longest pair fits.
    """
    most = MOST_TOKENS[model.device.type]
    footprint = model.footprint
    give_back_freed_memory()
    room = SHARE * free_bytes(model.device) - footprint.optimizer(optimizer)

    def predicted(members: Sequence[Pair]) -> int:
        lengths = [lengths_of(pair, prefix) for pair in members]
        batch = Batch.of([(group.prompt, group.real, group.generated) for group in lengths], prefix)
        return footprint.gradients() + footprint.activations(batch)

    least = most // FIRST_PROBE
    while True:
        small = _longest(pairs, plan(least), prefix)
        try:
            off = _need(model, small, prefix) / predicted(small)
            break
        except OutOfMemory:
            _check_several(small)
            least //= 2

    def promised(budget: int) -> float:
        return off * predicted(_longest(pairs, plan(budget), prefix))

    budget = most
    while budget > least and promised(budget) > room:
        budget //= 2
    if promised(budget) < room / 2:
        return budget
    while True:
        longest = _longest(pairs, plan(budget), prefix)
        if _fits(model, longest, prefix, room):
            return budget
        _check_several(longest)
        budget //= 2


def smaller(pairs: Sequence[Pair], plan: Plan, prefix: int) -> int:
    """A budget that cuts the longest micro-batch of a plan in two, after it didn't fit.

    Raises:
        QspinError: it is one pair.
    """
    longest = _longest(pairs, plan, prefix)
    _check_several(longest)
    return _tokens(longest, prefix) // 2


def _check_several(refused: Sequence[Pair]) -> None:
    """A micro-batch that did not fit can be cut; raises a QspinError if it is one pair."""
    if len(refused) == 1:
        raise QspinError(
            f"{refused[0].record_id}: its {lengths_of(refused[0]).total} tokens alone are more than memory holds; set "
            "train.gradient_checkpointing=true, or lower data.max_completion_tokens and generation.max_new_tokens"
        )


def rows_at_once(model: SlotModel, places: int) -> int:
    """How many completions to decode side by side, each of up to so many places, prompt included."""
    room = SHARE * free_bytes(model.device) - model.unpacked_bytes
    return max(1, model.footprint.rows_that_fit(room, places))


def _longest(pairs: Sequence[Pair], plan: Plan, prefix: int) -> list[Pair]:
    micro_batches = ([pairs[index] for index in micro_batch] for micro_batch in itertools.chain(*plan))
    return max(micro_batches, key=lambda members: _tokens(members, prefix))


def _tokens(pairs: Sequence[Pair], prefix: int) -> int:
    """As a budget counts them: without what all prompts begin with."""
    return sum(lengths_of(pair, prefix).total for pair in pairs)


def _fits(model: SlotModel, pairs: Sequence[Pair], prefix: int, room: float) -> bool:
    try:
        return _need(model, pairs, prefix) <= room
    except OutOfMemory:
        return False


def _need(model: SlotModel, pairs: Sequence[Pair], prefix: int) -> int:
    """Bytes that a forward and backward pass of a micro-batch takes at most."""
    give_back_freed_memory()  # work that fits into it would not show
    try:
        with peak(model.device) as measured, refusals_told():
            real, generated = pair_logps(model, pack_row(pairs, model.device, prefix))
            (real - generated).sum().backward()  # type: ignore[no-untyped-call]
    finally:  # a refusal leaves gradients of some layers, which the next try would find there
        for parameter in model.parameters.values():
            parameter.grad = None
    return measured.above
