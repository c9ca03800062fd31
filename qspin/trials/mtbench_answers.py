"""MT-Bench's questions, and what players answer to them.

    bench = read_bench(questions=None, references=None)          # FastChat's 80 questions
    answer(loaded, bench, Answers.read(path), "iteration-1", progress)

Who is in the slot answers every first turn, then every second one after its own first answer. Rows of like temperature
and room are answered side by side. Formats are FastChat's.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import httpx

from qspin.base import cache_dir, cache_told
from qspin.errors import QspinError, one_line
from qspin.files import write_text
from qspin.fitting.memory import OutOfMemory, refusals_told
from qspin.records import Message
from qspin.sources import short
from qspin.trials.judge import http_client
from qspin.trials.judging import Question, is_text, sound_rows
from qspin.trials.loaded import Loaded, Reply

# as FastChat's llm_judge has them
TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0,
    "stem": 0.1, "humanities": 0.1,
}  # fmt: skip
OTHER_TEMPERATURE = 0.7
NEW_TOKENS = 1024

ANSWERS = "model_answer"  # FastChat's name
ROWS = 20  # answered between two writes
STEP = 64  # caps below NEW_TOKENS are multiples of this, so that rows of like room are answered side by side

# FastChat's own files, of a commit that never changes, and their SHA-256
SOURCE = (
    "https://raw.githubusercontent.com/lm-sys/FastChat/0e6d3e4beaab66f4d3f93db72541a4abab8af28d/fastchat/llm_judge/data/"
    "mt_bench"
)
QUESTIONS = ("question.jsonl", "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7")
REFERENCES = ("reference_answer/gpt-4.jsonl", "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f")


class Progress(Protocol):
    """Hears of pieces of work: what they are, how many are done, of how many."""

    def step(self, what: str, done: int, total: int) -> None: ...
    def note(self, text: str) -> None: ...


# --- questions ---


@dataclass(frozen=True, slots=True)
class Bench:
    """The questions of a file."""

    questions: tuple[Question, ...]

    @property
    def folder(self) -> str:
        """Other questions are other answers: the name has the hash of what a player is asked."""
        asked = [[question.id, question.category, question.turns] for question in self.questions]
        return f"questions-{short_hash(asked)}"


def read_bench(questions: Path | None, references: Path | None) -> Bench:
    """Questions of a file in the format of FastChat's question.jsonl, else FastChat's own with its references.

    Args:
        references: in the format of FastChat's reference_answer; they take the place of the question file's.

    Raises:
        QspinError: a file has something else in it, or can't be had.
    """
    if questions is None:
        questions = _fetched(*QUESTIONS)
        references = references or _fetched(*REFERENCES)
    found: dict[str, Question] = {}
    for where, row in sound_rows(questions):
        question = _question(row, where)
        if str(question.id) in found:
            raise QspinError(f"{where}: a question before it has the question_id {short(question.id)} as well")
        found[str(question.id)] = question
    if not found:
        raise QspinError(f"{questions}: has no questions; give a file in the format of FastChat's question.jsonl")
    if references is not None:
        for key, turns in _references(references):
            if key in found:
                found[key] = replace(found[key], references=turns)
    return Bench(tuple(found.values()))


def _fetched(name: str, sha256: str) -> Path:
    """A file of FastChat's, in the cache; fetched once."""
    path, address = cache_dir() / "mt-bench" / Path(name).name, f"{SOURCE}/{name}"
    if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return path
    advice = "give --questions a file in the format of FastChat's fastchat/llm_judge/data/mt_bench/question.jsonl"
    try:
        with http_client(timeout=30) as client:
            content = client.get(address).raise_for_status().content
    except httpx.HTTPError as error:
        raise QspinError(f"{address} can't be fetched ({one_line(error)}); {advice}") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise QspinError(f"{address}: what comes from there is not FastChat's file; {advice}")
    with cache_told():
        write_text(path, content.decode())
    return path


def _question(row: Mapping[str, Any], where: str) -> Question:
    name, category, turns, references = (row.get(key) for key in ("question_id", "category", "turns", "reference"))
    if type(name) is not int and not (isinstance(name, str) and re.fullmatch(r"\w[\w.-]{0,59}", name)):
        raise QspinError(
            f"{where}: question_id is {short(name)}; it is a number, or a short word of letters and digits"
        )
    if not is_text(category) or not category.strip():
        raise QspinError(f"{where}: category is {short(category)}; it is a word, as {', '.join(TEMPERATURES)}")
    if not _texts(turns) or len(turns) not in {1, 2} or not all(turn.strip() for turn in turns):
        raise QspinError(f"{where}: turns are {short(turns)}; they are a list of one or two texts")
    if references is not None and not _texts(references):
        raise QspinError(f"{where}: reference is {short(references)}; it is a list of texts, one for each turn")
    return Question(name, category, tuple(turns), tuple(references or ()))


def _references(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    for where, row in sound_rows(path):
        try:
            name, turns = row["question_id"], row["choices"][0]["turns"]
        except (LookupError, TypeError):
            turns = None
        if not _texts(turns):
            raise QspinError(f"{where}: is no answer in FastChat's format (question_id, choices[0].turns)")
        yield str(name), tuple(turns)


def _texts(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(map(is_text, value))


# --- answers ---


@dataclass(slots=True)
class Answers:
    """A player's answers so far, by question; `turns` of one are what a player said and how it ended."""

    path: Path
    lines: dict[str, dict[str, Any]] = field(default_factory=dict)
    adapter: str | None = None  # SHA-256 of the player's own weights, if it has any beside the base's

    @staticmethod
    def read(path: Path) -> Answers:
        found = Answers(path)
        if path.is_file():
            try:
                # by line feeds alone: an answer may hold other line ends
                for text in path.read_text(encoding="utf-8").split("\n")[:-1]:
                    line = json.loads(text)
                    turns, how = line["choices"][0]["turns"], line["qspin"]
                    if len(turns) > 2 or len(turns) != len(how):
                        raise ValueError("a turn too many")
                    if not all("cap" in part for part in how):
                        raise ValueError("a turn without its cap")
                    found.lines[str(line["question_id"])] = line
            except (OSError, ValueError, LookupError, TypeError):
                raise QspinError(f"{path}: damaged, or not of qspin's making; delete it and run again") from None
        return found

    def keep_of(self, adapter: str | None) -> None:
        """Those by these weights, as the next ones will be: an adapter that was deleted may have come out otherwise."""
        self.adapter = adapter
        for name, line in list(self.lines.items()):
            if any(how.get("adapter", adapter) != adapter for how in line["qspin"]):  # answers of before did not tell
                del self.lines[name]

    def turns(self, question: Question) -> list[str]:
        line = self.lines.get(str(question.id))
        return [] if line is None else list(line["choices"][0]["turns"])

    def add(self, question: Question, model: str, text: str, how: dict[str, Any]) -> None:
        line = self.lines.setdefault(
            str(question.id),
            {
                "question_id": question.id,
                "answer_id": uuid.uuid4().hex,
                "model_id": model,
                "choices": [{"index": 0, "turns": []}],
                "tstamp": 0.0,
                "qspin": [],
            },
        )
        line["choices"][0]["turns"].append(text)
        line["qspin"].append(how)
        line["tstamp"] = time.time()

    def write(self, questions: Iterable[Question]) -> None:
        lines = [self.lines[str(question.id)] for question in questions if str(question.id) in self.lines]
        write_text(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def missing(self, questions: Iterable[Question]) -> int:
        """Turns."""
        return sum(len(question.turns) - len(self.turns(question)) for question in questions)

    def how(self) -> list[dict[str, Any]]:
        return [how for line in self.lines.values() for how in line["qspin"]]


def batches(questions: Sequence[Question], turn: int) -> list[list[Question]]:
    """Those that have a turn (from 0), by temperature. They never depend on what has been answered: rounding depends
    on a row's company."""
    groups: dict[float, list[Question]] = {}
    for question in questions:
        if len(question.turns) > turn:
            groups.setdefault(_temperature(question), []).append(question)
    return [group[start : start + ROWS] for group in groups.values() for start in range(0, len(group), ROWS)]


def answer(loaded: Loaded, bench: Bench, answers: Answers, model: str, progress: Progress) -> None:
    """All first turns, then all second ones, by whoever is in the slot; what is there is not answered again.

    Raises:
        QspinError: memory runs out.
    """
    total = sum(len(question.turns) for question in bench.questions)
    what = f"{model} answers"
    for turn in (0, 1):
        for batch in batches(bench.questions, turn):
            progress.step(what, total - answers.missing(bench.questions), total)
            if all(len(answers.turns(question)) > turn for question in batch):
                continue
            asked = [_conversation(question, answers.turns(question), turn) for question in batch]
            caps = [
                _cap(loaded, messages, question.turns[turn + 1 :])
                for messages, question in zip(asked, batch, strict=True)
            ]
            replies = _replies(loaded, asked, caps, temperature=_temperature(batch[0]), turn=turn)
            for question, cap, reply in zip(batch, caps, replies, strict=True):
                if len(answers.turns(question)) > turn:  # asked again for the others' sake
                    continue
                how: dict[str, Any] = {"cap": cap, "tokens": reply.tokens, "ended": reply.ended}
                how |= {} if answers.adapter is None else {"adapter": answers.adapter}
                answers.add(question, model, reply.text.strip(), how)
            answers.write(bench.questions)
    progress.step(what, total, total)
    caps = [how["cap"] for how in answers.how()]
    if clipped := [cap for cap in caps if 0 < cap < NEW_TOKENS]:
        progress.note(
            f"{model}: the context has no room for {NEW_TOKENS} new tokens in {len(clipped)} of {total} turns, which "
            f"were given {min(clipped)} to {max(clipped)}"
        )
    if none := caps.count(0):
        progress.note(
            f"{model}: {none} of {total} turns are too long for the context, or can't be rendered; their answers are "
            "empty"
        )


def _conversation(question: Question, said: Sequence[str], turn: int) -> list[Message]:
    messages = []
    for asked, answered in zip(question.turns[:turn], said[:turn], strict=True):
        messages += [Message("user", asked), Message("assistant", answered)]
    return [*messages, Message("user", question.turns[turn])]


def _cap(loaded: Loaded, messages: Sequence[Message], later: Sequence[str]) -> int:
    """New tokens for this turn, so that as many are left for each later one that fits; 0 if this one does not."""
    renderer = loaded.speech.renderer
    try:
        taken = [renderer.prompt_ids(part) for part in (messages, *([Message("user", text)] for text in later))]
    except QspinError:  # a text that the template can't take, such as one that the model wrote itself
        return 0
    alone = loaded.speech.context - len(taken[0])
    shared = (alone - sum(map(len, taken[1:]))) // len(taken)
    room = min(NEW_TOKENS, shared if shared > 0 else alone)
    return max(0, room - room % STEP if room > STEP else room)


def _replies(
    loaded: Loaded, asked: Sequence[Sequence[Message]], caps: Sequence[int], *, temperature: float, turn: int
) -> list[Reply]:
    found = [Reply("", 0, ended=False)] * len(asked)
    for cap in sorted(set(caps) - {0}):
        rows = [row for row, own in enumerate(caps) if own == cap]
        try:
            with refusals_told():
                replies = loaded.reply(
                    [asked[row] for row in rows], max_new_tokens=cap, temperature=temperature, top_p=1.0, seed=turn
                )
        except OutOfMemory as error:
            raise QspinError(
                f"out of memory while answering ({error}); close other programs, and the same command goes on"
            ) from None
        for row, reply in zip(rows, replies, strict=True):
            found[row] = reply
    return found


def _temperature(question: Question) -> float:
    return TEMPERATURES.get(question.category, OTHER_TEMPERATURE)


def question_file(questions: Iterable[Question]) -> str:
    rows = []
    for question in questions:
        row: dict[str, Any] = {
            "question_id": question.id, "category": question.category, "turns": list(question.turns),
        }  # fmt: skip
        rows.append(row | ({"reference": list(question.references)} if question.references else {}))
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def short_hash(value: Any) -> str:
    """Of something that JSON can hold."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=False, sort_keys=True).encode()).hexdigest()[:8]
