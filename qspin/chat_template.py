"""A chat template, and what it does, seen by conversations of known texts."""

from __future__ import annotations

import datetime
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jinja2

from qspin.config_files import presets_dir
from qspin.errors import QspinError, one_line
from qspin.records import Message

_OF_EXPRESSIONS = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)
SYSTEM = Message("system", "qspin probes the system text")
QUESTION = Message("user", "qspin probes a question")
ANSWER = Message("assistant", "qspin probes an answer")
ADVICE = "set chat.template to a Jinja file that suits this model"


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    chat_template: str | dict[str, str] | None
    bos_token_id: int | None
    eos_token_id: int | None
    added_tokens_decoder: Mapping[int, Any]  # tokens that are matched as a whole: .content, .special

    def apply_chat_template(self, conversation: list[dict[str, str]], **kwargs: Any) -> str: ...
    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...
    def decode(self, token_ids: Sequence[int], **kwargs: bool) -> str: ...


class UnfitError(QspinError):
    """One conversation that can't be rendered; becomes a Reject."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True)
class Template:
    """The chat template, with all that its text depends on besides the messages."""

    tokenizer: Tokenizer
    source: str
    kwargs: Mapping[str, Any]
    date: datetime.date

    def text(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                [{"role": message.role, "content": message.content} for message in messages],
                chat_template=self.source,
                add_generation_prompt=generation_prompt,
                tokenize=False,
                strftime_now=self.date.strftime,  # shadows the environment's clock
                **self.kwargs,
            )
        # besides Jinja's own errors: Python's, of the template's expressions and of a switch of the wrong kind
        except (jinja2.TemplateError, *_OF_EXPRESSIONS) as error:
            raise UnfitError("template", f"the chat template fails: {one_line(error)}") from None

    def probe(self) -> tuple[str, str]:
        """The generation prompt of a plain question, and the conversation with an answer to it."""
        return self.text([QUESTION], generation_prompt=True), self.text([QUESTION, ANSWER], generation_prompt=False)


def own_template(tokenizer: Tokenizer) -> str:
    own = tokenizer.chat_template
    source = own.get("default") if isinstance(own, dict) else own
    if source:
        return source
    named = f" called default, but {', '.join(sorted(own))}" if isinstance(own, dict) and own else ""
    folder = presets_dir() / "templates"
    shipped = ", ".join(sorted(path.name for path in folder.glob("*.jinja")))
    raise QspinError(
        f"the tokenizer has no chat template{named} (a base model?): take the model's instruct version, or "
        f"{ADVICE}; {folder} has {shipped}, and plain.jinja is for base models"
    )


def probe_answer(chat: Template) -> tuple[str, str]:
    """A conversation, and what comes after its answer; sees to it that the generation prompt leads up to that."""
    try:
        prompt, full = chat.probe()
    except UnfitError as unfit:
        raise QspinError(f"{unfit} (on a plain question); check chat.template_kwargs, or {ADVICE}") from None
    if QUESTION.content not in prompt or ANSWER.content not in full:
        raise QspinError(f"the chat template does not show plain text (is it for images?): {ADVICE}")
    if not _leads_up(prompt, full):
        mended = _leads_up(*replace(chat, kwargs={**chat.kwargs, "enable_thinking": False}).probe())
        advice = f"look for a switch to give in chat.template_kwargs, or {ADVICE}"
        raise QspinError(
            "the chat template's generation prompt does not lead up to the answer, so its other text would tell the "
            f"real completions from the generated ones: {parting(prompt + ANSWER.content, full)}; "
            + ("they agree with --set chat.template_kwargs.enable_thinking=false" if mended else advice)
        )
    return full, full.rpartition(ANSWER.content)[2]


def _leads_up(prompt: str, full: str) -> bool:
    """Whether nothing but white space is between generation prompt and answer (Mistral's space is generated)."""
    before = full.rpartition(ANSWER.content)[0]
    return before.startswith(prompt) and not before[len(prompt) :].strip()


def parting(expected: str, actual: str) -> str:
    at = len(os.path.commonprefix([expected, actual]))  # noqa: RUF071 (character by character is what is wanted)
    around = slice(max(0, at - 40), at + 40)
    return f"where {expected[around]!r} is expected, it writes {actual[around]!r}"


def control_tokens(tokenizer: Tokenizer, written: str) -> dict[str, int]:
    """What the template writes, marked as special or not (and no plain words or blanks, which may be added as well)."""
    return {
        added.content: token
        for token, added in tokenizer.added_tokens_decoder.items()
        if added.content.strip() and (added.special or added.content in written)
    }


def find_end_of_turn(control: Mapping[str, int], tail: str) -> tuple[int, int]:
    """The first control token of the tail, and where in the tail it ends."""
    start, _, text = min(((tail.index(text), -len(text), text) for text in control if text in tail), default=(0, 0, ""))
    if not text or tail[:start].strip():
        raise QspinError(
            f"no end-of-turn token: after an answer the chat template writes {tail!r}, which does not begin with one "
            f"of the tokenizer's added tokens, so no completion could end; {ADVICE}"
        )
    return control[text], start + len(text)


def probe_system(chat: Template) -> str:
    """How the template refuses system messages; empty if it takes them."""
    try:
        text = chat.text([SYSTEM, QUESTION], generation_prompt=True)
    except UnfitError as unfit:
        return f"refuses a system text ({str(unfit).removeprefix('the chat template fails: ')})"
    return "" if SYSTEM.content in text else "leaves out a system text"
