"""What a run was made with may lie elsewhere later, and is refused, or told of, where it is no longer the same."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import CHATML, small_run
from safetensors.torch import load_file, save_file

from qspin.config import load_config
from qspin.errors import QspinError
from qspin.files import read_json, write_json
from qspin.prepare import prepare
from qspin.run_dir import RunDir
from qspin.spin import run
from qspin.trials.loaded import Loaded
from qspin.watch.progress import Silent


@pytest.fixture
def own_base(played_run: RunDir, tiny_folder: Callable[[str], Path], tmp_path: Path) -> RunDir:
    """A run whose base is the folder beside it, and who began with the adapter beside that."""
    shutil.copytree(tiny_folder("llama"), tmp_path / "tiny-llama")
    shutil.copytree(played_run.iteration(0).adapter, tmp_path / "adapter")
    settings = small_run(tmp_path / "tiny-llama", tmp_path / "rows.jsonl", rows=18) | {"iterations": 1}
    settings["model.init_adapter"] = str(tmp_path / "adapter")
    run(prepare(load_config(None, settings), datetime.date(2026, 1, 2)), tmp_path / "run", Silent())
    return RunDir(tmp_path / "run")


# --- the base ---


def test_another_base_or_template_is_refused(played_run: RunDir, tmp_path: Path) -> None:
    copy = RunDir(tmp_path / "run")
    shutil.copytree(played_run.path, copy.path)
    record = read_json(copy.record)
    write_json(copy.record, record | {"inputs": record["inputs"] | {"chat.template": "another"}})
    with pytest.raises(QspinError, match=r"chat.template: its content is not what"):
        Loaded.open(copy)
    base = {key: value for key, value in record["base"].items() if key != "folder"} | {"hub": "owner/name"}
    write_json(copy.record, record | {"base": base})
    with pytest.raises(QspinError, match=r"was made with the hub's owner/name, and here .* is the folder"):
        Loaded.open(copy)


def test_a_base_whose_weights_have_changed_is_refused(own_base: RunDir, tmp_path: Path) -> None:
    heard: list[str] = []
    Loaded.open(own_base, "0", heard.append)
    weights = tmp_path / "tiny-llama" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] *= 2
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(
        QspinError, match=r"^model.id: the 4-bit weights of tiny-llama are not those .* bring the old ones"
    ):
        Loaded.open(own_base, "0", heard.append)
    assert heard == []


def test_a_base_that_something_else_quantised_is_told_of(own_base: RunDir) -> None:
    heard: list[str] = []
    record = read_json(own_base.record)
    assert torch.__version__.partition("+")[0] in record["quantised_by"]
    elsewhere = record | {"base_hash": "0" * 64, "quantised_by": "another card"}
    for found in (elsewhere, {key: value for key, value in elsewhere.items() if key != "quantised_by"}):
        write_json(own_base.record, found)
        Loaded.open(own_base, "0", heard.append)
    assert len(heard) == 2
    assert all(f"tiny-llama are not those that {own_base.path} began with (another device" in text for text in heard)
    write_json(own_base.record, record | {"quantised_by": "another card"})
    Loaded.open(own_base, "0", heard.append)  # it came to the same bytes
    assert len(heard) == 2


def test_a_base_in_a_folder_may_lie_elsewhere(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("llama", "qwen2"):
        shutil.copytree(tiny_folder(name), tmp_path / "models" / name)
    settings = small_run(Path("models/llama"), Path("rows.jsonl"), rows=18) | {"iterations": 1}
    made = RunDir(tmp_path / "run")

    def play(base: str) -> None:
        run(prepare(load_config(None, settings | {"model.id": base}), datetime.date(2026, 1, 2)), made.path, Silent())

    play("models/llama")
    monkeypatch.chdir("/")
    [before] = Loaded.open(made, "0").generate(["What is 3?"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "llama").rename(tmp_path / "moved")
    play("moved")
    monkeypatch.chdir("/")
    assert Loaded.open(made, "0").generate(["What is 3?"]) == [before]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QspinError, match=r"^model\.id: config\.json of qwen2 is not what .* if it is not llama,"):
        play("models/qwen2")
    weights = tmp_path / "moved" / "model.safetensors"
    tensors = {name: 2 * tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(
        QspinError, match=rf"^model\.id: the 4-bit weights of moved are not those that {made.path} began"
    ):
        play("moved")


# --- the adapter that a run began with ---


def test_the_adapter_that_a_run_began_with_must_be_the_same(own_base: RunDir, tmp_path: Path) -> None:
    loaded, weights = Loaded.open(own_base, "base"), tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {name: tensor * 2 for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    loaded.seat("0")
    with pytest.raises(QspinError, match=r"^model.init_adapter: its content is not what .* began with; bring it back$"):
        loaded.seat("base")


def test_the_adapter_that_a_run_began_with_may_lie_elsewhere(
    own_base: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small_run(tmp_path / "tiny-llama", tmp_path / "rows.jsonl", rows=18) | {"iterations": 1}

    def again(**adapter: str) -> None:
        config = load_config(None, settings | {f"model.{key}": value for key, value in adapter.items()})
        run(prepare(config, datetime.date(2026, 1, 2)), own_base.path, Silent())

    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter").rename(tmp_path / "moved")
    again(init_adapter="moved")
    monkeypatch.chdir("/")
    Loaded.open(own_base, "base")
    with pytest.raises(QspinError, match=r"^model.init_adapter: its content is not what .* began with"):
        again()
    with pytest.raises(QspinError, match=r"^model.init_adapter: its content is not what .* began with"):
        again(init_adapter=str(tmp_path / "run" / "iteration-0" / "adapter"))


# --- the template ---


def test_a_template_is_the_runs_own_whatever_becomes_of_its_file(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{# mine #}\n" + CHATML, encoding="utf-8-sig")
    settings = small_run(tiny_folder("llama"), tmp_path / "rows.jsonl", rows=18) | {"iterations": 1}
    settings["chat.template"] = str(template)
    made = RunDir(tmp_path / "run")
    run(prepare(load_config(None, settings), datetime.date(2026, 1, 2)), made.path, Silent())
    [before] = Loaded.open(made, "0").generate(["What is 3?"])
    template.unlink()
    made.path.rename(tmp_path / "moved")
    made = RunDir(tmp_path / "moved")
    assert Loaded.open(made, "0").generate(["What is 3?"]) == [before]
    template.write_bytes(made.template.read_bytes())
    run(prepare(load_config(None, settings), datetime.date(2026, 1, 2)), made.path, Silent())
    made.template.write_text("{# another #}" + CHATML)
    with pytest.raises(QspinError, match=r"^chat\.template: its content is not what .* began with; bring it back$"):
        Loaded.open(made, "0")
