"""A disk that is too small is refused before the work, in numbers; one that fills up stops it and spoils nothing."""

from __future__ import annotations

import datetime
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import Played, contents

from qspin import spin
from qspin.config import load_config
from qspin.errors import QspinError
from qspin.phases.damage import take_away_damaged
from qspin.phases.room import SMALL, check_room, room
from qspin.prepare import Prepared, prepare
from qspin.run_dir import RunDir
from qspin.watch.progress import Silent

ROWS = 24


@pytest.fixture(scope="module")
def prepared(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n * 7}."} for n in range(ROWS)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {
        "model.id": str(tiny_folder("llama")),
        "model.dtype": "float32",
        "data.source": str(data),
        "data.heldout_rows": 4,
        "generation.max_new_tokens": 32,
        "generation.width": 8,
        "train.batch_size": 4,
        "train.tokens_per_micro_batch": 512,
        "train.snapshot_minutes": 0,
        "sft.epochs": 1,
        "iterations": 2,
    }
    return prepare(load_config(None, settings), datetime.date(2026, 1, 1))


class Largest(Silent):
    """The most bytes that a folder held at the end of any step."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bytes = folder, 0

    def advance(self, units: float, **figures: float) -> None:  # noqa: ARG002
        held = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        self.bytes = max(self.bytes, held)


def adapter_bytes(out: Path) -> int:
    return (RunDir(out).iteration(0).adapter / "adapter_model.safetensors").stat().st_size


def test_the_estimate_covers_what_a_run_writes_and_not_much_more(prepared: Prepared, tmp_path: Path) -> None:
    out = tmp_path / "run"
    largest = Largest(out)
    spin.run(prepared, out, largest)
    written = adapter_bytes(out)
    estimate = room(prepared, RunDir(tmp_path / "new"), written) - SMALL
    assert largest.bytes > 5 * written  # snapshots were there
    assert 0.9 * largest.bytes < estimate + SMALL
    assert estimate < 2 * largest.bytes
    assert room(prepared, RunDir(out), written) == 0, "it is over"
    RunDir(out).iteration(1).evaluation.unlink()
    assert room(prepared, RunDir(out), written) == SMALL, "an evaluation is to be made"


def test_a_run_too_large_for_the_disk_is_refused_in_numbers(prepared: Prepared, tmp_path: Path) -> None:
    adapter = 1 << 60  # no disk has room for it
    need = room(prepared, RunDir(tmp_path / "run"), adapter)
    with pytest.raises(QspinError) as caught:
        check_room(prepared, RunDir(tmp_path / "run"), adapter)
    assert re.fullmatch(
        rf"--out: {need:,} bytes are to be written to {tmp_path}/run and [\d,]+ are free there; "
        "free some space, or choose another --out",
        str(caught.value),
    )
    check_room(prepared, RunDir(tmp_path / "run"), 1 << 10)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(disk)], capture_output=True, check=False
        )
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if mounted.returncode:
        pytest.skip(f"a small file system can't be mounted: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_finished_run_is_started_again_on_a_full_disk(played: Played, small_disk: Path) -> None:
    """Nothing is to be written; a table of fewer players that can't be is not taken for the run's."""
    run = RunDir(played.copy(small_disk / "run"))
    before = contents(run.path)
    fill(small_disk)
    answer = played.again(out=run.path)
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.splitlines()[-1] == f"adapter: {run.iteration(1).adapter}   table: {run.summary}"
    assert contents(run.path) == before
    run.summary.write_text("one player\n")
    fill(small_disk)
    answer = played.again(out=run.path)
    assert (answer.code, answer.err) == (0, "")
    assert f"note: the table is not written: {run.summary}: the disk is full: " in answer.out
    assert answer.out.splitlines()[-1] == f"adapter: {run.iteration(1).adapter}"


def fill(disk: Path) -> None:
    """To its last byte."""
    with (disk / "ballast").open("ab", buffering=0) as ballast:
        ballast.write(bytes(shutil.disk_usage(disk).free))
    assert shutil.disk_usage(disk).free == 0


def test_a_real_disk_that_is_full(prepared: Prepared, small_disk: Path, tmp_path: Path) -> None:
    """Refused before; and where others fill it meanwhile, stopped with what it had, and gone on with."""
    spin.run(prepared, tmp_path / "expected", Silent())
    out = small_disk / "run"
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(3 << 20))
    with pytest.raises(QspinError, match=r"^--out: [\d,]+ bytes are to be written to .* and [\d,]+ are free there; "):
        spin.run(prepared, out, Silent())
    ballast.unlink()

    class Filling(Silent):
        """Leaves too little room for the next snapshot of iteration 1, once it trains."""

        def phase(self, name: str, *, iteration: int | None, **_: object) -> None:
            if (name, iteration) == ("train", 1):
                ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 200_000))

    with pytest.raises(QspinError) as caught:
        spin.run(prepared, out, Filling())
    assert re.fullmatch(
        rf"{out}/iteration-1/snapshots/step-\d+: the disk is full: [\d,]+ bytes are to be written there and [\d,]+ "
        "are free; free some space, and the same command goes on",
        str(caught.value),
    )
    assert take_away_damaged(RunDir(out)) == []
    assert RunDir(out).iteration(0).done
    ballast.unlink()
    spin.run(prepared, out, Silent())
    for name in ("warm-start", "iteration-0", "iteration-1"):
        weights = f"{name}/adapter/adapter_model.safetensors"
        assert (out / weights).read_bytes() == (tmp_path / "expected" / weights).read_bytes()
