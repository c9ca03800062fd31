"""Rows are good, and have an id, or are left out with a reason; how many may be; what the good ones are known by."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED_DATA
from data_rows import ROWS, codes, load, record, write_jsonl

from qspin import data
from qspin.data import Dataset, LeftOut, check_rejects
from qspin.errors import QspinError
from qspin.records import Place, Reject


def test_exact_duplicates_are_dropped_and_not_malformed(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path,
        {"prompt": "Hi", "completion": "Hello."},
        {"prompt": "Hi", "completion": "Yes."},
        {"prompt": " Hi", "completion": "Hello.\n"},
        {"prompt": "hi", "completion": "Hello."},
    )
    dataset = load(path)
    assert [record.id for record in dataset.records] == ["row-1", "row-2", "row-4"]
    assert dataset.rejects == (Reject(Place(3), "duplicate", "says the same as line 1", malformed=False),)


def test_ids(tmp_path: Path) -> None:
    own: list[dict[str, Any]] = [
        {"id": "a"},
        {"id": 7},
        {"id": "7"},  # seen before
        {"id": "a", "prompt_id": "p"},
        {"prompt_id": "p"},  # seen before
        {"id": ""},
        {"id": None, "prompt_id": 0},
        {"id": True},
        {"id": 1.5},
        {"id": ["x"]},
        {"id": "row-12"},  # of a line that is yet to come
        {},
        {"id": "\ud800"},
    ]
    path = write_jsonl(tmp_path, *({"prompt": f"{n}", "completion": "x", **ids} for n, ids in enumerate(own)))
    assert [record.id for record in load(path).records] == [
        "a",
        "7",
        "row-3",
        "p",
        "row-5",
        "row-6",
        "0",
        *(f"row-{n}" for n in range(8, 14)),
    ]


def test_the_fingerprint_is_of_content_and_order(tmp_path: Path) -> None:
    def of(*rows: dict[str, Any]) -> str:
        return load(write_jsonl(tmp_path, *rows)).fingerprint

    base = of(ROWS[0], ROWS[3])
    assert base != of(ROWS[0], {**ROWS[3], "id": "x"})  # a completion's random numbers depend on its row's id
    assert base == of(*({"question": row["prompt"], "answer": row["completion"]} for row in (ROWS[0], ROWS[3])))
    others = {
        of(ROWS[3], ROWS[0]),
        of(ROWS[0]),
        of(ROWS[0], {**ROWS[3], "completion": "x"}),
        of({"prompt": "HiHello.", "completion": "x"}),
    }
    assert len(others | {base}) == 5
    assert (
        base == "c907c4059c4c7598d26dfad978431f49bb1bcca6c0441d9ee5c7db9fb811fb96"
    )  # stays the same from version to version: run folders keep it


@pytest.mark.parametrize(
    ("name", "rows", "records", "format"),
    [
        ("dolly-train.jsonl", 4516, 4516, "instruction-response"),
        ("dolly-eval.jsonl", 200, 200, "instruction-response"),
        ("gsm8k-train.jsonl", 7473, 7473, "question-answer"),
        ("gsm8k-test-400.jsonl", 400, 400, "question-answer"),
    ],
)
def test_real_files(name: str, rows: int, records: int, format: str) -> None:
    path = SHARED_DATA / name
    if not path.is_file():
        pytest.skip(f"{path} is not on this machine")
    dataset = load(path)
    assert (dataset.rows, len(dataset.records), dataset.format) == (rows, records, format)
    source = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    prompt, completion = format.split("-")
    assert dataset.records[0] == record("row-1", source[0][prompt].strip(), source[0][completion].strip())


def test_import_is_light() -> None:
    code = (
        "import sys, qspin.data; "
        "print(*sorted({'torch', 'transformers', 'datasets', 'pyarrow', 'huggingface_hub'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


# --- a limit ---


def test_limit_stops_reading(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}", "completion": "x"} for n in range(5)]
    path = write_jsonl(tmp_path, rows[0], "broken\n", *rows[1:], "broken\n")
    dataset = load(path, limit=2)
    assert dataset.records == (record("row-1", "0", "x"), record("row-3", "1", "x"))
    assert (codes(dataset), dataset.rows) == ([(2, "broken-json")], 3)
    assert (len(load(path, limit=99).records), load(path, limit=99).rows) == (5, 7)


def test_a_limit_that_leaves_no_row_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path, *({"prompt": f"{n}", "completion": "x"} for n in range(5)))
    assert [load(path, limit=limit).cut for limit in (4, 5, 6, None)] == [True, False, False, False]
    monkeypatch.setattr(data, "_LOOK_AHEAD", 3)  # what comes after so many is not known, and not read to know it
    assert [load(path, limit=limit).cut for limit in (4, 5, 6, None)] == [True, True, False, False]


def test_what_is_not_read_cannot_fail(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, *({"prompt": f"{n}", "completion": "x"} for n in range(20_100)))
    with path.open("ab") as file:
        file.write(b"\xff")
    assert load(path, limit=3).rows == 3
    with pytest.raises(QspinError, match="not UTF-8"):
        load(path)


# --- how many may be left out ---


def dataset_of(good: int, *rejects: Reject) -> Dataset:
    records = tuple(record(f"{n}", f"{n}", "x") for n in range(good))
    return Dataset(records, rejects, "messages", "", good + len(rejects))


def check(dataset: Dataset, share: float, *, strict: bool = False) -> None:
    check_rejects("mine.jsonl", dataset, strict=strict, max_malformed_share=share)


BAD = [
    Reject(Place(2), "not-text", "prompt is 1, not text"),
    Reject(Place(3), "broken-json", "is broken JSON: x"),
    Reject(Place(5), "empty-prompt", "has an empty user turn in its prompt"),
    Reject(Place(6), "empty-prompt", "has an empty user turn in its prompt"),
    Reject(Place(8), "no-user-turn", "has no user turn"),
    Reject(Place(9), "not-text", "prompt is 2, not text"),
]
MILD = [Reject(Place(n), code, "…", malformed=False) for n, code in enumerate(["duplicate", "long-prompt"] * 20, 20)]


def test_malformed_share() -> None:
    check(dataset_of(0, *MILD), 0)
    check(dataset_of(94, *BAD), 0.06)
    check(dataset_of(54, *BAD, *MILD), 0.06)
    with pytest.raises(LeftOut) as caught:
        check(dataset_of(93, *BAD), 0.06)
    assert str(caught.value) == (
        "mine.jsonl: 6 of 99 rows are malformed, more than data.max_malformed_share = 0.06 allows: "
        "2 not-text (line 2 prompt is 1, not text), "
        "2 empty-prompt (line 5 has an empty user turn in its prompt), "
        "1 broken-json (line 3 is broken JSON: x); mend them, or raise it"
    )
    assert caught.value.rejects == [("mine.jsonl", bad) for bad in BAD]


def test_a_share_that_is_exactly_the_limit_is_allowed() -> None:
    # 0.29 * 100 is 28.999999999999996
    check(dataset_of(71, *[Reject(Place(1), "not-text", "…")] * 29), 0.29)


def test_strict_allows_no_row_to_be_left_out_for_whatever_reason() -> None:
    check(dataset_of(9), 1, strict=True)
    with pytest.raises(LeftOut) as caught:
        check(dataset_of(60, *MILD[:9], BAD[0], *MILD[9:]), 1, strict=True)
    assert str(caught.value) == (
        "mine.jsonl: 41 of 101 rows can't be used, and --strict (data.strict) allows none: the first is line 2, "
        "not-text: prompt is 1, not text; mend them, or go on without"
    )
    assert len(caught.value.rejects) == 41
