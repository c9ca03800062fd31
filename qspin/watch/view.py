"""What a person or a program sees of a run: a live panel, lines, JSON; tables and a rendered example.

Text from data is never read as markup, nor obeyed by the terminal.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.table import Table
from rich.text import Text

from qspin.config import RunConfig, at_iteration
from qspin.run_dir import RunDir
from qspin.safe_text import visible
from qspin.stopping import stopped_where_nobody_reads
from qspin.units import GIB
from qspin.watch.meter import Meter, Status
from qspin.watch.status import Standing

if TYPE_CHECKING:  # they import torch, which `qspin status` does without
    from qspin.chat import PieceKind
    from qspin.figures.report import Answers, Results

PIECE_STYLES: dict[PieceKind, tuple[str, str]] = {  # two shades, so that neighbouring tokens can be told apart
    "prompt": ("black on bright_white", "black on white"),
    "completion": ("black on bright_green", "black on green"),
    "end-of-turn": ("bold white on red", "bold white on red"),
}
FIGURES = {  # how a figure is shown, in this order; others come after them by their own names
    "loss": "loss {:.3f}",
    "margin": "margin {:+.3f}",
    "real_reward": "real reward {:+.3f}",
    "generated_reward": "generated reward {:+.3f}",
    "accuracy": "accuracy {:.0%}",
    "nll": "NLL {:.3f}",
    "ended": "ended {:.0%}",
    "two_sample_auc": "2-sample AUC {:.2f}",
    "reward_auc": "reward AUC {:.2f}",
    "f1": "F1 {:.2f}",
    "style": "style {:.0%}",
    "tokens": "{:.0f} tokens",
    "tokens/s": "{:.0f} tokens/s",
}
NOT_SHOWN = {  # for programs and trackers
    "step", "epoch", "lr", "grad_norm", "length_auc", "greedy_tokens", "greedy_ended", "distinct_1", "distinct_2",
    "gap", "kl", "real_nll",
}  # fmt: skip
NARROWEST_BAR = 10

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

    def end(self, adapter: Path, table: Path) -> None:
        """The run is complete."""
        self._say("end", adapter=str(adapter), table=str(table))

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


def panel(status: Status, width: int, *, running: bool = True) -> list[Text]:
    """Lines of at most `width` cells: where a run stands, how fast it is, what it last found and sampled."""
    share = min(1.0, status.done / status.total)
    head = Text(title(status), style="bold")
    count = Text(f"{int(status.done)}/{status.total} {status.unit}  {int(100 * share)}%")
    room = width - head.cell_len - count.cell_len - 4
    if room >= NARROWEST_BAR:
        done = int(room * share)
        bar = Text.assemble(("━" * done, "green"), ("─" * (room - done), "dim"))
        lines = [Text("  ").join([head, bar, count])]
    else:
        lines = _flow([head, count], width, indent=0)
    if running:
        times = f"phase {span(status.phase_seconds_left)} left", f"run {span(status.run_seconds_left)} left"
        parts = [Text(part, style="cyan") for part in (*_rate(status), *times)]
        lines += _flow([*parts, Text(_memory(status), style="magenta")], width)
    lines += _flow([Text(figure, style="green") for figure in _figures(status.figures)], width)
    if status.prompt is not None and status.completion is not None:
        completion = Text(breaks_shown(status.completion[: 4 * width]))
        first, *more = completion.wrap(Console(), max(1, width - 14))
        sample = {"prompt": breaks_shown(status.prompt[: 4 * width]), "completion": first.plain}
        if more:  # on a second line, which is cut
            sample[""] = "".join(line.plain for line in more)
        lines += [Text.assemble(f"  {label:<12}", (text, "italic")) for label, text in sample.items()]
    for line in lines:
        line.truncate(width, overflow="ellipsis")
        line.no_wrap = True
    return lines


def ended_lines(status: Status, width: int) -> list[Text]:
    """A phase that is over, for good or because it has to be done again."""
    did = f"{status.total} {status.unit}" if status.complete else f"{int(status.done)}/{status.total} {status.unit}"
    parts = [f"{did} in {span(status.phase_seconds)}", *_rate(status), *_figures(status.figures)]
    return _flow([Text(title(status)), *(Text(part, style="dim") for part in parts)], width, indent=0, gap=2)


def plain_line(status: Status) -> str:
    parts = [
        f"{title(status)}: {int(status.done)}/{status.total} {status.unit}",
        *_rate(status),
        f"{span(status.phase_seconds_left)} left",
        f"run {span(status.run_seconds_left)} left",
        _memory(status),
        *_figures(status.figures),
    ]
    return "  ".join(parts)


def standing_lines(standing: Standing, run_dir: RunDir, width: int) -> list[Text]:
    """What `qspin status` shows."""
    status = standing.status
    where = f"{run_dir.path}: {standing.state}"
    match standing.state:
        case "not started":
            lines = [f"{where}; nothing has been done here yet"]
        case "starting":
            lines = [f"{where} ({standing.process}); it has begun no phase yet"]
        case "running":
            who = "its baseline is " if status is not None and status.baseline else ""
            lines = [f"{run_dir.path}: {who}running ({standing.process}), as of {span(standing.age)} ago"]
        case "stopped":
            ago = f" {span(standing.age)} ago" if status is not None else ""
            lines = [f"{where}{ago}; the command that started it goes on from the last finished piece"]
        case "finished":
            done = standing.iterations_done
            lines = [
                f"{where}, {done} iteration{'s' * (done != 1)}",
                f"adapter: {run_dir.iteration(standing.kept or 0).adapter}",
                f"table: {run_dir.summary}",
            ]
    shown = [Text(visible(line)) for line in lines]
    if status is not None:
        shown += panel(status, width, running=standing.state == "running")
    if standing.baseline is not None:
        left, age = standing.baseline
        shown.append(Text(f"baseline, {span(age)} ago: {title(left)}, {int(left.done)}/{left.total} {left.unit}"))
    return shown


def title(status: Status) -> str:
    """Which iteration by its number, which is from 0 as everywhere, and how many that makes."""
    number, kind = status.iteration, "supervised round" if status.baseline else "iteration"
    before = "warm start" if status.warm_start else "base"
    where = before if number is None else f"{kind} {number} ({number + 1} of {status.iterations})"
    return where if status.phase == where else f"{where} · {status.phase}"


def span(seconds: float | None) -> str:
    """A stretch of time to two places or more, "?" if it is not known."""
    if seconds is None:
        return "?"
    if (whole := round(seconds)) < 100:
        return f"{whole} s"
    if whole < 600:
        return f"{whole // 60} min {whole % 60:02} s"
    if (minutes := round(seconds / 60)) < 100:
        return f"{minutes} min"
    if (hours := minutes // 60) < 48:
        return f"{hours} h {minutes % 60:02} min"
    return f"{hours // 24} d {hours % 24} h"


def breaks_shown(text: str) -> str:
    """A model's or a file's text on one line, without anything that a terminal obeys."""
    return visible(text).replace("\n", "↵")


def _rate(status: Status) -> list[str]:
    return [f"{_short(status.rate)} {status.unit}/s"] if status.rate is not None else []


def _memory(status: Status) -> str:
    return f"memory {status.memory_used / GIB:.1f} of {status.memory_total / GIB:.1f} GiB"


def _figures(figures: Mapping[str, float]) -> list[str]:
    known = [form.format(figures[name]) for name, form in FIGURES.items() if name in figures]
    others = [name for name in figures if name not in FIGURES and name not in NOT_SHOWN]
    return known + [f"{name.replace('_', ' ')} {_short(figures[name])}" for name in others]


def _flow(parts: Sequence[Text], width: int, *, indent: int = 2, gap: int = 3) -> list[Text]:
    """Parts side by side, on as many lines as they take; none is torn apart. `indent` is the first line's."""
    lines: list[Text] = []
    for part in parts:
        if lines and lines[-1].cell_len + gap + part.cell_len <= width:
            lines[-1].append(" " * gap).append_text(part)
        else:
            lines.append(Text(" " * (2 if lines else indent)).append_text(part))
    return lines


def _note(text: str) -> Text:
    return Text(visible(f"note: {text}"), style="yellow")


def results_table(results: Results) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=results.title, title_justify="left", pad_edge=False, collapse_padding=True)
    for column in results.columns:
        table.add_column(column.heading, overflow="fold")
    for row in results.rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    return table


def notes_table(notes: Iterable[str]) -> Table:
    """Sentences, each after a dash."""
    table = Table.grid(padding=(0, 1))
    for note in notes:
        table.add_row("-", Text(visible(note)))
    return table


def completions_table(shown: Sequence[Answers]) -> Table:
    """Prompts, and a column for each who answered them."""
    table = Table(box=box.SIMPLE_HEAD, show_lines=True, title="The same prompts", title_justify="left")
    table.add_column("prompt", ratio=2, overflow="fold")
    for name in shown[0].by:
        table.add_column(Text(visible(name)), ratio=3, overflow="fold")
    for row in shown:
        table.add_row(*(Text(visible(text)) for text in (row.prompt, *row.by.values())))
    return table


def example_text(pieces: Iterable[tuple[PieceKind, str]]) -> Text:
    """A rendered example, each token in the colour of its role."""
    text = Text()
    for index, (kind, piece) in enumerate(pieces):
        # a newline is shown, and made: a background colour up to the edge would look like a token
        text.append(breaks_shown(piece), style=PIECE_STYLES[kind][index % 2])
        if "\n" in piece:
            text.append("\n")
    return text


def plan_lines(config: RunConfig, rows: int) -> list[str]:
    """What each iteration will do, in numbers."""
    lines = []
    if config.sft.epochs:
        steps = -(-rows // config.train.batch_size) * config.sft.epochs
        lines.append(f"warm start: train {steps} steps of {config.train.batch_size} rows (lr {config.sft.lr:g})")
    for iteration in range(config.iterations):
        pairs = rows * len(config.train.learnt_from(iteration))
        steps = -(-pairs // config.train.batch_size) * config.train.epochs
        lines.append(
            f"iteration {iteration}: generate {rows} completions, score {pairs} pairs, train {steps} steps of "
            f"{config.train.batch_size} pairs (beta {at_iteration(config.train.beta, iteration):g}, "
            f"lr {at_iteration(config.train.lr, iteration):g})"
        )
    return lines


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
