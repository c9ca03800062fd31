"""A tokenizer as GGUF's metadata, from the content of its tokenizer.json.

    add_vocabulary(writer, vocabulary, size=152064)

Whatever llama.cpp would tokenise otherwise than the tokenizers library does, is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gguf

from qspin.errors import QspinError

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


def add_vocabulary(writer: gguf.GGUFWriter, vocabulary: Vocabulary, size: int) -> None:
    """Metadata of a tokenizer; `size` is how many tokens have a row in the embedding matrix.

    Raises:
        QspinError: llama.cpp would cut a text into other tokens, or is not known to cut it into these.
    """
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
