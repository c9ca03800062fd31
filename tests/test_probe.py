"""What a base is asked as it is loaded: a family that computes in a way of its own plays right, or is refused."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import peft
import pytest
import torch
import transformers
from conftest import SHAPE, small_run

from qspin.base import find_base
from qspin.config import LoraConfig, ModelConfig, load_config
from qspin.errors import QspinError
from qspin.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qspin.four_bits import load_in_4_bits
from qspin.layers.attention import Lengths, Packed
from qspin.layers.fused import _rotates_halves
from qspin.layers.refit import in_one_mode
from qspin.model import SlotModel
from qspin.packing import pack_row
from qspin.prepare import prepare
from qspin.records import Pair
from qspin.run_dir import RunDir
from qspin.scoring import pair_logps
from qspin.spin import run
from qspin.watch.progress import Silent

CPU = torch.device("cpu")
IDS = torch.arange(3, 43)
DType = Literal["float32", "bfloat16", "float16"]
GEMMA_4 = {
    **SHAPE,
    "num_hidden_layers": 4,
    "head_dim": 32,
    "global_head_dim": 32,
    "sliding_window": 64,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 512,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "final_logit_softcapping": 3.0,
    "tie_word_embeddings": True,
}
IMAGES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}


def gemma_3() -> Any:
    """As the hub has those of 4B and more: with a part for images."""
    return transformers.Gemma3Config(
        text_config=SHAPE | {"head_dim": 32, "sliding_window": 7},
        vision_config={**IMAGES, "patch_size": 16, "image_size": 64},
        image_token_index=500,
        boi_token_index=501,
        eoi_token_index=502,
        mm_tokens_per_image=4,
    )


def gemma_4(**changed: Any) -> Any:
    text = transformers.AutoConfig.for_model("gemma4_text", **GEMMA_4 | changed)
    return transformers.AutoConfig.for_model("gemma4", text_config=text, vision_config=IMAGES, audio_config=None)


def sparse_qwen2(window: int | None) -> Any:
    return transformers.AutoConfig.for_model(
        "qwen2_moe",
        **SHAPE,
        use_sliding_window=window is not None,
        sliding_window=window,
        max_window_layers=2,
        num_experts=4,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
    )


def saved(config: Any, folder: Path) -> Path:
    torch.manual_seed(1)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


def load(folder: Path, dtype: DType = "float32", targets: list[str] | None = None) -> SlotModel:
    model = ModelConfig(id=str(folder), dtype=dtype)
    lora = LoraConfig(rank=4, alpha=8) if targets is None else LoraConfig(rank=4, alpha=8, targets=targets)
    return SlotModel.load(find_base(model), model, lora, seed=0, device=CPU)


def logits(model: SlotModel) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model.hidden(model.embed(IDS), torch.arange(len(IDS)), Packed([Lengths(len(IDS))], CPU)))


def its_own(folder: Path) -> torch.Tensor:
    """Logits of transformers' model on the same 4-bit weights, in fp32."""
    settings = ModelConfig(id=str(folder), dtype="float32")
    causal_lm = load_in_4_bits(find_base(settings), settings, CPU, torch.float32)
    in_one_mode(causal_lm)
    with torch.no_grad():
        own: torch.Tensor = causal_lm(input_ids=IDS[None], use_cache=False).logits[0]
    return own


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "granite": (lambda: transformers.GraniteConfig(**SHAPE, logits_scaling=4.0), "computes its logits in a way"),
    "stablelm": (lambda: transformers.StableLmConfig(**SHAPE), "has layers that qspin can't compute"),
    "falcon": (lambda: transformers.FalconConfig(**SHAPE), "has layers that qspin can't compute"),
    "deepseek_v2": (
        lambda: transformers.DeepseekV2Config(
            **SHAPE | {"num_key_value_heads": 4}, first_k_dense_replace=3, n_group=1, topk_group=1, q_lora_rank=None
        ),
        "has layers that qspin can't compute",
    ),
    # right on a row, and each layer's second keys and values would take the place of its first in a cache
    "diffllama": (lambda: transformers.DiffLlamaConfig(**SHAPE), "attends more than once in a pass"),
    "hrm_text": (lambda: transformers.AutoConfig.for_model("hrm_text", **SHAPE), "attends more than once in a pass"),
    # a window in its mask alone, wider than the probe
    "qwen2_moe": (lambda: sparse_qwen2(16), "is of sliding_attention, and its attention is asked for all"),
    "ctrl": (
        lambda: transformers.CTRLConfig(vocab_size=512, n_embd=64, dff=128, n_layer=3, n_head=4, n_positions=512),
        "has no gradient checkpointing",
    ),
    # whose own forward pass writes into a 4-bit weight
    "gemma3n_text": (
        lambda: transformers.AutoConfig.for_model(
            "gemma3n_text",
            **SHAPE | {"intermediate_size": [128] * 3, "num_hidden_layers": 3},
            head_dim=16,
            vocab_size_per_layer_input=512,
            hidden_size_per_layer_input=16,
            num_kv_shared_layers=0,
            laurel_rank=8,
            activation_sparsity_pattern=[0.0] * 3,
            layer_types=["full_attention"] * 3,
            altup_num_inputs=2,
        ),
        "has layers that qspin can't compute",
    ),
}


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_computes_otherwise_is_refused_in_a_line(family: str, tmp_path: Path) -> None:
    config, said = REFUSED[family]
    folder = saved(config(), tmp_path / family)
    with pytest.raises(QspinError, match=rf"^model\.id: {family} \({family}\) .*{re.escape(said)}") as told:
        load(folder)
    assert str(told.value).isprintable()


HYBRIDS: dict[str, Callable[[], Any]] = {
    "granitemoehybrid": lambda: transformers.GraniteMoeHybridConfig(
        **SHAPE,
        layer_types=["mamba", "attention", "mamba"],
        mamba_n_heads=4,
        mamba_d_head=32,
        mamba_d_state=16,
        num_local_experts=0,
        shared_intermediate_size=128,
    ),
    "lfm2": lambda: transformers.Lfm2Config(
        **SHAPE, layer_types=["conv", "full_attention", "conv"], block_auto_adjust_ff_dim=False
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", HYBRIDS)
def test_a_family_that_leaks_from_text_to_text_is_refused(family: str, dtype: DType, tmp_path: Path) -> None:
    """By itself each text of a row would be computed as the model does."""
    folder = saved(HYBRIDS[family](), tmp_path / family)
    with pytest.raises(QspinError, match=rf"^model\.id: {family} \({family}\) carries something from one text to the"):
        load(folder, dtype, ["q_proj"])


def test_a_base_that_overflows_is_told_so(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder("llama"))
    with torch.no_grad():
        base.model.norm.weight.fill_(1e5)  # beyond float16
    base.save_pretrained(tmp_path / "large")
    with pytest.raises(QspinError, match=r"^model\.id: large's own logits are not finite numbers in torch\.float16"):
        load(tmp_path / "large", "float16")


PLAYED: dict[str, Callable[[], Any]] = {
    "granite without a scale": lambda: transformers.GraniteConfig(**SHAPE, logits_scaling=1.0),
    "dropout of attention": lambda: transformers.LlamaConfig(**SHAPE, attention_dropout=0.5),
    "dropout of what a layer adds": lambda: transformers.AutoConfig.for_model("seed_oss", **SHAPE, head_dim=16),
    "experts, and no window": lambda: sparse_qwen2(None),
    "queries, keys and values that are clipped in place": lambda: transformers.OlmoConfig(**SHAPE, clip_qkv=0.5),
    "images as well": gemma_3,
    "images as well, and a soft-cap": gemma_4,
    "layers that take others' keys and values": lambda: gemma_4(num_kv_shared_layers=2),
}


@pytest.mark.parametrize("what", PLAYED)
def test_a_family_that_is_understood_computes_what_it_does_by_itself(what: str, tmp_path: Path) -> None:
    folder = saved(PLAYED[what](), tmp_path / "model")
    model, own = load(folder), its_own(folder)
    torch.testing.assert_close(logits(model), own, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model), logits(model))
    pair = Pair("a", 0, tuple(range(3, 9)), tuple(range(30, 41)), tuple(range(50, 58)), ended=True)
    real, generated = pair_logps(model, pack_row([pair], CPU))
    (real - generated).sum().backward()
    learns = [name for name, weight in model.parameters.items() if weight.grad is not None]
    assert len(learns) == len(model.parameters)
    assert not [name for name in model.parameters if "vision" in name or "embed" in name]


def test_a_soft_cap_in_the_part_for_texts_is_found_in_16_bits_too(tmp_path: Path) -> None:
    """Where it changes logits by less than rounding may."""
    folder = saved(gemma_4(final_logit_softcapping=30.0), tmp_path / "model")
    assert load(folder, "bfloat16").head._softcap == 30.0


def test_a_rotation_that_takes_one_tensor_is_left_to_its_family() -> None:
    from transformers.models.gemma4.modeling_gemma4 import apply_rotary_pos_emb

    assert not _rotates_halves(apply_rotary_pos_emb)


@pytest.mark.parametrize("targets", [None, ["q_proj"]])
def test_widths_that_a_cpu_gets_wrong_are_refused_whatever_is_adapted(
    targets: list[str] | None, tmp_path: Path
) -> None:
    folder = saved(transformers.LlamaConfig(**SHAPE | {"intermediate_size": 96}), tmp_path / "odd")
    with pytest.raises(QspinError, match=r"^model\.id: a layer has 96 inputs, no multiple of 64"):
        load(folder, targets=targets)


@pytest.mark.parametrize("family", ["gemma_3", "gemma_4"])
def test_a_model_that_takes_images_plays_and_its_adapter_is_of_texts_alone(
    family: str, tokenizer: Any, tmp_path: Path
) -> None:
    """In float16, whose gradients are scaled: each weight of the slot has one."""
    config = gemma_3() if family == "gemma_3" else gemma_4(num_kv_shared_layers=2)
    folder = saved(config, tmp_path / "model")
    tokenizer.save_pretrained(folder)
    settings = small_run(folder, tmp_path / "rows.jsonl", rows=18) | {"model.dtype": "float16", "iterations": 1}
    run(prepare(load_config(None, settings), datetime.date(2026, 1, 2)), tmp_path / "run", Silent())
    adapter = RunDir(tmp_path / "run").iteration(0).adapter
    pattern = json.loads((adapter / ADAPTER_CONFIG).read_text())["exclude_modules"]
    assert re.fullmatch(pattern, "model.vision_tower.encoder.layers.0.self_attn.q_proj")
    assert not re.fullmatch(pattern, "model.language_model.layers.0.self_attn.q_proj")
    again = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(folder), adapter)
    held = peft.get_peft_model_state_dict(again)
    with (adapter / ADAPTER_WEIGHTS).open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert held.keys() == header.keys() - {"__metadata__"}
