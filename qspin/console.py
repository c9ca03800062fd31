"""What the command line's rooms share: arguments, and a line on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qspin.safe_text import check_path, visible

if TYPE_CHECKING:
    from rich.console import Console


def a_name(path: Path | None, parameter: typer.CallbackParam) -> Path | None:
    """For options that name a path: as `check_path`."""
    return path if path is None else check_path(path, parameter.metavar or parameter.opts[0])


def a_run(path: Path, parameter: typer.CallbackParam) -> Path:
    """As `a_name`, for a run that there must be: told before anything heavy is imported."""
    from qspin.run_dir import RunDir

    found = check_path(path, parameter.metavar or parameter.opts[0])
    RunDir(found).check_run()
    return found


Folder = Annotated[Path, typer.Argument(metavar="RUN", help="the run's folder", callback=a_name)]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="the run's folder", callback=a_run)]


def tell(console: Console, text: str, style: str = "") -> None:
    """Text that may hold names from outside."""
    console.print(visible(text), style=style, markup=False, highlight=False, soft_wrap=True)


def quiet_libraries() -> None:
    from qspin.base import quiet_libraries

    quiet_libraries()
