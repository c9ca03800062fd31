"""A run goes on as what it began as: with its base's commit, the same tokens and ends, and a word on other versions."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from conftest import Notes, small_run

from qspin.base import find_base
from qspin.config import load_config
from qspin.errors import QspinError
from qspin.files import read_json, write_json
from qspin.record import check_rows, prepare_run
from qspin.run_dir import RunDir
from qspin.spin import run
from qspin.trials.loaded import Loaded
from qspin.watch.progress import Silent


def test_a_run_goes_on_with_the_commit_it_began_with(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's cache, with a branch that moves between two starts of a run."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--some--base"
    for commit, architecture in (("a" * 40, "llama"), ("b" * 40, "qwen2")):
        shutil.copytree(tiny_folder(architecture), repository / "snapshots" / commit)
    branch = repository / "refs" / "main"
    branch.parent.mkdir()
    branch.write_text("a" * 40)
    settings = small_run(tmp_path, tmp_path / "rows.jsonl", rows=18) | {"model.id": "some/base", "iterations": 1}
    run_dir = RunDir(tmp_path / "run")
    run(prepare_run(load_config(None, settings), run_dir, keep_rejects=True), run_dir.path, Silent())
    adapter = (run_dir.iteration(0).adapter / "adapter_model.safetensors").read_bytes()

    branch.write_text("b" * 40)
    assert find_base(load_config(None, settings).model).revision == "b" * 40
    again = prepare_run(load_config(None, settings | {"iterations": 2}), run_dir, keep_rejects=True)
    assert again.base.revision == "a" * 40
    run(again, run_dir.path, Silent())
    assert run_dir.iteration(1).done
    assert (run_dir.iteration(0).adapter / "adapter_model.safetensors").read_bytes() == adapter
    assert Loaded.open(run_dir).speech.base.revision == "a" * 40


def test_a_base_whose_answers_end_otherwise_is_refused(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_folder("llama"), model)
    config = load_config(None, small_run(model, tmp_path / "rows.jsonl", rows=18) | {"iterations": 1})
    run_dir = RunDir(tmp_path / "run")
    run(prepare_run(config, run_dir, keep_rejects=True), run_dir.path, Silent())
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    with pytest.raises(QspinError, match=r"end in other tokens than when .* began \(stop_ids: \[2\] -> \[2, 7\]\)"):
        run(prepare_run(config, run_dir, keep_rejects=True), run_dir.path, Silent())


def test_other_versions_are_told(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    settings = small_run(tiny_folder("llama"), tmp_path / "rows.jsonl", rows=18) | {"iterations": 1}
    run_dir, heard = RunDir(tmp_path / "run"), Notes()

    def play() -> list[str]:
        heard.notes.clear()
        run(prepare_run(load_config(None, settings), run_dir, keep_rejects=True), run_dir.path, heard)
        return [note for note in heard.notes if "versions" in note]

    assert play() == play() == []
    record = read_json(run_dir.record)
    write_json(run_dir.record, record | {"versions": record["versions"] | {"torch": "2.0.0", "python": "3.11.0"}})
    assert play() == [
        f"other versions than when this run began (torch 2.0.0 -> {importlib.metadata.version('torch')}): what is made "
        "from here on may round otherwise"
    ]


def test_a_base_that_reads_the_rows_otherwise_is_refused(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_folder("llama"), model)
    settings = small_run(model, tmp_path / "rows.jsonl", rows=18) | {"iterations": 1}
    run_dir = RunDir(tmp_path / "run")
    run(prepare_run(load_config(None, settings), run_dir, keep_rejects=True), run_dir.path, Silent())
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    old = dict(tokenizer["model"])
    tokenizer["model"]["merges"] = old["merges"][:100]  # the same vocabulary, put together otherwise
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    longer = load_config(None, settings | {"iterations": 2})
    other = prepare_run(longer, run_dir, keep_rejects=True)
    for work in (lambda: run(other, run_dir.path, Silent()), lambda: check_rows(run_dir, other)):
        with pytest.raises(QspinError, match=r"model\.id: the rows are other tokens than when .* began"):
            work()

    (model / "tokenizer.json").write_text(json.dumps(tokenizer | {"model": old}))
    run(prepare_run(longer, run_dir, keep_rejects=True), run_dir.path, Silent())
    assert run_dir.iteration(1).done
