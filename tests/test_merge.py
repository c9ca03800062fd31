"""Merging against PEFT's own, element by element; what is left alone, what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from conftest import ARCHITECTURES, SHAPE, ordered
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qspin.errors import QspinError
from qspin.exports import merge
from qspin.exports.merge import Dequantised, Merged, write_safetensors
from qspin.exports.names import quantised_names, tied_names
from qspin.exports.safetensors_file import INDEX
from qspin.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qspin.model import SlotModel

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A random model in many files."""
    made: dict[tuple[str, str], Path] = {}

    def folder(architecture: str = "qwen2", dtype: str = "bfloat16") -> Path:
        if (architecture, dtype) not in made:
            torch.manual_seed(1)
            path = tmp_path_factory.mktemp("shards") / architecture
            model = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[architecture](), dtype=DTYPES[dtype])
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    torch.nn.init.normal_(parameter)
            model.save_pretrained(path, max_shard_size="100KB")
            assert (path / INDEX).is_file()
            made[architecture, dtype] = path
        return made[architecture, dtype]

    return folder


def adapt(base: Path, out: Path, *, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """An adapter of PEFT's on a base, its weights random, and what PEFT makes of both: `out`/merged."""
    torch.manual_seed(2)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    defaults: dict[str, Any] = {"r": 4, "lora_alpha": 10, "target_modules": "all-linear"}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**(defaults | settings)))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(out / "adapter")
    weights = load_file(out / "adapter" / ADAPTER_WEIGHTS)
    save_file({name: weight.to(dtype) for name, weight in weights.items()}, out / "adapter" / ADAPTER_WEIGHTS)
    fresh = transformers.AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    merged = peft.PeftModel.from_pretrained(fresh, out / "adapter").merge_and_unload()
    merged.save_pretrained(out / "merged", max_shard_size="100KB")
    return out / "adapter"


def written(merged: Merged, folder: Path) -> dict[str, Tensor]:
    folder.mkdir()
    write_safetensors(merged, folder)
    return tensors(folder)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def differing(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Share of the elements that differ; none by more than one unit in the last place."""
    assert ours.keys() == theirs.keys()
    different = total = 0
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        apart = (ordered(tensor) - ordered(theirs[name])).abs()
        assert int(apart.max()) <= 1, name
        different += int((apart > 0).sum())
        total += apart.numel()
    return different / total


def test_the_ruler_counts_units_in_the_last_place() -> None:
    one = torch.tensor([1.0, -1.0, 0.0], dtype=torch.bfloat16)
    next_up = torch.tensor([1.0078125, -1.0078125, -0.0], dtype=torch.bfloat16)
    assert (ordered(next_up) - ordered(one)).tolist() == [1, -1, 0]


# --- as PEFT merges ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_merges_as_peft_does(architecture: str, shards: Callable[..., Path], tmp_path: Path) -> None:
    """Tied embeddings, biases, grouped queries and fused projections among them."""
    base = shards(architecture)
    adapter = adapt(base, tmp_path)
    ours = written(Merged(base, adapter), tmp_path / "ours")
    theirs = tensors(tmp_path / "merged")
    assert differing(ours, theirs) <= 1e-4
    moved = [name for name, tensor in tensors(base).items() if not torch.equal(tensor, ours[name])]
    assert len(moved) == len(load_file(adapter / ADAPTER_WEIGHTS)) / 2


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 8}, "alpha_pattern": {r".*\.2\..*proj": 3}},
        {"use_rslora": True},
        {"use_rslora": True, "rank_pattern": {"down_proj": 9}},
        {"modules_to_save": ["lm_head", "embed_tokens"], "target_modules": ["q_proj"]},
        {"modules_to_save": ["norm"]},
        {"target_modules": ["lm_head", "v_proj"]},
        {"dtype": torch.bfloat16},
        {"init_lora_weights": "gaussian", "layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]},
    ],
    ids=str,
)
def test_every_kind_of_plain_lora_merges_as_peft_does(
    settings: dict[str, Any], shards: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = adapt(shards(), tmp_path, **settings)
    ours = written(Merged(shards(), adapter), tmp_path / "ours")
    assert differing(ours, tensors(tmp_path / "merged")) <= 1e-4


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_bases_dtype_is_kept(dtype: str, shards: Callable[..., Path], tmp_path: Path) -> None:
    base = shards("llama", dtype)
    adapter = adapt(base, tmp_path)
    merged = Merged(base, adapter)
    ours = written(merged, tmp_path / "ours")
    assert merged.main_dtype == DTYPES[dtype]
    assert {tensor.dtype for tensor in ours.values()} == {DTYPES[dtype]}
    if dtype == "float16":
        assert differing(ours, tensors(tmp_path / "merged")) <= 1e-4
    else:  # the order of summation shows in fp32
        torch.testing.assert_close(ours, tensors(tmp_path / "merged"), rtol=1e-6, atol=1e-7)


def test_files_names_and_order_are_the_bases(shards: Callable[..., Path], tmp_path: Path) -> None:
    base = shards()
    written(Merged(base, adapt(base, tmp_path)), tmp_path / "ours")
    files = sorted(path.name for path in base.glob("model*"))
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == files
    assert json.loads((base / INDEX).read_text()) == json.loads((tmp_path / "ours" / INDEX).read_text())
    for file in base.glob("*.safetensors"):
        ours = tmp_path / "ours" / file.name
        with safe_open(file, "pt") as old, safe_open(ours, "pt") as new:
            assert new.offset_keys() == old.offset_keys()
            assert new.metadata() == old.metadata()


def test_one_file_and_no_index_are_enough(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    base = tiny_folder("qwen2")
    ours = written(Merged(base, adapt(base, tmp_path)), tmp_path / "ours")
    torch.testing.assert_close(ours, tensors(tmp_path / "merged"), rtol=1e-6, atol=1e-7)


def test_a_wider_dtype_keeps_what_rounding_would_lose(shards: Callable[..., Path], tmp_path: Path) -> None:
    base = shards()
    adapter = adapt(base, tmp_path)
    ours = written(Merged(base, adapter, dtype=torch.float32), tmp_path / "ours")
    assert {tensor.dtype for tensor in ours.values()} == {torch.float32}
    before, low_rank = tensors(base), load_file(adapter / ADAPTER_WEIGHTS)
    name = "model.layers.1.mlp.down_proj"
    a, b = (low_rank[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB")
    expected = before[f"{name}.weight"].float() + 10 / 4 * b @ a
    torch.testing.assert_close(ours[f"{name}.weight"], expected, rtol=1e-6, atol=1e-7)
    assert not torch.equal(expected, expected.bfloat16().float())
    norm = "model.norm.weight"
    assert torch.equal(ours[norm], before[norm].float())
    total = json.loads((tmp_path / "ours" / INDEX).read_text())["metadata"]["total_size"]
    assert total == sum(tensor.numel() * 4 for tensor in ours.values())


@pytest.mark.parametrize("block", [1, 1000])
def test_rows_can_be_taken_a_few_at_a_time(
    block: int, shards: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = shards()
    adapter = adapt(base, tmp_path)
    monkeypatch.setattr(merge, "BLOCK", block)
    monkeypatch.setattr(merge, "COPY", block)
    merged = Merged(base, adapter)
    ours = written(merged, tmp_path / "ours")
    assert differing(ours, tensors(tmp_path / "merged")) <= 1e-4
    name = "model.layers.0.self_attn.q_proj.weight"
    blocks = [len(rows) for rows in merged.blocks(name, multiple=16)]
    assert sum(blocks) == merged.shape(name)[0]
    assert len(blocks) > 1 and all(rows % 16 == 0 for rows in blocks)


# --- onto what it was trained on ---


@pytest.mark.parametrize("double_quant", [True, False], ids=["double-quant", "single-quant"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("block", [merge.BLOCK, 500])
def test_dequantised_weights_are_those_that_the_slot_model_computes_with(
    tiny_model: Callable[..., SlotModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    double_quant: bool,
    dtype: str,
    block: int,
) -> None:
    """Bit for bit, with an adapter that adds nothing; and every layer that is in 4 bits, adapted or not."""
    monkeypatch.setattr(merge, "BLOCK", block)
    model = tiny_model("qwen2", dtype=dtype, double_quant=double_quant)
    model.save_adapter(tmp_path)  # B = 0
    names = quantised_names(model)
    onto = Dequantised(names, DTYPES[dtype], double_quant, torch.device("cpu"))
    base = Path(model.base.weights())
    merged = Merged(base, tmp_path, onto=onto, dtype=torch.float32)
    ours = written(merged, tmp_path / "ours")
    original = load_file(base / "model.safetensors")
    assert len(names) == 7 * SHAPE["num_hidden_layers"]
    matrices = 0
    for layers in model._layers:
        for module, matrix in zip(layers_of(model, layers), layers.matrices(), strict=True):
            assert torch.equal(ours[f"{module}.weight"], matrix.float())
            assert not torch.equal(ours[f"{module}.weight"], original[f"{module}.weight"])
            matrices += 1
    assert matrices == len(names)
    assert torch.equal(ours["model.embed_tokens.weight"], original["model.embed_tokens.weight"])


def layers_of(model: SlotModel, layers: Any) -> list[str]:
    """Names of the modules that are computed together."""
    named = model.peft_model.get_base_model().named_modules()
    found = {id(module.lora_A["default"].weight): name for name, module in named if hasattr(module, "lora_A")}
    return [found[id(a)] for a in layers.a]


def test_a_base_that_lacks_what_was_trained_on_is_named(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    base = tiny_folder("qwen2")
    adapter = adapt(base, tmp_path)
    onto = Dequantised(frozenset({"model.layers.9.up.weight"}), torch.float32, True, torch.device("cpu"))
    with pytest.raises(QspinError, match=r"^the trained model has model\.layers\.9\.up\.weight in 4 bits"):
        Merged(base, adapter, onto=onto)


# --- refused by name ---


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_dora": True}, "use_dora is set"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is set"),
        ({"lora_bias": True}, "lora_bias is set"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication is set"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is set"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is set"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"peft_type": "IA3"}, "peft_type is IA3"),
    ],
)
def test_adapters_that_are_more_than_lora_are_refused(
    changes: dict[str, Any], said: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    base = tiny_folder("qwen2")
    adapter = adapt(base, tmp_path)
    path = adapter / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(QspinError, match=re.escape(f"{path}: {said}")):
        Merged(base, adapter)


def with_weights(adapter: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    weights = load_file(adapter / ADAPTER_WEIGHTS)
    change(weights)
    save_file(weights, adapter / ADAPTER_WEIGHTS)
    return adapter


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.update({f"{Q}.lora_magnitude_vector": torch.ones(4)}), "is neither half of a LoRA pair nor"),
        (lambda w: w.update({f"{Q}.base_layer.bias": torch.ones(4)}), "q_proj.bias is F32 of shape [4], the base's is"),
        (lambda w: w.pop(f"{Q}.lora_A.weight"), "q_proj has only half of its pair"),
        (lambda w: w.update({f"{Q}.lora_A.weight": torch.ones(4, 65)}), "do not make the base's [64, 64]"),
        (
            lambda w: w.update({"base_model.model.visual.lora_A.weight": torch.ones(4, 64)}),
            "the adapter has a part for visual, but the base's files hold no",
        ),
        (
            lambda w: w.update({"base_model.model.model.norm.lora_A.weight": torch.ones(4, 64)}),
            "the base's files hold no 16- or 32-bit matrix model.norm.weight",
        ),
    ],
)
def test_adapters_of_another_base_are_refused(
    change: Callable[[dict[str, Tensor]], None], said: str, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    base = tiny_folder("qwen2")
    adapter = with_weights(adapt(base, tmp_path), change)
    with pytest.raises(QspinError, match=re.escape(said)):
        Merged(base, adapter)


def test_a_module_saved_whole_must_have_the_bases_shape(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    base = tiny_folder("qwen2")
    adapter = adapt(base, tmp_path, modules_to_save=["lm_head"])
    key = "base_model.model.lm_head.weight"
    with_weights(adapter, lambda weights: weights.update({key: torch.ones(3, 64)}))
    with pytest.raises(QspinError, match=r"lm_head\.weight is F32 of shape \[3, 64\], the base's is F32 of shape"):
        Merged(base, adapter)


@pytest.mark.parametrize("end", ["lm_head", "embed_tokens"])
def test_one_end_of_tied_embeddings_is_refused(end: str, tiny_model: Callable[..., SlotModel], tmp_path: Path) -> None:
    model = tiny_model("llama")
    tied = tied_names(model)
    assert tied == {"model.embed_tokens.weight", "lm_head.weight"}
    assert tied_names(tiny_model("qwen2")) == frozenset()
    base = Path(model.base.weights())
    model.save_adapter(tmp_path)
    module = {"lm_head": "lm_head", "embed_tokens": "model.embed_tokens"}[end]
    key = f"base_model.model.{module}.lora_A.weight"
    with_weights(tmp_path, lambda weights: weights.update({key: torch.ones(4, 64)}))
    with pytest.raises(QspinError, match=f"{key} changes the embedding matrix or the output layer, which are one"):
        Merged(base, tmp_path, tied=tied)


def test_damaged_files_are_named(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_folder("qwen2"), base)
    adapter = adapt(base, tmp_path)
    file = base / "model.safetensors"
    whole = file.read_bytes()
    for content in (
        b"",
        whole[:100],
        whole[:-1],
        (10**12).to_bytes(8, "little") + whole[8:],
        b"\x02" + bytes(7) + b"[]",
    ):
        file.write_bytes(content)
        with pytest.raises(QspinError, match=rf"^{re.escape(str(file))}: not a readable safetensors file"):
            Merged(base, adapter)
    file.unlink()
    with pytest.raises(QspinError, match=r"holds neither model\.safetensors nor"):
        Merged(base, adapter)
