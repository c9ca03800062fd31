"""Benchmarks: what players came to, one sealed file for each player and set-up.

    outcome = kept(run_dir.iteration(1), SetUp("gsm8k", shots=5))

harness.py has what computes them; nothing here needs it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import stdev
from typing import Any

from qspin.errors import QspinError
from qspin.figures.suites import METRICS
from qspin.files import read_json, write_json
from qspin.run_dir import IterationDir


@dataclass(frozen=True, slots=True)
class SetUp:
    """A task as it is put to a player: figures are compared only under the same."""

    task: str
    shots: int | None = None  # None: as many as the task says
    limit: int | None = None  # of a task's documents the first so many, of each of its parts
    chat: bool = False  # through the model's chat template
    definition: str | None = None  # hash of the folder that defines it, if not the harness does

    @property
    def told(self) -> str:
        """All but the task and its shots."""
        parts = [f"first {self.limit}"] if self.limit is not None else []
        return ", ".join([*parts, "chat"] if self.chat else parts)

    def file(self, folder: IterationDir) -> Path:
        shots = "" if self.shots is None else f",{self.shots}-shot"
        limit = "" if self.limit is None else f",first-{self.limit}"
        return folder.benchmarks / f"{self.task}{shots}{limit}{',chat' if self.chat else ''}.json"


@dataclass(frozen=True, slots=True)
class Score:
    """One figure of a task, or of a part of it."""

    task: str
    metric: str  # with its filter, where it has one of its own: "exact_match, strict-match"
    value: float
    error: float | None  # standard error; None: the harness knows none
    shots: int
    documents: int
    values: list[float] | None  # of each document, where `value` is their mean


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a player came to in a set-up."""

    set_up: SetUp
    scores: list[Score]
    harness: str  # version
    seconds: float


def keep(folder: IterationDir, outcome: Outcome) -> None:
    write_json(outcome.set_up.file(folder), asdict(outcome))


def kept(folder: IterationDir, set_up: SetUp) -> Outcome | None:
    """None: it was not computed yet, or of a task that has been defined otherwise since; raises as `read_json`."""
    path = set_up.file(folder)
    found = _read(path) if path.is_file() else None
    return found if found is not None and found.set_up == set_up else None


def all_kept(folder: IterationDir) -> list[Outcome]:
    """In order of their names; raises as `read_json`."""
    return [_read(path) for path in sorted(folder.benchmarks.glob("*.json"))]


def _read(path: Path) -> Outcome:
    found: dict[str, Any] = read_json(path)
    try:
        scores = [Score(**score) for score in found.pop("scores")]
        return Outcome(set_up=SetUp(**found.pop("set_up")), scores=scores, **found)
    except (KeyError, TypeError):
        raise QspinError(f"{path}: of another version of qspin; delete it and run again") from None


def shown(score: Score) -> bool:
    """Whether a table shows the figure: where a leaderboard shows one of a task's, that one alone."""
    return METRICS.get(score.task, score.metric) == score.metric


def gain(first: Score, score: Score) -> tuple[float, float | None]:
    """How much higher the second is, and the standard error of that over documents, which both were given.

    The error is None where a figure is no mean over documents.
    """
    difference = score.value - first.value
    if first.values is None or score.values is None or len(first.values) != len(score.values):
        return difference, None
    changes = [now - before for before, now in zip(first.values, score.values, strict=True)]
    return difference, stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else None
