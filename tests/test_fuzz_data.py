"""Whatever a file holds, it ends in records and rejects or in one clear error, as `fuzz_data` judges it."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import SHARED_DATA
from data_rows import GOOD, ROWS, write_jsonl, write_parquet
from fuzz_data import KEYS, WORDS, judge
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qspin import data, formats, sources
from qspin.formats import FORMATS
from qspin.sources import READERS

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


FAULTS: dict[str, tuple[Any, str, Any, str]] = {
    "a row that is no object": (sources, "_as_row", lambda value: value, "3"),
    "a key twice": (sources, "_strict_object", dict, '{"prompt": "a", "prompt": "b", "completion": "c"}'),
    "NaN": (sources, "_not_a_number", float, '{"prompt": "a", "completion": "c", "score": NaN}'),
    "a reason that a terminal would obey": (sources, "short", str, '"\\u001b[2J"'),
    "a text with its white space": (formats, "_text", lambda text, _: text, '{"prompt": "a", "completion": " c"}'),
    "an id twice": (data, "_is_a_name", bool, '{"prompt": "a", "completion": "c", "id": "row-2"}'),
}


@pytest.mark.parametrize(("module", "name", "instead", "line"), FAULTS.values(), ids=FAULTS)
def test_the_judge_sees_a_fault_of_the_reader(
    module: ModuleType, name: str, instead: Any, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(line + '\n{"prompt": "Hi", "completion": "Hello."}\n')
    assert judge(path)
    monkeypatch.setattr(module, name, instead)
    with pytest.raises((AssertionError, AttributeError, TypeError)):
        judge(path)


def test_the_judge_takes_what_is_right(tmp_path: Path) -> None:
    assert judge(write_jsonl(tmp_path, *ROWS))
    assert not judge(tmp_path / "none.jsonl")
