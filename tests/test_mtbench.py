"""MT-Bench on a small run, judged by a scripted judge over HTTP: what is asked and kept, and what failures cost."""

from __future__ import annotations

import datetime
import email.utils
import hashlib
import http.server
import json
import re
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch
from conftest import Answer, call, flip_byte, played_small, process
from judge_server import KEY, MODEL, Failure, JudgeServer

from qspin.errors import QspinError
from qspin.figures import mtbench_result
from qspin.files import read_json
from qspin.records import Message
from qspin.run_dir import RunDir
from qspin.trials import judge as judge_module
from qspin.trials import loaded as loaded_module
from qspin.trials import mtbench, mtbench_answers
from qspin.trials.judge import Judge
from qspin.trials.judging import OWN, Question, rating, read_prompts, request, winner
from qspin.trials.loaded import Loaded

SEVEN = "It will do. Rating: [[7]]"
QUESTIONS: list[dict[str, Any]] = [
    {"question_id": 1, "category": "writing", "turns": ["What is 3?", "What is 4?"]},
    {"question_id": 2, "category": "math", "turns": ["What is 5?", "And 6?"], "reference": ["It is 35.", "It is 42."]},
    {"question_id": 3, "category": "stem", "turns": ["What is 7?", "What is 8?"]},
    {"question_id": "own-4", "category": "riddles", "turns": ["What is 9?"]},
    {"question_id": 5, "category": "coding", "turns": ["What is 1?", "Why?"], "reference": ["It is 7.", ""]},
]
TURNS = 9


@pytest.fixture(scope="module")
def played_run(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mtbench")
    played_small(tiny_folder("llama"), folder)
    written(folder / "questions.jsonl", QUESTIONS)
    return folder


@pytest.fixture(scope="module")
def answered(played_run: Path) -> Path:
    """The same with every answer of base and iteration 1, and no judgement."""
    with JudgeServer(lambda _: SEVEN) as server:
        assert trial(played_run / "run", server, played_run / "questions.jsonl", "--iteration", "base,1").code == 0
    for folder in folder_of(played_run / "run").glob("scripted-*"):
        shutil.rmtree(folder)
    return played_run / "run"


@pytest.fixture
def again(answered: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(answered, tmp_path / "run"))


@pytest.fixture
def server() -> Iterator[JudgeServer]:
    with JudgeServer(lambda _: SEVEN) as found:
        yield found


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pauses but those that a server asks for."""
    monkeypatch.setattr(judge_module, "FIRST_WAIT", 0.0)


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options(server: JudgeServer, questions: Path) -> list[str | Path]:
    return ["--judge-url", server.url, "--judge-model", MODEL, "--questions", questions]


def trial(run: Path, server: JudgeServer, questions: Path, *more: str | Path, key: str = KEY) -> Answer:
    return call("mtbench", run, *options(server, questions), *more, QSPIN_JUDGE_KEY=key)


def folder_of(run: Path) -> Path:
    [folder] = (run / "mt-bench").glob("questions-*")
    return folder


def result_of(run: Path) -> dict[str, Any]:
    [path] = folder_of(run).glob("scripted-*/result.json")
    return read_json(path)


def kept(run: Path, pattern: str = "*/*/*") -> dict[str, dict[str, Any]]:
    """Judgements by player and name."""
    found = sorted(folder_of(run).glob(f"scripted-*/{pattern}.json"))
    return {f"{path.parent.name}/{path.stem}": read_json(path) for path in found}


def answers_of(run: Path, model: str) -> dict[Any, list[str]]:
    text = (folder_of(run) / "model_answer" / f"{model}.jsonl").read_text()
    lines = [json.loads(line) for line in text.split("\n")[:-1]]
    return {line["question_id"]: line["choices"][0]["turns"] for line in lines}


# --- answers ---


def test_answers_are_in_fastchats_format(answered: Path) -> None:
    text = (folder_of(answered) / "model_answer" / "iteration-1.jsonl").read_text()
    lines = [json.loads(line) for line in text.split("\n")[:-1]]
    assert [line["question_id"] for line in lines] == [1, 2, 3, "own-4", 5]
    assert len({line["answer_id"] for line in lines}) == 5
    for line, question in zip(lines, QUESTIONS, strict=True):
        assert {"question_id", "answer_id", "model_id", "choices", "tstamp"} < line.keys()
        assert line["model_id"] == "iteration-1"
        [choice] = line["choices"]
        assert choice.keys() == {"index", "turns"} and choice["index"] == 0
        assert len(choice["turns"]) == len(question["turns"]) and all(isinstance(turn, str) for turn in choice["turns"])
        assert line["tstamp"] == pytest.approx(time.time(), abs=3600)
    assert [json.loads(line) for line in (folder_of(answered) / "question.jsonl").open()] == QUESTIONS


def test_the_second_turn_is_asked_after_the_first_answer(
    answered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = Loaded.open(RunDir(answered), "base")
    heard: dict[tuple[Message, ...], dict[str, Any]] = {}
    real = loaded.reply

    def reply(asked: list[list[Message]], **how: Any) -> Any:
        found = real(asked, **how)
        for messages, said in zip(asked, found, strict=True):
            heard[tuple(messages)] = how | {"said": said.text.strip()}
        return found

    monkeypatch.setattr(loaded, "reply", reply)
    bench = mtbench_answers.read_bench(answered.parent / "questions.jsonl", None)
    answers = mtbench_answers.Answers.read(tmp_path / "base.jsonl")
    mtbench_answers.answer(loaded, bench, answers, "base", StopsAt(-1))
    assert answers_of(answered, "base") == {question.id: answers.turns(question) for question in bench.questions}
    assert len(heard) == TURNS
    for question in bench.questions:
        said = answers.turns(question)
        told = [Message("user", question.turns[0])]
        for turn, answer in enumerate(said):
            how = heard[tuple(told)]
            assert how["said"] == answer
            assert how["temperature"] == mtbench_answers.TEMPERATURES.get(question.category, 0.7)
            assert (
                how["max_new_tokens"]
                == answers.lines[str(question.id)]["qspin"][turn]["cap"]
                < mtbench_answers.NEW_TOKENS
            )
            told += [Message("assistant", answer), Message("user", question.turns[-1])]


def test_a_damaged_adapter_does_not_answer(played_run: Path, tmp_path: Path) -> None:
    run = RunDir(Path(shutil.copytree(played_run / "run", tmp_path / "run", ignore=shutil.ignore_patterns("mt-bench"))))
    told = flip_byte(run.iteration(0).adapter)
    answer = call("mtbench", run.path, "--questions", played_run / "questions.jsonl", "--iteration", "base,0")
    assert (answer.code, answer.err.splitlines()[-1]) == (1, f"error: {told}")
    assert not (folder_of(run.path) / "model_answer" / "iteration-0.jsonl").exists()


def test_without_a_judge_players_only_answer(played_run: Path, tmp_path: Path, server: JudgeServer) -> None:
    """As one does where memory holds one model at a time."""
    run = Path(shutil.copytree(played_run / "run", tmp_path / "run", ignore=shutil.ignore_patterns("mt-bench")))
    asked = ("mtbench", run, "--questions", played_run / "questions.jsonl", "--iteration", "base")
    answer = call(*asked)
    assert answer.code == 0, answer.err
    assert f"answers: {folder_of(run) / 'model_answer'}; give --judge-url and --judge-model" in answer.out
    assert sum(map(len, answers_of(run, "base").values())) == TURNS
    assert trial(run, server, played_run / "questions.jsonl", "--iteration", "base").code == 0
    assert len(server.prompts()) == TURNS
    assert "go together" in one_line(call(*asked, "--judge-url", server.url))
    assert "go together" in one_line(call(*asked, "--judge-model", MODEL))
    assert "--pairwise is for a judge" in one_line(call(*asked, "--pairwise"))


def test_players_answer_for_themselves(answered: Path) -> None:
    assert answers_of(answered, "base") != answers_of(answered, "iteration-1")


def test_batches_are_of_one_temperature_and_of_bounded_size() -> None:
    categories = [*mtbench_answers.TEMPERATURES, "anything"]
    questions = [
        Question(f"{name}-{n}", name, ("One?", "Two?")[: 1 + n % 2], ()) for n in range(14) for name in categories
    ]
    found = mtbench_answers.batches(questions, 0)
    assert sorted(question.id for batch in found for question in batch) == sorted(question.id for question in questions)
    assert max(map(len, found)) == mtbench_answers.ROWS == 20
    temperatures = [{mtbench_answers.TEMPERATURES.get(q.category, 0.7) for q in batch} for batch in found]
    assert all(len(part) == 1 for part in temperatures)
    assert set.union(*temperatures) == {0.7, 0.0, 0.1}
    assert {question.id for batch in mtbench_answers.batches(questions, 1) for question in batch} == {
        question.id for question in questions if len(question.turns) == 2
    }


class Stop(Exception):
    pass


class StopsAt:
    """A progress that is interrupted between two batches."""

    def __init__(self, step: int) -> None:
        self.left = step

    def step(self, what: str, done: int, total: int) -> None:  # noqa: ARG002
        self.left -= 1
        if self.left == 0:
            raise Stop

    def note(self, text: str) -> None: ...


@pytest.mark.parametrize("step", [2, 4, 6])
def test_answers_that_were_interrupted_go_on_as_if_they_had_not_been(
    step: int, answered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = mtbench_answers.read_bench(answered.parent / "questions.jsonl", None)
    loaded, path = Loaded.open(RunDir(answered), "1"), tmp_path / "iteration-1.jsonl"
    with pytest.raises(Stop):
        mtbench_answers.answer(loaded, bench, mtbench_answers.Answers.read(path), "iteration-1", StopsAt(step))
    before = path.read_text().count('"ended"')
    assert 0 < before < TURNS
    rows: list[int] = []
    real = loaded.reply
    monkeypatch.setattr(loaded, "reply", lambda asked, **how: rows.append(len(asked)) or real(asked, **how))
    answers = mtbench_answers.Answers.read(path)
    mtbench_answers.answer(loaded, bench, answers, "iteration-1", StopsAt(-1))
    assert sum(rows) == TURNS - before, "an answer was made twice"
    assert {line["question_id"]: line["choices"][0]["turns"] for line in answers.lines.values()} == answers_of(
        answered, "iteration-1"
    )


def test_an_answer_that_is_missing_is_made_in_the_company_it_had(
    answered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = answers_of(answered, "iteration-1")
    lines = (folder_of(answered) / "model_answer" / "iteration-1.jsonl").read_text().split("\n")[:-1]
    cut = json.loads(lines[4])
    cut["choices"][0]["turns"].pop()
    cut["qspin"].pop()
    path = written(tmp_path / "iteration-1.jsonl", [*map(json.loads, lines[1:4]), cut])
    bench = mtbench_answers.read_bench(answered.parent / "questions.jsonl", None)
    loaded, answers = Loaded.open(RunDir(answered), "1"), mtbench_answers.Answers.read(path)
    rows: list[int] = []
    real = loaded.reply
    monkeypatch.setattr(loaded, "reply", lambda asked, **how: rows.append(len(asked)) or real(asked, **how))
    mtbench_answers.answer(loaded, bench, answers, "iteration-1", StopsAt(-1))
    assert sum(rows) == 2 + 1 + 2, "questions 1 and own-4 for the first turn, 1 alone and 2 and 5 for the second"
    assert {question.id: answers.turns(question) for question in bench.questions} == whole
    assert mtbench_answers.Answers.read(path).lines == answers.lines


def test_a_line_with_turns_that_were_not_asked_is_refused(answered: Path, tmp_path: Path) -> None:
    text = (folder_of(answered) / "model_answer" / "iteration-1.jsonl").read_text().split("\n")[0]

    def refused(turns: list[str], how: list[dict[str, Any]]) -> bool:
        line = json.loads(text)
        line["choices"][0]["turns"], line["qspin"] = turns, how
        path = written(tmp_path / "answers.jsonl", [line])
        try:
            mtbench_answers.Answers.read(path)
        except QspinError as error:
            assert str(error) == f"{path}: damaged, or not of qspin's making; delete it and run again"
            return True
        return False

    how = {"cap": 64, "tokens": 3, "ended": True}
    assert not refused(["One.", "Two."], [how, how])
    assert refused(["One.", "Two."], [how])
    assert refused(["One.", "Two.", "Three."], [how, how, how])
    assert refused(["One."], [{"tokens": 3}])


def test_memory_that_runs_out_while_a_player_answers_is_one_line(
    answered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    bench = mtbench_answers.read_bench(answered.parent / "questions.jsonl", None)
    loaded, answers = Loaded.open(RunDir(answered), "1"), mtbench_answers.Answers.read(tmp_path / "iteration-1.jsonl")
    monkeypatch.setattr(loaded_module, "generate", refuse)
    with pytest.raises(QspinError) as caught:
        mtbench_answers.answer(loaded, bench, answers, "iteration-1", StopsAt(-1))
    assert str(caught.value) == (
        "out of memory while answering (no room); close other programs, and the same command goes on"
    )


def test_what_does_not_fit_the_context_is_said(played_run: Path, tmp_path: Path, server: JudgeServer) -> None:
    run = Path(shutil.copytree(played_run / "run", tmp_path / "run", ignore=shutil.ignore_patterns("mt-bench")))
    rows = [
        {"question_id": 1, "category": "stem", "turns": ["many words " * 200, "What is 1?"]},
        {"question_id": 2, "category": "stem", "turns": ["What is 2?", "many words " * 200]},
        {"question_id": 3, "category": "stem", "turns": ["What is 3?", "What is 4?"]},
    ]
    answer = trial(run, server, written(tmp_path / "long.jsonl", rows), "--iteration", "base")
    assert answer.code == 0, answer.err
    assert len(server.asked) == len(server.prompts()) + 1, "one word beforehand, for answers and judgements"
    assert re.search(r"no room for 1024 new tokens in 3 of 6 turns, which were given \d+ to \d+", answer.out)
    assert "3 of 6 turns are too long for the context, or can't be rendered; their answers are empty" in answer.out
    said = answers_of(run, "base")
    assert said[1] == ["", ""] and all(said[3])
    assert said[2][0] and said[2][1] == "", "a second turn that does not fit takes nothing from the first"
    assert result_of(run)["grades"]["base"]["answers"]["unanswered"] == 3
    lines = [json.loads(line) for line in (folder_of(run) / "model_answer" / "base.jsonl").open()]
    first, second, third = ([part["cap"] for part in line["qspin"]] for line in lines)
    assert first == [0, 0] and second[1] == 0 and second[0] > third[0]
    assert all(cap % mtbench_answers.STEP == 0 for cap in (*second, *third))


# --- grades ---


def test_each_turn_is_graded_and_counted(again: Path, played_run: Path, server: JudgeServer) -> None:
    def judge(prompt: str) -> str:
        return "Rating: [[2]]" if "<ANSWER 2>" in prompt else "I say [[3]], no: Rating: [[8.5]]"

    server.judge, server.seconds = judge, 0.1  # else one may be answered before the next is asked
    answer = trial(again, server, played_run / "questions.jsonl", "--iteration", "base,1")
    assert answer.code == 0, answer.err
    assert len(server.prompts()) == 2 * TURNS
    assert all(body["temperature"] == 0 and body["max_tokens"] == 2048 for body in server.asked)
    assert 1 < server.busiest <= 4
    result = result_of(again)
    assert list(result["grades"]) == ["base", "1"]
    for player in ("base", "1"):
        told = result["figures"]["grades"][player]
        assert told["writing"]["1"]["value"] == 8.5 and told["writing"]["2"]["value"] == 2
        assert told["all"]["both"]["value"] == pytest.approx((5 * 8.5 + 4 * 2) / 9)
        assert told["all"]["both"]["low"] < told["all"]["both"]["value"] < told["all"]["both"]["high"]
        assert told["all"]["both"]["unparsed"] == 0 and told["all"]["2"]["judged"] == 4
        assert "value" not in told["riddles"]["2"], "it has one turn"
        assert result["grades"][player]["answers"]["unguided"] == 1, "the second reference of coding is empty"
    assert re.search(r"base +5\.61 \[", answer.out)
    assert re.search(r"all +base +8\.5 \[8\.5, 8\.5\] +2\.0 \[2\.0, 2\.0\] +5\.6 \[", answer.out)


def test_what_a_judge_is_shown(again: Path, played_run: Path, server: JudgeServer) -> None:
    assert trial(again, server, played_run / "questions.jsonl", "--iteration", "1").code == 0
    said, shown = answers_of(again, "iteration-1"), kept(again)
    for question in QUESTIONS:
        for turn in range(1, len(question["turns"]) + 1):
            item = shown[f"1/{question['question_id']}-turn-{turn}"]
            text = item["asked"][-1]["content"]
            assert item["asked"] in [body["messages"] for body in server.asked]
            assert all(part in text for part in question["turns"][:turn] + said[question["question_id"]][:turn])
            assert ("second answer" in text) == (turn == 2)
            assert (question["turns"][-1] in text) or turn == 1
            reference = question.get("reference", [""])[:turn]
            assert ("REFERENCE" in text) == all(reference)
            assert item["verdict"] == 7 and item["judgment"] == SEVEN


def test_references_of_a_file_take_the_place(
    again: Path, played_run: Path, server: JudgeServer, tmp_path: Path
) -> None:
    row = {"question_id": 5, "choices": [{"index": 0, "turns": ["It is 7, surely.", "Since I say so."]}]}
    file = written(tmp_path / "gpt-4.jsonl", [row, {**row, "question_id": 999}])
    arguments = (again, server, played_run / "questions.jsonl", "--iteration", "base")
    assert trial(*arguments, "--references", file).code == 0
    assert sum("It is 7, surely." in prompt for prompt in server.prompts()) == 2
    assert sum("It is 35." in prompt for prompt in server.prompts()) == 2, "where it has none, the question file's"
    assert result_of(again)["grades"]["base"]["answers"]["unguided"] == 0


def test_what_was_judged_with_other_references_is_in_no_table_with_these(
    again: Path, played_run: Path, server: JudgeServer, tmp_path: Path
) -> None:
    bare = [{key: value for key, value in question.items() if key != "reference"} for question in QUESTIONS]
    without = written(tmp_path / "questions.jsonl", bare)
    others = [{"question_id": 2, "choices": [{"index": 0, "turns": ["It is 15.", "It is 18."]}]}]
    server.judge = lambda prompt: "[[C]] [[2]]" if "REFERENCE" in prompt else "[[C]] [[9]]"
    assert trial(again, server, played_run / "questions.jsonl", "--iteration", "base").code == 0
    first = result_of(again)
    assert trial(again, server, without, "--iteration", "1").code == 0
    assert trial(again, server, without, "--iteration", "base,1", "--pairwise").code == 0
    third = written(tmp_path / "gpt-4.jsonl", others)
    assert trial(again, server, without, "--iteration", "0", "--references", third).code == 0
    assert len(list((again / "mt-bench").glob("questions-*"))) == 1, "players are asked the same"
    found = mtbench_result.results(RunDir(again).trials)
    assert first in found
    held = {tuple(result["grades"]): tuple(result["pairs"]) for result in found}
    assert held == {("base",): (), ("1",): ("base vs 1",), ("0",): ()}


def test_only_references_that_are_shown_make_another_judge(tmp_path: Path) -> None:
    judge = Judge("http://127.0.0.1:9/v1", MODEL, timeout=1)

    def folder(references: dict[int, list[str]]) -> str:
        rows = [question | {"reference": references.get(question["question_id"])} for question in QUESTIONS]
        bench = mtbench_answers.read_bench(written(tmp_path / "q.jsonl", rows), None)
        return mtbench.Trial(RunDir(tmp_path), bench, judge, OWN, "", 1, StopsAt(-1)).judged.name

    words = {name: (prompt.system, prompt.template) for name, prompt in OWN.items()}
    none = f"scripted-judge-1-{mtbench_answers.short_hash([MODEL, words])}"
    assert folder({}) == none
    assert folder({1: ["Three.", "Four."]}) == none, "writing is graded without"
    assert folder({2: ["", "It is 42."]}) == none, "a second turn's alone is shown nowhere"
    told: list[dict[int, list[str]]] = [{2: ["It is 35."]}, {2: ["36."]}, {2: ["It is 35.", "42."]}, {5: ["It is 35."]}]
    assert len({none, *map(folder, told)}) == 5


def test_the_same_command_asks_nothing_again(again: Path, played_run: Path, server: JudgeServer) -> None:
    first = trial(again, server, played_run / "questions.jsonl", "--iteration", "base")
    second = trial(again, server, played_run / "questions.jsonl", "--iteration", "base")
    assert len(server.prompts()) == TURNS
    assert first.out.partition("MT-Bench:")[2] == second.out.partition("MT-Bench:")[2]
    assert trial(again, server, played_run / "questions.jsonl", "--iteration", "1").code == 0
    assert len(server.prompts()) == 2 * TURNS
    assert list(result_of(again)["grades"]) == ["base", "1"], "what was found before stays"


def test_players_are_the_base_and_the_kept_one_unless_named(again: Path, played_run: Path, server: JudgeServer) -> None:
    assert trial(again, server, played_run / "questions.jsonl").code == 0
    names = list(result_of(again)["grades"])
    assert names[0] == "base" and names[1] in {"0", "1"} and len(names) == 2


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Rating: [[5]]", 5), ("[[10]]", 10), ("[[ 7.5 ]] it is", 7.5), ("first [[3]], then [[4]]", 4),
        ("[[0]]", None), ("[[11]]", None), ("[5]", None), ("[[rating]]", None), ("", None), ("five", None),
        ("[[-3]]", None),
        ("x = [[1, 2]]", None),
    ],
)  # fmt: skip
def test_ratings(text: str, value: float | None) -> None:
    assert rating(text) == value


def test_winners() -> None:
    assert winner("A is good, [[B]] better") == "B"
    assert winner('say "[[A]]" or "[[B]]"; I say [[C]]') == "C"
    assert winner("A") is winner("[A]") is winner("[[D]]") is None


def test_a_verdict_that_cannot_be_read_is_asked_for_once_more(
    again: Path, played_run: Path, server: JudgeServer
) -> None:
    times: Counter[str] = Counter()

    def judge(prompt: str) -> str | None:
        times[prompt] += 1
        if "What is 9?" in prompt:
            return None
        return "Hm." if "What is 3?" in prompt and (times[prompt] == 1 or "<ANSWER 2>" in prompt) else SEVEN

    server.judge = judge
    answer = trial(again, server, played_run / "questions.jsonl", "--iteration", "base")
    assert answer.code == 0
    assert sorted(Counter(server.prompts()).values()) == [1] * 6 + [2] * 3
    shown = kept(again)
    assert shown["base/1-turn-1"]["verdict"] == 7
    assert shown["base/1-turn-2"]["verdict"] is None and shown["base/1-turn-2"]["judgment"] == "Hm."
    assert shown["base/own-4-turn-1"]["judgment"] == ""
    told = result_of(again)["figures"]["grades"]["base"]
    assert told["all"]["both"] == {"value": 7, "low": 7, "high": 7, "judged": 7, "unparsed": 2}
    assert told["riddles"]["1"] == {"judged": 0, "unparsed": 1}
    assert re.search(r"riddles +base +- +- +- +1", answer.out)
    said = re.search(
        r"2 of 9 judgements hold no verdict that can be read, and count as unparsed; the first is (\S+ '[^']*')",
        " ".join(answer.out.split()),
    )
    assert said is not None and said[1] in {"1-turn-2: 'Hm.'", "own-4-turn-1: ''"}
    server.asked.clear()
    answer = trial(again, server, played_run / "questions.jsonl", "--iteration", "base")
    assert answer.code == 0 and "judgements hold" not in answer.out
    assert server.asked == [], "unparsed is kept"


# --- comparisons ---


def test_a_judge_that_goes_by_places_finds_ties_alone(again: Path, played_run: Path, server: JudgeServer) -> None:
    server.judge = lambda _: "[[A]]"
    answer = trial(again, server, played_run / "questions.jsonl", "--iteration", "base,1", "--pairwise")
    assert answer.code == 0, answer.err
    assert len(server.prompts()) == 2 * TURNS
    told = result_of(again)["figures"]["pairs"]["base vs 1"]["all"]
    assert told == {"wins": 0, "ties": TURNS, "losses": 0, "unparsed": 0, "value": 0.5, "low": 0.5, "high": 0.5}
    assert re.search(rf"all +0 +{TURNS} +0 +50% \[50, 50\] +{TURNS} +0", answer.out)
    assert result_of(again)["grades"] == {}
    trial(again, server, played_run / "questions.jsonl", "--iteration", "1,base", "--pairwise")
    assert len(server.prompts()) == 2 * TURNS and len(result_of(again)["pairs"]) == 1, (
        "the order of naming says nothing"
    )


def test_the_two_orders_show_the_answers_swapped(again: Path, played_run: Path, server: JudgeServer) -> None:
    server.judge = lambda _: "[[C]]"
    trial(again, server, played_run / "questions.jsonl", "--iteration", "base,1", "--pairwise")
    base, one, shown = answers_of(again, "base"), answers_of(again, "iteration-1"), kept(again)
    assert len(shown) == 2 * TURNS
    for question in QUESTIONS:
        name = question["question_id"]
        for order, first, second in (("a", base, one), ("b", one, base)):
            text = shown[f"base-1/{name}-turn-1-{order}"]["asked"][-1]["content"]
            a, b = re.search(
                r"<ANSWER OF ASSISTANT A>\n(.*)\n\n<ANSWER OF ASSISTANT B>\n(.*)\n\n<END>", text, re.S
            ).groups()  # type: ignore[union-attr]
            assert (a, b) == (first[name][0], second[name][0])


def test_a_win_is_one_in_both_orders(again: Path, played_run: Path, server: JudgeServer) -> None:
    """A judge that prefers by what is said, but for one question, where it can't be understood in one order."""
    base = answers_of(again, "base")

    def judge(prompt: str) -> str:
        place_a = prompt.find("ASSISTANT A>\n") + len("ASSISTANT A>\n")
        is_base = any(said[0] and prompt.startswith(said[0], place_a) for said in base.values())
        if "What is 9?" in prompt:
            return "[[A]]" if is_base else "no idea"
        return "[[A]]" if is_base else "[[B]]"

    server.judge = judge
    trial(again, server, played_run / "questions.jsonl", "--iteration", "base,1", "--pairwise")
    first = [row for row in result_of(again)["pairs"]["base vs 1"] if row[2] == 1]
    assert [row[3:] for row in first] == [["first", True]] * 3 + [[None, False], ["first", True]]


@pytest.mark.parametrize(
    ("there", "back", "found"),
    [
        ("A", "B", ("first", True)), ("B", "A", ("second", True)), ("C", "C", ("tie", True)),
        ("A", "A", ("tie", False)),
        ("B", "B", ("tie", False)), ("A", "C", ("tie", True)), ("C", "A", ("tie", True)), (None, "A", (None, False)),
        ("A", None, (None, False)),
    ],
)  # fmt: skip
def test_games(there: str | None, back: str | None, found: tuple[str | None, bool]) -> None:
    assert mtbench.game(there, back) == found


def test_a_comparison_is_of_two(again: Path, played_run: Path, server: JudgeServer) -> None:
    answer = trial(again, server, played_run / "questions.jsonl", "--iteration", "base,0,1", "--pairwise")
    assert answer == Answer(1, "", "error: --pairwise compares two players, and --iteration names 3: base, 0, 1\n")
    answer = trial(again, server, played_run / "questions.jsonl", "--iteration", "1,last", "--pairwise")
    assert "--iteration names 1: 1" in answer.err


# --- a judge that fails ---


def asked(server: JudgeServer, monkeypatch: pytest.MonkeyPatch, *, timeout: float = 30, key: str = KEY) -> str:
    monkeypatch.setenv("QSPIN_JUDGE_KEY", key)
    return Judge(server.url, MODEL, timeout=timeout).ask([Message("user", "Well?")])


def test_a_judge_that_asks_to_wait_is_given_the_time(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.fail(429, **{"Retry-After": "1"})
    started = time.monotonic()
    assert asked(server, monkeypatch) == SEVEN
    assert time.monotonic() - started >= 1
    then = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=3)
    server.fail(503, **{"Retry-After": email.utils.format_datetime(then, usegmt=True)})
    assert asked(server, monkeypatch) == SEVEN
    assert datetime.datetime.now(datetime.UTC) >= then.replace(microsecond=0)
    server.fail(429, **{"Retry-After": "3600"})
    with pytest.raises(QspinError, match="429: out of order, and asks to wait 3600 s; what was judged is kept"):
        asked(server, monkeypatch)
    then = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=3600)
    server.fail(429, **{"Retry-After": email.utils.format_datetime(then.replace(tzinfo=None))})  # -0000: UTC, by rule
    with pytest.raises(QspinError, match=r"429: out of order, and asks to wait 3[56]\d\d s"):
        asked(server, monkeypatch)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 529])
def test_failures_that_pass_are_tried_again(status: int, server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.fail(status)
    server.fail(status, b"<html>")
    assert asked(server, monkeypatch) == SEVEN
    assert (server.failed, len(server.asked)) == (2, 1)


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"<html>busy</html>", b"[]", b'{"error": {"message": "busy"}}', b'{"choices": []}'),
        pytest.param(b"[" * 200_000, id="deep"),
    ],
)
def test_answers_that_are_none_are_tried_again(
    body: bytes, server: JudgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.fail(200, body)
    assert asked(server, monkeypatch) == SEVEN
    for _ in range(6):
        server.fail(200, body)
    with pytest.raises(QspinError, match=r"answers with no chat completion .* did so 6 times in a row"):
        asked(server, monkeypatch)


def test_a_judge_that_hangs(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.gate.clear()
    with pytest.raises(
        QspinError, match=r"does not answer within 0.1 s \(--judge-timeout\), and did so 6 times in a row"
    ):
        asked(server, monkeypatch, timeout=0.1)


@pytest.mark.parametrize(
    "said",
    [
        None,
        "0",
        "Wed, 21 Oct 2015 07:28:00 GMT",
        "Wed, 21 Oct 2015 07:28:00 +99999999999999999999",
        "soon",
    ],
)
def test_pauses_double_whatever_the_server_says(
    said: str | None, server: JudgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge_module, "FIRST_WAIT", 0.1)
    for _ in range(3):
        server.fail(500, **({} if said is None else {"Retry-After": said}))
    started = time.monotonic()
    asked(server, monkeypatch)
    assert time.monotonic() - started >= 0.1 + 0.2 + 0.4


def one_line(answer: Answer) -> str:
    assert answer.code == 1 and answer.err.startswith("error: ") and answer.err.count("\n") == 1
    assert KEY not in answer.out + answer.err
    return answer.err


def test_refusals_are_one_line_and_come_before_any_answer(
    played_run: Path, tmp_path: Path, server: JudgeServer
) -> None:
    run = Path(shutil.copytree(played_run / "run", tmp_path / "run", ignore=shutil.ignore_patterns("mt-bench")))
    questions = played_run / "questions.jsonl"
    wrong = "sk-anotherSecretOfNoAccount"
    answer = trial(run, server, questions, key=wrong)
    assert "does not accept the key (HTTP 401: Incorrect API key provided: Bearer ***)" in one_line(answer)
    assert wrong not in answer.out + answer.err
    assert "does not accept the key" in one_line(trial(run, server, questions, key=""))
    said = one_line(trial(run, server, questions, "--judge-model", "gpt-5"))
    assert "no model 'gpt-5' (HTTP 404: The model `gpt-5` does not exist)" in said
    said = one_line(trial(run, server, questions, "--judge-url", server.url.removesuffix("/v1")))
    assert "(HTTP 404: Not Found); check --judge-url, which most often ends in /v1" in said
    said = one_line(trial(run, server, questions, "--judge-url", "http://no-such-host.invalid/v1"))
    assert "no machine is known by the name in http://no-such-host.invalid" in said
    said = one_line(trial(run, server, questions, "--judge-url", "http://127.0.0.1:9/v1"))
    assert "can't be reached" in said and "6 times in a row" in said
    server.fail(400, b'{"error": {"message": "temperature is not supported"}}')
    assert "refuses (HTTP 400: temperature is not supported)" in one_line(trial(run, server, questions))
    server.fail(301, b"", Location="https://elsewhere.invalid/v1?key=secret")
    assert "refuses (HTTP 301: it is at https://elsewhere.invalid/v1)" in one_line(trial(run, server, questions))
    assert not list((run / "mt-bench").glob("*/*")), "no answer was made"


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("localhost:8080/v1", "begins with http:// or https://"),
        ("ftp://host/v1", "begins with http:// or https://"),
        ("http:///v1", "and a host"),
        ("http://me:secret@host/v1", "leave the login out"),
        ("http://host:port/v1", "give one as http"),
    ],
)
def test_addresses_that_are_none(url: str, told: str, again: Path, played_run: Path, server: JudgeServer) -> None:
    answer = trial(again, server, played_run / "questions.jsonl", "--judge-url", url)
    assert told in one_line(answer)
    assert "secret" not in answer.err


@pytest.mark.parametrize("proxy", ["sock://me:secret@127.0.0.1:9", "http://me:secret@127.0.0.1:nine"])
def test_a_proxy_that_cannot_be_used(proxy: str, again: Path, played_run: Path, server: JudgeServer) -> None:
    options_ = options(server, played_run / "questions.jsonl")
    answer = call("mtbench", again, *options_, QSPIN_JUDGE_KEY=KEY, ALL_PROXY=proxy, NO_PROXY="")
    assert "the proxy that the environment names can't be used" in one_line(answer)
    assert "secret" not in answer.err


@pytest.mark.parametrize("name", ["hex", "rot13", "undefined", "utf-16"])
def test_an_answer_in_an_encoding_that_is_none(name: str, server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.fail(401, b"who are you?", **{"Content-Type": f"text/plain; charset={name}"})
    with pytest.raises(QspinError, match=r"does not accept the key \(HTTP 401: who are you"):
        asked(server, monkeypatch)


def test_a_refusal_without_a_word(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.fail(401, b"")
    with pytest.raises(QspinError, match=r"does not accept the key \(HTTP 401: without a word\)"):
        asked(server, monkeypatch)


def test_certificates_that_cannot_be_read(
    again: Path, played_run: Path, server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options_ = options(server, played_run / "questions.jsonl")
    for file in (tmp_path / "none.pem", played_run / "questions.jsonl"):
        answer = call("mtbench", again, *options_, QSPIN_JUDGE_KEY=KEY, SSL_CERT_FILE=str(file))
        assert "the certificates that the environment names can't be read (" in one_line(answer)
        assert "mend SSL_CERT_FILE, or unset it" in answer.err
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    monkeypatch.setenv("QSPIN_CACHE", str(tmp_path / "cache"))
    with pytest.raises(QspinError, match="certificates that the environment names can't be read"):
        mtbench_answers.read_bench(None, None)


@pytest.mark.parametrize("seconds", ["inf", "nan", "1e12", "86401", "0"])
def test_a_timeout_that_is_none(seconds: str, again: Path, played_run: Path, server: JudgeServer) -> None:
    answer = trial(again, server, played_run / "questions.jsonl", "--judge-timeout", seconds)
    assert (answer.code, answer.out, server.asked) == (2, "", [])
    assert "Invalid value for '--judge-timeout'" in answer.err


def test_the_longest_timeout(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(server, monkeypatch, timeout=86_400) == SEVEN


def test_an_address_may_end_in_the_endpoint(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSPIN_JUDGE_KEY", KEY)
    for url in (f"{server.url}/", f"{server.url}/chat/completions"):
        assert Judge(url, MODEL, timeout=30).ask([Message("user", "Well?")]) == SEVEN


def test_which_key_is_sent(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def judge() -> Judge:
        return Judge(server.url, MODEL, timeout=30)

    monkeypatch.delenv("QSPIN_JUDGE_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    judge().check(print)
    monkeypatch.setenv("QSPIN_JUDGE_KEY", "")  # none, for a judge of one's own
    with pytest.raises(QspinError, match="401: Incorrect API key provided: None"):
        judge().check(print)
    for broken in ("sk-two words", "sk-linefeed\nX: y", "sk-ünicode"):
        monkeypatch.setenv("QSPIN_JUDGE_KEY", broken)
        with pytest.raises(QspinError, match=r"^QSPIN_JUDGE_KEY has characters that no key has; set it anew$"):
            judge()


def test_a_judge_that_dies_loses_nothing(again: Path, played_run: Path, server: JudgeServer) -> None:
    def judge(_: str) -> str:
        if len(server.prompts()) > 4:
            for _ in range(40):
                server.fail(503)
        return SEVEN

    server.judge = judge
    arguments = (again, server, played_run / "questions.jsonl", "--iteration", "base")
    answer = trial(*arguments)
    assert "HTTP 503: out of order, and did so 6 times in a row; what was judged is kept" in one_line(answer)
    assert "HTTP 503: out of order; asked again after a pause" in answer.out
    before = len(server.prompts())
    assert before == len(kept(again)) < TURNS
    server._failures.clear()
    server.judge = lambda _: SEVEN
    assert trial(*arguments).code == 0
    assert len(server.prompts()) == TURNS and len(set(server.prompts())) == TURNS


def test_a_prompt_that_is_refused_alone_is_counted_and_asked_again(
    again: Path, played_run: Path, server: JudgeServer
) -> None:
    arguments = (again, server, played_run / "questions.jsonl", "--iteration", "base", "--at-once", "1")

    def judge(_: str) -> str:
        if len(server.prompts()) == 2:
            server.fail(400, b'{"error": {"message": "the context is 4096 tokens"}}')
        return SEVEN

    server.judge = judge
    answer = trial(*arguments)
    assert answer.code == 0, answer.err
    assert "would not take 1 prompts" in answer.out and "HTTP 400: the context is 4096 tokens" in answer.out
    assert len(kept(again)) == TURNS - 1
    assert result_of(again)["figures"]["grades"]["base"]["all"]["both"]["unparsed"] == 1
    server.judge = lambda _: SEVEN
    assert trial(*arguments).code == 0
    assert len(server.prompts()) == TURNS
    assert result_of(again)["figures"]["grades"]["base"]["all"]["both"]["unparsed"] == 0


def test_refused_prompts_are_sent_again_by_a_command_that_has_nothing_else_to_send(
    again: Path, played_run: Path, server: JudgeServer
) -> None:
    refusal = Failure(400, b'{"error": {"message": "the context is 4096 tokens"}}')
    arguments = (again, server, played_run / "questions.jsonl", "--iteration", "base")
    server.judge = lambda prompt: refusal if "What is 3?" in prompt else SEVEN
    for sent in (TURNS, TURNS + 2):
        answer = trial(*arguments)
        assert answer.code == 0, answer.err
        assert "would not take 2 prompts" in answer.out and "HTTP 400: the context is 4096 tokens" in answer.out
        assert len(server.prompts()) == sent
        assert result_of(again)["figures"]["grades"]["base"]["all"]["both"]["unparsed"] == 2
    server.fail(400, b'{"error": {"message": "temperature is not supported"}}')
    assert "refuses (HTTP 400: temperature is not supported)" in one_line(trial(*arguments)), "a judge that takes none"
    server.judge = lambda _: SEVEN
    assert trial(*arguments).code == 0
    assert len(kept(again)) == TURNS
    assert result_of(again)["figures"]["grades"]["base"]["all"]["both"]["unparsed"] == 0


def test_ctrl_c_keeps_what_was_judged_and_goes_on(again: Path, played_run: Path, server: JudgeServer) -> None:
    server.seconds = 0.3
    arguments = (
        "mtbench",
        again,
        *options(server, played_run / "questions.jsonl"),
        "--iteration",
        "base",
        "--at-once",
        "2",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QSPIN_JUDGE_KEY", KEY)
        command = process(*arguments)
    deadline = time.monotonic() + 120
    while len(server.prompts()) < 3:
        assert command.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    command.send_signal(signal.SIGINT)
    out, err = command.communicate(timeout=60)
    assert (command.returncode, err) == (130, "stopped; the same command goes on from the last finished piece\n")
    before = len(server.prompts())
    assert 3 <= before < TURNS
    assert len(kept(again)) == before, "what was under way is kept too"
    server.seconds = 0
    assert call(*arguments, QSPIN_JUDGE_KEY=KEY).code == 0
    assert len(server.prompts()) == TURNS and max(Counter(server.prompts()).values()) == 1
    assert KEY not in out + err


def test_the_key_is_in_no_file_and_no_output(again: Path, played_run: Path, server: JudgeServer) -> None:
    """Of a judge that gives it away: what it says is kept, without the key."""
    server.judge = lambda _: f"Your key is {KEY}. Rating: [[7]]"
    server.fail(500, json.dumps({"error": {"message": f"bad {KEY}"}}).encode())
    answer = trial(again, server, played_run / "questions.jsonl")
    report = call("report", again, QSPIN_JUDGE_KEY=KEY)
    assert answer.code == report.code == 0
    assert "bad ***" in answer.out
    for said in (answer, report):
        assert KEY not in said.out + said.err
    files = [path for path in again.rglob("*") if path.is_file()]
    assert sum("grades" in path.parts for path in files) == 2 * TURNS
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
    assert next(iter(kept(again).values()))["judgment"] == "Your key is ***. Rating: [[7]]"


def test_one_trial_at_a_time(again: Path, played_run: Path, server: JudgeServer) -> None:
    with filelock.FileLock(again / "mt-bench" / ".lock"):
        answer = trial(again, server, played_run / "questions.jsonl")
    assert one_line(answer) == f"error: {again / 'mt-bench'}: another process is at work here; wait for it\n"


# --- files ---


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"question_id": None}, "question_id is None"),
        ({"question_id": True}, "question_id is True"),
        ({"question_id": "../x"}, "question_id is '../x'"),
        ({"question_id": 1}, "has the question_id 1 as well"),
        ({"question_id": "1"}, "has the question_id '1' as well"),
        ({"category": ""}, "category is ''"),
        ({"category": None}, "category is None"),
        ({"category": "\ud800"}, r"category is '\ud800'"),
        ({"turns": "What?"}, "turns are 'What?'"),
        ({"turns": []}, "turns are []"),
        ({"turns": ["One?", "Two?", "Three?"]}, "one or two texts"),
        ({"turns": ["One?", " "]}, "turns are ['One?', ' ']"),
        ({"turns": ["\ud800"]}, "turns are "),
        ({"reference": "It is 7."}, "reference is 'It is 7.'"),
    ],
)
def test_a_question_that_is_none(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    good = {"question_id": 7, "category": "stem", "turns": ["Well?"]}
    path = written(tmp_path / "q.jsonl", [good | {"question_id": 1}, good | change])
    with pytest.raises(QspinError, match=re.escape(f"{path}: line 2: ")) as caught:
        mtbench_answers.read_bench(path, None)
    assert told in str(caught.value)


def test_files_that_hold_no_questions(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    for content, told in (("", "has no questions"), ("{", "line 1 is broken JSON"), ("[1]\n", "not an object")):
        path.write_text(content)
        with pytest.raises(QspinError, match=told):
            mtbench_answers.read_bench(path, None)
    with pytest.raises(QspinError, match="no such file"):
        mtbench_answers.read_bench(tmp_path / "none.jsonl", None)
    written(path, QUESTIONS)
    with pytest.raises(QspinError, match=r"r.jsonl: line 1: is no answer in FastChat's format"):
        mtbench_answers.read_bench(path, written(tmp_path / "r.jsonl", [{"question_id": 1, "choices": []}]))


def test_other_questions_have_a_folder_of_their_own(
    again: Path, played_run: Path, server: JudgeServer, tmp_path: Path
) -> None:
    assert trial(again, server, played_run / "questions.jsonl", "--iteration", "base").code == 0
    others = written(tmp_path / "others.jsonl", [{"question_id": 1, "category": "writing", "turns": ["What is 11?"]}])
    assert trial(again, server, others, "--iteration", "base").code == 0
    assert len(list((again / "mt-bench").glob("questions-*/model_answer/base.jsonl"))) == 2
    titles = [table[0] for table in mtbench_result.all_tables(RunDir(again).trials)]
    assert sorted(title.partition(",")[0] for title in titles) == [
        *["MT-Bench: 1 questions"] * 2,
        *["MT-Bench: 5 questions"] * 2,
    ]


def test_damaged_pieces_are_named(again: Path, played_run: Path, server: JudgeServer) -> None:
    arguments = (again, server, played_run / "questions.jsonl", "--iteration", "base")
    assert trial(*arguments).code == 0
    piece = next(folder_of(again).glob("scripted-*/grades/base/1-turn-1.json"))
    piece.write_text(piece.read_text().replace("[[7]]", "[[9]]"))
    assert f"{piece}: damaged or unreadable" in one_line(trial(*arguments))
    piece.unlink()
    assert trial(*arguments).code == 0
    assert len(server.prompts()) == TURNS + 1
    answers = folder_of(again) / "model_answer" / "base.jsonl"
    answers.write_text(answers.read_text().replace('"turns"', '"twists"', 1))
    assert f"{answers}: damaged, or not of qspin's making; delete it" in one_line(trial(*arguments))


class Files(http.server.SimpleHTTPRequestHandler):
    asked: list[str] = []  # noqa: RUF012 (of the class, which a test reads)

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


def test_fastchats_questions_are_fetched_once_with_their_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "there"
    (there / "reference_answer").mkdir(parents=True)
    file = written(there / "question.jsonl", QUESTIONS)
    answers = [{"question_id": 2, "choices": [{"index": 0, "turns": ["35, says GPT-4.", "42."]}]}]
    reference = written(there / "reference_answer" / "gpt-4.jsonl", answers)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=str(there)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("QSPIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mtbench_answers, "SOURCE", f"http://127.0.0.1:{server.server_address[1]}")
    with pytest.raises(QspinError, match="is not FastChat's file; give --questions a file"):
        mtbench_answers.read_bench(None, None)
    for name, path in (("QUESTIONS", file), ("REFERENCES", reference)):
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        monkeypatch.setattr(mtbench_answers, name, (str(path.relative_to(there)), sha256))
    Files.asked.clear()
    found = mtbench_answers.read_bench(None, None)
    assert found.questions[1].references == ("35, says GPT-4.", "42.")
    assert mtbench_answers.read_bench(None, None) == found
    assert Files.asked == ["/question.jsonl", "/reference_answer/gpt-4.jsonl"], "and then taken from the cache"
    assert found.folder == mtbench_answers.read_bench(file, None).folder, "the same questions, wherever they come from"
    server.shutdown()
    server.server_close()
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(
        QspinError, match=r"can't be fetched \(.*\); give --questions a file in the format of FastChat's"
    ):
        mtbench_answers.read_bench(None, None)


def test_fastchats_prompts_are_used_as_they_are(
    again: Path, played_run: Path, server: JudgeServer, tmp_path: Path
) -> None:
    rows = [
        {
            "name": name, "type": "single", "system_prompt": f"system of {name}", "output_format":
            "[[A]]" if name.startswith("pair") else "[[rating]]", "prompt_template": f"{name} asks\n{prompt.template}",
        }
        for name, prompt in OWN.items()
    ]  # fmt: skip
    file = written(tmp_path / "judge_prompts.jsonl", [*rows, {"name": "another"}])
    arguments = (again, server, played_run / "questions.jsonl", "--iteration", "base")
    assert trial(*arguments).code == 0
    server.asked.clear()
    answer = trial(*arguments, "--judge-prompts", file)
    assert answer.code == 0, answer.err
    assert "with judge_prompts.jsonl" in answer.out
    assert len(list(folder_of(again).glob("scripted-*/result.json"))) == 2, "other words are another judge"
    judged = [body["messages"] for body in server.asked[1:]]  # without the word beforehand
    systems = Counter(messages[0]["content"] for messages in judged)
    assert systems == {
        "system of single-v1": 3, "system of single-math-v1": 2, "system of single-v1-multi-turn": 3,
        "system of single-math-v1-multi-turn": 1,
    }  # fmt: skip
    assert all(re.match(r"single\S+ asks\n", messages[1]["content"]) for messages in judged)
    for change, told in (
        ({"prompt_template": "{answer} {secret}"}, r"line 1: single-v1 has {'secret'}; it may have answer, question"),
        ({"prompt_template": "{answer.__class__}"}, "single-v1 has {'answer.__class__'}"),
        ({"prompt_template": "{question!z}"}, "single-v1 has {'question!z'}; it may have answer, question"),
        ({"prompt_template": "{question: text}"}, "single-v1 has {'question: text'}"),
        ({"prompt_template": "{answer:999999999999}"}, "single-v1 has {'answer:999999999999'}"),
        ({"prompt_template": "\ud800"}, "both texts, without lone surrogates"),
        ({"system_prompt": "\ud800"}, "both texts, without lone surrogates"),
        ({"prompt_template": "{answer"}, "line 1: prompt_template can't be filled in"),
        ({"prompt_template": None}, "needs a system_prompt and a prompt_template"),
        ({"output_format": "[[rating_a,rating_b]]"}, "output_format of single-v1 is"),
        ({"name": ["x"]}, "has no prompt 'single-v1'"),
    ):
        with pytest.raises(QspinError, match=told):
            read_prompts(written(file, [rows[0] | change, *rows[1:]]))
    file.write_text('{"name": "single-v1"\n')
    with pytest.raises(QspinError, match=r"judge_prompts\.jsonl: line 1 "):
        read_prompts(file)


def test_braces_in_an_answer_are_text() -> None:
    question = Question(1, "coding", ("Write {x}.", "And {0}?"), ("{}", "{y}"))
    for turn in (1, 2):
        asked = request(OWN, question, [["{a!r}", "}"], ["{b", "{"]], turn)[-1].content
        assert "{a!r}" in asked and "{b" in asked and "Write {x}." in asked


# --- figures ---


def test_changes_are_paired_and_both_turns_of_a_question_go_together() -> None:
    def graded(bonus: float) -> dict[str, Any]:
        scores = [[n, "stem", turn, 1.0 + n % 5 + bonus] for n in range(20) for turn in (1, 2)]
        return {"scores": scores, "answers": {"cut": 0, "unanswered": 0, "unguided": 0}}

    grades = {"base": graded(0), "1": graded(1)}
    grades["1"]["scores"][0][3] = None
    result = {"questions": 20, "judge": "<b>|judge", "prompts": "qspin's", "grades": grades, "pairs": {}}
    [players, categories] = mtbench_result.tables(result)
    assert players[0] == "MT-Bench: 20 questions, judged by -b--judge"
    turns = mtbench_result.figures(result)["grades"]["base"]["all"]
    parts = [{key: turn[key] for key in ("value", "low", "high")} for turn in turns.values()]
    assert parts[0] == parts[1] == parts[2], "a second turn that is like the first makes nothing surer"
    assert parts[0]["value"] == 3 and parts[0]["low"] < 2.7 and parts[0]["high"] > 3.3
    assert players[2][0][1:3] == ["3.00 [{low:.2f}, {high:.2f}]".format(**parts[0]), ""]
    assert players[2][1][2] == "+1.00 [+1.00, +1.00]"
    assert players[2][1][3] == "1"
    assert [row[0] for row in categories[2]] == ["stem", "", "all", ""]


def test_the_report_has_the_tables(again: Path, played_run: Path, server: JudgeServer) -> None:
    page = again / "report.html"
    assert call("report", again).code == 0
    assert "MT-Bench" not in page.read_text()
    assert trial(again, server, played_run / "questions.jsonl").code == 0
    assert trial(again, server, played_run / "questions.jsonl", "--pairwise").code == 0
    assert call("report", again).code == 0
    text = page.read_text()
    assert f"MT-Bench: 5 questions, judged by {MODEL}" in text
    assert "7.00 [7.00, 7.00]" in text and "<td>riddles</td>" in text and "judges" not in text


def test_a_run_that_is_none(tmp_path: Path, server: JudgeServer) -> None:
    assert "not the folder of a run" in one_line(trial(tmp_path, server, tmp_path / "q.jsonl"))


def test_a_narrow_terminal_loses_nothing(again: Path, played_run: Path, server: JudgeServer) -> None:
    assert trial(again, server, played_run / "questions.jsonl", "--iteration", "base").code == 0
    answer = call("mtbench", again, *options(server, played_run / "questions.jsonl"), "--iteration", "base", columns=80)
    assert "7.00 [7.00, 7.00]" in answer.out
    assert max(map(len, answer.out.partition("result:")[0].splitlines())) <= 80
