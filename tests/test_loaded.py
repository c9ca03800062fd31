"""Players that take turns in the slot of one loaded base."""

from __future__ import annotations

import datetime
import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from command_line import call
from conftest import flip_byte, small_run

import qspin
from qspin.config import load_config
from qspin.errors import QspinError
from qspin.figures.evaluation import read_evaluation
from qspin.fitting.memory import OutOfMemory
from qspin.prepare import prepare
from qspin.records import Message
from qspin.run_dir import RunDir
from qspin.spin import run
from qspin.trials import loaded as loaded_module
from qspin.trials.loaded import Loaded, Stream
from qspin.watch.progress import Silent

NEW = 10


@pytest.fixture(scope="module")
def loaded(played_run: RunDir) -> Loaded:
    return Loaded.open(played_run)


@pytest.fixture(scope="module")
def conversations(played_run: RunDir) -> list[list[Message]]:
    """The held-out prompts."""
    prompts = prepare(load_config(played_run.config), datetime.date(2026, 1, 2)).heldout_prompts
    return [[Message("user", prompt)] for prompt in prompts]


# --- who is in the slot ---


def test_an_iteration_is_named_by_its_number_or_its_text(loaded: Loaded) -> None:
    assert loaded.seat(0) == "0"
    with pytest.raises(QspinError, match="'7' is not finished"):
        loaded.seat(7)


def test_last_is_the_last_and_none_is_the_one_that_is_kept(loaded: Loaded) -> None:
    assert loaded.seat("last") == "1"
    assert loaded.seat(None) == loaded.seat("best")


@pytest.mark.parametrize(
    ("wanted", "told"), [("2", "0 to 1 are"), ("sft", "no warm start"), ("worst", "last, best or 0 to 1 are")]
)
def test_a_player_that_is_not_there(loaded: Loaded, wanted: str, told: str) -> None:
    with pytest.raises(QspinError, match=told):
        loaded.seat(wanted)


def test_each_player_answers_as_it_did_when_it_was_measured(
    played_run: RunDir, loaded: Loaded, conversations: list[list[Message]]
) -> None:
    measured = {"base": played_run.base, "0": played_run.iteration(0), "1": played_run.iteration(1)}
    found = {}
    for name in ("1", "base", "0"):
        assert loaded.seat(name) == name
        found[name] = [reply.text for reply in loaded.reply(conversations, max_new_tokens=NEW, temperature=0)]
        assert found[name] == read_evaluation(measured[name].evaluation).greedy_completions
    assert found["base"] != found["1"] != found["0"]


def test_a_damaged_adapter_is_not_played(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    settings = small_run(tiny_folder("llama"), tmp_path / "rows.jsonl", rows=18) | {"iterations": 1, "sft.epochs": 1}
    run(prepare(load_config(None, settings), datetime.date(2026, 1, 2)), tmp_path / "run", Silent())
    run_dir = RunDir(tmp_path / "run")
    loaded = qspin.load(run_dir.path)
    for player in ("sft", "0"):
        loaded.seat(player)
        told = flip_byte(run_dir.player(player).adapter)
        for play in (loaded.seat, lambda player: qspin.load(run_dir.path, player)):
            with pytest.raises(QspinError) as caught:
                play(player)
            assert str(caught.value) == told
        answer = call("chat", run_dir.path, "--iteration", player)
        assert (answer.code, answer.out, answer.err.splitlines()[-1]) == (1, "", f"error: {told}")
    loaded.seat("base")


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(QspinError, match="not the folder of a run"):
        Loaded.open(RunDir(tmp_path))


# --- what is asked ---


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ("Hello", "generate takes a list of prompts"),
        ([3], "generate takes a list of prompts"),
        ([{"role": "user", "content": "Hi"}], "generate takes a list of prompts"),
        ({"Hi": 1}, "generate takes a list of prompts"),
        ([["Hi"]], "a turn has a role .* and its content; got 'Hi'"),
        (
            [[{"role": "user", "content": None}]],
            "a turn has a role .* and its content; got {'role': 'user', 'content': None}",
        ),
    ],
)
def test_what_is_no_prompt_is_told(loaded: Loaded, prompts: Any, said: str) -> None:
    with pytest.raises(QspinError, match=said):
        loaded.generate(prompts)


def test_a_reply_is_to_messages(loaded: Loaded) -> None:
    with pytest.raises(QspinError, match="reply takes conversations, lists of"):
        loaded.reply(["Hi"])  # type: ignore[list-item]


def test_prompts_may_come_one_by_one(loaded: Loaded) -> None:
    settings: dict[str, Any] = {"max_new_tokens": NEW, "temperature": 0}
    assert loaded.generate((text for text in ("Hi", "Why?")), **settings) == loaded.generate(["Hi", "Why?"], **settings)


@pytest.mark.parametrize("settings", [{"max_new_tokens": 2.5}, {"temperature": "0.7"}, {"top_p": float("nan")}])
def test_settings_of_another_kind_are_told(loaded: Loaded, settings: dict[str, Any]) -> None:
    with pytest.raises(
        QspinError, match=r"^max_new_tokens=.*: a whole number from 1, a number from 0 and one above 0 up"
    ):
        loaded.generate(["Hi"], **settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_new_tokens", 0), ("temperature", -1), ("temperature", math.nan), ("top_p", 0), ("top_p", 1.1)],
)
def test_settings_out_of_bounds(loaded: Loaded, name: str, value: float) -> None:
    with pytest.raises(QspinError, match=f"{name}={value}"):
        loaded.generate(["Hello"], **{name: value})


def test_a_conversation_beyond_the_context(loaded: Loaded) -> None:
    with pytest.raises(QspinError, match="more than the model's 512; begin a new one"):
        loaded.reply([[Message("user", "many words " * 100)]], max_new_tokens=400)


# --- replies ---


def test_the_pieces_make_up_the_reply(loaded: Loaded, conversations: list[list[Message]]) -> None:
    pieces: dict[int, list[str]] = defaultdict(list)
    loaded.seat("0")
    replies = loaded.reply(
        conversations, max_new_tokens=40, temperature=1.5, on_text=lambda index, text: pieces[index].append(text)
    )
    assert {index: "".join(parts) for index, parts in pieces.items()} == {
        index: reply.text for index, reply in enumerate(replies) if reply.text
    }
    assert max(map(len, pieces.values())) > 5


def test_no_piece_ends_in_half_a_character(loaded: Loaded) -> None:
    renderer, pieces = loaded.speech.renderer, []
    [prompt] = [renderer.prompt_ids([Message("user", text)]) for text in ("a 🦜b é",)]
    stream = Stream(renderer, 0, lambda _index, text: pieces.append(text))
    for token in prompt:  # whose parrot is four tokens of a byte each
        stream.add(token)
    stream.end()
    assert "".join(pieces) == renderer.completion_text(prompt)
    assert "🦜" in "".join(pieces)
    assert not any("\ufffd" in piece for piece in pieces)


def test_sampling_is_by_seed(loaded: Loaded, conversations: list[list[Message]]) -> None:
    def said(seed: int) -> list[str]:
        return [reply.text for reply in loaded.reply(conversations, max_new_tokens=NEW, temperature=1, seed=seed)]

    assert said(3) == said(3) != said(4)
    one, two = conversations[:2]
    replies = loaded.reply([one, two, one], max_new_tokens=NEW, temperature=1)
    assert replies[0] == replies[2] == loaded.reply([one], max_new_tokens=NEW, temperature=1)[0] != replies[1]
    assert loaded.reply([]) == []


# --- memory that runs out ---

Refuse = Callable[..., list[int]]


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """Lets memory run out in the first tries, after so many replies or after so many steps; returns their widths."""
    inner, widths = loaded_module.generate, list[int]()

    def begin(*replies: int, steps: int = 0, width: int = 4) -> list[int]:
        def refusing(model: Any, requests: Any, **how: Any) -> Any:
            widths.append(how["width"])
            if len(widths) > len(replies):
                return inner(model, requests, **how)
            if some := replies[len(widths) - 1]:
                inner(model, requests[:some], **how)
            if steps:
                inner(model, requests, **how | {"max_new_tokens": steps, "on_done": lambda *_: None})
            raise torch.OutOfMemoryError("no room")

        widths.clear()
        monkeypatch.setattr(loaded_module, "rows_at_once", lambda *_: width)
        monkeypatch.setattr(loaded_module, "generate", refusing)
        return widths

    return begin


@pytest.mark.parametrize("said", ["CUDA out of memory. Tried to allocate 2 GiB", "CUDA error: out of memory"])
def test_a_base_that_memory_has_no_room_for_is_one_line(
    said: str, played_run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a card that a desktop and a game have filled."""

    def refuse(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError(said) if "Tried" in said else RuntimeError(said)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(QspinError, match=rf"^out of memory \({said}\); close other programs: .* does not fit"):
        Loaded.open(played_run)


def test_replies_that_memory_does_not_hold_side_by_side_are_made_with_fewer(
    loaded: Loaded, conversations: list[list[Message]], refuse: Refuse
) -> None:
    asked = [*conversations, [Message("user", "What is 1?")], [Message("user", "And 2?")]]
    whole = loaded.reply(asked, max_new_tokens=NEW, temperature=1)
    assert len(asked) > 4
    widths = refuse(1, 0)
    assert loaded.reply(asked, max_new_tokens=NEW, temperature=1) == whole
    assert widths == [4, 2, 1]
    widths, heard = refuse(0, 0), defaultdict[int, str](str)

    def hear(index: int, text: str) -> None:
        heard[index] += text

    assert loaded.reply(asked, max_new_tokens=NEW, temperature=1, on_text=hear) == whole
    assert widths == [4, 2, 1]
    assert heard == {index: reply.text for index, reply in enumerate(whole) if reply.text}
    widths = refuse(0, 0, 0, 0)
    with pytest.raises(OutOfMemory, match="no room"):
        loaded.reply(asked, max_new_tokens=NEW)
    assert widths == [4, 2, 1], "one at a time was the last try"
    refuse(0, width=64)
    with pytest.raises(OutOfMemory, match="no room"):
        loaded.reply(asked[:1], max_new_tokens=NEW)


def test_a_stream_tells_nothing_twice(loaded: Loaded, conversations: list[list[Message]], refuse: Refuse) -> None:
    widths, heard = refuse(0, steps=6), defaultdict[int, str](str)

    def hear(index: int, text: str) -> None:
        heard[index] += text

    with pytest.raises(OutOfMemory, match="no room"):
        loaded.reply(conversations, max_new_tokens=NEW, temperature=1, on_text=hear)
    assert widths == [3]
    assert heard


def test_a_prompt_that_memory_does_not_hold_is_one_line(loaded: Loaded, refuse: Refuse) -> None:
    refuse(0)
    with pytest.raises(QspinError) as caught:
        loaded.generate(["Hello"])
    assert str(caught.value) == (
        "out of memory while replying (no room); ask for fewer new tokens, or for fewer replies at once where on_text "
        "hears them"
    )
