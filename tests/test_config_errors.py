"""What is said of settings that do not fit: all of it at once, a line each, with what was meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY, config_refusal

from qspin.config import load_config


def test_every_problem_is_in_one_error() -> None:
    message = config_refusal(
        None,
        {
            "train.epochs": 0,  # below its bound
            "train.loss": "squared",  # not one of the names
            "train.warmup": 1,  # at a bound that is left out
            "data.limit": "many",  # of another type
            "generation.top_p": 1.5,  # above its bound
            "train.gradient_checkpointing": "sometimes",  # neither true nor false nor auto
            "train.bta": 0.1,  # no such key
            "itertions": 3,
            "beta": 0.1,  # in another group
        },
    )
    first, *lines = message.splitlines()
    assert first == "the configuration does not fit:"
    assert sorted(lines) == [
        "  beta: no such setting; did you mean train.beta?",
        "  data.limit = 'many': Input should be a valid integer, unable to parse string as an integer",
        "  generation.top_p = 1.5: Input should be less than or equal to 1",
        "  itertions: no such setting; did you mean iterations?",
        "  train.bta: no such setting; did you mean train.beta?",
        "  train.epochs = 0: Input should be greater than or equal to 1",
        "  train.gradient_checkpointing = 'sometimes': Input should be a valid boolean, unable to interpret input;"
        " or auto",
        "  train.loss = 'squared': Input should be 'logistic', 'hinge', 'exponential' or 'correlation'",
        "  train.warmup = 1: Input should be less than 1",
    ]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"train.learning_rate": 1}, "train.learning_rate: no such setting; did you mean train.lr?"),
        ({"train": 5}, "train = 5: it is a group of settings, as train.loss"),
        ({"train.lr": [1e-4, 1000]}, "train.lr[1] = 1000: Input should be less than or equal to 1"),
        ({"lr": 1}, "lr: no such setting; did you mean sft.lr or train.lr?"),
        ({"trian.lr": 1}, "trian: no such setting; did you mean train?"),
        ({"evaluation.style": 2024}, "evaluation.style = 2024: Input should be a valid string; put it into quotes"),
        (
            {"lora.targets": "q_proj"},
            "lora.targets = 'q_proj': Input should be 'all-linear' or a list, as [q_proj, v_proj]",
        ),
        ({"lora.targets": []}, "lora.targets = []: List should have at least 1 item after validation, not 0"),
        (
            {"train.lr": "1e-4,2e-4"},
            "train.lr = '1e-4,2e-4': Input should be a valid number, unable to parse string as a number; or a list, as "
            "[0.1, 5]",
        ),
        ({"iterations": True}, "iterations = True: Input is true or false, which this setting can't be"),
        ({"data.limit": False}, "data.limit = False: Input is true or false, which this setting can't be"),
    ],
)
def test_a_common_slip_is_told_what_was_meant(overrides: dict[str, Any], said: str) -> None:
    assert config_refusal(None, overrides) == f"the configuration does not fit:\n  {said}"


def test_a_setting_with_a_point_in_a_file(write: Callable[[str, str], Path]) -> None:
    said = "train.lr: stands as two in a file: train: and below it, indented, lr:"
    assert config_refusal(write("mine.yaml", "train.lr: 0.1\n")) == f"the configuration does not fit:\n  {said}"


@pytest.mark.parametrize(("key", "value"), [("train.beta", -1), ("train.lr", "much"), ("lora.targets", 3)])
def test_one_problem_is_one_line(key: str, value: Any) -> None:
    _, *lines = config_refusal(None, {key: value}).splitlines()
    assert len(lines) == 1


def test_a_group_that_is_a_single_value_is_named() -> None:
    assert "\n  train = 3: " in config_refusal(None, {"train": 3})


def test_a_style_that_is_no_regular_expression() -> None:
    assert "\n  evaluation.style = '(': " in config_refusal(None, {"evaluation.style": "("})


def test_a_group_that_may_be_left_out_has_its_settings_named() -> None:
    message = config_refusal(None, {"model.architecture": {**TINY.model_dump(), "layers": 0, "head": 2}})
    assert "\n  model.architecture.layers = 0: " in message
    assert "\n  model.architecture.head: no such setting; did you mean model.architecture.heads?" in message
    assert "\n  model.architecture = 3: " in config_refusal(None, {"model.architecture": 3})


def test_a_key_like_no_other_has_no_neighbour() -> None:
    assert config_refusal(None, {"qqqqqq": 1}) == "the configuration does not fit:\n  qqqqqq: no such setting"


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), [], [0.1, 0], "much"])
@pytest.mark.parametrize("key", ["train.beta", "train.lr"])
def test_rates_are_positive_numbers_or_lists_of_them(key: str, value: Any) -> None:
    assert f"\n  {key}{'[1]' if value == [0.1, 0] else ''} = " in config_refusal(None, {key: value})


def test_of_a_list_the_member_that_does_not_fit_is_named() -> None:
    assert "train.beta[1] = -1: Input should be greater than 0" in config_refusal(None, {"train.beta": [0.1, -1]})
    assert "train.lr[0] = 'abc': Input should be a valid number" in config_refusal(None, {"train.lr": ["abc", 1e-4]})
    assert "train.lr = []: List should have at least 1 item" in config_refusal(None, {"train.lr": []})


def test_columns_need_both_sides() -> None:
    said = "data.columns must name a prompt and a completion column"
    assert said in config_refusal(None, {"data.format": "columns", "data.columns.prompt": "q"})
    both = {"data.format": "columns", "data.columns.prompt": "q", "data.columns.completion": "a"}
    assert load_config(None, both).data.columns == {"prompt": "q", "completion": "a"}
