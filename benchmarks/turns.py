"""Processes that load side by side, and then have the machine to themselves, one after the other, while they are timed.

Loading takes longer than what is timed, and compiling, as a peer does, much longer. Free of torch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

EVERY = 0.1  # seconds


def wait_for_turn(turn: Path | None) -> None:
    """In such a process: say that it is ready, and go on when the file is there; at once where that is None."""
    if turn is None or turn.exists():
        return
    _ready(turn).touch()
    while not turn.exists():
        time.sleep(EVERY)


def take_back(turn: Path) -> None:
    """Before a process is started that is to wait for it."""
    for file in (turn, _ready(turn)):
        file.unlink(missing_ok=True)


def give_turns(waiting: Mapping[Path, Future[Any]]) -> None:
    """To each in turn until it has ended, once all are ready or have ended."""
    while not all(ended.done() or _ready(turn).exists() for turn, ended in waiting.items()):
        time.sleep(EVERY)
    for turn, ended in waiting.items():
        turn.touch()
        wait([ended])


def _ready(turn: Path) -> Path:
    return turn.with_suffix(".ready")
