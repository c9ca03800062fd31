"""Players that take turns in the slot of one loaded base."""

from __future__ import annotations

import datetime
import math
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import CHATML, call, flip_byte, played_small, small_run
from safetensors.torch import load_file, save_file

import qspin
from qspin.config import load_config
from qspin.errors import QspinError
from qspin.figures.evaluation import read_evaluation
from qspin.files import read_json, write_json
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
def run_dir(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return played_small(tiny_folder("llama"), tmp_path_factory.mktemp("loaded"))


@pytest.fixture(scope="module")
def loaded(run_dir: RunDir) -> Loaded:
    return Loaded.open(run_dir)


@pytest.fixture(scope="module")
def conversations(run_dir: RunDir) -> list[list[Message]]:
    """The held-out prompts."""
    prompts = prepare(load_config(run_dir.config), datetime.date(2026, 1, 2)).heldout_prompts
    return [[Message("user", prompt)] for prompt in prompts]


def test_an_iteration_is_named_by_its_number_or_its_text(loaded: Loaded) -> None:
    assert loaded.seat(0) == "0"
    with pytest.raises(QspinError, match="'7' is not finished"):
        loaded.seat(7)


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
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


@pytest.mark.parametrize("settings", [{"max_new_tokens": 2.5}, {"temperature": "0.7"}, {"top_p": float("nan")}])
def test_settings_of_another_kind_are_told(loaded: Loaded, settings: dict[str, Any]) -> None:
    with pytest.raises(
        QspinError, match=r"^max_new_tokens=.*: a whole number from 1, a number from 0 and one above 0 up"
    ):
        loaded.generate(["Hi"], **settings)


def test_prompts_may_come_one_by_one(loaded: Loaded) -> None:
    settings: dict[str, Any] = {"max_new_tokens": NEW, "temperature": 0}
    assert loaded.generate((text for text in ("Hi", "Why?")), **settings) == loaded.generate(["Hi", "Why?"], **settings)


def test_each_player_answers_as_it_did_when_it_was_measured(
    run_dir: RunDir, loaded: Loaded, conversations: list[list[Message]]
) -> None:
    measured = {"base": run_dir.base, "0": run_dir.iteration(0), "1": run_dir.iteration(1)}
    found = {}
    for name in ("1", "base", "0"):
        assert loaded.seat(name) == name
        found[name] = [reply.text for reply in loaded.reply(conversations, max_new_tokens=NEW, temperature=0)]
        assert found[name] == read_evaluation(measured[name].evaluation).greedy_completions
    assert found["base"] != found["1"] != found["0"]


@pytest.mark.parametrize("said", ["CUDA out of memory. Tried to allocate 2 GiB", "CUDA error: out of memory"])
def test_a_base_that_memory_has_no_room_for_is_one_line(
    said: str, run_dir: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a card that a desktop and a game have filled."""

    def refuse(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError(said) if "Tried" in said else RuntimeError(said)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    with pytest.raises(QspinError, match=rf"^out of memory \({said}\); close other programs: .* does not fit"):
        Loaded.open(run_dir)


def test_last_is_the_last_and_none_is_the_one_that_is_kept(loaded: Loaded) -> None:
    assert loaded.seat("last") == "1"
    assert loaded.seat(None) == loaded.seat("best")


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


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_new_tokens", 0), ("temperature", -1), ("temperature", math.nan), ("top_p", 0), ("top_p", 1.1)],
)
def test_settings_out_of_bounds(loaded: Loaded, name: str, value: float) -> None:
    with pytest.raises(QspinError, match=f"{name}={value}"):
        loaded.generate(["Hello"], **{name: value})


@pytest.mark.parametrize("prompts", ["Hello", [{"role": "user", "content": "Hello"}]])
def test_a_single_prompt_is_no_list_of_prompts(loaded: Loaded, prompts: Any) -> None:
    with pytest.raises(QspinError, match="takes a list of prompts"):
        loaded.generate(prompts)


def test_another_base_or_template_is_refused(run_dir: RunDir, tmp_path: Path) -> None:
    copy = RunDir(tmp_path / "run")
    shutil.copytree(run_dir.path, copy.path)
    record = read_json(copy.record)
    write_json(copy.record, record | {"inputs": record["inputs"] | {"chat.template": "another"}})
    with pytest.raises(QspinError, match=r"chat.template: its content is not what"):
        Loaded.open(copy)
    base = {key: value for key, value in record["base"].items() if key != "folder"} | {"hub": "owner/name"}
    write_json(copy.record, record | {"base": base})
    with pytest.raises(QspinError, match=r"was made with the hub's owner/name, and here .* is the folder"):
        Loaded.open(copy)


@pytest.fixture
def own_base(tiny_folder: Callable[[str], Path], tmp_path: Path) -> RunDir:
    """A run whose base is the folder beside it, and who began with the adapter beside that."""
    shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    settings = small_run(tmp_path / "model", tmp_path / "rows.jsonl", rows=18) | {"iterations": 1}
    run(prepare(load_config(None, settings), datetime.date(2026, 1, 2)), tmp_path / "first", Silent())
    shutil.copytree(RunDir(tmp_path / "first").iteration(0).adapter, tmp_path / "adapter")
    settings["model.init_adapter"] = str(tmp_path / "adapter")
    run(prepare(load_config(None, settings), datetime.date(2026, 1, 2)), tmp_path / "run", Silent())
    return RunDir(tmp_path / "run")


def test_a_base_whose_weights_have_changed_is_refused(own_base: RunDir, tmp_path: Path) -> None:
    heard: list[str] = []
    Loaded.open(own_base, "0", heard.append)
    weights = tmp_path / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] *= 2
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(QspinError, match=r"^model.id: the 4-bit weights of model are not those .* bring the old ones"):
        Loaded.open(own_base, "0", heard.append)
    assert heard == []


def test_a_base_that_something_else_quantised_is_told_of(own_base: RunDir) -> None:
    heard: list[str] = []
    record = read_json(own_base.record)
    assert torch.__version__.partition("+")[0] in record["quantised_by"]
    elsewhere = record | {"base_hash": "0" * 64, "quantised_by": "another card"}
    for found in (elsewhere, {key: value for key, value in elsewhere.items() if key != "quantised_by"}):
        write_json(own_base.record, found)
        Loaded.open(own_base, "0", heard.append)
    assert len(heard) == 2
    assert all(f"model are not those that {own_base.path} began with (another device" in text for text in heard)
    write_json(own_base.record, record | {"quantised_by": "another card"})
    Loaded.open(own_base, "0", heard.append)  # it came to the same bytes
    assert len(heard) == 2


def test_the_adapter_that_a_run_began_with_must_be_the_same(own_base: RunDir, tmp_path: Path) -> None:
    loaded, weights = Loaded.open(own_base, "base"), tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = {name: tensor * 2 for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    loaded.seat("0")
    with pytest.raises(QspinError, match=r"^model.init_adapter: its content is not what .* began with; bring it back$"):
        loaded.seat("base")


def test_the_adapter_that_a_run_began_with_may_lie_elsewhere(
    own_base: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = small_run(tmp_path / "model", tmp_path / "rows.jsonl", rows=18) | {"iterations": 1}

    def again(**adapter: str) -> None:
        config = load_config(None, settings | {f"model.{key}": value for key, value in adapter.items()})
        run(prepare(config, datetime.date(2026, 1, 2)), own_base.path, Silent())

    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter").rename(tmp_path / "moved")
    again(init_adapter="moved")
    monkeypatch.chdir("/")
    Loaded.open(own_base, "base")
    with pytest.raises(QspinError, match=r"^model.init_adapter: its content is not what .* began with"):
        again()
    with pytest.raises(QspinError, match=r"^model.init_adapter: its content is not what .* began with"):
        again(init_adapter=str(tmp_path / "run" / "iteration-0" / "adapter"))


def test_a_base_in_a_folder_may_lie_elsewhere(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("llama", "qwen2"):
        shutil.copytree(tiny_folder(name), tmp_path / "models" / name)
    settings = small_run(Path("models/llama"), Path("rows.jsonl"), rows=18) | {"iterations": 1}
    made = RunDir(tmp_path / "run")

    def play(base: str) -> None:
        run(prepare(load_config(None, settings | {"model.id": base}), datetime.date(2026, 1, 2)), made.path, Silent())

    play("models/llama")
    monkeypatch.chdir("/")
    [before] = Loaded.open(made, "0").generate(["What is 3?"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "llama").rename(tmp_path / "moved")
    play("moved")
    monkeypatch.chdir("/")
    assert Loaded.open(made, "0").generate(["What is 3?"]) == [before]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        QspinError, match=rf"^model\.id: the rows are other tokens than when {made.path} began, so qwen2's"
    ):
        play("models/qwen2")
    weights = tmp_path / "moved" / "model.safetensors"
    tensors = {name: 2 * tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(
        QspinError, match=rf"^model\.id: the 4-bit weights of moved are not those that {made.path} began"
    ):
        play("moved")


def test_a_template_is_the_runs_own_whatever_becomes_of_its_file(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{# mine #}\n" + CHATML, encoding="utf-8-sig")
    settings = small_run(tiny_folder("llama"), tmp_path / "rows.jsonl", rows=18) | {"iterations": 1}
    settings["chat.template"] = str(template)
    made = RunDir(tmp_path / "run")
    run(prepare(load_config(None, settings), datetime.date(2026, 1, 2)), made.path, Silent())
    [before] = Loaded.open(made, "0").generate(["What is 3?"])
    template.unlink()
    made.path.rename(tmp_path / "moved")
    made = RunDir(tmp_path / "moved")
    assert Loaded.open(made, "0").generate(["What is 3?"]) == [before]
    template.write_bytes(made.template.read_bytes())
    run(prepare(load_config(None, settings), datetime.date(2026, 1, 2)), made.path, Silent())
    made.template.write_text("{# another #}" + CHATML)
    with pytest.raises(QspinError, match=r"^chat\.template: its content is not what .* began with; bring it back$"):
        Loaded.open(made, "0")


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


@pytest.mark.parametrize(
    ("wanted", "told"), [("2", "0 to 1 are"), ("sft", "no warm start"), ("worst", "last, best or 0 to 1 are")]
)
def test_a_player_that_is_not_there(loaded: Loaded, wanted: str, told: str) -> None:
    with pytest.raises(QspinError, match=told):
        loaded.seat(wanted)


def test_a_conversation_beyond_the_context(loaded: Loaded) -> None:
    with pytest.raises(QspinError, match="more than the model's 512; begin a new one"):
        loaded.reply([[Message("user", "many words " * 100)]], max_new_tokens=400)


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(QspinError, match="not the folder of a run"):
        Loaded.open(RunDir(tmp_path))


def test_a_reply_is_to_messages(loaded: Loaded) -> None:
    with pytest.raises(QspinError, match="reply takes conversations, lists of"):
        loaded.reply(["Hi"])  # type: ignore[list-item]
