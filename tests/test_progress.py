"""One event, several listeners."""

from __future__ import annotations

from qspin.watch.progress import Audience


class Listener:
    """Keeps what it hears, and in a common list who heard it."""

    def __init__(self, name: str, heard: list[tuple[object, ...]]) -> None:
        self.name, self.heard = name, heard

    def phase(
        self, name: str, *, iteration: int | None, total: int, done: int, unit: str, warm_start: bool = False
    ) -> None:
        self.heard.append((self.name, name, iteration, total, done, unit, warm_start))

    def advance(self, units: float, **figures: float) -> None:
        self.heard.append((self.name, units, figures))

    def sampled(self, prompt: str, completion: str) -> None:
        self.heard.append((self.name, prompt, completion))

    def note(self, text: str) -> None:
        self.heard.append((self.name, text))


def test_all_listeners_hear_all_in_their_order() -> None:
    heard: list[tuple[object, ...]] = []
    audience = Audience(Listener("first", heard), Listener("second", heard))
    audience.phase("train", iteration=1, total=9, done=3, unit="pairs")
    audience.phase("evaluate", iteration=None, total=8, done=0, unit="rows", warm_start=True)
    audience.advance(2, loss=0.5)
    audience.sampled("why", "because")
    audience.note("by the way")
    events = [
        ("train", 1, 9, 3, "pairs", False),
        ("evaluate", None, 8, 0, "rows", True),
        (2, {"loss": 0.5}),
        ("why", "because"),
        ("by the way",),
    ]
    assert heard == [(name, *event) for event in events for name in ("first", "second")]
