"""Every file and hub data set ends in records and rejects, or in one clear error."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
from fuzz_data import KEYS, WORDS, judge
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qspin import sources
from qspin.config import DataConfig
from qspin.data import Dataset, LeftOut, check_rejects, load_records, remove_overlap, split_heldout
from qspin.errors import QspinError
from qspin.formats import FORMATS
from qspin.records import Message, Place, Record, Reject
from qspin.sources import READERS

SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello."}
SYSTEM = {"role": "system", "content": "Be kind."}


def load(source: object, **settings: Any) -> Dataset:
    data = DataConfig(**settings)
    return load_records(
        str(source),
        split=data.split,
        config=data.config,
        format=data.format,
        columns=data.columns,
        turns=data.turns,
        limit=data.limit,
    )


def write_jsonl(folder: Path, *rows: object, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def record(id: str, prompt: str, completion: str) -> Record:
    return Record(id, (Message("user", prompt),), completion)


def codes(dataset: Dataset) -> list[tuple[int, str]]:
    return [(reject.place.number, reject.code) for reject in dataset.rejects]


# --- formats ---

HI = (Message("user", "Hi"),)
KIND = (Message("system", "Be kind."), *HI)
TALK = (*KIND, Message("assistant", "Hello."), Message("user", "More?"))
MORE = {"role": "user", "content": "More?"}
YES = {"role": "assistant", "content": "Yes."}

GOOD = [
    ("messages", {"messages": [USER, ASSISTANT]}, HI, "Hello."),
    ("messages", {"messages": [SYSTEM, USER, ASSISTANT, MORE, YES]}, TALK, "Yes."),
    ("messages", {"messages": [SYSTEM, USER, ASSISTANT, MORE, USER]}, KIND, "Hello."),
    ("messages", {"messages": [{"role": "system", "content": " "}, USER, ASSISTANT]}, HI, "Hello."),
    ("messages", {"messages": [{**USER, "name": "Ann"}, ASSISTANT], "source": 3}, HI, "Hello."),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in ("H", "i")]}, ASSISTANT]},
        HI,
        "Hello.",
    ),
    *[
        (
            "sharegpt",
            {"conversations": [{"from": user, "value": "Hi"}, {"from": model, "value": "Hello."}]},
            HI,
            "Hello.",
        )
        for user, model in [
            ("human", "gpt"),
            ("user", "assistant"),
            ("human", "chatgpt"),
            ("user", "model"),
            ("user", "bot"),
        ]
    ],
    (
        "sharegpt",
        {
            "conversations": [
                {"from": f, "value": v} for f, v in [("system", "Be kind."), ("human", "Hi"), ("gpt", "Hello.")]
            ]
        },
        KIND,
        "Hello.",
    ),
    ("sharegpt", {"conversations": [USER, ASSISTANT]}, HI, "Hello."),
    ("sharegpt", {"conversations": [{**USER, "from": None}, {**ASSISTANT, "value": None}]}, HI, "Hello."),
    ("messages", {"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}, HI, "Hello."),
    (
        "messages",
        {"messages": [{"role": "human", "content": "Hi"}, {"role": "gpt", "content": "Hello."}]},
        HI,
        "Hello.",
    ),
    ("messages", {"messages": [USER, {**ASSISTANT, "tool_calls": None}], "tools": []}, HI, "Hello."),
    ("messages", {"messages": [USER, {**ASSISTANT, "tool_calls": []}], "tools": "[]"}, HI, "Hello."),
    ("prompt-completion", {"prompt": "Hi", "completion": "Hello.", "tools": "hammer, saw"}, HI, "Hello."),
    ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello."}, HI, "Hello."),
    ("alpaca", {"instruction": "Hi", "input": None, "output": "Hello."}, HI, "Hello."),
    ("alpaca", {"instruction": "Hi", "output": "Hello."}, HI, "Hello."),
    ("alpaca", {"instruction": "Sum up.", "input": "a b", "output": "a"}, (Message("user", "Sum up.\n\na b"),), "a"),
    ("prompt-completion", {"prompt": "Hi", "completion": "Hello."}, HI, "Hello."),
    ("prompt-completion", {"prompt": "\n Hi\t", "completion": "  Hello.\n"}, HI, "Hello."),
    ("prompt-completion", {"prompt": [SYSTEM, USER], "completion": [ASSISTANT]}, KIND, "Hello."),
    ("prompt-completion", {"prompt": [SYSTEM, USER, ASSISTANT, MORE], "completion": "Yes."}, TALK, "Yes."),
    ("prompt-completion", {"prompt": "Hi", "completion": [ASSISTANT]}, HI, "Hello."),
    ("prompt-response", {"prompt": "Hi", "response": "Hello."}, HI, "Hello."),
    (
        "instruction-response",
        {"instruction": "Hi", "context": "", "response": "Hello.", "category": "chat"},
        HI,
        "Hello.",
    ),
    ("question-answer", {"question": "Hi", "answer": "Hello."}, HI, "Hello."),
]


@pytest.mark.parametrize(("format", "row", "prompt", "completion"), GOOD)
def test_each_format_is_found_and_read(
    tmp_path: Path, format: str, row: dict[str, Any], prompt: tuple[Message, ...], completion: str
) -> None:
    path = write_jsonl(tmp_path, row)
    found = load(path)
    assert (found.format, found.records, found.rejects, found.rows) == (
        format,
        (Record("row-1", prompt, completion),),
        (),
        1,
    )
    assert load(path, format=format) == found


def test_every_format_of_the_config_is_tried_above() -> None:
    formats = set(get_args(DataConfig.model_fields["format"].annotation))
    assert formats == {format for format, *_ in GOOD} | {"auto", "columns"}


def test_named_columns(tmp_path: Path) -> None:
    columns = {"prompt": "ask", "completion": "tell", "system": "frame"}
    path = write_jsonl(
        tmp_path,
        {"ask": "Hi", "tell": "Hello.", "frame": "Be kind."},
        {"ask": "Hi", "tell": "Hello.", "frame": ""},
        {"ask": "Hi", "tell": "Hello!", "frame": None},
        {"ask": [USER], "tell": [YES]},
        {"ask": "Hi", "tell": "Hello?", "frame": 3},
        {"ask": "Hi"},
    )
    dataset = load(path, columns=columns)
    assert dataset.format == "columns"
    assert dataset.records == (
        Record("row-1", KIND, "Hello."),
        Record("row-2", HI, "Hello."),
        Record("row-3", HI, "Hello!"),
        Record("row-4", HI, "Yes."),
    )
    assert dataset.rejects == (
        Reject(Place(5), "not-text", "frame is 3, not text"),
        Reject(Place(6), "missing-column", "has no 'tell'"),
    )
    assert load(path, format="columns", columns=columns) == dataset
    for wrong in ({"format": "alpaca", "columns": columns}, {"columns": {"prompt": "ask"}}):
        with pytest.raises(QspinError, match=r"data\.columns names a prompt and a completion column"):
            load(path, **wrong)


def test_the_format_that_most_rows_fit_wins(tmp_path: Path) -> None:
    pair = {"question": "Hi", "answer": "Hello."}
    first = [{"prompt": f"{n}", "completion": "one"} for n in range(40)]
    then = [{"question": f"{n}", "answer": "two"} for n in range(60)]
    dataset = load(write_jsonl(tmp_path, *first, *then))
    assert (dataset.format, len(dataset.records), codes(dataset)) == (
        "question-answer",
        60,
        [(n, "missing-column") for n in range(1, 41)],
    )
    # columns that every row has, as in CSV, do not count; what is in them does
    empty = {"prompt": None, "completion": None}
    assert load(write_jsonl(tmp_path, {**empty, **pair})).format == "question-answer"
    # a format whose columns are there, if no row is good
    with pytest.raises(QspinError) as caught:
        load(write_jsonl(tmp_path, {"question": "Hi", "answer": ""}))
    assert "1 empty-completion (line 1 has an empty assistant turn in its completion" in str(caught.value)


def test_the_sample_is_spread_over_many_rows(tmp_path: Path) -> None:
    early = [{"prompt": f"{n}", "completion": "one"} for n in range(1200)]
    late = [{"question": f"{n}", "answer": "two"} for n in range(1800)]
    assert load(write_jsonl(tmp_path, *early, *late)).format == "question-answer"


def test_of_equal_formats_the_first_of_the_table_wins(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [USER, ASSISTANT]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]},
        {"instruction": "Hi", "output": "Hello."},
        {"prompt": "Hi", "completion": "Hello."},
        {"prompt": "Hi", "response": "Hello."},
        {"instruction": "Hi", "response": "Hello."},
        {"question": "Hi", "answer": "Hello."},
    ]
    found = []
    for start in range(len(rows)):
        merged = {key: value for row in rows[start:] for key, value in row.items()}
        found.append(load(write_jsonl(tmp_path, merged)).format)
    assert found == [
        "messages",
        "sharegpt",
        "alpaca",
        "prompt-completion",
        "prompt-response",
        "instruction-response",
        "question-answer",
    ]


def test_no_format_fits(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, {"ask": "Hi", "tell": "Hello."}, {"tell": "Hello.", "n": 1})
    with pytest.raises(QspinError) as caught:
        load(path)
    assert str(caught.value) == (
        f"{path}: no row has the columns of a known format. Columns found: 'ask', 'tell', 'n'. Needed: "
        "messages (messages); sharegpt (conversations); alpaca (instruction, output); "
        "prompt-completion (prompt, completion); prompt-response (prompt, response); "
        "instruction-response (instruction, response); question-answer (question, answer). "
        "Choose a format with --format, or name the columns: "
        "--set data.columns.prompt=NAME --set data.columns.completion=NAME"
    )
    with pytest.raises(QspinError, match=r"columns of format alpaca\. Columns found: .* Needed: alpaca \(instr"):
        load(path, format="alpaca")
    with pytest.raises(QspinError, match=r"columns of format columns\. Columns found: .* \(ask, told\)"):
        load(path, columns={"prompt": "ask", "completion": "told"})
    for options, missing in (({"columns": {"prompt": "ask"}}, "completion"), ({"format": "columns"}, "prompt is not")):
        with pytest.raises(QspinError, match=rf"^data\.columns\.{missing}.* set: data\.columns names a prompt and a"):
            load(path, **options)


def test_one_column_is_not_both(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, {"ask": "Hi", "tell": "Hello."})
    with pytest.raises(
        QspinError, match=r"^data\.columns: prompt and completion are both 'ask'; name the column of each"
    ):
        load(path, columns={"prompt": "ask", "completion": "ask"})
    with pytest.raises(QspinError, match=r"^data\.columns: completion and system are both 'tell'; name the column"):
        load(path, columns={"prompt": "ask", "completion": "tell", "system": "tell"})


def test_a_system_column_that_no_row_has(tmp_path: Path) -> None:
    rows = [{"ask": f"Is it {n}?", "tell": "Yes.", "sys": "Be brief."} for n in range(3)]
    path, columns = write_jsonl(tmp_path, *rows), {"prompt": "ask", "completion": "tell"}
    assert load(path, columns=columns | {"system": "sys"}).records[0].prompt[0] == Message("system", "Be brief.")
    with pytest.raises(QspinError, match=r"rows\.jsonl: no row has the column 'sytem' of data\.columns\.system$"):
        load(path, columns=columns | {"system": "sytem"})


@pytest.mark.parametrize("rows", ["Hi;Hello.\nBye;Goodbye.\n", "Hi, you;Hello.\nBye, then;Goodbye.\n"])
def test_semicolons_in_place_of_commas(rows: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"prompt;completion\n{rows}")
    with pytest.raises(QspinError) as caught:
        load(path)
    assert str(caught.value) == (
        f"{path}: its only column is 'prompt;completion', so its fields seem to be divided by semicolons, tabs or "
        "bars; save it with commas"
    )


# --- bad rows ---

BAD_MESSAGES = [
    ("Hi", "not-a-list", "messages is 'Hi', not a list of turns"),
    (None, "not-a-list", "messages is None, not a list of turns"),
    (["Hi"], "not-a-turn", "messages, turn 1 is 'Hi', not an object with 'role' and 'content'"),
    ([{"content": "Hi"}, ASSISTANT], "missing-role", "messages, turn 1 has no 'role'"),
    ([{"role": None, "content": "Hi"}, ASSISTANT], "missing-role", "messages, turn 1 has no 'role'"),
    ([USER, {"role": "tool", "content": "x"}], "unknown-role",
     "messages, turn 2 has 'role' 'tool', not one of system, user, human, assistant, gpt, chatgpt, model, bot"),
    ([{"role": ["user"], "content": "Hi"}, ASSISTANT], "unknown-role",
     "messages, turn 1 has 'role' ['user'], not one of system, user, human, assistant, gpt, chatgpt, model, bot"),
    ([{"from": 3, "value": "Hi"}, ASSISTANT], "unknown-role",
     "messages, turn 1 has 'from' 3, not one of system, user, human, assistant, gpt, chatgpt, model, bot"),
    ([USER, {**ASSISTANT, "tool_calls": [{"id": "1"}]}], "tool-call",
     "messages, turn 2 has 'tool_calls', and tools are not rendered"),
    ([USER, {"role": "assistant", "content": None, "function_call": {"name": "f"}}, MORE, YES], "tool-call",
     "messages, turn 2 has 'function_call', and tools are not rendered"),
    ([USER, {"role": "assistant"}], "not-text", "messages, turn 2, 'content' is None, not text"),
    ([USER, {"role": "assistant", "content": 7}], "not-text", "messages, turn 2, 'content' is 7, not text"),
    ([USER, {"role": "assistant", "content": True}], "not-text", "messages, turn 2, 'content' is True, not text"),
    ([USER, ASSISTANT, {"role": "user", "content": 1.5}], "not-text", "messages, turn 3, 'content' is 1.5, not text"),
    ([{"role": "user", "content": [{"type": "image"}]}, ASSISTANT], "not-text",
     "messages, turn 1 has a part that is not text: {'type': 'image'}"),
    ([{"role": "user", "content": ["Hi"]}, ASSISTANT], "not-text",
     "messages, turn 1 has a part that is not text: 'Hi'"),
    ([{"role": "user", "content": [{"type": "text", "text": 1}]}, ASSISTANT], "not-text",
     "messages, turn 1 has a part that is not text: {'text': 1, 'type': 'text'}"),
    ([], "no-completion", "has no assistant turn"),
    ([USER], "no-completion", "has no assistant turn"),
    ([SYSTEM, USER], "no-completion", "has no assistant turn"),
    ([ASSISTANT], "no-user-turn", "has no user turn"),
    ([SYSTEM, ASSISTANT], "no-user-turn", "has no user turn"),
    ([ASSISTANT, USER, ASSISTANT], "assistant-first", "begins with an assistant turn"),
    ([SYSTEM, ASSISTANT, USER, ASSISTANT], "assistant-first", "begins with an assistant turn"),
    ([USER, USER, ASSISTANT], "repeated-role", "has two user turns in a row"),
    ([USER, ASSISTANT, ASSISTANT], "repeated-role", "has two assistant turns in a row"),
    ([SYSTEM, SYSTEM, USER, ASSISTANT], "misplaced-system", "has a system turn that is not the first turn"),
    ([USER, SYSTEM, ASSISTANT], "misplaced-system", "has a system turn that is not the first turn"),
    ([USER, ASSISTANT, SYSTEM], "misplaced-system", "has a system turn that is not the first turn"),
    ([{"role": "user", "content": " \n"}, ASSISTANT], "empty-prompt", "has an empty user turn in its prompt"),
    ([USER, {"role": "assistant", "content": ""}, MORE, YES], "empty-prompt",
     "has an empty assistant turn in its prompt"),
    ([USER, {"role": "assistant", "content": "\t"}], "empty-completion",
     "has an empty assistant turn in its completion"),
    ([USER, {"role": "assistant", "content": "\u200b \u2060\ufeff"}], "empty-completion",
     "has an empty assistant turn in its completion"),
    ([{"role": "user", "content": "\u202e\u200f"}, ASSISTANT], "empty-prompt", "has an empty user turn in its prompt"),
    ([USER, {"role": "assistant", "content": [{"type": "text", "text": "See"}, {"type": "image"}]}], "not-text",
     "messages, turn 2 has a part that is not text: {'type': 'image'}"),
    ([USER, {"role": "assistant", "content": []}], "empty-completion",
     "has an empty assistant turn in its completion"),
    ([{"role": "user", "content": "a\0"}, ASSISTANT], "bad-character",
     "messages, turn 1, 'content' has the character '\\x00', which is not text"),
    ([USER, {"role": "assistant", "content": "\ud83d"}], "bad-character",
     "messages, turn 2, 'content' has the character '\\ud83d', which is not text"),
]  # fmt: skip


@pytest.mark.parametrize(("messages", "code", "reason"), BAD_MESSAGES)
def test_a_bad_conversation_is_rejected(tmp_path: Path, messages: object, code: str, reason: str) -> None:
    path = write_jsonl(tmp_path, {"messages": messages}, {"messages": [USER, YES]})
    dataset = load(path, format="messages")
    assert dataset.records == (Record("row-2", HI, "Yes."),)
    assert dataset.rejects == (Reject(Place(1), code, reason),)
    assert dataset.rows == 2


BAD_ROWS = [
    ("sharegpt", {"conversations": [{"value": "Hi"}]}, "missing-role"),
    ("sharegpt", {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "x"}], "tools": "[{}]"},
     "tool-call"),
    ("messages", {"messages": [USER, ASSISTANT], "functions": [{"name": "f"}]}, "tool-call"),
    ("prompt-completion", {"prompt": [USER], "completion": [ASSISTANT], "tools": [{"name": "f"}]}, "tool-call"),
    ("sharegpt", {"conversations": [{"from": "tool", "value": "x"}]}, "unknown-role"),
    ("sharegpt", {"conversations": [{"from": "human", "value": None}]}, "not-text"),
    ("alpaca", {"instruction": "Hi", "input": 3, "output": "Hello."}, "not-text"),
    ("alpaca", {"instruction": "Hi", "input": "", "output": 3}, "not-text"),
    ("alpaca", {"instruction": "", "input": "stands alone", "output": "Hello."}, "empty-prompt"),
    ("alpaca", {"instruction": "Hi", "input": "", "output": " "}, "empty-completion"),
    ("alpaca", {"instruction": "Hi", "input": ""}, "missing-column"),
    ("prompt-completion", {"prompt": "Hi", "completion": None}, "not-text"),
    ("prompt-completion", {"prompt": "Hi", "completion": 42}, "not-text"),
    ("prompt-completion", {"prompt": False, "completion": "Hello."}, "not-text"),
    ("prompt-completion", {"prompt": {"text": "Hi"}, "completion": "Hello."}, "not-text"),
    ("prompt-completion", {"prompt": "\u2003", "completion": "Hello."}, "empty-prompt"),
    ("prompt-completion", {"prompt": "Hi", "completion": "\n"}, "empty-completion"),
    ("prompt-completion", {"prompt": "Hi"}, "missing-column"),
    ("prompt-completion", {"prompt": [], "completion": "Hello."}, "no-user-turn"),
    ("prompt-completion", {"prompt": [USER, ASSISTANT], "completion": [YES]}, "repeated-role"),
    ("prompt-completion", {"prompt": [USER, ASSISTANT], "completion": [USER]}, "not-one-answer"),
    ("prompt-completion", {"prompt": "Hi", "completion": []}, "not-one-answer"),
    ("prompt-completion", {"prompt": "Hi", "completion": [ASSISTANT, MORE, YES]}, "not-one-answer"),
    ("question-answer", {"question": "Hi\ud800", "answer": "Hello."}, "bad-character"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "row", "code"), BAD_ROWS)
def test_a_bad_row_is_rejected(tmp_path: Path, format: str, row: dict[str, Any], code: str) -> None:
    good = next(row for name, row, *_ in GOOD if name == format)
    dataset = load(write_jsonl(tmp_path, row, good), format=format)
    assert (len(dataset.records), codes(dataset)) == (1, [(1, code)])
    assert dataset.rejects[0].malformed


BAD_LINES = [
    ("{", "broken-json"),
    ('{"prompt": "Hi", "completion": "Hello."} x', "broken-json"),
    ('{"prompt": "Hi", "completion": "a\0b"}', "broken-json"),
    ("nonsense", "broken-json"),
    ("[" * 200_000, "broken-json"),
    ('{"n": ' + "1" * 5000 + "}", "broken-json"),
    ("[1, 2]", "not-an-object"),
    ('"Hi"', "not-an-object"),
    ("null", "not-an-object"),
    ('{"prompt": "Hi", "completion": "a", "completion": "b"}', "repeated-key"),
    ('{"prompt": "Hi", "completion": "a", "meta": [[{"a": 1, "a": 1}]]}', "repeated-key"),
    ('{"prompt": [{"role": "user", "role": "user", "content": "Hi"}], "completion": "a"}', "repeated-key"),
    ('{"prompt": "Hi", "completion": "a", "score": NaN}', "not-a-number"),
    ('{"prompt": "Hi", "completion": "a", "scores": [1, -Infinity]}', "not-a-number"),
    ("Infinity", "not-a-number"),
    ('{"prompt": "Hi\\u0000", "completion": "Hello."}', "bad-character"),
    ('{"prompt": "Hi", "completion": "\\udc00 Hello."}', "bad-character"),
]


@pytest.mark.parametrize(("line", "code"), BAD_LINES, ids=[line[:30] for line, _ in BAD_LINES])
def test_a_bad_line_is_rejected(tmp_path: Path, line: str, code: str) -> None:
    good = {"prompt": "Hi", "completion": "Hello."}
    dataset = load(write_jsonl(tmp_path, "\n", good, "  \n", line + "\n", {**good, "completion": "Yes."}))
    assert dataset.records == (record("row-1", "Hi", "Hello."), record("row-3", "Hi", "Yes."))
    assert [good.place for good in dataset.records] == [Place(2), Place(5)]
    assert codes(dataset) == [(4, code)]
    assert len(dataset.rejects[0].reason) < 200


def test_reasons_can_be_written_as_they_are(tmp_path: Path) -> None:
    good = {"prompt": "Hi", "completion": "Hello."}
    row = {"prompt": ["\ud800" * 5000, {"\ud800": [[[[[[[[[1]]]]]]]]]}], "completion": "x"}
    (reject,) = load(write_jsonl(tmp_path, good, row)).rejects
    assert list(reject.to_json()) == ["line", "code", "reason", "malformed"]
    assert len(json.dumps(reject.to_json(), ensure_ascii=False).encode()) < 300


def test_surrogate_pairs_are_text(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, '{"prompt": "Hi", "completion": "\\ud83d\\ude00"}\n')
    assert load(path).records == (record("row-1", "Hi", "😀"),)


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


def test_limit_stops_reading(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}", "completion": "x"} for n in range(5)]
    path = write_jsonl(tmp_path, rows[0], "broken\n", *rows[1:], "broken\n")
    dataset = load(path, limit=2)
    assert dataset.records == (record("row-1", "0", "x"), record("row-3", "1", "x"))
    assert (codes(dataset), dataset.rows) == ([(2, "broken-json")], 3)
    assert (len(load(path, limit=99).records), load(path, limit=99).rows) == (5, 7)


def test_what_is_not_read_cannot_fail(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, *({"prompt": f"{n}", "completion": "x"} for n in range(20_100)))
    with path.open("ab") as file:
        file.write(b"\xff")
    assert load(path, limit=3).rows == 3
    with pytest.raises(QspinError, match="not UTF-8"):
        load(path)


def test_the_first_answer_by_choice(tmp_path: Path) -> None:
    talk = [SYSTEM, USER, ASSISTANT, {"role": "user", "content": "More?"}, {"role": "assistant", "content": "No."}]
    path = write_jsonl(tmp_path, {"messages": talk}, {"messages": [USER]})
    dataset = load(path, turns="first")
    assert dataset.records == (Record("row-1", KIND, "Hello."),)
    assert codes(dataset) == [(2, "no-completion")]


def test_the_completions_column_has_the_completion_whatever_answer_is_chosen(tmp_path: Path) -> None:
    asked = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    path = write_jsonl(tmp_path, {"prompt": [*asked, {"role": "user", "content": "More?"}], "completion": "No."})
    [record] = load(path, turns="first").records
    assert (len(record.prompt), record.completion) == (3, "No.")


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


# --- files ---

ROWS = [
    {"prompt": "Hi", "completion": "Hello."},
    {"prompt": 'Say "a, b"\nplease', "completion": "a,\nb\u2028c é 😀"},
    {"prompt": "Hi", "completion": " "},
    {"prompt": "Bye", "completion": "See you."},
]


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_csv(path: Path, rows: list[dict[str, Any]], encoding: str = "utf-8") -> Path:
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_the_same_rows_from_every_type_of_file(tmp_path: Path) -> None:
    array = json.dumps(ROWS, indent=1)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in ROWS)
    files: dict[str, Path] = {}
    for name, text in {
        "lines.jsonl": lines,
        "array.jsonl": array,
        "array.JSON": "\n " + array,
        "lines.json": lines,
        "bom.jsonl": "\ufeff" + lines,
        "bom.json": "\ufeff" + array,
    }.items():
        files[name] = tmp_path / name
        files[name].write_text(text, encoding="utf-8", newline="")
    files["r.csv"] = write_csv(tmp_path / "r.csv", ROWS)
    files["bom.csv"] = write_csv(tmp_path / "bom.csv", ROWS, encoding="utf-8-sig")
    files["r.parquet"] = write_parquet(tmp_path / "r.parquet", ROWS)
    lines_of = {"r.csv": (2, 3, 6, 7), "bom.csv": (2, 3, 6, 7)}
    datasets = {name: load(path) for name, path in files.items()}
    for name, dataset in datasets.items():
        first, second, third, fourth = lines_of.get(name, (1, 2, 3, 4))
        assert dataset.records == (
            record("row-1", "Hi", "Hello."),
            record("row-2", 'Say "a, b"\nplease', "a,\nb\u2028c é 😀"),
            record("row-4", "Bye", "See you."),
        )
        unit = "row" if name.casefold() in {"array.jsonl", "array.json", "bom.json", "r.parquet"} else "line"
        assert [str(record.place) for record in dataset.records] == [f"{unit} {n}" for n in (first, second, fourth)]
        assert codes(dataset) == [(third, "empty-completion")]
        assert (dataset.format, dataset.rows) == ("prompt-completion", 4)
    assert len({dataset.fingerprint for dataset in datasets.values()}) == 1


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


def test_nested_columns_of_parquet(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [USER, ASSISTANT], "id": 4},
        {"messages": [USER, {"role": "assistant", "content": None}], "id": 5},
        {"messages": None, "id": None},
    ]
    dataset = load(write_parquet(tmp_path / "r.parquet", rows))
    assert dataset.records == (Record("4", HI, "Hello."),)
    assert codes(dataset) == [(2, "not-text"), (3, "not-a-list")]


def test_rows_of_an_array_are_judged_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(
        '[{"prompt": "Hi", "completion": "a"}, 3, {"prompt": "Hi", "prompt": "", "completion": "b"},'
        ' {"prompt": "Hi", "completion": "c", "n": [NaN]}, null, {"prompt": "Hi", "completion": "d"}]'
    )
    dataset = load(path)
    assert dataset.records == (record("row-1", "Hi", "a"), record("row-6", "Hi", "d"))
    assert codes(dataset) == [(2, "not-an-object"), (3, "repeated-key"), (4, "not-a-number"), (5, "not-an-object")]


def test_an_array_that_is_not_the_whole_file(tmp_path: Path) -> None:
    row = json.dumps(ROWS[0])
    lines = write_jsonl(tmp_path, f"[{row}]\n{row}\n")
    assert codes(load(lines)) == [(1, "not-an-object")]
    array = write_jsonl(tmp_path, f"[{row}]\n{row}\n", name="rows.json")
    with pytest.raises(QspinError) as caught:
        load(array)
    cause = "is broken JSON: Extra data: line 2, column 1"
    assert str(caught.value) == f"{array}: {cause}; write it anew, or mend it there"


def test_csv_rows(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    long = "x" * 300_000
    path.write_text(f'\nprompt,completion,,\n\nHi,Hello.,,\nHi,"two\nlines",,\nHi\nHi,a,b,c,d\nHi,"{long}",,\nHi,3,,\n')
    dataset = load(path)
    assert dataset.records == (
        record("row-1", "Hi", "Hello."),
        record("row-2", "Hi", "two\nlines"),
        record("row-5", "Hi", long),
        record("row-6", "Hi", "3"),
    )
    assert dataset.rejects == (
        Reject(Place(7), "field-count", "has 1 fields, but the header has 4"),
        Reject(Place(8), "field-count", "has 5 fields, but the header has 4"),
    )


FATAL_FILES = [
    ("e.jsonl", b"", "holds no rows; check that it was written to its end"),
    ("e.jsonl", b"\xef\xbb\xbf\n \n", "holds no rows; check that it was written to its end"),
    ("e.json", b"[]", "holds no rows; check that it was written to its end"),
    ("e.json", b" \n", "holds no rows; check that it was written to its end"),
    ("e.csv", b"", "holds no rows; check that it was written to its end"),
    ("e.csv", b"prompt,completion\n", "holds no rows; check that it was written to its end"),
    ("e.jsonl", b"{\n[]\n", "none of its 2 rows is good: "
     "1 broken-json (line 1 is broken JSON: Expecting property name enclosed in double quotes: column 2), "
     "1 not-an-object (line 2 is [], not an object); mend them"),
    ("e.jsonl", b'{"prompt": "Hi", "completion": "a"}\n{"prompt": "H\xe4"}\n',
     "line 2, byte offset 49: not UTF-8 (invalid continuation byte); save the file as UTF-8"),
    ("e.jsonl", '{"prompt": "Hi"}'.encode("utf-16"),
     "line 1, byte offset 0: not UTF-8 (invalid start byte); save the file as UTF-8"),
    ("e.jsonl", '{"prompt": "Hi"}'.encode("utf-16-le"),
     "line 1, byte offset 1: not UTF-8 (it has a NUL, as UTF-16 and UTF-32 have); save the file as UTF-8"),
    ("e.csv", "prompt,completion".encode("utf-32-be"),
     "line 1, byte offset 0: not UTF-8 (it has a NUL, as UTF-16 and UTF-32 have); save the file as UTF-8"),
    ("e.json", '[{"prompt": "Hi"}]'.encode("utf-16-be"),
     "line 1, byte offset 0: not UTF-8 (it has a NUL, as UTF-16 and UTF-32 have); save the file as UTF-8"),
    ("e.json", b'[{"prompt":\n "\xff"}]',
     "line 2, byte offset 14: not UTF-8 (invalid start byte); save the file as UTF-8"),
    ("e.csv", b"prompt,completion\n\xe9t\xe9,x\n",
     "line 2, byte offset 18: not UTF-8 (invalid continuation byte); save the file as UTF-8"),
    ("e.json", b'[{"prompt": "Hi"', "is broken JSON: Expecting ',' delimiter: column 17; "
     "write it anew, or mend it there"),
    ("e.json", b'{\n "data": [\n  {"prompt": "Hi"}\n ],\n "n": 1\n}\n',
     "is one object ('data', 'n'), not one a line or an array of them; write its rows alone"),
    ("e.csv", b'prompt,completion\na,b\na,"b\nc,d\n',
     "line 3: broken CSV, which hides where later rows begin (unexpected end of data); mend its quotes"),
    ("e.csv", b'prompt,completion\na,"b"c\n',
     "line 2: broken CSV, which hides where later rows begin (',' expected after '\"'); mend its quotes"),
    ("e.csv", b"prompt,completion\ra,b\r", "line 1: a line ends in CR alone, as on old Macs; save it anew"),
    ("e.csv", b"prompt|completion\na|b\n", "its only column is 'prompt|completion', so its fields seem to be divided "
     "by semicolons, tabs or bars; save it with commas"),
    ("e.csv", b"prompt,completion,prompt\na,b,c\n", "two columns are called 'prompt'; rename one"),
    ("e.parquet", b"", "cannot be read after row 0 (Parquet file size is 0 bytes); write it anew"),
    ("e.txt", b"Hi", ".txt is not one of .jsonl, .json, .csv, .parquet; unpack, convert or rename it"),
    ("rows", b"{}", "no extension is not one of .jsonl, .json, .csv, .parquet; unpack, convert or rename it"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), FATAL_FILES)
def test_a_file_that_cannot_be_used(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(QspinError) as caught:
        load(path)
    assert str(caught.value) == f"{path}: {message}"


def test_parquet_that_cannot_be_used(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "r.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["x", "x"]), path)
    with pytest.raises(QspinError, match="two columns are called 'x'; rename one"):
        load(path)
    pq.write_table(pa.Table.from_pylist([{"prompt": "Hi", "completion": "x" * 9}] * 100), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(QspinError, match="cannot be read after row 0"):
        load(path)
    json_type = pa.json_(pa.string())
    answers = pa.ExtensionArray.from_storage(json_type, pa.array(['"Hello."']))
    pq.write_table(pa.table({"prompt": ["Hi"], "completion": answers}), path)
    with pytest.raises(QspinError, match="has columns of JSON inside Parquet; save it as JSON Lines"):
        load(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    pipe = tmp_path / "rows.jsonl"
    os.mkfifo(pipe)
    with pytest.raises(
        QspinError, match="is a pipe or a device, and rows are read more than once; save them as a file"
    ):
        load(pipe)


@pytest.mark.parametrize("source", ["", " "])
def test_a_source_without_a_name(source: str) -> None:
    with pytest.raises(QspinError, match=r"^data.source is empty: give --data a file"):
        load(source)


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    for source, message in {
        str(tmp_path / "no.jsonl"): "no such file; check the path",
        str(tmp_path): "is not a file; name one in it",
        "rows": "no such file, and not a hub id (owner/name); check the path",
        "a/b/c": "no such file, and not a hub id (owner/name); check the path",
        "~nobody-of-this-name/a.jsonl": "Could not determine home directory.; check the path",
    }.items():
        with pytest.raises(QspinError) as caught:
            load(source)
        assert str(caught.value) == f"{source}: {message}"


# --- anything ---

VALUES: st.SearchStrategy[object] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)
LINES = st.binary(max_size=30) | VALUES.map(lambda value: json.dumps(value).encode())
ANYTHING = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def real_rows() -> list[dict[str, Any]]:
    """One of each format, and some that people wrote."""
    rows: list[dict[str, Any]] = [row for _, row, *_ in GOOD]
    for path in sorted(SHARED_DATA.glob("*.jsonl")):
        rows += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:3]]
    return rows


REAL_ROWS = real_rows()


@st.composite
def mutated(draw: st.DrawFn, value: Any) -> Any:
    """A value with something else somewhere in it, or something left out, or twice."""
    if isinstance(value, dict | list) and value and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
        copy = value.copy()
        change = draw(st.sampled_from(["change", "change", "remove", "double"]))
        if change == "change":
            copy[key] = draw(mutated(value[key]))
        elif change == "remove":
            del copy[key]
        elif isinstance(copy, list):
            copy.insert(key, copy[key])
        return copy
    return draw(VALUES)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A file of real rows with bytes missing, doubled, or replaced."""
    rows = draw(st.lists(st.sampled_from(REAL_ROWS), min_size=1, max_size=4))
    content = draw(st.sampled_from([
        "\n".join(map(json.dumps, rows)),
        json.dumps(rows, indent=1),
        "".join(f"{key},{value!r}\n" for key, value in rows[0].items()),
    ])).encode()  # fmt: skip
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        rest = draw(st.sampled_from([b"", content[start:], content[start + draw(st.integers(0, 9)) :]]))
        instead = draw(st.sampled_from([b"", content[start : start + 20], b"\xff", b'"', b"\0", b"{", b","]))
        content = content[:start] + instead + rest
    return content


@ANYTHING
@given(content=st.binary(max_size=60) | st.lists(LINES, max_size=5).map(b"\n".join) | damaged())
@example(content=b"\xef\xbb\xbf")
@example(content=b"[" * 100_000)
def test_any_bytes_end_in_a_dataset_or_an_error(tmp_path: Path, content: bytes) -> None:
    for suffix in READERS:
        path = tmp_path / f"any{suffix}"
        path.write_bytes(content)
        judge(path)


@ANYTHING
@given(rows=st.lists(st.sampled_from(REAL_ROWS).flatmap(mutated) | VALUES, min_size=1, max_size=5), data=st.data())
def test_any_values_as_rows_end_in_a_dataset_or_an_error(
    tmp_path: Path, rows: list[object], data: st.DataObject
) -> None:
    format = data.draw(st.sampled_from(["auto", *(format.name for format in FORMATS)]))
    for name, text in {"any.jsonl": "\n".join(map(json.dumps, rows)), "any.json": json.dumps(rows)}.items():
        (tmp_path / name).write_text(text)
        judge(tmp_path / name, format=format, turns=data.draw(st.sampled_from(["last", "first"])))


@ANYTHING
@given(data=st.data())
def test_a_damaged_parquet_file_ends_in_a_dataset_or_an_error(tmp_path: Path, data: st.DataObject) -> None:
    path = write_parquet(tmp_path / "any.parquet", [dict(GOOD[0][1])] * 3)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    judge(path)


def test_the_judge_sees_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path, *ROWS)
    assert judge(path)
    assert not judge(tmp_path / "none.jsonl")
    monkeypatch.setattr(sources, "_as_row", lambda value: value)
    with pytest.raises((AttributeError, TypeError)):
        judge(write_jsonl(tmp_path, *ROWS, 3))


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


# --- hub ---


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def hub_error(detail: str, split: str = "train") -> str:
    return (
        f"nobody/nothing-here: no such file, and split '{split}' of that hub data set cannot be loaded ({detail}); "
        "check its name, data.split, data.config and the connection; HF_HUB_OFFLINE=1 uses a cached copy"
    )


def test_a_hub_that_cannot_be_reached_is_one_line_and_no_long_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(QspinError) as caught:
        load("nobody/nothing-here")
    assert time.monotonic() - start < 15
    cause = re.search(r"\((\[\w+ \d+\] [^()\n]+)\)", str(caught.value))  # its words are the system's
    assert cause and str(caught.value) == hub_error(cause[1])


@pytest.mark.usefixtures("offline")
def test_a_hub_id_that_is_not_cached_when_offline() -> None:
    with pytest.raises(QspinError) as caught:
        load("nobody/nothing-here", split="test")
    assert str(caught.value) == hub_error(
        "Couldn't reach 'nobody/nothing-here' on the Hub (OfflineModeIsEnabled)", split="test"
    )


@pytest.mark.usefixtures("offline")
def test_what_the_hub_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    for error in (
        datasets.exceptions.DatasetNotFoundError("Dataset 'x' doesn't exist\non the Hub"),
        datasets.exceptions.DatasetGenerationError("An error occurred"),
        ValueError("Unknown split"),
        RuntimeError("Dataset can't be split"),
        TimeoutError(),
    ):

        def refuse(*_args: object, error: Exception = error, **_kwargs: object) -> None:
            raise error

        monkeypatch.setattr(datasets, "load_dataset", refuse)
        with pytest.raises(QspinError) as caught:
            load("nobody/nothing-here")
        assert str(caught.value) == hub_error(" ".join(str(error).split()) or "TimeoutError")


@pytest.mark.usefixtures("offline")
def test_rows_of_a_hub_data_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    calls = []

    def load_dataset(*args: object, **kwargs: object) -> datasets.Dataset:
        calls.append((args, kwargs))
        return datasets.Dataset.from_list([*ROWS, {"prompt": "Hi", "completion": None}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    dataset = load("owner/name", split="train[:5]", config="main")
    assert calls == [(("owner/name", "main"), {"split": "train[:5]"})]
    assert [record.id for record in dataset.records] == ["row-1", "row-2", "row-4"]
    assert codes(dataset) == [(3, "empty-completion"), (5, "not-text")]
    assert dataset.fingerprint == load(write_jsonl(tmp_path, *ROWS)).fingerprint


# --- shares and splits ---


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


def test_import_is_light() -> None:
    code = (
        "import sys, qspin.data; "
        "print(*sorted({'torch', 'transformers', 'datasets', 'pyarrow', 'huggingface_hub'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({"instruction": "Who?", "context": "Ada.", "response": "Ada.", "category": "qa"}, "context, category"),
        ({"conversations": [USER, ASSISTANT], "system": "In French.", "tools": "[]"}, "system"),
        ({"instruction": "And two?", "input": "x", "output": "No.", "history": [["One?", "Yes."]]}, "history"),
        ({"messages": [USER, ASSISTANT | {"reasoning_content": "Hm.", "weight": 0, "name": ""}]},
         "messages[].reasoning_content, messages[].weight"),
        ({"prompt": [USER], "completion": [ASSISTANT | {"thinking": "Hm."}]}, "completion[].thinking"),
        ({"messages": [USER, ASSISTANT], "id": 3, "prompt_id": "a", "system": "", "context": None, "tags": []}, ""),
        ({"instruction": "Add", "input": "1, 2", "output": "3"}, ""),
    ],
)  # fmt: skip
def test_what_is_not_read_is_told(row: dict[str, Any], unread: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, row, {"question": "no such format", "extra": "of a row that is left out"})
    told = ", ".join(f"{name!r} (1 rows)" for name in unread.split(", "))
    note = f"{path}: not read of its rows: {told}; what belongs to a prompt has to stand in its text"
    note += "; a system text is read where data.columns names all columns" if "system" in unread else ""
    assert load(path).notes == ((note,) if unread else ())


def test_columns_that_are_named_are_read(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path,
        *({"q": f"Hi {n}", "a": "Hello.", "s": "Be kind.", **{f"x{i}": 1 for i in range(9)}} for n in range(2)),
    )
    [note] = load(path, columns={"prompt": "q", "completion": "a", "system": "s"}).notes
    assert "'x0' (2 rows), " in note and "'x5' (2 rows) and 3 more; " in note and "'s'" not in note
