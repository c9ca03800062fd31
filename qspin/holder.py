"""The process that works in a folder, by its name: whether it may be alive, and whether it was paused."""

from __future__ import annotations

import os
import re
import socket

import psutil

LETS_ON = "fg in its terminal, or kill -CONT with its number, lets it go on"  # a paused process


def process_name() -> str:
    """This process, as others are told of it."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def is_name(text: str) -> bool:
    """Whether a text is what `process_name` gave, here or elsewhere."""
    return _parts(text) is not None


def may_live(name: str) -> bool:
    """Whether a named process may be alive; of another machine's this can't be known."""
    found = _parts(name)
    return found is not None and (found[2] != socket.gethostname() or psutil.pid_exists(int(found[1])))


def is_paused(name: str) -> bool:
    """Whether a named process of this machine was paused, as Ctrl-Z does: it holds its lock and does nothing."""
    found = _parts(name)
    if found is None or found[2] != socket.gethostname():
        return False
    try:
        return bool(psutil.Process(int(found[1])).status() == psutil.STATUS_STOPPED)
    except psutil.Error:  # it ended meanwhile
        return False


def _parts(text: str) -> re.Match[str] | None:
    return re.fullmatch(r"process (\d+) on (.*)", text)
