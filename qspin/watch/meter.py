"""How far a run is, how fast, and how long it still takes.

    work = workload(run_dir, config, train_rows=154, heldout_rows=38)
    meter = Meter(to_do(work), measured(work), config.iterations, memory)
    run(prepared, out, Audience(meter, view))          # the meter first: the others read its status

A time left is made of paces that were measured, in this process or in one before it; where one was not, the time is
None. Free of torch.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qspin.run_dir import IterationDir, RunDir
from qspin.stopping import clock as running_clock
from qspin.watch.progress import evaluation_units

if TYPE_CHECKING:
    from qspin.config import RunConfig

# The rate is that of the last so many moments, which lie at least so many seconds apart: the last minute of quick
# steps, and more of slow ones.
MOMENTS, SECONDS_APART = 60, 1.0


@dataclass(frozen=True, slots=True)
class Work:
    """One phase of a run, and how many of its units it has."""

    folder: IterationDir
    phase: str
    iteration: int | None  # None: before the first
    units: int


def workload(run_dir: RunDir, config: RunConfig, train_rows: int, heldout_rows: int) -> list[Work]:
    """Every phase of a run, in order. A pair that teaches nothing is left out of a run, and counted here."""
    first, heldout = (evaluation_units(heldout_rows, opponent=opponent) for opponent in (False, True))
    work = [Work(run_dir.base, "evaluate", None, first)]
    if config.sft.epochs:
        folder = run_dir.warm_start
        work += [
            Work(folder, "warm start", None, config.sft.epochs * train_rows),
            Work(folder, "evaluate", None, heldout),
        ]
    for iteration in range(config.iterations):
        folder, pairs = run_dir.iteration(iteration), train_rows * len(config.train.learnt_from(iteration))
        work += [
            Work(folder, "generate", iteration, train_rows),
            Work(folder, "score", iteration, pairs),
            Work(folder, "train", iteration, config.train.epochs * pairs),
            Work(folder, "evaluate", iteration, heldout),
        ]
    return work


def to_do(work: Sequence[Work]) -> list[Work]:
    """The phases that no earlier process finished, and some that it did: of a folder all or none are left out."""
    return [item for item in work if not item.folder.evaluation.is_file()]


def measured(work: Sequence[Work]) -> dict[str, float]:
    """Seconds a unit of each phase that earlier processes finished, of its last time."""
    paces: dict[str, float] = {}
    for item in work:
        seconds = item.folder.seconds()
        # unless the folder is evaluated, which comes last, the last phase in it may be half done
        finished = list(seconds) if item.folder.evaluation.is_file() else list(seconds)[:-1]
        name = "train" if item.phase == "warm start" else item.phase
        if name in finished:
            paces[item.phase] = seconds[name] / item.units
    return paces


@dataclass(frozen=True, slots=True)
class Status:
    """Where a run stands, for a person or a program. Seconds and rates that were not measured are None."""

    phase: str
    iteration: int | None  # from 0; None: before the first, of the base or of the warm start
    iterations: int
    done: float  # of `total` units
    total: int
    unit: str  # rows or pairs
    rate: float | None  # units a second, lately
    phase_seconds: float  # that this process has worked on the phase
    phase_seconds_left: float | None
    run_seconds_left: float | None
    memory_used: int  # bytes
    memory_total: int
    figures: dict[str, float]  # the last that the phase told
    prompt: str | None = None  # of the completion sampled last
    completion: str | None = None
    warm_start: bool = False
    baseline: bool = False  # of the supervised rounds beside the iterations

    @property
    def complete(self) -> bool:
        return self.done >= self.total


class Meter:
    """A `Progress` that knows the status at any moment; it may be asked from another thread.

    Args:
        paces: seconds a unit by phase, from earlier processes.
        iterations: how many there are in all, or rounds of the baseline.
        memory: bytes used and in total, asked for with each status.
    """

    def __init__(
        self,
        work: Sequence[Work],
        paces: Mapping[str, float],
        iterations: int,
        memory: Callable[[], tuple[int, int]],
        clock: Callable[[], float] = running_clock,
        *,
        baseline: bool = False,
    ) -> None:
        self.ended: Status | None = None  # the phase before this one, as it was left
        self._work = list(work)
        self._paces = dict(paces)
        self._iterations = iterations
        self._memory = memory
        self._baseline = baseline
        self._clock = clock
        self._lock = threading.Lock()
        self._place = -1  # in the work, of the phase under way
        self._phase: _Phase | None = None
        self._sample: tuple[str | None, str | None] = (None, None)

    def phase(
        self, name: str, *, iteration: int | None, total: int, done: int, unit: str, warm_start: bool = False
    ) -> None:
        self.ended = self.status()
        with self._lock:
            if self._phase is not None and self._phase.complete and (pace := self._phase.pace) is not None:
                self._paces[self._phase.name] = pace
            self._place = self._find(name, iteration)
            self._phase = _Phase(name, iteration, warm_start, total, unit, float(done), self._clock())

    def advance(self, units: float, **figures: float) -> None:
        with self._lock:
            assert self._phase is not None
            if units:
                self._phase.advance(units, self._clock())
            if figures:
                self._phase.figures = figures

    def sampled(self, prompt: str, completion: str) -> None:
        with self._lock:
            self._sample = (prompt, completion)

    def note(self, text: str) -> None: ...

    @property
    def complete(self) -> bool:
        """Whether the phase under way has done all its units."""
        return self._phase is not None and self._phase.complete

    def status(self) -> Status | None:
        """None before the first phase."""
        used, total = self._memory()
        with self._lock:
            phase = self._phase
            if phase is None:
                return None
            left = self._phase_left(phase)
            return Status(
                phase=phase.name,
                iteration=phase.iteration,
                warm_start=phase.warm_start,
                iterations=self._iterations,
                done=phase.done,
                total=phase.total,
                unit=phase.unit,
                rate=phase.rate,
                phase_seconds=self._clock() - phase.started,
                phase_seconds_left=left,
                run_seconds_left=self._run_left(phase, left),
                memory_used=used,
                memory_total=total,
                figures=phase.figures,
                prompt=self._sample[0],
                completion=self._sample[1],
                baseline=self._baseline,
            )

    def _find(self, name: str, iteration: int | None) -> int:
        """The place of a phase in the work: the next one, else one that is made again, else where we are."""
        places = [place for place, item in enumerate(self._work) if (item.phase, item.iteration) == (name, iteration)]
        return next((place for place in places if place > self._place), places[-1] if places else self._place)

    def _phase_left(self, phase: _Phase) -> float | None:
        if phase.complete:
            return 0.0
        pace = 1 / phase.rate if phase.rate is not None else self._paces.get(phase.name)
        if pace is None:
            return None
        return max(0.0, (phase.total - phase.done) * pace - (self._clock() - phase.advanced))

    def _run_left(self, phase: _Phase, left: float | None) -> float | None:
        """A phase to come goes at the pace of its kind when last finished, else at that of the one under way."""
        paces = dict(self._paces)
        if phase.rate is not None:
            paces.setdefault(phase.name, 1 / phase.rate)
        to_come = self._work[self._place + 1 :]
        if left is None or any(item.phase not in paces for item in to_come):
            return None
        return left + sum(item.units * paces[item.phase] for item in to_come)


class _Phase:
    """The phase under way: units done, and when."""

    def __init__(
        self, name: str, iteration: int | None, warm_start: bool, total: int, unit: str, done: float, now: float
    ) -> None:
        self.name, self.iteration, self.warm_start, self.total, self.unit = name, iteration, warm_start, total, unit
        self._sum = self._done_before = done
        self.started = self.advanced = now
        self.figures: dict[str, float] = {}
        self._moments = deque([(now, done)], maxlen=MOMENTS)

    @property
    def done(self) -> float:
        return round(self._sum, 6)  # parts of a unit add up to a hair less than one

    @property
    def complete(self) -> bool:
        return self.done >= self.total

    def advance(self, units: float, now: float) -> None:
        self._sum += units
        self.advanced = now
        if now - self._moments[-1][0] >= SECONDS_APART:
            self._moments.append((now, self.done))

    @property
    def rate(self) -> float | None:
        """Units a second, lately."""
        then, done = self._moments[0]
        if self.done <= done or self.advanced <= then:
            return None
        return (self.done - done) / (self.advanced - then)

    @property
    def pace(self) -> float | None:
        """Seconds a unit, over all that this process did of the phase."""
        did = self.done - self._done_before
        return (self.advanced - self.started) / did if did > 0 else None


def aged(status: Status, seconds: float) -> Status:
    """A status that was taken so many seconds ago, as it is likely to be now."""

    def later(left: float | None) -> float | None:
        return None if left is None else max(0.0, left - seconds)

    return replace(
        status,
        phase_seconds_left=later(status.phase_seconds_left),
        run_seconds_left=later(status.run_seconds_left),
    )
