"""Where a run stands, in lines: on terminals of several widths, and in a log."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from conftest import Clock
from made import PROMPT, meter_of_a_run, play, status_of
from rich.cells import cell_len

from qspin.watch.lines import panel, plain_line, span
from qspin.watch.meter import Meter


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
