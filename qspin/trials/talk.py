"""A conversation with one player of a run, or with two: its turns, its commands, and what each has said.

    talk = Talk(Loaded.open(run_dir), ["0", "1"], Manner(temperature=0.7, top_p=1.0, max_new_tokens=256), screen)
    talk.hear("Why is the sky blue?")       # each player answers, and goes on from its own answers
    talk.hear("/retry")

Free of terminals: talk_view.py reads what is said, and shows what comes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

from qspin.errors import QspinError, one_line
from qspin.figures.players import told
from qspin.fitting.memory import OutOfMemory, refusals_told
from qspin.records import Message
from qspin.stopping import stops_held
from qspin.trials.loaded import Loaded, Reply, named

Show = Callable[[int, str], None]  # in which place, and what comes next

COMMANDS = {
    "/new": "start over",
    "/retry": "the last question again, another sample",
    "/system TEXT": "a system message from the next turn on; without a text there is none",
    "/seat PLAYER [PLAYER]": "who answers, one or two: base, sft, last, best or an iteration's number",
    "/temperature N": "of sampling; 0 always takes the likeliest token",
    "/help": "this list",
    "/quit": "leave, as Ctrl-D does",
}
PASTED = "Pasted lines are one message. A message that begins with / has a space before it. Ctrl-C stops a reply."


class Screen(Protocol):
    """Where a conversation is shown."""

    def replies(self, names: Sequence[str]) -> AbstractContextManager[Show]:
        """Opened for a turn: takes the replies of these players as they are made."""

    def note(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True)
class Manner:
    """How a player answers.

    Raises:
        QspinError: a figure out of its bounds.
    """

    temperature: float
    top_p: float
    max_new_tokens: int

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise QspinError(f"temperature: {self.temperature} is not a number from 0 on, as 0.7")
        if not 0 < self.top_p <= 1:
            raise QspinError(f"--top-p: {self.top_p} is not above 0 and at most 1")
        if self.max_new_tokens < 1:
            raise QspinError(f"--max-new-tokens: {self.max_new_tokens} is less than 1")


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and what a player answered, or had said of it when it was stopped."""

    number: int
    question: str
    answer: str


@dataclass(slots=True)
class Seat:
    """A player in the conversation, with its own past."""

    player: str
    turns: list[Turn] = field(default_factory=list)


class Talk:
    """A conversation under way.

    Args:
        players: who answers, as `loaded.named` calls them.
        seed: of the first reply's sampling; each turn, and each retry, takes the next.
    """

    def __init__(
        self,
        loaded: Loaded,
        players: Sequence[str],
        manner: Manner,
        screen: Screen,
        *,
        system: str = "",
        seed: int = 0,
    ) -> None:
        self.seats = [Seat(player) for player in different(players)]
        self.manner, self.system = manner, system
        self._loaded, self._screen, self._seed = loaded, screen, seed
        self._number = 0  # of the turn under way, or the last
        self._question = ""

    def hear(self, text: str) -> bool:
        """Answer a message, or obey a command; False after the last.

        Raises:
            QspinError: it can't be answered, or is no command. The conversation is as it was before.
        """
        if text.startswith("/"):
            return self._obey(text)
        with self._as_before_if_refused():
            self._number, self._question = self._number + 1, text.strip()
            self._answer()
        return True

    @contextmanager
    def _as_before_if_refused(self) -> Iterator[None]:
        """A question that one player can't answer was asked of none, and is not the last."""
        before = self._number, self._question, self._seed
        pasts = [seat.turns for seat in self.seats]
        try:
            yield
        except QspinError:
            self._number, self._question, self._seed = before
            for seat, turns in zip(self.seats, pasts, strict=True):
                seat.turns = turns
            raise

    def _answer(self) -> None:
        """Everybody answers the question, in turn."""
        seed, self._seed = self._seed, self._seed + 1
        with self._screen.replies([told(seat.player) for seat in self.seats]) as show:
            ends = [self._reply(place, seat, seed, show) for place, seat in enumerate(self.seats)]
        for seat, reply in zip(self.seats, ends, strict=True):
            if not reply.ended:
                who = f"{told(seat.player)}: " if len(self.seats) > 1 else ""
                self._screen.note(f"{who}cut at {reply.tokens} tokens (--max-new-tokens)")

    def _reply(self, place: int, seat: Seat, seed: int, show: Show) -> Reply:
        before = [turn for turn in seat.turns if turn.number < self._number]
        said: list[str] = []

        def on_text(_index: int, piece: str) -> None:
            said.append(piece)
            show(place, piece)

        if self._loaded.player != seat.player:
            with stops_held():  # half a player would answer next time
                self._loaded.seat(seat.player)
        try:
            with refusals_told():
                [reply] = self._loaded.reply(
                    [self._conversation(before)],
                    max_new_tokens=self.manner.max_new_tokens,
                    temperature=self.manner.temperature,
                    top_p=self.manner.top_p,
                    seed=seed,
                    on_text=on_text,
                )
        except SystemExit:
            if said:
                seat.turns = [*before, Turn(self._number, self._question, "".join(said))]
            raise
        except OutOfMemory as error:
            raise QspinError(f"out of memory ({error}); /new starts over, with a shorter conversation") from None
        seat.turns = [*before, Turn(self._number, self._question, reply.text)]
        return reply

    def _conversation(self, turns: Sequence[Turn]) -> list[Message]:
        return [*self._messages(turns), Message("user", self._question)]

    def _messages(self, turns: Sequence[Turn]) -> Iterator[Message]:
        if self.system:
            yield Message("system", self.system)
        for turn in turns:
            yield Message("user", turn.question)
            yield Message("assistant", turn.answer)

    # --- commands

    def _obey(self, text: str) -> bool:
        name, *rest = text.split(maxsplit=1)
        argument = rest[0].strip() if rest else ""
        commands = {
            "/new": self._new,
            "/retry": self._retry,
            "/system": self._set_system,
            "/seat": self._sit,
            "/temperature": self._set_temperature,
            "/help": self._help,
        }
        if name == "/quit":
            return False
        if name not in commands:
            raise QspinError(f"no command {one_line(name)[:40]}; /help lists them")
        commands[name](argument)
        return True

    def _new(self, _argument: str) -> None:
        for seat in self.seats:
            seat.turns = []
        self._question = ""
        self._screen.note("a new conversation")

    def _retry(self, _argument: str) -> None:
        if not self._question:
            raise QspinError("/retry: nothing has been asked yet")
        if self.manner.temperature == 0:
            self._screen.note("at temperature 0 every try takes the likeliest tokens")
        with self._as_before_if_refused():
            self._answer()

    def _set_system(self, argument: str) -> None:
        self.system = argument
        self._screen.note("system message from the next turn on" if argument else "no system message")

    def _sit(self, argument: str) -> None:
        if len(argument.split()) not in {1, 2}:
            raise QspinError("/seat: name one player, or two: base, sft, last, best or an iteration's number")
        wanted = different([named(self._loaded.run_dir, name, "/seat") for name in argument.split()])
        own = {seat.player: seat for seat in self.seats}
        # who sat here keeps its past; whoever is new goes on from the past of the place
        pasts = [own.get(name, self.seats[min(place, len(own) - 1)]).turns for place, name in enumerate(wanted)]
        self.seats = [Seat(name, list(past)) for name, past in zip(wanted, pasts, strict=True)]
        self._screen.note(f"{' and '.join(told(name) for name in wanted)} from the next turn on")

    def _set_temperature(self, argument: str) -> None:
        try:
            temperature = float(argument)
        except ValueError:
            raise QspinError(
                f"/temperature: name a number from 0 on, as 0.7; it is {self.manner.temperature:g}"
            ) from None
        self.manner = replace(self.manner, temperature=temperature)
        self._screen.note(f"temperature {temperature:g}")

    def _help(self, _argument: str) -> None:
        width = max(map(len, COMMANDS))
        for name, what in COMMANDS.items():
            self._screen.note(f"{name:<{width}}  {what}")
        self._screen.note(PASTED)


def different(players: Sequence[str]) -> Sequence[str]:
    """Raises a QspinError: they are one and the same."""
    if len(set(players)) < len(players):
        raise QspinError(f"both are {told(players[0])}; name two players, as base and last")
    return players
