"""A merged model as one GGUF file, for llama.cpp, Ollama and LM Studio; nothing is compiled.

    write_gguf(path, merged, architecture, vocabulary, name="Qwen2.5-7B-Instruct", kind="q8_0")

The `gguf` package writes the format; here tensors are renamed, put in llama.cpp's order and turned into the file's
types, some rows at a time. Whatever llama.cpp would compute otherwise than transformers does, is refused by name, but
for a sliding window, which the format has no place for and texts shorter than it never meet.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import torch

from qspin.errors import QspinError
from qspin.exports.gguf_vocabulary import Vocabulary, add_vocabulary
from qspin.exports.merge import Merged

ARCHITECTURES = {  # model_type in transformers → llama.cpp's name
    "llama": gguf.MODEL_ARCH.LLAMA,
    "mistral": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
}
KINDS = {  # what matrices are written in; vectors are always F32
    "f32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}


def write_gguf(
    path: Path, merged: Merged, architecture: Mapping[str, Any], vocabulary: Vocabulary, *, name: str, kind: str
) -> None:
    """`architecture` is the transformers configuration as a dict, `kind` one of `KINDS`.

    Raises:
        QspinError: the family, its rope or its tokenizer is not among those that are written here, or a weight is
            beyond the range of float16.
    """
    quantization, file_type = KINDS[kind]
    writer, rope = _described(path, architecture, vocabulary)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    tensors = [] if rope is None else [_Tensor("rope_freqs.weight", rope.shape, gguf.GGMLQuantizationType.F32, [rope])]
    tensors += _tensors(merged, architecture, _family(architecture), quantization)
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=tensor.quantization
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor)
    writer.close()


def check_supported(architecture: Mapping[str, Any], vocabulary: Vocabulary) -> None:
    """What `write_gguf` would refuse, told before any weights are at hand."""
    _described(None, architecture, vocabulary)


def _described(
    path: Path | None, architecture: Mapping[str, Any], vocabulary: Vocabulary
) -> tuple[gguf.GGUFWriter, np.ndarray | None]:
    """A writer that knows everything but the tensors; and Llama 3's rope factors, which are one."""
    family = _family(architecture)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[family])
    rope = _add_shape(writer, architecture, family)
    add_vocabulary(writer, vocabulary, architecture["vocab_size"])
    return writer, rope


def file_size(merged: Merged, kind: str) -> int:
    """Bytes that the tensors take."""
    return sum(_nbytes(merged.shape(name), _type_of(merged.shape(name), KINDS[kind][0])) for name in merged.names)


@dataclass(frozen=True, slots=True)
class _Tensor:
    """What GGUFWriter asks of an array, made some rows at a time."""

    name: str
    shape: tuple[int, ...]
    quantization: gguf.GGMLQuantizationType
    blocks: Iterator[np.ndarray] | Sequence[np.ndarray]  # fp32

    @property
    def nbytes(self) -> int:
        return _nbytes(self.shape, self.quantization)

    def tofile(self, file: BinaryIO) -> None:
        for block in self.blocks:
            with np.errstate(over="ignore"):
                data = gguf.quants.quantize(block, self.quantization)
            if data.dtype == np.float16 and not np.isfinite(data).all():
                raise QspinError(f"{self.name} holds weights beyond the range of float16: export with --dtype bf16")
            file.write(np.ascontiguousarray(data).tobytes())


def _type_of(shape: Sequence[int], wanted: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    """Vectors are F32; rows that are not made of whole blocks F16."""
    if len(shape) < 2:
        return gguf.GGMLQuantizationType.F32
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16


def _nbytes(shape: Sequence[int], quantization: gguf.GGMLQuantizationType) -> int:
    block, size = gguf.GGML_QUANT_SIZES[quantization]
    return int(math.prod(shape) // block * size)


def _tensors(
    merged: Merged, architecture: Mapping[str, Any], family: gguf.MODEL_ARCH, wanted: gguf.GGMLQuantizationType
) -> Iterator[_Tensor]:
    names = gguf.get_tensor_name_map(family, architecture["num_hidden_layers"])
    for name in merged.names:
        module, _, suffix = name.rpartition(".")
        if name.endswith(".rotary_emb.inv_freq") or (name == "lm_head.weight" and architecture["tie_word_embeddings"]):
            continue  # made anew from the configuration; a copy of the embedding matrix
        target = names.get_name(module)
        if target is None or suffix not in {"weight", "bias"}:
            raise QspinError(f"model.id: {name} has no place in a GGUF of {architecture['model_type']}")
        shape = merged.shape(name)
        yield _Tensor(f"{target}.{suffix}", shape, _type_of(shape, wanted), _blocks(merged, name, architecture, family))


def _blocks(
    merged: Merged, name: str, architecture: Mapping[str, Any], family: gguf.MODEL_ARCH
) -> Iterator[np.ndarray]:
    """fp32 rows in llama.cpp's order: its Llama rotates neighbours, transformers the two halves of a head."""
    rotated = family == gguf.MODEL_ARCH.LLAMA and (".q_proj." in name or ".k_proj." in name)
    head = _head_size(architecture)
    for block in merged.blocks(name, multiple=head if rotated else 1):
        rows = block.float()
        if rotated:
            halves = rows.view(-1, 2, head // 2, *rows.shape[1:])  # (heads, half, place in it, …)
            rows = halves.transpose(1, 2).reshape(rows.shape)
        yield rows.numpy()


# --- what the model is ---


def _family(architecture: Mapping[str, Any]) -> gguf.MODEL_ARCH:
    kind = architecture["model_type"]
    if kind not in ARCHITECTURES:
        raise QspinError(f"model.id: {kind} models are not written as GGUF; {', '.join(sorted(ARCHITECTURES))} are")
    return ARCHITECTURES[kind]


def _head_size(architecture: Mapping[str, Any]) -> int:
    size: int = architecture.get("head_dim") or architecture["hidden_size"] // architecture["num_attention_heads"]
    return size


def _add_shape(writer: gguf.GGUFWriter, architecture: Mapping[str, Any], family: gguf.MODEL_ARCH) -> np.ndarray | None:
    """Metadata; returns Llama 3's factors of the rope's frequencies, which are a tensor."""
    head = _head_size(architecture)
    writer.add_vocab_size(architecture["vocab_size"])
    writer.add_context_length(architecture["max_position_embeddings"])
    writer.add_embedding_length(architecture["hidden_size"])
    writer.add_block_count(architecture["num_hidden_layers"])
    writer.add_feed_forward_length(architecture["intermediate_size"])
    writer.add_head_count(architecture["num_attention_heads"])
    writer.add_head_count_kv(architecture["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(architecture["rms_norm_eps"])
    writer.add_rope_dimension_count(head)
    writer.add_key_length(head)
    writer.add_value_length(head)
    if architecture["hidden_act"] != "silu":
        raise QspinError(
            f"model.id: llama.cpp computes {family.name} with silu, this model {architecture['hidden_act']}"
        )
    rope = architecture["rope_parameters"]
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif rope["rope_type"] == "llama3":
        return _llama3_factors(rope, head)
    elif rope["rope_type"] != "default":
        raise QspinError(
            f"model.id: rope of type {rope['rope_type']} is not written as GGUF; default, linear, llama3 are"
        )
    return None


def _llama3_factors(rope: Mapping[str, Any], head: int) -> np.ndarray:
    """By what Llama 3.1 divides each frequency: 1 for short waves, `factor` for long ones, smooth between."""
    waves = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, head, 2, dtype=np.float64) / head)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((rope["original_max_position_embeddings"] / waves - low) / (high - low), 0, 1)
    factors: np.ndarray = (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)
    return factors


def quantize_file(source: Path, target: Path) -> None:
    """Another copy of a GGUF file, in Q4_K_M, by llama.cpp itself.

    Raises:
        QspinError: llama-cpp-python is not installed, or fails.
    """
    check_quantizer()
    import llama_cpp

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    settings.nthread = torch.get_num_threads()
    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)  # it would tell each tensor
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings)):
        raise QspinError(f"llama.cpp could not quantise {source}")


def check_quantizer() -> None:
    """Raises a QspinError unless llama-cpp-python is installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise QspinError("q4_k_m is made by llama.cpp: pip install llama-cpp-python, or export with --dtype q8_0")
