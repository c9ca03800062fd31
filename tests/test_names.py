"""A base whose files name its weights otherwise than transformers does in memory merges all the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from exported import made
from safetensors.torch import load_file, save_file
from test_export import tiny_run
from test_probe import gemma_3, load, saved, sparse_qwen2

from qspin.exports.compare import Trained
from qspin.exports.merge import Merged, write_safetensors
from qspin.exports.names import weights_of
from qspin.files import ADAPTER_WEIGHTS
from qspin.run_dir import RunDir

LAYER = "layers.0.self_attn.q_proj.weight"
ON_THE_HUB, IN_MEMORY = f"language_model.model.{LAYER}", f"model.language_model.{LAYER}"


def as_in_memory(folder: Path) -> Path:
    """Files of a Gemma 3 whose names are those that transformers has in memory."""
    named = load_file(folder / "model.safetensors")
    named = {name.replace("language_model.model.", "model.language_model."): value for name, value in named.items()}
    save_file(named, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("named", [ON_THE_HUB, IN_MEMORY])
def test_it_merges_as_peft_does(named: str, tmp_path: Path) -> None:
    base = saved(gemma_3(), tmp_path / "base")
    if named == IN_MEMORY:
        as_in_memory(base)
    assert named in load_file(base / "model.safetensors")
    model = load(base)
    adapter = {name: torch.randn_like(weight) * 0.1 for name, weight in model.adapter().items()}
    model.set_adapter(adapter)
    (tmp_path / "adapter").mkdir()
    model.save_adapter(tmp_path / "adapter")
    weights = weights_of(model, load_file(base / "model.safetensors"))
    assert named in weights.quantised
    assert weights.quantised <= load_file(base / "model.safetensors").keys()
    assert named.replace(LAYER, "embed_tokens.weight") in weights.tied
    assert (IN_MEMORY in weights.renamed) == (named == ON_THE_HUB)
    (tmp_path / "ours").mkdir()
    merged = Merged(base, tmp_path / "adapter", tied=weights.tied, renamed=weights.renamed)
    write_safetensors(merged, tmp_path / "ours")
    fresh = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").merge_and_unload().state_dict()
    (tmp_path / "ours" / "config.json").write_bytes((base / "config.json").read_bytes())
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32).state_dict()
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-6, atol=1e-6)
    original = load_file(base / "model.safetensors")
    moved = [name for name, weight in load_file(tmp_path / "ours" / "model.safetensors").items()
             if not torch.equal(weight, original[name])]  # fmt: skip
    assert len(moved) == len(load_file(tmp_path / "adapter" / ADAPTER_WEIGHTS)) / 2


def test_a_run_on_it_exports(tokenizer: Any, tmp_path: Path) -> None:
    base = saved(gemma_3(), tmp_path / "base")
    tokenizer.save_pretrained(base)
    images = {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 64, "width": 64}}
    (base / "preprocessor_config.json").write_text(json.dumps(images))
    trained = Trained(RunDir(tiny_run(base, tmp_path)), 1)
    check = made(trained, tmp_path / "same", "merged-16bit", onto="dequantised", dtype="float32")
    assert abs(check["nll_difference"]) < 1e-5
    assert check["top1_agreement"] == 1
    made(trained, tmp_path / "packed", "merged-4bit")
    for out in (tmp_path / "same", tmp_path / "packed"):
        assert json.loads((out / "preprocessor_config.json").read_text()) == images
        assert ON_THE_HUB in load_file(out / "model.safetensors")


def test_what_was_made_of_several_tensors_is_in_no_file(tmp_path: Path) -> None:
    """Experts are one weight in memory, and one each in the files."""
    base = saved(sparse_qwen2(None), tmp_path / "base")
    stored = load_file(base / "model.safetensors")
    assert any(".experts.0." in name for name in stored)
    assert weights_of(load(base), stored).renamed == {}
