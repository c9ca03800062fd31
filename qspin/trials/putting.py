"""Putting tasks to a run's players, on a terminal: what was done is kept, and only what is missing is computed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from qspin.config import load_kept
from qspin.console import tell
from qspin.errors import QspinError
from qspin.figures import report
from qspin.figures.benchmarks import SetUp, keep, kept
from qspin.figures.players import players
from qspin.figures.terminal import notes_table, results_table
from qspin.files import check_writable, write_text
from qspin.fitting.memory import used_and_total
from qspin.run_dir import RunDir
from qspin.trials.loaded import Loaded
from qspin.watch import view
from qspin.watch.meter import Meter, Work
from qspin.watch.progress import Audience

if TYPE_CHECKING:
    from qspin.trials.tasks import Task, Tasks


def watch_eval(run_dir: RunDir, who: Sequence[str], set_ups: Sequence[SetUp], include: Path | None) -> None:
    """Put each task to each player, unless that has been done; then show all.

    Raises:
        QspinError: lm-eval is not installed, a task can't be had or put to a player, or this user can't write where
            figures are kept.
    """
    console = Console()
    tasks = None
    if include is not None:  # its tasks may have been changed
        tasks = _tasks(set_ups, include)
        set_ups = [replace(set_up, definition=tasks.definition(set_up.task)) for set_up in set_ups]
    missing = {set_up: [name for name in who if kept(run_dir.player(name), set_up) is None] for set_up in set_ups}
    missing = {set_up: names for set_up, names in missing.items() if names}
    failed: list[str] = []
    if missing:
        tasks = tasks or _tasks(set_ups, None)
        for folder in (run_dir.path, *(run_dir.player(name).benchmarks for name in who)):
            check_writable(folder)
        failed = _compute(console, run_dir, missing, tasks)
    config = load_kept(run_dir.config)
    if missing and players(run_dir, config):
        write_text(run_dir.summary, report.summary(run_dir, config))
    table = report.benchmarks(run_dir, who, set_ups)
    console.print(results_table(table))
    console.print(notes_table(table.notes), style="dim")
    if failed:
        raise QspinError(f"{len(failed)} of {len(set_ups)} tasks could not be put to the players: {', '.join(failed)}")


def _tasks(set_ups: Sequence[SetUp], include: Path | None) -> Tasks:
    if importlib.util.find_spec("lm_eval") is None:
        raise QspinError("lm-eval, which has the tasks, is not installed: pip install 'lm-eval>=0.4.13,<0.4.14'")
    from qspin.trials.tasks import Tasks

    return Tasks.find([set_up.task for set_up in set_ups], include)


def _compute(console: Console, run_dir: RunDir, missing: dict[SetUp, list[str]], tasks: Tasks) -> list[str]:
    """The names of tasks that can't be had, or put to a player; the others are none the worse for it."""
    loaded, failed = None, []

    @contextmanager
    def attempt(task: str) -> Iterator[None]:
        try:
            yield
        except QspinError as error:
            if len(missing) == 1:
                raise
            tell(console, f"error: {error}")
            failed.append(task)

    for number, (set_up, names) in enumerate(missing.items(), start=1):
        tell(console, f"{number} of {len(missing)}: {set_up.task}")
        task = None
        with attempt(set_up.task):
            task = tasks.load(set_up.task, set_up.shots)
        if task is None:
            continue
        loaded = loaded or Loaded.open(run_dir, names[0], lambda text: tell(console, f"note: {text}", "yellow"))
        with attempt(set_up.task):
            _put(console, loaded, task, set_up, names)
    return failed


def _put(console: Console, loaded: Loaded, task: Task, set_up: SetUp, names: Sequence[str]) -> None:
    """One task to each player in turn; raises as `Task.put_to`."""
    run_dir, documents = loaded.run_dir, task.documents(set_up.limit)
    work = [Work(run_dir.player(name), set_up.task, _iteration(name), documents) for name in names]
    meter = Meter(work, {}, loaded.config.iterations, lambda: used_and_total(loaded.model.device))
    with view.for_people(console, meter) as shown:
        progress = Audience(meter, shown)
        for name in names:
            loaded.seat(name)
            progress.phase(
                set_up.task,
                iteration=_iteration(name),
                total=documents,
                done=0,
                unit="documents",
                warm_start=name == "sft",
            )
            keep(run_dir.player(name), task.put_to(loaded, set_up, progress.advance))


def _iteration(name: str) -> int | None:
    return int(name) if name.isdigit() else None
