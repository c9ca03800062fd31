"""A run's folder: every path in it, its lock, and where a run goes on.

run.json                    what the run is: configuration, versions, data, base model, threads
config.yaml                 the configuration as last started
rejects.jsonl               rows left out, each with its reason
SUMMARY.md                  the table of iterations
status.json                 where the run stands, while it works
base/evaluation.json        the untouched model on the held-out rows
warm-start/                 supervised training before iteration 0, if sft.epochs: as an iteration, without pairs
iteration-K/
    generation.json         plan: which rows make which shard, how wide
    generated/shard-*.jsonl pairs
    training.json           plan: effective batches and micro-batches
    scores/shard-*.jsonl    log-probs under the opponent
    snapshots/step-*/       while training
    metrics.jsonl           a line an optimiser step
    adapter/                PEFT format; an iteration is done when this and its evaluation are there
    evaluation.json
    seconds.json            wall-clock time by phase
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock
import psutil

from qspin.errors import QspinError
from qspin.files import existing, read_json, remove_temporaries, write_json


@dataclass(frozen=True, slots=True)
class IterationDir:
    """Paths of one iteration, or of the untouched base."""

    path: Path

    @property
    def generation_plan(self) -> Path:
        return self.path / "generation.json"

    def generated(self, shard: int) -> Path:
        return self.path / "generated" / f"shard-{shard:05d}.jsonl"

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

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def done(self) -> bool:
        return self.adapter.is_dir() and self.evaluation.is_file()

    def add_seconds(self, phase: str, seconds: float) -> None:
        """Time spent, over all the processes that worked on this iteration."""
        times = self.seconds()
        times[phase] = times.get(phase, 0.0) + seconds
        write_json(self.path / "seconds.json", times)

    def seconds(self) -> dict[str, float]:
        path = self.path / "seconds.json"
        return read_json(path) if path.is_file() else {}


@dataclass(frozen=True, slots=True)
class RunDir:
    """Paths of a run."""

    path: Path

    @property
    def record(self) -> Path:
        return self.path / "run.json"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def rejects(self) -> Path:
        return self.path / "rejects.jsonl"

    @property
    def summary(self) -> Path:
        return self.path / "SUMMARY.md"

    @property
    def status(self) -> Path:
        return self.path / "status.json"

    @property
    def base(self) -> IterationDir:
        return IterationDir(self.path / "base")

    @property
    def warm_start(self) -> IterationDir:
        return IterationDir(self.path / "warm-start")

    def iteration(self, index: int) -> IterationDir:
        return IterationDir(self.path / f"iteration-{index}")

    def check_usable(self) -> None:
        """Look before any work is done.

        Raises:
            QspinError: the path is a file, a folder of other things, or can't be made.
        """
        if self.path.exists() and not self.path.is_dir():
            raise QspinError(f"--out: {self.path} is a file; name a folder")
        if self.path.is_dir() and any(self.path.iterdir()) and not self.record.is_file() and not self._lock.is_file():
            raise QspinError(f"--out: {self.path} holds other things; name a new folder or one of an earlier run")
        parent = existing(self.path)
        if not os.access(parent, os.W_OK):
            raise QspinError(f"--out: {self.path} can't be made: no permission to write in {parent}")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder; the operating system lets go when the process ends, however it ends.

        Raises:
            QspinError: the folder can't be used, or another process works in it.
        """
        self.check_usable()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise QspinError(f"--out: {self.path} can't be made: {error.strerror}") from None
        held = filelock.FileLock(self._lock, blocking=False)
        try:
            held.acquire()
        except filelock.Timeout:
            by = self._last_holder()
            raise QspinError(f"{self.path}: {by} is working here; wait for it or choose another --out") from None
        try:
            self._holder.write_text(f"{process_name()}\n")
            remove_temporaries(self.path)
            yield
        finally:
            held.release()

    def holder(self) -> str | None:
        """The process that works in the folder now, named as by `process_name`; None if there is none."""
        name = self._last_holder()
        if not self._lock.is_file() or not _may_live(name):
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
        return self._holder.read_text().strip() if self._holder.is_file() else "another process"

    @property
    def _lock(self) -> Path:
        return self.path / ".lock"

    @property
    def _holder(self) -> Path:
        return self.path / ".holder"


def process_name() -> str:
    """This process, as others are told of it."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def _may_live(name: str) -> bool:
    """Whether a named process may be alive; of another machine's this can't be known."""
    found = re.fullmatch(r"process (\d+) on (.*)", name)
    return found is None or found[2] != socket.gethostname() or psutil.pid_exists(int(found[1]))
