"""How much is computed at once, from the memory that is free: tokens in training, rows in generation.

Neither changes a result beyond rounding (architecture.md, invariants 7 and 8), and how many layers are recomputed not
at all, so none needs to be known by hand. What a piece of work takes is predicted by footprint.py, as `qspin plan`
does, and then tried.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from qspin.config import TrainConfig
from qspin.errors import QspinError
from qspin.fitting.at_once import Budget, budgets, choose, recomputable
from qspin.fitting.footprint import MOST_TOKENS, SHARE, Batch, Footprint
from qspin.fitting.memory import OutOfMemory, free_bytes, give_back_freed_memory, peak, refusals_told
from qspin.fitting.work import LAUNCH
from qspin.machine import nominal_rate
from qspin.model import SlotModel
from qspin.packing import Plan, lengths_of, pack_row
from qspin.records import Pair
from qspin.scoring import pair_logps

Takes = Callable[[Footprint, Batch], float]  # bytes

FIRST_PROBE = 8  # the first probe takes this part of the most
REFUSED = 1.25  # of the room: what work is taken for that was refused; it was more than 1 / SHARE


def token_budget(
    model: SlotModel, pairs: Sequence[Pair], plan: Callable[[int], Plan], prefix: int, config: TrainConfig
) -> Budget:
    """The quickest budget whose longest planned micro-batch fits into memory, forward and backward.

    What the settings leave open is found. A small micro-batch is tried first, halved until it fits, and tells how far
    the prediction is off. If the prediction for what `choose` takes, set right by that, is less than half of the room,
    that is that; else its longest micro-batch is tried, and if it doesn't fit, predictions are set right by that too,
    and it chooses again.

    Args:
        plan: tokens → plan.

    Raises:
        QspinError: not even the longest pair fits.
    """
    footprint, asked = model.footprint, config.tokens_per_micro_batch
    most = recomputable(config.gradient_checkpointing, footprint.shape.layers)[-1]
    if isinstance(asked, int) and config.gradient_checkpointing != "auto":
        return Budget(asked, most)
    plan = functools.cache(plan)
    give_back_freed_memory()
    room = SHARE * free_bytes(model.device) - footprint.optimizer(config.optimizer)
    first = MOST_TOKENS[footprint.device] // FIRST_PROBE
    takes = _set_right(model, pairs, plan, prefix, config, first if asked == "auto" else min(first, asked), room)

    def micro_batches(tokens: int) -> list[Batch]:
        return [_batch(members, prefix) for members in _micro_batches(pairs, plan(tokens))]

    def fullest(tokens: int) -> Batch:
        return _batch(_longest(pairs, plan(tokens), prefix), prefix)

    longest = max(lengths_of(pair, prefix).total for pair in pairs)
    candidates = budgets(config, footprint.device, longest)
    launch = (
        LAUNCH * nominal_rate(torch.cuda.get_device_properties(model.device)) if footprint.device == "cuda" else 0.0
    )

    def chosen(short: float) -> tuple[Budget, float]:
        def will_take(footprint: Footprint, batch: Batch) -> float:
            return short * takes(footprint, batch)

        found = choose(footprint, config, candidates, fullest, micro_batches, will_take, room, launch)
        return found, will_take(replace(footprint, recomputed=found.recomputed), fullest(found.tokens))

    least = Budget(candidates[-1], most)
    short = 1.0  # how many times what was predicted the tries have taken
    further = 1.0  # by how much at least that grows: from try to try by more, as each may be a minute's work on a CPU
    while True:
        found, predicted = chosen(short)
        if predicted < room / 2:
            return found
        tried = _longest(pairs, plan(found.tokens), prefix)
        need = _need_of(found, model, tried, prefix, room)
        if need <= room or (found == least and isinstance(asked, int)):
            return found
        if found == least:  # whose longest micro-batch is the longest pair
            _check_several(tried, config)
        short *= max(further, need / predicted)
        further *= REFUSED


def _need_of(found: Budget, model: SlotModel, pairs: Sequence[Pair], prefix: int, room: float) -> float:
    """As `_need`, also of what is refused: more than the room."""
    model.use_gradient_checkpointing(found.recomputed)
    try:
        return _need(model, pairs, prefix)
    except OutOfMemory:
        return max(REFUSED * room, room + 1)


def _set_right(
    model: SlotModel,
    pairs: Sequence[Pair],
    plan: Callable[[int], Plan],
    prefix: int,
    config: TrainConfig,
    tokens: int,
    room: float,
) -> Takes:
    """The prediction as measured on the longest micro-batch of a budget, or of a smaller one that fits.

    Recomputing as many layers as may be, which takes the least, and where the settings leave that open and there is
    room, as few: what layers keep is closer to what was counted than what is there for a moment, and never less.
    """
    allowed = recomputable(config.gradient_checkpointing, model.footprint.shape.layers)
    fewest, most = (replace(model.footprint, recomputed=recomputed) for recomputed in (allowed[0], allowed[-1]))
    model.use_gradient_checkpointing(most.recomputed)
    while True:
        small = _longest(pairs, plan(tokens), prefix)
        try:
            need = _need(model, small, prefix)
            break
        except OutOfMemory:
            _check_several(small, config)
            tokens //= 2
    batch = _batch(small, prefix)
    off = off_kept = need / _predicted(most, batch)
    kept = _predicted(fewest, batch) - _predicted(most, batch)
    if kept and off * _predicted(fewest, batch) <= room:
        model.use_gradient_checkpointing(fewest.recomputed)
        try:
            off_kept = max(1.0, (_need(model, small, prefix) - need) / kept)
        except OutOfMemory:
            off_kept = max(1.0, (room - need) / kept)

    def takes(footprint: Footprint, batch: Batch) -> float:
        least = _predicted(most, batch)
        return off * least + off_kept * (_predicted(footprint, batch) - least)

    return takes


def _predicted(footprint: Footprint, batch: Batch) -> int:
    return footprint.gradients() + footprint.activations(batch)


def _batch(pairs: Sequence[Pair], prefix: int) -> Batch:
    lengths = [lengths_of(pair, prefix) for pair in pairs]
    return Batch.of([(group.prompt, group.real, group.generated) for group in lengths], prefix)


def smaller(pairs: Sequence[Pair], plan: Plan, prefix: int, config: TrainConfig) -> int:
    """Tokens at once that cut the longest micro-batch of a plan in two, after it didn't fit.

    Raises:
        QspinError: it is one pair.
    """
    longest = max(_micro_batches(pairs, plan), key=lambda members: (_tokens(members, prefix), len(members)))
    _check_several(longest, config)  # among equals it may have been one of several pairs
    return _tokens(longest, prefix) // 2


def _check_several(refused: Sequence[Pair], config: TrainConfig) -> None:
    """A micro-batch that did not fit can be cut; raises a QspinError if it is one pair."""
    if len(refused) == 1:
        recompute = "" if config.gradient_checkpointing else "set train.gradient_checkpointing=true, or "
        raise QspinError(
            f"{refused[0].record_id}: its {lengths_of(refused[0]).total} tokens alone are more than memory holds; "
            f"{recompute}lower data.max_completion_tokens and generation.max_new_tokens"
        )


def rows_at_once(model: SlotModel, places: int) -> int:
    """How many completions to decode side by side, each of up to so many places, prompt included."""
    room = SHARE * free_bytes(model.device) - model.unpacked_bytes
    return max(1, model.footprint.rows_that_fit(room, places))


def _longest(pairs: Sequence[Pair], plan: Plan, prefix: int) -> list[Pair]:
    """One pair of equals."""
    return max(_micro_batches(pairs, plan), key=lambda members: (_tokens(members, prefix), -len(members)))


def _micro_batches(pairs: Sequence[Pair], plan: Plan) -> Iterator[list[Pair]]:
    return ([pairs[index] for index in micro_batch] for micro_batch in itertools.chain(*plan))


def _tokens(pairs: Sequence[Pair], prefix: int) -> int:
    """As a budget counts them: without what all prompts begin with."""
    return sum(lengths_of(pair, prefix).total for pair in pairs)


def _need(model: SlotModel, pairs: Sequence[Pair], prefix: int) -> int:
    """Bytes that a forward and backward pass of a micro-batch takes at most."""
    give_back_freed_memory()  # work that fits into it would not show
    model.forget()  # nor would as much
    try:
        with peak(model.device) as measured, refusals_told():
            real, generated = pair_logps(model, pack_row(pairs, model.device, prefix))
            (real - generated).sum().backward()  # type: ignore[no-untyped-call]
    finally:  # a refusal leaves gradients of some layers, which the next try would find there
        for parameter in model.parameters.values():
            parameter.grad = None
    return measured.above
