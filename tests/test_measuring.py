"""A run that ends early, for real: where it ends, how it is shown, and that a stop in between changes nothing."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qspin import spin
from qspin.config import load_config
from qspin.files import read_json
from qspin.prepare import Prepared, prepare
from qspin.run_dir import RunDir
from qspin.watch.progress import Silent
from qspin.watch.status import look

WORSE = 60  # held-out rows: 30 to choose by


@pytest.fixture(scope="module")
def settings(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A warm start learns the answers, and a step far too large unlearns them."""
    folder = tmp_path_factory.mktemp("data")
    for name, numbers in (("train", range(12)), ("heldout", range(100, 100 + WORSE))):
        rows = [{"prompt": f"What is {number}?", "completion": f"It is {7 * number}."} for number in numbers]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "model.id": str(tiny_folder("llama")),
        "model.dtype": "float32",
        "lora.rank": 2,
        "data.source": str(folder / "train.jsonl"),
        "data.heldout_source": str(folder / "heldout.jsonl"),
        "generation.max_new_tokens": 4,
        "generation.width": 16,
        "train.batch_size": 12,
        "train.epochs": 1,
        "train.lr": 1.0,
        "sft.epochs": 10,
        "sft.lr": 0.01,
        "train.tokens_per_micro_batch": 1024,
        "iterations": 3,
    }


def prepared(settings: dict[str, Any], **changes: Any) -> Prepared:
    return prepare(load_config(None, {**settings, **changes}), datetime.date(2026, 1, 1))


@pytest.fixture(scope="module")
def ended(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    out = tmp_path_factory.mktemp("run") / "run"
    spin.run(prepared(settings), out, Silent())
    return RunDir(out)


def test_a_step_back_ends_the_run_and_is_finished(ended: RunDir) -> None:
    assert ended.iteration(0).done
    assert not ended.iteration(1).path.exists()
    concluded = read_json(ended.verdict)
    assert (concluded["stop"], concluded["iterations"], concluded["kept"]) == ("worse", 1, 0)
    assert "The run ends here" in concluded["sentences"][-1]
    assert concluded["sentences"][-1] in ended.summary.read_text()
    standing = look(ended)
    assert (standing.state, standing.iterations_done, standing.kept) == ("finished", 1, 0)


def test_started_again_it_has_ended(settings: dict[str, Any], ended: RunDir, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(ended.path, out)
    spin.run(prepared(settings), out, Silent())
    assert not RunDir(out).iteration(1).path.exists()


def test_one_that_was_stopped_ends_where_it_would_have(settings: dict[str, Any], ended: RunDir, tmp_path: Path) -> None:
    """Nothing but the evaluations has a say, so what a killed process had not written yet changes nothing."""
    out = RunDir(tmp_path / "run")
    shutil.copytree(ended.path, out.path)
    out.verdict.unlink()
    out.summary.unlink()
    out.iteration(0).evaluation.unlink()
    spin.run(prepared(settings), out.path, Silent())
    assert out.iteration(0).evaluation.read_bytes() == ended.iteration(0).evaluation.read_bytes()
    assert out.verdict.read_bytes() == ended.verdict.read_bytes()
    assert not out.iteration(1).path.exists()


def test_it_goes_on_if_asked_to(settings: dict[str, Any], ended: RunDir, tmp_path: Path) -> None:
    out = RunDir(tmp_path / "run")
    shutil.copytree(ended.path, out.path)
    spin.run(prepared(settings, **{"evaluation.stop": "never", "iterations": 2}), out.path, Silent())
    assert out.iteration(1).done
    assert look(out).state == "finished"
