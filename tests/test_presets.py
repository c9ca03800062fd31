"""Presets of models: their shapes count up, they say only what they change, and their templates fit the renderer.

And presets as a person meets them: the list, one shown, a file to edit, and the page that lists them.
"""

from __future__ import annotations

import copy
import datetime
import importlib.util
import io
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from conftest import ARCHITECTURES, MULTI_TURN, ROOT
from gpu_cases import model_config
from pydantic import BaseModel
from rich.console import Console

from qspin.chat import Renderer
from qspin.config import Architecture, RunConfig, load_config
from qspin.errors import QspinError
from qspin.machine import card
from qspin.planning.plan import make_plan
from qspin.planning.plan_rows import assumed_rows
from qspin.presets import COLUMNS, listed, rows, shown, starter, write_starter
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
    assert config.model.license
    assert config.model.architecture is not None
    assert config.model.architecture.family in ARCHITECTURES, "its kind of model is tested"


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
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(model_config(architecture))
    return sum(parameter.numel() for parameter in model.parameters())


# --- templates ---


ONE_TURN = Record("one", (Message("user", "Who are you?"),), "A parrot.")
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
    assert isinstance(renderer.example(ONE_TURN), Example)
    example = renderer.example(MULTI_TURN)
    assert isinstance(example, Example), example
    assert (marked.decode(example.prompt_ids), marked.decode(example.real_ids)) == TEXTS[name]


def test_the_template_for_bases_writes_no_control_tokens_but_beginning_and_end(tokenizer: Any) -> None:
    """Llama 3.1's other control tokens, which its tokenizer has as well, were never trained in the base."""
    own = copy.deepcopy(tokenizer)
    unused = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|finetune_right_pad_id|>"]
    marks = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "additional_special_tokens": unused}
    own.add_special_tokens(marks)
    template = template_of("llama-3.1-8b")
    assert template is not None
    renderer = renderer_of(own, template.read_text(encoding="utf-8"))
    example = renderer.example(MULTI_TURN)
    assert isinstance(example, Example), example
    ids = (*example.prompt_ids, *example.real_ids)
    written = [own.decode([token]) for token in ids if token in own.added_tokens_decoder]
    assert written == ["<|begin_of_text|>", "<|end_of_text|>", "<|end_of_text|>"]


@pytest.mark.parametrize("record", [ONE_TURN, MULTI_TURN], ids=["one turn", "multi-turn"])
def test_qwen3s_own_template_writes_the_same_before_an_answer_in_both_with_the_presets_switch(
    record: Record, tokenizer: Any
) -> None:
    """Without it, the empty block of thoughts is in the conversation and not in the prompt."""
    spec = importlib.util.find_spec("trl")  # located, not imported: it carries the templates that models ship
    if spec is None or spec.origin is None:
        pytest.skip("the real template is in TRL's wheel: pip install --no-deps trl")
    template = (Path(spec.origin).parent / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
    messages = [{"role": message.role, "content": message.content} for message in record.prompt]
    answer = {"role": "assistant", "content": record.completion}

    def texts(**switches: Any) -> tuple[str, str]:
        prompt, conversation = (
            tokenizer.apply_chat_template(
                given, chat_template=template, add_generation_prompt=generation, tokenize=False, **switches
            )
            for given, generation in ((messages, True), ([*messages, answer], False))
        )
        return prompt, conversation

    prompt, conversation = texts(**load_config("qwen3-8b").chat.template_kwargs)
    assert conversation == f"{prompt}{record.completion}<|im_end|>\n"
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    prompt, conversation = texts()
    assert conversation == f"{prompt}<think>\n\n</think>\n\n{record.completion}<|im_end|>\n"


def test_a_system_text_that_only_an_open_question_gets_is_a_reject(marked: Any) -> None:
    """Why Mistral's presets bring templates: this is what the tokenizers' own do."""
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' }}"
        "{% if loop.last and messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\n\n' }}{% endif %}"
        "{{ m['content'] + '[/INST]' }}{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
        "{% endif %}{% endfor %}"
    )
    renderer = renderer_of(marked, template)
    assert isinstance(renderer.example(ONE_TURN), Example)
    reject = renderer.example(MULTI_TURN)
    assert isinstance(reject, Reject)
    assert reject.code == "template"


# --- the list ---


def test_the_list_has_a_row_for_each_preset_the_smallest_model_first() -> None:
    listed = rows()
    assert sorted(name for name, *_ in listed) == PRESETS
    sizes = [float(size.removesuffix("B")) for _, size, *_ in listed]
    assert sizes == sorted(sizes)
    about = "a small model learns a house style, in minutes on a laptop"
    assert listed[0] == ("quickstart", "0.1B", "Apache-2.0", about)
    licences = {name: licence for name, _, licence, _ in listed}
    assert licences["llama-3.1-8b"] == "Llama 3.1, gated"
    assert licences["mistral-nemo-instruct"] == "Apache-2.0, gated?"


@pytest.mark.parametrize("width", [40, 71, 72, 80, 120])
def test_the_list_fits_the_terminal_and_loses_nothing(width: int) -> None:
    out = io.StringIO()
    Console(file=out, width=width).print(listed(width))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in out.getvalue()
    for name, size, *_ in rows():
        assert any(re.match(rf"{re.escape(name)} +{size} ", line) for line in lines), "name and size are whole"
    words = set(out.getvalue().split())
    assert all(word in words for row in rows() for cell in row for word in cell.split())


def test_the_page_on_presets_has_the_list() -> None:
    page = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("|")]
    head, _, *body = lines
    assert tuple(head) == COLUMNS
    assert [(name.strip("`"), *rest) for name, *rest in body] == rows()


# --- one of them ---


@pytest.mark.parametrize(
    ("name", "below"),
    [("smollm2-135m", []), ("qwen3-8b", ["sizes/7b"]), ("paper-qlora", ["paper", "zephyr-7b-sft", "sizes/7b"])],
)
def test_a_preset_is_shown_with_the_reasons_of_all_that_it_builds_on(name: str, below: list[str]) -> None:
    files = [FILES[f"{file}.yaml"] for file in (name, *below)]
    texts = "\n".join(f"# {file}\n\n{file.read_text(encoding='utf-8')}" for file in files)
    assert shown(name).startswith(texts)
    assert ("# together: " in shown(name)) == bool(below), "one file says it all itself"


def test_a_configuration_file_is_shown_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("preset: qwen3-8b\nseed: 3  # a lucky one\n")
    text = shown(str(path))
    assert text.startswith(f"# {path}\n\npreset: qwen3-8b\nseed: 3  # a lucky one\n\n# {FILES['qwen3-8b.yaml']}\n")
    *_, last = text.split("# together: all that differs from the defaults\n")
    assert RunConfig.model_validate(yaml.safe_load(last)) == load_config(path)


# --- a file to edit ---


def loaded(text: str, folder: Path) -> RunConfig:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


SETTING = re.compile(r"( *)#(\w+: .*)")  # prose has a blank after its #


def uncommented(lines: list[str]) -> list[str]:
    return [SETTING.sub(r"\1\2", line) for line in lines]


@pytest.mark.parametrize("name", PRESETS)
def test_a_starter_is_its_preset_with_all_of_its_lines_in_comments_or_none(name: str, tmp_path: Path) -> None:
    lines = starter(name, "mine.yaml").splitlines()
    assert loaded("\n".join(lines), tmp_path) == load_config(name)
    assert loaded("\n".join(uncommented(lines)), tmp_path) == load_config(name)


@pytest.mark.parametrize("name", ["quickstart", "paper", "mistral-7b", "qwen3-8b"])  # paths, lists and mappings
def test_a_starter_is_its_preset_with_any_of_its_lines_uncommented(name: str, tmp_path: Path) -> None:
    lines = starter(name, "mine.yaml").splitlines()
    settings = [index for index, line in enumerate(lines) if SETTING.fullmatch(line)]
    assert len(settings) > 40
    for index in settings:
        changed = [*lines[:index], *uncommented(lines[index : index + 1]), *lines[index + 1 :]]
        assert changed != lines
        assert loaded("\n".join(changed), tmp_path) == load_config(name), lines[index]


def test_a_line_of_a_starter_is_read_when_it_is_edited(tmp_path: Path) -> None:
    text = starter("qwen3-8b", "mine.yaml")
    for line, value in (("  #epochs: 2", 5), ("#iterations: 3", 7)):
        assert text.count(f"{line}\n") == 1
        text = text.replace(line, line.replace("#", "").rpartition(" ")[0] + f" {value}")
    config = loaded(text, tmp_path)
    assert (config.train.epochs, config.iterations) == (5, 7)
    assert config == load_config("qwen3-8b", {"train.epochs": 5, "iterations": 7})


def test_a_starter_has_every_setting_that_is_to_choose_and_what_it_means() -> None:
    lines = starter("qwen3-8b", "mine.yaml").splitlines()
    tree = yaml.safe_load("\n".join(uncommented(lines)))
    found = {f"{name}.{key}" for name, group in tree.items() if isinstance(group, dict) for key in group}
    found |= {name for name, value in tree.items() if not isinstance(value, dict)}
    described = dict(descriptions(RunConfig))
    facts = {"about", "model.license", "model.gated", "model.architecture"}
    assert found == (described.keys() - facts) | {"preset"}
    prose = " ".join(" ".join(lines).replace("#", " ").split())
    assert {key for key, text in described.items() if text not in prose} == facts


def descriptions(part: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every setting with what it means; an optional group is one setting."""
    for name, field in part.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from descriptions(field.annotation, f"{name}.")
        else:
            yield prefix + name, str(field.description)


def test_a_starter_has_the_presets_values_and_names_those_that_there_are() -> None:
    text = starter("qwen3-8b", "mine.yaml")
    assert "  # ℓ, of the margin (logistic, hinge, exponential, correlation)\n  #loss: logistic\n" in text
    assert "  # peak learning rate; a list as for beta\n  #lr: 1.0e-05\n" in text
    assert "\n  #template_kwargs: {enable_thinking: false}\n" in text
    assert max(map(len, text.splitlines())) <= 120
    assert " ".join(text.replace("#", " ").split()).count("prompt-completion, prompt-response, ") == 1, (
        "names stay whole"
    )


def test_a_starter_goes_into_a_new_file_only(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    write_starter("qwen3-8b", path)
    text = path.read_text(encoding="utf-8")
    assert text == starter("qwen3-8b", str(path))
    with pytest.raises(QspinError, match="exists already"):
        write_starter("paper", path)
    assert path.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("preset", "file", "said"),
    [
        ("qwen3", "mine.yaml", "no preset is called 'qwen3'; did you mean qwen3-8b? there are "),
        ("mine.yaml", "other.yaml", "no preset is called 'mine.yaml'; "),
        ("qwen3-8b", "mine.txt", "-o: {}/mine.txt must end in .yaml, by which a configuration is told from a preset"),
        ("qwen3-8b", "none/mine.yaml", "-o: {}/none/mine.yaml can't be written: No such file or directory"),
    ],
)
def test_a_starter_that_cannot_be_written(preset: str, file: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(QspinError) as caught:
        write_starter(preset, tmp_path / file)
    assert str(caught.value).startswith(said.format(tmp_path))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_how_long_the_page_says_that_the_papers_experiment_takes() -> None:
    page = " ".join((ROOT / "docs" / "presets.md").read_text(encoding="utf-8").split())
    assert "`qspin plan paper-qlora --vram 24` it takes about three weeks on a card of 24 GB, and two months on" in page
    config = load_config("paper-qlora")
    assert config.data.limit == 50_000
    for gigabytes, days in [(24, 21), (12, 61)]:
        plan = make_plan(config, card(gigabytes, config.model), assumed_rows(config.data.limit))
        assert plan.seconds / 86_400 == pytest.approx(days, rel=0.15)
