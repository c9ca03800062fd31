"""A Modelfile for Ollama: its template and stop tokens say what the chat template says.

Ollama's templates are Go's. What the chat template writes around the texts of a conversation is looked at, put into a
Go template of one of two shapes (the system text at the beginning, or before the last question), and compared on
conversations of one to three questions: a chat template that is of neither shape is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qspin.errors import QspinError
from qspin.records import Message

Render = Callable[[Sequence[Message]], str]  # the text that the model answers to

_SYSTEM = Message("system", "qspin probes the system text")
_QUESTIONS = [Message("user", f"qspin probes question {number}") for number in ("one", "two", "three")]
_ANSWERS = [Message("assistant", f"qspin probes answer {number}") for number in ("one", "two")]
_SHORT = [_QUESTIONS[0], _ANSWERS[0], _QUESTIONS[1]]
_LONG = [*_SHORT, _ANSWERS[1], _QUESTIONS[2]]


def modelfile(weights: str, render: Render, stops: Sequence[str]) -> str:
    """`weights` is the GGUF's name in the same folder; `render` leaves out a BOS token that llama.cpp writes itself.

    Raises:
        QspinError: the chat template can't be said in Go's language here.
    """
    lines = [f"FROM ./{weights}", f'TEMPLATE """{go_template(render)}"""']
    lines += [f'PARAMETER stop "{stop}"' for stop in stops]
    return "\n".join(lines) + "\n"


def go_template(render: Render) -> str:
    """The template alone."""
    pieces = _pieces(render)
    for messages in (_SHORT[:1], _SHORT, _LONG):
        for conversation in (messages, [_SYSTEM, *messages]):
            if (said := pieces.render(conversation)) != (meant := render(conversation)):
                at = len(os.path.commonprefix([said, meant]))  # noqa: RUF071 (character by character is what is wanted)
                raise _unfit(f"where it writes {meant[max(0, at - 20) : at + 40]!r}")
    return pieces.go()


@dataclass(frozen=True, slots=True)
class _Pieces:
    """What stands around the texts of a conversation."""

    system_last: bool  # the system text stands before the last question, not at the beginning
    before_system: str
    after_system: str
    no_system: str  # at the beginning, in the place of a system text
    before_question: str
    after_question: str
    before_answer: str
    after_answer: str
    ask: str  # what the generation prompt has more than an earlier answer's turn

    def render(self, messages: Sequence[Message]) -> str:
        """What Ollama makes of the template."""
        system = "".join(message.content for message in messages if message.role == "system")
        around = self.before_system + system + self.after_system if system else ""
        text = self.no_system if self.system_last else around or self.no_system
        for index, message in enumerate(messages):
            if message.role == "user":
                last = index == len(messages) - 1
                before = around if self.system_last and system and last else self.before_question
                text += before + message.content + self.after_question
            elif message.role == "assistant":
                text += self.before_answer + message.content + self.after_answer
        return text + self.ask

    def go(self) -> str:
        system = "{{ if .System }}" + _go(self.before_system) + "{{ .System }}" + _go(self.after_system)
        start = _go(self.no_system) if self.system_last else system + "{{ else }}" + _go(self.no_system) + "{{ end }}"
        before = _go(self.before_question)
        if self.system_last:
            before = (
                "{{ if and $.System (eq (len (slice $.Messages $index)) 1) }}"
                + _go(self.before_system) + "{{ $.System }}" + _go(self.after_system)
                + "{{ else }}" + before + "{{ end }}"
            )  # fmt: skip
        return (
            start
            + "{{ range $index, $message := .Messages }}"
            + '{{ if eq .Role "user" }}' + before + "{{ .Content }}" + _go(self.after_question)
            + '{{ else if eq .Role "assistant" }}'
            + _go(self.before_answer) + "{{ .Content }}" + _go(self.after_answer)
            + "{{ end }}{{ end }}"
            + _go(self.ask)
        )  # fmt: skip


def _pieces(render: Render) -> _Pieces:
    start, answering, between, asking = _split(render(_SHORT), _SHORT)
    with_system = render([_SYSTEM, *_SHORT])
    system_last = with_system.find(_SYSTEM.content) > with_system.find(_ANSWERS[0].content)
    if system_last:
        _, _, before_system, after_system, _ = _split(with_system, [*_SHORT[:2], _SYSTEM, _SHORT[2]])
        before_question = _common_end(start, between)
        before_system = before_system.removeprefix(between.removesuffix(before_question))
    else:
        before_system, after_system, *_ = _split(with_system, [_SYSTEM, *_SHORT])
        before_question = _common_end(start, between, after_system)
        after_system = after_system.removesuffix(before_question)
    after_question = os.path.commonprefix([answering, asking])  # noqa: RUF071
    return _Pieces(
        system_last=system_last,
        before_system=before_system,
        after_system=after_system,
        no_system=start.removesuffix(before_question),
        before_question=before_question,
        after_question=after_question,
        before_answer=answering.removeprefix(after_question),
        after_answer=between.removesuffix(before_question),
        ask=asking.removeprefix(after_question),
    )


def _split(text: str, messages: Sequence[Message]) -> list[str]:
    """What stands before, between and after the messages' texts."""
    parts = []
    for message in messages:
        before, found, text = text.partition(message.content)
        if not found:
            raise _unfit(f"it does not show the {message.role} text {message.content!r} in its place")
        parts.append(before)
    return [*parts, text]


def _common_end(*texts: str) -> str:
    return os.path.commonprefix([text[::-1] for text in texts])[::-1]  # noqa: RUF071


def _go(text: str) -> str:
    """A literal in a Go template; JSON's escapes are Go's too."""
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""


def _unfit(seen: str) -> QspinError:
    return QspinError(
        f"chat.template: Ollama's template language can't be made to say what this one does ({seen}); "
        "export with --to gguf, and write the Modelfile's TEMPLATE by hand"
    )
