"""Chat templates of several families, those that TRL's wheel carries among them: each does, or says why not."""

from __future__ import annotations

import copy
import datetime
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from chat_templates import (
    DATE,
    GEMMA,
    LLAMA_DATE,
    MISTRAL,
    NO_THINKING,
    QWEN3,
    build,
    families,
    must,
    row,
    sentencepiece,
    smollm2,
    token,
    trl_templates,
)
from conftest import MULTI_TURN
from tokenizers import processors

from qspin.chat import Renderer
from qspin.config_files import presets_dir
from qspin.errors import QspinError
from qspin.records import Record

# --- families ---


def test_todays_date_is_the_runs() -> None:
    tokenizer = smollm2()
    prompt = build(template=LLAMA_DATE).prompt_ids(row("Why?", "").prompt)
    assert "Today Date: 26 Jul 2024<|im_end|>" in tokenizer.decode(prompt)
    other = build(template=LLAMA_DATE, date=datetime.date(2025, 1, 2)).prompt_ids(row("Why?", "").prompt)
    assert "Today Date: 02 Jan 2025<|im_end|>" in tokenizer.decode(other)


def test_gemma_gets_the_system_text_with_the_first_question() -> None:
    tokenizer = families()
    renderer = build(tokenizer, template=GEMMA)
    assert renderer.notes == (
        "The chat template refuses a system text (System role not supported); it is put before the first user turn's "
        "text, after it a blank line.",
    )
    example = must(renderer.example(MULTI_TURN))
    assert tokenizer.decode(example.prompt_ids) == (
        "<s><start_of_turn>user\nBe brief.\n\nWho are you?<end_of_turn>\n<start_of_turn>model\nA parrot.<end_of_turn>\n"
        "<start_of_turn>user\nSince when?<end_of_turn>\n<start_of_turn>model\n"
    )


def test_bos_is_the_templates_alone() -> None:
    tokenizer, bos = copy.deepcopy(families()), token(families(), "<s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    assert tokenizer.encode("<s>Why?")[:2] == [bos, bos]  # the control: what the tokenizer would do by itself
    example = must(build(tokenizer, template=GEMMA).example(row("Why?", "So.")))
    assert [at for at, id_ in enumerate((*example.prompt_ids, *example.real_ids)) if id_ == bos] == [0]


def test_plain_text_has_bos_once_and_only_where_it_begins() -> None:
    tokenizer, bos = copy.deepcopy(families()), token(families(), "<s>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    renderer, why = build(tokenizer, template=GEMMA), tuple(families().encode("Why?"))
    assert renderer.plain_ids("Why?", begun=True) == renderer.plain_ids("<s>Why?", begun=True) == (bos, *why)
    assert renderer.plain_ids("Why?", begun=False) == why
    assert (renderer.before_text, renderer.end_of_text) == (bos, token(tokenizer, "</s>"))
    assert renderer.end_of_turn == token(tokenizer, "<end_of_turn>")
    tokenizer.bos_token = None
    assert renderer.before_text == renderer.end_of_text


def test_a_template_that_drops_the_system_text_gets_it_with_the_question() -> None:
    renderer = build(families(), template=MISTRAL)
    assert "leaves out a system text" in renderer.notes[0]
    assert "[INST] Be brief.\n\nWho are you? [/INST] A parrot.</s>" in families().decode(
        renderer.prompt_ids(MULTI_TURN.prompt)
    )


def test_qwen3_needs_its_switch_in_prompt_and_conversation_alike() -> None:
    tokenizer = families()
    renderer = build(tokenizer, template=QWEN3, template_kwargs=NO_THINKING)
    example = must(renderer.example(row("Why?", "So.")))
    assert tokenizer.decode(example.prompt_ids).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert tokenizer.decode(example.real_ids) == "So.<|im_end|>"


def test_mistral_with_sentencepiece_keeps_its_space_in_the_completion() -> None:
    tokenizer = sentencepiece("first")
    renderer = build(tokenizer, template=MISTRAL)
    example = must(renderer.example(row("Why is it?", "Because so.")))
    pieces = renderer.pieces(example)
    assert "".join(text for kind, text in pieces if kind == "prompt") == "<s>[INST] Why is it? [/INST]"
    assert "".join(text for kind, text in pieces if kind == "completion") == " Because so."
    assert pieces[-1] == ("end-of-turn", "</s>")


@dataclass(frozen=True)
class Works:
    end_of_turn: str
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Fails:
    says: str
    template_kwargs: dict[str, Any] = field(default_factory=dict)


CHATML, TURN = Works("<|im_end|>"), Works("<turn|>")
CHATML_NO_THINKING = Works("<|im_end|>", NO_THINKING)
NO_LEAD = Fails("does not lead up to the answer.*look for a switch .* or set chat.template")
IMAGES = Fails("does not show plain text")

# What happens with each template; one that TRL patched for training does the same unless it is listed itself.
OUTCOMES: dict[str, Works | Fails] = {
    "cohere": Works("<|END_OF_TURN_TOKEN|>"),
    "cohere2": Works("<|END_RESPONSE|>"),
    "deepseek_r1_distill": NO_LEAD,
    "deepseekv3": NO_LEAD,
    "diffusion_gemma": TURN,
    "gemma": Works("<end_of_turn>"),
    "gemma3": Works("<end_of_turn>"),
    "gemma4": TURN,
    "gemma4_v2": TURN,
    "gemma4_v3": TURN,
    "gemma4_v4": TURN,
    "gemma4_v5": TURN,
    "glm4moe": Fails("no end-of-turn token: after an answer the chat template writes ''", NO_THINKING),
    "glm4moe_training": Works("<|user|>", NO_THINKING),
    "gptoss": NO_LEAD,  # the model writes its channels itself
    "idefics3": IMAGES,
    "lfm2": CHATML,
    "lfm2_2_5": CHATML,
    "lfm2_2_5_v2": CHATML,
    "lfm2_2_5_vl": CHATML,
    "lfm2_v2": CHATML,
    "llama3": Works("<|eot_id|>"),
    "llama3_1": Works("<|eot_id|>"),
    "llama3_2": Works("<|eot_id|>"),
    "llava_next": Fails("has no attribute 'text' .on a plain question"),
    "muse_glimmer": NO_LEAD,  # the model names the recipient itself
    "nemotron_3_5_lightning": CHATML_NO_THINKING,
    "nemotron_3_nano": CHATML_NO_THINKING,
    "nemotron_3_super": CHATML_NO_THINKING,
    "nemotron_3_ultra": CHATML_NO_THINKING,
    "phi3": Works("<|end|>"),
    "phi3_5": Works("<|end|>"),
    "qwen2_5": CHATML,
    "qwen2_5_vl": CHATML,
    "qwen3": CHATML_NO_THINKING,
    "qwen3_5_nothink": CHATML,
    "qwen3_5_think": CHATML_NO_THINKING,
    "qwen3_6": CHATML_NO_THINKING,
    "qwen3_8": CHATML_NO_THINKING,
    "qwen3_instruct_2507": CHATML,
    "qwen3_vl": CHATML,
    "smolvlm": IMAGES,
}


@pytest.mark.parametrize("path", trl_templates(), ids=lambda path: path.stem)
def test_every_real_template_works_or_says_why_not(path: Path) -> None:
    outcome = OUTCOMES.get(path.stem) or OUTCOMES[path.stem.removesuffix("_training")]
    tokenizer, template = families(), path.read_text(encoding="utf-8")
    if outcome.template_kwargs:  # the switch is needed, and the message without it names it
        with pytest.raises(QspinError, match=r"they agree with --set chat\.template_kwargs\.enable_thinking=false"):
            build(tokenizer, template=template)
    if isinstance(outcome, Fails):
        with pytest.raises(QspinError, match=f"(?s){outcome.says}"):
            build(tokenizer, template=template, template_kwargs=outcome.template_kwargs)
        return
    renderer = build(tokenizer, template=template, template_kwargs=outcome.template_kwargs)
    assert tokenizer.decode([renderer.end_of_turn]) == outcome.end_of_turn
    for record in (row("Why is it so?", "Because it is."), MULTI_TURN):
        assert_same_as_transformers(renderer, tokenizer, template, outcome.template_kwargs, record)


def assert_same_as_transformers(
    renderer: Renderer, tokenizer: Any, template: str, template_kwargs: dict[str, Any], record: Record
) -> None:
    """Prompt and completion are, token for token, what transformers makes of the prompt and of the conversation."""
    messages = [{"role": message.role, "content": message.content} for message in record.prompt]
    if renderer.notes and messages[0]["role"] == "system":
        system = messages.pop(0)
        messages[0]["content"] = f"{system['content']}\n\n{messages[0]['content']}"

    def ids(messages: list[dict[str, str]], **more: Any) -> tuple[int, ...]:
        return tuple(
            tokenizer.apply_chat_template(
                messages,
                chat_template=template,
                return_dict=False,
                strftime_now=DATE.strftime,
                **template_kwargs,
                **more,
            )
        )

    example = must(renderer.example(record))
    whole = (*example.prompt_ids, *example.real_ids)
    assert example.prompt_ids == ids(messages, add_generation_prompt=True)
    conversation = ids([*messages, {"role": "assistant", "content": record.completion}])
    assert conversation[: len(whole)] == whole
    assert (
        tokenizer.decode(conversation[len(whole) :]).removesuffix("</s>").removesuffix("<|END_OF_TURN_TOKEN|>").strip()
        == ""
    )
    assert renderer.completion_text(example.real_ids).strip() == record.completion
    assert example.real_ids.count(renderer.end_of_turn) == 1
    assert example.real_ids[-1] == renderer.end_of_turn


def test_no_template_of_the_wheel_is_left_out() -> None:
    if not trl_templates():
        pytest.skip("the real templates are in TRL's wheel: pip install --no-deps trl")
    stems = {path.stem for path in trl_templates()}
    assert stems - OUTCOMES.keys() - {f"{name}_training" for name in OUTCOMES} == set()


# --- templates and tokenizers that do not do ---


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"template": "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"}, "after an answer .* writes '\\\\n'"),
        ({"template": "{% if %}"}, "chat template fails: Expected an expression.*on a plain question"),
        ({"template": "{{ none + 'a' }}"}, "chat template fails: unsupported operand.*chat.template_kwargs"),
        ({"template": "{{ bos_token }}"}, "does not show plain text"),
        ({"template": ""}, "does not show plain text"),
        ({"template": "{{ bos_token }}" + LLAMA_DATE}, "begins a conversation with two tokens BOS"),
        ({"template_kwargs": {"tokenize": True}}, "multiple values for keyword argument 'tokenize'"),
        ({"vocab_size": 3}, "model.id: the tokenizer writes token .* but 3 have an embedding"),
        ({"template": QWEN3}, r"it writes '.*<think>.*--set chat.template_kwargs.enable_thinking=false"),
        ({"template": QWEN3, "template_kwargs": NO_THINKING}, "do not go together: a token spans the border"),
    ],
)
def test_build_says_what_is_wrong(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(QspinError, match=says):
        build(**changes)


def test_the_tokenizers_own_template_is_needed_or_another() -> None:
    tokenizer = copy.deepcopy(smollm2())
    own = tokenizer.chat_template
    expected = build().prompt_ids(MULTI_TURN.prompt)
    folder = presets_dir() / "templates"
    for template, named in [
        (None, ""),
        ("", ""),
        ({"tool_use": own, "rag": own}, " called default, but rag, tool_use"),
    ]:
        tokenizer.chat_template = template
        with pytest.raises(QspinError) as caught:
            build(tokenizer)
        assert str(caught.value) == (
            f"the tokenizer has no chat template{named} (a base model?): take the model's instruct version, or set "
            f"chat.template to a Jinja file that suits this model; {folder} has mistral-v3-tekken.jinja, "
            "mistral-v3.jinja, plain.jinja, and plain.jinja is for base models"
        )
        assert build(tokenizer, template=own).prompt_ids(MULTI_TURN.prompt) == expected
    tokenizer.chat_template = {"default": own, "tool_use": "{{ raise_exception('no') }}"}
    assert build(tokenizer).prompt_ids(MULTI_TURN.prompt) == expected
