"""Where a run stands, in lines: on terminals of several widths, and in a log."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Clock
from made import PROMPT, meter_of_a_run, midway, play, status_of
from pages import blocks
from rich.cells import cell_len

from qspin.run_dir import RunDir
from qspin.watch.lines import panel, plain_line, span, standing_lines
from qspin.watch.meter import Meter
from qspin.watch.status import Standing


@pytest.fixture
def meter(clock: Clock) -> Meter:
    return meter_of_a_run(clock)


def test_the_panel_has_all_that_one_wants_to_know(meter: Meter, clock: Clock) -> None:
    play(meter, clock)
    lines = [line.plain for line in panel(status_of(meter), 120)]
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
    lines = [line.plain for line in panel(status_of(meter), width)]
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
    wide, narrow = (panel(status_of(meter), width)[:-3] for width in (120, 45))
    assert len(narrow) > len(wide)

    def words(lines: list[Any]) -> list[str]:
        return [word for line in lines for word in line.plain.split() if not set(word) <= set("━─")]

    assert words(narrow) == words(wide)


def test_what_is_not_known_is_a_question_mark(meter: Meter, clock: Clock) -> None:
    meter.phase("generate", iteration=0, total=10, done=0, unit="rows")
    text = "\n".join(line.plain for line in panel(status_of(meter), 120))
    assert "phase ? left   run ? left" in text
    assert "/s" not in text
    clock.now += 10
    meter.advance(5)
    text = "\n".join(line.plain for line in panel(status_of(meter), 120))
    assert "0.5 rows/s   phase 10 s left   run ? left" in text


def test_figures_of_any_name_are_shown_but_those_for_programs(meter: Meter) -> None:
    meter.phase("calibrate", iteration=None, total=10, done=0, unit="layers")
    meter.advance(1, step=3, lr=0.1, worst_error=0.25, loss=1.0)
    text = "\n".join(line.plain for line in panel(status_of(meter), 120))
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
        assert plain_line(status_of(meter)).startswith(f"{titled}: 0/10 rows")
        assert status_of(meter).warm_start == warm_start


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


def test_a_sample_is_cut_to_the_width_and_is_no_markup(meter: Meter) -> None:
    meter.phase("generate", iteration=0, total=10, done=0, unit="rows")
    meter.sampled("[red]what[/red]?", "漢字" * 100)
    prompt, completion, rest = panel(status_of(meter), 60)[-3:]
    assert prompt.plain == "  prompt      [red]what[/red]?"
    assert completion.plain == "  completion  " + "漢字" * 11 + "漢"
    assert rest.plain.startswith(" " * 14 + "字漢")
    assert rest.plain.endswith("…")
    assert 58 <= cell_len(rest.plain) <= 60


def test_a_short_sample_takes_one_line(meter: Meter) -> None:
    meter.phase("generate", iteration=0, total=10, done=0, unit="rows")
    for text in ("x" * 46, ""):
        meter.sampled("what?", text)
        assert [line.plain for line in panel(status_of(meter), 60)[-2:]] == [
            "  prompt      what?",
            f"  completion  {text}",
        ]


def test_a_line_of_a_log_has_the_figures(meter: Meter, clock: Clock) -> None:
    play(meter, clock)
    assert plain_line(replace(status_of(meter), rate=None, phase_seconds_left=None, run_seconds_left=None)) == (
        "iteration 1 (2 of 3) · train: 3600/6000 pairs  ? left  run ? left  memory 5.2 of 15.5 GiB  loss 0.483  "
        "margin +0.840  real reward +0.300  generated reward -0.540  accuracy 77%"
    )


# --- of a run from outside ---


def shown(standing: Standing) -> list[str]:
    return [line.plain for line in standing_lines(standing, RunDir(Path("runs/mine")), 80)]


@pytest.mark.parametrize(
    ("state", "process", "first"),
    [
        ("not started", None, "runs/mine: not started; nothing has been done here yet"),
        ("starting", "process 7 on here", "runs/mine: starting (process 7 on here); it has begun no phase yet"),
        ("running", "process 7 on here", "runs/mine: running (process 7 on here), as of 12 s ago"),
        (
            "paused",
            "process 7 on here",
            "runs/mine: paused (process 7 on here), as of 12 s ago; fg in its terminal, or kill -CONT with its number, "
            "lets it go on",
        ),
        (
            "stopped",
            None,
            "runs/mine: stopped 12 s ago; the command that started it goes on from the last finished piece",
        ),
        ("finished", None, "runs/mine: finished, 3 iterations"),
    ],
)
def test_what_is_seen_of_a_run_from_outside(state: Any, process: str | None, first: str) -> None:
    status = midway() if state not in {"not started", "starting"} else None
    standing = Standing(state, process, 3, status, 12.0 if status else None, 2 if state == "finished" else None)
    lines = shown(standing)
    assert lines[0] == first
    text = "\n".join(lines)
    assert ("3600/6000 pairs" in text) == (status is not None)
    assert ("left" in text) == (state == "running"), "a run that does nothing has no time left"
    assert ("adapter: runs/mine/iteration-2/adapter" in text) == (state == "finished")


def test_the_page_shows_what_status_shows() -> None:
    standing = Standing("running", "process 4711 on laptop", 1, midway(), 2.0)
    lines = [line.rstrip() for line in shown(standing)]
    assert blocks("watching.md", "From another terminal")[-1] == "$ qspin status runs/mine\n" + "\n".join(lines) + "\n"


def test_a_baseline_is_told_from_its_run() -> None:
    own = midway()
    round_of_it = replace(own, baseline=True, iterations=2)
    standing = Standing("running", "process 7 on here", 3, round_of_it, 12.0)
    first, panel_of_it, *_ = shown(standing)
    assert first == "runs/mine: its baseline is running (process 7 on here), as of 12 s ago"
    assert panel_of_it.startswith("supervised round 1 (2 of 2) · train  ━")
    standing = Standing("finished", None, 3, own, 500.0, 2, (round_of_it, 12.0))
    *before, last = shown(standing)
    assert last == "baseline, 12 s ago: supervised round 1 (2 of 2) · train, 3600/6000 pairs"
    assert before[2].startswith("iteration 1 (2 of 3) · train  ━")


def test_a_run_that_was_paused_as_it_loaded_says_no_time() -> None:
    [line] = shown(Standing("paused", "process 7 on here", 0, None, None))
    advice = "fg in its terminal, or kill -CONT with its number, lets it go on"
    assert line == f"runs/mine: paused (process 7 on here); {advice}"


def test_a_run_that_stopped_before_its_first_phase_says_no_time() -> None:
    standing = Standing("stopped", None, 0, None, None)
    [line] = shown(standing)
    assert line == "runs/mine: stopped; the command that started it goes on from the last finished piece"


def test_one_iteration_is_one() -> None:
    standing = Standing("finished", None, 1, None, None, 0)
    assert shown(standing)[0] == "runs/mine: finished, 1 iteration"
