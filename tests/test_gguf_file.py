"""GGUF files against transformers' own loader and, where it is installed, llama.cpp itself."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp_peer
import pytest
import torch
import transformers
from conftest import ARCHITECTURES, CHATML, HOUSE_STYLE, SHAPE
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from qspin.errors import QspinError
from qspin.exports.gguf_file import file_size, write_gguf
from qspin.exports.gguf_vocabulary import PRE_TOKENIZERS, Vocabulary
from qspin.exports.merge import Merged
from qspin.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS

needs_llama_cpp = pytest.mark.skipif(not llama_cpp_peer.INSTALLED, reason="xllamacpp has no wheel for this machine")

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SMALL = SHAPE | {"hidden_size": 128, "head_dim": 32}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama with biases": lambda: transformers.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "mistral": lambda: transformers.MistralConfig(**SMALL, sliding_window=None),
    "qwen2": lambda: transformers.Qwen2Config(**(SHAPE | {"hidden_size": 128})),
    "qwen3": lambda: transformers.Qwen3Config(**(SMALL | {"head_dim": 128})),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random fp32 model, and an adapter that adds nothing: GGUF files are written of merged models."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            path = tmp_path_factory.mktemp("plain")
            save(FAMILIES[family](), path)
            made[family] = path
        return made[family]

    return folder


def save(config: Any, path: Path) -> None:
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=1.0)
    model.save_pretrained(path)
    (path / "adapter").mkdir()
    half = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    save_file(
        {
            half.format("A"): torch.zeros(1, config.hidden_size),
            half.format("B"): torch.zeros(config.intermediate_size, 1),
        },
        path / "adapter" / ADAPTER_WEIGHTS,
    )
    (path / "adapter" / ADAPTER_CONFIG).write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 1}))


def content(tokenizer: Any) -> dict[str, Any]:
    """Of its tokenizer.json."""
    found: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return found


def vocabulary(tokenizer: Any, read: dict[str, Any] | None = None, **changes: Any) -> Vocabulary:
    settings: dict[str, Any] = {
        "tokenizer": read or content(tokenizer),
        "template": tokenizer.chat_template,
        "bos": None,
        "eos": 2,
        "end_of_turn": 2,
        "unknown": None,
        "padding": 0,
        "add_bos": False,
    }
    return Vocabulary(**(settings | changes))


def write(folder: Path, out: Path, tokenizer: Any, kind: str = "f32", **changes: Any) -> Path:
    """`changes` are of the vocabulary."""
    architecture = transformers.AutoConfig.from_pretrained(folder)
    merged = Merged(folder, folder / "adapter", dtype=torch.float32)
    path = out / f"model-{kind}.gguf"
    write_gguf(path, merged, architecture.to_dict(), vocabulary(tokenizer, **changes), name="a model", kind=kind)
    assert file_size(merged, kind) <= path.stat().st_size <= file_size(merged, kind) + 100_000
    return path


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(40)[None] * 7 % 500).logits[0]
    return found


# --- in transformers ---


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_reads_the_same_model(
    family: str, plain: Callable[[str], Path], tokenizer: Any, tmp_path: Path
) -> None:
    """Everything that it needs is in the file: no configuration is at hand, but for biases that it would not expect."""
    expected = logits(transformers.AutoModelForCausalLM.from_pretrained(plain(family)))
    path = write(plain(family), tmp_path, tokenizer)
    options = {"config": FAMILIES[family]()} if "biases" in family else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32, **options
    )
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.5


@pytest.mark.parametrize(("kind", "within"), [("f16", 5e-3), ("bf16", 4e-2), ("q8_0", 0.1)])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_narrower_kinds_are_as_near_as_their_bits_allow(
    family: str, kind: str, within: float, plain: Callable[[str], Path], tokenizer: Any, tmp_path: Path
) -> None:
    expected = logits(transformers.AutoModelForCausalLM.from_pretrained(plain(family)))
    path = write(plain(family), tmp_path, tokenizer, kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    error = float((logits(model) - expected).norm() / expected.norm())
    assert within / 30 < error < within


def test_the_file_says_what_it_is(plain: Callable[[str], Path], tokenizer: Any, tmp_path: Path) -> None:
    path = write(plain("llama"), tmp_path, tokenizer, "q8_0", bos=0, add_bos=True)
    reader = gguf.GGUFReader(path)
    expected = {
        "general.architecture": "llama",
        "general.name": "a model",
        "general.file_type": int(gguf.LlamaFileType.MOSTLY_Q8_0),
        "llama.block_count": 3,
        "llama.context_length": 512,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 32,
        "llama.vocab_size": 512,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": tokenizer.chat_template,
    }
    assert {key: reader.get_field(key).contents() for key in expected} == expected
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.0.attn_norm.weight"] == "F32"
    assert types["blk.0.attn_q.weight"] == types["token_embd.weight"] == "Q8_0"
    assert "output.weight" not in types  # tied
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    assert tokens == tokenizer.convert_ids_to_tokens(list(range(512)))
    kinds = reader.get_field("tokenizer.ggml.token_type").contents()
    assert kinds[:4] == [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL]


def test_rows_of_the_embedding_matrix_without_a_token_are_named(
    plain: Callable[[str], Path], tokenizer: Any, tmp_path: Path
) -> None:
    short = content(tokenizer)
    words = short["model"]["vocab"]
    last = max(words, key=words.get)
    short["model"]["vocab"] = {word: index for word, index in words.items() if word != last}
    short["model"]["merges"].pop()
    reader = gguf.GGUFReader(write(plain("llama"), tmp_path, tokenizer, read=short))
    assert reader.get_field("tokenizer.ggml.tokens").contents()[-1] == "[PAD511]"
    assert reader.get_field("tokenizer.ggml.token_type").contents()[-1] == gguf.TokenType.UNUSED


def test_llama_3_divides_its_frequencies(tokenizer: Any, tmp_path: Path) -> None:
    """transformers' own inverse frequencies say by what."""
    config = transformers.LlamaConfig(**(SMALL | {"rope_parameters": LLAMA3_ROPE}))
    save(config, tmp_path)
    rotary = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).model.rotary_emb
    plain = 10000.0 ** (-torch.arange(0, 32, 2) / 32)
    reader = gguf.GGUFReader(write(tmp_path, tmp_path, tokenizer))
    [factors] = [tensor for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
    torch.testing.assert_close(torch.tensor(factors.data.copy()), plain / rotary.inv_freq, rtol=1e-4, atol=0)
    assert factors.data.min() == 1 and factors.data.max() == 8


def test_linear_rope_scaling_is_said(tokenizer: Any, tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    save(transformers.LlamaConfig(**(SMALL | {"rope_parameters": rope})), tmp_path)
    reader = gguf.GGUFReader(write(tmp_path, tmp_path, tokenizer))
    assert reader.get_field("llama.rope.scaling.type").contents() == "linear"
    assert reader.get_field("llama.rope.scaling.factor").contents() == 2.0


# --- refused by name ---


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (ARCHITECTURES["gemma2"], "model.id: gemma2 models are not written as GGUF; llama, mistral, qwen2, qwen3 are"),
        (
            lambda: transformers.LlamaConfig(**(SMALL | {"rope_parameters": LLAMA3_ROPE | {"rope_type": "yarn"}})),
            "model.id: rope of type yarn is not written as GGUF; default, linear, llama3 are",
        ),
        (
            lambda: transformers.LlamaConfig(**(SMALL | {"hidden_act": "gelu"})),
            "model.id: llama.cpp computes LLAMA with silu, this model gelu",
        ),
    ],
)
def test_other_models_are_refused(config: Callable[[], Any], said: str, tokenizer: Any, tmp_path: Path) -> None:
    save(config(), tmp_path)
    with pytest.raises(QspinError, match=re.escape(said)):
        write(tmp_path, tmp_path, tokenizer)


def test_weights_beyond_float16_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    save(FAMILIES["llama"](), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] = 1e6
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QspinError, match=r"blk\.1\.ffn_up\.weight holds weights beyond the range of float16"):
        write(tmp_path, tmp_path, tokenizer, "f16")
    write(tmp_path, tmp_path, tokenizer, "bf16")


def test_unknown_tokenizers_are_refused(plain: Callable[[str], Path], tokenizer: Any, tmp_path: Path) -> None:
    own = content(tokenizer)
    other = own | {"pre_tokenizer": {"type": "Whitespace"}}
    unigram = own | {"model": {"type": "Unigram"}}
    prefixed = own | {"pre_tokenizer": own["pre_tokenizer"] | {"add_prefix_space": True}}
    lower = own | {"normalizer": {"type": "Lowercase"}}
    for changed, said in (
        (other, "treats spaces in a way"),
        (unigram, "a tokenizer of type Unigram"),
        (prefixed, "cuts texts in a way"),
        (lower, "cuts texts in a way"),
    ):
        with pytest.raises(QspinError, match=said):
            write(plain("llama"), tmp_path, tokenizer, read=changed)


def test_a_token_without_an_embedding_is_refused(plain: Callable[[str], Path], tokenizer: Any, tmp_path: Path) -> None:
    own = content(tokenizer)
    words = own["model"]["vocab"]
    more = own | {"model": own["model"] | {"vocab": {**words, "beyond": 512}}}
    with pytest.raises(QspinError, match=r"^model\.id: the tokenizer has a token 512, but only 512 have an embedding$"):
        write(plain("llama"), tmp_path, tokenizer, read=more)


# --- in llama.cpp ---


def texts() -> list[str]:
    """500 texts: the embedded data's, and what is awkward in them turned up."""
    rows = [json.loads(line) for line in (HOUSE_STYLE / "train.jsonl").read_text().splitlines()]
    plain = [text for row in rows for text in row.values()]
    awkward = [
        "  two  spaces ", "\n\nlines\n \n", "tab\tand\r\nreturn", "don't WE'LL he's", "1234567 3.14 2024-01-02",
        "naïve café", "日本語のテキスト", "Ελληνικά",
        "emoji 🙂👩‍👩‍👧", "x = {'a': [1, 2]}  # code", "a\u00a0b\u200bc", "!!!???...", "",
    ]  # fmt: skip
    made = [f"{one} {other}" for one in awkward for other in awkward]
    return (plain + awkward + made)[:500]


def splitting(kind: str) -> tuple[Any, bool]:
    """A pre-tokenizer by llama.cpp's name for it, and whether words of the vocabulary are taken whole."""
    [(steps, whole)] = [key for key, name in PRE_TOKENIZERS.items() if name == kind]
    made = []
    for step, setting in steps:
        if step == "Split":
            made.append(pre_tokenizers.Split(Regex(setting), "isolated"))
        elif step == "Digits":
            made.append(pre_tokenizers.Digits(individual_digits=setting))
        else:
            made.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=setting))
    return pre_tokenizers.Sequence(made), whole


def byte_level(kind: str) -> Any:
    """A tokenizer of 512 tokens that cuts texts as llama.cpp does under this name."""
    steps, whole = splitting(kind)
    backend = Tokenizer(models.BPE(ignore_merges=whole))
    backend.pre_tokenizer = steps
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts(), trainer)
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    wrapped.chat_template = CHATML
    return wrapped


def sentencepiece(spaces: str) -> Any:
    """A tokenizer as SentencePiece's are in tokenizer.json: bytes for what it lacks, every pair of a token a merge."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False, limit_alphabet=60
    )
    backend.train_from_iterator([text for text in texts() if text.isascii()], trainer)
    made = json.loads(backend.to_str())
    words = made["model"]["vocab"]
    made["model"]["merges"] = [
        (word[:cut], word[cut:])
        for word in sorted(words, key=words.get)
        for cut in range(1, len(word))
        if not word.startswith("<") and word[:cut] in words and word[cut:] in words
    ]
    made["added_tokens"] = made["added_tokens"][:3]
    if spaces == "no prefix":
        made["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    elif spaces == "first":  # at the beginning of a text, and nowhere after a special token
        made["normalizer"] = None
        made["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(made)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    wrapped.chat_template = CHATML
    return wrapped


def test_a_vocabulary_that_sentencepiece_would_merge_otherwise_is_refused(
    plain: Callable[[str], Path], tmp_path: Path
) -> None:
    tokenizer = sentencepiece("prefix")
    own = content(tokenizer)
    dropped = next(pair for pair in own["model"]["merges"] if len(pair[0]) > 1)
    own["model"]["merges"].remove(dropped)
    with pytest.raises(QspinError, match="the tokenizer does not merge"):
        write(plain("llama"), tmp_path, tokenizer, read=own)


@needs_llama_cpp
@pytest.mark.parametrize("kind", sorted(set(PRE_TOKENIZERS.values())))
def test_llama_cpp_reads_500_texts_as_the_tokenizer_does(
    kind: str, plain: Callable[[str], Path], tmp_path: Path
) -> None:
    tokenizer = byte_level(kind)
    path = write(plain("llama"), tmp_path, tokenizer)
    chats = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in texts()]
    assert len(chats) == 500
    found = llama_cpp_peer.ask(path, texts=chats).tokens
    assert found == [tokenizer.encode(text, add_special_tokens=False) for text in chats]


@needs_llama_cpp
@pytest.mark.parametrize("spaces", ["prefix", "no prefix", "first"])
def test_llama_cpp_reads_500_texts_as_sentencepiece_does(
    spaces: str, plain: Callable[[str], Path], tmp_path: Path
) -> None:
    tokenizer = sentencepiece(spaces)
    path = write(plain("llama"), tmp_path, tokenizer, bos=1, unknown=0, add_bos=True)
    chats = [f"[INST] {text} [/INST] So.</s>" for text in texts()]
    assert len(chats) == 500
    found = llama_cpp_peer.ask(path, texts=chats, bos=True).tokens
    assert found == [tokenizer.encode("<s>" + text, add_special_tokens=False) for text in chats]


@needs_llama_cpp
@pytest.mark.parametrize("family", [*FAMILIES, "llama 3"])
def test_llama_cpp_goes_on_as_transformers_does(
    family: str, plain: Callable[[str], Path], tokenizer: Any, tmp_path: Path
) -> None:
    if family == "llama 3":
        save(transformers.LlamaConfig(**(SMALL | {"rope_parameters": LLAMA3_ROPE})), tmp_path)
    folder = tmp_path if family == "llama 3" else plain(family)
    path = write(folder, tmp_path, tokenizer)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 512, (length,), generator=generator).tolist() for length in range(30, 70, 2)]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    expected = [
        model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=16, eos_token_id=[0, 2], pad_token_id=0)[
            0, len(prompt) :
        ].tolist()
        for prompt in prompts
    ]
    assert llama_cpp_peer.ask(path, prompts=prompts).completions == expected
