"""Each shape that a row may have is found and read, or the row is rejected with what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from data_rows import ASSISTANT, GOOD, HI, KIND, MORE, SYSTEM, USER, YES, codes, load, write_jsonl

from qspin.config import DataConfig
from qspin.errors import QspinError
from qspin.records import Message, Place, Record, Reject


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


def test_the_first_answer_by_choice(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, {"messages": [SYSTEM, USER, ASSISTANT, MORE, YES]}, {"messages": [USER]})
    dataset = load(path, turns="first")
    assert dataset.records == (Record("row-1", KIND, "Hello."),)
    assert codes(dataset) == [(2, "no-completion")]


def test_the_completions_column_has_the_completion_whatever_answer_is_chosen(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, {"prompt": [USER, ASSISTANT, MORE], "completion": "No."})
    [record] = load(path, turns="first").records
    assert (len(record.prompt), record.completion) == (3, "No.")


# --- which format ---


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
    path = write_jsonl(tmp_path, {"The Answer": "Hello.", "Question": "Hi"}, name="capital.jsonl")
    with pytest.raises(QspinError) as caught:
        load(path)
    assert str(caught.value).endswith("--set data.columns.prompt=Question --set 'data.columns.completion=The Answer'")
    with pytest.raises(QspinError, match=r"columns of format alpaca\. Columns found: .* Needed: alpaca \(instr"):
        load(path, format="alpaca")
    with pytest.raises(QspinError, match=r"columns of format columns\. Columns found: .* \(ask, told\)"):
        load(path, columns={"prompt": "ask", "completion": "told"})
    for options, missing in (({"columns": {"prompt": "ask"}}, "completion"), ({"format": "columns"}, "prompt is not")):
        with pytest.raises(QspinError, match=rf"^data\.columns\.{missing}.* set: data\.columns names a prompt and a"):
            load(path, **options)


# --- columns that are named ---


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


def test_reasons_can_be_written_as_they_are(tmp_path: Path) -> None:
    good = {"prompt": "Hi", "completion": "Hello."}
    row = {"prompt": ["\ud800" * 5000, {"\ud800": [[[[[[[[[1]]]]]]]]]}], "completion": "x"}
    (reject,) = load(write_jsonl(tmp_path, good, row)).rejects
    assert list(reject.to_json()) == ["line", "code", "reason", "malformed"]
    assert len(json.dumps(reject.to_json(), ensure_ascii=False).encode()) < 300


# --- what is not read ---


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
