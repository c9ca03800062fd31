"""Settings as a whole: overrides, one value an iteration, what may change when a run goes on, and writing them down."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY, config_refusal
from pydantic import BaseModel

from qspin.config import RunConfig, at_iteration, changed_results, dump_config, load_config, parse_override, parse_vary
from qspin.config_files import preset_names
from qspin.errors import QspinError

# --- overrides ---


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("train.beta=0.2", "train.beta", 0.2),
        ("train.epochs=3", "train.epochs", 3),
        ("train.beta=[0.1, 5]", "train.beta", [0.1, 5]),
        ("data.limit=null", "data.limit", None),
        ("model.double_quant=false", "model.double_quant", False),
        ("chat.template_kwargs={a: 1}", "chat.template_kwargs", {"a": 1}),
        ("evaluation.style=a=b", "evaluation.style", "a=b"),
        ("about=", "about", None),
        (" seed = 2", "seed", 2),
    ],
)
def test_an_override_is_a_key_and_a_yaml_value(text: str, key: str, value: Any) -> None:
    assert parse_override(text) == (key, value)


@pytest.mark.parametrize(
    ("key", "text", "taken"),
    [
        ("seed", "010", 10),
        ("seed", "+0123456", 123456),
        ("seed", "1_000", 1000),
        ("seed", "0", 0),
        ("train.beta", "[010, 0.5]", [10.0, 0.5]),
        ("model.revision", "0123456", "0123456"),
        ("data.config", "12:30", "12:30"),
    ],
)
def test_a_number_is_what_people_read(key: str, text: str, taken: Any, write: Callable[[str, str], Path]) -> None:
    """Of YAML 1.1, 010 would be 8."""
    group, _, name = key.rpartition(".")
    path = write("mine.yaml", f"{group}: {{{name}: {text}}}" if group else f"{name}: {text}")
    for config in (load_config(None, dict([parse_override(f"{key}={text}")])), load_config(path)):
        assert getattr(getattr(config, group) if group else config, name) == taken
    assert parse_vary([f"{key}={text}"])[key] == [parse_override(f"{key}={text}")[1]]


@pytest.mark.parametrize("text", ["12:30", "1:30:00", "190:20:30.15"])
def test_a_time_is_no_number(text: str, write: Callable[[str, str], Path]) -> None:
    """Of YAML 1.1, 12:30 would be 750."""
    said = f"\n  train.epochs = '{text}': Input should be a valid integer, unable to parse string as an integer"
    assert said in config_refusal(None, dict([parse_override(f"train.epochs={text}")]))
    assert said in config_refusal(write("mine.yaml", f"train:\n  epochs: {text}\n"))


@pytest.mark.parametrize("text", ["train.beta", "=0.2", ""])
def test_an_override_without_key_or_value(text: str) -> None:
    with pytest.raises(QspinError) as caught:
        parse_override(text)
    assert str(caught.value) == f"--set takes KEY=VALUE, as in --set train.beta=0.2; got {text!r}"


@pytest.mark.parametrize("value", ["[1", "{a", "!!python/object:os.system x", "@x", "2024-13-45", "!!int x"])
def test_an_override_that_is_no_yaml(value: str) -> None:
    with pytest.raises(QspinError) as caught:
        parse_override(f"train.beta={value}")
    assert str(caught.value) == f"--set train.beta: {value!r} is not a YAML value; quote it"


def test_overrides_lie_on_top(write: Callable[[str, str], Path]) -> None:
    path = write("mine.yaml", "train: {beta: 0.5, epochs: 4}\n")
    config = load_config(path, {"train.beta": 0.7, "chat.template_kwargs.enable_thinking": False, "seed": 3})
    assert (config.train.beta, config.train.epochs, config.seed) == (0.7, 4, 3)
    assert config.chat.template_kwargs == {"enable_thinking": False}


def test_an_override_of_a_group_keeps_its_other_settings() -> None:
    config = load_config("smollm2-135m", {"train": {"lr": 0.3}})
    assert (config.train.lr, config.train.sft_weight) == (0.3, load_config("smollm2-135m").train.sft_weight)
    assert config.train.sft_weight


def test_an_override_takes_a_value_of_the_preset_away() -> None:
    assert load_config("smollm2-135m").model.package is not None
    assert load_config("smollm2-135m", {"model.package": None}).model.package is None


def test_numbers_may_be_texts_as_the_command_line_has_them() -> None:
    config = load_config(None, {"train.beta": ["0.1", "5"], "train.lr": "1e-4"})  # YAML reads 1e-4 as a text too
    assert config.train.beta == [0.1, 5.0]
    assert config.train.lr == 1e-4


def test_an_override_below_a_single_value(write: Callable[[str, str], Path]) -> None:
    path = write("mine.yaml", "seed: 3\n")
    assert config_refusal(path, {"seed.x": 1}) == "seed.x: seed is a single value, not a group of settings"


def test_a_path_may_be_one(tmp_path: Path) -> None:
    config = load_config("quickstart", {"data.source": tmp_path / "mine.jsonl"})
    assert config.data.source == str(tmp_path / "mine.jsonl")


# --- one value an iteration ---


@pytest.mark.parametrize(("iteration", "expected"), [(0, 0.1), (1, 0.2), (2, 5.0), (3, 5.0), (9, 5.0)])
def test_the_last_value_of_a_list_goes_on(iteration: int, expected: float) -> None:
    assert at_iteration([0.1, 0.2, 5.0], iteration) == expected
    assert at_iteration(0.3, iteration) == 0.3


# --- what may change ---


def test_a_configuration_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(None).train.beta = 0.5  # type: ignore[misc]


# each free setting, and each that defines the result, with a value that is not its default
FREE: dict[str, Any] = {
    "model.backend": "transformers",
    "about": "x",
    "iterations": 9,
    "model.license": "x",
    "model.gated": True,
    "model.architecture": TINY.model_dump(),
    "model.init_adapter": "elsewhere",
    "chat.template": "elsewhere.jinja",
    "data.source": "elsewhere.jsonl",
    "data.heldout_source": "elsewhere.jsonl",
    "data.strict": True,
    "generation.width": 3,
    "generation.shard_rows": 3,
    "train.tokens_per_micro_batch": 99,
    "train.gradient_checkpointing": True,
    "train.snapshot_minutes": 0,
    "evaluation.keep": "last",
    "evaluation.best_by": "f1",
    "evaluation.stop": "never",
}
DEFINING: dict[str, Any] = {
    "model.id": "a/b", "model.revision": "x", "model.package": "x", "model.dtype": "float32",
    "model.double_quant": False, "lora.rank": 3, "lora.alpha": 3.0,
    "lora.targets": ["q_proj"], "chat.template_kwargs": {"a": 1}, "data.split": "x",
    "data.config": "x", "data.format": "messages", "data.columns": {"prompt": "q", "completion": "a"},
    "data.turns": "first", "data.limit": 3, "data.heldout_rows": 3, "data.max_prompt_tokens": 3,
    "data.max_completion_tokens": 3, "data.long_completions": "cut", "data.max_malformed_share": 0.5,
    "generation.max_new_tokens": 3, "generation.temperature": 0.5, "generation.top_p": 0.5, "train.loss": "hinge",
    "train.beta": [0.1, 0.2], "train.lr": 0.5, "train.optimizer": "rmsprop", "train.epochs": 3,
    "sft.epochs": 3, "sft.lr": 0.5, "train.batch_size": 3, "train.warmup": 0.5, "train.weight_decay": 0.5,
    "train.max_grad_norm": 0.5, "train.mix_previous": 0, "train.max_real_logp_drop": 3.0, "train.sft_weight": 0.5,
    "evaluation.style": "x", "evaluation.shown": 1, "seed": 3,
}  # fmt: skip


def test_every_setting_has_taken_a_side() -> None:
    settings = set()
    for name, value in load_config(None):
        settings |= {f"{name}.{key}" for key, _ in value} if isinstance(value, BaseModel) else {name}
    assert settings == FREE.keys() | DEFINING.keys()
    assert not FREE.keys() & DEFINING.keys()


def test_free_settings_change_no_result() -> None:
    assert changed_results(load_config(None), load_config(None, FREE)) == []


@pytest.mark.parametrize("key", DEFINING)
def test_every_other_setting_defines_the_result(key: str) -> None:
    before = load_config(None)
    [(changed, old, new)] = changed_results(before, load_config(None, {key: DEFINING[key]}))
    assert (changed, new) == (key, DEFINING[key])
    group, _, name = key.rpartition(".")
    assert old == getattr(getattr(before, group) if group else before, name)


# --- writing it down ---


@pytest.mark.parametrize("name", preset_names())
def test_a_dumped_configuration_loads_as_the_same(name: str, tmp_path: Path) -> None:
    changes = {"about": "β, ℓ: \N{SNOWMAN}", "train.beta": [0.1, 5], "evaluation.style": "a: #b"}
    config = load_config(name, changes)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
    assert "\N{SNOWMAN}" in path.read_text(encoding="utf-8"), "text that a person can read"
    assert list(yaml.safe_load(path.read_text(encoding="utf-8"))) == list(RunConfig.model_fields), (
        "in the class's order"
    )
