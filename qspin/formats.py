"""The shapes that a row may have: each turns a row into its conversation, or says why it is none."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from qspin.records import Message, Role
from qspin.sources import BadRow, Object, short

# NUL, or half of a surrogate pair: no tokenizer and no UTF-8 file takes it
_BAD_CHARACTER = re.compile("[\0\ud800-\udfff]")

# What is not seen and may hide something: zero-width characters, text direction, tags
INVISIBLE = re.compile("[\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff\U000e0000-\U000e007f]")

_ASSISTANTS: dict[str, Role] = dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot"), "assistant")
_ROLES: dict[str, Role] = {"system": "system", "user": "user", "human": "user", **_ASSISTANTS}
_TOOL_CALLS, _TOOLS = ("tool_calls", "function_call"), ("tools", "functions")  # of a turn; of a row


class Format(NamedTuple):
    """A shape that a row may have, and how its conversation is read."""

    name: str
    keys: tuple[str, ...]  # that every row of this format has
    turns: Callable[[Object], list[Message]]
    others: tuple[str, ...] = ()  # that are read where a row has them
    dialogue: bool = False  # of several answers, `data.turns` says which is the completion

    def unread(self, row: Object) -> list[str]:
        """What a row of this format holds that no text is made of; `messages[].name` is a turn's."""
        found = [key for key, value in row.items() if key not in {*self.keys, *self.others} and value not in _NOTHING]
        for key in self.keys:
            for turn in row[key] if isinstance(row[key], list) else ():
                found += [f"{key}[].{name}" for name in turn if name not in _OF_A_TURN and turn[name] not in _NOTHING]
        return list(dict.fromkeys(found))


_OF_A_TURN = ("role", "content", "from", "value")
_NOTHING: tuple[object, ...] = (None, "", "[]", [], {})


def pair(name: str, prompt: str, completion: str, system: str | None = None) -> Format:
    """A column of prompts and one of completions: texts, or lists of turns as TRL has them."""

    def turns(row: Object) -> list[Message]:
        if isinstance(row[prompt], list):
            _check_none_of(_TOOLS, row, "the row")
        answer = _text_or_turns(row[completion], completion, "assistant")
        if [turn.role for turn in answer] != ["assistant"]:
            raise BadRow("not-one-answer", f"{completion} is not one assistant turn")
        frame = row.get(system) if system else None
        before = [] if frame is None else [Message("system", _text(frame, str(system)))]
        return [*before, *_text_or_turns(row[prompt], prompt, "user"), *answer]

    return Format(name, (prompt, completion), turns, (system,) if system else ())


def _text_or_turns(value: object, column: str, role: Role) -> list[Message]:
    return _turns(value, column) if isinstance(value, list) else [Message(role, _text(value, column))]


def _alpaca(row: Object) -> list[Message]:
    instruction = _text(row["instruction"], "instruction")
    extra = "" if row.get("input") is None else _text(row["input"], "input")
    # an input does not stand in for an instruction that is missing
    prompt = f"{instruction}\n\n{extra}" if instruction and extra else instruction
    return [Message("user", prompt), Message("assistant", _text(row["output"], "output"))]


def _messages(row: Object) -> list[Message]:
    _check_none_of(_TOOLS, row, "the row")
    return _turns(row["messages"], "messages")


def _sharegpt(row: Object) -> list[Message]:
    _check_none_of(_TOOLS, row, "the row")
    return _turns(row["conversations"], "conversations")


def _turns(value: object, column: str) -> list[Message]:
    """Turns of `role` and `content`, or as ShareGPT has them of `from` and `value`."""
    if not isinstance(value, list):
        raise BadRow("not-a-list", f"{column} is {short(value)}, not a list of turns")
    turns = []
    for number, turn in enumerate(value, 1):
        place = f"{column}, turn {number}"
        if not isinstance(turn, dict):
            raise BadRow("not-a-turn", f"{place} is {short(turn)}, not an object with 'role' and 'content'")
        sharegpt = turn.get("role") is None and turn.get("from") is not None
        speaker, words = ("from", "value") if sharegpt else ("role", "content")
        role = turn.get(speaker)
        if role is None:
            raise BadRow("missing-role", f"{place} has no 'role'")
        if not isinstance(role, str) or role not in _ROLES:
            raise BadRow("unknown-role", f"{place} has {speaker!r} {short(role)}, not one of {', '.join(_ROLES)}")
        _check_none_of(_TOOL_CALLS, turn, place)
        turns.append(Message(_ROLES[role], _text(_joined(turn.get(words), place), f"{place}, {words!r}")))
    return turns


def _check_none_of(keys: tuple[str, ...], value: Object, place: str) -> None:
    """A conversation with tools is not what it was without them, and of a turn its text alone is rendered."""
    for key in keys:
        if value.get(key) not in _NOTHING:
            raise BadRow("tool-call", f"{place} has {key!r}, and tools are not rendered")


def _joined(content: object, place: str) -> object:
    """A list of text parts as one text; anything else as it is."""
    if not isinstance(content, list):
        return content
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise BadRow("not-text", f"{place} has a part that is not text: {short(part)}")
    return "".join(part["text"] for part in content)


def _text(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise BadRow("not-text", f"{place} is {short(value)}, not text")
    bad = _BAD_CHARACTER.search(value)
    if bad:
        raise BadRow("bad-character", f"{place} has the character {bad[0]!r}, which is not text")
    return value.strip() if INVISIBLE.sub("", value).strip() else ""


FORMATS = (
    Format("messages", ("messages",), _messages, dialogue=True),
    Format("sharegpt", ("conversations",), _sharegpt, dialogue=True),
    Format("alpaca", ("instruction", "output"), _alpaca, ("input",)),
    pair("prompt-completion", "prompt", "completion"),
    pair("prompt-response", "prompt", "response"),
    pair("instruction-response", "instruction", "response"),
    pair("question-answer", "question", "answer"),
)
