"""What a program is told of a run under way: a line of JSON an event, with the keys that the docs list."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from conftest import Clock
from made import meter_of_a_run, play
from pages import section

from qspin.watch.meter import Status
from qspin.watch.progress import Audience, Progress
from qspin.watch.view import JsonView


def told(events: Callable[[Progress, Clock], None]) -> list[dict[str, Any]]:
    stream, clock = io.StringIO(), Clock()
    meter = meter_of_a_run(clock)
    view = JsonView(stream, meter, clock)
    events(Audience(meter, view), clock)
    view.end(Path("runs/mine/iteration-2/adapter"), Path("runs/mine/SUMMARY.md"))
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_the_page_lists_the_keys_of_every_event() -> None:
    rows = re.findall(r"^\| (.+?) \| (.+?) \|", section("watching.md", "For programs"), re.MULTILINE)
    documented: dict[str, set[str]] = {}
    for events, keys in rows[2:]:
        for event in re.findall(r"`(\w+)`", events):
            documented.setdefault(event, set()).update(re.findall(r"`(\w+)`", keys))
    everywhere = documented.pop("every")
    found: dict[str, set[str]] = {}
    for line in told(play):
        found.setdefault(line["event"], set()).update(line.keys())
    assert found == {event: keys | everywhere for event, keys in documented.items()}
    assert (
        found["progress"]
        == {field.name for field in fields(Status)} - {"prompt", "completion", "baseline"} | everywhere
    )


def test_every_step_and_every_end_is_told_and_else_a_line_a_second() -> None:
    def events(progress: Progress, clock: Clock) -> None:
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

    lines = told(events)
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


def test_samples_are_told_whole_and_in_ascii(clock: Clock) -> None:
    stream = io.StringIO()
    view = JsonView(stream, meter_of_a_run(clock), clock)
    view.sampled("why é?", "because\n\x1b[2J 漢字 \ud800" * 100)
    assert stream.getvalue().isascii()
    assert stream.getvalue().count("\n") == 1
    line = json.loads(stream.getvalue())
    assert (line["prompt"], line["completion"]) == ("why é?", "because\n\x1b[2J 漢字 \ud800" * 100)
