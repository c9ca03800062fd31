"""What the command line's rooms share: arguments, rows that are ready for a run, and a line on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qspin.errors import QspinError
from qspin.safe_text import check_path, visible

if TYPE_CHECKING:
    import datetime

    from rich.console import Console

    from qspin.config import RunConfig
    from qspin.prepare import Prepared
    from qspin.run_dir import RunDir


def a_name(path: Path | None, parameter: typer.CallbackParam) -> Path | None:
    """For options that name a path: refuses what can be no file's name (`check_path`)."""
    return path if path is None else check_path(path, parameter.metavar or parameter.opts[0])


RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="the run's folder", callback=a_name)]


def prepare_run(
    config: RunConfig, run_dir: RunDir, *, keep_rejects: bool, date: datetime.date | None = None
) -> Prepared:
    """Rows that a run stops at are listed where one that goes on lists those it leaves out.

    Args:
        date: for the template of a new run, if not today.
    """
    from qspin.data import LeftOut
    from qspin.prepare import prepare, write_rejects
    from qspin.record import template_date

    try:
        return prepare(config, date if date and not run_dir.record.is_file() else template_date(run_dir))
    except LeftOut as error:
        if not keep_rejects or run_dir.record.is_file():
            raise
        with run_dir.lock():
            write_rejects(run_dir.rejects, error.rejects)
        raise QspinError(f"{error}; all that were left out: {run_dir.rejects}") from None


def tell(console: Console, text: str, style: str = "") -> None:
    """Text that may hold names from outside."""
    console.print(visible(text), style=style, markup=False, highlight=False, soft_wrap=True)


def quiet_libraries() -> None:
    from qspin.base import quiet_libraries

    quiet_libraries()
