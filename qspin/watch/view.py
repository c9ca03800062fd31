"""Listeners that show a run while it goes on: a live panel, lines for a log, JSON for a program.

Text from data is never read as markup, nor obeyed by the terminal.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from qspin.safe_text import visible
from qspin.stopping import stopped_where_nobody_reads
from qspin.watch.lines import ended_lines, panel, plain_line, title
from qspin.watch.meter import Meter, Status

# Between two lines where there is no terminal: a tenth of the phase, but no less than the one and no more than the
# other. A phase's start and end have a line each, whatever it takes.
LEAST_SECONDS, MOST_SECONDS = 30.0, 300.0
JSON_SECONDS = 1.0  # between two lines of progress, but for optimiser steps and what ends something


def for_people(console: Console, meter: Meter) -> RunView | PlainView:
    """A live view on a terminal, lines elsewhere."""
    live = console.is_terminal and not console.is_dumb_terminal
    return RunView(console, meter) if live else PlainView(console, meter)


class RunView:
    """Draws a run on a terminal: what is done scrolls away above, what is under way stays below."""

    def __init__(self, console: Console, meter: Meter) -> None:
        self.console = console
        self.meter = meter
        self._live = Live(_Panel(meter), console=console, refresh_per_second=2)

    def __enter__(self) -> RunView:
        self._live.start(refresh=True)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        status = self.meter.status()
        if error is None:
            self._print_ended(status)
        self._live.transient = error is None or status is None  # a run that was stopped leaves behind where it was
        self._live.stop()

    def phase(self, name: str, **_: object) -> None:  # noqa: ARG002
        self._print_ended(self.meter.ended)

    def advance(self, units: float, **figures: float) -> None: ...
    def sampled(self, prompt: str, completion: str) -> None: ...

    def note(self, text: str) -> None:
        self.console.print(_note(text))

    def _print_ended(self, status: Status | None) -> None:
        if status is not None:
            for line in ended_lines(status, self.console.width):
                self.console.print(line)


class PlainView:
    """Tells of a run in lines, for a log or a pipe."""

    def __init__(self, console: Console, meter: Meter, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console
        self.meter = meter
        self._clock = clock
        self._said = (0.0, 0.0)  # when, and how many units were done

    def __enter__(self) -> PlainView:
        return self

    def __exit__(self, *_: object) -> None:
        self._say(self.meter.status())

    def phase(self, name: str, **_: object) -> None:  # noqa: ARG002
        self._say(self.meter.ended)
        status = self.meter.status()
        assert status is not None
        self._print(f"{title(status)}: {int(status.done)}/{status.total} {status.unit}")
        self._said = (self._clock(), status.done)

    def advance(self, units: float, **figures: float) -> None:  # noqa: ARG002
        waited = self._clock() - self._said[0]
        if waited < LEAST_SECONDS or self.meter.complete:  # the last line waits for what the phase finds
            return
        status = self.meter.status()
        assert status is not None
        if status.done - self._said[1] >= status.total / 10 or waited >= MOST_SECONDS:
            self._say(status)
            self._said = (self._clock(), status.done)

    def sampled(self, prompt: str, completion: str) -> None: ...

    def note(self, text: str) -> None:
        self.console.print(_note(text))

    def _say(self, status: Status | None) -> None:
        if status is not None:
            self._print(plain_line(status))

    def _print(self, line: str) -> None:
        self.console.print(Text(line), soft_wrap=True)


class JsonView:
    """Tells of a run in lines of JSON, for a program; docs/watching.md lists the keys."""

    def __init__(self, stream: TextIO, meter: Meter, clock: Callable[[], float] = time.time) -> None:
        self.stream = stream
        self.meter = meter
        self._clock = clock
        self._said = 0.0

    def phase(self, name: str, **_: object) -> None:  # noqa: ARG002
        self._say_status("phase")

    def advance(self, units: float, **figures: float) -> None:
        ends = not units or self.meter.complete
        if ends or "step" in figures or self._clock() - self._said >= JSON_SECONDS:
            self._say_status("progress")

    def sampled(self, prompt: str, completion: str) -> None:
        self._say("sample", prompt=prompt, completion=completion)

    def note(self, text: str) -> None:
        self._say("note", text=text)

    def end(self, adapter: Path, table: Path | None) -> None:
        """The run is complete; its table could not be written where there is none."""
        self._say("end", adapter=str(adapter), table=None if table is None else str(table))

    def _say_status(self, event: str) -> None:
        status = self.meter.status()
        assert status is not None
        value = asdict(status)
        del value["prompt"], value["completion"], value["baseline"]  # told once, as a sample; not told of in JSON
        self._said = self._clock()
        self._say(event, **value)

    def _say(self, event: str, **value: object) -> None:
        with stopped_where_nobody_reads(self.stream):
            self.stream.write(json.dumps({"event": event, "time": self._clock(), **value}) + "\n")
            self.stream.flush()


class _Panel:
    """The meter's status, as it is whenever it is drawn."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        status = self.meter.status()
        yield Text()
        yield from [Text("loading the model …", style="dim")] if status is None else panel(status, options.max_width)


def _note(text: str) -> Text:
    return Text(visible(f"note: {text}"), style="yellow")
