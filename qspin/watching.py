"""Work that takes long, watched: what is on the terminal while it goes on, and the results when it has ended."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console

from qspin import spin
from qspin.config import RunConfig
from qspin.console import tell
from qspin.errors import QspinError
from qspin.experiments import baseline, sweep
from qspin.figures import report
from qspin.figures.players import chosen_iteration, players
from qspin.figures.terminal import completions_table, notes_table, results_table
from qspin.fitting.memory import keep_freed_memory, used_and_total
from qspin.machine import computing_device
from qspin.prepare import Prepared
from qspin.record import prepare_run, template_date
from qspin.run_dir import RunDir
from qspin.stopping import stopped_where_nobody_reads
from qspin.watch import view
from qspin.watch.meter import Meter, Work, measured, to_do, workload
from qspin.watch.progress import Audience, Progress, TrackerName
from qspin.watch.status import StatusFile


class _Console(Console):
    """A run that nobody reads any longer stops as if asked to; Rich would end it without a word."""

    def on_broken_pipe(self) -> None:
        with stopped_where_nobody_reads(self.file):
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def watch_run(prepared: Prepared, out: Path, *, as_json: bool, tracker: TrackerName | None) -> None:
    """Play, or go on playing, in a folder."""
    config, run_dir = prepared.config, RunDir(out)
    meter = _meter(workload(run_dir, config, len(prepared.train), len(prepared.heldout)), config.iterations)
    console = _Console(stderr=as_json)
    lines = view.JsonView(sys.stdout, meter) if as_json else None
    listeners: list[Progress] = [StatusFile(run_dir.status, meter)]
    with contextlib.ExitStack() as stack:
        if lines is not None:
            listeners.append(lines)
            sys.stdout = sys.stderr  # for good: what libraries print, some of them as they exit, is for people
        else:
            listeners.append(stack.enter_context(_shown(console, meter)))
        if tracker is not None:
            from qspin.watch.track import Tracker

            listeners.append(stack.enter_context(Tracker(tracker, run_dir, config)))
        progress = Audience(meter, *listeners)
        _notes(prepared, progress)
        spin.run(prepared, out, progress)
    _show_results(console, run_dir, config)
    kept = chosen_iteration(run_dir, None)
    before, *_ = measured = players(run_dir, config)
    after = next(player for player in measured if player.name == str(kept))
    shown = report.answers([before, after], prepared.heldout_prompts, config.evaluation.shown)
    if shown:
        console.print(completions_table(shown))
    adapter, table = run_dir.iteration(kept).adapter, _table(run_dir, config)
    if lines is not None:
        lines.end(adapter, table)
    else:
        tell(console, f"adapter: {adapter}{f'   table: {table}' if table else ''}")


def watch_baseline(prepared: Prepared, out: Path, rates: Sequence[float]) -> None:
    """Train the supervised baseline of a run, or go on with it."""
    config, run_dir = prepared.config, RunDir(out)
    work = baseline.workload(run_dir, config, rates, len(prepared.train), len(prepared.heldout))
    meter, console = _meter(work, run_dir.iterations_done(), baseline=True), _Console()
    with _shown(console, meter) as shown:
        progress = Audience(meter, StatusFile(run_dir.baseline_status, meter), shown)
        baseline.baseline(prepared, out, progress, rates)
    _show_results(console, run_dir, config)
    if table := _table(run_dir, config):
        tell(console, f"table: {table}")


def watch_sweep(cells: Sequence[sweep.Cell], out: Path) -> None:
    """Prepare and play every run of a sweep, or go on with it; the table and the plot are written after each.

    Raises:
        QspinError: at the end, if a run could not be played to its end.
    """
    console, failed, played = _Console(), [], []
    begun = (cell.run_dir(out) for cell in cells if cell.run_dir(out).record.is_file())
    date = template_date(next(begun, cells[0].run_dir(out)))  # one for all, or prompts of some templates would differ
    for number, cell in enumerate(cells, start=1):
        run_dir = cell.run_dir(out)
        tell(console, f"{number} of {len(cells)}: {cell.name}")
        try:
            prepared = prepare_run(cell.config, run_dir, keep_rejects=True, date=date)
            work = workload(run_dir, cell.config, len(prepared.train), len(prepared.heldout))
            meter = _meter(work, cell.config.iterations)
            with _shown(console, meter) as shown:
                progress = Audience(meter, StatusFile(run_dir.status, meter), shown)
                _notes(prepared, progress)
                sweep.play_cell(cell, prepared, out, cells, progress)
            played.append(cell)
        except QspinError as error:  # the others may well be played
            tell(console, f"error: {error}")
            failed.append(cell.name)
        if played:  # what stands in the folder of one that failed may be damaged, or another run
            sweep.write_results(out, played)
    if played:
        _show_sweep(console, sweep.results(out, played), cells)
        tell(console, f"table: {out / sweep.TABLE}   plot: {out / sweep.PLOT}")
    if failed:
        raise QspinError(f"{len(failed)} of {len(cells)} runs did not come to their end: {', '.join(failed)}")


def _notes(prepared: Prepared, progress: Progress) -> None:
    """What is to be said before the first phase."""
    for note in prepared.notes:
        progress.note(note)
    progress.note(prepared.counts)
    train = prepared.config.train
    if train.loss == "correlation":
        progress.note(
            "the correlation loss is unbounded below; the run stops when real completions lose "
            f"{train.max_real_logp_drop:g} nats (train.max_real_logp_drop)"
        )


@contextlib.contextmanager
def _shown(console: Console, meter: Meter) -> Iterator[Progress]:
    shown = view.for_people(console, meter)
    with shown:
        yield shown


def _show_results(console: Console, run_dir: RunDir, config: RunConfig) -> None:
    for table in report.tables(run_dir, config)[: report.MAIN]:
        console.print(results_table(table))
        console.print(notes_table(table.notes), style="dim")
        console.print()
    console.print(f"{report.measured_on(run_dir, config)}\n", markup=False, highlight=False)
    console.print(notes_table(report.sentences(run_dir, config)))
    console.print()


def _show_sweep(console: Console, table: report.Results, cells: Sequence[sweep.Cell]) -> None:
    """The settings stand whole beside the figures, or where that tears a figure's words, below them."""
    notes = [column.note for column in table.columns]
    shown = results_table(table)
    for place, column in enumerate(shown.columns[: len(cells[0].settings)]):
        column.width = max(map(cell_len, (table.columns[place].heading, *(row[place] for row in table.rows))))
    drawn = "".join(part.text for part in console.render(shown))
    texts = [column.heading for column in table.columns] + [cell for row in table.rows for cell in row]
    if not all(word in drawn for text in texts for word in text.split()):
        numbered, runs = sweep.numbered(table, cells)
        shown, notes = results_table(numbered), [*runs, *numbered.notes]
    console.print(shown)
    console.print(notes_table(notes), style="dim")


def _table(run_dir: RunDir, config: RunConfig) -> Path | None:
    """SUMMARY.md; None where it could not be written, as what may stand there then is of fewer players."""
    path = run_dir.summary
    return path if path.is_file() and path.read_bytes() == report.summary(run_dir, config).encode() else None


def _meter(work: Sequence[Work], iterations: int, *, baseline: bool = False) -> Meter:
    keep_freed_memory()  # before anything asks a device how much it has
    device = computing_device()
    return Meter(to_do(work), measured(work), iterations, lambda: used_and_total(device), baseline=baseline)
