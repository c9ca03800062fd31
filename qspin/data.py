"""Any supervised file or hub data set → Records, row by row, with a Reject for each row that is left out.

    dataset = load_records("mine.jsonl", format="auto", limit=1000)
    check_malformed_share(dataset, 0.05)
    train, heldout = split_heldout(dataset.records, rows=64, seed=0)

A row is good or it is rejected; nothing in it is guessed at or repaired. The completion is the last assistant turn,
earlier turns are the prompt, later ones are left out, and an empty system turn means none. Each turn loses the
whitespace around it: a model does not sample a completion's, and where it leads it would merge into the template's
last token. JSON and CSV are read with the standard library, so that every row is judged here and its line is known.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from reprlib import repr as _short
from typing import Any, Literal, NamedTuple

from qspin.errors import QspinError
from qspin.records import Message, Record, Reject, Role

_LOOK_AHEAD = 20_000  # rows among which the format is sought, by looking at …
_SAMPLE = 1_000  # … so many, evenly spread

# NUL, or half of a surrogate pair: no tokenizer and no UTF-8 file takes it
_BAD_CHARACTER = re.compile("[\0\ud800-\udfff]")

_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
_ASSISTANTS: dict[str, Role] = dict.fromkeys(("gpt", "chatgpt", "model", "bot"), "assistant")
_SHAREGPT_ROLES: dict[str, Role] = {**_ROLES, "human": "user", **_ASSISTANTS}


_Columns = Mapping[Literal["prompt", "completion", "system"], str]


@dataclass(frozen=True)
class Dataset:
    """The good rows of a source in their order, the others with their reasons, and the format they were read in."""

    records: tuple[Record, ...]
    rejects: tuple[Reject, ...]
    format: str
    fingerprint: str  # SHA-256 of the records' content: the same under another name, id or file format
    rows: int  # that were judged: good ones and rejects


def load_records(
    source: str, *, split: str, config: str | None, format: str, columns: _Columns, limit: int | None
) -> Dataset:
    """Judge the rows of a file, or of a hub data set `owner/name`. The options are those of `DataConfig`.

    Prompts and completions lose the whitespace around them. Reading stops after `limit` good rows.

    Raises:
        QspinError: the source cannot be read, no format fits it, or no row is good.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() in _READERS or path.exists():
        name, rows = path.name, _file_rows(path)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        name, rows = source, _hub_rows(source, split, config)
    else:
        raise QspinError(f"{source}: no such file, and not a hub id (owner/name)")
    head = list(islice(rows, _LOOK_AHEAD))
    if not head:
        raise QspinError(f"{source}: holds no rows")
    shape = _choose_format(source, head, format, columns)
    records, rejects = _judge(chain(head, rows), shape, name, limit)
    if not records:
        raise QspinError(f"{source}: none of its {len(rejects)} rows is good:\n{_most_common(rejects)}")
    fingerprint = hashlib.sha256()
    for record in records:
        fingerprint.update(f"{_canonical(record.prompt)}{json.dumps(record.completion)}\n".encode())
    total = len(records) + len(rejects)
    return Dataset(tuple(records), tuple(rejects), shape.name, fingerprint.hexdigest(), total)


def check_malformed_share(dataset: Dataset, limit: float) -> None:
    """Raise if more than this share of the rows is malformed, which duplicates and over-long rows are not."""
    bad = [reject for reject in dataset.rejects if reject.malformed]
    if bad and len(bad) / dataset.rows > limit:
        allowed = f"data.max_malformed_share = {limit:g}"
        raise QspinError(
            f"{len(bad)} of {dataset.rows} rows are malformed, more than {allowed} allows:\n{_most_common(bad)}"
        )


def split_heldout(records: Sequence[Record], rows: int, seed: int) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """(train, held-out): so many records held out as nearly as whole prompts allow, and never more than a fifth.

    All records of a prompt fall on the same side. Prompts are held out in the order of a hash of (seed, prompt), so
    the rows' order does not matter, and rows that are added or removed move few others.

    Raises:
        QspinError: fewer than two records could be held out.
    """
    sizes = Counter(record.prompt for record in records)
    room = min(rows, len(records) // 5)
    chosen = set()
    for prompt in sorted(sizes, key=lambda prompt: hashlib.sha256(f"{seed}{_canonical(prompt)}".encode()).digest()):
        if sizes[prompt] <= room:
            chosen.add(prompt)
            room -= sizes[prompt]
    heldout = tuple(record for record in records if record.prompt in chosen)
    if len(heldout) < 2:
        raise QspinError(
            f"{len(records)} good rows with {len(sizes)} different prompts are too few to hold out two or more by "
            f"prompt and at most a fifth; add rows, or give data.heldout_source"
        )
    return tuple(record for record in records if record.prompt not in chosen), heldout


def remove_overlap(heldout: Sequence[Record], train: Sequence[Record]) -> tuple[tuple[Record, ...], int]:
    """The held-out records whose prompt is not trained on, and how many were dropped."""
    trained = {record.prompt for record in train}
    rest = tuple(record for record in heldout if record.prompt not in trained)
    return rest, len(heldout) - len(rest)


# --- judging rows ---


class _BadRow(Exception):
    """Why a row is left out. Readers hand one on in place of a row that they could not read."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(code, reason)
        self.code, self.reason = code, reason


_Object = dict[str, Any]
_Row = tuple[int, _Object | _BadRow]  # with its line; with its number where rows have no lines


class _Format(NamedTuple):
    name: str
    keys: tuple[str, ...]  # that every row of this format has
    turns: Callable[[_Object], list[Message]]


def _judge(rows: Iterable[_Row], shape: _Format, name: str, limit: int | None) -> tuple[list[Record], list[Reject]]:
    records: list[Record] = []
    rejects: list[Reject] = []
    lines: dict[tuple[tuple[Message, ...], str], int] = {}
    ids = {""}
    # an id of our own shape may belong to a line that is yet to come
    unusable = re.compile(f"{re.escape(name)}:|.*{_BAD_CHARACTER.pattern}", re.DOTALL)
    for line, row in rows:
        try:
            if isinstance(row, _BadRow):
                raise row
            prompt, completion = _conversation(row, shape)
        except _BadRow as bad:
            rejects.append(Reject(line, bad.code, bad.reason))
            continue
        first = lines.setdefault((prompt, completion), line)
        if first != line:
            rejects.append(Reject(line, "duplicate", f"says the same as line {first}", malformed=False))
            continue
        own = (str(row[key]) for key in ("id", "prompt_id") if type(row.get(key)) in {str, int})
        free = (id for id in own if id not in ids and not unusable.match(id))
        records.append(Record(next(free, f"{name}:{line}"), prompt, completion, line))
        ids.add(records[-1].id)
        if len(records) == limit:
            break
    return records, rejects


def _conversation(row: _Object, shape: _Format) -> tuple[tuple[Message, ...], str]:
    """Prompt and completion of a row, if it is a conversation that a template can render and a model can learn."""
    for key in shape.keys:
        if key not in row:
            raise _BadRow("missing-column", f"has no {key!r}")
    turns = [turn for turn in shape.turns(row) if turn.content or turn.role != "system"]
    while turns and turns[-1].role == "user":
        turns.pop()
    if not any(turn.role == "assistant" for turn in turns):
        raise _BadRow("no-completion", "has no assistant turn")
    if not any(turn.role == "user" for turn in turns):
        raise _BadRow("no-user-turn", "has no user turn")
    spoken = turns[1:] if turns[0].role == "system" else turns
    for number, turn in enumerate(spoken):
        if turn.role == "system":
            raise _BadRow("misplaced-system", "has a system turn that is not the first turn")
        if turn.role == "assistant" and number == 0:
            raise _BadRow("assistant-first", "begins with an assistant turn")
        if turn.role != ("user", "assistant")[number % 2]:
            raise _BadRow("repeated-role", f"has two {turn.role} turns in a row")
        if not turn.content:
            where = "completion" if number == len(spoken) - 1 else "prompt"
            raise _BadRow(f"empty-{where}", f"has an empty {turn.role} turn in its {where}")
    return tuple(turns[:-1]), turns[-1].content


def _most_common(rejects: Sequence[Reject]) -> str:
    """The three commonest reasons, a line each with an example."""
    examples = {reject.code: reject for reject in reversed(rejects)}
    counts = Counter(reject.code for reject in rejects).most_common(3)
    return "\n".join(
        f"  {count} {code}, as line {examples[code].line}: {examples[code].reason}" for code, count in counts
    )


def _canonical(prompt: tuple[Message, ...]) -> str:
    return json.dumps([[turn.role, turn.content] for turn in prompt])


# --- formats: one row → its turns ---


def _choose_format(source: str, head: Sequence[_Row], format: str, columns: _Columns) -> _Format:
    """What most rows of a sample fit; of equal ones, what most have the columns of; then the first of `_FORMATS`."""
    if columns or format == "columns":
        if format not in {"auto", "columns"} or not {"prompt", "completion"} <= columns.keys():
            raise QspinError("data.columns names a prompt and a completion column, with data.format auto or columns")
        candidates = [_pair("columns", columns["prompt"], columns["completion"], columns.get("system"))]
    else:
        candidates = [shape for shape in _FORMATS if format in {"auto", shape.name}]
    sample = head[:: -(-len(head) // _SAMPLE)]

    def misfits(shape: _Format) -> tuple[int, int]:
        codes = Counter(reject.code for reject in _judge(sample, shape, "", None)[1] if reject.malformed)
        return codes.total(), codes["missing-column"]

    best = min(candidates, key=misfits)  # of equal ones, the first
    objects = [row for _, row in sample if isinstance(row, dict)]
    if objects and misfits(best)[1] == len(objects):
        found = ", ".join(repr(key) for key in islice(dict.fromkeys(chain.from_iterable(objects)), 20))
        wanted = "a known format" if len(candidates) > 1 else f"format {best.name}"
        needed = "; ".join(f"{shape.name} ({', '.join(shape.keys)})" for shape in candidates)
        raise QspinError(
            f"{source}: no row has the columns of {wanted}. "
            f"Columns found: {found or 'none'}. Needed: {needed}. Choose a format with --format, or name the columns: "
            f"--set data.columns.prompt=NAME --set data.columns.completion=NAME"
        )
    return best


def _pair(name: str, prompt: str, completion: str, system: str | None = None) -> _Format:
    """A column of prompts and one of completions: texts, or lists of turns as TRL has them."""

    def turns(row: _Object) -> list[Message]:
        answer = _text_or_turns(row[completion], completion, "assistant")
        if [turn.role for turn in answer] != ["assistant"]:
            raise _BadRow("not-one-answer", f"{completion} is not one assistant turn")
        frame = row.get(system) if system else None
        before = [] if frame is None else [Message("system", _text(frame, str(system)))]
        return [*before, *_text_or_turns(row[prompt], prompt, "user"), *answer]

    return _Format(name, (prompt, completion), turns)


def _text_or_turns(value: object, column: str, role: Role) -> list[Message]:
    return _turns(value, column) if isinstance(value, list) else [Message(role, _text(value, column))]


def _alpaca(row: _Object) -> list[Message]:
    instruction = _text(row["instruction"], "instruction")
    extra = "" if row.get("input") is None else _text(row["input"], "input")
    # an input does not stand in for an instruction that is missing
    prompt = f"{instruction}\n\n{extra}" if instruction and extra else instruction
    return [Message("user", prompt), Message("assistant", _text(row["output"], "output"))]


def _messages(row: _Object) -> list[Message]:
    return _turns(row["messages"], "messages")


def _sharegpt(row: _Object) -> list[Message]:
    return _turns(row["conversations"], "conversations", "from", "value", _SHAREGPT_ROLES)


def _turns(
    value: object, column: str, speaker: str = "role", words: str = "content", roles: Mapping[str, Role] = _ROLES
) -> list[Message]:
    if not isinstance(value, list):
        raise _BadRow("not-a-list", f"{column} is {_short(value)}, not a list of turns")
    turns = []
    for number, turn in enumerate(value, 1):
        place = f"{column}, turn {number}"
        if not isinstance(turn, dict):
            raise _BadRow("not-a-turn", f"{place} is {_short(turn)}, not an object with {speaker!r} and {words!r}")
        role = turn.get(speaker)
        if role is None:
            raise _BadRow("missing-role", f"{place} has no {speaker!r}")
        if not isinstance(role, str) or role not in roles:
            raise _BadRow("unknown-role", f"{place} has {speaker!r} {_short(role)}, not one of {', '.join(roles)}")
        turns.append(Message(roles[role], _text(_joined(turn.get(words), place), f"{place}, {words!r}")))
    return turns


def _joined(content: object, place: str) -> object:
    """A list of text parts as one text; anything else as it is."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise _BadRow("not-text", f"{place} has a part that is not text: {_short(part)}")
    return "".join(part["text"] for part in content)


def _text(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise _BadRow("not-text", f"{place} is {_short(value)}, not text")
    bad = _BAD_CHARACTER.search(value)
    if bad:
        raise _BadRow("bad-character", f"{place} has the character {bad[0]!r}, which is not text")
    return value.strip()


_FORMATS = (
    _Format("messages", ("messages",), _messages),
    _Format("sharegpt", ("conversations",), _sharegpt),
    _Format("alpaca", ("instruction", "output"), _alpaca),
    _pair("prompt-completion", "prompt", "completion"),
    _pair("prompt-response", "prompt", "response"),
    _pair("instruction-response", "instruction", "response"),
    _pair("question-answer", "question", "answer"),
)


# --- sources: a file or hub id → rows ---


def _file_rows(path: Path) -> Iterator[_Row]:
    if not path.is_file():
        raise QspinError(f"{path}: {'is not a file; name one in it' if path.exists() else 'no such file'}")
    if path.suffix.lower() not in _READERS:
        raise QspinError(f"{path}: {path.suffix or 'no extension'} is not one of {', '.join(_READERS)}")
    return _READERS[path.suffix.lower()](path)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    number, offset = 1, 0
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                text = raw.decode("utf-8")
                yield number, text.removeprefix("\ufeff") if offset == 0 else text
                offset += len(raw)
    except UnicodeDecodeError as error:
        where = f"line {number}, byte offset {offset + error.start}"
        raise QspinError(f"{path}: {where}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    except OSError as error:
        raise QspinError(f"{path}: cannot be read ({error.strerror})") from None


def _json_rows(path: Path) -> Iterator[_Row]:
    """An object a line, or one array of objects, in .jsonl and .json alike."""
    first = next((line.lstrip() for _, line in _lines(path) if line.strip()), "")
    if first.startswith("["):
        try:
            values = _parse_json("".join(line for _, line in _lines(path)))
        except _BadRow as error:
            if path.suffix.lower() == ".json":
                raise QspinError(f"{path}: {error.reason}") from None
            # else the first line begins with a bracket, and is judged like any other
        else:
            yield from ((number, _as_row(value)) for number, value in enumerate(values, 1))
            return
    for number, line in _lines(path):
        if line.strip(" \t\r\n"):
            try:
                yield number, _as_row(_parse_json(line))
            except _BadRow as error:
                yield number, error


def _as_row(value: object) -> _Object | _BadRow:
    return (
        value if isinstance(value, dict | _BadRow) else _BadRow("not-an-object", f"is {_short(value)}, not an object")
    )


def _parse_json(text: str) -> Any:
    """With a _BadRow in place of each object that Python would let pass though it has a key twice, or a NaN."""
    try:
        return json.loads(text, object_pairs_hook=_strict_object, parse_constant=_not_a_number)
    except (ValueError, RecursionError) as error:
        raise _BadRow("broken-json", f"is broken JSON: {error}") from None


def _strict_object(pairs: list[tuple[str, Any]]) -> _Object | _BadRow:
    value = dict(pairs)
    if len(value) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        return _BadRow("repeated-key", f"has the key {key!r} more than once in an object")
    return _flaw(list(value.values())) or value


def _flaw(value: object) -> _BadRow | None:
    """What a hook put in place of a flawed value, however deep it is in lists."""
    if isinstance(value, list):
        return next(filter(None, map(_flaw, value)), None)
    return value if isinstance(value, _BadRow) else None


def _not_a_number(name: str) -> _BadRow:
    return _BadRow("not-a-number", f"has {name}, which is not JSON")


def _csv_rows(path: Path) -> Iterator[_Row]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is less than a long completion
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    header: list[str] = []
    start = 1
    try:
        for fields in reader:
            if fields and not header:
                header = fields
                _check_distinct(path, [name for name in header if name])
            elif fields and len(fields) == len(header):
                yield start, dict(zip(header, fields, strict=True))
            elif fields:
                yield start, _BadRow("field-count", f"has {len(fields)} fields, but the header has {len(header)}")
            start = reader.line_num + 1
    except csv.Error as error:
        raise QspinError(f"{path}: line {start}: broken CSV, which hides where later rows begin ({error})") from None


def _parquet_rows(path: Path) -> Iterator[_Row]:
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
                    yield number, row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise QspinError(f"{path}: cannot be read after row {number} ({_one_line(error)})") from None


def _check_distinct(path: Path, names: Sequence[str]) -> None:
    if len(set(names)) < len(names):
        raise QspinError(f"{path}: two columns have the same name: {', '.join(names)}")


def _hub_rows(repo: str, split: str, config: str | None) -> Iterator[_Row]:
    import datasets
    import httpx
    import huggingface_hub

    Refused = (OSError, ValueError, RuntimeError, ImportError, httpx.HTTPError, datasets.exceptions.DatasetsError)
    try:
        if not datasets.config.HF_HUB_OFFLINE:
            # fails at once, or in ten seconds, where load_dataset would retry for half a minute and more
            api = huggingface_hub.HfApi(endpoint=datasets.config.HF_ENDPOINT)
            api.dataset_info(repo, timeout=10, expand=["sha"])
        yield from enumerate(datasets.load_dataset(repo, config, split=split), 1)
    except Refused as error:
        raise QspinError(
            f"{repo}: no such file, and split {split!r} of that hub data set cannot be loaded ({_one_line(error)}); "
            f"check its name, data.split, data.config and the connection; HF_HUB_OFFLINE=1 uses a cached copy"
        ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


_READERS = {".jsonl": _json_rows, ".json": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}
