"""A conversation on a terminal, or through pipes: what is typed is read here, and replies are shown as they are made.

On a terminal, two players stand side by side where it is wide enough. Through a pipe each line is a message, replies go
to stdout, and everything else to stderr. What a model writes is text: nothing in it is obeyed by a terminal, or read as
Rich's markup.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from qspin.console import tell
from qspin.errors import QspinError
from qspin.safe_text import visible
from qspin.stopping import go_on_after
from qspin.trials.talk import Show, Talk

WIDE = 100  # characters, from which on two columns are read with ease
GAP = 3  # between them
FRAMES = 8  # a second
PROMPT = "> "
PASTE_SECONDS = 0.05  # between the lines of a paste; nobody types so fast


class View:
    """A `talk.Screen` on the process's own stdout and stderr."""

    def __init__(self) -> None:
        self._out, self._err = Console(), Console(stderr=True)

    @contextlib.contextmanager
    def replies(self, names: Sequence[str]) -> Iterator[Show]:
        side_by_side = len(names) > 1 and self._out.is_terminal and self._out.width >= WIDE
        with columns(self._out, names) if side_by_side else stacked(self._out, names) as show:
            yield show

    def note(self, text: str) -> None:
        tell(self._err, text, "dim")


@contextlib.contextmanager
def stacked(console: Console, names: Sequence[str]) -> Iterator[Show]:
    """One reply after another, each under its player's name if there are several."""
    shown: int | None = None

    def show(place: int, piece: str) -> None:
        nonlocal shown
        if place != shown and len(names) > 1:
            begin = "" if shown is None else "\n"
            console.out(f"{begin}{names[place]}", style="bold", highlight=False)
        shown = place
        console.out(visible(piece), end="", highlight=False)

    try:
        yield show
    finally:
        console.out("")


@contextlib.contextmanager
def columns(console: Console, names: Sequence[str]) -> Iterator[Show]:
    """Side by side. While they are made, no more than the ends that fit on the screen; then all."""
    said = [""] * len(names)

    def drawn(rows: int | None) -> Table:
        width = (console.width - GAP * (len(names) - 1)) // len(names)
        table = Table.grid(padding=(0, GAP, 0, 0), pad_edge=False)
        texts = []
        for text in said:
            table.add_column(width=width)
            lines = Text(visible(text)).wrap(console, width)
            texts.append(Text("\n").join(lines if rows is None else lines[-rows:]))
        table.add_row(*(Text(name, style="bold", no_wrap=True) for name in names))
        table.add_row(*texts)
        return table

    def show(place: int, piece: str) -> None:
        said[place] += piece

    def frame() -> Table:
        return drawn(max(1, console.height - 3))

    try:
        with Live(get_renderable=frame, console=console, transient=True, refresh_per_second=FRAMES):
            yield show
    finally:
        console.print(drawn(None))


def converse(talk: Talk, view: View) -> None:
    """On a terminal, until the person leaves."""
    if sys.stdout.isatty():
        with contextlib.suppress(ImportError):  # not everywhere; without it lines can be typed, and not edited
            import readline

            readline.parse_and_bind("set enable-bracketed-paste on")  # which Python turns off
    while (text := _typed()) is not None:
        if not text.strip():
            continue
        try:
            if not talk.hear(text):
                return
        except QspinError as error:
            view.note(f"error: {error}")
        except SystemExit as stop:
            go_on_after(stop)
            view.note("stopped; what was said is kept")


def answer_lines(talk: Talk) -> None:
    """Each line of stdin is a message, also one that looks like a command.

    Raises:
        QspinError: one can't be answered; what comes after it is not heard.
    """
    for line in sys.stdin:
        if line.strip():
            talk.hear(f" {line}")


def _typed() -> str | None:
    """A message or a command; None: the person leaves."""
    try:
        lines = [_line(PROMPT)]
        while not lines[0].startswith("/") and _more_waits():
            lines.append(_line(""))
    except (EOFError, SystemExit) as end:
        if isinstance(end, SystemExit):
            go_on_after(end)
        sys.stderr.write("\n")
        return None
    return "\n".join(lines)


def _line(prompt: str) -> str:
    if sys.stdout.isatty():
        return input(prompt)
    sys.stderr.write(prompt)  # stdout has replies alone
    sys.stderr.flush()
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def _more_waits() -> bool:
    """Whether a line came at once after another: of a paste, where the terminal does not mark pastes as such."""
    return os.name != "nt" and bool(select.select([sys.stdin], [], [], PASTE_SECONDS)[0])
