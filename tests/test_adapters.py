"""Adapters from elsewhere: what is wrong with one is told in a line, before anything is computed with it."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Played, call
from conftest import as_nobody
from safetensors.torch import load_file, save_file

from qspin.adapters import check_config, check_folder_named, load_adapter
from qspin.config import LoraConfig
from qspin.errors import NoPermission, QspinError
from qspin.exports.merge import Merged
from qspin.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_plain_json, write_plain_json
from qspin.model import SlotModel
from qspin.run_dir import RunDir

LORA = LoraConfig(rank=4, alpha=8)
FIRST = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"


@pytest.fixture
def adapter(tiny_model: Callable[..., SlotModel], tmp_path: Path) -> Path:
    """A good one."""
    (tmp_path / "adapter").mkdir()
    tiny_model("qwen2", moved=True).save_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


def header(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    found: dict[str, Any] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return found


def with_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = path.read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    entries = header(path)
    text = json.dumps(entries if (made := change(entries)) is None else made).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def overlap(entries: dict[str, Any]) -> None:
    first, second = [name for name in entries if name != "__metadata__"][:2]
    entries[second]["data_offsets"] = entries[first]["data_offsets"]


def backwards(entries: dict[str, Any]) -> None:
    entries[FIRST]["data_offsets"].reverse()


def larger(entries: dict[str, Any]) -> None:
    entries[FIRST]["shape"][0] += 1


def negative(entries: dict[str, Any]) -> None:
    entries[FIRST]["shape"] = [-entries[FIRST]["shape"][0], -entries[FIRST]["shape"][1]]


def beyond(entries: dict[str, Any]) -> None:
    for entry in entries.values():
        if "data_offsets" in entry:
            entry["data_offsets"] = [offset + 2**40 for offset in entry["data_offsets"]]


class Bomb:
    """Runs code if it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.write_text, (Path("exploded"), "")


BROKEN: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "bytes behind": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "a header beyond the file": lambda path: path.write_bytes(struct.pack("<Q", 2**63) + path.read_bytes()[8:]),
    "a header of 101 MB": lambda path: path.write_bytes(struct.pack("<Q", 101_000_000) + b" " * 101_000_000),
    "a header of brackets": lambda path: path.write_bytes(struct.pack("<Q", 10**5) + b"[" * 10**5),
    "a header that is a list": lambda path: with_header(path, lambda _: []),
    "offsets that overlap": lambda path: with_header(path, overlap),
    "offsets backwards": lambda path: with_header(path, backwards),
    "offsets beyond the file": lambda path: with_header(path, beyond),
    "another shape than its bytes": lambda path: with_header(path, larger),
    "a negative shape": lambda path: with_header(path, negative),
    "a pickle": lambda path: path.write_bytes(pickle.dumps({FIRST: Bomb()})),
    "torch.save": lambda path: torch.save({FIRST: torch.ones(4, 128)}, path),
    "a text": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_file_is_named(
    how: str, adapter: Path, tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By both who read it: the slot, and merging, which has a reader of its own."""
    monkeypatch.chdir(tmp_path)
    path = adapter / ADAPTER_WEIGHTS
    BROKEN[how](path)
    for read in (lambda: load_adapter(adapter), lambda: Merged(tiny_folder("qwen2"), adapter)):
        with pytest.raises(QspinError) as caught:
            read()
        said = str(caught.value)
        assert said.startswith(f"{path}: not a readable safetensors file (")
        assert said.isprintable()
        assert len(said) < len(str(path)) + 300
    assert not Path("exploded").exists()


def test_no_file_and_a_pickle_in_its_place(adapter: Path) -> None:
    (adapter / ADAPTER_WEIGHTS).unlink()
    with pytest.raises(QspinError, match=r"holds no adapter_model\.safetensors: name a folder written by PEFT"):
        load_adapter(adapter)
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(QspinError, match=r"holds adapter_model\.bin, a pickle, which can run code as it is loaded"):
        load_adapter(adapter)


def test_of_a_run_the_newest_adapter_is_named(adapter: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    check_folder_named(run.path)  # which has none to name
    for part in (run.warm_start, *map(run.iteration, range(11))):  # by names, 10 would come before 2
        shutil.copytree(adapter, part.adapter)
        write_plain_json(part.evaluation, {})
        for folder in (run.path, part.path):
            with pytest.raises(QspinError) as caught:
                check_folder_named(folder)
            said = f"holds no adapter_model.safetensors; the newest adapter below it is {part.adapter}"
            assert str(caught.value) == f"model.init_adapter: {folder} {said}"
        check_folder_named(part.adapter)


def test_a_path_that_is_no_folder_is_not_said_to_lack_weights(adapter: Path) -> None:
    weights, nothing = adapter / ADAPTER_WEIGHTS, adapter / "some" / "adapter"
    for path, said in {
        weights: f"{weights} is a file; name the folder of an adapter",
        nothing: f"{nothing}: no such folder; check the path, or fetch it from the hub (hf download)",
    }.items():
        with pytest.raises(QspinError) as caught:
            check_folder_named(path)
        assert str(caught.value) == f"model.init_adapter: {said}"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_no_numbers(value: float, dtype: torch.dtype, adapter: Path) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in load_file(adapter / ADAPTER_WEIGHTS).items()}
    save_file(weights, adapter / ADAPTER_WEIGHTS)
    assert load_adapter(adapter)[FIRST].dtype == torch.float32
    weights[FIRST][1, 2] = value
    save_file(weights, adapter / ADAPTER_WEIGHTS)
    with pytest.raises(QspinError, match=rf"1 weights hold NaN or infinity, the first {re.escape(FIRST)}; train it"):
        load_adapter(adapter)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 8}, "r is 8, lora.rank is 4; set lora.rank to the adapter's"),
        ({"r": "4"}, "r is '4', lora.rank is 4"),
        ({"lora_alpha": 16}, "lora_alpha is 16, lora.alpha is 8; set lora.alpha to the adapter's"),
        ({"use_dora": True}, "use_dora is set; qspin plays plain LoRA"),
        ({"use_rslora": True}, "use_rslora is set; qspin plays plain LoRA"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is set"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens is set"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4', so it belongs to a base that"),
        (
            {"init_lora_weights": "olora"},
            "init_lora_weights is 'olora', so it belongs to a base that was changed; save",
        ),
        ({"bias": "all"}, "bias is set"),
        ({"peft_type": "IA3"}, "is not the configuration of a LoRA adapter"),
        ({"base_model_name_or_path": "other/base"}, "names the base 'other/base', model.id is me/tiny-qwen2; take"),
        ({"base_model_name_or_path": 7}, "names the base 7, model.id is me/tiny-qwen2"),
        ({"base_model_name_or_path": "x" * 10**6}, "names the base 'xxx"),
    ],
)
def test_an_adapter_of_other_settings_is_refused(changes: dict[str, Any], said: str, adapter: Path) -> None:
    """The weights alone may fit: another alpha has the same names and shapes."""
    check_config(adapter, "me/tiny-qwen2", LORA)
    path = adapter / ADAPTER_CONFIG
    write_plain_json(path, read_plain_json(path) | changes)
    with pytest.raises(QspinError, match=re.escape(said)) as caught:
        check_config(adapter, "me/tiny-qwen2", LORA)
    assert str(caught.value).startswith("model.init_adapter: ")
    assert len(str(caught.value)) < len(str(path)) + 400


def test_an_adapter_without_its_configuration_is_refused(adapter: Path) -> None:
    (adapter / ADAPTER_CONFIG).unlink()
    with pytest.raises(
        QspinError, match=r"^model\.init_adapter: .* holds no adapter_config\.json; name a folder saved"
    ):
        check_config(adapter, "me/tiny-qwen2", LORA)


@pytest.mark.parametrize("name", ["tiny-qwen2", "/home/them/Tiny-Qwen2/", "C:\\models\\tiny-qwen2", "", None])
def test_a_base_is_known_by_the_end_of_its_name(name: str | None, adapter: Path) -> None:
    path = adapter / ADAPTER_CONFIG
    write_plain_json(path, read_plain_json(path) | {"base_model_name_or_path": name})
    check_config(adapter, "me/tiny-qwen2", LORA)


@pytest.mark.parametrize("content", ["", "[", "[" * 10**5, "[]", "null", "\ud800"])
def test_a_configuration_that_is_none(content: str, adapter: Path) -> None:
    (adapter / ADAPTER_CONFIG).write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(QspinError, match=r"adapter_config\.json"):
        check_config(adapter, "me/tiny-qwen2", LORA)


def test_the_command_says_it_in_a_line_and_writes_nothing(
    adapter: Path, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    rows = "".join(json.dumps({"prompt": f"{n}?", "completion": f"{n}!"}) + "\n" for n in range(40))
    (tmp_path / "rows.jsonl").write_text(rows)
    settings = ("lora.rank=4", "lora.alpha=8", "data.heldout_rows=4", "model.dtype=float32")
    options = [part for setting in settings for part in ("--set", setting)]
    for name, change in {
        "NaN": lambda path: save_file(load_file(path) | {FIRST: torch.full((4, 128), torch.nan)}, path),
        "of another shape": lambda path: save_file(load_file(path) | {FIRST: torch.ones(4, 64)}, path),
        "of another rank": lambda path: write_plain_json(
            path.with_name(ADAPTER_CONFIG), read_plain_json(path.with_name(ADAPTER_CONFIG)) | {"r": 8}
        ),
        "torch.save": BROKEN["torch.save"],
    }.items():
        copy = Path(shutil.copytree(adapter, tmp_path / name))
        change(copy / ADAPTER_WEIGHTS)
        command = ("run", "--model", tiny_folder("qwen2"), "--data", tmp_path / "rows.jsonl", "--init-adapter", copy)
        answer = call(*command, "--out", tmp_path / f"run {name}", *options)
        assert answer.code == 1
        assert answer.err.startswith("error: "), name
        assert answer.err.count("\n") == 1
        if name != "of another shape":  # which is seen when the slot is there
            assert not (tmp_path / f"run {name}").exists()


def test_the_command_points_from_a_run_to_its_adapter(played: Played, tmp_path: Path) -> None:
    answer = played.again("--init-adapter", played.out, out=tmp_path / "new")
    newest = played.out / "iteration-1" / "adapter"
    said = f"{played.out} holds no adapter_model.safetensors; the newest adapter below it is {newest}"
    assert (answer.code, answer.err) == (1, f"error: model.init_adapter: {said}\n")


def test_one_that_may_not_be_read_is_told_from_one_that_is_not_there(adapter: Path, closed: Path) -> None:
    folder = shutil.copytree(adapter, closed.parent / "adapter")
    folder.chmod(0o755)
    weights = folder / ADAPTER_WEIGHTS
    weights.chmod(0)
    for path in (weights, closed / ADAPTER_WEIGHTS):
        with as_nobody(), pytest.raises(NoPermission) as caught:
            load_adapter(path.parent)
        assert str(caught.value) == f"{path}: no permission to read or write it, or to look into a folder above it"
