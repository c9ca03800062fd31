"""What the terminal shows: live progress, tables, a rendered example. Text from data is never read as markup."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column as TableColumn
from rich.table import Table
from rich.text import Text

from qspin.chat import PieceKind
from qspin.report import Column, Shown

PIECE_STYLES: dict[PieceKind, tuple[str, str]] = {  # two shades, so that neighbouring tokens can be told apart
    "prompt": ("black on bright_white", "black on white"),
    "completion": ("black on bright_green", "black on green"),
    "end-of-turn": ("bold white on red", "bold white on red"),
}
MEDIUM, WIDE = 75, 100  # columns that a phase's figures need, and a bar beside them
PLAIN_SECONDS = 10.0  # between two lines where there is no terminal


class RunView:
    """Draws a run's progress: a live bar on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, iterations: int) -> None:
        self.console = console
        self.iterations = iterations
        self._live: _Bar | _Lines = _Bar(console) if console.is_terminal else _Lines(console)

    def __enter__(self) -> RunView:
        return self

    def __exit__(self, *_: object) -> None:
        self._live.close()

    def phase(self, name: str, *, iteration: int | None, total: int, done: int, unit: str) -> None:
        where = "base" if iteration is None else f"iteration {iteration + 1}/{self.iterations}"
        self._live.start(f"{where} · {name}", total, done, unit)

    def advance(self, units: float, **figures: float) -> None:
        self._live.advance(units, "  ".join(f"{name} {_short(value)}" for name, value in figures.items()))

    def note(self, text: str) -> None:
        self.console.print(Text(f"note: {text}", style="yellow"))


class _DoneColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{_whole(task.completed)}/{task.total:.0f} {task.fields['unit']}", no_wrap=True)


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{_short(speed)}/s" if speed else "", style="cyan", no_wrap=True)


class _Bar:
    def __init__(self, console: Console) -> None:
        one_line = TableColumn(no_wrap=True)
        columns: list[ProgressColumn] = [
            TextColumn("{task.description}", markup=False, table_column=one_line),
            _DoneColumn(),
            _RateColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
        ]
        if console.width >= WIDE:
            columns.insert(1, BarColumn(bar_width=None))
        if console.width >= MEDIUM:
            columns.append(TextColumn("{task.fields[figures]}", markup=False, style="green", table_column=one_line))
        self.progress = Progress(*columns, console=console, expand=console.width >= WIDE, speed_estimate_period=60)
        self.progress.start()

    def start(self, title: str, total: int, done: int, unit: str) -> None:
        self.task = self.progress.add_task(title, total=total, unit=unit, figures="")
        self.progress.advance(self.task, done)

    def advance(self, units: float, figures: str) -> None:
        self.progress.update(self.task, advance=units)
        if figures:
            self.progress.update(self.task, figures=figures)

    def close(self) -> None:
        self.progress.stop()


class _Lines:
    def __init__(self, console: Console) -> None:
        self.console = console

    def start(self, title: str, total: int, done: int, unit: str) -> None:
        self.title, self.total, self.done, self.unit = title, total, float(done), unit
        self.first, self.started = done, time.monotonic()
        self.said = self.started

    def advance(self, units: float, figures: str) -> None:
        self.done += units
        now = time.monotonic()
        if _whole(self.done) < self.total and now - self.said < PLAIN_SECONDS:
            return
        self.said = now
        rate = (self.done - self.first) / max(now - self.started, 1e-9)
        left = f"{max(0.0, self.total - self.done) / rate:.0f} s left" if rate else ""
        line = f"{self.title}: {_whole(self.done)}/{self.total} {self.unit}  {_short(rate)}/s  {left}  {figures}"
        self.console.print(Text(line.rstrip()))

    def close(self) -> None:
        pass


def results_table(columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="On held-out rows", title_justify="left")
    for column in columns:
        table.add_column(column.heading, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def completions_table(shown: Sequence[Shown]) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, show_lines=True, title="The same prompts, before and after", title_justify="left"
    )
    table.add_column("prompt", ratio=2, overflow="fold")
    table.add_column("base", ratio=3, overflow="fold")
    table.add_column("after self-play", ratio=3, overflow="fold")
    for row in shown:
        table.add_row(Text(row.prompt), Text(row.before), Text(row.after))
    return table


def example_text(pieces: Iterable[tuple[PieceKind, str]]) -> Text:
    """A rendered example, each token in the colour of its role."""
    text = Text()
    for index, (kind, piece) in enumerate(pieces):
        # a newline is shown, and made: a background colour up to the edge would look like a token
        text.append(piece.replace("\n", "↵"), style=PIECE_STYLES[kind][index % 2])
        if "\n" in piece:
            text.append("\n")
    return text


def _whole(done: float) -> int:
    return int(done + 1e-6)  # parts of a unit add up to a hair less than one


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
