"""A long run grows by nothing: memory, open files and disk per row stay flat."""

from __future__ import annotations

import datetime
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import transformers
from conftest import SHAPE

from qspin import spin
from qspin.config import load_config
from qspin.fitting.memory import keep_freed_memory
from qspin.prepare import prepare
from qspin.run_dir import RunDir
from qspin.watch.progress import Silent

ROWS, ITERATIONS = 2000, 3
SECONDS_APART = 1.0
# per 1,000 units of work of a phase in its second half, where nothing should be new
MOST_BYTES = 1 << 20
MOST_FILES = 1.0


class Watching(Silent):
    """Memory of its own (USS) and open files of this process, by phase: (units done, bytes, files)."""

    def __init__(self) -> None:
        self.phases: dict[str, list[tuple[float, int, int]]] = {}
        self.totals: dict[str, int] = {}
        self.process = psutil.Process()
        self.name, self.done, self.looked = "", 0.0, 0.0

    def phase(self, name: str, *, iteration: int | None, total: int, done: int, **_: object) -> None:
        self.name, self.done = f"{name} {iteration}", float(done)
        self.phases[self.name], self.totals[self.name] = [], total

    def advance(self, units: float, **figures: float) -> None:  # noqa: ARG002
        self.done += units
        if time.monotonic() - self.looked >= SECONDS_APART:
            self.looked = time.monotonic()
            self.phases[self.name].append((self.done, self.process.memory_full_info().uss, self.process.num_fds()))


def slope(points: list[tuple[float, float]]) -> float:
    """Least squares, per 1,000 units."""
    units, values = np.array(points).T
    return float(1000 * np.polyfit(units, values, 1)[0])


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.nightly
@pytest.mark.skipif(sys.platform != "linux", reason="USS and descriptors are read from /proc")
def test_2000_rows_and_3_iterations(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    torch.manual_seed(1)
    shape = SHAPE | {"intermediate_size": 64, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**shape, tie_word_embeddings=True)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(model)
    transformers.AutoTokenizer.from_pretrained(tiny_folder("llama")).save_pretrained(model)
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n * 7}, I say."} for n in range(ROWS + 64)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model.id": str(model),
        "model.dtype": "float32",
        "data.source": str(data),
        "generation.max_new_tokens": 16,
        "generation.width": 64,
        "train.batch_size": 16,
        "train.epochs": 1,
        "train.tokens_per_micro_batch": 1024,
        "train.snapshot_minutes": 0.1,
        "iterations": ITERATIONS,
    }
    prepared = prepare(load_config(None, settings), datetime.date(2026, 1, 1))
    assert len(prepared.train) == ROWS
    keep_freed_memory()
    watching, started = Watching(), time.monotonic()
    spin.run(prepared, tmp_path / "run", watching)

    report = [f"soak: {time.monotonic() - started:.0f} s"]
    for name, points in watching.phases.items():
        later = [point for point in points if point[0] > watching.totals[name] / 2]
        if len(later) < 10:  # too short to say anything
            continue
        memory = slope([(done, uss) for done, uss, _ in later])
        files = slope([(done, count) for done, _, count in later])
        report.append(
            f"{name}: {len(later)} looks, {later[-1][1] / 2**20:.0f} MiB, {memory / 2**10:+.1f} KiB and "
            f"{files:+.2f} files per 1,000 units"
        )
        assert memory < MOST_BYTES, report[-1]
        assert files < MOST_FILES, report[-1]
    assert len(report) > 3, "too few phases were long enough to look at"
    ends = {name: points[-1] for name, points in watching.phases.items() if points}
    trainings = [ends[f"train {iteration}"] for iteration in range(ITERATIONS)]
    # iteration 2 has as many pairs as iteration 1, and should need no more
    report.append(f"at the end of each training: {[f'{uss / 2**20:.0f} MiB, {files}' for _, uss, files in trainings]}")
    assert trainings[2][1] - trainings[1][1] < 32 * MOST_BYTES
    assert trainings[2][2] <= trainings[1][2]
    sizes = [bytes_of(RunDir(tmp_path / "run").iteration(index).path) / ROWS for index in range(ITERATIONS)]
    report.append(f"disk, bytes a row: {[round(size) for size in sizes]}")
    assert sizes[2] < 1.02 * sizes[1]
    sys.stderr.write("\n".join([*report, ""]))
