"""Whole runs on a GPU, for both backends: the invariants, and that a run goes on to the same bytes."""

from __future__ import annotations

import datetime
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import SHAPE
from on_cuda import BACKENDS, ON_CUDA, load
from test_optimisation import cut_off, descend, interrupt, run, same_bits

from qspin import spin
from qspin.config import load_config
from qspin.files import read_json, read_jsonl, remove
from qspin.layers import attention
from qspin.optimisation import steps_kept
from qspin.prepare import Prepared, prepare
from qspin.run_dir import RunDir
from qspin.watch.progress import Silent

pytestmark = ON_CUDA


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop", "paged_adamw_8bit"])
def test_a_run_goes_on_from_a_snapshot_of_each_optimiser(optimizer: str, tokenizer: Any, tmp_path: Path) -> None:
    """Weights are so large that bitsandbytes keeps their state in 8 bits, and in pages."""
    # SHAPE's range is for 64 features: of 1024, rounding would move logits by more than loading lets them be off
    shape = SHAPE | {"hidden_size": 1024, "intermediate_size": 1024, "initializer_range": 0.15 / 4}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**shape)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    whole, cut, again = (load(tmp_path / "base", "transformers", rank=128) for _ in range(3))
    assert max(parameter.numel() for parameter in whole.parameters.values()) > 1e5
    metrics = run(whole, descend(whole), tmp_path / "whole", optimizer=optimizer)
    with pytest.raises(KeyboardInterrupt):
        run(cut, cut_off(cut, 5, interrupt), tmp_path / "cut", optimizer=optimizer)
    assert steps_kept(tmp_path / "cut") == 5
    assert run(again, descend(again), tmp_path / "cut", optimizer=optimizer) == metrics
    assert same_bits(again.adapter(), whole.adapter())


# --- whole runs ---


@pytest.fixture(scope="module")
def prepared(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Prepared]:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n * 7}, I say."} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(backend: str, dtype: str = "auto") -> Prepared:
        settings: dict[str, Any] = {
            "model.id": str(tiny_folder("llama")),
            "model.backend": backend,
            "model.dtype": dtype,
            "data.source": str(path),
            "data.heldout_rows": 4,
            "generation.max_new_tokens": 10,
            "train.batch_size": 4,
            "train.lr": 0.02,
            "train.epochs": 4,
            "iterations": 2,
            "evaluation.stop": "never",
        }
        return prepare(load_config(None, settings), datetime.date(2026, 1, 1))

    return make


def play(prepared: Prepared, out: Path) -> RunDir:
    spin.run(prepared, out, Silent())
    return RunDir(out)


def adapter_bytes(run: RunDir) -> list[bytes]:
    return [(run.iteration(t).adapter / "adapter_model.safetensors").read_bytes() for t in (0, 1)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_and_its_resumption(backend: str, prepared: Callable[..., Prepared], tmp_path: Path) -> None:
    ready = prepared(backend)
    run = play(ready, tmp_path / "run")
    assert read_json(run.record)["backend"] == backend
    for iteration in (0, 1):
        first, *_, last = read_jsonl(run.iteration(iteration).metrics)
        assert (first["margin"], first["loss"]) == (0.0, pytest.approx(math.log(2), abs=1e-6))
        assert last["margin"] > 0
    whole = adapter_bytes(run)
    assert whole == adapter_bytes(play(ready, tmp_path / "again"))

    # what a run looks like that died after a shard of iteration 1 was generated
    half = RunDir(Path(shutil.copytree(run.path, tmp_path / "half")))
    last = half.iteration(1)
    for path in (last.adapter, last.evaluation, last.metrics, last.training_plan):
        remove(path)
    remove(last.scores(0).parent)
    assert whole == adapter_bytes(play(ready, half.path))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_as_without_bfloat16_and_flash(
    backend: str, prepared: Callable[..., Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "can_flash", lambda _query: False)
    played = play(prepared(backend, "float16"), tmp_path / "run")
    for iteration in (0, 1):
        first, *_, last = metrics = read_jsonl(played.iteration(iteration).metrics)
        assert (first["margin"], first["loss"]) == (0.0, pytest.approx(math.log(2), abs=1e-6))
        assert last["margin"] > 0
        scales = [row["loss_scale"] for row in metrics]
        assert scales == sorted(scales, reverse=True)
        assert all(math.log2(scale).is_integer() for scale in scales)
    assert adapter_bytes(played) == adapter_bytes(play(prepared(backend, "float16"), tmp_path / "again"))
