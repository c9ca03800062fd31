"""What a reader makes of a file as a whole: lines too long, bytes that are no text, columns that change, a script."""

from __future__ import annotations

import datetime
import decimal
import json
import re
from pathlib import Path
from typing import Any

import pytest

from qspin import sources
from qspin.errors import QspinError, one_line
from qspin.sources import BadRow, Row, file_rows, short

ROW = {"prompt": "Hi", "completion": "Hello."}


def rows(path: Path) -> list[tuple[int, object]]:
    """Each row, or the code of what is wrong with it."""
    return [(place.number, row.code if isinstance(row, BadRow) else row) for place, row in file_rows(path)]


def reason(found: list[Row]) -> str:
    (bad,) = (row.reason for _, row in found if isinstance(row, BadRow))
    return bad


# --- lines ---


@pytest.fixture
def short_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LONGEST", 100)


@pytest.mark.usefixtures("short_lines")
@pytest.mark.parametrize("length", [100, 101, 199, 200, 201, 1000])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_over_the_cap_is_left_out_and_the_next_is_read(tmp_path: Path, length: int, end: str) -> None:
    path = tmp_path / "rows.jsonl"
    fits = json.dumps({"prompt": "x" * (100 - len('{"prompt": ""}') - len(end))})
    assert len(fits + end) == 100  # its end is read along with it
    over = json.dumps({"prompt": "x" * (length - len('{"prompt": ""}'))})
    path.write_text(end.join([fits, over, json.dumps(ROW), over]), newline="")
    assert rows(path) == [(1, json.loads(fits)), (2, "long-line"), (3, ROW), (4, "long-line")]
    assert next(row.reason for _, row in file_rows(path) if isinstance(row, BadRow)) == "has 100 bytes or more"


@pytest.mark.usefixtures("short_lines")
def test_bytes_are_counted_on_past_a_line_over_the_cap(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"x" * 250 + b"\n" + json.dumps(ROW).encode() + b"\n" + b"ab\xff\n")
    with pytest.raises(QspinError, match=f"line 3, byte offset {251 + len(json.dumps(ROW)) + 1 + 2}: not UTF-8"):
        rows(path)


@pytest.mark.usefixtures("short_lines")
def test_an_array_may_be_one_long_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps([ROW] * 20))
    assert rows(path) == [(number, ROW) for number in range(1, 21)]
    path.write_text("\ufeff" + " \n" * 40_000 + json.dumps([ROW] * 20))  # past the first block that is looked at
    assert rows(path) == [(number, ROW) for number in range(1, 21)]


@pytest.mark.usefixtures("short_lines")
def test_a_record_of_csv_over_the_cap_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\nHi,"{}"\nHi,"{}"\nHi,Hello.\n'.format("x" * 98, "x\n" * 60))
    assert rows(path) == [(2, {"prompt": "Hi", "completion": "x" * 98}), (3, "long-line"), (64, ROW)]


def test_the_cap_is_no_less_than_a_book(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    book = {"prompt": "Hi", "completion": "word " * 2_000_000}
    path.write_text(json.dumps(book) + "\n" + json.dumps({"completion": "x" * 2**24}) + "\n")
    assert rows(path) == [(1, book), (2, "long-line")]


@pytest.mark.parametrize("depth", [50, 900, 5_000, 200_000])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_however_deep_a_line_is_nested_it_is_read_or_left_out(tmp_path: Path, depth: int, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    lines = [json.dumps(ROW)]
    lines += ['{"a":' * depth + "1" + "}" * depth, '{"a": ' + "[" * depth + "]" * depth + "}", json.dumps(ROW)]
    path.write_text("\n".join(lines))
    found = rows(path)
    assert [line for line, _ in found] == [1, 2, 3, 4]
    assert (found[0][1], found[3][1]) == (ROW, ROW)
    told = {"broken-json" if row == "broken-json" else "read" for _, row in found[1:3]}
    assert depth == 5_000 or told == {"read" if depth < 5_000 else "broken-json"}  # between them Pythons differ


def test_a_type_that_changes_in_mid_file_is_judged_row_by_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    values: list[Any] = ["Hi", 3, None, ["Hi"], {"a": 1}, True, 1.5, "Hi"]
    path.write_text("".join(json.dumps({"prompt": value}) + "\n" for value in values))
    assert rows(path) == [(number, {"prompt": value}) for number, value in enumerate(values, 1)]


def test_reasons_are_short_and_on_one_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    key = "k\n\x1b[31m" * 10_000
    path.write_text(json.dumps(ROW) + "\n" + f'{{"a": 1, {json.dumps(key)}: 1, {json.dumps(key)}: 2}}\n')
    said = reason(list(file_rows(path)))
    assert len(said) < 100
    assert said.isprintable()
    nested: Any = "x" * 1000
    for _ in range(6):
        nested = [nested] * 6
    assert len(short(nested)) <= 300
    assert short("\n\x1b[31m\u202e") == r"'\n\x1b[31m\u202e'"
    assert one_line(ValueError("a\n\n  b\x1b\u202e\x00")) == r"a b\x1b\u202e\x00"
    assert one_line(TimeoutError()) == "TimeoutError"


# --- files that can't be opened ---


@pytest.mark.parametrize("suffix", sources.READERS)
def test_a_file_that_breaks_off_while_it_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    path.symlink_to("/proc/self/mem")  # opens, and fails to read where no memory is
    if not path.is_file():
        pytest.skip("Linux has this file")
    with pytest.raises(QspinError) as caught:
        rows(path)
    assert re.fullmatch(
        rf"{re.escape(str(path))}: cannot be read .*(Input/output error|size is 0).*; .*", str(caught.value)
    )


def test_names_that_no_file_can_have(tmp_path: Path) -> None:
    from qspin.data import load_records

    for source in ("x" * 5000 + ".jsonl", str(tmp_path / ("x" * 300)), "a\0b.jsonl", "a\0b", "", "."):
        with pytest.raises(QspinError) as caught:
            load_records(source, split="train", config=None, format="auto", columns={}, turns="last", limit=None)
        assert "\n" not in str(caught.value)


def test_a_local_folder_with_a_loader_script_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "scripted"
    folder.mkdir()
    (folder / "scripted.py").write_text("raise SystemExit('run')")
    with pytest.raises(QspinError) as caught:
        rows(folder)
    assert str(caught.value) == f"{folder}: is not a file; name one in it"
    with pytest.raises(QspinError) as caught:
        rows(folder / "scripted.py")
    assert str(caught.value).startswith(f"{folder / 'scripted.py'}: .py is not one of .jsonl")


# --- Parquet ---


def test_whatever_type_a_column_has_it_is_read_or_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    ns = pa.array([1], pa.timestamp("ns"))
    columns: dict[str, Any] = {
        "decimal": pa.array([decimal.Decimal("1.5")]),
        "date": pa.array([datetime.date(2020, 1, 1)]),
        "nanoseconds": ns,
        "zone": pa.array([1], pa.timestamp("us", tz="Europe/Berlin")),
        "no zone": pa.array([1], pa.timestamp("us", tz="Nowhere/Atlantis")),
        "year 300000": pa.array([2**53], pa.timestamp("ms")),
        "duration": pa.array([2**62], pa.duration("us")),
        "bytes": pa.array([b"\xff"]),
        "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
        "words": pa.array(["a"]).dictionary_encode(),
        "nothing": pa.nulls(1),
        "nan": pa.array([float("nan")]),
        "large": pa.array([[["x"]]], pa.large_list(pa.list_(pa.large_string()))),
        "not UTF-8": pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers()),
    }
    for name, column in columns.items():
        path = tmp_path / "rows.parquet"
        pq.write_table(pa.table({"prompt": ["Hi"], "completion": ["Hello."], name: column}), path)
        try:
            ((place, row),) = file_rows(path)
        except QspinError as error:
            assert str(error).startswith(f"{path}: cannot be read after row "), name
            assert "\n" not in str(error)
        else:
            assert isinstance(row, dict)
            assert (str(place), row["prompt"], row["completion"]) == ("row 1", "Hi", "Hello."), name
