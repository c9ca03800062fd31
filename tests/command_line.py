"""qspin's commands as tests call them: what was said, and what a finished run holds."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from qspin.cli import main
from qspin.files import sha256_of
from qspin.run_dir import RunDir

COLOUR_VARIABLES = ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "GITHUB_ACTIONS", "PY_COLORS")


@dataclass(frozen=True, slots=True)
class Answer:
    """How a command ended, and what it said."""

    code: int
    out: str
    err: str


def call(*arguments: str | Path, columns: int = 200, **variables: str) -> Answer:
    """`qspin` in this process, to a pipe."""
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        for name in COLOUR_VARIABLES:
            patch.delenv(name, raising=False)
        for name, value in {"COLUMNS": str(columns), **variables}.items():
            patch.setenv(name, value)
        patch.setattr(sys, "argv", ["qspin", *map(str, arguments)])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as stop:
            main()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return Answer(int(stop.value.code or 0), out.getvalue(), err.getvalue())


def process(*arguments: str | Path) -> subprocess.Popen[str]:
    """`qspin` in a process of its own, to pipes."""
    environment = {key: value for key, value in os.environ.items() if key not in COLOUR_VARIABLES}
    command = [sys.executable, "-m", "qspin.cli", *map(str, arguments)]
    with hearing_interrupts():
        return subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, "COLUMNS": "200", "OMP_NUM_THREADS": "1"},
        )


@contextlib.contextmanager
def hearing_interrupts() -> Iterator[None]:
    """What is started in the block hears Ctrl-C. A background job of a shell is deaf to it, and so are its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def refusal(*arguments: str | Path) -> str:
    """What a command that can't be carried out says, and nothing besides."""
    answer = call(*arguments)
    assert answer.code == 1
    assert answer.out == ""
    assert answer.err.startswith("error: ")
    return answer.err.removeprefix("error: ").removesuffix("\n")


@dataclass(frozen=True, slots=True)
class Played:
    """A finished run, and what it said."""

    command: list[str | Path]
    out: Path
    data: Path
    answer: Answer

    def again(self, *changes: str | Path, out: Path | None = None, columns: int = 200) -> Answer:
        return call(*self.command, "--out", out or self.out, *changes, columns=columns)

    def copy(self, path: Path) -> Path:
        return Path(shutil.copytree(self.out, path))


def contents(folder: Path) -> dict[str, str]:
    """Every file with its hash; who holds the lock is not part of a run."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in {".lock", ".holder"}]
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}


def summary_tables(out: Path) -> list[list[list[str]]]:
    """The tables of SUMMARY.md: rows of cells, the heading and the line under it first."""
    parts = RunDir(out).summary.read_text(encoding="utf-8").split("\n## ")[1:]
    lines = ([line for line in part.splitlines() if line.startswith("|")] for part in parts)
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in table] for table in lines]
