"""A merged model as one GGUF file, for llama.cpp, Ollama and LM Studio; nothing is compiled.

    write_gguf(path, merged, architecture, vocabulary, name="Qwen2.5-7B-Instruct", kind="q8_0")

The `gguf` package writes the format; here tensors are renamed, put in llama.cpp's order and turned into the file's
types, some rows at a time. Whatever llama.cpp would compute or tokenise otherwise than transformers does, is refused
by name, but for a sliding window, which the format has no place for and texts shorter than it never meet.
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


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A tokenizer as llama.cpp wants it."""

    tokenizer: Mapping[str, Any]  # the content of tokenizer.json
    template: str  # the chat template, Jinja
    bos: int | None
    eos: int | None
    end_of_turn: int
    unknown: int | None
    padding: int | None
    add_bos: bool  # whether the tokenizer writes BOS before a text


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
    _add_vocabulary(writer, vocabulary, architecture["vocab_size"])
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


# --- how it reads ---

_GPT2 = ("ByteLevel", True)
_BYTES = ("ByteLevel", False)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How a text is cut before merging, and whether a word of the vocabulary is taken whole → llama.cpp's name for it.
PRE_TOKENIZERS = {
    ((_GPT2,), False): "gpt-2",
    ((("Digits", True), _GPT2), False): "smollm",
    ((("Split", _LLAMA3), _BYTES), True): "llama-bpe",
    ((("Split", _LLAMA3), _BYTES), False): "dbrx",
    ((("Split", _QWEN2), _BYTES), False): "qwen2",
    ((("Split", _TEKKEN), _BYTES), True): "tekken",
}


def _add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary, size: int) -> None:
    model = vocabulary.tokenizer["model"]
    if model["type"] != "BPE":
        raise QspinError(f"model.id: a tokenizer of type {model['type']} is not written as GGUF; BPE is")
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    byte_level = any(step[0] == "ByteLevel" for step in _steps(vocabulary.tokenizer.get("pre_tokenizer")))
    tokens, types = _tokens(vocabulary, size, byte_level=byte_level)
    if byte_level:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(vocabulary.tokenizer))
        writer.add_token_merges([" ".join(merge) for merge in merges])
    else:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_space_prefix(vocabulary.tokenizer))
        writer.add_token_scores(_scores(tokens, merges))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for add, token in (
        (writer.add_bos_token_id, vocabulary.bos),
        (writer.add_eos_token_id, vocabulary.eos),
        (writer.add_unk_token_id, vocabulary.unknown),
        (writer.add_pad_token_id, vocabulary.padding),
        (writer.add_eot_token_id, vocabulary.end_of_turn),
    ):
        if token is not None:
            add(token)
    writer.add_add_bos_token(vocabulary.add_bos)
    writer.add_add_eos_token(False)
    writer.add_chat_template(vocabulary.template)


def _tokens(vocabulary: Vocabulary, size: int, *, byte_level: bool) -> tuple[list[str], list[gguf.TokenType]]:
    """A text and a type for each row of the embedding matrix."""
    tokens = [f"[PAD{index}]" for index in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    for text, index in vocabulary.tokenizer["model"]["vocab"].items():
        if index >= size:
            raise QspinError(f"model.id: the tokenizer has a token {index}, but only {size} have an embedding")
        tokens[index], types[index] = text, gguf.TokenType.NORMAL
        if not byte_level and len(text) == 6 and text.startswith("<0x"):
            types[index] = gguf.TokenType.BYTE
    for added in vocabulary.tokenizer["added_tokens"]:
        index, text = added["id"], added["content"]
        if index >= size:
            continue  # no text holds it: rows with such tokens are refused
        types[index] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
        tokens[index] = text if added["special"] or byte_level else text.replace("▁", " ")
    if vocabulary.unknown is not None and not byte_level:
        types[vocabulary.unknown] = gguf.TokenType.UNKNOWN
    return tokens, types


def _steps(part: Mapping[str, Any] | None) -> list[tuple[str, Any]]:
    """A pre-tokenizer or normalizer as a flat list: what each step is, and what matters of it."""
    if part is None:
        return []
    kind = part["type"]
    if kind == "Sequence":
        return [step for inner in part.get("pretokenizers", part.get("normalizers", ())) for step in _steps(inner)]
    matters: dict[str, Any] = {
        "ByteLevel": part.get("use_regex", True) if not part.get("add_prefix_space") else "add_prefix_space",
        "Digits": part.get("individual_digits"),
        "Split": part.get("pattern", {}).get("Regex") if part.get("behavior") == "Isolated" else part.get("behavior"),
        "Metaspace": (part.get("replacement"), part.get("prepend_scheme"), part.get("split", True)),
        "Prepend": part.get("prepend"),
        "Replace": (part.get("pattern", {}).get("String"), part.get("content")),
    }
    return [(kind, matters.get(kind))]


def _pre_tokenizer(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name for how a byte-level tokenizer cuts texts into words."""
    steps = tuple(_steps(tokenizer["pre_tokenizer"]))
    name = PRE_TOKENIZERS.get((steps, bool(tokenizer["model"].get("ignore_merges"))))
    if name is None or any(kind != "NFC" for kind, _ in _steps(tokenizer.get("normalizer"))):
        raise QspinError(
            f"model.id: its tokenizer cuts texts in a way that llama.cpp is not known to have ({steps}); "
            "export with --to merged-16bit, and convert that with llama.cpp's own convert_hf_to_gguf.py"
        )
    return name


def _space_prefix(tokenizer: Mapping[str, Any]) -> bool:
    """Whether a text, and what follows a special token, begins with a space of the tokenizer's own.

    llama.cpp writes it at both places or nowhere. A tokenizer that writes it at a text's beginning alone gets none:
    chats begin with a special token, so they read the same.
    """
    normalizer, words = _steps(tokenizer.get("normalizer")), _steps(tokenizer.get("pre_tokenizer"))
    plain = {
        (("Prepend", "▁"), ("Replace", (" ", "▁"))): True,
        (("Replace", (" ", "▁")),): False,
        (("Metaspace", ("▁", "always", False)),): True,
        (("Metaspace", ("▁", "first", False)),): False,
        (("Metaspace", ("▁", "never", False)),): False,
    }
    prefix = plain.get((*normalizer, *words))
    if prefix is None:
        raise QspinError(
            f"model.id: its tokenizer treats spaces in a way that llama.cpp is not known to have "
            f"({[*normalizer, *words]}); export with --to merged-16bit"
        )
    return prefix


def _scores(tokens: Sequence[str], merges: Sequence[tuple[str, ...]]) -> list[float]:
    """SentencePiece's order of merging. It merges whatever pair makes a token, so every such pair must be a merge."""
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    known, pairs = set(tokens), {(left, right) for left, right in merges}
    for token in ranks:
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if pair not in pairs and known.issuperset(pair):
                raise QspinError(
                    f"model.id: the tokenizer does not merge {pair[0]!r} and {pair[1]!r} to {token!r}, llama.cpp "
                    "would; export with --to merged-16bit"
                )
    return [-float(ranks.get(token, len(merges))) for token in tokens]


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
