"""Weights and states are safetensors: a run neither reads nor writes a pickle, which could run anybody's code."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qspin.base import find_base
from qspin.config import load_config
from qspin.errors import QspinError
from qspin.model import SlotModel

# Plays a run; whatever unpickles a class, or saves and loads with torch, is written down. `datasets` names its caches
# by pickling what it is given, into memory: that is no file, and nothing is read back.
RUN = """
import builtins, datetime, json, sys
from pathlib import Path
reached = []
import torch
for name in ("load", "save"):
    setattr(torch, name, lambda *a, name=name, **k: reached.append(f"torch.{name}"))
sys.addaudithook(lambda event, args: reached.append(f"{event} {args}") if event == "pickle.find_class" else None)

from qspin.watch.progress import Silent
from qspin import spin
from qspin.config import load_config
from qspin.prepare import prepare

model, data, out, optimizer = sys.argv[1:]

class Looking(Silent):
    seen = set()
    def advance(self, units, **figures):
        for path in Path(out).rglob("*"):
            if path.is_file() and path not in self.seen:
                self.seen.add(path)
                start = path.read_bytes()[:4]
                if start[:2] == b"PK" or start[:1] == b"\\x80" or path.suffix in {".pt", ".pth", ".bin", ".pkl"}:
                    reached.append(f"{path} is a pickle")

settings = {"model.id": model, "data.source": data, "data.heldout_rows": 2, "generation.max_new_tokens": 4,
            "train.snapshot_minutes": 0, "train.batch_size": 4, "iterations": 1, "train.optimizer": optimizer}
looking = Looking()
spin.run(prepare(load_config(None, settings), datetime.date(2026, 1, 1)), Path(out), looking)
assert any(path.name == "state.safetensors" for path in looking.seen), "no snapshot was looked at"
CONTROL
print(json.dumps(reached))
"""
CONTROLS = {
    "": "",
    "torch.load": "torch.load('x')",
    "torch.save": "torch.save({}, 'x')",
    "pickle.find_class": "import pickle; pickle.loads(pickle.dumps(Path('x')))",
    "is a pickle": "(Path(out) / 'x.json').write_bytes(b'\\x80\\x04'); looking.advance(0)",
}


def reached(model: Path, folder: Path, control: str = "", optimizer: str = "adamw") -> list[str]:
    data = folder / "rows.jsonl"
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n * 7}."} for n in range(10)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-c", RUN.replace("CONTROL", control), str(model), str(data), str(folder / "run")]
    done = subprocess.run([*command, optimizer], capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("rmsprop", marks=pytest.mark.nightly)])
def test_a_run_reaches_no_pickle(optimizer: str, tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    assert reached(tiny_folder("llama"), tmp_path, optimizer=optimizer) == []


def test_control_each_way_to_a_pickle_is_seen(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    found = reached(tiny_folder("llama"), tmp_path, control="; ".join(CONTROLS[name] for name in CONTROLS if name))
    for name in CONTROLS:
        assert any(name in line for line in found), name


def test_a_base_that_is_a_pickle_is_refused(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_folder("llama"), tmp_path / "model"))
    [weights] = folder.glob("*.safetensors")
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    config = load_config(None, {"model.id": str(folder)})
    with pytest.raises(QspinError, match=r"^model\.id: .* can't be loaded: .*model\.safetensors"):
        SlotModel.load(find_base(config.model), config.model, config.lora, seed=0, device=torch.device("cpu"))
