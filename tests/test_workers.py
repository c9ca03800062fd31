"""Several processes share a run: real processes over gloo, held against one process."""

from __future__ import annotations

import datetime
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT, Notes, small_run

from qspin import spin
from qspin.adapters import load_adapter
from qspin.config import dump_config, load_config
from qspin.errors import QspinError
from qspin.files import read_json, read_jsonl, remove
from qspin.fitting.at_once import Budget
from qspin.phases import learning
from qspin.prepare import Prepared, prepare
from qspin.processes import workers
from qspin.processes.workers import WorkerLost
from qspin.run_dir import IterationDir, RunDir
from qspin.stopping import GOES_ON
from qspin.watch.progress import Silent

COUNT = 2
ROWS, HELDOUT = 31, 6  # so that the last effective batch is one pair, and a helper has none
# Seen: weights apart by 1.4e-5 of their norm, log-probs of a completion by 1.2e-4 nats.
WEIGHTS_BOUND, NATS_BOUND = 2e-4, 2e-3
BUSY = 300  # seconds that a process may take to start, or to end, on a busy machine
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

# A helper as it is, but for jobs that it is told to fail at once, or in which to tell how many layers it recomputes:
# by a file of the job's name.
HELPER = """
import sys, torch
from pathlib import Path
from qspin.phases import helping
from qspin.errors import QspinError

def failing(name, job):
    def do(model, piece):
        told = Path(sys.argv[1]) / name
        try:
            how = told.read_text()
            told.unlink()  # of two helpers one is it
        except FileNotFoundError:
            return job(model, piece)
        if how == "error":
            raise QspinError("a row that no helper can do")
        if how == "tell":
            (Path(sys.argv[1]) / "recomputed").write_text(str(model.footprint.recomputed))
            return job(model, piece)
        return torch.empty(1 << 60, dtype=torch.uint8)
    return do

helping.JOBS = {name: failing(name, job) for name, job in helping.JOBS.items()}
helping.help_out()
"""


def settings(folder: Path, data: Path) -> dict[str, Any]:
    return small_run(folder, data, ROWS) | {
        "model.dtype": "float32",
        "data.heldout_rows": HELDOUT,
        "generation.width": 4,
        "generation.shard_rows": 5,
        "train.tokens_per_micro_batch": 40,
        "train.lr": 0.005,
        "sft.epochs": 1,
        "iterations": 2,
    }


@pytest.fixture(scope="module")
def prepared(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Prepared]:
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"

    def make(**changes: Any) -> Prepared:
        config = load_config(None, settings(tiny_folder("llama"), data) | changes)
        return prepare(config, datetime.date(2026, 1, 1))

    return make


@pytest.fixture(scope="module")
def one(prepared: Callable[..., Prepared], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return play(prepared(), tmp_path_factory.mktemp("one") / "run")


def play(prepared: Prepared, out: Path) -> RunDir:
    spin.run(prepared, out, Silent())
    return RunDir(out)


# --- a launch whose first process is this one


@dataclass
class Helpers:
    told: Path  # a folder of files that name jobs to fail at
    processes: list[subprocess.Popen[str]]
    codes: list[int]  # that they should end with


def environments(count: int) -> list[dict[str, str]]:
    """What a launcher tells each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    all_alike = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**all_alike, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def start(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command],
        env=ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def helpers(one: RunDir, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Helpers]:
    """Started after a run without them. They end with a code each, and without a word."""
    assert one.iteration(1).done
    told = tmp_path_factory.mktemp("told")
    ours, *theirs = environments(COUNT)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ours.items():
            patch.setenv(name, value)
        there = Helpers(told, [start(["-c", HELPER, str(told)], each) for each in theirs], [0] * len(theirs))
        with workers.launch():
            yield there
        said = [process.communicate(timeout=BUSY)[0] for process in there.processes]
    assert (said, [process.returncode for process in there.processes]) == ([""] * len(said), there.codes)


def files(run: RunDir) -> set[str]:
    return {str(path.relative_to(run.path)) for path in run.path.rglob("*") if path.is_file()}


def players(run: RunDir) -> list[IterationDir]:
    return [run.warm_start, run.iteration(0), run.iteration(1)]


def apart(folder: IterationDir, against: IterationDir) -> float:
    """The most that a weight matrix is apart from another run's, of its norm."""
    ours, theirs = load_adapter(folder.adapter), load_adapter(against.adapter)
    return max(float((weight - theirs[name]).norm() / weight.norm()) for name, weight in ours.items())


def assert_alike(run: RunDir, one: RunDir) -> None:
    """But for rounding, and for how the work was cut."""
    for iteration in (0, 1):
        ours, theirs = (pairs(each.iteration(iteration)) for each in (run, one))
        assert ours == theirs
    for folder, against in zip(players(run), players(one), strict=True):
        assert apart(folder, against) < WEIGHTS_BOUND
        for row, other in zip(read_jsonl(folder.metrics), read_jsonl(against.metrics), strict=True):
            assert row == pytest.approx(other, abs=NATS_BOUND)
        found, expected = read_json(folder.evaluation), read_json(against.evaluation)
        assert found.keys() == expected.keys()
        for key, value in found.items():
            near = isinstance(value[:1], list) and value and isinstance(value[0], float)
            assert value == (pytest.approx(expected[key], abs=NATS_BOUND) if near else expected[key]), key


def pairs(folder: IterationDir) -> list[dict[str, Any]]:
    shards = range(len(read_json(folder.generation_plan)["shards"]))
    return [row for shard in shards for row in read_jsonl(folder.generated(shard))]


@pytest.fixture(scope="module")
def two(prepared: Callable[..., Prepared], helpers: Helpers, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    assert len(helpers.processes) == COUNT - 1
    return play(prepared(), tmp_path_factory.mktemp("two") / "run")


def test_two_processes_end_where_one_does(one: RunDir, two: RunDir) -> None:
    assert files(two) == files(one)
    assert_alike(two, one)
    for shard in one.iteration(1).generated(0).parent.iterdir():
        assert shard.read_bytes() == (two.iteration(1).generated(0).parent / shard.name).read_bytes()
    first = read_jsonl(two.iteration(1).metrics)[0]
    assert (first["margin"], first["real_reward"], first["generated_reward"]) == (0.0, 0.0, 0.0)


def test_the_page_has_these_bounds() -> None:
    page = (ROOT / "docs" / "several-gpus.md").read_text(encoding="utf-8")
    for said in (f"less than {WEIGHTS_BOUND}", f"less than {NATS_BOUND} nats", f"more than {100 * WEIGHTS_BOUND}"):
        assert f"| {said} |" in page


def test_control_gradients_that_are_not_summed(
    prepared: Callable[..., Prepared], one: RunDir, helpers: Helpers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_parts", lambda _slot, _flat: iter(()))
    alone = play(prepared(iterations=1), tmp_path / "run")
    assert apart(alone.warm_start, one.warm_start) > 100 * WEIGHTS_BOUND
    assert apart(alone.iteration(0), one.iteration(0)) > 100 * WEIGHTS_BOUND
    assert helpers.codes == [0] * (COUNT - 1)


def test_what_one_process_began_several_go_on_with(
    prepared: Callable[..., Prepared], one: RunDir, helpers: Helpers, tmp_path: Path
) -> None:
    begun = RunDir(tmp_path / "begun")
    shutil.copytree(one.path, begun.path)
    remove(begun.iteration(1).path)
    folder = begun.iteration(0)
    for path in (folder.adapter, folder.evaluation, folder.metrics, folder.generated(2), folder.generated(3)):
        remove(path)
    remove(folder.scores(1))
    plans = folder.generation_plan.read_bytes(), folder.training_plan.read_bytes()
    play(prepared(), begun.path)
    assert plans == (folder.generation_plan.read_bytes(), folder.training_plan.read_bytes())
    assert_alike(begun, one)
    assert list(helpers.told.iterdir()) == []


def test_memory_that_runs_out_in_a_helper(
    prepared: Callable[..., Prepared], one: RunDir, helpers: Helpers, tmp_path: Path
) -> None:
    for job in ("generate", "supervise", "score", "train"):
        (helpers.told / job).touch()
    progress, changes = Notes(), {"train.tokens_per_micro_batch": 90, "train.gradient_checkpointing": True}
    spin.run(prepared(iterations=1, **changes), tmp_path / "run", progress)
    assert list(helpers.told.iterdir()) == []
    assert progress.notes[0] == f"{COUNT} processes share the work"
    # the base is the first that is generated from, and scored
    refused = [note for note in progress.notes if note.startswith("memory does not hold")]
    assert [note.split()[4:6] for note in refused] == [["the", "evaluation;"]] * 2 + [["so", "many"]] * 2
    for folder in (RunDir(tmp_path / "run").warm_start, RunDir(tmp_path / "run").iteration(0)):
        assert apart(folder, IterationDir(one.path / folder.path.name)) < WEIGHTS_BOUND


@pytest.mark.parametrize("job", ["supervise", "train"])
def test_helpers_recompute_as_many_layers_as_the_first_process(
    job: str, prepared: Callable[..., Prepared], two: RunDir, helpers: Helpers, tmp_path: Path
) -> None:
    (helpers.told / job).write_text("tell")
    run = RunDir(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning, "token_budget", lambda *_: Budget(40, 2))
        play(prepared(iterations=1), run.path)
    told = helpers.told / "recomputed"
    assert told.read_text() == "2"
    told.unlink()
    weights = [folder.adapter / "adapter_model.safetensors" for folder in (run.iteration(0), two.iteration(0))]
    assert weights[0].read_bytes() == weights[1].read_bytes(), "not a bit is otherwise"


def test_an_error_in_a_helper_is_the_runs_which_goes_on_to_the_same_bytes(
    prepared: Callable[..., Prepared], two: RunDir, helpers: Helpers, tmp_path: Path
) -> None:
    (helpers.told / "train").write_text("error")
    with pytest.raises(QspinError, match="a row that no helper can do"):
        play(prepared(iterations=1), tmp_path / "run")
    again = play(prepared(iterations=1), tmp_path / "run")
    weights = [folder.adapter / "adapter_model.safetensors" for folder in (again.iteration(0), two.iteration(0))]
    assert weights[0].read_bytes() == weights[1].read_bytes()


class Kill(Silent):
    """Kills a helper in training."""

    def __init__(self, helper: subprocess.Popen[str]) -> None:
        self.helper = helper

    def advance(self, units: float, **figures: float) -> None:  # noqa: ARG002
        if figures.get("step") == 3:
            self.helper.kill()
            self.helper.wait()


def test_a_helper_that_dies_costs_no_step(  # the last test with these helpers
    prepared: Callable[..., Prepared], one: RunDir, helpers: Helpers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path / "run")
    helpers.codes = [-signal.SIGKILL]
    with pytest.raises(WorkerLost, match=f"one of the {COUNT} processes of this launch has ended"):
        spin.run(prepared(iterations=1), run.path, Kill(helpers.processes[0]))
    assert [path.name for path in run.warm_start.snapshots.iterdir()] == ["step-000004"]
    monkeypatch.setattr(workers._State, "count", 1)  # as if it were started alone
    play(prepared(iterations=1), run.path)
    assert apart(run.iteration(0), one.iteration(0)) < WEIGHTS_BOUND


FIRST = """
from qspin.processes import workers
from qspin.stopping import heed_stops, leave_stopped
heed_stops("bye")
try:
    with workers.launch():
        workers.Crew(2).share("work", [None], lambda: print("waits", flush=True))
except SystemExit as stop:
    leave_stopped(stop.code)
"""
AT_WORK = """
import time
from qspin.processes import workers
workers.connect()
workers._broadcast(None)
time.sleep(600)
"""


def test_a_stop_is_heard_while_a_helper_is_at_work() -> None:
    scripts = zip((FIRST, AT_WORK), environments(2), strict=True)
    first, helper = (start(["-c", script], environment) for script, environment in scripts)
    assert first.stdout is not None
    assert "waits\n" in iter(first.stdout.readline, "")
    time.sleep(0.5)  # until it does
    first.send_signal(signal.SIGTERM)
    try:
        said, _ = first.communicate(timeout=60)
    finally:
        helper.kill()
        helper.communicate()
    assert (first.returncode, said) == (128 + signal.SIGTERM, "bye\n")


# --- a real launcher


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["a killed helper", pytest.param("SIGTERM", marks=pytest.mark.nightly)])
def test_a_launch_that_is_cut_off_ends_and_one_process_goes_on(
    ending: str, prepared: Callable[..., Prepared], one: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, config = RunDir(tmp_path / "run"), tmp_path / "config.yaml"
    config.write_text(dump_config(prepared(**{"train.snapshot_minutes": 0}).config))
    launch = "-m accelerate.commands.accelerate_cli launch --multi_gpu --num_processes 2 --num_machines 1"
    quiet = "--mixed_precision no --dynamo_backend no"  # else it says that it took these
    command = f"{launch} {quiet} -m qspin run {config} --out {run.path}"
    launcher = start(command.split(), {})
    deadline = time.monotonic() + BUSY
    while not any(run.iteration(1).snapshots.glob("step-00000[2-9]")):  # of which the last two are kept
        assert launcher.poll() is None and time.monotonic() < deadline, launcher.communicate()
        time.sleep(0.001)
    first, second = sorted(psutil.Process(launcher.pid).children(), key=lambda process: process.environ()["RANK"])
    assert run.holder() == f"process {first.pid} on {socket.gethostname()}"
    if ending == "SIGTERM":
        launcher.terminate()
    else:
        second.kill()
    said, _ = launcher.communicate(timeout=BUSY)
    assert (launcher.returncode, first.is_running()) == (1, False)
    assert said.count("2 processes share the work") == 1
    assert said.count(GOES_ON) + said.count("one of the 2 processes of this launch has ended") == 1
    assert not run.iteration(1).adapter.exists()
    monkeypatch.setattr(workers._State, "count", 1)  # the other tests' helpers may be there
    play(prepared(), run.path)
    assert_alike(run, one)


def test_an_error_is_told_once(tmp_path: Path) -> None:
    command = ["-m", "qspin", "run", "no-such-preset", "--out", str(tmp_path / "run")]
    processes = [start(command, each) for each in environments(2)]
    said = [process.communicate(timeout=BUSY)[0] for process in processes]
    assert said[0].startswith("error: no preset is called 'no-such-preset'")
    assert (said[0].count("\n"), said[1]) == (1, "")
    assert [process.returncode for process in processes] == [1, 0]


def test_each_process_needs_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(QspinError, match=r"^3 processes were launched on a machine of 2 GPUs, .*; launch 2$"):
        workers.connect()


def test_a_rank_without_a_world_is_a_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert workers.rank() == 0
