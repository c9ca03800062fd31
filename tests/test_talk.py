"""Talking with the players of a run: turns, what stops or refuses one, and commands."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from qspin.config import load_config
from qspin.errors import QspinError
from qspin.figures.evaluation import read_evaluation
from qspin.prepare import prepare
from qspin.records import Message
from qspin.run_dir import RunDir
from qspin.trials import loaded as loaded_module
from qspin.trials.loaded import Loaded
from qspin.trials.talk import COMMANDS, Manner, Show, Talk, Turn

GREEDY = Manner(temperature=0, top_p=1, max_new_tokens=10)
WILD = Manner(temperature=2.0, top_p=1, max_new_tokens=40)


class Recorder:
    """A screen that remembers, and at some piece does something."""

    def __init__(self, at_piece: Callable[[int], None] = lambda _count: None) -> None:
        self.turns: list[dict[str, str]] = []
        self.notes: list[str] = []
        self._at_piece, self._count = at_piece, 0

    @contextlib.contextmanager
    def replies(self, names: Sequence[str]) -> Iterator[Show]:
        self.turns.append(dict.fromkeys(names, ""))

        def show(place: int, piece: str) -> None:
            self.turns[-1][names[place]] += piece
            self._count += 1
            self._at_piece(self._count)

        yield show

    def note(self, text: str) -> None:
        self.notes.append(text)


# --- turns ---


def test_each_player_answers_as_it_did_when_it_was_measured(played_run: RunDir, loaded: Loaded) -> None:
    screen = Recorder()
    talk = Talk(loaded, ["base", "1"], GREEDY, screen)
    prompts = prepare(load_config(played_run.config), datetime.date(2026, 1, 2)).heldout_prompts
    for prompt in prompts:
        assert talk.hear(prompt)
        assert talk.hear("/new")
    measured = {"the base": played_run.base, "iteration 1": played_run.iteration(1)}
    for name, folder in measured.items():
        assert [turn[name] for turn in screen.turns] == read_evaluation(folder.evaluation).greedy_completions
    assert screen.turns[0]["the base"] != screen.turns[0]["iteration 1"]
    assert any("cut at 10 tokens" in note for note in screen.notes)


def test_each_goes_on_from_its_own_answers(loaded: Loaded) -> None:
    screen = Recorder()
    talk = Talk(loaded, ["0", "1"], WILD, screen, system="Be brief.", seed=5)
    talk.hear("What is 1?")
    talk.hear("And 2?")
    first, second = screen.turns
    for player, name in (("0", "iteration 0"), ("1", "iteration 1")):
        conversation = [
            Message("system", "Be brief."),
            Message("user", "What is 1?"),
            Message("assistant", first[name]),
            Message("user", "And 2?"),
        ]
        loaded.seat(player)
        [reply] = loaded.reply([conversation], max_new_tokens=40, temperature=2.0, seed=6)
        assert reply.text == second[name]
    assert first["iteration 0"] != first["iteration 1"]


def test_a_retry_is_another_sample_in_place_of_the_last(loaded: Loaded) -> None:
    screen = Recorder()
    talk = Talk(loaded, ["0"], WILD, screen)
    with pytest.raises(QspinError, match="nothing has been asked"):
        talk.hear("/retry")
    talk.hear("What is 1?")
    talk.hear("/retry")
    first, second = (turn["iteration 0"] for turn in screen.turns)
    assert first != second
    assert [(turn.question, turn.answer) for turn in talk.seats[0].turns] == [("What is 1?", second)]
    talk.hear("/temperature 0")
    talk.hear("/retry")
    assert any("takes the likeliest" in note for note in screen.notes)
    assert len(talk.seats[0].turns) == 1


def test_a_reply_that_is_stopped_keeps_what_was_said(loaded: Loaded) -> None:
    def stop(count: int) -> None:
        if count == 5:
            raise SystemExit(130)

    screen = Recorder(stop)
    talk = Talk(loaded, ["0", "1"], WILD, screen)
    with pytest.raises(SystemExit):
        talk.hear("What is 1?")
    [turn] = talk.seats[0].turns
    assert turn.answer == screen.turns[0]["iteration 0"] != ""
    assert talk.seats[1].turns == [], "who had said nothing has no such turn"
    talk.hear("And 2?")
    assert [turn.question for turn in talk.seats[0].turns] == ["What is 1?", "And 2?"]
    assert [turn.question for turn in talk.seats[1].turns] == ["And 2?"]


def test_a_retry_that_is_stopped_before_its_first_word_changes_nothing(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Talk(loaded, ["0"], WILD, Recorder())
    talk.hear("What is 1?")
    before = list(talk.seats[0].turns)
    stop = SystemExit(130)
    monkeypatch.setattr(loaded, "_prompt", lambda *_: (_ for _ in ()).throw(stop))
    with pytest.raises(SystemExit):
        talk.hear("/retry")
    assert talk.seats[0].turns == before


def test_a_full_context_is_told_and_the_conversation_is_kept(loaded: Loaded) -> None:
    talk = Talk(loaded, ["0"], GREEDY, Recorder())
    talk.hear("What is 1?")
    kept = list(talk.seats[0].turns)
    with pytest.raises(QspinError, match="more than the model's 512; begin a new one") as caught:
        talk.hear("many words " * 300)
    assert "\n" not in str(caught.value)
    assert talk.seats[0].turns == kept
    talk.hear("/retry")  # of the last question that was answered
    assert [turn.question for turn in talk.seats[0].turns] == ["What is 1?"]
    talk.hear("What is 2?")
    assert len(talk.seats[0].turns) == 2


def test_memory_that_runs_out_is_told_and_the_conversation_is_kept(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no room")

    screen = Recorder()
    talk = Talk(loaded, ["0"], GREEDY, screen)
    talk.hear("What is 1?")
    before = [*talk.seats[0].turns]
    with monkeypatch.context() as patch:
        patch.setattr(loaded_module, "generate", refuse)
        with pytest.raises(QspinError) as caught:
            talk.hear("And 2?")
    assert str(caught.value) == "out of memory (no room); /new starts over, with a shorter conversation"
    assert talk.seats[0].turns == before
    assert talk.hear("And 2?")


def test_what_one_of_two_can_not_answer_neither_has_been_asked(loaded: Loaded) -> None:
    talk = Talk(loaded, ["0", "1"], WILD, Recorder())
    talk.hear("What is 1?")
    talk.seats[1].turns = [Turn(0, "many words " * 300, "so many"), *talk.seats[1].turns]
    before = [list(seat.turns) for seat in talk.seats]
    for asked in ("And 2?", "/retry"):
        with pytest.raises(QspinError, match="more than the model's 512"):
            talk.hear(asked)
        assert [seat.turns for seat in talk.seats] == before, asked


# --- commands ---


def test_a_new_seat_goes_on_from_the_conversation(loaded: Loaded) -> None:
    screen = Recorder()
    talk = Talk(loaded, ["0"], GREEDY, screen)
    talk.hear("What is 1?")
    past = talk.seats[0].turns
    talk.hear("/seat base last")
    assert [(seat.player, seat.turns) for seat in talk.seats] == [("base", past), ("1", past)]
    talk.hear("And 2?")
    base, last = (seat.turns for seat in talk.seats)
    assert base[1].answer != last[1].answer
    talk.hear("/seat 1")
    assert [(seat.player, seat.turns) for seat in talk.seats] == [("1", last)], "it keeps its own past"
    for wrong in ("/seat", "/seat 9", "/seat a b c"):
        with pytest.raises(QspinError, match=r"^/seat: .*last, best"):
            talk.hear(wrong)
    with pytest.raises(QspinError, match="both are iteration 1; name two"):
        talk.hear("/seat 1 last")
    assert [seat.player for seat in talk.seats] == ["1"]


def test_a_system_message_comes_and_goes(loaded: Loaded) -> None:
    screen = Recorder()
    talk = Talk(loaded, ["1"], GREEDY, screen)
    for text in ("/system Answer with a song.", "What is 1?", "/new", "/system", "What is 1?"):
        talk.hear(text)
    sung, said = (turn["iteration 1"] for turn in screen.turns)
    system = [Message("system", "Answer with a song.")]
    for answer, before in ((sung, system), (said, [])):
        [reply] = loaded.reply([[*before, Message("user", "What is 1?")]], max_new_tokens=10, temperature=0)
        assert reply.text == answer
    assert sung != said


def test_commands(loaded: Loaded) -> None:
    screen = Recorder()
    talk = Talk(loaded, ["1"], GREEDY, screen)
    assert talk.hear("/help")
    for name in COMMANDS:
        assert any(note.startswith(name) for note in screen.notes)
    assert not talk.hear("/quit")
    with pytest.raises(QspinError, match=r"^no command /foo; /help lists them$"):
        talk.hear("/foo bar\nand more")
    talk.hear("/temperature 1.5")
    assert talk.manner.temperature == 1.5
    for wrong in ("/temperature", "/temperature hot", "/temperature -1", "/temperature nan"):
        with pytest.raises(QspinError, match=r"a number from 0 on, as 0\.7"):
            talk.hear(wrong)
    talk.hear(" /etc is a folder")  # no command
    assert talk.seats[0].turns[0].question == "/etc is a folder"


@pytest.mark.parametrize("figures", [(-1, 1, 1), (float("inf"), 1, 1), (1, 0, 1), (1, 1.1, 1), (1, 1, 0)])
def test_figures_out_of_bounds(figures: tuple[float, float, int]) -> None:
    with pytest.raises(QspinError, match=r"temperature|top-p|max-new-tokens"):
        Manner(*figures)
