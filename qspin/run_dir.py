"""A run's folder: every path in it, its lock, and where a run goes on.

run.json                    what the run is: configuration, versions, data, base model, threads
config.yaml                 the configuration as last started
template.jinja              its chat template, if that is not the tokenizer's own
rejects.jsonl               rows left out, each with its reason
SUMMARY.md                  the tables of players, and what they come to
verdict.json                the same for programs: sentences, why the run ended early, which iteration is kept
status.json                 where the run stands, while it works
base/evaluation.json        the untouched model on the held-out rows
warm-start/                 supervised training before iteration 0, if sft.epochs: as an iteration, without pairs
iteration-K/
    generation.json         plan: which rows make which shard, how wide
    generated/shard-*.jsonl pairs
    training.json           plan: effective batches and micro-batches
    scores/shard-*.jsonl    log-probs under the opponent
    snapshots/step-*/       while training: the last two
    metrics.jsonl           a line an optimiser step
    adapter/                PEFT format; an iteration is done when this and its evaluation are there
    evaluation.json
    benchmarks/*.json       what it came to in public tasks; base/ and warm-start/ have them too
    seconds.json            wall-clock time by phase
    memory.json             the most bytes held while a phase worked
supervised/
    status.json             where the baseline stands, while it works
    lr-R/round-K/           the baseline's round beside an iteration: as an iteration, without pairs
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from qspin.errors import QspinError
from qspin.files import (
    at_work,
    check_place,
    full_disk_told,
    make_folder,
    read_json,
    read_jsonl,
    remove_temporaries,
    write_json,
)
from qspin.holder import LETS_ON, is_name, is_paused, may_live, process_name
from qspin.records import Pair


@dataclass(frozen=True, slots=True)
class IterationDir:
    """Paths of one iteration, or of the untouched base."""

    path: Path

    @property
    def generation_plan(self) -> Path:
        return self.path / "generation.json"

    def generated(self, shard: int) -> Path:
        return self.path / "generated" / f"shard-{shard:05d}.jsonl"

    def pairs(self) -> list[Pair]:
        """What was generated for all training rows.

        Raises:
            QspinError: it is not all there, or damaged.
        """
        shards = range(len(read_json(self.generation_plan)["shards"]))
        return [Pair.from_json(row) for shard in shards for row in read_jsonl(self.generated(shard))]

    @property
    def training_plan(self) -> Path:
        return self.path / "training.json"

    def scores(self, shard: int) -> Path:
        return self.path / "scores" / f"shard-{shard:05d}.jsonl"

    @property
    def snapshots(self) -> Path:
        return self.path / "snapshots"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def steps(self) -> list[dict[str, float]]:
        """The metrics of each optimiser step; none if there was no training, or if they were damaged and taken away."""
        return read_jsonl(self.metrics) if self.metrics.is_file() else []

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def benchmarks(self) -> Path:
        return self.path / "benchmarks"

    @property
    def done(self) -> bool:
        return self.adapter.is_dir() and self.evaluation.is_file()

    @property
    def times(self) -> Path:
        return self.path / "seconds.json"

    @property
    def memory(self) -> Path:
        return self.path / "memory.json"

    def add_seconds(self, phase: str, seconds: float) -> None:
        """Time spent, over all the processes that worked on this iteration."""
        times = self.seconds()
        _show(self.times, times | {phase: times.get(phase, 0.0) + seconds})

    def seconds(self) -> dict[str, float]:
        """By phase; none if the file is not there, or damaged."""
        return _shown(self.times)

    def add_peak(self, phase: str, held: int) -> None:
        """Bytes held, the most of all the processes that worked on this iteration."""
        peaks = self.peaks()
        if held > peaks.get(phase, 0):
            _show(self.memory, peaks | {phase: held})

    def peaks(self) -> dict[str, int]:
        """By phase; none if the file is not there, or damaged."""
        return _shown(self.memory)


def _show(path: Path, figures: dict[str, Any]) -> None:
    with contextlib.suppress(OSError, QspinError):  # for show: it must not stop a run
        write_json(path, figures, durable=False)


def _shown(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = read_json(path)
    except QspinError:
        return {}
    return found


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths of a run."""

    path: Path

    @property
    def record(self) -> Path:
        return self.path / "run.json"

    def read_record(self) -> dict[str, Any]:
        """What the run is, as record.py wrote it.

        Raises:
            QspinError: it is missing or damaged.
        """
        advice = (
            f"it says what the run is, so nothing can go on from it: put a copy of it back, or delete {self.path} "
            "(adapters in it can be used as they are)"
        )
        return read_json(self.record, advice)

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def template(self) -> Path:
        return self.path / "template.jinja"

    @property
    def rejects(self) -> Path:
        return self.path / "rejects.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "SUMMARY.md"

    @property
    def verdict(self) -> Path:
        return self.path / "verdict.json"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def base(self) -> IterationDir:
        return IterationDir(self.path / "base")

    @property
    def warm_start(self) -> IterationDir:
        return IterationDir(self.path / "warm-start")

    @property
    def trials(self) -> Path:
        """MT-Benches of the run's players, which have a lock of their own."""
        return self.path / "mt-bench"

    @property
    def baseline_status(self) -> Path:
        return self.path / "supervised" / "status.json"

    def supervised(self, lr: float, index: int) -> IterationDir:
        """The baseline's round that stands beside an iteration."""
        return IterationDir(self.path / "supervised" / f"lr-{float(lr)}" / f"round-{index}")

    def supervised_rates(self) -> list[float]:
        """The learning rates that the baseline has a folder for."""
        names = (re.fullmatch(r"lr-([\d.e+-]+)", path.name) for path in self.path.glob("supervised/lr-*"))
        return sorted({float(name[1]) for name in names if name})

    def iteration(self, index: int) -> IterationDir:
        return IterationDir(self.path / f"iteration-{index}")

    def iterations_done(self) -> int:
        """How many, from the first on, are finished."""
        done = 0
        while self.iteration(done).done:
            done += 1
        return done

    def player(self, name: str) -> IterationDir:
        """Of base, sft (the warm start) or an iteration's number."""
        known = {"base": self.base, "sft": self.warm_start}
        return known[name] if name in known else self.iteration(int(name))

    def players(self) -> list[IterationDir]:
        """Every folder of a player that there is."""
        folders = [self.base, self.warm_start, *map(IterationDir, sorted(self.path.glob("iteration-*")))]
        folders += map(IterationDir, sorted(self.path.glob("supervised/lr-*/round-*")))
        return [folder for folder in folders if folder.path.is_dir()]

    def made(self) -> list[str]:
        """The folders here that only a run makes; while there are none, nothing is lost where it becomes another."""
        return sorted(path.name for pattern in _MADE for path in self.path.glob(pattern) if path.is_dir())

    def check_run(self) -> None:
        """Raises a QspinError: this is not the folder of a run."""
        self.check_there()
        if not self.record.is_file():
            raise self.no_run()

    def no_run(self) -> QspinError:
        """What is said of a folder that is none of a run: which around it, or in it, is one."""
        near = (*self.path.parents, *sorted(self.path.iterdir()))
        run = next((folder for folder in near if os.path.isfile(folder / self.record.name)), None)  # noqa: PTH113
        hint = "" if run is None else f"; {run} is one"
        return QspinError(f"{self.path}: not the folder of a run, it has no {self.record.name}{hint}")

    def check_there(self) -> None:
        """Raises a QspinError: this is not a folder."""
        if self.path.is_file():
            raise QspinError(f"{self.path}: a file; name the folder of a run")
        if not self.path.is_dir():
            raise QspinError(f"{self.path}: no such folder")

    def check_usable(self) -> None:
        """Look before any work is done.

        Raises:
            QspinError: the path is a file, leads nowhere, or can't be made; it is a folder of other things, or of a run
                that is not known any more; another process works in it.
        """
        dangling = next((part for part in (self.path, *self.path.parents) if _leads_nowhere(part)), None)
        if dangling is not None:
            raise QspinError(f"--out: {dangling} is a link that leads nowhere; name a folder")
        a_run = os.path.isfile(self.record)  # noqa: PTH113 (Path.is_file raises)
        look = "qspin status says whether its run is finished, and a copy of it can be gone on with"
        check_place(self.path, look if a_run else "name another folder")
        check_outside(self.path)
        ours = self.record, self._lock, self._holder  # Windows takes a lock's file away with it
        if self.path.is_dir() and any(self.path.iterdir()) and not any(path.is_file() for path in ours):
            raise QspinError(f"--out: {self.path} holds other things; name a new folder or one of an earlier run")
        made = self.made()
        if made and not self.record.is_file():
            raise QspinError(
                f"--out: {self.path} has {', '.join(made[:3])} of a run, but no {self.record.name}, which says what "
                "run that was; put a copy of it back, or name a new folder"
            )
        holder = self.holder()
        if holder is not None:
            raise self._taken(holder)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder; the operating system lets go when the process ends, however it ends. Nothing more is written
        once it was moved or deleted.

        Raises:
            QspinError: the folder can't be used, or another process works in it.
        """
        self.check_usable()
        held = filelock.FileLock(self._lock, blocking=False)
        try:
            with full_disk_told(self.path):
                make_folder(self.path)
                held.acquire()
        except filelock.Timeout:
            raise self._taken(self._new_holder()) from None
        except OSError as error:
            raise QspinError(f"--out: {self.path} can't be made: {error.strerror}") from None
        try:
            with full_disk_told(self._holder):
                self._holder.write_text(f"{process_name()}\n")
            remove_temporaries(self.path, but=self.trials)  # a judge may be heard there meanwhile
            with at_work(self._holder):
                yield
        finally:
            held.release()

    def _taken(self, by: str) -> QspinError:
        if is_paused(by):
            return QspinError(f"{self.path}: {by} is paused here; {LETS_ON}")
        return QspinError(f"{self.path}: {by} is working here; wait for it or choose another --out")

    def _new_holder(self) -> str:
        """Whoever has just been found to hold the lock, which it had to take before it could write its name."""
        for _ in range(_NAME_TRIES):
            name = self._last_holder()
            if is_name(name) and may_live(name):
                return name
            time.sleep(_NAME_SECONDS / _NAME_TRIES)
        return "another process"

    def holder(self) -> str | None:
        """The process that works in the folder now, named as by `process_name`; None if there is none."""
        name = self._last_holder()
        if not self._lock.is_file() or not may_live(name):
            return None
        # A lock can't be looked at, only tried. This is done only where a live process is named, which most likely
        # holds it: a process that starts at this very moment would be refused.
        held = filelock.FileLock(self._lock, blocking=False)
        try:
            held.acquire()
        except filelock.Timeout:
            return name
        except OSError:  # a folder that can't be written to: its process is all that tells
            return name
        held.release()
        return None

    def _last_holder(self) -> str:
        name = self._holder.read_text(errors="replace").strip() if self._holder.is_file() else ""
        return name or "another process"

    @property
    def _lock(self) -> Path:
        return self.path / ".lock"

    @property
    def _holder(self) -> Path:
        return self.path / ".holder"


def check_outside(folder: Path) -> None:
    """Raises a QspinError: a new folder would lie in that of a run, which clears what others are writing there, and
    goes on from an adapter that stands where its own would."""
    for part in Path(os.path.realpath(folder)).parents:
        run = RunDir(part)
        if run.record.is_file() and run.config.is_file():  # others may call a file run.json
            raise QspinError(f"--out: {folder} lies in the folder of the run {part}; name a folder beside it")


def _leads_nowhere(path: Path) -> bool:
    """Whether it is a link to what is not there, or to itself."""
    try:
        path.stat()
    except PermissionError:  # there may be something
        return False
    except OSError:
        return os.path.islink(path)  # noqa: PTH114 (Path.is_symlink raises)
    return False


# what only a run makes: all of it is a function of run.json
_MADE = ("base", "warm-start", "iteration-*", "supervised", "mt-bench")
_NAME_SECONDS, _NAME_TRIES = 1.0, 50
