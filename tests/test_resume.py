"""A run that is killed goes on, and ends in the same bytes as one that was left alone. Real processes, real kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROWS = 24
PHASES = {  # phase → what shows that it is under way: of snapshots the last two are kept, so that a later one does too
    "warm start": "warm-start/snapshots/step-00000[2-9]",
    "generate": "iteration-1/generated/shard-00001.jsonl",
    "score": "iteration-1/scores/shard-00001.jsonl",
    "train": "iteration-1/snapshots/step-00000[4-9]",
    "commit": "iteration-1/metrics.jsonl",
    "evaluate": "iteration-1/adapter",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"What is {n}?", "completion": f"It is {n * 7}."}) + "\n" for n in range(ROWS))
    )
    return path


def command(model: Path, data: Path, out: Path) -> list[str]:
    settings = {
        "iterations": 2,
        "sft.epochs": 1,
        "model.dtype": "bfloat16",
        "generation.max_new_tokens": 12,
        "generation.width": 3,
        "generation.shard_rows": 5,
        "train.batch_size": 4,
        "train.tokens_per_micro_batch": 64,
        "train.snapshot_minutes": 0,
        "train.lr": 0.01,
        "data.heldout_rows": 4,
    }
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return [
        sys.executable,
        "-m",
        "qspin.cli",
        "run",
        "--model",
        str(model),
        "--data",
        str(data),
        "--out",
        str(out),
        *options,
    ]


# one thread: two would wait for each other more than they compute, and much longer on a busy machine
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def final_bytes(out: Path) -> dict[str, bytes]:
    return {
        name: (out / name).read_bytes()
        for folder in ("warm-start", "iteration-0", "iteration-1")
        for name in (
            f"{folder}/adapter/adapter_model.safetensors",
            f"{folder}/adapter/adapter_config.json",
            f"{folder}/metrics.jsonl",
        )
    }


def kill_when(appears: str, out: Path, run: list[str]) -> None:
    """Start the run, and kill it as soon as a path, or one like it, is in its folder."""
    process = subprocess.Popen(
        run, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True, env=ENVIRONMENT
    )
    deadline = time.monotonic() + 120
    while not any(out.glob(appears)):
        assert process.poll() is None, f"ended before {appears}: {process.communicate()[1].decode()}"
        assert time.monotonic() < deadline, f"{appears} never came"
        time.sleep(0.0005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_killed_in_every_phase_it_ends_in_the_same_bytes(
    tiny_folder: Callable[[str], Path], data: Path, tmp_path: Path
) -> None:
    model = tiny_folder("llama")
    subprocess.run(command(model, data, tmp_path / "whole"), check=True, capture_output=True, env=ENVIRONMENT)
    expected = final_bytes(tmp_path / "whole")

    run = command(model, data, tmp_path / "killed")
    for phase, sign in PHASES.items():
        kill_when(sign, tmp_path / "killed", run)
        assert not (tmp_path / "killed" / "iteration-1" / "evaluation.json").exists(), f"{phase}: killed too late"
    subprocess.run(run, check=True, capture_output=True, env=ENVIRONMENT)
    assert final_bytes(tmp_path / "killed") == expected

    # the comparison can fail: another seed ends in other bytes
    subprocess.run(
        [*command(model, data, tmp_path / "other"), "--seed", "1"], check=True, capture_output=True, env=ENVIRONMENT
    )
    assert final_bytes(tmp_path / "other") != expected
