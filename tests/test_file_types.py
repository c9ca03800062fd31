"""JSONL, JSON, CSV and Parquet: the same rows from each; a row or a file of it that can't be read is told exactly."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
from data_rows import ASSISTANT, HI, ROWS, USER, codes, load, record, write_jsonl, write_parquet

from qspin.errors import QspinError
from qspin.records import Place, Record, Reject


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


# --- rows ---


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


def test_surrogate_pairs_are_text(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, '{"prompt": "Hi", "completion": "\\ud83d\\ude00"}\n')
    assert load(path).records == (record("row-1", "Hi", "😀"),)


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


def test_empty_records_of_csv_are_no_rows(tmp_path: Path) -> None:
    """Spreadsheets write commas alone for cells that were cleared, above the header and below the last row."""
    path = tmp_path / "r.csv"
    path.write_text(',,\r\nprompt,completion,\r\nHi,Hello.,\r\n,,\r\nHi,Bye.,\r\n"","",\r\n,,,,\r\n' + ",,\r\n" * 40)
    dataset = load(path)
    assert dataset.records == (record("row-1", "Hi", "Hello."), record("row-2", "Hi", "Bye."))
    assert dataset.rejects == ()


def test_nested_columns_of_parquet(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [USER, ASSISTANT], "id": 4},
        {"messages": [USER, {"role": "assistant", "content": None}], "id": 5},
        {"messages": None, "id": None},
    ]
    dataset = load(write_parquet(tmp_path / "r.parquet", rows))
    assert dataset.records == (Record("4", HI, "Hello."),)
    assert codes(dataset) == [(2, "not-text"), (3, "not-a-list")]


# --- files ---


def zipped(content: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.jsonl", content)
    return stream.getvalue()


PAIRS = b"".join(b'{"prompt": "What is %d?", "completion": "%d"}\n' % (n, 7 * n) for n in range(50))
FATAL_FILES = [
    ("e.jsonl", b"", "holds no rows; check that it was written to its end"),
    ("e.jsonl", b"\xef\xbb\xbf\n \n", "holds no rows; check that it was written to its end"),
    ("e.json", b"[]", "holds no rows; check that it was written to its end"),
    ("e.json", b" \n", "holds no rows; check that it was written to its end"),
    ("e.csv", b"", "holds no rows; check that it was written to its end"),
    ("e.csv", b"prompt,completion\n", "holds no rows; check that it was written to its end"),
    ("e.jsonl", b"{\n[]\n", "none of its 2 rows is good: "
     "1 broken-json (line 1 goes on in the next line; write each on a line of its own), "
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
    ("e.jsonl", gzip.compress(PAIRS), "is compressed (gzip); unpack it"),
    ("e.json", zipped(PAIRS), "is compressed (zip); unpack it"),
    ("e.jsonl", b"\x28\xb5\x2f\xfd\x04\x58\xa9\x00", "is compressed (zstd); unpack it"),
    ("e.csv", lzma.compress(PAIRS), "is compressed (xz); unpack it"),
    ("e.jsonl", bz2.compress(PAIRS), "is compressed (bzip2); unpack it"),
    ("e.csv", b"prompt,completion\nBZh,\xff\n",
     "line 2, byte offset 22: not UTF-8 (invalid start byte); save the file as UTF-8"),
    ("e.json", b'[{"prompt": "Hi"', "is broken JSON: Expecting ',' delimiter: column 17; "
     "write it anew, or mend it there"),
    ("e.json", b'{\n "data": [\n  {"prompt": "Hi"}\n ],\n "n": 1\n}\n',
     "is one object ('data', 'n'), not one a line or an array of them; write its rows alone"),
    ("e.csv", b'prompt,completion\na,b\na,"b\nc,d\n',
     "line 3: broken CSV, which hides where later rows begin (unexpected end of data); mend its quotes"),
    ("e.csv", b'prompt,completion\na,"b"c\n',
     "line 2: broken CSV, which hides where later rows begin (',' expected after '\"'); mend its quotes"),
    ("e.csv", b"prompt,completion\ra,b\r", "line 1: a line ends in CR alone, as on old Macs; save it anew"),
    ("e.csv", b"prompt,completion,prompt\na,b,c\n", "two columns are called 'prompt'; rename one"),
    ("e.parquet", b"", "cannot be read after row 0 (Parquet file size is 0 bytes); write it anew"),
    ("e.txt", b"Hi", ".txt is not one of .jsonl, .json, .csv, .parquet; unpack, convert or rename it"),
    ("rows", b"{}", "no extension, which must be one of .jsonl, .json, .csv, .parquet; unpack, convert or rename it"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), FATAL_FILES)
def test_a_file_that_cannot_be_used(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(QspinError) as caught:
        load(path)
    assert str(caught.value) == f"{path}: {message}"


@pytest.mark.parametrize("mark", [";", "\t", "|"])
@pytest.mark.parametrize("row", ["Hi{}Hello.", "Hi, you{}Hello."])
def test_another_mark_in_place_of_commas(row: str, mark: str, tmp_path: Path) -> None:
    path, header = tmp_path / "rows.csv", f"prompt{mark}completion"
    path.write_text(f"{header}\n{row.format(mark)}\n")
    with pytest.raises(QspinError) as caught:
        load(path)
    assert str(caught.value) == (
        f"{path}: its only column is {header!r}, so its fields seem to be divided by semicolons, tabs or bars; "
        "save it with commas"
    )


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
