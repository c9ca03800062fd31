"""Tables of results and answers on a terminal. Text from data is never read as markup, nor obeyed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from qspin.figures.report import Answers, Results
from qspin.safe_text import visible


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
