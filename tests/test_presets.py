"""Presets of models: their shapes count up, they say only what they change, and their templates fit the renderer."""

from __future__ import annotations

import copy
import datetime
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from conftest import ROOT
from pydantic import BaseModel

from qspin.chat import Renderer
from qspin.config import Architecture, RunConfig, load_config
from qspin.records import Example, Message, Record, Reject

FILES = {path.relative_to(ROOT / "presets").as_posix(): path for path in (ROOT / "presets").rglob("*.yaml")}
PRESETS = sorted(path.stem for name, path in FILES.items() if "/" not in name)

# The publication's values: they stay what they are when a default changes.
RESTATES = {"paper.yaml"}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_loads_says_what_it_is_for_and_knows_its_models_shape(name: str) -> None:
    config = load_config(name)
    assert config.about
    assert config.model.id
    assert config.model.architecture is not None


@pytest.mark.parametrize("name", FILES)
def test_a_preset_repeats_nothing_of_what_it_builds_on(name: str) -> None:
    if name in RESTATES:
        pytest.skip("a publication's values, defaults or not")
    path = FILES[name]
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    parent = tree.pop("preset", None)
    beside = path.parent / str(parent)
    below = load_config(beside if beside.is_file() else parent)
    assert list(repeated(tree, load_config(path), below)) == []


def test_a_repeated_default_is_seen() -> None:
    tree = {"train": {"beta": 0.1, "epochs": 3}, "seed": 0, "data": {"limit": 5}}
    assert list(repeated(tree, RunConfig.model_validate(tree), load_config(None))) == ["train.beta", "seed"]


def repeated(tree: dict[str, Any], mine: BaseModel, below: BaseModel, prefix: str = "") -> Iterator[str]:
    """Keys of the tree whose values are those that are there without it."""
    for key, value in tree.items():
        here, there = getattr(mine, key), getattr(below, key)
        if isinstance(here, BaseModel) and isinstance(there, BaseModel):
            yield from repeated(value, here, there, f"{prefix}{key}.")
        elif here == there:
            yield prefix + key


@pytest.mark.parametrize("name", PRESETS)
def test_the_real_model_of_this_shape_has_so_many_parameters(name: str) -> None:
    architecture = load_config(name).model.architecture
    assert architecture is not None
    assert count_parameters(architecture) == architecture.parameters


def test_a_wrong_shape_counts_up_to_something_else() -> None:
    right = load_config("mistral-nemo-instruct").model.architecture
    assert right is not None
    for mistake in ({"head_size": 160}, {"intermediate": 14436}, {"tied_embeddings": True}):
        assert count_parameters(right.model_copy(update=mistake)) != right.parameters


@cache
def count_parameters(architecture: Architecture) -> int:
    """What transformers builds from the numbers, without memory for it; tied weights once."""
    config = transformers.AutoConfig.for_model(
        architecture.family,
        num_hidden_layers=architecture.layers,
        hidden_size=architecture.hidden,
        intermediate_size=architecture.intermediate,
        num_attention_heads=architecture.heads,
        num_key_value_heads=architecture.kv_heads,
        head_dim=architecture.head_size,
        vocab_size=architecture.vocabulary,
        tie_word_embeddings=architecture.tied_embeddings,
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


# --- templates ---


ONE_TURN = Record("one", (Message("user", "Who are you?"),), "A parrot.")
MULTI_TURN = Record(
    "multi",
    (
        Message("system", "Be brief."),
        Message("user", "Who are you?"),
        Message("assistant", "A parrot."),
        Message("user", "Since when?"),
    ),
    "Since I hatched.",
)
PLAIN = (
    "<s>Be brief.\n\nUser: Who are you?\n\nAssistant: A parrot.</s>\n\nUser: Since when?\n\nAssistant:",
    " Since I hatched.</s>",
)
TEXTS = {  # prompt and completion of the conversation with a system text
    "mistral-7b": PLAIN,
    "llama-3.1-8b": PLAIN,
    "mistral-7b-instruct": (
        "<s>[INST] Who are you?[/INST] A parrot.</s>[INST] Be brief.\n\nSince when?[/INST]",
        " Since I hatched.</s>",
    ),
    "mistral-nemo-instruct": (
        "<s>[INST]Who are you?[/INST]A parrot.</s>[INST]Be brief.\n\nSince when?[/INST]",
        "Since I hatched.</s>",
    ),
}


@pytest.fixture(scope="module")
def marked(tokenizer: Any) -> Any:
    """The small tokenizer with a beginning, an end and Mistral's marks."""
    own = copy.deepcopy(tokenizer)
    marks = {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["[INST]", "[/INST]"]}
    own.add_special_tokens(marks)
    return own


def renderer_of(tokenizer: Any, template: str) -> Renderer:
    return Renderer.build(
        tokenizer,
        template=template,
        template_kwargs={},
        date=datetime.date(2024, 7, 26),
        max_prompt_tokens=1024,
        max_completion_tokens=1024,
        long_completions="drop",
        vocab_size=len(tokenizer),
    )


def template_of(name: str) -> Path | None:
    template = load_config(name).chat.template
    return None if template is None else Path(template)


def test_every_template_of_a_preset_is_tested() -> None:
    templates = {name: template_of(name) for name in PRESETS}
    assert {name for name, template in templates.items() if template} == TEXTS.keys()
    assert {template for template in templates.values() if template} == {*(ROOT / "presets" / "templates").iterdir()}


@pytest.mark.parametrize("name", TEXTS)
def test_a_template_writes_prompt_and_conversation_alike(name: str, marked: Any) -> None:
    template = template_of(name)
    assert template is not None
    renderer = renderer_of(marked, template.read_text(encoding="utf-8"))
    assert renderer.notes == ()  # it takes system texts
    assert marked.decode([renderer.end_of_turn]) == "</s>"
    assert isinstance(renderer.example(ONE_TURN, 1), Example)
    example = renderer.example(MULTI_TURN, 1)
    assert isinstance(example, Example), example
    assert (marked.decode(example.prompt_ids), marked.decode(example.real_ids)) == TEXTS[name]


def test_a_system_text_that_only_an_open_question_gets_is_a_reject(marked: Any) -> None:
    """Why Mistral's presets bring templates: this is what the tokenizers' own do."""
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' }}"
        "{% if loop.last and messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}{% endif %}"
        "{{ m['content'] + '[/INST]' }}{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
        "{% endif %}{% endfor %}"
    )
    renderer = renderer_of(marked, template)
    assert isinstance(renderer.example(ONE_TURN, 1), Example)
    reject = renderer.example(MULTI_TURN, 1)
    assert isinstance(reject, Reject)
    assert reject.code == "template"
