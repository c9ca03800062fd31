"""A run's status as a file: written while the run works, read by `qspin status` from another terminal.

    {"process": "process 4711 on laptop", "written": 1790000000.0, "status": {"phase": "train", ...}}

`written` is in seconds since 1970, the keys of `status` are those of `meter.Status`. The baseline has its own file.
Free of torch.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import yaml

from qspin.config_files import NOT_YAML
from qspin.errors import QspinError, one_line
from qspin.files import read_json, write_json
from qspin.holder import is_paused, process_name
from qspin.run_dir import RunDir
from qspin.watch.meter import Meter, Status, aged

SECONDS_APART = 1.0  # between two writes, but for those that end something


class StatusFile:
    """A `Progress` that keeps the status in the run's folder. It writes only from inside the run, which holds the lock.

    The file is replaced in one step, and not synced: after a power cut it tells of a moment before. It is for show:
    where it can't be written, the run goes on without it.
    """

    def __init__(self, path: Path, meter: Meter, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._meter = meter
        self._clock = clock
        self._written = 0.0

    def phase(self, name: str, **_: object) -> None:  # noqa: ARG002
        self._write()

    def advance(self, units: float, **figures: float) -> None:  # noqa: ARG002
        if not units or self._meter.complete or self._clock() - self._written >= SECONDS_APART:
            self._write()

    def sampled(self, prompt: str, completion: str) -> None: ...
    def note(self, text: str) -> None: ...

    def _write(self) -> None:
        status = self._meter.status()
        assert status is not None
        value = {"process": process_name(), "written": time.time(), "status": asdict(status)}
        with contextlib.suppress(OSError, QspinError):
            write_json(self._path, value, durable=False)
        self._written = self._clock()


@dataclass(frozen=True, slots=True)
class Standing:
    """What can be seen of a run from outside."""

    state: Literal["not started", "starting", "running", "paused", "stopped", "finished"]
    process: str | None  # that works on it
    iterations_done: int
    status: Status | None  # as last written, its times left up to date; None before the first phase
    age: float | None  # seconds since it was written
    kept: int | None = None  # the iteration that is exported unless another is named; of a finished run
    baseline: tuple[Status, float] | None = None  # where it was left and seconds since, if that is after `status`


def look(run_dir: RunDir) -> Standing:
    """How a run is doing, or its baseline where that is what a process works on.

    Raises:
        QspinError: the folder is not there, or is not one of a run; a file in it is damaged.
    """
    run_dir.check_there()
    process = run_dir.holder()
    paused = process is not None and is_paused(process)
    if not run_dir.record.is_file():
        others = sorted(path.name for path in run_dir.path.iterdir() if path.name not in {".lock", ".holder"})
        if others:
            raise run_dir.no_run()
        return Standing("paused" if paused else "starting" if process else "not started", process, 0, None, None)

    done = run_dir.iterations_done()
    own, baseline = _read(run_dir.status), _read(run_dir.baseline_status)
    if process is not None:
        written = [told for told in (own, baseline) if told is not None and told.process == process]
        if not written:  # the files are of a process before this one, which has not begun a phase
            return Standing("paused" if paused else "starting", process, done, None, None)
        last = min(written, key=lambda told: told.age)  # one process may play a run and then its baseline
        return Standing("paused" if paused else "running", process, done, aged(last.status, last.age), last.age)
    status, age = (None, None) if own is None else (own.status, own.age)
    later = None if baseline is None or (age is not None and age < baseline.age) else (baseline.status, baseline.age)
    concluded = read_json(run_dir.verdict) if done and run_dir.verdict.is_file() else None
    ended = concluded is not None and concluded["stop"] is not None and concluded["iterations"] == done
    if done and (ended or done >= _iterations(run_dir.config)):
        kept = done - 1 if concluded is None else concluded["kept"]
        return Standing("finished", None, done, status, age, kept, later)
    return Standing("stopped", None, done, status, age, None, later)


class _Told(NamedTuple):
    status: Status
    process: str  # that wrote it
    age: float  # seconds since


def _read(path: Path) -> _Told | None:
    if not path.is_file():
        return None
    value = read_json(path)
    try:
        return _Told(Status(**value["status"]), value["process"], max(0.0, time.time() - value["written"]))
    except (KeyError, TypeError):
        raise QspinError(
            f"{path}: written by another version of qspin; it is new as soon as the command that wrote it goes on"
        ) from None


def _iterations(config: Path) -> int:
    """How many iterations the run was last asked for."""
    try:
        return int(yaml.safe_load(config.read_text(encoding="utf-8"))["iterations"])
    except (OSError, *NOT_YAML, KeyError, TypeError, OverflowError) as error:
        raise QspinError(
            f"{config}: damaged or unreadable ({one_line(error)}); the command that began the run writes it anew"
        ) from None
