"""What shows a run while it goes on: on a terminal, in a log, and in the docs."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import pytest
from conftest import Clock
from made import meter_of_a_run, play
from pages import blocks
from rich.cells import cell_len
from rich.console import Console

from qspin.watch.lines import ended_lines
from qspin.watch.meter import Meter
from qspin.watch.progress import Audience, Progress
from qspin.watch.view import PlainView, RunView, for_people


@pytest.fixture
def meter(clock: Clock) -> Meter:
    return meter_of_a_run(clock)


def capture(width: int, meter: Meter, clock: Clock) -> str:
    """All that stands on a screen of this width when the run is stopped."""
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    with pytest.raises(KeyboardInterrupt), RunView(console, meter) as view:
        play(Audience(meter, view), clock)
        raise KeyboardInterrupt
    assert isinstance(console.file, io.StringIO)
    return "".join(line.rstrip() + "\n" for line in console.file.getvalue().splitlines())


# --- on a terminal ---


@pytest.mark.parametrize(("width", "block"), [(80, 0), (120, 1)])
def test_the_page_shows_what_a_terminal_shows(width: int, block: int, meter: Meter, clock: Clock) -> None:
    shown = capture(width, meter, clock)
    assert blocks("watching.md", "On a terminal")[block] == shown
    assert max(cell_len(line) for line in shown.splitlines()) <= width


def test_a_live_terminal_is_left_clean(meter: Meter, clock: Clock) -> None:
    """The panel goes when the run is complete, what is finished stays, and the cursor is there again."""
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system="standard", legacy_windows=False)
    with for_people(console, meter) as view:
        assert isinstance(view, RunView)
        play(Audience(meter, view), clock)
    assert isinstance(console.file, io.StringIO)
    out = console.file.getvalue()
    assert "loading the model" in out
    assert "phase 50 min left" in out
    assert out.rindex("\x1b[?25h") > out.rindex("\x1b[?25l"), "the cursor is shown again"
    lines = screen(out)
    assert lines[3].startswith("base · evaluate  300 rows in 2 min 45 s  1.82 rows/s  NLL 3.822  ended 10%")
    assert lines[-2] == "iteration 1 (2 of 3) · train  3600/6000 pairs in 75 min  0.8 pairs/s  loss 0.483"
    assert lines[-1] == "  margin +0.840  real reward +0.300  generated reward -0.540  accuracy 77%"
    assert not [line for line in lines if " left  " in line or "completion" in line.split()]


def screen(out: str) -> list[str]:
    """What a terminal shows after it obeyed: line feeds, returns, the cursor up, erased lines."""
    lines, row, column = [""], 0, 0
    for up, erase, control, text in re.findall(
        r"\x1b\[(\d+)A|\x1b\[2(K)|\x1b\[[0-9;?]*[mhl]|([\r\n])|([^\x1b\r\n]+)", out
    ):
        if up:
            row -= int(up)
        elif erase:
            lines[row] = ""
        elif control:
            row, column = row + (control == "\n"), 0
            lines += [""] * (row + 1 - len(lines))
        elif text:
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
            column += len(text)
    return [line.rstrip() for line in lines if line.strip()]


def test_phases_leave_a_line_each(meter: Meter, clock: Clock) -> None:
    for phase in capture(100, meter, clock).splitlines():
        assert "…" not in phase or phase.startswith("  ")
    play(meter, clock)
    meter.phase("evaluate", iteration=1, total=400, done=0, unit="rows")
    assert meter.ended is not None
    [line] = ended_lines(meter.ended, 200)
    assert line.plain == (
        "iteration 1 (2 of 3) · train  3600/6000 pairs in 75 min  0.8 pairs/s  loss 0.483  margin +0.840  "
        "real reward +0.300  generated reward -0.540  accuracy 77%"
    )
    first, *more = ended_lines(meter.ended, 60)
    assert first.plain == "iteration 1 (2 of 3) · train  3600/6000 pairs in 75 min"
    assert all(line.plain.startswith("  ") for line in more)


# --- without a terminal ---


def log(meter: Meter, clock: Clock, events: Callable[[Progress], None]) -> list[str]:
    console = Console(file=io.StringIO(), width=60)
    view = PlainView(console, meter, clock)
    with view:
        events(Audience(meter, view))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_the_page_shows_what_a_log_shows(meter: Meter, clock: Clock) -> None:
    [shown] = blocks("watching.md", "In a log")
    lines = log(meter, clock, lambda progress: play(progress, clock))
    part = [line for line in lines if line.startswith("iteration 0 (1 of 3) · evaluate")]  # a short phase
    assert "\n".join(part) + "\n" == shown


def test_short_phases_have_two_lines(meter: Meter, clock: Clock) -> None:
    def events(progress: Progress) -> None:
        for iteration in (0, 1):
            progress.phase("score", iteration=iteration, total=20, done=0, unit="pairs")
            for _ in range(20):
                clock.now += 1
                progress.advance(1)
        progress.advance(0, nll=2.0)

    lines = log(meter, clock, events)
    assert [line.split("  ")[0] for line in lines] == [
        "iteration 0 (1 of 3) · score: 0/20 pairs",
        "iteration 0 (1 of 3) · score: 20/20 pairs",
        "iteration 1 (2 of 3) · score: 0/20 pairs",
        "iteration 1 (2 of 3) · score: 20/20 pairs",
    ]
    assert lines[1] == (
        "iteration 0 (1 of 3) · score: 20/20 pairs  1 pairs/s  0 s left  run ? left  memory 5.2 of 15.5 GiB"
    ), "on one line, however wide a terminal might be"
    assert lines[-1].endswith("  NLL 2.000"), "what the phase found is told with its end"


@pytest.mark.parametrize(
    ("seconds", "units"),
    [
        (10.0, [0, 3, 6, 9, 10]),  # half a minute apart at least
        (60.0, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),  # at every tenth
    ],
)
def test_lines_come_at_intervals(seconds: float, units: list[int], meter: Meter, clock: Clock) -> None:
    def events(progress: Progress) -> None:
        progress.phase("train", iteration=0, total=10, done=0, unit="pairs")
        for _ in range(10):
            clock.now += seconds
            progress.advance(1)

    lines = log(meter, clock, events)
    assert [int(re.findall(r"(\d+)/10", line)[0]) for line in lines] == units


def test_a_long_phase_has_a_line_every_five_minutes(meter: Meter, clock: Clock) -> None:
    def events(progress: Progress) -> None:
        progress.phase("train", iteration=0, total=1000, done=0, unit="pairs")
        for _ in range(50):
            clock.now += 60
            progress.advance(1)

    lines = log(meter, clock, events)
    assert [int(re.findall(r"(\d+)/1000", line)[0]) for line in lines] == [0, *range(5, 51, 5), 50]


def test_notes_and_nothing_else_where_there_is_nothing_to_do(meter: Meter, clock: Clock) -> None:
    assert log(meter, clock, lambda progress: progress.note("by the way")) == ["note: by the way"]


def test_which_view_a_person_gets(meter: Meter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(for_people(Console(file=io.StringIO(), force_terminal=True), meter), RunView)
    assert isinstance(for_people(Console(file=io.StringIO()), meter), PlainView)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(for_people(Console(file=io.StringIO(), force_terminal=True), meter), PlainView)
