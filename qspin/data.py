"""Any supervised file or hub data set → Records, row by row, with a Reject for each row that is left out.

    dataset = load_records("mine.jsonl", format="auto", limit=1000)
    check_malformed_share(dataset, 0.05)
    train, heldout = split_heldout(dataset.records, rows=64, seed=0)

A row is good or it is rejected; nothing in it is guessed at or repaired. The completion is the last assistant turn
(or the first, by choice), earlier turns are the prompt, later ones are left out, and an empty system turn means none.
Each turn loses the whitespace around it: a model does not sample a completion's, and where it leads it would merge
into the template's last token. JSON and CSV are read with the standard library, so that every row is judged here and
its line is known.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from reprlib import repr as _short
from typing import Literal, NamedTuple

from qspin.errors import QspinError
from qspin.records import Message, Record, Reject, Role
from qspin.sources import READERS, BadRow, Object, Row, file_rows, hub_rows

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
    fingerprint: str  # SHA-256 of the records: the same under another name or file format
    rows: int  # that were judged: good ones and rejects


def load_records(
    source: str,
    *,
    split: str,
    config: str | None,
    format: str,
    columns: _Columns,
    turns: Literal["last", "first"],
    limit: int | None,
) -> Dataset:
    """Judge the rows of a file, or of a hub data set `owner/name`. The options are those of `DataConfig`.

    Prompts and completions lose the whitespace around them. Reading stops after `limit` good rows.

    Raises:
        QspinError: the source cannot be read, no format fits it, or no row is good.
    """
    path = Path(source).expanduser()
    if path.suffix.lower() in READERS or path.exists():
        rows = file_rows(path)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        rows = hub_rows(source, split, config)
    else:
        raise QspinError(f"{source}: no such file, and not a hub id (owner/name)")
    head = list(islice(rows, _LOOK_AHEAD))
    if not head:
        raise QspinError(f"{source}: holds no rows")
    shape = _choose_format(source, head, format, columns)
    records, rejects = _judge(chain(head, rows), shape, turns, limit)
    if not records:
        raise QspinError(f"{source}: none of its {len(rejects)} rows is good:\n{_most_common(rejects)}")
    fingerprint = hashlib.sha256()
    for record in records:
        fingerprint.update(
            f"{json.dumps(record.id)}{_canonical(record.prompt)}{json.dumps(record.completion)}\n".encode()
        )
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


class _Format(NamedTuple):
    name: str
    keys: tuple[str, ...]  # that every row of this format has
    turns: Callable[[Object], list[Message]]


def _judge(
    rows: Iterable[Row], shape: _Format, which: Literal["last", "first"], limit: int | None
) -> tuple[list[Record], list[Reject]]:
    records: list[Record] = []
    rejects: list[Reject] = []
    lines: dict[tuple[tuple[Message, ...], str], int] = {}
    ids = {""}
    # an id of our own shape may belong to a row that is yet to come
    unusable = re.compile(f"row-|.*{_BAD_CHARACTER.pattern}", re.DOTALL)
    for ordinal, (line, row) in enumerate(rows, 1):
        try:
            if isinstance(row, BadRow):
                raise row
            prompt, completion = _conversation(row, shape, which)
        except BadRow as bad:
            rejects.append(Reject(line, bad.code, bad.reason))
            continue
        first = lines.setdefault((prompt, completion), line)
        if first != line:
            rejects.append(Reject(line, "duplicate", f"says the same as line {first}", malformed=False))
            continue
        own = (str(row[key]) for key in ("id", "prompt_id") if type(row.get(key)) in {str, int})
        free = (id for id in own if id not in ids and not unusable.match(id))
        records.append(Record(next(free, f"row-{ordinal}"), prompt, completion, line))
        ids.add(records[-1].id)
        if len(records) == limit:
            break
    return records, rejects


def _conversation(row: Object, shape: _Format, which: Literal["last", "first"]) -> tuple[tuple[Message, ...], str]:
    """Prompt and completion of a row, if it is a conversation that a template can render and a model can learn."""
    for key in shape.keys:
        if key not in row:
            raise BadRow("missing-column", f"has no {key!r}")
    turns = [turn for turn in shape.turns(row) if turn.content or turn.role != "system"]
    if which == "first":
        answers = (number for number, turn in enumerate(turns, 1) if turn.role == "assistant")
        turns = turns[: next(answers, None)]
    while turns and turns[-1].role == "user":
        turns.pop()
    if not any(turn.role == "assistant" for turn in turns):
        raise BadRow("no-completion", "has no assistant turn")
    if not any(turn.role == "user" for turn in turns):
        raise BadRow("no-user-turn", "has no user turn")
    spoken = turns[1:] if turns[0].role == "system" else turns
    for number, turn in enumerate(spoken):
        if turn.role == "system":
            raise BadRow("misplaced-system", "has a system turn that is not the first turn")
        if turn.role == "assistant" and number == 0:
            raise BadRow("assistant-first", "begins with an assistant turn")
        if turn.role != ("user", "assistant")[number % 2]:
            raise BadRow("repeated-role", f"has two {turn.role} turns in a row")
        if not turn.content:
            where = "completion" if number == len(spoken) - 1 else "prompt"
            raise BadRow(f"empty-{where}", f"has an empty {turn.role} turn in its {where}")
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


def _choose_format(source: str, head: Sequence[Row], format: str, columns: _Columns) -> _Format:
    """What most rows of a sample fit; of equal ones, what most have the columns of; then the first of `_FORMATS`."""
    if columns or format == "columns":
        if format not in {"auto", "columns"} or not {"prompt", "completion"} <= columns.keys():
            raise QspinError("data.columns names a prompt and a completion column, with data.format auto or columns")
        candidates = [_pair("columns", columns["prompt"], columns["completion"], columns.get("system"))]
    else:
        candidates = [shape for shape in _FORMATS if format in {"auto", shape.name}]
    sample = head[:: -(-len(head) // _SAMPLE)]

    def misfits(shape: _Format) -> tuple[int, int]:
        codes = Counter(reject.code for reject in _judge(sample, shape, "last", None)[1] if reject.malformed)
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

    def turns(row: Object) -> list[Message]:
        answer = _text_or_turns(row[completion], completion, "assistant")
        if [turn.role for turn in answer] != ["assistant"]:
            raise BadRow("not-one-answer", f"{completion} is not one assistant turn")
        frame = row.get(system) if system else None
        before = [] if frame is None else [Message("system", _text(frame, str(system)))]
        return [*before, *_text_or_turns(row[prompt], prompt, "user"), *answer]

    return _Format(name, (prompt, completion), turns)


def _text_or_turns(value: object, column: str, role: Role) -> list[Message]:
    return _turns(value, column) if isinstance(value, list) else [Message(role, _text(value, column))]


def _alpaca(row: Object) -> list[Message]:
    instruction = _text(row["instruction"], "instruction")
    extra = "" if row.get("input") is None else _text(row["input"], "input")
    # an input does not stand in for an instruction that is missing
    prompt = f"{instruction}\n\n{extra}" if instruction and extra else instruction
    return [Message("user", prompt), Message("assistant", _text(row["output"], "output"))]


def _messages(row: Object) -> list[Message]:
    return _turns(row["messages"], "messages")


def _sharegpt(row: Object) -> list[Message]:
    return _turns(row["conversations"], "conversations", "from", "value", _SHAREGPT_ROLES)


def _turns(
    value: object, column: str, speaker: str = "role", words: str = "content", roles: Mapping[str, Role] = _ROLES
) -> list[Message]:
    if not isinstance(value, list):
        raise BadRow("not-a-list", f"{column} is {_short(value)}, not a list of turns")
    turns = []
    for number, turn in enumerate(value, 1):
        place = f"{column}, turn {number}"
        if not isinstance(turn, dict):
            raise BadRow("not-a-turn", f"{place} is {_short(turn)}, not an object with {speaker!r} and {words!r}")
        role = turn.get(speaker)
        if role is None:
            raise BadRow("missing-role", f"{place} has no {speaker!r}")
        if not isinstance(role, str) or role not in roles:
            raise BadRow("unknown-role", f"{place} has {speaker!r} {_short(role)}, not one of {', '.join(roles)}")
        turns.append(Message(roles[role], _text(_joined(turn.get(words), place), f"{place}, {words!r}")))
    return turns


def _joined(content: object, place: str) -> object:
    """A list of text parts as one text; anything else as it is."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise BadRow("not-text", f"{place} has a part that is not text: {_short(part)}")
    return "".join(part["text"] for part in content)


def _text(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise BadRow("not-text", f"{place} is {_short(value)}, not text")
    bad = _BAD_CHARACTER.search(value)
    if bad:
        raise BadRow("bad-character", f"{place} has the character {bad[0]!r}, which is not text")
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
