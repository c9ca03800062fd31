"""A decoder's shape: read from its configuration, cut into 4-bit layers, and counted out in weights. Free of torch."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import ValidationError

from qspin.config import Architecture
from qspin.errors import QspinError

POST_NORMS = ("gemma2", "gemma3_text", "olmo2")  # families with norms after attention and MLP
QUERY_NORMS = ("gemma3_text", "olmo2", "qwen3")  # families with norms of queries and keys
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # in configurations


def has_experts(settings: Mapping[str, Any]) -> bool:
    """Whether a transformers configuration says of its decoder that tokens are sent to experts."""
    settings = settings.get("text_config") or settings
    return any(settings.get(name) for name in EXPERTS)


def read_shape(settings: Mapping[str, Any], name: str) -> Architecture:
    """The shape in a transformers configuration, as config.json has it. `name` is for the error.

    Raises:
        QspinError: it is no configuration of a decoder.
    """
    settings = settings.get("text_config") or settings
    try:
        heads, hidden = settings["num_attention_heads"], settings["hidden_size"]
        numbers = {
            "family": settings["model_type"],
            "layers": settings["num_hidden_layers"],
            "hidden": hidden,
            "intermediate": settings["intermediate_size"],
            "heads": heads,
            "kv_heads": settings.get("num_key_value_heads") or heads,
            "head_size": settings.get("head_dim") or hidden // heads,
            "vocabulary": settings["vocab_size"],
            # a file leaves out what its family has by default
            "tied_embeddings": settings.get("tie_word_embeddings", settings["model_type"].startswith("gemma")),
        }
        bare = Architecture.model_validate({**numbers, "parameters": 1})
    except KeyError as error:
        raise QspinError(f"{name}: {error} is missing; set model.architecture.*") from None
    except ValidationError as error:
        raise QspinError(f"{name}: not the configuration of a language model: {error.errors()[0]['msg']}") from None
    return bare.model_copy(update={"parameters": count_parameters(bare)})


def count_parameters(shape: Architecture) -> int:
    """Weights of a model of this shape: 4-bit layers, embeddings, and the norms and biases that its family has."""
    width, _, queries, keys = widths(shape)
    norms = 2 * width
    match shape.family:
        case "gemma2":
            norms = 4 * width
        case "gemma3_text":
            norms = 4 * width + 2 * shape.head_size
        case "olmo2":
            norms = 2 * width + queries + keys
        case "qwen3":
            norms = 2 * width + 2 * shape.head_size
        case "qwen2":
            norms = 2 * width + queries + 2 * keys  # the last three are biases
    layer = sum(linear.weights for linear in linears(shape)) + norms
    embeddings = shape.vocabulary * width * (1 if shape.tied_embeddings else 2)
    return shape.layers * layer + embeddings + width


class Widths(NamedTuple):
    """Numbers a token: of what goes from layer to layer, inside an MLP, in queries, and in keys, as in values."""

    width: int  # D
    inner: int  # I
    queries: int  # Q = H·h
    keys: int  # K = J·h


def widths(shape: Architecture) -> Widths:
    return Widths(shape.hidden, shape.intermediate, shape.heads * shape.head_size, shape.kv_heads * shape.head_size)


class Linear(NamedTuple):
    """A 4-bit layer."""

    name: str
    inputs: int
    outputs: int

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs


@functools.cache
def linears(shape: Architecture) -> tuple[Linear, ...]:
    """The 4-bit layers of one decoder layer."""
    width, inner, queries, keys = widths(shape)
    output, down = Linear("o_proj", queries, width), Linear("down_proj", inner, width)
    if shape.family == "phi3":
        qkv, gate_up = Linear("qkv_proj", width, queries + 2 * keys), Linear("gate_up_proj", width, 2 * inner)
        return qkv, output, gate_up, down
    return (
        Linear("q_proj", width, queries),
        Linear("k_proj", width, keys),
        Linear("v_proj", width, keys),
        output,
        Linear("gate_proj", width, inner),
        Linear("up_proj", width, inner),
        down,
    )
