"""The status of a run as another process sees it. Real locks, real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from conftest import Clock

from qspin.config import dump_config, load_config
from qspin.errors import QspinError
from qspin.files import read_json, write_json, write_text
from qspin.holder import process_name
from qspin.run_dir import RunDir
from qspin.watch.meter import Meter
from qspin.watch.status import StatusFile, look

MEMORY = (3 << 30, 24 << 30)

WORKER = """
import sys, time
from pathlib import Path
from qspin.watch.meter import Meter
from qspin.run_dir import RunDir
from qspin.watch.status import StatusFile

run_dir = RunDir(Path(sys.argv[1]))
meter = Meter([], {}, 2, lambda: (1, 2))
with run_dir.lock():
    if sys.argv[2] == "training":
        file = StatusFile(run_dir.status, meter)
        for listener in (meter, file):
            listener.phase("train", iteration=1, total=100, done=40, unit="pairs")
        time.sleep(1.1)
        for listener in (meter, file):
            listener.advance(8, loss=0.5)
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def begun(run_dir: RunDir, iterations: int = 2) -> RunDir:
    """A folder as it is once a run has begun in it."""
    write_json(run_dir.record, {})
    write_text(run_dir.config, dump_config(load_config(None, {"iterations": iterations})))
    return run_dir


def finish(run_dir: RunDir, iteration: int) -> None:
    run_dir.iteration(iteration).adapter.mkdir(parents=True)
    write_json(run_dir.iteration(iteration).evaluation, {})


def keep(run_dir: RunDir, *, baseline: bool = False) -> None:
    """What this process, in training, writes."""
    run_dir.path.mkdir(exist_ok=True)
    meter = Meter([], {}, 2, lambda: MEMORY, baseline=baseline)
    file = StatusFile(run_dir.baseline_status if baseline else run_dir.status, meter)
    for listener in (meter, file):
        listener.phase("train", iteration=1, total=100, done=40, unit="pairs")


@pytest.fixture
def work() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that work in the folder, gone after the test."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def start(processes: list[subprocess.Popen[str]], run_dir: RunDir, doing: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(run_dir.path), doing], stdout=subprocess.PIPE, text=True
    )
    processes.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


# --- writing ---


def test_the_file_has_the_status_and_who_wrote_it(run_dir: RunDir) -> None:
    run_dir.path.mkdir()
    meter = Meter([], {}, 2, lambda: MEMORY)
    file = StatusFile(run_dir.status, meter)
    for listener in (meter, file):
        listener.phase("generate", iteration=0, total=10, done=0, unit="rows")
    for listener in (meter, file):
        listener.sampled("why?", "because\n\x1b[2J")
        listener.advance(10, loss=0.5)
    written = read_json(run_dir.status)
    assert written["process"] == process_name() == f"process {os.getpid()} on {os.uname().nodename}"
    status = meter.status()
    assert status is not None
    changing = {"phase_seconds"}
    assert {k: v for k, v in written["status"].items() if k not in changing} == {
        k: v for k, v in asdict(status).items() if k not in changing
    }
    assert list(run_dir.path.iterdir()) == [run_dir.status], "nothing half-written is left"


def test_it_is_written_once_a_second_and_at_every_end(run_dir: RunDir) -> None:
    run_dir.path.mkdir()
    clock = Clock()
    meter = Meter([], {}, 2, lambda: MEMORY, clock)
    file = StatusFile(run_dir.status, meter, clock)

    def done() -> float:
        found: float = read_json(run_dir.status)["status"]["done"]
        return found

    def advance(units: float, **figures: float) -> float:
        meter.advance(units, **figures)
        file.advance(units, **figures)
        return done()

    for listener in (meter, file):
        listener.phase("evaluate", iteration=None, total=5, done=0, unit="rows")
    assert done() == 0
    assert advance(1) == 0
    clock.now += 0.9
    assert advance(1) == 0
    clock.now += 0.2
    assert advance(1) == 3
    assert advance(1) == 3
    assert advance(1) == 5, "the phase's end"
    advance(0, nll=2.0)
    assert read_json(run_dir.status)["status"]["figures"] == {"nll": 2.0}


def test_a_reader_never_sees_half_a_file(run_dir: RunDir) -> None:
    """It is replaced: who has the old one open goes on reading the old one."""
    keep(run_dir)
    with run_dir.status.open() as old:
        before = run_dir.status.stat().st_ino
        keep(run_dir)
        assert run_dir.status.stat().st_ino != before
        assert json.loads(old.read())["status"]["phase"] == "train"


# --- reading ---


def test_a_folder_that_is_not_there_or_no_run(run_dir: RunDir) -> None:
    with pytest.raises(QspinError) as caught:
        look(run_dir)
    assert str(caught.value) == f"{run_dir.path}: no such folder"
    run_dir.path.mkdir()
    (run_dir.path / "thesis.tex").write_text("mine")
    with pytest.raises(QspinError) as caught:
        look(run_dir)
    assert str(caught.value) == f"{run_dir.path}: not the folder of a run, it has no run.json"
    with pytest.raises(QspinError, match=r"thesis\.tex: a file; name the folder of a run$"):
        look(RunDir(run_dir.path / "thesis.tex"))
    assert [path.name for path in run_dir.path.iterdir()] == ["thesis.tex"], "looking leaves nothing behind"


def test_an_empty_folder_is_a_run_not_started(run_dir: RunDir) -> None:
    run_dir.path.mkdir()
    assert look(run_dir).state == "not started"
    with run_dir.lock():
        pass
    assert look(run_dir).state == "not started"


def test_a_process_that_has_told_nothing_yet_is_starting(run_dir: RunDir, work: list[subprocess.Popen[str]]) -> None:
    process = start(work, run_dir, "loading")
    found = look(run_dir)
    assert (found.state, found.process) == ("starting", f"process {process.pid} on {os.uname().nodename}")
    begun(run_dir)
    keep(run_dir)  # by another process, in its time
    found = look(run_dir)
    assert (found.state, found.status) == ("starting", None), "an old status is not taken for a new one"


def test_a_run_at_work(run_dir: RunDir, work: list[subprocess.Popen[str]]) -> None:
    process = start(work, begun(run_dir), "training")
    found = look(run_dir)
    assert (found.state, found.process) == ("running", f"process {process.pid} on {os.uname().nodename}")
    assert found.age is not None
    assert 0 <= found.age < 10
    status = found.status
    assert status is not None
    assert (status.phase, status.iteration, status.done, status.total) == ("train", 1, 48, 100)
    assert status.figures == {"loss": 0.5}
    assert status.rate is not None
    assert status.phase_seconds_left is not None
    assert status.phase_seconds_left == pytest.approx(52 / status.rate - found.age, abs=0.5)
    assert process.poll() is None, "it was not disturbed"
    assert look(run_dir).state == "running"


def test_a_run_that_ctrl_z_paused_is_not_running(run_dir: RunDir, work: list[subprocess.Popen[str]]) -> None:
    process = start(work, run_dir, "loading")
    pause(process)
    assert look(run_dir).state == "paused", "before it has written what it is"
    begun(run_dir)
    found = look(run_dir)
    assert (found.state, found.status) == ("paused", None)
    with pytest.raises(QspinError) as caught:
        run_dir.check_usable()
    name = f"process {process.pid} on {os.uname().nodename}"
    told = f"{run_dir.path}: {name} is paused here; fg in its terminal, or kill -CONT with its number, lets it go on"
    assert str(caught.value) == told
    process.send_signal(signal.SIGCONT)
    wait_until(lambda: look(run_dir).state == "starting")
    process.kill()
    process.wait()
    process = start(work, run_dir, "training")
    pause(process)
    found = look(run_dir)
    assert (found.state, found.process) == ("paused", f"process {process.pid} on {os.uname().nodename}")
    assert found.status is not None
    assert found.status.done == 48
    process.send_signal(signal.SIGCONT)
    wait_until(lambda: look(run_dir).state == "running")


def pause(process: subprocess.Popen[str]) -> None:
    """As a shell does at Ctrl-Z; it is done once the system says so."""
    process.send_signal(signal.SIGSTOP)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_run_is_stopped(run_dir: RunDir, work: list[subprocess.Popen[str]]) -> None:
    process = start(work, begun(run_dir), "training")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    found = look(run_dir)
    assert (found.state, found.process) == ("stopped", None)
    assert found.status is not None
    assert found.status.done == 48
    start(work, run_dir, "loading")
    assert look(run_dir).state == "starting"


def test_a_live_process_that_let_go_is_not_at_work(run_dir: RunDir) -> None:
    """That a process of this number lives says nothing: it may have ended its run, or be another one by now."""
    with begun(run_dir).lock():
        keep(run_dir)
        assert look(run_dir).state == "running"
    found = look(run_dir)
    assert found.state == "stopped"
    with run_dir.lock():  # and looking has let go of what it tried
        pass


def test_a_run_is_finished_with_its_last_iteration(run_dir: RunDir) -> None:
    begun(run_dir)
    found = look(run_dir)
    assert (found.state, found.iterations_done, found.status, found.age) == ("stopped", 0, None, None)
    finish(run_dir, 0)
    assert (look(run_dir).state, look(run_dir).iterations_done) == ("stopped", 1)
    finish(run_dir, 1)
    assert (look(run_dir).state, look(run_dir).iterations_done) == ("finished", 2)
    begun(run_dir, iterations=3)  # asked for more
    assert look(run_dir).state == "stopped"


def test_a_baseline_leaves_the_runs_own_status(run_dir: RunDir) -> None:
    begun(run_dir)
    keep(run_dir)
    finish(run_dir, 0)
    finish(run_dir, 1)
    own = look(run_dir)
    assert own.status is not None
    assert (own.status.baseline, own.baseline) == (False, None)
    with run_dir.lock():
        keep(run_dir, baseline=True)  # by the process that played the run, as in a notebook
        at_work = look(run_dir)
    assert at_work.status is not None
    assert (at_work.state, at_work.status.baseline) == ("running", True)
    left = look(run_dir)
    assert (left.state, left.status) == ("finished", own.status)
    assert left.baseline is not None
    assert left.baseline[0].baseline and left.baseline[1] < 10
    keep(run_dir)  # the run went on after it
    assert look(run_dir).baseline is None


@pytest.mark.parametrize("content", ["", "[]", '{"status": {"phase": "train"}, "process": "x", "written": 0}', "{}"])
def test_a_file_that_makes_no_sense_is_named(content: str, run_dir: RunDir) -> None:
    begun(run_dir)
    run_dir.status.write_text(content)
    with pytest.raises(QspinError) as caught:
        look(run_dir)
    assert str(caught.value).startswith(f"{run_dir.status}: ")


@pytest.mark.parametrize(
    "content", ["iterations: [\n", "iterations: three\n", "iterations: .inf\n", "seed: 2024-13-45\n", "[" * 5000]
)
def test_a_configuration_that_makes_no_sense_is_named(content: str, run_dir: RunDir) -> None:
    begun(run_dir)
    finish(run_dir, 0)
    run_dir.config.write_text(content)
    with pytest.raises(QspinError, match=r"config\.yaml: damaged or unreadable"):
        look(run_dir)
