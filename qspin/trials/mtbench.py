"""MT-Bench (Zheng et al. 2023, arXiv 2306.05685) of a run's players: two turns answered, and judged by a model.

    bench = read_bench(questions=None, references=None)          # FastChat's 80 questions
    with Trial(run_dir, bench, judge, OWN, prompts_name=OURS, at_once=4, progress=progress) as trial:
        trial.grade(["base", "1"])                               # or trial.compare("base", "1")

In the run's folder, with formats of FastChat's where it has one:

mt-bench/questions-HASH/            one question file
    question.jsonl
    model_answer/iteration-1.jsonl  a line a question, written anew after each batch of answers
    JUDGE-HASH/                     one judge with its prompts and the reference answers that it sees
        grades/1/81-turn-2.json     a judgement: what was asked, what was said, the verdict
        pairs/base-1/81-turn-2-a.json, …-b.json     with the answers in this order, and in the other one
        result.json                 see mtbench_result.py

A piece that is there is not made again: an answer as long as the player's adapter is the same, a judgement as long as
the same would be asked.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock

from qspin.errors import QspinError
from qspin.figures.mtbench_result import FIRST, RESULT, SECOND, TIE, figures
from qspin.files import (
    ADAPTER_WEIGHTS,
    full_disk_told,
    make_folder,
    read_json,
    remove_temporaries,
    sha256_of,
    write_json,
    write_text,
)
from qspin.records import Message
from qspin.run_dir import RunDir
from qspin.trials.judge import Judge, Judgement, ask_all
from qspin.trials.judging import Prompts, Question, rating, request, winner
from qspin.trials.loaded import Loaded
from qspin.trials.mtbench_answers import ANSWERS, Answers, Bench, Progress, answer, question_file, short_hash


@dataclass(frozen=True, slots=True)
class Asked:
    """One request to a judge, and the file that its judgement is kept in."""

    path: Path
    question: Question
    turn: int
    messages: tuple[Message, ...]

    def to_json(self) -> list[dict[str, str]]:
        return [{"role": message.role, "content": message.content} for message in self.messages]


@dataclass(slots=True)
class Trial:
    """Players and a judge at work on one question file in a run's folder, whose trials a `with` holds."""

    run_dir: RunDir
    bench: Bench
    judge: Judge | None  # None: for answers alone
    prompts: Prompts
    prompts_name: str
    at_once: int
    progress: Progress
    _lock: filelock.BaseFileLock = field(init=False)

    def __enter__(self) -> Trial:
        """Raises a QspinError: another process holds the trials of the run, or the folder can't be written to."""
        top = self.run_dir.trials
        self._lock = filelock.FileLock(top / ".lock", blocking=False)
        try:
            with full_disk_told(top):
                make_folder(top)
                self._lock.acquire()
                remove_temporaries(top)
        except filelock.Timeout:
            raise QspinError(f"{top}: another process is at work here; wait for it") from None
        except OSError as error:
            raise QspinError(f"{top} can't be written to: {error.strerror}") from None
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @property
    def folder(self) -> Path:
        return self.run_dir.trials / self.bench.folder

    @property
    def judged(self) -> Path:
        assert self.judge is not None
        words = {name: (prompt.system, prompt.template) for name, prompt in self.prompts.items()}
        shown = {str(question.id): question.shown for question in self.bench.questions if question.shown}
        seen = [self.judge.model, words, shown] if shown else [self.judge.model, words]
        return self.folder / f"{_slug(self.judge.model)}-{short_hash(seen)}"

    @property
    def result(self) -> Path:
        return self.judged / RESULT

    def grade(self, players: Sequence[str]) -> dict[str, Any]:
        """Every turn of every player on its own, 1 to 10; the result so far of this judge."""
        answers = self.answers(players)
        asked = [self._grades(player, answers[player]) for player in players]
        self._ask([item for items in asked for item in items], "grades", rating)
        found = {}
        for player, items in zip(players, asked, strict=True):
            how = answers[player].how()
            found[player] = {
                "scores": [[item.question.id, item.question.category, item.turn, _verdict(item)] for item in items],
                "answers": {
                    "cut": sum(not part["ended"] and part["cap"] > 0 for part in how),
                    "unanswered": sum(part["cap"] == 0 for part in how),
                    "unguided": sum(item.question.unguided(item.turn) for item in items),
                },
            }
        return self._conclude("grades", found)

    def compare(self, first: str, second: str) -> dict[str, Any]:
        """Every turn of two players against each other, in both orders; the result so far of this judge."""
        first, second = sorted((first, second), key=_rank)
        answers = self.answers([first, second])
        pairs = self._pairs(first, second, answers)
        self._ask([item for pair in pairs for item in pair], "comparisons", winner)
        games = [
            [there.question.id, there.question.category, there.turn, *game(_verdict(there), _verdict(back))]
            for there, back in pairs
        ]
        return self._conclude("pairs", {f"{first} vs {second}": games})

    def answers(self, players: Sequence[str]) -> dict[str, Answers]:
        """Every player's, made where they are missing. The judge is asked for a word before any is, not hours after."""
        found = {player: self._kept(player) for player in players}
        questions = self.bench.questions
        wanting = [player for player in players if found[player].missing(questions)]
        if wanting:
            if self.judge is not None:
                self.judge.check(self.progress.note)
            write_text(self.folder / "question.jsonl", question_file(questions))
            self.progress.note("loading the model")
            loaded = Loaded.open(self.run_dir, wanting[0], self.progress.note)
            for player in wanting:
                loaded.seat(player)
                answer(loaded, self.bench, found[player], _model_name(player), self.progress)
        return found

    def _kept(self, player: str) -> Answers:
        if player == "base":  # whom the run began with
            adapter = self.run_dir.read_record()["inputs"]["model.init_adapter"]
        else:
            adapter = sha256_of(self.run_dir.player(player).adapter / ADAPTER_WEIGHTS)
        found = Answers.read(self.folder / ANSWERS / f"{_model_name(player)}.jsonl")
        found.keep_of(adapter)
        return found

    def _grades(self, player: str, answers: Answers) -> list[Asked]:
        folder = self.judged / "grades" / player
        return [
            Asked(
                folder / f"{question.id}-turn-{turn}.json",
                question,
                turn,
                request(self.prompts, question, [answers.turns(question)], turn),
            )
            for question in self.bench.questions
            for turn in range(1, len(question.turns) + 1)
        ]

    def _pairs(self, first: str, second: str, answers: Mapping[str, Answers]) -> list[tuple[Asked, Asked]]:
        """Each turn with the first player as A, and as B."""
        folder = self.judged / "pairs" / f"{first}-{second}"

        def asked(question: Question, turn: int, order: str) -> Asked:
            sides = [answers[player].turns(question) for player in (first, second)]
            messages = request(self.prompts, question, sides if order == "a" else sides[::-1], turn)
            return Asked(folder / f"{question.id}-turn-{turn}-{order}.json", question, turn, messages)

        return [
            (asked(question, turn, "a"), asked(question, turn, "b"))
            for question in self.bench.questions
            for turn in range(1, len(question.turns) + 1)
        ]

    def _ask(self, asked: Sequence[Asked], what: str, parse: Any) -> None:
        """Have judged what is not yet; refused prompts are not kept, so that another context length may take them."""
        judge = self.judge
        assert judge is not None
        missing = {item.path: item for item in asked if not _kept(item)}
        done, refused, unread = len(asked) - len(missing), [], []
        told = f"{judge.model}: {what}"
        self.progress.step(told, done, len(asked))

        def keep(path: Path, judgement: Judgement[Any]) -> None:
            nonlocal done
            item = missing[path]
            if judgement.refused:
                refused.append(f"{path.stem}: {judgement.text}")
            else:
                value = {
                    "question_id": item.question.id,
                    "turn": item.turn,
                    "judge": judge.model,
                    "asked": item.to_json(),
                    "judgment": judgement.text,
                    "verdict": judgement.verdict,
                    "tstamp": time.time(),
                }
                write_json(path, value)
                if judgement.verdict is None:
                    unread.append(f"{path.stem}: {judgement.text[:80]!r}")
            done += 1
            self.progress.step(told, done, len(asked))

        if missing:
            judge.check(self.progress.note)
        ask_all(
            judge,
            {path: item.messages for path, item in missing.items()},
            parse=parse,
            keep=keep,
            note=self.progress.note,
            at_once=self.at_once,
        )
        if refused:
            self.progress.note(
                f"the judge would not take {len(refused)} prompts, which count as unparsed and are asked again by the "
                f"next command; {refused[0]}"
            )
        if unread:
            self.progress.note(
                f"{len(unread)} of {len(missing)} judgements hold no verdict that can be read, and count as unparsed; "
                f"the first is {unread[0]}"
            )

    def _conclude(self, kind: str, found: Mapping[str, Any]) -> dict[str, Any]:
        """What this judge found before stays, but for what was found anew."""
        assert self.judge is not None
        result: dict[str, Any] = {"grades": {}, "pairs": {}}
        if self.result.is_file():
            old = read_json(self.result)
            result = {key: old[key] for key in result}
        result[kind] |= found
        result["grades"] = {player: result["grades"][player] for player in sorted(result["grades"], key=_rank)}
        result = {
            "questions": len(self.bench.questions),
            "judge": self.judge.model,
            "prompts": self.prompts_name,
            **result,
        }
        result["figures"] = figures(result)
        write_json(self.result, result)
        return result


def game(there: str | None, back: str | None) -> tuple[str | None, bool]:
    """Who wins, of two verdicts: the first player was A in one and B in the other; and whether they agree.

    None if one of them has no verdict. A win is one in both orders.
    """
    if there is None or back is None:
        return None, False
    one, other = {"A": FIRST, "B": SECOND}.get(there, TIE), {"A": SECOND, "B": FIRST}.get(back, TIE)
    return (one if one == other else TIE), {one, other} != {FIRST, SECOND}


def _kept(item: Asked) -> bool:
    return item.path.is_file() and read_json(item.path)["asked"] == item.to_json()


def _verdict(item: Asked) -> Any:
    return read_json(item.path)["verdict"] if _kept(item) else None


def _model_name(player: str) -> str:
    return f"iteration-{player}" if player.isdigit() else player


def _rank(player: str) -> tuple[float, str]:
    """Players in the order of a run."""
    return {"base": -2.0, "sft": -1.0}.get(player, math.inf if not player.isdigit() else float(player)), player


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:60] or "unnamed"
