"""What a tracker holds after a run, after one that was stopped, and what is said where there is none."""

from __future__ import annotations

import contextlib
import datetime
import importlib.machinery
import importlib.util
import json
import sqlite3
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qspin import spin
from qspin.config import load_config
from qspin.errors import QspinError
from qspin.figures.evaluation import read_evaluation, values
from qspin.files import read_jsonl
from qspin.prepare import Prepared, prepare
from qspin.run_dir import RunDir
from qspin.watch.progress import Audience, TrackerName
from qspin.watch.track import Tracker, check

ROWS, ITERATIONS = 20, 2


@pytest.fixture
def prepared(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Callable[..., Prepared]:
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n * 7}, I say."} for n in range(ROWS)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(**changes: Any) -> Prepared:
        settings: dict[str, Any] = {
            "model.id": str(tiny_folder("llama")),
            "model.dtype": "float32",
            "data.source": str(data),
            "data.heldout_rows": 4,
            "generation.max_new_tokens": 8,
            "generation.width": 8,
            "train.batch_size": 4,
            "train.lr": 0.003,
            "evaluation.style": "(?s).*",
            "iterations": ITERATIONS,
        }
        return prepare(load_config(None, settings | changes), datetime.date(2026, 1, 1))

    return make


class Stop:
    """Stops a run at a step of an iteration, as Ctrl-C does."""

    def __init__(self, iteration: int | None, step: int) -> None:
        self.at = (iteration, step)
        self.iteration: int | None = None

    def phase(self, name: str, *, iteration: int | None, **_: object) -> None:  # noqa: ARG002
        self.iteration = iteration

    def advance(self, units: float, **figures: float) -> None:  # noqa: ARG002
        if (self.iteration, figures.get("step")) == self.at:
            raise KeyboardInterrupt

    def sampled(self, prompt: str, completion: str) -> None: ...
    def note(self, text: str) -> None: ...


def play(prepared: Prepared, out: Path, stop: Stop | None = None, name: TrackerName = "tensorboard") -> RunDir:
    run_dir = RunDir(out)
    check(name)
    with Tracker(name, run_dir, prepared.config) as tracker:
        spin.run(prepared, out, Audience(tracker, *([stop] if stop else [])))
    return run_dir


Scalars = dict[str, list[tuple[int, float]]]  # by tag: (step, value)


def tensorboard(run_dir: RunDir) -> Scalars:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir.path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def wandb(run_dir: RunDir) -> Scalars:
    """From the last file that wandb kept offline: a LevelDB log, 7 bytes in, of protobuf records."""
    from wandb import teardown
    from wandb.proto.wandb_internal_pb2 import Record

    teardown()  # its process writes on for a moment
    content = max(run_dir.path.glob("wandb/offline-run-*/*.wandb")).read_bytes()
    found: Scalars = {}
    at, record = 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768  # of the block
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", content[at : at + 7])
        part, at = content[at + 7 : at + 7 + size], at + 7 + size
        record = part if kind in {1, 2} else record + part  # whole or first; middle or last
        if kind in {1, 4} and (parsed := Record.FromString(record)).WhichOneof("record_type") == "history":
            for item in parsed.history.item:
                if not (name := item.key or "/".join(item.nested_key)).startswith("_"):
                    found.setdefault(name, []).append((parsed.history.step.num, json.loads(item.value_json)))
    return found


def trackio(run_dir: RunDir) -> Scalars:
    """All that the project of this machine holds."""
    found: Scalars = {}
    with contextlib.closing(sqlite3.connect(run_dir.path.parent / "trackio" / "qspin.db")) as project:
        for step, metrics in project.execute("SELECT step, metrics FROM metrics ORDER BY step, id"):
            for name, value in json.loads(metrics).items():
                found.setdefault(name, []).append((step, value))
    return found


def expected(run_dir: RunDir) -> Scalars:
    """What should be there, from the run's own files."""
    found: Scalars = {}
    step = 0

    def add(tag: str, value: float) -> None:
        found.setdefault(tag, []).append((step, pytest.approx(value)))

    def evaluation(path: Path, iteration: int | None) -> None:
        player = read_evaluation(path)
        for name, figure in values(player, seed=0, style="(?s).*").items():
            add(f"eval/{name}", figure)
        assert len(player.rows("report")) == 2
        if iteration is not None:
            add("eval/iteration", iteration)

    evaluation(run_dir.base.evaluation, None)
    trainings = [("warm_start", run_dir.warm_start, None)] if run_dir.warm_start.path.is_dir() else []
    trainings += [("train", run_dir.iteration(iteration), iteration) for iteration in range(ITERATIONS)]
    for group, folder, iteration in trainings:
        for metrics in read_jsonl(folder.metrics):
            step += 1
            for name, value in metrics.items():
                if name != "step":
                    add(f"{group}/{name}", value)
            if iteration is not None:
                add(f"{group}/iteration", iteration)
        evaluation(folder.evaluation, iteration)
    return found


def test_tensorboard_holds_every_step_and_every_evaluation(prepared: Callable[..., Prepared], tmp_path: Path) -> None:
    run_dir = play(prepared(), tmp_path / "run")
    found = tensorboard(run_dir)
    assert found == expected(run_dir)
    assert {"train/loss", "train/margin", "train/real_reward", "train/generated_reward", "eval/nll"} <= found.keys()
    assert [step for step, _ in found["train/loss"]] == list(range(1, 25))  # 4 steps and 8, twice each
    assert [step for step, _ in found["eval/nll"]] == [0, 8, 24]


@pytest.mark.parametrize("snapshot_minutes", [0.0, 60.0])
@pytest.mark.parametrize("stop", [(0, 3), (1, 0), (1, 6)])
def test_a_run_that_was_stopped_has_no_step_twice_and_none_less(
    stop: tuple[int, int], snapshot_minutes: float, prepared: Callable[..., Prepared], tmp_path: Path
) -> None:
    """Whether its steps were kept in a snapshot or are made again."""
    task = prepared(**{"train.snapshot_minutes": snapshot_minutes})
    with pytest.raises(KeyboardInterrupt):
        play(task, tmp_path / "run", Stop(*stop))
    partly = tensorboard(RunDir(tmp_path / "run"))
    assert len(partly["train/loss"]) == stop[1] + 1 + (8 if stop[0] == 1 else 0)
    run_dir = play(task, tmp_path / "run")
    assert tensorboard(run_dir) == expected(run_dir)


@pytest.mark.parametrize(("name", "read"), [("wandb", wandb), ("trackio", trackio)])
def test_other_trackers_hold_the_same(
    name: TrackerName,
    read: Callable[[RunDir], Scalars],
    prepared: Callable[..., Prepared],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip(name)
    task = prepared(**{"train.snapshot_minutes": 0.0})
    with pytest.raises(KeyboardInterrupt):
        play(task, tmp_path / "run", Stop(1, 3), name)
    run_dir = play(task, tmp_path / "run", None, name)
    assert read(run_dir) == expected(run_dir)


@pytest.mark.parametrize("stop", [(None, 5), (0, 2)])
def test_a_warm_start_is_counted_and_told_too(
    stop: tuple[int | None, int], prepared: Callable[..., Prepared], tmp_path: Path
) -> None:
    task = prepared(**{"sft.epochs": 2, "train.snapshot_minutes": 0.0})
    with pytest.raises(KeyboardInterrupt):
        play(task, tmp_path / "run", Stop(*stop))
    found = tensorboard(play(task, tmp_path / "run"))
    assert found == expected(RunDir(tmp_path / "run"))
    assert [step for step, _ in found["warm_start/loss"]] == list(range(1, 9))
    assert [step for step, _ in found["train/loss"]] == list(range(9, 33))
    assert [step for step, _ in found["eval/nll"]] == [0, 8, 16, 32]


def test_more_iterations_go_on_after_the_last_step(prepared: Callable[..., Prepared], tmp_path: Path) -> None:
    spin.run(prepared(iterations=1), tmp_path / "run", Audience())  # nobody tracked it
    run_dir = play(prepared(), tmp_path / "run")
    assert tensorboard(run_dir) == expected(run_dir)


def test_memory_that_runs_out_tells_no_step_twice(prepared: Callable[..., Prepared], tmp_path: Path) -> None:
    """Then training starts over in the same process, after the steps that a snapshot keeps, or from the first."""
    task = prepared(iterations=1, **{"train.snapshot_minutes": 0.0})
    run_dir = play(task, tmp_path / "run")
    again = RunDir(tmp_path / "again")
    metrics = read_jsonl(run_dir.iteration(0).metrics)
    again.path.mkdir()
    again.record.write_text("{}")
    with Tracker("tensorboard", again, task.config) as tracker:
        for first in (0, 2):
            tracker.phase("train", iteration=0, total=32, done=4 * first, unit="pairs")
            for step in metrics[first:5]:
                tracker.advance(4, **step)
    assert [step for step, _ in tensorboard(again)["train/loss"]] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "found",
    [None, importlib.machinery.ModuleSpec("trackio", None, is_package=True)],
    ids=["nothing", "a folder of that name"],
)
def test_a_tracker_that_is_not_installed_is_one_line(
    found: importlib.machinery.ModuleSpec | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: found)
    with pytest.raises(QspinError) as caught:
        check("trackio")
    assert str(caught.value) == "--track trackio: it is not installed; pip install trackio"


def test_a_folder_really_is_found_as_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "qspin_no_tracker").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = importlib.util.find_spec("qspin_no_tracker")
    assert spec is not None
    assert spec.origin is None


def test_a_run_without_a_phase_opens_nothing(prepared: Callable[..., Prepared], tmp_path: Path) -> None:
    """The folder may be another process's."""
    with Tracker("tensorboard", RunDir(tmp_path / "run"), prepared().config) as tracker:
        tracker.note("by the way")
    assert not (tmp_path / "run").exists()
