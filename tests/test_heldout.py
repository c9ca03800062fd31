"""Which rows are held out: by prompt, as many as were asked for or there is room for, and none that is trained on."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from data_rows import record

from qspin.config import load_config
from qspin.data import remove_overlap, split_heldout
from qspin.errors import QspinError
from qspin.prepare import Prepared, prepare
from qspin.records import Place, Record, Reject


def many(count: int, per_prompt: int = 1) -> list[Record]:
    return [record(f"{n}", f"prompt {n // per_prompt}", f"answer {n}") for n in range(count)]


def test_split_takes_the_rows_asked_for_up_to_a_fifth() -> None:
    for count, rows, expected in [(1000, 64, 64), (100, 64, 20), (11, 64, 2), (10, 2, 2), (1000, 2, 2)]:
        train, heldout = split_heldout("mine.jsonl", many(count), rows, seed=0)
        assert (len(train), len(heldout)) == (count - expected, expected)


def test_split_is_by_prompt_and_keeps_the_order() -> None:
    records = many(300, per_prompt=3)
    train, heldout = split_heldout("mine.jsonl", records, 32, seed=1)
    assert len(heldout) == 30  # ten whole prompts
    assert not {good.prompt for good in train} & {good.prompt for good in heldout}
    chosen = set(heldout)
    assert list(heldout) == [good for good in records if good in chosen]
    assert list(train) == [good for good in records if good not in chosen]


def test_split_is_a_function_of_seed_and_prompts_alone() -> None:
    records = many(500)
    _, heldout = split_heldout("mine.jsonl", records, 50, seed=3)
    assert set(heldout) == set(split_heldout("mine.jsonl", records[::-1], 50, seed=3)[1])
    renamed = [Record("other", good.prompt, "other") for good in records]
    assert [good.prompt for good in split_heldout("mine.jsonl", renamed, 50, seed=3)[1]] == [
        good.prompt for good in heldout
    ]
    assert len(set(heldout) & set(split_heldout("mine.jsonl", records, 50, seed=4)[1])) < 25
    assert [good.id for good in split_heldout("mine.jsonl", many(12), 2, seed=0)[1]] == ["1", "5"]  # in every version


def test_rows_added_elsewhere_move_few() -> None:
    _, before = split_heldout("mine.jsonl", many(500), 50, seed=3)
    _, after = split_heldout("mine.jsonl", many(510), 50, seed=3)
    assert len(set(before) - set(after)) <= 5


def test_a_prompt_larger_than_the_room_is_passed_over() -> None:
    records = [*(record(f"a{n}", "much asked", f"{n}") for n in range(30)), *many(10)]
    _, heldout = split_heldout("mine.jsonl", records, 8, seed=0)
    assert len(heldout) == 8
    assert "much asked" not in {good.prompt[0].content for good in heldout}


@pytest.mark.parametrize(("records", "prompts"), [(many(9), 9), (many(30, per_prompt=10), 3), ([], 0)])
def test_too_few_to_split(records: list[Record], prompts: int) -> None:
    with pytest.raises(QspinError) as caught:
        split_heldout("mine.jsonl", records, 64, seed=0)
    assert str(caught.value) == (
        f"mine.jsonl: {len(records)} good rows with {prompts} different prompts are too few to hold out two or more by "
        "prompt and at most a fifth: 10 with prompts of their own would do; add rows, or give data.heldout_source"
    )


def test_overlap_is_by_prompt() -> None:
    train = [record("1", "Hi", "Hello."), replace(record("2", "Bye", "See you."), place=Place(4))]
    heldout = [
        record("a", "Hi", "Yes."),
        record("b", "hi", "Hello."),
        replace(record("c", "Bye", "See you."), place=Place(7, "row")),
    ]
    rest, overlap = remove_overlap(heldout, train)
    assert rest == (heldout[1],)
    assert overlap == [
        Reject(Place(0), "trained-on", "has the prompt of training line 0", malformed=False),
        Reject(Place(7, "row"), "trained-on", "has the prompt of training line 4", malformed=False),
    ]
    assert remove_overlap(heldout, []) == (tuple(heldout), [])


def test_a_file_of_held_out_rows_is_read_as_far_as_asked_and_that_is_told(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(40)]
    settings: dict[str, Any] = {"model.id": str(tiny_folder("llama")), "data.heldout_rows": 20}
    for name, first, last in (("source", 0, 20), ("heldout_source", 0, 40)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[first:last]))
        settings[f"data.{name}"] = str(path)

    def heldout(count: int) -> Prepared:
        return prepare(load_config(None, settings | {"data.heldout_rows": count}), datetime.date(2026, 1, 1))

    with pytest.raises(
        QspinError, match=r"heldout_source\.jsonl: 0 held-out rows are left, .*; raise data\.heldout_ro"
    ):
        heldout(20)
    some, every = heldout(30), heldout(40)
    path = settings["data.heldout_source"]
    assert f"{path}: held-out rows, read from there, the first 30, as data.heldout_rows says" in some.notes
    assert f"{path}: held-out rows, read from there" in every.notes
    assert (len(some.heldout), len(every.heldout)) == (10, 20)
