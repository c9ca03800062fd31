"""MT-Bench's questions, from files and from FastChat, and what players answer to them, interrupted or not."""

from __future__ import annotations

import hashlib
import http.server
import json
import re
import shutil
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import call
from conftest import flip_byte
from judge_server import MODEL, JudgeServer
from mtbench_parts import (
    QUESTIONS,
    TURNS,
    Stop,
    StopsAt,
    answer_all,
    answers_of,
    folder_of,
    one_line,
    questions_of,
    result_of,
    trial,
    written,
)

from qspin.errors import QspinError
from qspin.files import sha256_of
from qspin.records import Message
from qspin.run_dir import RunDir
from qspin.trials import loaded as loaded_module
from qspin.trials import mtbench_answers
from qspin.trials.judging import Question
from qspin.trials.loaded import Loaded

# --- questions ---


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
    for content, told in (
        ("", "has no questions"),
        ("{", "line 1 goes on in the"),
        ("[1]\n", "not an object"),
    ):
        path.write_text(content)
        with pytest.raises(QspinError, match=told):
            mtbench_answers.read_bench(path, None)
    with pytest.raises(QspinError, match="no such file"):
        mtbench_answers.read_bench(tmp_path / "none.jsonl", None)
    written(path, QUESTIONS)
    with pytest.raises(QspinError, match=r"r.jsonl: line 1: is no answer in FastChat's format"):
        mtbench_answers.read_bench(path, written(tmp_path / "r.jsonl", [{"question_id": 1, "choices": []}]))


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
    bench = mtbench_answers.read_bench(questions_of(answered), None)
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


def test_a_damaged_adapter_does_not_answer(unasked: Path) -> None:
    told = flip_byte(RunDir(unasked).iteration(0).adapter)
    answer = call("mtbench", unasked, "--questions", questions_of(unasked), "--iteration", "base,0")
    assert (answer.code, answer.err.splitlines()[-1]) == (1, f"error: {told}")
    assert not (folder_of(unasked) / "model_answer" / "iteration-0.jsonl").exists()


def test_without_a_judge_players_only_answer(unasked: Path, server: JudgeServer) -> None:
    """As one does where memory holds one model at a time."""
    asked = ("mtbench", unasked, "--questions", questions_of(unasked), "--iteration", "base")
    answer = call(*asked)
    assert answer.code == 0, answer.err
    assert f"answers: {folder_of(unasked) / 'model_answer'}; give --judge-url and --judge-model" in answer.out
    assert sum(map(len, answers_of(unasked, "base").values())) == TURNS
    assert trial(unasked, server, "--iteration", "base").code == 0
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


@pytest.mark.parametrize("step", [2, 4, 6])
def test_answers_that_were_interrupted_go_on_as_if_they_had_not_been(
    step: int, answered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = mtbench_answers.read_bench(questions_of(answered), None)
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
    bench = mtbench_answers.read_bench(questions_of(answered), None)
    loaded, answers = Loaded.open(RunDir(answered), "1"), mtbench_answers.Answers.read(path)
    rows: list[int] = []
    real = loaded.reply
    monkeypatch.setattr(loaded, "reply", lambda asked, **how: rows.append(len(asked)) or real(asked, **how))
    mtbench_answers.answer(loaded, bench, answers, "iteration-1", StopsAt(-1))
    assert sum(rows) == 2 + 1 + 2, "questions 1 and own-4 for the first turn, 1 alone and 2 and 5 for the second"
    assert {question.id: answers.turns(question) for question in bench.questions} == whole
    assert mtbench_answers.Answers.read(path).lines == answers.lines


def test_another_adapter_in_the_place_of_one_answers_anew(answered: Path, tmp_path: Path) -> None:
    run = RunDir(shutil.copytree(answered, tmp_path / "run"))
    shutil.copy(questions_of(answered), questions_of(run.path))
    lines = (folder_of(answered) / "model_answer" / "iteration-1.jsonl").read_text()
    assert sha256_of(run.iteration(1).adapter / "adapter_model.safetensors") in lines
    shutil.rmtree(run.iteration(1).adapter)
    shutil.copytree(run.iteration(0).adapter, run.iteration(1).adapter)
    answer_all(run.path)
    assert answers_of(run.path, "iteration-1") != answers_of(answered, "iteration-1")
    assert answers_of(run.path, "base") == answers_of(answered, "base")


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

    bench = mtbench_answers.read_bench(questions_of(answered), None)
    loaded, answers = Loaded.open(RunDir(answered), "1"), mtbench_answers.Answers.read(tmp_path / "iteration-1.jsonl")
    monkeypatch.setattr(loaded_module, "generate", refuse)
    with pytest.raises(QspinError) as caught:
        mtbench_answers.answer(loaded, bench, answers, "iteration-1", StopsAt(-1))
    assert str(caught.value) == (
        "out of memory while answering (no room); close other programs, and the same command goes on"
    )


def test_what_does_not_fit_the_context_is_said(unasked: Path, tmp_path: Path, server: JudgeServer) -> None:
    rows = [
        {"question_id": 1, "category": "stem", "turns": ["many words " * 200, "What is 1?"]},
        {"question_id": 2, "category": "stem", "turns": ["What is 2?", "many words " * 200]},
        {"question_id": 3, "category": "stem", "turns": ["What is 3?", "What is 4?"]},
    ]
    answer = trial(unasked, server, "--questions", written(tmp_path / "long.jsonl", rows), "--iteration", "base")
    assert answer.code == 0, answer.err
    assert len(server.asked) == len(server.prompts()) + 1, "one word beforehand, for answers and judgements"
    assert re.search(r"no room for 1024 new tokens in 3 of 6 turns, which were given \d+ to \d+", answer.out)
    assert "3 of 6 turns are too long for the context, or can't be rendered; their answers are empty" in answer.out
    said = answers_of(unasked, "base")
    assert said[1] == ["", ""] and all(said[3])
    assert said[2][0] and said[2][1] == "", "a second turn that does not fit takes nothing from the first"
    assert result_of(unasked)["grades"]["base"]["answers"]["unanswered"] == 3
    lines = [json.loads(line) for line in (folder_of(unasked) / "model_answer" / "base.jsonl").open()]
    first, second, third = ([part["cap"] for part in line["qspin"]] for line in lines)
    assert first == [0, 0] and second[1] == 0 and second[0] > third[0]
    assert all(cap % mtbench_answers.STEP == 0 for cap in (*second, *third))
