"""Ctrl-C and SIGTERM, once and twice. Real processes, real signals."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import hearing_interrupts

from qspin.files import read_json, read_jsonl
from qspin.phases.damage import take_away_damaged
from qspin.run_dir import RunDir
from qspin.stopping import GOES_ON, STOPPED

SIGNALS = [signal.SIGINT, signal.SIGTERM]
LEAVES_WITHIN = 5.0  # seconds
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def start(*command: str) -> subprocess.Popen[str]:
    with hearing_interrupts():
        return subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )


SCRIPT = """
import sys, time
from qspin import stopping
from qspin.stopping import check_stop, heed_stops, stops_held
heed_stops()
def say(text): print(text, flush=True)
def wait(seconds, until=lambda: False):
    end = time.monotonic() + seconds
    while time.monotonic() < end and not until():
        time.sleep(0.01)
def wait_for_the_signal():
    wait(20, lambda: stopping._State.asked is not None)
{body}
"""


def told(body: str, *signals: signal.Signals) -> tuple[int, list[str], str]:
    """Run a script that says "now" when the first signal is due, and "again" for the next."""
    process = start("-c", SCRIPT.format(body=body))
    assert process.stdout is not None
    said = []
    for number in signals:
        while (line := process.stdout.readline()) not in {"now\n", "again\n", ""}:
            said.append(line.strip())
        process.send_signal(number)
    rest, err = process.communicate(timeout=30)
    return process.returncode, said + rest.split(), err


@pytest.mark.parametrize("number", SIGNALS)
def test_once_it_is_raised_wherever_the_program_is(number: signal.Signals) -> None:
    body = """
try:
    say("now")
    wait(20)
finally:
    say("cleaned")
"""
    assert told(body, number)[:2] == (128 + number, ["cleaned"])


@pytest.mark.parametrize("number", SIGNALS)
def test_what_must_not_be_torn_ends_first(number: signal.Signals) -> None:
    body = """
with stops_held():
    with stops_held():
        say("now")
        wait_for_the_signal()
        say("inner")
    say("outer")
say("never")
"""
    assert told(body, number)[:2] == (128 + number, ["inner", "outer"])


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("number", SIGNALS)
def test_twice_it_is_gone_at_once_and_says_how_to_go_on(number: signal.Signals, held: bool) -> None:
    body = f"""
try:
    with stops_held():
        say("now")
        wait_for_the_signal()
        if {held}:
            say("again")
            wait(20)
finally:
    say("again")
    wait(20)
    say("never")
"""
    started = time.monotonic()
    code, said, err = told(body, number, number)
    assert (code, "never" in said, err) == (128 + number, False, f"{STOPPED}\n")
    assert time.monotonic() - started < 10


def test_a_request_that_was_swallowed_is_raised_again() -> None:
    body = """
try:
    say("now")
    wait(20)
except SystemExit:
    pass
check_stop()
say("never")
"""
    assert told(body, signal.SIGTERM)[:2] == (143, [])


def test_ctrl_c_may_end_a_piece_of_work_alone_and_sigterm_never() -> None:
    body = """
from qspin.stopping import go_on_after, leave_stopped
heed_stops("bye")
for word in ("now", "again"):
    try:
        say(word)
        wait(20)
    except SystemExit as stop:
        go_on_after(stop)
        check_stop()
        say("on")
try:
    say("again")
    wait(20)
except SystemExit as stop:
    try:
        go_on_after(stop)
    except SystemExit as same:
        leave_stopped(same.code)
"""
    assert told(body, signal.SIGINT, signal.SIGINT, signal.SIGTERM) == (143, ["on", "on"], "bye\n")


def test_a_pause_gives_the_cursor_back_and_ends_nothing() -> None:
    """Nor does it count as time that passed."""
    body = """
sys.stderr.write("\\x1b[?25l")
passed = time.monotonic() - stopping.clock()
say("now")
assert sys.stdin.read() == "on"
say(time.monotonic() - stopping.clock() - passed)
"""
    script = SCRIPT.format(body=body)
    ours, its = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=its,
        text=True,
        process_group=0,  # as a shell starts a job
    )
    assert process.stdout is not None and process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGTSTP)
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    shown = b""
    while len(shown) < 12 and select.select([ours], [], [], 30)[0]:  # a terminal may hand it over in parts
        shown += os.read(ours, 1000)
    assert shown == b"\x1b[?25l\x1b[?25h"
    time.sleep(0.3)
    process.send_signal(signal.SIGCONT)
    said, _ = process.communicate("on", timeout=30)
    assert process.returncode == 0
    assert 0.3 < float(said) < 30
    for end in ours, its:
        os.close(end)


# --- a run ---


@pytest.fixture(scope="module")
def command(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n * 7}."} for n in range(24)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "iterations": 1,
        "model.dtype": "float32",
        "generation.max_new_tokens": 8,
        "generation.width": 4,
        "train.batch_size": 4,
        "train.epochs": 16,
        "train.tokens_per_micro_batch": 64,
        "train.snapshot_minutes": 1000,
        "data.heldout_rows": 4,
    }
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return ["-m", "qspin.cli", "run", "--model", str(tiny_folder("llama")), "--data", str(data), *options]


def training(process: subprocess.Popen[str], out: Path) -> int:
    """Wait until some steps of the training are made; how many are known of."""
    deadline = time.monotonic() + 120
    while True:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        if RunDir(out).status.is_file():
            status = read_json(RunDir(out).status)["status"]
            if status["phase"] == "train" and status["figures"].get("step", 0) >= 3:
                return int(status["figures"]["step"]) + 1
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    subprocess.run([sys.executable, *command, "--out", str(out)], check=True, capture_output=True, env=ENVIRONMENT)
    return (RunDir(out).iteration(0).adapter / "adapter_model.safetensors").read_bytes()


def test_a_run_whose_reader_is_gone_keeps_its_steps(command: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(*command, "--json", "--out", str(out))
    assert process.stdout is not None and process.stderr is not None
    for line in process.stdout:
        event = json.loads(line)
        if event.get("phase") == "train" and event["figures"].get("step", 0) >= 3:
            break
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 1
    said = "stopped, the output can't be written (Broken pipe); the same command goes on from the last finished piece"
    assert err.splitlines()[-1] == said
    [snapshot] = RunDir(out).iteration(0).snapshots.iterdir()
    assert int(snapshot.name.removeprefix("step-")) >= 4


def test_a_run_whose_lines_nobody_reads_says_so(command: list[str], tmp_path: Path) -> None:
    process = start(*command, "--out", str(tmp_path / "run"))
    assert process.stdout is not None and process.stderr is not None
    assert any("generate" in line for line in process.stdout)
    process.stdout.close()
    said = "stopped, the output can't be written (Broken pipe); the same command goes on from the last finished piece"
    assert process.stderr.read().splitlines()[-1:] == [said]
    assert process.wait(60) == 1


@pytest.mark.parametrize(
    ("times", "number"),
    [
        (1, signal.SIGINT),
        pytest.param(1, signal.SIGTERM, marks=pytest.mark.nightly),
        pytest.param(2, signal.SIGINT, marks=pytest.mark.nightly),
        pytest.param(2, signal.SIGTERM, marks=pytest.mark.nightly),
    ],
)
def test_a_training_that_is_stopped_goes_on_to_the_same_bytes(
    times: int, number: signal.Signals, command: list[str], undisturbed: bytes, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    folder = RunDir(out).iteration(0)
    process = start(*command, "--out", str(out))
    steps = training(process, out)
    asked = time.monotonic()
    for _ in range(times):
        process.send_signal(number)
        time.sleep(0.02)
    _, err = process.communicate(timeout=60)
    took = time.monotonic() - asked
    assert (process.returncode, err.splitlines()[-1]) == (128 + number, GOES_ON)
    assert took < LEAVES_WITHIN
    assert not folder.adapter.exists()
    assert take_away_damaged(RunDir(out)) == []
    if times == 1:
        [snapshot] = folder.snapshots.iterdir()
        # the status is a second old at most, and so is what is kept
        assert len(read_jsonl(snapshot / "metrics.jsonl")) >= steps
    subprocess.run([sys.executable, *command, "--out", str(out)], check=True, capture_output=True, env=ENVIRONMENT)
    assert (folder.adapter / "adapter_model.safetensors").read_bytes() == undisturbed
