"""A small MT-Bench: five questions, runs that they lie beside, a judge, the command, and what it keeps there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import Answer, call
from judge_server import KEY, MODEL, SEVEN, JudgeServer

from qspin.files import read_json
from qspin.run_dir import RunDir
from qspin.trials import judge
from qspin.trials.judging import OWN
from qspin.trials.mtbench import Trial
from qspin.trials.mtbench_answers import read_bench

QUESTIONS: list[dict[str, Any]] = [
    {"question_id": 1, "category": "writing", "turns": ["What is 3?", "What is 4?"]},
    {"question_id": 2, "category": "math", "turns": ["What is 5?", "And 6?"], "reference": ["It is 35.", "It is 42."]},
    {"question_id": 3, "category": "stem", "turns": ["What is 7?", "What is 8?"]},
    {"question_id": "own-4", "category": "riddles", "turns": ["What is 9?"]},
    {"question_id": 5, "category": "coding", "turns": ["What is 1?", "Why?"], "reference": ["It is 7.", ""]},
]
TURNS = 9


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


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def questions_of(run: Path) -> Path:
    return run.parent / "questions.jsonl"


def answer_all(run: Path) -> None:
    """By base and iteration 1; nobody judges."""
    bench = read_bench(questions_of(run), None)
    with Trial(RunDir(run), bench, None, OWN, "", 1, StopsAt(-1)) as trial:
        trial.answers(["base", "1"])


@pytest.fixture
def unasked(played_run: RunDir, tmp_path: Path) -> Path:
    """A copy of `played_run`, with the small MT-Bench's questions beside it."""
    return _beside_questions(played_run, tmp_path)


@pytest.fixture(scope="session")
def answered(played_run: RunDir, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with every answer of base and iteration 1, and no judgement; to be read."""
    copy = _beside_questions(played_run, tmp_path_factory.mktemp("answered"))
    answer_all(copy)
    return copy


@pytest.fixture
def again(answered: Path, tmp_path: Path) -> Path:
    """A copy of that."""
    return _beside_questions(RunDir(answered), tmp_path)


def _beside_questions(run_dir: RunDir, folder: Path) -> Path:
    copy = Path(shutil.copytree(run_dir.path, folder / "run"))
    written(questions_of(copy), QUESTIONS)
    return copy


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    """A judge who gives a seven, and who is asked again at once, but for the pauses that it asks for."""
    monkeypatch.setattr(judge, "FIRST_WAIT", 0.0)
    with JudgeServer(lambda _: SEVEN) as found:
        yield found


def options(run: Path, server: JudgeServer) -> list[str | Path]:
    return ["--judge-url", server.url, "--judge-model", MODEL, "--questions", questions_of(run)]


def trial(run: Path, server: JudgeServer, *more: str | Path, key: str = KEY) -> Answer:
    return call("mtbench", run, *options(run, server), *more, QSPIN_JUDGE_KEY=key)


def one_line(answer: Answer) -> str:
    assert answer.code == 1 and answer.err.startswith("error: ") and answer.err.count("\n") == 1
    assert KEY not in answer.out + answer.err
    return answer.err


def folder_of(run: Path) -> Path:
    [folder] = (run / "mt-bench").glob("questions-*")
    return folder


def result_of(run: Path) -> dict[str, Any]:
    [path] = folder_of(run).glob("scripted-*/result.json")
    return read_json(path)


def kept(run: Path) -> dict[str, dict[str, Any]]:
    """Judgements by player and name."""
    found = sorted(folder_of(run).glob("scripted-*/*/*/*.json"))
    return {f"{path.parent.name}/{path.stem}": read_json(path) for path in found}


def answers_of(run: Path, model: str) -> dict[Any, list[str]]:
    text = (folder_of(run) / "model_answer" / f"{model}.jsonl").read_text()
    lines = [json.loads(line) for line in text.split("\n")[:-1]]
    return {line["question_id"]: line["choices"][0]["turns"] for line in lines}
