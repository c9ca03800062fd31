"""Files and hub data sets → raw rows, each with its place; what can't be read as a row says why in its place.

JSON and CSV are read with the standard library, so that every row is judged on its own and its line is known.
"""

from __future__ import annotations

import contextlib
import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from reprlib import Repr
from typing import Any

from qspin.errors import QspinError, one_line
from qspin.records import Place

PACKED = {  # how a file begins that a program has packed
    b"\x1f\x8b": "gzip",
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\0": "xz",
    b"BZh": "bzip2",
}
LONGEST = 2**24  # bytes of a line of JSON, characters of a record of CSV: a row is no library


class BadRow(Exception):
    """Why a row is left out. Readers hand one on in place of a row that they could not read."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(code, reason)
        self.code, self.reason = code, reason


_repr = Repr()
_repr.maxlevel = 3  # six levels of six, as is its custom, make a reason of megabytes


def short(value: object) -> str:
    """A value as Python writes it, abridged, for a message."""
    return one_line(_repr.repr(value))


Object = dict[str, Any]
Row = tuple[Place, Object | BadRow]


def file_rows(path: Path) -> Iterator[Row]:
    """The rows of a JSONL, JSON, CSV or Parquet file, read as they are asked for.

    Raises:
        QspinError: there is no such file, or its ending is none of those.
    """
    if path.is_dir():
        raise QspinError(f"{path}: is not a file; name one in it")
    if path.exists() and not path.is_file():
        raise QspinError(f"{path}: is a pipe or a device, and rows are read more than once; save them as a file")
    if not path.exists():
        where = "" if path.is_absolute() else ", which is relative to the folder you are in"
        raise QspinError(f"{path}: no such file; check the path{where}")
    if path.suffix.lower() not in READERS:
        known = ", ".join(READERS)
        ending = f"{path.suffix} is not" if path.suffix else "no extension, which must be"
        raise QspinError(f"{path}: {ending} one of {known}; unpack, convert or rename it")
    return READERS[path.suffix.lower()](path)


def hub_rows(repo: str, split: str, config: str | None) -> Iterator[Row]:
    """The rows of a data set on the hub, or of its copy in the cache.

    Raises:
        QspinError: the hub can't be reached or has no such data set, split or configuration for us.
    """
    import datasets
    import httpx
    import huggingface_hub

    Refused = (OSError, ValueError, RuntimeError, ImportError, httpx.HTTPError, datasets.exceptions.DatasetsError)
    try:
        if not datasets.config.HF_HUB_OFFLINE:
            # fails at once, or in ten seconds, where load_dataset would retry for half a minute and more
            api = huggingface_hub.HfApi(endpoint=datasets.config.HF_ENDPOINT)
            api.dataset_info(repo, timeout=10, expand=["sha"])
        yield from _in_turn(datasets.load_dataset(repo, config, split=split))
    except Refused as error:
        if "scripts are no longer supported" in str(error):
            raise QspinError(
                f"{repo}: is a hub data set with a loader script, and programs of strangers are not run; choose one "
                f"that is stored as files, or download its files and name one of them ({one_line(error)})"
            ) from None
        raise QspinError(
            f"{repo}: no such file, and split {split!r} of that hub data set cannot be loaded ({one_line(error)}); "
            f"check its name, data.split, data.config and the connection; HF_HUB_OFFLINE=1 uses a cached copy"
        ) from None


def _lines(path: Path, longest: int = -1) -> Iterator[tuple[int, str | None]]:
    """Each line with its number; None for a line of more bytes than `longest`, which is skipped."""
    number, offset = 1, 0
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(iter(lambda: file.readline(longest), b""), 1):
                if offset == 0 and b"\0" in raw[:2]:
                    reason = "it has a NUL, as UTF-16 and UTF-32 have"
                    raise UnicodeDecodeError("utf-8", raw, raw.index(b"\0"), 1, reason)
                if len(raw) == longest and not raw.endswith(b"\n"):
                    while (more := file.readline(longest)) and not more.endswith(b"\n"):
                        pass
                    yield number, None
                else:
                    text = raw.decode("utf-8")
                    yield number, text.removeprefix("\ufeff") if offset == 0 else text
                offset = file.tell()
    except UnicodeDecodeError as error:
        if packed := _packed_by(path):
            raise QspinError(f"{path}: is compressed ({packed}); unpack it") from None
        where = f"line {number}, byte offset {offset + error.start}"
        raise QspinError(f"{path}: {where}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _packed_by(path: Path) -> str | None:
    """What compressed a file, whatever its name says."""
    with path.open("rb") as file:
        head = file.read(max(map(len, PACKED)))
    return next((name for magic, name in PACKED.items() if head.startswith(magic)), None)


def _begins_with_a_bracket(path: Path) -> bool:
    """Whether the first character is one, white space aside, however long its line is."""
    try:
        with path.open("rb") as file:
            blocks = (block.lstrip(b"\xef\xbb\xbf \t\r\n") for block in iter(lambda: file.read(2**16), b""))
            return next(filter(None, blocks), b"").startswith(b"[")
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> QspinError:
    return QspinError(f"{path}: cannot be read ({error.strerror}); check its permissions and the disk")


def _json_rows(path: Path) -> Iterator[Row]:
    """An object a line, or one array of objects, in .jsonl and .json alike."""
    if _begins_with_a_bracket(path):
        try:
            values = _parse_json("".join(line or "" for _, line in _lines(path)))
        except BadRow as error:
            if path.suffix.lower() == ".json":
                raise QspinError(f"{path}: {error.reason}; write it anew, or mend it there") from None
            # else the first line begins with a bracket, and is judged like any other
        else:
            yield from _in_turn(map(_as_row, values))
            return
    if path.suffix.lower() == ".json":
        _check_not_one_object(path)
    for number, line in _lines(path, LONGEST):
        place = Place(number)
        if line is None:
            yield place, BadRow("long-line", f"has {LONGEST} bytes or more")
        elif line.strip(" \t\r\n"):
            try:
                yield place, _as_row(_parse_json(line.rstrip("\r\n")))
            except BadRow as error:
                yield place, error


def _in_turn(rows: Iterable[Object | BadRow]) -> Iterator[Row]:
    return ((Place(number, "row"), row) for number, row in enumerate(rows, 1))


def _check_not_one_object(path: Path) -> None:
    """Rows under a key, as a program writes them that indents; else every line of them would be called broken."""
    if next((line for _, line in _lines(path) if line and line.strip()), "").strip() == "{":
        with contextlib.suppress(BadRow):
            value = _parse_json("".join(line or "" for _, line in _lines(path)))
            keys = ", ".join(map(short, islice(value, 20))) if isinstance(value, dict) else ""
            raise QspinError(
                f"{path}: is one object ({keys}), not one a line or an array of them; write its rows alone"
            )


def _as_row(value: object) -> Object | BadRow:
    return value if isinstance(value, dict | BadRow) else BadRow("not-an-object", f"is {short(value)}, not an object")


def _parse_json(text: str) -> Any:
    """With a BadRow in place of each object that Python would let pass though it has a key twice, or a NaN."""
    try:
        return json.loads(text, object_pairs_hook=_strict_object, parse_constant=_not_a_number)
    except json.JSONDecodeError as error:
        if text.strip() in {"{", "["}:
            raise BadRow("broken-json", "goes on in the next line; write each on a line of its own") from None
        line = f"line {error.lineno}, " if "\n" in text else ""
        raise BadRow("broken-json", f"is broken JSON: {error.msg}: {line}column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number of more digits than Python takes; nested too deep
        raise BadRow("broken-json", f"is broken JSON: {one_line(error)}") from None


def _strict_object(pairs: list[tuple[str, Any]]) -> Object | BadRow:
    value = dict(pairs)
    if len(value) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        return BadRow("repeated-key", f"has the key {short(key)} more than once in an object")
    return _flaw(list(value.values())) or value


def _flaw(value: object) -> BadRow | None:
    """What a hook put in place of a flawed value, however deep it is in lists."""
    if isinstance(value, list):
        return next(filter(None, map(_flaw, value)), None)
    return value if isinstance(value, BadRow) else None


def _not_a_number(name: str) -> BadRow:
    return BadRow("not-a-number", f"has {name}, which is not JSON")


def _csv_rows(path: Path) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than a long completion
    reader = csv.reader((line or "" for _, line in _lines(path)), strict=True)
    header: list[str] = []
    start = 1
    try:
        for fields in reader:
            if not any(fields):  # an empty line, or the commas that spreadsheets leave below the last row
                pass
            elif not header:
                header = fields
                _check_distinct(path, [name for name in header if name])
                if len(header) == 1 and re.search("[;\t|]", header[0]):
                    raise QspinError(
                        f"{path}: its only column is {short(header[0])}, so its fields seem to be divided by "
                        "semicolons, tabs or bars; save it with commas"
                    )
            elif sum(map(len, fields)) > LONGEST:
                yield Place(start), BadRow("long-line", f"has more than {LONGEST} characters")
            elif len(fields) == len(header):
                yield Place(start), dict(zip(header, fields, strict=True))
            else:
                yield Place(start), BadRow("field-count", f"has {len(fields)} fields, but the header has {len(header)}")
            start = reader.line_num + 1
    except csv.Error as error:
        if "new-line character" in str(error):  # Python's words for a CR without LF
            raise QspinError(f"{path}: line {start}: a line ends in CR alone, as on old Macs; save it anew") from None
        raise QspinError(
            f"{path}: line {start}: broken CSV, which hides where later rows begin ({error}); mend its quotes"
        ) from None


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_distinct(path, file.schema_arrow.names)
            if "arrow.json" in str(file.schema_arrow):  # its texts would keep their quotes
                raise QspinError(f"{path}: has columns of JSON inside Parquet; save it as JSON Lines")
            for batch in file.iter_batches(batch_size=1000):
                for row in batch.to_pylist():
                    number += 1
                    yield Place(number, "row"), row
    # KeyError: a time zone that nobody knows
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, KeyError) as error:
        raise QspinError(f"{path}: cannot be read after row {number} ({one_line(error)}); write it anew") from None


def _check_distinct(path: Path, names: Sequence[str]) -> None:
    name, times = Counter(names).most_common(1)[0] if names else ("", 1)
    if times > 1:
        raise QspinError(f"{path}: two columns are called {short(name)}; rename one")


READERS = {".jsonl": _json_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
