"""Passages that share beginnings against plain transformers and PEFT, one passage at a time."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, VOCABULARY
from test_scoring import plain_twin

from qspin.errors import QspinError
from qspin.fitting.memory import OutOfMemory
from qspin.model import SlotModel
from qspin.trials import reading
from qspin.trials.reading import Passage, Reading, read

LoadModel = Callable[..., SlotModel]
CPU = torch.device("cpu")


def some(count: int, seed: int) -> tuple[int, ...]:
    generator = random.Random(seed)
    return tuple(generator.randrange(VOCABULARY) for _ in range(count))


def passage(context: tuple[int, ...], continuation: tuple[int, ...]) -> Passage:
    return Passage((*context, *continuation)[:-1], continuation)


EXAMPLES, QUESTION, OTHER = some(20, 1), some(9, 2), some(11, 3)
PASSAGES = [
    *(passage((*EXAMPLES, *QUESTION), some(length, 10 + length)) for length in (4, 1, 7)),
    *(passage((*EXAMPLES, *OTHER), (token,)) for token in (5, 6, 7)),  # one sequence, read once
    passage(OTHER, some(5, 20)),
    passage(OTHER[:1], OTHER[1:]),  # ends where another goes on
    passage((3,), (4,)),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_readings_are_those_of_one_passage_at_a_time(
    architecture: str,
    budget: int,
    tiny_model: LoadModel,
    tiny_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model(architecture, moved=True)
    twin = plain_twin(model, tiny_folder(architecture))
    monkeypatch.setitem(reading.MOST_TOKENS, "cpu", reading.PART * budget)
    heard: list[int] = []
    found = read(model, PASSAGES, on_read=heard.append)
    assert sum(heard) == len(PASSAGES)
    assert (len(heard) == 1) == (budget == 10_000)
    for item, got in zip(PASSAGES, found, strict=True):
        with torch.no_grad():
            logps = twin(input_ids=torch.tensor([item.ids]), use_cache=False).logits[0].log_softmax(-1)
        logps, targets = logps[-len(item.targets) :], torch.tensor(item.targets)
        assert got.logp == pytest.approx(float(logps.gather(1, targets[:, None]).sum()), rel=1e-4, abs=1e-4)
        assert got.greedy == bool((logps.argmax(-1) == targets).all())


def test_what_the_model_finds_likeliest_is_greedy(tiny_model: LoadModel) -> None:
    model, ids = tiny_model(), [*QUESTION]
    for _ in range(3):
        logits = model.logits(model.hidden(model.embed(torch.tensor(ids)), torch.arange(len(ids)), reading.Cut(
            [slice(0, len(ids))], [torch.arange(len(ids))], CPU)))  # fmt: skip
        ids.append(int(logits[-1].argmax()))
    greedy = tuple(ids[-3:])
    wrong = (*greedy[:2], (greedy[2] + 1) % VOCABULARY)
    assert [found.greedy for found in read(model, [passage(QUESTION, greedy), passage(QUESTION, wrong)])] == [1, 0]


def test_what_passages_share_is_computed_once() -> None:
    row = reading._cut(sorted(PASSAGES), CPU)
    distinct = {item.ids[: end + 1] for item in PASSAGES for end in range(len(item.ids))}
    assert len(row.input_ids) == len(distinct)
    assert [row.input_ids[places].tolist() for places in row.places] == [list(item.ids) for item in sorted(PASSAGES)]
    assert [row.position_ids[places].tolist() for places in row.places] == [
        list(range(len(item.ids))) for item in sorted(PASSAGES)
    ]


def test_memory_that_runs_out(tiny_model: LoadModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inner = tiny_model(), reading._read_row
    whole = read(model, PASSAGES)
    monkeypatch.setitem(reading.MOST_TOKENS, "cpu", reading.PART * 80)

    def refuse(times: int) -> None:
        left = [times]

        def refusing(model: SlotModel, passages: list[Passage]) -> list[Reading]:
            if left[0]:
                left[0] -= 1
                raise OutOfMemory("no room")
            return inner(model, passages)

        monkeypatch.setattr(reading, "_read_row", refusing)

    def refuse_every_other() -> None:
        rows = [0]

        def refusing(model: SlotModel, passages: list[Passage]) -> list[Reading]:
            rows[0] += 1
            if rows[0] % 2:
                raise OutOfMemory("no room")
            return inner(model, passages)

        monkeypatch.setattr(reading, "_read_row", refusing)

    refuse(2)
    again = read(model, PASSAGES)
    assert [found.greedy for found in again] == [found.greedy for found in whole]
    assert [found.logp for found in again] == pytest.approx([found.logp for found in whole], rel=1e-4)
    refuse(3)
    with pytest.raises(QspinError, match=r"out of memory 3 times in a row while reading texts of up to 35 tokens"):
        read(model, PASSAGES)
    refuse_every_other()  # of more than three rows, and no two in a row
    assert [found.greedy for found in read(model, PASSAGES)] == [found.greedy for found in whole]
