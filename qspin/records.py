"""The types that flow through a run, from a data file's rows to scored pairs, and their JSON forms.

row of a file ─ data.py ─► Record ─ chat.py ─► Example ─ generation.py ─► Pair ─ scoring.py ─► Score
                      └──► Reject          └──► Reject
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """Where a row stands in its source, counted from 1."""

    number: int
    unit: Literal["line", "row"] = "line"  # rows of a JSON array, of Parquet and of the hub have no lines

    def __str__(self) -> str:
        return f"{self.unit} {self.number}"


@dataclass(frozen=True, slots=True)
class Record:
    """One good row: a conversation that ends on a user turn, and the real answer to it."""

    id: str  # the row's own id, else "row-" and its number; unique within a data set
    prompt: tuple[Message, ...]
    completion: str
    place: Place = field(default=Place(0), compare=False)


@dataclass(frozen=True, slots=True)
class Reject:
    """One row that is left out, and why."""

    place: Place
    code: str  # short and stable, as in "empty-completion"
    reason: str  # a sentence for a person
    malformed: bool = True  # False for duplicates and over-long rows, which say nothing bad about the file

    def to_json(self) -> dict[str, Any]:
        found = {"code": self.code, "reason": self.reason, "malformed": self.malformed}
        return {self.place.unit: self.place.number, **found}


@dataclass(frozen=True, slots=True)
class Example:
    """A record as tokens. `real_ids` ends in the end-of-turn token unless the completion was cut."""

    record_id: str
    prompt_ids: tuple[int, ...]
    real_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """An example with the opponent's completion of its prompt.

    `generated_ids` are the very tokens that were sampled. A sampled stop token stays as the last of them; a
    completion that hit the cap has none (`ended` is False).
    """

    record_id: str
    iteration: int  # whose opponent generated it
    prompt_ids: tuple[int, ...]
    real_ids: tuple[int, ...]
    generated_ids: tuple[int, ...]
    ended: bool

    @property
    def key(self) -> str:
        return f"{self.iteration}/{self.record_id}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> Pair:
        return Pair(
            record_id=value["record_id"],
            iteration=value["iteration"],
            prompt_ids=tuple(value["prompt_ids"]),
            real_ids=tuple(value["real_ids"]),
            generated_ids=tuple(value["generated_ids"]),
            ended=value["ended"],
        )


@dataclass(frozen=True, slots=True)
class Score:
    """Summed log-probs (nats) of a pair's two completions under the opponent of one iteration."""

    key: str  # Pair.key
    opponent_real_logps: float
    opponent_generated_logps: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
