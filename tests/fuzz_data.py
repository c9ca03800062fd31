"""Fuzzes the reader of data files, guided by coverage: whatever a file holds, it ends in rows or in one clear line.

    python -m venv /tmp/fuzz && /tmp/fuzz/bin/pip install atheris pyarrow
    PYTHONPATH=. /tmp/fuzz/bin/python tests/fuzz_data.py -max_total_time=600 [CORPUS FOLDER]

Options are libFuzzer's. It stops at the first input that ends in anything else and leaves it in a file crash-*, which
`python tests/fuzz_data.py crash-…` tries again. An input's first byte says how the rest is read: as a file of one of
the types, or as choices from which rows are made: conversations with something wrong in them, or any JSON.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from qspin import data, errors, formats, sources
from qspin.data import load_records
from qspin.errors import QspinError
from qspin.formats import FORMATS
from qspin.records import Message, Role
from qspin.sources import READERS

MODULES = (data, formats, sources, errors)  # whose branches guide it
KEYS = ["messages", "conversations", "role", "content", "from", "value", "type", "text", "id", "tools", "tool_calls",
        "instruction", "input", "output", "prompt", "completion", "response", "question", "answer"]  # fmt: skip
WORDS = [
    "user",
    "assistant",
    "system",
    "human",
    "gpt",
    "tool",
    "text",
    "Hi",
    " ",
    "",
    "\0",
    "\ud800",
    "\u202e",
    "row-1",
]


def judge(path: Path, **options: Any) -> bool:
    """Reads a file and looks at what came of it; whether rows did."""
    settings: dict[str, Any] = {
        "split": "train", "config": None, "format": "auto", "columns": {}, "turns": "last", "limit": None,
    }  # fmt: skip
    try:
        dataset = load_records(str(path), **{**settings, **options})
    except QspinError as error:
        text = str(error)
        assert text.startswith(f"{path}: "), text
        assert text.isprintable(), text
        assert len(text) < 2000, text
        return False
    for reject in dataset.rejects:
        assert reject.reason.isprintable() and len(reject.reason) < 600, reject
    for note in dataset.notes:
        assert note.isprintable() and len(note) < 600, note
    assert dataset.rows == len(dataset.records) + len(dataset.rejects)
    assert len({record.id for record in dataset.records}) == len(dataset.records) > 0
    assert len({(record.prompt, record.completion) for record in dataset.records}) == len(dataset.records)
    for good in dataset.records:
        turns = [*good.prompt, Message("assistant", good.completion)]
        assert all(turn.content == turn.content.strip() != "" for turn in turns)
        assert "".join(turn.content for turn in turns).encode("utf-8")
        spoken = [turn.role for turn in turns if turn.role != "system"]
        assert spoken == ["user", "assistant"] * (len(spoken) // 2)
        assert {turn.role for turn in turns} <= set(get_args(Role))
    if path.suffix == ".jsonl" and not path.read_bytes().lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        lines = path.read_bytes().split(b"\n")
        for good in dataset.records:
            line = lines[good.place.number - 1].decode("utf-8-sig")
            json.loads(line, object_pairs_hook=_unique, parse_constant=_constant)
    return True


def _unique(pairs: list[tuple[str, Any]]) -> None:
    assert len(dict(pairs)) == len(pairs), "a good row has a key twice"


def _constant(name: str) -> None:
    raise AssertionError(f"a good row has {name}")


def _value(choices: Any, depth: int = 4) -> Any:
    """Any JSON value, of the words that make conversations more often than of others."""
    kind = choices.ConsumeIntInRange(0, 7 if depth else 4)
    if kind == 0:
        return choices.PickValueInList([None, True, False, 0, -1, 2**70, 0.5, float("nan"), float("inf")])
    if kind == 1:
        return choices.ConsumeUnicode(6)
    if kind <= 4:
        return choices.PickValueInList(WORDS)
    size = choices.ConsumeIntInRange(0, 3)
    if kind == 5:
        return [_value(choices, depth - 1) for _ in range(size)]
    return {choices.PickValueInList(KEYS): _value(choices, depth - 1) for _ in range(size)}


def _mutated(choices: Any, value: Any) -> Any:
    """A value with another in its place, or somewhere in it."""
    if not isinstance(value, dict | list) or not value or choices.ConsumeProbability() < 0.1:
        return _value(choices)
    copy = value.copy()
    at = choices.PickValueInList(list(value) if isinstance(value, dict) else list(range(len(value))))
    copy[at] = _mutated(choices, value[at])
    return copy


def _row(choices: Any) -> Any:
    """A row as people have them, with up to three mistakes, and at times a name."""
    row = choices.PickValueInList(_real_rows())
    if choices.ConsumeBool():
        row = {
            **row,
            choices.PickValueInList(["id", "prompt_id"]): choices.PickValueInList(["row-2", "a", "", 2, None]),
        }
    for _ in range(choices.ConsumeIntInRange(0, 3)):
        row = _mutated(choices, row)
    return row


def _real_rows() -> list[dict[str, Any]]:
    """One of each format, with two turns where it has turns, and more of those with turns."""
    user, system = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Hi"}
    turns = [user, {"role": "assistant", "content": "Hello."}]
    shared = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]
    columns: dict[str, Any] = {"messages": turns, "conversations": shared}
    rows = [{key: columns.get(key, key) for key in format.keys} for format in FORMATS]
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, turns[1]]
    more = [[system, *turns, *turns], [*turns, user], [*turns, {**turns[1], "tool_calls": None}], parts]
    return [*rows, *({"messages": talk} for talk in more), {"prompt": [user], "completion": [turns[1]]}]


def _seeds(folder: Path) -> None:
    """A small file of each type, in each format; without them the fuzzer would spend its time on inventing braces."""
    rows = _real_rows()
    files = {".jsonl": "\n".join(map(json.dumps, rows)), ".json": json.dumps(rows)}
    for index, format in enumerate(FORMATS[2:]):
        files[f".csv {index}"] = f"{','.join(format.keys)},id\n" + 'a,"b\nc",1\n' * 2
    for name, text in files.items():
        kind = list(READERS).index(name.split()[0])
        (folder / f"seed{name}").write_bytes(bytes([kind]) + text.encode())
    for kind in (4, 7):
        (folder / f"seed choices {kind}").write_bytes(bytes([kind, *range(200)]))
    import pyarrow
    import pyarrow.parquet

    for name, row in {"texts": rows[3], "turns": rows[0]}.items():
        path = folder / f"seed {name}"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row] * 3), path)
        path.write_bytes(bytes([list(READERS).index(".parquet")]) + path.read_bytes())


@contextlib.contextmanager
def _dictionary() -> Iterator[str]:
    with tempfile.NamedTemporaryFile("w", suffix=".dict") as file:
        words = [*KEYS, *WORDS[:7], "\\xef\\xbb\\xbf", "\\\\ud800", "\\\\u0000", "NaN", "Infinity", "1e999", "null"]
        file.writelines(f'"{word}"\n' for word in words)
        file.writelines(f'"\\"{key}\\":"\n' for key in KEYS)
        file.flush()
        yield file.name


def main() -> None:
    import atheris

    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name, _dictionary() as dictionary:
        folder = Path(name)
        seeds = folder / "seeds"
        seeds.mkdir()
        _seeds(seeds)
        suffixes = list(READERS)

        def test(content: bytes) -> None:
            kind, content = (content[0] if content else 0), content[1:]
            format = [*(format.name for format in FORMATS), "auto"][kind // 8 % 8 - 1]
            options = {"format": format, "turns": ("last", "first")[kind // 64 % 2]}
            if kind % 8 < len(suffixes):
                path = folder / f"any{suffixes[kind % 8]}"
            else:
                path = folder / "any.jsonl"
                choices = atheris.FuzzedDataProvider(content)
                make = _row if kind % 8 < 7 else _value
                rows = [make(choices) for _ in range(choices.ConsumeIntInRange(1, 4))]
                content = "\n".join(map(json.dumps, rows)).encode()
            path.write_bytes(content)
            judge(path, **options)

        given = sys.argv[1:]
        crashes = [argument for argument in given if Path(argument).is_file()]
        functions = [value for module in MODULES for value in vars(module).values() if inspect.isfunction(value)]
        for function in {*functions, *(format.turns for format in FORMATS)}:
            if function.__module__.startswith("qspin."):
                atheris.instrument_func(function)
        atheris.Setup([sys.argv[0], f"-dict={dictionary}", *given, *([] if crashes else [str(seeds)])], test)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
