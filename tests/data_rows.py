"""Rows of data as people write them, the files that tests put them into, and how tests read them back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qspin.config import DataConfig
from qspin.data import Dataset, load_records
from qspin.records import Message, Record

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello."}
SYSTEM = {"role": "system", "content": "Be kind."}
MORE = {"role": "user", "content": "More?"}
YES = {"role": "assistant", "content": "Yes."}
HI = (Message("user", "Hi"),)
KIND = (Message("system", "Be kind."), *HI)
TALK = (*KIND, Message("assistant", "Hello."), Message("user", "More?"))
ROWS = [
    {"prompt": "Hi", "completion": "Hello."},
    {"prompt": 'Say "a, b"\nplease', "completion": "a,\nb\u2028c é 😀"},
    {"prompt": "Hi", "completion": " "},
    {"prompt": "Bye", "completion": "See you."},
]
# of each format some rows: its name, the row, and the prompt and the completion that are read of it
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


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def record(id: str, prompt: str, completion: str) -> Record:
    return Record(id, (Message("user", prompt),), completion)


def codes(dataset: Dataset) -> list[tuple[int, str]]:
    return [(reject.place.number, reject.code) for reject in dataset.rejects]
