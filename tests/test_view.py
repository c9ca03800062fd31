"""What a run looks like: on terminals of several widths, in a log, to a program, and in the docs."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Clock
from rich.cells import cell_len
from rich.console import Console

from qspin.config import load_config
from qspin.run_dir import RunDir
from qspin.watch.meter import Meter, Status, workload
from qspin.watch.progress import Audience, Progress
from qspin.watch.status import Standing
from qspin.watch.view import (
    JsonView,
    PlainView,
    RunView,
    ended_lines,
    for_people,
    one_line,
    panel,
    plain_line,
    span,
    standing_lines,
)

PAGE = ROOT / "docs" / "watching.md"
ROWS, HELDOUT = 1500, 100
PROMPT = "Why do acoustic guitars have a hollow body?"
COMPLETION = (
    "The hollow body of an acoustic guitar makes the sound of its strings louder.\n"
    "Try it: Twang a rubber band in your hand, then over an open box."
)


@pytest.fixture
def meter(clock: Clock) -> Meter:
    work = workload(RunDir(Path("none")), load_config(None, {"iterations": 3, "train.epochs": 2}), ROWS, HELDOUT)
    return Meter(work, {}, 3, lambda: (int(5.2 * 2**30), int(15.5 * 2**30)), clock)


def play(progress: Progress, clock: Clock) -> None:
    """Made-up figures: a run up to the middle of the second iteration's training."""

    def phase(
        name: str,
        iteration: int | None,
        total: int,
        unit: str,
        seconds: float,
        figures: Callable[[float], dict[str, float]] = lambda _share: {},
        did: float = 1.0,
    ) -> None:
        progress.phase(name, iteration=iteration, total=total, done=0, unit=unit)
        for part in range(1, 101):
            clock.now += did * seconds / 100
            progress.advance(did * total / 100, **figures(did * part / 100))

    def trained(share: float) -> dict[str, float]:
        return {
            "step": int(188 * share) - 1,
            "epoch": int(2 * share),
            "lr": 1e-4 * (1 - share),
            "loss": 0.693 - 0.35 * share,
            "margin": 1.4 * share,
            "accuracy": 0.5 + 0.45 * share,
            "real_reward": 0.5 * share,
            "generated_reward": -0.9 * share,
            "grad_norm": 0.8,
        }

    progress.note("mine.jsonl: 1600 good rows of 1604, format prompt-completion")
    progress.note("1500 training rows, 100 held out, 4 left out: 4 duplicate (line 9 says the same as line 3)")
    phase("evaluate", None, 3 * HELDOUT, "rows", 165)
    progress.advance(0, nll=3.822, two_sample_auc=0.74, length_auc=0.7, f1=0.151, tokens=46.0, ended=0.1)
    for iteration, pairs in ((0, ROWS), (1, 2 * ROWS)):
        phase("generate", iteration, ROWS, "rows", 1700, lambda _share: {"tokens/s": 31.0})
        progress.sampled(PROMPT, COMPLETION)
        phase("score", iteration, pairs, "pairs", 0.6 * pairs)
        did = 1.0 if iteration == 0 else 0.6
        phase("train", iteration, 2 * pairs, "pairs", 1.25 * 2 * pairs, trained, did)
        if iteration == 0:
            phase("evaluate", iteration, 4 * HELDOUT, "rows", 230)
            progress.advance(
                0, nll=3.068, two_sample_auc=0.83, reward_auc=0.91, f1=0.09, tokens=22.0, ended=0.83, kl=0.2
            )


def capture(width: int, meter: Meter, clock: Clock) -> str:
    """All that stands on a screen of this width when the run is stopped."""
    console = Console(file=io.StringIO(), width=width, color_system=None, legacy_windows=False)
    with pytest.raises(KeyboardInterrupt), RunView(console, meter) as view:
        play(Audience(meter, view), clock)
        raise KeyboardInterrupt
    assert isinstance(console.file, io.StringIO)
    return "".join(line.rstrip() + "\n" for line in console.file.getvalue().splitlines())


def blocks(heading: str) -> list[str]:
    """The code blocks of a section of the page."""
    _, _, section = PAGE.read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    assert section, heading
    return re.findall(r"^```[a-z]*\n(.*?)^```$", section.partition("\n## ")[0], re.MULTILINE | re.DOTALL)


def now(meter: Meter) -> Status:
    status = meter.status()
    assert status is not None
    return status


# --- on a terminal ---


@pytest.mark.parametrize(("width", "block"), [(80, 0), (120, 1)])
def test_the_page_shows_what_a_terminal_shows(width: int, block: int, meter: Meter, clock: Clock) -> None:
    shown = capture(width, meter, clock)
    assert blocks("On a terminal")[block] == shown
    assert max(cell_len(line) for line in shown.splitlines()) <= width


def test_the_panel_has_all_that_one_wants_to_know(meter: Meter, clock: Clock) -> None:
    play(meter, clock)
    lines = [line.plain for line in panel(now(meter), 120)]
    assert lines[0].startswith("iteration 1 (2 of 3) · train  ━")
    assert lines[0].endswith("─  3600/6000 pairs  60%")
    text = "\n".join(lines)
    # 1.25 s a pair; the run goes on with an evaluation and a third iteration like the second
    assert "0.8 pairs/s" in text
    assert f"phase {span(0.4 * 7500)} left" in text
    assert f"run {span(0.4 * 7500 + 230 + 1700 + 1800 + 7500 + 230)} left" in text
    assert "memory 5.2 of 15.5 GiB" in text
    for figure in ("loss 0.483", "margin +0.840", "real reward +0.300", "generated reward -0.540", "accuracy 77%"):
        assert figure in text
    assert f"prompt      {PROMPT}" in text
    assert "completion  The hollow body of an acoustic guitar makes the sound of its strings louder.↵Try it:" in text


@pytest.mark.parametrize("width", [20, 40, 59, 60, 80, 100, 120, 200])
def test_no_line_is_wider_than_the_terminal_and_no_number_is_cut(width: int, meter: Meter, clock: Clock) -> None:
    play(meter, clock)
    lines = [line.plain for line in panel(now(meter), width)]
    assert max(cell_len(line) for line in lines) <= width
    at = next(index for index, line in enumerate(lines) if line.startswith("  prompt"))
    figures, sample = lines[:at], lines[at:]
    assert sample[1].startswith("  completion  The")
    assert len(sample) == (2 if width == 200 else 3)
    if width >= 40:
        assert not any("…" in line for line in figures), "parts go to a line of their own"
        assert "run 4 h 01 min left" in "\n".join(figures)
    assert ("━" in lines[0]) == (width > 60), "a bar only where there is room for one"


def test_a_narrower_terminal_takes_more_lines_and_loses_nothing(meter: Meter, clock: Clock) -> None:
    play(meter, clock)
    wide, narrow = (panel(now(meter), width)[:-3] for width in (120, 45))
    assert len(narrow) > len(wide)

    def words(lines: list[Any]) -> list[str]:
        return [word for line in lines for word in line.plain.split() if not set(word) <= set("━─")]

    assert words(narrow) == words(wide)


def test_what_is_not_known_is_a_question_mark(meter: Meter, clock: Clock) -> None:
    meter.phase("generate", iteration=0, total=10, done=0, unit="rows")
    text = "\n".join(line.plain for line in panel(now(meter), 120))
    assert "phase ? left   run ? left" in text
    assert "/s" not in text
    clock.now += 10
    meter.advance(5)
    text = "\n".join(line.plain for line in panel(now(meter), 120))
    assert "0.5 rows/s   phase 10 s left   run ? left" in text


def test_figures_of_any_name_are_shown_but_those_for_programs(meter: Meter) -> None:
    meter.phase("calibrate", iteration=None, total=10, done=0, unit="layers")
    meter.advance(1, step=3, lr=0.1, worst_error=0.25, loss=1.0)
    text = "\n".join(line.plain for line in panel(now(meter), 120))
    assert "base · calibrate" in text
    assert "loss 1.000   worst error 0.25" in text
    assert "step" not in text


def test_the_warm_start_is_not_the_base(meter: Meter) -> None:
    for name, warm_start, titled in (
        ("evaluate", False, "base · evaluate"),
        ("warm start", True, "warm start"),
        ("evaluate", True, "warm start · evaluate"),
    ):
        meter.phase(name, iteration=None, total=10, done=0, unit="rows", warm_start=warm_start)
        assert plain_line(now(meter)).startswith(f"{titled}: 0/10 rows")
        assert now(meter).warm_start == warm_start


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (None, "?"), (0, "0 s"), (0.4, "0 s"), (48.3, "48 s"), (99.4, "99 s"), (99.6, "1 min 40 s"),
        (599.4, "9 min 59 s"), (599.6, "10 min"), (750, "12 min"), (5969, "99 min"), (5971, "1 h 40 min"),
        (3 * 3600 + 301, "3 h 05 min"), (47 * 3600, "47 h 00 min"), (52 * 3600 + 60, "2 d 4 h"),
    ],
)  # fmt: skip
def test_stretches_of_time(seconds: float | None, said: str) -> None:
    assert span(seconds) == said


def test_text_of_a_model_is_harmless() -> None:
    text = "a\n\tb\x1b[2J\x07\r\x9b31m \u202egnp.exe\u2028 [red]c[/red] é 漢字 \ud800"
    shown = one_line(text)
    assert shown == "a↵ b\ufffd[2J\ufffd \ufffd31m \ufffdgnp.exe  [red]c[/red] é 漢字 \ufffd"
    assert shown.isprintable()


def test_a_sample_is_cut_to_the_width_and_is_no_markup(meter: Meter) -> None:
    meter.phase("generate", iteration=0, total=10, done=0, unit="rows")
    meter.sampled("[red]what[/red]?", "漢字" * 100)
    prompt, completion, rest = panel(now(meter), 60)[-3:]
    assert prompt.plain == "  prompt      [red]what[/red]?"
    assert completion.plain == "  completion  " + "漢字" * 11 + "漢"
    assert rest.plain.startswith(" " * 14 + "字漢")
    assert rest.plain.endswith("…")
    assert 58 <= cell_len(rest.plain) <= 60


def test_a_short_sample_takes_one_line(meter: Meter) -> None:
    meter.phase("generate", iteration=0, total=10, done=0, unit="rows")
    for text in ("x" * 46, ""):
        meter.sampled("what?", text)
        assert [line.plain for line in panel(now(meter), 60)[-2:]] == ["  prompt      what?", f"  completion  {text}"]


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


def log_part(lines: list[str]) -> list[str]:
    """The lines of one short phase."""
    return [line for line in lines if line.startswith("iteration 0 (1 of 3) · evaluate")]


def test_the_page_shows_what_a_log_shows(meter: Meter, clock: Clock) -> None:
    [shown] = blocks("In a log")
    lines = log(meter, clock, lambda progress: play(progress, clock))
    assert "\n".join(log_part(lines)) + "\n" == shown


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


# --- to a program ---


def told(meter: Meter, clock: Clock, events: Callable[[Progress], None]) -> list[dict[str, Any]]:
    stream = io.StringIO()
    view = JsonView(stream, meter, clock)
    events(Audience(meter, view))
    view.end(Path("runs/mine/iteration-2/adapter"), Path("runs/mine/SUMMARY.md"))
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_the_page_lists_the_keys_of_every_event(meter: Meter, clock: Clock) -> None:
    _, _, section = PAGE.read_text(encoding="utf-8").partition("\n## For programs\n")
    rows = re.findall(r"^\| (.+?) \| (.+?) \|", section.partition("\n## ")[0], re.MULTILINE)
    documented: dict[str, set[str]] = {}
    for events, keys in rows[2:]:
        for event in re.findall(r"`(\w+)`", events):
            documented.setdefault(event, set()).update(re.findall(r"`(\w+)`", keys))
    everywhere = documented.pop("every")
    found: dict[str, set[str]] = {}
    for line in told(meter, clock, lambda progress: play(progress, clock)):
        found.setdefault(line["event"], set()).update(line.keys())
    assert found == {event: keys | everywhere for event, keys in documented.items()}
    assert (
        found["progress"]
        == {field.name for field in fields(Status)} - {"prompt", "completion", "baseline"} | everywhere
    )


def test_every_step_and_every_end_is_told_and_else_a_line_a_second(meter: Meter, clock: Clock) -> None:
    def events(progress: Progress) -> None:
        progress.phase("generate", iteration=0, total=10, done=0, unit="rows")
        for _ in range(20):
            clock.now += 0.25
            progress.advance(0.5)
        progress.phase("train", iteration=0, total=4, done=0, unit="pairs")
        for step in range(4):
            progress.advance(1, step=step, loss=0.5)
        progress.phase("evaluate", iteration=0, total=4, done=0, unit="rows")
        progress.advance(1)
        progress.advance(0, nll=3.0)

    lines = told(meter, clock, events)
    assert [(line["event"], line.get("phase"), line.get("done")) for line in lines] == [
        ("phase", "generate", 0),
        ("progress", "generate", 2),
        ("progress", "generate", 4),
        ("progress", "generate", 6),
        ("progress", "generate", 8),
        ("progress", "generate", 10),
        ("phase", "train", 0),
        *(("progress", "train", done) for done in (1, 2, 3, 4)),
        ("phase", "evaluate", 0),
        ("progress", "evaluate", 1),
        ("end", None, None),
    ]
    assert [line["figures"].get("step") for line in lines if line.get("phase") == "train"] == [None, 0, 1, 2, 3]
    assert lines[-2]["figures"] == {"nll": 3.0}


def test_samples_are_told_whole_and_in_ascii(meter: Meter, clock: Clock) -> None:
    stream = io.StringIO()
    view = JsonView(stream, meter, clock)
    view.sampled("why é?", "because\n\x1b[2J 漢字 \ud800" * 100)
    assert stream.getvalue().isascii()
    assert stream.getvalue().count("\n") == 1
    line = json.loads(stream.getvalue())
    assert (line["prompt"], line["completion"]) == ("why é?", "because\n\x1b[2J 漢字 \ud800" * 100)


# --- from another terminal ---


@pytest.mark.parametrize(
    ("state", "process", "first"),
    [
        ("not started", None, "runs/mine: not started; nothing has been done here yet"),
        ("starting", "process 7 on here", "runs/mine: starting (process 7 on here); it has begun no phase yet"),
        ("running", "process 7 on here", "runs/mine: running (process 7 on here), as of 12 s ago"),
        (
            "stopped",
            None,
            "runs/mine: stopped 12 s ago; the command that started it goes on from the last finished piece",
        ),
        ("finished", None, "runs/mine: finished, 3 iterations"),
    ],
)
def test_what_is_seen_of_a_run_from_outside(
    state: Any, process: str | None, first: str, meter: Meter, clock: Clock
) -> None:
    play(meter, clock)
    status = now(meter) if state not in {"not started", "starting"} else None
    standing = Standing(state, process, 3, status, 12.0 if status else None, 2 if state == "finished" else None)
    lines = [line.plain for line in standing_lines(standing, RunDir(Path("runs/mine")), 80)]
    assert lines[0] == first
    text = "\n".join(lines)
    assert ("3600/6000 pairs" in text) == (status is not None)
    assert ("left" in text) == (state == "running"), "a run that does nothing has no time left"
    assert ("adapter: runs/mine/iteration-2/adapter" in text) == (state == "finished")


def test_the_page_shows_what_status_shows(meter: Meter, clock: Clock) -> None:
    play(meter, clock)
    standing = Standing("running", "process 4711 on laptop", 1, now(meter), 2.0)
    lines = [line.plain.rstrip() for line in standing_lines(standing, RunDir(Path("runs/mine")), 80)]
    assert blocks("From another terminal")[-1] == "$ qspin status runs/mine\n" + "\n".join(lines) + "\n"


def test_a_baseline_is_told_from_its_run(meter: Meter, clock: Clock) -> None:
    play(meter, clock)
    own, round_of_it = now(meter), replace(now(meter), baseline=True, iterations=2)
    standing = Standing("running", "process 7 on here", 3, round_of_it, 12.0)
    first, panel_of_it, *_ = (line.plain for line in standing_lines(standing, RunDir(Path("runs/mine")), 80))
    assert first == "runs/mine: its baseline is running (process 7 on here), as of 12 s ago"
    assert panel_of_it.startswith("supervised round 1 (2 of 2) · train  ━")
    standing = Standing("finished", None, 3, own, 500.0, 2, (round_of_it, 12.0))
    *before, last = (line.plain for line in standing_lines(standing, RunDir(Path("runs/mine")), 80))
    assert last == "baseline, 12 s ago: supervised round 1 (2 of 2) · train, 3600/6000 pairs"
    assert before[3].startswith("iteration 1 (2 of 3) · train  ━")


def test_a_run_that_stopped_before_its_first_phase_says_no_time() -> None:
    standing = Standing("stopped", None, 0, None, None)
    [line] = standing_lines(standing, RunDir(Path("x")), 80)
    assert line.plain == "x: stopped; the command that started it goes on from the last finished piece"


def test_a_line_of_a_log_has_the_figures(meter: Meter, clock: Clock) -> None:
    play(meter, clock)
    assert plain_line(replace(now(meter), rate=None, phase_seconds_left=None, run_seconds_left=None)) == (
        "iteration 1 (2 of 3) · train: 3600/6000 pairs  ? left  run ? left  memory 5.2 of 15.5 GiB  loss 0.483  "
        "margin +0.840  real reward +0.300  generated reward -0.540  accuracy 77%"
    )


def test_one_iteration_is_one() -> None:
    standing = Standing("finished", None, 1, None, None, 0)
    lines = [line.plain for line in standing_lines(standing, RunDir(Path("runs/mine")), 80)]
    assert lines[0] == "runs/mine: finished, 1 iteration"
