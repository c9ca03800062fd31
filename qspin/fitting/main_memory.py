"""Main memory that this process may take: the machine's, or what the container or job leaves that it runs in.

The kernel ends a process that goes beyond its control group's limit, however much the machine has free, so the limits
of the group and of all above it count (Linux: cgroups(7); memory.rst and cgroup-v2.rst of its documentation).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

OWN_GROUPS = Path("/proc/self/cgroup")  # lines of id:controllers:path; version 2 has id 0 and no controllers
GROUPS = Path("/sys/fs/cgroup")
# version → where its tree begins, the files of the limit and of what is taken, and what a line of the cache begins with
VERSIONS = {
    1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    2: ("", "memory.max", "memory.current", ""),
}


class MainMemory(NamedTuple):
    """Bytes."""

    total: int
    available: int  # without taking anything from other programs


def main_memory() -> MainMemory:
    """As it is now."""
    machine = psutil.virtual_memory()
    total, available = machine.total, machine.available
    for limit, taken in _groups():
        total, available = min(total, limit), min(available, limit - taken)
    return MainMemory(total, max(0, available))


def _groups() -> Iterator[tuple[int, int]]:
    """Limit, and what is taken and could not be had back, of each group. Version 1 says 2^63, less a page, where there
    is no limit."""
    if not OWN_GROUPS.is_file():  # not on Linux
        return
    for line in OWN_GROUPS.read_text().splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0" or "memory" in controllers.split(","):
            beginning, limit, taken, prefix = VERSIONS[2 if number == "0" else 1]
            tree = GROUPS / beginning
            own = tree / path.lstrip("/")
            # a container sees its own group as the tree's beginning, and may read a path that exists outside alone
            for group in (folder for folder in (own, *own.parents) if folder.is_relative_to(tree)):
                if (group / limit).is_file() and (allowed := (group / limit).read_text().strip()) != "max":
                    yield int(allowed), int((group / taken).read_text()) - _files(group, prefix)


def _files(group: Path, prefix: str) -> int:
    """Copies of files, which the kernel lets go of where memory is wanted."""
    told = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(told[f"{prefix}inactive_file"]) + int(told[f"{prefix}active_file"])
