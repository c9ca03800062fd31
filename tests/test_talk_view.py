"""A conversation as people and programs have it: what is shown, through pipes, and on real pseudo-terminals."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import re
import select
import shutil
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from command_line import COLOUR_VARIABLES, call
from rich.console import Console

from qspin.files import read_json, write_json
from qspin.records import Message
from qspin.run_dir import RunDir
from qspin.trials import talk_view
from qspin.trials.loaded import Loaded
from qspin.trials.talk import Show

EVIL = "\x1b[31mred\x1b]0;title\x07 [bold]b[/bold] :smile: \x9b2J\r"
ESCAPE = re.compile(r"\x1b(\[[\d;?]*[A-Za-z])?|[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f]")
BUSY = 300  # seconds that something may take on a busy machine
RICH = re.compile(r"\x1b\[([01]m|\?25[lh]|1A|2K)")  # what Rich itself writes here: bold, cursor, lines


# --- what is shown ---


@pytest.mark.parametrize("show", [talk_view.stacked, talk_view.columns])
def test_what_a_model_writes_is_text(show: Callable[..., contextlib.AbstractContextManager[Show]]) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, height=20, color_system="standard")
    with show(console, ["iteration 0", "the base"]) as piece:
        for character in EVIL:  # an escape in pieces is one all the same
            piece(0, character)
        piece(1, "plain")
    assert isinstance(console.file, io.StringIO)
    out = RICH.sub("", console.file.getvalue()).replace("\r", "")
    assert ESCAPE.search(out) is None
    assert "\ufffd[31mred\ufffd]0;title\ufffd [bold]b[/bold] :smile: \ufffd2J" in out


def test_two_columns_show_the_ends_while_they_grow_and_then_all() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=10, color_system=None)
    assert isinstance(console.file, io.StringIO)
    with talk_view.columns(console, ["iteration 0", "the base"]) as piece:
        for number in range(30):
            piece(0, f"left {number}\n")
            piece(1, f"right {number}\n")
        deadline = time.monotonic() + BUSY
        while "left 29" not in (live := console.file.getvalue()):
            assert time.monotonic() < deadline
            time.sleep(1 / talk_view.FRAMES)
    assert "left 5 " not in live, "more than the screen has room for"
    final = console.file.getvalue()[len(live) :].splitlines()
    for number in range(30):
        assert any(re.search(rf"left {number} +right {number}$", line.rstrip()) for line in final)


# --- through pipes ---


def piped(run: RunDir, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qspin.cli", "chat", str(run.path), *options],
        input=text,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        env=environment(),
        timeout=600,
        check=False,
    )


def environment(**variables: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in {*COLOUR_VARIABLES, "COLUMNS", "LINES"}}
    return {**kept, "OMP_NUM_THREADS": "1", **variables}


def test_each_line_of_a_pipe_is_a_message(played_run: RunDir, loaded: Loaded) -> None:
    done = piped(
        played_run, "What is 1?\n\n/new\n", "--iteration", "base", "--max-new-tokens", "60", "--temperature", "3"
    )
    loaded.seat("base")
    turns: list[Message] = []
    for seed, text in enumerate(("What is 1?", "/new")):
        turns.append(Message("user", text))
        [reply] = loaded.reply([turns], max_new_tokens=60, temperature=3.0, top_p=1.0, seed=seed)
        turns.append(Message("assistant", reply.text))
    wanted = "".join(f"{turn.content}\n" for turn in turns[1::2])
    assert ESCAPE.search(wanted), "a random model writes what terminals obey"
    assert ESCAPE.search(done.stdout) is None
    assert done.stdout == talk_view.visible(wanted)
    assert (done.returncode, "> " in done.stderr) == (0, False)
    assert "cut at 60 tokens" in done.stderr


def test_a_base_that_came_out_otherwise_here_is_told_of(played_run: RunDir, tmp_path: Path) -> None:
    copy = RunDir(tmp_path / "run")
    shutil.copytree(played_run.path, copy.path)
    write_json(copy.record, read_json(copy.record) | {"base_hash": "0" * 64, "quantised_by": "another card"})
    done = piped(copy, "What is 1?\n")
    assert done.returncode == 0
    assert f"are not those that {copy.path} began with (another device" in done.stderr
    assert "began with" not in piped(played_run, "What is 1?\n").stderr


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("many words " * 300, "a conversation of .* more than the model's 512"),
        ("a byte that is no text: \udcff", "the user text contains .* which is not plain text"),
    ],
)
def test_a_message_that_can_not_be_answered_ends_a_pipe(message: str, told: str, played_run: RunDir) -> None:
    done = piped(played_run, f"What is 1?\n{message}\nWhat is 2?\n", "--versus", "base")
    assert done.returncode == 1
    assert re.search(f"^error: {told}", done.stderr, re.MULTILINE)
    assert done.stdout.count("the base\n") == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--iteration", "7"], "error: --iteration: '7' is not finished"),
        (["--versus", "7"], "error: --versus: '7' is not finished"),
        (["--iteration", "0", "--versus", "0"], "both are iteration 0; name two players"),
        (["--temperature", "nan"], "temperature: nan is not a number from 0 on"),
        (["--top-p", "2"], "--top-p: 2.0 is not above 0 and at most 1"),
    ],
)
def test_wrong_options_are_one_line_before_anything_is_loaded(
    played_run: RunDir, options: list[str], told: str
) -> None:
    answer = call("chat", played_run.path, *options)
    assert (answer.code, answer.out) == (1, "")
    [line] = answer.err.splitlines()
    assert told in line


def test_no_run(tmp_path: Path) -> None:
    assert call("chat", tmp_path).err == f"error: {tmp_path}: not the folder of a run, it has no run.json\n"


# --- on a terminal ---


# becomes Python with what follows, in a session of its own, which the terminal's keys act on
LOGGED_IN = "import os, sys; os.login_tty(0); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"


class Terminal:
    """`qspin chat` on a pseudo-terminal of its own."""

    def __init__(self, run: RunDir, *options: str, columns: int = 80) -> None:
        self.keyboard, inside = os.openpty()
        fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOGGED_IN, "-m", "qspin.cli", "chat", str(run.path), *options],
            stdin=inside,
            stdout=inside,
            stderr=inside,
            env=environment(TERM="xterm"),
        )
        os.close(inside)
        self._seen = ""

    def type(self, keys: str) -> None:
        os.write(self.keyboard, keys.encode())

    def until(self, text: str) -> str:
        """All that came since the last time, up to a text and with it."""
        self._wait(text, lambda: text in self._seen)
        before, _, self._seen = self._seen.partition(text)
        return before + text

    def until_it_replies(self) -> None:
        self._wait("a word", lambda: bool(re.search(r"\w", ESCAPE.sub("", self._seen))))

    def until_it_listens(self) -> None:
        """The line editor shows its prompt before it waits for keys, and between the two it hears no signal."""
        deadline = time.monotonic() + BUSY
        while psutil.Process(self.process.pid).status() != psutil.STATUS_SLEEPING:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def _wait(self, awaited: str, come: Callable[[], bool]) -> None:
        deadline = time.monotonic() + BUSY
        while not come():
            assert time.monotonic() < deadline, f"no {awaited!r} in {self._seen!r}"
            if select.select([self.keyboard], [], [], 1)[0]:
                try:
                    self._seen += os.read(self.keyboard, 65536).decode(errors="replace")
                except OSError:  # the other side is closed
                    assert come(), f"no {awaited!r} in {self._seen!r}"

    def ask(self, keys: str) -> str:
        """What comes between a line and the next prompt."""
        self.type(f"{keys}\r")
        self.until("\r\n")  # the line itself
        return self.until("> ")

    def end(self) -> int:
        """Its exit code, once it has left."""
        deadline = time.monotonic() + 60
        with contextlib.suppress(OSError):  # the other side is closed
            while time.monotonic() < deadline:
                if select.select([self.keyboard], [], [], 1)[0]:
                    os.read(self.keyboard, 65536)
        try:
            code = self.process.wait(60)
        finally:
            self.process.kill()  # unless it has left
        os.close(self.keyboard)
        return code


def test_a_conversation_on_a_terminal(played_run: RunDir, loaded: Loaded) -> None:
    terminal = Terminal(played_run, "--iteration", "1", "--max-new-tokens", "10", "--temperature", "0")
    assert "iteration 1, temperature 0; /help lists the commands" in terminal.until("> ")
    loaded.seat("1")

    def greedy(*turns: Message) -> str:
        return loaded.reply([turns], max_new_tokens=10, temperature=0)[0].text

    first = greedy(Message("user", "What is 1?"))
    assert talk_view.visible(first) in terminal.ask("What is 1?").replace("\r\n", "\n")
    assert "error: no command /foo; /help lists them" in terminal.ask("/foo")
    assert "a new conversation" in terminal.ask("/new")
    # a paste as terminals mark it, and as they do not, is one message
    pasted = greedy(Message("user", "What\nis 2?"))
    assert talk_view.visible(pasted) in terminal.ask("\x1b[200~What\nis 2?\x1b[201~").replace("\r\n", "\n")
    terminal.ask("/new")
    terminal.type("What\ris 2?\r")
    assert talk_view.visible(pasted) in terminal.until("h> ").replace("\r\n", "\n")
    # the line before the last, mended with the keys of a line editor
    assert "a new conversation" in terminal.ask("/nex\x7fw")
    assert "a new conversation" in terminal.ask("\x1b[A")
    terminal.type("\x04")
    assert terminal.end() == 0


def test_ctrl_c_stops_a_reply_and_then_leaves(played_run: RunDir) -> None:
    long = ("--max-new-tokens", "450", "--temperature", "1", "--seed", "1")  # whose reply does not end by itself
    terminal = Terminal(played_run, "--iteration", "base", *long)
    terminal.until("> ")
    terminal.type("Hi\r")
    terminal.until("\n")
    terminal.until_it_replies()
    terminal.type("\x03")
    said = terminal.until("stopped; what was said is kept")
    assert "cut at" not in said
    terminal.until("> ")
    assert "a new conversation" in terminal.ask("/new"), "it goes on"
    terminal.type("Hi\r")
    terminal.until("\n")
    terminal.until_it_replies()
    terminal.type("\x03")
    terminal.until("stopped; what was said is kept")  # the second reply as well, and the process is not gone
    terminal.until("> ")
    terminal.until_it_listens()
    terminal.type("\x03")
    assert terminal.end() == 0


@pytest.mark.slow
def test_two_players_stand_side_by_side_where_there_is_room(played_run: RunDir) -> None:
    for columns, side_by_side in ((120, True), (60, False)):
        terminal = Terminal(played_run, "--iteration", "0", "--versus", "base", columns=columns)
        terminal.until("> ")
        shown = terminal.ask("What is 1?")
        heads = [line for line in re.split(r"[\r\n]+", ESCAPE.sub("", shown)) if "iteration 0" in line]
        heads = [line for line in heads if "cut at" not in line]
        assert heads
        assert all(("the base" in head) == side_by_side for head in heads)
        terminal.type("/quit\r")
        assert terminal.end() == 0
