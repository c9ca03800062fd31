"""Messages become tokens here and nowhere else, and sampled tokens become text again.

    renderer = Renderer.build(tokenizer, template=None, template_kwargs={}, date=run_date, ...)
    renderer.example(record)                       # an Example, or a Reject that says why
    renderer.completion_text(pair.generated_ids)

`build` renders a conversation of known texts and looks at what the template writes around them. From then on a full
conversation must be, character for character, the prompt's text (which ends in the generation prompt), the answer and
the same tail; whatever is not is left out, with its reason. A completion ends in the tail's end-of-turn token.

What a row's text says of control tokens is text. Before it is rendered, each name in it is broken in two by a mark
that no text holds. Where the mark stands, the end-of-turn token is encoded, at which every tokenizer parts a text,
and then taken out again.
"""

from __future__ import annotations

import datetime
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from qspin.chat_template import (
    ADVICE,
    ANSWER,
    QUESTION,
    Template,
    Tokenizer,
    UnfitError,
    control_tokens,
    find_end_of_turn,
    own_template,
    parting,
    probe_answer,
    probe_system,
)
from qspin.errors import QspinError
from qspin.records import Example, Message, Record, Reject

PieceKind = Literal["prompt", "completion", "end-of-turn"]
_MARK = "\ufdd0"  # by Unicode's definition no character: nobody's text holds it
_NO_TEXT = re.compile(f"[\ud800-\udfff{_MARK}]")


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """A tokenizer with its chat template; use `build`."""

    end_of_turn: int  # what the template writes after an answer; often not what the tokenizer calls EOS
    notes: tuple[str, ...]  # for the user: what the template can't do, and what is done instead
    max_prompt_tokens: int
    max_completion_tokens: int  # end-of-turn included
    long_completions: Literal["drop", "cut"]
    vocab_size: int  # rows of the model's embedding matrix
    _template: Template
    _tail: str  # what the template writes after the last answer ...
    _tail_kept: int  # ... and how many characters of it belong to the completion
    _control: Mapping[str, int]  # tokens that structure a conversation
    _name: re.Pattern[str]  # the first character of one's text
    _system_fits: bool

    @staticmethod
    def build(
        tokenizer: Tokenizer,
        *,
        template: str | None,
        template_kwargs: Mapping[str, Any],
        date: datetime.date,
        max_prompt_tokens: int,
        max_completion_tokens: int,
        long_completions: Literal["drop", "cut"],
        vocab_size: int,
    ) -> Renderer:
        """Probes the template: the tokenizer's own, unless `template` is the Jinja text of another.

        A template that asks for today's date (Llama 3.2, gpt-oss) gets `date`.

        Raises:
            QspinError: there is no template; its generation prompt does not lead up to the answer; no token ends one.
        """
        source = own_template(tokenizer) if template is None else template
        chat = Template(tokenizer, source, template_kwargs, date)
        conversation, tail = probe_answer(chat)
        control = control_tokens(tokenizer, written=conversation)
        end_of_turn, tail_kept = find_end_of_turn(control, tail)
        refusal = probe_system(chat)
        note = f"The chat template {refusal}; it is put before the first user turn's text, after it a blank line."
        renderer = Renderer(
            end_of_turn=end_of_turn,
            notes=(note,) if refusal else (),
            max_prompt_tokens=max_prompt_tokens,
            max_completion_tokens=max_completion_tokens,
            long_completions=long_completions,
            vocab_size=vocab_size,
            _template=chat,
            _tail=tail,
            _tail_kept=tail_kept,
            _control=control,
            # each is sought at every place, as two that overlap are both to be broken
            _name=re.compile(f"(?={'|'.join(map(re.escape, control))})(.)", re.DOTALL),
            _system_fits=not refusal,
        )
        probed = renderer.example(Record("", (QUESTION,), ANSWER.content))
        if isinstance(probed, Reject) and probed.code == "boundary":
            raise QspinError(f"chat template and tokenizer do not go together: {probed.reason}; {ADVICE}")
        if isinstance(probed, Example) and probed.prompt_ids[:2] == (tokenizer.bos_token_id,) * 2:
            raise QspinError(f"the chat template begins a conversation with two tokens BOS; {ADVICE}")
        return renderer

    @property
    def template(self) -> str:
        """The template's text."""
        return self._template.source

    @property
    def template_hash(self) -> str:
        """SHA-256 of the template's text."""
        return hashlib.sha256(self.template.encode()).hexdigest()

    @property
    def portable_template(self) -> str:
        """The template's text for a tokenizer that others load: the switches it was given here are its defaults."""
        switches = [
            f"{{%- if {key} is not defined %}}{{%- set {key} = {value!r} %}}{{%- endif %}}"
            for key, value in self._template.kwargs.items()
        ]
        return "".join(switches) + self.template

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The tokens that generation starts from; a QspinError says why there are none."""
        return self._encode(self._text(self._marked(messages), generation_prompt=True))

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """What `prompt_ids` are the tokens of."""
        return self._text(self._marked(messages), generation_prompt=True).replace(_MARK, "")

    def plain_ids(self, text: str, *, begun: bool) -> tuple[int, ...]:
        """The tokens of a text that is no conversation, a benchmark's say; what it has of control tokens are those.

        Args:
            begun: with what the tokenizer puts before a text (BOS, or nothing), unless the text has it already.
        """
        return self._ids(text, add_special_tokens=begun and not text.startswith(self._decode([self.before_text])))

    @property
    def before_text(self) -> int:
        """The token that stands for what comes before a text: BOS, or EOS where there is none."""
        tokenizer = self._template.tokenizer
        found = (tokenizer.bos_token_id, tokenizer.eos_token_id, self.end_of_turn)
        return next(token for token in found if token is not None)

    @property
    def end_of_text(self) -> int:
        """What the tokenizer calls EOS; often not the end of a turn."""
        eos = self._template.tokenizer.eos_token_id
        return self.end_of_turn if eos is None else eos

    def control_token_in(self, record: Record) -> str | None:
        """The first control token that a record's text holds; its text, as tokens are never in records."""
        for text in (*(message.content for message in record.prompt), record.completion):
            if found := self._name.search(text):
                return max((name for name in self._control if text.startswith(name, found.start())), key=len)
        return None

    def example(self, record: Record) -> Example | Reject:
        """The record as tokens, or why it is left out."""
        try:
            return self._example(record)
        except UnfitError as unfit:
            return Reject(record.place, unfit.code, str(unfit), malformed=not unfit.code.startswith("long-"))

    def completion_text(self, ids: Sequence[int]) -> str:
        """What a person reads of a completion: no end-of-turn, no other control tokens."""
        hidden = set(self._control.values())
        return self._decode([token for token in ids if token not in hidden])

    def pieces(self, example: Example) -> list[tuple[PieceKind, str]]:
        """The example's tokens as texts to show, each with its part; tokens that share a character share a piece."""
        ids = (*example.prompt_ids, *example.real_ids)
        start, end = len(example.prompt_ids), len(ids) - (example.real_ids[-1:] == (self.end_of_turn,))
        parts: dict[PieceKind, tuple[int, int]] = {
            "prompt": (0, start), "completion": (start, end), "end-of-turn": (end, len(ids)),
        }  # fmt: skip
        return [(kind, text) for kind, part in parts.items() for text in self._shown(ids, *part)]

    def _example(self, record: Record) -> Example:
        if not record.completion.strip():
            raise UnfitError("empty-completion", "the completion is empty")
        *prompt, completion = self._marked([*record.prompt, Message("assistant", record.completion)])
        prompt_text = self._text(prompt, generation_prompt=True)
        for number, message in enumerate(prompt, 1):
            said = message.content.rpartition("</think>")[2]  # what earlier answers thought is left out on purpose
            if said.strip() not in prompt_text:
                raise UnfitError(
                    "template", f"the chat template leaves out, or changes, the {message.role} text of turn {number}"
                )
        prompt_ids = self._encode(prompt_text)
        if (size := len(prompt_ids)) > (limit := self.max_prompt_tokens):
            raise UnfitError("long-prompt", f"the prompt has {size} tokens; data.max_prompt_tokens is {limit}")

        full_text = self._text([*prompt, completion], generation_prompt=False)
        answer = full_text[len(prompt_text) : len(full_text) - len(self._tail)]  # many templates trim it
        if full_text != prompt_text + answer + self._tail or answer.strip() != completion.content.strip():
            seen = parting(prompt_text + completion.content + self._tail, full_text)
            raise UnfitError("template", f"the chat template changes this answer, or what stands around it: {seen}")

        # end-of-turn is matched as a whole: cutting the text right after it changes no token before the cut
        ids = self._encode(full_text[: len(full_text) - len(self._tail) + self._tail_kept])
        real_ids = ids[len(prompt_ids) :]
        if ids[: len(prompt_ids)] != prompt_ids or real_ids[-1:] != (self.end_of_turn,):
            raise UnfitError("boundary", "a token spans the border between prompt and completion; none sampled could")
        if not set(real_ids[:-1]).isdisjoint(self._control.values()):  # SmolLM2 writes <|endoftext|> for bytes it lacks
            raise UnfitError("unknown-character", "the tokenizer has no token for a character of the completion")
        if len(real_ids) == 1:
            raise UnfitError("empty-completion", "the tokenizer makes no token of the completion")
        if (size := len(real_ids)) > (limit := self.max_completion_tokens) and self.long_completions == "drop":
            raise UnfitError("long-completion", f"it has {size} tokens; data.max_completion_tokens is {limit}")
        return Example(record.id, prompt_ids, real_ids[:limit])

    def _marked(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with a mark in every name of a control token."""
        for message in messages:
            if found := _NO_TEXT.search(message.content):
                reason = f"the {message.role} text contains {found.group()!r}, which is not plain text"
                raise UnfitError("encoding", reason)
        marked = [replace(message, content=self._name.sub(rf"\1{_MARK}", message.content)) for message in messages]
        for message in marked:
            if found := self._name.search(message.content):  # a name of one character
                raise UnfitError("control-token", f"the {message.role} text contains {found[1]!r}, a control token")
        return marked

    def _text(self, messages: Sequence[Message], *, generation_prompt: bool) -> str:
        text = self._rendered(messages, generation_prompt)
        if _MARK in text:
            plain = [replace(message, content=message.content.replace(_MARK, "")) for message in messages]
            if self._rendered(plain, generation_prompt) != text.replace(_MARK, ""):
                raise UnfitError("control-token", "the chat template heeds the control tokens that a text contains")
        return text

    def _rendered(self, messages: Sequence[Message], generation_prompt: bool) -> str:
        shown = messages if self._system_fits else _system_into_user(messages)
        return self._template.text(shown, generation_prompt=generation_prompt)

    def _encode(self, text: str) -> tuple[int, ...]:
        if _MARK not in text:
            return self._ids(text)
        (wedge,) = (name for name, token in self._control.items() if token == self.end_of_turn)
        ids = self._ids(text.replace(_MARK, wedge))
        found = re.findall(f"{_MARK}|{re.escape(wedge)}", text)
        places = [at for at, token in enumerate(ids) if token == self.end_of_turn]
        if len(places) == len(found):
            wedges = {at for at, what in zip(places, found, strict=True) if what == _MARK}
            ids = tuple(token for at, token in enumerate(ids) if at not in wedges)
            if self._decode(ids) == self._decode(self._ids(text.replace(_MARK, ""))):
                return ids
        raise UnfitError("control-token", "a text contains a control token, which can't be encoded as plain text")

    def _ids(self, text: str, *, add_special_tokens: bool = False) -> tuple[int, ...]:
        # the template writes BOS where the model wants one; the tokenizer would write it a second time
        ids = self._template.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        if (largest := max(ids, default=0)) >= self.vocab_size:
            raise QspinError(
                f"model.id: the tokenizer writes token {largest}, but {self.vocab_size} have an embedding; "
                "take the tokenizer that was saved with this model"
            )
        return tuple(ids)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._template.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _shown(self, ids: Sequence[int], start: int, end: int) -> Iterator[str]:
        for at in range(start, end):
            # U+FFFD stands for an unfinished character; one has at most 4 bytes, so a fifth token can't finish it
            before = ids[max(0, start - 1) : start]  # decoded along: alone, a SentencePiece token loses its space
            text = self._decode([*before, *ids[start : at + 1]])[len(self._decode(before)) :]
            if "\ufffd" not in text or at - start == 3 or at == end - 1:
                yield text
                start = at + 1


def _system_into_user(messages: Sequence[Message]) -> list[Message]:
    """Each system text goes before the text of the user turn that follows it."""
    folded: list[Message] = []
    waiting = ""
    for message in messages:
        if message.role == "system":
            waiting += f"{message.content}\n\n"
            continue
        before, waiting = (waiting, "") if message.role == "user" else ("", waiting)
        folded.append(replace(message, content=before + message.content))
    return folded
