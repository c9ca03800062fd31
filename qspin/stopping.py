"""Ctrl-C and SIGTERM: once, and the run keeps what it has and leaves; twice, and the process is gone at once.

    heed_stops()                 # in the main thread, before any work
    with stops_held():           # what must not be torn: a request to stop takes effect after it
        optimizer.step()

A request is raised as `SystemExit` with the code that a shell gives, wherever the main thread is. Where Ctrl-C is to
end a piece of work alone, whoever catches it calls `go_on_after`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import IO, NoReturn

STOPPED, ON = "stopped", "the same command goes on from the last finished piece"
GOES_ON = f"{STOPPED}; {ON}"
CODES = {128 + signal.SIGINT, 128 + signal.SIGTERM}

_SHOW_CURSOR, _STDERR = "\x1b[?25h", 2  # a live view may have hidden it


class _State:
    said = STOPPED  # the last line
    asked: int | None = None  # the signal that asked to stop
    raised = False
    held = 0  # blocks that must not be torn, one in another
    paused = 0.0  # seconds


def heed_stops(said: str = STOPPED) -> None:
    """Handle both signals from now on; `said` is the last line of a program that is stopped."""
    _State.said, _State.asked, _State.raised = said, None, False
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _on_signal)
    if os.name == "posix" and signal.getsignal(signal.SIGTSTP) is signal.SIG_DFL:
        signal.signal(signal.SIGTSTP, _on_pause)


def clock() -> float:
    """Seconds from some moment on, without those in which Ctrl-Z had paused the process."""
    return time.monotonic() - _State.paused


@contextlib.contextmanager
def stops_held() -> Iterator[None]:
    """Let the block end before a request to stop takes effect."""
    _State.held += 1
    try:
        yield
    finally:
        _State.held -= 1
    if _State.asked is not None and not _State.raised:
        _stop(_State.asked)


def check_stop() -> None:
    """For loops: a request that was raised where exceptions are swallowed, as in a finaliser, is not lost.

    Raises:
        SystemExit: it has been asked for.
    """
    if _State.asked is not None:
        raise SystemExit(128 + _State.asked)


def go_on_after(stop: SystemExit) -> None:
    """Ctrl-C has ended what it was meant to end, and the next one is the first again. Any other end is raised anew."""
    if stop.code != 128 + signal.SIGINT:
        raise stop
    _State.asked, _State.raised = None, False


def leave_stopped(code: int) -> NoReturn:
    """The last line, and the end of the process. Python would take seconds to take torch down, with nothing to keep."""
    with contextlib.suppress(OSError):  # Ctrl-C stops a `| tee` as well, and then nobody listens
        sys.stderr.write(f"{_State.said}\n")
        sys.stderr.flush()
        sys.stdout.flush()
    os._exit(code)


@contextlib.contextmanager
def stopped_where_nobody_reads(stream: IO[str]) -> Iterator[None]:
    """Where the output can't be written, its reader gone or its disk full, stop as if asked to, so that all is kept."""
    try:
        yield
    except OSError as error:
        leave_unheard(stream)
        why = f"{STOPPED}, the output can't be written ({error.strerror})"
        raise SystemExit(f"{why}; {ON}") from None


def leave_unheard(stream: IO[str]) -> None:
    """Let what is still to be written to such a stream go nowhere, or Python would complain as it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _stop(number: int) -> None:
    if not _State.held:
        _State.raised = True
        raise SystemExit(128 + number)


def _on_pause(number: int, _frame: FrameType | None) -> None:
    """Ctrl-Z: pause as any program does, once the shell has its cursor back."""
    if os.isatty(_STDERR):
        os.write(_STDERR, _SHOW_CURSOR.encode())
    signal.signal(number, signal.SIG_DFL)
    since = time.monotonic()
    signal.raise_signal(number)
    _State.paused += time.monotonic() - since  # here it goes on
    signal.signal(number, _on_pause)


def _on_signal(number: int, _frame: FrameType | None) -> None:
    if _State.asked is not None:
        cursor = _SHOW_CURSOR if os.isatty(_STDERR) else ""
        os.write(_STDERR, f"{cursor}{_State.said}\n".encode())
        os._exit(128 + number)
    _State.asked = number
    _stop(number)
