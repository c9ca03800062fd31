"""What weights are called: in memory, where an adapter names its own by it, and in the base's files.

transformers renames as it loads. Gemma 3's `language_model.model.layers…` are `model.language_model.layers…` in memory,
so that what an adapter says of them is translated before anything is merged.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from qspin.model import SlotModel


@dataclass(frozen=True, slots=True)
class Weights:
    """What merging has to know of the loaded model; its weights are named as the base's files have them."""

    quantised: frozenset[str]  # in 4 bits, of the decoder
    tied: frozenset[str]  # the embedding matrix and the output layer, if they are one
    renamed: dict[str, str]  # name in memory → in the files, where it is another
    dtype: torch.dtype  # computed in
    base_hash: str


def weights_of(model: SlotModel, stored: Iterable[str]) -> Weights:
    """`stored`: the names of all tensors in the base's files."""
    renamed = _renamed(model, stored)
    return Weights(
        frozenset(renamed.get(name, name) for name in quantised_names(model)),
        frozenset(renamed.get(name, name) for name in tied_names(model)),
        renamed,
        model.dtype,
        model.base_hash(),
    )


def quantised_names(model: SlotModel) -> frozenset[str]:
    """Names in memory of the decoder's weights that are in 4 bits. A part for images may be too: it was never asked."""
    causal_lm = model.peft_model.get_base_model()
    decoders = {id(parameter) for parameter in causal_lm.get_decoder().parameters()}
    named = [(name, weight) for name, weight in causal_lm.named_parameters() if id(weight) in decoders]
    return frozenset(_without_slot(name) for name, weight in named if getattr(weight, "quant_state", None) is not None)


def tied_names(model: SlotModel) -> frozenset[str]:
    """Names in memory of the embedding matrix and of the output layer, if they are one."""
    causal_lm = model.peft_model.get_base_model()
    ends = (causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings())
    if ends[0].weight is not ends[1].weight:
        return frozenset()
    return frozenset(f"{name}.weight" for name, module in causal_lm.named_modules() if module in ends)


def _renamed(model: SlotModel, stored: Iterable[str]) -> dict[str, str]:
    """As transformers renamed them on loading. What it makes of several tensors, as of experts, is in no file."""
    causal_lm = model.peft_model.get_base_model()
    rules = get_model_conversion_mapping(causal_lm)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    known = {_without_slot(name): True for name in causal_lm.state_dict(keep_vars=True)}
    found = {}
    for name in stored:
        own, converted = rename_source_key(name, renamings, converters, causal_lm.base_model_prefix, known)
        if own != name and converted is None and own in known:
            found[own] = name
    return found


def _without_slot(name: str) -> str:
    return name.replace(".base_layer.", ".")
