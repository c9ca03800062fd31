"""What a judge is asked, in our words or in FastChat's, and how what it says is read."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from judge_server import SEVEN, JudgeServer
from mtbench_parts import QUESTIONS, answers_of, folder_of, kept, result_of, trial, written

from qspin.errors import QspinError
from qspin.trials.judging import OWN, Question, rating, read_prompts, request, winner


def test_what_a_judge_is_shown(again: Path, server: JudgeServer) -> None:
    assert trial(again, server, "--iteration", "1").code == 0
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


def test_references_of_a_file_take_the_place(again: Path, server: JudgeServer, tmp_path: Path) -> None:
    row = {"question_id": 5, "choices": [{"index": 0, "turns": ["It is 7, surely.", "Since I say so."]}]}
    file = written(tmp_path / "gpt-4.jsonl", [row, {**row, "question_id": 999}])
    arguments = (again, server, "--iteration", "base")
    assert trial(*arguments, "--references", file).code == 0
    assert sum("It is 7, surely." in prompt for prompt in server.prompts()) == 2
    assert sum("It is 35." in prompt for prompt in server.prompts()) == 2, "where it has none, the question file's"
    assert result_of(again)["grades"]["base"]["answers"]["unguided"] == 0


def test_fastchats_prompts_are_used_as_they_are(again: Path, server: JudgeServer, tmp_path: Path) -> None:
    rows = [
        {
            "name": name, "type": "single", "system_prompt": f"system of {name}", "output_format":
            "[[A]]" if name.startswith("pair") else "[[rating]]", "prompt_template": f"{name} asks\n{prompt.template}",
        }
        for name, prompt in OWN.items()
    ]  # fmt: skip
    file = written(tmp_path / "judge_prompts.jsonl", [*rows, {"name": "another"}])
    arguments = (again, server, "--iteration", "base")
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
