"""What a run says while it computes: views draw it, files and trackers keep it, tests listen to it."""

from __future__ import annotations

from typing import Literal, Protocol

TrackerName = Literal["tensorboard", "wandb", "trackio"]  # see track.py


def evaluation_units(heldout_rows: int, *, opponent: bool) -> int:
    """Rows that an evaluation tells of in all: each is sampled, answered greedily and scored, and where there is an
    opponent, its completion is scored too."""
    return (4 if opponent else 3) * heldout_rows


class Progress(Protocol):
    """Hears of each phase, of each piece of work done in it, of completions, and of things worth a sentence."""

    def phase(
        self, name: str, *, iteration: int | None, total: int, done: int, unit: str, warm_start: bool = False
    ) -> None:
        """A phase starts; `done` of its `total` units were there already. `iteration` None is before the first: of the
        base, or of the warm start where that is said."""
        ...

    def advance(self, units: float, **figures: float) -> None:
        """`units` more are done, or a part of one; `figures` are the phase's current numbers, as loss=0.69.

        Those of an optimiser step say which one, step=0 being the phase's first. Those that come with no units are
        what the phase found.
        """
        ...

    def sampled(self, prompt: str, completion: str) -> None:
        """A completion has ended; `prompt` is the user turn that it answers."""
        ...

    def note(self, text: str) -> None: ...


class Silent:
    """A `Progress` that nobody watches."""

    def phase(
        self, name: str, *, iteration: int | None, total: int, done: int, unit: str, warm_start: bool = False
    ) -> None: ...
    def advance(self, units: float, **figures: float) -> None: ...
    def sampled(self, prompt: str, completion: str) -> None: ...
    def note(self, text: str) -> None: ...


class Audience:
    """A `Progress` that passes all it hears on to several, in their order."""

    def __init__(self, *listeners: Progress) -> None:
        self.listeners = listeners

    def phase(
        self, name: str, *, iteration: int | None, total: int, done: int, unit: str, warm_start: bool = False
    ) -> None:
        for listener in self.listeners:
            listener.phase(name, iteration=iteration, total=total, done=done, unit=unit, warm_start=warm_start)

    def advance(self, units: float, **figures: float) -> None:
        for listener in self.listeners:
            listener.advance(units, **figures)

    def sampled(self, prompt: str, completion: str) -> None:
        for listener in self.listeners:
            listener.sampled(prompt, completion)

    def note(self, text: str) -> None:
        for listener in self.listeners:
            listener.note(text)
