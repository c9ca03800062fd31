"""Files of a base that are not what they should be: each is told in a line before anything is computed."""

from __future__ import annotations

import datetime
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
from conftest import small_run
from exported import made
from safetensors.torch import load_file, save_file

from qspin.base import find_base, stop_tokens
from qspin.config import LoraConfig, ModelConfig, load_config
from qspin.errors import QspinError
from qspin.exports.compare import Trained
from qspin.exports.export import export
from qspin.exports.safetensors_file import INDEX
from qspin.model import SlotModel
from qspin.prepare import prepare
from qspin.run_dir import RunDir
from qspin.spin import run
from qspin.trials.loaded import Loaded
from qspin.watch.progress import Silent

FILE = "model.safetensors"


@pytest.fixture
def folder(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the llama, whose head is its embeddings."""
    return Path(shutil.copytree(tiny_folder("llama"), tmp_path / "base"))


def load(folder: Path) -> SlotModel:
    model = ModelConfig(id=str(folder), dtype="float32")
    return SlotModel.load(find_base(model), model, LoraConfig(rank=4), seed=0, device=torch.device("cpu"))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(folder / FILE)), folder / FILE, metadata={"format": "pt"})


def settle(path: Path, **changed: Any) -> None:
    settings = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(settings | changed))


DOWN = "model.layers.1.mlp.down_proj.weight"
LACKING: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a head of its own that is not there": (
        lambda base: settle(base / "config.json", tie_word_embeddings=False),
        "lm_head.weight",
    ),
    "no embeddings": (
        lambda base: rewrite(base, lambda held: {k: v for k, v in held.items() if "embed" not in k}),
        "model.embed_tokens.weight",
    ),
    "a layer's matrix": (lambda base: rewrite(base, lambda held: {k: v for k, v in held.items() if k != DOWN}), DOWN),
    "other names": (
        lambda base: rewrite(base, lambda held: {k.replace("model.", "encoder."): v for k, v in held.items()}),
        "model.embed_tokens.weight",
    ),
    "fewer layers than config.json has": (
        lambda base: settle(base / "config.json", num_hidden_layers=5),
        "model.layers.3.",
    ),
    "a smaller vocabulary": (lambda base: settle(base / "config.json", vocab_size=600), "model.embed_tokens.weight"),
    "narrower layers": (lambda base: settle(base / "config.json", hidden_size=128), "mlp.down_proj.weight"),
    "fewer keys": (lambda base: settle(base / "config.json", num_key_value_heads=4), "self_attn.k_proj.weight"),
}


@pytest.mark.parametrize("what", LACKING)
def test_weights_that_the_files_lack_are_not_made_up(what: str, folder: Path) -> None:
    damage, name = LACKING[what]
    damage(folder)
    with pytest.raises(QspinError, match=rf"^model\.id: base: its files have no .*{re.escape(name)}"):
        load(folder)


def test_layers_that_config_json_has_no_place_for_are_not_left_out(folder: Path) -> None:
    settle(folder / "config.json", num_hidden_layers=2)
    with pytest.raises(QspinError, match=r"^model\.id: base: its files have more layers than the 2 of config\.json"):
        load(folder)


@pytest.mark.parametrize("kind", [{"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}])
def test_a_base_that_came_quantised_otherwise_is_refused(kind: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    settings = transformers.BitsAndBytesConfig(**kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings)
    model.save_pretrained(tmp_path / "quantised")
    with pytest.raises(QspinError, match=r"^model\.id: quantised came quantised, and not in NF4; take the 16-bit"):
        load(tmp_path / "quantised")


def test_an_adapter_beside_the_model_is_not_put_in_unasked(folder: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    slot = peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, slot).save_pretrained(folder)
    with pytest.raises(QspinError, match=r"^model\.id: base has a PEFT adapter beside the model's own files; take"):
        load(folder)


DAMAGED = [
    ("tokenizer.json", "{}"),
    ("tokenizer_config.json", "[]"),
    ("config.json", "[]"),
    ("generation_config.json", "[]"),
    ("generation_config.json", "{"),
    ("generation_config.json", '{"eos_token_id": "x"}'),
]


@pytest.mark.parametrize(("name", "text"), DAMAGED)
def test_a_damaged_description_is_one_line(name: str, text: str, folder: Path, tmp_path: Path) -> None:
    (folder / name).write_text(text)
    config = load_config(None, small_run(folder, tmp_path / "rows.jsonl", rows=18))
    with pytest.raises(QspinError, match=rf"^model\.id: {re.escape(str(folder))}(: eos_token_id| can't be loaded)"):
        prepare(config, datetime.date(2026, 1, 1))


def test_a_base_without_a_generation_config_has_no_stop_tokens_of_its_own(folder: Path) -> None:
    (folder / "generation_config.json").unlink(missing_ok=True)
    base = find_base(ModelConfig(id=str(folder)))
    assert stop_tokens(base) == ()
    settle(folder / "generation_config.json", eos_token_id=[2, 3])
    assert stop_tokens(base) == (2, 3)


# --- and what is exported of a run on them ---


def played(base: Path, folder: Path) -> RunDir:
    settings = small_run(base, folder / "rows.jsonl", rows=18) | {"iterations": 1, "model.dtype": "float32"}
    run(prepare(load_config(None, settings), datetime.date(2026, 1, 2)), folder / "run", Silent())
    return RunDir(folder / "run")


def test_what_is_merged_is_what_was_played(folder: Path, tmp_path: Path) -> None:
    """Whole weights beside shards that were there before; sampling that is set and not asked for, as of old."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    older = transformers.AutoModelForCausalLM.from_config(model.config)
    older.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    for path in (tmp_path / "shards").glob("model*"):
        shutil.copy(path, folder)
    assert (folder / INDEX).is_file()
    settle(folder / "generation_config.json", temperature=0.9, top_p=0.6)
    trained = Trained(played(folder, tmp_path), 0)
    whole = made(trained, tmp_path / "whole", "merged-16bit", onto="dequantised", dtype="float32")
    assert abs(whole["nll_difference"]) < 1e-4
    packed = made(trained, tmp_path / "packed", "merged-4bit")
    assert packed["nll_trained"] == whole["nll_trained"]
    assert json.loads((tmp_path / "packed" / "generation_config.json").read_text())["temperature"] == 0.9


def test_a_run_on_4_bits_alone_exports_its_adapter_and_says_so_at_once(folder: Path, tmp_path: Path) -> None:
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings)
    model.save_pretrained(tmp_path / "nf4")
    for path in (*folder.glob("token*"), *folder.glob("*.jinja")):
        shutil.copy(path, tmp_path / "nf4")
    trained, said = Trained(played(tmp_path / "nf4", tmp_path), 0), []
    export(trained, to="adapter", out=tmp_path / "adapter")
    for to in ("merged-16bit", "merged-4bit"):
        with pytest.raises(QspinError, match=r"^--to: nf4 came in 4 bits, which nothing can be merged onto; export"):
            export(trained, to=to, out=tmp_path / to, say=said.append)
    assert said == []


def test_another_config_beside_the_same_weights_is_another_model(folder: Path, tmp_path: Path) -> None:
    settings = small_run(folder, tmp_path / "rows.jsonl", rows=18) | {"model.dtype": "float32"}
    here = RunDir(tmp_path / "run")

    def play(iterations: int) -> None:
        config = load_config(None, settings | {"iterations": iterations})
        run(prepare(config, datetime.date(2026, 1, 2)), here.path, Silent())

    play(1)
    settle(folder / "config.json", transformers_version="0", _name_or_path="elsewhere")
    play(1)
    settle(folder / "config.json", rms_norm_eps=0.01)
    for go_on in (lambda: play(2), lambda: Loaded.open(here, "0")):
        with pytest.raises(QspinError, match=r"^model\.id: config\.json of base is not what .* bring the old one"):
            go_on()
    assert here.iterations_done() == 1


def test_players_are_not_talked_with_in_other_tokens(folder: Path, tmp_path: Path) -> None:
    settings = small_run(folder, tmp_path / "rows.jsonl", rows=18) | {"model.dtype": "float32", "iterations": 1}
    here = RunDir(tmp_path / "run")
    run(prepare(load_config(None, settings), datetime.date(2026, 1, 2)), here.path, Silent())
    Loaded.open(here, "0")
    said = r"^model\.id: the tokens of base, or those that end an answer, are not what .* began with"
    was = (folder / "tokenizer.json").read_text()
    content = json.loads(was)
    words = content["model"]["vocab"]
    words["e"], words["a"] = words["a"], words["e"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(QspinError, match=said):
        Loaded.open(here, "0")
    (folder / "tokenizer.json").write_text(was)
    settle(folder / "generation_config.json", eos_token_id=[2, 250])
    with pytest.raises(QspinError, match=said):
        Loaded.open(here, "0")
