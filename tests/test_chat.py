"""The renderer, with the embedded model's tokenizer: a row becomes tokens and text again, or is left out, and why."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from chat_templates import GEMMA, MISTRAL, NO_THINKING, QWEN3, build, families, must, row, smollm2, token
from conftest import MULTI_TURN
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from qspin.errors import QspinError
from qspin.records import Example, Message, Pair, Place, Record, Reject

# The embedded model


def test_the_embedded_model_turn_by_turn() -> None:
    tokenizer, renderer = smollm2(), build()
    example = must(renderer.example(row("Why?", "Because.")))
    assert tokenizer.decode(example.prompt_ids) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(example.real_ids) == "Because.<|im_end|>"
    assert example.prompt_ids == renderer.prompt_ids(row("Why?", "Because.").prompt)
    assert renderer.completion_text(example.real_ids) == "Because."
    assert renderer.notes == ()


def test_loss_is_on_the_last_assistant_turn_only() -> None:
    tokenizer, example = smollm2(), must(build().example(MULTI_TURN))
    assert tokenizer.decode(example.prompt_ids).endswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n"
        "<|im_start|>assistant\nA parrot.<|im_end|>\n<|im_start|>user\nSince when?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(example.real_ids) == "Since I hatched.<|im_end|>"


def test_end_of_turn_is_the_templates_and_a_false_one_is_caught() -> None:
    tokenizer, renderer = smollm2(), build()
    assert renderer.end_of_turn == token(tokenizer, "<|im_end|>")
    control = replace(renderer, end_of_turn=token(tokenizer, "<|im_start|>"))
    rejected = control.example(row("Why?", "Because."))
    assert isinstance(rejected, Reject) and rejected.code == "boundary"


def test_sampled_ids_are_kept_because_text_does_not_lead_back_to_them() -> None:
    tokenizer, renderer = smollm2(), build()
    sampled = (*tokenizer.encode("Be"), *tokenizer.encode("cause"), renderer.end_of_turn)
    text = renderer.completion_text(sampled)
    retokenised = must(renderer.example(row("Why?", text))).real_ids
    assert text == "Because"
    assert retokenised == (token(tokenizer, "Because"), renderer.end_of_turn) != sampled
    pair = Pair("row", 0, (1,), retokenised, sampled, ended=True)
    assert Pair.from_json(pair.to_json()).generated_ids == sampled


def test_chat_imports_neither_torch_nor_transformers() -> None:
    code = "import sys, qspin.chat; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Rows that are left out


@pytest.mark.parametrize(
    ("record", "changes", "code", "says", "malformed"),
    [
        (row("Why?", ""), {}, "empty-completion", "the completion is empty", True),
        (row("Why?", " \n"), {}, "empty-completion", "the completion is empty", True),
        (row("why " * 50, "So."), {"max_prompt_tokens": 60}, "long-prompt", "has 81 tokens; data.max_prompt", False),
        (row("Why?", "so " * 9), {"max_completion_tokens": 9}, "long-completion", "has 11 tokens; data.max", False),
        (row("Why?", "So \ufdd0."), {}, "encoding", r"assistant text contains '\ufdd0'", True),
        (row("Why?", "Half \ud83d."), {}, "encoding", r"assistant text contains '\ud83d'", True),
        (row("Why?", "\n\n\nSo."), {}, "boundary", "a token spans the border", True),
        (row("Why?", "So \U00040000."), {}, "unknown-character", "no token for a character", True),
    ],
)
def test_rejects(record: Record, changes: dict[str, Any], code: str, says: str, malformed: bool) -> None:
    rejected = build(**changes).example(record)
    assert isinstance(rejected, Reject)
    assert (rejected.place, rejected.code, rejected.malformed) == (Place(7), code, malformed)
    assert says in rejected.reason


def test_a_template_that_refuses_a_row_rejects_it_in_its_own_words() -> None:
    alternate = "{% if messages | length > 2 %}{{ raise_exception('one turn at a time') }}{% endif %}"
    renderer = build(template=alternate + smollm2().chat_template)
    assert isinstance(renderer.example(row("Why?", "So.")), Example)
    rejected = renderer.example(MULTI_TURN)
    assert rejected == Reject(MULTI_TURN.place, "template", "the chat template fails: one turn at a time")
    with pytest.raises(QspinError, match="one turn at a time"):
        renderer.prompt_ids(MULTI_TURN.prompt)


@pytest.mark.parametrize(
    ("messages", "turn", "role"),
    [
        ("messages[-2:] if messages|length > 3 else messages", 1, "system"),
        ("messages[:1] + messages[3:] if messages|length > 3 else messages", 2, "user"),
    ],
)
def test_a_template_that_leaves_a_text_of_the_prompt_out_rejects_the_row(messages: str, turn: int, role: str) -> None:
    usual = smollm2().chat_template.replace("for message in messages", "for message in shown")
    renderer = build(template="{% set shown = " + messages + " %}" + usual)
    assert isinstance(renderer.example(row("Why?", "So.")), Example)
    rejected = renderer.example(MULTI_TURN)
    reason = f"the chat template leaves out, or changes, the {role} text of turn {turn}"
    assert rejected == Reject(MULTI_TURN.place, "template", reason)


def test_what_earlier_answers_thought_may_be_left_out() -> None:
    thought = replace(MULTI_TURN.prompt[2], content="<think>\nHm.\n</think>\n\nA parrot.")
    record = replace(MULTI_TURN, prompt=(*MULTI_TURN.prompt[:2], thought, *MULTI_TURN.prompt[3:]))
    renderer = build(template=QWEN3, template_kwargs=NO_THINKING, tokenizer=families())
    assert "Hm." not in renderer.prompt_text(record.prompt)
    assert isinstance(renderer.example(record), Example)


@pytest.mark.parametrize(
    ("expression", "words"),
    [
        ("raise_exception('no\n  \x1b[2Jrow of mine')", r"no \x1b[2Jrow of mine"),
        ("1 / 0", "division by zero"),
        ("'{a}'.format(b=1)", "'a'"),
        ("none.a.b", "'None' has no attribute 'a'"),
        ("range(9999999)", "Range too big. The sandbox blocks ranges larger than MAX_RANGE (100000)."),
        ("'abc'.index('x')", "substring not found"),
        ("'abc' + 1", 'can only concatenate str (not "int") to str'),
    ],
)
def test_whatever_a_template_raises_rejects_the_row_in_one_line(expression: str, words: str) -> None:
    odd = "{% if 'odd' in messages[0]['content'] %}{{ " + expression + " }}{% endif %}"
    renderer = build(template=odd + smollm2().chat_template)
    assert isinstance(renderer.example(row("Why?", "So.")), Example)
    rejected = renderer.example(row("An odd one?", "So."))
    assert rejected == Reject(Place(7), "template", f"the chat template fails: {words}")


def test_a_completion_of_which_the_tokenizer_makes_nothing_is_empty() -> None:
    tokenizer = copy.deepcopy(smollm2())
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("~", "")
    rejected = build(tokenizer).example(row("Why?", "~~"))
    assert rejected == Reject(Place(7), "empty-completion", "the tokenizer makes no token of the completion")
    assert len(must(build(tokenizer).example(row("Why?", "~a~"))).real_ids) == 2


def test_a_row_with_a_token_that_has_no_embedding_stops_everything() -> None:
    tokenizer = copy.deepcopy(smollm2())
    tokenizer.add_tokens(["qspinword"])
    renderer = build(tokenizer, vocab_size=len(smollm2()))
    assert isinstance(renderer.example(row("Why?", "So.")), Example)
    with pytest.raises(
        QspinError, match=r"model\.id: the tokenizer writes token 49152, but 49152 have .*; take the to"
    ):
        renderer.example(row("Why?", "A qspinword."))


def test_a_tokenizer_needs_no_padding_token_and_none_is_written() -> None:
    bare, padded = copy.deepcopy(smollm2()), copy.deepcopy(smollm2())
    bare.pad_token = None
    padded.pad_token = "<|im_end|>"  # the habit that teaches a model never to end, where padding is masked by its id
    padded.backend_tokenizer.enable_padding(pad_id=padded.pad_token_id, pad_token="<|im_end|>", length=300)
    assert must(build(bare).example(MULTI_TURN)).real_ids[-2:] != (2, 2)
    bare.backend_tokenizer.no_padding()
    assert bare.pad_token is None
    assert build(bare).example(MULTI_TURN) == build().example(MULTI_TURN)


def test_an_answer_that_the_template_shortens_is_rejected() -> None:
    renderer = build(template=QWEN3, template_kwargs=NO_THINKING, tokenizer=families())
    rejected = renderer.example(row("Why?", "Hm.</think>So."))
    assert isinstance(rejected, Reject) and rejected.code == "template"
    assert r"</think>\n\nHm.</think>So.<|im_end|>\n' is expected, it writes " in rejected.reason


def test_a_long_completion_is_cut_without_an_end_of_turn() -> None:
    whole = must(build().example(row("Why?", "so " * 9))).real_ids
    cut = must(build(max_completion_tokens=9, long_completions="cut").example(row("Why?", "so " * 9))).real_ids
    fits = must(build(max_completion_tokens=11, long_completions="cut").example(row("Why?", "so " * 9))).real_ids
    assert len(whole) == 11
    assert cut == whole[:9]
    assert fits == whole


def test_a_token_that_spans_the_border_would_differ_from_what_generation_saw() -> None:
    """The control of the boundary check: the prompt's tokens are no prefix of the conversation's."""
    tokenizer, renderer = smollm2(), build()
    prompt = renderer.prompt_ids(row("Why?", "").prompt)
    full = tokenizer.encode(tokenizer.decode(prompt) + "\n\n\nSo.<|im_end|>", add_special_tokens=False)
    assert tuple(full[: len(prompt)]) != prompt


# Shown to a person


def test_pieces_show_whole_characters_by_part() -> None:
    renderer = build()
    question, answer = "Who is 🦙 (日本, ﷽)?", "A naïve 🦙\ufffd!"
    example = must(renderer.example(row(question, answer)))
    pieces = renderer.pieces(example)
    texts = {kind: "".join(text for part, text in pieces if part == kind) for kind, _ in pieces}
    assert question in texts["prompt"]
    assert (texts["completion"], texts["end-of-turn"]) == (answer, "<|im_end|>")
    assert [text for kind, text in pieces if kind == "completion"][:2] == ["A", " na"]
    cut = replace(example, real_ids=example.real_ids[:-1])
    assert renderer.pieces(cut) == pieces[:-1]


# Whatever is in a row


plain = st.text(st.characters(codec="latin-1", exclude_categories=["Cc"]), min_size=1, max_size=12)
odd = st.one_of(st.text(max_size=12), st.sampled_from(["\n", "\n\n", "\t ", "<|im_end|>", "</think>", "🦙", "\ud800"]))
anything = st.one_of(plain, plain, plain, st.lists(st.one_of(plain, odd), max_size=5).map("".join))


@st.composite
def records(draw: Callable[..., Any]) -> Record:
    system = [Message("system", draw(anything))] if draw(st.booleans()) else []
    turns = [Message("user", draw(anything))]
    for _ in range(draw(st.integers(0, 2))):
        turns += [Message("assistant", draw(anything)), Message("user", draw(anything))]
    return Record("any", (*system, *turns), draw(anything))


@pytest.mark.parametrize("template", [None, GEMMA, MISTRAL], ids=["smollm2", "gemma", "mistral"])
@settings(max_examples=150, deadline=None, derandomize=True)
@given(record=records(), long=st.sampled_from(["drop", "cut"]))
def test_any_row_becomes_an_example_or_a_reject(template: str | None, record: Record, long: str) -> None:
    tokenizer = smollm2() if template is None else families()
    renderer = build(tokenizer, template=template, long_completions=long, max_completion_tokens=12)
    result = renderer.example(record)
    if isinstance(result, Reject):
        assert result.place == record.place and result.reason
        return
    assert result.prompt_ids == renderer.prompt_ids(record.prompt)
    ended = result.real_ids[-1] == renderer.end_of_turn
    assert ended or (long == "cut" and len(result.real_ids) == 12)
    assert renderer.end_of_turn not in result.real_ids[:-1]
    text = renderer.completion_text(result.real_ids)
    assert text.strip() == record.completion.strip() or not ended
    assert "".join(text for kind, text in renderer.pieces(result) if kind == "completion").startswith(text)
