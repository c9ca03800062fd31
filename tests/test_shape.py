"""Shapes are what configurations say, and count up to the number of weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ARCHITECTURES, TINY

from qspin.config import load_config
from qspin.config_files import preset_names
from qspin.errors import QspinError
from qspin.fitting.shape import count_parameters, read_shape


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_shape_is_read_from_config_json(architecture: str, tiny_folder: Callable[[str], Path]) -> None:
    folder = tiny_folder(architecture)
    shape = read_shape(json.loads((folder / "config.json").read_text(encoding="utf-8")), "config.json")
    config = ARCHITECTURES[architecture]()
    assert (shape.family, shape.layers, shape.hidden, shape.kv_heads) == (architecture, 3, 64, 2)
    assert shape.head_size == (getattr(config, "head_dim", None) or 64 // 4)
    assert shape.tied_embeddings is config.tie_word_embeddings
    if architecture == "llama":
        assert shape == TINY


def test_what_a_file_leaves_out_is_its_familys_own() -> None:
    """The hub's gemma-3-1b-it says nothing of its head, which is its embeddings."""
    names = ("num_attention_heads", "hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size")
    for family, tied in {"gemma2": True, "gemma3_text": True, "llama": False}.items():
        assert read_shape({**dict.fromkeys(names, 4), "model_type": family}, "x").tied_embeddings is tied


def test_what_is_no_configuration_is_one_line() -> None:
    with pytest.raises(QspinError, match=r"^x/config.json: 'num_attention_heads' is missing; set model\.architecture"):
        read_shape({"model_type": "llama"}, "x/config.json")
    settings = dict.fromkeys(("num_attention_heads", "hidden_size", "num_hidden_layers", "vocab_size"), 4)
    with pytest.raises(QspinError, match=r"^x: not the configuration of a language model: Input should be a valid int"):
        read_shape({**settings, "model_type": "llama", "intermediate_size": "wide"}, "x")


@pytest.mark.parametrize("name", preset_names())
def test_parameters_count_up(name: str) -> None:
    shape = load_config(name).model.architecture
    assert shape is not None
    assert count_parameters(shape) == shape.parameters
