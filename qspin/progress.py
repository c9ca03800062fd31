"""What a run says while it computes; the command line draws it, tests listen to it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Hears of each phase, of each piece of work done in it, and of things worth a sentence."""

    def phase(self, name: str, *, iteration: int | None, total: int, done: int, unit: str) -> None:
        """A phase starts; `done` of its `total` units were there already. `iteration` None is the untouched base."""
        ...

    def advance(self, units: float, **figures: float) -> None:
        """`units` more are done, or a part of one; `figures` are the phase's current numbers, as loss=0.69."""
        ...

    def note(self, text: str) -> None: ...
