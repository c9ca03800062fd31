"""A run's folder: who may work in it, and what becomes of one that is taken away."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock
import pytest

from qspin.errors import QspinError
from qspin.files import commit_folder, read_json, write_json, write_text
from qspin.run_dir import RunDir

HOLDER = """
import sys, time
from pathlib import Path
from qspin.run_dir import RunDir

with RunDir(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def hold(path: Path) -> subprocess.Popen[str]:
    """Another process that works in a folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = hold(tmp_path / "run")
    yield process
    process.kill()
    process.communicate()


def refusal(path: Path) -> str:
    with pytest.raises(QspinError) as caught, RunDir(path).lock():
        pass
    return str(caught.value)


def test_a_second_process_is_refused_at_once_and_told_who_works_there(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    started = time.monotonic()
    message = refusal(tmp_path / "run")
    assert time.monotonic() - started < 10
    by = f"process {holder.pid} on {socket.gethostname()}"
    assert message == f"{tmp_path / 'run'}: {by} is working here; wait for it or choose another --out"
    # nor has it written its own name over the holder's
    assert by in refusal(tmp_path / "run")


def test_the_lock_of_a_killed_process_does_not_block(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with RunDir(tmp_path / "run").lock():
        # and the next to be refused hears of this process, not of the dead one
        message = subprocess.run(
            [sys.executable, "-c", HOLDER, str(tmp_path / "run")], capture_output=True, text=True, check=False
        ).stderr
    assert f"process {os.getpid()} on " in message
    assert str(holder.pid) not in message


def test_the_lock_is_let_go_at_the_end_and_after_an_error(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), RunDir(tmp_path / "run").lock():
            raise KeyboardInterrupt
    process = hold(tmp_path / "run")  # it asserts that the lock is free
    process.kill()
    process.communicate()


def test_a_new_folder_is_made_with_those_above_it(tmp_path: Path) -> None:
    with RunDir(tmp_path / "a" / "b" / "run").lock():
        assert (tmp_path / "a" / "b" / "run").is_dir()


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    leftover = tmp_path / "run" / "iteration-0" / ".adapter.0123abcd.partial" / "weights"
    write_text(tmp_path / "run" / "run.json", "{}")
    write_text(leftover, "half")
    with RunDir(tmp_path / "run").lock():
        assert not leftover.parent.exists()
        assert (tmp_path / "run" / "run.json").is_file()


def test_nothing_is_cleared_under_the_feet_of_another(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    assert holder.poll() is None
    write_text(tmp_path / "run" / ".adapter.0123abcd.partial", "it is being written")
    refusal(tmp_path / "run")
    assert (tmp_path / "run" / ".adapter.0123abcd.partial").is_file()


def test_what_a_trial_of_the_players_is_writing_is_not_cleared_by_a_run(tmp_path: Path) -> None:
    written = RunDir(tmp_path / "run").trials / "questions-01" / ".result.json.0123abcd.partial"
    write_text(tmp_path / "run" / "run.json", "{}")
    write_text(written, "half")
    with RunDir(tmp_path / "run").lock():
        assert written.is_file()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    assert refusal(tmp_path / "run") == f"--out: {tmp_path / 'run'} is a file; name a folder"
    assert (tmp_path / "run").read_text() == "mine"
    assert refusal(tmp_path / "run" / "below") == f"--out: {tmp_path / 'run'} is a file; name a folder"


@pytest.mark.parametrize("below", ["", "below"])
def test_a_link_that_leads_nowhere_is_no_folder(below: str, tmp_path: Path) -> None:
    link = tmp_path / "run"
    for target in (tmp_path / "gone", link):
        link.symlink_to(target)
        with pytest.raises(QspinError) as caught:
            RunDir(link / below).check_usable()
        assert str(caught.value) == f"--out: {link} is a link that leads nowhere; name a folder"
        link.unlink()
    (tmp_path / "there").mkdir()
    link.symlink_to(tmp_path / "there")
    RunDir(link / below).check_usable()


def test_a_folder_in_that_of_a_run_is_no_place_for_another(tmp_path: Path) -> None:
    run, link = tmp_path / "run", tmp_path / "link"
    (run / "iteration-0").mkdir(parents=True)
    link.symlink_to(run / "iteration-0")
    (run / "run.json").write_text("{}")
    RunDir(run / "below").check_usable()  # anybody may call a file so
    (run / "config.yaml").write_text("")
    for folder in (run / "below", run / "iteration-0" / "adapter", link / "below"):
        said = f"--out: {folder} lies in the folder of the run {run}; name a folder beside it"
        assert refusal(folder) == said
        assert not folder.exists()
    RunDir(run).check_usable()


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    message = f"--out: {tmp_path} holds other things; name a new folder or one of an earlier run"
    assert refusal(tmp_path) == message
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("inside", [[], [".lock"], ["run.json"], ["run.json", "notes.txt"]])
def test_an_empty_folder_and_one_of_an_earlier_run_are_welcome(inside: list[str], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in inside:
        (tmp_path / "run" / name).write_text("{}")
    with RunDir(tmp_path / "run").lock():
        pass
    assert {*inside} <= {path.name for path in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize("made", ["base", "warm-start", "iteration-1", "supervised", "mt-bench"])
def test_what_a_run_made_is_not_taken_for_another_runs(made: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_text(run / ".lock", "")
    write_text(run / made / "evaluation.json", "{}")
    message = (
        f"--out: {run} has {made} of a run, but no run.json, which says what run that was; put a copy of it back, or "
        "name a new folder"
    )
    assert refusal(run) == message
    write_text(run / "run.json", "{}")
    with RunDir(run).lock():
        pass


LATE = """
import sys, time
from pathlib import Path
import filelock
from qspin.holder import process_name

folder = Path(sys.argv[1])
with filelock.FileLock(folder / ".lock"):
    print("held", flush=True)
    time.sleep(0.4)
    (folder / ".holder").write_text(process_name())
    time.sleep(60)
"""


def test_whoever_has_just_taken_the_lock_is_waited_for_to_give_its_name(tmp_path: Path) -> None:
    """Its predecessor's name is still there; naming a dead process would help nobody."""
    (tmp_path / ".lock").touch()
    (tmp_path / ".holder").write_text(f"process {2**22 - 1} on {socket.gethostname()}\n")
    late = subprocess.Popen([sys.executable, "-c", LATE, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert late.stdout is not None
    assert late.stdout.readline() == "held\n"
    started = time.monotonic()
    message = refusal(tmp_path)
    assert time.monotonic() - started < 10
    late.kill()
    late.communicate()
    assert f"process {late.pid} on " in message


@pytest.mark.parametrize("name", [b"", b"\xff\xfe"])
def test_whoever_holds_the_lock_and_gives_no_name_is_another_process(name: bytes, tmp_path: Path) -> None:
    (tmp_path / ".holder").write_bytes(name)
    with filelock.FileLock(tmp_path / ".lock"):
        assert refusal(tmp_path) == f"{tmp_path}: another process is working here; wait for it or choose another --out"


def test_a_folder_that_is_taken_is_known_before_any_work(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    """`qspin run` looks before it reads model and data."""
    with pytest.raises(QspinError, match=f"process {holder.pid} on .* is working here"):
        RunDir(tmp_path / "run").check_usable()


# --- who works there ---


def test_the_holder_is_known_while_it_holds(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    run = RunDir(tmp_path / "run")
    assert run.holder() == f"process {holder.pid} on {socket.gethostname()}"
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert run.holder() is None


def test_a_holder_elsewhere_is_known_by_its_lock(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    """Whether a process of another machine lives can't be seen from here; whether it holds the lock can."""
    run = RunDir(tmp_path / "run")
    (run.path / ".holder").write_text("process 1 on elsewhere\n")
    assert run.holder() == "process 1 on elsewhere"
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert run.holder() is None


def test_nobody_holds_a_folder_that_no_run_was_in(tmp_path: Path) -> None:
    assert RunDir(tmp_path).holder() is None
    assert list(tmp_path.iterdir()) == []


# --- a folder that is taken away while it is worked in ---

GONE = "{} was moved or deleted while the run works; the same command with its new --out goes on"


def commit(path: Path) -> None:
    with commit_folder(path) as folder:
        (folder / "weights").write_text("text")


@pytest.mark.parametrize("take_away", [lambda run: run.rename(run.with_name("moved")), shutil.rmtree])
def test_nothing_is_written_where_a_folder_was(take_away: Callable[[Path], object], tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    pieces: list[Callable[[], object]] = [
        lambda: write_json(run.iteration(0).evaluation, {}),
        lambda: write_text(run.summary, "text"),
        lambda: commit(run.iteration(0).adapter),
        lambda: read_json(run.iteration(0).training_plan),
        run.read_record,
    ]
    with run.lock():
        write_json(run.record, {})
        write_json(run.iteration(0).training_plan, {})
        take_away(run.path)
        for piece in pieces:
            with pytest.raises(QspinError) as caught:
                piece()
            assert str(caught.value) == GONE.format(run.path)
        run.iteration(0).add_seconds("train", 1.0)  # for show
        assert not run.path.exists()
        write_text(tmp_path / "run-2" / "file", "another folder is none of its business")
    write_text(run.summary, "nobody works there any more")


def test_a_folder_that_is_moved_while_a_piece_is_written_is_not_begun_again(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with run.lock():
        write_json(run.record, {})
        with pytest.raises(QspinError) as caught, commit_folder(run.iteration(0).adapter) as folder:
            (folder / "weights").write_text("text")
            run.path.rename(tmp_path / "moved")
        assert str(caught.value) == GONE.format(run.path)
        assert not run.path.exists()
    with RunDir(tmp_path / "moved").lock():
        assert not list((tmp_path / "moved").rglob("*.partial"))


def test_nothing_is_written_into_a_run_that_another_began_in_its_place(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with run.lock():
        run.path.rename(tmp_path / "moved")
        other = hold(run.path)
        with pytest.raises(QspinError) as caught:
            write_text(run.summary, "text")
        assert str(caught.value) == GONE.format(run.path)
        assert not run.summary.exists()
        other.kill()
        other.communicate()
