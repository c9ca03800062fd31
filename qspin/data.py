"""Any supervised file or hub data set → Records, row by row, with a Reject for each row that is left out.

    options = {"split": "train", "config": None, "format": "auto", "columns": {}, "turns": "last", "limit": 1000}
    dataset = load_records("mine.jsonl", **options)
    check_rejects("mine.jsonl", dataset, strict=False, max_malformed_share=0.05)
    train, heldout = split_heldout("mine.jsonl", dataset.records, rows=64, seed=0)

A row is good or it is rejected; nothing in it is guessed at or repaired. The completion is the last assistant turn
(or the first, by choice), earlier turns are the prompt, later ones are left out, and an empty system turn means none.
Each turn loses the whitespace around it: a model does not sample a completion's, and where it leads it would merge
into the template's last token. JSON and CSV are read with the standard library, so that every row is judged here and
its place is known.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, combinations, islice
from pathlib import Path
from typing import Literal, NamedTuple

from qspin.errors import QspinError, one_line
from qspin.formats import FORMATS, INVISIBLE, Format, pair
from qspin.records import Message, Place, Record, Reject
from qspin.sources import READERS, BadRow, Object, Row, file_rows, hub_rows, short

_LOOK_AHEAD = 20_000  # rows among which the format is sought, by looking at …
_SAMPLE = 1_000  # … so many, evenly spread

_SHOWN = 6  # names, in a note
_SIDES = ("prompt", "completion")
_ASKING = ("prompt", "question", "instruction", "input", "query", "problem")  # what a column of prompts may be called

_IDS = ("id", "prompt_id")
_Columns = Mapping[Literal["prompt", "completion", "system"], str]


@dataclass(frozen=True)
class Dataset:
    """The good rows of a source in their order, the others with their reasons, and the format they were read in."""

    records: tuple[Record, ...]
    rejects: tuple[Reject, ...]
    format: str
    fingerprint: str  # SHA-256 of the records: the same under another name or file format
    rows: int  # that were judged: good ones and rejects
    cut: bool = False  # whether a limit left some unread, or in a long source may have
    notes: tuple[str, ...] = ()  # what is odd about good rows, for the user


class LeftOut(QspinError):
    """Too many rows can't be used; which, each with its source, is worth keeping."""

    def __init__(self, message: str, rejects: Sequence[tuple[str, Reject]]) -> None:
        super().__init__(message)
        self.rejects = list(rejects)


def of_source(source: str, rejects: Iterable[Reject]) -> list[tuple[str, Reject]]:
    """Rows that were left out, in their order, each with where it came from."""
    return [(source, reject) for reject in sorted(rejects, key=lambda reject: reject.place)]


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
    if not source.strip():
        raise QspinError("data.source is empty: give --data a file of prompts and answers, or a hub id")
    try:
        path = Path(source).expanduser()
        exists = path.exists()
    except (RuntimeError, OSError) as error:  # no such person's ~, a name too long, a folder that may not be read
        raise QspinError(f"{one_line(source)}: {one_line(error)}; check the path") from None
    if exists or path.suffix.lower() in READERS:
        rows = file_rows(path)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        rows = hub_rows(source, split, config)
    else:
        raise QspinError(f"{source}: no such file, and not a hub id (owner/name); check the path")
    head = list(islice(rows, _LOOK_AHEAD))
    if not head:
        raise QspinError(f"{source}: holds no rows; check that it was written to its end")
    shape = _choose_format(source, head, format, columns)
    records, rejects, repeated_ids, unread = _judge(chain(head, rows), shape, turns, limit)
    if not records:
        message = f"{source}: none of its {len(rejects)} rows is good: {most_common(rejects)}; mend them"
        raise LeftOut(message, of_source(source, rejects))
    fingerprint = hashlib.sha256()
    for record in records:
        fingerprint.update(
            f"{json.dumps(record.id)}{_canonical(record.prompt)}{json.dumps(record.completion)}\n".encode()
        )
    total = len(records) + len(rejects)
    notes = (*_on_unread(source, unread), *_on_ids(source, repeated_ids), *_on_invisible(source, records))
    cut = len(records) == limit and (total < len(head) or len(head) == _LOOK_AHEAD)
    return Dataset(tuple(records), tuple(rejects), shape.name, fingerprint.hexdigest(), total, cut, notes)


def check_rejects(source: str, dataset: Dataset, *, strict: bool, max_malformed_share: float) -> None:
    """Raise if any row was left out, where that is not allowed, or else if more than a share of them is malformed.

    Duplicates and over-long rows are not malformed.
    """
    rejects = dataset.rejects
    if strict and rejects:
        first = min(rejects, key=lambda reject: reject.place)
        message = (
            f"{source}: {len(rejects)} of {dataset.rows} rows can't be used, and --strict (data.strict) allows none: "
            f"the first is {first.place}, {first.code}: {first.reason}; mend them, or go on without"
        )
        raise LeftOut(message, of_source(source, rejects))
    bad = [reject for reject in rejects if reject.malformed]
    if bad and len(bad) / dataset.rows > max_malformed_share:
        message = (
            f"{source}: {len(bad)} of {dataset.rows} rows are malformed, more than data.max_malformed_share = "
            f"{max_malformed_share:g} allows: {most_common(bad)}; mend them, or raise it"
        )
        raise LeftOut(message, of_source(source, rejects))


def most_common(rejects: Sequence[Reject]) -> str:
    """The three commonest reasons, each with an example."""
    examples = {reject.code: reject for reject in reversed(rejects)}
    counts = Counter(reject.code for reject in rejects).most_common(3)
    return ", ".join(f"{count} {code} ({examples[code].place} {examples[code].reason})" for code, count in counts)


def split_heldout(
    source: str, records: Sequence[Record], rows: int, seed: int, *, limited: bool = False
) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """(train, held-out): so many records held out as nearly as whole prompts allow, and never more than a fifth.

    All records of a prompt fall on the same side. Prompts are held out in the order of a hash of (seed, prompt), so
    the rows' order does not matter, and rows that are added or removed move few others.

    Args:
        limited: there are more records, but for data.limit.

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
            f"{source}: {len(records)} good rows with {len(sizes)} different prompts are too few to hold out two or "
            f"more by prompt and at most a fifth: 10 with prompts of their own would do; "
            f"{'raise data.limit' if limited else 'add rows'}, or give data.heldout_source"
        )
    return tuple(record for record in records if record.prompt not in chosen), heldout


def remove_overlap(heldout: Sequence[Record], train: Sequence[Record]) -> tuple[tuple[Record, ...], list[Reject]]:
    """The held-out records whose prompt is not trained on, and the others."""
    trained = {record.prompt: record.place for record in train}
    rest = tuple(record for record in heldout if record.prompt not in trained)
    overlap = [
        Reject(record.place, "trained-on", f"has the prompt of training {place}", malformed=False)
        for record in heldout
        if (place := trained.get(record.prompt)) is not None
    ]
    return rest, overlap


# --- judging rows ---


class _Judged(NamedTuple):
    records: list[Record]
    rejects: list[Reject]
    repeated_ids: list[tuple[Place, str]]  # with the place of the later row
    unread: Counter[str]  # what good rows hold beside what is read of them, and how many do


def _judge(rows: Iterable[Row], shape: Format, which: Literal["last", "first"], limit: int | None) -> _Judged:
    records, rejects, repeated_ids, unread = judged = _Judged([], [], [], Counter())
    places: dict[tuple[tuple[Message, ...], str], Place] = {}
    ids: set[str] = set()
    for ordinal, (place, row) in enumerate(rows, 1):
        try:
            if isinstance(row, BadRow):
                raise row
            prompt, completion = _conversation(row, shape, which)
        except BadRow as bad:
            rejects.append(Reject(place, bad.code, bad.reason))
            continue
        first = places.setdefault((prompt, completion), place)
        if first != place:
            rejects.append(Reject(place, "duplicate", f"says the same as {first}", malformed=False))
            continue
        own = [id for id in (str(row[key]) for key in _IDS if type(row.get(key)) in {str, int}) if _is_a_name(id)]
        if own and ids.issuperset(own):
            repeated_ids.append((place, own[0]))
        records.append(Record(next((id for id in own if id not in ids), f"row-{ordinal}"), prompt, completion, place))
        ids.add(records[-1].id)
        unread.update(name for name in shape.unread(row) if name not in _IDS)
        if len(records) == limit:
            break
    return judged


def _is_a_name(id: str) -> bool:
    """Whether an id can be shown and kept; one of our own shape may belong to a row that is yet to come."""
    return 0 < len(id) <= 200 and id.isprintable() and not id.startswith("row-")


def _on_unread(source: str, unread: Counter[str]) -> Iterator[str]:
    """A column may hold what prompts are about, as a context or a system text."""
    if unread:
        found = ", ".join(f"{short(name)} ({count} rows)" for name, count in unread.most_common(_SHOWN))
        found += f" and {len(unread) - _SHOWN} more" if len(unread) > _SHOWN else ""
        advice = "; a system text is read where data.columns names all columns" if "system" in unread else ""
        yield f"{source}: not read of its rows: {found}; what belongs to a prompt has to stand in its text{advice}"


def _on_ids(source: str, repeated: Sequence[tuple[Place, str]]) -> Iterator[str]:
    if repeated:
        place, id = repeated[0]
        yield (
            f"{source}: {len(repeated)} rows have the id of an earlier row and say something else (first: {place}, "
            f"{id!r}); they are kept, and called after their place"
        )


def _on_invisible(source: str, records: Sequence[Record]) -> Iterator[str]:
    odd = [(record.place, found[0]) for record in records if (found := INVISIBLE.search(_all_text(record)))]
    if odd:
        place, character = odd[0]
        yield (
            f"{source}: {len(odd)} rows hold zero-width characters or ones that turn the text's direction (first: "
            f"{place}, U+{ord(character):04X}); they are kept as they are"
        )


def _all_text(record: Record) -> str:
    return "\n".join((*(turn.content for turn in record.prompt), record.completion))


def _conversation(row: Object, shape: Format, which: Literal["last", "first"]) -> tuple[tuple[Message, ...], str]:
    """Prompt and completion of a row, if it is a conversation that a template can render and a model can learn."""
    for key in shape.keys:
        if key not in row:
            raise BadRow("missing-column", f"has no {short(key)}")
    turns = [turn for turn in shape.turns(row) if turn.content or turn.role != "system"]
    if which == "first" and shape.dialogue:
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


def _canonical(prompt: tuple[Message, ...]) -> str:
    return json.dumps([[turn.role, turn.content] for turn in prompt])


def _choose_format(source: str, head: Sequence[Row], format: str, columns: _Columns) -> Format:
    """What most rows of a sample fit; of equal ones, what most have the columns of; then the first of `FORMATS`."""
    if columns or format == "columns":
        if format not in {"auto", "columns"} or not set(_SIDES) <= columns.keys():
            missing = [f"data.columns.{key} is not set" for key in _SIDES if key not in columns]
            raise QspinError(
                f"{' and '.join(missing) or f'data.format is {format}'}: data.columns names a prompt and a completion "
                "column, with data.format auto or columns"
            )
        for (one, name), (other, same) in combinations(columns.items(), 2):
            if name == same:
                raise QspinError(f"data.columns: {one} and {other} are both {name!r}; name the column of each")
        candidates = [pair("columns", columns["prompt"], columns["completion"], columns.get("system"))]
    else:
        candidates = [shape for shape in FORMATS if format in {"auto", shape.name}]
    sample = head[:: -(-len(head) // _SAMPLE)]

    def misfits(shape: Format) -> tuple[int, int]:
        codes = Counter(reject.code for reject in _judge(sample, shape, "last", None).rejects if reject.malformed)
        return codes.total(), codes["missing-column"]

    best = min(candidates, key=misfits)  # of equal ones, the first
    objects = [row for _, row in sample if isinstance(row, dict)]
    if objects and misfits(best)[1] == len(objects):
        names = list(islice(dict.fromkeys(chain.from_iterable(objects)), 20))
        found = ", ".join(map(short, names))
        wanted = "a known format" if len(candidates) > 1 else f"format {best.name}"
        needed = "; ".join(f"{shape.name} ({', '.join(shape.keys)})" for shape in candidates)
        sides = sorted(names, key=lambda name: name.lower() not in _ASKING)
        if len(sides) != 2 or sum(name.lower() in _ASKING for name in sides) != 1:
            sides = ["NAME", "NAME"]
        options = [shlex.quote(f"data.columns.{key}={name}") for key, name in zip(_SIDES, sides, strict=True)]
        raise QspinError(
            f"{source}: no row has the columns of {wanted}. "
            f"Columns found: {found or 'none'}. Needed: {needed}. Choose a format with --format, or name the columns: "
            f"--set {' --set '.join(options)}"
        )
    if "system" in columns and objects and not any(columns["system"] in row for row in objects):
        raise QspinError(f"{source}: no row has the column {short(columns['system'])} of data.columns.system")
    return best
