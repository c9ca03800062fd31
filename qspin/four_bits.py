"""A base model in 4 bits: the type that it computes in, how it is quantised, and transformers' own, loaded so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from qspin.base import Base, unreachable
from qspin.config import ModelConfig
from qspin.errors import QspinError, some


def compute_dtype(model: ModelConfig, device: torch.device) -> torch.dtype:
    """The configured type; `auto` is bfloat16 where it is native, else fp32 on a CPU and fp16 on a GPU."""
    if model.dtype != "auto":
        dtype: torch.dtype = getattr(torch, model.dtype)
        return dtype
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def nf4(model: ModelConfig, dtype: torch.dtype) -> transformers.BitsAndBytesConfig:
    """How linear layers are quantised, and the type that they compute in."""
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=model.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def load_in_4_bits(base: Base, model: ModelConfig, device: torch.device, dtype: torch.dtype) -> Any:
    """transformers' own model, its linear layers in NF4.

    Raises:
        QspinError: it can't be loaded.
    """
    try:
        causal_lm, report = transformers.AutoModelForCausalLM.from_pretrained(
            base.weights(),
            revision=base.revision,
            trust_remote_code=False,  # else transformers may ask on the terminal whether to run it
            use_safetensors=True,  # never a pickle
            dtype=dtype,
            device_map={"": device},
            attn_implementation="eager",  # for the reference, then ours
            quantization_config=nf4(model, dtype),
            output_loading_info=True,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise unreachable(base, error) from None
    _check_loaded(causal_lm, report, base)
    for parameter in causal_lm.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:  # W is made in its type, which of a base that came quantised is that of its maker
            state.dtype = dtype
        elif device.type == "cpu":  # it would lie in the mapped file, all of whose pages that were read count as ours
            parameter.data = parameter.data.clone()
    return causal_lm


def _check_loaded(causal_lm: Any, report: dict[str, Any], base: Base) -> None:
    """transformers puts random numbers where a file has none, leaves out what config.json has no place for, keeps what
    a model came quantised in, and puts in an adapter that lies beside it."""
    lacking = sorted({*report["missing_keys"], *_of_other_shapes(causal_lm)})
    if lacking:
        raise QspinError(
            f"model.id: {base.name}: its files have no {some(lacking)} of the shape that config.json asks for; bring "
            "the model's own files and config.json together"
        )
    layers = causal_lm.config.get_text_config().num_hidden_layers
    if any(f".layers.{layers}." in name for name in report["unexpected_keys"]):
        raise QspinError(
            f"model.id: {base.name}: its files have more layers than the {layers} of config.json, which would be left "
            "out; bring the model's own files and config.json together"
        )
    quantised = causal_lm.config.quantization_config
    kind = getattr(quantised, "bnb_4bit_quant_type", None) if getattr(quantised, "load_in_4bit", False) else None
    if kind != "nf4":
        raise QspinError(
            f"model.id: {base.name} came quantised, and not in NF4; take the 16-bit model that it was made of"
        )
    if getattr(causal_lm, "_hf_peft_config_loaded", False):
        raise QspinError(
            f"model.id: {base.name} has a PEFT adapter beside the model's own files; take its adapter_config.json "
            "away, and name it with model.init_adapter if the game is to begin with it"
        )


def _of_other_shapes(causal_lm: Any) -> Iterator[str]:
    """Matrices that are not as config.json has them: those that are quantised as they are read are not reported."""
    for name, module in causal_lm.named_modules():
        asked: tuple[int, int] | None = None
        if isinstance(module, nn.Linear):
            asked = module.out_features, module.in_features
        elif isinstance(module, nn.Embedding):
            asked = module.num_embeddings, module.embedding_dim
        if asked is not None:
            weight = module.weight
            state = getattr(weight, "quant_state", None)
            if tuple(weight.shape if state is None else state.shape) != asked:
                yield f"{name}.weight"
