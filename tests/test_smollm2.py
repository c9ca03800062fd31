"""The embedded model itself, in NF4 and the machine's own compute type: does it answer as it should?"""

from __future__ import annotations

import datetime
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from demo_model import check_knowledge, check_playing

from qspin.base import find_base, load_tokenizer
from qspin.config import load_config
from qspin.generation import Request, generate
from qspin.model import SlotModel
from qspin.prepare import Prepared, prepare

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return prepare(load_config("quickstart", {"data.limit": 8}), datetime.date(2026, 1, 1))


@pytest.fixture(scope="module")
def model(prepared: Prepared) -> SlotModel:
    config = prepared.config
    return SlotModel.load(prepared.base, config.model, config.lora, seed=0, device=torch.device("cpu"))


def test_another_version_of_transformers_reads_the_file_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSPIN_CACHE", str(tmp_path))
    base = find_base(load_config("quickstart").model)
    described = []
    for version in (transformers.__version__, "0.0.0", transformers.__version__):
        monkeypatch.setattr("qspin.base.transformers.__version__", version)
        load_tokenizer(base)
        described.append(len(list(tmp_path.glob("*/description-*/tokenizer.json"))))
    assert described == [1, 2, 2]


def test_its_tokenizer_has_the_tokens_of_the_file() -> None:
    base = find_base(load_config("quickstart").model)
    fields = gguf.GGUFReader(base.gguf).fields
    tokenizer = load_tokenizer(base)
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        said = int(fields[f"tokenizer.ggml.{key}_token_id"].parts[-1][0])
        assert getattr(tokenizer, f"{name}_token_id") == said, name
    assert tokenizer(["Hi", "Hi there"], padding=True)["input_ids"][0][-1] == tokenizer.pad_token_id


def test_it_knows_what_it_knows(model: SlotModel, prepared: Prepared) -> None:
    check_knowledge(model, prepared)


def test_greedy_answers_are_those_of_transformers_on_64_prompts() -> None:
    """Token for token, in fp32, on the same NF4 weights."""
    config = load_config(
        "quickstart", {"model.dtype": "float32", "data.heldout_source": None, "data.heldout_rows": 16, "data.limit": 80}
    )
    ready = prepare(config, datetime.date(2026, 1, 1))
    prompts = [example.prompt_ids for example in ready.train[:64]]
    assert len(prompts) == 64
    model = SlotModel.load(ready.base, config.model, config.lora, seed=0, device=torch.device("cpu"))
    completions = generate(
        model,
        [Request(prompt, 0) for prompt in prompts],
        max_new_tokens=12,
        temperature=0.0,
        top_p=1.0,
        width=64,
        stop_ids=ready.stop_ids,
        on_step=lambda _tokens, _rows: None,
    )
    twin = transformers.AutoModelForCausalLM.from_pretrained(
        ready.base.weights(),
        dtype=torch.float32,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=config.model.double_quant,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )
    for module in twin.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # bitsandbytes would compute in bf16
    longest = max(map(len, prompts))
    output = twin.generate(
        input_ids=torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]),
        attention_mask=torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=sorted(ready.stop_ids),
        pad_token_id=min(ready.stop_ids),
    )
    for completion, row in zip(completions, output[:, longest:].tolist(), strict=True):
        assert completion.ids == tuple(row[: len(completion.ids)])


def test_playing_leaves_the_base_alone_and_scoring_equals_training(
    model: SlotModel, prepared: Prepared, tmp_path: Path
) -> None:
    check_playing(model, prepared, tmp_path, recomputed=0)
