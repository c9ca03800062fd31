"""MT-Bench on a small run with a scripted judge: grades, comparisons, what is kept and used again, and the figures."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import filelock
import pytest
from command_line import Answer, call
from judge_server import MODEL, SEVEN, JudgeServer
from mtbench_parts import (
    QUESTIONS,
    TURNS,
    StopsAt,
    answers_of,
    folder_of,
    kept,
    one_line,
    options,
    result_of,
    trial,
    written,
)

from qspin.figures import mtbench_result
from qspin.run_dir import RunDir
from qspin.trials import mtbench, mtbench_answers
from qspin.trials.judge import Judge
from qspin.trials.judging import OWN

# --- grades ---


def test_each_turn_is_graded_and_counted(again: Path, server: JudgeServer) -> None:
    def judge(prompt: str) -> str:
        return "Rating: [[2]]" if "<ANSWER 2>" in prompt else "I say [[3]], no: Rating: [[8.5]]"

    server.judge, server.seconds = judge, 0.1  # else one may be answered before the next is asked
    answer = trial(again, server, "--iteration", "base,1")
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


def test_the_same_command_asks_nothing_again(again: Path, server: JudgeServer) -> None:
    first = trial(again, server, "--iteration", "base")
    second = trial(again, server, "--iteration", "base")
    assert len(server.prompts()) == TURNS
    assert first.out.partition("MT-Bench:")[2] == second.out.partition("MT-Bench:")[2]
    assert trial(again, server, "--iteration", "1").code == 0
    assert len(server.prompts()) == 2 * TURNS
    assert list(result_of(again)["grades"]) == ["base", "1"], "what was found before stays"


def test_players_are_the_base_and_the_kept_one_unless_named(again: Path, server: JudgeServer) -> None:
    assert trial(again, server).code == 0
    names = list(result_of(again)["grades"])
    assert names[0] == "base" and names[1] in {"0", "1"} and len(names) == 2


def test_a_verdict_that_cannot_be_read_is_asked_for_once_more(again: Path, server: JudgeServer) -> None:
    times: Counter[str] = Counter()

    def judge(prompt: str) -> str | None:
        times[prompt] += 1
        if "What is 9?" in prompt:
            return None
        return "Hm." if "What is 3?" in prompt and (times[prompt] == 1 or "<ANSWER 2>" in prompt) else SEVEN

    server.judge = judge
    answer = trial(again, server, "--iteration", "base")
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
    answer = trial(again, server, "--iteration", "base")
    assert answer.code == 0 and "judgements hold" not in answer.out
    assert server.asked == [], "unparsed is kept"


def test_what_was_cut_holds_no_verdict(again: Path, server: JudgeServer) -> None:
    """A judge that thinks aloud repeats the form that it was asked for long before it comes to a verdict."""
    server.judge, server.finish = lambda _prompt: "I am to end with a grade, as in Rating: [[6]]. First", "length"
    answer = trial(again, server, "--iteration", "base")
    assert answer.code == 0
    assert "9 of 9 judgements hold no verdict that can be read" in " ".join(answer.out.split())
    assert result_of(again)["figures"]["grades"]["base"]["all"]["both"] == {"judged": 0, "unparsed": 9}
    assert kept(again)["base/1-turn-1"]["judgment"] == "I am to end with a grade, as in Rating: [[6]]. First"


# --- comparisons ---


def test_a_judge_that_goes_by_places_finds_ties_alone(again: Path, server: JudgeServer) -> None:
    server.judge = lambda _: "[[A]]"
    answer = trial(again, server, "--iteration", "base,1", "--pairwise")
    assert answer.code == 0, answer.err
    assert len(server.prompts()) == 2 * TURNS
    told = result_of(again)["figures"]["pairs"]["base vs 1"]["all"]
    assert told == {"wins": 0, "ties": TURNS, "losses": 0, "unparsed": 0, "value": 0.5, "low": 0.5, "high": 0.5}
    assert re.search(rf"all +0 +{TURNS} +0 +50% \[50, 50\] +{TURNS} +0", answer.out)
    assert result_of(again)["grades"] == {}
    trial(again, server, "--iteration", "1,base", "--pairwise")
    assert len(server.prompts()) == 2 * TURNS and len(result_of(again)["pairs"]) == 1, (
        "the order of naming says nothing"
    )


def test_the_two_orders_show_the_answers_swapped(again: Path, server: JudgeServer) -> None:
    server.judge = lambda _: "[[C]]"
    trial(again, server, "--iteration", "base,1", "--pairwise")
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


def test_a_win_is_one_in_both_orders(again: Path, server: JudgeServer) -> None:
    """A judge that prefers by what is said, but for one question, where it can't be understood in one order."""
    base = answers_of(again, "base")

    def judge(prompt: str) -> str:
        place_a = prompt.find("ASSISTANT A>\n") + len("ASSISTANT A>\n")
        is_base = any(said[0] and prompt.startswith(said[0], place_a) for said in base.values())
        if "What is 9?" in prompt:
            return "[[A]]" if is_base else "no idea"
        return "[[A]]" if is_base else "[[B]]"

    server.judge = judge
    trial(again, server, "--iteration", "base,1", "--pairwise")
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


def test_a_comparison_is_of_two(again: Path, server: JudgeServer) -> None:
    answer = trial(again, server, "--iteration", "base,0,1", "--pairwise")
    assert answer == Answer(1, "", "error: --pairwise compares two players, and --iteration names 3: base, 0, 1\n")
    answer = trial(again, server, "--iteration", "1,last", "--pairwise")
    assert "--iteration names 1: 1" in answer.err


# --- what is kept ---


def test_what_was_judged_with_other_references_is_in_no_table_with_these(
    again: Path, server: JudgeServer, tmp_path: Path
) -> None:
    bare = [{key: value for key, value in question.items() if key != "reference"} for question in QUESTIONS]
    without = written(tmp_path / "bare.jsonl", bare)
    others = [{"question_id": 2, "choices": [{"index": 0, "turns": ["It is 15.", "It is 18."]}]}]
    server.judge = lambda prompt: "[[C]] [[2]]" if "REFERENCE" in prompt else "[[C]] [[9]]"
    assert trial(again, server, "--iteration", "base").code == 0
    first = result_of(again)
    assert trial(again, server, "--questions", without, "--iteration", "1").code == 0
    assert trial(again, server, "--questions", without, "--iteration", "base,1", "--pairwise").code == 0
    third = written(tmp_path / "gpt-4.jsonl", others)
    assert trial(again, server, "--questions", without, "--iteration", "0", "--references", third).code == 0
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


def test_other_questions_have_a_folder_of_their_own(again: Path, server: JudgeServer, tmp_path: Path) -> None:
    assert trial(again, server, "--iteration", "base").code == 0
    others = written(tmp_path / "others.jsonl", [{"question_id": 1, "category": "writing", "turns": ["What is 11?"]}])
    assert trial(again, server, "--questions", others, "--iteration", "base").code == 0
    assert len(list((again / "mt-bench").glob("questions-*/model_answer/base.jsonl"))) == 2
    titles = [table[0] for table in mtbench_result.all_tables(RunDir(again).trials)]
    assert sorted(title.partition(",")[0] for title in titles) == [
        *["MT-Bench: 1 questions"] * 2,
        *["MT-Bench: 5 questions"] * 2,
    ]


def test_damaged_pieces_are_named(again: Path, server: JudgeServer) -> None:
    arguments = (again, server, "--iteration", "base")
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


def test_one_trial_at_a_time(again: Path, server: JudgeServer) -> None:
    with filelock.FileLock(again / "mt-bench" / ".lock"):
        answer = trial(again, server)
    assert one_line(answer) == f"error: {again / 'mt-bench'}: another process is at work here; wait for it\n"


def test_a_run_that_is_none(tmp_path: Path, server: JudgeServer) -> None:
    assert "not the folder of a run" in one_line(trial(tmp_path, server))


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


def test_the_report_has_the_tables(again: Path, server: JudgeServer) -> None:
    page = again / "report.html"
    assert call("report", again).code == 0
    assert "MT-Bench" not in page.read_text()
    assert trial(again, server).code == 0
    assert trial(again, server, "--pairwise").code == 0
    assert call("report", again).code == 0
    text = page.read_text()
    assert f"MT-Bench: 5 questions, judged by {MODEL}" in text
    assert "7.00 [7.00, 7.00]" in text and "<td>riddles</td>" in text and "judges" not in text


def test_a_narrow_terminal_loses_nothing(again: Path, server: JudgeServer) -> None:
    assert trial(again, server, "--iteration", "base").code == 0
    answer = call("mtbench", again, *options(again, server), "--iteration", "base", columns=80)
    assert "7.00 [7.00, 7.00]" in answer.out
    assert max(map(len, answer.out.partition("result:")[0].splitlines())) <= 80
