"""How likely texts are after others, for benchmarks: of texts that begin alike, what they share is computed once.

    read(model, [Passage(context + choice[:-1], choice) for choice in choices], ...)

A question's choices share the question, and questions share their examples. Passages are sorted, so that those that
begin alike are neighbours; each computes what its neighbour did not, and attends to all that stands before that. One
row holds many. Nothing is kept for a backward pass; scoring.py has what training needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from qspin.errors import QspinError
from qspin.fitting.footprint import LOGITS_AT_ONCE, MOST_TOKENS
from qspin.fitting.memory import ATTEMPTS, OutOfMemory, refusals_told
from qspin.layers.attention import Cut
from qspin.model import SlotModel

PART = 4  # no more than this part of the tokens that training computes at once ...
KEYS = 16  # ... and so many keys a token, which are gathered


class Passage(NamedTuple):
    """Tokens to read, and those that are to follow each of the last ones of them."""

    ids: tuple[int, ...]
    targets: tuple[int, ...]


class Reading(NamedTuple):
    """What a model makes of a passage."""

    logp: float  # of all targets together
    greedy: bool  # each is the likeliest at its place


def read(
    model: SlotModel, passages: Sequence[Passage], *, on_read: Callable[[int], None] = lambda _count: None
) -> list[Reading]:
    """Whoever is in the slot reads the passages; `on_read` hears of how many have been read since it last did.

    Raises:
        QspinError: memory does not hold one passage.
    """
    order = sorted(range(len(passages)), key=lambda index: passages[index].ids)
    found: dict[int, Reading] = {}
    budget = MOST_TOKENS[model.device.type] // PART
    refused = 0
    while len(found) < len(passages):
        try:
            for members in _rows([index for index in order if index not in found], passages, budget):
                with refusals_told():
                    readings = _read_row(model, [passages[index] for index in members])
                found |= zip(members, readings, strict=True)
                refused = 0
                on_read(len(members))
        except OutOfMemory as error:
            refused += 1
            if refused == ATTEMPTS:
                raise QspinError(
                    f"out of memory {ATTEMPTS} times in a row while reading texts of up to "
                    f"{max(len(passage.ids) for passage in passages)} tokens ({error}); close other programs, or take "
                    "a smaller model"
                ) from None
            budget //= 2
    return [found[index] for index in range(len(passages))]


def _rows(order: Sequence[int], passages: Sequence[Passage], budget: int) -> Iterator[list[int]]:
    """Neighbours that a row holds together; one that is longer than the budget has a row of its own."""
    row: list[int] = []
    tokens = keys = 0
    before: tuple[int, ...] = ()
    for index in order:
        ids = passages[index].ids
        shared = _shared(before, ids) if row else 0
        new = len(ids) - shared
        if row and (tokens + new > budget or keys + len(ids) > KEYS * budget):
            yield row
            row, tokens, keys, new = [], 0, 0, len(ids)
        row.append(index)
        tokens += new
        keys += len(ids) if new else 0
        before = ids
    if row:
        yield row


@dataclass(frozen=True, slots=True)
class _Row:
    """T tokens, and where in them each passage lies."""

    input_ids: Tensor  # (T,) on the CPU
    position_ids: Tensor  # (T,)
    layout: Cut
    places: list[Tensor]  # of each passage's tokens in turn, on the CPU


def _cut(passages: Sequence[Passage], device: torch.device) -> _Row:
    """A row of passages in sorted order; one whose tokens are those of the one before it adds nothing."""
    input_ids: list[int] = []
    positions: list[Tensor] = []
    places: list[Tensor] = []
    queries: list[slice] = []
    keys: list[Tensor] = []
    before: tuple[int, ...] = ()
    for passage in passages:
        shared = _shared(before, passage.ids)
        start, new = len(input_ids), len(passage.ids) - shared
        own = torch.arange(start, start + new)
        places.append(torch.cat([places[-1][:shared], own]) if shared else own)
        if new:
            input_ids += passage.ids[shared:]
            positions.append(torch.arange(shared, len(passage.ids)))
            queries.append(slice(start, start + new))
            keys.append(places[-1])
        before = passage.ids
    return _Row(
        input_ids=torch.tensor(input_ids),
        position_ids=torch.cat(positions).to(device),
        layout=Cut(queries, keys, device),
        places=places,
    )


def _shared(first: tuple[int, ...], second: tuple[int, ...]) -> int:
    """How many tokens both begin with."""
    most = min(len(first), len(second))
    return next((place for place in range(most) if first[place] != second[place]), most)


@torch.inference_mode()
def _read_row(model: SlotModel, passages: Sequence[Passage]) -> list[Reading]:
    row = _cut(passages, model.device)
    hidden = model.hidden(model.embed(row.input_ids), row.position_ids, row.layout)  # (T, D)
    ends = [places[-len(passage.targets) :] for passage, places in zip(passages, row.places, strict=True)]
    predictors = torch.cat(ends).to(model.device)  # (C,)
    targets = torch.tensor([token for passage in passages for token in passage.targets], device=model.device)
    at_once = max(1, LOGITS_AT_ONCE[model.device.type] // model.vocabulary)
    logps, greedy = [], []
    for start in range(0, len(targets), at_once):
        wanted = targets[start : start + at_once]
        logits = model.logits(hidden[predictors[start : start + at_once]]).log_softmax(-1)  # (c, V)
        logps += logits.gather(1, wanted[:, None])[:, 0].tolist()
        greedy += (logits.argmax(-1) == wanted).tolist()
    readings, start = [], 0
    for passage in passages:
        own = slice(start, start + len(passage.targets))
        readings.append(Reading(math.fsum(logps[own]), all(greedy[own])))
        start = own.stop
    return readings
