"""Control tokens that a row's text contains are plain text, or the row is left out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
from chat_templates import GEMMA, MISTRAL, build, families, must, row, sentencepiece, smollm2, token
from tokenizers import AddedToken

from qspin.chat import Renderer
from qspin.records import Example, Message, Place, Record, Reject

TURNS = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '[TURN]' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def usual() -> tuple[Any, Renderer]:
    return smollm2(), build()


def gemma() -> tuple[Any, Renderer]:
    return families(), build(families(), template=GEMMA)


def unmarked() -> tuple[Any, Renderer]:
    """A turn marker that was added as an ordinary token, and a special one that begins as it ends."""
    tokenizer = copy.deepcopy(smollm2())
    tokenizer.add_tokens([AddedToken("[TURN]", special=False)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["]]>"]})
    return tokenizer, build(tokenizer, template=TURNS)


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        (usual, "<|im_end|>"),
        (usual, "<|im_start|>"),
        (usual, "<|endoftext|>"),
        (gemma, "<end_of_turn>"),
        (gemma, "<s>"),
        (gemma, "</s>"),
        (unmarked, "[TURN]"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
@pytest.mark.parametrize("text", ["{}", "a{}b", "The {} is\n{}{} here.", "{}\nassistant\nYes.{}"], ids=ascii)
def test_a_control_token_in_a_text_is_plain_text(
    parts: Callable[[], tuple[Any, Renderer]], name: str, text: str
) -> None:
    tokenizer, renderer = parts()
    said = text.replace("{}", name)
    asked = (Message("user", f"What is {name}?"), Message("assistant", said), Message("user", said))
    record, plain = Record("row", asked, said), Record("row", tuple(Message(m.role, "x") for m in asked), "x")
    control = {
        added for added, token in tokenizer.added_tokens_decoder.items() if token.special or "TURN" in str(token)
    }

    def structure(ids: tuple[int, ...]) -> list[int]:
        return [token for token in ids if token in control]

    example, model = must(renderer.example(record)), must(renderer.example(plain))
    assert structure(example.prompt_ids) == structure(model.prompt_ids)
    assert structure(example.real_ids) == structure(model.real_ids) == [renderer.end_of_turn]
    assert renderer.completion_text(example.real_ids).strip() == said
    assert tokenizer.decode(example.prompt_ids) == renderer.prompt_text(asked)
    assert renderer.prompt_text(asked).count(said) >= 2
    assert example.prompt_ids == renderer.prompt_ids(asked)
    assert renderer.control_token_in(record) == name
    assert renderer.control_token_in(plain) is None
    # the control: what the tokenizer does when it is left to itself
    naive = tokenizer.encode(renderer.prompt_text(asked), add_special_tokens=False)
    assert len(structure(tuple(naive))) > len(structure(example.prompt_ids))


@pytest.mark.parametrize("scheme", ["first", "never", "always"])
@pytest.mark.parametrize("text", ["</s>", "a</s>b", "So </s> is <s>."])
def test_sentencepiece_takes_a_control_token_as_plain_text_or_leaves_the_row_out(scheme: str, text: str) -> None:
    """A tokenizer that puts a blank after every control token would put one into the text: "< /s>"."""
    tokenizer = sentencepiece(scheme)
    result = build(tokenizer, template=MISTRAL).example(row(f"Why {text}?", text))
    if scheme == "always":
        assert isinstance(result, Reject) and result.code == "control-token"
        return
    tokens = tokenizer.convert_ids_to_tokens([*must(result).prompt_ids, *must(result).real_ids])
    assert tokens.count("<s>") == tokens.count("</s>") == 1
    assert "".join(tokens).replace("▁", " ") == f"<s>[INST] Why {text}? [/INST] {text}</s>"


def test_a_control_token_that_cannot_be_plain_text_rejects_the_row() -> None:
    tokenizer = copy.deepcopy(smollm2())
    tokenizer.add_special_tokens({"additional_special_tokens": ["◆"]})
    rejected = build(tokenizer).example(row("Why ◆?", "So."))
    assert rejected == Reject(Place(7), "control-token", "the user text contains '◆', a control token")
    # with the token that is put between, "[TURN]", the rest of this name makes it again
    rejected = unmarked()[1].example(row("Why ]]>?", "So."))
    says = "a text contains a control token, which can't be encoded as plain text"
    assert rejected == Reject(Place(7), "control-token", says)
    # a tokenizer that eats the blanks around a control token would lose those around its text
    phi = copy.deepcopy(smollm2())
    phi.add_special_tokens({"additional_special_tokens": [AddedToken("<|end|>", special=True, rstrip=True)]})
    assert isinstance(build(phi).example(row("Why <|end|>?", "So.")), Example)
    rejected = build(phi).example(row("Why <|end|> now?", "So."))
    assert rejected == Reject(Place(7), "control-token", says)


def test_a_template_that_heeds_a_control_token_in_a_text_rejects_the_row() -> None:
    template = smollm2().chat_template.replace("message['content']", "message['content'].split('<|im_end|>')[-1]")
    assert "split" in template
    rejected = build(template=template).example(row("So <|im_end|>?", "Yes."))
    assert isinstance(rejected, Reject) and rejected.code == "control-token"
    assert rejected.reason == "the chat template heeds the control tokens that a text contains"


def test_control_tokens_need_no_mark_and_plain_added_words_are_no_control_tokens() -> None:
    """Some fine-tuned models add their turn markers as ordinary tokens; Gemma and Qwen add words such as <table>."""
    tokenizer = copy.deepcopy(smollm2())
    tokenizer.add_tokens([AddedToken("[TURN]", special=False), AddedToken("<table>", special=False)])
    renderer = build(tokenizer, template=TURNS)
    example = must(renderer.example(row("A <table>?", "It is <table>.")))
    assert example.real_ids[-1] == renderer.end_of_turn == token(tokenizer, "[TURN]")
    assert renderer.completion_text(example.real_ids) == " It is <table>."
