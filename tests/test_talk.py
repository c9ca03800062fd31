"""Talking with the players of a run: in this process, through pipes, and on real pseudo-terminals."""

from __future__ import annotations

import contextlib
import datetime
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import torch
from conftest import COLOUR_VARIABLES, call, played_small
from rich.console import Console

from qspin.config import load_config
from qspin.errors import QspinError
from qspin.figures.evaluation import read_evaluation
from qspin.files import read_json, write_json
from qspin.prepare import prepare
from qspin.records import Message
from qspin.run_dir import RunDir
from qspin.trials import loaded as loaded_module
from qspin.trials import talk_view
from qspin.trials.loaded import Loaded
from qspin.trials.talk import COMMANDS, Manner, Show, Talk, Turn

GREEDY = Manner(temperature=0, top_p=1, max_new_tokens=10)
WILD = Manner(temperature=2.0, top_p=1, max_new_tokens=40)
EVIL = "\x1b[31mred\x1b]0;title\x07 [bold]b[/bold] :smile: \x9b2J\r"
ESCAPE = re.compile(r"\x1b(\[[\d;?]*[A-Za-z])?|[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f]")
BUSY = 300  # seconds that something may take on a busy machine
RICH = re.compile(r"\x1b\[([01]m|\?25[lh]|1A|2K)")  # what Rich itself writes here: bold, cursor, lines


@pytest.fixture(scope="module")
def run_dir(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return played_small(tiny_folder("llama"), tmp_path_factory.mktemp("talk"))


@pytest.fixture(scope="module")
def loaded(run_dir: RunDir) -> Loaded:
    return Loaded.open(run_dir)


class Recorder:
    """A screen that remembers, and at some piece does something."""

    def __init__(self, at_piece: Callable[[int], None] = lambda _count: None) -> None:
        self.turns: list[dict[str, str]] = []
        self.notes: list[str] = []
        self._at_piece, self._count = at_piece, 0

    @contextlib.contextmanager
    def replies(self, names: Sequence[str]) -> Iterator[Show]:
        self.turns.append(dict.fromkeys(names, ""))

        def show(place: int, piece: str) -> None:
            self.turns[-1][names[place]] += piece
            self._count += 1
            self._at_piece(self._count)

        yield show

    def note(self, text: str) -> None:
        self.notes.append(text)


# --- turns ---


def test_each_player_answers_as_it_did_when_it_was_measured(run_dir: RunDir, loaded: Loaded) -> None:
    screen = Recorder()
    talk = Talk(loaded, ["base", "1"], GREEDY, screen)
    prompts = prepare(load_config(run_dir.config), datetime.date(2026, 1, 2)).heldout_prompts
    for prompt in prompts:
        assert talk.hear(prompt)
        assert talk.hear("/new")
    measured = {"the base": run_dir.base, "iteration 1": run_dir.iteration(1)}
    for name, folder in measured.items():
        assert [turn[name] for turn in screen.turns] == read_evaluation(folder.evaluation).greedy_completions
    assert screen.turns[0]["the base"] != screen.turns[0]["iteration 1"]
    assert any("cut at 10 tokens" in note for note in screen.notes)


def test_each_goes_on_from_its_own_answers(loaded: Loaded) -> None:
    screen = Recorder()
    talk = Talk(loaded, ["0", "1"], WILD, screen, system="Be brief.", seed=5)
    talk.hear("What is 1?")
    talk.hear("And 2?")
    first, second = screen.turns
    for player, name in (("0", "iteration 0"), ("1", "iteration 1")):
        conversation = [
            Message("system", "Be brief."),
            Message("user", "What is 1?"),
            Message("assistant", first[name]),
            Message("user", "And 2?"),
        ]
        loaded.seat(player)
        [reply] = loaded.reply([conversation], max_new_tokens=40, temperature=2.0, seed=6)
        assert reply.text == second[name]
    assert first["iteration 0"] != first["iteration 1"]


def test_a_retry_is_another_sample_in_place_of_the_last(loaded: Loaded) -> None:
    screen = Recorder()
    talk = Talk(loaded, ["0"], WILD, screen)
    with pytest.raises(QspinError, match="nothing has been asked"):
        talk.hear("/retry")
    talk.hear("What is 1?")
    talk.hear("/retry")
    first, second = (turn["iteration 0"] for turn in screen.turns)
    assert first != second
    assert [(turn.question, turn.answer) for turn in talk.seats[0].turns] == [("What is 1?", second)]
    talk.hear("/temperature 0")
    talk.hear("/retry")
    assert any("takes the likeliest" in note for note in screen.notes)
    assert len(talk.seats[0].turns) == 1


def test_a_reply_that_is_stopped_keeps_what_was_said(loaded: Loaded) -> None:
    def stop(count: int) -> None:
        if count == 5:
            raise SystemExit(130)

    screen = Recorder(stop)
    talk = Talk(loaded, ["0", "1"], WILD, screen)
    with pytest.raises(SystemExit):
        talk.hear("What is 1?")
    [turn] = talk.seats[0].turns
    assert turn.answer == screen.turns[0]["iteration 0"] != ""
    assert talk.seats[1].turns == [], "who had said nothing has no such turn"
    talk.hear("And 2?")
    assert [turn.question for turn in talk.seats[0].turns] == ["What is 1?", "And 2?"]
    assert [turn.question for turn in talk.seats[1].turns] == ["And 2?"]


def test_a_retry_that_is_stopped_before_its_first_word_changes_nothing(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Talk(loaded, ["0"], WILD, Recorder())
    talk.hear("What is 1?")
    before = list(talk.seats[0].turns)
    stop = SystemExit(130)
    monkeypatch.setattr(loaded, "_prompt", lambda *_: (_ for _ in ()).throw(stop))
    with pytest.raises(SystemExit):
        talk.hear("/retry")
    assert talk.seats[0].turns == before


def test_a_full_context_is_told_and_the_conversation_is_kept(loaded: Loaded) -> None:
    talk = Talk(loaded, ["0"], GREEDY, Recorder())
    talk.hear("What is 1?")
    kept = list(talk.seats[0].turns)
    with pytest.raises(QspinError, match="more than the model's 512; begin a new one") as caught:
        talk.hear("many words " * 300)
    assert "\n" not in str(caught.value)
    assert talk.seats[0].turns == kept
    talk.hear("/retry")  # of the last question that was answered
    assert [turn.question for turn in talk.seats[0].turns] == ["What is 1?"]
    talk.hear("What is 2?")
    assert len(talk.seats[0].turns) == 2


def test_memory_that_runs_out_is_told_and_the_conversation_is_kept(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no room")

    screen = Recorder()
    talk = Talk(loaded, ["0"], GREEDY, screen)
    talk.hear("What is 1?")
    before = [*talk.seats[0].turns]
    with monkeypatch.context() as patch:
        patch.setattr(loaded_module, "generate", refuse)
        with pytest.raises(QspinError) as caught:
            talk.hear("And 2?")
    assert str(caught.value) == "out of memory (no room); /new starts over, with a shorter conversation"
    assert talk.seats[0].turns == before
    assert talk.hear("And 2?")


def test_what_one_of_two_can_not_answer_neither_has_been_asked(loaded: Loaded) -> None:
    talk = Talk(loaded, ["0", "1"], WILD, Recorder())
    talk.hear("What is 1?")
    talk.seats[1].turns = [Turn(0, "many words " * 300, "so many"), *talk.seats[1].turns]
    before = [list(seat.turns) for seat in talk.seats]
    for asked in ("And 2?", "/retry"):
        with pytest.raises(QspinError, match="more than the model's 512"):
            talk.hear(asked)
        assert [seat.turns for seat in talk.seats] == before, asked


# --- commands ---


def test_a_new_seat_goes_on_from_the_conversation(loaded: Loaded) -> None:
    screen = Recorder()
    talk = Talk(loaded, ["0"], GREEDY, screen)
    talk.hear("What is 1?")
    past = talk.seats[0].turns
    talk.hear("/seat base last")
    assert [(seat.player, seat.turns) for seat in talk.seats] == [("base", past), ("1", past)]
    talk.hear("And 2?")
    base, last = (seat.turns for seat in talk.seats)
    assert base[1].answer != last[1].answer
    talk.hear("/seat 1")
    assert [(seat.player, seat.turns) for seat in talk.seats] == [("1", last)], "it keeps its own past"
    for wrong in ("/seat", "/seat 9", "/seat a b c"):
        with pytest.raises(QspinError, match=r"^/seat: .*last, best"):
            talk.hear(wrong)
    with pytest.raises(QspinError, match="both are iteration 1; name two"):
        talk.hear("/seat 1 last")
    assert [seat.player for seat in talk.seats] == ["1"]


def test_a_system_message_comes_and_goes(loaded: Loaded) -> None:
    screen = Recorder()
    talk = Talk(loaded, ["1"], GREEDY, screen)
    for text in ("/system Answer with a song.", "What is 1?", "/new", "/system", "What is 1?"):
        talk.hear(text)
    sung, said = (turn["iteration 1"] for turn in screen.turns)
    system = [Message("system", "Answer with a song.")]
    for answer, before in ((sung, system), (said, [])):
        [reply] = loaded.reply([[*before, Message("user", "What is 1?")]], max_new_tokens=10, temperature=0)
        assert reply.text == answer
    assert sung != said


def test_commands(loaded: Loaded) -> None:
    screen = Recorder()
    talk = Talk(loaded, ["1"], GREEDY, screen)
    assert talk.hear("/help")
    for name in COMMANDS:
        assert any(note.startswith(name) for note in screen.notes)
    assert not talk.hear("/quit")
    with pytest.raises(QspinError, match=r"^no command /foo; /help lists them$"):
        talk.hear("/foo bar\nand more")
    talk.hear("/temperature 1.5")
    assert talk.manner.temperature == 1.5
    for wrong in ("/temperature", "/temperature hot", "/temperature -1", "/temperature nan"):
        with pytest.raises(QspinError, match=r"a number from 0 on, as 0\.7"):
            talk.hear(wrong)
    talk.hear(" /etc is a folder")  # no command
    assert talk.seats[0].turns[0].question == "/etc is a folder"


@pytest.mark.parametrize("figures", [(-1, 1, 1), (float("inf"), 1, 1), (1, 0, 1), (1, 1.1, 1), (1, 1, 0)])
def test_figures_out_of_bounds(figures: tuple[float, float, int]) -> None:
    with pytest.raises(QspinError, match=r"temperature|top-p|max-new-tokens"):
        Manner(*figures)


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
        time.sleep(3 / talk_view.FRAMES)
        live = console.file.getvalue()
    assert "left 29" in live
    assert "left 5 " not in live, "more than the screen has room for"
    final = console.file.getvalue()[len(live) :].splitlines()
    for number in range(30):
        assert any(re.search(rf"left {number} +right {number}$", line.rstrip()) for line in final)


# --- through pipes ---


def piped(run_dir: RunDir, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "qspin.cli", "chat", str(run_dir.path), *options],
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


def test_each_line_of_a_pipe_is_a_message(run_dir: RunDir, loaded: Loaded) -> None:
    done = piped(run_dir, "What is 1?\n\n/new\n", "--iteration", "base", "--max-new-tokens", "60", "--temperature", "3")
    screen = Recorder()
    talk = Talk(loaded, ["base"], Manner(3.0, 1.0, 60), screen)
    talk.hear("What is 1?")
    talk.hear(" /new")
    wanted = "".join(turn["the base"] + "\n" for turn in screen.turns)
    assert ESCAPE.search(wanted), "a random model writes what terminals obey"
    assert ESCAPE.search(done.stdout) is None
    assert done.stdout == talk_view.visible(wanted)
    assert (done.returncode, "> " in done.stderr) == (0, False)
    assert "cut at 60 tokens" in done.stderr


def test_a_base_that_came_out_otherwise_here_is_told_of(run_dir: RunDir, tmp_path: Path) -> None:
    copy = RunDir(tmp_path / "run")
    shutil.copytree(run_dir.path, copy.path)
    write_json(copy.record, read_json(copy.record) | {"base_hash": "0" * 64, "quantised_by": "another card"})
    done = piped(copy, "What is 1?\n")
    assert done.returncode == 0
    assert f"are not those that {copy.path} began with (another device" in done.stderr
    assert "began with" not in piped(run_dir, "What is 1?\n").stderr


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("many words " * 300, "a conversation of .* more than the model's 512"),
        ("a byte that is no text: \udcff", "the user text contains .* which is not plain text"),
    ],
)
def test_a_message_that_can_not_be_answered_ends_a_pipe(message: str, told: str, run_dir: RunDir) -> None:
    done = piped(run_dir, f"What is 1?\n{message}\nWhat is 2?\n", "--versus", "base")
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
def test_wrong_options_are_one_line_before_anything_is_loaded(run_dir: RunDir, options: list[str], told: str) -> None:
    answer = call("chat", run_dir.path, *options)
    assert (answer.code, answer.out) == (1, "")
    [line] = answer.err.splitlines()
    assert told in line


def test_no_run(tmp_path: Path) -> None:
    assert call("chat", tmp_path).err == f"error: {tmp_path}: not the folder of a run, it has no run.json\n"


# --- on a terminal ---


class Terminal:
    """`qspin chat` on a pseudo-terminal of its own."""

    def __init__(self, run_dir: RunDir, *options: str, columns: int = 80) -> None:
        self.keyboard, inside = os.openpty()
        fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qspin.cli", "chat", str(run_dir.path), *options],
            stdin=inside,
            stdout=inside,
            stderr=inside,
            env=environment(TERM="xterm"),
            preexec_fn=lambda: os.login_tty(inside),  # noqa: PLW1509 (it takes no lock)
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


def test_a_conversation_on_a_terminal(run_dir: RunDir, loaded: Loaded) -> None:
    terminal = Terminal(run_dir, "--iteration", "1", "--max-new-tokens", "10", "--temperature", "0")
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


def test_ctrl_c_stops_a_reply_and_then_leaves(run_dir: RunDir) -> None:
    long = ("--max-new-tokens", "450", "--temperature", "1", "--seed", "1")  # whose reply does not end by itself
    terminal = Terminal(run_dir, "--iteration", "base", *long)
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


def test_two_players_stand_side_by_side_where_there_is_room(run_dir: RunDir) -> None:
    for columns, side_by_side in ((120, True), (60, False)):
        terminal = Terminal(run_dir, "--iteration", "0", "--versus", "base", columns=columns)
        terminal.until("> ")
        shown = terminal.ask("What is 1?")
        heads = [line for line in re.split(r"[\r\n]+", ESCAPE.sub("", shown)) if "iteration 0" in line]
        heads = [line for line in heads if "cut at" not in line]
        assert heads
        assert all(("the base" in head) == side_by_side for head in heads)
        terminal.type("/quit\r")
        assert terminal.end() == 0
